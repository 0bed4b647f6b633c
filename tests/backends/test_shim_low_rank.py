"""Products of adapters on tensor cores, on the host: mma.sync and movmatrix by tests/support/shim/low_rank_shim.h."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr.backends.cuda import kernels, low_rank, ops
from cases import Row, make, run
from host_shim import OPTIMISED, Host, backend, folder, over, precompile, table  # noqa: F401  folder is a fixture
from precision import accuracy, differing, off

# Ranks that fill a tile and do not; columns of one block and of several, the last of a warp or none; tokens of part of a tile,
# of several blocks, and rows of which more are than sums have room for.
ROWS = [
    *table("adapted_bwd_a", "37 72 16, 33 1064 8"),
    *table("adapted_bwd_b", "16 8 8, 97 560 16, 50 1104 16"),
    *table("adapted_bwd_rows_apart", "37 72 8 96"),
]


@pytest.fixture(scope="module")
def host(folder: Path) -> Host:
    """A host that compiles for speed."""
    precompile(folder, OPTIMISED)
    return Host(folder)


@pytest.fixture
def be(host: Host, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend on the host; a launch has few blocks, and room for the sums of few rows."""
    monkeypatch.setattr(ops, "machine", host)
    monkeypatch.setattr(low_rank, "BLOCKS", 4)
    monkeypatch.setattr(low_rank, "PARTS_BYTES", 4 * 16 * 64)
    monkeypatch.setattr(low_rank, "MIN_WIDTH", 8)
    return backend()


@over(ROWS)
def test_accuracy(be: Any, row: Row) -> None:
    assert off(accuracy(be, row, "bfloat16")) == []


@over(ROWS[:4])
def test_order_of_threads_does_not_matter(be: Any, row: Row) -> None:
    values = make(row, "bfloat16")
    assert differing(*(run(be, row, "bfloat16", values) for _ in range(2))) == []


def test_what_the_kernel_does_not_serve(be: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other dtypes and ranks, short rows, and rows that are no whole 16 bytes, are left to the products of the library."""

    def serves(width: int, rank: int, dtype: str = "bfloat16", apart: int = 0) -> bool:
        x = np.zeros((3, width + apart), dtype)[:, :width]
        return low_rank.serves(np.zeros((3, rank), dtype), x, np.zeros((3, rank), dtype))

    assert [serves(*of) for of in ((8, 8), (72, 16), (72, 16, "bfloat16", 8))] == [True] * 3
    others = ((72, 16, "float32"), (72, 4), (72, 32), (60, 16), (72, 16, "bfloat16", 4))
    assert [serves(*of) for of in others] == [False] * 5
    monkeypatch.setattr(low_rank, "MIN_WIDTH", 80)
    assert not serves(72, 16)


FAULTS = [
    ("__syncthreads();\n      if (threadIdx.x / TILE", ";\n      if (threadIdx.x / TILE"),
    ("if (n + 8 < N)", "if (n + 8 < N - 1)"),
    ("b < token_blocks", "b < token_blocks - 1"),
    ("b < column_blocks", "b < column_blocks - 1"),
    ("group < groups && at < W", "group < groups - 1 && at < W"),
    ("to = min(from + tiles,", "to = min(from + tiles - 1,"),
    ("!= t % TURNS", "!= t % 3"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f[1][:24])
def test_a_planted_fault_is_seen(fault: Any, folder: Path, be: Any, monkeypatch: Any) -> None:
    right, wrong = fault
    text = kernels.source("low_rank")
    assert right in text
    monkeypatch.setattr(ops, "machine", Host(folder, {"low_rank": text.replace(right, wrong)}))
    rows = [*table("adapted_bwd_a", "61 72 16"), *table("adapted_bwd_b", "50 1104 16")]
    assert any(off(accuracy(be, row, "bfloat16")) for row in rows)
