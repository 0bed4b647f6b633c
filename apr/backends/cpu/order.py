# mypy: ignore-errors
"""Put the operands of a matrix product in order: blocks of 32 rows and 32 terms, 2 KiB that lie together, 0 behind the edges.

| form         | side  | a block                                                                                      |
|--------------|-------|----------------------------------------------------------------------------------------------|
| rows         | left  | row after row, the 16 pairs of terms of each                                                 |
| pairs, of 32 | left  | pair after pair, 32 rows of each: a transposed operand, for the dot products                 |
| pairs, of 16 | right | two halves of 16 columns, in each pair after pair: one that is stored term by term           |
| columns      | right | the same, of one that is stored column by column                                             |
| turned       | left  | row after row, of one that is stored term by term: a transposed operand, for tiles (a block) |
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .kernels import _row
from .tiles import BLOCK_BYTES, EDGE

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_WORDS, _HALVES = ir.VectorType(_I32, 16), ir.VectorType(ir.IntType(16), 16)


@intrinsic
def zip_rows(typing, to, one, two):
    """Write 16 elements of 2 bytes at `one` and at `two` in turn."""

    def generate(context, builder, signature, args):
        to, *rows = args
        x, y = (builder.load(builder.inttoptr(at, _HALVES.as_pointer())) for at in rows)
        x.align = y.align = 2
        order = ir.Constant(ir.VectorType(_I32, 32), [16 * (j % 2) + j // 2 for j in range(32)])
        both = builder.shuffle_vector(x, y, order)
        builder.store(both, builder.inttoptr(to, both.type.as_pointer())).align = 2
        return context.get_dummy_value()

    u = types.uintp
    return types.void(u, u, u), generate


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


@intrinsic
def copy_rows(typing, to, at, row_bytes, height, width):
    """Write `height` rows of `width` elements of 2 bytes, row_bytes apart, as 32 rows of 32, 0 behind the edges."""

    def generate(context, builder, signature, args):
        name = "apr_copy_rows"
        f = builder.module.globals.get(name)
        if f is None:
            f = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [x.type for x in args]), name)
            f.linkage = "internal"
            f.attributes.add("noinline")
            _emit_copy(f)
        builder.call(f, args)
        return context.get_dummy_value()

    u, i = types.uintp, types.int64
    return types.void(u, u, i, i, i), generate


def _emit_copy(f):
    start, loop, done = (f.append_basic_block(name) for name in ("start", "loop", "done"))
    builder = ir.IRBuilder(start)
    to, at, row_bytes, height, width = f.args
    row = ir.VectorType(ir.IntType(16), EDGE)
    nothing = ir.Constant(row, [0] * EDGE)

    def lanes(x, kind):
        one = builder.insert_element(ir.Constant(kind, ir.Undefined), x, _I32(0))
        return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, EDGE), [0] * EDGE))

    numbers = ir.VectorType(ir.IntType(8), EDGE)
    of_row = lanes(builder.trunc(width, ir.IntType(8)), numbers)
    inside = builder.icmp_signed("<", ir.Constant(numbers, list(range(EDGE))), of_row)
    none = ir.Constant(inside.type, [0] * EDGE)
    builder.branch(loop)
    builder.position_at_end(loop)
    r = builder.phi(_I64)
    r.add_incoming(_I64(0), start)
    seen = builder.select(builder.icmp_signed("<", r, height), inside, none)
    pointer = builder.inttoptr(builder.add(at, builder.mul(r, row_bytes)), row.as_pointer())
    name = f"llvm.masked.load.v{EDGE}i16.p0"
    kind = ir.FunctionType(row, [pointer.type, _I32, inside.type, row])
    load = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    x = builder.call(load, [pointer, _I32(2), seen, nothing])
    place = builder.inttoptr(builder.add(to, builder.mul(r, _I64(2 * EDGE))), row.as_pointer())
    builder.store(x, place).align = 2
    following = builder.add(r, _I64(1))
    r.add_incoming(following, loop)
    builder.cbranch(builder.icmp_unsigned("<", following, _I64(EDGE)), loop, done)
    builder.position_at_end(done)
    builder.ret_void()


# One block: `height` rows of `width` elements at `at`, `stride` bytes apart, go to `to`; x is any array of their dtype.


@njit(error_model="numpy")
def row_block(x, to, at, stride, height, width):
    """Row after row."""
    copy_rows(np.uintp(to), np.uintp(at), np.int64(stride), np.int64(height), np.int64(width))


@njit(error_model="numpy")
def pair_block(x, to, at, stride, height, width, half):
    """Pair after pair, a pair being two rows, `half` columns together."""
    for h in range(EDGE // half):
        n = max(0, min(half, width - h * half))
        for p in range(EDGE // 2):
            n0, n1 = n if 2 * p < height else 0, n if 2 * p + 1 < height else 0
            here, place = at + h * half * 2 + 2 * p * stride, to + 4 * half * (h * (EDGE // 2) + p)
            if n1 == half:
                for e in range(0, half, 16):
                    zip_rows(np.uintp(place + 4 * e), np.uintp(here + 2 * e), np.uintp(here + stride + 2 * e))
            else:
                one, two, part = _row(x, here, n0), _row(x, here + stride, n1), _row(x, place, 2 * half)
                for e in range(2 * half):
                    part[e] = 0
                for e in range(n0):
                    part[2 * e] = one[e]
                for e in range(n1):
                    part[2 * e + 1] = two[e]


@njit(error_model="numpy")
def column_block(x, to, at, stride, height, width, spare):
    """Two halves of 16 rows that become columns, pair after pair; spare: 2 KiB to use."""
    if height < EDGE or width < EDGE:
        row_block(x, spare, at, stride, height, width)
        at, stride = spare, np.int64(2 * EDGE)
    for h in range(2):
        turn(np.uintp(to + h * (BLOCK_BYTES // 2)), np.uintp(at + 16 * h * stride), stride)


@njit(error_model="numpy")
def turned_block(x, to, at, stride, height, width, spare):
    """Columns that become rows, row after row; spare: 2 KiB to use."""
    pair_block(x, spare, at, stride, height, width, 16)
    for h in range(0, BLOCK_BYTES, BLOCK_BYTES // 2):
        turn(np.uintp(to + h), np.uintp(spare + h), np.int64(2 * EDGE))
