"""study.py: planted answers, and slow obvious versions."""
import csv
import io
import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import study
import torch
import train
from dppmg import MODALITIES, TEST, TRAIN
from gnn import GNNConfig, ModalGNN, build_graph
from study import (BEST, FULL, PLAIN, AverageGNN, IdGNN, Options, Projection, Row, equal_cost,
                   estimate, item_numbers, judge_claims, less, linear_probe, mean_of_history, named,
                   verdict)
from torch.testing import assert_close

TINY = {"train": dict(items=120, users=30, interactions=20, referee_pictures=64, referee_steps=4,
                      pairs=20, new_users=0.15, sampled_users=4, samples=3, best_of=2),
        "gnn": dict(steps=4), "vq": dict(steps=4), "text": dict(steps=4, context=24),
        "image": dict(steps=4, ae_steps=4, sampling_steps=2),
        "reward": dict(scorer_steps=4, rounds=2, groups=2, images=2, texts=2, diffusion_steps=2,
                       log_every=2)}
CFG = GNNConfig(dim=6, layers=2)
ROWS = {row.name: row for row in study.claims_rows({name: {} for name in train.PARTS}, 30)}


def options_of(out, data=None, split="time"):
    values = {g: train.SMOKE.get(g, {}) | TINY.get(g, {}) for g in train.PARTS}
    cfg, settings = train.build(values)
    return Options(out, data, split, json.dumps(asdict(cfg) | {"train": asdict(settings)}))


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A study whose trunk and plain row are trained, a few steps each."""
    found = options_of(tmp_path_factory.mktemp("study"))
    for name in ("shared stages", "graph", "tokens"):
        study.do_row(found, 0, ROWS[name])
    return found


def opened(options, name):
    return study.open_row(options, 0, ROWS[name])


def unit_rows(x):
    return x / x.norm(dim=-1, keepdim=True)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_labels(n: int, n_labels: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(n_labels, (n,), generator=torch.Generator().manual_seed(seed))


# ---- what rivals have instead of the graph

HISTORY = torch.tensor([[0, 0, 1, 2, 2, 2], [3, 1, 0, 4, 0, 2]])


def test_mean_of_history_equals_a_slow_one():
    rows = normal(5, 3)
    found = mean_of_history(rows, HISTORY, 4)
    for u in range(3):
        own = [rows[i] for v, i in HISTORY.T.tolist() if v == u]
        assert_close(found[u], sum(own) / len(own))
    assert (found[3] == 0).all()


def small(kind, seed=0, **features):
    """A graph network on 3 users and 5 items, from fixed weights."""
    torch.manual_seed(seed)
    default = {"image": normal(5, 4).float(), "text": normal(5, 3, seed=1).float()}
    return kind(3, 5, default | features, CFG)


def test_the_average_of_the_history_ignores_the_graph():
    """Of user 0 it is the mean of their own items' features, whatever others like."""
    net, features = small(AverageGNN), normal(5, 4).float()
    expected = torch.zeros(6)
    expected[:4] = (features[3] + features[1]) / 2
    others = torch.tensor([[0, 0, 1, 1, 2], [1, 3, 1, 3, 3]])
    for pairs in (HISTORY, others):
        assert_close(net(build_graph(*pairs, 3, 5))["image"][0][0], expected)
    graph = small(ModalGNN)
    graphs = [graph(build_graph(*pairs, 3, 5))["image"][0][0] for pairs in (HISTORY, others)]
    assert not torch.allclose(*graphs)


def test_somebody_new_has_the_average_of_the_history_too():
    net, graph = small(AverageGNN), build_graph(*HISTORY, 3, 5)
    for m, p in net.fold_in(graph, *HISTORY, 4).items():
        assert_close(p[:3], net(graph)[m][0])
        assert (p[3] == 0).all()


def test_ids_alone_do_not_see_the_content():
    graph, other = build_graph(*HISTORY, 3, 5), normal(5, 4, seed=7).float()
    for kind, same in ((IdGNN, True), (ModalGNN, False)):
        one, two = small(kind), small(kind, image=other)
        assert torch.equal(one(graph)["image"][0], two(graph)["image"][0]) == same


