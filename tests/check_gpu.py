"""Is the program right and fast on a GPU?  One command says everything (not collected by pytest): python tests/check_gpu.py

products    each sparse product against a sum over the edges: value, gradient, both kinds of index, fp32 and bf16
sampling    the decoding step against the forward pass in bf16, and what autocast must not reach
waits       what the host waits for: in a step of each stage, in each sampler, and, by line, in a whole run
runs        --smoke against the CPU's; a run stopped and gone on with here; one that was begun on the CPU
whole       the default run, MovieLens-1M's size, 100 M parameters a generator: seconds, work, memory, quality
profile     where a round of the reward and a step of the codebook spend their time, and two ways to launch less

Prints a table and writes a JSON (--out); the exit status is the number of checks that failed. Ten minutes at most on a GPU.
Without one it says so and runs the same code on the CPU, small (but see --no-quick): then its seconds are no GPU's.
tests/count_flops.py estimates, from the same steps, what a GPU would take."""
import argparse
import contextlib
import functools
import gc
import inspect
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import dppmg  # noqa: E402
import generators  # noqa: E402
import gnn  # noqa: E402
import train  # noqa: E402
from kill_resume import differences  # noqa: E402

LIMIT = 600                     # seconds that all may take on a GPU
TARGET = {"stickers, all": 30, "stickers, training": 10, "MovieLens-1M's size, all": 120, "memory, GB": 4}   # one H100-class card
STEPS = [x for name in ("gnn", "vq", "text", "image", "image-ae", "reward-scorer", "referee") for x in (f"--{name}-steps", "4")]
QUICK = ("--smoke --items 48 --users 12 --interactions 10 --pairs 20 --sampled-users 2 --samples 3 --referee-pictures 32 "
         "--new-users 0.2 --reward-rounds 2 --image-sampling-steps 2").split() + STEPS
FEW = "--items 160 --users 64 --interactions 12 --referee-pictures 256".split()       # data for steps of full-size networks
LARGE = ("--text-width 768 --text-layers 16 --text-heads 12 --text-batch 16 "
         "--image-size 64 --image-width 512 --image-layers 2 --image-heads 8 --image-batch 16").split()
MOVIELENS = "--items 3700 --users 6040 --interactions 165".split()
LAUNCH = 5e-6                   # seconds that a kernel takes to launch, if it is not waited for


class Checks:
    """The device, and what was found: a row a check. ok: True, False, or None where nothing is promised."""

    def __init__(self, device: torch.device, quick: bool, folder: Path):
        self.device, self.quick, self.folder = device, quick, folder
        self.cuda, self.start, self.group, self.rows = device.type == "cuda", time.monotonic(), "", []

    def add(self, name: str, ok: bool | None, **figures):
        """A row of the table."""
        self.rows.append({"group": self.group, "name": name, "ok": ok} | figures)
        words = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items() if v is not None)
        print(f"{ {True: 'ok', False: 'FAILED', None: '-'}[ok]:7}{self.group:9} {name:40} {words}", flush=True)

    def half(self):
        """bf16 by autocast, whatever this processor gains by it."""
        return torch.autocast(self.device.type, torch.bfloat16)

    def seconds(self, function, n: int = 0) -> float:
        """The shortest of n calls (5, of small ones 1), after one to warm up."""
        best = float("inf")
        for k in range(1 + (n or (1 if self.quick else 5))):
            start = time.perf_counter()
            function()
            if self.cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start) if k else best
        return best

    def open(self, name: str, arguments: list[str], device: object = None) -> train.Run:
        """A new run with these settings, or tiny ones; no settings: the run that was begun in that folder."""
        gc.collect()        # what earlier runs left on the card
        settings = (QUICK if self.quick else arguments) if arguments else ["--resume"]
        out = ["--out", str(self.folder / name), "--device", str(device or self.device)]
        run = train.open_run(*train.parse_arguments([*out, *settings]))
        run.restore()
        return run


