"""The proof that the graders have teeth: what each exercise, bug, wrong answer and attack must lose, and no more.

Run by test_coursework.py, and by `python tests/coursework.py prove`."""
import functools
import importlib
import json
import os
import re
import tempfile
import time
from pathlib import Path

import coursework
from coursework import (ANOTHER, BETRAYS, EXERCISES, GRADED, MODULES, NAMED, betraying, chosen, grade, grade_exercise,
                        grade_function, grade_race, grade_texts, handed_out, handout, handout_texts, mistaken, moved,
                        points_of, read, source_of, split_name)

CODE = [x for x in EXERCISES if x.kind != "predict"]
BRIEF = 0.4                 # processor seconds that an attack is given; the reference takes a tenth


def lost(results):
    """The tests that lost points."""
    return [x.name for x in results if x.score < x.points]


def others_stand(text, exercise):
    """Whether a file that was changed for one exercise is the reference to all exercises on other functions."""
    file, function = split_name(exercise)
    return all(source_of(text, split_name(x)[1]) == source_of(read(file), split_name(x)[1])
               for x in CODE if split_name(x)[0] == file and split_name(x)[1] != function)


def on_texts(exercise, texts, only):
    """The results of an exercise on several texts of its file; only: for each the one test that
    counts, None for all."""
    if exercise.kind == "race":
        return [grade_race(exercise, "handed_in", text=text) for text in texts]
    return grade_texts(exercise, texts, only)


def prove_exercises(say):
    """The reference has full points. What is handed out loses exactly its exercise's points: all of a gap and of a
    race, of a bug its one test. Each declared mistake loses the test that is named, and nothing of another exercise."""
    for exercise in CODE:
        right = read(split_name(exercise)[0])
        try:
            texts = [right, handed_out(right, exercise), *(mistaken(right, exercise, x) for x in exercise.wrong)]
        except LookupError as error:
            say(f"{exercise.name}: the code has changed, and the exercise does not fit it any more: {error}")
            continue
        only = [None, None, *(wrong.caught for wrong in exercise.wrong)]
        reference, start, *mistakes = on_texts(exercise, texts, only)
        for result in reference:
            if result.reason:
                say(f"{exercise.name}: the reference loses {result.name}: {result.reason}")
        if sum(x.score for x in start):
            say(f"{exercise.name}: as handed out it has {[x.name for x in start if x.score]}")
        if exercise.kind == "bug" and len(start) != 1:
            say(f"{exercise.name}: need one test, not {len(start)}")
        if exercise.kind == "bug" and ANOTHER not in start[0].reason:
            say(f"{exercise.name}: as handed out it does not run: {start[0].reason}")
        for wrong, results in zip(exercise.wrong, mistakes):
            if wrong.caught not in lost(results):
                say(f"{exercise.name}: {wrong.caught} does not catch {wrong.new!r}")
        if exercise.kind == "write" and len(exercise.wrong) < 3:
            say(f"{exercise.name}: {len(exercise.wrong)} wrong answers; need three")
        for text in texts:
            if not others_stand(text, exercise):
                say(f"{exercise.name}: one of its texts changes another exercise's function")


@functools.lru_cache(maxsize=None)
def compiled(text, name):
    return compile(text, name, "exec", optimize=0)


def prove_order(say):
    """The tests that students have of an exercise pass once it and those that it comes after are written."""
    handed = handout_texts()
    for exercise in chosen(kind="write"):
        texts = {module: handed[f"{module}.py"] for module in MODULES}
        for name in (exercise.name, *exercise.after.split()):
            file, function = split_name(NAMED[name])
            texts[file] = coursework.with_function(texts[file], function, source_of(read(file), function))
        tests = [test for test in GRADED[exercise.name] if test.shown]

        code = {name: (compiled(text, name), name) for name, text in texts.items()}

        def work(send):
            coursework.use(coursework.REFERENCE | code)
            for test in tests:
                coursework.run_test(test)
        _, end = coursework.in_process(work, 60)
        if end:
            say(f"{exercise.name}: written after {exercise.after or 'nothing'}, a test says: {end}")
        if not tests and exercise.kind == "write":
            say(f"{exercise.name}: students have no test of it")


