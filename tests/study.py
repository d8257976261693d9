"""Studies: rows that differ in one thing and share all stages before it, side by side.

    python tests/study.py claims    every claim of the method, and its rivals
    python tests/study.py pareto    weights of personalization and agreement in the reward
    python tests/study.py bits      sizes of the codebooks; a trained embedding per user instead

--data DIR (none: stickers), --seeds N, --split random (the time column dropped), --jobs N processes
of one thread, --out runs/study, --smoke, --rows NAME... (those alone, and what they start from),
and train.py's settings, for all rows. A row starts from the tensors of its parent and trains the
stages that it changes. Rows lie in OUT/seed-N/ROW, for all studies: what is there is not trained
again, and what was interrupted goes on. Leaves OUT/STUDY/study.json, study.html and STUDY.csv.

Each idea is one switch: a field of Row, read in `open_row` or `set_tokens`. So the method's own
files hold none of its rivals.
"""
from __future__ import annotations

import argparse
import copy
import csv
import functools
import html
import io
import json
import math
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import train  # noqa: E402
from dppmg import (MODALITIES, TEST, TRAIN, VALID, Dataset, pick_device,  # noqa: E402
                   read_checkpoint, say, split_by_time)
from generators import Denoiser, TextDecoder  # noqa: E402
from gnn import Graph, ModalGNN  # noqa: E402
from reward import embed  # noqa: E402
from tests.builders import INKS, STYLE, Html, table  # noqa: E402

# shorter than by default, and the same for all rows; reward.log_every: at the start and the end
RECIPE = {"image": dict(width=96, steps=500), "text": dict(steps=600),
          "reward": dict(rounds=60, kl_image=0.1, kl_text=2.0, log_every=10**6),
          "train": dict(pairs=200, sampled_users=16)}
HISTORY = 10  # items of somebody new, and those that "history as condition" attends to
DRAWS = 2000  # of the bootstrap
MARGIN = 0.02  # a difference below is too small to matter; what loses less is kept


# ---- switches: what rows have instead of the method's parts --------------------------------------

def mean_of_history(rows: Tensor, history: Tensor, n_users: int) -> Tensor:
    """Mean of the rows (I, D) of what each user has in history (2, E): (U, D), 0 for nothing."""
    user, item = history
    total = rows.new_zeros(n_users, rows.shape[1]).index_add_(0, user, rows[item])
    return total / user.bincount(minlength=n_users).clamp(min=1)[:, None]


class AverageGNN(ModalGNN):
    """No graph: p_u is the mean of the history's features; W is the identity, and not trained."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for weight in self.item.values():
            nn.init.eye_(weight)

    def forward(self, graph: Graph) -> dict[str, tuple[Tensor, Tensor]]:
        items = {m: self.embed_content(m, getattr(self, f"features_{m}")) for m in self.modalities}
        history = torch.stack(graph.pairs(0, self.n_users))
        return {m: (mean_of_history(x, history, self.n_users), x) for m, x in items.items()}

    @torch.no_grad()
    def fold_in(self, graph: Graph, user: Tensor, item: Tensor, n_new: int) -> dict[str, Tensor]:
        """The same mean."""
        history, items = torch.stack([user, item]), self(graph)
        return {m: mean_of_history(x, history, n_new) for m, (_, x) in items.items()}


class IdGNN(ModalGNN):
    """x_i^0 is learnt for each item, not W f_i; so new content cannot be scored."""

    def __init__(self, n_users: int, n_items: int, features: dict[str, Tensor], *arguments):
        super().__init__(n_users, n_items, features, *arguments)
        self.ids = nn.ParameterDict({m: 0.1 * torch.randn(n_items, self.cfg.dim) for m in features})

    def layer0(self) -> Tensor:
        """(N, M D)."""
        return torch.cat([torch.cat([self.user[m], self.ids[m]]) for m in self.modalities], dim=1)


def use_gnn(kind: type[ModalGNN], run: train.Run):
    """Another graph network on the same features."""
    n_users, n_items = len(run.data.user_ids), len(run.data.item_ids)
    run.model.gnn = kind(n_users, n_items, run.features, run.cfg.gnn).to(run.device)


def share_preference(run: train.Run):
    """One graph network, on the features of both modalities, and one token sequence for both."""
    both = torch.cat(list(run.features.values()), dim=1)
    n_users, n_items = len(run.data.user_ids), len(run.data.item_ids)
    gnn = ModalGNN(n_users, n_items, dict.fromkeys(MODALITIES, both), run.cfg.gnn)
    gnn.user["text"], gnn.item["text"] = gnn.user["image"], gnn.item["image"]
    run.model.gnn = gnn.to(run.device)
    run.model.modality["text"] = run.model.modality["image"]


class Projection(nn.Module):
    """Instead of a table of tokens: the vector (F) of a number, projected, for each position.
    rows: gives the vectors (R, F) of all numbers, here brought to unit length; scale: rms of what
    the table holds that this replaces."""

    def __init__(self, rows: Callable[[], Tensor], positions: int, width: int, scale: float):
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(scale * torch.randn(positions, width, rows().shape[1]))

    def forward(self, numbers: Tensor) -> Tensor:
        unit = F.normalize(self.rows()[numbers], dim=-1)  # (B, M, F)
        return (unit[:, :, None] @ self.weight.mT)[:, :, 0]  # (B, M, width)


class Projected:
    """A generator told numbers, of which `preference` makes vectors, instead of tokens."""

    def embed(self, prompt: Tensor, prefs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As Conditioned.embed."""
        tastes = self.preference(prefs.clamp(min=0))  # (B, M, D)
        tastes = torch.where(prefs[..., None] < 0, self.null, tastes)
        return self.words(prompt), tastes, F.pad(prompt != 0, (0, self.levels), value=True)


