"""Seconds of the text generator, beside nanoGPT's GPT if its model.py is given (not collected by pytest).

    OMP_NUM_THREADS=2 python tests/bench_text.py [--nanogpt PATH] [--layers 4] [--width 128] [--length 60]
Best of --repeat turns of half a second at least, so that a busy machine slows both alike and a short job does not meet
another's cache each time. Ours also under bf16 autocast, as train.py computes where the processor has instructions for
it; nanoGPT's too."""

import argparse
import dataclasses
import importlib.util
import random
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
from generators import TextConfig, TextDecoder, Tokenizer, sample_text, text_log_prob  # noqa: E402

BATCH, BLOCK, VOCAB = 64, 64, 512


def our_jobs(layers: int, width: int, length: int) -> dict:
    """name -> function to time; 4 prompt words and 4 preference tokens stand before the text."""
    cfg = TextConfig(layers=layers, width=width, context=max(BLOCK, length), vocab_size=VOCAB)
    decoder = TextDecoder(cfg, n_words=20, levels=4, codes=64)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, fused=True)
    tokens, prompt = torch.randint(3, VOCAB, (BATCH, BLOCK)), torch.randint(1, 21, (BATCH, 4))
    prefs, generator = torch.randint(64, (BATCH, 4)), torch.Generator().manual_seed(0)

    def train():
        optimizer.zero_grad()
        decoder.loss(tokens, prompt, prefs).backward()
        optimizer.step()

    def sample(guidance: float, top_p: float):
        def job():
            decoder.cfg = dataclasses.replace(cfg, guidance=guidance, top_p=top_p)
            sample_text(decoder, prompt, prefs, generator, length)
        return job

    def policy_gradient():
        decoder.requires_grad_(False).preference.requires_grad_(True)
        cond = decoder(tokens, prompt, prefs)
        with torch.no_grad():
            null = decoder(tokens, prompt, torch.full_like(prefs, -1))
        text_log_prob(cond, null, tokens, cfg).sum().backward()
        decoder.requires_grad_(True)

    return {"train step": train, "policy gradient": policy_gradient, "sample": sample(1.0, 1.0),
            "sample, guidance 2": sample(2.0, 1.0), "sample, guidance 2, top-p 0.9": sample(2.0, 0.9)}


def nanogpt_jobs(path: str, layers: int, width: int, length: int) -> dict:
    """The same for nanoGPT's GPT: a text of BLOCK tokens, no prefix, no guidance."""
    spec = importlib.util.spec_from_file_location("nanogpt", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = module
    spec.loader.exec_module(module)
    model = module.GPT(module.GPTConfig(block_size=max(BLOCK, length), vocab_size=VOCAB, n_layer=layers,
                                        n_head=4, n_embd=width))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens, targets = torch.randint(3, VOCAB, (2, BATCH, BLOCK))

    def train():
        optimizer.zero_grad()
        model(tokens, targets)[1].backward()
        optimizer.step()

    return {"nanoGPT train step": train, "nanoGPT sample": lambda: model.generate(tokens[:, :1], length)}


def tokenizer_jobs() -> dict:
    """BPE on 2,000 made-up texts of about 70 characters, 5,000 different words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))) for _ in range(5000)]
    texts = [" ".join(rng.choices(words, k=10)) for _ in range(2000)]
    tokenizer = Tokenizer.train(texts, 512)
    return {"BPE train, 2,000 texts, vocabulary 512": lambda: Tokenizer.train(texts, 512),
            "BPE encode, 2,000 texts": lambda: Tokenizer(list(tokenizer.merges)).encode_batch(texts, 48)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", metavar="PATH", help="nanoGPT's model.py")
    for name, default in (("layers", 4), ("width", 128), ("length", 60), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    jobs = our_jobs(args.layers, args.width, args.length)
    if args.nanogpt:
        jobs |= nanogpt_jobs(args.nanogpt, args.layers, args.width, args.length)
    jobs |= {f"{name}, bf16": torch.autocast("cpu", torch.bfloat16)(job) for name, job in jobs.items()}
    jobs |= tokenizer_jobs()
    wall, cpu = ({name: float("inf") for name in jobs} for _ in range(2))
    for _ in range(args.repeat):
        for name, job in jobs.items():
            turn = time.perf_counter() + 0.5
            while time.perf_counter() < turn:
                begin, begin_cpu = time.perf_counter(), time.process_time()
                job()
                wall[name] = min(wall[name], time.perf_counter() - begin)
                cpu[name] = min(cpu[name], time.process_time() - begin_cpu)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {args.layers} layers, width "
          f"{args.width}, {BATCH} texts, {args.length} tokens sampled, {BLOCK} trained")
    for name in jobs:
        print(f"{name:45s} {wall[name] * 1e3:9.1f} ms wall {cpu[name] * 1e3:9.1f} ms CPU")
    if args.nanogpt:
        for name in ("train step", "sample"):
            for ours, theirs in (("", ""), (", bf16", ""), (", bf16", ", bf16")):
                clock, busy = (best[f"nanoGPT {name}{theirs}"] / best[name + ours] for best in (wall, cpu))
                print(f"{name}{ours}: {clock:.1f} times the speed of nanoGPT{theirs} by the clock, {busy:.1f} by CPU time")


if __name__ == "__main__":
    main()
