# mypy: ignore-errors
"""Attention of float32 by the blocks of attention.py, multiplied in vectors of 512 bits. Compiled where the processor has them.

A block is 32 rows of 32 float32. The left operand of a product lies row after row, of queries or, turned, of terms; the right one
in two halves of 16 columns, in each term after term. The sum of a product begins at 0 and adds its terms in order, each in one
fused operation; then it is written, or added to what is there.
"""

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from . import attention, fma, softmax_float32
from .fma import FLAG, I64, put_16
from .kernels import _row
from .order import turn
from .tiles import EDGE, SUMS_BYTES

ROWS = 8  # of sums that stay in registers
TERMS = 4  # of a pass through the loop: see products_float32.py
HALF = SUMS_BYTES // 2  # bytes of 16 columns of a right operand's block
_kernels = []  # (kernel, signature)


def _call(is_turned, columns):
    def generate(context, builder, signature, args):
        adds = context.cast(builder, args[4], types.boolean, types.boolean)
        builder.call(_rows_function(builder.module, is_turned, columns), [*args[:4], adds])
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp, types.int64, types.boolean), generate


@intrinsic
def fma_rows(typing, sums, a, b, steps, adds):
    """Compute ROWS rows of 32 sums of so many times TERMS terms, written, or added to those that are there."""
    return _call(False, 2)


@intrinsic
def fma_half_rows(typing, sums, a, b, steps, adds):
    """fma_rows() of the first 16 columns."""
    return _call(False, 1)


@intrinsic
def fma_turned(typing, sums, a, b, steps, adds):
    """fma_rows() of the transpose of the left operand."""
    return _call(True, 2)


def _rows_function(module, is_turned, columns):
    name = f"apr_block_{'turned' if is_turned else 'rows'}_{columns}"
    f, builder = fma.function(module, name, [*[I64] * 4, FLAG])
    if builder is None:
        return f
    sums, a, b, steps, adds = f.args
    of_row, of_term = (4, 4 * EDGE) if is_turned else (4 * EDGE, 4)
    places = [builder.add(sums, I64(4 * EDGE * r + 64 * c)) for r in range(ROWS) for c in range(columns)]

    def body(n, sums):
        of_block = builder.mul(builder.udiv(n, I64(EDGE // TERMS)), I64(SUMS_BYTES))
        here = builder.urem(n, I64(EDGE // TERMS))
        left, right = (
            builder.add(base, builder.add(of_block, builder.mul(here, I64(TERMS * size))))
            for base, size in ((a, of_term), (b, 64))
        )
        halves = [builder.add(right, I64(HALF * c)) for c in range(columns)]
        return fma.add_terms(builder, sums, left, halves, TERMS, of_row, of_term)

    # From 0 also where there are sums already: they are larger, and each term added to them would be rounded to their size.
    new = fma.loop(builder, I64(0), steps, 1, fma.zeros(len(places)), body)
    for place, x, nothing in zip(places, new, fma.zeros(len(places)), strict=True):
        before = builder.select(adds, fma.load(builder, place), nothing)
        fma.store(builder, builder.fadd(before, x), place)
    builder.ret_void()
    return f


@njit(error_model="numpy")
def block(sums, a, b, terms, width, adds):
    """See attention.py."""
    steps = (terms + TERMS - 1) // TERMS
    for r in range(0, EDGE, ROWS):
        to, left = np.uintp(sums + 4 * EDGE * r), np.uintp(a + 4 * EDGE * r)
        if width > 16:
            fma_rows(to, left, b, steps, adds)
        else:
            fma_half_rows(to, left, b, steps, adds)


@njit(error_model="numpy")
def block_turned(sums, a, b, terms, height, adds):
    """See attention.py."""
    for r in range(0, height, ROWS):
        fma_turned(np.uintp(sums + 4 * EDGE * r), np.uintp(a + 4 * r), b, (terms + TERMS - 1) // TERMS, adds)


@njit(error_model="numpy")
def row_block(x, to, at, stride, height, width):
    """Row after row, 0 behind the edges: see order.py."""
    for r in range(EDGE):
        for h in range(2):
            n = min(16, width - 16 * h) if r < height else 0
            put_16(to + 4 * EDGE * r + 64 * h, at + r * stride + 64 * h, n)


@njit(error_model="numpy")
def term_block(x, to, at, stride, height, width, half):
    """Two halves of 16 columns, in each row after row; nobody reads a half without columns."""
    for h in range((width + 15) // 16):
        for r in range(EDGE):
            n = min(16, width - 16 * h) if r < height else 0
            put_16(to + HALF * h + 64 * r, at + r * stride + 64 * h, n)


@njit(error_model="numpy")
def column_block(x, to, at, stride, height, width, spare):
    """Two halves of 16 rows that become columns; spare: 4 KiB to use. Nobody reads terms behind `width`."""
    if height < EDGE or width % 16 != 0:
        row_block(x, spare, at, stride, height, width)
        at, stride = spare, np.int64(4 * EDGE)
    for h in range(2):
        for c in range((width + 15) // 16):
            turn(np.uintp(to + HALF * h + 1024 * c), np.uintp(at + 16 * h * stride + 64 * c), stride)


@njit(error_model="numpy")
def _as_it_lies(x, to, at, stride, height, width, spare):
    row_block(x, to, at, stride, height, width)


@njit(error_model="numpy")
def put_rows(like, floats, to, stride, sums, factors, rows, width):
    """See attention.py."""
    by = _row(floats, factors, EDGE)
    for r in range(rows):
        factor, own, some = (
            by[r],
            _row(like, to + r * stride, width),
            _row(floats, sums + 4 * EDGE * r, width),
        )
        for e in range(width):
            own[e] = some[e] * factor


@njit
def _nothing(config=0):
    """Nothing stands around these products."""


kind = {
    "SIZE": 4,
    "UNIT": 1.0,
    "BLOCK_BYTES": SUMS_BYTES,
    "block": block,
    "block_turned": block_turned,
    "begin": _nothing,
    "end": _nothing,
    "row_block": row_block,
    "pair_block": term_block,
    "column_block": column_block,
    "turned_block": _as_it_lies,
    "put_rows": put_rows,
    "exponentials": softmax_float32.exponentials,
    "gradients": softmax_float32.gradients,
    "dot_blocks": softmax_float32.dot_blocks,
}
forward, backward = (
    attention.compiled(f, "float32", _kernels, "float32", **kind)
    for f in (attention.forward, attention.backward)
)