class ProjectedText(Projected, TextDecoder):
    """Text."""


class ProjectedImage(Projected, Denoiser):
    """Images."""


def project(run: train.Run, rows: dict[str, Callable], positions: int, length: int):
    """Fresh generators that are told `length` numbers, at most so many positions apart."""
    for m, kind in (("image", ProjectedImage), ("text", ProjectedText)):
        net = kind(getattr(run.model, m).cfg, max(1, len(run.data.words)), length, 1)
        scale = net.preference.weight.square().mean().sqrt().item()
        net.preference = Projection(rows[m], positions, net.words.weight.shape[1], scale)
        setattr(run.model, m, net.to(run.device))
    run.modules["average"] = copy.deepcopy(run.model.image)


def use_continuous(run: train.Run):
    """p_u^m itself, in as many projections as there would be tokens."""
    rows = {m: lambda taste=taste: taste.preference for m, taste in run.model.modality.items()}
    project(run, rows, run.cfg.vq.levels, run.cfg.vq.levels)


@torch.no_grad()
def use_embeddings(run: train.Run):
    """Each user is one token of their own, whose embedding starts as the unquantized preference and
    is trained with the generators. (So it is no preference vector, but a trained embedding.)"""
    for m, taste in run.model.modality.items():
        weight = getattr(run.model, m).preference.weight
        turn = torch.empty(weight.shape[1], taste.preference.shape[1])
        nn.init.orthogonal_(turn, generator=run.generator("seed tables"))
        scale = weight.square().mean().sqrt() * weight.shape[1] ** 0.5
        weight.copy_(F.normalize(taste.preference, dim=1) @ turn.T * scale)


# Which tokens everybody gets: (run, modality) -> (U, M), -1 null.

def own_tokens(run: train.Run, m: str) -> Tensor:
    """The quantized preference."""
    taste = run.model.modality[m]
    return taste.quantize(taste.preference)


def null_tokens(run: train.Run, m: str) -> Tensor:
    """None: unpersonalized."""
    return torch.full_like(own_tokens(run, m), -1)


def commonest_tokens(run: train.Run, m: str) -> Tensor:
    """The average training user's, for everybody."""
    taste = run.model.modality[m]
    mean = F.normalize(taste.preference[run.users], dim=1).mean(0, keepdim=True)
    return taste.quantize(mean).expand(len(taste.preference), -1)


def another_tokens(run: train.Run, m: str) -> Tensor:
    """A random other training user's, the same one's in both modalities."""
    own = own_tokens(run, m)
    place = torch.searchsorted(run.users, torch.arange(len(own), device=run.device))
    shift = 1 + train.draw(len(run.users) - 1, len(own), run.generator("another"))
    return own[run.users[(place + shift) % len(run.users)]]


def user_numbers(run: train.Run, m: str) -> Tensor:
    """No tokens: the user's own number, at each position."""
    numbers = torch.arange(len(run.data.user_ids), device=run.device)
    return numbers[:, None].repeat(1, run.cfg.vq.levels)


def nth_of_user(user: Tensor) -> Tensor:
    """For each of the sorted users (E,): how many of the same come before it."""
    return torch.arange(len(user), device=user.device) - torch.searchsorted(user, user)


def histories(run: train.Run) -> Tensor:
    """What is known of everybody, users and items (2, E) by user and time: the training items of
    users in training, the first HISTORY of new people."""
    data = run.data
    order = torch.from_numpy(np.lexsort((data.time, data.user)))
    order = order[data.part[order] == TRAIN]
    trained = torch.stack([data.user[order], data.item[order]]).to(run.device)
    user = run.new["history"][0].contiguous()
    pairs = torch.cat([trained, run.new["history"][:, nth_of_user(user) < HISTORY]], dim=1)
    return pairs[:, pairs[0].argsort(stable=True)]


def item_numbers(run: train.Run, m: str) -> Tensor:
    """No tokens: the numbers of the oldest items in the history, HISTORY at most; of users in
    training half of them at most, so that some are left to learn from."""
    user, item = histories(run)
    count = user.bincount(minlength=len(run.data.user_ids))
    count[run.users] //= 2
    nth = nth_of_user(user.contiguous())
    told = nth < count[user].clamp(max=HISTORY)
    numbers = item.new_full((len(count), HISTORY), -1)
    numbers[user[told], nth[told]] = item[told]
    return numbers


def use_history(run: train.Run):
    """The generators attend to items of the history themselves, embedded. What they learn to make
    must not be among what they are told: they learn from the other items."""
    project(run, {m: lambda x=x: x for m, x in run.features.items()}, 1, HISTORY)
    user, item = run.liked
    run.liked = run.liked[:, (item_numbers(run, "image")[user] != item[:, None]).all(1)]


# ---- the rows ------------------------------------------------------------------------------------

class Row(NamedTuple):
    """A row: what it starts from, what it trains anew, what it changes, and which row it is
    compared with. build: changes networks before that; variant: of train.make."""
    name: str
    parent: str = ""
    stages: tuple[str, ...] = ()
    against: str = ""
    settings: dict[str, dict] = {}
    build: Callable[[train.Run], None] = lambda run: None
    tokens: Callable[[train.Run, str], Tensor] = own_tokens
    variant: str = "after_reward"
    measured: bool = True


GENERATORS, REWARD = ("text", "image"), ("reward",)
SHARED = ("autoencoder", "features", "scorer", "judge", "referee")
TRUNK = [Row("shared stages", "", SHARED, measured=False),
         Row("graph", "shared stages", ("gnn",), measured=False),
         Row("tokens", "graph", ("codebook",), measured=False)]
PLAIN, FULL, BEST = "discrete, no reward", "DPPMG", "best of n, no reward"
RATIOS = ((0.0, 1.0), (0.25, 1.0), (0.5, 1.0), (1.0, 1.0), (2.0, 1.0), (1.0, 0.0))  # p : c
BITS = ((1, 32), (2, 32), (3, 32), (4, 32), (4, 64))  # levels, codes


def weights(run_settings: dict, p: float, c: float) -> dict[str, dict]:
    """lambda_p : lambda_c = p : c, together as strong against the KL as the settings are."""
    reward = train.build(run_settings)[0].reward
    total = (reward.lambda_p + reward.lambda_c) / (p + c)
    return {"reward": dict(lambda_p=p * total, lambda_c=c * total)}


def claims_rows(settings: dict, n_users: int) -> list[Row]:
    """The method, its parts and its rivals."""
    anew = ("codebook", *GENERATORS)
    base, average = functools.partial(Row, against=PLAIN), functools.partial(use_gnn, AverageGNN)
    only_ids = functools.partial(use_gnn, IdGNN)
    return [
        *TRUNK,
        Row(PLAIN, "tokens", GENERATORS, FULL),
        Row(FULL, PLAIN, REWARD),
        base("real", "graph", variant="real"),
        base("unpersonalized", PLAIN, tokens=null_tokens),
        base("commonest taste", PLAIN, tokens=commonest_tokens),
        base("another's tokens", PLAIN, tokens=another_tokens),
        base("average of history", "shared stages", anew, build=average),
        base("ID-only", "shared stages", ("gnn", *anew), build=only_ids),
        base("shared preference", "shared stages", ("gnn", *anew), build=share_preference),
        base("continuous", "tokens", GENERATORS, build=use_continuous, tokens=user_numbers),
        base("history as condition", "tokens", GENERATORS, build=use_history, tokens=item_numbers),
        base("no residual levels", "graph", anew, settings={"vq": dict(levels=1, codes=512)}),
        base(BEST, PLAIN, variant="best_of"),
        Row("consistency reward only", PLAIN, REWARD, FULL, weights(settings, 0, 1)),
        Row("personalization reward only", PLAIN, REWARD, FULL, weights(settings, 1, 0)),
        Row("DPPMG, best of n", FULL, against=FULL, variant="best_of")]


def pareto_rows(settings: dict, n_users: int) -> list[Row]:
    """Weights of both parts of the reward."""
    rows = [Row(f"{p:g} to {c:g}", PLAIN, REWARD, PLAIN, weights(settings, p, c))
            for p, c in RATIOS]
    return [*TRUNK, Row(PLAIN, "tokens", GENERATORS), *rows]


def bits_rows(settings: dict, n_users: int) -> list[Row]:
    """Sizes of the codebooks."""
    name, last = "{} x {:g} bits", f"{BITS[-1][0]} x {math.log2(BITS[-1][1]):g} bits"
    rows = [Row(name.format(n, math.log2(k)), "graph", ("codebook", *GENERATORS), last,
                {"vq": dict(levels=n, codes=k)}) for n, k in BITS]
    own = Row("trained embedding per user", "tokens", GENERATORS, last,
              {"vq": dict(levels=1, codes=n_users)}, use_embeddings, user_numbers)
    return [*TRUNK, *rows, own]


STUDIES = {"claims": claims_rows, "pareto": pareto_rows, "bits": bits_rows}