def test_ids_are_learnt_and_fold_somebody_in():
    net, graph = small(IdGNN), build_graph(*HISTORY, 3, 5)
    net.loss(graph, torch.tensor([0]), torch.tensor([3]), torch.tensor([4])).backward()
    for m in MODALITIES:
        assert net.ids[m].grad[3].abs().sum() > 0 and net.item[m].grad is None
    alone = build_graph(*HISTORY[:, 2:], 3, 5)      # user 0 is not in this graph: folded in, she is
    expected = net(graph)["image"][0][0]
    found = net.fold_in(alone, torch.zeros(2).long(), HISTORY[1, :2], 1)["image"][0]
    assert_close(unit_rows(found), unit_rows(expected), atol=0.2, rtol=0)


def test_shared_preference_is_one_and_knows_both_modalities(options):
    run = opened(options, "shared preference")
    train.train_all(run, ("gnn", "codebook"))
    rows, taste = run.model.gnn(run.model.graph), run.model.modality
    assert torch.equal(rows["image"][0], rows["text"][0])
    assert torch.equal(taste["image"].tokens, taste["text"].tokens)
    assert len(taste["image"].tokens.unique()) > 1
    own = opened(options, PLAIN).model.modality
    assert not torch.equal(own["image"].tokens, own["text"].tokens)
    sizes = [run.features[m].shape[1] for m in MODALITIES]
    weight = run.model.gnn.item["image"]
    assert weight.shape[1] == sum(sizes) and weight is run.model.gnn.item["text"]
    assert all(part.abs().sum() > 0 for part in weight.split(sizes, 1))
    assert_close(run.model.gnn.features_text, torch.cat(list(run.features.values()), 1))


# ---- what rivals have instead of tokens

@pytest.mark.parametrize("positions", [1, 3])
def test_projection_equals_a_slow_one(positions):
    rows = 5 * normal(7, 4).requires_grad_()
    net = Projection(lambda: rows, positions, 6, 0.5).double()
    numbers = torch.tensor([[2, 0, 6], [1, 1, 1]])
    slow = torch.stack([torch.stack([
        net.weight[k % positions] @ (rows[n] / rows[n].norm()) for k, n in enumerate(row)])
        for row in numbers])
    assert_close(net(numbers), slow)
    up = normal(2, 3, 6)
    grads = [torch.autograd.grad((x * up).sum(), [net.weight, rows]) for x in (net(numbers), slow)]
    assert_close(*grads)


def test_projection_starts_as_large_as_the_table_that_it_replaces():
    rows = 5 * normal(50, 64)
    net = Projection(lambda: rows, 4, 64, 0.02).double()
    size = net(torch.arange(50)[:, None].expand(-1, 4)).square().mean().sqrt().item()
    assert abs(size / 0.02 - 1) < 0.05


def given(run, m, user):
    """The condition vectors of a user."""
    net, tokens = getattr(run.model, m), run.model.user_tokens(user)[m]
    return net.embed(run.prompt[:len(user)], tokens)[1]


@pytest.mark.parametrize("m", MODALITIES)
def test_continuous_injects_the_preference_and_no_code(options, m):
    run, user = opened(options, "continuous"), torch.tensor([0, 1])
    before, taste = given(run, m, user), run.model.modality[m]
    unit = unit_rows(taste.preference[user])
    net = getattr(run.model, m)
    assert before.shape[1] == run.cfg.vq.levels
    assert_close(before, torch.einsum("bf,mdf->bmd", unit, net.preference.weight))
    for book in taste.quantizer.codebooks:
        book.codebook.normal_()
    study.set_tokens(run, ROWS["continuous"])
    assert torch.equal(given(run, m, user), before)
    taste.preference[0] = -taste.preference[0]
    assert_close(given(run, m, user), torch.stack([-before[0], before[1]]))


@pytest.mark.parametrize("name", ["continuous", "history as condition"])
def test_null_stays_null_and_the_samplers_run(options, name):
    run = opened(options, name)
    net, tokens = run.model.text, run.model.user_tokens(torch.tensor([3]))["text"]
    words, tastes, present = net.embed(run.prompt[:1], torch.full_like(tokens, -1))
    assert torch.equal(tastes[0], net.null)
    assert present[0].tolist() == [*(run.prompt[0] != 0).tolist(), *[True] * tokens.shape[1]]
    made = train.make_for(run, "after_reward", torch.tensor([3, 4]), torch.tensor([0, 1]),
                          run.generator("x"))
    assert made.images.shape[0] == len(made.tokens) == 2 and made.images.isfinite().all()


