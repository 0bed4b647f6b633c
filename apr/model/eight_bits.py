"""Round matrices to 8-bit integers with a factor for each row: what adapted_int8 and the int8 weights of generation read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

MAX_INT8 = 127
# rounded at once: intermediate values stay in the processor's cache
CHUNK_ROWS = 512


def rounded_rows(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(q, row) with row[o] = max_i |w[o,i]| / 127 and q = w / row, to nearest even.  w (O,I); int8 (O,I), float32 (O,)

    Every element of row * q is at most row/2 off, 1/254 of the largest of its row; a row of zeros stays one. float32
    arithmetic, whatever the dtype of w.
    """
    with ThreadPoolExecutor() as pool:
        parts = [*pool.map(lambda at: _rounded(w[at : at + CHUNK_ROWS]), range(0, len(w), CHUNK_ROWS))]
    return np.concatenate([q for q, _ in parts]), np.concatenate([row for _, row in parts])


def _rounded(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wide = np.asarray(w, np.float32)
    row = np.abs(wide).max(1) / np.float32(MAX_INT8)
    q: np.ndarray = np.rint(wide / np.where(row > 0, row, 1)[:, None])
    return q.astype(np.int8), row
