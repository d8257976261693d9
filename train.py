"""Train DPPMG stage by stage, evaluate it on what was held out, and report.

    python train.py                       stickers, the built-in data: written as a folder, then loaded like any other
    python train.py --data DIR            your data (the format: dppmg.py)
    python train.py --smoke               every stage, tiny
    python train.py --resume              go on with the latest unfinished run
    python train.py --study pareto|bits   a question instead of a run

A run leaves config.json, checkpoint.pt, log.csv, metrics.json and report.html in runs/NAME/ (--out). It can be killed at any
time: all randomness is drawn from (seed, stage, step), so a resumed run ends with the same bits.

Shapes: as in dppmg.py; A attributes of a sticker.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import csv
import dataclasses
import hashlib
import html
import io
import json
import math
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

from dppmg import (FORMAT, MODALITIES, TEST, TRAIN, VALID, Catalogue, CheckpointError, Config, Dataset, DPPMG,
                   OneLineParser, parse_prompt, pick_device, read_checkpoint, replacing, table_as, to_picture)
from generators import Denoiser, Tokenizer, ema_update
from gnn import bpr_loss, build_graph, ranking_metrics, sample_negatives, sample_triplets
from reward import (RowAdam, Scorer, disjoint_halves, frechet_distance, interval, judge_consistency, judge_prompt,
                    swap_share, taste)
from vq import codebook_health, explained


@dataclass(frozen=True)
class TrainConfig:
    items: int = 2000             # stickers in the built-in data
    users: int = 600              # users of the built-in data
    interactions: int = 30        # stickers that each of them likes
    referee_pictures: int = 4000  # freshly drawn stickers that the referee learns from
    referee_steps: int = 400      # optimizer steps of the referee
    pairs: int = 600              # (user, prompt) pairs of the test part to evaluate on
    checkpoint_seconds: float = 60.0  # between two checkpoints within a stage

    def __post_init__(self):
        for name, low in (("items", 16), ("users", 4), ("interactions", 10), ("referee_pictures", 16),
                          ("referee_steps", 1), ("pairs", 2), ("checkpoint_seconds", 0)):
            value = getattr(self, name)
            if not math.isfinite(value) or value < low:
                raise ValueError(f"TrainConfig.{name}={value}: need a finite {name} >= {low}")
        if self.interactions > self.items // 2:
            raise ValueError(f"TrainConfig.interactions={self.interactions}: need at most half of items={self.items}")


# ---- stickers: data whose tastes are known -----------------------------------------------------------------

SUBJECTS = ("fish", "house", "tree", "boat", "star", "heart", "moon", "flower")
SETTINGS = ("dawn", "day", "dusk", "night")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
PATTERNS = ("plain", "dots", "stripes")
TONES = (                                   # the verbal attribute: six ways of saying the same
    "a {subject} at {setting}.",
    "hooray, the happiest {subject} of the whole {setting}!",
    "softly the {subject} dreams, wrapped in {setting} light",
    "hereby presented: one {subject}, observed at {setting}.",
    "whoops, a silly {subject} tumbles through the {setting}",
    "behold the {subject}! mighty ruler of {setting}!",
)
ATTRIBUTES = {"subject": SUBJECTS, "setting": SETTINGS, "colour": COLOURS, "pattern": PATTERNS, "tone": TONES}
SHOWS = {"image": ("setting", "colour", "pattern"), "text": ("setting", "tone")}    # and the prompt leaves open
SHARPNESS = {"subject": 1.0, "setting": 1.0, "colour": 2.0, "pattern": 2.0, "tone": 2.0}    # std of log tastes
PAINT = {"red": (214, 40, 40), "orange": (240, 130, 30), "yellow": (250, 215, 50), "green": (50, 150, 60),
         "blue": (40, 90, 215), "purple": (140, 60, 180)}
SKY = {"dawn": ((255, 200, 190), (255, 235, 200)), "day": ((120, 190, 250), (205, 235, 255)),
       "dusk": ((110, 70, 130), (225, 130, 110)), "night": ((10, 14, 45), (30, 40, 90))}      # top, bottom
SIDE, FINE = 32, 4                          # pixels of a sticker; drawn so many times larger, then averaged


def _star() -> list[tuple[float, float]]:
    """Ten corners on two circles."""
    return [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate((1.05, 0.5) * 5)]


def _heart() -> list[tuple[float, float]]:
    """The curve that everybody uses."""
    t = np.linspace(0, 2 * np.pi, 40)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return list(zip(16 * np.sin(t) ** 3 / 17, (-y - 1) / 15))


def _petals() -> list[tuple[str, tuple]]:
    """Five circles around one."""
    angles = np.arange(5) * math.tau / 5 - math.pi / 2
    centers = [(0, 0, 0.4)] + [(0.58 * math.cos(a), 0.58 * math.sin(a), 0.38) for a in angles]
    return [("ellipse", (x - r, y - r, x + r, y + r)) for x, y, r in centers]


SHAPES = {      # on [-1, 1]^2: corners of a polygon, box of an ellipse, box of an ellipse that is cut out again
    "fish": [("ellipse", (-0.95, -0.6, 0.55, 0.6)), ("polygon", [(0.3, 0), (0.98, -0.6), (0.98, 0.6)])],
    "house": [("polygon", [(-0.75, -0.1), (0.75, -0.1), (0.75, 0.9), (-0.75, 0.9)]),
              ("polygon", [(-1, -0.1), (0, -0.95), (1, -0.1)])],
    "tree": [("ellipse", (-0.8, -1, 0.8, 0.45)), ("polygon", [(-0.22, 0.3), (0.22, 0.3), (0.3, 1), (-0.3, 1)])],
    "boat": [("polygon", [(-1, 0.3), (1, 0.3), (0.6, 0.9), (-0.6, 0.9)]),
             ("polygon", [(-0.1, -1), (-0.1, 0.2), (0.85, 0.2)]), ("polygon", [(-0.2, -0.8), (-0.2, 0.2), (-0.8, 0.2)])],
    "star": [("polygon", _star())],
    "heart": [("polygon", _heart())],
    "moon": [("ellipse", (-0.95, -0.95, 0.95, 0.95)), ("cut", (0.05, -0.8, 1.35, 0.5))],
    "flower": _petals(),
}


def _silhouette(subject: str, x0: float, y0: float, radius: float, rim: float) -> Image.Image:
    """Mask of the subject around (x0, y0), grown by rim, all in pixels; FINE times larger."""
    mask = Image.new("L", (SIDE * FINE, SIDE * FINE))
    draw = ImageDraw.Draw(mask)
    for kind, shape in SHAPES[subject]:
        if kind == "polygon":
            corners = [((x0 + radius * x) * FINE, (y0 + radius * y) * FINE) for x, y in shape]
            draw.polygon(corners, fill=255)
            draw.line(corners + corners[:2], fill=255, width=int(2 * rim * FINE), joint="curve")
        else:
            grow = -rim if kind == "cut" else rim
            left, top, right, bottom = (c + radius * s for c, s in zip((x0, y0, x0, y0), shape))
            draw.ellipse([FINE * e for e in (left - grow, top - grow, right + grow, bottom + grow)],
                         fill=0 if kind == "cut" else 255)
    return mask


def draw_sticker(subject: str, setting: str, colour: str, pattern: str, rng: np.random.Generator) -> Image.Image:
    """A 32 x 32 RGB picture, anti-aliased: the patterned subject with a white rim before a sky; place and size vary by 6 %."""
    x0, y0 = SIDE / 2 + rng.uniform(-2, 2, 2)
    radius, side = 12 * rng.uniform(0.9, 1.05), SIDE * FINE
    top, bottom = np.array(SKY[setting], float)
    sky = (top + (bottom - top) * np.linspace(0, 1, side)[:, None]).round().astype(np.uint8)       # (side, 3)
    picture = Image.fromarray(np.repeat(sky[:, None], side, axis=1))
    picture.paste((250, 250, 250), mask=_silhouette(subject, x0, y0, radius, 1.4))
    body = Image.new("RGB", (side, side), PAINT[colour])
    draw, dark = ImageDraw.Draw(body), tuple(int(0.35 * c) for c in PAINT[colour])
    for row, y in enumerate(np.arange(y0 % 6 - 6, SIDE + 6, 6)):
        if pattern == "stripes":
            draw.rectangle((0, y * FINE, side, (y + 2.6) * FINE), fill=dark)
        for x in np.arange(x0 % 6 - 6 + 3 * (row % 2), SIDE + 8, 6) if pattern == "dots" else ():
            draw.ellipse([FINE * e for e in (x - 1.7, y - 1.7, x + 1.7, y + 1.7)], fill="white")
    picture.paste(body, mask=_silhouette(subject, x0, y0, radius, 0))
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


class World(NamedTuple):
    """Who likes what, exactly: what stickers are drawn from, and what the referee knows."""
    items: np.ndarray               # (I, A) value of each attribute, in the order of ATTRIBUTES
    tastes: dict[str, np.ndarray]   # attribute -> (U, values) the users' probabilities
    liked: np.ndarray               # (U, n) items, the oldest first


def sticker_world(cfg: TrainConfig, seed: int) -> World:
    """Attributes uniform; log tastes normal with SHARPNESS; each user's items drawn without replacement in proportion to the
    product of the user's tastes for their attributes (Gumbel top-k), so that visual and verbal taste are independent."""
    rng = np.random.default_rng([seed, 1])
    items = np.stack([rng.integers(0, len(values), cfg.items) for values in ATTRIBUTES.values()], 1)    # (I, A)
    logits = {a: SHARPNESS[a] * rng.normal(size=(cfg.users, len(values))) for a, values in ATTRIBUTES.items()}
    tastes = {a: np.exp(x) / np.exp(x).sum(1, keepdims=True) for a, x in logits.items()}
    log_p = sum(np.log(tastes[a])[:, items[:, k]] for k, a in enumerate(ATTRIBUTES))                    # (U, I)
    liked = np.argsort(-(log_p + rng.gumbel(size=log_p.shape)), axis=1)[:, :cfg.interactions]
    return World(items, tastes, rng.permuted(liked, axis=1))


