"""Measure what gates ask of adapters (LoRA): the base is the checkpoint's, stays so, and gradients reach A and B."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..checkpoints.checkpoint import Checkpoint, parameters
from ..checkpoints.peft import LoadedAdapter
from ..checkpoints.tensors import CHUNK, EMBED
from ..common.finding import FAIL, Finding
from ..common.units import plural
from ..model.adapters import Adapters
from ..model.eight_bits import rounded_rows
from ..model.lora import cut
from ..model.params import Layout, Slot
from ..ranks.shard import Shard
from .measure import gradient_norm, gradients

# Of an 8-bit integer: that of the largest weight of a row.
FULL = 127
# Of a merged matrix, that are summed again.
MERGED_ELEMENTS = 1 << 20


def adapter_gradients(
    adapters: Adapters, scratch: Any, g: Any, shard: Shard | None
) -> Callable[[float], Finding]:
    """Read all gradients before a step (gate run.gradients); returns the judge of the norm in the log.

    While a B is all zeros, as at the start, the gradient of its A must be zero too, and every other must not.
    scratch (1,) float64. g: gradients of the step, shard: the part that they are, None for all."""
    zero, norm = gradients(adapters, g, shard)
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
    """Compare the base on the device with a checkpoint's weights, in the format of the run (gate before.weights)."""
    count, tensors = 0, parameters(adapters.model.layout, init)
    for s, arrays in adapters.base_values():
        wrong = _other_values(adapters, s, arrays, tensors[s.hf])
        if wrong:
            return Finding.of("before.weights", False, f"{s.hf} {wrong}", "equal bits")
        count += s.size
    is_rounded = adapters.config.base is not None
    measured = (
        f"{plural(len(tensors), 'tensor')}, {plural(count, 'value')} of the base read back from the device"
        + (", matrices of the blocks within half a step of 8 bits" if is_rounded else "")
    )
    return Finding.of("before.weights", True, measured, "equal bits")


