"""APR v2: one file that holds metadata (JSON), an embedded tokenizer and the tensors.

Little endian; every section is zero padded to 64 bytes:

| section  | layout                                                                                |
|----------|---------------------------------------------------------------------------------------|
| header   | 64 bytes: magic, version, flags, tensor count, places of the sections, CRC of itself  |
| metadata | UTF-8 JSON                                                                            |
| index    | per tensor, sorted by name: u16 length, name, u8 dtype, u8 ndim, u64 dims, u64 offset |
|          | in data, u64 size                                                                     |
| data     | tensors, each on a 64-byte boundary                                                   |
| footer   | u32 CRC-32 of everything before it                                                    |

CRC-32 is that of zlib. The header's covers its bytes 0-39 and 44-63.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..common.atomic import atomic_write
from ..common.errors import MalformedFile, Refused
from ..common.files import opened, parse_json
from ..common.rounding import round_up
from ..common.units import plural
from .checksum import Checksum, crc_of, joined_crc
from .tensors import BF16, Stored, TensorFile, encode, saved_dtype

MAGIC = b"APR\0"
HEADER = struct.Struct("<4sBBHIQIQQI20s")
ALIGN = 64  # bytes
MAX_METADATA = 16 << 20  # bytes
MAX_NAME, MAX_NDIM = 256, 8

DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    3: np.dtype(np.float64),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.int8),
    7: np.dtype(np.uint8),
    30: BF16,
}
TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
QUANTISED = {8: "APR-Q4", 9: "APR-Q8", 12: "Q4_K", 14: "Q6_K", 128: "APR-Q4", 129: "APR-Q8"}

HAS_VOCAB, ROW_MAJOR = 0x0200, 0x0400
HARMLESS = HAS_VOCAB | ROW_MAJOR | 0x0080 | 0x0100  # and: has a model card, may be read in pieces
REFUSED_FLAGS = {
    0x0001: "LZ4 compressed",
    0x0002: "Zstd compressed",
    0x0004: "encrypted",
    0x0008: "signed (apr cannot check the signature)",
    0x0010: "sharded over several files",
    0x0020: "quantised",
    0x0040: "an audio model with a filterbank",
    0x0800: "column-major",
}


@dataclass(frozen=True, slots=True)
class _Row:
    """One entry of the index as it stands in the file; offset in bytes from the start of the data."""

    name: str
    tag: int
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class AprFile:
    """A checked APR v2 file. tensors: by name, read-only, mapped (bytes are read when touched)."""

    path: Path
    metadata: dict[str, Any]
    flags: int
    size: int  # bytes
    tensors: TensorFile


def read_apr(path: str | Path) -> AprFile:
    """Open an APR v2 file after checking all of it: both CRCs, length, every offset, size and shape.

    The tensors are mapped, not loaded; checking reads the file once in small pieces. Raises
    InputNotFound, MalformedFile for a truncated or corrupted file, Refused for a feature of the
    format that apr does not honour.
    """
    path = Path(path)
    with opened(path) as (f, size):
        flags, count, meta_size, index_at, data_at = _read_header(f, size, path)
        text = f.read(meta_size)
        f.seek(index_at)
        rows = _read_index(f.read(data_at - index_at), count, path)
        _check_places(rows, data_at, size, path)
        _check_footer(f, size, path)
        # The checksums hold, so what follows is what somebody wrote: what is unknown to apr is unknown on purpose.
        entries = [_stored(row, data_at, path) for row in rows]
        metadata = parse_json(text, f"{path}: metadata")
        return AprFile(path, metadata, flags, size, TensorFile(path, f, entries))


def aligned(n: int) -> int:
    """n bytes, rounded up to where the next part of a file may begin."""
    return round_up(n, ALIGN)


def _bad(path: Path, what: str) -> MalformedFile:
    return MalformedFile(f"{path}: {what}; the file is damaged or not an APR v2 file, copy or write it again")


def _header_crc(header: bytes) -> int:
    return zlib.crc32(header[44:], zlib.crc32(header[:40]))


def _read_header(f: BinaryIO, size: int, path: Path) -> tuple[int, int, int, int, int]:
    """Read (flags, tensor count, metadata size, index offset, data offset), checked against the length."""
    raw = f.read(HEADER.size)
    if raw[:4] != MAGIC:
        raise _bad(path, f"starts with {raw[:4]!r}, not {MAGIC!r}")
    if len(raw) < HEADER.size:
        raise _bad(path, f"truncated: {plural(size, 'byte')}, shorter than a header")
    _, major, minor, flags, count, meta_at, meta_size, index_at, data_at, crc, rest = HEADER.unpack(raw)
    if crc != _header_crc(raw):
        raise _bad(path, f"header CRC is {_header_crc(raw):#010x}, stored {crc:#010x}")
    if (major, minor) != (2, 0) or any(rest):
        raise _bad(path, f"format version {major}.{minor} with reserved bytes {rest.hex()}, apr reads 2.0")
    for bit in (1 << i for i in range(16)):
        if flags & bit & ~HARMLESS:
            raise Refused(
                f"{path}: flag {bit:#06x}: {REFUSED_FLAGS.get(bit, 'unknown')}; apr does not read this"
            )
    if meta_size > MAX_METADATA:
        raise _bad(path, f"metadata of {plural(meta_size, 'byte')}; the limit is {MAX_METADATA}")
    if meta_at != HEADER.size or index_at != aligned(meta_at + meta_size):
        raise _bad(path, f"metadata at {meta_at} of {plural(meta_size, 'byte')}, then index at {index_at}")
    if not index_at <= data_at <= size - 4:
        raise _bad(
            path,
            f"truncated or wrong: index at {index_at}, data at {data_at}, file of {plural(size, 'byte')}",
        )
    longest = 2 + MAX_NAME + 2 + 8 * MAX_NDIM + 16
    if data_at - index_at > aligned(count * longest):
        raise _bad(path, f"index of {plural(data_at - index_at, 'byte')} for {plural(count, 'tensor')}")
    return flags, count, meta_size, index_at, data_at


def _read_index(block: bytes, count: int, path: Path) -> list[_Row]:
    rows: list[_Row] = []
    at = 0
    try:
        for _ in range(count):
            (n,) = struct.unpack_from("<H", block, at)
            raw, tag, ndim = struct.unpack_from(f"<{n}sBB", block, at + 2)
            at += 2 + n + 2
            *shape, offset, size = struct.unpack_from(f"<{ndim}Q2Q", block, at)
            at += 8 * (ndim + 2)
            if not 0 < n <= MAX_NAME or ndim > MAX_NDIM:
                raise _bad(
                    path, f"tensor {len(rows)}: name of {plural(n, 'byte')}, {plural(ndim, 'dimension')}"
                )
            rows.append(_Row(raw.decode("utf-8"), tag, tuple(shape), offset, size))
            if len(rows) > 1 and not rows[-2].name < rows[-1].name:
                kind = "twice" if rows[-2].name == rows[-1].name else "out of order"
                raise _bad(path, f"tensor {rows[-1].name!r} is in the index {kind}")
    except (struct.error, UnicodeDecodeError) as e:
        raise _bad(path, f"tensor {len(rows)} of {count} in the index: {e}") from None
    if aligned(at) != len(block):
        raise _bad(
            path, f"index of {plural(len(block), 'byte')}, of which {plural(count, 'tensor')} fill {at}"
        )
    return rows


def _check_places(rows: list[_Row], data_at: int, size: int, path: Path) -> None:
    """Raise MalformedFile unless tensors follow one another without overlap or gap up to the footer."""
    end = 0
    for row in sorted(rows, key=lambda r: r.offset):
        if row.offset != aligned(end):
            what = "overlaps the one before" if row.offset < end else "leaves a gap before it"
            raise _bad(path, f"tensor {row.name!r} at {row.offset} {what}, which ends at {end}")
        end = row.offset + row.size
    if data_at + aligned(end) + 4 != size:
        kind = "truncated" if data_at + aligned(end) + 4 > size else "too long"
        raise _bad(path, f"{kind}: {plural(size, 'byte')}, the index asks for {data_at + aligned(end) + 4}")


def _check_footer(f: BinaryIO, size: int, path: Path) -> None:
    try:
        crc = crc_of(f, size - 4)
    except EOFError:
        raise _bad(path, "became shorter while being read") from None
    (stored,) = struct.unpack("<I", os.pread(f.fileno(), 4, size - 4).ljust(4, b"\0"))
    if crc != stored:
        raise _bad(path, f"footer CRC is {crc:#010x}, stored {stored:#010x}")


def _stored(row: _Row, data_at: int, path: Path) -> Stored:
    if row.tag in QUANTISED:
        raise Refused(
            f"{path}: tensor {row.name!r} is quantised ({QUANTISED[row.tag]}), which apr does not read: "
            "import the original checkpoint instead"
        )
    if row.tag not in DTYPES:
        raise _bad(path, f"tensor {row.name!r} has unknown dtype tag {row.tag}")
    dtype = DTYPES[row.tag]
    if row.size == 0 or prod(row.shape) * dtype.itemsize != row.size:
        raise _bad(path, f"tensor {row.name!r}: {dtype} {row.shape} in {plural(row.size, 'byte')}")
    return Stored(row.name, dtype, row.shape, data_at + row.offset)


def write_apr(
    path: str | Path,
    metadata: dict[str, Any],
    tensors: Mapping[str, np.ndarray],
    dtype: str | None = None,
    late: Mapping[str, Callable[[], str]] | None = None,
) -> None:
    """Write an APR v2 file, one piece of one tensor at a time, in the place of `path`.

    dtype: "float32" or "bfloat16" for floating point tensors (rounding to nearest even), None keeps
    each tensor's. `param_count` and `total_size` (bytes of tensors) are set from what is written. late: gives values of
    metadata, asked for when the tensors are written, which have as many bytes as the values that stand in `metadata`. Equal
    arguments give equal bytes. Raises Refused for what the format cannot hold, IOFailure, ValueError for a late value of
    another length.
    """
    names = sorted(tensors)  # by code point, which is the order of the UTF-8 bytes
    plan: list[tuple[str, np.dtype[Any], int]] = []
    index = bytearray()
    offset = 0
    for name in names:
        to = saved_dtype(tensors[name], dtype)
        shape, raw = tensors[name].shape, name.encode("utf-8")
        size = prod(shape) * to.itemsize
        if to not in TAGS or size == 0 or len(shape) > MAX_NDIM or not 0 < len(raw) <= MAX_NAME:
            raise Refused(f"{path}: tensor {name!r}, {to} {shape}: an APR v2 file cannot hold this")
        index += struct.pack(f"<H{len(raw)}sBB", len(raw), raw, TAGS[to], len(shape))
        index += struct.pack(f"<{len(shape)}Q2Q", *shape, offset, size)
        plan.append((name, to, size))
        offset += aligned(size)
    total = {
        "param_count": sum(size // to.itemsize for _, to, size in plan),
        "total_size": sum(size for _, _, size in plan),
    }
    metadata = {**metadata, **total}
    text = dump_metadata(metadata)
    if len(text) > MAX_METADATA:
        raise Refused(
            f"{path}: metadata of {plural(len(text), 'byte')}; an APR v2 file holds at most {MAX_METADATA}"
        )
    with atomic_write(path) as f, Checksum(offset) as checksum:

        def put(piece: bytes | bytearray | memoryview) -> None:
            f.write(piece)
            checksum.add(piece)

        vocabulary = metadata.get("tokenizer.vocabulary")
        flags = HAS_VOCAB if vocabulary and vocabulary != dumped([]) else 0
        head = _pack_header(flags, len(plan), len(text), len(index)), text.ljust(aligned(len(text)), b"\0")
        f.writelines(head)
        put(index.ljust(aligned(len(index)), b"\0"))
        for name, to, size in plan:
            start = f.tell()
            for piece in encode(f"{path}: {name}", tensors[name], to):
                put(piece)
            if f.tell() - start != size:
                raise Refused(f"{path}: tensor {name!r} changed its shape while it was written")
            put(bytes(aligned(size) - size))
        if late:
            new = dump_metadata({**metadata, **{key: value() for key, value in late.items()}})
            if len(new) != len(text):
                raise ValueError(f"{', '.join(late)}: not as long as what the place was kept for")
            head = head[0], new.ljust(len(head[1]), b"\0")
            f.seek(0)
            f.writelines(head)
            f.seek(0, os.SEEK_END)
        before = b"".join(head)
        f.write(struct.pack("<I", joined_crc(zlib.crc32(before), checksum.value(), f.tell() - len(before))))


class Dumped(bytes):
    """A value of metadata as it stands in the file: making the text of a large one keeps all threads of Python waiting."""


def dumped(value: Any) -> Dumped:
    """Encode a value of metadata. Raises ValueError for what is no JSON: NaN and infinity."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Dumped(text.encode("utf-8"))


def dump_metadata(metadata: dict[str, Any]) -> bytes:
    """Encode metadata as they stand in the file; those of them that are `Dumped` are copied."""
    pieces: list[bytes] = []
    for key, value in metadata.items():
        pieces += (b",", dumped(key), b":", value if isinstance(value, Dumped) else dumped(value))
    return b"".join((b"{", *pieces[1:], b"}"))


def _pack_header(flags: int, count: int, meta_size: int, index_size: int) -> bytes:
    index_at = HEADER.size + aligned(meta_size)
    places = (HEADER.size, meta_size, index_at, index_at + aligned(index_size))
    raw = HEADER.pack(MAGIC, 2, 0, flags | ROW_MAJOR, count, *places, 0, bytes(20))
    return raw[:40] + struct.pack("<I", _header_crc(raw)) + raw[44:]
