"""dppmg.py: settings, tables, generation, a REINFORCE step by a slow formula, files, command line."""
import math
import os
import pickle
import re
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from conftest import PATIENCE, ROOT, Fork, spawn
from PIL import Image
from torch.distributions import Categorical, Normal, kl_divergence
from torch.testing import assert_close

import dppmg
import train
from dppmg import (DPPMG, FORMAT, MODALITIES, Catalogue, CheckpointError, Config, MethodConfig,
                   flag_of, parse_prompt, read_checkpoint, replacing, table_as)
from generators import (EOS, T_MAX, ImageConfig, TextConfig, Tokenizer, denoise, sample_latents,
                        sample_text)
from gnn import GNNConfig
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
    RewardConfig(scorer_width=8, scorer_dim=8, images=4, texts=6, diffusion_steps=5))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def toy(cfg=CFG, seed=0):
    """A small DPPMG of 6 users and 12 items: untrained, but each of its parts does something."""
    tokenizer = Tokenizer.train(TEXTS, cfg.text.vocab_size)
    user, item = (torch.rand(6, 12, generator=rng(seed)) < 0.4).nonzero().T
    users, items = ([f"{kind}{n}" for n in range(count)] for kind, count in (("u", 6), ("i", 12)))
    catalogue = Catalogue("toys", users, items, ["boat", "fish"], 2, 12, tokenizer.state(), user, item)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DPPMG(cfg, catalogue)
        for parameter in model.parameters():  # the denoiser's last layer starts at zero
            parameter.data += 0.1 * torch.randn_like(parameter)
        latents, tokens = torch.randn(12, 4, 4, 4), tokenizer.encode_batch(TEXTS, 12)[0]
        model.image_features.fit(latents)
        model.text_features.fit(tokens)
        model.gnn.set_features("image", model.image_features(latents))
        model.gnn.set_features("text", model.text_features(tokens))
        rows = {m: users.detach() for m, (users, _) in model.gnn(model.graph).items()}
        for m, taste in model.modality.items():
            taste.quantizer.initialize(rows[m])
        model.update_preferences(rows)
        model.seed_tables(None)
    return model.eval()


# ---- settings

def changed(group, **values):
    """CFG with some settings of one group changed."""
    return replace(CFG, **{group: replace(getattr(CFG, group), **values)})


@pytest.mark.parametrize("group, values, message", [
    ("gnn", dict(dim=0), "--gnn-dim 0: need a finite int >= 1"),
    ("gnn", dict(dim=2.0), "--gnn-dim 2.0: need a finite int"),
    ("gnn", dict(dim="wide"), "--gnn-dim wide: need a finite int"),
    ("vq", dict(codes=None), "--vq-codes None: need a finite int"),
    ("gnn", dict(lr=-0.1), "--gnn-lr -0.1: need a finite float >= 0"),
    ("method", dict(seed=-1), "--seed -1: need a finite int >= 0 and <= "),
    ("method", dict(seed=2**63), "--seed 9223372036854775808: need a finite int >= 0 and <= "),
    ("method", dict(image_features=0), "--image-features 0: need a finite int >= 1"),
    ("vq", dict(ema_decay=1.0), "--vq-ema-decay 1.0: need a finite float >= 0 and <= 0.9999"),
    ("text", dict(vocab_size=259), "--text-vocab-size 259: need a finite int >= 260"),
    ("text", dict(null_rate=1.0), "--text-null-rate 1.0: need a finite float >= 0 and <= 0.99"),
    ("text", dict(top_p=0.0), "--text-top-p 0.0: need a finite float >= 0.001 and <= 1"),
    ("text", dict(top_p=1.1), "--text-top-p 1.1: need"), ("text", dict(heads=3), "--text-heads 3: need a divisor"),
    ("image", dict(size=12), "--image-size 12: need a multiple of 8"),
    ("image", dict(ae_width=24), "--image-ae-width 24: need a multiple of 16"),
    ("image", dict(width=12), "--image-width 12: need a multiple of 8"),
    ("image", dict(heads=3), "--image-heads 3: need a divisor of 16"),
    ("image", dict(eta=1.5), "--image-eta 1.5: need a finite float >= 0 and <= 1"),
    ("image", dict(eta=0.0), "--image-eta 0.0: need > 0, or --reward-rounds 0"),
    ("text", dict(temperature=0.0), "--text-temperature 0.0: need > 0, or --reward-rounds 0"),
    ("reward", dict(lambda_c=0.0, lambda_p=0.0), "--reward-lambda-p 0.0: need"),
    ("reward", dict(images=1), "--reward-images 1: need a finite int >= 2"),
    ("reward", dict(texts=1), "--reward-texts 1: need a finite int >= 2"),
    ("reward", dict(scorer_batch=1), "--reward-scorer-batch 1: need a finite int >= 2"),
    ("reward", dict(scorer_width=12), "--reward-scorer-width 12: need a multiple of 8"),
    ("reward", dict(scorer_temperature=0.001), "--reward-scorer-temperature 0.001: need"),
    ("reward", dict(scorer_mirror=2), "--reward-scorer-mirror 2: need")])
