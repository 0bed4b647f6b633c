"""Gates of the first step of a process, asked of the trainer as the job built it."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from ..common.events import Evaluated, GradientsReady, Measured, StepBegun
from ..common.finding import Finding
from ..common.units import plural
from ..model.lora_dropout import Draws, Dropout
from ..model.micro_gradients import shares_scales
from ..model.preferences import terms
from ..model.transformer import Model
from . import dropout, scorer
from .gates import Gates
from .measure import final_hidden
from .pairs import judge_pairs
from .slope import Job, slope_finding
from .subject import Subject

# Relative differences of a batch that is computed in other pieces: of its loss, of the norm of its gradients, of a sample.
LOSS = {"float32": 1e-5, "bfloat16": 2e-3}
NORM = {"float32": 1e-4, "bfloat16": 2e-2}
SAMPLE = {"float32": 1e-3, "bfloat16": 1e-1}
SAMPLED_ELEMENTS = 4096


class FirstStep:
    """Gates start.preferences, slope, dropout, borders, averages and validation, once per process. Raises Aborted."""

    def __init__(self, subject: Subject, gates: Gates) -> None:
        self.subject, self.gates = subject, gates
        self.is_first = self.is_first_evaluation = True
        self.pieces: Pieces | None = None
        self.masks: dropout.Masks | None = None

    def evaluated(self, e: Evaluated) -> None:
        """Score the validation windows again."""
        if self.is_first_evaluation:
            self.is_first_evaluation = False
            with self.gates.timed("start.validation"):
                self.gates.judge(scorer.validation(self.subject, e.line), e.line["step"])

    def step_begun(self, e: StepBegun) -> None:
        """Ask the model as it stands, with the batch of the step, and leave no trace in it."""
        if not self.is_first:
            return
        self.is_first = False
        t, gates, model = self.subject, self.gates, self.subject.model
        judge_pairs(t, gates, e)
        if t.settings.seq_length < 2:
            gates.skip("start.slope", "attention over one token has no gradient of queries and keys")
        else:
            tokens = int(np.count_nonzero(e.targets >= 0))
            graph = t.settings.graph and tokens == e.targets.size
            batch = with_borders(t, e.ids[: model.batch]), e.targets[: model.batch]
            with gates.timed("start.slope"):
                scale = 1 / max(1, terms(model.preferences, e.ids, e.targets))
                draws = Draws.of(t.settings.seed, e.step, 0, len(batch[0]))
                job = Job(model, t.whole, t.adapters, batch, scale, graph, draws)
                gates.judge(slope_finding(job), e.step)
        if t.adapters and t.adapters.dropout:
            with gates.timed(dropout.GATE):
                scale = 1 / max(1, terms(model.preferences, e.ids, e.targets))
                recorded = shares_scales(t.backend, model.preferences) or bool((e.targets >= 0).all())
                self.masks = dropout.Masks(t, e.ids, e.targets, scale, t.settings.graph and recorded, e.step)
        else:
            gates.skip(dropout.GATE, "no adapters with dropout")
        with gates.timed("start.borders"):
            gates.judge(borders(t, e.ids[: model.batch]), e.step)
        if len(e.ids) > 1:
            with gates.timed("start.averages"):
                self.pieces = Pieces(t, e.ids, e.targets, e.step)
        else:
            gates.skip("start.averages", "a batch of one sequence has no other pieces")
        if self.masks is not None:
            self.masks.begin_step()

    def gradients_ready(self, e: GradientsReady) -> None:
        """Read a sample of the gradients of the step, and which masks it had."""
        if self.masks is not None:
            masks, self.masks = self.masks, None
            self.gates.judge(masks.finding(), e.step)
        if self.pieces is not None and not self.pieces.is_complete:
            self.pieces.compare(_sample(self.subject, self.subject.optimizer.g, 1))

    def measured(self, e: Measured) -> None:
        """Judge the line of the step beside the same batch in other pieces."""
        if self.pieces is not None and "train_loss" in e.line:
            pieces, self.pieces = self.pieces, None
            self.gates.judge(pieces.finding(e.line, self.subject.model.dtype), e.line["step"])


def _sample(t: Subject, g: Any, place: int = 0) -> np.ndarray:
    """Read every n-th gradient of what this rank owns, float64. g: of the flat array (place 0), or its own part (1)"""
    step = (
        max(1, g.size // SAMPLED_ELEMENTS) | 1
        if t.shard is None
        else max(1, t.shard.cut.length // SAMPLED_ELEMENTS) | 1
    )
    runs = [(slice(None),) * 2] if t.shard is None else t.shard.runs
    parts = [np.asarray(t.backend.to_host(g[run[place]][::step]), np.float64) for run in runs]
    return np.concatenate(parts) if parts else np.zeros(0)


class Pieces:
    """Loss, gradient norm and targets of a batch, computed in other pieces: its rows from the last to the first, one alone
    and then as many as fit."""

    def __init__(self, t: Subject, ids: np.ndarray, targets: np.ndarray, step: int) -> None:
        be, model = t.backend, t.model
        self.tokens, before = int((targets >= 0).sum()), model.tokens_trained
        counted = max(1, terms(model.preferences, ids, targets))
        self.is_complete, self.off, total = False, math.inf, 0.0
        ids, targets, rows = ids[::-1], targets[::-1], list[float]()
        numbers = range(len(ids))[::-1]
        cuts = [0, *range(1, len(ids), model.batch), len(ids)]
        for n, (first, last) in enumerate(pairwise(cuts)):
            part = np.ascontiguousarray(ids[first:last]), np.ascontiguousarray(targets[first:last])
            # A sequence keeps its masks of dropout wherever it is computed.
            draws = Draws(t.settings.seed, step, numbers[first:last])
            model.micro_step(*part, 1 / counted, False, begins=n == 0, draws=draws)
            losses = be.to_host(model.buffers["loss"][: part[0].size]).astype(np.float64)
            total += float(losses.sum())
            rows += losses.reshape(part[0].shape).sum(1).tolist() if not model.preferences else []
        self.count, self.loss = len(cuts) - 1, total / counted
        self.by_source = self._by_source(t, np.array(rows), (targets >= 0).sum(1))
        self.evaluated = scorer.batch_loss(model, ids, targets)
        # What the evaluated loss is compared with: None for that of the step.
        drops = t.adapters and t.adapters.dropout
        self.plain = _without_dropping(model, drops, ids, targets) / counted if drops else None
        be.fill(t.scratch, 0)
        g = (t.adapters or model).g
        be.add_sum_sq(t.scratch, g)
        self.norm, self.sample = math.sqrt(float(be.to_host(t.scratch)[0])), _sample(t, g)
        model.tokens_trained = before
        for flat in (g, model.total):
            be.fill(flat, 0)

    def _by_source(self, t: Subject, losses: np.ndarray, counts: np.ndarray) -> dict[str, float]:
        """Mean losses of the sources of a mixture, of sequences from the last to the first."""
        b = t.batches
        if len(b.sources) == 1:
            return {}
        which = b.windows.source_of(b.order(b.windows_read - len(counts), len(counts)))[::-1]
        of_each = [(name, which == k) for k, (name, *_) in enumerate(b.sources)]
        return {name: losses[mine].sum() / counts[mine].sum() for name, mine in of_each if counts[mine].any()}

    def compare(self, sample: np.ndarray) -> None:
        """Compare the sample of the step's gradients with that of the pieces: |a - b| / |b|."""
        self.is_complete = True
        self.off = float(
            np.linalg.norm(sample - self.sample) / max(float(np.linalg.norm(self.sample)), 1e-30)
        )

    def finding(self, line: dict[str, Any], dtype: str) -> Finding:
        """Judge the line of the step (gate start.averages)."""
        off = {
            "loss": abs(line["train_loss"] - self.loss) / max(abs(self.loss), 1e-9) / LOSS[dtype],
            "loss, which evaluated is another,": abs(
                (line["train_loss"] if self.plain is None else self.plain) - self.evaluated
            )
            / max(abs(self.evaluated), 1e-9)
            / LOSS[dtype],
            "gradient norm": abs(line["grad_norm"] - self.norm) / max(self.norm, 1e-30) / NORM[dtype],
            "gradients": self.off / SAMPLE[dtype],
        }
        for name, x in self.by_source.items():
            off[f"loss of {name}"] = abs(line.get(f"train_loss/{name}", math.nan) - x) / abs(x) / LOSS[dtype]
        if line["step"] == 1:
            off["number of targets"] = math.inf if line["tokens_seen"] != self.tokens else 0.0
        wrong = [name for name, ratio in off.items() if not ratio <= 1]
        measured = (
            f"loss {line['train_loss']:.6f} and norm {line['grad_norm']:.5g}, in {self.count} other pieces "
            f"{self.loss:.6f} and {self.norm:.5g}, gradients off by {self.off:.1e}; evaluated {self.evaluated:.6f}"
        )
        bound = f"equal within {LOSS[dtype]:g}, {NORM[dtype]:g} and {SAMPLE[dtype]:g} of it"
        why = f"{' and '.join(wrong)} of a batch depend on its pieces: {measured}" if wrong else ""
        return Finding.of("start.averages", not wrong, measured, bound, why, score=max(off.values()))


