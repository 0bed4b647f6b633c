"""The run directory: config.json, checkpoints, saved states; metrics.jsonl is metrics.py's."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.apr2 import write_apr
from ..checkpoints.state import Snapshot, TrainingState
from ..common.atomic import write_json
from ..common.errors import InputNotFound, Interrupted, IOFailure, MalformedFile, Refused
from ..common.events import REMOVED
from ..common.files import make_folder, read_json, short
from ..common.run_paths import run_of
from ..common.shell import word
from .callbacks import CallbackFailed
from .metrics import METRICS, MetricsLog

# Objects of config.json; the device is known, and written, when training begins.
PARTS = ("settings", "model", "data", "data_folders", "device")
# Key of config.json: gradients are sums over micro-batches. Runs without it add up inside the products, and keep to that.
SUMS, MICRO_BATCHES = "order_of_sums", "micro-batches"


class RunDir:
    """Paths and files of one run. Everything is written whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ckpt = path / "ckpt"
        self.state = self.ckpt / "state"
        self.ladder = self.ckpt / "ladder"
        self.log = MetricsLog(path)

    def create(self, config: dict[str, Any]) -> None:
        """Make the folders and config.json. Raises Refused when a run is there already."""
        metrics = self.path / METRICS
        if any(self.ckpt.glob("**/*.apr")) or (metrics.exists() and not (self.path / "config.json").exists()):
            raise Refused(
                f"{self.path} holds a run already; continue it with --resume or choose another --run-dir"
            )
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            if metrics.exists():  # of a run that ended before it saved anything
                metrics.replace(self.path / "metrics.old.jsonl")
        except OSError as e:
            raise IOFailure(f"{self.path}: cannot make the run directory: {e.strerror}") from None
        write_json(self.path / "config.json", config)

    def record(self, key: str, facts: dict[str, Any]) -> None:
        """Record facts that come later in config.json: "device", "start"."""
        write_json(self.path / "config.json", {**self.read_config(), key: facts})

    def read_config(self) -> dict[str, Any]:
        """Read config.json of an existing run. Raises InputNotFound, MalformedFile."""
        path = self.path / "config.json"
        if not path.is_file():
            run = run_of(self.path)
            hint = "give the folder of one" if run is None else f"the folder of the run is {run}"
            raise InputNotFound(f"{path}: no run here; {hint}")
        d = read_json(path)
        if not isinstance(d, dict) or not isinstance(d.get("settings"), dict):
            raise MalformedFile(f"{path}: no settings in it; the run cannot be resumed")
        for key in PARTS:
            if key in d and not isinstance(d[key], dict):
                raise MalformedFile(f"{path}: {key} = {short(d[key])} is no object; restore the file")
        later = d.get("device", {}).get("went_on_with", [])
        if not isinstance(later, list) or not all(isinstance(x, dict) for x in later):
            raise MalformedFile(
                f"{path}: device.went_on_with = {short(later)} is no list of devices; restore the file"
            )
        return d

    def sums_micro_batches(self) -> bool:
        """Tell a run whose gradients are sums over micro-batches, each begun at zero, from an older one."""
        return self.read_config().get(SUMS) == MICRO_BATCHES

    def ends(self) -> list[int]:
        """List the steps at which the run had ended before it was made longer."""
        ends = self.read_config().get("ends", [])
        if not isinstance(ends, list) or not all(type(e) is int for e in ends):
            raise MalformedFile(
                f"{self.path}/config.json: ends = {ends!r} is no list of steps; restore the file"
            )
        return ends

    def num_steps(self) -> int:
        """Read the number of steps of the run."""
        n = self.read_config()["settings"].get("num_steps")
        if type(n) is not int:
            raise MalformedFile(
                f"{self.path}/config.json: num_steps = {n!r} is no number of steps; restore the file"
            )
        return n

    def lengthen(self, num_steps: int) -> None:
        """Record another number of steps in config.json, and the end of before where the run has come to it."""
        config = self.read_config()
        was, states = self.num_steps(), self.states()
        if num_steps == was:
            return
        if states and step_of(states[-1]) == was:
            config["ends"] = [*self.ends(), was]
        # The passes that were asked for first are not those of the longer run.
        config["settings"] |= {"num_steps": num_steps, "epochs": None}
        self.log.is_longer = True
        write_json(self.path / "config.json", config)

    def rebound(self, bounds: str | None) -> None:
        """Record in config.json the bounds of gates that the run goes on with, where they are others."""
        settings = self.read_config()["settings"]
        if settings.get("bounds") != bounds:
            self.record("settings", {**settings, "bounds": bounds})

    def clean(self) -> None:
        """Remove temporary files that a killed process has left; to be called while the folder is locked."""
        for left in [*self.path.glob(".*.tmp"), *self.ckpt.glob("**/.*.tmp")]:
            left.unlink(missing_ok=True)

    def last_evaluation(self) -> dict[str, Any]:
        """Read the last line of an evaluation in the log. Raises MalformedFile where there is none."""
        evaluations = [line for line in self.log.lines() if "val_loss" in line]
        if not evaluations:
            raise MalformedFile(f"{self.log.path}: no evaluation in it; the checkpoints are whole")
        return evaluations[-1]

    # Checkpoints

    def save_epoch(
        self,
        epoch: int,
        meta: dict[str, Any],
        tensors: Mapping[str, np.ndarray],
        dtype: str,
        facts: dict[str, Any],
        late: Mapping[str, Callable[[], Any]],
    ) -> Path:
        """Write ckpt/epoch-NNN.apr with its metadata and tensors, and the facts of its epoch as metadata.json beside it;
        returns the path. late: facts that are computed while it is written."""
        path = self.ckpt / f"epoch-{epoch:03d}.apr"
        write_apr(path, meta, tensors, dtype)
        write_json(
            metadata_of(path), {"epoch": epoch, **facts, **{key: make() for key, make in late.items()}}
        )
        return path

    def prune(self, epoch: int, step: int, val_losses: Sequence[float], keep: int) -> list[str]:
        """Remove the checkpoints up to `epoch` but the latest `keep` and the best; returns the names of those removed.

        The metadata of a checkpoint stays, and says at which step it was removed. keep 0: all stay."""
        found = [p for p in self.checkpoints() if epoch_of(p) <= epoch]
        if not keep or len(found) <= keep:
            return []
        kept = {*found[-keep:], min(found, key=lambda p: val_losses[epoch_of(p)])}
        # Without metadata there is nothing that could say so.
        removed = [p for p in found if p not in kept and metadata_of(p).is_file()]
        for path in removed:
            facts = _facts(metadata_of(path))
            # First: a file that is gone without this word is missing.
            write_json(metadata_of(path), {**facts, REMOVED: step})
            shutil.rmtree(self.adapter_of(path), ignore_errors=True)
            path.unlink(missing_ok=True)
        return [p.name for p in removed]

    def drop_after(self, epoch: int, step: int) -> None:
        """Remove the checkpoints of later epochs, which a run that goes on from an earlier state makes again, and older
        states of later steps."""
        for rung in self.rungs():
            if step_of(rung) > step:
                rung.unlink(missing_ok=True)
        for checkpoint in (c for c in self._epochs() if epoch_of(c) > epoch):
            shutil.rmtree(self.adapter_of(checkpoint), ignore_errors=True)
            checkpoint.unlink(missing_ok=True)
            metadata_of(checkpoint).unlink(missing_ok=True)

    def adapter_of(self, checkpoint: Path) -> Path:
        """Name the folder of the adapter beside a checkpoint."""
        return self.ckpt / f"{checkpoint.stem}-adapter"

    def epochs(self) -> list[dict[str, Any]]:
        """Read the metadata of all epochs that had a checkpoint, in order. Raises MalformedFile."""
        return [_facts(metadata_of(checkpoint)) for checkpoint in self._epochs()]

    def _epochs(self) -> list[Path]:
        """List the checkpoints of all epochs that have metadata, oldest first, whether they are there or not."""
        found = (re.fullmatch(r"(epoch-\d{3,})\.metadata\.json", p.name) for p in self.ckpt.glob("epoch-*"))
        return sorted((self.ckpt / f"{m[1]}.apr" for m in found if m), key=epoch_of)

    def save_state(self, state: Snapshot, progress: dict[str, Any], keep: int, apart: int = 0) -> Path:
        """Write ckpt/state/step-NNNNNN.apr; remove all states but the latest `keep`.

        apart: one of every so many steps moves to ckpt/ladder, which nothing goes on from; 0: none."""
        path = self.state / f"step-{progress['step']:06d}.apr"
        self.log.sync()
        state.save(path, progress)
        for old in self.states()[:-keep]:
            if apart and step_of(old) % apart == 0:
                self.ladder.mkdir(exist_ok=True)
                old.replace(self.ladder / old.name)
            else:
                old.unlink(missing_ok=True)
        for rung in self.rungs():  # of a run that has become longer since
            if not apart or step_of(rung) % apart:
                rung.unlink(missing_ok=True)
        return path

    def checkpoints(self) -> list[Path]:
        """List the checkpoints of the epochs, oldest first, by number: epoch-1000 comes after epoch-999."""
        found = [p for p in self.ckpt.glob("epoch-*.apr") if re.fullmatch(r"epoch-\d{3,}", p.stem)]
        return sorted(found, key=epoch_of)

    def states(self) -> list[Path]:
        """List the saved states, oldest first."""
        return _states_in(self.state)

    def rungs(self) -> list[Path]:
        """List the older states that are kept for replay, oldest first."""
        return _states_in(self.ladder)

    def all_states(self) -> dict[int, Path]:
        """List both by step."""
        return {step_of(p): p for p in [*self.rungs(), *self.states()]}

    def has_state(self) -> bool:
        """Look for a state to go on from. Raises MalformedFile where all that were saved are damaged: to begin again
        would write over the checkpoints of the run."""
        found, damaged = self.states(), sorted(self.state.glob("step-*.apr.damaged"))
        if damaged and not found:
            raise MalformedFile(
                f"{damaged[-1]}: no saved state is left that is whole; restore one, or begin a new run with --init from "
                f"a checkpoint in {self.ckpt}"
            )
        return bool(found)

    def load_state(
        self, state: TrainingState, only: Path | None = None
    ) -> tuple[dict[str, Any], str | None, list[str]]:
        """Load the latest saved state that is whole, or `only` that one.

        Returns its progress, its recorded SHA-256 (None in old states), and notes about damaged states, which are
        renamed, not deleted. Raises InputNotFound, MalformedFile, Refused."""
        states = self.states() if only is None else [only]
        if not states:
            raise InputNotFound(
                f"{self.state}: no saved state; the run stopped before its first one: start anew"
            )
        notes: list[str] = []
        for path in reversed(states):
            try:
                return *state.load(path), notes
            except MalformedFile as e:
                if only is not None:
                    raise
                notes.append(f"{e}. It is now called {path.name}.damaged, and the state before it is taken")
                last = e
                path.replace(path.with_name(path.name + ".damaged"))
        raise MalformedFile(f"{last}; no other saved state is left in {self.state}")