def write_stickers(folder: Path, world: World, seed: int):
    """The world as a data folder. items.csv also names the attributes, in columns that loading ignores."""
    rng = np.random.default_rng([seed, 2])
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for n, values in enumerate(world.items):
        value = {a: ATTRIBUTES[a][v] for a, v in zip(ATTRIBUTES, values)}
        draw_sticker(*list(value.values())[:4], rng).save(folder / "images" / f"s{n:04d}.png")
        text = value["tone"].format(**value)
        rows.append([f"s{n:04d}", text, value["subject"], value["setting"], value["colour"], value["pattern"]])
    likes = [[f"u{u:03d}", f"s{i:04d}", t] for u, liked in enumerate(world.liked) for t, i in enumerate(liked)]
    for name, header, lines in (("items", ["item", "text", "prompt", "setting", "colour", "pattern"], rows),
                                ("interactions", ["user", "item", "timestamp"], likes)):
        with replacing(folder / f"{name}.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *lines])


def draw_batch(n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """n freshly drawn stickers: pictures (n, 3, 32, 32) in [-1, 1], subject, setting, colour, pattern (n, 4)."""
    values = np.stack([rng.integers(0, len(v), n) for v in list(ATTRIBUTES.values())[:4]], 1)
    pictures = [np.asarray(draw_sticker(SUBJECTS[a], SETTINGS[b], COLOURS[c], PATTERNS[d], rng)) for a, b, c, d in values]
    return to_float(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)), torch.from_numpy(values)


def to_float(images: Tensor) -> Tensor:
    """uint8 pictures -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


class Referee(nn.Module):
    """Reads subject, setting, colour and pattern off a sticker; trained on freshly drawn ones only, with noise, since it is
    to read pictures that were generated."""

    def __init__(self):
        super().__init__()
        self.sizes = [len(v) for v in list(ATTRIBUTES.values())[:4]]
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.GroupNorm(8, 64), nn.ReLU(),
            nn.Conv2d(64, 96, 3, 2, 1), nn.GroupNorm(8, 96), nn.ReLU(), nn.Conv2d(96, 96, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(96 * 16, sum(self.sizes)))

    def loss(self, pictures: Tensor, values: Tensor, generator: torch.Generator | None) -> Tensor:
        """() cross entropy summed over the attributes; pictures (B, 3, 32, 32) get noise of up to 0.1, values (B, 4)."""
        size = torch.rand(len(pictures), 1, 1, 1, generator=generator, device=pictures.device) / 10
        noise = torch.randn(pictures.shape, generator=generator, device=pictures.device)
        logits = self.net(pictures + size * noise).split(self.sizes, 1)
        return sum(F.cross_entropy(x, y) for x, y in zip(logits, values.T))

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, H) in [-1, 1] -> (B, 4) int64 subject, setting, colour, pattern; other sizes are resized."""
        if pictures.shape[-1] != SIDE:
            pictures = F.interpolate(pictures, size=(SIDE, SIDE), mode="area")
        return torch.stack([x.argmax(1) for x in self.net(pictures).split(self.sizes, 1)], 1)


_GRAMMAR = [re.compile(re.escape(tone).replace(r"\{subject\}", "(?P<subject>\\w+)").replace(
    r"\{setting\}", "(?P<setting>\\w+)")) for tone in TONES]


def read_text(text: str) -> tuple[int, int, int]:
    """Subject, setting and tone of a sticker's text by the grammar; (-1, -1, -1) if it is not one."""
    for tone, grammar in enumerate(_GRAMMAR):
        if (m := grammar.fullmatch(text)) and m["subject"] in SUBJECTS and m["setting"] in SETTINGS:
            return SUBJECTS.index(m["subject"]), SETTINGS.index(m["setting"]), tone
    return -1, -1, -1


# ---- a run: stages that can be killed and resumed ----------------------------------------------------------

class Diverged(RuntimeError):
    """A loss, gradient or parameter is not finite; says which, in which stage and step."""


class Run:
    """What a run consists of between its stages: settings, data, model, and all that its files are written from.

    modules: what training changes, saved whole; tables: the preference-token tables as they were before the reward.
    All randomness comes from generator(stage, step), so the state that a checkpoint needs is modules, optimizer, step."""

    def __init__(self, cfg: Config, train: TrainConfig, data: Dataset, world: World | None, out: Path, device: torch.device):
        self.cfg, self.train, self.data, self.world, self.out, self.device = cfg, train, data, world, out, device
        self.done: list[str] = []
        self.stage, self.step, self.optimizer_state = "", 0, None
        self.log: list[list] = []
        self.metrics: dict = {}
        self.seconds: dict[str, list[float]] = {}       # stage -> [wall, cpu]
        self.tables: dict[str, Tensor] = {}
        self.saved_at = time.monotonic()
        self.interrupted = self.busy = False
        tokenizer = Tokenizer.train(data.texts, cfg.text.vocab_size)
        torch.manual_seed(cfg.method.seed)
        model = DPPMG(cfg, Catalogue.of(data, tokenizer))
        torch.manual_seed(cfg.method.seed + 1)          # the judge shares no seed with the scorer
        judge = Scorer(cfg.reward, tokenizer.vocab_size, max(1, len(data.words)))
        self.modules = nn.ModuleDict({"model": model, "average": copy.deepcopy(model.image), "judge": judge,
                                      "referee": Referee()}).to(device)
        self.modules["model"].to(device)                # its graph, too
        tokens, self.n_cut = tokenizer.encode_batch(data.texts, cfg.text.context)
        self.tokens = tokens.to(device)                                                     # (I, T)
        self.prompt = model.catalogue.encode_prompts(data.prompts).to(device)               # (I, P)
        self.images = data.images.to(device)                                                # (I, 3, H, H) uint8
        self.liked = tuple(x.to(device) for x in data.pairs(TRAIN))                         # (E,), (E,)
        self.seen = torch.unique(self.liked[1])                                             # items liked in training

    @property
    def model(self) -> DPPMG:
        """The method."""
        return self.modules["model"]

    def generator(self, stage: str, step: int = 0) -> torch.Generator:
        """The randomness of one step of one stage: a function of the seed, the stage and the step."""
        digest = hashlib.sha256(f"{self.cfg.method.seed}/{stage}/{step}".encode()).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest[:8]) >> 1)

    def autocast(self):
        """bf16 where there are tensor cores for it; elsewhere nothing."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()

    def save(self, optimizer: torch.optim.Optimizer | None = None):
        """Write checkpoint.pt and log.csv; not if a parameter is not finite: then the last good checkpoint stays."""
        for name, value in self.modules.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                raise Diverged(f"stage {self.stage}, step {self.step}: {name} is not finite")
        state = self.model.state() | {
            "format": FORMAT, "train": asdict(self.train), "done": self.done, "stage": self.stage, "step": self.step,
            "optimizer": optimizer.state_dict() if optimizer else None, "tables": self.tables, "log": self.log,
            "others": {n: m.state_dict() for n, m in self.modules.items() if n != "model"}, "metrics": self.metrics,
            "seconds": self.seconds, "torch": str(torch.__version__)}
        with replacing(self.out / "checkpoint.pt") as path:
            torch.save(state, path)
        with replacing(self.out / "log.csv") as path, open(path, "w", newline="") as file:
            csv.writer(file).writerows([["stage", "step", "name", "value"], *self.log])
        self.saved_at = time.monotonic()

    def restore(self):
        """Go on from checkpoint.pt, if there is one. Raises CheckpointError where it does not fit."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return
        state = read_checkpoint(path)
        try:
            self.model.load_state_dict(state["model"])
            for name, values in state["others"].items():
                self.modules[name].load_state_dict(values)
            self.done, self.stage, self.step = state["done"], state["stage"], state["step"]
            self.optimizer_state, self.log, self.metrics = state["optimizer"], state["log"], state["metrics"]
            self.seconds, self.tables = state["seconds"], {m: t.to(self.device) for m, t in state["tables"].items()}
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: does not fit this run ({' '.join(str(error).split())[:200]}); "
                                  "choose another --out") from None

    def note(self, step: int, **values: float):
        """Add named values to the log of this stage."""
        self.log += [[self.stage, step, name, float(value)] for name, value in values.items()]

    @contextlib.contextmanager
    def timed(self, stage: str):
        """Add the wall and CPU seconds of the block to the stage's."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            spent = self.seconds.setdefault(stage, [0.0, 0.0])
            spent[0] += time.perf_counter() - wall
            spent[1] += time.process_time() - cpu


def adamw(module: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices and kernels only, as one fused kernel where there is one."""
    decay = [p for p in module.parameters() if p.ndim > 1]
    groups = [{"params": decay, "weight_decay": weight_decay},
              {"params": [p for p in module.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    device = decay[0].device.type
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.99), fused=device in ("cpu", "cuda", "mps"))


def warm_then_linear(x: float, warm: float = 0.05, hold: float = 0.0) -> float:
    """Learning rate over its peak at x in [0, 1) of a stage: linear up to `warm`, 1 until `hold`, linear down to 0."""
    return min(1.0, (x + 1e-3) / warm, (1 - x) / (1 - max(hold, warm)))


def fit(run: Run, optimizer: torch.optim.Optimizer, steps: int, losses: Callable[[torch.Generator], dict[str, Tensor]],
        schedule: Callable[[float], float] = warm_then_linear, after: Callable[[int], None] | None = None, every: int = 50, clip: float = 1.0):
    """The one training loop: `losses` gives the tensors to log, of which "loss" is descended; `after`(step) follows each step.
    Goes on where a checkpoint left this stage, and writes one from time to time. Raises Diverged on a loss or gradient that is
    not finite (looked at each step on the CPU, elsewhere every `every` steps: it waits for the device)."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    peaks, first, sums = [group["lr"] for group in optimizer.param_groups], run.step, {}
    if run.optimizer_state:
        optimizer.load_state_dict(run.optimizer_state)
        run.optimizer_state = None
    bar = tqdm(range(first, steps), run.stage, initial=first, total=steps, disable=not sys.stderr.isatty(), leave=False)
    for step in bar:
        run.busy = True
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * schedule(step / steps)
        with run.autocast():
            parts = losses(run.generator(run.stage, step))
        optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        norm = nn.utils.clip_grad_norm_(params, clip)
        if run.device.type == "cpu" or (step + 1) % every == 0:
            check_finite(run, step, parts | {"gradient": norm})
        optimizer.step()
        if after:
            after(step)
        run.step = step + 1
        if run.step % every == 0 or run.step == steps:
            run.note(run.step, **{name: value.item() for name, value in parts.items()})
            bar.set_postfix(loss=f"{parts['loss'].item():.4f}")
        run.busy = False
        if run.interrupted or time.monotonic() - run.saved_at > run.train.checkpoint_seconds:
            run.save(optimizer)
        if run.interrupted:
            raise KeyboardInterrupt


def check_finite(run: Run, step: int, parts: dict[str, Tensor]):
    """Raises Diverged, naming the part, unless all are finite."""
    for name, value in parts.items():
        if not value.isfinite().all():
            raise Diverged(f"stage {run.stage}, step {step}: {name} is {value.item()}; the last good checkpoint is kept; "
                           "try a lower learning rate")


# ---- the stages --------------------------------------------------------------------------------------------
# Each trains one part on the data of the training interactions and returns its figure of merit, in words.

def pick(rows: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n of the rows, with replacement."""
    return rows[torch.randint(len(rows), (n,), generator=generator, device=rows.device)]


def in_batches(function: Callable[[Tensor], Tensor], x: Tensor, n: int = 256) -> Tensor:
    """function(x) without gradient, n rows at a time."""
    with torch.no_grad():
        return torch.cat([function(rows) for rows in x.split(n)])


def train_autoencoder(run: Run) -> str:
    """Reconstruct the pictures of the items that were liked in training; then standardize the latents."""
    cfg, net = run.cfg.image, run.model.autoencoder

    def losses(generator):
        return {"loss": net.loss(to_float(run.images[pick(run.seen, cfg.batch, generator)]), cfg.kl, generator)}
    fit(run, adamw(net, cfg.ae_lr, cfg.weight_decay), cfg.ae_steps, losses)
    net.standardize(in_batches(net.encode, to_float(run.images[run.seen])))
    x = to_float(run.images[run.seen[:512]])
    error = (in_batches(lambda x: net.decode(net.encode(x)), x) - x).square().mean()
    return f"reconstruction PSNR {10 * math.log10(4 / max(error.item(), 1e-12)):.1f} dB"


def item_latents(run: Run) -> Tensor:
    """Standardized latents of all items (I, C, h, h)."""
    return in_batches(run.model.autoencoder.encode, to_float(run.images))


def fit_features(run: Run) -> str:
    """PCA of the latents and SVD of TF-IDF, fitted to the items liked in training, computed for all."""
    model, latents = run.model, item_latents(run)
    model.image_features.fit(latents[run.seen])
    model.text_features.fit(run.tokens[run.seen], run.cfg.method.seed)
    model.gnn.set_features("image", model.image_features(latents))
    model.gnn.set_features("text", model.text_features(run.tokens))
    return f"{run.cfg.method.image_features} image and {run.cfg.method.text_features} text features"


def train_gnn(run: Run) -> str:
    """Modal-specific graph network by BPR."""
    cfg, model = run.cfg.gnn, run.model
    optimizer = torch.optim.Adam(model.gnn.parameters(), cfg.lr)

    def losses(generator):
        return {"loss": model.gnn.loss(model.graph, *sample_triplets(model.graph, cfg.batch, generator))}
    fit(run, optimizer, cfg.steps, losses, lambda x: 1.0)
    run.metrics["stage1"] = rank(run)
    return f"recall@20 {run.metrics['stage1']['recall@20']:.4f}"


def rank(run: Run, quantized: bool = False) -> dict[str, float]:
    """Recall@20 and NDCG@20 on the test part, of all items not liked before: both modalities summed, and each alone."""
    model = run.model
    with torch.no_grad():
        rows = model.gnn(model.graph)
        if quantized:
            rows = {m: (model.quantizer[m].eval().decode(model.quantizer[m].encode(u)) * u.norm(dim=1, keepdim=True), i)
                    for m, (u, i) in rows.items()}
    size = len(run.data.user_ids), len(run.data.item_ids)
    before = torch.cat([torch.stack(run.data.pairs(part)) for part in (TRAIN, VALID)], 1)
    seen, test = (build_graph(*pairs, *size).to(run.device) for pairs in (before, run.data.pairs(TEST)))
    found = {}
    for name, chosen in {"": MODALITIES, "_image": ("image",), "_text": ("text",)}.items():
        both = ({m: rows[m][side] for m in chosen} for side in (0, 1))
        ranking = ranking_metrics(*both, seen, test, k=20)
        found[f"recall@20{name}"] = ranking.recall.mean().item()
        if not name:
            found["ndcg@20"] = ranking.ndcg.mean().item()
    return found


def train_codebook(run: Run) -> str:
    """Residual VQ-VAE of each modality's preferences; BPR on the reconstruction keeps the codes about ranking."""
    cfg, model = run.cfg.vq, run.model
    with torch.no_grad():
        rows = {m: (u, i) for m, (u, i) in model.gnn(model.graph).items()}
    model.quantizer.train()
    if run.step == 0:
        for m, (user, _) in rows.items():
            model.quantizer[m].initialize(user, run.generator(f"k-means {m}"))

    def losses(generator):
        user, pos, neg = sample_triplets(model.graph, cfg.batch, generator)
        parts = {}
        for m, (p, e) in rows.items():
            out, p_u = model.quantizer[m](p[user], generator), p[user]
            unit = out.reconstruction * p_u.norm(dim=1, keepdim=True)
            ranking = bpr_loss((unit * e[pos]).sum(1), (unit * e[neg]).sum(1))
            parts |= {f"reconstruction_{m}": out.reconstruction_loss, f"bpr_{m}": ranking,
                      f"loss_{m}": out.loss + cfg.rank_weight * ranking}
        return {"loss": sum(parts.pop(f"loss_{m}") for m in rows)} | parts
    fit(run, torch.optim.Adam(model.quantizer.parameters(), cfg.lr), cfg.steps, losses)
    model.update_preferences()
    run.metrics["stage1"]["recall@20_quantized"] = rank(run, quantized=True)["recall@20"]
    run.metrics["codebook"] = {}
    for m, (user, _) in rows.items():
        codes = getattr(model, f"tokens_{m}")
        with torch.no_grad():
            kept = explained(user, model.quantizer[m].decode(codes))
        run.metrics["codebook"][m] = codebook_health(codes, cfg.codes) | {"explained": kept}
    return f"recall@20 from tokens {run.metrics['stage1']['recall@20_quantized']:.4f}"


def liked_batch(run: Run, modality: str, n: int, null_rate: float, generator) -> tuple[Tensor, Tensor, Tensor]:
    """n training interactions: items (n,), their prompts (n, P), the users' tokens (n, M), null at null_rate."""
    row = torch.randint(len(run.liked[0]), (n,), generator=generator, device=run.device)
    user, item = (x[row] for x in run.liked)
    prefs = getattr(run.model, f"tokens_{modality}")[user]
    drop = torch.rand(n, 1, generator=generator, device=run.device) < null_rate
    return item, run.prompt[item], prefs.masked_fill(drop, -1)


def train_text(run: Run) -> str:
    """GPT-style decoder on the texts that users liked, given the prompt and their tokens."""
    cfg, net = run.cfg.text, run.model.text

    def losses(generator):
        item, prompt, prefs = liked_batch(run, "text", cfg.batch, cfg.null_rate, generator)
        return {"loss": net.loss(run.tokens[item], prompt, prefs)}
    fit(run, adamw(net, cfg.learning_rate, cfg.weight_decay), cfg.steps, losses)
    user, item = (x.to(run.device) for x in run.data.pairs(VALID))
    if not len(user):
        return f"training loss {run.log[-1][-1]:.3f} nats per token"
    with torch.no_grad():
        loss = net.loss(run.tokens[item[:512]], run.prompt[item[:512]], run.model.tokens_text[user[:512]])
    run.note(cfg.steps, valid=loss)
    return f"validation loss {loss:.3f} nats per token"


def train_image(run: Run) -> str:
    """Denoiser on the latents of the pictures that users liked; the running mean of its weights is what remains."""
    cfg, net, average, latents = run.cfg.image, run.model.image, run.modules["average"], item_latents(run)

    def losses(generator):
        item, prompt, prefs = liked_batch(run, "image", cfg.batch, cfg.null_rate, generator)
        return {"loss": net.loss(latents[item], prompt, prefs, generator)}
    fit(run, adamw(net, cfg.lr, cfg.weight_decay), cfg.steps, losses, lambda x: warm_then_linear(x, 0.05, 0.5),
        lambda step: ema_update(average, net, cfg.ema, step))
    net.load_state_dict(average.state_dict())
    user, item = (x.to(run.device) for x in run.data.pairs(VALID))
    if not len(user):
        return f"training loss {run.log[-1][-1]:.3f}"
    with torch.no_grad():
        loss = net.loss(latents[item[:512]], run.prompt[item[:512]], run.model.tokens_image[user[:512]],
                        run.generator("image validation"))
    run.note(cfg.steps, valid=loss)
    return f"validation loss {loss:.4f}"


def scorer_items(run: Run) -> dict[str, Tensor]:
    """Training items of the scorer and of the judge: two halves of the items liked in training, without a common one."""
    halves = disjoint_halves(len(run.seen), run.generator("halves"))
    return {name: run.seen[half] for name, half in zip(("scorer", "judge"), halves)}


def train_scorer(run: Run) -> str:
    """The contrastive scorer of the reward; called for the stage "judge", its twin with other items and seed."""
    cfg, name = run.cfg.reward, run.stage
    net, items = (run.model.scorer if name == "scorer" else run.modules["judge"]), scorer_items(run)[name]

    def losses(generator):
        batch = pick(items, min(cfg.scorer_batch, len(items)), generator)
        return {"loss": net.loss(to_float(run.images[batch]), run.tokens[batch], run.prompt[batch], generator)}
    fit(run, adamw(net, cfg.scorer_lr, 0.01), cfg.scorer_steps, losses)
    other = scorer_items(run)["judge" if name == "scorer" else "scorer"][:256]
    with torch.no_grad():
        share = judge_consistency(net.encode_image(to_float(run.images[other])), net.encode_text(run.tokens[other])).mean()
    run.note(cfg.scorer_steps, held_out_auc=share)
    return f"image finds its text before {share:.1%} of others, on items that it was not trained on"


def train_referee(run: Run) -> str:
    """Stickers only: learn to read pictures from freshly drawn ones."""
    if run.world is None:
        return "not needed: tastes are not known"
    cfg, net, rng = run.train, run.modules["referee"], np.random.default_rng([run.cfg.method.seed, 3])
    pictures, values = (x.to(run.device) for x in draw_batch(cfg.referee_pictures, rng))

    def losses(generator):
        row = torch.randint(len(pictures), (64,), generator=generator, device=run.device)
        return {"loss": net.loss(pictures[row], values[row], generator)}
    fit(run, adamw(net, 2e-3), cfg.referee_steps, losses)
    pictures, values = (x.to(run.device) for x in draw_batch(1000, np.random.default_rng([run.cfg.method.seed, 4])))
    read = in_batches(net.read, pictures)
    rebuilt = in_batches(lambda x: net.read(run.model.autoencoder.decode(run.model.autoencoder.encode(x))), pictures)
    names = list(ATTRIBUTES)[:4]
    run.metrics["referee"] = {n: share_equal(read[:, k], values[:, k]) for k, n in enumerate(names)}
    run.metrics["autoencoder"] = {n: share_equal(rebuilt[:, k], values[:, k]) for k, n in enumerate(names)}
    return "right on fresh stickers: " + ", ".join(f"{n} {share:.1%}" for n, share in run.metrics["referee"].items())


def share_equal(a: Tensor, b: Tensor) -> float:
    """Share of the places where a and b are equal."""
    return (a == b).double().mean().item()


def train_reward(run: Run) -> str:
    """REINFORCE: the token tables, and nothing else, learn to please the reward."""
    cfg, model = run.cfg.reward, run.model
    if not run.tables:
        run.tables = {m: getattr(model, m).preference.weight.detach().clone() for m in MODALITIES}
    model.requires_grad_(False)
    tables = [model.image.preference.weight.requires_grad_(), model.text.preference.weight.requires_grad_()]
    optimizer = RowAdam([{"params": tables[:1], "lr": cfg.lr_image}, {"params": tables[1:], "lr": cfg.lr_text}], cfg.lr_image)

    def losses(generator):
        row = torch.randint(len(run.liked[0]), (cfg.groups,), generator=generator, device=run.device)
        with_kl = cfg.kl_weight > 0 or run.step % cfg.log_every == 0
        step = model.reinforce_step(run.liked[0][row], run.prompt[run.liked[1][row]], run.tables, with_kl, generator)
        kl = {"kl_image": step.kl_image, "kl_text": step.kl_text} if with_kl else {}
        return {"loss": step.loss} | step.parts._asdict() | kl

    def watch(step):
        if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.rounds:
            run.note(step + 1, **{f"valid_{n}": v.mean() for n, v in watched(run).items()})
    if run.step == 0:
        run.note(0, **{f"valid_{n}": v.mean() for n, v in watched(run).items()})
    fit(run, optimizer, cfg.rounds, losses, lambda x: 1 - x, watch, every=1, clip=math.inf)
    model.requires_grad_(True)
    name = "valid_consistency" if run.world else "valid_judge_consistency"
    values = [value for stage, _, key, value in run.log if (stage, key) == ("reward", name)]
    return f"{name} {values[0]:.3f} -> {values[-1]:.3f}"


# ---- evaluation: on what was held out, by a judge or referee that the reward never saw ----------------------

VARIANTS = ("real", "unpersonalized", "before_reward", "after_reward")


class Samples(NamedTuple):
    images: Tensor      # (B, 3, H, H) in [-1, 1]
    tokens: Tensor      # (B, T)


class Pairs(NamedTuple):
    user: Tensor        # (B,) int64
    item: Tensor        # (B,) int64: gives the prompt, and for "real" the content
    other: Tensor       # (B,) int64: another user, at random


def draw_pairs(run: Run, part: int, n: int) -> Pairs:
    """At most n interactions of a part of the data, at random, each with another user."""
    user, item = (x.to(run.device) for x in run.data.pairs(part))
    generator = run.generator(f"pairs {part}")
    rows = torch.randperm(len(user), generator=generator, device=run.device)[:n]
    shift = torch.randint(1, len(run.data.user_ids), rows.shape, generator=generator, device=run.device)
    return Pairs(user[rows], item[rows], (user[rows] + shift) % len(run.data.user_ids))


def make(run: Run, variant: str, pairs: Pairs, generator: torch.Generator) -> tuple[Samples, Samples]:
    """What a variant gives for the pairs, and what it gives for the same prompts and the other users.
    real: the items, and other items with the same prompt (the same item where there is no other)."""
    model, prompt = run.model, run.prompt[pairs.item]
    if variant == "real":
        group = torch.unique(run.prompt, dim=0, return_inverse=True)[1]                     # (I,)
        order, count = group.argsort(stable=True), group.bincount()
        draw = torch.randint(2**62, pairs.item.shape, generator=generator, device=run.device) % count[group[pairs.item]]
        swapped = order[(count.cumsum(0) - count)[group[pairs.item]] + draw]
        return tuple(Samples(to_float(run.images[i]), run.tokens[i]) for i in (pairs.item, swapped))
    if variant == "unpersonalized":
        null = {m: torch.full_like(model.tokens_image[pairs.user], -1) for m in MODALITIES}
        return tuple(Samples(*model.sample_pairs(prompt, null, generator)) for _ in range(2))
    with contextlib.ExitStack() as stack:
        if variant == "before_reward":
            for m in MODALITIES:
                stack.enter_context(table_as(getattr(model, m), run.tables[m]))
        return tuple(Samples(*model.sample_pairs(prompt, model.user_tokens(u), generator)) for u in (pairs.user, pairs.other))


def exact_measures(run: Run, pairs: Pairs, samples: Samples) -> dict[str, Tensor]:
    """Stickers: what the referee and the grammar find, (B,) each; the names are explained in the README."""
    read = run.modules["referee"].read(samples.images).cpu()                                # (B, 4)
    text = torch.tensor([read_text(t) for t in run.model.tokenizer.decode_batch(samples.tokens)])      # (B, 3)
    user, readable = pairs.user.cpu(), text[:, 0] >= 0
    subject = torch.tensor([SUBJECTS.index(run.data.prompts[i][0]) for i in pairs.item.tolist()])

    def liking(attribute: str, value: Tensor) -> Tensor:
        p = torch.from_numpy(run.world.tastes[attribute])[user]                             # (B, values)
        return p.gather(1, value.clamp(min=0)[:, None])[:, 0] / p.amax(1)
    shown = {"image": dict(setting=read[:, 1], colour=read[:, 2], pattern=read[:, 3]),
             "text": dict(setting=text[:, 1], tone=text[:, 2])}
    utility = {m: torch.stack([liking(a, shown[m][a]) for a in SHOWS[m]]).mean(0) for m in MODALITIES}
    return {"prompt_image": read[:, 0] == subject, "prompt_text": text[:, 0] == subject,
            "consistency": (read[:, 0] == text[:, 0]) & (read[:, 1] == text[:, 1]),
            "utility_image": utility["image"], "utility_text": utility["text"] * readable, "grammatical": readable}


def judge_scores(run: Run, pairs: Pairs, samples: Samples) -> dict[str, Tensor]:
    """Any data: embeddings of image and text by the judge, and their cosine with the mean of what the user likes among the
    held-out items (validation and test), which neither the generators nor the reward have seen the user like."""
    judge = run.modules["judge"]
    held = torch.cat([torch.stack(run.data.pairs(part)) for part in (VALID, TEST)], 1).to(run.device)
    out = {"image": in_batches(judge.encode_image, samples.images), "text": in_batches(judge.encode_text, samples.tokens)}
    items = {"image": in_batches(lambda i: judge.encode_image(to_float(run.images[i])), torch.arange(len(run.images))),
             "text": in_batches(judge.encode_text, run.tokens)}
    for m in MODALITIES:
        likes = F.normalize(taste(items[m], *held, len(run.data.user_ids)), dim=1)[pairs.user]
        out[f"liking_{m}"] = (out[m] * likes).sum(1)
    return out


def measures(run: Run, pairs: Pairs, own: Samples, other: Samples) -> dict[str, Tensor]:
    """Every per-pair measure of a variant, (B,) each."""
    found, judge = {}, run.modules["judge"]
    if run.world:
        found = exact_measures(run, pairs, own)
        others = exact_measures(run, pairs, other)
        found |= {f"swap_{m}": swap_share(found[f"utility_{m}"], others[f"utility_{m}"]) for m in MODALITIES}
    score, others = judge_scores(run, pairs, own), judge_scores(run, pairs, other)
    found["judge_consistency"] = judge_consistency(score["image"], score["text"])
    prompts, index = torch.unique(run.prompt, dim=0, return_inverse=True)
    for m in MODALITIES:
        found[f"judge_swap_{m}"] = swap_share(score[f"liking_{m}"], others[f"liking_{m}"])
        if len(prompts) > 1:
            with torch.no_grad():
                found[f"judge_prompt_{m}"] = judge_prompt(score[m], judge.encode_prompt(prompts), index[pairs.item])
    known = set(run.data.texts[i] for i in run.seen.tolist())
    found["copied"] = torch.tensor([t in known for t in run.model.tokenizer.decode_batch(own.tokens)])
    return {name: value.double().cpu() for name, value in found.items()}


def watched(run: Run) -> dict[str, Tensor]:
    """The measures on a few validation pairs, to see during the reward stage what the reward does to them."""
    pairs = draw_pairs(run, VALID, 128)
    own, other = make(run, "after_reward", pairs, run.generator("watched"))
    return {n: v for n, v in measures(run, pairs, own, other).items() if n != "copied"}


def frechet(run: Run, samples: Samples, user: Tensor) -> dict[str, float]:
    """Frechet distance, in the judge's image features, to pictures that users liked in training; interval by the jackknife
    over ten groups of users."""
    judge = run.modules["judge"]
    rows = torch.randint(len(run.liked[1]), (len(user),), generator=run.generator("frechet"), device=run.device)
    real = in_batches(lambda i: judge.encode_image(to_float(run.images[i])), run.liked[1][rows])
    made, group = in_batches(judge.encode_image, samples.images), user % 10
    mean = frechet_distance(made, real)
    without = torch.tensor([frechet_distance(made[group != g], real) for g in range(10)])
    half = 2.262 * (0.9 * (without - without.mean()).square().sum()).sqrt().item()          # Student's t, 9 degrees
    return {"mean": mean, "low": mean - half, "high": mean + half}


def evaluate(run: Run) -> str:
    """Fill metrics["generation"] with every variant's measures on the test part."""
    pairs, table = draw_pairs(run, TEST, run.train.pairs), {}
    for variant in VARIANTS:
        own, other = make(run, variant, pairs, run.generator("evaluation"))
        table[variant] = {n: interval(v, pairs.user) for n, v in measures(run, pairs, own, other).items()}
        table[variant]["frechet_image"] = frechet(run, own, pairs.user)
    run.metrics["generation"] = table
    name = "consistency" if run.world else "judge_consistency"
    return f"{name} {table['before_reward'][name]['mean']:.3f} before, {table['after_reward'][name]['mean']:.3f} after"


# ---- report: one file with all that a person wants to look at ------------------------------------------------

STYLE = """body{font:14px/1.45 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.6em 0}td,th{padding:.15em .6em;text-align:left;vertical-align:top}
thead th{border-bottom:1px solid #999}td.n{text-align:right;font-variant-numeric:tabular-nums}small{color:#666}
img{width:64px;height:64px;image-rendering:pixelated;border-radius:4px;display:block}
figure{display:inline-block;width:10.5em;margin:.3em .5em .3em 0;vertical-align:top}figcaption{font-size:12px;overflow-wrap:anywhere}
svg{margin:.3em}.grid td{padding:2px}.grid th{font-weight:normal;padding:2px 6px}section{border-top:1px solid #ddd;margin-top:1em}"""
COLOURS_OF_CURVES = ("#1f6fb4", "#d1622b", "#2f8f4e", "#8a4fb0", "#b02f55", "#777")


def picture(x: Tensor, text: str = "", note: str = "") -> str:
    """<figure> of (3, H, W) in [-1, 1] with escaped words below."""
    data = io.BytesIO()
    to_picture(x).save(data, "PNG")
    image = f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'
    caption = f"<figcaption>{html.escape(text)}{f'<br><small>{html.escape(note)}</small>' if note else ''}</figcaption>"
    return f"<figure>{image}{caption}</figure>" if text or note else image


def curves(title: str, series: dict[str, list[tuple[float, float]]]) -> str:
    """Inline SVG of several curves over steps, with their range and last values."""
    points = [p for line in series.values() for p in line if math.isfinite(p[1])]
    if len(points) < 2:
        return ""
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))
    place = [(lambda p: (34 + 250 * (p[0] - x0) / ((x1 - x0) or 1), 120 - 100 * (p[1] - y0) / ((y1 - y0) or 1)))]
    lines = ""
    for n, (name, line) in enumerate(series.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place[0], line))
        colour = COLOURS_OF_CURVES[n % len(COLOURS_OF_CURVES)]
        label = f"{name} {line[-1][1]:.3g}" if line else name
        lines += (f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
                  f'<text x="292" y="{26 + 15 * n}" fill="{colour}">{html.escape(label)}</text>')
    return (f'<svg width="470" height="140" font-size="11"><text x="34" y="12" font-weight="bold">{html.escape(title)}</text>'
            f'<path d="M34 20V120H284" stroke="#999" fill="none"/><text x="2" y="24">{y1:.3g}</text>'
            f'<text x="2" y="120">{y0:.3g}</text><text x="34" y="134">{x0:g}</text><text x="262" y="134">{x1:g}</text>{lines}</svg>')


