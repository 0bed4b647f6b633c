"""Corpora of any size: found in a fixed order, read in bounded memory, nothing lost and everything unusable named."""

from __future__ import annotations

import bz2
import gc
import gzip
import hashlib
import json
import lzma
import os
import random
import re
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from apr.common import files as files_module
from apr.common.errors import InputNotFound, MalformedFile, Refused, UsageError
from apr.data import jsonl
from apr.data import source as source_module
from apr.data import text as text_module
from apr.data.corpus import Corpus
from apr.data.documents import Document, Item, LongDocument
from apr.data.find import find_sources
from apr.data.source import Skipped

PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda b: gzip.compress(b, mtime=0),
    "zst": lambda b: zstandard.ZstdCompressor(write_checksum=True).compress(b),
    "xz": lzma.compress,
    "bz2": bz2.compress,
}


def write(path: Path, data: bytes | str = b"text\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read(path: Path, **settings: Any) -> list[Item]:
    """Items of a file or folder, the same in two iterations; the bytes that were read go up to all there are."""
    it = Corpus(find_sources([path]), **settings)
    runs: list[list[Item]] = []
    progress: list[int] = []
    for _ in range(2):
        items: list[Item] = []
        progress.clear()
        for item in it:
            progress.append(it.bytes_read)
            items.append(item)
        runs.append(items)
        assert progress == sorted(progress)
        assert it.bytes_read == it.total_bytes
    assert [look(x) for x in runs[0]] == [look(x) for x in runs[1]]
    return runs[0]


def look(item: Item) -> tuple[str, ...]:
    if isinstance(item, Skipped):
        return "skipped", item.name, item.reason, item.detail
    return "document", item.name, item.sha256


def texts(items: list[Item]) -> list[str]:
    return [
        i.text if isinstance(i, Document) else "".join(i.chunks())
        for i in items
        if not isinstance(i, Skipped)
    ]


def short(items: list[Item], root: Path) -> list[str]:
    """NAME, or NAME: REASON, relative to root."""
    return [
        f"{i.name}{': ' + i.reason if isinstance(i, Skipped) else ''}".removeprefix(f"{root}/") for i in items
    ]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits so small that all ways of reading are taken by tiny files."""
    monkeypatch.setattr(text_module, "MAX_HELD_BYTES", 64)
    monkeypatch.setattr(jsonl, "MAX_RECORD_BYTES", 200)
    monkeypatch.setattr(source_module, "BLOCK_BYTES", 24)
    monkeypatch.setattr(source_module, "PACKED_BYTES", 16)
    monkeypatch.setattr(source_module.Source.blocks, "__defaults__", (0, 24, None))


# Which files


def test_a_folder_is_read_in_the_order_of_its_relative_names(tmp_path: Path) -> None:
    names = [
        "a/b.txt",
        "a.txt",
        "B.md",
        "z/y/x.PY",
        "\xe4.txt",
        "zz.jsonl",
        "e.txt",
        "a-b/c.txt",
        "q.parquet",
        "n.json.gz",
    ]
    for name in names:
        write(tmp_path / name)
    found = find_sources([tmp_path])
    assert [s.name for s in found] == [f"{tmp_path}/{n}" for n in sorted(names, key=str.encode)]
    assert [s.path for s in found] == [tmp_path / n for n in sorted(names, key=str.encode)]
    kinds = {s.path.name: (s.kind, s.compression, s.size) for s in found}
    assert kinds["q.parquet"] == ("parquet", "", 5)
    assert kinds["zz.jsonl"] == ("jsonl", "", 5)
    assert kinds["n.json.gz"] == ("json", "gz", 5)


def test_the_order_does_not_depend_on_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(20):
        write(tmp_path / f"{n % 3}" / f"{n}.txt")
    (tmp_path / "0" / "again").symlink_to(tmp_path / "2")
    expected = find_sources([tmp_path])
    real = os.scandir

    class Backwards:
        def __init__(self, path: str) -> None:
            self.entries = sorted(real(path), key=lambda e: e.name, reverse=True)

        __enter__ = lambda self: iter(self.entries)  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    monkeypatch.setattr(os, "scandir", Backwards)
    assert find_sources([tmp_path]) == expected
    assert len(expected) == 20


def test_inputs_come_in_the_given_order_and_once(tmp_path: Path) -> None:
    for name in ("b/x.txt", "b/sub/y.txt", "a.txt", "c.weird"):
        write(tmp_path / name)
    os.link(tmp_path / "a.txt", tmp_path / "b" / "hard.txt")
    found = find_sources(
        [f"{tmp_path}/c.weird", str(tmp_path / "b" / "sub") + "/", tmp_path / "b", tmp_path / "a.txt"]
    )
    assert [s.name.removeprefix(f"{tmp_path}/") for s in found] == [
        "c.weird",
        "b/sub/y.txt",
        "b/hard.txt",
        "b/x.txt",
    ]
    assert found[0].kind == "text"
    assert found.repeated == 2  # b/sub, and a.txt under its other name


def test_what_a_folder_holds_besides_is_counted(tmp_path: Path) -> None:
    for name in (
        "a.txt",
        "m.bin",
        "n.bin",
        "x.tar.gz",
        "LICENSE",
        ".git/c.txt",
        "__pycache__/d.txt",
        "old/e.txt",
        "f/old/g.md",
    ):
        write(tmp_path / name)
    found = find_sources([tmp_path], skip_folders=["old"])
    assert [s.path.name for s in found] == ["a.txt"]
    assert found.left_out == {".bin": 2, ".tar.gz": 1, "no suffix": 1}
    assert found.folders_left_out == {".git": 1, "__pycache__": 1, "old": 2}
    assert "4 files of other kinds (.bin 2, .tar.gz 1, no suffix 1)" in found.summary()
    assert [s.path.name for s in find_sources([tmp_path / ".git"])] == ["c.txt"]  # named
    (tmp_path / "a.txt").unlink()
    with pytest.raises(Refused, match=r"no text, JSONL or Parquet file; there is 4 files .*\.bin 2"):
        find_sources([tmp_path], skip_folders=["old"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match="nothing at all"):
        find_sources([tmp_path / "empty"])


def test_loops_of_links_end(tmp_path: Path) -> None:
    write(tmp_path / "a" / "x.txt")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a" / "self")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "y.txt").symlink_to(tmp_path / "a" / "x.txt")
    found = find_sources([tmp_path])
    assert [s.path for s in found] == [tmp_path / "a" / "x.txt"]
    assert [s.name for s in found.skipped] == [f"{tmp_path}/a/self"]
    assert found.repeated == 3


def test_what_cannot_be_read_is_named_in_a_folder_and_an_error_on_its_own(tmp_path: Path) -> None:
    write(tmp_path / "good.txt")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    server = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(tmp_path)  # the path of a socket may be no longer than 107 bytes
    server.bind("socket.txt")
    os.chdir(here)
    (tmp_path / "null.txt").symlink_to("/dev/null")
    found = find_sources([tmp_path])
    server.close()
    why = {s.name.removeprefix(f"{tmp_path}/"): s.detail for s in found.skipped}
    assert why.pop("broken.txt").startswith(f"a link to {tmp_path}/nowhere, which cannot be followed")
    assert why == {
        n + ".txt": f"a {k}, not a file"
        for n, k in (("pipe", "pipe"), ("socket", "socket"), ("null", "device"))
    }
    items = list(Corpus(found))
    assert items[:4] == found.skipped
    assert short(items[4:], tmp_path) == ["good.txt"]
    for name in ("broken.txt", "pipe.txt", "null.txt", "socket.txt", "missing"):
        with pytest.raises(InputNotFound, match=name):
            find_sources([tmp_path / name])
    write(tmp_path / "p.parquet.gz")
    with pytest.raises(Refused, match=r"p\.parquet\.gz.*unpack"):
        find_sources([tmp_path / "p.parquet.gz"])


def test_files_and_folders_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt")
    write(tmp_path / "b.txt")
    write(tmp_path / "c" / "d.txt")
    real_access, real_scandir = os.access, os.scandir

    def scandir(path: str) -> Any:
        if path.rstrip("/").endswith("c"):
            raise PermissionError(13, "Permission denied", path)
        return real_scandir(path)

    monkeypatch.setattr(os, "access", lambda p, mode: not str(p).endswith("a.txt") and real_access(p, mode))
    monkeypatch.setattr(os, "scandir", scandir)
    found = find_sources([tmp_path])
    assert [s.path.name for s in found] == ["b.txt"]
    assert {s.name.removeprefix(f"{tmp_path}/") for s in found.skipped} == {"a.txt", "c"}
    with pytest.raises(InputNotFound, match="permissions"):
        find_sources([tmp_path / "a.txt"])


def test_names_that_are_not_utf8_can_be_printed(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.txt")).write_bytes(b"t")
    item = read(tmp_path)[0]
    assert item.name == f"{tmp_path}/\\xff.txt"
    assert texts([item]) == ["t"]


# Text


@pytest.mark.parametrize(
    ("data", "result"),
    [
        (b"a\r\nb\n\n", "a\r\nb\n\n"),
        (b"\xef\xbb\xbfa", "a"),
        (b"\xef\xbb\xbf", "empty"),
        (b"", "empty"),
        (b"a\xc3", "not UTF-8"),
        (b"a\xffb", "not UTF-8"),
        (b"\xed\xa0\x80", "not UTF-8"),
        ("hi".encode("utf-16"), "not UTF-8"),
        ("hi".encode("utf-32"), "not UTF-8"),
        (b"ab\0c", "NUL bytes"),
    ],
)
@pytest.mark.parametrize("suffix", ["", *PACK])
def test_text_files(tmp_path: Path, data: bytes, result: str, suffix: str) -> None:
    path = write(tmp_path / "f.txt", data)
    if suffix:
        path = write(tmp_path / f"f.txt.{suffix}", PACK[suffix](data))
    [item] = read(path)
    assert item.name == str(path)
    if isinstance(item, Skipped):
        assert item.reason == result
        assert "NUL" not in result or "at byte 2" in item.detail
        assert b"hi"[:1] not in data[:5] or "byte order mark; convert it with iconv" in item.detail
    else:
        assert texts([item]) == [result]


def test_long_text_is_read_in_chunks_of_whole_characters(tmp_path: Path) -> None:
    text = "\u20ac\U0001f600 x" * 700_000
    path = write(tmp_path / "long.txt", "\ufeff" + text)
    [item] = read(path)
    assert isinstance(item, LongDocument)
    assert (item.num_bytes, item.sha256) == (len(text.encode()), hashlib.sha256(text.encode()).hexdigest())
    chunks = list(item.chunks())
    assert "".join(chunks) == "".join(item.chunks()) == text
    assert max(len(c.encode()) for c in chunks) <= (1 << 20) + 4


@pytest.mark.parametrize("bad", [b"\0", b"\xff"])
def test_long_text_is_checked_to_its_end(tmp_path: Path, bad: bytes) -> None:
    data = b"0123456789abcde\n" * (6 << 16)
    [item] = read(write(tmp_path / "long.txt", data + bad))
    assert isinstance(item, Skipped)
    assert f"byte {len(data)}" in item.detail
    whole = gzip.compress(data, 1)
    for packed, reason in ((whole[:-5], "truncated archive"), (whole[:-8] + b"badcrc..", "corrupt archive")):
        [item] = read(write(tmp_path / "long.txt.gz", packed))
        assert isinstance(item, Skipped)
        assert item.reason == reason


@pytest.mark.parametrize("suffix", ["", *PACK])
@pytest.mark.parametrize("how", ["other content", "shorter", "longer", "gone", "bad"])
def test_a_file_that_changes_between_the_passes(tmp_path: Path, suffix: str, how: str, small: None) -> None:
    data = b"".join(b"line %d\n" % n for n in range(40))
    path = tmp_path / ("f.txt" + (suffix and f".{suffix}"))
    pack = PACK.get(suffix, bytes)
    [item] = Corpus(find_sources([write(path, pack(data))]))
    assert isinstance(item, LongDocument)
    assert "".join(item.chunks()) == data.decode()
    before = path.stat().st_mtime_ns
    changed = {
        "other content": data.replace(b"7", b"8"),
        "shorter": data[:-9],
        "longer": data + b"x",
        "bad": b"\0" + data[1:],
    }
    write(path, pack(changed.get(how, data)))
    if how == "gone":
        path.unlink()
    elif how == "longer":  # an archive of xz need not be: its size is a multiple of 4
        os.utime(path, ns=(0, 0))
    else:  # what the time does not tell, the content does
        os.utime(path, ns=(0, before))
    with pytest.raises(MalformedFile, match=r"f\.txt.*changed while it was read"):
        list(item.chunks())


SEPARATED = [
    ("a\n<|e|>\nb\n<|e|>\n", ["a\n", "b\n"]),
    ("a\r\n<|e|>\r\nb", ["a\r\n", "b"]),
    ("<|e|>\n<|e|>\n\na <|e|>\n<|e|>b\n<|e|> \n<|e|>", ["\na <|e|>\n<|e|>b\n<|e|> \n"]),
    ("<|e|>\n", []),
    ("no separator " * 20, ["no separator " * 20]),
    ("x" * 100 + "<|e|>\n<|e|>\n" + "y" * 300 + "\n<|e|>\nz", ["x" * 100 + "<|e|>\n", "y" * 300 + "\n", "z"]),
    ("\ufeff\u20ac\n<|e|>\n" + "\u20ac\n" * 50 + "<|e|>\n", ["\u20ac\n", "\u20ac\n" * 50]),
]


@pytest.mark.parametrize(("text", "documents"), SEPARATED)
@pytest.mark.parametrize("block", [4, 7, 24, 1000])
def test_separated_documents(
    tmp_path: Path, text: str, documents: list[str], block: int, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "BLOCK_BYTES", block)
    monkeypatch.setattr(text_module, "MAX_HELD_BYTES", max(4, block))
    path = write(tmp_path / "f.txt", text)
    items = read(path, separator="<|e|>")
    assert texts(items) == documents
    assert short(items, tmp_path) == [f"f.txt#{n}" for n in range(len(documents))] or ["f.txt: empty"]
    items = read(write(tmp_path / "f.txt.gz", gzip.compress(text.encode())), separator="<|e|>")
    assert texts(items) == documents


def test_a_bad_separated_document_costs_no_other(tmp_path: Path, small: None) -> None:
    data = (
        b"a\n==\nb\0\n==\n"
        + b"c" * 99
        + b"\xff\n==\n"
        + b"d" * 99
        + b"\n==\n"
        + b"e\n==\n" * 9
        + os.urandom(500)
    )
    packed = gzip.compress(data)[:-300]
    items = read(write(tmp_path / "f.txt.gz", packed), separator="==")
    assert short(items[:4], tmp_path) == [
        "f.txt.gz#0",
        "f.txt.gz#1: NUL bytes",
        "f.txt.gz#2: not UTF-8",
        "f.txt.gz#3",
    ]
    assert [x for x in short(items, tmp_path) if "archive" in x] == ["f.txt.gz#13: truncated archive"]
    assert len(items) == 14


def pieces(text: str, limit: int) -> list[str]:
    """The rule, for a text in memory."""
    out = [""]
    parts = re.split(r"(?<=\n)(?=\r?\n)", text)
    for part in parts if len(parts) > 1 else text.splitlines(keepends=True):
        if out[-1] and len((out[-1] + part).encode()) > limit:
            out.append("")
        out[-1] += part
    return out


def test_pieces_follow_the_rule_of_documents_in_memory(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(5)
    for n in range(300):
        alphabet = ["\n", "\r\n", "ab", "\u20ac", "\x0c", " ", "\r"] if n % 3 else ["\n", "word ", "\n\n"]
        if n % 5 == 0:
            alphabet = ["a\n", "\u20acb", "c\r"]
        text = "".join(rng.choices(alphabet, k=rng.randrange(200)))
        limit = rng.choice([1, 5, 30, 64])
        monkeypatch.setattr(text_module, "MAX_HELD_BYTES", rng.choice([64, 4000]))
        path = write(tmp_path / "f.txt", text)
        expected = pieces(text, limit)
        items = read(path, piece_bytes=limit)
        assert texts(items) == (expected if text else [])
        if len(text.encode()) > limit:
            assert [i.name for i in items] == [f"{path}#{k}" for k in range(len(items))]
        elif text:
            assert items[0].name == str(path)
        assert [i.sha256 for i in items if not isinstance(i, Skipped)] == [
            hashlib.sha256(t.encode()).hexdigest() for t in texts(items)
        ]


def test_one_blank_line_decides_how_a_long_text_is_cut(tmp_path: Path, small: None) -> None:
    for at in range(100):
        for blank in ("\n\n", "\n\r\n"):
            text = "\u20ac" + "x" * at + blank + "y\n" * (80 - at // 2)
            assert texts(read(write(tmp_path / "f.txt", text), piece_bytes=64)) == pieces(text, 64)


# JSONL

RECORDS: list[tuple[bytes, str]] = [  # line, text or reason
    (b'{"text": "one"}', "one"),
    (b'{"text": "a\\u20ac\\ud83d\\ude00\\u0000"}\r', "a\u20ac\U0001f600\0"),
    (b'{"text": ""}', "empty"),
    (b'{"text": 3}', "not a string"),
    (b'{"text": null}', "not a string"),
    (b'{"other": "x"}', "no field"),
    (b'["text"]', "not an object"),
    (b'"text"', "not an object"),
    (b'{"text": "x"', "broken JSON"),
    (b'{"text": "a\0"}', "broken JSON"),
    (b"\xff", "not UTF-8"),
    (b'{"text": "\\ud800"}', "not Unicode"),
    (b'{"n": NaN, "m": -Infinity, "k": ' + b"9" * 9999 + b', "text": "big"}', "big"),
    (b'{"text": "first", "text": "last"}', "last"),
    (b'{"text": ' + b"[" * 200_000, "broken JSON"),
    (b'{"a": ' + b'{"a": ' * 100_000, "broken JSON"),
    (b'  {"text": "spaces"}  ', "spaces"),
]


@pytest.mark.parametrize("suffix", ["", *PACK])
def test_jsonl_records(tmp_path: Path, suffix: str) -> None:
    data = b"\xef\xbb\xbf" + b"\n \n".join(line for line, _ in RECORDS)
    pack = PACK.get(suffix, bytes)
    path = write(tmp_path / ("f.ndjson" + (suffix and f".{suffix}")), pack(data[:40]) + pack(data[40:]))
    items = read(path)
    assert [i.name for i in items] == [f"{path}:{2 * n + 1}" for n in range(len(RECORDS))]
    assert [i.reason if isinstance(i, Skipped) else texts([i])[0] for i in items] == [r for _, r in RECORDS]


def test_jsonl_fields(tmp_path: Path) -> None:
    keys = {f"k{n}": n for n in range(12)}
    lines = [{"m": {"c": "yes"}}, {"m": "c"}, {"m": {"d": 1}}, keys]
    items = read(write(tmp_path / "f.jsonl", "\n".join(map(json.dumps, lines))), content_field="m.c")
    assert texts(items) == ["yes"]
    details = [i.detail for i in items if isinstance(i, Skipped)]
    assert details[:2] == [
        "m is a string, not an object",
        "no 'm.c'; there is 'd'; say with --content-field which is the text",
    ]
    assert details[2].startswith("no 'm'; there is 'k0', 'k1'")
    assert "'k9' and 2 more; say with --content-field" in details[2]
    path = write(tmp_path / "utf16.jsonl", '{"text": "x"}'.encode("utf-16"))
    assert short(read(path), tmp_path) == ["utf16.jsonl:1: not UTF-8"]
    assert short(read(write(tmp_path / "e.jsonl", "\n \n")), tmp_path) == ["e.jsonl: empty"]


def test_jsonl_lines_of_all_lengths(tmp_path: Path, small: None) -> None:
    rng = random.Random(3)
    for n in range(60):
        lengths = [rng.randrange(1, 400) for _ in range(10)]
        end = "" if n % 2 else "\n"
        lines = [json.dumps({"text": "x" * k}) for k in lengths]
        items = read(write(tmp_path / "f.jsonl", "\n".join(lines) + end))
        got = [
            i.reason if isinstance(i, Skipped) else i.text for i in items if not isinstance(i, LongDocument)
        ]
        assert got == ["too long" if len(x) > 200 else "x" * k for x, k in zip(lines, lengths, strict=True)]


# Parquet


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    values = ["a", None, "\u20ac" * 9, "", "e", "f", "a"]
    expected = ["a", "not a string", "\u20ac" * 9, "empty", "e", "f", "a"]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"n": range(7), "text": pa.array(values, pa.string()).cast(kind)})
        pq.write_table(table, tmp_path / "f.parquet", row_group_size=3)
        items = read(tmp_path / "f.parquet")
        assert [i.name for i in items] == [f"{tmp_path}/f.parquet:{n}" for n in range(1, 8)]
        assert [i.reason if isinstance(i, Skipped) else texts([i])[0] for i in items] == expected
    for field, reason, detail in (
        ("body", "no field", "no column body; there is 'n', 'text'"),
        ("text.x", "no field", "no column text.x; text is dictionary"),
        ("n", "not a string", "column n is int64"),
    ):
        [item] = read(tmp_path / "f.parquet", content_field=field)
        assert isinstance(item, Skipped)
        assert (item.reason, item.name) == (reason, f"{tmp_path}/f.parquet")
        assert item.detail.startswith(detail)


def test_parquet_structs_bad_strings_and_files_without_rows(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"m": [{"c": {"t": "x"}}, None, {"c": None}, {"c": {"t": "y"}}]})
    pq.write_table(table, tmp_path / "s.parquet")
    assert short(read(tmp_path / "s.parquet", content_field="m.c.t"), tmp_path) == [
        "s.parquet:1",
        "s.parquet:2: not a string",
        "s.parquet:3: not a string",
        "s.parquet:4",
    ]
    bad = pa.array([b"ok", b"\xff", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "b.parquet")
    assert short(read(tmp_path / "b.parquet"), tmp_path) == [
        "b.parquet:1",
        "b.parquet:2: not UTF-8",
        "b.parquet:3",
    ]
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "e.parquet")
    assert short(read(tmp_path / "e.parquet"), tmp_path) == ["e.parquet: empty"]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"-m pip install 'pyarrow>=20'"):
        Corpus(find_sources([write(tmp_path / "f.parquet")]))


# The corpus


def test_settings_without_sense_are_refused() -> None:
    for settings in (
        {"content_field": ""},
        {"content_field": "a..b"},
        {"separator": ""},
        {"separator": "a\nb"},
        {"piece_bytes": 0},
        {"piece_bytes": text_module.MAX_HELD_BYTES + 1},
        {"piece_bytes": 5, "separator": "x"},
    ):
        with pytest.raises(UsageError):
            Corpus([], **settings)
    assert list(Corpus([])) == []
    assert str(Corpus([])) == "no files"


def test_a_corpus_can_be_iterated_again_after_a_break(tmp_path: Path) -> None:
    for n in range(5):
        write(tmp_path / f"{n}.txt", "x" * (n + 1))
    it = Corpus(find_sources([tmp_path]))
    assert it.total_bytes == 15
    for item in it:
        if item.name.endswith("2.txt"):
            break
    assert it.bytes_read == 6
    assert [len(t) for t in texts(list(it))] == [1, 2, 3, 4, 5]
    assert it.bytes_read == 15
    assert str(it) == f"{tmp_path}/0.txt and 4 more"


def test_no_file_stays_open(tmp_path: Path, small: None) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc/self/fd")
    for suffix, pack in PACK.items():
        whole = pack(random.Random(2).randbytes(50).hex().encode() * 9)
        for name in ("f.txt", "f.jsonl"):
            write(tmp_path / f"{name}.{suffix}", whole[:-9] + bytes(9))
            write(tmp_path / f"{suffix}{name}.{suffix}", whole[:-9])
            write(tmp_path / name, b"\xff" * 999)
            write(tmp_path / f"long{name}", b"ab\n" * 999)
    gc.disable()  # which would hide it
    try:
        for settings in ({}, {"separator": "="}, {"piece_bytes": 9}):
            texts(list(Corpus(find_sources([tmp_path]), **settings)))
            assert next(iter(Corpus(find_sources([tmp_path]), **settings)))
        names = [
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")
        ]
    finally:
        gc.enable()
    assert [n for n in names if n.startswith(str(tmp_path))] == []


def test_a_file_that_grew_since_it_was_listed_is_read_to_its_end(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "f.txt", ""),
        write(tmp_path / "g.jsonl", '{"text": "x"}\n'),
        write(tmp_path / "h.txt", "abc"),
    ]
    it = Corpus(find_sources(paths))
    for path in paths:
        write(path, '{"text": "y"}\n' * 3)
    items = []
    for item in it:
        items.append(item)
        assert it.bytes_read <= it.total_bytes == 17
    assert texts(items) == ['{"text": "y"}\n' * 3, "y", "y", "y", '{"text": "y"}\n' * 3]


@pytest.mark.parametrize("name", ["f.txt", "f.txt.gz", "f.jsonl", "f.parquet"])
def test_errors_of_the_file_system_are_named(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    it = Corpus(find_sources([write(tmp_path / "a.txt"), write(tmp_path / name), write(tmp_path / "z.txt")]))
    (tmp_path / name).unlink()
    first, bad, last = it
    assert isinstance(bad, Skipped)
    assert (bad.reason, texts([first, last])) == ("unreadable", ["text\n", "text\n"])
    assert "No such file" in bad.detail
    assert it.bytes_read == it.total_bytes


def test_an_error_in_the_middle_keeps_the_lines_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "f.jsonl", b'{"text": "x"}\n' * 200_000)

    class Failing:
        def __init__(self, path: Path, mode: str) -> None:
            self.file, self.reads = path.open(mode), 0

        def read(self, n: int) -> bytes:
            self.reads += 1
            if self.reads == 2:
                raise OSError(5, "Input/output error")
            return self.file.read(n)

        fileno = lambda self: self.file.fileno()  # noqa: E731
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: self.file.close()  # noqa: E731

    monkeypatch.setattr(files_module, "open", Failing, raising=False)
    *documents, bad = Corpus(find_sources([path]))
    lines = (1 << 20) // 14
    assert len(documents) == lines
    assert look(bad) == ("skipped", f"{path}:{lines + 1}", "unreadable", "Input/output error")


# Damaged files

RECORDS_EACH = 5  # of a member of an archive, or of a row group


def mutated(data: bytes, rng: random.Random) -> tuple[bytes, int]:
    """(data with one kind of damage, offset of the first byte that differs)."""
    at = rng.randrange(len(data)) if data else 0
    end = at + rng.randrange(1, 20)
    junk = rng.randbytes(end - at)
    kind = rng.randrange(7)
    if kind == 0 and data:
        new = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    else:
        new = [data[:at] + junk + data[end:], data[:at], data[:at] + data[end:], data[:at] + junk + data[at:],
               data[:at] + bytes(end - at) + data[end:], data + junk][kind - 1]  # fmt: skip
    same = next(
        (i for i, (a, b) in enumerate(zip(data, new, strict=False)) if a != b), min(len(data), len(new))
    )
    return new, same


def test_damaged_text(tmp_path: Path, small: None) -> None:
    for seed in range(400):
        rng = random.Random(seed)
        whole = "".join(
            rng.choices(["line\n", "\u20ac", "\n\n", "\U0001f600 word ", "=\n"], k=rng.randrange(100))
        ).encode()
        data = mutated(whole, rng)[0] if seed % 4 else rng.randbytes(rng.randrange(150))
        path = write(tmp_path / "f.txt", data)
        [item] = read(path)
        try:
            expected = data.decode() if b"\0" not in data else ""
        except UnicodeDecodeError:
            expected = ""
        assert texts([item]) == ([expected] if expected else [])
        if expected:
            assert "".join(texts(read(path, piece_bytes=20))) == expected
        documents = [d for d in re.split(rb"(?:\A|(?<=\n))=\n", data) if d]
        items = read(path, separator="=") if not data.endswith(b"=") else []
        assert len(items) == (max(1, len(documents)) if items else 0)
        for item, document in zip(items, documents, strict=False):
            assert isinstance(item, Skipped) or texts([item]) == [document.decode()]


def test_damaged_jsonl(tmp_path: Path, small: None) -> None:
    for seed in range(400):
        rng = random.Random(seed)
        records = {
            json.dumps({"text": f"{n} \u20ac" * rng.randrange(1, 5), "n": [n]}).encode() for n in range(12)
        }
        whole = b"\n".join(sorted(records))
        data = mutated(mutated(whole, rng)[0], rng)[0] if seed % 4 else rng.randbytes(rng.randrange(150))
        path = write(tmp_path / "f.jsonl", data)
        lines = {f"{path}:{n}": line for n, line in enumerate(data.split(b"\n"), 1) if line.strip()}
        items = read(path)
        if items[0].name == str(path) or lines[items[0].name].startswith((b"\xfe\xff", b"\xff\xfe")):
            assert len(items) == 1  # nothing in it, or UTF-16
            continue
        assert [i.name for i in items] == list(lines)  # every line is accounted for
        for item in items:
            if lines[item.name] in records:
                assert texts([item]) == [json.loads(lines[item.name])["text"]]


@pytest.mark.parametrize("suffix", PACK)
def test_damaged_archives(tmp_path: Path, suffix: str, small: None) -> None:
    for seed in range(80):
        rng = random.Random(seed)
        written = [
            f"{n} " + "".join(rng.choices("abcdefgh \u20ac", k=rng.randrange(1, 60)))
            for n in range(4 * RECORDS_EACH)
        ]
        lines = [json.dumps({"text": t}).encode() + b"\n" for t in written]
        members = [
            PACK[suffix](b"".join(lines[n : n + RECORDS_EACH])) for n in range(0, len(lines), RECORDS_EACH)
        ]
        data, at = mutated(b"".join(members), rng)
        path = write(tmp_path / f"f.jsonl.{suffix}", data)
        items = read(path)
        ends = [sum(map(len, members[: n + 1])) for n in range(len(members))]
        intact = RECORDS_EACH * sum(at >= end for end in ends)
        assert texts(items[:intact]) == written[:intact]
        numbers = [int(i.name.rsplit(":", 1)[1]) for i in items]
        assert numbers[:intact] == list(range(1, intact + 1))
        assert numbers == sorted(set(numbers))  # a line that the damage made blank has none
        if at not in ends:  # an archive that ends where a member does is whole
            assert texts(items) == written or (
                isinstance(items[-1], Skipped) and "archive" in items[-1].reason
            )
        [item] = read(path.rename(tmp_path / f"f.txt.{suffix}"))
        if not isinstance(item, Skipped) and suffix != "bz2":
            assert texts([item])[0].startswith(b"".join(lines[:intact]).decode())


DECODER: dict[str, Callable[[], Any]] = {
    "gz": lambda: zlib.decompressobj(31),
    "zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
    "xz": lzma.LZMADecompressor,
    "bz2": bz2.BZ2Decompressor,
}


def test_what_an_archive_held_before_the_damage_is_used_to_the_last_line(tmp_path: Path) -> None:
    rng = random.Random(1)
    data = b"".join(
        b'{"text": "%d %d"}\n' % (n, rng.getrandbits(200)) for n in range(15_000)
    )  # more than BLOCK_BYTES
    for suffix, pack in PACK.items():
        packed = pack(data)
        path = tmp_path / f"f.jsonl.{suffix}"
        for at in (len(packed) // 3, len(packed) * 3 // 4):
            before = DECODER[suffix]().decompress(packed[:at])  # all that is known up to there
            lines = [json.loads(line)["text"] for line in before.split(b"\n")[:-1]]
            items = list(Corpus(find_sources([write(path, packed[:at])])))
            assert texts(items) == lines
            assert short(items[-1:], tmp_path) == [f"{path.name}:{len(lines) + 1}: truncated archive"]
            bad = packed[:at] + bytes(200) + packed[at + 200 :]
            items = list(Corpus(find_sources([write(path, bad)])))
            assert texts(items[: len(lines)]) == lines
            assert short(items[-1:], tmp_path)[0].endswith(": corrupt archive")


def test_a_truncated_archive_gives_all_it_can_at_every_length(tmp_path: Path, small: None) -> None:
    data = b"".join(b'{"text": "%s%d"}\n' % (b"a" * 90, n // 9) for n in range(99))
    for suffix, pack in PACK.items():
        packed = pack(data)
        for at in range(1, len(packed)):
            before = DECODER[suffix]().decompress(packed[:at])
            lines = [json.loads(line)["text"] for line in before.split(b"\n")[:-1]]
            assert (
                texts(list(Corpus(find_sources([write(tmp_path / f"f.jsonl.{suffix}", packed[:at])]))))
                == lines
            )


def test_bytes_behind_an_archive(tmp_path: Path) -> None:
    line = b'{"text": "x"}\n'
    for suffix, pack in PACK.items():
        path = tmp_path / f"f.jsonl.{suffix}"
        tail = b"" if suffix == "zst" else bytes(512)
        assert short(read(write(path, pack(line) + tail + pack(line))), tmp_path) == [
            f"f.jsonl.{suffix}:{n}" for n in (1, 2)
        ]
        assert short(read(write(path, pack(line) + b"junk")), tmp_path)[0] == f"f.jsonl.{suffix}:1"
        reasons = {i.reason for i in read(write(path, pack(line) + b"junk" * 9)) if isinstance(i, Skipped)}
        assert reasons == {"corrupt archive"}
    assert short(read(write(tmp_path / "z.txt.gz", bytes(99))), tmp_path) == ["z.txt.gz: corrupt archive"]


def test_archives_that_ask_for_too_much_memory(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    [item] = read(write(tmp_path / "f.txt.zst", packer.compress(b"x" * 999) + packer.flush()))
    assert isinstance(item, Skipped)
    assert "zstd -d --long=31" in item.detail


def parquet(path: Path, groups: int) -> tuple[bytes, list[str], list[int]]:
    """(bytes of a Parquet file, its texts, the offset at which each row group ends); pages have checksums."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = [f"row {n} " + "\u20ac" * (n % 7) for n in range(groups * RECORDS_EACH)]
    table = pa.table({"n": range(len(values)), "text": values})
    pq.write_table(table, path, row_group_size=RECORDS_EACH, write_page_checksum=True)
    meta = pq.read_metadata(path)
    columns = [meta.row_group(g).column(1) for g in range(groups)]
    return (
        path.read_bytes(),
        values,
        [(c.dictionary_page_offset or c.data_page_offset) + c.total_compressed_size for c in columns],
    )


def test_damaged_parquet(tmp_path: Path) -> None:
    for seed in range(150):
        rng = random.Random(seed)
        path = tmp_path / "f.parquet"
        whole, values, ends = parquet(path, 4)
        if seed % 3:  # in the data, so that the footer says where the other row groups are
            at = rng.randrange(4, ends[-1])
            data = whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
            items = read(write(path, data))
            spoilt = sum(at >= end for end in ends) * RECORDS_EACH
            rows = {int(i.name.rsplit(":", 1)[1]): i for i in items}
            for n, value in enumerate(values):
                if not spoilt <= n < spoilt + RECORDS_EACH:
                    assert texts([rows[n + 1]]) == [value]
            lost = [i for i in items if isinstance(i, Skipped)]
            assert all(i.reason == "corrupt archive" for i in lost)
            assert lost or texts(items) == values
        else:
            assert read(write(path, mutated(whole, rng)[0] if seed else b""))


# Memory


def peak(path: Path, **settings: Any) -> float:
    """MB that a fresh process needs at most to read a file, a long text twice.

    Not ru_maxrss, which begins with what the parent of a process needed."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc/self/status")
    code = """if 1:
        import sys
        from apr.data.corpus import Corpus
        from apr.data.documents import LongDocument
        from apr.data.find import find_sources
        size = 0
        for item in Corpus(find_sources([sys.argv[1]]), **eval(sys.argv[2])):
            for chunk in item.chunks() if isinstance(item, LongDocument) else ():
                size += len(chunk)
        print(*(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith("VmHWM")))
    """
    run = subprocess.run(
        [sys.executable, "-c", code, path, repr(settings)], capture_output=True, text=True, check=True
    )
    return float(run.stdout)


MEMORY: dict[str, tuple[Callable[[], bytes], int, int]] = {  # name: what is written, how often, MB
    "line.txt": (lambda: b"0123456789" * 100_000, 100, 80),
    "newlines.txt.gz": (lambda: gzip.compress(b"\n" * (64 << 20)), 4, 80),
    "zeros.txt.zst": (lambda: zstandard.compress(bytes(256 << 20)), 1, 100),
    "zeros.jsonl.bz2": (lambda: bz2.compress(bytes(32 << 20)), 5, 200),
    "zeros.jsonl.zst": (lambda: zstandard.compress(bytes(256 << 20)), 1, 250),
    "many.jsonl": (lambda: b'{"text": "%s"}\n' % (b"word " * 200) * 1000, 100, 80),
    "line.jsonl": (lambda: b'{"text": "%s"}' % (b"word " * 20_000_000), 1, 600),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_bounded(tmp_path: Path, name: str) -> None:
    block, repeat, limit = MEMORY[name]
    with open(tmp_path / name, "wb") as f:
        f.writelines([block()] * repeat)
    assert peak(tmp_path / name) < limit


@pytest.mark.parametrize("settings", [{"piece_bytes": 1 << 14}, {"separator": "<|endoftext|>"}])
def test_memory_is_bounded_for_a_line_that_is_not_cut(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert peak(write(tmp_path / "line.txt", b"0123456789" * 3_000_000), **settings) < 80


def test_a_line_of_millions_of_numbers_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a parser 30 times its length; a long text does not, whatever signs it holds."""
    monkeypatch.setattr(jsonl, "MAX_VALUE_BYTES", 5000)
    text = 'a, [1, 2], {"b": \\' * 2000
    lines = [json.dumps({"text": "x", "n": [0] * 4000}), json.dumps({"text": text, "n": [0] * 40})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    first, second = Corpus(find_sources([tmp_path / "a.jsonl"]))
    assert isinstance(first, Skipped)
    assert (first.reason, first.name.rsplit(":")[-1]) == ("too long", "1")
    assert isinstance(second, Document)
    assert second.text == text


def test_hidden_files_of_a_folder_are_left_out_and_counted(tmp_path: Path) -> None:
    for name in ("a.py", ".b.py", ".env"):
        (tmp_path / name).write_text(name)
    found = find_sources([tmp_path])
    assert [s.path.name for s in found] == ["a.py"]
    assert found.left_out == {"hidden": 2}
    assert [s.path.name for s in find_sources([tmp_path / ".b.py"])] == [".b.py"]
