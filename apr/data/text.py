"""Documents of a text file: whole, between separator lines, or in pieces."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from .documents import MAX_HELD_BYTES, Document, Item, LongDocument
from .source import Skipped, Source, Unusable
from .utf8 import Utf8, mark_length

_BLANK_LINE = re.compile(r"(?<=\n)(?=\r?\n)")


def read_text(source: Source, piece_bytes: int | None, advance: Callable[[int], None]) -> Iterator[Item]:
    """Yield the file as one document, or one of more than piece_bytes in pieces of about that many."""
    whole = _whole(source, _blocks(source, advance))
    if piece_bytes is None or isinstance(whole, Skipped) or whole.num_bytes <= piece_bytes:
        yield whole
    else:
        yield from _pieces(source, whole, piece_bytes)


def read_separated(source: Source, separator: bytes, advance: Callable[[int], None]) -> Iterator[Item]:
    """Yield the documents between separator lines; two of these with nothing between them hold none."""
    blocks = _blocks(source, advance)
    at = number = 0
    document = None
    try:
        head = next(blocks, b"")
        at = mark_length(head)
        for text, separator_bytes in _at_lines(chain([head[at:]], blocks), separator):
            if text:
                document = document or _Growing(source, f"{source.name}#{number}", at)
                document.add(text)
            at += len(text) + separator_bytes
            if separator_bytes and document:
                yield document.finish()
                document, number = None, number + 1
        if document:
            yield document.finish()
    except Unusable as e:
        yield Skipped(f"{source.name}#{number}", e.reason, e.detail)


def _blocks(source: Source, advance: Callable[[int], None]) -> Iterator[bytes]:
    return source.blocks(first=min(source.size, MAX_HELD_BYTES) + 4, advance=advance)


class _Growing:
    """A document of a text file as its bytes come: held up to MAX_HELD_BYTES, above that only hashed and checked."""

    def __init__(self, source: Source, name: str, start: int) -> None:
        self.name, self.bytes = name, 0
        # (reason, detail), not the exception: that would keep the frames that raised it alive.
        self.unusable: tuple[str, str] | None = None
        self._source, self._start = source, start
        self._held: list[bytes] = []
        self._digest = hashlib.sha256()
        self._utf8 = Utf8(start)

    def add(self, block: bytes) -> None:
        self.bytes += len(block)
        self._held.append(block)
        if self.bytes > MAX_HELD_BYTES:
            self._let_go()

    def finish(self) -> Item:
        if self.bytes > MAX_HELD_BYTES:
            self._let_go(final=True)
            if not self.unusable:
                digest = self._digest.hexdigest()
                return LongDocument(self._source, self.name, self._start, self.bytes, digest)
        elif text := self._decoded(final=True):
            return Document(self.name, text)
        return Skipped(self.name, *(self.unusable or ("empty", "no characters")))

    def _let_go(self, final: bool = False) -> None:
        for block in self._held:
            self._digest.update(block)
        self._decoded(final)
        self._held.clear()

    def _decoded(self, final: bool) -> str:
        if self.unusable:
            return ""
        try:
            return self._utf8.text(b"".join(self._held), final)
        except Unusable as e:
            self.unusable = e.reason, e.detail
            return ""


def _whole(source: Source, blocks: Iterator[bytes]) -> Item:
    """Read a text file as one document."""
    try:
        head = next(blocks, b"")
        start = mark_length(head)
        document = _Growing(source, source.name, start)
        document.add(head[start:])
        for block in blocks:
            document.add(block)
            if document.unusable:
                break
        return document.finish()
    except Unusable as e:
        return Skipped(source.name, e.reason, e.detail)


def _at_lines(blocks: Iterable[bytes], separator: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield (bytes, length of the separator line behind them, or 0 where there is none yet)."""
    rest, within_line = b"", False
    for block in blocks:
        rest += block
        # The rest of a line that is longer than the separator.
        if within_line:
            end = rest.find(b"\n") + 1
            if end:
                yield rest[:end], 0
                rest, within_line = rest[end:], False
            else:
                yield rest, 0
                rest = b""
                continue
        end = rest.rfind(b"\n") + 1
        yield from _split_lines(rest[:end], separator)
        rest = rest[end:]
        if len(rest) > len(separator) + len(b"\r"):
            yield rest, 0
            rest, within_line = b"", True
    yield from _split_lines(rest, separator)


def _split_lines(lines: bytes, separator: bytes) -> Iterator[tuple[bytes, int]]:
    start = at = 0
    while (at := lines.find(separator, at)) >= 0:
        end = at + len(separator)
        line_end = next((e for e in (b"\n", b"\r\n") if lines.startswith(e, end)), b"")
        if (not at or lines[at - 1] == 10) and (line_end or end == len(lines)):
            yield lines[start:at], len(separator) + len(line_end)
            start = end + len(line_end)
        at = end + len(line_end)
    yield lines[start:], 0


def _pieces(source: Source, whole: Document | LongDocument, limit: int) -> Iterator[Item]:
    """Cut a text into documents of about `limit` bytes, at blank lines, or lines where there is none.

    A paragraph stays whole; joined, the documents are the text. Raises MalformedFile as chunks()."""
    # Only a piece that becomes a LongDocument needs its offset, and only a LongDocument has such pieces.
    start = whole.start if isinstance(whole, LongDocument) else 0
    number = 0
    piece = _Growing(source, f"{source.name}#0", start)
    # Of the paragraph at hand, as long as it is open which piece it belongs to.
    paragraph: list[bytes] = []
    size, decided = 0, False
    for text, ended in _paragraphs(whole.chunks(), _has_blank_line(whole.chunks())):
        data = text.encode()
        paragraph.append(data)
        size += len(data)
        if not decided and (ended or piece.bytes + size > limit):
            if piece.bytes and piece.bytes + size > limit:
                yield piece.finish()
                number, start = number + 1, start + piece.bytes
                piece = _Growing(source, f"{source.name}#{number}", start)
            decided = True
        if decided:
            piece.add(b"".join(paragraph))
            paragraph, size, decided = [], 0, not ended
    yield piece.finish()


def _has_blank_line(chunks: Iterator[str]) -> bool:
    edge = ""
    for chunk in chunks:
        if _BLANK_LINE.search(edge + chunk[:2]) or _BLANK_LINE.search(chunk):
            return True
        edge = (edge + chunk)[-2:]
    return False


def _paragraphs(chunks: Iterator[str], blank_lines: bool) -> Iterator[tuple[str, bool]]:
    """Yield (stretch of a text, True where its paragraph, or line, ends with it)."""
    # The next characters decide if a paragraph ends before, within or behind the last two.
    edge = ""
    for chunk in chunks:
        text = edge + chunk
        *ended, last = _BLANK_LINE.split(text) if blank_lines else text.splitlines(keepends=True)
        for paragraph in ended:
            yield paragraph, True
        edge = last[-2:]
        yield last[:-2], False
    yield edge, True