def table(head: Sequence[str], rows: Sequence[Sequence], kind: str = "") -> str:
    """<table>; numbers to the right, strings that begin with "<" taken as HTML, all others escaped."""
    def cell(v):
        if isinstance(v, float):
            return f'<td class="n">{v:.3f}</td>'
        return f"<td>{v}</td>" if str(v).startswith("<") else f"<td>{html.escape(str(v))}</td>"
    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    names = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    return f'<table class="{kind}"><thead><tr>{names}</tr></thead>{body}</table>'


def report_numbers(run: Run) -> str:
    """The tables of metrics.json."""
    variants, m = run.metrics["generation"], run.metrics
    rows = [[name, *(f"{v[name]['mean']:.3f}  [{v[name]['low']:.3f}, {v[name]['high']:.3f}]" for v in variants.values())]
            for name in variants["real"]]
    books = [[f"{k}, level {n + 1}", h["usage"][n], h["perplexity"][n], h["explained"], h["collision_rate"]]
             for k, h in m["codebook"].items() for n in range(len(h["usage"]))]
    times = [[stage, wall, cpu] for stage, (wall, cpu) in run.seconds.items()]
    return ("<h2>What was measured</h2><p>On the test part; 95 % intervals in brackets.</p>"
            + table(["", *variants], rows) + table(["stage 1, test part", ""], list(m["stage1"].items()))
            + table(["codebook", "usage", "perplexity", "explained", "collisions"], books)
            + table(["stage", "seconds", "CPU seconds"], times))


