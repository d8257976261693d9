"""The two generators, given prompt words c and a user's preference tokens k: text by a GPT, pictures by latent diffusion.

    c, k -> a vector for each word and token, a learnt one for k = null                     Conditioned
    p(y | c, k) = prod_t p(y_t | y_<t, c, k)                                                TextDecoder
    y_t ~ softmax((l(null) + w (l(k) - l(null))) / temperature), restricted to a nucleus    sampling_logits, sample_text
    picture <-> z_0                                                                         Autoencoder
    z_t = alpha_t z_0 + sigma_t eps;  v(z_t, t, c, k) ~ alpha_t eps - sigma_t z_0           Denoiser
    z_s ~ N(mean(z_t, v(null) + w (v(k) - v(null))), std^2), from t = T_MAX down to 0       ddim_step, sample_latents

Shapes: B batch, P prompt words, M = L preference tokens, K codes, T text length, V vocabulary, D width, C channels of the
latent, H picture side, h = H / 4, S diffusion steps."""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD, BOS, EOS = 0, 1, 2     # special tokens: no text encodes to them
FIRST_MERGE = 3 + 256       # ids: 3 specials, 256 bytes, then one id per merge


@dataclass(frozen=True)
class TextConfig:
    layers: int = 4               # transformer blocks
    width: int = 128              # D, width of the residual stream
    heads: int = 4                # attention heads; must divide width
    context: int = 48             # longest text, tokens with the end token; longer texts are cut
    vocab_size: int = 512         # V: 3 special tokens + 256 bytes + merges
    null_rate: float = 0.15       # share of texts trained with null preferences, for guidance (2207.12598)
    guidance: float = 3.0         # w: 0 ignores the preference tokens, 1 is as trained (2207.12598)
    temperature: float = 1.0      # of sampling; 0 is greedy
    top_p: float = 0.95           # probability mass of the nucleus sampled from; 1 is all (1904.09751)
    lr: float = 2e-3              # peak learning rate (AdamW), after a warm-up; falling to 0
    weight_decay: float = 0.1     # AdamW, on matrices only
    batch: int = 64               # texts a step
    steps: int = 800              # optimizer steps


# Tokenizer --------------------------------------------------------------------------------------------------

# Runs of letters, digits or other signs, each with the one space before it, as GPT-2's; every character is in
# exactly one run. A run ends after 32 characters: one endless "word" takes linear and not quadratic time.
PRETOKEN = re.compile(r" ?[^\W\d_]{1,32}| ?\d{1,32}| ?(?:[^\w\s]|_){1,32}|\s{1,32}(?!\S)|\s")


def _merge(ids: Sequence[int], pair: tuple[int, int], new: int) -> list[int]:
    """ids with each occurrence of the pair, from the left, replaced by new."""
    merged, i = [], 0
    while i < len(ids):
        hit = i + 1 < len(ids) and ids[i] == pair[0] and ids[i + 1] == pair[1]
        merged.append(new if hit else ids[i])
        i += 2 if hit else 1
    return merged


def _learn_merges(words: dict[str, int], n_merges: int) -> list[tuple[int, int]]:
    """The n_merges most frequent pairs, one after the other, each counted after the merges before it.
    words: how often each pretoken occurs. Ties go to the smaller ids: the texts' order is moot."""
    segmented = {tuple(3 + byte for byte in word.encode()): n for word, n in words.items()}
    merges = []
    for new in range(FIRST_MERGE, FIRST_MERGE + n_merges):
        count = Counter()
        for ids, n in segmented.items():
            for pair in pairwise(ids):
                count[pair] += n
        best = min(count, key=lambda pair: (-count[pair], pair), default=None)
        if best is None or count[best] < 2:         # a pair seen once: nothing to gain
            break
        merges.append(best)
        segmented = {tuple(_merge(ids, best, new)): n for ids, n in segmented.items()}
    return merges


