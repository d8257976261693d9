"""dppmg.py: features against slow ones, tables, generation, a REINFORCE step, checkpoints, command line."""
import os
import pickle
import re
from collections import Counter
from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch
from conftest import ROOT, spawn
from PIL import Image
from torch.testing import assert_close

import dppmg
from dppmg import (DPPMG, FORMAT, MODALITIES, Catalogue, CheckpointError, Config, MethodConfig, parse_prompt,
                   read_checkpoint, replacing, table_as)
from generators import BOS, EOS, PAD, ImageConfig, TextConfig, Tokenizer, sample_text, transition
from gnn import GNNConfig, LatentPCA, TfidfSVD
from reward import RewardConfig
from vq import VQConfig

# begun at once: it runs beside the tests that do not need it
pytestmark = pytest.mark.usefixtures("smoke_process")
TEXTS = [f"{how} {what} at {when}" for how in ("a merry", "one sad") for what in ("fish", "boat")
         for when in ("dawn", "night", "noon")]
CFG = Config(
    MethodConfig(image_features=7, text_features=5), GNNConfig(dim=12),
    VQConfig(levels=2, codes=4, dim=8, hidden=8),
    TextConfig(layers=1, width=16, heads=2, context=12, vocab_size=300, guidance=2.0),
    ImageConfig(size=16, ae_width=16, width=8, heads=2, sampling_steps=4, guidance=2.0),
    RewardConfig(scorer_width=8, scorer_dim=8, images=4, texts=6, diffusion_steps=5, grad_steps=2))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def toy(cfg=CFG, seed=0):
    """A small DPPMG of 6 users and 12 items: untrained, but each of its parts does something."""
    tokenizer = Tokenizer.train(TEXTS, cfg.text.vocab_size)
    user, item = (torch.rand(6, 12, generator=rng(seed)) < 0.4).nonzero().T
    catalogue = Catalogue("toys", [f"u{n}" for n in range(6)], [f"i{n}" for n in range(12)], ["boat", "fish"],
                          2, 12,
                          tokenizer.state(), user, item)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DPPMG(cfg, catalogue)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)     # the denoiser's last layer starts at zero
        latents, tokens = torch.randn(12, 4, 4, 4), tokenizer.encode_batch(TEXTS, 12)[0]
        model.image_features.fit(latents)
        model.text_features.fit(tokens)
        model.gnn.set_features("image", model.image_features(latents))
        model.gnn.set_features("text", model.text_features(tokens))
        for m, (users, _) in model.gnn(model.graph).items():
            model.quantizer[m].initialize(users.detach())
        model.update_preferences()
        model.seed_tables()
    return model.eval()


# ---- features

def signs(got, want):
    """Singular vectors have no sign: +-1 by which each column of got agrees with want."""
    return np.sign((got * want).sum(0))


def local_features(latents, module):
    """relu of each 2 x 2 filter at each place, place by place; then their mean over the places."""
    x, filters, bias = (t.double().numpy() for t in (latents, module.filters, module.bias))
    side, total = x.shape[-1] - 1, 0.0
    for i in range(side):
        for j in range(side):
            patch = x[:, :, i:i + 2, j:j + 2]
            total = total + np.maximum(np.einsum("bcij,fcij->bf", patch, filters) + bias, 0)
    return total / side**2


