"""train.py: stickers and their referee, the loop, a run's files and report, kills, mistakes."""
import contextlib
import copy
import csv
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import kill_resume
import pytest
import torch
from conftest import PATIENCE, ROOT, Fork, spawn
from kill_resume import differences
from PIL import Image
from test_report import Page, check_harmless
from torch import nn
from torch.testing import assert_close

import train
from dppmg import MODALITIES, CheckpointError, Dataset, read_checkpoint
from train import ATTRIBUTES, SEEN, SETTINGS, SUBJECTS, TONES, Referee, TrainConfig, read_text


def train_referee(run, folder):
    """A referee that learns with the default settings, into a folder."""
    run = train.Run(run.cfg, TrainConfig(), run.data, run.world, folder, run.device)
    run.stage = "referee"
    train.train_referee(run)
    torch.save(run.modules["referee"].state_dict(), run.out / "referee.pt")


@pytest.fixture(scope="module", autouse=True)
def processes(smoke, run, tmp_path_factory):
    """What takes long, begun at once beside the other tests, which come first: a run that is killed
    again and again; a referee that learns with the default settings."""
    folders = [tmp_path_factory.mktemp(name) for name in ("chain", "referee")]
    chain = ["--chain", "--reference", str(smoke), "--out", str(folders[0])]
    begun = {"chain": Fork(lambda: kill_resume.main(chain), folders[0]),
             "referee": Fork(lambda: train_referee(run, folders[1]), folders[1])}
    yield folders[1], begun
    for process in begun.values():
        process.kill()


@pytest.fixture(autouse=True)
def restored_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def reopen(smoke, folder, *flags):
    """The smoke run, all stages done, in a copy of its folder that may be changed."""
    shutil.copytree(smoke, folder, ignore=shutil.ignore_patterns("metrics.json"))
    return train.open_run(*train.parse_arguments(["--resume", "--out", str(folder), *flags]))


@pytest.fixture(scope="module")
def run(smoke, tmp_path_factory):
    """To look at; tests that change it take `spare`."""
    return reopen(smoke, tmp_path_factory.mktemp("reopened") / "run")


@pytest.fixture
def spare(run, tmp_path):
    """The same in a folder of its own, opened."""
    clone = copy.deepcopy(run)
    clone.out = shutil.copytree(run.out, tmp_path / "run")
    return clone


@pytest.fixture
def no_end(monkeypatch):
    """What follows the reward costs nothing and says nothing."""
    stages = list(train.STAGES)
    for stage in stages[stages.index("evaluation"):]:
        monkeypatch.setitem(train.STAGES, stage, lambda run: "skipped: café")


def undo_the_end(run):
    """Back to where the evaluation begins."""
    stages = list(train.STAGES)
    run.done = stages[:stages.index("evaluation")]
    run.save()


def main(*arguments):
    """Exit status of the command line."""
    try:
        return train.main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code


