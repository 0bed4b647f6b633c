"""Explain a wrong array in words: the cause of causes.py that gives what was got, or the part of the array that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..backends.contract import OPS
from ..common.units import plural
from .causes import BWD, CAUSES, FWD, Array, WrongCall, least_squares

LIMIT = 1 << 21  # elements of the largest array that an op is computed again with; larger ones are cropped


# The search


def explain(op: str, output: str, got: np.ndarray, want: np.ndarray, args: dict[str, Any], tol: float) -> str:
    """Likely cause in one short phrase, "" when nothing is known.

    op: of reference.py. output: the parameter of it that was wrong. got, want (float64): what it was and what it
    should be. args: all parameters as they were before the call. tol: largest error of an element that is no fault.
    """
    if got.size == 0 or got.shape != want.shape:
        return ""
    with np.errstate(all="ignore"):
        names = _axes(op, output, got.ndim)
        return (
            _search(op, output, got, want, args, tol)
            or _not_finite(got, args.get(output))
            or _where(got, want, tol, names)
        )


def explain_parameter(
    name: str, got: np.ndarray, want: np.ndarray, others: Mapping[str, np.ndarray] | None = None
) -> str:
    """Likely cause for a parameter that is not what was sent; others: what was sent as the other parameters."""
    if got.size == 0 or got.shape != want.shape:
        return ""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    with np.errstate(all="ignore"):
        found = _search("parameter", name, got, want, {}, 0.0, others=others or {})
        return found or _not_finite(got, None) or _where(got, want, 0.0, _axes("parameter", "w", got.ndim))


def _search(
    op: str, output: str, got: Array, want: Array, args: dict[str, Any], tol: float, **more: Any
) -> str:
    """The words of the row that explains best, of those that do about equally well the first."""
    args, got, want = _cropped(op, output, got, want, args)
    fits = _work(args) <= LIMIT
    a = WrongCall(**{**args, "args": args, "op": op, "output": output, "got": got, "want": want, **more})
    a.before = args.get(output)
    best, words = 3.0, ""
    for cause in CAUSES:
        if not cause.applies(op, output) or not (fits or cause.ops in ("*", "parameter")):
            continue
        try:
            fault = cause.fault(a)
        except (ValueError, TypeError, LookupError, AttributeError):
            # shapes that rule the fault out (a weight that is not square), a None, an argument that is not given
            continue
        fault, values = (fault[0], fault[1:]) if isinstance(fault, tuple) else (fault, ())
        left = max(_left(fault, got, want, tol), 1e-3)
        if left < min(1, best / 3):  # a fitted number explains noise too: the rows before it are simpler
            best, words = left, cause.words.format(*values)
        if best <= 1e-3:
            break
    return words


def _left(fault: Any, got: Array, want: Array, tol: float) -> float:
    """The part of the error that a fault leaves unexplained; 1 for too much."""
    if not isinstance(fault, np.ndarray) or fault.shape != got.shape:
        return 1.0
    says = np.isfinite(fault)
    if 2 * says.sum() < says.size or not says.any():
        return 1.0
    error, left = (float(np.abs(got - x)[says].max()) for x in (want, fault))
    if not (error > 0 and left < np.inf):
        return 1.0
    enough, within = (1e-3, 1 / 20) if got.size < 8 else (1 / 20, 1 / 4)
    part = left / error
    return part if part <= enough or (left <= tol < error and part <= within) else 1.0


def _work(args: dict[str, Any]) -> int:
    """Elements of the largest array that an op makes or is given."""
    scores = (
        args["q"].size // max(args["q"].shape[-1], 1) * args["k"].shape[1] if {"q", "k"} <= args.keys() else 0
    )
    return max([scores, *(x.size for x in args.values() if isinstance(x, np.ndarray))])


def _cropped(
    op: str, output: str, got: Array, want: Array, args: dict[str, Any]
) -> tuple[dict[str, Any], Array, Array]:
    """Arguments and output cut to a block around the largest error, where the op allows it and they are large."""
    if op not in OPS or _work(args) <= LIMIT:
        return args, got, want
    worst = np.unravel_index(np.nan_to_num(np.abs(got - want), nan=np.inf).argmax(), got.shape)
    for group in OPS[op].crops(output):
        axes = {name: axis for name, axis in group.items() if isinstance(args.get(name), np.ndarray)}
        n = got.shape[axes[output]]
        largest = _work({k: v for k, v in args.items() if k in axes})
        keep = max(1, n * LIMIT // max(largest, LIMIT))
        start = min(max(int(worst[axes[output]]) - keep // 2, 0), n - keep)
        cut = {k: (*[slice(None)] * axis, slice(start, start + keep)) for k, axis in axes.items()}
        args = {k: v[cut[k]] if k in cut else v for k, v in args.items()}
        got, want = got[cut[output]], want[cut[output]]
    return args, got, want


# Where it is


def _not_finite(got: Array, before: Any) -> str:
    bad = ~np.isfinite(got)
    if not bad.any():
        return ""
    if isinstance(before, np.ndarray) and np.array_equal(got, before, equal_nan=True):
        return "unchanged: it holds the NaN that was there before the call"
    if np.isnan(got).all():
        return "all NaN: never written, or computed from NaN"
    first = tuple(map(int, np.argwhere(bad)[0]))
    kind = "NaN" if np.isnan(got).any() else "Inf"
    return f"{kind} in {int(bad.sum())} of {plural(got.size, 'value')}, first at {first}"


def _axes(op: str, output: str, ndim: int) -> tuple[str, ...]:
    if output == "lse":
        return "sequence", "head", "position"
    if output in ("w", "dw", "db", "master", "m", "v") and op not in (FWD, BWD):
        return ("element",) if ndim == 1 else ("row", "column")
    if output == "rstd" or ndim == 3:
        return "token", "head", "dimension"
    return (
        ("token",)
        if ndim == 1
        else ("token", "column")
        if ndim == 2
        else ("sequence", "position", "head", "dimension")
    )


def _where(got: Array, want: Array, tol: float, names: tuple[str, ...]) -> str:
    """Describe the part of an array that is wrong; "" for all of it, or for no part in particular."""
    off = np.nan_to_num(np.abs(got - want), nan=np.inf)
    bad = off > (tol if tol < off.max() else off.max() / 4)
    count = int(bad.sum())
    if count == 0:
        return ""
    if count == 1 < got.size:
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        return f"one element only, at {index}" + (", the last" if bad.flat[-1] else "")
    parts, area = [], 1
    for axis in range(bad.ndim):
        at = np.flatnonzero(bad.any(tuple(i for i in range(bad.ndim) if i != axis)))
        area *= len(at)
        if len(at) < bad.shape[axis]:
            parts.append(_range(names[axis] if axis < len(names) else f"axis {axis}", at, bad.shape[axis]))
    if count < 0.3 * area:
        return f"{count} of {plural(got.size, 'value')}, scattered" if count <= got.size / 10 else ""
    parts = [p for p in parts if p]
    if not parts:
        return ""
    c = least_squares(got[bad], want[bad])
    same = count > 4 and np.abs(got - c * want)[bad].max() < off.max() / 20
    return "only " + ", ".join(parts) + (f": {c:.4g} times the right values" if same else "")


def _range(name: str, at: Array, n: int) -> str:
    first, last = int(at[0]), int(at[-1])
    if len(at) == 1:
        return f"the last {name}, {last}: a remainder?" if last == n - 1 and n > 2 else f"{name} {first}"
    if len(at) == last - first + 1:
        hint = " (an epilogue or a stride?)" if name == "column" else ""
        return f"{name}s {first}..{last} of {n}{hint}"
    listed = ", ".join(str(int(i)) for i in at[:6]) + (", ..." if len(at) > 6 else "")
    return f"{name}s {listed}" if len(at) <= n / 2 else ""
