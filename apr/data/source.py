"""One file of a corpus: its bytes, unpacked in bounded memory."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ..common.errors import AprError
from ..common.files import opened

Kind = Literal["text", "json", "jsonl", "parquet"]
Compression = Literal["", "gz", "zst", "xz", "bz2"]

# Bytes that are unpacked, or read from a file that is not packed, at once.
BLOCK_BYTES = 1 << 20
# Bytes of an archive that are read at once.
PACKED_BYTES = 1 << 17
# A decoder of zstandard returns all that its input gives, and 4 bytes can give 128 KiB: here 32 MiB at most.
ZST_PACKED_BYTES = 1 << 10
# xz -9 needs a quarter of this, an archive may ask for 4 GiB.
MAX_XZ_MEMORY_BYTES = 1 << 28


@dataclass(frozen=True)
class Skipped:
    """A file that cannot be used, or FILE:LINE, FILE:ROW or FILE#NUMBER in it; documents are counted by reason."""

    name: str
    reason: str
    detail: str


class Unusable(Exception):
    """Raised for data that cannot be used; the reader turns it into a Skipped with the name of the data."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Source:
    """A file of `size` bytes on disk. The name is printable, whatever bytes the path has."""

    path: Path
    name: str
    kind: Kind
    compression: Compression
    size: int

    def blocks(
        self, start: int = 0, first: int = BLOCK_BYTES, advance: Callable[[int], None] | None = None
    ) -> Iterator[bytes]:
        """Yield the unpacked bytes from offset `start` on, in blocks of BLOCK_BYTES or somewhat more; the last may be shorter.

        first: size of the first block of a file that is not packed. advance(n): n bytes of the file on disk are read.
        Raises Unusable behind the last readable byte: unreadable, truncated archive, corrupt archive."""
        if self.compression:
            return _grouped(_from(start, self._unpacked(advance)))
        return self._raw(BLOCK_BYTES, start, first, advance)

    def _raw(
        self,
        step: int,
        start: int,
        first: int,
        advance: Callable[[int], None] | None,
        single_from: int | None = None,
    ) -> Iterator[bytes]:
        """Yield the bytes on disk, `step` at a time, but one by one from the block that begins at single_from."""
        try:
            with opened(self.path) as (f, _):
                if start:
                    f.seek(start)
                at, size = start, first
                while block := f.read(size):
                    if single_from is not None and at >= single_from:
                        yield from (block[i : i + 1] for i in range(len(block)))
                    else:
                        yield block
                    at += len(block)
                    if advance:
                        advance(at)
                    if len(block) < size:
                        return
                    size = step
        except AprError as e:
            raise Unusable("unreadable", getattr(e.__cause__, "strerror", None) or str(e)) from None

    def _unpacked(self, advance: Callable[[int], None] | None) -> Iterator[bytes]:
        """Yield the content of the archive. Raises Unusable behind the last byte that can be unpacked."""
        new: Callable[[], _Decoder] = _DECODERS[self.compression]
        step = ZST_PACKED_BYTES if self.compression == "zst" else PACKED_BYTES
        at = done = 0

        def moved(n: int) -> None:
            nonlocal at
            at = n
            if advance:
                advance(n)

        try:
            for block in _unpack(self._raw(step, 0, step, moved), new):
                yield block
                done += len(block)
        except Unusable as e:
            if e.reason != "corrupt archive":
                raise
            # A call of a decoder that fails keeps what it had unpacked before: give it the same bytes one by one.
            yield from _from(done, _unpack(self._raw(step, 0, step, None, single_from=at), new))


class _Decoder(Protocol):
    """Interface of the decoders of bz2 and lzma; the adapters below give it to zlib and zstandard."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Gzip:
    def __init__(self) -> None:
        self._z = zlib.decompressobj(31)

    needs_input = property(lambda self: not self._z.unconsumed_tail)
    eof = property(lambda self: self._z.eof)
    unused_data = property(lambda self: self._z.unused_data)

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return self._z.decompress(self._z.unconsumed_tail + data, max_length)


class _Zstandard:
    needs_input = True

    def __init__(self) -> None:
        # Imported here: only a reader of such files needs the package.
        import zstandard

        self._z, self._error = zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError

    eof = property(lambda self: self._z.eof)
    unused_data = property(lambda self: self._z.unused_data)

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        try:
            # The output is bounded by ZST_PACKED_BYTES of input, not by max_length.
            return self._z.decompress(data)
        except self._error as e:
            raise ValueError(str(e)) from None


_DECODERS: dict[str, Callable[[], _Decoder]] = {
    "gz": _Gzip,
    "zst": _Zstandard,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, MAX_XZ_MEMORY_BYTES),
    "bz2": bz2.BZ2Decompressor,
}


def _unpack(blocks: Iterator[bytes], new: Callable[[], _Decoder]) -> Iterator[bytes]:
    """Yield all members, frames or streams of an archive, one after the other; zeros behind one are padding."""
    decoder, members = None, 0
    for data in blocks:
        out = b""
        # A decoder that has all its input may still hold output, if it gave as much as it was asked for.
        while data or (decoder and (not decoder.needs_input or len(out) >= BLOCK_BYTES)):
            if decoder is None:
                data = data.lstrip(b"\0") if members else data
                if not data:
                    break
                decoder, members = new(), members + 1
            try:
                out = decoder.decompress(data, BLOCK_BYTES)
            except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as e:
                raise Unusable("corrupt archive", _damage(e)) from None
            if out:
                yield out
            data = b""
            if decoder.eof:
                data, decoder = decoder.unused_data, None
    if decoder is not None:
        raise Unusable("truncated archive", "the file ends within the archive")


def _damage(error: Exception) -> str:
    text = str(error)
    if "too much memory" in text:
        return f"{text}; unpack it with zstd -d --long=31 and pack it with a smaller window"
    if "emory usage limit" in text:
        return f"{text}: more than {MAX_XZ_MEMORY_BYTES >> 20} MiB; unpack it and pack it with a smaller dictionary"
    return text


def _from(start: int, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the bytes from offset start on."""
    for block in blocks:
        if start < len(block):
            yield block[start:] if start else block
        start = max(0, start - len(block))


def _grouped(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Join blocks to at least BLOCK_BYTES; the rest comes last, before an error."""
    parts: list[bytes] = []
    size = 0
    # Not the exception itself, which would keep the file open in a reference cycle.
    damage: tuple[str, str] | None = None
    try:
        for block in blocks:
            parts.append(block)
            size += len(block)
            if size >= BLOCK_BYTES:
                yield b"".join(parts)
                parts, size = [], 0
    except Unusable as e:
        damage = e.reason, e.detail
    if parts:
        yield b"".join(parts)
    if damage:
        raise Unusable(*damage)
