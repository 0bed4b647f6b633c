"""The cuda backend: CuPy arrays on one NVIDIA GPU, cuBLASLt for matrix products, our own kernels for the rest.

The functions, their parameters and what they compute are those of reference.py. In bfloat16, sums are
float32, and so are the arrays that the contract there names; a result becomes bfloat16 where it is stored.
In float32 everything is float32: no TF32.

Everything runs on one stream, in the order of the calls, and only sync, to_host and a from_host of a large
array wait for it. A process computes on one GPU, from the thread that called set_device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np

from ...common.errors import DeviceError
from . import attention, attention_wgmma, decode, kernels, kinds, launch, low_rank, matmul, ops

Array = Any  # cupy.ndarray

name = "cuda"
dtypes = ("bfloat16", "float32")
pad_vocab = True
loss_elements = 5 << 28
asynchronous = True
act_again = True
square_tiles = ops.square_tiles
STAGING_BYTES = 16 << 20
_allocated = [0]


@dataclass
class _Staging:
    """A page-locked buffer that a copy to the GPU reads from, and when the latest such copy is done."""

    host: np.ndarray = field(default_factory=lambda: _pinned(STAGING_BYTES))
    done: Any = field(default_factory=lambda: cupy.cuda.Event(disable_timing=True))


def _pinned(nbytes: int) -> np.ndarray:
    return np.frombuffer(cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)


class _Device:
    """The GPU of this process, its stream, and what belongs to them."""

    def __init__(self, index: int) -> None:
        self.index = index
        device = cupy.cuda.Device(index)
        device.use()
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.stream.__enter__()  # for good. After use(), the end of any `with stream:` makes the null stream current
        self.workspace = launch.zeros(matmul.WORKSPACE_BYTES, "uint8")
        self.products = matmul.open(index, self.workspace.data.ptr, matmul.WORKSPACE_BYTES, self.stream.ptr)
        self.staging = [_Staging(), _Staging()]
        ops.machine = SimpleNamespace(
            kernel=launch.kernel,
            scratch=launch.scratch,
            address=lambda x: x.data.ptr,
            shared_bytes=device.attributes["MaxSharedMemoryPerBlockOptin"],
            clusters=bool(kernels.variants("loss_cluster", launch.arch())),
        )


_devices: list[_Device] = []  # at most one


def _device() -> _Device:
    if not _devices:
        set_device(0)
    return _devices[0]


# Plumbing


def set_device(index: int) -> None:
    """Compute on GPU number `index` from now on, on this thread. Raises DeviceError when there is none, or
    when this process computes on another one already."""
    if _devices and _devices[0].index != index:
        raise DeviceError(
            f"this process computes on cuda:{_devices[0].index} and cannot change to cuda:{index}"
        )
    if _devices:
        return
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as e:
        raise DeviceError(f"backend cuda: no GPU can be used: {e}") from e
    if not 0 <= index < count:
        raise DeviceError(f"backend cuda: there is no GPU {index}; this process sees {count}")
    _devices.append(_Device(index))


def set_threads(n: int) -> None:
    """Do nothing: the host's threads do not compute."""


def describe() -> dict[str, str]:
    """See reference.py."""
    properties = cupy.cuda.runtime.getDeviceProperties(_device().index)
    h = properties["uuid"].hex()

    def dotted(version: int) -> str:
        return f"{version // 1000}.{version % 1000 // 10}"

    return {
        "backend": name,
        "gpu": properties["name"].decode(),
        "uuid": f"GPU-{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}",
        "driver": dotted(cupy.cuda.runtime.driverGetVersion()),
        "cuda": dotted(cupy.cuda.runtime.runtimeGetVersion()),
        "cupy": cupy.__version__,
        "cublaslt": matmul.version(),
        "matmul_algorithms": _device().products.digest(),  # of the products computed so far
        **kinds.kinds(launch.arch()),
    }


def empty(shape: int | tuple[int, ...], dtype: Any) -> Array:
    """A new zero-filled array; its bytes count in memory(). Raises Refused when the GPU is full."""
    _device()
    x = launch.zeros(shape, dtype)
    _allocated[0] += x.nbytes
    return x


def memory() -> int:
    """Bytes handed out by empty() since the process started."""
    return _allocated[0]


def free_memory() -> int | None:
    """See reference.py."""
    _device()
    return int(cupy.cuda.runtime.memGetInfo()[0]) + int(cupy.get_default_memory_pool().free_bytes())


def overhead() -> int:
    """Bytes for the work space of products and of kernels, and for the kernels themselves."""
    return matmul.WORKSPACE_BYTES + launch.SCRATCH_BYTES + (512 << 20)


def from_host(x: Array, host: np.ndarray) -> None:
    """x = host, rounded to the dtype of x; host may change as soon as this returns. Shapes must be equal."""
    _same_shape(x, host)
    device = _device()
    host = np.ascontiguousarray(host, x.dtype)
    if not x.flags.c_contiguous:
        dense = cupy.empty(x.shape, x.dtype)
        from_host(dense, host)
        x[...] = dense
    elif host.nbytes > STAGING_BYTES:
        x.set(host, stream=device.stream)
        device.stream.synchronize()
    elif host.nbytes:
        device.staging.reverse()
        staging = device.staging[0]
        staging.done.synchronize()  # of the copy before the last
        staging.host[: host.nbytes] = host.reshape(-1).view(np.uint8)
        x.data.copy_from_host_async(staging.host.ctypes.data, host.nbytes, device.stream)
        staging.done.record(device.stream)


