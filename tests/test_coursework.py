"""The coursework's graders have teeth: see prove.py, which runs once, in a process of its own, and says what failed."""
import json
import re
from xml.etree import ElementTree

import coursework
import pytest
from conftest import PATIENCE


@pytest.fixture(scope="module")
def forked(coursework_process):
    """A folder: a class of two, graded, then the proof's figures; and what was printed."""
    folder, process = coursework_process
    printed, errors = process.communicate(timeout=PATIENCE)
    return folder, printed + errors


@pytest.fixture(scope="module")
def proof(forked):
    """The proof's figures."""
    folder, printed = forked
    assert (folder / "proof.json").exists(), printed
    return json.loads((folder / "proof.json").read_text())


@pytest.mark.parametrize("part", ["exercises", "order", "cases", "handouts", "attacks", "grades"])
def test_the_graders_are_proved(proof, part):
    """exercises: full points for the reference, none for what is handed out, and each wrong answer is caught."""
    assert part in proof["seconds"]
    assert not proof["failures"].get(part), "\n".join(proof["failures"][part])


def test_there_is_enough_of_each_kind(proof):
    assert proof["write"] >= 18 and proof["bug"] >= 8 and proof["predict"] >= 10 and proof["race"] >= 3
    assert proof["wrong answers"] >= 60 and proof["attacks"] >= 30


def test_the_list_shows_each_exercise_and_the_hours(capsys):
    assert coursework.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"tier core: \d+ exercises, \d+ points, (7|8)\.\d hours", printed), printed
    assert len(re.findall(r"^\S+ +(?:core|full|challenge) +(?:write|bug|predict|race) +\d+ +\d+", printed, re.M)) >= 50


def test_a_class_is_graded_as_text_json_and_junit(forked):
    """Two submissions of predictions: one without an answer, one with a right, a wrong and a senseless one."""
    folder, printed = forked
    assert (folder / "grades.json").exists(), printed
    result = json.loads((folder / "grades.json").read_text())
    assert {name: x["score"] for name, x in result.items()} == {"ada": 0, "bob": 1}
    tests = {x["number"]: x for x in result["bob"]["tests"]}
    assert tests["nucleus_size"]["score"] == tests["nucleus_size"]["max_score"] == 1
    assert tests["group_of_two"]["score"] == 0 and "-3" in tests["group_of_two"]["output"]
    suites = ElementTree.parse(folder / "grades.xml").getroot()
    assert [int(x.get("tests")) - int(x.get("failures")) for x in suites] == [0, 1]
    assert "bob: 1 of" in printed


@pytest.mark.parametrize("command, said", [("handout", "not empty"), ("grade", "no folder")])
def test_a_handout_overwrites_nothing_and_a_missing_folder_is_named(command, said, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        coursework.main([command, str(tmp_path if command == "handout" else tmp_path / "nobody")])
    assert said in capsys.readouterr().err
    assert [x.name for x in tmp_path.iterdir()] == ["thesis.txt"]
