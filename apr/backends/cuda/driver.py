"""Ask NVIDIA's driver for the GPUs of this machine, and for page-locked memory, through ctypes: no CUDA package is loaded."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_MAJOR, _MINOR, _MODE = 75, 76, 20  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*, _COMPUTE_MODE
_PROHIBITED = 2  # CU_COMPUTEMODE_PROHIBITED
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
# Bytes that a copy beside others asks for at a time, about a millisecond's: a copy of the step's loss waits for what was asked
# for before.
AT_A_TIME = 16 << 20


class DriverError(Exception):
    """The driver refused a call; code is its CUresult."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call} returned error {code}")
        self.code = code


@dataclass(frozen=True)
class Gpu:
    """One GPU that this process may see (CUDA_VISIBLE_DEVICES)."""

    index: int
    name: str
    uuid: str
    capability: tuple[int, int]
    memory: int  # bytes
    prohibited: bool  # nvidia-smi --compute-mode=PROHIBITED


class Driver:
    """libcuda. Raises OSError where there is none."""

    def __init__(self, library: Any = None) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1") if library is None else library

    def _call(self, name: str, *args: Any) -> None:
        code = getattr(self._cuda, name)(*args)
        if code:
            raise DriverError(name, code)

    def version(self) -> tuple[int, int]:
        """The newest CUDA that the driver supports, (13, 0)."""
        n = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(n))
        return n.value // 1000, n.value % 1000 // 10

    def gpus(self) -> list[Gpu]:
        """Every visible GPU. Raises DriverError when the driver cannot be initialised."""
        count = ctypes.c_int()
        try:
            self._call("cuInit", 0)
            self._call("cuDeviceGetCount", ctypes.byref(count))
        except DriverError as e:
            if e.code != NO_DEVICE:
                raise
        return [self._gpu(i) for i in range(count.value)]

    def page_locked(self, nbytes: int) -> np.ndarray:
        """Allocate main memory that a GPU copies into at full speed: (nbytes,) uint8, freed with its last view.

        Raises DriverError; needs a context, which whoever computes on this thread has made."""
        at = ctypes.c_void_p()
        self._call("cuMemHostAlloc", ctypes.byref(at), ctypes.c_size_t(nbytes), 0)
        assert at.value is not None
        memory = (ctypes.c_uint8 * nbytes).from_address(at.value)
        out: np.ndarray = np.ctypeslib.as_array(memory)
        weakref.finalize(memory, self._cuda.cuMemFreeHost, ctypes.c_void_p(at.value)).atexit = False
        return out

    def copy_to_host(self, host: np.ndarray, address: int) -> None:
        """Copy host.nbytes bytes from an address on the GPU, and wait until they are there. Raises DriverError."""
        to, size = ctypes.c_void_p(host.ctypes.data), ctypes.c_size_t(host.nbytes)
        self._call("cuMemcpyDtoH_v2", to, ctypes.c_uint64(address), size)

    # For a thread beside the one that computes

    def context(self) -> int:
        """Handle of the context of this thread, for `copy_beside` in another one."""
        at = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(at))
        return at.value or 0

    def twin(self, address: int, nbytes: int) -> int:
        """Copy nbytes bytes on the GPU; returns the address of the copy, for `free`. Raises DriverError: no memory."""
        at = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(at), ctypes.c_size_t(nbytes))
        try:
            self._call("cuMemcpyDtoD_v2", at, ctypes.c_uint64(address), ctypes.c_size_t(nbytes))
            self._call("cuCtxSynchronize")
        except DriverError:
            self.free(at.value)
            raise
        return at.value

    def free_memory(self) -> int:
        """Ask for the bytes that `twin` may find: what allocators above the driver keep for themselves is no part of it."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def free(self, address: int) -> None:
        """Give memory of the GPU back. Raises DriverError."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def copy_beside(self, context: int, copies: Sequence[tuple[np.ndarray, int]]) -> None:
        """Fill (host, address on the GPU) pairs while another thread computes, and wait until that is done: on a stream of
        its own, so that a graph can be captured meanwhile. Raises DriverError."""
        self._call("cuCtxSetCurrent", ctypes.c_void_p(context))
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        try:
            for host, address in copies:
                for first in range(0, host.nbytes, AT_A_TIME):
                    to, size = ctypes.c_void_p(host.ctypes.data + first), min(AT_A_TIME, host.nbytes - first)
                    place = ctypes.c_uint64(address + first)
                    self._call("cuMemcpyDtoHAsync_v2", to, place, ctypes.c_size_t(size), stream)
                    self._call("cuStreamSynchronize", stream)
        finally:
            self._call("cuStreamDestroy_v2", stream)

    def _gpu(self, index: int) -> Gpu:
        device, memory = ctypes.c_int(), ctypes.c_size_t()
        name, uuid = ctypes.create_string_buffer(256), ctypes.create_string_buffer(16)
        self._call("cuDeviceGet", ctypes.byref(device), index)
        self._call("cuDeviceGetName", name, 256, device)
        self._call("cuDeviceGetUuid", uuid, device)
        self._call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        value = ctypes.c_int()
        found = {}
        for attribute in (_MAJOR, _MINOR, _MODE):
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            found[attribute] = value.value
        h = uuid.raw.hex()
        return Gpu(
            index,
            name.value.decode(errors="replace"),
            f"GPU-{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}",
            (found[_MAJOR], found[_MINOR]),
            memory.value,
            found[_MODE] == _PROHIBITED,
        )