def test_image_features_are_numpys_principal_components_whitened():
    items, new = torch.randn(60, 3, 4, 4, generator=rng()), torch.randn(9, 3, 4, 4, generator=rng(1))
    items = items * torch.linspace(0.5, 2, 48).view(3, 4, 4) + 1
    module = LatentPCA(3, 4, 9, n_filters=20)
    module.fit(items)
    halves = [(lambda x: x.flatten(1).double().numpy(), slice(0, 4)),
              (lambda x: local_features(x, module), slice(4, 9))]
    for part, columns in halves:
        x, y = part(items), part(new)
        _, value, direction = np.linalg.svd(x - x.mean(0), full_matrices=False)
        n = columns.stop - columns.start
        want, want_new = ((raw - x.mean(0)) @ direction[:n].T / value[:n] * 60**0.5 for raw in (x, y))
        sign = signs(module(items)[:, columns].numpy(), want)
        for content, wanted in ((items, want), (new, want_new)):
            np.testing.assert_allclose(module(content)[:, columns].numpy() * sign, wanted, atol=2e-3)
        found = module(items)[:, columns].double()
        assert_close(found.mean(0), torch.zeros(n).double(), atol=1e-4, rtol=0)
        assert_close(found.T @ found / 60, torch.eye(n).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("rank", [0, 2])
def test_image_features_without_variance_are_zero_and_not_noise(rank):
    basis = torch.randn(rank, 2, 4, 4, generator=rng())
    items = torch.einsum("ir,rchw->ichw", torch.randn(30, rank, generator=rng(1)), basis) + 0.7
    module = LatentPCA(2, 4, 80)            # 40 directions of 32 numbers, and 40 of 512
    module.fit(items)
    variance = module(items)[:, :40].square().mean(0)
    assert_close(variance, torch.tensor([1.0] * rank + [0.0] * (40 - rank)), atol=1e-3, rtol=0)
    assert module(torch.randn(5, 2, 4, 4, generator=rng(2))).isfinite().all()


def slow_tfidf(text_tokens, catalogue):
    """{token: weight} of one text by dictionaries, given the tokens of all texts of the catalogue."""
    document_frequency = Counter(token for tokens in catalogue for token in set(tokens))
    weight = {token: (1 + log(n)) * (log((1 + len(catalogue)) / (1 + document_frequency[token])) + 1)
              for token, n in Counter(text_tokens).items()}
    norm = sum(w * w for w in weight.values()) ** 0.5
    return {token: w / norm for token, w in weight.items()}


def test_text_features_are_a_truncated_svd_of_tfidf_by_dictionaries():
    texts = ["a fish", "a sad fish and a boat", "the boat, the boat, the boat!", "one merry night",
             "a night at noon", "fish at noon"]
    tokenizer = Tokenizer.train(texts, 270)
    module, V = TfidfSVD(tokenizer.vocab_size, 4), tokenizer.vocab_size
    catalogue = [tokenizer.encode(text) for text in texts]
    module.fit(tokenizer.encode_batch(texts, 40)[0])
    # the third: nothing is known
    new = ["fish fish fish a boat", "noon", "zebra Ω quux", "one sad zebra", ""]

    def dense(texts):
        rows = np.zeros((len(texts), V))
        for row, text in zip(rows, texts):
            for token, weight in slow_tfidf(tokenizer.encode(text), catalogue).items():
                row[token] = weight
        return rows
    _, _, direction = np.linalg.svd(dense(texts), full_matrices=False)
    direction = direction[:4].T / np.square(dense(texts) @ direction[:4].T).mean() ** 0.5
    known, unknown = (tokenizer.encode_batch(some, 40)[0] for some in (texts, new))
    sign = signs(module(known).numpy(), dense(texts) @ direction)
    for some, tokens in ((texts, known), (new, unknown)):
        np.testing.assert_allclose(module.tfidf(tokens).numpy(), dense(some), atol=1e-6)
        np.testing.assert_allclose(module(tokens).numpy() * sign, dense(some) @ direction, atol=1e-4)
    assert module(unknown)[1].abs().max() > 0.1 and module(unknown)[4].abs().max() == 0


def test_special_tokens_are_no_words():
    module = TfidfSVD(300, 3)
    module.fit(torch.randint(3, 40, (20, 8), generator=rng()))
    text = torch.tensor([[BOS, 7, 9, 9, EOS, PAD, PAD]])
    assert torch.equal(module.tfidf(text), module.tfidf(text[:, 1:4]))
    assert module.tfidf(torch.tensor([[BOS, EOS, PAD]])).abs().sum() == 0


def test_text_features_are_found_again_to_the_bit_wherever_memory_lies():
    tokens, found, kept = torch.randint(3, 200, (300, 30), generator=rng()), [], []
    for n in range(6):
        kept.append(np.zeros(999 + 1001 * n, np.uint8))         # moves what is allocated next
        module = TfidfSVD(300, 64)
        module.fit(tokens.clone())
        found.append(module(tokens))
    assert all(torch.equal(x, found[0]) for x in found)


# ---- tables of preference tokens

def test_seeded_tables_have_the_geometry_of_the_codebooks():
    model = toy()
    before = {m: getattr(model, m).preference.weight.detach().clone() for m in MODALITIES}
    model.seed_tables()
    for m in MODALITIES:
        table = getattr(model, m).preference.weight.detach()
        books = [book.codebook for book in model.quantizer[m].codebooks]
        # level 0 has the size that the table's rows had; the others follow
        size = books[0].square().sum(1).mean()
        assert_close(table[:4].square().sum(1).mean(), before[m].square().sum(1).mean(), rtol=1e-3, atol=0)
        factor = table[:4].square().sum(1).mean() / size
        assert_close(table @ table.T, factor * torch.cat(books) @ torch.cat(books).T, rtol=1e-3, atol=1e-6)


def test_raw_preferences_make_each_user_a_token():
    model = toy(replace(CFG, vq=replace(CFG.vq, levels=1, codes=6)))
    model.use_raw_preferences()
    for m in MODALITIES:
        preference, table = model.gnn(model.graph)[m][0], getattr(model, m).preference.weight
        assert torch.equal(getattr(model, f"tokens_{m}"), torch.arange(6)[:, None])
        unit = torch.nn.functional.normalize(preference, dim=1)
        assert_close((table @ table.T) / table[0].square().sum(), unit @ unit.T, rtol=1e-3, atol=1e-4)


def test_table_as_restores_the_table_even_after_an_exception():
    model = toy()
    weight = model.text.preference.weight
    kept, place, other = weight.detach().clone(), weight.data_ptr(), torch.zeros_like(weight)
    with pytest.raises(RuntimeError, match="within"), table_as(model.text, other):
        assert model.text.preference.weight is weight and weight.abs().sum() == 0
        raise RuntimeError("within")
    assert torch.equal(weight, kept) and weight.data_ptr() == place


# ---- prompts, generation, new users

def test_prompts_are_encoded_and_unknown_words_are_named():
    catalogue = toy().catalogue
    assert parse_prompt("Fish,  BOAT,fish") == ("fish", "boat")
    assert catalogue.encode_prompts([("fish", "boat"), ("boat",), ()]).tolist() == [[2, 1], [1, 0], [0, 0]]
    assert catalogue.encode_prompts([("fish",) * 3]).tolist() == [[2, 2, 2]]
    with pytest.raises(ValueError, match="unknown prompt word 'fisch': known are fish and 1 more"):
        catalogue.encode_prompts([("boat",), ("fisch",)])


@pytest.fixture(scope="module")
def model(smoke):
    return DPPMG.load(smoke)


def same(one, two):
    return all(a.text == b.text and a.image.tobytes() == b.image.tobytes() for a, b in zip(one, two))


def test_generation_repeats_by_seed_and_differs_by_seed_user_and_prompt(model):
    args = dict(prompt="fish", user="u001", n=2)
    made = model.generate(**args)
    assert same(made, model.generate(**args, seed=0))
    history = [model.catalogue.item_ids[i] for i in model.catalogue.item[model.catalogue.user == 2].tolist()]
    for other in (args | dict(seed=1), args | dict(prompt="boat"), args | dict(user="u002"),
                  dict(prompt="fish", n=2),
                  dict(prompt="fish", n=2, history=history)):
        pairs = zip(made, model.generate(**other), strict=True)
        assert not any(a.image.tobytes() == b.image.tobytes() for a, b in pairs), other
    assert made[0].image.tobytes() != made[1].image.tobytes() and made[0].text != made[1].text


@pytest.mark.parametrize("n", [1, 3])
def test_generated_pictures_are_rgb_of_the_configured_size(model, n):
    made = model.generate("moon", n=n)
    assert len(made) == n
    assert all((x.image.mode, x.image.size) == ("RGB", (32, 32)) and isinstance(x.text, str) for x in made)


def test_a_picture_has_the_pixels_of_the_tensor():
    x = torch.tensor([[[-1.0, 1.0]], [[0.0, -2.0]], [[0.2, 3.0]]])          # (3, 1, 2): one row of two pixels
    image = dppmg.to_picture(x)
    assert (image.mode, image.size) == ("RGB", (2, 1))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(0, 128, 153), (255, 0, 255)]


