"""Documents of a JSON Lines file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ..common.files import STRING
from ..common.units import plural
from .documents import Document, Item
from .source import Skipped, Source, Unusable
from .utf8 import bad_byte, without_mark

# Bytes of a line; a longer one is skipped (as text of 4 bytes a character it takes 9 times that).
MAX_RECORD_BYTES = 64 << 20
# Bytes of a line outside its strings: a number or list takes up to 30 times its length when it is parsed.
MAX_VALUE_BYTES = 8 << 20
# Keys or columns that a message lists.
MAX_NAMES_LISTED = 10

_STRING = re.compile(STRING.encode())
# Numbers are not read: as floats they may have any number of digits.
_JSON = json.JSONDecoder(parse_int=float)


def read_jsonl(
    source: Source, parse: Callable[[str, bytes], Item], advance: Callable[[int], None]
) -> Iterator[Item]:
    """Yield parse(name, line), a document or Skipped, for each line that is not empty."""
    number = 0
    try:
        for line in _lines(without_mark(source.blocks(advance=advance))):
            number += 1
            if line is None:
                detail = f"more than {MAX_RECORD_BYTES} bytes in one line; is it JSON Lines?"
                yield Skipped(f"{source.name}:{number}", "too long", detail)
            elif line and not line.isspace():
                yield parse(f"{source.name}:{number}", line)
    except Unusable as e:
        yield Skipped(f"{source.name}:{number + 1}", e.reason, e.detail)


def text_record(name: str, line: bytes, keys: Sequence[str]) -> Item:
    """Parse a record that holds a text; keys: path to the text."""
    if len(line) > MAX_VALUE_BYTES and (outside := len(_STRING.sub(b"", line))) > MAX_VALUE_BYTES:
        return Skipped(
            name, "too long", f"{plural(outside, 'byte')} of it are not text, more than {MAX_VALUE_BYTES}"
        )
    try:
        value = _JSON.decode(line.decode())
    except UnicodeDecodeError as e:
        return Skipped(name, "not UTF-8", bad_byte(e, e.start))
    except json.JSONDecodeError as e:
        return Skipped(name, "broken JSON", f"{e.msg} at character {e.pos} of the line")
    except RecursionError:
        return Skipped(name, "broken JSON", "nested too deeply")
    for depth, key in enumerate(keys):
        if not isinstance(value, dict):
            where = ".".join(keys[:depth])
            reason, what = ("not an object", "the record") if not depth else ("no field", where)
            return Skipped(name, reason, f"{what} is {_json_type(value)}, not an object")
        if key not in value:
            missing = ".".join(keys[: depth + 1])
            there = f"no {missing!r}; there is {listed(value)}; say with --content-field which is the text"
            return Skipped(name, "no field", there)
        value = value[key]
    if not isinstance(value, str):
        return Skipped(name, "not a string", f"{'.'.join(keys)} is {_json_type(value)}")
    if not value:
        return Skipped(name, "empty", f"{'.'.join(keys)} has no characters")
    # An escape is the only way to write half a pair of surrogates in UTF-8.
    if b"\\u" in line:
        try:
            value.encode()
        except UnicodeEncodeError as e:
            return Skipped(name, "not Unicode", f"half a surrogate pair at character {e.start} of the text")
    return Document(name, value)


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes | None]:
    """Yield lines without their ends; None for a line of more than MAX_RECORD_BYTES bytes, which is dropped."""
    parts: list[bytes] = []
    size = 0
    for block in blocks:
        first, *others = block.split(b"\n")
        size += len(first)
        parts.append(first)
        if size > MAX_RECORD_BYTES:
            parts.clear()
        if others:
            yield None if size > MAX_RECORD_BYTES else b"".join(parts)
            yield from others[:-1]
            parts, size = others[-1:], len(others[-1])
    if size:
        yield None if size > MAX_RECORD_BYTES else b"".join(parts)


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", float: "a number"}
    return names.get(type(value), "null")


def listed(names: Iterable[str]) -> str:
    """List keys or columns for a message."""
    names = list(names)
    shown = ", ".join(repr(name)[:40] for name in names[:MAX_NAMES_LISTED])
    return (shown or "no key") + (
        f" and {len(names) - MAX_NAMES_LISTED} more" if len(names) > MAX_NAMES_LISTED else ""
    )
