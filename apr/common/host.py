"""The machine that apr runs on: CPU cores, processor, main memory, cache folder, processes."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

from . import cgroup
from .temporary import private_temporary


def cores() -> int:
    """Count the CPU cores that this process may use: those it may run on, within the quota of its control groups."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(own, cgroup.cores() or own)


def threads() -> int:
    """Count the threads to compute with where nobody says: one a core, and no more than NUMBA_NUM_THREADS allows."""
    most = os.environ.get("NUMBA_NUM_THREADS", "")
    return min(cores(), int(most)) if most.isascii() and most.isdigit() and int(most) else cores()


def cpu_name() -> str:
    """Read the model name of the processor, as the system reports it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def importing_this(env: Mapping[str, str]) -> dict[str, str]:
    """Give a process that is started the environment in which it imports the apr that starts it."""
    path = [str(Path(__file__).resolve().parents[2]), *filter(None, [env.get("PYTHONPATH")])]
    return {**env, "PYTHONPATH": os.pathsep.join(path)}


def available_memory() -> int | None:
    """Measure the bytes of main memory available without swapping, on the machine and within the control groups of this
    process; None where the system does not report them."""
    limits = []
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    if found:
        limits.append(int(found[1]) * 1024)
    within = cgroup.available_memory()
    if within is not None:
        limits.append(within)
    return min(limits) if limits else None


def cache_dir() -> Path:
    """Locate the cache of tokenised corpora and GPU algorithms: $APR_CACHE, or apr in the user's cache folder.

    A user without a home has it among temporary files."""
    base, caches = os.environ.get("APR_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base)
    if caches:
        return Path(caches) / "apr"
    try:
        return Path.home() / ".cache" / "apr"
    except RuntimeError:
        return private_temporary("cache") or Path(os.devnull)
