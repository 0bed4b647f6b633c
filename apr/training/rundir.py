"""The run directory: config.json, metrics.jsonl, checkpoints, states that --resume needs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from ..checkpoints.apr2 import write_apr
from ..checkpoints.apr2_metadata import config_to_metadata, embed_tokenizer
from ..checkpoints.state import TrainingState, sha256
from ..common.atomic import explain, write_json, write_text
from ..common.errors import InputNotFound, IOFailure, MalformedFile, Refused
from ..common.files import opened, read_json
from ..common.version import __version__
from ..evidence.gates import FORMAT, Gates
from ..model.transformer import Model
from ..tokenizer.tokenizer import Tokenizer

METRICS, SAMPLES, EVIDENCE = "metrics.jsonl", "samples.jsonl", "evidence.json"


def versions() -> dict[str, str]:
    """Versions of everything that computes."""
    found = {"apr": __version__, "python": platform.python_version()}
    for package in ("numpy", "numba", "scipy-openblas64", "tokenizers"):
        with suppress(PackageNotFoundError):  # a GPU can do without the CPU's packages
            found[package] = version(package)
    return found


def git_commit() -> str | None:
    """Commit of the checkout that apr runs from, with + when files differ; $APR_COMMIT where that is set, for
    copies of one. None outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    if "APR_COMMIT" in os.environ or not (here / ".git").exists():
        return os.environ.get("APR_COMMIT")
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+" if _git(here, "status", "--porcelain", "apr") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def code_sha256() -> str:
    """SHA-256 of all of apr's own source, Python and CUDA, by path."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cu", ".cuh", ".html")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class RunDir:
    """Paths and files of one run. Everything is written whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ckpt = path / "ckpt"
        self.state = self.ckpt / "state"
        self._metrics: TextIO | None = None

    def create(self, config: dict[str, Any]) -> None:
        """Make the folders and config.json. Raises Refused when a run is there already."""
        metrics = self.path / "metrics.jsonl"
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

    def record_device(self, facts: dict[str, Any]) -> None:
        """Say in config.json what computes."""
        write_json(self.path / "config.json", {**self.read_config(), "device": facts})

    def read_config(self) -> dict[str, Any]:
        """config.json of an existing run."""
        path = self.path / "config.json"
        if not path.is_file():
            raise InputNotFound(f"{path}: no run here; give the folder of one")
        d = read_json(path)
        if not isinstance(d, dict) or not isinstance(d.get("settings"), dict):
            raise MalformedFile(f"{path}: no settings in it; the run cannot be resumed")
        return d

    def clean(self) -> None:
        """Remove what a process that was killed while it wrote has left; to be called while the folder is locked.

        The evidence of an earlier end goes too: it is not true of a run that goes on."""
        for left in [*self.path.glob(".*.tmp"), *self.ckpt.glob("**/.*.tmp"), self.path / EVIDENCE]:
            left.unlink(missing_ok=True)

    # Metrics and samples

    def open_metrics(self, step: int, evaluated: int) -> None:
        """Open metrics.jsonl and samples.jsonl to add to them, dropping what an interrupted run wrote after a step, and
        after the step of its latest evaluation. Raises MalformedFile: damaged, or lines up to that step are gone."""
        path = self.path / METRICS
        if path.exists() or step >= 0:
            kept = [
                line
                for line in _lines(path)
                if line["step"] <= (evaluated if step >= 0 and "val_loss" in line else step)
            ]
            have = [line["step"] for line in kept if "train_loss" in line]
            if have != list(range(1, max(step, 0) + 1)):
                raise MalformedFile(
                    f"{path}: has {len(have)} steps up to step {step}, which the saved state continues; restore the "
                    f"file, or go on from an earlier state by moving the later ones out of {self.state}"
                )
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        path = self.path / SAMPLES
        if path.exists():
            samples = [line for line in _lines(path, strict=False) if line["step"] <= min(step, evaluated)]
            write_text(path, "".join(json.dumps(line) + "\n" for line in samples))
        try:
            self._metrics = (self.path / METRICS).open("a", encoding="utf-8")
        except OSError as e:
            raise IOFailure(explain(self.path / METRICS, e)) from None

    def log(self, **line: Any) -> None:
        """Add a line to metrics.jsonl."""
        assert self._metrics is not None
        try:
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
        except OSError as e:
            raise IOFailure(explain(self.path / METRICS, e)) from None

    def log_sample(self, **line: Any) -> None:
        """Add a line to samples.jsonl."""
        try:
            with (self.path / SAMPLES).open("a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
        except OSError as e:
            raise IOFailure(explain(self.path / SAMPLES, e)) from None

    def close(self) -> None:
        """Close metrics.jsonl."""
        if self._metrics is not None:
            with suppress(OSError):  # what could not be written has been reported
                self._metrics.close()
            self._metrics = None

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return list(_lines(self.path / METRICS))

    def save_verdict(
        self, gates: Gates, status: str, steps: int, val_loss: float | None, message: str = ""
    ) -> dict[str, Any]:
        """Write verdict.json; status RUNNING while the run goes on. Returns what it says."""
        verdict = {
            "format": FORMAT,
            "status": status,
            "verdict": gates.verdict,
            "message": message,
            "steps": steps,
            "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None,
            "bounds_changed": gates.given,
            "gates": gates.to_json(),
        }
        write_json(self.path / "verdict.json", verdict)
        return verdict

    # Checkpoints

    def save_epoch(
        self,
        epoch: int,
        model: Model,
        state: TrainingState,
        tokenizer: Tokenizer,
        facts: dict[str, Any],
        evaluation: dict[str, Any],
        carried: dict[str, Any] | None = None,
    ) -> Path:
        """ckpt/epoch-NNN.apr with weights, architecture, tokenizer and what its validation loss was measured on, and its
        metadata.json."""
        path = self.ckpt / f"epoch-{epoch:03d}.apr"
        w = model.be.to_host(model.w)
        meta = {**config_to_metadata(model.cfg), "evaluation": evaluation, **(carried or {})}
        embed_tokenizer(meta, tokenizer.json, tokenizer.eos_id)
        tensors = model.layout.named(w)
        write_apr(path, meta, tensors, model.dtype)
        hashes = {"optimizer_state_sha": state.optimizer_sha256(), "weights_sha": sha256(tensors.values())}
        facts = {"epoch": epoch, **facts, **hashes}
        write_json(path.with_name(f"epoch-{epoch:03d}.metadata.json"), facts)
        return path

    def save_state(self, state: TrainingState, progress: dict[str, Any], keep: int) -> Path:
        """Write ckpt/state/step-NNNNNN.apr; remove all states but the latest `keep`."""
        path = self.state / f"step-{progress['step']:06d}.apr"
        if self._metrics is not None:  # what a state continues must be there after a power failure too
            with suppress(OSError):
                os.fsync(self._metrics.fileno())
        state.save(path, progress)
        for old in self.states()[:-keep]:
            old.unlink(missing_ok=True)
        return path

    def checkpoints(self) -> list[Path]:
        """Checkpoints of the epochs, oldest first, by number: epoch-1000 comes after epoch-999."""
        found = [p for p in self.ckpt.glob("epoch-*.apr") if re.fullmatch(r"epoch-\d{3,}", p.stem)]
        return sorted(found, key=lambda p: int(p.stem[6:]))

    def states(self) -> list[Path]:
        """Saved states, oldest first."""
        found = [p for p in self.state.glob("step-*.apr") if re.fullmatch(r"step-\d{6,}", p.stem)]
        return sorted(found, key=lambda p: int(p.stem[5:]))

    def has_state(self) -> bool:
        """Whether there is a state to go on from. Raises MalformedFile where all that were saved are damaged: to begin
        again would write over the checkpoints of the run."""
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


def next_free(name: str, root: Path = Path("runs")) -> Path:
    """runs/NAME, or runs/NAME-2, runs/NAME-3 ...: the first that holds no run."""
    number = 1
    while True:
        path = root / (name if number == 1 else f"{name}-{number}")
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return path
        number += 1


def _lines(path: Path, strict: bool = True) -> Iterator[dict[str, Any]]:
    """Lines of metrics.jsonl or samples.jsonl; a last line cut short by a crash is left out, and without `strict` every
    line that is damaged. Raises MalformedFile."""
    with opened(path, "the saved state continues it; restore the file") as (f, size):
        lines = f.read(size).split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for i, line in enumerate(lines):
        try:
            d = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, or no UTF-8
            d = None
        if isinstance(d, dict) and isinstance(d.get("step"), int):
            yield d
        elif strict and i + 1 < len(lines):
            raise MalformedFile(
                f"{path}: line {i + 1} is not a line of metrics; restore the file from a copy"
            )


def bits_per_byte(nats_per_token: float, tokens: int, text_bytes: int) -> float:
    """Loss per token as bits per UTF-8 byte of text."""
    return nats_per_token / math.log(2) * tokens / text_bytes