def _without_dropping(model: Model, drops: Dropout, ids: np.ndarray, targets: np.ndarray) -> float:
    """Sum the losses of a batch as a step computes them, adapters beside their matrices, but that nothing is dropped."""
    total, share, drops.p = 0.0, drops.p, 0.0
    try:
        for first in range(0, len(ids), model.batch):
            part = [np.ascontiguousarray(x[first : first + model.batch]) for x in (ids, targets)]
            model.forward(part[0], draws=Draws.of(0, 0, first, len(part[0])))
            model.loss(part[1])
            total += float(model.be.to_host(model.buffers["loss"][: part[0].size]).astype(np.float64).sum())
    finally:
        drops.p = share
    return total


def border_id(t: Subject) -> int | None:
    """Return the id at which attention is to stop, by the data and the settings; None where it is not."""
    shards = t.batches.windows.shards
    return shards.border_id if shards.masks or t.settings.mask_documents else None


def borders(t: Subject, ids: np.ndarray) -> Finding:
    """Change all tokens before the first border of each row (B,T): what is read behind it must keep its bits."""
    gate, bound, end = "start.borders", "0 behind the border, above 0 before it", border_id(t)
    if end is None:
        why = "attention does not stop inside a window: neither --mask-documents nor packed examples"
        return Finding.skipped(gate, why, bound)
    if ids.shape[1] < 3 or t.cfg.vocab_size < 3:
        return Finding.skipped(gate, "no room for two documents", bound)
    ids, places = planted(ids, end)
    other, behind = ids.copy(), np.zeros(ids.shape, bool)
    for row, place in enumerate(places):
        before = other[row, :place]
        before[...] = np.where(before == end, end, _another(before, end, t.cfg.vocab_size))
        behind[row, place + 1 :] = True
    change = np.abs(_hidden(t.model, ids) - _hidden(t.model, other)).max(axis=2)
    changed = ids != other
    # The id that ends a document belongs to it, and sees it.
    changed[np.arange(len(ids)), places] = True
    after, least = float(change[behind].max()), float(change[changed].min())
    size = f"{plural(len(ids), 'row')} of {plural(ids.shape[1], 'token')}"
    measured = f"changes behind the border {after:.3g}, before it {least:.3g}, {size}"
    return Finding.of(gate, after == 0 and least > 0, measured, bound)


