"""Backends. A backend is a module; all export the same functions with the same parameter lists.

| name      | what it is                                        | dtypes           |
|-----------|---------------------------------------------------|------------------|
| reference | every op in plain NumPy: the specification        | float64, float32 |
| cpu       | OpenBLAS and Numba kernels, one pool of threads   | float32          |
| cuda      | CuPy arrays, cuBLASLt and our own CUDA kernels    | float32, bfloat16|
"""

from __future__ import annotations

import importlib
from types import ModuleType

from ..common.errors import DeviceError

MODULES = {"reference": "reference", "cpu": "cpu.ops", "cuda": "cuda.device"}
NAMES = tuple(MODULES)

PLUMBING = frozenset(  # functions of a backend that do not compute
    [
        "empty",
        "from_host",
        "to_host",
        "fill",
        "copy",
        "sync",
        "memory",
        "overhead",
        "free_memory",
        "set_threads",
        "set_device",
        "describe",
        "tune",
        "capture",
    ]
)


def get(name: str) -> ModuleType:
    """The backend module called `name`. Raises DeviceError for a name that is not one of NAMES, and for
    cuda without CuPy; apr.backends.select.choose says more about what is missing.
    """
    if name not in NAMES:
        raise DeviceError(f"backend {name!r} does not exist; choose one of {', '.join(NAMES)}")
    try:
        return importlib.import_module(f"apr.backends.{MODULES[name]}")
    except ImportError as e:
        if name != "cuda":
            raise
        raise DeviceError(f"backend cuda cannot be loaded: {e}") from e
