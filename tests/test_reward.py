"""reward.py against slow obvious versions by value and gradient, exact policy gradients, planted answers."""
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.distributions import Categorical, Normal, kl_divergence
from torch.testing import assert_close

from reward import (Content, RewardConfig, Scorer, categorical_kl, consistency, disjoint_halves, embed,
                    frechet_distance, frechet_interval, gaussian_kl, gaussian_log_prob, info_nce, interval,
                    judge_consistency, judge_measures, judge_prompt, leave_one_out, normalize_group,
                    pair_reward, random_window, reinforce_loss, same_rows, swap_share, taste, token_optimizer)

CFG = RewardConfig(scorer_width=8, scorer_dim=16)
PLAIN = replace(CFG, scorer_shift=0, scorer_mirror=0.0, scorer_zoom=0.0, scorer_dropout=0.0, scorer_drop=0.0)     # the loss without augmentation: no randomness left


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def unit(*shape, seed=0):
    return F.normalize(normal(*shape, seed=seed), dim=-1)


def scorer(cfg=CFG, seed=0, dtype=torch.float64, vocab_size=20, n_words=6):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Scorer(cfg, vocab_size, n_words).to(dtype)


def batch(B=6, H=32, seed=0):
    g = rng(seed)
    tokens = torch.randint(1, 20, (B, 7), generator=g)
    tokens[:, 5:] = 0
    prompt = torch.randint(0, 7, (B, 3), generator=g)
    prompt[:, 0] += prompt[:, 0] == 0
    return torch.rand(B, 3, H, H, generator=g, dtype=torch.float64) * 2 - 1, tokens, prompt


# ---- InfoNCE and the scorer

def info_nce_loop(a, b, same, scale):
    """For every row, the mean of -log softmax over the rows it is equal to; both directions."""
    total, B = 0, len(a)
    for left, right in ((a, b), (b, a)):
        for i in range(B):
            weight = [torch.exp(scale * (left[i] * right[j]).sum()) for j in range(B)]
            own = [j for j in range(B) if same[i, j]]
            total = total - sum(torch.log(weight[j] / sum(weight)) for j in own) / len(own) / B
    return total / 2


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [0, 1, 0, 0, 2]])
def test_info_nce_is_the_double_loop(ids):
    a, b = unit(5, 3), unit(5, 3, seed=1)
    scale = torch.tensor(3.0, dtype=torch.float64)
    for x in (a, b, scale):
        x.requires_grad_()
    same = same_rows(torch.tensor(ids)[:, None])
    fast, slow = info_nce(a, b, same, scale), info_nce_loop(a, b, same, scale)
    assert_close(fast, slow)
    for got, want in zip(*(torch.autograd.grad(loss, (a, b, scale)) for loss in (fast, slow))):
        assert_close(got, want)
    assert gradcheck(lambda *x: info_nce(x[0], x[1], same, x[2]), (a, b, scale))


def test_same_rows_compares_whole_rows():
    assert same_rows(torch.tensor([[1, 2], [1, 3], [1, 2]])).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_loss_is_the_mean_of_three_info_nces_with_equal_texts_and_prompts_apart():
    """Items 0 and 3 share a text, of which different tokens are hidden; items 1 and 2 share a prompt."""
    images, tokens, prompt = batch()
    tokens[3], prompt[2] = tokens[0], prompt[1]
    s, B = scorer(replace(CFG, scorer_drop=0.4, scorer_dropout=0.0)), len(images)
    moved, hidden = s.augment(images, tokens, rng(3))
    assert not torch.equal(hidden[0], hidden[3])
    x, y, c = s.encode_image(moved), s.encode_text(hidden), s.encode_prompt(prompt)
    text, topic = (torch.tensor([[k[i] == k[j] for j in range(B)] for i in range(B)])
                   for k in (tokens.tolist(), prompt.tolist()))
    assert text.sum() == topic.sum() == B + 2
    scale = 1 / CFG.scorer_temperature
    want = sum(info_nce_loop(*pair, scale) for pair in ((x, y, text), (x, c, topic), (y, c, topic)))
    assert_close(s.loss(images, tokens, prompt, rng(3)), want / 3, rtol=1e-6, atol=1e-7)  # fp32 scale


def test_temperature_is_learnt_and_clamped():
    s, data = scorer(PLAIN), batch()
    s.loss(*data).backward()
    assert s.log_scale.grad != 0
    values = []
    for log_scale in (math.log(100), 50.0):
        s.log_scale.data.fill_(log_scale)
        values.append(s.loss(*data))
    assert_close(values[0], values[1])


@pytest.mark.parametrize("H", [16, 32, 64])
def test_embeddings_are_unit_vectors_that_depend_on_their_own_input_only(H):
    s, (images, tokens, prompt) = scorer(), batch(H=H)
    for encode, x in ((s.encode_image, images), (s.encode_text, tokens), (s.encode_prompt, prompt)):
        whole = encode(x)
        assert_close(whole, torch.cat([encode(row[None]) for row in x]))           # alone = among others
        assert_close(whole.norm(dim=1), torch.ones(6, dtype=torch.float64))
        assert (whole[0] - whole[1]).abs().max() > 1e-3                           # and it does depend on that


