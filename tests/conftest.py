"""The modules lie at the top of the repository; all tests run on the CPU, offline, with fixed seeds."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PATIENCE = 1200  # seconds for a process that takes one minute on an idle machine
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small sums are no faster on two threads, round otherwise, and crawl beside another busy process."""
    torch.set_num_threads(1)


def spawn(*arguments: str, **options) -> subprocess.Popen:
    """Python in a process of its own, on one thread: two share two cores, and sums round alike in all."""
    return subprocess.Popen([sys.executable, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


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
    out, process = smoke_process
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    (out.parent / "printed.txt").write_text(printed + errors)
    return out
