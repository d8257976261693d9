"""DPPMG: from who liked what to pictures and texts made for one person (SIGIR 2026, arXiv 2604.20434).

    for m in (image, text):                                     # stage 1: what does each user like, per modality?
        f_m   = features of every item in m                     #   PCA of latents; TF-IDF and SVD of tokens
        p_m   = propagate(graph, [e_u, W_m f_m])                #   gnn.py: one preference per user and modality
        k_m   = residual_quantize(encoder(p_m))                 #   vq.py: L discrete preference tokens
    text  ~ decoder(prompt words, k_text)                       # stage 2: generators.py: GPT
    image ~ denoiser(prompt words, k_image)                     #   generators.py: latent diffusion
    repeat:                                                     # reward.py: make the two agree, for this person
        x, y  = several images and texts for one (user, prompt)
        R     = lambda_c cos(x, y) + lambda_p (p_image . W f(x) + p_text . W f(y))
        ascend E[R] by (R - mean of the others) grad log p(x), log p(y) in the embeddings of k_m alone,
        less kl_text KL[p(y) || p(y) at the start]              #   lest the texts please nobody but the reward
    a new user's p_m: the history's items, propagated once      # fold_in

This file: the data folder (Dataset), the settings (Config), the method wired together (DPPMG) and
    python dppmg.py RUN --user U --prompt "fish"

A data set is a folder, checked whole before anything is learnt:
    interactions.csv   user,item[,timestamp]   ids are any strings; timestamp is any finite number
    items.csv          item,text[,prompt]      UTF-8; prompt: what the item is about, phrases parted by commas
    images/ITEM.png    (.jpg .jpeg .webp)      any size and mode

Shapes: U users, I items, R interactions, H picture height = width, D width, F features, B batch, P prompt words,
M preference tokens, T text length, V vocabulary, G groups, S samples in a group.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import hashlib
import inspect
import io
import math
import os
import re
import sys
import warnings
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import Field, asdict, dataclass, fields, replace
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from generators import (PAD, Autoencoder, Denoiser, ImageConfig, TextConfig, TextDecoder, Tokenizer,
                        ddim_step, denoise, guidance_at, guided_v, sample_latents, sample_text,
                        sampling_logits, sampling_times, table_as, text_log_prob)
from gnn import GNNConfig, LatentPCA, ModalGNN, TfidfSVD, build_graph
from reward import (RewardConfig, RewardParts, Scorer, categorical_kl, gaussian_kl, gaussian_log_prob, leave_one_out,
                    pair_reward, reinforce_loss)
from vq import ResidualVQVAE, VQConfig

TRAIN, VALID, TEST = 0, 1, 2               # parts of the interactions
NEW = 3                                    # part of those of users who are kept out of all training
SUFFIXES = ("png", "jpg", "jpeg", "webp")  # of a picture, in lower or upper case
MAX_VALUE = 2**20                          # characters in one CSV value; the csv module's own limit is 2^17
MAX_ID = 250                               # bytes of an id: file systems allow 255 in a name, ".jpeg" takes 5
MAX_PHRASES = 16                           # prompt phrases kept per item: a generator's condition is short
MAX_LISTED = 10                            # errors shown per file; the others are counted
CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")     # NUL, newlines and their like


class DataError(ValueError):
    """All that is wrong with a data folder in one message, a line each: `file:line: what 'value': cure`."""


class _Findings:
    """What loading found. errors: lists by file; broken: files not read to their end; notices: harmless."""

    def __init__(self):
        self.errors: dict[str, list[str]] = {}
        self.broken: set[str] = set()
        self.notices: list[str] = []

    def error(self, line: str):
        """Note what is wrong; the line begins with `file:line:`, `file:` or `images/NAME:`."""
        self.errors.setdefault(re.split("[:/]", line)[0], []).append(line)

    def notice(self, count: int | bool, line: str):
        """Note what was repaired or ignored, {n} standing for the count, unless that is nothing."""
        if count:
            self.notices.append(line.replace("{n}", f"{count:,}"))

    def raise_if_any(self, folder: str | Path):
        """DataError with the first MAX_LISTED errors of each file."""
        total = sum(map(len, self.errors.values()))
        lines = [f"{folder}: {total:,} problem{'s' * (total > 1)} in the data"]
        for file, errors in self.errors.items():
            more = len(errors) - MAX_LISTED
            lines += errors[:MAX_LISTED] + [f"{file}: ... and {more:,} more"] * (more > 0)
        if total:
            raise DataError("\n  ".join(lines))


def _show(value: object) -> str:
    """The value as Python writes it, so that control characters are visible, cut to a line's length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-1]} ({len(text) - 2:,} characters)"


def _id_problem(value: str, is_file_name: bool = False) -> str | None:
    """What makes this string unfit as an id, or None."""
    if not value.strip():
        return "is empty: give it a name"
    if CONTROL.search(value):
        return "holds a control character: remove it"
    if len(value.encode()) > MAX_ID:
        return f"is {len(value.encode()):,} bytes long: at most {MAX_ID} fit in a file name"
    if is_file_name and (value in (".", "..") or "/" in value or "\\" in value):
        return "is a path, but its picture is images/ITEM.png: rename it, without / and \\, and not . or .."
    return None


def _file_problem(root: Path, path: Path) -> str | None:
    """What makes this path unfit to be read, or None: the folder may come from anywhere."""
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(root):
        return "is a symbolic link out of the folder: copy the file here"
    return None if real.is_file() else "no such file: need interactions.csv, items.csv and images/"


# ---- CSV ---------------------------------------------------------------------------------------------------

