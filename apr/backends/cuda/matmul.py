"""Matrix products on NVIDIA GPUs: cublasLtMatmul called through ctypes.

cuBLASLt counts in columns. A row-major array (R,C) with `ld` elements between rows is to it a matrix of
C rows and R columns with leading dimension ld, so each product is asked for transposed, D^T = op(A) op(B):

| product     | row-major        | A | op | B  | op | m | n | k |
|-------------|------------------|---|----|----|----|---|---|---|
| forward     | y = x w^T + b    | w | T  | x  | N  | O | N | I |
| grad_input  | dx = dy w        | w | N  | dy | N  | I | N | O |
| grad_weight | dw += dy^T x, or = | x | N | dy | T | I | O | N |
| gemm        | out = alpha op(a) op(b) + beta out | b | its flag | a | its flag | N | M | K |

Sums are in float32 (CUBLAS_COMPUTE_32F: no TF32), alpha and beta are float32. A bfloat16 result is rounded
once: a sum that is split over k is put together in float32.

Importable without a GPU, CuPy and CUDA's libraries.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import byref, c_float, c_int, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...common.errors import DeviceError
from .autotune import Algorithm, Cache, SearchGpu, cache_file, digest, fastest, same, time_all
from .cublaslt import (
    COMPUTE_32F,
    DESC_BIAS_POINTER,
    DESC_EPILOGUE,
    DESC_TRANSA,
    DESC_TRANSB,
    EPILOGUE_BIAS,
    FORWARD,
    GEMM,
    GRAD_INPUT,
    GRAD_WEIGHT,
    MAX_ALIGNMENT,
    PREF_ALIGNMENTS,
    PREF_MAX_WORKSPACE,
    PREF_REDUCTIONS,
    TYPES,
    Array,
    Key,
    Lt,
    Product,
    Result,
    key_of,
    load,
    status_name,
)

WORKSPACE_BYTES = 64 << 20  # what open() should be given: room for sums split over k
CANDIDATES = 24  # algorithms asked for in a search
ROUNDING = {"float32": 2.0**-10, "bfloat16": 2.0**-7}  # relative; for float32 the order of a long sum
# How a sum split over k may be put together, by the type of D: INPLACE (1) in that type, COMPUTE_TYPE (2) in
# float32.
REDUCTIONS = {"float32": 1 | 2, "bfloat16": 2}
_ONE, _ZERO = c_float(1.0), c_float(0.0)  # alpha and beta, read by the host part of each call
_ONE_AT, _ZERO_AT = ctypes.addressof(_ONE), ctypes.addressof(_ZERO)


@dataclass(slots=True, eq=False)
class ProductPlan:
    """A product ready to be called: cuBLASLt's descriptors, and the algorithm in use."""

    key: Key
    out: str  # dtype of D
    desc: c_void_p
    a: c_void_p
    b: c_void_p
    d: c_void_p
    alpha: int  # addresses of their values
    beta: int
    bias: int = 0  # address that desc holds
    algorithm: Algorithm | None = None
    chosen: bytes = b""  # the algorithm as cuBLASLt reads it
    by: str = ""  # heuristic, cache or search

    def use(self, algorithm: Algorithm, by: str) -> None:
        """Compute with this algorithm from now on."""
        self.algorithm, self.chosen, self.by = algorithm, algorithm.data, by