class Options(NamedTuple):
    """What was asked; settings: of train.py, by group, as JSON."""
    out: Path
    data: str | None
    split: str
    settings: str


@functools.cache
def load(options: Options, seed: int) -> tuple[Dataset, train.World | None]:
    """The data of one seed, and of stickers their world."""
    cfg, settings = train.build(json.loads(options.settings))
    folder, world = options.data, None
    if folder is None:
        folder, world = options.out / f"seed-{seed}/stickers", train.sticker_world(settings, seed)
        if not (folder / "interactions.csv").exists():
            train.write_stickers(folder, world, seed)
    data = Dataset.load(folder, cfg.image.size, seed, settings.min_rating or None,
                        settings.drop_incomplete)
    if options.split == "random":  # as if there were no times
        time = torch.zeros_like(data.time)
        data = replace(data, time=time, part=split_by_time(data.user, time, seed))
    return data, world


def folder_of(options: Options, seed: int, name: str) -> Path:
    """Where a row lies."""
    return options.out / f"seed-{seed}" / re.sub(r"\W+", "-", name)


def take_over(run: train.Run, state: dict):
    """Every tensor of a parent's checkpoint that fits."""
    theirs, mine = state["modules"], run.modules.state_dict()
    same = {k: theirs[k] for k, v in mine.items() if k in theirs and theirs[k].shape == v.shape}
    run.modules.load_state_dict(mine | same)


@torch.no_grad()
def set_tokens(run: train.Run, row: Row):
    """Everybody's tokens, by the row's rule."""
    tokens = {m: row.tokens(run, m) for m in MODALITIES}
    for m, taste in run.model.modality.items():
        taste.tokens = tokens[m]


def open_row(options: Options, seed: int, row: Row) -> train.Run:
    """The run of a row: its parent's tensors, its own switches, and as far as it was trained."""
    values = json.loads(options.settings)
    for group, changed in (row.settings | {"method": {"seed": seed}}).items():
        values[group] = values[group] | changed
    cfg, settings = train.build(values)
    data, world = load(options, seed)
    data = replace(data, part=data.part.clone(), notices=[])  # a run changes them
    out = folder_of(options, seed, row.name)
    out.mkdir(parents=True, exist_ok=True)
    run = train.Run(cfg, settings, data, world, out, pick_device(None))
    if row.parent:
        parent = folder_of(options, seed, row.parent) / "checkpoint.pt"
        take_over(run, read_checkpoint(parent))
    run.metrics = {"stage1": {}}
    run.features = {m: getattr(run.model.gnn, f"features_{m}").clone() for m in MODALITIES}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed("start of a rival"))
        row.build(run)
    set_tokens(run, row)
    run.restore()
    return run


# ---- measuring a row -----------------------------------------------------------------------------

class People(NamedTuple):
    """Of whom a row is measured: pairs (user, prompt); users (G,) of many samples; test (2, R):
    likes that give their prompts; held (2, R): likes that the judge's taste is made of."""
    pairs: train.Pairs
    users: Tensor
    test: Tensor
    held: Tensor


def some_people(run: train.Run) -> dict[str, People]:
    """Users in training; and new people, known by their first HISTORY interactions alone."""
    test, n = run.pairs(TEST), run.train.sampled_users
    pairs, users = train.draw_pairs(run, TEST, run.train.pairs), train.some_users(run, "spread", n)
    found = {"training": People(pairs, users, test, run.pairs(VALID, TEST))}
    test = run.new["test"][:, :run.train.pairs]
    if test.shape[1]:
        other = train.draw(len(run.users), test.shape[1], run.generator("other"))
        every, known = torch.cat([run.new["hidden"], run.new["test"]], dim=1), histories(run)
        key, known = (user * len(run.topic) + item for user, item in (every, known))
        held, users = every[:, ~torch.isin(key, known)], test[0].unique()[:math.ceil(n / 2)]
        found["new"] = People(train.Pairs(*test, run.users[other]), users, test, held)
    return found


def fold_in(run: train.Run):
    """Preferences of new people, from their first HISTORY interactions."""
    pairs, new = histories(run), run.new["history"][0].unique()
    user, item = pairs[:, torch.isin(pairs[0], new)]
    preference = run.model.gnn.fold_in(run.model.graph, user, item, len(run.data.user_ids))
    for m, taste in run.model.modality.items():
        taste.preference[new] = preference[m][new]


def notions(run: train.Run, made: train.Made) -> dict[str, Tensor]:
    """Two weaker notions of personal, (B,) each: nearness, the cosine of a content's features and
    the mean of the history's, both less the mean item's; and changes, 1 - cosine for the judge of
    what is made for the user and for another."""
    model, found, user = run.model, {}, made.pairs.user
    latents = train.in_batches(model.autoencoder.encode, made.own.images)
    features = model.image_features(latents), model.text_features(made.own.tokens)
    own, other = (embed(run.modules["judge"], content) for content in (made.own, made.other))
    for m, x in zip(MODALITIES, features):
        mean = run.features[m][run.seen].mean(0)
        near = mean_of_history(run.features[m], histories(run), len(run.data.user_ids))[user]
        found[f"nearness_{m}"] = F.cosine_similarity(x - mean, near - mean)
        found[f"changes_{m}"] = 1 - (own[m] * other[m]).sum(1)
    return found