def _open_text(root: Path, file: str, found: _Findings) -> io.TextIOWrapper:
    """The file as text, once its bytes are proved to be UTF-8 without NUL; DataError if they are not."""
    if problem := _file_problem(root, root / file):
        raise DataError(f"{file}: {problem}")
    try:
        data = (root / file).read_bytes()
        data.decode()
        bad, what = data.find(b"\0"), "a NUL byte: remove it, or save the file as UTF-8"
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}): check its permissions") from None
    except UnicodeDecodeError as error:
        bad = error.start
        what = f"byte {data[bad:bad + 1]!r} is not UTF-8: save the file as UTF-8"
    if bad >= 0:
        line = len(re.findall(rb"\r\n|\r|\n", data[:bad])) + 1
        raise DataError(f"{file}:{line}: {what}")
    found.notice(data.startswith(b"\xef\xbb\xbf"), f"{file}: byte order mark ignored")
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline="")


def _find_columns(header: list[str], file: str, need: tuple, may: tuple, found: _Findings) -> list[int]:
    """Position of each column of need + may, len(header) for an optional one that is missing."""
    names = [name.strip() for name in header]
    wrong = [name for name in need + may if names.count(name) != 1 and (name in need or name in names)]
    if wrong:
        what = f"{' and '.join(wrong)} must be a column once, but the header is {_show(','.join(names))}"
        raise DataError(f"{file}:1: {what}: begin the file with the line {','.join(need + may)}")
    found.notice(len(set(names) - set(need + may)), f"{file}: {{n}} extra columns ignored")
    return [names.index(name) if name in names else len(names) for name in need + may]


def _read_rows(root: Path, file: str, need: tuple, may: tuple, found: _Findings) -> Iterator[tuple]:
    """Yield (line on which a row starts, its values of the columns need + may), None for a missing column.

    Rows that do not fit the header are reported and left out; a file that cannot be read on is reported too."""
    line, blank, limit = 1, 0, csv.field_size_limit(MAX_VALUE)      # the process's limit: put back below
    try:
        reader = csv.reader(_open_text(root, file, found), strict=True)
        header = next((row for row in reader if row), [])
        pick, line = itemgetter(*_find_columns(header, file, need, may, found)), reader.line_num + 1
        for row in reader:
            if len(row) == len(header):
                row.append(None)                                    # what a missing column gives
                yield line, pick(row)
            elif row:
                cure = 'write "..." around a value that holds a comma'
                found.error(f"{file}:{line}: {len(row)} values where the header has {len(header)}: {cure}")
            blank += not row
            line = reader.line_num + 1
        found.notice(blank, f"{file}: {{n}} blank lines skipped")
    except csv.Error as error:
        cure = f'close each quote, write "" for one inside, at most {MAX_VALUE:,} characters a value'
        found.error(f"{file}:{line}: the row that starts here is not valid CSV ({error}): {cure}")
        found.broken.add(file)
    except DataError as error:
        found.error(str(error))
        found.broken.add(file)
    finally:
        csv.field_size_limit(limit)


def parse_prompt(prompt: str) -> tuple[str, ...]:
    """Phrases of a prompt: parted by commas, case folded, spaces evened, each once, in order.

    "Comedy, film  noir,comedy" -> ("comedy", "film noir"); "fish" -> ("fish",); "" -> ()."""
    phrases = (" ".join(phrase.split()) for phrase in prompt.casefold().split(","))
    return tuple(dict.fromkeys(phrase for phrase in phrases if phrase))


def _read_items(root: Path, found: _Findings) -> tuple[dict[str, int], list[str], list[tuple[str, ...]]]:
    """items.csv as {item id: its line}, texts, prompts."""
    file, lines, texts, prompts = "items.csv", {}, [], []
    for line, (item, text, prompt) in _read_rows(root, file, ("item", "text"), ("prompt",), found):
        if problem := _id_problem(item, is_file_name=True):
            found.error(f"{file}:{line}: item {_show(item)} {problem}")
        if not text.strip():
            found.error(f"{file}:{line}: text {_show(text)} is empty: write one, or drop the item")
        if item in lines:
            found.error(f"{file}:{line}: item {_show(item)} is on line {lines[item]} too: keep one of them")
        else:
            lines[item] = line
            texts.append(text)
            prompts.append(parse_prompt(prompt or ""))
    if len(lines) < 2 and file not in found.broken:
        found.error(f"{file}: {len(lines)} items below the header: need at least 2")
    found.notice(prompts.count(()), f"{file}: {{n}} items without a prompt")
    n_long = sum(len(phrases) > MAX_PHRASES for phrases in prompts)
    found.notice(n_long, f"{file}: {{n}} prompts cut to their first {MAX_PHRASES} phrases")
    return lines, texts, [phrases[:MAX_PHRASES] for phrases in prompts]


def _parse_time(value: str) -> float:
    """The number that a timestamp is, NaN if it is none."""
    try:
        return float(value)
    except ValueError:
        return math.nan


def _read_interactions(root: Path, items: dict[str, int], found: _Findings):
    """interactions.csv as user ids, user (R,), item (R,) int64, time (R,) float64 or None; each pair once."""
    file, users, index, unknown = "interactions.csv", {}, dict(zip(items, range(len(items)))), set()
    user, item, time, stamp = array("q"), array("q"), array("d"), None
    for line, (who, what, stamp) in _read_rows(root, file, ("user", "item"), ("timestamp",), found):
        if who not in users:
            users[who] = len(users)
            if problem := _id_problem(who):
                found.error(f"{file}:{line}: user {_show(who)} {problem}")
        seconds = 0.0 if stamp is None else _parse_time(stamp)
        if not math.isfinite(seconds):
            cure = "write one in every row (seconds, say), or drop the column"
            found.error(f"{file}:{line}: timestamp {_show(stamp)} is not a finite number: {cure}")
        if what in index:
            user.append(users[who]), item.append(index[what]), time.append(seconds)
        elif what not in unknown and "items.csv" not in found.broken:       # if it is, nearly all are
            unknown.add(what)
            found.error(f"{file}:{line}: item {_show(what)} is not in items.csv: add it, or drop the row")
    user, item, time = (np.array(column) for column in (user, item, time))
    pair = user * len(items) + item
    order = np.lexsort((time, pair))                                # (R,)  by pair, then time, then row
    keep = np.sort(order[np.unique(pair[order], return_index=True)[1]])     # the earliest of each pair
    if len(users) < 2 and file not in found.broken:
        found.error(f"{file}: {len(users)} users below the header: need at least 2")
    elif not found.errors and np.bincount(user[keep]).max() < 3:
        found.error(f"{file}: no user has 3 different items: nothing can be held out to test on")
    found.notice(len(user) - len(keep), f"{file}: {{n}} repeated interactions merged, the earliest kept")
    found.notice(stamp is None, f"{file}: no timestamps: split by a seeded shuffle")
    user, item, time = (torch.from_numpy(column[keep]) for column in (user, item, time))
    return list(users), user, item, None if stamp is None else time


