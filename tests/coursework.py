"""Coursework: hand out the project with gaps and bugs, and grade what comes back.

    python tests/coursework.py list
    python tests/coursework.py handout DIR [--tier core|all] [--kind write|bug|predict|all]
    python tests/coursework.py grade DIR ... [--json FILE] [--junit FILE]
    python tests/coursework.py prove [--json FILE]

The exercises are a table (exercises.py), the tests that grade them lie in test_exercises.py, small cases in cases.py.

How it grades. Of the student's file only the exercise's function is taken, with what it needs of the student's own:
functions, constants and imports that the reference lacks. Spliced into the reference, it is graded by the teacher's
tests, in a process of its own with a time limit. So a mistake costs its own exercise only, nothing that a file does
when it is imported is ever run, and the student's tests are not read. What a function may name is restricted:
no files, processes, frames, no attributes of modules changed. That stops tricks, not a criminal: let the answers of
strangers run in a container. Predictions are on trust: who runs the case first can copy its answer. Needs os.fork:
Linux, macOS, or WSL."""
import argparse
import ast
import functools
import gc
import importlib.util
import inspect
import json
import math
import os
import re
import secrets
import select
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")       # a forked process must not wait for the threads of another

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from exercises import BLANK, CHANGES, EXERCISES, Wrong  # noqa: E402

MODULES = ("gnn", "vq", "generators", "reward", "dppmg", "train")
TESTS = ("conftest", "test_exercises", "cases", "test_gnn", "test_vq", "test_text", "test_image", "test_reward")
LIMIT = 8.0                 # processor seconds for an exercise; the reference takes less than one
PATIENCE = 6                # times as many seconds by the clock
MOST = 2 ** 20              # bytes of a file that is handed in
MEMORY = 4 * 2 ** 30        # bytes that an answer may use more than torch does
MINE = 1_000_000            # added to line numbers of the student's, which so are told from the reference's
ANOTHER = "it gave another result"
BETRAYS = "which number betrays it"
STEPS = {"faster_product": (1.5, 3, 6), "faster_decoding": (1.3, 1.7, 2.2), "faster_quantizer": (2, 5, 15)}


class Test(NamedTuple):
    """One graded test: its name, points, what it expects in words, and where it is."""
    name: str
    points: int
    expected: str
    shown: bool = False
    where: str = "test_exercises"
    args: tuple = ()


class Result(NamedTuple):
    """One test's outcome; reason: why points are lost, in one line."""
    name: str
    score: float
    points: int
    reason: str


class Refused(Exception):
    """Why an answer is not graded."""


# ---- the table, completed by the tests

@functools.cache
def read(name):
    """The reference's text of a module or test."""
    folder = ROOT if name in MODULES else HERE
    return (folder / f"{name}.py").read_text(encoding="utf-8")


def graded_tests():
    """exercise -> its tests, from the decorators in test_exercises.py and the table."""
    found = {exercise.name: [] for exercise in EXERCISES}
    for node in ast.parse(read("test_exercises")).body:
        for call in getattr(node, "decorator_list", ()):
            name, points, expected = map(ast.literal_eval, call.args)
            found[name].append(Test(node.name, points, expected, bool(call.keywords)))
    for exercise in EXERCISES:
        for also in exercise.also:
            where, name = also.test.split(".")
            found[exercise.name].append(Test(name, also.points, also.expected, False, where, also.args))
        if exercise.kind == "bug":
            found[exercise.name].append(Test(BETRAYS, 1, "the number that the bug moves: run the case and compare"))
        if exercise.kind == "predict":
            found[exercise.name].append(Test("prediction", 1, "what the small case gives"))
        if exercise.kind == "race":
            found[exercise.name] += [Test(f"at least {ratio} times as fast", 1,
                                          f"the plain version's result in 1 / {ratio} of its time")
                                     for ratio in STEPS[exercise.name]]
    return found


GRADED = graded_tests()
NAMED = {exercise.name: exercise for exercise in EXERCISES}


def points_of(exercise):
    return sum(test.points for test in GRADED[exercise.name])


def chosen(tier="all", kind="all"):
    """The exercises of a handout. Two on one function do not go together: the one to write comes first."""
    taken, found = {}, []
    for exercise in EXERCISES:
        fits = tier in ("all", exercise.tier) and kind in ("all", exercise.kind) or (
            kind == "write" and exercise.kind == "race" and tier == "all")
        if fits and taken.setdefault(exercise.function, exercise.name) in (exercise.name, exercise.extends):
            found.append(exercise)
    return found


# ---- a function's text: cut out, replaced, spliced

def find(tree, function):
    """The node of FUNCTION or CLASS.METHOD, the last of that name as in Python; None if there is none."""
    name, _, inner = function.partition(".")
    nodes = [x for x in tree.body if isinstance(x, (ast.FunctionDef, ast.ClassDef)) and x.name == name]
    return (find(nodes[-1], inner) if inner else nodes[-1]) if nodes else None


@functools.lru_cache(maxsize=256)
def parsed(text):
    """The tree of a text; nobody changes it."""
    return ast.parse(text)


