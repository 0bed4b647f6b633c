"""Difference of an array from the one expected, and its tolerance by the rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import rule
from .pieces import in_pieces


@dataclass(frozen=True)
class Difference:
    """Difference of an array `got` from `want`.

    err      largest |got - want|; NaN when got has one
    flat     index of the element with that error, in the flattened array
    largest  largest |want|
    got, want  values of that element
    """

    err: float
    flat: int
    largest: float
    shape: tuple[int, ...]
    got: float
    want: float

    @property
    def index(self) -> tuple[int, ...]:
        """Index of the worst element."""
        return tuple(int(i) for i in np.unravel_index(self.flat, self.shape)) if self.shape else ()


def difference(got: np.ndarray, want: np.ndarray) -> Difference:
    """Compare two arrays of one shape, in pieces, so that memory does not grow with their size."""
    shape = want.shape
    g, w = got.reshape(-1), np.ascontiguousarray(want).reshape(-1)

    def piece(at: slice) -> tuple[float, int, float]:
        a, b = g[at].astype(np.float64), w[at].astype(np.float64)
        largest = float(np.abs(b).max())
        off = np.abs(a - b)
        # argmax finds the first NaN
        worst = int(off.argmax())
        return float(off[worst]), at.start + worst, largest

    pieces = in_pieces(piece, w.size) or [(0.0, 0, 0.0)]
    err, at, _ = max(pieces, key=lambda p: (p[0] != p[0], p[0]))
    largest = max(p[2] for p in pieces)
    values = (float(g[at]), float(w[at])) if w.size else (0.0, 0.0)
    return Difference(err, at, largest, shape, *values)


def root_mean_square(got: np.ndarray, want: np.ndarray | float = 0.0) -> float:
    """sqrt(mean((got - want)^2)), in float64 and in pieces."""
    g = got.reshape(-1)
    w = np.ascontiguousarray(want).reshape(-1) if isinstance(want, np.ndarray) else None

    def piece(at: slice) -> float:
        off = g[at].astype(np.float64) - (want if w is None else w[at].astype(np.float64))
        return float(np.square(off).sum())

    return float(np.sqrt(sum(in_pieces(piece, g.size)) / max(1, g.size)))


def error_and_tolerance(
    d: Difference,
    base: float,
    eps: float,
    factor: float,
    slices: Sequence[float] = (),
    expected: Sequence[float] = (),
) -> tuple[float, float, int | None]:
    """(error, tolerance, axis) by the rule: of the worst element, axis None; or, when the worst element is within its
    tolerance, of the first axis whose slices are not.

    base      error to expect
    slices    rule.relative() of the array, by axis, for arrays that are judged by slices
    expected  rule.relative() to expect, by axis
    """
    tol = rule.tolerance(base, d.largest, eps, factor)
    if d.err <= tol:
        for axis, (mine, sound) in enumerate(zip(slices, expected, strict=True)):
            bound = rule.relative_tolerance(sound, eps, factor)
            if not mine <= bound:
                return mine, bound, axis
    return d.err, tol, None
