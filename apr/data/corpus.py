"""The documents of a corpus, one after the other, in bounded memory; unusable data is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from ..common.errors import UsageError
from ..common.units import plural
from .documents import MAX_HELD_BYTES, Item
from .find import Sources
from .json_records import read_json_records
from .jsonl import text_record
from .parquet import pyarrow_modules, read_parquet
from .source import Skipped, Source
from .text import read_separated, read_text


class Corpus:
    """Documents of files, in their order; every iteration starts with the first.

    content_field  key of the text in a record, with dots for keys within keys ("message.content")
    separator      lines of text files that are exactly this end a document and belong to none
    piece_bytes    longer text files are cut at blank lines, or lines where there is none, into documents of about this
                   many bytes of UTF-8
    bytes_read, total_bytes  bytes on disk, of the latest iteration
    separators     documents behind the first of a file, of the latest iteration

    Names: FILE for a text file, FILE#NUMBER from 0 for a part of one, FILE:LINE from 1 for JSONL, and from 1 too FILE:NUMBER
    for an array of JSON and FILE:ROW for Parquet. A file that gives nothing else gives a Skipped; files that find_sources could
    not read come first.

    A text file is used as a whole or not at all; of separated documents, lines and rows each one for itself. In a damaged
    archive those before the damage are used, as far as it shows: gzip and bzip2 tell some damage only by a
    checksum further behind.
    Raises UsageError: arguments out of range, Parquet without pyarrow."""

    def __init__(
        self,
        sources: Sequence[Source],
        content_field: str = "text",
        piece_bytes: int | None = None,
        separator: str | None = None,
    ) -> None:
        self.keys = content_field.split(".")
        if not all(self.keys):
            raise UsageError(
                f"content field {content_field!r}: a key is empty; write text, or message.content"
            )
        if separator is not None and (not separator or {*separator} & {*"\n\r"}):
            raise UsageError(f"separator {separator!r}: must be one line, without its end, that is not empty")
        if piece_bytes is not None and not 1 <= piece_bytes <= MAX_HELD_BYTES:
            raise UsageError(f"piece bytes {piece_bytes}: must be 1 to {MAX_HELD_BYTES}")
        if piece_bytes is not None and separator is not None:
            raise UsageError("a separator and piece bytes say two ways to cut a text file; give one of them")
        self.sources = sources
        self.total_bytes = sum(source.size for source in sources)
        self._separator = separator.encode("utf-8", "surrogateescape") if separator is not None else None
        self.piece_bytes = piece_bytes
        self._done = self._now = self.separators = 0
        if any(source.kind == "parquet" for source in sources):
            pyarrow_modules()

    def __str__(self) -> str:
        if not self.sources:
            return "no files"
        more = len(self.sources) - 1
        return self.sources[0].name + (f" and {more} more" if more else "")

    @property
    def bytes_read(self) -> int:
        """Bytes on disk that the latest iteration has consumed."""
        return self._done + self._now

    def __iter__(self) -> Iterator[Item]:
        self._done = self._now = self.separators = 0
        if isinstance(self.sources, Sources):
            yield from self.sources.skipped
        for source in self.sources:
            size, is_empty = source.size, True

            # A file may have grown since it was listed.
            def advance(at: int, size: int = size) -> None:
                self._now = max(self._now, min(at, size))

            for item in self._read(source, advance):
                is_empty = False
                yield item
            if is_empty:
                yield Skipped(source.name, "empty", f"{plural(size, 'byte')} on disk without a document")
            self._done, self._now = self._done + size, 0

    def _read(self, source: Source, advance: Callable[[int], None]) -> Iterator[Item]:
        if source.kind in ("json", "jsonl"):
            return read_json_records(source, partial(text_record, keys=self.keys), advance)
        if source.kind == "parquet":
            return read_parquet(source, self.keys, advance)
        if self._separator is None:
            return read_text(source, self.piece_bytes, advance)
        return self._counted(read_separated(source, self._separator, advance))

    def _counted(self, items: Iterator[Item]) -> Iterator[Item]:
        """Count the separators of a file: each document but the first ended one."""
        for number, item in enumerate(items):
            self.separators += number > 0
            yield item
