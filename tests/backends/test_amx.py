"""Products of bfloat16 on AMX tiles: their definition in plain NumPy, the kernels around them on any processor, the code that
LLVM makes for one that has tiles, and on such a one that both are the same to the bit."""

from __future__ import annotations

import sys
from types import FunctionType, SimpleNamespace
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import pytest
from llvmlite import ir
from numba import types

from addresses import pointer
from amx import TERMS, Emulated, product, tdpbf16ps
from apr import backends
from apr.backends.contract import BF16
from apr.backends.cpu import amx, blocked, ops, tiled, tiles
from apr.backends.cpu.bfloat16 import bfloat16
from cases import ROWS, Row
from precision import accuracy, off

cpu = backends.get("cpu")
LINEAR = [row for row in ROWS if row.case.name.startswith("linear")]
FAULTS = (
    "tiles of the left exchanged",
    "tiles of the right exchanged",
    "pairs as rows",
    "pair reversed",
    "last terms dropped",
)
SHAPES = [(1, 1, 1), (97, 123, 257), (5, 59, 97), (33, 40, 1025), (128, 96, 256)]  # M, N, K
has_tiles = pytest.mark.skipif(tiles.path() != "amx", reason="this processor has no AMX tiles")


def random(rng: np.random.Generator, *shape: int) -> Any:
    return rng.standard_normal(shape).astype(np.float32).astype(BF16)


