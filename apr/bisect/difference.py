"""How far an array is off, and whether that is too far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import rule
from .pieces import in_pieces


@dataclass(frozen=True)
class Difference:
    """How far an array is off: the largest |got - want|, where, and the largest |want|. NaN where got has one."""

    err: float
    flat: int  # index of the worst element in the flattened array
    largest: float
    shape: tuple[int, ...]
    got: float
    want: float

    @property
    def index(self) -> tuple[int, ...]:
        """Of the worst element."""
        return tuple(int(i) for i in np.unravel_index(self.flat, self.shape)) if self.shape else ()


def difference(got: np.ndarray, want: np.ndarray) -> Difference:
    """The Difference of two arrays of one shape, in pieces, so that memory does not grow with their size."""
    shape = want.shape
    g, w = got.reshape(-1), np.ascontiguousarray(want).reshape(-1)

    def piece(at: slice) -> tuple[float, int, float]:
        a, b = g[at].astype(np.float64), w[at].astype(np.float64)
        largest = float(np.abs(b).max())
        off = np.abs(a - b)
        worst = int(off.argmax())  # the first NaN where there is one
        return float(off[worst]), at.start + worst, largest

    found = in_pieces(piece, w.size) or [(0.0, 0, 0.0)]
    err, at, _ = max(found, key=lambda f: (f[0] != f[0], f[0]))
    largest = max(f[2] for f in found)
    some = w.size > 0
    return Difference(err, at, largest, shape, float(g[at]) if some else 0.0, float(w[at]) if some else 0.0)


def verdict(
    d: Difference,
    base: float,
    eps: float,
    factor: float,
    slices: Sequence[float] = (),
    expected: Sequence[float] = (),
) -> tuple[float, float, int | None]:
    """(error, tolerance, axis) by the rule: of the worst element, axis None; or, where that is within its tolerance, of the
    slices across the first axis that are not.

    base: the error to expect; slices, expected: rule.relative() of the array and to expect, where slices are judged.
    """
    tol = rule.tolerance(base, d.largest, eps, factor)
    if d.err <= tol:
        for axis, (mine, sound) in enumerate(zip(slices, expected, strict=True)):
            bound = rule.relative_tolerance(sound, eps, factor)
            if not mine <= bound:
                return mine, bound, axis
    return d.err, tol, None
