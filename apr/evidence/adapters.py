"""Measure what gates ask of adapters (LoRA): the base is the checkpoint's, stays so, and gradients reach A and B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..checkpoints.checkpoint import Checkpoint, parameters
from ..checkpoints.peft import LoadedAdapter
from ..checkpoints.tensors import CHUNK
from ..common.finding import FAIL, Finding
from ..common.units import plural
from ..model.lora import Adapters
from ..model.params import Layout
from .measure import gradient_norm, gradients


def adapter_gradients(adapters: Adapters, scratch: Any) -> Callable[[float], Finding]:
    """Read all gradients before a step (gate run.gradients); returns the judge of the norm in the log.

    While a B is all zeros, as at the start, the gradient of its A must be zero too, and every other must not.
    scratch (1,) float64."""
    zero, norm = gradients(adapters, scratch)  # type: ignore[arg-type]
    waiting = []
    for p, (_, b) in zip(adapters.layout.pairs, adapters.layout.views(adapters.w), strict=True):
        adapters.be.fill(scratch, 0)
        adapters.be.add_sum_sq(scratch, b.reshape(-1))
        if float(adapters.be.to_host(scratch)[0]) == 0:
            waiting.append(p.a.hf)
    missing = [name for name in zero if name not in waiting]
    leaked = [name for name in waiting if name not in zero]
    return partial(_gradient_finding, missing, leaked, len(waiting), norm)


def _gradient_finding(
    missing: list[str], leaked: list[str], waiting: int, norm: float, logged: float
) -> Finding:
    finding = gradient_norm(missing, norm, logged)
    if leaked:
        why = f"a gradient reaches {leaked[0]}, whose lora_B is zero"
        return replace(finding, verdict=FAIL, why=why)
    if waiting:
        measured = f"{finding.measured}; none for {waiting} lora_A, whose lora_B is zero"
        return replace(finding, measured=measured)
    return finding


def base_loaded(adapters: Adapters, init: Checkpoint) -> Finding:
    """Compare the base on the device with a checkpoint's weights, rounded to the run's dtype (gate before.weights)."""
    count, tensors = 0, parameters(adapters.model.layout, init)
    for s, flat in adapters.base_values():
        stored = tensors[s.hf].reshape(-1)
        for start in range(0, s.size, CHUNK):
            there = adapters.be.to_host(flat[start : start + CHUNK])
            want = stored[start : start + CHUNK].astype(np.float32).astype(there.dtype)
            if there.tobytes() != want.tobytes():
                return Finding.of(
                    "before.weights", False, f"{s.hf} is not that of the file on the device", "equal bits"
                )
            count += there.size
    measured = (
        f"{plural(len(tensors), 'tensor')}, {plural(count, 'value')} of the base read back from the device"
    )
    return Finding.of("before.weights", True, measured, "equal bits")


def base_unchanged(adapters: Adapters) -> Finding:
    """Compare the base with its hash at the start, and the weights that compute with W + s B A (gate end.base)."""
    found, want = adapters.base_hash(), adapters.base_sha256
    bound = f"{want[:12]} as loaded, merged weights within their rounding"
    worst, name = merge_error(adapters)
    measured = f"base {found[:12]}, merged weights off by {worst:.2f} of their rounding"
    why = ""
    if found != want:
        why = "weights that are not trained have changed"
    elif not worst <= 1:
        why = f"{name} is not its base plus its adapters"
    return Finding.of("end.base", not why, measured, bound, why, score=worst)


def merge_error(adapters: Adapters) -> tuple[float, str]:
    """Compare W_eff with W + s B A on the device: the largest error of all matrices, as a share of what rounding allows,
    and the matrix that has it."""
    eps = float(np.finfo(np.float32 if adapters.dtype == "float32" else np.float64).eps)
    last = 0.0 if adapters.dtype == adapters.model.dtype else 2.0**-8
    effective, errors = adapters.model.layout.named(adapters.model.w), [(0.0, "")]
    views = adapters.layout.views(adapters.w)
    for p, base, (a, b) in zip(adapters.layout.pairs, adapters.base, views, strict=True):
        got, *parts = (adapters.be.to_host(x) for x in (effective[p.base.hf], base, a, b))
        errors.append((_error_of_sum(got, parts, adapters.config.scale, eps, last), p.base.hf))
    return _worst(errors)


def checkpoint_merge_error(
    base: Checkpoint, adapter: LoadedAdapter, merged: Checkpoint, dtype: str
) -> tuple[float, str]:
    """Compare a checkpoint with a base plus an adapter: the largest error, as a share of what rounding in a run of this
    dtype allows, and its tensor; infinite where a tensor without adapter differs."""
    layout, last = Layout(base.cfg), 2.0**-8 if dtype == "bfloat16" else 0.0
    before, after, errors = parameters(layout, base), parameters(layout, merged), [(0.0, "no tensor")]
    for s in layout.in_order():
        x, got, delta = before[s.hf].astype(np.float32), after[s.hf], adapter.deltas.get(s.hf)
        x = x.astype("bfloat16") if last else x
        if delta is None:
            same = np.array_equal(got.astype(np.float64), x.astype(np.float64))
            errors.append((0.0 if same else np.inf, s.hf))
        else:
            eps = float(np.finfo(np.float32).eps)
            errors.append((_error_of_sum(got, [x, delta.a, delta.b], delta.scale, eps, last), s.hf))
    return _worst(errors)


def _error_of_sum(got: Any, parts: list[Any], scale: float, eps: float, last: float) -> float:
    """Largest |got - (base + scale b a)| in float64, in units of r + 4 roundings of the sum to eps and one to `last`.

    parts: base (O,I), a (r,I), b (O,r)
    """
    got, base, a, b = (np.asarray(x).astype(np.float64) for x in (got, *parts))
    want = base + scale * (b @ a)
    size = np.abs(base) + scale * (np.abs(b) @ np.abs(a))
    return float((np.abs(got - want) / ((len(a) + 4) * eps * size + last * np.abs(want) + 1e-30)).max())


def _worst(errors: list[tuple[float, str]]) -> tuple[float, str]:
    """Pick the first of the largest errors; NaN is larger than any."""
    return max(errors, key=lambda e: np.inf if np.isnan(e[0]) else e[0])