def report_curves(run: Run) -> str:
    """Losses of the stages, and reward and measures over the rounds."""
    lines: dict[tuple[str, str], list] = {}
    for stage, step, name, value in run.log:
        lines.setdefault((stage, name), []).append((step, value))
    losses = "".join(curves(stage, {n: v for (s, n), v in lines.items() if s == stage and n.startswith("loss")})
                     for stage in STAGES if stage != "reward")
    reward = {n: v for (s, n), v in lines.items() if s == "reward"}
    names = [["consistency", "valid_judge_consistency", "valid_consistency"], ["s_image", "s_text"], ["kl_image", "kl_text"],
             [f"valid_{k}" for k in ("utility_image", "utility_text", "prompt_image", "prompt_text")],
             [f"valid_judge_{k}" for k in ("swap_image", "swap_text", "prompt_image", "prompt_text")]]
    over = "".join(curves("over the rounds of the reward", {n: reward[n] for n in group if n in reward}) for group in names)
    return f"<h2>Reward</h2>{over}<h2>Losses</h2>{losses}"


def shown_prompts(run: Run, n: int) -> list[int]:
    """Items that stand for the n commonest prompts."""
    _, group = torch.unique(run.prompt, dim=0, return_inverse=True)
    common = group.bincount().argsort(descending=True, stable=True)[:n]
    return [int((group == g).nonzero()[0]) for g in common]


