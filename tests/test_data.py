"""The data folder: all kinds of rubbish are refused with place and cure; valid oddities load as meant."""
import csv
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dppmg import TEST, TRAIN, VALID, DataError, Dataset, parse_prompt, read_image, split_by_time

ITEMS = ["item,text,prompt", "a,one fish,fish", "b,two cats,cat", "c,three dogs,dog", "d,four owls,owl"]
LIKES = ["user,item,timestamp", "ann,a,0", "ann,b,1", "ann,c,2", "bob,a,0", "bob,b,1", "bob,c,2"]


def rows(name, *lines, newline="\n"):
    """A change of a folder: write the lines as the file NAME.csv."""
    return lambda folder: (folder / f"{name}.csv").write_bytes((newline.join(lines) + newline).encode())


def raw(name, data):
    """A change of a folder: write the bytes (a str as UTF-8) as the file."""
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def gone(name):
    return lambda folder: (folder / name).unlink()


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
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
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


def load(folder, size=8, seed=0):
    return Dataset.load(folder, size, seed)


def snapshot(folder):
    states = {path: path.lstat() for path in folder.parent.rglob("*")}
    return {path: (state.st_mtime_ns, state.st_size) for path, state in states.items()}


BAD = {     # what: (change of the good folder, what the error must say)
    "no interactions": (gone("interactions.csv"), r"interactions\.csv: no such file: need"),
    "no items": (gone("items.csv"), r"items\.csv: no such file: need"),
    "interactions is a folder": (directory("interactions.csv"), r"interactions\.csv: no such file"),
    "empty file": (raw("items.csv", ""),
                   r"items\.csv:1: item and text must be .* header is '': begin .* item,text"),
    "blank file": (raw("items.csv", "\n\n"), r"items\.csv:1: item and text must be a column once"),
    "header only, items": (rows("items", ITEMS[0]), r"items\.csv: 0 items below the header: need at least 2"),
    "header only, likes": (rows("interactions", LIKES[0]), r"interactions\.csv: 0 users below the header"),
    "no header": (rows("interactions", *LIKES[1:]), r"interactions\.csv:1: user and item must.*'ann,a,0'"),
    "missing column": (rows("items", "item,title", "a,x", "b,y"), r"items\.csv:1: text must .*'item,title'"),
    "semicolons": (rows("items", *(row.replace(",", ";") for row in ITEMS)),
                   r"items\.csv:1: .*'item;text;prompt'"),
    "column twice": (rows("items", "item,text,item", "a,x,a", "b,y,b"),
                     r"items\.csv:1: item must be a column once"),
    "optional column twice": (rows("interactions", "user,item,timestamp,timestamp", "u,a,1,1"),
                              r"interactions\.csv:1: timestamp must be a column once"),
    "too few values": (item("e"), r"items\.csv:6: 1 values where the header has 3: .*comma"),
    "too many values": (item("e,big, bad,wolf"), r"items\.csv:6: 4 values where the header has 3: .*comma"),
    "bad row after a quoted newline": (rows("items", ITEMS[0], 'a,"one\n\nfish",fish', *ITEMS[2:], "e"),
                                       r"items\.csv:8: 1 values"),
    "quote never closed": (item('e,"endless,x\nf,y,z'),
                           r"items\.csv:6: the row that starts here .*close each quote"),
    "text after a quote": (item('e,"big" wolf,x'),
                           r"items\.csv:6: the row .*expected after.*close each quote"),
    "value too large": (item("e," + "x" * (2**20 + 1) + ",x"),
                        r"items\.csv:6: .*larger than.*1,048,576 characters"),
    "not UTF-8": (raw("items.csv", b"item,text\na,fish\nb,caf\xe9\n"),
                  r"items\.csv:3: byte b'\\xe9' is not UTF-8: save"),
    "not UTF-8, CRLF": (raw("items.csv", b"item,text\r\na,fish\r\nb,caf\xe9\r\n"), r"items\.csv:3: byte"),
    "not UTF-8, CR": (raw("items.csv", b"item,text\ra,fish\rb,caf\xe9\r"), r"items\.csv:3: byte"),
    "bad first row": (rows("items", ITEMS[0], "e"), r"items\.csv:2: 1 values"),
    "bad row after blank lines": (rows("items", "", "", ITEMS[0], "", ITEMS[1], "e"),
                                  r"items\.csv:6: 1 values"),
    "UTF-16": (raw("items.csv", "\n".join(ITEMS).encode("utf-16")),
               r"items\.csv:1: byte b'\\xff' is not UTF-8"),
    "cut character": (raw("items.csv", b"item,text\na,x\nb,y\xf0\x9f"),
                      r"items\.csv:3: byte b'\\xf0' is not UTF-8"),
    "NUL in items": (item("e,wo\0lf,x"), r"items\.csv:6: a NUL byte: remove"),
    "NUL in interactions": (like("ann\0,a,1"), r"interactions\.csv:8: a NUL byte: remove"),
    "link out, csv": (link("items.csv", "{out}/items.csv"),
                      r"items\.csv: is a symbolic link out of .*: copy"),
    "link out, relative": (link("interactions.csv", "../data-outside/interactions.csv"),
                           r"interactions\.csv: is a symbolic"),

    "empty item id": (item(",text,x"), r"items\.csv:6: item '' is empty: give it a name"),
    "blank item id": (item("  ,text,x"), r"items\.csv:6: item '  ' is empty"),
    "item ..": (item("..,text,x"), r"items\.csv:6: item '\.\.' is a path, .*rename it"),
    "item .": (item(".,text,x"), r"items\.csv:6: item '\.' is a path"),
    "item ../../x": (item("../../x,text,x"), r"items\.csv:6: item '\.\./\.\./x' is a path"),
    "item /etc/passwd": (item("/etc/passwd,text,x"), r"items\.csv:6: item '/etc/passwd' is a path"),
    "item a\\b": (item("a\\b,text,x"), r"items\.csv:6: item 'a\\\\b' is a path"),
    "item with a newline": (item('"e\nf",text,x'),
                            r"items\.csv:6: item 'e\\nf' holds a control character: remove"),
    "item with a C1 control": (item("e\x9b,text,x"), r"items\.csv:6: item 'e\\x9b' holds a control"),
    "item with a line separator": (item("e\u2028,text,x"), r"items\.csv:6: item 'e\\u2028' holds a control"),
    "item with an escape": (item("e\x1b[2J,text,x"), r"items\.csv:6: item 'e\\x1b\[2J' holds a control"),
    "huge item id": (item("é" * 126 + ",text,x"),
                     r"items\.csv:6: item 'é+\.\.\.' \(126 char.*252 bytes long: at most 250"),
    "duplicate item": (item("b,again,x"), r"items\.csv:6: item 'b' is on line 3 too: keep one"),
    "empty text": (item("e,,x"), r"items\.csv:6: text '' is empty: write one"),
    "blank text": (item('e,"\n ",x'), r"items\.csv:6: text '\\n ' is empty"),
    "one item": (rows("items", *ITEMS[:2]), r"items\.csv: 1 items below the header: need at least 2"),

    "unknown item": (like("ann,zebra,1"), r"interactions\.csv:8: item 'zebra' is not in items\.csv: add it"),
    "item of another case": (like("ann,A,1"), r"interactions\.csv:8: item 'A' is not in items\.csv"),
    "item with a space": (like("ann, a,1"), r"interactions\.csv:8: item ' a' is not in items\.csv"),
    "empty user": (like(",a,1"), r"interactions\.csv:8: user '' is empty: give"),
    "user with a newline": (like('"a\nb",a,1'), r"interactions\.csv:8: user 'a\\nb' holds a control"),
    "huge user id": (like("u" * 5000 + ",a,1"),
                     r"interactions\.csv:8: user 'u+\.\.\.' \(5,000 characters\) is 5,000 bytes"),
    "timestamp a word": (like("ann,a,soon"),
                         r"interactions\.csv:8: timestamp 'soon' is not a finite number: write"),
    "timestamp a date": (like("ann,a,2020-01-01"), r"interactions\.csv:8: timestamp '2020-01-01' is not"),
    "timestamp nan": (like("ann,a,nan"), r"interactions\.csv:8: timestamp 'nan' is not a finite"),
    "timestamp inf": (like("ann,a,-inf"), r"interactions\.csv:8: timestamp '-inf' is not a finite"),
    "timestamp too large": (like("ann,a,1e999"), r"interactions\.csv:8: timestamp '1e999' is not a finite"),
    "timestamp empty": (like("ann,a,"),
                        r"interactions\.csv:8: timestamp '' is not a finite number: .*drop the column"),
    "one user": (rows("interactions", *LIKES[:4]),
                 r"interactions\.csv: 1 users below the header: need at least 2"),
    "nothing to test on": (rows("interactions", "user,item", "u,a", "u,b", "v,a", "v,a", "v,a"),
                           r"interactions\.csv: no user has 3 different items"),

    "no images": (lambda folder: (folder / "images").rename(folder / "pictures"),
                  r"images: No such file or dir.*: need"),
    "images is a file": (both(lambda folder: (folder / "images").rename(folder / "x"), raw("images", "")),
                         r"images: Not a directory: need a folder that holds ITEM\.png"),
    "no picture": (gone("images/b.png"), r"items\.csv:3: item 'b' has no picture: need one images/b\.png"),
    "picture of another type": (lambda folder: (folder / "images/b.png").rename(folder / "images/b.gif"),
                                r"items\.csv:3: item 'b' has no picture: .*\.jpg \.jpeg \.webp"),
    "two pictures": (picture("b.jpg"), r"items\.csv:3: item 'b' has b\.jpg and b\.png: need one"),
    "picture is a folder": (directory("images/b.png"), r"images/b\.png: no such file"),
    "picture link out": (link("images/b.png", "{out}/b.png"),
                         r"images/b\.png: is a symbolic link out of .*: copy"),
    "images link out": (link("images", "{out}/images"), r"images/a\.png: is a symbolic link out"),
    "dead link": (link("images/b.png", "nothing.png"), r"images/b\.png: no such file"),
    "link to itself": (link("images/b.png", "b.png"), r"images/b\.png: no such file"),
    "empty picture": (raw("images/b.png", b""),
                      r"images/b\.png: not a PNG, JPEG or WebP picture: save it as one"),
    "text as picture": (raw("images/b.png", "<svg/>"), r"images/b\.png: not a PNG, JPEG or WebP"),
    "GIF as PNG": (picture("b.png", "P", format="GIF"), r"images/b\.png: not a PNG, JPEG or WebP"),
    "truncated PNG": (truncated("b", "png"),
                      r"images/b\.png: damaged \(OSError: .*truncated.*\): save it again"),
    "truncated JPEG": (truncated("b", "jpg"), r"images/b\.jpg: damaged \(OSError: .*truncated"),
    "truncated WebP": (truncated("b", "webp"), r"images/b\.webp: (damaged|not a PNG)"),
    "PNG of no data": (raw("images/b.png", png(50, 50)), r"images/b\.png: damaged"),
    "text bomb": (raw("images/b.png", png(5, 6, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**22))))),
                  r"images/b\.png: damaged \(ValueError: "),
    "bomb": (raw("images/b.png", png(30_000, 30_000)),
             r"images/b\.png: more than 89,478,485 pixels: make it"),
    "bomb that Pillow only warns of": (raw("images/b.png", png(10_000, 10_000)),
                                       r"images/b\.png: more than 89,4"),
}


