"""Reference of preferences: log-probabilities of all answers by the model before its first step, computed once for a run.

RUN/reference.bin holds float64, two for each pair: those to train on (where the loss asks for them) and those to validate with,
in the order of the rows. config.json has its SHA-256. A process that goes on, or computes steps again, reads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from ..common.atomic import atomic_write
from ..common.errors import MalformedFile, Refused
from ..common.files import opened
from ..data.batches import Windows, sequential
from ..model.preferences import Preferences, PreferenceSettings, row_losses
from ..model.transformer import Model
from .rundir import RunDir

REFERENCE = "reference.bin"
RECORD = "reference"
# Rows of which the keys of answers are made at a time.
ROWS = 64


def preferences_of(s: PreferenceSettings, train: Windows, document_end: int | None) -> Preferences | None:
    """Make the loss of pairs, where the data holds pairs; None elsewhere."""
    if not train.shards.facts.get("pairs") or document_end is None:
        return None
    return Preferences(s, document_end)


def sides_with_reference(p: Preferences, train: Windows, val: Windows) -> list[Windows]:
    """List the windows whose answers have a reference: without one in its loss, it still says how far answers moved."""
    return [train, val] if p.kind.has_reference else [val]


def _keys(p: Preferences, sides: list[Windows]) -> Iterator[bytes]:
    """Yield the key of every answer, in the order of the file."""
    for windows in sides:
        for ids, targets in sequential(windows, ROWS):
            p.width = ids.shape[1]
            for pair in p.pairs(ids, targets):
                yield from (p.key(ids.reshape(-1), targets.reshape(-1), place) for place in pair)


def use_reference(p: Preferences, run: RunDir, train: Windows, val: Windows) -> bool:
    """Take the reference that a run has; False where it has none yet. Raises MalformedFile."""
    record, path = run.read_config().get(RECORD), run.path / REFERENCE
    if record is None:
        return False
    with opened(path, "the run cannot go on without it; restore it from a copy") as (f, _):
        data = f.read()
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise MalformedFile(f"{path}: not the file that config.json has the hash of; restore it from a copy")
    values, keys = np.frombuffer(data, "<f8"), list(_keys(p, sides_with_reference(p, train, val)))
    if len(keys) != values.size:
        raise MalformedFile(f"{path}: {values.size:,} log-probabilities for {len(keys):,} answers")
    p.reference = dict(zip(keys, values.tolist(), strict=True))
    return True


def have_reference(model: Model, run: RunDir, train: Windows, val: Windows, may_compute: bool) -> None:
    """Take the reference of a run, or compute it where it begins; nothing without preferences. Raises Refused: there is none."""
    if model.preferences is None or use_reference(model.preferences, run, train, val):
        return
    if not may_compute:
        raise Refused(
            f"{run.path}: its config.json knows no reference of the preferences; begin again in another --run-dir"
        )
    compute_reference(model, run, train, val)


def compute_reference(model: Model, run: RunDir, train: Windows, val: Windows) -> None:
    """Compute the log-probabilities of all answers by the model as it is, and write them. Raises Refused: not finite."""
    p, values = model.preferences, list[float]()
    assert p is not None
    for windows in sides_with_reference(p, train, val):
        for ids, targets in sequential(windows, model.batch):
            values += (
                a.logp for _, *pair in p.answers(ids, targets, row_losses(model, ids, targets)) for a in pair
            )
    found = np.array(values, "<f8")
    if not np.isfinite(found).all():
        raise Refused(
            "--preferences: the checkpoint gives log-probabilities that are not finite; `apr validate` looks at it"
        )
    with atomic_write(run.path / REFERENCE) as f:
        f.write(found.tobytes())
    sha256 = hashlib.sha256(found.tobytes()).hexdigest()
    run.record(RECORD, {"sha256": sha256, "answers": found.size})
    use_reference(p, run, train, val)
