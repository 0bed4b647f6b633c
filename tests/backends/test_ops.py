"""Every op on every backend, over the rows of cases.py, and what no row can show. The rows on the cuda backend, and
larger ones, are in test_gpu_ops.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import pytest

from apr import backends
from apr.backends.contract import OPS, WRITES
from apr.backends.cpu import kernels, tiles
from cases import (
    BF16,
    CASES,
    LARGEST,
    LOGIT_EDGES,
    ROWS,
    TAKE_64,
    Arrays,
    Backend,
    Row,
    edge_logits,
    make,
    overlay,
    rows,
    run,
)
from precision import (
    Figures,
    accuracy,
    differing,
    error,
    flash,
    off,
    poisoned,
    relative,
    rounded,
    tensor_cores,
    tolerance,
    unit,
    unseen,
)

reference, cpu = backends.get("reference"), backends.get("cpu")
BY_NAME = {case.name: rows(case) for case in CASES}
ATTENTION = [row for row in ROWS if row.case.name.startswith("attention")]
LOW = rounded()
gpu = pytest.mark.gpu
every_backend = pytest.mark.parametrize(
    ("be", "dtype"),
    [
        ("reference", "float32"),
        ("cpu", "float32"),
        ("cpu", "bfloat16"),
        ("rounded", "bfloat16"),
        pytest.param("cuda", "float32", marks=gpu),
        pytest.param("cuda", "bfloat16", marks=gpu),
    ],
    indirect=["be"],
)


@pytest.fixture
def be(request: pytest.FixtureRequest) -> Any:
    """The backend of a name; the test is skipped where there is no GPU for cuda."""
    if request.param == "rounded":
        return LOW
    return request.getfixturevalue("cuda") if request.param == "cuda" else backends.get(request.param)


def over(some: list[Row]) -> pytest.MarkDecorator:
    """Run a test once per row."""
    return pytest.mark.parametrize("row", some, ids=str)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = numba.get_num_threads()
    yield
    cpu.set_threads(before)


# Gradients


def wrong_gradients(be: Backend, row: Row) -> list[str]:
    """Inputs of a row whose gradient is not the numeric one: in float64, along a random direction u,

    (L(x + u) - L(x - u)) / 2, where L is the sum of every output times its upstream gradient.
    """
    fwd, bwd = ({a.name: a for a in args if a.role != "again"} for _, args in row.calls)
    upstream = {n: "d" + n for n, a in fwd.items() if a.role in ("out", "inplace") and "d" + n in bwd}
    start, rng, wrong = make(row, np.float64), np.random.default_rng(1), []
    end = run(be, row, np.float64, start)

    def value(name: str, step: np.ndarray) -> float:
        out = run(be, row, np.float64, {**start, name: start[name] + step})
        return sum(float((out[n] * start[d]).sum()) for n, d in upstream.items())

    for name in (n for n, a in fwd.items() if a.role in ("in", "inplace")):
        d = "d" + name if "d" + name in bwd else "dres"  # the gradient of res_in and of delta is dres
        added = bwd[d].role == "acc" and d not in upstream.values()
        u = rng.normal(size=start[name].shape)
        e = 1e-5 / np.linalg.norm(u)
        numeric = (value(name, e * u) - value(name, -e * u)) / (2 * e)
        exact = float(((end[d] - (start[d] if added else 0)) * u).sum())
        if not abs(exact - numeric) <= 1e-7 + 1e-7 * abs(numeric):
            wrong.append(name)
    return wrong


@over([row for row in ROWS if row.case.bwd])
def test_gradients(row: Row) -> None:
    assert not wrong_gradients(reference, row)


@over([row for row in LARGEST if row.case.bwd])
def test_gradient_check_can_fail(row: Row) -> None:
    """Each gradient in turn is off by 1e-4 of itself."""
    for name, (call, _) in row.written.items():
        if call == 1:
            assert wrong_gradients(poisoned(reference, row, name, "scaled", 1e-4), row), name


@over([*BY_NAME["cross_entropy"], *BY_NAME["cross_entropy_z"]])
def test_gradient_of_cross_entropy(row: Row) -> None:
    """The op that makes its own gradient in place: numeric derivative of scale * sum of losses + z_loss * lse^2."""
    scale, z_loss = (a.value for a in row.calls[0][1][-2:])
    start = make(row, np.float64)
    counted = np.flatnonzero(start["targets"] >= 0)
    own = counted, start["targets"][counted]
    u = np.random.default_rng(1).normal(size=start["logits"].shape)
    e = 1e-5 / np.linalg.norm(u)

    def value(step: float) -> float:
        logits = start["logits"] + step * u
        loss = run(reference, row, np.float64, {**start, "logits": logits})["loss"]
        lse = loss[counted] + logits[own]
        return scale * float(loss.sum() + z_loss * np.square(lse).sum())

    numeric = (value(e) - value(-e)) / (2 * e)
    exact = float((run(reference, row, np.float64, start)["logits"] * u).sum())
    assert abs(exact - numeric) <= 1e-7 + 1e-7 * abs(numeric)


# Accuracy


@over(ROWS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accuracy(row: Row, dtype: str) -> None:
    """cpu; that it writes all of its outputs, nothing else and no input is checked by run()."""
    figures = accuracy(cpu, row, dtype)
    assert not off(figures), figures


@over([row for row in ROWS if row.case.name.startswith(("linear", "attention"))])
def test_products_of_a_processor_without_dot_products(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands that are widened, in bfloat16, whatever this processor has."""
    cpu.empty(0, BF16)
    monkeypatch.setattr(sys.modules["apr.backends.cpu.low"], "products", None)
    assert not off(accuracy(cpu, row, BF16))


