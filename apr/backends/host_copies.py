"""Copy arrays of a backend into buffers in main memory that are made once: page-locked on cuda, where a copy into ordinary
memory is many times as slow."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from .cuda.driver import Driver, DriverError


class HostCopies:
    """Buffers by name; a new copy of a name takes the place of the one before.

    driver  of the GPU, for page-locked memory; None elsewhere. problem: why memory is not page-locked, or ""."""

    def __init__(self, be: ModuleType, driver: Driver | None = None) -> None:
        self.be, self.driver, self.problem = be, driver, ""
        if be.name == "cuda" and driver is None:
            self.driver = Driver()
        self._buffers: dict[str, np.ndarray] = {}

    def reserve(self, arrays: Mapping[str, Any]) -> None:
        """Make the buffers of arrays where that takes long: page-locked memory, seconds for 10 GB."""
        for name, x in arrays.items():
            if self.driver is not None and not self.problem:
                self._page_locked(self.driver, name, x)

    def __call__(self, name: str, x: Any) -> np.ndarray:
        """Copy a contiguous array, and wait until it is there.  x (...)  any dtype; returns the same, on the host"""
        if self.driver is not None and (buffer := self._page_locked(self.driver, name, x)) is not None:
            # The driver's copy does not wait for the stream that computes.
            self.be.sync()
            self.driver.copy_to_host(buffer, x.data.ptr)
            return buffer.view(x.dtype).reshape(x.shape)
        there = self._buffers.get(name)
        if self.be.name == "cuda" or there is None or there.shape != x.shape or there.dtype != x.dtype:
            self._buffers[name] = there = np.asarray(self.be.to_host(x))
        else:
            np.copyto(there, x)
        return there

    def _page_locked(self, driver: Driver, name: str, x: Any) -> np.ndarray | None:
        """Find or make the buffer of an array; None where the system gives no more memory of that kind."""
        there = self._buffers.pop(name, None)
        try:
            if there is None or there.dtype != np.uint8 or there.nbytes != x.nbytes:
                there = driver.page_locked(x.nbytes)
        except DriverError as e:
            self.driver = None
            self.problem = f"saves are copied through ordinary memory, which takes many times as long: {e}"
            return None
        self._buffers[name] = there
        return there