def to_host(x: Array) -> np.ndarray:
    """A copy on the host, same dtype."""
    return np.asarray(x.get(stream=_device().stream))


def read_later(numbers: tuple[Array, ...]) -> Callable[[], list[float]]:
    """See reference.py."""
    stream, done = _device().stream, cupy.cuda.Event(disable_timing=True)
    host = _pinned(sum(x.nbytes for x in numbers))
    at = host.ctypes.data
    for x in numbers:
        x.data.copy_to_host_async(at, x.nbytes, stream)
        at += x.nbytes
    done.record(stream)

    def values() -> list[float]:
        done.synchronize()
        return [float(x) for x in host.view(np.float64)]

    return values


def decoder() -> Any:
    """See reference.py."""
    return decode


def fill(x: Array, value: float) -> None:
    """x = value everywhere."""
    if value == 0 and math.copysign(1, value) > 0 and x.flags.c_contiguous:
        x.data.memset_async(0, x.nbytes, _device().stream)
    else:
        x[...] = value


def copy(y: Array, x: Array) -> None:
    """y = x, rounded to the dtype of y. Shapes must be equal."""
    _same_shape(y, x)
    y[...] = x


def sync() -> None:
    """Wait until everything asked for so far is done."""
    _device().stream.synchronize()


def tune(f: Callable[[], None]) -> None:
    """See reference.py: times the algorithms that cuBLASLt has for each product in f."""
    with _device().products.tuning():
        f()


def capture(f: Callable[[], None]) -> Callable[[], None]:
    """See reference.py: f as a CUDA graph; the returned function launches it on the backend's stream."""
    stream = _device().stream
    stream.begin_capture()
    try:
        f()
    except BaseException:
        with suppress(Exception):  # which would only say that the capture has failed
            stream.end_capture()
        raise
    graph = stream.end_capture()
    graph.upload(stream)
    return lambda: graph.launch(stream)


# Linear maps, adapters and attention; all other ops are in ops.py


def linear_fwd(y: Array, x: Array, w: Array, b: Array | None) -> None:
    """See reference.py."""
    _devices[0].products.forward(y, x, w, b)


def linear_bwd(
    dx: Array, dw: Array | None, db: Array | None, dy: Array, x: Array, w: Array, adds: bool
) -> None:
    """See reference.py."""
    products = _devices[0].products
    products.grad_input(dx, dy, w)
    if dw is not None:
        products.grad_weight(dw, dy, x, adds)
    if db is not None:
        ops.add_rows(db, dy)


def gemm(out: Array, a: Array, b: Array, alpha: float, beta: float, trans_a: bool, trans_b: bool) -> None:
    """See reference.py."""
    products = _devices[0].products
    if trans_a and not trans_b and alpha == 1 and beta in (0, 1):
        # the product of linear_bwd, by the same algorithm
        products.grad_weight(out, a, b, bool(beta))
    else:
        products.gemm(out, a, b, alpha, beta, trans_a, trans_b)


def adapted_bwd_a(u: Array, da: Array, x: Array, du: Array, a: Array, factor: float) -> None:
    """See reference.py."""
    if low_rank.serves(u, x, du):
        low_rank.adapted_bwd_a(u, da, x, du, a, factor)
    else:
        linear_fwd(u, x, a, None)
        gemm(da, du, x, factor, 1.0, True, False)


def adapted_bwd_b(du: Array, db: Array, dy: Array, u: Array, b: Array, factor: float) -> None:
    """See reference.py."""
    if low_rank.serves(du, dy, u):
        low_rank.adapted_bwd_b(du, db, dy, u, b, factor)
    else:
        gemm(db, dy, u, factor, 1.0, True, False)
        linear_bwd(du, None, None, dy, u, b, True)


def attention_fwd(
    y: Array, lse: Array, q: Array, k: Array, v: Array, doc_start: Array | None, window: int
) -> None:
    """See reference.py."""
    own = attention.applies(q, k, v, y, ops.machine.shared_bytes)
    hopper = attention_wgmma.serves(launch.arch(), q.shape[-1])
    cores = (attention_wgmma if hopper else attention).forward if own else ops.attention_fwd
    cores(y, lse, q, k, v, doc_start, window)


def attention_bwd(
    dq: Array,
    dk: Array,
    dv: Array,
    dy: Array,
    y: Array,
    lse: Array,
    q: Array,
    k: Array,
    v: Array,
    doc_start: Array | None,
    window: int,
) -> None:
    """See reference.py."""
    own = attention.applies(q, k, v, y, ops.machine.shared_bytes, dq, dk, dv, dy)
    hopper = attention_wgmma.serves(launch.arch(), q.shape[-1])
    cores = (attention_wgmma if hopper else attention).backward if own else ops.attention_bwd
    cores(dq, dk, dv, dy, y, lse, q, k, v, doc_start, window)


def _same_shape(y: Array, x: Array) -> None:
    if y.shape != x.shape:
        raise ValueError(f"shapes differ: {y.shape} and {x.shape}")