def same(got: Any, want: Any) -> bool:
    """Whether two arrays of one dtype have the same bits."""
    kind = np.uint16 if got.dtype == BF16 else np.uint32
    return np.array_equal(got.view(kind), want.astype(got.dtype).view(kind))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The cpu backend whose products of bfloat16 are made of emulated tiles, with a fault or none."""
    cpu.empty(0, BF16)

    def use(fault: str = "") -> Any:
        monkeypatch.setattr(sys.modules["apr.backends.cpu.low"], "products", Emulated(fault))

    return use


# The definition


def test_even_terms_and_odd_terms_add_apart() -> None:
    """2^24 + 1 is 2^24 in float32: what is lost tells which terms meet first."""
    a, b = np.zeros((16, TERMS), BF16), np.ones((16, 16, 2), BF16)
    a[0, [0, 1, 3]] = 2.0**24, 1, 1  # the two ones meet, in the odd sum, before the large one
    a[1, [0, 2, 4]] = 2.0**24, 1, 1  # all in the even sum, one by one
    c = tdpbf16ps(np.zeros((16, 16), np.float32), a, b)
    assert c[0, 0] == 2.0**24 + 2
    assert c[1, 0] == 2.0**24
    a[2, :2] = 1, 1
    c[2] = 2.0**24
    assert tdpbf16ps(c, a, b)[2, 0] == 2.0**24 + 2  # a pair's sum goes to the old one, not its terms


def test_subnormal_numbers_count_as_0() -> None:
    a, b = np.zeros((16, TERMS), BF16), np.ones((16, 16, 2), BF16)
    a[0, 0] = 2.0**-127  # read
    a[1, 0], b[0, 1, 0] = 2.0**-100, 2.0**-27  # made
    a[2, :2] = 2.0**-126, 2.0**-126  # neither
    c = np.full((16, 16), 2.0**-130, np.float32)
    assert not tdpbf16ps(c, a, b)[0].any()
    assert tdpbf16ps(c, a, b)[1, 1] == 0
    assert tdpbf16ps(c, a, b)[2, 0] == 2.0**-125


def test_emulation_against_float64() -> None:
    rng = np.random.default_rng(0)
    a, b = random(rng, 97, 1025), random(rng, 1025, 59)
    exact, terms = (f(a.astype(np.float64)) @ f(b.astype(np.float64)) for f in (np.asarray, np.abs))
    assert (np.abs(product(a, b) - exact) <= 1025 * 2.0**-24 * terms).all()


# The kernels, with emulated tiles


@pytest.mark.parametrize("row", LINEAR, ids=str)
def test_accuracy(row: Row, emulated: Any) -> None:
    emulated()
    figures = accuracy(cpu, row, "bfloat16")
    assert not off(figures), figures


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str, emulated: Any) -> None:
    """Operands whose tiles, pairs or last terms are not where they belong, in forward and backward."""
    emulated(fault)
    several = [row for row in LINEAR if row.sizes["N"] > ops.FEW_ROWS]
    seen = {row.case.name for row in several if off(accuracy(cpu, row, "bfloat16"))}
    assert seen == {row.case.name for row in several}


def _scalar_rows() -> Any:
    """tile_rows in Numba, sum by sum."""
    floats, halves = pointer(types.float32), pointer(bfloat16)
    f32, f64, u64 = np.float32, np.float64, np.uintp

    @numba.njit(error_model="numpy")
    def rows(sums: Any, a: Any, a_row: Any, a_step: Any, b: Any, blocks: Any, adds: Any) -> None:
        s = numba.carray(floats(sums), (32, 32))
        for i in range(32):
            for j in range(32):
                c = s[i, j] if adds else f32(0)
                for t in range(blocks):
                    x = numba.carray(halves(u64(a + t * a_step + i * a_row)), (32,))
                    y = numba.carray(halves(b + u64(2048 * t + 1024 * (j // 16))), (16, 16, 2))
                    even, odd = f32(0), f32(0)
                    for p in range(16):
                        even = f32(f64(even) + f64(f32(x[2 * p])) * f64(f32(y[p, j % 16, 0])))
                        odd = f32(f64(odd) + f64(f32(x[2 * p + 1])) * f64(f32(y[p, j % 16, 1])))
                    c += even + odd
                s[i, j] = c

    return rows


@pytest.fixture(scope="module")
def scalar() -> Any:
    """The kernel around scalar tiles, for pieces of 3 blocks of terms and few blocks of rows, on one thread."""
    nothing, f = numba.njit(lambda *address: None), tiled.step.py_func
    own = numba.njit(FunctionType(f.__code__, f.__globals__ | {"tile_rows": _scalar_rows()}))
    sizes = {"TERM_BLOCKS": 3, "TERMS_IN_PLACE": 5, "LEFT_BLOCKS": 6}
    kind = tiled.kind | sizes | {"begin": nothing, "end": nothing, "step": own}
    return numba.njit(blocked.bound("scalar", **kind), error_model="numpy")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_and_edges(shape: tuple[int, ...], scalar: Any) -> None:
    """The kernel around the tiles: every product of a linear map has the bits of the emulation."""

    def multiply(
        out: Any, left: Any, right: Any, k: int, bias: Any = None, adds: bool = False, grid: Any = (1, 1)
    ) -> None:
        bias = np.empty(0, BF16) if bias is None else bias
        scalar(out, *left, *right, bias, adds, *grid, amx.CONFIG)

    every_product(multiply, *shape)


def every_product(multiply: Any, m: int, n: int, k: int) -> None:
    """Compare the four products of a linear map (M,K) to (M,N) with the emulation."""
    rng = np.random.default_rng(m)
    x, w, b, dy = (random(rng, *shape) for shape in ((m, k), (n, k), (n,), (m, n)))
    y, dx, want = np.empty((m, n), BF16), np.empty((m, k), BF16), product(x, np.ascontiguousarray(w.T))
    multiply(y, tiled.rows(x), tiled.columns(w), k)
    assert same(y, want)
    multiply(y, tiled.rows(x), tiled.columns(w), k, b, grid=(2, 3))
    assert same(y, want + b.astype(np.float32))
    multiply(dx, tiled.rows(dy), tiled.terms(w), n, grid=(3, 1))
    assert same(dx, product(dy, w))
    dw = rng.standard_normal((n, k)).astype(np.float32)
    old, more = dw.copy(), product(np.ascontiguousarray(dy.T), x)
    multiply(dw, tiled.transposed(dy), tiled.terms(x), m, adds=True)
    assert same(dw, old + more)
    multiply(dw, tiled.transposed(dy), tiled.terms(x), m, grid=(1, 2))
    assert same(dw, more)


# The code, and the choice of it


def test_llvm_makes_the_instructions() -> None:
    """For a processor that need not be this one: four products of each step, on the tiles that their operands went to."""
    module = ir.Module()
    amx.block_function(module).linkage = "external"
    llvmlite.binding.initialize_native_target()
    llvmlite.binding.initialize_native_asmprinter()
    target = llvmlite.binding.Target.from_triple("x86_64-unknown-linux-gnu")
    code = target.create_target_machine(cpu="sapphirerapids", opt=3).emit_assembly(
        llvmlite.binding.parse_assembly(str(module))
    )
    lines = [" ".join(line.split()) for line in code.splitlines()]
    products = [line for line in lines if line.startswith("tdpbf16ps")]
    assert products == [
        f"tdpbf16ps %tmm{b}, %tmm{a}, %tmm{c}" for c, a, b in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7))
    ]
    for name, number in (("tileloadd", 8), ("tilezero", 4), ("tilestored", 4)):
        assert sum(line.startswith(name) for line in lines) == number


@pytest.mark.parametrize(
    ("features", "is_permitted", "path"),
    [
        ({"amx-tile": True, "amx-bf16": True, "avx512bf16": True}, True, "amx"),
        ({"amx-tile": True, "amx-bf16": True, "avx512bf16": True}, False, "avx512_bf16"),
        ({"amx-tile": True, "amx-bf16": False, "avx512bf16": True}, True, "avx512_bf16"),
        ({"amx-tile": True, "amx-bf16": True}, False, "float32"),
    ],
)
def test_path(features: Any, is_permitted: bool, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that the processor has are of use only where the system gives them to this process."""
    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", lambda: features)
    monkeypatch.setattr(amx, "is_permitted", lambda: is_permitted)
    assert tiles.path() == path