# ---- products and sampling -----------------------------------------------------------------------

class Operations(TorchDispatchMode):
    """Counts operations by name; `kernels`: those that neither are views nor reserve memory nor ask the host."""
    NONE = ("empty", "new_empty", "_record", "promote_types", "_local_scalar")

    def __init__(self):
        super().__init__()
        self.names, self.kernels = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.overloadpacket.__name__] += 1
        self.kernels += not (function.is_view or function.overloadpacket.__name__.startswith(self.NONE))
        return function(*args, **(kwargs or {}))


def products(check: Checks):
    """Relative errors of S x and of its gradient, and whether a product makes a sparse matrix anew."""
    n_users, n_items, n_edges = (60, 40, 400) if check.quick else (6000, 4000, 400_000)
    seeded = torch.Generator().manual_seed(0)
    user, item = (torch.randint(n, (n_edges,), generator=seeded) for n in (n_users, n_items))
    host = gnn.build_graph(user, item, n_users, n_items)
    x, up = torch.randn(2, n_users + n_items, 128, generator=seeded)
    slow = x.double().requires_grad_()
    want = gnn._index_add_product(host, slow)
    want.backward(up.double())
    own = gnn._PRODUCT.get(check.device.type, gnn._index_add_product)
    for index in (torch.int64, torch.int32):
        graph = host._replace(**{name: getattr(host, name).to(index) for name in ("row_ptr", "row", "col")})
        graph = graph.to(check.device)
        graph = graph if graph.matrix is not None else graph._replace(matrix=graph.csr())
        for product in (gnn._bag_product, gnn._csr_product, gnn._index_add_product):
            for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
                name = f"{product.__name__} {str(index)[6:]} {str(dtype)[6:]}"
                device_x = x.detach().clone().to(check.device, dtype).requires_grad_()
                try:
                    with mock.patch.dict(gnn._PRODUCT, {check.device.type: product}):
                        y = gnn.spmm(graph, device_x)
                        y.backward(up.to(y))
                        with Operations() as made, torch.no_grad():
                            gnn.spmm(graph, device_x)
                        seconds = check.seconds(lambda: gnn.spmm(graph, device_x.detach()))
                except (RuntimeError, NotImplementedError) as error:
                    check.add(name, False if product is own else None, error=str(error).split("\n")[0][:80])
                    continue
                wrong = [float((a.double().cpu() - b.detach()).abs().max() / b.detach().abs().max())
                         for a, b in ((y.detach(), want), (device_x.grad, slow.grad))]
                anew = sum(n for name, n in made.names.items() if "sparse" in name and "tensor" in name)
                check.add(name, max(wrong) < most and not (anew and dtype == torch.float32), value=wrong[0], gradient=wrong[1],
                          made_anew=anew, ms=1e3 * seconds, used_here=product is own)


