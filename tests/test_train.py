"""train.py: stickers and their referee, stages, exact measures, a run's files and report, kills, mistakes."""
import contextlib
import csv
import hashlib
import html.parser
import json
import math
import os
import re
import shutil
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, spawn
from kill_resume import differences
from PIL import Image
from torch import nn
from torch.testing import assert_close

import train
from dppmg import MODALITIES, NEW, TEST, TRAIN, VALID, CheckpointError, Dataset, read_checkpoint
from train import ATTRIBUTES, SEEN, SETTINGS, SUBJECTS, TONES, Referee, TrainConfig, read_text


TRAIN_REFEREE = """if True:
    import sys, torch, train
    run = train.open_run(*train.parse_arguments(["--resume", "--out", sys.argv[1]]))
    run.train, run.stage = train.TrainConfig(), "referee"
    train.train_referee(run)
    torch.save(run.modules["referee"].state_dict(), sys.argv[1] + "/referee.pt")"""


@pytest.fixture(scope="module", autouse=True)
def processes(smoke, tmp_path_factory):
    """What takes long, begun at once beside the other tests, which come first: a run that is killed again and
    again; a referee that learns with the default settings, in a folder."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(smoke, folder / "run", ignore=shutil.ignore_patterns("metrics.json"))
    script, reference = str(ROOT / "tests" / "kill_resume.py"), ("--reference", str(smoke))
    begun = {"chain": spawn(script, "--chain", *reference, "--out", str(folder / "chain")),
             "referee": spawn("-c", TRAIN_REFEREE, str(folder / "run"), cwd=ROOT)}
    yield folder, begun
    for process in begun.values():
        process.kill()


@pytest.fixture(autouse=True)
def restored_signal():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def reopen(smoke, folder):
    """The smoke run, all stages done, in a copy of its folder that may be changed."""
    shutil.copytree(smoke, folder, ignore=shutil.ignore_patterns("metrics.json"))
    run = train.open_run(*train.parse_arguments(["--resume", "--out", str(folder)]))
    run.restore()
    return run


@pytest.fixture(scope="module")
def run(smoke, tmp_path_factory):
    """To look at; tests that change it take `spare`."""
    return reopen(smoke, tmp_path_factory.mktemp("reopened") / "run")


@pytest.fixture
def spare(smoke, tmp_path):
    return reopen(smoke, tmp_path / "run")


def main(*arguments):
    """Exit status of the command line."""
    try:
        return train.main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code


def digest(folder):
    """What each file of a folder holds."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def hashes(module):
    """A hash of every tensor."""
    return {name: hashlib.sha256(x.numpy().tobytes()).hexdigest() for name, x in module.state_dict().items()}


# ---- stickers

def test_stickers_are_a_folder_like_any_other_and_their_texts_say_what_they_are(run):
    data, world = Dataset.load(run.out / "stickers", 32, 0), run.world
    assert data.notices == ["3 columns of items.csv ignored: 'setting, colour, pattern'"]
    assert len(data.item_ids) == len(world.items) == 160 and len(data.user_ids) == 40
    for text, prompt, row in zip(data.texts, data.prompts, world.items):
        value = dict(zip(ATTRIBUTES, row))
        assert read_text(text) == (value["subject"], value["setting"], value["tone"])
        assert prompt == (SUBJECTS[value["subject"]],)
    liked = {(int(u), int(i)) for u, row in enumerate(world.liked) for i in row}
    assert set(zip(data.user.tolist(), data.item.tolist())) == liked and len(liked) == 40 * 12
    with open(run.out / "stickers" / "items.csv", encoding="utf-8") as file:
        for line, row in zip(csv.DictReader(file), world.items):
            assert [line[a] for a in ("prompt", *SEEN[1:])] == [ATTRIBUTES[a][v] for a, v in zip(SEEN, row)]


def test_interactions_are_drawn_from_the_product_of_the_tastes():
    """How often is a user's first, second .. favourite value liked?  As often as in numpy's own draws."""
    cfg, rng = TrainConfig(items=1000, users=300, interactions=20), np.random.default_rng(6)
    world = train.sticker_world(cfg, seed=5)
    for taste in world.tastes.values():
        assert (taste > 0).all() and np.allclose(taste.sum(1), 1)
    p = np.prod([world.tastes[a][:, world.items[:, k]] for k, a in enumerate(ATTRIBUTES)], axis=0)  # (U, I)
    slow = np.stack([rng.choice(1000, 20, replace=False, p=row / row.sum()) for row in p])
    for k, (a, values) in enumerate(ATTRIBUTES.items()):
        place = np.argsort(np.argsort(-world.tastes[a], axis=1), axis=1)                    # (U, values)
        one, two = (np.bincount(np.take_along_axis(place, world.items[:, k][liked], 1).ravel(),
                                minlength=len(values))
                    for liked in (world.liked, slow))
        assert (abs(one - two) < 5 * np.sqrt(one + two)).all(), (a, one, two)
        assert one[0] > 1.3 * 300 * 20 / len(values)        # and taste matters
    assert all(len(set(row)) == 20 for row in world.liked)
    # the order of time tells nothing: the best are not the oldest
    first = world.liked[:, 0]
    assert abs(np.log(p[np.arange(300), first]).mean()
               - np.log(np.take_along_axis(p, world.liked, 1)).mean()) < 0.5


def test_the_same_seed_draws_the_same_world():
    cfg, worlds = TrainConfig(items=40, users=5, interactions=10), []
    for seed in (1, 1, 2):
        world = train.sticker_world(cfg, seed)
        worlds.append([world.items.tolist(), {a: t.tolist() for a, t in world.tastes.items()},
                       world.liked.tolist()])
    assert worlds[0] == worlds[1] and all(a != b for a, b in zip(worlds[0], worlds[2]))


@pytest.mark.parametrize("text", [
    "", "fish", "a fish at dawn", "a fish at dawn.\n", " a fish at dawn.", "A fish at dawn.",
    "a cat at dawn.", "a fish at noon.", "a fish at dawn. a fish at dawn.", "a  at .", "a fish at dawn!",
    "softly the fish dreams, wrapped in dawn", "a {subject} at {setting}.",
    "a fısh at dawn.", "\0", "a " + "fish " * 10**4])
def test_what_is_no_stickers_text_is_not_read(text):
    assert read_text(text) == (-1, -1, -1)


def test_every_stickers_text_is_read():
    for t, tone in enumerate(TONES):
        for s, subject in enumerate(SUBJECTS):
            for n, setting in enumerate(SETTINGS):
                assert read_text(tone.format(subject=subject, setting=setting)) == (s, n, t)


# ---- a run's parts

