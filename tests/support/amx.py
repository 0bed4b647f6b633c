"""TDPBF16PS in plain NumPy, after its definition in Intel's manual, and a product of blocks of it."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any
TERMS = 32  # of a tile
_LEAST = 2.0**-126  # the least normal float32; what rounds to it is one
_TINY = _LEAST * (1 - 2.0**-25)


def _rounded(x: Array) -> Array:
    """float32 of a float64, to the nearest even, with subnormal results flushed (tininess found after rounding)."""
    with np.errstate(over="ignore", under="ignore"):
        y = x.astype(np.float32)
    return np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), y), y)


def _read(x: Array) -> Array:
    """float64 of bfloat16 or float32, with subnormal numbers read as 0."""
    wide = x.astype(np.float64)
    return np.where(np.abs(wide) < _LEAST, np.copysign(0.0, wide), wide)


def tdpbf16ps(c: Array, a: Array, b: Array) -> Array:
    """c + a b of tiles, or of many: c (...,16,16) float32; a (...,16,32) bfloat16; b (...,16,16,2) bfloat16: pair, column, term.

    A product of two bfloat16 and a float32 add up in float64 such that a second rounding to float32 changes nothing."""
    wide_a, wide_b = _read(a), _read(b)
    even, odd = (np.zeros(c.shape, np.float32) for _ in range(2))
    for p in range(wide_b.shape[-3]):
        even = _rounded(even.astype(np.float64) + wide_a[..., 2 * p, None] * wide_b[..., p, None, :, 0])
        odd = _rounded(odd.astype(np.float64) + wide_a[..., 2 * p + 1, None] * wide_b[..., p, None, :, 1])
    both = _rounded(even.astype(np.float64) + odd.astype(np.float64))
    return _rounded(_read(c) + both.astype(np.float64))


def padded(x: Array, *to: int) -> Array:
    """x with zeros behind its edges, to multiples of these."""
    return np.pad(x, [(0, -n % m) for n, m in zip(x.shape, to, strict=True)])


def product(a: Array, b: Array) -> Array:
    """a b in float32: a (M,K) and b (K,N) bfloat16, tile by tile; every row of tiles at once."""
    m, n = len(a), b.shape[1]
    a, b = padded(a, 1, TERMS), padded(b, TERMS, 1)
    c = np.zeros((m, n), np.float32)
    for k in range(0, a.shape[1], TERMS):
        pairs = b[k : k + TERMS].reshape(TERMS // 2, 2, n).transpose(0, 2, 1)
        c = tdpbf16ps(c, a[:, k : k + TERMS], pairs)
    return c


def in_order(b: Array) -> Array:
    """b (K,N) for the right side of tiles: block, terms, tile, pair, column, term of the pair; zeros behind the edges."""
    kb, nb = (-(-n // TERMS) for n in b.shape)
    return padded(b, TERMS, TERMS).reshape(kb, 16, 2, nb, 2, 16).transpose(3, 0, 4, 1, 5, 2)


class Emulated:
    """The functions of tiled.py with every tile multiplied in plain NumPy, on any processor. A planted fault has a name."""

    def __init__(self, fault: str = "") -> None:
        self.rows, self.transposed = lambda x: x, lambda x: x.T
        self.columns, self.terms = lambda x: in_order(x.T), in_order
        self.fault = fault

    def multiply(
        self, out: Array, left: Array, right: Array, k: int, bias: Array | None = None, adds: bool = False
    ) -> None:
        """See tiled.py."""
        m, n = out.shape
        mb, nb, kb = (-(-x // TERMS) for x in (m, n, k))
        a = padded(left, TERMS, TERMS).reshape(mb, 2, 16, kb, TERMS)
        a = a.transpose(0, 3, 1, 2, 4)  # block, terms, tile, row, term
        b = right
        if self.fault == "tiles of the left exchanged":
            a = a[:, :, ::-1]
        elif self.fault == "tiles of the right exchanged":
            b = b[:, :, ::-1]
        elif self.fault == "pairs as rows":
            b = b.reshape(nb, kb, 2, 16, 2, 16).swapaxes(-1, -2)
        elif self.fault == "pair reversed":
            b = b[..., ::-1]
        elif self.fault == "last terms dropped" and k % TERMS:
            kb -= 1
        c = np.zeros((mb, 2, nb, 2, 16, 16), np.float32)
        for t in range(kb):
            c = tdpbf16ps(c, a[:, t, :, None, None], b[None, None, :, t])
        y = c.transpose(0, 1, 4, 2, 3, 5).reshape(mb * TERMS, nb * TERMS)[:m, :n]
        if bias is not None:
            y = y + bias.astype(np.float32)
        out[...] = out + y if adds else y
