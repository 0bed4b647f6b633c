"""Compare two files of tensors, tensor by tensor, and what the files say of themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .contents import Contents
from .tensors import CHUNK

EQUAL, VALUES, DIFFERENT, SHAPE, MISSING, EXTRA = (
    "equal",
    "equal values",
    "different",
    "shape",
    "missing",
    "extra",
)
ORDER = {MISSING: 0, EXTRA: 1, SHAPE: 2, DIFFERENT: 3, VALUES: 4, EQUAL: 5}


@dataclass(frozen=True)
class TensorDifference:
    """Differences of one tensor between a and b.

    state: EQUAL (bits), VALUES (of two dtypes), DIFFERENT, SHAPE, MISSING (in b), EXTRA (in b). max_abs, rms: of b - a.
    relative: rms by the root mean square of a. cosine: of the angle between a and b, as vectors; NaN where either is 0.
    differ: elements whose values differ. All figures in float64, None where there is nothing to compare."""

    name: str
    state: str
    a: str = ""  # dtype and shape
    b: str = ""
    max_abs: float | None = None
    rms: float | None = None
    relative: float | None = None
    cosine: float | None = None
    differ: int | None = None

    def within(self, tolerance: float | None) -> bool:
        """True for equal bits, or given a tolerance for a relative root mean square of at most that."""
        if self.state == EQUAL:
            return True
        return tolerance is not None and self.relative is not None and self.relative <= tolerance

    @property
    def badness(self) -> tuple[int, float, float]:
        """Sorts worst first: not there, of another shape, not finite, then by relative difference."""
        r = math.inf if self.relative is None or math.isnan(self.relative) else self.relative
        m = math.inf if self.max_abs is None or math.isnan(self.max_abs) else self.max_abs
        return (ORDER[self.state], -r, -m)


@dataclass(frozen=True)
class Difference:
    """All rows, worst first, and facts that differ as (key, of a, of b)."""

    rows: list[TensorDifference]
    facts: list[tuple[str, Any, Any]]
    tolerance: float | None = None
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """True when nothing differs."""
        return not self.facts and all(r.within(self.tolerance) for r in self.rows)


def compare(a: Contents, b: Contents, tolerance: float | None = None, prefix: str = "") -> Difference:
    """Compare every tensor of a and b, and their facts.

    tolerance: None wants equal bits; else tensors whose relative root mean square is at most that count as equal, whatever
    their dtype. prefix: only tensors whose names start with it. Reads both sides once, a piece at a time."""
    rows = []
    for name in [*a.tensors, *(n for n in b.tensors if n not in a.tensors)]:
        if name.startswith(prefix):
            rows.append(_difference(name, a.tensors.get(name), b.tensors.get(name)))
    rows.sort(key=lambda r: r.badness)
    shared = a.facts.keys() & b.facts.keys()  # a bare .safetensors file says nothing of a tokenizer
    if tolerance is not None:  # traces of two backends are compared like that
        shared -= {"metadata.backend", "metadata.dtype"}
    facts = [(k, a.facts[k], b.facts[k]) for k in sorted(shared) if a.facts[k] != b.facts[k]]
    counts: dict[str, int] = {}
    for r in rows:
        counts[r.state] = counts.get(r.state, 0) + 1
    return Difference(rows, facts, tolerance, counts)


def _difference(name: str, x: np.ndarray | None, y: np.ndarray | None) -> TensorDifference:
    if x is None or y is None:
        assert x is not None or y is not None
        return TensorDifference(name, EXTRA if x is None else MISSING, _describe(x), _describe(y))
    what = (_describe(x), _describe(y))
    if x.shape != y.shape:
        return TensorDifference(name, SHAPE, *what)
    same_bits = x.dtype == y.dtype
    max_abs = squares = of_a = of_b = product = 0.0
    differ = 0
    p, q = x.reshape(-1), y.reshape(-1)
    for at in range(0, p.size, CHUNK):
        u, v = p[at : at + CHUNK], q[at : at + CHUNK]
        if same_bits and not np.array_equal(
            np.ascontiguousarray(u).view(np.uint8), np.ascontiguousarray(v).view(np.uint8)
        ):
            same_bits = False
        f, g = u.astype(np.float64), v.astype(np.float64)
        with np.errstate(all="ignore"):
            d = g - f
            d[f == g] = 0  # two infinities
            max_abs = max(max_abs, float(np.abs(d).max())) if not np.isnan(d).any() else math.nan
            squares += float(d @ d)
            of_a, of_b, product = of_a + float(f @ f), of_b + float(g @ g), product + float(f @ g)
        differ += int(np.count_nonzero(~((f == g) | (np.isnan(f) & np.isnan(g)))))
    n = max(p.size, 1)
    with np.errstate(all="ignore"):
        rms = math.sqrt(squares / n) if squares == squares and squares != math.inf else squares
        relative = 0.0 if squares == 0 else rms / math.sqrt(of_a / n) if 0 < of_a < math.inf else math.inf
        cosine = product / math.sqrt(of_a) / math.sqrt(of_b) if of_a > 0 and of_b > 0 else math.nan
    state = EQUAL if same_bits else VALUES if differ == 0 else DIFFERENT
    if differ == 0:
        max_abs = rms = relative = 0.0
    return TensorDifference(name, state, *what, max_abs, rms, relative, min(cosine, 1.0), differ)


def _describe(x: np.ndarray | None) -> str:
    return "" if x is None else f"{x.dtype} {list(x.shape)}"
