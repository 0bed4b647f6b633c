"""Hold the position of a run, which saved states keep."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ..common.errors import MalformedFile


@dataclass
class Progress:
    """Position of a run: the part of a state, beside weights and optimizer, that the rest of the run follows from.

    data                  position in the stream of batches
    epoch_losses          training losses of this epoch
    grad_norm_max         of this epoch
    val_losses            before step 1, then one per epoch
    val_step              step of the latest evaluation
    evals_without_best    evaluations since the best one
    seconds               of steps and evaluations
    best_flops            FLOP/s of the fastest step
    last_loss, constant   loss of the latest step, and the number of steps before it with the same loss
    gates, next           findings so far; what comes next: resuming.py
    """

    step: int = 0
    tokens_seen: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    epoch_losses: list[float] = field(default_factory=list)
    grad_norm_max: float = 0.0
    val_losses: list[float] = field(default_factory=list)
    val_step: int = 0
    best_val: float = math.inf
    evals_without_best: int = 0
    seconds: float = 0.0
    best_flops: float = 0.0
    last_loss: float | None = None
    constant: int = 0
    gates: list[dict[str, Any]] = field(default_factory=list)
    next: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, saved: dict[str, Any], path: Path) -> Self:
        """Take the position from a saved state in a folder. Raises MalformedFile."""
        try:
            return cls(**saved)
        except TypeError as e:
            raise MalformedFile(f"{path}: a state of another version of apr, or none: {e}") from None
