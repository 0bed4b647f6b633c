"""AdamW over the two regions of the flat buffer, clipping by global norm, learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.errors import UsageError
from .buffers import WIDE, Buffers, BufferSpec, BufferSpecs
from .config import ModelConfig
from .params import Layout
from .transformer import Model

SCHEDULES = ("cosine", "wsd", "linear", "constant")
WSD_DECAY = 0.2  # share of all steps in which "wsd" falls (Hu et al. 2024 use 0.1; Haegele et al. 0.2)


@dataclass(frozen=True)
class Schedule:
    """Learning rate of step 1, 2, ... num_steps: linear warm-up to lr, then down to lr_min.

    cosine: half a cosine; linear: a line; wsd: constant, then a line over the last WSD_DECAY of
    num_steps; constant: stays at lr.
    """

    kind: str
    lr: float
    lr_min: float
    warmup_steps: int
    num_steps: int

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise UsageError(f"--schedule {self.kind}: choose one of {', '.join(SCHEDULES)}")

    def __call__(self, step: int) -> float:
        """Learning rate of a step, counted from 1."""
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        start = self.warmup_steps
        if self.kind == "wsd":
            start = max(start, self.num_steps - round(WSD_DECAY * self.num_steps))
        if self.kind == "constant" or step <= start:
            return self.lr
        done = min(1.0, (step - start) / max(1, self.num_steps - start))
        fall = 0.5 * (1 + math.cos(math.pi * done)) if self.kind == "cosine" else 1 - done
        return self.lr_min + (self.lr - self.lr_min) * fall


def wants(cfg: ModelConfig, dtype: str) -> BufferSpecs:
    """Buffers of the optimizer of a model: moments, and a float32 copy of weights that are kept in less."""
    size, wide = Layout(cfg).size, WIDE[dtype]
    out = {name: BufferSpec("moments", (size,), wide) for name in ("m", "v")}
    if wide != dtype:
        out["master"] = BufferSpec("master", (size,), wide)
    return out | {name: BufferSpec("scratch", (1,), "float64") for name in ("sum_sq", "factor")}


class AdamW:
    """Moments of a model's parameters and the step that uses them.

    Decay applies to matrices only. grad_clip 0 means no clipping.
    """

    def __init__(
        self,
        model: Model,
        beta1: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        grad_clip: float = 1.0,
    ) -> None:
        be = model.be
        self.model = model
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.weight_decay, self.grad_clip = weight_decay, grad_clip
        self.buffers = Buffers(be, wants(model.cfg, model.dtype))
        self.m, self.v = self.buffers["m"], self.buffers["v"]
        self.sum_sq: Any = self.buffers["sum_sq"]
        self.factor: Any = self.buffers["factor"]
        self.master = model.w
        if "master" in self.buffers.arrays:
            self.master = self.buffers["master"]
            be.copy(self.master, model.w)
        self.steps = 0

    def set_weights(self, host: np.ndarray) -> None:
        """Weights to go on from: a float32 buffer in Layout order. The model gets them rounded to its dtype."""
        self.model.be.from_host(self.model.w, host)
        if self.master is not self.model.w:
            self.model.be.from_host(self.master, host)

    def step(self, lr: float) -> None:
        """Update the parameters from the gradients, then set the gradients to zero.

        Leaves the squared global norm of the gradients, before clipping, in sum_sq.
        """
        model, be = self.model, self.model.be
        self.steps += 1
        be.fill(self.sum_sq, 0)
        be.add_sum_sq(self.sum_sq, model.g)
        be.clip_factor(self.factor, self.sum_sq, self.grad_clip or math.inf)
        cut = model.layout.decayed
        for part, decay in ((slice(0, cut), self.weight_decay), (slice(cut, model.layout.size), 0.0)):
            be.adamw(
                model.w[part],
                self.master[part],
                self.m[part],
                self.v[part],
                model.g[part],
                self.factor,
                lr,
                self.beta1,
                self.beta2,
                self.eps,
                decay,
                self.steps,
            )
        be.fill(model.g, 0)

    def grad_norm(self) -> float:
        """Global L2 norm of the gradients of the latest step, before clipping; waits for the device."""
        return math.sqrt(float(self.model.be.to_host(self.sum_sq)[0]))
