"""Check that a model carries nothing over from one pass to the next."""

from __future__ import annotations

import numpy as np

from ..model.transformer import Model
from .comparisons import exact, holds, measured, same_bits, unequal
from .difference import difference
from .report import ArrayComparison
from .side import Batch, Side
from .upload import FUSED_IN


def state(
    side: Side, weights: np.ndarray, batch: Batch, tolerances: dict[str, float]
) -> list[ArrayComparison]:
    """Compare passes that must give equal bits: a second run, one after an evaluation, one over scratch memory of NaN, and
    the recorded pass; then passes over changed later tokens, over another input, and over the sequences one by one.

    tolerances: {tap: tolerance of a gradient}; empty: without the sequences one by one."""
    model = side.model(weights, batch.shape, document_end=batch.document_end)
    be, rows = side.backend, []

    def step(ids: np.ndarray, targets: np.ndarray, scale: float) -> tuple[float, np.ndarray]:
        be.fill(model.g, 0)
        be.fill(model.total, 0)
        model.forward(ids)
        model.loss(targets, scale)
        model.backward()
        return float(be.to_host(model.total)[0]), be.to_host(model.g)

    def evaluate(ids: np.ndarray) -> float:
        be.fill(model.total, 0)
        model.forward(ids)
        model.loss(batch.targets)
        return float(be.to_host(model.total)[0])

    def same(what: str, now: tuple[float, np.ndarray], otherwise: str) -> None:
        rows.append(
            exact("state", what, "loss", now[0], first[0], cause=otherwise if now[0] != first[0] else "")
        )
        if same_bits(now[1], first[1]):
            rows.append(exact("state", what, "gradients", True, True))
            return
        for s in model.layout.in_order():
            at = slice(s.offset, s.offset + s.size)
            if not same_bits(now[1][at], first[1][at]):
                d = unequal(now[1][at], first[1][at])
                rows.append(measured("state", what, f"grad.{s.hf}", d, 0.0, s.layer, s.shape, otherwise))
                return

    scale = 1 / batch.count
    before = evaluate(batch.ids)
    first = step(batch.ids, batch.targets, scale)
    same("two_runs", step(batch.ids, batch.targets, scale), "the second of two equal runs gives other bits")
    rows.append(exact("state", "evaluate_again", "loss", evaluate(batch.ids), before))
    rows.append(
        exact(
            "state",
            "evaluate",
            "loss",
            before,
            first[0],
            cause="evaluation and training differ" if before != first[0] else "",
        )
    )
    same(
        "after_evaluation",
        step(batch.ids, batch.targets, scale),
        "an evaluation changed the next training step",
    )
    for name, x in model.buffers.arrays.items():
        scratch = name.rsplit(".", 1)[-1] not in (
            *("w", "g", "cos", "sin", "total", "ids", "targets", "doc_start"),
        )
        if scratch:
            be.fill(x, np.nan)
    columns = model.buffers["logits"].shape[1]
    if columns > model.cfg.vocab_size:
        be.fill(model.buffers["logits"], 0)  # the padding is to stay zero
    same(
        "scratch_starts_as_nan",
        step(batch.ids, batch.targets, scale),
        "something is read before it is written",
    )
    for _ in range(3):  # op by op, recorded, replayed
        be.fill(model.g, 0)
        be.fill(model.total, 0)
        model.micro_step(batch.ids, batch.targets, scale)
    replayed = float(be.to_host(model.total)[0]), be.to_host(model.g)
    same("recorded_pass", replayed, "the recorded pass gives other bits than op by op")
    rows += _future(model, batch)
    other = (batch.ids[:, ::-1] + 1) % side.cfg.vocab_size
    rows.append(
        holds(
            "state",
            "other_input",
            "loss",
            evaluate(np.ascontiguousarray(other)) != before,
            "another input gives the same loss: a stale buffer",
        )
    )
    if not tolerances:
        return rows
    be.fill(model.g, 0)
    be.fill(model.total, 0)
    for ids, targets in zip(batch.ids, batch.targets, strict=True):
        model.forward(ids[None])
        model.loss(targets[None], scale)
        model.backward()
    parts = be.to_host(model.g)
    for s in model.layout.in_order():
        at = slice(s.offset, s.offset + s.size)
        prefix = "grad." if s.layer is None else f"grad.{s.layer}."
        tol = tolerances.get(prefix + FUSED_IN.get(s.param.name, s.param.name))
        if tol is None:
            continue
        d = difference(parts[at], first[1][at])
        otherwise = "" if d.err <= 2 * tol else "a batch of n is not the mean of its n sequences"
        rows.append(
            measured("state", "sequence_by_sequence", f"grad.{s.hf}", d, 2 * tol, s.layer, s.shape, otherwise)
        )
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