def span(text, function):
    """(first, last) line, from 0, last excluded, of a function with its decorators, and its node."""
    node = find(parsed(text), function)
    if node is None:
        raise LookupError(f"the reference has no function {function}")
    return min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1, node.end_lineno, node


def with_function(text, function, new):
    """The text with another text of the function."""
    lines = text.splitlines(keepends=True)
    first, last, _ = span(text, function)
    return "".join(lines[:first]) + new + "".join(lines[last:])


def source_of(text, function):
    first, last, _ = span(text, function)
    return "".join(text.splitlines(keepends=True)[first:last])


def indented(block, indent):
    return "".join(f"{' ' * indent}{line}\n" if line else "\n" for line in block.strip("\n").split("\n"))


def with_body(text, function, body):
    """The text with the function's body, all but its docstring, replaced."""
    first, _, node = span(text, function)
    head = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
    lines = text.splitlines(keepends=True)
    return with_function(text, function, "".join(lines[first:head]) + indented(body, node.body[0].col_offset))


def with_docstring(text, function, doc):
    first, last, node = span(text, function)
    lines, prose = text.splitlines(keepends=True), node.body[0]
    new = indented(f'"""{doc}"""', prose.col_offset)
    return with_function(text, function, "".join(lines[first:prose.lineno - 1]) + new
                         + "".join(lines[prose.end_lineno:last]))


def with_replaced(text, function, old, new):
    """The text with one passage of the function replaced; LookupError unless it occurs exactly once."""
    own = source_of(text, function)
    if own.count(old) != 1:
        raise LookupError(f"{function} holds this {own.count(old)} times, need once: {old!r}")
    return with_function(text, function, own.replace(old, new))


def split_name(exercise):
    """(file, function) of an exercise."""
    return exercise.function.split(".", 1)


def handed_out(text, exercise):
    """The text with the exercise's function as it is handed out."""
    _, function = split_name(exercise)
    if isinstance(exercise.plant, str):
        text = with_body(text, function, exercise.plant)
    elif not exercise.plant:
        text = with_body(text, function, BLANK)
    else:
        for old, new in exercise.plant:
            text = with_replaced(text, function, old, new)
    return with_docstring(text, function, exercise.doc) if exercise.doc else text


def mistaken(text, exercise, wrong: Wrong):
    """The text with a wrong answer to the exercise."""
    _, function = split_name(exercise)
    if wrong.old:
        return with_replaced(text, function, wrong.old, wrong.new)
    return with_body(text, function, wrong.new)


# ---- what an answer may hold

IMPORTS = {"torch", "numpy", "math", "scipy", "itertools", "functools", "collections", "typing"}
BUILTINS = set("""eval exec compile open globals locals vars getattr setattr delattr breakpoint input exit quit help
    type memoryview""".split())
FORBIDDEN = set("""os sys subprocess builtins inspect gc ctypes importlib signal threading socket shutil
    tempfile pytest multiprocessing asyncio pickle marshal codecs io pathlib Path atexit faulthandler resource
    warnings traceback testing open exec system popen fork kill from_file genfromtxt fromregex DataSource
    open_memmap utils hub jit ops classes library overrides distributed package serialization fromfile tofile
    memmap ctypeslib f2py DataLoader f_back f_globals f_locals f_builtins f_code gi_frame cr_frame ag_frame
    tb_frame tb_next mro attrgetter methodcaller monkeypatch coursework prove cases exercises test_exercises
    conftest argparse csv contextlib Image ImageOps tqdm register_forward_hook register_full_backward_hook""".split())
BEGINNINGS = ("save", "dump", "load")       # of names that are forbidden, too


def names_in(node):
    """What a node names: variables and attributes."""
    for x in ast.walk(node):
        if isinstance(x, (ast.Name, ast.Attribute)):
            yield x.id if isinstance(x, ast.Name) else x.attr


def root(node):
    """The variable that a chain of attributes and subscripts starts with."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def check_import(node):
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."]
    named = [alias.name for alias in node.names]
    bad = [m for m in modules if m.split(".")[0] not in IMPORTS] or [n for n in named for part in n.split(".")
                                                                     if part in FORBIDDEN or part.startswith("_")]
    if bad or any(part in FORBIDDEN for m in modules for part in m.split(".")):
        raise Refused(f"line {node.lineno}: import of {(bad or modules)[0]} is not allowed in an answer")


def check(node, known, said=()):
    """Refuse what an answer has no need of, and what could reach the grader. known: underscored names that are fine;
    said: calls that the reference's function makes itself, as text."""
    own = {a.arg for x in ast.walk(node) if isinstance(x, ast.arguments)
           for a in (*x.posonlyargs, *x.args, *x.kwonlyargs)}
    waiting = [node]
    while waiting:
        x = waiting.pop()
        if not (said and isinstance(x, ast.Call) and ast.dump(x) in said):
            check_node(x, known, own)
            waiting += ast.iter_child_nodes(x)


