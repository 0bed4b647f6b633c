"""Products of float32 in vectors of 512 bits: the kernel around the sums, on any processor, faults planted in it, the sums
themselves, their order, and what shares a thread's room."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import FunctionType
from typing import Any

import numba
import numpy as np
import pytest
from numba import types

from addresses import pointer
from apr import backends
from apr.backends.cpu import kernels, ops, products_float32
from apr.backends.cpu.products_float32 import COLUMNS, ROW_BYTES, ROWS, TERMS
from apr.backends.cpu.tiles import has_vectors

cpu = backends.get("cpu")
f32, f64, u64 = np.float32, np.float64, np.uintp
# M, N, K: parts of panels, several of them, more terms than a piece, rows and columns that several threads share
SHAPES = [(1, 1, 1), (13, 33, 17), (97, 70, 385), (24, 500, 96), (300, 40, 800), (25, 31, 1200)]
FAULTS = {  # planted: the products that are wrong
    "pieces do not add up": {"y", "dx", "dw", "dw added"},
    "the last term is left out": {"y", "dx", "dw", "dw added"},
    "half panels are exchanged": {"y", "dx", "dw", "dw added"},
    "rows are one further": {"y", "dx", "dw", "dw added"},
    "what was there is lost": {"dw added"},
    "alpha is left out": {"y", "dx", "dw", "dw added"},
}
planted = np.full(1, -1)  # number of the fault; compiled code reads it where it lies
needs_vectors = pytest.mark.skipif(not has_vectors(), reason="this processor has no vectors of 512 bits")


def _scalar() -> Any:
    """The sums of 12 x 32 elements in Numba, one by one."""
    floats, numbers, at_fault = pointer(types.float32), pointer(types.int64), planted.ctypes.data
    pieces, last, halves, further, lost, plain = range(len(FAULTS))

    @numba.njit(error_model="numpy")
    def multiply(
        turns: Any, to: Any, to_bytes: Any, a: Any, b: Any, half: Any, terms: Any, alpha: Any, adds: Any
    ) -> None:
        fault = numba.carray(numbers(u64(at_fault)), (1,))[0]
        row, term = (4, 4 * ROWS) if turns else (ROW_BYTES, 4)
        factor = f32(1) if fault == plain else alpha
        for i in range(ROWS):
            for j in range(COLUMNS):
                s = f32(0)
                for t in range(terms - (fault == last)):
                    r = (i + (fault == further)) % ROWS
                    x = numba.carray(floats(u64(a + r * row + t * term)), (1,))[0]
                    h = (j // 16 + (fault == halves)) % 2
                    y = numba.carray(floats(u64(b + h * half + 64 * t + 4 * (j % 16))), (1,))[0]
                    s += x * y
                place = numba.carray(floats(u64(to + i * to_bytes + 4 * j)), (1,))
                before = place[0] if adds and fault not in (pieces, lost) else f32(0)
                place[0] = before + factor * s

    return multiply


@pytest.fixture(scope="module")
def emulated() -> Any:
    """The kernel around plain Numba."""
    f = products_float32.product.py_func
    parts = f.__globals__ | {"_multiply": _scalar()}
    return numba.njit(FunctionType(f.__code__, parts, "product_test"), error_model="numpy")


def _wrong(kernel: Any, m: int, n: int, k: int, alpha: float = 3.0) -> set[str]:
    """Which of the products of a linear map (M,K) to (M,N) are not exact: sums of whole numbers are, in whatever order."""
    rng = np.random.default_rng(m + n + k)
    x, w, dy = (rng.integers(-4, 5, shape).astype(f32) for shape in ((m, k), (n, k), (m, n)))
    rooms, wrong = np.empty((3, products_float32.ROOM_BYTES), np.uint8), set()

    def check(name: str, out: Any, a: Any, b: Any, turned: tuple[bool, bool], adds: bool, grid: Any) -> None:
        left, right = (z.T if turns else z for z, turns in zip((a, b), turned, strict=True))
        want = alpha * (left.astype(f64) @ right.astype(f64)) + (out if adds else 0)
        wide = np.full((len(out), out.shape[1] + 5), 7, f32)  # a view with other elements beside it
        view = wide[:, 2:-3]
        view[...] = out
        kernel(view, a, turned[0], b, turned[1], alpha, adds, *grid, rooms)
        if not (np.array_equal(view, want) and (wide[:, [0, 1, -3, -2, -1]] == 7).all()):
            wrong.add(name)

    check("y", np.zeros((m, n), f32), x, w, (False, True), False, (3, 1))
    check("dx", np.zeros((m, k), f32), dy, w, (False, False), False, (1, 2))
    check("dw", np.zeros((n, k), f32), dy, x, (True, False), False, (2, 1))
    check("dw added", np.full((n, k), 5, f32), dy, x, (True, False), True, (1, 3))
    check("both turned", np.zeros((k, n), f32), x[:, :], dy.T.copy(), (True, True), False, (1, 1))
    return wrong


@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape: tuple[int, int, int], emulated: Any) -> None:
    assert _wrong(emulated, *shape) == set()


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str, emulated: Any) -> None:
    try:
        planted[0] = list(FAULTS).index(fault)
        assert _wrong(emulated, 400, 430, 500) >= FAULTS[fault]
    finally:
        planted[0] = -1


@needs_vectors
@pytest.mark.parametrize("shape", [*SHAPES, (600, 1100, 390)])
def test_products_in_vectors(shape: tuple[int, int, int]) -> None:
    ops._vectors()
    assert _wrong(products_float32.product, *shape) == set()


@needs_vectors
def test_order_of_a_sum() -> None:
    """Terms of a piece in order, each rounded once, then pieces in order; the same bits for any threads, rows and columns."""
    rng, k = np.random.default_rng(0), TERMS + 130
    a, b = rng.standard_normal((50, k), f32), rng.standard_normal((k, 70), f32)
    got = np.zeros((50, 70), f32)
    multiply = ops._vectors().multiply
    multiply(got, a, b, 1.0, False, False, False)
    deep = ((k + 1) // 2 + 15) // 16 * 16
    want = np.zeros((50, 70), f32)
    for piece in (slice(0, deep), slice(deep, k)):
        s = np.zeros_like(want)
        for t in range(*piece.indices(k)):
            # exact product in float64; its sum is rounded there first, which changes few of the last bits
            s = (a[:, t : t + 1].astype(f64) * b[t].astype(f64) + s).astype(f32)
        want += s
    assert (got != want).mean() < 1e-3
    assert np.abs(got - want).max() < 1e-5
    rooms = np.empty((6, products_float32.ROOM_BYTES), np.uint8)
    for grid in ((1, 1), (2, 3), (6, 1)):
        again = np.zeros_like(got)
        products_float32.product(again, a, False, b, False, 1.0, False, *grid, rooms)
        assert again.tobytes() == got.tobytes()
    some = np.zeros((24, 33), f32)
    multiply(some, a[7:31], b[:, 9:42], 1.0, False, False, False)
    assert np.array_equal(some, got[7:31, 9:42])
    turned = np.zeros_like(got)
    multiply(turned, np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), 1.0, False, True, True)
    assert turned.tobytes() == got.tobytes()


@needs_vectors
@pytest.mark.parametrize(("alpha", "adds"), [(0.3, False), (0.3, True), (1.0, True)])
def test_edges_are_added_like_the_rest(alpha: float, adds: bool) -> None:
    """A part of a tile is multiplied by alpha and added in one operation too, in every piece."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(shape, f32) for shape in ((36, 500), (500, 64), (36, 64)))
    whole, part = c.copy(), c[:35, :63].copy()
    multiply = ops._vectors().multiply
    multiply(whole, a, b, alpha, adds, False, False)
    multiply(part, a[:35], b[:, :63], alpha, adds, False, False)
    assert part.tobytes() == whole[:35, :63].tobytes()


