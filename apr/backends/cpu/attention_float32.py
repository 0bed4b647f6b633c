# mypy: ignore-errors
"""Attention of float32 by the blocks of attention.py, multiplied in vectors of 512 bits. Compiled where the processor has them.

A block is 32 rows of 32 float32. The left operand of a product lies row after row, of queries or, turned, of terms; the right one
in two halves of 16 columns, in each term after term. A sum adds its terms in order, each in one fused operation.
"""

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from . import attention, softmax_float32
from .kernels import _row
from .order import turn
from .start import compile_all
from .tiles import EDGE, SUMS_BYTES, has_vectors

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_SUMS = ir.VectorType(_F32, 16)
ROWS = 8  # of sums that stay in registers
TERMS = 4  # of a pass through the loop: LLVM reads ahead, and has no registers for more
HALF = SUMS_BYTES // 2  # bytes of 16 columns of a right operand's block
_FLOATS, _NO_CONFIG = np.empty(1, np.float32), np.empty(0, np.uint8)
_kernels = []  # (kernel, signature)


def _call(is_turned, columns):
    def generate(context, builder, signature, args):
        adds = context.cast(builder, args[4], types.boolean, types.boolean)
        builder.call(_rows_function(builder.module, is_turned, columns), [*args[:4], adds])
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp, types.int64, types.boolean), generate


@intrinsic
def fma_rows(typing, sums, a, b, steps, adds):
    """Compute ROWS rows of 32 sums of so many times TERMS terms, from 0 or from those that are there."""
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
    name = f"apr_fma_{'turned' if is_turned else 'rows'}_{columns}"
    if name in module.globals:
        return module.globals[name]
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I64] * 4 + [ir.IntType(1)]), name)
    f.linkage = "internal"
    f.attributes.add("noinline")
    start, loop, done = (f.append_basic_block(name) for name in ("start", "terms", "done"))
    builder = ir.IRBuilder(start)
    sums, a, b, steps, adds = f.args
    name = "llvm.fma.v16f32"
    fma = module.globals.get(name) or ir.Function(module, ir.FunctionType(_SUMS, [_SUMS] * 3), name)
    of_row, of_term = (4, 4 * EDGE) if is_turned else (4 * EDGE, 4)
    places = [builder.add(sums, _I64(4 * EDGE * r + 64 * c)) for r in range(ROWS) for c in range(columns)]

    def load(address, kind):
        x = builder.load(builder.inttoptr(address, kind.as_pointer()))
        x.align = 4
        return x

    def spread(x):
        one = builder.insert_element(ir.Constant(_SUMS, ir.Undefined), x, _I32(0))
        return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, 16), [0] * 16))

    nothing = ir.Constant(_SUMS, [0.0] * 16)
    before = [builder.select(adds, load(place, _SUMS), nothing) for place in places]
    builder.branch(loop)
    builder.position_at_end(loop)
    n = builder.phi(_I64)
    n.add_incoming(_I64(0), start)
    own = [builder.phi(_SUMS) for _ in before]
    new = list(own)
    of_block = builder.mul(builder.udiv(n, _I64(EDGE // TERMS)), _I64(SUMS_BYTES))
    here = builder.urem(n, _I64(EDGE // TERMS))
    a0, b0 = (
        builder.add(base, builder.add(of_block, builder.mul(here, _I64(TERMS * size))))
        for base, size in ((a, of_term), (b, 64))
    )
    for t in range(TERMS):
        right = [load(builder.add(b0, _I64(64 * t + HALF * c)), _SUMS) for c in range(columns)]
        for r in range(ROWS):
            x = spread(load(builder.add(a0, _I64(of_row * r + of_term * t)), _F32))
            for c, y in enumerate(right):
                i = r * columns + c
                new[i] = builder.call(fma, [x, y, new[i]])
    following = builder.add(n, _I64(1))
    n.add_incoming(following, loop)
    for s, x, y in zip(own, before, new, strict=True):
        s.add_incoming(x, start)
        s.add_incoming(y, loop)
    builder.cbranch(builder.icmp_unsigned("<", following, steps), loop, done)
    builder.position_at_end(done)
    for place, x in zip(places, new, strict=True):
        builder.store(x, builder.inttoptr(place, _SUMS.as_pointer())).align = 4
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


@njit(error_model="numpy", inline="always")
def _put_16(to, at, n):
    """Write n elements, and 0 behind them, as a vector."""
    own = _row(_FLOATS, to, 16)
    if n == 16:
        row = _row(_FLOATS, at, 16)
        for e in range(16):
            own[e] = row[e]
    else:
        for e in range(16):
            own[e] = 0
        row = _row(_FLOATS, at, max(n, 0))
        for e in range(n):
            own[e] = row[e]


@njit(error_model="numpy")
def row_block(x, to, at, stride, height, width):
    """Row after row, 0 behind the edges: see order.py."""
    for r in range(EDGE):
        for h in range(2):
            n = min(16, width - 16 * h) if r < height else 0
            _put_16(to + 4 * EDGE * r + 64 * h, at + r * stride + 64 * h, n)


@njit(error_model="numpy")
def term_block(x, to, at, stride, height, width, half):
    """Two halves of 16 columns, in each row after row; nobody reads a half without columns."""
    for h in range((width + 15) // 16):
        for r in range(EDGE):
            n = min(16, width - 16 * h) if r < height else 0
            _put_16(to + HALF * h + 64 * r, at + r * stride + 64 * h, n)


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
_forward, _backward = (
    attention.compiled(f, "float32", _kernels, "float32", **kind)
    for f in (attention.forward, attention.backward)
)


def attention_fwd(*args):
    """See attention.py."""
    _forward(*args, numba.get_num_threads(), _NO_CONFIG)


def attention_bwd(*args):
    """See attention.py."""
    _backward(*args, _NO_CONFIG)


if has_vectors():
    compile_all(_kernels, __name__, 15)