def test_a_large_picture_is_seen_at_32_pixels():
    s, (images, *_) = scorer(), batch()
    doubled = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_close(s.encode_image(doubled), s.encode_image(images))


def test_text_padding_and_prompt_order_do_not_matter_but_text_order_does():
    s, (_, tokens, prompt) = scorer(), batch()
    s.token.weight.data[0], s.word.weight.data[0] = 9.0, 9.0                  # whatever the padding row holds
    assert_close(s.encode_text(F.pad(tokens, (0, 4))), s.encode_text(tokens))
    assert_close(s.encode_text(tokens[:, :5]), s.encode_text(tokens))
    assert_close(s.encode_prompt(F.pad(prompt.flip(1), (2, 0))), s.encode_prompt(prompt))
    assert (s.encode_text(tokens[:, :5].flip(1)) - s.encode_text(tokens)).abs().max() > 1e-3
    assert s.encode_text(tokens * 0).isfinite().all() and s.encode_prompt(prompt * 0).isfinite().all()


def test_augment_moves_pictures_by_whole_pixels_and_hides_tokens():
    cfg, (images, tokens, _) = replace(PLAIN, scorer_shift=2, scorer_drop=0.25), batch(B=400)
    moved, hidden = scorer(cfg).augment(images, tokens, rng(3))
    seen = set()
    for before, after in zip(images[:60], moved):
        padded = F.pad(before[None], (2, 2, 2, 2), mode="replicate")[0]            # (3, 36, 36)
        hits = [(i, j) for i, j in itertools.product(range(5), repeat=2)
                if torch.equal(padded[:, i:i + 32, j:j + 32], after)]
        assert len(hits) == 1
        seen.update(hits)
    assert {i for i, _ in seen} == {j for _, j in seen} == set(range(5)) and len(seen) > 15
    share = 1 - (hidden != 0).sum() / (tokens != 0).sum()                          # of 2,000: sigma 0.01
    assert abs(share - 0.25) < 0.05 and torch.equal(hidden, tokens * (hidden != 0))
    same = scorer(PLAIN).augment(images, tokens, rng(3))
    assert torch.equal(same[0], images) and torch.equal(same[1], tokens)


def test_augment_mirrors_half_of_the_pictures():
    images, tokens, _ = batch(B=400)
    after, _ = scorer(replace(PLAIN, scorer_mirror=0.5)).augment(images, tokens, rng(3))
    mirrored = torch.tensor([torch.equal(x.flip(2), y) for x, y in zip(images, after)])
    assert torch.equal(after[~mirrored], images[~mirrored]) and 0.37 < mirrored.double().mean() < 0.63    # 5 sigma


def test_random_window_shows_a_part_of_a_picture_enlarged():
    """On a picture whose channels are the column and the row: even steps, as long as the window's side, within the picture."""
    ramp = torch.linspace(-1, 1, 32, dtype=torch.float64).expand(32, 32)
    seen = random_window(torch.stack([ramp, ramp.T]).expand(300, 2, 32, 32), 0.25, rng(1))     # (300, 2, 32, 32)
    column, row = seen[:, 0], seen[:, 1].transpose(1, 2)
    for place in (column, row):
        assert_close(place, place[:, :1].expand_as(place))                         # no shear
        side = (place[:, 0, -1] - place[:, 0, 0]) / 2
        assert_close(place[:, 0].diff(dim=1), (side * 2 / 31)[:, None].expand(-1, 31))
        assert 0.75 <= side.min() < 0.77 and 0.98 < side.max() <= 1                # square: the same in both, below
        assert place.min() >= -1 - 1e-12 and place.max() <= 1 + 1e-12
        assert place[:, 0, 0].min() < -0.97 and place[:, 0, -1].max() > 0.97       # anywhere in the picture
    assert_close(column[:, 0, -1] - column[:, 0, 0], row[:, 0, -1] - row[:, 0, 0])
    images = batch()[0]
    assert_close(random_window(images, 0.0, rng(2)), images)


def test_loss_drops_features_of_pictures_in_training_alone():
    """At rate p the features that remain are 1 / (1 - p) times as large; encode_image, which the reward uses, drops none."""
    s, (images, tokens, prompt) = scorer(replace(PLAIN, scorer_dropout=0.4)), batch()
    given = []
    s.picture[-1].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    s.encode_image(images)
    s.loss(images, tokens, prompt, rng(4))
    whole, dropped = given
    kept = dropped != 0
    assert_close(dropped[kept], (whole / 0.6)[kept])
    share = kept.double().mean()                                                   # of 768 features: sigma 0.018
    assert abs(share - 0.6) < 0.09


def test_the_same_generator_state_gives_the_same_loss_to_the_bit():
    s, data = scorer(), batch()
    first = s.loss(*data, rng(1))
    assert torch.equal(first, s.loss(*data, rng(1))) and not torch.equal(first, s.loss(*data, rng(2)))