def digest(folder):
    """What each file of a folder holds; whose it is, in `lock`, is no content."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def hashes(module):
    """A hash of every tensor."""
    return {name: hashlib.sha256(x.numpy().tobytes()).hexdigest() for name, x in module.state_dict().items()}


def alter(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


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
    cfg, worlds = TrainConfig(items=40, users=6, interactions=10), []
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


# ---- the loop

def toy(run):
    """A small layer as a stage of its own."""
    torch.manual_seed(0)
    run.modules["toy"], run.stage, run.step, run.log = nn.Linear(4, 4), "toy", 0, []
    return run


def toy_losses(net, generator):
    x = torch.randn(8, 4, generator=generator) * 4 * torch.rand(1, generator=generator)
    return {"loss": (net(x) - x.flip(1)).square().mean(), "size": net.weight.square().sum()}


def toy_stage(run, stop_at=None):
    """20 steps; a kill comes within step `stop_at`."""
    net = run.modules["toy"]

    def losses(generator):
        if run.step == stop_at:
            raise KeyboardInterrupt
        return toy_losses(net, generator)
    train.fit(run, train.adamw(net, 0.05, 0.1), 20, losses)


def test_the_loop_is_plain_gradient_descent_with_its_schedule_and_clipping(spare):
    """Written out: AdamW, weights decay and biases do not, gradients of at most norm 1."""
    run, seen = toy(spare), []
    net, slow = run.modules["toy"], nn.Linear(4, 4)
    slow.load_state_dict(net.state_dict())
    groups = [{"params": [slow.weight], "weight_decay": 0.1}, {"params": [slow.bias], "weight_decay": 0.0}]
    optimizer, clipped = torch.optim.AdamW(groups, 0.05, betas=(0.9, 0.99)), 0
    for step in range(20):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * min(1, (step / 20 + 1e-3) / 0.05, (1 - step / 20) / 0.95)
        parts = toy_losses(slow, run.generator("toy", step))
        seen.append(parts["loss"].item())
        optimizer.zero_grad()
        parts["loss"].backward()
        clipped += nn.utils.clip_grad_norm_(slow.parameters(), 1.0) > 1
        optimizer.step()
    assert 0 < clipped < 20
    toy_stage(run)
    for name, value in slow.state_dict().items():
        assert_close(net.state_dict()[name], value)
    assert [row[1] for row in run.log if row[2] == "loss"] == list(range(1, 21))
    assert_close(torch.tensor([row[3] for row in run.log if row[2] == "loss"]), torch.tensor(seen))


@pytest.mark.parametrize("x, warm, hold, want", [
    (0.0, 0.05, 0.05, 0.02), (0.024, 0.05, 0.05, 0.5), (0.05, 0.05, 0.05, 1.0), (0.525, 0.05, 0.05, 0.5),
    (0.3, 0.05, 0.5, 1.0), (0.5, 0.05, 0.5, 1.0), (0.75, 0.05, 0.5, 0.5), (0.049, 0.1, 0.7, 0.5),
    (0.7, 0.1, 0.7, 1.0), (0.85, 0.1, 0.7, 0.5), (0.999, 0.05, 0.0, 0.001)])
def test_the_learning_rate_rises_stays_and_falls(x, warm, hold, want):
    assert train.ramp(x, warm, hold) == pytest.approx(want)
    assert train.ramp(x) == train.ramp(x, 0.05, 0.05)


def test_a_long_stage_logs_fifty_times_and_at_its_end(spare):
    net = toy(spare).modules["toy"]
    train.fit(spare, train.adamw(net, 0.0), 120, lambda _: {"loss": net.weight.sum()})
    assert [row[1] for row in spare.log] == list(range(2, 121, 2))
    spare.step, spare.log = 0, []
    train.fit(spare, train.adamw(net, 0.0), 101, lambda _: {"loss": net.weight.sum()})
    assert [row[1] for row in spare.log] == [*range(2, 101, 2), 101]


def test_checkpoints_come_as_often_as_they_shall(spare, monkeypatch):
    saved, clock = [], iter(range(10**6))     # a second passes at each look
    net = toy(spare).modules["toy"]
    monkeypatch.setattr(train, "clocks", lambda: np.array([float(next(clock)), 0.0]))
    spare.train, spare.clock = replace(spare.train, checkpoint_seconds=6.5), np.zeros(2)

    def save(optimizer):
        saved.append(spare.step)
        spare.clock = train.clocks()
        assert optimizer is not None
    monkeypatch.setattr(spare, "save", save)
    train.fit(spare, train.adamw(net, 0.0), 20, lambda _: {"loss": net.weight.sum()})
    assert saved == [8, 15]


def test_twenty_steps_are_ten_and_ten_after_a_kill(smoke, tmp_path):
    names = ("whole", "begun", "resumed")
    whole, begun, resumed = (toy(reopen(smoke, tmp_path / name)) for name in names)
    toy_stage(whole)
    begun.train = replace(begun.train, checkpoint_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        toy_stage(begun, stop_at=10)
    shutil.copy(begun.out / "checkpoint.pt", resumed.out / "checkpoint.pt")
    resumed.train = begun.train
    resumed.restore()
    assert (resumed.stage, resumed.step) == ("toy", 10)
    toy_stage(resumed)
    assert hashes(whole.modules) == hashes(resumed.modules) and whole.log == resumed.log
    assert len(whole.log) == 40


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
    with pytest.raises(FloatingPointError, match=message):
        train.fit(spare, train.adamw(spare.modules["toy"], 0.01), 9, losses, after=after)
    assert digest(spare.out) == before
    with pytest.raises(FloatingPointError, match="is not finite; the last good checkpoint is kept"):
        weight.data.fill_(math.nan)
        spare.save()
    assert digest(spare.out) == before


def test_each_seed_stage_and_step_has_a_stream_of_its_own(run):
    other = train.Run(replace(run.cfg, method=replace(run.cfg.method, seed=1)), replace(run.train, new_users=0),
                      run.data, run.world, run.out, run.device)
    seeds = [of.seed(stage, step) for of in (run, other) for stage in ("gnn", "text", "gnn/1", "1")
             for step in (0, 1, 11)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert run.generator("gnn", 11).initial_seed() == run.seed("gnn", 11)


# ---- what a run leaves

VARIANTS = {"real", "unpersonalized", "before_reward", "after_reward", "best_of"}
JUDGED = {"judge_swap_image", "judge_swap_text", "judge_consistency", "judge_consistency_repaired",
          "judge_prompt_image", "judge_prompt_text", "judge_variety_image", "judge_variety_text", "copied"}
EXACT = {"prompt_image", "prompt_text", "consistency", "consistency_repaired", "consistency_bound",
         "utility_image", "utility_text", "taste_image", "taste_text", "variety_image", "variety_text",
         "grammatical", "swap_image", "swap_text"}


def strict(path):
    """JSON as every parser reads it."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def intervals(value):
    """All dicts of mean, low and high within, that were measured."""
    if isinstance(value, dict) and "mean" in value:
        yield from [value] * (None not in value.values())
    elif isinstance(value, dict):
        for inner in value.values():
            yield from intervals(inner)