def check_node(x, known, own):
    """Refuse one node of an answer, or not. own: the parameters of the answer's functions."""
    def refuse(what):
        raise Refused(f"line {getattr(x, 'lineno', 0)}: {what}")
    if isinstance(x, (ast.Import, ast.ImportFrom)):
        check_import(x)
    elif isinstance(x, (ast.ClassDef, ast.Global, ast.AsyncFunctionDef)):
        refuse(f"an answer is made of functions; {type(x).__name__} is not allowed")
    elif isinstance(x, ast.FunctionDef) and x.name.startswith("__") and x.name not in known:
        refuse(f"{x.name} is not allowed in an answer")
    elif isinstance(x, (ast.Name, ast.Attribute)):
        name = x.id if isinstance(x, ast.Name) else x.attr
        hidden = name.startswith("_") and name != "_" and name not in known or name.startswith(BEGINNINGS)
        if name in FORBIDDEN or hidden or isinstance(x, ast.Name) and name in BUILTINS:
            refuse(f"{name} is not allowed in an answer")
        if name.startswith("__") and name != "__init__":
            refuse(f"{name} is not allowed in an answer")
        if isinstance(x, ast.Attribute) and not isinstance(x.ctx, ast.Load) and root(x) not in own:
            refuse("only attributes of what the function is given may be set")
    elif isinstance(x, ast.Constant) and isinstance(x.value, str) and x.value.startswith("__"):
        refuse(f"{x.value[:40]!r} is not allowed in an answer")


def defined(tree):
    """The names that a module defines or imports."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name))


def is_constant(node):
    """Whether a statement gives a name a literal value."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
        return False
    try:
        ast.literal_eval(node.value)
        return True
    except ValueError:
        return False


def helpers(theirs, own, node):
    """What the function needs of the student's own: functions, constants and imports that the reference lacks."""
    known, offered = set(defined(own)), {}
    for x in theirs.body:
        if isinstance(x, (ast.FunctionDef, ast.Import, ast.ImportFrom)) or is_constant(x):
            offered |= {name: x for name in defined(ast.Module([x], [])) if name not in known}
    taken, wanted = [], [node]
    while wanted:
        for name in names_in(wanted.pop()):
            if name in offered:
                helper = offered.pop(name)
                if helper not in taken:
                    taken.append(helper)
                    wanted.append(helper)
    return sorted(taken, key=lambda x: x.lineno)


def spliced(reference, text, function):
    """The reference's tree with the function and its helpers from the student's text. Raises Refused."""
    try:
        theirs = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        where = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
        raise Refused(f"the file cannot be read: {getattr(error, 'msg', error)}{where}") from None
    own = ast.parse(reference)
    node, old = find(theirs, function), find(own, function)
    if not isinstance(node, ast.FunctionDef):
        raise Refused(f"the file has no function {function}")
    node.decorator_list = old.decorator_list
    holder = own
    new = helpers(theirs, own, node)
    if "." in function:
        holder, their_class = find(own, function.split(".")[0]), find(theirs, function.split(".")[0])
        has = {x.name for x in holder.body if isinstance(x, ast.FunctionDef)}
        wanted = set(names_in(node))
        methods = [x for x in their_class.body if isinstance(x, ast.FunctionDef) and x.name not in has
                   and x.name in wanted]
    else:
        methods = []
    known = set(re.findall(r"\b_\w+", reference)) | {x.name for x in (*new, *methods) if isinstance(x, ast.FunctionDef)}
    said = {ast.dump(x) for x in ast.walk(old) if isinstance(x, ast.Call) and BUILTINS & set(names_in(x))}
    for x in (node, *new, *methods):
        check(x, known, said)
        ast.increment_lineno(x, MINE)
    holder.body[holder.body.index(old)] = node
    holder.body += methods
    start = next(k for k, x in enumerate(own.body[1:], 1) if not isinstance(x, (ast.Import, ast.ImportFrom)))
    own.body[start:start] = new
    return own


# ---- one process an exercise

class Texts:
    """Finds the project's modules and its tests as compiled code, so that each process has them at once."""

    def __init__(self, code):
        self.code = code            # name -> (code object, path)

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in self.code else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        code, module.__file__ = self.code[module.__name__]
        exec(code, module.__dict__)


REFERENCE = {}


def prepare():
    """Import what the processes share, and compile the reference. Here nothing of a student's is run."""
    import numpy  # noqa: F401
    import PIL.Image, PIL.ImageDraw, PIL.ImageOps, pytest, scipy.stats, torch, tqdm  # noqa: E401, F401
    import torch.utils._python_dispatch, torch.testing, unittest.mock  # noqa: E401, F401
    torch.set_num_threads(1)
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])          # what torch imports at first use
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))
    scipy.stats.t.ppf(0.975, 3)
    torch.nn.functional.normalize(torch.einsum("ij,kj->ik", torch.eye(2), torch.eye(2)))
    for name in (*MODULES, *TESTS):
        path = str((ROOT if name in MODULES else HERE) / f"{name}.py")
        REFERENCE[name] = compile(read(name), path, "exec", optimize=0), path
        sys.modules.pop(name, None)
    gc.collect()
    gc.freeze()         # else each process would look through, and so copy, all that was imported
    gc.disable()


def limit_process(seconds):
    """No output, little memory, no large files, and an end."""
    import resource
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    if Path("/proc/self/statm").exists():
        now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST, MOST))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, seconds)               # processor time: the machine may be busy
    signal.alarm(math.ceil(PATIENCE * seconds) + 5)


