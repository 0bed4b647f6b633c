"""Learn from preferences: losses of pairs of answers, a chosen and a rejected one to the same prompt.

    c, r      sums of the log-probabilities of the tokens of the chosen and of the rejected answer; n tokens
    c0, r0    those that the reference gives: the model before its first step

    dpo    h = (c - c0) - (r - r0)              -(1 - e) log s(beta h) - e log s(-beta h)
           Rafailov et al. 2023, eq. 7; e: label smoothing, Mitchell 2023, "A note on DPO with noisy preferences", eq. 3
    ipo    h = (c - c0) / nc - (r - r0) / nr    (h - 1 / (2 beta))^2
           Azar et al. 2024, eq. 17, with means over tokens as TRL has it, so that long answers count as short ones do
    simpo  h = c / nc - r / nr                  -(1 - e) log s(beta h - gamma) - e log s(gamma - beta h)
           Meng et al. 2024, eq. 6
    orpo   h = o(c / nc) - o(r / nr)            -c / nc - beta log s(h),   o(l) = l - log(1 - exp(l))
           Hong et al. 2024, eq. 6 and 7: odds of the mean probability of a token, beside the loss of the chosen answer

A loss depends on the logits through c and r alone, and those are sums of cross-entropies. So its gradient is that of the
cross-entropy op, with one weight for the rows of an answer: -dL/dc or -dL/dr. Weights and losses of pairs are computed on the
host, in float64, of the losses of rows that the device has computed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..common.errors import AprError, Refused, UsageError
from ..common.options import option
from ..common.units import plural

# Rows of a batch, and what their cross-entropies are weighted with: all rows, in order.
Weights = list[tuple[slice, float]]
# Probability of a token next to 1, of which the odds of orpo still have a finite slope.
NEAR_ONE = 1e-12


class Answer(NamedTuple):
    """Sum of log-probabilities of an answer, number of its tokens, sum that the reference gives (nan: there is none)."""

    logp: float
    tokens: int
    reference: float

    @property
    def mean(self) -> float:
        """Log-probability of a token."""
        return self.logp / self.tokens

    @property
    def gain(self) -> float:
        """Log-probability above that of the reference."""
        return self.logp - self.reference


class PairLoss(NamedTuple):
    """Loss of a pair, its slopes along the sums c and r, and what the loss compares of each answer: h is their difference."""

    loss: float
    chosen_slope: float
    rejected_slope: float
    chosen: float
    rejected: float


class Constants(NamedTuple):
    """Numbers of the losses: beta, label smoothing e, gamma."""

    beta: float
    smoothing: float
    gamma: float


def log_sigmoid(x: float) -> float:
    """log(1 / (1 + exp(-x)))"""
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x))"""
    return math.exp(log_sigmoid(x))


def smoothed(x: float, e: float) -> tuple[float, float]:
    """(-(1 - e) log s(x) - e log s(-x), its slope e s(x) - (1 - e) s(-x))"""
    return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x), e * sigmoid(x) - (1 - e) * sigmoid(-x)


def dpo(c: Answer, r: Answer, k: Constants) -> PairLoss:
    """-(1 - e) log s(beta h) - e log s(-beta h)"""
    loss, slope = smoothed(k.beta * (c.gain - r.gain), k.smoothing)
    return PairLoss(loss, k.beta * slope, -k.beta * slope, c.gain, r.gain)


def ipo(c: Answer, r: Answer, k: Constants) -> PairLoss:
    """(h - 1 / (2 beta))^2"""
    a, b = c.gain / c.tokens, r.gain / r.tokens
    off = a - b - 1 / (2 * k.beta)
    return PairLoss(off * off, 2 * off / c.tokens, -2 * off / r.tokens, a, b)


def simpo(c: Answer, r: Answer, k: Constants) -> PairLoss:
    """-(1 - e) log s(beta h - gamma) - e log s(gamma - beta h)"""
    loss, slope = smoothed(k.beta * (c.mean - r.mean) - k.gamma, k.smoothing)
    return PairLoss(loss, k.beta * slope / c.tokens, -k.beta * slope / r.tokens, c.mean, r.mean)


def orpo(c: Answer, r: Answer, k: Constants) -> PairLoss:
    """-c / nc - beta log s(h)"""
    (a, da), (b, db) = log_odds(c.mean), log_odds(r.mean)
    loss, slope = smoothed(a - b, 0.0)
    return PairLoss(
        k.beta * loss - c.mean,
        (k.beta * slope * da - 1) / c.tokens,
        -k.beta * slope * db / r.tokens,
        c.mean,
        r.mean,
    )


def log_odds(mean: float) -> tuple[float, float]:
    """(l - log(1 - exp(l)), its slope 1 / (1 - exp(l)))"""
    other = max(-math.expm1(mean), NEAR_ONE)
    return mean - math.log(other), 1 / other


class Kind(NamedTuple):
    """A loss of pairs: its formula, its default beta, the loss where h is 0 (nan: depends on the model), and whether it
    compares with a reference, knows label smoothing, knows gamma."""

    loss: Callable[[Answer, Answer, Constants], PairLoss]
    beta: float
    has_reference: bool = False
    is_smoothed: bool = False
    has_gamma: bool = False


