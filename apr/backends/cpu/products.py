# mypy: ignore-errors
"""Matrix products of bfloat16 by the dot products of tiles.py: operands are put in order once for each product (order.py),
then every block of 32 x 32 sums runs over all terms. Imported where the processor has the instructions.
"""

import numba
import numpy as np
from numba import njit, prange, types

from . import attention, order
from .bfloat16 import bfloat16
from .kernels import _kernel, _row, grid
from .start import compile_all
from .tiles import BLOCK_BYTES, EDGE, ROWS, dot_rows

_kernels = []  # (kernel, signature)


@_kernel("void(act[:,:], act[::1], boolean, act[::1], act[::1], int64, boolean, int64, int64)", into=_kernels)
def product(out, left, by_pairs, right, bias, k, adds, rows, cols):
    """out = A B + bias, or += A B, of operands in order; by_pairs: the left one lies pair after pair."""
    m, n = out.shape
    mb, nb, kb = (m + EDGE - 1) // EDGE, (n + EDGE - 1) // EDGE, (k + EDGE - 1) // EDGE
    pa, pb, po, so = left.ctypes.data, right.ctypes.data, out.ctypes.data, out.strides[0]
    for p in prange(rows * cols):
        i0, i1 = mb * (p // cols) // rows, mb * (p // cols + 1) // rows
        j0, j1 = nb * (p % cols) // cols, nb * (p % cols + 1) // cols
        sums = np.empty((EDGE, EDGE), np.float32)
        ps = sums.ctypes.data
        for j in range(j0, j1):
            width, b = min(EDGE, n - j * EDGE), np.uintp(pb + j * kb * BLOCK_BYTES)
            for i in range(i0, i1):
                height, to = min(EDGE, m - i * EDGE), po + i * EDGE * so + j * EDGE * out.itemsize
                for r in range(0, height, ROWS):
                    a = np.uintp(pa + i * kb * BLOCK_BYTES + r * (4 if by_pairs else 2 * EDGE))
                    if width == EDGE and r + ROWS <= height and bias.size == 0:
                        if by_pairs:
                            dot_rows(out, np.uintp(to + r * so), so, adds, a, 4, 4 * EDGE, b, kb)
                        else:
                            dot_rows(out, np.uintp(to + r * so), so, adds, a, 2 * EDGE, 4, b, kb)
                        continue
                    if by_pairs:
                        dot_rows(sums, np.uintp(ps), 4 * EDGE, False, a, 4, 4 * EDGE, b, kb)
                    else:
                        dot_rows(sums, np.uintp(ps), 4 * EDGE, False, a, 2 * EDGE, 4, b, kb)
                    for e in range(min(ROWS, height - r)):
                        own, some = _row(out, to + (r + e) * so, width), sums[e][:width]
                        if bias.size > 0:
                            more = bias[j * EDGE : j * EDGE + width]
                            for c in range(width):
                                own[c] = some[c] + more[c]
                        elif adds:
                            for c in range(width):
                                own[c] += some[c]
                        else:
                            for c in range(width):
                                own[c] = some[c]
        sums[0, 0] = 0  # keeps it alive until here, as in attention_fwd


_FLOATS = np.empty(1, np.float32)
NO_CONFIG = np.empty(0, np.uint8)


@njit
def _block(sums, a, b, blocks, adds):
    """See tile_block of amx.py."""
    for r in range(0, EDGE, ROWS):
        to, left = np.uintp(sums + 4 * EDGE * r), np.uintp(a + 2 * EDGE * r)
        dot_rows(_FLOATS, to, 4 * EDGE, adds, left, 2 * EDGE, 4, b, blocks)


@njit
def _nothing(config=0):
    """Nothing stands around dot products."""


_blocks = {"block": _block, "begin": _nothing, "end": _nothing}
_forward, _backward = (
    attention.compiled(f, "dots", _kernels, **_blocks) for f in (attention.forward, attention.backward)
)
_flat, _i64 = types.Array(bfloat16, 1, "C"), types.int64
_kernels.append(  # gradients of parameters are float32
    (
        product,
        types.void(
            *(types.Array(types.float32, 2, "A"), _flat, types.boolean, _flat, _flat, _i64),
            *(types.boolean, _i64, _i64),
        ),
    )
)
_NO_BIAS = np.empty(0, np.uint16)
columns, terms = order.columns, order.terms  # right operands of multiply


def rows(x):
    """Put the rows of x (M,K) in order, for the left side."""
    return order.rows(x), False


def transposed(x):
    """Put x (K,M) in order, for the left side as x^T."""
    return order.pairs(x), True


def multiply(out, left, b, k, bias=None, adds=False):
    """out = A B + bias, or += A B, with operands of the functions above and k terms."""
    bias = _NO_BIAS.view(b.dtype) if bias is None else bias
    cut = grid(numba.get_num_threads(), *out.shape)
    product(out, *left, b, bias, k, adds, *cut)


def attention_fwd(*args):
    """See attention.py."""
    _forward(*args, NO_CONFIG)


def attention_bwd(*args):
    """See attention.py."""
    _backward(*args, NO_CONFIG)


compile_all(
    [*_kernels, *(order.kernels[name] for name in ("put_rows", "put_pairs", "put_columns"))], __name__, 25
)