def in_process(work, limit):
    """What work(send) sends, as a list, from a process of its own; and how it ended: "" if well."""
    if not REFERENCE:
        prepare()
    token, (out, into) = secrets.token_hex(8), os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            os.close(out)
            limit_process(limit)
            work(lambda value: os.write(into, f"{token}{json.dumps(value)}\n".encode()))
            os.write(into, f"{token}\"end\"\n".encode())
        except BaseException as error:
            os.write(into, f"{token}{json.dumps({'died': describe(error)})}\n".encode())
        finally:
            os._exit(0)
    os.close(into)
    text, deadline = b"", time.monotonic() + PATIENCE * limit
    while (left := deadline - time.monotonic()) > 0 and select.select([out], [], [], left)[0]:
        if not (piece := os.read(out, 65536)) or len(text) > MOST:
            break
        text += piece
    try:
        os.killpg(child, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(out)
    sent = [json.loads(line[len(token):]) for line in text.decode().split("\n") if line.startswith(token)]
    if sent and sent[-1] == "end":
        return sent[:-1], ""
    if sent and isinstance(sent[-1], dict) and "died" in sent[-1]:
        return sent[:-1], sent[-1]["died"]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGKILL):
        return sent, f"not finished within {limit:g} seconds"
    return sent, f"the process ended early (status {status})"


def describe(error):
    """An error in one line, with the line of the student's file where it happened."""
    trace, line = error.__traceback__, None
    while trace is not None:
        line = trace.tb_lineno - MINE if trace.tb_lineno > MINE else line
        trace = trace.tb_next
    place = f", line {line}" if line else ""
    if isinstance(error, NotImplementedError):
        return f"not written yet{place}"
    if isinstance(error, AssertionError):
        beginnings = "Expected .* but got|Mismatched|The values for attribute|need "
        telling = re.search(f"^({beginnings}).*$", str(error), re.M)
        return ANOTHER + (f": {telling[0][:160]}" if telling else "")
    text = " ".join(str(error)[:1000].split())
    return f"{type(error).__name__}: {text[:160]}{place}"


def use(code):
    """Make these modules what is imported from now on, all afresh."""
    for name in code:
        sys.modules.pop(name, None)
    sys.meta_path[:] = [Texts(code)] + [x for x in sys.meta_path if not isinstance(x, Texts)]


def reference_with(file, tree, path):
    """The reference's code with one module replaced."""
    return REFERENCE | {file: (compile(tree, str(path), "exec", optimize=0, dont_inherit=True), str(path))}


def check_origin(file, function, path):
    """The function that will be graded is the student's: of that file, of those lines."""
    found = importlib.import_module(file)
    for part in function.split("."):
        found = getattr(found, part)
    code = inspect.unwrap(found).__code__
    if code.co_filename != str(path) or code.co_firstlineno < MINE:
        raise Refused(f"graded {code.co_filename}, not {path}")


def run_test(test):
    """Run one test; raises what it raises."""
    import pytest
    import torch
    torch.manual_seed(0)
    function = getattr(importlib.import_module(test.where), test.name)
    args = [getattr(torch, x) if isinstance(x, str) and hasattr(torch, x) else x for x in test.args]
    patched = {}
    names = function.__code__.co_varnames[:function.__code__.co_argcount]
    if "monkeypatch" in names:
        patched["monkeypatch"] = pytest.MonkeyPatch()
    if "graph" in names:
        here = importlib.import_module("test_gnn")
        patched["graph"] = here.build_graph(*torch.tensor(here.PAIRS).T, here.U, here.I)
    free = [name for name in names if name not in patched]
    try:
        function(**patched, **dict(zip(free, args, strict=True)))
    finally:
        if "monkeypatch" in patched:
            patched["monkeypatch"].undo()


