"""The reward: image and text shall agree without losing the person.  And the judge: how good is a pair?
    cos(f(x), g(y))                           Scorer          contrastive (CLIP, arXiv 2103.00020v1 Fig. 3)
    R = lambda_c cos + lambda_p (s_x + s_y)   pair_reward     each term normalized within its group of samples
    A_s = R_s - mean of the group's others    leave_one_out   (Kool et al. 2019)
    grad = E[A grad log pi]                   reinforce_loss  (Williams 1992), a step of token_optimizer
    KL[pi || pi of the starting tokens]       gaussian_kl  categorical_kl: the drift, and a penalty on it
    how good is a pair, on any data           judge_*  swap_share  taste  frechet_distance  interval
Shapes: B batch, D width, G groups, S samples in a group (S_i images, S_t texts), T text length, V vocabulary,
P prompt words, W distinct prompts, U users, I items, N and M sizes of two sets, H picture side in pixels."""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.stats import t as student_t
from torch import Tensor


@dataclass(frozen=True)
class RewardConfig:
    """Settings of the scorer (and its twin, the judge), of the reward and of REINFORCE."""
    lambda_c: float = 2.0             # weight of the consistency of image and text (ours)
    lambda_p: float = 1.0             # weight of the personalization score of stage 1 (ours)
    scorer_width: int = 32            # channels of the scorer's first convolution; text: twice as wide
    scorer_dim: int = 64              # D, width of the shared embedding
    scorer_steps: int = 300           # optimizer steps of the scorer, and again of the judge
    scorer_batch: int = 128           # items in a contrastive batch: all others are negatives
    scorer_lr: float = 3e-3           # peak learning rate of the scorer (AdamW), falling to 0
    scorer_temperature: float = 0.07  # InfoNCE temperature at the start, learnt in [0.01, 1] (CLIP, Sec. 2.5)
    scorer_shift: int = 4             # pixels of 32 by which training moves a picture, either way; 0 = never
    scorer_mirror: float = 0.5        # probability of mirroring a picture, left to right, in training
    scorer_zoom: float = 0.25         # at most so much of a picture's side is cut off in training, the rest enlarged
    scorer_dropout: float = 0.3       # probability of dropping a feature of a picture before the last layer, in training
    scorer_drop: float = 0.1          # probability of hiding a text token from the scorer in training
    rounds: int = 180                 # REINFORCE updates; 0 = no reward stage
    groups: int = 64                  # G, (user, prompt) groups in a round
    images: int = 4                   # S_i, images sampled in a group
    texts: int = 8                    # S_t, texts sampled in a group: cheaper than images
    lr_image: float = 0.035           # peak learning rate of the image token table (Adam 0.9, 0.99)
    lr_text: float = 0.0018           # peak learning rate of the text token table (Adam 0.9, 0.99)
    diffusion_steps: int = 4          # DDIM steps of a rollout, of which the first is differentiated
    kl_image: float = 0.0             # weight of the pictures' KL from the starting tokens, per nat (bounds the drift)
    kl_text: float = 0.2              # weight of the texts' KL from the starting tokens, per nat (DEVIATION 24)
    log_every: int = 25               # rounds between two lines with the exact or the judge's measures

    def __post_init__(self):
        shares = {"scorer_mirror": 0, "scorer_zoom": 0, "scorer_dropout": 0, "scorer_drop": 0}
        limits = shares | {"lambda_c": 0, "lambda_p": 0, "kl_image": 0, "kl_text": 0, "scorer_shift": 0, "rounds": 0,
                           "images": 2, "texts": 2, "diffusion_steps": 2, "scorer_batch": 2, "scorer_width": 8}
        for name, value in vars(self).items():
            low = limits.get(name, 0 if isinstance(value, float) else 1)
            strict = isinstance(value, float) and name not in limits  # learning rates and the temperature
            self._need(math.isfinite(value) and (value > low if strict else value >= low),
                       name, f"a finite {name} {'>' if strict else '>='} {low}")
        self._need(self.scorer_width % 8 == 0, "scorer_width", "a multiple of 8, for its GroupNorm")
        self._need(0.01 <= self.scorer_temperature <= 1, "scorer_temperature",
                   "0.01 <= scorer_temperature <= 1")
        for name in shares:
            self._need(getattr(self, name) < 1, name, f"0 <= {name} < 1")
        self._need(self.lambda_c + self.lambda_p > 0, "lambda_p", "lambda_c + lambda_p > 0, else no reward")

    def _need(self, ok: bool, name: str, cure: str):
        if not ok:
            raise ValueError(f"RewardConfig.{name}={getattr(self, name)}: need {cure}")


