"""Compare two files of tensors, tensor by tensor, and what the files say of themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..common.finding import PASS, Finding, verdict_of
from .contents import Contents
from .tensors import CHUNK, stored_as

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
    """Differences of one tensor between a and b, in float64; None for figures that do not exist.

    state         EQUAL (bits), VALUES (of two dtypes), DIFFERENT, SHAPE, MISSING (in b) or EXTRA (in b)
    a, b          dtype and shape
    max_abs, rms  of b - a
    relative      rms over the root mean square of a
    cosine        of the angle between a and b as vectors; NaN when either is 0
    differ        number of elements whose values differ
    """

    name: str
    state: str
    a: str = ""
    b: str = ""
    max_abs: float | None = None
    rms: float | None = None
    relative: float | None = None
    cosine: float | None = None
    differ: int | None = None

    def finding(self, tolerance: float | None) -> Finding:
        """Judge: PASS for equal bits, or given a tolerance for a relative root mean square of at most that."""
        close = tolerance is not None and self.relative is not None and self.relative <= tolerance
        measured = self.state if self.relative is None else f"{self.state}, {self.relative:.3g} of its size"
        bound = EQUAL if tolerance is None else f"at most {tolerance:g} of its size"
        return Finding.of(self.name, self.state == EQUAL or close, measured, bound)

    @property
    def badness(self) -> tuple[int, float, float]:
        """Sort key, worst first: not there, of another shape, not finite, then by relative difference."""
        r = math.inf if self.relative is None or math.isnan(self.relative) else self.relative
        m = math.inf if self.max_abs is None or math.isnan(self.max_abs) else self.max_abs
        return (ORDER[self.state], -r, -m)


@dataclass(frozen=True)
class Comparison:
    """All tensors, worst first, and the facts that differ as (key, of a, of b)."""

    rows: list[TensorDifference]
    facts: list[tuple[str, Any, Any]]
    tolerance: float | None = None

    @property
    def wrong(self) -> list[TensorDifference]:
        """Tensors that count as different, worst first."""
        return [r for r in self.rows if not r.finding(self.tolerance).passed]

    @property
    def counts(self) -> dict[str, int]:
        """{state: number of tensors}."""
        states = [r.state for r in self.rows]
        return {state: states.count(state) for state in dict.fromkeys(states)}

    @property
    def findings(self) -> list[Finding]:
        """Findings of all tensors, then of the facts that differ."""
        facts = [Finding.of(key, False, repr(b), repr(a)) for key, a, b in self.facts]
        return [r.finding(self.tolerance) for r in self.rows] + facts

    @property
    def verdict(self) -> str:
        """Worst verdict of all findings."""
        return verdict_of(self.findings, unasked=PASS)

    @property
    def equal(self) -> bool:
        """True when nothing differs."""
        return self.verdict == PASS


def compare(a: Contents, b: Contents, tolerance: float | None = None, prefix: str = "") -> Comparison:
    """Compare every tensor of a and b, and their facts. Reads both once, a piece at a time.

    tolerance  None: equal bits; else the largest relative root mean square that counts as equal, whatever the dtype
    prefix     beginning of the names to compare
    """
    rows = []
    for name in [*a.tensors, *(n for n in b.tensors if n not in a.tensors)]:
        if name.startswith(prefix):
            x, y = a.tensors.get(name), b.tensors.get(name)
            row = _difference(name, x, y)
            rows.append(replace(row, a=_described(a, name, x), b=_described(b, name, y)))
    rows.sort(key=lambda r: r.badness)
    # A bare .safetensors file says nothing of a tokenizer.
    shared = a.facts.keys() & b.facts.keys()
    # Traces of two backends are compared with a tolerance.
    if tolerance is not None:
        shared -= {"metadata.backend", "metadata.dtype"}
    facts = [(k, a.facts[k], b.facts[k]) for k in sorted(shared) if a.facts[k] != b.facts[k]]
    return Comparison(rows, facts, tolerance)


def _difference(name: str, x: np.ndarray | None, y: np.ndarray | None) -> TensorDifference:
    """Measure the differences of one tensor; None: not there."""
    if x is None or y is None:
        assert x is not None or y is not None
        return TensorDifference(name, EXTRA if x is None else MISSING, _describe(x), _describe(y))
    described = (_describe(x), _describe(y))
    if x.shape != y.shape:
        return TensorDifference(name, SHAPE, *described)
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
            # The difference of two equal infinities is NaN.
            d[f == g] = 0
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
    return TensorDifference(name, state, *described, max_abs, rms, relative, min(cosine, 1.0), differ)


def _describe(x: np.ndarray | None) -> str:
    return "" if x is None else f"{x.dtype} {list(x.shape)}"


def _described(side: Contents, name: str, x: np.ndarray | None) -> str:
    """Name dtype and shape of a tensor as its file has them."""
    return "" if x is None else f"{stored_as(side.tensors, name, x.dtype)} {list(x.shape)}"
