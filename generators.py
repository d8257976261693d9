"""The two generators, given prompt words c and a user's preference tokens k.

    c, k -> a vector for each word and token, a learnt one for k = null             Conditioned
    p(y | c, k) = prod_t p(y_t | y_<t, c, k)                                        TextDecoder
    y_t ~ softmax((l(null) + w (l(k) - l(null))) / temperature) within a nucleus    sampling_logits
    picture <-> z_0                                                                 Autoencoder
    z_t = alpha_t z_0 + sigma_t eps;  v(z_t, t, c, k) ~ alpha_t eps - sigma_t z_0   Denoiser
    v = v(null) + w (v(k) - v(null))                                                guided_v
    z_s ~ N(mean(z_t, v), std^2), from t = T_MAX down to 0                          ddim_step

Shapes: B batch, P prompt words, M = L preference tokens, K codes, T text length, V vocabulary,
S positions that the decoder sees, D width, C channels of the latent, H picture side, h = H / 4."""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TextConfig:
    layers: int = 4               # transformer blocks
    width: int = 128              # D, width of the residual stream
    heads: int = 4                # attention heads; must divide width
    context: int = 48             # longest text, tokens with the end token; longer texts are cut
    vocab_size: int = 512         # V: 3 special tokens + 256 bytes + merges
    null_rate: float = 0.15       # share of texts trained with null preferences (2207.12598)
    guidance: float = 3.0         # w: 0 ignores the preference tokens, 1 is as trained (2207.12598)
    temperature: float = 1.0      # of sampling; 0 is greedy
    top_p: float = 0.95           # probability of the nucleus sampled from; 1 is all (1904.09751)
    lr: float = 2e-3              # peak learning rate (AdamW), after a warm-up; falling to 0
    weight_decay: float = 0.1     # AdamW, on matrices only
    batch: int = 64               # texts a step
    steps: int = 800              # optimizer steps


@dataclass(frozen=True)
class ImageConfig:
    size: int = 32                # H, picture side in pixels; a multiple of 8
    latent: int = 4               # channels of the latent, which is H/4 x H/4
    ae_width: int = 64            # channels of the autoencoder at H/4; a multiple of 16
    ae_steps: int = 900           # optimizer steps of the autoencoder
    ae_lr: float = 3e-3           # peak learning rate of the autoencoder (AdamW), falling to 0
    kl: float = 1e-4              # weight of the latent's KL from N(0, 1), per number (2112.10752)
    width: int = 64               # D/2, channels of the denoiser at H/4, D at H/8; a multiple of 8
    layers: int = 1               # residual blocks at H/4, each way; one more at H/8
    heads: int = 4                # attention heads; must divide 2 width
    null_rate: float = 0.15       # share of pictures trained with null preferences (2207.12598)
    guidance: float = 3.0         # w: 0 ignores the preference tokens, 1 is as trained (2207.12598)
    guidance_until: float = 0.5   # time from which on w is at most 1 (2404.07724)
    sampling_steps: int = 8       # S, DDIM steps
    eta: float = 1.0              # DDIM noise: 0 none, 1 ancestral: steps are Gaussian (2010.02502)
    lr: float = 2e-3              # peak learning rate of the denoiser (AdamW); falls from half-way
    weight_decay: float = 0.01    # AdamW, of autoencoder and denoiser
    ema: float = 0.998            # decay per step of the running mean of the weights, which samples
    batch: int = 64               # pictures a step, of autoencoder and denoiser
    steps: int = 2400             # optimizer steps of the denoiser
    time_mean: float = 0.7        # mean of a training time's logit; > 0 favours noise (2403.03206)
    time_std: float = 1.2         # standard deviation of a training time's logit


# Tokenizer ----------------------------------------------------------------------------------------

PAD, BOS, EOS = 0, 1, 2     # special tokens: no text encodes to them
FIRST_MERGE = 3 + 256       # ids: 3 specials, 256 bytes, then one id per merge

# Runs of letters, digits or other signs, each with the one space before it, as GPT-2's; every
# character is in exactly one run, and a run ends after 32: an endless "word" takes linear time.
PRETOKEN = re.compile(r" ?[^\W\d_]{1,32}| ?\d{1,32}| ?(?:[^\w\s]|_){1,32}|\s{1,32}(?!\S)|\s")


def _byte_ids(word: str) -> list[int]:
    """The ids of the word's UTF-8 bytes."""
    return [3 + byte for byte in word.encode()]


def _merge(ids: Sequence[int], pair: tuple[int, int], new: int) -> list[int]:
    """ids with each occurrence of the pair, from the left, replaced by new."""
    merged = []
    for token in ids:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new
        else:
            merged.append(token)
    return merged


