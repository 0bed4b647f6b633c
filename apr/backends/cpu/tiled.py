# mypy: ignore-errors
"""Matrix products of bfloat16 on the tiles of amx.py. Compiled where the processor has them."""

from functools import cache

import numba
import numpy as np
from numba import njit

from . import attention, blocked
from .amx import CONFIG, begin_tiles, end_tiles, put_block, tile_block, tile_rows
from .kernels import grids
from .order import turned_block
from .start import compile_all
from .tiles import EDGE, path

_kernels = []  # (kernel, signature)
rows, transposed, columns, terms = blocked.rows, blocked.transposed, blocked.columns, blocked.terms


@njit(error_model="numpy", forceinline=True)
def step(
    out, to, so, adds, height, width, a, a_row, a_step, b, blocks, turns, bias, sums, goes_on, ends, waiting, waiting_to
):  # fmt: skip
    """Multiply a block; one that is whole waits, to be written while the tiles of the next one run."""
    is_whole = bias == 0 and height == EDGE and width == EDGE
    tile_rows(np.uintp(sums), np.uintp(a), a_row, a_step, np.uintp(b), blocks, goes_on)
    if not ends:
        return waiting, waiting_to
    if waiting != 0:
        put_block(out, np.uintp(waiting_to), so, np.uintp(waiting), adds)
    if is_whole:
        return np.int64(sums), np.int64(to)
    blocked.write_part(out, to, so, bias, sums, adds, height, width)
    return np.int64(0), np.int64(0)


@njit(error_model="numpy")
def write(out, to, to_bytes, sums, adds):
    put_block(out, np.uintp(to), to_bytes, np.uintp(sums), adds)


@njit(error_model="numpy", forceinline=True)
def _block(sums, a, b, terms, width, adds):
    """See attention.py."""
    tile_block(sums, a, b, (terms + EDGE - 1) // EDGE, adds)


_blocks = {"block": _block, "block_turned": _block, "begin": begin_tiles, "end": end_tiles}
_forward, _backward = (
    attention.compiled(f, "tiles", _kernels, **_blocks) for f in (attention.forward, attention.backward)
)
kind = {"begin": begin_tiles, "end": end_tiles, "turned": turned_block, "step": step, "write": write}
product = blocked.compiled("tiles", _kernels, **kind, TERMS_IN_PLACE=64, LEFT_BLOCKS=512)


@cache
def _grid(parts, m, n):
    """Cut (m,n) for `parts` threads: the grid whose largest piece of blocks is the smallest, and then reads the least."""
    m, n = -(-m // EDGE), -(-n // EDGE)
    return min(grids(parts), key=lambda rc: (-(-m // rc[0]) * -(-n // rc[1]), rc[1] * m + rc[0] * n, rc))


def multiply(out, left, right, k, bias=None, adds=False):
    """See blocked.py."""
    blocked.multiply(product, _grid, CONFIG, out, left, right, k, bias, adds)


def attention_fwd(*args):
    """See attention.py."""
    _forward(*args, numba.get_num_threads(), CONFIG)


def attention_bwd(*args):
    """See attention.py."""
    _backward(*args, CONFIG)


if path() == "amx":  # elsewhere LLVM would end the process over the instructions
    compile_all(_kernels, __name__, 25)
