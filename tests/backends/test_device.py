"""Which backend a --device gets, and that everything that can be missing is named with its next step."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apr import backends
from apr.backends import select as device
from apr.backends.cuda import driver
from apr.backends.cuda.driver import Driver, DriverError
from apr.backends.host_copies import HostCopies
from apr.common.errors import DeviceError, Refused

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


class FakeCuda:
    """libcuda of a machine with H200s, through the calls that Driver makes; `plant` replaces some of it."""

    def __init__(self, **plant: Any) -> None:
        self.has = SimpleNamespace(
            **{**dict(version=13000, init=0, count=2, name="NVIDIA H200", capability=(9, 0), mode=0), **plant}
        )

    def cuDriverGetVersion(self, n: Any) -> int:
        n._obj.value = self.has.version
        return 0

    def cuInit(self, flags: int) -> int:
        return int(self.has.init)

    def cuDeviceGetCount(self, n: Any) -> int:
        n._obj.value = self.has.count
        return 0

    def cuDeviceGet(self, gpu: Any, index: int) -> int:
        gpu._obj.value = 40 + index
        return 0

    def cuDeviceGetName(self, text: Any, size: int, gpu: Any) -> int:
        assert size == len(text)
        text.value = self.has.name.encode()
        return 0

    def cuDeviceGetUuid(self, uuid: Any, gpu: Any) -> int:
        uuid.raw = bytes([gpu.value]) * 16
        return 0

    def cuDeviceTotalMem_v2(self, n: Any, gpu: Any) -> int:
        assert isinstance(n._obj, ctypes.c_size_t)
        n._obj.value = 139 * GIB
        return 0

    def cuDeviceGetAttribute(self, n: Any, attribute: int, gpu: Any) -> int:
        assert gpu.value in (40, 41)
        n._obj.value = {75: self.has.capability[0], 76: self.has.capability[1], 20: self.has.mode}[attribute]
        return 0


class CUDARuntimeError(Exception):
    """As CuPy's."""


CUDARuntimeError.__module__ = "cupy_backends.cuda.api.runtime"


class Machine:
    """What choose() finds: a driver, packages, libraries and the cuda backend."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cuda: FakeCuda | OSError = FakeCuda()
        self.packages = {"cupy-cuda13x": "14.2.0", "numpy": "2.4.0"}
        self.missing: list[str] = []
        self.fails: Exception | None = None
        self.free = 130 * GIB
        self.used: list[int] = []
        cpu, self.backend = backends.get("cpu"), self._backend()
        monkeypatch.setattr(device, "Driver", self._driver)
        monkeypatch.setattr(device.importlib.metadata, "distributions", self._distributions)
        monkeypatch.setattr(device, "_missing_libraries", lambda: self.missing)
        monkeypatch.setattr(backends, "get", lambda name: cpu if name == "cpu" else self._get())
        monkeypatch.setattr(cpu, "set_threads", lambda n: None)

    def _driver(self) -> Driver:
        if isinstance(self.cuda, OSError):
            raise self.cuda
        return Driver(self.cuda)

    def _distributions(self) -> list[Any]:
        return [SimpleNamespace(metadata={"Name": n}, version=v) for n, v in self.packages.items()]

    def _get(self) -> Any:
        if isinstance(self.backend, Exception):
            raise self.backend
        return self.backend

    def _backend(self) -> Any:
        def set_device(index: int) -> None:
            if self.fails:
                raise self.fails
            self.used.append(index)

        return SimpleNamespace(
            name="cuda",
            dtypes=("bfloat16", "float32"),
            set_device=set_device,
            set_threads=lambda n: None,
            free_memory=lambda: self.free,
        )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """A machine where all is well."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    return Machine(monkeypatch)


