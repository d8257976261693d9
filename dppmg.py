"""DPPMG: from who liked what to pictures and texts made for one person (SIGIR 2026, 2604.20434).

    for m in (image, text):                                # stage 1: what does each user like?
        f_m   = features of every item in m                #   PCA of latents; SVD of TF-IDF
        p_m   = propagate(graph, [e_u, W_m f_m])           #   gnn.py: a preference per user
        k_m   = residual_quantize(encoder(p_m))            #   vq.py: L discrete preference tokens
    text  ~ decoder(prompt words, k_text)                  # stage 2: generators.py: GPT
    image ~ denoiser(prompt words, k_image)                #   generators.py: latent diffusion
    repeat:                                                # reward.py: make the two agree
        x, y  = several images and texts for one (user, prompt)
        R     = lambda_c cos(x, y) + lambda_p (p_image . W f(x) + p_text . W f(y))
        ascend E[R] by (R - mean of the others) grad log p(x), log p(y), in the table rows alone
        that k_m picks, less kl_m KL[p_m || p_m at the start]    # so that nothing drifts away
    a new user's p_m: the history's items, propagated once # fold_in

DEVIATION n marks what we chose and the paper does not say; the ledger: tests/RESULTS.md.
This file: the settings (Config), the method wired together (DPPMG), the data folder (Dataset), and
    python dppmg.py RUN --user U --prompt "fish"

A data set is a folder, checked whole before anything is learnt:
    interactions.csv   user,item[,timestamp]   ids: any strings; timestamp: numbers or ISO dates
    items.csv          item,text[,prompt]      UTF-8; prompt: phrases parted by commas
    images/ITEM.png    (.jpg .jpeg .webp)      any size and mode

Shapes: U users, I items, R interactions, H picture height = width, D width, F features, B batch,
P prompt words, M = L preference tokens, T text length, V vocabulary, G groups, S samples in a
group, C x h x h a latent.
"""
import argparse
import contextlib
import csv
import difflib
import hashlib
import math
import operator
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Generator, Tensor, nn

from generators import (PAD, Autoencoder, Denoiser, ImageConfig, TextConfig, TextDecoder, Tokenizer,
                        ddim_step, denoise, guidance_at, guided_v, sample_latents, sample_text,
                        sampling_logits, sampling_times, table_as, text_log_prob)
from gnn import GNNConfig, LatentPCA, ModalGNN, TfidfSVD, build_graph
from reward import (RewardConfig, RewardParts, Scorer, best_pair, categorical_kl, gaussian_kl,
                    gaussian_log_prob, leave_one_out, pair_reward, reinforce_loss)
from vq import ResidualVQVAE, VQConfig

MODALITIES = ("image", "text")
# parts of the interactions; NEW: those of users who are kept out of all training
TRAIN, VALID, TEST, NEW = range(4)
FORMAT = "DPPMG checkpoint 2"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of a picture, in lower or upper case
CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")  # NUL, newlines and their like


# ---- settings ------------------------------------------------------------------------------------

SHARES = ("vq.ema_decay vq.revive_below text.null_rate image.null_rate image.ema "
          "reward.scorer_mirror reward.scorer_zoom reward.scorer_dropout reward.scorer_drop")
# least and most of a setting; of others an integer is >= 1, a float >= 0
LIMITS = dict.fromkeys(SHARES.split(), (0, 0.9999)) | {
    "method.seed": (0, 2**63 - 1), "text.vocab_size": (260, math.inf), "text.top_p": (0.001, 1),
    "image.guidance_until": (0, 1), "image.eta": (0, 1), "image.time_mean": (-9, 9),
    "reward.rounds": (0, math.inf), "reward.diffusion_steps": (2, math.inf),
    "reward.images": (2, math.inf), "reward.texts": (2, math.inf),
    "reward.scorer_batch": (2, math.inf), "reward.scorer_temperature": (0.01, 1)}


def flag_of(group: str, name: str) -> str:
    """--gnn-dim for gnn.dim; the settings of the method and of training have no prefix."""
    return "--" + (name if group in ("method", "train") else f"{group}-{name}").replace("_", "-")


def check_limits(group: str, part: object, limits: dict[str, tuple[float, float]]):
    """Raises ValueError, with flag, value and cure, unless a group's settings are within limits."""
    for field in fields(part):
        value, kind = getattr(part, field.name), type(field.default)
        low, high = limits.get(f"{group}.{field.name}", (int(kind is int), math.inf))
        if not isinstance(value, (int, kind)) or not low <= value <= high or value == math.inf:
            need = f"a finite {kind.__name__} >= {low} and <= {high}"
            raise ValueError(f"{flag_of(group, field.name)} {value}: need {need}")


@dataclass(frozen=True)
class MethodConfig:
    seed: int = 0  # of all that is drawn at random
    image_features: int = 64  # F of the image modality: principal components of the latents
    text_features: int = 64  # F of the text modality: singular directions of the TF-IDF vectors
    bf16: bool = True  # generators in bf16 where the device is faster with it


