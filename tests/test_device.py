"""Is the program ready for a GPU?  A whole run on a simulated one, in float64: a second device whose tensors hold real
numbers, on which every mistake shows that a real one would punish, and some that it forgives.  One in float32, on a device that has no float64, on which whatever
the host waits for is written down.  And one in bf16."""
import ctypes
import dataclasses
import importlib
import inspect
import json
import re
import sys
import types
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, ROOT, Fork, forget_the_project, spawn
from kill_resume import leaves
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import dppmg
import train

DEVICE = torch.device("meta")       # borrows the name: torch.empty(device="meta") needs no driver


WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "multinomial")
waited, doubles = Counter(), Counter()      # lines of our code: of waits for the device, and of float64 on it


def our_line():
    """file.py:function of our code that is running."""
    frame = sys._getframe()
    while frame and Path(frame.f_code.co_filename).parent != ROOT:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}" if frame else "?"


def waits(name, args, kwargs, crosses):
    """Does the host wait for the device? For a number, a size that depends on numbers, or a copy from one to the other."""
    if name in ("_to_copy", "copy_"):
        return crosses and not (kwargs.get("non_blocking") or name == "copy_" and True in args[2:])
    masked = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
    return name in WAITS or masked


class There(torch.Tensor):
    """A tensor that says it is on DEVICE; its numbers are in `numbers`, on the CPU."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real):
        there = torch.Tensor._make_wrapper_subclass(cls, real.shape, strides=real.stride(), dtype=real.dtype,
                                                    storage_offset=real.storage_offset(), device=DEVICE)
        there.numbers = real
        return there

    @property
    def data(self):
        return There(self.numbers)

    @data.setter
    def data(self, other):
        self.numbers = other.numbers

    def tolist(self):
        waited[our_line()] += 1
        return self.numbers.tolist()

    def __format__(self, how):
        return format(self.numbers, how)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return simulate(function, args, kwargs or {})


class Simulated(TorchDispatchMode):
    """Within it, what is made on DEVICE or copied to it is There."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return simulate(function, args, kwargs or {})


def simulate(function, args, kwargs):
    """The operation on the real numbers. Raises where tensors of two devices meet, as a GPU does."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = {id(x.numbers): x for x in tensors if isinstance(x, There)}
    name = function.overloadpacket.__name__
    if there and name not in ("_to_copy", "copy_"):
        stray = [tuple(x.shape) for x in tensors if not isinstance(x, There) and x.ndim]
        assert not stray, f"{function}: a tensor {stray[0]} on the CPU, others on the device"
    goal = kwargs.get("device")
    goes_there = bool(there) if goal is None else goal.type == DEVICE.type
    if name == "copy_":
        goes_there = isinstance(args[0], There)
    crosses = goes_there != all(isinstance(x, There) for x in tensors[-1:])
    if (there or goes_there) and waits(name, args, kwargs, crosses):
        waited[our_line()] += 1
    if goal is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.numbers if isinstance(x, There) else x, (args, kwargs))
    found = function(*args, **kwargs)

    def outside(x):
        if not isinstance(x, torch.Tensor):
            return x
        if goes_there and x.dtype == torch.float64:
            doubles[our_line()] += 1
        return there.get(id(x)) if id(x) in there else There(x) if goes_there else x
    return tree_map(outside, found)


class GeneratorThere(torch.Generator):
    """Draws on the CPU what DEVICE is to hold."""
    device = DEVICE


class Generator(torch.Generator):
    """torch.Generator, which knows of DEVICE."""

    def __new__(cls, device="cpu"):
        return cls.__base__.__new__(GeneratorThere if torch.device(device) == DEVICE else cls.__base__)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A function: train and evaluate a tiny run on a device; its metrics and state."""
    steps = [f"--{name}-steps" for name in ("gnn", "vq", "text", "image", "image-ae", "reward-scorer", "referee")]
    args, given = train.parse_arguments([
        "--smoke", "--out", str(tmp_path), "--items", "48", "--users", "6", "--interactions", "10", "--pairs", "20",
        "--sampled-users", "2", "--samples", "3", "--best-of", "2",
        "--referee-pictures", "32", "--new-users", "0.2", "--reward-rounds", "2", "--text-layers", "1", "--image-layers", "1", "--text-context", "9",
        *(x for s in steps for x in (s, "2"))])
    draw_batch, adamw, orthogonal = train.draw_batch, torch.optim.AdamW, torch.nn.init.orthogonal_

    @torch.no_grad()
    def orthogonal_(x, generator=None):         # torch's does nothing on "meta"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return x.copy_(orthogonal(torch.empty(x.shape)))
    monkeypatch.setattr(torch.nn.init, "orthogonal_", orthogonal_)
    monkeypatch.setattr(train, "draw_batch", lambda n, rng: draw_batch(32, rng))
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **options: adamw(*args, **options))
    monkeypatch.setattr(torch, "save", lambda state, file: None)
    opened = train.open_run(args, given)

    def run(device, method=opened.cfg.method):
        cfg = dataclasses.replace(opened.cfg, method=method)
        data = train.Dataset.load(tmp_path / "stickers", cfg.image.size, 0)
        new = train.Run(cfg, opened.train, data, opened.world, tmp_path, device)
        train.train_all(new)
        train.finish(new)
        return new, json.loads((tmp_path / "metrics.json").read_text())
    return run