def test_a_setting_that_cannot_work_is_refused_with_flag_value_and_cure(group, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        changed(group, **values)


def test_every_number_has_a_least_value_and_must_be_finite():
    for group in fields(Config):
        for field in fields(group.default):
            wrong = [math.nan, math.inf, -math.inf, -100, "1", None]
            for value in wrong:
                flag = re.escape(f"{flag_of(group.name, field.name)} {value}: need a finite ")
                with pytest.raises(ValueError, match=flag):
                    changed(group.name, **{field.name: value})


@pytest.mark.parametrize("group, values", [
    ("gnn", dict(lr=1)), ("method", dict(seed=2**63 - 1)), ("method", dict(bf16=False)), ("text", dict(top_p=1)),
    ("image", dict(time_mean=-1.0)), ("image", dict(eta=0.5)), ("reward", dict(lambda_c=0.0)),
    ("reward", dict(lambda_p=0.0)), ("reward", dict(rounds=0)), ("text", dict(vocab_size=260))])
def test_a_setting_at_its_limit_is_accepted(group, values):
    cfg = changed(group, **values)
    assert Config.from_dict(asdict(cfg)) == cfg


def test_what_only_the_reward_needs_is_free_without_it():
    still = replace(CFG.reward, rounds=0)
    cfg = replace(CFG, reward=still, image=replace(CFG.image, eta=0.0), text=replace(CFG.text, temperature=0.0))
    assert (cfg.image.eta, cfg.text.temperature) == (0, 0)


@pytest.mark.parametrize("values", [{}, {"gnn": {}}, asdict(CFG) | {"gnn": {"depth": 3}},
                                    asdict(CFG) | {"gnn": None}, asdict(CFG) | {"gnn": {"dim": 0}}])
def test_what_are_no_settings_make_no_config(values):
    with pytest.raises((KeyError, ValueError, TypeError)):
        Config.from_dict(values)


def test_flags_and_their_help_are_those_of_the_fields():
    found = train.settings({"gnn": GNNConfig, "method": MethodConfig})
    assert [name for group, name, _, _ in found if group == "gnn"] == [f.name for f in fields(GNNConfig)]
    for group, name, field, text in found:
        assert text and field.name == name
        assert flag_of(group, name) == "--" + ("gnn-" if group == "gnn" else "") + name.replace("_", "-")


# ---- tables of preference tokens

def test_seeded_tables_have_the_geometry_of_the_codebooks():
    model = toy()
    before = {m: getattr(model, m).preference.weight.detach().clone() for m in MODALITIES}
    model.seed_tables(rng())
    for m in MODALITIES:
        table = getattr(model, m).preference.weight.detach()
        books = [book.codebook for book in model.modality[m].quantizer.codebooks]
        # level 0 has the size that the table's rows had; the others follow
        size = books[0].square().sum(1).mean()
        mean = before[m].square().sum(1).mean()
        assert_close(table[:4].square().sum(1).mean(), mean, rtol=1e-3, atol=0)
        factor = table[:4].square().sum(1).mean() / size
        gram = factor * torch.cat(books) @ torch.cat(books).T
        assert_close(table @ table.T, gram, rtol=1e-3, atol=1e-6)


def test_seeded_tables_come_from_their_generator_and_from_nothing_else():
    model, found = toy(), []
    sizes = {m: getattr(model, m).preference.weight.detach().clone() for m in MODALITIES}
    for seed, around in ((1, 2), (1, 3), (4, 3)):
        torch.manual_seed(around)
        state = torch.get_rng_state()
        for m in MODALITIES:
            getattr(model, m).preference.weight.data.copy_(sizes[m])
        model.seed_tables(rng(seed))
        assert torch.equal(torch.get_rng_state(), state)
        found.append([getattr(model, m).preference.weight.detach().clone() for m in MODALITIES])
    for one, two, three in zip(*found):
        assert torch.equal(one, two) and not torch.allclose(one, three)


def test_table_as_restores_the_table_even_after_an_exception():
    model = toy()
    weight = model.text.preference.weight
    kept, place, other = weight.detach().clone(), weight.data_ptr(), torch.zeros_like(weight)
    with pytest.raises(RuntimeError, match="within"), table_as(model.text, other):
        assert model.text.preference.weight is weight and weight.abs().sum() == 0
        raise RuntimeError("within")
    assert torch.equal(weight, kept) and weight.data_ptr() == place


def test_some_users_preferences_are_taken_over_and_quantized_and_no_others():
    model = toy()
    before = {m: (taste.preference.clone(), taste.tokens.clone()) for m, taste in model.modality.items()}
    new = {m: torch.randn(6, 12, generator=rng(3)) for m in MODALITIES}
    model.update_preferences(new, torch.tensor([4, 1]))
    for m, taste in model.modality.items():
        assert torch.equal(taste.preference[[1, 4]], new[m][[1, 4]])
        assert torch.equal(taste.tokens[[1, 4]], taste.quantizer.encode(new[m][[1, 4]]))
        for now, was in zip((taste.preference, taste.tokens), before[m]):
            assert torch.equal(now[[0, 2, 3, 5]], was[[0, 2, 3, 5]])


def test_null_tokens_stand_for_no_preference_and_others_for_their_codes():
    taste = toy().modality["text"]
    tokens = torch.tensor([[1, 2], [-1, -1], [3, 0]])
    found = taste.decode(tokens)
    assert torch.equal(found[[0, 2]], taste.quantizer.decode(tokens[[0, 2]]))
    assert found[1].abs().max() == 0 and found[0].abs().max() > 0


# ---- prompts, generation, new users

def test_prompts_are_encoded_and_unknown_words_are_named():
    catalogue = toy().catalogue
    assert parse_prompt("Fish,  BOAT,fish") == ("fish", "boat")
    assert catalogue.encode_prompts([("fish", "boat"), ("boat",), ()]).tolist() == [[2, 1], [1, 0], [0, 0]]
    assert catalogue.encode_prompts([("fish",) * 3]).tolist() == [[2, 2, 2]]
    with pytest.raises(ValueError, match="unknown prompt word 'fisch': known are fish .2 in all"):
        catalogue.encode_prompts([("boat",), ("fisch",)])


@pytest.fixture(scope="module")
def model(smoke):
    return DPPMG.load(smoke)


def same(one, two):
    assert len(one) == len(two)
    return all(a.text == b.text and a.image.tobytes() == b.image.tobytes() for a, b in zip(one, two))


def test_generation_repeats_by_seed_and_differs_by_seed_user_and_prompt(model):
    args = dict(prompt="fish", person="u001", n=2)
    made = model.generate(**args)
    assert same(made, model.generate(**args, seed=0))
    history = [model.catalogue.item_ids[i] for i in model.catalogue.item[model.catalogue.user == 2].tolist()]
    for other in (args | dict(seed=1), args | dict(prompt="boat"), args | dict(person="u002"),
                  dict(prompt="fish", n=2),
                  dict(prompt="fish", n=2, person=history)):
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
    (dict(person="u0"), "unknown user 'u0': known are u0"), (dict(person=""), "unknown user ''"),
    (dict(person=1.5), "unknown user '1.5'"), (dict(person=False), "unknown user 'False'"),
    (dict(person=[]), "empty history"), (dict(person=np.array([])), "empty history"),
    (dict(person=["s0000", "sticker"]), "unknown item 'sticker': known are s0000"),
    (dict(person=np.array([3, 5])), "unknown item '3'"),
    (dict(n=0), "n=0, best_of=1: both need to be at least 1"), (dict(n=-1), "n=-1, best_of=1: both"),
    (dict(best_of=0), "n=1, best_of=0: both need"),
    (dict(prompt="fish, chips"), "unknown prompt word 'chips': known are")])