def report_grid(run: Run, users: Tensor) -> str:
    """8 users x 8 prompts: the taste down... a row is a user, a column a prompt."""
    items = torch.tensor(shown_prompts(run, 8), device=run.device)
    pairs = Pairs(users.repeat_interleave(len(items)), items.repeat(len(users)), users.repeat_interleave(len(items)))
    own, _ = make(run, "after_reward", pairs, run.generator("grid"))
    texts = run.model.tokenizer.decode_batch(own.tokens)
    cells = [f'<td title="{html.escape(text)}">{picture(x)}</td>' for x, text in zip(own.images, texts)]
    rows = "".join(f"<tr><th>{html.escape(run.data.user_ids[u])}</th>{''.join(cells[k * len(items):(k + 1) * len(items)])}</tr>"
                   for k, u in enumerate(users.tolist()))
    head = "".join(f"<th>{html.escape(', '.join(run.data.prompts[i])[:14])}</th>" for i in items.tolist())
    return ("<h2>One row a user, one column a prompt</h2><p>After the reward; the text is shown under the pointer.</p>"
            f'<table class="grid"><tr><th></th>{head}</tr>{rows}</table>')


def report_user(run: Run, user: int) -> str:
    """History, tokens, and what was generated before and after the reward, with the reward's parts."""
    model, data = run.model, run.data
    items = run.liked[1][run.liked[0] == user][:8].tolist()
    history = "".join(picture(to_float(data.images[i]), data.texts[i]) for i in items)
    tokens = "; ".join(f"{m} {' '.join(map(str, getattr(model, f'tokens_{m}')[user].tolist()))}" for m in MODALITIES)
    prompts = torch.tensor(shown_prompts(run, 3), device=run.device)
    who, made = torch.full_like(prompts, user), {}
    for variant in ("before_reward", "after_reward"):
        own, _ = make(run, variant, Pairs(who, prompts, who), run.generator(f"report {user}"))
        with torch.no_grad():
            cos = (model.scorer.encode_image(own.images) * model.scorer.encode_text(own.tokens)).sum(1)
            likes = [model.score("image", model.preference_image[who], model.autoencoder.encode(own.images)),
                     model.score("text", model.preference_text[who], own.tokens)]
        notes = [f"cos {c:.2f}, s image {a:.2f}, s text {b:.2f}" for c, a, b in zip(cos, *likes)]
        made[variant] = "".join(map(picture, own.images, model.tokenizer.decode_batch(own.tokens), notes))
    return (f"<section><h3>User {html.escape(data.user_ids[user])}</h3><p>Preference tokens: {tokens}</p><p>Likes:</p>{history}"
            f"<p>Before the reward:</p>{made['before_reward']}<p>After:</p>{made['after_reward']}</section>")