@pytest.mark.parametrize("name", ["continuous", "history as condition"])
def test_the_projection_is_trained_and_samples(options, name):
    run = opened(options, name)
    before = {m: w.clone() for m, w in train.tables_of(run.model).items()}
    train.train_all(run, ("text", "image"))
    for m, weight in train.tables_of(run.model).items():
        assert (weight != before[m]).any()
    assert torch.equal(run.model.image.preference.weight, run.modules["average"].preference.weight)


def test_the_history_is_told_and_not_learnt(options):
    run = opened(options, "history as condition")
    liked, numbers = run.pairs(TRAIN), item_numbers(run, "image")
    n_told = 0
    for u in run.users.tolist():
        mine = [(t, i) for v, i, t, part in zip(run.data.user.tolist(), run.data.item.tolist(),
                                                run.data.time.tolist(), run.data.part.tolist())
                if v == u and part == TRAIN]
        told = [i for _, i in sorted(mine)[:min(study.HISTORY, len(mine) // 2)]]
        assert numbers[u].tolist() == told + [-1] * (study.HISTORY - len(told))
        learnt = set(run.liked[1, run.liked[0] == u].tolist())
        assert learnt == {i for _, i in mine} - set(told)
        n_told += len(told)
    assert run.liked.shape[1] == liked.shape[1] - n_told
    for u in run.new["history"][0].unique().tolist():
        known = run.new["history"][1, run.new["history"][0] == u].tolist()[:study.HISTORY]
        assert numbers[u, :len(known)].tolist() == known and (numbers[u, len(known):] == -1).all()
    u = run.users[:1]
    rows = unit_rows(run.features["text"][numbers[u, 0]]) @ run.model.text.preference.weight[0].T
    assert_close(given(run, "text", u)[:, 0], rows)


# ---- whose tokens

def counted(users, n):
    """A run whose quantizer gives every user their own number, so that tokens say whose they are."""
    taste = SimpleNamespace(preference=torch.arange(n).float()[:, None].repeat(1, 2),
                            quantize=lambda p: p.long())
    return SimpleNamespace(
        users=users, device="cpu", model=SimpleNamespace(modality=dict.fromkeys(MODALITIES, taste)),
        generator=lambda what: torch.Generator().manual_seed(0))


def test_anothers_tokens_are_another_training_users_in_both_modalities():
    users = torch.tensor([0, 2, 3, 5, 6, 8, 9])
    found = {m: study.another_tokens(counted(users, 10), m) for m in MODALITIES}
    assert torch.equal(found["image"], found["text"])
    whose = found["image"][:, 0]
    assert torch.isin(whose, users).all() and (whose != torch.arange(10)).all()
    assert len(whose.unique()) > 3


def test_null_and_own_tokens():
    run = counted(torch.arange(4), 4)
    assert study.own_tokens(run, "text")[:, 0].tolist() == [0, 1, 2, 3]
    assert (study.null_tokens(run, "text") == -1).all()


def test_the_commonest_taste_is_the_mean_of_training_users_for_everybody():
    run = counted(torch.tensor([0, 1]), 3)
    taste = run.model.modality["image"]
    taste.preference = torch.tensor([[8.0, 0], [0, 2], [-9, -9]])
    taste.quantize = lambda p: (10 * p).round().long()
    assert study.commonest_tokens(run, "image").tolist() == [[5, 5]] * 3  # unit length each


def test_each_rival_turns_one_switch():
    plain, full = ROWS[PLAIN], ROWS[FULL]
    switches = ("settings", "build", "tokens", "variant")
    for row in ROWS.values():
        turned = [s for s in switches if getattr(row, s) != getattr(plain, s)]
        most = 2 if row.name in ("continuous", "history as condition") else 1    # and their numbers
        least = 0 if not row.measured or row in (plain, full) else 1
        assert least <= len(turned) <= most, (row.name, turned)
        assert ("reward" in row.stages) == (row.against == FULL and row != plain
                                            and row.variant != "best_of") or row is full
    assert all(row.parent in ROWS for row in ROWS.values() if row.parent)


def test_the_rewards_weights_are_as_strong_together():
    values = {name: {} for name in train.PARTS} | {"reward": dict(lambda_p=0.5, lambda_c=1.5)}
    for p, c in study.RATIOS:
        found = study.weights(values, p, c)["reward"]
        assert_close(sum(found.values()), 2.0)
        assert_close(found["lambda_p"] * c, found["lambda_c"] * p)


def test_rows_are_the_issues(options):
    pareto, bits = (study.STUDIES[name](json.loads(options.settings), 30) for name in ("pareto", "bits"))
    assert [row.name for row in pareto[4:]] == ["0 to 1", "0.25 to 1", "0.5 to 1", "1 to 1", "2 to 1", "1 to 0"]
    assert [row.settings["vq"] for row in bits[3:]] == [
        *(dict(levels=n, codes=k) for n, k in study.BITS), dict(levels=1, codes=30)]
    for rows in (pareto, bits):
        names = [row.name for row in rows]
        assert all(not row.parent or row.parent in names[:n] for n, row in enumerate(rows))
        assert all(not row.against or row.against in names for row in rows)


def test_a_trained_embedding_is_one_row_a_user_turned_from_the_preference(options):
    row = study.bits_rows(json.loads(options.settings), 30)[-1]
    run = study.open_row(options, 0, row)
    for m, taste in run.model.modality.items():
        assert taste.tokens.tolist() == [[u] for u in range(30)]
        weight, unit = getattr(run.model, m).preference.weight, unit_rows(taste.preference)
        if weight.shape[1] >= unit.shape[1]:  # else a projection
            cosine = unit_rows(weight) @ unit_rows(weight).T
            assert_close(cosine, unit @ unit.T, atol=1e-4, rtol=1e-4)


# ---- stages in common

def test_a_row_starts_from_its_parents_tensors_and_keeps_what_it_does_not_train(options):
    trunk, row = opened(options, "tokens"), opened(options, PLAIN)
    for name, value in trunk.modules.state_dict().items():
        assert torch.equal(value, row.modules.state_dict()[name]), name
    fewer = opened(options, "no residual levels")
    assert fewer.model.modality["image"].tokens.shape[1] == 1
    assert torch.equal(fewer.model.gnn.user["image"], trunk.model.gnn.user["image"])
    assert fewer.model.image.preference.weight.shape[0] == 512


def test_a_row_that_was_interrupted_goes_on_and_ends_with_the_same_bits(options, monkeypatch):
    row = ROWS["continuous"]
    folder = study.folder_of(options, 0, row.name)
    study.do_row(options, 0, row)
    bits = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    found = json.loads((folder / "row.json").read_text())
    for path in folder.iterdir():
        path.unlink()

    def stop(run):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(train.STAGES, "image", stop)
        study.do_row(options, 0, row)
    assert not (folder / "row.json").exists()
    trained = []
    with monkeypatch.context() as patch:
        for stage, function in list(train.STAGES.items()):
            patch.setitem(train.STAGES, stage, lambda run, f=function: (trained.append(run.stage), f(run))[1])
        study.do_row(options, 0, row)
        assert trained == ["image"]
        again = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
        assert all(torch.equal(value, again[name]) for name, value in bits.items())
        assert json.loads((folder / "row.json").read_text())["people"] == found["people"]
        study.do_row(options, 0, row)
    assert trained == ["image"], "what is there is not trained again"


# ---- measures

def test_a_random_split_does_not_see_the_time(tmp_path):
    by_time, by_chance = (study.load(options_of(tmp_path, split=s), 0)[0] for s in ("time", "random"))
    for data, latest in ((by_time, True), (by_chance, False)):
        last = [max((t, p) for v, t, p in zip(data.user.tolist(), by_time.time.tolist(), data.part.tolist())
                    if v == u)[1] for u in range(30)]
        assert all(p == TEST for p in last) == latest
    assert (by_chance.part == TEST).sum() == (by_time.part == TEST).sum()
    assert (by_chance.time == 0).all()


def test_new_people_are_known_by_ten_interactions_and_judged_by_others(options):
    run = opened(options, PLAIN)
    who, known = study.some_people(run)["new"], study.histories(run)
    new = run.new["test"][0].unique()
    assert set(who.pairs.user.tolist()) == set(new.tolist()) and set(who.users.tolist()) <= set(new.tolist())
    assert torch.isin(who.pairs.other, run.users).all()
    pairs = {name: set(map(tuple, x.T.tolist())) for name, x in (("known", known), ("held", who.held))}
    mine = {(u, i) for u, i in zip(run.data.user.tolist(), run.data.item.tolist()) if u in new.tolist()}
    assert pairs["held"] == mine - pairs["known"]
    for u in new.tolist():
        first = run.new["history"][1, run.new["history"][0] == u][:study.HISTORY].tolist()
        assert [i for v, i in known.T.tolist() if v == u] == first
    assert {(u, i) for u, i in pairs["known"] if u not in new.tolist()} == set(map(tuple, run.pairs(TRAIN).T.tolist()))


def test_new_people_are_folded_in(options):
    run = opened(options, PLAIN)
    new, before = run.new["history"][0].unique(), run.model.modality["text"].preference.clone()
    study.fold_in(run)
    after = run.model.modality["text"].preference
    assert torch.equal(before[run.users], after[run.users])
    u = new[1].item()
    first = run.new["history"][1, run.new["history"][0] == u][:study.HISTORY]
    alone = run.model.gnn.fold_in(run.model.graph, torch.zeros_like(first), first, 1)["text"]
    assert_close(after[u], alone[0])


def test_nearness_is_one_for_the_history_itself_and_small_for_others(options):
    run = opened(options, PLAIN)
    user, item = study.histories(run)
    u = run.users[:6]
    own = train.contents(run, torch.stack([item[user == v][0] for v in u]))
    other = train.contents(run, torch.stack([item[user == v][0] for v in u.roll(1)]))
    pairs = train.Pairs(u, u, u.roll(1))
    found = study.notions(run, train.Made(pairs, own, other, own.tokens))
    swapped = study.notions(run, train.Made(pairs, other, own, own.tokens))
    for m in MODALITIES:
        near = mean_of_history(run.features[m], study.histories(run), 30)[u]
        mean = run.features[m][run.seen].mean(0)
        for k, v in enumerate(u):
            a, b = run.features[m][item[user == v][0]] - mean, near[k] - mean
            assert_close(found[f"nearness_{m}"][k], a @ b / a.norm() / b.norm(), atol=1e-4, rtol=1e-4)
        assert found[f"nearness_{m}"].mean() > swapped[f"nearness_{m}"].mean()
        assert_close(found[f"changes_{m}"], swapped[f"changes_{m}"])
    same = study.notions(run, train.Made(pairs, own, own, own.tokens))
    assert_close(same["changes_image"], torch.zeros(6), atol=1e-5, rtol=0)


# ---- differences and their intervals

def test_the_interval_of_one_seed_is_the_means_over_users():
    values = normal(400).tolist()
    found = estimate([(values, list(range(400)))])
    mean, error = torch.tensor(values).mean().item(), torch.tensor(values).std().item() / 20
    assert_close(found["mean"], mean)
    assert abs((found["high"] - found["low"]) / (2 * 1.96 * error) - 1) < 0.1
    assert abs((found["high"] + found["low"]) / 2 - mean) < 0.3 * error


def test_a_users_values_are_not_parted():
    values = normal(50).tolist()
    alone, nine = (estimate([(values * n, list(range(50)) * n)]) for n in (1, 9))
    assert_close(list(alone.values()), list(nine.values()))


def test_the_interval_spans_what_seeds_differ_by():
    cells = [([float(k)] * 10, list(range(10))) for k in range(3)]
    assert estimate(cells) == {"mean": 1.0, "low": 0.0, "high": 2.0}
    assert estimate(cells[:1] * 3) == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_what_was_not_measured_does_not_count():
    assert estimate([([None, None], [0, 1])]) is None
    assert estimate([([None, 3.0], [0, 1]), ([None], [2])]) == {"mean": 3.0, "low": 3.0, "high": 3.0}
    assert estimate([([1.0, 1.0, 4.0], [0, 0, 1])])["mean"] == 2


def test_differences_are_paired():
    """Both rows vary by users a lot; their difference by nothing: the interval has no width."""
    user = list(range(30))
    values = (100 * normal(30)).round().tolist()
    other = [v - 0.5 for v in values]
    difference = less([(values, user)] * 2, [(other, user)] * 2)
    assert estimate(difference) == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert less([([1.0, None, 2.0], user[:3])], [([0.5, 1.0, None], user[:3])]) == [([0.5, None, None], user[:3])]


def test_differences_of_other_pairs_are_refused():
    with pytest.raises(ValueError, match="different pairs"):
        less([([1.0], [0])], [([1.0], [1])])
    with pytest.raises(ValueError):
        less([([1.0], [0])] * 2, [([1.0], [0])])


@pytest.mark.parametrize("low, high, more, kept", [
    (0.01, 0.3, "holds", "holds"), (-0.01, 0.3, "cannot tell", "holds"), (-0.03, 0.3, "cannot tell", "cannot tell"),
    (-0.01, 0.01, "does not hold", "holds"), (0.001, 0.01, "holds", "holds"), (-0.3, -0.01, "does not hold", "cannot tell"),
    (-0.3, -0.03, "does not hold", "does not hold")])
def test_verdicts(low, high, more, kept):
    interval = {"mean": (low + high) / 2, "low": low, "high": high}
    assert (verdict(interval, False), verdict(interval, True)) == (more, kept)


def test_the_judge_stands_in_where_tastes_are_not_known():
    judged = {"judge_swap": 0, "judge_consistency": 0, "judge_variety": 0}
    assert [named(m, judged) for m in ("utility", "consistency", "variety", "taste")] == [
        "judge_swap", "judge_consistency", "judge_variety", "taste"]
    assert named("utility", judged | {"utility": 0}) == "utility"


def planted(**gain):
    """Every row with the same noise in each measure, and what is gained on the plain row."""
    noise, user = normal(60).tolist(), list(range(60))
    names = ("utility", "taste", "variety", "consistency")
    return {name: {"training": {m: [([v + gain.get(key, {}).get(m, 0) for v in noise], user)] for m in names}}
            for key, name in (("plain", PLAIN), ("full", FULL), ("best", BEST), ("average", "average of history"),
                              ("shared", "shared preference"), ("continuous", "continuous"),
                              ("both", "DPPMG, best of n"))}


def test_claims_find_planted_differences():
    found = planted(average={"utility": -0.1}, shared={"utility": 0.1}, continuous={"utility": 0.01},
                    full={"consistency": 0.2, "variety": -0.3}, best={"consistency": 0.3}, both={"consistency": 0.5})
    lines = {(x["claim"][:3], x["row"], x["measure"]): x for x in judge_claims(found)}
    said = {key: (round(x["mean"], 6), x["verdict"]) for key, x in lines.items()}
    assert said == {
        ("(a)", PLAIN, "utility"): (0.1, "holds"), ("(b)", PLAIN, "utility"): (-0.1, "does not hold"),
        ("(c)", PLAIN, "utility"): (-0.01, "holds"), ("(d)", FULL, "consistency"): (0.2, "holds"),
        ("(e)", FULL, "utility"): (0, "holds"), ("(e)", FULL, "taste"): (0, "holds"),
        ("(e)", FULL, "variety"): (-0.3, "does not hold"), ("(f)", FULL, "consistency"): (-0.1, "does not hold"),
        ("(f)", FULL, "utility"): (0, "does not hold"), ("(f)", FULL, "variety"): (-0.3, "does not hold"),
        ("(f)", "DPPMG, best of n", "consistency"): (0.2, "holds"),
        ("(f)", "DPPMG, best of n", "utility"): (0, "does not hold"),
        ("(f)", "DPPMG, best of n", "variety"): (0, "does not hold")}


def test_training_counts_what_a_row_needs():
    seconds = {"autoencoder": 10, "scorer": 1, "judge": 100, "referee": 100, "text": 5}
    found = {name: {"training": {"utility": [([1.0], [0])]}} for name in ("x", PLAIN)}
    for stages, variant, total in (({}, "after_reward", 15), ({"reward": 7}, "after_reward", 23), ({}, "best_of", 16)):
        seeds = [{"seconds": seconds | stages, "pair_seconds": 2.0}]
        line, = study.summary(Row("x", against=PLAIN, variant=variant), seeds, found)
        assert (line["training_seconds"], line["pair_seconds"]) == (total, 2.0)
        assert line["differences"]["utility"]["mean"] == 0
    real, = study.summary(Row("x", against=PLAIN, variant="real"), [{"seconds": seconds, "pair_seconds": None}], found)
    assert real["training_seconds"] is real["pair_seconds"] is None and real["differences"] == {}


def test_equal_cost_by_hand():
    lines = [{"row": name, "training_seconds": t, "pair_seconds": p}
             for name, t, p in ((PLAIN, 100, 0.1), (FULL, 160, 0.1), (BEST, 110, 0.35))]
    assert equal_cost(lines) == "DPPMG costs less than best of n from 200 pairs on"
    assert equal_cost(lines[:2]) == ""


def test_the_four_notions_are_told_apart():
    one, none = {"mean": 0.1, "low": 0.05, "high": 0.15}, {"mean": 0.0, "low": -0.05, "high": 0.05}
    for near, useful, says in ((one, none, True), (one, one, False), (none, none, False)):
        changes = {"nearness": near, "utility": useful, "prompt": none, "changes": one}
        line = {"row": "x", "people": "new", "against": PLAIN, "differences": changes}
        assert ("nearer, and not preferred" in study.four_notions([line])) == says


def test_an_interval_is_drawn_to_scale():
    picture = study.intervals("t", [("a <b>", {"low": 0.0, "mean": 0.5, "high": 1.0}, "red"),
                                    ("c", {"low": 0.25, "mean": 0.75, "high": 1.0}, "blue")])
    assert "a &lt;b&gt;" in picture and "M220.0 10H590.0" in picture and 'cx="405.0" cy="10"' in picture
    assert "M312.5 24H590.0" in picture and 'cx="497.5" cy="24"' in picture


# ---- the whole

def test_a_whole_study_is_written_and_not_done_twice(options, capsys):
    out = options.out
    values = json.loads(options.settings)
    study.begin(options)
    for row in ROWS.values():
        study.do_row(options, 0, row)
    study.write_study(options, "claims", 1)
    found = json.loads((out / "claims/study.json").read_text())
    names = [row.name for row in ROWS.values() if row.measured]
    assert [(x["row"], x["people"]) for x in found["rows"]] == [(n, p) for n in names for p in ("training", "new")]
    assert {x["claim"][:3] for x in found["claims"]} == {f"({x})" for x in "abcdef"}
    assert found["settings"] == values and found["seeds"] == 1
    for x in found["rows"]:
        assert set(study.COLUMNS) <= set(x["measures"])
        if x["row"] not in (FULL, "real"):
            assert set(study.COLUMNS) <= set(x["differences"])
    lines = {(x["row"], x["people"]): x for x in found["rows"]}
    plain = lines[PLAIN, "training"]["measures"]
    for name in names[1:]:
        if name not in ("consistency reward only", "personalization reward only"):  # too little trained
            assert lines[name, "training"]["measures"] != plain, name
    page = (out / "claims/study.html").read_text()
    assert all(name in page.replace("&#x27;", "'") for name in names) and "<svg" in page
    rows = list(csv.DictReader(io.StringIO((out / "claims/claims.csv").read_text())))
    line, = (r for r in rows if (r["row"], r["people"], r["measure"]) == (FULL, "new", "utility_image"))
    assert math.isclose(float(line["mean"]), lines[FULL, "new"]["measures"]["utility_image"]["mean"])
    study.do_rows(options, "claims", 1, 1)      # in another process
    assert "stage" not in capsys.readouterr().out
    study.write_study(options, "claims", 1, [PLAIN, "continuous"])
    found = json.loads((out / "claims/study.json").read_text())
    assert {x["row"] for x in found["rows"]} == {PLAIN, "continuous"}
    assert {(x["claim"][:3], x["less"]) for x in found["claims"]} == {("(c)", "continuous")}


def test_rows_that_are_asked_for_come_with_what_they_start_from():
    rows = list(ROWS.values())
    names = [row.name for row in study.needed(rows, ["DPPMG, best of n", "ID-only"])]
    trunk = [row.name for row in study.TRUNK]
    assert names == [*trunk, PLAIN, FULL, "ID-only", "DPPMG, best of n"]
    assert study.needed(rows, []) == rows
    with pytest.raises(SystemExit):
        study.main(["claims", "--smoke", "--rows", "no such row"])


def test_rows_of_other_settings_are_refused(options):
    study.begin(options)
    with pytest.raises(SystemExit, match="other data or settings"):
        study.begin(options._replace(split="random"))


# ---- linear_probe

def slow_probe(x, label, n_labels: int, folds: int, ridge: float) -> float:
    """User by user: least squares on the users of the other folds, one equation more per weight."""
    x = (x - x.mean(0)) / x.std(0)
    right = 0
    for user in range(len(x)):
        others = [n for n in range(len(x)) if n % folds != user % folds]
        rows = [torch.cat([x[n], torch.ones(1).double()]) for n in others]
        rows += list((ridge * len(others)) ** 0.5 * torch.eye(x.shape[1] + 1).double())
        wanted = torch.zeros(len(rows), n_labels).double()
        for i, n in enumerate(others):
            wanted[i, label[n]] = 1
        weight = torch.linalg.lstsq(torch.stack(rows), wanted).solution
        score = torch.cat([x[user], torch.ones(1).double()]) @ weight
        right += score.argmax().item() == label[user].item()
    return right / len(x)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("folds, ridge", [(2, 1e-2), (5, 1e-2), (5, 0.5), (7, 3.0)])
def test_linear_probe_equals_a_slow_one(folds, ridge, seed):
    x, label = normal(41, 6, seed=seed) + 2, random_labels(41, 4, seed)
    assert linear_probe(x, label, 4, folds, ridge) == slow_probe(x, label, 4, folds, ridge)


def test_linear_probe_has_five_folds_and_a_weak_ridge():
    for seed in range(8):
        x, label = normal(31, 12, seed=seed), random_labels(31, 3, seed)
        assert linear_probe(x, label, 3) == slow_probe(x, label, 3, folds=5, ridge=1e-2)


def test_linear_probe_reads_a_label_that_is_a_linear_function():
    label = torch.arange(200) % 4
    x = torch.eye(4).double()[label] @ normal(4, 8) + 0.01 * normal(200, 8, seed=1)
    assert linear_probe(x, label, 4) == 1
    assert linear_probe(x.float(), label, 4) == 1
    assert linear_probe(x, label, 6) == 1, "labels that nobody has"


def test_linear_probe_finds_nothing_where_nothing_is():
    label = random_labels(2000, 4)
    share = linear_probe(normal(2000, 8), label, 4)
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5, share


def test_linear_probe_is_not_fitted_to_those_it_is_asked_about():
    """With as many features as users a linear map fits any labels; for others it is no use."""
    x, label = normal(400, 400), random_labels(400, 2)
    fit = torch.linalg.lstsq(x, torch.eye(2).double()[label]).solution
    assert torch.equal((x @ fit).argmax(1), label)
    share = linear_probe(x, label, 2)
    assert abs(share - 0.5) < 5 * (0.25 / 400) ** 0.5, share


def test_linear_probe_without_features_always_says_the_commonest_label_of_the_others():
    x = torch.zeros(40, 1)
    commonest = torch.tensor([1, 1, 1, 2]).repeat(10)
    assert linear_probe(x, commonest, 3) == 0.75
    own_is_rarest = torch.arange(40) % 2  # leaving any user out leaves fewer of its label
    assert linear_probe(x, own_is_rarest, 2, folds=40) == 0


def test_linear_probe_does_not_see_the_unit_of_a_feature():
    x, label = normal(60, 5), random_labels(60, 3)
    unit = torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6]).double()
    shares = [linear_probe(x, label, 3), linear_probe(x * unit - 7 * unit, label, 3)]
    assert shares[0] == shares[1]
