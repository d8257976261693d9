"""How long would it take on one GPU?  From counted FLOPs and bytes (not collected by pytest): python tests/count_flops.py

Matrix products and convolutions are counted by torch on the meta device, forward and backward, and so are the kernels; the
sparse products and the optimizers by the bytes that they move. A step takes FLOPs / (rate x share) + bytes / bandwidth, or
its kernels' launches where that is more. --check holds the counts against seconds measured here."""
import argparse
import math
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from dppmg import DPPMG, Catalogue, Config  # noqa: E402
from generators import Tokenizer  # noqa: E402

# assumed of the GPU
BF16, FP32 = 312e12, 19.5e12    # FLOP/s: image networks and decoder; graph, codebook and scorer
SHARE = 0.1                     # of these reached: the networks are small
BANDWIDTH = 1.5e12              # bytes/s reached of its memory's 2e12
LAUNCH = 5e-6                   # seconds a kernel, if it is not waited for
# users, items, training interactions (0.8 of all)
DATA = {"stickers": (600, 2_000, 14_400), "MovieLens-1M": (6_040, 3_700, 800_000), "10 M interactions": (200_000, 50_000, 8_000_000)}


def model_of(n_users: int, n_items: int, device: str = "meta") -> DPPMG:
    """The default model; a graph of a few edges (its product is counted by hand)."""
    torch.manual_seed(0)
    few = torch.arange(64)
    catalogue = Catalogue("x", [""] * n_users, [""] * n_items, [f"w{n}" for n in range(20)], 3, 24, Tokenizer([]).state(), few, few)
    return DPPMG(Config(), catalogue).to(device)


def steps_of(model: DPPMG, device: str) -> dict:
    """name -> one training step's loss, as train.py makes it, and of how many samples it is."""
    cfg = model.cfg

    def ids(*shape):
        return torch.ones(shape, dtype=torch.int64, device=device)

    def like(n):
        return torch.randn(n, cfg.image.latent, 8, 8, device=device)
    pictures = torch.randn(cfg.image.batch, 3, 32, 32, device=device)
    b, s, g = cfg.text.batch, cfg.reward.scorer_batch, cfg.reward
    levels = cfg.vq.levels
    tables = {m: getattr(model, m).preference.weight.detach() for m in ("image", "text")}
    triplet = [ids(cfg.gnn.batch) for _ in range(3)]
    return {
        "autoencoder": (lambda: model.autoencoder.loss(pictures, 0.1), model.autoencoder),
        "gnn": (lambda: model.gnn.loss(model.graph, *triplet), model.gnn),
        "codebook": (lambda: sum(q(torch.randn(cfg.vq.batch, cfg.gnn.dim, device=device)).loss
                                 for q in model.quantizer.values()), model.quantizer),
        "text": (lambda: model.text.loss(ids(b, 24), ids(b, 3), ids(b, levels)), model.text),
        "image": (lambda: model.image.loss(like(cfg.image.batch), ids(cfg.image.batch, 3), ids(cfg.image.batch, levels)), model.image),
        "scorer": (lambda: model.scorer.loss(torch.randn(s, 3, 32, 32, device=device), ids(s, 24), ids(s, 3)), model.scorer),
        "reward": (lambda: model.reinforce_step(ids(g.groups), ids(g.groups, 3), tables, False, None).loss, None)}


def step(loss_of, module) -> None:
    """Forward and backward."""
    loss_of().backward()
    if module:
        module.zero_grad()


class Kernels(TorchDispatchMode):
    """Counts operations that are no views: a kernel each."""
    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += not function.is_view
        return function(*args, **(kwargs or {}))


