"""Open a run directory to verify it: its config, verdict and log, and the options of the check."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import STATUSES, MalformedFile, UsageError
from ..common.events import Line
from ..common.files import read_bytes, short
from ..common.finding import FAIL, SEVERITY, SKIPPED, Finding
from ..data.audit import folders_in
from ..evidence.gates import parse_bounds
from ..evidence.judge import Facts, epoch_before
from ..evidence.seal import EVIDENCE, standing
from ..evidence.verdict import VERDICT, read_verdict
from ..training.rundir import PARTS, RunDir, of_run
from ..training.settings import Settings, check, is_due

NONE_SAVED = "no checkpoint was saved"
NO_SHARDS = "the shards are not there; --dataset says where they are now"
UNMADE = "unmade"  # `where` of a finding that says that a check of every run could not be made of this one


@dataclass(frozen=True)
class Options:
    """Flags of `apr verify`.

    tolerance: of replayed steps, None for the one that follows from code and device of the record; 0: equal bits"""

    replay: int = 0
    within: int = 20
    seed: int = 0
    backend: str = "auto"
    device: str | None = None
    dataset: str | None = None
    init: str | None = None
    signers: str | None = None
    tolerance: float | None = None


def _whole(verdict: dict[str, Any], path: Path) -> dict[str, Any]:
    """Check the types of what `apr report` can do without. Raises MalformedFile."""
    if type(verdict.get("steps")) is not int or verdict["steps"] < 0:
        raise MalformedFile(f"{path}: steps = {short(verdict.get('steps'))} is not a number of steps")
    if not isinstance(verdict.get("val_loss"), float | int | None):
        raise MalformedFile(f"{path}: val_loss = {short(verdict['val_loss'])} is not a number")
    for row in verdict["gates"]:
        if row.get("verdict") not in SEVERITY:
            raise MalformedFile(
                f"{path}: gate {short(row['id'])} has no verdict: {short(row.get('verdict'))}"
            )
    return verdict


def unmade(name: str, why: str, bound: str = "", asked: bool = False) -> Finding:
    """Build the finding of a check that could not be made, for its files are not there: FAIL where a flag asked for it."""
    if asked:
        return Finding(name, FAIL, f"asked for, and not made: {why}", bound, where=UNMADE)
    return Finding(name, SKIPPED, "", bound, why, UNMADE)


class Record:
    """Everything that a run says of itself, as its files have it. announce: hears what is being checked.

    stood: how files and folders stood before the first of them was read; evidence: the bytes of evidence.json

    Raises InputNotFound, MalformedFile, UsageError: no run, or one that has not come to its first evaluation."""

    def __init__(self, path: Path, options: Options, announce: Callable[[str], None]) -> None:
        self.run, self.options, self.announce = RunDir(path), options, announce
        self.stood = standing(path)
        evidence = path / EVIDENCE
        self.evidence = read_bytes(evidence) if evidence.is_file() else b""
        self.config = self.run.read_config()
        self.settings = Settings(**check(of_run(self.config["settings"]), str(path / "config.json")))
        if options.init is not None and self.settings.init is not None:
            self.settings = dataclasses.replace(self.settings, init=options.init)
        if missing := [key for key in PARTS if key not in self.config]:
            raise MalformedFile(f"{path / 'config.json'}: no {missing[0]} in it; restore the file")
        verdict = read_verdict(path)
        if verdict is None:
            raise UsageError(
                f"{path / VERDICT}: not there; the run is older than verdicts, or has not come to its first evaluation"
            )
        self.verdict = _whole(verdict, path / VERDICT)
        self.log = self.run.log.lines()
        self.steps = [line for line in self.log if "train_loss" in line]
        self.evaluations = [line for line in self.log if "val_loss" in line]
        self._places = [i for i, line in enumerate(self.log) if "val_loss" in line]

    @property
    def is_cut(self) -> bool:
        """The run did not end at an evaluation: it may lack the line of its last step, or an evaluation after it."""
        return self.verdict["status"] in STATUSES

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

    def epochs_due(self) -> list[int]:
        """List the epochs that had a checkpoint: those of --checkpoint-every, and those at an end of the run."""
        every, ends = self.settings.checkpoint_every, {self.settings.num_steps, *self.run.ends()}
        steps = [line["step"] for line in self.evaluations]
        last = len(steps) - 1
        return [i for i in range(1, last + 1) if is_due(steps[i], every) or steps[i] in ends or i == last]

    @property
    def sources(self) -> list[str]:
        """List the sources of a mixture, by name; of other data one, ""."""
        return list(self.config["data"].get("mixture", [""]))

    def folders(self) -> dict[str, Path]:
        """Find the folders of the shards, by side."""
        if self.options.dataset is not None:
            return folders_in(Path(self.options.dataset), self.sources)
        return {k: Path(v) for k, v in self.config["data_folders"].items()}
