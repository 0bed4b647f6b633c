"""A second stream beside the backend's, for copies between GPUs while it computes, and memory that others have allocated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cupy
import numpy as np

from . import device
from .arguments import ACTS

Array = Any  # cupy.ndarray


class Side:
    """The second stream. What is asked for inside `beside` follows what the backend was asked for before, and no more."""

    def __init__(self) -> None:
        self._main = device._device().stream
        self._stream = cupy.cuda.Stream(non_blocking=True)

    def tuned(self) -> str:
        """Hash of the algorithms that products were tuned to."""
        return str(device._device().products.digest(tuned=True))

    def current(self) -> int:
        """Handle of the stream that work goes to now."""
        return int(cupy.cuda.get_current_stream().ptr)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Send work to the second stream."""
        self._stream.wait_event(_recorded(self._main))
        # use() and not `with`, which ends on the null stream.
        self._stream.use()
        try:
            yield
        finally:
            self._main.use()

    def join(self) -> None:
        """Let the backend's stream wait for the second one."""
        self._main.wait_event(_recorded(self._stream))

    def array(self, address: int, size: int, dtype: str, owner: Any) -> Array:
        """Wrap memory (size,) at an address, and set it to zero. owner: kept as long as the array is"""
        kind = np.dtype(ACTS.get(dtype, dtype))
        memory = cupy.cuda.UnownedMemory(address, size * kind.itemsize, owner)
        x = cupy.ndarray(size, kind, cupy.cuda.MemoryPointer(memory, 0))
        x.data.memset_async(0, x.nbytes, self._main)
        device._allocated[0] += x.nbytes
        return x

    def address(self, x: Array) -> int:
        """Find where an array begins on the device. Raises ValueError for one that is not dense."""
        if not x.flags.c_contiguous:
            raise ValueError(f"an array {x.shape} with strides {x.strides} is not dense")
        return int(x.data.ptr)


def _recorded(stream: Any) -> Any:
    event = cupy.cuda.Event(disable_timing=True)
    event.record(stream)
    return event
