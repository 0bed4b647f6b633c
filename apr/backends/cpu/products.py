# mypy: ignore-errors
"""Matrix products of bfloat16 by the blocks of tiles.py: operands are put in order once for each product, then every block
of 32 x 32 sums runs over all terms. Imported where the processor has the instructions.

A block of 32 rows and 32 terms of an operand is 2 KiB that lie together. Its left form holds 16 pairs of terms of a row, row
after row; its right form, and the left one of a transposed operand, the 32 rows of a pair, pair after pair.
"""

import threading

import numba
import numpy as np
from numba import prange, types

from .bfloat16 import bfloat16
from .kernels import _kernel, _row, grid, low
from .start import compile_all
from .tiles import BLOCK_BYTES, EDGE, ROWS, dot_rows

_BLOCK = BLOCK_BYTES // 2  # elements
_held = threading.local()  # room for operands in order, of each thread
_others = len(low)


@_kernel("void(act[::1], act[:,:])")
def put_rows(to, x):
    """Put rows x (M,K) in order, row after row; what is behind its edges is 0."""
    m, k = x.shape
    mb, kb = (m + EDGE - 1) // EDGE, (k + EDGE - 1) // EDGE
    px = x.ctypes.data
    for i in prange(mb):
        for j in range(kb):
            for r in range(EDGE):
                n = min(EDGE, k - j * EDGE) if i * EDGE + r < m else 0
                row = _row(x, px + min(m - 1, i * EDGE + r) * x.strides[0] + j * EDGE * x.itemsize, n)
                start = (i * kb + j) * _BLOCK + r * EDGE
                part = to[start : start + EDGE]
                if n == EDGE:
                    for e in range(EDGE):
                        part[e] = row[e]
                else:
                    for e in range(EDGE):
                        part[e] = 0
                    for e in range(n):
                        part[e] = row[e]


@_kernel("void(act[::1], act[:,:], int64)")
def put_pairs(to, x, half):
    """Put x (K,M), whose rows are terms, in order, pair after pair, `half` columns of a block together."""
    k, m = x.shape
    mb, kb = (m + EDGE - 1) // EDGE, (k + EDGE - 1) // EDGE
    px, parts = x.ctypes.data, EDGE // half
    for j in prange(kb):
        for i in range(mb):
            for h in range(parts):
                c = i * EDGE + h * half
                n = max(0, min(half, m - c))
                for p in range(EDGE // 2):
                    k0 = j * EDGE + 2 * p
                    n0, n1 = n if k0 < k else 0, n if k0 + 1 < k else 0
                    one = _row(x, px + min(k - 1, k0) * x.strides[0] + min(c, m - 1) * x.itemsize, n0)
                    two = _row(x, px + min(k - 1, k0 + 1) * x.strides[0] + min(c, m - 1) * x.itemsize, n1)
                    start = (i * kb + j) * _BLOCK + h * (_BLOCK // parts) + p * 2 * half
                    part = to[start : start + 2 * half]
                    if n1 == half:
                        for e in range(half):
                            part[2 * e] = one[e]
                            part[2 * e + 1] = two[e]
                    else:
                        for e in range(2 * half):
                            part[e] = 0
                        for e in range(n0):
                            part[2 * e] = one[e]
                        for e in range(n1):
                            part[2 * e + 1] = two[e]


@_kernel("void(act[::1], act[:,:])")
def put_columns(to, x):
    """Put x (N,K), whose rows are columns of the right operand, in order, pair after pair."""
    m, k = x.shape
    mb, kb = (m + EDGE - 1) // EDGE, (k + EDGE - 1) // EDGE
    px = x.ctypes.data
    for i in prange(mb):
        for r in range(EDGE):
            row = _row(x, px + min(m - 1, i * EDGE + r) * x.strides[0], k)
            is_row = i * EDGE + r < m
            for j in range(kb):
                start = (i * kb + j) * _BLOCK + r // 16 * (_BLOCK // 2) + r % 16 * 2
                part = to[start : start + _BLOCK // 2 - r % 16 * 2]
                n = min(EDGE, k - j * EDGE) if is_row else 0
                for p in range(EDGE // 2):
                    for e in range(2):
                        if 2 * p + e < n:
                            part[32 * p + e] = row[j * EDGE + 2 * p + e]
                        else:
                            part[32 * p + e] = 0


@_kernel("void(act[:,:], act[::1], boolean, act[::1], act[::1], int64, boolean, int64, int64)")
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


_flat, _i64 = types.Array(bfloat16, 1, "C"), types.int64
low.append(  # gradients of parameters are float32
    (
        product,
        types.void(
            *(types.Array(types.float32, 2, "A"), _flat, types.boolean, _flat, _flat, _i64),
            *(types.boolean, _i64, _i64),
        ),
    )
)
_NO_BIAS = np.empty(0, np.uint16)


def _room(slot, rows, terms, like):
    size = -(-rows // EDGE) * -(-terms // EDGE) * _BLOCK
    held = vars(_held).get(slot)
    if held is None or held.size < size:
        held = vars(_held)[slot] = np.empty(size, like.dtype)
    return held[:size]


def rows(x):
    """Put the rows of x (M,K) in order, for the left side."""
    to = _room("left", *x.shape, x)
    put_rows(to, x)
    return to, False


def transposed(x):
    """Put x (K,M) in order, for the left side as x^T."""
    to = _room("left", *x.shape[::-1], x)
    put_pairs(to, x, EDGE)
    return to, True


def terms(x):
    """Put x (K,N) in order, for the right side."""
    to = _room("right", *x.shape[::-1], x)
    put_pairs(to, x, 16)
    return to


def columns(x):
    """Put x (N,K) in order, for the right side as x^T."""
    to = _room("right", *x.shape, x)
    put_columns(to, x)
    return to


def multiply(out, left, b, terms, bias=None, adds=False):
    """out = A B + bias, or += A B, with operands of the functions above and so many terms."""
    bias = _NO_BIAS.view(b.dtype) if bias is None else bias
    cut = grid(numba.get_num_threads(), *out.shape)
    product(out, *left, b, bias, terms, adds, *cut)


compile_all(low[_others:], __name__)
