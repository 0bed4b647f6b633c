"""Measure what gates ask of adapters (LoRA): the base is the checkpoint's, stays so, and gradients reach A and B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..checkpoints.checkpoint import Checkpoint, parameters
from ..checkpoints.tensors import CHUNK
from ..common.finding import FAIL, Finding
from ..model.lora import Adapters
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
    measured = f"{len(tensors)} tensors, {count:,} values of the base read back from the device"
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
    """|W_eff - (W + s B A)| in float64, as a share of what rounding allows: the largest of the first and last layer, and
    the matrix that has it."""
    model, config = adapters.model, adapters.config
    eps = float(np.finfo(np.float32 if adapters.dtype == "float32" else np.float64).eps)
    last = 0.0 if adapters.dtype == model.dtype else 2.0**-8
    effective, s = model.layout.named(model.w), config.scale
    worst, name = 0.0, ""
    views = adapters.layout.views(adapters.w)
    for p, base, (a, b) in zip(adapters.layout.pairs, adapters.base, views, strict=True):
        if p.base.layer not in (0, adapters.cfg.num_layers - 1):
            continue
        w, base_, a_, b_ = (
            np.asarray(adapters.be.to_host(x)).astype(np.float64) for x in (effective[p.base.hf], base, a, b)
        )
        want = base_ + s * (b_ @ a_)
        size = np.abs(base_) + s * (np.abs(b_) @ np.abs(a_))
        off = np.abs(w - want) / ((config.rank + 4) * eps * size + last * np.abs(want) + 1e-30)
        if not float(off.max()) <= worst:
            worst, name = float(off.max()), p.base.hf
    return worst, name