def write_report(run: Run):
    """report.html: self-contained; every word from the data is escaped."""
    candidates = run.data.pairs(TEST)[0].unique()
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(run.cfg.method.seed))
    users = candidates[order[:12]].to(run.device)
    body = (f"<h1>DPPMG on {html.escape(run.data.name)}</h1><p>seed {run.cfg.method.seed}, {run.device}, "
            f"{len(run.data.user_ids):,} users, {len(run.data.item_ids):,} items</p>" + report_grid(run, users[:8])
            + report_numbers(run) + report_curves(run) + "<h2>A dozen users</h2>"
            + "".join(report_user(run, u) for u in users.tolist()))
    with replacing(run.out / "report.html") as path:
        path.write_text(f"<!doctype html><html lang=en><meta charset=utf-8><title>DPPMG on {html.escape(run.data.name)}</title>"
                        f"<style>{STYLE}</style><body>{body}</body></html>", encoding="utf-8")


# ---- command line ------------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[Run], str]] = {
    "autoencoder": train_autoencoder, "features": fit_features, "gnn": train_gnn, "codebook": train_codebook,
    "text": train_text, "image": train_image, "scorer": train_scorer, "judge": train_scorer, "referee": train_referee,
    "reward": train_reward, "evaluation": evaluate}

SMOKE = {"train": dict(items=160, users=40, interactions=12, referee_pictures=256, referee_steps=20, pairs=40),
         "gnn": dict(steps=30, batch=256), "vq": dict(steps=30, codes=8, levels=2, batch=32), "text": dict(
             steps=20, layers=2, width=32, heads=2, vocab_size=320), "image": dict(
             steps=20, ae_steps=20, ae_width=16, width=16, batch=16, sampling_steps=4),
         "reward": dict(scorer_steps=20, scorer_width=8, scorer_batch=32, rounds=4, groups=4, images=4, texts=4,
                        diffusion_steps=4, grad_steps=2, log_every=2),
         "method": dict(image_features=16, text_features=16)}