def answer_of(folder, file):
    """The text of a file that was handed in. Raises Refused."""
    path = Path(folder) / file
    if not path.is_file() or path.is_symlink():
        raise Refused(f"{file} is missing")
    if path.stat().st_size > MOST:
        raise Refused(f"{file} is larger than {MOST:,} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise Refused(f"{file} cannot be read: {error}")


def attempt(exercise, folder, theirs, send, only=None):
    """Run an exercise's tests, or only one, on an answer, in this process, and send each one's
    outcome."""
    file, function = split_name(exercise)
    path = Path(folder) / f"{file}.py"
    use(reference_with(file, spliced(read(file), theirs, function), path))
    check_origin(file, function, path)
    for test in tests_of(exercise, only):
        try:
            run_test(test)
            send([test.name, ""])
        except BaseException as error:
            send([test.name, describe(error)])


def tests_of(exercise, only=None):
    """The tests that are functions: all, or the one of that name."""
    tests = [test for test in GRADED[exercise.name] if test.name != BETRAYS]
    return [test for test in tests if only in (None, test.name)]


def results_of(exercise, sent, end, only=None):
    """The results of an exercise's tests from what the process sent; end: how it ended."""
    reasons, results = dict(sent), []
    for test in tests_of(exercise, only):
        reason = reasons.get(test.name, end.removeprefix("Refused: ") or "not run")
        said = f"expected: {test.expected}; but {reason}" if reason else ""
        results.append(Result(test.name, 0 if reason else test.points, test.points, said))
    return results


def grade_function(exercise, folder, limit=LIMIT):
    """Results of a write or bug exercise's tests."""
    file, _ = split_name(exercise)
    return results_of(exercise, *in_process(
        lambda send: attempt(exercise, folder, answer_of(folder, f"{file}.py"), send), limit))


def grade_texts(exercise, texts, only=()):
    """Results of several answers that are known to be harmless, in one process. only: for each
    answer the one test that it is put to, None for all."""
    only = only or [None] * len(texts)

    def work(send):
        for text, test in zip(texts, only, strict=True):
            sent = []
            try:
                attempt(exercise, "handed_in", text, sent.append, test)
                send([sent, ""])
            except Refused as error:
                send([sent, str(error)])
    sent, end = in_process(work, 60)
    sent += [[[], end]] * (len(texts) - len(sent))
    return [results_of(exercise, *x, test) for x, test in zip(sent, only)]


def grade_race(exercise, folder, limit=LIMIT, text=None):
    """Points for how much faster the student's version is than the plain one, measured side by side."""
    file, function = split_name(exercise)
    path, tests = Path(folder) / f"{file}.py", GRADED[exercise.name]

    def work(send):
        theirs = answer_of(folder, f"{file}.py") if text is None else text
        tree = spliced(read(file), theirs, function)
        plain = compile(with_body(read(file), function, exercise.plant), "plain", "exec", optimize=0)
        works = []
        for code in (REFERENCE | {file: (plain, "plain")}, reference_with(file, tree, path)):
            use(code)
            module = importlib.import_module(file)
            works.append(getattr(importlib.import_module("cases"), f"race_{exercise.name}")(module))
        check_origin(file, function, path)
        send({"ratio": race(*works)})
    sent, end = in_process(work, limit)
    ratio = sent[0]["ratio"] if sent else 0.0
    why = f"it was {ratio:.1f} times as fast" if sent else end.removeprefix("Refused: ")
    return [Result(test.name, test.points * (ratio >= step), test.points,
                   "" if ratio >= step else f"expected: {test.expected}; but {why}")
            for test, step in zip(tests, STEPS[exercise.name])]


def race(plain, fast):
    """How many times as fast the second is; AssertionError unless both give the same, before and after."""
    import torch
    seconds = importlib.import_module("cases").seconds
    spent, secret = [[], []], secrets.randbelow(10 ** 6)
    for turn in range(3):
        k = secret + turn
        torch.testing.assert_close(fast(k), plain(k), rtol=1e-4, atol=1e-3)
        for times, work in zip(spent, (plain, fast)):
            times.append(seconds(work, secret + 1000 * turn))
    torch.testing.assert_close(fast(secret), plain(secret), rtol=1e-4, atol=1e-3)
    return min(spent[0]) / min(spent[1])


CASES = {}


def case(kind, exercise, planted=False):
    """What a small case gives on the reference, or on it with the exercise's bug; each computed once."""
    key = kind, exercise.name, planted
    if key not in CASES:
        def work(send):
            code = REFERENCE
            if planted:
                file, _ = split_name(exercise)
                text = handed_out(read(file), exercise)
                code = REFERENCE | {file: (compile(text, f"{file} with a bug", "exec", optimize=0), file)}
            use(code)
            import torch
            torch.manual_seed(0)
            send(getattr(importlib.import_module("cases"), f"{kind}_{exercise.name}")())
        sent, end = in_process(work, 60)
        if end:
            raise RuntimeError(f"{kind}_{exercise.name}: {end}")
        CASES[key] = sent[0]
    return CASES[key]


def moved(exercise):
    """How much the bug moves each number of its case: number -> relative change."""
    healthy, ill = case("watch", exercise), case("watch", exercise, planted=True)
    return {text: abs(ill[text] - value) / max(abs(value), abs(ill[text]), 1e-9) for text, value in healthy.items()}


def numbers(exercise):
    """The numbers of a bug's case, in the order of its answers 1, 2, 3."""
    return sorted(case("watch", exercise))


def betraying(exercise):
    """The right answer: which number, from 1, the bug moves most."""
    change = moved(exercise)
    return 1 + numbers(exercise).index(max(change, key=change.get))


# ---- answers that are numbers and words

def answers_of(folder):
    """answers.json. Raises Refused."""
    try:
        answers = json.loads(answer_of(folder, "answers.json"))
    except (ValueError, RecursionError) as error:
        where = f" in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise Refused(f"answers.json is not valid JSON{where}") from None
    if not isinstance(answers, dict):
        raise Refused("answers.json must hold what was handed out, filled in")
    return answers


def grade_answer(exercise, folder):
    """The result of a prediction, or of the question which number betrays a bug."""
    test = GRADED[exercise.name][-1]
    right = case("predict", exercise) if exercise.kind == "predict" else betraying(exercise)
    try:
        given = answers_of(folder).get(exercise.name)
        if exercise.kind == "bug":
            given = given.get("betrayed_by") if isinstance(given, dict) else None
        reason = "" if agrees(given, right, exact=exercise.kind == "bug") else f"the answer was {str(given)[:40]!r}"
        if given is None:
            reason = "there is no answer"
    except Refused as error:
        reason = str(error)
    right = float(f"{right:.4g}") if isinstance(right, float) else right
    wanted = right if exercise.kind == "predict" else f"{right}, {numbers(exercise)[right - 1]}"
    text = f"expected: {wanted}; but {reason}" if reason else ""
    return Result(test.name, 0 if reason else test.points, test.points, text)


def agrees(given, right, exact=False):
    """Whether an answer is right: a word, or a number within five hundredths."""
    if isinstance(right, str):
        return isinstance(given, str) and given.strip().lower() == right
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given):
        return False
    return given == right if exact else abs(given - right) <= 0.05 * abs(right) + 1e-6