def known(measured):
    """What was measured; there may be too little to measure."""
    return {name: x for name, x in measured.items() if None not in x.values() and name != "frechet_image"}


def test_a_run_leaves_its_files_and_says_what_it_did(smoke):
    assert {p.name for p in smoke.iterdir()} == {"config.json", "checkpoint.pt", "lock", "log.csv", "metrics.json",
                                                 "report.html", "stickers"}
    printed = (smoke.parent / "printed.txt").read_text()
    for stage in train.STAGES:
        assert re.search(rf"^{stage} +\d+\.\d s   \S.*$", printed, re.MULTILINE), stage
    config = strict(smoke / "config.json")
    assert config["settings"]["gnn"]["steps"] == 30 and config["data"] is None
    assert len(config["fingerprint"]) == 64
    machine = {"python": platform.python_version(), "torch": torch.__version__,
               "numpy": np.__version__, "device": "cpu", "threads": 1}
    assert config["machine"] == machine


def test_metrics_are_those_of_the_design(smoke):
    found = strict(smoke / "metrics.json")
    assert {"dataset", "seed", "device", "threads", "seconds", "cpu_seconds", "peak_memory_mb", "stage1",
            "codebook", "generation", "differences", "new_users"} <= set(found)
    assert (found["dataset"], found["seed"], found["device"], found["threads"]) == ("stickers", 0, "cpu", 1)
    for clock in ("seconds", "cpu_seconds"):
        times = found[clock]
        assert set(train.STAGES) <= set(times) and all(t >= 0 for t in times.values())
        total = sum(t for stage, t in times.items() if stage != "total")
        assert math.isclose(times["total"], total, abs_tol=0.2)
    assert 100 < found["peak_memory_mb"] < 3000
    names = {"recall@20", "ndcg@20", "recall@20_image", "recall@20_text", "recall@20_quantized"}
    assert names == set(found["stage1"]) and all(0 <= x <= 1 for x in found["stage1"].values())
    for m in MODALITIES:
        health = found["codebook"][m]
        assert len(health["usage"]) == len(health["perplexity"]) == 2
        assert {"explained", "collision_rate"} <= set(health)
        assert all(0 < u <= 1 for u in health["usage"]) and all(1 <= p <= 8 for p in health["perplexity"])
    assert set(found["generation"]) == VARIANTS
    for variant, measured in found["generation"].items():
        assert set(measured) - {"frechet_image"} == JUDGED | EXACT, variant
        most = {name: 2 if "judge_variety" in name else 1 for name in JUDGED | EXACT}  # 1 - cosine
        assert all(0 <= x["mean"] <= most[name] for name, x in known(measured).items()), variant
    assert all("frechet_image" in found["generation"][v] for v in ("before_reward", "after_reward"))
    assert set(found["differences"]) == JUDGED | EXACT
    assert all(x["low"] - 1e-9 <= x["mean"] <= x["high"] + 1e-9 for x in intervals(found))
    assert len(list(intervals(found))) > 100
    real, null = found["generation"]["real"], found["generation"]["unpersonalized"]
    assert real["prompt_text"]["mean"] == real["grammatical"]["mean"] == 1
    for m in MODALITIES:        # nobody's tokens: chance, within five times its 95 % interval
        swap = null[f"swap_{m}"]
        assert abs(swap["mean"] - 0.5) <= 2.5 * (swap["high"] - swap["low"])
    assert {"1", "2", "5", "10", "whole history", "in training"} == set(found["new_users"])
    for row in found["new_users"].values():
        assert {"recall@20", "ndcg@20", "utility_image", "utility_text", "consistency"} <= set(row)


def test_what_does_not_exist_is_null_in_json(tmp_path):
    values = {"a": math.nan, "b": [1, 2.5, math.inf], "c": {"d": (-math.inf, True, None, "NaN")}}
    train.write_json(tmp_path / "x.json", values)
    assert strict(tmp_path / "x.json") == {"a": None, "b": [1, 2.5, None], "c": {"d": [None, True, None, "NaN"]}}


