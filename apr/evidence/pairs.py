"""Judge losses of pairs: by formulas written a second time, on answers found by their labels, with references that are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..common.events import Line, StepBegun
from ..common.finding import Finding
from ..common.units import plural
from ..data.conversations.pairs import CHOSEN, REJECTED
from ..model.preferences import Answer, Preferences, Tally, row_losses
from .gates import Gates
from .subject import Subject

LOSS = 1e-5  # relative, of the loss of a pair: rows of losses are float32
REFERENCE = {"float32": 1e-4, "bfloat16": 5e-3}  # nats a token, of the same weights in other pieces
# Of slopes along sums of log-probabilities: relative difference, step, and nats a token of the answers that are asked.
SLOPE, SLOPE_STEP = 1e-3, 1e-4
SLOPE_MEANS = (-0.05, -0.3, -0.7, -1.5, -3.0)
SPREAD = 2.0  # of planted references, in units of what a sigmoid saturates at
NO_PAIRS = "no pairs of preferences"
NOTED_FALL = 0.1  # nats a token, of chosen answers: said, and no fault


def losses_of(s: Any, c: Any, nc: Any, r: Any, nr: Any, c0: Any, r0: Any) -> np.ndarray:
    """Compute the losses of pairs from sums of log-probabilities, counts of tokens and references, all (P,) float64.

    s: settings of the run. The papers: apr/model/preferences.py."""
    beta = s.beta or {"simpo": 2.0}.get(s.preference_loss, 0.1)
    e, mean_c, mean_r = s.label_smoothing, c / nc, r / nr

    def either(x: np.ndarray) -> np.ndarray:
        return (1 - e) * np.logaddexp(0, -x) + e * np.logaddexp(0, x)

    if s.preference_loss == "dpo":
        return either(beta * (c - r - c0 + r0))
    if s.preference_loss == "ipo":
        return np.square(mean_c - mean_r - c0 / nc + r0 / nr - 0.5 / beta)
    if s.preference_loss == "simpo":
        return either(beta * (mean_c - mean_r) - (0.5 if s.simpo_gamma is None else s.simpo_gamma))
    # Of an answer that is certain, the odds have no end; the last 1e-12 of a probability is not asked about.
    p, q = (np.minimum(np.exp(x), 1 - 1e-12) for x in (mean_c, mean_r))
    odds = np.log(p) - np.log1p(-p) - np.log(q) + np.log1p(-q)
    return beta * np.logaddexp(0, -odds) - mean_c


def figures_of(s: Any, c: Any, nc: Any, r: Any, nr: Any, c0: Any, r0: Any) -> dict[str, float]:
    """Compute what a line of the log says of pairs; arguments as of losses_of."""
    beta = s.beta or {"simpo": 2.0}.get(s.preference_loss, 0.1)
    a, b = {"dpo": (c - c0, r - r0), "ipo": ((c - c0) / nc, (r - r0) / nr)}.get(
        s.preference_loss, (c / nc, r / nr)
    )
    return {
        "accuracy": float((a > b).mean()),
        "margin": float(beta * (a - b).mean()),
        "chosen_reward": float(beta * a.mean()),
        "rejected_reward": float(beta * b.mean()),
        "chosen_logp": float(c.mean()),
        "rejected_logp": float(r.mean()),
        "chosen_gain": float(((c - c0) / nc).mean()),
        "rejected_gain": float(((r - r0) / nr).mean()),
    }


def slopes_off(s: Any, p: Preferences) -> float:
    """Compare slopes along c and r that a loss of pairs says with those of the formula, of likely and of unlikely answers: those
    at hand may all be unlikely, where some terms vanish. Returns the largest difference, relative to the slope."""
    rng, worst, beta = np.random.default_rng(1), 0.0, p.constants.beta
    if not 1e-6 <= beta <= 1e6:
        # Beyond, rounding of the formula hides its slope.
        return 0.0
    step = SLOPE_STEP / max(1.0, beta)
    for mean in SLOPE_MEANS:
        nc, nr = (float(n) for n in rng.integers(1, 40, 2))
        c, r = nc * mean, nr * mean * float(rng.uniform(0.5, 2))
        # What is compared lies where no sigmoid is flat.
        c0, r0 = c + float(rng.normal()) / beta, r + float(rng.normal()) / beta
        loss = p.kind.loss(Answer(c, int(nc), c0), Answer(r, int(nr), r0), p.constants)
        for said, at in ((loss.chosen_slope, 0), (loss.rejected_slope, 2)):
            ends = []
            for sign in (1, -1):
                x = [c, nc, r, nr]
                x[at] += sign * step
                ends.append(float(losses_of(s, x[0], x[1], x[2], x[3], c0, r0)))
            slope = (ends[0] - ends[1]) / (2 * step)
            worst = max(worst, abs(said - slope) / (abs(slope) + 1e-3))
    return worst


def answers_by_label(labels: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Find (label, positions) of each answer of a row: labels change from one answer to the next.  labels (T,)"""
    places = np.flatnonzero(labels)
    cuts = np.flatnonzero(np.diff(labels[places].astype(np.int8))) + 1
    return [(int(labels[p[0]]), p) for p in np.split(places, cuts) if p.size]


