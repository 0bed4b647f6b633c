"""Random words that are a function of a counter and a key: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3", section 3.3), in plain NumPy. What is drawn so depends on no order, no device and no process.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 10
# multipliers of words 0 and 2, and what the two words of the key grow by each round
MULTIPLIERS, KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def words(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Compute four random words for each counter.  counter, result (...,4) uint32"""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k = [np.uint64(x) for x in key]
    for _ in range(ROUNDS):
        first, second = (np.uint64(m) * x for m, x in zip(MULTIPLIERS, c[::2], strict=True))
        c = [(second >> HALF) ^ c[1] ^ k[0], second & LOW, (first >> HALF) ^ c[3] ^ k[1], first & LOW]
        k = [(x + np.uint64(step)) & LOW for x, step in zip(k, KEY_STEPS, strict=True)]
    return np.stack(c, -1).astype(np.uint32)


def key_of(seed: int) -> tuple[int, int]:
    """Cut a seed into the two words of a key."""
    return seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF


def least_kept(p: float) -> int:
    """Find the lowest word for which an element is kept, where the share p of all words is lower.  0 <= p < 1"""
    return min(round(p * 2**32), 2**32 - 1)


def kept(counters: np.ndarray, elements: int, seed: int, module: int, p: float) -> np.ndarray:
    """Draw the elements of sequences that dropout keeps, bool (B,elements); see reference.dropout.  counters (B,2) int32"""
    each = -(-elements // 4)
    counter = np.empty((len(counters), each, 4), np.uint32)
    counter[..., 0], counter[..., 1] = np.arange(each, dtype=np.uint32), module
    counter[..., 2:] = counters.astype(np.uint32)[:, None]
    drawn = words(counter, key_of(seed)).reshape(len(counters), -1)[:, :elements]
    return drawn >= np.uint32(least_kept(p))
