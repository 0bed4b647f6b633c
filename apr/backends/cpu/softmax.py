# mypy: ignore-errors
"""Softmax of attention in vectors of 16, a block of 32 queries by 32 keys at a time, as LLVM's code.

Exponentials are 2^x (polynomial(), relative error 2e-7). Orders of sums, which depend on the sequence alone: a query has 16
partial sums, of the keys whose number is the same modulo 16; such a sum adds e(32 j + l) + e(32 j + 16 + l) of its blocks of keys
j in order. Partial sums add up by pairs: those 1 apart, then 2, 4 and 8. Every multiplication with an addition behind it is one
fused operation where the code says `fma`, and none is elsewhere: the bits are the same on every processor.

Masks: a word for each query of a block, whose bit k is set where the query sees key k. Other keys have p = ds = 0.
"""

import math
from functools import partial

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .amx import narrow
from .bfloat16 import rounded
from .tiles import BLOCK_BYTES, EDGE

_I1, _I16, _I32, _I64, _F32 = (*(ir.IntType(n) for n in (1, 16, 32, 64)), ir.FloatType())
_FLOATS, _WORDS, _HALVES, _FLAGS = (ir.VectorType(t, 16) for t in (_F32, _I32, _I16, _I1))
_ROUND = 12582912.0  # 1.5 * 2^23, see kernels.py
LOG2_E = math.log2(math.e)
# 2^x for |x| <= 1/2: the polynomial of least relative error among those that are 1 at 0.
_EXP2 = (1.0, 0.693147, 0.24022242, 0.055507336, 0.009671513, 0.0013264727)
# log(1 + x) = x - x^2/2 + x^3 polynomial(x) for sqrt(1/2) <= 1 + x <= sqrt(2) (Cephes, logf).
_LOG = (
    *(3.3333331174e-1, -2.4999993993e-1, 2.0000714765e-1, -1.6668057665e-1, 1.4249322787e-1),
    *(-1.2420140846e-1, 1.1676998740e-1, -1.1514610310e-1, 7.0376836292e-2),
)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
UNROLLED = 2  # rows of a pass through a loop


def _splat(kind, value):
    return ir.Constant(kind, [value] * kind.count)


def _lanes(builder, x):
    """A float32 in all lanes."""
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), x, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(_WORDS, [0] * 16))


def _at(builder, base, offset):
    return builder.add(base, _I64(offset)) if offset else base


def _load(builder, address, kind, align=4):
    x = builder.load(builder.inttoptr(address, kind.as_pointer()), typ=kind)
    x.align = align
    return x


def _store(builder, x, address, align=4):
    builder.store(x, builder.inttoptr(address, x.type.as_pointer())).align = align


def _spread(builder, address):
    """A float32 at an address in all lanes."""
    return _lanes(builder, _load(builder, address, _F32))


def _fma(builder, x, y, z):
    name, kind = "llvm.fma.v16f32", ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return builder.call(
        builder.module.globals.get(name) or ir.Function(builder.module, kind, name), [x, y, z]
    )


# Numba gives the flags of a kernel, reassoc for one, to operations that have none: x - ((x + c) - c) would become 0.
_OWN_FLAGS = ("nsz",)


def _add(builder, x, y):
    return builder.fadd(x, y, flags=_OWN_FLAGS)


def _sub(builder, x, y):
    return builder.fsub(x, y, flags=_OWN_FLAGS)


def _mul(builder, x, y):
    return builder.fmul(x, y, flags=_OWN_FLAGS)


def _div(builder, x, y):
    return builder.fdiv(x, y, flags=_OWN_FLAGS)


def polynomial(builder, x, factors):
    """Emit sum factors[n] x^n."""
    y = _splat(_FLOATS, factors[-1])
    for c in reversed(factors[:-1]):
        y = _fma(builder, y, x, _splat(_FLOATS, c))
    return y


