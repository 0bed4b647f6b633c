"""Say what comes next in a run: recorded in each state, and asked of the trainer that goes on from it."""

from __future__ import annotations

import math
from typing import Any

from .start import batch_sha256


def what_is_next(trainer: Any) -> dict[str, Any]:
    """List the optimizer's step count, the learning rate and the batch of the next step of a Trainer, and what it has
    counted and reached so far."""
    batch, p = trainer.batches.peek(), trainer.progress
    return {
        "tokens_seen": p.tokens_seen,
        "best_val_loss": p.best_val if math.isfinite(p.best_val) else None,
        "evaluations_without_a_better": p.evals_without_best,
        "optimizer_steps": trainer.opt.steps,
        "next_lr": trainer.schedule(p.step + 1),
        "next_batch_sha256": batch_sha256(*batch) if batch else None,
        "num_steps": trainer.s.num_steps,
    }


def still_to_come(saved: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """List what a state says of the next step; without its learning rate where the run was made longer since."""
    if saved.get("num_steps") == num_steps:
        return saved
    return {key: x for key, x in saved.items() if key not in ("num_steps", "next_lr")}
