# mypy: ignore-errors
"""Softmax of attention in float32: those functions of softmax.py that read or write blocks of operands."""

from functools import partial

from numba import types
from numba.extending import intrinsic

from .softmax import (
    _FLOATS,
    _I64,
    _LN2_HIGH,
    _LN2_LOW,
    _ROUND,
    _WORDS,
    LOG2_E,
    UNROLLED,
    _at,
    _calls,
    _exponentials,
    _fma,
    _gradients,
    _load,
    _row_of,
    _splat,
    _store,
    _sub,
    polynomial,
)
from .tiles import BLOCK_BYTES, EDGE

# e^r for |r| <= log(2)/2, relative error 1e-8: (e^r - 1 - r) / r^2 interpolated at the zeros of a Chebyshev polynomial.
_EXP = (1.0, 1.0, 0.5, 0.166665768, 0.0416665544, 0.00836320297, 0.00139262135)
_LEAST, _MOST = -69.31471, 87.33654  # 2^-100 and 2^126: see _exp2 of softmax.py
_U, _L, _F = types.uintp, types.int64, types.float32


def _exp(builder, x):
    """Emit e^x, x within its limits, others count as the next one within; relative error 1e-7. NaN, of any bits, stays NaN.

    x - n log 2 keeps the bits of x, in two fused steps (Cody and Waite): a product with log2 e would be rounded."""
    given = x
    for limit, order in ((_LEAST, "<"), (_MOST, ">")):
        c = _splat(_FLOATS, limit)
        x = builder.select(builder.fcmp_ordered(order, x, c), c, x)
    shifted = _fma(builder, x, _splat(_FLOATS, LOG2_E), _splat(_FLOATS, _ROUND))
    n = _sub(builder, shifted, _splat(_FLOATS, _ROUND))
    r = _fma(builder, n, _splat(_FLOATS, -_LN2_HIGH), x)
    r = _fma(builder, n, _splat(_FLOATS, -_LN2_LOW), r)
    exponent = builder.shl(builder.bitcast(shifted, _WORDS), _splat(_WORDS, 23))
    bits = builder.add(builder.bitcast(polynomial(builder, r, _EXP), _WORDS), exponent)
    return builder.select(builder.fcmp_unordered("uno", given, given), given, builder.bitcast(bits, _FLOATS))


def _whole_row(builder, row, to):
    for h, x in enumerate(row):
        _store(builder, x, _at(builder, to, 64 * h))


def _put_terms(builder, base, i, two):
    """Two rows of a block of float32 in two halves of 16 columns."""
    for r, row in enumerate(two):
        for h, x in enumerate(row):
            place = builder.add(base, builder.mul(i, _I64(128)))
            _store(builder, x, _at(builder, place, 64 * r + h * BLOCK_BYTES))


def _dots(builder, i, args):
    to, left, right, goes_on = args
    goes_on = builder.icmp_unsigned("!=", goes_on, _I64(0))
    place, row = builder.add(to, builder.mul(i, _I64(64))), builder.mul(i, _I64(4 * EDGE))
    total = builder.select(goes_on, _load(builder, place, _FLOATS), _splat(_FLOATS, 0.0))
    for x, y in zip(*(_row_of(builder, builder.add(base, row)) for base in (left, right)), strict=True):
        total = _fma(builder, x, y, total)
    _store(builder, total, place)


@intrinsic
def exponentials(typing, to, totals, scores, masks, tops, factor, goes_on):
    """exponentials() in float32; p = e^(factor (score - top))."""
    emit = partial(_exponentials, put_row=_whole_row, size=4, power=_exp)
    kind = types.void(_U, _U, _U, _U, _U, _F, _L)
    return kind, _calls("apr_exponentials_float32", emit, EDGE // UNROLLED)


@intrinsic
def gradients(typing, ds_rows, ds_terms, p_terms, scores, dprobs, masks, logs, dots, factor):
    """gradients() in float32, in two halves of 16 columns row after row; p = e^(factor score + log)."""
    emit = partial(_gradients, put_row=_whole_row, put_two=_put_terms, size=4, power=_exp)
    return types.void(*[_U] * 8, _F), _calls("apr_gradients_float32", emit, EDGE // 2)


@intrinsic
def dot_blocks(typing, to, left, right, goes_on):
    """dot_blocks() of float32."""
    return types.void(_U, _U, _U, _L), _calls("apr_dot_blocks_float32", _dots, EDGE)
