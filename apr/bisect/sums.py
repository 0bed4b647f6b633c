"""Errors of sums whose terms are added in another order than NumPy's, as a sound backend may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import rule

# Terms of a sum of values, and of a sum over tokens, from which on its order decides its error.
LONG_SUM, LONG_GRADIENT = 4096, 256
# Rows and columns whose elements are summed in order.
SAMPLE = 8
# Elements of a product that are few: of more, plain NumPy's largest error is as large as another order's.
FEW = 4096
# Products within ops: rows and columns whose terms are added, by op and output. Gradients of matrices go on from what they were.
VALUES: dict[tuple[str, str], Callable[[dict[str, Any]], tuple[Any, Any]]] = {
    ("linear_fwd", "y"): lambda low: (low["x"], low["w"]),
    ("linear_bwd", "dx"): lambda low: (low["dy"], low["w"].T),
    ("adapted_bwd_a", "u"): lambda low: (low["x"], low["a"]),
    ("adapted_bwd_b", "du"): lambda low: (low["dy"], low["b"].T),
}
GRADIENTS: dict[tuple[str, str], Callable[[dict[str, Any]], tuple[Any, Any]]] = {
    ("linear_bwd", "dw"): lambda low: (low["dy"].T, low["x"].T),
    ("adapted_bwd_a", "da"): lambda low: (low["du"].T * low["du"].dtype.type(low["factor"]), low["x"].T),
    ("adapted_bwd_b", "db"): lambda low: (low["dy"].T * low["dy"].dtype.type(low["factor"]), low["u"].T),
}
# Standard errors that stand for the error of plain NumPy, of which a gradient may have three times as much.
CHANCE = rule.SIGMAS / 3


def summed_in_order(op: str, name: str, low: dict[str, Any], want: np.ndarray) -> list[float]:
    """Return errors of some elements of a long product whose terms are added one by one in float32, as a GPU may and
    NumPy's blocks do not; none for a short sum. The gradient of a matrix goes on from what it was, block by block."""
    product = (VALUES | GRADIENTS).get((op, name))
    if product is None:
        return []
    is_gradient = (op, name) in GRADIENTS
    rows, columns = product(low)
    if rows.shape[1] < (LONG_GRADIENT if is_gradient else LONG_SUM):
        return []

    def chosen(x: np.ndarray) -> np.ndarray:
        # Rows of a gradient differ in size, and the largest have the largest errors.
        by_size = np.argsort(np.square(x).sum(1))[-SAMPLE:]
        return by_size if is_gradient else np.linspace(0, len(x) - 1, SAMPLE).astype(int)

    out = []
    for n in chosen(rows):
        for o in chosen(columns):
            terms = rows[n] * columns[o]
            if is_gradient and low.get("adds", True):
                terms = np.concatenate([low[name][n, o : o + 1], terms])
            total = np.cumsum(terms, dtype=np.float32)[-1]
            total = total + low["b"][o] if name == "y" and low["b"] is not None else total
            out.append(abs(float(total) - float(want[n, o])))
    return out


def by_chance(op: str, name: str, low: dict[str, Any], want: np.ndarray) -> list[np.ndarray]:
    """Return a gradient of a vector, of a norm or a bias, as far off as chance may take a sum over tokens in float32; of a
    product with few elements the same.

    Where terms cancel, the sum on its way is larger than its end, and each addition may be off by u |sum|. NumPy's own error
    is one draw: of few elements it may be a lucky one, so it is no measure of another order's.

        sigma = u / sqrt(3) sqrt(sum_n S_n^2),  S_n = the sum of the first n terms, u = 2^-24

    S begins at zero, as parts of a sum do, or at what the gradient was: the larger of the two."""
    if (op, name) in VALUES and want.size <= FEW:
        rows, columns = VALUES[op, name](low)
        if rows.dtype != np.float32 or rows.shape[1] >= LONG_SUM:
            return []
        bias = low["b"] if name == "y" and low["b"] is not None else 0.0
        sums = np.cumsum(rows[:, None, :].astype(np.float64) * columns, axis=2)
        squares = np.square(sums).sum(2) + np.square(sums[..., -1] + bias)
        return [want + CHANCE * rule.EPS["float32"] / 2 * np.sqrt(squares / 3)]
    if want.ndim != 1 or (op, name) not in (
        ("linear_bwd", "db"), ("add_rmsnorm_bwd", "dw"), ("head_rmsnorm_bwd", "dw"),
    ):  # fmt: skip
        return []
    terms = low["dy"].astype(np.float64)
    if name == "dw":
        terms *= low["x" if "x" in low else "res"]
        terms *= low["rstd"][..., None]
    sums = terms.reshape(-1, want.size)
    np.cumsum(sums, axis=0, out=sums)
    squares = np.einsum("nc,nc->c", sums, sums)
    sums += low[name]
    squares = np.maximum(squares, np.einsum("nc,nc->c", sums, sums))
    return [want + CHANCE * rule.EPS["float32"] / 2 * np.sqrt(squares / 3)]
