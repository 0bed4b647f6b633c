# mypy: ignore-errors
"""Kernels of bfloat16: those of kernels.py for such arrays, and those that must differ, so that a result is rounded once.

Imported when the first array of bfloat16 is made, so that float32 alone waits for nothing.
"""

from typing import Any

import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic

from .bfloat16 import bfloat16
from .kernels import _exp, _float, _kernel, _row, _scaled, _wide_vectors, low
from .start import compile_all

products: Any = None  # products.py or tiled.py, where the processor has instructions for it


@_kernel("void(act[:,:,:,:], float32[:,:,:,:])")
def convert(y, x):
    """y = x, rounded where y is bfloat16; the last axis is dense in both."""
    na, nb, nc, n = x.shape
    py, px = y.ctypes.data, x.ctypes.data
    for i in prange(na * nb):
        a, b = i // nb, i % nb
        for c in range(nc):
            to = _row(y, py + a * y.strides[0] + b * y.strides[1] + c * y.strides[2], n)
            row = _row(x, px + a * x.strides[0] + b * x.strides[1] + c * x.strides[2], n)
            for j in range(n):
                to[j] = row[j]


low.append((convert, types.void(types.Array(types.float32, 4, "A"), types.Array(bfloat16, 4, "A"))))


_SHORTS = np.empty(1, np.int16)


@intrinsic
def _larger(typing, x, y):
    """The larger of two int16, which Numba would widen."""
    short = types.int16
    return short(short, short), lambda c, b, s, a: b.select(b.icmp_signed(">", *a), *a)


@intrinsic
def _in_order(typing, bits):
    """Its own inverse: maps the bits of a bfloat16 to an int16 with the order of the numbers."""

    def generate(context, builder, signature, args):
        kind, (x,) = args[0].type, args
        return builder.xor(x, builder.and_(builder.ashr(x, kind(15)), kind(0x7FFF)))

    return types.int16(types.int16), generate


@njit
def _largest(row):
    """That of kernels.py, 32 elements at a time where there are vectors of 512 bits."""
    _wide_vectors()
    bits = _row(_SHORTS, row.ctypes.data, row.size)
    top = _in_order(bits[0])
    for j in range(bits.size):
        top = _larger(top, _in_order(bits[j]))
    return _float(np.int32(_in_order(top)) << np.int32(16))


_ROWS = 8  # that share room for exponentials


@_kernel("void(float32[::1], act[:,:], int32[::1], float32, boolean, float32)")
def cross_entropy(loss, logits, targets, scale, grad, z_loss):
    """That of kernels.py, but that the exponentials of a row are kept beside it, in float32."""
    n, v = logits.shape
    for group in prange((n + _ROWS - 1) // _ROWS):
        room = np.empty(v if grad else 0, np.float32)
        for i in range(group * _ROWS, min(n, (group + 1) * _ROWS)):
            row = _row(logits, logits[i].ctypes.data, v)
            t = targets[i]
            if t < 0:
                loss[i] = 0
                if grad:
                    for j in range(v):
                        row[j] = 0
            else:
                top = _largest(row)
                total = 0.0
                own = np.float32(row[t])
                for j0 in range(0, v, 512):
                    part = np.float32(0)
                    terms = _row(logits, row.ctypes.data + logits.itemsize * j0, min(512, v - j0))
                    if grad:
                        kept = room[j0 : j0 + terms.size]
                        for j in range(terms.size):
                            e = _exp(terms[j] - top)
                            kept[j] = e
                            part += e
                    else:
                        for j in range(terms.size):
                            part += _exp(terms[j] - top)
                    total += part
                lse = top + np.float32(np.log(total))
                loss[i] = lse - own
                if grad:
                    factor = np.float32(scale * (1 + 2 * z_loss * lse) / total)
                    of_target = room[t] * factor - scale
                    _scaled(row, room, factor)
                    logits[i, t] = of_target


compile_all(low, __name__)