def test_what_is_not_known_is_named(model, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(**{"prompt": "fish"} | arguments)


def test_no_history_at_all_is_named(model):
    for histories in ([], [[]], [["s0000"], ()], np.zeros((0, 3))):
        with pytest.raises(ValueError, match="empty history"):
            model.fold_in(histories)


def test_a_device_that_is_not_here_is_called_one(toy_run):
    with pytest.raises(ValueError, match="--device gpu: not to be had here") as caught:
        DPPMG.load(toy_run, "gpu")
    assert not isinstance(caught.value, CheckpointError)


def test_a_training_user_folded_in_keeps_preferences_and_tokens(model):
    user, item = model.catalogue.user, model.catalogue.item
    trained, n_users = user.unique(), len(model.catalogue.user_ids)
    folded = model.gnn.fold_in(model.graph, user, item, n_users)
    histories = [[model.catalogue.item_ids[i] for i in item[user == u].tolist()] for u in trained]
    tokens = model.fold_in(histories)
    for m, taste in model.modality.items():
        own = torch.nn.functional.normalize(taste.preference[trained], dim=1)
        cosine = torch.nn.functional.normalize(folded[m][trained], dim=1) @ own.T
        assert cosine.diagonal().min() > 0.9
        assert (cosine.argmax(1) == torch.arange(len(trained))).double().mean() > 0.8
        assert (tokens[m] == taste.tokens[trained]).double().mean() > 0.7
    doubled = [history * 2 for history in reversed(histories)]  # neither order nor repetition matters
    assert all(torch.equal(model.fold_in(doubled)[m].flip(0), tokens[m]) for m in MODALITIES)


def test_ids_may_be_of_any_kind_and_count_as_strings():
    model = toy()
    model.catalogue.user_ids, model.catalogue.item_ids = ([str(n) for n in range(k)] for k in (6, 12))
    assert same(model.generate("fish", 3), model.generate("fish", "3"))
    assert same(model.generate("fish", np.int64(3)), model.generate("fish", np.str_("3")))
    made = model.generate("fish", ["1", "4"])
    for history in ([1, 4], ("1", "4"), np.array([4, 1]), np.array(["1", "4"]), {1: "x", 4: "y"}.keys(),
                    (n for n in (1, 4)), {"1", "4"}, torch.tensor([1, 4])):
        assert same(made, model.generate("fish", history))
    assert not same(made, model.generate("fish", [1]))
    tokens = model.fold_in([["1", "4"], ["2", "3"]])
    for m, found in model.fold_in(np.array([[1, 4], [2, 3]])).items():
        assert torch.equal(found, tokens[m])
    assert model.catalogue.place("item", [11, "0"]) == [11, 0]


def test_a_prompt_of_nothing_and_one_longer_than_any_in_the_catalogue_work(model):
    for prompt in ("", "fish, moon, star, tree"):
        assert len(model.generate(prompt, "u003")) == 1


def test_any_whole_number_is_a_seed_and_different_ones_differ():
    model = toy()
    made = [model.generate("fish", "u3", seed=seed) for seed in (0, -1, 10**20, 10**20 + 1)]
    assert not any(same(made[k], other) for k in range(4) for other in made[:k])
    assert same(made[2], model.generate("fish", "u3", seed=10**20))
    assert same(made[0], model.generate("fish", "u3", np.int64(1), np.int64(0), np.uint8(1)))


@pytest.mark.parametrize("wrong", [dict(n=1.5), dict(n="2"), dict(best_of=2.0), dict(seed=0.5)])
def test_a_number_that_is_no_integer_is_refused(model, wrong):
    with pytest.raises(TypeError, match="interpreted as an integer"):
        model.generate("fish", **wrong)


def test_a_prompt_may_be_a_list_of_phrases(model):
    made = model.generate("fish, moon")
    assert same(made, model.generate(["fish", "moon"])) and same(made, model.generate(("Fish", " moon")))


# ---- one step of REINFORCE

def tables(model):
    return {m: getattr(model, m).preference.weight for m in MODALITIES}


PROMPT = torch.tensor([[1, 0], [2, 0]])     # boat, fish: of the users 0 and 3


def step(model, user=(0, 3), reference=None, seed=0):
    """A step with only the tables trainable, and its loss's gradient in them. Prompts: boat, fish, ..."""
    model.requires_grad_(False)
    for table in tables(model).values():
        table.requires_grad_().grad = None
    user = torch.tensor(user, device=model.graph.col.device)
    prompt = torch.stack([torch.arange(len(user), device=user.device) % 2 + 1, torch.zeros_like(user)], 1)
    generator = None if seed is None else rng(seed)
    found = model.reinforce_step(user, prompt, reference or tables(model), generator)
    found.loss.backward()
    return found


def slow_advantage(reward):
    others = [reward[:i] + reward[i + 1:] for i in range(len(reward))]
    return [own - sum(rest) / len(rest) for own, rest in zip(reward, others)]


def slow_normalized(groups):
    """Each group without its mean, over the deviation that all have together."""
    centred = [[x - sum(group) / len(group) for x in group] for group in groups]
    n = sum(map(len, centred))
    size = (sum(x * x for group in centred for x in group) / n) ** 0.5 + 1e-4
    return [[x / size for x in group] for group in centred]


def slow_terms(model, pictures, latents, texts, user):
    """(modality, term) -> a value for each of a group's images or texts, by the formula, pair by pair."""
    x, y = model.scorer.encode_image(pictures), model.scorer.encode_text(texts)
    cosine = [[(a * b).sum() for b in y] for a in x]
    found = {("image", "c"): [sum(row) / len(row) for row in cosine],
             ("text", "c"): [sum(column) / len(column) for column in zip(*cosine)]}
    for m, features, made in (("image", model.image_features, latents),
                              ("text", model.text_features, texts)):
        w_f = [model.gnn.embed_content(m, features(one[None]))[0] for one in made]
        found[m, "s"] = [model.modality[m].preference[user] @ x for x in w_f]
    return found


def slow_rewards(model, terms):
    """{modality: [[reward of each sample] of each group]} from the terms of each group."""
    cfg, rewards = model.cfg.reward, {}
    for m in MODALITIES:
        c, s = (slow_normalized([group[m, term] for group in terms]) for term in "cs")
        rewards[m] = [[cfg.lambda_c * a + cfg.lambda_p * b for a, b in zip(*group)] for group in zip(c, s)]
    return rewards


def guided_texts(model, tokens, prompt, prefs):
    """Logits of EOS and what follows it, for each place of one text: those sampled from, and as trained."""
    null = torch.full_like(prefs, -1)
    cond, null = (model.text(tokens[None], prompt[None], x[None])[0, :, EOS:] for x in (prefs, null))
    return (null + model.cfg.text.guidance * (cond - null)) / model.cfg.text.temperature, cond


def length(tokens):
    return tokens.tolist().index(EOS) + 1 if EOS in tokens else len(tokens)


def slow_text_log_prob(model, tokens, prompt, prefs):
    """log p of one text, token by token, under the guided distribution without PAD and BOS, within the
    nucleus of the unguided one."""
    total = 0.0
    for t, (logits, cond) in enumerate(zip(*guided_texts(model, tokens, prompt, prefs))):
        if t == length(tokens):
            break
        likely, mass, nucleus = cond.softmax(0), 0.0, []
        for v in likely.argsort(descending=True).tolist():
            if mass < model.cfg.text.top_p:
                nucleus.append(v)
            mass = mass + likely[v].item()
        token = tokens[t] - EOS
        assert token in nucleus
        policy = torch.full_like(logits, -torch.inf).index_put((torch.tensor(nucleus),), logits[nucleus])
        total = total + Categorical(logits=policy).log_prob(token)
    return total


def slow_text_kl(model, tokens, prompt, prefs, reference):
    """KL of what the tokens were drawn from, without the nucleus, from the same by the reference table."""
    now, _ = guided_texts(model, tokens, prompt, prefs)
    with torch.no_grad(), table_as(model.text, reference):
        start, _ = guided_texts(model, tokens, prompt, prefs)
    return kl_divergence(Categorical(logits=now), Categorical(logits=start))[:length(tokens)].sum()


def slow_first_step(model, noise, prompt, prefs):
    """Mean and deviation of DDIM's first step, eta = 1, from one noise (C, h, h), on numbers."""
    n, time = model.cfg.reward.diffusion_steps, noise.new_full((1,), T_MAX)
    v, null = (model.image(noise[None], time, prompt[None], x[None])[0]
               for x in (prefs, torch.full_like(prefs, -1)))
    v = null + model.cfg.image.guidance * (v - null)
    angle, later = T_MAX * math.pi / 2, T_MAX * (n - 1) / n * math.pi / 2
    alpha, sigma, alpha_s, sigma_s = math.cos(angle), math.sin(angle), math.cos(later), math.sin(later)
    std = sigma_s / sigma * (1 - (alpha / alpha_s) ** 2) ** 0.5
    clean, eps = alpha * noise - sigma * v, sigma * noise + alpha * v
    return alpha_s * clean + (sigma_s**2 - std**2) ** 0.5 * eps, std


def test_reinforce_step_has_value_and_gradient_of_the_slow_formula():
    cfg = replace(CFG, reward=replace(CFG.reward, lambda_p=0.7, lambda_c=1.3, kl_image=0.3, kl_text=0.4),
                  text=replace(CFG.text, temperature=0.8))
    model, users, g = toy(cfg).double(), (0, 3), rng()
    start = {m: torch.randn(x.shape, generator=rng(9), dtype=x.dtype) for m, x in tables(model).items()}
    found = step(model, users, start)
    got = {m: table.grad.clone() for m, table in tables(model).items()}
    prefs = model.user_tokens(torch.tensor(users))
    n, n_text = cfg.reward.images, cfg.reward.texts
    noise = torch.randn(2, 4, 4, 4, generator=g, dtype=torch.float64)  # one for all of a group
    steps = [slow_first_step(model, noise[k], PROMPT[k], prefs["image"][k]) for k in (0, 1)]
    mean, std = torch.stack([mean for mean, _ in steps]), steps[0][1]
    chance = torch.randn(2 * n, 4, 4, 4, generator=g, dtype=torch.float64)
    first = mean.detach().repeat_interleave(n, 0) + std * chance
    times = [T_MAX * (5 - k) / 5 for k in range(1, 6)]
    latents = denoise(model.image, first, times, PROMPT.repeat_interleave(n, 0),
                      prefs["image"].repeat_interleave(n, 0), g)
    texts = sample_text(model.text, PROMPT.repeat_interleave(n_text, 0),
                        prefs["text"].repeat_interleave(n_text, 0), g, 12)
    pictures, loss = model.autoencoder.decode(latents).clamp(-1, 1), 0.0
    mine = [(slice(k * n, k * n + n), slice(k * n_text, (k + 1) * n_text)) for k in (0, 1)]
    reward = slow_rewards(model, [slow_terms(model, pictures[i], latents[i], texts[t], user)
                                  for user, (i, t) in zip(users, mine)])
    drift = {m: 0.0 for m in MODALITIES}
    for k, (images, written) in enumerate(mine):
        for advantage, z in zip(slow_advantage(reward["image"][k]), first[images]):
            loss = loss - advantage * Normal(mean[k], std).log_prob(z).sum() / (2 * n)
        with torch.no_grad(), table_as(model.image, start["image"]):
            was, _ = slow_first_step(model, noise[k], PROMPT[k], prefs["image"][k])
        drift["image"] += kl_divergence(Normal(mean[k], std), Normal(was, std)).sum() / 2
        for advantage, text in zip(slow_advantage(reward["text"][k]), texts[written]):
            condition = text, PROMPT[k], prefs["text"][k]
            loss = loss - advantage * slow_text_log_prob(model, *condition) / (2 * n_text)
            drift["text"] += slow_text_kl(model, *condition, start["text"]) / (2 * n_text)
    loss = loss + 0.3 * drift["image"] + 0.4 * drift["text"]
    for m, want in zip(MODALITIES, torch.autograd.grad(loss, list(tables(model).values()))):
        assert want.abs().max() > 1e-4
        assert_close(got[m], want, rtol=1e-6, atol=1e-9)
        assert_close(getattr(found, f"kl_{m}"), drift[m].detach(), rtol=1e-6, atol=1e-9)
        parts = sum(sum(group[m, "s"]) for group in [slow_terms(model, pictures[i], latents[i], texts[t], u)
                                                     for u, (i, t) in zip(users, mine)])
        assert_close(getattr(found.parts, f"s_{m}"), parts.detach() / (2 * (n if m == "image" else n_text)))
    assert_close(found.loss, loss.detach(), rtol=1e-6, atol=1e-8)


def test_reinforce_step_runs_without_a_single_look_at_its_numbers():
    """Texts of at most 8 tokens: within longer ones sampling looks every 8 whether all have ended."""
    model = toy().to("meta")
    model.catalogue.max_tokens = 8
    assert all(x.is_meta for x in (*model.state_dict().values(), model.graph.row_ptr, model.graph.col))
    found = step(model, seed=None)
    assert found.loss.is_meta and found.kl_text.is_meta
    assert all(table.grad.shape == table.shape for table in tables(model).values())


def test_reinforce_step_keeps_double_precision():
    found = step(model := toy().double())
    assert found.loss.dtype == torch.float64
    assert all(table.grad.dtype == torch.float64 for table in tables(model).values())


def test_the_gradient_reaches_the_rows_of_the_sampled_users_and_nothing_else():
    model = toy()
    step(model, user=(0, 3))
    for m, table in tables(model).items():
        tokens = model.modality[m].tokens[[0, 3]] + torch.tensor([0, 4])  # row: level * K + code
        touched = table.grad.abs().sum(1).nonzero()[:, 0]
        assert touched.tolist() == sorted(set(tokens.flatten().tolist())) and len(touched) < 8
    reached = [name for name, p in model.named_parameters() if p.grad is not None]
    assert reached == ["text.preference.weight", "image.preference.weight"]


def test_the_reward_itself_has_no_gradient():
    model = toy().requires_grad_(True)
    model.reinforce_step(torch.tensor([0, 3]), PROMPT, tables(model), rng()).loss.backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"text", "image"}


