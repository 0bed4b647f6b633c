"""Tensor maps: how TMA finds boxes of an array of heads, encoded by NVIDIA's driver through ctypes.

A box is COLUMNS values of one head in up to 256 rows; in shared memory its rows follow each other, and their 16-byte cells
are XORed with the row mod 8, as kernels/wgmma.cuh says. The order of axes is that of CUDA, the densest first.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import Any

import numpy as np

from ...common.errors import DeviceError

Array = Any

COLUMNS = 64
KIND = np.dtype("V128")  # a CUtensorMap
_ALIGN = 64
_BFLOAT16, _PLAIN, _SWIZZLE_128B, _L2_PROMOTION_128B, _ZEROS = 9, 0, 3, 2, 0  # of cuda.h
MAPS = 4096  # a model has one for each array of attention


def tensor_map(x: Array, rows: int) -> np.ndarray:
    """The map of x (B,T,heads,D) bfloat16 for boxes of so many rows: (1,) V128, which a kernel gets by value.

    Heads lie densely, rows and sequences at multiples of 16 bytes. Raises DeviceError when the driver refuses it.
    """
    batch, row = x.strides[:2]
    return _encode(x.data.ptr, x.shape, (2 * x.shape[3], row, batch), rows)


def axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of an array (B,T,heads,D) in the order of a map: D, heads, T, B."""
    b, t, heads, d = shape
    return d, heads, t, b


def aligned() -> np.ndarray:
    """Room for a map: (1,) V128 of zeros at a multiple of 64 bytes, as the driver wants it."""
    room = np.zeros(KIND.itemsize + _ALIGN, np.uint8)
    start = -room.ctypes.data % _ALIGN
    return room[start : start + KIND.itemsize].view(KIND)


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@lru_cache(MAPS)
def _encode(address: int, shape: tuple[int, ...], strides: tuple[int, ...], rows: int) -> np.ndarray:
    out = aligned()
    n = len(shape)
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(out.ctypes.data),
        _BFLOAT16,
        n,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * n)(*axes(shape)),
        (ctypes.c_uint64 * (n - 1))(*strides),
        (ctypes.c_uint32 * n)(COLUMNS, 1, rows, 1),
        (ctypes.c_uint32 * n)(*[1] * n),
        _PLAIN,
        _SWIZZLE_128B,
        _L2_PROMOTION_128B,
        _ZEROS,
    )
    if code:
        raise DeviceError(
            f"cuTensorMapEncodeTiled returned error {code} for an array {shape} at {address:#x}, strides {strides} bytes, "
            f"boxes of {rows} rows"
        )
    return out