def sampling(check: Checks):
    """A step's logits are those of the forward pass, as near as bf16 is to fp32; sampling itself is not rounded to bf16."""
    torch.manual_seed(0)
    cfg = dppmg.TextConfig(layers=2, width=64) if check.quick else dppmg.TextConfig()
    decoder = generators.TextDecoder(cfg, 9, 4, 8).to(check.device)
    for parameter in decoder.parameters():      # logits that differ
        parameter.data.mul_(5 if parameter.ndim > 1 else 1)
    tokens = torch.randint(3, cfg.vocab_size, (32, 24), device=check.device)
    prompt, prefs = (torch.randint(high, (32, n), device=check.device) for high, n in ((9, 3), (8, 4)))
    with torch.no_grad():
        exact = decoder(tokens, prompt, prefs)
        with check.half():
            forward, (past, present) = decoder(tokens, prompt, prefs), decoder.start(prompt, prefs)
            steps, token = [], torch.full_like(tokens[:, :1], generators.BOS)
            for t in range(tokens.shape[1]):
                logits, past = decoder.step(token, t, past, present)
                steps.append(logits)
                token = tokens[:, t:t + 1]
            null = decoder(tokens, prompt, torch.full_like(prefs, -1))
            drawn = generators.sample_text(decoder, prompt, prefs, None, 24)
            reached = generators.sampling_logits(forward, null, cfg)
        gap, noise = ((a.double() - b.double()).square().mean().sqrt().item()
                      for a, b in ((torch.stack(steps, 1), forward), (forward, exact)))
        check.add("decoding step = forward pass, in bf16", gap < 1.5 * noise, gap=gap, rounding=noise, logits=exact.std().item())
        free = generators.sampling_logits(forward, null, cfg)
        check.add("autocast leaves the choice of a token alone", reached.dtype == free.dtype == torch.float32 and
                  torch.equal(reached, free))
        z, v = torch.randn(2, 8, 4, 8, 8, device=check.device)
        with check.half():
            mean, std = generators.ddim_step(z, v, 0.7, 0.4, 1.0)
        same = all(map(torch.equal, (mean, std), generators.ddim_step(z, v, 0.7, 0.4, 1.0)))
        check.add("autocast leaves the step of DDIM alone", same and mean.dtype == torch.float32)
    with check.half():
        log_prob = generators.text_log_prob(decoder(drawn, prompt, prefs), null[:, :drawn.shape[1]], drawn, cfg)
    check.add("log-probabilities: fp32, finite", log_prob.dtype == torch.float32 and bool(log_prob.isfinite().all()))


# ---- waits ---------------------------------------------------------------------------------------

class Captured(Exception):
    """train.fit has been called."""


def step_of(run: train.Run, optimizer, losses, after=lambda step: None, **_):
    """One step as train.fit makes it where it neither logs nor saves."""
    loss = losses(run.generator(run.stage, 0))["loss"]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=params)
    norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    nn.utils.clip_grads_with_norm_(params, 1.0, norm)
    optimizer.step()
    after(0)


def steps_of(run: train.Run):
    """(stage, its training step, how many it takes) one after another, each to be used before the next: what train.py's stage
    hands to train.fit is caught, so that nothing of it is written twice."""
    signature, found = inspect.signature(train.fit), {}

    def fit(*args, **kwargs):
        found.update(signature.bind(*args, **kwargs).arguments)
        raise Captured
    for stage, function in train.STAGES.items():
        if stage in ("evaluation", "report"):
            continue
        found.clear()
        run.stage, run.step, run.optimizer_state = stage, 0, None
        with mock.patch.object(train, "fit", fit), mock.patch.object(train, "watch", lambda run: None):
            with contextlib.suppress(Captured):
                function(run)
        if found:
            yield stage, functools.partial(step_of, **found), found["steps"]


def our_line() -> str | None:
    """file.py:line function of our code that is running; None within torch's optimizers and backward pass."""
    frame = sys._getframe()
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.parent.name == "optim":
            return None
        if path.parent == ROOT:
            return f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return None


class Looks(TorchDispatchMode):
    """On the CPU: counts looks at numbers of a tensor, for which a GPU would be waited for, by line; not in optimizers, whose
    counters are the host's, nor at the flag of sample_text, which is in the host's memory on a GPU, too."""
    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "multinomial")

    def __init__(self, lines: Counter):
        super().__init__()
        self.lines = lines

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masked = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if (name in self.NAMES or masked) and (line := our_line()) and not line.endswith(" sample_text"):
            self.lines[line] += 1
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def waits(cuda: bool):
    """Counts, by line, what the host waits for within the block."""
    lines = Counter()

    def note(message, *_, **__):
        if "synchroniz" in str(message):
            lines[our_line() or "torch"] += 1
    if not cuda:
        with Looks(lines):
            yield lines
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            yield lines
    finally:
        torch.cuda.set_sync_debug_mode("default")