def _full(x: Tensor) -> Tensor:
    """At least fp32, where sums need it; fp64 stays fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _same_shape(name: str, a: Tensor, b: Tensor, cure: str):
    if a.shape != b.shape:
        raise ValueError(f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)} differ; {cure}")


# ---- the scorer: do this image and this text say the same? -------------------------------------------------

def info_nce(a: Tensor, b: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE: each row of a finds its own row of b among all of them, and the reverse.
        loss = 1/2 [ CE(softmax_j(scale a_i.b_j), q_i) + CE(softmax_i(scale a_i.b_j), q_j) ]
    Source: CLIP, arXiv 2103.00020v1 Fig. 3.  Leaves it: q is not one-hot but uniform over the rows that
    `same` calls equal (as arXiv 2004.11362v5), so two items with one text are no false negatives. (It matters
    where augmentation hides different tokens of that text: one-hot targets would push its two readings apart.
    Equal rows with equal embeddings, such as prompts, give the same sum either way.)
    a, b (B, D) unit vectors; same (B, B) bool, symmetric, True on the diagonal; scale () = 1 / temperature.
    Returns (), nats."""
    logits = scale * (a @ b.T)                                        # (B, B)
    target = same.to(logits.dtype)
    target = target / target.sum(1, keepdim=True)                     # (B, B) q: rows sum to 1
    rows, columns = logits.log_softmax(1), logits.T.log_softmax(1)    # (B, B) a -> b, b -> a
    return -(target * (rows + columns)).sum(1).mean() / 2


def same_rows(ids: Tensor) -> Tensor:
    """Which rows are equal: ids (B, T) int64 -> (B, B) bool."""
    return (ids[:, None] == ids[None]).all(-1)


