"""Check the arguments of a kernel before it is launched, and lay out scratch: the part of launch.py without CuPy.

A wrong argument would be read as something else on the device, or end the process' CUDA context; here it
is a TypeError or ValueError that names kernel and parameter. Every check is a closure made once, because
a step launches hundreds of kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import ml_dtypes
import numpy as np

from ...common.errors import Refused
from ...common.rounding import round_up
from .kernels import Parameter
from .kernels.signatures import TENSOR_MAP
from .tensor_maps import KIND

_c_contiguous = attrgetter("_c_contiguous")  # of a CuPy array: a fifth of the time that flags take

Array = Any
Check = Callable[[Any], Any]

ALIGN = 256  # bytes between the beginnings of scratch arrays, as CUDA's own allocations
LARGEST = float(np.finfo(np.float32).max)
DTYPES: dict[str, Any] = {
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "int": np.dtype(np.int32),
    "long long": np.dtype(np.int64),
    "unsigned char": np.dtype(np.uint8),
    "signed char": np.dtype(np.int8),
}
ACTS: dict[str, Any] = {"float32": DTYPES["float"], "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Arguments:
    """Converts the arguments of one kernel: arrays and tensor maps are checked and passed on, None becomes a null
    pointer, numbers get the C type that the kernel declares. array_type is the class of the backend's arrays.
    """

    def __init__(self, name: str, parameters: Sequence[Parameter], act: str, array_type: type) -> None:
        self.name, self.parameters = name, tuple(parameters)
        self._checks = [
            _array_check(
                f"{name}: {p.name}", p, ACTS[act] if p.ctype == "act" else DTYPES[p.ctype], array_type
            )
            if p.pointer
            else _map_check(f"{name}: {p.name}")
            if p.ctype == TENSOR_MAP
            else _scalar_check(f"{name}: {p.name}", p.ctype)
            for p in parameters
        ]
        self._count = len(self._checks)

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        """The arguments as CuPy's launch takes them. Raises TypeError, ValueError."""
        if len(args) != self._count:
            names = ", ".join(p.name for p in self.parameters)
            raise TypeError(f"{self.name} takes {self._count} arguments ({names}), not {len(args)}")
        return [check(a) for check, a in zip(self._checks, args)]  # noqa: B905 - counted above


def _array_check(where: str, p: Parameter, dtype: Any, array_type: Any) -> Check:
    dense: Check = _c_contiguous if hasattr(array_type, "_c_contiguous") else attrgetter("flags.c_contiguous")

    def check(a: Any) -> Any:
        if a is None:
            if p.nullable:
                return None
            raise TypeError(f"{where} must be an array, not None")
        if not isinstance(a, array_type):
            raise TypeError(f"{where} must be an array on the device, not {type(a).__name__}")
        if a.dtype is not dtype and a.dtype != dtype:
            raise TypeError(f"{where} must be {dtype}, not {a.dtype}")
        if not dense(a) and not (p.gaps and _has_gaps(a, p.gaps)):
            need = f"have at most {p.gaps} gap(s), none in the last axis" if p.gaps else "be C-contiguous"
            raise ValueError(f"{where} must {need}: shape {a.shape}, strides {a.strides} bytes")
        return a

    return check


def _has_gaps(a: Array, most: int) -> bool:
    """Tell whether the axes of `a` follow each other densely, except for `most` that are farther apart."""
    follows, gaps = a.itemsize, 0
    for axis in range(a.ndim - 1, -1, -1):
        size, stride = a.shape[axis], a.strides[axis]
        if size > 1 and stride != follows:
            gaps += 1
            if gaps > most or axis == a.ndim - 1 or stride < follows:
                return False
            follows = stride
        follows *= size
    return True


def _map_check(where: str) -> Check:
    def check(a: Any) -> Any:
        if not (isinstance(a, np.ndarray) and a.dtype == KIND and a.size == 1):
            raise TypeError(f"{where} must be a tensor map, not {type(a).__name__}")
        return a

    return check


