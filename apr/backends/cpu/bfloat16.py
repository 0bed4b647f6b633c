# mypy: ignore-errors
"""Teach Numba bfloat16: two bytes in memory, float32 as soon as one is read, rounded to the nearest even where it is stored.

A kernel that is written for float32 compiles for arrays of either; ml_dtypes' arrays are taken as they are. The bits of a
rounding are made of integer operations, so that they are the same on every processor, subnormal numbers included.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.datamodel import PrimitiveModel
from numba.core.typeconv import Conversion
from numba.extending import intrinsic, lower_cast, register_model
from numba.np import numpy_support

from ..contract import BF16

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()


class BFloat16(types.Number):
    """Type of an element. Arithmetic finds no bfloat16 and takes float32."""

    def __init__(self):
        super().__init__(name="bfloat16")

    def can_convert_to(self, typingctx, other):
        """See numba.types.Type."""
        return {types.float32: Conversion.promote, types.float64: Conversion.safe}.get(other)

    def can_convert_from(self, typingctx, other):
        """See numba.types.Type."""
        return Conversion.unsafe if isinstance(other, (types.Float, types.Integer)) else None


bfloat16 = BFloat16()
numpy_support.FROM_DTYPE[np.dtype(BF16)] = bfloat16
_array_types = {}  # (axes, flags): type


def typed(kernel):
    """Let a kernel look up the types of arrays of bfloat16: of a dtype that is not NumPy's own Numba takes 7 us for each."""
    ask = kernel.typeof_pyval

    def type_of(x):
        if type(x) is not np.ndarray or x.dtype is not BF16:
            return ask(x)
        key = x.ndim, x.flags.num
        if key not in _array_types:
            _array_types[key] = ask(x)
        return _array_types[key]

    kernel.typeof_pyval = type_of


@register_model(BFloat16)
class _Bits(PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _I16)


class Bfloat(ir.Type):
    """LLVM's type, which llvmlite.ir lacks."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, Bfloat)

    def __hash__(self):
        return hash(Bfloat)


def _wide(builder, x):
    return builder.bitcast(builder.shl(builder.zext(x, _I32), _I32(16)), _F32)


def rounded(builder, x, lanes=0):
    """Round a float32, or a vector of so many, in LLVM's code."""
    word, half = (ir.VectorType(t, lanes) if lanes else t for t in (_I32, _I16))

    def number(n):
        return ir.Constant(word, [n] * lanes if lanes else n)

    bits = builder.bitcast(x, word)
    is_odd = builder.and_(builder.lshr(bits, number(16)), number(1))
    nearest = builder.add(bits, builder.add(is_odd, number(0x7FFF)))
    quiet = builder.or_(bits, number(0x400000))
    bits = builder.select(builder.fcmp_unordered("uno", x, x), quiet, nearest)
    return builder.trunc(builder.lshr(bits, number(16)), half)


@lower_cast(BFloat16, types.Float)
def _widen(context, builder, source, target, x):
    return context.cast(builder, _wide(builder, x), types.float32, target)


@lower_cast(types.Float, BFloat16)
@lower_cast(types.Integer, BFloat16)
def _narrow(context, builder, source, target, x):
    return rounded(builder, context.cast(builder, x, source, types.float32))


@intrinsic
def kept(typing, array, x):
    """x as `array` would keep it: a float32, rounded where elements are bfloat16."""
    if array.dtype != bfloat16:
        return types.float32(array, types.float32), lambda c, b, s, a: a[1]
    return types.float32(array, types.float32), lambda c, b, s, a: _wide(b, rounded(b, a[1]))


@intrinsic
def pointer(typing, array, address):
    """An address as a pointer to elements of `array`."""
    to = types.CPointer(array.dtype)
    return to(array, types.uintp), lambda c, b, s, a: b.inttoptr(a[1], c.get_value_type(to))