def many_samples(run: train.Run, variant: str, who: People) -> dict[str, Tensor]:
    """train.spread of many samples for each of some users, for prompts of their test items."""
    if variant == "real":
        return train.many_samples(run, variant, who.users)
    n, chance = run.train.samples, run.generator("many samples")
    likes = train.liked_by(run, who.users, who.test).double()
    item = likes.multinomial(n, replacement=True, generator=chance)  # (G, S)
    user = who.users.repeat_interleave(n)
    made = train.make_for(run, variant, user, item.flatten(), chance)
    return train.spread(run, who.users, item, made)


@torch.no_grad()
def measure(run: train.Run, variant: str, who: People) -> dict[str, list]:
    """Every measure: its values and the user of each. One that both modalities have is also given
    as their mean, without the modality's name."""
    made = train.make(run, variant, who.pairs, run.generator("evaluation"))
    found = train.measures(run, made, who.held) | notions(run, made)
    cells = {name: (values, made.pairs.user) for name, values in found.items()}
    spread = many_samples(run, variant, who)
    cells |= {name: (values, who.users) for name, values in spread.items()}
    for name in [name for name in cells if name.endswith("_image")]:
        one, two = cells[name], cells[name.replace("_image", "_text")]
        cells[name.removesuffix("_image")] = (one[0].double() + two[0].double()) / 2, one[1]
    return {name: [[round(x, 4) for x in values.tolist()], user.tolist()]
            for name, (values, user) in cells.items()}


def seconds_a_pair(run: train.Run, variant: str, pairs: train.Pairs) -> float | None:
    """CPU seconds to make one pair, in a batch of at most 64."""
    if variant == "real":
        return None
    start, (user, item) = time.process_time(), (x[:64] for x in pairs[:2])
    train.make_for(run, variant, user, item, run.generator("seconds"))
    return (time.process_time() - start) / len(user)


def do_row(options: Options, seed: int, row: Row):
    """Train what is missing of a row, measure it, write row.json. Once that is there: nothing."""
    torch.set_num_threads(1)
    train.keep_memory()
    path = folder_of(options, seed, row.name) / "row.json"
    if path.exists():
        return
    run = open_row(options, seed, row)
    train.train_all(run, row.stages)
    parent = folder_of(options, seed, row.parent) / "row.json"
    seconds = json.loads(parent.read_text())["seconds"] if row.parent else {}
    seconds |= {stage: cpu for stage, (_, cpu) in run.seconds.items()}
    found = {"seconds": seconds, "stage1": run.metrics["stage1"]}
    if row.measured:
        fold_in(run)
        set_tokens(run, row)
        run.tables = {m: x.detach().clone() for m, x in train.tables_of(run.model).items()}
        groups = some_people(run)
        found["pair_seconds"] = seconds_a_pair(run, row.variant, groups["training"].pairs)
        found["people"] = {n: measure(run, row.variant, who) for n, who in groups.items()}
    train.write_json(path, found)
    say(f"seed {seed}: {row.name}")


def rows_of(options: Options, study: str) -> list[Row]:
    """The rows of a study, parents first."""
    data, _ = load(options, 0)
    return STUDIES[study](json.loads(options.settings), len(data.user_ids))


def do_named_row(options: Options, study: str, seed: int, name: str):
    """do_row in a process of its own, to which a row with its functions cannot be sent."""
    row, = (row for row in rows_of(options, study) if row.name == name)
    do_row(options, seed, row)


def needed(rows: list[Row], names: Sequence[str]) -> list[Row]:
    """The rows of these names, and those that they start from; all where no name is given."""
    keep = {*names} or {row.name for row in rows}
    for row in reversed(rows):  # parents come first
        keep |= {row.parent} if row.name in keep else set()
    return [row for row in rows if row.name in keep]


def do_rows(options: Options, study: str, seeds: int, jobs: int, names: Sequence[str] = ()):
    """All rows of all seeds, or these, each after its parent, in `jobs` processes."""
    rows = needed(rows_of(options, study), names)
    todo, done, running = [(seed, row) for seed in range(seeds) for row in rows], {""}, {}
    todo.sort(key=lambda task: rows.index(task[1]))  # what others wait for first
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        while todo or running:
            for seed, row in [x for x in todo if not x[1].parent or (x[0], x[1].parent) in done]:
                todo.remove((seed, row))
                task = pool.submit(do_named_row, options, study, seed, row.name)
                running[task] = seed, row.name
            for task in wait(running, return_when=FIRST_COMPLETED).done:
                task.result()
                done.add(running.pop(task))


# ---- differences and their intervals -------------------------------------------------------------

Cell = tuple[list, list]  # values, None where nothing was measured, and the user of each


