"""train.py's wiring: what each stage and each measure may see, by spies on a tiny run that is not
trained; slow versions of what is drawn and of what is measured; and whole runs on data without any
structure, where all is chance."""
import copy
import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import train
from dppmg import MODALITIES, NEW, TEST, TRAIN, VALID, Dataset, ReinforceStep
from generators import Tokenizer, sample_latents
from gnn import sample_triplets
from reward import RewardParts
from train import ATTRIBUTES, SEEN, Made, Pairs

TINY = """--smoke --items 120 --users 24 --interactions 20 --new-users 0.1 --pairs 24 --samples 6 --sampled-users 7
    --text-layers 1 --text-width 16 --text-context 40 --image-width 8 --image-heads 2 --gnn-dim 12 --vq-dim 8
    --vq-hidden 8 --image-sampling-steps 2 --reward-diffusion-steps 2 --best-of 3""".split()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A tiny run before its first stage."""
    out = tmp_path_factory.mktemp("tiny") / "run"
    return train.open_run(*train.parse_arguments([*TINY, "--out", str(out)]))


@pytest.fixture(scope="module")
def lively(begun):
    """As if trained: each network does something, each user has preferences and tokens of their own."""
    run, chance = copy.deepcopy(begun), rng()
    for parameter in run.modules.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=chance)
    latents = train.latents_of(run)
    for m, x in (("image", latents), ("text", run.tokens)):
        features = getattr(run.model, f"{m}_features")
        features.fit(x)
        run.model.gnn.set_features(m, features(x))
    who = torch.arange(24)
    for m, taste in run.model.modality.items():
        taste.preference.copy_(torch.randn(24, 12, generator=chance))
        n = (who + 29 * (m == "image")) % 64  # one user's in one modality are another's in the other
        taste.tokens.copy_(torch.stack([n // 8, n % 8], 1))
    run.tables = {m: torch.randn(w.shape, generator=chance) for m, w in tables(run).items()}
    run.metrics["stage1"] = {"recall@20": 0.25, "recall@20_quantized": 0.125}
    return run


@pytest.fixture
def run(lively):
    """A copy, to be changed."""
    return copy.deepcopy(lively)


def tables(run):
    return {m: getattr(run.model, m).preference.weight for m in MODALITIES}


def recorded(monkeypatch, place, name, answer=None):
    """The arguments of each call of a function from now on. What it gives stays, or is answer(...)."""
    calls, original = [], getattr(place, name)

    def call(*args, **kwargs):
        calls.append((*args, *kwargs.values()))
        return (answer or original)(*args, **kwargs)
    monkeypatch.setattr(place, name, call)
    return calls


def at_stage(run, stage, **settings):
    """The run where a stage begins, with some settings of it changed."""
    run.stage, run.step, run.log = stage, 0, []
    for group, values in settings.items():
        run.cfg = replace(run.cfg, **{group: replace(getattr(run.cfg, group), **values)})
    return run


def in_vain(monkeypatch, net):
    """A loss that nothing lowers, instead of the network's own; the arguments of each call."""
    return recorded(monkeypatch, net, "loss", lambda *_: 0 * sum(p.sum() for p in net.parameters()))


def pairs_of(run, *parts):
    """(user, item) of these parts of the data, as a set, by a loop over the interactions."""
    rows = zip(run.data.user.tolist(), run.data.item.tolist(), run.data.part.tolist())
    return {(user, item) for user, item, part in rows if part in parts}


def items_in(run, pictures):
    """Which items these pictures are; KeyError if one is of no item."""
    known = {x.tobytes(): i for i, x in enumerate(train.to_float(run.images).numpy())}
    assert len(known) == len(run.images)
    return [known[x.tobytes()] for x in pictures.numpy()]


def as_in_the_catalogue(run, variant, user, item, generator):
    """What is made for users and the prompts of items are the items themselves."""
    return train.contents(run, item)


def mark_texts(run):
    """From now on each item's text is a token that says which item it is."""
    run.tokens = torch.zeros(120, 40, dtype=torch.int64)
    run.tokens[:, 0], run.tokens[:, 1] = torch.arange(120) + 3, 2
    return run


def hashes(module):
    """A hash of every tensor."""
    return {name: hashlib.sha256(x.numpy().tobytes()).hexdigest() for name, x in module.state_dict().items()}


# ---- settings and stickers

@pytest.mark.parametrize("name, least, most", [
    ("items", 20, None), ("users", 6, None), ("referee_pictures", 16, None), ("pairs", 20, None),
    ("samples", 2, None), ("interactions", 10, 15), ("new_users", 0, 0.5), ("best_of", 1, None)])
def test_settings_may_be_the_least_and_the_most_that_works_but_nothing_beyond(name, least, most):
    """Of 30 stickers half may be liked; ten likes need 20 stickers."""
    begin = dict(items=30, interactions=10)
    for value in {least, least if most is None else most}:
        assert getattr(train.TrainConfig(**begin | {name: value}), name) == value
    for value in {least - 1, least - 1 if most is None else most + 1}:
        with pytest.raises(ValueError, match="need a finite"):
            train.TrainConfig(**begin | {name: value})


def test_a_ring_of_corners_takes_the_radii_in_turn_from_the_top_clockwise():
    corners = train._ring(2, 1, n=4, x=10, y=20)
    assert_close(corners, np.array([[10, 18], [11, 20], [10, 22], [9, 20.0]]))


def edges_of(corners):
    """Pairs of neighbouring corners of a polygon."""
    return list(zip(corners, np.roll(corners, -1, 0)))


def inside(x, y, corners):
    """Which points are within? A ray to the right crosses the edges an odd number of times."""
    odd = np.zeros(len(x), bool)
    for (x1, y1), (x2, y2) in edges_of(corners):
        if y1 != y2:
            odd ^= ((y1 > y) != (y2 > y)) & (x < x1 + (x2 - x1) * (y - y1) / (y2 - y1))
    return odd


