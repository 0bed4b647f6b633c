"""Records of a .json or .jsonl file: JSON Lines, or one array of records, an element at a time, whatever its name says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from .documents import Item
from .jsonl import MAX_RECORD_BYTES, read_jsonl
from .source import Skipped, Source, Unusable
from .utf8 import without_mark

# A string, cut off where the buffer ends if it has no group, or what opens, closes and divides.
_PART = re.compile(rb'"(?:[^"\\]++|\\[\s\S])*+("?)|[][{},]')
# What follows in a string that was cut off, up to its end or to the next cut.
_REST = re.compile(rb'(?:[^"\\]++|\\[\s\S])*+("?)')
_OPENS = re.compile(rb"\[\s*[{\]]")
ADVICE = "give an array of records, [{...}, ...], or one record a line; JSON that is text to train on needs a name of text (.txt)"


ONE_A_LINE = "a line holds one whole record: jq -c . FILE writes them so"


def read_json_records(
    source: Source, parse: Callable[[str, bytes], Item], advance: Callable[[int], None]
) -> Iterator[Item]:
    """Yield parse(name, record) for each record of the file, a document or Skipped; names: FILE:LINE, of an array FILE:NUMBER
    from 1. A file that holds no records gives one Skipped."""
    try:
        kind = _kind(source)
    except Unusable as e:
        if source.kind == "json":
            yield Skipped(source.name, e.reason, e.detail)
            return
        # Which names the line.
        kind = "lines"
    if kind == "lines":
        yield from read_jsonl(source, parse, advance)
        return
    number = 0
    try:
        for record in _elements(without_mark(source.blocks(advance=advance))):
            number += 1
            yield parse(f"{source.name}:{number}", record)
    except Unusable as e:
        yield Skipped(f"{source.name}:{number + 1}", e.reason, e.detail)


def why_no_records(source: Source) -> str:
    """Say why a .json file holds no records, "" if it does or cannot be read as far."""
    try:
        _kind(source)
    except Unusable as e:
        return f"{e.detail}" if e.reason == "no records" else ""
    return ""


def _kind(source: Source) -> str:
    """Tell an array from JSON Lines by the beginning. Raises Unusable: unreadable, or neither, unless its name says lines."""
    held = bytearray()
    for block in without_mark(source.blocks()):
        held += block if held else block.lstrip()
        if b"\n" in held or len(held) > MAX_RECORD_BYTES or held[:1] not in (b"", b"{"):
            break
    line = bytes(held.split(b"\n", 1)[0])
    # Lines that are lists are no records either: each is named.
    is_array = source.kind == "json" or not (closes(line) and held[len(line) :].strip())
    if held[:1] == b"[" and is_array and (source.kind == "json" or _OPENS.match(held)):
        return "array"
    if not held or source.kind == "jsonl" or (held[:1] == b"{" and closes(line)):
        return "lines"
    what = "one object over several lines" if held[:1] == b"{" else f"it begins with {line[:20]!r}"
    raise Unusable("no records", f"{what}, neither an array of records nor JSON Lines; {ADVICE}")


def closes(line: bytes) -> bool:
    """True for a line in which every bracket and string that opens is closed."""
    depth = 0
    for m in _PART.finditer(line):
        if m[1] == b"":
            return False
        depth += (m[0] in (b"[", b"{")) - (m[0] in (b"]", b"}"))
    return depth == 0


def _elements(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the elements of the array that a file is. Raises Unusable behind the last whole one: the file does not go on as an
    array does, or an element has more than MAX_RECORD_BYTES bytes."""
    held, at, start, depth, has_ended, is_cut = bytearray(), 0, 0, 0, False, False
    for block in blocks:
        held += block
        while (m := _REST.match(held, at) if is_cut else _PART.search(held, at)) is not None:
            # The rest of a string comes with the next block, and is read on from here.
            if is_cut := m[1] == b"":
                break
            if has_ended:
                raise Unusable("broken JSON", "something stands behind the end of the array")
            at, part = m.end(), m[0]
            if depth == 1 and part == b"}":
                raise Unusable("broken JSON", "a bracket closes what it did not open")
            if depth == 1 and part in (b",", b"]"):
                if element := bytes(held[start : m.start()]).strip():
                    yield element
                start = at
            if depth == 0:
                start = at
            depth += (part in (b"[", b"{")) - (part in (b"]", b"}"))
            has_ended = depth == 0
        at = len(held) if m is None else m.end()
        del held[:start]
        at, start = at - start, 0
        if len(held) > MAX_RECORD_BYTES:
            raise Unusable("too long", f"more than {MAX_RECORD_BYTES} bytes in one element of the array")
    if not has_ended:
        raise Unusable("broken JSON", "the array has no end")
    if held.strip():
        raise Unusable("broken JSON", "something stands behind the end of the array")
