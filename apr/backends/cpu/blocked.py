# mypy: ignore-errors
"""A matrix product of bfloat16 cut for threads and caches, around the blocks of 32 x 32 sums of products.py or of tiled.py.

Of a block of columns of B some blocks of terms are put in order (order.py) just before they are read, and stay in the first
cache, or near it: up to TERMS_IN_PLACE of them where A is read where it lies, for its rows are whole, else TERM_BLOCKS.
LEFT_BLOCKS of A stay in the second cache. Sums go on where the terms before them ended: no bit depends on the blocks.

`product` is bound to one kind of blocks and compiled by its module: `begin` and `end` stand around them, `turned` puts a block
of A^T in order, `step` multiplies and writes one, and may leave it to `write` to be written while the next one is computed.
"""

from types import FunctionType

import numba
import numpy as np
from numba import njit, prange, types

from .bfloat16 import bfloat16
from .kernels import _kernel, _row
from .order import column_block, pair_block, row_block
from .tiles import BLOCK_BYTES, EDGE, LINE, SUMS_BYTES

TERM_BLOCKS, TERMS_IN_PLACE, LEFT_BLOCKS, WHOLE_ROWS = 16, 16, 128, EDGE  # of a kind: see compiled()
begin = end = turned = step = write = None
_FLOATS = np.empty(1, np.float32)


def product(out, left, turns, right, by_columns, bias, adds, rows, cols, config):
    """out = A B + bias, or += A B; left: A, or where it turns A^T; right: B, or B^T, which has its columns as rows."""
    m, n = out.shape
    k = left.shape[0] if turns else left.shape[1]
    mb, nb, kb = (m + EDGE - 1) // EDGE, (n + EDGE - 1) // EDGE, (k + EDGE - 1) // EDGE
    pa, sa, pb, sb = left.ctypes.data, left.strides[0], right.ctypes.data, right.strides[0]
    po, so = out.ctypes.data, out.strides[0]
    lies = not turns and m % WHOLE_ROWS == 0 and k % EDGE == 0
    most = TERMS_IN_PLACE if lies else TERM_BLOCKS
    pieces = (kb + most - 1) // most
    depth = (kb + pieces - 1) // pieces
    pbias, bias_step = (bias.ctypes.data, 2 * EDGE) if bias.size > 0 else (0, 0)
    for p in prange(rows * cols):
        first, last = mb * (p // cols) // rows, mb * (p // cols + 1) // rows
        j0, j1 = nb * (p % cols) // cols, nb * (p % cols + 1) // cols
        high = max(1, min(LEFT_BLOCKS // depth, last - first))
        kept = 2 if pieces == 1 else high * (j1 - j0)
        sums = np.empty((kept * EDGE + 1, EDGE), np.float32)
        ps = (sums.ctypes.data + LINE - 1) // LINE * LINE
        room = np.empty((1 + depth + (0 if lies else high * depth)) * BLOCK_BYTES // 2 + LINE, np.uint16)
        spare = (room.ctypes.data + LINE - 1) // LINE * LINE
        b = spare + BLOCK_BYTES
        put = b + depth * BLOCK_BYTES
        # Nobody counts who holds this view: threads that count for each block wait for each other.
        like = _row(out, po, 1)
        begin(np.uintp(config.ctypes.data))
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
                                turned(left, to, pa + t * EDGE * sa + i * EDGE * 2, sa, width, height, spare)
                            else:
                                row_block(left, to, pa + i * EDGE * sa + t * EDGE * 2, sa, height, width)
                waiting, waiting_to = np.int64(0), np.int64(0)
                for j in range(j0, j1):
                    width = min(EDGE, n - j * EDGE)
                    for t in range(k0, k1):
                        to, terms = b + (t - k0) * BLOCK_BYTES, min(EDGE, k - t * EDGE)
                        if by_columns:
                            at = pb + j * EDGE * sb + t * EDGE * 2
                            column_block(right, to, at, sb, width, terms, spare)
                        else:
                            pair_block(right, to, pb + t * EDGE * sb + j * EDGE * 2, sb, terms, width, 16)
                    for i in range(i0, i1):
                        number = (j - j0) * (i1 - i0) + i - i0
                        own = ps + (number % 2 if pieces == 1 else number) * SUMS_BYTES
                        height, to = min(EDGE, m - i * EDGE), po + i * EDGE * so + j * EDGE * out.itemsize
                        if lies:
                            a, a_row, a_step = pa + i * EDGE * sa + k0 * EDGE * 2, sa, 2 * EDGE
                        else:
                            a, a_row, a_step = put + (i - i0) * (k1 - k0) * BLOCK_BYTES, 2 * EDGE, BLOCK_BYTES
                        of_bias, goes_on, ends = pbias + j * bias_step, piece > 0, piece + 1 == pieces
                        waiting, waiting_to = step(
                            *(like, to, so, adds, height, width, a, a_row, a_step, b, k1 - k0, turns),
                            *(of_bias, own, goes_on, ends, waiting, waiting_to),
                        )
                if waiting != 0:
                    write(like, waiting_to, so, waiting, adds)
        end()
        sums[0, 0] = 0  # keeps it alive until here, as in attention_fwd
        room[0] = 0


@njit(error_model="numpy")
def write_part(out, to, to_bytes, bias, sums, adds, height, width):
    """Write, or add, the upper left part of a block of sums, with the bias at an address (0: none)."""
    for r in range(height):
        row, some = _row(out, to + r * to_bytes, width), _row(_FLOATS, sums + 4 * EDGE * r, EDGE)
        if bias != 0:
            more = _row(out, bias, width)
            for c in range(width):
                row[c] = some[c] + more[c]
        elif adds:
            for c in range(width):
                row[c] += some[c]
        else:
            for c in range(width):
                row[c] = some[c]


def bound(name, **kind):
    """A copy of product with these functions and sizes; name: of this kind of blocks, for Numba's cache."""
    own = FunctionType(product.__code__, {**product.__globals__, **kind}, product.__name__)
    own.__qualname__, own.__module__ = f"product_{name}", product.__module__
    return own


def compiled(name, into, **kind):
    """The kernel of bound(); `into` gets it with its signatures: gradients of parameters are float32."""
    rows, flat, i = types.Array(bfloat16, 2, "A"), types.Array(bfloat16, 1, "C"), types.int64
    signature = (
        "void(act[:,:], act[:,:], boolean, act[:,:], boolean, act[::1], boolean, int64, int64, uint8[::1])"
    )
    kernel = _kernel(signature, into=into)(bound(name, **kind))
    wide, flags = types.Array(types.float32, 2, "A"), types.Array(types.uint8, 1, "C")
    flag = types.boolean
    into.append((kernel, types.void(wide, rows, flag, rows, flag, flat, flag, i, i, flags)))
    return kernel


def rows(x):
    """Take the rows of x (M,K) for the left side."""
    return x, False


def transposed(x):
    """Take x (K,M) for the left side as x^T."""
    return x, True


def columns(x):
    """Take x (N,K) for the right side as x^T."""
    return x, True


def terms(x):
    """Take x (K,N) for the right side."""
    return x, False


def multiply(kernel, cut, config, out, left, right, k, bias, adds):
    """out = A B + bias, or += A B, with operands of the functions above and k terms, on the grid that `cut` makes."""
    assert k, "a product without terms"
    bias = np.empty(0, right[0].dtype) if bias is None else bias
    kernel(out, *left, *right, bias, adds, *cut(numba.get_num_threads(), *out.shape), config)
