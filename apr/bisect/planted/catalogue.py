"""Plant every fault of the catalogue in a small model and bisect it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from re import fullmatch
from typing import Any

import numpy as np

from ...data.documents import Document
from ...data.shard_writer import ShardWriter
from ...model.config import ModelConfig
from ...model.params import Layout
from ...model.presets import PRESETS
from ...tokenizer.training import train_tokenizer
from .. import batch as batches
from ..report import ArrayComparison, Report
from ..rule import Backend
from ..side import Side
from ..stages import run
from .fault import DATA, Fault
from .faults import FAULTS

SHAPE = (2, 17)
DOCUMENT_END = 5  # of faults that show between documents only
TINY = ("qwen2-tiny", "qwen3-tiny", "mistral-tiny", "llama3-tiny", "llama-tiny", "olmo2-tiny", "smollm3-tiny")


@dataclass(frozen=True)
class Planted:
    """Result of bisecting a planted fault; row: the first guilty comparison, None when none was found."""

    fault: Fault
    model: str
    row: ArrayComparison | None
    seconds: float

    @property
    def is_named(self) -> bool:
        """True when stage, op and tap are those of the catalogue."""
        n, r = self.fault.named, self.row
        return r is not None and all(
            fullmatch(pattern, text) for pattern, text in ((n.stage, r.stage), (n.op, r.op), (n.tap, r.tap))
        )


def model_for(fault: Fault) -> str:
    """Return the first tiny preset whose ops can show a fault."""
    return next(name for name in TINY if fault.applies(PRESETS[name]))


def weights_of(cfg: ModelConfig, seed: int = 0) -> np.ndarray:
    """Draw random weights with noise on every parameter, biases and norms too."""
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    layout.randomise(host, seed, std=0.2)
    return host


def bisect(fault: Fault, be: Backend, dtype: str, name: str = "") -> Report:
    """Bisect a side with a fault beside the reference."""
    name = name or model_for(fault)
    cfg = PRESETS[name]
    given = batches.at_random(cfg, SHAPE, 0)
    if fault.documents:
        given = batches.in_documents(given, DOCUMENT_END)
    report = Report(name, ("reference float64", f"{be.name} {dtype}"), given.words)
    if fault.seen_by == DATA:
        with tempfile.TemporaryDirectory() as folder, fault.patch():
            report.add(batches.from_dataset(str(tiny_dataset(Path(folder))), SHAPE, 0, vocab_size=10**6)[1])
        return report
    believed = fault.config(cfg)
    side = Side(fault.backend(be, cfg), believed, dtype)
    return run(cfg, side, weights_of(cfg), given, report)


def tiny_dataset(folder: Path) -> Path:
    """Write token shards of a passage of text."""
    text = batches.PASSAGE
    tokenizer = train_tokenizer([text], 300, folder / "tokenizer")
    with ShardWriter(folder / "train", tokenizer) as out:
        for i, part in enumerate(text.splitlines()):
            document = Document(f"part {i}", part)
            out.begin(document.sha256, len(document.data))
            out.append(tokenizer.encode(part))
            out.end()
    return folder


def plant_all(be: Backend, dtype: str) -> Iterator[Planted]:
    """Plant and bisect every fault in turn."""
    for fault in FAULTS.values():
        start = time.perf_counter()
        report = bisect(fault, be, dtype)
        yield Planted(fault, model_for(fault), report.first, time.perf_counter() - start)


def catalogue_json(planted: Sequence[Planted]) -> list[dict[str, Any]]:
    """Planted faults as JSON objects."""
    return [
        dict(
            fault=p.fault.name, what=p.fault.what, model=p.model, named=p.is_named, seconds=round(p.seconds, 3),
            stage=p.row and p.row.stage, op=p.row and p.row.op, tap=p.row and p.row.tap, cause=p.row and p.row.cause,
        )
        for p in planted
    ]  # fmt: skip
