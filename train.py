"""Train DPPMG stage by stage, evaluate it on what was held out, and report.

    python train.py                       stickers, the built-in data
    python train.py --data DIR            your data (the format: dppmg.py)
    python train.py --smoke               every stage, tiny
    python train.py --resume --out RUN    go on with a run that was stopped

A run leaves config.json, checkpoint.pt, log.csv, metrics.json and report.html in runs/NAME/
(--out). It can be killed at any time: all randomness is a function of (seed, stage, step), so a
resumed run ends with the same bits.

Shapes: as in dppmg.py; A attributes of a sticker; in evaluation G users of S samples each.
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
import platform
import re
import shutil
import signal
import sys
import time
from collections import Counter
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

from dppmg import (FORMAT, MODALITIES, TEST, TRAIN, VALID, Catalogue, CheckpointError, Config,
                   Dataset, DPPMG, OneLineParser, check_limits, flag_of,
                   forgive_terminals, hold_out_users, pick_device,
                   read_checkpoint, replacing, settings, to_picture)
from generators import Tokenizer, drop_preferences, table_as
from gnn import bpr_loss, build_graph, ranking_summary, sample_positives, sample_triplets
from reward import (Content, Scorer, embed, frechet_interval, halves_by_text, interval, judge_pairs,
                    rank_share, share_interval, share_of_pairs, swap_share,
                    taste_without, token_optimizer)
from vq import code_lift, codebook_health, explained


@dataclass(frozen=True)
class TrainConfig:
    items: int = 2000  # stickers in the built-in data
    users: int = 600  # users of the built-in data
    interactions: int = 30  # stickers that each of them likes
    referee_pictures: int = 3000  # freshly drawn stickers that the referee learns from
    referee_steps: int = 300  # optimizer steps of the referee
    pairs: int = 600  # (user, prompt) pairs of the test part to evaluate on
    sampled_users: int = 40  # users for whom many samples are drawn: taste and variety
    samples: int = 32  # samples for each of them
    best_of: int = 4  # pictures among which, with twice as many texts, best_of chooses
    min_rating: float = 0.0  # of the rows of a column of ratings, those of at least so much are likes
    drop_incomplete: bool = False  # leave out items without a readable picture or a text
    new_users: float = 0.08  # share of the users kept out of all training, to be folded in
    checkpoint_seconds: float = 60.0  # between two checkpoints within a stage

    def __post_init__(self):
        least = dict(items=16, users=4, interactions=10, referee_pictures=16, pairs=20, samples=2)
        limits = {f"train.{name}": (low, math.inf) for name, low in least.items()}
        limits |= {"train.interactions": (10, self.items // 2), "train.new_users": (0, 0.5)}
        check_limits("train", self, limits)


# ---- stickers: data whose tastes are known -------------------------------------------------------

TONES = (  # the verbal attribute: six ways of saying the same
    "a {subject} at {setting}.",
    "hooray, the happiest {subject} of the whole {setting}!",
    "softly the {subject} dreams, wrapped in {setting} light",
    "hereby presented: one {subject}, observed at {setting}.",
    "whoops, a silly {subject} tumbles through the {setting}",
    "behold the {subject}! mighty ruler of {setting}!",
)
ATTRIBUTES = {
    "subject": ("fish", "house", "tree", "boat", "star", "heart", "moon", "flower"),
    "setting": ("dawn", "day", "dusk", "night"),
    "colour": ("red", "orange", "yellow", "green", "blue", "purple"),
    "pattern": ("plain", "dots", "stripes"),
    "tone": TONES,
}
SUBJECTS, SETTINGS = ATTRIBUTES["subject"], ATTRIBUTES["setting"]
SEEN = ("subject", "setting", "colour", "pattern")  # in the picture
SHOWS = {"image": SEEN[1:], "text": ("setting", "tone")}  # and the prompt leaves open
SHARPNESS = {"subject": 1.0, "setting": 1.0, "colour": 2.0, "pattern": 2.0, "tone": 2.0}  # std of logits
PAINT = {"red": (214, 40, 40), "orange": (240, 130, 30), "yellow": (250, 215, 50),
         "green": (50, 150, 60), "blue": (40, 90, 215), "purple": (140, 60, 180)}
SKY = {"dawn": ((255, 200, 190), (255, 235, 200)), "day": ((120, 190, 250), (205, 235, 255)),
       "dusk": ((110, 70, 130), (225, 130, 110)), "night": ((10, 14, 45), (30, 40, 90))}  # top, bottom
SIDE, FINE = 32, 4  # pixels of a sticker; drawn so many times larger, then averaged


def _on_circles(*radii: float, n: int) -> list[tuple[float, float]]:
    """n points around the origin, at the radii in turn, the first at the top."""
    angles = [-math.pi / 2 + k * math.tau / n for k in range(n)]
    return [(r * math.cos(a), r * math.sin(a)) for a, r in zip(angles, radii * n)]


SHAPES = {  # on [-1, 1]^2: a polygon's corners, or the box of an ellipse that is filled or cut out
    "fish": [("fill", (-0.95, -0.6, 0.55, 0.6)), ("polygon", [(0.3, 0), (0.98, -0.6), (0.98, 0.6)])],
    "house": [("polygon", [(-0.75, 0.9), (-0.75, -0.1), (-1, -0.1), (0, -0.95), (1, -0.1), (0.75, -0.1),
                           (0.75, 0.9)])],
    "tree": [("fill", (-0.8, -1, 0.8, 0.45)), ("polygon", [(-0.22, 0.3), (0.22, 0.3), (0.3, 1), (-0.3, 1)])],
    "boat": [("polygon", [(-1, 0.3), (1, 0.3), (0.6, 0.9), (-0.6, 0.9)]),
             ("polygon", [(-0.1, -1), (-0.1, 0.2), (0.85, 0.2)]),
             ("polygon", [(-0.2, -0.8), (-0.2, 0.2), (-0.8, 0.2)])],
    "star": [("polygon", _on_circles(1.05, 0.5, n=10))],
    "heart": [("fill", (-0.94, -0.87, 0.06, 0.13)), ("fill", (-0.06, -0.87, 0.94, 0.13)),
              ("polygon", [(-0.86, -0.1), (0, -0.45), (0.86, -0.1), (0, 0.95)])],
    "moon": [("fill", (-0.95, -0.95, 0.95, 0.95)), ("cut", (0.05, -0.8, 1.35, 0.5))],
    "flower": [("fill", (x - 0.38, y - 0.38, x + 0.38, y + 0.38))
               for x, y in [(0, 0), *_on_circles(0.58, n=5)]],
}


def _silhouette(subject: str, centre: Sequence[float], radius: float, rim: float) -> Image.Image:
    """Mask of the subject around the centre (x, y), grown by rim, all in pixels; FINE times
    larger."""
    mask, (x0, y0) = Image.new("L", (SIDE * FINE, SIDE * FINE)), centre
    draw = ImageDraw.Draw(mask)
    for kind, shape in SHAPES[subject]:
        if kind == "polygon":
            corners = [((x0 + radius * x) * FINE, (y0 + radius * y) * FINE) for x, y in shape]
            draw.polygon(corners, fill=255)
            draw.line(corners + corners[:2], fill=255, width=int(2 * rim * FINE), joint="curve")
        else:
            grow = -rim if kind == "cut" else rim
            left, top, right, bottom = (c + radius * s for c, s in zip((x0, y0, x0, y0), shape))
            box = [FINE * e for e in (left - grow, top - grow, right + grow, bottom + grow)]
            draw.ellipse(box, fill=0 if kind == "cut" else 255)
    return mask


def _body(colour: str, pattern: str, centre: Sequence[float]) -> Image.Image:
    """The paint of a subject: a whole picture of its colour and pattern, FINE times larger."""
    side, (x0, y0) = SIDE * FINE, centre
    body = Image.new("RGB", (side, side), PAINT[colour])
    draw, dark = ImageDraw.Draw(body), tuple(int(0.35 * c) for c in PAINT[colour])
    for row, y in enumerate(np.arange(y0 % 6 - 6, SIDE + 6, 6)):
        if pattern == "stripes":
            draw.rectangle((0, y * FINE, side, (y + 2.6) * FINE), fill=dark)
        if pattern == "dots":
            for x in np.arange(x0 % 6 - 6 + 3 * (row % 2), SIDE + 8, 6):
                box = [FINE * e for e in (x - 1.7, y - 1.7, x + 1.7, y + 1.7)]
                draw.ellipse(box, fill="white")
    return body


def draw_sticker(value: dict[str, str], rng: np.random.Generator) -> Image.Image:
    """A 32 x 32 RGB picture, anti-aliased, of the values of SEEN: the patterned subject with a
    white rim before a sky; its place and size vary by about 6 %."""
    centre = SIDE / 2 + rng.uniform(-2, 2, 2)
    radius, side, subject = 12 * rng.uniform(0.9, 1.05), SIDE * FINE, value["subject"]
    top, bottom = np.array(SKY[value["setting"]], float)
    sky = top + (bottom - top) * np.linspace(0, 1, side)[:, None]  # (side, 3)
    picture = Image.fromarray(np.repeat(sky.round().astype(np.uint8)[:, None], side, axis=1))
    picture.paste((250, 250, 250), mask=_silhouette(subject, centre, radius, 1.4))
    body = _body(value["colour"], value["pattern"], centre)
    picture.paste(body, mask=_silhouette(subject, centre, radius, 0))
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


class World(NamedTuple):
    """Who likes what, exactly: what stickers are drawn from, and what the referee knows."""
    items: np.ndarray  # (I, A) value of each attribute, in the order of ATTRIBUTES
    tastes: dict[str, np.ndarray]  # attribute -> (U, values) the users' probabilities
    liked: np.ndarray  # (U, n) items, the oldest first


def sticker_world(cfg: TrainConfig, seed: int) -> World:
    """Stickers of uniform attributes, and users whose tastes are known: log tastes are normal with
    SHARPNESS, each user's items are drawn without replacement in proportion to the product of the
    tastes for their attributes (Gumbel top-k), so that visual and verbal taste are independent."""
    rng = np.random.default_rng([seed, 1])
    items = np.stack([rng.integers(0, len(v), cfg.items) for v in ATTRIBUTES.values()], 1)  # (I, A)
    logits = {a: SHARPNESS[a] * rng.normal(size=(cfg.users, len(v))) for a, v in ATTRIBUTES.items()}
    tastes = {a: np.exp(x) / np.exp(x).sum(1, keepdims=True) for a, x in logits.items()}
    liked = []
    for u in range(0, cfg.users, 256):  # never U x I numbers at once
        rows = (np.log(tastes[a][u:u + 256])[:, items[:, k]] for k, a in enumerate(ATTRIBUTES))
        log_p = sum(rows)  # (256, I)
        order = np.argsort(-(log_p + rng.gumbel(size=log_p.shape)), axis=1)
        liked.append(order[:, :cfg.interactions].copy())
    return World(items, tastes, rng.permuted(np.concatenate(liked), axis=1))


def values_of(row: np.ndarray, attributes: Sequence[str] = tuple(ATTRIBUTES)) -> dict[str, str]:
    """The words of a row of numbers, one for each attribute."""
    return {a: ATTRIBUTES[a][v] for a, v in zip(attributes, row)}


def write_csv(path: Path, header: list[str], rows: list[list]):
    """A CSV file in UTF-8."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_stickers(folder: Path, world: World, seed: int):
    """The world as a data folder. items.csv also names the attributes, in columns that loading
    ignores."""
    rng = np.random.default_rng([seed, 2])
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for n, row in enumerate(world.items):
        value = values_of(row)
        with replacing(folder / "images" / f"s{n:04d}.png") as path:
            draw_sticker(value, rng).save(path, "PNG")
        rows.append([f"s{n:04d}", value["tone"].format(**value), *(value[a] for a in SEEN)])
    likes = [[f"u{u:03d}", f"s{i:04d}", t] for u, row in enumerate(world.liked) for t, i in enumerate(row)]
    write_csv(folder / "items.csv", ["item", "text", "prompt", *SEEN[1:]], rows)
    write_csv(folder / "interactions.csv", ["user", "item", "timestamp"], likes)


