"""Learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..common.errors import UsageError

SCHEDULES = ("cosine", "wsd", "linear", "constant")
WSD_DECAY_SHARE = 0.2  # of all steps (Hu et al. 2024 use 0.1; Haegele et al. 0.2)


@dataclass(frozen=True)
class Schedule:
    """Map step 1, 2, ... num_steps to a learning rate: linear warm-up to lr, then decay to lr_min.

    kind      decay
    cosine    half a cosine
    linear    a line
    wsd       constant at lr, then a line over the last WSD_DECAY_SHARE of num_steps
    constant  none
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
        """Compute the learning rate of a step, counted from 1."""
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        start = self.warmup_steps
        if self.kind == "wsd":
            start = max(start, self.num_steps - round(WSD_DECAY_SHARE * self.num_steps))
        if self.kind == "constant" or step <= start:
            return self.lr
        done = min(1.0, (step - start) / max(1, self.num_steps - start))
        remaining = 0.5 * (1 + math.cos(math.pi * done)) if self.kind == "cosine" else 1 - done
        return self.lr_min + (self.lr - self.lr_min) * remaining