@pytest.mark.parametrize(("answer", "is_permitted"), [(0, True), (-1, False)])
def test_permission(answer: int, is_permitted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system is asked for state 18, the data of tiles; a refusal is one, as is a system that is not Linux."""
    asked = []
    library = SimpleNamespace(syscall=lambda *args: asked.append(args) or answer)
    monkeypatch.setattr(amx.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(amx.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(amx.sys, "platform", "linux")
    assert amx.is_permitted() is is_permitted
    assert asked == [(158, 0x1023, 18)]
    monkeypatch.setattr(amx.sys, "platform", "darwin")
    assert not amx.is_permitted()


# The tiles


@has_tiles
@pytest.mark.parametrize("shape", [*SHAPES, (64, 64, 32), (600, 70, 40), (70, 600, 1100)], ids=str)
def test_tiles_have_the_bits_of_the_emulation(shape: tuple[int, ...]) -> None:
    cpu.empty(0, BF16)
    every_product(lambda *args, grid=None, **more: tiled.multiply(*args, **more), *shape)


@has_tiles
@pytest.mark.parametrize("scale", [1e-19, 3e-20, 1e18])
def test_tiles_at_the_edges_of_the_range(scale: float) -> None:
    """Products that are subnormal or infinite, or sums of such."""
    cpu.empty(0, BF16)
    rng = np.random.default_rng(0)
    x, w = ((rng.standard_normal((64, 96)).astype(np.float32) * scale).astype(BF16) for _ in range(2))
    y = np.empty((64, 64), np.float32)
    tiled.multiply(y, tiled.rows(x), tiled.columns(w), 96)
    assert np.array_equal(y, product(x, np.ascontiguousarray(w.T)), equal_nan=True)