def _scalar_check(where: str, ctype: str) -> Check:
    make: Any = DTYPES[ctype].type
    usual: Any = float if ctype == "float" else int
    numbers: Any = (int, np.integer)
    least: float
    most: float
    if ctype == "float":
        numbers += (float, np.floating)
        least, most = -LARGEST, LARGEST
    else:
        least, most = np.iinfo(make).min, np.iinfo(make).max

    def check(a: Any) -> Any:
        if type(a) is usual and least <= a <= most:
            return make(a)
        if not isinstance(a, numbers) or isinstance(a, bool):
            raise TypeError(f"{where} must be a number for {ctype}, not {a!r} ({type(a).__name__})")
        if not least <= a <= most and a - a == 0:  # infinities and NaN pass into a float
            raise ValueError(f"{where}: {a} does not fit into {ctype}")
        return make(a)

    return check


def out_of_memory(asked: int, held: int, free: int, total: int) -> Refused:
    """The error for an allocation of `asked` bytes that failed, where apr already holds `held`."""
    return Refused(
        f"out of GPU memory: {asked / 2**30:.2f} GiB more were asked for, apr holds {held / 2**30:.2f} GiB, "
        f"{free / 2**30:.2f} of {total / 2**30:.2f} GiB are free; a smaller --micro-batch-size, --recompute or a "
        "shorter --seq-length needs less (apr plan says how much), and nvidia-smi shows who else uses the GPU"
    )


class Regions:
    """Places of slots in a buffer of `size` bytes: disjoint, each at a multiple of ALIGN."""

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0
        self._at: dict[Any, tuple[int, int]] = {}

    def place(self, slot: Any, nbytes: int) -> int | None:
        """Offset of nbytes for a slot: where it lay if that suffices, else behind all others; None when
        the buffer is full."""
        start, room = self._at.get(slot, (0, -1))
        if room >= nbytes:
            return start
        room = round_up(nbytes, ALIGN)
        if self.used + room > self.size:
            return None
        start, self.used = self.used, self.used + room
        self._at[slot] = (start, room)
        return start


class Scratch:
    """Arrays that live until the end of an op, in one buffer that is there before a graph is captured.

    new(nbytes) makes a uint8 buffer, capturing() says whether a graph is being captured. Arrays of
    different slots never overlap; what a slot held is lost at its next use. A buffer that was outgrown is
    kept, because captured graphs and the op that is running may still point into it.
    """

    def __init__(self, size: int, new: Callable[[int], Array], capturing: Callable[[], bool]) -> None:
        self._new, self._capturing = new, capturing
        self._size = size
        self._buffers: list[Array] = []
        self._regions = Regions(0)
        self._views: dict[Any, Array] = {}
        self._starts: dict[Any, int] = {}

    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(b.nbytes for b in self._buffers)

    def __call__(self, shape: int | tuple[int, ...], dtype: Any, slot: Any = 0) -> Array:
        """An array with undefined contents: a tuple is a shape in elements, an int a number of BYTES for a
        flat array. Raises RuntimeError where the buffer would have to grow during capture.
        """
        key = (shape, dtype, slot)
        view = self._views.get(key)
        return self._make(*key) if view is None else view

    def _make(self, shape: int | tuple[int, ...], dtype: Any, slot: Any) -> Array:
        kind = np.dtype(ACTS.get(dtype, dtype) if isinstance(dtype, str) else dtype)
        if isinstance(shape, int) and shape % kind.itemsize:
            raise ValueError(f"scratch {slot!r}: {shape} bytes are not a whole number of {kind}")
        nbytes = shape if isinstance(shape, int) else math.prod(shape) * kind.itemsize
        start = self._regions.place(slot, nbytes)
        if start is None:
            start = self._grow(slot, nbytes)
        if self._starts.get(slot, start) != start:  # its other arrays lie where it was
            self._views = {k: v for k, v in self._views.items() if k[2] != slot}
        self._starts[slot] = start
        view = self._buffers[-1][start : start + nbytes].view(kind)
        if isinstance(shape, tuple):
            view = view.reshape(shape)
        self._views[shape, dtype, slot] = view
        return view

    def _grow(self, slot: Any, nbytes: int) -> int:
        if self._capturing():
            raise RuntimeError(
                f"scratch {slot!r} needs {nbytes} bytes, more than is left, while a graph is being captured: "
                "run the step once before capturing it"
            )
        self._size = max(self._size, 2 * self._regions.size, 2 * nbytes)
        self._buffers.append(self._new(self._size))
        self._regions, self._views, self._starts = Regions(self._size), {}, {}
        start = self._regions.place(slot, nbytes)
        assert start is not None
        return start