def gap(x, y, start, end):
    """Distance of points from a line between two others."""
    (x1, y1), (dx, dy) = start, end - start
    along = np.clip(((x - x1) * dx + (y - y1) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - x1 - along * dx, y - y1 - along * dy)


def slow_sticker(value, x, y, centre, radius):
    """What is seen at points of a sticker of 32 x 32 pixels, (n, 3): a sky, before it a rim of 1.4
    pixels around each shape, before that the shapes, whose patterns repeat after 6 pixels."""
    top, bottom = np.array(train.SKY[value["setting"]])
    seen, paint = top + (bottom - top) * y[:, None] / 32, np.array(train.PAINT[value["colour"]])
    shapes = [centre + radius * np.array(corners) for corners in train.SHAPES[value["subject"]]]
    edges = [edge for corners in shapes for edge in edges_of(corners)]
    seen[np.any([gap(x, y, *edge) < 1.4 for edge in edges], 0)] = 255
    body = np.any([inside(x, y, corners) for corners in shapes], 0)
    seen[body] = paint
    x, y = x - centre[0], y - centre[1]
    for row in range(-4, 5):
        here = body & (6 * row <= y) & (y < 6 * row + 6)
        if value["pattern"] == "stripes":
            seen[here & (y - 6 * row < 2.6)] = 0.35 * paint
        for column in range(-4, 5) if value["pattern"] == "dots" else ():
            middle = 6 * column + (3 if row % 2 == 0 else 0)  # every other row is shifted
            seen[here & (np.hypot(x - middle, y - 6 * row - 3) < 1.7)] = 255
    return seen


@pytest.mark.parametrize("n", range(8))
def test_a_sticker_is_what_its_values_say_point_by_point(n):
    """Each pixel is the mean of 16 points. Pillow rounds the corners of what it draws, so some
    pixels at the edges differ; three of four are right."""
    value = dict(subject=train.SUBJECTS[n], setting=train.SETTINGS[n % 4],
                 colour=list(train.PAINT)[n % 6], pattern=("dots", "stripes", "plain")[n % 3])
    picture = np.array(train.draw_sticker(value, np.random.default_rng(n)))
    chance = np.random.default_rng(n)
    centre, radius = 16 + chance.uniform(-2, 2, 2), 12 * chance.uniform(0.9, 1.05)
    y, x = (z.ravel() / 4 for z in np.mgrid[:128, :128])
    wanted = slow_sticker(value, x, y, centre, radius).reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    off = np.abs(picture - wanted).max(2)
    assert np.quantile(off, 0.75) < 1.5 and off.mean() < 8


def test_users_like_a_long_shot_as_often_as_in_numpys_own_draws():
    """In proportion to the product of their tastes: of ten likes some are none of the best 20."""
    world = train.sticker_world(train.TrainConfig(items=100, users=400, interactions=10), 0)
    tastes = [world.tastes[a][:, world.items[:, k]] for k, a in enumerate(ATTRIBUTES)]
    p, chance = np.prod(tastes, axis=0), np.random.default_rng(9)  # (U, I)
    slow = np.stack([chance.choice(100, 10, replace=False, p=row / row.sum()) for row in p])
    place = np.argsort(np.argsort(-p, axis=1), axis=1)
    found, wanted = (int((np.take_along_axis(place, liked, 1) >= 20).sum())
                     for liked in (world.liked, slow))
    assert wanted > 200 and abs(found - wanted) < 5 * math.sqrt(found + wanted)


def test_stickers_that_were_half_written_are_written_again_to_the_bit(tmp_path):
    world = train.sticker_world(train.TrainConfig(items=20, users=6, interactions=10), 0)
    written = []
    for _ in range(2):
        train.write_stickers(tmp_path, world, 0)
        files = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
        assert len(files) == 22
        written.append(files)
        (tmp_path / "interactions.csv").unlink()
        (tmp_path / "images" / "s0003.png").write_bytes(b"half")
    assert written[0] == written[1]


class Net(nn.Module):
    """Says what it is told to, and remembers what it is shown."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.shown = answer, []

    def forward(self, x):
        self.shown.append(x)
        return self.answer


def test_the_referee_learns_all_that_is_seen_from_pictures_with_a_little_noise():
    referee, chance = train.Referee(), rng()
    pictures = torch.rand(50, 3, 32, 32, generator=chance)
    logits = torch.randn(50, 8 + 4 + 6 + 3, generator=chance)
    values = torch.stack([torch.arange(50) % n for n in (8, 4, 6, 3)], 1)
    referee.net = Net(logits)
    loss, slow = referee.loss(pictures, values, rng(1)), 0.0
    for row, truth in zip(logits.double(), values.tolist()):
        for start, size, value in zip((0, 8, 12, 18), (8, 4, 6, 3), truth):
            p = row[start:start + size].exp()
            slow -= float((p[value] / p.sum()).log()) / 50
    assert float(loss) == pytest.approx(slow, rel=1e-5)
    noise = (referee.net.shown[0] - pictures).flatten(1)
    size = noise.std(1)  # of each picture
    assert size.max() < 0.105 and size.max() > 0.08 and size.min() < 0.02
    assert noise.mean().abs() < 5 * 0.06 / math.sqrt(noise.numel())
    assert torch.equal(referee.loss(pictures, values, rng(1)), loss)
    referee.net = Net(logits[:2])
    read = referee.read(torch.rand(2, 3, 64, 64))
    assert referee.net.shown[0].shape == (2, 3, 32, 32)
    for row, told in zip(logits[:2].tolist(), read.tolist()):
        parts = [row[a:a + n] for a, n in zip((0, 8, 12, 18), (8, 4, 6, 3))]
        assert told == [part.index(max(part)) for part in parts]


# ---- what a run begins with

def test_a_run_begins_with_nothing_done(begun):
    assert (begun.done, begun.stage, begun.step, begun.log, begun.metrics) == ([], "", 0, [], {})
    assert not begun.busy and not begun.interrupted and begun.optimizer_state is None


@pytest.mark.parametrize("users, items, enough", [(3, 4, True), (2, 4, False), (3, 3, False)])
def test_three_users_and_four_items_are_enough_but_no_fewer(begun, users, items, enough):
    """Users to test on, items to learn from."""
    def few(data):
        first = torch.stack([data.user == u for u in range(users)]).any(0)
        data.part[(data.part == TEST) & ~first] = NEW
        learnt = torch.stack([data.item == i for i in begun.seen[:items]]).any(0)
        data.part[(data.part == TRAIN) & ~learnt] = NEW
    begun = copy.copy(begun)
    begun.train = replace(begun.train, new_users=0)
    if enough:
        assert len(another(begun, few).seen) == 4
        return
    with pytest.raises(ValueError, match="need more interactions"):
        another(begun, few)


def test_the_parts_of_the_tiny_run_are_all_there(begun):
    assert [len(pairs_of(begun, part)) for part in (TRAIN, VALID, TEST, NEW)] == [352, 44, 44, 40]
    assert 4 < len(begun.seen) < 120 and len(begun.users) == 22


def test_the_graphs_edges_are_the_training_pairs(begun):
    graph, known = begun.model.graph, pairs_of(begun, TRAIN)
    found = {(u, i - 24) for u in range(24) for i in graph.col[graph.row_ptr[u]:graph.row_ptr[u + 1]].tolist()}
    assert found == known and len(graph.col) == 2 * len(known)
    catalogue = begun.model.catalogue
    assert set(zip(catalogue.user.tolist(), catalogue.item.tolist())) == known
    assert set(zip(*begun.liked.tolist())) == known
    assert set(begun.users.tolist()) == {u for u, _ in known}
    assert set(begun.seen.tolist()) == {i for _, i in known}


def test_new_users_are_in_no_part_and_their_pairs_are_parted_into_test_and_the_rest(begun):
    new = pairs_of(begun, NEW)
    users = {u for u, _ in new}
    assert len(users) == 2 and not users & {u for u, _ in pairs_of(begun, TRAIN, VALID, TEST)}
    parts = {name: set(zip(*pairs.tolist())) for name, pairs in begun.new.items()}
    assert parts["test"] | parts["hidden"] == new and not parts["test"] & parts["hidden"]
    assert parts["history"] < parts["hidden"]
    assert [len(parts[name]) for name in ("history", "test", "hidden")] == [32, 4, 36]
    when = dict(zip(zip(begun.data.user.tolist(), begun.data.item.tolist()), begun.data.time.tolist()))
    for user in users:
        last = max(when[pair] for pair in parts["history"] if pair[0] == user)
        assert all(when[pair] > last for pair in new - parts["history"] if pair[0] == user)


def another(begun, change=lambda data: None, seed=0, device="cpu"):
    """The run anew, from its folder, with changed data or another seed."""
    cfg = replace(begun.cfg, method=replace(begun.cfg.method, seed=seed))
    data = Dataset.load(begun.out / "stickers", 32, 0)
    change(data)
    return train.Run(cfg, begun.train, data, begun.world, begun.out, torch.device(device))


def test_what_nobody_likes_in_training_changes_neither_tokenizer_nor_the_longest_text(begun):
    def strange(data):
        for item in set(range(120)) - set(begun.seen.tolist()):
            data.texts[item] = "zyxwv zyxwv zyxwv zyxwv " * 3
    new = another(begun, strange)
    assert torch.equal(new.model.catalogue.merges, begun.model.catalogue.merges)
    assert new.model.catalogue.max_tokens == begun.model.catalogue.max_tokens
    texts = [begun.data.texts[i] for i in begun.seen.tolist()]
    assert torch.equal(begun.model.catalogue.merges, Tokenizer.train(texts, 320).state())
    assert not torch.equal(begun.model.catalogue.merges, Tokenizer.train(new.data.texts, 320).state())


def test_texts_and_prompts_are_those_of_the_items(begun):
    for item, text in enumerate(begun.data.texts):
        assert begun.model.tokenizer.decode(begun.tokens[item].tolist()) == text
    for item, (word,) in enumerate(begun.data.prompts):
        assert begun.model.catalogue.words[begun.prompt[item, 0] - 1] == word
        assert torch.equal(begun.prompts[begun.topic[item]], begun.prompt[item])
    assert len(begun.prompts) == len(set(begun.data.prompts)) == 8


def test_scorer_and_judge_learn_from_halves_that_share_no_text(begun):
    items = {name: set(begun.learns[name].tolist()) for name in ("scorer", "judge")}
    assert items["scorer"] | items["judge"] == set(begun.seen.tolist())
    texts = {name: {begun.data.texts[i] for i in half} for name, half in items.items()}
    assert not texts["scorer"] & texts["judge"] and abs(len(texts["scorer"]) - len(texts["judge"])) <= 1
    fresh = {i for i, text in enumerate(begun.data.texts) if text not in texts["judge"]}
    assert set(begun.fresh.nonzero()[:, 0].tolist()) == fresh
    assert fresh > items["scorer"] and not fresh & items["judge"]


def test_networks_start_apart_in_each_run_and_between_runs(begun):
    """No judge starts as any run's scorer; the same seed starts the same, whatever chance was before."""
    runs = [another(begun, seed=seed) for seed in (0, 1, 2)]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = another(begun)
    assert torch.equal(torch.get_rng_state(), state) and hashes(again.modules) == hashes(begun.modules)
    judges, scorers = ([x.picture[0].weight for x in nets] for nets in
                       ([r.modules["judge"] for r in runs], [r.model.scorer for r in runs]))
    starts = [*judges, *scorers]
    for n, one in enumerate(starts):
        assert not any(torch.equal(one, other) for other in starts[n + 1:])
    assert hashes(begun.modules["average"]) == hashes(begun.model.image)


def test_how_the_data_is_split_does_not_depend_on_the_device(begun, monkeypatch):
    """cpu:0 is where the run is; what splits pairs, halves and users asks for another generator, the CPU's."""
    made = recorded(monkeypatch, torch, "Generator")
    run = another(begun, device="cpu:0")
    train.draw_pairs(run, TEST, 9)
    places = ["".join(map(str, args)) or "cpu" for args in made]
    assert len(places) >= 3 and set(places) == {"cpu"}
    made.clear()
    run.generator("gnn")
    assert [str(args[0]) for args in made] == ["cpu:0"]


# ---- the stages: one after the other

@pytest.mark.parametrize("resumed", [False, True])
def test_stages_run_in_turn_and_each_is_saved_and_told(run, monkeypatch, capsys, resumed):
    """From the first step on. Of a run that goes on, what is done is left out, and a stage that was
    begun keeps its step."""
    seen, saved = [], []

    def stage(run):
        seen.append((run.stage, run.step, run.optimizer_state))
        run.step, run.optimizer_state = 7, "of this stage"
        return f"merit of {run.stage}"

    def save():
        saved.append((run.stage, list(run.done)))
        run.seconds[run.stage] = [2.5, 1]
    monkeypatch.setattr(run, "save", save)
    for name in ("gnn", "text", "judge"):
        monkeypatch.setitem(train.STAGES, name, stage)
    run.done, run.stage, run.step, run.optimizer_state, run.clock = [], "", 0, None, 0
    if resumed:
        run.done, run.stage, run.step, run.optimizer_state = ["gnn"], "text", 3, "half-way"
    train.train_all(run, ("gnn", "text", "judge"))
    first = [] if resumed else [("gnn", 0, None)]
    second = ("text", 3, "half-way") if resumed else ("text", 0, None)
    assert seen == [*first, second, ("judge", 0, None)]
    assert run.done == ["gnn", "text", "judge"] and np.abs(run.clock - train.clocks()).max() < 60
    assert saved == [(name, run.done[:run.done.index(name) + 1]) for name, *_ in seen]
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert told == [[name, "2.5", "s", "merit", "of", name] for name, *_ in seen]


def test_weight_decay_is_for_matrices_and_kernels_alone(begun):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4))
    optimizer = train.adamw(net, 0.02, 0.3)
    found = {id(p): (group["weight_decay"], group["lr"], group["fused"])
             for group in optimizer.param_groups for p in group["params"]}
    assert found == {id(p): (0.3 if p.ndim > 1 else 0, 0.02, True) for p in net.parameters()}


def test_a_run_is_busy_in_the_steps_of_a_stage_and_at_no_other_time(run):
    net, busy = nn.Linear(2, 2), []

    def losses(_):
        busy.append(run.busy)
        return {"loss": net.weight.sum()}
    after = lambda step: busy.append(run.busy)
    train.fit(at_stage(run, "gnn"), train.adamw(net, 0.1), 3, losses, after=after)
    assert busy == [True] * 6 and not run.busy


# ---- the stages: what they see