LOSSES = {
    "dpo": Kind(dpo, 0.1, has_reference=True, is_smoothed=True),
    "ipo": Kind(ipo, 0.1, has_reference=True),
    "orpo": Kind(orpo, 0.1),
    "simpo": Kind(simpo, 2.0, is_smoothed=True, has_gamma=True),
}
# Of simpo: Meng et al. 2024, section 3, take 0.3 to 1.6.
GAMMA = 0.5


@dataclass(frozen=True)
class PreferenceSettings:
    """Preferences: the loss of pairs."""

    preference_loss: str = option(
        "with --preferences, loss of a pair: dpo and ipo compare with the model before its first step, orpo and simpo do not",
        "dpo",
        choices=tuple(LOSSES),
    )
    beta: float | None = option(
        "with --preferences, strength of the comparison (default: 0.1; simpo: 2)", above=0, metavar="STRENGTH"
    )
    label_smoothing: float = option(
        "with dpo and simpo, share of pairs whose answers are taken to stand the wrong way round",
        0.0,
        at_least=0,
        below=0.5,
        metavar="SHARE",
    )
    simpo_gamma: float | None = option(
        f"with simpo, margin that the chosen answer should be ahead by (default: {GAMMA:g})",
        at_least=0,
        metavar="MARGIN",
    )


def check_preferences(s: PreferenceSettings) -> None:
    """Raise UsageError for settings that the loss does not know."""
    kind = LOSSES[s.preference_loss]
    if s.label_smoothing and not kind.is_smoothed:
        raise UsageError(f"--label-smoothing goes with dpo and simpo, not with {s.preference_loss}")
    if s.simpo_gamma is not None and not kind.has_gamma:
        raise UsageError(f"--simpo-gamma goes with --preference-loss simpo, not with {s.preference_loss}")


class Pair(NamedTuple):
    """Positions of the two answers of a pair among the rows (B*T,) of a batch: from the first target to behind the last."""

    chosen: slice
    rejected: slice


@dataclass
class Tally:
    """Sums over pairs, for the log; gains only of pairs with a reference."""

    pairs: int = 0
    right: int = 0
    referred: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, beta: float, loss: PairLoss, c: Answer, r: Answer) -> None:
        """Add a pair."""
        self.pairs += 1
        self.right += loss.chosen > loss.rejected
        values = {
            "margin": beta * (loss.chosen - loss.rejected),
            "chosen_reward": beta * loss.chosen,
            "rejected_reward": beta * loss.rejected,
            "chosen_logp": c.logp,
            "rejected_logp": r.logp,
        }
        if not math.isnan(c.reference):
            self.referred += 1
            values |= {"chosen_gain": c.gain / c.tokens, "rejected_gain": r.gain / r.tokens}
        for key, x in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + x

    def figures(self, pairs: int) -> dict[str, float]:
        """Means over so many pairs: the share that is ordered rightly, the difference of rewards (beta times what the loss
        compares), rewards, log-probabilities of answers, and what they have gained on the reference, nats a token.

        Raises AprError where others were counted."""
        if self.pairs != pairs:
            raise AprError(f"{plural(self.pairs, 'pair')} counted, where the loss is a mean over {pairs:,}")
        if not self.pairs:
            return {}
        counts = {key: self.referred if key.endswith("_gain") else self.pairs for key in self.sums}
        return {"accuracy": self.right / self.pairs} | {k: x / counts[k] for k, x in self.sums.items()}


