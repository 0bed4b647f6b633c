"""Find where documents begin in a batch."""

from __future__ import annotations

import numpy as np


def document_starts(ids: np.ndarray, end: int) -> np.ndarray:
    """Position at which the document of each position begins: behind the last `end` before it, or 0.

    ids (B,T), result (B,T) int32
    """
    starts = np.zeros(ids.shape, np.int32)
    starts[:, 1:] = np.where(ids[:, :-1] == end, np.arange(1, ids.shape[1]), 0)
    return np.maximum.accumulate(starts, axis=1)