def host_waits(check: Checks):
    """A training step waits for nothing; a sampler for nothing, either."""
    run = check.open("steps", FEW)
    for stage, step, _ in steps_of(run):
        step()                          # what is made once
        with waits(check.cuda) as lines:
            step()
        check.add(f"a step of {stage}", not lines, waits=dict(lines) or None)
    model, n = run.model, 32
    prompt, prefs = run.prompt[:1].expand(n, -1), {m: k[:1].expand(n, -1) for m, k in run.model.user_tokens(run.users).items()}
    samplers = {"texts": lambda g: model.sample_tokens(prompt, prefs["text"], g),
                "latents": lambda g: generators.sample_latents(model.image, prompt, prefs["image"], g),
                "pairs": lambda g: model.sample_pairs(prompt, prefs, g),
                "the best of pairs": lambda g: model.sample_pairs(prompt, prefs, g, 4)}
    for name, sampler in samplers.items():
        generator = run.generator(name)
        sampler(generator)
        with waits(check.cuda) as lines:
            sampler(generator)
        check.add(f"sampling {name}", not lines, waits=dict(lines) or None)


# ---- whole runs ----------------------------------------------------------------------------------

def finish(run: train.Run) -> dict:
    """Train, evaluate, report: metrics.json."""
    train.train_all(run)
    train.finish(run)
    return json.loads((run.out / "metrics.json").read_text())


def overlap(a: dict, b: dict) -> float:
    """Share of the measures of generation whose 95 % intervals in two metrics.json overlap."""
    pairs = [(x, b["generation"][variant][name]) for variant, of in a["generation"].items() for name, x in of.items()]
    known = [(x, y) for x, y in pairs if None not in (*x.values(), *y.values())]
    return sum(x["low"] <= y["high"] + 1e-9 and y["low"] <= x["high"] + 1e-9 for x, y in known) / len(known)


def runs(check: Checks):
    """Three runs of --smoke: undisturbed, stopped here and gone on with, begun on the CPU and gone on with here."""
    with waits(True) if check.cuda else contextlib.nullcontext(Counter()) as lines:     # to count them on a CPU changes bits
        here = finish(check.open("here", ["--smoke"]))
    check.add("--smoke, all that waits", None, lines=dict(lines.most_common()) or None)
    there = finish(check.open("there", ["--smoke"], "cpu")) if check.cuda else here
    check.add("--smoke, against the CPU's", (share := overlap(here, there)) >= 0.9, intervals_overlap=share)
    for name, device, whole in (("gone on with here", check.device, here), ("begun on the CPU", "cpu", there)):
        if name == "gone on with here" or check.cuda:       # else both are the same
            run = check.open(name, ["--smoke"], device)
            train.train_all(run, list(train.STAGES)[:6])
            metrics = finish(check.open(name, []))
            wrong = differences(check.folder / ("here" if whole is here else "there"), check.folder / name)
            share = overlap(metrics, whole)
            check.add(f"--smoke, {name}", share >= 0.9 if check.cuda else not wrong, intervals_overlap=share, differ=wrong[:5])


