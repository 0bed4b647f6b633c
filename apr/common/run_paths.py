"""Find the run that a path lies in, for messages that name the path that was meant."""

from __future__ import annotations

import os
import re
from pathlib import Path

LEVELS = 3  # RUN/ckpt/state/step-000100.apr


def run_of(path: Path) -> Path | None:
    """Find the run directory that a path is, or lies in; None where there is none."""
    at = Path(os.path.normpath(path))
    for folder in [at, *at.parents[:LEVELS]]:
        if (folder / "ckpt").is_dir() and (folder / "config.json").is_file():
            return folder
    return None


def latest_checkpoint(run: Path) -> Path | None:
    """Find the newest epoch-NNN.apr of a run directory or of its ckpt/, by number; None where there is none."""
    found = [p for p in [*run.glob("epoch-*.apr"), *run.glob("ckpt/epoch-*.apr")] if _number(p)]
    return max(found, key=_number, default=None)


def is_state(path: Path) -> bool:
    """Tell a saved state, from which a run is resumed, by the name that a run gives it."""
    return bool(re.fullmatch(r"step-\d{6,}\.apr", path.name)) and path.parent.name == "state"


def instead_of(path: Path) -> str:
    """Name what to give where a checkpoint is wanted, for a path of a run that is none; "" for any other path."""
    run = run_of(path)
    folder = run if run is not None else path
    checkpoint = latest_checkpoint(folder) if folder.is_dir() else None
    if run is None and checkpoint is None:
        return ""
    if checkpoint is None:
        return "the run has no checkpoint yet: the first is written at the first evaluation"
    return f"give a checkpoint of the run, such as {checkpoint}"


def _number(path: Path) -> int:
    match = re.fullmatch(r"epoch-(\d{3,})\.apr", path.name)
    return int(match[1]) + 1 if match else 0
