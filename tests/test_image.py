"""Autoencoder, denoiser, DDIM and its log-probabilities, each against a slow version right at sight."""
import copy
import math
from dataclasses import replace

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from generators import (T_MAX, Autoencoder, CrossAttention, Denoiser, ImageConfig, ResidualBlock, alpha_sigma,
                        ddim_step, denoise, guidance_at, guided_v, sample_latents, sampling_times, table_as,
                        time_features)
from train import ema_update

TINY = dict(size=16, latent=2, width=8, heads=2, ae_width=16, time_mean=0.3, time_std=1.1, guidance=1.0,
            guidance_until=0.0)
LARGE = dict(size=64, width=512, layers=2, heads=8)                 # about 100 M parameters


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def randomized(module, scale=1.0, dtype=torch.float64):
    """The module with every parameter drawn at its own layer's scale, even those that start at 0."""
    g = rng(1)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=g) * scale / math.sqrt(fan_in))
    return module.to(dtype)


def tiny(words=5, levels=2, codes=3, dtype=torch.float64, **cfg):
    """A denoiser of random weights on latents (B, 2, 4, 4)."""
    denoiser = Denoiser(ImageConfig(**TINY | cfg), words, levels, codes)
    return randomized(denoiser, dtype=dtype)


def tiny_autoencoder(dtype=torch.float64):
    return randomized(Autoencoder(ImageConfig(**TINY)), dtype=dtype)


def batch(size=4, words=5, levels=2, codes=3, seed=0):
    """z (B, 2, 4, 4), t (B,), prompt (B, 3) with padding, prefs (B, M) with rows and single tokens null."""
    g = rng(seed)
    prompt = torch.randint(1, words + 1, (size, 3), generator=g)
    prompt[1::3, 2:] = 0
    prefs = torch.randint(codes, (size, levels), generator=g)
    prefs[2::4], prefs[3::4, 0] = -1, -1
    z = torch.randn(size, 2, 4, 4, generator=g, dtype=torch.float64)
    return z, torch.rand(size, generator=g, dtype=torch.float64), prompt, prefs


class Known(nn.Module):
    """Stands in for a denoiser whose v is known: v(z, t), any condition."""

    def __init__(self, v, eta=1.0):
        super().__init__()
        self.v, self.cfg = v, ImageConfig(guidance=1.0, eta=eta)

    def forward(self, z, t, prompt, prefs):
        return self.v(z, t[:, None, None, None])


def no_condition(size):
    return torch.zeros(size, 1, dtype=torch.int64), torch.full((size, 2), -1)


# Autoencoder ------------------------------------------------------------------------------------------------

def pictures(n, size=16, seed=0):
    """Blocks of 4x4 pixels, each of one colour in [-1, 1]."""
    blocks = torch.rand(n, 3, size // 4, size // 4, generator=rng(seed), dtype=torch.float64) * 2 - 1
    return blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)


def slow_autoencoder_loss(net, x, kl, noise):
    """Picture by picture, number by number."""
    absolute, square, divergence = [], [], []
    for picture, eps in zip(x, noise):
        mean, log_var = net.encoder(picture[None])[0].chunk(2)
        std = log_var.clamp(-12, 4).exp().sqrt()
        error = (net.decoder((mean + std * eps)[None])[0] - picture).flatten()
        absolute += [e.abs() for e in error]
        square += [e * e for e in error]
        posterior = [Normal(*number) for number in zip(mean.flatten(), std.flatten())]
        divergence += [kl_divergence(q, Normal(0.0, 1.0)) for q in posterior]
    return sum(absolute) / len(absolute) + sum(square) / len(square) + kl * sum(divergence) / len(divergence)


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_autoencoder_loss_is_the_loop_over_numbers_in_value_and_gradient(kl):
    net, x = tiny_autoencoder(), pictures(2).requires_grad_()
    noise = torch.randn(2, 2, 4, 4, generator=rng(7), dtype=torch.float64)
    loss, slow = net.loss(x, kl, rng(7)), slow_autoencoder_loss(net, x, kl, noise)
    assert_close(loss, slow)
    wrt = [x, *net.parameters()]
    for got, want in zip(torch.autograd.grad(loss, wrt), torch.autograd.grad(slow, wrt)):
        assert_close(got, want)


@pytest.mark.parametrize("bias", [-1e6, 1e6])
def test_autoencoder_loss_stays_finite_whatever_the_encoder_says(bias):
    net = tiny_autoencoder()
    net.encoder[-1].bias.data[2:] = bias
    log_var = net.posterior(pictures(2))[1]
    assert log_var.min() == log_var.max() == max(-12, min(4, bias))
    assert net.loss(pictures(2), 1.0, rng()).isfinite()


def test_the_latent_is_the_posterior_mean_standardized_by_the_buffers():
    net, x = tiny_autoencoder(), pictures(2)
    net.mean += torch.tensor([0.3, -1.0])[:, None, None]
    net.std *= torch.tensor([2.0, 0.5])[:, None, None]
    mean = net.encoder(x)[:, :2]
    for c, (shift, scale) in enumerate([(0.3, 2.0), (-1.0, 0.5)]):
        assert_close(net.encode(x)[:, c], (mean[:, c] - shift) / scale, rtol=1e-6, atol=1e-6)
    assert_close(net.decode(net.encode(x)), net.decoder(mean))
    assert_close(net.encode(x)[:1], net.encode(x[:1]))


