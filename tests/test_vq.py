"""vq.py: slow obvious versions; what must hold for any input; planted answers; collapse, cure."""

import copy
import itertools
import json
import math
import statistics
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import vq
from vq import (EMACodebook, ResidualVQVAE, SkipMLP, VQConfig, code_lift, codebook_health,
                draw_rows, explained, kmeans_plus_plus, mean_square, nearest_code, straight_through)

TINY = VQConfig(levels=3, codes=4, dim=6, hidden=8, batch=16)


@pytest.fixture(autouse=True)
def random_weights_of_one_seed():
    torch.manual_seed(0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def model(config: VQConfig = TINY, width: int = 6, dtype=torch.float64) -> ResidualVQVAE:
    """Random weights everywhere: no zero layers, no symmetry that could hide a fault."""
    net = ResidualVQVAE(width, config).to(dtype)
    with torch.no_grad():
        for i, (name, tensor) in enumerate(net.state_dict().items()):
            if "count" not in name:
                tensor.copy_(normal(*tensor.shape, seed=i) * 0.5)
    return net


def buffers(net: torch.nn.Module) -> list[torch.Tensor]:
    return [b.clone() for b in net.buffers()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def brute_force(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    best = []
    for row in x.tolist():
        distance = [sum((a - b) ** 2 for a, b in zip(row, code)) for code in codebook.tolist()]
        best.append(distance.index(min(distance)))  # index: the first of equals
    return torch.tensor(best, dtype=torch.int64)


# ---- nearest code

@pytest.mark.parametrize("n, k, d", [(1, 1, 1), (1, 5, 3), (40, 1, 3), (40, 7, 3), (33, 16, 8)])
@pytest.mark.parametrize("block", [1, 50, 2**20])
def test_nearest_code_equals_brute_force(n, k, d, block, monkeypatch):
    monkeypatch.setattr(vq, "BLOCK", block)  # rows a block: 1, a few with a rest, all
    x, codebook = normal(n, d), normal(k, d, seed=1)
    assert torch.equal(nearest_code(x, codebook), brute_force(x, codebook))
    strided, flipped = x.T.contiguous().T, codebook.flip(0)
    assert torch.equal(nearest_code(strided, flipped), brute_force(x, flipped))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_code_gives_ties_to_the_lowest_index(dtype):
    box = itertools.product((-1, 1), (-1, 1), (0, 2))
    corners = torch.tensor(list(box), dtype=dtype)
    codebook = torch.cat([corners, corners.flip(0)])
    between = itertools.product((-1, 0, 1), (-1, 0, 1), (0, 1, 2))
    x = torch.tensor(list(between), dtype=dtype)
    assert torch.equal(nearest_code(x, codebook), brute_force(x, codebook))
    assert nearest_code(x.new_zeros(3, 3), x.new_zeros(5, 3)).tolist() == [0, 0, 0]


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements in the largest tensor that any operation returns."""
    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_nearest_code_never_holds_more_than_a_block():
    x, codebook = torch.empty(100_000, 64, device="meta"), torch.empty(1024, 64, device="meta")
    with LargestTensor() as seen:
        assert nearest_code(x, codebook).shape == (100_000,)
    assert seen.largest == vq.BLOCK  # whatever N is


def test_nearest_code_refuses_other_widths():
    with pytest.raises(ValueError, match=r"x is \(2, 5\), codebook \(3, 4\);.*set VQConfig.dim"):
        nearest_code(torch.zeros(2, 5), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="K >= 1"):
        nearest_code(torch.zeros(2, 4), torch.zeros(0, 4))
    assert nearest_code(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0,)


def test_nearest_code_takes_as_many_rows_as_fill_a_block(monkeypatch):
    x, codebook = torch.empty(12, 1, device="meta"), torch.empty(20, 1, device="meta")
    for block, largest in ((1, 20), (20, 20), (79, 60), (80, 80), (1000, 240)):
        monkeypatch.setattr(vq, "BLOCK", block)
        with LargestTensor() as seen:
            nearest_code(x, codebook)
        assert seen.largest == largest


# ---- straight-through and the loss

def test_straight_through_passes_the_gradient_unchanged():
    z_e, e = normal(5, 4).requires_grad_(), (1e-9 * normal(5, 4, seed=1)).requires_grad_()
    z_q = straight_through(z_e, e)
    assert torch.equal(z_q, e)  # to the bit, though z_e is 1e9 times larger
    jacobian = torch.autograd.functional.jacobian(lambda z: straight_through(z, e), z_e.detach())
    assert_close(jacobian.reshape(20, 20), torch.eye(20, dtype=torch.float64), rtol=0, atol=0)
    z_q.sum().backward()
    assert e.grad is None


@pytest.mark.parametrize("n", [1, 2, 5])
def test_mean_square_is_a_mean_over_rows_and_a_sum_over_the_width(n):
    x = normal(n, 3)
    assert_close(mean_square(x).item(), sum(v * v for row in x.tolist() for v in row) / n)
    assert mean_square(x[:0]) == 0


def test_forward_equals_a_slow_one_by_value_and_gradient():
    net, p = model().eval(), 3 * normal(7, 6, seed=5)
    out = net(p)
    grads = torch.autograd.grad(out.loss, list(net.parameters()))

    unit = torch.stack([row / math.sqrt(sum(v * v for v in row.tolist())) for row in p])
    z_e = net.encoder(unit)
    commit, value, codes = 0.0, torch.zeros_like(z_e), []
    for book in net.codebooks:
        code = brute_force(z_e - value, book.codebook)
        value = (value + book.codebook[code]).detach()
        commit = commit + sum(((z - v) ** 2).sum() for z, v in zip(z_e, value)) / 7
        codes.append(code)
    commit = commit / 3
    reconstruction = net.decoder(z_e + (value - z_e).detach())
    reconstruction_loss = sum(((u - r) ** 2).sum() for u, r in zip(unit, reconstruction)) / 7
    loss = reconstruction_loss + 0.05 * commit

    assert torch.equal(out.quantized.codes, torch.stack(codes, 1))
    assert_close((out.quantized.z_q, out.quantized.commit), (value, commit))
    assert_close(out[0], reconstruction)
    assert_close(out[2:], (reconstruction_loss, loss))
    assert_close(grads, torch.autograd.grad(loss, list(net.parameters())))
    assert all(g.abs().max() > 1e-4 for g in grads)  # decoder, encoder, both of their halves


def test_skip_mlp_is_a_linear_map_and_an_mlp_side_by_side():
    layer, x = SkipMLP(3, 5, 2).double(), normal(4, 3)
    assert_close(layer(x), x @ layer.linear.weight.T)  # the start: linear alone, orthogonal
    square = layer.linear.weight @ layer.linear.weight.T
    assert_close(square, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-6)
    with torch.no_grad():
        for i, weight in enumerate(layer.parameters()):
            weight.copy_(normal(*weight.shape, seed=i))
    hidden = F.gelu(F.linear(x, layer.mlp[0].weight, layer.mlp[0].bias))
    assert_close(layer(x), F.linear(x, layer.linear.weight, layer.linear.bias)
                 + F.linear(hidden, layer.mlp[2].weight, layer.mlp[2].bias))


# ---- quantization as a function

def test_every_token_tuple_survives_a_round_trip():
    """On lattices of falling scale: quantizing what tokens stand for gives them back, twice too."""
    net = model(VQConfig(levels=3, codes=8, dim=3, hidden=4), width=3).eval()
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)
    for level, book in enumerate(net.codebooks):
        book.codebook.copy_(corners * 10.0**-level)
    codes = torch.cartesian_prod(*[torch.arange(8)] * 3)  # all 512
    z = sum(book.codebook[code] for book, code in zip(net.codebooks, codes.T))
    once = net.quantize(z + 0.004)  # off the lattice, within reach
    twice = net.quantize(once.z_q)
    assert torch.equal(once.codes, codes)
    assert torch.equal(twice.codes, codes) and torch.equal(twice.z_q, once.z_q)
    assert_close(once.z_q, z)


def test_decode_of_encode_is_the_reconstruction_to_the_bit():
    net, p = model(dtype=torch.float32).eval(), normal(9, 6, dtype=torch.float32)
    with torch.no_grad():
        out = net(p)
        assert torch.equal(net.encode(p), out.quantized.codes)
        assert torch.equal(net.decode(out.quantized.codes), out.reconstruction)


def test_the_length_of_a_preference_changes_nothing():
    net, p = model().eval(), normal(9, 6)
    assert_close(net(p * torch.logspace(-3, 3, 9)[:, None]).reconstruction, net(p).reconstruction)
    assert net(torch.zeros(1, 6, dtype=torch.float64)).loss.isfinite()  # no direction at all


def test_training_moves_the_codebooks_and_eval_leaves_them_to_the_bit():
    net, p = model(), normal(16, 6)
    before = buffers(net)
    net.quantize(net.encoder(p))  # reading changes nothing, even in training mode
    net.decode(net.encode(p))
    assert same(before, buffers(net))
    net.eval()(p)
    assert same(before, buffers(net))
    net.train()(p, seeded())
    assert not any(torch.equal(a, b) for a, b in zip(before, buffers(net)))


def test_every_level_is_updated_with_what_it_quantized():
    net, p = model(), normal(16, 6)
    expected = copy.deepcopy(net)
    residual = expected.encoder(F.normalize(p)).detach()
    generator = seeded()
    for book in expected.codebooks:
        code = brute_force(residual, book.codebook)
        chosen = book.codebook[code]
        book.update(residual, code, TINY.ema_decay, generator)
        residual = residual - chosen
    net(p, seeded())
    assert_close(buffers(net), buffers(expected))


@pytest.mark.parametrize("n", [0, 1])
def test_empty_and_single_batches(n):
    net = model()
    before = buffers(net)
    out = net(normal(n, 6), seeded())
    out.loss.backward()
    assert out.reconstruction.shape == (n, 6) and out.quantized.codes.shape == (n, 3)
    assert out.loss.isfinite()
    assert all(t.isfinite().all() for t in [*net.buffers(), *(w.grad for w in net.parameters())])
    assert same(before, buffers(net)) == (n == 0)
    assert net.decode(net.encode(normal(n, 6))).shape == (n, 6)


def test_wrong_shapes_name_both_sizes_and_the_cure():
    net = model()
    for call in (net, net.encode, net.initialize):
        with pytest.raises(ValueError, match=r"p is \(2, 5\); need \(B, 6\): build it with"):
            call(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"\(2, 4\); need \(B, L\), L = 3: set VQConfig.levels"):
        net.decode(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="x has 0 rows; need N >= 1: pass all users"):
        net.initialize(torch.zeros(0, 6, dtype=torch.float64))


# ---- the moving average and the revival of codes

@pytest.mark.parametrize("revive_below", [0, 0.8])
def test_update_equals_a_loop_over_the_rows(revive_below, monkeypatch):
    monkeypatch.setattr(vq, "LAPLACE", 0.5)  # large enough to be seen
    book = EMACodebook(VQConfig(codes=5, dim=3, revive_below=revive_below)).double()
    count, total = book.count.numpy().copy(), book.total.numpy().copy()
    revived = 0
    for step in range(4):
        x = normal(11, 3, seed=step)
        codes = torch.randint(4, (11,), generator=seeded(step))  # code 4: never
        share, sums, error = np.zeros(5), np.zeros((5, 3)), torch.zeros(11, dtype=torch.float64)
        for n, (row, code) in enumerate(zip(x.numpy(), codes)):
            share[code] += 1 / 11
            sums[code] += row / 11
            error[n] = sum((row - book.codebook[code].numpy()) ** 2)
        count, total = 0.7 * count + 0.3 * share, 0.7 * total + 0.3 * sums
        rows = iter(draw_rows(error, 5, seeded(step)))
        for code in range(5):
            if count[code] < revive_below / 5:
                count[code], total[code] = 1 / 5, x[next(rows)] / 5
                revived += 1
        smooth = (count + 0.1) / (count.sum() + 5 * 0.1) * count.sum()
        book.update(x, codes, 0.7, seeded(step))
        assert_close(book.count.numpy(), count)
        assert_close(book.total.numpy(), total)
        assert_close(book.codebook.numpy(), total / smooth[:, None])
    assert revived >= 3 if revive_below else book.count.sum().item() == pytest.approx(1)


def test_a_code_is_dead_below_the_threshold_and_not_at_it():
    book = EMACodebook(VQConfig(codes=2, dim=1, revive_below=0.5)).double()
    x = torch.tensor([[1.0], [1.0], [1.0], [-1.0]], dtype=torch.float64)
    book.update(x, torch.tensor([0, 0, 0, 1]), 0.0, None)  # code 1: just half the fair share
    assert book.count.tolist() == [0.75, 0.25]


def test_a_new_codebook_is_random_with_codes_of_about_unit_length():
    book = EMACodebook(VQConfig(codes=500, dim=40))
    assert_close(book.count, torch.full((500,), 1 / 500))
    assert_close(book.total / book.count[:, None], book.codebook)
    assert book.codebook.square().sum(1).mean().item() == pytest.approx(1, rel=0.05)
    assert abs(book.codebook.mean()) < 5 / (40 * 20_000) ** 0.5


def test_dead_codes_restart_at_different_rows_of_the_batch_and_others_do_not_move():
    config = VQConfig(codes=8, dim=3, revive_below=0.6)
    book = EMACodebook(config).double()
    still = copy.deepcopy(book)
    still.config = VQConfig(codes=8, dim=3, revive_below=0)
    x, codes = normal(40, 3), torch.arange(40) % 3  # 3 to 7 fall to half the fair share: dead
    book.update(x, codes, 0.5, seeded())
    still.update(x, codes, 0.5, None)
    assert_close(book.codebook[:3], still.codebook[:3], rtol=1e-4, atol=0)  # up to the Laplace term
    assert_close(book.count[:3], still.count[:3])
    distance = torch.cdist(book.codebook[3:], x)
    assert (distance.min(1).values < 1e-4).all() and len(distance.argmin(1).unique()) == 5
    assert_close(book.count[3:], torch.full((5,), 1 / 8, dtype=torch.float64))
    assert_close(book.total[3:], x[distance.argmin(1)] / 8)


def test_revival_prefers_rows_that_the_codebook_represents_badly():
    book = EMACodebook(VQConfig(codes=2, dim=1, revive_below=0.5)).double()
    x = torch.zeros(1000, 1, dtype=torch.float64)
    x[7] = 100.0  # the only row with an error
    book.codebook.copy_(torch.tensor([[0.0], [500.0]]))
    book.update(x, nearest_code(x, book.codebook), 0.0, seeded())
    assert book.codebook[1].item() == pytest.approx(100, rel=1e-3)


def test_more_dead_codes_than_rows():
    book = EMACodebook(VQConfig(codes=8, dim=3, revive_below=0.5)).double()
    x = normal(2, 3)
    book.update(x, torch.zeros(2, dtype=torch.int64), 0.0, seeded())
    distance = torch.cdist(book.codebook[1:], x)
    assert (distance.min(1).values < 1e-3).all()
    assert distance.argmin(1).bincount().tolist() in ([3, 4], [4, 3])  # in turn


def test_draw_rows_follows_the_weights_without_replacement():
    weight, generator, n = torch.tensor([0.0, 1.0, 2.0, 5.0]), seeded(), 4000
    draws = torch.stack([draw_rows(weight, 3, generator) for _ in range(n)])  # (n, 3)
    assert (draws.sort(1).values == torch.tensor([1, 2, 3])).all()  # all different, 0 never
    share = torch.bincount(draws[:, 0], minlength=4) / n
    sigma = (weight / 8 * (1 - weight / 8) / n).sqrt()
    assert ((share - weight / 8).abs() <= 5 * sigma).all(), share
    assert len(draw_rows(weight, 9, generator)) == 4


# ---- k-means

def planted(n: int = 400, clusters: int = 8, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows about 0.01 from centres of unequal popularity: (n, width), means (clusters, width)."""
    popular = torch.arange(1, clusters + 1, dtype=torch.float64) ** 2
    of = torch.multinomial(popular, n, replacement=True, generator=seeded(4))
    of[:clusters] = torch.arange(clusters)  # none is empty
    x = normal(clusters, width, seed=3)[of] + 0.01 * normal(n, width, seed=5)
    return x, torch.stack([x[of == c].mean(0) for c in range(clusters)])


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_recovers_planted_clusters(seed):
    x, centres = planted()
    book = EMACodebook(VQConfig(codes=8, dim=6, kmeans_steps=5, revive_below=0)).double()
    book.initialize(x, seeded(seed))
    distance = torch.cdist(centres, book.codebook)
    assert sorted(distance.argmin(1).tolist()) == list(range(8))
    assert distance.min(1).values.max() < 1e-3
    codes = nearest_code(x, book.codebook)
    assert_close(book.count, torch.bincount(codes) / 400.0, check_dtype=False)


def test_kmeans_plus_plus_seeds_are_rows_of_all_clusters():
    x, centres = planted()
    for seed in range(20):  # uniform rows would miss a rare cluster
        seeds = kmeans_plus_plus(x, 8, seeded(seed))
        assert (torch.cdist(seeds, x).min(1).values < 1e-6).all()
        assert len(torch.cdist(seeds, centres).argmin(1).unique()) == 8
    assert kmeans_plus_plus(x[:2], 5, seeded()).shape == (5, 6)  # fewer rows than codes: repeats


def test_kmeans_plus_plus_draws_in_proportion_to_squared_distance():
    point, n, generator = [0.0, 1.0, 3.0, 7.0], 6000, seeded()
    x, drawn = torch.tensor(point)[:, None], Counter()
    for _ in range(n):
        drawn[tuple(kmeans_plus_plus(x, 3, generator)[:, 0].tolist())] += 1
    for a, b, c in itertools.permutations(point, 3):
        second = (b - a) ** 2 / sum((y - a) ** 2 for y in point)
        nearest = {y: min((y - a) ** 2, (y - b) ** 2) for y in point}
        p = second * nearest[c] / sum(nearest.values()) / 4
        sigma = (p * (1 - p) / n) ** 0.5
        assert abs(drawn[a, b, c] / n - p) < 5 * sigma, (a, b, c)


def test_lloyd_iterations_improve_on_the_seeds():
    x = normal(300, 4)
    error = []
    for steps in (1, 3, 20):
        book = EMACodebook(VQConfig(codes=16, dim=4, kmeans_steps=steps)).double()
        book.initialize(x, seeded())
        error.append((x - book.codebook[nearest_code(x, book.codebook)]).square().sum().item())
    seeds = kmeans_plus_plus(x, 16, seeded())
    assert (x - seeds[nearest_code(x, seeds)]).square().sum() > error[0] > error[1] > error[2]


@pytest.mark.parametrize("dim", [6, 9])
def test_after_initialize_the_model_is_residual_kmeans_of_the_preferences(dim):
    net = ResidualVQVAE(6, VQConfig(levels=4, codes=8, dim=dim, hidden=8)).double()
    p = normal(200, 6)
    unit = F.normalize(p)
    assert_close(net.decoder(net.encoder(unit)), unit, rtol=0, atol=1e-6)  # rotation and inverse
    net.initialize(p, seeded())
    codes, errors = net.encode(p), [1.0]
    for level in range(4):  # decode the first levels only, others set to zero
        first = copy.deepcopy(net)
        for book in first.codebooks[level + 1:]:
            book.codebook.zero_()
        errors.append((unit - first.decode(codes)).square().sum(1).mean().item())
    assert all(b < 0.75 * a for a, b in itertools.pairwise(errors)), errors  # each level pays
    assert codebook_health(codes, 8)["usage"] == [1.0] * 4


@pytest.mark.parametrize("n", [1, 2, 3])
def test_initialize_with_fewer_users_than_codes(n):
    net, p = ResidualVQVAE(6, TINY).double(), normal(n, 6)
    net.initialize(p, seeded())
    assert_close(net.eval()(p).reconstruction, F.normalize(p), rtol=0, atol=1e-3)


# ---- training

def train(net: ResidualVQVAE, p: torch.Tensor, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=net.config.lr)
    for _ in range(steps):
        users = torch.randint(len(p), (net.config.batch,), generator=generator)
        loss = net(p[users], generator).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_overfits_a_tiny_batch():
    p = normal(32, 8, dtype=torch.float32)
    net = ResidualVQVAE(8, VQConfig(levels=2, codes=8, dim=8, hidden=64, batch=64, lr=1e-2))
    net.initialize(p, seeded())
    start = net.eval()(p).reconstruction_loss.item()
    train(net.train(), p, 500, seeded())
    end = net.eval()(p).reconstruction_loss.item()
    assert 0.1 < start < 0.5 and end < 0.02, f"32 users are not told apart: {start:.3f}, {end:.3f}"


def crowd(n: int = 600, width: int = 16) -> torch.Tensor:
    """Users who all like the popular things: one common direction and 8 tastes beside it."""
    taste = normal(8, width, seed=1, dtype=torch.float32)[torch.arange(n) % 8]
    noise = normal(n, width, seed=2, dtype=torch.float32)
    return 3 * normal(1, width, dtype=torch.float32) + taste + 0.5 * noise


@pytest.mark.parametrize("initialized, revive_below, healthy", [
    (False, 0.0, False), (False, 0.1, True), (True, 0.1, True)],
    ids=["neither", "revival", "revival and k-means"])
def test_collapse_and_its_cure(initialized, revive_below, healthy):
    p = crowd()
    sizes = dict(levels=4, codes=32, dim=16, hidden=32)
    net = ResidualVQVAE(16, VQConfig(**sizes, revive_below=revive_below, ema_decay=0.9))
    if initialized:
        net.initialize(p, seeded())
    train(net, p, 300, seeded())
    usage = codebook_health(net.eval().encode(p), 32)["usage"]
    assert min(usage) >= 0.95 if healthy else min(usage) < 0.2, usage


def test_the_generator_decides_all_that_is_drawn():
    def run(other_seed):
        torch.manual_seed(0)
        net = ResidualVQVAE(6, TINY)
        torch.manual_seed(other_seed)
        net.initialize(normal(40, 6, dtype=torch.float32), seeded(1))
        train(net, normal(40, 6, dtype=torch.float32), 5, seeded(2))
        return list(net.state_dict().values())
    assert same(run(1), run(2))


def test_state_dict_resumes_to_the_bit():
    p = normal(40, 6, dtype=torch.float32)
    net, other = ResidualVQVAE(6, TINY), ResidualVQVAE(6, TINY)
    not_learnt = set(net.state_dict()) - {name for name, _ in net.named_parameters()}
    assert not_learnt == {f"codebooks.{level}.{name}"
                          for level in range(3) for name in ("codebook", "count", "total")}
    net.initialize(p, seeded())
    other.load_state_dict(net.state_dict())
    for each in (net, other):
        train(each, p, 5, seeded(1))
    assert same(list(net.state_dict().values()), list(other.state_dict().values()))


@pytest.mark.parametrize("device, dtype", [("meta", torch.float32), ("cpu", torch.float64)])
def test_a_training_step_runs_on_meta_and_in_float64(device, dtype):
    """On meta any look at a value fails, and any tensor on another device: no host sync."""
    with torch.device(device):
        net = ResidualVQVAE(6, VQConfig(levels=2, codes=20, dim=6, hidden=8)).to(dtype)
        p = torch.randn(16, 6, dtype=dtype)
    net.initialize(p)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    out = net(p)
    out.loss.backward()
    optimizer.step()
    tensors = [*net.buffers(), *net.parameters(), out.reconstruction, out.loss]
    assert {t.dtype for t in tensors} == {dtype}
    assert net.eval().decode(net.encode(p)).device.type == device


# ---- health

def test_codebook_health_of_known_codes():
    codes = torch.tensor([[0, 0], [0, 1], [1, 2], [1, 2], [1, 2], [1, 1], [0, 3], [0, 3]])
    health = codebook_health(codes, 4)
    assert health["usage"] == [0.5, 1.0]
    entropy = math.log(8) - (3 * math.log(3) + 2 * 2 * math.log(2)) / 8  # of shares 1 2 3 2 of 8
    assert health["perplexity"] == pytest.approx([2.0, math.exp(entropy)])
    assert health["collision_rate"] == 5 / 8  # three share a tuple, and two
    assert json.loads(json.dumps(health)) == health
    for bad, n_codes in ((codes, 3), (codes - 1, 4), (codes[:0], 4), (codes[:, 0], 4)):
        with pytest.raises(ValueError, match=rf"n_codes={n_codes}; need \(U, L\) in"):
            codebook_health(bad, n_codes)


def test_explained_of_known_reconstructions():
    p = normal(50, 4, dtype=torch.float32) + 1
    unit = F.normalize(p)
    mean = unit.mean(0).expand_as(unit)
    assert explained(p, unit) == pytest.approx(1) and explained(7 * p, unit) == pytest.approx(1)
    assert explained(p, mean) == pytest.approx(0, abs=1e-6)
    assert explained(p, (unit + mean) / 2) == pytest.approx(0.75, rel=1e-5)
    assert explained(p, 2 * mean - unit) == pytest.approx(-3, rel=1e-5)
    alike = p[:1].expand(3, 4)
    assert explained(alike, F.normalize(alike)) == 1 and explained(alike, alike + 1) == 0
    with pytest.raises(ValueError, match=r"p is \(50, 4\), reconstruction \(49, 4\); need the"):
        explained(p, unit[1:])


# ---- what a code means

def slow_lift(codes: torch.Tensor, traits: torch.Tensor, n_codes: int) -> torch.Tensor:
    lift = torch.zeros(n_codes, traits.shape[1], dtype=torch.float64)
    for code, trait in itertools.product(range(n_codes), range(traits.shape[1])):
        everyone = traits[:, trait].tolist()
        own = [value for value, c in zip(everyone, codes.tolist()) if c == code]
        if own:
            above = statistics.mean(own) - statistics.mean(everyone)
            lift[code, trait] = above / (statistics.stdev(everyone) / math.sqrt(len(own)))
    return lift


def test_code_lift_equals_a_slow_one():
    codes = torch.randint(5, (40,), generator=seeded()) * 2  # 0, 2, 4, 6, 8
    traits = normal(40, 3) * torch.tensor([1.0, 1e-3, 1e3]) + 7
    assert_close(code_lift(codes, traits, 10), slow_lift(codes, traits, 10))
    assert_close(code_lift(codes[:9], traits[:9], 9), slow_lift(codes[:9], traits[:9], 9))


def test_code_lift_is_positive_for_what_a_code_stands_for():
    """Code k stands for trait k; trait 3 is everyone's, code 3 nobody's."""
    codes = torch.arange(30) % 3
    traits = torch.cat([F.one_hot(codes, 3), torch.ones(30, 1)], 1).double() * 0.1
    lift = code_lift(codes, traits, 4)
    assert torch.equal(lift.sign()[:3, :3], 2 * torch.eye(3).double() - 1)
    assert torch.equal(lift[3], torch.zeros(4).double())
    assert (lift[:, 3].abs() < 1e-6).all()


def test_code_lift_is_in_standard_errors_however_many_users_have_the_code():
    codes = torch.tensor([0] * 4 + [1] * 40 + [2] * 400 + [3] * 4000)
    lift = code_lift(codes, normal(len(codes), 500), 4)  # traits that have nothing to do with codes
    n = codes.bincount()
    expected = (1 - n / len(codes)).sqrt()  # of n drawn from all without replacement
    assert_close(lift.std(1), expected.double(), rtol=5 / 1000**0.5, atol=0)
    again = code_lift(codes.repeat(4), normal(len(codes), 500).repeat(4, 1), 4)
    assert_close(again, 2 * lift, rtol=1e-3, atol=0)