@pytest.mark.parametrize("what", BAD)
def test_rubbish_is_refused_with_its_place_and_cure_and_nothing_is_written(folder, what):
    change, message = BAD[what]
    change(folder)
    before, field_limit = snapshot(folder), csv.field_size_limit()
    with pytest.raises(DataError, match=message) as error:
        load(folder)
    head, *lines = str(error.value).split("\n")
    assert head.startswith(f"{folder}: {len(lines)} problem") or "... and" in lines[-1]
    assert all(": " in line and line.startswith("  ") and len(line) < 260 for line in lines)
    assert str(error.value).isprintable() or all(line.isprintable() for line in lines)
    assert snapshot(folder) == before and csv.field_size_limit() == field_limit


@pytest.mark.parametrize("what", ["missing", "a file", "an absurd name"])
def test_a_folder_that_is_none_is_refused(tmp_path, what):
    (tmp_path / "file").write_text("")
    path = tmp_path / {"missing": "no", "a file": "file", "an absurd name": "x" * 999}[what]
    message = "is not a folder: need" if what == "a file" else "does not exist: need"
    with pytest.raises(DataError, match=message):
        load(path)


def test_image_size_must_be_positive(folder):
    with pytest.raises(ValueError, match="image_size=0: need image_size >= 1"):
        load(folder, size=0)