def _exp2(builder, x):
    """Emit 2^x, x within -100..126 or NaN (of which the last bits are 0); others count as the next one within.

    2^-100 times a gradient is not subnormal, which would cost an Intel some hundred cycles."""
    for limit, order in ((-100.0, "<"), (126.0, ">")):
        c = _splat(_FLOATS, limit)
        x = builder.select(builder.fcmp_ordered(order, x, c), c, x)
    shifted = _add(builder, x, _splat(_FLOATS, _ROUND))
    p = polynomial(builder, _sub(builder, x, _sub(builder, shifted, _splat(_FLOATS, _ROUND))), _EXP2)
    exponent = builder.shl(builder.bitcast(shifted, _WORDS), _splat(_WORDS, 23))
    return builder.bitcast(builder.add(builder.bitcast(p, _WORDS), exponent), _FLOATS)


def _log(builder, x):
    """Emit log x of positive numbers that are not subnormal; NaN stays NaN."""
    bits = builder.bitcast(x, _WORDS)
    # Exponent of x / sqrt(1/2), so that what is left lies on both sides of 1.
    above = builder.sub(bits, _splat(_WORDS, 0x3F3504F3))
    n = builder.ashr(above, _splat(_WORDS, 23))
    m = builder.bitcast(builder.sub(bits, builder.shl(n, _splat(_WORDS, 23))), _FLOATS)
    r, e = _sub(builder, m, _splat(_FLOATS, 1.0)), builder.sitofp(n, _FLOATS)
    square = _mul(builder, r, r)
    y = _mul(builder, _mul(builder, square, r), polynomial(builder, r, _LOG))
    y = _fma(builder, e, _splat(_FLOATS, _LN2_LOW), y)
    y = _fma(builder, square, _splat(_FLOATS, -0.5), y)
    y = _fma(builder, e, _splat(_FLOATS, _LN2_HIGH), _add(builder, r, y))
    return builder.select(builder.fcmp_unordered("uno", x, x), x, y)


def _flags(builder, address):
    """Two halves of a row's mask."""
    return [builder.bitcast(_load(builder, _at(builder, address, 2 * h), _I16, 2), _FLAGS) for h in range(2)]


def _row_of(builder, address):
    """Two vectors of a row of a block of float32."""
    return [_load(builder, _at(builder, address, 64 * h), _FLOATS) for h in range(2)]


def _seen(builder, flags, x, otherwise=0.0):
    return builder.select(flags, x, _splat(_FLOATS, otherwise))


def _larger(builder, x, y):
    """x where it is larger than y, else y: a NaN in x is left out."""
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _function(module, name, kinds, emit, steps=0):
    """A function of the module, made once; emit(builder, i, args) fills its loop over i = 0..steps, or its only pass.

    steps: "last" where the last argument tells their number."""
    f = module.globals.get(name)
    if f is None:
        f = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), name)
        f.linkage = "internal"
        f.attributes.add("noinline")
        start = f.append_basic_block()
        builder = ir.IRBuilder(start)
        if steps:
            loop, done = f.append_basic_block("loop"), f.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            i = builder.phi(_I64)
            i.add_incoming(_I64(0), start)
            emit(builder, i, f.args)
            following = builder.add(i, _I64(1))
            i.add_incoming(following, builder.block)
            end = f.args[-1] if steps == "last" else _I64(steps)
            builder.cbranch(builder.icmp_unsigned("<", following, end), loop, done)
            builder.position_at_end(done)
        else:
            emit(builder, None, f.args)
        builder.ret_void()
    return f


def _calls(name, emit, steps=0):
    """The code of an intrinsic: a call of _function()."""

    def generate(context, builder, signature, args):
        builder.call(_function(builder.module, name, [x.type for x in args], emit, steps), args)
        return context.get_dummy_value()

    return generate


def _reduce(builder, rows, add):
    """Emit what the lanes of each of 16 vectors add up to, or the largest: those 1 apart meet first, then 2, 4 and 8."""
    for s in (1, 2, 4, 8):
        low = ir.Constant(_WORDS, [16 + j - s if j & s else j for j in range(16)])
        high = ir.Constant(_WORDS, [16 + j if j & s else j + s for j in range(16)])
        for r in (r for r in range(16) if not r & (2 * s - 1)):
            x, y = (builder.shuffle_vector(rows[r], rows[r | s], order) for order in (low, high))
            rows[r] = _add(builder, x, y) if add else _larger(builder, x, y)
    return rows[0]


def _reduced(builder, i, args, add):
    to, at = args
    for h in range(2):
        rows = [_load(builder, _at(builder, at, 64 * (16 * h + r)), _FLOATS) for r in range(16)]
        _store(builder, _reduce(builder, rows, add), _at(builder, to, 64 * h))


