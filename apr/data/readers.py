"""The documents of a corpus, one after the other, in bounded memory; what cannot be used is named."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NoReturn

from ..common.errors import MalformedFile, UsageError
from .corpus import Document
from .sources import Skipped, Source, Sources, Unusable

LONG = 4 << 20  # bytes of UTF-8; a text document above this is not held
MAX_RECORD = (
    64 << 20
)  # bytes of a JSONL line; a longer one is skipped (as text of 4 bytes a character it takes 9 times that)
MAX_VALUES = (
    8 << 20
)  # bytes of a line outside its strings: each number or list takes up to 30 times its length when it is parsed
BATCH_ROWS = 256  # rows of a Parquet file that are held at once, fewer where they are long:
BATCH_BYTES = 16 << 20
SHOWN = 10  # keys or columns that a message lists

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"')
_BLANK_LINE = re.compile(r"(?<=\n)(?=\r?\n)")


class LongDocument:
    """A text of more than LONG bytes of UTF-8, which lies in its file and is not held.

    sha256: of the content, hexadecimal; bytes: its length in UTF-8. Both were found by a first pass, which also
    found that the content is UTF-8 without NUL."""

    def __init__(self, source: Source, name: str, start: int, size: int, sha256: str) -> None:
        self.name, self.sha256, self.bytes = name, sha256, size
        self._source, self._start = source, start
        self._on_disk = _on_disk(source)

    def chunks(self) -> Iterator[str]:
        """The text, in chunks of about 1 MiB that end anywhere between two characters.

        Raises MalformedFile: the file is not what it was in the first pass."""
        if _on_disk(self._source) != self._on_disk:
            self._changed("its size or time of change differs")
        left, digest, utf8 = self.bytes, hashlib.sha256(), Utf8(self._start)
        try:
            for block in self._source.blocks(self._start):
                part = block[:left] if left < len(block) else block
                left -= len(part)
                digest.update(part)
                if text := utf8.text(part):
                    yield text
                if not left:
                    break
        except Unusable as e:
            self._changed(f"{e.reason}: {e.detail}")
        if digest.hexdigest() != self.sha256:
            self._changed("its content differs")

    def _changed(self, how: str) -> NoReturn:
        raise MalformedFile(
            f"{self._source.path}: changed while it was read ({self.name}: {how}); start again when nobody writes it"
        )


Item = Document | LongDocument | Skipped


class Corpus:
    """Documents of files, in their order; every iteration starts with the first.

    Names: FILE for a text file, FILE#NUMBER from 0 for a part of one, FILE:LINE from 1 for JSONL and FILE:ROW from 1 for
    Parquet. A file that gives nothing else gives a Skipped; what find_sources could not read comes first.
    content_field: key of the text in a record, with dots for keys within keys ("message.content").
    separator: lines of text files that are exactly this end a document and belong to none. piece_bytes: longer text files
    are cut at blank lines, or lines where there is none, into documents of about this many bytes of UTF-8.
    bytes_read and total_bytes count bytes on disk, of the latest iteration; separators the documents behind the first of a file.

    A text file is used as a whole or not at all; of separated documents, lines and rows each one for itself. In a damaged
    archive those before the damage are used, as far as it shows: gzip and bzip2 tell some damage only by a
    checksum further behind.
    Raises UsageError: settings without sense, Parquet without pyarrow."""

    def __init__(
        self,
        sources: Sequence[Source],
        content_field: str = "text",
        piece_bytes: int | None = None,
        separator: str | None = None,
    ) -> None:
        self._keys = content_field.split(".")
        if not all(self._keys):
            raise UsageError(
                f"content field {content_field!r}: a key is empty; write text, or message.content"
            )
        if separator is not None and (not separator or {*separator} & {*"\n\r"}):
            raise UsageError(f"separator {separator!r}: must be one line, without its end, that is not empty")
        if piece_bytes is not None and not 1 <= piece_bytes <= LONG:
            raise UsageError(f"piece bytes {piece_bytes}: must be 1 to {LONG}")
        if piece_bytes is not None and separator is not None:
            raise UsageError("a separator and piece bytes say two ways to cut a text file; give one of them")
        self.sources = sources
        self.total_bytes = sum(source.size for source in sources)
        self._separator = separator.encode("utf-8", "surrogateescape") if separator is not None else None
        self._piece_bytes = piece_bytes
        # Numbers are not looked at: as floats they may have any number of digits.
        self._json = json.JSONDecoder(parse_int=float)
        self._done = self._now = self.separators = 0
        if any(source.kind == "parquet" for source in sources):
            _pyarrow()

    def __str__(self) -> str:
        if not self.sources:
            return "no files"
        more = len(self.sources) - 1
        return self.sources[0].name + (f" and {more} more" if more else "")

    @property
    def bytes_read(self) -> int:
        """Bytes on disk that this iteration has consumed."""
        return self._done + self._now

    def __iter__(self) -> Iterator[Item]:
        self._done = self._now = self.separators = 0
        if isinstance(self.sources, Sources):
            yield from self.sources.skipped
        kinds = {"text": self._text, "jsonl": self._jsonl, "parquet": self._parquet}
        for source in self.sources:
            size, nothing = source.size, True

            def advance(at: int, size: int = size) -> None:  # a file may have grown since it was listed
                self._now = max(self._now, min(at, size))

            for item in kinds[source.kind](source, advance):
                nothing = False
                yield item
            if nothing:
                yield Skipped(source.name, "empty", f"{size} bytes on disk without a document")
            self._done, self._now = self._done + size, 0

    def _text(self, source: Source, advance: Callable[[int], None]) -> Iterator[Item]:
        blocks = source.blocks(first=min(source.size, LONG) + 4, advance=advance)
        if self._separator is not None:
            return self._counted(_separated(source, blocks, self._separator))
        whole = _whole(source, blocks)
        limit = self._piece_bytes
        if limit is None or isinstance(whole, Skipped):
            return iter([whole])
        if isinstance(whole, Document) and len(whole.data) <= limit:
            return iter([whole])
        return _pieces(source, whole, limit)

    def _counted(self, items: Iterator[Item]) -> Iterator[Item]:
        """Documents of a file with separators; all but the first ended one."""
        for number, item in enumerate(items):
            self.separators += number > 0
            yield item

    def _jsonl(self, source: Source, advance: Callable[[int], None]) -> Iterator[Item]:
        number = 0
        try:
            for line in _lines(_without_mark(source.blocks(advance=advance))):
                number += 1
                if line is None:
                    detail = f"more than {MAX_RECORD} bytes in one line; is it JSON Lines?"
                    yield Skipped(f"{source.name}:{number}", "too long", detail)
                elif line and not line.isspace():
                    yield self._record(f"{source.name}:{number}", line)
        except Unusable as e:
            yield Skipped(f"{source.name}:{number + 1}", e.reason, e.detail)

    def _record(self, name: str, line: bytes) -> Item:
        if len(line) > MAX_VALUES and (outside := len(_STRING.sub(b"", line))) > MAX_VALUES:
            return Skipped(name, "too long", f"{outside} bytes of it are not text, more than {MAX_VALUES}")
        try:
            value = self._json.decode(line.decode())
        except UnicodeDecodeError as e:
            return Skipped(name, "not UTF-8", _bad_byte(e, e.start))
        except json.JSONDecodeError as e:
            return Skipped(name, "broken JSON", f"{e.msg} at character {e.pos} of the line")
        except RecursionError:
            return Skipped(name, "broken JSON", "nested too deeply")
        for depth, key in enumerate(self._keys):
            if not isinstance(value, dict):
                where = ".".join(self._keys[:depth])
                reason, what = ("not an object", "the record") if not depth else ("no field", where)
                return Skipped(name, reason, f"{what} is {_json_type(value)}, not an object")
            if key not in value:
                missing = ".".join(self._keys[: depth + 1])
                there = (
                    f"no {missing!r}; there is {_listed(value)}; say with --content-field which is the text"
                )
                return Skipped(name, "no field", there)
            value = value[key]
        if not isinstance(value, str):
            return Skipped(name, "not a string", f"{'.'.join(self._keys)} is {_json_type(value)}")
        if not value:
            return Skipped(name, "empty", f"{'.'.join(self._keys)} has no characters")
        if b"\\u" in line:  # the one way to write half a pair of surrogates in UTF-8
            try:
                value.encode()
            except UnicodeEncodeError as e:
                return Skipped(
                    name, "not Unicode", f"half a surrogate pair at character {e.start} of the text"
                )
        return Document(name, value)

    def _parquet(self, source: Source, advance: Callable[[int], None]) -> Iterator[Item]:
        pa, pq, _ = _pyarrow()
        row = 0  # the last one done
        try:
            with pq.ParquetFile(
                source.path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
            ) as file:
                _check_column(file.schema_arrow, self._keys)
                total = 0
                for group in range(file.num_row_groups):
                    total += file.metadata.row_group(group).num_rows
                    try:
                        for values in _row_batches(file, group, self._keys):
                            for value in values:
                                row += 1
                                yield _cell(f"{source.name}:{row}", value, self._keys)
                            advance(source.size * row // max(1, file.metadata.num_rows))
                        if row != total:
                            raise pa.ArrowInvalid("fewer rows than the footer says")
                    except _damages(pa) as e:
                        detail = f"rows {row + 1} to {total} are lost: {_first_line(e)}"
                        yield Skipped(f"{source.name}:{row + 1}", "corrupt archive", detail)
                        row = total
        except Unusable as e:
            yield Skipped(source.name, e.reason, e.detail)
        except _damages(pa) as e:
            reason = "unreadable" if isinstance(e, OSError) and e.errno else "corrupt archive"
            yield Skipped(source.name, reason, _first_line(e))


class Utf8:
    """Decodes UTF-8 that comes in blocks; at: offset in the file of the first byte that is not decoded, for messages."""

    def __init__(self, at: int) -> None:
        self.at, self._rest = at, b""

    def text(self, block: bytes, final: bool = False) -> str:
        """Text up to the last whole character. Raises Unusable: not UTF-8, NUL bytes."""
        data = self._rest + block
        if (nul := data.find(0)) >= 0:
            raise Unusable(
                "NUL bytes",
                f"the first at byte {self.at + nul}: binary data, or an archive of files, which must be unpacked",
            )
        try:
            text, used = codecs.utf_8_decode(data, "strict", final)
        except UnicodeDecodeError as e:
            raise Unusable("not UTF-8", _bad_byte(e, self.at + e.start)) from None
        self.at += used
        self._rest = data[used:]
        return text


class _Growing:
    """One document of a text file as its bytes come: held up to LONG bytes, above that only hashed and checked."""

    def __init__(self, source: Source, name: str, start: int) -> None:
        self.name, self.bytes = name, 0
        self.unusable: tuple[str, str] | None = (
            None  # reason and detail: an error would keep what raised it alive
        )
        self._source, self._start = source, start
        self._held: list[bytes] = []
        self._digest = hashlib.sha256()
        self._utf8 = Utf8(start)

    def add(self, block: bytes) -> None:
        self.bytes += len(block)
        self._held.append(block)
        if self.bytes > LONG:
            self._let_go()

    def finish(self) -> Item:
        if self.bytes > LONG:
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
    """A text file as one document."""
    try:
        head = next(blocks, b"")
        start = _mark(head)
        document = _Growing(source, source.name, start)
        document.add(head[start:])
        for block in blocks:
            document.add(block)
            if document.unusable:
                break
        return document.finish()
    except Unusable as e:
        return Skipped(source.name, e.reason, e.detail)


def _separated(source: Source, blocks: Iterator[bytes], separator: bytes) -> Iterator[Item]:
    """The documents of a text file between separator lines; two of these with nothing between them hold none."""
    at = number = 0
    document = None
    try:
        head = next(blocks, b"")
        at = _mark(head)
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


def _at_lines(blocks: Iterable[bytes], separator: bytes) -> Iterator[tuple[bytes, int]]:
    """(bytes, bytes of the separator line behind them, or 0 where there is none yet)."""
    held, within_line = b"", False
    for block in blocks:
        held += block
        if within_line:  # a line that is longer than the separator: what is left of it
            end = held.find(b"\n") + 1
            if end:
                yield held[:end], 0
                held, within_line = held[end:], False
            else:
                yield held, 0
                held = b""
                continue
        end = held.rfind(b"\n") + 1
        yield from _split_lines(held[:end], separator)
        held = held[end:]
        if len(held) > len(separator) + len(b"\r"):
            yield held, 0
            held, within_line = b"", True
    yield from _split_lines(held, separator)


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
    """A text in documents of about `limit` bytes, cut at blank lines, or lines where there is none; a paragraph stays
    whole. Joined, they are the text. Raises MalformedFile as chunks()."""
    start = whole._start if isinstance(whole, LongDocument) else 0  # which only a LongDocument asks for

    def chunks() -> Iterator[str]:
        return whole.chunks() if isinstance(whole, LongDocument) else iter([whole.text])

    number = 0
    piece = _Growing(source, f"{source.name}#0", start)
    held: list[bytes] = []  # of the paragraph at hand, as long as it is open which piece it belongs to
    size, decided = 0, False
    for text, ended in _paragraphs(chunks(), _has_blank_line(chunks())):
        data = text.encode()
        held.append(data)
        size += len(data)
        if not decided and (ended or piece.bytes + size > limit):
            if piece.bytes and piece.bytes + size > limit:
                yield piece.finish()
                number, start = number + 1, start + piece.bytes
                piece = _Growing(source, f"{source.name}#{number}", start)
            decided = True
        if decided:
            piece.add(b"".join(held))
            held, size, decided = [], 0, not ended
    yield piece.finish()


def _has_blank_line(chunks: Iterator[str]) -> bool:
    edge = ""
    for chunk in chunks:
        if _BLANK_LINE.search(edge + chunk[:2]) or _BLANK_LINE.search(chunk):
            return True
        edge = (edge + chunk)[-2:]
    return False


def _paragraphs(chunks: Iterator[str], blank_lines: bool) -> Iterator[tuple[str, bool]]:
    """(stretch of a text, whether its paragraph, or line, ends with it)."""
    edge = ""  # whether a paragraph ends before, within or behind two characters shows in what follows them
    for chunk in chunks:
        text = edge + chunk
        *ended, last = _BLANK_LINE.split(text) if blank_lines else text.splitlines(keepends=True)
        for paragraph in ended:
            yield paragraph, True
        edge = last[-2:]
        yield last[:-2], False
    yield edge, True


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes | None]:
    """Lines without their ends; None for one of more than MAX_RECORD bytes, which is not held."""
    held: list[bytes] = []
    size = 0
    for block in blocks:
        first, *others = block.split(b"\n")
        size += len(first)
        held.append(first)
        if size > MAX_RECORD:
            held.clear()
        if others:
            yield None if size > MAX_RECORD else b"".join(held)
            yield from others[:-1]
            held, size = others[-1:], len(others[-1])
    if size:
        yield None if size > MAX_RECORD else b"".join(held)


def _mark(head: bytes) -> int:
    """Length of the byte order mark. Raises Unusable: it says UTF-16 or UTF-32."""
    if head.startswith(codecs.BOM_UTF8):
        return len(codecs.BOM_UTF8)
    for mark, encoding in BYTE_ORDER_MARKS:
        if head.startswith(mark):
            detail = f"{encoding} by its byte order mark; convert it with iconv -f {encoding} -t UTF-8"
            raise Unusable("not UTF-8", detail)
    return 0


def _without_mark(blocks: Iterator[bytes]) -> Iterator[bytes]:
    head = next(blocks, b"")
    yield head[_mark(head) :]
    yield from blocks


def _bad_byte(error: UnicodeDecodeError, at: int) -> str:
    return f"byte {at} (0x{error.object[error.start]:02x}): {error.reason}"


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", float: "a number"}
    return names.get(type(value), "null")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(repr(name)[:40] for name in names[:SHOWN])
    return (shown or "no key") + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _on_disk(source: Source) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns; -1 where the file is gone."""
    try:
        status = os.stat(source.path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _pyarrow() -> Any:
    """The modules (pyarrow, pyarrow.parquet, pyarrow.compute). Raises UsageError."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as e:
        raise UsageError(f"reading Parquet needs pyarrow ({e}): pip install 'apr[parquet]'") from None
    return pyarrow, pyarrow.parquet, pyarrow.compute


def _damages(pa: Any) -> tuple[type[BaseException], ...]:
    """What pyarrow raises at a damaged file; MemoryError for a length that is no length."""
    return (pa.ArrowException, OSError, ValueError, MemoryError)


def _check_column(schema: Any, keys: Sequence[str]) -> None:
    """Raises Unusable: the file has no such column, or it is no text."""
    pa = _pyarrow()[0]
    fields: Any = schema
    kind: Any = None
    for depth, key in enumerate(keys):
        name = ".".join(keys[: depth + 1])
        if kind is not None and not pa.types.is_struct(kind):
            raise Unusable("no field", f"no column {name}; {'.'.join(keys[:depth])} is {kind}, not a struct")
        names = [field.name for field in fields]
        if names.count(key) != 1:
            raise Unusable("no field", f"{names.count(key) or 'no'} column {name}; there is {_listed(names)}")
        kind = fields.field(key).type
        fields = kind
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(text) or pa.types.is_large_string(text) or pa.types.is_string_view(text)):
        raise Unusable("not a string", f"column {'.'.join(keys)} is {kind}")


def _row_batches(file: Any, group: int, keys: Sequence[str]) -> Iterator[list[bytes | None]]:
    """The column's values in a row group, as bytes: pyarrow does not check that a string is UTF-8."""
    pa, _, compute = _pyarrow()
    meta = file.metadata.row_group(group)
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES * meta.num_rows // max(1, meta.total_byte_size)))
    for batch in file.iter_batches(rows, row_groups=[group], columns=[keys[0]], use_threads=False):
        column = batch.column(0)
        for key in keys[1:]:
            column = compute.struct_field(column, key)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        yield column.cast(pa.large_binary()).to_pylist()


def _cell(name: str, value: bytes | None, keys: Sequence[str]) -> Item:
    if value is None:
        return Skipped(name, "not a string", f"{'.'.join(keys)} is null")
    try:
        text = value.decode()
    except UnicodeDecodeError as e:
        return Skipped(name, "not UTF-8", _bad_byte(e, e.start))
    return Document(name, text) if text else Skipped(name, "empty", f"{'.'.join(keys)} has no characters")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
