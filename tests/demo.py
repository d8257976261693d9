"""Each part shows itself, without data, in seconds: python gnn.py, vq.py, generators.py, reward.py.

Each prints what makes its idea visible and returns one number that is right or wrong."""
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dppmg import say
from generators import (EOS, Denoiser, ImageConfig, TextConfig, TextDecoder, denoise, sample_text,
                        sampling_times)
from gnn import (GNNConfig, ModalGNN, build_graph, propagate, ranking_summary, sample_triplets,
                 spmm)
from reward import leave_one_out, reinforce_loss
from vq import EMACodebook, VQConfig, nearest_code

SHADES = " .:-=+*#%@"


def shade(x: Tensor) -> list[str]:
    """A picture (h, w) in [-1, 1] as lines of signs, two for each number."""
    level = ((x.clamp(-1, 1) + 1) / 2 * (len(SHADES) - 1)).round().long()
    return ["".join(2 * SHADES[k] for k in line) for line in level.tolist()]


def show(*parts: object):
    """Print them; a reader who has gone away (`| head`) ends nothing."""
    say(" ".join(map(str, parts)))


def verdict(what: str, value: float, least: float) -> float:
    """Say whether the number is right, and return it."""
    show(f"\n{what}: {value:.3f}, {'right' if value >= least else 'WRONG'} (at least {least})")
    return value


def chain() -> None:
    """Smoothing: what one node says reaches its neighbours' neighbours."""
    graph = build_graph(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 1]), 3, 2)
    x = x0 = torch.eye(5)[:, :1]
    show("A chain, Ann - tea - Bob - jam - Cyd. Ann's signal spreads, an edge a layer:\n")
    show("layer     Ann   Bob   Cyd   tea   jam")
    for k in range(5):
        show(f"{k:5}  ", *(f"{value:5.2f}" for value in x[:, 0].tolist()))
        x = spmm(graph, x)
    show("mean   ", *(f"{value:5.2f}" for value in propagate(graph, x0, 4)[:, 0].tolist()))