def count(loss_of, module) -> tuple[float, int, int]:
    """FLOPs, kernels, and bytes kept for the backward pass (in fp32; half of it in bf16) of a step.
    Have all texts ended? On the meta device nobody knows: they are taken to be as long as they may be."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x
        return x
    still_going = mock.patch.object(torch.Tensor, "__bool__", lambda _: False)
    with still_going, FlopCounterMode(display=False) as flops, Kernels() as kernels, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        step(loss_of, module)
    return flops.get_total_flops(), kernels.n, sum(x.untyped_storage().nbytes() for x in kept.values())


def sparse_bytes(n_users: int, n_items: int, n_edges: int, cfg) -> float:
    """What one step's sparse products move: L forward and L backward, both modalities side by side; each reads, for 2E entries,
    an index, a weight and (in the worst case, without any cache) a row of 2 D floats, and writes N rows."""
    row = 4 * 2 * cfg.dim
    return 2 * cfg.layers * (2 * n_edges * (4 + 4 + row) + (n_users + n_items) * row)


def matmul_rate() -> float:
    """FLOP/s of a large fp32 product here, the best of several."""
    a, best = torch.randn(1024, 1024), math.inf
    for _ in range(8):
        start = time.process_time()
        a @ a
        best = min(best, time.process_time() - start)
    return 2 * 1024**3 / best


def check():
    """Counted FLOPs over measured CPU seconds of a step, beside the rate of a large product; and the sparse product's bytes."""
    torch.set_num_threads(1)
    model, rate = model_of(600, 2000, "cpu"), matmul_rate()
    object.__setattr__(model.cfg.method, "bf16", 0)                          # fp32 throughout: one rate to compare with
    print(f"a 1024^3 product in fp32, one thread: {rate / 1e9:.0f} GFLOP/s")
    for name, (loss_of, module) in steps_of(model, "cpu").items():
        best = math.inf
        for _ in range(4):
            start = time.process_time()
            step(loss_of, module)
            best = min(best, time.process_time() - start)
        flops = count(loss_of, module)[0]
        print(f"{name:12} {flops / 1e9:8.2f} GFLOP counted, {best:7.3f} s measured, {flops / best / 1e9:6.1f} GFLOP/s = "
              f"{100 * flops / best / rate:3.0f} %")
    import bench_gnn
    import gnn
    for users, items, edges in list(DATA.values())[:2]:
        graph, x = bench_gnn.random_graph(edges, users, items), torch.randn(users + items, 2 * model.cfg.gnn.dim)
        moved = sparse_bytes(users, items, len(graph.col) // 2, model.cfg.gnn) / 2 / model.cfg.gnn.layers
        y = torch.empty(len(graph.col), x.shape[1])
        best = {}
        for what, function in (("product", lambda: gnn.spmm(graph, x)), ("gather", lambda: torch.index_select(x, 0, graph.col, out=y))):
            best[what] = math.inf
            for _ in range(5):
                start = time.process_time()
                function()
                best[what] = min(best[what], time.process_time() - start)
        print(f"sparse product of {edges:,} interactions: {moved / 1e6:.0f} MB counted, {best['product']:.4f} s = "
              f"{moved / best['product'] / 1e9:.1f} GB/s; the gather of its rows alone {best['gather']:.4f} s")


OF = {"autoencoder": "autoencoder", "gnn": "gnn", "codebook": "quantizer", "text": "text", "image": "image", "scorer": "scorer"}


def plan():
    """The tables of the README."""
    cfg, base = Config(), DATA["stickers"]
    for name, (users, items, edges) in DATA.items():
        model = model_of(users, items)
        n_users, n_items, n_edges = users / base[0], items / base[1], edges / base[2]     # each is seen as often as on stickers
        steps = {"autoencoder": cfg.image.ae_steps * n_items, "gnn": cfg.gnn.steps * n_edges, "codebook": cfg.vq.steps * n_users,
                 "text": cfg.text.steps * n_edges, "image": cfg.image.steps * n_edges,
                 "scorer": 2 * cfg.reward.scorer_steps * n_items, "reward": cfg.reward.rounds * n_users}
        total, most, lines = 0.0, 0, []
        for stage, n in steps.items():
            flops, kernels, kept = count(*steps_of(model, "meta")[stage])
            trained = sum(p.numel() for p in getattr(model, OF[stage]).parameters()) if stage in OF else 0
            moved = 4 * 7 * trained + (sparse_bytes(users, items, edges, cfg.gnn) if stage == "gnn" else 0)     # Adam: 4 reads, 3 writes
            rate = (FP32 if stage in ("gnn", "codebook", "scorer") else BF16) * SHARE
            seconds, launches = flops / rate + moved / BANDWIDTH, kernels * LAUNCH
            total, most = total + n * max(seconds, launches), max(most, kept + 16 * trained)
            lines.append(f"    {stage:12} {flops / 1e9:7.1f} GFLOP {moved / 1e6:8.1f} MB {kernels:6,} kernels: work {1e3 * seconds:6.2f} ms, "
                         f"launches {1e3 * launches:6.2f} ms, x {n:9,.0f} = {n * max(seconds, launches):7,.0f} s; keeps {kept / 2**20:6,.0f} MiB")
        state = sum(x.numel() * x.element_size() for x in model.state_dict().values())
        data = items * (3 * 32 * 32 + 4 * 4 * 64) + edges * (2 * 8 + 8 + 16)       # pictures, latents; CSR both ways, keys, pairs
        print(f"{name}: {users:,} users, {items:,} items, {edges:,} interactions: {total / 60:,.1f} min, {(state + data + most) / 2**30:.2f} GiB = "
              f"model {state / 2**20:,.0f} + data {data / 2**20:,.0f} + largest step {most / 2**20:,.0f} MiB")
        print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How long would it take on one GPU?")
    parser.add_argument("--check", action="store_true", help="hold the counts against seconds measured here")
    check() if parser.parse_args().check else plan()
