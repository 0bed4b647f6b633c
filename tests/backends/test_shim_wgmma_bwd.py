"""Gradients of attention on wgmma, on the host: as in test_shim_mma.py, with wgmma, TMA and mbarriers by
tests/support/shim/wgmma_shim.h. Every planted fault of these kernels is wrong where it says, and every edit that would be a
race or a hang on a GPU ends in wrong numbers or an error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apr.backends import reference
from apr.backends.cuda import attention as _mma
from apr.backends.cuda import attention_wgmma as _wgmma
from apr.backends.cuda import kernels
from apr.bisect.planted.kernel_faults import KERNEL_FAULTS, KernelFault
from apr.common.rounding import ceil_div
from cases import Backend, Row, make, overlay, run
from host_shim import Library, folder, host_map, on_the_host, over, table  # noqa: F401  folder is a fixture
from kernel_rows import MMA, WGMMA, parameters_off, rows_of
from kernel_rows import wrong_in_bfloat16 as wrong
from precision import differing, flash
from wgmma_machine import Machine, compile_all

FAULTS = [fault for fault in KERNEL_FAULTS.values() if fault.module == WGMMA and fault.op == "attention_bwd"]
FAST = flash()

# Every head width; tiles that are full, one over and a part; steps that end a tile and do not; queries that are split over blocks
# and not; more keys than queries; documents that end inside tiles, and tiles that none reaches.
ROWS = [
    *table("attention", "1 59 4 2 64, 2 257 2 1 64, 1 97 2 2 96, 1 145 2 1 128, 1 128 7 1 128, 9 3 30 30 64"),
    *table("attention_window", "1 257 2 1 64 33, 1 300 2 1 128 70"),
    *table("attention_cache", "1 5 130 130 2 1 64 7"),
    *table(
        "attention_documents",
        "2 97 4 2 64 0, 1 257 4 2 64 0, 1 300 2 1 64 59, 2 513 2 1 64 0, 2 97 2 1 96 33, 1 257 2 1 128 0",
    ),
    *table(
        "attention_documents_cache", "2 13 97 100 4 2 64 0, 2 59 257 257 2 1 128 0, 1 64 257 257 2 1 96 0"
    ),
]


@pytest.fixture(scope="module")
def machine(folder: Path) -> Machine:
    """The sound kernels, in all variants."""
    made = Machine(folder, kernels.source(WGMMA))
    compile_all((made, defines) for _, defines in kernels.variants(WGMMA))
    return made


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], Backend]:
    """launches(machine): the backend whose kernels it runs."""

    def use(machine: Machine) -> Backend:
        monkeypatch.setitem(sys.modules, "apr.backends.cuda.launch", machine)
        monkeypatch.setattr("apr.backends.cuda.launch", machine, raising=False)
        return overlay(reference, attention_fwd=forward, attention_bwd=_wgmma.backward)

    return use


def forward(y: Any, lse: Any, q: Any, k: Any, v: Any, *more: Any) -> None:
    """The reference, which does not know bfloat16."""
    wide = y.astype(np.float32)
    reference.attention_fwd(wide, lse, *(x.astype(np.float32) for x in (q, k, v)), *more)
    y[...] = wide


@over(ROWS)
def test_accuracy(machine: Machine, launches: Any, row: Row) -> None:
    assert wrong(launches(machine), row) == []


@pytest.fixture
def unsplit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block for all queries of a tile of keys, as in large batches: groups then pass by steps that they do not see."""
    monkeypatch.setattr(_wgmma, "split_count", lambda b, s, k: 1)


@over(
    [
        *table("attention", "1 257 2 1 64, 1 257 2 1 128"),
        *table("attention_window", "1 257 2 1 64 33, 1 300 2 1 128 70"),
        *table("attention_documents_cache", "2 59 257 257 2 1 128 0"),
    ]
)
def test_accuracy_of_whole_tiles(machine: Machine, launches: Any, unsplit: None, row: Row) -> None:
    assert wrong(launches(machine), row) == []