# ---- grading

def grade_exercise(exercise, folder, limit=LIMIT):
    """All results of one exercise."""
    if exercise.kind == "predict":
        return [grade_answer(exercise, folder)]
    if exercise.kind == "race":
        return grade_race(exercise, folder, limit)
    results = grade_function(exercise, folder, limit)
    return results + ([grade_answer(exercise, folder)] if exercise.kind == "bug" else [])


def manifest(folder):
    """Tier and kind of a handout; all where its note of them is lost."""
    try:
        note = json.loads(answer_of(folder, "coursework.json"))
        tier, kind = note["tier"], note["kind"]
    except (Refused, ValueError, KeyError, TypeError, RecursionError):
        tier, kind = "all", "all"
    return tier if tier in ("core", "all") else "all", kind if kind in ("write", "bug", "predict") else "all"


def remarks(folder):
    """What students say in one line about each bug, for the teacher to read."""
    try:
        answers = answers_of(folder)
    except Refused:
        return {}
    return {name: str(value["why"])[:300] for name, value in answers.items()
            if name in NAMED and isinstance(value, dict) and value.get("why")}


def grade(folder, tier=None, kind=None, limit=LIMIT):
    """A submission's result, in the layout of autograders: score, max_score, and tests with score and output."""
    start, (noted_tier, noted_kind) = time.monotonic(), manifest(folder)
    tier, kind = tier or noted_tier, kind or noted_kind
    tests, said = [], remarks(folder)
    for exercise in chosen(tier, kind):
        for result in grade_exercise(exercise, folder, limit):
            tests.append({"name": f"{exercise.name}: {result.name}", "number": exercise.name, "score": result.score,
                          "max_score": result.points, "output": result.reason,
                          "visibility": "after_due_date" if exercise.kind in ("bug", "predict") else "visible",
                          "tags": [exercise.kind, exercise.tier]})
    return {"score": sum(x["score"] for x in tests), "max_score": sum(x["max_score"] for x in tests),
            "execution_time": round(time.monotonic() - start, 1), "visibility": "visible",
            "output": f"{Path(folder).name}: tier {tier}, kind {kind}", "tests": tests, "extra_data": {"why": said}}


def submissions(folders):
    """Each folder that holds a project; of one that holds none its subfolders."""
    for folder in map(Path, folders):
        is_one = any((folder / f"{module}.py").exists() for module in MODULES) or (folder / "answers.json").exists()
        inner = [x for x in sorted(folder.iterdir()) if x.is_dir() and not x.name.startswith(".")]
        yield from [folder] if is_one or not inner else inner


def junit(graded):
    """JUnit XML: a suite for each submission, a case for each test."""
    suites = ElementTree.Element("testsuites")
    for name, result in graded.items():
        lost = sum(x["score"] < x["max_score"] for x in result["tests"])
        suite = ElementTree.SubElement(suites, "testsuite", name=name, tests=str(len(result["tests"])),
                                       failures=str(lost), time=str(result["execution_time"]))
        for x in result["tests"]:
            item = ElementTree.SubElement(suite, "testcase", classname=x["number"], name=x["name"])
            if x["output"]:
                printable = re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd]", "?", x["output"])
                ElementTree.SubElement(item, "failure", message=printable).text = printable
    return ElementTree.tostring(suites, encoding="unicode")


def show(name, result):
    """A submission's result for people: an exercise a line, and a line for each loss."""
    print(f"\n{name}: {result['score']:g} of {result['max_score']} points in {result['execution_time']} s")
    by_exercise = {}
    for x in result["tests"]:
        by_exercise.setdefault(x["number"], []).append(x)
    for exercise, tests in by_exercise.items():
        print(f"  {sum(x['score'] for x in tests):4g} / {sum(x['max_score'] for x in tests):<3} {exercise}")
        reasons = [x["output"] for x in tests if x["output"]]
        causes = {reason.rpartition("; but ")[2] for reason in reasons}
        if len(causes) == 1 and len(reasons) > 1 and ANOTHER not in reasons[0]:
            reasons = causes
        for reason in reasons:
            print(f"              {reason}")
    for exercise, why in result["extra_data"]["why"].items():
        print(f"  says of {exercise}: {' '.join(why.split())}")


# ---- the handout