def test_the_autoencoder_learns_the_pictures_of_training(run, monkeypatch):
    at_stage(run, "autoencoder", image=dict(ae_steps=4, batch=512, ae_lr=0.02, weight_decay=0.3))
    net = run.model.autoencoder
    with monkeypatch.context() as patch:
        seen, fits = in_vain(patch, net), recorded(patch, train, "fit")
        made = recorded(patch, train, "adamw")
        merit = train.train_autoencoder(run)
    assert {i for x, *_ in seen for i in items_in(run, x)} == set(run.seen.tolist())
    assert all(kl == run.cfg.image.kl and isinstance(g, torch.Generator) for _, kl, g in seen)
    assert [len(x) for x, *_ in seen] == [512] * 4 and fits[0][2] == 4
    assert made == [(net, 0.02, 0.3)]
    latents = net.encode(train.to_float(run.images)).detach()
    own = latents[run.seen].transpose(0, 1).flatten(1)
    assert_close(own.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
    assert_close(own.std(1), torch.ones(4), atol=1e-3, rtol=0)
    assert torch.equal(train.latents_of(run), latents)
    pictures = train.to_float(run.images)[run.seen]
    error = (net.decode(net.encode(pictures)) - pictures).square().mean()
    assert float(re.search(r"[-\d.]+", merit)[0]) == pytest.approx(10 * math.log10(4 / error.item()), abs=0.06)


def test_a_perfect_autoencoder_is_no_division_by_zero(run, monkeypatch):
    at_stage(run, "autoencoder", image=dict(ae_steps=1))
    monkeypatch.setattr(train, "latents_of", lambda run: torch.randn(120, 4, 8, 8, generator=rng()))
    monkeypatch.setattr(run.model.autoencoder, "encode", lambda x: x)
    monkeypatch.setattr(run.model.autoencoder, "decode", lambda x: x)
    assert "PSNR 126.0 dB" in train.train_autoencoder(run)


def test_the_autoencoder_is_tried_on_no_more_than_512_pictures(run, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *_: None)
    monkeypatch.setattr(run.model.autoencoder, "standardize", lambda latents: None)
    looked = recorded(monkeypatch, train, "in_batches", lambda function, x: x)
    run.seen = run.seen.repeat(6)
    train.train_autoencoder(at_stage(run, "autoencoder"))
    assert len(run.seen) > 513 and len(looked[-1][1]) == 512


def test_features_are_fitted_to_the_items_of_training_and_given_to_all(run, monkeypatch):
    latents = train.latents_of(run)
    fitted = {m: recorded(monkeypatch, getattr(run.model, f"{m}_features"), "fit") for m in MODALITIES}
    train.fit_features(run)
    for m, content in (("image", latents), ("text", run.tokens)):
        (x,), = fitted[m]
        assert torch.equal(x, content[run.seen])
        features = getattr(run.model, f"{m}_features")(content)
        assert torch.equal(getattr(run.model.gnn, f"features_{m}"), features) and len(features) == 120


def test_the_graph_network_learns_from_training_pairs(run, monkeypatch):
    at_stage(run, "gnn", gnn=dict(steps=3, batch=4000, lr=0.017))
    ranked = recorded(monkeypatch, train, "ranking_summary")
    fits, seen = recorded(monkeypatch, train, "fit"), recorded(monkeypatch, run.model.gnn, "loss")
    merit = train.train_gnn(run)
    likes = pairs_of(run, TRAIN)
    assert {pair for _, user, pos, _ in seen for pair in zip(user.tolist(), pos.tolist())} == likes
    assert not {pair for _, user, _, neg in seen for pair in zip(user.tolist(), neg.tolist())} & likes
    assert all(graph is run.model.graph for graph, *_ in seen) and len(seen[0][1]) == 4000
    _, optimizer, steps, _, schedule = fits[0][:5]
    assert (steps, optimizer.defaults["lr"], schedule(0.0), schedule(0.99)) == (3, 0.017, 1, 1)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in run.model.gnn.parameters()}
    rows = run.model.gnn(run.model.graph)
    for m in MODALITIES:
        assert all(torch.equal(one, two) for one, two in zip(ranked[0][0][m], rows[m]))
    check_ranking(run, ranked[0], pairs_of(run, TEST))
    assert set(run.metrics["stage1"]) == {"recall@20", "ndcg@20", "recall@20_image", "recall@20_text"}
    assert merit == f"recall@20 {run.metrics['stage1']['recall@20']:.4f}"


def edges(graph):
    rows = [graph.col[graph.row_ptr[u]:graph.row_ptr[u + 1]].tolist() for u in range(graph.n_users)]
    return {(u, i - graph.n_users) for u, row in enumerate(rows) for i in row}


def check_ranking(run, arguments, wanted):
    """Of all items that which hides training and validation, and of new people all but what is to be found."""
    _, hidden, test = arguments
    new_test = set(zip(*run.new["test"].tolist()))
    assert edges(hidden) == pairs_of(run, TRAIN, VALID) | (pairs_of(run, NEW) - new_test)
    assert edges(test) == wanted and not edges(hidden) & wanted


def test_ranking_hides_all_that_is_known_and_nothing_that_is_to_be_found(run, monkeypatch):
    ranked = recorded(monkeypatch, train, "ranking_summary", lambda *_: {})
    for pairs in (run.pairs(TEST), run.new["test"]):
        train.rank(run, {}, pairs)
        check_ranking(run, ranked[-1], set(zip(*pairs.tolist())))


def test_codebooks_start_from_users_in_training_and_learn_what_ranks(run, monkeypatch):
    at_stage(run, "codebook", vq=dict(steps=2, batch=64, rank_weight=0.7, lr=0.011))
    rows = {m: tuple(x.detach() for x in pair) for m, pair in run.model.gnn(run.model.graph).items()}
    before = {m: copy.deepcopy(taste.quantizer) for m, taste in run.model.modality.items()}
    starts = {m: recorded(monkeypatch, taste.quantizer, "initialize") for m, taste in run.model.modality.items()}
    seeded = recorded(monkeypatch, run.model, "seed_tables")
    parts, original = [], train.fit

    def fit(run, optimizer, steps, losses, *rest, **more):
        nets = {m: copy.deepcopy(taste.quantizer) for m, taste in run.model.modality.items()}
        assert all(net.training for net in nets.values())
        parts.append((losses(run.generator("codebook", 0)), nets, optimizer, steps))
        return original(run, optimizer, steps, losses, *rest, **more)
    monkeypatch.setattr(train, "fit", fit)
    train.train_codebook(run)
    for m, calls in starts.items():
        (user, generator), = calls
        assert torch.equal(user, rows[m][0][run.users])
    assert starts["image"][0][1].initial_seed() != starts["text"][0][1].initial_seed()
    found, nets, optimizer, steps = parts[0]
    assert (steps, optimizer.defaults["lr"]) == (2, 0.011)
    chance = run.generator("codebook", 0)
    user, pos, neg = sample_triplets(run.model.graph, 64, chance)
    total = 0.0
    for m, (p, e) in rows.items():
        out = nets[m](p[user], chance)
        ranking = 0.0
        for b in range(64):
            lead = out.reconstruction[b] * p[user[b]].norm() @ (e[pos[b]] - e[neg[b]])
            ranking = ranking + math.log(1 + math.exp(-float(lead))) / 64
        total = total + out.loss + 0.7 * ranking
        assert_close(found[f"bpr_{m}"].detach(), torch.tensor(ranking), rtol=1e-4, atol=1e-6)
        assert_close(found[f"reconstruction_{m}"], out.reconstruction_loss)
    assert_close(found["loss"], total, rtol=1e-4, atol=1e-6)
    for m, taste in run.model.modality.items():
        assert torch.equal(taste.preference, rows[m][0]) and not taste.quantizer.training
        assert torch.equal(taste.tokens, taste.quantizer.encode(rows[m][0]))
        assert any(not torch.equal(x, y) for x, y in zip(taste.quantizer.parameters(), before[m].parameters()))
    (generator,), = seeded
    assert isinstance(generator, torch.Generator)


def test_codebooks_that_were_begun_are_not_begun_again(run, monkeypatch):
    at_stage(run, "codebook", vq=dict(steps=2)).step = 1
    starts = [recorded(monkeypatch, taste.quantizer, "initialize") for taste in run.model.modality.values()]
    train.train_codebook(run)
    assert starts == [[], []]


def test_codebooks_are_measured_on_users_in_training(run, monkeypatch):
    rows = {m: tuple(x.detach() for x in pair) for m, pair in run.model.gnn(run.model.graph).items()}
    run.metrics["stage1"] = {}
    ranked = recorded(monkeypatch, train, "rank")
    merit = train.measure_codebook(run, rows)
    kept, known = run.metrics["codebook"], run.users
    for m, taste in run.model.modality.items():
        unit = taste.quantizer.decode(taste.tokens)
        wanted = torch.stack([row * p.norm() for row, p in zip(unit, rows[m][0])])
        assert_close(ranked[0][1][m][0], wanted)
        assert torch.equal(ranked[0][1][m][1], rows[m][1])
        p = F.normalize(rows[m][0][known], dim=1)
        lost, spread = (p - unit[known]).square().sum(), (p - p.mean(0)).square().sum()
        assert kept[m]["explained"] == pytest.approx(1 - float(lost / spread), abs=1e-5)
        assert kept[m]["usage"] == [len(set(level)) / 8 for level in taste.tokens[known].T.tolist()]
    assert torch.equal(ranked[0][2], run.pairs(TEST))
    found = run.metrics["stage1"]["recall@20_quantized"]
    assert 0 <= found <= 1 and merit == f"recall@20 from tokens {found:.4f}"


def who_likes(run, m, prefs):
    """The users whose tokens these are, None for null tokens."""
    owner = {tuple(k): u for u, k in enumerate(run.model.modality[m].tokens.tolist())} | {(-1, -1): None}
    return [owner[tuple(k)] for k in prefs.tolist()]


@pytest.mark.parametrize("m", MODALITIES)
def test_a_generator_learns_what_users_liked_in_training_from_their_own_tokens(run, monkeypatch, m):
    mark_texts(run)
    at_stage(run, m, **{m: dict(steps=12, batch=512, null_rate=0.25, lr=0.031, weight_decay=0.2)})
    latents = torch.arange(120.0)[:, None, None, None].expand(120, 4, 8, 8)
    monkeypatch.setattr(train, "latents_of", lambda run: latents)
    made, fits = recorded(monkeypatch, train, "adamw"), recorded(monkeypatch, train, "fit")
    net = getattr(run.model, m)
    seen = in_vain(monkeypatch, net)
    merit = getattr(train, f"train_{m}")(run)
    told = set()
    nulls = 0
    for content, prompt, prefs, *_ in seen[:-1]:
        items = (content[:, 0] - 3 if m == "text" else content[:, 0, 0, 0].long()).tolist()
        assert torch.equal(prompt, run.prompt[items]) and len(items) == 512
        users = who_likes(run, m, prefs)
        nulls += users.count(None)
        told |= {(u, i) for u, i in zip(users, items) if u is not None}
    assert told == pairs_of(run, TRAIN)
    n = 12 * 512
    assert len(seen) == 13 and abs(nulls - 0.25 * n) < 5 * math.sqrt(n * 0.25 * 0.75)
    assert made == [(net, 0.031, 0.2)] and fits[0][2] == 12
    content, prompt, prefs, *_ = seen[-1]
    items = (content[:, 0] - 3 if m == "text" else content[:, 0, 0, 0].long()).tolist()
    assert set(zip(who_likes(run, m, prefs), items)) == pairs_of(run, VALID) and len(items) == 44
    assert torch.equal(prompt, run.prompt[items])
    assert run.log[-1][2] == "loss_validation" and merit == f"validation loss {run.log[-1][3]:.4f}"


