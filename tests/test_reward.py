"""reward.py against slow obvious versions, exact policy gradients and planted answers."""
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

from reward import (Content, RewardConfig, Scorer, best_pair, categorical_kl, consistency, embed,
                    frechet_distance, frechet_interval, gaussian_kl, gaussian_log_prob,
                    halves_by_text, info_nce, interval, judge_pairs, leave_one_out, mean_by_user,
                    normalize_group, pair_reward, random_window, rank_share, reinforce_loss,
                    same_rows, share_interval, share_of_pairs, swap_share, taste_without,
                    token_optimizer, _masked_mean)

CFG = RewardConfig(scorer_width=8, scorer_dim=16)
PLAIN = replace(CFG, scorer_shift=0, scorer_mirror=0.0, scorer_zoom=0.0, scorer_dropout=0.0,
                scorer_drop=0.0)  # the loss without augmentation: no randomness left


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
    same = same_rows(torch.tensor([[1, 2], [1, 3], [1, 2]]))
    assert same.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_loss_is_the_mean_of_three_info_nces_with_equal_texts_and_prompts_apart():
    """Items 0 and 3 share a text, of which different tokens are hidden; 1 and 2 share a prompt."""
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
    got = s.loss(images, tokens, prompt, rng(3))
    assert_close(got, want / 3, rtol=1e-6, atol=1e-7)  # its scale is fp32


def test_temperature_is_learnt_and_clamped():
    s, data = scorer(PLAIN), batch()
    s.loss(*data).backward()
    assert s.log_scale.grad != 0
    for end, beyond, inside in ((math.log(100), 50.0, 4.0), (0.0, -5.0, 0.5)):  # 1 / 0.01 and 1
        values = []
        for log_scale in (end, beyond, inside):
            s.log_scale.data.fill_(log_scale)
            values.append(s.loss(*data))
        assert_close(values[0], values[1])
        assert (values[0] - values[2]).abs() > 1e-3


@pytest.mark.parametrize("H", [16, 32, 64])
def test_embeddings_are_unit_vectors_that_depend_on_their_own_input_only(H):
    s, (images, tokens, prompt) = scorer(), batch(H=H)
    for encode, x in ((s.encode_image, images), (s.encode_text, tokens), (s.encode_prompt, prompt)):
        whole = encode(x)
        assert_close(whole, torch.cat([encode(row[None]) for row in x]))  # alone = among others
        assert_close(whole.norm(dim=1), torch.ones(6, dtype=torch.float64))
        assert (whole[0] - whole[1]).abs().max() > 1e-3  # and it does depend on that


def test_a_large_picture_is_seen_at_32_pixels():
    s, (images, *_) = scorer(), batch()
    doubled = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_close(s.encode_image(doubled), s.encode_image(images))


def test_each_convolution_halves_the_picture():
    s, x, sides = scorer(), batch()[0], []
    for layer in s.picture[:-2]:
        x = layer(x)
        sides += [x.shape[2:]] if isinstance(layer, nn.Conv2d) else []
    assert sides == [(16, 16), (8, 8), (4, 4)]


def test_text_padding_and_prompt_order_do_not_matter_but_text_order_does():
    s, (_, tokens, prompt) = scorer(), batch()
    prompt[0] = torch.tensor([3, 0, 0])  # a single word
    s.token.weight.data[0] = s.word.weight.data[0] = 9.0  # whatever the padding row holds
    assert_close(s.encode_text(F.pad(tokens, (0, 4))), s.encode_text(tokens))
    assert_close(s.encode_text(tokens[:, :5]), s.encode_text(tokens))
    assert_close(s.encode_prompt(F.pad(prompt.flip(1), (2, 0))), s.encode_prompt(prompt))
    assert (s.encode_text(tokens[:, :5].flip(1)) - s.encode_text(tokens)).abs().max() > 1e-3
    assert s.encode_text(tokens * 0).isfinite().all()
    assert s.encode_prompt(prompt * 0).isfinite().all()


def test_augment_moves_pictures_by_whole_pixels_and_hides_tokens():
    cfg, (images, tokens, _) = replace(PLAIN, scorer_shift=2, scorer_drop=0.25), batch(B=400)
    moved, hidden = scorer(cfg).augment(images, tokens, rng(3))
    seen = set()
    for before, after in zip(images[:60], moved):
        padded = F.pad(before[None], (2, 2, 2, 2), mode="replicate")[0]  # (3, 36, 36)
        hits = [(i, j) for i, j in itertools.product(range(5), repeat=2)
                if torch.equal(padded[:, i:i + 32, j:j + 32], after)]
        assert len(hits) == 1
        seen.update(hits)
    assert {i for i, _ in seen} == {j for _, j in seen} == set(range(5)) and len(seen) > 15
    share = 1 - (hidden != 0).sum() / (tokens != 0).sum()  # of 2,000: sigma 0.01
    assert abs(share - 0.25) < 0.05 and torch.equal(hidden, tokens * (hidden != 0))
    same = scorer(PLAIN).augment(images, tokens, rng(3))
    assert torch.equal(same[0], images) and torch.equal(same[1], tokens)


