"""The data folder: rubbish of all kinds is refused with its place; valid oddities load as meant."""
import csv
import os
import random
import re
import struct
import unicodedata
import zlib
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dppmg import (NEW, TEST, TRAIN, VALID, DataError, Dataset, hold_out_users, parse_prompt,
                   read_image, split_by_time)

ITEMS = ["item,text,prompt",
         "a,one fish,fish", "b,two cats,cat", "c,three dogs,dog", "d,four owls,owl"]
LIKES = ["user,item,timestamp", "ann,a,0", "ann,b,1", "ann,c,2", "bob,a,0", "bob,b,1", "bob,c,2"]


def rows(name, *lines, newline="\n"):
    """A change of a folder: write the lines as the file NAME.csv."""
    return raw(f"{name}.csv", newline.join(lines) + newline)


def raw(name, data):
    """A change of a folder: write the bytes (a str as UTF-8) as the file."""
    data = data.encode() if isinstance(data, str) else data
    return lambda folder: (folder / name).write_bytes(data)


def gone(name):
    return lambda folder: (folder / name).unlink()


def renamed(name, other):
    return lambda folder: (folder / name).rename(folder / other)


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def picture(item, mode="RGB", size=(8, 8), colour=0, **save):
    """A change of a folder: save a plain picture under images/; item is the file's name or stem."""
    name = item if "." in item else item + ".png"
    return lambda folder: Image.new(mode, size, colour).save(folder / "images" / name, **save)


def truncated(item, suffix, keep=0.6):
    def change(folder):
        noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
        path = folder / "images" / f"{item}.{suffix}"
        (folder / "images" / f"{item}.png").unlink()
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:int(keep * path.stat().st_size)])
    return change


def png(width, height, *extra):
    """A PNG that claims a size and holds next to nothing: a bomb; extra: (kind, data) of chunks."""
    def chunk(kind, data):
        size, check = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(kind + data))
        return size + kind + data + check
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(b"\0" * 99)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


def link(name, target):
    """A change of a folder: move the file or folder out, to {out}, and put a link in its place."""
    def change(folder):
        out, path = folder.parent / "data-outside", folder / name
        out.mkdir()
        path.rename(out / path.name)
        path.symlink_to(target.format(out=out))
    return change