def test_standardize_gives_mean_0_std_1_once_and_for_all_and_keeps_what_decode_makes():
    net, x = tiny_autoencoder(), pictures(9)
    rebuilt = net.decode(net.encode(x))
    net.standardize(3 * net.encode(pictures(2, seed=1)) + 1)        # from whatever was set before
    for _ in range(2):
        net.standardize(net.encode(x))
        z = net.encode(x).transpose(0, 1).flatten(1)                # (C, I h h)
        assert_close(z.mean(1), torch.zeros(2, dtype=torch.float64), atol=1e-10, rtol=0)
        assert_close(z.std(1), torch.ones(2, dtype=torch.float64))
        assert_close(net.decode(net.encode(x)), rebuilt)
    before = net.mean.clone(), net.std.clone()
    net.standardize(net.encode(x))
    assert_close((net.mean, net.std), before)                       # idempotent
    assert not net.mean.requires_grad and {"mean", "std"} <= set(net.state_dict())


def test_standardize_survives_a_channel_that_says_nothing():
    net, x = tiny_autoencoder(), pictures(3)
    net.encoder[-1].weight.data[0] = 0
    net.standardize(net.encode(x))
    assert net.encode(x).isfinite().all() and net.decode(net.encode(x)).isfinite().all()


@pytest.mark.parametrize("size", [16, 32, 64])
def test_autoencoder_maps_sizes_and_each_place_sees_its_surroundings_only(size):
    net = randomized(Autoencoder(ImageConfig(size=size, ae_width=16)), dtype=torch.float32)
    x = torch.randn(2, 3, size, size, generator=rng())
    z, y = net.encode(x), net.decode(net.encode(x))
    assert z.shape == (2, 4, size // 4, size // 4) and y.shape == x.shape
    stem = nn.Sequential(*net.encoder[:3])                      # the norms behind it see the whole picture
    x.requires_grad_()
    stem(x)[0, :, 1, 2].sum().backward()
    row, column = x.grad[0].abs().sum((0, 1)).nonzero()[:, 0], x.grad[0].abs().sum((0, 2)).nonzero()[:, 0]
    assert not x.grad[1].any()
    assert (row.min(), row.max()) == (5, 14) and (column.min(), column.max()) == (1, 10)    # 4x4, 3 around


def test_autoencoder_learns_a_few_pictures_by_heart():
    torch.manual_seed(0)
    net, x = Autoencoder(ImageConfig(**TINY | dict(latent=4))), pictures(8).float()
    optimizer, g = torch.optim.Adam(net.parameters(), lr=5e-3), rng()
    start = (net.decode(net.encode(x)) - x).square().mean()
    for _ in range(100):
        loss = net.loss(x, 1e-4, g)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    net.standardize(net.encode(x).detach())
    error = (net.decode(net.encode(x)) - x).square().mean()
    assert 0.3 < start and error < 0.01, f"squared error {start:.3f}, then {error:.4f}; of grey: 1/3"


# Parts of the denoiser --------------------------------------------------------------------------------------

def slow_attention(net, x, tokens, present):
    """One picture, place and head at a time, over the tokens that are present."""
    (weight_k, weight_v), (bias_k, bias_v) = net.key_value.weight.chunk(2), net.key_value.bias.chunk(2)
    query, out = net.query(net.norm(x)), torch.zeros_like(x)
    size = x.shape[1] // net.heads
    for b in range(len(x)):
        memory = tokens[b][present[b]]                              # (N', C)
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                for c in range(0, x.shape[1], size):
                    key = memory @ weight_k[c:c + size].T + bias_k[c:c + size]
                    value = memory @ weight_v[c:c + size].T + bias_v[c:c + size]
                    attend = (key @ query[b, c:c + size, i, j] / math.sqrt(size)).softmax(0)
                    out[b, c:c + size, i, j] = attend @ value
    return x + net.out(out)


def test_attention_is_the_loop_over_places_and_heads_in_value_and_gradient():
    net = randomized(CrossAttention(16, 4), 2.0)
    x, tokens = normal(3, 16, 2, 3).requires_grad_(), normal(3, 5, 16, seed=1).requires_grad_()
    present = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    fast, slow = net(x, tokens, present), slow_attention(net, x, tokens, present)
    assert_close(fast, slow)
    wrt, up = [x, tokens, *net.parameters()], normal(*x.shape, seed=2)
    fast_grad = torch.autograd.grad(fast, wrt, up)
    for got, want in zip(fast_grad, torch.autograd.grad(slow, wrt, up)):
        assert_close(got, want)
    assert not fast_grad[1][~present].any()


def test_residual_block_is_its_formula_and_starts_as_the_identity():
    x, cond = normal(2, 16, 3, 3), normal(2, 5, seed=1)
    for block in (ResidualBlock(16, 5).double(), CrossAttention(16, 2).double()):
        args = (cond,) if isinstance(block, ResidualBlock) else (normal(2, 4, 16), torch.ones(2, 4).bool())
        assert torch.equal(block(x, *args), x)
    block = randomized(ResidualBlock(16, 5))

    def norm(x, layer):                 # 8 groups of 2 channels
        group = x.reshape(2, 8, -1)
        group = group - group.mean(2, keepdim=True)
        unit = group / (group.square().mean(2, keepdim=True) + 1e-5).sqrt()
        return unit.reshape(x.shape) * layer.weight[:, None, None] + layer.bias[:, None, None]
    a, b = (cond @ block.film.weight.T + block.film.bias)[:, :, None, None].chunk(2, 1)
    h = block.conv1(F.silu(norm(x, block.norm1)))
    assert_close(block(x, cond), x + block.conv2(F.silu(norm(h, block.norm2) * (1 + a) + b)))


def test_time_features_are_sines_and_cosines_at_frequencies_1_to_1000():
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    feature = time_features(t, 8)
    for b in range(3):
        for i in range(4):
            angle = t[b].item() * 1000 ** (i / 3)
            assert_close(feature[b, [i, 4 + i]].tolist(), [math.sin(angle), math.cos(angle)])


def test_condition_is_the_loop_over_words_and_levels():
    net = tiny()
    _, _, prompt, prefs = batch(6)
    prompt[4, 1:], prompt[5] = 0, 0                                 # one word; no word at all
    tokens, present, pooled = net.condition(prompt, prefs)
    for b in range(6):
        words = [net.words.weight[word] for word in prompt[b] if word != 0]
        tastes = [net.null[m] if code < 0 else net.preference.weight[m * 3 + code]
                  for m, code in enumerate(prefs[b])]
        topic = sum(words) / len(words) if words else torch.zeros(16, dtype=torch.float64)
        assert_close(tokens[b][present[b]], torch.stack(words + tastes))
        assert_close(pooled[b], net.pool(torch.cat([topic, *tastes])))


def test_every_code_of_every_level_has_a_row_of_its_own_and_null_none():
    net, (z, t, prompt, _) = tiny(), batch(1)
    for level in range(2):
        for code in range(-1, 3):
            prefs = torch.full((1, 2), -1)
            prefs[0, level] = code
            net.zero_grad()
            net(z, t, prompt, prefs).square().sum().backward()
            rows = net.preference.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
            assert rows == ([] if code < 0 else [level * 3 + code])
            nulls = net.null.grad.abs().sum(1).nonzero()[:, 0].tolist()
            assert nulls == [m for m in range(2) if prefs[0, m] < 0]


# The denoiser -----------------------------------------------------------------------------------------------

def test_denoiser_is_its_diagram():
    """down -> shrink -> (block, attend) x 2 -> grow, beside the skip -> merge -> up -> out."""
    net, (z, t, prompt, prefs) = tiny(layers=1), batch()
    tokens, present, pooled = net.condition(prompt, prefs)
    cond = F.silu(net.time(time_features(t, 64)) + pooled)
    skip = net.down[0](net.conv_in(z), cond)
    low = net.attend[0](net.middle[0](net.shrink(skip), cond), tokens, present)
    low = net.attend[1](net.middle[1](low, cond), tokens, present)
    assert low.shape == (4, 16, 2, 2)
    both = torch.cat([skip, F.pixel_shuffle(net.grow[0](low), 2)], dim=1)
    assert_close(net(z, t, prompt, prefs), net.out(net.up[0](net.merge(both), cond)))


def test_padding_and_order_of_the_prompt_move_nothing_but_its_words_do():
    net, (z, t, _, prefs) = tiny(), batch()
    prompt = torch.tensor([[1, 2, 0]] * 4)
    v = net(z, t, prompt, prefs)
    for same in ([[2, 1, 0]], [[0, 2, 1]], [[1, 2, 0, 0, 0]], [[0, 1, 0, 2]], [[1, 2]]):
        assert_close(net(z, t, torch.tensor(same * 4), prefs), v)
    for other in ([[1, 3, 0]], [[1, 0, 0]], [[0, 0, 0]], [[1, 2, 3]]):
        assert (net(z, t, torch.tensor(other * 4), prefs) - v).abs().amax((1, 2, 3)).min() > 1e-3
    assert_close(net(z, t, torch.zeros(4, 3, dtype=torch.int64), prefs), net(z, t, prompt[:, :0], prefs))


def test_everything_that_the_denoiser_is_told_moves_it():
    net, (z, t, prompt, prefs) = tiny(), batch()
    v = net(z, t, prompt, prefs)
    for other in ((z + 0.1, t, prompt, prefs), (z, 1 - t, prompt, prefs), (z, t, 1 + prompt % 5, prefs),
                  (z, t, prompt, (prefs + 2) % 4 - 1)):
        assert (net(*other) - v).abs().amax((1, 2, 3)).min() > 1e-3


def test_batch_size_and_order_move_nothing_nulls_and_codes_side_by_side():
    net, args = tiny(), batch(7)
    v = net(*args)
    assert_close(torch.cat([net(*(x[b:b + 1] for x in args)) for b in range(7)]), v)
    order = torch.tensor([6, 2, 0, 5, 1, 3, 4])
    assert_close(net(*(x[order] for x in args)), v[order])


def test_memory_format_moves_nothing():
    net, (z, *rest) = tiny(), batch()
    v = net(z, *rest)
    last = net.to(memory_format=torch.channels_last)
    assert_close(last(z.to(memory_format=torch.channels_last), *rest), v)


def test_loss_is_the_loop_over_pictures_for_the_same_draws_in_value_and_gradient():
    net, (z, _, prompt, prefs) = tiny(), batch()
    loss, g, total = net.loss(z, prompt, prefs, rng(3)), rng(3), 0.0
    u = torch.randn(4, generator=g, dtype=torch.float64)
    eps = torch.randn(z.shape, generator=g, dtype=torch.float64)
    for b in range(4):
        t = 1 / (1 + math.exp(-0.3 - 1.1 * u[b]))
        alpha, sigma = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
        noisy = (alpha * z[b] + sigma * eps[b])[None]
        v = net(noisy, torch.tensor([t], dtype=torch.float64), prompt[b:b + 1], prefs[b:b + 1])[0]
        total = total + (v - (alpha * eps[b] - sigma * z[b])).square().sum() / z.numel()
    assert_close(loss, total)
    wrt = list(net.parameters())
    for got, want in zip(torch.autograd.grad(loss, wrt), torch.autograd.grad(total, wrt)):
        assert_close(got, want)


def test_tokens_and_what_stands_in_for_them_start_alike():
    torch.manual_seed(0)
    net = Denoiser(ImageConfig(width=64), 5, 8, 4)
    for rows in (net.null, net.preference.weight):                  # (8, 128), (32, 128) standard normal
        assert abs(rows.mean()) < 5 / math.sqrt(rows.numel())
        assert abs(rows.std() - 1) < 5 / math.sqrt(2 * rows.numel())


def test_loss_starts_at_1_for_v_starts_at_0():
    torch.manual_seed(0)
    net = Denoiser(ImageConfig(**TINY), 5, 2, 3)
    _, t, prompt, prefs = batch(512)
    z = torch.randn(512, 2, 4, 4, generator=rng(2))
    assert not net(z, t.float(), prompt, prefs).any()
    loss = net.loss(z, prompt, prefs, rng()).item()                 # mean of 2^14 squares, each of variance 2
    assert abs(loss - 1) < 5 * math.sqrt(2 / 2 ** 14)


def gaussian_v(mean, var):
    """E[v | z_t] for z_0 ~ N(mean, var), number by number: what the best denoiser says."""
    def v(z, t):
        alpha, sigma = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
        surprise = (z - alpha * mean) / (alpha ** 2 * var + sigma ** 2)
        return alpha * (sigma * surprise) - sigma * (mean + alpha * var * surprise)
    return v


def test_the_ideal_denoiser_has_the_least_loss():
    """What is added to E[v | z_t] costs its mean square, whatever function of z_t and t it is: E[v | z_t] is
    the minimum. 200 losses of 500 numbers each give the standard error."""
    ideal = gaussian_v(0.7, 0.25)
    for extra in (lambda z, t: 0.2, lambda z, t: 0.2 * z, lambda z, t: 0.3 * (t - 0.5),
                  lambda z, t: 0.1 * z.sin() / (t + 0.2), lambda z, t: 0.2 * ideal(z, t)):
        gain, square = [], []

        def worse(z, t):
            square.append((0 * z + extra(z, t)).square().mean())
            return ideal(z, t) + extra(z, t)
        for seed in range(200):
            z = 0.7 + 0.5 * torch.randn(500, 1, 1, 1, generator=rng(seed), dtype=torch.float64)
            least, more = (Denoiser.loss(Known(v), z, *no_condition(500), rng(1000 + seed))
                           for v in (ideal, worse))
            gain.append(more - least)
        cost, square = torch.stack(gain), torch.stack(square)
        error = (cost - square).std() / math.sqrt(200)
        assert abs((cost - square).mean()) < 5 * error < square.mean() / 2


def test_denoiser_learns_planted_latents_and_samples_each_from_its_condition():
    torch.manual_seed(0)
    net = Denoiser(ImageConfig(**TINY | dict(width=16)), 2, 2, 2)
    prompt = torch.tensor([1, 1, 1, 1, 2, 2, 2, 2])[:, None]
    prefs = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]] * 2)
    planted = torch.randn(8, 2, 4, 4, generator=rng(5))
    optimizer, g, log = torch.optim.Adam(net.parameters(), lr=5e-3), rng(), []
    data = [x.repeat(8, *[1] * (x.ndim - 1)) for x in (planted, prompt, prefs)]
    for _ in range(120):
        loss = net.loss(*data, g)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        log.append(loss.detach())
    last = torch.stack(log[-10:]).mean()
    assert abs(log[0] - 1) < 0.3 and last < 0.1, f"loss {log[0]:.2f}, then {last:.3f}"
    for eta in (0.0, 1.0):
        net.cfg = replace(net.cfg, eta=eta)
        z = sample_latents(net, prompt, prefs, rng(1))
        distance = (z[:, None] - planted).square().mean((2, 3, 4))                          # (8, 8)
        assert torch.equal(distance.argmin(1), torch.arange(8)) and distance.diagonal().max() < 0.2


