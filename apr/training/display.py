"""The display of a run: an observer of its events that shows them to a person. This base shows nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Rows = Sequence[tuple[str, str]]


class Display:
    """Override what is to be shown, and add methods for events: see common/events.py."""

    def note(self, text: str) -> None:
        """Show a line of text."""

    def preparing(self, stage: str, done: int, total: int) -> None:
        """Show progress of the corpus: the stage, documents done and in all."""

    def table(self, title: str, rows: Rows) -> None:
        """Show two columns: names and texts."""

    def verdict(self, gates: Any) -> None:
        """Show the finding of every gate (evidence.gates.Gates)."""

    def stop(self) -> None:
        """End the showing of progress."""