def test_a_whole_run_on_another_device_and_in_float64_is_that_on_the_cpu(tiny, monkeypatch):
    """Training steps, samplers, evaluation, report.  float64 is the default: a float32 that is left somewhere differs."""
    monkeypatch.setattr(torch, "Generator", Generator)
    found, fp64 = [], dataclasses.replace(dppmg.MethodConfig(image_features=16, text_features=16), bf16=False)
    torch.set_default_dtype(torch.float64)
    try:
        for device in (torch.device("cpu"), DEVICE):
            with ExitStack() as stack:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                if device == DEVICE:
                    stack.enter_context(Simulated())
                run, metrics = tiny(device, fp64)
                assert {x.device for x in run.modules.state_dict().values()} == {device}
                assert {x.dtype for x in run.modules.state_dict().values()} == {torch.float64, torch.int64}
            found.append({name: value for name, value in leaves(metrics)
                          if value is not None and not isinstance(value, str)})
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(found[0]) > 200 and found[0] == pytest.approx(found[1], rel=1e-9, nan_ok=True)


def test_on_a_device_without_float64_a_whole_run_needs_none_and_no_training_step_waits(tiny, monkeypatch):
    """A step is what `losses` computes: a round of the reward samples pictures and texts, and scores them.  On a GPU nothing
    else is between two steps; this device alone has its optimizers in Python, and a look each step that the CPU affords."""
    fit, found = train.fit, {}

    def watched(run, optimizer, steps, losses, *args, **options):
        def step(generator):
            before = waited.copy()
            parts = losses(generator)
            found.setdefault(run.stage, Counter()).update(waited - before)
            return parts
        return fit(run, optimizer, steps, step, *args, **options)
    monkeypatch.setattr(train, "fit", watched)
    monkeypatch.setattr(torch, "Generator", Generator)
    waited.clear(), doubles.clear()
    with sdpa_kernel(SDPBackend.MATH), Simulated():
        _, metrics = tiny(DEVICE)
    assert metrics["stage1"]["recall@20"] >= 0
    assert not doubles, doubles
    assert found == {stage: Counter() for stage in train.STAGES if stage not in ("features", "evaluation", "report")}
    assert waited["train.py:check_finite"] and waited["train.py:draw_pairs"]       # where they may, they are seen


def test_the_simulated_device_sees_each_way_to_wait():
    waited.clear()
    with Simulated():
        x = torch.arange(4, device=DEVICE)
        free = [x + 1, x[:2], x.masked_fill(x > 1, 0), x[x], torch.zeros(3, device=DEVICE), x.cumsum(0), 2.0 * x]
        flag = torch.zeros((), dtype=torch.bool)
        flag.copy_((x > 1).any(), non_blocking=True)
        assert flag and len(free) == 7 and not waited
        for n, wait in enumerate((lambda: x[0].item(), lambda: bool(x[0]), x.cpu, x.tolist, lambda: x[x > 1], x.nonzero,
                                  x.unique, lambda: torch.ones(3).to(DEVICE),
                                  lambda: x.copy_(torch.ones(4)), lambda: torch.ones(4).copy_(x)), 1):
            wait()
            assert waited.total() == n, n


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("real", [True, False])
def test_bf16_is_on_only_where_a_card_has_it_and_does_not_emulate_it(monkeypatch, wanted, real):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or real)
    kinds, autocast = [], torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype: kinds.append((kind, dtype)) or autocast("cpu", dtype))
    tensor = types.SimpleNamespace(device=torch.device("cuda"))
    model = types.SimpleNamespace(graph=types.SimpleNamespace(col=tensor),
                                  cfg=dppmg.Config(dppmg.MethodConfig(bf16=wanted)))
    with dppmg.DPPMG.half(model):
        assert torch.is_autocast_enabled("cpu") == (wanted and real)
    assert kinds == [("cuda", torch.bfloat16)] * (wanted and real)


