"""Draw tokens from logits: the options, the rule, and a sequence that grows by it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import numpy as np

from ..common.errors import Refused, UsageError
from ..model.decode import Row
from ..tokenizer.tokenizer import Tokenizer

# likeliest ones, sorted first; the others only when a draw falls on them
SORTED_TOKENS = 1024
KEPT_LOGITS = 8


@dataclass(frozen=True)
class Sampling:
    """Number of new tokens, and the rule that draws each.

    temperature 0 takes the likeliest. top_k > 0 keeps the k likeliest; top_p < 1 keeps the fewest whose
    probabilities reach top_p (Holtzman et al. 2020, section 3.1); min_p > 0 those at least min_p times as likely as
    the likeliest (Nguyen et al. 2024). repetition_penalty divides the logits above 0 of tokens that are in the prompt
    or were generated, and multiplies those below (Keskar et al. 2019, section 4.1). seed: of the draws.
    """

    max_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 42
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Raises UsageError for an option that is no number, or out of range."""
        for f in fields(self):
            value, is_whole = getattr(self, f.name), isinstance(f.default, int)
            kind: Any = Integral if is_whole else Real
            if not isinstance(value, kind) or isinstance(value, bool):
                words = "a whole number" if is_whole else "a number"
                raise UsageError(f"--{f.name.replace('_', '-')} must be {words}, not {value!r}")
            # NumPy's small integers would wrap around in sums.
            object.__setattr__(self, f.name, int(value) if is_whole else float(value))
        for option, value, good, rule in (
            ("--temperature", self.temperature, 0 <= self.temperature < np.inf, "at least 0"),
            ("--top-k", self.top_k, self.top_k >= 0, "at least 0"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--min-p", self.min_p, 0 <= self.min_p <= 1, "at least 0 and at most 1"),
            ("--repetition-penalty", self.repetition_penalty, 0 < self.repetition_penalty < np.inf, "above 0"),
            ("--max-tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("--seed", self.seed, self.seed >= 0, "at least 0"),
        ):  # fmt: skip
            if not good:
                raise UsageError(f"{option} must be {rule}, not {value}")


def pick(
    logits: np.ndarray,
    rng: np.random.Generator,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float = 0.0,
) -> int:
    """Draw one token id from logits (V,) by the options of Sampling; among equals the lowest id is the likeliest.

    Takes one number from rng, none at temperature 0. Raises Refused for logits that are not finite.
    """
    if logits.dtype.itemsize < 4:
        logits = logits.astype(np.float32)  # exact, and what NumPy computes in
    if not np.isfinite(logits).all():
        raise not_finite()
    if temperature == 0:
        return int(logits.argmax())
    # Near 0 a temperature makes the quotients infinite, and all weights but those of the likeliest 0.
    with np.errstate(over="ignore"):
        weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    draw = rng.random()
    for count in (min(top_k or SORTED_TOKENS, len(logits)), len(logits)):
        order = _likeliest(logits, count)
        p = weights[order]
        cumulative = np.cumsum(p) / (p.sum() if top_k else weights.sum())
        keep = min(int(np.searchsorted(cumulative, top_p)) + 1, count) if top_p < 1 else count
        if min_p > 0:
            keep = min(keep, int((p[:keep] >= min_p * p[0]).sum()))
        # True when all tokens that may be drawn are among these; their probabilities are then made to sum to 1.
        whole = bool(top_k) or count == len(logits) or keep < count
        if not whole and (top_p < 1 or min_p > 0):
            continue
        total = cumulative[keep - 1] if whole else 1
        at = int(np.searchsorted(cumulative[:keep], draw * total, side="right"))
        if whole or at < keep:
            return int(order[min(at, keep - 1)])
    raise AssertionError("the second turn has all tokens")


def not_finite() -> Refused:
    """Make the error of logits that are not finite."""
    return Refused("the model's logits are not finite: its weights are damaged")


def drawable_ids(tokenizer: Tokenizer | None, vocab_size: int, ends: Collection[int]) -> np.ndarray | None:
    """List the ids that may be drawn, int64 (n,) ascending: those with a token, and the ends; None: all vocab_size of them.

    Models have more rows than their tokenizer has tokens, for speed; nothing was trained in those rows."""
    if tokenizer is None:
        return None
    ids = np.union1d(tokenizer.ids, np.fromiter(ends, np.int64))
    return None if ids.size >= vocab_size else ids


def _likeliest(logits: np.ndarray, count: int) -> np.ndarray:
    """Sort the ids of the `count` largest logits, largest first, lowest id first among equals."""
    if count < len(logits):
        least = np.partition(logits, -count)[-count]
        among = np.flatnonzero(logits >= least)  # all equal to the least, so that the lowest ids stay
        return among[np.argsort(-logits[among], kind="stable")[:count]]
    return np.argsort(-logits, kind="stable")


def penalise(logits: np.ndarray, ids: Collection[int], penalty: float) -> np.ndarray:
    """Apply the repetition penalty of Sampling for the tokens `ids` to logits (V,)."""
    if penalty == 1:
        return logits
    seen = np.unique(np.fromiter(ids, np.int64))
    out = logits.copy()
    out[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return out


@dataclass(eq=False)
class Continuation:
    """A prompt and the tokens generated after it.

    ended: "" while the sequence goes on, then "end" (an end-of-text id), "length" (max_tokens), "positions" (the model
    has no more), or whatever a reader sets: a sequence with a reason gets no more tokens.
    logits: of the first KEPT_LOGITS new tokens, where the host draws them, for those who compute them again."""

    number: int
    prompt: list[int]
    sampling: Sampling
    new: list[int] = field(default_factory=list)
    ended: str = ""
    logits: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.sampling.seed)

    def ends_after(self, tokens: int, positions: int) -> bool:
        """Tell whether a sequence has all its tokens when it has got so many more."""
        return len(self.new) + tokens >= self.sampling.max_tokens or self.position + tokens + 1 >= positions

    @property
    def position(self) -> int:
        """Position of the latest token."""
        return len(self.prompt) + len(self.new) - 1

    def row(self, positions: int) -> Row:
        """Collect what a device needs to draw the tokens after the first by itself, up to the last of the positions."""
        s = self.sampling
        kind = s.temperature, s.top_p, s.min_p, s.repetition_penalty
        most = min(s.max_tokens, positions - len(self.prompt)) - 1
        draws = self._rng.random(most) if s.temperature > 0 else np.zeros(0)
        return Row(self.prompt + self.new, kind, s.top_k, draws)

    def draw(
        self, logits: np.ndarray, ends: Collection[int], positions: int, among: np.ndarray | None = None
    ) -> int:
        """Draw the next token from logits (V,); among: the ids that may be drawn (see drawable_ids)."""
        s = self.sampling
        before = self.prompt + self.new if s.repetition_penalty != 1 else ()
        penalised = penalise(logits, before, s.repetition_penalty)
        left = penalised if among is None else penalised[among]
        token = pick(left, self._rng, s.temperature, s.top_k, s.top_p, s.min_p)
        token = token if among is None else int(among[token])
        if len(self.logits) < KEPT_LOGITS:
            self.logits.append(float(logits[token]))
        return self.take(token, ends, positions)

    def take(self, token: int, ends: Collection[int], positions: int) -> int:
        """Add the next token, and note an end; returns the token. Raises Refused for -1: there was none to draw."""
        if token < 0:
            raise not_finite()
        self.new.append(token)
        if token in ends:
            self.ended = "end"
        elif len(self.new) >= self.sampling.max_tokens:
            self.ended = "length"
        elif self.position + 1 >= positions:
            self.ended = "positions"
        return token
