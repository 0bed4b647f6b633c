"""Plants every fault of the catalogue in a small model and says what bisect finds."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from re import fullmatch
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ... import backends
from ...data.documents import Document
from ...data.shard_writer import ShardWriter
from ...model.config import ModelConfig
from ...model.params import Layout
from ...model.presets import PRESETS
from ...tokenizer.training import train_tokenizer
from .. import batch as batches
from ..report import Report, Row
from ..rule import Backend
from ..stages import Side, run
from .faults import DATA, FAULTS, Fault

SHAPE = (2, 17)
DOCUMENT_END = 5  # of faults that show between documents only
TINY = ("qwen2-tiny", "qwen3-tiny", "mistral-tiny", "llama3-tiny", "llama-tiny")


@dataclass(frozen=True)
class Found:
    """What bisect said first of a fault; row is None when it found nothing."""

    fault: Fault
    model: str
    row: Row | None
    seconds: float

    @property
    def named(self) -> bool:
        """Whether it is what the catalogue says."""
        n, r = self.fault.named, self.row
        return r is not None and all(
            fullmatch(wanted, said) for wanted, said in ((n.stage, r.stage), (n.op, r.op), (n.tap, r.tap))
        )


def model_for(fault: Fault) -> str:
    """The first tiny preset that a fault can be seen in."""
    return next(name for name in TINY if fault.applies(PRESETS[name]))


def weights_of(cfg: ModelConfig, seed: int = 0) -> np.ndarray:
    """Random weights with noise on every parameter, biases and norms too, as the checks of tests use them."""
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
    """Token shards of a passage of text."""
    text = batches.PASSAGE
    tokenizer = train_tokenizer([text], 300, folder / "tokenizer")
    with ShardWriter(folder / "train", tokenizer) as out:
        for i, part in enumerate(text.splitlines()):
            document = Document(f"part {i}", part)
            out.begin(document.sha256, len(document.data))
            out.append(tokenizer.encode(part))
            out.end()
    return folder


def plant_all(be: Backend, dtype: str) -> Iterator[Found]:
    """Every fault in turn."""
    for fault in FAULTS.values():
        start = time.perf_counter()
        report = bisect(fault, be, dtype)
        yield Found(fault, model_for(fault), report.first, time.perf_counter() - start)


def print_catalogue(as_json: bool = False) -> int:
    """Plant all faults on the cpu backend; the table. Returns 0 when each was named as it must be, else 9."""
    console = Console(highlight=False, quiet=as_json)
    rows: list[dict[str, Any]] = []
    if not console.is_terminal:
        console.width = 200
    table = Table(box=None, pad_edge=False)
    for title in ("fault", "what it does", "found by", "op named", "tap", "s"):
        table.add_column(title, overflow="fold")
    for f in plant_all(backends.get("cpu"), "float32"):
        r = f.row
        rows.append(
            dict(
                fault=f.fault.name, what=f.fault.what, model=f.model, named=f.named, seconds=round(f.seconds, 3),
                stage=r and r.stage, op=r and r.op, tap=r and r.tap, cause=r and r.cause,
            )
        )  # fmt: skip
        stage, op, tap = (r.stage, r.op, r.tap) if r else ("NOT FOUND", "", "")
        said = op if f.named else f"{op}, NOT {f.fault.named.op}"
        table.add_row(*map(Text, (f.fault.name, f.fault.what, stage, said, tap, f"{f.seconds:.2f}")))
    console.print(table)
    good = sum(r["named"] for r in rows)
    console.print(f"{good} of {len(rows)} faults were found and named as the catalogue says.")
    if as_json:
        print(json.dumps(rows, indent=1))
    return 0 if good == len(rows) else 9