def epoch_of(checkpoint: Path) -> int:
    """Read the number of its epoch from the name of a checkpoint."""
    return int(checkpoint.stem[6:])


def step_of(state: Path) -> int:
    """Read the step from the name of a saved state."""
    return int(state.stem[5:])


def _states_in(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("step-*.apr") if re.fullmatch(r"step-\d{6,}", p.stem)]
    return sorted(found, key=step_of)


def metadata_of(checkpoint: Path) -> Path:
    """Name the metadata beside a checkpoint."""
    return checkpoint.with_suffix(".metadata.json")


def _facts(path: Path) -> dict[str, Any]:
    """Read the metadata of a checkpoint, with the numbers that a run goes by. Raises InputNotFound, MalformedFile."""
    facts = read_json(path)
    if not isinstance(facts, dict):
        raise MalformedFile(f"{path}: holds {short(facts)}, not an object; restore the file, or remove it")
    for key, kinds in {"epoch": (int,), "step": (int,), "val_loss": (int, float)}.items():
        if type(facts.get(key)) not in kinds:
            raise MalformedFile(
                f"{path}: {key} = {short(facts.get(key))} is no number; restore the file, or remove it"
            )
    return facts


def interrupted(run: RunDir, step: int, failed: CallbackFailed | None) -> Interrupted | CallbackFailed:
    """Make the error of a run that stops with its state saved. failed: error of the callback that asked for the stop."""
    place = f"after step {step}, state saved" if run.states() else "before the first saved state"
    again = f"Go on with: {resume_command(run)}"
    if failed is None:
        return Interrupted(f"stopped {place}. {again}")
    error = CallbackFailed(f"{failed}; stopped {place}. {again}")
    error.__cause__ = failed.__cause__
    return error