@over([ROWS[1], ROWS[-2]])
def test_order_of_threads_and_number_of_blocks_do_not_matter(
    machine: Machine, launches: Any, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each launch has its own random order of threads, copies and products."""
    be, values = launches(machine), make(row, "bfloat16")
    first = run(be, row, "bfloat16", values)
    monkeypatch.setattr(machine, "multiprocessors", lambda: 4)
    assert differing(first, run(be, row, "bfloat16", values)) == []


def test_kernels_with_and_without_borders_are_launched(machine: Machine, launches: Any) -> None:
    asked = []
    spy = SimpleNamespace(
        **{name: getattr(machine, name) for name in ("scratch", "multiprocessors", "tensor_map")},
        kernel=lambda module, name, act, **defines: (
            lambda *a, **k: asked.append((module, name, defines["DOCUMENTS"]))
        ),
    )
    be = launches(spy)
    for row in [*table("attention", "2 59 4 2 64"), *table("attention_documents", "2 59 4 2 64 0")]:
        run(be, row, "bfloat16", make(row, "bfloat16"))
    names = [name for name in kernels.signatures(WGMMA) if "fwd" not in name]
    want = {(WGMMA, name, n) for name in names for n in (0, 1)} | {
        (MMA, "attention_dkv_sum", n) for n in (0, 1)
    }
    assert set(asked) == want


# Planted faults


@pytest.fixture(scope="module")
def spoiled(folder: Path) -> dict[str, Machine]:
    """A machine for every fault."""
    machines = {fault.name: Machine(folder, fault.edited()) for fault in FAULTS}
    compile_all(
        (machines[f.name], {"HEAD_DIM": d, "DOCUMENTS": int("documents" in f.needs)})
        for f in FAULTS
        for d in {row.sizes["D"] for row in rows_of(f)}
    )
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


EDITS = {  # width of heads, old, new: what is at work is touched, what others wait for does not come, too much is passed by
    "keys_given_back_early": (
        64,
        "held = keys.full() + 8;",
        "held = 0;\n      if (lane == 0) barrier_arrive(keys.full() + 8);",
    ),
    "keys_never_given_back": (
        64,
        "if (held && lane == 0) barrier_arrive(held);\n      held = keys",
        "held = keys",
    ),
    "queries_not_waited_for": (64, "queries.wait();\n        products_begin();", "products_begin();"),
    "scores_read_early": (
        64,
        "products_wait<1>(s);\n      if (held && lane == 0) barrier_arrive(held);\n      held = queries",
        "products_wait<2>(s);\n      if (held && lane == 0) barrier_arrive(held);\n      held = queries",
    ),
    "statistics_not_counted": (64, "2 * DKV_QUERIES * ROW + STATS_BYTES);", "2 * DKV_QUERIES * ROW);"),
    "queries_beyond_the_end": (
        64,
        "t < T ? top[half] : -minus_infinity()",
        "t < T ? top[half] : minus_infinity()",
    ),
    "scores_asked_for_ahead_read_early": (
        128,
        "products_wait<0>(s);\n        products_begin();\n      } else {\n        queries",
        "products_wait<2>(s);\n        products_begin();\n      } else {\n        queries",
    ),
    "keys_passed_by": (128, "(t_group + 63 + offset) / DQ_KEYS + 1)", "(t_group + 63 + offset) / DQ_KEYS)"),
    "queries_passed_by": (128, "t + DKV_QUERIES - 1 + offset < j_group;", "t + offset < j_group;"),
    "queries_passed_by_and_kept": (128, "queries.wait();\n        queries.release();", "queries.wait();"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_that_no_compiler_sees_is_seen(folder: Path, launches: Any, unsplit: None, name: str) -> None:
    d, old, new = EDITS[name]
    text = kernels.source(WGMMA)
    assert text.count(old) == 1
    be = launches(Machine(folder, text.replace(old, new)))
    found: list[str] = []
    for row in table("attention", f"1 257 4 2 {d}") * 4:  # not every order of threads shows it
        try:
            found += wrong(be, row)
        except AssertionError as e:
            found.append(str(e))
        if found:
            return
    raise AssertionError("not seen")


# Geometry


@pytest.mark.parametrize("d", _wgmma.HEAD_DIMS)
@pytest.mark.parametrize("which", ["DQ", "DKV"])
def test_what_is_launched_fits(which: str, d: int) -> None:
    """227 KiB is what a block of an H200 can have; that nothing is used beyond is seen by the kernels above."""
    few, many = (_wgmma.geometry(which, d, items, 132) for items in (5, 10**6))
    assert (few.grid, many.grid) == ((5,), (132,))
    assert few.shared == many.shared <= 227 << 10


def test_few_keys_split_the_queries_and_many_do_not() -> None:
    for b, s, k in ((4, 512, 2), (1, 1, 1), (16, 2048, 2), (1, 32768, 2)):
        splits = _wgmma.split_count(b, s, k)
        assert 1 <= splits <= _wgmma.LARGEST_SPLIT
        assert splits == 1 or splits * b * k * ceil_div(s, _wgmma.ROWS) <= _mma.BLOCKS
    assert _wgmma.split_count(4, 512, 2) > 1 == _wgmma.split_count(16, 2048, 2)


def test_only_hopper_is_served() -> None:
    served = {
        (arch, d)
        for arch in ("sm_80", "sm_90a", "sm_100")
        for d in (32, 64, 96, 128)
        if _wgmma.serves(arch, d)
    }
    assert served == {("sm_90a", d) for d in kernels.SPECIAL[WGMMA].defines["HEAD_DIM"]}
