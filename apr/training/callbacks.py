"""What a program can hear of a run while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.errors import AprError


class Callback:
    """Called by a run as it goes on; override what you want to hear. An exception ends the run, its state saved."""

    def on_step(self, line: dict[str, Any]) -> None:
        """After each optimizer step: its line of metrics.jsonl (step, train_loss in nats/token, lr, grad_norm, ...)."""

    def on_evaluation(self, line: dict[str, Any]) -> None:
        """After each evaluation, the one before step 1 included: step, val_loss, val_tokens, val_bits_per_byte, ..."""

    def on_checkpoint(self, path: Path, facts: dict[str, Any]) -> None:
        """After each checkpoint: its .apr file, and what its metadata say of it (step, train_loss, val_loss, ...)."""

    def on_end(self, result: dict[str, Any]) -> None:
        """Once, when the run ends, however it does: status (DONE, INTERRUPTED, ABORTED, ...), verdict, steps, val_loss,
        run_dir; of a run that came to its end also seconds, best_val_loss, ..., of another the error's text as error.
        Files that a callback writes into run_dir must be whole when it returns: they are hashed then."""


class CallbackFailed(AprError):
    """A callback raised an exception, which is the cause of this error."""

    status = "ABORTED"


def tell(callbacks: Sequence[Callback], event: str, *args: Any) -> None:
    """Call a method of every callback. Raises CallbackFailed, after all were called, for the first that raised."""
    failed: CallbackFailed | None = None
    for callback in callbacks:
        try:
            getattr(callback, event)(*args)
        except Exception as e:
            if failed is None:
                failed = CallbackFailed(f"{type(callback).__name__}.{event} raised {type(e).__name__}: {e}")
                failed.__cause__ = e
    if failed is not None:
        raise failed