# DDIM -------------------------------------------------------------------------------------------------------

def test_alpha_sigma_is_a_quarter_turn_from_picture_to_noise():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = alpha_sigma(t)
    assert_close(alpha ** 2 + sigma ** 2, torch.ones_like(t))
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()
    assert (alpha[0], sigma[0]) == (1, 0) and abs(alpha[-1]) < 1e-15 and sigma[-1] == 1
    assert_close(alpha, sigma.flip(0))
    alpha_bar = [math.cos(math.pi * i / 200) ** 2 for i in range(101)]            # 2102.09672v1, Eq. 17
    assert_close((alpha ** 2).tolist(), alpha_bar)


@pytest.mark.parametrize("steps", [1, 3, 8, 50])
def test_sampling_times_fall_evenly_to_exactly_0(steps):
    times = sampling_times(steps)
    assert len(times) == steps + 1 and times[-1] == 0 and times[0] == T_MAX
    assert_close(times, [T_MAX * (1 - k / steps) for k in range(steps + 1)])
    assert math.cos(math.pi / 2 * T_MAX) < 0.05                     # hardly anything of the picture


def slow_ddim(x, eps, bar_t, bar_s, eta):
    """2010.02502v4 on numbers, the paper's alpha being alpha_bar = alpha^2: mean by Eq. 12, std by Eq. 16."""
    std = eta * math.sqrt((1 - bar_s) / (1 - bar_t)) * math.sqrt(1 - bar_t / bar_s)
    predicted = (x - math.sqrt(1 - bar_t) * eps) / math.sqrt(bar_t)
    return math.sqrt(bar_s) * predicted + math.sqrt(1 - bar_s - std ** 2) * eps, std


