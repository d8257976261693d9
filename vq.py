"""Preference quantizer: a user's preference vector -> L discrete preference tokens, and back.

A vector-quantized autoencoder (VQ-VAE), the second half of DPPMG's stage 1. A codebook holds K
vectors. The encoded preference is replaced by the nearest of them, whose number, the code, is a
token: generators read it like a word. L codebooks in a row, each for what the one before it left
over, tell K^L preferences apart.

    z_e    = encoder(p / |p|)                                               ResidualVQVAE
    r_0    = z_e                           what is left to be coded
    code_l = argmin_k |r_l - e_lk|^2       l = 0 .. L-1                     nearest_code
    r_l+1  = r_l - e_l,code_l
    z_q    = sum_l e_l,code_l              gradient of the identity         straight_through
    p'     = decoder(z_q)
    loss   = |p/|p| - p'|^2                reconstruction
           + beta mean_l |r_l+1|^2         commitment: the encoder keeps to the codebooks
    e_lk   = moving average of the r_l whose code is k; no gradient         EMACodebook

Sources: VQ-VAE, arXiv 1711.00937v2 (straight-through and commitment, Sec. 3.2; exponential moving
average, EMA, App. A.1); RQ-VAE, arXiv 2203.01941, Sec. 3.1 (residual quantization and the
commitment loss of all levels); k-means++, Arthur and Vassilvitskii 2007.
Shapes: U users, B batch, D width, K codes, L levels (one token each)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

BLOCK = 2**20  # scores that nearest_code holds at once: 4 MB in float32, about a CPU's cache
LAPLACE = 1e-5  # added to the count of every code, in fair shares 1/K (1711.00937v2, App. A.1)


@dataclass(frozen=True)
class VQConfig:
    """Where each value is from: a paper; ours, a choice; measured, the best of trials."""
    levels: int = 4  # L, codebooks in a row = preference tokens per user and modality (ours)
    codes: int = 64  # K, vectors per codebook; levels * log2(codes) = 24 bits a user (ours)
    dim: int = 64  # D, latent width; as wide as the preference nothing is lost (ours)
    hidden: int = 128  # units in the hidden layer of encoder and decoder (ours)
    beta: float = 0.05  # weight of the commitment loss (1711.00937v2 has 0.25; measured)
    ema_decay: float = 0.99  # a step: recalls 1/(1-decay) = 100 batches (1711.00937v2, App. A.1)
    revive_below: float = 0.1  # codes used less than this part of the fair share 1/K restart (ours)
    kmeans_steps: int = 20  # Lloyd iterations of the initialization, per level (ours)
    lr: float = 3e-3  # Adam's learning rate for encoder and decoder (measured)
    batch: int = 256  # users per step (ours)
    steps: int = 1000  # training steps (measured)
    rank_weight: float = 0.3  # weight of BPR on the reconstruction, added by the caller (measured)


@torch.no_grad()
def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """The nearest codebook row of each row of x:
        argmin_k |x - e_k|^2 = argmin_k |e_k|^2 / 2 - x . e_k,  as |x|^2 is the same for all k.
    One matrix product per block of rows: never an (N, K, D) tensor, at most BLOCK scores at a time.

    x (N, D), codebook (K, D), same dtype -> (N,) int64 in [0, K); of equals the lowest index.
    Squared distances closer than the rounding of |x||e| may swap.
    Raises ValueError on unequal widths."""
    if x.ndim != 2 or codebook.ndim != 2 or x.shape[1] != codebook.shape[1] or len(codebook) == 0:
        raise ValueError(f"nearest_code: x is {tuple(x.shape)}, codebook {tuple(codebook.shape)}; "
                         "need (N, D) and (K, D) with K >= 1: set VQConfig.dim to the width of x")
    half_norm = codebook.square().sum(1) / 2  # (K,)
    blocks = x.split(max(1, BLOCK // len(codebook)))  # each (BLOCK / K, D)
    return torch.cat([torch.addmm(half_norm, b, codebook.T, alpha=-1).argmin(1) for b in blocks])


def straight_through(z_e: Tensor, e: Tensor) -> Tensor:
    """The value of e, to the bit, with the gradient of z_e: dz_q/dz_e = identity, dz_q/de = 0.
    argmin has no gradient: so the encoder gets the decoder's, as if nothing lay between them.
    Source: 1711.00937v2, Sec. 3.2. The usual z_e + sg(e - z_e) rounds; e plus an exact 0 does not.

    z_e, e (B, D) -> (B, D)."""
    return e.detach() + (z_e - z_e.detach())


def mean_square(x: Tensor) -> Tensor:
    """Mean over the rows of |row|^2; 0, not nan, for no rows. x (B, D) -> ()."""
    return x.square().sum() / max(1, len(x))


def draw_rows(weight: Tensor, n: int, generator: Generator | None = None) -> Tensor:
    """Indices of min(n, N) different rows, drawn one after another in proportion to their weight:
    those with the largest weight / Exponential(1) (Efraimidis and Spirakis 2006). No host sync.

    weight (N,) >= 0, any sum; rows of weight 0 come last -> (min(n, N),) int64."""
    key = weight / torch.empty_like(weight).exponential_(generator=generator)  # (N,)
    return key.topk(min(n, len(key))).indices


def kmeans_plus_plus(x: Tensor, n_codes: int, generator: Generator | None = None) -> Tensor:
    """Seeds for k-means: rows of x, each drawn in proportion to its squared distance to the nearest
    seed so far. Source: Arthur and Vassilvitskii 2007. Repeats rows once x has no new ones.

    x (N, D), N >= 1 -> (n_codes, D)."""
    seeds = [x[draw_rows(torch.ones_like(x[:, 0]), 1, generator)]]  # each (1, D)
    distance = (x - seeds[0]).square().sum(1)  # (N,)
    for _ in range(n_codes - 1):
        seeds.append(x[draw_rows(distance, 1, generator)])
        distance = torch.minimum(distance, (x - seeds[-1]).square().sum(1))
    return torch.cat(seeds)


class EMACodebook(nn.Module):
    """One level's K vectors, each the moving average of the rows nearest to it. No parameters.
    Source: 1711.00937v2, App. A.1. Leaves the paper: counts are shares of the batch (they sum to
    about 1), so that batches of any size weigh the same and one threshold fits every K; and dead
    codes, those that hardly any row has, are revived.

    Buffers: codebook (K, D) = total / count, smoothed;
    count (K,), moving average of the share of the rows that have the code;
    total (K, D), moving average of the sum of these rows over B.
    Random until `initialize`. The sums are index_add_: on CUDA they repeat to the bit only under
    torch.use_deterministic_algorithms(True)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("codebook", torch.randn(config.codes, config.dim) / config.dim**0.5)
        self.register_buffer("count", torch.full((config.codes,), 1 / config.codes))
        self.register_buffer("total", self.codebook / config.codes)

    @torch.no_grad()
    def initialize(self, x: Tensor, generator: Generator | None = None) -> None:
        """k-means on x (N, D): k-means++ seeds, then Lloyd iterations (find the nearest, average).
        Each is an update without memory, so tiny clusters are moved, as dead codes are.
        Raises ValueError if N = 0."""
        if len(x) == 0:
            raise ValueError("EMACodebook.initialize: x has 0 rows; need N >= 1: pass all users")
        self.codebook.copy_(kmeans_plus_plus(x, self.config.codes, generator))
        for _ in range(self.config.kmeans_steps):
            self.update(x, nearest_code(x, self.codebook), decay=0.0, generator=generator)

    @torch.no_grad()
    def update(self, x: Tensor, codes: Tensor, decay: float, generator: Generator | None) -> None:
        """One EMA step with the batch x (B, D) and its codes (B,) int64:
            count <- decay count + (1 - decay) (share of the rows with the code)
            total <- decay total + (1 - decay) (their sum / B)
        Then each code with count < revive_below / K restarts at a row of x, drawn in proportion to
        its squared error, with the fair share 1 / K as count: so it has time to find followers.

        No host sync. An empty batch changes nothing."""
        if len(x) == 0:
            return
        n_codes = self.config.codes
        share = torch.full_like(x[:, 0], 1 / len(x))  # (B,)  of one row
        count = torch.zeros_like(self.count).index_add_(0, codes, share)  # (K,)
        total = torch.zeros_like(self.total).index_add_(0, codes, x / len(x))  # (K, D)
        count, total = count.lerp(self.count, decay), total.lerp(self.total, decay)

        dead = count < self.config.revive_below / n_codes  # (K,)
        error = (x - self.codebook[codes]).square().sum(1)  # (B,)
        rows = draw_rows(error, n_codes, generator)  # (min(K, B),)
        nth = (dead.cumsum(0) - 1) % len(rows)  # (K,)  the nth dead code gets the nth row drawn
        count = torch.where(dead, 1 / n_codes, count)
        total = torch.where(dead[:, None], x[rows[nth]] / n_codes, total)

        smooth = count + LAPLACE / n_codes  # (K,)  never 0
        smooth = smooth * (count.sum() / smooth.sum())  # as much in all as before
        self.codebook.copy_(total / smooth[:, None])
        self.count.copy_(count)
        self.total.copy_(total)


