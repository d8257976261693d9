"""Is the program ready for a GPU?  A whole run on a simulated one, in float64: a second device whose tensors hold real
numbers, on which every mistake shows that a real one would punish, and some that it forgives.  And one in bf16."""
import dataclasses
import inspect
import json
import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from kill_resume import leaves
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import dppmg
import train

DEVICE = torch.device("meta")       # borrows the name: torch.empty(device="meta") needs no driver


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
    if goal is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.numbers if isinstance(x, There) else x, (args, kwargs))
    found = function(*args, **kwargs)

    def outside(x):
        if not isinstance(x, torch.Tensor):
            return x
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
        "--smoke", "--out", str(tmp_path), "--items", "48", "--users", "5", "--interactions", "10", "--pairs", "20",
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
    monkeypatch.setattr(torch, "save", lambda state, path: Path(path).write_text(""))
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
