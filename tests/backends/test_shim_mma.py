"""Attention on tensor cores, on the host: as in test_shim.py, with mma.sync and ldmatrix by tests/support/shim/mma_shim.h,
launched with the geometry of cuda/attention.py. Every planted fault of these kernels is wrong where it says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apr.backends import reference
from apr.backends.cuda import attention as _cuda_attention
from apr.backends.cuda import kernels
from apr.backends.cuda.arguments import Arguments
from apr.bisect.planted.kernel_faults import KERNEL_FAULTS, KernelFault
from cases import Backend, Row, make, overlay, run
from host_shim import OPTIMISED, Library, folder, over, precompile, table  # noqa: F401  folder is a fixture
from host_shim import on_the_host as without_ptx
from kernel_rows import MMA, parameters_off, rows_of
from kernel_rows import wrong_in_bfloat16 as wrong
from precision import differing, flash

FAULTS = [fault for fault in KERNEL_FAULTS.values() if fault.module == MMA]
DYNAMIC = "extern __shared__ __align__(1024) unsigned char shared[];"
FAST = flash()

# Every head width; parts of tiles, whole tiles and several; query heads that are split over blocks and not; documents that end
# inside tiles, and tiles that none reaches.
ROWS = [
    *table("attention", "1 59 4 2 32, 1 97 2 1 64, 1 97 2 2 96, 1 97 2 1 128, 1 257 2 1 64"),
    *table("attention_window", "1 257 2 1 64 33"),
    *table("attention_cache", "1 5 130 130 2 1 32 7"),
    *table(
        "attention_documents",
        "2 59 4 2 32 0, 1 257 2 1 32 65, 2 97 4 2 64 0, 1 257 4 2 64 0, 1 300 2 1 64 59, 2 513 2 1 64 0, 2 97 2 1 96 33,"
        "1 257 2 2 96 0, 2 97 2 1 128 0, 1 257 2 1 128 0",
    ),
    *table(
        "attention_documents_cache", "2 13 97 100 4 2 64 0, 2 59 257 257 2 1 128 0, 1 64 257 257 2 1 96 0"
    ),
]


def on_the_host(text: str) -> str:
    """A text of attention_mma with the PTX in it replaced."""
    assert text.count(DYNAMIC) == 3
    text = without_ptx(text, "mma_shim.h")
    return text.replace(DYNAMIC, "unsigned char* const shared = shim::shared_base();")


class Machine:
    """Stands for _launch.py: kernels of one text of attention_mma, compiled when they are first launched."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder, self.text, self.seed = folder, on_the_host(text), 0
        self.libraries: dict[tuple[int, int], Library] = {}

    def library(self, **defines: int) -> Library:
        key = defines["HEAD_DIM"], defines["DOCUMENTS"]
        if key not in self.libraries:
            names = list(kernels.signatures(MMA))
            self.libraries[key] = Library(self.text, names, "bfloat16", defines, self.folder, OPTIMISED)
        return self.libraries[key]

    def kernel(self, module: str, name: str, act: str, **defines: int) -> Callable[..., None]:
        check = Arguments(name, kernels.signatures(module)[name], act, np.ndarray)

        def launch(grid: Any, block: Any, args: tuple[Any, ...], shared: int = 0) -> None:
            self.seed += 1
            self.library(**defines)(name, grid, block, check(args), shared, self.seed)

        return launch

    def scratch(self, shape: tuple[int, ...], dtype: str, slot: str) -> Any:
        return np.full(shape, np.nan, dtype)


def backend() -> SimpleNamespace:
    """The reference with attention of the tensor cores, launched on what stands for _launch.py."""
    return overlay(reference, attention_fwd=_cuda_attention.forward, attention_bwd=_cuda_attention.backward)


@pytest.fixture(scope="module")
def machine(folder: Path) -> Machine:
    """The sound kernels, in all variants."""
    precompile(folder, OPTIMISED)
    made = Machine(folder, kernels.source(MMA))
    with ThreadPoolExecutor(2) as pool:
        variants = [defines for _, defines in kernels.variants(MMA)]
        for job in [pool.submit(made.library, **defines) for defines in variants]:
            job.result()
    return made


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], Backend]:
    """launches(machine): the backend whose kernels it runs."""

    def use(machine: Machine) -> Backend:
        monkeypatch.setitem(sys.modules, "apr.backends.cuda.launch", machine)
        monkeypatch.setattr("apr.backends.cuda.launch", machine, raising=False)
        return backend()

    return use


@over(ROWS)
def test_accuracy(machine: Machine, launches: Any, row: Row) -> None:
    assert wrong(launches(machine), row) == []


@over([ROWS[1], *table("attention_documents", "2 257 4 2 64 0, 2 97 2 1 128 33")])
def test_order_of_threads_does_not_matter(machine: Machine, launches: Any, row: Row) -> None:
    """Each launch has its own random order of blocks and threads."""
    be, values = launches(machine), make(row, "bfloat16")
    assert differing(*(run(be, row, "bfloat16", values) for _ in range(2))) == []


@over(table("attention_documents", "1 257 2 1 64 0, 1 257 2 1 128 130, 1 97 4 2 32 0, 1 97 2 1 96 0"))
def test_borders_that_hide_nothing_change_nothing(machine: Machine, launches: Any, row: Row) -> None:
    """The kernels with documents, all of them beginning at 0, and those without give the same bits in forward; in
    backward dk and dv are summed in other steps for some head widths."""
    be, values = launches(machine), make(row, "bfloat16")
    values["doc_start"] = 0 * values["doc_start"]
    (plain,) = table("attention_window", " ".join(map(str, row.sizes.values())))
    got, want = run(be, row, "bfloat16", values), run(be, plain, "bfloat16", values)
    assert set(differing(got, want)) <= {"dk", "dv"}
    assert wrong(be, row) == []


def test_the_variants_of_both_kinds_are_launched(machine: Machine, launches: Any) -> None:
    asked = []
    spy = SimpleNamespace(
        kernel=lambda module, name, act, **defines: (
            lambda *a, **k: asked.append((name, defines["DOCUMENTS"]))
        ),
        scratch=machine.scratch,
    )
    be = launches(spy)
    for name in ("attention", "attention_documents"):
        (row,) = table(name, "2 59 4 2 64 0" if name.endswith("s") else "2 59 4 2 64")
        run(be, row, "bfloat16", make(row, "bfloat16"))
    assert set(asked) == {(name, documents) for name in kernels.signatures(MMA) for documents in (0, 1)}


# Planted faults


@pytest.fixture(scope="module")
def spoiled(folder: Path) -> dict[str, Machine]:
    """A machine for every fault."""
    machines = {fault.name: Machine(folder, fault.edited()) for fault in FAULTS}
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(machines[f.name].library, HEAD_DIM=d, DOCUMENTS=int("documents" in f.needs))
            for f in FAULTS
            for d in {row.sizes["D"] for row in rows_of(f)}
        ]
        for job in jobs:
            job.result()
    return machines


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_a_fault_shows_where_it_says(
    fault: KernelFault, machine: Machine, spoiled: Any, launches: Any
) -> None:
    """And without the fault the same rows are right."""
    some, be = rows_of(fault), launches(spoiled[fault.name])
    assert parameters_off(fault, some, partial(wrong, be))[:1] == [fault.output]
    be = launches(machine)
    assert [wrong(be, row) for row in some] == [[]] * len(some)