def test_held_out_users_are_in_no_training():
    def load():
        generator = torch.Generator().manual_seed(3)
        user, item = (torch.rand(30, 40, generator=generator) < 0.4).nonzero().T
        # who like one thing
        user, item = torch.cat([user, torch.arange(30, 50)]), torch.cat([item, torch.arange(20)])
        order = torch.randperm(len(user), generator=generator)
        user, item, time = user[order], item[order], torch.rand(len(user), generator=generator)
        part = torch.full((len(user),), TRAIN, dtype=torch.int8)
        part[::7], part[::11] = VALID, TEST
        ids = [str(n) for n in range(50)]
        images = torch.zeros(40, 3, 8, 8)
        return Dataset("x", ids, ids, ids, [()] * 40, [], images, user, item, time, part, [])
    before, data = load(), load()
    new = train.hold_out_users(data, 0.3, seed=1)
    held = data.user[data.part == NEW].unique()
    assert len(held) == 15 and held.max() < 30          # 0.3 of 50, of those with three items
    assert ((data.part == NEW) == torch.isin(data.user, held)).all()
    others = data.part != NEW
    assert torch.equal(data.part[others], before.part[others])
    for name, part in (("history", TRAIN), ("test", TEST)):
        rows = (before.part == part) & torch.isin(before.user, held)
        wanted = set(zip(before.user[rows].tolist(), before.item[rows].tolist()))
        assert set(zip(*new[name].tolist())) == wanted
    time = {(u, i): t for u, i, t in zip(before.user.tolist(), before.item.tolist(), before.time.tolist())}
    for u in held.tolist():
        mine = [time[u, i] for v, i in new["history"].T.tolist() if v == u]
        assert mine == sorted(mine) and len(mine) > 3
    again, other = load(), load()
    assert torch.equal(train.hold_out_users(again, 0.3, 1)["history"], new["history"])
    assert not torch.equal(train.hold_out_users(other, 0.3, 2)["history"], new["history"])
    assert [x.shape for x in train.hold_out_users(load(), 0.0, 1).values()] == [(2, 0)] * 3
    train.hold_out_users(other := load(), 1.0, 1)
    # two are left whom training can learn from
    assert len(other.user[other.part != NEW].unique()) == 22


def test_new_users_of_a_run_are_unknown_to_its_graph(run):
    new = set(run.new["history"][0].tolist())
    assert len(new) == 4 and not new & set(run.liked[0].tolist())
    degree = run.model.graph.row_ptr.diff()
    assert all(degree[u] == 0 for u in new) and sorted(new | set(run.users.tolist())) == list(range(40))


def test_new_users_can_be_generated_for_once_the_run_is_done(run):
    user, item = run.new["history"]
    histories = [[run.data.item_ids[i] for i in item[user == u].tolist()] for u in user.unique()]
    for m, tokens in run.model.fold_in(histories).items():
        assert torch.equal(run.model.user_tokens(user.unique())[m], tokens)
        assert run.model.modality[m].preference[user.unique()].norm(dim=1).min() > 0


def test_pairs_are_test_interactions_with_another_user(run):
    pairs = train.draw_pairs(run, TEST, 25)
    known = set(zip(*torch.stack(run.data.pairs(TEST)).tolist()))
    drawn = list(zip(pairs.user.tolist(), pairs.item.tolist()))
    assert len(set(drawn)) == 25 and set(drawn) <= known
    assert (pairs.user != pairs.other).all() and set(pairs.other.tolist()) <= set(run.users.tolist())
    everybody = train.draw_pairs(run, TRAIN, 10**6)
    assert len(everybody.user) == run.liked.shape[1]
    assert set(everybody.other.tolist()) == set(run.users.tolist())
    assert (everybody.user != everybody.other).all()


def pictures(content):
    return [x.tobytes() for x in content.images.numpy()]


def test_variants_are_what_their_names_say(run, smoke):
    pairs = train.draw_pairs(run, TEST, 12)
    swapped = pairs._replace(user=pairs.other, other=pairs.user)

    def made(variant, pairs=pairs):
        return train.make(run, variant, pairs, torch.Generator().manual_seed(1))
    null = made("unpersonalized")
    for side in ("own", "other"):
        assert pictures(getattr(null, side)) == pictures(getattr(made("unpersonalized", swapped), side))
    assert pictures(null.own) != pictures(null.other)
    before, after, best = made("before_reward"), made("after_reward"), made("best_of")
    assert pictures(before.own) != pictures(after.own) != pictures(best.own)
    assert pictures(after.own) != pictures(made("after_reward", swapped).own)
    assert not torch.equal(after.own.tokens, after.again)
    tables = {m: getattr(run.model, m).preference.weight for m in MODALITIES}
    final = read_checkpoint(smoke / "checkpoint.pt")["model"]
    # they are back
    assert all(torch.equal(table, final[f"{m}.preference.weight"]) for m, table in tables.items())


def test_real_pairs_are_new_to_the_judge_beside_one_that_the_user_does_not_like(run):
    everything = train.draw_pairs(run, TRAIN, 10**6)
    made = train.make_real(run, everything, torch.Generator().manual_seed(2))
    texts, likes = run.tokens.tolist(), {tuple(pair) for pair in run.pairs().T.tolist()}
    judged_texts = {tuple(row) for row in run.tokens[run.learns["judge"]].tolist()}
    images = {x.tobytes(): n for n, x in enumerate(train.to_float(run.images).numpy())}
    assert 30 < len(made.pairs.user) < len(everything.user)
    again = 0
    for n, (user, item) in enumerate(zip(made.pairs.user.tolist(), made.pairs.item.tolist())):
        assert made.own.tokens[n].tolist() == texts[item] and tuple(texts[item]) not in judged_texts
        other = images[made.other.images[n].numpy().tobytes()]
        assert other != item and (user, other) not in likes and run.topic[other] == run.topic[item]
        assert made.other.tokens[n].tolist() == texts[other] and tuple(texts[other]) not in judged_texts
        if made.again[n].any():
            again += 1
            assert any(texts[i] == made.again[n].tolist() and run.topic[i] == run.topic[item] and i != item
                       for u, i in likes if u == user)
    assert again > 10


class PerfectReferee(nn.Module):
    """Knows each picture of the catalogue."""

    def __init__(self, run):
        super().__init__()
        self.known = {x.tobytes(): row for x, row in zip(train.to_float(run.images).numpy(), run.world.items)}

    def read(self, pictures):
        return torch.tensor(np.stack([self.known[x.tobytes()][:4] for x in pictures.numpy()]))


@pytest.fixture
def exact(run, monkeypatch):
    """exact_measures of contents for pairs, by a referee that never errs."""
    monkeypatch.setitem(run.modules._modules, "referee", PerfectReferee(run))
    return lambda pairs, content: train.exact_measures(run, pairs.user, pairs.item, content)