def directory(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()
    return change


def item(row):
    return rows("items", *ITEMS, row)


def like(row):
    return rows("interactions", *LIKES, row)


@pytest.fixture
def folder(tmp_path):
    """A small good data set: 2 users, 4 items (d is liked by nobody)."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    rows("items", *ITEMS)(folder)
    rows("interactions", *LIKES)(folder)
    for n, name in enumerate("abcd"):
        picture(name, colour=(60 * n, 0, 0))(folder)
    return folder


def load(folder, size=8, seed=0, **options):
    return Dataset.load(folder, size, seed, **options)


def snapshot(folder):
    states = {path: path.lstat() for path in folder.parent.rglob("*")}
    return {path: (state.st_mtime_ns, state.st_size) for path, state in states.items()}


FORMAT = """
    interactions.csv   user,item[,timestamp]   numbers or ISO 8601 dates; --min-rating needs rating
    items.csv          item,text[,prompt]      each item once; prompt: phrases parted by commas
    images/ITEM.png    (.jpg .jpeg .webp)      one for each item, of any size and mode, no link out
    CSV in UTF-8, as many values in a row as in the header, "..." around one that holds a comma;
    --drop-incomplete leaves out items without a text or a readable picture
""".split("\n")[1:-1]


def problems(folder, **options):
    """What the one error says is wrong: its lines less the first, which counts, and the format."""
    with pytest.raises(DataError) as error:
        load(folder, **options)
    head, *lines = str(error.value).split("\n")
    assert all(line.startswith("  ") and line.isprintable() for line in lines)
    lines = [line[2:] for line in lines]
    end = lines.index(FORMAT[0])
    assert lines[end:] == FORMAT
    listed = [line for line in lines[:end] if not line.startswith("... ")]
    assert all(len(line) <= 300 for line in listed)
    if listed == lines[:end]:
        assert head == f"{folder}: {len(listed)} problem(s) in the data"
    return lines[:end]


def needs(file, header, *columns):
    return [f"{file}.csv:1: the header {header!r} needs {list(columns)}, each once"]


def misfit(line, count, item, file="items"):
    return [f"{file}.csv:{line}: item {item!r}: {count} values, but 3 in the header"]


def undecoded(place, byte, position, why="..."):
    return [f"{place}: 'utf-8' codec can't decode byte {byte} in position {position}: {why}"]


def no_id(item, line=6):
    return [f"items.csv:{line}: item {item}: item {item} cannot be an id"]


def no_time(value, line=8, item="a"):
    return [f"interactions.csv:{line}: item {item!r}: timestamp {value!r}: need a finite number "
            "in every row"]


def unknown(items, start=2):
    """The lines about items, each in a row, that items.csv does not have."""
    return [f"interactions.csv:{start + n}: item {item!r}: not in items.csv"
            for n, item in enumerate(items)]


def gap(why, line=3, item="b"):
    """The line about an item that lacks something; ... ends what Pillow words in its own way."""
    return [f"items.csv:{line}: item {item!r}: {why}"]


def one(text="two cats", pictures=()):
    """What is said of an item that has not just one text and one picture."""
    return f"text {text!r} and pictures {list(pictures)}: need one, of this name"


def no_pictures(names):
    """The lines about those of ITEMS that have no picture."""
    rows = [row.split(",") for row in ITEMS[1:]]
    return [gap(one(text), line, item)[0]
            for line, (item, text, _) in enumerate(rows, 2) if item in names]


NOT_HERE = "no such file in the folder, where links out of it do not count"
BAD = {     # what: (change of the good folder, what the error must say)
    "no interactions": (gone("interactions.csv"), [f"interactions.csv:1: {NOT_HERE}"]),
    "no items": (gone("items.csv"), [f"items.csv:1: {NOT_HERE}"]),
    "a folder": (directory("interactions.csv"), [f"interactions.csv:1: {NOT_HERE}"]),
    "empty file": (raw("items.csv", ""), needs("items", "", "item", "text")),
    "blank file": (raw("items.csv", "\n\n"), needs("items", "", "item", "text")),
    "header only": (rows("items", ITEMS[0]), unknown("abc")),
    "no header": (rows("interactions", *LIKES[1:]),
                  needs("interactions", "ann,a,0", "user", "item")),
    "missing column": (rows("items", "item,title", "a,x", "b,y"),
                       needs("items", "item,title", "item", "text")),
    "near misses": (rows("interactions", "user_id,item_id", "u,a"),
                    needs("interactions", "user_id,item_id", "user", "item")),
    "another separator": (rows("items", *(row.replace(",", "/") for row in ITEMS)),
                          needs("items", "item/text/prompt", "item", "text")),
    "column twice": (rows("items", "item,text, Item", "a,x,a", "b,y,b"),
                     needs("items", "item,text,item", "item", "text")),
    "optional column twice": (rows("interactions", "user,item,time,Time", "u,a,1,1"),
                              needs("interactions", "user,item,time,time", "user", "item")),
    "too few values": (item("e"), misfit(6, 1, "e")),
    "too many values": (item("e,big, bad,wolf"), misfit(6, 4, "e")),
    "too many in interactions": (like("ann,zebra, the,1"), misfit(8, 4, "zebra", "interactions")),
    "bad row after a quoted newline": (
        rows("items", ITEMS[0], 'a,"one\n\nfish",fish', *ITEMS[2:], "e"), misfit(8, 1, "e")),
    "bad row after blank lines": (
        rows("items", "", "", *ITEMS[:4], "", " , ,", ",,,,", "d"), misfit(10, 1, "d")),
    "quote never closed": (item('e,"endless,x\nf,y,z'), ["items.csv:6: unexpected end of data"]),
    "text after a quote": (item('e,"big" wolf,x'), ["items.csv:6: ',' expected after '\"'"]),
    "value too large": (item("e," + "x" * (2**17 + 1) + ",x"),
                        ["items.csv:6: field larger than field limit (131072)"]),
    "not UTF-8": (raw("items.csv", b"item,text\na,fish\nb,caf\xe9\n"),
                  undecoded("items.csv:3", "0xe9", 5, "invalid continuation byte")),
    "not UTF-8, CRLF": (raw("items.csv", b"item,text\r\na,fish\r\nb,caf\xe9\r\n"),
                        undecoded("items.csv:3", "0xe9", 5)),
    "not UTF-8, CR": (raw("items.csv", b"item,text\ra,fish\rb,caf\xe9\r"),
                      undecoded("items.csv:3", "0xe9", 5)),
    "UTF-16": (raw("items.csv", "\n".join(ITEMS).encode("utf-16")),
               undecoded("items.csv:1", "0xff", 0)),
    "UTF-16 without a mark": (raw("items.csv", "\n".join(ITEMS).encode("utf-16-le")), [
        "items.csv:1: the header 'i\\x00t\\x00e\\x00m\\x00,\\x00t..."]),
    "cut character": (raw("items.csv", b"item,text\na,x\nb,y\xf0"),
                      undecoded("items.csv:3", "0xf0", 3, "unexpected end of data")),
    "NUL in an item": (item("e\0,wolf,x"), no_id("'e\\x00'")),
    "NUL in a user": (like("ann\0,a,1"),
                      ["interactions.csv:8: item 'a': user 'ann\\x00' cannot be an id"]),
    "link out, csv": (link("items.csv", "{out}/items.csv"), [f"items.csv:1: {NOT_HERE}"]),
    "link out, relative": (link("interactions.csv", "../data-outside/interactions.csv"),
                           [f"interactions.csv:1: {NOT_HERE}"]),

    "empty item id": (item(",text,x"), no_id("''")),
    "blank item id": (item("  ,text,x"), no_id("'  '")),
    "item ..": (item("..,text,x"), gap(one("text"), 6, "..")),
    "item ../../x": (item("../../x,text,x"), gap(one("text"), 6, "../../x")),
    "item /etc/passwd": (item("/etc/passwd,text,x"), gap(one("text"), 6, "/etc/passwd")),
    "item with a newline": (item('"e\nf",text,x'), no_id("'e\\nf'")),
    "item with a C1 control": (item("e\x9b,text,x"), no_id("'e\\x9b'")),
    "item with a line separator": (item("e\u2028,text,x"), no_id("'e\\u2028'")),
    "item with an escape": (item("e\x1b[2J,text,x"), no_id("'e\\x1b[2J'")),
    "huge item id": (item("é" * 251 + ",text,x"),
                     [f"items.csv:6: item '{'é' * 59}: {one('text')}"]),
    "duplicate item": (item("b,again,x"), ["items.csv:6: item 'b': is there twice"]),
    "empty text": (both(item("e,,x"), picture("e")), gap(one("", ["e.png"]), 6, "e")),
    "blank text": (both(item('e,"\n ",x'), picture("e")), gap(one("\n ", ["e.png"]), 6, "e")),
    "one item": (rows("items", *ITEMS[:2]), unknown("bc", 3)),

    "unknown item": (like("ann,zebra,1"), unknown(["zebra"], 8)),
    "unknown item, often": (like("ann,zebra,1\nbob,zebra,2\nbob,yak,3"),
                            unknown(["zebra"], 8) + unknown(["yak"], 10)),
    "item of another case": (like("ann,A,1"), [unknown("A", 8)[0] + "; did you mean 'a'?"]),
    "item with a space": (like("ann, a,1"), [unknown([" a"], 8)[0] + "; did you mean 'a'?"]),
    "unknown item of 59 letters": (
        like(f"ann,{'x' * 59},1"),
        [f"interactions.csv:8: item '{'x' * 59}: not in items.csv"]),
    "empty user": (like(",a,1"), ["interactions.csv:8: item 'a': user '' cannot be an id"]),
    "blank user": (like(" ,a,1"), ["interactions.csv:8: item 'a': user ' ' cannot be an id"]),
    "user with a newline": (like('"u\nv",a,1'),
                            ["interactions.csv:8: item 'a': user 'u\\nv' cannot be an id"]),
    "huge user id with a newline": (
        like('"' + "u" * 5000 + '\n",a,1'),
        [f"interactions.csv:8: item 'a': user '{'u' * 59} cannot be an id"]),
    "a date among numbers": (like("bob,d,2018-09-20"), no_time("2018-09-20", item="d")),
    "a number among dates": (
        rows("interactions", LIKES[0], "ann,a,2018-09-20", "ann,b,7", "ann,c,2018-09-21"),
        ["interactions.csv:3: item 'b': timestamp '7': need a finite date in every row"]),
    **{f"no date {value!r}": (like(f"ann,a,{value}"), [
        f"interactions.csv:8: item 'a': timestamp {value!r} is neither a number nor a date"])
       for value in ["soon", "", " ", "20/09/2018", "2018-13-01", "08:00"]},
    **{f"timestamp {value!r}": (like(f"ann,a,{value}"), no_time(value))
       for value in ["nan", "-inf", "1e999"]},

    "no pictures": (both(renamed("images", "x"), lambda folder: (folder / "images").mkdir()),
                    no_pictures("abcd")),
    "no picture": (gone("images/b.png"), no_pictures("b")),
    "picture of another type": (renamed("images/b.png", "images/b.gif"), no_pictures("b")),
    "two pictures": (picture("b.jpg"), gap(one(pictures=["b.jpg", "b.png"]))),
    "picture is a folder": (directory("images/b.png"), no_pictures("b")),
    "picture is a pipe": (both(gone("images/b.png"), lambda x: os.mkfifo(x / "images/b.png")),
                          no_pictures("b")),
    "picture link out": (link("images/b.png", "{out}/b.png"), no_pictures("b")),
    "images link out": (link("images", "{out}/images"), no_pictures("abcd")),
    "dead link": (link("images/b.png", "nothing.png"), no_pictures("b")),
    "link to itself": (link("images/b.png", "b.png"), no_pictures("b")),
    "empty picture": (raw("images/b.png", b""), gap("cannot identify image file ...")),
    "text as picture": (raw("images/b.png", "<svg/>"), gap("cannot identify image file ...")),
    "GIF as PNG": (picture("b.png", "P", format="GIF"), gap("cannot identify image file ...")),
    "truncated PNG": (truncated("b", "png"), gap("image file is truncated...")),
    "truncated JPEG": (truncated("b", "jpg"), gap("image file is ...")),
    "truncated WebP": (truncated("b", "webp"), gap("...")),
    "PNG of no data": (raw("images/b.png", png(50, 50)), gap("image file is truncated...")),
    "text bomb": (
        raw("images/b.png", png(5, 6, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**22))))),
        gap("Decompressed data too large...")),
    "bomb": (raw("images/b.png", png(30_000, 30_000)),
             gap("Image size (900000000 pixels) exceeds limit of 178956970 pixels...")),
}


@pytest.mark.parametrize("what", BAD)
def test_rubbish_is_refused_with_its_place_and_nothing_is_written(folder, what):
    change, expected = BAD[what]
    change(folder)
    before = snapshot(folder)
    found = problems(folder)
    assert len(found) == len(expected), found
    for line, wanted in zip(found, expected):
        start = wanted.removesuffix("...")
        assert line == wanted if start == wanted else line.startswith(start)
    assert snapshot(folder) == before


@pytest.mark.parametrize("what", ["missing", "a file", "no images", "images a file", "x" * 999])
def test_a_folder_that_is_none_costs_one_line(tmp_path, what):
    (tmp_path / "a file").write_text("")
    (tmp_path / "no images").mkdir()
    (tmp_path / "images a file").mkdir()
    (tmp_path / "images a file/images").write_text("")
    with pytest.raises(DataError) as error:
        load(tmp_path / what)
    assert str(error.value) == f"{tmp_path / what}: does not exist, or holds no folder images/"


@pytest.mark.parametrize("n", [1, 4])
def test_fewer_than_two_users_are_refused(folder, n):
    rows("interactions", *LIKES[:n])(folder)
    with pytest.raises(DataError) as error:
        load(folder)
    assert str(error.value) == f"{folder}: {n // 4} users with likes and 4 items; need 2 of each"


def test_what_left_too_little_is_said(folder):
    rows("interactions", "user,item,rating", *RATED)(folder)
    with pytest.raises(DataError) as error:
        load(folder, min_rating=11)
    assert str(error.value) == (f"{folder}: 0 users with likes and 4 items; need 2 of each\n"
                                "  7 interactions not rated 11 or more left out")


def test_two_users_two_items_and_a_user_of_three_items_suffice(folder):
    rows("interactions", "user,item", "u,a", "u,b", "u,c", "v,a")(folder)
    assert load(folder).part.bincount().tolist() == [2, 1, 1]
    rows("items", *ITEMS[:2], "b,,x")(folder)
    rows("interactions", "user,item", "u,a", "u,b", "v,a", "v,b")(folder)
    with pytest.raises(DataError) as error:
        load(folder, drop_incomplete=True)
    assert str(error.value).split("\n") == [
        f"{folder}: 2 users with likes and 1 items; need 2 of each",
        "  2 interactions with items that are left out",
        "  1 items without a text or a readable picture left out"]


def test_one_error_lists_all_that_is_wrong_and_no_more(folder):
    rows("items", *ITEMS, "e,,x", "e/f,ok,x", "b,again,x")(folder)
    rows("interactions", *LIKES, "ann,zebra,1", "bob,zebra,nan", "eve,e,soon", ",c,1", "bob,b/c,1",
         "ann,e/f,1")(folder)
    gone("images/c.png")(folder)
    raw("images/d.png", "rubbish")(folder)
    # zebra is named once; e, e/f and c are known, if not fit
    assert [line.split(" and ")[0] for line in problems(folder)] == [
        "items.csv:4: item 'c': text 'three dogs'",
        f"items.csv:5: item 'd': cannot identify image file '{folder}/images/d.png'",
        "items.csv:6: item 'e': text ''", "items.csv:7: item 'e/f': text 'ok'",
        "items.csv:8: item 'b': is there twice",
        "interactions.csv:8: item 'zebra': not in items.csv",
        no_time("nan", 9, "zebra")[0],
        "interactions.csv:10: item 'e': timestamp 'soon' is neither a number nor a date",
        "interactions.csv:11: item 'c': user '' cannot be an id",
        "interactions.csv:12: item 'b/c': not in items.csv"]


def test_what_follows_from_broken_rows_is_not_reported(folder):
    rows("items", *ITEMS[:2], "b,two, or three, cats,cat", "c")(folder)
    assert problems(folder) == misfit(3, 5, "b") + misfit(4, 1, "c")
    rows("items", *ITEMS[:2], 'e,"endless')(folder)
    rows("interactions", *LIKES[:4], "ann,zebra,inf", 'ann,"endless')(folder)
    assert problems(folder) == ["items.csv:3: unexpected end of data",
                                *no_time("inf", 5, "zebra"),
                                "interactions.csv:6: unexpected end of data"]


def test_a_long_list_is_cut_per_file_and_written_whole_elsewhere(folder):
    names = [f"é{n}" for n in range(11)]
    rows("items", *ITEMS, *(f"{name},x,x" for name in names))(folder)
    rows("interactions", *LIKES, *(f"{user},a,nan" for user in "abcdefghi"))(folder)
    times = [no_time("nan", 8 + n)[0] for n in range(9)]
    lacks = [gap(one("x"), 6 + n, name)[0] for n, name in enumerate(names)]
    *shown, where = problems(folder)
    assert shown == lacks[:10] + times
    whole = Path(where.removeprefix("... the whole list is in "))
    assert not whole.is_relative_to(folder)
    assert whole.read_text(encoding="utf-8").split("\n") == lacks + times
    whole.unlink()
    rows("items", *ITEMS, *(f"{name},x,x" for name in names[:10]))(folder)
    assert problems(folder) == lacks[:10] + times


def test_a_long_line_is_cut(folder):
    deep = folder.parent / ("x" * 250)
    folder.rename(deep)
    raw("images/b.png", "rubbish")(deep)
    assert len(problems(deep)[0]) == 300


# ---- what is odd but right -----------------------------------------------------------------------

def test_a_plain_folder_loads_as_it_is_written(folder):
    data = load(folder)
    assert (data.name, data.user_ids, data.item_ids) == ("data", ["ann", "bob"], list("abcd"))
    assert data.texts == ["one fish", "two cats", "three dogs", "four owls"]
    assert data.prompts == [("fish",), ("cat",), ("dog",), ("owl",)]
    assert data.words == ["cat", "dog", "fish", "owl"]
    assert data.user.tolist() == [0, 0, 0, 1, 1, 1] and data.item.tolist() == [0, 1, 2] * 2
    assert data.time.tolist() == [0, 1, 2] * 2 and data.time.dtype == torch.float64
    assert data.part.tolist() == [TRAIN, VALID, TEST] * 2 and data.part.dtype == torch.int8
    assert [column.tolist() for column in data.pairs(VALID)] == [[0, 1], [1, 1]]
    assert data.images.shape == (4, 3, 8, 8) and data.images.dtype == torch.uint8 and data.images.is_contiguous()
    assert data.images[:, 0].float().mean((1, 2)).tolist() == [0, 60, 120, 180]
    assert data.images[:, 1:].max() == 0
    assert data.notices == []


def test_a_relative_folder_and_links_within_it_load(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "images/b.png").unlink()
    (folder / "images/b.png").symlink_to("a.png")
    assert load(".").name == "data" and torch.equal(load(".").images[0], load(".").images[1])
    (folder.parent / "door").symlink_to(folder)
    assert load(folder.parent / "door").item_ids == list("abcd")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_newlines_and_byte_order_mark(folder, newline, mark):
    rows("items", mark + ITEMS[0], *ITEMS[1:], newline=newline)(folder)
    rows("interactions", mark + LIKES[0], *LIKES[1:], newline=newline)(folder)
    data = load(folder)
    assert data.texts[3] == "four owls" and data.item_ids[0] == "a" and data.time[2] == 2
    assert data.prompts[3] == ("owl",) and data.notices == []


@pytest.mark.parametrize("text", ["🐟👩‍👩‍👧 emoji", "שלום עולם", "مرحبا", "two\nlines",
                                  "two\r\nlines", 'say "hi", she said',
                                  "<script>alert(1)</script>", "=1+1", "日本語",
                                  "x" * 2**17, " padded "])
def test_any_text_is_kept_as_it_is(folder, text):
    with open(folder / "items.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["item", "text"], ["a", text], *(name * 2 for name in "bcd")])
    data = load(folder)
    assert data.texts == [text, *"bcd"] and data.prompts == [()] * 4
    assert data.words == [] and data.notices == []


@pytest.mark.parametrize("name", ["two words", "Ünïcode-日本", "b.c", "...", "-rf", "A", "a:b",
                                  "100%", "🐟", "x" * 246, "'q'"])
def test_any_id_that_can_name_a_file(folder, name):
    item(f"{name},text,x")(folder)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(folder / "images" / f"{name}.png", format="PNG")
    rows("interactions", *LIKES, f"{name},{name},7")(folder)
    data = load(folder)
    assert data.item_ids[-1] == name == data.user_ids[-1]
    assert data.images[4].unique().tolist() == [9]
    assert data.item[-1] == 4 and data.user[-1] == 2


def test_user_ids_may_be_paths_and_long(folder):
    rows("interactions", *LIKES, "../../x,a,1", "..,a,1", f"{'x' * 250},a,1")(folder)
    assert load(folder).user_ids == ["ann", "bob", "../../x", "..", "x" * 250]


def test_columns_in_any_order_and_case_with_others_between_and_blank_lines(folder):
    rows("items", "Price, TEXT ,item,", "1,one fish,a,", "", ",,,", "2,two cats,b,", " ,, ,",
         "3,x,c,", "4,y,d,")(folder)
    rows("interactions", "Timestamp,place,,ITEM,User", "0,5,,a,ann", "1,5,,b,ann", "2,5,,c,ann",
         "0,1,,d,bob")(folder)
    data = load(folder)
    assert data.texts[:2] == ["one fish", "two cats"] and data.user.tolist() == [0, 0, 0, 1]
    assert data.time.tolist() == [0, 1, 2, 0]
    assert data.notices == ["2 columns of items.csv ignored: 'price, '",
                            "2 columns of interactions.csv ignored: 'place, '"]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_other_separators_are_recognized(folder, mark):
    lines = [row.replace(",", mark) for row in ITEMS[:4]]
    rows("items", "", *lines, f'd{mark}"x, {mark}y, z"{mark}owl, bird')(folder)
    data = load(folder)
    assert data.texts == ["one fish", "two cats", "three dogs", f"x, {mark}y, z"]
    assert data.prompts[3] == ("owl", "bird")
    assert data.notices == [f"3 columns of items.csv separated by {mark!r}"]


def test_duplicates_keep_the_earliest(folder):
    rows("interactions", LIKES[0], "u,a,5", "u,b,1", "v,a,2", "u,a,-3", "u,a,9", "u,c,1",
         "v,a,2")(folder)
    data = load(folder)
    found = list(zip(data.user.tolist(), data.item.tolist(), data.time.tolist()))
    assert found == [(0, 0, -3), (0, 1, 1), (1, 0, 2), (0, 2, 1)]
    assert data.notices == ["3 repeated interactions merged, the earliest kept",
                            "1 interactions without a time of their own: ordered by chance"]


@pytest.mark.parametrize("seed", range(3))
def test_merging_agrees_with_a_dictionary(folder, seed):
    draw = random.Random(seed)
    table = [(draw.choice("uvwxy"), draw.choice("abcd"), draw.randint(0, 3)) for _ in range(60)]
    rows("interactions", LIKES[0], *("%s,%s,%d" % row for row in table))(folder)
    data, earliest = load(folder), {}
    for user, item, time in table:
        earliest[user, item] = min(time, earliest.get((user, item), time))
    ids = [(data.user_ids[user], data.item_ids[item]) for user, item in zip(data.user, data.item)]
    assert len(ids) == len(earliest) and dict(zip(ids, data.time.tolist())) == earliest


def test_odd_numbers_are_times(folder):
    rows("interactions", LIKES[0], "u,a,-5", "u,b,0.25", "u,c,1e3", "v,a,1.5e9", "v,b, 7 ",
         "v,c,+8")(folder)
    assert load(folder).time.tolist() == [-5, 0.25, 1000, 1.5e9, 7, 8]


@pytest.mark.parametrize("column", ["timestamp", "time", "Date", "DateTime"])
def test_dates_are_times_in_utc_if_they_do_not_say(folder, column):
    rows("interactions", f"user,item,{column}", "u,a,2018-09-20", "u,b,2018-09-20 08:00:00",
         "u,c,2018-09-20T08:00:00Z", "v,a,2018-09-20T08:00:00+02:00",
         "v,b, 2018-09-20T08:00:00.5 ", "v,c,20180920T00")(folder)
    midnight = datetime(2018, 9, 20, tzinfo=timezone.utc).timestamp()
    hours = [(time - midnight) / 3600 for time in load(folder).time.tolist()]
    assert hours == [0, 8, 8, 6, 8 + 0.5 / 3600, 0]


def test_the_timestamp_column_is_the_time_where_there_are_several(folder):
    rows("interactions", "date,user,time,item,timestamp,datetime", "x,u,y,a,3,z", "x,u,y,b,2,z",
         "x,u,y,c,1,z", "x,v,y,a,4,z")(folder)
    data = load(folder)
    assert data.time.tolist() == [3, 2, 1, 4]
    assert data.part.tolist() == [TEST, VALID, TRAIN, TRAIN]
    assert data.notices == ["3 columns of interactions.csv ignored: 'date, time, datetime'"]


@pytest.mark.parametrize("time", ["", ",1.6E+12"])
def test_without_times_that_differ_the_seed_decides(folder, time):
    likes = [f"u{n},{item}{time}" for n in range(40) for item in "abc"]
    rows("interactions", "user,item" + ",timestamp" * bool(time), *likes)(folder)
    data, same, other = load(folder), load(folder), load(folder, seed=1)
    assert data.notices == [TIES.format(80)] and data.time.unique().tolist() == [1.6e12 if time else 0]
    assert torch.equal(data.part, same.part) and not torch.equal(data.part, other.part)
    assert data.part.bincount().tolist() == [40, 40, 40]
    assert len(set(map(tuple, data.part.view(40, 3).tolist()))) == 6        # every order occurs


TIES = "{} interactions without a time of their own: ordered by chance"
RATED = ["u,a,4", "u,b,0.5", "u,c,3", "v,a,3.5", "v,b,1e1", "u,d,5", "w,a,2"]


@pytest.mark.parametrize("column", ["rating", "Score", "stars", "label", "like", "CLICK", "overall"])
def test_every_row_is_a_like_unless_a_lowest_rating_is_given(folder, column):
    rows("interactions", f"user,item,{column}", *RATED)(folder)
    data = load(folder)
    assert data.user_ids == ["u", "v", "w"] and len(data.user) == 7
    assert data.notices == [f"1 column {column.lower()!r}: every row counts as a like; "
                            "--min-rating R keeps rows of at least R", TIES.format(4)]
    data = load(folder, min_rating=3)
    assert data.user_ids == ["u", "v"] and data.user.tolist() == [0, 0, 1, 1, 0]
    assert data.item.tolist() == [0, 2, 0, 1, 3]
    assert data.notices == ["2 interactions not rated 3 or more left out", TIES.format(3)]
    assert len(load(folder, min_rating=0).user) == 7                # 0 is a rating, too


def test_a_rating_must_be_a_number_where_it_is_needed(folder):
    values = ["dislike", "", "nan"]
    rows("interactions", "user,item,rating", *RATED, *(f"v,d,{value}" for value in values))(folder)
    assert len(load(folder).user) == 8
    assert problems(folder, min_rating=1) == [
        "interactions.csv:9: item 'd': could not convert string to float: 'dislike'"]
    rows("interactions", "user,item,rating", *RATED, "v,d,nan", "w,d,")(folder)
    data = load(folder, min_rating=1)
    assert len(data.user) == 6 and "3 interactions not rated 1 or more left out" in data.notices
    rows("interactions", *LIKES)(folder)
    missing = needs("interactions", LIKES[0], "user", "item", "rating")
    assert problems(folder, min_rating=1) == missing
    rows("items", "item,text,rating", *(f"{item},x,5" for item in "abcd"))(folder)
    assert load(folder).notices == ["1 columns of items.csv ignored: 'rating'"]


def test_incomplete_items_are_left_out_with_their_interactions(folder):
    rows("items", *ITEMS[:2], "x,no picture,x", "e, ,empty", ITEMS[2], "f,damaged,f|g",
         *ITEMS[3:])(folder)
    picture("e")(folder)
    raw("images/f.png", "rubbish")(folder)
    rows("interactions", *LIKES[:3], "ann,e,5", "eve,f,5", *LIKES[3:], "bob,x,5")(folder)
    assert len(problems(folder)) == 3
    data = load(folder, drop_incomplete=True)
    assert data.notices == ["3 interactions with items that are left out",
                            "3 items without a text or a readable picture left out"]
    rows("items", *ITEMS)(folder)
    rows("interactions", *LIKES)(folder)
    whole = load(folder, drop_incomplete=True)
    assert data.fingerprint() == whole.fingerprint() and whole.notices == []
    assert (data.words, data.texts) == (whole.words, whole.texts)


def test_other_errors_are_none_the_less_errors(folder):
    rows("items", *ITEMS, "e,,x", "a,again,x")(folder)
    assert problems(folder, drop_incomplete=True) == ["items.csv:7: item 'a': is there twice"]


@pytest.mark.parametrize("change", [
    rows("items", *ITEMS[:4], "d,four owls,bird"), rows("items", *ITEMS[:4], "d,5 owls,owl"),
    picture("d", colour=(180, 0, 1)), like("ann,d,3"), rows("interactions", *LIKES[:6], "bob,d,2"),
    rows("interactions", *LIKES[:6], "bob,c,-1"),
    rows("interactions", *(row.replace("bob", "eve") for row in LIKES))])
def test_the_fingerprint_tells_what_training_reads(folder, change):
    first, again = load(folder).fingerprint(), load(folder).fingerprint()
    change(folder)
    assert first == again != load(folder).fingerprint()


def test_a_picture_is_found_whatever_the_unicode_form_of_its_name(folder):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    assert composed != decomposed
    rows("items", *ITEMS, f"{composed}1,text,x", f"{decomposed}2,text,x")(folder)
    picture(f"{decomposed}1", colour=(7, 0, 0))(folder)
    picture(f"{composed}2", colour=(8, 0, 0))(folder)
    data = load(folder)
    assert data.item_ids[4:] == [f"{composed}1", f"{decomposed}2"]
    assert data.images[4:, 0].float().mean((1, 2)).tolist() == [7, 8]


def test_ids_that_differ_in_form_alone_are_noticed(folder):
    names = ["A", "7", "8.5", "80.5", "0", "10"]
    rows("items", *ITEMS, *(f"{name},text,x" for name in names))(folder)
    for name in names:
        picture(f"{name}.png")(folder)
    users = ["u0", "u0 ", "U0", "007", "7.0", "é", "e\u0301", "Bob", "bob",
             "0.0", "1", "100", "x.01", "u00"]
    rows("interactions", *LIKES[:4], *(f"{user},a,{n}" for n, user in enumerate(users)))(folder)
    data = load(folder)
    assert data.user_ids == ["ann", *users] and data.item_ids[4:] == names
    assert data.notices == [
        "5 sets of ids look alike: [('item', 'a', 'A'), ('user', 'u0', 'u0 ', 'U0'), "
        "('user', '007', '7.0')]: did you mean one?"]
    asked = {"A ": "'a'?; did you mean 'A'?", "07": "'7'?", "7.0": "'7'?", "7.00": "",
             "00": "'0'?", "0.0": "'0'?", "1": ""}
    rows("interactions", *LIKES, *(f"bob,{name},1" for name in asked))(folder)
    assert problems(folder) == [line + f"; did you mean {near}" * bool(near)
                                for line, near in zip(unknown(asked, 8), asked.values())]


def test_what_looks_the_same_is_told_apart(folder):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    rows("interactions", *LIKES, f"{composed},a,1", f"{decomposed},a,2")(folder)
    assert load(folder).notices == [
        r"1 sets of ids look alike: [('user', '\xe9', 'e\u0301')]: did you mean one?"]
    rows("items", *ITEMS, f"{decomposed},text,x")(folder)
    picture(f"{decomposed}.png")(folder)
    rows("interactions", *LIKES, f"ann,{composed},1")(folder)
    assert problems(folder) == [
        f"interactions.csv:8: item {composed!r}: not in items.csv; did you mean {decomposed!a}?"]


def test_pictures_of_nearly_the_name_are_named(folder):
    rows("items", *ITEMS, "12,text,x", "12.0,text,x", "I1 ,text,x")(folder)
    for name in ("0012.png", "012.jpg", "i1.png"):
        picture(name)(folder)
    assert problems(folder) == [
        f"items.csv:{line}: item {item!r}: {one('text', there)}" for line, item, there in
        ((6, "12", ["0012.png", "012.jpg"]), (7, "12.0", ["0012.png", "012.jpg"]), (8, "I1 ", ["i1.png"]))]


def test_all_ignored_columns_are_named(folder):
    names = [f"a column with a long name {n}" for n in range(9)]
    rows("interactions", ",".join(["user", "item", *names]),
         *(f"{row[:5]},{',' * 8}" for row in LIKES[1:]))(folder)
    assert load(folder).notices[0] == f"9 columns of interactions.csv ignored: {', '.join(names)!r}"


def test_prompts():
    assert parse_prompt("Comedy, film  Noir,comedy , ,STRAẞE") == ("comedy", "film noir", "strasse")
    assert parse_prompt("fish") == ("fish",) and parse_prompt("film noir") == ("film noir",)
    assert parse_prompt("") == parse_prompt(" , ") == parse_prompt("[]") == ()
    assert parse_prompt("|\n, ''") == ()
    assert parse_prompt("b\na,\tc ") == ("b a", "c") and parse_prompt("ß,SS") == ("ss",)
    assert parse_prompt("Film Noir|drama | a,b") == ("film noir", "drama", "a", "b")
    listed = """['Rock 'n' roll', "children's" ,'x']"""
    assert parse_prompt(listed) == ("rock 'n' roll", "children's", "x")


def test_prompts_in_other_notations_are_split(folder):
    rows("items", "item,text,prompt", "a,x,fish|sea", "b,x,\"['cat', 'pet']\"", 'c,x,"dog, pet"',
         "d,x,")(folder)
    data = load(folder)
    assert data.prompts == [("fish", "sea"), ("cat", "pet"), ("dog", "pet"), ()]
    assert data.words == ["cat", "dog", "fish", "pet", "sea"]


def test_long_prompts_are_cut_with_a_notice_and_their_vocabulary_too(folder):
    long = ",".join(f"w{n:02d}" for n in range(20))
    rows("items", *ITEMS[:3], f'c,text,"{long[:16 * 4 - 1]}"', f'd,text,"{long}"')(folder)
    data = load(folder)
    assert data.prompts[2] == data.prompts[3] == tuple(f"w{n:02d}" for n in range(16))
    assert data.words == sorted({"fish", "cat", *data.prompts[3]})
    assert data.notices == ["1 prompts cut to 16 phrases"]


# ---- pictures ------------------------------------------------------------------------------------

def one_colour(image):
    colours = np.unique(image.reshape(3, -1), axis=1)
    assert colours.shape[1] == 1, colours
    return colours[:, 0].tolist()


@pytest.mark.parametrize("mode, colour, expected", [
    ("RGB", (10, 20, 30), (10, 20, 30)), ("L", 77, (77,) * 3), ("1", 1, (255,) * 3), ("P", 0, None),
    ("RGBA", (200, 0, 0, 255), (200, 0, 0)), ("RGBA", (0, 0, 0, 0), (255,) * 3),
    ("RGBA", (0, 0, 0, 128), (127,) * 3), ("LA", (0, 51), (204,) * 3),
    ("I;16", 65535, (255,) * 3), ("I;16", 32768, (128,) * 3), ("I;16", 129, (1,) * 3),
    ("I;16", 128, (0,) * 3)])
def test_modes_become_rgb_on_white(tmp_path, mode, colour, expected):
    image = Image.new(mode, (5, 9), colour)
    if mode == "P":
        image.putpalette([1, 2, 3, 4, 5, 6])
    image.save(tmp_path / "x.png")
    assert one_colour(read_image(tmp_path / "x.png", 7)) == list(expected or (1, 2, 3))


def test_transparent_palette_and_colour_key_become_white(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([1, 2, 3, 4, 5, 6])
    image.save(tmp_path / "palette.png", transparency=1)
    Image.new("RGB", (4, 4), (4, 5, 6)).save(tmp_path / "key.png", transparency=(4, 5, 6))
    for name in ("palette.png", "key.png"):
        assert one_colour(read_image(tmp_path / name, 4)) == [255] * 3


def test_cmyk_and_grey_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
    colour = one_colour(read_image(tmp_path / "x.jpg", 4))
    assert np.abs(np.subtract(colour, [255, 0, 0])).max() <= 4
    Image.new("L", (16, 16), 100).save(tmp_path / "g.jpg")
    assert one_colour(read_image(tmp_path / "g.jpg", 4)) == [100] * 3


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_an_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(tmp_path / f"x.{suffix}").n_frames == 3
    assert one_colour(read_image(tmp_path / f"x.{suffix}", 4)) == [255, 0, 0]


@pytest.mark.parametrize("suffix, tolerance", [("png", 0), ("webp", 40), ("jpg", 40)])
def test_a_picture_is_turned_as_exif_says(tmp_path, suffix, tolerance):
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, 32:] = 255                        # right half white
    exif = Image.Exif()
    exif[0x0112] = 6                            # turn clockwise by 90 degrees: bottom half white
    Image.fromarray(pixels).save(tmp_path / f"x.{suffix}", exif=exif)
    image = read_image(tmp_path / f"x.{suffix}", 32).astype(int)
    assert image[:, :12].max() <= tolerance and image[:, 20:].min() >= 255 - tolerance


def test_a_picture_of_the_right_size_is_kept_to_the_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png", 16) == pixels.transpose(2, 0, 1)).all()


def test_the_whole_picture_is_shown_and_channels_and_axes_are_in_order(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:20, :40, 0] = pixels[:20, 40:, 1] = pixels[20:, :40, 2] = 255   # red green, blue black
    Image.fromarray(pixels).save(tmp_path / "x.png")
    corner = read_image(tmp_path / "x.png", 8)[:, [0, 0, 7, 7], [0, 7, 0, 7]].T
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]]
    assert np.abs(corner.astype(int) - colours).max() <= 6


@pytest.mark.parametrize("height, width", [(600, 800), (600, 3000), (3000, 600)])
def test_large_jpegs_shrink_as_their_full_decoding_would(tmp_path, height, width):
    y, x = np.mgrid[:height, :width]
    stripes = [255 * (n // (size // 48) % 2) for n, size in ((y, height), (x, width))]
    pixels = np.stack([x * 255 // width, *stripes], 2).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=95)
    full = Image.open(tmp_path / "x.jpg").convert("RGB").resize((96, 96), Image.Resampling.LANCZOS)
    image = read_image(tmp_path / "x.jpg", 96).transpose(1, 2, 0)
    assert np.abs(image - np.asarray(full, int)).mean() < 2


def test_shrinking_averages(tmp_path):
    pixels = np.indices((64, 64)).sum(0) % 2 * 255              # a fine chequerboard becomes grey
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "x.png")
    assert np.abs(read_image(tmp_path / "x.png", 8) - 127.5).max() < 4


def test_any_suffix_case_and_size(folder):
    for name in "abcd":
        gone(f"images/{name}.png")(folder)
    both(picture("a.PNG", colour="blue", size=(1, 1)), picture("b.webp", size=(300, 2)),
         picture("c.JPEG", size=(16, 999)), picture("d.Jpg"), picture("stray.png"),
         raw("images/notes.txt", "text"))(folder)
    assert load(folder).images[0].amax((1, 2)).tolist() == [0, 0, 255]


def test_pictures_stay_with_their_items_whatever_the_order_of_decoding(folder):
    names = [f"i{n}" for n in range(60)]
    rows("items", "item,text", *(f"{name},text" for name in names))(folder)
    likes = [f"{user},{name},1" for user in "uv" for name in names[:3]]
    rows("interactions", LIKES[0], *likes)(folder)
    for n, name in enumerate(names):
        picture(name, size=(500, 500) if n % 7 == 0 else (3, 3), colour=(n, 0, 255 - n))(folder)
    images = load(folder).images
    assert images[:, 0, 0, 0].tolist() == list(range(60))
    assert images[:, 2, 7, 7].tolist() == [255 - n for n in range(60)]


# ---- split ---------------------------------------------------------------------------------------

def slow_split(user, time):
    """The same split by loops, for times without ties."""
    part = [TRAIN] * len(user)
    for u in set(user):
        mine = [row for row in range(len(user)) if user[row] == u]
        mine.sort(key=lambda row: time[row])
        held = max(1, int(len(mine) / 10 + 0.5)) if len(mine) >= 3 else 0
        for row in mine[len(mine) - held:]:
            part[row] = TEST
        for row in mine[len(mine) - 2 * held:len(mine) - held]:
            part[row] = VALID
    return part


@pytest.mark.parametrize("seed", range(5))
def test_split_agrees_with_loops(seed):
    draw = torch.Generator().manual_seed(seed)
    user = torch.randint(12, (200,), generator=draw) ** 2 // 12      # some of many, some of none
    time = torch.randperm(200, generator=draw).double() - 100
    assert split_by_time(user, time, seed).tolist() == slow_split(user.tolist(), time.tolist())


@pytest.mark.parametrize("n, held", [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (10, 1), (14, 1),
                                     (15, 2), (24, 2), (25, 3), (100, 10)])
@pytest.mark.parametrize("step", [0, 1])
def test_split_sizes(n, held, step):
    part = split_by_time(torch.zeros(n, dtype=torch.int64), step * torch.arange(n), 0)
    assert torch.bincount(part.long(), minlength=3).tolist() == [n - 2 * held, held, held]


def test_ties_are_broken_by_the_seed_and_nothing_else_is():
    user, time = torch.zeros(1000, dtype=torch.int64), torch.arange(1000).double() // 250
    one, two = split_by_time(user, time, 1), split_by_time(user, time, 2)
    assert torch.equal(one, split_by_time(user, time, 1)) and not torch.equal(one, two)
    assert (one[:750] == TRAIN).all() and (one[750:] != TRAIN).sum() == 200
    state = torch.get_rng_state()
    split_by_time(user, time, 3)
    assert torch.equal(state, torch.get_rng_state())            # the global generator is left alone


def test_split_needs_a_time_for_each():
    with pytest.raises(ValueError, match="same shape"):
        split_by_time(torch.zeros(3, dtype=torch.int64), torch.zeros(2), 0)


# ---- new users -----------------------------------------------------------------------------------

def many_users():
    """50 users of 2 to 6 interactions each, in no order, with all items different."""
    user = torch.arange(50).repeat_interleave(2 + torch.arange(50) % 5)
    user = user[torch.randperm(len(user), generator=torch.Generator().manual_seed(0))]
    time = torch.randperm(len(user), generator=torch.Generator().manual_seed(1)).double()
    ids, item = [f"u{n}" for n in range(50)], torch.arange(len(user))
    part = split_by_time(user, time, 0)
    return Dataset("x", ids, [], [], [], [], None, user, item, time, part, [])


def test_users_held_out_keep_their_history_and_test_in_the_order_of_time():
    before, data = many_users(), many_users()
    new = hold_out_users(data, 0.5, seed=3)
    held = data.user[data.part == NEW].unique().tolist()
    assert len(held) == 25 and all(u % 5 for u in held)         # those of 2 interactions stay
    assert 0 < sum(u % 5 == 1 for u in held) < 10               # but not all of those of 3
    for name, part in (("history", TRAIN), ("test", TEST)):
        rows = [row for row in range(len(data.user))
                if data.user[row] in held and before.part[row] == part]
        rows.sort(key=lambda row: (data.user[row], data.time[row]))
        assert new[name].tolist() == [data.user[rows].tolist(), data.item[rows].tolist()]
    others = ~torch.isin(data.user, torch.tensor(held))
    assert torch.equal(data.part[others], before.part[others]) and (data.part[~others] == NEW).all()


def test_the_seed_decides_who_is_held_out_and_two_are_always_left():
    new = [hold_out_users(many_users(), share, seed)["test"][0].tolist()
           for share, seed in ((0.1, 0), (0.1, 0), (0.1, 1), (1.0, 0), (0.0, 0))]
    assert new[0] == new[1] != new[2] and [len(users) for users in new] == [5, 5, 5, 38, 0]
