"""Attention on wgmma, forward, on the host: as in test_shim_wgmma_bwd.py. Every planted fault is wrong where it says, and every
edit that would be a race or a hang on a GPU ends in wrong numbers or an error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apr.backends import reference
from apr.backends.cuda import attention_wgmma as _wgmma
from apr.backends.cuda import kernels
from apr.bisect.planted.kernel_faults import KERNEL_FAULTS, KernelFault
from cases import Backend, Row, make, overlay, rows, run
from host_shim import CASE, folder, over  # noqa: F401  folder is a fixture
from kernel_rows import WGMMA, rows_of
from kernel_rows import wrong_in_bfloat16 as wrong
from precision import differing, figures, flash, off
from wgmma_machine import Machine

FAULTS = [f for f in KERNEL_FAULTS.values() if f.module == WGMMA and f.op == "attention_fwd"]
FAST = flash()


def table(name: str, sizes: str) -> list[Row]:
    """The forward call of a case of cases.py at other sizes."""
    case = CASE[name]
    return rows(replace(case, bwd="", table=f"{case.table.split(':')[0]}: {sizes}"))


# Every head width; tiles that are full, one over and a part; groups without a query; windows shorter and longer than a step;
# documents that end inside tiles; more keys than queries; H/K of 1, 2, 4, 7.
ROWS = [
    *table(
        "attention",
        "1 5 7 1 64, 2 97 4 2 64, 1 513 2 1 64, 1 257 2 2 96, 1 59 4 1 96, 1 130 2 1 128, 1 257 1 1 128",
    ),
    *table("attention_window", "1 257 2 1 64 33, 1 513 1 1 64 200, 1 257 1 1 128 130"),
    *table("attention_cache", "1 5 130 130 2 1 64 7, 1 97 400 400 2 1 128 0"),
    *table("attention_documents", "2 97 4 2 64 0, 1 513 2 1 64 0, 2 97 2 1 96 33, 1 257 2 1 128 0"),
    *table("attention_documents_cache", "2 13 97 100 4 2 64 0, 2 59 257 257 2 1 128 0"),
]


@pytest.fixture(scope="module")
def machine(folder: Path) -> Machine:
    """The sound kernels."""
    return Machine(folder, kernels.source(WGMMA))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], Backend]:
    """launches(machine): the backend whose kernels it runs."""

    def use(machine: Machine) -> SimpleNamespace:
        monkeypatch.setitem(sys.modules, "apr.backends.cuda.launch", machine)
        monkeypatch.setattr("apr.backends.cuda.launch", machine, raising=False)
        return overlay(reference, attention_fwd=_wgmma.forward)

    return use


@over(ROWS)
def test_accuracy(machine: Machine, launches: Any, row: Row) -> None:
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


@over(table("attention_documents", "1 257 2 1 64 0, 1 97 2 1 128 33"))
def test_borders_that_hide_nothing_change_nothing(machine: Machine, launches: Any, row: Row) -> None:
    be, values = launches(machine), make(row, "bfloat16")
    values["doc_start"] = 0 * values["doc_start"]
    (plain,) = table("attention_window", " ".join(map(str, row.sizes.values())))
    assert differing(run(be, row, "bfloat16", values), run(be, plain, "bfloat16", values)) == []


# Planted faults. Of the catalogue, and edits that would be a race or a hang on a GPU, or that only other rows show.


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_a_fault_shows_where_it_says(
    fault: KernelFault, folder: Path, machine: Machine, launches: Any
) -> None:
    """And without the fault the same rows are right."""
    some = [Row(replace(row.case, bwd=""), row.sizes) for row in rows_of(fault)]
    be = launches(Machine(folder, fault.edited()))
    found = {name.split()[0] for row in some for name in wrong(be, row)}
    assert next(p for p in ("y", "lse") if p in found) == fault.output
    be = launches(machine)
    assert [wrong(be, row) for row in some] == [[]] * len(some)


def jumping(row: Row) -> dict[str, Any]:
    """Values of a row in which the scores of the first keys, which come last, are far larger than all others."""
    values = make(row, "bfloat16")
    values["k"][:, :100] *= 32
    return values


def test_far_larger_scores_that_come_late(machine: Machine, launches: Any, folder: Path) -> None:
    """And without the factor by which the sums shrink they are wrong."""
    (row,) = table("attention", "1 400 2 1 64")
    values, old = jumping(row), "        if (grown)\n"
    text = kernels.source(WGMMA)
    assert text.count(old) == 1
    for of, is_sound in (
        (machine, True),
        (Machine(folder, text.replace(old, "        if (false)\n")), False),
    ):
        got = run(launches(of), row, "bfloat16", values)
        assert (off(figures(row, "bfloat16", got, values, FAST)) == []) is is_sound


PLAIN, WIDE = table("attention", "1 257 4 2 64"), table("attention", "1 257 2 1 128")
LONG, MANY = table("attention", "1 900 1 1 64"), table("attention", "1 130 24 1 64")
WINDOW = table("attention_window", "1 513 2 1 128 60")
SKIPPING = table("attention", "1 513 2 1 64")  # some groups see fewer steps than their block
EDITS = {  # old, new, rows
    "sum_of_the_last_step": ("sum[h] += add;", "sum[h] = add;", PLAIN),
    "wrong_step_of_k": ("further(along_k(b), k / 4 * B_ROWS * TILE_ROW + k % 4 * 32)", "along_k(b)", PLAIN),
    "second_tile_forgotten": ("along_k(b), k / 4 * B_ROWS * TILE_ROW + k % 4 * 32)", "along_k(b), k % 4 * 32)", WIDE),
    "values_of_the_tile_beside": ("K * 16 * TILE_ROW), k * 16 * TILE_ROW)", "TILE_ROW), k * 16 * TILE_ROW)", WIDE),
    "values_released_early": (
        "        products_wait<0>(o);\n        values.release();\n",
        "        values.release();\n        products_wait<0>(o);\n",
        LONG,
    ),
    "keys_released_twice": (
        "        products_wait<1>(s);\n        keys.release();\n",
        "        products_wait<1>(s);\n        keys.release(), keys.release();\n",
        LONG,
    ),
    "values_never_released": (
        "        products_wait<0>(o);\n        values.release();\n",
        "        products_wait<0>(o);\n",
        LONG,
    ),
    "keys_not_waited_for": (
        "        keys.wait();\n        turn_begin();\n        products_begin(o, p);\n",
        "        turn_begin();\n        products_begin(o, p);\n",
        PLAIN,
    ),
    "turn_not_passed_on": ("        turn_end();\n        products_wait<1>(s);", "        products_wait<1>(s);", WIDE),
    "steps_passed_by_without_a_turn": ("      turn_begin();\n      turn_end();\n", "", WINDOW),
    "queries_not_waited_for": ("    own.wait();\n    skip", "    skip", MANY),
    "scores_read_early": ("turn_end();\n        products_wait<1>(s);", "turn_end();\n        products_wait<2>(s);", PLAIN),
    "values_scaled_early": (
        "        products_wait<0>(o);\n        values.release();\n",
        "        values.release();\n",
        PLAIN,
    ),
    "stored_without_a_fence": ("// in place of the queries\n      fence_async();\n", "\n", PLAIN),
    "stored_before_others_wrote": (
        "// in place of the queries\n      fence_async();\n      group_sync(1 + group);\n",
        "\n      fence_async();\n",
        PLAIN,
    ),
    "too_many_registers": ("registers_more<registers_of_others(FWD_GROUPS)>", "registers_more<168>", PLAIN),
    "one_release_for_a_group": (
        "if (threadIdx.x % 32 == 0) barrier_arrive(full() + 8);",
        "if (threadIdx.x % 128 == 0) barrier_arrive(full() + 8), barrier_arrive(full() + 8), barrier_arrive(full() + 8),"
        "barrier_arrive(full() + 8);",
        SKIPPING,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_seen(folder: Path, launches: Any, name: str) -> None:
    old, new, some = EDITS[name]
    text = kernels.source(WGMMA)
    assert text.count(old) == 1, old
    be = launches(Machine(folder, text.replace(old, new)))
    for row in some * 6:  # not every order of threads shows it
        try:
            if wrong(be, row):
                return
        except AssertionError:
            return
    raise AssertionError("not seen")
