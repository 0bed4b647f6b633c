# mypy: ignore-errors
"""Sums of products of float32 that stay in registers of 512 bits, as LLVM's code; and copies of operands."""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .kernels import _row
from .softmax import _fma as fused
from .softmax import _lanes as spread
from .softmax import _load
from .softmax import _store as store
from .tiles import prefetch_line

FLAG, I32, I64, F32 = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.FloatType()
SUMS, QUARTER = ir.VectorType(F32, 16), ir.VectorType(F32, 4)
_FLOATS = np.empty(1, np.float32)


def load(builder, address, kind=SUMS):
    """Emit what lies at an address."""
    return _load(builder, address, kind)


def zeros(count):
    """So many sums that begin."""
    return [ir.Constant(SUMS, [0.0] * 16)] * count


def add_terms(builder, sums, a, b, terms, of_row, of_term):
    """Emit the sums of rows by len(b) vectors with some terms more, row after row.

    a: address of the left operand's first term, rows of_row and terms of_term bytes apart; b: of the right one's vectors, 64
    bytes for each term."""
    sums, columns = list(sums), len(b)
    for t in range(terms):
        right = [load(builder, builder.add(at, I64(64 * t))) for at in b]
        for r in range(len(sums) // columns):
            x = spread(builder, load(builder, builder.add(a, I64(of_row * r + of_term * t)), F32))
            for c, y in enumerate(right):
                i = r * columns + c
                sums[i] = fused(builder, x, y, sums[i])
    return sums


def loop(builder, first, last, step, sums, body):
    """Emit sums = body(n, sums) for n = first, first + step, ... while n < last. Returns the sums behind it."""
    before, f = builder.block, builder.function
    head, inner, done = (f.append_basic_block(name) for name in ("head", "terms", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    n, own = builder.phi(I64), [builder.phi(SUMS) for _ in sums]
    n.add_incoming(first, before)
    builder.cbranch(builder.icmp_signed("<", n, last), inner, done)
    builder.position_at_end(inner)
    new = body(n, own)
    n.add_incoming(builder.add(n, I64(step)), inner)
    for s, x, y in zip(own, sums, new, strict=True):
        s.add_incoming(x, before)
        s.add_incoming(y, inner)
    builder.branch(head)
    builder.position_at_end(done)
    return own


def function(module, name, kinds):
    """A function of the module and a builder of its code, or of None where it is there: LLVM would copy it into every branch."""
    f = module.globals.get(name)
    if f is not None:
        return f, None
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), name)
    f.linkage = "internal"
    f.attributes.add("noinline")
    return f, ir.IRBuilder(f.append_basic_block())


@intrinsic
def prefetch(typing, address):
    """Ask for the line of an address."""

    def generate(context, builder, signature, args):
        prefetch_line(builder, args[0], to_write=False)
        return context.get_dummy_value()

    return types.void(types.uintp), generate


def _copies(kind):
    def generate(context, builder, signature, args):
        store(builder, load(builder, args[1], kind), args[0])
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp), generate


@intrinsic
def copy_16(typing, to, at):
    """Copy 16 elements."""
    return _copies(SUMS)


@intrinsic
def copy_4(typing, to, at):
    """Copy 4 elements."""
    return _copies(QUARTER)


@njit(error_model="numpy")
def put_part(to, at, n):
    """Write fewer than 16 elements, and 0 behind them, as a vector."""
    own, row = _row(_FLOATS, to, 16), _row(_FLOATS, at, max(n, 0))
    for e in range(16):
        own[e] = 0
    for e in range(row.size):
        own[e] = row[e]


@njit(error_model="numpy", inline="always")
def put_16(to, at, n):
    """Write up to 16 elements, and 0 behind them, as a vector."""
    if n == 16:
        copy_16(np.uintp(to), np.uintp(at))
    else:
        put_part(to, at, n)
