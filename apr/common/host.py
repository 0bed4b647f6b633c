"""The machine that apr runs on: CPU cores, processor, main memory, cache folder."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def cores() -> int:
    """Count the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Read the model name of the processor, as the system reports it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def available_memory() -> int | None:
    """Measure the bytes of main memory available without swapping; None where the system does not report them."""
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


def cache_dir() -> Path:
    """Locate the cache of tokenised corpora and GPU algorithms: $APR_CACHE, or apr in the user's cache folder."""
    base = os.environ.get("APR_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "apr"