def test_validation_takes_no_more_than_512_pairs(run, monkeypatch):
    many = torch.stack([torch.arange(600) % 22, torch.arange(600) % 120])
    monkeypatch.setattr(train, "adamw", lambda *_: None)
    monkeypatch.setattr(train, "fit", lambda *_, **__: None)
    seen = in_vain(monkeypatch, run.model.text)
    monkeypatch.setattr(run, "pairs", lambda *parts: many)
    train.train_text(at_stage(run, "text"))
    assert [len(tokens) for tokens, *_ in seen] == [512]


@pytest.mark.parametrize("resumed", [False, True])
def test_what_remains_of_the_denoiser_is_the_running_mean_of_its_weights(run, monkeypatch, resumed):
    at_stage(run, "image", image=dict(steps=5, batch=8, lr=0.01, ema=0.4))
    net, average, weights = run.model.image, run.modules["average"], []
    for parameter in average.parameters():
        parameter.data += 1
    slow = copy.deepcopy(average)
    run.step = 2 * resumed
    original = train.ema_update

    def ema_update(mean, model, decay, step):
        assert mean is average and model is net
        weights.append((step, copy.deepcopy(net)))
        original(mean, model, decay, step)
    monkeypatch.setattr(train, "ema_update", ema_update)
    fits = recorded(monkeypatch, train, "fit")
    train.train_image(run)
    assert [step for step, _ in weights] == list(range(2 * resumed, 5))
    for step, net_then in weights:
        decay = min(0.4, (1 + step) / (10 + step))
        for mean, now in zip(slow.parameters(), net_then.parameters()):
            mean.data = decay * mean.data + (1 - decay) * now.data
    for mean, kept, running in zip(slow.parameters(), net.parameters(), average.parameters()):
        assert_close(kept, mean) and torch.equal(kept, running)
    last = weights[-1][1]
    assert any(not torch.equal(a, b) for a, b in zip(last.parameters(), net.parameters()))
    schedule = fits[0][4]
    assert [round(schedule(x), 3) for x in (0.0, 0.5, 0.75, 0.9)] == [0.02, 1.0, 0.5, 0.2]


@pytest.mark.parametrize("name", ["scorer", "judge"])
def test_scorer_and_judge_learn_from_their_own_half_alone(run, monkeypatch, name):
    mark_texts(run)
    at_stage(run, name, reward=dict(scorer_steps=10, scorer_batch=40, scorer_lr=0.023))
    nets = {"scorer": run.model.scorer, "judge": run.modules["judge"]}
    seen, made = recorded(monkeypatch, nets[name], "loss"), recorded(monkeypatch, train, "adamw")
    fits, before = recorded(monkeypatch, train, "fit"), {n: hashes(net) for n, net in nets.items()}
    train.train_scorer(run)
    drawn = set()
    for pictures, tokens, prompt, generator in seen:
        items = items_in(run, pictures)
        assert (tokens[:, 0] - 3).tolist() == items and torch.equal(prompt, run.prompt[items])
        assert len(items) == 40
        drawn |= set(items)
    assert drawn == set(run.learns[name].tolist()) and len(seen) == fits[0][2] == 10
    assert {n for n, net in nets.items() if hashes(net) != before[n]} == {name}
    assert made == [(nets[name], 0.023, 0.01)]
    other = run.learns["judge" if name == "scorer" else "scorer"]
    with torch.no_grad():
        x = nets[name].encode_image(train.to_float(run.images[other]))
        y = nets[name].encode_text(run.tokens[other])
    assert run.log[-1][2] == "held_out_auc"
    assert run.log[-1][3] == pytest.approx(float(slow_auc(x, y, range(len(other))).mean()), abs=1e-5)


def slow_auc(query, candidates, own):
    """Share of the other candidates that lie farther from each query than its own; ties half."""
    found = []
    for q, o in zip(query, own):
        lead = [float(q @ candidates[o] - q @ c) for c in candidates]
        wins = [(0.5 if abs(x) <= 1e-6 else x > 0) for n, x in enumerate(lead) if n != o]
        found.append(sum(wins) / len(wins))
    return torch.tensor(found, dtype=torch.float64)


def test_a_batch_is_no_larger_than_its_half_and_256_others_are_enough(run, monkeypatch):
    at_stage(run, "judge", reward=dict(scorer_steps=1, scorer_batch=10**6))
    seen, looked = in_vain(monkeypatch, run.modules["judge"]), recorded(monkeypatch, train, "rank_share")
    run.learns["scorer"] = run.learns["scorer"].repeat(20)
    train.train_scorer(run)
    assert [len(x) for x, *_ in seen] == [len(run.learns["judge"])] and [len(x) for x, *_ in looked] == [256]


def test_the_referee_learns_from_fresh_stickers_and_is_tried_on_others(run, monkeypatch, tmp_path):
    """World, its pictures, what is learnt and what is asked: each of chance of its own."""
    at_stage(run, "referee")
    run.train = replace(run.train, referee_pictures=16, referee_steps=3)
    drawn, original = [], train.draw_batch
    seeds = recorded(monkeypatch, np.random, "default_rng")
    world = train.sticker_world(train.TrainConfig(items=20, users=6, interactions=10), 0)
    train.write_stickers(tmp_path, world, 0)

    def draw_batch(n, chance):
        drawn.append((n, original(min(n, 30), chance)))
        return drawn[-1][1]
    monkeypatch.setattr(train, "draw_batch", draw_batch)
    seen, fits = recorded(monkeypatch, run.modules["referee"], "loss"), recorded(monkeypatch, train, "fit")
    made = recorded(monkeypatch, train, "adamw")
    train.train_referee(run)
    (n, (pictures, values)), (n_asked, (others, truth)) = drawn
    assert (n, n_asked) == (16, 1000)
    assert not set(map(bytes, others.numpy())) & set(map(bytes, pictures.numpy()))
    assert len(seeds) == 4 == len({tuple(seed) for seed, in seeds})
    assert all(seed[0] == run.cfg.method.seed for seed, in seeds)
    known = {bytes(x): n for n, x in enumerate(pictures.numpy())}
    rows = [[known[bytes(x)] for x in batch.numpy()] for batch, *_ in seen]
    assert set(sum(rows, [])) == set(range(16)) and all(len(row) == 64 for row in rows)
    assert all(torch.equal(told, values[row]) for (_, told, _), row in zip(seen, rows))
    assert fits[0][2] == 3 and made == [(run.modules["referee"], 2e-3)]
    right = (run.modules["referee"].read(others) == truth).double().mean(0).tolist()
    assert run.metrics["referee"] == dict(zip(SEEN, right))


def test_where_tastes_are_not_known_there_is_no_referee(run, monkeypatch):
    run.world = None
    fits = recorded(monkeypatch, train, "fit")
    assert "not needed" in train.train_referee(at_stage(run, "referee")) and not fits


# ---- the reward

def rewarding(run, monkeypatch, **settings):
    """The reward stage with steps that are only looked at; who watched when."""
    at_stage(run, "reward", reward=settings)
    watched = []

    def watch(run):
        watched.append(run.step)
        run.note(run.step, valid_consistency=0.25 + run.step, valid_judge_consistency=0.5 + run.step)
    monkeypatch.setattr(train, "watch", watch)

    def reinforce_step(user, prompt, reference, generator):
        loss = sum(100 * w.square().sum() for w in tables(run).values())
        ones = torch.ones(4)
        return ReinforceStep(loss, RewardParts(ones, ones * 2, ones * 3), torch.tensor(4.0), torch.tensor(5.0))
    return watched, recorded(monkeypatch, run.model, "reinforce_step", reinforce_step)


def test_the_reward_asks_users_of_training_for_prompts_of_what_they_like(run, monkeypatch):
    watched, seen = rewarding(run, monkeypatch, rounds=150, groups=5, log_every=40)
    run.prompt = torch.arange(120)[:, None]  # says which item
    start, optimizers = {m: w.detach().clone() for m, w in tables(run).items()}, []
    fits = recorded(monkeypatch, train, "fit")
    merit = train.train_reward(run)
    asked = set()
    for user, prompt, reference, generator in seen:
        assert len(set(user.tolist())) == 5 and reference is run.tables
        asked |= set(zip(user.tolist(), prompt[:, 0].tolist()))
    assert asked <= pairs_of(run, TRAIN) and {u for u, _ in asked} == set(run.users.tolist())
    assert len(asked) > 250 and len({g.initial_seed() for *_, g in seen}) == 150
    for m, table in tables(run).items():  # where it began, to the bit
        assert torch.equal(run.tables[m], start[m]) and not torch.equal(table, start[m])
        assert run.tables[m].data_ptr() != table.data_ptr() and not run.tables[m].requires_grad
    assert watched == [0, 40, 80, 120, 150]
    logged = {name: value for _, step, name, value in run.log if step == 150}
    assert {n: logged[n] for n in ("consistency", "s_image", "s_text", "kl_image", "kl_text")} == {
        "consistency": 1, "s_image": 2, "s_text": 3, "kl_image": 4, "kl_text": 5}
    assert merit == "consistency on validation pairs 0.250 -> 150.250"
    _, optimizer, steps, _, schedule, _, clip = fits[0]
    assert steps == 150 and clip == math.inf
    assert [round(schedule(x), 3) for x in (0.0, 0.049, 0.1, 0.7, 0.85)] == [0.01, 0.5, 1.0, 1.0, 0.5]
    assert type(optimizer) is torch.optim.Adam
    for group, m in zip(optimizer.param_groups, MODALITIES):
        assert group["params"][0] is tables(run)[m] and len(group["params"]) == 1
        assert group["betas"] == (0.9, 0.99) and group["weight_decay"] == 0
        assert optimizer.defaults["lr"] != getattr(run.cfg.reward, f"lr_{m}")


def test_a_reward_that_was_begun_keeps_the_tables_it_began_with(run, monkeypatch):
    watched, seen = rewarding(run, monkeypatch, rounds=3, log_every=2)
    run.step, kept, run.world = 1, {m: x.clone() for m, x in run.tables.items()}, None
    run.log = [["reward", 0, "valid_judge_consistency", 0.75]]
    merit = train.train_reward(run)
    assert all(torch.equal(run.tables[m], kept[m]) for m in MODALITIES)
    assert len(seen) == 2 and watched == [2, 3]
    assert merit == "judge_consistency on validation pairs 0.750 -> 3.500"


def test_the_reward_changes_the_two_tables_and_no_other_bit(run, monkeypatch):
    """A real step. Codes that nobody has stay as they are, too."""
    at_stage(run, "reward", reward=dict(rounds=2, log_every=9))
    monkeypatch.setattr(train, "watch", lambda run: run.note(run.step, valid_consistency=0))
    for taste in run.model.modality.values():
        taste.tokens[:, 1].clamp_(max=6)
    before = hashes(run.modules)
    train.train_reward(run)
    after = hashes(run.modules)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"model.{m}.preference.weight" for m in MODALITIES}
    for m, table in tables(run).items():
        assert torch.equal(table[15], run.tables[m][15])
    moved = [name for name, p in run.modules.named_parameters() if p.grad is not None]
    assert set(moved) <= changed and all(p.requires_grad for p in run.model.parameters())