@dataclass(frozen=True)
class Config:
    """All settings, a frozen dataclass per module. Raises ValueError on one that cannot work."""
    method: MethodConfig = MethodConfig()
    gnn: GNNConfig = GNNConfig()
    vq: VQConfig = VQConfig()
    text: TextConfig = TextConfig()
    image: ImageConfig = ImageConfig()
    reward: RewardConfig = RewardConfig()

    def __post_init__(self):
        for group in fields(self):
            check_limits(group.name, getattr(self, group.name), LIMITS)
        text, image, reward = self.text, self.image, self.reward
        learns = reward.rounds > 0  # by REINFORCE, which needs densities
        for name, wrong, need in (
                ("image.size", image.size % 8, "a multiple of 8"),
                ("image.ae_width", image.ae_width % 16, "a multiple of 16"),
                ("image.width", image.width % 8, "a multiple of 8"),
                ("reward.scorer_width", reward.scorer_width % 8, "a multiple of 8"),
                ("text.heads", text.width % text.heads, f"a divisor of {text.width}"),
                ("image.heads", 2 * image.width % image.heads, f"a divisor of {2 * image.width}"),
                ("reward.lambda_p", not reward.lambda_c + reward.lambda_p, "> 0, or lambda_c > 0"),
                ("image.eta", learns and not image.eta, "> 0, or --reward-rounds 0"),
                ("text.temperature", learns and not text.temperature, "> 0, or --reward-rounds 0")):
            if wrong:
                flag = flag_of(*name.split("."))
                raise ValueError(f"{flag} {operator.attrgetter(name)(self)}: need {need}")

    @classmethod
    def from_dict(cls, values: dict[str, dict]) -> "Config":
        """The Config whose asdict() this is. Raises KeyError, TypeError or ValueError on others."""
        return cls(**{x.name: type(x.default)(**values[x.name]) for x in fields(cls)})


# ---- files ---------------------------------------------------------------------------------------

class CheckpointError(ValueError):
    """What is wrong with a checkpoint file, and the file's name."""


@contextlib.contextmanager
def replacing(path: str | Path):
    """Yields the name of a temporary file beside `path`, which then takes its place at once: a
    reader sees the old file or the new one, never half of it; after an error the old one."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict:
    """The checkpoint's values; no code in it is run. Raises CheckpointError on anything else."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"format is {checkpoint['format']!r:.40}")
    except Exception as error:  # a damaged zip or pickle makes torch.load raise nearly anything
        what = f"not a checkpoint of train.py, or damaged: {error!r:.80}"
        raise CheckpointError(f"{path}: {what}; need {FORMAT!r}") from None
    return checkpoint


def pick_device(name: str | None) -> torch.device:
    """The device of that name; None: cuda where there is one, else cpu. ValueError if not here.
    From now on fp32 is fp32: convolutions of scorer, judge and features take no TF32."""
    torch.backends.cudnn.allow_tf32 = False
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.Generator(torch.zeros(1, device=name).device).device
    except (RuntimeError, AssertionError) as error:
        why = f"not to be had here ({str(error).splitlines()[0]:.100})"
        raise ValueError(f"--device {name}: {why}; try cpu") from None


