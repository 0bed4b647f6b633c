"""Read the files of a run directory, finished or not, as a Run."""

from __future__ import annotations

import itertools
import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import InputNotFound, MalformedFile
from ..common.files import lines_of, opened, read_json
from ..common.run_paths import run_of
from ..evidence.verdict import read_verdict
from .charts import DRAWABLE

SERIES = ("train_loss", "grad_norm", "weight_norm", "lr", "tokens_per_sec", "tokens_seen", "wall_ms")
TOKEN, PAIR = "nats/token", "a pair"  # units of a loss
CHUNK_BYTES = 1 << 20  # of metrics.jsonl that are parsed at once


@dataclass
class Run:
    """Contents of a run directory."""

    config: dict[str, Any]
    verdict: dict[str, Any] | None
    step: np.ndarray  # of every training step that is logged
    # The columns SERIES at those steps, and the losses of the sources of a mixture; nan where a line has no figure.
    series: dict[str, np.ndarray]
    evaluations: list[dict[str, Any]]
    spot_checks: list[dict[str, Any]]
    passes: list[dict[str, Any]]
    tasks: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    ckpt: Path

    def tokens_at(self, step: float) -> float:
        """Return the tokens seen when a step was done; between logged steps in proportion."""
        return float(np.interp(step, np.append(0, self.step), np.append(0, self.series["tokens_seen"])))

    def setting(self, name: str) -> Any:
        """Return a setting of config.json, None where it has none."""
        return self.part("settings").get(name)

    @property
    def loss_unit(self) -> str:
        """Unit of the loss: of tokens, or of pairs of preferences, which no yardstick of text is for."""
        return loss_unit(self.evaluations)

    @property
    def sources(self) -> list[str]:
        """Sources of a mixture, by name."""
        return _sources(self.config)

    def part(self, name: str) -> dict[str, Any]:
        """Return an object of config.json, {} where it has none."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}


def loss_unit(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Return the unit of a run's loss, by the figures of its evaluations."""
    return PAIR if any("val_accuracy" in line for line in evaluations) else TOKEN


def load(run_dir: Path) -> Run:
    """Read a run directory, finished or not. Raises InputNotFound, MalformedFile."""
    path = run_dir / "config.json"
    if not path.is_file():
        run = run_of(run_dir)
        hint = "give the --run-dir of `apr pretrain`" if run is None else f"the folder of the run is {run}"
        raise InputNotFound(f"{run_dir}: {'no run in it' if run_dir.is_dir() else 'no such folder'}; {hint}")
    config = read_json(path)
    if not isinstance(config, dict):
        raise MalformedFile(f"{path}: expected a JSON object")
    columns = [*SERIES, *(f"train_loss/{name}" for name in _sources(config))]
    flat = array("d")  # 8 bytes a figure: a run may have a million steps
    other: list[dict[str, Any]] = []
    for line in _lines(run_dir / "metrics.jsonl", "step"):
        if "train_loss" not in line:
            other.append(line)
            continue
        try:
            flat.append(line["step"])
            flat.extend(map(line.get, columns, itertools.repeat(math.nan)))
        except (TypeError, OverflowError):
            raise MalformedFile(
                f"{run_dir / 'metrics.jsonl'}: a figure of step {line['step']} is not a number"
            ) from None
    table = np.frombuffer(flat, np.float64).reshape(-1, 1 + len(columns)).copy()
    series = dict(zip(columns, table[:, 1:].T, strict=True))
    seen = series["tokens_seen"]
    np.copyto(seen, 0.0, where=~np.isfinite(seen))
    evaluations = [e for e in other if "val_loss" in e]
    for e in evaluations:
        value = e["val_loss"]
        if not isinstance(value, int | float) or DRAWABLE < abs(value) < math.inf:
            raise MalformedFile(f"{run_dir / 'metrics.jsonl'}: val_loss of step {e['step']} is not a number")
    return Run(
        config,
        read_verdict(run_dir),
        table[:, 0],
        series,
        evaluations,
        [e for e in other if "spot_check" in e],
        [e for e in other if "passes" in e],
        [e for e in other if isinstance(e.get("tasks"), dict)],
        [s for s in _lines(run_dir / "samples.jsonl", "step") if isinstance(s.get("text"), str)],
        run_dir / "ckpt",
    )


def _sources(config: dict[str, Any]) -> list[str]:
    """List the sources of a mixture, by name."""
    data = config.get("data")
    mixture = data.get("mixture") if isinstance(data, dict) else None
    return list(mixture) if isinstance(mixture, dict) else []


def _lines(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON lines file, each with a whole number `key`; nothing where there is no file.

    A last line cut short, by a crash or because it is being written, is left out."""
    if not path.is_file():
        return
    number = 0
    with opened(path) as (f, _):
        chunks = _chunks(lines_of(f, str(path)))
        lines = next(chunks, [])
        while lines:
            following = next(chunks, [])
            try:  # one call for many lines is faster
                found = json.loads(b"[" + b",".join(lines) + b"]")
            except (ValueError, RecursionError):
                found = [_parsed(line) for line in lines]
                if found[-1] is None and not following:
                    found.pop()
            for d in found:
                number += 1
                if not isinstance(d, dict) or type(d.get(key)) is not int or not 0 <= d[key] < 2**53:
                    raise MalformedFile(f"{path}: line {number} is not a JSON object with a {key}")
                yield d
            lines = following


def _chunks(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Group lines to at least CHUNK_BYTES."""
    chunk: list[bytes] = []
    size = 0
    for line in lines:
        chunk.append(line)
        size += len(line)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    yield chunk


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