def test_in_the_reward_autocast_casts_a_weight_once_a_block_and_not_at_each_use(run, monkeypatch):
    at_stage(run, "reward", reward=dict(rounds=1, log_every=9))
    monkeypatch.setattr(train, "watch", lambda run: run.note(run.step, valid_consistency=0))
    weights, casts, blocks = {p.data_ptr() for p in run.model.parameters()}, Counter(), []

    def half():
        blocks.append(torch.autocast("cpu", torch.bfloat16))
        return blocks[-1]
    monkeypatch.setattr(run.model, "half", half)

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                casts[args[0].data_ptr()] += args[0].data_ptr() in weights
            return function(*args, **(kwargs or {}))
    with Casts():
        train.train_reward(run)
    assert 0 < max(casts.values()) <= len(blocks) < 9  # texts have 40 tokens


def test_rewards_large_gradients_are_not_cut(run, monkeypatch):
    """Adam forgets a gradient's size, unless it is clipped in some rounds and not in others."""
    watched, seen = rewarding(run, monkeypatch, rounds=1)
    start = {m: w.detach().clone() for m, w in tables(run).items()}
    norms = recorded(monkeypatch, torch.optim.Adam, "step")
    slopes = []
    original = train.nn.utils.clip_grads_with_norm_

    def clip(parameters, *rest):
        original(parameters, *rest)
        slopes.extend(p.grad.clone() for p in parameters)
    monkeypatch.setattr(train.nn.utils, "clip_grads_with_norm_", clip)
    train.train_reward(run)
    assert len(norms) == 1
    for m, slope in zip(MODALITIES, slopes):
        assert_close(slope, 200 * start[m])


def test_watching_looks_at_validation_pairs_and_tastes_alone(run, monkeypatch):
    at_stage(run, "reward").step = 7
    made = recorded(monkeypatch, train, "make", lambda run, variant, pairs, generator: pairs)
    drawn = recorded(monkeypatch, train, "draw_pairs")
    values = {"copied": torch.ones(3), "x": torch.tensor([1, math.nan, 2]), "y": torch.tensor([0.0, 0.5])}
    measured = recorded(monkeypatch, train, "measures", lambda *_: values)
    train.watch(run)
    (_, variant, pairs, generator), = made
    assert variant == "after_reward" and len(pairs.user) == 44 and drawn == [(run, VALID, 96)]
    assert set(zip(pairs.user.tolist(), pairs.item.tolist())) <= pairs_of(run, VALID)
    (_, shown, likes), = measured
    assert shown is pairs and set(zip(*likes.tolist())) == pairs_of(run, VALID)
    assert run.log == [["reward", 7, "valid_x", 1.5], ["reward", 7, "valid_y", 0.25]]


# ---- evaluation: pairs, and what is made for them

def test_pairs_are_interactions_with_another_user_each(begun):
    pairs = train.draw_pairs(begun, TEST, 25)
    drawn = set(zip(pairs.user.tolist(), pairs.item.tolist()))
    assert len(drawn) == 25 and drawn < pairs_of(begun, TEST)
    assert all(torch.equal(a, b) for a, b in zip(pairs, train.draw_pairs(begun, TEST, 25)))
    everybody = train.draw_pairs(begun, TRAIN, 10**6)
    assert set(zip(everybody.user.tolist(), everybody.item.tolist())) == pairs_of(begun, TRAIN)
    assert (everybody.user != everybody.other).all()
    others = {u: set(everybody.other[everybody.user == u].tolist()) for u in begun.users.tolist()}
    assert set().union(*others.values()) == set(begun.users.tolist())
    assert min(map(len, others.values())) > 6  # 16 draws of 21 others
    neighbours = (torch.searchsorted(begun.users, everybody.other)
                  - torch.searchsorted(begun.users, everybody.user)) % 22
    assert set(neighbours.tolist()) == set(range(1, 22))


def test_who_likes_what_is_a_table_of_the_pairs(begun):
    user = torch.tensor([7, 3, 7, 21])
    for pairs in (begun.pairs(TEST), begun.pairs(), begun.pairs(TRAIN, VALID)):
        found, known = train.liked_by(begun, user, pairs), set(zip(*pairs.tolist()))
        assert found.shape == (4, 120) and found.dtype == torch.bool
        for row, u in zip(found, user.tolist()):
            assert {i for i in range(120) if row[i]} == {i for v, i in known if v == u}


def test_items_are_chosen_at_random_each_once_and_none_where_none_is_left():
    mask = torch.tensor([[True, False, True, True, False], [False] * 5, [False, True, False, False, False]])
    found = [train.choose(mask, 2, rng(seed)) for seed in range(600)]
    for one in found:
        assert len(set(one[0].tolist())) == 2 and set(one[0].tolist()) <= {0, 2, 3}
        assert one[1].tolist() == [-1, -1] and one[2].tolist() == [1, -1]
    first = torch.stack(found)[:, 0, 0].bincount(minlength=5)
    assert (abs(first[[0, 2, 3]] - 200) < 5 * math.sqrt(600 * 2 / 9)).all()
    assert train.choose(mask, 9, rng()).shape == (3, 5)


def test_real_pairs_are_new_to_the_judge_and_beside_them_lies_what_the_user_does_not_like(begun):
    run, likes = begun, pairs_of(begun, TRAIN, VALID, TEST, NEW)
    pairs, prompts = train.draw_pairs(run, TEST, 10**6), run.data.prompts
    known = {run.data.texts[i] for i in run.learns["judge"].tolist()}
    fresh = [text not in known for text in run.data.texts]

    def beside(user, item, liked):
        return [i for i in range(120) if i != item and prompts[i] == prompts[item] and fresh[i]
                and ((user, i) in likes) == liked]
    kept = [(u, i, o) for u, i, o in zip(*(x.tolist() for x in pairs)) if fresh[i] and beside(u, i, False)]
    assert 3 < len(kept) < len(pairs.user)
    for seed in range(4):
        made = train.make_real(run, pairs, rng(seed))
        assert list(zip(*(x.tolist() for x in made.pairs))) == kept
        own, other = items_in(run, made.own.images), items_in(run, made.other.images)
        assert own == [i for _, i, _ in kept]
        assert torch.equal(made.own.tokens, run.tokens[own]) and torch.equal(made.other.tokens, run.tokens[other])
        some = 0
        for (user, item, _), i, again in zip(kept, other, made.again):
            assert i in beside(user, item, False)
            texts = [run.tokens[i].tolist() for i in beside(user, item, True)]
            assert again.tolist() in texts if texts else again.abs().sum() == 0
            some += bool(texts)
        assert 0 < some < len(kept)
    assert train.make(run, "real", pairs, rng(3)).pairs.item.tolist() == [i for _, i, _ in kept]


VARIANTS = ("unpersonalized", "before_reward", "after_reward", "best_of")


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_what_their_names_say(run, monkeypatch, variant):
    assert train.VARIANTS == ("real", *VARIANTS)
    pairs, now = train.draw_pairs(run, TEST, 12), {m: w.detach().clone() for m, w in tables(run).items()}
    places, seen = {m: w.data_ptr() for m, w in tables(run).items()}, []

    def sample_pairs(prompt, prefs, generator, best_of=1):
        seen.append((prompt, prefs, generator, best_of, {m: w.detach().clone() for m, w in tables(run).items()}))
        return torch.full((12, 3, 2, 2), float(len(seen))), torch.full((12, 3), len(seen))
    monkeypatch.setattr(run.model, "sample_pairs", sample_pairs)
    chance = rng()
    made = train.make(run, variant, pairs, chance)
    assert made.pairs is pairs
    assert (made.own.images[0, 0, 0, 0], made.own.tokens[0, 0], made.other.images[0, 0, 0, 0]) == (1, 1, 2)
    assert (made.other.tokens[0, 0], made.again[0, 0]) == (2, 3) and made.again.shape == (12, 3)
    for (prompt, prefs, generator, best_of, held), user in zip(seen, (pairs.user, pairs.other, pairs.user)):
        assert torch.equal(prompt, run.prompt[pairs.item]) and generator is chance
        assert best_of == (3 if variant == "best_of" else 1)
        for m, taste in run.model.modality.items():
            wanted = torch.full((12, 2), -1) if variant == "unpersonalized" else taste.tokens[user]
            assert torch.equal(prefs[m], wanted)
            start = variant in ("before_reward", "best_of")
            assert torch.equal(held[m], run.tables[m] if start else now[m])
    for m, w in tables(run).items():  # and afterwards all is as it was
        assert torch.equal(w, now[m]) and w.data_ptr() == places[m]


def test_best_of_keeps_the_pair_with_the_highest_reward_of_all(run):
    model, user, n = run.model, torch.tensor([3, 8, 5, 17]), 3
    cfg = model.cfg = replace(run.cfg, reward=replace(run.cfg.reward, lambda_c=1.3, lambda_p=0.6))
    prompt, prefs = run.prompt[[4, 50, 9, 77]], model.user_tokens(user)
    prefs["text"][2] = prefs["image"][2] = -1  # who has no taste is asked by consistency alone
    images, texts = model.sample_pairs(prompt, prefs, rng(5), n)
    chance, cfg = rng(5), cfg.reward
    with model.half():
        latents = sample_latents(model.image, prompt.repeat_interleave(n, 0),
                                 prefs["image"].repeat_interleave(n, 0), chance)
    written = model.sample_tokens(prompt.repeat_interleave(2 * n, 0), prefs["text"].repeat_interleave(2 * n, 0), chance)
    pictures = model.decode_latents(latents)
    with torch.no_grad():
        x, y = model.scorer.encode_image(pictures), model.scorer.encode_text(written)
        chosen = []
        for g in range(4):
            mine, told = range(g * n, g * n + n), range(2 * n * g, 2 * n * g + 2 * n)
            taste = {m: model.modality[m].decode(prefs[m][g:g + 1]) for m in MODALITIES}
            see = standard([float(model.score("image", taste["image"], latents[i:i + 1])) for i in mine])
            read = standard([float(model.score("text", taste["text"], written[t:t + 1])) for t in told])
            agree = standard([float(x[i] @ y[t]) for i in mine for t in told])
            reward = {(i, t): cfg.lambda_c * agree[a * 2 * n + b] + cfg.lambda_p * (see[a] + read[b])
                      for a, i in enumerate(mine) for b, t in enumerate(told)}
            i, t = max(reward, key=reward.get)
            chosen.append((i - g * n, t - g * 2 * n))
            assert_close(images[g], pictures[i])
            assert torch.equal(texts[g], written[t])
    assert len(set(chosen)) > 1 and max(t for _, t in chosen) >= n


