"""Backends. A backend is a module; all export the same functions with the same parameter lists.

| name      | what it is                                        | dtypes          |
|-----------|---------------------------------------------------|-----------------|
| reference | every op in plain NumPy: the specification        | float64, float32|
| cpu       | OpenBLAS and Numba kernels, one pool of threads   | float32         |
"""

from __future__ import annotations

import importlib
from types import ModuleType

from ..errors import DeviceError

NAMES = ("reference", "cpu")


def get(name: str) -> ModuleType:
    """The backend module called `name`. Raises DeviceError for a name that is not one of NAMES."""
    if name not in NAMES:
        raise DeviceError(f"backend {name!r} does not exist; choose one of {', '.join(NAMES)}")
    return importlib.import_module(f"apr.backends.{name}")