def _learn_merges(words: dict[str, int], n_merges: int) -> list[tuple[int, int]]:
    """The n_merges most frequent pairs, one by one, each counted after the merges before it.
    words: how often each pretoken occurs. Ties go to the smaller ids: the texts' order is moot."""
    segmented = {tuple(_byte_ids(word)): n for word, n in words.items()}
    merges = []
    for new in range(FIRST_MERGE, FIRST_MERGE + n_merges):
        count = Counter()
        for ids, n in segmented.items():
            for pair in pairwise(ids):
                count[pair] += n
        best = min(count, key=lambda pair: (-count[pair], pair), default=None)
        if best is None or count[best] < 2:  # a pair seen once: nothing to gain
            break
        merges.append(best)
        segmented = {tuple(_merge(ids, best, new)): n for ids, n in segmented.items()}
    return merges


class Tokenizer:
    """Byte-level BPE (Sennrich et al. 1508.07909v5, Sec. 3.2, on UTF-8 bytes as GPT-2): any text
    round-trips. merges: pairs of ids in the order learnt; the r-th makes id FIRST_MERGE + r."""

    def __init__(self, merges: Sequence[tuple[int, int]]):
        self.merges = {pair: FIRST_MERGE + rank for rank, pair in enumerate(merges)}
        self.pieces = [b""] * 3 + [bytes([byte]) for byte in range(256)]  # id -> its bytes
        for left, right in merges:
            self.pieces.append(self.pieces[left] + self.pieces[right])
        self.vocab_size = len(self.pieces)  # V
        self._memo = {}  # pretoken -> ids

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn at most vocab_size - 259 merges, the same for any order of the texts."""
        words = Counter(word for text in texts for word in PRETOKEN.findall(text))
        return cls(_learn_merges(words, vocab_size - FIRST_MERGE))

    def encode(self, text: str) -> list[int]:
        """Ids in [3, V), without specials: in each pretoken the earliest learnt merge first."""
        return [token for word in PRETOKEN.findall(text) for token in self._encode_word(word)]

    def _encode_word(self, word: str) -> list[int]:
        if word not in self._memo:
            ids = _byte_ids(word)
            while known := [pair for pair in pairwise(ids) if pair in self.merges]:
                first = min(known, key=self.merges.get)
                ids = _merge(ids, first, self.merges[first])
            self._memo[word] = ids
        return self._memo[word]

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first EOS; bytes that are not UTF-8, which sampling may produce, become
        U+FFFD."""
        text = takewhile(lambda token: token != EOS, ids)
        return b"".join(self.pieces[token] for token in text).decode(errors="replace")

    def encode_batch(self, texts: Sequence[str], length: int) -> tuple[Tensor, int]:
        """Tokens (B, T) int64 of texts: text, EOS, PAD ...; and how many the longest has, uncut.
        T is the longest row, at most `length`. A text that is cut has no EOS: the decoder must not
        learn to stop in the middle of it."""
        rows = [self.encode(text) + [EOS] for text in texts]
        longest = max(map(len, rows), default=0)
        width = min(length, longest)
        padded = [row[:width] + [PAD] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), width), longest

    def decode_batch(self, tokens: Tensor) -> list[str]:
        """Texts of tokens (B, T), each up to its EOS."""
        return [self.decode(row) for row in tokens.tolist()]

    def state(self) -> Tensor:
        """(n, 2) int64: the merges in order, for the checkpoint."""
        return torch.tensor(list(self.merges), dtype=torch.int64).reshape(-1, 2)

    @classmethod
    def from_state(cls, state: Tensor) -> "Tokenizer":
        """The tokenizer whose `state` this is."""
        return cls([(left, right) for left, right in state.tolist()])


# Condition and attention --------------------------------------------------------------------------

