# mypy: ignore-errors
"""Matrix products of bfloat16 by the dot products of tiles.py. Compiled where the processor has the instructions.

Blocks for the caches: a thread puts up to TERM_BLOCKS of a block of columns of B in order (order.py) when it is about to read
them, and they stay in the first cache; LEFT_BLOCKS of A stay in the second, read where they lie if rows are whole, else put in
order too. Sums go on where the terms before them ended: no bit depends on the blocks.
"""

import numba
import numpy as np
from numba import njit, prange, types

from . import attention, order
from .bfloat16 import bfloat16
from .kernels import _kernel, _row, grid
from .order import column_block, pair_block, row_block
from .start import compile_all
from .tiles import BLOCK_BYTES, EDGE, LINE, ROWS, dot_rows, path

_kernels = []  # (kernel, signature)
TERM_BLOCKS, LEFT_BLOCKS = 16, 128
SUMS_BYTES = attention.SUMS_BYTES


@_kernel(
    "void(act[:,:], act[:,:], boolean, act[:,:], boolean, act[::1], boolean, int64, int64)", into=_kernels
)
def product(out, left, turns, right, by_columns, bias, adds, rows, cols):
    """out = A B + bias, or += A B; left: A, or where it turns A^T; right: B, or B^T, which has its columns as rows."""
    m, n = out.shape
    k = left.shape[0] if turns else left.shape[1]
    mb, nb, kb = (m + EDGE - 1) // EDGE, (n + EDGE - 1) // EDGE, (k + EDGE - 1) // EDGE
    pa, sa, pb, sb = left.ctypes.data, left.strides[0], right.ctypes.data, right.strides[0]
    po, so = out.ctypes.data, out.strides[0]
    pieces = (kb + TERM_BLOCKS - 1) // TERM_BLOCKS
    depth = (kb + pieces - 1) // pieces
    lies = not turns and m % ROWS == 0 and k % EDGE == 0
    pbias, bias_step = (bias.ctypes.data, 2 * EDGE) if bias.size > 0 else (0, 0)
    for p in prange(rows * cols):
        first, last = mb * (p // cols) // rows, mb * (p // cols + 1) // rows
        j0, j1 = nb * (p % cols) // cols, nb * (p % cols + 1) // cols
        high = max(1, min(LEFT_BLOCKS // depth, last - first))
        kept = 1 if pieces == 1 else high * (j1 - j0)
        sums = np.empty((kept * EDGE + 1, EDGE), np.float32)
        ps = (sums.ctypes.data + LINE - 1) // LINE * LINE
        room = np.empty((1 + depth + (0 if lies else high * depth)) * BLOCK_BYTES // 2 + LINE, np.uint16)
        spare = (room.ctypes.data + LINE - 1) // LINE * LINE
        b = spare + BLOCK_BYTES
        put = b + depth * BLOCK_BYTES
        for i0 in range(first, last, high):
            i1 = min(last, i0 + high)
            for piece in range(pieces):
                k0, k1 = kb * piece // pieces, kb * (piece + 1) // pieces
                if not lies:
                    for t in range(k0, k1):
                        for i in range(i0, i1):
                            to = put + ((i - i0) * (k1 - k0) + t - k0) * BLOCK_BYTES
                            height, width = min(EDGE, m - i * EDGE), min(EDGE, k - t * EDGE)
                            if turns:
                                pair_block(
                                    left, to, pa + t * EDGE * sa + i * EDGE * 2, sa, width, height, EDGE
                                )
                            else:
                                row_block(left, to, pa + i * EDGE * sa + t * EDGE * 2, sa, height, width)
                for j in range(j0, j1):
                    width = min(EDGE, n - j * EDGE)
                    for t in range(k0, k1):
                        to, terms = b + (t - k0) * BLOCK_BYTES, min(EDGE, k - t * EDGE)
                        if by_columns:
                            at = pb + j * EDGE * sb + t * EDGE * 2
                            column_block(right, to, at, sb, width, terms, spare)
                        else:
                            pair_block(right, to, pb + t * EDGE * sb + j * EDGE * 2, sb, terms, width, 16)
                    more = np.uintp(pbias + j * bias_step)
                    for i in range(i0, i1):
                        own = ps + ((j - j0) * (i1 - i0) + i - i0 if pieces > 1 else 0) * SUMS_BYTES
                        height, to = min(EDGE, m - i * EDGE), po + i * EDGE * so + j * EDGE * out.itemsize
                        if lies:
                            a, a_row, a_pair, a_step = pa + i * EDGE * sa + k0 * EDGE * 2, sa, 4, 2 * EDGE
                        else:
                            a = put + (i - i0) * (k1 - k0) * BLOCK_BYTES
                            a_row, a_pair = (4, 4 * EDGE) if turns else (2 * EDGE, 4)
                            a_step = BLOCK_BYTES
                        for r in range(0, height, ROWS):
                            is_whole = width == EDGE and r + ROWS <= height
                            ends, here = piece + 1 == pieces and is_whole, np.uintp(own + 4 * EDGE * r)
                            at, of_a = np.uintp(to + r * so), np.uintp(a + r * a_row)
                            dot_rows(
                                *(out, at, so, adds, of_a, a_row, a_pair, a_step, np.uintp(b), k1 - k0),
                                *(more, here, piece > 0, ends),
                            )
                            if is_whole or piece + 1 < pieces:
                                continue
                            for e in range(r, min(r + ROWS, height)):
                                row, some = (
                                    _row(out, to + e * so, width),
                                    _row(sums, own + 4 * EDGE * e, EDGE),
                                )
                                if bias.size > 0:
                                    of_row = bias[j * EDGE : j * EDGE + width]
                                    for c in range(width):
                                        row[c] = some[c] + of_row[c]
                                elif adds:
                                    for c in range(width):
                                        row[c] += some[c]
                                else:
                                    for c in range(width):
                                        row[c] = some[c]
        sums[0, 0] = 0  # keeps it alive until here, as in attention_fwd
        room[0] = 0


_FLOATS = np.empty(1, np.float32)
NO_CONFIG = np.empty(0, np.uint8)


@njit
def _block(sums, a, b, blocks, adds):
    """See tile_block of amx.py."""
    for r in range(0, EDGE, ROWS):
        to, left = np.uintp(sums + 4 * EDGE * r), np.uintp(a + 2 * EDGE * r)
        none = np.uintp(0)
        dot_rows(
            _FLOATS, to, 4 * EDGE, adds, left, 2 * EDGE, 4, BLOCK_BYTES, b, blocks, none, none, False, True
        )


@njit
def _nothing(config=0):
    """Nothing stands around dot products."""


_blocks = {"block": _block, "begin": _nothing, "end": _nothing}
_forward, _backward = (
    attention.compiled(f, "dots", _kernels, **_blocks) for f in (attention.forward, attention.backward)
)
_rows, _i64 = types.Array(bfloat16, 2, "A"), types.int64
_kernels.append(  # gradients of parameters are float32
    (
        product,
        types.void(
            *(types.Array(types.float32, 2, "A"), _rows, types.boolean, _rows, types.boolean),
            *(types.Array(bfloat16, 1, "C"), types.boolean, _i64, _i64),
        ),
    )
)
_NO_BIAS = np.empty(0, np.uint16)
rows, transposed = order.rows, order.transposed


def columns(x):
    """Take x (N,K) for the right side as x^T."""
    return x, True


def terms(x):
    """Take x (K,N) for the right side."""
    return x, False


def multiply(out, left, b, k, bias=None, adds=False):
    """out = A B + bias, or += A B, with operands of the functions above and k terms."""
    assert k, "a product without terms"
    bias = _NO_BIAS.view(b[0].dtype) if bias is None else bias
    cut = grid(numba.get_num_threads(), *out.shape)
    product(out, *left, *b, bias, adds, *cut)


def attention_fwd(*args):
    """See attention.py."""
    _forward(*args, NO_CONFIG)


def attention_bwd(*args):
    """See attention.py."""
    _backward(*args, NO_CONFIG)


if path() == "avx512_bf16":  # elsewhere LLVM would end the process over the instructions
    compile_all(_kernels, __name__, 25)
