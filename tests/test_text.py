"""Tokenizer, text decoder, sampling and its log-probabilities, each against a slow version right at sight."""

import contextlib
import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical
from torch.testing import assert_close

import generators
from generators import (BOS, EOS, PAD, PRETOKEN, TextConfig, TextDecoder, Tokenizer, attention,
                        drop_preferences, nucleus, sample_text, sampling_logits)

TEXTS = ["a tiny fish at dawn, how sweet it is", "behold the mighty fish of night!", "the the the there then",
         "dusk  comes: the boat's here", "Toy Story (1995): Animation, Children", "Heat (1995): Crime",
         "\u00fcn\u00ef \u2014 na\u00efve"]
ODD = ["", " ", "a", "aaaa" * 20, "\n\t \r\n  x", "a_b__c-d", "x" * 1000, "  both ends  ", "\x00\x1f\x7f",
       "e\u0301 \ufb01 \u2167 \xb2", "\ufeff\u200b\u202e", "\U0010ffff",
       "\u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d\u0628\u0627 \u0661\u0669 19",           # right to left
       "\u65e5\u672c\u8a9e\u30c6\u30ad",
       "\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308"]                          # joined emoji


def tiny(vocab=11, words=5, levels=2, codes=3, dtype=torch.float64, **cfg):
    """A decoder whose weights are large enough that everything matters to its logits."""
    torch.manual_seed(0)
    sizes = dict(layers=2, width=8, heads=2, context=6, guidance=1.0, top_p=1.0) | cfg
    decoder = TextDecoder(TextConfig(vocab_size=vocab, **sizes), words, levels, codes).to(dtype)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, dtype=dtype) * 0.5)
        for norm in (decoder.norm, *(block.norm for block in decoder.blocks)):
            norm.weight.copy_(1 + 0.5 * torch.rand(norm.weight.shape, dtype=dtype))
    return decoder


def unlike(prefs):
    """No preferences."""
    return torch.full_like(prefs, -1)


def text_log_prob(decoder, tokens, prompt, prefs):
    """generators.text_log_prob of what the decoder says, guided or not."""
    cond, null = decoder(tokens, prompt, prefs), decoder(tokens, prompt, unlike(prefs))
    return generators.text_log_prob(cond, null, tokens, decoder.cfg)