@pytest.mark.parametrize("arguments, message", [
    (dict(user="u0"), "unknown user 'u0': known are u0"), (dict(user=""), "unknown user ''"),
    (dict(user="u000", history=["s0000"]), "a user or a history, not both"),
    (dict(history=[]), "empty history"),
    (dict(history=["s0000", "sticker"]), "unknown item 'sticker': known are s0000"),
    (dict(prompt="fish, chips"), "unknown prompt word 'chips': known are")])
def test_what_is_not_known_is_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"prompt": "fish"} | arguments)


def test_a_training_user_folded_in_keeps_preferences_and_tokens(model):
    user, item = model.catalogue.user, model.catalogue.item
    trained, n_users = user.unique(), len(model.catalogue.user_ids)
    folded = model.fold_in_preferences(user, item, n_users)
    histories = [[model.catalogue.item_ids[i] for i in item[user == u].tolist()] for u in trained]
    tokens = model.fold_in(histories)
    for m in MODALITIES:
        own = torch.nn.functional.normalize(getattr(model, f"preference_{m}")[trained], dim=1)
        cosine = torch.nn.functional.normalize(folded[m][trained], dim=1) @ own.T
        assert cosine.diagonal().min() > 0.9
        assert (cosine.argmax(1) == torch.arange(len(trained))).double().mean() > 0.8
        assert (tokens[m] == getattr(model, f"tokens_{m}")[trained]).double().mean() > 0.7
    doubled = [history * 2 for history in reversed(histories)]      # neither order nor repetition matters
    assert all(torch.equal(model.fold_in(doubled)[m].flip(0), tokens[m]) for m in MODALITIES)