def test_real_items_are_right_and_useful_as_the_tastes_say(run, exact):
    pairs = train.draw_pairs(run, TEST, 30)
    found = exact(pairs, train.contents(run, pairs.item))
    for name in ("prompt_image", "prompt_text", "consistency", "grammatical"):
        assert found[name].all(), name
    for n, (user, item) in enumerate(zip(pairs.user.tolist(), pairs.item.tolist())):
        value = dict(zip(ATTRIBUTES, run.world.items[item]))
        for m, attributes in (("image", ("setting", "colour", "pattern")), ("text", ("setting", "tone"))):
            likings = [run.world.tastes[a][user][value[a]] / max(run.world.tastes[a][user])
                       for a in attributes]
            assert math.isclose(found[f"utility_{m}"][n], sum(likings) / len(likings), rel_tol=1e-6)


def test_a_wrong_picture_or_text_lowers_the_right_measure_and_no_other(run, exact):
    pairs, world = train.draw_pairs(run, TEST, 1), run.world.items
    item = int(pairs.item[0])
    right = exact(pairs, train.contents(run, pairs.item))

    def with_other(same, different):
        """An item that shares some attributes and differs in others."""
        names = list(ATTRIBUTES)
        fits = [n for n, row in enumerate(world)
                if all(row[names.index(a)] == world[item][names.index(a)] for a in same)
                and all(row[names.index(a)] != world[item][names.index(a)] for a in different)]
        return torch.tensor(fits[:1])

    def lowered(images=None, texts=None, tokens=None):
        content = train.contents(run, pairs.item)
        if images is not None:
            content = content._replace(images=train.contents(run, images).images)
        if texts is not None or tokens is not None:
            content = content._replace(tokens=run.tokens[texts] if tokens is None else tokens)
        found = exact(pairs, content)
        return {name for name in found if found[name] != right[name]}
    subject, setting = with_other(("setting",), ("subject", "colour")), with_other(("subject",), ("setting",))
    assert lowered(images=subject) - {"utility_image"} == {"prompt_image", "consistency"}
    assert lowered(images=setting) == {"consistency", "utility_image"}
    assert lowered(texts=with_other(("setting", "tone"), ("subject",))) == {"prompt_text", "consistency"}
    assert lowered(texts=with_other(("subject", "tone"), ("setting",))) == {"consistency", "utility_text"}
    assert lowered(texts=with_other(("subject", "setting"), ("tone",))) == {"utility_text"}
    garbage, _ = run.model.tokenizer.encode_batch(["no such sentence"], 40)
    assert lowered(tokens=garbage) == {"prompt_text", "consistency", "utility_text", "grammatical"}


def test_scorer_and_judge_share_no_item_no_text_no_parameter_and_no_seed(spare, monkeypatch):
    items, drawn, generators, fit = spare.learns, {}, [], train.fit
    halves = [set(items[name].tolist()) for name in ("scorer", "judge")]
    assert not halves[0] & halves[1] and halves[0] | halves[1] == set(spare.seen.tolist())
    texts = [{spare.data.texts[i] for i in half} for half in halves]
    assert not texts[0] & texts[1] and abs(len(texts[0]) - len(texts[1])) <= 1
    fresh = {n for n, text in enumerate(spare.data.texts) if text not in texts[1]}
    assert fresh == set(spare.fresh.nonzero()[:, 0].tolist())

    class Watched:
        """Rows of a tensor, and who asked for them."""

        def __getitem__(self, rows):
            drawn.setdefault(spare.stage, set()).update(rows.tolist())
            return tokens[rows]

    def watched_fit(run, *args, **kwargs):
        run.tokens = Watched()
        fit(run, *args, **kwargs)
        run.tokens = tokens
    monkeypatch.setattr(train, "fit", watched_fit)
    original = train.Run.generator
    monkeypatch.setattr(train.Run, "generator", lambda self, stage, step=0: (
        generators.append((stage, step, (g := original(self, stage, step)).initial_seed())), g)[1])
    tokens, modules = spare.tokens, {"scorer": spare.model.scorer, "judge": spare.modules["judge"]}
    before = {name: hashes(module) for name, module in modules.items()}
    for name in modules:
        spare.stage, spare.step = name, 0
        train.train_scorer(spare)
        changed = {n for n, module in modules.items() if hashes(module) != before[n]}
        assert changed == ({"scorer"} if name == "scorer" else {"scorer", "judge"})
    assert drawn["scorer"] <= halves[0] and drawn["judge"] <= halves[1]
    assert all(len(d) > 20 for d in drawn.values())
    seeds = [{seed for stage, _, seed in generators if stage == name} for name in modules]
    assert len(seeds[0]) == len(seeds[1]) >= 20 and not seeds[0] & seeds[1]
    places = [{p.data_ptr() for p in module.parameters()} for module in modules.values()]
    assert not places[0] & places[1]


def test_scorer_and_judge_start_differently(run):
    new = train.Run(run.cfg, replace(run.train, new_users=0), run.data, run.world, run.out, run.device)
    for name, value in new.model.scorer.named_parameters():
        if value.ndim > 1:
            assert not torch.equal(value, dict(new.modules["judge"].named_parameters())[name]), name


# ---- the reward changes two tables

TABLES = {f"model.{m}.preference.weight" for m in MODALITIES}


def before_reward(run):
    """Back to where the reward stage begins; a code that nobody has: row 15 of each table."""
    for m in MODALITIES:
        getattr(run.model, m).preference.weight.data.copy_(run.tables[m])
    run.stage, run.step = "reward", 0


def changed_by_reward(run):
    before = hashes(run.modules)
    train.train_reward(run)
    after = hashes(run.modules)
    return {name for name in before if before[name] != after[name]}


def test_the_reward_changes_the_two_tables_and_no_other_bit(spare, smoke):
    before_reward(spare)
    assert changed_by_reward(spare) == TABLES
    final = read_checkpoint(smoke / "checkpoint.pt")["model"]
    for name in TABLES:     # and as the run in another process did
        assert torch.equal(spare.modules.state_dict()[name], final[name.removeprefix("model.")])
    assert all(p.requires_grad for p in spare.model.parameters())