def batch(size=4, length=6, vocab=11, words=5, levels=2, codes=3, seed=0):
    """tokens (B, T) with EOS and PAD in some rows, prompt (B, 3) with padding, prefs (B, M) with nulls."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, vocab, (size, length), generator=g)
    for row in range(1, size, 2):
        tokens[row, row % length:] = PAD
        tokens[row, row % length] = EOS
    prompt = torch.randint(1, words + 1, (size, 3), generator=g)
    prompt[1::3, 2:] = 0
    prefs = torch.randint(codes, (size, levels), generator=g)
    prefs[2::4] = -1
    return tokens, prompt, prefs


# Tokenizer --------------------------------------------------------------------------------------------------

def slow_merges(texts, n_merges):
    """Recount every pair after every merge."""
    words = [[3 + byte for byte in word.encode()] for text in texts for word in PRETOKEN.findall(text)]
    merges = []
    while len(merges) < n_merges:
        count = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(count, key=lambda pair: (-count[pair], pair), default=None)
        if best is None or count[best] < 2:
            break
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [259 + len(merges)]
                i += 1
        merges.append(best)
    return merges, [token for word in words for token in word]


@pytest.mark.parametrize("n_merges", [0, 1, 30, 500])
def test_bpe_merges_are_those_of_recounting_every_pair(n_merges):
    texts = TEXTS + ODD
    tokenizer = Tokenizer.train(texts, 259 + n_merges)
    merges, segmented = slow_merges(texts, n_merges)
    assert list(tokenizer.merges) == merges
    assert tokenizer.vocab_size == 259 + len(merges) <= 259 + n_merges
    assert [token for text in texts for token in tokenizer.encode(text)] == segmented


def test_bpe_does_not_depend_on_the_order_of_the_texts():
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    assert list(Tokenizer.train(shuffled, 320).merges) == list(Tokenizer.train(TEXTS, 320).merges)


def test_any_unicode_round_trips_and_never_holds_a_special():
    rng = random.Random(0)
    characters = [chr(c) for c in range(0x11000) if not 0xD800 <= c < 0xE000] + ["\U0001f44d"]
    noise = ["".join(rng.choices(characters, k=30)) for _ in range(200)]
    tokenizer = Tokenizer.train(TEXTS + ODD, 400)
    for text in TEXTS + ODD + noise + ["<|endoftext|> [PAD] \x00\x01\x02"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and "".join(PRETOKEN.findall(text)) == text
        assert min(ids, default=3) > EOS
        assert b"".join(tokenizer.pieces[i] for i in ids) == text.encode()


def test_pretokens_take_the_space_before_them_and_part_letters_digits_and_signs():
    assert PRETOKEN.findall("Heat (1995): a_b  c") == ["Heat", " (", "1995", "):", " a", "_", "b", " ", " c"]
    assert max(map(len, PRETOKEN.findall("x" * 100 + "1" * 100 + "!" * 100 + " " * 100))) == 32


def test_bytes_that_are_no_utf8_decode_to_replacement_characters():
    tokenizer = Tokenizer([])
    assert tokenizer.decode([3 + 0xC3, 3 + ord("a")]) == "\ufffda"
    assert tokenizer.decode([PAD, BOS, 3 + ord("a"), EOS, 3 + ord("b")]) == "a"


def test_encode_batch_pads_ends_and_cuts():
    tokenizer = Tokenizer([])
    a, b, c = (3 + ord(letter) for letter in "abc")
    tokens, longest = tokenizer.encode_batch(["ab", "", "abcabc", "abc"], 4)
    assert tokens.tolist() == [[a, b, EOS, PAD], [EOS, PAD, PAD, PAD], [a, b, c, a], [a, b, c, EOS]]
    assert longest == 7         # abcabc and its end, before it was cut
    assert tokens.dtype == torch.int64 and tokenizer.decode_batch(tokens) == ["ab", "", "abca", "abc"]
    assert tokenizer.encode_batch(["ab", "a"], 48)[0].shape == (2, 3)           # no wider than the longest
    assert tokenizer.encode_batch([], 48)[0].shape == (0, 0)


def test_state_restores_the_tokenizer():
    tokenizer = Tokenizer.train(TEXTS, 300)
    state = tokenizer.state()
    assert state.shape == (tokenizer.vocab_size - 259, 2) and len(state) > 9 and state.dtype == torch.int64
    again = Tokenizer.from_state(state)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert Tokenizer.from_state(Tokenizer([]).state()).vocab_size == 259


def test_frequent_words_become_one_token():
    tokenizer = Tokenizer.train(["the lighthouse keeper"] * 9 + ["a fox"] * 2, 400)
    assert len(tokenizer.encode("the lighthouse keeper")) == 3


# Decoder ----------------------------------------------------------------------------------------------------

def slow_logits(decoder, tokens, prompt, prefs):
    """Logits (T, V) of one text, position by position and head by head; padding words are simply left out."""
    def norm(x, weight):
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * weight

    cfg, size = decoder.cfg, decoder.cfg.width // decoder.cfg.heads
    xs = [decoder.words.weight[word] for word in prompt.tolist() if word]
    for level, code in enumerate(prefs.tolist()):
        row = level * decoder.codes + code
        xs.append(decoder.null[level] if code < 0 else decoder.preference.weight[row])
    n_prefix = len(xs)
    for t, token in enumerate([BOS, *tokens.tolist()[:-1]]):
        xs.append(decoder.tokens.weight[token] + decoder.position[t])
    for block in decoder.blocks:
        projected = [block.expand.weight @ norm(x, block.norm.weight) for x in xs]
        projected = [x.split([cfg.width, size, size, 4 * cfg.width]) for x in projected]    # one key, value for all heads
        after = []
        for i, (query, _, _, hidden) in enumerate(projected):
            seen = projected[:max(i + 1, n_prefix)]
            heads = []
            for h in query.view(cfg.heads, size):
                weight = torch.stack([h @ key / math.sqrt(size) for _, key, _, _ in seen]).softmax(0)
                heads.append(sum(w * value for w, (_, _, value, _) in zip(weight, seen)))
            after.append(xs[i] + block.contract.weight @ torch.cat([*heads, F.silu(hidden)]))
        xs = after
    return torch.stack([decoder.tokens.weight @ norm(x, decoder.norm.weight) for x in xs[n_prefix:]])


def test_decoder_equals_a_loop_over_positions_and_heads_in_value_and_gradient():
    decoder, (tokens, prompt, prefs) = tiny(), batch()
    fast = decoder(tokens, prompt, prefs)
    slow = torch.stack([slow_logits(decoder, *row) for row in zip(tokens, prompt, prefs)])
    assert_close(fast, slow)
    upstream = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1), dtype=fast.dtype)
    parameters = list(decoder.parameters())
    for ours, theirs in zip(*(torch.autograd.grad((x * upstream).sum(), parameters) for x in (fast, slow))):
        assert_close(ours, theirs)


def test_bf16_is_right_to_a_few_percent_by_value_and_gradient_and_its_attention_exact():
    decoder, (tokens, prompt, prefs) = tiny(dtype=torch.float32), batch(size=16)
    results = []
    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            log_p = generators.text_log_prob(decoder(tokens, prompt, prefs), None, tokens, decoder.cfg)
        results.append((log_p, *torch.autograd.grad(log_p.sum(), list(decoder.parameters()))))
    for exact, rough in zip(*results):
        assert (rough - exact).norm() <= 0.05 * exact.norm() and rough.dtype == torch.float32
    assert not torch.equal(*(r[0] for r in results))                # autocast was at work
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 1, n, 4, generator=g) for n in (3, 5, 5))
    visible = torch.rand(2, 1, 3, 5, generator=g) < 0.7
    visible[..., 0] = True
    slow = (query @ key.mT / 2).masked_fill(~visible, -math.inf).softmax(-1) @ value
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(attention(query, key, value, visible), slow, rtol=1e-5, atol=1e-6)


def test_loss_is_the_mean_over_text_and_end_tokens_only():
    decoder, (tokens, prompt, prefs) = tiny(), batch()
    log_p = decoder(tokens, prompt, prefs).log_softmax(-1)
    terms = [-log_p[b, t, tokens[b, t]] for b in range(4) for t in range(6) if tokens[b, t] != PAD]
    assert_close(decoder.loss(tokens, prompt, prefs), torch.stack(terms).mean())


def test_a_later_token_moves_no_earlier_logit_but_later_ones():
    decoder, (tokens, prompt, prefs) = tiny(), batch()
    changed = tokens.clone()
    changed[:, 3] = (tokens[:, 3] + 1) % 11
    before, after = decoder(tokens, prompt, prefs), decoder(changed, prompt, prefs)
    assert torch.equal(before[:, :4], after[:, :4]) and (before[:, 4:] != after[:, 4:]).all()


def test_padding_and_order_of_the_prompt_move_nothing_but_its_words_do():
    decoder, (tokens, _, prefs) = tiny(), batch()
    prompt = torch.tensor([[1, 2], [3, 4], [5, 1], [2, 0]])
    logits = decoder(tokens, prompt, prefs)
    for same in (F.pad(prompt, (0, 2)), F.pad(prompt, (3, 0)), prompt.flip(1)):
        assert_close(decoder(tokens, same, prefs), logits)
    assert (decoder(tokens, torch.tensor([[1, 3], [3, 5], [5, 2], [3, 0]]), prefs) != logits).any(-1).all()
    unprompted = decoder(tokens, torch.zeros(4, 1, dtype=torch.int64), prefs)
    assert_close(decoder(tokens, torch.zeros(4, 0, dtype=torch.int64), prefs), unprompted)


def test_batch_size_and_order_move_nothing():
    decoder, (tokens, prompt, prefs) = tiny(), batch(size=6)
    logits, order = decoder(tokens, prompt, prefs), torch.tensor([3, 0, 5, 1, 4, 2])
    assert_close(decoder(tokens[order], prompt[order], prefs[order]), logits[order])
    for row in range(6):
        one = slice(row, row + 1)
        assert_close(decoder(tokens[one], prompt[one], prefs[one]), logits[one])
    assert decoder(tokens[:0], prompt[:0], prefs[:0]).shape == (0, 6, 11)


def test_every_code_of_every_level_has_a_row_of_its_own_and_null_none():
    decoder, (tokens, prompt, _) = tiny(), batch()
    for level, code in itertools.product(range(2), range(3)):
        prefs = torch.full((4, 2), -1)
        prefs[:, level] = code
        grad, = torch.autograd.grad(decoder.loss(tokens, prompt, prefs), decoder.preference.weight)
        assert (grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [level * 3 + code]
    null = torch.full((4, 2), -1)
    grad, = torch.autograd.grad(decoder.loss(tokens, prompt, null), decoder.preference.weight)
    assert grad.count_nonzero() == 0


def test_drop_preferences_drops_whole_rows_at_its_rate():
    g = torch.Generator().manual_seed(0)
    prefs = torch.randint(4, (4000, 3), generator=g)
    dropped = drop_preferences(prefs, 0.15, g)
    gone = (dropped == -1).all(1)
    assert torch.equal(dropped[~gone], prefs[~gone])
    assert abs(gone.double().mean() - 0.15) < 5 * math.sqrt(0.15 * 0.85 / 4000)
    assert torch.equal(drop_preferences(prefs, 0.0, g), prefs)


def test_weights_start_as_gpt2s():
    """0.02 everywhere, less for what each layer adds to the residual stream: the sum of all keeps its size."""
    torch.manual_seed(0)
    decoder = TextDecoder(TextConfig(layers=3, width=32, heads=2, context=40, vocab_size=64), 30, 5, 20)
    for name, parameter in decoder.named_parameters():
        std = 0.02 / math.sqrt(6) if name.endswith("contract.weight") else 0.02
        if parameter.ndim == 2:
            assert abs(parameter.std() / std - 1) < 5 / math.sqrt(2 * parameter.numel()), name
            assert abs(parameter.mean()) < 5 * std / math.sqrt(parameter.numel()), name
        else:
            assert (parameter == 1).all(), name


def test_loss_starts_at_ln_v_and_one_batch_is_learnt_by_heart():
    torch.manual_seed(0)
    decoder = TextDecoder(TextConfig(layers=2, width=32, heads=2, context=8, vocab_size=64), 5, 2, 3)
    tokens, _, prefs = batch(size=8, length=8, vocab=64)
    prompt = torch.ones(8, 1, dtype=torch.int64)
    prefs = torch.tensor([*itertools.product(range(3), range(3))])[:8]
    assert abs(decoder.loss(tokens, prompt, prefs) - math.log(64)) < 0.05
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(80):
        optimizer.zero_grad()
        loss = decoder.loss(tokens, prompt, prefs)
        loss.backward()
        optimizer.step()
    assert loss < 0.05, f"cannot memorize 8 texts told apart by preference tokens: {loss:.3f}; chance is 4.16"
    decoder.cfg = replace(decoder.cfg, guidance=1.0, temperature=0.0)
    said = sample_text(decoder, prompt, prefs)                      # preference tokens pick the text
    assert torch.equal(said[1::2], tokens[1::2])


# Sampling ---------------------------------------------------------------------------------------------------

def slow_nucleus(p, top_p):
    """The likeliest entries of p (V,), one after the other until they reach top_p, as a bool mask."""
    inside, mass = torch.zeros(len(p), dtype=torch.bool), 0.0
    for i in p.argsort(descending=True).tolist():
        if mass >= top_p:
            break
        inside[i], mass = True, mass + float(p[i])
    return inside


def settings(guidance=1.0, temperature=1.0, top_p=1.0):
    return TextConfig(guidance=guidance, temperature=temperature, top_p=top_p)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.9, 1.0])
def test_sampling_logits_by_hand(guidance, temperature, top_p):
    g = torch.Generator().manual_seed(0)
    cond, null = torch.randn(2, 3, 9, generator=g, dtype=torch.float64).unbind()
    log_p = sampling_logits(cond, null, settings(guidance, temperature, top_p))
    assert torch.equal(log_p[:, :EOS], torch.full((3, 2), -torch.inf))
    for row in range(3):
        scores = (null[row] + guidance * (cond[row] - null[row]))[EOS:] / temperature
        trusted = (null[row] + min(guidance, 1.0) * (cond[row] - null[row]))[EOS:]
        inside = slow_nucleus(trusted.softmax(0), top_p)
        expected = torch.where(inside, scores.exp(), 0) / scores[inside].exp().sum()
        assert_close(log_p[row, EOS:].exp(), expected)
        assert_close(log_p[row].exp().sum().item(), 1.0)


def test_guidance_0_is_null_and_1_is_cond():
    g = torch.Generator().manual_seed(0)
    cond, null = torch.randn(2, 3, 9, generator=g, dtype=torch.float64).unbind()
    for rest in ((0.7, 1.0), (1.0, 0.6), (0.0, 1.0)):
        for guidance, branch in ((0.0, null), (1.0, cond)):
            guided = sampling_logits(cond, null, settings(guidance, *rest))
            assert torch.equal(guided, sampling_logits(branch, None, settings(1.0, *rest)))


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_temperature_0_is_the_likeliest_token_of_the_nucleus(top_p):
    g = torch.Generator().manual_seed(0)
    cond, null = torch.randn(2, 20, 9, generator=g).unbind()
    inside = sampling_logits(cond, null, settings(3.0, 1.0, top_p))
    greedy = sampling_logits(cond, null, settings(3.0, 0.0, top_p))
    assert_close(greedy.exp(), F.one_hot(inside.argmax(-1), 9).float())


def test_guidance_cannot_revive_what_the_condition_excludes():
    cond = torch.tensor([0.0, 0.0, 5.0, 4.9, -9.0])         # the last: e^-14 in cond, e^-31 in null
    null = torch.tensor([0.0, 0.0, 5.0, 4.9, -26.0])
    assert sampling_logits(cond, null, settings(3.0)).argmax() == 4
    assert sampling_logits(cond, null, settings(3.0, top_p=0.99))[4] == -torch.inf


def test_nucleus_takes_ties_together_and_keeps_what_it_is_told():
    logits, cfg = torch.tensor([9.0, 9.0, 1.0, 1.0, 0.0, 0.0]), settings(top_p=0.3)
    assert sampling_logits(logits, None, cfg).isfinite()[EOS:].tolist() == [True, True, False, False]
    kept = sampling_logits(logits[None].repeat(3, 1), None, cfg, keep=torch.tensor([4, 2, PAD]))
    assert kept.isfinite()[:, EOS:].tolist() == [[True, True, True, False], [True, True, False, False],
                                                 [True, True, False, False]]
    kept = sampling_logits(logits.flip(0)[None], None, cfg, keep=torch.tensor([EOS]))   # unlikely, but drawn
    assert kept.isfinite()[:, EOS:].tolist() == [[True, False, True, True]]


def test_nucleus_is_full_as_soon_as_it_reaches_its_probability():
    logits = torch.tensor([0.5, 0.25, 0.25]).log()
    assert logits.softmax(-1).tolist() == [0.5, 0.25, 0.25]         # to the bit
    assert nucleus(logits, 0.5).tolist() == [True, False, False]
    assert nucleus(logits, 0.50001).tolist() == [True, True, True]


def test_the_whole_distribution_has_no_rare_token_cut_off():
    logits = torch.tensor([0.0, 0.0, 0.0, -30.0])           # rounded, the first has probability 1
    assert sampling_logits(logits, None, settings()).isfinite().tolist() == [False, False, True, True]


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.8, 0.999])
def test_nucleus_is_the_same_wherever_the_sorting_is_done(top_p, monkeypatch):
    """On the CPU numpy sorts; elsewhere torch, here at work on a tensor that says it is elsewhere."""
    class Elsewhere(torch.Tensor):
        device = torch.device("meta")
    logits = 2 * torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0))
    inside = nucleus(logits, top_p)
    assert torch.equal(nucleus(logits.as_subclass(Elsewhere), top_p).as_subclass(torch.Tensor), inside)
    slow = torch.stack([slow_nucleus(p, top_p) for p in logits.softmax(-1).flatten(0, 1)])
    assert torch.equal(inside.flatten(0, 1), slow)


def test_half_precision_logits_are_summed_in_fp32():
    log_p = sampling_logits(torch.full((1, 1000), 3.0, dtype=torch.bfloat16), None, settings())
    assert log_p.dtype == torch.float32 and abs(log_p[0, EOS].item() + math.log(998)) < 1e-5


def slow_sample(decoder, prompt, prefs, generator, max_len):
    """Uncached, one row at a time, the very uniforms of sample_text: (tokens, log_prob)."""
    uniform = torch.rand(max_len, len(prompt), 1, generator=generator)
    tokens, log_prob = torch.full((len(prompt), max_len), PAD), torch.zeros(len(prompt), dtype=torch.float64)
    for row, t in itertools.product(range(len(prompt)), range(max_len)):
        if t and tokens[row, t - 1] in (PAD, EOS):
            continue
        one = slice(row, row + 1)
        cond = decoder(tokens[one, :t + 1], prompt[one], prefs[one])[0, t]
        null = decoder(tokens[one, :t + 1], prompt[one], unlike(prefs[one]))[0, t]
        policy = Categorical(logits=sampling_logits(cond, null, decoder.cfg))
        reached = policy.probs.cumsum(0) > uniform[t, row]
        tokens[row, t] = reached.nonzero()[0, 0]
        log_prob[row] += policy.log_prob(tokens[row, t])
    return tokens, log_prob


@pytest.mark.parametrize("guidance, temperature, top_p", [
    (1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (0.0, 0.7, 0.8), (2.5, 1.3, 0.9), (3.0, 0.0, 1.0), (2.0, 0.0, 0.5)])
def test_cached_sampling_equals_uncached_and_its_log_prob_the_steps_product(guidance, temperature, top_p):
    decoder = tiny(vocab=7, guidance=guidance, temperature=temperature, top_p=top_p)
    _, prompt, prefs = batch(size=24)
    with torch.no_grad():
        decoder.norm.weight *= 0.3      # a flatter policy: texts of many lengths
        tokens, log_prob = slow_sample(decoder, prompt, prefs, torch.Generator().manual_seed(3), 6)
    assert torch.equal(sample_text(decoder, prompt, prefs, torch.Generator().manual_seed(3)), tokens)
    assert_close(text_log_prob(decoder, tokens, prompt, prefs).detach(), log_prob)
    if temperature > 0:
        assert (log_prob < 0).all() and len(set((tokens != PAD).sum(1).tolist())) > 3
    else:
        assert (log_prob == 0).all()


@pytest.mark.parametrize("max_len", [7, 8, 9, 17, 30])
def test_sampling_stops_early_without_changing_what_it_says(max_len, monkeypatch):
    decoder, (_, prompt, prefs) = tiny(vocab=5, context=30), batch(size=5)
    steps, step = [], decoder.step
    monkeypatch.setattr(decoder, "step", lambda token, t, *rest: steps.append(t) or step(token, t, *rest))
    with torch.no_grad():
        decoder.norm.weight *= 0.3
        tokens = sample_text(decoder, prompt, prefs, torch.Generator().manual_seed(3), max_len)
        longest = int((tokens != PAD).sum(1).max())
        want, _ = slow_sample(decoder, prompt, prefs, torch.Generator().manual_seed(3), max_len)
    assert torch.equal(tokens, want) and tokens.shape == (5, max_len)
    assert steps == list(range(min(max_len, math.ceil(longest / 8) * 8)))       # asked at every eighth


def test_cached_logits_equal_forward():
    decoder, (tokens, prompt, prefs) = tiny(), batch()
    before, (past, present), logits = F.pad(tokens, (1, -1), value=BOS), decoder.start(prompt, prefs), []
    for t in range(6):
        said, past = decoder.step(before[:, t:t + 1], t, past, present)
        logits.append(said)
    assert_close(torch.stack(logits, 1), decoder(tokens, prompt, prefs))


def test_block_goes_on_from_its_past():
    """In any two parts, what sees what being anything at all."""
    block, g = tiny().blocks[0], torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, generator=g, dtype=torch.float64)
    visible = torch.rand(3, 5, 5, generator=g) < 0.5
    visible |= torch.eye(5, dtype=torch.bool)
    for n in range(1, 5):
        visible[:, :n, n:] = False          # the first part cannot see the second
        whole, memory = block(x, visible)
        first, past = block(x[:, :n], visible[:, :n, :n])
        second, after = block(x[:, n:], visible[:, n:], past)
        assert_close(torch.cat([first, second], 1), whole)
        assert_close(after, memory)


def test_sampling_under_autocast_is_close_to_fp32():
    """Of logits in bf16 the tokens are other ones now and then; double precision stays."""
    decoder, (_, prompt, prefs) = tiny(dtype=torch.float32, guidance=2.0, top_p=0.9), batch(size=64)
    exact, rough = (torch.autocast("cpu", torch.bfloat16, enabled=on)(sample_text)(
        decoder, prompt, prefs, torch.Generator().manual_seed(1)) for on in (False, True))
    same = (exact == rough).double().mean()
    assert 0.9 < same < 1
    with torch.autocast("cpu", torch.bfloat16):
        assert sampling_logits(decoder(exact, prompt, prefs), None, decoder.cfg).dtype == torch.float32


def test_sampling_is_repeatable_and_advances_the_generator_the_same_whatever_it_says():
    decoder, (_, prompt, prefs) = tiny(dtype=torch.float32, context=20, guidance=2.0), batch(size=8)
    one, two = (torch.Generator().manual_seed(5) for _ in range(2))
    assert torch.equal(*(sample_text(decoder, prompt, prefs, g) for g in (one, two)))
    with torch.no_grad():
        decoder.tokens.weight.zero_()       # all logits 0 ..
    sample_text(decoder, prompt, prefs, one)
    with torch.no_grad():
        decoder.position[0] = 99 * torch.tensor([1.0, -1.0]).repeat(4)
        decoder.tokens.weight[EOS] = decoder.position[0]        # .. and all on EOS: stops after one token
    short = sample_text(decoder, prompt, prefs, two)
    assert (short[:, 0] == EOS).all() and (short[:, 1:] == PAD).all()
    assert torch.equal(one.get_state(), two.get_state())


def test_samples_have_the_frequencies_of_their_log_prob():
    decoder, n = tiny(vocab=5, context=2, guidance=1.5, temperature=1.2, top_p=0.97), 20000
    tokens, prompt, prefs = outcomes(5, 2)
    log_prob = text_log_prob(decoder, tokens, prompt, prefs)
    probability = dict(zip(map(tuple, tokens.tolist()), log_prob.exp().tolist()))
    rows = prompt[:1].expand(n, -1), prefs[:1].expand(n, -1)
    sampled = sample_text(decoder, *rows, torch.Generator().manual_seed(0))
    count = Counter(map(tuple, sampled.tolist()))
    for text, seen in count.items():
        p = probability[text]
        assert abs(seen / n - p) < 5 * math.sqrt(p * (1 - p) / n), text
    assert abs(sum(probability[text] for text in count) - 1) < 1e-3     # what was never seen is outside a nucleus


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_least_and_largest_uniform_draw_a_possible_token(uniform, monkeypatch):
    decoder, (_, prompt, prefs) = tiny(dtype=torch.float32, guidance=2.0), batch()
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, uniform))
    for top_p in (0.5, 1.0):
        decoder.cfg = replace(decoder.cfg, top_p=top_p)
        tokens = sample_text(decoder, prompt, prefs)
        cond, null = decoder(tokens, prompt, prefs), decoder(tokens, prompt, unlike(prefs))
        chosen = sampling_logits(cond, null, decoder.cfg).gather(-1, tokens[..., None])[..., 0]
        assert (chosen.isfinite() | (tokens == PAD)).all() and (tokens[:, 0] >= EOS).all()


def test_logits_that_are_not_finite_end_in_a_log_probability_that_says_so():
    decoder, (_, prompt, prefs) = tiny(dtype=torch.float32, guidance=2.0, top_p=0.9), batch()
    decoder.preference.weight.data.fill_(math.nan)
    tokens = sample_text(decoder, prompt, prefs.clamp(min=0), torch.Generator().manual_seed(0))
    assert ((tokens >= 0) & (tokens < 11)).all()
    assert text_log_prob(decoder, tokens, prompt, prefs.clamp(min=0)).isnan().all()


def outcomes(vocab, length):
    """tokens (n, T): every text of a vocabulary of V that EOS ends or that is T long; prompt, prefs."""
    def grow(prefix):
        if len(prefix) == length or (prefix and prefix[-1] == EOS):
            yield prefix + [PAD] * (length - len(prefix))
        else:
            for token in range(EOS, vocab):
                yield from grow(prefix + [token])
    tokens = torch.tensor(list(grow([])))
    prompt, prefs = torch.tensor([[1, 2]]), torch.tensor([[0, 2]])
    return tokens, prompt.expand(len(tokens), 2), prefs.expand(len(tokens), 2)


@pytest.mark.parametrize("guidance, temperature", [(1.0, 1.0), (0.0, 1.0), (2.0, 0.8)])
def test_probabilities_of_all_texts_sum_to_one(guidance, temperature):
    decoder, texts = tiny(vocab=5, context=3, guidance=guidance, temperature=temperature), outcomes(5, 3)
    assert len(texts[0]) == 1 + 2 * (1 + 2 * 3)
    total = text_log_prob(decoder, *texts).exp().sum()
    assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("guidance, temperature, top_p", [(1.0, 1.0, 1.0), (2.0, 0.8, 1.0), (2.0, 1.3, 0.9)])
@pytest.mark.parametrize("baseline", [0.0, 3.0])
def test_reinforce_over_all_outcomes_is_the_gradient_of_the_expected_reward(guidance, temperature, top_p, baseline):
    """Ours: the surrogate of text_log_prob, each outcome weighted by its probability. Exact: E[R], by a chain
    of softmaxes over forward's logits, differentiated."""
    decoder = tiny(vocab=5, context=2, guidance=guidance, temperature=temperature, top_p=top_p)
    tokens, prompt, prefs = outcomes(5, 2)
    decoder.requires_grad_(False)
    table = decoder.preference.weight.requires_grad_(True)
    reward = torch.randn(len(tokens), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    cond, null = decoder(tokens, prompt, prefs), decoder(tokens, prompt, torch.full_like(prefs, -1))
    p = ((null + guidance * (cond - null))[..., EOS:] / temperature).exp()
    if top_p < 1:
        trusted = cond[..., EOS:].softmax(-1).detach()
        p = p * torch.stack([torch.stack([slow_nucleus(step, top_p) for step in text]) for text in trusted])
        assert (p == 0).any()
    p = p / p.sum(-1, keepdim=True)
    probability = torch.ones(len(tokens), dtype=torch.float64)
    for t in range(2):
        taken = p[range(len(tokens)), t, (tokens[:, t] - EOS).clamp(min=0)]
        probability = probability * torch.where(tokens[:, t] == PAD, 1.0, taken)
    assert_close(probability.sum().item(), 1.0)
    exact, = torch.autograd.grad((probability * reward).sum(), table)

    log_prob = text_log_prob(decoder, tokens, prompt, prefs)
    weight = probability.detach()
    estimate, = torch.autograd.grad(-(weight * -(reward - baseline) * log_prob).sum(), table)   # of -loss
    assert exact[[0, 5]].abs().min() > 1e-4 and exact[[1, 2, 3, 4]].count_nonzero() == 0
    assert_close(estimate, exact)


def test_log_prob_reaches_only_the_preference_table():
    decoder, (tokens, prompt, prefs) = tiny(guidance=2.0, temperature=0.9, top_p=0.9), batch()
    decoder.requires_grad_(False).preference.requires_grad_(True)
    text_log_prob(decoder, tokens, prompt, prefs).sum().backward()
    assert [name for name, p in decoder.named_parameters() if p.grad is not None] == ["preference.weight"]
    assert decoder.preference.weight.grad.isfinite().all() and decoder.preference.weight.grad.count_nonzero()


def test_log_prob_gradient_against_finite_differences():
    decoder, texts = tiny(layers=1, context=4, guidance=1.7, temperature=0.8), batch(size=2, length=4)
    decoder.requires_grad_(False)
    table = decoder.preference.weight
    step = 1e-5 * torch.randn(table.shape, generator=torch.Generator().manual_seed(0), dtype=table.dtype)
    table.requires_grad_(True)
    grad, = torch.autograd.grad(text_log_prob(decoder, *texts).sum(), table)
    with torch.no_grad():
        table += step
        up = text_log_prob(decoder, *texts)
        table -= 2 * step
        down = text_log_prob(decoder, *texts)
    assert_close(2 * (grad * step).sum(), (up - down).sum(), rtol=1e-5, atol=0)


def test_a_token_that_left_the_nucleus_still_has_a_log_prob():
    decoder, texts = tiny(guidance=2.0, top_p=1e-9), batch()            # the nucleus is one token
    log_prob = text_log_prob(decoder, *texts)
    assert log_prob.isfinite().all() and (log_prob < 0).all()


def test_sampled_tokens_can_be_trained_on():
    decoder, (_, prompt, prefs) = tiny(dtype=torch.float32, guidance=2.0, top_p=0.9), batch()
    tokens = sample_text(decoder, prompt, prefs, torch.Generator().manual_seed(0))
    text_log_prob(decoder, tokens, prompt, prefs).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in decoder.parameters())


