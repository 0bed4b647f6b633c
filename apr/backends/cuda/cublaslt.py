"""libcublasLt through ctypes, and row-major arrays as it sees them.

Names, numbers and signatures: cublasLt.h of CUDA 12 and 13.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...common.errors import DeviceError

Array = Any  # cupy.ndarray, two axes, the last one contiguous

MAX_ALIGNMENT = 256  # bytes; no algorithm asks for more
ALGORITHM_BYTES = 64  # cublasLtMatmulAlgo_t, uint64_t data[8]

TYPES = {"float32": 0, "bfloat16": 14}  # cudaDataType: CUDA_R_32F, CUDA_R_16BF
COMPUTE_32F = 68
DESC_TRANSA, DESC_TRANSB, DESC_EPILOGUE, DESC_BIAS_POINTER = 3, 4, 7, 8
EPILOGUE_BIAS = 4
PREF_MAX_WORKSPACE, PREF_REDUCTIONS, PREF_ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # alignments of A, B, C, D
STATUS = {
    1: "NOT_INITIALIZED (no usable GPU or driver)",
    3: "ALLOC_FAILED",
    7: "INVALID_VALUE",
    8: "ARCH_MISMATCH",
    11: "MAPPING_ERROR",
    13: "EXECUTION_FAILED",
    14: "INTERNAL_ERROR",
    15: "NOT_SUPPORTED",
}
_P = c_void_p
_SIGNATURES = {
    "cublasLtCreate": [_P],
    "cublasLtMatmulDescCreate": [_P, c_int, c_int],
    "cublasLtMatmulDescSetAttribute": [_P, c_int, _P, c_size_t],
    "cublasLtMatrixLayoutCreate": [_P, c_int, c_uint64, c_uint64, c_int64],
    "cublasLtMatmulPreferenceCreate": [_P],
    "cublasLtMatmulPreferenceSetAttribute": [_P, c_int, _P, c_size_t],
    "cublasLtMatmulPreferenceDestroy": [_P],
    "cublasLtMatmulAlgoGetHeuristic": [_P] * 7 + [c_int, _P, _P],
    "cublasLtMatmulAlgoCheck": [_P] * 8,
    "cublasLtMatmul": [_P] * 14 + [c_size_t, _P],
}


@dataclass(frozen=True, eq=False)  # equal only to itself: hashing it is free
class Product:
    """One product: which operands are transposed, whether D is added to, whether alpha and beta differ by call."""

    name: str
    trans_a: int
    trans_b: int
    adds: bool
    scaled: bool = False


FORWARD = Product("forward", 1, 0, False)
GRAD_INPUT = Product("grad_input", 0, 0, False)
GRAD_WEIGHT = Product("grad_weight", 0, 1, True)
# by the flags of a and of b, of which b is A and a is B
GEMM = {
    (a, b): Product("gemm_" + "nt"[a] + "nt"[b], int(b), int(a), True, True)
    for a in (False, True)
    for b in (False, True)
}


class Key(NamedTuple):
    """Properties of a product that decide which algorithms can compute it. d (rows, cols), sums over inner; ld in elements,
    alignments in bytes, of pointer and rows alike; bias 0 when there is none, else its alignment."""

    op: str
    act: str
    rows: int
    cols: int
    inner: int
    lds: tuple[int, int, int]
    aligned: tuple[int, int, int]
    bias: int

    def __str__(self) -> str:
        text = f"{self.op} {self.act} {self.rows}x{self.cols}x{self.inner}"
        text += f" ld {','.join(map(str, self.lds))} align {','.join(map(str, self.aligned))}"
        return f"{text} bias {self.bias}" if self.bias else text


class Result(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algorithm", ctypes.c_ubyte * ALGORITHM_BYTES),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


class Lt:
    """A loaded libcublasLt, or what a test puts in its place, with errors raised by name."""

    def __init__(self, library: Any) -> None:
        self.library = library

    def create(self, function: str, *args: Any) -> c_void_p:
        """Call `function` and return the handle that it makes in its first parameter."""
        made = c_void_p()
        self.call(function, byref(made), *args)
        return made

    def put(self, what: str, handle: c_void_p, attribute: int, value: Any) -> None:
        """Set an attribute of a "MatmulDesc" or "MatmulPreference"; `value` has the attribute's C type."""
        self.call(f"cublasLt{what}SetAttribute", handle, attribute, byref(value), ctypes.sizeof(value))

    def call(self, function: str, *args: Any) -> None:
        """Call and check. Raises DeviceError with the name of the status."""
        status = getattr(self.library, function)(*args)
        if status:
            raise DeviceError(f"{function}: {status_name(status)}")

    def version(self) -> str:
        """Such as "13.1.0"."""
        n = int(self.library.cublasLtGetVersion())
        return f"{n // 10000}.{n // 100 % 100}.{n % 100}"


