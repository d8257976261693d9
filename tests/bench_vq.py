"""Seconds of the quantizer, and of vector-quantize-pytorch where that is installed, side by side.

    python tests/bench_vq.py            N = 65,536 rows, K = 1024 codes, D = 64 wide, 4 levels

nearest_code: one level.  look-up: all levels.  EMA step: look-up and update of all levels.
Best of three."""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vq import ResidualVQVAE, VQConfig, nearest_code  # noqa: E402

N, K, D, LEVELS = 65_536, 1024, 64, 4


def seconds(run, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def ours(x: torch.Tensor, generator: torch.Generator) -> dict[str, float]:
    model = ResidualVQVAE(D, VQConfig(levels=LEVELS, codes=K, dim=D))

    def step():
        model.update_codebooks(x, model.quantize(x).codes, generator)
    return {"nearest_code": seconds(lambda: nearest_code(x, model.codebooks[0].codebook)),
            "look-up": seconds(lambda: model.quantize(x)),
            "EMA step": seconds(step)}


def theirs(x: torch.Tensor) -> dict[str, float]:
    from vector_quantize_pytorch import ResidualVQ
    model = ResidualVQ(
        dim=D, num_quantizers=LEVELS, codebook_size=K, decay=0.99, threshold_ema_dead_code=1)
    one = model.layers[0]
    with torch.no_grad():
        model.eval()
        times = {"nearest_code": seconds(lambda: one(x[None]))}
        times["look-up"] = seconds(lambda: model(x[None]))
        model.train()
        times["EMA step"] = seconds(lambda: model(x[None]))
        return times


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(N, D)
    mine = ours(x, torch.Generator().manual_seed(0))
    try:
        peer = theirs(x)
    except ImportError:
        peer = {}
    print(f"N={N:,} K={K} D={D} levels={LEVELS}, {torch.get_num_threads()} threads, seconds")
    print(f"{'':14}{'vq.py':>8}{'vector-quantize-pytorch':>26}{'times':>8}")
    for name, taken in mine.items():
        other = f"{'not installed':>26}"
        if peer:
            other = f"{peer[name]:26.3f}{peer[name] / taken:8.1f}"
        print(f"{name:14}{taken:8.3f}{other}")


if __name__ == "__main__":
    main()
