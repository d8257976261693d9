"""The house rules that a program can check: imports, sizes, docstrings, and that the README names what exists."""
import ast
import importlib
import re
import sys

import pytest
from conftest import ROOT

MODULES = ("gnn", "vq", "generators", "reward", "dppmg", "train")
PARTS = MODULES[:4]
PACKAGES = {"torch", "numpy", "scipy", "PIL", "tqdm", "pytest"}


def parse(module):
    text = (ROOT / f"{module}.py").read_text(encoding="utf-8")
    return text, ast.parse(text)


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way_and_to_six_packages(module):
    own = set(imported(parse(module)[1])) - PACKAGES - set(sys.stdlib_module_names) - {"__future__"}
    allowed = {"dppmg": set(PARTS), "train": {*PARTS, "dppmg"}}.get(module, set())
    assert own <= allowed, f"{module}.py imports {own - allowed}"


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module):
    text, tree = parse(module)
    most = 1200 if module == "train" else 900       # README, deviation 15
    assert text.count("\n") <= most, f"{module}.py has {text.count(chr(10))} lines"
    for node in functions(tree):
        prose = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
        length = node.end_lineno - node.lineno + 1 - prose
        assert length <= 40, f"{module}.py:{node.lineno} {node.name} has {length} lines without its docstring"


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_docstrings(module):
    _, tree = parse(module)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    inner = {f for c in classes for f in functions(c)}
    outer = {f for f in functions(tree) if f not in inner and f in tree.body}
    for node in outer | {f for c in classes if not c.name.startswith("_") for f in c.body if f in inner}:
        overrides = node.name == "forward"      # its class says it
        assert node.name.startswith("_") or overrides or ast.get_docstring(node), f"{module}.py:{node.lineno} {node.name}"


@pytest.mark.parametrize("module", MODULES[:5])
def test_devices_are_named_only_where_a_run_begins(module):
    text, _ = parse(module)
    assert ".cuda(" not in text


def test_importing_changes_nothing():
    """Importing must not seed, read the command line, or print."""
    import torch
    before = torch.get_rng_state()
    for module in MODULES:
        importlib.import_module(module)
    assert torch.equal(torch.get_rng_state(), before)


def test_readme_map_points_at_real_code():
    named = re.findall(r"`(\w+)\.py:(\w+(?:\.\w+)?)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(named) >= 20
    for module, name in named:
        target = importlib.import_module(module if module in MODULES else f"tests.{module}")
        for part in name.split("."):
            assert hasattr(target, part), f"README names {module}.py:{name}, which does not exist"
            target = getattr(target, part)


def test_readme_has_no_gap():
    assert not re.findall(r"@[A-Z]+@|TODO|XXX", (ROOT / "README.md").read_text(encoding="utf-8"))


def test_every_setting_has_a_help_text():
    import train
    assert [f"{group}.{name}" for group, name, _, text in train.settings(train.PARTS) if not text] == []