def test_drift_is_zero_at_the_start_and_positive_after_a_change():
    model = toy().double()
    start = {m: table.detach().clone() for m, table in tables(model).items()}
    found = step(model, reference=start)
    assert abs(found.kl_image) < 1e-12 and abs(found.kl_text) < 1e-12
    for m in MODALITIES:
        with torch.no_grad():
            tables(model)[m].add_(torch.randn(start[m].shape, generator=rng(), dtype=torch.float64))
        drift = step(model, reference=start)
        assert getattr(drift, f"kl_{m}") > 1e-3
        assert m == "text" or abs(drift.kl_text) < 1e-12
    assert all(not torch.equal(table, start[m]) for m, table in tables(model).items())  # and is back


def test_bf16_is_off_where_it_is_not_wanted_or_not_fast(monkeypatch):
    for wanted in (True, False):
        for fast in (True, False):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
            with toy(changed("method", bf16=wanted)).half():
                assert torch.is_autocast_enabled("cpu") == (wanted and fast)


def test_reinforce_pleases_the_person():
    """With lambda_c = 0 the reward is the user's score alone: from the same noise, samples score more."""
    model = toy(changed("reward", lambda_c=0.0, images=8, texts=16, kl_text=0.0), seed=1)
    for n, parameter in enumerate((*model.image.parameters(), *model.text.parameters())):
        # tokens matter more than in a fresh model
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng(n))
    user, prompt = torch.zeros(300, dtype=torch.int64), torch.tensor([[1, 0]]).expand(300, -1)

    def scores():
        prefs = model.user_tokens(user)
        made = {"image": sample_latents(model.image, prompt, prefs["image"], rng(5), steps=5),
                "text": model.sample_tokens(prompt, prefs["text"], rng(6))}
        return {m: model.score(m, taste.preference[user], made[m]) for m, taste in model.modality.items()}
    rates, before = dict(image=0.3, text=1.0), scores()
    optimizer = torch.optim.Adam([{"params": [table], "lr": rates[m]} for m, table in tables(model).items()])
    for n in range(30):
        step(model, user=(0,) * 6, seed=n)
        optimizer.step()
    for m, after in scores().items():
        rise = after - before[m]
        assert rise.mean() > 5 * rise.std() / len(rise) ** 0.5, (m, rise.mean(), rise.std())


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
    checkpoint["model"]["modality.image.preference"] = torch.zeros(3, 5)
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
    **{f"cut to {keep}": (cut(keep), "not a checkpoint of train.py, or damaged") for keep in (0, 1, 100, 0.3, 0.9, -1)},
    "text": (lambda path: path.write_text("hello"),
             "not a checkpoint of train.py, or damaged: .*need 'DPPMG checkpoint 2'"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"format": FORMAT}, protocol=2)),
               "not a checkpoint|done"),
    "list": (lambda path: torch.save([1, 2], path), "not a checkpoint of train.py, or damaged: TypeError"),
    "version": (change(format="DPPMG checkpoint 0"),
                r"format is 'DPPMG checkpoint 0'.*need 'DPPMG checkpoint 2'"),
    "unfinished": (change(done=["gnn"]),
                   r"training is not finished, done is \['gnn'\]; go on with train.py --resume"),
    "done": (change(done=None), "no finished model"),
    "shape": (reshape, "no finished model of this version: .*size mismatch for modality.image.preference"),
    **{f"no {name}": (without(name), "checkpoint.pt: ")
       for name in ("format", "done", "config", "catalogue", "model")},
    **{f"odd {name}": (change(**{name: value}), "no finished model of this version:")
       for name, value in (("config", None), ("config", {}), ("catalogue", {"name": "x"}), ("model", 3))},
    "merges": (inside("catalogue", merges=None), "no finished model of this version:"),
    "setting": (inside("config", gnn={"dim": "x"}), "no finished model of this version: .*--gnn-dim x: need a finite int"),
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
    with pytest.raises(CheckpointError, match="not a checkpoint of train.py, or damaged"):
        DPPMG.load(path)
    assert not proof.exists()
    torch.load(path, weights_only=False) if how == "torch.save" else pickle.loads(path.read_bytes())
    assert proof.exists()       # the trap was live