def settings(parts: dict[str, type]) -> list[tuple[str, str, dataclasses.Field, str]]:
    """(group, name, field, help) of every setting; the help is the comment behind the field in the source."""
    import inspect
    found = []
    for group, part in parts.items():
        comments = dict(re.findall(r"^    (\w+): [^#\n]*# *(.*)$", inspect.getsource(part), re.MULTILINE))
        found += [(group, field.name, field, comments.get(field.name, "")) for field in fields(part)]
    return found


PARTS = {f.name: type(f.default) for f in fields(Config)} | {"train": TrainConfig}


def flag_of(group: str, name: str) -> str:
    """--gnn-dim for gnn.dim; the settings of the method and of training need no prefix."""
    return "--" + "-".join([*([] if group in ("method", "train") else [group]), name]).replace("_", "-")


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, dict]]:
    """Arguments, and the settings that were given: group -> name -> value."""
    parser = OneLineParser(prog="train.py", description="Train DPPMG, evaluate it, report.", allow_abbrev=False)
    parser.add_argument("--data", help="data folder (the format: python -c 'import dppmg; help(dppmg)'); none: stickers")
    parser.add_argument("--out", help="folder of the run (runs/NAME, the first that is free)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, or with the latest unfinished one")
    parser.add_argument("--smoke", action="store_true", help="every stage, tiny: does it run?")
    parser.add_argument("--device", help="cuda, mps or cpu (the first there is)")
    parser.add_argument("--width", type=int, help="shorthand: --text-width and --image-width")
    parser.add_argument("--layers", type=int, help="shorthand: --text-layers and --image-layers")
    groups = {name: parser.add_argument_group(name) for name in PARTS}
    for group, name, field, text in settings(PARTS):
        groups[group].add_argument(flag_of(group, name), dest=f"{group}.{name}", type=type(field.default), metavar="N",
                                   help=f"{text} ({field.default})".replace("%", "%%"))
    args = parser.parse_args(argv)
    given: dict[str, dict] = {group: {} for group in PARTS}
    for key, value in vars(args).items():
        if "." in key and value is not None:
            given[key.split(".")[0]][key.split(".")[1]] = value
        elif key in ("width", "layers") and value is not None:
            for group in MODALITIES:
                given[group].setdefault(key, value)
    args.parser = parser
    return args, given