def prove_cases(say):
    """Each bug moves one number of its case by a quarter or more, the others by less than a tenth of that."""
    for exercise in (x for x in EXERCISES if x.kind == "bug"):
        least, *_, second, most = sorted(moved(exercise).values())
        if most < 0.25 or second > most / 4:
            say(f"{exercise.name}: its bug moves the numbers of its case by {moved(exercise)}")
    for exercise in (x for x in EXERCISES if x.kind == "predict"):
        coursework.case("predict", exercise)
    handed, bugs = handout_texts("all", "bug"), [x for x in EXERCISES if x.kind == "bug"]

    def work(send):
        code = {name: (compiled(handed[f"{name}.py"], name), name) for name in MODULES}
        coursework.use(coursework.REFERENCE | code)
        for exercise in bugs:
            send(getattr(importlib.import_module("cases"), f"watch_{exercise.name}")())
    found, end = coursework.in_process(work, 60)
    for exercise, values in zip(bugs, found):       # with all bugs at once, as students see them
        alone = coursework.case("watch", exercise, planted=True)
        if any(abs(values[text] - alone[text]) > 1e-3 * abs(alone[text]) for text in alone):
            say(f"{exercise.name}: among the other bugs its case gives {values}, alone {alone}")
    if end or len(found) != len(bugs):
        say(f"the cases of the bugs: {end}")


def prove_handouts(say):
    """No solution in a handout; solved, it is the project; and no more than the files it must have."""
    for tier, kind in (("all", "all"), ("core", "all"), ("all", "bug"), ("all", "write")):
        texts, exercises = handout_texts(tier, kind), chosen(tier, kind)
        code = "\n".join(text for name, text in texts.items() if name[:-3] not in MODULES)
        for file in MODULES:
            solved = texts[f"{file}.py"]
            gone = set(stripped(read(file))) - set(stripped(solved))
            for line in gone & set(stripped(code)):
                if sum(read(x).count(line) for x in MODULES) > 1:
                    continue  # it stands elsewhere in the project, too: it says nothing of the gap
                say(f"handout {tier} {kind}: line {line!r} of {file}.py is in another file")
            for function in {split_name(x)[1] for x in exercises if x.kind != "predict" and split_name(x)[0] == file}:
                solved = coursework.with_function(solved, function, source_of(read(file), function))
            if solved != read(file):
                say(f"handout {tier} {kind}: {file}.py, solved, is not the project's")
        if exercises and len(re.findall(r"Expected \(points\)", texts["README.md"])) != sum(
                x.kind in ("write", "race") for x in exercises):
            say(f"handout {tier} {kind}: the README does not say what is expected")
        for name in set(re.findall(r"from (tests\.\w+) import", "\n".join(texts.values()))):
            if f"{name.replace('.', '/')}.py" not in texts:
                say(f"handout {tier} {kind}: {name} is imported and not there")
    with tempfile.TemporaryDirectory() as folder:
        handout(folder)
        allowed = {f"{x}.py" for x in (*MODULES, "cases", "test_exercises")} | {
            "tests", "README.md", "CHANGELOG.md", "answers.json", "coursework.json", "requirements.txt"}
        if {x.name for x in Path(folder).iterdir()} != allowed:
            say(f"the handout holds {sorted(x.name for x in Path(folder).iterdir())}")


def stripped(text):
    """The lines that say something, without what surrounds them."""
    return [line.strip() for line in text.split("\n") if len(line.strip()) > 20]


# ---- attacks: each an answer to `bpr`, in gnn.py, that would cheat or break a careless grader