TIMES = [(0.98, 0.8575), (0.7, 0.3), (0.5, 0.49), (0.98, 0.0), (0.1225, 0.0), (0.9, 0.001)]


def bar(t):
    return math.cos(math.pi * t / 2) ** 2


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("t, s", TIMES)
def test_ddim_step_is_the_papers_on_numbers(t, s, eta):
    clean, eps = normal(2, 1, 2, 2), normal(2, 1, 2, 2, seed=1)
    z = math.sqrt(bar(t)) * clean + math.sqrt(1 - bar(t)) * eps
    v = math.sqrt(bar(t)) * eps - math.sqrt(1 - bar(t)) * clean
    mean, std = ddim_step(z, v, t, s, eta)
    assert mean.shape == z.shape and std.shape == ()
    for got, x, e in zip(mean.flatten(), z.flatten(), eps.flatten()):
        want, want_std = slow_ddim(x.item(), e.item(), bar(t), bar(s), eta)
        assert_close((got.item(), std.item()), (want, want_std))
    assert (std == 0) == (s == 0 or eta == 0)
    assert gradcheck(lambda z, v: ddim_step(z, v, t, s, eta)[0], (z.requires_grad_(), v.requires_grad_()))


@pytest.mark.parametrize("t, s", TIMES)
def test_ancestral_step_is_the_posterior_of_the_forward_process(t, s):
    """eta = 1 is DDPM's q(z_s | z_t, z_0) (2006.11239v2, Eq. 7): z_s ~ N(alpha_s z_0, sigma_s^2) conditioned
    on z_t ~ N(a z_s, 1 - a^2), a = alpha_t / alpha_s."""
    clean, eps = normal(2, 1, 2, 2), normal(2, 1, 2, 2, seed=1)
    z = math.sqrt(bar(t)) * clean + math.sqrt(1 - bar(t)) * eps
    v = math.sqrt(bar(t)) * eps - math.sqrt(1 - bar(t)) * clean
    mean, std = ddim_step(z, v, t, s, 1.0)
    a, var = math.sqrt(bar(t) / bar(s)), 1 - bar(s)
    gain = var * a / (a * a * var + 1 - a * a)                      # Kalman's gain
    want = math.sqrt(bar(s)) * clean
    assert_close(mean, want + gain * (z - a * want))
    assert_close(std.item(), math.sqrt(max(0.0, var - gain * a * var)), atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_the_true_v_is_inverted_exactly_at_eta_0_in_any_number_of_steps(steps):
    clean, start = normal(3, 2, 4, 4, seed=9), normal(3, 2, 4, 4)

    def v(z, t):                        # eps is what is left of z beside clean
        alpha, sigma = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
        return alpha * (z - alpha * clean) / sigma - sigma * clean
    times = sampling_times(steps)
    alpha, sigma = math.cos(math.pi * T_MAX / 2), math.sin(math.pi * T_MAX / 2)
    eps = (start - alpha * clean) / sigma                           # the same along the whole path
    for k in range(1, steps + 1):
        angle, z = math.pi / 2 * times[k], denoise(Known(v, eta=0.0), start, times[:k + 1], *no_condition(3))
        assert_close(z, math.cos(angle) * clean + math.sin(angle) * eps)
    assert_close(z, clean)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_ideal_denoiser_samples_the_mean_and_covariance_of_gaussian_data(eta):
    """Two correlated channels, 16,000 draws: 5 sigma of a variance are 0.07, of a mean 0.04. That the steps
    are 400 and not infinitely many costs a variance 0.015; that noise starts at T_MAX, a mean 0.02."""
    mean = torch.tensor([0.5, -0.3], dtype=torch.float64)
    cov = torch.tensor([[1.2, 0.5], [0.5, 0.6]], dtype=torch.float64)

    def v(z, t):
        angle = t[0].item() * math.pi / 2
        alpha, sigma = math.cos(angle), math.sin(angle)
        noisy_cov = alpha ** 2 * cov + sigma ** 2 * torch.eye(2, dtype=torch.float64)
        error = (z - alpha * mean[:, None, None]).transpose(0, 1).flatten(1)                # (2, B h h)
        surprise = torch.linalg.solve(noisy_cov, error)
        expected = mean[:, None] + alpha * cov @ surprise
        return (alpha * sigma * surprise - sigma * expected).unflatten(1, (len(z), 4, 4)).transpose(0, 1)
    start = normal(1000, 2, 4, 4)
    z = denoise(Known(v, eta), start, sampling_times(400), *no_condition(1000), rng(1))
    z = z.transpose(0, 1).flatten(1)                                # (2, 16000)
    n, var = z.shape[1], cov.diagonal()
    assert ((z.mean(1) - mean).abs() < 5 * (var / n).sqrt()).all()
    error = ((var[:, None] * var + cov ** 2) / n).sqrt()            # of a sample covariance
    assert ((z.cov() - cov).abs() < 5 * error).all()


# Guidance and the chain -------------------------------------------------------------------------------------

@pytest.mark.parametrize("guidance", [0.0, 0.6, 1.0, 2.5])
def test_guided_v_is_two_forwards_one_by_one_with_and_without_gradient(guidance):
    net, (z, _, prompt, prefs) = tiny(), batch(5)
    t, want = torch.full((5,), 0.3, dtype=torch.float64), []
    for b in range(5):
        row = [x[b:b + 1] for x in (z, t, prompt, prefs)]
        cond, null = net(*row), net(*row[:3], torch.full((1, 2), -1))
        want.append(null + guidance * (cond - null))
    assert_close(guided_v(net, z, 0.3, prompt, prefs, guidance), torch.cat(want))
    with torch.no_grad():
        assert_close(guided_v(net, z, 0.3, prompt, prefs, guidance), torch.cat(want))
    assert_close(want[2], net(*[x[2:3] for x in (z, t, prompt, prefs)]))    # a null row stays null at any w


def test_the_null_branch_is_without_gradient():
    net, (z, _, prompt, prefs) = tiny(), batch()
    guided_v(net, z, 0.3, prompt, prefs.clamp(min=0), 2.5).square().sum().backward()
    assert not net.null.grad.any() and net.preference.weight.grad.any()


def test_the_null_branch_is_skipped_where_it_would_count_nothing(monkeypatch):
    net, (z, _, prompt, prefs) = tiny(), batch()
    rows, forward = [], net.forward
    monkeypatch.setattr(net, "forward", lambda z, *rest: rows.append(len(z)) or forward(z, *rest))
    with torch.no_grad():
        for guidance in (1.0, 2.0):
            guided_v(net, z, 0.3, prompt, prefs, guidance)
    assert rows == [4, 8]                                           # both branches in one batch


def test_guidance_ends_on_time():
    cfg = ImageConfig(guidance=3.0, guidance_until=0.5)
    assert [guidance_at(t, cfg) for t in (0.98, 0.51, 0.5, 0.1)] == [3, 3, 1, 1]
    assert [guidance_at(t, replace(cfg, guidance=0.4)) for t in (0.98, 0.1)] == [0.4, 0.4]


def hand_step(net, z, t, s, prompt, prefs, guidance, eta):
    """Mean and std of a step from t to s, from two forwards of the denoiser and the numbers of slow_ddim."""
    time = torch.full((len(z),), t, dtype=z.dtype)
    with torch.no_grad():
        cond, null = net(z, time, prompt, prefs), net(z, time, prompt, torch.full_like(prefs, -1))
    v = (1 - guidance) * null + guidance * cond
    return slow_ddim(z, math.sqrt(1 - bar(t)) * z + math.sqrt(bar(t)) * v, bar(t), bar(s), eta)


@pytest.mark.parametrize("guidance, eta, until, guided", [
    (1.0, 1.0, 0.0, 4), (2.0, 1.0, 0.0, 4), (2.0, 0.4, 0.5, 2), (2.0, 1.0, 0.3, 3), (2.0, 1.0, 0.98, 0),
    (0.0, 0.0, 0.5, 4)])
def test_sampling_is_step_by_step_what_the_paper_says_with_fresh_noise(guidance, eta, until, guided):
    """Steps start at times 0.98, 0.735, 0.49, 0.245: so many of them are guided; w = 0 stays 0."""
    net, (_, _, prompt, prefs) = tiny(guidance=guidance, eta=eta, guidance_until=until), batch(6)
    got, g, times = sample_latents(net, prompt, prefs, rng(3), steps=4), rng(3), [0.98, 0.735, 0.49, 0.245, 0.0]
    z = torch.randn(6, 2, 4, 4, generator=g, dtype=torch.float64)
    for k, (t, s) in enumerate(zip(times, times[1:])):
        mean, std = hand_step(net, z, t, s, prompt, prefs, guidance if k < guided else 1.0, eta)
        z = mean + std * torch.randn(6, 2, 4, 4, generator=g, dtype=torch.float64)
    assert std == 0                                                 # no noise at the last step
    assert_close(got, z)
    assert_close(sample_latents(net, prompt, prefs, rng(3)), sample_latents(net, prompt, prefs, rng(3), steps=8))


def test_denoising_in_two_stretches_is_denoising_in_one():
    net, (z, _, prompt, prefs) = tiny(guidance=2.0, guidance_until=0.5), batch()
    times, one, two = sampling_times(4), rng(), rng()
    whole = denoise(net, z, times, prompt, prefs, one)
    half = denoise(net, z, times[:3], prompt, prefs, two)
    assert_close(denoise(net, half, times[2:], prompt, prefs, two), whole)
    assert not whole.requires_grad and torch.equal(denoise(net, z, times[:1], prompt, prefs), z)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_eta_0_is_a_function_of_the_first_noise_and_eta_1_is_not(guidance):
    net, (z, _, prompt, prefs) = tiny(guidance=guidance), batch()
    for eta in (0.0, 1.0):
        net.cfg = replace(net.cfg, eta=eta)
        one, other = (denoise(net, z, sampling_times(5), prompt, prefs, rng(seed)) for seed in (0, 1))
        assert ((one - other).abs().max() < 1e-9) == (eta == 0)


def test_sampling_is_repeatable_and_advances_the_generator_the_same_whatever_it_draws():
    net, (_, _, prompt, prefs) = tiny(dtype=torch.float32, guidance=2.0), batch()
    for eta in (0.0, 1.0):
        net.cfg = replace(net.cfg, eta=eta)
        first, second = (sample_latents(net, prompt, prefs, rng(4), 3) for _ in range(2))
        assert torch.equal(first, second)
        assert not torch.equal(first, sample_latents(net, prompt, prefs, rng(5), 3))
    states = []
    for words, tastes, eta, guidance in ((prompt, prefs, 1.0, 2.0), ((prompt + 1) % 5, prefs * 0, 0.0, 1.0)):
        net.cfg, g = replace(net.cfg, eta=eta, guidance=guidance), rng(4)
        sample_latents(net, words, tastes, g, 3)
        states.append(g.get_state())
    assert torch.equal(*states)
    z, autoencoder = torch.randn(4, 2, 4, 4, generator=rng()), tiny_autoencoder()
    before = torch.get_rng_state()
    first, second = ((net.loss(z, prompt, prefs, rng(6)), autoencoder.loss(pictures(2), 0.1, rng(6)))
                     for _ in range(2))
    assert first == second and torch.equal(torch.get_rng_state(), before)


def test_within_table_as_another_table_speaks_and_then_again_the_own():
    net, (z, t, prompt, prefs) = tiny(), batch()
    other = tiny()
    other.preference.weight.data.neg_()
    before, want = net(z, t, prompt, prefs), other(z, t, prompt, prefs)
    with pytest.raises(KeyboardInterrupt), table_as(net, other.preference.weight.detach()):
        assert_close(net(z, t, prompt, prefs), want)
        raise KeyboardInterrupt                                     # whatever happens
    assert torch.equal(net(z, t, prompt, prefs), before) and not torch.equal(before, want)


# Policy gradient --------------------------------------------------------------------------------------------

def first_step_log_prob(net, start, drawn, prompt, prefs, guidance, eta=1.0):
    """() the sum over rows of log p(drawn | start) of a step from 0.98 to 0.65."""
    v = guided_v(net, start, 0.98, prompt, prefs, guidance)
    mean, std = ddim_step(start, v, 0.98, 0.65, eta)
    return Normal(mean, std).log_prob(drawn).sum()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_log_prob_reaches_only_the_preference_table_and_only_rows_in_use(guidance):
    net, (z, _, prompt, prefs) = tiny(codes=4), batch()
    net.requires_grad_(False).preference.requires_grad_(True)
    first_step_log_prob(net, z, z + 0.1, prompt, prefs, guidance).backward()
    assert {name for name, p in net.named_parameters() if p.grad is not None} == {"preference.weight"}
    used = {m * 4 + code for row in prefs.tolist() for m, code in enumerate(row) if code >= 0}
    assert set(net.preference.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()) == used


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_log_prob_gradient_against_finite_differences(guidance):
    net, (z, _, prompt, prefs) = tiny(), batch()
    net.requires_grad_(False).preference.requires_grad_(True)
    table, args = net.preference.weight, (z, z + 0.1, prompt, prefs, guidance)
    gradient, = torch.autograd.grad(first_step_log_prob(net, *args), table)
    used = [(row, d) for row in gradient.abs().sum(1).nonzero()[:, 0].tolist() for d in (0, 5, 15)]
    for row, d in used:
        with torch.no_grad():
            value, sides = table[row, d].item(), []
            for side in (1e-5, -1e-5):
                table[row, d] = value + side
                sides.append(first_step_log_prob(net, *args))
            table[row, d] = value
        assert_close(gradient[row, d], (sides[0] - sides[1]) / 2e-5, rtol=1e-5, atol=1e-6)


def test_the_score_of_what_was_sampled_averages_to_zero():
    """E[grad log p] = 0 under the distribution that was sampled, and not under another guidance. 32 groups of
    24 pictures each read a copy of the same token: its row's gradient is the group's score."""
    net, groups = tiny(levels=1, codes=32, guidance=3.0), 32
    with torch.no_grad():
        net.preference.weight[:] = net.preference.weight[0]
    net.requires_grad_(False).preference.requires_grad_(True)
    prefs = torch.arange(groups).repeat_interleave(24)[:, None]
    prompt = torch.tensor([[1, 2, 0]]).expand(len(prefs), -1)
    start = net.noise(len(prefs), rng(11))
    drawn = denoise(net, start, [0.98, 0.65], prompt, prefs, rng(12))

    def sigmas(guidance):
        log_prob = first_step_log_prob(net, start, drawn, prompt, prefs, guidance)
        score, = torch.autograd.grad(log_prob, net.preference.weight)                       # (32, D)
        return (score.mean(0) / score.std(0) * math.sqrt(groups)).abs().max()
    assert sigmas(3.0) < 5 and sigmas(1.0) > 8


# EMA --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("decay", [0.0, 0.5, 0.998, 1.0])
@pytest.mark.parametrize("step", [0, 7, 10 ** 6])
def test_ema_is_the_loop_with_its_warm_up(decay, step):
    average, model = tiny(), randomized(copy.deepcopy(tiny()), 2.0)
    used = min(decay, (1 + step) / (10 + step))
    want = [used * a + (1 - used) * b for a, b in zip(average.parameters(), model.parameters())]
    before = [p.clone() for p in model.parameters()]
    ema_update(average, model, decay, step)
    assert_close(list(average.parameters()), want)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before))
    assert not any(p.grad_fn for p in average.parameters())