def resume_command(run: RunDir) -> str:
    """Write the command line that goes on with a run."""
    return f"apr pretrain --resume --run-dir {word(run.path)}"


def how_to_go_on(run: RunDir) -> str:
    """Name the last saved state, and the command that goes on from it."""
    states = run.states()
    saved = f"the last saved state is {states[-1].stem}" if states else "there is no saved state yet"
    return f"{saved}. Go on with: {resume_command(run)}"


def next_free(name: str, root: Path = Path("runs")) -> Path:
    """Make the first of runs/NAME, runs/NAME-2, runs/NAME-3 ... that is not there. Raises IOFailure.

    Runs that begin at the same moment get a folder each: one process alone makes a folder."""
    make_folder(root)
    for path in itertools.chain([root / name], (root / f"{name}-{n}" for n in itertools.count(2))):
        try:
            path.mkdir()
            break
        except FileExistsError:
            continue
        except OSError as e:
            raise IOFailure(f"{path}: cannot make the folder: {e.strerror}") from None
    return path


def of_run(saved: dict[str, Any]) -> dict[str, Any]:
    """Complete the settings of a run, which may be older than some of them: it kept all checkpoints, no older states, put nothing
    before a document, and took no dropout from the adapters that it went on with."""
    before: dict[str, Any] = {"keep_checkpoints": 0, "ladder_mib": 0, "bos": "none"}
    if saved.get("lora_init"):
        before["lora_dropout"] = 0.0
    return before | saved
