# mypy: ignore-errors
"""Put the operands of a matrix product in order: blocks of 32 rows and 32 terms, 2 KiB that lie together, 0 behind the edges.

| form         | side  | a block                                                                                      |
|--------------|-------|----------------------------------------------------------------------------------------------|
| rows         | left  | row after row, the 16 pairs of terms of each                                                 |
| pairs, of 32 | left  | pair after pair, 32 rows of each: a transposed operand, for the dot products                 |
| pairs, of 16 | right | two halves of 16 columns, in each pair after pair: one that is stored term by term           |
| columns      | right | the same, of one that is stored column by column                                             |
| turned       | left  | row after row, of one that is stored term by term: a transposed operand, for tiles           |
"""

import threading

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from .kernels import _kernel, _row, low
from .tiles import BLOCK_BYTES, EDGE

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_WORDS = ir.VectorType(_I32, 16)
_BLOCK = BLOCK_BYTES // 2  # elements
_held = threading.local()  # room for operands in order, of each thread
_others = len(low)


@intrinsic
def turn(typing, to, at, row_bytes):
    """Transpose 16 x 16 words of 4 bytes: rows at `at`, row_bytes apart, become columns of 1 KiB at `to`."""

    def generate(context, builder, signature, args):
        to, at, row_bytes = args

        def vector(address):
            return builder.inttoptr(address, _WORDS.as_pointer())

        rows = []
        for r in range(16):
            x = builder.load(vector(builder.add(at, builder.mul(_I64(r), row_bytes))))
            x.align = 2
            rows.append(x)
        for s in (1, 2, 4, 8):  # exchange this bit of row and column
            low = ir.Constant(_WORDS, [16 + j - s if j & s else j for j in range(16)])
            high = ir.Constant(_WORDS, [16 + j if j & s else j + s for j in range(16)])
            for r in (r for r in range(16) if not r & s):
                x, y = rows[r], rows[r | s]
                rows[r], rows[r | s] = builder.shuffle_vector(x, y, low), builder.shuffle_vector(x, y, high)
        for r, x in enumerate(rows):
            builder.store(x, vector(builder.add(to, _I64(64 * r)))).align = 2
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.int64), generate


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
    px, stride, pt = x.ctypes.data, x.strides[0], to.ctypes.data
    for i in prange(mb):
        edge = np.zeros((EDGE, EDGE), np.uint16)
        pe, height = edge.ctypes.data, min(EDGE, m - i * EDGE)
        for j in range(kb):
            at, width = px + i * EDGE * stride + j * EDGE * x.itemsize, min(EDGE, k - j * EDGE)
            is_whole = height == EDGE and width == EDGE
            if not is_whole:
                for r in range(height):
                    row, part = _row(x, at + r * stride, width), _row(x, pe + 2 * EDGE * r, EDGE)
                    for e in range(width):
                        part[e] = row[e]
                    for e in range(width, EDGE):
                        part[e] = 0
            for h in range(2):
                start = pt + (i * kb + j) * BLOCK_BYTES + h * (BLOCK_BYTES // 2)
                if is_whole:
                    turn(np.uintp(start), np.uintp(at + 16 * h * stride), stride)
                else:
                    turn(np.uintp(start), np.uintp(pe + h * (BLOCK_BYTES // 2)), 2 * EDGE)
        edge[0, 0] = 0  # keeps it alive until here, as in attention_fwd


@_kernel("void(act[::1], act[:,:])")
def put_turned(to, x):
    """Put x (K,M), whose rows are terms, in order, row after row."""
    k, m = x.shape
    mb, kb = (m + EDGE - 1) // EDGE, (k + EDGE - 1) // EDGE
    px, pt = x.ctypes.data, to.ctypes.data
    for j in prange(kb):
        pairs = np.zeros((16, EDGE), np.uint16)
        pp = pairs.ctypes.data
        for i in range(mb):
            for h in range(2):
                c = i * EDGE + h * 16
                n = max(0, min(16, m - c))
                for p in range(16):
                    k0, part = j * EDGE + 2 * p, _row(x, pp + 2 * EDGE * p, EDGE)
                    n0, n1 = n if k0 < k else 0, n if k0 + 1 < k else 0
                    one = _row(x, px + min(k - 1, k0) * x.strides[0] + min(c, m - 1) * x.itemsize, n0)
                    two = _row(x, px + min(k - 1, k0 + 1) * x.strides[0] + min(c, m - 1) * x.itemsize, n1)
                    if n1 == 16:
                        for e in range(16):
                            part[2 * e] = one[e]
                            part[2 * e + 1] = two[e]
                    else:
                        for e in range(EDGE):
                            part[e] = 0
                        for e in range(n0):
                            part[2 * e] = one[e]
                        for e in range(n1):
                            part[2 * e + 1] = two[e]
                start = pt + (i * kb + j) * BLOCK_BYTES + h * (BLOCK_BYTES // 2)
                turn(np.uintp(start), np.uintp(pp), 2 * EDGE)
        pairs[0, 0] = 0  # keeps it alive until here, as in attention_fwd


kernels = {k.py_func.__name__: (k, signature) for k, signature in low[_others:]}


def room(slot, rows, terms, like):
    size = -(-rows // EDGE) * -(-terms // EDGE) * _BLOCK
    held = vars(_held).get(slot)
    if held is None or held.size < size:
        held = vars(_held)[slot] = np.empty(size, like.dtype)
    return held[:size]


def rows(x):
    """Put the rows of x (M,K) in order, for the left side."""
    to = room("left", *x.shape, x)
    put_rows(to, x)
    return to


def pairs(x):
    """Put x (K,M) in order, for the left side as x^T, pair after pair."""
    to = room("left", *x.shape[::-1], x)
    put_pairs(to, x, EDGE)
    return to


def turned(x):
    """Put x (K,M) in order, for the left side as x^T, row after row."""
    to = room("left", *x.shape[::-1], x)
    put_turned(to, x)
    return to


def terms(x):
    """Put x (K,N) in order, for the right side."""
    to = room("right", *x.shape[::-1], x)
    put_pairs(to, x, 16)
    return to


def columns(x):
    """Put x (N,K) in order, for the right side as x^T."""
    to = room("right", *x.shape, x)
    put_columns(to, x)
    return to