def shown_tests(exercises):
    """The text of the tests that students get: those shown of these exercises, and what they use."""
    text = read("test_exercises")
    tree = ast.parse(text)
    names = {test.name for x in exercises for test in GRADED[x.name] if test.shown}
    named = {name: node for node in tree.body for name in defined(ast.Module([node], []))}
    wanted = [named[name] for name in names]
    kept = {id(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))}
    while wanted:
        node = wanted.pop()
        if id(node) not in kept:
            kept.add(id(node))
            wanted += [named[name] for name in names_in(node) if name in named]
    return kept_lines(text, tree, kept, '"""The tests that you are given; the teacher has more. One exercise\'s: '
                      'pytest test_exercises.py -k NAME"""')


def kept_lines(text, tree, kept, docstring):
    """The text with only these nodes of the module, and another docstring."""
    lines, parts = text.split("\n"), [docstring]
    for node in tree.body:
        if id(node) in kept:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1
            gap = "\n\n" if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ""
            parts.append(gap + "\n".join(lines[first:node.end_lineno]))
    return "\n".join(parts) + "\n"


def shown_cases(exercises):
    """The text of cases.py without the cases of other exercises."""
    text = read("cases")
    tree, names = ast.parse(text), {exercise.name for exercise in exercises}
    kept = {id(node) for node in tree.body[1:] if not isinstance(node, ast.FunctionDef)
            or not re.match("(watch|predict|race)_", node.name) or node.name.split("_", 1)[1] in names}
    doc = text[:text.index("\n\nThe teacher")] + "\"\"\""
    return kept_lines(text, tree, kept, doc)


def describe_exercise(exercise):
    """An exercise's section in the students' README."""
    points, more = points_of(exercise), ""
    head = f"### {exercise.name}\n\n{points} point{'s' * (points > 1)}, {exercise.minutes} minutes, {exercise.tier}.\n"
    if exercise.kind == "predict":
        return f"{head}\n{exercise.equation}\n\nHint: {exercise.hint}\n"
    file, function = split_name(exercise)
    lines = [head, f"`{file}.py`: `{function}`. {exercise.concept[0].upper()}{exercise.concept[1:]}"
             f"{'.' if exercise.kind == 'bug' else f': `{exercise.equation}`'}"]
    if exercise.kind == "bug":
        lines += [f"Symptom: {exercise.equation}. Run `python cases.py watch {exercise.name}`."]
        lines += ["Which number betrays it?"]
        lines += ["\n".join(f"{k}. {re.sub(r' [(].*', '', text)}" for k, text in enumerate(numbers(exercise), 1))]
    else:
        wanted = "\n".join(f"- {test.expected} ({test.points})" for test in GRADED[exercise.name])
        more = f" Measure: `python cases.py race {exercise.name}`." if exercise.kind == "race" else ""
    lines += [f"Hint: {exercise.hint}{more}"]
    if exercise.kind != "bug":
        lines += [f"Expected (points):\n\n{wanted}"]
    if any(test.shown for test in GRADED[exercise.name]):
        first = f" (write {' and '.join(exercise.after.split())} first)" if exercise.after else ""
        lines += [f"Test{first}: `pytest test_exercises.py -k {exercise.name}`"]
    return "\n\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


KINDS = {
    "write": """Write it

The body is missing (`raise NotImplementedError`), or a part of it. The docstring says what the function does, shapes
and equation included. You may add functions, constants and imports of your own.""",
    "race": """Make it faster

The function is right and slow (or still to be written, above). Make it faster without changing what it gives. Points by
how many times as fast it is as the plain version, side by side.""",
    "bug": """Find the bug

The function runs and is subtly wrong, as published code has been. Mend it. In `answers.json` say which number betrays
it: 1, 2 or 3 in `betrayed_by` (1 point), and in one line, `why`, how (your teacher reads it). A case runs once the
functions that it calls are written.""",
    "predict": """Predict, then run

Write your answer into `answers.json` first: a number, or "up", "down" or "same". Then run `python cases.py predict
NAME`, and if you were wrong, find out why."""}


def example(exercises):
    """The first commands of a handout: an exercise's tests, or its case."""
    shown = [x.name for x in exercises if any(test.shown for test in GRADED[x.name])]
    if not shown:
        first = exercises[0]
        return f"python cases.py {'watch' if first.kind == 'bug' else first.kind} {first.name}"
    return (f"pytest test_exercises.py -k {shown[0]}       # one exercise's tests: about three seconds\n"
            "pytest test_exercises.py                        # all: about ten seconds")


