"""The cpu backend: float32 or bfloat16, matrix products of the processor's own kind or OpenBLAS's, and Numba for the rest.

The functions, their parameters and what they compute are those of reference.py, where the formulas
stand; the loops are in kernels.py, and an op that is one kernel with the op's own arguments is not repeated here.
Plumbing that is not defined here is that of reference.py: arrays are NumPy's. In bfloat16 an op computes in float32 from
what is stored, and rounds a result once, where it is stored; kernels take arrays of either.
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
from ..contract import BF16
from ..philox import key_of, least_kept
from . import kernels, tiles
from .start import is_cached, start_threads

Array = Any

name = "cpu"
dtypes = ("float32", "bfloat16")
pad_vocab = False
loss_elements = 1 << 23
asynchronous = False
act_again = False
square_tiles = dict.fromkeys(dtypes, (kernels.CHUNK, kernels.CHUNK))
_allocated = [0]
FEW_ROWS = 8  # up to so many, linear_fwd gives a row the same bits whatever rows are beside it
_NOTHING2 = {kind: np.empty((0, 0), kind) for kind in map(np.dtype, dtypes)}
_NO_BORDERS = np.empty((0, 0), np.int32)


def empty(shape: int | tuple[int, ...], dtype: Any) -> Array:
    """A new zero-filled array that begins a line of the caches; its bytes count in memory()."""
    if dtype == BF16:
        _low()
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    room = np.zeros(size + tiles.LINE, np.uint8)
    start = -room.ctypes.data % tiles.LINE
    _allocated[0] += size
    return room[start : start + size].view(dtype).reshape(shape)


def memory() -> int:
    """Bytes handed out by empty() since the process started."""
    return _allocated[0]


def fill(x: Array, value: float) -> None:
    """See reference.py."""
    if x.flags.c_contiguous and x.dtype in _NOTHING2:
        kernels.fill(x.reshape(-1), value)
    else:
        x[...] = value


@cache
def _low() -> Any:
    """The kernels of bfloat16; compiled, or read from Numba's cache, when they are first asked for."""
    from . import low

    path = tiles.path()
    if path == "amx":
        from . import tiled

        low.products = tiled
    elif path != "float32":
        from . import products

        low.products = products
    return low


@cache
def _vectors() -> Any:
    """Products and attention of float32 in vectors of 512 bits; None where the processor has none."""
    if not tiles.has_vectors():
        return None
    from . import vectors

    return vectors


def _deep(x: Array) -> Array:
    """x with four axes: threads share the first two, the last stays last."""
    if x.ndim == 1:
        return x.reshape(1, 1, 1, -1)
    return x.reshape(*x.shape[:-1], *(1,) * (4 - x.ndim), x.shape[-1])