def test_a_saved_model_generates_the_same(toy_run):
    one, two = toy(), DPPMG.load(toy_run)
    args = dict(prompt="fish", person="u3", n=2, seed=5)
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
    printed, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, "")
    names = ["dppmg.png", "dppmg-2.png", "dppmg-3.png"]
    wanted = DPPMG.load(smoke).generate("fish", "u003", n=3, seed=7)
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert re.findall(r"^(dppmg\S*): ", printed, re.MULTILINE) == names
    for name, want in zip(names, wanted):
        with Image.open(tmp_path / name) as image:
            assert (image.format, image.mode, image.tobytes()) == ("PNG", "RGB", want.image.tobytes())


@pytest.mark.parametrize("name, kind",
                         [("a.jpg", "JPEG"), ("b.webp", "WEBP"), ("c.PNG", "PNG"), ("d.e.Jpeg", "JPEG")])
def test_the_command_writes_the_kind_of_file_that_the_name_says(toy_run, tmp_path, name, kind):
    assert run_main(toy_run, "--history", "i3", "i4", "--prompt", "", "--out", tmp_path / name) == 0
    with Image.open(tmp_path / name) as image:
        assert image.format == kind and image.size == (16, 16)


def test_nothing_need_be_asked_for(toy_run, tmp_path):
    assert run_main(toy_run, "--out", tmp_path / "a.png") == 0 and (tmp_path / "a.png").exists()


