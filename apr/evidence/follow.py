"""Follow elements of all parameters through optimizer steps (gate run.learning-rate)."""

from __future__ import annotations

from copy import copy
from dataclasses import fields
from typing import Any

import numpy as np

from ..common.finding import Finding
from ..model.lora import AdapterLayout
from ..model.optim import Optimizer, State
from ..model.params import Layout
from ..ranks.shard import Shard
from .measure import EPS32, bits

FOLLOWED_ELEMENTS = 4096  # of all parameters, through optimizer steps


class Follow:
    """Follows a sample of all parameters through an optimizer step: gradients into state, state into weights.

    settings: of the run, which the numbers of the formula come from. layout: of the trained tensors, whose matrices decay.
    shard: the part of the optimizer, None where that is all
    """

    def __init__(
        self, opt: Optimizer, settings: Any, layout: Layout | AdapterLayout, shard: Shard | None = None
    ) -> None:
        cut, size = opt.decayed, opt.w.size
        # Vectors apart: of a large model they are fewer than the elements between two places.
        steps = [max(1, n // FOLLOWED_ELEMENTS) | 1 for n in (cut, size - cut)]
        self.opt, self.parts = opt, (slice(0, cut, steps[0]), slice(cut, size, steps[1]))
        self._formula = copy(opt)
        for f in fields(opt):
            if f.kw_only:
                setattr(self._formula, f.name, getattr(settings, f.name))
        places = np.concatenate([np.arange(p.start, p.stop, p.step) for p in self.parts])
        places = shard.places(places) if shard else places
        self._is_empty = not (places >= 0).any()
        self._decay = np.zeros(places.size)
        self._share = np.ones(places.size)
        for s in layout.slots:
            inside = (places >= s.offset) & (places < s.offset + s.size)
            if len(s.shape) > 1:
                self._decay[inside] = settings.weight_decay
            if ".lora_B." in s.hf:
                self._share[inside] = settings.lora_plus

    def before(self) -> None:
        """Copy weights, state and gradients before a step."""
        self._old, self._old_state, self._g = (
            self._read(self.opt.master),
            self._state(),
            self._read(self.opt.g),
        )

    def after(self, lr: float, grad_norm: float, tolerance: float, step: int) -> Finding:
        """Compare weights and state after step number `step` with the optimizer's formula, gradient clipping included.

        fitted lr = sum(moved * direction) / sum(direction^2). Weights are float32, and a move below half a unit of their last
        place is lost, of all weights of a size: so the fit is compared with those of moves that are rounded as weights are,
        of a learning rate a little lower and a little higher. What the formula's own last bit leaves is random: eps / 2 of
        each weight in its move, and the root of the sum of their squares in the fit."""
        opt, formula, old = self.opt, self._formula, self._old
        formula.steps = step
        if self._is_empty:
            return Finding.skipped(
                "run.learning-rate", "this rank updates no weights: there are fewer tiles than ranks"
            )
        new, state = self._read(opt.master), self._state()
        direction = formula.direction(old, state, self._decay) * self._share
        moved = old - new
        rounding = EPS32 * np.maximum(np.abs(old), np.abs(new))
        weight = float(direction @ direction)
        fitted = float(moved @ direction) / weight if weight else 0.0
        kind = opt.be.to_host(opt.master[:1]).dtype
        low, high = (
            float((old - (old - lr * k * direction).astype(kind)) @ direction) / weight if weight else 0.0
            for k in (1 - tolerance, 1 + tolerance)
        )
        noise = 3 * float(np.sqrt(((rounding * direction) ** 2).sum())) / weight if weight else 0.0
        off = np.abs(moved - lr * direction) - (rounding + 1e-3 * lr * np.abs(direction) + 1e-30)
        worst = int(off.argmax())
        measured = f"log {lr:.6e}, weights {fitted:.6e}"
        bound = f"equal within {tolerance:g} of it and {noise:.0e}, rounded to the weights' last places"
        why = ""
        if not low - noise <= fitted <= high + noise:
            why = f"the log says a learning rate of {lr:.4e}, the weights moved by one of {fitted:.4e}"
        elif off[worst] > 0:
            name, asked = type(opt).__name__, lr * direction[worst]
            why = f"an element moved by {moved[worst]:.3e} where {name} moves it by {asked:.3e}"
        elif not np.array_equal(bits(self._read_raw(opt.w)), bits(self._rounded(new))):
            why = "the weights that compute are not those that the optimizer moved"
        elif not self._state_follows(grad_norm, state):
            why = "the moments are not those of the gradients, clipped to the norm that was asked for"
        return Finding.of(
            "run.learning-rate", not why, measured, bound, why, score=abs(fitted - lr) / lr if lr else 0.0
        )

    def _state_follows(self, grad_norm: float, state: State) -> bool:
        """Compare the state with the optimizer's formula for g' = g min(1, grad_clip / (norm + 1e-6))."""
        opt, g = self._formula, self._g
        clipped = g * min(1.0, opt.grad_clip / (grad_norm + 1e-6)) if opt.grad_clip else g
        for name, want in opt.next_state(self._old_state, clipped).items():
            size = np.abs(self._old_state[name]) + np.abs(clipped) ** opt.moments[name]
            slack = 1e-5 * size + 1e-37  # float32, and where it loses its last bits
            if not (np.abs(state[name] - want) <= slack).all():
                return False
        return True

    def _state(self) -> State:
        return {name: self._read(flat) for name, flat in self.opt.state.items()}

    def _read_raw(self, flat: Any) -> np.ndarray:
        return np.concatenate([self.opt.be.to_host(flat[part]) for part in self.parts])

    def _read(self, flat: Any) -> np.ndarray:
        return self._read_raw(flat).astype(np.float64)

    def _rounded(self, new: np.ndarray) -> np.ndarray:
        return new.astype(np.float32).astype(self.opt.be.to_host(self.opt.w[:1]).dtype)