def _raise(builder, i, args):
    tops, scores, masks, goes_on = args
    goes_on = builder.icmp_unsigned("!=", goes_on, _I64(0))
    for r in range(UNROLLED):
        r = builder.add(builder.mul(i, _I64(UNROLLED)), _I64(r))
        top = builder.add(tops, builder.mul(r, _I64(64)))
        x, y = _row_of(builder, builder.add(scores, builder.mul(r, _I64(4 * EDGE))))
        one, two = _flags(builder, builder.add(masks, builder.mul(r, _I64(4))))
        least = -math.inf
        x = _larger(builder, _seen(builder, one, x, least), _seen(builder, two, y, least))
        before = builder.select(goes_on, _load(builder, top, _FLOATS), _splat(_FLOATS, least))
        _store(builder, _larger(builder, x, before), top)


def _rounded_row(builder, row, to):
    """Two vectors of a row, rounded to bfloat16."""
    _store(builder, narrow(builder, *row), to)


def _exponentials(builder, i, args, put_row=_rounded_row, size=2, power=_exp2):
    to, totals, scores, masks, tops, factor, goes_on = args
    goes_on = builder.icmp_unsigned("!=", goes_on, _I64(0))
    factor = _lanes(builder, factor)
    for r in range(UNROLLED):
        r = builder.add(builder.mul(i, _I64(UNROLLED)), _I64(r))
        top = _spread(builder, builder.add(tops, builder.mul(r, _I64(4))))
        p = []
        for s, flags in zip(
            _row_of(builder, builder.add(scores, builder.mul(r, _I64(4 * EDGE)))),
            _flags(builder, builder.add(masks, builder.mul(r, _I64(4)))),
            strict=True,
        ):
            x = power(builder, _mul(builder, _sub(builder, s, top), factor))
            p.append(_seen(builder, flags, x))
        total = builder.add(totals, builder.mul(r, _I64(64)))
        before = builder.select(goes_on, _load(builder, total, _FLOATS), _splat(_FLOATS, 0.0))
        _store(builder, _add(builder, before, _add(builder, *p)), total)
        put_row(builder, p, builder.add(to, builder.mul(r, _I64(size * EDGE))))


def _finish(builder, i, args):
    inverse, lse, tops, totals, scale = args
    scale = _lanes(builder, scale)
    for h in range(2):
        rows = [_load(builder, _at(builder, totals, 64 * (16 * h + r)), _FLOATS) for r in range(16)]
        total, top = _reduce(builder, rows, True), _load(builder, _at(builder, tops, 64 * h), _FLOATS)
        _store(builder, _div(builder, _splat(_FLOATS, 1.0), total), _at(builder, inverse, 64 * h))
        _store(builder, _fma(builder, top, scale, _log(builder, total)), _at(builder, lse, 64 * h))


