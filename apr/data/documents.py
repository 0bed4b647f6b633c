"""Documents of a corpus, and the side of the split that each is on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

from ..common.errors import MalformedFile
from .source import Skipped, Source, Unusable
from .utf8 import Utf8

# Bytes of UTF-8; a text document above this stays in its file.
MAX_HELD_BYTES = 4 << 20


@dataclass(frozen=True)
class Document:
    """One text with the name it is reported under."""

    name: str
    text: str

    @property
    def data(self) -> bytes:
        """The text as UTF-8."""
        return self.text.encode()

    @cached_property
    def sha256(self) -> str:
        """Identity of the content, hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def num_bytes(self) -> int:
        """Length in UTF-8."""
        return len(self.data)

    def chunks(self) -> Iterator[str]:
        """Yield the text, in one chunk."""
        yield self.text


class LongDocument:
    """A text of more than MAX_HELD_BYTES of UTF-8, which stays in its file from byte `start` on.

    sha256     of the content, hexadecimal
    num_bytes  length in UTF-8

    Both come from a first pass, which also found that the content is UTF-8 without NUL."""

    def __init__(self, source: Source, name: str, start: int, size: int, sha256: str) -> None:
        self.name, self.sha256, self.num_bytes = name, sha256, size
        self._source, self.start = source, start
        self._on_disk = _on_disk(source)

    def chunks(self) -> Iterator[str]:
        """Yield the text, in chunks of about 1 MiB that end anywhere between two characters.

        Raises MalformedFile for a file that changed since the first pass."""
        if _on_disk(self._source) != self._on_disk:
            self._changed("its size or time of change differs")
        left, digest, utf8 = self.num_bytes, hashlib.sha256(), Utf8(self.start)
        try:
            for block in self._source.blocks(self.start):
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


def is_held_out(sha256: str, fraction: float) -> bool:
    """Choose about `fraction` of all documents, by the document's content hash alone.

    So a document lies on one side of the split whatever else the corpus holds, and its copies lie on the same side."""
    return int(sha256[:16], 16) < fraction * 2.0**64


@dataclass(frozen=True)
class Sides:
    """A rule for the side of each document of one corpus: held out by its hash (see is_held_out), `moved` on the other side.

    A corpus of a few documents may leave a side without any by chance; the document whose hash is nearest to that side is
    then moved there. So a larger corpus is divided by hash alone, and a small one has two sides from two documents on."""

    fraction: float
    moved: str = ""

    @classmethod
    def of(cls, hashes: Iterable[str], fraction: float) -> Sides:
        """Find the rule for these content hashes; reads no further than to one of each side."""
        low = high = ""
        for sha256 in hashes:
            low, high = min(low or sha256, sha256), max(high, sha256)
            if is_held_out(low, fraction) and not is_held_out(high, fraction):
                return cls(fraction)
        if low == high:
            return cls(fraction)
        return cls(fraction, high if is_held_out(low, fraction) else low)

    def hold_out(self, sha256: str) -> bool:
        """True for a document of the validation side."""
        return is_held_out(sha256, self.fraction) != (sha256 == self.moved)


def hashes_of(items: Iterable[Item]) -> Iterator[str]:
    """Yield the content hash of each document among items of a corpus."""
    return (item.sha256 for item in items if not isinstance(item, Skipped))


def _on_disk(source: Source) -> tuple[int, int]:
    """Read (size in bytes, time of the last change in ns) of a file; (-1, -1) where it is gone."""
    try:
        status = os.stat(source.path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns
