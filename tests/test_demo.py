"""demo.py: each part shows itself, and its number is right."""
import inspect
import re

import pytest
import torch
from conftest import PATIENCE, ROOT

import demo

LEAST = {"gnn": 0.95, "vq": 0.999, "reward": 0.97, "generators": 0.9}


@pytest.fixture(scope="module")
def shown(demo_process):
    """What each part printed, and then what it returned."""
    printed, errors = demo_process.communicate(PATIENCE)
    assert demo_process.returncode == 0, errors
    found = printed.split("§ ")
    return {part.strip(): (text, float(value)) for part, text, value in
            ((*first.split("\n", 1), value) for first, value in zip(found[1::2], found[2::2]))}


@pytest.mark.parametrize("part", LEAST)
def test_each_part_shows_itself_and_is_right(part, shown):
    printed, value = shown[part]
    assert LEAST[part] <= value <= 1
    assert f"{value:.3f}, right (at least {LEAST[part]})" in printed and "WRONG" not in printed
    assert printed.count("\n") > 8 and max(map(len, printed.split("\n"))) <= 80


def test_a_wrong_number_is_called_wrong(capsys):
    assert demo.verdict("x", 0.5, 0.6) == 0.5 and "0.500, WRONG (at least 0.6)" in capsys.readouterr().out
    assert demo.verdict("x", 0.6, 0.6) == 0.6 and "right" in capsys.readouterr().out


def test_a_picture_is_drawn_in_shades():
    assert demo.shade(torch.tensor([[-1.0, 1.0], [-9.0, 9.0], [0.0, -1.0]])) == ["  @@", "  @@", "==  "]


@pytest.mark.parametrize("part", LEAST)
def test_the_module_runs_its_own_demonstration(part):
    end = (ROOT / f"{part}.py").read_text(encoding="utf-8").split("\n\n\n")[-1]
    assert re.fullmatch(rf'if __name__ == "__main__":\n    from tests.demo import {part}; {part}\(\)\n', end)
    assert len(inspect.getsource(getattr(demo, part)).split("\n")) <= 28
