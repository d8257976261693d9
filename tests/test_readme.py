"""What the README shows works: its commands, its flags, its lines of Python, its links."""
import ast
import csv
import re
import runpy
import sys

import pytest
from conftest import PATIENCE, ROOT, Fork, forget_the_project
from PIL import Image

import train
from dppmg import Dataset

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.M | re.S)
PYTHON = [block for kind, block in BLOCKS if kind == "python"]
# in blocks and in sentences, where a line may end within
PROSE = re.sub(r"\n(?!\n)", " ", TEXT).replace("&&", "\n")
COMMANDS = re.findall(r"python ((?:tests/)?\w+\.py[^`#\n]*)", PROSE + "\n".join(text for _, text in BLOCKS))


def program(command):
    """The words of a command that its --help belongs to: coursework.py has commands of its own."""
    return tuple(command.split()[:2 if "coursework" in command else 1])


def ask_for_help(script, *words):
    """In a process of its own: python SCRIPT WORDS --help."""
    forget_the_project(script.parent)
    sys.argv = [str(script), *words, "--help"]
    runpy.run_path(str(script), run_name="__main__")


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    """What each of the README's programs says of its flags; all are asked at once."""
    # the four parts show themselves instead: test_demo.py
    programs = set(map(program, COMMANDS)) - {("gnn.py",), ("vq.py",), ("generators.py",), ("reward.py",)}
    asked = {(script, *words): Fork(lambda: ask_for_help(ROOT / script, *words),
                                    tmp_path_factory.mktemp("help"))
             for script, *words in sorted(programs)}
    return {words: ("".join(fork.communicate(PATIENCE)), fork.returncode)
            for words, fork in asked.items()}


def test_every_command_has_the_flags_that_the_readme_gives_it(helps):
    scripts = {words[0] for words in helps}
    assert {"train.py", "dppmg.py", "tests/study.py", "tests/coursework.py", "tests/check_gpu.py"} <= scripts
    for words, (printed, status) in helps.items():
        assert status == 0, f"{words} --help: {printed}"
    for command in COMMANDS:
        for flag in re.findall(r"(?<!\S)--[a-z-]+", command):
            assert flag in helps[program(command)][0], f"{command}: no {flag}"


def test_flags_and_files_that_are_named_exist(helps):
    known = " ".join(printed for printed, _ in helps.values())
    for flag in re.findall(r"`(--[a-z-]+)", TEXT):
        assert flag in known, flag
    for path in re.findall(r"\]\(([\w/.]+)", TEXT):
        assert path.startswith("http") or (ROOT / path).exists(), path


def test_the_lines_that_generate_work(smoke, tmp_path, monkeypatch):
    lines = next(block for block in PYTHON if "DPPMG.load" in block)
    made = {}
    exec(lines.replace("runs/stickers", str(smoke)), made)
    assert isinstance(made["picture"], Image.Image) and isinstance(made["text"], str)


def test_the_recipe_for_ratings_makes_a_folder_that_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "posters").mkdir()
    for n in range(1, 7):
        Image.new("RGB", (30, 45), (40 * n, 0, 0)).save(tmp_path / "posters" / f"{n}.jpg")
    with open("movies.csv", "w", newline="") as file:
        rows = [[str(n), f"Film, {n} (1990)", "Comedy|Drama" if n % 2 else "War"] for n in range(1, 8)]
        csv.writer(file).writerows([["movieId", "title", "genres"], *rows])    # one has no poster
    with open("ratings.csv", "w", newline="") as file:
        rows = [[u, i, 5 if (u + i) % 3 else 1, 100 * u + i] for u in range(3) for i in range(1, 8)]
        csv.writer(file).writerows([["userId", "movieId", "rating", "timestamp"], *rows])
    exec(next(block for block in PYTHON if "movies.csv" in block), {})
    data = Dataset.load("films", 32, 0, min_rating=4, drop_incomplete=True)
    assert data.texts[0] == "Film, 1 (1990): comedy, drama" and data.prompts[0] == ("comedy", "drama")
    assert len(data.item_ids) == 6 and len(data.user) == sum((u + i) % 3 > 0 for u in range(3) for i in range(1, 7))


def test_the_recipe_for_captions_makes_a_folder_that_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for name in ("cat", "dog", "fox"):
        Image.new("RGB", (9, 9)).save(tmp_path / "pictures" / f"{name}.png")
        (tmp_path / "pictures" / f"{name}.txt").write_text(f"a {name}, asleep\n")
    (tmp_path / "likes.csv").write_text("user,item\n" + "".join(f"{u},{i}\n" for u in "ab" for i in ("cat", "dog", "fox")))
    exec(next(block for block in PYTHON if "captions" in block), {})
    data = Dataset.load("mine", 32, 0)
    assert sorted(data.texts) == ["a cat, asleep", "a dog, asleep", "a fox, asleep"] and len(data.user) == 6


def test_the_readme_can_be_read_in_any_window():
    assert all(len(line) <= 120 or line.startswith("|") for line in TEXT.split("\n"))
    assert all(ast.parse(block) for block in PYTHON) and sys.version_info >= (3, 11)


def test_the_settings_that_the_readme_gives_are_those_of_the_program():
    assert f"{train.TrainConfig().pairs} pairs each" in TEXT
