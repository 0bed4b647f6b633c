"""Compute the disk that a run takes, before it begins."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common.errors import Refused
from ..common.rounding import round_up
from ..common.units import in_bytes, plural
from ..model.config import ModelConfig
from ..model.lora import AdapterLayout, LoraConfig
from ..model.optim import Optimizer, optimizer_class
from ..model.params import Layout
from .inputs import Inputs
from .ladder import kept, most_rungs
from .rundir import RunDir
from .settings import Settings

ALIGN = 64  # bytes, of tensors in a file
META_BYTES = 16 << 10  # of configuration and the like in a file
TENSOR_BYTES = 100  # of a tensor in the index of a file
LINE_BYTES = 400  # of a step or an evaluation in metrics.jsonl
PAGE_BYTES = 1 << 20  # of report, picture, configuration, verdict and hashes


@dataclass(frozen=True)
class Disk:
    """Bytes of the files of a run, and how many of them are there at most: those kept, and one that is being written."""

    checkpoint: int
    checkpoints: int
    state: int
    states: int
    rungs: int
    log: int

    @property
    def total(self) -> int:
        """Sum of all, bytes."""
        return self.checkpoint * self.checkpoints + self.state * (self.states + self.rungs) + self.log

    def in_words(self, free: int | None) -> str:
        """Describe it in a line; free: bytes, None where the system does not say."""
        checkpoints = f"{plural(self.checkpoints, 'checkpoint')} of {in_bytes(self.checkpoint)}"
        states = f"{plural(self.states, 'state')} of {in_bytes(self.state)}"
        states += f" and {self.rungs} older for replay" if self.rungs else ""
        there = f"; {in_bytes(free)} are free" if free is not None else ""
        return f"at most {in_bytes(self.total)}: {checkpoints}, {states}{there}"


def disk(
    cfg: ModelConfig,
    dtype: str,
    s: Settings,
    optimizer: type[Optimizer],
    lora: LoraConfig | None,
    texts: int = 0,
    is_long: bool = False,
) -> Disk:
    """Compute the disk of a job. texts: bytes of tokenizer and side files in every checkpoint; is_long: of one so long that
    its older states fill --ladder-mib."""
    full, adapters = Layout(cfg), AdapterLayout(cfg, lora) if lora else None
    checkpoint = _file(full, dtype) + META_BYTES + texts
    checkpoint += _file(adapters, "float32") if adapters else 0
    arrays = 1 + len(optimizer.moments)
    state = arrays * _file(adapters or full, "float32") + META_BYTES
    older = (most_rungs if is_long else kept)(s, 4 * arrays * (adapters or full).size)
    due = -(-s.num_steps // (s.checkpoint_every or s.eval_every))
    # The best one, and the new one before an old one is removed.
    checkpoints = min(due, s.keep_checkpoints + 2) if s.keep_checkpoints else due
    states = min(-(-s.num_steps // (s.save_every or s.eval_every)), s.keep_states + 1)
    lines = s.num_steps + s.num_steps // s.eval_every
    return Disk(checkpoint, checkpoints, state, states, older, PAGE_BYTES + LINE_BYTES * lines)


def _file(layout: Layout | AdapterLayout, dtype: str) -> int:
    """Bytes of all tensors in a file."""
    width = np.dtype(dtype).itemsize
    return sum(TENSOR_BYTES + round_up(slot.size * width, ALIGN) for slot in layout.slots)


def need(i: Inputs) -> Disk:
    """Compute the disk of a run."""
    assert i.settings.dtype is not None
    texts = len(str(i.carried)) + len(i.tokenizer.json)
    return disk(i.cfg, i.settings.dtype, i.settings, optimizer_class(i.settings), i.lora, texts)


def free_bytes(folder: Path) -> int | None:
    """Measure what is free on the disk of a folder, which need not be there yet; None where the system does not say."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        usage = shutil.disk_usage(there)
    except OSError:
        return None
    # A file system without a size, such as /sys, has no room that could be told.
    return usage.free if usage.total else None


def check(i: Inputs) -> None:
    """Raise Refused for a run that does not fit on its disk, with what it has there already."""
    folder, planned = Path(i.settings.run_dir or "runs"), need(i)
    free, there = free_bytes(folder), 0
    if i.settings.resume:
        there = sum(p.stat().st_size for p in RunDir(folder).ckpt.rglob("*") if p.is_file())
    if free is not None and planned.total > free + there:
        raise Refused(
            f"{folder}: the run takes {planned.in_words(free)} there; make room, choose another --run-dir, or lower "
            "--keep-checkpoints, --keep-states or --ladder-mib"
        )
