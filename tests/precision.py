"""The tolerance rule, and what it is made from: the errors of plain NumPy at the same precision."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from apr.backends import reference
from cases import BF16, CASES, WRITTEN, Arrays, Backend, Row, make, overlay, rows, run

Figures = dict[str, tuple[float, float]]  # name -> (error, tolerance)


def tolerance(base: float, largest: float, eps: float, factor: float) -> float:
    """The rule: `factor` times the error plain NumPy makes at this precision, plus two units in the last place.

    base: that error; largest: the largest magnitude of the true values; factor: 2, for gradients 3.
    """
    return factor * base + 2 * eps * largest


def relative_tolerance(base: float, eps: float, factor: float) -> float:
    """The rule for relative(), in bfloat16: there 2 * eps of the largest value is more than many a fault."""
    return factor * base + eps / 2


def unit(kind: Any, dtype: Any) -> float:
    """The unit in the last place, of 1, by which an array of dtype `kind` is judged in a row of `dtype`.

    What is float32 in a bfloat16 row gets 16 units of float32: tensor cores cut off what they add, and
    functions such as exp may be the hardware's.
    """
    if np.dtype(dtype) != BF16:
        return float(np.finfo(dtype).eps)
    return 2.0**-7 if np.dtype(kind) == BF16 else 2.0**-19


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference; NaN where either holds NaN."""
    return float(np.abs(got.astype(want.dtype) - want).max())


def relative(got: np.ndarray, want: np.ndarray) -> list[float]:
    """For each axis, the largest ||got - want|| / ||want|| of the slices across it, of a row, a column, a head; NaN
    where either holds NaN. A slice that is smaller than the others on average is measured by their average.
    """
    wrong, true = np.square(got.astype(np.float64) - want), np.square(want.astype(np.float64))
    mean = true.mean()
    if mean == 0:
        return [np.inf if wrong.any() else 0.0] * true.ndim
    out = []
    for axis in range(true.ndim):
        others = tuple(i for i in range(true.ndim) if i != axis)
        out.append(float(np.sqrt((wrong.mean(others) / np.maximum(true.mean(others), mean)).max())))
    return out


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

WRITES: dict[str, set[int]] = {}  # op -> positions of the arguments that it writes
for _op, _args in (call for case in CASES for call in rows(case)[0].calls):
    WRITES.setdefault(_op, set()).update(i for i, a in enumerate(_args) if a.role in WRITTEN)


