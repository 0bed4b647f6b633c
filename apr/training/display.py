"""The display of a run: an observer that turns events into lines of text. This base shows none of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from ..common.events import Evaluated, Noted, PassEnded, SpotChecked, Started, Stepped, by_source
from ..common.units import plural

Rows = Sequence[tuple[str, str]]


class Display:
    """Override `note` to show lines of text, and the other methods that are to be shown."""

    num_steps = 0

    def note(self, text: str) -> None:
        """Show a line of text."""

    def preparing(self, stage: str, done: int, total: int) -> None:
        """Show progress of the corpus: the stage, documents done and in all."""

    def table(self, title: str, rows: Rows) -> None:
        """Show two columns: names and texts."""

    def verdict(self, gates: Any) -> None:
        """Show the finding of every gate (evidence.gates.Gates)."""

    def difference(self, report: Any) -> None:
        """Show a spot check (a bisect.report.Report) that disagrees with the reference."""

    def stop(self) -> None:
        """End the showing of progress."""

    def noted(self, e: Noted) -> None:
        """Show the line of text."""
        self.note(e.text)

    def started(self, e: Started) -> None:
        """Keep the number of steps."""
        self.num_steps = e.num_steps

    def stepped(self, e: Stepped) -> None:
        """Show a line every tenth of the run."""
        step, loss, lr, speed = (e.line[key] for key in ("step", "train_loss", "lr", "tokens_per_sec"))
        if step % max(1, self.num_steps // 10) == 0:
            self.note(f"step {step:>5}  train {loss:.4f}  lr {lr:.2e}  {speed:,.0f} tokens/s")

    def pass_ended(self, e: PassEnded) -> None:
        """Show that the data begins again."""
        self.note(
            f"step {e.step:>5}  pass {e.passes} over the {plural(e.windows, 'window')} of {e.source or 'the data'} is complete"
        )

    def evaluated(self, e: Evaluated) -> None:
        """Show an evaluation, and the mean training loss of the epoch that ends there."""
        step, loss = e.line["step"], e.line["val_loss"]
        train = f"train {np.mean(e.train_losses):.4f}  " if e.train_losses else "before training: "
        if "val_accuracy" in e.line:
            accuracy, margin = e.line["val_accuracy"], e.line["val_margin"]
            self.note(
                f"step {step:>5}  {train}val {loss:.4f} a pair  accuracy {accuracy:.3f}  margin {margin:+.4f}"
            )
            return
        self.note(
            f"step {step:>5}  {train}val {loss:.4f} nats/token  {e.line['val_bits_per_byte']:.3f} bits/byte"
        )
        if each := by_source(e.line, "val_loss"):
            self.note(" " * 12 + "  ".join(f"{name} {x:.4f}" for name, x in each.items()))

    def spot_checked(self, e: SpotChecked) -> None:
        """Show that all arrays agree, or every array that does not."""
        report = e.report
        if not report.rows:
            self.note(f"spot check   skipped: {report.skipped['forward']}")
        elif report.agree:
            worst = max(r.ratio for r in report.rows)
            self.note(
                f"step {e.step:>5}  spot check: {plural(len(report.rows), 'array')} of {report.batch} agree with the float64 "
                f"reference (worst {worst:.2f} of its tolerance, {e.seconds:.1f} s)"
            )
        else:
            self.difference(report)


def say(show: Callable[..., None], *args: Any) -> None:
    """Show a part of the end; a terminal that is full, closed or cannot show a character takes nothing from the run."""
    with suppress(OSError, ValueError):
        show(*args)
