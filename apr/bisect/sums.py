"""Errors of long sums whose terms are added one by one, as a sound backend may and NumPy does not."""

from __future__ import annotations

from typing import Any

import numpy as np

# Terms of a sum of values, and of a sum over tokens, from which on its order decides its error.
LONG_SUM, LONG_GRADIENT = 4096, 256
# Rows and columns whose elements are summed in order.
SAMPLE = 8


def summed_in_order(op: str, name: str, low: dict[str, Any], want: np.ndarray) -> list[float]:
    """Return errors of some elements of a long product whose terms are added one by one in float32, as a GPU may and
    NumPy's blocks do not; none for a short sum. The gradient of a matrix goes on from what it was, block by block."""
    if (op, name) not in (("linear_fwd", "y"), ("linear_bwd", "dx"), ("linear_bwd", "dw")):
        return []
    rows, columns = {
        "y": lambda: (low["x"], low["w"]),
        "dx": lambda: (low["dy"], low["w"].T),
        "dw": lambda: (low["dy"].T, low["x"].T),
    }[name]()
    if rows.shape[1] < (LONG_GRADIENT if name == "dw" else LONG_SUM):
        return []

    def chosen(x: np.ndarray) -> np.ndarray:
        # Rows of a gradient differ in size, and the largest have the largest errors.
        by_size = np.argsort(np.square(x).sum(1))[-SAMPLE:]
        return by_size if name == "dw" else np.linspace(0, len(x) - 1, SAMPLE).astype(int)

    out = []
    for n in chosen(rows):
        for o in chosen(columns):
            terms = rows[n] * columns[o]
            if name == "dw" and low.get("adds", True):
                terms = np.concatenate([low["dw"][n, o : o + 1], terms])
            total = np.cumsum(terms, dtype=np.float32)[-1]
            total = total + low["b"][o] if name == "y" and low["b"] is not None else total
            out.append(abs(float(total) - float(want[n, o])))
    return out