def _convert(y: Array, x: Array) -> None:
    convert, chunk = _low().convert, kernels.CHUNK
    if x.flags.c_contiguous and y.flags.c_contiguous and (whole := x.size // chunk):
        y, x = y.reshape(-1), x.reshape(-1)
        pieces = (z[: whole * chunk].reshape(whole, 1, 1, chunk) for z in (y, x))
        convert(*pieces)
        y, x = y[whole * chunk :], x[whole * chunk :]
    if x.size:
        convert(_deep(y), _deep(x))


def _wide(x: Array) -> Array:
    """x itself where it is float32, or a copy that is."""
    if x.dtype != BF16:
        return x
    y = np.empty(x.shape, np.float32)
    _convert(y, x)
    return y


def copy(y: Array, x: Array) -> None:
    """See reference.py."""
    if y.dtype == BF16 and x.dtype == np.float32 and y.shape == x.shape and 1 <= x.ndim <= 4:
        _convert(y, x)
    else:
        reference.copy(y, x)


def set_device(index: int) -> None:
    """Raises DeviceError for another device than 0."""
    if index != 0:
        raise DeviceError(f"backend cpu has device 0 only, not {index}")


def describe() -> dict[str, str]:
    """See reference.py."""
    threads = str(numba.get_num_threads())
    own = {"backend": name, "cpu": cpu_name(), "threads": threads, "kernels": kernels.compiled_for()}
    return own | ({"products": tiles.path()} if _low.cache_info().currsize else {})


def is_compiled(dtype: str) -> bool:
    """Say whether the kernels of a dtype are there already."""
    return dtype == "float32" or is_cached(kernels.low)


def set_threads(n: int) -> None:
    """Use n threads from now on. Raises UsageError when the process cannot have that many."""
    most = numba.config.NUMBA_NUM_THREADS
    if not 1 <= n <= most:
        raise UsageError(
            f"--threads {n}: this process can have 1 to {plural(most, 'thread')}; give --threads {most}"
        )
    start_threads(n)


def gemm(out: Array, a: Array, b: Array, alpha: float, beta: float, trans_a: bool, trans_b: bool) -> None:
    """See reference.py."""
    a, b = _wide(a), _wide(b)
    if beta in (0, 1) and (v := _vectors()) and min(out.shape) >= v.LEAST:
        v.multiply(out, a, b, alpha, beta == 1, trans_a, trans_b)
        return
    rows, cols = kernels.grid(numba.get_num_threads(), *out.shape)
    kernels.gemm(out, a, b, trans_a, trans_b, alpha, beta, rows, cols)


def _like(x: Array) -> Array:
    """x itself where it is float32, or an array to put what is not yet rounded."""
    return np.empty(x.shape, np.float32) if x.dtype == BF16 else x


def _put(x: Array, wide: Array) -> None:
    """Round what _like gave into its place."""
    if wide is not x:
        copy(x, wide)


def linear_fwd(y: Array, x: Array, w: Array, b: Array | None) -> None:
    """See reference.py."""
    few = len(x) <= FEW_ROWS
    if not few and x.dtype == BF16 and (p := _low().products):
        p.multiply(y, p.rows(x), p.columns(w), x.shape[1], b)
        return
    to = y if few else _like(y)
    if b is not None:
        kernels.fill_rows(to, _wide(b) if to is not y else b)
    if few:
        kernels.linear_few(y, x, w, b is not None)
        return
    gemm(to, x, w, 1.0, 0.0 if b is None else 1.0, False, True)
    _put(y, to)


def linear_bwd(
    dx: Array, dw: Array | None, db: Array | None, dy: Array, x: Array, w: Array, adds: bool
) -> None:
    """See reference.py."""
    if dx.dtype == BF16 and (p := _low().products):
        p.multiply(dx, p.rows(dy), p.terms(w), len(w))
        if dw is not None:
            p.multiply(dw, p.transposed(dy), p.terms(x), len(x), adds=adds)
        if db is not None:
            kernels.add_columns(db, dy)
        return
    to, wide = _like(dx), _wide(dy)
    gemm(to, wide, w, 1.0, 0.0, False, False)
    _put(dx, to)
    if dw is not None:
        gemm(dw, wide, x, 1.0, 1.0 if adds else 0.0, True, False)
    if db is not None:
        kernels.add_columns(db, dy)


def adapted(out: Array, w: Array, b: Array | None, a: Array | None, factor: float) -> None:
    """See reference.py."""
    if b is None or a is None:
        kernels.copy_rows(out, w)
        return
    to = _like(out)
    kernels.copy_rows(to, _wide(w))
    gemm(to, b, a, factor, 1.0, False, False)
    _put(out, to)


def adapted_int8(out: Array, w: Array, row: Array, b: Array | None, a: Array | None, factor: float) -> None:
    """See reference.py."""
    to = _like(out)
    kernels.from_int8(to, w, row)
    if b is not None and a is not None:
        gemm(to, b, a, factor, 1.0, False, False)
    _put(out, to)


def dropout(out: Array, x: Array, counters: Array, seed: int, module: int, p: float, factor: float) -> None:
    """See reference.py."""
    rows = out.reshape(len(x), -1), x.reshape(len(x), -1)
    kernels.dropout(*rows, counters, *key_of(seed), module, least_kept(p), factor / (1 - p))


def adapted_bwd_a(u: Array, da: Array, x: Array, du: Array, a: Array, factor: float) -> None:
    """See reference.py."""
    linear_fwd(u, x, a, None)
    gemm(da, du, x, factor, 1.0, True, False)


def adapted_bwd_b(du: Array, db: Array, dy: Array, u: Array, b: Array, factor: float) -> None:
    """See reference.py."""
    gemm(db, dy, u, factor, 1.0, True, False)
    linear_bwd(du, None, None, dy, u, b, True)


def add_rmsnorm_fwd(
    res: Array, y: Array, rstd: Array, res_in: Array, delta: Array | None, w: Array, eps: float
) -> None:
    """See reference.py."""
    kernels.add_rmsnorm_fwd(
        res, y, rstd, res_in, _NOTHING2.get(res.dtype) if delta is None else delta, w, eps, delta is not None
    )


def add_rmsnorm_bwd(dres: Array, dw: Array | None, dy: Array, res: Array, rstd: Array, w: Array) -> None:
    """See reference.py."""
    kernels.add_rmsnorm_bwd(dres, np.empty(w.shape, np.float32) if dw is None else dw, dy, res, rstd, w)


def head_rmsnorm_bwd(dx: Array, dw: Array | None, dy: Array, x: Array, rstd: Array, w: Array) -> None:
    """See reference.py."""
    kernels.head_rmsnorm_bwd(dx, np.empty(w.shape, np.float32) if dw is None else dw, dy, x, rstd, w)


def attention_fwd(
    y: Array, lse: Array, q: Array, k: Array, v: Array, doc_start: Array | None, window: int
) -> None:
    """See reference.py."""
    borders = _NO_BORDERS if doc_start is None else doc_start
    few = q.shape[1] <= FEW_ROWS
    if q.dtype == BF16 and not few and (p := _low().products):
        p.attention_fwd(y, lse, q, k, v, borders, window)
        return
    to, (q, k, v) = _like(y), map(_wide, (q, k, v))
    (kernels if few else _vectors() or kernels).attention_fwd(to, lse, q, k, v, borders, window)
    _put(y, to)


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
    few = q.shape[1] <= FEW_ROWS
    if q.dtype == BF16 and not few and (p := _low().products):
        p.attention_bwd(dq, dk, dv, dy, y, lse, q, k, v, borders, window)
        return
    to = [_like(x) for x in (dq, dk, dv)]
    dy, y, q, k, v = map(_wide, (dy, y, q, k, v))
    (kernels if few else _vectors() or kernels).attention_bwd(*to, dy, y, lse, q, k, v, borders, window)
    for x, wide in zip((dq, dk, dv), to, strict=True):
        _put(x, wide)


def cross_entropy(loss: Array, logits: Array, targets: Array, scale: float | None, z_loss: float) -> None:
    """See reference.py."""
    number = 0.0 if scale is None else float(np.asarray(scale).reshape(()))
    module = _low() if logits.dtype == BF16 else kernels
    module.cross_entropy(loss, logits, targets, number, scale is not None, z_loss)


def add_sum(total: Array, x: Array) -> None:
    """See reference.py."""
    total += kernels.joined(kernels.parts(x, False) if x.dtype == np.float32 else x)


def add_sum_sq(total: Array, x: Array) -> None:
    """See reference.py."""
    rows = x if x.ndim == 2 else (x,)
    total += [kernels.joined(kernels.parts(row, True)) for row in rows]


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
    apart = w.ctypes.data != master.ctypes.data
    numbers = lr, 1 - beta1, 1 - beta2, bias1, bias2, eps, lr * decay
    square += kernels.joined(kernels.adamw(w, apart, master, m, v, g, factor[0], *numbers))


kernels.set_blas_threads(1)
