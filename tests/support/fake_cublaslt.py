"""cuBLASLt's C functions, played by NumPy on host memory, and the arrays to call them with."""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

from apr.backends import reference
from apr.backends.cuda import cublaslt as _cublaslt
from apr.backends.cuda import matmul as cublaslt
from apr.backends.cuda.autotune import Cache

DTYPES = {0: np.dtype(np.float32), 14: np.dtype(bfloat16)}
GPU, VERSION = "NVIDIA H200", "13.1.0"


def memory(pointer: int, elements: int, dtype: Any) -> np.ndarray:
    return np.frombuffer((ctypes.c_char * (elements * dtype.itemsize)).from_address(pointer), dtype)


class Library:
    """The functions of libcublasLt that are used. Algorithm i has the bytes i, i, ...; `faults` says what is
    wrong with some: "refuse" to run, "check" fails, "greedy"
    wants more than the workspace, "edge" leaves the last column of D, "nan", "beta" is 0."""

    def __init__(self, algorithms: int = 1, faults: dict[int, str] | None = None) -> None:
        self.algorithms, self.faults = algorithms, faults or {}
        self.objects: dict[int, dict[Any, Any]] = {}
        self.calls: Counter[str] = Counter()
        self.used = -1  # algorithm of the last product

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cublasLt"):
            self.calls[name] += 1
        return object.__getattribute__(self, name)

    def _make(self, made: Any, **what: Any) -> int:
        self.objects[len(self.objects) + 1] = what
        made._obj.value = len(self.objects)
        return 0

    def _put(self, handle: Any, attribute: int, value: Any, nbytes: int) -> int:
        self.objects[handle.value][attribute] = int.from_bytes(ctypes.string_at(value, nbytes), sys.byteorder)
        return 0

    def cublasLtGetVersion(self) -> int:
        return 130100

    def cublasLtCreate(self, made: Any) -> int:
        return self._make(made)

    def cublasLtMatmulDescCreate(self, made: Any, compute: int, scale: int) -> int:
        return self._make(made, compute=compute, scale=scale)

    def cublasLtMatrixLayoutCreate(self, made: Any, dtype: int, rows: int, cols: int, ld: int) -> int:
        return self._make(made, dtype=DTYPES[dtype], rows=rows, cols=cols, ld=ld)

    def cublasLtMatmulPreferenceCreate(self, made: Any) -> int:
        return self._make(made)

    def cublasLtMatmulPreferenceDestroy(self, made: Any) -> int:
        return 0

    cublasLtMatmulDescSetAttribute = cublasLtMatmulPreferenceSetAttribute = _put

    def cublasLtMatmulAlgoGetHeuristic(self, lt, desc, a, b, c, d, pref, most, results, count) -> int:
        self.objects[desc.value]["pref"] = self.objects[pref.value]
        count._obj.value = min(most, self.algorithms)
        for i in range(count._obj.value):
            results[i].algorithm[:] = [i] * 64
        return 0 if self.algorithms else 15

    def cublasLtMatmulAlgoCheck(self, lt, desc, a, b, c, d, algorithm, result) -> int:
        result._obj.workspace = 2 << 20 if self.faults.get(algorithm[0]) == "greedy" else 0
        return 15 if self.faults.get(algorithm[0]) == "check" else 0

    def _matrix(self, pointer: int, layout: Any, aligned: int) -> np.ndarray:
        """A view of memory as the column-major matrix that the layout says."""
        rows, cols, ld, dtype = (self.objects[layout.value][k] for k in ("rows", "cols", "ld", "dtype"))
        assert pointer % aligned == 0
        assert ld * dtype.itemsize % aligned == 0
        flat = memory(pointer, (cols - 1) * ld + rows, dtype)
        return np.lib.stride_tricks.as_strided(flat, (rows, cols), (dtype.itemsize, ld * dtype.itemsize))

    def cublasLtMatmul(
        self, lt, desc, alpha, a, la, b, lb, beta, c, lc, d, ld, algorithm, ws, nbytes, to
    ) -> int:
        self.used = algorithm[0]
        fault = self.faults.get(self.used)
        if fault == "refuse":
            return 15
        held = self.objects[desc.value]
        assert (held["compute"], held["scale"]) == (68, 0)  # float32 sums, no TF32
        assert (ws, nbytes, to) == (512, 1 << 20, 77)
        assert (c, lc) == (d, ld)
        aligned = [held.get("pref", {}).get(k, 1) for k in (5, 6, 8)]
        ma, mb, md = (self._matrix(*x) for x in zip((a, b, d), (la, lb, ld), aligned, strict=True))
        ma, mb = (m.T if held[k] else m for m, k in ((ma, 3), (mb, 4)))
        scale, add = (ctypes.c_float.from_address(x).value for x in (alpha, beta))
        y = scale * (ma.astype(np.float32) @ mb.astype(np.float32))
        if held.get(7) == 4:
            y += memory(held[8], len(y), md.dtype).astype(np.float32)[:, None]
        if add and fault != "beta":
            y += add * md
        if fault == "nan":
            y[0, 0] = np.nan
        n = y.shape[1] - 1 if fault == "edge" else y.shape[1]
        md[:, :n] = y[:, :n].astype(md.dtype)
        return 0


