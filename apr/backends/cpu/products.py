# mypy: ignore-errors
"""Matrix products of bfloat16 by the dot products of tiles.py. Compiled where the processor has the instructions."""

import numba
import numpy as np
from numba import njit

from . import attention, blocked
from .kernels import grid
from .order import pair_block
from .start import compile_all
from .tiles import BLOCK_BYTES, EDGE, ROWS, dot_rows, path

_kernels = []  # (kernel, signature)
rows, transposed, columns, terms = blocked.rows, blocked.transposed, blocked.columns, blocked.terms
_FLOATS = np.empty(1, np.float32)
NO_CONFIG = np.empty(0, np.uint8)


@njit(error_model="numpy")
def step(
    out, to, so, adds, height, width, a, a_row, a_step, b, blocks, turns, bias, sums, goes_on, ends, waiting, waiting_to
):  # fmt: skip
    """Multiply a block, rows of it at a time, and write what is whole from registers. Nothing waits."""
    a_row, a_pair = (4, 4 * EDGE) if turns else (a_row, 4)
    for r in range(0, height, ROWS):
        is_whole, here = width == EDGE and r + ROWS <= height, sums + 4 * EDGE * r
        to_row, of_a, writes = to + r * so, a + r * a_row, ends and is_whole
        dot_rows(
            *(out, np.uintp(to_row), so, adds, np.uintp(of_a), a_row, a_pair, a_step, np.uintp(b), blocks),
            *(np.uintp(bias), np.uintp(here), goes_on, writes),
        )
        if ends and not is_whole:
            blocked.write_part(out, to_row, so, bias, here, adds, min(ROWS, height - r), width)
    return np.int64(0), np.int64(0)


@njit(error_model="numpy")
def _turned(x, to, at, stride, height, width, spare):
    pair_block(x, to, at, stride, height, width, EDGE)


@njit
def _never(out, to, to_bytes, sums, adds):
    """No block waits."""


@njit
def _block(sums, a, b, terms, width, adds):
    """See attention.py."""
    blocks = (terms + EDGE - 1) // EDGE
    for r in range(0, EDGE, ROWS):
        to, left = np.uintp(sums + 4 * EDGE * r), np.uintp(a + 2 * EDGE * r)
        none = np.uintp(0)
        dot_rows(
            _FLOATS, to, 4 * EDGE, adds, left, 2 * EDGE, 4, BLOCK_BYTES, b, blocks, none, none, False, True
        )


@njit
def _nothing(config=0):
    """Nothing stands around dot products."""


_blocks = {"block": _block, "block_turned": _block, "begin": _nothing, "end": _nothing}
_forward, _backward = (
    attention.compiled(f, "dots", _kernels, **_blocks) for f in (attention.forward, attention.backward)
)
kind = {
    "begin": _nothing,
    "end": _nothing,
    "turned": _turned,
    "step": step,
    "write": _never,
    "WHOLE_ROWS": ROWS,
}
product = blocked.compiled("dots", _kernels, **kind)


def multiply(out, left, right, k, bias=None, adds=False):
    """See blocked.py."""
    blocked.multiply(product, grid, NO_CONFIG, out, left, right, k, bias, adds)


def attention_fwd(*args):
    """See attention.py."""
    _forward(*args, numba.get_num_threads(), NO_CONFIG)


def attention_bwd(*args):
    """See attention.py."""
    _backward(*args, NO_CONFIG)


if path() == "avx512_bf16":  # elsewhere LLVM would end the process over the instructions
    compile_all(_kernels, __name__, 25)