def test_the_log_can_be_read(smoke):
    with open(smoke / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {"stage", "step", "name", "value"}
    assert all(math.isfinite(float(row["value"])) and int(row["step"]) >= 0 for row in rows)
    quiet = {"features", "evaluation", "report"}
    assert {row["stage"] for row in rows} == set(train.STAGES) - quiet
    reward = {row["name"] for row in rows if row["stage"] == "reward"}
    assert {"consistency", "s_image", "s_text", "kl_image", "kl_text", "valid_consistency",
            "valid_utility_image", "valid_judge_consistency"} <= reward


# ---- interrupted, hostile, killed

FEW = [x for name in ("image-ae", "gnn", "vq", "text", "image", "reward-scorer", "referee")
       for x in (f"--{name}-steps", "4")] + ["--reward-rounds", "2", "--pairs", "20", "--samples", "4"]


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


def interrupt_at(monkeypatch, stage, step, number):
    """A signal when the randomness of this step is asked for."""
    original = train.Run.generator

    def generator(self, *args, **kwargs):
        if (args + (0,))[:2] == (stage, step):
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)
    monkeypatch.setattr(train.Run, "generator", generator)


def test_interrupts_save_and_say_how_to_go_on_and_a_hostile_folder_harms_nothing(tmp_path, capsys, monkeypatch):
    """Ctrl-C, and what a scheduler sends (SIGTERM); the folder of the data moves meanwhile."""
    data, moved, out = tmp_path / "<b>&'data'", tmp_path / "elsewhere" / "<b>&'data'", tmp_path / "run"
    hostile_folder(data)
    arguments = ["--smoke", "--data", data, *FEW, "--out", out]
    for stage, step, number in (("gnn", 2, signal.SIGTERM), ("text", 1, signal.SIGINT),
                                ("evaluation", 0, signal.SIGTERM)):
        with monkeypatch.context() as patch:
            interrupt_at(patch, stage, step, number)
            assert main(*arguments) == 130
        printed, errors = capsys.readouterr()
        assert errors == f"interrupted; go on with: python train.py --resume --out {out}\n"
        saved = read_checkpoint(out / "checkpoint.pt")
        at = (stage, step + 1) if stage != "evaluation" else ("reward", 2)
        assert (saved["stage"], saved["step"]) == at
        assert saved["done"] == list(train.STAGES)[:list(train.STAGES).index(stage)]
        arguments = ["--resume", "--out", out]
        if data.exists() and stage == "text":
            moved.parent.mkdir()
            data.rename(moved)
            assert main(*arguments) == 2 and "does not exist" in capsys.readouterr().err
            arguments = ["--resume", "--data", moved, "--out", out]
    assert main(*arguments) == 0
    printed, errors = capsys.readouterr()
    assert errors == "" and "evaluation" in printed and "autoencoder" not in printed
    found = strict(out / "metrics.json")
    assert all(set(measured) - {"frechet_image"} == JUDGED for measured in found["generation"].values())
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
        checkpoint["modules"][f"model.{name}"].view(torch.int32).view(-1)[5:6].bitwise_xor_(1)
        torch.save(checkpoint, copy / "checkpoint.pt")
    copy = shutil.copytree(smoke, tmp_path / "copy")
    score = 'recall@20": 0'
    changes = {"checkpoint/modules/model.text.null": lambda: flip("text.null"),
               "checkpoint/modules/model.modality.image.tokens": lambda: flip("modality.image.tokens"),
               "metrics/stage1/recall@20": lambda: alter(copy / "metrics.json", score, score[:-1] + "1"),
               "log": lambda: alter(copy / "log.csv", "gnn,30", "gnn,31"),
               "files": lambda: (copy / ".checkpoint.pt.1.tmp").write_text("")}
    for name, change in changes.items():
        for path in (path for path in smoke.iterdir() if path.is_file()):
            shutil.copy(path, copy)
        change()
        found = differences(smoke, copy)
        assert found and all(x.startswith(name) for x in found), (name, found)
    (copy / ".checkpoint.pt.1.tmp").unlink()
    assert differences(smoke, copy) == []


# ---- mistakes