def standard(values):
    """Less their mean, over their standard deviation."""
    mean = sum(values) / len(values)
    size = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5 + 1e-4
    return [(v - mean) / size for v in values]


def test_many_pairs_are_made_in_batches_and_keep_their_order(run, monkeypatch):
    asked = recorded(monkeypatch, run.model, "sample_tokens", lambda prompt, prefs, _: prompt.expand(-1, 4))
    prompt = torch.arange(1, 9)[torch.arange(11) % 8, None]
    prefs = {m: torch.zeros(11, 2, dtype=torch.int64) for m in MODALITIES}
    for best_of, sizes in ((1, [4, 4, 3]), (2, [8, 8, 8, 8, 8, 4])):
        images, texts = run.model.sample_pairs(prompt, prefs, rng(), best_of, batch=4)
        assert torch.equal(texts[:, 0], prompt[:, 0]) and len(images) == 11
        assert [len(x) for x, *_ in asked] == sizes
        asked.clear()


# ---- evaluation: what is measured

class PerfectReferee(nn.Module):
    """Knows each picture of the catalogue."""

    def __init__(self, run):
        super().__init__()
        self.known = {x.tobytes(): row for x, row in zip(train.to_float(run.images).numpy(), run.world.items)}

    def read(self, pictures):
        rows = [self.known[x.tobytes()][:4] for x in pictures.numpy()]
        return torch.tensor(np.array(rows)).reshape(-1, 4)


@pytest.fixture
def exact(run):
    """exact_measures of contents for pairs, by a referee that never errs."""
    run.modules["referee"] = PerfectReferee(run)
    return lambda pairs, content: train.exact_measures(run, pairs.user, pairs.item, content)


def test_real_items_are_right_and_useful_as_the_tastes_say(run, exact):
    pairs = train.draw_pairs(run, TEST, 30)
    found = exact(pairs, train.contents(run, pairs.item))
    for name in ("prompt_image", "prompt_text", "consistency", "grammatical"):
        assert found[name].all(), name
    for n, (user, item) in enumerate(zip(pairs.user.tolist(), pairs.item.tolist())):
        value = dict(zip(ATTRIBUTES, run.world.items[item]))
        for m, attributes in (("image", ("setting", "colour", "pattern")), ("text", ("setting", "tone"))):
            tastes = [run.world.tastes[a][user] for a in attributes]
            likings = [p[value[a]] / max(p) for a, p in zip(attributes, tastes)]
            assert math.isclose(found[f"utility_{m}"][n], sum(likings) / len(likings), rel_tol=1e-6)


def test_a_wrong_picture_or_text_lowers_the_right_measure_and_no_other(run, exact):
    world, names = run.world.items, list(ATTRIBUTES)
    pairs = train.draw_pairs(run, TEST, 10**6)
    item = int(pairs.item[0])
    pairs = Pairs(*(x[:1] for x in pairs))
    right = exact(pairs, train.contents(run, pairs.item))

    def with_other(same, different):
        """The values of an item that shares some attributes and differs in others, as (picture, text)."""
        def fits(row):
            return (all(row[names.index(a)] == world[item][names.index(a)] for a in same)
                    and all(row[names.index(a)] != world[item][names.index(a)] for a in different))
        return torch.tensor([n for n, row in enumerate(world) if fits(row)][:1])

    def text(**values):
        """The item's text with other values."""
        mine = {a: ATTRIBUTES[a][v] for a, v in zip(names, world[item])} | values
        return run.model.tokenizer.encode_batch([mine["tone"].format(**mine)], 40)[0]

    def lowered(images=None, tokens=None):
        content = train.contents(run, pairs.item)
        if images is not None:
            content = content._replace(images=train.contents(run, images).images)
        if tokens is not None:
            content = content._replace(tokens=tokens)
        found = exact(pairs, content)
        return {name for name in found if found[name] != right[name]}

    def another(attribute):
        return next(v for k, v in enumerate(ATTRIBUTES[attribute]) if k != world[item][names.index(attribute)])
    subject, setting = with_other(("setting",), ("subject", "colour")), with_other(("subject",), ("setting",))
    assert lowered(images=subject) - {"utility_image"} == {"prompt_image", "consistency"}
    assert lowered(images=setting) == {"consistency", "utility_image"}
    assert lowered(tokens=text(subject=another("subject"))) == {"prompt_text", "consistency"}
    assert lowered(tokens=text(setting=another("setting"))) == {"consistency", "utility_text"}
    assert lowered(tokens=text(tone=another("tone"))) == {"utility_text"}
    garbage, _ = run.model.tokenizer.encode_batch(["no such sentence"], 40)
    assert lowered(tokens=garbage) == {"prompt_text", "consistency", "utility_text", "grammatical"}
    assert exact(pairs, train.contents(run, pairs.item)._replace(tokens=garbage))["utility_text"] == 0


def test_nothing_is_measured_of_nothing(run, exact):
    """Where the judge knows all test items, `real` has no pair."""
    run.fresh[:] = False
    pairs = train.draw_pairs(run, TEST, 20)
    found = train.measures(run, train.make(run, "real", pairs, rng()), run.pairs(VALID, TEST))
    assert len(found) > 5 and all(value.shape == (0,) for value in found.values())


def made_up(run, n=9):
    """Pairs, with real contents at random as what was made."""
    pairs = train.draw_pairs(run, TEST, n)
    own, other, again = (torch.randperm(120, generator=rng(seed))[:n] for seed in (1, 2, 3))
    return Made(pairs, train.contents(run, own), train.contents(run, other), run.tokens[again])


def test_every_measure_is_taken_of_the_right_things(run, exact):
    made, likes = made_up(run), run.pairs(VALID, TEST)
    made.again[4] = 0
    texts = [run.data.texts[i] for i in run.seen.tolist()]
    made.own.tokens[5] = run.model.tokenizer.encode_batch(["a text that nobody wrote"], 40)[0][0].new_zeros(
        made.own.tokens.shape[1]).index_copy(0, torch.arange(3), torch.tensor([70, 71, 2]))
    found = train.measures(run, made, likes)
    assert all(v.dtype == torch.float64 and v.shape == (9,) for v in found.values())
    own, other = exact(made.pairs, made.own), exact(made.pairs, made.other)
    for name, value in own.items():
        assert_close(found[name], value.double())
    see = run.modules["referee"].read(made.own.images)
    for n, tokens in enumerate(made.again.tolist()):
        subject, setting, _ = train.read_text(run.model.tokenizer.decode(tokens))
        wanted = float(see[n, 0] == subject and see[n, 1] == setting) if n != 4 else math.nan
        assert found["consistency_repaired"][n] == pytest.approx(wanted, nan_ok=True)
    assert found["judge_consistency_repaired"].isnan().nonzero()[:, 0].tolist() == [4]
    for m in MODALITIES:
        a, b = own[f"utility_{m}"], other[f"utility_{m}"]
        assert found[f"swap_{m}"].tolist() == [(x > y) + (x == y) / 2 for x, y in zip(a.tolist(), b.tolist())]
    written = run.model.tokenizer.decode_batch(made.own.tokens)
    assert found["copied"].tolist() == [text in texts for text in written] and not found["copied"][5]
    judged = {name: value for name, value in train.judge_measures(run, made, likes).items()}
    assert all(torch.equal(found[n], v.double()) for n, v in judged.items() if "repaired" not in n)
    assert len(judged) == 6


def test_only_texts_of_training_count_as_copied(run, exact):
    unseen = [i for i in range(120) if i not in run.seen.tolist()]
    for n in unseen:
        run.data.texts[n] = "unheard of"
    made = made_up(run, 2)
    tokens = run.model.tokenizer.encode_batch(["unheard of", run.data.texts[int(run.seen[0])]], 40)[0]
    made = made._replace(own=made.own._replace(tokens=tokens))
    assert train.measures(run, made, run.pairs(TEST))["copied"].tolist() == [0, 1]


def test_without_known_tastes_only_the_judge_is_asked(run):
    run.world = None
    found = train.measures(run, made_up(run), run.pairs(VALID, TEST))
    assert set(found) == {"judge_consistency", "judge_consistency_repaired", "judge_swap_image", "judge_swap_text",
                          "judge_prompt_image", "judge_prompt_text", "copied"}


def test_the_judge_compares_pairs_tastes_and_prompts(run):
    """Tastes are of the likes that it is given, without the item judged."""
    made, likes, judge = made_up(run), run.pairs(VALID, TEST), run.modules["judge"]
    found = train.judge_measures(run, made, likes)
    known = set(zip(*likes.tolist()))
    with torch.no_grad():
        encode = {"image": lambda x: judge.encode_image(x.images), "text": lambda x: judge.encode_text(x.tokens)}
        items = {m: encode[m](train.contents(run, torch.arange(120))) for m in MODALITIES}
        own, other = ({m: encode[m](x) for m in MODALITIES} for x in (made.own, made.other))
        again, prompts = judge.encode_text(made.again), judge.encode_prompt(run.prompts)
    n = range(9)
    assert_close(found["judge_consistency"].double(), slow_auc(own["image"], own["text"], n), atol=1e-5, rtol=0)
    assert_close(found["judge_consistency_repaired"].double(), slow_auc(own["image"], again, n), atol=1e-5, rtol=0)
    checked = 0
    for m in MODALITIES:
        topic = run.topic[made.pairs.item].tolist()
        assert_close(found[f"judge_prompt_{m}"].double(), slow_auc(own[m], prompts, topic), atol=1e-5, rtol=0)
        everybody = items[m][likes[1]].mean(0)
        for k, (user, item) in enumerate(zip(made.pairs.user.tolist(), made.pairs.item.tolist())):
            rest = [i for u, i in known if u == user and i != item]
            assert (user, item) in known and rest
            taste = items[m][rest].mean(0) - everybody
            lead = float(F.cosine_similarity(own[m][k], taste, dim=0) - F.cosine_similarity(other[m][k], taste, dim=0))
            if abs(lead) > 1e-5:
                assert found[f"judge_swap_{m}"][k] == (lead > 0)
                checked += 1
    assert checked > 12


def test_one_pair_has_nothing_to_be_compared_with_and_one_prompt_neither(run):
    one = made_up(run, 1)
    assert train.judge_measures(run, one, run.pairs(VALID, TEST)) == {}
    assert "judge_prompt_text" in train.judge_measures(run, made_up(run, 2), run.pairs(VALID, TEST))
    run.prompts = run.prompts[:1]
    assert not [n for n in train.judge_measures(run, made_up(run, 2), run.pairs(VALID, TEST)) if "prompt" in n]