def test_loss_at_the_start_is_about_chance():
    images, tokens, _ = batch(B=64)
    prompt = torch.arange(64)[:, None] % 6 + 1
    loss = scorer(replace(CFG, scorer_temperature=1.0)).loss(images, tokens, prompt, rng())
    assert abs(loss - math.log(64)) < 0.2, f"InfoNCE {loss:.2f}, chance is ln 64 = 4.16"


def planted(B, seed):
    """Noisy pictures of one of 6 colours, the colour's token among filler, a prompt for each half of them."""
    g = rng(seed)
    colour = torch.randint(6, (B,), generator=g)
    rgb = torch.tensor([[1., 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
    rgb = rgb[colour] * 1.6 - 0.8                                                  # (B, 3)
    images = rgb[:, :, None, None] + 0.5 * torch.randn(B, 3, 32, 32, generator=g)
    tokens = torch.randint(10, 20, (B, 6), generator=g)
    tokens.scatter_(1, torch.randint(6, (B, 1), generator=g), colour[:, None] + 1)
    return images, tokens, (colour >= 3).long()[:, None] + 1, colour


def fit(s, data, steps, seed):
    g, opt = rng(seed), torch.optim.AdamW(s.parameters(), lr=3e-3)
    for _ in range(steps):
        pick = torch.randint(len(data[0]), (48,), generator=g)
        loss = s.loss(*(x[pick] for x in data[:3]), g)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return s


def test_scorer_learns_a_planted_colour_and_its_twin_is_untouched():
    first = scorer(seed=0, dtype=torch.float32)
    judge = scorer(seed=1, dtype=torch.float32)
    own = {p.data_ptr() for p in first.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in judge.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(first.picture.parameters(), judge.picture.parameters())
                   if p.dim() > 1)
    before = [p.clone() for p in judge.parameters()]
    fit(first, planted(200, seed=1), steps=80, seed=0)
    assert all(torch.equal(p, q) for p, q in zip(before, judge.parameters()))
    images, tokens, prompt, colour = planted(120, seed=2)                          # never seen
    with torch.no_grad():
        x, y = first.encode_image(images), first.encode_text(tokens)
        topic = first.encode_prompt(torch.tensor([[1], [2]]))
    found = colour[(x @ y.T).argmax(1)]
    assert (found == colour).float().mean() > 0.95, "chance is 1/6"
    assert ((x @ topic.T).argmax(1) + 1 == prompt[:, 0]).float().mean() > 0.95, "chance is 1/2"


@pytest.mark.parametrize("n", [2, 7, 100])
def test_halves_share_no_item_and_lose_none(n):
    a, b = disjoint_halves(n, rng())
    assert sorted(a.tolist() + b.tolist()) == list(range(n)) and len(a) == n // 2
    assert torch.equal(a, a.sort().values) and torch.equal(a, disjoint_halves(n, rng())[0])
    if n == 100:
        assert not torch.equal(a, disjoint_halves(n, rng(1))[0]) and not torch.equal(a, torch.arange(50))


# ---- the reward

def test_pair_reward_is_the_loop():
    cfg = RewardConfig(lambda_c=0.7, lambda_p=2.0)
    image, text = unit(3, 4, 5), unit(3, 6, 5, seed=1)
    s_image, s_text = normal(3, 4, seed=2) * 5 + 1, normal(3, 6, seed=3)
    got_image, got_text, parts = pair_reward(image, text, s_image, s_text, cfg)
    centred = lambda rows: [np.array(row) - np.mean(row) for row in rows]
    standard = lambda rows: np.array(rows) / (np.sqrt(np.mean(np.square(rows))) + 1e-4)     # pooled over the groups
    c = [[[sum(a * b for a, b in zip(x.tolist(), y.tolist())) for y in text[g]] for x in image[g]] for g in range(3)]
    rows = [[np.mean(row) for row in c[g]] for g in range(3)]
    columns = [[np.mean(column) for column in zip(*c[g])] for g in range(3)]
    want_image = 0.7 * standard(centred(rows)) + 2 * standard(centred(s_image.tolist()))
    want_text = 0.7 * standard(centred(columns)) + 2 * standard(centred(s_text.tolist()))
    np.testing.assert_allclose(got_image, want_image, rtol=1e-10)
    np.testing.assert_allclose(got_text, want_text, rtol=1e-10)
    assert_close(parts.consistency, (image[:, :, None] * text[:, None]).sum(-1).mean((1, 2)))
    assert_close(parts.s_image, s_image.mean())
    assert_close(parts.s_text, s_text.mean())


def test_normalize_group_has_mean_0_pooled_std_1_and_survives_constant_groups():
    x = normal(4, 9) * torch.tensor([[50.0], [5.0], [0.5], [0.0]]) + 3
    z = normalize_group(x)
    assert_close(z.mean(1), torch.zeros(4, dtype=z.dtype), atol=1e-12, rtol=0)
    assert_close(z.square().mean(), torch.ones((), dtype=z.dtype), atol=1e-4, rtol=0)
    ratio = z.std(1, correction=0) / x.std(1, correction=0)                   # quiet groups stay quiet
    assert_close(ratio[:3], ratio[:1].expand(3)) and (z[3] == 0).all()
    nearly = torch.full((2, 8), 0.3) + 1e-7 * torch.arange(8)                 # fp32 rounding of equal cosines
    assert normalize_group(nearly).abs().max() < 0.01
    assert normalize_group(torch.full((1, 8), 0.3)).abs().max() < 0.01
    assert (normalize_group(torch.ones(1, 1)) == 0).all()


def test_units_and_offsets_of_a_group_change_no_advantage():
    image, text, s = unit(2, 4, 3), unit(2, 5, 3, seed=1), normal(2, 4, seed=2)
    other = normal(2, 5, seed=3)
    base = pair_reward(image, text, s, other, RewardConfig())
    shifted = pair_reward(image, text, 1000 * s + torch.tensor([[7.], [-3.]]), other - 5, RewardConfig())
    for a, b in zip(base[:2], shifted[:2]):
        assert_close(a, b, rtol=1e-3, atol=1e-3)                                   # the std's eps
        assert_close(leave_one_out(a), leave_one_out(a + torch.tensor([[10.], [-4.]])))


def test_reward_carries_no_gradient():
    inputs = unit(2, 3, 4), unit(2, 3, 4, seed=1), normal(2, 3), normal(2, 3)
    for x in inputs:
        x.requires_grad_()
    image, text, parts = pair_reward(*inputs, RewardConfig())
    assert not any(x.requires_grad for x in (image, text, *parts))


# ---- REINFORCE against exact gradients

def test_leave_one_out_is_the_loop_and_its_gradient_stops():
    reward = normal(3, 5).requires_grad_()
    got = leave_one_out(reward)
    for g, s in itertools.product(range(3), range(5)):
        others = [reward[g, r].item() for r in range(5) if r != s]
        assert got[g, s].item() == pytest.approx(reward[g, s].item() - sum(others) / 4)
    assert not got.requires_grad


def test_reinforce_gives_the_gradient_to_the_log_probability_only():
    log_prob, advantage = normal(4).requires_grad_(), normal(4, seed=1).requires_grad_()
    reinforce_loss(log_prob, advantage).backward()
    assert_close(log_prob.grad, -advantage.detach() / 4)
    assert advantage.grad is None


def test_leave_one_out_reinforce_averages_to_the_exact_gradient():
    """A 3-action policy, groups of S = 2: all 9 outcomes, weighted by their probability."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    R = torch.tensor([1.0, 0.0, 5.0], dtype=torch.float64)
    exact, = torch.autograd.grad((logits.softmax(0) * R).sum(), logits)
    mean = torch.zeros(3, dtype=torch.float64)
    for outcome in itertools.product(range(3), repeat=2):
        log_prob = logits.log_softmax(0)[list(outcome)][None]                      # (1, 2)
        loss = reinforce_loss(log_prob, leave_one_out(R[list(outcome)][None]))
        mean -= log_prob.detach().sum().exp() * torch.autograd.grad(loss, logits)[0]
    assert_close(mean, exact)


def test_scoring_every_image_against_all_texts_is_unbiased_with_less_variance():
    """Two independent policies, 2 images and 3 texts, 2 samples each: all 36 outcomes."""
    image, text = unit(2, 4), unit(3, 4, seed=1)
    logits = [normal(2, seed=2).requires_grad_(), normal(3, seed=3).requires_grad_()]
    p, q = (x.softmax(0) for x in logits)
    exact = torch.cat(torch.autograd.grad(p @ (image @ text.T) @ q, logits))
    mean, square = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for i, j, k, m in itertools.product(range(2), range(2), range(3), range(3)):
        log_p, log_q = logits[0].log_softmax(0)[[i, j]][None], logits[1].log_softmax(0)[[k, m]][None]
        weight = (log_p.sum() + log_q.sum()).exp().detach()
        alone = (image[[i, j]] * text[[k, m]]).sum(1)[None]                        # each with its own partner
        crossed = consistency(image[[i, j]][None], text[[k, m]][None])
        for row, (r_image, r_text) in enumerate([crossed, (alone, alone)]):
            loss = reinforce_loss(log_p, leave_one_out(r_image))
            loss = loss + reinforce_loss(log_q, leave_one_out(r_text))
            grad = -torch.cat(torch.autograd.grad(loss, logits, retain_graph=True))
            mean[row] += weight * grad
            square[row] += weight * (grad - exact).square().sum()
    assert_close(mean[0], exact)
    assert_close(mean[1], exact)
    assert square[0] < 0.9 * square[1]


def test_reinforce_on_a_two_step_diffusion_chain_is_the_exact_gradient():
    """x1 ~ N(a + 0.5, 0.7^2), x0 ~ N(b x1 + a x1^2 / 4, 0.4^2), R = x0^2 - x0, by Gauss-Hermite."""
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, -0.8))
    node, weight = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(12))
    weight = (weight[:, None] * weight / weight.sum() ** 2).flatten()              # (144,) probabilities
    e1, e0 = (v.flatten() for v in torch.meshgrid(node, node, indexing="ij"))
    mean0 = lambda x1: b * x1 + a * x1 ** 2 / 4
    R = lambda x0: x0 ** 2 - x0
    x1 = a + 0.5 + 0.7 * e1                                                   # reparametrized: the exact side
    exact = torch.autograd.grad((weight * R(mean0(x1) + 0.4 * e0)).sum(), (a, b))
    x1 = x1.detach()
    x0 = (mean0(x1) + 0.4 * e0).detach()
    mean1 = (a + 0.5).expand(144, 1)
    log_prob = gaussian_log_prob(x1[:, None], mean1, 0.7)
    log_prob = log_prob + gaussian_log_prob(x0[:, None], mean0(x1)[:, None], 0.4)
    loss = reinforce_loss(log_prob, 144 * weight * (R(x0) - 1.7))                  # any constant baseline
    for got, want in zip(torch.autograd.grad(loss, (a, b)), exact):
        assert_close(-got, want)


# ---- log-probabilities and the drift bound

def test_gaussian_log_prob_and_kl_are_those_of_torch_distributions():
    x, mean, ref = normal(4, 3, 2), normal(4, 3, 2, seed=1), normal(4, 3, 2, seed=2)
    for std in (torch.tensor(0.3, dtype=torch.float64), normal(4, 1, 1, seed=3).abs() + 0.1):
        assert_close(gaussian_log_prob(x, mean, std), Normal(mean, std).log_prob(x).sum((1, 2)))
        want = kl_divergence(Normal(mean, std), Normal(ref, std)).sum((1, 2))
        assert_close(gaussian_kl(mean, ref, std), want)
    assert_close(gaussian_log_prob(x, mean, 0.3), Normal(mean, 0.3).log_prob(x).sum((1, 2)))
    assert gradcheck(lambda m: gaussian_log_prob(x, m, 0.5), (mean.requires_grad_(),))
    assert gradcheck(lambda m: gaussian_kl(m, ref, 0.5), (mean,))
    half = gaussian_log_prob(x.bfloat16(), x.bfloat16() + 1, 0.02)
    assert half.dtype == torch.float32 and half.isfinite().all()


def test_categorical_kl_is_that_of_torch_distributions():
    log_p, log_q = (normal(3, 4, 5, seed=s).log_softmax(-1) for s in (0, 1))
    want = kl_divergence(Categorical(logits=log_p), Categorical(logits=log_q))     # (3, 4)
    assert_close(categorical_kl(log_p, log_q), want.sum(1))
    assert_close(categorical_kl(log_p[:, 0], log_q[:, 0]), want[:, 0])
    keep = torch.arange(4) < torch.tensor([[1], [4], [0]])
    assert_close(categorical_kl(log_p, log_q, keep), (want * keep).sum(1))
    logits = normal(2, 3, seed=4).requires_grad_()
    assert gradcheck(lambda x: categorical_kl(x.log_softmax(-1), log_q[:2, 0, :3].log_softmax(-1)), (logits,))


def test_categorical_kl_of_a_nucleus_is_finite_with_a_finite_gradient():
    logits = normal(2, 3, 5).requires_grad_()
    outside = torch.tensor([False, False, True, False, True])
    log_p = logits.masked_fill(outside, -math.inf).log_softmax(-1)
    for log_q in (normal(2, 3, 5, seed=1).log_softmax(-1), log_p.detach() * 1):
        kl = categorical_kl(log_p, log_q)
        p = log_p.exp().detach()
        assert_close(kl, torch.where(p > 0, p * (log_p - log_q), 0).nansum((1, 2)))
        assert torch.autograd.grad(kl.sum(), logits, retain_graph=True)[0].isfinite().all()
    assert categorical_kl(normal(1, 5).log_softmax(-1), log_p[0, :1].detach()).isinf().all()


# ---- the optimizer: only rows that were used

FAST = RewardConfig(lr_text=0.1)


def moved_rows(optimizer, table, rounds):
    """For each round, the rows that it changed, when it gives a gradient to the named rows only."""
    changed = []
    for pick in rounds:
        before = table.detach().clone()
        table.grad = torch.zeros_like(table)
        table.grad[pick] = 1.0
        optimizer.step()
        changed.append([r for r in range(len(table)) if not torch.equal(before[r], table[r])])
    return changed


def test_adamw_moves_rows_without_gradient_and_token_optimizer_does_not():
    table = nn.Parameter(normal(4, 3))
    assert moved_rows(torch.optim.AdamW([table], lr=0.1), table, [[0]]) == [[0, 1, 2, 3]]          # the trap
    assert moved_rows(token_optimizer({"text": table}, FAST), table, 9 * [[0]]) == 9 * [[0]]


def test_each_table_has_its_own_learning_rate():
    tables = {m: nn.Parameter(normal(2, 3)) for m in ("text", "image")}
    before = {m: table.detach().clone() for m, table in tables.items()}
    for table in tables.values():
        table.grad = torch.ones_like(table)
    token_optimizer(tables, RewardConfig(lr_image=0.5, lr_text=0.25)).step()
    assert_close({m: before[m] - tables[m].detach() for m in tables},              # Adam's first step is lr
                 {"text": torch.full_like(table, 0.25), "image": torch.full_like(table, 0.5)})


def test_momentum_moves_only_rows_used_before_and_dies_out():
    table = nn.Parameter(normal(4, 3))
    start, optimizer = table.detach().clone(), token_optimizer({"text": table}, FAST)
    assert moved_rows(optimizer, table, [[1], [0], [2]]) == [[1], [0, 1], [0, 1, 2]]
    after_three = table.detach().clone()
    moved_rows(optimizer, table, 200 * [[0]])
    assert ((table - after_three)[1] < 0).all()                                    # as its gradient said
    assert ((start - table)[1] < 10 * 0.1).all()                                   # at most 1 / (1 - beta1)
    assert torch.equal(start[3], table[3])


def test_reinforce_learns_the_rewarded_action_and_leaves_the_rest_to_the_bit():
    """Rows 0 and 1 play, rows 2 and 3 are never drawn; they and the frozen head keep their bits."""
    g, table, head = rng(), nn.Embedding(4, 6).double(), nn.Linear(6, 3).double().requires_grad_(False)
    with torch.no_grad():
        table.weight.copy_(normal(4, 6) / 10)                                     # about uniform: it explores
        head.weight.copy_(normal(3, 6, seed=1))
        head.bias.zero_()
    before = [p.clone() for p in (table.weight, head.weight, head.bias)]
    opt = token_optimizer({"text": table.weight}, RewardConfig(lr_text=0.05))
    best = torch.tensor([2, 0])  # row 0 -> action 2, row 1 -> 0
    for _ in range(60):
        log_pi = head(table(torch.arange(2))).log_softmax(-1)                      # (G, 3)
        action = torch.multinomial(log_pi.detach().exp(), 8, replacement=True, generator=g)          # (G, S)
        loss = reinforce_loss(log_pi.gather(1, action), leave_one_out((action == best[:, None]).double()))
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert (log_pi.exp().gather(1, best[:, None]) > 0.9).all()
    assert torch.equal(before[0][2:], table.weight[2:]) and torch.equal(before[1], head.weight)
    assert torch.equal(before[2], head.bias) and head.weight.grad is None


# ---- the judge

def gaussian_set(mean, cov, n=50, seed=0):
    """n rows whose mean and covariance are exactly these."""
    x = normal(n, len(mean), seed=seed)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T
    return x @ torch.linalg.cholesky(cov).T + mean


def test_frechet_distance_of_planted_gaussians():
    mean_a, mean_b = torch.tensor([1.0, 2, 3]).double(), torch.tensor([0.0, 2, 5]).double()
    var_a, var_b = torch.tensor([1.0, 4, 9]).double(), torch.tensor([4.0, 4, 1]).double()
    want = 1 + 0 + 4 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2
    a, b = gaussian_set(mean_a, var_a.diag()), gaussian_set(mean_b, var_b.diag(), n=80, seed=1)
    assert frechet_distance(a, b) == pytest.approx(want)
    assert frechet_distance(a, a + 2) == pytest.approx(12)


@pytest.mark.parametrize("n", [40, 4])                                       # 4 rows of width 6: no full rank
def test_frechet_distance_is_the_formula_with_a_matrix_root(n):
    a, b = normal(n, 6), normal(n + 3, 6, seed=1) @ normal(6, 6, seed=2)
    ca, cb = (np.cov(x.numpy(), rowvar=False) for x in (a, b))
    root = np.trace(scipy.linalg.sqrtm(ca @ cb)).real
    want = (a.mean(0) - b.mean(0)).square().sum().item() + np.trace(ca) + np.trace(cb) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a, a[torch.randperm(n, generator=rng())]) < 1e-12
    assert frechet_distance(a.float(), a.float()) < 1e-12


def test_swap_share_counts_wins_and_half_the_ties():
    assert swap_share(torch.tensor([1.0, 2, 3]), torch.tensor([0.0, 2, 4])).tolist() == [1.0, 0.5, 0.0]


def rank_loop(query, candidates, own):
    share = []
    for q, o in zip(query, own):
        mine = float(q @ candidates[o])
        lead = [mine - float(q @ c) for k, c in enumerate(candidates) if k != o]
        share.append(sum(0.5 if abs(d) <= 1e-6 else float(d > 0) for d in lead) / len(lead))
    return torch.tensor(share, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_judges_rank_as_the_loop_with_ties(dtype):
    image, text = unit(9, 4), unit(9, 4, seed=1)
    text[3] = text[5] + 1e-8                                                       # the same text, rounded
    image[1] = text[1]
    got = judge_consistency(image.to(dtype), text.to(dtype))
    assert_close(got.double(), rank_loop(image, text, range(9)), atol=1e-6, rtol=0)
    assert got[1] == 1
    prompt, index = unit(4, 4, seed=2), torch.tensor([0, 3, 2, 2, 1, 0, 3, 3, 1])
    got = judge_prompt(image.to(dtype), prompt.to(dtype), index)
    assert_close(got.double(), rank_loop(image, prompt, index), atol=1e-6, rtol=0)


def test_judge_consistency_in_chunks_is_the_whole_matrix_and_knows_chance():
    image, text = unit(2600, 8), unit(2600, 8, seed=1)                             # 2 chunks, 5,200 bits
    got, cosine = judge_consistency(image, text), image @ text.T
    assert 2600 ** 2 > 2 ** 22
    assert_close(got, (cosine.diagonal()[:, None] > cosine).double().sum(1) / 2599, atol=1e-3, rtol=0)
    assert abs(got.mean() - 0.5) < 5 * 0.29 / 2600 ** 0.5
    assert (judge_consistency(text, text) == 1).all()


def test_taste_is_the_mean_liked_embedding_minus_everybodys():
    e, user, item = normal(5, 3), torch.tensor([0, 0, 2, 2, 2]), torch.tensor([1, 4, 0, 0, 3])
    got = taste(e, user, item, 4)
    everybody = (e[1] + e[4] + 2 * e[0] + e[3]) / 5
    assert_close(got[0], (e[1] + e[4]) / 2 - everybody)
    assert_close(got[2], (2 * e[0] + e[3]) / 3 - everybody)
    assert (got[[1, 3]] == 0).all() and F.cosine_similarity(got[[1]], e[[0]]) == 0


def test_judge_measures_scores_each_modality_by_its_own_embedding_and_taste():
    judge, (images, tokens, _), (others, other_tokens, _) = scorer(), batch(7), batch(7, seed=1)
    own, other = Content(images, tokens), Content(others, other_tokens)
    in_batches = embed(judge, own, batch=3)
    x, y = judge.encode_image(images), judge.encode_text(tokens)
    assert_close(in_batches, {"image": x, "text": y})
    likes = {"image": x + 0.1 * normal(7, 16), "text": judge.encode_text(other_tokens)}  # text: theirs
    prompts, index = torch.tensor([[1, 0], [2, 3], [5, 0]]), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    found, topic = judge_measures(judge, own, other, likes, prompts, index), judge.encode_prompt(prompts)
    assert_close(found, {"judge_consistency": judge_consistency(x, y),
                         "judge_swap_image": torch.ones(7, dtype=torch.float64),
                         "judge_swap_text": torch.zeros(7, dtype=torch.float64),
                         "judge_prompt_image": judge_prompt(x, topic, index),
                         "judge_prompt_text": judge_prompt(y, topic, index)})
    assert not any(v.requires_grad for v in found.values())
    assert "judge_prompt_text" not in judge_measures(judge, own, other, likes, prompts[:1], index * 0)


def test_frechet_interval_is_the_delete_a_group_jackknife():
    made, real, group = normal(60, 3), normal(80, 3, seed=1) + 1, torch.arange(60) % 5
    left = [frechet_distance(made[[k for k in range(60) if k % 5 != g]], real) for g in range(5)]
    error = (4 / 5 * sum((d - sum(left) / 5) ** 2 for d in left)) ** 0.5
    got = frechet_interval(made, real, group, n_groups=5)
    assert got["mean"] == frechet_distance(made, real)
    assert got["high"] - got["mean"] == pytest.approx(scipy.stats.t.ppf(0.975, 4) * error)
    assert got["mean"] - got["low"] == pytest.approx(got["high"] - got["mean"])


def test_interval_without_clusters_is_students():
    v = normal(30) + 2
    want = scipy.stats.t.interval(0.9, 29, v.mean().item(), v.std().item() / 30 ** 0.5)
    got = interval(v, level=0.9)
    assert (got["low"], got["high"]) == pytest.approx(want) and got["mean"] == pytest.approx(v.mean().item())
    assert interval(v, torch.arange(30) * 7 - 50, level=0.9) == pytest.approx(got)


def test_interval_covers_the_truth_when_a_users_pairs_are_alike_and_the_naive_one_does_not():
    """400 data sets of 30 users with 1 to 15 pairs each, drawn around the user's own mean; the truth is 0."""
    g, hits = rng(), np.zeros(2)
    for _ in range(400):
        cluster = torch.repeat_interleave(torch.arange(30), torch.randint(1, 16, (30,), generator=g))
        values = torch.randn(30, generator=g)[cluster] + torch.randn(len(cluster), generator=g)
        for k, c in enumerate((cluster, None)):
            found = interval(values, c)
            hits[k] += found["low"] < 0 < found["high"]
    assert 0.90 <= hits[0] / 400 <= 0.99                                 # 0.95 +- 4 sigma of 0.011, less bias
    assert hits[1] / 400 < 0.75


def test_interval_counts_copies_of_a_pair_once_and_admits_ignorance():
    v = normal(12)
    once, copies = interval(v), interval(v.repeat(5), torch.arange(12).repeat(5))
    assert copies == pytest.approx(once)
    alone = interval(v, torch.zeros(12))
    assert alone["mean"] == pytest.approx(v.mean().item())
    assert math.isnan(alone["low"]) and math.isnan(alone["high"])


# ---- meta device, errors, configuration

def test_every_training_step_runs_on_the_meta_device():
    with torch.device("meta"):
        s, table = Scorer(CFG, 20, 6), nn.Embedding(9, 16)
        ids = lambda *shape: torch.zeros(*shape, dtype=torch.long)
        s.loss(torch.empty(4, 3, 64, 64), ids(4, 7), ids(4, 3)).backward()
        emb = s.encode_text(ids(12, 7)).view(3, 4, -1)
        score = table(ids(3, 4)).sum(-1)                                           # (G, S)
        reward, _, parts = pair_reward(emb, emb, score, score, CFG)
        mean = table(ids(3, 4))
        log_prob = gaussian_log_prob(torch.empty(12, 16), mean.flatten(0, 1), 0.5).view(3, 4)
        log_p = mean.flatten(0, 1).log_softmax(-1)
        drift = gaussian_kl(mean, mean, 0.5).mean() + categorical_kl(log_p, log_p.detach()).mean()
        (reinforce_loss(log_prob, leave_one_out(reward)) + drift).backward()
    token_optimizer({"image": table.weight}, CFG).step()
    assert s.log_scale.grad.is_meta and table.weight.grad.is_meta and parts.consistency.is_meta


def test_float64_stays_float64():
    s, data = scorer(), batch()
    assert s.loss(*data, rng()).dtype == torch.float64
    parts = pair_reward(unit(1, 2, 3), unit(1, 2, 3), normal(1, 2), normal(1, 2), CFG)[2]
    assert all(x.dtype == torch.float64 for x in parts)


@pytest.mark.parametrize("call, message", [
    (lambda: scorer().encode_image(torch.zeros(2, 1, 32, 32)), r"images are \(2, 1, 32, 32\); need \(B, 3"),
    (lambda: scorer().loss(*batch(4)[:2], batch(3)[2]), "4 images, 4 texts and 3 prompts"),
    (lambda: disjoint_halves(1, rng()), "1 items for scorer and judge"),
    (lambda: pair_reward(*2 * [unit(2, 3, 4)], normal(2, 4), normal(2, 3), CFG), r"images: shapes \(2, 3\)"),
    (lambda: pair_reward(*2 * [unit(2, 3, 4)], normal(2, 3), normal(3, 3), CFG), r"texts: shapes \(2, 3\)"),
    (lambda: leave_one_out(normal(3, 1)), r"reward is \(3, 1\); need \(G, S\) with S >= 2"),
    (lambda: leave_one_out(normal(3)), r"reward is \(3,\)"),
    (lambda: reinforce_loss(normal(6), normal(2, 3)), r"shapes \(6,\) and \(2, 3\) differ; give one of each"),
    (lambda: categorical_kl(normal(2, 3), normal(3, 3)), r"log_p and log_q: shapes \(2, 3\)"),
    (lambda: frechet_distance(normal(1, 3), normal(5, 3)), r"\(1, 3\) and \(5, 3\); need at least 2 rows"),
    (lambda: frechet_distance(normal(5, 2), normal(5, 3)), "of equal width"),
    (lambda: swap_share(normal(2), normal(3)), "score the same pairs twice"),
    (lambda: judge_consistency(unit(1, 3), unit(1, 3)), "1 pair has no other"),
    (lambda: judge_consistency(unit(2, 3), unit(3, 3)), "the same pairs"),
    (lambda: judge_prompt(unit(2, 3), unit(1, 3), torch.zeros(2).long()), "1 prompt has no other"),
    (lambda: interval(torch.zeros(0)), "need at least one"),
    (lambda: interval(torch.tensor([1.0, math.nan])), "1 of them non-finite"),
    (lambda: interval(torch.zeros(3), torch.zeros(2)), "one cluster for every value"),
])
def test_errors_name_the_tensor_and_the_cure(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("field, value, cure", [
    ("lambda_c", -1.0, ">= 0"), ("lambda_p", math.nan, "finite"), ("kl_text", math.inf, "finite"),
    ("scorer_lr", 0.0, "> 0"), ("lr_text", -0.1, "> 0"), ("images", 1, ">= 2"), ("texts", 1, ">= 2"),
    ("groups", 0, ">= 1"), ("rounds", -1, ">= 0"), ("scorer_width", 12, "a multiple of 8"),
    ("scorer_temperature", 0.001, "0.01 <= scorer_temperature"), ("scorer_drop", 1.0, "scorer_drop < 1"),
    ("scorer_mirror", -0.1, ">= 0"), ("scorer_zoom", 1.0, "scorer_zoom < 1"), ("scorer_dropout", 1.0, "scorer_dropout < 1"),
    ("diffusion_steps", 1, ">= 2")])
def test_config_refuses_what_cannot_work(field, value, cure):
    with pytest.raises(ValueError, match=f"RewardConfig.{field}={value}: need .*{cure}"):
        RewardConfig(**{field: value})


def test_config_needs_some_reward_and_allows_either_alone():
    with pytest.raises(ValueError, match="lambda_p=0.0: need .* else no reward"):
        RewardConfig(lambda_c=0.0, lambda_p=0.0)
    image, text, s = unit(1, 3, 4), unit(1, 3, 4, seed=1), normal(1, 3)
    only_c = pair_reward(image, text, s, s, RewardConfig(lambda_c=1.0, lambda_p=0.0))
    assert_close(only_c[0], normalize_group(consistency(image, text)[0]))
    assert RewardConfig(lambda_c=0.0).lambda_p == 1.0
