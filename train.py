"""Train DPPMG stage by stage, evaluate it on what was held out, and report.

    python train.py                       stickers, the built-in data
    python train.py --data DIR            your data (the format: dppmg.py)
    python train.py --smoke               every stage, tiny
    python train.py --resume --out RUN    go on with a run that was stopped

A run leaves config.json, checkpoint.pt, log.csv, metrics.json and report.html in runs/NAME/, or
--out. It can be killed at any time: all randomness is a function of (seed, stage, step), so a
resumed run ends with the same bits.

Shapes: as in dppmg.py; A attributes of a sticker; in evaluation G users of S samples each, and W
different prompts, or words that occur in the data.
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import hashlib
import inspect
import json
import math
import os
import re
import shutil
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
from torch import Generator, Tensor, nn
from tqdm import tqdm

from dppmg import (DPPMG, FORMAT, MODALITIES, TEST, TRAIN, VALID, Catalogue, CheckpointError,
                   Config, Dataset, OneLineParser, check_limits, flag_of, forgive_terminals,
                   hold_out_users, pick_device, read_checkpoint, replacing, say)
from generators import Tokenizer, drop_preferences, table_as
from gnn import bpr_loss, build_graph, ranking_summary, sample_positives, sample_triplets
from reward import (Content, Scorer, embed, frechet_interval, halves_by_text, interval, judge_pairs,
                    rank_share, share_interval, share_of_pairs, swap_share, taste_without,
                    token_optimizer)
from vq import codebook_health, explained


@dataclass(frozen=True)
class TrainConfig:
    items: int = 2000  # stickers in the built-in data
    users: int = 600  # users of the built-in data
    interactions: int = 30  # stickers that each of them likes
    referee_pictures: int = 3000  # freshly drawn stickers that the referee learns from
    referee_steps: int = 300  # optimizer steps of the referee
    pairs: int = 480  # (user, prompt) pairs of the test part to evaluate on
    sampled_users: int = 30  # users for whom many samples are drawn: taste and variety
    samples: int = 32  # samples for each of them
    best_of: int = 4  # pictures, with twice as many texts, of which best_of keeps a pair
    min_rating: float = 0.0  # of rows with a rating, those of at least so much are likes
    drop_incomplete: bool = False  # leave out items without a readable picture or a text
    new_users: float = 0.08  # share of the users kept out of all training, to be folded in
    checkpoint_seconds: float = 60.0  # between two checkpoints within a stage

    def __post_init__(self):
        least = dict(items=16, users=6, referee_pictures=16, pairs=20, samples=2)
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
SUBJECTS = ("fish", "house", "tree", "boat", "star", "heart", "moon", "flower")
SETTINGS = ("dawn", "day", "dusk", "night")
PAINT = {"red": (214, 40, 40), "orange": (240, 130, 30), "yellow": (250, 215, 50),
         "green": (50, 150, 60), "blue": (40, 90, 215), "purple": (140, 60, 180)}
# colours of the top and the bottom
SKY = {"dawn": ((255, 200, 190), (255, 235, 200)), "day": ((120, 190, 250), (205, 235, 255)),
       "dusk": ((110, 70, 130), (225, 130, 110)), "night": ((10, 14, 45), (30, 40, 90))}
ATTRIBUTES = {"subject": SUBJECTS, "setting": SETTINGS, "colour": tuple(PAINT),
              "pattern": ("plain", "dots", "stripes"), "tone": TONES}
SEEN = ("subject", "setting", "colour", "pattern")  # in the picture
SHARPNESS = {"subject": 1.0, "setting": 1.0, "colour": 2.0, "pattern": 2.0, "tone": 2.0}
SIDE, FINE = 32, 4  # pixels of a sticker; drawn so many times larger, then averaged


def _ring(*radii: float, n: int = 24, x: float = 0, y: float = 0) -> np.ndarray:
    """Corners (n, 2) of a polygon around (x, y), at the radii in turn, the first at the top."""
    angle = math.tau * np.arange(n)[:, None] / n
    return (x, y) + np.resize(radii, (n, 1)) * np.hstack([np.sin(angle), -np.cos(angle)])


# polygons on [-1, 1]^2, y downwards
SHAPES = {
    "fish": [_ring(0.65, x=-0.3), [(0.2, 0), (0.98, -0.65), (0.98, 0.65)]],
    "house": [[(-1, 0), (0, -0.95), (1, 0)],
              [(-0.75, -0.1), (0.75, -0.1), (0.75, 0.9), (-0.75, 0.9)]],
    "tree": [_ring(0.75, y=-0.25), [(-0.22, 0.3), (0.22, 0.3), (0.3, 1), (-0.3, 1)]],
    "boat": [[(-1, 0.3), (1, 0.3), (0.6, 0.9), (-0.6, 0.9)],
             [(-0.1, -1), (-0.1, 0.2), (0.85, 0.2)], [(-0.2, -0.8), (-0.2, 0.2), (-0.8, 0.2)]],
    "star": [_ring(1.05, 0.5, n=10)],
    "heart": [_ring(0.5, x=-0.44, y=-0.37), _ring(0.5, x=0.44, y=-0.37),
              [(-0.86, -0.1), (0, -0.45), (0.86, -0.1), (0, 0.95)]],
    # an arc of one circle, and back along another that crosses it
    "moon": [[*_ring(0.95)[10:], *_ring(0.95)[:2], *_ring(0.7, x=0.5, y=-0.3)[:10:-1]]],
    "flower": [_ring(0.38), *(_ring(0.38, x=x, y=y) for x, y in _ring(0.58, n=5))],
}


def _body(value: dict[str, str], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A subject's paint with its pattern, (128, 128, 3), at x, y (128, 128, 1) from its centre."""
    paint = np.array(PAINT[value["colour"]])
    if value["pattern"] == "stripes":
        return np.where(y % 6 < 2.6, 0.35 * paint, paint)
    if value["pattern"] == "dots":
        x = x + 3 * (y // 6 % 2)  # every other row is shifted
        return np.where(np.hypot(x % 6 - 3, y % 6 - 3) < 1.7, 255, paint)
    return np.tile(paint, x.shape)


def draw_sticker(value: dict[str, str], rng: np.random.Generator) -> Image.Image:
    """A 32 x 32 RGB picture, anti-aliased, of the values of SEEN: the patterned subject with a
    white rim before a sky; its place and size vary by about 6 %."""
    centre, radius = SIDE / 2 + rng.uniform(-2, 2, 2), 12 * rng.uniform(0.9, 1.05)
    y, x = np.mgrid[:SIDE * FINE, :SIDE * FINE][..., None] / FINE  # pixels
    top, bottom = np.array(SKY[value["setting"]])
    sky = top + (bottom - top) * y / SIDE  # (128, 128, 3)
    body = _body(value, x - centre[0], y - centre[1])
    picture, body = (Image.fromarray(z.astype(np.uint8)) for z in (sky, body))
    mask = Image.new("L", picture.size)
    for shape in SHAPES[value["subject"]]:
        corners = (FINE * (centre + radius * np.array(shape))).flatten().tolist()
        ImageDraw.Draw(mask).polygon(corners, fill=255)
        rim = corners + corners[:4]  # a line around the shape, whose inner half the body covers
        ImageDraw.Draw(picture).line(rim, "white", width=int(2.8 * FINE), joint="curve")
    picture.paste(body, mask=mask)
    return picture.resize((SIDE, SIDE), Image.BOX)


class World(NamedTuple):
    """Who likes what, exactly: what stickers are drawn from, and what the referee knows."""
    items: np.ndarray  # (I, A) value of each attribute, in the order of ATTRIBUTES
    tastes: dict[str, np.ndarray]  # attribute -> (U, values) the users' probabilities
    liked: np.ndarray  # (U, n) items, the oldest first


def sticker_world(cfg: TrainConfig, seed: int) -> World:
    """Stickers of uniform attributes, and users whose tastes are known: log tastes are normal with
    the standard deviation SHARPNESS; a user's items are drawn without replacement in proportion to
    the product of the tastes for their attributes (Gumbel top-k). So visual and verbal taste are
    independent."""
    rng = np.random.default_rng([seed, 1])
    items = np.stack([rng.integers(0, len(v), cfg.items) for v in ATTRIBUTES.values()], 1)
    logits = {a: SHARPNESS[a] * rng.normal(size=(cfg.users, len(v))) for a, v in ATTRIBUTES.items()}
    tastes = {a: np.exp(x) / np.exp(x).sum(1, keepdims=True) for a, x in logits.items()}
    liked = []
    for u in range(cfg.users):
        log_p = sum(np.log(tastes[a][u, items[:, k]]) for k, a in enumerate(ATTRIBUTES))  # (I,)
        liked.append(np.argsort(-log_p - rng.gumbel(size=cfg.items))[:cfg.interactions])
    return World(items, tastes, rng.permuted(np.stack(liked), axis=1))


def values_of(row: np.ndarray) -> dict[str, str]:
    """The words of a row of numbers, one for each attribute, or for each of SEEN."""
    return {a: ATTRIBUTES[a][v] for a, v in zip(ATTRIBUTES, row)}


def write_csv(path: Path, header: Sequence[str], rows: list[list]):
    """A CSV file in UTF-8."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_stickers(folder: Path, world: World, seed: int):
    """The world as a data folder. items.csv also names the attributes; loading ignores them."""
    rng = np.random.default_rng([seed, 2])
    (folder / "images").mkdir(parents=True, exist_ok=True)
    items, likes = [], []
    for n, value in enumerate(map(values_of, world.items)):
        with replacing(folder / "images" / f"s{n:04d}.png") as path:
            draw_sticker(value, rng).save(path, "PNG")
        items.append([f"s{n:04d}", value["tone"].format(**value), *(value[a] for a in SEEN)])
    for u, row in enumerate(world.liked):
        likes += [[f"u{u:03d}", f"s{i:04d}", time] for time, i in enumerate(row)]
    write_csv(folder / "items.csv", ["item", "text", "prompt", *SEEN[1:]], items)
    write_csv(folder / "interactions.csv", ["user", "item", "timestamp"], likes)


def to_float(images: Tensor) -> Tensor:
    """uint8 pictures -> floats in [-1, 1]."""
    return images / 127.5 - 1


def draw_batch(n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """n freshly drawn stickers: pictures (n, 3, 32, 32) in [-1, 1], and values of SEEN (n, 4)."""
    values = np.stack([rng.integers(0, len(ATTRIBUTES[a]), n) for a in SEEN], 1)
    pictures = np.stack([draw_sticker(values_of(row), rng) for row in values])
    return to_float(torch.from_numpy(pictures).permute(0, 3, 1, 2)), torch.from_numpy(values)


class Referee(nn.Module):
    """Reads the values of SEEN off a sticker; trained on freshly drawn ones only, with noise, since
    it shall read pictures that were generated."""

    def __init__(self):
        super().__init__()
        self.sizes = [len(ATTRIBUTES[a]) for a in SEEN]
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.GroupNorm(8, 64), nn.ReLU(),
            nn.Conv2d(64, 96, 3, 2, 1), nn.GroupNorm(8, 96), nn.ReLU(),
            nn.Conv2d(96, 96, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1536, sum(self.sizes)))

    def loss(self, pictures: Tensor, values: Tensor, generator: Generator | None) -> Tensor:
        """() cross entropy, summed over SEEN; pictures (B, 3, 32, 32) get noise of up to 0.1."""
        size = torch.rand(len(pictures), 1, 1, 1, generator=generator, device=pictures.device) / 10
        noise = torch.randn(pictures.shape, generator=generator, device=pictures.device)
        logits = self.net(pictures + size * noise).split(self.sizes, 1)
        return sum(F.cross_entropy(x, y) for x, y in zip(logits, values.T))

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, H) in [-1, 1], seen at 32 x 32 -> (B, 4) int64, the values of SEEN."""
        logits = self.net(F.adaptive_avg_pool2d(pictures, SIDE)).split(self.sizes, 1)
        return torch.stack([x.argmax(1) for x in logits], 1)


TEXTS = {tone.format(subject=subject, setting=setting): (s, n, t)
         for s, subject in enumerate(SUBJECTS)
         for n, setting in enumerate(SETTINGS) for t, tone in enumerate(TONES)}


def read_text(text: str) -> tuple[int, int, int]:
    """Subject, setting and tone of a sticker's text; -1 thrice if it is not one."""
    return TEXTS.get(text, (-1, -1, -1))


# ---- a run: stages that can be killed and resumed ------------------------------------------------

KEPT = ("done", "stage", "step", "log", "metrics", "seconds", "tables")  # in a checkpoint


def clocks() -> np.ndarray:
    """Seconds on the wall, and of this process's CPU time."""
    return np.array([time.perf_counter(), time.process_time()])


def check_finite(run: "Run", values: dict[str, Tensor]):
    """Raises FloatingPointError, naming the first of the tensors that is not finite."""
    for name, value in values.items():
        if not value.isfinite().all():
            raise FloatingPointError(f"stage {run.stage}, step {run.step}: {name} is not finite; "
                                     "the last good checkpoint is kept; try a lower learning rate")


class Run:
    """What a run consists of between its stages: settings, data, networks, and what its files hold.

    modules: what training changes, saved whole; tables: the preference-token tables before the
    reward; new: pairs (2, E) of users kept out of training; liked (2, E): training interactions,
    users and seen: of whom and of what; tokens (I, T), images (I, 3, H, H) uint8, prompt (I, P);
    prompts (W, P): different ones, topic (I,): which; learns: items that scorer and judge learn
    from, halves of which the other knows no text; fresh (I,) bool: items new to the judge.
    All randomness comes from generator(stage, step), so the state that a checkpoint needs is
    modules, optimizer and step."""

    def __init__(self, cfg: Config, train: TrainConfig, data: Dataset, world: World | None,
                 out: Path, device: torch.device):
        self.cfg, self.train, self.data, self.world = cfg, train, data, world
        self.out, self.device, self.clock = out, device, clocks()
        self.done, self.stage, self.step, self.optimizer_state = [], "", 0, None
        self.log, self.metrics, self.seconds, self.tables = [], {}, {}, {}
        self.busy = self.interrupted = False  # in a step of `fit`; asked to end after it
        new = hold_out_users(data, train.new_users, cfg.method.seed)
        self.new = {name: pairs.to(device) for name, pairs in new.items()}
        self.liked = self.pairs(TRAIN)
        self.users, self.seen = (x.unique() for x in self.liked)
        n_test, n_seen = len(self.pairs(TEST)[0].unique()), len(self.seen)
        if n_test < 3 or n_seen < 4:
            raise ValueError(f"{data.name}: {n_test} users to test on (need 3), {n_seen} items to "
                             "learn from (need 4): need more interactions")
        self.modules = self._networks()
        self.model = self.modules["model"].to(device)  # its graph, too
        context = cfg.text.context
        tokens, longest = self.model.tokenizer.encode_batch(data.texts, context)
        if longest > context:
            cure = f"--text-context {longest} keeps the longest whole"
            data.notices.append(f"texts cut to {context} tokens; {cure}")
        self.tokens, self.images = tokens.to(device), data.images.to(device)
        self.prompt = self.model.catalogue.encode_prompts(data.prompts).to(device)
        self.prompts, self.topic = self.prompt.unique(dim=0, return_inverse=True)
        halves = halves_by_text(tokens[self.seen.cpu()], self.generator("halves", device="cpu"))
        self.learns = {m: self.seen[x.to(device)] for m, x in zip(("scorer", "judge"), halves)}
        text = self.tokens.unique(dim=0, return_inverse=True)[1]  # (I,)
        self.fresh = ~torch.isin(text, text[self.learns["judge"]])

    def _start(self, name: str, network: type[nn.Module], *sizes) -> nn.Module:
        """A new network, from a stream of its own: the judge shares nothing with the scorer."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed(f"start of {name}"))
            return network(*sizes)

    def _networks(self) -> nn.ModuleDict:
        """All that is trained, and the running mean of the denoiser."""
        cfg, texts = self.cfg, [self.data.texts[i] for i in self.seen.tolist()]
        tokenizer = Tokenizer.train(texts, cfg.text.vocab_size)
        catalogue = Catalogue.of(self.data, tokenizer)
        sizes = tokenizer.vocab_size, max(1, len(catalogue.words))
        model = self._start("model", DPPMG, cfg, catalogue)
        return nn.ModuleDict({
            "model": model, "average": copy.deepcopy(model.image),
            "referee": self._start("referee", Referee),
            "judge": self._start("judge", Scorer, cfg.reward, *sizes)}).to(self.device)

    def pairs(self, *parts: int) -> Tensor:
        """Users and items (2, R) of the interactions in some parts of the data, or in all."""
        return self.data.pairs(*parts).to(self.device)

    def seed(self, stage: str, step: int = 0) -> int:
        """A number below 2^63: a function of the run's seed, the stage and the step."""
        digest = hashlib.sha256(f"{self.cfg.method.seed}/{stage}/{step}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def generator(self, stage: str, step: int = 0, device: str | None = None) -> Generator:
        """The randomness of one step of one stage, on the device, or another."""
        return torch.Generator(device or self.device).manual_seed(self.seed(stage, step))

    def identity(self) -> dict:
        """What a checkpoint must have in common with the run that goes on from it."""
        return {"config": asdict(self.cfg), "train": asdict(self.train),
                "fingerprint": self.data.fingerprint()}

    def save(self, optimizer: torch.optim.Optimizer | None = None):
        """Write checkpoint.pt and log.csv; add the time since the last one to the stage's seconds.
        Raises FloatingPointError, and keeps the last good files, if a parameter is not finite."""
        check_finite(self, self.modules.state_dict())
        spent, self.clock = clocks() - self.clock, clocks()
        self.seconds[self.stage] = (spent + self.seconds.get(self.stage, 0)).tolist()
        state = self.model.state() | self.identity() | {name: getattr(self, name) for name in KEPT}
        state |= {"format": FORMAT, "optimizer": optimizer.state_dict() if optimizer else None}
        state["modules"] = self.modules.state_dict()  # with the model, which is not stored twice
        with replacing(self.out / "checkpoint.pt") as path, open(path, "wb") as file:
            torch.save(state, file)
        write_csv(self.out / "log.csv", ["stage", "step", "name", "value"], self.log)

    def restore(self):
        """Go on from the checkpoint, if there is one. CheckpointError where it is another run's."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return
        state = read_checkpoint(path)
        try:
            if any(state[name] != value for name, value in self.identity().items()):
                raise ValueError("other settings or data")
            self.modules.load_state_dict(state["modules"])
            for name in KEPT:
                setattr(self, name, state[name])
            self.tables = {m: table.to(self.device) for m, table in self.tables.items()}
            self.optimizer_state = state["optimizer"]
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            why = f"not of this run ({error!r:.200})"
            raise CheckpointError(f"{path}: {why}; choose another --out") from None

    def note(self, step: int, **values: float):
        """Add named values to the log of this stage."""
        self.log += [[self.stage, step, name, float(value)] for name, value in values.items()]


def adamw(module: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices and kernels only, as one fused kernel."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


def ramp(x: float, warm: float = 0.05, hold: float = 0.05) -> float:
    """Learning rate over its peak at x in [0, 1) of a stage: up until `warm`, down after `hold`."""
    return min(1.0, (x + 1e-3) / warm, (1 - x) / (1 - hold))


@torch.no_grad()
def ema_update(average: nn.Module, model: nn.Module, decay: float, step: int):
    """average <- decay average + (1 - decay) model, parameter by parameter; the decay is at most
    (1 + step) / (10 + step), so that the start is forgotten."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)


def fit(run: Run, optimizer: torch.optim.Optimizer, steps: int,
        losses: Callable[[Generator], dict[str, Tensor]], schedule: Callable = ramp,
        after: Callable[[int], None] = lambda step: None, clip: float = 1.0):
    """The one training loop: `losses` gives the tensors to log, of which "loss" is descended;
    `after`(step) follows a step. Goes on where a checkpoint left this stage, and writes one from
    time to time. Raises FloatingPointError on a loss or gradient that is not finite (looked at
    each step on the CPU, elsewhere when it logs: a look waits for the device)."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    peaks = [group["lr"] for group in optimizer.param_groups]
    if run.optimizer_state:
        optimizer.load_state_dict(run.optimizer_state)
    todo = range(run.step, steps)
    for step in tqdm(todo, run.stage, steps, leave=False, disable=None, initial=run.step):
        run.busy, log = True, (step + 1) % max(1, steps // 50) == 0 or step + 1 == steps
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * schedule(step / steps)
        parts = losses(run.generator(run.stage, step))
        optimizer.zero_grad(set_to_none=True)
        # for these alone: in the reward all else stays, but keeps requires_grad, without which
        # autocast casts a weight to bf16 at each use instead of once a block
        parts["loss"].backward(inputs=params)
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if run.device.type == "cpu" or log:
            check_finite(run, parts | {"gradient": norm})
        nn.utils.clip_grads_with_norm_(params, clip, norm)
        optimizer.step()
        run.step = step + 1
        after(step)
        if log:
            run.note(run.step, **{name: value.item() for name, value in parts.items()})
        if run.interrupted or clocks()[0] - run.clock[0] > run.train.checkpoint_seconds:
            run.save(optimizer)
        run.busy = False
        if run.interrupted:
            raise KeyboardInterrupt


# ---- the stages ----------------------------------------------------------------------------------
# Each trains one part on the training interactions and returns what it achieved in words.

def draw(n: int, size: int, generator: Generator) -> Tensor:
    """size indices below n, with replacement."""
    return torch.randint(n, (size,), generator=generator, device=generator.device)


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) without gradient, 256 rows at a time."""
    return torch.cat([function(rows) for rows in x.split(256)])


def latents_of(run: Run) -> Tensor:
    """Latents (I, C, h, h) of all pictures, which never are floats all at once."""
    return in_batches(lambda x: run.model.autoencoder.encode(to_float(x)), run.images)


def contents(run: Run, item: Tensor) -> Content:
    """Pictures and texts of items (B,)."""
    return Content(to_float(run.images[item]), run.tokens[item])


def tables_of(model: DPPMG) -> dict[str, Tensor]:
    """Both generators' tables of preference tokens."""
    return {m: getattr(model, m).preference.weight for m in MODALITIES}


def train_autoencoder(run: Run) -> str:
    """Reconstruct the pictures of items that were liked in training; standardize the latents."""
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
    """PCA of latents and SVD of TF-IDF, fitted to the items liked in training, for all items."""
    model, content = run.model, {"image": latents_of(run), "text": run.tokens}
    for m, x in content.items():
        features = getattr(model, f"{m}_features")
        features.fit(x[run.seen])
        model.gnn.set_features(m, features(x))
    return f"{len(run.seen)} items liked in training, {len(run.images)} in all"


def rank(run: Run, rows: dict[str, tuple[Tensor, Tensor]], test: Tensor) -> dict[str, float]:
    """Recall@20 and NDCG@20 of test (user, item) (2, R), over all items but what else the users
    like: training and validation items, and of new people everything but their test items."""
    hidden = torch.cat([run.pairs(TRAIN, VALID), run.new["hidden"]], 1)
    size = len(run.data.user_ids), len(run.data.item_ids)
    graphs = [build_graph(*pairs, *size).to(run.device) for pairs in (hidden, test)]
    return ranking_summary(rows, *graphs)


def train_gnn(run: Run) -> str:
    """Modal-specific graph network by BPR."""
    cfg, gnn, graph = run.cfg.gnn, run.model.gnn, run.model.graph

    def losses(generator):
        return {"loss": gnn.loss(graph, *sample_triplets(graph, cfg.batch, generator))}
    fit(run, torch.optim.Adam(gnn.parameters(), cfg.lr), cfg.steps, losses, lambda x: 1.0)
    run.metrics["stage1"] = rank(run, gnn(graph), run.pairs(TEST))
    return f"recall@20 {run.metrics['stage1']['recall@20']:.4f}"


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


def train_codebook(run: Run) -> str:
    """Residual VQ-VAE of each modality's preferences; BPR on what it rebuilds keeps what ranks."""
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


def train_generator(run: Run, m: str, loss: Callable, **options) -> str:
    """Learn what users liked: loss(items (n,), prompts (n, P), tokens (n, M), generator) on
    training interactions, tokens null at null_rate; and the loss on 512 validation interactions."""
    cfg, net = getattr(run.cfg, m), getattr(run.model, m)

    def losses(generator):
        user, item = run.liked[:, draw(run.liked.shape[1], cfg.batch, generator)]
        prefs = drop_preferences(run.model.user_tokens(user)[m], cfg.null_rate, generator)
        with run.model.half():
            return {"loss": loss(item, run.prompt[item], prefs, generator)}
    fit(run, adamw(net, cfg.lr, cfg.weight_decay), cfg.steps, losses, **options)
    user, item = run.pairs(VALID)[:, :512]
    prefs = run.model.user_tokens(user)[m]
    with torch.no_grad():
        value = loss(item, run.prompt[item], prefs, run.generator("validation"))
    run.note(run.step, loss_validation=value)
    return f"validation loss {value:.4f}"


def train_text(run: Run) -> str:
    """GPT-style decoder on the texts that users liked, given the prompt and their tokens."""
    return train_generator(run, "text", lambda item, prompt, prefs, generator:
                           run.model.text.loss(run.tokens[item], prompt, prefs))


def train_image(run: Run) -> str:
    """Denoiser on the latents of the pictures that users liked; it samples by the running mean of
    its weights, which is what remains."""
    cfg, net, average = run.cfg.image, run.model.image, run.modules["average"]
    latents = latents_of(run)

    def loss(item, prompt, prefs, generator):
        return net.loss(latents[item], prompt, prefs, generator)

    def after(step):
        ema_update(average, net, cfg.ema, step)
        if step + 1 == cfg.steps:
            net.load_state_dict(average.state_dict())
    return train_generator(run, "image", loss, schedule=lambda x: ramp(x, hold=0.5), after=after)


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
    return f"right on fresh stickers: {right.double().mean():.1%}"


# ---- evaluation: on what was held out, by a judge or referee that the reward never saw -----------

VARIANTS = ("real", "unpersonalized", "before_reward", "after_reward", "best_of")


class Pairs(NamedTuple):
    """Users (B,), items (B,), which give the prompts, and for "real" the content; and for each
    another user of the training, at random (B,)."""
    user: Tensor
    item: Tensor
    other: Tensor


class Made(NamedTuple):
    """What a variant gives for pairs: for their users, and, with the same prompts, for the other
    users; and texts (B, T) for their users in another draw, all PAD where there is none."""
    pairs: Pairs
    own: Content
    other: Content
    again: Tensor


def draw_pairs(run: Run, part: int, n: int) -> Pairs:
    """At most n interactions of a part of the data, at random, each with another training user."""
    user, item = run.data.pairs(part)
    generator, users = run.generator(f"pairs {part}", device="cpu"), run.users.cpu()
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


def choose(mask: Tensor, n: int, generator: Generator) -> Tensor:
    """n different items of each row at random, -1 where it has fewer: (B, I) bool -> (B, n)."""
    chance = torch.rand(mask.shape, generator=generator, device=mask.device).masked_fill(~mask, -1)
    value, item = chance.topk(min(n, mask.shape[1]), dim=1)
    return item.masked_fill(value < 0, -1)


def make_real(run: Run, pairs: Pairs, generator: Generator) -> Made:
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


def make_for(run: Run, variant: str, user: Tensor, item: Tensor, generator: Generator) -> Content:
    """What a variant (all but "real") generates for users (B,) and the prompts of items (B,)."""
    model, tokens = run.model, run.model.user_tokens(user)
    if variant == "unpersonalized":
        tokens = {m: torch.full_like(rows, -1) for m, rows in tokens.items()}
    tables = run.tables if variant in ("before_reward", "best_of") else tables_of(model)
    best_of = run.train.best_of if variant == "best_of" else 1
    with table_as(model.image, tables["image"]), table_as(model.text, tables["text"]):
        return Content(*model.sample_pairs(run.prompt[item], tokens, generator, best_of))


def make(run: Run, variant: str, pairs: Pairs, generator: Generator) -> Made:
    """What a variant gives for the pairs, and for comparison: another user's, and another draw."""
    if variant == "real":
        return make_real(run, pairs, generator)
    own, other, again = (make_for(run, variant, user, pairs.item, generator)
                         for user in (pairs.user, pairs.other, pairs.user))
    return Made(pairs, own, other, again.tokens)


def read(run: Run, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Stickers: values of SEEN in pictures (B, 4); subject, setting and tone of texts (B, 3)."""
    texts = [read_text(text) for text in run.model.tokenizer.decode_batch(tokens)]
    return in_batches(run.modules["referee"].read, images).cpu(), torch.tensor(texts).reshape(-1, 3)


def agree(see: Tensor, told: Tensor) -> Tensor:
    """Whether picture and text agree in subject and setting: (B, 4), (B, 3) -> (B,) bool."""
    return (see[:, :2] == told[:, :2]).all(1)


def shown(see: Tensor, told: Tensor) -> dict[str, dict[str, Tensor]]:
    """modality -> attribute that it shows and the prompt leaves open -> value (B,), -1 if none."""
    image = dict(zip(SEEN[1:], see[:, 1:].T))
    return {"image": image, "text": {"setting": told[:, 1], "tone": told[:, 2]}}


def exact_measures(run: Run, user: Tensor, item: Tensor, content: Content) -> dict[str, Tensor]:
    """Stickers: what referee and grammar find, (B,) each; the README's glossary explains them."""
    see, told = read(run, *content)
    subject = torch.from_numpy(run.world.items)[item.cpu(), 0]
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
    images = in_batches(lambda x: judge.encode_image(to_float(x)), run.images)
    items = {"image": images, "text": in_batches(judge.encode_text, run.tokens)}
    tastes = {m: taste_without(emb, *likes, user, item) for m, emb in items.items()}
    found = judge_pairs(judge, made.own, made.other, made.again, tastes)
    if len(run.prompts) > 1:
        prompts = in_batches(judge.encode_prompt, run.prompts)
        for m, emb in embed(judge, made.own).items():
            found[f"judge_prompt_{m}"] = rank_share(emb, prompts, run.topic[item])
    return found


def measures(run: Run, made: Made, likes: Tensor) -> dict[str, Tensor]:
    """Every measure of each pair, (B,) float64; nan where there is nothing to measure."""
    found, (user, item, _) = {}, made.pairs
    if run.world:
        own, other = (exact_measures(run, user, item, x) for x in (made.own, made.other))
        repaired = agree(*read(run, made.own.images, made.again))
        found = own | {"consistency_repaired": repaired}
        for m in MODALITIES:
            found[f"swap_{m}"] = swap_share(own[f"utility_{m}"], other[f"utility_{m}"])
    found |= judge_measures(run, made, likes)
    learnt = {run.data.texts[i] for i in run.seen.tolist()}
    texts = run.model.tokenizer.decode_batch(made.own.tokens)
    found["copied"] = torch.tensor([text in learnt for text in texts])
    found = {name: value.cpu().double() for name, value in found.items()}
    for name in found:
        if "repaired" in name:  # not measured where there is no other text
            found[name][(made.again == 0).all(1).cpu()] = math.nan
    return found


def watch(run: Run):
    """Log the measures on 96 validation pairs: what does the reward do to them? The judge's taste
    of a user is made of validation likes alone: nothing of the test part is looked at."""
    made = make(run, "after_reward", draw_pairs(run, VALID, 96), run.generator("watch"))
    found = measures(run, made, run.pairs(VALID))
    run.note(run.step, **{f"valid_{n}": v.nanmean() for n, v in found.items() if n != "copied"})


def train_reward(run: Run) -> str:
    """REINFORCE: the token tables, and nothing else, learn to please the reward."""
    cfg, model = run.cfg.reward, run.model
    tables = tables_of(model)
    if run.step == 0:
        run.tables = {m: table.detach().clone() for m, table in tables.items()}
        watch(run)

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
    fit(run, token_optimizer(tables, cfg), cfg.rounds, losses, lambda x: ramp(x, 0.1, 0.7), after,
        clip=math.inf)
    name = "valid_consistency" if run.world else "valid_judge_consistency"
    values = [value for stage, _, key, value in run.log if (stage, key) == ("reward", name)]
    return f"{name[6:]} on validation pairs {values[0]:.3f} -> {values[-1]:.3f}"


def total_variation(value: Tensor, count: Tensor, truth: Tensor) -> Tensor:
    """Half the absolute difference between the shares of value (G, S), -1 none, among count (G,)
    samples and truth (G, V) -> (G,) in [0, 1]."""
    share = F.one_hot(value + 1, truth.shape[1] + 1)[:, :, 1:].sum(1) / count[:, None]  # (G, V)
    return ((share - truth).abs().sum(1) + 1 - share.sum(1)) / 2


def spread(run: Run, user: Tensor, item: Tensor, content: Content) -> dict[str, Tensor]:
    """How much the S samples of each of G users differ (two with the same prompt are compared), and
    how near to the user's taste they are, (G,) each.
    user (G,), item (G, S), -1 where there is no sample; content: of the G * S samples."""
    user, there, found = user.cpu(), (item >= 0).cpu(), {}
    topic = run.topic[item].cpu().masked_fill(~there, -1)
    alike = (topic[:, :, None] == topic[:, None]) & there[:, None]  # (G, S, S)
    for m, emb in embed(run.modules["judge"], content).items():
        emb = emb.cpu().unflatten(0, item.shape)  # (G, S, D)
        found[f"judge_variety_{m}"] = share_of_pairs(1 - emb @ emb.mT, alike)
    if not run.world:
        return found
    same = 1.0  # chance that two pictures show the same setting, times that of two texts
    for m, values in shown(*read(run, *content)).items():
        differ, near = [], []
        for attribute, value in values.items():
            value = value.unflatten(0, item.shape).masked_fill(~there, -1)  # (G, S)
            truth = torch.from_numpy(run.world.tastes[attribute])[user]  # (G, values)
            near.append(1 - total_variation(value, there.sum(1), truth))
            differ.append(share_of_pairs((value[:, :, None] != value[:, None]).double(), alike))
        found[f"variety_{m}"] = torch.stack(differ).mean(0)
        found[f"taste_{m}"] = torch.stack(near).mean(0)
        same = same * (1 - differ[0])
    found["consistency_bound"] = same.sqrt()
    return found


def many_samples(run: Run, variant: str, user: Tensor) -> dict[str, Tensor]:
    """`spread` of samples for users (G,), for prompts of their test items; real: their likes."""
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


def some_users(run: Run, what: str, n: int) -> Tensor:
    """At most n users of the test part, at random."""
    users = run.pairs(TEST)[0].unique()
    few = torch.randperm(len(users), generator=run.generator(what, device="cpu"))[:n]
    return users[few.to(run.device)]


def evaluate_variant(run: Run, variant: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Every measure of a variant: its values, and the user of each. best_of, which draws several
    samples for each that it keeps, gets as many fewer pairs and users: the same cost."""
    cost = run.train.best_of if variant == "best_of" else 1
    pairs = draw_pairs(run, TEST, run.train.pairs)
    pairs = Pairs(*(x[:math.ceil(len(x) / cost)] for x in pairs))
    made = make(run, variant, pairs, run.generator("evaluation"))
    found = measures(run, made, run.pairs(VALID, TEST))
    found["frechet_image"] = embed(run.modules["judge"], made.own)["image"]
    found = {name: (values, made.pairs.user) for name, values in found.items()}
    users = some_users(run, "sampled users", math.ceil(run.train.sampled_users / cost))
    many = many_samples(run, variant, users)
    return found | {name: (values, users) for name, values in many.items()}


def summarize(name: str, values: Tensor, user: Tensor) -> dict[str, float]:
    """Mean and 95 % interval, users as clusters: Wilson's for what lies in [0, 1]."""
    return (interval if "judge_variety" in name else share_interval)(values, user)


def quality_for(run: Run, user: Tensor, item: Tensor) -> dict[str, dict]:
    """Stickers: how good is what is made for users (B,) and the prompts of items (B,)."""
    if not run.world:
        return {}
    content = make_for(run, "after_reward", user, item, run.generator("new users"))
    found = exact_measures(run, user, item, content)
    return {name: summarize(name, values, user) for name, values in found.items()}


def evaluate_new_users(run: Run) -> dict[str, dict]:
    """Users kept out of all training, folded in from their first k interactions: recall@20 and, on
    stickers, what is generated for the prompts of their test items; beside users in training."""
    model, (user, item), test = run.model, run.new["history"], run.new["test"]
    if not test.shape[1]:
        return {}
    first = torch.searchsorted(user.contiguous(), user.contiguous())  # of the same user
    nth = torch.arange(len(user), device=run.device) - first
    some, found = test[:, ::math.ceil(test.shape[1] / run.train.pairs)], {}
    with torch.no_grad():
        items = {m: rows for m, (_, rows) in model.gnn(model.graph).items()}
    for name, k in {"1": 1, "2": 2, "5": 5, "10": 10, "whole history": len(user)}.items():
        p = model.gnn.fold_in(model.graph, user[nth < k], item[nth < k], len(run.data.user_ids))
        model.update_preferences(p, test[0].unique())  # the last is what `generate` will know
        recall = rank(run, {m: (p[m], items[m]) for m in MODALITIES}, test)
        found[name] = recall | quality_for(run, *some)
    trained = quality_for(run, *draw_pairs(run, TEST, some.shape[1])[:2])
    ranked = {n: v for n, v in run.metrics["stage1"].items() if "quantized" not in n}
    return found | {"in training": ranked | trained}


def evaluate(run: Run) -> str:
    """Every variant on the test part, with intervals; what the reward changes, pair by pair; and
    people who were not in training."""
    found = {variant: evaluate_variant(run, variant) for variant in VARIANTS}
    likes = run.liked[1][run.fresh[run.liked[1]]]
    rows = draw(len(likes), run.train.pairs, run.generator("frechet"))
    reference = embed(run.modules["judge"], contents(run, likes[rows]))["image"]
    generation = run.metrics["generation"] = {}
    for variant, values in found.items():
        emb, user = values.pop("frechet_image")
        generation[variant] = {name: summarize(name, *pair) for name, pair in values.items()}
        if len(emb) >= 20:  # else a tenth left out is next to nothing
            generation[variant]["frechet_image"] = frechet_interval(emb, reference, user)
    before, after = found["before_reward"], found["after_reward"]
    run.metrics["differences"] = {name: interval(after[name][0] - values, user)
                                  for name, (values, user) in before.items()}
    run.metrics["new_users"] = evaluate_new_users(run)
    name = "consistency" if run.world else "judge_consistency"
    was, now = before[name][0].nanmean(), after[name][0].nanmean()
    return f"{name} {was:.3f} before, {now:.3f} after"


# ---- running the stages --------------------------------------------------------------------------

def write_report(run: Run) -> str:
    """report.html, the page for people, as tests/report.py draws it."""
    from tests.report import write  # which imports this file
    return str(write(run.out / "report.html", run))


STAGES: dict[str, Callable[[Run], str]] = {
    "autoencoder": train_autoencoder, "features": fit_features, "gnn": train_gnn,
    "codebook": train_codebook, "text": train_text, "image": train_image, "scorer": train_scorer,
    "judge": train_scorer, "referee": train_referee, "reward": train_reward,
    "evaluation": evaluate, "report": write_report}


def train_all(run: Run, stages: Sequence[str] = tuple(STAGES)):
    """All of the stages that are not done yet. A line and a checkpoint at the end of each."""
    for stage in [stage for stage in stages if stage not in run.done]:
        if run.stage != stage:
            run.stage, run.step, run.optimizer_state = stage, 0, None
        run.clock = clocks()
        merit = STAGES[stage](run)
        run.done.append(stage)
        run.save()
        say(f"{stage:12} {run.seconds[stage][0]:7.1f} s   {merit}")


def keep_memory():
    """From now on memory that tensors give back stays with the process, for the next ones. By
    default glibc returns large pieces to the system and asks again at every step: a fifth of a run
    on two threads. -3: M_MMAP_THRESHOLD, -1: M_TRIM_THRESHOLD, of glibc's malloc.h."""
    with contextlib.suppress(AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)
        mallopt(-1, 2**31 - 1)


def peak_memory_mb() -> int | None:
    """The most memory that this process has had; None where the system does not tell."""
    with contextlib.suppress(ImportError):
        import resource  # not on Windows
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def write_json(path: Path, values: dict):
    """Valid JSON: null where a number does not exist."""
    values = json.loads(json.dumps(values), parse_constant=lambda nan: None)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")


def finish(run: Run):
    """metrics.json: with it a run is finished."""
    found = {"dataset": run.data.name, "seed": run.cfg.method.seed, "device": str(run.device),
             "threads": torch.get_num_threads(), "peak_memory_mb": peak_memory_mb()}
    for k, name in enumerate(("seconds", "cpu_seconds")):
        spent = {stage: round(both[k], 2) for stage, both in run.seconds.items()}
        found[name] = spent | {"total": round(sum(spent.values()), 2)}
    write_json(run.out / "metrics.json", found | run.metrics)
    say(f"{'total':12} {found['seconds']['total']:7.1f} s")


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


def settings(parts: dict[str, type]) -> list[tuple]:
    """(group, name, field, help) of every setting; the help is the comment behind it."""
    found = []
    for group, part in parts.items():
        comments = dict(re.findall(r"^    (\w+): [^#\n]*# *(.*)$", inspect.getsource(part), re.M))
        found += [(group, x.name, x, comments.get(x.name, "")) for x in fields(part)]
    return found


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, dict]]:
    """Arguments, and the settings that were given: group -> name -> value."""
    parser = OneLineParser(prog="train.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", help="data folder, in dppmg.py's format; none: stickers")
    parser.add_argument("--out", help="folder of the run (the first free of runs/NAME, NAME-2 ...)")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="finished runs side by side")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--smoke", action="store_true", help="every stage, tiny: does it run?")
    parser.add_argument("--device", help="cpu, cuda or another of torch's (cuda if there is one)")
    groups = {name: parser.add_argument_group(name) for name in PARTS}
    for group, name, field, text in settings(PARTS):
        how = {"type": type(field.default), "metavar": "N"}
        if isinstance(field.default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        text = f"{text} ({field.default})".replace("%", "%%")
        groups[group].add_argument(flag_of(group, name), dest=f"{group}.{name}",
                                   default=argparse.SUPPRESS, help=text, **how)
    args = parser.parse_args(argv)
    given = {group: {key.removeprefix(f"{group}."): value for key, value in vars(args).items()
                     if key.startswith(f"{group}.")} for group in PARTS}
    return args, given


def build(values: dict[str, dict]) -> tuple[Config, TrainConfig]:
    """Settings by group and name, the default where none is given. ValueError on a wrong one."""
    parts = {name: part(**values[name]) for name, part in PARTS.items()}
    train = parts.pop("train")
    return Config(**parts), train


def read_config(out: Path) -> dict:
    """config.json of the run in a folder; {} where there is nothing yet. ValueError where something
    else is."""
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return {}
    try:
        there = json.loads((out / "config.json").read_text(encoding="utf-8"))
        build(there["settings"])
        return {key: there[key] for key in ("settings", "data", "machine")}
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        why = f"exists and holds no config.json of a run ({type(error).__name__})"
        raise ValueError(f"--out {out}: {why}; choose another --out") from None


def new_folder(name: str) -> Path:
    """runs/NAME, or NAME-2 and so on: made while it is chosen, so that no other process does."""
    for n in range(1, 10**6):
        out = Path("runs") / (name if n == 1 else f"{name}-{n}")
        with contextlib.suppress(FileExistsError):
            out.mkdir(parents=True)
            return out


def lock(out: Path):
    """Claim a folder for this process. ValueError where another one trains in it. The system keeps
    the lock while the file is open, and forgets it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # on Windows, where nobody is kept out
        return
    file = os.open(out / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of them depends on the system
        owner = os.read(file, 20).decode()
        raise ValueError(f"--out {out}: process {owner} trains in it; choose another") from None
    os.ftruncate(file, 0)
    os.write(file, str(os.getpid()).encode())


def machine(device: torch.device) -> dict[str, str | int]:
    """What the last bits of a run depend on, beside its settings and data."""
    return {"python": sys.version.split()[0], "torch": str(torch.__version__),
            "numpy": np.__version__, "device": str(device), "threads": torch.get_num_threads()}


def check_same(out: Path, config: dict, there: dict):
    """ValueError unless what is asked is what the run in `out` was begun with, and it can go on.
    The folder of the data may have moved: its content counts, which the checkpoint knows."""
    if (out / "metrics.json").exists():
        raise ValueError(f"--out {out}: this run is finished; choose another")
    differ = [flag_of(group, name) for group, part in config["settings"].items()
              for name, value in part.items() if there["settings"][group].get(name) != value]
    if (config["data"] is None) != (there["data"] is None):
        differ.append("--data")
    if differ:
        what = f"was begun with another {', '.join(differ[:5])}"
        raise ValueError(f"--out {out}: {what}; choose another --out")


def claim(out: Path, config: dict):
    """Make the folder this process's own, try whether there is space for what the end needs, remove
    what a killed run left half-written, and write config.json."""
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
    out, world = Path(args.out) if args.out else None, None
    there = read_config(out) if out else {}
    if args.resume and not there:
        raise ValueError("--resume: name a run that was begun, with --out")
    base = there["settings"] if args.resume else SMOKE if args.smoke else {}
    cfg, train = build({name: base.get(name, {}) | given[name] for name in PARTS})
    device, folder = pick_device(args.device), there["data"] if args.resume else None
    # on a processor: else two threads add up the rows of a gradient in whatever order they come
    torch.use_deterministic_algorithms(device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    folder = os.path.abspath(args.data) if args.data else folder
    config = {"settings": asdict(cfg) | {"train": asdict(train)}, "data": folder,
              "machine": machine(device)}
    if there:
        check_same(out, config, there)
    if folder is None:
        out = out or new_folder("smoke" if args.smoke else "stickers")
        folder, world = out / "stickers", sticker_world(train, cfg.method.seed)
        if not (folder / "interactions.csv").exists():
            claim(out, config)  # first: what is killed now can be resumed
            write_stickers(folder, world, cfg.method.seed)
    data = Dataset.load(folder, cfg.image.size, cfg.method.seed, train.min_rating or None,
                        train.drop_incomplete)
    config["fingerprint"] = data.fingerprint()
    if there.get("machine") not in (None, config["machine"]):
        data.notices.append(f"begun on {there['machine']}: the last bits may differ here")
    run = Run(cfg, train, data, world, out, device)
    if there:
        run.restore()
    run.out = out or new_folder(data.name)  # only now, when there is enough data for a run
    claim(run.out, config)
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Exit status: 0; 1 diverged; 2 a user's mistake; 130 interrupted."""
    forgive_terminals()
    keep_memory()
    args, given = parse_arguments(argv)
    run, start = None, clocks()

    def interrupt(*_):
        if run is None or not run.busy or run.interrupted:
            raise KeyboardInterrupt
        run.interrupted = True  # `fit` saves after its step, and raises then
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        if args.compare:
            from tests.report import rebuild
            return say(str(rebuild(*args.compare))) or 0
        run = open_run(args, given)
        run.seconds.setdefault("data", (clocks() - start).tolist())
        for notice in run.data.notices:
            say(f"note: {notice}")
        train_all(run)
        finish(run)
    except KeyboardInterrupt:
        go_on = f"; go on with: python train.py --resume --out {run.out}" if run else ""
        print(f"interrupted{go_on}", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        cure = "--image-batch, --text-batch, --gnn-dim, --reward-groups or --reward-scorer-batch"
        print(f"train.py: error: out of memory: lower {cure}: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, ValueError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
