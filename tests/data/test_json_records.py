"""A .json file is records, an array or a line each, and never text."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from apr.common.errors import Refused
from apr.data import json_records
from apr.data.conversations.examples import open_conversations
from apr.data.conversations.shapes import Example
from apr.data.corpus import Corpus
from apr.data.documents import Document
from apr.data.find import find_sources
from apr.data.json_records import _elements
from apr.data.source import BLOCK_BYTES, Skipped, Source, Unusable

RECORDS = [
    {"text": f'Once "there" was [{i}] \\ {{cat}}, \u00e9\U0001f600.', "n": [i, {"a": None}]} for i in range(7)
]
TEXTS = [r["text"] for r in RECORDS]
LINES = "".join(json.dumps(r) + "\n" for r in RECORDS)
FORMS = {
    "array": json.dumps(RECORDS),
    "array over lines": "\n " + json.dumps(RECORDS, indent=2, ensure_ascii=False) + "\n",
    "byte order mark": "\ufeff" + json.dumps(RECORDS),
    "lines": LINES,
    "one line": json.dumps(RECORDS[0]),
    "lines, the last without an end": LINES.strip(),
}
NOT_RECORDS = {
    "object over lines": (json.dumps({"data": RECORDS}, indent=1), "one object over several lines"),
    "number": ("12", "it begins with b'12'"),
    "text": ("once there was", "neither an array of records nor JSON Lines"),
    "an object that does not end": ('{"text": "a', "one object over several lines"),
}


def read(path: Path) -> list[Any]:
    return list(Corpus(find_sources([path])))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [False, True])
def test_records_are_read_as_records(tmp_path: Path, form: str, packed: bool) -> None:
    path = tmp_path / ("a.json.gz" if packed else "a.json")
    data = FORMS[form].encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    for source in (path, tmp_path):
        items = read(source)
        assert [d.text for d in items] == (TEXTS[:1] if form == "one line" else TEXTS)
        assert [d.name.rsplit(":")[1] for d in items] == [str(i + 1) for i in range(len(items))]


@pytest.mark.parametrize("form", NOT_RECORDS)
def test_what_holds_no_records_is_refused_by_name_and_skipped_in_a_folder(tmp_path: Path, form: str) -> None:
    text, why = NOT_RECORDS[form]
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(Refused, match=r"a\.json") as e:
        find_sources([tmp_path / "a.json"])
    assert why in str(e.value)
    (tmp_path / "b.txt").write_text("text")
    left, kept = read(tmp_path)
    assert isinstance(left, Skipped)
    assert (left.reason, kept.text) == ("no records", "text")
    with pytest.raises(Refused, match=r"a\.json"):
        open_conversations(str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("text", "good", "detail"),
    [
        ('[{"text": "a"}, {"text": "b"}, {"text": "c', 2, "has no end"),
        ('[{"text": "a"}] x', 1, "behind the end"),
        ('[{"text": "a"}][]', 1, "behind the end"),
        ('[{"text": "a"}, {"text": }, {"text": "b"}]', 2, "Expecting value"),
        ('[{"text": "a"}, 3]', 1, "the record is a number"),
        ('[{"text": "a"}}]', 0, "closes what it did not open"),
    ],
)
def test_what_is_broken_is_named_and_the_records_before_it_are_used(
    tmp_path: Path, text: str, good: int, detail: str
) -> None:
    (tmp_path / "a.json").write_text(text)
    items = read(tmp_path / "a.json")
    assert sum(isinstance(x, Document) for x in items) == good
    (bad,) = [x for x in items if isinstance(x, Skipped)]
    assert detail in bad.detail


def test_an_empty_array_and_an_empty_file_are_named(tmp_path: Path) -> None:
    for text in ("[]", "", " \n"):
        (tmp_path / "a.json").write_text(text)
        (only,) = read(tmp_path / "a.json")
        assert only.reason == "empty"


def test_elements_are_those_of_json_however_the_blocks_are_cut() -> None:
    rng = random.Random(1)

    def value(depth: int = 0) -> Any:
        kind = rng.randrange(6 if depth < 3 else 4)
        if kind == 4:
            return [value(depth + 1) for _ in range(rng.randrange(4))]
        if kind == 5:
            return {f"{i}" + rng.choice('"],{'): value(depth + 1) for i in range(rng.randrange(4))}
        text = "".join(rng.choice('ab"\\[]{},\n \u00e9') for _ in range(rng.randrange(9)))
        return (rng.random(), text, None, rng.randrange(99))[kind]

    for _ in range(300):
        want = [value() for _ in range(rng.randrange(6))]
        data = json.dumps(want, indent=rng.choice([None, 2])).encode()
        size = rng.choice([1, 2, 3, 7, 1000])
        blocks = [data[i : i + size] for i in range(0, len(data), size)]
        assert [json.loads(x) for x in _elements(iter(blocks))] == want
        with pytest.raises(Unusable):
            list(_elements(iter([data[: rng.randrange(len(data))]])))


def test_a_string_that_is_cut_is_read_on_where_it_was_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A string of many blocks is not read again from its beginning with each."""
    read: list[int] = []

    class Counted:
        def __init__(self, pattern: Any) -> None:
            self.pattern = pattern

        def __getattr__(self, name: str) -> Any:
            def find(text: bytes, at: int) -> Any:
                m = getattr(self.pattern, name)(text, at)
                read.append(m.end() - m.start() if m else 0)
                return m

            return find

    for name in ("_PART", "_REST"):
        monkeypatch.setattr(json_records, name, Counted(getattr(json_records, name)))
    data = json.dumps([{"text": 'a"\n' * 1000}]).encode()
    (got,) = _elements(data[i : i + 10] for i in range(0, len(data), 10))
    assert json.loads(got)["text"] == 'a"\n' * 1000
    assert sum(read) <= len(data)


def test_an_array_larger_than_memory_allows_is_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a" * 1000} for _ in range(3000)]))
    monkeypatch.setattr("apr.data.json_records.MAX_RECORD_BYTES", 2 * BLOCK_BYTES)
    assert len(read(path)) == 3000
    path.write_text(json.dumps([{"text": "a"}, {"text": "a" * (4 * BLOCK_BYTES)}]))
    first, second = read(path)
    assert first.text == "a"
    assert second.reason == "too long"


def test_conversations_of_an_array(tmp_path: Path) -> None:
    pairs = [{"prompt": f"ask {i}", "response": "say"} for i in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(pairs, indent=1))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    a, b = (list(open_conversations(str(tmp_path / n))) for n in ("a.json", "b.jsonl"))
    assert all(isinstance(x, Example) for x in a)
    assert [x.text for x in a] == [x.text for x in b]


def test_a_source_that_vanishes_is_named(tmp_path: Path) -> None:
    gone = Source(tmp_path / "a.json", "a.json", "json", "", 3)
    (only,) = Corpus([gone])
    assert isinstance(only, Skipped)
    assert only.reason == "unreadable"