def test_ema_forgets_the_start_and_has_the_memory_that_its_decay_says():
    average, model = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()
    average.weight.data[:] = 1e6
    for step in range(300):
        model.weight.data[:] = step
        ema_update(average, model, 0.9, step)
    late = 0.9 / (1 - 0.9)                                          # steps that a mean lags behind a line
    assert abs(average.weight.item() - (299 - late)) < 1e-6
    ema_update(average, model, 0.0, 300)
    assert average.weight.item() == 299


# Devices, types, sizes --------------------------------------------------------------------------------------

def on_meta(cfg, size=2):
    """A training step of either network, a sampled latent, a differentiated step: no look at a number anywhere."""
    with torch.device("meta"):
        net, autoencoder = Denoiser(cfg, 50, 4, 64), Autoencoder(cfg)
        prompt, prefs = torch.ones(size, 3, dtype=torch.int64), torch.zeros(size, 4, dtype=torch.int64)
        x = torch.zeros(size, 3, cfg.size, cfg.size)
    autoencoder.loss(x, 0.1).backward()
    z = autoencoder.encode(x).detach()
    autoencoder.standardize(z)
    loss = net.loss(z, prompt, prefs)
    loss.backward()
    for network in (net, autoencoder):
        assert all(p.grad.shape == p.shape and p.grad.is_meta for p in network.parameters())
    drawn = sample_latents(net, prompt, prefs, None, 3)
    autoencoder.decode(drawn)
    mean, std = ddim_step(z, guided_v(net, z, 0.9, prompt, prefs, 2.0), 0.9, 0.5, 1.0)
    (mean / std).sum().backward()
    ema_update(net, net, 0.9, 1)
    assert loss.is_meta and mean.is_meta and std.is_meta and drawn.is_meta
    assert mean.shape == drawn.shape == z.shape
    return sum(p.numel() for p in net.parameters())