def test_augment_mirrors_half_of_the_pictures():
    images, tokens, _ = batch(B=400)
    after, _ = scorer(replace(PLAIN, scorer_mirror=0.5)).augment(images, tokens, rng(3))
    mirrored = torch.tensor([torch.equal(x.flip(2), y) for x, y in zip(images, after)])
    assert torch.equal(after[~mirrored], images[~mirrored])
    assert 0.37 < mirrored.double().mean() < 0.63  # 5 sigma


def test_random_window_shows_a_part_of_a_picture_enlarged():
    """Channels are the column and the row: even steps, as the window's side, within the picture."""
    ramp = torch.linspace(-1, 1, 32, dtype=torch.float64).expand(32, 32)
    ramps = torch.stack([ramp, ramp.T]).expand(300, 2, 32, 32)
    seen = random_window(ramps, 0.25, rng(1))
    column, row = seen[:, 0], seen[:, 1].transpose(1, 2)
    for place in (column, row):
        assert_close(place, place[:, :1].expand_as(place))  # no shear
        side = (place[:, 0, -1] - place[:, 0, 0]) / 2
        assert_close(place[:, 0].diff(dim=1), (side * 2 / 31)[:, None].expand(-1, 31))
        assert 0.75 <= side.min() < 0.77 and 0.98 < side.max() <= 1
        assert place.min() >= -1 - 1e-12 and place.max() <= 1 + 1e-12
        assert place[:, 0, 0].min() < -0.97 and place[:, 0, -1].max() > 0.97  # anywhere
    assert_close(column[:, 0, -1] - column[:, 0, 0], row[:, 0, -1] - row[:, 0, 0])  # square
    images = batch()[0]
    assert_close(random_window(images, 0.0, rng(2)), images)


def test_loss_drops_features_of_pictures_in_training_alone():
    """The features that remain are 1 / (1 - p) times as large; encode_image drops none."""
    s, (images, tokens, prompt) = scorer(replace(PLAIN, scorer_dropout=0.4)), batch()
    given = []
    s.picture[-1].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    s.encode_image(images)
    s.loss(images, tokens, prompt, rng(4))
    whole, dropped = given
    kept = dropped != 0
    assert_close(dropped[kept], (whole / 0.6)[kept])
    share = kept.double().mean()  # of 768 features: sigma 0.018
    assert abs(share - 0.6) < 0.09


def test_the_same_generator_state_gives_the_same_loss_to_the_bit():
    s, data = scorer(), batch()
    first = s.loss(*data, rng(1))
    assert torch.equal(first, s.loss(*data, rng(1)))
    assert not torch.equal(first, s.loss(*data, rng(2)))


def test_loss_at_the_start_is_about_chance():
    images, tokens, _ = batch(B=64)
    prompt = torch.arange(64)[:, None] % 6 + 1
    loss = scorer(replace(CFG, scorer_temperature=1.0)).loss(images, tokens, prompt, rng())
    assert abs(loss - math.log(64)) < 0.2, f"InfoNCE {loss:.2f}, chance is ln 64 = 4.16"