def disjoint_halves(n_items: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The items, at random, in two halves without a common one: the scorer's and the judge's training data.
    Returns two sorted int64 tensors, of n_items // 2 and the rest. Raises on fewer than 2 items."""
    if n_items < 2:
        raise ValueError(f"disjoint_halves: {n_items} items for scorer and judge; need at least 2")
    device = generator.device if generator is not None else None
    order = torch.randperm(n_items, generator=generator, device=device)
    return order[:n_items // 2].sort().values, order[n_items // 2:].sort().values


def _masked_mean(x: Tensor, keep: Tensor) -> Tensor:
    """Mean over the places (B, T) that count; 0 where none does.  x (B, T, D) -> (B, D)."""
    keep = keep[..., None].to(x.dtype)                                # (B, T, 1)
    return (x * keep).sum(1) / keep.sum(1).clamp(min=1)


def random_window(images: Tensor, most: float, generator: torch.Generator | None) -> Tensor:
    """Of each picture a square window at random, 1 - most to 1 of its side, enlarged to the picture's size (bilinear).
    images (B, C, H, H), most in [0, 1) -> the same shape."""
    draw = torch.rand(3, len(images), generator=generator, device=images.device, dtype=images.dtype)
    side = 1 - most * draw[0]                                         # (B,)
    x, y = (1 - side) * (2 * draw[1:] - 1)                            # (B,) the window's centre in [-1, 1]
    zero = torch.zeros_like(side)
    window = torch.stack([side, zero, x, zero, side, y], 1).unflatten(1, (2, 3))      # (B, 2, 3)
    grid = F.affine_grid(window, list(images.shape), align_corners=True)
    return F.grid_sample(images, grid, align_corners=True)            # never outside: no padding is seen


class Scorer(nn.Module):
    """Contrastive encoders of images, texts and prompts into one space of unit vectors, trained from scratch.

    The cosine of two embeddings tells how well they go together (at InfoNCE's optimum it is temperature times
    the pointwise mutual information, up to a constant).  The same class with other items and another seed is
    the judge.  vocab_size counts every token id, PAD = 0 included; prompt words are 1..n_words, 0 is padding.
    No embedding depends on the rest of the batch (GroupNorm) or on train/eval mode.  Run it outside autocast:
    it is small, and logits near 1 / temperature = 100 want fp32."""

    def __init__(self, cfg: RewardConfig, vocab_size: int, n_words: int):
        super().__init__()
        self.cfg, w, wide, dim = cfg, cfg.scorer_width, 2 * cfg.scorer_width, cfg.scorer_dim
        self.picture = nn.Sequential(                                                    # (B, 3, 32, 32)
            nn.Conv2d(3, w, 5, stride=2, padding=2), nn.GroupNorm(4, w), nn.SiLU(),      # (B, w, 16, 16)
            nn.Conv2d(w, 2 * w, 3, stride=2, padding=1), nn.GroupNorm(4, 2 * w), nn.SiLU(),
            nn.Conv2d(2 * w, 4 * w, 3, stride=2, padding=1), nn.GroupNorm(4, 4 * w), nn.SiLU(),
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * w, dim))                       # (B, D)
        self.token = nn.Embedding(vocab_size, wide, padding_idx=0)
        self.neighbours = nn.Conv1d(wide, wide, 3, padding=1)
        self.sentence = nn.Sequential(nn.Linear(2 * wide, 2 * wide), nn.SiLU(), nn.Linear(2 * wide, dim))
        self.word = nn.Embedding(n_words + 1, wide, padding_idx=0)
        self.phrase = nn.Sequential(nn.Linear(wide, wide), nn.SiLU(), nn.Linear(wide, dim))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(cfg.scorer_temperature)))   # ()

    def encode_image(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, H) in [-1, 1], of any side H, seen at 32 x 32 -> unit vectors (B, D)."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"Scorer.encode_image: images are {tuple(images.shape)}; need (B, 3, H, H)")
        return self._embed_features(self.picture[:-1](F.adaptive_avg_pool2d(images, 32)))

    def _embed_features(self, features: Tensor) -> Tensor:
        """What the last layer makes of a picture's features (B, F): unit vectors (B, D)."""
        return F.normalize(_full(self.picture[-1](features)), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) int64, PAD = 0 -> unit vectors (B, D); padding does not matter."""
        keep = tokens != 0                                                               # (B, T)
        x = self.token(tokens) * keep[..., None]                                         # (B, T, wide)
        near = F.silu(self.neighbours(x.transpose(1, 2)).transpose(1, 2))                # (B, T, wide)
        x = torch.cat([_masked_mean(x, keep), _masked_mean(near, keep)], 1)              # (B, 2 wide)
        return F.normalize(_full(self.sentence(x)), dim=-1)

    def encode_prompt(self, prompt: Tensor) -> Tensor:
        """Prompt words (B, P) int64, 0 = padding -> unit vectors (B, D); their order does not matter."""
        return F.normalize(_full(self.phrase(_masked_mean(self.word(prompt), prompt != 0))), dim=-1)

    def augment(self, images: Tensor, tokens: Tensor,
                generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """DEVIATION 21. Training only, against learning the items by heart: each picture, at 32 x 32, moved by up to
        scorer_shift pixels either way (its edges repeated), mirrored with probability scorer_mirror, and enlarged, so
        that a random window remains, 1 - scorer_zoom of the side or more; each token hidden (made PAD) with
        probability scorer_drop.  images (B, 3, H, H), tokens (B, T) -> (B, 3, 32, 32), (B, T).
        Measured on films (one training each, 96 groups of 8 x 8 samples before the reward): mirroring, enlarging and
        scorer_dropout leave the AUC of other items at 0.66, but how an image's cosine and the judge's AUC of it
        correlate within a group rises from 0.23 to 0.45 (to 0.33 by a judge trained without); a text's 0.29, now 0.27.
        With it, the image that the scorer likes best of 8 has a judge's AUC 0.050 above the group's mean; without it, by
        a judge without it too, 0.002 below (that judge and the scorer with it: 0.035 above).
        Stickers: AUC of other items 0.984."""
        B, most, device = len(images), self.cfg.scorer_shift, images.device
        move = torch.randint(-most, most + 1, (2, B, 1), generator=generator, device=device)
        row, column = (torch.arange(32, device=device) + move).clamp(0, 31)              # (B, 32) each
        mirror = torch.rand(B, 1, generator=generator, device=device) < self.cfg.scorer_mirror
        column = torch.where(mirror, column.flip(1), column)
        sample = torch.arange(B, device=device)[:, None, None]
        images = F.adaptive_avg_pool2d(images, 32).permute(0, 2, 3, 1)                   # (B, 32, 32, 3)
        images = images[sample, row[:, :, None], column[:, None]].permute(0, 3, 1, 2)    # (B, 3, 32, 32)
        if self.cfg.scorer_zoom:
            images = random_window(images, self.cfg.scorer_zoom, generator)
        keep = torch.rand(tokens.shape, generator=generator, device=device) >= self.cfg.scorer_drop
        return images, tokens * keep

    def loss(self, images: Tensor, tokens: Tensor, prompt: Tensor,
             generator: torch.Generator | None = None) -> Tensor:
        """InfoNCE of image-text, image-prompt and text-prompt pairs, their mean, in nats; chance is ln B.
        Items with the same text, or the same prompt, are no negatives of each other.
        images (B, 3, H, H), tokens (B, T), prompt (B, P) of the same B items; generator: of the augmentation
        (None: torch's own).  Raises on unequal lengths."""
        if not len(images) == len(tokens) == len(prompt):
            raise ValueError(f"Scorer.loss: {len(images)} images, {len(tokens)} texts and {len(prompt)} "
                             "prompts; give one of each for every item")
        same_text, same_prompt = same_rows(tokens), same_rows(prompt)                    # (B, B)
        images, tokens = self.augment(images, tokens, generator)
        features, drop = self.picture[:-1](images), self.cfg.scorer_dropout
        keep = torch.rand(features.shape, generator=generator, device=features.device) >= drop
        image = self._embed_features(features * keep / (1 - drop))
        text, topic = self.encode_text(tokens), self.encode_prompt(prompt)
        scale = self.log_scale.clamp(0, math.log(100)).exp()                             # () CLIP Sec. 2.5
        return (info_nce(image, text, same_text, scale) + info_nce(image, topic, same_prompt, scale)
                + info_nce(text, topic, same_prompt, scale)) / 3


# ---- the reward --------------------------------------------------------------------------------------------

class RewardParts(NamedTuple):
    """Means over samples of what the reward is made of, as measured (not normalized)."""
    consistency: Tensor    # (G,) mean cosine of the pairs of each group, in [-1, 1]
    s_image: Tensor        # () mean stage-1 score of the images
    s_text: Tensor         # () mean stage-1 score of the texts


def consistency(image_emb: Tensor, text_emb: Tensor) -> tuple[Tensor, Tensor]:
    """Each image's mean cosine with all texts of its group, and each text's with all images.
    Image and text are sampled apart, so every pair of a group is a fair sample: the mean over S_t texts has
    the expectation of a single pair's cosine, and less variance.
    image_emb (G, S_i, D), text_emb (G, S_t, D) unit vectors -> (G, S_i), (G, S_t) in [-1, 1]."""
    cosine = _full(image_emb) @ _full(text_emb).transpose(1, 2)       # (G, S_i, S_t)
    return cosine.mean(2), cosine.mean(1)


def normalize_group(x: Tensor, eps: float = 1e-4) -> Tensor:
    """Each group (G, S) less its mean, over the standard deviation within groups, pooled over all groups.
    Pooled, so that a group whose samples agree already adds next to nothing: divided by its own standard deviation it would
    add noise as loud as the others' signal (measured: README, ledger). All groups constant: 0, not magnified rounding."""
    x = _full(x)
    x = x - x.mean(1, keepdim=True)
    return x / (x.square().mean().sqrt() + eps)


def pair_reward(image_emb: Tensor, text_emb: Tensor, s_image: Tensor, s_text: Tensor,
                cfg: RewardConfig) -> tuple[Tensor, Tensor, RewardParts]:
    """Cross-modal consistent and personalized reward of every sample; a group is made for one (user, prompt).
        R(x, y) = lambda_c cos(x, y) + lambda_p (s_image(x) + s_text(y))
    averaged over the partners in the group; what a sample cannot change (its partners' s) is left out.
    DEVIATION 9: each term is centred within its group and divided by the deviation within groups, pooled.  That
    frees lambda_c : lambda_p of units and only scales each term's gradient (the paper's formula is not public).
    image_emb (G, S_i, D), text_emb (G, S_t, D) unit vectors; s_image (G, S_i), s_text (G, S_t) any unit.
    Returns reward_image (G, S_i), reward_text (G, S_t), both without gradient, and the RewardParts."""
    cure = "give one embedding and one score for every sample"
    _same_shape("pair_reward: images", image_emb[..., 0], s_image, cure)
    _same_shape("pair_reward: texts", text_emb[..., 0], s_text, cure)
    c_image, c_text = consistency(image_emb.detach(), text_emb.detach())
    s_image, s_text = s_image.detach(), s_text.detach()
    reward_image = cfg.lambda_c * normalize_group(c_image) + cfg.lambda_p * normalize_group(s_image)
    reward_text = cfg.lambda_c * normalize_group(c_text) + cfg.lambda_p * normalize_group(s_text)
    return reward_image, reward_text, RewardParts(c_image.mean(1), _full(s_image).mean(), _full(s_text).mean())


# ---- REINFORCE ---------------------------------------------------------------------------------------------

def leave_one_out(reward: Tensor) -> Tensor:
    """Advantage: a sample's reward minus the mean of the others in its group.
        A_s = R_s - 1/(S-1) sum_{r != s} R_r  =  S/(S-1) (R_s - mean R)
    Unbiased: the baseline does not depend on the sample's own action.  Source: Kool, van Hoof, Welling 2019,
    "Buy 4 REINFORCE samples, get a baseline for free!".
    reward (G, S) -> (G, S), no gradient.  Raises on S = 1."""
    if reward.dim() != 2 or reward.shape[1] < 2:
        raise ValueError(f"leave_one_out: reward is {tuple(reward.shape)}; need (G, S) with S >= 2 samples")
    S = reward.shape[1]
    reward = _full(reward.detach())
    return (reward - reward.mean(1, keepdim=True)) * (S / (S - 1))


def reinforce_loss(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """Score-function surrogate: its gradient is -E[A grad log pi]; its value means nothing.
    Source: Williams 1992.  log_prob (...) nats, summed over a sample's tokens or steps; advantage of the same
    shape (else it raises, rather than broadcast), detached here.  Returns (), the mean over samples."""
    _same_shape("reinforce_loss: log_prob and advantage", log_prob, advantage, "give one of each per sample")
    return -(advantage.detach() * _full(log_prob)).mean()


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    """log N(x; mean, std^2), summed over all but the batch dimension, in fp32 or better, nats.
    The log-probability of an ancestral diffusion step (DDPO, arXiv 2305.13301v4 Sec. 4.2).
    x, mean (B, ...); std > 0, a number or broadcastable to x -> (B,).  Pass x, a sample, without gradient."""
    x, mean = _full(x), _full(mean)
    std = torch.as_tensor(std, dtype=x.dtype, device=x.device)
    log_prob = -((x - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2
    return log_prob.flatten(1).sum(1)


def gaussian_kl(mean: Tensor, ref_mean: Tensor, std: Tensor | float) -> Tensor:
    """KL[N(mean, std^2) || N(ref_mean, std^2)] = |mean - ref_mean|^2 / (2 std^2), nats: a step's drift.
    Summed over all but the batch.  mean, ref_mean (B, ...); std a number or broadcastable -> (B,)."""
    return (((_full(mean) - _full(ref_mean)) / std).square() / 2).flatten(1).sum(1)


def categorical_kl(log_p: Tensor, log_q: Tensor, keep: Tensor | None = None) -> Tensor:
    """KL[p || q] = sum_v p (log p - log q), nats: the text policy's drift.  Summed over all but the batch.
    log_p, log_q (B, T, V) or (B, V) normalized; -inf in log_p counts 0, -inf in log_q alone gives inf;
    keep (B, T) bool or None: the places that count (up to and with EOS) -> (B,)."""
    _same_shape("categorical_kl: log_p and log_q", log_p, log_q, "give both over the same tokens")
    log_p, log_q = _full(log_p), _full(log_q)
    never = log_p.isneginf()                                          # masked first: 0 * inf would be nan
    log_ratio = log_p.masked_fill(never, 0) - log_q.masked_fill(never, 0)
    kl = (log_p.exp() * log_ratio).sum(-1)                            # (B, T) or (B,)
    if keep is not None:
        kl = kl.masked_fill(~keep, 0)
    return kl.flatten(1).sum(1) if kl.dim() > 1 else kl


def token_optimizer(tables: dict[str, Tensor], cfg: RewardConfig) -> torch.optim.Adam:
    """Adam (0.9, 0.99), without weight decay, for preference tokens {"image": (R, D), "text": (R, D)}.
    A row that no sample used has no gradient.  AdamW still shrinks it, by lr * weight_decay a round; Adam
    leaves a row that was never used as it is, to the bit.  A row used before goes on for some rounds by its
    momentum, that is by its own earlier gradients (per-row moments that wait instead learnt less).  A code is
    in few groups a round: with 0.95 for 0.99 the second moment is noise, and steps are signs (DEVIATION 22)."""
    groups = [{"params": [table], "lr": getattr(cfg, f"lr_{m}")} for m, table in tables.items()]
    return torch.optim.Adam(groups, betas=(0.9, 0.99), weight_decay=0.0)


# ---- the judge: how good is a pair, on any data ------------------------------------------------------------

def _mean_and_factor(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) of x (N, D), and R with R^T R = its covariance."""
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / math.sqrt(len(x) - 1), mode="r").R


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of features; 0 for equal sets.
        d^2 = |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))
    Source: Heusel et al. 2017, arXiv 1706.08500v6 Eq. 6.  With C = R^T R from a QR of the centred features,
    the root's trace is the sum of the singular values of R_a R_b^T (a root loses half the digits near 0).
    features_a (N, D), features_b (M, D), float64 inside; biased upwards for few rows: compare equal sizes.
    Raises on fewer than 2 rows and on unequal width."""
    if features_a.shape[1] != features_b.shape[1] or min(len(features_a), len(features_b)) < 2:
        raise ValueError(f"frechet_distance: features are {tuple(features_a.shape)} and "
                         f"{tuple(features_b.shape)}; need at least 2 rows each, of equal width")
    mean, factor = zip(*(_mean_and_factor(x.detach().cpu().double()) for x in (features_a, features_b)))
    root_trace = torch.linalg.svdvals(factor[0] @ factor[1].T).sum()
    trace = sum(r.square().sum() for r in factor) - 2 * root_trace
    return max(0.0, ((mean[0] - mean[1]).square().sum() + trace).item())


def _wins(lead: Tensor, tie: float) -> Tensor:
    """1 where lead > tie, 1/2 within +-tie, else 0."""
    return ((lead > tie).to(lead.dtype) + (lead >= -tie).to(lead.dtype)) / 2


def swap_share(own_score: Tensor, other_score: Tensor) -> Tensor:
    """Does what was made with the user's own tokens please more than what another user's tokens gave?
    1 where own > other, 1/2 where equal, 0 else; its mean is 1/2 by chance.  Both (B,) -> (B,) float."""
    _same_shape("swap_share", own_score, other_score, "score the same pairs twice")
    return _wins(own_score - other_score, 0.0)


def _rank_share(query: Tensor, candidates: Tensor, own: Tensor, tie: float = 1e-6) -> Tensor:
    """Share of the other candidates that a query is less close to than to its own one; ties count half.
    query (B, D), candidates (C, D) unit vectors, own (B,) int64 -> (B,) in [0, 1].  By 2^22 cosines."""
    C, share = len(candidates), []
    chunk = max(1, 2 ** 22 // C)
    for q, o in zip(query.split(chunk), own.split(chunk)):
        cosine = q @ candidates.T                                     # (chunk, C)
        wins = _wins(cosine.gather(1, o[:, None]) - cosine, tie)      # (chunk, C); its own counts 1/2
        share.append((wins.sum(1) - 0.5) / (C - 1))
    return torch.cat(share)


def judge_consistency(image_emb: Tensor, text_emb: Tensor) -> Tensor:
    """Does an image go with its own text rather than with the other pairs' texts?
    The share of the others that it is less close to: an AUC, 1/2 by chance, 1 at best.  Cosines within 1e-6
    are ties (another pair may have the same text) and count half.
    image_emb, text_emb (B, D) unit vectors of the same B >= 2 pairs -> (B,) in [0, 1]."""
    _same_shape("judge_consistency", image_emb, text_emb, "give the image and the text of the same pairs")
    if len(image_emb) < 2:
        raise ValueError(f"judge_consistency: {len(image_emb)} pair has no other to compare with; need 2")
    return _rank_share(image_emb, text_emb, torch.arange(len(image_emb), device=image_emb.device))


def judge_prompt(content_emb: Tensor, prompt_emb: Tensor, prompt_index: Tensor) -> Tensor:
    """Does an image, or a text, show its prompt rather than the other prompts?  As judge_consistency.
    content_emb (B, D), prompt_emb (W, D) unit vectors of the W >= 2 distinct prompts, prompt_index (B,) int64
    in [0, W) -> (B,) in [0, 1]."""
    if len(prompt_emb) < 2:
        raise ValueError(f"judge_prompt: {len(prompt_emb)} prompt has no other to compare with; need 2")
    return _rank_share(content_emb, prompt_emb, prompt_index)


def taste(embedding: Tensor, user: Tensor, item: Tensor, n_users: int) -> Tensor:
    """What a user likes more than others do, in the judge's eyes: mean embedding of the user's interactions,
    minus that of all interactions (what everybody likes adds only noise to telling users apart).
    The score of something made for u is its cosine with row u; 0 for a user without interactions.
    embedding (I, D), user, item (R,) int64 of R interactions -> (U, D)."""
    liked = embedding[item]                                           # (R, D)
    total = embedding.new_zeros(n_users, embedding.shape[1]).index_add_(0, user, liked - liked.mean(0))
    count = embedding.new_zeros(n_users).index_add_(0, user, embedding.new_ones(len(user)))
    return total / count.clamp(min=1)[:, None]


class Content(NamedTuple):
    """Images and texts made for the same B (user, prompt) pairs."""
    images: Tensor      # (B, 3, H, H) in [-1, 1]
    tokens: Tensor      # (B, T) int64


@torch.no_grad()
def embed(judge: Scorer, content: Content, batch: int = 256) -> dict[str, Tensor]:
    """The judge's embeddings {"image": (B, D), "text": (B, D)}, `batch` rows at a time."""
    parts = zip(content.images.split(batch), content.tokens.split(batch))
    image, text = zip(*((judge.encode_image(x), judge.encode_text(y)) for x, y in parts))
    return {"image": torch.cat(image), "text": torch.cat(text)}


@torch.no_grad()
def judge_measures(judge: Scorer, own: Content, other: Content, likes: dict[str, Tensor], prompts: Tensor,
                   prompt_index: Tensor) -> dict[str, Tensor]:
    """What the judge finds in pairs made with the users' own tokens, beside those made with others' tokens, (B,) each.
    likes[m] (B, D): `taste` of each pair's user; prompts (W, P) distinct, prompt_index (B,) into them."""
    mine, theirs = embed(judge, own), embed(judge, other)
    found = {"judge_consistency": judge_consistency(mine["image"], mine["text"])}
    for m in ("image", "text"):
        liking = [F.cosine_similarity(x[m], likes[m], dim=1) for x in (mine, theirs)]
        found[f"judge_swap_{m}"] = swap_share(*liking)
        if len(prompts) > 1:
            found[f"judge_prompt_{m}"] = judge_prompt(mine[m], judge.encode_prompt(prompts), prompt_index)
    return found


def frechet_interval(made: Tensor, real: Tensor, group: Tensor, n_groups: int = 10) -> dict[str, float]:
    """frechet_distance of features made (N, D) and real (M, D) with its 95 % interval by the jackknife, leaving out one
    group of rows of `made` at a time; group (N,) int64 in [0, n_groups), whole users in each."""
    mean = frechet_distance(made, real)
    without = torch.tensor([frechet_distance(made[group != g], real) for g in range(n_groups)], dtype=torch.float64)
    variance = (n_groups - 1) / n_groups * (without - without.mean()).square().sum().item()
    half = float(student_t.ppf(0.975, n_groups - 1)) * math.sqrt(variance)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def interval(values: Tensor, cluster: Tensor | None = None, level: float = 0.95) -> dict[str, float]:
    """Mean of values with its confidence interval, when the values of one cluster (user) are not independent.
        Var(mean) = C/(C-1) sum_c [ sum_{i in c} (v_i - mean) ]^2 / n^2,    Student's t with C - 1 degrees
    Cluster-robust (Liang and Zeger 1986): right for any dependence inside a cluster and for clusters of
    unequal size, without a bootstrap's seed; about 20 clusters are enough.  Default: each value its own.
    values (n,) finite, cluster (n,) integers.  Returns {"mean", "low", "high"}, not clipped to [0, 1];
    low and high are nan for a single cluster: its spread is unknown.  Raises on no or non-finite values."""
    values = torch.as_tensor(values).detach().double().cpu()
    if values.dim() != 1 or len(values) == 0 or not values.isfinite().all():
        raise ValueError(f"interval: values of shape {tuple(values.shape)}, {(~values.isfinite()).sum()} of "
                         "them non-finite; need at least one, all finite")
    cluster = torch.arange(len(values)) if cluster is None else torch.as_tensor(cluster).cpu()
    _same_shape("interval: values and cluster", values, cluster, "give one cluster for every value")
    index = cluster.unique(return_inverse=True)[1]                    # (n,) in [0, C)
    C, mean = int(index.max()) + 1, values.mean()
    residual = values.new_zeros(C).index_add_(0, index, values - mean)
    half = math.nan
    if C > 1:
        error = math.sqrt(C / (C - 1) * float(residual.square().sum())) / len(values)
        half = error * float(student_t.ppf((1 + level) / 2, C - 1))
    return {"mean": float(mean), "low": float(mean) - half, "high": float(mean) + half}
