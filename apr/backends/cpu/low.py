# mypy: ignore-errors
"""Kernels of bfloat16: those of kernels.py for such arrays, and those that must differ, so that a result is rounded once.

Imported when the first array of bfloat16 is made, so that float32 alone waits for nothing.
"""

from typing import Any

import numpy as np
from numba import prange, types

from .bfloat16 import bfloat16
from .kernels import _exp, _kernel, _largest, _row, low
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
                    for j in range(v):
                        row[j] = room[j] * factor
                    logits[i, t] = of_target


compile_all(low, __name__)
