"""Builders of a page: values -> HTML. Every word is escaped; no script, no library."""
import base64
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from itertools import cycle

import numpy as np
from torch import Tensor

from dppmg import to_picture

STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;margin:0 auto;padding:0 16px;
 max-width:1100px}
h1,h2,h3{line-height:1.2;overflow-wrap:anywhere}
h2{margin:2em 0 .4em;border-top:1px solid #bbb;padding-top:.6em}
h3{margin:1.2em 0 .3em;font-size:1.05em}
p{max-width:44em}
.runs{display:grid;gap:0 24px}
.runs>div{min-width:0}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse}
th,td{padding:3px 8px 3px 0;text-align:left;vertical-align:top;font-weight:normal}
thead th,tbody th{font-weight:600}
tbody th{min-width:3.5em}
bdi{overflow-wrap:anywhere}
.row{display:flex;flex-wrap:wrap;gap:6px 10px}
figure{width:88px;margin:0 0 6px}
img{width:80px;height:80px;image-rendering:pixelated;display:block;background:#ddd}
figcaption{font-size:13px;line-height:1.3;overflow-wrap:anywhere}
.users{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));
 gap:0 24px}
li{margin:.4em 0}
figure div{font-size:14px;line-height:1.25}
.yes{color:#17692f;font-weight:600}
.no{color:#a3231d;font-weight:600}
.dull{color:#595959}
svg{width:100%;max-width:430px;height:auto;display:block}
svg text{font:12px system-ui,sans-serif;fill:#222}
summary{cursor:pointer;padding:2px 0}
code{overflow-wrap:anywhere;background:#f2f2f2;padding:2px 4px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));
 gap:0 24px}
@media(min-width:900px){.two{grid-template-columns:1fr 1fr}}
@media(min-width:900px){body:has(.two){max-width:1500px}}
@media print{body{max-width:none;font-size:12px}figure,svg,tr,.chart{break-inside:avoid}
 h2,h3{break-after:avoid}
 .scroll{overflow:visible}details::details-content{content-visibility:visible;display:block}}
"""
UNSEEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f]")  # control characters, but tabs and newlines
INKS = ("#1f5f9e", "#a3480f", "#1e6e38", "#75409b", "#a02048", "#595959")


class Html(str):
    """Text that is escaped already. What is added to it is escaped, too, and the sum is Html."""

    def __add__(self, other: object) -> "Html":
        return Html(str.__add__(self, words(other)))


def words(value: object) -> Html:
    """Anything as HTML: Html stays as it is; intervals {"mean", "low", "high"} and floats get three
    digits; all else is escaped, and cannot turn the direction of what follows."""
    if isinstance(value, Html):
        return value
    if isinstance(value, dict):
        return Html(f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]")
    if isinstance(value, list):
        return Html(" ".join(map(words, value)))
    if isinstance(value, float):
        return Html(f"{value:.3f}" if math.isfinite(value) else "not measured")
    return Html(html.escape(UNSEEN.sub("\ufffd", str(value))))


def element(tag: str, *parts: object, **attributes: str) -> Html:
    """<tag>parts</tag>; an attribute "class" is written class_."""
    given = "".join(f' {name.strip("_").replace("_", "-")}="{html.escape(value)}"'
                    for name, value in attributes.items())
    return Html(f"<{tag}{given}>{''.join(map(words, parts))}</{tag}>")


def name_of(text: object, most: int = 60) -> Html:
    """An id or a prompt in a line of ours: cut to its beginning, written in its own direction."""
    text = str(text)
    return element("bdi", text if len(text) <= most else text[:most] + "…")


def passage(text: str, most: int = 160) -> Html:
    """A text; of a long one the beginning, and all of it on request."""
    if len(text) <= most:
        return words(text)
    return element("details", element("summary", text[:most] + "…"), text)


def figure(x: Tensor, alt: str, text: str = "", mark: Html = Html()) -> Html:
    """A picture (3, H, W) in [-1, 1], shown at 64 pixels at most, with a mark and its text."""
    data, picture = io.BytesIO(), to_picture(x)
    picture.thumbnail((64, 64))
    picture.save(data, "PNG", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    image = Html(f'<img alt="{html.escape(alt)}" src="{source}">')
    told = element("figcaption", passage(text), dir="auto") if text else ""
    return element("figure", image, mark, told)


def row(parts: Iterable[Html]) -> Html:
    """Figures side by side, in as many lines as they need."""
    return element("div", *parts, class_="row")


def table(head: Sequence[object], rows: Iterable[Sequence], title: str) -> Html:
    """A table whose first column names the rows; it scrolls by itself where it is too wide."""
    heads = element("tr", *(element("th", name, scope="col") for name in head))
    lines = (element("tr", element("th", first, scope="row"), *(element("td", x) for x in others))
             for first, *others in rows)
    whole = element("table", element("thead", heads) if head else "", element("tbody", *lines))
    return element("div", whole, class_="scroll", tabindex="0", role="group", aria_label=title)


def fold(title: object, *parts: object) -> Html:
    """What is shown on request."""
    return element("details", element("summary", title), *parts)


def bars(values: dict[str, dict], title: str) -> Html:
    """Bars from 0, with 95 % intervals as whiskers and the digits; from -1 or to more than 1 only
    where a value is there. Values that do not exist have no bar."""
    there = {n: v for n, v in values.items() if math.isfinite(v["mean"])}
    ends = [v[end] for v in there.values() for end in ("mean", "low", "high")
            if math.isfinite(v[end])]
    high = 1.0 if max(ends, default=0) > 0.3 else max(ends, default=1) * 1.1
    low, parts, said = min(0.0, *ends, 0.0), "", []
    place = lambda x: float(np.interp(x, (low, max(high, *ends, 1e-9)), (96, 286)))  # noqa: E731
    for k, (name, v) in enumerate(there.items()):
        y, zero, end = 18 * k, place(0), place(v["mean"])
        left, right = (place(v[e] if math.isfinite(v[e]) else v["mean"]) for e in ("low", "high"))
        parts += (f'<text x="0" y="{y + 13}">{words(name)}</text><rect x="{min(zero, end):.1f}" '
                  f'y="{y + 3}" width="{abs(end - zero):.1f}" height="12" fill="{INKS[k % 6]}" '
                  f'fill-opacity="0.45"/><path d="M{left:.1f} {y + 9}H{right:.1f}" '
                  f'stroke="#111" stroke-width="2"/>'
                  f'<text x="292" y="{y + 13}">{v["mean"]:.2f} ±{(v["high"] - v["low"]) / 2:.2f}'
                  "</text>")
        said.append(f"{name} {v['mean']:.2f}")
    label = html.escape(f"{title}: {', '.join(said) or 'not measured'}")
    box = f'viewBox="0 0 370 {18 * max(1, len(there))}"'
    return Html(f'<svg role="img" aria-label="{label}" {box}>{parts}</svg>')


def curves(title: str, series: dict[str, list[tuple[float, float]]], healthy: str = "") -> Html:
    """Curves [(x, y)], with their range and last values and what healthy looks like; nothing below
    two points. A series of one point is a dot."""
    points = [p for line in series.values() for p in line if math.isfinite(p[1])]
    if len(points) < 2:
        return Html()
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))
    lines, names = "", []
    for k, (ink, (name, line)) in enumerate(zip(cycle(INKS), series.items())):
        x, y = np.array([p for p in line if math.isfinite(p[1])]).reshape(-1, 2).T
        places = zip(np.interp(x, (x0, x1), (2, 348)), np.interp(y, (y0, y1), (96, 4)))
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        dash = ' stroke-dasharray="6 3"' * (k % 2)
        lines += f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="2"{dash}/>'
        if len(x) == 1:
            a, b = path.split(",")
            lines += f'<circle cx="{a}" cy="{b}" r="4" fill="{ink}"/>'
        names.append(element("span", f"{name} {line[-1][1]:.3g}", style=f"color:{ink}"))
    label = html.escape(f"{title}: from {y0:.3g} to {y1:.3g}")
    svg = Html(f'<svg role="img" aria-label="{label}" viewBox="0 0 350 100">{lines}</svg>')
    at_last = Html("; at last " + ", ".join(names) + ". ")
    said = element("p", f"{y0:.3g} to {y1:.3g} in {x1:,} steps", at_last, healthy)
    return element("div", element("h3", title), svg, said, class_="chart")
