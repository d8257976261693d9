"""The report: one file with all that a person wants to look at after a run."""
import base64
import html
import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from dppmg import to_picture
from reward import Content
from train import VARIANTS, Run, contents, liked_by, make_for, some_users, values_of
from vq import code_lift

STYLE = """body{font:15px/1.5 sans-serif;margin:1em}table{display:block;overflow-x:auto}
td,th{padding:.1em .5em;text-align:left;vertical-align:top}figure{width:7em;margin:.3em}
img{width:64px;image-rendering:pixelated}figcaption{font-size:12px;overflow-wrap:anywhere}"""
INKS = ("#1f6fb4", "#d1622b", "#2f8f4e", "#8a4fb0", "#b02f55", "#777777")


class Html(str):
    """Text that is escaped already."""


def picture(x: Tensor, text: str) -> Html:
    """<figure> of (3, H, W) in [-1, 1] with escaped words below."""
    data, words = io.BytesIO(), html.escape(text)
    to_picture(x).save(data, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return Html(f'<figure><img alt="" src="{source}"><figcaption>{words}</figcaption></figure>')


def pictures(run: Run, content: Content) -> list[Html]:
    """A figure for each picture with its text."""
    return list(map(picture, content.images, run.model.tokenizer.decode_batch(content.tokens)))


def curves(title: str, series: dict[str, list[tuple[float, float]]]) -> str:
    """Inline SVG of curves [(x, y)], with their range and last values; nothing below two points."""
    points = [p for line in series.values() for p in line if math.isfinite(p[1])]
    if len(points) < 2:
        return ""
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))
    lines, names = "", ""
    for ink, (name, line) in zip(cycle(INKS), series.items()):
        x, y = np.array([p for p in line if math.isfinite(p[1])]).reshape(-1, 2).T
        places = zip(np.interp(x, (x0, x1), (0, 300)), np.interp(y, (y0, y1), (99, 1)))
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        lines += f'<polyline points="{path}" fill="none" stroke="{ink}"/>'
        names += f' <span style="color:{ink}">{html.escape(name)} {line[-1][1]:.3g}</span>'
    words = f"{html.escape(title)}: {y0:.3g} to {y1:.3g} in {x1:,} steps; at last{names}"
    return f'<p>{words}<br><svg width="300" height="100">{lines}</svg></p>'


def cell(value: object) -> str:
    """A value as HTML: intervals {"mean", "low", "high"} in brackets, all escaped but figures."""
    if isinstance(value, dict):
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    if isinstance(value, list):
        return " ".join(map(cell, value))
    if isinstance(value, float):
        return f"{value:.3f}"
    return value if isinstance(value, Html) else html.escape(str(value))


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """<table> of what `cell` shows."""
    heads = "".join(f"<th>{cell(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell(v)}</td>' for v in row)}</tr>" for row in rows)
    return f"<table><tr>{heads}</tr>{body}</table>"


def report_numbers(run: Run) -> str:
    """The tables of metrics.json."""
    m, variants = run.metrics, run.metrics["generation"]
    rows = [[name, *(found.get(name, "") for found in (*variants.values(), m["differences"]))]
            for name in variants["after_reward"]]
    body = """<h2>What was measured</h2><p>On the test part; 95 % intervals in brackets. Picture and
        text are made apart, so they agree at most as often as consistency_bound, unless the best
        pair of several is kept; where consistency_repaired is as high, they agree by habit.</p>"""
    body += table(["", *variants, "after less before"], rows)
    body += table(["stage 1", "test part"], m["stage1"].items())
    health = m["codebook"]
    body += table(["codes", *health["image"]], [[name, *h.values()] for name, h in health.items()])
    if new := m["new_users"]:
        rows = [[name, *found.values()] for name, found in new.items()]
        body += table(["new users, history of", *new["in training"]], rows)
    return body + table(["stage", "seconds, CPU seconds"], run.seconds.items())