class Preferences:
    """The loss of pairs in the place of the mean cross-entropy; a Model that has it asks it for the weights of rows.

    border     id that ends an answer and its prompt in a row; attention stops there
    reference  {key of an answer: sum of the log-probabilities that the reference gives}
    tally      of the pairs since it was last made anew
    """

    def __init__(
        self, s: PreferenceSettings, border: int, reference: Mapping[bytes, float] | None = None
    ) -> None:
        self.name, self.kind = s.preference_loss, LOSSES[s.preference_loss]
        beta = self.kind.beta if s.beta is None else s.beta
        gamma = GAMMA if s.simpo_gamma is None else s.simpo_gamma
        self.constants = Constants(beta, s.label_smoothing, gamma if self.kind.has_gamma else 0.0)
        self.border, self.tally = border, Tally()
        self.reference: Mapping[bytes, float] = reference or {}

    def describe(self) -> str:
        """Name the loss with its numbers."""
        k = self.constants
        more = f", label smoothing {k.smoothing:g}" if k.smoothing else ""
        return f"{self.name}, beta {k.beta:g}{more}{f', gamma {k.gamma:g}' if self.kind.has_gamma else ''}"

    @property
    def at_zero(self) -> float:
        """Loss of a pair whose answers compare as equal, but for the loss of the chosen answer itself (orpo)."""
        c = Answer(-1.0, 1, -1.0)
        loss = self.kind.loss(c, c, self.constants).loss
        return loss - 1 if self.name == "orpo" else loss

    def pairs(self, ids: np.ndarray, targets: np.ndarray) -> Iterator[Pair]:
        """Find the pairs of a batch (B,T): answers lie in turn, chosen and rejected, each in the tokens between two borders.

        Raises Refused: a row whose answers are not in pairs."""
        width = ids.shape[1]
        for b in range(len(ids)):
            ends = np.flatnonzero(ids[b] == self.border)
            places = np.flatnonzero(targets[b] >= 0)
            # The border that ends an example belongs to it.
            examples = np.searchsorted(ends, places)
            cuts = np.flatnonzero(np.diff(examples)) + 1
            parts = [p + b * width for p in np.split(places, cuts) if p.size]
            if len(parts) % 2:
                raise Refused(f"a row of {len(parts)} answers: pairs of preferences have two each")
            answers = [slice(int(p[0]), int(p[-1]) + 1) for p in parts]
            yield from map(Pair, answers[::2], answers[1::2])

    def count(self, ids: np.ndarray, targets: np.ndarray) -> int:
        """Count the pairs of a batch."""
        return sum(1 for _ in self.pairs(ids, targets))

    def key(self, ids: np.ndarray, targets: np.ndarray, answer: slice) -> bytes:
        """Name an answer by its example: ids from the border before it on, and targets.  ids, targets (B*T,)"""
        start = answer.start - answer.start % self.width
        before = np.flatnonzero(ids[start : answer.start] == self.border)
        start += int(before[-1]) + 1 if before.size else 0
        digest = hashlib.blake2b(ids[start : answer.stop].astype("<i4").tobytes(), digest_size=16)
        digest.update(np.maximum(targets[start : answer.stop], -1).astype("<i4").tobytes())
        return digest.digest()

    def answers(
        self, ids: np.ndarray, targets: np.ndarray, losses: np.ndarray
    ) -> Iterator[tuple[Pair, Answer, Answer]]:
        """Sum the losses of rows (B*T,), nats, of each answer of a batch (B,T)."""
        self.width = ids.shape[1]
        flat_ids, flat_targets = ids.reshape(-1), targets.reshape(-1)
        for pair in self.pairs(ids, targets):
            found = []
            for place in pair:
                kept = flat_targets[place] >= 0
                logp = -math.fsum(losses[place][kept].tolist())
                reference = self.reference.get(self.key(flat_ids, flat_targets, place), math.nan)
                found.append(Answer(logp, int(kept.sum()), reference))
            yield pair, found[0], found[1]

    def weigh(
        self, ids: np.ndarray, targets: np.ndarray, losses: np.ndarray, scale: float
    ) -> tuple[np.ndarray, Weights]:
        """Return the losses of pairs, each in the place of the first target of its chosen answer (B*T,) float32, and the
        weights of rows that make their cross-entropies the gradient of scale times the sum of those losses.

        losses: cross-entropies of the rows. Raises Refused: a pair without a reference that its loss compares with."""
        rows, weights, end = np.zeros(ids.size, np.float32), Weights(), 0
        for pair, c, r in self.answers(ids, targets, losses):
            if self.kind.has_reference and math.isnan(c.reference + r.reference):
                raise Refused("a pair of which the reference has no log-probabilities: it is of other data")
            loss = self.kind.loss(c, r, self.constants)
            self.tally.add(self.constants.beta, loss, c, r)
            rows[pair.chosen.start] = loss.loss
            for place, slope in zip(pair, (loss.chosen_slope, loss.rejected_slope), strict=True):
                # Rows before an answer have no targets, so no gradient with any weight.
                weights.append((slice(end, place.stop), -scale * slope))
                end = place.stop
        return rows, [*weights, (slice(end, ids.size), 0.0)]


def terms(preferences: Preferences | None, ids: np.ndarray, targets: np.ndarray) -> int:
    """Count what the loss of a batch is a mean over: its pairs, or without preferences its targets."""
    return preferences.count(ids, targets) if preferences else int(np.count_nonzero(targets >= 0))


def tally_anew(preferences: Preferences | None) -> None:
    """Begin to count pairs for a line of the log."""
    if preferences:
        preferences.tally = Tally()


def within(weights: Weights, rows: slice) -> Weights:
    """Cut the weights of rows to those of a piece."""
    cut = ((slice(max(s.start, rows.start), min(s.stop, rows.stop)), w) for s, w in weights)
    return [(s, w) for s, w in cut if s.start < s.stop]


def row_losses(model: Any, ids: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Compute the cross-entropies of all rows (B*T,) float32, nats, without the loss of pairs."""
    with without_pairs(model):
        model.forward(ids)
        model.loss(targets)
        losses: np.ndarray = model.be.to_host(model.buffers["loss"][: ids.size])
    return losses


@contextmanager
def without_pairs(model: Any) -> Iterator[None]:
    """Compute the mean cross-entropy of targets in the block, whatever the model is trained on."""
    kept, model.preferences = model.preferences, None
    try:
        yield
    finally:
        model.preferences = kept