def test_a_generated_text_cannot_command_the_terminal(toy_run, tmp_path, capsys, monkeypatch):
    evil = dppmg.Generated(Image.new("RGB", (8, 8)), "red \x1b[31m bell \a line\nline \x9b \u2028 fin")
    monkeypatch.setattr(DPPMG, "generate", lambda *_, **__: [evil])
    assert run_main(toy_run, "--prompt", "fish", "--out", tmp_path / "a.png") == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "fin" in printed
    assert not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f\u2028]", printed)


@pytest.mark.parametrize("arguments, message", [
    (["--prompt", "fish", "--user", "bob"], "unknown user 'bob': known are u0"),
    (["--prompt", "fisch"], "unknown prompt word 'fisch': known are fish"),
    (["--prompt", "fish", "--history", "i1", "i99"], "unknown item 'i99': known are i9"),
    (["--prompt", "fish", "--user", "u1", "--history", "i1"], "argument --history: not allowed with argument --user"),
    (["--prompt", "fish", "--histroy", "i1"], "unknown flag --histroy: known are --history"),
    (["--prompt", "fish", "--n", "0"], "n=0, best_of=1: both need to be at least 1"),
    (["--prompt", "fish", "--best-of", "0"], "n=1, best_of=0: both need to be at least 1"),
    (["--prompt", "fish", "--n", "some"], "invalid int value: 'some'"),
    (["--prompt", "fish", "--device", "gpu"], "device gpu: not to be had here"),
    (["--prompt", "fish", "--device", "meta"], "device meta: not to be had here"),
    (["--prompt", "fish", "--out", "missing/a.png"], "--out missing/a.png: need a .png or .jpg in a folder that exists"),
    (["--prompt", "fish", "--out", "."], "--out .: need a .png or .jpg"),
    (["--prompt", "fish", "--out", "a.gif"], "--out a.gif: need a .png or .jpg"),
    (["--prompt"], "--prompt: expected one argument")])
