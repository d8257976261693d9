"""Train DPPMG stage by stage, evaluate it on what was held out, and report.

    python train.py                       stickers, the built-in data: written as a folder, then loaded like any other
    python train.py --data DIR            your data (the format: dppmg.py)
    python train.py --smoke               every stage, tiny
    python train.py --resume              go on with the latest unfinished run
    python train.py --study pareto|bits   several runs that share the stages they have in common, side by side

A run leaves config.json, checkpoint.pt, log.csv, metrics.json and report.html in runs/NAME/ (--out). It can be killed at
any time: all randomness is a function of (seed, stage, step), so a resumed run ends with the same bits.
Shapes: as in dppmg.py; A attributes of a sticker.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import csv
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
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

from dppmg import (FORMAT, MODALITIES, TEST, TRAIN, VALID, Catalogue, CheckpointError, Config, Dataset, DPPMG,
                   OneLineParser, flag_of, hold_out_users, pick_device, read_checkpoint, replacing, settings, to_picture)
from generators import Tokenizer, adamw, drop_preferences, ema_update, ramp, table_as
from gnn import bpr_loss, build_graph, ranking_summary, sample_positives, sample_triplets
from reward import (Content, Scorer, disjoint_halves, embed, frechet_interval, interval, judge_consistency,
                    judge_measures, swap_share, taste, token_optimizer)
from vq import code_lift, codebook_health, explained, linear_probe


@dataclass(frozen=True)
class TrainConfig:
    items: int = 2000             # stickers in the built-in data
    users: int = 600              # users of the built-in data
    interactions: int = 30        # stickers that each of them likes
    referee_pictures: int = 3000  # freshly drawn stickers that the referee learns from
    referee_steps: int = 300      # optimizer steps of the referee
    pairs: int = 600              # (user, prompt) pairs of the test part to evaluate on
    new_users: float = 0.08       # share of the users kept out of all training, to be folded in
    checkpoint_seconds: float = 60.0  # between two checkpoints within a stage

    def __post_init__(self):
        low = dict(items=16, users=4, interactions=10, referee_pictures=16, referee_steps=1, pairs=2)
        high = dict(interactions=self.items // 2, new_users=0.5)
        for name, value in vars(self).items():
            least, most = low.get(name, 0), high.get(name, sys.maxsize)
            if not least <= value <= most:
                raise ValueError(f"TrainConfig.{name}={value}: need {least} <= {name} <= {most}")


# ---- stickers: data whose tastes are known --------------------------------------------------------------------------

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
SEEN = ("subject", "setting", "colour", "pattern")                                  # in the picture
SHOWS = {"image": ("setting", "colour", "pattern"), "text": ("setting", "tone")}    # and the prompt leaves open
SHARPNESS = {"subject": 1.0, "setting": 1.0, "colour": 2.0, "pattern": 2.0, "tone": 2.0}    # std of log tastes
PAINT = {"red": (214, 40, 40), "orange": (240, 130, 30), "yellow": (250, 215, 50), "green": (50, 150, 60),
         "blue": (40, 90, 215), "purple": (140, 60, 180)}
SKY = {"dawn": ((255, 200, 190), (255, 235, 200)), "day": ((120, 190, 250), (205, 235, 255)),
       "dusk": ((110, 70, 130), (225, 130, 110)), "night": ((10, 14, 45), (30, 40, 90))}      # top, bottom
SIDE, FINE = 32, 4                          # pixels of a sticker; drawn so many times larger, then averaged


def _on_circles(*radii: float, n: int, turn: float = -math.pi / 2) -> list[tuple[float, float]]:
    """n points around the origin, at the radii in turn."""
    angles = [turn + k * math.tau / n for k in range(n)]
    return [(radii[k % len(radii)] * math.cos(a), radii[k % len(radii)] * math.sin(a)) for k, a in enumerate(angles)]


SHAPES = {      # on [-1, 1]^2: corners of a polygon, box of an ellipse, box of an ellipse that is cut out again
    "fish": [("ellipse", (-0.95, -0.6, 0.55, 0.6)), ("polygon", [(0.3, 0), (0.98, -0.6), (0.98, 0.6)])],
    "house": [("polygon", [(-0.75, 0.9), (-0.75, -0.1), (-1, -0.1), (0, -0.95), (1, -0.1), (0.75, -0.1), (0.75, 0.9)])],
    "tree": [("ellipse", (-0.8, -1, 0.8, 0.45)), ("polygon", [(-0.22, 0.3), (0.22, 0.3), (0.3, 1), (-0.3, 1)])],
    "boat": [("polygon", [(-1, 0.3), (1, 0.3), (0.6, 0.9), (-0.6, 0.9)]), ("polygon", [(-0.1, -1), (-0.1, 0.2), (0.85, 0.2)]),
             ("polygon", [(-0.2, -0.8), (-0.2, 0.2), (-0.8, 0.2)])],
    "star": [("polygon", _on_circles(1.05, 0.5, n=10))],
    "heart": [("ellipse", (-0.94, -0.87, 0.06, 0.13)), ("ellipse", (-0.06, -0.87, 0.94, 0.13)),
              ("polygon", [(-0.86, -0.1), (0, -0.45), (0.86, -0.1), (0, 0.95)])],
    "moon": [("ellipse", (-0.95, -0.95, 0.95, 0.95)), ("cut", (0.05, -0.8, 1.35, 0.5))],
    "flower": [("ellipse", (x - 0.38, y - 0.38, x + 0.38, y + 0.38)) for x, y in [(0, 0), *_on_circles(0.58, n=5)]],
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
    liked = []
    for u in range(0, cfg.users, 256):          # never U x I numbers at once
        log_p = sum(np.log(tastes[a][u:u + 256])[:, items[:, k]] for k, a in enumerate(ATTRIBUTES))     # (256, I)
        liked.append(np.argsort(-(log_p + rng.gumbel(size=log_p.shape)), axis=1)[:, :cfg.interactions].copy())
    return World(items, tastes, rng.permuted(np.concatenate(liked), axis=1))


def write_csv(path: Path, header: list[str], rows: list[list]):
    """A CSV file in UTF-8."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_stickers(folder: Path, world: World, seed: int):
    """The world as a data folder. items.csv also names the attributes, in columns that loading ignores."""
    rng = np.random.default_rng([seed, 2])
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for n, values in enumerate(world.items):
        value = {a: ATTRIBUTES[a][v] for a, v in zip(ATTRIBUTES, values)}
        with replacing(folder / "images" / f"s{n:04d}.png") as path:
            draw_sticker(*(value[a] for a in SEEN), rng).save(path, "PNG")
        rows.append([f"s{n:04d}", value["tone"].format(**value), *(value[a] for a in SEEN)])
    likes = [[f"u{u:03d}", f"s{i:04d}", t] for u, liked in enumerate(world.liked) for t, i in enumerate(liked)]
    write_csv(folder / "items.csv", ["item", "text", "prompt", *SEEN[1:]], rows)
    write_csv(folder / "interactions.csv", ["user", "item", "timestamp"], likes)


def draw_batch(n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """n freshly drawn stickers: pictures (n, 3, 32, 32) in [-1, 1], and the values of SEEN (n, 4)."""
    values = np.stack([rng.integers(0, len(ATTRIBUTES[a]), n) for a in SEEN], 1)
    pictures = [np.asarray(draw_sticker(*(ATTRIBUTES[a][v] for a, v in zip(SEEN, row)), rng)) for row in values]
    return to_float(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)), torch.from_numpy(values)


def to_float(images: Tensor) -> Tensor:
    """uint8 pictures -> floats in [-1, 1]."""
    return images / 127.5 - 1