def slow_total_variation(values, truth):
    """Half the sum of differences, what cannot be read as a value that nobody likes."""
    shares = [sum(v == k for v in values) / len(values) for k in range(len(truth))]
    return (sum(abs(a - b) for a, b in zip(shares, truth)) + sum(v < 0 for v in values) / len(values)) / 2


def test_spread_is_the_loop_over_pairs_of_samples(run, exact):
    """Of some users there are fewer samples; one text cannot be read; one user has a single sample."""
    user = torch.tensor([2, 9, 4])
    item = torch.stack([torch.randperm(120, generator=rng(seed))[:12] for seed in range(3)])
    item[0, 9:], item[2, 1:] = -1, -1
    item[1, :4] = item[1, 4:8]  # the same prompts, at least
    what = torch.randint(120, (36,), generator=rng(7))
    content, judge = train.contents(run, what), run.modules["judge"]
    content.tokens[13] = torch.tensor([70, 2] + [0] * (content.tokens.shape[1] - 2))
    found = train.spread(run, user, item, content)
    see = run.modules["referee"].read(content.images).tolist()
    told = [train.read_text(text) for text in run.model.tokenizer.decode_batch(content.tokens)]
    assert told[13] == (-1, -1, -1)
    shows = {"image": {a: [row[k] for row in see] for k, a in ((1, "setting"), (2, "colour"), (3, "pattern"))},
             "text": {a: [row[k] for row in told] for k, a in ((1, "setting"), (2, "tone"))}}
    with torch.no_grad():
        emb = {"image": judge.encode_image(content.images), "text": judge.encode_text(content.tokens)}

    def mean(values):
        return sum(values) / len(values) if values else math.nan
    for g in range(3):
        rows = [12 * g + s for s in range(12) if item[g, s] >= 0]
        pairs = [(a, b) for a in rows for b in rows if a < b
                 and run.data.prompts[item[g, a % 12]] == run.data.prompts[item[g, b % 12]]]
        assert len(pairs) > 2 or g == 2
        settings = {}
        for m in MODALITIES:
            differ = {a: mean([float(v[i] != v[j]) for i, j in pairs]) for a, v in shows[m].items()}
            assert float(found[f"variety_{m}"][g]) == pytest.approx(mean(list(differ.values())), nan_ok=True)
            settings[m] = 1 - differ["setting"]
            near = [1 - slow_total_variation([v[r] for r in rows], run.world.tastes[a][int(user[g])])
                    for a, v in shows[m].items()]
            assert float(found[f"taste_{m}"][g]) == pytest.approx(mean(near), abs=1e-6)
            apart = mean([1 - float(emb[m][i] @ emb[m][j]) for i, j in pairs])
            assert float(found[f"judge_variety_{m}"][g]) == pytest.approx(apart, abs=1e-5, nan_ok=True)
        bound = math.sqrt(settings["image"] * settings["text"]) if pairs else math.nan
        assert float(found["consistency_bound"][g]) == pytest.approx(bound, nan_ok=True, abs=1e-6)
    run.world = None
    assert set(train.spread(run, user, item, content)) == {"judge_variety_image", "judge_variety_text"}


def test_total_variation_is_the_loop():
    value = torch.tensor([[0, 1, 1, 2], [2, 2, -1, -1], [-1, -1, -1, -1]])
    truth = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [1.0, 0.0, 0.0]])
    found = train.total_variation(value, torch.tensor([4, 4, 4]), truth)
    assert_close(found, torch.tensor([slow_total_variation(v, t) for v, t in zip(value.tolist(), truth.tolist())]))
    assert found[2] == 1
    fewer = train.total_variation(value[1:2], torch.tensor([2]), truth[1:2])  # where the -1 are no samples
    assert_close(fewer, torch.tensor([slow_total_variation([2, 2], truth[1].tolist())]))


def test_independent_pictures_and_texts_agree_no_more_often_than_the_bound(run, monkeypatch):
    """For any two distributions over settings, by many samples: sum_s p q <= sqrt(sum p^2 sum q^2)."""
    def spread(p, q, n=400):
        chance = np.random.default_rng(0)
        see = torch.zeros(n, 4, dtype=torch.int64)
        see[:, 1] = torch.from_numpy(chance.choice(4, n, p=p))
        told = torch.zeros(n, 3, dtype=torch.int64)
        told[:, 1] = torch.from_numpy(chance.choice(4, n, p=q))
        monkeypatch.setattr(train, "read", lambda *_: (see, told))
        monkeypatch.setattr(train, "embed", lambda *_: {})
        return float(train.spread(run, torch.tensor([0]), torch.zeros(1, n, dtype=torch.int64), (0, 0))["consistency_bound"])
    for p, q in (([1, 0, 0, 0], [0, 1, 0, 0]), ([0.25] * 4, [0.25] * 4), ([0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]),
                 ([0.7, 0.3, 0, 0], [0.7, 0.3, 0, 0]), ([0.25] * 4, [1, 0, 0, 0])):
        agree, bound = sum(a * b for a, b in zip(p, q)), spread(p, q)
        assert bound == pytest.approx(math.sqrt(sum(a * a for a in p) * sum(b * b for b in q)), abs=0.03)
        assert bound > agree - 0.03


@pytest.mark.parametrize("variant", ["real", "before_reward"])
def test_many_samples_are_for_prompts_of_the_users_test_items(run, monkeypatch, variant):
    spreads = recorded(monkeypatch, train, "spread", lambda run, user, item, content: {
        f"{name}_{len(spreads)}": item for name in ("judge_variety", "taste")})
    asked = recorded(monkeypatch, train, "make_for", lambda *_: "made")
    users = run.users[[4, 0, 11]]
    train.many_samples(run, variant, users)
    likes = pairs_of(run, TRAIN, VALID, TEST) if variant == "real" else pairs_of(run, TEST)
    for _, who, item, content in spreads:
        assert torch.equal(who, users) and item.shape == (3, 6)
        for user, row in zip(users.tolist(), item.tolist()):
            own = [i for i in row if i >= 0]
            assert own and all((user, i) in likes for i in own)
            assert variant != "real" or len(set(own)) == len(own)
    if variant == "real":
        assert any(run.fresh[item[item >= 0]].all() for _, _, item, _ in spreads)
        for _, _, item, content in spreads:
            there = (item >= 0).flatten()
            assert items_in(run, content.images[there]) == item[item >= 0].tolist()
    else:
        (_, _, item, content), = spreads
        (_, asked_variant, who, what, _), = asked
        assert content == "made" and asked_variant == variant
        assert torch.equal(who, users.repeat_interleave(6)) and torch.equal(what, item.flatten())
        assert len(set(item[0].tolist())) == 2  # both test items of the user


def test_the_judge_sees_real_samples_that_are_new_to_it_alone(run, monkeypatch):
    spreads = recorded(monkeypatch, train, "spread", lambda run, user, item, content: {
        "judge_variety_image": item[:, 0], "taste_image": item[:, 0] * 0})
    found = train.many_samples(run, "real", run.users[:3])
    judged = [item for _, _, item, _ in spreads if run.fresh[item[item >= 0]].all()]
    assert torch.equal(found["judge_variety_image"], judged[0][:, 0]) and "taste_image" in found


# ---- evaluation: the whole