def key_of(op: Product, d: Array, a: Array, b: Array, bias: Array | None) -> Key:
    """The key of D = op(A) op(B), D with cols = rows of op(A)^T. Raises ValueError for arrays that do not fit
    the product: dtype, shape, or rows whose elements are not side by side."""
    arrays = (a, b, d)
    types = [x.dtype.name for x in arrays]
    out = "float32" if op.adds else types[0]
    if types[0] not in TYPES or types != [types[0], types[0], out]:
        raise ValueError(f"{op.name}: dtypes {types} (A, B, D) do not fit")
    if any(len(x.shape) != 2 or 0 in x.shape for x in arrays):
        raise ValueError(
            f"{op.name}: shapes {[x.shape for x in arrays]} (A, B, D): each needs rows and columns"
        )
    cols, inner = a.shape if op.trans_a else a.shape[::-1]
    rows, inner_b = b.shape[::-1] if op.trans_b else b.shape
    if d.shape != (rows, cols) or inner_b != inner:
        raise ValueError(f"{op.name}: shapes {[x.shape for x in arrays]} (A, B, D) do not fit")
    bias_aligned = 0
    if bias is not None:
        if (
            bias.shape != (cols,)
            or bias.dtype != d.dtype
            or (cols > 1 and bias.strides[0] != bias.dtype.itemsize)
        ):
            raise ValueError(f"{op.name}: bias {bias.shape} {bias.dtype.name} does not fit {d.shape} {out}")
        bias_aligned = _aligned(bias.data.ptr)
    lds = (_ld(a), _ld(b), _ld(d))
    aligned = [_aligned(x.data.ptr, ld * x.dtype.itemsize) for x, ld in zip(arrays, lds, strict=True)]
    return Key(op.name, types[0], rows, cols, inner, lds, (aligned[0], aligned[1], aligned[2]), bias_aligned)


def _ld(x: Array) -> int:
    """Elements between rows. Raises ValueError where rows overlap or their elements are apart."""
    size, (rows, cols) = x.dtype.itemsize, x.shape
    ld = x.strides[0] // size if rows > 1 else cols  # the stride of an only row means nothing
    if (cols > 1 and x.strides[1] != size) or ld < cols or (rows > 1 and x.strides[0] % size):
        raise ValueError(
            f"an array {x.shape} with strides {x.strides} bytes is not a matrix of contiguous rows"
        )
    return ld


def _aligned(*addresses: int) -> int:
    """The largest power of two that divides all of them, at most MAX_ALIGNMENT."""
    return min(min(x & -x, MAX_ALIGNMENT) for x in addresses)


def status_name(status: int) -> str:
    """cublasStatus_t in words."""
    return f"CUBLAS_STATUS_{STATUS.get(status, status)}"


def load() -> Lt:
    """libcublasLt, with the signatures of the functions used. Raises DeviceError when it is not there."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        library = ctypes.CDLL(load_nvidia_dynamic_lib("cublasLt").abs_path)
    except (ImportError, RuntimeError, OSError) as e:
        raise DeviceError(
            "cuBLASLt (libcublasLt) is not installed: make install GPU=cuda13 for a driver of CUDA 13, "
            f"GPU=cuda12 for one of CUDA 12 ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})"
        ) from e
    for function, types in _SIGNATURES.items():
        getattr(library, function).argtypes = types
    library.cublasLtGetVersion.restype = c_size_t
    return Lt(library)