def test_one_error_lists_all_that_is_wrong_and_no_more(folder):
    rows("items", *ITEMS, "e,,x", "e/f,ok,x", "b,again,x")(folder)
    rows("interactions", *LIKES, "ann,zebra,1", "bob,zebra,nan")(folder)
    gone("images/c.png")(folder)
    raw("images/d.png", "rubbish")(folder)
    with pytest.raises(DataError) as error:
        load(folder)
    places = [line.split(": ")[0].strip() for line in str(error.value).split("\n")[1:]]
    assert places == ["items.csv:6", "items.csv:7", "items.csv:8", "items.csv:4", "items.csv:6",
                      "images/d.png", "interactions.csv:8", "interactions.csv:9"]     # zebra is named once


def test_what_follows_from_a_broken_file_is_not_reported(folder):
    rows("items", *ITEMS[:2], 'e,"endless')(folder)
    rows("interactions", *LIKES[:4], 'ann,"endless')(folder)
    with pytest.raises(DataError, match=r"2 problems in the data\n  items\.csv:3.*\n  interactions\.csv:5"):
        load(folder)


def test_a_long_list_is_cut_per_file_and_counted(folder):
    names = [f"e{n}" for n in range(11)]
    rows("items", *ITEMS, *(f"{name},,x" for name in names), *(f"f{n},,x" for n in range(1000)))(folder)
    rows("interactions", *LIKES, "ann,a,never")(folder)
    for name in names:
        raw(f"images/{name}.png", "rubbish")(folder)
    with pytest.raises(DataError) as error:
        load(folder)
    lines = str(error.value).split("\n")
    assert "2,023 problems" in lines[0] and len(lines) == 1 + 11 + 11 + 1
    assert lines[11] == "  items.csv: ... and 2,001 more" and lines[22] == "  images: ... and 1 more"
    assert lines[23].startswith("  interactions.csv:8: timestamp 'never'")


