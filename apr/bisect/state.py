"""Check that a model carries nothing over from one pass to the next."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..model.params import Slot
from ..model.transformer import Model
from .comparisons import exact, holds, measured, same_bits, unequal
from .difference import difference, root_mean_square
from .report import ArrayComparison
from .side import Batch, Side
from .upload import FUSED_IN

# Of the loss scale, and of the weights, of another pass.
OTHER_SCALE, MOVED = 3.0, 0.75
# Buffers that are no scratch memory.
KEPT_BUFFERS = ("w", "g", "cos", "sin", "total", "ids", "targets", "doc_start")


def state(
    side: Side, weights: np.ndarray, batch: Batch, tolerances: dict[str, float]
) -> list[ArrayComparison]:
    """Compare passes that must give equal bits: a second run, one after an evaluation, one over scratch memory of NaN, and
    the recorded pass; then passes over changed later tokens, over another input, and over the sequences one by one.

    tolerances: {tap: tolerance of a gradient}; empty: without the sequences one by one."""
    runs = _Runs(side.model(weights, batch.shape, document_end=batch.document_end), batch)
    before = runs.evaluate(batch.ids)
    first = runs.step()
    rows = runs.same("two_runs", runs.step(), first, "the second of two equal runs gives other bits")
    rows.append(exact("state", "evaluate_again", "loss", runs.evaluate(batch.ids), before))
    cause = "evaluation and training differ" if before != first.loss else ""
    rows.append(exact("state", "evaluate", "loss", before, first.loss, cause=cause))
    cause = "an evaluation changed the next training step"
    rows += runs.same("after_evaluation", runs.step(), first, cause)
    runs.spoil_scratch()
    cause = "something is read before it is written"
    rows += runs.same("scratch_starts_as_nan", runs.step(), first, cause)
    cause = "the recorded pass gives other bits than op by op"
    rows += runs.same("recorded_pass", runs.replayed(), first, cause)
    other = np.ascontiguousarray((batch.ids[:, ::-1] + 1) % side.cfg.vocab_size)
    # Of another batch and loss scale: what a recorded pass has frozen shows.
    then = runs.step(other, OTHER_SCALE)
    cause = "the recorded pass of another batch and loss scale gives other bits than op by op"
    rows += runs.same("recorded_again", runs.replayed(other, OTHER_SCALE), then, cause)
    # Now by what was recorded first, of another batch and other weights.
    targets = np.ascontiguousarray(batch.targets[:, ::-1])
    side.backend.from_host(runs.model.w, np.float32(MOVED) * weights)
    then = runs.step(other, targets=targets)
    cause = "what was recorded gives other bits than op by op for another batch and other weights"
    rows += runs.same("recorded_before", runs.replayed(other, targets=targets), then, cause)
    side.backend.from_host(runs.model.w, weights)
    runs.spoil_gradients()
    cause = "a micro-batch that begins the gradients adds to what they held"
    rows += runs.same("begins_anew", runs.begun(), first, cause)
    rows += _future(runs.model, batch)
    cause = "another input gives the same loss: a stale buffer"
    rows.append(holds("state", "other_input", "loss", runs.evaluate(other) != before, cause))
    return rows + (runs.one_by_one(first, tolerances) if tolerances else [])


class _Step(NamedTuple):
    """Result of a training step without an optimizer: the loss, and the flat gradients."""

    loss: float
    gradients: np.ndarray


class _Runs:
    """Passes of one model over one batch."""

    def __init__(self, model: Model, batch: Batch) -> None:
        self.model, self.be, self.batch, self.scale = model, model.be, batch, 1 / batch.count

    def _clear(self) -> None:
        self.be.fill(self.model.g, 0)
        self.be.fill(self.model.total, 0)

    def _result(self) -> _Step:
        return _Step(float(self.be.to_host(self.model.total)[0]), self.be.to_host(self.model.g))

    def step(
        self, ids: np.ndarray | None = None, times: float = 1.0, targets: np.ndarray | None = None
    ) -> _Step:
        """Run forward and backward, op by op; times: of the loss scale."""
        self._clear()
        self.model.forward(self.batch.ids if ids is None else ids)
        self.model.loss(self.batch.targets if targets is None else targets, times * self.scale)
        self.model.backward()
        return self._result()

    def replayed(
        self, ids: np.ndarray | None = None, times: float = 1.0, targets: np.ndarray | None = None
    ) -> _Step:
        """Run forward and backward op by op, then recorded, then replayed; returns the last."""
        for _ in range(3):
            self._clear()
            self.model.micro_step(
                self.batch.ids if ids is None else ids,
                self.batch.targets if targets is None else targets,
                times * self.scale,
            )
        return self._result()

    def begun(self) -> _Step:
        """Run forward and backward as the first micro-batch of a step, over gradients that are not zero."""
        self.be.fill(self.model.total, 0)
        self.model.micro_step(self.batch.ids, self.batch.targets, self.scale, False, begins=True)
        return self._result()

    def spoil_gradients(self) -> None:
        """Fill the gradients of all parameters with NaN; the padding between them stays zero."""
        for s in self.model.layout.slots:
            self.be.fill(self.model.g[s.offset : s.offset + s.size], np.nan)

    def evaluate(self, ids: np.ndarray) -> float:
        """Run forward alone; returns the loss."""
        self.be.fill(self.model.total, 0)
        self.model.forward(ids)
        self.model.loss(self.batch.targets)
        return float(self.be.to_host(self.model.total)[0])

    def spoil_scratch(self) -> None:
        """Fill scratch memory with NaN; the padding of logits stays zero."""
        for name, x in self.model.buffers.arrays.items():
            if name.rsplit(".", 1)[-1] not in KEPT_BUFFERS:
                self.be.fill(x, np.nan)
        logits = self.model.buffers["logits"]
        if logits.shape[1] > self.model.cfg.vocab_size:
            self.be.fill(logits, 0)

    def same(self, op: str, now: _Step, first: _Step, otherwise: str) -> list[ArrayComparison]:
        """Compare a step with the first one; otherwise: the cause of a difference."""
        cause = otherwise if now.loss != first.loss else ""
        loss = exact("state", op, "loss", now.loss, first.loss, cause=cause)
        if same_bits(now.gradients, first.gradients):
            return [loss, exact("state", op, "gradients", True, True)]
        for s in self.model.layout.in_order():
            got, want = (x.gradients[s.offset : s.offset + s.size] for x in (now, first))
            if not same_bits(got, want):
                d = unequal(got, want)
                return [loss, measured("state", op, f"grad.{s.hf}", d, 0.0, s.layer, s.shape, otherwise)]
        return [loss]

    def one_by_one(self, first: _Step, tolerances: dict[str, float]) -> list[ArrayComparison]:
        """Compare the gradients of the batch with those summed over its sequences, run one by one."""
        self._clear()
        for ids, targets in zip(self.batch.ids, self.batch.targets, strict=True):
            self.model.forward(ids[None])
            self.model.loss(targets[None], self.scale)
            self.model.backward()
        summed, rows = self._result().gradients, []
        # Neighbours that are one array of the pass are judged as one: a part of it may hold most of the error.
        parts: dict[str, list[Slot]] = {}
        for s in self.model.layout.in_order():
            prefix = "grad." if s.layer is None else f"grad.{s.layer}."
            parts.setdefault(prefix + FUSED_IN.get(s.param.name, s.param.name), []).append(s)
        for tap, slots in parts.items():
            if (tol := tolerances.get(tap)) is None:
                continue
            s, end = slots[0], slots[-1].offset + slots[-1].size
            at = slice(s.offset, end)
            d = difference(summed[at], first.gradients[at])
            # As the tolerance, which was measured while errors piled up.
            d = replace(d, err=root_mean_square(summed[at], first.gradients[at]))
            cause = "" if d.err <= 2 * tol else "a batch of n is not the mean of its n sequences"
            name, shape = (f"grad.{s.hf}", s.shape) if len(slots) == 1 else (tap, (end - s.offset,))
            rows.append(measured("state", "sequence_by_sequence", name, d, 2 * tol, s.layer, shape, cause))
        return rows


def _future(model: Model, batch: Batch) -> list[ArrayComparison]:
    """Compare the hidden states of the first half of sequences before and after their second half changes."""
    be, t = model.be, batch.ids.shape[1]
    half = max(1, t // 2)
    seen: list[np.ndarray] = []
    for ids in (batch.ids, batch.ids.copy()):
        if seen:
            ids[:, half:] = (ids[:, half:] + 7) % model.cfg.vocab_size
        model.forward(ids)
        final = be.to_host(model._at(*ids.shape)[1].final_norm).reshape(*ids.shape, -1)
        seen.append(final[:, :half].astype(np.float64))
    d = difference(seen[1], seen[0])
    changed = "" if d.err == 0 else "a token changes what was computed for those before it: the mask"
    return [measured("state", "future_changed", "final_norm", d, 0.0, cause=changed)]