class Conditioned(nn.Module):
    """What both generators are told, as vectors: prompt words and a user's preference tokens.
    `preference`, row level * K + code, is the table of preference tokens, all that REINFORCE
    changes; `null` (M, D) stands in for tokens of -1: unpersonalized. A prompt is a set: words
    carry no position; their ids are 1..n_words, and 0 is padding. levels, codes: M, K."""

    def __init__(self, width: int, n_words: int, levels: int, codes: int):
        super().__init__()
        self.levels, self.codes = levels, codes
        self.words = nn.Embedding(n_words + 1, width)
        self.preference = nn.Embedding(levels * codes, width)
        self.null = nn.Parameter(torch.randn(levels, width))

    def embed(self, prompt: Tensor, prefs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Word vectors (B, P, D), preference vectors (B, M, D), and which of both are no padding,
        (B, P + M) bool; for prompt (B, P), prefs (B, M) int64. Raises ValueError on another M."""
        if prefs.shape != (len(prompt), self.levels):
            raise ValueError(f"{type(self).__name__}: prefs {tuple(prefs.shape)} for prompt "
                             f"{tuple(prompt.shape)}: need (B, M) = {(len(prompt), self.levels)}")
        table = self.preference.weight.unflatten(0, (self.levels, self.codes))  # (M, K, D)
        level = torch.arange(self.levels, device=prefs.device)
        tastes = table[level, prefs.clamp(min=0)]  # (B, M, D)
        tastes = torch.where(prefs[..., None] < 0, self.null, tastes)
        return self.words(prompt), tastes, F.pad(prompt != 0, (0, self.levels), value=True)


@contextlib.contextmanager
def table_as(generator: Conditioned, table: Tensor):
    """Within the block, the generator's preference-token table holds `table` (R, D): the starting
    tokens, for the KL."""
    weight = generator.preference.weight
    current, weight.data = weight.data, table
    try:
        yield
    finally:
        weight.data = current


def drop_preferences(prefs: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """prefs (B, M) with all tokens of a row null (-1) at probability `rate`, so that one generator
    learns both branches of guidance (Ho & Salimans 2207.12598v1, Algorithm 1)."""
    drop = torch.rand(len(prefs), 1, generator=generator, device=prefs.device) < rate
    return prefs.masked_fill(drop, -1)


def _at_least_fp32(x: Tensor) -> Tensor:
    """Sums and log-probabilities want fp32, whatever autocast gave; fp64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """softmax(q k / sqrt(size)) v over the visible keys (1706.03762v7, Sec. 3.2).
    query (B, heads, T, size), key, value (B, heads, S, size), visible bool, broadcast to
    (B, heads, T, S) -> (B, heads, T, size). On the CPU in fp32 even under autocast: for heads as
    narrow as these, torch's bf16 kernel is slow there."""
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    inputs = (_at_least_fp32(x) for x in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(*inputs, attn_mask=visible).to(query.dtype)


# Text: decoder ------------------------------------------------------------------------------------

class Block(nn.Module):
    """Pre-norm transformer block, attention and MLP side by side (as PaLM, 2204.02311v5, Sec. 2):
        [query, key, value, hidden] = W_in norm(x)
        x + W_out [attention(query, key, value); silu(hidden)]
    No biases. One key and one value serve all heads (multi-query attention, 1911.02150v1)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.sizes = width, 2 * (width // heads), 4 * width  # query; key and value; hidden
        self.norm = nn.LayerNorm(width, bias=False)
        self.expand = nn.Linear(width, sum(self.sizes), bias=False)  # W_in
        self.contract = nn.Linear(5 * width, width, bias=False)  # W_out

    def forward(self, x: Tensor, visible: Tensor,
                past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> x (B, T, D), and the keys and values (B, S, 2 D / heads) of all positions
        so far: `past`, what this block returned last time, and those of x. visible (B, T, S) bool:
        which of them each position of x sees."""
        query, memory, hidden = self.expand(self.norm(x)).split(self.sizes, dim=-1)
        if past is not None:
            memory = torch.cat([past, memory], dim=1)
        key, value = memory[:, None].chunk(2, dim=-1)  # (B, 1, S, D / heads)
        # heads share keys, so they can queue up as if they were more positions
        query = query.unflatten(2, (self.heads, -1)).flatten(1, 2)[:, None]
        visible = visible.repeat_interleave(self.heads, dim=1)[:, None]  # (B, 1, T heads, S)
        mixed = attention(query, key, value, visible).reshape(x.shape)
        return x + self.contract(torch.cat([mixed, F.silu(hidden)], dim=-1)), memory


class TextDecoder(Conditioned):
    """GPT-style decoder p(y | prompt words, preference tokens); the condition is a prefix of the
    sequence:   [c_1 .. c_P ; k_1 .. k_M ; BOS y_1 .. y_T-1]  ->  logits of y_1 .. y_T
    The prefix sees all of itself (a prefix language model, 1910.10683v4 Sec. 3.2.1), text sees the
    prefix and the text before it. Input and output embedding are one matrix (1608.05859v3)."""

    def __init__(self, cfg: TextConfig, n_words: int, levels: int, codes: int):
        super().__init__(cfg.width, n_words, levels, codes)
        self.cfg = cfg
        self.tokens = nn.Embedding(cfg.vocab_size, cfg.width)
        self.position = nn.Parameter(torch.empty(cfg.context, cfg.width))
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # as GPT-2: smaller where it adds to the residual stream
                shrink = math.sqrt(2 * cfg.layers) if name.endswith("contract.weight") else 1
                nn.init.normal_(parameter, std=0.02 / shrink)

    def transform(self, x: Tensor, visible: Tensor,
                  past: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """x (B, T, D) after all blocks, and the `past` of each for the positions that follow."""
        memories = []
        for block, own in zip(self.blocks, past or [None] * len(self.blocks)):
            x, memory = block(x, visible, own)
            memories.append(memory)
        return x, memories

    def logits(self, x: Tensor) -> Tensor:
        """(B, T, D) -> logits (B, T, V) of the tokens that come next."""
        return F.linear(self.norm(x), self.tokens.weight)

    def forward(self, tokens: Tensor, prompt: Tensor, prefs: Tensor) -> Tensor:
        """Logits (B, T, V) of y_1..y_T for tokens (B, T) = y_1..y_T, prompt (B, P), prefs (B, M),
        all int64, prefs -1 null. Raises ValueError if T > context."""
        length, context = tokens.shape[1], self.cfg.context
        if length > context:
            raise ValueError(f"TextDecoder: text of {length} tokens, but TextConfig.context="
                             f"{context}; cut it with Tokenizer.encode_batch(texts, context)")
        words, tastes, present = self.embed(prompt, prefs)
        n_prefix = present.shape[1]
        before = F.pad(tokens, (1, 0), value=BOS)[:, :length]  # BOS y_1 .. y_T-1
        text = self.tokens(before) + self.position[:length]
        x = torch.cat([words, tastes, text], dim=1)  # (B, S, D)
        visible = present.new_ones(x.shape[1], x.shape[1]).tril()
        visible[:, :n_prefix] = True
        visible = visible & F.pad(present, (0, length), value=True)[:, None]  # (B, S, S)
        x, _ = self.transform(x, visible)
        return self.logits(x[:, n_prefix:])

    def loss(self, tokens: Tensor, prompt: Tensor, prefs: Tensor) -> Tensor:
        """() mean nats per token of tokens (B, T): EOS counts, PAD does not."""
        logits = self(tokens, prompt, prefs)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=PAD)

    def start(self, prompt: Tensor, prefs: Tensor) -> tuple[list[Tensor], Tensor]:
        """Begin to decode: the blocks' memories of the prefix, and `present` (B, P + M) bool."""
        words, tastes, present = self.embed(prompt, prefs)
        x = torch.cat([words, tastes], dim=1)  # (B, P + M, D)
        visible = present[:, None].expand(-1, x.shape[1], -1)
        _, past = self.transform(x, visible)
        return past, present

    def step(self, token: Tensor, t: int, past: list[Tensor],
             present: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, V) of y_t+1 given token (B, 1) = y_t, BOS for t = 0, and the memories that the
        next step needs; past: those of the positions before, present: as `start` gave it."""
        x = self.tokens(token) + self.position[t]  # (B, 1, D)
        visible = F.pad(present, (0, t + 1), value=True)[:, None]  # (B, 1, P + M + t + 1)
        x, past = self.transform(x, visible, past)
        return self.logits(x)[:, 0], past


# Text: sampling -----------------------------------------------------------------------------------

def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """(..., V) bool: the likeliest tokens, as few as reach probability top_p together; ties are in
    or out together (Holtzman et al. 1904.09751v2, Sec. 3.1). logits (..., V)."""
    p = logits.detach().softmax(-1)
    if p.device.type == "cpu":  # numpy sorts 20 times as fast there as torch
        rising = torch.from_numpy(np.sort(p.numpy(), axis=-1))
    else:
        rising = p.sort(-1).values
    falling = rising.flip(-1)
    before = falling.cumsum(-1) - falling  # probability of those in front
    least = falling.masked_fill(before >= top_p, torch.inf).amin(-1, keepdim=True)
    return p >= least


def sampling_logits(cond: Tensor, null: Tensor | None, cfg: TextConfig,
                    keep: Tensor | None = None) -> Tensor:
    """Log-probabilities (..., V) of the tokens that sampling chooses from, at least fp32:
        log softmax((null + w (cond - null)) / temperature) over the nucleus
    cond, null (..., V): logits with and without preferences; null None: unguided. PAD and BOS have
    probability 0. The nucleus, a constant to the gradient, is that of w = 1 where w is larger:
    guidance amplifies the noise in the logits of tokens that neither branch believes in.
    keep (...) int64: tokens that have been sampled, so that rounding cannot put them outside."""
    cond = _at_least_fp32(cond[..., EOS:])
    null = cond if null is None else _at_least_fp32(null[..., EOS:])
    scores = torch.lerp(null, cond, cfg.guidance) / max(cfg.temperature, 1e-6)
    if cfg.top_p < 1:
        inside = nucleus(torch.lerp(null, cond, min(cfg.guidance, 1.0)), cfg.top_p)
        if keep is not None:
            inside = inside.scatter(-1, (keep - EOS).clamp(min=0)[..., None], True)
        scores = scores.masked_fill(~inside, -torch.inf)
    return F.pad(scores.log_softmax(-1), (EOS, 0), value=-torch.inf)


@torch.no_grad()
def sample_text(decoder: TextDecoder, prompt: Tensor, prefs: Tensor,
                generator: torch.Generator | None = None, max_len: int | None = None) -> Tensor:
    """A text for each row of prompt (B, P) and prefs (B, M) int64, -1 null: tokens (B, T), PAD
    after EOS; T = max_len, by default the decoder's context. Guidance, temperature and nucleus are
    those of decoder.cfg. The generator advances by the same amount whatever is sampled."""
    cfg, batch, guided = decoder.cfg, len(prompt), decoder.cfg.guidance != 1
    max_len = max_len or cfg.context
    uniform = torch.rand(max_len, batch, 1, generator=generator, device=prompt.device)
    if guided:  # both branches as one batch of 2 B rows
        prompt, prefs = prompt.repeat(2, 1), torch.cat([prefs, torch.full_like(prefs, -1)])
    past, present = decoder.start(prompt, prefs)
    tokens = prompt.new_full((batch, 1), BOS)
    # Have all texts ended? The device writes the answer when it gets there: nobody waits for it.
    ended = torch.tensor(False, pin_memory=prompt.is_cuda)
    for t in range(max_len):
        if t and t % 8 == 0:
            ended.copy_((tokens == EOS).any(1).all(), non_blocking=True)
        if ended:
            break
        logits, past = decoder.step(tokens[:, -1:].repeat(1 + guided, 1), t, past, present)
        cond, null = logits.chunk(2) if guided else (logits, None)
        cdf = sampling_logits(cond, null, cfg).exp().cumsum(-1)  # (B, V)
        choice = torch.searchsorted(cdf, uniform[t] * cdf[:, -1:], right=True)  # (B, 1)
        choice = choice.clamp(max=cfg.vocab_size - 1)  # logits of NaN find none
        tokens = torch.cat([tokens, choice], dim=1)
    ends = (tokens == EOS).long()
    tokens = tokens.masked_fill(ends.cumsum(1) > ends, PAD)  # what an ended text went on with
    return F.pad(tokens, (0, max_len + 1 - tokens.shape[1]), value=PAD)[:, 1:]


def text_log_prob(cond: Tensor, null: Tensor | None, tokens: Tensor, cfg: TextConfig) -> Tensor:
    """(B,) nats, differentiable: the log-probability with which sample_text draws tokens (B, T).
    cond, null (B, T, V): the decoder's logits of the tokens, with and without preferences; null
    None: unguided."""
    log_p = sampling_logits(cond, null, cfg, keep=tokens)  # (B, T, V)
    taken = log_p.gather(-1, tokens[..., None])[..., 0]  # (B, T)
    return taken.masked_fill(tokens == PAD, 0.0).sum(-1)


# Images: autoencoder ------------------------------------------------------------------------------

def _zeroed(layer: nn.Module) -> nn.Module:
    """The layer with weight and bias 0: what it adds to starts unchanged."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResidualBlock(nn.Module):
    """x + conv(silu(FiLM(norm(conv(silu(norm x)))))) on (B, C, h, w); FiLM: h (1 + a) + b, (a, b)
    linear in the condition (B, cond) (1709.07871). The last convolution starts at 0: the block
    starts as the identity."""

    def __init__(self, width: int, cond: int = 0):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = _zeroed(nn.Conv2d(width, width, 3, padding=1))
        self.film = nn.Linear(cond, 2 * width) if cond else None

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """x (B, C, h, w), cond (B, cond) -> (B, C, h, w)."""
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.film is not None:
            scale, shift = self.film(cond)[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return x + self.conv2(F.silu(h))


class Autoencoder(nn.Module):
    """Pictures (B, 3, H, H) in [-1, 1] <-> latents (B, C, H/4, H/4): strided convolutions in,
    PixelShuffle (1609.05158) out. Trained as a VAE with a small KL; afterwards the latent is its
    mean, scaled per channel to mean 0, std 1 over the catalogue by the buffers mean and std
    (`standardize`): the denoiser's unit."""

    def __init__(self, cfg: ImageConfig):
        super().__init__()
        w, c = cfg.ae_width, cfg.latent
        self.size = cfg.size
        self.encoder = nn.Sequential(
            nn.Conv2d(3, w // 2, 4, stride=2, padding=1), nn.SiLU(),  # (B, w/2, H/2, H/2)
            nn.Conv2d(w // 2, w, 4, stride=2, padding=1), ResidualBlock(w),
            nn.GroupNorm(8, w), nn.SiLU(), nn.Conv2d(w, 2 * c, 3, padding=1))  # (B, 2 C, H/4, H/4)
        self.decoder = nn.Sequential(
            nn.Conv2d(c, w, 3, padding=1), ResidualBlock(w), ResidualBlock(w),
            nn.GroupNorm(8, w), nn.SiLU(),
            nn.Conv2d(w, 2 * w, 3, padding=1), nn.PixelShuffle(2), nn.SiLU(),  # (B, w/2, H/2, H/2)
            nn.Conv2d(w // 2, 12, 3, padding=1), nn.PixelShuffle(2))  # (B, 3, H, H)
        self.register_buffer("mean", torch.zeros(1, c, 1, 1))
        self.register_buffer("std", torch.ones(1, c, 1, 1))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (B, C, H/4, H/4) of q(z | x) = N, before standardization, for
        pictures (B, 3, H, H) in [-1, 1]. Raises ValueError on another size."""
        if x.shape[1:] != (3, self.size, self.size):
            raise ValueError(f"Autoencoder: pictures {tuple(x.shape)}: need (B, 3, H, H) with "
                             f"H = ImageConfig.size = {self.size}; resize them")
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        return mean, log_var.clamp(-12, 4)

    def encode(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, H) -> standardized latents (B, C, H/4, H/4), the posterior's mean."""
        mean, _ = self.posterior(x)
        return (mean - self.mean) / self.std

    def decode(self, z: Tensor) -> Tensor:
        """Standardized latents (B, C, H/4, H/4) -> pictures (B, 3, H, H), about in [-1, 1]; not
        clipped."""
        return self.decoder(z * self.std + self.mean)

    def loss(self, x: Tensor, kl: float, generator: torch.Generator | None = None) -> Tensor:
        """() mean |x - y| + mean (x - y)^2 + kl mean KL[q(z | x) || N(0, 1)], y decoded from one
        z ~ q(z | x) (1312.6114v11, Eq. 10). x (B, 3, H, H). Raises ValueError on another size."""
        mean, log_var = self.posterior(x)
        noise = torch.randn(mean.shape, generator=generator, device=x.device, dtype=x.dtype)
        error = self.decoder(mean + (log_var / 2).exp() * noise) - x
        divergence = (mean.square() + log_var.exp() - 1 - log_var).mean() / 2
        return error.abs().mean() + error.square().mean() + kl * divergence

    @torch.no_grad()
    def standardize(self, z: Tensor):
        """Set mean and std so that pictures whose latents were z (I, C, h, h), by encode before
        this call, get mean 0, std 1 per channel by encode after it; what decode makes of them
        stays."""
        self.mean += self.std * z.mean((0, 2, 3), keepdim=True)
        self.std *= z.std((0, 2, 3), keepdim=True).clamp(min=1e-6)


# Images: denoiser ---------------------------------------------------------------------------------

class CrossAttention(nn.Module):
    """x + attention from each place of x (B, C, h, w) to N condition tokens; the last convolution
    starts at 0: the block starts as the identity."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, width)
        self.query, self.out = nn.Conv2d(width, width, 1), _zeroed(nn.Conv2d(width, width, 1))
        self.key_value = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, tokens: Tensor, present: Tensor) -> Tensor:
        """x (B, C, h, w), tokens (B, N, C), present (B, N) bool -> (B, C, h, w)."""
        query = self.query(self.norm(x)).unflatten(1, (self.heads, -1)).flatten(3)
        memory = self.key_value(tokens).unflatten(2, (2, self.heads, -1))
        key, value = memory.permute(2, 0, 3, 1, 4)  # (B, heads, N, C/heads)
        mixed = attention(query.mT.contiguous(), key, value, present[:, None, None])
        return x + self.out(mixed.transpose(2, 3).reshape(x.shape))


def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    """z_t = alpha z_0 + sigma eps at time t in [0, 1]: (cos, sin)(pi t / 2), so that
    alpha^2 + sigma^2 = 1 (variance preserving, cosine schedule: 2102.09672v1, Eq. 17 with s = 0).
    alpha_bar of DDPM is alpha^2."""
    angle = t * (math.pi / 2)
    return angle.cos(), angle.sin()


def time_features(t: Tensor, width: int) -> Tensor:
    """t (B,) in [0, 1] -> (B, width): sines and cosines at frequencies 1..1,000 (1706.03762v7,
    Sec. 3.5)."""
    exponent = torch.linspace(0, math.log(1000), width // 2, device=t.device, dtype=t.dtype)
    angle = t[:, None] * exponent.exp()
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Denoiser(Conditioned):
    """Conditional U-Net v(z_t, t, prompt words, preference tokens) on latents: two resolutions; the
    condition enters twice: pooled, with the time, by FiLM everywhere, and token by token by
    attention at the lower one."""

    def __init__(self, cfg: ImageConfig, n_words: int, levels: int, codes: int):
        w, d = cfg.width, 2 * cfg.width
        super().__init__(d, n_words, levels, codes)
        self.cfg = cfg
        self.time = nn.Sequential(nn.Linear(64, d), nn.SiLU(), nn.Linear(d, d))
        self.pool = nn.Linear((1 + levels) * d, d)
        self.conv_in = nn.Conv2d(cfg.latent, w, 3, padding=1)
        self.down = nn.ModuleList(ResidualBlock(w, d) for _ in range(cfg.layers))
        self.shrink = nn.Conv2d(w, d, 3, stride=2, padding=1)
        self.middle = nn.ModuleList(ResidualBlock(d, d) for _ in range(cfg.layers + 1))
        self.attend = nn.ModuleList(CrossAttention(d, cfg.heads) for _ in range(cfg.layers + 1))
        self.grow = nn.Sequential(nn.Conv2d(d, 4 * w, 1), nn.PixelShuffle(2))
        self.merge = nn.Conv2d(2 * w, w, 1)
        self.up = nn.ModuleList(ResidualBlock(w, d) for _ in range(cfg.layers))
        last = _zeroed(nn.Conv2d(w, cfg.latent, 3, padding=1))  # v starts at 0, loss at 1
        self.out = nn.Sequential(nn.GroupNorm(8, w), nn.SiLU(), last)

    def condition(self, prompt: Tensor, prefs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Condition tokens (B, P + M, D), which of them are present (B, P + M) bool, and all of
        them pooled (B, D). prompt (B, P), prefs (B, M) int64."""
        words, tastes, present = self.embed(prompt, prefs)
        written = (prompt != 0)[..., None]  # (B, P, 1)
        topic = (words * written).sum(1) / written.sum(1).clamp(min=1)  # (B, D)
        pooled = self.pool(torch.cat([topic, tastes.flatten(1)], dim=1))
        return torch.cat([words, tastes], dim=1), present, pooled

    def forward(self, z: Tensor, t: Tensor, prompt: Tensor, prefs: Tensor) -> Tensor:
        """v (B, C, h, h) for z (B, C, h, h) at times t (B,) in [0, 1]; prompt (B, P), prefs (B, M)
        int64, -1 null."""
        tokens, present, pooled = self.condition(prompt, prefs)
        cond = F.silu(self.time(time_features(t, 64)) + pooled)  # (B, D)
        h = self.conv_in(z)  # (B, D/2, h, h)
        for block in self.down:
            h = block(h, cond)
        skip, h = h, self.shrink(h)  # (B, D, h/2, h/2)
        for block, attend in zip(self.middle, self.attend):
            h = attend(block(h, cond), tokens, present)
        h = self.merge(torch.cat([skip, self.grow(h)], dim=1))  # (B, D/2, h, h)
        for block in self.up:
            h = block(h, cond)
        return self.out(h)

    def loss(self, z: Tensor, prompt: Tensor, prefs: Tensor,
             generator: torch.Generator | None = None) -> Tensor:
        """() mean squared error of v = alpha eps - sigma z (2202.00512v2, Appendix D) at
        logit-normal times t = sigmoid(N(time_mean, time_std^2)) (2403.03206v1, Sec. 3.1).
        z (B, C, h, h) clean standardized latents, prompt (B, P), prefs (B, M)."""
        u = torch.randn(len(z), generator=generator, device=z.device, dtype=z.dtype)
        eps = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        t = (self.cfg.time_mean + self.cfg.time_std * u).sigmoid()
        alpha, sigma = (x[:, None, None, None] for x in alpha_sigma(t))
        v = self(alpha * z + sigma * eps, t, prompt, prefs)
        return F.mse_loss(v, alpha * eps - sigma * z)

    def noise(self, n: int, generator: torch.Generator | None) -> Tensor:
        """(n, C, h, h) standard normal, on the network's device: where sampling starts."""
        weight, side = self.conv_in.weight, self.cfg.size // 4
        return torch.randn(n, self.cfg.latent, side, side, generator=generator,
                           device=weight.device, dtype=weight.dtype)


# Images: diffusion --------------------------------------------------------------------------------

T_MAX = 0.98    # sampling starts here, not at 1: there z_t tells nothing, and training rarely goes


def sampling_times(steps: int) -> list[float]:
    """steps + 1 times from T_MAX down to exactly 0, evenly."""
    return [T_MAX * (steps - k) / steps for k in range(steps + 1)]


def guidance_at(t: float, cfg: ImageConfig) -> float:
    """The weight w of guidance for a step that starts at time t.
    DEVIATION 17: guidance ends at cfg.guidance_until (2404.07724v2): what is left are details;
    unguided, late steps cost half."""
    return cfg.guidance if t > cfg.guidance_until else min(cfg.guidance, 1.0)


def guided_v(denoiser: Denoiser, z: Tensor, t: float, prompt: Tensor, prefs: Tensor,
             guidance: float) -> Tensor:
    """v(null) + w (v(prefs) - v(null)), fp32 or better (2207.12598v1, Eq. 6, on v and with w for
    its 1 + w; the prompt is in both). z (B, C, h, h) at time t -> (B, C, h, h). At w = 1 the null
    branch is skipped, else both run as one batch; but with gradient on, the null branch runs apart
    and without it: what REINFORCE changes is not in it."""
    null, times = torch.full_like(prefs, -1), z.new_full((len(z),), t)
    if guidance == 1:
        return _at_least_fp32(denoiser(z, times, prompt, prefs))
    if torch.is_grad_enabled():
        v = denoiser(z, times, prompt, prefs)
        with torch.no_grad():
            v_null = denoiser(z, times, prompt, null)
    else:
        both = ((z, z), (times, times), (prompt, prompt), (prefs, null))
        v, v_null = denoiser(*(torch.cat(pair) for pair in both)).chunk(2)
    return torch.lerp(_at_least_fp32(v_null), _at_least_fp32(v), guidance)


def ddim_step(z: Tensor, v: Tensor, t: float, s: float, eta: float) -> tuple[Tensor, Tensor]:
    """One step of DDIM from time t to s < t: N(mean, std^2) of z_s given z_t = z.
        z_0 = alpha_t z - sigma_t v,  eps = sigma_t z + alpha_t v
        std = eta sigma_s / sigma_t sqrt(1 - alpha_t^2 / alpha_s^2)     2010.02502v4, Eq. 16
        mean = alpha_s z_0 + sqrt(sigma_s^2 - std^2) eps                2010.02502v4, Eq. 12
    z, v (B, C, h, h) -> mean (B, C, h, h), std () >= 0, which is 0 at s = 0."""
    (alpha, sigma), (alpha_s, sigma_s) = (alpha_sigma(z.new_full((), time)) for time in (t, s))
    std = eta * sigma_s / sigma * (1 - (alpha / alpha_s).square()).clamp(min=0).sqrt()
    clean, eps = alpha * z - sigma * v, sigma * z + alpha * v
    return alpha_s * clean + (sigma_s.square() - std.square()).clamp(min=0).sqrt() * eps, std


@torch.no_grad()
def denoise(denoiser: Denoiser, z: Tensor, times: Sequence[float], prompt: Tensor, prefs: Tensor,
            generator: torch.Generator | None = None) -> Tensor:
    """z (B, C, h, h) at times[-1], drawn by steps of DDIM from z at times[0]. prompt (B, P),
    prefs (B, M) int64, -1 null; guidance and eta as in denoiser.cfg."""
    cfg = denoiser.cfg
    for t, s in pairwise(times):
        v = guided_v(denoiser, z, t, prompt, prefs, guidance_at(t, cfg))
        mean, std = ddim_step(z, v, t, s, cfg.eta)
        noise = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        z = mean + std * noise
    return z


def sample_latents(denoiser: Denoiser, prompt: Tensor, prefs: Tensor,
                   generator: torch.Generator | None = None, steps: int | None = None) -> Tensor:
    """A standardized latent for each row of prompt (B, P) and prefs (B, M) int64, -1 null:
    (B, C, h, h), by `steps` of DDIM (by default cfg.sampling_steps) from noise."""
    z = denoiser.noise(len(prompt), generator)
    times = sampling_times(steps or denoiser.cfg.sampling_steps)
    return denoise(denoiser, z, times, prompt, prefs, generator)


if __name__ == "__main__":
    from tests.demo import generators; generators()
