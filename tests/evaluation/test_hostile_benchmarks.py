"""Files of problems and questions from elsewhere: bombs, what is nested too deeply, what is no file."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from apr.common import files
from apr.common.errors import AprError, InputNotFound, MalformedFile
from apr.data.conversations.examples import open_conversations
from apr.data.source import Skipped, Source
from apr.evaluation.choices import read_items
from apr.evaluation.humaneval import read_problems

READERS: dict[str, Callable[[str], Any]] = {"--humaneval": read_problems, "--choices": read_items}


def packed(path: Path, member: bytes, times: int) -> Path:
    """A .gz of many members: it is as small as `member` packs."""
    path.write_bytes(gzip.compress(member, mtime=0) * times)
    return path


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("member", [b" " * (1 << 20), b"\n" * (1 << 20)], ids=["one line", "empty lines"])
def test_a_bomb_takes_the_memory_of_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, member: bytes
) -> None:
    path = packed(tmp_path / "bomb.jsonl.gz", member, 3000)
    assert path.stat().st_size < 4 << 20
    blocks, sizes = Source.blocks, list[int]()

    def counted(self: Source) -> Iterator[bytes]:
        for block in blocks(self):
            sizes.append(len(block))
            yield block

    monkeypatch.setattr(Source, "blocks", counted)
    tracemalloc.start()
    with pytest.raises(MalformedFile, match=rf"bomb.jsonl.gz: more than {files.MAX_TEXT} bytes unpacked"):
        READERS[reader](str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * files.MAX_TEXT
    assert sum(sizes[:-1]) <= files.MAX_TEXT < sum(sizes)  # and nothing is unpacked behind it


@pytest.mark.parametrize("reader", READERS)
def test_values_are_counted_over_all_lines(tmp_path: Path, reader: str) -> None:
    path = packed(tmp_path / "many.gz", b"{}\n" * (1 << 17), 40)
    with pytest.raises(MalformedFile, match=r"many\.gz: about .* values"):
        READERS[reader](str(path))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"question":' * 200_000, "nested too deeply"),
        (b'{"task_id": NaN}', "NaN is not a JSON number"),
        (b'{"task_id": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"task_id": "\\ud800"}', "lone surrogate"),
        (b"[1]", "not a JSON object"),
        (b"{", "not JSON"),
    ],
)
def test_a_line_that_is_no_problem_is_named(tmp_path: Path, reader: str, line: bytes, words: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n" + line + b"\n")
    with pytest.raises(MalformedFile, match=rf"x\.jsonl:2: .*{words}.*; expected "):
        READERS[reader](str(path))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", ["cut", "changed", "tail"])
def test_a_damaged_archive_is_named(tmp_path: Path, reader: str, damage: str) -> None:
    data = bytearray(gzip.compress(b'{"context": "a", "choices": ["b", "c"], "answer": 0}\n' * 100, mtime=0))
    if damage == "changed":
        data[20] ^= 0xFF
    path = tmp_path / "x.gz"
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else data + b"tail" * (damage == "tail"))
    with pytest.raises(MalformedFile, match=r"x\.gz: cannot be read: .*; download it again"):
        READERS[reader](str(path))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("what", ["pipe", "device", "circle", "folder", "nothing"])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path: Path, reader: str, what: str) -> None:
    path = tmp_path / "x"
    makers: dict[str, Callable[[], object]] = {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "circle": lambda: path.symlink_to("x"),
        "folder": path.mkdir,
        "nothing": lambda: None,
    }
    makers[what]()
    with pytest.raises(InputNotFound, match=r"/x: .*; give "):
        READERS[reader](str(path))


def test_packed_and_plain_questions_are_read(tmp_path: Path) -> None:
    line = b'{"context": "a", "choices": [" b", " c"], "answer": 1}\n'
    (tmp_path / "plain").write_bytes(line * 2)
    packed(tmp_path / "packed", line, 2)
    for name in ("plain", "packed"):
        assert [i.answer for i in read_items(str(tmp_path / name))] == [1, 1]


def test_a_conversation_of_a_million_numbers_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_VALUES", 100)
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": [' + "0," * 200 + "0]}\n")
    good, bad = list(open_conversations(str(path)))
    assert not isinstance(good, Skipped)
    assert isinstance(bad, Skipped)
    assert "about 203 values" in bad.detail


def test_no_reader_raises_anything_else(tmp_path: Path) -> None:
    """Each first value of a problem or question as every type of JSON."""
    whole = {
        "question": {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
        "goal": {"goal": "g", "sol1": "a", "sol2": "b", "label": 0},
        "context": {"context": "c", "choices": ["a", "b"], "answer": 0},
        "task": {"task_id": "t", "prompt": "p", "entry_point": "e", "test": "t"},
    }
    values = [
        None,
        True,
        0,
        -1,
        1e308,
        10**400,
        "",
        "x",
        [],
        [[]],
        [None, None],
        {},
        {"text": 1, "label": []},
    ]
    path = tmp_path / "x.jsonl"
    for row in whole.values():
        for key in row:
            for value in values:
                path.write_text(json.dumps({**row, key: value}))
                for read in READERS.values():
                    with suppress(AprError):
                        read(str(path))