def draw_batch(n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """n freshly drawn stickers: pictures (n, 3, 32, 32) in [-1, 1], and the values of SEEN (n,
    4)."""
    values = np.stack([rng.integers(0, len(ATTRIBUTES[a]), n) for a in SEEN], 1)
    pictures = np.stack([draw_sticker(values_of(row, SEEN), rng) for row in values])
    return to_float(torch.from_numpy(pictures).permute(0, 3, 1, 2)), torch.from_numpy(values)


def to_float(images: Tensor) -> Tensor:
    """uint8 pictures -> floats in [-1, 1]."""
    return images / 127.5 - 1


class Referee(nn.Module):
    """Reads the values of SEEN off a sticker; trained on freshly drawn ones only, with noise,
    since it shall read pictures that were generated."""

    def __init__(self):
        super().__init__()
        self.sizes = [len(ATTRIBUTES[a]) for a in SEEN]
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.GroupNorm(8, 64), nn.ReLU(),
            nn.Conv2d(64, 96, 3, 2, 1), nn.GroupNorm(8, 96), nn.ReLU(),
            nn.Conv2d(96, 96, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96 * 16, sum(self.sizes)))

    def loss(self, pictures: Tensor, values: Tensor, generator: torch.Generator | None) -> Tensor:
        """() cross entropy, summed over SEEN; pictures (B, 3, 32, 32) get noise of up to 0.1."""
        size = torch.rand(len(pictures), 1, 1, 1, generator=generator, device=pictures.device) / 10
        noise = torch.randn(pictures.shape, generator=generator, device=pictures.device)
        logits = self.net(pictures + size * noise).split(self.sizes, 1)
        return sum(F.cross_entropy(x, y) for x, y in zip(logits, values.T))

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, H) in [-1, 1], resized to 32 -> (B, 4) int64, the values of SEEN."""
        if pictures.shape[-1] != SIDE:
            pictures = F.interpolate(pictures, size=(SIDE, SIDE), mode="area")
        return torch.stack([x.argmax(1) for x in self.net(pictures).split(self.sizes, 1)], 1)


_GRAMMAR = [re.compile(re.escape(tone).replace(r"\{", "(?P<").replace(r"\}", r">\w+)")) for tone in TONES]


def read_text(text: str) -> tuple[int, int, int]:
    """Subject, setting and tone of a sticker's text by the grammar; -1 thrice if it is not one."""
    for tone, grammar in enumerate(_GRAMMAR):
        if (m := grammar.fullmatch(text)) and m["subject"] in SUBJECTS and m["setting"] in SETTINGS:
            return SUBJECTS.index(m["subject"]), SETTINGS.index(m["setting"]), tone
    return -1, -1, -1


# ---- a run: stages that can be killed and resumed ----------------------------------------------

KEPT = ("done", "stage", "step", "log", "metrics", "seconds", "tables")  # in a checkpoint
# what to lower where memory runs out; in the other stages image-batch
SMALLER = {"gnn": "gnn-dim", "codebook": "gnn-dim", "text": "text-batch", "reward": "reward-groups",
           "scorer": "reward-scorer-batch", "judge": "reward-scorer-batch"}


class Diverged(RuntimeError):
    """A loss, gradient or parameter is not finite; says which, in which stage and step."""


