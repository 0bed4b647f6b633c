"""The display of a run: what a person sees while it trains. This base shows nothing."""

from __future__ import annotations

from typing import Any


class Display:
    """Override what is to be shown."""

    def note(self, text: str) -> None:
        """Show a line of text."""

    def preparing(self, stage: str, done: int, total: int) -> None:
        """Show progress of the corpus: the stage, documents done and in all."""

    def start(self, done: int, total: int) -> None:
        """Begin to show training steps: those done and those in all."""

    def step(self, line: dict[str, Any]) -> None:
        """Show a training step, as logged."""

    def evaluation(self, step: int, val_loss: float, bits: float, train_losses: list[float]) -> None:
        """Show an evaluation; train_losses are those of the epoch that it ends."""

    def difference(self, report: Any) -> None:
        """Show a spot check (a bisect.report.Report) that disagrees with the reference."""

    def stop(self) -> None:
        """End the showing of steps, or of preparation."""

    def verdict(self, gates: Any) -> None:
        """Show every gate (evidence.gates.Gates) with its figure."""

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Show two columns: names and texts."""