class Referee(nn.Module):
    """Reads subject, setting, colour and pattern off a sticker; trained on freshly drawn ones only, with noise, since it is
    to read pictures that were generated."""

    def __init__(self):
        super().__init__()
        self.sizes = [len(ATTRIBUTES[a]) for a in SEEN]
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.GroupNorm(8, 64), nn.ReLU(),
            nn.Conv2d(64, 96, 3, 2, 1), nn.GroupNorm(8, 96), nn.ReLU(), nn.Conv2d(96, 96, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(96 * 16, sum(self.sizes)))

    def loss(self, pictures: Tensor, values: Tensor, generator: torch.Generator | None) -> Tensor:
        """() cross entropy summed over SEEN; pictures (B, 3, 32, 32) get noise of up to 0.1, values (B, 4)."""
        size = torch.rand(len(pictures), 1, 1, 1, generator=generator, device=pictures.device) / 10
        noise = torch.randn(pictures.shape, generator=generator, device=pictures.device)
        logits = self.net(pictures + size * noise).split(self.sizes, 1)
        return sum(F.cross_entropy(x, y) for x, y in zip(logits, values.T))

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, H) in [-1, 1] -> (B, 4) int64, the values of SEEN; other sizes than 32 are resized."""
        if pictures.shape[-1] != SIDE:
            pictures = F.interpolate(pictures, size=(SIDE, SIDE), mode="area")
        return torch.stack([x.argmax(1) for x in self.net(pictures).split(self.sizes, 1)], 1)


_GRAMMAR = [re.compile(re.escape(tone).replace(r"\{subject\}", r"(?P<subject>\w+)").replace(
    r"\{setting\}", r"(?P<setting>\w+)")) for tone in TONES]


def read_text(text: str) -> tuple[int, int, int]:
    """Subject, setting and tone of a sticker's text by the grammar; (-1, -1, -1) if it is not one."""
    for tone, grammar in enumerate(_GRAMMAR):
        if (m := grammar.fullmatch(text)) and m["subject"] in SUBJECTS and m["setting"] in SETTINGS:
            return SUBJECTS.index(m["subject"]), SETTINGS.index(m["setting"]), tone
    return -1, -1, -1


# ---- a run: stages that can be killed and resumed -------------------------------------------------------------------

KEPT = ("done", "stage", "step", "log", "metrics", "seconds", "tables", "discord")     # of a Run in its checkpoint


class Diverged(RuntimeError):
    """A loss, gradient or parameter is not finite; says which, in which stage and step."""


class Run:
    """What a run consists of between its stages: settings, data, model, and all that its files are written from.

    modules: what training changes, saved whole; tables: the preference-token tables as they were before the reward; discord
    (users in training,): 1 - the mean cosine of a user's images and texts when the reward last made some, 1 before.
    All randomness comes from generator(stage, step), so the state that a checkpoint needs is modules, optimizer, step."""

    def __init__(self, cfg: Config, train: TrainConfig, data: Dataset, world: World | None, out: Path, device: torch.device):
        self.cfg, self.train, self.data, self.world, self.out, self.device = cfg, train, data, world, out, device
        self.done, self.stage, self.step, self.optimizer_state = [], "", 0, None
        self.log, self.metrics, self.seconds, self.tables, self.discord, self.likes = [], {}, {}, {}, None, {}
        self.saved_at, self.interrupted, self.busy = time.monotonic(), False, False
        new = hold_out_users(data, train.new_users, cfg.method.seed)
        self.new = {name: pairs.to(device) for name, pairs in new.items()}                  # (2, E) each
        tokenizer = Tokenizer.train(data.texts, cfg.text.vocab_size)
        torch.manual_seed(cfg.method.seed)
        model = DPPMG(cfg, Catalogue.of(data, tokenizer))
        torch.manual_seed(cfg.method.seed + 1)          # the judge shares no seed with the scorer
        judge = Scorer(cfg.reward, tokenizer.vocab_size, max(1, len(data.words)))
        self.modules = nn.ModuleDict({"model": model, "average": copy.deepcopy(model.image), "judge": judge,
                                      "referee": Referee()})
        self.modules.to(device)
        model.to(device)                                # its graph, too
        tokens, self.n_cut = tokenizer.encode_batch(data.texts, cfg.text.context)
        self.tokens, self.images = tokens.to(device), data.images.to(device)                # (I, T), (I, 3, H, H) uint8
        self.prompt = model.catalogue.encode_prompts(data.prompts).to(device)               # (I, P)
        self.prompts, self.topic = self.prompt.unique(dim=0, return_inverse=True)           # (W, P) distinct, (I,) which
        self.liked = self.pairs(TRAIN)                                                      # (2, E)
        self.users, self.seen = (x.unique() for x in self.liked)                            # who and what is trained on
        n_test = len(self.pairs(TEST)[0].unique())
        if n_test < 3 or len(self.seen) < 4:
            raise ValueError(f"{data.name}: {n_test} users to test on (need 3), {len(self.seen)} items to learn from (need 4): "
                             "need more interactions")

    @property
    def model(self) -> DPPMG:
        """The method."""
        return self.modules["model"]

    def pairs(self, part: int) -> Tensor:
        """Users and items (2, R) of a part of the interactions, on the device."""
        return torch.stack(self.data.pairs(part)).to(self.device)

    def generator(self, stage: str, step: int = 0) -> torch.Generator:
        """The randomness of one step of one stage: a function of the seed, the stage and the step."""
        digest = hashlib.sha256(f"{self.cfg.method.seed}/{stage}/{step}".encode()).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def save(self, optimizer: torch.optim.Optimizer | None = None):
        """Write checkpoint.pt and log.csv; not if a parameter is not finite: then the last good checkpoint stays."""
        for name, value in self.modules.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                raise Diverged(f"stage {self.stage}, step {self.step}: {name} is not finite; the last good checkpoint is kept")
        state = self.model.state() | {name: getattr(self, name) for name in KEPT} | {
            "format": FORMAT, "train": asdict(self.train), "optimizer": optimizer.state_dict() if optimizer else None,
            "others": {n: m.state_dict() for n, m in self.modules.items() if n != "model"}, "torch": str(torch.__version__)}
        with replacing(self.out / "checkpoint.pt") as path:
            try:
                torch.save(state, path)
            except RuntimeError as error:       # what torch makes of a full disk
                raise OSError(f"{path}: cannot be written ({str(error)[:80]}): is the disk full?") from None
        write_csv(self.out / "log.csv", ["stage", "step", "name", "value"], self.log)
        self.saved_at = time.monotonic()

    def restore(self, path: Path):
        """Go on from a checkpoint, if there is one. Raises CheckpointError where it does not fit."""
        if not path.exists():
            return
        state = read_checkpoint(path)
        try:
            self.model.load_state_dict(state["model"])
            for name, values in state["others"].items():
                self.modules[name].load_state_dict(values)
            for name in KEPT:
                setattr(self, name, state[name])
            self.optimizer_state, self.tables = state["optimizer"], {m: t.to(self.device) for m, t in self.tables.items()}
            self.discord = None if self.discord is None else self.discord.to(self.device)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
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
            before = self.seconds.get(stage, [0.0, 0.0])
            self.seconds[stage] = [before[0] + time.perf_counter() - wall, before[1] + time.process_time() - cpu]