def students_readme(exercises, tier, kind):
    """The README of a handout."""
    kinds = [k for k in KINDS if any(x.kind == k for x in exercises)]
    total, minutes = sum(map(points_of, exercises)), sum(x.minutes for x in exercises)
    table = ["| exercise | in | points | minutes |", "|---|---|---|---|"]
    table += [f"| [{x.name}](#{x.name}) | {'answers.json' if x.kind == 'predict' else x.function} | {points_of(x)} | "
              f"{x.minutes} |" for x in exercises]
    start = (HERE / "handout.md").read_text(encoding="utf-8").format(
        n=len(exercises), points=total, hours=round(minutes / 60, 1), tier=tier, kind=kind, example=example(exercises))
    parts = [start, "\n".join(table)]
    for k in kinds:
        parts += [f"## {KINDS[k]}", *(describe_exercise(x) for x in exercises if x.kind == k)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


SCAFFOLD = ("report", "builders", "demo")


def handout_texts(tier="all", kind="all"):
    """{file name: text} of what students get."""
    exercises = chosen(tier, kind)
    texts = {f"{name}.py": read(name) for name in MODULES}
    for exercise in exercises:
        if exercise.kind != "predict" and not (exercise.extends and NAMED[exercise.extends] in exercises):
            file = f"{split_name(exercise)[0]}.py"
            texts[file] = handed_out(texts[file], exercise)
    blanks = {x.name: None for x in exercises if x.kind == "predict"}
    blanks |= {x.name: {"betrayed_by": None, "why": ""} for x in exercises if x.kind == "bug"}
    for name in SCAFFOLD:  # what the six files import of tests/: the report, the demonstrations
        texts[f"tests/{name}.py"] = (HERE / f"{name}.py").read_text(encoding="utf-8")
    texts["cases.py"] = shown_cases(exercises)
    if any(test.shown for x in exercises for test in GRADED[x.name]):
        texts["test_exercises.py"] = shown_tests(exercises)
    texts["answers.json"] = json.dumps(blanks, indent=1) + "\n"
    texts["coursework.json"] = json.dumps({"tier": tier, "kind": kind, "edition": CHANGES[0][0]}) + "\n"
    texts["requirements.txt"] = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    texts["README.md"] = students_readme(exercises, tier, kind)
    texts["CHANGELOG.md"] = "# Changes\n\n" + "\n".join(f"- {version}: {text}" for version, text in CHANGES) + "\n"
    return texts


def handout(folder, tier="all", kind="all"):
    """Write a handout into a new or empty folder. Raises ValueError on another."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not empty: name a new folder")
    texts = handout_texts(tier, kind)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tests").mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return texts


# ---- the command line

def list_exercises():
    """Print the table of exercises."""
    print(f"{'exercise':25}{'tier':11}{'kind':9}{'points':>7}{'minutes':>9}  concept: function")
    for x in EXERCISES:
        place = "" if x.kind == "predict" else f": {x.function}"
        print(f"{x.name:25}{x.tier:11}{x.kind:9}{points_of(x):7}{x.minutes:9}  {x.concept}{place}")
    for tier in ("core", "all"):
        found = chosen(tier)
        print(f"tier {tier}: {len(found)} exercises, {sum(map(points_of, found))} points, "
              f"{sum(x.minutes for x in found) / 60:.1f} hours")
    left = [x.name for x in EXERCISES if x not in chosen()]
    print(f"only with --kind bug, as their functions are to be written before: {', '.join(left)}")


def parse(argv):
    parser = argparse.ArgumentParser(prog="coursework.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the exercises: points, minutes, concept")
    out = commands.add_parser("handout", help="write the students' project")
    out.add_argument("folder")
    back = commands.add_parser("grade", help="grade one submission, or each in a folder of them")
    back.add_argument("folder", nargs="+")
    for sub, default in ((out, "all"), (back, None)):
        sub.add_argument("--tier", choices=("core", "all"), default=default,
                         help="all: the tiers full and challenge, too (%(default)s)")
        sub.add_argument("--kind", choices=("write", "bug", "predict", "all"), default=default,
                         help="exercises of one kind alone (%(default)s)")
    back.add_argument("--json", help="file for the results: of one submission its own, of several {name: result}")
    back.add_argument("--junit", help="file for the results as JUnit XML")
    proof = commands.add_parser("prove", help="prove the graders: blanks, bugs, wrong answers, attacks")
    proof.add_argument("--json", help="file for the proof's figures")
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, args = parse(argv)
    if args.command == "list":
        list_exercises()
        return 0
    if args.command == "handout":
        try:
            handout(args.folder, args.tier, args.kind)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        print(f"{args.folder}: {len(chosen(args.tier, args.kind))} exercises; students start with its README.md")
    elif args.command == "grade":
        missing = [folder for folder in args.folder if not Path(folder).is_dir()]
        if missing:
            parser.error(f"no folder {missing[0]}")
        graded = {}
        for folder in submissions(args.folder):
            name = folder.resolve().name if folder.resolve().name not in graded else str(folder)
            graded[name] = grade(folder, args.tier, args.kind)
            show(name, graded[name])
        if len(graded) > 1:
            print("\n" + "\n".join(f"{x['score']:5g} of {x['max_score']}  {name}" for name, x in graded.items()))
        if args.json:
            found = graded if len(graded) != 1 else next(iter(graded.values()))
            Path(args.json).write_text(json.dumps(found, indent=1), encoding="utf-8")
        if args.junit:
            Path(args.junit).write_text(junit(graded), encoding="utf-8")
    else:
        from prove import prove
        found = prove()
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=1), encoding="utf-8")
        return bool(found["failures"])
    return 0


if __name__ == "__main__":
    sys.modules["coursework"] = sys.modules["__main__"]
    sys.exit(main())
