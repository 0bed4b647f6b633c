"""Checkpoints on disk.

| module | what                                                       |
|--------|------------------------------------------------------------|
| atomic | files appear whole or not at all                           |
| apr2   | APR v2: one file with metadata, tokenizer and tensors      |
| hf     | Hugging Face: config.json and safetensors                  |
| models | whatever the user names as MODEL, and filling a buffer     |

Here stands what they share. Files are hostile: sizes and offsets are checked against the length of
the file before anything is allocated or mapped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Never

import ml_dtypes
import numpy as np

from ..errors import InputNotFound, IOFailure, MalformedFile, Refused, UsageError
from ..params import Layout

BF16 = np.dtype(ml_dtypes.bfloat16)
SAVED = {  # what we write floating point tensors as
    "float32": np.dtype(np.float32),
    "bfloat16": BF16,
    "float16": np.dtype(np.float16),
}
CHUNK = 1 << 20  # elements converted or compared at a time: bounds the memory of a conversion
MAX_JSON = 100_000_000  # bytes; the limit of the safetensors library for its header


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its dtype, shape, and offset in bytes from the start of the file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class TensorFile(Mapping[str, np.ndarray]):
    """Tensors of one file by name: read-only arrays, mapped, so that bytes are read when touched."""

    def __init__(self, path: Path, f: BinaryIO, entries: Iterable[Stored]) -> None:
        """f is the open handle through which the file was checked: a later rename changes nothing."""
        self.path = path
        self.entries = {e.name: e for e in entries}
        self._bytes = np.asarray(np.memmap(f, np.uint8, "r"))

    def __getitem__(self, name: str) -> np.ndarray:
        e = self.entries[name]
        return self._bytes[e.offset : e.offset + e.nbytes].view(e.dtype).reshape(e.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """An open file and its length in bytes. Raises InputNotFound or IOFailure."""
    if not path.is_file():
        raise InputNotFound(f"{path}: no such file")
    try:
        with open(path, "rb") as f:
            yield f, os.fstat(f.fileno()).st_size
    except OSError as e:
        raise IOFailure(f"{path}: cannot read: {e}") from e


def read_text(path: Path) -> str:
    """A UTF-8 file of at most MAX_JSON bytes."""
    with opened(path) as (f, size):
        if size > MAX_JSON:
            raise MalformedFile(f"{path}: {size} bytes; no file of this kind has more than {MAX_JSON}")
        data = f.read(MAX_JSON)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise MalformedFile(f"{path}: not UTF-8 at byte {e.start}") from None


def parse_json(text: str | bytes, source: str, unique: bool = False) -> dict[str, Any]:
    """A JSON object from untrusted text. unique: a key that occurs twice is an error, else last wins.

    Raises MalformedFile for what is not JSON (NaN and infinity included) or not an object.
    """

    def constant(word: str) -> Never:
        raise ValueError(f"{word} is not a JSON number")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        d = dict(items)
        if unique and len(d) != len(items):
            seen: set[str] = set()
            twice = next(k for k, _ in items if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise ValueError(f"key {twice!r} occurs twice")
        return d

    try:
        value = json.loads(text, parse_constant=constant, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as e:  # ValueError: also bad UTF-8 and numbers of 5000 digits
        raise MalformedFile(f"{source}: not readable JSON: {e}") from None
    if not isinstance(value, dict):
        raise MalformedFile(f"{source}: expected a JSON object, found {type(value).__name__}")
    return value


def saved_dtype(array: np.ndarray, dtype: str | None) -> np.dtype[Any]:
    """The dtype an array is written with: floating point becomes `dtype` (None: stays), integers stay."""
    if dtype is not None and dtype not in SAVED:
        raise UsageError(f"dtype = {dtype!r}: weights are saved as {' or '.join(SAVED)}")
    if dtype is None or not is_float(array.dtype):
        return np.dtype(array.dtype.type)
    return SAVED[dtype]


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is floating point, bfloat16 included."""
    return dtype == BF16 or np.issubdtype(dtype, np.floating)


def encode(name: str, array: np.ndarray, dtype: np.dtype[Any], finite: bool = True) -> Iterator[memoryview]:
    """The little-endian bytes of an array as `dtype`, CHUNK elements at a time.

    Conversion rounds to nearest, ties to even. finite: raises Refused for a value that is not: a
    checkpoint that cannot be loaded again must not take the place of one that can.
    """
    flat = np.asarray(array).reshape(-1)
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK]
        if dtype == BF16 and part.dtype == np.float64:
            part = _round_to_odd(part)
        with np.errstate(over="ignore"):
            out = part.astype(dtype, copy=False)
        if finite:
            require_finite(out, start, name)
        yield np.ascontiguousarray(out).view(np.uint8).data


def require_finite(part: np.ndarray, start: int, name: str) -> None:
    """Raises Refused naming the first value of a flat array that is NaN or infinite."""
    if is_float(part.dtype):
        good = np.isfinite(part)
        if not good.all():
            i = int(np.argmin(good))
            raise Refused(f"{name}: element {start + i} is {part[i]} in {part.dtype}; weights must be finite")


def _round_to_odd(x: np.ndarray) -> np.ndarray:
    """float64 -> float32 such that rounding the result again rounds the original once.

    Boldo and Melquiond 2008. ml_dtypes converts float64 through float32, which would round twice.
    """
    with np.errstate(over="ignore"):
        y = x.astype(np.float32)
    bits = y.view(np.uint32)
    inexact = y != x
    bits[inexact & (np.abs(y) > np.abs(x))] -= 1  # one step towards zero
    bits[inexact] |= 1
    return y


def mismatch(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What keeps tensors of these names and shapes from being the parameters of a layout; "" if nothing.

    Compares in both directions: every parameter there, every tensor known, shapes equal.
    """
    want = {s.hf: s.shape for s in layout.in_order()}
    wrong = [f"{n} {shapes[n]}, not {want[n]}" for n in want if n in shapes and shapes[n] != want[n]]
    kinds = {
        "missing": [n for n in want if n not in shapes],
        "unexpected": sorted(set(shapes) - set(want)),
        "of wrong shape": wrong,
    }
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in kinds.items()
        if names
    )
