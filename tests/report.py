"""The report: one page with all that a person wants to look at after a run.

    python tests/report.py RUN            draw RUN/report.html anew
    python tests/report.py RUN RUN        two runs side by side: compare.html in the first's folder

tests/builders.py turns values into HTML; SECTIONS, at the end, is the page's order. The page needs
no other file, no script and no library."""
from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python tests/report.py`
import train  # noqa: E402
from dppmg import Dataset, flag_of, forgive_terminals, say  # noqa: E402
from generators import denoise, sampling_times  # noqa: E402
from reward import Content, embed  # noqa: E402
from tests.builders import (STYLE, Html, bars, curves, element, figure, fold,  # noqa: E402
                            name_of, row, table, words)
from train import Run, contents, make_for, settings, values_of  # noqa: E402
from vq import code_lift  # noqa: E402

VARIANTS = {"real": "real items", "unpersonalized": "no tokens", "before_reward": "before reward",
            "after_reward": "after reward", "best_of": "best of n"}
MADE = ("before_reward", "after_reward", "best_of")


# ---- what is shown of a run ------------------------------------------------------------------

def shown_users(run: Run) -> Tensor:
    """Eight users of the test part."""
    return train.some_users(run, "report", 8)


def shown_items(run: Run) -> Tensor:
    """An item for each of the eight commonest prompts; one where all have the same, or none."""
    common = run.topic.bincount().argsort(descending=True, stable=True)[:8, None]
    return (run.topic == common).int().argmax(1)


def prompt_of(run: Run, item: int) -> str:
    """The prompt of an item as a person writes it."""
    return ", ".join(run.data.prompts[item]) or "no prompt"


def figures(run: Run, content: Content, what: Sequence[str], marked: bool = False) -> list[Html]:
    """Pictures with their texts. what: what each is, for those who do not see it; on stickers the
    referee says it better. marked: do picture and text agree? By referee and grammar, or, where
    tastes are not known, by the judge's cosine."""
    texts = run.model.tokenizer.decode_batch(content.tokens)
    if run.world:
        see, told = train.read(run, *content)
        seen = [values_of(x) for x in see.numpy()]
        what = ["{pattern} {colour} {subject} at {setting}".format(**x) for x in seen]
        marks = map(sticker_mark, seen, told.tolist(), train.agree(see, told).tolist())
    else:
        found = embed(run.modules["judge"], content)
        cosine = (found["image"] * found["text"]).sum(1)
        marks = [element("span", f"cosine {x:.2f}", class_="dull") for x in cosine.tolist()]
    marks = [element("div", x) if marked else Html() for x in marks]
    return list(map(figure, content.images, what, texts, marks))


def sticker_mark(see: dict[str, str], told: list[int], same: bool) -> Html:
    """Whether picture and text of a sticker agree; if not, in what they differ."""
    if same:
        return element("span", "✓ agree", class_="yes")
    if told[0] < 0:
        return element("span", "✗ not a sentence", class_="no")
    said = train.SUBJECTS[told[0]], train.SETTINGS[told[1]]
    k = int(see["subject"] == said[0])
    return element("span", f"✗ {(see['subject'], see['setting'])[k]} / {said[k]}", class_="no")


# ---- verdict ---------------------------------------------------------------------------------

class Check(NamedTuple):
    """Something that a healthy run has learnt."""
    claim: str
    value: object  # as it is shown
    need: str
    good: bool | None  # None: not measured


def at_least(claim: str, value: float | dict | None, least: float, why: str = "") -> Check:
    """A check of a number or of an interval, of which the mean counts."""
    number = value["mean"] if isinstance(value, dict) else math.nan if value is None else value
    good = number >= least if math.isfinite(number + least) else None
    need = f"at least {least:.3g}{why}" if math.isfinite(least) else "real items to compare with"
    return Check(claim, number if value is None else value, need, good)


def above(claim: str, value: dict | None, line: float, why: str) -> Check:
    """A check that a whole interval lies above a line."""
    good = value["low"] > line if value and math.isfinite(value["low"]) else None
    need = f"interval above {line:.3g}{why}"
    return Check(claim, math.nan if value is None else value, need, good)


def checks(run: Run) -> list[Check]:
    """What this run should have learnt, in the order in which it did."""
    m, made = run.metrics, run.metrics["generation"]
    stage1, kind = m["stage1"], "" if run.world else "judge_"
    after, was, real = (made[v] for v in ("after_reward", "before_reward", "real"))
    chance = min(1.0, 20 / len(run.data.item_ids))
    least = min(2 * chance, (1 + chance) / 2)
    usage = min(x for health in m["codebook"].values() for x in health["usage"])
    found = [
        at_least("What a person likes next is found among 20 recommended (recall@20)",
                 stage1["recall@20"], least, f", where chance is {chance:.3f}"),
        at_least("The tokens alone recommend nearly as well",
                 stage1["recall@20_quantized"] / max(stage1["recall@20"], 1e-9), 0.9,
                 " of the recall without them"),
        at_least("The codes are in use", usage, 0.9, " of each codebook")]
    for m_, thing in (("image", "Pictures"), ("text", "Texts")):
        name = f"{kind}prompt_{m_}"
        least = 0.95 if run.world else (0.5 + real.get(name, {}).get("mean", math.nan)) / 2
        why = "" if run.world else ", half the way from chance to real items"
        if name in after:  # there are prompts, and not one for all
            found.append(at_least(f"{thing} show the prompt", after[name], least, why))
        found.append(above(f"{thing} please their user more than another's would",
                           after.get(f"{kind}swap_{m_}"), 0.5, ", which is chance"))
    found.append(above("The reward makes picture and text agree more often",
                       m["differences"].get(f"{kind}consistency"), 0, ", after less before"))
    for m_, thing in (("image", "Pictures"), ("text", "Texts")):
        now, then = (x.get(f"judge_variety_{m_}", {}).get("mean", math.nan) for x in (after, was))
        found.append(at_least(f"{thing} still vary after the reward", now / max(then, 1e-9), 0.5,
                              " of what they did before it"))
    if run.world:
        found.append(at_least("Texts are sentences of the grammar", after["grammatical"], 0.95))
        found.append(at_least("The referee reads pictures right",
                              min(m["referee"].values()), 0.95, " of fresh stickers"))
    else:
        found.append(at_least("Texts are new, not copied", 1 - after["copied"]["mean"], 0.5))
    return found


def verdict(run: Run) -> Html:
    """What was learnt, healthy or not, each with its number and threshold."""
    found = checks(run)
    sign = {True: ("✓ healthy", "yes"), False: ("✗ look here", "no"),
            None: ("not measured", "dull")}
    lines = []
    for c in found:
        text, kind = sign[c.good]
        lines.append(element("li", element("span", text, class_=kind), f": {c.claim}: ",
                             element("strong", c.value), f"; needed: {c.need}"))
    ill = [c for c in found if c.good is False]
    good = sum(c.good is True for c in found)
    line = f"{good} of {len(found)} checks are healthy" + (", and " * bool(ill))
    line += f"{len(ill)} ask for a look: README, “When something looks wrong”" * bool(ill)
    after = run.metrics["generation"]["after_reward"]
    name = "consistency" if run.world else "judge_consistency"
    what = ("Picture and text agree in {:.2f} of the pairs after the reward" if run.world else
            "After the reward the judge finds a picture nearer to its own text than to another's "
            "in {:.2f} of the comparisons, where chance is 0.5").format(after[name]["mean"])
    said = (f" {what} (and in {after[f'{name}_repaired']['mean']:.2f} when the text comes from "
            "another draw: where that is as high, they agree by habit).")
    if run.cfg.image.steps < 200:
        said += " With so few steps a run shows that all stages work; its figures mean nothing."
    return element("p", element("strong", line + "."), said) + element("ul", *lines)


# ---- pictures with texts ---------------------------------------------------------------------

def some_users(run: Run) -> Html:
    """Eight users: what they like, and pairs made for the same prompts before the reward, after it,
    and the best of several."""
    users, items = shown_users(run), shown_items(run)[:3]
    who, what = users.repeat_interleave(len(items)), items.repeat(len(users))
    prompts = [prompt_of(run, i) for i in items.tolist()]
    alts, n = [f"picture for the prompt {p}" for p in prompts] * len(users), len(items)
    made = {v: figures(run, make_for(run, v, who, what, run.generator("report")), alts, True)
            for v in MADE}
    how = ("where subject and setting are the same, as referee and grammar read them; “✗ dusk / "
           "day” is a picture at dusk with a text about day" if run.world else
           "the more, the higher the judge's cosine of the two, from -1 to 1")
    body, parts = element("p", f"Picture and text agree {how}. Each row has the same prompts."), []
    for k, u in enumerate(users.tolist()):
        liked = run.liked[1, run.liked[0] == u][:8]
        ids = [f"item {run.data.item_ids[i]}" for i in liked.tolist()]
        tokens = [f"{m} tokens {x.tolist()}" for m, x in run.model.user_tokens(users[k]).items()]
        rows = [[VARIANTS[v], *found[k * n:(k + 1) * n]] for v, found in made.items()]
        parts.append(element(
            "div", element("h3", "User ", name_of(run.data.user_ids[u]), " likes"),
            row(figures(run, contents(run, liked), ids)),
            table(["made for", *map(name_of, prompts)], rows, f"Pairs of user {k + 1}"),
            element("p", "; ".join(tokens), class_="dull")))
    return body + element("div", *parts, class_="users")


def swapped(run: Run) -> Html:
    """One prompt and one noise: what changes is whose tokens they are."""
    users, items = shown_users(run)[:4], shown_items(run)[:1]
    prompt, rows, made = prompt_of(run, int(items)), [], []
    for owner in (users, users.roll(1)):
        content = make_for(run, "after_reward", owner, items.expand(len(users)),
                           run.generator("swapped"))
        made.append(figures(run, content, [f"picture for the prompt {prompt}"] * len(users)))
    for k, u in enumerate(users.tolist()):
        liked = run.liked[1, run.liked[0] == u][:3]
        ids = [f"item {run.data.item_ids[i]}" for i in liked.tolist()]
        likes = row(figures(run, contents(run, liked), ids))
        rows.append([name_of(run.data.user_ids[u], 20), likes, *(side[k] for side in made)])
    body = element("p", "The prompt of all pairs: ", name_of(prompt), ". In a row both start from "
                   "the same noise; only the tokens differ. The own ones should suit better.")
    head = ["user", "likes", "own tokens", "another user's tokens"]
    return body + table(head, rows, "Swapped tokens")


def grid(run: Run) -> Html:
    """Users x prompts: one sees the taste along a row and the prompt down a column."""
    users, items = shown_users(run), shown_items(run)
    who, n = users.repeat_interleave(len(items)), len(items)
    made = make_for(run, "after_reward", who, items.repeat(len(users)), run.generator("grid"))
    prompts = [prompt_of(run, i) for i in items.tolist()]
    own = figures(run, made, [f"picture for the prompt {p}" for p in prompts] * len(users))
    rows = [[name_of(run.data.user_ids[u], 20), *own[k * n:(k + 1) * n]]
            for k, u in enumerate(users.tolist())]
    body = element("p", "A row is a user, a column a prompt. Along a row the taste should stay, "
                   "down a column what the prompt asks for.")
    return body + table(["user", *(name_of(p, 40) for p in prompts)], rows, "Grid")


def traits(run: Run) -> tuple[list[str], Tensor]:
    """Names of what items can have, and which item has what (I, W): attributes of stickers, or
    words that occur often enough."""
    data = run.data
    if run.world:
        own = [{f"{a} {re.sub('{.*?}', '…', v)}" for a, v in values_of(x).items()}
               for x in run.world.items]
    else:
        own = [set(re.findall(r"\w+", f"{text} {' '.join(prompt)}".casefold()))
               for text, prompt in zip(data.texts, data.prompts)]
    common = Counter(word for has in own for word in has)
    names = sorted(word for word, n in common.items() if n >= max(2, len(own) // 200))
    return names, torch.tensor([[word in has for word in names] for has in own]).float()


def typical_items(codes: Tensor, liked: Tensor, n_codes: int) -> Tensor:
    """Three items that the users of each code like more often than chance: codes (U,), liked (U, I)
    -> (n_codes, 3), by (seen - expected) / sqrt(expected + 1) likes."""
    member = F.one_hot(codes, n_codes).float()  # (U, K)
    expected = member.sum(0)[:, None] * liked.mean(0)  # (K, I)
    score = (member.T @ liked - expected) / (expected + 1).sqrt()
    return score.topk(min(3, liked.shape[1]), dim=1).indices


def codes(run: Run) -> Html:
    """What each code of the first level means: what its users like most above average."""
    (names, has), users, n_codes = traits(run), run.users[:2000], run.cfg.vq.codes
    liked = train.liked_by(run, users, run.liked).cpu().float()  # (U, I)
    shares = liked @ has / liked.sum(1, keepdim=True)  # (U, W)
    body = element("p", "The first token of a user says most. Below, the commonest codes with "
                   "what their users like above average (in standard errors), and items that "
                   "they like more often than others do.")
    for m, tokens in run.model.user_tokens(users).items():
        first = tokens[:, 0].cpu()
        lift, count = code_lift(first, shares, n_codes), first.bincount(minlength=n_codes)
        typical, rows = typical_items(first, liked, n_codes), []
        for code in count.argsort(descending=True, stable=True).tolist():
            value, place = lift[code].topk(min(4, len(names)))
            best = [f"{names[i]} (+{v:.1f})" for v, i in zip(value, place) if v > 1]
            rows.append([str(code), str(count[code].item()), ", ".join(best) or "nothing"])
        for line in rows[:8]:  # a text code by its texts, an image code by its pictures
            shown = contents(run, typical[int(line[0])].to(run.device))
            texts = run.model.tokenizer.decode_batch(shown.tokens)
            said = (element("div", "“", name_of(text, 100), "”") for text in texts)
            line[2] = words(line[2]) + (row(map(figure, shown.images, texts)) if m == "image"
                                        else element("div", *said))
        head = ["code", "users", "liked above average, and examples"]
        body += element("h3", f"{m} codes".capitalize())
        body += table(head, rows[:8], f"Common {m} codes")
        if more := [line for line in rows[8:] if line[1] != "0"]:
            body += fold(f"{len(more)} more {m} codes", table(head, more, f"Other {m} codes"))
    return body


@torch.no_grad()
def strips(run: Run) -> Html:
    """How a picture comes out of noise, for three users and one prompt."""
    users, item, model = shown_users(run)[:3], shown_items(run)[:1], run.model
    chance, net, prompt = run.generator("strips"), model.image, run.prompt[item.expand(len(users))]
    prefs, times = model.user_tokens(users)["image"], sampling_times(run.cfg.image.sampling_steps)
    with model.half():
        z = [net.noise(len(users), chance)]
        for k in range(len(times) - 1):
            z.append(denoise(net, z[-1], times[k:k + 2], prompt, prefs, chance))
    seen = [model.decode_latents(x) for x in z]
    body = element("p", "The prompt is ", name_of(prompt_of(run, int(item))), ". Each step takes "
                   "some noise away: the layout comes first, details last.")
    for k, u in enumerate(users.tolist()):
        body += element("h3", "User ", name_of(run.data.user_ids[u]))
        body += row(figure(x[k], f"at time {t:.2f}", f"t = {t:.2f}") for x, t in zip(seen, times))
    return body


# ---- figures ---------------------------------------------------------------------------------

HEALTHY = {
    "autoencoder loss": "Healthy: falls fast, then flattens.",
    "gnn loss": "Healthy: from about 2.08 (3 ln 2, nothing is known) well down, smooth.",
    "codebook loss": "Healthy: falls or stays low; a jump upwards means that codes die.",
    "codebook reconstruction": "Healthy: far below 1, which is nothing learnt.",
    "codebook bpr": "Healthy: below 0.69 (ln 2), where tokens do not rank.",
    "text loss": "Healthy: falls; the dot, new users' likes, is not far above the curve's end.",
    "image loss": "Healthy: from 1 downwards, noisy; the dot is not far above the curve's end.",
    "scorer loss": "Healthy: falls from ln(batch size); flat means that pairs look alike to it.",
    "judge loss": "Healthy: as the scorer's, from which it learns apart.",
    "referee loss": "Healthy: falls to nearly 0.",
    "reward loss": "A surrogate: its gradient counts, its value says nothing.",
    "reward consistency": "Healthy: rises. Flat: the scorer cannot tell pairs apart.",
    "reward s": "Healthy: rises or stays: the taste is not given up for agreement.",
    "reward kl": "Healthy: rises slowly and levels off; without end, the texts drift away.",
    "reward valid_copied": "Healthy: stays."}


def charts(run: Run) -> Html:
    """All that was logged over the steps; a picture's and a text's side in one chart."""
    found: dict[str, dict[str, list]] = {}
    for stage, step, name, value in run.log:
        title = f"{stage} {re.sub('_(image|text|validation)$', '', name)}"
        found.setdefault(title, {}).setdefault(name, []).append((step, value))
    fixed = "On validation pairs, with the measure's meaning as below. Healthy: "
    drawn = []
    for title, series in found.items():
        name = title.partition("valid_")[2]
        calm = "rises or stays." if name in ("consistency", "judge_consistency") else "stays."
        drawn.append(curves(title, series, HEALTHY.get(title, fixed + calm if name else "")))
    single = [f"{stage} {name} {value:.3g}" for stage, _, name, value in run.log
              if name == "held_out_auc"]
    last = ("How often a picture finds its text before another, on texts never learnt (chance "
            f"0.5, healthy from 0.7): {', '.join(single)}.") if single else ""
    return element("div", *drawn, class_="charts") + element("p", last)


MEANING = {
    "prompt": "Share that shows what the prompt asks for.",
    "consistency": "Share of the pairs whose picture and text agree in subject and setting.",
    "consistency_repaired": "The same with a text from another draw: as high means by habit.",
    "consistency_bound": "What pictures and texts made apart can agree at most, as they vary.",
    "utility": "How much the user likes what is shown, by the true taste; 1 is the favourite.",
    "taste": "How near many samples are to the user's true taste; 1 is equal.",
    "variety": "Chance that two samples for the same user and prompt differ in an attribute, mean "
               "of the attributes.",
    "swap": "Share in which the own tokens please more than another user's; chance is 0.5.",
    "grammatical": "Share of texts that are sentences of the stickers' grammar.",
    "judge_consistency": "How often the judge finds a picture nearer to its own text than to "
                         "another's; chance is 0.5.",
    "judge_consistency_repaired": "The same with a text from another draw.",
    "judge_swap": "How often the judge finds what the own tokens make nearer to what the user "
                  "likes than what another's make; chance is 0.5.",
    "judge_prompt": "How often the judge finds it nearer to its prompt than to others; chance 0.5.",
    "judge_variety": "Mean distance (1 - cosine) of two samples for the same user and prompt.",
    "frechet_image": "Distance of the made pictures, as a crowd, from those liked; 0 is best.",
    "copied": "Share of texts that are word for word in the training part."}
FIRST = ("prompt", "consistency", "consistency_repaired", "utility", "taste", "variety", "swap",
         "judge_consistency", "judge_swap", "judge_prompt", "judge_variety", "copied")


def measures(run: Run) -> Html:
    """Every measure: its meaning and a bar for each variant; all digits folded."""
    made, change = run.metrics["generation"], run.metrics["differences"]
    shown, more = [], []
    names = [name for name in made["after_reward"] if not name.endswith("_text")]
    names.sort(key=lambda name: [*MEANING, name, name.removesuffix("_image")].index(
        name if name in MEANING else name.removesuffix("_image")))
    main = set(FIRST) if not run.world else {x for x in FIRST if "judge" not in x} - {"copied"}
    for name in names:
        base, parts = name.removesuffix("_image"), []
        base = base if base in MEANING else name
        for full in dict.fromkeys((name, name.replace("_image", "_text"))):
            if full in made["after_reward"]:
                values = {VARIANTS[v]: found[full] for v, found in made.items() if full in found}
                parts.append(element("h3", full) + bars(values, full))
                if full in change:
                    parts[-1] += element("p", "after less before: ", change[full], class_="dull")
        one = element("div", element("p", MEANING.get(base, "")), *parts, class_="chart")
        (shown if base in main else more).append(one)
    rows = [[name, *(found.get(name, "") for found in (*made.values(), change))]
            for name in made["after_reward"]]
    head = ["measure", *(VARIANTS[v] for v in made), "after less before"]
    body = element("p", "On the test part, which no training saw. Black lines, and ±, are 95 % "
                   "intervals.") + element("div", *shown, class_="charts")
    body += fold("More measures", element("div", *more, class_="charts"))
    return body + fold("All digits", table(head, rows, "All measures")) + ranking(run)


def ranking(run: Run) -> Html:
    """Stage 1, the codebooks and new users in digits."""
    m = run.metrics
    body = table(["stage 1", "test part"], m["stage1"].items(), "Stage 1")
    health = m["codebook"]
    rows = [[name, *h.values()] for name, h in health.items()]
    body += table(["codes", *health["image"]], rows, "Codebooks")
    if new := m["new_users"]:
        rows = [[name, *found.values()] for name, found in new.items()]
        body += table(["new users, history of", *new["in training"]], rows, "New users")
    return fold("Recommendation, codebooks, new users",
                element("p", "recall@20: share of a user's test items among 20 recommended; _image "
                        "and _text by one modality alone; _quantized from tokens alone. usage: "
                        "share of a level's codes that somebody has; perplexity: how many are used "
                        "as if evenly; collision_rate: share of users who share all tokens."), body)


def kept(run: Run, file: str) -> dict:
    """A JSON file of the run's folder; {} while it does not exist."""
    path = run.out / file
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def costs(run: Run) -> Html:
    """Seconds and memory."""
    rows = [[stage, *both] for stage, both in run.seconds.items()]
    rows.append(["total", *np.sum([both for _, *both in rows], axis=0).tolist()])
    memory = kept(run, "metrics.json").get("peak_memory_mb") or train.peak_memory_mb()
    body = element("p", f"At most {memory or 'unknown'} MB of memory.")
    return body + table(["stage", "seconds", "CPU seconds"], rows, "Seconds")


def command(run: Run, folder: str | None) -> str:
    """What to type to run it again: settings that are not the defaults."""
    parts = ["python", "train.py", *(["--data", folder] if folder else [])]
    for group, name, field, _ in settings(train.PARTS):
        part = run.train if group == "train" else getattr(run.cfg, group)
        value, flag = getattr(part, name), flag_of(group, name)
        if value is True and field.default is False or value is False and field.default is True:
            parts.append(flag if value else flag.replace("--", "--no-", 1))
        elif value != field.default:
            parts += [flag, str(value)]
    return shlex.join(parts)


def again(run: Run) -> Html:
    """Settings, versions, and the command to run it again."""
    config, rows = kept(run, "config.json"), []
    for group, name, field, text in settings(train.PARTS):
        value = getattr(run.train if group == "train" else getattr(run.cfg, group), name)
        rows.append([flag_of(group, name), str(value), str(field.default), text])
    machine = config.get("machine") or train.machine(run.device)
    versions = ", ".join(f"{name} {value}" for name, value in machine.items())
    digest = run.data.fingerprint()[:16]
    body = element("p", element("code", command(run, config.get("data"))))
    body += element("p", f"{versions}; data {digest}…")
    return body + fold("All settings", table(["flag", "value", "default", "what it is"], rows,
                                             "Settings"))


SECTIONS = {
    "Verdict": verdict, "Eight users": some_users, "The same prompt for swapped users": swapped,
    "Users and prompts": grid, "What each code means": codes, "From noise to picture": strips,
    "Curves": charts, "Measures": measures, "Seconds and memory": costs,
    "Settings, and how to run it again": again}


def page(*runs: Run) -> str:
    """The whole report of a run, or of several side by side."""
    titles = [f"DPPMG on {run.data.name}, seed {run.cfg.method.seed}" for run in runs]
    sizes = [f"{len(run.data.user_ids):,} users, {len(run.data.item_ids):,} items, "
             f"{len(run.data.user):,} likes; run {run.out.name}" for run in runs]
    wide, body = f"runs{' two' * (len(runs) > 1)}", Html()
    for title, draw in SECTIONS.items():
        columns = [element("div", element("p", size, class_="dull") if len(runs) > 1 else "",
                           draw(run)) for run, size in zip(runs, sizes)]
        body += element("section", element("h2", title), element("div", *columns, class_=wide))
    title = words(" and ".join(titles))
    head = ['<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>{title}</title><style>{STYLE}</style></head><body><main>"]
    top = element("h1", title) + element("p", "; ".join(sizes))
    return "\n".join([*head, top, body, "</main></body></html>"])


def write(path: Path, *runs: Run) -> Path:
    """Write the page; what was there stays until the new one is whole."""
    with train.replacing(path) as temporary:
        temporary.write_text(page(*runs), encoding="utf-8", errors="replace")
    return path


# ---- runs that are finished ------------------------------------------------------------------

def load(out: Path) -> Run:
    """The evaluated run in a folder, in which nothing is changed. ValueError for anything else."""
    there = train.read_config(out)
    if not there:
        raise ValueError(f"{out}: not a run")
    cfg, own = train.build(there["settings"])
    folder, seed = there["data"] or out / "stickers", cfg.method.seed
    world = None if there["data"] else train.sticker_world(own, seed)
    data = Dataset.load(folder, cfg.image.size, seed, own.min_rating or None, own.drop_incomplete)
    run = Run(cfg, own, data, world, out, torch.device("cpu"))
    run.restore()
    if "evaluation" not in run.done:
        raise ValueError(f"{out}: not evaluated yet; go on: train.py --resume --out {out}")
    return run


def rebuild(*folders: str) -> Path:
    """Write the report of a run, or of several side by side, into the first one's folder."""
    runs = [load(Path(folder)) for folder in folders]
    return write(runs[0].out / ("report.html" if len(runs) == 1 else "compare.html"), *runs)


if __name__ == "__main__":
    forgive_terminals()
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        say(str(rebuild(*sys.argv[1:])))
    except (ValueError, OSError) as error:
        sys.exit(f"report.py: error: {error}")
