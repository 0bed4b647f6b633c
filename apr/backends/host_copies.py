"""Copy arrays of a backend into buffers in main memory that are made once: page-locked on cuda, where a copy into ordinary
memory is many times as slow.

Where a GPU has room, an array is copied there first, at the speed of its memory, and the way to the host is left to
`finish`, which a thread beside the one that computes calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from types import ModuleType
from typing import Any

import numpy as np

from ..common.errors import DeviceError
from .cuda.driver import Driver, DriverError


class HostCopies:
    """Buffers by name; a new copy of a name takes the place of the one before.

    driver  of the GPU, for page-locked memory; None elsewhere. problem: why memory is not page-locked, or ""."""

    def __init__(self, be: ModuleType, driver: Driver | None = None) -> None:
        self.be, self.driver, self.problem = be, driver, ""
        if be.name == "cuda" and driver is None:
            self.driver = Driver()
        self._buffers: dict[str, np.ndarray] = {}
        # Of copies on the GPU that are not on the host yet, and of those that are: (buffer, address).
        self._twins: list[tuple[np.ndarray, int]] = []
        self._context = 0
        # Until the system gives no more page-locked memory; copies made before that still need the driver.
        self._locks = self.driver is not None

    def reserve(self, arrays: Mapping[str, Any]) -> None:
        """Make the buffers of arrays where that takes long: page-locked memory, seconds for 10 GB."""
        for name, x in arrays.items():
            if self.driver is not None and self._locks:
                self._page_locked(self.driver, name, x)

    def __call__(self, name: str, x: Any) -> np.ndarray:
        """Copy a contiguous array as it is now.  x (...)  any dtype; returns the same, on the host, whole after `finish`"""
        driver = self.driver if self._locks else None
        if driver is not None and (buffer := self._page_locked(driver, name, x)) is not None:
            # The driver's copies do not wait for the stream that computes.
            self.be.sync()
            if not self._has_twin(driver, buffer, x):
                driver.copy_to_host(buffer, x.data.ptr)
            return buffer.view(x.dtype).reshape(x.shape)
        there = self._buffers.get(name)
        if self.be.name == "cuda" or there is None or there.shape != x.shape or there.dtype != x.dtype:
            self._buffers[name] = there = np.asarray(self.be.to_host(x))
        else:
            np.copyto(there, x)
        return there

    def finish(self) -> None:
        """Wait until all copies are on the host; in any thread. Raises DeviceError."""
        if self._twins and self.driver is not None:
            try:
                self.driver.copy_beside(self._context, self._twins)
            except DriverError as e:
                raise DeviceError(
                    f"a save could not be copied from the GPU: {e}; the save before it is whole"
                ) from e

    def release(self) -> None:
        """Give back the GPU memory of copies that `finish` has seen; in the thread that computes."""
        twins, self._twins = self._twins, []
        for _, address in twins:
            assert self.driver is not None
            # What is wrong with the GPU meets the next call that computes.
            with suppress(DriverError):
                self.driver.free(address)

    def _has_twin(self, driver: Driver, buffer: np.ndarray, x: Any) -> bool:
        """Copy an array on the GPU, where that takes at most half of what is free there."""
        try:
            if not buffer.nbytes or 2 * buffer.nbytes > driver.free_memory():
                return False
            self._context = driver.context()
            self._twins.append((buffer, driver.twin(x.data.ptr, x.nbytes)))
        except DriverError:
            # The driver may have less in one piece.
            return False
        return True

    def _page_locked(self, driver: Driver, name: str, x: Any) -> np.ndarray | None:
        """Find or make the buffer of an array; None where the system gives no more memory of that kind."""
        there = self._buffers.pop(name, None)
        try:
            if there is None or there.dtype != np.uint8 or there.nbytes != x.nbytes:
                there = driver.page_locked(x.nbytes)
        except DriverError as e:
            self._locks = False
            self.problem = f"saves are copied through ordinary memory, which takes many times as long: {e}"
            return None
        self._buffers[name] = there
        return there