def gnn() -> float:
    """Smoothing on a chain; then communities, found from likes alone."""
    chain()
    draw = torch.Generator().manual_seed(0)
    user = torch.arange(80)[:, None].expand(80, 10)
    own = torch.rand(80, 15, generator=draw).argsort(1)[:, :10] + 15 * (user % 4)
    graph, test = (build_graph(user[:, part].flatten(), own[:, part].flatten(), 80, 60)
                   for part in (slice(7), slice(7, 10)))  # 7 likes to learn from, 3 to find
    net = ModalGNN(80, 60, {"id": torch.eye(60) * 60**0.5}, GNNConfig(dim=16), draw)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    show("\n80 users in 4 communities of 15 items each, of which they like 10: 7 to learn")
    show("from, 3 hidden. Share of these among 8 recommended (by chance 0.15):\n")
    for step in range(101):
        loss = net.loss(graph, *sample_triplets(graph, 256, draw))
        if step % 25 == 0:
            recall = ranking_summary(net(graph), graph, test, 8)["recall@8"]
            show(f"step {step:3}   loss {loss.item():.3f}   recall@8 {recall:.3f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return verdict("recall of the planted communities", recall, 0.95)


def vq() -> float:
    """A codebook falls into place on a spiral; what each level adds."""
    draw, turn = torch.Generator().manual_seed(0), torch.linspace(0, 1, 600).sqrt()
    x = torch.stack([turn * (9 * turn).cos(), turn * (9 * turn).sin()], 1)
    x = x + 0.02 * torch.randn(x.shape, generator=draw)
    total, rest = (x - x.mean(0)).square().sum(), x
    for level in range(3):
        book = EMACodebook(VQConfig(codes=16, dim=2))
        book.codebook.zero_(), book.total.zero_()  # all in one place
        show(f"\nLevel {level}: 16 codes for what is left over. Unexplained:")
        for step in range(61):
            code = nearest_code(rest, book.codebook)
            left = ((rest - book.codebook[code]).square().sum() / total).item()
            if step in (0, 1, 3, 10, 60):
                show(f"  after {step:2} steps {left:8.4%}")
            book.update(rest, code, 0.5, draw)
        if level == 0:
            place = ((torch.cat([x, book.codebook]) + 1.1) / 2.2 * torch.tensor([64, 22])).long()
            picture = [[" "] * 64 for _ in range(22)]
            for k, (column, line) in enumerate(place.tolist()):
                picture[line][column] = "." if k < len(x) else "@"
            show("\n".join("".join(line).rstrip() for line in picture))
        rest = rest - book.codebook[nearest_code(rest, book.codebook)]
    share = 1 - (rest.square().sum() / total).item()
    return verdict("explained by three tokens (12 bits)", share, 0.999)


def learn(net: torch.nn.Module, steps: int, loss) -> None:
    """Descend loss() with Adam."""
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def asked(n: int, draw: torch.Generator) -> Tensor:
    """n random prompts and n random tokens, 0 to 3: (2, n, 1)."""
    return torch.randint(4, (2, n, 1), generator=draw)


def strips(draw: torch.Generator) -> float:
    """Out of noise comes what prompt and token ask for; the share of pictures that are right."""
    corner = torch.full((4, 4, 4, 8, 8), -1.0)  # prompt, token, channel, row, column
    for p in range(4):
        for k in range(4):  # the prompt says where, the token how wide
            top, left = p // 2 * 5, p % 2 * 4
            corner[p, k, :, top:top + 3, left:left + k + 1] = 1
    cfg = ImageConfig(width=16, guidance=1.0, sampling_steps=6)
    net, (prompt, token) = Denoiser(cfg, 4, 1, 4), asked(64, draw)

    def loss():
        p, k = asked(64, draw)
        return net.loss(corner[p[:, 0], k[:, 0]], p + 1, k, draw)
    learn(net, 300, loss)
    strip = [net.noise(64, draw)]
    for step in pairwise(sampling_times(6)):
        strip.append(denoise(net, strip[-1], step, prompt + 1, token, draw))
    show(f"Out of noise: corner {prompt[0].item()} by the prompt, {token[0].item() + 1} wide by "
          "the token.\n")
    show("\n".join("  ".join(line) for line in zip(*(shade(z[0, 0]) for z in strip[::2]))))
    error = (strip[-1][:, None, None] - corner).square().flatten(3).sum(3)  # (64, 4, 4)
    return (error.flatten(1).argmin(1) == (4 * prompt + token)[:, 0]).double().mean().item()


def counting(draw: torch.Generator) -> float:
    """A decoder learns a rule; the share of texts that follow it."""
    cfg = TextConfig(layers=1, width=32, heads=2, context=6, vocab_size=13, guidance=1.0)
    net, (prompt, token) = TextDecoder(cfg, 4, 1, 4), asked(64, draw)

    def text(p, k):
        return F.pad((p + torch.arange(5) * (k + 1)) % 10 + 3, (0, 1), value=EOS)

    def loss():
        p, k = asked(64, draw)
        return net.loss(text(p, k), p + 1, k)
    learn(net, 300, loss)
    made = sample_text(net, prompt + 1, token, draw)
    show("\nA rule: start at the prompt, count on by the token + 1, modulo 10.")
    for p, k, digits in zip(prompt[:4], token[:4], made[:4, :5] - 3):
        show(f"  prompt {p.item()}, token {k.item()}: ", *digits.tolist())
    return (made == text(prompt, token)).all(1).double().mean().item()


def generators() -> float:
    """A strip of denoising; a decoder that learnt a rule. Prompt and token decide in both."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    return verdict("pictures and texts as asked", min(strips(draw), counting(draw)), 0.9)


def reward() -> float:
    """A policy gradient climbs a known reward beside the exact gradient."""
    draw, value = torch.Generator().manual_seed(0), torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    show("Six actions, worth 0 to 1. Expected reward: exact gradient, and 8 samples each.\n")
    exact, sampled = torch.zeros(6, requires_grad=True), torch.zeros(6, requires_grad=True)
    for step in range(201):
        if step % 40 == 0:
            both = [(logits.softmax(0) @ value).item() for logits in (exact, sampled)]
            show(f"step {step:3}", *(f"   {'#' * round(24 * x):24} {x:.3f}" for x in both))
        (exact.softmax(0) @ value).backward()
        action = sampled.detach().softmax(0).multinomial(8, replacement=True, generator=draw)
        reinforce_loss(sampled.log_softmax(0)[action][None],
                       leave_one_out(value[action][None])).backward()
        with torch.no_grad():
            exact += exact.grad
            sampled -= sampled.grad
        exact.grad, sampled.grad = None, None
    start = torch.zeros(6, requires_grad=True)
    action = start.detach().softmax(0).expand(20000, 6).multinomial(8, True, generator=draw)
    loss = reinforce_loss(start.log_softmax(0)[action], leave_one_out(value[action]))
    mean, = torch.autograd.grad(-loss, start)
    truth, = torch.autograd.grad(start.softmax(0) @ value, start)
    show("\nOne gradient, exact:", *(f"{x:6.3f}" for x in truth.tolist()))
    show("mean of 20,000:     ", *(f"{x:6.3f}" for x in mean.tolist()))
    error = ((mean - truth).norm() / truth.norm()).item()
    return verdict("1 - relative error of the mean of many estimates", 1 - error, 0.97)
