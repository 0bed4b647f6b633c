"""Open a run directory to verify it: its config, verdict and log, and the options of the check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import UsageError
from ..common.events import Line
from ..data.audit import sides_of
from ..evidence.gates import parse_bounds
from ..evidence.judge import Facts, epoch_before
from ..evidence.verdict import VERDICT, read_verdict
from ..training.rundir import RunDir
from ..training.settings import Settings, check

NONE_SAVED = "no checkpoint was saved"
CUT = ("ABORTED", "INTERRUPTED", "FAILED")  # status words of runs that did not end at an evaluation


@dataclass(frozen=True)
class Options:
    """Flags of `apr verify`."""

    replay: int = 0
    within: int = 20
    seed: int = 0
    backend: str = "auto"
    device: str | None = None
    dataset: str | None = None


class Record:
    """Everything that a run says of itself, as its files have it. announce: hears what is being checked.

    Raises InputNotFound, MalformedFile, UsageError: no run, or one that has not come to its first evaluation."""

    def __init__(self, path: Path, options: Options, announce: Callable[[str], None]) -> None:
        self.run, self.options, self.announce = RunDir(path), options, announce
        self.config = self.run.read_config()
        self.settings = Settings(**check(self.config["settings"], str(path / "config.json")))
        verdict = read_verdict(path)
        if verdict is None:
            raise UsageError(
                f"{path / VERDICT}: not there; the run is older than verdicts, or has not come to its first evaluation"
            )
        self.verdict = verdict
        self.log = self.run.log.lines()
        self.steps = [line for line in self.log if "train_loss" in line]
        self.evaluations = [line for line in self.log if "val_loss" in line]
        self._places = [i for i, line in enumerate(self.log) if "val_loss" in line]

    @property
    def is_cut(self) -> bool:
        """The run did not end at an evaluation: it may lack the line of its last step, or an evaluation after it."""
        return self.verdict["status"] in CUT

    @property
    def last(self) -> Path | None:
        """Latest checkpoint."""
        found = self.run.checkpoints()
        return found[-1] if found else None

    @property
    def facts(self) -> Facts:
        """Facts that the bounds of the log follow from."""
        return Facts.of(self.config, parse_bounds(self.settings.bounds))

    def epoch(self, i: int) -> list[Line]:
        """List the steps between evaluation i - 1 and evaluation i."""
        return epoch_before(self.log, self._places[i])[0]

    def folders(self) -> dict[str, Path]:
        """Find the folders of the shards, by side."""
        if self.options.dataset is not None:
            return sides_of(Path(self.options.dataset))
        return {k: Path(v) for k, v in self.config["data_folders"].items()}
