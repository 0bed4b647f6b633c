# mypy: ignore-errors
"""Compute products and attention of float32 in vectors of 512 bits. Compiled where the processor has them."""

from functools import cache
from threading import local

import numba
import numpy as np

from . import attention_float32, products_float32
from .kernels import grids
from .products_float32 import COLUMNS, ROOM_BYTES, ROWS
from .start import compile_all
from .tiles import has_vectors

LEAST = 24  # rows and columns of a result: fewer would mostly be multiplied with nothing
_NO_CONFIG = np.empty(0, np.uint8)
_rooms = local()
_kernels = [*products_float32._kernels, *attention_float32._kernels]  # (kernel, signature)


@cache
def _grid(parts, m, n):
    """Cut (m,n) for `parts` threads: the grid whose largest piece is the smallest; each cut of columns reads A once more."""
    m, n = -(-m // ROWS), -(-n // COLUMNS)
    return min(grids(parts), key=lambda rc: (-(-m // rc[0]) * -(-n // rc[1]) * (1 + 0.04 * rc[1]), rc[1]))


def _own_rooms(count):
    """Room for so many threads, of this thread of Python alone: others may compute at the same time."""
    rooms = getattr(_rooms, "all", None)
    if rooms is None or len(rooms) < count:
        rooms = _rooms.all = np.empty((count, ROOM_BYTES), np.uint8)
    return rooms


def multiply(out, a, b, alpha, adds, trans_a, trans_b):
    """out = alpha op(a) op(b), or += it."""
    if not a.size:  # no terms
        if not adds:
            out[...] = 0
        return
    threads = numba.get_num_threads()
    grid, rooms = _grid(threads, *out.shape), _own_rooms(threads)
    products_float32.product(out, a, trans_a, b, trans_b, alpha, adds, *grid, rooms)


def attention_fwd(*args):
    """See attention.py."""
    attention_float32.forward(*args, numba.get_num_threads(), _NO_CONFIG)


def attention_bwd(*args):
    """See attention.py."""
    attention_float32.backward(*args, _NO_CONFIG)


if has_vectors():
    compile_all(_kernels, __name__, 20)