def forgive_terminals():
    """From now on, what a terminal cannot show is replaced, and a closed one ends nothing."""
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def say(line: str):
    """Print a line. A reader who has gone away (`| head`) does not end the program."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- what the model remembers of its data --------------------------------------------------------

def parse_prompt(prompt: str) -> tuple[str, ...]:
    """Phrases of a prompt: parted by commas or |, case folded, spaces evened, each once, in order.

    "Comedy, film  noir,comedy" -> ("comedy", "film noir"); "['a', 'b']" -> ("a", "b"); "" -> ()."""
    phrases = (phrase.strip("[]'\" ") for phrase in re.split("[,|]", prompt.casefold()))
    return tuple(dict.fromkeys(" ".join(phrase.split()) for phrase in phrases if phrase.strip()))


def known(value: object, names: Sequence[str]) -> str:
    """What could have been meant: the nearest of the names, and how many there are."""
    near = difflib.get_close_matches(str(value), names, n=8, cutoff=0.5) or names[:8]
    return f"known are {', '.join(near) or 'none'} ({len(names):,} in all)"


@dataclass(eq=False)
class Catalogue:
    """What the model must remember of its data set to be used without it; plain values and tensors.
    words: prompt phrases, of which number n has the id n + 1, and 0 is padding; max_words: P, in
    the longest prompt; max_tokens: T, in the longest text learnt from: none longer is sampled;
    merges (n, 2): the tokenizer's; user, item (E,) int64: training interactions."""
    name: str
    user_ids: list[str]
    item_ids: list[str]
    words: list[str]
    max_words: int
    max_tokens: int
    merges: Tensor
    user: Tensor
    item: Tensor

    @classmethod
    def of(cls, data: "Dataset", tokenizer: Tokenizer) -> "Catalogue":
        """The catalogue of a data set and the tokenizer trained on its texts."""
        user, item = data.pairs(TRAIN)
        longest = max(len(tokenizer.encode(data.texts[i])) for i in item.unique().tolist()) + 1
        return cls(data.name, data.user_ids, data.item_ids, data.words,
                   max(1, *map(len, data.prompts)), longest, tokenizer.state(), user, item)

    def place(self, kind: str, names: Iterable[object]) -> list[int]:
        """Numbers of some of a kind ("user", "item", "prompt word"), whose names are compared as
        strings, a number's in a tensor, too. Raises ValueError on one that is not known."""
        there = {"user": self.user_ids, "item": self.item_ids, "prompt word": self.words}[kind]
        number = {name: n for n, name in enumerate(there)}
        wanted = [f"{name}" for name in names]
        if unknown := [name for name in wanted if name not in number]:
            raise ValueError(f"unknown {kind} {unknown[0]!r:.60}: {known(unknown[0], there)}")
        return [number[name] for name in wanted]

    def encode_prompts(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        """Phrases -> (B, P) int64, P >= max_words, padded with 0. ValueError on an unknown one."""
        places = self.place("prompt word", [phrase for phrases in prompts for phrase in phrases])
        rows = torch.tensor(places, dtype=torch.int64).add(1).split([*map(len, prompts)])
        widest = torch.zeros(self.max_words, dtype=torch.int64)
        return nn.utils.rnn.pad_sequence([widest, *rows], batch_first=True)[1:]


# ---- the method ----------------------------------------------------------------------------------

PerModality = dict[str, Tensor]  # "image", "text" -> what belongs to it


class Generated(NamedTuple):
    """What is made for somebody: a picture (H x H RGB) and a text."""
    image: Image.Image
    text: str


class ReinforceStep(NamedTuple):
    """loss (): a surrogate, whose gradient is that of -E[R] and of the weighted KLs; what the
    reward was made of; and the KLs () from the starting tokens, in nats: of the differentiated step
    of an image, of a text before its nucleus is cut out."""
    loss: Tensor
    parts: RewardParts
    kl_image: Tensor
    kl_text: Tensor


class Modality(nn.Module):
    """One modality's side of stage 1: what each user likes, as a vector p_u (`preference`) and as
    discrete tokens k_u (`tokens`)."""

    def __init__(self, n_users: int, cfg: Config):
        super().__init__()
        self.quantizer = ResidualVQVAE(cfg.gnn.dim, cfg.vq)
        self.register_buffer("preference", torch.zeros(n_users, cfg.gnn.dim))
        self.register_buffer("tokens", torch.zeros(n_users, cfg.vq.levels, dtype=torch.int64))

    @torch.no_grad()
    def quantize(self, preference: Tensor) -> Tensor:
        """Preferences (B, D) -> discrete preference tokens (B, L). Changes no codebook."""
        return self.quantizer.eval().encode(preference)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """What tokens (B, L) stand for: (B, D) of about unit length; 0 for null tokens (-1)."""
        return self.quantizer.eval().decode(tokens.clamp(min=0)) * (tokens[:, :1] >= 0)


def to_picture(x: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> an RGB picture."""
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


class DPPMG(nn.Module):
    """The four parts wired together; train.py trains them stage by stage."""

    def __init__(self, cfg: Config, catalogue: Catalogue):
        super().__init__()
        self.cfg, self.catalogue = cfg, catalogue
        self.tokenizer = Tokenizer.from_state(catalogue.merges)
        n_users, n_items = len(catalogue.user_ids), len(catalogue.item_ids)
        n_words, vocab = max(1, len(catalogue.words)), self.tokenizer.vocab_size
        n_image, n_text = cfg.method.image_features, cfg.method.text_features
        self.autoencoder = Autoencoder(cfg.image)
        self.image_features = LatentPCA(cfg.image.latent, cfg.image.size // 4, n_image)
        self.text_features = TfidfSVD(vocab, n_text)
        features = {"image": torch.zeros(n_items, n_image), "text": torch.zeros(n_items, n_text)}
        self.gnn = ModalGNN(n_users, n_items, features, cfg.gnn)
        self.modality = nn.ModuleDict({m: Modality(n_users, cfg) for m in MODALITIES})
        tokens = n_words, cfg.vq.levels, cfg.vq.codes
        self.text = TextDecoder(replace(cfg.text, vocab_size=vocab), *tokens)
        self.image = Denoiser(cfg.image, *tokens)
        self.scorer = Scorer(cfg.reward, vocab, n_words)
        self.graph = build_graph(catalogue.user, catalogue.item, n_users, n_items)

    # stage 1

    @torch.no_grad()
    def update_preferences(self, preference: PerModality, user: Tensor | slice = slice(None)):
        """Take over these users' rows of preference[m] (U, D), or all, and quantize them."""
        for m, taste in self.modality.items():
            taste.preference[user] = preference[m][user]
            taste.tokens[user] = taste.quantize(preference[m][user])

    @torch.no_grad()
    def seed_tables(self, generator: Generator | None):
        """Start both generators' preference-token embeddings as what the codebooks say: a code's
        vector, turned into the generator's width by a random orthonormal map, so that the sum over
        the levels is the quantized preference. DEVIATION 7: random rows would have to learn what
        the codebook knows."""
        for m, taste in self.modality.items():
            weight = getattr(self, m).preference.weight  # (L K, width)
            books = torch.stack([book.codebook for book in taste.quantizer.codebooks])  # (L, K, D)
            turn = torch.empty(weight.shape[1], books.shape[2], device=weight.device)
            nn.init.orthogonal_(turn, generator=generator)
            unit = books.flatten(0, 1) / books[0].square().sum(1).mean().sqrt().clamp(min=1e-8)
            weight.copy_(unit @ turn.T * weight.square().mean().sqrt() * weight.shape[1] ** 0.5)

    def score(self, modality: str, preference: Tensor, content: Tensor) -> Tensor:
        """s_m = p . W_m f_m(content), (B,): preference (B, D); content: latents (B, C, h, h) or
        tokens (B, T)."""
        features = getattr(self, f"{modality}_features")(content)
        return (preference * self.gnn.embed_content(modality, features)).sum(1)

    def user_tokens(self, user: Tensor) -> PerModality:
        """Preference tokens {m: (B, M)} of training users (B,) int64."""
        return {m: taste.tokens[user] for m, taste in self.modality.items()}

    @torch.no_grad()
    def fold_in(self, histories: Sequence[Sequence[object]]) -> PerModality:
        """Preference tokens {m: (B, M)} of people who were not in training, each from the ids of
        the items they like, propagated once through the graph formula and quantized: nothing is
        trained. Raises ValueError on no history, an empty one, or an unknown item."""
        items = [self.catalogue.place("item", history) for history in histories]
        if not items or not all(items):
            raise ValueError("an empty history says nothing: give at least one item")
        pairs = [(n, i) for n, row in enumerate(items) for i in row]
        user, item = torch.tensor(pairs, device=self.graph.col.device).T
        preference = self.gnn.fold_in(self.graph, user, item, len(items))
        return {m: self.modality[m].quantize(p) for m, p in preference.items()}

    # stage 2

    def half(self) -> contextlib.AbstractContextManager:
        """DEVIATION 20: within it the generators compute in bf16, on GPUs and processors with
        instructions for it. Weights, attention on the CPU, sums and log-probabilities stay fp32."""
        kind = self.graph.col.device.type
        fast = kind == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
        if kind == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        if fast and self.cfg.method.bf16:
            return torch.autocast(kind, torch.bfloat16)
        return contextlib.nullcontext()

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, h) -> images (B, 3, H, H) in [-1, 1], fp32 or better."""
        with self.half():
            images = self.autoencoder.decode(latents)
        return images.to(latents.dtype).clamp(-1, 1)

    def sample_tokens(self, prompt: Tensor, prefs: Tensor, generator: Generator | None) -> Tensor:
        """Text tokens (B, T) for prompt (B, P) and preference tokens (B, M), -1 null."""
        longest = min(self.cfg.text.context, self.catalogue.max_tokens)
        with self.half():
            return sample_text(self.text, prompt, prefs, generator, longest)

    @torch.no_grad()
    def sample_pairs(self, prompt: Tensor, prefs: PerModality, generator: Generator | None,
                     best_of: int = 1, batch: int = 256) -> tuple[Tensor, Tensor]:
        """An image (B, 3, H, H) in [-1, 1] and a text (B, T) of tokens for each prompt (B, P) and
        prefs[m] (B, M). best_of n > 1: of n images and 2 n texts the pair with the highest reward;
        so many as `batch` images at once."""
        images, texts = [], []
        n_texts = 2 * best_of if best_of > 1 else 1
        for rows in torch.arange(len(prompt), device=prompt.device).split(max(1, batch // best_of)):
            many = rows.repeat_interleave(best_of)  # (b n,)
            with self.half():
                latents = sample_latents(self.image, prompt[many], prefs["image"][many], generator)
            image, many = self.decode_latents(latents), rows.repeat_interleave(n_texts)
            text = self.sample_tokens(prompt[many], prefs["text"][many], generator)
            if best_of > 1:
                taste = {m: self.modality[m].decode(prefs[m][rows]) for m in MODALITIES}
                best = best_pair(*self._score_groups(taste, latents, image, text), self.cfg.reward)
                group = torch.arange(len(rows), device=rows.device)
                image, text = image[group * best_of + best[0]], text[group * n_texts + best[1]]
            images.append(image)
            texts.append(text)
        return torch.cat(images), torch.cat(texts)

    def _score_groups(self, preference: PerModality, latents: Tensor, images: Tensor,
                      texts: Tensor) -> tuple[Tensor, ...]:
        """What the reward is made of, for G groups of S images and of S texts, each made for one
        preference[m] (G, D): embeddings (G, S, D) of images and texts, their scores (G, S)."""
        found = [self.scorer.encode_image(images), self.scorer.encode_text(texts)]
        for (m, p), content in zip(preference.items(), (latents, texts)):
            found.append(self.score(m, p.repeat_interleave(len(content) // len(p), 0), content))
        return tuple(x.unflatten(0, (len(p), -1)) for x in found)

    def generate(self, prompt: str | Iterable[str], person: object = None, n: int = 1,
                 seed: int = 0, best_of: int = 1) -> list[Generated]:
        """n pairs for the prompt (phrases, parted by commas or in a list) and a person: the id of a
        training user, or a list of items that somebody likes who was not in training, or None:
        unpersonalized. best_of k > 1: each is the best by the reward of k pictures and 2 k texts.
        Raises ValueError on what is not known, TypeError on a number that is no integer."""
        n, best_of, seed = map(operator.index, (n, best_of, seed))
        if min(n, best_of) < 1:
            raise ValueError(f"n={n}, best_of={best_of}: both need to be at least 1")
        device = self.graph.col.device
        prompt = prompt if isinstance(prompt, str) else ",".join(prompt)
        words = self.catalogue.encode_prompts([parse_prompt(prompt)]).to(device)
        if person is None:
            prefs = {m: words.new_full((1, self.cfg.vq.levels), -1) for m in MODALITIES}
        elif isinstance(person, str) or not isinstance(person, Iterable):
            prefs = self.user_tokens(self.catalogue.place("user", [person]))
        else:
            prefs = self.fold_in([person])
        prefs = {m: tokens.expand(n, -1) for m, tokens in prefs.items()}
        generator = torch.Generator(device).manual_seed(seed % 2**63)
        images, tokens = self.sample_pairs(words.expand(n, -1), prefs, generator, best_of)
        return list(map(Generated, map(to_picture, images), self.tokenizer.decode_batch(tokens)))

    # the reward

    def reinforce_step(self, user: Tensor, prompt: Tensor, reference: PerModality,
                       generator: Generator | None) -> ReinforceStep:
        """Sample groups of images and texts, score them, and give the surrogate loss of both token
        tables. user (G,) int64, prompt (G, P); reference: the tables from which the KL is measured.
        Of its gradient the tables' part is wanted alone: backward(inputs=...).
        DEVIATION 10: every image is scored against all texts of its group."""
        cfg, prefs = self.cfg.reward, self.user_tokens(user)
        latents, log_p_image, kl_image = self._rollout_images(prompt, prefs, reference, generator)
        texts, log_p_text, kl_text = self._rollout_texts(prompt, prefs, reference, generator)
        with torch.no_grad():
            preference = {m: self.modality[m].preference[user] for m in MODALITIES}
            found = self._score_groups(preference, latents, self.decode_latents(latents), texts)
            reward_image, reward_text, parts = pair_reward(*found, cfg)
        loss = reinforce_loss(log_p_image, leave_one_out(reward_image).flatten())
        loss = loss + reinforce_loss(log_p_text, leave_one_out(reward_text).flatten())
        loss = loss + cfg.kl_image * kl_image + cfg.kl_text * kl_text
        return ReinforceStep(loss, parts, kl_image.detach(), kl_text.detach())

    def _rollout_images(self, prompt: Tensor, prefs: PerModality, reference: PerModality,
                        generator: Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """S images for each prompt (G, P) and prefs[m] (G, M): latents (G S, C, h, h), the
        log-probabilities (G S,) of their first steps, and the KL () of these from the reference
        table's; in nats, differentiable in the table.
        DEVIATION 11: only the first step is differentiated, as if the later ones knew the starting
        tokens: what a picture shows is decided there, and each other step adds variance.
        DEVIATION 23: a group's images share their noise, and so their first step's mean; what the
        noise decides is then part of the baseline."""
        net, n, prefs = self.image, self.cfg.reward.images, prefs["image"]
        times = sampling_times(self.cfg.reward.diffusion_steps)
        noise, (t, s) = net.noise(len(prompt), generator), times[:2]

        def first_step() -> tuple[Tensor, Tensor]:
            with self.half():
                v = guided_v(net, noise, t, prompt, prefs, guidance_at(t, net.cfg))
            return ddim_step(noise, v, t, s, net.cfg.eta)
        mean, std = first_step()  # (G, C, h, h), ()
        with torch.no_grad(), table_as(net, reference["image"]):
            start, _ = first_step()
        kl = gaussian_kl(mean, start, std).mean()
        # here the images of a group part: (G, ..) -> (G S, ..)
        mean, prompt, prefs = (x.repeat_interleave(n, 0) for x in (mean, prompt, prefs))
        z = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        z = mean.detach() + std * z
        with self.half():
            latents = denoise(net, z, times[1:], prompt, prefs, generator)
        return latents, gaussian_log_prob(z, mean, std), kl

    def _rollout_texts(self, prompt: Tensor, prefs: PerModality, reference: PerModality,
                       generator: Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """S texts for each prompt (G, P) and prefs[m] (G, M): tokens (G S, T), their
        log-probabilities (G S,), and the KL () of the policy, before its nucleus is cut out (else
        it were infinite), from the reference table's.
        DEVIATION 24: drawn from the nucleus that users see; what that lets drift, the KL holds."""
        cfg, n = self.text.cfg, self.cfg.reward.texts
        prompt, prefs = (x.repeat_interleave(n, 0) for x in (prompt, prefs["text"]))
        tokens = self.sample_tokens(prompt, prefs, generator)  # (G S, T)
        with self.half():
            cond = self.text(tokens, prompt, prefs)  # (G S, T, V)
            with torch.no_grad():  # what REINFORCE changes is not in the null branch
                null = self.text(tokens, prompt, torch.full_like(prefs, -1))
                with table_as(self.text, reference["text"]):
                    start = self.text(tokens, prompt, prefs)
        whole = replace(cfg, top_p=1.0)
        now, start = (sampling_logits(logits, null, whole) for logits in (cond, start))
        kl = categorical_kl(now, start, tokens != PAD).mean()
        return tokens, text_log_prob(cond, null, tokens, cfg), kl

    # files

    def state(self) -> dict:
        """Tensors and plain values from which `load` makes this model again."""
        model = self.state_dict()
        return {"config": asdict(self.cfg), "catalogue": vars(self.catalogue), "model": model}

    @classmethod
    def load(cls, run: str | Path, device: str | None = "cpu") -> "DPPMG":
        """The model of a run (folder or checkpoint file). Raises CheckpointError, and ValueError on
        a device that is not here."""
        path = Path(run) / "checkpoint.pt" if Path(run).is_dir() else Path(run)
        checkpoint, device = read_checkpoint(path), pick_device(device)
        try:
            if "reward" not in checkpoint["done"]:
                done = f"training is not finished, done is {checkpoint['done']}"
                raise ValueError(f"{done}; go on with train.py --resume")
            config = Config.from_dict(checkpoint["config"])
            model = cls(config, Catalogue(**checkpoint["catalogue"]))
            model.load_state_dict(checkpoint["model"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            why = f"no finished model of this version: {str(error)!r:.200}"
            raise CheckpointError(f"{path}: {why}") from None
        return model.eval().to(device)

    def to(self, *args, **kwargs) -> "DPPMG":
        """As nn.Module.to; the graph moves too."""
        super().to(*args, **kwargs)
        self.graph = self.graph.to(self.image.null.device)
        return self


# ---- reading a folder ----------------------------------------------------------------------------

# the columns of each file, the first two needed, and the names that they go by, the best last
COLUMNS = {
    "items.csv": {"item": "item", "text": "text", "prompt": "prompt"},
    "interactions.csv": {"user": "user", "item": "item",
                         "timestamp": "date time datetime timestamp",
                         "rating": "value overall click like likes label stars score rating"}}
ALL_LIKES = "every row counts as a like; --min-rating R keeps rows of at least R"
MAX_PHRASES = 16  # of a prompt: a generator's condition is short
MAX_LISTED = 10  # errors shown per file


class DataError(ValueError):
    """All that is wrong with a data folder, `file:line: what` a line, and what is needed:

    interactions.csv   user,item[,timestamp]   numbers or ISO 8601 dates; --min-rating needs rating
    items.csv          item,text[,prompt]      each item once; prompt: phrases parted by commas
    images/ITEM.png    (.jpg .jpeg .webp)      one for each item, of any size and mode, no link out
    CSV in UTF-8, as many values in a row as in the header, "..." around one that holds a comma;
    --drop-incomplete leaves out items without a text or a readable picture"""


def _plain(name: str) -> str:
    """An id less what programs change: Unicode form, case, outer blanks, leading zeros, ".0"."""
    return re.sub(r"^0+(?=\d)|\.0$", "", normalize("NFC", name).strip().casefold())


def _time(value: str) -> tuple[float, str]:
    """A number, or the seconds from 1970 to an ISO 8601 date, in UTC if it does not say; and which
    of the two it is."""
    with contextlib.suppress(ValueError):
        return float(value), "number"
    with contextlib.suppress(ValueError):
        date = datetime.fromisoformat(value.strip())
        return date.replace(tzinfo=date.tzinfo or timezone.utc).timestamp(), "date"
    raise ValueError(f"timestamp {value!r} is neither a number nor a date")


def read_image(path: str | Path, size: int) -> np.ndarray:
    """A picture as RGB, (3, size, size) uint8.

    The whole picture is resized to the square (LANCZOS): nothing of it is lost but its proportions.
    Turned as its EXIF says; transparency on white; 16-bit grey scaled to 8; first frame of an
    animation; a large JPEG is decoded at a fraction of its size.
    Raises what Pillow does: OSError, SyntaxError, ValueError, DecompressionBombError and others."""
    with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as file:
        file.draft("RGB", (2 * size, 2 * size))
        image = ImageOps.exif_transpose(file)
    # 16-bit grey: convert("RGBA") would clip it at 255
    if image.mode.startswith("I"):
        image = Image.fromarray(((np.asarray(image, np.uint32) + 128) // 257).astype(np.uint8))
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    # a copy, row by row: else all that sees pictures works on a strided layout, which is slower
    return np.asarray(image).transpose(2, 0, 1).copy()


class _Folder:
    """What was found in a data folder so far: what is good, errors, and counts of what is odd.

    place: file and line; errors: message by place; gaps: places of items without text or picture;
    items, users: number of each id, -1 of an item left out; unknown: number of an id that is not in
    items.csv; kept: (item, text, prompt, picture) by number; likes: time of each (user, item)
    number; clock: what timestamps are; ids: those of each kind that look alike; pictures: by stem.
    """

    def __init__(self, folder: str | Path, size: int, min_rating: float | None):
        self.root, self.size, self.min_rating = Path(folder).resolve(), size, min_rating
        self.place, self.errors, self.gaps, self.notices = "", {}, set(), Counter()
        self.items, self.users, self.unknown, self.kept, self.likes = {}, {}, None, [], {}
        self.clock, self.ids, self.pictures = None, defaultdict(dict), defaultdict(list)
        for path in sorted(self.root.glob("images/*")):
            if path.suffix.lower() in SUFFIXES and self.holds(path):
                self.pictures[_plain(path.stem)].append(path)

    def holds(self, path: Path) -> bool:
        """Is it a file of the folder, and no link out of it, which may come from anywhere?"""
        return path.is_file() and path.resolve().is_relative_to(self.root)

    def find_columns(self, file: str, header: list[str]) -> dict[str, str]:
        """The name in the header of each of COLUMNS[file] that is there."""
        known = COLUMNS[file]
        needed = [*known][:2] + ["rating"] * ("rating" in known and self.min_rating is not None)
        found = {c: name for c in known for name in known[c].split() if name in header}
        ignored = [name for name in header if name not in found.values()]
        if not found.keys() >= {*needed} or len(found) + len(ignored) != len(header):
            raise ValueError(f"the header {','.join(header)!r:.60} needs {needed}, each once")
        self.notices[f"columns of {file} ignored: {', '.join(ignored)!r}"] = len(ignored)
        if "rating" in found and self.min_rating is None:
            self.notices[f"column {found['rating']!r}: {ALL_LIKES}"] = 1
        return found

    def read(self, file: str, take: Callable):
        """take(column=value, ...) each row of a CSV file; note what it raises, and where."""
        self.place = f"{file}:1"
        try:
            if not self.holds(self.root / file):
                raise ValueError("no such file in the folder, where links out of it do not count")
            data = (self.root / file).read_bytes()
            comma = chr(max(b",;\t", key=data.lstrip().partition(b"\n")[0].count))
            lines = (line.decode("utf-8-sig") for line in data.splitlines(keepends=True))
            rows = csv.reader(lines, delimiter=comma, strict=True)
            header = [name.strip().casefold() for name in next(filter(any, rows), [])]
            self.notices[f"columns of {file} separated by {comma!r}"] = len(header) * (comma != ",")
            columns = self.find_columns(file, header)
            self.place = f"{file}:{rows.line_num + 1}"
            for row in rows:
                if any(map(str.strip, row)):
                    self.take(take, columns, header, row)
                self.place = f"{file}:{rows.line_num + 1}"
        except (OSError, ValueError, csv.Error) as error:
            self.errors[self.place] = str(error)
            self.unknown = -1

    def take(self, take: Callable, columns: dict[str, str], header: list[str], row: list[str]):
        """take(column=value, ...) a row; note what it raises, of which item."""
        values = dict(zip(header, row))
        try:
            if len(row) != len(header):
                raise ValueError(f"{len(row)} values, but {len(header)} in the header")
            take(**{column: values[name] for column, name in columns.items()})
        except Exception as error:  # a damaged picture makes Pillow raise nearly anything
            self.errors[self.place] = f"item {values.get('item')!r:.60}: {error}"
            self.items.setdefault(values.get("item"), -1)

    def check_id(self, kind: str, name: str):
        """ValueError unless this can be an id; whether others look like it is asked at the end."""
        if not name.strip() or CONTROL.search(name):
            raise ValueError(f"{kind} {name!r:.60} cannot be an id")
        self.ids[kind, _plain(name)][name] = None

    def take_item(self, item: str, text: str, prompt: str = ""):
        """Keep an item and its picture."""
        self.check_id("item", item)
        if item in self.items:
            raise ValueError("is there twice")
        self.items[item] = -1
        self.gaps.add(self.place)  # until it is seen to have both
        alike, name = self.pictures[_plain(item)], normalize("NFC", item)
        pictures = [path for path in alike if normalize("NFC", path.stem) == name]
        if not text.strip() or len(pictures) != 1:
            there = [path.name for path in alike]
            raise ValueError(f"text {text!r:.60} and pictures {there!a}: need one, of this name")
        image = read_image(pictures[0], self.size)
        self.gaps.remove(self.place)
        phrases = parse_prompt(prompt)
        self.items[item] = len(self.kept)
        self.kept.append((item, text, phrases[:MAX_PHRASES], image))
        self.notices[f"prompts cut to {MAX_PHRASES} phrases"] += len(phrases) > MAX_PHRASES

    def take_like(self, user: str, item: str, timestamp: str = "0", rating: str = ""):
        """Keep a user and an item at their earliest time."""
        number = self.items.get(item, self.unknown)
        if number is None:
            near = [f"; did you mean {name!a}?" for name in self.ids["item", _plain(item)]]
            raise ValueError(f"not in items.csv{''.join(near)}")
        self.check_id("user", user)
        time, kind = _time(timestamp)
        self.clock = self.clock or kind
        if kind != self.clock or not math.isfinite(time):
            raise ValueError(f"timestamp {timestamp!r}: need a finite {self.clock} in every row")
        if self.min_rating is not None and not float(rating or "nan") >= self.min_rating:
            self.notices[f"interactions not rated {self.min_rating:g} or more left out"] += 1
        elif number < 0:
            self.notices["interactions with items that are left out"] += 1
        else:
            pair = self.users.setdefault(user, len(self.users)), number
            self.notices["repeated interactions merged, the earliest kept"] += pair in self.likes
            self.likes[pair] = min(time, self.likes.get(pair, time))

    def check(self, drop_incomplete: bool):
        """DataError with the first MAX_LISTED errors of each file; more are in a temporary file."""
        skipped = self.gaps if drop_incomplete else ()
        errors = [f"{place}: {what}" for place, what in self.errors.items() if place not in skipped]
        lines = [f"{self.root}: {len(errors):,} problem(s) in the data"]
        for file in COLUMNS:
            lines += [error[:300] for error in errors if error.startswith(file)][:MAX_LISTED]
        if len(lines) <= len(errors):
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", delete=False) as file:
                file.write("\n".join(errors))
            lines.append(f"... the whole list is in {file.name}")
        if errors:
            raise DataError("\n  ".join(lines + str(DataError.__doc__).split("\n")[2:]))
        self.notices["items without a text or a readable picture left out"] = len(self.gaps)
        twins = [(kind, *names) for (kind, _), names in self.ids.items() if len(names) > 1]
        self.notices[f"sets of ids look alike: {twins[:3]!a}: did you mean one?"] = len(twins)


# ---- the data set ------------------------------------------------------------------------------

def split_by_time(user: Tensor, time: Tensor, seed: int) -> Tensor:
    """Train, validation or test part of each interaction: per user 8:1:1 by time, the latest test.

    Of n interactions, max(1, round(n / 10)) (half rounds up) are test, as many before them
    validation; n < 3: all are train. Equal times are put in order by a shuffle from `seed`.
    user (R,) int64 >= 0; time (R,) any real dtype, not NaN.
    Returns (R,) int8 of TRAIN, VALID, TEST. Raises ValueError if user and time differ in shape."""
    chance = torch.randperm(len(user), generator=torch.Generator().manual_seed(seed)).argsort()
    order = torch.from_numpy(np.lexsort((chance, time, user)))
    count = user.bincount()
    held = torch.where(count < 3, 0, ((count + 5) // 10).clamp(min=1))[user[order]]
    # (R,)  1 for the user's latest, 2 for the one before it, and so on
    age = count.cumsum(0)[user[order]] - torch.arange(len(user))
    part = (age <= 2 * held).to(torch.int8) + (age <= held).to(torch.int8)
    return part[order.argsort()]


@dataclass(eq=False)
class Dataset:
    """What users liked, and the text, picture and prompt of each item; made by Dataset.load.

    prompts: parse_prompt's phrases, at most MAX_PHRASES; words: the sorted vocabulary of all.
    images (I, 3, H, H) uint8 RGB. user (R,) int64 in [0, U), item (R,) int64 in [0, I): each pair
    once; time (R,) float64, its earliest, in the data's unit, 0 where the data has none;
    part (R,) int8: TRAIN, VALID or TEST. notices: what was repaired or ignored, a line each."""
    name: str
    user_ids: list[str]
    item_ids: list[str]
    texts: list[str]
    prompts: list[tuple[str, ...]]
    words: list[str]
    images: Tensor
    user: Tensor
    item: Tensor
    time: Tensor
    part: Tensor
    notices: list[str]

    def pairs(self, *parts: int) -> Tensor:
        """Users and items (2, R) of the interactions in some parts, or in all."""
        rows = torch.isin(self.part, torch.tensor(parts)) if parts else slice(None)
        return torch.stack([self.user[rows], self.item[rows]])

    def fingerprint(self) -> str:
        """Digest of all that training reads."""
        ids = repr((self.user_ids, self.item_ids, self.texts, self.prompts)).encode()
        tensors = [x.numpy().tobytes() for x in (self.user, self.item, self.part, self.images)]
        return hashlib.sha256(b"".join([ids, *tensors])).hexdigest()

    @classmethod
    def load(cls, folder: str | Path, image_size: int, seed: int, min_rating: float | None = None,
             drop_incomplete: bool = False) -> "Dataset":
        """Read and check a folder in the format that DataError states; nothing in it is written.

        image_size: H, pixels; seed: of split_by_time; min_rating: of an interaction that counts,
        None: all do; drop_incomplete: leave out items without a text or a readable picture.
        Raises DataError with all that is wrong (file, line, value) and what is needed."""
        if not os.path.isdir(os.path.join(folder, "images")):
            raise DataError(f"{folder}: does not exist, or holds no folder images/")
        found = _Folder(folder, image_size, min_rating)
        found.read("items.csv", found.take_item)
        found.read("interactions.csv", found.take_like)
        found.check(drop_incomplete)
        ties = len(found.likes) - len({(u, time) for (u, _), time in found.likes.items()})
        found.notices["interactions without a time of their own: ordered by chance"] = ties
        notices = [f"{n:,} {text}" for text, n in found.notices.items() if n]
        users, n = list(found.users), len(found.kept)
        if min(len(users), n) < 2:
            what = f"{folder}: {len(users)} users with likes and {n} items; need 2 of each"
            raise DataError("\n  ".join([what, *notices]))
        items, texts, prompts, images = map(list, zip(*found.kept))
        words = sorted({word for phrases in prompts for word in phrases})
        user, item = torch.tensor(list(found.likes)).T.contiguous()
        time = torch.tensor(list(found.likes.values()), dtype=torch.float64)
        part = split_by_time(user, time, seed)
        return cls(found.root.name, users, items, texts, prompts, words,
                   torch.from_numpy(np.stack(images)), user, item, time, part, notices)


def hold_out_users(data: Dataset, share: float, seed: int) -> dict[str, Tensor]:
    """Put a share of the users, drawn at random, into part NEW.

    Returns their "history" and "test" interactions and, as "hidden", all but the test ones,
    (user, item) (2, E), in the order of time."""
    able = (data.user.bincount() >= 3).nonzero()[:, 0]
    able = able[torch.randperm(len(able), generator=torch.Generator().manual_seed(seed))]
    new = able[:min(int(share * len(data.user_ids)), len(able) - 2)]
    order = torch.from_numpy(np.lexsort((data.time, data.user)))
    order = order[torch.isin(data.user[order], new)]
    pairs, part = torch.stack([data.user, data.item])[:, order], data.part[order]
    data.part[order] = NEW
    kept = {"history": part == TRAIN, "test": part == TEST, "hidden": part != TEST}
    return {name: pairs[:, rows] for name, rows in kept.items()}


# ---- command line --------------------------------------------------------------------------------

class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line and name what could have been meant; exit status 2."""

    def error(self, message: str):
        """Print the message as one line and exit with status 2."""
        if match := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            message = f"unknown flag {match[1]}: {known(match[1], flags)} (--help lists them)"
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: print the texts and write the images that a trained model makes."""
    parser = OneLineParser(prog="dppmg.py", description="Make pictures and texts for one person.")
    add = parser.add_argument
    add("run", help="folder that train.py wrote")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--user", help="id of a user; without it, unpersonalized")
    who.add_argument("--history", nargs="+", metavar="ITEM", help="or: items that somebody likes")
    add("--prompt", default="", help="what it shall be about: phrases of items.csv, by commas")
    add("--out", default="dppmg.png", help="file for the picture; several: -2, -3 .. (%(default)s)")
    add("--n", type=int, default=1, help="how many pairs (%(default)s)")
    add("--best-of", type=int, default=1, metavar="K",
        help="the best pair of K pictures and 2 K texts, by the reward (%(default)s)")
    add("--seed", type=int, default=0, help="of the samples (%(default)s)")
    add("--device", help="cpu, cuda or another of torch's (cuda where there is one)")
    forgive_terminals()
    args = parser.parse_args(argv)
    out = Path(args.out)
    try:
        if out.suffix.lower() not in SUFFIXES or not out.parent.is_dir() or out.is_dir():
            raise ValueError(f"--out {args.out}: need a .png or .jpg in a folder that exists")
        model = DPPMG.load(args.run, args.device)
        person = args.user if args.history is None else args.history
        made = model.generate(args.prompt, person, args.n, args.seed, args.best_of)
        for k, (image, text) in enumerate(made, 1):
            path = out if k == 1 else out.with_stem(f"{out.stem}-{k}")
            with replacing(path) as temporary:
                image.save(temporary, Image.registered_extensions()[out.suffix.lower()])
            # no escape sequence reaches the terminal
            say(f"{path}: {CONTROL.sub(chr(0xFFFD), text)}")
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