# ---- one step of REINFORCE

def tables(model):
    return {m: getattr(model, m).preference.weight for m in MODALITIES}


def step(model, user=(0, 3), with_kl=False, reference=None, seed=0):
    """A step with only the tables trainable, and its loss's gradient in them. Prompts: boat, fish, ..."""
    model.requires_grad_(False)
    for table in tables(model).values():
        table.requires_grad_().grad = None
    user = torch.tensor(user, device=model.preference_image.device)
    prompt = torch.stack([torch.arange(len(user), device=user.device) % 2 + 1, torch.zeros_like(user)], 1)
    found = model.reinforce_step(user, prompt, reference or tables(model), with_kl,
                                 None if seed is None else rng(seed))
    found.loss.backward()
    return found


def slow_advantage(reward):
    others = [reward[:i] + reward[i + 1:] for i in range(len(reward))]
    return [own - sum(rest) / len(rest) for own, rest in zip(reward, others)]


def slow_normalized(groups):
    """Each group without its mean, over the deviation that all have together."""
    centred = [[x - sum(group) / len(group) for x in group] for group in groups]
    size = (sum(x * x for group in centred for x in group) / sum(map(len, centred))) ** 0.5 + 1e-4
    return [[x / size for x in group] for group in centred]


def slow_terms(model, pictures, latents, texts, user):
    """(modality, term) -> one value for each of a group's images or texts, by the formula, pair by pair."""
    x, y = model.scorer.encode_image(pictures), model.scorer.encode_text(texts)
    cosine = [[(a * b).sum() for b in y] for a in x]
    found = {("image", "c"): [sum(row) / len(row) for row in cosine],
             ("text", "c"): [sum(column) / len(column) for column in zip(*cosine)]}
    for m, features, made in (("image", model.image_features, latents), ("text", model.text_features, texts)):
        w_f = [model.gnn.embed_content(m, features(one[None]))[0] for one in made]
        found[m, "s"] = [getattr(model, f"preference_{m}")[user] @ x for x in w_f]
    return found


def slow_rewards(model, terms):
    """{modality: [[reward of each sample] of each group]} from the terms of each group."""
    cfg, rewards = model.cfg.reward, {}
    for m in MODALITIES:
        c, s = (slow_normalized([group[m, term] for group in terms]) for term in "cs")
        rewards[m] = [[cfg.lambda_c * a + cfg.lambda_p * b for a, b in zip(*group)] for group in zip(c, s)]
    return rewards


def slow_text_log_prob(model, tokens, prompt, prefs):
    """log p of one text, token by token, under the guided distribution without PAD and BOS, within the nucleus of the
    unguided one."""
    cond, null = (model.text(tokens[None], prompt[None], x)[0] for x in (prefs[None], None))
    total, w = 0.0, model.cfg.text.guidance
    for t, token in enumerate(tokens[:tokens.tolist().index(EOS) + 1 if EOS in tokens else None].tolist()):
        logits = ((null[t] + w * (cond[t] - null[t])) / model.cfg.text.temperature)[EOS:]
        likely, mass, nucleus = (cond[t] / model.cfg.text.temperature)[EOS:].softmax(0), 0.0, []
        for v in likely.argsort(descending=True).tolist():
            if mass < model.cfg.text.top_p:
                nucleus.append(v)
            mass = mass + likely[v].item()
        assert token - EOS in nucleus
        policy = torch.distributions.Categorical(logits=torch.full_like(logits, -torch.inf).index_put(
            (torch.tensor(nucleus),), logits[nucleus]))
        total = total + policy.log_prob(torch.tensor(token - EOS))
    return total


