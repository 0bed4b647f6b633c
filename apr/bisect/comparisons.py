"""Comparisons of mode EXACT: values, facts and arrays that must be equal."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .difference import Difference, difference
from .pieces import in_pieces
from .report import EXACT, ArrayComparison


def exact(
    stage: str, op: str, tap: str, got: Any, want: Any, layer: int | None = None, cause: str = ""
) -> ArrayComparison:
    """Compare two values that must be equal."""
    same = bool(got == want) or (got != got and want != want)
    return ArrayComparison(
        stage, op, tap, EXACT, 0.0 if same else np.inf, 0.0, layer, (), (), got, want, cause
    )


def holds(
    stage: str, op: str, tap: str, true: bool, otherwise: str, layer: int | None = None
) -> ArrayComparison:
    """Compare a fact with True; otherwise: the cause of a false one."""
    return exact(stage, op, tap, bool(true), True, layer, "" if true else otherwise)


def measured(
    stage: str,
    op: str,
    tap: str,
    d: Difference,
    tol: float,
    layer: int | None = None,
    shape: tuple[int, ...] = (),
    cause: str = "",
) -> ArrayComparison:
    """Make the comparison of a difference."""
    d = dataclasses.replace(d, shape=shape or d.shape)
    return ArrayComparison(stage, op, tap, EXACT, d.err, tol, layer, d.shape, d.index, d.got, d.want, cause)


def unequal(got: np.ndarray, want: np.ndarray) -> Difference:
    """Return the difference of arrays of unequal bits; infinite when their values are equal, as of -0 and 0."""
    d = difference(got, want)
    return dataclasses.replace(d, err=d.err or np.inf)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Compare two arrays bit for bit."""
    x, y = a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)
    return x.size == y.size and all(in_pieces(lambda at: np.array_equal(x[at], y[at]), x.size))
