"""Files of unknown origin: what stands in the place of a file, what a JSON text may hold, what a message may show."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apr.common import files
from apr.common.errors import MOST, AprError, InputNotFound, IOFailure, MalformedFile
from apr.common.files import (
    MAX_DEPTH,
    MAX_LINE,
    MAX_TEXT,
    MAX_VALUES,
    lines_of,
    opened,
    parse_json,
    parse_value,
    read_json,
    read_text,
    sha256_of,
    short,
)
from apr.data import json_records, jsonl
from apr.model.presets import load_config

NO_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda p: None, "no such file"),
    "folder": (lambda p: p.mkdir(), "is a folder"),
    "pipe": (os.mkfifo, "a pipe or a device"),
    "device": (lambda p: p.symlink_to("/dev/zero"), "a pipe or a device"),
    "circle of links": (lambda p: p.symlink_to(p.name), "leads nowhere"),
    "dangling link": (lambda p: p.symlink_to("gone"), "leads nowhere"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_an_error_and_no_hang(tmp_path: Path, kind: str) -> None:
    make, words = NO_FILES[kind]
    path = tmp_path / "config.json"
    make(path)
    for read in (read_text, read_json, sha256_of):
        with pytest.raises(InputNotFound, match=rf"config\.json: .*{words}"):
            read(path)
    with pytest.raises(InputNotFound, match=r"config\.json"):
        load_config(str(path))
    with pytest.raises(InputNotFound, match=rf"{words}.*; write one"), opened(path, "write one"):
        pass


def test_names_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(IOFailure, match="too long"):
        read_text(tmp_path / ("x" * 300))
    with pytest.raises(InputNotFound, match="no such file"):
        read_text(tmp_path / "a\0b")
    with pytest.raises(InputNotFound, match="no such file"):
        read_text(Path("/dev/null/x"))
    with pytest.raises(InputNotFound, match="neither a preset"):
        load_config("x" * 5000)


def test_links_lead_to_files(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("text")
    (tmp_path / "name").symlink_to("blob")
    assert read_text(tmp_path / "name") == "text"


def test_an_error_of_the_block_is_not_one_of_the_opening(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match="of the block"), opened(tmp_path / "x"):
        raise ValueError("of the block")
    with pytest.raises(IOFailure, match=r"x: cannot read: .*no reason"), opened(tmp_path / "x"):
        raise OSError("no reason")


def test_memory_is_that_of_the_file_and_not_of_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    tracemalloc.start()
    read_text(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    with path.open("r+b") as f:
        f.truncate(MAX_TEXT + 1)  # a hole: it takes no disk
    with pytest.raises(MalformedFile, match=f"{MAX_TEXT + 1:,} bytes"):
        read_text(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not"),
        ('{"a": 1e999}', "1e999 is too large"),
        ('{"a": -1e999}', "too large"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        ('{"a": "\\ud800"}', "lone surrogate"),
        ('{"a\\udfff": 1}', "lone surrogate"),
        ('{"a": "\ud800"}', "lone surrogate"),
        (b'{"a": "\xed\xa0\x80"}', "not JSON.*utf-8"),
        ('{"a": 1}'.encode("utf-16"), "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested too deeply"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested too deeply"),
        ("", "not JSON"),
    ],
)
def test_json_that_nobody_should_go_on_with(text: str | bytes, words: str) -> None:
    with pytest.raises(MalformedFile, match=f"^here: .*{words}"):
        parse_value(text, "here")


def test_a_text_saved_on_windows_is_read_without_its_mark(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(codecs.BOM_UTF8 + b'{"a": 1}')
    assert read_text(path) == '{"a": 1}'
    assert read_json(path) == {"a": 1}
    path.write_bytes(codecs.BOM_UTF8 + "\ufeffx".encode())
    assert read_text(path) == "\ufeffx"  # one mark is the file's, what follows is text
    path.write_bytes(codecs.BOM_UTF8 + b"ab\xff")
    with pytest.raises(MalformedFile, match=r"t\.json: not UTF-8 at byte 5"):
        read_text(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_text_of_another_encoding_is_named(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"a": 1}', encoding)
    with pytest.raises(
        MalformedFile, match=f"{encoding.upper()} by its byte order mark; convert it with iconv"
    ):
        read_json(path)


def test_json_that_is_read() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse_value(deep, "here")) == deep
    assert parse_value('["\\ud83d\\ude00", 1.5, 1e300, null]', "here") == ["\U0001f600", 1.5, 1e300, None]
    assert parse_json('{"a": 1, "a": 2}', "here") == {"a": 2}
    with pytest.raises(MalformedFile, match="key 'a' is there twice in one object"):
        parse_json('[{"a": 1, "a": 2}]', "here", unique=True)
    with pytest.raises(MalformedFile, match="here: holds a list of 1, not an object"):
        parse_json("[1]", "here")


@pytest.mark.parametrize("value", ["0", "[]", "{}", '{"":0}', "[[0]]"])
def test_values_are_counted_before_they_take_memory(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "[" + f"{value}," * (MAX_VALUES // 2) + f"{value}," * (MAX_VALUES // 2) + "0]"
    monkeypatch.setattr(files.json, "loads", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(MalformedFile, match=r"^here: about .* values; no file of this kind has more"):
        parse_value(text, "here")


def test_marks_within_strings_are_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_VALUES", 10)
    text = json.dumps({'a,:"[{' * 10: '\\",,,,,,,,,,,,', "b": [1, 2, 3]})
    assert parse_value(text, "here")["b"] == [1, 2, 3]
    with pytest.raises(MalformedFile, match="here: about 11 values"):
        parse_value('{"\\",": [1, 2, 3, 4, 5, 6, 7, 8, 9]}', "here")


def test_a_string_without_an_end_is_looked_at_once() -> None:
    """Where a search for its end fails, one from each of its escaped quotes fails too: their number's square in time."""
    text = '"' + '\\",' * 1000
    for pattern, whole in ((files._STRING, text), (jsonl._STRING, text.encode())):
        assert [m.end() for m in pattern.finditer(whole)] == [len(whole)]  # type: ignore[attr-defined]
    assert [m.end() for m in json_records._PART.finditer(text.encode())] == [len(text)]


