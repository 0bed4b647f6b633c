"""Choose the backend and the GPU that a --device asks for."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from .. import backends
from ..common.errors import DeviceError, Refused
from ..common.host import threads as default_threads
from ..common.packages import pip_install
from ..common.printable import printable
from ..common.temporary import is_writable, private_temporary
from .cuda import kernels
from .cuda.driver import Driver, DriverError, Gpu

OLDEST_CUDA = (12, 2)  # bfloat16 in CuPy's own kernels
OLDEST_CUPY = 14


@dataclass(frozen=True)
class Selection:
    """A backend, and what there is to know about the choice: why auto took the CPU, say. "" for nothing.

    avoidable: the note is of something that could be changed, not that the machine has no GPU.
    """

    backend: ModuleType
    note: str
    avoidable: bool = True


class _NoCuda(Exception):
    """Why there is no CUDA backend, and what would help. gpu: the machine has a GPU that we could use."""

    def __init__(self, reason: str, step: str, gpu: bool = True) -> None:
        super().__init__(f"{reason}; {step}")
        self.note, self.gpu = str(self) if gpu else reason, gpu


def select(device: str, dtype: str | None = None, threads: int | None = None) -> ModuleType:
    """The backend of choose(); what there is to know about the choice goes to the standard error stream."""
    chosen = choose(device, dtype, threads)
    if chosen.note and chosen.avoidable:
        print(printable(f"about the device: {chosen.note}"), file=sys.stderr)
    return chosen.backend


def choose(device: str, dtype: str | None = None, threads: int | None = None) -> Selection:
    """The backend for --device auto, cpu, cuda or cuda:N, set to that GPU and to a number of CPU threads.
    Its first dtype is the default one.

    Only auto may choose: the CPU where no GPU can be used. Raises DeviceError when the device cannot be
    used, Refused for a dtype that it does not compute in.
    """
    asked = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
    if not asked:
        raise DeviceError(f"--device {device}: choose auto, cpu, cuda or cuda:N")
    backend, note, avoidable = None, "", True
    if device != "cpu":
        try:
            backend, note = _cuda(int(asked[1] or 0))
        except _NoCuda as e:
            if device != "auto":
                raise DeviceError(f"--device {device}: {e}; --device cpu computes without a GPU") from e
            note, avoidable = e.note, e.gpu
    backend = backend or backends.get("cpu")
    if dtype is not None and dtype not in backend.dtypes:
        hint = f" (cuda not chosen: {note})" if device == "auto" and note and backend.name == "cpu" else ""
        raise Refused(
            f"--dtype {dtype}: the {backend.name} backend computes in {', '.join(backend.dtypes)}{hint}"
        )
    backend.set_threads(default_threads() if threads is None else threads)
    return Selection(backend, note, avoidable)


def _cuda(index: int) -> tuple[ModuleType, str]:
    """The cuda backend on GPU `index`, and a warning or "". Raises _NoCuda for the first thing missing."""
    driver, gpu = _gpu(index)
    _check_packages(driver)
    note = _cupy_cache()
    try:
        backend = backends.get("cuda")
    except DeviceError as e:
        raise _NoCuda(str(e), "install CuPy anew") from e
    try:
        backend.set_device(index)
        free = backend.free_memory()
    except DeviceError as e:
        raise _NoCuda(str(e), "nvidia-smi shows what the GPU is doing") from e
    except Exception as e:
        if not type(e).__module__.startswith(("cupy", "cuda")):
            raise
        raise _NoCuda(
            f"GPU {index} ({gpu.name}) cannot be used: {e}",
            "another process may hold it alone or have filled it: nvidia-smi lists them; wait, or choose "
            "another with --device cuda:N",
        ) from e
    if free is not None and free < gpu.memory / 2:
        return backend, (
            f"GPU {index} ({gpu.name}) is in use by others: {free / 2**30:.1f} of {gpu.memory / 2**30:.1f} GiB "
            "are free (nvidia-smi lists its processes)"
        )
    return backend, note


def _cupy_cache() -> str:
    """Let CuPy keep compiled kernels among temporary files where its cache cannot be written; returns a note of it or ""."""
    given = os.environ.get("CUPY_CACHE_DIR")
    folder = Path(given or os.path.expanduser("~/.cupy/kernel_cache"))
    if is_writable(folder):
        return ""
    temporary = private_temporary("cupy")
    if temporary is None:  # compiled by each process
        os.environ["CUPY_CACHE_IN_MEMORY"] = "1"
        return f"CuPy's cache {folder} cannot be written; its kernels are compiled each time"
    os.environ["CUPY_CACHE_DIR"] = str(temporary)
    return (
        f"CuPy's cache {folder} cannot be written; {temporary} takes its place (CUPY_CACHE_DIR names another)"
    )


def _gpu(index: int) -> tuple[tuple[int, int], Gpu]:
    """(CUDA version of the driver, GPU number `index`). Raises _NoCuda."""
    try:
        driver = Driver()
        version = driver.version()
        gpus = driver.gpus()
    except OSError as e:
        raise _NoCuda("there is no NVIDIA driver (libcuda.so.1)", "install the driver", gpu=False) from e
    except DriverError as e:
        raise _NoCuda(
            f"the NVIDIA driver does not work: {e}", "see what nvidia-smi says; restart the machine"
        ) from e
    if not gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r} may hide it)"
        raise _NoCuda(f"there is an NVIDIA driver but no GPU{hidden}", "see what nvidia-smi says", gpu=False)
    if index >= len(gpus):
        have = ", ".join(f"cuda:{g.index} {g.name} {g.uuid}" for g in gpus)
        raise _NoCuda(f"there is no GPU {index}", f"this process sees {have}")
    gpu = gpus[index]
    if version < OLDEST_CUDA:
        raise _NoCuda(
            f"the NVIDIA driver is for CUDA {_dotted(version)}, apr needs {_dotted(OLDEST_CUDA)}",
            "update the driver",
        )
    if gpu.prohibited:
        raise _NoCuda(
            f"GPU {index} ({gpu.name}) is set to compute mode PROHIBITED", "nvidia-smi -c DEFAULT allows it"
        )
    try:
        kernels.arch_of(gpu.capability)
    except DeviceError as e:
        raise _NoCuda(f"GPU {index} ({gpu.name}) is too old: {e}", "use a newer GPU", gpu=False) from e
    return version, gpu


def cupy_packages() -> dict[str, str]:
    """CuPy distributions that are installed: name, version. More than one is one too many."""
    found = ((d.metadata["Name"], d.version) for d in importlib.metadata.distributions())
    return {name: version for name, version in found if re.fullmatch(r"cupy(-cuda\d+x|-rocm.*)?", name or "")}


def _check_packages(driver: tuple[int, int]) -> None:
    """Raise _NoCuda unless there is one CuPy that fits the driver, with the libraries it loads."""
    cuda = f"cuda{min(driver[0], 13)}"
    by_pip = pip_install(f".[{cuda}]")
    extra = f"make install GPU={cuda} (or {by_pip} in apr's folder)"
    found = cupy_packages()
    if not found:
        raise _NoCuda("CuPy is not installed", extra)
    away = f"pip uninstall {' '.join(sorted(found))}, then {extra}"
    if len(found) > 1:
        raise _NoCuda(f"{len(found)} CuPy packages are in each other's way: {', '.join(sorted(found))}", away)
    ((name, version),) = found.items()
    made_for = re.fullmatch(r"cupy-cuda(\d+)x", name)
    if made_for and not OLDEST_CUDA[0] <= int(made_for[1]) <= driver[0]:
        raise _NoCuda(
            f"{name} does not fit a driver for CUDA {_dotted(driver)}", f"update the driver, or {away}"
        )
    if "rocm" in name or int(version.split(".")[0]) < OLDEST_CUPY:
        raise _NoCuda(f"{name} {version} is not CuPy {OLDEST_CUPY} or newer for CUDA", away)
    missing = _missing_libraries()
    if missing:
        raise _NoCuda(
            f"CuPy needs {' and '.join(missing)}, which cannot be found", f"{extra} installs all of it"
        )


def _missing_libraries() -> list[str]:
    """Parts of CUDA that the cuda backend loads and that are neither in Python packages nor on the system."""
    try:
        from cuda import pathfinder
    except ImportError:
        return ["the Python package cuda-pathfinder"]

    def has(find: Callable[[str], object], name: str) -> bool:
        try:
            return find(name) is not None
        except RuntimeError:
            return False

    parts = [
        ("cuBLASLt", pathfinder.load_nvidia_dynamic_lib, "cublasLt"),
        ("NVRTC", pathfinder.load_nvidia_dynamic_lib, "nvrtc"),
        ("CUDA's headers", pathfinder.find_nvidia_header_directory, "cudart"),
    ]
    return [title for title, find, name in parts if not has(find, name)]


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
