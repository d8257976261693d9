"""Seconds of the image generator, beside diffusers' U-Net where that is installed (not collected by pytest).

    OMP_NUM_THREADS=2 python tests/bench_image.py [--widths 64 96] [--steps 16] [--repeat 5] [--run RUN]
64 latents 8x8x4, 5 condition tokens (1 prompt word, 4 preference tokens), guided. The best of --repeat
runs, taken in turn so that a busy machine slows all alike. Width 80 and the U-Net: 2 M parameters each. Both
also under bf16 autocast, as train.py computes where the processor has instructions for it. Only ours also with
guidance for the first half of the time, as train.py samples. --run: also 64 pictures with their texts by a
finished run's model, and the time to load it."""

import argparse
import dataclasses
import importlib.util
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent))
from dppmg import DPPMG  # noqa: E402
from generators import Autoencoder, Denoiser, ImageConfig, sample_latents  # noqa: E402
from train import ema_update  # noqa: E402

BATCH = 64


def parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def train_step(network, loss):
    """A function that makes one optimizer step on loss()."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return step


def our_jobs(width: int, steps: int) -> dict:
    """name -> function to time."""
    cfg = ImageConfig(width=width)
    net, average = (Denoiser(cfg, n_words=20, levels=4, codes=64) for _ in range(2))
    z, prompt = torch.randn(BATCH, 4, 8, 8), torch.randint(1, 21, (BATCH, 1))
    prefs, generator = torch.randint(64, (BATCH, 4)), torch.Generator().manual_seed(0)
    step = train_step(net, lambda: net.loss(z, prompt, prefs, generator))
    ours = f"width {width}, {parameters(net) / 1e6:.2f} M"

    def sample(until: float):
        def job():
            net.cfg = dataclasses.replace(cfg, guidance_until=until)
            sample_latents(net, prompt, prefs, generator, steps)
        return job

    return {f"{ours}: train step": lambda: (step(), ema_update(average, net, 0.998, 10 ** 6)),
            f"{ours}: sample": sample(0.0),
            f"{ours}, guided until {cfg.guidance_until}: sample": sample(cfg.guidance_until)}


def autoencoder_jobs() -> dict:
    """Training step and decoding of 64 pictures 32x32."""
    cfg = ImageConfig()
    net, generator = Autoencoder(cfg), torch.Generator().manual_seed(0)
    x, z = torch.rand(BATCH, 3, 32, 32, generator=generator), torch.randn(BATCH, 4, 8, 8)
    ours = f"autoencoder, {parameters(net) / 1e6:.2f} M"
    return {f"{ours}: train step": train_step(net, lambda: net.loss(x, cfg.kl, generator)),
            f"{ours}: decode": torch.no_grad()(lambda: net.decode(z))}


def diffusers_jobs(steps: int) -> dict:
    """The same for the library's conditional U-Net: two resolutions, attention at the lower, v-prediction."""
    from diffusers import DDIMScheduler, UNet2DConditionModel
    net = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(56, 88), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=8, norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=64)
    schedule = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    table, null = torch.nn.Embedding(276, 64), torch.randn(BATCH, 5, 64)
    z, condition = torch.randn(BATCH, 4, 8, 8), torch.randint(276, (BATCH, 5))

    def loss():
        t, eps = torch.randint(1000, (BATCH,)), torch.randn_like(z)
        v = net(schedule.add_noise(z, eps, t), t, table(condition)).sample
        return F.mse_loss(v, schedule.get_velocity(z, eps, t))

    @torch.no_grad()
    def sample():
        schedule.set_timesteps(steps)
        x, both = torch.randn_like(z), torch.cat([table(condition), null])
        for t in schedule.timesteps:
            v, v_null = net(torch.cat([x, x]), t, both).sample.chunk(2)
            x = schedule.step(torch.lerp(v_null, v, 2.0), t, x, eta=1.0).prev_sample
    peer = f"diffusers, {parameters(net) / 1e6:.2f} M"
    return {f"{peer}: train step": train_step(net, loss), f"{peer}: sample": sample}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 96], help="ImageConfig.width")
    parser.add_argument("--steps", type=int, default=16, help="DDIM steps")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--run", help="folder of a finished run")
    args = parser.parse_args()
    torch.manual_seed(0)
    jobs = {}
    for width in args.widths:
        jobs |= our_jobs(width, args.steps)
    jobs |= autoencoder_jobs()
    if importlib.util.find_spec("diffusers"):
        jobs |= diffusers_jobs(args.steps)
    from_run = {}
    if args.run:
        model = DPPMG.load(args.run)
        prompt, user = model.catalogue.words[0], model.catalogue.user_ids[0]
        from_run = {"a run's model: load": lambda: DPPMG.load(args.run),
                    "a run's model: 64 pictures and texts": lambda: model.generate(prompt, user, n=64)}
    jobs |= {f"{name}, bf16": torch.autocast("cpu", torch.bfloat16)(job) for name, job in jobs.items()} | from_run
    best = {name: (float("inf"), float("inf")) for name in jobs}
    for _ in range(args.repeat):
        for name, job in jobs.items():
            begin, begin_cpu = time.perf_counter(), time.process_time()
            job()
            taken = time.perf_counter() - begin, time.process_time() - begin_cpu
            best[name] = tuple(map(min, best[name], taken))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; batch {BATCH}, {args.steps} steps")
    for name, (wall, cpu) in best.items():
        print(f"{name:45s} {wall * 1e3:8.1f} ms wall {cpu * 1e3:8.1f} ms CPU")
    for name, (wall, cpu) in best.items():
        peer = next((p for p in best if p.startswith("diffusers") and p.endswith(name.split(":")[1])), None)
        if name.startswith("width") and peer:       # fp32 with fp32, bf16 with bf16
            print(f"{name}: {best[peer][0] / wall:.1f} times diffusers' speed by the clock, "
                  f"{best[peer][1] / cpu:.1f} by CPU time")


if __name__ == "__main__":
    main()
