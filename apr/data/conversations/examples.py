"""Examples to fine-tune on: records of conversations and pairs, read from JSON Lines, JSON and Parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from ...common.errors import MalformedFile, Refused
from ...common.files import check_values
from ..corpus import Corpus
from ..documents import Document, Item
from ..hub_data import train_sources
from ..json_records import ONE_A_LINE, closes, read_json_records
from ..parquet import read_parquet_records
from ..sniff import TABLES, table_as_records
from ..source import Skipped, Source, Unusable
from ..utf8 import bad_byte
from .shapes import KeyMap, example_of

Parse = Callable[[str, object, KeyMap], Document]


class Conversations(Corpus):
    """Examples of JSON Lines, JSON and Parquet files; an unusable record is a Skipped with its line or number."""

    map = KeyMap()
    parse: Parse = staticmethod(example_of)

    def _read(self, source: Source, advance: Callable[[int], None]) -> Iterator[Item]:
        if source.kind == "parquet":
            return read_parquet_records(source, partial(_row, parse=self.parse, keys=self.map), advance)
        return read_json_records(source, partial(_record, parse=self.parse, keys=self.map), advance)


def open_conversations(path: str, keys: str | None = None) -> Conversations:
    """Find the files of records of a path; keys: --map. Raises InputNotFound, Refused: another kind of file."""
    sources = train_sources(path)
    others = [s for s in sources if s.kind == "text"]
    if others and (len(others) == len(sources) or not Path(path).is_dir()):
        if others[0].path.suffix.lower() in TABLES:
            advice = f"write a record a line: {table_as_records(others[0].path)}"
            raise Refused(f"--instruct {others[0].path}: a table of text; {advice}")
        raise Refused(
            f"--instruct {others[0].path}: not JSON Lines; give a .jsonl file (also .jsonl.gz, .jsonl.zst), one object a line, "
            'a .json file with an array of objects, or a .parquet file: {"messages": [{"role": ..., "content": ...}, ...]} or '
            '{"prompt": ..., "response": ...}'
        )
    # Such as a README beside the data.
    for source in others:
        sources.remove(source)
    found = Conversations(sources)
    found.map = KeyMap.parse(keys)
    return found


def _record(name: str, line: bytes, parse: Parse, keys: KeyMap) -> Item:
    """Parse a record. Numbers keep their spelling's type: a template may write them."""
    try:
        text = line.decode()
        check_values(text, "the line")
        return parse(name, json.loads(text), keys)
    except UnicodeDecodeError as e:
        return Skipped(name, "not UTF-8", bad_byte(e, e.start))
    except json.JSONDecodeError as e:
        return Skipped(name, "broken JSON", str(e) if closes(line) else f"{e}; {ONE_A_LINE}")
    except (ValueError, RecursionError, MalformedFile) as e:
        return Skipped(name, "broken JSON", str(e))
    except Unusable as e:
        return Skipped(name, e.reason, e.detail)


def _row(name: str, row: object, parse: Parse, keys: KeyMap) -> Item:
    try:
        return parse(name, row, keys)
    except Unusable as e:
        return Skipped(name, e.reason, e.detail)
