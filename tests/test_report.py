"""report.py: builders, verdict, and the page."""
import base64
import html.parser
import importlib
import io
import math
import re
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import report
import train
from tests import builders

EVIL, SAFE = '<b>"&', "&lt;b&gt;&quot;&amp;"
HALF = {"mean": 0.5, "low": 0.25, "high": 0.75}
NONE = {"mean": math.nan, "low": math.nan, "high": math.nan}


class Page(html.parser.HTMLParser):
    """Tags, attributes and words of a page; fails where a tag is closed that is not open."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(source if isinstance(source, str) else source.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        self.words.append(data)

    def handle_comment(self, data):
        pytest.fail(f"a comment: {data}")


HARMLESS = set("""html head meta title style body main section div h1 h2 h3 p ul li strong span bdi code
    details summary table thead tbody tr th td img figure figcaption svg text path rect circle
    polyline""".split())


def check_harmless(page):
    """No code, no reference to anything outside of the page; pictures say what they show."""
    assert not page.open
    assert set(page.tags) <= HARMLESS, set(page.tags) - HARMLESS
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("href", "srcdoc", "action", "data", "formaction"), name
        assert name != "src" or re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", value)
        assert name != "style" or "url" not in value
        assert name not in ("alt", "aria-label") or value
    assert sum(name == "alt" for name, _ in page.attributes) == page.tags.count("img")


# ---- builders

def test_the_builders_escape_what_they_are_given():
    found = {
        2: (report.table([EVIL], [[EVIL, 0.5, HALF]], "x"), report.fold(EVIL, EVIL),
            report.element("p", EVIL, class_=EVIL), report.figure(torch.zeros(3, 8, 8), EVIL, EVIL),
            report.bars({EVIL: HALF}, "x")),
        1: (report.name_of(EVIL), report.words(EVIL), builders.passage(EVIL), report.words([EVIL]))}
    for n, pages in found.items():
        for page in pages:
            assert EVIL not in page and page.count(SAFE) == n, page
    drawn = report.curves(EVIL, {EVIL: [(0, 1), (1, 2)]}, EVIL)
    assert EVIL not in drawn and drawn.count(SAFE) == 4
    assert report.words(report.element("p", EVIL)) == f"<p>{SAFE}</p>"  # escaped already: stays
    both = report.element("p", EVIL) + EVIL + report.element("p", EVIL)
    assert report.words(both) == f"<p>{SAFE}</p>{SAFE}<p>{SAFE}</p>"  # a sum stays, too


def test_numbers_are_shown_with_three_digits():
    assert report.words(HALF) == "0.500 [0.250, 0.750]"
    assert report.words([0.5, 2.0]) == "0.500 2.000"
    assert report.words(math.nan) == "not measured" and report.words(7) == "7"


def test_a_table_has_a_head_and_names_its_rows():
    page = report.table(["a", "b"], [["x", 0.5], ["y", HALF]], "title")
    assert '<th scope="row">x</th><td>0.500</td>' in page
    assert '<th scope="col">b</th>' in page and 'aria-label="title"' in page


def test_long_texts_are_folded_and_long_names_cut():
    long = "a" * 100 + "<" + "b" * 200
    folded = builders.passage(long)
    assert folded.startswith("<details><summary>a") and html.unescape(folded).count(long) == 1
    assert builders.passage("short") == "short"
    assert report.name_of(long, 9) == f"<bdi>{'a' * 9}…</bdi>" and report.name_of("ab", 2) == "<bdi>ab</bdi>"
    assert 'dir="auto"' in report.figure(torch.zeros(3, 8, 8), "x", "שלום")


@pytest.mark.parametrize("side, shown", [(32, 32), (64, 64), (200, 64)])
def test_a_picture_is_in_the_page_pixel_by_pixel_up_to_64(side, shown):
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    x = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    source = re.search(r'base64,([^"]*)"', report.figure(x, "alt"))[1]
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(source))))
    assert found.shape == (shown, shown, 3)
    assert side > 64 or (found == pixels).all()


def test_a_curve_goes_through_its_points():
    drawn = report.curves("x", {"a": [(0, 1.0), (5, 3.0), (10, 2.0)], "b": [(10, math.nan), (10, 1.5)]})
    line, dot = re.findall(r'<polyline points="([^"]*)"', drawn)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in line.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x0 < x1
    assert y1 < y2 < y0 and (y0 - y1) == pytest.approx(2 * (y0 - y2), abs=0.2)  # pixels count from above
    assert float(dot.split(",")[0]) == x2 and y2 < float(dot.split(",")[1]) < y0
    assert drawn.count("<circle") == 1 and "a 2" in drawn and "b 1.5" in drawn
    assert report.curves("one point", {"a": [(0, 1)]}) == ""


def test_bars_are_as_long_as_their_values_and_whiskers_span_intervals():
    small = {"mean": 0.25, "low": 0.0, "high": 0.5}
    drawn = report.bars({"a": HALF, "none": NONE, "b": small}, "x")
    widths = [float(x) for x in re.findall(r' width="([\d.]+)" height', drawn)]
    whiskers = [tuple(map(float, x)) for x in re.findall(r'd="M([\d.]+) \d+H([\d.]+)"', drawn)]
    assert len(widths) == len(whiskers) == 2
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.2) and "0.50 ±0.25" in drawn
    (low, high), (zero, middle) = whiskers
    assert high - low == pytest.approx(widths[0], abs=0.2) and middle - zero == pytest.approx(widths[0], abs=0.2)
    assert low == pytest.approx(zero + widths[1], abs=0.2)


def test_bars_of_small_and_negative_values_stay_in_the_picture():
    tiny = {"mean": 0.01, "low": -0.01, "high": 0.03}
    drawn = report.bars({"a": tiny}, "x")
    (left, right), = re.findall(r'd="M([\d.]+) \d+H([\d.]+)"', drawn)
    assert 96 <= float(left) < float(right) <= 286 and float(right) - float(left) > 100
    assert "not measured" in report.bars({"a": NONE}, "x") and "nan" not in report.bars({"a": NONE}, "x")


# ---- verdict

@pytest.mark.parametrize("value, good", [(0.5, True), (0.49, False), (math.nan, None), (None, None),
                                         (HALF, True), ({**HALF, "mean": 0.4}, False)])
def test_a_check_needs_its_number(value, good):
    assert report.at_least("x", value, 0.5).good is good


@pytest.mark.parametrize("low, good", [(0.51, True), (0.5, False), (math.nan, None)])
def test_a_check_of_an_interval_needs_all_of_it_above(low, good):
    assert report.above("x", HALF | {"low": low}, 0.5, "").good is good
    assert report.above("x", None, 0.5, "").good is None


def made_up(world, **changes):
    """A run that is healthy but for the changes."""
    high = {"mean": 0.99, "low": 0.98, "high": 1.0}
    names = [f"{kind}{name}_{m}" for kind in ("", "judge_") for name in ("prompt", "swap", "variety")
             for m in ("image", "text")]
    after = dict.fromkeys([*names, "consistency", "consistency_repaired", "judge_consistency",
                           "judge_consistency_repaired", "grammatical"], high)
    after |= {"copied": {"mean": 0.1, "low": 0.0, "high": 0.2}} | changes
    rise = {"mean": 0.1, "low": 0.05, "high": 0.2}
    metrics = {"stage1": {"recall@20": 0.4, "recall@20_quantized": 0.39}, "referee": {"colour": 0.99},
               "codebook": {"image": {"usage": [1.0, 0.95]}},
               "generation": {"real": dict.fromkeys(names, high), "after_reward": after,
                              "before_reward": dict.fromkeys(names, high)},
               "differences": {"consistency": rise, "judge_consistency": rise}}
    cfg, _ = train.build({name: {} for name in train.PARTS})
    return SimpleNamespace(metrics=metrics, world=world, cfg=cfg,
                           data=SimpleNamespace(item_ids=range(100)))


@pytest.mark.parametrize("world", [None, "stickers"])
def test_a_healthy_run_is_called_healthy(world):
    found = report.checks(made_up(world))
    assert all(check.good for check in found) and len(found) >= 10
    page = report.verdict(made_up(world))
    assert f"{len(found)} of {len(found)} checks are healthy." in page and "look here" not in page
    assert ("agree in 0.99 of the pairs" if world else "in 0.99 of the comparisons, where chance") in page
    assert "mean nothing" not in page
    tiny = made_up(world)
    tiny.cfg, _ = train.build({name: train.SMOKE.get(name, {}) for name in train.PARTS})
    assert "its figures mean nothing" in report.verdict(tiny)


@pytest.mark.parametrize("world", [None, "stickers"])
@pytest.mark.parametrize("name, claim", [
    ("prompt_image", "Pictures show"), ("prompt_text", "Texts show"), ("swap_image", "Pictures please"),
    ("swap_text", "Texts please")])
def test_what_was_not_learnt_is_pointed_at(world, name, claim):
    chance = {"mean": 0.5, "low": 0.45, "high": 0.55}
    run = made_up(world, **{name if world else f"judge_{name}": chance})
    ill = [check.claim for check in report.checks(run) if not check.good]
    assert len(ill) == 1 and ill[0].startswith(claim)
    assert "1 ask for a look" in report.verdict(run) and "✗ look here" in report.verdict(run)


def test_lost_variety_copies_dead_codes_and_lost_recall_are_pointed_at():
    low = {"mean": 0.4, "low": 0.3, "high": 0.5}
    run = made_up(None, judge_variety_text=low, copied={"mean": 0.9, "low": 0.8, "high": 1.0})
    run.metrics["codebook"]["image"]["usage"][1] = 0.5
    run.metrics["stage1"]["recall@20_quantized"] = 0.2
    run.metrics["differences"]["judge_consistency"] = {"mean": 0.1, "low": -0.1, "high": 0.3}
    ill = " ".join(check.claim for check in report.checks(run) if not check.good)
    for claim in ("Texts still vary", "Texts are new", "codes are in use", "tokens alone", "The reward"):
        assert claim in ill
    assert "Pictures" not in ill


# ---- what is shown of a run

def test_typical_items_are_what_the_users_of_a_code_like_and_others_do_not():
    liked = torch.zeros(40, 12)
    liked[:, 0] = 1  # all like it: typical of nobody
    for user in range(40):
        liked[user, 1 + 3 * (user % 2):4 + 3 * (user % 2)] = 1
    found = report.typical_items(torch.arange(40) % 2, liked, 3)
    assert [set(row) for row in found[:2].tolist()] == [{1, 2, 3}, {4, 5, 6}]


def test_a_sticker_whose_text_differs_says_in_what():
    see = {"subject": "fish", "setting": "dusk"}
    assert "✓ agree" in report.sticker_mark(see, [0, 2, 1], True)
    assert "✗ dusk / dawn" in report.sticker_mark(see, [0, 0, 1], False)
    assert "✗ fish / house" in report.sticker_mark(see, [1, 2, 1], False)
    assert "not a sentence" in report.sticker_mark(see, [-1, -1, -1], False)


def test_the_command_asks_for_the_same_settings_again():
    asked = ["--gnn-steps", "7", "--no-bf16", "--drop-incomplete", "--min-rating", "3.5"]
    cfg, own = train.build(train.parse_arguments(asked)[1])
    run = SimpleNamespace(cfg=cfg, train=own)
    typed = shlex.split(report.command(run, "/a b/<c>"))
    args, given = train.parse_arguments(typed[2:])
    assert typed[:2] == ["python", "train.py"] and args.data == "/a b/<c>"
    assert train.build(given) == (cfg, own) and sum(map(len, given.values())) == 4
    assert report.command(SimpleNamespace(cfg=train.build({n: {} for n in train.PARTS})[0],
                                          train=train.TrainConfig()), None) == "python train.py"


@pytest.fixture(scope="module")
def copies(smoke, tmp_path_factory):
    """Two copies of the finished smoke run."""
    folder = tmp_path_factory.mktemp("copies")
    return [shutil.copytree(smoke, folder / name) for name in ("a", "b")]


def test_the_report_is_one_harmless_file(smoke):
    source = (smoke / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    check_harmless(page)
    assert len(source) < 2_000_000 and not re.search(r"https?:|file:|<script|@import|url\(", source)
    assert re.findall("<h2>(.*?)</h2>", source) == list(report.SECTIONS)
    assert page.tags.count("svg") > 30 and page.tags.count("img") > 8 * (8 + 9) + 64
    assert len(re.findall("✓ agree|✗ ", source)) >= 72  # each of eight users' nine pairs is marked
    words = " ".join(page.words)
    assert not re.search("</?(div|table|td|p|details)", words)  # markup that is shown as text
    for name in ("recall@20", "usage", "before reward", "u00", "setting ", "whole history", "perplexity",
                 "torch", "--gnn-steps", "MB of memory", "Healthy: ", "not measured"):
        assert name in words or name == "not measured", name


def test_every_measure_and_every_curve_is_explained(smoke, copies):
    run = report.load(copies[0])
    for name in run.metrics["generation"]["after_reward"]:
        base = name if name in report.MEANING else re.sub("_(image|text)$", "", name)
        assert report.MEANING[base] in report.measures(run).replace("&#x27;", "'")
    titles = {f"{stage} {re.sub('_(image|text|validation)$', '', name)}" for stage, _, name, _ in run.log}
    assert {x for x in titles if "valid_" not in x and "held_out" not in x} <= set(report.HEALTHY)


def test_a_finished_run_is_drawn_anew_with_the_same_pictures(smoke, copies):
    (copies[0] / "report.html").unlink()
    before = (smoke / "report.html").read_text(encoding="utf-8")
    after = report.rebuild(str(copies[0])).read_text(encoding="utf-8")
    pictures = [re.findall(r'src="([^"]*)"', page) for page in (before, after)]
    assert pictures[0] == pictures[1] and len(pictures[0]) > 200


def test_two_runs_side_by_side(copies, monkeypatch, capsys):
    module = importlib.import_module("tests.report")
    few = {name: module.SECTIONS[name] for name in ("Verdict", "Measures", "Seconds and memory")}
    monkeypatch.setattr(module, "SECTIONS", few)
    assert train.main(["--compare", *map(str, copies)]) == 0
    path = copies[0] / "compare.html"
    assert capsys.readouterr().out == f"{path}\n"
    source = path.read_text(encoding="utf-8")
    check_harmless(Page(source))
    assert source.count("<h2>Verdict</h2>") == 1 and source.count("what they did before it") == 4
    assert "run a" in source and "run b" in source and "runs two" in source


def test_what_is_no_finished_run_is_refused(copies, tmp_path, capsys):
    with pytest.raises(ValueError, match="not a run"):
        report.load(tmp_path / "nowhere")
    checkpoint = torch.load(copies[1] / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"done": ["gnn"]}, copies[1] / "checkpoint.pt")
    assert train.main(["--compare", str(copies[0]), str(copies[1])]) == 2
    assert "not evaluated yet" in capsys.readouterr().err