def rounded(be: Backend = reference) -> SimpleNamespace:
    """A backend that stores bfloat16: an op is that of `be` in float32 on the values that are stored, and what it
    writes is rounded to where it is stored. The residual stream is rounded before it is normalised."""

    def stored(op: Callable[..., None], written: set[int]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            wide = [a.astype(np.float32) if getattr(a, "dtype", None) == BF16 else a for a in args]
            op(*wide)
            for i in written:
                if wide[i] is not args[i]:
                    args[i][...] = wide[i]

        return call

    ops = {op: stored(getattr(be, op), written) for op, written in WRITES.items()}
    norm = ops["add_rmsnorm_fwd"]

    def add_rmsnorm_fwd(res: Any, y: Any, rstd: Any, res_in: Any, delta: Any, w: Any, eps: float) -> None:
        if delta is not None and res.dtype == BF16:
            res[...] = res_in.astype(np.float32) + delta.astype(np.float32)
            res_in, delta = res, None
        norm(res, y, rstd, res_in, delta, w, eps)

    return overlay(
        be, **{**ops, "add_rmsnorm_fwd": add_rmsnorm_fwd}, name="rounded", dtypes=("bfloat16", *be.dtypes)
    )


def flash(be: Backend = reference, low: Callable[[Any], Any] = lambda x: x) -> SimpleNamespace:
    """A backend with attention as kernels compute it: p without its divisor, and again from lse in backward. As matrix
    products, which makes it fast; `low` rounds their operands p and ds."""

    def heads(x: Any, q: Any) -> Any:  # (B,S,K,D) -> (B,H,S,D)
        return np.repeat(x, q.shape[2] // x.shape[2], axis=2).transpose(0, 2, 1, 3)

    def scores(q: Any, k: Any, window: int) -> Any:
        t = np.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        j = np.arange(k.shape[1])[None]
        s = heads(q, q) @ heads(k, q).swapaxes(2, 3) * q.dtype.type(q.shape[-1] ** -0.5)
        s[..., (j > t) | ((j <= t - window) if window else False)] = -np.inf
        return s

    def attention_fwd(y: Any, lse: Any, q: Any, k: Any, v: Any, window: int) -> None:
        s = scores(q, k, window)
        largest = s.max(-1, keepdims=True)
        p = np.exp(s - largest)
        total = p.sum(-1, keepdims=True)
        lse[...] = (largest + np.log(total))[..., 0]
        y[...] = (low(p) @ heads(v, q) / total).transpose(0, 2, 1, 3)

    def attention_bwd(
        dq: Any, dk: Any, dv: Any, dy: Any, y: Any, lse: Any, q: Any, k: Any, v: Any, window: int
    ) -> None:
        p = np.exp(scores(q, k, window) - lse[..., None])
        dp = heads(dy, q) @ heads(v, q).swapaxes(2, 3)
        ds = low(p * (dp - heads((dy * y).sum(-1, keepdims=True), q)))
        scale, (b, n, kv, d) = q.dtype.type(q.shape[-1] ** -0.5), k.shape

        def shared(x: Any) -> Any:  # (B,H,S,D) -> (B,S,K,D), summed over the query heads of a key/value head
            return x.reshape(b, kv, -1, n, d).sum(2).transpose(0, 2, 1, 3)

        dq[...] = (ds @ heads(k, q)).transpose(0, 2, 1, 3) * scale
        dk[...] = shared(ds.swapaxes(2, 3) @ heads(q, q)) * scale
        dv[...] = shared(low(p).swapaxes(2, 3) @ heads(dy, q))

    return overlay(be, attention_fwd=attention_fwd, attention_bwd=attention_bwd)


def plain_numpy(dtype: str = "float32") -> list[Backend]:
    """The reference, and four that take attention's p from lse again and add up in other orders: with the axis that a
    product sums over shuffled.

    How large the error of a run is, is luck, the more so after ten steps of AdamW, which amplify the rounding of the
    first. The error to expect is the largest of these five. In bfloat16, where the order of a float32 sum hardly ever
    shows, the four also round p and ds, as tensor cores need it.
    """
    if dtype == "bfloat16":
        return [rounded(be) for be in (reference, *(_shuffled(seed, tensor_cores()) for seed in range(4)))]
    return [reference, *(_shuffled(seed, flash()) for seed in range(4))]


def tensor_cores() -> Backend:
    """Attention whose products have bfloat16 operands."""
    return flash(low=lambda x: x.astype(BF16).astype(x.dtype))


def _shuffled(seed: int, be: Backend) -> Backend:
    def order(n: int) -> np.ndarray:
        return np.random.default_rng([seed, n]).permutation(n)

    def linear_fwd(y: Any, x: Any, w: Any, b: Any) -> None:
        i = order(w.shape[1])
        be.linear_fwd(y, x[:, i], w[:, i], b)

    def linear_bwd(dx: Any, dw: Any, db: Any, dy: Any, x: Any, w: Any) -> None:
        n, o = order(len(x)), order(len(w))
        be.linear_bwd(np.empty_like(dx), dw, db, dy[n], x[n], w)
        be.linear_bwd(dx, None, None, dy[:, o], x, w[o])

    def attention_fwd(y: Any, lse: Any, q: Any, k: Any, v: Any, window: int) -> None:
        d = order(q.shape[-1])
        y_ = np.empty_like(y)
        be.attention_fwd(y_, lse, q[..., d], k[..., d], v[..., d], window)
        y[..., d] = y_

    def attention_bwd(
        dq: Any, dk: Any, dv: Any, dy: Any, y: Any, lse: Any, q: Any, k: Any, v: Any, window: int
    ) -> None:
        d = order(q.shape[-1])
        out = [np.empty_like(x) for x in (dq, dk, dv)]
        dy, y, q, k, v = (x[..., d] for x in (dy, y, q, k, v))
        be.attention_bwd(*out, dy, y, lse, q, k, v, window)
        dq[..., d], dk[..., d], dv[..., d] = out

    ops = (linear_fwd, linear_bwd, attention_fwd, attention_bwd)
    return overlay(be, **{op.__name__: op for op in ops})