def build_settings(given: dict[str, dict], smoke: bool) -> tuple[Config, TrainConfig]:
    """The dataclasses with the given settings. Raises ValueError as they do."""
    parts = {}
    for group, part in PARTS.items():
        parts[group] = part(**((SMOKE.get(group, {}) if smoke else {}) | given[group]))
    train = parts.pop("train")
    return Config(**parts), train


def free_folder(name: str) -> Path:
    """runs/NAME, or runs/NAME-2 and so on: the first that does not exist."""
    path, n = Path("runs") / name, 1
    while path.exists():
        n += 1
        path = Path("runs") / f"{name}-{n}"
    return path


def fingerprint(data: Dataset) -> str:
    """Digest of all that training reads from the data."""
    digest = hashlib.sha256(repr((data.user_ids, data.item_ids, data.texts, data.prompts)).encode())
    for x in (data.user, data.item, data.part, data.images):
        digest.update(x.numpy().tobytes())
    return digest.hexdigest()


def open_run(args: argparse.Namespace, given: dict[str, dict]) -> Run:
    """A new run, or the unfinished one that is to go on. Raises ValueError or OSError where neither is possible."""
    out = Path(args.out) if args.out else None
    if args.resume and out is None:
        unfinished = [p.parent for p in Path("runs").glob("*/config.json") if not (p.parent / "metrics.json").exists()]
        if not unfinished:
            raise ValueError("--resume: no unfinished run in runs/; name one with --out")
        out = max(unfinished, key=lambda path: (path / "config.json").stat().st_mtime)
    cfg, train = build_settings(given, args.smoke)
    asked = {"data": os.path.abspath(args.data) if args.data else None, "config": asdict(cfg), "train": asdict(train)}
    if out and (out / "config.json").exists():
        asked = check_same(out, asked, args, given)
        cfg, train = Config.from_dict(asked["config"]), TrainConfig(**asked["train"])
    elif args.resume:
        raise ValueError(f"--resume: {out} holds no run (no config.json)")
    elif out and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not a run; choose another")
    world = None if asked["data"] else sticker_world(train, cfg.method.seed)
    if asked["data"]:
        data = Dataset.load(asked["data"], cfg.image.size, cfg.method.seed)
        out = out or free_folder(data.name)
    else:
        out = out or free_folder("smoke" if args.smoke else "stickers")
        write_stickers(out / "stickers", world, cfg.method.seed)
        data = Dataset.load(out / "stickers", cfg.image.size, cfg.method.seed)
    asked["fingerprint"] = asked.get("fingerprint", fingerprint(data))
    if asked["fingerprint"] != fingerprint(data):
        raise ValueError(f"{out}: the data has changed since this run began; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "config.json") as path:
        path.write_text(json.dumps(asked, indent=1))
    return Run(cfg, train, data, world, out, pick_device(args.device))


def check_same(out: Path, asked: dict, args: argparse.Namespace, given: dict[str, dict]) -> dict:
    """The settings of the run in `out`, if they are those asked for (all, or those given along with --resume)."""
    try:
        there = json.loads((out / "config.json").read_text())
        differ = [flag_of(g, n) for g in PARTS for n, value in (there["train"] if g == "train" else there["config"][g]).items()
                  if (n in given[g] or not args.resume) and value != (asked["train"] if g == "train" else asked["config"][g])[n]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{out}/config.json: not the settings of a run ({type(error).__name__}); choose another --out") from None
    if there["data"] != asked["data"] and (args.data or not args.resume):
        differ.insert(0, "--data")
    if differ:
        raise ValueError(f"--out {out}: holds a run with other settings ({', '.join(differ[:5])}); choose another --out")
    if (out / "metrics.json").exists():
        raise ValueError(f"--out {out}: this run is finished; choose another --out")
    return there


def train_all(run: Run):
    """All stages that are not done yet, then the report. A line and a checkpoint at the end of each."""
    say = tqdm.write
    for notice in run.data.notices + ([f"{run.n_cut} texts cut to {run.cfg.text.context} tokens"] if run.n_cut else []):
        say(f"note: {notice}")
    for stage, train_stage in STAGES.items():
        if stage in run.done:
            continue
        if run.stage != stage:
            run.stage, run.step, run.optimizer_state = stage, 0, None
        with run.timed(stage):
            merit = train_stage(run)
            run.done.append(stage)
        say(f"{stage:12} {run.seconds[stage][0]:7.1f} s   {merit}")
        run.save()
    with run.timed("report"):
        write_report(run)
    write_metrics(run)
    say(f"{'total':12} {sum(wall for wall, _ in run.seconds.values()):7.1f} s   {run.out}/report.html")


def write_metrics(run: Run):
    """metrics.json: what DESIGN.md's section on runs lists."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    times = [{s: round(t[k], 2) for s, t in run.seconds.items()} for k in (0, 1)]
    head = {"dataset": run.data.name, "seed": run.cfg.method.seed, "device": str(run.device), "threads":
            torch.get_num_threads(), "seconds": times[0] | {"total": round(sum(times[0].values()), 2)},
            "cpu_seconds": times[1] | {"total": round(sum(times[1].values()), 2)}, "peak_memory_mb": round(peak)}
    with replacing(run.out / "metrics.json") as path:
        path.write_text(json.dumps(head | run.metrics, indent=1))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Exit status: 0; 1 diverged; 2 a user's mistake; 130 interrupted."""
    args, given = parse_arguments(argv)
    run = None

    def interrupt(*_):
        if run and run.busy and not run.interrupted:
            run.interrupted = True          # fit saves after its step and raises KeyboardInterrupt
        else:
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, interrupt)
    try:
        with contextlib.nullcontext():
            started = (time.perf_counter(), time.process_time())
            run = open_run(args, given)
            run.restore()
            spent = run.seconds.setdefault("data", [0.0, 0.0])
            spent[0] += time.perf_counter() - started[0]
            spent[1] += time.process_time() - started[1]
        train_all(run)
    except KeyboardInterrupt:
        print(f"interrupted; go on with: python train.py --resume --out {run.out}" if run else "interrupted", file=sys.stderr)
        return 130
    except Diverged as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        args.parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
