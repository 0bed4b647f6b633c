"""Decode UTF-8 that comes in blocks; byte order marks."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from ..common.files import byte_order_mark
from .source import Unusable


class Utf8:
    """Decoder of one text; at: offset in the file of the first byte that is not decoded yet, for messages."""

    def __init__(self, at: int) -> None:
        self.at, self._rest = at, b""

    def text(self, block: bytes, final: bool = False) -> str:
        """Decode up to the last whole character. Raises Unusable: not UTF-8, NUL bytes."""
        data = self._rest + block
        if (nul := data.find(0)) >= 0:
            raise Unusable(
                "NUL bytes",
                f"the first at byte {self.at + nul}: binary data, or an archive of files, which must be unpacked",
            )
        try:
            text, used = codecs.utf_8_decode(data, "strict", final)
        except UnicodeDecodeError as e:
            raise Unusable("not UTF-8", bad_byte(e, self.at + e.start)) from None
        self.at += used
        self._rest = data[used:]
        return text


def mark_length(head: bytes) -> int:
    """Measure the byte order mark at the beginning of a file. Raises Unusable for a mark of UTF-16 or UTF-32."""
    length, encoding = byte_order_mark(head)
    if encoding != "UTF-8":
        detail = f"{encoding} by its byte order mark; convert it with iconv -f {encoding} -t UTF-8"
        raise Unusable("not UTF-8", detail)
    return length


def without_mark(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Drop the byte order mark of a file that comes in blocks. Raises Unusable as mark_length does."""
    head = next(blocks, b"")
    yield head[mark_length(head) :]
    yield from blocks


def bad_byte(error: UnicodeDecodeError, at: int) -> str:
    """Describe the byte at offset `at` of a file that is not UTF-8, and a remedy unless a character is cut off."""
    said = f"byte {at} (0x{error.object[error.start]:02x}): {error.reason}"
    cut = error.reason == "unexpected end of data"
    return said if cut else f"{said}; if it is Windows-1252, convert it with iconv -f WINDOWS-1252 -t UTF-8"
