"""Launch kernels that begin while the one before them in the stream is at work, through ctypes: programmatic dependent launch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from .driver import DriverError

_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: its value is a union of 64 bytes, 8 bytes behind its beginning."""

    _fields_ = [
        ("id", ctypes.c_int),
        ("pad", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_int * 15),
    ]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class Early:
    """Launches kernels early; recorded, they are edges of a graph that wait no more than launches do."""

    def __init__(self, library: Any = None) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1") if library is None else library
        self._attribute = _Attribute(_SERIALIZATION, 0, 1)

    def __call__(
        self,
        function: int,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int,
        stream: int,
        values: Sequence[Any],
    ) -> None:
        """Launch a CUfunction; values: ctypes and NumPy scalars, of the kernel's own types. Raises DriverError."""
        ones = (1, 1, 1)
        config = _Config(
            (ctypes.c_uint * 3)(*(*grid, *ones)[:3]),
            (ctypes.c_uint * 3)(*(*block, *ones)[:3]),
            shared,
            stream,
            ctypes.pointer(self._attribute),
            1,
        )
        held = [np.asarray(v) if isinstance(v, np.generic) else v for v in values]
        at = [h.ctypes.data if isinstance(h, np.ndarray) else ctypes.addressof(h) for h in held]
        code = self._cuda.cuLaunchKernelEx(
            ctypes.byref(config), ctypes.c_void_p(function), (ctypes.c_void_p * len(at))(*at), None
        )
        if code:
            raise DriverError("cuLaunchKernelEx", code)