class Run:
    """What a run consists of between its stages: settings, data, networks, and what its files hold.

    modules: what training changes, saved whole; tables: the preference-token tables as they were
    before the reward. All randomness comes from generator(stage, step), so the state that a
    checkpoint needs is modules, optimizer and step."""

    def __init__(self, cfg: Config, train: TrainConfig, data: Dataset, world: World | None, out: Path,
                 device: torch.device):
        self.cfg, self.train, self.data, self.world = cfg, train, data, world
        self.out, self.device = out, device
        self.done, self.stage, self.step, self.optimizer_state = [], "", 0, None
        self.log, self.metrics, self.seconds, self.tables = [], {}, {}, {}
        self.saved_at, self.interrupted, self.busy = time.monotonic(), False, False
        new = hold_out_users(data, train.new_users, cfg.method.seed)
        self.new = {name: pairs.to(device) for name, pairs in new.items()}  # (2, E) each
        self.liked = self.pairs(TRAIN)  # (2, E)
        self.users, self.seen = (x.unique() for x in self.liked)  # who and what is trained on
        n_test, n_seen = len(self.pairs(TEST)[0].unique()), len(self.seen)
        if n_test < 3 or n_seen < 4:
            raise ValueError(f"{data.name}: {n_test} users to test on (need 3), {n_seen} items to learn "
                             "from (need 4): need more interactions")
        self._build_networks()
        self._encode_content()
        self._split_items()

    def _build_networks(self):
        """Each network starts from a stream of its own: the judge shares nothing with the
        scorer."""
        cfg, texts = self.cfg, [self.data.texts[i] for i in self.seen.tolist()]
        tokenizer = Tokenizer.train(texts, cfg.text.vocab_size)
        catalogue = Catalogue.of(self.data, tokenizer)
        n_words = max(1, len(catalogue.words))
        build = {"model": lambda: DPPMG(cfg, catalogue), "referee": Referee,
                 "judge": lambda: Scorer(cfg.reward, tokenizer.vocab_size, n_words)}
        self.modules = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            for name, network in build.items():
                torch.manual_seed(self.seed(f"start of {name}"))
                self.modules[name] = network()
        self.modules["average"] = copy.deepcopy(self.model.image)
        self.modules.to(self.device)
        self.model.to(self.device)  # its graph, too

    def _encode_content(self):
        data, model, context = self.data, self.model, self.cfg.text.context
        tokens, n_cut = model.tokenizer.encode_batch(data.texts, context)
        if n_cut:
            data.notices.append(f"{n_cut} texts cut to {context} tokens: --text-context")
        self.tokens, self.images = tokens.to(self.device), data.images.to(self.device)  # (I, T), uint8
        self.prompt = model.catalogue.encode_prompts(data.prompts).to(self.device)  # (I, P)
        self.prompts, self.topic = self.prompt.unique(dim=0, return_inverse=True)  # (W, P), (I,)

    def _split_items(self):
        """What scorer and judge learn from: halves of the items, of which the other knows no
        text."""
        generator = torch.Generator().manual_seed(self.seed("halves"))
        halves = halves_by_text(self.tokens[self.seen].cpu(), generator)
        scorer, judge = (self.seen[half.to(self.device)] for half in halves)
        self.learns = {"scorer": scorer, "judge": judge}
        text = self.tokens.unique(dim=0, return_inverse=True)[1]
        self.fresh = ~torch.isin(text, text[judge])  # (I,) bool: items new to the judge

    @property
    def model(self) -> DPPMG:
        """The method."""
        return self.modules["model"]

    def pairs(self, *parts: int) -> Tensor:
        """Users and items (2, R) of the interactions in some parts of the data, or in all."""
        data = self.data
        rows = torch.isin(data.part, torch.tensor(parts)) if parts else slice(None)
        return torch.stack([data.user[rows], data.item[rows]]).to(self.device)

    def seed(self, stage: str, step: int = 0) -> int:
        """A number below 2^63: a function of the run's seed, the stage and the step."""
        digest = hashlib.sha256(f"{self.cfg.method.seed}/{stage}/{step}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def generator(self, stage: str, step: int = 0) -> torch.Generator:
        """The randomness of one step of one stage, on the device."""
        return torch.Generator(self.device).manual_seed(self.seed(stage, step))

    def identity(self) -> dict:
        """What a checkpoint must have in common with the run that goes on from it."""
        return {"config": asdict(self.cfg), "train": asdict(self.train),
                "fingerprint": self.data.fingerprint()}

    def save(self, optimizer: torch.optim.Optimizer | None = None):
        """Write checkpoint.pt and log.csv; not if a parameter is not finite: the last good one
        stays."""
        check_finite(self, self.modules.state_dict())
        state = self.model.state() | self.identity() | {name: getattr(self, name) for name in KEPT}
        state["others"] = {n: m.state_dict() for n, m in self.modules.items() if n != "model"}
        state |= {"format": FORMAT, "optimizer": optimizer.state_dict() if optimizer else None}
        with replacing(self.out / "checkpoint.pt") as path:
            try:
                torch.save(state, path)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(f"{path}: cannot be written ({str(error)[:80]}): is the disk full?") from None
        write_csv(self.out / "log.csv", ["stage", "step", "name", "value"], self.log)
        self.saved_at = time.monotonic()

    def restore(self):
        """Go on from the checkpoint, if there is one. CheckpointError where it is another run's."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return
        state = read_checkpoint(path)
        try:
            differ = [name for name, value in self.identity().items() if state[name] != value]
            if differ:
                raise ValueError(f"another {' and '.join(differ)}")
            self.model.load_state_dict(state["model"])
            for name, values in state["others"].items():
                self.modules[name].load_state_dict(values)
            for name in KEPT:
                setattr(self, name, state[name])
            self.tables = {m: table.to(self.device) for m, table in self.tables.items()}
            self.optimizer_state = state["optimizer"]
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            what = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path}: not of this run ({what}); choose another --out") from None

    def note(self, step: int, **values: float):
        """Add named values to the log of this stage."""
        self.log += [[self.stage, step, name, float(value)] for name, value in values.items()]

    @contextlib.contextmanager
    def timed(self, stage: str):
        """Add the wall and CPU seconds of the block to the stage's."""
        start = time.perf_counter(), time.process_time()
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise OSError(f"{stage}: lower --{SMALLER.get(stage, 'image-batch')}: {error}") from None
        finally:
            end = time.perf_counter(), time.process_time()
            spent = self.seconds.get(stage, [0.0, 0.0])
            self.seconds[stage] = [s + b - a for s, a, b in zip(spent, start, end)]


def adamw(module: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices and kernels only, as one fused kernel."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.99), fused=True)


def ramp(x: float, warm: float = 0.05, hold: float = 0.05) -> float:
    """Learning rate over its peak at x in [0, 1) of a stage: rises until `warm`, falls after
    `hold`."""
    return min(1.0, (x + 1e-3) / warm, (1 - x) / (1 - hold))


@torch.no_grad()
def ema_update(average: nn.Module, model: nn.Module, decay: float, step: int):
    """average <- decay average + (1 - decay) model, parameter by parameter; the decay is at most
    (1 + step) / (10 + step), so that the start is forgotten."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)


def fit(run: Run, optimizer: torch.optim.Optimizer, steps: int,
        losses: Callable[[torch.Generator], dict[str, Tensor]], schedule: Callable = ramp,
        after: Callable[[int], None] = lambda step: None, clip: float = 1.0):
    """The one training loop: `losses` gives the tensors to log, of which "loss" is descended;
    `after`(step) follows a step. Goes on where a checkpoint left this stage, and writes one from
    time to time. Raises Diverged on a loss or gradient that is not finite (looked at each step on
    the CPU, elsewhere when it logs: a look waits for the device)."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    peaks, first = [group["lr"] for group in optimizer.param_groups], run.step
    if run.optimizer_state:
        try:
            optimizer.load_state_dict(run.optimizer_state)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{run.out / 'checkpoint.pt'}: its optimizer does not fit stage "
                                  f"{run.stage} ({type(error).__name__})") from None
        run.optimizer_state = None
    for step in tqdm(range(first, steps), run.stage, steps, False, initial=first, disable=None):
        run.busy, log = True, (step + 1) % max(1, steps // 50) == 0 or step + 1 == steps
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * schedule(step / steps)
        parts = losses(run.generator(run.stage, step))
        optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if run.device.type == "cpu" or log:
            check_finite(run, parts | {"gradient": norm})
        nn.utils.clip_grads_with_norm_(params, clip, norm)
        optimizer.step()
        run.step = step + 1
        after(step)
        if log:
            run.note(run.step, **{name: value.item() for name, value in parts.items()})
        if run.interrupted or time.monotonic() - run.saved_at > run.train.checkpoint_seconds:
            run.save(optimizer)
        run.busy = False
        if run.interrupted:
            raise KeyboardInterrupt


def check_finite(run: Run, values: dict[str, Tensor]):
    """Raises Diverged, naming the first of the tensors that is not finite."""
    for name, value in values.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise Diverged(f"stage {run.stage}, step {run.step}: {name} is not finite; the last good "
                           "checkpoint is kept; try a lower learning rate")


# ---- the stages --------------------------------------------------------------------------------
# Each trains one part on the training interactions and returns what it achieved in words.

def draw(n: int, size: int, generator: torch.Generator) -> Tensor:
    """size indices below n, with replacement."""
    return torch.randint(n, (size,), generator=generator, device=generator.device)


def in_batches(function: Callable[[Tensor], Tensor], x: Tensor, n: int = 256) -> Tensor:
    """function(x) without gradient, n rows at a time."""
    with torch.no_grad():
        return torch.cat([function(rows) for rows in x.split(n)])


def latents_of(run: Run) -> Tensor:
    """Latents (I, C, h, h) of all pictures, which never are floats all at once."""
    return in_batches(lambda x: run.model.autoencoder.encode(to_float(x)), run.images)


def train_autoencoder(run: Run) -> str:
    """Reconstruct the pictures of the items that were liked in training; standardize the
    latents."""
    cfg, net = run.cfg.image, run.model.autoencoder

    def losses(generator):
        item = run.seen[draw(len(run.seen), cfg.batch, generator)]
        with run.model.half():
            return {"loss": net.loss(to_float(run.images[item]), cfg.kl, generator)}
    fit(run, adamw(net, cfg.ae_lr, cfg.weight_decay), cfg.ae_steps, losses)
    net.standardize(latents_of(run)[run.seen])
    x = to_float(run.images[run.seen[:512]])
    error = (in_batches(lambda x: net.decode(net.encode(x)), x) - x).square().mean()
    return f"reconstruction PSNR {10 * math.log10(4 / max(error.item(), 1e-12)):.1f} dB"


def fit_features(run: Run) -> str:
    """PCA of the latents and SVD of TF-IDF, fitted to the items liked in training, for all
    items."""
    model, latents, cfg = run.model, latents_of(run), run.cfg.method
    model.image_features.fit(latents[run.seen])
    model.text_features.fit(run.tokens[run.seen])
    model.gnn.set_features("image", model.image_features(latents))
    model.gnn.set_features("text", model.text_features(run.tokens))
    return f"{cfg.image_features} image and {cfg.text_features} text features"


def train_gnn(run: Run) -> str:
    """Modal-specific graph network by BPR."""
    cfg, gnn, graph = run.cfg.gnn, run.model.gnn, run.model.graph

    def losses(generator):
        return {"loss": gnn.loss(graph, *sample_triplets(graph, cfg.batch, generator))}
    fit(run, torch.optim.Adam(gnn.parameters(), cfg.lr), cfg.steps, losses, lambda x: 1.0)
    with torch.no_grad():
        run.metrics["stage1"] = rank(run, gnn(graph), run.pairs(TEST))
    return f"recall@20 {run.metrics['stage1']['recall@20']:.4f}"


def rank(run: Run, rows: dict[str, tuple[Tensor, Tensor]], test: Tensor) -> dict[str, float]:
    """Recall@20 and NDCG@20 of test (user, item) (2, R), over all items but what else the users
    like: training and validation items, and of new people everything but their test items."""
    hidden = torch.cat([run.pairs(TRAIN, VALID), run.new["hidden"]], 1)
    size = len(run.data.user_ids), len(run.data.item_ids)
    graphs = [build_graph(*pairs, *size).to(run.device) for pairs in (hidden, test)]
    return ranking_summary(rows, *graphs)


def train_codebook(run: Run) -> str:
    """Residual VQ-VAE of each modality's preferences; BPR on the reconstruction keeps what
    ranks."""
    cfg, model = run.cfg.vq, run.model
    with torch.no_grad():
        rows = model.gnn(model.graph)
    nets = nn.ModuleDict({m: taste.quantizer for m, taste in model.modality.items()}).train()
    if run.step == 0:
        for m, (user, _) in rows.items():
            nets[m].initialize(user[run.users], run.generator(f"k-means {m}"))

    def losses(generator):
        user, pos, neg = sample_triplets(model.graph, cfg.batch, generator)
        parts, total = {}, 0.0
        for m, (p, e) in rows.items():
            out = nets[m](p[user], generator)
            rebuilt = out.reconstruction * p[user].norm(dim=1, keepdim=True)
            ranking = bpr_loss((rebuilt * e[pos]).sum(1), (rebuilt * e[neg]).sum(1))
            total = total + out.loss + cfg.rank_weight * ranking
            parts |= {f"reconstruction_{m}": out.reconstruction_loss, f"bpr_{m}": ranking}
        return {"loss": total} | parts
    fit(run, torch.optim.Adam(nets.parameters(), cfg.lr), cfg.steps, losses)
    model.update_preferences({m: user for m, (user, _) in rows.items()})
    model.seed_tables(run.generator("seed tables"))
    return measure_codebook(run, rows)


def measure_codebook(run: Run, rows: dict[str, tuple[Tensor, Tensor]]) -> str:
    """How the codes are used, and how much of the ranking they keep."""
    health, quantized = {}, {}
    for m, (p, e) in rows.items():
        taste = run.model.modality[m]
        unit = taste.decode(taste.tokens)
        quantized[m] = unit * p.norm(dim=1, keepdim=True), e
        health[m] = codebook_health(taste.tokens[run.users], run.cfg.vq.codes)
        health[m]["explained"] = explained(p[run.users], unit[run.users])
    recall = rank(run, quantized, run.pairs(TEST))["recall@20"]
    run.metrics["codebook"], run.metrics["stage1"]["recall@20_quantized"] = health, recall
    return f"recall@20 from tokens {recall:.4f}"


def train_generator(run: Run, m: str, loss: Callable, optimizer: torch.optim.Optimizer, **options):
    """Learn what users liked: loss(items (n,), prompts (n, P), tokens (n, M), generator) on
    training
    interactions, tokens null at null_rate. Returns the loss on 512 validation interactions."""
    cfg = getattr(run.cfg, m)

    def losses(generator):
        user, item = run.liked[:, draw(run.liked.shape[1], cfg.batch, generator)]
        prefs = drop_preferences(run.model.user_tokens(user)[m], cfg.null_rate, generator)
        with run.model.half():
            return {"loss": loss(item, run.prompt[item], prefs, generator)}
    fit(run, optimizer, cfg.steps, losses, **options)
    user, item = run.pairs(VALID)[:, :512]
    if len(user):
        prefs = run.model.user_tokens(user)[m]
        with torch.no_grad():
            value = loss(item, run.prompt[item], prefs, run.generator("validation"))
        run.note(run.step, loss_validation=value)
    return f"validation loss {run.log[-1][-1]:.4f}"


def train_text(run: Run) -> str:
    """GPT-style decoder on the texts that users liked, given the prompt and their tokens."""
    cfg, net = run.cfg.text, run.model.text

    def loss(item, prompt, prefs, generator):
        return net.loss(run.tokens[item], prompt, prefs)
    return train_generator(run, "text", loss, adamw(net, cfg.lr, cfg.weight_decay))


def train_image(run: Run) -> str:
    """Denoiser on the latents of the pictures that users liked; it samples by the running mean of
    its weights, which is what remains."""
    cfg, net, average = run.cfg.image, run.model.image, run.modules["average"]
    latents = latents_of(run)
    if run.step == 0:
        average.load_state_dict(net.state_dict())

    def loss(item, prompt, prefs, generator):
        return net.loss(latents[item], prompt, prefs, generator)

    def after(step):
        ema_update(average, net, cfg.ema, step)
        if step + 1 == cfg.steps:
            net.load_state_dict(average.state_dict())
    options = {"schedule": lambda x: ramp(x, hold=0.5), "after": after}
    return train_generator(run, "image", loss, adamw(net, cfg.lr, cfg.weight_decay), **options)


def train_scorer(run: Run) -> str:
    """The contrastive scorer of the reward; for the stage "judge", its twin on other items."""
    cfg, judge = run.cfg.reward, run.stage == "judge"
    net = run.modules["judge"] if judge else run.model.scorer
    own, other = run.learns[run.stage], run.learns["scorer" if judge else "judge"][:256]

    def losses(generator):
        batch = own[draw(len(own), min(cfg.scorer_batch, len(own)), generator)]
        return {"loss": net.loss(*contents(run, batch), run.prompt[batch], generator)}
    fit(run, adamw(net, cfg.scorer_lr, 0.01), cfg.scorer_steps, losses)
    found, place = embed(net, contents(run, other)), torch.arange(len(other), device=run.device)
    share = rank_share(found["image"], found["text"], place).mean()
    run.note(run.step, held_out_auc=share)
    return f"a picture finds its text before {share:.1%} of others, on texts it never learnt"


def contents(run: Run, item: Tensor) -> Content:
    """Pictures and texts of items (B,)."""
    return Content(to_float(run.images[item]), run.tokens[item])


def train_referee(run: Run) -> str:
    """Stickers only: learn to read pictures from freshly drawn ones."""
    if run.world is None:
        return "not needed: tastes are not known"
    cfg, net, seed = run.train, run.modules["referee"], run.cfg.method.seed
    fresh = draw_batch(cfg.referee_pictures, np.random.default_rng([seed, 3]))
    pictures, values = (x.to(run.device) for x in fresh)

    def losses(generator):
        row = draw(len(pictures), 64, generator)
        return {"loss": net.loss(pictures[row], values[row], generator)}
    fit(run, adamw(net, 2e-3), cfg.referee_steps, losses)
    pictures, values = draw_batch(1000, np.random.default_rng([seed, 4]))
    right = in_batches(net.read, pictures.to(run.device)).cpu() == values
    run.metrics["referee"] = dict(zip(SEEN, right.double().mean(0).tolist()))
    shares = (f"{name} {share:.1%}" for name, share in run.metrics["referee"].items())
    return f"right on fresh stickers: {', '.join(shares)}"


def train_reward(run: Run) -> str:
    """REINFORCE: the token tables, and nothing else, learn to please the reward."""
    cfg, model = run.cfg.reward, run.model
    tables = {m: getattr(model, m).preference.weight for m in MODALITIES}
    if run.step == 0:
        run.tables = {m: table.detach().clone() for m, table in tables.items()}
        watch(run)
    model.requires_grad_(False)
    optimizer = token_optimizer({m: table.requires_grad_() for m, table in tables.items()}, cfg)

    def losses(generator):
        order = torch.rand(len(run.users), generator=generator, device=run.device).argsort()
        user = run.users[order[:cfg.groups]]  # each at most once a round
        prompt = run.prompt[sample_positives(model.graph, user, generator)]
        step = model.reinforce_step(user, prompt, run.tables, generator)
        parts = {name: value.mean() for name, value in step.parts._asdict().items()}
        return {"loss": step.loss, "kl_image": step.kl_image, "kl_text": step.kl_text} | parts

    def after(step):
        if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.rounds:
            watch(run)

    fit(run, optimizer, cfg.rounds, losses, lambda x: ramp(x, 0.1, 0.7), after, clip=math.inf)
    model.requires_grad_(True)
    name = "valid_consistency" if run.world else "valid_judge_consistency"
    values = [value for stage, _, key, value in run.log if (stage, key) == ("reward", name)]
    return f"{name[6:]} on validation pairs {values[0]:.3f} -> {values[-1]:.3f}"


def watch(run: Run):
    """Log the measures on 96 validation pairs: what does the reward do to them? The judge's taste
    of a user is made of validation likes alone: nothing of the test part is looked at."""
    part = VALID if run.pairs(VALID).shape[1] else TRAIN
    made = make(run, "after_reward", draw_pairs(run, part, 96), run.generator("watch"))
    found = measures(run, made, run.pairs(part))
    run.note(run.step, **{f"valid_{n}": v.nanmean() for n, v in found.items() if n != "copied"})


# ---- evaluation: on what was held out, by a judge or referee that the reward never saw ----------

VARIANTS = ("real", "unpersonalized", "before_reward", "after_reward", "best_of")


class Pairs(NamedTuple):
    user: Tensor  # (B,) int64
    item: Tensor  # (B,) int64: gives the prompt, and for "real" the content
    other: Tensor  # (B,) int64: another user of the training, at random


class Made(NamedTuple):
    """What a variant gives for pairs, and what that is compared with."""
    pairs: Pairs
    own: Content  # for each pair's user and prompt
    other: Content  # for the same prompts and the other users
    again: Tensor  # (B, T) texts for the same users and prompts, in another draw; all PAD: none


def draw_pairs(run: Run, part: int, n: int) -> Pairs:
    """At most n interactions of a part of the data, at random, each with another user of
    training."""
    user, item = run.data.pairs(part)
    generator, users = torch.Generator().manual_seed(run.seed(f"pairs {part}")), run.users.cpu()
    rows = torch.randperm(len(user), generator=generator)[:n]
    shift = 1 + draw(len(users) - 1, len(rows), generator)
    other = users[(torch.searchsorted(users, user[rows]) + shift) % len(users)]
    return Pairs(*(x.to(run.device) for x in (user[rows], item[rows], other)))


def liked_by(run: Run, user: Tensor, pairs: Tensor) -> Tensor:
    """Which items users (B,) like among pairs (2, R): (B, I) bool."""
    who, place = user.unique(return_inverse=True)
    own = pairs[:, torch.isin(pairs[0], who)]
    liked = torch.zeros(len(who), len(run.topic), dtype=torch.bool, device=run.device)
    liked[torch.searchsorted(who, own[0].contiguous()), own[1]] = True
    return liked[place]


def choose(mask: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n different items of each row at random, -1 where it has fewer: (B, I) bool -> (B, n)."""
    chance = torch.rand(mask.shape, generator=generator, device=mask.device).masked_fill(~mask, -1)
    value, item = chance.topk(min(n, mask.shape[1]), dim=1)
    return item.masked_fill(value < 0, -1)


def make_real(run: Run, pairs: Pairs, generator: torch.Generator) -> Made:
    """The items themselves, where the judge has not learnt them; beside each another item of the
    same prompt that the user does not like, and the text of another one that the user likes."""
    liked = liked_by(run, pairs.user, run.pairs())
    same = (run.topic == run.topic[pairs.item, None]) & run.fresh  # (B, I)
    same = same.scatter(1, pairs.item[:, None], False)
    other, again = (choose(same & mask, 1, generator)[:, 0] for mask in (~liked, liked))
    rows = run.fresh[pairs.item] & (other >= 0)
    text = run.tokens[again] * (again >= 0)[:, None]
    pairs = Pairs(*(x[rows] for x in pairs))
    return Made(pairs, contents(run, pairs.item), contents(run, other[rows]), text[rows])


def make(run: Run, variant: str, pairs: Pairs, generator: torch.Generator) -> Made:
    """What a variant gives for the pairs, and for comparison: another user's, and another draw."""
    if variant == "real":
        return make_real(run, pairs, generator)
    own, other, again = (make_for(run, variant, user, pairs.item, generator)
                         for user in (pairs.user, pairs.other, pairs.user))
    return Made(pairs, own, other, again.tokens)


def make_for(run: Run, variant: str, user: Tensor, item: Tensor, generator) -> Content:
    """What a variant (all but "real") generates for users (B,) and the prompts of items (B,)."""
    model, tokens = run.model, run.model.user_tokens(user)
    if variant == "unpersonalized":
        tokens = {m: torch.full_like(rows, -1) for m, rows in tokens.items()}
    before = variant in ("before_reward", "best_of")
    tables = run.tables if before else {m: getattr(model, m).preference.weight for m in MODALITIES}
    best_of = run.train.best_of if variant == "best_of" else 1
    with table_as(model.image, tables["image"]), table_as(model.text, tables["text"]):
        return Content(*model.sample_pairs(run.prompt[item], tokens, generator, best_of))


def read(run: Run, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Stickers: the values of SEEN in pictures (B, 4); subject, setting and tone of texts (B,
    3)."""
    texts = [read_text(text) for text in run.model.tokenizer.decode_batch(tokens)]
    return in_batches(run.modules["referee"].read, images).cpu(), torch.tensor(texts)


def agree(see: Tensor, told: Tensor) -> Tensor:
    """Whether picture and text agree in subject and setting: (B, 4), (B, 3) -> (B,) bool."""
    return (see[:, :2] == told[:, :2]).all(1)


def shown(see: Tensor, told: Tensor) -> dict[str, dict[str, Tensor]]:
    """modality -> attribute that it shows and the prompt leaves open -> value (B,), -1
    unreadable."""
    image = dict(zip(SEEN[1:], see[:, 1:].T))
    return {"image": image, "text": {"setting": told[:, 1], "tone": told[:, 2]}}


def exact_measures(run: Run, user: Tensor, item: Tensor, content: Content) -> dict[str, Tensor]:
    """Stickers: what referee and grammar find, (B,) each; the README's glossary explains them."""
    see, told = read(run, *content)
    subject = torch.tensor([SUBJECTS.index(run.data.prompts[i][0]) for i in item.tolist()])
    found = {"prompt_image": see[:, 0] == subject, "prompt_text": told[:, 0] == subject,
             "consistency": agree(see, told), "grammatical": told[:, 0] >= 0}
    for m, values in shown(see, told).items():
        liking = []
        for attribute, value in values.items():
            p = torch.from_numpy(run.world.tastes[attribute])[user.cpu()]  # (B, values)
            chosen = p.gather(1, value.clamp(min=0)[:, None])[:, 0]
            liking.append(torch.where(value < 0, 0, chosen / p.amax(1)))
        found[f"utility_{m}"] = torch.stack(liking).mean(0)
    return found


def judge_measures(run: Run, made: Made, likes: Tensor) -> dict[str, Tensor]:
    """Any data: what the judge finds, (B,) each. likes (2, R): held-out interactions, which its
    taste of a user is made of, always without the item judged."""
    judge, (user, item, _) = run.modules["judge"], made.pairs
    if len(user) < 2:
        return {}
    items = {"image": in_batches(lambda x: judge.encode_image(to_float(x)), run.images),
             "text": in_batches(judge.encode_text, run.tokens)}
    tastes = {m: taste_without(emb, *likes, user, item) for m, emb in items.items()}
    found = judge_pairs(judge, made.own, made.other, made.again, tastes)
    if len(run.prompts) > 1:
        prompts = in_batches(judge.encode_prompt, run.prompts)
        for m, emb in embed(judge, made.own).items():
            found[f"judge_prompt_{m}"] = rank_share(emb, prompts, run.topic[item])
    return found


def measures(run: Run, made: Made, likes: Tensor) -> dict[str, Tensor]:
    """Every measure of each pair, (B,) float64; nan where there is nothing to measure."""
    found, texts = {}, run.model.tokenizer.decode_batch(made.own.tokens)
    if run.world:
        user, item, _ = made.pairs
        found, others = (exact_measures(run, user, item, x) for x in (made.own, made.other))
        found["consistency_repaired"] = agree(*read(run, made.own.images, made.again))
        for m in MODALITIES:
            found[f"swap_{m}"] = swap_share(found[f"utility_{m}"], others[f"utility_{m}"])
    found |= judge_measures(run, made, likes)
    learnt = {run.data.texts[i] for i in run.seen.tolist()}
    found["copied"] = torch.tensor([text in learnt for text in texts])
    found, none = {n: v.cpu().double() for n, v in found.items()}, (made.again == 0).all(1).cpu()
    return {n: v.masked_fill(none, math.nan) if "repaired" in n else v for n, v in found.items()}


def spread(run: Run, user: Tensor, item: Tensor, content: Content) -> dict[str, Tensor]:
    """How much the S samples of each of G users differ (two with the same prompt are compared), and
    how near to the user's taste they are, (G,) each.
    user (G,), item (G, S), -1 where there is no sample; content: of the G * S samples."""
    there, topic, n, found = item >= 0, run.topic[item], item.shape[1], {}
    alike = (topic[:, :, None] == topic[:, None]) & there[:, :, None] & there[:, None]  # (G, S, S)
    for m, emb in embed(run.modules["judge"], content).items():
        emb = emb.unflatten(0, (-1, n))  # (G, S, D)
        found[f"judge_variety_{m}"] = share_of_pairs(1 - emb @ emb.mT, alike)
    if not run.world:
        return found
    same = {}
    for m, values in shown(*read(run, *content)).items():
        differ, near = [], []
        for attribute, value in values.items():
            value = value.unflatten(0, (-1, n)).masked_fill(~there.cpu(), -1)  # (G, S)
            truth = torch.from_numpy(run.world.tastes[attribute])[user.cpu()]  # (G, values)
            near.append(1 - total_variation(value, there.sum(1).cpu(), truth))
            pairs_differ = (value[:, :, None] != value[:, None]).double()
            differ.append(share_of_pairs(pairs_differ, alike.cpu()))
        found[f"variety_{m}"], found[f"taste_{m}"] = sum(differ) / len(differ), sum(near) / len(near)
        same[m] = 1 - differ[0]  # chance that two samples show the same setting
    found["consistency_bound"] = (same["image"] * same["text"]).sqrt()
    return found


def total_variation(value: Tensor, count: Tensor, truth: Tensor) -> Tensor:
    """Half the absolute difference between the shares of value (G, S), -1 none, among count (G,)
    samples and truth (G, V) -> (G,) in [0, 1]."""
    share = F.one_hot(value + 1, truth.shape[1] + 1)[:, :, 1:].sum(1) / count[:, None]  # (G, V)
    return ((share - truth).abs().sum(1) + 1 - share.sum(1)) / 2


def many_samples(run: Run, variant: str, user: Tensor) -> dict[str, Tensor]:
    """`spread` of many samples for users (G,), made for prompts of their test items; real: their
    likes."""
    n, generator = run.train.samples, run.generator("many samples")
    if variant == "real":  # the judge sees what is new to it, the referee everything
        likes = liked_by(run, user, run.pairs())
        fresh, whole = (choose(mask, n, generator) for mask in (likes & run.fresh, likes))
        judged, read = (spread(run, user, x, contents(run, x.flatten())) for x in (fresh, whole))
        return read | {name: value for name, value in judged.items() if "judge" in name}
    likes = liked_by(run, user, run.pairs(TEST)).float()
    item = likes.multinomial(n, replacement=True, generator=generator)  # (G, S)
    who = user.repeat_interleave(n)
    return spread(run, user, item, make_for(run, variant, who, item.flatten(), generator))


def evaluate_variant(run: Run, variant: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Every measure of a variant: its values, and the user of each. best_of, which draws several
    samples for each that it keeps, gets as many fewer pairs and users: the same cost."""
    cost = run.train.best_of if variant == "best_of" else 1
    pairs = draw_pairs(run, TEST, run.train.pairs)
    pairs = Pairs(*(x[:math.ceil(len(x) / cost)] for x in pairs))
    made = make(run, variant, pairs, run.generator("evaluation"))
    found = {n: (v, made.pairs.user) for n, v in measures(run, made, run.pairs(VALID, TEST)).items()}
    chance = torch.Generator().manual_seed(run.seed("sampled users"))
    users = run.pairs(TEST)[0].unique()
    few = torch.randperm(len(users), generator=chance)[:math.ceil(run.train.sampled_users / cost)]
    users = users[few.to(run.device)]
    found |= {n: (v, users) for n, v in many_samples(run, variant, users).items()}
    return found | {"frechet_image": (embed(run.modules["judge"], made.own)["image"], made.pairs.user)}


def evaluate(run: Run) -> str:
    """Every variant on the test part, with intervals; what the reward changes, pair by pair; and
    people who were not in training."""
    found, generation = {variant: evaluate_variant(run, variant) for variant in VARIANTS}, {}
    likes = run.liked[1][run.fresh[run.liked[1]]]
    rows = draw(len(likes), run.train.pairs, run.generator("frechet"))
    reference = embed(run.modules["judge"], contents(run, likes[rows]))["image"]
    for variant, values in found.items():
        frechet = values.pop("frechet_image")
        generation[variant] = {name: summarize(name, *pair) for name, pair in values.items()}
        if len(frechet[0]) >= 20:  # else a tenth left out is next to nothing
            generation[variant]["frechet_image"] = frechet_interval(frechet[0], reference, frechet[1])
    before, after = found["before_reward"], found["after_reward"]
    run.metrics["generation"] = generation
    run.metrics["differences"] = {n: interval(after[n][0] - v, user) for n, (v, user) in before.items()}
    run.metrics["new_users"] = evaluate_new_users(run)
    name = "consistency" if run.world else "judge_consistency"
    was, now = (generation[variant][name]["mean"] for variant in ("before_reward", "after_reward"))
    return f"{name} {was:.3f} before, {now:.3f} after"


def summarize(name: str, values: Tensor, user: Tensor) -> dict[str, float]:
    """Mean and 95 % interval, users as clusters: Wilson's for what lies in [0, 1]."""
    return (interval if "judge_variety" in name else share_interval)(values, user)


def evaluate_new_users(run: Run) -> dict[str, dict]:
    """Users kept out of all training, folded in from their first k interactions: recall@20 and, on
    stickers, what is generated for the prompts of their test items; beside users in training."""
    model, (history, test) = run.model, (run.new[name] for name in ("history", "test"))
    if not test.shape[1]:
        return {}
    first = torch.searchsorted(history[0].contiguous(), history[0].contiguous())
    nth = torch.arange(history.shape[1], device=run.device) - first  # of its user's; users ascend
    some, found = test[:, ::math.ceil(test.shape[1] / run.train.pairs)], {}
    with torch.no_grad():
        items = {m: rows for m, (_, rows) in model.gnn(model.graph).items()}

    def made_for(user: Tensor, item: Tensor) -> dict[str, dict]:
        if not run.world:
            return {}
        content = make_for(run, "after_reward", user, item, run.generator("new users"))
        values = exact_measures(run, user, item, content)
        return {n: summarize(n, v, user) for n, v in values.items() if n[:4] in ("util", "cons")}
    for name, k in {"1": 1, "2": 2, "5": 5, "10": 10, "whole history": history.shape[1]}.items():
        p = model.gnn.fold_in(model.graph, *history[:, nth < k], len(run.data.user_ids))
        model.update_preferences(p, test[0].unique())  # the last is what `generate` will know
        found[name] = rank(run, {m: (p[m], items[m]) for m in MODALITIES}, test) | made_for(*some)
    pairs = draw_pairs(run, TEST, some.shape[1])
    stage1 = {n: v for n, v in run.metrics["stage1"].items() if "quantized" not in n}
    return found | {"in training": stage1 | made_for(pairs.user, pairs.item)}


# ---- report: one file with all that a person wants to look at -----------------------------------

PAGE = """<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>
<meta name=viewport content="width=device-width,initial-scale=1"><style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:72em;margin:1em auto;padding:0 1em;color:#222}}
table{{border-collapse:collapse;display:block;overflow-x:auto}}td,th{{padding:.1em .5em;text-align:left}}
svg{{max-width:100%}}img{{width:64px;height:64px;image-rendering:pixelated;display:block}}
figure{{display:inline-block;width:7em;margin:.3em;vertical-align:top}}
figcaption{{font-size:12px;overflow-wrap:anywhere}}</style><h1>{title}</h1>{body}</html>"""
INKS = ("#1f6fb4", "#d1622b", "#2f8f4e", "#8a4fb0", "#b02f55", "#777777")


class Html(str):
    """Text that is escaped already."""


def picture(x: Tensor, text: str) -> Html:
    """<figure> of (3, H, W) in [-1, 1] with escaped words below."""
    data, words = io.BytesIO(), html.escape(text)
    to_picture(x).save(data, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return Html(f'<figure><img alt="" src="{source}"><figcaption>{words}</figcaption></figure>')


def pictures(run: Run, content: Content) -> list[Html]:
    """A figure for each picture with its text."""
    return list(map(picture, content.images, run.model.tokenizer.decode_batch(content.tokens)))


def curves(title: str, series: dict[str, list[tuple[float, float]]]) -> str:
    """Inline SVG of curves [(x, y)], with their range and last values; nothing below two points."""
    points = [p for line in series.values() for p in line if math.isfinite(p[1])]
    if len(points) < 2:
        return ""
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))
    labels = [(34, 12, title), (0, 24, f"{y1:.3g}"), (0, 120, f"{y0:.3g}"), (250, 134, f"step {x1:,}")]
    body = ['<path d="M34 20V120H284" stroke="#999" fill="none"/>']
    for n, (name, line) in enumerate(series.items()):
        places = [(34 + 250 * (x - x0) / ((x1 - x0) or 1), 120 - 100 * (y - y0) / ((y1 - y0) or 1))
                  for x, y in line if math.isfinite(y)]
        path, ink = " ".join(f"{x:.1f},{y:.1f}" for x, y in places), INKS[n % len(INKS)]
        body.append(f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="1.5"/>')
        body.append(f'<path d="M292 {22 + 15 * n}h10" stroke="{ink}" stroke-width="3"/>')
        labels.append((306, 26 + 15 * n, f"{name} {line[-1][1]:.3g}"))
    body += [f'<text x="{x}" y="{y}">{html.escape(words)}</text>' for x, y, words in labels]
    return f'<svg width="500" height="140" viewBox="0 0 500 140" font-size="11">{"".join(body)}</svg>'


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """<table>, all escaped but figures; intervals {"mean", "low", "high"} in brackets."""
    def cell(v):
        if isinstance(v, dict):
            v = f"{v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]"
        v = f"{v:.3f}" if isinstance(v, float) else v
        return f"<td>{v if isinstance(v, Html) else html.escape(str(v))}</td>"
    heads = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{heads}</tr>{body}</table>"


def report_numbers(run: Run) -> str:
    """The tables of metrics.json."""
    m, variants = run.metrics, run.metrics["generation"]
    rows = [[name, *(v.get(name, "") for v in variants.values()), m["differences"].get(name, "")]
            for name in variants["after_reward"]]
    body = "<h2>What was measured</h2><p>On the test part; 95 % intervals in brackets. Picture and text "
    body += "are made apart, so they agree at most as often as consistency_bound, unless the best pair of "
    body += "several is kept; where consistency_repaired is as high, they agree by habit.</p>"
    body += table(["", *variants, "after less before"], rows)
    body += table(["stage 1, test part", ""], list(m["stage1"].items()))
    levels = [(name, n, h) for name, h in m["codebook"].items() for n in range(len(h["usage"]))]
    body += table(["codebook", "level", "usage", "perplexity", "explained", "collisions"],
                  [[name, n + 1, h["usage"][n], h["perplexity"][n], h["explained"], h["collision_rate"]]
                   for name, n, h in levels])
    for title, found in (("new users, history of", m["new_users"]), ("stage", run.seconds)):
        rows = [[name, *(row.values() if isinstance(row, dict) else row)] for name, row in found.items()]
        heads = list(m["new_users"]["in training"]) if found is m["new_users"] and found else ["s", "CPU s"]
        body += table([title, *heads], rows)
    return body


def report_curves(run: Run) -> str:
    """Reward and measures over the rounds, and the losses of the stages."""
    lines: dict[str, dict[str, list]] = {}
    for stage, step, name, value in run.log:
        lines.setdefault(stage, {}).setdefault(name, []).append((step, value))
    reward, body = lines.pop("reward", {}), "<h2>Reward</h2>"
    for word in ("consistency", "s_", "kl_", "utility", "prompt", "swap"):
        body += curves("over the rounds", {n: line for n, line in reward.items() if word in n})
    return body + "<h2>Losses</h2>" + "".join(curves(stage, of) for stage, of in lines.items())


def report_codes(run: Run) -> str:
    """What each code of the first level means: what its users like most above average."""
    if run.world:
        words = [{f"{a} {v}" for a, v in values_of(row).items()} for row in run.world.items]
    else:
        texts = [f"{text} {' '.join(p)}" for text, p in zip(run.data.texts, run.data.prompts)]
        words = [set(re.findall(r"\w+", text.casefold())) for text in texts]
    common = Counter(word for has in words for word in has)
    names = sorted(word for word, n in common.items() if n >= max(2, len(words) // 200))
    traits = torch.tensor([[word in has for word in names] for has in words]).float()  # (I, W)
    users, rows = run.users[:2000], []
    liked = liked_by(run, users, run.liked).cpu().float()  # (U, I)
    shares = liked @ traits / liked.sum(1, keepdim=True)  # (U, W)
    for m, taste in run.model.modality.items():
        lift = code_lift(taste.tokens[users, 0].cpu(), shares, run.cfg.vq.codes)  # (K, W)
        for code, (value, place) in enumerate(zip(*lift.topk(min(4, len(names)), dim=1))):
            best = [f"{names[i]} (+{v:.1f})" for v, i in zip(value, place.tolist()) if v > 1]
            rows.append([m, code, ", ".join(best)])
    head = ["modality", "code", "liked above average (standard errors)"]
    return f"<h2>What each code of the first level means</h2>{table(head, rows)}"


def report_grid(run: Run, users: Tensor, items: Tensor) -> str:
    """Users x prompts: one sees the taste along a row and the prompt down a column."""
    who, n = users.repeat_interleave(len(items)), len(items)
    own = pictures(run, make_for(run, "after_reward", who, items.repeat(len(users)), run.generator("grid")))
    rows = [[run.data.user_ids[u], *own[k * n:(k + 1) * n]] for k, u in enumerate(users.tolist())]
    head = ["", *(", ".join(run.data.prompts[i])[:40] for i in items.tolist())]
    return f"<h2>One row a user, one column a prompt, after the reward</h2>{table(head, rows)}"


def report_user(run: Run, user: Tensor, items: Tensor) -> str:
    """What a user likes, the tokens, and what was generated before and after the reward."""
    liked = run.liked[1, run.liked[0] == user][:8].cpu()
    likes = map(picture, to_float(run.data.images[liked]), (run.data.texts[i] for i in liked.tolist()))
    tokens = [f"{m} {' '.join(map(str, k.tolist()))}" for m, k in run.model.user_tokens(user).items()]
    body = f"<h3>{html.escape(run.data.user_ids[user])}: {', '.join(tokens)}</h3><p>Likes:</p>{''.join(likes)}"
    for variant in VARIANTS[2:]:
        made = make_for(run, variant, user.expand(len(items)), items, run.generator(f"report {user}"))
        body += f"<p>Made, {variant.replace('_', ' ')}:</p>{''.join(pictures(run, made))}"
    return body


def write_report(run: Run):
    """report.html: self-contained; every word from the data is escaped."""
    data, common = run.data, run.topic.bincount().argsort(descending=True, stable=True)[:8, None]
    items = (run.topic == common).int().argmax(1)  # an item for each of the commonest prompts
    items = items if len(items) > 1 else items.expand(8)
    chance = torch.Generator().manual_seed(run.seed("report"))
    users = run.pairs(TEST)[0].unique()
    users = users[torch.randperm(len(users), generator=chance)[:8].to(run.device)]
    size = f"seed {run.cfg.method.seed}, {len(data.user_ids):,} users, {len(data.item_ids):,} items"
    body = [f"<p>{size}</p>", report_grid(run, users, items), report_numbers(run), report_curves(run),
            report_codes(run), "<h2>Some users</h2>", *(report_user(run, u, items[:3]) for u in users)]
    page = PAGE.format(title=f"DPPMG on {html.escape(data.name)}", body="".join(body))
    with replacing(run.out / "report.html") as path:
        path.write_text(page, encoding="utf-8", errors="replace")


# ---- running the stages --------------------------------------------------------------------------

STAGES: dict[str, Callable[[Run], str]] = {
    "autoencoder": train_autoencoder, "features": fit_features, "gnn": train_gnn,
    "codebook": train_codebook, "text": train_text, "image": train_image, "scorer": train_scorer,
    "judge": train_scorer, "referee": train_referee, "reward": train_reward, "evaluation": evaluate}


def say(line: str):
    """Print a line. A reader who has gone away (`| head`) does not end a run."""
    try:
        tqdm.write(line)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
        say(f"{stage:12} {run.seconds[stage][0]:7.1f} s   {merit}")
        run.save()


def peak_memory_mb() -> int | None:
    """The most memory that this process has had; None where the system does not tell."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def write_json(path: Path, values: dict):
    """Valid JSON: null where a number does not exist."""
    values = json.loads(json.dumps(values), parse_constant=lambda nan: None)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")


def finish(run: Run):
    """Report and metrics.json: with the latter a run is finished."""
    with run.timed("report"):
        write_report(run)
    wall, cpu = ({stage: round(t[k], 2) for stage, t in run.seconds.items()} for k in (0, 1))
    wall["total"], cpu["total"] = (round(sum(times.values()), 2) for times in (wall, cpu))
    found = {"dataset": run.data.name, "seed": run.cfg.method.seed, "device": str(run.device),
             "threads": torch.get_num_threads(), "seconds": wall, "cpu_seconds": cpu,
             "peak_memory_mb": peak_memory_mb()}
    write_json(run.out / "metrics.json", found | run.metrics)
    say(f"{'total':12} {wall['total']:7.1f} s   {run.out / 'report.html'}")


# ---- command line --------------------------------------------------------------------------------

PARTS = {f.name: type(f.default) for f in fields(Config)} | {"train": TrainConfig}
SMOKE = {
    "train": dict(items=160, users=40, interactions=12, referee_pictures=256, referee_steps=20,
                  pairs=40, new_users=0.1, sampled_users=8, samples=8, best_of=2),
    "gnn": dict(steps=30, batch=256), "vq": dict(steps=30, codes=8, levels=2, batch=32),
    "text": dict(steps=20, layers=2, width=32, heads=2, vocab_size=320),
    "image": dict(steps=20, ae_steps=20, ae_width=16, width=16, batch=16, sampling_steps=4),
    "reward": dict(scorer_steps=20, scorer_width=8, scorer_batch=32, rounds=4, groups=4, images=4,
                   texts=4, diffusion_steps=4, log_every=2),
    "method": dict(image_features=16, text_features=16)}


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, dict]]:
    """Arguments, and the settings that were given: group -> name -> value."""
    parser = OneLineParser(prog="train.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", help="data folder, in dppmg.py's format; none: stickers")
    parser.add_argument("--out", help="folder of the run (the first of runs/NAME, NAME-2 ... that is free)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out as it was begun")
    parser.add_argument("--smoke", action="store_true", help="every stage, tiny: does it run?")
    parser.add_argument("--device", help="cpu, cuda or another of torch's (cuda where there is one)")
    groups = {name: parser.add_argument_group(name) for name in PARTS}
    for group, name, field, text in settings(PARTS):
        kind = type(field.default)
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": "N"}
        groups[group].add_argument(flag_of(group, name), dest=f"{group}.{name}", **how,
                                   help=f"{text} ({field.default})".replace("%", "%%"))
    args, given = parser.parse_args(argv), {group: {} for group in PARTS}
    for key, value in vars(args).items():
        group, _, name = key.partition(".")
        if name and value is not None:
            given[group][name] = value
    return args, given


def read_config(out: Path | None) -> dict:
    """config.json of the run in a folder; {} for no folder, or an empty one. ValueError on all
    else."""
    if out is None or not out.exists() or out.is_dir() and not any(out.iterdir()):
        return {}
    if not (out / "config.json").exists():
        raise ValueError(f"--out {out}: exists and is not a run; choose another")
    try:
        there = json.loads((out / "config.json").read_text(encoding="utf-8"))
        whole = {name: asdict(part(**there["settings"][name])) for name, part in PARTS.items()}
        if whole != there["settings"]:
            raise KeyError("a setting is missing")
        whole.pop("train")
        Config.from_dict(whole)
        return {key: there[key] for key in ("settings", "data", "fingerprint", "machine")}
    except (AttributeError, OSError, KeyError, TypeError, ValueError) as error:
        what = f"not the settings of a run ({type(error).__name__})"
        raise ValueError(f"{out}/config.json: {what}; choose another --out") from None


def new_folder(name: str) -> Path:
    """runs/NAME, or NAME-2 and so on: made while it is chosen, so that no other process chooses
    it."""
    for n in range(1, 10**6):
        out = Path("runs") / (name if n == 1 else f"{name}-{n}")
        with contextlib.suppress(FileExistsError):
            out.mkdir(parents=True)
            return out


def lock(out: Path):
    """Claim a folder for this process until it ends. ValueError where another one trains in it."""
    path = out / "lock"
    try:
        owner = int(path.read_text())
        if os.name != "nt":  # where asking would end the process
            os.kill(owner, 0)
    except (OSError, ValueError):  # no lock, or of a process that is no more
        owner = os.getpid()
    if owner != os.getpid():
        raise ValueError(f"--out {out}: process {owner} trains in it; wait, or choose another --out")
    path.unlink(missing_ok=True)
    with open(path, "x") as file:  # fails if another process was quicker
        file.write(str(os.getpid()))


def machine(device: torch.device) -> dict[str, str | int]:
    """What the last bits of a run depend on, beside its settings and data."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "device": str(device),
            "numpy": np.__version__, "threads": torch.get_num_threads()}


def check_same(out: Path | None, config: dict, there: dict):
    """ValueError unless what is asked is what the run in `out` was begun with. The folder of the
    data may have moved: its content counts."""
    if not there:
        return
    mine, theirs = ({flag_of(group, name): value for group, part in x["settings"].items()
                     for name, value in part.items()} | {"--data": x["data"] is None} for x in (config, there))
    differ = [flag for flag, value in mine.items() if theirs.get(flag) != value]
    if differ:
        what = f"holds a run with other settings ({', '.join(differ[:5])})"
        raise ValueError(f"--out {out}: {what}; choose another --out")
    if len({config["fingerprint"], there["fingerprint"]} - {None}) > 1:
        raise ValueError(f"--out {out}: the data has changed since this run began; choose another --out")


def claim(out: Path, config: dict):
    """Make the folder this process's own, try whether there is space for what the end needs,
    remove what a killed run left half-written, and write config.json."""
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    if (free := shutil.disk_usage(out).free / 2**20) < 200:
        raise OSError(f"{out}: {free:.0f} MB are free on this disk; a run needs 200")
    for half in out.glob(".*.tmp"):
        half.unlink()
    write_json(out / "config.json", config)


def open_run(args: argparse.Namespace, given: dict[str, dict]) -> Run:
    """A new run, or the unfinished one in --out. One rule: a folder whose config.json equals what
    is asked goes on where it was; --resume asks for what is there. ValueError or OSError where
    neither is possible."""
    out = Path(args.out) if args.out else None
    there = read_config(out)
    if args.resume and not there:
        raise ValueError("--resume: name a run that was begun, with --out")
    if there and (out / "metrics.json").exists():
        raise ValueError(f"--out {out}: this run is finished; choose another")
    base = there["settings"] if args.resume else SMOKE if args.smoke else {}
    parts = {name: part(**base.get(name, {}) | given[name]) for name, part in PARTS.items()}
    config = {"settings": {name: asdict(part) for name, part in parts.items()}, "fingerprint": None,
              "data": os.path.abspath(args.data) if args.data else there["data"] if args.resume else None}
    train, device = parts.pop("train"), pick_device(args.device)
    cfg, folder, world = Config(**parts), config["data"], None
    check_same(out, config, there)
    if folder is None:
        out = out or new_folder("smoke" if args.smoke else "stickers")
        folder, world = out / "stickers", sticker_world(train, cfg.method.seed)
        if not (folder / "interactions.csv").exists():
            claim(out, config | {"machine": machine(device)})  # first: what is killed now can be resumed
            write_stickers(folder, world, cfg.method.seed)
    data = Dataset.load(folder, cfg.image.size, cfg.method.seed, train.min_rating or None,
                        train.drop_incomplete)
    config |= {"fingerprint": data.fingerprint(), "machine": machine(device)}
    check_same(out, config, there)
    if there and there["machine"] != config["machine"]:
        data.notices.append(f"begun on {there['machine']}: the last bits may differ here")
    run = Run(cfg, train, data, world, out or new_folder(data.name), device)
    claim(run.out, config)
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Exit status: 0; 1 diverged; 2 a user's mistake; 130 interrupted."""
    forgive_terminals()
    args, given = parse_arguments(argv)
    run = None

    def interrupt(*_):
        if run and run.busy and not run.interrupted:
            run.interrupted = True  # fit saves after its step and raises KeyboardInterrupt
        else:
            raise KeyboardInterrupt
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        start = time.perf_counter(), time.process_time()
        run = open_run(args, given)
        run.seconds["data"] = [time.perf_counter() - start[0], time.process_time() - start[1]]
        run.restore()
        for notice in run.data.notices:
            say(f"note: {notice}")
        train_all(run)
        finish(run)
    except KeyboardInterrupt:
        go_on = f"; go on with: python train.py --resume --out {run.out}" if run else ""
        print(f"interrupted{go_on}", file=sys.stderr)
        return 130
    except (Diverged, ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Diverged) else 2
    finally:
        if run:
            (run.out / "lock").unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