def test_training_and_sampling_run_on_the_meta_device_up_to_100_million_parameters():
    on_meta(ImageConfig())
    assert 90e6 < on_meta(ImageConfig(**LARGE)) < 150e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_stays(dtype):
    net, (z, t, prompt, prefs) = tiny(dtype=dtype), batch()
    z, autoencoder = z.to(dtype), tiny_autoencoder(dtype)
    v = guided_v(net, z, 0.9, prompt, prefs, 2.0)
    for x in (net.loss(z, prompt, prefs, rng()), sample_latents(net, prompt, prefs, rng(), 3), v,
              *ddim_step(z, v, 0.9, 0.5, 1.0), autoencoder.loss(pictures(2).to(dtype), 0.1, rng()),
              autoencoder.encode(pictures(2).to(dtype)), autoencoder.decode(z), net(z, t.to(dtype), prompt, prefs)):
        assert x.dtype == dtype


def test_the_denoiser_runs_in_pure_bf16():
    net, (z, t, prompt, prefs) = tiny(dtype=torch.float32), batch()
    exact = net(z.float(), t.float(), prompt, prefs)
    rough = net.bfloat16()(z.bfloat16(), t.bfloat16(), prompt, prefs)
    assert rough.dtype == torch.bfloat16 and (rough - exact).norm() <= 0.05 * exact.norm()


