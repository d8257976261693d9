"""The modules lie at the top of the repository; all tests run on the CPU, offline, with fixed seeds."""
import csv
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
PATIENCE = 1200  # seconds for a process that takes one minute on an idle machine
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small sums are no faster on two threads, round otherwise, and crawl beside another busy process."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def settings_read_once():
    """train.py reads its settings off its source whenever it is called: slow, and the same."""
    import train
    original, known = train.settings, list(train.settings(train.PARTS))
    train.settings = lambda parts: known if parts is train.PARTS else original(parts)
    yield
    train.settings = original


@pytest.fixture(scope="session", autouse=True)
def begun_early(request, one_thread, settings_read_once):
    """The runs that some test waits for, begun in the background before the first test."""
    asked = {name for item in request.session.items for name in item.fixturenames}
    for name in ("smoke_process", "noise_process", "coursework_process", "demo_process"):
        if name in asked:
            request.getfixturevalue(name)


def spawn(*arguments: str, **options) -> subprocess.Popen:
    """Python in a process of its own, on one thread: two share two cores, and sums round alike in all."""
    return subprocess.Popen([sys.executable, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


class Fork:
    """work() in a forked process, which has all that is imported here; what it prints goes to two
    files of the folder. As far as it goes, like subprocess.Popen."""

    def __init__(self, work, folder: Path, encoding: str = "utf-8"):
        import torch._dynamo  # noqa: F401  the first optimizer imports it: now, for all forks
        self.paths, self.returncode = [folder / name for name in ("printed", "errors")], None
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 70  # an exception that work() did not expect
            try:
                for stream, path in zip((1, 2), self.paths):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
                sys.stdout, sys.stderr = (open(n, "w", encoding=encoding, closefd=False)
                                          for n in (1, 2))
                status = work() or 0
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else print(stop.code) or 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it printed, and its errors, when it is done."""
        end = time.monotonic() + timeout
        while self.returncode is None and time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.02)
        assert self.returncode is not None, f"not done after {timeout} seconds"
        return tuple(path.read_text(encoding="utf-8") for path in self.paths)

    def kill(self):
        """If it is not done."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def forget_the_project(folder: Path = ROOT):
    """As if nothing of the project had been imported, in a process of its own: what is imported
    from now on is looked for in the folder first."""
    ours = (ROOT, ROOT / "tests")
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent in ours:
            del sys.modules[name]
    others = [path for path in sys.path if Path(path).resolve() not in ours]
    sys.path[:] = [str(folder), *others]


def finished(out: Path, process) -> Path:
    """The folder of a run, when it is done; what it printed lies beside it."""
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, printed + errors
    (out.parent / "printed.txt").write_text(printed + errors)
    return out


@pytest.fixture(scope="session")
def smoke_process(tmp_path_factory):
    """The one smoke run that the tests share, begun: its folder and process."""
    out = tmp_path_factory.mktemp("smoke") / "run"
    process = spawn(str(ROOT / "train.py"), "--smoke", "--out", str(out))
    yield out, process
    process.kill()


@pytest.fixture(scope="session")
def smoke(smoke_process):
    """The folder of the smoke run, finished. Tests that change it take a copy."""
    return finished(*smoke_process)


def write_noise(folder: Path, seed: int, users: int = 60, items: int = 240, likes: int = 20):
    """A data folder in which nothing depends on anything: pictures, texts, prompts, likes are noise."""
    chance = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    words = ["".join(chance.choice(list("abcdefghij"), 4)) for _ in range(60)]
    with open(folder / "items.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["item", "text", "prompt"])
        for n in range(items):
            picture = chance.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(picture).save(folder / "images" / f"i{n}.png")
            rows.writerow([f"i{n}", " ".join(chance.choice(words, 6)), f"p{chance.integers(6)}"])
    with open(folder / "interactions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user", "item", "timestamp"])
        rows.writerows([f"u{u}", f"i{i}", n] for u in range(users)
                       for n, i in enumerate(chance.permutation(items)[:likes]))


# Small pictures, for speed; the judge learns by heart what it learns from, so that one which has
# learnt what it judges does not look like chance.
NOISE = """--image-size 16 --reward-log-every 9 --pairs 200 --samples 2 --sampled-users 2
    --reward-scorer-steps 50 --reward-scorer-width 16 --reward-scorer-batch 64
    --reward-scorer-shift 1 --reward-scorer-zoom 0 --reward-scorer-mirror 0
    --reward-scorer-dropout 0 --reward-scorer-drop 0""".split()


def two_runs(folder: Path) -> int:
    """The runs on noise; an exit status."""
    import train
    train.STAGES["report"] = lambda run: "nobody reads it"
    runs = (["--smoke", "--data", str(folder / f"data-{n}"), "--seed", str(n), *NOISE,
             "--out", str(folder / f"run-{n}")] for n in (0, 1))
    return next(filter(None, map(train.main, runs)), 0)


@pytest.fixture(scope="session")
def noise_process(tmp_path_factory):
    """Two runs on data without any structure, one after the other, begun: their folder and process."""
    folder = tmp_path_factory.mktemp("noise")
    for n in (0, 1):
        write_noise(folder / f"data-{n}", n)
    process = Fork(lambda: two_runs(folder), folder)
    yield folder, process
    process.kill()


@pytest.fixture(scope="session")
def noise(noise_process):
    """The folders of the runs on noise, finished."""
    folder = finished(*noise_process)
    return [folder / "run-0", folder / "run-1"]


GRADE_AND_PROVE = """if True:
    import sys, coursework
    then = sys.argv.index("then")
    first, second = sys.argv[1:then], sys.argv[then + 1:]
    sys.exit(coursework.main(first) or coursework.main(second))"""


@pytest.fixture(scope="session")
def coursework_process(tmp_path_factory):
    """A class of two that is graded, and the proof of the graders, begun in one process, which forks:
    its folder and process."""
    import coursework
    folder = tmp_path_factory.mktemp("coursework")
    for name in ("ada", "bob"):
        assert coursework.main(["handout", str(folder / "class" / name), "--kind", "predict"]) == 0
    answers = {"nucleus_size": 3, "group_of_two": -3, "many_layers": {}}
    (folder / "class" / "bob" / "answers.json").write_text(json.dumps(answers))
    files = {name: str(folder / name) for name in ("grades.json", "grades.xml", "proof.json")}
    grade = ["grade", str(folder / "class"), "--json", files["grades.json"],
             "--junit", files["grades.xml"]]
    process = spawn("-c", GRADE_AND_PROVE, *grade, "then", "prove", "--json", files["proof.json"],
                    cwd=ROOT / "tests")
    yield folder, process
    process.kill()


def show_parts() -> None:
    """All demonstrations, and what each returns."""
    import demo
    for part in ("gnn", "vq", "reward", "generators"):
        print(f"§ {part}")
        print(f"§ {getattr(demo, part)()}")


@pytest.fixture(scope="session")
def demo_process(tmp_path_factory):
    """The parts that show themselves, begun."""
    process = Fork(show_parts, tmp_path_factory.mktemp("demo"))
    yield process
    process.kill()