def fit(run: Run, optimizer: torch.optim.Optimizer, steps: int, losses: Callable[[torch.Generator], dict[str, Tensor]],
        schedule: Callable[[float], float] = ramp, after: Callable[[int], None] | None = None, every: int = 50,
        clip: float = 1.0):
    """The one training loop: `losses` gives the tensors to log, of which "loss" is descended; `after`(step) follows a step.
    Goes on where a checkpoint left this stage, and writes one from time to time. Raises Diverged on a loss or gradient that
    is not finite (looked at each step on the CPU, elsewhere every `every` steps: it waits for the device)."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    peaks, first = [group["lr"] for group in optimizer.param_groups], run.step
    if run.optimizer_state:
        try:
            optimizer.load_state_dict(run.optimizer_state)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{run.out / 'checkpoint.pt'}: its optimizer does not fit stage {run.stage} "
                                  f"({type(error).__name__}); choose another --out") from None
        run.optimizer_state = None
    bar = tqdm(range(first, steps), run.stage, initial=first, total=steps, disable=not sys.stderr.isatty(), leave=False)
    for step in bar:
        run.busy = True
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * schedule(step / steps)
        parts = losses(run.generator(run.stage, step))
        optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if run.device.type == "cpu" or (step + 1) % every == 0:
            check_finite(run, step, parts | {"gradient": norm})
        nn.utils.clip_grads_with_norm_(params, clip, norm)
        optimizer.step()
        run.step = step + 1
        if after:
            after(step)
        if run.step % every == 0 or run.step == steps:
            run.note(run.step, **{name: value.item() for name, value in parts.items()})
            bar.set_postfix(loss=f"{parts['loss'].item():.4f}")
        if run.interrupted or time.monotonic() - run.saved_at > run.train.checkpoint_seconds:
            run.save(optimizer)
        run.busy = False
        if run.interrupted:
            raise KeyboardInterrupt


def check_finite(run: Run, step: int, parts: dict[str, Tensor]):
    """Raises Diverged, naming the part (of the gradient, the parameter), unless all are finite."""
    for name, value in parts.items():
        if not value.isfinite().all():
            if name == "gradient":
                bad = (n for n, p in run.modules.named_parameters() if p.grad is not None and not p.grad.isfinite().all())
                name = f"gradient of {next(bad, 'all parameters together')}"
            raise Diverged(f"stage {run.stage}, step {step}: {name} is {value.item()}; the last good checkpoint is kept; "
                           "try a lower learning rate")


# ---- the stages -----------------------------------------------------------------------------------------------------
# Each trains one part on the training interactions, leaves its figures in run.metrics, and returns one of them in words.

def draw(n: int, size: int, generator: torch.Generator) -> Tensor:
    """size indices below n, with replacement."""
    return torch.randint(n, (size,), generator=generator, device=generator.device)


def in_batches(function: Callable[[Tensor], Tensor], x: Tensor, n: int = 256) -> Tensor:
    """function(x) without gradient, n rows at a time."""
    with torch.no_grad():
        return torch.cat([function(rows) for rows in x.split(n)])


def latents_of(run: Run, images: Tensor) -> Tensor:
    """Latents (B, C, h, h) of uint8 pictures (B, 3, H, H), which never are floats all at once."""
    return in_batches(lambda x: run.model.autoencoder.encode(to_float(x)), images)


def train_autoencoder(run: Run) -> str:
    """Reconstruct the pictures of the items that were liked in training; then standardize the latents."""
    cfg, net = run.cfg.image, run.model.autoencoder

    def losses(generator):
        item = run.seen[draw(len(run.seen), cfg.batch, generator)]
        with run.model.half():
            return {"loss": net.loss(to_float(run.images[item]), cfg.kl, generator)}
    fit(run, adamw(net, cfg.ae_lr, cfg.weight_decay), cfg.ae_steps, losses)
    net.standardize(latents_of(run, run.images[run.seen]))
    x = to_float(run.images[run.seen[:512]])
    error = (in_batches(lambda x: net.decode(net.encode(x)), x) - x).square().mean()
    return f"reconstruction PSNR {10 * math.log10(4 / max(error.item(), 1e-12)):.1f} dB"


def fit_features(run: Run) -> str:
    """PCA of the latents and SVD of TF-IDF, fitted to the items liked in training, computed for all."""
    model, latents = run.model, latents_of(run, run.images)
    model.image_features.fit(latents[run.seen])
    model.text_features.fit(run.tokens[run.seen])
    model.gnn.set_features("image", model.image_features(latents))
    model.gnn.set_features("text", model.text_features(run.tokens))
    return f"{run.cfg.method.image_features} image and {run.cfg.method.text_features} text features"


def train_gnn(run: Run) -> str:
    """Modal-specific graph network by BPR."""
    cfg, model = run.cfg.gnn, run.model

    def losses(generator):
        triplets = sample_triplets(model.graph, cfg.batch, generator, cfg.candidates)
        return {"loss": model.gnn.loss(model.graph, *triplets, model.uses_bf16)}
    fit(run, torch.optim.Adam(model.gnn.parameters(), cfg.lr), cfg.steps, losses, lambda x: 1.0)
    with torch.no_grad():
        run.metrics["stage1"] = rank(run, model.gnn(model.graph), run.liked, run.pairs(TEST))
    return f"recall@20 {run.metrics['stage1']['recall@20']:.4f}"


def rank(run: Run, rows: dict[str, tuple[Tensor, Tensor]], known: Tensor, test: Tensor) -> dict[str, float]:
    """Recall@20 and NDCG@20 of test (user, item) (2, R), of all items but the known (2, E) and the validation items."""
    before = torch.cat([known, run.pairs(VALID)], 1)
    graphs = [build_graph(*x, len(run.data.user_ids), len(run.data.item_ids)).to(run.device) for x in (before, test)]
    return ranking_summary(rows, *graphs)


def train_codebook(run: Run) -> str:
    """Residual VQ-VAE of each modality's preferences; BPR on the reconstruction keeps the codes about ranking."""
    cfg, model = run.cfg.vq, run.model
    with torch.no_grad():
        rows = model.gnn(model.graph)
    model.quantizer.train()
    if run.step == 0:
        for m, (user, _) in rows.items():
            model.quantizer[m].initialize(user[run.users], run.generator(f"k-means {m}"))

    def losses(generator):
        user, pos, neg = sample_triplets(model.graph, cfg.batch, generator)
        parts, total = {}, 0.0
        for m, (p, e) in rows.items():
            out = model.quantizer[m](p[user], generator)
            rebuilt = out.reconstruction * p[user].norm(dim=1, keepdim=True)
            ranking = bpr_loss((rebuilt * e[pos]).sum(1), (rebuilt * e[neg]).sum(1))
            total = total + out.loss + cfg.rank_weight * ranking
            parts |= {f"reconstruction_{m}": out.reconstruction_loss, f"bpr_{m}": ranking}
        return {"loss": total} | parts
    fit(run, torch.optim.Adam(model.quantizer.parameters(), cfg.lr), cfg.steps, losses)
    model.update_preferences()
    model.seed_tables()
    run.metrics["codebook"], quantized = {}, {}
    for m, (p, e) in rows.items():
        codes, unit = getattr(model, f"tokens_{m}")[run.users], model.decode_tokens(m)
        quantized[m] = unit * p.norm(dim=1, keepdim=True), e
        kept = explained(p[run.users], unit[run.users].detach())
        run.metrics["codebook"][m] = codebook_health(codes, cfg.codes) | {"explained": kept}
    recall = rank(run, quantized, run.liked, run.pairs(TEST))["recall@20"]
    run.metrics["stage1"]["recall@20_quantized"] = recall
    return f"recall@20 from tokens {recall:.4f}"


def liked_batch(run: Run, modality: str, n: int, null_rate: float, generator) -> tuple[Tensor, Tensor, Tensor]:
    """n training interactions: items (n,), their prompts (n, P), the users' tokens (n, M), null at null_rate."""
    user, item = run.liked[:, draw(run.liked.shape[1], n, generator)]
    prefs = drop_preferences(run.model.user_tokens(user)[modality], null_rate, generator)
    return item, run.prompt[item], prefs


def validate(run: Run, modality: str, loss: Callable[[Tensor, Tensor, Tensor], Tensor], n: int = 512) -> float:
    """Log the loss on the first n interactions of the validation part, or of training where there is none: items (n,), their
    prompts (n, P), the users' tokens (n, M)."""
    pairs = run.pairs(VALID)
    user, item = (pairs if pairs.shape[1] else run.liked)[:, :n]
    with torch.no_grad():
        run.note(run.step, loss_validation=loss(item, run.prompt[item], run.model.user_tokens(user)[modality]))
    return run.log[-1][-1]