class Products:
    """The matrix products on one GPU and one stream. open() makes it."""

    def __init__(self, lt: Lt, gpu: Any, workspace: int, nbytes: int, stream: int, cache: Cache) -> None:
        if workspace % MAX_ALIGNMENT:
            raise ValueError(f"workspace at {workspace:#x} is not a multiple of {MAX_ALIGNMENT} bytes")
        self._lt, self._gpu, self._cache = lt, gpu, cache
        self._handle, self._nbytes = lt.create("cublasLtCreate").value, nbytes
        self._context = self._handle, workspace, nbytes, stream
        self._matmul = lt.library.cublasLtMatmul
        self._plans: dict[Key, ProductPlan] = {}
        self._ready: dict[tuple[Any, ...], ProductPlan] = {}
        self._alpha, self._beta = c_float(), c_float()  # of gemm
        self._tuning, self._tuned = False, set[Key]()
        self._progress: Callable[[str], None] | None = None

    def forward(self, y: Array, x: Array, w: Array, b: Array | None) -> None:
        """y = x w^T + b.  y (N,O), x (N,I), w (O,I), b (O,) or None; one dtype, the bias's too"""
        self._multiply(FORWARD, y, w, x, b)

    def grad_input(self, dx: Array, dy: Array, w: Array) -> None:
        """dx = dy w.  dx (N,I), dy (N,O), w (O,I); one dtype"""
        self._multiply(GRAD_INPUT, dx, w, dy, None)

    def grad_weight(self, dw: Array, dy: Array, x: Array, adds: bool = True) -> None:
        """dw += dy^T x, or = where adds is False, by the same algorithm.  dw (O,I) float32, dy (N,O), x (N,I) of one dtype"""
        self._multiply(GRAD_WEIGHT, dw, x, dy, None, 0 if adds else _ZERO_AT)

    def gemm(
        self, out: Array, a: Array, b: Array, alpha: float, beta: float, trans_a: bool, trans_b: bool
    ) -> None:
        """out = alpha op(a) op(b) + beta out.  out (M,N) float32, op(a) (M,K), op(b) (K,N) of one dtype"""
        self._alpha.value, self._beta.value = alpha, beta
        self._multiply(GEMM[trans_a, trans_b], out, b, a, None)

    @contextmanager
    def tuning(self, progress: Callable[[str], None] | None = None) -> Iterator[None]:
        """While the block runs, the first use of each product times up to 24 algorithms on the arrays of that
        call and keeps the fastest; `progress` gets a line for each. What is found goes to the cache on disk.

        The arrays should hold numbers of a real step: products of zeros run faster. A grad_weight that is
        searched overwrites dw, so zero the gradients afterwards. Under stream capture nothing is searched.
        """
        self._ready.clear()
        self._cache.look_again()
        self._tuned = set()
        self._tuning, self._progress = True, progress
        try:
            yield
        finally:
            self._tuning, self._progress = False, None
            self._cache.save()

    def digest(self, tuned: bool = False) -> str:
        """sha256 of the algorithms in use so far, or of those of the last `tuning`. Two runs can be bit-equal only where it is
        equal."""
        plans = self._plans.values()
        return digest(
            {str(p.key): p.algorithm for p in plans if p.algorithm and (not tuned or p.key in self._tuned)}
        )

    def table(self) -> list[tuple[str, float, float]]:
        """(key, ms, TFLOP/s) of each product in use whose algorithm was measured, in the order of first use."""
        rows = []
        for p in self._plans.values():
            if p.algorithm and p.algorithm.ms:
                flops = 2 * p.key.rows * p.key.cols * p.key.inner
                rows.append((str(p.key), p.algorithm.ms, flops / p.algorithm.ms / 1e9))
        return rows

    def _multiply(self, op: Product, d: Array, a: Array, b: Array, bias: Array | None, beta: int = 0) -> None:
        """D = op(A) op(B), with beta at that address instead of the plan's."""
        at_d, at_a, at_b = d.data.ptr, a.data.ptr, b.data.ptr
        seen = (
            op,
            (d.shape, d.strides, d.dtype, at_d & 255),
            (a.shape, a.strides, a.dtype, at_a & 255),
            (b.shape, b.strides, b.dtype, at_b & 255),
            None if bias is None else (bias.shape, bias.strides, bias.dtype, bias.data.ptr & 255),
        )
        plan = self._ready.get(seen)
        if plan is None:
            plan = self._ready[seen] = self._plan(op, d, a, b, bias)
        if bias is not None:
            self._set_bias(plan, bias.data.ptr)
        status = self._run(plan, at_d, at_a, at_b, beta)
        if status:
            raise DeviceError(f"cublasLtMatmul: {status_name(status)} for {plan.key}")

    def _run(self, p: ProductPlan, d: int, a: int, b: int, beta: int = 0) -> int:
        lt, ws, nbytes, to = self._context
        return self._matmul(
            lt, p.desc, p.alpha, a, p.a, b, p.b, beta or p.beta, d, p.d, d, p.d, p.chosen, ws, nbytes, to
        )

    def _plan(self, op: Product, d: Array, a: Array, b: Array, bias: Array | None) -> ProductPlan:
        """The plan for these arrays, with an algorithm: found by a search, remembered, or the heuristic's."""
        key = key_of(op, d, a, b, bias)
        plan = self._plans.get(key)
        if self._tuning:
            self._tuned.add(key)
        if plan is None:
            plan = self._describe(op, key, d, a, b)
        if bias is not None:  # before the heuristic, which looks at its alignment
            self._set_bias(plan, bias.data.ptr)
        # Algorithms that others have searched must not change products that are not tuned.
        if plan.algorithm is None and self._tuning:
            known = self._cache.get(str(key))
            if known and self._accepts(plan, known):
                plan.use(known, "cache")
        if self._tuning and plan.by in ("", "heuristic") and not self._gpu.capturing():
            self._search(plan, d, a, b)
        elif plan.algorithm is None:
            plan.use(self._candidates(plan, 1)[0], "heuristic")
        self._plans[key] = plan
        return plan

    def _describe(self, op: Product, key: Key, d: Array, a: Array, b: Array) -> ProductPlan:
        desc = self._lt.create("cublasLtMatmulDescCreate", COMPUTE_32F, TYPES["float32"])
        la, lb, ld = (
            self._lt.create("cublasLtMatrixLayoutCreate", TYPES[x.dtype.name], x.shape[1], x.shape[0], ld)
            for x, ld in zip((a, b, d), key.lds, strict=True)
        )
        alpha, beta = _ONE_AT, _ONE_AT if op.adds else _ZERO_AT
        if op.scaled:
            alpha, beta = ctypes.addressof(self._alpha), ctypes.addressof(self._beta)
        plan = ProductPlan(key, d.dtype.name, desc, la, lb, ld, alpha, beta)
        self._lt.put("MatmulDesc", desc, DESC_TRANSA, c_int(op.trans_a))
        self._lt.put("MatmulDesc", desc, DESC_TRANSB, c_int(op.trans_b))
        if key.bias:
            self._lt.put("MatmulDesc", desc, DESC_EPILOGUE, c_uint32(EPILOGUE_BIAS))
        return plan

    def _candidates(self, p: ProductPlan, most: int) -> list[Algorithm]:
        """Up to `most` algorithms, the heuristic's favourite first. Raises DeviceError if there is none."""
        pref = self._lt.create("cublasLtMatmulPreferenceCreate")
        self._lt.put("MatmulPreference", pref, PREF_MAX_WORKSPACE, c_uint64(self._nbytes))
        self._lt.put("MatmulPreference", pref, PREF_REDUCTIONS, c_uint32(REDUCTIONS[p.out]))
        a, b, d = p.key.aligned
        for attribute, nbytes in zip(PREF_ALIGNMENTS, (a, b, d, d), strict=True):
            self._lt.put("MatmulPreference", pref, attribute, c_uint32(nbytes))
        results, count = (Result * most)(), c_int()
        status = self._lt.library.cublasLtMatmulAlgoGetHeuristic(
            self._handle, p.desc, p.a, p.b, p.d, p.d, pref, most, results, byref(count)
        )
        self._lt.call("cublasLtMatmulPreferenceDestroy", pref)
        found = [Algorithm(bytes(r.algorithm), r.workspace) for r in results[: count.value] if r.state == 0]
        if status or not found:
            why = status_name(status) if status else "no algorithm"
            raise DeviceError(
                f"cuBLASLt {self._lt.version()} offers nothing for {p.key} ({why}); "
                "sizes and strides that are multiples of 8 are always served"
            )
        return found

    def _accepts(self, p: ProductPlan, algorithm: Algorithm) -> bool:
        """Tell whether a remembered algorithm can run here."""
        result = Result()
        status = self._lt.library.cublasLtMatmulAlgoCheck(
            self._handle, p.desc, p.a, p.b, p.d, p.d, algorithm.data, byref(result)
        )
        return status == 0 and result.state == 0 and result.workspace <= self._nbytes

    def _search(self, p: ProductPlan, d: Array, a: Array, b: Array) -> None:
        """Time the candidates on these arrays and use the fastest whose result is the first one's."""
        at = d.data.ptr, a.data.ptr, b.data.ptr

        def run(algorithm: Algorithm) -> int:
            p.chosen = algorithm.data
            return self._run(p, *at)

        def result(algorithm: Algorithm) -> np.ndarray:
            self._gpu.zero(d)  # an algorithm that leaves parts of d unwritten must not look right
            for _ in range(1 if p.beta == _ZERO_AT else 2):  # twice: beta = 1 must show
                run(algorithm)
            return self._gpu.sample(d)

        offered = self._candidates(p, CANDIDATES)
        runnable = [x for x in offered if run(x) == 0]  # this first run also loads the kernel
        if not runnable:
            raise DeviceError(f"cublasLtMatmul refuses all algorithms that cuBLASLt offers for {p.key}")
        ms = time_all([functools.partial(run, x) for x in runnable], self._gpu.milliseconds)
        first: list[np.ndarray] = []

        def right(i: int) -> bool:
            if not first:
                first.append(result(runnable[0]))
            return same(result(runnable[i]), first[0], ROUNDING[p.out])

        best = fastest(ms, right)
        chosen = Algorithm(runnable[best].data, runnable[best].workspace, ms[best])
        p.use(chosen, "search")
        self._cache.put(str(p.key), chosen)
        self._gpu.zero(d)
        if self._progress:
            self._progress(f"{p.key}: {ms[0]:.4f} -> {ms[best]:.4f} ms, {len(ms)} algorithms")

    def _set_bias(self, p: ProductPlan, pointer: int) -> None:
        if pointer != p.bias:
            self._lt.put("MatmulDesc", p.desc, DESC_BIAS_POINTER, c_void_p(pointer))
            p.bias = pointer


def version() -> str:
    """Version of cuBLASLt, such as "13.1.0". Raises DeviceError when it is not installed."""
    return load().version()


def open(device: int, workspace: int, nbytes: int, stream: int) -> Products:
    """The products on GPU `device` and the stream at address `stream`, both of them CuPy's current ones.

    `workspace` is the address of `nbytes` bytes (WORKSPACE_BYTES) that belong to the products alone.
    Raises DeviceError when cuBLASLt is missing or finds no GPU.
    """
    lt, gpu = load(), SearchGpu(device, stream)
    made_for = gpu.name, lt.version()
    return Products(lt, gpu, workspace, nbytes, stream, Cache(cache_file(*made_for), *made_for))