# the first step of the chain; all that are Gaussian: the last is not
@pytest.mark.parametrize("grad_steps", [1, 5])
def test_reinforce_step_has_the_policy_gradient_of_the_slow_formula(grad_steps):
    cfg = replace(CFG, reward=replace(CFG.reward, grad_steps=grad_steps, lambda_p=0.7, lambda_c=1.3),
                  image=replace(CFG.image, guidance_until=0.5))             # guided at 0.98, 0.784, 0.588
    model, users, G = toy(cfg).double(), (0, 3), 2
    found = step(model, users)
    got = {m: table.grad.clone() for m, table in tables(model).items()}
    prompt, g = torch.tensor([[1, 0], [2, 0]]), rng()
    prefs = {m: getattr(model, f"tokens_{m}")[list(users)] for m in MODALITIES}
    n_image, n_text = cfg.reward.images, cfg.reward.texts
    chain = model.sample_chain(prompt.repeat_interleave(n_image, 0),
                               prefs["image"].repeat_interleave(n_image, 0), g, 5, n_image)      # one noise a group
    texts = sample_text(model.text, prompt.repeat_interleave(n_text, 0), prefs["text"].repeat_interleave(n_text, 0), g,
                        guidance=2.0, top_p=cfg.text.top_p, max_len=12).tokens
    pictures, loss = model.autoencoder.decode(chain[-1]).clamp(-1, 1), 0.0
    mine = [slice(n * n_image, (n + 1) * n_image) for n in range(G)]
    written = [texts[n * n_text:(n + 1) * n_text] for n in range(G)]
    reward = slow_rewards(model, [slow_terms(model, pictures[mine[n]], chain[-1, mine[n]], written[n], user)
                                  for n, user in enumerate(users)])
    for n in range(G):
        for advantage, part in zip(slow_advantage(reward["image"][n]), range(mine[n].start, mine[n].stop)):
            for k in range(min(grad_steps, 4)):
                one = chain[:, part:part + 1]
                condition = prompt[n:n + 1], prefs["image"][n:n + 1]
                mean, std = transition(model.image, one, k, *condition, guidance=2.0 if k < 3 else 1.0, eta=1.0)
                score = torch.distributions.Normal(mean, std).log_prob(one[k + 1]).sum()
                loss = loss - advantage * score / (G * n_image)
        for advantage, text in zip(slow_advantage(reward["text"][n]), written[n]):
            score = slow_text_log_prob(model, text, prompt[n], prefs["text"][n])
            loss = loss - advantage * score / (G * n_text)
    for m, want in zip(MODALITIES, torch.autograd.grad(loss, list(tables(model).values()))):
        assert want.abs().max() > 1e-4
        assert_close(got[m], want, rtol=1e-6, atol=1e-9)
    assert_close(found.loss, loss.detach(), rtol=1e-6, atol=1e-8)


def test_reinforce_step_runs_without_a_single_look_at_its_numbers():
    model = toy().to("meta")
    assert all(x.is_meta for x in (*model.state_dict().values(),
                                   *(x for x in model.graph if isinstance(x, torch.Tensor))))
    found = step(model, with_kl=True, seed=None)
    assert found.loss.is_meta and found.kl_text.is_meta
    assert all(table.grad.shape == table.shape for table in tables(model).values())
    images, texts = model.sample_pairs(torch.ones(3, 2, dtype=torch.int64, device="meta"),
                                       {m: torch.zeros(3, 2, dtype=torch.int64, device="meta")
                                        for m in MODALITIES}, None)
    assert images.shape == (3, 3, 16, 16) and texts.shape == (3, 12)


def test_reinforce_step_keeps_double_precision():
    found = step(model := toy().double(), with_kl=True)
    assert found.loss.dtype == torch.float64
    assert all(table.grad.dtype == torch.float64 for table in tables(model).values())


def test_the_gradient_reaches_the_rows_of_the_sampled_users_and_nothing_else():
    model = toy()
    step(model, user=(0, 3))
    for m, table in tables(model).items():
        tokens = getattr(model, f"tokens_{m}")[[0, 3]] + torch.tensor([0, 4])       # row: level * K + code
        touched = table.grad.abs().sum(1).nonzero()[:, 0]
        assert touched.tolist() == sorted(set(tokens.flatten().tolist())) and len(touched) < 8
    reached = [name for name, p in model.named_parameters() if p.grad is not None]
    assert reached == ["text.preference.weight", "image.preference.weight"]