def by_user(values: list, user: list) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each user, of those that have any."""
    values = np.array(values, float)
    there = np.isfinite(values)
    _, place = np.unique(np.array(user)[there], return_inverse=True)
    return np.bincount(place, values[there]), np.bincount(place)


@functools.lru_cache(maxsize=32)
def resampled(sizes: tuple[int, ...], draws: int) -> list[np.ndarray]:
    """How often each user counts in each draw of a two-level bootstrap: as many seeds are drawn
    as there are, and for each as many users as it has. sizes: of seeds -> (draws, U) each."""
    chance = np.random.default_rng(0)
    times = [np.zeros((draws, n)) for n in sizes]
    for drawn in chance.integers(len(sizes), size=(len(sizes), draws)):
        for seed, n in enumerate(sizes):
            rows = drawn == seed
            times[seed][rows] += chance.multinomial(n, np.full(n, 1 / n), size=rows.sum())
    return times


def estimate(seeds: list[Cell], draws: int = DRAWS) -> dict[str, float] | None:
    """Mean and 95 % interval, over seeds and over users, whose values are never parted. None where
    nothing was measured. (Of few seeds, n, a bootstrap shows too little of the variance among them,
    by the factor (n - 1) / n.)"""
    cells = [x for x in (by_user(*cell) for cell in seeds) if len(x[0])]
    if not cells:
        return None
    times = resampled(tuple(len(sums) for sums, _ in cells), draws)
    total, count = (sum(t @ x[k] for t, x in zip(times, cells)) for k in (0, 1))
    low, high = np.quantile(total / count, [0.025, 0.975])
    mean = sum(x.sum() for x, _ in cells) / sum(n.sum() for _, n in cells)
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def less(one: list[Cell], other: list[Cell]) -> list[Cell]:
    """Differences of two rows, pair by pair, seed by seed. ValueError if the pairs are others."""
    found = []
    for (a, user), (b, same) in zip(one, other, strict=True):
        if user != same:
            raise ValueError("less: the rows were measured on different pairs")
        pairs = [(x, y) for x, y in zip(a, b, strict=True)]
        found.append(([None if None in pair else pair[0] - pair[1] for pair in pairs], user))
    return found


def verdict(difference: dict[str, float], kept: bool) -> str:
    """What an interval says of a claim: that something is more, or (kept) that it is not less."""
    low, high = difference["low"], difference["high"]
    if low > (-MARGIN if kept else 0):
        return "holds"
    return "does not hold" if high < (-MARGIN if kept else MARGIN) else "cannot tell"


CLAIMS = (  # letter, claim, row, less another, measures, whether it claims that they are kept
    ("a", "a graph preference model beats the average of the history", PLAIN, "average of history",
     ("utility",), False),
    ("b", "modal-specific beats shared", PLAIN, "shared preference", ("utility",), False),
    ("c", "discrete tokens keep what continuous preferences have", PLAIN, "continuous",
     ("utility",), True),
    ("d", "the reward raises agreement", FULL, PLAIN, ("consistency",), False),
    ("e", "while personalization is kept", FULL, PLAIN, ("utility", "taste", "variety"), True),
    ("f", "more than best of n, which costs n times as much a pair", FULL, BEST,
     ("consistency", "utility", "variety"), False),
    ("f", "more than best of n, at equal cost a pair", "DPPMG, best of n", BEST,
     ("consistency", "utility", "variety"), False))
COLUMNS = ("consistency", "consistency_repaired", "utility", "taste", "variety", "swap", "prompt",
           "nearness", "changes")
Found = dict[str, dict[str, dict[str, list[Cell]]]]  # row -> people -> measure -> a cell a seed


def named(measure: str, cells: dict) -> str:
    """The measure's name where tastes are not known: what the judge finds in its stead."""
    judged = "judge_" + measure.replace("utility", "swap")
    return measure if measure in cells or judged not in cells else judged


def collect(rows: dict[str, list[dict]]) -> Found:
    """What was measured, by row, people and measure; {} for people who are not there."""
    found = {}
    for name, seeds in rows.items():
        people = {who: [seed["people"][who] for seed in seeds] for who in seeds[0]["people"]}
        found[name] = {who: {m: [cells[m] for cells in each] for m in each[0]}
                       for who, each in people.items()}
    return found


def judge_claims(found: Found) -> list[dict]:
    """A line for each claim, people and measure: the difference, its interval, the verdict."""
    lines = []
    for letter, claim, one, other, measures, kept in CLAIMS:
        for who, cells in found.get(one, {}).items():
            for name in (named(measure, cells) for measure in measures):
                if name in cells and other in found:
                    difference = estimate(less(cells[name], found[other][who][name]))
                    lines.append({"claim": f"({letter}) {claim}", "row": one, "less": other,
                                  "people": who, "measure": name, **difference,
                                  "verdict": verdict(difference, kept)})
    return lines