def _put_pairs(builder, base, i, two):
    """Two rows of a block, rounded to bfloat16, as a row of pairs in two halves of 16 columns."""
    order = ir.Constant(ir.VectorType(_I32, 32), [16 * (j % 2) + j // 2 for j in range(32)])
    for h in range(2):
        both = builder.bitcast(narrow(builder, two[0][h], two[1][h]), ir.VectorType(_I16, 32))
        place = builder.add(builder.add(base, builder.mul(i, _I64(64))), _I64(h * (BLOCK_BYTES // 2)))
        _store(builder, builder.shuffle_vector(both, both, order), place)


def _gradients(builder, i, args, put_row=_rounded_row, put_two=_put_pairs, size=2, power=_exp2):
    rows, ds_pairs, p_pairs, scores, dprobs, masks, logs, dots, factor = args
    factor = _lanes(builder, factor)
    of_p, of_ds = [], []
    for r in range(2):  # a pair of rows
        r = builder.add(builder.mul(i, _I64(2)), _I64(r))
        word = builder.mul(r, _I64(4))
        log, dot = (_spread(builder, builder.add(at, word)) for at in (logs, dots))
        s, dp = (_row_of(builder, builder.add(at, builder.mul(r, _I64(4 * EDGE)))) for at in (scores, dprobs))
        p, ds = [], []
        for h, flags in enumerate(_flags(builder, builder.add(masks, word))):
            x = power(builder, _fma(builder, s[h], factor, log))
            p.append(_seen(builder, flags, x))
            ds.append(_seen(builder, flags, _mul(builder, x, _sub(builder, dp[h], dot))))
        put_row(builder, ds, builder.add(rows, builder.mul(r, _I64(size * EDGE))))
        of_p.append(p)
        of_ds.append(ds)
    put_two(builder, p_pairs, i, of_p)
    put_two(builder, ds_pairs, i, of_ds)


def _dots(builder, i, args):
    to, left, right, goes_on = args
    goes_on = builder.icmp_unsigned("!=", goes_on, _I64(0))
    row = builder.mul(i, _I64(64))
    place, terms = builder.add(to, row), []
    for base in (left, right):
        words = _load(builder, builder.add(base, row), _WORDS)
        even = builder.shl(words, _splat(_WORDS, 16))
        odd = builder.and_(words, _splat(_WORDS, 0xFFFF0000))
        terms.append([builder.bitcast(x, _FLOATS) for x in (even, odd)])
    total = builder.select(goes_on, _load(builder, place, _FLOATS), _splat(_FLOATS, 0.0))
    for x, y in zip(*terms, strict=True):
        total = _fma(builder, x, y, total)
    _store(builder, total, place)


def _put(builder, i, args):
    to, stride, sums, factors, _ = args
    factor = _spread(builder, builder.add(factors, builder.mul(i, _I64(4))))
    x = _load(builder, builder.add(sums, builder.mul(i, _I64(4 * EDGE))), _FLOATS)
    _store(
        builder, rounded(builder, _mul(builder, x, factor), 16), builder.add(to, builder.mul(i, stride)), 2
    )


_U, _L, _F = types.uintp, types.int64, types.float32


@intrinsic
def raise_tops(typing, tops, scores, masks, goes_on):
    """tops (32,16) float32: the largest of it, or where it does not go on of nothing, and of the scores that are seen."""
    return types.void(_U, _U, _U, _L), _calls("apr_raise_tops", _raise, EDGE // UNROLLED)


@intrinsic
def top_rows(typing, to, tops):
    """to (32,): the largest of each row of tops (32,16)."""
    return types.void(_U, _U), _calls("apr_top_rows", partial(_reduced, add=False))


@intrinsic
def sum_rows(typing, to, parts):
    """to (32,): the sum of each row of parts (32,16)."""
    return types.void(_U, _U), _calls("apr_sum_rows", partial(_reduced, add=True))


@intrinsic
def exponentials(typing, to, totals, scores, masks, tops, factor, goes_on):
    """p = 2^(factor (score - top)) of a block, rounded, row after row; totals (32,16) = p, or += p where it goes on.

    tops (32,)"""
    return types.void(_U, _U, _U, _U, _U, _F, _L), _calls("apr_exponentials", _exponentials, EDGE // UNROLLED)


@intrinsic
def finish_rows(typing, inverse, lse, tops, totals, scale):
    """inverse (32,) = 1 / total and lse (32,) = scale top + log total, total being the sum of a row of totals (32,16)."""
    return types.void(_U, _U, _U, _U, _F), _calls("apr_finish_rows", _finish)


@intrinsic
def gradients(typing, ds_rows, ds_pairs, p_pairs, scores, dprobs, masks, logs, dots, factor):
    """p = 2^(factor score + log) and ds = p (dprob - dot) of a block, rounded: row after row, and pair of rows after pair.

    logs, dots (32,); pairs in two halves of 16 columns, see order.py."""
    return types.void(*[_U] * 8, _F), _calls("apr_gradients", _gradients, EDGE // 2)


@intrinsic
def dot_blocks(typing, to, left, right, goes_on):
    """to (32,16): parts of the dot products of rows of two blocks of bfloat16, or += these where it goes on."""
    return types.void(_U, _U, _U, _L), _calls("apr_dot_blocks", _dots, EDGE)


@intrinsic
def put_half(typing, to, stride, sums, factors, rows):
    """Write 16 columns of so many rows of a block of sums, rounded, `stride` bytes apart, row r times factors[r]."""
    return types.void(_U, _L, _U, _U, _L), _calls("apr_put_half", _put, "last")
