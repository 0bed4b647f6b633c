"""Planted faults of CUDA kernels: each matches the source, compiles, and makes wrong what it says.

What runs on CUDA cores is run on the host by the shim of test_shim.py, at the shapes of a small model. Those of tensor cores
are shown to compile here, and run on the host by test_shim_mma.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nvrtc
from apr.backends.contract import OPS
from apr.backends.cuda import kernels, ops
from apr.backends.cuda.kernels.signatures import parse
from apr.bisect.planted.kernel_faults import KERNEL_FAULTS, KernelFault, planted
from apr.model.presets import PRESETS
from cases import Backend
from host_shim import Host, backend, folder  # noqa: F401  folder is a fixture
from kernel_rows import MMA, WGMMA, parameters_off, rows_of
from precision import accuracy, off

FAULTS = list(KERNEL_FAULTS.values())
on = pytest.mark.parametrize
each_fault = on("fault", FAULTS, ids=lambda f: f.name)


def wrong(be: Backend, fault: KernelFault, act: str) -> list[str]:
    """The parameters of the fault's op that are off in any of its rows, in their order."""
    return parameters_off(fault, rows_of(fault), lambda row: off(accuracy(be, row, act)))


def first_wrong(machines: dict[str, Backend], fault: KernelFault) -> str | None:
    """The first parameter that is off in every dtype. machines: dtype -> backend with the fault."""
    found = [wrong(machines[act], fault, act) for act in fault.acts]
    return next((p for p in found[0] if all(p in others for others in found)), None)


# The text


@each_fault
def test_the_edit_is_of_one_module_and_is_undone(fault: KernelFault) -> None:
    before = {module: kernels.source(module) for module in kernels.modules()}
    after = {**before, fault.module: fault.edited()}
    with planted(fault):
        assert {module: kernels.source(module) for module in kernels.modules()} == after != before
    assert {module: kernels.source(module) for module in kernels.modules()} == before
    assert parse(after[fault.module], "edited") == kernels.signatures(fault.module)


@each_fault
def test_what_a_fault_says_exists(fault: KernelFault) -> None:
    assert KERNEL_FAULTS[fault.name] is fault
    assert fault.output in OPS[fault.op].parameters
    assert fault.what
    assert set(fault.acts) <= {act for act, _ in kernels.variants(fault.module)} != set()
    models = [*PRESETS.values(), *(replace(PRESETS["mistral-tiny"], head_dim=d) for d in (32, 64))]
    assert fault.needs.startswith("adapters") or any(fault.applies(cfg) for cfg in models)
    assert rows_of(fault)


def test_every_module_has_faults() -> None:
    # Decode steps are no part of a training step: their faults are planted in tests/inference/test_decode.py.
    training = {module for module in kernels.modules() if not module.startswith("decode_")}
    assert {fault.module for fault in FAULTS} == training
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 16


FAULT = KERNEL_FAULTS["kernel_swiglu_swapped"]


def fail_in(fault: KernelFault) -> None:
    """Raise while a fault is planted."""
    with planted(fault):
        assert fault.new in kernels.source(fault.module)
        raise ZeroDivisionError


def test_source_is_restored_after_an_exception() -> None:
    sound = kernels.source
    with pytest.raises(ZeroDivisionError):
        fail_in(FAULT)
    assert kernels.source is sound
    assert FAULT.new not in kernels.source("swiglu")


def test_faults_can_be_nested() -> None:
    other = KERNEL_FAULTS["kernel_swiglu_bwd_scaled"]
    with planted(FAULT), planted(other):
        assert FAULT.new in kernels.source("swiglu")
        assert other.new in kernels.source("swiglu")


@on("edit", [dict(old="no such text"), dict(count=2), dict(old="gate[i]")], ids=str)
def test_text_that_is_not_there_as_often_is_refused(edit: dict[str, Any]) -> None:
    sound = kernels.source
    with (
        pytest.raises(ValueError, match=r"kernel_swiglu_swapped: swiglu\.cu has .* times, not"),
        planted(replace(FAULT, **edit)),
    ):
        pytest.fail("planted")
    assert kernels.source is sound


def test_loaded_kernels_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after, in the caches that every user of the loader goes through."""
    loader = SimpleNamespace(
        _module=cache(lambda module: kernels.source(module)),
        kernel=cache(lambda module: loader._module(module)),
    )
    monkeypatch.setitem(sys.modules, "apr.backends.cuda.launch", loader)
    kernel = loader.kernel  # as ops.machine holds it
    sound, edited = kernel("swiglu"), FAULT.edited()
    with planted(FAULT):
        assert kernel("swiglu") == edited != sound
        assert kernel("norm") == kernels.source("norm")
    assert kernel("swiglu") == sound
    with pytest.raises(ZeroDivisionError):
        fail_in(FAULT)
    assert kernel("swiglu") == sound


# Compilation


@pytest.fixture(scope="module")
def compiled() -> Iterator[Callable[[], dict[str, nvrtc.Result]]]:
    """Results by title: every fault in its dtypes under one NVRTC, for Hopper, attention for heads of 64."""
    major = next((m for m in nvrtc.FOLDERS if nvrtc.installed(m)), None)
    if major is None:
        pytest.skip("NVRTC is not installed (make dev installs it on Linux x86-64)")
    work = nvrtc.fault_jobs()
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(nvrtc.compile_all, major, work[half::2]) for half in range(2)]
        yield lambda: {r.title: r for run in runs for r in run.result()}


@each_fault
def test_the_edited_source_compiles(fault: KernelFault, compiled: Any) -> None:
    for act in fault.acts:
        result = compiled()[nvrtc.title(fault, act)]
        assert result.ok, result.log


# Effect

RUN = [fault for fault in FAULTS if fault.module not in (MMA, WGMMA)]


@pytest.fixture(scope="module")
def spoiled(folder: Path) -> dict[str, Host]:
    """A machine for every fault."""
    hosts = {fault.name: Host(folder, {fault.module: fault.edited()}) for fault in RUN}
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(
                hosts[f.name].library, f.module, act, **({"MAX_D": 64} if f.module == "attention" else {})
            )
            for f in RUN
            for act in f.acts
        ]
        for job in jobs:
            job.result()
    return hosts


@on("fault", RUN, ids=lambda f: f.name)
def test_a_fault_shows_where_it_says(
    fault: KernelFault, spoiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "machine", spoiled[fault.name])
    assert first_wrong(dict.fromkeys(fault.acts, backend()), fault) == fault.output


def test_the_rows_are_right_without_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "machine", Host(folder))
    for fault in RUN:
        assert [wrong(backend(), fault, act) for act in fault.acts] == [[]] * len(fault.acts), fault.name


@each_fault
def test_a_fault_shows_on_a_gpu(cuda: Any, fault: KernelFault) -> None:
    """The rows are right again when the fault is gone."""
    machines = dict.fromkeys(fault.acts, cuda)
    with planted(fault):
        assert first_wrong(machines, fault) == fault.output
    assert first_wrong(machines, fault) is None
