# mypy: ignore-errors
"""Softmax of attention in float32: those functions of softmax.py that read or write blocks of operands."""

from functools import partial

from numba import types
from numba.extending import intrinsic

from .softmax import (
    _FLOATS,
    _I64,
    LOG2_E,
    UNROLLED,
    _at,
    _calls,
    _exp2,
    _exponentials,
    _fma,
    _gradients,
    _load,
    _mul,
    _row_of,
    _splat,
    _store,
)
from .tiles import BLOCK_BYTES, EDGE

# 2^x - 1 = x polynomial(x) for |x| <= 1/2, relative error of 2^x 5e-9: interpolated at the zeros of a Chebyshev polynomial.
_EXP2 = (1.0, 0.693147188, 0.240226508, 0.0555035711, 0.00961808256, 0.00133908634, 0.000154531629)
_U, _L, _F = types.uintp, types.int64, types.float32


def _power(builder, x):
    """Emit 2^x; NaN, of any bits, stays NaN."""
    return builder.select(builder.fcmp_unordered("uno", x, x), x, _exp2(builder, x, _EXP2))


def _exp(builder, x):
    """Emit e^x: the product is rounded, the difference x is not once more."""
    return _power(builder, _mul(builder, x, _splat(_FLOATS, LOG2_E)))


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
    """exponentials() in float32."""
    emit = partial(_exponentials, put_row=_whole_row, size=4, exp2=_power)
    kind = types.void(_U, _U, _U, _U, _U, _F, _L)
    return kind, _calls("apr_exponentials_float32", emit, EDGE // UNROLLED)


@intrinsic
def gradients(typing, ds_rows, ds_terms, p_terms, scores, dprobs, masks, logs, dots, factor):
    """gradients() in float32, in two halves of 16 columns row after row; p = exp(factor score + log), a difference that keeps
    its bits where both are large."""
    emit = partial(_gradients, put_row=_whole_row, put_two=_put_terms, size=4, exp2=_exp)
    return types.void(*[_U] * 8, _F), _calls("apr_gradients_float32", emit, EDGE // 2)


@intrinsic
def dot_blocks(typing, to, left, right, goes_on):
    """dot_blocks() of float32."""
    return types.void(_U, _U, _U, _L), _calls("apr_dot_blocks_float32", _dots, EDGE)