class Gpu:
    """Times from a list, by algorithm; what the real one does to arrays, on the host."""

    def __init__(self, library: Library, ms: list[float]) -> None:
        self.library, self.ms, self.is_capturing, self.timed = library, ms, False, 0

    def capturing(self) -> bool:
        return self.is_capturing

    def zero(self, d: Any) -> None:
        d.host[...] = 0

    def sample(self, d: Any) -> np.ndarray:
        return d.host.astype(np.float32).ravel()

    def milliseconds(self, run: Callable[[], Any], calls: int) -> float:
        run()
        self.timed += 1
        return self.ms[self.library.used]


def products(
    tmp_path: Path, library: Library | None = None, ms: list[float] | None = None, warn: Any = None
) -> cublaslt.Products:
    library = library or Library()
    cache = Cache(tmp_path / "cache" / "gpu.json", GPU, VERSION, warn or pytest.fail)
    return cublaslt.Products(_cublaslt.Lt(library), Gpu(library, ms or []), 512, 1 << 20, 77, cache)


def array(host: np.ndarray) -> Any:
    """What a CuPy array shows of itself."""
    at = SimpleNamespace(ptr=host.ctypes.data)
    return SimpleNamespace(host=host, data=at, shape=host.shape, strides=host.strides, dtype=host.dtype)


def matrix(rng: np.random.Generator, rows: int, cols: int, dtype: Any, pad: int = 0) -> Any:
    """Random numbers, `pad` more elements between rows, beginning 2 elements into memory when padded."""
    skip = min(pad, 2)
    return array(aligned(rng.standard_normal((rows, cols + pad)).astype(dtype))[:, skip : skip + cols])


def aligned(x: np.ndarray) -> np.ndarray:
    """A copy whose address is a multiple of 256, as on a GPU."""
    room = np.zeros(x.nbytes + 256, np.uint8)
    start = -room.ctypes.data % 256
    held = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    held[...] = x
    return held


def wrong(got: Any, want: np.ndarray, dtype: str) -> bool:
    """Half a unit in the last place of the result, and float32 sums of up to 123 terms of size 1."""
    rel = 2.0**-8 if dtype == "bfloat16" else 2.0**-23
    err = np.abs(got.host.astype(np.float64) - want)
    return not (err <= rel * np.abs(want) + 1e-4).all()


def errors(lt: cublaslt.Products, act: str, n: int, o: int, i: int, pad: int, bias: bool = True) -> list[str]:
    """Which of the three products differ from the reference's, computed in float64."""
    rng = np.random.default_rng(n + o + i)
    x, w, dy, y, dx = (matrix(rng, *s, act, pad) for s in ((n, i), (o, i), (n, o), (n, o), (n, i)))
    dw = matrix(rng, o, i, np.float32, pad)
    b = array(aligned(rng.standard_normal(o).astype(act))) if bias else None
    x64, w64, dy64, want_dw = (a.host.astype(np.float64) for a in (x, w, dy, dw))
    want_y, want_dx = np.empty((n, o)), np.empty((n, i))
    reference.linear_fwd(want_y, x64, w64, b.host.astype(np.float64) if b else None)
    begun, want_begun = matrix(rng, o, i, np.float32, pad), np.empty((o, i))
    begun.host[...] = np.nan
    reference.linear_bwd(want_dx, want_dw, None, dy64, x64, w64, True)
    reference.linear_bwd(want_dx, want_begun, None, dy64, x64, w64, False)
    lt.forward(y, x, w, b)
    lt.grad_input(dx, dy, w)
    lt.grad_weight(dw, dy, x)
    lt.grad_weight(begun, dy, x, False)
    checks = {"y": wrong(y, want_y, act), "dx": wrong(dx, want_dx, act), "dw": wrong(dw, want_dw, "float32")}
    checks["dw begun"] = wrong(begun, want_begun, "float32")
    return [name for name, bad in checks.items() if bad]