def test_a_line_without_end_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a\n\nbc")
    with opened(path) as (f, _):
        assert list(lines_of(f, "here")) == [b"a\n", b"\n", b"bc"]
    with path.open("r+b") as f:
        f.truncate(1 << 40)  # a hole: it takes no disk
    with opened(path) as (f, _), pytest.raises(MalformedFile, match=f"here: line 3 has more than {MAX_LINE}"):
        list(lines_of(f, "here"))


def test_a_hash_ends_where_the_file_ended_when_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert sha256_of(path) == (hashlib.sha256(b"abc").hexdigest(), 3)


def test_values_in_messages() -> None:
    assert short({"a": 1}) == "an object of 1"
    assert short("\x1b\ud800\u00e9") == r"'\x1b\ud800\xe9'"
    assert short("x" * 1000) == "'" + "x" * 59 + "..."
    assert short(10**5000) == "a number of thousands of digits"


def test_a_message_can_be_printed_whatever_a_file_put_into_it() -> None:
    assert (
        str(AprError("tensor \x1b[2J\x00\ud800\u202e: caf\u00e9 \u4e2d"))
        == r"tensor \x1b[2J\x00\ud800\u202e: caf" + "\u00e9 \u4e2d"
    )
    assert str(AprError("two\nlines")) == "two\nlines"
    long = str(MalformedFile("start " + "x" * 10**6 + " what to try"))
    assert len(long) <= MOST
    assert (long[:6], long[-12:]) == ("start ", " what to try")