def count(step) -> tuple[float, int, int]:
    """FLOPs, kernels, and bytes kept for the backward pass of a step."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x
        return x
    with FlopCounterMode(display=False) as flops, Operations() as operations:
        # torch would count a sparse product as if it were dense
        with mock.patch.dict(gnn._PRODUCT, {"cuda": gnn._index_add_product}):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                step()
    return flops.get_total_flops(), operations.kernels, sum(x.untyped_storage().nbytes() for x in kept.values())


def rates(check: Checks) -> dict[torch.dtype, float]:
    """FLOP/s of a large product on this device."""
    n = 8192 if check.cuda else 512
    products = {dtype: torch.ones(n, n, device=check.device, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    return {dtype: 2 * n**3 / check.seconds(lambda a=a: a @ a) for dtype, a in products.items()}


def published() -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """What the CPU reached, by results.json: {measure after the reward: (lowest, highest)} and {stage: seconds}."""
    runs = json.loads((ROOT / "tests" / "results.json").read_text(encoding="utf-8"))["stickers"]
    found = {}
    for name in runs[0]["generation"]["after_reward"]:
        values = [run["generation"]["after_reward"][name]["mean"] for run in runs]
        found[name] = min(values), max(values)
    return found, {stage: min(run["cpu_seconds"][stage] for run in runs) for stage in runs[0]["cpu_seconds"]}


def work(check: Checks, run: train.Run, peaks: dict, cpu: dict[str, float]):
    """A row a stage: seconds, steps, and what a step is made of."""
    rate = rates(check)
    for stage, step, n in steps_of(run):
        step()          # the first one also makes the optimizer's state
        flops, kernels, _ = count(step)
        fast = rate[torch.float32 if stage in ("gnn", "codebook", "scorer", "judge", "referee") else torch.bfloat16]
        seconds = run.seconds[stage][0]
        ok = seconds <= cpu[stage] if check.cuda and stage in cpu else None
        check.add(f"stickers, {stage}", ok, s=seconds, cpu_s=cpu.get(stage), steps=n, kernels=kernels, gflop=flops / 1e9,
                  share_of_rate=flops * n / seconds / fast, launches_s=n * kernels * LAUNCH, peak_gb=peaks.get(stage))


def whole(check: Checks):
    """The default run, stage by stage; MovieLens-1M's size; twenty steps of each stage with large generators."""
    bars, cpu = published()
    for name, arguments in (("stickers", ["--seed", "0"]), ("MovieLens-1M's size", MOVIELENS)):
        if time.monotonic() - check.start > LIMIT / 2 and name != "stickers":
            check.add(name, None, left_out="too little time is left")
            continue
        start, peaks = time.monotonic(), {}
        run = check.open(name, arguments)
        for stage in train.STAGES:
            if check.cuda:
                torch.cuda.reset_peak_memory_stats()
            train.train_all(run, [stage])
            if check.cuda:
                peaks[stage] = torch.cuda.max_memory_allocated() / 1e9
        metrics, seconds = finish(run), time.monotonic() - start
        check.add(f"{name}, all", seconds <= TARGET[f"{name}, all"] if check.cuda else None, s=seconds)
        check.add(f"{name}, memory", max(peaks.values()) <= TARGET["memory, GB"] if peaks else None, gb=max(peaks.values(), default=None))
        if name == "stickers":
            training = sum(run.seconds[stage][0] for stage in train.STAGES if stage not in ("evaluation", "report"))
            check.add("stickers, training", training <= TARGET["stickers, training"] if check.cuda else None, s=training)
            found = metrics["generation"]["after_reward"]
            both = [(n, found[n], bar) for n, bar in bars.items() if n in found]
            off = [n for n, x, (low, high) in both if not (x["low"] <= high and low <= x["high"])]
            check.add("stickers, quality as on the CPU", None if check.quick else not off, outside=f"{len(off)} {off[:5]}")
            work(check, run, peaks, cpu)
    run = check.open("large", FEW + LARGE)
    for m in dppmg.MODALITIES:
        check.add(f"large, {m} generator", None, million_parameters=sum(p.numel() for p in getattr(run.model, m).parameters()) / 1e6)
    for stage, step, _ in steps_of(run):
        n = 2 if check.quick else 20
        check.add(f"large, {n} steps of {stage}", None, s=check.seconds(lambda: [step() for _ in range(n)], 1))


# ---- where time goes -----------------------------------------------------------------------------

