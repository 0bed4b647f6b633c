"""Spot checks of a run that trains: a piece of the current batch through the reference, with the current weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..backends import reference
from ..common.host import available_memory
from ..model.cost import memory
from ..model.transformer import Model
from .passes import forced
from .report import Report
from .side import Batch
from .upload import borders

NOISE = 0.05
SEQUENCES, POSITIONS = 2, 32  # at most so much of a micro-batch, so that a check takes seconds


def spot_check(model: Model, ids: np.ndarray, targets: np.ndarray, name: str) -> Report:
    """Compare every op of forward, loss and backward of a piece of a micro-batch with the reference in float64.

    model: in training, between two optimizer steps; its buffers are written to, its weights are not, and its gradients
    are zero afterwards. The report has no rows and says why when memory is short.
    """
    piece = slice(0, SEQUENCES), slice(0, POSITIONS)
    ids, targets = np.ascontiguousarray(ids[piece]), np.ascontiguousarray(targets[piece])
    words = f"{ids.shape[0]} x {ids.shape[1]} tokens of the current batch"
    batch = Batch(ids, targets, words, model.document_end)
    report = Report(name, ("reference float64", f"{model.be.name} {model.dtype}"), batch.words)
    if batch.shape[1] < 2:
        report.skipped["forward"] = "one position shows no fault of attention"
        return report
    need, have = _bytes(model, batch), available_memory()
    if have is not None and need > have:
        report.skipped["forward"] = (
            f"the reference in float64 needs {need / 2**30:.1f} GiB of main memory, {have / 2**30:.1f} GiB are free"
        )
        return report
    with _shaken(model):
        watch = forced(model.cfg, model, batch, optimizer=False)
    report.add(watch.rows)
    report.add(borders(model, batch))
    model.be.fill(model.g, 0)
    model.be.fill(model.total, 0)
    return report


@contextmanager
def _shaken(model: Model) -> Iterator[None]:
    """Add noise to constant vectors, and to adapters that are zero, for the time of the check, and restore them bit for bit.

    All norms and biases are constant at the start; a dropped bias of zeros would not show."""
    cut, adapters = model.layout.decayed, model.adapters
    parts = [(model.w[cut:], cut, model.layout.slots)]
    if adapters:
        parts.append((adapters.w, 0, adapters.layout.slots))
    before = [model.be.to_host(flat) for flat, _, _ in parts]
    rng = np.random.default_rng(0)
    for (flat, start, slots), values in zip(parts, before, strict=True):
        noisy = values.astype(np.float32)
        for s in slots:
            x = noisy[max(0, s.offset - start) : max(0, s.offset - start + s.size)]
            if x.size and (x == x[0]).all():
                x += NOISE * rng.standard_normal(x.size, np.float32)
        model.be.from_host(flat, noisy)
    try:
        yield
    finally:
        for (flat, _, _), values in zip(parts, before, strict=True):
            model.be.from_host(flat, values)


def _bytes(model: Model, batch: Batch) -> int:
    """Bound the bytes of main memory, those to compare the largest array included."""
    lora = model.adapters.config if model.adapters else None
    job = memory(model.cfg, reference, *batch.shape, dtype="float64", optimizer=None, lora=lora).total
    return job + 4 * 8 * model.cfg.vocab_size * model.cfg.hidden_size
