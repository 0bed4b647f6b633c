"""Follow a run on ranks that write nothing: rank 0 has its folder and its log."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..common.errors import AprError, Refused
from ..common.files import sha256_of
from .metrics import MetricsLog
from .rundir import RunDir

# How long a file that another machine has written may take to be seen on this one.
SEEN_SECONDS = 15.0


def check_seen(path: Path, sha256: str, rank: int) -> None:
    """Raise Refused where a rank does not find the config.json that rank 0 has written, in the folder of that name."""
    end = time.monotonic() + SEEN_SECONDS
    while True:
        is_late = time.monotonic() > end
        try:
            found = sha256_of(path / "config.json")[0]
        except AprError:
            found = ""
        if found == sha256:
            return
        if is_late:
            what = "another config.json" if found else "none"
            raise Refused(
                f"{path}: rank 0 writes the run there, and rank {rank} finds {what} in it; give a --run-dir that all machines see"
            )
        time.sleep(0.2)


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