def report_curves(run: Run) -> str:
    """All that was logged over the steps; a picture's and a text's side in one chart."""
    charts: dict[str, dict[str, list]] = {}
    for stage, step, name, value in run.log:
        title = f"{stage} {re.sub('_(image|text)$', '', name)}"
        charts.setdefault(title, {}).setdefault(name, []).append((step, value))
    return "<h2>Curves</h2>" + "".join(curves(*chart) for chart in charts.items())


def report_codes(run: Run) -> str:
    """What each code of the first level means: what its users like most above average."""
    data = run.data
    if run.world:
        words = [{f"{a} {v}" for a, v in values_of(row).items()} for row in run.world.items]
    else:
        words = [set(re.findall(r"\w+", f"{text} {' '.join(prompt)}".casefold()))
                 for text, prompt in zip(data.texts, data.prompts)]
    common = Counter(word for has in words for word in has)
    names = sorted(word for word, n in common.items() if n >= max(2, len(words) // 200))
    traits = torch.tensor([[word in has for word in names] for has in words]).float()  # (I, W)
    users, rows = run.users[:2000], []
    liked = liked_by(run, users, run.liked).cpu().float()  # (U, I)
    shares = liked @ traits / liked.sum(1, keepdim=True)  # (U, W)
    for m, tokens in run.model.user_tokens(users).items():
        lift = code_lift(tokens[:, 0].cpu(), shares, run.cfg.vq.codes)  # (K, W)
        for code, (value, place) in enumerate(zip(*lift.topk(min(4, len(names)), dim=1))):
            best = [f"{names[i]} (+{v:.1f})" for v, i in zip(value, place) if v > 1]
            rows.append([m, code, ", ".join(best)])
    head = ["modality", "code", "liked above average (standard errors)"]
    return f"<h2>What each code of the first level means</h2>{table(head, rows)}"


def report_grid(run: Run, users: Tensor, items: Tensor) -> str:
    """Users x prompts: one sees the taste along a row and the prompt down a column."""
    who, n = users.repeat_interleave(len(items)), len(items)
    made = make_for(run, "after_reward", who, items.repeat(len(users)), run.generator("grid"))
    own = pictures(run, made)
    rows = [[run.data.user_ids[u], *own[k * n:(k + 1) * n]] for k, u in enumerate(users.tolist())]
    head = ["", *(", ".join(run.data.prompts[i])[:40] for i in items.tolist())]
    return f"<h2>One row a user, one column a prompt, after the reward</h2>{table(head, rows)}"


def report_user(run: Run, user: Tensor, items: Tensor) -> str:
    """What a user likes, the tokens, and what was made before and after the reward."""
    liked = run.liked[1, run.liked[0] == user][:8]
    rows = [["likes", *pictures(run, contents(run, liked))]]
    for variant in VARIANTS[2:]:
        chance = run.generator(f"report {user}")
        made = make_for(run, variant, user.expand(len(items)), items, chance)
        rows.append([variant, *pictures(run, made)])
    tokens = [f"{m} {k.tolist()}" for m, k in run.model.user_tokens(user).items()]
    title = f"{run.data.user_ids[user]}: {', '.join(tokens)}"
    return f"<h3>{html.escape(title)}</h3>{table([], rows)}"


def page(run: Run) -> str:
    """The whole report as HTML: self-contained; every word from the data is escaped."""
    data, common = run.data, run.topic.bincount().argsort(descending=True, stable=True)[:8, None]
    items = (run.topic == common).int().argmax(1)  # an item for each of the commonest prompts
    items = items if len(items) > 1 else items.expand(8)
    users, title = some_users(run, "report", 8), f"DPPMG on {html.escape(data.name)}"
    size = f"seed {run.cfg.method.seed}, {len(data.user_ids):,} users, {len(data.item_ids):,} items"
    some = [report_user(run, user, items[:3]) for user in users]
    body = [report_grid(run, users, items), report_numbers(run), report_curves(run),
            report_codes(run), "<h2>Some users</h2>", *some]
    head = ["<!doctype html><html lang=en><meta charset=utf-8>",
            "<meta name=viewport content='width=device-width,initial-scale=1'>",
            f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1><p>{size}</p>"]
    return "\n".join([*head, *body])
