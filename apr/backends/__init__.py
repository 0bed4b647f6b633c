"""Backends: modules that all have the functions of contract.py.

| name      | what it is                                        | dtypes           |
|-----------|---------------------------------------------------|------------------|
| reference | every op in plain NumPy: the specification        | float64, float32 |
| cpu       | Numba kernels and OpenBLAS, one pool of threads   | float32, bfloat16|
| cuda      | CuPy arrays, cuBLASLt and our own CUDA kernels    | float32, bfloat16|
"""

from __future__ import annotations

import importlib
import os
import sys
import weakref
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

from ..common.errors import DeviceError
from .contract import FACTS, OPS, PLUMBING

# backend -> the modules that define its functions, of two definitions the first
MODULES = {
    "reference": ("reference",),
    "cpu": ("cpu.ops", "cpu.kernels"),
    "cuda": ("cuda.device", "cuda.ops"),
}
# backends whose arrays are NumPy's: plumbing that they do not define is that of reference
NUMPY = ("cpu",)
NAMES = tuple(MODULES)
# What computes with the threads of this process, which a fork of it lacks: the cpu backend and what lies over it.
_threaded: list[weakref.ref[Any]] = []


def get(name: str) -> ModuleType:
    """The backend called `name`. Raises DeviceError for a name that is not one of NAMES, and for cuda without
    CuPy; apr.backends.select.choose says more about what is missing.
    """
    if name not in NAMES:
        raise DeviceError(f"backend {name!r} does not exist; choose one of {', '.join(NAMES)}")
    try:
        return _assembled(name)
    except ImportError as e:
        if name != "cuda":
            raise
        raise DeviceError(f"backend cuda cannot be loaded: {e}") from e


def is_loaded(name: str) -> bool:
    """Say whether this process has used a backend: its number of threads is somebody's choice then."""
    return f"{__name__}.{MODULES[name][0]}" in sys.modules


@cache
def _assembled(name: str) -> ModuleType:
    modules = [importlib.import_module(f"{__name__}.{m}") for m in MODULES[name]]
    if name == "reference":
        return modules[0]
    plumbing = [*modules, importlib.import_module(f"{__name__}.reference")] if name in NUMPY else modules
    return assemble(name, modules, plumbing)


def assemble(name: str, modules: list[ModuleType], plumbing: list[ModuleType]) -> ModuleType:
    """A module with the functions of the contract: ops and facts of `modules`, the others of `plumbing`.

    Raises AttributeError for a function that none of them defines.
    """
    backend = ModuleType(f"{__name__}.{name}", modules[0].__doc__)
    for function in (*FACTS, *OPS, *PLUMBING):
        owners = [m for m in (plumbing if function in PLUMBING else modules) if hasattr(m, function)]
        if not owners:
            raise AttributeError(
                f"backend {name}: {' and '.join(m.__name__ for m in modules)} lack {function}"
            )
        setattr(backend, function, getattr(owners[0], function))
    if name == "cpu":
        _threaded.append(weakref.ref(backend))
    return backend


class Overlay(SimpleNamespace):
    """A backend with some of its functions replaced."""


def overlay(backend: Any, **functions: Any) -> Overlay:
    """A backend with some of its functions replaced."""
    made = Overlay(**{**{name: getattr(backend, name) for name in dir(backend)}, **functions})
    there = [ref for ref in _threaded if ref() is not None]
    if any(ref() is backend for ref in there):
        _threaded[:] = [*there, weakref.ref(made)]
    return made


def _refuse_forked(*args: Any, **named: Any) -> NoReturn:
    raise DeviceError(
        "this process was forked from one in which the cpu backend was at work, and threads do not survive a fork; start "
        'processes with multiprocessing.get_context("spawn"), or fork before the first use of apr'
    )


def _forked() -> None:
    """Let every op raise DeviceError in a fork of a process that has threads of OpenMP: it would end the fork without a word to
    Python, and a multiprocessing.Pool start it again for ever. Numba's other layers survive a fork."""
    backends = [backend for ref in _threaded if (backend := ref()) is not None]
    if not backends or sys.modules["numba"].threading_layer() != "omp":
        return
    for backend in backends:
        for function in (*OPS, "set_threads"):
            setattr(backend, function, _refuse_forked)


os.register_at_fork(after_in_child=_forked)
