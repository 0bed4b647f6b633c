"""Which backend a --device means, and what the machine has to offer."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from types import ModuleType

from . import backends
from .errors import DeviceError, Refused
from .plan import Memory


def select(device: str, dtype: str | None = None, threads: int | None = None) -> ModuleType:
    """The backend for --device auto, cpu, cuda or cuda:N, set to a number of CPU threads. Its first dtype
    is the default one.

    Only auto may choose. Raises DeviceError when the device is not there, Refused for a dtype that
    it does not compute in.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise DeviceError(f"--device {device}: choose auto, cpu, cuda or cuda:N")
    if device.startswith("cuda"):
        raise DeviceError(
            f"--device {device}: this version of apr computes on the CPU only; use --device cpu"
        )
    backend = backends.get("cpu")
    if dtype is not None and dtype not in backend.dtypes:
        raise Refused(f"--dtype {dtype}: the cpu backend computes in {', '.join(backend.dtypes)}")
    backend.set_threads(cores() if threads is None else threads)
    return backend


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Model name of the processor, as the system reports it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def available_memory() -> int | None:
    """Bytes of main memory that can be had without swapping; None where the system does not say."""
    limits = []
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            limits.append(int(found[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        most, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        if most.strip() != "max":
            limits.append(int(most) - int(used))
    except (OSError, ValueError):
        pass
    return min(limits) if limits else None


def check_fits(need: Memory, backend: ModuleType, advice: str) -> None:
    """Raise Refused when a job needs more memory than its device has, before anything is allocated."""
    have = backend.free_memory()
    if have is not None and need.total > have:
        activations = need.saved + need.scratch + need.logits + need.cache + need.backend
        raise Refused(
            f"the job needs {need.total / 2**30:.2f} GiB of memory (weights {need.weights / 2**30:.2f}, gradients and "
            f"moments {(need.gradients + need.moments + need.master) / 2**30:.2f}, activations "
            f"{activations / 2**30:.2f}) and {have / 2**30:.2f} GiB are "
            f"free; {advice}"
        )