class Tokenizer:
    """Byte-level BPE (Sennrich et al. 1508.07909v5, Sec. 3.2; on UTF-8 bytes as GPT-2): any text round-trips.
    merges: pairs of ids in the order learnt; the r-th makes id FIRST_MERGE + r. See `train`, `from_state`.
    Raises ValueError if a merge refers to an id that does not exist before it."""

    def __init__(self, merges: Sequence[tuple[int, int]]):
        self.merges = {pair: FIRST_MERGE + rank for rank, pair in enumerate(merges)}
        self.pieces = [b""] * 3 + [bytes([byte]) for byte in range(256)]        # id -> bytes
        for rank, (left, right) in enumerate(merges):
            if not (3 <= min(left, right) and max(left, right) < FIRST_MERGE + rank):
                raise ValueError(f"Tokenizer: merge {rank} joins ids {left} and {right}: need 3 <= id < "
                                 f"{FIRST_MERGE + rank}; pass what Tokenizer.state() returned")
            self.pieces.append(self.pieces[left] + self.pieces[right])
        self._memo: dict[str, list[int]] = {}       # pretoken -> ids

    @property
    def vocab_size(self) -> int:
        """V: 3 specials, 256 bytes, merges; less than `train` was asked for if the texts ran out of pairs."""
        return len(self.pieces)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn vocab_size - 259 merges at most from the texts; the same merges for any order of the texts.
        Raises ValueError if vocab_size leaves no room for the 3 special tokens and 256 bytes."""
        if vocab_size < FIRST_MERGE:
            raise ValueError(f"Tokenizer.train: vocab_size={vocab_size}: need vocab_size >= {FIRST_MERGE}, "
                             "3 specials and 256 bytes")
        words = Counter(word for text in texts for word in PRETOKEN.findall(text))
        return cls(_learn_merges(words, vocab_size - FIRST_MERGE))

    def encode(self, text: str) -> list[int]:
        """Ids in [3, V) of the text, without specials: in each pretoken the earliest learnt merge first."""
        return [token for word in PRETOKEN.findall(text) for token in self._encode_word(word)]

    def _encode_word(self, word: str) -> list[int]:
        if word not in self._memo:
            ids = [3 + byte for byte in word.encode()]
            while len(ids) > 1:
                pair = min(pairwise(ids), key=lambda pair: self.merges.get(pair, math.inf))
                if pair not in self.merges:
                    break
                ids = _merge(ids, pair, self.merges[pair])
            self._memo[word] = ids
        return self._memo[word]

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first EOS; bytes that are not UTF-8, which sampling may produce, become U+FFFD.
        Raises ValueError on an id outside the vocabulary."""
        pieces = []
        for token in ids:
            if token == EOS:
                break
            if not 0 <= token < len(self.pieces):
                raise ValueError(f"Tokenizer.decode: token {token}: need 0 <= token < {len(self.pieces)}; "
                                 "the decoder's vocab_size must be the tokenizer's")
            pieces.append(self.pieces[token])
        return b"".join(pieces).decode(errors="replace")

    def encode_batch(self, texts: Sequence[str], length: int) -> tuple[Tensor, int]:
        """(tokens (B, T) int64: text, EOS, PAD ..; number of texts cut), T the longest row, at most `length`.
        A text that is cut has no EOS: the decoder must not learn to stop in the middle of it."""
        rows = [self.encode(text) + [EOS] for text in texts]
        n_cut = sum(len(row) > length for row in rows)
        width = min(length, max(map(len, rows), default=0))
        padded = [row[:width] + [PAD] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), width), n_cut

    def decode_batch(self, tokens: Tensor) -> list[str]:
        """Texts of tokens (B, T), each up to its EOS."""
        return [self.decode(row) for row in tokens.tolist()]

    def state(self) -> Tensor:
        """(n, 2) int64: the merges in order, for the checkpoint."""
        return torch.tensor(list(self.merges), dtype=torch.int64).reshape(-1, 2)

    @classmethod
    def from_state(cls, state: Tensor) -> "Tokenizer":
        """The tokenizer whose `state` this is. Raises ValueError on anything else."""
        if state.ndim != 2 or state.shape[1] != 2 or state.is_floating_point():
            raise ValueError(f"Tokenizer.from_state: {state.dtype} {tuple(state.shape)}: need int64 (n, 2)")
        return cls([(left, right) for left, right in state.tolist()])


def _at_least_fp32(x: Tensor) -> Tensor:
    """Sums and log-probabilities want fp32, whatever autocast gave; fp64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Condition --------------------------------------------------------------------------------------------------

def _check_ids(name: str, ids: Tensor, low: int, high: int, bound: str) -> None:
    """ValueError unless low <= ids < high. CPU only: elsewhere it is a host sync, and kernels assert it."""
    if ids.device.type == "cpu" and ids.numel():
        least, most = torch.aminmax(ids)
        if least < low or most >= high:
            raise ValueError(f"{name} holds ids in [{int(least)}, {int(most)}]: need {low} <= id < {high} = {bound}")


class Conditioned(nn.Module):
    """What both generators are told, as vectors: prompt words and a user's preference tokens.
    `preference`, row level * K + code, is the table of preference tokens, all that REINFORCE changes; `null`
    (M, D) stands in for -1: unpersonalized. A prompt is a set: words carry no position, and 0 is padding.
    n_words: prompt words have ids 1..n_words; levels, codes: M, K. Raises ValueError if one is < 1."""

    def __init__(self, width: int, n_words: int, levels: int, codes: int):
        super().__init__()
        if min(n_words, levels, codes) < 1:
            raise ValueError(f"{type(self).__name__}: n_words={n_words}, levels={levels}, codes={codes}: need each >= 1")
        self.levels, self.codes = levels, codes
        self.words = nn.Embedding(n_words + 1, width)
        self.preference = nn.Embedding(levels * codes, width)
        self.null = nn.Parameter(torch.empty(levels, width))

    def embed(self, prompt: Tensor, prefs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Word vectors (B, P, D), preference vectors (B, M, D), and which of both are no padding (B, P + M) bool.
        prompt (B, P), prefs (B, M) int64 or None: all null. Raises ValueError on a wrong shape or, on the CPU, an
        id out of range."""
        name = type(self).__name__
        _check_ids(f"{name}: prompt", prompt, 0, self.words.num_embeddings, "n_words + 1")
        tastes = self.null.expand(len(prompt), -1, -1)                      # (B, M, D)
        if prefs is not None:
            if prefs.shape != tastes.shape[:2]:
                raise ValueError(f"{name}: prefs {tuple(prefs.shape)} for prompt {tuple(prompt.shape)}: "
                                 f"need (B, M) = {tuple(tastes.shape[:2])}")
            _check_ids(f"{name}: prefs", prefs, -1, self.codes, "codes")
            row = prefs.clamp(min=0) + self.codes * torch.arange(self.levels, device=prefs.device)  # (B, M)
            tastes = torch.where(prefs[..., None] < 0, tastes, self.preference(row))
        return self.words(prompt), tastes, F.pad(prompt != 0, (0, self.levels), value=True)


@contextlib.contextmanager
def table_as(generator: Conditioned, table: Tensor):
    """Within the block, the generator's preference-token table holds `table` (the starting tokens, for the KL)."""
    weight = generator.preference.weight
    current, weight.data = weight.data, table
    try:
        yield
    finally:
        weight.data = current


