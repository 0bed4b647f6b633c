"""Compare whole steps of the optimizers with their formulas on the host."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..model.buffers import WIDE
from ..model.optim import OPTIMIZERS, Optimizer
from ..model.transformer import Model
from . import rule
from .comparisons import holds, measured
from .difference import difference
from .passes import CLIP, DECAY, LR
from .pieces import in_pieces, norm_of
from .report import ArrayComparison

# Of the norm of all weights: sums of some hundred squares may be float32.
WEIGHT_NORM = 1e-6


def optimizer_steps(judged: Model) -> list[ArrayComparison]:
    """Compare one whole step of each optimizer, on the side's own gradients, with its formula on the host.

    Leaves the model with the new weights."""
    g = judged.be.to_host(judged.g)
    rows = []
    for kind in OPTIMIZERS.values():
        judged.be.from_host(judged.g, g)
        rows += _optimizer_step(kind, judged, g)
    return rows


def _optimizer_step(kind: type[Optimizer], judged: Model, g: np.ndarray) -> list[ArrayComparison]:
    """Compare the weights after a first step with the formula, parameter by parameter; matrices alone decay."""
    be, layout, norm, op = judged.be, judged.layout, norm_of(g), f"{kind.__name__}.step"
    opt = kind.of(judged, weight_decay=DECAY, grad_clip=CLIP * norm)
    before = be.to_host(opt.master)
    opt.step(LR)
    after = be.to_host(opt.master)
    factor = min(1.0, CLIP * norm / (norm + 1e-6))
    rows = []

    def formula(w: np.ndarray, grad: np.ndarray, decay: float, dtype: Any) -> np.ndarray:
        w, grad = w.astype(dtype), grad.astype(dtype) * factor
        state = opt.next_state({name: np.zeros_like(grad) for name in opt.state}, grad)
        out: np.ndarray = w - LR * opt.direction(w, state, decay)
        return out

    eps = rule.EPS[WIDE[judged.dtype]]
    for s in layout.in_order():
        decay = DECAY if len(s.shape) > 1 else 0.0
        old, grad, new = (x[s.offset : s.offset + s.size] for x in (before, g, after))

        def judge(at: slice, old: Any = old, grad: Any = grad, new: Any = new, decay: float = decay) -> Any:
            want = formula(old[at], grad[at], decay, np.float64)
            base = difference(formula(old[at], grad[at], decay, np.float32), want).err
            d = difference(new[at], want)
            tol = rule.tolerance(base * eps / rule.EPS["float32"], d.largest, eps, 2)
            cause = "" if d.err <= tol else _update_cause(new[at], old[at], want)
            return tol, dataclasses.replace(d, flat=at.start + d.flat), cause

        tol, d, cause = max(in_pieces(judge, s.size), key=lambda f: (not f[1].err <= f[0], f[1].err - f[0]))
        rows.append(measured("optimizer", op, f"w.{s.hf}", d, tol, s.layer, s.shape, cause))
    be.fill(opt.sum_sq, np.nan)
    be.clip_factor(opt.factor, opt.sum_sq, 1.0)
    cause = "a norm that is no number passes as one that is not clipped"
    rows.append(
        holds("optimizer", "clip_factor", "factor of NaN", bool(np.isnan(be.to_host(opt.factor)[0])), cause)
    )
    square, want = opt.weight_norm(), norm_of(after)
    cause = "the weight norm of a run is not that of its weights"
    rows.append(holds("optimizer", op, "square", abs(square - want) <= WEIGHT_NORM * want, cause))
    rows.append(
        holds("optimizer", op, "g", not be.to_host(judged.g).any(), "the gradients were not set to zero")
    )
    return rows


def _update_cause(after: np.ndarray, before: np.ndarray, want: np.ndarray) -> str:
    """Explain an update that differs from the one wanted; "" for no explanation."""
    got, asked = (x.astype(np.float64) - before for x in (after, want))
    if not got.any():
        return "it did not move"
    ratio = float((got * asked).sum() / max(float((asked * asked).sum()), 1e-300))
    if np.abs(got - ratio * asked).max() <= 1e-3 * np.abs(got).max():
        return f"the update is {ratio:.4g} times what it should be: another learning rate was applied"
    return ""
