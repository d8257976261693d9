"""Seconds and peak memory of every stage by the size of the data (not collected by pytest): python tests/bench_scale.py

A process for each size runs all of train.py on stickers, a few steps a stage, and notes the largest memory that each stage
has held. Pictures are drawn from a pool: drawing is not what is measured. Prints a table and log-log slopes: how peak memory
less that of the smallest size's imports grows where users and items grow. Needs Linux, whose peak can be reset."""
import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

SIZES = ((2_000, 600), (2_000, 60_000), (20_000, 600), (20_000, 60_000))     # items, users
FEW = ("image-ae-steps", "gnn-steps", "vq-steps", "text-steps", "image-steps", "reward-scorer-steps", "referee-steps")


def peak_mb() -> float:
    """Largest resident memory since the last call, which it resets; MB."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def one(items: int, users: int, out: str):
    """A run of that size; its stages' (seconds, MB) on the last line of stdout."""
    import numpy as np

    import train
    rng, draw_sticker = np.random.default_rng(0), train.draw_sticker
    pool = {}

    def drawn(value, _):
        key = tuple(value[a] for a in train.SEEN)
        if key not in pool:
            pool[key] = draw_sticker(value, rng)
        return pool[key]
    train.draw_sticker = drawn
    found = {"imports": (0.0, peak_mb())}
    arguments = [x for name in FEW for x in (f"--{name}", "4")]
    run = train.open_run(*train.parse_arguments([
        "--items", str(items), "--users", str(users), "--out", out, "--reward-rounds", "1", "--pairs", "64", "--image-sampling-steps", "2", "--reward-groups", "8",
        "--device", "cpu", *arguments]))
    found["data"] = (0.0, peak_mb())
    for stage in train.STAGES:
        train.train_all(run, [stage])
        found[stage] = (run.seconds[stage][1], peak_mb())
    train.finish(run)
    found["report"] = (run.seconds["report"][1], peak_mb())
    print(json.dumps(found))


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description="Seconds and peak memory of every stage by the size of the data.")
    parser.add_argument("--one", nargs=2, type=int, metavar=("ITEMS", "USERS"), help="one size, in this process")
    parser.add_argument("--out", help="folder of that run")
    args = parser.parse_args()
    if args.one:
        return one(*args.one, args.out)
    found = {}
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--one", *map(str, size), "--out", f"{folder}/run"]
            found[size] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        if len(found) == 1:
            print(f"{'items':>7}{'users':>8}  " + "".join(f"{stage[:11]:>12}" for stage in found[size]))
        print("{:7,}{:8,}  ".format(*size) + "".join(f"{mb:6.0f} {s:5.1f}" for s, mb in found[size].values()), flush=True)
    base = found[SIZES[0]]["imports"][1]
    peak = {size: max(mb for _, mb in stages.values()) - base for size, stages in found.items()}
    for small, large in ((0, 1), (0, 2), (0, 3)):
        factor = max(b / a for a, b in zip(SIZES[small], SIZES[large]))
        slope = math.log(peak[SIZES[large]] / peak[SIZES[small]]) / math.log(factor)
        print(f"{SIZES[small]} -> {SIZES[large]}: peak less {base:.0f} MB of imports {peak[SIZES[small]]:.0f} -> "
              f"{peak[SIZES[large]]:.0f} MB, slope {slope:.2f}")


if __name__ == "__main__":
    main()
