"""Loads the kernels of apr/backends/kernels on the current GPU, checks their arguments and launches them.

One process computes on one GPU, chosen before the first kernel is loaded. Compiled kernels are kept on
disk by CuPy, keyed by the text of the source, the options and the compiler's version.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import cupy
import numpy as np
from cupy.cuda import compiler
from cupy_backends.cuda.api.driver import CUDADriverError

from ...common.errors import DeviceError
from . import kernels
from .arguments import ACTS, Arguments, Scratch, out_of_memory
from .driver import DriverError
from .early import Early
from .tensor_maps import tensor_map as tensor_map

SCRATCH_BYTES = 64 << 20

Array = Any
Shape = tuple[int, ...]


class Kernel:
    """One kernel on the current GPU; calling it launches it on the current stream."""

    def __init__(self, function: Any, arguments: Arguments) -> None:
        self.name = arguments.name
        self.function = function  # cupy.RawKernel: num_regs, local_size_bytes, ...
        self._launch = function.kernel  # without the look-up of the device
        self._arguments = arguments
        self._shared = 0

    def __call__(
        self, grid: Shape, block: Shape, args: tuple[Any, ...], shared: int = 0, early: bool = False
    ) -> None:
        """Launch grid blocks of block threads with `shared` bytes of dynamic shared memory; early: while the kernel before
        is at work, for one that waits for it by itself.

        Raises TypeError and ValueError for arguments that the kernel's declaration does not admit,
        DeviceError for a launch that the GPU refuses.
        """
        if min(grid) < 1 or min(block) < 1:  # CuPy would launch one block
            raise ValueError(f"{self.name}: grid {grid} and block {block} must be positive")
        converted = self._arguments(args)
        try:
            if shared > self._shared:
                self.function.max_dynamic_shared_size_bytes = shared
                self._shared = shared
            if early and (launcher := _early()):
                stream = cupy.cuda.get_current_stream().ptr
                launcher(self._launch.ptr, grid, block, shared, stream, [_value(a) for a in converted])
            else:
                self._launch(grid, block, converted, shared)
        except (CUDADriverError, DriverError) as e:
            raise DeviceError(
                f"{self.name}: the GPU refused a launch of grid {grid}, block {block}, {shared} bytes of "
                f"shared memory: {e}"
            ) from e


@cache
def _early() -> Early | None:
    """Make what launches kernels early, where the GPU and the driver can: Hopper, CUDA 12.3."""
    able = int(cupy.cuda.Device().compute_capability) >= 90 and cupy.cuda.runtime.driverGetVersion() >= 12030
    return Early() if able else None


def _value(x: Any) -> Any:
    """An argument of a kernel as the driver reads it."""
    if x is None or isinstance(x, cupy.ndarray):
        return ctypes.c_void_p(None if x is None else x.data.ptr)
    return x


@cache
def arch() -> str:
    """The -arch of the current GPU. Raises DeviceError when it is too old."""
    digits = cupy.cuda.Device().compute_capability
    return kernels.arch_of((int(digits[:-1]), int(digits[-1])))


@cache
def _module(module: str, act: str, defines: tuple[tuple[str, int], ...]) -> Any:
    if (act, dict(defines)) not in kernels.variants(module, arch()):
        raise ValueError(f"{module}.cu is not made for {act} with {dict(defines)} on {arch()}")
    return cupy.RawModule(code=kernels.source(module), options=kernels.options(act, arch(), dict(defines)))


@cache
def kernel(module: str, name: str, act: str, **defines: int) -> Kernel:
    """The kernel `name` of module.cu for activations of `act`, compiled at its first use.

    Raises ValueError for a kernel or variant that does not exist, DeviceError when it cannot be compiled.
    """
    declared = kernels.signatures(module)
    if name not in declared:
        raise ValueError(f"{module}.cu has no kernel {name}; it has {', '.join(declared)}")
    try:
        function = _module(module, act, tuple(sorted(defines.items()))).get_function(name)
        return Kernel(function, Arguments(name, declared[name], act, cupy.ndarray))
    except compiler.CompileException as e:
        raise DeviceError(f"{module}.cu cannot be compiled for {arch()}: {str(e)[:2000]}") from e


@cache
def multiprocessors() -> int:
    """Number of multiprocessors of the current GPU."""
    return int(cupy.cuda.Device().attributes["MultiProcessorCount"])


def zeros(shape: int | tuple[int, ...], dtype: Any) -> Array:
    """A new array of zeros. Raises Refused, with figures, when the GPU has not enough memory."""
    kind = np.dtype(ACTS.get(dtype, dtype) if isinstance(dtype, str) else dtype)
    try:
        return cupy.zeros(shape, kind)
    except cupy.cuda.memory.OutOfMemoryError as e:
        free, total = cupy.cuda.runtime.memGetInfo()
        asked = math.prod((shape,) if isinstance(shape, int) else shape) * kind.itemsize
        raise out_of_memory(asked, cupy.get_default_memory_pool().total_bytes(), free, total) from e


def _capturing() -> bool:
    return bool(cupy.cuda.get_current_stream().is_capturing())


# scratch(shape, dtype, slot): see Scratch.__call__; scratch.nbytes() is what it holds.
scratch = Scratch(SCRATCH_BYTES, lambda n: zeros(n, "uint8"), _capturing)