ATTACKS = {
    "endless loop": "while True:\n    pass",
    "sleep": "import time\ntime.sleep(1000)",
    "endless output": 'while True:\n    print("100 of 100 points" * 1000)',
    "SystemExit": "raise SystemExit(0)",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "sys.exit": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "exit": "exit()",
    "quiet error": "raise AssertionError",
    "recursion": "return bpr_loss(pos_score, neg_score)",
    "memory": "return torch.zeros(10**12).sum()",
    "a name of the grader's": "import coursework\nreturn coursework.REFERENCE",
    "the reference itself": "import gnn\nreturn gnn.F.softplus(neg_score - pos_score).mean()",
    "reading files": 'return eval(open("gnn.py").read())',
    "patched test tool": "torch.testing.assert_close = print\nreturn neg_score.sum() * 0",
    "patched function": "f = F\nf.softplus = print\nreturn neg_score.sum() * 0",
    "patched tensor": "torch.Tensor.item = print\nreturn neg_score.sum() * 0",
    "changed equality": "class Same(torch.Tensor):\n    def __eq__(self, other):\n        return True\n"
                        "return torch.zeros(()).as_subclass(Same)",
    "changed equality, by type": 'return torch.zeros(()).as_subclass(type("S", (Tensor,), {"__eq__": print}))',
    "changed equality, by hand": "def always(*_):\n    return True\nTensor.__eq__ = always\nreturn neg_score.sum() * 0",
    "frames": "return [x for x in ()].__class__.__base__.__subclasses__()",
    "hidden module": "return torch.os.system('true')",
    "underscored": "return torch._C",
    "getattr": 'getattr(torch, "o" + "s")',
    "a module for a tensor": "return torch",
    "changed inputs": "pos_score.zero_()\nneg_score.zero_()\nreturn pos_score.sum()",
    "whole numbers": "return (neg_score.sum() * 0).long()",
    "another default": "torch.set_default_dtype(torch.float16)\nreturn torch.zeros(())",
    "writing files": "import numpy\nnumpy.savetxt('gnn.py', [0])",
    "a module by way of self": "def look(self):\n    return self._C\nreturn look(torch)",
    "nothing": "return None",
    "nan": "return neg_score.sum() * float('nan')",
}
FILES = {
    "code at import": "import os, pytest, builtins, torch.testing\ntorch.testing.assert_close = lambda *a, **k: None\n"
                      "builtins.isinstance = lambda *a: True\nprint('100 of 100')\nos._exit(0)\n",
    "endless import": "while True:\n    pass\n",
    "a later definition": "bpr_loss = lambda *a: 0\n",
}
BROKEN = {"syntax error": read("gnn").replace("def bpr_loss(", "def bpr_loss(("), "zero bytes": "\0" * 100,
          "deep": "(" * 100_000, "empty": "", "other": "x = 1\n", "too large": read("gnn") + "#" * coursework.MOST}
NO_ANSWERS = ("[" * 100_000, "[]", "null", "", "{}", '{"nucleus_size": NaN, "bug_last_noise": {"betrayed_by": true}}',
              '{"nucleus_size": "3", "bug_last_noise": []}', '{"nucleus_size": 1e999, "bug_last_noise": "2"}',
              '{"nucleus_size": [3], "bug_last_noise": {"betrayed_by": [1, 2, 3]}}')


def wrong_bpr(body):
    return coursework.with_body(read("gnn"), "bpr_loss", body)


def prove_attacks(say):
    """An attack on `bpr` costs that exercise alone: the others have the points that the reference has."""
    bpr, beside, elsewhere = NAMED["bpr"], NAMED["propagation"], NAMED["straight_through"]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for module in MODULES:
            (folder / f"{module}.py").write_text(read(module), encoding="utf-8")
        (folder / "tests").mkdir()
        for place in (folder, folder / "tests"):      # the student's own tests and settings are not used
            for name in ("test_exercises.py", "conftest.py", "cases.py", "pytest.py", "torch.py", "sitecustomize.py"):
                (place / name).write_text("import os\nos._exit(0)\n")

        def check(name, text, free=(beside, elsewhere)):
            """Grade gnn.py with this text: nothing for `bpr`, all for the others."""
            (folder / "gnn.py").write_text(text, encoding="utf-8")
            results = grade_function(bpr, folder, BRIEF)
            if any(x.score for x in results) or not all(x.reason for x in results):
                say(f"{name}: {results}")
            for exercise in free:
                if lost(grade_function(exercise, folder)):
                    say(f"{name}: it costs {exercise.name}, too")
        if lost(grade_function(bpr, folder, BRIEF)):
            say(f"the reference is not done in {BRIEF} seconds: no attack fails for another reason")
        for name, body in ATTACKS.items():
            check(name, wrong_bpr(body), ())
            if not others_stand(wrong_bpr(body), bpr):
                say(f"{name}: it changes another exercise's function")
        for name, more in FILES.items():
            check(name, wrong_bpr("return neg_score.sum() * 0") + "\n" + more)
        for name, text in BROKEN.items():
            check(name, text, (elsewhere,))
        for name, make in {"unreadable": lambda file: file.write_bytes(b"\xff\xfe" * 50), "missing": Path.unlink,
                           "a link": lambda file: file.symlink_to(coursework.ROOT / "gnn.py")}.items():
            make(folder / "gnn.py")
            if any(x.score for x in grade_function(bpr, folder, BRIEF)) or lost(grade_function(elsewhere, folder)):
                say(f"{name}: gnn.py")
        prove_answers(say, folder)
    prove_race(say)
    prove_honest(say)


