"""Share what the formats have in common: dtypes, mapped tensors, conversion by chunks, the check against a layout.

Files are hostile (see apr/common/files.py): sizes and offsets are checked against the length of the file before anything
is allocated or mapped.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import ml_dtypes  # isort: skip -- behind NumPy, without which it prints a traceback

from ..common.errors import MalformedFile, Refused, UsageError
from ..common.units import plural
from ..model.params import Layout

BF16 = np.dtype(ml_dtypes.bfloat16)
SAVED = {  # what we write floating point tensors as
    "float32": np.dtype(np.float32),
    "bfloat16": BF16,
    "float16": np.dtype(np.float16),
}
PREFIX = "model."  # of all names but the head's
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INV_FREQ = ".rotary_emb.inv_freq"  # old Llama files store this table, which the config determines
CHUNK = 1 << 20  # elements converted or compared at a time: bounds the memory of a conversion


@dataclass(frozen=True, slots=True)
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
    """Tensors of one file by name: read-only arrays, mapped, so that bytes are read when touched.

    metadata: texts that a safetensors file holds beside them."""

    def __init__(
        self, path: Path, f: BinaryIO, entries: Iterable[Stored], metadata: Mapping[str, str] | None = None
    ) -> None:
        """f is the open handle through which the file was checked: a later rename changes nothing."""
        self.path = path
        self.metadata = dict(metadata or {})
        self.entries = {e.name: e for e in entries}
        # {name: type in the file}, of tensors that are not arrays there.
        self.converted: dict[str, str] = {}
        self._map: mmap.mmap | None = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        """The bytes themselves: another process may not see the file, or another one by then."""
        return {**vars(self), "_map": None, "_bytes": self._part(0, self._bytes.size).copy()}

    def __getitem__(self, name: str) -> np.ndarray:
        e = self.entries[name]
        return self._part(e.offset, e.nbytes).view(e.dtype).reshape(e.shape)

    def _part(self, offset: int, nbytes: int) -> np.ndarray:
        """Map bytes of the file, uint8 (nbytes,). Raises MalformedFile: the file has become shorter since it was opened, as by a
        copy over it. The kernel ends a process that reads a map beyond the end of its file."""
        if self._map is not None and self._map.size() < offset + nbytes:
            raise MalformedFile(
                f"{self.path}: became shorter while it was read, {plural(self._map.size(), 'byte')}; restore it, and put a new "
                "file in the place of one that is in use by renaming it"
            )
        return self._bytes[offset : offset + nbytes]

    def renamed(self, names: Mapping[str, str]) -> TensorFile:
        """Give the tensors other names, {old: new}, in place."""
        self.entries = {names[e.name]: replace(e, name=names[e.name]) for e in self.entries.values()}
        return self

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def stored_as(tensors: Mapping[str, np.ndarray], name: str, dtype: np.dtype[Any]) -> str:
    """Name the dtype in the file: that of the array, but for blocks that are converted when they are read, "Q8_0"."""
    return tensors.converted.get(name, str(dtype)) if isinstance(tensors, TensorFile) else str(dtype)


def spec_of(tensors: Mapping[str, np.ndarray], name: str) -> Stored | np.ndarray:
    """Look up dtype and shape of a tensor, without reading or converting the tensor."""
    return tensors.entries[name] if isinstance(tensors, TensorFile) else tensors[name]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """True for arrays of equal dtype, shape and bits; compares CHUNK bytes at a time."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    x, y = (np.ascontiguousarray(t).reshape(-1).view(np.uint8) for t in (a, b))
    return all(np.array_equal(x[i : i + CHUNK], y[i : i + CHUNK]) for i in range(0, x.size, CHUNK))


def saved_dtype(array: np.ndarray, dtype: str | None) -> np.dtype[Any]:
    """Choose the dtype an array is written with: floating point becomes `dtype` (None: stays), integers stay."""
    if dtype is not None and dtype not in SAVED:
        raise UsageError(f"dtype = {dtype!r}: weights are saved as {' or '.join(SAVED)}")
    if dtype is None or not is_float(array.dtype):
        return np.dtype(array.dtype.type)
    return SAVED[dtype]


def is_float(dtype: np.dtype[Any]) -> bool:
    """True for a floating point dtype, bfloat16 included."""
    return dtype == BF16 or np.issubdtype(dtype, np.floating)


def encode(name: str, array: np.ndarray, dtype: np.dtype[Any], finite: bool = True) -> Iterator[memoryview]:
    """Yield the little-endian bytes of an array as `dtype`, CHUNK elements at a time.

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
    """Raise Refused naming the first value of a flat array that is NaN or infinite."""
    if is_float(part.dtype):
        good = np.isfinite(part)
        if not good.all():
            i = int(np.argmin(good))
            raise Refused(f"{name}: element {start + i} is {part[i]} in {part.dtype}; weights must be finite")


def _round_to_odd(x: np.ndarray) -> np.ndarray:
    """Convert float64 to float32 such that rounding the result again rounds the original once.

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
    """Describe what keeps tensors of these names and shapes from being the parameters of a layout; "" for a match.

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
