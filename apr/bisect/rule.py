"""The tolerance rule, and what it is made from: the errors that plain NumPy makes at the same precision.

An error may be at most `factor` times that of plain NumPy on the same inputs, plus two units in the last place of the
largest true value: nothing is picked by hand. In bfloat16 the slices of an array are judged too.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..backends import overlay, reference
from ..backends.contract import BF16, OPS

Array = Any
Backend = Any  # a module, or a namespace with the functions of one
# Elements of an array or a slice whose errors are also judged together, and standard errors that chance may take.
FEWEST, SIGMAS = 4096, 6.0
# Share of the true values that errors in one direction may have, where no single element is beyond its tolerance.
SYSTEMATIC = 2.0**-11
TENSOR_CORE_TERMS = 16
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7}


def factor(op: str, output: str) -> int:
    """Of the rule: 2 for values, 3 for gradients."""
    is_gradient = op.endswith("_bwd") or ("_bwd_" in op and output.startswith("d"))
    return 3 if is_gradient or output == "logits" else 2


def tolerance(base: float, largest: float, eps: float, factor: float) -> float:
    """The rule: `factor` times the error plain NumPy makes at this precision, plus two units in the last place.

    base: that error; largest: the largest magnitude of the true values; factor: 2, for gradients 3.
    """
    return factor * base + 2 * eps * largest


def relative_tolerance(base: float, eps: float, factor: float) -> float:
    """The rule for relative(), in bfloat16: there 2 * eps of the largest value is more than many a fault."""
    return factor * base + eps / 2


def unit(kind: Any, dtype: Any, terms: int = 0) -> float:
    """The unit in the last place, of 1, by which an array of dtype `kind` is judged in a job of `dtype`.

    What is float32 in a bfloat16 job gets 16 units of float32, for functions such as exp that may be the hardware's, and one
    more for each 16 terms of a product: tensor cores add several at once and cut off what does not fit (Fasi, Higham, Mikaitis
    and Pranesh 2021, "Numerical behavior of NVIDIA tensor cores"), always towards zero, so these errors add up. On an H200,
    cuBLASLt 13 as apr calls it, 1,024 to 32,768 terms: at most 0.62 units of the largest sum for each 16 terms where all
    terms are positive, 0.21 where they are normal; less where a sum is split.
    """
    if np.dtype(dtype) != BF16:
        return float(np.finfo(dtype).eps)
    return 2.0**-7 if np.dtype(kind) == BF16 else 2.0**-19 + terms / TENSOR_CORE_TERMS * 2.0**-23


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


def systematic(got: np.ndarray, want: np.ndarray) -> float:
    """Measure the share of `want` by which `got` is off in one direction, beyond what chance explains.

    Of the whole array, and of each slice across an axis with at least FEWEST elements: the slope <e, want> / <want, want>
    and the mean of e = got - want over the root mean square of want, less SIGMAS of their standard errors; the largest,
    at least 0. Rounding to the nearest goes either way, so it gives 0; a factor on one operand does not."""
    e, w = got.astype(np.float64) - want, want.astype(np.float64)
    largest = 0.0
    for keep in (None, *range(w.ndim)):
        others = tuple(i for i in range(w.ndim) if i != keep)
        n = int(np.prod([w.shape[i] for i in others]))
        if n < FEWEST or (keep is not None and w.ndim == 1):
            continue
        power = np.square(w).mean(others)
        size = np.sqrt(power)
        chance = np.sqrt(np.square(e).mean(others) / n)
        with np.errstate(all="ignore"):
            slope = np.abs((e * w).mean(others)) / power - SIGMAS * chance / size
            shift = np.abs(e.mean(others)) / size - SIGMAS * chance / size
        # A slice of zeros has neither.
        worst = np.where(power > 0, np.maximum(slope, shift), 0.0).max()
        largest = max(largest, float(worst))
    return largest


def cancelled(op: str, name: str, low: dict[str, Any]) -> list[float]:
    """Return what float32 leaves of dp - sum_d dy*y, which is 0 where a query sees one key, in dq and in dk."""
    other = {"dq": "k", "dk": "q"}.get(name)
    if op != "attention_bwd" or other is None:
        return []
    dy, v, x = (
        float(np.sqrt(np.square(low[n].astype(np.float64)).sum(-1).max())) for n in ("dy", "v", other)
    )
    return [EPS["float32"] * dy * v * x / np.sqrt(low[other].shape[-1])]


# Plain NumPy at lower precision


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

    positions = {name: {op.parameters.index(output) for output in op.outputs} for name, op in OPS.items()}
    ops = {op: stored(getattr(be, op), written) for op, written in positions.items()}
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

    def scores(q: Any, k: Any, doc_start: Any, window: int) -> Any:
        t = np.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        j = np.arange(k.shape[1])[None]
        s = heads(q, q) @ heads(k, q).swapaxes(2, 3) * q.dtype.type(q.shape[-1] ** -0.5)
        s[..., (j > t) | ((j <= t - window) if window else False)] = -np.inf
        return (
            s if doc_start is None else np.where(j < doc_start[:, None, :, None], -np.inf, s).astype(s.dtype)
        )

    def attention_fwd(y: Any, lse: Any, q: Any, k: Any, v: Any, doc_start: Any, window: int) -> None:
        s = scores(q, k, doc_start, window)
        largest = s.max(-1, keepdims=True)
        p = np.exp(s - largest)
        total = p.sum(-1, keepdims=True)
        lse[...] = (largest + np.log(total))[..., 0]
        y[...] = (low(p) @ heads(v, q) / total).transpose(0, 2, 1, 3)

    def attention_bwd(
        dq: Any,
        dk: Any,
        dv: Any,
        dy: Any,
        y: Any,
        lse: Any,
        q: Any,
        k: Any,
        v: Any,
        doc_start: Any,
        window: int,
    ) -> None:
        p = np.exp(scores(q, k, doc_start, window) - lse[..., None])
        dp = heads(dy, q) @ heads(v, q).swapaxes(2, 3)
        ds = low(p * (dp - heads((dy * y).sum(-1, keepdims=True), q)))
        scale, (b, n, kv, d) = q.dtype.type(q.shape[-1] ** -0.5), k.shape

        def shared(x: Any) -> Any:  # (B,H,S,D) -> (B,S,K,D), summed over the query heads of a key/value head
            return x.reshape(b, kv, -1, n, d).sum(2).transpose(0, 2, 1, 3)

        dq[...] = (ds @ heads(k, q)).transpose(0, 2, 1, 3) * scale
        dk[...] = shared(ds.swapaxes(2, 3) @ heads(q, q)) * scale
        dv[...] = shared(low(p).swapaxes(2, 3) @ heads(dy, q))

    return overlay(be, attention_fwd=attention_fwd, attention_bwd=attention_bwd)


def tensor_cores() -> Backend:
    """Attention whose products have bfloat16 operands."""
    return flash(low=lambda x: x.astype(BF16).astype(x.dtype))


def plain(dtype: str) -> tuple[Backend, ...]:
    """Plain NumPy that computes a job of `dtype`, or of float32 where that is float64; two ways to do attention."""
    if dtype == "bfloat16":
        return rounded(), rounded(tensor_cores())
    return reference, flash()