# ---- what is odd but right ---------------------------------------------------------------------------------

def test_a_plain_folder_loads_as_it_is_written(folder):
    data = load(folder)
    assert (data.name, data.user_ids, data.item_ids) == ("data", ["ann", "bob"], ["a", "b", "c", "d"])
    assert data.texts == ["one fish", "two cats", "three dogs", "four owls"]
    assert data.prompts == [("fish",), ("cat",), ("dog",), ("owl",)]
    assert data.words == ["cat", "dog", "fish", "owl"]
    assert data.user.tolist() == [0, 0, 0, 1, 1, 1] and data.item.tolist() == [0, 1, 2] * 2
    assert data.time.tolist() == [0, 1, 2] * 2 and data.time.dtype == torch.float64
    assert data.part.tolist() == [TRAIN, VALID, TEST] * 2 and data.part.dtype == torch.int8
    assert [column.tolist() for column in data.pairs(VALID)] == [[0, 1], [1, 1]]
    assert data.images.shape == (4, 3, 8, 8) and data.images.dtype == torch.uint8
    assert data.images[:, 0].float().mean((1, 2)).tolist() == [0, 60, 120, 180]
    assert data.images[:, 1:].max() == 0
    assert data.notices == ["interactions.csv: 1 items liked by nobody are kept"]


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
    assert ("items.csv: byte order mark ignored" in data.notices) == bool(mark)


