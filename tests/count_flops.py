"""How long would it take on one GPU?  From counted FLOPs, kernels and bytes (not collected by pytest): python tests/count_flops.py

A step of each stage, as train.py makes it with default settings, runs once on the CPU: matrix products and convolutions are
counted by torch, and so are the kernels; the sparse products and the optimizers by the bytes that they move. A step takes
FLOPs / (rate x share) + bytes / bandwidth, or its kernels' launches where that is more; the number of steps grows with the
data, so that each user, item or interaction is seen as often as on stickers. Estimates: check_gpu.py measures."""
import functools
import tempfile
from pathlib import Path
from unittest import mock

import torch
from check_gpu import LAUNCH, Checks, count, steps_of

# assumed of the GPU
BF16, FP32 = 312e12, 19.5e12    # FLOP/s: image networks and decoder; graph, codebook and scorer
SHARE = 0.1                     # of these reached: the networks are small
BANDWIDTH = 1.5e12              # bytes/s reached of its memory's 2e12
# users, items, training interactions (0.8 of all)
DATA = {"stickers": (600, 2_000, 14_400), "MovieLens-1M": (6_040, 3_700, 800_000), "10 M interactions": (200_000, 50_000, 8_000_000)}
GROWS = {"autoencoder": 1, "scorer": 1, "judge": 1, "codebook": 0, "reward": 0}       # steps: by users (0), items (1), else interactions
IN_FP32 = ("gnn", "codebook", "scorer", "judge", "referee")


def sparse_bytes(n_users: int, n_items: int, n_edges: int, cfg) -> float:
    """What one step's sparse products move: L forward and L backward, both modalities side by side; each reads, for 2E entries,
    an index, a weight and (in the worst case, without any cache) a row of 2 D floats, and writes N rows."""
    row = 4 * 2 * cfg.dim
    return 2 * cfg.layers * (2 * n_edges * (4 + 4 + row) + (n_users + n_items) * row)


def main():
    """The tables of RESULTS.md."""
    counted, trained = {}, {}
    as_on_a_gpu = mock.patch.object(torch.optim, "Adam", functools.partial(torch.optim.Adam, foreach=True))
    with tempfile.TemporaryDirectory() as folder, as_on_a_gpu:
        run = Checks(torch.device("cpu"), False, Path(folder)).open("stickers", ["--referee-pictures", "256"])
        for stage, step, n in steps_of(run):
            step()      # the first one also makes the optimizer's state
            counted[stage] = n, *count(step)
            trained[stage] = sum(p.numel() for p in run.modules.parameters() if p.grad is not None)
            run.modules.zero_grad(set_to_none=True)
        model = sum(x.nbytes for x in run.modules.state_dict().values())
    for name, sizes in DATA.items():
        total, most, lines = 0.0, 0, []
        for stage, (n, flops, kernels, kept) in counted.items():
            by = GROWS.get(stage, 2)
            nodes = sum(sizes[:2]) / sum(DATA["stickers"][:2]) if stage == "gnn" else 1     # its step is as large as the graph
            flops, kept, n_weights = flops * nodes, kept * nodes, trained[stage] * nodes
            n = n if stage == "referee" else n * sizes[by] / DATA["stickers"][by]
            moved = 4 * 7 * n_weights + (sparse_bytes(*sizes, run.cfg.gnn) if stage == "gnn" else 0)      # Adam: 4 reads, 3 writes
            work, launches = flops / (SHARE * (FP32 if stage in IN_FP32 else BF16)) + moved / BANDWIDTH, kernels * LAUNCH
            total, most = total + n * max(work, launches), max(most, kept + 16 * n_weights)
            lines.append(f"    {stage:12}{flops / 1e9:8.1f} GFLOP {moved / 1e6:9.1f} MB {kernels:6,} kernels: work {1e3 * work:6.2f} ms, launches "
                         f"{1e3 * launches:6.2f} ms, x {n:9,.0f} = {n * max(work, launches):7,.1f} s; keeps {kept / 2**20:6,.0f} MiB")
        # pictures, latents, features; embeddings, preferences, tokens; CSR both ways, keys, pairs
        data = sizes[1] * (3 * 32 * 32 + 4 * 4 * 64 + 8 * 64) + sizes[0] * (16 * 64 + 64) + sizes[2] * (2 * 8 + 8 + 16)
        print(f"{name}: training {total / 60:,.1f} min; {(model + data + most) / 2**30:.2f} GiB = networks {model / 2**20:,.0f} + data "
              f"{data / 2**20:,.0f} + largest step {most / 2**20:,.0f} MiB")
        print("\n".join(lines))


if __name__ == "__main__":
    main()
