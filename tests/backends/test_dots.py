"""Products of bfloat16 on AVX512-BF16: the kernel around the dot products, on any processor, and faults planted in it."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import numba
import numpy as np
import pytest
from numba import types

from addresses import pointer
from apr.backends.contract import BF16
from apr.backends.cpu import blocked, products, tiles
from apr.backends.cpu.bfloat16 import bfloat16

SHAPES = [(1, 1, 1), (97, 123, 257), (5, 59, 97), (72, 40, 96), (40, 1025, 33), (136, 96, 256)]  # M, N, K
ALL = {"y", "y with bias", "dx", "dw", "dw added"}
FAULTS = {
    "sums begin anew": ALL - {"dx"},  # of one piece of terms
    "pairs of the right exchanged": ALL,
    "the bias of the first columns": {"y with bias"},
    "rows are one further": ALL,
}
f32, f64, u64 = np.float32, np.float64, np.uintp
# number of the fault; compiled code reads it where it lies
planted = np.full(1, -1)


def _scalar_rows() -> Any:
    """dot_rows in Numba, sum by sum: the two products of a pair meet, then the sum; which terms meet first matters here."""
    floats, halves, numbers = (pointer(kind) for kind in (types.float32, bfloat16, types.int64))
    at_fault, (anew, exchanged, first, further) = planted.ctypes.data, range(len(FAULTS))

    @numba.njit(error_model="numpy")
    def write(out: Any, to: Any, x: Any, adds: Any) -> None:
        if out.itemsize == 2:
            numba.carray(halves(to), (1,))[0] = x
        else:
            place = numba.carray(floats(to), (1,))
            place[0] = place[0] + x if adds else x

    @numba.njit(error_model="numpy")
    def rows(
        out: Any, to: Any, to_bytes: Any, adds: Any, a: Any, a_row: Any, a_pair: Any, step: Any, b: Any, blocks: Any,
        bias: Any, sums: Any, goes_on: Any, ends: Any,
    ) -> None:  # fmt: skip
        fault = numba.carray(numbers(u64(at_fault)), (1,))[0]
        for i in range(tiles.ROWS):
            for j in range(32):
                c = f32(0)
                if goes_on and fault != anew:
                    c = numba.carray(floats(u64(sums + u64(128 * i + 4 * j))), (1,))[0]
                for t in range(blocks):
                    for p in range(16):
                        row = (i + (fault == further)) % tiles.ROWS
                        x = numba.carray(halves(u64(a + u64(t * step + row * a_row + p * a_pair))), (2,))
                        at = b + u64(
                            2048 * t + 1024 * (j // 16) + 64 * (p ^ (fault == exchanged)) + 4 * (j % 16)
                        )
                        y = numba.carray(halves(at), (2,))
                        both = f32(f64(f32(x[0])) * f64(f32(y[0])) + f64(f32(x[1])) * f64(f32(y[1])))
                        c += both
                place = u64(to + u64(i * to_bytes + out.itemsize * j))
                if not ends:
                    numba.carray(floats(u64(sums + u64(128 * i + 4 * j))), (1,))[0] = c
                elif bias == 0:
                    write(out, place, c, adds)
                else:
                    more = numba.carray(halves(u64(bias + u64(2 * (j % 16 if fault == first else j)))), (1,))
                    write(out, place, c + f32(more[0]), False)

    return rows


@pytest.fixture(scope="module")
def kernel() -> Any:
    """products.product around scalar code, for pieces of 3 blocks of terms and of 2 of rows."""
    f = products.step.py_func
    own = numba.njit(FunctionType(f.__code__, f.__globals__ | {"dot_rows": _scalar_rows()}))
    sizes = {"TERM_BLOCKS": 3, "TERMS_IN_PLACE": 3, "LEFT_BLOCKS": 6}
    kind = products.kind | sizes | {"step": own}
    return numba.njit(blocked.bound("scalar", **kind), error_model="numpy")


def _exact(a: Any, b: Any) -> Any:
    """a b in float32, pair after pair, as _scalar_rows adds."""
    k = -(-a.shape[1] // 2) * 2
    wide = [np.zeros((len(a), k)), np.zeros((k, b.shape[1]))]
    wide[0][:, : a.shape[1]], wide[1][: len(b)] = a, b
    c = np.zeros((len(a), b.shape[1]), f32)
    for p in range(0, k, 2):
        c = c + (wide[0][:, p : p + 2] @ wide[1][p : p + 2]).astype(f32)
    return c


def _wrong(kernel: Any, m: int, n: int, k: int) -> list[str]:
    """Which of the products of a linear map (M,K) to (M,N) have other bits than _exact."""
    rng = np.random.default_rng(m)
    # Sums of whole numbers times 2^-8: products of a pair are exact, and larger sums round.
    x, w, b, dy = (
        (rng.integers(-255, 256, s) * 2.0**-8).astype(BF16) for s in ((m, k), (n, k), (n,), (m, n))
    )
    wrong, none = list[str](), np.empty(0, BF16)

    def check(
        name: str, out: Any, left: Any, right: Any, want: Any, bias: Any = none, adds: bool = False, grid: Any = (1, 1)
    ) -> None:  # fmt: skip
        kernel(out, *left, *right, bias, adds, *grid, products.NO_CONFIG)
        if not np.array_equal(out.view(np.uint8), want.astype(out.dtype).view(np.uint8)):
            wrong.append(name)

    y, forward = np.empty((m, n), BF16), _exact(x, w.T)
    check("y", y, products.rows(x), products.columns(w), forward, grid=(3, 1))
    check("y with bias", y, products.rows(x), products.columns(w), forward + b.astype(f32), b, grid=(2, 2))
    check("dx", np.empty((m, k), BF16), products.rows(dy), products.terms(w), _exact(dy, w))
    dw, old = (rng.standard_normal((n, k)).astype(f32) for _ in range(2))
    check("dw", dw, products.transposed(dy), products.terms(x), _exact(dy.T, x), grid=(1, 2))
    want = old + _exact(dy.T, x)
    check("dw added", old, products.transposed(dy), products.terms(x), want, adds=True)
    return wrong


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_and_edges(shape: tuple[int, int, int], kernel: Any) -> None:
    """Whole rows, which are read where they lie, and others; one piece of terms and several; edges of every side."""
    assert _wrong(kernel, *shape) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str, kernel: Any) -> None:
    planted[0] = list(FAULTS).index(fault)
    try:
        assert set(_wrong(kernel, 136, 96, 256)) == FAULTS[fault]
    finally:
        planted[0] = -1