def train_text(run: Run) -> str:
    """GPT-style decoder on the texts that users liked, given the prompt and their tokens."""
    cfg, net = run.cfg.text, run.model.text

    def losses(generator):
        item, prompt, prefs = liked_batch(run, "text", cfg.batch, cfg.null_rate, generator)
        with run.model.half():
            return {"loss": net.loss(run.tokens[item], prompt, prefs)}
    fit(run, adamw(net, cfg.lr, cfg.weight_decay), cfg.steps, losses)
    loss = validate(run, "text", lambda item, prompt, prefs: net.loss(run.tokens[item], prompt, prefs))
    return f"validation loss {loss:.3f} nats per token"


def train_image(run: Run) -> str:
    """Denoiser on the latents of the pictures that users liked; the running mean of its weights is what remains."""
    cfg, net, average = run.cfg.image, run.model.image, run.modules["average"]
    latents = latents_of(run, run.images)
    if run.step == 0:
        average.load_state_dict(net.state_dict())

    def losses(generator):
        item, prompt, prefs = liked_batch(run, "image", cfg.batch, cfg.null_rate, generator)
        with run.model.half():
            return {"loss": net.loss(latents[item], prompt, prefs, generator)}
    fit(run, adamw(net, cfg.lr, cfg.weight_decay), cfg.steps, losses, lambda x: ramp(x, hold=0.5),
        lambda step: ema_update(average, net, cfg.ema, step))
    net.load_state_dict(average.state_dict())
    chance = run.generator("image validation")
    loss = validate(run, "image", lambda item, prompt, prefs: net.loss(latents[item], prompt, prefs, chance))
    return f"validation loss {loss:.4f}"


def scorer_items(run: Run) -> dict[str, Tensor]:
    """Training items of the scorer and of the judge: two halves of the items liked in training, without a common one."""
    halves = disjoint_halves(len(run.seen), run.generator("halves"))
    return {name: run.seen[half] for name, half in zip(("scorer", "judge"), halves)}


def train_scorer(run: Run) -> str:
    """The contrastive scorer of the reward; for the stage "judge", its twin with other items and another seed."""
    cfg, halves = run.cfg.reward, scorer_items(run)
    net = run.modules["judge"] if run.stage == "judge" else run.model.scorer
    own, other = halves[run.stage], halves["scorer" if run.stage == "judge" else "judge"]

    def losses(generator):
        batch = own[draw(len(own), min(cfg.scorer_batch, len(own)), generator)]
        return {"loss": net.loss(to_float(run.images[batch]), run.tokens[batch], run.prompt[batch], generator)}
    fit(run, adamw(net, cfg.scorer_lr, 0.01), cfg.scorer_steps, losses)
    found = embed(net, contents(run, other[:256]))
    share = judge_consistency(found["image"], found["text"]).mean().item()
    run.note(cfg.scorer_steps, held_out_auc=share)
    return f"a picture finds its text before {share:.1%} of others, on items that it was not trained on"


def contents(run: Run, item: Tensor) -> Content:
    """Pictures and texts of items (B,)."""
    return Content(to_float(run.images[item]), run.tokens[item])


def train_referee(run: Run) -> str:
    """Stickers only: learn to read pictures from freshly drawn ones."""
    if run.world is None:
        return "not needed: tastes are not known"
    cfg, net, seed, autoencoder = run.train, run.modules["referee"], run.cfg.method.seed, run.model.autoencoder
    pictures, values = (x.to(run.device) for x in draw_batch(cfg.referee_pictures, np.random.default_rng([seed, 3])))

    def losses(generator):
        row = draw(len(pictures), 64, generator)
        return {"loss": net.loss(pictures[row], values[row], generator)}
    fit(run, adamw(net, 2e-3), cfg.referee_steps, losses)
    pictures, values = (x.to(run.device) for x in draw_batch(1000, np.random.default_rng([seed, 4])))
    seen = in_batches(lambda x: autoencoder.decode(autoencoder.encode(F.interpolate(x, run.images.shape[2:]))), pictures)
    for name, shown in {"referee": pictures, "autoencoder": seen}.items():
        found = in_batches(net.read, shown)
        run.metrics[name] = dict(zip(SEEN, (found == values).double().mean(0).tolist()))
    return "right on fresh stickers: " + ", ".join(f"{n} {share:.1%}" for n, share in run.metrics["referee"].items())


