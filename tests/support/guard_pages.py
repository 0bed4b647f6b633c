"""Run all ops of the CPU on arrays between pages that cannot be touched: a byte too far ends the process.

python guard_pages.py [beyond]     beyond: an operand has a row that is not its own, which must end the process
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from apr import backends
from apr.backends.contract import BF16
from apr.backends.cpu import kernels
from cases import ROWS, make, overlay, run

SHAPES = (  # N, I, O
    *((1, 1, 1), (9, 1, 1), (16, 32, 32), (33, 40, 59), (97, 123, 257), (64, 96, 64), (64, 1025, 70)),
    *((40, 1100, 600), (512, 288, 320), (8, 32, 64), (3, 5, 7)),
)
FEW = ((1, 1, 1), (1, 1, 33), (2, 1, 5), (1, 3, 5), (3, 2, 33), (8, 5, 1), (1, 33, 2), (5, 64, 33))
HEADS = (
    (1, 9, 1, 1, 16),
    (2, 33, 2, 1, 32),
    (1, 100, 4, 2, 64),
    (1, 257, 6, 6, 48),
)  # B, T, H, K and their size


def guarded(shape: tuple[int, ...], kind: Any, at_end: bool) -> Any:
    """An array that ends where its last page ends, or begins where its first one does."""
    size, page = int(np.prod(shape)) * np.dtype(kind).itemsize, mmap.PAGESIZE
    pages = -(-size // page)
    room = mmap.mmap(-1, (pages + 2) * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(room))
    for at in (base, base + (pages + 1) * page):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(at), page, 0) == 0
    start = page + (pages * page - size if at_end else 0)
    return np.frombuffer(room, np.uint8, size, start).view(kind).reshape(shape)


def rows(kind: Any) -> None:
    """Run all rows of cases.py; what they give is compared with nothing."""
    for at_end in (True, False):
        be = overlay(backends.get("cpu"), empty=lambda n, kind, at_end=at_end: guarded((n,), kind, at_end))
        for row in ROWS:
            run(be, row, kind, make(row, kind), band=0)


def few() -> None:
    """Multiply few rows by weights of every kind, those of int8 too, which are no op of the contract."""
    rng = np.random.default_rng(0)
    for at_end in (True, False):
        for n, i, o in FEW:
            for kind, stored in ((BF16, BF16), (np.float32, np.float32), (np.float32, np.int8)):
                x, y = guarded((n, i), kind, at_end), guarded((n, o), kind, at_end)
                w, scale = guarded((o, i), stored, at_end), guarded((o,), np.float32, at_end)
                x[...], scale[...] = rng.standard_normal((n, i)), rng.uniform(0.5, 2, o)
                w[...] = rng.integers(-127, 128, (o, i))
                factor = scale.astype(np.float64) if stored == np.int8 else np.ones(o)
                want = x.astype(np.float64) @ (factor[:, None] * w.astype(np.float64)).T
                for times in (1, 2):  # y = , and y +=
                    if stored == np.int8:
                        kernels.linear_few_int8(y, x, w, scale, times == 2)
                    else:
                        kernels.linear_few(y, x, w, times == 2)
                    off = np.abs(y.astype(np.float64) - times * want).max()
                    bound = 2.0**-6 if kind == BF16 else 2.0**-18
                    assert off <= bound * np.abs(want).max(), (n, i, o, stored, times)


def calls(kind: Any, is_beyond: bool) -> None:
    """Call products and attention at sizes where their blocks end; nothing is compared."""
    be, rng = backends.get("cpu"), np.random.default_rng(0)
    be.empty(0, kind)
    for at_end in (True, False):

        def new(*shape: int, kind: Any = kind, at_end: bool = at_end) -> Any:
            x = guarded(shape, kind, at_end)
            x[...] = rng.standard_normal(shape)
            return x

        for n, i, o in SHAPES:
            x, w, b, dy, y, dx = new(n, i), new(o, i), new(o), new(n, o), new(n, o), new(n, i)
            dw, db = new(o, i, kind=np.float32), new(o, kind=np.float32)
            if is_beyond:
                x = as_strided(x, (n + 1, i), x.strides)[1:]
            for bias in (None, b):
                be.linear_fwd(y, x, w, bias)
            for adds in (True, False):
                be.linear_bwd(dx, dw, db, dy, x, w, adds)
        for b, t, h, k, d in HEADS:
            (q, y, dy, dq), (keys, v, dk, dv) = ([new(b, t, heads, d) for _ in range(4)] for heads in (h, k))
            lse = new(b, h, t, kind=np.float32)
            be.attention_fwd(y, lse, q, keys, v, None, 0)
            be.attention_bwd(dq, dk, dv, dy, y, lse, q, keys, v, None, 0)


if __name__ == "__main__":
    for kind in (BF16, np.float32):
        calls(kind, sys.argv[1:] == ["beyond"])
        rows(kind)
    few()
    print("done")