def test_the_reward_itself_has_no_gradient():
    model = toy().requires_grad_(True)
    prompt = torch.tensor([[1, 0], [2, 0]])
    model.reinforce_step(torch.tensor([0, 3]), prompt, tables(model), False, rng()).loss.backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"text", "image"}


def test_drift_is_zero_at_the_start_and_positive_after_a_change():
    model = toy().double()
    start = {m: table.detach().clone() for m, table in tables(model).items()}
    found = step(model, with_kl=True, reference=start)
    assert abs(found.kl_image) < 1e-12 and abs(found.kl_text) < 1e-12
    for m in MODALITIES:
        with torch.no_grad():
            tables(model)[m].add_(torch.randn(start[m].shape, generator=rng(), dtype=torch.float64))
        drift = step(model, with_kl=True, reference=start)
        assert getattr(drift, f"kl_{m}") > 1e-3
        assert m == "text" or abs(drift.kl_text) < 1e-12
    model.cfg = replace(CFG, reward=replace(CFG.reward, kl_text=0.0))
    off = step(model, reference=start)
    assert off.kl_image == 0 and off.kl_text == 0


def test_the_drift_of_the_texts_is_the_divergence_of_now_from_the_start():
    model = toy().double()
    start = {m: torch.randn(x.shape, generator=rng(), dtype=torch.float64) for m, x in tables(model).items()}
    found, prompt = step(model, with_kl=True, reference=start), torch.tensor([[1, 0]] * 6 + [[2, 0]] * 6)
    g, prefs = rng(), {m: getattr(model, f"tokens_{m}")[[0, 3]] for m in MODALITIES}
    model.sample_chain(prompt[::6].repeat_interleave(4, 0), prefs["image"].repeat_interleave(4, 0), g, 5)
    args = prompt, prefs["text"].repeat_interleave(6, 0)
    tokens = sample_text(model.text, *args, g, guidance=2.0, top_p=model.cfg.text.top_p, max_len=12).tokens

    def policy():
        logits = torch.lerp(model.text(tokens, prompt, None), model.text(tokens, *args),
                            model.cfg.text.guidance)
        return torch.distributions.Categorical(logits=logits[..., EOS:])
    now = policy()
    tables(model)["text"].data.copy_(start["text"])
    drift = torch.distributions.kl_divergence(now, policy()).masked_fill(tokens == PAD, 0).sum(1).mean()
    assert drift > 0.01
    assert_close(found.kl_text, drift.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_drift_is_a_penalty_with_its_weight_by_value_and_gradient(modality):
    model, losses, slopes = toy().double(), [], []
    start = {m: torch.zeros_like(table) for m, table in tables(model).items()}
    for weight in (0.0, 2.0):
        model.cfg = replace(CFG, reward=replace(CFG.reward, **{"kl_text": 0.0, f"kl_{modality}": weight}))
        for with_kl in (True, False):
            losses.append(step(model, with_kl=with_kl, reference=start))
            slopes.append(tables(model)[modality].grad)
    known, _, penalized, unlogged = losses
    drift = getattr(known, f"kl_{modality}")
    assert drift > 0.01 and getattr(unlogged, f"kl_{modality}") == drift        # measured wherever it counts
    assert_close(penalized.loss - known.loss, 2 * drift)
    assert torch.equal(unlogged.loss, penalized.loss) and torch.equal(slopes[2], slopes[3])
    table, ahead = tables(model)[modality], torch.randn(start[modality].shape, generator=rng(), dtype=torch.float64)

    def drift_at(distance):
        """Of what was sampled at the start of the test: the rollouts are taken from it, their KL from the moved table."""
        rollouts = {m: getattr(model, f"_rollout_{m}s")(torch.tensor([0, 3]), torch.tensor([[1, 0], [2, 0]]), g)
                    for g in [rng()] for m in MODALITIES}
        still = torch.zeros(len(rollouts[modality][1][0]), dtype=torch.float64)
        with torch.no_grad():
            table.add_(distance * ahead)
            kl = getattr(model, f"_{modality}_surrogate")(*rollouts[modality], still, start[modality])[1]
            table.sub_(distance * ahead)
        return kl
    slope = (drift_at(1e-5) - drift_at(-1e-5)) / 2e-5
    assert_close(((slopes[2] - slopes[0]) * ahead).sum(), 2 * slope, rtol=1e-5, atol=1e-8)


def test_bf16_is_off_where_it_is_not_wanted():
    for wanted in (0, 1):
        model = toy(replace(CFG, method=replace(CFG.method, bf16=wanted)))
        with model.half():
            assert torch.is_autocast_enabled("cpu") == model.uses_bf16
        assert wanted or not model.uses_bf16


def test_reinforce_pleases_the_person():
    """With lambda_c = 0 the reward is the user's score alone, which must rise by more than chance lets it."""
    model, seen = toy(replace(CFG, reward=replace(CFG.reward, lambda_c=0.0, images=8, texts=32)), seed=1), []
    for n, parameter in enumerate((*model.image.parameters(), *model.text.parameters())):
        # tokens matter more than in a fresh model
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng(n))
    rates = dict(image=0.3, text=1.0)
    optimizer = torch.optim.Adam([{"params": [table], "lr": rates[m]} for m, table in tables(model).items()])
    for n in range(45):
        found = step(model, user=(0, 0, 0), seed=n)
        optimizer.step()
        seen.append(torch.stack(found.parts[1:]))
    first, last = torch.stack(seen[:10]), torch.stack(seen[-10:])
    chance = (first.var(0) / 10 + last.var(0) / 10).sqrt()
    assert (last.mean(0) - first.mean(0) > 5 * chance).all(), (first.mean(0), last.mean(0), chance)