class Planted:
    """References in the order in which answers ask for them, whatever their keys."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = iter(values.tolist())

    def get(self, key: bytes, default: float) -> float:
        """Return the next one."""
        return next(self.values, default)


def judge_pairs(t: Subject, gates: Gates, e: StepBegun) -> None:
    """Compare the loss of the first pairs of a process, with references that are planted, with the formula. Raises Aborted."""
    if t.model.preferences is None:
        gates.skip("start.preferences", NO_PAIRS)
        gates.skip("run.margin", NO_PAIRS)
        return
    with gates.timed("start.preferences"):
        gates.judge(formula(t, e), e.step)


def formula(t: Subject, e: StepBegun) -> Finding:
    """Judge losses of the first micro-batch beside those of the formula, and before any step also the reference itself."""
    model, be, p = t.model, t.backend, t.model.preferences
    assert p is not None
    ids, targets = (np.ascontiguousarray(x[: model.batch]) for x in (e.ids, e.targets))
    rows = row_losses(model, ids, targets).astype(np.float64).reshape(ids.shape)
    first = t.batches.windows_read - t.settings.batch_size
    places = t.batches.order(first, len(ids)) + t.batches.windows.first
    labels = t.batches.windows.shards.masks[0].reshape(-1, ids.shape[1] + 1)[places, 1:]
    found = [(label, row, at) for row in range(len(ids)) for label, at in answers_by_label(labels[row])]
    kinds = [label for label, _, _ in found]
    sums = np.array([-math.fsum(rows[row, at].tolist()) for _, row, at in found])
    counts = np.array([at.size for _, _, at in found], np.float64)
    if kinds != [CHOSEN, REJECTED] * (len(kinds) // 2):
        why = f"labels of answers are {kinds[:6]}"
        return Finding.of("start.preferences", False, why, "chosen and rejected in turn", why)
    sides = sums[::2], counts[::2], sums[1::2], counts[1::2]
    kept, tally = p.reference, p.tally
    off = 0.0
    if e.step == 1 and p.kind.has_reference:
        have = np.array(
            [x for _, *pair in p.answers(ids, targets, rows.reshape(-1)) for a in pair for x in [a.reference]]
        )
        off = float((np.abs(have - sums) / counts).max()) if have.size == sums.size else np.inf
    rng = np.random.default_rng(0)
    planted = sums + rng.normal(0, SPREAD / p.constants.beta, sums.size)
    if sums.size > 2:
        # A pair whose answers compare as equal is not ordered rightly.
        planted[-2:] = sums[-2:]
    want = losses_of(t.settings, *sides, planted[::2], planted[1::2])
    figures = figures_of(t.settings, *sides, planted[::2], planted[1::2])
    p.reference, p.tally = Planted(planted), Tally()  # type: ignore[assignment]
    try:
        model.loss(targets)
        said = p.tally.figures(sums.size // 2)
    finally:
        p.reference, p.tally = kept, tally
    given = be.to_host(model.buffers["loss"][: ids.size]).astype(np.float64)
    be.fill(model.total, 0)
    # A loss may be as small as 0 in float32.
    at = [row * ids.shape[1] + int(spots[0]) for label, row, spots in found if label == CHOSEN]
    elsewhere = np.count_nonzero(np.delete(given, at))
    given = given[at]
    worst = (
        np.inf if elsewhere else float((np.abs(given - want) / np.maximum(np.abs(want), 1e-3)).max(initial=0))
    )
    why, size = "", LOSS * (1 + float(np.abs(planted).max(initial=0) + np.abs(sums).max(initial=0)))
    size *= max(1.0, p.constants.beta)
    a_token = size / counts.min(initial=np.inf)
    room = {k: a_token if k.endswith("_gain") else size for k in figures}
    wrong = [k for k, x in figures.items() if not abs(said.get(k, math.nan) - x) <= room[k]]
    if not worst <= LOSS:
        why = f"the loss of {plural(want.size, 'pair')} is {given.sum():.6g}, {t.settings.preference_loss} gives {want.sum():.6g}"
    elif not off <= REFERENCE[model.dtype]:
        why = f"the reference differs by {off:.2g} nats a token from the model before its first step"
    elif not (slope := slopes_off(t.settings, p)) <= SLOPE:
        why = (
            f"slopes of {t.settings.preference_loss} differ by {slope:.2g} of them from those of its formula"
        )
    elif wrong:
        why = f"{wrong[0]} of {plural(want.size, 'pair')} is {said.get(wrong[0])}, by the formula {figures[wrong[0]]:.6g}"
    measured = f"{plural(want.size, 'pair')} with planted references within {worst:.1e}, the reference within {off:.1e} a token"
    bound = f"equal within {LOSS:g} of the formula, the reference within {REFERENCE[model.dtype]:g}"
    return Finding.of("start.preferences", not why, measured, bound, why, score=worst)


def validation_losses(t: Subject, ids: np.ndarray, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Compute the losses of the pairs of a batch by the formula, with the reference of the run, (P,) float64.

    rows: cross-entropies (B*T,) float64"""
    p = t.model.preferences
    assert p is not None
    found = [
        x
        for _, c, r in p.answers(ids, targets, rows)
        for x in (c.logp, c.tokens, r.logp, r.tokens, c.reference, r.reference)
    ]
    return losses_of(t.settings, *np.array(found, np.float64).reshape(-1, 6).T)


def margin(line: Line, most: float) -> Finding | None:
    """Judge how far chosen answers fell while the margin grew (gate run.margin); None where nothing says so.

    A comparison grows too when both answers become unlikely, the rejected one faster (Razin et al. 2024, "Unintentional
    unalignment"; Pal et al. 2024). A mild fall is the rule."""
    gains = [line.get(f"val_{side}_gain") for side in ("chosen", "rejected")]
    if not all(isinstance(g, float) for g in gains):
        return None
    chosen, rejected = (float(g or 0) for g in gains)
    moved = f"chosen answers {chosen:+.3f} nats a token against the reference, rejected {rejected:+.3f}"
    measured = f"{moved}, margin {line['val_margin']:+.3f}"
    both_fall = chosen < -NOTED_FALL and rejected < 0
    is_lost = -chosen > most
    why = ""
    if both_fall or is_lost:
        why = f"both answers became less likely while they were told apart: {measured}"
    return Finding.of(
        "run.margin",
        not is_lost,
        measured,
        f"chosen answers fall by at most {most:.3g}",
        why,
        where=line["step"],
    )
