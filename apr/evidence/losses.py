"""Judge losses beside what text, tokens and other losses allow: each function returns the Finding of one gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..common.finding import Finding
from ..common.units import plural

# Of ln V: the loss of a checkpoint that knows nothing lies there or above; the order of tokens gains it nothing.
NEAR_CHANCE, SHUFFLED_GAIN = 0.9, 0.03
# Steps whose losses alone say nothing of their spread.
FEW_STEPS = 3


def pretrained_loss(
    loss: float, entropy: float, share: float, vocab_size: int, shuffled: Callable[[], tuple[Any, Any]]
) -> Finding:
    """Judge the loss of a pretrained checkpoint: it is far below the entropy of token frequencies, or, on text of a kind
    that the checkpoint does not know, below that of a guess, or at least lower than that of the same tokens shuffled.

    shuffled: computes the losses of some batches, as they are and with their tokens in random order"""
    chance = math.log(vocab_size)
    measured = f"{loss:.4f} nats/token, {loss / max(entropy, 1e-9):.2f} of the entropy of token frequencies {entropy:.4f}"
    bound = (
        f"at most {share:g} of it; or below {NEAR_CHANCE:g} of ln V = {chance:.4f}; or lower than shuffled"
    )
    if loss <= share * entropy:
        return Finding.of("start.pretrained", True, measured, bound)
    warning = "the text is of a kind that the checkpoint does not know, or the checkpoint is damaged"
    if loss < NEAR_CHANCE * chance:
        return Finding.of("start.pretrained", True, f"{measured}: {warning}", bound, warning)
    here, apart = shuffled()
    gain, noise = float(np.mean(apart - here)), 3 * float(np.std(apart - here)) / math.sqrt(len(here))
    measured += f"; {np.mean(here):.4f} in order, {np.mean(apart):.4f} shuffled"
    if gain - noise > SHUFFLED_GAIN * chance:
        return Finding.of("start.pretrained", True, f"{measured}: {warning}", bound, warning)
    return Finding.of("start.pretrained", False, measured, bound)


def below_train(
    val: float,
    stderr: float,
    last: Sequence[float],
    epoch: Sequence[float],
    share: float,
    longer: Sequence[float] = (),
) -> Finding:
    """Compare a validation loss with the training loss of the same moment, by the lowest of its estimates; the mean over
    the epoch is of weights that were worse. longer: last with those before the evaluation before."""
    longer = longer or last
    if len(longer) < FEW_STEPS:
        why = f"{plural(len(longer), 'step')}: how far apart losses of batches lie is not known"
        return Finding.skipped("run.val-below-train", why)
    mean, estimates = float(np.mean(epoch)), losses_at_the_end(last)
    estimates += losses_at_the_end(longer) if len(last) < FEW_STEPS else []
    lows = [(1 - share) * x - 5 * math.hypot(stderr, error) for x, error in estimates]
    low = min(lows)
    end = estimates[lows.index(low)][0]
    return Finding.of(
        "run.val-below-train",
        val >= low,
        f"validation {val:.4f}, training {end:.4f} at the end of the last {plural(len(last), 'step')} "
        f"({mean:.4f} over the epoch)",
        f"at least {low:.4f}",
        "" if val >= low else f"validation is {end - val:.4f} nats/token below training of the same moment",
        score=low - val,
    )


def losses_at_the_end(losses: Sequence[float]) -> list[tuple[float, float]]:
    """Estimate the training loss after the last of some steps, each estimate with its standard error: by their mean, by a
    line through them, which sees a loss that falls, and by one through the second half, which sees one that begins to."""
    x, n = np.asarray(losses, np.float64), len(losses)
    out = [(float(x.mean()), float(x.std()) / math.sqrt(n))]
    return out + [_end_of_line(part) for part in (x, x[n // 2 :]) if part.size >= 3]


def _end_of_line(x: np.ndarray) -> tuple[float, float]:
    """Extend a line through values by one place: its value there and its standard error. The spread of fewer than 10 is
    taken with their slope in it: it is badly known."""
    n, spread = x.size, float(x.std())
    at = np.arange(n) - (n - 1) / 2
    slope, ahead = float(at @ x) / float(at @ at), (n + 1) / 2
    if n >= 10:
        spread = float(np.sqrt(((x - x.mean() - slope * at) ** 2).sum() / (n - 2)))
    return float(x.mean()) + slope * ahead, spread * math.sqrt(1 / n + ahead**2 / float(at @ at))


def plausible(bits: float, least: float) -> Finding:
    """Compare bits per byte with the least that any published model reaches."""
    why = f"{bits:.3f} bits/byte is below what any published model reaches on real text"
    return Finding.of(
        "end.plausible",
        bits >= least,
        f"{bits:.3f} bits/byte",
        f"at least {least:g}",
        "" if bits >= least else why,
    )


def learning(loss: float, entropy: float, tokens: int, per_decade: float) -> Finding:
    """Compare a validation loss with the lowest that `tokens` training tokens can reach from random weights."""
    share = max(0.0, 1 - per_decade * math.log10(max(tokens, 1) / 1e4)) if tokens > 1e4 else 1.0
    low = min(1.0, share) * entropy
    why = f"{loss:.4f} nats/token after {plural(tokens, 'token')} fell faster than they can explain"
    is_possible = loss >= low - 0.05 * entropy
    return Finding.of(
        "end.learning",
        is_possible,
        f"{loss / max(entropy, 1e-9):.2f} of the entropy of token frequencies after {plural(tokens, 'token')}",
        f"at least {max(0.0, share - 0.05):.2f} of {entropy:.4f}",
        "" if is_possible else why,
        score=low - loss,
    )
