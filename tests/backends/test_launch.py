"""The loader at run time: what is compiled, launched and refused, on a fake CuPy and on a GPU."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apr import backends
from apr.backends.cuda import early, kernels
from apr.common.errors import DeviceError, Refused

TEXT = """// y = x + a
extern "C" __global__ void add_v(float* y, const act* x, float a, int n) {}
extern "C" __global__ void add_1(float* y, const act* x, float a, int n) {}
"""


class OutOfMemory(MemoryError):
    """As CuPy's."""


class CompileException(Exception):
    """As CuPy's."""


class CUDADriverError(RuntimeError):
    """As CuPy's."""


class Fake:
    """CuPy, as far as _launch.py uses it; NumPy arrays stand for those on the device."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, tuple[str, ...]]] = []
        self.launched: list[tuple[Any, ...]] = []
        self.most_shared, self.capturing, self.full, self.broken = 200_000, False, False, False
        self.opted: list[int] = []
        fake = self

        class Function:
            def __init__(self, name: str) -> None:
                self.name = name

            def kernel(self, grid: Any, block: Any, args: Any, shared: int) -> None:
                fake.launched.append((self.name, grid, block, args, shared))

            def __setattr__(self, name: str, value: Any) -> None:
                if name == "max_dynamic_shared_size_bytes":
                    if value > fake.most_shared:
                        raise CUDADriverError("CUDA_ERROR_INVALID_VALUE")
                    fake.opted.append(value)
                object.__setattr__(self, name, value)

        class RawModule:
            def __init__(self, code: str, options: tuple[str, ...]) -> None:
                fake.compiled.append((code, options))

            def get_function(self, name: str) -> Function:
                if fake.broken:
                    raise CompileException("add.cu(2): error: no")
                return Function(name)

        def zeros(shape: Any, dtype: Any) -> np.ndarray:
            if fake.full:
                raise OutOfMemory
            return np.zeros(shape, dtype)

        self.compiler = SimpleNamespace(CompileException=CompileException)
        self.cuda = SimpleNamespace(
            compiler=self.compiler,
            Device=lambda: SimpleNamespace(compute_capability="90"),
            get_current_stream=lambda: SimpleNamespace(is_capturing=lambda: fake.capturing),
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemory),
            runtime=SimpleNamespace(memGetInfo=lambda: (1 << 30, 80 << 30)),
        )
        self.cupy = SimpleNamespace(
            RawModule=RawModule,
            ndarray=np.ndarray,
            zeros=zeros,
            cuda=self.cuda,
            get_default_memory_pool=lambda: SimpleNamespace(total_bytes=lambda: 79 << 30),
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    """A CuPy to import, and a folder with one module, add.cu."""
    found = Fake()
    driver = SimpleNamespace(CUDADriverError=CUDADriverError)
    for name, module in [
        ("cupy", found.cupy),
        ("cupy.cuda", found.cuda),
        ("cupy_backends.cuda.api.driver", driver),
    ]:
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("cupy_backends", "cupy_backends.cuda", "cupy_backends.cuda.api"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(driver=driver))
    (tmp_path / "add.cu").write_text(TEXT)
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    return found


@pytest.fixture
def launch(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """_launch.py on the fake, imported anew."""
    name = "apr.backends.cuda.launch"
    monkeypatch.delitem(sys.modules, name, raising=False)
    kernels.source.cache_clear()
    kernels.signatures.cache_clear()
    yield importlib.import_module(name)
    sys.modules.pop(name)
    vars(backends).pop("_launch", None)
    kernels.source.cache_clear()
    kernels.signatures.cache_clear()


def args(n: int = 4) -> tuple[Any, ...]:
    """Arguments of add."""
    return np.zeros(n, np.float32), np.zeros(n, np.float32), 0.5, n


def test_a_kernel_is_compiled_once_and_launched(fake: Fake, launch: ModuleType) -> None:
    kernel = launch.kernel("add", "add_v", "float32")
    assert launch.kernel("add", "add_v", "float32") is kernel
    launch.kernel("add", "add_1", "float32")
    launch.kernel("add", "add_1", "bfloat16")
    assert fake.compiled == [
        (kernels.source("add"), kernels.options(act, "sm_90a", {})) for act in ("float32", "bfloat16")
    ]
    kernel((3,), (128,), args())
    ((name, grid, block, given, shared),) = fake.launched
    assert (name, grid, block, shared) == ("add_v", (3,), (128,), 0)
    assert [type(a) for a in given] == [np.ndarray, np.ndarray, np.float32, np.int32]
    assert fake.opted == []


def test_shared_memory_is_asked_for_when_it_grows(fake: Fake, launch: ModuleType) -> None:
    kernel = launch.kernel("add", "add_v", "float32")
    for shared in (100_000, 60_000, 100_000, 120_000):
        kernel((1,), (32,), args(), shared)
    assert fake.opted == [100_000, 120_000]
    assert [run[4] for run in fake.launched] == [100_000, 60_000, 100_000, 120_000]
    with pytest.raises(DeviceError, match=r"add_v: the GPU refused a launch of grid \(1,\).*300000 bytes"):
        kernel((1,), (32,), args(), 300_000)
    kernel((1,), (32,), args(), 120_000)
    assert fake.opted == [100_000, 120_000]


def test_what_cannot_be_launched_is_refused(fake: Fake, launch: ModuleType) -> None:
    kernel = launch.kernel("add", "add_v", "float32")
    for grid, block in [((0,), (32,)), ((1, 0), (32,)), ((1,), (0,))]:
        with pytest.raises(ValueError, match=r"add_v: grid .* must be positive"):
            kernel(grid, block, args())
    with pytest.raises(TypeError, match="add_v: n must be a number for int"):
        kernel((1,), (32,), (*args()[:3], 4.0))
    assert fake.launched == []


def test_only_what_is_tested_can_be_compiled(fake: Fake, launch: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"add.cu has no kernel sub; it has add_v, add_1"):
        launch.kernel("add", "sub", "float32")
    with pytest.raises(ValueError, match=r"gone\.cu does not exist"):
        launch.kernel("gone", "sub", "float32")
    for act, defines in [("float16", {}), ("float32", {"HEAD_DIM": 64})]:
        with pytest.raises(ValueError, match=rf"add.cu is not made for {act} with .* on sm_90a"):
            launch.kernel("add", "add_v", act, **defines)
    assert fake.compiled == []
    fake.broken = True
    with pytest.raises(DeviceError, match=r"add.cu cannot be compiled for sm_90a: add.cu\(2\): error"):
        launch.kernel("add", "add_v", "float32")


def test_memory_that_is_not_there_is_refused_with_figures(fake: Fake, launch: ModuleType) -> None:
    x = launch.zeros((2, 3), "bfloat16")
    assert (x.nbytes, str(x.dtype), x.any()) == (12, "bfloat16", False)
    fake.full = True
    with pytest.raises(
        Refused, match=r"6\.00 GiB more were asked for, apr holds 79.00 GiB, 1\.00 of 80\.00 GiB"
    ):
        launch.zeros((3, 1 << 29), np.float32)


def test_scratch_is_one_buffer_made_before_capture(fake: Fake, launch: ModuleType) -> None:
    fake.capturing = True
    with pytest.raises(RuntimeError, match="while a graph is being captured"):
        launch.scratch((4,), "float32", "sums")
    fake.capturing = False
    x = launch.scratch((4,), "float32", "sums")
    assert launch.scratch.nbytes() == launch.SCRATCH_BYTES == x.base.nbytes
    fake.capturing = True
    assert launch.scratch((4,), "float32", "sums") is x


class Placed(np.ndarray):
    """An array with an address, as CuPy's."""

    data = property(lambda self: SimpleNamespace(ptr=self.ctypes.data))  # type: ignore[assignment]