# ---- files

class Evil:
    """A pickle that runs a command when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def change(**values):
    return lambda path: torch.save(read_checkpoint(path) | values, path)


def inside(name, **values):
    return lambda path: change(**{name: read_checkpoint(path)[name] | values})(path)


def without(name):
    return lambda path: torch.save({k: v for k, v in read_checkpoint(path).items() if k != name}, path)


def reshape(path):
    checkpoint = read_checkpoint(path)
    checkpoint["model"]["preference_image"] = torch.zeros(3, 5)
    torch.save(checkpoint, path)


def cut(keep):
    """Keep so many bytes, or this share of them."""
    def change(path):
        data = path.read_bytes()
        path.write_bytes(data[:int(keep * len(data)) if 0 < keep < 1 else keep])
    return change


def folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    **{f"cut to {keep}": (cut(keep), "not a checkpoint, or damaged") for keep in (0, 1, 100, 0.3, 0.9, -1)},
    "text": (lambda path: path.write_text("hello"),
             "not a checkpoint, or damaged .*need 'DPPMG checkpoint 1'"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"format": FORMAT}, protocol=2)),
               "not a checkpoint|training is not finished"),
    "list": (lambda path: torch.save([1, 2], path), "format is None"),
    "version": (change(format="DPPMG checkpoint 0"),
                "format is 'DPPMG checkpoint 0', need 'DPPMG checkpoint 1'"),
    "unfinished": (change(done=["gnn"]),
                   r"training is not finished, done is \['gnn'\]; go on with train.py --resume"),
    "done": (change(done=None), "training is not finished"),
    "shape": (reshape, "not a model of this version .*size mismatch for preference_image"),
    **{f"no {name}": (without(name), "checkpoint.pt: ")
       for name in ("format", "done", "config", "catalogue", "model")},
    **{f"odd {name}": (change(**{name: value}), "not a model of this version")
       for name, value in (("config", None), ("config", {}), ("catalogue", {"name": "x"}), ("model", 3))},
    "merges": (inside("catalogue", merges=None), "not a model of this version"),
    "setting": (inside("config", gnn={"dim": "x"}), "settings of 'gnn'"),
    "folder": (folder, "Is a directory"), "missing": (lambda path: path.unlink(), "No such file"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(toy_run, tmp_path, damage, message):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(toy_run.read_bytes())
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        DPPMG.load(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "checkpoint.pt"
    torch.save(toy().state() | {"format": FORMAT, "done": ["reward"]}, path)
    return path


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_checkpoint_is_data_and_no_code_of_it_runs(tmp_path, how):
    path, proof = tmp_path / "checkpoint.pt", tmp_path / "pwned"
    evil = {"format": FORMAT, "done": ["reward"], "config": Evil(proof)}
    torch.save(evil, path) if how == "torch.save" else path.write_bytes(pickle.dumps(evil, protocol=2))
    with pytest.raises(CheckpointError, match="not a checkpoint, or damaged"):
        DPPMG.load(path)
    assert not proof.exists()
    torch.load(path, weights_only=False) if how == "torch.save" else pickle.loads(path.read_bytes())
    assert proof.exists()       # the trap was live


def test_a_saved_model_generates_the_same(toy_run):
    one, two = toy(), DPPMG.load(toy_run)
    args = dict(prompt="fish", user="u3", n=2, seed=5)
    assert one.cfg == two.cfg and same(one.generate(**args), two.generate(**args))
    # the folder instead of the file
    assert same(one.generate(**args), DPPMG.load(toy_run.parent).generate(**args))


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half of the n")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"] and path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"] and path.read_text() == "new"


# ---- command line

def run_main(*arguments):
    """Exit status of the command line."""
    try:
        return dppmg.main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code


def test_the_command_prints_texts_and_writes_pictures(smoke, tmp_path):
    arguments = ["--user", "u003", "--prompt", "Fish", "--n", "3", "--seed", "7"]
    process = spawn(str(ROOT / "dppmg.py"), str(smoke), *arguments, cwd=tmp_path)
    printed, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    names = ["dppmg.png", "dppmg-2.png", "dppmg-3.png"]
    wanted = DPPMG.load(smoke).generate("fish", "u003", n=3, seed=7)
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert re.findall(r"^(dppmg\S*): ", printed, re.MULTILINE) == names
    for name, want in zip(names, wanted):
        with Image.open(tmp_path / name) as image:
            assert (image.format, image.mode, image.tobytes()) == ("PNG", "RGB", want.image.tobytes())


@pytest.mark.parametrize("name, kind",
                         [("a.jpg", "JPEG"), ("b.webp", "WEBP"), ("c", "PNG"), ("d.psd", "PNG")])
def test_the_command_writes_the_kind_of_file_that_the_name_says(toy_run, tmp_path, name, kind):
    assert run_main(toy_run, "--history", "i3", "i4", "--prompt", "", "--out", tmp_path / name) == 0
    with Image.open(tmp_path / name) as image:
        assert image.format == kind and image.size == (16, 16)


def test_a_generated_text_cannot_command_the_terminal(toy_run, tmp_path, capsys, monkeypatch):
    evil = dppmg.Generated(Image.new("RGB", (8, 8)), "red \x1b[31m bell \a line\nline \x9b \u2028 fin")
    monkeypatch.setattr(DPPMG, "generate", lambda *_: [evil])
    assert run_main(toy_run, "--prompt", "fish", "--out", tmp_path / "a.png") == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "fin" in printed
    assert not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f\u2028]", printed)


@pytest.mark.parametrize("arguments, message", [
    (["--prompt", "fish", "--user", "bob"], "unknown user 'bob': known are u0"),
    (["--prompt", "fisch"], "unknown prompt word 'fisch': known are fish"),
    (["--prompt", "fish", "--history", "i1", "i99"], "unknown item 'i99': known are i9"),
    (["--prompt", "fish", "--user", "u1", "--history", "i1"], "not both"),
    (["--prompt", "fish", "--histroy", "i1"], "unknown flag --histroy: known are --history"),
    (["--prompt", "fish", "--n", "0"], "--n 0: need n >= 1"),
    (["--prompt", "fish", "--n", "some"], "invalid int value: 'some'"),
    (["--prompt", "fish", "--device", "gpu"], "--device gpu: not to be had here"),
    (["--prompt", "fish", "--device", "meta"], "--device meta: not to be had here"),
    (["--prompt", "fish", "--out", "missing/a.png"], "--out missing/a.png: No such file or directory"),
    (["--prompt", "fish", "--out", "."], "--out '.': need the name of a file"),
    (["--prompt", "fish", "--seed", "1" + "0" * 30], "Overflow"), ([], "--prompt")])
def test_a_mistake_costs_one_line_and_status_2(toy_run, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run_main(toy_run, *arguments) == 2
    printed, errors = capsys.readouterr()
    assert printed == "" and errors.count("\n") == 1 and errors.startswith("dppmg.py: error: ")
    assert message in errors
    assert os.listdir(tmp_path) == []


def test_a_run_that_is_not_there_costs_one_line(tmp_path, capsys):
    assert run_main(tmp_path / "nowhere", "--prompt", "fish") == 2
    assert re.fullmatch(r"dppmg.py: error: \S+nowhere: No such file or directory; need a run of train.py\n",
                        capsys.readouterr().err)