def planted(ids: np.ndarray, end: int) -> tuple[np.ndarray, list[int]]:
    """Find a border with tokens on both sides in each row; rows that have none get one in the middle."""
    ids, places = ids.copy(), []
    for row in ids:
        is_token = row != end
        found = [p for p in np.flatnonzero(~is_token) if 0 < p < len(row) - 1 and is_token[:p].any()]
        place = int(found[0]) if found else len(row) // 2
        row[place] = end
        if not (row[:place] != end).any():
            row[0] = _another(row[:1], end, int(ids.max()) + 2)[0]
        places.append(place)
    return ids, places


def with_borders(t: Subject, ids: np.ndarray) -> np.ndarray:
    """Put a border into every other row of text (B,T) that has none: backward may be wrong behind borders alone, and documents
    are often longer than a row. Rows of packed examples have borders."""
    end = border_id(t)
    if end is None or t.batches.windows.shards.masks:
        return ids
    bare = [row for row in range(0, len(ids), 2) if not (ids[row, :-1] == end).any()]
    ids = ids.copy()
    # Most of a row stays one document.
    ids[bare, ids.shape[1] // 4] = end
    return ids


def _another(ids: np.ndarray, end: int, vocab_size: int) -> np.ndarray:
    """Choose other ids, none of them `end`."""
    other = (ids + 1) % vocab_size
    return np.where(other == end, (other + 1) % vocab_size, other)


def _hidden(model: Model, ids: np.ndarray) -> np.ndarray:
    return final_hidden(model, np.ascontiguousarray(ids))