@contextlib.contextmanager
def cast_once(*networks: nn.Module):
    """Within it, frozen weights are bf16: autocast casts them anew in each of the reward's blocks. An exercise: on a CPU it
    gains nothing."""
    layers = [layer for net in networks for layer in net.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    weights = [p for layer in layers for p in layer.parameters()]
    full = [p.data for p in weights]
    for p in weights:
        p.data = p.data.bfloat16()
    try:
        yield
    finally:
        for p, x in zip(weights, full):
            p.data = x


def explain(check: Checks, name: str, step):
    """A profile of one step: its kernels, how long the device is busy, and what with."""
    step()
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * check.cuda
    seconds = check.seconds(step)
    with torch.profiler.profile(activities=kinds) as profile:
        step()
        if check.cuda:
            torch.cuda.synchronize()
    own = "self_device_time_total" if check.cuda else "self_cpu_time_total"
    by_time = sorted(profile.key_averages(), key=lambda e: -getattr(e, own))[:8]
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.time_range.elapsed_us() for e in kernels) / 1e6 / seconds if check.cuda else None
    check.add(name, None, ms=1e3 * seconds, kernels=len(kernels) or count(step)[1], device_busy=busy)
    for e in by_time:
        check.add(f"  {e.key[:38]}", None, ms=getattr(e, own) / 1e3, calls=e.count)


def profile(check: Checks):
    """Two steps explained; then what it would gain to cast frozen weights once, and to compile the denoiser."""
    run = check.open("profile", [*FEW, "--users", "200"])
    for stage, step, _ in steps_of(run):
        if stage in ("codebook", "reward"):
            explain(check, f"a step of {stage}", step)
        if stage == "reward":
            with run.model.half():
                half = torch.is_autocast_enabled(check.device.type)
            with cast_once(*[run.model.image, run.model.text, run.model.autoencoder] * half):
                check.add("reward, frozen weights cast once", None, ms=1e3 * check.seconds(step), kernels=count(step)[1])
        if stage == "image":
            check.add("a step of image", None, ms=1e3 * check.seconds(step))
            options = {"mode": "reduce-overhead"} if check.cuda else {"backend": "eager"}
            try:
                with mock.patch.object(run.model.image, "forward", torch.compile(run.model.image.forward, **options)):
                    check.add("a step of image, compiled", None, ms=1e3 * check.seconds(step), **options)
            except Exception as error:      # what compilers raise is theirs to choose
                check.add("a step of image, compiled", None, error=str(error).split("\n")[0][:80])
            finally:
                torch._dynamo.reset()


GROUPS = {"products": products, "sampling": sampling, "waits": host_waits, "runs": runs, "whole": whole, "profile": profile}


def main(arguments: list[str] | None = None) -> int:
    """Command line: the number of checks that failed."""
    parser = argparse.ArgumentParser(description="Is the program right and fast on a GPU?")
    parser.add_argument("groups", nargs="*", help=f"some of {', '.join(GROUPS)} (all)")
    parser.add_argument("--out", type=Path, default=Path("check_gpu.json"), help="the JSON (%(default)s)")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--quick", action=argparse.BooleanOptionalAction, help="small sizes (only on the CPU)")
    args = parser.parse_args(arguments)
    device = dppmg.pick_device(args.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"no GPU here but {device}: its seconds are no GPU's"
    print(f"torch {torch.__version__}, {card}")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        check = Checks(device, device.type != "cuda" if args.quick is None else args.quick, Path(folder))
        for check.group in args.groups or GROUPS:
            try:
                with mock.patch.object(train, "say", lambda line: None):
                    GROUPS[check.group](check)
            except Exception as error:      # the other groups go on
                where = traceback.extract_tb(error.__traceback__)[-1]
                check.add("stopped", False, error=f"{type(error).__name__}: {error}"[:200], at=f"{where.filename}:{where.lineno}")
    failed = sum(row["ok"] is False for row in check.rows)
    seconds = time.monotonic() - check.start
    found = {"card": card, "machine": train.machine(device), "seconds": seconds, "failed": failed, "targets": TARGET, "rows": check.rows}
    args.out.write_text(json.dumps(found, indent=1, default=str), encoding="utf-8")
    print(f"{failed} of {len(check.rows)} failed, {seconds:.0f} s; {args.out}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