def test_a_mistake_costs_one_line_and_status_2(toy_run, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run_main(toy_run, *arguments) == 2
    printed, errors = capsys.readouterr()
    assert printed == "" and errors.count("\n") == 1 and errors.startswith("dppmg.py: error: ")
    assert message in errors
    assert os.listdir(tmp_path) == []


def test_a_run_that_is_not_there_costs_one_line(tmp_path, capsys):
    assert run_main(tmp_path / "nowhere", "--prompt", "fish") == 2
    assert re.fullmatch(r"dppmg.py: error: \S+nowhere: not a checkpoint of train.py, .*No such file or directory.*\n",
                        capsys.readouterr().err)


PRINT = """if True:
    import sys, dppmg
    from PIL import Image
    dppmg.DPPMG.generate = lambda *_, **__: [dppmg.Generated(Image.new("RGB", (8, 8)), "d\u00e9j\u00e0 \u732b")] * 3
    sys.exit(dppmg.main(sys.argv[1:]))"""


@pytest.mark.parametrize("coding", ["ascii", "utf-8"])
def test_what_a_terminal_cannot_show_does_not_stop_the_pictures(toy_run, tmp_path, coding):
    def work():
        cat = dppmg.Generated(Image.new("RGB", (8, 8)), "d\u00e9j\u00e0 \u732b")
        DPPMG.generate = lambda *_, **__: [cat] * 3
        return dppmg.main([str(toy_run), "--prompt", "fish", "--out", str(out / "a.png")])
    (out := tmp_path / "out").mkdir()
    process = Fork(work, tmp_path, coding)
    printed, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, "") and len(os.listdir(out)) == 3
    cat = "d?j? ?" if coding == "ascii" else "d\u00e9j\u00e0 \u732b"
    assert printed.count("\n") == printed.count(cat) == 3


def test_a_reader_who_goes_away_does_not_stop_the_pictures(toy_run, tmp_path):
    arguments = [str(toy_run), "--prompt", "fish", "--out", str(tmp_path / "a.png")]
    process = spawn("-c", PRINT, *arguments, cwd=ROOT)
    process.stdout.close()
    assert (process.wait(timeout=PATIENCE), process.stderr.read()) == (0, "")
    assert len(os.listdir(tmp_path)) == 3