class SkipMLP(nn.Module):
    """x (B, n_in) -> A x + MLP(x) (B, n_out). At the start A is orthogonal, the MLP gives 0."""

    def __init__(self, n_in: int, hidden: int, n_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)
        self.mlp = nn.Sequential(nn.Linear(n_in, hidden), nn.GELU(), nn.Linear(hidden, n_out))
        nn.init.orthogonal_(self.linear.weight)
        for zero in (self.linear.bias, self.mlp[2].weight, self.mlp[2].bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.mlp(x)


class Quantized(NamedTuple):
    z_q: Tensor  # (B, D)  sum of the chosen vectors, gradient of the identity to z_e
    codes: Tensor  # (B, L)  int64 in [0, K): the preference tokens
    commit: Tensor  # ()  mean over rows and levels of |what is left over|^2, not yet times beta


class VQOutput(NamedTuple):
    reconstruction: Tensor  # (B, width)  of the preference at unit length
    quantized: Quantized
    reconstruction_loss: Tensor  # ()  mean of |p/|p| - reconstruction|^2; 1 if nothing is learnt
    loss: Tensor  # ()  reconstruction_loss + beta commit; the caller adds rank_weight BPR


class ResidualVQVAE(nn.Module):
    """Preference (B, width) -> L codes -> reconstructed preference (B, width).

    DEVIATION 3: preferences are scaled to unit length and reconstructed at unit length: length does
    not change how a user ranks items, so no bits are spent on it. The decoder starts as the
    transpose of the encoder, both linear: so `initialize` makes the model residual k-means of the
    preferences themselves (if dim >= width), and training improves on that.
    DEVIATION 4: beta is 0.05, with losses summed, not averaged, over the width.

    Call it outside autocast: nearest codes and moving averages need full precision."""

    def __init__(self, width: int, config: VQConfig) -> None:
        super().__init__()
        self.width, self.config = width, config
        self.encoder = SkipMLP(width, config.hidden, config.dim)
        self.codebooks = nn.ModuleList(EMACodebook(config) for _ in range(config.levels))
        self.decoder = SkipMLP(config.dim, config.hidden, width)
        with torch.no_grad():
            self.decoder.linear.weight.copy_(self.encoder.linear.weight.T)

    def _unit(self, p: Tensor) -> Tensor:
        if p.ndim != 2 or p.shape[1] != self.width:
            raise ValueError(f"ResidualVQVAE: p is {tuple(p.shape)}; need (B, {self.width}): "
                             "build it with the width of the preferences, GNNConfig.dim")
        return F.normalize(p, dim=1)  # zero rows stay zero

    @torch.no_grad()
    def initialize(self, p: Tensor, generator: Generator | None = None) -> None:
        """k-means of the encoded p (U, width), each level on what the levels before it left over.
        Call once, before training, with all training users. With fewer than K different ones some
        codes stay unused."""
        residual = self.encoder(self._unit(p))  # (U, D)
        for book in self.codebooks:
            book.initialize(residual, generator)
            residual = residual - book.codebook[nearest_code(residual, book.codebook)]

    def quantize(self, z_e: Tensor) -> Quantized:
        """Residual quantization of z_e (B, D); changes no codebook."""
        residual, e = z_e, torch.zeros_like(z_e)
        codes, errors = [], []
        for book in self.codebooks:
            code = nearest_code(residual, book.codebook)  # (B,)
            chosen = book.codebook[code]  # (B, D)
            residual, e = residual - chosen, e + chosen
            codes.append(code)
            errors.append(mean_square(residual))
        # Every level commits: with the last alone the encoder may leave level 0, which collapses.
        z_q, commit = straight_through(z_e, e), torch.stack(errors).mean()
        return Quantized(z_q, torch.stack(codes, 1), commit)

    @torch.no_grad()
    def update_codebooks(self, z_e: Tensor, codes: Tensor, generator: Generator | None) -> None:
        """One EMA step of every level with z_e (B, D) and its codes (B, L)."""
        residual = z_e
        for book, code in zip(self.codebooks, codes.T):
            chosen = book.codebook[code]  # (B, D), as it was when the code was chosen
            book.update(residual, code, self.config.ema_decay, generator)
            residual = residual - chosen

    def forward(self, p: Tensor, generator: Generator | None = None) -> VQOutput:
        """Quantize and reconstruct p (B, width), of any scale. In training mode the codebooks take
        an EMA step, for which the generator draws rows that revive codes; in eval mode none."""
        unit = self._unit(p)  # (B, width)
        z_e = self.encoder(unit)  # (B, D)
        quantized = self.quantize(z_e)
        if self.training:
            self.update_codebooks(z_e, quantized.codes, generator)
        reconstruction = self.decoder(quantized.z_q)  # (B, width)
        reconstruction_loss = mean_square(unit - reconstruction)
        loss = reconstruction_loss + self.config.beta * quantized.commit
        return VQOutput(reconstruction, quantized, reconstruction_loss, loss)

    @torch.no_grad()
    def encode(self, p: Tensor) -> Tensor:
        """Preference tokens: p (B, width), any scale -> (B, L) int64 in [0, K). Changes nothing."""
        return self.quantize(self.encoder(self._unit(p))).codes

    def decode(self, codes: Tensor) -> Tensor:
        """What the tokens stand for: codes (B, L) int64 in [0, K) -> preferences (B, width)
        of about unit length; forward's reconstruction in eval mode, to the bit.
        Raises ValueError on another L."""
        if codes.ndim != 2 or codes.shape[1] != self.config.levels:
            raise ValueError(f"ResidualVQVAE.decode: codes are {tuple(codes.shape)}; need (B, L), "
                             f"L = {self.config.levels}: set VQConfig.levels to what encoded them")
        return self.decoder(sum(book.codebook[code] for book, code in zip(self.codebooks, codes.T)))


def codebook_health(codes: Tensor, n_codes: int) -> dict[str, list[float] | float]:
    """How well the codes are used, for JSON: codes (U, L) int64 in [0, n_codes), a row per user ->
        usage           per level: share of the codes that at least one user has; best 1
        perplexity      per level: exp(entropy of the code, in nats), 1 to n_codes; best n_codes
        collision_rate  share of the users whose whole tuple another user has too; best 0
    Raises ValueError for no users or a code out of range."""
    if codes.ndim != 2 or 0 in codes.shape or codes.min() < 0 or codes.max() >= n_codes:
        raise ValueError(f"codebook_health: codes are {tuple(codes.shape)}, n_codes={n_codes}; "
                         "need (U, L) in [0, n_codes): pass encode's codes and VQConfig.codes")
    count = torch.stack([torch.bincount(level, minlength=n_codes) for level in codes.T]).cpu()
    _, tuple_of, size = torch.unique(codes.cpu(), dim=0, return_inverse=True, return_counts=True)
    return {"usage": (count > 0).double().mean(1).tolist(),
            "perplexity": torch.special.entr(count.double() / len(codes)).sum(1).exp().tolist(),
            "collision_rate": float((size[tuple_of] > 1).double().mean())}


def explained(p: Tensor, reconstruction: Tensor) -> float:
    """Share of the variance of the preferences, at unit length as the quantizer sees them, that
    survives:  1 - sum |u - u'|^2 / sum |u - mean u|^2,  u = p / |p|.
    1: exact; 0: no better than the mean; negative: worse. All users alike: 1 if exact, else 0.

    p (U, D) of any scale, reconstruction (U, D) at unit length.
    Raises ValueError on unequal shapes."""
    if p.ndim != 2 or p.shape != reconstruction.shape:
        raise ValueError(f"explained: p is {tuple(p.shape)}, reconstruction "
                         f"{tuple(reconstruction.shape)}; need the same (U, D) of the same users")
    unit = F.normalize(p.cpu().double(), dim=1)  # (U, D); not every device has float64
    error = float(mean_square(unit - reconstruction.cpu().double()))
    variance = float(mean_square(unit - unit.mean(0)))
    return 1 - error / variance if variance > 1e-12 else float(error <= 1e-12)


def code_lift(codes: Tensor, traits: Tensor, n_codes: int) -> Tensor:
    """What each code means: how much more of each trait its n users have on average than all users,
    in standard errors:  (mean of the n - mean of all) / (standard deviation of all / sqrt(n)).

    codes (U,) int64 of one level, traits (U, W) of any unit -> (n_codes, W), 0 where n = 0."""
    above = (traits - traits.mean(0)) / traits.std(0).clamp(min=1e-9)  # (U, W)  in deviations
    member = F.one_hot(codes, n_codes).to(above.dtype).T  # (K, U)
    return member @ above / member.sum(1, keepdim=True).clamp(min=1).sqrt()


if __name__ == "__main__":
    from tests.demo import vq; vq()