@pytest.mark.parametrize(
    ("setting", "value"), [("ENABLE_AVX", 0), ("CPU_NAME", "haswell"), ("CPU_FEATURES", "+sse4.2")]
)
def test_code_for_a_lesser_processor_has_no_dot_products(
    setting: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLVM would end the process over an instruction that Numba's settings rule out."""
    monkeypatch.setattr(numba.config, setting, value)
    assert tiles.path() == "float32"


@pytest.mark.skipif(tiles.path() == "float32", reason="this processor has no dot products of bfloat16")
def test_dot_products_add_pairs_in_order(threads: None) -> None:
    """Sums that go with no neighbour and no thread: of a product, those of a piece of it, to the bit."""
    rng = np.random.default_rng(3)
    x, w = (rng.standard_normal((n, 1025)).astype(np.float32).astype(BF16) for n in (97, 123))
    y, piece = (cpu.empty(shape, BF16) for shape in ((97, 123), (33, 40)))
    cpu.linear_fwd(y, x, w, None)
    cpu.set_threads(1)
    cpu.linear_fwd(piece, x[40:73], w[70:110], None)
    assert np.array_equal(piece.view(np.uint16), y[40:73, 70:110].view(np.uint16))
    dw = np.zeros((123, 1025), np.float32)
    dy, dx = (cpu.empty(shape, BF16) for shape in ((97, 123), (97, 1025)))
    cpu.from_host(dy, rng.standard_normal((97, 123)).astype(np.float32))
    cpu.linear_bwd(dx, dw, None, dy, x, w, False)
    # One pair: an exact product, a rounded sum.
    pair = np.zeros((123, 1025), np.float32)
    cpu.linear_bwd(dx[:2], pair, None, dy[:2], x[:2], w, False)
    wide = dy[:2].astype(np.float64).T @ x[:2].astype(np.float64)
    assert np.abs(pair - wide).max() <= 2.0**-23 * np.abs(wide).max()
    twice = pair.copy()
    cpu.linear_bwd(dx[:2], twice, None, dy[:2], x[:2], w, True)
    assert np.array_equal(twice, 2 * pair)


@pytest.mark.skipif(tiles.path() == "float32", reason="this processor has no dot products of bfloat16")
def test_blocks_of_attention_have_one_order(threads: None) -> None:
    """Neither threads nor other sequences change a bit; dk and dv are sums over several chunks of queries and two heads."""
    rng = np.random.default_rng(4)
    q, dy, k, v = (rng.standard_normal((2, 300, n, 40)).astype(np.float32).astype(BF16) for n in (4, 4, 2, 2))

    def both(some: slice) -> list[Any]:
        at = [x[some].copy() for x in (q, dy, k, v)]
        y, dq, dk, dv = (np.zeros_like(x) for x in (at[0], at[0], at[2], at[2]))
        lse = np.zeros((len(y), 4, 300), np.float32)
        cpu.attention_fwd(y, lse, at[0], *at[2:], None, 0)
        cpu.attention_bwd(dq, dk, dv, at[1], y, lse, at[0], *at[2:], None, 0)
        return [x.view(np.uint32 if x is lse else np.uint16) for x in (y, lse, dq, dk, dv)]

    cpu.empty(0, BF16)
    whole = both(slice(0, 2))
    cpu.set_threads(1)
    assert all(np.array_equal(x[1:], z) for x, z in zip(whole, both(slice(1, 2)), strict=True))


@over(LARGEST)
def test_error_of_reference_scales_with_precision(row: Row) -> None:
    """The error in float64 is that in float32 times the ratio of the units in the last place, and the reverse: no step
    of the specification is hidden in another precision."""
    values = make(row, np.float32)
    if np.finfo(np.longdouble).eps == np.finfo(np.float64).eps:
        pytest.skip("longdouble of this machine is float64")
    want, f64, f32 = (run(reference, row, t, values) for t in (np.longdouble, np.float64, np.float32))
    figures: Figures = {}
    for got, base, types in ((f64, f32, (np.float64, np.float32)), (f32, f64, (np.float32, np.float64))):
        # Also of a sum in float64, whose terms are of the precision.
        eps, other = (np.finfo(t).eps for t in types)
        for name, true in want.items():
            largest = float(np.abs(true).max())
            # A sum that happens to be exact says nothing of the other precision.
            found = max(error(base[name], true), other * largest)
            bound = tolerance(found * eps / other, largest, eps, row.factor(name))
            figures[f"{name} {types[0].__name__}"] = (error(got[name], true), bound)
    assert not off(figures), figures


@pytest.mark.parametrize("poison", ["scaled", "last", "nan"])
@over(LARGEST)
def test_accuracy_check_can_fail(row: Row, poison: str) -> None:
    """Each output in turn is scaled by 1 + 1e-4, off in its last element by 1e-3, NaN there: never written."""
    assert unseen(cpu, row, np.float32, poison, 1e-4) == []


# bfloat16


@over(LARGEST)
def test_bfloat16_of_plain_numpy(row: Row) -> None:
    """What is stored as bfloat16 is the float32 result, rounded once; sums and statistics are the float32 ones."""
    values = make(row, BF16)
    low, exact = run(LOW, row, BF16, values), run(reference, row, np.float32, values)
    kinds = {a.name: a.kind(BF16) for _, args in row.calls for a in args if a.axes}
    assert {name: x.dtype for name, x in low.items()} == {name: kinds[name] for name in low}
    for name in (n for n, (call, _) in row.written.items() if call == 0):
        if not (
            row.case.name in ("add_rmsnorm", "add_rmsnorm_frozen") and name in ("y", "rstd")
        ):  # of the rounded stream
            x = exact[name]
            half = 2.0**-8 if kinds[name] == BF16 else 0
            assert (np.abs(low[name] - x) <= half * np.abs(x) + 1e-6 * np.abs(x).max()).all(), name


def test_the_residual_stream_is_rounded_before_it_is_normalised() -> None:
    row = BY_NAME["add_rmsnorm"][-1]
    values = make(row, BF16)
    low = run(LOW, row, BF16, values)
    res = low["res"].astype(np.float32)
    assert np.array_equal(low["rstd"], 1 / np.sqrt((res * res).mean(-1) + 1e-5, dtype=np.float32))
    exact = run(reference, row, np.float32, values)
    assert np.array_equal(low["res"], exact["res"].astype(BF16))
    assert not np.array_equal(low["rstd"], exact["rstd"])


@pytest.mark.parametrize("poison", ["scaled", "last", "nan"])
@over(LARGEST)
def test_accuracy_check_can_fail_in_bfloat16(row: Row, poison: str) -> None:
    """Each output in turn is 3 % too large, off in its last element by 30 %, NaN there."""
    assert unseen(LOW, row, BF16, poison, 0.03) == []


@over([row for row in ATTENTION if row.sizes["H"] > 1 and row.sizes["T"] > 5])
def test_one_head_two_percent_off_is_seen_in_bfloat16(row: Row) -> None:
    """Far below the largest error that roundings make, in y, dq, dk and dv; lse has its queries there."""
    assert unseen(LOW, row, BF16, "head", 0.02) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adamw_adds_the_squares_of_the_weights_in_the_order_of_add_sum_sq(dtype: str) -> None:
    rng, different = np.random.default_rng(5), False
    for n in (1, 255, 257, 1025, 16384, 16385, 40007):
        master, m, g = (rng.standard_normal(n, np.float32) for _ in range(3))
        w = master if dtype == "float32" else cpu.empty((n,), BF16)
        square, want = np.array([0.25]), np.array([0.25])
        cpu.adamw(w, master, m, np.square(m), square, g, np.ones(1), 0.01, 0.9, 0.95, 1e-8, 0.1, 3)
        cpu.add_sum_sq(want, master)
        assert square == want
        assert np.array_equal(w, master.astype(w.dtype))
        different = different or square != 0.25 + float(np.square(master, dtype=np.float64).sum())
    assert different  # another order would be seen


def test_the_largest_bfloat16_of_any_bits() -> None:
    cpu.empty((1,), BF16)
    from apr.backends.cpu import low

    bits = np.arange(1 << 16, dtype=np.uint16)
    numbers, rng = bits[bits & 0x7FFF <= 0x7F80], np.random.default_rng(6)
    for size in (1, 5, 31, 33, 257):
        for row in rng.permutation(numbers)[: 100 * size].reshape(-1, size).view(BF16):
            assert low._largest(row) == row.astype(np.float32).max()


@pytest.mark.parametrize(
    "shape", [(1,), (16384,), (16385,), (3, 16384), (2, 16400), (5, 59), (2, 3, 7), (2, 3, 4, 5)]
)
def test_a_copy_rounds_every_element_and_nothing_beside(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(7).standard_normal(shape, np.float32)
    y, beside = cpu.empty(shape, BF16), cpu.empty((*shape[:-1], shape[-1] + 3), BF16)
    cpu.copy(y, x)
    cpu.copy(beside[..., :-3], x)
    want = x.astype(BF16).view(np.uint16)
    assert np.array_equal(y.view(np.uint16), want)
    assert np.array_equal(beside[..., :-3].view(np.uint16), want)
    assert not beside[..., -3:].astype(np.float32).any()


def test_arrays_of_bfloat16_have_the_types_that_numba_finds() -> None:
    x = cpu.empty((3, 4, 6), BF16)
    shut = x[0].copy()
    shut.flags.writeable = False
    for some in (x, x[1], x[:, 1], x[..., :5], x[0, 0], x[0, 0, ::2], x.T, shut, x[:1]):
        for _ in range(2):
            assert kernels.add.typeof_pyval(some) == numba.typeof(some)
    with pytest.raises(TypeError, match="No matching definition"):
        kernels.add(x[0], x[0], x[0].T)


def test_relative_error_is_that_of_the_worst_slice() -> None:
    want = np.ones((4, 5, 6))
    got = want.copy()
    got[:, 3] = 1.5
    assert np.allclose(relative(got, want), [0.5 / 5**0.5, 0.5, 0.5 / 5**0.5])
    got[:, 3] = 1
    got[2, 3, 4] = 2
    assert np.allclose(relative(got, want), [1 / 30**0.5, 1 / 24**0.5, 1 / 20**0.5])
    want[:, :, 4] = 0  # measured by the average, 5 / 6 of a square
    got = want.copy()
    got[2, 3, 4] = 1
    assert np.isclose(relative(got, want)[2], (1 / 20 / (5 / 6)) ** 0.5)
    got[0, 0, 0] = np.nan
    assert np.isnan(relative(got, want)).all()
    assert relative(np.zeros(3), np.zeros(3)) == [0]
    assert relative(np.full(3, 1e-9), np.zeros(3)) == [np.inf]


@over(ATTENTION)
def test_attention_with_p_from_lse_is_attention(row: Row) -> None:
    values = make(row, np.float64)
    want, got = (run(be, row, np.float64, values) for be in (reference, flash()))
    assert [n for n in want if not error(got[n], want[n]) <= 1e-13 * np.abs(want[n]).max() + 1e-15] == []
    figures = accuracy(flash(), row, np.float32)
    assert not off(figures), figures


@over(ATTENTION)
def test_operands_of_tensor_cores_may_be_rounded(row: Row) -> None:
    """Attention that rounds p and ds to bfloat16 as well is not off in bfloat16; in float32 it would be."""
    figures = accuracy(rounded(tensor_cores()), row, BF16)
    assert not off(figures), figures
    assert off(accuracy(tensor_cores(), row, np.float32))


def test_run_sees_stray_writes() -> None:
    """An op that writes to an input, before, after or between its outputs is caught."""
    row = BY_NAME["head_rmsnorm"][-1]

    def stray(position: int, index: int) -> Backend:
        def op(y: Any, rstd: Any, x: Any, w: Any, eps: float) -> None:
            reference.head_rmsnorm_fwd(y, rstd, x, w, eps)
            flat = (y, rstd, x, w)[position]
            while flat.base is not None:
                flat = flat.base
            flat[index] = 0

        return overlay(reference, head_rmsnorm_fwd=op)

    values = make(row, np.float64)
    for position, index, message in (
        (0, 63, "outside its output y"),  # the element before the first
        (1, 64, "outside its output rstd"),  # a head that is not of this call
        (0, -64, "outside its output y"),
        (3, 64, "to its input w"),
        (2, -1, "to its input x"),
    ):
        with pytest.raises(AssertionError, match=message):
            run(stray(position, index), row, np.float64, values)
    run(reference, row, np.float64, values)


def test_nan_is_off() -> None:
    assert off({"a": (float("nan"), 1.0), "b": (1.0, float("nan")), "c": (1.0, 1.0), "d": (2.0, 1.0)}) == [
        "a",
        "b",
        "d",
    ]


# Determinism


@pytest.mark.parametrize(
    ("be", "dtype"),
    [("reference", "float32"), ("cpu", "float32"), ("cpu", "bfloat16")],
    indirect=["be"],
)
@over(LARGEST)
def test_two_runs_are_equal(row: Row, be: Any, dtype: str) -> None:
    values = make(row, dtype)
    assert not differing(*(run(be, row, dtype, values) for _ in range(2)))


@over(LARGEST)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_number_of_threads_does_not_matter(row: Row, dtype: str, threads: None) -> None:
    """Bit for bit, but for the products of linear_fwd, linear_bwd and gemm: OpenBLAS sums a block by its shape."""
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("this process has one thread only")
    values, results = make(row, dtype), []
    for n in (1, 2):
        cpu.set_threads(n)
        results.append(run(cpu, row, dtype, values))
        figures = accuracy(cpu, row, dtype)
        assert not off(figures), (n, figures)
    products = {"y", "dx", "dw", "out"} if row.case.name.startswith(("linear", "gemm")) else set()
    assert set(differing(*results)) <= products


# Where a precision ends


def spread(row: Row, dtype: str, name: str, largest: float) -> Arrays:
    """The values of a row with one array stretched to a largest magnitude."""
    values = make(row, dtype)
    x = np.clip(values[name] / 2, -1, 1) * largest
    return {**values, name: x.astype(dtype).astype(np.float64)}


@every_backend
@pytest.mark.parametrize(
    ("n", "v", "largest"), [(5, 59, 1e4), (97, 123, 88.0), (3, 152_000, 10.0), (3, 152_000, 1e4)]
)
def test_cross_entropy_of_large_logits(be: Any, dtype: str, n: int, v: int, largest: float) -> None:
    for name in ("cross_entropy", "cross_entropy_loss_only"):
        row = Row(BY_NAME[name][0].case, dict(N=n, V=v))
        figures = accuracy(be, row, dtype, spread(row, dtype, "logits", largest))
        assert not off(figures), figures


@every_backend
@pytest.mark.parametrize("edge", LOGIT_EDGES)
@pytest.mark.parametrize(("n", "v"), [(5, 59), (2, 16424)])
def test_cross_entropy_of_logits_at_the_end_of_a_dtype(
    be: Any, dtype: str, n: int, v: int, edge: str
) -> None:
    for name in ("cross_entropy", "cross_entropy_loss_only"):
        row = Row(BY_NAME[name][0].case, dict(N=n, V=v))
        figures = accuracy(be, row, dtype, edge_logits(row, dtype, edge))
        assert not off(figures), figures


@every_backend
@pytest.mark.parametrize("largest", [20.0, 88.0, 100.0, 1e4])
def test_swiglu_of_large_gates(be: Any, dtype: str, largest: float) -> None:
    row = BY_NAME["swiglu"][2]
    figures = accuracy(be, row, dtype, spread(row, dtype, "gu", largest))
    assert not off(figures), figures


@every_backend
@pytest.mark.parametrize("name", ["attention", "attention_window", "attention_cache"])
def test_attention_of_large_scores(be: Any, dtype: str, name: str) -> None:
    """Scores up to 80: exp(80) times a few keys is still far from the largest float32, exp(-160) is 0."""
    row = BY_NAME[name][-1]
    values = make(row, dtype)
    heads, d = values["q"].shape[2:]
    keys = np.repeat(values["k"], heads // values["k"].shape[2], axis=2)
    largest = np.abs(np.einsum("bthd,bshd->bhts", values["q"], keys)).max() / np.sqrt(d)
    values["q"] = (values["q"] * (80 / largest)).astype(dtype).astype(np.float64)
    figures = accuracy(be, row, dtype, values)
    assert not off(figures), figures


@every_backend
def test_a_query_that_sees_one_key_copies_its_value(be: Any, dtype: str) -> None:
    """y = v, dv = dy; dq and dk are 0 up to the rounding of a sum of D products (no error to expect can be
    measured: NumPy may well find exactly 0)."""
    row = Row(BY_NAME["attention_window"][0].case, dict(B=2, T=5, H=2, K=2, D=10, W=1))
    values = make(row, dtype)
    out = run(be, row, dtype, values)
    assert np.array_equal(out["y"], values["v"])
    assert error(out["dv"], values["dy"]) <= 2 * unit(dtype, dtype) * np.abs(values["dy"]).max()
    for got, other in (("dq", "k"), ("dk", "q")):
        size = np.abs(values["dy"]).max() * np.abs(values["v"]).max() * np.abs(values[other]).max()
        assert np.abs(out[got]).max() <= 10 * unit(np.float32, dtype) * size


NAN = [  # case, input, index of the NaN, outputs and where they must be NaN
    ("swiglu", "gu", (2, 3), {"y": (2, 3), "dgu": (2, 3)}),  # a gate
    ("swiglu", "gu", (2, 59 + 3), {"y": (2, 3), "dgu": (2, 3)}),  # its up
    ("swiglu", "dy", (2, 3), {"dgu": (2, [3, 59 + 3])}),
    ("cross_entropy", "logits", (2, 0), {"loss": 2, "logits": 2}),
    ("cross_entropy", "logits", (0, -1), {"loss": 0, "logits": 0}),
    ("add_rmsnorm", "delta", (4, 58), {"res": (4, 58), "y": 4, "rstd": 4, "dres": 4, "dw": ...}),
    ("add_rmsnorm", "dy", (4, 58), {"dres": 4, "dw": 58}),
    ("head_rmsnorm", "x", (4, 1, 0), {"y": (4, 1), "rstd": (4, 1), "dx": (4, 1), "dw": ...}),
    ("attention", "q", (1, 3, 2, 0), {"y": (1, 3, 2), "lse": (1, 2, 3), "dq": (1, 3, 2)}),
    ("attention", "k", (1, 3, 2, 9), {"y": (1, slice(3, 5), 2), "lse": (1, 2, slice(3, 5)), "dk": (1, 3, 2)}),
    ("attention", "v", (1, 3, 2, 9), {"y": (1, slice(3, 5), 2, 9), "dq": (1, slice(3, 5), 2)}),
    ("attention", "dy", (1, 3, 2, 9), {"dq": (1, 3, 2), "dv": (1, slice(0, 4), 2, 9)}),
]


@every_backend
@pytest.mark.parametrize(
    ("name", "array", "index", "reached"), NAN, ids=lambda x: x if isinstance(x, str) else ""
)
def test_nan_stays_nan(
    be: Any, dtype: str, name: str, array: str, index: Any, reached: dict[str, Any]
) -> None:
    """Nothing hides a NaN: every output that depends on it is NaN; a row of another sequence is not."""
    row = BY_NAME[name][0 if name == "attention" else 1]
    values = make(row, dtype)
    values[array][index] = np.nan
    out = run(be, row, dtype, values)
    for output, where in reached.items():
        assert np.isnan(out[output][where]).all(), output
        if where is not ...:
            assert not np.isnan(out[output]).all(), output


@over([row for row in LARGEST if row.case.name not in TAKE_64])
def test_cpu_refuses_float64(row: Row) -> None:
    with pytest.raises(TypeError):
        run(cpu, row, np.float64, make(row, np.float64))


@pytest.mark.parametrize("name", ["embedding", "cross_entropy"])
def test_cpu_refuses_int64(name: str) -> None:
    def wide(op: Any) -> Any:
        return lambda *args: op(
            *(a.astype(np.int64) if getattr(a, "dtype", 0) == np.int32 else a for a in args)
        )

    row = BY_NAME[name][1]
    for op, _ in row.calls:
        with pytest.raises(TypeError):
            run(overlay(cpu, **{op: wide(getattr(cpu, op))}), row, np.float32, make(row, np.float32))


def test_the_contract_says_what_the_cases_write() -> None:
    seen: dict[str, dict[str, set[str]]] = {}
    for op, args in (call for row in ROWS for call in row.calls):
        for name, a in zip(OPS[op].parameters, args, strict=True):
            if a.role in WRITES:
                seen.setdefault(op, {}).setdefault(name, set()).add(WRITES[a.role])
    for op, wrote in seen.items():
        outputs = OPS[op].outputs
        assert wrote.keys() == outputs.keys(), op
        for name, how in wrote.items():  # AdamW's w and the residual stream may be their own input
            assert outputs[name] in how, (op, name)
    assert seen.keys() == OPS.keys()


def test_the_contract_says_along_which_axes_outputs_can_be_cropped() -> None:
    """Half of every array along such an axis gives half of the output, bit for bit but for the order of sums."""
    for row in (
        row
        for row in LARGEST
        if row.case.name in ("embedding", "linear", "add", "add_rmsnorm", "rope", "swiglu")
    ):
        have: dict[str, Any] = dict(make(row, np.float64))
        for op, args in row.calls:
            spec, names = OPS[op], [a.name for a in args]
            before = [
                have.setdefault(a.name, np.zeros(a.shape)) if a.axes or a.name in have else a.value
                for a in args
            ]

            def call(values: list[Any], op: str = op) -> list[Any]:
                copies = [x.copy() if isinstance(x, np.ndarray) else x for x in values]
                getattr(reference, op)(*copies)
                return copies

            whole = call(before)
            for output in spec.outputs:
                at = spec.parameters.index(output)
                for axes in spec.crops(output):
                    cut = [
                        x[(*[slice(None)] * axes[p], slice(0, x.shape[axes[p]] // 2 or 1))]
                        if p in axes
                        else x
                        for p, x in zip(spec.parameters, before, strict=True)
                    ]
                    part = call(cut)[at]
                    want = whole[at][tuple(slice(n) for n in part.shape)]
                    assert np.abs(part - want).max() <= 1e-12 * np.abs(want).max(), (op, output, axes)
            have.update((n, x) for n, x in zip(names, whole, strict=True) if isinstance(x, np.ndarray))