@pytest.mark.parametrize(("asked", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_taken(machine: Machine, asked: str, index: int) -> None:
    chosen = device.choose(asked)
    assert (chosen.backend.name, chosen.note, machine.used) == ("cuda", "", [index])
    for dtype in ("bfloat16", "float32"):
        assert device.select(asked, dtype) is machine.backend


@pytest.mark.parametrize("has_place", [True, False])
def test_cupys_cache_cannot_be_written(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_place: bool
) -> None:
    """Work goes on: kernels are kept among temporary files, or in memory; one note says so."""
    monkeypatch.setenv("CUPY_CACHE_DIR", "/proc/none")
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "0")
    monkeypatch.setattr(device, "private_temporary", lambda name: tmp_path / name if has_place else None)
    chosen = device.choose("cuda")
    assert chosen.backend is machine.backend
    assert "CuPy's cache /proc/none cannot be written" in chosen.note
    assert os.environ["CUPY_CACHE_DIR"] == (str(tmp_path / "cupy") if has_place else "/proc/none")
    assert os.environ["CUPY_CACHE_IN_MEMORY"] == ("0" if has_place else "1")


def test_cpu_means_cpu(machine: Machine) -> None:
    machine.cuda = OSError("not to be asked")
    assert device.choose("cpu") == device.Selection(backends.get("cpu"), "")
    assert device.choose("cpu", "bfloat16").backend is backends.get("cpu")
    with pytest.raises(Refused, match=r"--dtype float64: the cpu backend computes in float32, bfloat16$"):
        device.choose("cpu", "float64")


@pytest.mark.parametrize("asked", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", "cuda0", "cpu:0", ""])
def test_other_names_are_refused(machine: Machine, asked: str) -> None:
    with pytest.raises(DeviceError, match=f"--device {asked}: choose auto, cpu, cuda or cuda:N"):
        device.choose(asked)


def test_the_driver_is_read() -> None:
    driver = Driver(FakeCuda(capability=(12, 1), mode=2))
    assert driver.version() == (13, 0)
    first, second = driver.gpus()
    assert (first.index, first.name, first.capability, first.memory) == (0, "NVIDIA H200", (12, 1), 139 * GIB)
    assert first.prohibited
    assert second.uuid == "GPU-29292929-2929-2929-2929-292929292929"
    assert Driver(FakeCuda(version=12040)).version() == (12, 4)
    assert Driver(FakeCuda(init=100)).gpus() == []
    with pytest.raises(DriverError, match="cuInit returned error 803"):
        Driver(FakeCuda(init=803)).gpus()


UNUSABLE: list[tuple[str, dict[str, Any], str, str]] = [
    # name, what differs on the machine, why there is no CUDA, what to do
    ("no driver", dict(cuda=OSError("libcuda.so.1")), "there is no NVIDIA driver", "install the driver"),
    (
        "no gpu",
        dict(cuda=FakeCuda(count=0)),
        "there is an NVIDIA driver but no GPU",
        "see what nvidia-smi says",
    ),
    ("no gpu 100", dict(cuda=FakeCuda(init=100, count=0)), "driver but no GPU", "see what nvidia-smi says"),
    (
        "driver",
        dict(cuda=FakeCuda(init=803)),
        "does not work: cuInit returned error 803",
        "restart the machine",
    ),
    ("old driver", dict(cuda=FakeCuda(version=12010)), "for CUDA 12.1, apr needs 12.2", "update the driver"),
    (
        "old gpu",
        dict(cuda=FakeCuda(name="Tesla T4", capability=(7, 5))),
        "GPU 0 (Tesla T4) is too old: compute capability 7.5, apr needs 8.0",
        "use a newer GPU",
    ),
    ("prohibited", dict(cuda=FakeCuda(mode=2)), "set to compute mode PROHIBITED", "nvidia-smi -c DEFAULT"),
    ("no cupy", dict(packages={}), "CuPy is not installed", "make install GPU=cuda13"),
    (
        "no cupy 12",
        dict(packages={}, cuda=FakeCuda(version=12040)),
        "CuPy is not installed",
        "make install GPU=cuda12",
    ),
    (
        "two",
        dict(packages={"cupy-cuda12x": "14.0.0", "cupy-cuda13x": "14.0.0"}),
        "2 CuPy packages are in each other's way: cupy-cuda12x, cupy-cuda13x",
        "pip uninstall cupy-cuda12x cupy-cuda13x, then make install GPU=cuda13",
    ),
    (
        "13 on 12",
        dict(cuda=FakeCuda(version=12080)),
        "cupy-cuda13x does not fit a driver for CUDA 12.8",
        "update the driver, or pip uninstall cupy-cuda13x, then make install GPU=cuda12",
    ),
    (
        "11",
        dict(packages={"cupy-cuda11x": "13.0.0"}),
        "cupy-cuda11x does not fit",
        "make install GPU=cuda13",
    ),
    (
        "old",
        dict(packages={"cupy-cuda12x": "13.6.0"}),
        "cupy-cuda12x 13.6.0 is not CuPy 14 or newer for CUDA",
        "pip uninstall cupy-cuda12x, then make install GPU=cuda13",
    ),
    ("rocm", dict(packages={"cupy-rocm-7-0": "14.0.0"}), "is not CuPy 14 or newer for CUDA", "GPU=cuda13"),
    (
        "libraries",
        dict(missing=["cuBLASLt", "CUDA's headers"]),
        "CuPy needs cuBLASLt and CUDA's headers, which cannot be found",
        "-m pip install '.[cuda13]' in apr's folder) installs all of it",
    ),
    (
        "exclusive",
        dict(fails=CUDARuntimeError("cudaErrorDevicesUnavailable: busy or unavailable")),
        "GPU 0 (NVIDIA H200) cannot be used: cudaErrorDevicesUnavailable",
        "another process may hold it alone",
    ),
    (
        "import",
        dict(backend=DeviceError("backend cuda cannot be loaded")),
        "cannot be loaded",
        "install CuPy anew",
    ),
    (
        "refused",
        dict(fails=DeviceError("no context")),
        "no context",
        "nvidia-smi shows what the GPU is doing",
    ),
]


@pytest.mark.parametrize(("plant", "why", "step"), [u[1:] for u in UNUSABLE], ids=[u[0] for u in UNUSABLE])
def test_what_is_missing_is_named(machine: Machine, plant: dict[str, Any], why: str, step: str) -> None:
    vars(machine).update(plant)
    with pytest.raises(DeviceError) as e:
        device.choose("cuda")
    text = str(e.value)
    assert text.startswith("--device cuda: ")
    assert why in text
    assert step in text[text.index(why) :]
    assert text.endswith("--device cpu computes without a GPU")
    assert e.value.exit_code == 8
    chosen = device.choose("auto")  # the only one that may choose, and it says why
    assert chosen.backend.name == "cpu"
    assert why in chosen.note
    with pytest.raises(Refused, match=r"computes in float32, bfloat16 \(cuda not chosen: ") as refused:
        device.choose("auto", "float16")
    assert why in str(refused.value)


def test_a_machine_without_a_gpu_is_not_told_to_get_one(machine: Machine) -> None:
    machine.cuda = OSError("libcuda.so.1")
    assert device.choose("auto").note == "there is no NVIDIA driver (libcuda.so.1)"


def test_hidden_gpus_are_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine.cuda = FakeCuda(count=0)
    with pytest.raises(DeviceError, match=r"no GPU \(CUDA_VISIBLE_DEVICES='' may hide it\)"):
        device.choose("cuda")


def test_an_index_out_of_range_lists_the_gpus(machine: Machine) -> None:
    with pytest.raises(DeviceError) as e:
        device.choose("cuda:2")
    assert str(e.value).startswith(
        "--device cuda:2: there is no GPU 2; this process sees cuda:0 NVIDIA H200 GPU-28282828-2828-2828-2828-"
        "282828282828, cuda:1 NVIDIA H200 GPU-29292929"
    )


def test_a_busy_gpu_is_used_with_a_warning(machine: Machine) -> None:
    machine.free = 20 * GIB
    chosen = device.choose("cuda:1")
    assert chosen.backend.name == "cuda"
    assert chosen.note == (
        "GPU 1 (NVIDIA H200) is in use by others: 20.0 of 139.0 GiB are free (nvidia-smi lists its processes)"
    )


def test_our_own_mistakes_are_not_blamed_on_the_machine(machine: Machine) -> None:
    machine.fails = KeyError("a bug")
    with pytest.raises(KeyError, match="a bug"):
        device.choose("auto")


@pytest.mark.parametrize("found", ["cupy-cuda12x", "cupy"])
def test_cupy_for_an_older_cuda_fits_a_newer_driver(machine: Machine, found: str) -> None:
    machine.packages = {found: "14.0.1"}
    assert device.choose("cuda").backend.name == "cuda"


def test_a_library_that_is_not_found_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> object:
        if name == "cublasLt":
            raise RuntimeError("Failure finding libcublasLt.so")
        return object()

    fake = SimpleNamespace(load_nvidia_dynamic_lib=load, find_nvidia_header_directory=lambda name: None)
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(pathfinder=fake))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", fake)
    assert device._missing_libraries() == ["cuBLASLt", "CUDA's headers"]


def test_auto_without_a_driver_loads_no_cuda_package() -> None:
    code = """
import sys
import apr.backends.select as d
def none(): raise OSError("libcuda.so.1")
d.Driver = none
print(d.choose("auto").backend.name, *sys.modules)
"""
    names = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert names[0] == "cpu"
    assert not {"cupy", "cuda", "cuda.pathfinder", "cupy_backends"} & set(names)


# Page-locked memory


class FakeMemory(FakeCuda):
    """libcuda with main memory as that of the GPU.

    room  bytes of page-locked memory; free: of the GPU's; fails: a call that returns an error; calls: what was called beside"""

    def __init__(self, room: int = 1 << 20, free: int = 1 << 30, fails: str = "") -> None:
        super().__init__()
        self.room, self.free, self.fails, self.held, self.freed = room, free, fails, {}, []
        self.on_gpu: dict[int, Any] = {}
        self.calls: list[str] = []

    def cuMemHostAlloc(self, at: Any, size: Any, flags: int) -> int:
        if size.value > self.room:
            return 2  # CUDA_ERROR_OUT_OF_MEMORY
        memory = ctypes.create_string_buffer(size.value)
        at._obj.value = ctypes.addressof(memory)
        self.held[at._obj.value] = memory
        return 0

    def cuMemFreeHost(self, at: Any) -> int:
        self.freed.append(at.value)
        return 0

    def cuMemcpyDtoH_v2(self, to: Any, address: Any, size: Any) -> int:
        ctypes.memmove(to.value, address.value, size.value)
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = self.free, 1 << 30
        return 0

    def cuMemAlloc_v2(self, at: Any, size: Any) -> int:
        memory = ctypes.create_string_buffer(size.value)
        at._obj.value = ctypes.addressof(memory)
        self.on_gpu[at._obj.value] = memory
        return 2 * (self.fails == "cuMemAlloc_v2")

    def cuMemFree_v2(self, at: Any) -> int:
        del self.on_gpu[at.value]
        return 0

    def cuMemcpyDtoD_v2(self, to: Any, address: Any, size: Any) -> int:
        ctypes.memmove(to.value, address.value, size.value)
        return 0

    def cuMemcpyDtoHAsync_v2(self, to: Any, address: Any, size: Any, stream: Any) -> int:
        self.calls.append("copy")
        ctypes.memmove(to.value, address.value, size.value)
        return 700 * (self.fails == "cuMemcpyDtoHAsync_v2")

    def cuCtxGetCurrent(self, at: Any) -> int:
        at._obj.value = 7
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.calls.append(f"context {context.value}")
        return 0

    def cuStreamCreate(self, at: Any, flags: int) -> int:
        at._obj.value = 1
        self.calls.append(f"stream {flags}")
        return 0

    def cuCtxSynchronize(self) -> int:
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:
        self.calls.append("wait")
        return 0

    def cuStreamDestroy_v2(self, stream: Any) -> int:
        self.calls.append("end")
        return 0


class OnGpu(np.ndarray):
    """An array whose memory stands for that of a GPU."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)


@pytest.mark.parametrize("room", [1 << 20, 0])
def test_copies_from_a_gpu_are_equal_and_page_locked_where_that_can_be(room: int) -> None:
    waits: list[int] = []
    be: Any = SimpleNamespace(name="cuda", sync=lambda: waits.append(1), to_host=np.array)
    cuda = FakeMemory(room, free=0)
    copies = HostCopies(be, Driver(cuda))
    x = np.arange(60, dtype=np.float32).reshape(5, 12).view(OnGpu)
    copies.reserve({"x": x})
    assert len(cuda.held) == bool(room)
    first = copies("x", x)
    assert (first.dtype, first.shape) == (np.float32, (5, 12))
    assert np.array_equal(first, x)
    x += 1
    assert not np.array_equal(first, x)  # a copy
    assert np.array_equal(copies("x", x), x)
    assert len(cuda.held) == bool(room)  # one buffer for both
    assert ("ordinary memory" in copies.problem) == (not room)
    assert len(waits) == 2 * bool(room)
    del first, copies
    gc.collect()
    assert len(cuda.freed) == len(cuda.held)


ON_GPU: Any = SimpleNamespace(name="cuda", sync=lambda: None, to_host=np.array)


def test_a_copy_stays_on_the_gpu_until_another_thread_has_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "AT_A_TIME", 100)
    cuda = FakeMemory(free=2 * 240)
    copies = HostCopies(ON_GPU, Driver(cuda))
    x = np.arange(60, dtype=np.float32).view(OnGpu)
    before = np.array(x)
    there = copies("x", x)
    x += 1
    assert len(cuda.on_gpu) == 1
    assert not cuda.calls
    thread = threading.Thread(target=copies.finish)
    thread.start()
    thread.join()
    assert np.array_equal(there, before)
    assert cuda.calls == ["context 7", "stream 1", *3 * ["copy", "wait"], "end"]
    copies.release()
    assert not cuda.on_gpu
    copies.finish()
    assert len(cuda.calls) == 9  # nothing is left to copy
    copies("x", x)
    copies.finish()
    assert np.array_equal(there, x)  # one buffer for both


@pytest.mark.parametrize(("free", "fails"), [(2 * 240 - 1, ""), (1 << 30, "cuMemAlloc_v2")])
def test_a_copy_goes_to_the_host_at_once_where_the_gpu_is_full(free: int, fails: str) -> None:
    cuda = FakeMemory(free=free, fails=fails)
    copies = HostCopies(ON_GPU, Driver(cuda))
    x = np.arange(60, dtype=np.float32).view(OnGpu)
    assert np.array_equal(copies("x", x), x)
    copies.finish()
    assert not cuda.calls


def test_a_copy_on_the_gpu_reaches_the_host_where_page_locked_memory_has_come_to_an_end() -> None:
    cuda = FakeMemory()
    copies = HostCopies(ON_GPU, Driver(cuda))
    x = np.arange(60, dtype=np.float32).view(OnGpu)
    first = copies("x", x)
    cuda.room = 0
    second = copies("y", x)
    copies.finish()
    assert np.array_equal(first, x)
    assert np.array_equal(second, x)
    assert "ordinary memory" in copies.problem
    copies.release()
    assert not cuda.on_gpu


def test_a_copy_that_fails_behind_the_step_names_what_is_whole() -> None:
    copies = HostCopies(ON_GPU, Driver(FakeMemory(fails="cuMemcpyDtoHAsync_v2")))
    copies("x", np.arange(60, dtype=np.float32).view(OnGpu))
    with pytest.raises(
        DeviceError, match=r"cuMemcpyDtoHAsync_v2 returned error 700; the save before it is whole"
    ):
        copies.finish()
    copies.release()


def test_copies_in_main_memory_take_the_same_place_again() -> None:
    be: Any = backends.get("cpu")
    copies = HostCopies(be)
    x = be.empty((7,), "float32")
    first = copies("x", x)
    be.fill(x, 3)
    assert not first.any()
    second = copies("x", x)
    assert second is first
    assert (second == 3).all()
    assert not np.shares_memory(first, x)