def test_mixed_precision_keeps_loss_and_samples_in_fp32():
    net, (z, _, prompt, prefs) = tiny(dtype=torch.float32, guidance=2.0), batch()
    z = z.float()

    def results():
        return (net.loss(z, prompt, prefs, rng()), sample_latents(net, prompt, prefs, rng(), 3),
                *(guided_v(net, z, 0.9, prompt, prefs, w) for w in (1.0, 2.0)))
    exact = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert net(z, torch.rand(4), prompt, prefs).dtype == torch.bfloat16     # autocast is at work
        rough = results()
    for got, want in zip(rough, exact):
        assert got.dtype == torch.float32
        assert (got - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("size", [0, 1])
def test_empty_and_single_batches(size):
    net, (z, t, prompt, prefs) = tiny(), (x[:size] for x in batch())
    autoencoder, x = tiny_autoencoder(), pictures(2)[:size]
    whole = tiny_autoencoder().encode(pictures(2))
    assert_close(autoencoder.encode(x), whole[:size])
    assert autoencoder.decode(whole[:size]).shape == x.shape
    assert_close(net(z, t, prompt, prefs), net(*batch())[:size])
    for guidance in (1.0, 2.0):
        net.cfg = replace(net.cfg, guidance=guidance)
        drawn = sample_latents(net, prompt, prefs, rng(), 3)
        assert drawn.shape == (size, 2, 4, 4) and drawn.isfinite().all()


# Errors -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call", ["encode", "posterior", "loss"])
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 3, 16, 12), (2, 1, 16, 16), (3, 16, 16)])
def test_pictures_of_another_size_are_refused_with_both_sizes_and_the_cure(call, shape):
    args = (0.1,) if call == "loss" else ()
    text = rf"pictures \({', '.join(map(str, shape))}\): need .*ImageConfig\.size = 16; resize them"
    with pytest.raises(ValueError, match=text):
        getattr(tiny_autoencoder(), call)(torch.zeros(shape, dtype=torch.float64), *args)


def test_shape_errors_name_both_sizes_and_the_cure():
    net, (z, t, prompt, prefs) = tiny(), batch()
    for wrong in (prefs[:, :1], prefs[:3], prefs[0]):
        with pytest.raises(ValueError, match=r"Denoiser: prefs \(.*\) for prompt \(4, 3\): need \(B, M\) = \(4, 2\)"):
            net(z, t, prompt, wrong)