def test_rows_that_nobody_has_stay_to_the_bit_and_weight_decay_would_be_caught(spare, monkeypatch):
    spare.cfg = replace(spare.cfg, reward=replace(spare.cfg.reward, rounds=2, log_every=9))
    monkeypatch.setattr(train, "watch", lambda run: run.note(run.step, valid_consistency=0))

    def moved():
        before_reward(spare)
        for m in MODALITIES:
            spare.model.modality[m].tokens[:, 1].clamp_(max=6)
        changed = changed_by_reward(spare)
        unused = [not torch.equal(getattr(spare.model, m).preference.weight[15], spare.tables[m][15])
                  for m in MODALITIES]
        return changed == TABLES, any(unused)
    assert moved() == (True, False)
    def decaying(parameters):
        return lambda tables, cfg: torch.optim.AdamW(parameters or tables.values(), lr=0.01, weight_decay=0.1)
    monkeypatch.setattr(train, "token_optimizer", decaying(None))
    assert moved() == (True, True)
    monkeypatch.setattr(train.DPPMG, "requires_grad_", lambda model, _: nn.Module.requires_grad_(model, True))
    monkeypatch.setattr(train, "token_optimizer", decaying(list(spare.model.parameters())))
    assert moved() == (False, True)


# ---- every training step waits for nothing

class OneStep(Exception):
    """A training step has been made."""


@pytest.mark.parametrize("stage", [s for s in train.STAGES if s not in ("features", "evaluation")])
def test_training_steps_never_look_at_a_number(spare, monkeypatch, stage):
    """On the meta device there is none: .item(), boolean masks, shapes that depend on data raise there."""
    def one_step(run, optimizer, steps, losses, schedule=None, after=None, **_):
        parts = losses(None)
        parts["loss"].backward()
        optimizer.step()
        if after:
            after(0)
        assert all(value.is_meta for value in parts.values())
        assert any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        raise OneStep
    adamw = torch.optim.AdamW
    monkeypatch.setattr(train, "fit", one_step)
    monkeypatch.setattr(train, "watch", lambda run: None)
    monkeypatch.setattr(train, "draw", lambda n, size, _: torch.randint(n, (size,), device="meta"))
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **options: adamw(*args, **options))
    monkeypatch.setattr(train.Run, "generator", lambda *_: None)
    spare.modules.to("meta")
    spare.model.to("meta")
    spare.device = torch.device("meta")
    for name in ("tokens", "images", "prompt", "liked", "seen", "users"):
        setattr(spare, name, getattr(spare, name).to("meta"))
    spare.learns = {name: item.to("meta") for name, item in spare.learns.items()}
    spare.model.catalogue.max_tokens = 8        # longer texts are asked now and then whether all have ended
    spare.tables = {m: table.to("meta") for m, table in spare.tables.items()}
    spare.stage, spare.step, spare.train = stage, 0, TrainConfig(referee_pictures=16)
    with pytest.raises(OneStep):
        train.STAGES[stage](spare)


# ---- the loop

def toy_stage(run, stop_at=None, steps=20):
    """A stage that fits a small layer; an interrupt comes within step `stop_at`."""
    net = run.modules["toy"]

    def losses(generator):
        x = torch.randn(8, 4, generator=generator)
        run.interrupted = run.step == stop_at
        return {"loss": (net(x) - x.flip(1)).square().mean(), "size": net.weight.square().sum()}
    train.fit(run, train.adamw(net, 0.05, 0.1), steps, losses)


def test_twenty_steps_are_ten_and_ten_after_a_restart(smoke, tmp_path):
    runs = [reopen(smoke, tmp_path / name) for name in ("whole", "begun", "resumed")]
    for run in runs:
        torch.manual_seed(0)
        run.modules["toy"], run.stage, run.step, run.log = nn.Linear(4, 4), "toy", 0, []
    whole, begun, resumed = runs
    toy_stage(whole)
    with pytest.raises(KeyboardInterrupt):
        toy_stage(begun, stop_at=9)
    shutil.copy(begun.out / "checkpoint.pt", resumed.out)
    resumed.restore()
    assert (resumed.stage, resumed.step) == ("toy", 10)
    toy_stage(resumed)
    assert hashes(whole.modules) == hashes(resumed.modules) and whole.log == resumed.log
    assert len(whole.log) == 2 * 20
    fresh = [row for row in whole.log if row[2] == "loss"]
    assert fresh[-1][3] < 0.7 * fresh[0][3]         # it learns, too


@pytest.mark.parametrize("what, message", [
    ("loss", "stage toy, step 3: loss is not finite; .* lower learning rate"),
    ("gradient", "stage toy, step 3: gradient is not finite"),
    ("parameter", "stage toy, step 3: toy.1.weight is not finite")])
def test_what_is_not_finite_stops_the_run_by_name_and_the_checkpoint_stays(spare, what, message):
    layers = (nn.Linear(2, 2, bias=False) for _ in range(3))
    spare.modules["toy"], spare.stage, spare.step = nn.Sequential(*layers), "toy", 0
    weight = spare.modules["toy"][1].weight

    def losses(_):
        loss = sum(p.square().sum() for p in spare.modules["toy"].parameters())
        if spare.step == 3:
            loss = {"loss": loss * math.nan, "gradient": loss + (0 * weight).abs().sqrt().sum(),
                    "parameter": loss}[what]
        return {"loss": loss}

    def after(step):
        if what == "parameter" and step == 2:
            weight.data[0, 1] = math.inf
            spare.save()
    spare.save()
    before = digest(spare.out)
    with pytest.raises(train.Diverged, match=message):
        train.fit(spare, train.adamw(spare.modules["toy"], 0.01), 9, losses, after=after)
    assert digest(spare.out) == before
    with pytest.raises(train.Diverged, match="is not finite; the last good checkpoint is kept"):
        weight.data.fill_(math.nan)
        spare.save()
    assert digest(spare.out) == before


def test_an_optimizer_of_another_stage_is_refused_by_name(spare):
    spare.modules["toy"], spare.stage, spare.step = nn.Linear(2, 2), "toy", 0
    spare.optimizer_state = {"state": {}, "param_groups": []}
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: its optimizer does not fit stage toy \(ValueError\)"):
        train.fit(spare, train.adamw(spare.modules["toy"], 0.01), 1, lambda generator: {})


# ---- what a run leaves

VARIANTS = set(train.VARIANTS)
JUDGED = {"judge_variety_image", "judge_variety_text", "judge_consistency_repaired", "judge_swap_image", "judge_swap_text", "judge_consistency", "judge_prompt_image",
          "judge_prompt_text", "frechet_image", "copied"}
EXACT = {"prompt_image", "prompt_text", "consistency", "utility_image", "utility_text", "grammatical",
         "swap_image", "swap_text", "consistency_repaired", "consistency_bound", "variety_image",
         "variety_text", "taste_image", "taste_text"}


def intervals(value):
    """All dicts of mean, low and high within."""
    if isinstance(value, dict) and "mean" in value:
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from intervals(inner)