def summary(row: Row, seeds: list[dict], found: Found) -> list[dict]:
    """A row's measures, their differences from the row that it is compared with, and its costs; for
    each kind of people. Training counts what the row needs, so no judge, and no scorer without a
    reward; CPU seconds of one thread, means over the seeds."""
    unused = {"judge", "referee"} | ({"scorer"} if "reward" not in seeds[0]["seconds"]
                                     and row.variant != "best_of" else set())
    spent = [sum(s for n, s in x["seconds"].items() if n not in unused) for x in seeds]
    pair, lines = [x["pair_seconds"] for x in seeds], []
    for who, cells in found[row.name].items():
        other = found.get(row.against, {}).get(who, {})
        compared = [m for m in cells if m in other and row.variant != "real"]
        lines.append({
            "row": row.name, "people": who, "against": row.against,
            "training_seconds": None if row.variant == "real" else sum(spent) / len(spent),
            "pair_seconds": None if None in pair else sum(pair) / len(pair),
            "measures": {m: estimate(cell) for m, cell in cells.items()},
            "differences": {m: estimate(less(cells[m], other[m])) for m in compared}})
    return lines


# ---- the page ------------------------------------------------------------------------------------

def shown(value: object) -> object:
    """A value in a table: nothing for None, an interval by its mean and half its width."""
    if not isinstance(value, dict):
        return "" if value is None else value
    return f"{value['mean']:.3f} ± {(value['high'] - value['low']) / 2:.3f}"


def intervals(title: str, rows: list[tuple[str, dict[str, float], str]]) -> Html:
    """Inline SVG: a line for each (label, interval, colour), its mean a dot."""
    low, high = min(x["low"] for _, x, _ in rows), max(x["high"] for _, x, _ in rows)
    marks = ""
    for n, (label, x, ink) in enumerate(rows):
        places = [x["low"], x["mean"], x["high"]]
        a, b, c = np.interp(places, (low, max(high, low + 1e-9)), (220, 590))
        y = 14 * n + 10
        marks += (f'<text x="0" y="{y + 4}" font-size="11">{html.escape(label)}</text>'
                  f'<path d="M{a:.1f} {y}H{c:.1f}" stroke="{ink}" stroke-width="2"/>'
                  f'<circle cx="{b:.1f}" cy="{y}" r="3" fill="{ink}"/>')
    words = f"<h3>{html.escape(title)}: {low:.3f} to {high:.3f}</h3>"
    return Html(f'{words}<svg width="600" height="{14 * len(rows) + 8}">{marks}</svg>')


def plots(lines: list[dict]) -> str:
    """Interval plots of the main measures; users in training blue, new people orange."""
    body, inks = "", dict(zip(("training", "new"), INKS))
    for column in COLUMNS:
        rows = [(f"{x['row']} ({x['people']})", x["measures"].get(named(column, x["measures"])),
                 inks[x["people"]]) for x in lines]
        rows = [row for row in rows if row[1]]
        body += intervals(column, rows) if rows else ""
    return body


def four_notions(lines: list[dict]) -> str:
    """Near the history, good looking, changed by a swap, truly preferred: do they part?"""
    rows = []
    for x in lines:
        change = {m: x["differences"].get(named(m, x["differences"]))
                  for m in ("nearness", "prompt", "changes", "utility")}
        if all(change.values()):
            parts = change["nearness"]["low"] > 0 and change["utility"]["low"] <= 0
            says = "nearer, and not preferred more" if parts else ""
            rows.append([x["row"], x["people"], x["against"], *map(shown, change.values()), says])
    head = ["row", "people", "less", "nearness", "prompt", "changes", "utility", ""]
    return table(head, rows, "four notions of personal")


def page(study: dict) -> str:
    """study.html: tables and plots, self-contained."""
    lines = study["rows"]
    rows = []
    for x in lines:
        cells = (x["measures"].get(named(c, x["measures"])) for c in COLUMNS)
        rows.append([x["row"], x["people"], x["training_seconds"], x["pair_seconds"],
                     *map(shown, cells)])
    head = ["row", "people", "training s", "s a pair", *COLUMNS]
    claims = [[shown(v) for v in (x["claim"], x["people"], x["measure"], x["row"], x["less"])]
              + [shown(x), x["verdict"]] for x in study["claims"]]
    words = html.escape(f"{study['dataset']}, {study['seeds']} seeds, split by {study['split']}; "
                        f"{study['settings']}; {study['machine']}; {study['equal_cost']}")
    title = f"Study: {html.escape(study['study'])}"
    return "\n".join([
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1><p>{words}</p>",
        "<p>± half a 95 % interval over seeds and users. More: holds where surely above 0, not "
        f"where surely below {MARGIN}. Kept: holds where surely not {MARGIN} less.</p>",
        table(head, rows, "measures of each row"), "<h2>Claims</h2>",
        table(["claim", "people", "measure", "row", "less", "difference", ""], claims, "claims"),
        "<h2>Four notions of personal: differences</h2>", four_notions(lines),
        "<h2>Intervals</h2>", plots(lines)])