def prove_answers(say, folder):
    """Whatever answers.json holds, it costs the answers alone."""
    prediction, bug = NAMED["nucleus_size"], NAMED["bug_last_noise"]
    right = coursework.case("predict", prediction), betraying(bug)
    good = {"nucleus_size": right[0], "bug_last_noise": {"betrayed_by": right[1]}}
    for text, points in ((json.dumps(good), 2), *((text, 0) for text in NO_ANSWERS)):
        (folder / "answers.json").write_text(text)
        results = [grade_exercise(prediction, folder)[0], grade_exercise(bug, folder)[-1]]
        if sum(x.score for x in results) != points:
            say(f"answers.json {text[:60]!r}: {results}")


REMEMBERS = '''
memo.setdefault("codes", (x[:, None] - codebook).square().sum(2).argmin(1))
return memo["codes"]
'''
HONEST = {
    "a helper, a constant, an import": ("bpr", "return twice(half(neg_score - pos_score)).mean()",
                                        "from torch.nn.functional import softplus as soft\nSCALE: float = 2.0\n"
                                        "def half(x):\n    return soft(x) / SCALE\n"
                                        "def twice(x):\n    return x * 2\n"),
    "another way": ("bpr", "return torch.logaddexp(torch.zeros_like(pos_score), neg_score - pos_score).mean()", ""),
    "an import inside": ("leave_one_out", "import math\nif reward.shape[1] < 2:\n    raise ValueError('need 2')\n"
                         "r = reward.detach()\ns = r.shape[1]\nreturn r - (r.sum(1, keepdim=True) - r) / (s - 1)", ""),
    "another argmin": ("nearest_code", "return ((x[:, None] - codebook) ** 2).sum(-1).argmin(-1)", ""),
    "a loop": ("ema_weights", "weight = 1 - min(decay, (1 + step) / (10 + step))\n"
               "for a, b in zip(average.parameters(), model.parameters()):\n    a.lerp_(b, weight)", ""),
}


def prove_race(say):
    """A race is not won by remembering the last result."""
    text = coursework.with_body(read("vq"), "nearest_code", REMEMBERS).replace(
        "def nearest_code(x: Tensor, codebook: Tensor)", "def nearest_code(x: Tensor, codebook: Tensor, memo={})")
    for result in grade_race(NAMED["faster_quantizer"], "handed_in", text=text):
        if result.score or ANOTHER not in result.reason:
            say(f"an answer that remembers: {result}")


def prove_honest(say):
    """Right answers that are written otherwise have full points."""
    for name, (exercise, body, more) in HONEST.items():
        exercise = NAMED[exercise]
        file, function = split_name(exercise)
        text = coursework.with_body(read(file), function, body) + "\n" + more
        for result in grade_texts(exercise, [text])[0]:
            if result.reason:
                say(f"{name}: {result.reason}")


def prove_grades(say):
    """A whole handout, unsolved, has no points, and none but its own; in the time that is promised."""
    with tempfile.TemporaryDirectory() as folder:
        handout(folder)
        start = time.monotonic()
        found = grade(folder)
        spent = time.monotonic() - start
        if found["score"] or found["max_score"] != sum(map(points_of, chosen())) or spent > 300:
            say(f"the handout has {found['score']} of {found['max_score']} points after {spent:.0f} s")
        if not all(x["output"] for x in found["tests"]):
            say("a loss without a reason")


PARTS = {"exercises": prove_exercises, "order": prove_order, "cases": prove_cases, "handouts": prove_handouts,
         "attacks": prove_attacks, "grades": prove_grades}


def processor_seconds():
    """Of this process and those that it started."""
    return sum(os.times()[:4])


def prove(parts=tuple(PARTS), show=print):
    """The proof's figures, and what failed, part by part."""
    seconds, failures = {}, {}
    for part in parts:
        start, failed = processor_seconds(), []
        try:
            PARTS[part](failed.append)
        except LookupError as error:
            failed.append(f"the code has changed, and an exercise does not fit it any more: {error}")
        seconds[part] = round(processor_seconds() - start, 1)
        if failed:
            failures[part] = failed
        show(f"{part}: {seconds[part]} s" + "".join(f"\n  {line}" for line in failed))
    kinds = [x.kind for x in EXERCISES]
    found = {"exercises": len(kinds), **{kind: kinds.count(kind) for kind in ("write", "bug", "predict", "race")},
             "tests": sum(test.name != BETRAYS for tests in GRADED.values() for test in tests),
             "wrong answers": sum(len(x.wrong) for x in EXERCISES),
             "attacks": len(ATTACKS) + len(FILES) + len(BROKEN) + 4 + len(NO_ANSWERS),
             "points": sum(map(points_of, EXERCISES)), "seconds": seconds, "failures": failures}
    show(json.dumps({k: v for k, v in found.items() if k != "failures"}))
    return found
