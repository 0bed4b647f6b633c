"""CRC-32 of what is written and read, by threads where there is much of it."""

from __future__ import annotations

import os
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

from ..common.host import cores

PART_BYTES, PIECE_BYTES = 64 << 20, 1 << 20  # that a thread reads, and that it holds at a time
MAX_READERS = 16  # threads
MAX_WAITING = 8  # pieces that are written and not in the checksum yet


def crc_of(f: BinaryIO, nbytes: int) -> int:
    """CRC-32 of the first bytes of an open file, wherever it is being read. Raises EOFError where it has fewer."""
    parts = [(at, min(at + PART_BYTES, nbytes)) for at in range(0, nbytes, PART_BYTES)]
    if len(parts) < 2:
        return _crc_of_part(f, 0, nbytes)
    with ThreadPoolExecutor(min(cores(), MAX_READERS)) as pool:
        crcs = pool.map(lambda part: _crc_of_part(f, *part), parts)
        crc = 0
        for (first, last), of_part in zip(parts, crcs, strict=True):
            crc = joined_crc(crc, of_part, last - first)
    return crc


def _crc_of_part(f: BinaryIO, at: int, end: int) -> int:
    crc = 0
    while at < end:
        piece = os.pread(f.fileno(), min(PIECE_BYTES, end - at), at)
        if not piece:
            raise EOFError
        crc = zlib.crc32(piece, crc)
        at += len(piece)
    return crc


class Checksum:
    """CRC-32 of the pieces of nbytes, of many by a thread beside the one that writes them."""

    def __init__(self, nbytes: int) -> None:
        self._crc, self._waiting = 0, deque[Future[None]]()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checksum") if nbytes > PART_BYTES else None

    def __enter__(self) -> Checksum:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def add(self, piece: bytes | bytearray | memoryview) -> None:
        """Go on with a piece, which stays as it is."""
        if len(self._waiting) == MAX_WAITING:
            self._waiting.popleft().result()
        try:
            if self._pool is not None:
                self._waiting.append(self._pool.submit(self._go_on, piece))
                return
        except RuntimeError:
            # The system gives no thread, or the interpreter ends.
            self.value()
            self._pool = None
        self._go_on(piece)

    def _go_on(self, piece: bytes | bytearray | memoryview) -> None:
        self._crc = zlib.crc32(piece, self._crc)

    def value(self) -> int:
        """Wait for all pieces."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._crc


_X, _ONE = 1 << 30, 1 << 31  # x and 1, polynomials over GF(2) with the coefficient of x^0 in the highest bit


def joined_crc(one: int, two: int, nbytes: int) -> int:
    """CRC-32 of bytes of which those before have the CRC `one`, and the nbytes behind them `two`.

    one x^(8 nbytes) + two over GF(2), modulo the polynomial of CRC-32: as zlib's crc32_combine."""
    shift, square, n = _ONE, _X, 8 * nbytes
    while n:
        if n & 1:
            shift = _times(shift, square)
        square, n = _times(square, square), n >> 1
    return _times(shift, one) ^ two


def _times(a: int, b: int) -> int:
    """Multiply two polynomials modulo that of CRC-32."""
    out = 0
    for bit in range(31, -1, -1):
        out ^= b if a >> bit & 1 else 0
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return out
