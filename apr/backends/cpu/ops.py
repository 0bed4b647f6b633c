"""The cpu backend: float32, OpenBLAS for matrix products and Numba for the rest.

The functions, their parameters and what they compute are those of reference.py, where the formulas
stand; the loops are in kernels.py, and an op that is one kernel with the op's own arguments is not repeated here.
Plumbing that is not defined here is that of reference.py: arrays are NumPy's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

from ...common.errors import DeviceError, UsageError
from ...common.host import cpu_name
from ...common.units import plural
from .. import reference
from . import kernels
from .start import start_threads

Array = Any

name = "cpu"
dtypes = ("float32",)
pad_vocab = False
loss_elements = 1 << 23
asynchronous = False
act_again = False
square_tiles = {"float32": (kernels.CHUNK, kernels.CHUNK)}
_allocated = [0]
FEW_ROWS = 8  # up to so many, linear_fwd gives a row the same bits whatever rows are beside it
_NOTHING = np.empty(0, np.float32)
_NOTHING2 = np.empty((0, 0), np.float32)
_NO_BORDERS = np.empty((0, 0), np.int32)


def empty(shape: int | tuple[int, ...], dtype: Any) -> Array:
    """A new zero-filled array; its bytes count in memory()."""
    x = np.zeros(shape, dtype)
    _allocated[0] += x.nbytes
    return x


def memory() -> int:
    """Bytes handed out by empty() since the process started."""
    return _allocated[0]


def fill(x: Array, value: float) -> None:
    """See reference.py."""
    if x.flags.c_contiguous and x.dtype == np.float32:
        kernels.fill(x.reshape(-1), value)
    else:
        x[...] = value


def set_device(index: int) -> None:
    """Raises DeviceError for another device than 0."""
    if index != 0:
        raise DeviceError(f"backend cpu has device 0 only, not {index}")


def describe() -> dict[str, str]:
    """See reference.py."""
    threads = str(numba.get_num_threads())
    return {"backend": name, "cpu": cpu_name(), "threads": threads, "kernels": kernels.compiled_for()}


def set_threads(n: int) -> None:
    """Use n threads from now on. Raises UsageError when the process cannot have that many."""
    most = numba.config.NUMBA_NUM_THREADS
    if not 1 <= n <= most:
        raise UsageError(
            f"--threads {n}: this process can have 1 to {plural(most, 'thread')}; give --threads {most}"
        )
    start_threads(n)


@cache
def _grid(parts: int, m: int, n: int) -> tuple[int, int]:
    """Cut an (m,n) product for `parts` threads: the grid that packs the fewest rows and columns."""
    pairs = [(r, parts // r) for r in range(1, parts + 1) if parts % r == 0]
    return min(pairs, key=lambda rc: (rc[1] * m + rc[0] * n, rc))


def gemm(out: Array, a: Array, b: Array, alpha: float, beta: float, trans_a: bool, trans_b: bool) -> None:
    """See reference.py."""
    rows, cols = _grid(numba.get_num_threads(), *out.shape)
    kernels.gemm(out, a, b, trans_a, trans_b, alpha, beta, rows, cols)


def linear_fwd(y: Array, x: Array, w: Array, b: Array | None) -> None:
    """See reference.py."""
    if b is not None:
        kernels.fill_rows(y, b)
    if len(x) <= FEW_ROWS:
        kernels.linear_few(y, x, w, b is not None)
    else:
        gemm(y, x, w, 1.0, 0.0 if b is None else 1.0, False, True)


def linear_bwd(
    dx: Array, dw: Array | None, db: Array | None, dy: Array, x: Array, w: Array, adds: bool
) -> None:
    """See reference.py."""
    gemm(dx, dy, w, 1.0, 0.0, False, False)
    if dw is not None:
        gemm(dw, dy, x, 1.0, 1.0 if adds else 0.0, True, False)
    if db is not None:
        kernels.add_columns(db, dy)


def adapted(out: Array, w: Array, b: Array | None, a: Array | None, factor: float) -> None:
    """See reference.py."""
    kernels.copy_rows(out, w)
    if b is not None and a is not None:
        gemm(out, b, a, factor, 1.0, False, False)


def adapted_int8(out: Array, w: Array, row: Array, b: Array | None, a: Array | None, factor: float) -> None:
    """See reference.py."""
    kernels.from_int8(out, w, row)
    if b is not None and a is not None:
        gemm(out, b, a, factor, 1.0, False, False)


def add_rmsnorm_fwd(
    res: Array, y: Array, rstd: Array, res_in: Array, delta: Array | None, w: Array, eps: float
) -> None:
    """See reference.py."""
    kernels.add_rmsnorm_fwd(
        res, y, rstd, res_in, _NOTHING2 if delta is None else delta, w, eps, delta is not None
    )


def add_rmsnorm_bwd(dres: Array, dw: Array | None, dy: Array, res: Array, rstd: Array, w: Array) -> None:
    """See reference.py."""
    kernels.add_rmsnorm_bwd(dres, np.empty_like(w) if dw is None else dw, dy, res, rstd, w)


def head_rmsnorm_bwd(dx: Array, dw: Array | None, dy: Array, x: Array, rstd: Array, w: Array) -> None:
    """See reference.py."""
    kernels.head_rmsnorm_bwd(dx, np.empty_like(w) if dw is None else dw, dy, x, rstd, w)


def attention_fwd(
    y: Array, lse: Array, q: Array, k: Array, v: Array, doc_start: Array | None, window: int
) -> None:
    """See reference.py."""
    kernels.attention_fwd(y, lse, q, k, v, _NO_BORDERS if doc_start is None else doc_start, window)


def attention_bwd(
    dq: Array,
    dk: Array,
    dv: Array,
    dy: Array,
    y: Array,
    lse: Array,
    q: Array,
    k: Array,
    v: Array,
    doc_start: Array | None,
    window: int,
) -> None:
    """See reference.py."""
    borders = _NO_BORDERS if doc_start is None else doc_start
    kernels.attention_bwd(dq, dk, dv, dy, y, lse, q, k, v, borders, window)


def cross_entropy(loss: Array, logits: Array, targets: Array, scale: float | None, z_loss: float) -> None:
    """See reference.py."""
    number = 0.0 if scale is None else float(np.asarray(scale).reshape(()))
    kernels.cross_entropy(loss, logits, targets, number, scale is not None, z_loss)


def add_sum(total: Array, x: Array) -> None:
    """See reference.py."""
    total += kernels.total(x, False) if x.dtype == np.float32 else np.add.accumulate(x)[-1]


def add_sum_sq(total: Array, x: Array) -> None:
    """See reference.py."""
    total += [kernels.total(row, True) for row in x] if x.ndim == 2 else kernels.total(x, True)


clip_factor = reference.clip_factor  # of one number


def adamw(
    w: Array,
    master: Array,
    m: Array,
    v: Array,
    square: Array,
    g: Array,
    factor: Array,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    step: int,
) -> None:
    """See reference.py."""
    bias1, bias2 = 1 / (1 - beta1**step), 1 / (1 - beta2**step)
    kernels.adamw(master, m, v, g, factor[0], lr, 1 - beta1, 1 - beta2, bias1, bias2, eps, lr * decay)
    if w.ctypes.data != master.ctypes.data:
        reference.copy(w, master)
    add_sum_sq(square, master)


kernels.set_blas_threads(1)
