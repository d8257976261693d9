"""The reward: image and text shall agree without losing the person.  The judge: how good is a pair?

    cos(f(x), g(y))                          Scorer           contrastive (CLIP, arXiv 2103.00020v1)
    R = lambda_c cos + lambda_p (s_x + s_y)  pair_reward      each term normalized over the samples
    A_s = R_s - mean of its group's others   leave_one_out    (Kool et al. 2019)
    grad = E[A grad log pi]                  reinforce_loss   (Williams 1992); pi: a generator
    KL[pi || pi of the starting tokens]      gaussian_kl, categorical_kl: the drift, and its price
    the best of several pairs                best_pair        needs no training: choose by R
    how good is a pair, on any data          judge_pairs, rank_share, taste_without, share_of_pairs
    how sure is a figure                     interval, share_interval, frechet_interval

Shapes: B batch, D width, G groups, S samples in a group (S_i images, S_t texts), T text length,
V vocabulary, P prompt words, U users, I items, R likes (user, item), F features,
C candidates or clusters, N and M sizes of two sets, H picture side in pixels."""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import t as student_t
from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class RewardConfig:
    """Settings of the scorer (and its twin, the judge), of the reward and of REINFORCE."""
    lambda_c: float = 2.0  # weight of the consistency of image and text
    lambda_p: float = 0.3  # weight of the personalization scores of stage 1
    scorer_width: int = 32  # channels of the first convolution; twice as many for texts
    scorer_dim: int = 64  # D, width of the shared embedding
    scorer_steps: int = 300  # optimizer steps of the scorer, and again of the judge
    scorer_batch: int = 128  # items in a batch: each is a negative of all others
    scorer_lr: float = 3e-3  # peak learning rate (AdamW), falling to 0
    scorer_temperature: float = 0.07  # of InfoNCE at the start; learnt in [0.01, 1]
    scorer_shift: int = 4  # training moves a picture by up to so many pixels of 32
    scorer_mirror: float = 0.5  # probability that training mirrors a picture
    scorer_zoom: float = 0.25  # training cuts off up to so much of a picture's side
    scorer_dropout: float = 0.3  # probability that training drops a picture's feature
    scorer_drop: float = 0.1  # probability that training hides a text token
    rounds: int = 200  # REINFORCE updates; 0: no reward
    groups: int = 64  # G, (user, prompt) groups in a round
    images: int = 4  # S_i, images of a group
    texts: int = 8  # S_t, texts of a group: cheaper than images
    lr_image: float = 0.035  # peak learning rate of the image tokens (Adam)
    lr_text: float = 0.0018  # peak learning rate of the text tokens (Adam)
    diffusion_steps: int = 4  # DDIM steps of an image
    kl_image: float = 0.05  # weight of images' KL from the starting tokens
    kl_text: float = 2.5  # weight of texts' KL (DEVIATION 24)
    log_every: int = 25  # rounds between measurements of quality


def _full(x: Tensor) -> Tensor:
    """At least fp32, where sums need it; fp64 stays fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- the scorer: do this image and this text say the same? ---------------------------------------

def info_nce(a: Tensor, b: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE: each row of a finds its own row of b among all of them, and the reverse.
        loss = 1/2 [ CE(softmax_j(scale a_i.b_j), q_i) + CE(softmax_i(scale a_i.b_j), q_j) ]
    Source: CLIP, arXiv 2103.00020v1 Fig. 3.  Leaves it: q is not one-hot but uniform over the rows
    that `same` calls equal (as arXiv 2004.11362v5), so two items with one text are no false
    negatives.  This matters where augmentation hides different tokens of that text: one-hot
    targets would push its two readings apart.
    a, b (B, D) unit vectors; same (B, B) bool, symmetric, True on the diagonal; scale () =
    1 / temperature -> (), nats."""
    logits = scale * (a @ b.T)  # (B, B)
    target = same.to(logits.dtype)
    target = target / target.sum(1, keepdim=True)  # (B, B) q: rows sum to 1
    rows, columns = logits.log_softmax(1), logits.T.log_softmax(1)  # a -> b, b -> a
    return -(target * (rows + columns)).sum(1).mean() / 2


def same_rows(ids: Tensor) -> Tensor:
    """Which rows are equal: ids (B, T) int64 -> (B, B) bool."""
    return (ids[:, None] == ids[None]).all(-1)