def test_a_run_leaves_its_files_and_says_what_it_did(smoke):
    assert {p.name for p in smoke.iterdir()} == {"config.json", "checkpoint.pt", "log.csv", "metrics.json",
                                                 "report.html", "stickers"}
    printed = (smoke.parent / "printed.txt").read_text()
    for stage in train.STAGES:
        assert re.search(rf"^{stage} +\d+\.\d s   \S.*$", printed, re.MULTILINE), stage
    config = json.loads((smoke / "config.json").read_text())
    assert config["settings"]["gnn"]["steps"] == 30 and config["data"] is None
    assert len(config["fingerprint"]) == 64
    assert config["machine"] == train.machine(torch.device("cpu")) | {"threads": 1}


def test_metrics_are_those_of_the_design(smoke):
    found = json.loads((smoke / "metrics.json").read_text(),
                       parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert {"dataset", "seed", "device", "threads", "seconds", "cpu_seconds", "peak_memory_mb", "stage1",
            "codebook", "generation"} <= set(found)
    assert (found["dataset"], found["seed"], found["device"], found["threads"]) == ("stickers", 0, "cpu", 1)
    for clock in ("seconds", "cpu_seconds"):
        times = found[clock]
        assert set(train.STAGES) <= set(times) and all(t >= 0 for t in times.values())
        assert math.isclose(times["total"], sum(t for stage, t in times.items() if stage != "total"),
                            abs_tol=0.2)
    assert 100 < found["peak_memory_mb"] < 3000
    names = {"recall@20", "ndcg@20", "recall@20_image", "recall@20_text", "recall@20_quantized"}
    assert names <= set(found["stage1"])
    for m in MODALITIES:
        health = found["codebook"][m]
        assert len(health["usage"]) == len(health["perplexity"]) == 2
        assert {"explained", "collision_rate"} <= set(health)
        assert all(0 < u <= 1 for u in health["usage"]) and all(1 <= p <= 8 for p in health["perplexity"])
    assert set(found["generation"]) == VARIANTS
    for variant, measured in found["generation"].items():
        assert JUDGED - {"frechet_image"} <= set(measured) | set() and set(measured) <= JUDGED | EXACT, variant
        known = {name: x["mean"] for name, x in measured.items() if x["mean"] is not None}
        assert all(0 <= x <= 1 + 1e-6 for name, x in known.items() if name != "frechet_image")
        assert set(known) >= EXACT - {"consistency_repaired", "consistency_bound", "variety_image", "variety_text"}
    assert set(found["differences"]) == (JUDGED | EXACT) - {"frechet_image"}
    before, after = (found["generation"][v]["utility_image"]["mean"] for v in ("before_reward", "after_reward"))
    assert math.isclose(found["differences"]["utility_image"]["mean"], after - before, abs_tol=1e-9)
    assert all(x["low"] <= x["mean"] + 1e-9 and x["mean"] <= x["high"] + 1e-9 for x in intervals(found)
               if x["low"] is not None)
    real, null = found["generation"]["real"], found["generation"]["unpersonalized"]
    assert real["prompt_text"]["mean"] == real["grammatical"]["mean"] == 1 and real["copied"]["mean"] > 0.7
    for m in MODALITIES:        # nobody's tokens: chance, within five times its 95 % interval
        swap = null[f"swap_{m}"]
        assert abs(swap["mean"] - 0.5) <= 5 * (swap["high"] - swap["mean"])
    assert {"1", "2", "5", "10", "whole history", "in training"} == set(found["new_users"])


def test_the_log_can_be_read(smoke):
    with open(smoke / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {"stage", "step", "name", "value"}
    assert all(math.isfinite(float(row["value"])) and int(row["step"]) >= 0 for row in rows)
    assert {row["stage"] for row in rows} == set(train.STAGES) - {"features", "evaluation"}
    reward = {row["name"] for row in rows if row["stage"] == "reward"}
    assert {"consistency", "s_image", "s_text", "kl_image", "kl_text", "valid_consistency",
            "valid_utility_image"} <= reward


class Page(html.parser.HTMLParser):
    """Tags, attributes and words of a page; fails where a tag is closed that is not open."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br", "path", "polyline", "html", "body"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in ("html", "body"):
            assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        self.words.append(data)

    def handle_comment(self, data):
        pytest.fail(f"a comment: {data}")


def check_harmless(page):
    """No code, no reference to anything outside of the page."""
    assert not page.open
    harmless = ("html meta title style body h1 h2 h3 p br small section details summary table thead tr th td "
                "img figure figcaption svg text path polyline")
    assert set(page.tags) <= set(harmless.split())
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("href", "srcdoc", "action", "data", "formaction"), name
        assert name != "src" or re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", value)
        assert name != "style" or "url" not in value


def test_the_builders_of_the_report_escape_what_they_are_given():
    evil, safe = '<b>"&', "&lt;b&gt;&quot;&amp;"
    cell = {"mean": 0.5, "low": 0.25, "high": 0.75}
    found = (train.table([evil], [[evil, 0.5, cell]]), train.curves(evil, {evil: [(0, 1), (1, 2)]}),
             train.picture(torch.zeros(3, 8, 8), evil))
    assert all(evil not in page and page.count(safe) == n for page, n in zip(found, (2, 2, 1)))
    assert "<td>0.500</td><td>0.500 [0.250, 0.750]</td>" in found[0]
    assert train.curves("one point", {"a": [(0, 1)]}) == ""
    assert safe in train.table([], [["<figure>" + evil]]) and found[2] in train.table([], [[found[2]]])


def test_the_report_is_one_harmless_file(smoke):
    page = Page(smoke / "report.html")
    check_harmless(page)
    source = (smoke / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|file:|<script|@import|url\(", source)
    assert page.tags.count("h3") == 8 and page.tags.count("svg") > 8
    assert page.tags.count("img") > 64 + 8 * 9
    assert ("name", "viewport") in page.attributes
    words = " ".join(page.words)
    for name in JUDGED | EXACT | {"recall@20", "usage", "Likes:", "after less before", "u00"}:
        assert name in words, name


# ---- interrupted, hostile, killed

HOSTILE = ['<script>alert("x")</script>', "</title><img src=x onerror=alert(1)>", "a & b &amp; 'c' \"d\"",
           "<!-- http://evil.example -->",
           "</td></table><b>\u202eabc", "{} %s \\ ${x} 100 %"]


def hostile_folder(folder):
    """14 users and 30 items whose ids, texts and prompts want to be HTML."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    names = [re.sub(r"[/\\]", "|", HOSTILE[n % 6])[:40] + str(n) for n in range(30)]
    for n, name in enumerate(names):
        Image.fromarray(rng.integers(0, 256, (12, 9, 3), np.uint8)).save(folder / "images" / f"{name}.png")
    with open(folder / "items.csv", "w", newline="", encoding="utf-8") as file:
        rows = [[name, f"{HOSTILE[n % 5]} {n % 7}", HOSTILE[n % 4]] for n, name in enumerate(names)]
        csv.writer(file).writerows([["item", "text", "prompt"], *rows])
    with open(folder / "interactions.csv", "w", newline="", encoding="utf-8") as file:
        rows = [[f"{HOSTILE[u % 6]}{u}", names[i]] for u in range(14) for i in rng.permutation(30)[:12]]
        csv.writer(file).writerows([["user", "item"], *rows])


def interrupt_at(monkeypatch, stage, step):
    """Ctrl-C when the randomness of this step is asked for."""
    original = train.Run.generator

    def generator(self, *args):
        if (args + (0,))[:2] == (stage, step):
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)
    monkeypatch.setattr(train.Run, "generator", generator)


def test_ctrl_c_saves_and_says_how_to_go_on_and_a_hostile_folder_harms_nothing(tmp_path, capsys, monkeypatch):
    data, out = tmp_path / "<b>&'data'", tmp_path / "run"
    hostile_folder(data)
    arguments = ["--smoke", "--data", data, "--out", out]
    for stage, step in (("gnn", 3), ("evaluation", 0)):
        with monkeypatch.context() as patch:
            interrupt_at(patch, stage, step)
            assert main(*arguments) == 130
        printed, errors = capsys.readouterr()
        assert errors == f"interrupted; go on with: python train.py --resume --out {out}\n"
        saved = read_checkpoint(out / "checkpoint.pt")
        assert (saved["stage"], saved["step"]) == ((stage, step + 1) if stage == "gnn" else ("reward", 4))
        assert saved["done"] == list(train.STAGES)[:list(train.STAGES).index(stage)]
        arguments = ["--resume", "--out", out]
    assert main(*arguments) == 0
    printed, errors = capsys.readouterr()
    assert errors == "" and "evaluation" in printed and "autoencoder" not in printed
    found = json.loads((out / "metrics.json").read_text())
    assert all(set(measured) <= JUDGED for measured in found["generation"].values())
    assert set(found["generation"]["after_reward"]) == JUDGED - {"frechet_image"}       # of too few pairs
    assert found["dataset"] == data.name
    page = Page(out / "report.html")
    check_harmless(page)
    source = (out / "report.html").read_text(encoding="utf-8")
    seen = " ".join(page.words + [value for _, value in page.attributes if value])
    assert "<script" not in source and "<b>" not in source and "onerror=alert(1)>" not in source
    for text in (*HOSTILE[:4], data.name):
        assert text in seen, text


def test_runs_that_differ_are_told_apart(smoke, tmp_path):
    """The comparison of kill_resume.py sees a single bit, a missing row of the log, a file that was left."""
    def flip(name):
        """Flip the lowest bit of one number."""
        checkpoint = read_checkpoint(copy / "checkpoint.pt")
        checkpoint["model"][name].view(torch.int32).view(-1)[5:6].bitwise_xor_(1)
        torch.save(checkpoint, copy / "checkpoint.pt")
    copy = tmp_path / "copy"
    score = 'recall@20": 0'
    changes = {"checkpoint/model/text.null": lambda: flip("text.null"),
               "checkpoint/model/modality.image.tokens": lambda: flip("modality.image.tokens"),
               "metrics/stage1/recall@20": lambda: alter(copy / "metrics.json", score, score[:-1] + "1"),
               "log": lambda: alter(copy / "log.csv", "gnn,30", "gnn,31"),
               "files": lambda: (copy / ".checkpoint.pt.1.tmp").write_text("")}
    for name, change in changes.items():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(smoke, copy, ignore=shutil.ignore_patterns("s0*.png"))
        assert differences(smoke, copy) == []
        change()
        assert all(found.startswith(name) for found in differences(smoke, copy)), name
        assert differences(smoke, copy)


def alter(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# ---- mistakes

@pytest.mark.parametrize("arguments, message", [
    (["--gnn-lrr", "1"], "unknown flag --gnn-lrr: known are --gnn-lr"),
    (["--gnn-lr", "nan"], "--gnn-lr nan: need a finite float >= 0"),
    (["--image-size", "33"], "--image-size 33: need a multiple of 8"), (["--items", "1"], "--items 1: need a finite int >= 16"),
    (["--image-eta", "0"], "--image-eta 0.0: need > 0, or --reward-rounds 0"),
    (["--reward-lambda-c", "inf"], "--reward-lambda-c inf"),
    (["--text-width", "x"], "invalid int value: 'x'"), (["--new-users", "nan"], "--new-users nan"),
    (["--interactions", "1000"], "--interactions 1000"), (["--seed", "-1"], "--seed -1"),
    (["--checkpoint-seconds", "inf"], "--checkpoint-seconds inf"),
    (["--device", "gpu"], "--device gpu: not to be had here"),
    (["--data", "nowhere"], "nowhere: does not exist"),
    (["--resume"], "--resume: name a run that was begun, with --out"),
    (["--resume", "--out", "nowhere"], "name a run that was begun"),
    (["--out", "file"], "--out file: exists and is not a run"),
    (["--out", "file/below"], "file/below"), (["--out", "full"], "--out full: exists and is not a run"),
    (["--out", "odd"], "odd/config.json: not the settings of a run"),
    (["--resume", "--out", "odd"], "odd/config.json: not the settings"),
    (["--pairs", "2"], "--pairs 2: need a finite int >= 20"), (["stray"], "stray")])
def test_a_mistake_costs_one_line_and_writes_nothing(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    for name, file in (("full", "letter.txt"), ("odd", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text('{"settings": 3}')
    before = digest(tmp_path)
    assert main("--smoke", *arguments) == 2
    printed, errors = capsys.readouterr()
    assert errors.count("\n") == 1 and errors.startswith("train.py: error: ") and message in errors
    assert digest(tmp_path) == before and sorted(os.listdir(tmp_path)) == ["file", "full", "odd"]


@pytest.mark.parametrize("group, name", [(group, name) for group, name, field, _ in train.settings(train.PARTS)
                                         if isinstance(field.default, float)])
def test_no_setting_may_be_nan_or_infinite(tmp_path, capsys, monkeypatch, group, name):
    monkeypatch.chdir(tmp_path)
    for value in ("nan", "inf", "-inf", "1e999"):
        assert main("--smoke", f"{train.flag_of(group, name)}={value}") == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and f"{train.flag_of(group, name)} {float(value)}: need" in errors
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments, message", [
    (["--smoke"], "this run is finished; choose another"), (["--resume"], "this run is finished"),
    (["--smoke", "--gnn-steps", "31"], "finished|other settings")])
def test_a_finished_run_is_not_touched(smoke, capsys, arguments, message):
    before = digest(smoke)
    assert main(*arguments, "--out", smoke) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and re.search(message, errors) and digest(smoke) == before


@pytest.mark.parametrize("arguments, message", [
    (["--smoke", "--gnn-steps", "31"], r"holds a run with other settings \(--gnn-steps\)"),
    ([], "other settings"),
    (["--resume", "--text-lr", "0.5"], r"other settings \(--text-lr\)"),
    (["--resume", "--data", "."], r"\(--data\)")])
def test_another_configurations_run_is_not_touched(spare, capsys, arguments, message):
    before = digest(spare.out)
    assert main(*arguments, "--out", spare.out) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and re.search(message, errors) and digest(spare.out) == before


def test_data_that_changed_since_is_noticed(spare, capsys):
    alter(spare.out / "stickers" / "interactions.csv", "u000,s", "u001,s")
    assert main("--resume", "--out", spare.out) == 2
    assert "the data has changed since this run began" in capsys.readouterr().err


def test_settings_that_were_edited_into_nonsense_cost_one_line(spare, capsys):
    config = json.loads((spare.out / "config.json").read_text())
    for group, value in (("gnn", config["settings"]["gnn"] | {"dim": "wide"}), ("gnn", 3), ("vq", {})):
        settings = config["settings"] | {group: value}
        (spare.out / "config.json").write_text(json.dumps(config | {"settings": settings}))
        assert main("--resume", "--out", spare.out) == 2
        assert re.fullmatch("train.py: error: .*config.json: not the settings of a run.*\n",
                            capsys.readouterr().err)


@pytest.mark.parametrize("name, value", [("model", 3), ("others", 3), ("others", {"judge": {}}),
                                         ("tables", None), ("done", None)])
def test_a_checkpoint_of_something_else_does_not_fit(spare, name, value):
    path = spare.out / "checkpoint.pt"
    checkpoint = read_checkpoint(path)
    del checkpoint[name]
    torch.save(checkpoint if value is None else checkpoint | {name: value}, path)
    with pytest.raises(CheckpointError, match="checkpoint.pt: not of this run"):
        spare.restore()


def full_disk(monkeypatch, name):
    """The file of that name is written where no space is left."""
    @contextlib.contextmanager
    def replacing(path):
        with original(path) as temporary:
            if re.fullmatch(name, path.name):
                temporary.symlink_to("/dev/full")
            yield temporary
    original = train.replacing
    monkeypatch.setattr(train, "replacing", replacing)


@pytest.mark.parametrize("name", ["checkpoint.pt", "log.csv", "report.html", "metrics.json", "config.json"])
def test_a_full_disk_costs_one_line_and_the_earlier_files_stay(spare, capsys, monkeypatch, name):
    spare.done.remove("evaluation")
    spare.save()
    before = digest(spare.out)
    monkeypatch.setitem(train.STAGES, "evaluation", lambda run: "skipped")
    def write_report(run):
        with train.replacing(run.out / "report.html") as path:
            path.write_text("short")
    monkeypatch.setattr(train, "write_report", write_report)
    full_disk(monkeypatch, name)
    assert main("--resume", "--out", spare.out) == 2
    errors, after = capsys.readouterr().err, digest(spare.out)
    assert errors.count("\n") == 1 and re.search("No space left on device|is the disk full", errors)
    assert after.get(name) == before.get(name) and set(after) == set(before)     # no *.tmp, no metrics.json
    if name in ("config.json", "checkpoint.pt"):
        assert after == before
    monkeypatch.undo()
    reopened = train.open_run(*train.parse_arguments(["--resume", "--out", str(spare.out)]))
    reopened.restore()


@pytest.mark.parametrize("name", ["config.json", "s0007.png", "items.csv", "interactions.csv"])
def test_a_disk_that_is_full_from_the_start_leaves_what_can_be_resumed_or_nothing(tmp_path, capsys, monkeypatch, name):
    full_disk(monkeypatch, name)
    arguments = ["--smoke", "--items", "24", "--users", "4", "--interactions", "10", "--out", tmp_path / "run"]
    assert main(*arguments) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "No space left on device" in errors
    assert not list(tmp_path.rglob(".*")) and not list(tmp_path.rglob(name))
    monkeypatch.undo()
    if name != "config.json":
        run = train.open_run(*train.parse_arguments(["--resume", "--out", str(tmp_path / "run")]))
        assert len(list((run.out / "stickers" / "images").iterdir())) == 24


@pytest.fixture
def nobody():
    """Root may write anywhere: for a while, we are not root."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


@pytest.mark.parametrize("out", ["run", "new/run", "."])
def test_a_read_only_out_costs_one_line(tmp_path_factory, capsys, nobody, out):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o500)
        assert main("--smoke", "--out", Path(folder) / out) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and "Permission denied" in errors and os.listdir(folder) == []
        os.chmod(folder, 0o700)


def test_a_run_whose_folder_became_read_only_stays_as_it_is(smoke, capsys):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        out = Path(folder) / "run"
        shutil.copytree(smoke, out, ignore=shutil.ignore_patterns("metrics.json"))
        before = digest(out)
        for path in (Path(folder), *out.rglob("*"), out):
            path.chmod(0o555 if path.is_dir() else 0o444)
        root = os.geteuid() == 0
        os.seteuid(65534 if root else os.geteuid())
        try:
            assert main("--resume", "--out", out) == 2
        finally:
            os.seteuid(0 if root else os.geteuid())
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and "Permission denied" in errors and digest(out) == before
        for path in (Path(folder), out, *out.rglob("*")):
            path.chmod(0o755)


def test_too_little_data_is_refused_before_anything_is_learnt(tmp_path, capsys):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for item in "abcdef":
        Image.new("RGB", (8, 8), "red").save(data / "images" / f"{item}.png")
    (data / "items.csv").write_text("item,text\n" + "".join(f"{i},item {i}\n" for i in "abcdef"))
    likes = "".join(f"{user},{item}\n" for user in "xy" for item in "abcdef")
    (data / "interactions.csv").write_text("user,item\n" + likes)
    assert main("--smoke", "--data", data, "--out", tmp_path / "run") == 2
    assert "2 users to test on (need 3)" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_users_who_are_all_alike_are_an_oddity_that_works(tmp_path):
    """The same 20 of 40 items, in the same order: one taste, which all have learnt by heart; tokens mostly collide."""
    data, rng = tmp_path / "data", np.random.default_rng(0)
    (data / "images").mkdir(parents=True)
    for n in range(40):
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(data / "images" / f"i{n}.png")
    (data / "items.csv").write_text("item,text,prompt\n" + "".join(f"i{n},thing {n},p{n % 2}\n" for n in range(40)))
    likes = "".join(f"u{u},i{n},{n}\n" for u in range(20) for n in range(20))
    (data / "interactions.csv").write_text("user,item,timestamp\n" + likes)
    assert main("--smoke", "--data", data, "--out", tmp_path / "run") == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["stage1"]["recall@20"] == 1
    assert all(health["collision_rate"] > 0.5 for health in found["codebook"].values())
    for variant, measured in found["generation"].items():
        assert all(math.isfinite(v["mean"]) for v in measured.values()), variant


def test_a_diverged_run_names_stage_and_step_and_leaves_a_checkpoint_that_loads(tmp_path, capsys):
    few = [x for name in ("image-ae", "gnn", "vq") for x in (f"--{name}-steps", "2")]
    out = tmp_path / "run"
    status = main("--smoke", "--items", "40", "--users", "8", "--interactions", "10", *few,
                  "--text-lr", "1e30", "--checkpoint-seconds", "0", "--out", out)
    errors = capsys.readouterr().err
    assert status == 1 and errors.count("\n") == 1
    assert re.match(r"train.py: error: stage text, step 1: \S+ is (nan|inf|not finite)", errors), errors
    saved = read_checkpoint(out / "checkpoint.pt")
    assert saved["done"] == ["autoencoder", "features", "gnn", "codebook"]
    assert all(x.isfinite().all() for x in saved["model"].values())


def test_help_names_every_setting(capsys):
    assert main("--help") == 0
    words = capsys.readouterr().out
    for group, name, field, text in train.settings(train.PARTS):
        assert re.search(rf"^  {train.flag_of(group, name)}\b", words, re.MULTILINE), name
        assert text, f"{group}.{name} has no help"
    assert all(flag in words for flag in ("--data", "--out", "--resume", "--smoke", "--device", "--min-rating", "--drop-incomplete"))


def test_flags_reach_the_settings():
    flags = ["--gnn-dim", "12", "--seed", "3", "--no-bf16", "--text-width", "48", "--users", "9"]
    _, given = train.parse_arguments(flags)
    assert given["gnn"] == {"dim": 12} and given["method"] == {"seed": 3, "bf16": False}
    assert given["text"] == {"width": 48} and given["image"] == {} and given["train"] == {"users": 9}


# ---- two processes, and runs that moved

def test_a_folder_is_made_while_it_is_chosen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(train.new_folder("D")) for _ in range(3)] == ["runs/D", "runs/D-2", "runs/D-3"]
    assert sorted(os.listdir("runs")) == ["D", "D-2", "D-3"]


def test_a_lock_keeps_other_processes_out_and_stale_ones_are_recognized(tmp_path):
    other = spawn("-c", "input()", stdin=-1)
    (tmp_path / "lock").write_text(str(other.pid))
    with pytest.raises(ValueError, match=f"process {other.pid} trains in it; wait, or choose another --out"):
        train.lock(tmp_path)
    other.kill()
    other.wait()
    train.lock(tmp_path)
    assert (tmp_path / "lock").read_text() == str(os.getpid())
    train.lock(tmp_path)        # one's own is no other's
    (tmp_path / "lock").write_text("nonsense")
    train.lock(tmp_path)


def test_a_checkpoint_of_another_seed_is_refused(spare):
    checkpoint = read_checkpoint(spare.out / "checkpoint.pt")
    checkpoint["config"]["method"]["seed"] = 7
    torch.save(checkpoint, spare.out / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"not of this run \(another config\)"):
        spare.restore()
    checkpoint["config"]["method"]["seed"], checkpoint["fingerprint"] = 0, "0" * 64
    torch.save(checkpoint, spare.out / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"not of this run \(another fingerprint\)"):
        spare.restore()


def test_data_that_moved_is_known_by_its_content(spare, tmp_path):
    config = json.loads((spare.out / "config.json").read_text())
    moved = tmp_path / "moved"
    shutil.move(spare.out / "stickers", moved)
    (spare.out / "config.json").write_text(json.dumps(config | {"data": "/where/it/was"}))
    again = train.open_run(*train.parse_arguments(["--resume", "--out", str(spare.out), "--data", str(moved)]))
    assert again.data.fingerprint() == spare.data.fingerprint()
    assert json.loads((spare.out / "config.json").read_text())["data"] == str(moved)


def test_another_machine_is_said_in_one_line(spare, monkeypatch):
    monkeypatch.setattr(train, "machine", lambda device: {"torch": "another"})
    again = train.open_run(*train.parse_arguments(["--resume", "--out", str(spare.out)]))
    assert sum("the last bits may differ here" in notice for notice in again.data.notices) == 1


def test_numbers_that_do_not_exist_are_null(tmp_path):
    train.write_json(tmp_path / "x.json", {"a": [math.nan, 1.0], "b": {"c": math.inf}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.0], "b": {"c": None}}


def test_a_reader_who_has_gone_does_not_end_a_run():
    script = "import train\nfor n in range(20000): train.say('x' * 99)\nprint('done', file=train.sys.stderr)"
    process = spawn("-c", script, cwd=ROOT)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read().strip().endswith("done") and process.wait() == 0


def test_without_the_module_resource_everything_runs():
    script = "import sys\nsys.modules['resource'] = None\nimport train\nassert train.peak_memory_mb() is None"
    process = spawn("-c", script, cwd=ROOT)
    assert process.wait() == 0, process.stderr.read()


# ---- what has gone on meanwhile

def test_the_referee_reads_every_attribute_of_fresh_stickers_and_of_those_in_the_folder(processes, run):
    folder, begun = processes
    printed, errors = begun["referee"].communicate(timeout=300)
    assert begun["referee"].returncode == 0, errors
    referee = Referee()
    referee.load_state_dict(torch.load(folder / "run" / "referee.pt", weights_only=True))
    pictures, values = train.draw_batch(1000, np.random.default_rng(2026))
    for name, right in zip(SEEN, (referee.read(pictures) == values).double().mean(0)):
        assert right >= 0.99, f"{name}: {right:.1%}"
    large = torch.nn.functional.interpolate(pictures[:100], scale_factor=2, mode="nearest")
    assert torch.equal(referee.read(large), referee.read(pictures[:100]))
    written = referee.read(train.to_float(run.images)) == torch.from_numpy(run.world.items[:, :4])
    assert written.double().mean(0).min() > 0.97


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(processes):
    """So two runs of one seed do. tests/kill_resume.py kills at more moments, each in a run of its own."""
    chain = processes[1]["chain"]
    printed, errors = chain.communicate(timeout=300)
    assert chain.returncode == 0, printed + errors
    assert printed.count("the same bits") == 1 and printed.count(",") >= 7