def planted(B, seed):
    """Noisy pictures of one of 6 colours, its token among filler, a prompt for 3 colours each."""
    g = rng(seed)
    colour = torch.randint(6, (B,), generator=g)
    rgb = torch.tensor([[1., 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
    rgb = rgb[colour] * 1.6 - 0.8  # (B, 3)
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
    weights = zip(first.picture.parameters(), judge.picture.parameters())
    assert not any(torch.equal(p, q) for p, q in weights if p.dim() > 1)
    before = [p.clone() for p in judge.parameters()]
    fit(first, planted(200, seed=1), steps=80, seed=0)
    assert all(torch.equal(p, q) for p, q in zip(before, judge.parameters()))
    images, tokens, prompt, colour = planted(120, seed=2)  # never seen
    with torch.no_grad():
        x, y = first.encode_image(images), first.encode_text(tokens)
        topic = first.encode_prompt(torch.tensor([[1], [2]]))
    found = colour[(x @ y.T).argmax(1)]
    assert (found == colour).float().mean() > 0.95, "chance is 1/6"
    assert ((x @ topic.T).argmax(1) + 1 == prompt[:, 0]).float().mean() > 0.95, "chance is 1/2"


# ---- the reward

def test_pair_reward_is_the_loop():
    cfg = RewardConfig(lambda_c=0.7, lambda_p=2.0)
    image, text = unit(3, 4, 5), unit(3, 6, 5, seed=1)
    s_image, s_text = normal(3, 4, seed=2) * 5 + 1, normal(3, 6, seed=3)
    got_image, got_text, parts = pair_reward(image, text, s_image, s_text, cfg)
    centred = lambda rows: [np.array(row) - np.mean(row) for row in rows]
    pooled = lambda rows: np.array(rows) / (np.sqrt(np.mean(np.square(rows))) + 1e-4)
    c = [[[float((x * y).sum()) for y in text[g]] for x in image[g]] for g in range(3)]
    rows = [[np.mean(row) for row in c[g]] for g in range(3)]
    columns = [[np.mean(column) for column in zip(*c[g])] for g in range(3)]
    want_image = 0.7 * pooled(centred(rows)) + 2 * pooled(centred(s_image.tolist()))
    want_text = 0.7 * pooled(centred(columns)) + 2 * pooled(centred(s_text.tolist()))
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
    ratio = z.std(1, correction=0) / x.std(1, correction=0)  # quiet groups stay quiet
    assert_close(ratio[:3], ratio[:1].expand(3)) and (z[3] == 0).all()
    nearly = torch.full((2, 8), 0.3) + 1e-7 * torch.arange(8)  # fp32 rounding of equal cosines
    assert normalize_group(nearly).abs().max() < 0.01
    assert normalize_group(torch.full((1, 8), 0.3)).abs().max() < 0.01
    assert (normalize_group(torch.ones(1, 1)) == 0).all()
    small = torch.tensor([[-1e-4, 1e-4]])  # a deviation as small as eps counts half
    assert_close(normalize_group(small), torch.tensor([[-0.5, 0.5]]))


def test_units_and_offsets_of_a_group_change_no_advantage():
    image, text, s = unit(2, 4, 3), unit(2, 5, 3, seed=1), normal(2, 4, seed=2)
    other = normal(2, 5, seed=3)
    base = pair_reward(image, text, s, other, RewardConfig())
    s = 1000 * s + torch.tensor([[7.], [-3.]])
    shifted = pair_reward(image, text, s, other - 5, RewardConfig())
    for a, b in zip(base[:2], shifted[:2]):
        assert_close(a, b, rtol=1e-3, atol=1e-3)  # the std's eps
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
        log_prob = logits.log_softmax(0)[list(outcome)][None]  # (1, 2)
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
        log_p = logits[0].log_softmax(0)[[i, j]][None]
        log_q = logits[1].log_softmax(0)[[k, m]][None]
        weight = (log_p.sum() + log_q.sum()).exp().detach()
        alone = (image[[i, j]] * text[[k, m]]).sum(1)[None]  # each with its own partner
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
    weight = (weight[:, None] * weight / weight.sum() ** 2).flatten()  # (144,) probabilities
    e1, e0 = (v.flatten() for v in torch.meshgrid(node, node, indexing="ij"))
    mean0 = lambda x1: b * x1 + a * x1 ** 2 / 4
    R = lambda x0: x0 ** 2 - x0
    x1 = a + 0.5 + 0.7 * e1  # reparametrized: the exact side
    exact = torch.autograd.grad((weight * R(mean0(x1) + 0.4 * e0)).sum(), (a, b))
    x1 = x1.detach()
    x0 = (mean0(x1) + 0.4 * e0).detach()
    mean1 = (a + 0.5).expand(144, 1)
    log_prob = gaussian_log_prob(x1[:, None], mean1, 0.7)
    log_prob = log_prob + gaussian_log_prob(x0[:, None], mean0(x1)[:, None], 0.4)
    loss = reinforce_loss(log_prob, 144 * weight * (R(x0) - 1.7))  # any constant baseline
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
    want = kl_divergence(Categorical(logits=log_p), Categorical(logits=log_q))  # (3, 4)
    assert_close(categorical_kl(log_p, log_q, torch.ones(3, 4).bool()), want.sum(1))
    keep = torch.arange(4) < torch.tensor([[1], [4], [0]])
    assert_close(categorical_kl(log_p, log_q, keep), (want * keep).sum(1))
    logits = normal(3, 4, 5, seed=4).requires_grad_()
    assert gradcheck(lambda x: categorical_kl(x.log_softmax(-1), log_q, keep), (logits,))


def test_categorical_kl_of_a_nucleus_is_finite_with_a_finite_gradient():
    logits = normal(2, 3, 5).requires_grad_()
    outside, keep = torch.tensor([False, False, True, False, True]), torch.ones(2, 3).bool()
    log_p = logits.masked_fill(outside, -math.inf).log_softmax(-1)
    for log_q in (normal(2, 3, 5, seed=1).log_softmax(-1), log_p.detach() * 1):
        kl = categorical_kl(log_p, log_q, keep)
        p = log_p.exp().detach()
        assert_close(kl, torch.where(p > 0, p * (log_p - log_q), 0).nansum((1, 2)))
        assert torch.autograd.grad(kl.sum(), logits, retain_graph=True)[0].isfinite().all()
    everywhere = normal(2, 3, 5).log_softmax(-1)
    assert categorical_kl(everywhere, log_p.detach(), keep).isinf().all()
    keep[0] = False  # what does not count is 0, and not inf * 0
    assert categorical_kl(everywhere, log_p.detach(), keep).tolist() == [0, math.inf]


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
    trap = torch.optim.AdamW([table], lr=0.1)
    assert moved_rows(trap, table, [[0]]) == [[0, 1, 2, 3]]
    assert moved_rows(token_optimizer({"text": table}, FAST), table, 9 * [[0]]) == 9 * [[0]]


def test_each_table_has_its_own_learning_rate():
    tables = {m: nn.Parameter(normal(2, 3)) for m in ("text", "image")}
    before = {m: table.detach().clone() for m, table in tables.items()}
    for table in tables.values():
        table.grad = torch.ones_like(table)
    token_optimizer(tables, RewardConfig(lr_image=0.5, lr_text=0.25)).step()
    assert_close({m: before[m] - tables[m].detach() for m in tables},  # Adam's first step is lr
                 {"text": torch.full_like(table, 0.25), "image": torch.full_like(table, 0.5)})


def test_momentum_moves_only_rows_used_before_and_dies_out():
    table = nn.Parameter(normal(4, 3))
    start, optimizer = table.detach().clone(), token_optimizer({"text": table}, FAST)
    assert moved_rows(optimizer, table, [[1], [0], [2]]) == [[1], [0, 1], [0, 1, 2]]
    after_three = table.detach().clone()
    moved_rows(optimizer, table, 200 * [[0]])
    assert ((table - after_three)[1] < 0).all()  # as its gradient said
    assert ((start - table)[1] < 10 * 0.1).all()  # at most 1 / (1 - beta1)
    assert torch.equal(start[3], table[3])


def test_reinforce_learns_the_rewarded_action_and_leaves_the_rest_to_the_bit():
    """Rows 0 and 1 play, rows 2 and 3 are never drawn; they and the frozen head keep their bits."""
    g, table = rng(), nn.Embedding(4, 6).double()
    head = nn.Linear(6, 3).double().requires_grad_(False)
    with torch.no_grad():
        table.weight.copy_(normal(4, 6) / 10)  # about uniform: it explores
        head.weight.copy_(normal(3, 6, seed=1))
        head.bias.zero_()
    before = [p.clone() for p in (table.weight, head.weight, head.bias)]
    opt = token_optimizer({"text": table.weight}, RewardConfig(lr_text=0.05))
    best = torch.tensor([2, 0])  # row 0 -> action 2, row 1 -> 0
    for _ in range(60):
        log_pi = head(table(torch.arange(2))).log_softmax(-1)  # (G, 3)
        action = torch.multinomial(log_pi.detach().exp(), 8, True, generator=g)  # (G, S)
        reward = (action == best[:, None]).double()
        loss = reinforce_loss(log_pi.gather(1, action), leave_one_out(reward))
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert (log_pi.exp().gather(1, best[:, None]) > 0.9).all()
    assert torch.equal(before[0][2:], table.weight[2:]) and torch.equal(before[1], head.weight)
    assert torch.equal(before[2], head.bias) and head.weight.grad is None


# ---- the best of several pairs

def best_pair_loop(image, text, s_image, s_text, cfg):
    """The highest reward over all pairs of a group, each term in units of its spread there."""
    chosen = []
    for x, y, a, b in zip(image, text, s_image, s_text):
        cosine = np.array([[float(u @ v) for v in y] for u in x])
        see, read = (s.numpy() / np.std(s.numpy()) for s in (a, b))
        best, pair = -math.inf, None
        for i, j in itertools.product(range(len(x)), range(len(y))):
            agree = cosine[i, j] / np.std(cosine)
            reward = cfg.lambda_c * agree + cfg.lambda_p * (see[i] + read[j])
            if reward > best:
                best, pair = reward, (i, j)
        chosen.append(pair)
    return torch.tensor(chosen).T


@pytest.mark.parametrize("lambda_c, lambda_p", [(2.0, 1.0), (0.3, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_best_pair_is_the_loop_in_any_units(lambda_c, lambda_p):
    cfg = RewardConfig(lambda_c=lambda_c, lambda_p=lambda_p)
    image, text = unit(40, 4, 3), unit(40, 6, 3, seed=1)
    s_image, s_text = normal(40, 4, seed=2), normal(40, 6, seed=3)
    s_image[:20] *= 100  # each group has a spread of its own
    want = best_pair_loop(image, text, s_image, s_text, cfg)
    for scores in ((s_image, s_text), (1e3 * s_image + 7, 30 * s_text - 5)):
        assert torch.equal(torch.stack(best_pair(image, text, *scores, cfg)), want)
    assert {*want[0].tolist()} == set(range(4)) and {*want[1].tolist()} == set(range(6))


def test_best_pair_hears_no_rounding_of_equal_scores():
    """Scores that are equal but for fp32 rounding leave the choice to the cosine."""
    image, text = unit(9, 5, 3).float(), unit(9, 5, 3, seed=1).float()
    nearly = 0.3 + 1e-7 * torch.arange(5.0).expand(9, 5)
    cosine = image @ text.mT
    for same in (nearly, torch.full((9, 5), 0.3)):
        i, j = best_pair(image, text, same, same, RewardConfig())
        assert torch.equal(cosine[torch.arange(9), i, j], cosine.flatten(1).amax(1))
    image, text = torch.eye(2)[None], torch.eye(2)[None, :1]  # image 0 agrees, image 1 pleases
    for spread, chosen in ((1.0, 1), (1e-4, 0)):  # as small as eps: it counts half
        scores = torch.tensor([[-spread, spread]]), torch.zeros(1, 1)
        got = best_pair(image, text, *scores, RewardConfig(lambda_c=1.0, lambda_p=1.5))
        assert got[0] == chosen


# ---- the judge

@pytest.mark.parametrize("n_texts", [2, 7, 60])
def test_halves_share_neither_item_nor_text_and_lose_none(n_texts):
    which = torch.cat([torch.arange(n_texts), torch.randint(n_texts, (80,), generator=rng())])
    tokens = torch.tensor([3, 9, 4, 0]).repeat(len(which), 1)
    tokens[:, 2] += which  # texts that differ in one token alone
    a, b = halves_by_text(tokens, rng())
    assert sorted(a.tolist() + b.tolist()) == list(range(len(which)))
    assert torch.equal(a, a.sort().values) and torch.equal(b, b.sort().values)
    texts = [{*which[half].tolist()} for half in (a, b)]
    assert texts[0].isdisjoint(texts[1]) and len(texts[0]) == n_texts // 2
    assert torch.equal(a, halves_by_text(tokens, rng())[0])
    if n_texts == 60:
        assert not torch.equal(a, halves_by_text(tokens, rng(1))[0])
        assert texts[0] != set(range(30))  # at random


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


@pytest.mark.parametrize("n", [40, 4])  # 4 rows of width 6: no full rank
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
    own, other = torch.tensor([1.0, 2, 3]), torch.tensor([0.0, 2, 4])
    assert swap_share(own, other).tolist() == [1.0, 0.5, 0.0]


def rank_loop(query, candidates, own):
    share = []
    for q, o in zip(query, own):
        mine = float(q @ candidates[o])
        lead = [mine - float(q @ c) for k, c in enumerate(candidates) if k != o]
        share.append(sum(0.5 if abs(d) <= 1e-6 else float(d > 0) for d in lead) / len(lead))
    return torch.tensor(share, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rank_share_is_the_loop_with_ties(dtype):
    image, text = unit(9, 4), unit(9, 4, seed=1)
    text[3] = text[5] + 1e-8  # the same text, rounded
    image[1] = text[1]
    got = rank_share(image.to(dtype), text.to(dtype), torch.arange(9))
    assert_close(got.double(), rank_loop(image, text, range(9)), atol=1e-6, rtol=0)
    assert got[1] == 1
    prompt, own = unit(4, 4, seed=2), torch.tensor([0, 3, 2, 2, 1, 0, 3, 3, 1])
    got = rank_share(image.to(dtype), prompt.to(dtype), own)
    assert_close(got.double(), rank_loop(image, prompt, own), atol=1e-6, rtol=0)


def test_rank_share_in_pieces_is_the_whole_and_knows_chance():
    query, candidates = unit(2600, 8), unit(30, 8, seed=1)  # 3 pieces
    own = torch.randint(30, (2600,), generator=rng(2))
    got, cosine = rank_share(query, candidates, own), query @ candidates.T
    below = cosine < cosine.gather(1, own[:, None])
    assert_close(got, below.double().sum(1) / 29, atol=0.02, rtol=0)  # half a tie at most
    assert abs(got.mean() - 0.5) < 5 * 0.3 / 2600**0.5
    assert (rank_share(candidates, candidates, torch.arange(30)) == 1).all()
    alone = rank_share(query[:3], candidates[:1], torch.zeros(3).long())
    assert alone.isnan().all()  # no other to compare with


def test_mean_by_user_is_the_loop():
    values, user = normal(8, 3), torch.tensor([4, 0, 0, 2, 4, 4, 0, 0])
    mean, count = mean_by_user(values, user, 6)
    assert count.tolist() == [4, 0, 1, 0, 3, 0] and count.dtype == values.dtype
    for u in range(6):
        rows = [values[r] for r in range(8) if user[r] == u]
        assert_close(mean[u], sum(rows) / len(rows) if rows else torch.zeros(3).double())


def random_likes(n_users, n_items, each):
    """Every user likes `each` items, drawn at random: users (R,), items (R,)."""
    user = torch.arange(n_users).repeat_interleave(each)
    item = torch.rand(n_users, n_items, generator=rng(7)).argsort(1)[:, :each].flatten()
    return user, item


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_taste_without_is_the_loop(dtype):
    """Users 0 to 4 like 4 items, 5 one, 6 and 8 none; each user is judged with each item."""
    e = normal(9, 3).to(dtype) + 2
    user, item = random_likes(5, 9, 4)
    user, item = torch.cat([user, torch.tensor([5])]), torch.cat([item, torch.tensor([3])])
    who, judged = torch.cartesian_prod(torch.tensor([0, 1, 2, 3, 4, 5, 6, 8]), torch.arange(9)).T
    got, everybody = taste_without(e, user, item, who, judged), e[item].mean(0)
    for u, i, row in zip(who, judged, got):
        others = [e[k] for w, k in zip(user, item) if w == u and k != i]
        if others:
            assert_close(row, sum(others) / len(others) - everybody)
        else:
            assert (row == 0).all()  # to the bit: a cosine with rounding would be anything
    liking = F.cosine_similarity(got, e[judged])
    assert (liking[(who == 5) & (judged == 3)] == 0).all() and (liking[who == 6] == 0).all()
    assert got[who == 5].abs().sum(1).count_nonzero() == 8  # of 9 items


def test_taste_without_gives_noise_no_credit():
    """Random likes of random items: nothing to know. What holds the item judged 'knows' it."""
    e, (user, item) = normal(500, 16), random_likes(300, 500, 5)
    other = torch.randint(500, item.shape, generator=rng(1))
    share = lambda taste: swap_share(F.cosine_similarity(e[item], taste),
                                     F.cosine_similarity(e[other], taste)).mean()
    assert abs(share(taste_without(e, user, item, user, item)) - 0.5) < 5 * 0.5 / 1500**0.5
    assert share((mean_by_user(e[item], user, 300)[0] - e[item].mean(0))[user]) > 0.85


def test_taste_without_finds_planted_tastes():
    """Users like items of one of 4 kinds: their own held out item beats one of another kind."""
    kind = torch.arange(200) % 4
    e = unit(4, 8, seed=1)[kind] + 0.3 * normal(200, 8)
    user = torch.arange(40).repeat_interleave(6)
    item = 4 * torch.randint(50, (240,), generator=rng(2)) + user % 4
    user, item = torch.stack([user, item]).unique(dim=1)  # each pair once
    taste = taste_without(e, user, item, user, item)
    own, other = (F.cosine_similarity(e[i], taste) for i in (item, (item + 1) % 200))
    assert swap_share(own, other).mean() > 0.95


def test_judge_pairs_scores_each_modality_by_its_own_embedding_and_taste():
    judge, (images, tokens, _), (others, other_tokens, _) = scorer(), batch(7), batch(7, seed=1)
    again = batch(7, seed=2)[1]
    own, other = Content(images, tokens), Content(others, other_tokens)
    x, y, z = judge.encode_image(images), judge.encode_text(tokens), judge.encode_text(again)
    assert_close(embed(judge, own, batch=3), {"image": x, "text": y})
    likes = {"image": x + 0.1 * normal(7, 16), "text": judge.encode_text(other_tokens)}
    found, place = judge_pairs(judge, own, other, again, likes), torch.arange(7)
    assert_close(found, {"judge_consistency": rank_share(x, y, place),
                         "judge_consistency_repaired": rank_share(x, z, place),
                         "judge_swap_image": torch.ones(7, dtype=torch.float64),
                         "judge_swap_text": torch.zeros(7, dtype=torch.float64)})
    assert not torch.equal(rank_share(x, y, place), rank_share(x, z, place))
    assert not any(v.requires_grad for v in found.values())


@pytest.mark.parametrize("as_bool", [False, True])
def test_share_of_pairs_is_the_loop(as_bool):
    g = rng()
    differ, counted = torch.rand(6, 5, 5, generator=g), torch.rand(6, 5, 5, generator=g) < 0.6
    differ = (differ + differ.mT) / 2
    differ, counted = differ > 0.5 if as_bool else differ, counted | counted.mT
    counted[4] = torch.eye(5, dtype=torch.bool)  # no two samples
    got = share_of_pairs(differ, counted)
    for group in range(6):
        pairs = [float(differ[group, i, j]) for i, j in itertools.combinations(range(5), 2)
                 if counted[group, i, j]]
        assert got[group].item() == pytest.approx(sum(pairs) / len(pairs) if pairs else math.nan,
                                                  nan_ok=True)
    assert got.isnan().tolist() == [False] * 4 + [True, False]
    assert share_of_pairs(differ[:, :1, :1], counted[:, :1, :1]).isnan().all()


# ---- statistics

def test_interval_without_clusters_is_students():
    v = normal(30) + 2
    want = scipy.stats.t.interval(0.95, 29, v.mean().item(), v.std().item() / 30**0.5)
    got = interval(v)
    assert (got["low"], got["high"]) == pytest.approx(want)
    assert got["mean"] == pytest.approx(v.mean().item())
    assert interval(v, torch.arange(30) * 7 - 50) == pytest.approx(got)


def users_with_pairs(n_users, most, g):
    """The user of each pair, 1 to `most` pairs each."""
    pairs = torch.randint(1, most + 1, (n_users,), generator=g)
    return torch.arange(n_users).repeat_interleave(pairs)


def test_interval_covers_the_truth_when_a_users_pairs_are_alike_and_the_naive_one_does_not():
    """400 data sets of 30 users with 1 to 15 pairs, drawn around the user's own mean; truth: 0."""
    g, hits = rng(), np.zeros(2)
    for _ in range(400):
        cluster = users_with_pairs(30, 15, g)
        values = torch.randn(30, generator=g)[cluster] + torch.randn(len(cluster), generator=g)
        for k, c in enumerate((cluster, None)):
            found = interval(values, c)
            hits[k] += found["low"] < 0 < found["high"]
    assert 0.90 <= hits[0] / 400 <= 0.99  # 0.95 +- 4 sigma of 0.011, less bias
    assert hits[1] / 400 < 0.75


BOTH = pytest.mark.parametrize("estimate", [interval, share_interval])


@BOTH
def test_intervals_count_copies_of_a_pair_once_and_admit_ignorance(estimate):
    v = torch.rand(12, generator=rng())
    assert estimate(v.repeat(5), torch.arange(12).repeat(5)) == pytest.approx(estimate(v))
    alone, nothing = estimate(v, torch.zeros(12)), estimate(torch.zeros(0))
    assert alone["mean"] == pytest.approx(v.mean().item())
    assert all(math.isnan(x) for x in (alone["low"], alone["high"], *nothing.values()))
    assert alone.keys() == nothing.keys() == {"mean", "low", "high"}


@BOTH
def test_intervals_ignore_what_was_not_measured(estimate):
    """nan, and the clusters of which nothing was measured."""
    v, cluster = torch.rand(20, generator=rng()), torch.arange(20) // 4
    v[[1, 6, 16, 17, 18, 19]] = math.nan
    known = ~v.isnan()
    assert estimate(v, cluster) == pytest.approx(estimate(v[known], cluster[known]))
    assert estimate(v) == pytest.approx(estimate(v[known]))
    assert math.isnan(estimate(v[16:])["mean"])


@pytest.mark.parametrize("right, n", [(0, 20), (20, 20), (3, 20), (1, 5), (196, 200)])
def test_share_interval_of_independent_values_is_wilsons_with_t_for_z(right, n):
    values = (torch.arange(n) < right).float()
    level = 2 * scipy.stats.norm.cdf(scipy.stats.t.ppf(0.975, n - 1)) - 1  # whose z is t
    want = scipy.stats.binomtest(right, n).proportion_ci(level, method="wilson")
    for cluster in (None, torch.randperm(n, generator=rng())):
        got = share_interval(values, cluster)
        assert (got["low"], got["high"]) == pytest.approx((want.low, want.high), abs=1e-9)
        assert got["mean"] == pytest.approx(right / n)
        assert 0 <= got["low"] < got["high"] <= 1


def test_share_interval_counts_clusters_where_they_do_not_differ():
    """12 users, each with one right pair of two: no spread, but 12 users are still few."""
    got = share_interval(torch.tensor([0.0, 1.0]).repeat(12), torch.arange(12).repeat_interleave(2))
    assert got == pytest.approx(share_interval((torch.arange(12) < 6).float()))


def test_share_interval_covers_shares_near_1_and_the_symmetric_one_does_not():
    """400 data sets of 50 users with 1 to 10 pairs; a user's chance is Beta, 0.98 on average."""
    g, hits = rng(), np.zeros(2)
    chance = torch.from_numpy(np.random.default_rng(0).beta(0.98 * 6, 0.02 * 6, (400, 50)))
    for row in chance:
        cluster = users_with_pairs(50, 10, g)
        values = (torch.rand(len(cluster), generator=g) < row[cluster]).double()
        for k, estimate in enumerate((share_interval, interval)):
            found = estimate(values, cluster)
            hits[k] += found["low"] <= 0.98 <= found["high"]
    assert hits[0] / 400 >= 0.90 and hits[1] / 400 < 0.90


def test_frechet_interval_is_the_jackknife_over_whole_users_and_real_rows():
    made, real = normal(60, 3), normal(83, 3, seed=1) + 1
    user = 100 - 7 * torch.arange(60).remainder(12)  # 12 users, 5 rows each, any numbers
    whole, pseudo = frechet_distance(made, real), []
    for part in range(5):
        users = [u for k, u in enumerate(sorted({*user.tolist()})) if k % 5 != part]
        rows = [r for r in range(60) if user[r].item() in users]
        others = [r for r in range(83) if r % 5 != part]
        pseudo.append(5 * whole - 4 * frechet_distance(made[rows], real[others]))
    want = scipy.stats.t.interval(0.95, 4, np.mean(pseudo), np.std(pseudo, ddof=1) / 5**0.5)
    got = frechet_interval(made, real, user, n_groups=5)
    assert (got["low"], got["high"]) == pytest.approx(want)
    assert got["mean"] == pytest.approx(np.mean(pseudo))
    assert frechet_interval(made, real, user, 99) == frechet_interval(made, real, user, 12)


def test_frechet_interval_covers_planted_distances_without_bias():
    """100 times two samples of one population, and of two: one wider and moved, d^2 = 2 + 2."""
    g, found = rng(), {0.0: [], 4.0: []}
    for truth, _ in itertools.product(found, range(100)):
        made, real = torch.randn(150, 8, generator=g), torch.randn(150, 8, generator=g)
        if truth:
            real = real * 1.5 + 0.5
        inside = frechet_interval(made, real, torch.arange(150) // 3)
        found[truth].append((inside["mean"], inside["low"] <= truth <= inside["high"],
                             frechet_distance(made, real)))
    for truth, rows in found.items():
        mean, covered, plain = np.mean(rows, axis=0)
        assert covered >= 0.90
        assert abs(mean - truth) < 0.5 * (plain - truth)  # the plain distance is too large
# ---- meta device, errors, configuration

def test_every_training_step_runs_on_the_meta_device():
    with torch.device("meta"):
        s, table = Scorer(CFG, 20, 6), nn.Embedding(9, 16)
        ids = lambda *shape: torch.zeros(*shape, dtype=torch.long)
        s.loss(torch.empty(4, 3, 64, 64), ids(4, 7), ids(4, 3)).backward()
        emb = s.encode_text(ids(12, 7)).view(3, 4, -1)
        score = table(ids(3, 4)).sum(-1)  # (G, S)
        reward, _, parts = pair_reward(emb, emb, score, score, CFG)
        mean = table(ids(3, 4))
        log_prob = gaussian_log_prob(torch.empty(12, 16), mean.flatten(0, 1), 0.5).view(3, 4)
        log_p = mean.log_softmax(-1)
        drift = gaussian_kl(mean, mean, 0.5) + categorical_kl(log_p, log_p.detach(), score > 0)
        (reinforce_loss(log_prob, leave_one_out(reward)) + drift.mean()).backward()
    token_optimizer({"image": table.weight}, CFG).step()
    assert s.log_scale.grad.is_meta and table.weight.grad.is_meta and parts.consistency.is_meta


def test_float64_stays_float64():
    s, data = scorer(), batch()
    assert s.loss(*data, rng()).dtype == torch.float64
    parts = pair_reward(unit(1, 2, 3), unit(1, 2, 3), normal(1, 2), normal(1, 2), CFG)[2]
    assert all(x.dtype == torch.float64 for x in parts)


@pytest.mark.parametrize("call, message", [
    (lambda: leave_one_out(normal(3, 1)), r"reward is \(3, 1\); need S >= 2 samples"),
    (lambda: reinforce_loss(normal(6), normal(2, 3)), r"\(6,\) but advantage is \(2, 3\)"),
    (lambda: halves_by_text(torch.ones(5, 3).long(), rng()), "1 different texts; need 2"),
    (lambda: halves_by_text(torch.ones(0, 3).long(), rng()), "0 different texts; need 2"),
    (lambda: frechet_distance(normal(1, 3), normal(5, 3)), "1 and 5 rows; need 2 of each"),
    (lambda: frechet_distance(normal(5, 3), normal(1, 3)), "5 and 1 rows; need 2 of each"),
    (lambda: interval(torch.tensor([1.0, -math.inf])), "infinity; give nan"),
])
def test_errors_name_the_tensor_and_the_cure(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_either_term_of_the_reward_may_stand_alone():
    image, text, s = unit(2, 3, 4), unit(2, 3, 4, seed=1), normal(2, 3)
    agree = pair_reward(image, text, s, s, RewardConfig(lambda_c=1.0, lambda_p=0.0))
    assert_close(agree[0], normalize_group(consistency(image, text)[0]))
    please = pair_reward(image, text, s, s, RewardConfig(lambda_c=0.0, lambda_p=1.0))
    assert_close(please[1], normalize_group(s))


def test_the_masked_mean_is_that_of_the_places_that_count():
    x = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)
    found = _masked_mean(x, keep)
    assert_close(found[0], (x[0, 0] + x[0, 1] + x[0, 3]) / 3)
    assert_close(found[1:], torch.stack([torch.zeros(2), x[2, 1]]))


def test_two_clusters_are_enough_for_an_interval():
    found = interval(torch.tensor([0.2, 0.4, 0.9]), torch.tensor([7, 7, 3]))
    half = scipy.stats.t.ppf(0.975, 1) * math.sqrt(2 * (2 * 0.4**2)) / 3      # residuals of the clusters: -0.4 and 0.4
    assert found["mean"] == pytest.approx(0.5)
    assert [found["low"], found["high"]] == pytest.approx([0.5 - half, 0.5 + half])