def draw_by_discord(discord: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """DEVIATION 19: the users of a round, who differ, in proportion to the square of discord (U,) > 0: those whose image and
    text agree already have little to learn. -> (min(n, U),) int64 in [0, U)."""
    return torch.multinomial(discord.square(), min(n, len(discord)), generator=generator)


def train_reward(run: Run) -> str:
    """REINFORCE: the token tables, and nothing else, learn to please the reward."""
    cfg, model = run.cfg.reward, run.model
    tables = {m: getattr(model, m).preference.weight for m in MODALITIES}
    if run.step == 0:
        run.tables = {m: table.detach().clone() for m, table in tables.items()}
        watch(run)
        run.discord = torch.ones(len(run.users), device=run.device)
    model.requires_grad_(False)
    optimizer = token_optimizer({m: table.requires_grad_() for m, table in tables.items()}, cfg)

    def losses(generator):
        row = draw_by_discord(run.discord, cfg.groups, generator)
        user, with_kl = run.users[row], (run.step + 1) % cfg.log_every == 0
        prompt = run.prompt[sample_positives(model.graph, user, generator)]
        step = model.reinforce_step(user, prompt, run.tables, with_kl, generator)
        run.discord[row] = (1 - step.parts.consistency).clamp(min=1e-3)
        kl = {"kl_image": step.kl_image, "kl_text": step.kl_text} if with_kl else {}
        return {"loss": step.loss} | {name: value.mean() for name, value in step.parts._asdict().items()} | kl

    def after(step):
        if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.rounds:
            watch(run)
    fit(run, optimizer, cfg.rounds, losses, lambda x: ramp(x, warm=0.1, hold=0.7), after, every=1, clip=math.inf)
    model.requires_grad_(True)
    name = "valid_consistency" if run.world else "valid_judge_consistency"
    values = [value for stage, _, key, value in run.log if (stage, key) == ("reward", name)]
    return f"{name[6:]} on validation pairs {values[0]:.3f} -> {values[-1]:.3f}"


def watch(run: Run):
    """Log the measures on a few validation pairs: what does the reward do to them? The judge is no part of the reward."""
    pairs = draw_pairs(run, VALID if len(run.data.pairs(VALID)[0]) else TRAIN, 96)
    found = measures(run, pairs, *make(run, "after_reward", pairs, run.generator("watch")))
    run.note(run.step, **{f"valid_{n}": v.mean() for n, v in found.items() if n != "copied"})


# ---- evaluation: on what was held out, by a judge or referee that the reward never saw ------------------------------

VARIANTS = ("real", "unpersonalized", "before_reward", "after_reward")


class Pairs(NamedTuple):
    user: Tensor        # (B,) int64
    item: Tensor        # (B,) int64: gives the prompt, and for "real" the content
    other: Tensor       # (B,) int64: another user, at random


def draw_pairs(run: Run, part: int, n: int) -> Pairs:
    """At most n interactions of a part of the data, at random, each with another user of the training."""
    user, item = run.pairs(part)
    generator = run.generator(f"pairs {part}")
    rows = torch.randperm(len(user), generator=generator, device=run.device)[:n]
    place = torch.searchsorted(run.users, user[rows]) + 1 + draw(len(run.users) - 1, len(rows), generator)
    return Pairs(user[rows], item[rows], run.users[place % len(run.users)])


def make(run: Run, variant: str, pairs: Pairs, generator: torch.Generator) -> tuple[Content, Content]:
    """What a variant gives for the pairs, and what it gives for the same prompts and the other users.
    real: the items, and other items with the same prompt (the same item where there is no other)."""
    if variant == "real":
        order, count, own = run.topic.argsort(stable=True), run.topic.bincount(), run.topic[pairs.item]
        place = draw(2**62, len(own), generator) % count[own]
        return contents(run, pairs.item), contents(run, order[(count.cumsum(0) - count)[own] + place])
    own, other = (make_for(run, variant, user, pairs.item, generator) for user in (pairs.user, pairs.other))
    return own, other


def make_for(run: Run, variant: str, user: Tensor, item: Tensor, generator: torch.Generator) -> Content:
    """What a variant (all but "real") generates for users (B,) and the prompts of items (B,)."""
    model, prefs = run.model, run.model.user_tokens(user)
    if variant == "unpersonalized":
        prefs = {m: torch.full_like(tokens, -1) for m, tokens in prefs.items()}
    tables = run.tables if variant == "before_reward" else {m: getattr(model, m).preference.weight.data for m in MODALITIES}
    with table_as(model.image, tables["image"]), table_as(model.text, tables["text"]):
        return Content(*model.sample_pairs(run.prompt[item], prefs, generator))


def exact_measures(run: Run, user: Tensor, item: Tensor, content: Content) -> dict[str, Tensor]:
    """Stickers: what the referee and the grammar find, (B,) each; the README's glossary says what each name means."""
    read = in_batches(run.modules["referee"].read, content.images).cpu()                    # (B, 4)
    text = torch.tensor([read_text(t) for t in run.model.tokenizer.decode_batch(content.tokens)])      # (B, 3)
    subject, readable = torch.tensor([SUBJECTS.index(run.data.prompts[i][0]) for i in item.tolist()]), text[:, 0] >= 0

    def liking(attribute: str, value: Tensor) -> Tensor:
        p = torch.from_numpy(run.world.tastes[attribute])[user.cpu()]                       # (B, values)
        return p.gather(1, value.clamp(min=0)[:, None])[:, 0] / p.amax(1)
    shown = {"image": dict(zip(SEEN, read.T)), "text": dict(setting=text[:, 1], tone=text[:, 2])}
    image, words = (torch.stack([liking(a, shown[m][a]) for a in SHOWS[m]]).mean(0) for m in MODALITIES)
    return {"prompt_image": read[:, 0] == subject, "prompt_text": text[:, 0] == subject,
            "consistency": (read[:, :2] == text[:, :2]).all(1), "utility_image": image, "utility_text": words * readable,
            "grammatical": readable}


def judge_likes(run: Run) -> dict[str, Tensor]:
    """What each user likes in the judge's eyes (U, D): the mean of the held-out items (validation and test) that the user
    liked, of which neither the generators nor the reward have learnt. Computed once: the judge is trained by then."""
    if run.likes:
        return run.likes
    held = torch.cat([torch.stack(run.data.pairs(part)) for part in (VALID, TEST)], 1).to(run.device)
    judge = run.modules["judge"]
    items = {"image": in_batches(lambda x: judge.encode_image(to_float(x)), run.images),
             "text": in_batches(judge.encode_text, run.tokens)}
    run.likes = {m: taste(items[m], *held, len(run.data.user_ids)) for m in MODALITIES}
    return run.likes


def measures(run: Run, pairs: Pairs, own: Content, other: Content) -> dict[str, Tensor]:
    """Every per-pair measure of a variant, (B,) each."""
    found = {}
    if run.world:
        found, others = (exact_measures(run, pairs.user, pairs.item, content) for content in (own, other))
        found |= {f"swap_{m}": swap_share(found[f"utility_{m}"], others[f"utility_{m}"]) for m in MODALITIES}
    likes = {m: x[pairs.user] for m, x in judge_likes(run).items()}
    found |= judge_measures(run.modules["judge"], own, other, likes, run.prompts, run.topic[pairs.item])
    known = {run.data.texts[i] for i in run.seen.tolist()}
    found["copied"] = torch.tensor([t in known for t in run.model.tokenizer.decode_batch(own.tokens)])
    return {name: value.double().cpu() for name, value in found.items()}


def evaluate(run: Run) -> str:
    """Every variant's measures on the test part, with intervals; what the tokens tell; people who were not in training."""
    pairs, table, judge = draw_pairs(run, TEST, run.train.pairs), {}, run.modules["judge"]
    liked = run.liked[1, draw(run.liked.shape[1], len(pairs.user), run.generator("frechet"))]
    tenth = pairs.user.unique(return_inverse=True)[1] % 10          # of the users: left out in turn
    for variant in VARIANTS:
        own, other = make(run, variant, pairs, run.generator("evaluation"))
        table[variant] = {n: interval(v, pairs.user) for n, v in measures(run, pairs, own, other).items()}
        features = [embed(judge, content)["image"] for content in (own, contents(run, liked))]
        table[variant]["frechet_image"] = frechet_interval(*features, tenth, min(10, int(tenth.max()) + 1))
    run.metrics["generation"] = table
    if run.world:
        run.metrics["probe"] = probe(run)
    run.metrics["new_users"] = evaluate_new_users(run)
    name = "consistency" if run.world else "judge_consistency"
    return f"{name} {table['before_reward'][name]['mean']:.3f} before, {table['after_reward'][name]['mean']:.3f} after"


def probe(run: Run) -> dict[str, dict[str, float]]:
    """Stickers: accuracy with which a linear probe finds each user's favourite value of an attribute in the image tokens, in
    the text tokens, in the shares of the values among the user's training items, and the commonest favourite's share."""
    user, item = run.liked.cpu()
    users, found = run.users.cpu(), {}
    for k, (attribute, values) in enumerate(ATTRIBUTES.items()):
        favourite = torch.from_numpy(run.world.tastes[attribute]).argmax(1)[users]
        one_hot = F.one_hot(torch.from_numpy(run.world.items[:, k]), len(values)).double()
        history = taste(one_hot, user, item, len(run.data.user_ids))[users]
        inputs = {m: run.model.decode_tokens(m).cpu()[users] for m in MODALITIES} | {"history": history}
        found[attribute] = {n: linear_probe(x, favourite, len(values)) for n, x in inputs.items()}
        found[attribute]["commonest"] = favourite.bincount().max().item() / len(users)
    return found


def evaluate_new_users(run: Run) -> dict[str, dict]:
    """Users kept out of all training, folded in from their first k interactions: recall@20 and, on stickers, the utility of
    what is generated for the prompts of their test items; beside the same for users in training."""
    history, test, model, n_users = run.new["history"], run.new["test"], run.model, len(run.data.user_ids)
    if not test.shape[1]:
        return {}
    found, order = {}, torch.arange(history.shape[1], device=run.device)
    nth = order - torch.searchsorted(history[0], history[0])        # of its user's history; users ascend
    some = test[:, ::-(-test.shape[1] // run.train.pairs)]         # no more than `pairs` to generate for
    with torch.no_grad():
        rows = model.gnn(model.graph)

    def utility(user: Tensor, item: Tensor, prefs: dict[str, Tensor]) -> dict[str, dict]:
        content = Content(*model.sample_pairs(run.prompt[item], prefs, run.generator("new users")))
        found = exact_measures(run, user, item, content)
        return {n: interval(found[n], user) for n in ("utility_image", "utility_text", "consistency")}
    for k in (1, 2, 5, 10, 20):
        first = history[:, nth < k]
        p = model.fold_in_preferences(*first, n_users)
        found[str(k)] = rank(run, {m: (p[m], rows[m][1]) for m in MODALITIES}, first, test)
        if run.world:
            found[str(k)] |= utility(*some, {m: model.quantizer[m].encode(p[m])[some[0]] for m in MODALITIES})
    # from now on they can be generated for like all others
    model.update_preferences(model.fold_in_preferences(*history, n_users), test[0].unique())
    found["in training"] = {n: v for n, v in run.metrics["stage1"].items() if "quantized" not in n}
    if run.world:
        pairs = draw_pairs(run, TEST, some.shape[1])
        found["in training"] |= utility(pairs.user, pairs.item, model.user_tokens(pairs.user))
    return found


# ---- report: one file with all that a person wants to look at -------------------------------------------------------

STYLE = """body{font:14px/1.45 system-ui,sans-serif;max-width:76em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.6em 0}td,th{padding:.15em .6em;text-align:left;vertical-align:top}
thead th{border-bottom:1px solid #999}td.n{text-align:right;font-variant-numeric:tabular-nums}small{color:#666}
img{width:64px;height:64px;image-rendering:pixelated;border-radius:4px;display:block}svg{margin:.3em}
figure{display:inline-block;width:9.5em;margin:.3em .5em .3em 0;vertical-align:top}
figcaption{font-size:12px;overflow-wrap:anywhere}section{border-top:1px solid #ddd;margin-top:1em}
.grid td{padding:2px}.grid th{font-weight:normal;font-size:12px;padding:2px 6px;max-width:64px;overflow-wrap:anywhere}"""
INKS = ("#1f6fb4", "#d1622b", "#2f8f4e", "#8a4fb0", "#b02f55", "#777777")


def picture(x: Tensor, text: str = "", note: str = "") -> str:
    """<figure> of (3, H, W) in [-1, 1] with escaped words below; only <img> without words."""
    data = io.BytesIO()
    to_picture(x).save(data, "PNG")
    image = f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'
    caption = f"{html.escape(text)}<br><small>{html.escape(note)}</small>"
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>" if text else image


def curves(title: str, series: dict[str, list[tuple[float, float]]]) -> str:
    """Inline SVG of curves [(x, y)], with their range and last values; nothing for fewer than two points."""
    points = [p for line in series.values() for p in line]
    if len(points) < 2:
        return ""
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))

    def words(x: int, y: int, text: str | float, style: str = "") -> str:
        text = text if isinstance(text, str) else f"{text:.3g}" if abs(text) < 1000 else f"{text:,.0f}"
        return f'<text x="{x}" y="{y}"{style}>{html.escape(text)}</text>'
    body = [words(34, 12, title, ' font-weight="bold"'), '<path d="M34 20V120H284" stroke="#999" fill="none"/>',
            words(0, 24, y1), words(0, 120, y0), words(34, 134, x0), words(262, 134, x1)]
    for n, (name, line) in enumerate(series.items()):
        ink = INKS[n % len(INKS)]
        places = [(34 + 250 * (x - x0) / ((x1 - x0) or 1), 120 - 100 * (y - y0) / ((y1 - y0) or 1)) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        body += [f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="1.5"/>',
                 words(292, 26 + 15 * n, f"{name} {line[-1][1]:.3g}", f' fill="{ink}"')]
    return f'<svg width="500" height="140" font-size="11">{"".join(body)}</svg>'


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """<table>, all escaped; numbers to the right, intervals {"mean", "low", "high"} in brackets."""
    def cell(v):
        if isinstance(v, dict):
            v = f"{v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]"
        return f'<td class="n">{v:.3f}</td>' if isinstance(v, float) else f"<td>{html.escape(str(v))}</td>"
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{''.join(f'<th>{html.escape(h)}</th>' for h in head)}</tr></thead>{body}</table>"


def report_numbers(run: Run) -> str:
    """The tables of metrics.json."""
    m, variants = run.metrics, run.metrics["generation"]
    body = "<h2>What was measured</h2><p>On the test part; 95 % intervals in brackets.</p>"
    body += table(["", *variants], [[name, *(v[name] for v in variants.values())] for name in variants["real"]])
    body += table(["stage 1, test part", ""], list(m["stage1"].items()))
    body += table(["codebook", "level", "usage", "perplexity", "explained", "collisions"],
                  [[k, str(n + 1), h["usage"][n], h["perplexity"][n], h["explained"], h["collision_rate"]]
                   for k, h in m["codebook"].items() for n in range(len(h["usage"]))])
    for title, rows in (("favourite found by a linear probe in", m.get("probe")), ("new users, history of", m["new_users"])):
        if rows:
            heads = list(next(iter(rows.values())))
            body += table([title, *heads], [[name, *(row[h] for h in heads)] for name, row in rows.items()])
    return body + table(["stage", "seconds", "CPU seconds"], [[s, *t] for s, t in run.seconds.items()])


def report_curves(run: Run) -> str:
    """Reward and measures over the rounds, and the losses of the stages."""
    lines: dict[str, dict[str, list]] = {}
    for stage, step, name, value in run.log:
        lines.setdefault(stage, {}).setdefault(name, []).append((step, value))
    reward, body = lines.pop("reward", {}), "<h2>Reward</h2>"
    for names in (("consistency", "valid_judge_consistency", "valid_consistency"), ("s_image", "s_text"),
                  ("kl_image", "kl_text"), [f"valid_{k}_{m}" for k in ("utility", "prompt") for m in MODALITIES],
                  [f"valid_judge_{k}_{m}" for k in ("swap", "prompt") for m in MODALITIES]):
        body += curves("over the rounds of the reward", {n: reward[n] for n in names if n in reward})
    return body + "<h2>Losses</h2>" + "".join(curves(stage, of) for stage, of in lines.items())


def report_codes(run: Run) -> str:
    """What each code of the first level means: the words and values that its users like most above average."""
    if run.world:
        words = [{f"{a} {ATTRIBUTES[a][v]}" for a, v in zip(ATTRIBUTES, values)} for values in run.world.items]
    else:
        texts = [f"{text} {' '.join(phrases)}".casefold() for text, phrases in zip(run.data.texts, run.data.prompts)]
        words = [set(re.findall(r"\w+", text)) for text in texts]
    common = Counter(word for has in words for word in has)
    names = sorted(word for word, n in common.items() if n >= max(2, len(words) // 200))
    traits = torch.tensor([[word in has for word in names] for has in words])               # (I, W)
    users, rows = run.users.cpu(), []
    shares = torch.cat([taste(some.double(), *run.liked.cpu(), len(run.data.user_ids))[users]           # (U, W), 16 words at
                        for some in traits.split(16, 1)], 1)                                            # a time of (E, W)
    for m in MODALITIES:
        lift = code_lift(getattr(run.model, f"tokens_{m}").cpu()[users, 0], shares, run.cfg.vq.codes)   # (K, W)
        for code, (value, place) in enumerate(zip(*lift.topk(min(4, len(names)), dim=1))):
            rows.append([m, str(code), ", ".join(f"{names[i]} (+{v:.1f})" for v, i in zip(value, place.tolist()) if v > 1)])
    head = ["modality", "code", "liked above average (standard errors)"]
    return f"<h2>What each code of the first level means</h2>{table(head, rows)}"


def shown_prompts(run: Run, n: int) -> Tensor:
    """An item for each of the n commonest prompts."""
    common = run.topic.bincount().argsort(descending=True, stable=True)[:n, None]           # (n, 1)
    return (run.topic == common).int().argmax(1)


def report_grid(run: Run, users: Tensor) -> str:
    """8 users x 8 prompts: one sees the taste along a row and the prompt down a column."""
    items = shown_prompts(run, 8)
    who = users.repeat_interleave(len(items))
    own = make_for(run, "after_reward", who, items.repeat(len(users)), run.generator("grid"))
    texts = run.model.tokenizer.decode_batch(own.tokens)
    cells = [f'<td title="{html.escape(text)}">{picture(x)}</td>' for x, text in zip(own.images, texts)]
    rows = "".join(f"<tr><th>{html.escape(run.data.user_ids[u])}</th>{''.join(cells[k * len(items):(k + 1) * len(items)])}</tr>"
                   for k, u in enumerate(users.tolist()))
    head = "".join(f"<th>{html.escape(', '.join(run.data.prompts[i])[:40])}</th>" for i in items.tolist())
    return ("<h2>One row a user, one column a prompt</h2><p>After the reward; the text is shown under the pointer.</p>"
            f'<table class="grid"><tr><th></th>{head}</tr>{rows}</table>')


def report_user(run: Run, user: Tensor) -> str:
    """History, tokens, and what was generated before and after the reward, with the reward's parts."""
    model, data, prompts = run.model, run.data, shown_prompts(run, 3)
    liked = run.liked[1, run.liked[0] == user][:8].tolist()
    history = "".join(picture(to_float(data.images[i]), data.texts[i]) for i in liked)
    tokens = "; ".join(f"{m} {' '.join(map(str, k.tolist()))}" for m, k in model.user_tokens(user).items())
    who, made = user.expand(len(prompts)), []
    for variant in ("before_reward", "after_reward"):
        own = make_for(run, variant, who, prompts, run.generator(f"report {user}"))
        with torch.no_grad():
            emb = embed(model.scorer, own)
            likes = [model.score("image", model.preference_image[who], model.autoencoder.encode(own.images)),
                     model.score("text", model.preference_text[who], own.tokens)]
        parts = zip((emb["image"] * emb["text"]).sum(1), *likes)
        notes = [f"cos {c:.2f}, s image {a:.2f}, s text {b:.2f}" for c, a, b in parts]
        made.append("".join(map(picture, own.images, model.tokenizer.decode_batch(own.tokens), notes)))
    return (f"<section><h3>User {html.escape(data.user_ids[user])}</h3><p>Preference tokens: {tokens}. Likes:</p>{history}"
            f"<p>Made before the reward:</p>{made[0]}<p>And after:</p>{made[1]}</section>")


def write_report(run: Run):
    """report.html: self-contained; every word from the data is escaped."""
    candidates = run.data.pairs(TEST)[0].unique()
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(run.cfg.method.seed))
    users, name = candidates[order[:12]].to(run.device), html.escape(run.data.name)
    body = (f"<h1>DPPMG on {name}</h1><p>seed {run.cfg.method.seed}, {run.device}, {len(run.data.user_ids):,} users, "
            f"{len(run.data.item_ids):,} items</p>" + report_grid(run, users[:8]) + report_numbers(run) + report_curves(run)
            + report_codes(run) + "<h2>A dozen users</h2>" + "".join(report_user(run, u) for u in users))
    write_page(run.out / "report.html", f"DPPMG on {name}", body)


def write_page(path: Path, title: str, body: str):
    """An HTML page without any reference to another file."""
    with replacing(path) as temporary:
        temporary.write_text(f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
                             f"<body>{body}</body></html>", encoding="utf-8")


# ---- running the stages ---------------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[Run], str]] = {
    "autoencoder": train_autoencoder, "features": fit_features, "gnn": train_gnn, "codebook": train_codebook,
    "text": train_text, "image": train_image, "scorer": train_scorer, "judge": train_scorer, "referee": train_referee,
    "reward": train_reward, "evaluation": evaluate}


def train_all(run: Run, stages: Sequence[str] = tuple(STAGES)):
    """All of the stages that are not done yet. A line and a checkpoint at the end of each."""
    for stage in stages:
        if stage in run.done:
            continue
        if run.stage != stage:
            run.stage, run.step, run.optimizer_state = stage, 0, None
        with run.timed(stage):
            merit = STAGES[stage](run)
            run.done.append(stage)
        tqdm.write(f"{stage:12} {run.seconds[stage][0]:7.1f} s   {merit}")
        run.save()


def finish(run: Run):
    """Report and metrics.json: with the latter a run is finished."""
    with run.timed("report"):
        write_report(run)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    wall, cpu = ({stage: round(t[k], 2) for stage, t in run.seconds.items()} for k in (0, 1))
    wall["total"], cpu["total"] = (round(sum(times.values()), 2) for times in (wall, cpu))
    machine = {"device": str(run.device), "threads": torch.get_num_threads()}
    spent = {"seconds": wall, "peak_memory_mb": round(peak), "cpu_seconds": cpu}
    found = {"dataset": run.data.name, "seed": run.cfg.method.seed} | machine | spent | run.metrics
    with replacing(run.out / "metrics.json") as path:
        path.write_text(json.dumps(found, indent=1))
    tqdm.write(f"{'total':12} {wall['total']:7.1f} s   {run.out / 'report.html'}")


# ---- studies: runs that differ in one thing and share the stages before it ------------------------------------------

SHARED = {"pareto": ("autoencoder", "features", "gnn", "codebook", "text", "image", "scorer", "judge", "referee"),
          "bits": ("autoencoder", "features", "gnn", "scorer", "judge", "referee")}
RATIOS = ((0.0, 1.0), (0.25, 1.0), (0.5, 1.0), (1.0, 1.0), (2.0, 1.0), (1.0, 0.0))           # lambda_p : lambda_c
BITS = ((1, 32), (2, 32), (3, 32), (4, 32), (4, 64))                                        # levels, codes


def fork(run: Run, study: str, name: str, **parts) -> Run:
    """A run with other settings that starts with the stages which the study shares; every tensor that fits is taken over."""
    cfg, train = replace(run.cfg, **parts), replace(run.train, new_users=0)
    new = Run(cfg, train, run.data, run.world, run.out / name, run.device)
    new.out.mkdir(exist_ok=True)
    mine, theirs = new.modules.state_dict(), run.modules.state_dict()
    new.modules.load_state_dict({k: theirs[k] if k in theirs and theirs[k].shape == v.shape else v for k, v in mine.items()})
    new.done, new.metrics, new.new = list(SHARED[study]), copy.deepcopy(run.metrics), run.new
    new.restore(new.out / "checkpoint.pt")
    return new


def study_rows(run: Run, study: str):
    """Yields the label and the forked, not yet trained run of each row, and the stages that it still needs."""
    reward, vq = run.cfg.reward, run.cfg.vq
    if study == "pareto":
        yield "no reward", run, ()
        for p, c in RATIOS:
            total = (reward.lambda_p + reward.lambda_c) / (p + c)       # as strong against the KL as the default
            weights = replace(reward, lambda_p=total * p, lambda_c=total * c)
            yield f"{p:g} : {c:g}", fork(run, study, f"ratio-{p:g}-{c:g}", reward=weights), ("reward",)
        return
    for levels, codes in BITS:
        row = fork(run, study, f"bits-{levels}-{codes}", vq=replace(vq, levels=levels, codes=codes))
        yield f"{levels} x {math.log2(codes):g} = {levels * math.log2(codes):g}", row, ("codebook", "text", "image")
    raw = fork(run, study, "raw", vq=replace(vq, levels=1, codes=len(run.data.user_ids)))
    if not (raw.out / "checkpoint.pt").exists():        # else it has been restored, tables trained and all
        raw.model.use_raw_preferences()
    yield f"raw vector = {32 * run.cfg.gnn.dim}", raw, ("text", "image")


def run_study(run: Run, study: str):
    """Train what the rows share, then each row; study.json and study.html: a table and a curve of the trade-off."""
    train_all(run, SHARED[study])
    rows = []
    for label, row, stages in study_rows(run, study):
        tqdm.write(f"-- {study}: {label}")
        train_all(row, stages)
        pairs, stage1 = draw_pairs(row, TEST, row.train.pairs), row.metrics["stage1"]
        found = measures(row, pairs, *make(row, "after_reward", pairs, row.generator("evaluation")))
        recall = {"recall@20": stage1["recall@20"]}         # of raw preferences also that of what is not quantized
        recall["recall@20_quantized"] = stage1.get("recall@20_quantized", recall["recall@20"])
        rows.append({"row": label} | recall | {n: interval(v, pairs.user) for n, v in found.items()})
    liking, kind = ("utility", "") if run.world else ("judge_swap", "judge_")
    liking, consistency = [f"{liking}_{m}" for m in MODALITIES], f"{kind}consistency"
    keys = ["row", *recall, *liking, consistency, *(f"{kind}prompt_{m}" for m in MODALITIES)]
    cells = [[row.get(key, "") for key in keys] for row in rows]
    across = [row[consistency]["mean"] if study == "pareto" else n for n, row in enumerate(rows)]
    lines = {name: sorted(zip(across, (row[name]["mean"] for row in rows))) for name in liking}
    with replacing(run.out / "study.json") as path:
        path.write_text(json.dumps(rows, indent=1))
    title = f"Study {study} on {html.escape(run.data.name)}, seed {run.cfg.method.seed}"
    axis = f"over {consistency}" if study == "pareto" else "over the rows of the table"
    write_page(run.out / "study.html", title, f"<h1>{title}</h1>" + table(keys, cells) + curves(axis, lines))
    for row in [keys, *cells]:
        values = (cell["mean"] if isinstance(cell, dict) else cell for cell in row)
        tqdm.write("  ".join(f"{value:.3f}" if isinstance(value, float) else value for value in values))


# ---- command line ---------------------------------------------------------------------------------------------------

PARTS = {f.name: type(f.default) for f in fields(Config)} | {"train": TrainConfig}
SMOKE = {"train": dict(items=160, users=40, interactions=12, referee_pictures=256, referee_steps=20, pairs=40, new_users=0.1),
         "gnn": dict(steps=30, batch=256), "vq": dict(steps=30, codes=8, levels=2, batch=32),
         "text": dict(steps=20, layers=2, width=32, heads=2, vocab_size=320),
         "image": dict(steps=20, ae_steps=20, ae_width=16, width=16, batch=16, sampling_steps=4),
         "reward": dict(scorer_steps=20, scorer_width=8, scorer_batch=32, rounds=4, groups=4, images=4, texts=4,
                        diffusion_steps=4, grad_steps=2, log_every=2), "method": dict(image_features=16, text_features=16)}


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, dict]]:
    """Arguments, and the settings that were given: group -> name -> value."""
    parser = OneLineParser(prog="train.py", description="Train DPPMG, evaluate it, report.", allow_abbrev=False)
    parser.add_argument("--data", help="data folder, in the format that dppmg.py describes; none: stickers")
    parser.add_argument("--min-rating", type=float, metavar="R", help="what is rated lower is no like")
    parser.add_argument("--drop-incomplete", action="store_true", help="leave incomplete items out")
    parser.add_argument("--out", help="folder of the run (runs/NAME, the first that is free)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, or with the latest unfinished one")
    parser.add_argument("--smoke", action="store_true", help="every stage, tiny: does it run?")
    parser.add_argument("--study", choices=SHARED, help="runs side by side: pareto (reward weights), bits (codes)")
    parser.add_argument("--device", help="cuda, mps or cpu (the first there is)")
    parser.add_argument("--width", type=int, help="shorthand for --text-width and --image-width")
    parser.add_argument("--layers", type=int, help="shorthand for --text-layers and --image-layers")
    groups = {name: parser.add_argument_group(name) for name in PARTS}
    for group, name, field, text in settings(PARTS):
        groups[group].add_argument(flag_of(group, name), dest=f"{group}.{name}", type=type(field.default), metavar="N",
                                   help=f"{text} ({field.default})".replace("%", "%%"))
    args, given = parser.parse_args(argv), {group: {} for group in PARTS}
    for key, value in vars(args).items():
        group, _, name = key.partition(".")
        if name and value is not None:
            given[group][name] = value
    for key in ("width", "layers"):
        for m in MODALITIES if getattr(args, key) is not None else ():
            given[m].setdefault(key, getattr(args, key))
    return args, given


