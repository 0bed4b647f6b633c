"""Follow a run on ranks that write nothing: rank 0 has its folder and its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .metrics import MetricsLog
from .rundir import RunDir


class SilentLog(MetricsLog):
    """Log of a rank that writes none."""

    def open(self, step: int, evaluated: int) -> None:
        """Do nothing, as all of this class."""

    def write(self, **line: Any) -> None:
        """Do nothing."""

    def write_sample(self, **line: Any) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""


class FollowedRun(RunDir):
    """Folder of a run that another rank writes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.log = SilentLog(path)

    def record(self, key: str, facts: dict[str, Any]) -> None:
        """Do nothing."""

    def drop_after(self, epoch: int, step: int) -> None:
        """Do nothing."""