@pytest.mark.parametrize("text", ["🐟👩‍👩‍👧 emoji", "שלום עולם", "مرحبا", "two\nlines", "two\r\nlines",
                                  'say "hi", she said', "<script>alert(1)</script>", "=1+1", "日本語",
                                  "x" * 1_000_000, " padded "])
def test_any_text_is_kept_as_it_is(folder, text):
    with open(folder / "items.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["item", "text"], ["a", text], *([name, name] for name in "bcd")])
    data = load(folder)
    assert data.texts[0] == text and data.prompts[0] == ()
    assert "items.csv: 4 items without a prompt" in data.notices


@pytest.mark.parametrize("name", ["two words", "Ünïcode-日本", "b.c", "...", "-rf", "A", "a:b", "100%", "🐟",
                                  "x" * 246, "'q'"])
def test_any_id_that_can_name_a_file(folder, name):
    item(f"{name},text,x")(folder)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(folder / "images" / f"{name}.png", format="PNG")
    rows("interactions", *LIKES, f"{name},{name},7")(folder)
    data = load(folder)
    assert data.item_ids[-1] == name == data.user_ids[-1] and data.images[4].unique().tolist() == [9]
    assert data.item[-1] == 4 and data.user[-1] == 2


def test_user_ids_may_be_paths(folder):
    rows("interactions", *LIKES, "../../x,a,1", "..,a,1")(folder)
    assert load(folder).user_ids == ["ann", "bob", "../../x", ".."]


def test_extra_columns_blank_lines_and_column_order(folder):
    rows("items", "price, text ,item", "1,one fish,a", "", "2,two cats,b", "3,x,c", "", "4,y,d")(folder)
    rows("interactions", "timestamp,stars,,item,user", "0,5,,a,ann", "1,5,,b,ann", "2,5,,c,ann",
         "0,1,,d,bob")(folder)
    data = load(folder)
    assert data.texts[:2] == ["one fish", "two cats"] and data.user.tolist() == [0, 0, 0, 1]
    assert data.notices[:2] == ["items.csv: 1 extra columns ignored", "items.csv: 2 blank lines skipped"]
    assert "interactions.csv: 2 extra columns ignored" in data.notices


def test_duplicates_keep_the_earliest(folder):
    rows("interactions", LIKES[0], "u,a,5", "u,b,1", "v,a,2", "u,a,-3", "u,a,9", "u,c,1", "v,a,2")(folder)
    data = load(folder)
    found = list(zip(data.user.tolist(), data.item.tolist(), data.time.tolist()))
    assert found == [(0, 1, 1), (1, 0, 2), (0, 0, -3), (0, 2, 1)]
    assert "interactions.csv: 3 repeated interactions merged, the earliest kept" in data.notices


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
    rows("interactions", LIKES[0], "u,a,-5", "u,b,0.25", "u,c,1e3", "v,a,1.5e9", "v,b, 7 ", "v,c,+8")(folder)
    assert load(folder).time.tolist() == [-5, 0.25, 1000, 1.5e9, 7, 8]


def test_without_timestamps_the_seed_decides(folder):
    rows("interactions", "user,item", *(f"u{n},{item}" for n in range(40) for item in "abc"))(folder)
    data, same, other = load(folder), load(folder), load(folder, seed=1)
    assert data.time is None and "interactions.csv: no timestamps: split by a seeded shuffle" in data.notices
    assert torch.equal(data.part, same.part) and not torch.equal(data.part, other.part)
    assert data.part.bincount().tolist() == [40, 40, 40]
    assert len(set(map(tuple, data.part.view(40, 3).tolist()))) == 6        # every order occurs


def test_notices_of_users_who_like_little_or_everything(folder):
    rows("interactions", "user,item,timestamp", "t,a,1", "u,a,1", "u,b,1",
         *(f"{user},{item},1" for user in "vw" for item in "abcd"))(folder)
    data = load(folder)
    assert data.notices == ["interactions.csv: 2 users of fewer than 3 items only train",
                            "interactions.csv: 2 users like every item"]
    assert data.part[:3].tolist() == [TRAIN] * 3


def test_prompts():
    assert parse_prompt("Comedy, film  Noir,comedy , ,STRASSE") == ("comedy", "film noir", "strasse")
    assert parse_prompt("fish") == ("fish",) and parse_prompt("film noir") == ("film noir",)
    assert parse_prompt("") == parse_prompt(" , ") == ()
    assert parse_prompt("b\na,\tc ") == ("b a", "c") and parse_prompt("ß,SS") == ("ss",)


def test_long_prompts_are_cut_with_a_notice_and_their_vocabulary_too(folder):
    long = ",".join(f"w{n:02d}" for n in range(20))
    rows("items", *ITEMS[:4], f'd,text,"{long}"')(folder)
    data = load(folder)
    assert data.prompts[3] == tuple(f"w{n:02d}" for n in range(16)) and len(data.words) == 3 + 16
    assert data.words == sorted(data.words)
    assert "items.csv: 1 prompts cut to their first 16 phrases" in data.notices


# ---- pictures ----------------------------------------------------------------------------------------------

def one_colour(image):
    colours = np.unique(image.reshape(3, -1), axis=1)
    assert colours.shape[1] == 1, colours
    return colours[:, 0].tolist()


@pytest.mark.parametrize("mode, colour, expected", [
    ("RGB", (10, 20, 30), (10, 20, 30)), ("L", 77, (77,) * 3), ("1", 1, (255,) * 3), ("P", 0, None),
    ("RGBA", (200, 0, 0, 255), (200, 0, 0)), ("RGBA", (0, 0, 0, 0), (255,) * 3),
    ("RGBA", (0, 0, 0, 128), (127,) * 3), ("LA", (0, 51), (204,) * 3),
    ("I;16", 65535, (255,) * 3), ("I;16", 32768, (128,) * 3), ("I;16", 257, (1,) * 3)])
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
    assert np.abs(np.subtract(one_colour(read_image(tmp_path / "x.jpg", 4)), [255, 0, 0])).max() <= 4
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
    exif[0x0112] = 6                            # to be turned clockwise by 90 degrees: bottom half white
    Image.fromarray(pixels).save(tmp_path / f"x.{suffix}", exif=exif)
    image = read_image(tmp_path / f"x.{suffix}", 32).astype(int)
    assert image[:, :12].max() <= tolerance and image[:, 20:].min() >= 255 - tolerance


def test_a_picture_of_the_right_size_is_kept_to_the_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png", 16) == pixels.transpose(2, 0, 1)).all()


def test_the_whole_picture_is_shown_and_channels_and_axes_are_in_order(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:20, :40, 0] = pixels[:20, 40:, 1] = pixels[20:, :40, 2] = 255       # red, green over blue, black
    Image.fromarray(pixels).save(tmp_path / "x.png")
    corner = read_image(tmp_path / "x.png", 8)[:, [0, 0, 7, 7], [0, 7, 0, 7]].T
    assert np.abs(corner.astype(int) - [[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]]).max() <= 6


def test_large_jpegs_shrink_as_their_full_decoding_would(tmp_path):
    y, x = np.mgrid[:600, :800]
    pixels = np.stack([x * 255 // 800, 255 * (y // 20 % 2), 255 * ((x + y) // 30 % 2)], 2).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=95)
    full = Image.open(tmp_path / "x.jpg").convert("RGB").resize((96, 96), Image.Resampling.LANCZOS)
    assert np.abs(read_image(tmp_path / "x.jpg", 96).transpose(1, 2, 0) - np.asarray(full, int)).mean() < 5


def test_shrinking_averages(tmp_path):
    Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).save(tmp_path / "x.png")
    assert np.abs(read_image(tmp_path / "x.png", 8) - 127.5).max() < 4      # a fine chequerboard becomes grey


def test_any_suffix_case_and_size(folder):
    for name in "abcd":
        gone(f"images/{name}.png")(folder)
    both(picture("a.PNG", colour="blue", size=(1, 1)), picture("b.webp", size=(300, 2)), picture("d.Jpg"),
         picture("c.JPEG", size=(16, 999)), picture("stray.png"), raw("images/notes.txt", "text"))(folder)
    data = load(folder)
    assert data.images[0].amax((1, 2)).tolist() == [0, 0, 255]
    assert "images: 1 pictures of no item ignored" in data.notices


def test_pictures_stay_with_their_items_whatever_the_order_of_decoding(folder):
    names = [f"i{n}" for n in range(60)]
    rows("items", "item,text", *(f"{name},text" for name in names))(folder)
    rows("interactions", LIKES[0], *(f"{user},{name},1" for user in "uv" for name in names[:3]))(folder)
    for n, name in enumerate(names):
        picture(name, size=(500, 500) if n % 7 == 0 else (3, 3), colour=(n, 0, 255 - n))(folder)
    images = load(folder).images
    assert images[:, 0, 0, 0].tolist() == list(range(60))
    assert images[:, 2, 7, 7].tolist() == [255 - n for n in range(60)]


# ---- split -------------------------------------------------------------------------------------------------

def slow_split(user, time):
    """The same split by loops, for times without ties."""
    part = [TRAIN] * len(user)
    for u in set(user):
        mine = sorted((row for row in range(len(user)) if user[row] == u), key=lambda row: time[row])
        held = max(1, int(len(mine) / 10 + 0.5)) if len(mine) >= 3 else 0
        for row in mine[len(mine) - held:]:
            part[row] = TEST
        for row in mine[len(mine) - 2 * held:len(mine) - held]:
            part[row] = VALID
    return part


@pytest.mark.parametrize("seed", range(5))
def test_split_agrees_with_loops(seed):
    draw = torch.Generator().manual_seed(seed)
    user = torch.randint(12, (200,), generator=draw) ** 2 // 12      # some users of many rows, some of none
    time = torch.randperm(200, generator=draw).double() - 100
    assert split_by_time(user, time, seed).tolist() == slow_split(user.tolist(), time.tolist())


@pytest.mark.parametrize("n, held", [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (10, 1), (14, 1), (15, 2),
                                     (24, 2), (25, 3), (100, 10)])
@pytest.mark.parametrize("timed", [True, False])
def test_split_sizes(n, held, timed):
    part = split_by_time(torch.zeros(n, dtype=torch.int64), torch.zeros(n) if timed else None, 0)
    assert torch.bincount(part.long(), minlength=3).tolist() == [n - 2 * held, held, held]


def test_ties_are_broken_by_the_seed_and_nothing_else_is():
    user, time = torch.zeros(1000, dtype=torch.int64), torch.arange(1000).double() // 250     # 4 times
    one, two = split_by_time(user, time, 1), split_by_time(user, time, 2)
    assert torch.equal(one, split_by_time(user, time, 1)) and not torch.equal(one, two)
    assert (one[:750] == TRAIN).all() and (one[750:] != TRAIN).sum() == 200
    state = torch.get_rng_state()
    split_by_time(user, time, 3)
    assert torch.equal(state, torch.get_rng_state())                    # the global generator is left alone


def test_split_needs_a_time_for_each():
    with pytest.raises(ValueError, match=r"user is \(3,\) but time is \(2,\); need one time per interaction"):
        split_by_time(torch.zeros(3, dtype=torch.int64), torch.zeros(2), 0)