@pytest.mark.parametrize("arguments, message", [
    (["--gnn-lrr", "1"], "unknown flag --gnn-lrr: known are --gnn-lr"),
    (["--gnn-lr", "nan"], "--gnn-lr nan: need a finite float >= 0"),
    (["--image-size", "33"], "--image-size 33: need a multiple of 8"),
    (["--items", "1"], "--items 1: need a finite int >= 16"), (["--users", "5"], "--users 5: need"),
    (["--pairs", "2"], "--pairs 2: need a finite int >= 20"), (["--samples", "1"], "--samples 1: need"),
    (["--referee-pictures", "3"], "--referee-pictures 3: need a finite int >= 16"),
    (["--interactions", "9"], "--interactions 9: need a finite int >= 10 and <= 80"),
    (["--interactions", "1000"], "--interactions 1000: need a finite int >= 10 and <= 80"),
    (["--new-users", "0.6"], "--new-users 0.6: need a finite float >= 0 and <= 0.5"),
    (["--best-of", "0"], "--best-of 0: need"), (["--sampled-users", "0"], "--sampled-users 0: need"),
    (["--image-eta", "0"], "--image-eta 0.0: need > 0, or --reward-rounds 0"),
    (["--reward-lambda-c", "inf"], "--reward-lambda-c inf"), (["--new-users", "nan"], "--new-users nan"),
    (["--text-width", "x"], "invalid int value: 'x'"), (["--seed", "-1"], "--seed -1: need"),
    (["--checkpoint-seconds", "inf"], "--checkpoint-seconds inf: need"),
    (["--device", "gpu"], "device gpu: not to be had here"), (["--data", "nowhere"], "nowhere: does not exist"),
    (["--resume"], "--resume: name a run that was begun, with --out"),
    (["--resume", "--out", "nowhere"], "--resume: name a run that was begun"),
    (["--out", "file"], "--out file: exists and holds no config.json of a run"), (["--out", "file/below"], "file/below"),
    (["--out", "full"], "--out full: exists and holds no config.json of a run"),
    (["--out", "odd"], "--out odd: exists and holds no config.json of a run"),
    (["--resume", "--out", "odd"], "--out odd: exists and holds no config.json"), (["stray"], "stray")])
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


