"""The modules lie at the top of the repository; all tests run on the CPU, offline, with fixed seeds."""
import csv
import os
import subprocess
import sys
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
def begun_early(request):
    """The runs that some test waits for, begun in the background before the first test."""
    asked = {name for item in request.session.items for name in item.fixturenames}
    for name in ("smoke_process", "noise_process"):
        if name in asked:
            request.getfixturevalue(name)


def spawn(*arguments: str, **options) -> subprocess.Popen:
    """Python in a process of its own, on one thread: two share two cores, and sums round alike in all."""
    return subprocess.Popen([sys.executable, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finished(out: Path, process: subprocess.Popen) -> Path:
    """The folder of a run, when it is done; what it printed lies beside it."""
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
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


NOISE = """--text-steps 60 --image-steps 60 --image-ae-steps 60 --gnn-steps 60 --vq-steps 60
    --reward-scorer-steps 150 --reward-scorer-width 16 --reward-scorer-batch 64 --reward-rounds 8
    --pairs 200 --samples 4 --sampled-users 8""".split()
TWO_RUNS = """if True:
    import sys, train
    folder, *flags = sys.argv[1:]
    for n in "01":
        data, out = f"{folder}/data-{n}", f"{folder}/run-{n}"
        if status := train.main(["--smoke", "--data", data, "--seed", n, *flags, "--out", out]):
            sys.exit(status)"""


@pytest.fixture(scope="session")
def noise_process(tmp_path_factory):
    """Two runs on data without any structure, one after the other, begun: their folder and process."""
    folder = tmp_path_factory.mktemp("noise")
    for n in (0, 1):
        write_noise(folder / f"data-{n}", n)
    process = spawn("-c", TWO_RUNS, str(folder), *NOISE, cwd=ROOT)
    yield folder, process
    process.kill()


@pytest.fixture(scope="session")
def noise(noise_process):
    """The folders of the runs on noise, finished."""
    folder = finished(*noise_process)
    return [folder / "run-0", folder / "run-1"]