def attention_bias(visible: Tensor, like: Tensor) -> Tensor:
    """What attention adds to its logits: 0 where visible (bool, any shape), else -inf; in like's dtype, at least fp32."""
    return _at_least_fp32(like.new_zeros(())).masked_fill(~visible, -torch.inf)


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k / sqrt(size) + bias) v (1706.03762v7, Sec. 3.2). On the CPU in fp32 or better even under autocast:
    torch's bf16 kernel takes 17 times as long there for heads as narrow as these."""
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
    dtype, inputs = query.dtype, (_at_least_fp32(x) for x in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(*inputs, attn_mask=bias).to(dtype)


def drop_preferences(prefs: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """prefs (B, M) with all tokens of a row null (-1) at probability `rate`, so that one generator learns both
    branches of guidance (Ho & Salimans 2207.12598v1, Algorithm 1)."""
    drop = torch.rand(len(prefs), 1, generator=generator, device=prefs.device) < rate
    return prefs.masked_fill(drop, -1)


# Decoder ----------------------------------------------------------------------------------------------------

class Block(nn.Module):
    """Pre-norm transformer block, attention and MLP side by side: x + W_out [attention; silu(hidden)], all of [query, key,
    value, hidden] = W_in norm(x) (as PaLM, 2204.02311v5, Sec. 2): two matrix products where GPT-2 has four. No biases,
    SiLU (half of GELU's time on the CPU), one key and one value for all heads (multi-query attention, Shazeer
    1911.02150v1): the cache is `heads` times smaller, sampling 1.6 times as fast, the loss equal."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.sizes = width, 2 * (width // heads), 4 * width                 # query; key and value; hidden
        self.norm = nn.LayerNorm(width, bias=False)
        self.expand = nn.Linear(width, sum(self.sizes), bias=False)         # W_in
        self.contract = nn.Linear(5 * width, width, bias=False)             # W_out

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> x (B, T, D) after it, its keys and values (B, T, 2 D / heads), which decoding keeps.
        bias (B, 1, T heads or 1, T): 0 for the keys that a query sees, else -inf."""
        batch, length, width = x.shape
        query, memory, hidden = self.expand(self.norm(x)).split(self.sizes, dim=-1)
        query = query.reshape(batch, 1, length * self.heads, width // self.heads)       # heads queue up as positions
        key, value = memory[:, None].chunk(2, dim=-1)                       # (B, 1, T, D / heads)
        mixed = attention(query, key, value, bias).reshape(x.shape)
        return x + self.contract(torch.cat([mixed, F.silu(hidden)], dim=-1)), memory


class Cache(NamedTuple):
    memory: Tensor      # (layers, B, P + M + T, 2 D / heads) keys and values, filled as we go
    bias: Tensor | None     # (B, 1, P + M + T): -inf at the prompt's padding, else 0; None on the CPU where there is no padding
    n_prefix: int       # P + M
    blocks: list[tuple[Tensor, Tensor, Tensor]]     # of each block: norm (D,); W_in^T, for a row, query / sqrt(size); W_out^T
    output: Tensor      # (D, V - EOS): of the logits of EOS and what follows it; PAD and BOS are never next
    views: tuple[Tensor, Tensor]    # of memory: keys (layers, B, D / heads, P + M + T), values (layers, B, P + M + T, D / heads)
    row: list[Tensor]   # a token's [key, value, query, hidden] (B, 2 D / heads + 5 D), written over by the next; its parts


class TextDecoder(Conditioned):
    """GPT-style decoder p(y | prompt words, preference tokens); the condition is a prefix of the sequence:
        [c_1 .. c_P ; k_1 .. k_M ; BOS y_1 .. y_T-1]  ->  logits of y_1 .. y_T
    The prefix sees all of itself (a prefix language model, 1910.10683v4 Sec. 3.2.1), text sees the prefix and
    the text before it. Input and output embedding are one matrix (1608.05859v3)."""

    def __init__(self, cfg: TextConfig, n_words: int, levels: int, codes: int):
        super().__init__(cfg.width, n_words, levels, codes)
        self.cfg = cfg
        self.tokens = nn.Embedding(cfg.vocab_size, cfg.width)
        self.position = nn.Parameter(torch.empty(cfg.context, cfg.width))
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:     # GPT-2's: 0.02 and, into the residual stream, 0.02 / sqrt(2 layers)
                residual = name.endswith("contract.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * cfg.layers) if residual else 0.02)

    def forward(self, tokens: Tensor, prompt: Tensor, prefs: Tensor | None) -> Tensor:
        """Logits (B, T, V) of y_1..y_T for tokens (B, T) = y_1..y_T, prompt (B, P), prefs (B, M), all int64.
        prefs -1, or None for all, is null. Raises ValueError if T > context, on a wrong shape or, on the CPU,
        an id out of range."""
        length, context = tokens.shape[1], self.cfg.context
        if length > context:
            raise ValueError(f"TextDecoder: text of {length} tokens but TextConfig.context={context}; cut it "
                             "with Tokenizer.encode_batch(texts, context)")
        if len(tokens) != len(prompt):
            raise ValueError(f"TextDecoder: tokens {tuple(tokens.shape)}, prompt {tuple(prompt.shape)}: need "
                             "one prompt a text")
        _check_ids("TextDecoder: tokens", tokens, 0, self.cfg.vocab_size, "TextConfig.vocab_size")
        words, tastes, present = self.embed(prompt, prefs)
        n_prefix = present.shape[1]
        before = F.pad(tokens, (1, 0), value=BOS)[:, :length]               # (B, T)  BOS y_1 .. y_T-1
        x = torch.cat([words, tastes, self.tokens(before) + self.position[:length]], dim=1)     # (B, P + M + T, D)
        visible = x.new_ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        visible[:, :n_prefix] = True                                        # (queries, keys)
        visible = visible & F.pad(present, (0, length), value=True)[:, None, None]  # (B, 1, queries, keys)
        bias = attention_bias(visible.repeat_interleave(self.cfg.heads, dim=2), x)
        for block in self.blocks:
            x, _ = block(x, bias)
        return F.linear(self.norm(x[:, n_prefix:]), self.tokens.weight)

    def loss(self, tokens: Tensor, prompt: Tensor, prefs: Tensor | None) -> Tensor:
        """() mean nats per token of tokens (B, T): EOS counts, PAD does not; 0 if there is none."""
        logits = self(tokens, prompt, prefs).flatten(0, 1)                  # (B T, V)
        total = F.cross_entropy(logits, tokens.flatten(), ignore_index=PAD, reduction="sum")
        return total / (tokens != PAD).sum().clamp(min=1)

    @torch.no_grad()
    def start(self, prompt: Tensor, prefs: Tensor, length: int, group: int = 1) -> Cache:
        """A cache for texts of `length` tokens at most, holding the prefix, each row `group` times: prompt (B, P), prefs
        (B, M). Products will be in autocast's dtype where it is on; attention on the CPU is in fp32 at least."""
        words, tastes, present = self.embed(prompt, prefs)
        x = torch.cat([words, tastes], dim=1)
        kind, size, n_prefix = x.device.type, self.cfg.width // self.cfg.heads, x.shape[1]
        half = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(kind) if half else x.dtype
        memory = x.new_empty(len(self.blocks), len(x) * group, n_prefix + length, 2 * size,
                             dtype=torch.promote_types(x.dtype, torch.float32) if kind == "cpu" else dtype)
        bias, blocks = attention_bias(F.pad(present, (0, length), value=True)[:, None], x), []
        for block, layer in zip(self.blocks, memory):
            query, key_value, hidden = block.expand.weight.T.split(block.sizes, dim=1)
            last = block is self.blocks[-1]         # only its keys and values are asked for
            x, own = (x, F.linear(block.norm(x), key_value.T)) if last else block(x, bias[:, None, :, :n_prefix])
            layer[:, :n_prefix] = own.repeat_interleave(group, 0)
            expand = torch.cat([key_value, query * size**-0.5, hidden], dim=1).to(dtype)
            blocks.append((block.norm.weight, expand, block.contract.weight.T.to(dtype).contiguous()))
        bias = None if kind == "cpu" and present.all() else bias.repeat_interleave(group, 0)
        row = x.new_empty(memory.shape[1], 2 * size + 5 * self.cfg.width, dtype=dtype)
        own, query, hidden = row.split((2 * size, self.cfg.width, 4 * self.cfg.width), dim=1)
        parts = [own, query.unflatten(1, (self.cfg.heads, size)), hidden, row[:, 2 * size:]]     # W_out takes the last
        views, output = (memory[..., :size].mT, memory[..., size:]), self.tokens.weight[EOS:].T.to(dtype).contiguous()
        return Cache(memory, bias, n_prefix, blocks, output, views, [row, *parts])

    def step(self, token: Tensor, t: int, cache: Cache) -> Tensor:
        """Logits (B, V - EOS) of y_t+1 = EOS, ... given token (B,) = y_t, BOS for t = 0, which the cache then remembers.
        Call it under no_grad and, on the CPU, outside autocast. Small operations cost by their number: so few, in place."""
        end, (keys, values), (row, own, query, hidden, mixed) = cache.n_prefix + t + 1, cache.views, cache.row
        x = F.embedding(token, self.tokens.weight) + self.position[t]       # (B, D)
        plain = x.dtype == row.dtype == keys.dtype                          # a cast to the same takes time, too
        layers = zip(cache.blocks, keys.narrow(3, 0, end), values.narrow(2, 0, end), cache.memory.select(2, end - 1))
        for (norm, expand, contract), key, value, last in layers:
            normed = F.layer_norm(x, norm.shape, norm)
            torch.mm(normed if plain else normed.to(row.dtype), expand, out=row)
            last.copy_(own)
            scores = torch.bmm(query if plain else query.to(key.dtype), key)        # (B, heads, end)
            if cache.bias is not None:
                scores += cache.bias[:, :, :end]
            query.copy_(torch.bmm(scores.softmax(2), value))
            F.silu(hidden, inplace=True)
            x = x.addmm_(mixed, contract) if plain else x.add_(mixed @ contract)
        return F.layer_norm(x, norm.shape, self.norm.weight).to(row.dtype) @ cache.output


# Sampling ---------------------------------------------------------------------------------------------------

class Sampled(NamedTuple):
    tokens: Tensor      # (B, T) int64: text, EOS, PAD ...
    log_prob: Tensor    # (B,)   nats, summed over the sampled tokens, EOS included
    null: Tensor | None = None      # (B, T, V) logits without preferences, where asked for; 0 for PAD, BOS and after the end


def _check_group(what: str, group: int, rows: int):
    """Groups of rows with one condition must fill the batch."""
    if group < 1 or rows % group:
        raise ValueError(f"{what}: group={group} for {rows} rows: need a divisor of their number")


def _outside_nucleus(scores: Tensor, top_p: float) -> Tensor:
    """(..., V) bool: all but the likeliest tokens that together reach top_p; ties are in or out together."""
    p = scores.detach().softmax(-1)
    # on the CPU by numpy, which sorts 30 times as fast there as torch
    ranked = (torch.from_numpy(np.sort(p.numpy(), -1)) if p.device.type == "cpu" else p.sort(-1).values).flip(-1)
    inside = ranked.cumsum(-1) - ranked < top_p                             # those before do not reach top_p
    return p < ranked.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)


def _scores(cond: Tensor, null: Tensor | None, guidance: float, temperature: float, top_p: float,
            keep: Tensor | None = None) -> Tensor:
    """sampling_logits before the softmax and without PAD and BOS: logits (..., V - EOS) -> (..., V - EOS)."""
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"sampling_logits: temperature={temperature}, top_p={top_p}: need temperature >= 0 "
                         "and 0 < top_p <= 1")
    scores = cond = _at_least_fp32(cond)
    if null is not None:
        scores = torch.lerp(_at_least_fp32(null), cond, guidance)
    if top_p < 1:
        # Beyond w = 1 guidance amplifies the noise in the logits of tokens that neither branch believes in:
        # one of them can end up likely, and so in the nucleus of `scores`.
        outside = _outside_nucleus((cond if guidance > 1 else scores) / (temperature or 1.0), top_p)
        if keep is not None:
            outside = outside.scatter(-1, (keep - EOS).clamp(min=0)[..., None], False)
        scores = scores.masked_fill(outside, -torch.inf)
    if temperature == 0:
        likeliest = scores.argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, likeliest, 0.0)
    return scores if temperature == 1 else scores / temperature


def sampling_logits(cond: Tensor, null: Tensor | None, guidance: float = 1.0, temperature: float = 1.0,
                    top_p: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """Log-probabilities (..., V) tokens are drawn from: log softmax((null + w (cond - null)) / temperature)
    within the nucleus top_p (Holtzman et al. 1904.09751v2, Sec. 3.1); for w > 1 that of w = 1.
    cond, null (..., V) logits, null None: w = 1. Temperature 0: all on the likeliest token. PAD and BOS have
    probability 0. To the gradient the nucleus is a constant; keep (...) int64: tokens known to be in it, lest
    rounding put one out. At least fp32. Raises ValueError on temperature < 0 or top_p outside (0, 1]."""
    null = None if null is None else null[..., EOS:]
    scores = _scores(cond[..., EOS:], null, guidance, temperature, top_p, keep)
    return F.pad(scores.log_softmax(-1), (EOS, 0), value=-torch.inf)


@torch.no_grad()
def sample_text(decoder: TextDecoder, prompt: Tensor, prefs: Tensor, generator: torch.Generator | None = None,
                guidance: float = 1.0, temperature: float = 1.0, top_p: float = 1.0,
                max_len: int | None = None, group: int = 1, keep_null: bool = False) -> Sampled:
    """A text for each row of prompt (B, P) and prefs (B, M), int64, -1 null: Sampled, tokens (B, T).
    T = max_len counts EOS; None: the decoder's context. Both branches of guidance run as one batch. The
    generator lives on prompt's device and advances by the same amount whatever is sampled. group: so many rows
    in a row have the same condition: their prefix is computed once. keep_null: return the null branch's logits
    (0 after the last text's end), which text_log_prob takes. Raises ValueError if max_len is outside [1, context]
    or B no multiple of group, and as sampling_logits and Conditioned.embed do."""
    batch, context = len(prompt), decoder.cfg.context
    max_len = context if max_len is None else max_len
    if not 1 <= max_len <= context:
        raise ValueError(f"sample_text: max_len={max_len}: need 1 <= max_len <= TextConfig.context={context}")
    _check_group("sample_text", group, batch)
    uniform = torch.rand(max_len, batch, 1, generator=generator, device=prompt.device)
    guided = guidance != 1
    if guided:
        prompt, prefs = torch.cat([prompt, prompt]), torch.cat([prefs, torch.full_like(prefs, -1)])
    cache = decoder.start(prompt[::group], prefs[::group], max_len, group)
    token = least = prompt.new_full((batch, 1), BOS)            # least of a text's choices: 0, which is EOS, once it has ended
    texts, chosen, nulls = [], [], []
    here = prompt.device.type == "cpu"          # where inference_mode makes so small operations a tenth faster
    with torch.inference_mode() if here else contextlib.nullcontext(), torch.autocast("cpu", enabled=False):   # see step
        for t, draw in enumerate(uniform):
            logits = decoder.step((token.repeat(2, 1) if guided else token)[:, 0], t, cache)    # (B or 2 B, V - EOS)
            null = logits[batch:] if guided else None
            nulls += [null] * (keep_null and guided)
            p = _scores(logits[:batch], null, guidance, temperature, top_p).softmax(-1)         # (B, V - EOS)
            cdf = p.cumsum(-1)
            choice = torch.searchsorted(cdf, draw * cdf[:, -1:], right=True)  # 10 times multinomial's speed
            choice.clamp_(max=cdf.shape[1] - 1)                 # all are NaN: the loss will say so
            chosen.append(p.gather(1, choice))
            token = choice + EOS
            texts.append(token)
            if here and not (least := torch.minimum(least, choice)).any():  # elsewhere this is a host sync
                break
    tokens, log_prob = torch.cat(texts, 1), torch.cat(chosen, 1).log()       # (B, t + 1)
    is_end = (tokens == EOS).long()
    after = is_end.cumsum(1) > is_end                           # what a text that had ended went on with
    rest = max_len - len(texts)
    return Sampled(F.pad(tokens.masked_fill(after, PAD), (0, rest), value=PAD), log_prob.masked_fill(after, 0.0).sum(1),
                   F.pad(torch.stack(nulls, 1), (EOS, 0, 0, rest)) if nulls else None)


def text_log_prob(cond: Tensor, null: Tensor | None, tokens: Tensor, guidance: float = 1.0, temperature: float = 1.0,
                  top_p: float = 1.0) -> Tensor:
    """(B,) nats, differentiable: the log-probability that sample_text at these settings samples tokens (B, T).
    cond, null (B, T, V): the decoder's logits of the tokens, with and without preferences; null None: w = 1. A
    token outside the nucleus counts as inside. Raises ValueError on temperature <= 0."""
    if temperature <= 0:
        raise ValueError(f"text_log_prob: temperature={temperature}: need temperature > 0 for a gradient")
    log_p = sampling_logits(cond, null, guidance, temperature, top_p, keep=tokens)          # (B, T, V)
    return log_p.gather(-1, tokens[..., None])[..., 0].masked_fill(tokens == PAD, 0.0).sum(-1)


# Images: autoencoder ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ImageConfig:
    size: int = 32                # H, picture side in pixels; a multiple of 8
    latent: int = 4               # channels of the latent, which is H/4 x H/4
    ae_width: int = 64            # channels of the autoencoder at H/4; a multiple of 16
    ae_steps: int = 900           # optimizer steps of the autoencoder
    ae_lr: float = 3e-3           # peak learning rate of the autoencoder (AdamW), falling to 0
    kl: float = 1e-4              # weight of the latent's KL from N(0, 1), per number (2112.10752v2)
    width: int = 96               # D/2, channels of the denoiser at H/4, twice that at H/8; a multiple of 8
    layers: int = 1               # residual blocks at H/4, each way; one more at H/8
    heads: int = 4                # attention heads; must divide 2 width
    null_rate: float = 0.15       # share of pictures trained with null preferences, for guidance (2207.12598)
    guidance: float = 3.0         # w: 0 ignores the preference tokens, 1 is as trained (2207.12598)
    guidance_until: float = 0.5   # time from which on w is at most 1: what is left are details (2404.07724)
    sampling_steps: int = 8       # S, DDIM steps
    eta: float = 1.0              # DDIM noise: 0 none, 1 ancestral: steps are Gaussian (2010.02502)
    lr: float = 2e-3              # peak learning rate of the denoiser (AdamW), falling to 0 from half-way on
    weight_decay: float = 0.01    # AdamW, of autoencoder and denoiser
    ema: float = 0.998            # decay per step of the mean of the denoiser's weights, which samples
    batch: int = 64               # pictures a step, of autoencoder and denoiser
    steps: int = 2400             # optimizer steps of the denoiser
    time_mean: float = 0.7        # mean of a training time's logit; > 0 favours noise (2403.03206)
    time_std: float = 1.2         # standard deviation of a training time's logit


def _zeroed(layer: nn.Module) -> nn.Module:
    """The layer with weight and bias 0: what it adds to starts unchanged."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResidualBlock(nn.Module):
    """x + conv(silu(FiLM(norm(conv(silu(norm x)))))), (B, C, h, w); FiLM: h (1 + a) + b, (a, b) linear in the
    condition (B, cond) (1709.07871). The last convolution starts at 0: the block starts as the identity."""

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
            h = torch.addcmul(shift, h, 1 + scale)
        return x + self.conv2(F.silu(h))


class Autoencoder(nn.Module):
    """Pictures (B, 3, H, H) in [-1, 1] <-> latents (B, C, H/4, H/4): strided convolutions in, PixelShuffle
    (1609.05158) out. Trained as a VAE with a small KL; afterwards the latent is its mean, scaled per channel
    to mean 0, std 1 over the catalogue by the buffers mean and std (`standardize`): the denoiser's unit."""

    def __init__(self, cfg: ImageConfig):
        super().__init__()
        w, c = cfg.ae_width, cfg.latent
        self.size = cfg.size
        self.encoder = nn.Sequential(
            nn.Conv2d(3, w // 2, 4, 2, 1), nn.SiLU(), nn.Conv2d(w // 2, w, 4, 2, 1), ResidualBlock(w),
            nn.GroupNorm(8, w), nn.SiLU(), nn.Conv2d(w, 2 * c, 3, padding=1))           # (B, 2 C, H/4, H/4)
        self.decoder = nn.Sequential(
            nn.Conv2d(c, w, 3, padding=1), ResidualBlock(w), ResidualBlock(w), nn.GroupNorm(8, w), nn.SiLU(),
            nn.Conv2d(w, 2 * w, 3, padding=1), nn.PixelShuffle(2), nn.SiLU(),           # (B, w/2, H/2, H/2)
            nn.Conv2d(w // 2, 12, 3, padding=1), nn.PixelShuffle(2))                    # (B, 3, H, H)
        self.register_buffer("mean", torch.zeros(1, c, 1, 1))
        self.register_buffer("std", torch.ones(1, c, 1, 1))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (B, C, H/4, H/4) of q(z | x) = N, before standardization, for pictures
        (B, 3, H, H) in [-1, 1]. Raises ValueError on another size."""
        if x.shape[1:] != (3, self.size, self.size):
            raise ValueError(f"Autoencoder: pictures {tuple(x.shape)}: need (B, 3, H, H) with "
                             f"H = ImageConfig.size = {self.size}; resize them or set ImageConfig.size")
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        return mean, log_var.clamp(-12, 4)

    def encode(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, H) in [-1, 1] -> standardized latents (B, C, H/4, H/4), the posterior's mean."""
        return (self.posterior(x)[0] - self.mean) / self.std

    def decode(self, z: Tensor) -> Tensor:
        """Standardized latents (B, C, H/4, H/4) -> pictures (B, 3, H, H), about in [-1, 1]; not clipped.
        Raises ValueError on another shape."""
        shape = (self.mean.shape[1], self.size // 4, self.size // 4)
        if z.shape[1:] != shape:
            raise ValueError(f"Autoencoder: latents {tuple(z.shape)}: need (B, C, H/4, H/4) with {shape} "
                             "after B, as encode gives and ImageConfig sets them")
        return self.decoder(z * self.std + self.mean)

    def loss(self, x: Tensor, kl: float, generator: torch.Generator | None = None) -> Tensor:
        """() mean |x - y| + mean (x - y)^2 + kl mean KL[q(z | x) || N(0, 1)], y decoded from one z ~ q(z | x)
        (1312.6114v11, Eq. 10). x (B, 3, H, H). Raises ValueError on another size."""
        mean, log_var = self.posterior(x)
        noise = torch.randn(mean.shape, generator=generator, device=x.device, dtype=x.dtype)
        error = self.decoder(mean + (log_var / 2).exp() * noise) - x
        divergence = (mean.square() + log_var.exp() - 1 - log_var).mean() / 2
        return error.abs().mean() + error.square().mean() + kl * divergence

    @torch.no_grad()
    def standardize(self, z: Tensor):
        """Set mean and std so that pictures whose latents were z (I, C, h, h), by encode before this call,
        get mean 0, std 1 per channel by encode after it; what decode makes of them stays the same."""
        mean, std = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True).clamp(min=1e-6)
        self.mean.add_(mean * self.std)
        self.std.mul_(std)


# Images: denoiser -------------------------------------------------------------------------------------------

class CrossAttention(nn.Module):
    """x + attention from each place of x (B, C, h, w) to N condition tokens (1706.03762v7, Sec. 3.2); the
    last convolution starts at 0: the block starts as the identity."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, width)
        self.query, self.out = nn.Conv2d(width, width, 1), _zeroed(nn.Conv2d(width, width, 1))
        self.key_value = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, tokens: Tensor, present: Tensor) -> Tensor:
        """x (B, C, h, w), tokens (B, N, C), present (B, N) bool -> (B, C, h, w)."""
        query = self.query(self.norm(x)).unflatten(1, (self.heads, -1)).flatten(3)  # (B, heads, C/heads, hw)
        memory = self.key_value(tokens).unflatten(2, (2, self.heads, -1))           # (B, N, 2, heads, ..)
        key, value = memory.permute(2, 0, 3, 1, 4)                                  # (B, heads, N, C/heads)
        bias = attention_bias(present[:, None, None], x)                            # (B, 1, 1, N)
        mixed = attention(query.transpose(2, 3), key, value, bias)
        return x + self.out(mixed.transpose(2, 3).reshape(x.shape))


def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    """z_t = alpha z_0 + sigma eps at time t in [0, 1]: (cos, sin)(pi t / 2), so alpha^2 + sigma^2 = 1
    (variance preserving, cosine schedule: 2102.09672v1, Eq. 17 with s = 0). alpha_bar of DDPM is alpha^2."""
    angle = t * (math.pi / 2)
    return angle.cos(), angle.sin()


def time_features(t: Tensor, width: int) -> Tensor:
    """t (B,) in [0, 1] -> (B, width): sines and cosines at frequencies 1..1,000 (1706.03762v7, Sec. 3.5)."""
    frequency = torch.exp(torch.linspace(0, math.log(1000), width // 2, device=t.device, dtype=t.dtype))
    angle = t[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Denoiser(Conditioned):
    """Conditional U-Net v(z_t, t, prompt words, preference tokens) on latents: two resolutions; the condition
    enters twice: pooled, with the time, by FiLM everywhere, and token by token by attention at the lower one."""

    def __init__(self, cfg: ImageConfig, n_words: int, levels: int, codes: int):
        w, d = cfg.width, 2 * cfg.width
        super().__init__(d, n_words, levels, codes)
        self.cfg = cfg
        nn.init.normal_(self.null)
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
        last = _zeroed(nn.Conv2d(w, cfg.latent, 3, padding=1))      # v starts at 0, loss at 1
        self.out = nn.Sequential(nn.GroupNorm(8, w), nn.SiLU(), last)

    def condition(self, prompt: Tensor, prefs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Condition tokens (B, P + M, D), which of them are present (B, P + M) bool, and them pooled (B, D).
        prompt (B, P), prefs (B, M) int64. Raises ValueError as Conditioned.embed does."""
        words, tastes, present = self.embed(prompt, prefs)
        written = prompt != 0                                                           # (B, P)
        words = words * written[..., None]                                              # (B, P, D)
        topic = words.sum(1) / written.sum(1, keepdim=True).clamp(min=1)                # (B, D)
        pooled = self.pool(torch.cat([topic, tastes.flatten(1)], dim=1))
        return torch.cat([words, tastes], dim=1), present, pooled

    def forward(self, z: Tensor, t: Tensor, prompt: Tensor, prefs: Tensor) -> Tensor:
        """v (B, C, h, h) for z (B, C, h, h) at times t (B,) in [0, 1]; prompt (B, P), prefs (B, M) int64, -1
        null. Raises ValueError on a wrong shape."""
        need = (len(prompt), self.cfg.latent, self.cfg.size // 4, self.cfg.size // 4)
        if z.shape != need:
            raise ValueError(f"Denoiser: latents {tuple(z.shape)} for prompt {tuple(prompt.shape)}: need "
                             f"(B, C, H/4, H/4) = {need}, as ImageConfig sets them")
        tokens, present, pooled = self.condition(prompt, prefs)
        cond = F.silu(self.time(time_features(t, 64).to(z.dtype)) + pooled)             # (B, D)
        h = self.conv_in(z)                                                             # (B, w, h, h)
        for block in self.down:
            h = block(h, cond)
        skip, h = h, self.shrink(h)                                                     # (B, D, h/2, h/2)
        for block, attend in zip(self.middle, self.attend):
            h = attend(block(h, cond), tokens, present)
        h = self.merge(torch.cat([skip, self.grow(h)], dim=1))                          # (B, w, h, h)
        for block in self.up:
            h = block(h, cond)
        return self.out(h)

    def loss(self, z: Tensor, prompt: Tensor, prefs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """() mean squared error of v = alpha eps - sigma z (2202.00512v2, Appendix D) at logit-normal times
        t = sigmoid(N(time_mean, time_std^2)) (2403.03206v1, Sec. 3.1). z (B, C, h, h) clean standardized
        latents, prompt (B, P), prefs (B, M). About 1 at initialization."""
        u = torch.randn(len(z), generator=generator, device=z.device, dtype=z.dtype)
        eps = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        t = (self.cfg.time_mean + self.cfg.time_std * u).sigmoid()
        alpha, sigma = (x[:, None, None, None] for x in alpha_sigma(t))
        v = self(alpha * z + sigma * eps, t, prompt, prefs)
        return F.mse_loss(v, alpha * eps - sigma * z)


# Images: diffusion ------------------------------------------------------------------------------------------

T_MAX = 0.98    # sampling starts here and not at 1: there z_t still tells nothing, and training rarely goes


def sampling_times(steps: int, like: Tensor) -> Tensor:
    """(steps + 1,) times from T_MAX down to exactly 0, evenly, in like's dtype and device."""
    return torch.linspace(T_MAX, 0, steps + 1, device=like.device, dtype=like.dtype)


def ddim_step(z: Tensor, v: Tensor, t: Tensor, s: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """One step of DDIM from time t to s < t: N(mean, std^2) of z_s given z_t = z (2010.02502v4, Eq. 12, 16).
        z_0 = alpha_t z - sigma_t v,  eps = sigma_t z + alpha_t v
        std = eta sigma_s / sigma_t sqrt(1 - alpha_t^2 / alpha_s^2)
        mean = alpha_s z_0 + sqrt(sigma_s^2 - std^2) eps
    z, v (B, C, h, h), t, s () -> mean (B, C, h, h), std () >= 0, which is 0 at s = 0: no noise at the end."""
    (alpha, sigma), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
    std = eta * sigma_s / sigma * (1 - (alpha / alpha_s).square()).clamp(min=0).sqrt()
    clean, eps = alpha * z - sigma * v, sigma * z + alpha * v
    return alpha_s * clean + (sigma_s.square() - std.square()).clamp(min=0).sqrt() * eps, std


def guided_v(denoiser: Denoiser, z: Tensor, t: Tensor, prompt: Tensor, prefs: Tensor, guidance: float) -> Tensor:
    """v(null) + w (v(prefs) - v(null)), fp32 or better (2207.12598v1, Eq. 6, on v and with w for its 1 + w; the prompt is
    in both). z (B, C, h, h), t () or (B,) -> (B, C, h, h). Both branches run as one batch; at w = 1 the null branch is
    skipped. With gradient on, the null branch runs apart and without it: what REINFORCE changes is not in it."""
    t = t.expand(len(z))
    if guidance == 1:
        return _at_least_fp32(denoiser(z, t, prompt, prefs))
    null = torch.full_like(prefs, -1)
    if torch.is_grad_enabled():
        v = denoiser(z, t, prompt, prefs)
        with torch.no_grad():
            v_null = denoiser(z, t, prompt, null)
    else:
        both = (torch.cat(pair) for pair in ((z, z), (t, t), (prompt, prompt), (prefs, null)))
        v, v_null = denoiser(*both).chunk(2)
    return torch.lerp(_at_least_fp32(v_null), _at_least_fp32(v), guidance)


def _ddim_from(denoiser: Denoiser, chain: Tensor, k: int, prompt: Tensor, prefs: Tensor, guidance: float, eta: float,
               until: float, group: int) -> tuple[Tensor, Tensor]:
    """Mean (B, C, h, h) and std () of chain[k + 1] given chain[k]; at k = 0 the rows of a group are one.
    DEVIATION 17: guidance ends at time `until`: unguided, late steps cost half and keep to the prompt."""
    n, steps = group if k == 0 else 1, len(chain) - 1
    times, late = sampling_times(steps, chain), T_MAX * (1 - k / steps) <= until        # without a look at times
    z, prompt, prefs = (x[::n] for x in (chain[k], prompt, prefs))
    v = guided_v(denoiser, z, times[k], prompt, prefs, min(guidance, 1.0) if late else guidance)
    mean, std = ddim_step(z, v, times[k], times[k + 1], eta)
    return (mean.repeat_interleave(n, 0) if n > 1 else mean), std


@torch.no_grad()
def sample_latents(denoiser: Denoiser, prompt: Tensor, prefs: Tensor, generator: torch.Generator | None = None,
                   guidance: float = 1.0, steps: int = 8, eta: float = 1.0, until: float = 0.0, group: int = 1) -> Tensor:
    """The whole chain (S + 1, B, C, h, h) of DDIM from noise, chain[0], to standardized latents, chain[-1]. prompt (B,
    P), prefs (B, M) int64, -1 null. eta = 0: deterministic given chain[0]; else each step but the last is Gaussian, and
    transition() gives its density. The generator, on the denoiser's device, advances by the same amount whatever is
    sampled. until: the time from which on nothing is guided (2404.07724v2): a guided step costs two. group: so many rows
    in a row have the same condition and start from the same noise, so that their first step is computed once; from there
    on they go apart (eta > 0). Raises ValueError if steps < 1, eta is outside [0, 1], or B is no multiple of group."""
    if steps < 1 or not 0 <= eta <= 1:
        raise ValueError(f"sample_latents: steps={steps}, eta={eta}: need steps >= 1 and 0 <= eta <= 1")
    _check_group("sample_latents", group, len(prompt))
    weight, side = denoiser.conv_in.weight, denoiser.cfg.size // 4
    shape = (steps + 1, len(prompt), denoiser.cfg.latent, side, side)
    chain = torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)
    if group > 1:
        chain[0] = chain[0, ::group].repeat_interleave(group, 0)
    for k in range(steps):      # chain[k + 1] holds the noise of its step until it becomes the sample
        mean, std = _ddim_from(denoiser, chain, k, prompt, prefs, guidance, eta, until, group)
        chain[k + 1] = mean + std * chain[k + 1]
    return chain


def transition(denoiser: Denoiser, chain: Tensor, k: int, prompt: Tensor, prefs: Tensor, guidance: float,
               eta: float, until: float = 0.0, group: int = 1) -> tuple[Tensor, Tensor]:
    """Mean (B, C, h, h), differentiable, and std () of chain[k + 1] given chain[k], as sample_latents drew it with the same
    settings; log N(chain[k + 1]; mean, std^2), summed over the latent, is the step's log-probability (DDPO, 2305.13301v4,
    Sec. 4.2). chain (S + 1, B, C, h, h), prompt (B, P), prefs (B, M). Raises ValueError unless 0 <= k < S - 1, eta > 0."""
    steps = len(chain) - 1
    if not 0 <= k < steps - 1 or eta == 0:
        raise ValueError(f"transition: step {k} of {steps} at eta={eta} has no density: need "
                         f"0 <= k < {steps - 1} and eta > 0")
    return _ddim_from(denoiser, chain, k, prompt, prefs, guidance, eta, until, group)