def test_no_setting_may_be_nan_or_infinite(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = train.settings(train.PARTS)     # from the source: slow
    monkeypatch.setattr(train, "settings", lambda parts: known)
    for group, name, field, _ in known:
        for value in ("nan", "inf", "-inf", "1e999") if isinstance(field.default, float) else ():
            flag = train.flag_of(group, name)
            assert main("--smoke", f"{flag}={value}") == 2
            errors = capsys.readouterr().err
            assert errors.count("\n") == 1 and f"{flag} {float(value)}: need a finite float" in errors
    assert os.listdir(tmp_path) == []


def test_too_little_data_is_refused_before_anything_is_learnt(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for item in "abcdef":
        Image.new("RGB", (8, 8), "red").save(data / "images" / f"{item}.png")
    (data / "items.csv").write_text("item,text\n" + "".join(f"{i},item {i}\n" for i in "abcdef"))
    likes = "".join(f"{user},{item}\n" for user in "xy" for item in "abcdef")
    (data / "interactions.csv").write_text("user,item\n" + likes)
    for out in (["--out", "run"], []):
        assert main("--smoke", "--data", data, *out) == 2
        assert "2 users to test on (need 3)" in capsys.readouterr().err and os.listdir(".") == ["data"]


def test_help_names_every_setting(capsys):
    assert main("--help") == 0
    words = capsys.readouterr().out
    for group, name, field, text in train.settings(train.PARTS):
        assert re.search(rf"^  {train.flag_of(group, name)}\b", words, re.MULTILINE), name
        assert text, f"{group}.{name} has no help"
    assert all(flag in words for flag in ("--data", "--out", "--resume", "--smoke", "--device"))


def test_flags_reach_the_settings():
    flags = ["--gnn-dim", "12", "--seed", "3", "--text-width", "48", "--users", "9", "--no-bf16"]
    _, given = train.parse_arguments(flags)
    assert given["gnn"] == {"dim": 12} and given["method"] == {"seed": 3, "bf16": False}
    assert given["text"] == {"width": 48} and given["image"] == {} and given["train"] == {"users": 9}


# ---- whose folder is it?

@pytest.mark.parametrize("arguments", [["--smoke"], ["--resume"], ["--smoke", "--gnn-steps", "31"]])
def test_a_finished_run_is_not_touched(smoke, capsys, arguments):
    before = digest(smoke)
    assert main(*arguments, "--out", smoke) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "this run is finished; choose another" in errors
    assert digest(smoke) == before


@pytest.mark.parametrize("arguments, message", [
    (["--smoke", "--gnn-steps", "31"], "was begun with another --gnn-steps; choose another --out"),
    ([], "was begun with another --"), (["--resume", "--text-lr", "0.5"], "was begun with another --text-lr"),
    (["--smoke", "--data", "."], "was begun with another --data"),
    (["--resume", "--data", "."], "was begun with another --data")])
def test_another_configurations_run_is_not_touched(spare, capsys, arguments, message):
    before = digest(spare.out)
    assert main(*arguments, "--out", spare.out) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and re.search(message, errors) and digest(spare.out) == before


@pytest.mark.parametrize("arguments", [["--smoke"], ["--resume"], ["--resume", "--seed", "0"]])
def test_what_equals_the_run_that_is_there_goes_on(spare, capsys, no_end, arguments):
    undo_the_end(spare)
    trained = read_checkpoint(spare.out / "checkpoint.pt")["model"]
    assert main(*arguments, "--out", spare.out) == 0
    printed, errors = capsys.readouterr()
    assert errors == "" and "skipped" in printed and "reward " not in printed
    model = read_checkpoint(spare.out / "checkpoint.pt")["model"]
    assert all(torch.equal(x, model[name]) for name, x in trained.items())
    assert (spare.out / "metrics.json").exists()


def test_data_that_changed_since_is_noticed(spare, capsys):
    alter(spare.out / "stickers" / "interactions.csv", "u000,s", "u001,s")
    before = digest(spare.out)
    assert main("--resume", "--out", spare.out) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "not of this run" in errors and "other settings or data" in errors
    assert digest(spare.out) == before


def test_another_machine_costs_one_line_and_no_run(spare, capsys, no_end):
    undo_the_end(spare)
    path = spare.out / "config.json"
    config = json.loads(path.read_text())
    for machine, lines in ((config["machine"] | {"torch": "1.0"}, 1), (config["machine"], 0)):
        path.write_text(json.dumps(config | {"machine": machine}))
        (spare.out / "metrics.json").unlink(missing_ok=True)
        assert main("--resume", "--out", spare.out) == 0
        printed = capsys.readouterr().out
        assert len(re.findall("^note: begun on .*1.0", printed, re.MULTILINE)) == lines
    assert strict(path) == config


def test_settings_that_were_edited_into_nonsense_cost_one_line(spare, capsys):
    config = json.loads((spare.out / "config.json").read_text())
    for group, value in (("gnn", config["settings"]["gnn"] | {"dim": "wide"}), ("gnn", 3), ("vq", {"size": 3}),
                         ("text", config["settings"]["text"] | {"heads": 7})):
        settings = config["settings"] | {group: value}
        (spare.out / "config.json").write_text(json.dumps(config | {"settings": settings}))
        assert main("--resume", "--out", spare.out) == 2
        errors = capsys.readouterr().err
        assert re.fullmatch("train.py: error: --out .*: exists and holds no config.json of a run .*\n", errors)


@pytest.mark.parametrize("name, value", [("modules", 3), ("modules", {"judge": {}}), ("seconds", None),
                                         ("tables", None), ("done", None), ("fingerprint", "0" * 64)])
def test_a_checkpoint_of_something_else_does_not_fit(spare, name, value):
    path = spare.out / "checkpoint.pt"
    checkpoint = read_checkpoint(path)
    del checkpoint[name]
    torch.save(checkpoint if value is None else checkpoint | {name: value}, path)
    with pytest.raises(CheckpointError, match="checkpoint.pt: not of this run") as caught:
        spare.restore()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flags", [["--gnn-lr", "0.5"], ["--pairs", "41"]])
def test_another_runs_checkpoint_is_refused(smoke, tmp_path, capsys, flags):
    """Even where its tensors would fit: of other settings of the method, or of training."""
    arguments = train.parse_arguments(["--smoke", *flags, "--out", str(tmp_path / "run")])
    run = train.open_run(*arguments)
    shutil.copy(smoke / "checkpoint.pt", run.out)
    before = digest(run.out)
    assert main("--resume", "--out", run.out) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "checkpoint.pt: not of this run" in errors
    assert digest(run.out) == before


def together(n, work):
    """What work(k) says, in n processes that begin it at the same moment."""
    (wait, go), readers, children = os.pipe(), [], []
    for k in range(n):
        reader, writer = os.pipe()
        readers.append(reader)
        children.append(os.fork())
        if children[-1] == 0:
            os.close(go)
            os.read(wait, 1)  # until the last writer of it is closed
            try:
                said = work(k)
            except ValueError as error:
                said = f"error: {error}"
            os.write(writer, str(said).encode())
            os.close(writer)
            os._exit(0)
        os.close(writer)
    os.close(wait), os.close(go)
    said = [os.fdopen(reader).read() for reader in readers]
    for child in children:  # not just any, for others may run in the background
        os.waitpid(child, 0)
    return said


def test_processes_that_start_together_choose_different_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = together(4, lambda k: "\n".join(str(train.new_folder("stickers")) for _ in range(25)))
    names = sorted(name for some in chosen for name in some.split())
    assert names == sorted(["runs/stickers"] + [f"runs/stickers-{n}" for n in range(2, 101)])


def test_of_processes_that_claim_a_new_folder_together_one_gets_it(tmp_path):
    out = tmp_path

    def claim(k):
        train.lock(out)
        time.sleep(0.3)  # train in it
        return "mine"
    for n in range(5):
        (out := tmp_path / str(n)).mkdir()
        said = together(4, claim)
        assert said.count("mine") == 1, said
        assert all(re.match("mine|error: --out .* trains in it", x) for x in said), said


def test_a_folder_belongs_to_the_process_that_trains_in_it_until_it_ends(spare, capsys):
    undo_the_end(spare)
    before = digest(spare.out)
    reader, writer = os.pipe()
    if not (child := os.fork()):
        train.lock(spare.out)
        os.write(writer, b"mine")
        time.sleep(600)
    assert os.read(reader, 4) == b"mine"
    assert main("--resume", "--out", spare.out) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and f"--out {spare.out}: process {child} trains in it" in errors
    assert digest(spare.out) == before
    os.kill(child, signal.SIGKILL)  # it has no chance to tidy up
    os.waitpid(child, 0)
    train.lock(spare.out)
    assert (spare.out / "lock").read_text() == str(os.getpid())
    train.lock(spare.out)  # one's own is no obstacle


def test_a_lock_that_is_left_is_given_to_one_of_those_who_come_together(tmp_path):
    def claim(k):
        train.lock(tmp_path)
        time.sleep(0.2)
        return "mine"
    for left in ("", "7", "123456789012345678901234", "nonsense"):
        (tmp_path / "lock").write_text(left)
        assert together(3, claim).count("mine") == 1


# ---- the machine

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


@pytest.mark.parametrize("name", ["config.json", "checkpoint.pt", "log.csv", "metrics.json"])
def test_a_full_disk_costs_one_line_and_the_earlier_files_stay(spare, capsys, monkeypatch, no_end, name):
    undo_the_end(spare)
    before = digest(spare.out)
    with monkeypatch.context() as patch:
        full_disk(patch, name)
        assert main("--resume", "--out", spare.out) == 2
    errors, after = capsys.readouterr().err, digest(spare.out)
    assert errors.count("\n") == 1 and re.search("No space left on device|disk full", errors)
    assert after.get(name) == before.get(name) and set(after) == set(before)  # no *.tmp, no metrics.json
    if name in ("config.json", "checkpoint.pt"):
        assert after == before
    assert main("--resume", "--out", spare.out) == 0


def test_a_full_disk_does_not_harm_the_report(run, tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("the old one")
    monkeypatch.setattr(run, "out", tmp_path)
    full_disk(monkeypatch, "report.html")
    with pytest.raises(OSError, match="No space left on device"):
        train.write_report(run)
    assert os.listdir(tmp_path) == ["report.html"] and (tmp_path / "report.html").read_text() == "the old one"


TINY = ["--items", "24", "--users", "6", "--interactions", "10"]


def test_the_least_that_the_settings_allow_is_enough_for_a_run(tmp_path):
    flags = ["--smoke", "--items", "20", "--users", "6", "--interactions", "10", "--new-users", "0.5"]
    run = train.open_run(*train.parse_arguments([*flags, "--out", str(tmp_path / "run")]))
    assert len(run.users) == 3 and run.new["test"].shape[1] == 3


@pytest.mark.parametrize("name", ["config.json", "s0007.png", "items.csv", "interactions.csv"])
def test_a_disk_that_is_full_from_the_start_leaves_what_can_be_resumed_or_nothing(tmp_path, capsys, monkeypatch, name):
    full_disk(monkeypatch, name)
    assert main("--smoke", *TINY, "--out", tmp_path / "run") == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "No space left on device" in errors
    assert not list(tmp_path.rglob(".*")) and not list(tmp_path.rglob(name))
    monkeypatch.undo()
    if name != "config.json":
        run = train.open_run(*train.parse_arguments(["--resume", "--out", str(tmp_path / "run")]))
        assert len(list((run.out / "stickers" / "images").iterdir())) == 24


TWICE = """if True:
    import sys, torch, train
    torch.set_num_threads(2)
    for out in sys.argv[1:]:
        flags = ["--smoke", "--image-ae-steps", "1", "--gnn-batch", "2048", "--out", out]
        train.train_all(train.open_run(*train.parse_arguments(flags)), list(train.STAGES)[:4])"""


def test_on_two_threads_too_a_run_is_repeated_to_the_bit(tmp_path):
    """Torch may add up the rows of a gradient in whatever order its threads come to them."""
    process = spawn("-c", TWICE, str(tmp_path / "a"), str(tmp_path / "b"), cwd=ROOT)
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, printed + errors
    a, b = ((tmp_path / name / "log.csv").read_text() for name in "ab")
    assert a == b and "codebook,30" in a


def test_a_disk_that_is_nearly_full_is_noticed_before_training(tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: usage._replace(free=150 * 2**20))
    assert main("--smoke", *TINY, "--out", tmp_path / "run") == 2
    assert re.fullmatch(r"train.py: error: \S+: 150 MB are free .*\n", capsys.readouterr().err)


def test_what_a_killed_run_left_half_written_is_removed(spare):
    (spare.out / ".checkpoint.pt.7.tmp").write_text("half")
    train.open_run(*train.parse_arguments(["--resume", "--out", str(spare.out)]))
    assert not list(spare.out.glob(".*"))


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


ODD_MACHINE = """if True:
    import sys
    sys.modules["resource"] = None  # Windows has none
    import train
    try:
        train.main(["--help"])
    except SystemExit as stop:
        assert stop.code == 0
    stages = list(train.STAGES)
    for stage in stages[stages.index("evaluation"):]:
        train.STAGES[stage] = lambda run: "d\\u00e9j\\u00e0 \\u732b"
    sys.exit(train.main(["--resume", "--out", sys.argv[1]]))"""


@pytest.mark.parametrize("output", ["ascii", "closed"])
def test_a_run_ends_where_nothing_can_be_shown_or_measured(spare, monkeypatch, output):
    """A terminal that knows ASCII alone, a reader that has gone away (`| head`), no `resource`."""
    undo_the_end(spare)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = spawn("-c", ODD_MACHINE, str(spare.out), cwd=ROOT)
    if output == "closed":
        process.stdout.close()
        errors, printed = process.stderr.read(), ""
        process.wait(timeout=PATIENCE)
    else:
        printed, errors = process.communicate(timeout=PATIENCE)
        assert "d?j? ?" in printed and "--gnn-dim" in printed
    assert (process.returncode, errors) == (0, "")
    assert strict(spare.out / "metrics.json")["peak_memory_mb"] is None


# ---- odd data, odd settings

def test_users_who_are_all_alike_are_an_oddity_that_works(tmp_path):
    """The same 20 of 40 items, in the same order: one taste, which all know by heart; tokens collide."""
    data, rng = tmp_path / "data", np.random.default_rng(0)
    (data / "images").mkdir(parents=True)
    for n in range(40):
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(data / "images" / f"i{n}.png")
    items = "".join(f"i{n},thing {n},p{n % 2}\n" for n in range(40))
    (data / "items.csv").write_text("item,text,prompt\n" + items)
    likes = "".join(f"u{u},i{n},{n}\n" for u in range(20) for n in range(20))
    (data / "interactions.csv").write_text("user,item,timestamp\n" + likes)
    few = FEW[:2] + FEW[6:]  # but all steps of graph and codebook
    assert main("--smoke", "--data", data, *few, "--vq-steps", "30", "--out", tmp_path / "run") == 0
    found = strict(tmp_path / "run" / "metrics.json")
    assert found["stage1"]["recall@20"] == 1
    assert all(health["collision_rate"] > 0.5 for health in found["codebook"].values())
    for variant in ("unpersonalized", "before_reward", "after_reward"):
        assert all(v["mean"] is not None for v in found["generation"][variant].values()), variant


def test_a_diverged_run_names_stage_and_step_and_leaves_a_checkpoint_that_loads(tmp_path, capsys):
    out = tmp_path / "run"
    status = main("--smoke", "--items", "40", "--users", "8", "--interactions", "10", *FEW,
                  "--text-lr", "1e30", "--checkpoint-seconds", "0", "--out", out)
    errors = capsys.readouterr().err
    assert status == 1 and errors.count("\n") == 1
    assert re.match(r"train.py: error: stage text, step 1: \S+ is not finite", errors), errors
    saved = read_checkpoint(out / "checkpoint.pt")
    assert saved["done"] == ["autoencoder", "features", "gnn", "codebook"]
    assert all(x.isfinite().all() for x in saved["model"].values())


# ---- what has gone on meanwhile

def test_the_referee_reads_every_attribute_of_fresh_stickers_and_of_those_in_the_folder(processes, run):
    folder, begun = processes
    _, errors = begun["referee"].communicate(timeout=PATIENCE)
    assert begun["referee"].returncode == 0, errors
    referee = Referee()
    referee.load_state_dict(torch.load(folder / "referee.pt", weights_only=True))
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
    printed, errors = chain.communicate(timeout=PATIENCE)
    assert chain.returncode == 0, printed + errors
    assert printed.count("the same bits") == 1 and printed.count(",") >= 7