def _other_values(adapters: Adapters, s: Slot, arrays: tuple[Any, ...], tensor: np.ndarray) -> str:
    """Find how a tensor of the base differs from that of the file; "" for nothing.

    8-bit integers q with factors f of their rows: |f q - w| <= f / 2, and the largest |q| of a row with a weight is 127."""
    if len(arrays) == 2:
        row = adapters.be.to_host(arrays[1]).astype(np.float64)
    width, be = s.shape[-1], adapters.be
    each = max(1, CHUNK // width) * width
    stored = tensor.reshape(-1)
    for start in range(0, s.size, each):
        there = be.to_host(arrays[0][start : start + each])
        want = stored[start : start + each].astype(np.float32)
        if len(arrays) == 1:
            if there.tobytes() != want.astype(there.dtype).tobytes():
                return "is not that of the file on the device"
            continue
        factor = row[start // width : start // width + there.size // width, None]
        q, w = there.reshape(-1, width).astype(np.float64), want.reshape(-1, width).astype(np.float64)
        near = np.abs(factor * q - w) <= factor * (0.5 + 1e-4)
        full = (np.abs(q).max(1) == FULL) | ~w.any(1)
        if not (near.all() and full.all()):
            at = start // width + int(np.argmin(near.all(1) & full))
            return f"is not that of the file in 8 bits: row {at}"
    return ""


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
    be, dtype, errors = adapters.be, adapters.model.dtype, [(0.0, "")]
    eps = float(np.finfo(np.float64 if dtype == "float64" else np.float32).eps)
    last = 2.0**-8 if dtype == "bfloat16" else 0.0
    pairs = {p.base.hf: p for p in adapters.layout.pairs}
    for s, arrays in adapters.base_values():
        if s.hf not in pairs and len(arrays) == 1:
            continue
        got = be.to_host(adapters.computed(s))
        base = be.to_host(arrays[0]).reshape(s.shape)
        if len(arrays) == 2:
            base = be.to_host(arrays[1]).astype(np.float64)[:, None] * base
        zero = np.zeros((s.shape[0], 1)), np.zeros((1, s.shape[1]))
        b, a = (
            zero
            if s.hf not in pairs
            else (be.to_host(cut(adapters.w, slot)) for slot in (pairs[s.hf].b, pairs[s.hf].a))
        )
        pair = pairs.get(s.hf)
        m = be.to_host(cut(adapters.w, pair.m))[:, None] if pair and pair.m else None
        errors.append((_error_of_sum(got, [base, a, b], pair.scale if pair else 0.0, eps, last, m), s.hf))
    adapters.begin_forward()
    for s, slot in adapters.layout.saved:
        got, want = (be.to_host(x).astype(np.float64) for x in (adapters.computed(s), cut(adapters.w, slot)))
        errors.append((float((np.abs(got - want) / (last * np.abs(want) + 1e-30)).max()), s.hf))
    return _worst(errors)


def checkpoint_merge_error(
    base: Checkpoint, adapter: LoadedAdapter, merged: Checkpoint, dtype: str, base_format: str | None = None
) -> tuple[float, str]:
    """Compare a checkpoint with a base plus an adapter: the largest error, as a share of what rounding in a run of this
    dtype allows, and its tensor; infinite where a tensor without adapter differs.

    base_format: of the matrices of the blocks in the run, see LoraConfig.base"""
    layout, last = Layout(merged.cfg), 2.0**-8 if dtype == "bfloat16" else 0.0
    before, after, errors = parameters(layout, base), parameters(layout, merged), [(0.0, "no tensor")]
    for s in layout.in_order():
        x, got, delta = before[s.hf].astype(np.float32), after[s.hf], adapter.deltas.get(s.hf)
        x = np.asarray(adapter.saved.get(s.hf, x), np.float32)
        if base_format and s.layer is not None and len(s.shape) == 2:
            q, row = rounded_rows(x)
            x = row[:, None] * q
        elif last:
            x = x.astype("bfloat16")
        if delta is None:
            x = x.astype(np.float32).astype("bfloat16") if last else x
            same = np.array_equal(got.astype(np.float64), x.astype(np.float64))
            errors.append((0.0 if same else np.inf, s.hf))
        else:
            eps = float(np.finfo(np.float32).eps)
            m = delta.magnitude if delta.magnitude is None or delta.is_table else delta.magnitude[:, None]
            errors.append((_error_of_sum(got, [x, delta.a, delta.b], delta.scale, eps, last, m), s.hf))
    return _worst(errors)


def merged_error(
    before: Mapping[str, np.ndarray], adapter: LoadedAdapter, after: Mapping[str, np.ndarray], dtype: str
) -> tuple[float, str]:
    """Compare merged weights with base plus adapter, some rows of each tensor: the largest error, as a share of what rounding
    once to a dtype allows, and its tensor; infinite where one without A and B is not that of the adapter, or of the base."""
    eps, last, errors = float(np.finfo(np.float32).eps), 2.0**-8 if dtype == "bfloat16" else 0.0, [(0.0, "")]
    for hf, delta in adapter.deltas.items():
        # A head that was the embedding begins as it.
        base, m = adapter.saved.get(hf, before.get(hf, before.get(EMBED))), delta.magnitude
        assert base is not None
        # Columns of an embedding have norms, which are of all rows.
        whole = delta.is_table and m is not None
        rows = slice(None, None, 1 if whole else max(1, base.size // MERGED_ELEMENTS))
        m = m if m is None or delta.is_table else m[rows, None]
        parts = [np.asarray(base[rows], np.float32), delta.a, delta.b[rows]]
        errors.append((_error_of_sum(after[hf][rows], parts, delta.scale, eps, last, m), hf))
    for hf in (hf for hf in after if hf not in adapter.deltas):
        own = adapter.saved.get(hf, before[EMBED if hf not in before else hf])
        rows = slice(None, None, max(1, own.size // MERGED_ELEMENTS) if own.ndim > 1 else 1)
        got, want = np.asarray(after[hf][rows]), np.asarray(own[rows], np.float32)
        errors.append((0.0 if np.array_equal(got, want.astype(got.dtype)) else np.inf, hf))
    return _worst(errors)


def _error_of_sum(
    got: Any, parts: list[Any], scale: float, eps: float, last: float, magnitude: Any = None
) -> float:
    """Largest |got - (base + scale b a)| in float64, in units of r + 4 roundings of the sum to eps and one to `last`.

    parts: base (O,I), a (r,I), b (O,r); magnitude (O,1) or (1,I): norms that the rows, or columns, of the sum get
    """
    got, base, a, b = (np.asarray(x).astype(np.float64) for x in (got, *parts))
    want = base + scale * (b @ a)
    size = np.abs(base) + scale * (np.abs(b) @ np.abs(a))
    if magnitude is not None:
        m = np.asarray(magnitude, np.float64)
        share = m / np.sqrt((want * want).sum(1 if m.ndim == 2 else 0, keepdims=m.ndim == 2))
        # With that of the norm, of I squares, and of two more products.
        want, size = want * share, (1 + np.sqrt(base.shape[-1]) / 4) * size * np.abs(share)
        last *= 3
    return float((np.abs(got - want) / ((len(a) + 4) * eps * size + last * np.abs(want) + 1e-30)).max())


def _worst(errors: list[tuple[float, str]]) -> tuple[float, str]:
    """Pick the first of the largest errors; NaN is larger than any."""
    return max(errors, key=lambda e: np.inf if np.isnan(e[0]) else e[0])
