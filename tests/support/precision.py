"""The tolerance rule of apr.bisect.rule for rows of cases.py, and what spoils them."""

from __future__ import annotations

from typing import Any

import numpy as np

from apr.backends import overlay, reference
from apr.bisect.rule import (
    BF16,
    flash,
    relative,
    relative_tolerance,
    rounded,
    tensor_cores,
    tolerance,
    unit,
)
from cases import Arrays, Backend, Row, make, run

Figures = dict[str, tuple[float, float]]  # name -> (error, tolerance)


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference; NaN where either holds NaN."""
    return float(np.abs(got.astype(want.dtype) - want).max())


def figures(row: Row, dtype: Any, got: Arrays, values: Arrays, spec: Backend = reference) -> Figures:
    """(error, tolerance) of every output of a row in `dtype`, in bfloat16 also of its slices, as "NAME AXIS".

    The reference gives the true values in float64 and, in `dtype`, the error to expect; `spec` may be one
    that computes the same faster.
    """
    low, out = np.dtype(dtype) == BF16, Figures()
    want = run(spec, row, np.float64, values)
    base = run(rounded(spec) if low else spec, row, dtype, values)
    for name, true in want.items():
        eps, factor = unit(got[name].dtype, dtype), row.factor(name)
        bound = tolerance(error(base[name], true), float(np.abs(true).max()), eps, factor)
        out[name] = (error(got[name], true), bound)
        if low:
            pairs = zip(relative(got[name], true), relative(base[name], true), strict=True)
            for axis, (err, b) in enumerate(pairs):
                out[f"{name} {axis}"] = (err, relative_tolerance(b, eps, factor))
    return out


def accuracy(be: Backend, row: Row, dtype: Any, values: Arrays | None = None) -> Figures:
    """The figures of a row on a backend."""
    values = values or make(row, dtype)
    return figures(row, dtype, run(be, row, dtype, values), values)


def off(figures: Figures) -> list[str]:
    """Names whose error is not within its tolerance; NaN is not."""
    return [name for name, (err, tol) in figures.items() if not err <= tol]


def differing(a: Arrays, b: Arrays) -> list[str]:
    """Names of the arrays that are not equal bit by bit."""
    assert a.keys() == b.keys()
    return [name for name in a if a[name].tobytes() != b[name].tobytes()]


def poisoned(be: Backend, row: Row, output: str, poison: str, amount: float) -> Backend:
    """A backend in which one call of a row spoils one of its outputs."""
    call, position = row.written[output]
    op, last_arg = row.calls[call][0], row.calls[call][1][-1]

    def spoil(*args: Any) -> None:
        getattr(be, op)(*args)
        if last_arg.role == "scalar" and args[-1] != last_arg.value:
            return  # the other call of rope
        host = be.to_host(args[position])
        x = host.astype(np.result_type(host, np.float64))
        last = (-1,) * x.ndim
        if poison == "scaled":
            x *= 1 + amount
        elif poison == "last":
            x[last] += 10 * amount * np.abs(x).max()
        elif poison == "head":
            x[:, :, -1:] *= 1 + amount
        else:
            x[last] = np.nan
        be.from_host(args[position], x)

    return overlay(be, **{op: spoil})


def unseen(be: Backend, row: Row, dtype: Any, poison: str, amount: float) -> list[str]:
    """Outputs of a row that can be spoiled without being off."""
    out = []
    for name in row.written:
        found = off(accuracy(poisoned(be, row, name, poison, amount), row, dtype))
        if name not in {n.split()[0] for n in found}:
            out.append(name)
    return out


# Plain NumPy


def plain_numpy(dtype: str = "float32", orders: int = 4) -> list[Backend]:
    """The reference, and four or more that take attention's p from lse again and add up in other orders: with the axis
    that a product sums over shuffled.

    How large the error of a run is, is luck. The error to expect is the largest of them all. In bfloat16, where the order
    of a float32 sum hardly ever shows, all but the first also round p and ds, as tensor cores need it.
    """
    if dtype == "bfloat16":
        return [
            rounded(be) for be in (reference, *(_shuffled(seed, tensor_cores()) for seed in range(orders)))
        ]
    return [reference, *(_shuffled(seed, flash()) for seed in range(orders))]


def _shuffled(seed: int, be: Backend) -> Backend:
    def order(n: int) -> np.ndarray:
        return np.random.default_rng([seed, n]).permutation(n)

    def linear_fwd(y: Any, x: Any, w: Any, b: Any) -> None:
        i = order(w.shape[1])
        be.linear_fwd(y, x[:, i], w[:, i], b)

    def linear_bwd(dx: Any, dw: Any, db: Any, dy: Any, x: Any, w: Any, adds: bool) -> None:
        n, o = order(len(x)), order(len(w))
        be.linear_bwd(np.empty_like(dx), dw, db, dy[n], x[n], w, adds)
        be.linear_bwd(dx, None, None, dy[:, o], x, w[o], adds)

    def attention_fwd(y: Any, lse: Any, q: Any, k: Any, v: Any, *rest: Any) -> None:
        d = order(q.shape[-1])
        y_ = np.empty_like(y)
        be.attention_fwd(y_, lse, q[..., d], k[..., d], v[..., d], *rest)
        y[..., d] = y_

    def attention_bwd(
        dq: Any, dk: Any, dv: Any, dy: Any, y: Any, lse: Any, q: Any, k: Any, v: Any, *rest: Any
    ) -> None:
        d = order(q.shape[-1])
        out = [np.empty_like(x) for x in (dq, dk, dv)]
        dy, y, q, k, v = (x[..., d] for x in (dy, y, q, k, v))
        be.attention_bwd(*out, dy, y, lse, q, k, v, *rest)
        dq[..., d], dk[..., d], dv[..., d] = out

    ops = (linear_fwd, linear_bwd, attention_fwd, attention_bwd)
    return overlay(be, **{op.__name__: op for op in ops})
