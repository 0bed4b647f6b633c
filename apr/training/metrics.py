"""Write and read metrics.jsonl and samples.jsonl, the log of a run."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from ..common.atomic import check_output, explain, write_text
from ..common.errors import IOFailure, MalformedFile
from ..common.files import lines_of, opened
from ..common.units import plural

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class MetricsLog:
    """metrics.jsonl and samples.jsonl in the folder of a run: a JSON object a line, each with its step."""

    def __init__(self, run: Path) -> None:
        self.path, self.samples = run / METRICS, run / SAMPLES
        # Steps behind the state, of the process that was stopped; of no use where the run is made longer.
        self.witnesses: dict[int, dict[str, Any]] = {}
        self.is_longer = False
        self._file: TextIO | None = None
        # Bytes that are written, and what keeps apart two threads that use the file.
        self._bytes, self._lock = 0, threading.Lock()

    def open(self, step: int, evaluated: int) -> None:
        """Open both files to add to them, without the lines that an interrupted run wrote after `step`, and after the step
        `evaluated` of its latest evaluation. step -1: of a run that begins anew.

        Raises MalformedFile: damaged, or lines up to that step are gone."""
        if self.path.exists() or step >= 0:
            lines = list(read_lines(self.path))
            kept = [
                line
                for line in lines
                if line["step"] <= (evaluated if step >= 0 and "val_loss" in line else step)
            ]
            behind = [line for line in lines if "train_loss" in line and line["step"] > step >= 0]
            self.witnesses = {} if self.is_longer else {line["step"]: line for line in behind}
            have = [line["step"] for line in kept if "train_loss" in line]
            if have != list(range(1, max(step, 0) + 1)):
                raise MalformedFile(
                    f"{self.path}: has {plural(len(have), 'step')} up to step {step}, which the saved "
                    f"state continues; restore the "
                    f"file, or go on from an earlier state by moving the later ones out of {self.path.parent}/ckpt/state"
                )
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if self.samples.exists():
            last = min(step, evaluated)
            samples = [line for line in read_lines(self.samples, strict=False) if line["step"] <= last]
            write_text(self.samples, "".join(json.dumps(line) + "\n" for line in samples))
        try:
            self._file = check_output(self.path).open("a+", encoding="utf-8")
        except OSError as e:
            raise IOFailure(explain(self.path, e)) from None
        self._bytes = os.fstat(self._file.fileno()).st_size

    def write(self, **line: Any) -> None:
        """Add a line to metrics.jsonl."""
        assert self._file is not None
        try:
            with self._lock:
                # ASCII: as many bytes as characters.
                count = self._file.write(json.dumps(line) + "\n")
                self._file.flush()
                self._bytes += count
        except OSError as e:
            raise IOFailure(explain(self.path, e)) from None

    def write_sample(self, **line: Any) -> None:
        """Add a line to samples.jsonl."""
        try:
            with check_output(self.samples).open("a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
        except OSError as e:
            raise IOFailure(explain(self.samples, e)) from None

    def sync(self) -> None:
        """Bring metrics.jsonl to the disk: lines that a saved state continues must outlive a power failure.

        One that was removed, or exchanged for another, is written again. Raises IOFailure: it was cut, and lines are lost."""
        if self._file is None:
            return
        with suppress(OSError):
            os.fsync(self._file.fileno())
        with self._lock:  # training goes on meanwhile
            self._repair()

    def _repair(self) -> None:
        assert self._file is not None
        fd = self._file.fileno()
        size = os.fstat(fd).st_size
        if size < self._bytes:
            raise IOFailure(
                f"{self.path}: was cut while the run writes it: {plural(size, 'byte')}, it had {self._bytes}; restore it, "
                "and go on with --resume"
            )
        is_there = self.path.exists() and os.path.samestat(os.stat(self.path), os.fstat(fd))
        if not is_there and self.path.parent.is_dir():
            write_text(self.path, os.pread(fd, size, 0).decode())
            self._file.close()
            self._file = self.path.open("a+", encoding="utf-8")

    def close(self) -> None:
        """Close metrics.jsonl."""
        if self._file is not None:
            # A line that could not be written has been reported.
            with suppress(OSError):
                self._file.close()
            self._file = None

    def lines(self) -> list[dict[str, Any]]:
        """Read all lines of metrics.jsonl. Raises MalformedFile."""
        return list(read_lines(self.path))


def read_lines(path: Path, strict: bool = True) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log but a last one that a crash has cut short; without `strict`, but all damaged ones.

    Raises MalformedFile."""
    damaged = 0
    with opened(path, "the saved state continues it; restore the file") as (f, _):
        for number, line in enumerate(lines_of(f, str(path)), 1):
            if damaged and strict and line.strip():
                raise MalformedFile(
                    f"{path}: line {damaged} is not a line of metrics; restore the file from a copy"
                )
            try:
                d = json.loads(line)
            except (ValueError, RecursionError):  # no JSON, or no UTF-8
                d = None
            if isinstance(d, dict) and isinstance(d.get("step"), int):
                yield d
            else:
                damaged = damaged or number