def test_a_kernel_is_launched_early_where_gpu_and_driver_can(
    fake: Fake, launch: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hopper and CUDA 12.3; elsewhere the kernel waits as others do. The driver gets geometry, attribute and values."""
    seen: list[Any] = []

    def launches(config: Any, function: Any, at: Any, extra: Any) -> int:
        c = config._obj
        kinds = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_int
        values = [ctypes.cast(a, ctypes.POINTER(kind))[0] for a, kind in zip(at, kinds, strict=True)]
        attribute = c.attributes[0]
        seen.append(
            (
                [*c.grid],
                [*c.block],
                c.shared,
                c.stream,
                c.count,
                attribute.id,
                attribute.value,
                function.value,
            )
        )
        seen.append(values)
        return 719 if fake.broken else 0

    library = SimpleNamespace(cuLaunchKernelEx=launches)
    monkeypatch.setattr(launch, "Early", lambda: early.Early(library))
    runtime, stream = fake.cuda.runtime, SimpleNamespace(ptr=77)
    monkeypatch.setattr(fake.cuda, "get_current_stream", lambda: stream)
    kernel = launch.kernel("add", "add_v", "float32")
    kernel._launch = lambda *of: fake.launched.append(of)
    kernel._launch.ptr = 5
    x = np.zeros(4, np.float32).view(Placed)
    for capability, version, able in (("90", 12030, True), ("80", 13000, False), ("90", 12020, False)):
        seen.clear(), fake.launched.clear(), launch._early.cache_clear()
        runtime.driverGetVersion = lambda version=version: version
        monkeypatch.setattr(fake.cuda, "Device", lambda of=capability: SimpleNamespace(compute_capability=of))
        kernel((3, 2), (64,), (x, x, 0.5, 4), 1024, early=True)
        assert (len(seen), len(fake.launched)) == ((2, 0) if able else (0, 1))
        if able:
            assert seen == [
                ([3, 2, 1], [64, 1, 1], 1024, 77, 1, 6, 1, 5),
                [x.ctypes.data, x.ctypes.data, 0.5, 4],
            ]
    launch._early.cache_clear()
    runtime.driverGetVersion, fake.broken = lambda: 13000, True
    monkeypatch.setattr(fake.cuda, "Device", lambda: SimpleNamespace(compute_capability="90"))
    with pytest.raises(DeviceError, match=r"add_v: the GPU refused a launch of grid .*719"):
        kernel((3,), (64,), (x, x, 0.5, 4), early=True)


ON_GPU = """// y[i] = a x[n-1-i] + b[i], turned around in shared memory; b may be null
#include <cuda_bf16.h>
typedef ACT act;
extern "C" __global__ void turn(float* y, const act* x, const float* b, float a, int n) {
  extern __shared__ float s[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) s[i] = a * (float)x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = s[n - 1 - i] + (b ? b[i] : 0);
}
"""


@pytest.mark.sanitize
@pytest.mark.parametrize("act", list(kernels.ACTS))
def test_a_kernel_runs_on_a_gpu(cuda: Any, act: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scalars, a null pointer and more than 48 KB of shared memory arrive as the kernel declares them."""
    from apr.backends.cuda import launch as _launch

    (tmp_path / f"turn_{act}.cu").write_text(ON_GPU)
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    n = 20_000
    x, b = np.arange(n) % 251 - 100.0, np.arange(n) / 2
    on_gpu = {
        name: cuda.empty((n,), dtype) for name, dtype in [("y", "float32"), ("x", act), ("b", "float32")]
    }
    cuda.from_host(on_gpu["x"], x)
    cuda.from_host(on_gpu["b"], b)
    kernel = _launch.kernel(f"turn_{act}", "turn", act)
    for offset in (None, on_gpu["b"]):
        kernel((1,), (256,), (on_gpu["y"], on_gpu["x"], offset, 0.5, n), 4 * n)
        want = 0.5 * x[::-1] + (0 if offset is None else b)
        assert np.array_equal(cuda.to_host(on_gpu["y"]), want)


@pytest.mark.parametrize("module", kernels.modules())
def test_every_kernel_loads_on_this_gpu(cuda: Any, module: str) -> None:
    from apr.backends.cuda import launch as _launch

    for act, defines in kernels.variants(module, _launch.arch()):
        for name in kernels.signatures(module):
            assert _launch.kernel(module, name, act, **defines).function.num_regs > 0