# ---- pictures ----------------------------------------------------------------------------------------------

def _find_images(root: Path, items: dict[str, int], found: _Findings) -> list[Path]:
    """The picture of each item. No path is made of an id: it is looked up among the names there are."""
    named: dict[str, list[Path]] = {}
    try:
        names = sorted(os.listdir(root / "images"))
    except OSError as error:
        found.error(f"images: {error.strerror}: need a folder that holds ITEM.png (.jpg .jpeg .webp)")
        return []
    for name in names:
        stem, _, suffix = name.rpartition(".")
        if suffix.lower() in SUFFIXES:
            named.setdefault(stem, []).append(root / "images" / name)
    pictures = {item: named.pop(item, []) for item in items}
    for item, paths in pictures.items():
        if len(paths) != 1 and not _id_problem(item, is_file_name=True):    # a bad id is reported already
            has = " and ".join(path.name for path in paths) or "no picture"
            cure = f"need one images/{_show(item + '.png')[1:-1]} (or .jpg .jpeg .webp)"
            found.error(f"items.csv:{items[item]}: item {_show(item)} has {has}: {cure}")
    found.notice(sum(map(len, named.values())), "images: {n} pictures of no item ignored")
    return [paths[0] for paths in pictures.values() if len(paths) == 1]


def read_image(path: str | Path, size: int) -> np.ndarray:
    """A picture as RGB, (3, size, size) uint8.

    The whole picture is resized to the square (LANCZOS): nothing of it is lost except its proportions.
    Turned as its EXIF says; transparency on white; 16-bit grey scaled to 8; first frame of an animation.
    Raises what Pillow does: OSError, SyntaxError, ValueError, DecompressionBombError and others."""
    with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as file:
        file.draft("RGB", (2 * size, 2 * size))     # a large JPEG is decoded at a fraction of its size
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):                  # 16-bit grey: convert("RGB") would clip it at 255
        image = Image.fromarray(((np.asarray(image, np.uint32) + 128) // 257).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).transpose(2, 0, 1)     # (3, H, H)


def _image_or_problem(root: Path, path: Path, size: int) -> np.ndarray | str:
    """The picture, or what is wrong with it."""
    try:
        return _file_problem(root, path) or read_image(path, size)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller"
    except Image.UnidentifiedImageError:
        return "not a PNG, JPEG or WebP picture: save it as one"
    except Exception as error:      # a damaged file makes Pillow's decoders raise nearly anything
        return f"damaged ({type(error).__name__}: {_show(str(error))}): save it again"


def _load_images(root: Path, paths: list[Path], size: int, found: _Findings) -> Tensor:
    """The pictures, (len(paths), 3, size, size) uint8; the unreadable are reported and stay black."""
    images = np.zeros((len(paths), 3, size, size), np.uint8)
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")                                     # remarks about odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)      # Pillow raises at twice its limit
        read = pool.map(lambda path: _image_or_problem(root, path, size), paths)
        for n, image in enumerate(read):
            if isinstance(image, str):
                found.error(f"images/{_show(paths[n].name)[1:-1]}: {image}")
            else:
                images[n] = image
    return torch.from_numpy(images)


# ---- the data set ------------------------------------------------------------------------------------------

def split_by_time(user: Tensor, time: Tensor | None, seed: int) -> Tensor:
    """Train, validation or test part of each interaction: per user 8:1:1 by time, the latest in test.

    Of n interactions, max(1, round(n / 10)) (half rounds up) are test, as many before them validation; n < 3:
    all are train. Equal times, or all where there are none, are put in order by a shuffle from `seed`.
    user (R,) int64 >= 0; time (R,) any real dtype, not NaN, or None.
    Returns (R,) int8 of TRAIN, VALID, TEST.
    Raises ValueError if user and time differ in shape."""
    if time is not None and time.shape != user.shape:
        raise ValueError(f"split_by_time: user is {tuple(user.shape)} but time is {tuple(time.shape)}; "
                         "need one time per interaction, or None")
    order = torch.randperm(len(user), generator=torch.Generator().manual_seed(seed))
    if time is not None:
        order = order[time[order].argsort(stable=True)]
    order = order[user[order].argsort(stable=True)]                 # (R,)  by user, then time, then chance
    count = user.bincount()                                         # (U,)
    held = torch.where(count < 3, 0, ((count + 5) // 10).clamp(min=1))[user[order]]     # (R,)  size of test
    age = count.cumsum(0)[user[order]] - torch.arange(len(user))    # (R,)  1 for the user's latest, 2 ...
    part = torch.empty(len(user), dtype=torch.int8)
    part[order] = (age <= 2 * held).to(torch.int8) + (age <= held).to(torch.int8)
    return part


@dataclass(eq=False)
class Dataset:
    """What users liked, and the text, picture and prompt of each item; made by Dataset.load."""
    name: str                       # of the folder
    user_ids: list[str]             # U, in order of appearance in interactions.csv
    item_ids: list[str]             # I, in the order of items.csv
    texts: list[str]                # I
    prompts: list[tuple[str, ...]]  # I, parse_prompt's phrases, at most MAX_PHRASES, possibly none
    words: list[str]                # sorted vocabulary of the prompts' phrases
    images: Tensor                  # (I, 3, H, H) uint8 RGB
    user: Tensor                    # (R,) int64 in [0, U); each (user, item) once, in the file's order
    item: Tensor                    # (R,) int64 in [0, I)
    time: Tensor | None             # (R,) float64, the earliest of the pair, in the data's unit
    part: Tensor                    # (R,) int8, TRAIN, VALID or TEST
    notices: list[str]              # what was repaired or ignored, a line each

    def pairs(self, part: int) -> tuple[Tensor, Tensor]:
        """(user, item) of the interactions in TRAIN, VALID or TEST."""
        rows = self.part == part
        return self.user[rows], self.item[rows]

    def fingerprint(self) -> str:
        """Digest of all that training reads."""
        digest = hashlib.sha256(repr((self.user_ids, self.item_ids, self.texts, self.prompts)).encode())
        for x in (self.user, self.item, self.part, self.images):
            digest.update(x.numpy())
        return digest.hexdigest()

    @classmethod
    def load(cls, folder: str | Path, image_size: int, seed: int) -> "Dataset":
        """Read and check a folder in the format above; nothing is written, and nothing outside it is read.

        image_size: H, pixels; seed: of split_by_time.
        Raises DataError with all that is wrong (file, line, value, cure); ValueError if image_size < 1."""
        if image_size < 1:
            raise ValueError(f"Dataset.load: image_size={image_size}: need image_size >= 1")
        if not os.path.isdir(folder):
            what = "is not a folder" if os.path.exists(folder) else "does not exist"
            raise DataError(f"{folder}: {what}: need a folder with interactions.csv, items.csv and images/")
        root, found = Path(os.path.realpath(folder)), _Findings()
        items, texts, prompts = _read_items(root, found)
        images = _load_images(root, _find_images(root, items, found), image_size, found)
        user_ids, user, item, time = _read_interactions(root, items, found)
        found.raise_if_any(folder)

        liked, degree = item.bincount(minlength=len(items)), user.bincount()
        found.notice(int((liked == 0).sum()), "interactions.csv: {n} items liked by nobody are kept")
        found.notice(int((degree < 3).sum()), "interactions.csv: {n} users of fewer than 3 items only train")
        found.notice(int((degree == len(items)).sum()), "interactions.csv: {n} users like every item")
        words = sorted({phrase for phrases in prompts for phrase in phrases})
        part = split_by_time(user, time, seed)
        return cls(root.name, user_ids, list(items), texts, prompts, words, images, user, item, time, part,
                   found.notices)


def hold_out_users(data: Dataset, share: float, seed: int) -> dict[str, Tensor]:
    """Put a share of the users, at random, into part NEW. Their history and test (user, item) (2, E), in the order of time."""
    time = np.arange(len(data.user)) if data.time is None else data.time
    order = torch.from_numpy(np.lexsort((time, data.user)))         # (R,)  by user, then time, then row
    able = (data.user.bincount(minlength=len(data.user_ids)) >= 3).nonzero()[:, 0]
    able = able[torch.randperm(len(able), generator=torch.Generator().manual_seed(seed))]
    new = able[:min(int(share * len(data.user_ids)), len(able) - 2)]
    order = order[torch.isin(data.user[order], new)]
    rows = {name: order[data.part[order] == part] for name, part in (("history", TRAIN), ("test", TEST))}
    data.part[order] = NEW
    return {name: torch.stack([data.user[row], data.item[row]]) for name, row in rows.items()}


# ---- settings ----------------------------------------------------------------------------------------------

MODALITIES = ("image", "text")


@dataclass(frozen=True)
class MethodConfig:
    seed: int = 0                 # of all that is drawn at random
    image_features: int = 64      # F of the image modality: principal components of the latents
    text_features: int = 64       # F of the text modality: singular directions of the TF-IDF vectors
    bf16: int = 1                 # 1: generators and graph in bf16 where the device is faster with it; 0: all in fp32

    def __post_init__(self):
        for name, low in (("seed", 0), ("image_features", 1), ("text_features", 1), ("bf16", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"MethodConfig.{name}={getattr(self, name)}: need {name} >= {low}")
        if self.bf16 not in (0, 1):
            raise ValueError(f"MethodConfig.bf16={self.bf16}: need 0 or 1")


@dataclass(frozen=True)
class Config:
    """All settings: one frozen dataclass per module. Flag --gnn-dim is gnn.dim, and so on (train.py)."""
    method: MethodConfig = MethodConfig()
    gnn: GNNConfig = GNNConfig()
    vq: VQConfig = VQConfig()
    text: TextConfig = TextConfig()
    image: ImageConfig = ImageConfig()
    reward: RewardConfig = RewardConfig()

    def __post_init__(self):
        eta, temperature = self.image.eta, self.text.temperature
        if self.reward.rounds and not (eta and temperature):        # else noticed only after all training
            raise ValueError(f"ImageConfig.eta={eta}, TextConfig.temperature={temperature}: the reward needs both > 0, samples "
                             "that have a density; or set RewardConfig.rounds=0")

    @classmethod
    def from_dict(cls, values: dict[str, dict]) -> "Config":
        """The Config whose asdict() this is. Raises ValueError on an unknown or missing setting, TypeError on an ill-typed."""
        parts = {}
        for group in fields(cls):
            part, given = type(group.default), values.get(group.name)
            need = {f.name for f in fields(part)}
            if not isinstance(given, dict) or set(given) != need:
                raise ValueError(f"settings of {group.name!r} are {_show(given)}; need {', '.join(sorted(need))}")
            parts[group.name] = part(**given)
        return cls(**parts)


def settings(parts: dict[str, type]) -> list[tuple[str, str, Field, str]]:
    """(group, name, field, help) of every setting of the dataclasses; the help is the comment behind it in the source."""
    found = []
    for group, part in parts.items():
        source = inspect.getsource(sys.modules[part.__module__])        # of a class alone: parses the whole file each time
        body = re.search(rf"^class {part.__name__}\b.*?(?=^\S|\Z)", source, re.MULTILINE | re.DOTALL)[0]
        comments = dict(re.findall(r"^    (\w+): [^#\n]*# *(.*)$", body, re.MULTILINE))
        found += [(group, field.name, field, comments.get(field.name, "")) for field in fields(part)]
    return found


def flag_of(group: str, name: str) -> str:
    """--gnn-dim for gnn.dim; the settings of the method and of training have no prefix."""
    return "--" + "-".join([*([] if group in ("method", "train") else [group]), name]).replace("_", "-")


@dataclass(eq=False)
class Catalogue:
    """What the model must remember of its data set to be used without it; plain values and tensors."""
    name: str                   # of the data folder
    user_ids: list[str]         # U
    item_ids: list[str]         # I
    words: list[str]            # prompt phrases; phrase n has id n + 1, 0 is padding
    max_words: int              # P, phrases in the longest prompt
    max_tokens: int             # T, tokens in the longest text; none longer is sampled
    merges: Tensor              # (n, 2) int64, the tokenizer's
    user: Tensor                # (E,) int64, training interactions
    item: Tensor                # (E,) int64

    @classmethod
    def of(cls, data: Dataset, tokenizer: Tokenizer) -> "Catalogue":
        """The catalogue of a data set and the tokenizer trained on its texts."""
        user, item = data.pairs(TRAIN)
        longest = max(len(tokenizer.encode(text)) + 1 for text in data.texts)
        return cls(data.name, data.user_ids, data.item_ids, data.words, max(1, max(map(len, data.prompts))), longest,
                   tokenizer.state(), user, item)

    def encode_prompts(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        """Phrases -> (B, P) int64, P >= max_words, padded with 0. Raises ValueError on an unknown phrase."""
        index = {word: n + 1 for n, word in enumerate(self.words)}
        for phrase in (phrase for phrases in prompts for phrase in phrases if phrase not in index):
            raise ValueError(f"unknown prompt word {_show(phrase)}: {known(phrase, self.words)}")
        width = max([self.max_words, *map(len, prompts)])
        return torch.tensor([[index[p] for p in phrases] + [0] * (width - len(phrases)) for phrases in prompts])


def known(value: str, names: Sequence[str]) -> str:
    """What could have been meant: the nearest of the names, and how many there are."""
    near = difflib.get_close_matches(value, names, n=8, cutoff=0.5) or list(names[:8])
    return f"known are {', '.join(near)}" + (f" and {len(names) - len(near):,} more" if len(near) < len(names) else "")


# ---- the method --------------------------------------------------------------------------------------------

class Generated(NamedTuple):
    image: Image.Image          # H x H RGB
    text: str


class Rollout(NamedTuple):
    content: Tensor             # (G S, ...) S latents or texts for each of G (user, prompt)
    log_prob: Tensor            # (G S,) nats, differentiable in the token table
    kl: Tensor                  # () nats, differentiable: drift of the policy from the reference


class ReinforceStep(NamedTuple):
    loss: Tensor                # () surrogate: its gradient is that of -E[R], and of the weighted KLs at what was sampled
    parts: RewardParts          # what the reward was made of
    kl_image: Tensor            # () nats per image: drift of the first step from the starting tokens
    kl_text: Tensor             # () nats per text: drift of the text policy, before its nucleus is cut out


class DPPMG(nn.Module):
    """The four parts wired together; train.py trains them stage by stage, generate() and fold_in() use them."""

    def __init__(self, cfg: Config, catalogue: Catalogue):
        super().__init__()
        self.cfg, self.catalogue = cfg, catalogue
        self.tokenizer = Tokenizer.from_state(catalogue.merges)
        n_users, n_items, n_words = len(catalogue.user_ids), len(catalogue.item_ids), max(1, len(catalogue.words))
        vocab, side = self.tokenizer.vocab_size, cfg.image.size // 4
        self.autoencoder = Autoencoder(cfg.image)
        self.image_features = LatentPCA(cfg.image.latent, side, cfg.method.image_features)
        self.text_features = TfidfSVD(vocab, cfg.method.text_features)
        features = {m: torch.zeros(n_items, getattr(cfg.method, f"{m}_features")) for m in MODALITIES}
        self.gnn = ModalGNN(n_users, n_items, features, cfg.gnn)
        self.quantizer = nn.ModuleDict({m: ResidualVQVAE(cfg.gnn.dim, cfg.vq) for m in MODALITIES})
        self.text = TextDecoder(replace(cfg.text, vocab_size=vocab), n_words, cfg.vq.levels, cfg.vq.codes)
        self.image = Denoiser(cfg.image, n_words, cfg.vq.levels, cfg.vq.codes)
        self.scorer = Scorer(cfg.reward, vocab, n_words)
        for m in MODALITIES:
            self.register_buffer(f"preference_{m}", torch.zeros(n_users, cfg.gnn.dim))
            self.register_buffer(f"tokens_{m}", torch.zeros(n_users, cfg.vq.levels, dtype=torch.int64))
        self.graph = build_graph(catalogue.user, catalogue.item, n_users, n_items)

    # stage 1

    @torch.no_grad()
    def update_preferences(self, preference: dict[str, Tensor] | None = None, user: Tensor | slice = slice(None)):
        """Take over these users' rows (B,), or all, of preference[m] (U, D), and quantize them: preference_m (U, D), tokens_m
        (U, L). None: what the graph network has learnt."""
        self.quantizer.eval()
        for m, rows in (preference or {m: rows for m, (rows, _) in self.gnn(self.graph).items()}).items():
            getattr(self, f"preference_{m}")[user] = rows[user]
            getattr(self, f"tokens_{m}")[user] = self.quantizer[m].encode(rows[user])

    def decode_tokens(self, modality: str) -> Tensor:
        """What each user's tokens stand for: (U, D), about unit length."""
        return self.quantizer[modality].eval().decode(getattr(self, f"tokens_{modality}"))

    @torch.no_grad()
    def seed_tables(self):
        """Start both generators' preference-token embeddings as what the codebooks say: a code's vector, turned into the
        generator's width by a random orthonormal map, so that the sum over the levels is the quantized preference.
        DEVIATION 7: with random rows the generators must learn L x K meanings that the codebook already knows."""
        for m in MODALITIES:
            books = torch.stack([book.codebook for book in self.quantizer[m].codebooks])        # (L, K, D)
            self._set_table(m, books.flatten(0, 1) / books[0].square().sum(1).mean().sqrt().clamp(min=1e-8))

    def _set_table(self, modality: str, vectors: Tensor):
        """Table rows = vectors (R, D), the first of about unit length, turned; on the scale that the table has now."""
        weight = getattr(self, modality).preference.weight                                      # (R, width)
        turn = torch.empty(weight.shape[1], vectors.shape[1], device=weight.device)
        weight.copy_(vectors @ nn.init.orthogonal_(turn).T * weight.square().mean().sqrt() * weight.shape[1] ** 0.5)

    @torch.no_grad()
    def use_raw_preferences(self):
        """Instead of codes: each user is one token of their own, whose embedding starts as their unquantized preference."""
        for m in MODALITIES:
            preference = getattr(self, f"preference_{m}").copy_(self.gnn(self.graph)[m][0])
            getattr(self, f"tokens_{m}").copy_(torch.arange(len(preference), device=preference.device)[:, None])
            self._set_table(m, F.normalize(preference, dim=1))

    def score(self, modality: str, preference: Tensor, content: Tensor) -> Tensor:
        """s_m = p . W_m f_m(content): preference (B, D); content: latents (B, C, h, h) or tokens (B, T) -> (B,)."""
        feature = self.image_features(content) if modality == "image" else self.text_features(content)
        return (preference * self.gnn.embed_content(modality, feature)).sum(1)

    # stage 2

    @property
    def uses_bf16(self) -> bool:
        """Whether networks are to compute in bf16: on GPUs, and on processors with instructions for it."""
        kind = self.preference_image.device.type
        able = kind == "cuda" or kind == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
        return bool(able and self.cfg.method.bf16)

    def half(self) -> contextlib.AbstractContextManager:
        """DEVIATION 20: within it the generators compute in bf16, where that is faster. Weights, attention on the CPU, sums
        and log-probabilities stay fp32; codebook and scorer do without."""
        kind = self.preference_image.device.type
        return torch.autocast(kind, torch.bfloat16) if self.uses_bf16 else contextlib.nullcontext()

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, h) -> images (B, 3, H, H) in [-1, 1], fp32 or better."""
        with self.half():
            images = self.autoencoder.decode(latents)
        return images.to(latents.dtype).clamp(-1, 1)

    def sample_latents(self, prompt: Tensor, prefs: Tensor,
                       generator: torch.Generator | None) -> Tensor:
        """Latents (B, C, h, h) for prompt (B, P) and prefs (B, M), -1 null."""
        with self.half():
            return sample_latents(self.image, prompt, prefs, generator)

    def sample_tokens(self, prompt: Tensor, prefs: Tensor,
                      generator: torch.Generator | None) -> Tensor:
        """Text tokens (B, T) for prompt (B, P) and prefs (B, M), -1 null."""
        longest = min(self.cfg.text.context, self.catalogue.max_tokens)
        with self.half():
            return sample_text(self.text, prompt, prefs, generator, longest)

    @torch.no_grad()
    def sample_pairs(self, prompt: Tensor, prefs: dict[str, Tensor], generator: torch.Generator | None,
                     batch: int = 256) -> tuple[Tensor, Tensor]:
        """An image (B, 3, H, H) in [-1, 1] and a text (B, context) of tokens for each prompt (B, P) and prefs[m] (B, M)."""
        images, texts = [], []
        for rows in torch.arange(len(prompt), device=prompt.device).split(batch):
            latents = self.sample_latents(prompt[rows], prefs["image"][rows], generator)
            images.append(self.decode_latents(latents))
            texts.append(self.sample_tokens(prompt[rows], prefs["text"][rows], generator))
        return torch.cat(images), torch.cat(texts)

    def generate(self, prompt: str, user: str | None = None, history: Sequence[str] | None = None, n: int = 1,
                 seed: int = 0) -> list[Generated]:
        """n pairs for the prompt (phrases parted by commas) and a training user's id, or the items in the history of
        somebody who was not in training, or neither: unpersonalized. Raises ValueError on what is not known."""
        catalogue, device = self.catalogue, self.preference_image.device
        if user is not None and history is not None:
            raise ValueError("give a user or a history, not both")
        words = catalogue.encode_prompts([parse_prompt(prompt)]).to(device)
        if user is not None:
            if user not in catalogue.user_ids:
                raise ValueError(f"unknown user {_show(user)}: {known(user, catalogue.user_ids)}")
            prefs = self.user_tokens(torch.tensor([catalogue.user_ids.index(user)], device=device))
        elif history is not None:
            prefs = self.fold_in([history])
        else:
            prefs = {m: words.new_full((1, self.cfg.vq.levels), -1) for m in MODALITIES}
        generator = torch.Generator(device).manual_seed(seed)
        images, tokens = self.sample_pairs(words.expand(n, -1), {m: k.expand(n, -1) for m, k in prefs.items()}, generator)
        return [Generated(to_picture(x), y) for x, y in zip(images, self.tokenizer.decode_batch(tokens))]

    def user_tokens(self, user: Tensor) -> dict[str, Tensor]:
        """Preference tokens {m: (B, M)} of training users (B,) int64."""
        return {m: getattr(self, f"tokens_{m}")[user] for m in MODALITIES}

    @torch.no_grad()
    def fold_in(self, histories: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """Preference tokens {m: (B, M)} of people who were not in training, each from the ids of the items they like.
        The history is propagated once through the graph formula and quantized: nothing is trained.
        Raises ValueError on an empty history or an unknown item."""
        index = {item: n for n, item in enumerate(self.catalogue.item_ids)}
        for item in (item for history in histories for item in history if item not in index):
            raise ValueError(f"unknown item {_show(item)}: {known(item, self.catalogue.item_ids)}")
        if not all(histories):
            raise ValueError("an empty history says nothing: give at least one item")
        pairs = sorted({(n, index[item]) for n, history in enumerate(histories) for item in history})
        user, item = torch.tensor(pairs, device=self.preference_image.device).T
        return {m: self.quantizer[m].encode(p) for m, p in self.fold_in_preferences(user, item, len(histories)).items()}

    @torch.no_grad()
    def fold_in_preferences(self, user: Tensor, item: Tensor, n_users: int) -> dict[str, Tensor]:
        """Preferences {m: (n_users, D)} of new users 0..n_users-1 from pairs (user, item) (E,) of their histories."""
        self.quantizer.eval()
        return self.gnn.fold_in(self.graph, user, item, n_users)

    # reward

    def reinforce_step(self, user: Tensor, prompt: Tensor, reference: dict[str, Tensor],
                       with_kl: bool, generator: torch.Generator | None) -> ReinforceStep:
        """Sample groups of images and texts, score them, and give the surrogate loss of both token
        tables. user (G,) int64, prompt (G, P); reference: the tables to measure the KL from, which
        is measured if with_kl or where it counts. Frozen: all but the tables."""
        cfg, prefs = self.cfg.reward, self.user_tokens(user)
        start = {m: reference[m] if with_kl or getattr(cfg, f"kl_{m}") else None for m in MODALITIES}
        image = self._rollout_images(prompt, prefs["image"], start["image"], generator)
        text = self._rollout_texts(prompt, prefs["text"], start["text"], generator)
        reward_image, reward_text, parts = self._reward(user, image.content, text.content)
        loss = reinforce_loss(image.log_prob, leave_one_out(reward_image).flatten())
        loss = loss + reinforce_loss(text.log_prob, leave_one_out(reward_text).flatten())
        loss = loss + cfg.kl_image * image.kl + cfg.kl_text * text.kl
        return ReinforceStep(loss, parts, image.kl.detach(), text.kl.detach())

    def _rollout_images(self, prompt: Tensor, prefs: Tensor, reference: Tensor | None,
                        generator: torch.Generator | None) -> Rollout:
        """S_i images for each prompt (G, P) and prefs (G, M), and the log-probability of the first
        step of each.
        DEVIATION 11: of an image's steps only the first is differentiated, as if the later ones knew
        the starting tokens: what a picture shows is decided there, and each other step adds variance.
        DEVIATION 23: a group's images share their noise, and so their first step's mean; what the
        noise decides is then part of the baseline."""
        cfg, n = self.image.cfg, self.cfg.reward.images
        times = sampling_times(self.cfg.reward.diffusion_steps)
        noise = self.image.noise(len(prompt), generator)  # (G, C, h, h)
        t, s = times[:2]

        def first_step() -> tuple[Tensor, Tensor]:
            with self.half():
                v = guided_v(self.image, noise, t, prompt, prefs, guidance_at(t, cfg))
            return ddim_step(noise, v, t, s, cfg.eta)
        mean, std = first_step()  # with gradient
        kl = mean.new_zeros(())
        if reference is not None:
            with torch.no_grad(), table_as(self.image, reference):
                start, _ = first_step()
            kl = gaussian_kl(mean, start, std).mean()
        mean, prompt, prefs = (x.repeat_interleave(n, 0) for x in (mean, prompt, prefs))
        z = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        z = mean.detach() + std * z  # (G S_i, C, h, h): here the images of a group part
        with self.half():
            latents = denoise(self.image, z, times[1:], prompt, prefs, generator)
        return Rollout(latents, gaussian_log_prob(z, mean, std), kl)

    def _rollout_texts(self, prompt: Tensor, prefs: Tensor, reference: Tensor | None,
                       generator: torch.Generator | None) -> Rollout:
        """S_t texts for each prompt (G, P) and prefs (G, M), and their log-probabilities.
        DEVIATION 24: from the nucleus that users see; the rest would add noise. What that lets drift
        the KL holds: of the policy before its nucleus is cut out, else it were infinite."""
        cfg = self.text.cfg
        prompt, prefs = (x.repeat_interleave(self.cfg.reward.texts, 0) for x in (prompt, prefs))
        tokens = self.sample_tokens(prompt, prefs, generator)  # (G S_t, T)
        with self.half():
            cond = self.text(tokens, prompt, prefs)  # (G S_t, T, V)
            with torch.no_grad():  # what REINFORCE changes is not in the null branch
                null = self.text(tokens, prompt, torch.full_like(prefs, -1))
        log_prob = text_log_prob(cond, null, tokens, cfg)
        kl = log_prob.new_zeros(())
        if reference is not None:
            with torch.no_grad(), table_as(self.text, reference), self.half():
                start = self.text(tokens, prompt, prefs)
            now, start = (sampling_logits(x, null, replace(cfg, top_p=1.0)) for x in (cond, start))
            kl = categorical_kl(now, start, tokens != PAD).mean()
        return Rollout(tokens, log_prob, kl)

    @torch.no_grad()
    def _reward(self, user: Tensor, latents: Tensor,
                tokens: Tensor) -> tuple[Tensor, Tensor, RewardParts]:
        """Rewards (G, S_i) of the images and (G, S_t) of the texts made for users (G,)."""
        cfg = self.cfg.reward
        image_emb = self.scorer.encode_image(self.decode_latents(latents))  # (G S_i, D)
        text_emb = self.scorer.encode_text(tokens)  # (G S_t, D)
        likes_image = self.preference_image[user].repeat_interleave(cfg.images, 0)
        likes_text = self.preference_text[user].repeat_interleave(cfg.texts, 0)
        scores = self.score("image", likes_image, latents), self.score("text", likes_text, tokens)
        grouped = (x.unflatten(0, (len(user), -1)) for x in (image_emb, text_emb, *scores))
        return pair_reward(*grouped, cfg)

    # files

    def state(self) -> dict:
        """Tensors and plain values from which from_state() makes this model again."""
        return {"config": asdict(self.cfg), "catalogue": dict(vars(self.catalogue)), "model": self.state_dict()}

    @classmethod
    def from_state(cls, state: dict) -> "DPPMG":
        """The model whose state() this is. Raises one of the errors that load() catches where it is not one."""
        model = cls(Config.from_dict(state["config"]), Catalogue(**state["catalogue"]))
        model.load_state_dict(state["model"])
        return model.eval()

    @classmethod
    def load(cls, run: str | Path, device: str | torch.device = "cpu") -> "DPPMG":
        """The model of a run (folder or checkpoint file), to generate with. Raises CheckpointError."""
        path = Path(run) / "checkpoint.pt" if Path(run).is_dir() else Path(run)
        checkpoint = read_checkpoint(path)
        done = checkpoint.get("done")
        if not isinstance(done, list) or "reward" not in done:
            raise CheckpointError(f"{path}: training is not finished, done is {_show(done)}; go on with train.py --resume")
        try:
            return cls.from_state(checkpoint).to(device)
        except (AttributeError, LookupError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path}: not a model of this version ({' '.join(str(error).split())[:200]})") from None

    def to(self, *args, **kwargs) -> "DPPMG":
        """As nn.Module.to; the graph moves too."""
        super().to(*args, **kwargs)
        self.graph = self.graph.to(self.preference_image.device)
        return self


def to_picture(x: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> an RGB picture."""
    return Image.fromarray(((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


# ---- files -------------------------------------------------------------------------------------------------

FORMAT = "DPPMG checkpoint 1"


class CheckpointError(ValueError):
    """What is wrong with a checkpoint file, and the file's name."""


@contextlib.contextmanager
def replacing(path: str | Path):
    """Yields the name of a temporary file beside `path`, which then takes its place at once: a reader sees the old file
    or the new one, never half of it; after an error the old one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict:
    """The checkpoint's values; data only, no code is run. Raises CheckpointError on anything but a whole checkpoint."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; need a run of train.py") from None
    except Exception as error:      # a damaged zip or pickle makes torch.load raise nearly anything
        raise CheckpointError(f"{path}: not a checkpoint, or damaged ({type(error).__name__}): need {FORMAT!r}, as "
                              "train.py writes it") from None
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path}: format is {_show(found)}, need {FORMAT!r}: made by another version or program")
    return checkpoint


# ---- command line ------------------------------------------------------------------------------------------

class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line and name what could have been meant; exit status 2."""

    def error(self, message: str):
        """Print the message as one line and exit with status 2."""
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        if match := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            message = f"unknown flag {match[1]}: {known(match[1], flags)} (--help lists them)"
        self.exit(2, f"{self.prog}: error: {message}\n")


def pick_device(name: str | None) -> torch.device:
    """The device of that name; None: cuda, then mps, then cpu. Raises ValueError where it is not to be had."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.Generator(torch.zeros(1, device=name).device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not to be had here ({str(error).splitlines()[0]}); try cpu") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: print the texts and write the images that a trained model makes. Returns the exit status."""
    parser = OneLineParser(prog="dppmg.py", description="Make pictures and texts for one person with a trained model.")
    parser.add_argument("run", help="folder that train.py wrote")
    parser.add_argument("--user", help="id of a user in training")
    parser.add_argument("--history", nargs="+", metavar="ITEM", help="ids of items that somebody likes who was not")
    parser.add_argument("--prompt", required=True, help="what it shall be about: words of the catalogue, comma-separated")
    parser.add_argument("--out", default="dppmg.png", help="file for the picture (several: FILE-2.png ...) (%(default)s)")
    parser.add_argument("--n", type=int, default=1, help="how many pairs (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (%(default)s)")
    parser.add_argument("--device", help="cuda, mps or cpu (the first there is)")
    args = parser.parse_args(argv)
    try:
        if args.n < 1:
            raise ValueError(f"--n {args.n}: need n >= 1")
        if not Path(args.out).name:
            raise ValueError(f"--out {_show(args.out)}: need the name of a file")
        model = DPPMG.load(args.run, pick_device(args.device))
        for k, (image, text) in enumerate(model.generate(args.prompt, args.user, args.history, args.n, args.seed), 1):
            path = Path(args.out) if k == 1 else Path(args.out).with_stem(f"{Path(args.out).stem}-{k}")
            format = Image.registered_extensions().get(path.suffix.lower())
            with replacing(path) as temporary:
                image.save(temporary, format=format if format in Image.SAVE else "PNG")
            print(f"{path}: {CONTROL.sub(chr(0xFFFD), text)}")      # no escape sequence reaches the terminal
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror or error}")
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