def _masked_mean(x: Tensor, keep: Tensor) -> Tensor:
    """Mean over the places (B, T) that count; 0 where none does.  x (B, T, D) -> (B, D)."""
    keep = keep[..., None].to(x.dtype)  # (B, T, 1)
    return (x * keep).sum(1) / keep.sum(1).clamp(min=1)


def random_window(images: Tensor, most: float, generator: Generator | None) -> Tensor:
    """A random square window of each picture, enlarged to the picture's size (bilinear).
    The window's side is 1 - most to 1 of the picture's; it lies anywhere in the picture.
    images (B, 3, H, H), most in [0, 1) -> the same shape."""
    draw = torch.rand(3, len(images), generator=generator, device=images.device, dtype=images.dtype)
    side = 1 - most * draw[0]  # (B,)
    x, y = (1 - side) * (2 * draw[1:] - 1)  # (B,) each: the window's centre in [-1, 1]
    zero = torch.zeros_like(side)
    window = torch.stack([side, zero, x, zero, side, y], 1).unflatten(1, (2, 3))  # (B, 2, 3)
    grid = F.affine_grid(window, list(images.shape), align_corners=True)
    return F.grid_sample(images, grid, align_corners=True)  # never outside: no padding is seen


class Scorer(nn.Module):
    """Contrastive encoders of images, texts and prompts into one space of unit vectors.

    The cosine of two embeddings tells how well they go together: at InfoNCE's optimum it is
    temperature times the pointwise mutual information, up to a constant.  The same class, trained
    on other items from another seed, is the judge.  No embedding depends on the rest of the batch
    (GroupNorm) or on train/eval mode.  Run it outside autocast: it is small, and logits near
    1 / temperature = 100 want fp32.
    vocab_size counts every token id, PAD = 0 too; prompt words are 1..n_words, 0 is padding."""

    def __init__(self, cfg: RewardConfig, vocab_size: int, n_words: int):
        super().__init__()
        self.cfg = cfg
        w, dim = cfg.scorer_width, cfg.scorer_dim
        self.picture = nn.Sequential(  # (B, 3, 32, 32)
            nn.Conv2d(3, w, 5, stride=2, padding=2), nn.GroupNorm(4, w), nn.SiLU(),
            nn.Conv2d(w, 2 * w, 3, stride=2, padding=1), nn.GroupNorm(4, 2 * w), nn.SiLU(),
            nn.Conv2d(2 * w, 4 * w, 3, stride=2, padding=1), nn.GroupNorm(4, 4 * w), nn.SiLU(),
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * w, dim))  # (B, D)
        self.token = nn.Embedding(vocab_size, 2 * w, padding_idx=0)
        self.neighbours = nn.Conv1d(2 * w, 2 * w, 3, padding=1)
        self.sentence = nn.Sequential(nn.Linear(4 * w, 4 * w), nn.SiLU(), nn.Linear(4 * w, dim))
        self.word = nn.Embedding(n_words + 1, 2 * w, padding_idx=0)
        self.phrase = nn.Sequential(nn.Linear(2 * w, 2 * w), nn.SiLU(), nn.Linear(2 * w, dim))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(cfg.scorer_temperature)))  # ()

    def _embed_features(self, features: Tensor) -> Tensor:
        """What the last layer of `picture` makes of the features before it: unit vectors (B, D)."""
        return F.normalize(_full(self.picture[-1](features)))

    def encode_image(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, H) in [-1, 1], of any side, seen at 32 x 32 -> unit vectors (B, D)."""
        return self._embed_features(self.picture[:-1](F.adaptive_avg_pool2d(images, 32)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) int64, PAD = 0 -> unit vectors (B, D); padding does not matter."""
        keep = tokens != 0  # (B, T)
        x = self.token(tokens) * keep[..., None]  # (B, T, 2w)
        near = F.silu(self.neighbours(x.mT).mT)  # (B, T, 2w)
        x = torch.cat([_masked_mean(x, keep), _masked_mean(near, keep)], 1)  # (B, 4w)
        return F.normalize(_full(self.sentence(x)))

    def encode_prompt(self, prompt: Tensor) -> Tensor:
        """Prompt words (B, P) int64, 0 = padding -> unit vectors (B, D); in any order."""
        x = _masked_mean(self.word(prompt), prompt != 0)  # (B, 2w)
        return F.normalize(_full(self.phrase(x)))

    def augment(self, images: Tensor, tokens: Tensor,
                generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Vary a batch in training, so that no item is learnt by heart (DEVIATION 21).
        Each picture, at 32 x 32, is moved by up to scorer_shift pixels either way (its edges
        repeated), mirrored with probability scorer_mirror, and enlarged so that a random window of
        1 - scorer_zoom of the side, or more, remains; each token is hidden (made PAD) with
        probability scorer_drop.
        images (B, 3, H, H), tokens (B, T) -> (B, 3, 32, 32), (B, T)."""
        B, most = len(images), self.cfg.scorer_shift
        draw = {"generator": generator, "device": images.device}
        move = torch.randint(-most, most + 1, (2, B, 1), **draw)
        row, column = (torch.arange(32, device=images.device) + move).clamp(0, 31)  # (B, 32) each
        mirror = torch.rand(B, 1, **draw) < self.cfg.scorer_mirror
        column = torch.where(mirror, column.flip(1), column)
        images = F.adaptive_avg_pool2d(images, 32).take_along_dim(row[:, None, :, None], 2)
        images = images.take_along_dim(column[:, None, None], 3)  # (B, 3, 32, 32)
        if self.cfg.scorer_zoom:
            images = random_window(images, self.cfg.scorer_zoom, generator)
        keep = torch.rand(tokens.shape, **draw) >= self.cfg.scorer_drop
        return images, tokens * keep

    def loss(self, images: Tensor, tokens: Tensor, prompt: Tensor,
             generator: Generator | None = None) -> Tensor:
        """InfoNCE of image-text, image-prompt and text-prompt pairs, their mean.
        Items with the same text, or the same prompt, are no negatives of each other.  A share
        scorer_dropout of the pictures' features is dropped here and nowhere else.
        images (B, 3, H, H), tokens (B, T), prompt (B, P) of the same B items; generator: of the
        augmentation (None: torch's own) -> (), nats; ln B by chance."""
        same_text, same_prompt = same_rows(tokens), same_rows(prompt)  # (B, B)
        images, tokens = self.augment(images, tokens, generator)
        features, drop = self.picture[:-1](images), self.cfg.scorer_dropout
        keep = torch.rand(features.shape, generator=generator, device=features.device) >= drop
        image = self._embed_features(features * keep / (1 - drop))
        text, topic = self.encode_text(tokens), self.encode_prompt(prompt)
        scale = self.log_scale.clamp(0, math.log(100)).exp()  # () CLIP Sec. 2.5
        return (info_nce(image, text, same_text, scale) + info_nce(image, topic, same_prompt, scale)
                + info_nce(text, topic, same_prompt, scale)) / 3


# ---- the reward ----------------------------------------------------------------------------------

class RewardParts(NamedTuple):
    """Means over samples of what the reward is made of, as measured (not normalized)."""
    consistency: Tensor  # (G,) mean cosine of each group's pairs
    s_image: Tensor  # () mean stage-1 score of the images
    s_text: Tensor  # () mean stage-1 score of the texts


def consistency(image_emb: Tensor, text_emb: Tensor) -> tuple[Tensor, Tensor]:
    """Each image's mean cosine with all texts of its group, and each text's with all images.
    Image and text are sampled apart, so every pair of a group is a fair sample: the mean over S_t
    texts has the expectation of a single pair's cosine, and less variance.
    image_emb (G, S_i, D), text_emb (G, S_t, D) unit vectors -> (G, S_i), (G, S_t) in [-1, 1]."""
    cosine = _full(image_emb) @ _full(text_emb).mT  # (G, S_i, S_t)
    return cosine.mean(2), cosine.mean(1)


def normalize_group(x: Tensor, eps: float = 1e-4) -> Tensor:
    """Each group's values (G, S) less their mean, over one standard deviation for all groups.
    One for all, so that a group whose samples agree already adds next to nothing: divided by its
    own deviation it would add noise as loud as the others' signal.  A deviation below eps is
    rounding and is not magnified."""
    x = _full(x)
    x = x - x.mean(1, keepdim=True)
    return x / (x.square().mean().sqrt() + eps)


@torch.no_grad()
def pair_reward(image_emb: Tensor, text_emb: Tensor, s_image: Tensor, s_text: Tensor,
                cfg: RewardConfig) -> tuple[Tensor, Tensor, RewardParts]:
    """Cross-modal consistent and personalized reward of every sample.
        R(x, y) = lambda_c cos(x, y) + lambda_p (s_image(x) + s_text(y))
    A group is made for one (user, prompt).  R is averaged over a sample's partners in the group;
    what the sample cannot change (its partners' s) is left out.  Each term goes through
    normalize_group (DEVIATION 9): that frees lambda_c : lambda_p of units and only scales each
    term's gradient (the paper's formula is not public).
    image_emb (G, S_i, D), text_emb (G, S_t, D) unit vectors; s_image (G, S_i), s_text (G, S_t) in
    any unit -> rewards (G, S_i) and (G, S_t), without gradient, and the RewardParts."""
    c_image, c_text = consistency(image_emb, text_emb)
    reward_image = cfg.lambda_c * normalize_group(c_image) + cfg.lambda_p * normalize_group(s_image)
    reward_text = cfg.lambda_c * normalize_group(c_text) + cfg.lambda_p * normalize_group(s_text)
    parts = RewardParts(c_image.mean(1), _full(s_image).mean(), _full(s_text).mean())
    return reward_image, reward_text, parts


# ---- REINFORCE -----------------------------------------------------------------------------------

def leave_one_out(reward: Tensor) -> Tensor:
    """Advantage: a sample's reward minus the mean of the others in its group.
        A_s = R_s - 1/(S-1) sum_{r != s} R_r  =  S/(S-1) (R_s - mean R)
    Unbiased: the baseline does not depend on the sample's own action.  Source: Kool, van Hoof,
    Welling 2019, "Buy 4 REINFORCE samples, get a baseline for free!".
    reward (G, S) -> (G, S), no gradient.  Raises ValueError on S = 1."""
    S = reward.shape[1]
    if S < 2:
        raise ValueError(f"leave_one_out: reward is {tuple(reward.shape)}; need S >= 2 samples")
    reward = _full(reward.detach())
    return (reward - reward.mean(1, keepdim=True)) * (S / (S - 1))


def reinforce_loss(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """Score-function surrogate: its gradient is -E[A grad log pi]; its value means nothing.
    Source: Williams 1992.
    log_prob (...) nats, summed over a sample's tokens or steps; advantage of the same shape,
    detached here -> (), the mean over samples.  Raises ValueError rather than broadcast."""
    if log_prob.shape != advantage.shape:
        raise ValueError(f"reinforce_loss: log_prob is {tuple(log_prob.shape)} but advantage is "
                         f"{tuple(advantage.shape)}; give one of each per sample")
    return -(advantage.detach() * _full(log_prob)).mean()


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    """log N(x; mean, std^2), nats, summed over all but the batch, in fp32 or better.
    The log-probability of an ancestral diffusion step (DDPO, arXiv 2305.13301v4 Sec. 4.2).
    x, mean (B, ...); std > 0, a number or broadcastable to x -> (B,).  Pass x, a sample, without
    gradient."""
    x, mean = _full(x), _full(mean)
    std = torch.as_tensor(std, dtype=x.dtype, device=x.device)
    log_prob = -((x - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2
    return log_prob.flatten(1).sum(1)


def gaussian_kl(mean: Tensor, ref_mean: Tensor, std: Tensor | float) -> Tensor:
    """KL[N(mean, std^2) || N(ref_mean, std^2)] = |mean - ref_mean|^2 / (2 std^2), nats.
    The drift of a diffusion step, summed over all but the batch.
    mean, ref_mean (B, ...); std a number or broadcastable -> (B,)."""
    return (((_full(mean) - _full(ref_mean)) / std).square() / 2).flatten(1).sum(1)


def categorical_kl(log_p: Tensor, log_q: Tensor, keep: Tensor) -> Tensor:
    """KL[p || q] = sum_v p (log p - log q), nats, summed over the places of a text: its drift.
    log_p, log_q (B, T, V) normalized; -inf in log_p counts 0, -inf in log_q alone gives inf;
    keep (B, T) bool: the places that count (up to and with EOS) -> (B,)."""
    log_p, log_q = _full(log_p), _full(log_q)
    never = log_p.isneginf()  # masked first: 0 * inf would be nan
    log_ratio = log_p.masked_fill(never, 0) - log_q.masked_fill(never, 0)
    kl = (log_p.exp() * log_ratio).sum(-1)  # (B, T)
    return kl.masked_fill(~keep, 0).sum(1)


def token_optimizer(tables: dict[str, Tensor], cfg: RewardConfig) -> torch.optim.Adam:
    """Adam without weight decay for the tables of preference tokens, {"image": ..., "text": ...}.
    A row that no sample used has no gradient.  AdamW shrinks it all the same, by lr * weight_decay
    a round; Adam leaves a row that was never used as it is, to the bit.  A row used before goes on
    for some rounds by its momentum, that is by its own earlier gradients.  A code is in few groups
    of a round: with beta2 = 0.95 instead of 0.99, the second moment is mostly noise, and a step
    little more than the gradient's sign (DEVIATION 22)."""
    groups = [{"params": [table], "lr": getattr(cfg, f"lr_{m}")} for m, table in tables.items()]
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


# ---- the best of several pairs: a rival that needs no training -----------------------------------

def _standardize(x: Tensor, eps: float = 1e-4) -> Tensor:
    """Each row (G, n) less its mean, over its own standard deviation (unlike normalize_group)."""
    x = _full(x) - _full(x).mean(1, keepdim=True)
    return x / (x.square().mean(1, keepdim=True).sqrt() + eps)


def best_pair(image_emb: Tensor, text_emb: Tensor, s_image: Tensor, s_text: Tensor,
              cfg: RewardConfig) -> tuple[Tensor, Tensor]:
    """Which image and which text of each group make the pair with the highest reward.
        R(x, y) = lambda_c cos(x, y) + lambda_p (s_image(x) + s_text(y))
    It sees both sides at once, so it can make them agree without giving up variety, at the price of
    sampling S_i images and S_t texts for one pair.  Each term is normalized within its own group: a
    choice does not depend on what else is chosen in the same batch.
    image_emb (G, S_i, D), text_emb (G, S_t, D) unit vectors; s_image (G, S_i), s_text (G, S_t) in
    any unit -> numbers of the chosen images (G,) and texts (G,), int64."""
    cosine = _full(image_emb) @ _full(text_emb).mT  # (G, S_i, S_t)
    agree = _standardize(cosine.flatten(1)).view_as(cosine)
    liking = _standardize(s_image)[:, :, None] + _standardize(s_text)[:, None]  # (G, S_i, S_t)
    best = (cfg.lambda_c * agree + cfg.lambda_p * liking).flatten(1).argmax(1)
    return best // cosine.shape[2], best % cosine.shape[2]


# ---- the judge: how good is a pair, on any data --------------------------------------------------

def halves_by_text(tokens: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Split items in two halves that share no text: what the scorer and what the judge learns from.
    A judge that knew the scorer's texts by heart would share its mistakes.
    tokens (I, T) int64, on the CPU like the generator -> two sorted int64 tensors of item numbers.
    Raises ValueError on fewer than 2 different texts."""
    distinct, text = tokens.unique(dim=0, return_inverse=True)  # text (I,)
    if len(distinct) < 2:
        raise ValueError(f"halves_by_text: {len(distinct)} different texts; need 2")
    order = torch.randperm(len(distinct), generator=generator)
    first = torch.isin(text, order[:len(distinct) // 2])  # (I,) bool
    return first.nonzero()[:, 0], (~first).nonzero()[:, 0]


def swap_share(own_score: Tensor, other_score: Tensor) -> Tensor:
    """Does what was made with the user's own tokens please more than what another's tokens gave?
    1 where own > other, 1/2 where equal, 0 else; its mean is 1/2 by chance.  Both (B,) -> (B,)."""
    return (1 + (own_score - other_score).sign()) / 2


def rank_share(query: Tensor, candidates: Tensor, own: Tensor, tie: float = 1e-6) -> Tensor:
    """Share of the other candidates that a query is less close to than to its own one: an AUC.
    1/2 by chance, 1 at best.  Cosines within `tie` of each other (of equal texts, say) count half.
    query (B, D), candidates (C, D) unit vectors, own (B,) int64 in [0, C)
    -> (B,) in [0, 1]; nan where there is no other candidate."""
    share = []
    for q, o in zip(query.split(1024), own.split(1024)):  # never B x C cosines at once
        cosine = q @ candidates.T  # (1024, C)
        lead = cosine.gather(1, o[:, None]) - cosine  # over its own: 0
        sign = lead.masked_fill(lead.abs() <= tie, 0).sign()
        share.append((1 + sign.sum(1) / (len(candidates) - 1)) / 2)
    return torch.cat(share)


def mean_by_user(values: Tensor, user: Tensor, n_users: int) -> tuple[Tensor, Tensor]:
    """Mean of each user's rows, and their number.
    values (R, F), user (R,) int64 in [0, U) -> (U, F), 0 for a user without rows; (U,)."""
    count = user.bincount(minlength=n_users).to(values.dtype)
    total = values.new_zeros(n_users, values.shape[1]).index_add_(0, user, values)
    return total / count.clamp(min=1)[:, None], count


def taste_without(embedding: Tensor, user: Tensor, item: Tensor,
                  who: Tensor, judged: Tensor) -> Tensor:
    """What a user likes more than others do, in the judge's eyes, without the item that is judged.
    The mean embedding of the user's likes other than `judged`, less that of everybody's likes: with
    the judged item inside, its own noise would speak for it.  What is made for the user is scored
    by its cosine with the row.
    embedding (I, D); likes user, item (R,) int64, each pair once; who, judged (B,) int64 -> (B, D),
    0 for a user who likes nothing else."""
    centred = embedding - embedding[item].mean(0)  # (I, D)
    mean, count = mean_by_user(centred[item], user, int(max(user.max(), who.max())) + 1)
    # Is (who, judged) one of the likes?  Each pair as one number.
    is_like = torch.isin(who * len(embedding) + judged, user * len(embedding) + item)[:, None]
    total = mean[who] * count[who, None] - centred[judged] * is_like  # (B, D)
    left = count[who, None] - is_like.float()  # (B, 1) other likes
    return torch.where(left > 0, total / left, 0)


class Content(NamedTuple):
    """Images and texts made for the same B (user, prompt) pairs."""
    images: Tensor  # (B, 3, H, H) in [-1, 1]
    tokens: Tensor  # (B, T) int64


@torch.no_grad()
def embed(judge: Scorer, content: Content, batch: int = 256) -> dict[str, Tensor]:
    """The judge's embeddings {"image": (B, D), "text": (B, D)}, `batch` rows at a time."""
    image = torch.cat([judge.encode_image(x) for x in content.images.split(batch)])
    text = torch.cat([judge.encode_text(y) for y in content.tokens.split(batch)])
    return {"image": image, "text": text}


@torch.no_grad()
def judge_pairs(judge: Scorer, own: Content, other: Content, again: Tensor,
                likes: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the judge finds in B pairs made with the users' own tokens, (B,) each.
        judge_consistency           is the image nearer to its own text than to the other pairs'?
        judge_consistency_repaired  the same with the texts of another draw for the same pairs
        judge_swap_m                is m nearer to what the user likes than `other`'s is?
    other: made with another user's tokens; again (B, T): texts of another draw with the user's own
    tokens; likes {m: (B, D)}: what the users like (taste_without)."""
    mine, theirs = embed(judge, own), embed(judge, other)
    repaired = judge.encode_text(again)
    place = torch.arange(len(again), device=again.device)
    found = {"judge_consistency": rank_share(mine["image"], mine["text"], place),
             "judge_consistency_repaired": rank_share(mine["image"], repaired, place)}
    for m, taste in likes.items():
        score = [F.cosine_similarity(emb[m], taste) for emb in (mine, theirs)]
        found[f"judge_swap_{m}"] = swap_share(*score)
    return found


def share_of_pairs(differ: Tensor, counted: Tensor) -> Tensor:
    """Variety: how much the samples of a group differ, on average over its pairs of two samples.
    differ (G, S, S) in [0, 1] or bool; counted (G, S, S) bool, the pairs that count; both symmetric
    -> (G,) float, nan where no pair counts."""
    counted = counted.triu(1)  # each pair of two samples once
    return (differ * counted).sum((1, 2)) / counted.sum((1, 2))


# ---- statistics: how sure is a figure ------------------------------------------------------------

def _mean_and_error(values: Tensor,
                    cluster: Tensor | None) -> tuple[float, float, float, int]:
    """Of the values that are not nan: mean, its cluster-robust standard error (see interval), the
    quantile of Student's t that goes with it, and the number of clusters C.  nan where unknown."""
    values = values.cpu().double()
    cluster = torch.arange(len(values)) if cluster is None else cluster.cpu()
    if values.isinf().any():
        raise ValueError("interval: values hold infinity; give nan for what was not measured")
    known = ~values.isnan()
    values = values[known]  # (n,)
    distinct, index = cluster[known].unique(return_inverse=True)  # (C,), (n,) in [0, C)
    C, mean = len(distinct), float(values.mean())
    if C < 2:
        return mean, math.nan, math.nan, C
    residual = values.new_zeros(C).index_add_(0, index, values - mean)
    error = math.sqrt(C / (C - 1) * float(residual.square().sum())) / len(values)
    return mean, error, float(student_t.ppf(0.975, C - 1)), C


def interval(values: Tensor, cluster: Tensor | None = None) -> dict[str, float]:
    """Mean and 95 % confidence interval, when the values of one cluster (user) are not independent.
        Var(mean) = C/(C-1) sum_c [ sum_{i in c} (v_i - mean) ]^2 / n^2, Student's t, C - 1 degrees
    Cluster-robust (Liang and Zeger 1986): right for any dependence inside a cluster and clusters of
    unequal size, without a bootstrap's seed; about 20 clusters are enough.
    values (n,), nan where nothing was measured; cluster (n,) integers, by default each value is its
    own -> {"mean", "low", "high"}: nan without values, low and high also with a single cluster.
    Raises ValueError on infinity."""
    mean, error, t, _ = _mean_and_error(values, cluster)
    return {"mean": mean, "low": mean - t * error, "high": mean + t * error}


def share_interval(values: Tensor, cluster: Tensor | None = None) -> dict[str, float]:
    """As interval, for values in [0, 1]: Wilson's score interval (1927).
    It stays inside [0, 1], and is not empty where all values are 0 or all are 1.  Its n is the
    number of independent values that would give the cluster-robust error: all values where they are
    independent, one a cluster where those of a cluster are alike or where there is no spread."""
    mean, error, t, C = _mean_and_error(values, cluster)
    # Of n independent values the error is sqrt(mean (1 - mean) / (n - 1)).
    n = 1 + mean * (1 - mean) / error**2 if error > 0 else max(C, 1)
    middle = n * mean + t**2 / 2
    half = t * math.sqrt(n * mean * (1 - mean) + t**2 / 4)
    low, high = (middle - half) / (n + t**2), (middle + half) / (n + t**2)
    return {"mean": mean, "low": low, "high": high}


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of features; 0 for equal sets.
        d^2 = |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))
    Source: Heusel et al. 2017, arXiv 1706.08500v6 Eq. 6.  With C = R^T R from a QR of the centred
    features, the root's trace is the sum of the singular values of R_a R_b^T (a root loses half the
    digits near 0).  Biased upwards, as two finite samples of one population differ: see
    frechet_interval.
    features_a (N, D), features_b (M, D) -> a number.  Raises ValueError on fewer than 2 rows."""
    a, b = features_a.cpu().double(), features_b.cpu().double()
    if min(len(a), len(b)) < 2:
        raise ValueError(f"frechet_distance: {len(a)} and {len(b)} rows; need 2 of each")
    factor = [torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R for x in (a, b)]
    trace = sum(r.square().sum() for r in factor)
    root_trace = torch.linalg.svdvals(factor[0] @ factor[1].T).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + trace - 2 * root_trace)


def frechet_interval(made: Tensor, real: Tensor, group: Tensor,
                     n_groups: int = 10) -> dict[str, float]:
    """frechet_distance less the bias of finite samples, with its 95 % interval, by the jackknife.
    A tenth of both sets is left out in turn (n = 10), and each pseudo-value
        n d - (n - 1) d_without
    is an estimate free of the bias in 1/N (Quenouille 1956, Tukey 1958).  So two samples of one
    population give about 0, often less.
    made (N, D); real (M, D), rows in random order; group (N,) int64: a user's rows are left out
    together -> {"mean", "low", "high"}.  Raises ValueError as frechet_distance."""
    part = group.cpu().unique(return_inverse=True)[1] % n_groups  # (N,)
    n = int(part.max()) + 1  # fewer than n_groups where users are few
    real_part = torch.arange(len(real)) % n  # (M,)
    whole, pseudo = frechet_distance(made, real), []
    for k in range(n):
        without = frechet_distance(made[part != k], real[real_part != k])
        pseudo.append(n * whole - (n - 1) * without)
    return interval(torch.tensor(pseudo, dtype=torch.float64))


if __name__ == "__main__":
    from tests.demo import reward; reward()