@pytest.mark.parametrize("variant", train.VARIANTS)
def test_a_variant_is_measured_on_test_pairs_with_users_as_clusters(run, monkeypatch, variant):
    """best_of, which costs three times as much, on a third of the pairs and users."""
    cost = 3 if variant == "best_of" else 1
    whole = train.draw_pairs(run, TEST, 24)
    fewer = Pairs(*(x[2:] for x in whole))  # as `real` leaves some out
    made = recorded(monkeypatch, train, "make", lambda run, variant, pairs, generator: Made(
        Pairs(*(x[2:] for x in pairs)), train.contents(run, pairs.item[2:]), None, None))
    measured = recorded(monkeypatch, train, "measures", lambda run, made, likes: {"x": made.pairs.item.double()})
    many = recorded(monkeypatch, train, "many_samples", lambda run, variant, user: {"y": user.float()})
    drawn = recorded(monkeypatch, train, "draw_pairs")
    found = train.evaluate_variant(run, variant)
    (_, asked, pairs, generator), = made
    assert asked == variant and all(torch.equal(a, b[:24 // cost]) for a, b in zip(pairs, whole))
    assert drawn[0][1:] == (TEST, 24)
    (_, _, likes), = measured
    assert set(zip(*likes.tolist())) == pairs_of(run, VALID, TEST)
    values, user = found["x"]
    assert torch.equal(values, fewer.item[:24 // cost - 2].double()) and torch.equal(user, fewer.user[:24 // cost - 2])
    (_, asked, users), = many
    assert asked == variant and len(set(users.tolist())) == len(users) == math.ceil(7 / cost)
    assert set(users.tolist()) <= {u for u, _ in pairs_of(run, TEST)}
    values, user = found["y"]
    assert torch.equal(user, users) and torch.equal(values, users)
    emb, user = found["frechet_image"]
    with torch.no_grad():
        picture = run.modules["judge"].encode_image(train.to_float(run.images[fewer.item[:24 // cost - 2]]))
    assert_close(emb, picture)
    assert torch.equal(user, fewer.user[:24 // cost - 2])


def test_all_variants_get_the_same_pairs_and_users_and_the_same_chance(run, monkeypatch):
    made = recorded(monkeypatch, train, "make")
    many = recorded(monkeypatch, train, "many_samples")
    monkeypatch.setattr(train, "make_for", as_in_the_catalogue)
    for variant in ("before_reward", "after_reward"):
        train.evaluate_variant(run, variant)
    assert all(torch.equal(a, b) for a, b in zip(made[0][2], made[1][2])) and torch.equal(many[0][2], many[1][2])
    assert made[0][3].initial_seed() == made[1][3].initial_seed()


def test_the_sampled_users_are_drawn_at_random_by_the_cpu(run, monkeypatch):
    monkeypatch.setattr(train, "make", lambda run, variant, pairs, generator: Made(
        pairs, train.contents(run, pairs.item), None, None))
    monkeypatch.setattr(train, "measures", lambda *_: {})
    many = recorded(monkeypatch, train, "many_samples", lambda *_: {})
    seen, generators = [], recorded(monkeypatch, torch, "Generator")
    run.device = torch.device("cpu:0")
    run.train = replace(run.train, sampled_users=21)
    for seed in (0, 1, 2):
        run.cfg = replace(run.cfg, method=replace(run.cfg.method, seed=seed))
        train.evaluate_variant(run, "before_reward")
        seen.append(many[-1][2].tolist())
    assert all(len(set(users)) == 21 for users in seen) and len({tuple(users) for users in seen}) == 3
    assert [str(args[0]) if args else "cpu" for args in generators].count("cpu") >= 6  # pairs and users


def evaluated(run, monkeypatch, n=30):
    """evaluate() on values that are made up: found[variant][measure] = values, users."""
    users, chance = torch.arange(n) % 10, rng(1)
    found = {variant: {"consistency": (torch.rand(n, generator=chance).double(), users),
                       "judge_consistency": (torch.rand(n, generator=chance).double(), users),
                       "judge_variety_text": (3 * torch.rand(10, generator=chance).double(), torch.arange(10))}
             for variant in train.VARIANTS}
    emb = {variant: torch.randn(n, 64, generator=chance) for variant in found}
    asked = recorded(monkeypatch, train, "evaluate_variant", lambda run, variant: found[variant] | {
        "frechet_image": (emb[variant], users)})
    monkeypatch.setattr(train, "evaluate_new_users", lambda run: {"1": 2})
    return found, emb, users, asked


@pytest.mark.parametrize("known", [True, False])
def test_evaluation_gives_intervals_and_differences_pair_by_pair(run, monkeypatch, known):
    found, emb, users, asked = evaluated(run, monkeypatch)
    run.world = run.world if known else None
    frechet = recorded(monkeypatch, train, "frechet_interval", lambda *_: {"mean": 7.0})
    merit = train.evaluate(run)
    assert [variant for _, variant in asked] == list(train.VARIANTS)
    got = run.metrics["generation"]
    assert list(got) == list(train.VARIANTS) and run.metrics["new_users"] == {"1": 2}
    for variant in train.VARIANTS:
        assert set(got[variant]) == {"consistency", "judge_consistency", "judge_variety_text", "frechet_image"}
        for name, (values, user) in found[variant].items():
            assert got[variant][name] == train.summarize(name, values, user)
            assert got[variant][name]["mean"] == pytest.approx(float(values.mean()))
    differences = run.metrics["differences"]
    assert set(differences) == {"consistency", "judge_consistency", "judge_variety_text"}
    for name, wanted in differences.items():
        change = found["after_reward"][name][0] - found["before_reward"][name][0]
        assert wanted == train.interval(change, found["before_reward"][name][1])
        assert wanted["low"] < wanted["mean"] < wanted["high"]
    real = set()
    for (made, reference, group), variant in zip(frechet, train.VARIANTS, strict=True):
        assert made is emb[variant] and group is users and len(reference) == run.train.pairs
        real.add(reference.numpy().tobytes())
    with torch.no_grad():
        picture = run.modules["judge"].encode_image(train.to_float(run.images))
    nearest = torch.cdist(frechet[0][1].double(), picture.double()).min(1)
    likes = [i for _, i in pairs_of(run, TRAIN)]
    assert len(real) == 1 and nearest.values.max() < 1e-4
    assert all(run.fresh[i] and i in likes for i in nearest.indices.tolist())
    assert len(set(nearest.indices.tolist())) > 8
    name = "consistency" if known else "judge_consistency"
    was, now = (got[v][name]["mean"] for v in ("before_reward", "after_reward"))
    assert merit == f"{name} {was:.3f} before, {now:.3f} after"


def test_few_pictures_have_no_frechet_distance(run, monkeypatch):
    for n, there in ((19, False), (20, True)):
        evaluated(run, monkeypatch, n)
        monkeypatch.setattr(train, "frechet_interval", lambda *_: {"mean": 7.0})
        train.evaluate(run)
        assert ("frechet_image" in run.metrics["generation"]["real"]) == there


def test_shares_get_an_interval_that_stays_between_0_and_1_and_a_mean_cosine_does_not():
    values, user = torch.tensor([1.0, 1, 1, 1, 0]), torch.arange(5)
    assert train.summarize("judge_consistency", values, user) == train.share_interval(values, user)
    assert train.summarize("variety_text", values, user) == train.share_interval(values, user)
    assert train.summarize("judge_variety_text", values, user) == train.interval(values, user)
    assert train.interval(values, user)["high"] > 1 > train.share_interval(values, user)["high"]


# ---- people who were not in training

def first_items(run, user, k):
    """The k items that a new user liked first, of those that are history, by the clock."""
    when = dict(zip(zip(run.data.user.tolist(), run.data.item.tolist()), run.data.time.tolist()))
    mine = sorted((when[u, i], i) for u, i in zip(*run.new["history"].tolist()) if u == user)
    return {i for _, i in mine[:k]}


@pytest.mark.parametrize("known", [True, False])
def test_new_people_are_folded_in_from_their_first_items(run, monkeypatch, known):
    """32 of history, 4 of test; they are told to `generate` as their whole history says."""
    run.world = run.world if known else None
    folded = recorded(monkeypatch, run.model.gnn, "fold_in")
    ranked, before = recorded(monkeypatch, train, "rank"), copy.deepcopy(run.model.modality)
    asked = recorded(monkeypatch, train, "make_for", as_in_the_catalogue)
    found = train.evaluate_new_users(run)
    new = run.new["test"][0].unique().tolist()
    assert list(found) == ["1", "2", "5", "10", "whole history", "in training"]
    for (graph, user, item, n), k in zip(folded, (1, 2, 5, 10, 99), strict=True):
        assert graph is run.model.graph and n == 24
        for u in new:
            assert {i for v, i in zip(user.tolist(), item.tolist()) if v == u} == first_items(run, u, k)
        assert set(user.tolist()) == set(new)
    rows, last = run.model.gnn(run.model.graph), run.model.gnn.fold_in(run.model.graph, *run.new["history"], 24)
    for _, told, test in ranked:
        assert torch.equal(test, run.new["test"])
        assert all(torch.equal(told[m][1], rows[m][1]) and told[m][0].shape == (24, 12) for m in MODALITIES)
    assert not torch.equal(ranked[0][1]["text"][0], ranked[-1][1]["text"][0])
    for m, taste in run.model.modality.items():
        assert_close(taste.preference[new], last[m][new])
        assert torch.equal(taste.tokens[new], taste.quantizer.encode(last[m][new]))
        assert torch.equal(taste.preference[run.users], before[m].preference[run.users])
        assert torch.equal(taste.tokens[run.users], before[m].tokens[run.users])
    assert found["in training"]["recall@20"] == 0.25 and "recall@20_quantized" not in found["in training"]
    for name, row in found.items():
        ranks = {"recall@20"} if name == "in training" else {"recall@20", "ndcg@20", "recall@20_image", "recall@20_text"}
        exact = {"prompt_image", "prompt_text", "consistency", "grammatical", "utility_image", "utility_text"}
        assert set(row) == ranks | (exact if known else set())
    assert len(asked) == 6 * known
    for (_, variant, user, item, generator), name in zip(asked, found):
        test = pairs_of(run, TEST) if name == "in training" else set(zip(*run.new["test"].tolist()))
        assert variant == "after_reward" and set(zip(user.tolist(), item.tolist())) <= test and len(user) == 4


def test_each_new_persons_quality_is_of_the_tokens_of_that_history(run, monkeypatch):
    """The pictures and texts for k = 1 come from other tokens than those for the whole history."""
    seen = recorded(monkeypatch, train, "make_for", lambda run, variant, user, item, _: (
        tokens.append(run.model.user_tokens(user)), train.contents(run, item))[1])
    tokens = []
    train.evaluate_new_users(run)
    folded = [run.model.gnn.fold_in(run.model.graph, *torch.tensor(
        [(u, i) for u in run.new["test"][0].unique().tolist() for i in first_items(run, u, k)]).T, 24) for k in (1, 99)]
    for told, p in zip((tokens[0], tokens[4]), folded):
        for m, taste in run.model.modality.items():
            assert torch.equal(told[m], taste.quantizer.encode(p[m])[run.new["test"][0]])
    values = train.exact_measures(run, *run.new["test"], train.contents(run, run.new["test"][1]))
    wanted = train.summarize("utility_text", values["utility_text"], run.new["test"][0])
    assert train.evaluate_new_users(run)["5"]["utility_text"] == wanted and len(seen) == 12


def test_of_many_new_pairs_some_are_enough_and_nobody_new_is_no_error(run, monkeypatch):
    asked = recorded(monkeypatch, train, "make_for", as_in_the_catalogue)
    run.train = replace(run.train)
    object.__setattr__(run.train, "pairs", 3)
    train.evaluate_new_users(run)
    assert [len(user) for _, _, user, *_ in asked] == [2] * 6
    assert torch.equal(asked[0][2], run.new["test"][0][::2]) and torch.equal(asked[0][3], run.new["test"][1][::2])
    run.new = {name: pairs[:, :0] for name, pairs in run.new.items()}
    assert train.evaluate_new_users(run) == {}


# ---- every training step waits for nothing

class OneStep(Exception):
    """A training step has been made."""


@pytest.mark.parametrize("stage", [s for s in train.STAGES if s not in ("features", "evaluation", "report")])
def test_training_steps_never_look_at_a_number(run, monkeypatch, stage):
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
    monkeypatch.setattr(train.Run, "generator", lambda *_, **__: None)
    run.modules.to("meta")
    run.model.to("meta")
    run.model.catalogue.max_tokens = 8  # within longer texts sampling looks now and then whether all have ended
    run.device = torch.device("meta")
    for name in ("tokens", "images", "prompt", "liked", "seen", "users"):
        setattr(run, name, getattr(run, name).to("meta"))
    run.learns = {name: items.to("meta") for name, items in run.learns.items()}
    run.tables = {m: table.to("meta") for m, table in run.tables.items()}
    run.stage, run.step, run.train = stage, 0, train.TrainConfig(referee_pictures=16)
    with pytest.raises(OneStep):
        train.STAGES[stage](run)


# ---- data without any structure: all is chance

def test_where_nothing_is_to_be_found_nothing_is_found(noise):
    """Noise for pictures, random words, prompts and likes, twice. Each measure whose chance level
    is 1/2 has it in its interval; since there are 60 intervals of 95 %: nine tenths have, and all
    within twice the half-width. The generators are trained briefly: texts learnt by heart fit their
    prompts in the judge's eyes, who has learnt half of them, too. The judge is not: it would know
    the real items that it has learnt from."""
    inside, far = [], {}
    for n, run in enumerate(noise):
        found = json.loads((run / "metrics.json").read_text())["generation"]
        measures = {(variant, name, n): x for variant, all_of in found.items() for name, x in all_of.items()
                    if name.startswith("judge_") and "variety" not in name}
        assert len(measures) == 30 and {variant for variant, *_ in measures} == set(train.VARIANTS)
        for name, x in measures.items():
            middle, half = (x["low"] + x["high"]) / 2, (x["high"] - x["low"]) / 2
            assert half < 0.2, f"{name}: too few pairs to tell"
            inside.append(abs(middle - 0.5) <= half)
            if abs(middle - 0.5) > 2 * half:
                far[name] = x
    assert not far
    assert sum(inside) >= 0.9 * len(inside) == 54