@needs_vectors
def test_a_product_without_terms() -> None:
    for adds, want in ((False, 0), (True, 7)):
        out = np.full((30, 40), 7, f32)
        ops._vectors().multiply(out, np.ones((30, 0), f32), np.ones((0, 40), f32), 1.0, adds, False, False)
        assert (out == want).all()


@needs_vectors
def test_threads_of_python_share_no_room() -> None:
    rng = np.random.default_rng(0)
    pairs = [[rng.integers(-4, 5, (150, 150)).astype(f32) for _ in range(2)] for _ in range(4)]

    def times(pair: Any) -> bool:
        out = np.zeros((150, 150), f32)
        same = True
        for _ in range(20):
            cpu.gemm(out, *pair, 1.0, 0.0, False, False)
            same &= np.array_equal(out, pair[0] @ pair[1])
        return same

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(times, pairs))


@needs_vectors
def test_other_factors_and_few_columns_go_to_openblas(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, gemm = [], kernels.gemm
    monkeypatch.setattr(kernels, "gemm", lambda *args: (calls.append(args[0].shape), gemm(*args)))
    x = np.ones((64, 64), f32)
    for out, beta in (((64, 64), 1.0), ((64, 64), 0.5), ((64, 8), 0.0), ((8, 64), 0.0)):
        y = np.full(out, 2, f32)
        cpu.gemm(y, x[: out[0]], x[:, : out[1]], 2.0, beta, False, False)
        assert (y == 128 + 2 * beta).all()
    assert calls == [(64, 64), (64, 8), (8, 64)]
