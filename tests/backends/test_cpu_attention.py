"""Attention by blocks on the cpu backend, in bfloat16 and float32: its kernels around products in plain Numba, on any processor,
and faults that are planted in what stands between the products. The products of float32 themselves."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest
from numba import types

from addresses import pointer
from apr import backends
from apr.backends.contract import BF16
from apr.backends.cpu import attention, attention_float32, ops, softmax
from apr.backends.cpu.bfloat16 import bfloat16
from apr.backends.cpu.tiles import EDGE, SUMS_BYTES, has_vectors
from cases import CASES, Row, make, rows
from precision import accuracy, off

cpu = backends.get("cpu")
f32, u64, i64 = np.float32, np.uintp, np.int64
DTYPES = ("bfloat16", "float32")
FAULTS = {  # planted: the outputs that are wrong
    "edge blocks have no mask": {"y", "lse", "dq", "dk", "dv"},
    "queries see one key more": {"y", "lse", "dq", "dk", "dv"},
    "queries see one key too few at the start of a document": {"y", "lse", "dq", "dk", "dv"},
    "the top is that of the queries before": {"y", "lse"},
    "totals go on from the queries before": {"y", "lse"},
    "the dot product leaves out columns": {"dq", "dk"},
    "p and ds are exchanged": {"dk", "dv"},
}
SHAPES = [  # head sizes of one block, of several and of parts of one; odd lengths; several query heads of a key's head
    ("attention", "2 59 4 2 16"),
    ("attention", "1 97 6 2 32"),
    ("attention", "1 33 3 3 48"),
    ("attention", "1 40 2 1 59"),
    ("attention", "1 64 2 2 128"),
    ("attention_window", "1 129 2 1 32 33"),
    ("attention_cache", "1 33 123 130 4 2 48 0"),
    ("attention_cache", "1 65 97 97 2 1 32 40"),
    ("attention_documents", "2 123 4 2 32 0"),
    ("attention_documents", "2 97 2 1 96 17"),
]
needs_vectors = pytest.mark.skipif(not has_vectors(), reason="this processor has no vectors of 512 bits")
fault = np.full(1, -1)
AT_FAULT = fault.ctypes.data


def _named(name: str) -> int:
    return list(FAULTS).index(name)


NO_MASK, ONE_MORE, TOO_FEW, OLD_TOP, GOES_ON, COLUMNS, EXCHANGED = range(len(FAULTS))


def _row(name: str, sizes: str) -> Row:
    (case,) = (case for case in CASES if case.name == name)
    (row,) = rows(replace(case, table=f"{case.table.split(':')[0]}: {sizes}"))
    return row


def _parts(dtype: str) -> dict[str, Any]:
    """What the kernels call: products in plain Numba, and the rest with the fault that is planted, or none."""
    floats, halves, numbers = pointer(types.float32), pointer(bfloat16), pointer(types.int64)
    put_masks, put_bounds = attention._put_masks, attention._put_bounds
    kind = vars(softmax) | (attention_float32.kind if dtype == "float32" else {})
    exponentials, dot_blocks, gradients = (kind[name] for name in ("exponentials", "dot_blocks", "gradients"))
    raise_tops = softmax.raise_tops

    @numba.njit
    def planted() -> Any:
        return numba.carray(numbers(u64(AT_FAULT)), (1,))[0]

    @numba.njit(error_model="numpy")
    def low_block(sums: Any, a: Any, b: Any, terms: Any, width: Any, adds: Any) -> None:
        s = numba.carray(floats(sums), (EDGE, EDGE))
        if not adds:
            s[:] = f32(0)
        for t in range((terms + EDGE - 1) // EDGE):
            x = numba.carray(halves(u64(a + u64(2048 * t))), (EDGE, EDGE))
            y = numba.carray(halves(u64(b + u64(2048 * t))), (2, 16, 16, 2))
            for i in range(EDGE):
                for p in range(16):
                    one, two = f32(x[i, 2 * p]), f32(x[i, 2 * p + 1])
                    for h in range(2):
                        for j in range(16):
                            s[i, 16 * h + j] += one * f32(y[h, p, j, 0]) + two * f32(y[h, p, j, 1])

    @numba.njit(error_model="numpy")
    def add_terms(s: Any, x: Any, b: Any, t: Any, turns: Any, height: Any, width: Any) -> None:
        y = numba.carray(floats(u64(b + u64(4096 * (t // EDGE)))), (2, EDGE, 16))
        for i in range(height):
            one = x[t % EDGE, i] if turns else x[i, t % EDGE]
            for j in range(width):
                s[i, j] += one * y[j // 16, t % EDGE, j % 16]

    # Nothing outside the columns, or rows, that count is read or written here.
    @numba.njit(error_model="numpy")
    def block(sums: Any, a: Any, b: Any, terms: Any, width: Any, adds: Any) -> None:
        s = numba.carray(floats(sums), (EDGE, EDGE))
        if not adds:
            s[:, :width] = f32(0)
        for t in range(terms):
            x = numba.carray(floats(u64(a + u64(4096 * (t // EDGE)))), (EDGE, EDGE))
            add_terms(s, x, b, t, False, EDGE, width)

    @numba.njit(error_model="numpy")
    def block_turned(sums: Any, a: Any, b: Any, terms: Any, height: Any, adds: Any) -> None:
        s = numba.carray(floats(sums), (EDGE, EDGE))
        if not adds:
            s[:height] = f32(0)
        for t in range(terms):
            x = numba.carray(floats(u64(a + u64(4096 * (t // EDGE)))), (EDGE, EDGE))
            add_terms(s, x, b, t, True, height, EDGE)

    @numba.njit
    def nothing(config: Any = 0) -> None:
        return None

    @numba.njit
    def masks(like: Any, to: Any, starts: Any, stops: Any, rows: Any, lo: Any, hi: Any) -> None:
        put_masks(like, to, starts, stops, rows, lo, hi)
        if planted() == NO_MASK:
            words = numba.carray(pointer_of_words(u64(to)), ((hi - lo) * EDGE,))
            for r in range(EDGE):
                words[(hi - lo - 1) * EDGE + r] = 0xFFFFFFFF

    pointer_of_words = pointer(types.uint32)

    @numba.njit
    def bounds(
        starts: Any, stops: Any, docs: Any, b: Any, i0: Any, rows: Any, past: Any, window: Any
    ) -> None:
        put_bounds(starts, stops, docs, b, i0, rows, past, window)
        for r in range(rows):
            stops[r] += planted() == ONE_MORE
            if planted() == TOO_FEW and docs.size > 0 and stops[r] - starts[r] > 1:
                starts[r] += 1

    @numba.njit
    def tops(to: Any, scores: Any, seen: Any, goes_on: Any) -> None:
        raise_tops(to, scores, seen, i64(goes_on or planted() == OLD_TOP))

    @numba.njit
    def sums(to: Any, totals: Any, scores: Any, seen: Any, top: Any, factor: Any, goes_on: Any) -> None:
        exponentials(to, totals, scores, seen, top, factor, i64(goes_on or planted() == GOES_ON))

    @numba.njit
    def dots(to: Any, left: Any, right: Any, goes_on: Any) -> None:
        dot_blocks(to, left, right, i64(goes_on and planted() != COLUMNS))

    @numba.njit
    def grads(
        rows: Any, ds_pairs: Any, p_pairs: Any, s: Any, dp: Any, seen: Any, logs: Any, dot: Any, factor: Any
    ) -> None:
        if planted() == EXCHANGED:
            ds_pairs, p_pairs = p_pairs, ds_pairs
        gradients(rows, ds_pairs, p_pairs, s, dp, seen, logs, dot, factor)

    products = {"block": low_block, "block_turned": low_block}
    if dtype == "float32":
        products = attention_float32.kind | {"block": block, "block_turned": block_turned}
    return products | dict(
        begin=nothing, end=nothing, _put_masks=masks, _put_bounds=bounds, raise_tops=tops,
        exponentials=sums, dot_blocks=dots, gradients=grads,
    )  # fmt: skip


@pytest.fixture(scope="module", params=DTYPES)
def kernels(request: pytest.FixtureRequest) -> Any:
    """A dtype, and the two kernels around plain Numba, on one thread."""
    parts = _parts(request.param)
    kinds = vars(types) | {"act": bfloat16 if request.param == "bfloat16" else types.float32}
    return request.param, *(
        numba.njit(eval(signature, kinds), error_model="numpy")(attention.bound(f, "test", **parts))
        for f, signature in attention._SIGNATURES.items()
    )


@pytest.fixture
def emulated(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The dtype that is computed by these kernels."""
    dtype, forward, backward = kernels
    cpu.empty(0, BF16)
    none = np.empty(0, np.uint8)
    own = SimpleNamespace(
        attention_fwd=lambda *args: forward(*args, 1, none),
        attention_bwd=lambda *args: backward(*args, none),
    )
    if dtype == "bfloat16":
        monkeypatch.setattr(sys.modules["apr.backends.cpu.low"], "products", own)
    else:
        monkeypatch.setattr(ops, "_vectors", lambda: own)
    yield dtype
    fault[0] = -1


