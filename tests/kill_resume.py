"""Does a run that is killed end with the same bits?
    python tests/kill_resume.py [--chain] [--out DIR] [--reference RUN]

Kills (SIGKILL) a smoke run at each of MOMENTS, resumes it, and compares all that it leaves, to the bit, with
a run that nobody disturbed; prints a line each. --chain: instead, one run, killed at CHAIN's moments one
after the other. Exit status: the number of runs that end differently. Takes two minutes; --chain, which the
tests use, half of one."""
import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"        # the same number of threads in all runs: their sums round alike
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402

import train  # noqa: E402
from dppmg import read_checkpoint  # noqa: E402

# (stage, step): just before this step; data: after n pictures; checkpoint: when half of the n-th is written
MOMENTS = (("data", 50), ("autoencoder", 7), ("gnn", 29), ("codebook", 11), ("text", 19), ("image", 5),
           ("scorer", 1), ("judge", 12), ("referee", 3), ("reward", 2), ("new users", 0), ("grid", 0),
           ("checkpoint", 30), ("checkpoint", 120))
CHAIN = (("data", 50), ("autoencoder", 7), ("codebook", 11), ("checkpoint", 30), ("image", 5), ("judge", 12),
         ("reward", 2), ("new users", 0))
# these differ, and may; the model is among the modules, too
IGNORED = ("seconds", "cpu_seconds", "peak_memory_mb", "train", "torch", "model")


def kill_at(moment: tuple[str, int]):
    """From now on, this process dies at the moment."""
    (stage, n), count, module = moment, 0, torch if moment[0] == "checkpoint" else train
    name = {"data": "draw_sticker", "checkpoint": "save"}.get(stage)
    original = getattr(module, name) if name else train.Run.generator

    def hooked(*args, **kwargs):
        nonlocal count
        count += 1
        if count == n if name else (args[1:] + (0,))[:2] == moment:
            if name == "save":
                state, file = args
                original(state, file)
                file.truncate(file.tell() // 2)
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(*((module, name) if name else (train.Run, "generator")), hooked)


def start(arguments: Sequence[str], log: Path, moment: tuple[str, int] | None = None) -> int:
    """Exit status of train.py in a process of its own, as subprocess gives it: -9 if it was killed."""
    import torch._dynamo  # noqa: F401  the first optimizer imports it: now, for all children
    sys.stdout.flush()
    child = os.fork()       # not a new interpreter: importing torch takes longer than resuming
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        if moment:
            kill_at(moment)
        status = 70         # an exception that main() did not expect
        try:
            status = train.main(arguments)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def survive(out: Path, moments: Sequence[tuple[str, int]]) -> list[str]:
    """A smoke run in `out`, killed at each of the moments and resumed each time; what went wrong."""
    arguments, log = ["--smoke", "--checkpoint-seconds", "0", "--out", str(out)], out.with_suffix(".log")
    for moment in (*moments, None):
        if (status := start(arguments, log, moment)) != (-signal.SIGKILL if moment else 0):
            return [f"exit status {status} at {moment or 'the end'}, see {log}"]
        arguments = ["--resume", "--out", str(out)]
    return []


def leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """(path, value) of all that is not a dict or list; tensors as a hash of their bytes."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in IGNORED:
                yield from leaves(inner, f"{name}/{key}" if name else key)
    elif isinstance(value, torch.Tensor):
        digest = hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
        yield name, (value.dtype, value.shape, digest)
    else:
        yield name, value


def differences(one: Path, two: Path) -> list[str]:
    """What differs between two finished runs: tensors and values of the checkpoints, metrics, log, files."""
    def found(run: Path) -> dict[str, object]:
        values = {"checkpoint": read_checkpoint(run / "checkpoint.pt"),
                  "metrics": json.loads((run / "metrics.json").read_text()),
                  "log": (run / "log.csv").read_text(), "files": sorted(path.name for path in run.iterdir())}
        return {name: repr(value) for name, value in leaves(values)}     # repr: nan is nan
    a, b = found(one), found(two)
    return [name for name in sorted(a | b) if a.get(name) != b.get(name)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Does a run that is killed end with the same bits?")
    parser.add_argument("--chain", action="store_true", help="one run, killed again and again")
    parser.add_argument("--out", type=Path, help="folder for the runs (a temporary one)")
    parser.add_argument("--reference", type=Path, help="a finished smoke run to compare with (made here)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        reference, failed = args.reference or out / "undisturbed", 0
        if not args.reference and start(["--smoke", "--out", str(reference)], out / "undisturbed.log"):
            sys.exit(f"the undisturbed run failed, see {out / 'undisturbed.log'}")
        for n, moments in enumerate([CHAIN] if args.chain else [[moment] for moment in MOMENTS]):
            wrong = survive(out / f"killed-{n}", moments) or differences(reference, out / f"killed-{n}")
            failed += bool(wrong)
            verdict = f"DIFFERS in {len(wrong)}: {', '.join(wrong[:5])}" if wrong else "the same bits"
            names = ", ".join(f"{stage} {step}" for stage, step in moments)
            print(f"killed at {names}: {verdict}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