def open_run(args: argparse.Namespace, given: dict[str, dict]) -> Run:
    """A new run, or the unfinished one that is to go on. Raises ValueError or OSError where neither is possible."""
    small = SMOKE if args.smoke else {}
    parts = {group: part(**small.get(group, {}) | given[group]) for group, part in PARTS.items()}
    asked = {"data": os.path.abspath(args.data) if args.data else None, "study": args.study,
             "settings": {name: asdict(part) for name, part in parts.items()}}
    out = find_out(args)
    if out and (out / "config.json").exists():
        asked = same_settings(out, asked, args, given)
        parts = {name: part(**asked["settings"][name]) for name, part in PARTS.items()}
    train, device = parts.pop("train"), pick_device(args.device)
    cfg, folder, world = Config(**parts), asked["data"], None
    seed, size = cfg.method.seed, cfg.image.size
    if folder is None:
        world, out = sticker_world(train, seed), out or free_folder("smoke" if args.smoke else "stickers")
        folder = out / "stickers"
        if not (folder / "interactions.csv").exists():
            write_settings(out, asked)          # first: what is killed while it draws can be resumed
            write_stickers(folder, world, seed)
    data = Dataset.load(folder, size, seed, args.min_rating, args.drop_incomplete)
    out, found, args.study = out or free_folder(data.name), data.fingerprint(), asked["study"]
    if asked.setdefault("fingerprint", found) != found:
        raise ValueError(f"{out}: the data has changed since this run began; choose another --out")
    run = Run(cfg, train, data, world, out, device)
    write_settings(out, asked)
    return run