def as_csv(lines: list[dict]) -> str:
    """A row for each row, people and measure."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["row", "people", "training_seconds", "pair_seconds", "measure", "mean", "low",
                   "high", "against", "difference", "difference_low", "difference_high"])
    for x in lines:
        for m, found in x["measures"].items():
            change = x["differences"].get(m) or {}
            rows.writerow([x["row"], x["people"], x["training_seconds"], x["pair_seconds"], m,
                           *(found or dict.fromkeys("mlh")).values(), x["against"],
                           *(change.get(k) for k in ("mean", "low", "high"))])
    return text.getvalue()


def equal_cost(lines: list[dict]) -> str:
    """After how many pairs the reward's training has cost less than best of n."""
    cost = {x["row"]: (x["training_seconds"], x["pair_seconds"]) for x in lines}
    if not {PLAIN, FULL, BEST} <= set(cost):
        return ""
    training, saved = cost[FULL][0] - cost[BEST][0], cost[BEST][1] - cost[FULL][1]
    return f"DPPMG costs less than best of n from {training / saved:.0f} pairs on" * (saved > 0)


def begin(options: Options):
    """Remember what was asked in OUT/options.json. Exits where rows of something else lie."""
    path, asked = options.out / "options.json", options._asdict() | {"out": None}
    options.out.mkdir(parents=True, exist_ok=True)
    if path.exists() and json.loads(path.read_text()) != asked:
        sys.exit(f"--out {options.out}: was begun with other data or settings; choose another")
    train.write_json(path, asked)


def write_study(options: Options, study: str, seeds: int, names: Sequence[str] = ()):
    """study.json, study.html and STUDY.csv of all rows that are measured, or of these."""
    rows, read = needed(rows_of(options, study), names), {}
    rows = [row for row in rows if row.measured and row.name in (names or [row.name])]
    for row in rows:
        paths = [folder_of(options, seed, row.name) / "row.json" for seed in range(seeds)]
        read[row.name] = [json.loads(path.read_text()) for path in paths]
    found = collect(read)
    lines = [line for row in rows for line in summary(row, read[row.name], found)]
    device = pick_device(None)
    result = {"study": study, "dataset": options.data or "stickers", "seeds": seeds,
              "split": options.split, "settings": json.loads(options.settings),
              "machine": train.machine(device), "equal_cost": equal_cost(lines),
              "claims": judge_claims(found) if study == "claims" else [], "rows": lines}
    out = options.out / study
    out.mkdir(parents=True, exist_ok=True)
    train.write_json(out / "study.json", result)
    (out / "study.html").write_text(page(result), encoding="utf-8")
    (out / f"{study}.csv").write_text(as_csv(lines), encoding="utf-8")
    for line in result["claims"]:
        say(f"{line['claim']}; {line['people']}, {line['measure']}: {shown(line)}, "
            f"{line['verdict']}")


def main(argv: list[str] | None = None):
    """Run a study, or what is missing of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", help="data folder; none: stickers")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", choices=("time", "random"), default="time")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="these rows alone")
    parser.add_argument("--smoke", action="store_true", help="tiny: does it run?")
    args, flags = parser.parse_known_args(argv)
    changed, (_, given) = train.SMOKE if args.smoke else RECIPE, train.parse_arguments(flags)
    cfg, settings = train.build({g: changed.get(g, {}) | given[g] for g in train.PARTS})
    values = json.dumps(asdict(cfg) | {"train": asdict(settings)})
    options = Options(args.out, args.data, args.split, values)
    names = [row.name for row in rows_of(options, args.study)]
    if unknown := {*args.rows} - {*names}:
        parser.error(f"--rows: {sorted(unknown)} not among {names}")
    begin(options)
    do_rows(options, args.study, args.seeds, args.jobs, args.rows)
    write_study(options, args.study, args.seeds, args.rows)


def linear_probe(
        x: Tensor, label: Tensor, n_labels: int, folds: int = 5, ridge: float = 1e-2) -> float:
    """How much of a label a linear map finds in x: its share of right answers for users that it was
    not fitted to. Ridge regression to one-hot labels; user n is in fold n mod folds, and each fold
    is answered by the fit to the others.

    x (U, F) any scale, standardized here over all users; label (U,) int64 in [0, n_labels)."""
    x = x.double()
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-9)
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)  # (U, F + 1)
    target = F.one_hot(label, n_labels).double()  # (U, n_labels)
    fold = torch.arange(len(x), device=x.device) % folds
    right = 0
    for k in range(folds):
        fit, held_out = fold != k, fold == k
        penalty = ridge * fit.sum() * torch.eye(x.shape[1]).to(x)
        gram = x[fit].T @ x[fit] + penalty  # (F + 1, F + 1)
        weight = torch.linalg.solve(gram, x[fit].T @ target[fit])
        answer = (x[held_out] @ weight).argmax(1)
        right += int((answer == label[held_out]).sum())
    return right / len(x)


if __name__ == "__main__":
    main()
