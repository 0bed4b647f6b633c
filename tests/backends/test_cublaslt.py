"""Matrix products through cuBLASLt, without a GPU: fake_cublaslt plays the library."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

from apr.backends import reference
from apr.backends.cuda import cublaslt as _cublaslt
from apr.backends.cuda import matmul as cublaslt
from apr.common.errors import DeviceError
from fake_cublaslt import Library, aligned, array, errors, matrix, products, wrong

ACTS = ("float32", "bfloat16")
SHAPES = [(1, 1, 1), (5, 59, 97), (97, 123, 5), (1, 59, 97), (97, 1, 5), (64, 32, 16)]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pad", [0, 3, 8])
def test_products_equal_reference(tmp_path: Path, act: str, shape: tuple[int, int, int], pad: int) -> None:
    lt = products(tmp_path)
    assert errors(lt, act, *shape, pad) == []
    assert errors(lt, act, *shape, pad, bias=False) == []
    assert errors(lt, act, *shape, pad) == []  # other arrays through the plans of the first


def no_bias(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cublaslt, "EPILOGUE_BIAS", 1)


def tight_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_cublaslt, "_ld", lambda x: x.shape[1])


def beta_zero(patch: pytest.MonkeyPatch) -> None:
    matmul, zero = Library.cublasLtMatmul, ctypes.c_float(0.0)
    patch.setattr(Library, "cublasLtMatmul", lambda *a: matmul(*a[:8], ctypes.addressof(zero), *a[9:]))


def beta_one(patch: pytest.MonkeyPatch) -> None:
    """What is overwritten is added to."""
    patch.setattr(cublaslt, "_ZERO_AT", cublaslt._ONE_AT)


def transposed(name: str, a: int, b: int) -> Callable[[pytest.MonkeyPatch], None]:
    op = getattr(cublaslt, name)
    return lambda patch: patch.setattr(cublaslt, name, _cublaslt.Product(op.name, a, b, op.adds))


@pytest.mark.parametrize(
    ("plant", "red"),
    [
        (no_bias, ["y"]),
        (tight_rows, ["y", "dx", "dw", "dw begun"]),
        (beta_zero, ["dw"]),
        (beta_one, ["y", "dx", "dw begun"]),
        (transposed("FORWARD", 0, 0), ["y"]),
        (transposed("GRAD_INPUT", 1, 0), ["dx"]),
        (transposed("GRAD_WEIGHT", 0, 0), ["dw", "dw begun"]),
    ],
)
def test_planted_faults_show(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
    red: list[str],
) -> None:
    plant(monkeypatch)
    assert errors(products(tmp_path), "float32", 16, 16, 16, 8) == red  # square: only the numbers can tell


def test_bias_of_another_layer(tmp_path: Path) -> None:
    """One plan serves all layers; the pointer of the bias is set when it changes, and only then."""
    rng, library = np.random.default_rng(0), Library()
    lt = products(tmp_path, library)
    x, w, y = (matrix(rng, *s, np.float32) for s in ((5, 16), (32, 16), (5, 32)))
    biases = [array(aligned(np.full(32, k, np.float32))) for k in (0, 1)]
    for which, expected in (
        (0, 4),
        (0, 0),
        (1, 1),
        (1, 0),
        (0, 1),
    ):  # 4: with the operations and the epilogue
        library.calls.clear()
        lt.forward(y, x, w, biases[which])
        assert not wrong(y, x.host @ w.host.T + which, "float32")
        assert library.calls["cublasLtMatmulDescSetAttribute"] == expected


def test_second_call_does_nothing_but_multiply(tmp_path: Path) -> None:
    rng, library = np.random.default_rng(0), Library()
    lt = products(tmp_path, library)
    x, w, y, b = (matrix(rng, *s, np.float32) for s in ((5, 16), (32, 16), (5, 32), (1, 32)))
    lt.forward(y, x, w, array(b.host[0]))
    library.calls.clear()
    y.host[...] = 0
    lt.forward(y, x, w, array(b.host[0]))
    assert not library.calls  # Products holds on to cublasLtMatmul itself
    assert not wrong(y, x.host @ w.host.T + b.host, "float32")


@pytest.mark.parametrize("which", range(4))
def test_each_array_is_looked_at_in_each_call(tmp_path: Path, which: int) -> None:
    """Arrays of the same shape that differ in strides, address or dtype do not go through one plan."""
    rng, lt = np.random.default_rng(0), products(tmp_path)
    arrays = [matrix(rng, *s, np.float32) for s in ((5, 32), (5, 16), (32, 16))] + [
        array(aligned(np.ones(32, "f")))
    ]

    def differs() -> bool:
        y, x, w, b = arrays
        lt.forward(*arrays)
        return wrong(y, x.host @ w.host.T + b.host, "float32")

    assert not differs()
    old = arrays[which].host
    moved = aligned(np.concatenate([old.ravel()[:1], old.ravel()]))[1:].reshape(old.shape)
    for other in (moved, np.repeat(old, 2, axis=0)[::2]) if old.ndim == 2 else (moved,):
        arrays[which] = array(other)
        assert not differs()
        assert not wrong(arrays[0], arrays[1].host @ arrays[2].host.T + arrays[3].host, "float32")
    assert len(lt._plans) == (3 if old.ndim == 2 else 2)  # one more for each other alignment and stride
    arrays[which] = array(aligned(old.astype(bfloat16)))
    with pytest.raises(ValueError, match="fit"):
        differs()


def test_stride_of_an_only_row_means_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, w, y = (matrix(rng, *s, np.float32) for s in ((1, 16), (32, 16), (1, 32)))
    products(tmp_path).forward(y, array(np.lib.stride_tricks.as_strided(x.host, (1, 16), (0, 4))), w, None)
    assert not wrong(y, x.host @ w.host.T, "float32")


def key(act: str = "bfloat16", ptr: int = 1 << 20, row: int = 128, bias: int | None = None) -> _cublaslt.Key:
    def at(rows: int, cols: int) -> Any:
        size = np.dtype(act).itemsize
        memory = SimpleNamespace(ptr=ptr)
        return SimpleNamespace(
            data=memory, shape=(rows, cols), strides=(row * size, size), dtype=np.dtype(act)
        )

    b = None
    if bias is not None:
        b = SimpleNamespace(data=SimpleNamespace(ptr=bias), shape=(59,), strides=(2,), dtype=np.dtype(act))
    return _cublaslt.key_of(cublaslt.FORWARD, at(5, 59), at(59, 97), at(5, 97), b)


def test_key_tells_what_decides() -> None:
    k = key(bias=(1 << 20) + 64)
    assert str(k) == "forward bfloat16 5x59x97 ld 128,128,128 align 256,256,256 bias 64"
    assert str(key("float32")) == "forward float32 5x59x97 ld 128,128,128 align 256,256,256"
    others = [key(), key(ptr=(1 << 20) + 2, bias=64), key(row=120, bias=64), key("float32")]
    assert len({k, *others}) == 5


@pytest.mark.parametrize(
    ("ptr", "row", "aligned"),
    [
        (1 << 20, 128, 256),
        ((1 << 20) + 8, 128, 8),
        (1 << 20, 97, 2),
        (1 << 20, 100, 8),
        ((1 << 20) + 2, 100, 2),
    ],
)
def test_alignment_of_pointer_and_rows(ptr: int, row: int, aligned: int) -> None:
    assert key(ptr=ptr, row=row).aligned == (aligned,) * 3


def test_sums_split_over_k_are_never_rounded_to_bfloat16(tmp_path: Path) -> None:
    """Reduction schemes: 1 in place in D's type, 2 in float32, 4 in D's type."""
    library = Library()
    lt = products(tmp_path, library)
    errors(lt, "bfloat16", 5, 16, 32, 0)
    allowed = [o["pref"][3] for o in library.objects.values() if "pref" in o]
    assert allowed == [2, 2, 3]  # y, dx bfloat16; dw float32
    assert {o["pref"][1] for o in library.objects.values() if "pref" in o} == {1 << 20}


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    lt, rng = products(tmp_path), np.random.default_rng(0)
    f, h = np.float32, bfloat16
    x, w, y, b = matrix(rng, 5, 8, f), matrix(rng, 4, 8, f), matrix(rng, 5, 4, f), array(np.zeros(4, f))
    with pytest.raises(ValueError, match="shapes"):
        lt.forward(matrix(rng, 4, 5, f), x, w, b)
    with pytest.raises(ValueError, match="shapes"):
        lt.grad_input(x, y, matrix(rng, 5, 8, f))
    with pytest.raises(ValueError, match="needs rows and columns"):
        lt.forward(matrix(rng, 0, 4, f), matrix(rng, 0, 8, f), w, b)
    with pytest.raises(ValueError, match="dtypes"):
        lt.forward(matrix(rng, 5, 4, h), x, w, b)
    with pytest.raises(ValueError, match="dtypes"):
        lt.grad_weight(matrix(rng, 4, 8, h), matrix(rng, 5, 4, h), matrix(rng, 5, 8, h))
    with pytest.raises(ValueError, match="bias"):
        lt.forward(y, x, w, array(np.zeros(4, h)))
    with pytest.raises(ValueError, match="bias"):
        lt.forward(y, x, w, array(np.zeros(8, f)[::2]))
    for bad in (
        x.host.T.copy().T,
        matrix(rng, 5, 16, f).host[:, ::2],
        np.broadcast_to(x.host[:1], (5, 8)),
        x.host[::-1],
    ):
        with pytest.raises(ValueError, match="contiguous rows"):
            lt.forward(y, array(bad), w, b)


def test_nothing_offered_names_the_product(tmp_path: Path) -> None:
    with pytest.raises(
        DeviceError, match=r"13.1.0 offers nothing for forward float32 5x16x32 .*NOT_SUPPORTED"
    ):
        errors(products(tmp_path, Library(0)), "float32", 5, 16, 32, 0)
    with pytest.raises(DeviceError, match="NOT_SUPPORTED for forward float32 5x16x32"):
        errors(products(tmp_path, Library(1, {0: "refuse"})), "float32", 5, 16, 32, 0)


# The library


def test_importable_without_cuda() -> None:
    code = "import sys; sys.modules['cupy'] = sys.modules['cuda'] = None; import apr.backends.cuda.matmul"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    "fault", [ImportError("no cuda"), RuntimeError("libcublasLt.so not found\nlong text"), OSError()]
)
def test_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    def fail(name: str) -> None:
        assert name == "cublasLt"
        raise fault

    finder = ModuleType("cuda.pathfinder")
    finder.load_nvidia_dynamic_lib = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", finder)
    with pytest.raises(DeviceError, match=r"make install GPU=cuda13") as e:
        cublaslt.version()
    assert "\n" not in str(e.value)


def test_statuses_have_names() -> None:
    assert _cublaslt.status_name(1) == "CUBLAS_STATUS_NOT_INITIALIZED (no usable GPU or driver)"
    assert _cublaslt.status_name(99) == "CUBLAS_STATUS_99"


def test_workspace_must_be_aligned(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0x210"):
        cublaslt.Products(_cublaslt.Lt(Library()), None, 528, 1 << 20, 77, cache=SimpleNamespace())


# gemm


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("flags", [(a, b) for a in (False, True) for b in (False, True)], ids=str)
def test_gemm_equals_reference(tmp_path: Path, flags: tuple[bool, bool], act: str) -> None:
    """alpha and beta are those of each call, through one plan; beta = 0 does not read out."""
    rng, lt = np.random.default_rng(0), products(tmp_path)
    m, n, k = 59, 97, 123
    a = matrix(rng, *((k, m) if flags[0] else (m, k)), act, 3)
    b = matrix(rng, *((n, k) if flags[1] else (k, n)), act)
    for alpha, beta in ((0.7, 0.3), (-1.5, 1.0), (1.0, 0.0)):
        out = matrix(rng, m, n, np.float32, 5)
        if beta == 0:
            out.host[...] = np.nan
        want = out.host.astype(np.float64)
        reference.gemm(want, *(x.host.astype(np.float64) for x in (a, b)), alpha, beta, *flags)
        lt.gemm(out, a, b, alpha, beta, *flags)
        assert not wrong(out, want, "float32"), (alpha, beta)
    assert len(lt._plans) == 1


def test_gemm_refuses_arrays_that_do_not_fit(tmp_path: Path) -> None:
    rng, lt = np.random.default_rng(0), products(tmp_path)
    out, a, b = (matrix(rng, *s, np.float32) for s in ((5, 16), (5, 8), (8, 16)))
    with pytest.raises(ValueError, match="gemm_tn: shapes"):
        lt.gemm(out, a, b, 1.0, 0.0, True, False)
