"""Every op on the cuda backend: the rows of cases.py, sizes at which GPU kernels change course, and sizes beyond 2^31."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from apr.backends import reference
from cases import BAND, CASES, LARGEST, ROWS, TAKE_64, Arg, Arrays, Backend, Case, Row, make, rows, run
from precision import differing, error, figures, flash, off, unseen

pytestmark = pytest.mark.gpu
CASE = {case.name: case for case in CASES}
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
FAST = flash()  # the reference with attention as matrix products, held to it in test_ops.py


def plain(row: Row) -> Backend:
    """The reference, with fast attention where it would take seconds."""
    z = row.sizes
    products = z["B"] * z["H"] * z["T"] * z.get("S", z["T"]) * z["D"] if "D" in z and "T" in z else 0
    return FAST if products > 4e7 else reference


def over(some: list[Row]) -> pytest.MarkDecorator:
    """Run a test once per row."""
    return pytest.mark.parametrize("row", some, ids=str)


def table(name: str, sizes: str) -> list[Row]:
    """A case of cases.py at other sizes."""
    case = CASE[name]
    return rows(Case(name, case.fwd, case.bwd, f"{case.table.split(':')[0]}: {sizes}"))


@pytest.fixture(scope="module")
def judge(cuda: Any) -> Any:
    """judge(row, dtype, band): names of the outputs that are off."""

    def off_in(row: Row, dtype: str, band: int = BAND) -> list[str]:
        values = make(row, dtype)
        found = figures(row, dtype, run(cuda, row, dtype, values, band), values, plain(row))
        return [f"{name}: {found[name]}" for name in off(found)]

    return off_in


@every_dtype
@over(ROWS)
def test_accuracy(judge: Any, row: Row, dtype: str) -> None:
    """That nothing but the outputs is written, and all of them are, is checked by run()."""
    assert judge(row, dtype) == []


# Sizes at which kernels change course: tiles and warps that are full, one short of full and one over; head widths that
# tensor cores take; rows of 16-byte pieces; more rows than one grid dimension or one wave of blocks has.
GPU_ROWS = [
    *table(
        "attention",  # B T H K D
        "2 5 14 2 64, 1 59 16 8 64, 2 64 8 1 64, 1 97 4 4 64, 1 128 14 2 64, 1 257 14 2 64, 1 1025 4 2 64,"
        "1 5 4 4 128, 1 64 16 8 128, 1 97 14 2 128, 1 128 8 1 128, 1 257 16 8 128, 1 1025 2 1 128,"
        "1 59 8 1 32, 1 128 14 2 32, 1 257 4 4 32, 1 1025 2 1 32, 1 64 16 8 96, 1 97 8 1 96, 1 257 4 4 96, 1 1025 2 2 96,"
        "1 257 6 2 48, 1 129 4 2 80, 1 130 2 1 256, 8200 2 8 1 32, 3 192 8 2 64",
    ),
    *table(
        "attention_window",  # B T H K D W
        "2 59 14 2 64 5, 1 257 8 1 64 64, 1 1025 2 1 64 128, 1 257 16 8 128 97, 1 129 4 4 128 128, 1 1025 2 1 128 257,"
        "1 257 4 4 32 2, 1 257 8 1 96 65, 1 128 4 2 64 1025, 1 257 4 2 64 63",
    ),
    *table(
        "attention_cache",  # B T S P H K D W
        "1 1 59 64 14 2 64 0, 2 1 1025 1030 14 2 64 0, 1 5 128 128 16 8 128 0, 1 64 257 300 8 1 64 0, 1 97 98 98 4 4 96 0,"
        "1 128 1025 1025 2 1 128 0, 2 59 257 257 4 2 32 64, 1 1 257 257 16 8 128 97, 1 257 1025 1025 2 1 64 130",
    ),
    *table(
        "attention_documents",  # B T H K D W
        "2 59 14 2 64 0, 2 257 14 2 64 0, 3 1025 4 2 64 0, 1 1025 14 2 64 257, 2 128 16 8 64 5, 2 97 8 1 32 0, 2 1025 2 1 32 0,"
        "1 257 4 4 32 65, 2 257 4 4 96 0, 2 1025 2 1 96 0, 1 129 14 2 96 97, 2 128 8 1 128 0, 2 257 14 2 128 0, 2 1025 4 2 128 0,"
        "1 1025 2 1 128 130, 2 257 6 2 48 0, 1 130 2 1 256 0, 2 1025 2 1 40 64, 8200 11 8 1 32 0, 1 4200 1 1 64 0",
    ),
    *table(
        "attention_documents_cache",  # B T S P H K D W
        "2 1 1025 1030 14 2 64 0, 2 64 257 300 8 1 64 0, 2 97 1025 1025 4 2 128 0, 1 128 1025 1025 2 1 32 130,"
        "2 59 257 257 4 4 96 0",
    ),
    *table(
        "linear",
        "257 1152 896, 59 896 4864, 128 128 128, 64 8001 896, 1 1152 896, 8 9728 64, 70001 3 5, 1025 64 192",
    ),
    *table("linear_no_bias", "97 9728 896, 256 256 1024, 5 2048 2048"),
    *table("linear_rows_apart", "3 4001 896"),
    *table("gemm_nn", "896 4864 8, 4864 896 16"),
    *table("gemm_tn", "8 896 4864, 16 128 257"),
    *table("gemm_nt", "896 8 4864"),
    *table("add", "257 896, 70001 5"),
    *table("dropout", "3 257 896, 70001 1 5, 70001 1 8"),
    *table(
        "rmsnorm_of_all_heads",
        "257 2048 0 4096 6144 0, 97 5120 0 6144 7168 0, 33 1024 5120 6144 7168 1, 5 4001 0 4001 4097 0",
    ),
    *table("add_rmsnorm", "257 896, 97 1024, 59 4096, 70001 5, 5 4097, 1025 64, 3 16384"),
    *table("add_rmsnorm_first", "257 896, 59 4096, 70001 8"),
    *table(
        "head_rmsnorm",
        "257 14 64 0 16 18, 257 2 64 14 16 18, 97 16 128 0 24 32, 59 8 128 16 24 32, 20001 4 12 0 5 6",
    ),
    *table(
        "rope",
        "2 257 16 32 0 18, 1 1025 24 64 0 32, 3 59 5 16 0 7, 1 97 16 48 0 20, 70001 1 2 5 0 3, 1 70001 2 4 0 3",
    ),
    *table("adapted", "257 896 16, 4864 896 8, 59 4096 3"),
    *table("adapted_int8", "257 896 16, 59 4864 16"),
    *table("adapted_bwd_a", "257 4864 16, 1025 896 32, 59 8960 8"),
    *table("adapted_bwd_b", "1025 4864 16, 59 151936 16, 257 896 40"),
    *table("adapted_bwd_rows_apart", "257 4864 8 9728"),
    *table("swiglu", "257 4864, 59 4096, 5 8193, 70001 8, 1 40000"),
    *table("swiglu_again", "257 4864, 5 8193"),
    *table("cross_entropy", "7 151936, 59 4001, 70001 5, 128 50257, 3 128256"),
    *table("cross_entropy_loss_only", "5 151936, 70001 8"),
    *table("embedding", "257 896 4001, 1025 64 5, 70001 8 97, 4096 128 1"),
    *table("add_sum", "1000003"),
    *table("add_sum_sq", "1000003, 1024"),
    *table("adamw", "1000003, 1024"),
    *table("adamw_master", "1000003, 1024, 4097"),
]


@every_dtype
@over(GPU_ROWS)
def test_accuracy_at_sizes_of_kernels(judge: Any, row: Row, dtype: str) -> None:
    assert judge(row, dtype) == []


APART = [
    row
    for name, sizes in {
        "attention": "1 128 4 2 64, 1 64 2 1 128",
        "attention_documents": "2 128 4 2 64 0",
        "add": "59 896",
        "dropout": "3 59 896",
        "add_rmsnorm": "59 896",
        "rmsnorm_of_all_heads": "59 2048 0 4096 6144 0",
        "add_rmsnorm_first": "5 1024",
        "head_rmsnorm": "59 4 64 0 6 8",
        "rope": "1 59 4 32 0 6",
        "swiglu": "59 4096",
        "swiglu_again": "59 4096",
        "cross_entropy": "59 4096",
        "cross_entropy_loss_only": "5 1024",
        "embedding": "59 896 97",
        "add_sum": "4096",
        "add_sum_sq": "4096",
        "adamw": "4096",
        "adamw_master": "4096",
        "linear": "64 128 256",
        "adapted": "59 896 16",
        "adapted_bwd_b": "64 4864 16",
    }.items()
    for row in table(name, sizes)
]


@every_dtype
@over(APART)
def test_arrays_that_are_not_aligned(judge: Any, row: Row, dtype: str) -> None:
    """Lengths that 16-byte accesses suit, at addresses that they do not."""
    assert judge(row, dtype, BAND - 1) == []


@every_dtype
@over([*LARGEST, *GPU_ROWS])
def test_two_runs_are_equal(cuda: Any, row: Row, dtype: str) -> None:
    values = make(row, dtype)
    assert differing(*(run(cuda, row, dtype, values) for _ in range(2))) == []


@pytest.mark.parametrize("poison", ["scaled", "last", "nan"])
@every_dtype
@over(
    [
        row
        for row in LARGEST
        if row.case.name in ("attention", "attention_documents", "head_rmsnorm", "linear", "adamw_master")
    ]
)
def test_accuracy_check_can_fail(cuda: Any, row: Row, dtype: str, poison: str) -> None:
    assert unseen(cuda, row, dtype, poison, 1e-4 if dtype == "float32" else 0.03) == []


@pytest.mark.sanitize
@every_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_small_row_of_every_op(judge: Any, case: Case, dtype: str) -> None:
    assert judge(rows(case)[min(1, len(rows(case)) - 1)], dtype) == []


@pytest.mark.sanitize
@every_dtype
@over(
    [
        *table("attention", "1 59 4 2 64, 1 65 2 1 128, 1 59 2 2 32, 1 33 2 1 96"),
        *table("attention_window", "1 97 2 1 64 33"),
        *table("attention_documents", "2 59 4 2 64 0, 2 97 2 1 128 0, 2 97 2 2 32 33, 2 33 2 1 96 0"),
        *table("attention_cache", "1 5 65 70 2 1 64 0"),
        *table("linear", "59 72 64"),
        *table("add_rmsnorm", "5 264"),
        *table("head_rmsnorm", "5 2 64 0 3 4"),
        *table("swiglu", "5 264"),
        *table("cross_entropy", "5 1032"),
        *table("embedding", "59 64 5"),
        *table("adamw_master", "4097"),
    ]
)
def test_a_small_row_of_every_wide_kernel(judge: Any, row: Row, dtype: str) -> None:
    assert judge(row, dtype) == []


# What kernels must not be given


@pytest.mark.parametrize("name", [case.name for case in CASES if case.name not in TAKE_64])
def test_float64_is_refused(cuda: Any, name: str) -> None:
    row = rows(CASE[name])[0]
    with pytest.raises((TypeError, ValueError)):
        run(cuda, row, np.float64, make(row, np.float64))


# Beyond 2^31 elements: a few rows of an array are filled, all others are zero and add nothing to any sum.

BEYOND = 1 << 31
PICKED = 7  # rows that are filled; no other axis has this length


@pytest.fixture
def memory() -> Iterator[None]:
    """Gives back what a test has held."""
    yield
    gc.collect()
    if "cupy" in sys.modules:
        sys.modules["cupy"].get_default_memory_pool().free_all_blocks()


def run_among_many(be: Any, row: Row, dtype: str, values: Arrays, count: int, picks: list[int]) -> Arrays:
    """run() with the rows of every array at `picks` of `count` rows."""
    have: dict[str, tuple[Any, Any]] = {}  # name -> (view of all, rows that are picked)

    def placed(a: Arg) -> tuple[Any, list[slice]]:
        shape, many = [whole for _, _, whole in a.axes], a.axes[0][2] == PICKED
        x = be.empty(tuple([count, *shape[1:]] if many else shape), a.kind(dtype))
        part = [slice(start, start + n) for n, start, _ in a.axes]
        view = x[tuple([slice(None), *part[1:]] if many else part)]
        places = [slice(p, p + 1) for p in picks] if many else [slice(None)]
        start = values.get(a.name)
        if start is not None:
            for place, some in zip(places, np.split(start, PICKED) if many else [start], strict=True):
                be.from_host(view[place], some)
        return view, places

    for op, args in row.calls:
        have |= {a.name: placed(a) for a in args if a.axes}
        getattr(be, op)(*(have[a.name][0] if a.name in have else a.value for a in args))
    return {
        name: np.concatenate([be.to_host(have[name][0][p]) for p in have[name][1]]) for name in row.written
    }


@pytest.mark.parametrize(
    ("name", "sizes", "width"),
    [
        ("cross_entropy", "7 151936", 151936),
        ("linear_no_bias", "7 151936 64", 151936),
        ("linear_frozen", "7 64 40000", 40000),
        ("embedding", "7 1024 5", 1024),
        ("add_rmsnorm", "7 896", 896),
        ("add_rmsnorm_first", "7 4097", 4097),
        ("head_rmsnorm", "7 14 64 0 16 18", 64 * 16),
        ("swiglu", "7 4864", 4864),
        ("rope", "7 64 14 32 0 16", 64 * 16 * 64),
        ("attention", "7 64 14 2 64", 64 * 14 * 64),
        ("attention", "7 33 2 1 40", 33 * 2 * 40),
        ("attention_documents", "7 64 14 2 64 0", 64 * 14 * 64),
    ],
)
def test_beyond_two_to_the_31_elements(cuda: Any, memory: None, name: str, sizes: str, width: int) -> None:
    """bfloat16; the first rows, those around element 2^31 and the last ones."""
    (row,) = table(name, sizes)
    values, edge = make(row, "bfloat16"), BEYOND // width
    picks = [0, 1, edge // 2, edge - 1, edge, edge + 1, edge + 65]
    got = run_among_many(cuda, row, "bfloat16", values, edge + 66, picks)
    found = figures(row, "bfloat16", got, values, FAST)
    assert not off(found), {n: found[n] for n in off(found)}


def test_flat_arrays_beyond_two_to_the_31_elements(cuda: Any, memory: None) -> None:
    """fill, copy, sums: ones, whose number is then known exactly, and a last element that differs."""
    n = BEYOND + 59
    x, y, total = cuda.empty(n, "float32"), cuda.empty(n, "bfloat16"), cuda.empty(1, "float64")
    cuda.fill(x, 1)
    cuda.fill(x[-1:], 3)
    cuda.add_sum(total, x)
    assert cuda.to_host(total)[0] == n + 2
    cuda.add_sum_sq(total, x)
    assert cuda.to_host(total)[0] == 2 * n + 10
    cuda.copy(y, x)
    ends = (slice(0, 5), slice(BEYOND - 3, BEYOND + 3), slice(n - 3, n))
    for part in ends[:2]:
        assert (cuda.to_host(y[part]) == 1).all()
    assert cuda.to_host(y[ends[2]]).astype(float).tolist() == [1, 1, 3]
    cuda.fill(y, 0)
    assert not any(cuda.to_host(y[part]).any() for part in ends)


def test_numbers_are_those_of_the_time_of_asking(cuda: Any) -> None:
    """Though what is asked for afterwards changes them before they are read."""
    numbers = [cuda.empty((1,), "float64") for _ in range(3)]
    cuda.fill(numbers[0], 0.1)
    cuda.fill(numbers[2], np.nan)
    later = cuda.read_later(tuple(numbers))
    for x in numbers:
        cuda.fill(x, 7)
    assert str(later()) == "[0.1, 0.0, nan]"
    assert cuda.read_later(tuple(numbers))() == [7.0] * 3


def test_adamw_beyond_two_to_the_31_elements(cuda: Any, memory: None) -> None:
    """All elements take the step of the first."""
    n = BEYOND + 59
    w, factor, square = cuda.empty(n, "bfloat16"), cuda.empty(1, "float64"), cuda.empty(1, "float64")
    master, m, v, g = (cuda.empty(n, "float32") for _ in range(4))
    for x, value in ((factor, 1), (master, 0.5), (v, 0.25), (g, 2)):
        cuda.fill(x, value)
    cuda.adamw(w, master, m, v, square, g, factor, 0.01, 0.9, 0.95, 1e-8, 0.1, 3)
    for x in (w, master, m, v):
        first = cuda.to_host(x[:1])
        assert first[0] != 0
        for part in (slice(BEYOND - 3, BEYOND + 3), slice(n - 3, n)):
            assert (cuda.to_host(x[part]) == first).all()
    one = float(cuda.to_host(master[:1])[0])
    assert np.isclose(float(cuda.to_host(square)[0]), n * one * one, rtol=1e-12)


NAN = [  # input, index of the NaN, outputs and where they must be NaN; heads 2 and 3 read key/value head 1
    ("q", (1, 30, 2, 0), {"y": (1, 30, 2), "lse": (1, 2, 30), "dq": (1, 30, 2)}),
    (
        "k",
        (1, 30, 1, 9),
        {"y": (1, slice(30, None), slice(2, 4)), "lse": (1, slice(2, 4), slice(30, None)), "dk": (1, 30, 1)},
    ),
    (
        "v",
        (1, 30, 1, 9),
        {"y": (1, slice(30, None), slice(2, 4), 9), "dq": (1, slice(30, None), slice(2, 4))},
    ),
    ("dy", (1, 150, 2, 9), {"dq": (1, 150, 2), "dv": (1, slice(0, 151), 1, 9)}),
]


BORDERS = [
    *table(
        "attention_documents",
        "2 257 14 2 64 0, 2 1025 4 2 128 0, 2 257 4 4 96 0, 2 1025 2 1 32 130, 2 257 4 2 40 0",
    ),
]


@every_dtype
@over(BORDERS)
def test_borders_that_hide_nothing_change_nothing(cuda: Any, row: Row, dtype: str) -> None:
    """Where doc_start is 0 everywhere: the same bits as without it in the kernels that take both, within rounding in those of
    tensor cores, which are two. And the first document of a sequence has what it has without borders."""
    values = make(row, dtype)
    (plain,) = table("attention_window", " ".join(str(n) for n in row.sizes.values()))
    without = run(cuda, plain, dtype, values)
    hidden_nothing = run(cuda, row, dtype, {**values, "doc_start": 0 * values["doc_start"]})
    found = figures(row, dtype, hidden_nothing, {**values, "doc_start": 0 * values["doc_start"]}, FAST)
    assert off(found) == []
    if dtype == "float32" or row.sizes["D"] == 40:
        assert differing(hidden_nothing, without) == []
    masked = run(cuda, row, dtype, values)
    for b, doc_start in enumerate(values["doc_start"]):
        n = int((doc_start == 0).sum())
        assert error(masked["y"][b, :n], without["y"][b, :n]) <= found["y"][1]
        assert not np.array_equal(masked["lse"][b, :, n:], without["lse"][b, :, n:])


@every_dtype
@over(BORDERS)
def test_a_document_does_not_see_the_others(cuda: Any, row: Row, dtype: str) -> None:
    """Bit for bit: whatever goes in before a border changes nothing after it, and nothing in other sequences."""
    values = make(row, dtype)
    before = run(cuda, row, dtype, values)
    border = int(values["doc_start"][0][-1])  # of the last document
    assert 0 < border < row.sizes["T"]
    changed = {n: x.copy() for n, x in values.items()}
    for name in ("q", "k", "v", "dy"):
        changed[name][0, :border] = -changed[name][0, :border]
    after = run(cuda, row, dtype, changed)
    for name in ("y", "dq", "dk", "dv"):
        assert np.array_equal(after[name][0, border:], before[name][0, border:]), name
        assert not np.array_equal(after[name][0, :border], before[name][0, :border]), name
        assert np.array_equal(after[name][1:], before[name][1:]), name


@pytest.mark.parametrize(("array", "index", "reached"), NAN, ids=[name for name, _, _ in NAN])
def test_nan_stays_nan_on_tensor_cores(cuda: Any, array: str, index: Any, reached: dict[str, Any]) -> None:
    """Long enough for tiles that no mask cuts, which forward takes without looking for the largest score."""
    (row,) = table("attention", "2 200 4 2 64")
    values = make(row, "bfloat16")
    values[array][index] = np.nan
    out = run(cuda, row, "bfloat16", values)
    for output, where in reached.items():
        assert np.isnan(out[output][where].astype(np.float32)).all(), output
        assert not np.isnan(out[output][0].astype(np.float32)).any(), output  # of the other sequence
