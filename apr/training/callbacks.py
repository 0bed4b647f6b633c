"""Hear of a run while it trains: the base class of callbacks, and the observer that calls them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import AprError, UsageError
from ..common.events import Evaluated, Saved, Stepped


class Callback:
    """Override the methods of events to hear. An exception ends the run, its state saved.

    Lines, facts and results are copies: a callback may change them."""

    def on_step(self, line: dict[str, Any]) -> None:
        """After each optimizer step: its line of metrics.jsonl (step, train_loss in nats/token, lr, grad_norm, ...)."""

    def on_evaluation(self, line: dict[str, Any]) -> None:
        """After each evaluation, also before step 1: step, val_loss, val_tokens, val_bits_per_byte, ..."""

    def on_checkpoint(self, path: Path, facts: dict[str, Any]) -> None:
        """After each checkpoint: its .apr file, and its metadata (step, train_loss, val_loss, ...).

        The file is whole. With background saves (the default) this is some steps after its evaluation."""

    def on_end(self, result: dict[str, Any]) -> None:
        """Once, when the run ends, however it does: status (DONE, INTERRUPTED, ABORTED, ...), verdict, steps, val_loss,
        run_dir; of a run that came to its end also seconds, best_val_loss, ..., of another the error's text as error.
        Files that a callback writes into run_dir must be whole when it returns: they are hashed then."""


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class CallbackFailed(AprError):
    """A callback raised an exception, which is the cause of this error."""

    status = "ABORTED"


def check_callbacks(callbacks: Sequence[Callback]) -> list[Callback]:
    """List callbacks. Raises UsageError for what cannot be called as one, before a run begins."""
    if isinstance(callbacks, Callback | type) or not hasattr(callbacks, "__iter__"):
        raise UsageError(f"callbacks is {_words(callbacks)}; give a list of objects, callbacks=[Watch()]")
    listed = list(callbacks)
    for number, callback in enumerate(listed):
        if isinstance(callback, type) or not all(hasattr(callback, name) for name in EVENTS):
            raise UsageError(
                f"callbacks[{number}] is {_words(callback)}; give an object of a subclass of apr.Callback, callbacks=[Watch()]"
            )
    return listed


def _words(x: object) -> str:
    return f"the class {x.__name__}" if isinstance(x, type) else f"of the type {type(x).__name__}"


class Callbacks:
    """Observer that calls callbacks, each with copies: what it changes, no gate, checkpoint or logger sees.

    failed: gets the first exception of each event; the others are called all the same."""

    def __init__(self, callbacks: Sequence[Callback], failed: Callable[[CallbackFailed], None]) -> None:
        self.callbacks, self.failed = callbacks, failed

    def stepped(self, e: Stepped) -> None:
        """Call on_step."""
        self._call("on_step", e.line)

    def evaluated(self, e: Evaluated) -> None:
        """Call on_evaluation."""
        self._call("on_evaluation", e.line)

    def saved(self, e: Saved) -> None:
        """Call on_checkpoint."""
        self._call("on_checkpoint", e.path, e.facts)

    def ended(self, result: dict[str, Any]) -> None:
        """Call on_end."""
        self._call("on_end", result)

    def _call(self, method: str, *args: Any) -> None:
        failed: CallbackFailed | None = None
        for callback in self.callbacks:
            try:
                getattr(callback, method)(*copy.deepcopy(args))
            except KeyboardInterrupt:
                raise
            except BaseException as e:  # sys.exit() too asks for an end, not for a state that is lost
                if failed is None:
                    failed = CallbackFailed(
                        f"{type(callback).__name__}.{method} raised {type(e).__name__}: {e}"
                    )
                    failed.__cause__ = e
        if failed is not None:
            self.failed(failed)