def test_where_a_module_of_unix_is_missing_all_can_be_imported_and_help_is_printed(tmp_path):
    def work():
        forget_the_project()
        for name in ("resource", "fcntl", "pwd", "grp", "termios"):
            sys.modules[name] = None
        for name in ("gnn", "vq", "generators", "reward", "dppmg", "train"):
            assert importlib.import_module(name) is not before[name]
        sys.modules["train"].main(["--help"])
    before = {name: importlib.import_module(name) for name in ("gnn", "vq", "generators", "reward",
                                                               "dppmg", "train")}
    process = Fork(work, tmp_path)
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "--image-batch" in printed, errors


def test_float32_is_float32_once_a_device_is_picked():
    """torch lets convolutions round to TF32 by default, with 11 bits; products it does not."""
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        dppmg.pick_device("cpu")
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before


PAGES = """if True:
    import resource, torch, train
    def pages():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            torch.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    first = pages()
    train.keep_memory()
    pages()
    print(first, pages())"""


def test_memory_that_tensors_give_back_stays_for_the_next():
    """How many pages the system gives for five tensors of 64 MB, one after the other, in a process of its own."""
    pytest.importorskip("resource")
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("the memory is not glibc's")
    printed, errors = spawn("-c", PAGES, cwd=ROOT).communicate(timeout=PATIENCE)
    asked, kept = map(int, printed.split())
    assert asked > 20000 and kept < 500, (printed, errors)


@pytest.mark.parametrize("stage, flag", [("gnn", "--gnn-dim"), ("text", "--text-batch"), ("image", "--image-batch"),
                                         ("judge", "--reward-scorer-batch"), ("reward", "--reward-groups")])
def test_out_of_memory_is_called_so_and_names_the_setting_that_helps(tmp_path, capsys, monkeypatch, stage, flag):
    def full(run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free.")
    monkeypatch.setattr(train, "STAGES", {name: full if name == stage else lambda run: "" for name in train.STAGES})
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    status = train.main(["--smoke", "--items", "40", "--users", "8", "--interactions", "10", "--out", str(tmp_path / "run")])
    errors = capsys.readouterr().err
    assert status == 2 and errors.count("\n") == 1 and "out of memory: lower" in errors and flag in errors
    assert "out of memory. Tried to allocate 2.00 GiB" in errors
    flags = [dppmg.flag_of(group, name) for group, name, *_ in train.settings(train.PARTS)]
    assert flag in flags


def test_attention_is_fused_in_both_generators():
    """No table of weights, places x tokens, is ever made: torch's kernel needs numbers that lie close together."""
    seen = Counter()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen[function.overloadpacket.__name__] += 1
            return function(*args, **kwargs or {})
    image, text = dppmg.ImageConfig(width=16), dppmg.TextConfig(layers=1, width=16, vocab_size=260)
    prompt, prefs, tokens = torch.ones(2, 3, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64), torch.full((2, 5), 9)
    denoiser, decoder = dppmg.Denoiser(image, 5, 4, 8), dppmg.TextDecoder(text, 5, 4, 8)
    with Names():
        denoiser.loss(torch.zeros(2, 4, 8, 8), prompt, prefs).backward()
        decoder.loss(tokens, prompt, prefs).backward()
        dppmg.sample_text(decoder, prompt, prefs, max_len=2)
    assert not seen["bmm"]
    assert sum(n for name, n in seen.items() if "attention" in name and "backward" not in name) == 2 + 1 + 3


def test_a_whole_run_in_mixed_precision_is_finite_and_its_log_probabilities_are_float32(tiny, monkeypatch):
    """As on a GPU: bf16 wherever the program allows it, though logits are made large; and it allows it in one place."""
    kinds = {}

    def watched(name):
        function = getattr(dppmg, name)

        def call(*args):
            found = function(*args)
            kinds.setdefault(name, set()).add((found.dtype, bool(found.isfinite().all())))
            return found
        monkeypatch.setattr(dppmg, name, call)
    for name in ("gaussian_log_prob", "text_log_prob"):
        watched(name)
    seed_tables = dppmg.DPPMG.seed_tables

    def seed_large(model, generator):
        seed_tables(model, generator)
        model.text.tokens.weight.data.mul_(300)
    monkeypatch.setattr(dppmg.DPPMG, "seed_tables", seed_large)
    half = dppmg.DPPMG.half
    monkeypatch.setattr(dppmg.DPPMG, "half", lambda model: torch.autocast("cpu", torch.bfloat16))
    _, metrics = tiny(torch.device("cpu"))
    assert kinds == {name: {(torch.float32, True)} for name in ("gaussian_log_prob", "text_log_prob")}
    assert all(value == value for name, value in leaves(metrics) if name.endswith("mean"))
    source = "".join((ROOT / f"{name}.py").read_text() for name in ("gnn", "vq", "generators", "reward", "dppmg", "train"))
    switched_on = [line for line in re.findall(r"torch\.autocast.*", source) if "enabled=False" not in line]
    assert len(switched_on) == 1 and switched_on[0] in inspect.getsource(half)