@pytest.mark.parametrize("size", [0, 1])
def test_empty_and_single_batches(size):
    for guidance in (1.0, 2.0):
        decoder, (tokens, prompt, prefs) = tiny(guidance=guidance, top_p=0.9), batch(size=size)
        assert sample_text(decoder, prompt, prefs, max_len=3).shape == (size, 3)
        assert text_log_prob(decoder, tokens, prompt, prefs).shape == (size,)
    assert decoder(tokens[:, :0], prompt, prefs).shape == (size, 0, 11)


def test_everything_runs_on_the_meta_device():
    """Where a look at a number raises. Of texts longer than 8 tokens it is asked whether they have ended."""
    with torch.device("meta"):
        decoder = TextDecoder(TextConfig(layers=2, width=4096, heads=32, vocab_size=512), 10, 2, 64)
        tokens, prompt = torch.ones(64, 48, dtype=torch.int64), torch.ones(64, 3, dtype=torch.int64)
        prefs = torch.zeros(64, 2, dtype=torch.int64)
    optimizer = torch.optim.AdamW(decoder.parameters())
    decoder.loss(tokens, prompt, drop_preferences(prefs, 0.1, None)).backward()
    optimizer.step()
    sampled = sample_text(decoder, prompt, prefs, max_len=8)
    assert sampled.shape == (64, 8) and sampled.is_meta
    log_prob = text_log_prob(decoder, tokens, prompt, prefs)
    log_prob.sum().backward()
    assert log_prob.shape == (64,) and decoder.preference.weight.grad.is_meta


# Errors -----------------------------------------------------------------------------------------------------

def test_errors_name_the_tensor_both_sizes_and_the_cure():
    decoder, (tokens, prompt, prefs) = tiny(), batch()
    with pytest.raises(ValueError, match=r"prefs \(4, 1\) for prompt \(4, 3\): need \(B, M\) = \(4, 2\)"):
        decoder(tokens, prompt, prefs[:, :1])
    with pytest.raises(ValueError, match="text of 7 tokens, but TextConfig.context=6; cut it"):
        decoder(F.pad(tokens, (0, 1)), prompt, prefs)


def test_ids_out_of_range_are_refused_and_no_other_levels_codes():
    """The first that does not exist: 11 tokens, 5 words and 0 for padding, 3 codes a level."""
    decoder = tiny()
    right = torch.full((4, 6), 10), torch.full((4, 3), 5), torch.full((4, 2), 2)
    decoder(*right)
    for n in range(3):
        with pytest.raises(IndexError):
            decoder(*(x + (k == n) for k, x in enumerate(right)))