def write_settings(out: Path, asked: dict):
    """config.json; and what a run that was killed in the middle of a file has left is removed."""
    out.mkdir(parents=True, exist_ok=True)
    for half in out.glob(".*.tmp"):
        half.unlink()
    with replacing(out / "config.json") as path:
        path.write_text(json.dumps(asked, indent=1))


def find_out(args: argparse.Namespace) -> Path | None:
    """The folder that was asked for, or that --resume means; None: a new one. Raises ValueError where it cannot serve."""
    out = Path(args.out) if args.out else None
    if args.resume and out is None:
        begun = [p for p in Path("runs").glob("*/config.json") if not (p.parent / "metrics.json").exists()]
        if not begun:
            raise ValueError("--resume: no unfinished run in runs/; name one with --out")
        out = max(begun, key=lambda path: path.stat().st_mtime).parent
    if out and not (out / "config.json").exists():
        if args.resume:
            raise ValueError(f"--resume: {out} holds no run (no config.json)")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out {out}: exists and is not a run; choose another")
    elif out and (out / "metrics.json").exists():
        raise ValueError(f"--out {out}: this run is finished; choose another")
    return out


def same_settings(out: Path, asked: dict, args: argparse.Namespace, given: dict[str, dict]) -> dict:
    """What the run in `out` was begun with; ValueError unless that is what is asked for (with --resume: of what is given)."""
    try:
        there = json.loads((out / "config.json").read_text())
        differ = [flag_of(g, n) for g, part in asked["settings"].items() for n, value in part.items()
                  if (n in given[g] or not args.resume) and there["settings"][g][n] != value]
        differ += [f"--{n}" for n in ("data", "study") if (getattr(args, n) or not args.resume) and there[n] != asked[n]]
        if {name: asdict(part(**there["settings"][name])) for name, part in PARTS.items()} != there["settings"]:
            raise KeyError("a setting is missing")
    except (KeyError, TypeError, ValueError) as error:
        what = f"not the settings of a run ({type(error).__name__}); choose another --out"
        raise ValueError(f"{out}/config.json: {what}") from None
    if differ:
        raise ValueError(f"--out {out}: holds a run with other settings ({', '.join(differ[:5])}); choose another --out")
    return there


def free_folder(name: str) -> Path:
    """runs/NAME, or runs/NAME-2 and so on: the first that does not exist."""
    return next(p for p in (Path("runs") / f"{name}{f'-{n}' * (n > 1)}" for n in range(1, 10**6)) if not p.exists())


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
        wall, cpu = time.perf_counter(), time.process_time()
        run = open_run(args, given)
        run.seconds["data"] = [time.perf_counter() - wall, time.process_time() - cpu]
        run.restore(run.out / "checkpoint.pt")
        for notice in run.data.notices + [f"{run.n_cut} texts cut to {run.cfg.text.context} tokens"] * (run.n_cut > 0):
            tqdm.write(f"note: {notice}")
        if args.study:
            run_study(run, args.study)
        else:
            train_all(run)
            finish(run)
    except KeyboardInterrupt:
        print(f"interrupted; go on with: python train.py --resume --out {run.out}" if run else "interrupted", file=sys.stderr)
        return 130
    except (Diverged, ValueError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Diverged) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