@pytest.mark.parametrize(("name", "sizes"), SHAPES)
def test_accuracy(name: str, sizes: str, emulated: str) -> None:
    """Of every head size, with documents, windows, keys of the past, and queries that end within a block."""
    figures = accuracy(cpu, _row(name, sizes), emulated)
    assert not off(figures), figures


@pytest.mark.parametrize("planted", FAULTS)
def test_planted_faults_are_seen(planted: str, emulated: str) -> None:
    row = _row("attention_documents", "1 123 2 1 48 0")
    values = make(row, emulated)
    values["q"] *= 64  # a top that is not the row's is one of other exponentials only where scores are large
    assert not off(accuracy(cpu, row, emulated, values))
    fault[0] = _named(planted)
    assert {name.split()[0] for name in off(accuracy(cpu, row, emulated, values))} >= FAULTS[planted]


@needs_vectors
def test_products_of_float32() -> None:
    """Each element of the products of blocks, of so many terms and columns, or rows; whole numbers, so that sums are exact."""
    block, block_turned = attention_float32.block, attention_float32.block_turned

    @numba.njit
    def multiply(turns: Any, sums: Any, a: Any, b: Any, terms: Any, width: Any, adds: Any) -> None:
        if turns:
            block_turned(u64(sums), u64(a), u64(b), terms, width, adds)
        else:
            block(u64(sums), u64(a), u64(b), terms, width, adds)

    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 10, (2, 3, EDGE, EDGE)).astype(f32)
    right = np.ascontiguousarray(b.reshape(3, EDGE, 2, 16).transpose(0, 2, 1, 3))
    assert right[0].nbytes == SUMS_BYTES
    for turns in (False, True):
        for terms, width in ((4, 32), (32, 16), (36, 32), (48, 8), (96, 32)):
            full = -(-terms // EDGE)
            left = a[:full] if turns else a[:full].transpose(0, 2, 1)
            left = left.reshape(-1, EDGE)[:terms]  # (terms, rows)
            want = left.astype(np.float64).T @ b[:full].reshape(-1, EDGE)[:terms]
            for adds in (False, True):
                sums = np.full((EDGE, EDGE), 1000, f32)
                multiply(turns, sums.ctypes.data, a.ctypes.data, right.ctypes.data, terms, width, adds)
                own = (slice(width), slice(None)) if turns else (slice(None), slice(32 if width > 16 else 16))
                assert np.array_equal(sums[own], want[own] + 1000 * adds)
                sums[own] = 1000
                assert (sums == 1000).all()


def test_threads_change_no_bit(kernels: Any) -> None:
    """Query heads of a key's head are cut among threads, or not."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 70, n, 48), f32) for n in (4, 2, 2))
    dtype, forward, _ = kernels
    q, k, v = (x.astype(BF16 if dtype == "bfloat16" else f32) for x in (q, k, v))
    got = []
    for threads in (1, 8):
        y, lse = np.zeros_like(q), np.zeros((1, 4, 70), f32)
        forward(y, lse, q, k, v, ops._NO_BORDERS, 0, threads, np.empty(0, np.uint8))
        got.append((y.tobytes(), lse.tobytes()))
    assert got[0] == got[1]


@needs_vectors
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7F800001, 0x7FC000FF, 0xFFFFFFFF])
def test_every_nan_stays_one(bits: int) -> None:
    """Of an exponential the low bits of a NaN were taken for a number's, and its sign and exponent got lost."""
    rng = np.random.default_rng(0)
    q, k, v, dy = rng.standard_normal((4, 1, 40, 1, 32), f32)
    k.view(np.uint32)[0, 5] = bits
    y, lse, grads = np.zeros_like(q), np.zeros((1, 1, 40), f32), [np.zeros_like(q) for _ in range(3)]
    cpu.attention_fwd(y, lse, q, k, v, None, 0)
    cpu.attention_bwd(*grads, dy, y, lse, q, k, v, None, 0)
    seeing = np.arange(40) >= 5
    assert np.array_equal(np.isnan(lse[0, 0]), seeing)
    assert np.array_equal(np.isnan(y[0, :, 0]).all(1), seeing)
    for x in grads:
        assert np.isnan(x).any()


def test_logarithm_and_order_of_a_total() -> None:
    """lse = top + log(total) to the last bits; a total adds neighbours first; a NaN stays one."""
    finish = softmax.finish_rows

    @numba.njit
    def finish_all(inverse: Any, lse: Any, tops: Any, totals: Any) -> None:
        finish(u64(inverse), u64(lse), u64(tops), u64(totals), f32(1))

    inverse, lse, tops = (np.zeros(EDGE, f32) for _ in range(3))
    totals = np.zeros((EDGE, 16), f32)
    at = [x.ctypes.data for x in (inverse, lse, tops, totals)]
    wrong = 0.0
    for scale in np.geomspace(1, 1e7, 200):
        totals[:, 5] = (scale * np.linspace(1, 1.03, EDGE)).astype(f32)
        finish_all(*at)
        want = np.log(totals[:, 5].astype(np.float64))
        wrong = max(wrong, float((np.abs(lse - want) / (1 + want)).max()))
        assert np.array_equal(inverse, 1 / totals[:, 5])
    assert wrong < 2.0**-23
    totals[:] = 0
    totals[3, :3], totals[4, [0, 2, 3]] = (2.0**24, 1, 1), (2.0**24, 1, 1)
    totals[5, 0] = np.nan
    finish_all(*at)
    assert inverse[3] == 2.0**-24  # 2^24 + 1 rounds to 2^24, and so does it with the third
    assert inverse[4] == f32(1) / f32(2.0**24 + 2)  # the two ones meet first
    assert np.isnan(lse[5])
    assert np.isnan(inverse[5])
    assert np.isfinite(lse[[3, 4]]).all()
