"""Draw tokens again: by one pass without a KV cache, and by the rule of sampling written a second time.

What a cache, a step of decoding or a rule does wrong shows in no error and in no loss: the text is a little worse. Here the
first tokens behind a prompt must be among those that the formula of docs/generation.md gives for the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from ..common.finding import Finding
from ..common.units import plural
from ..model.transformer import Model
from .sampling import KEPT_LOGITS, Sampling, drawable_ids

# Tokens that are drawn again, behind a prompt of at most so many.
CHECKED_TOKENS, MAX_PROMPT_TOKENS = KEPT_LOGITS, 248
# Of a logit, as a share of 1 + the largest: a pass adds in another order than single steps do.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
NAME, BOUND = "generation", "tokens of the rule, by a pass without a cache"

# Logits (n,V) of the last n positions of ids (T,).
Pass = Callable[[np.ndarray, int], np.ndarray]


def allowed(
    logits: np.ndarray,
    before: Collection[int],
    s: Sampling,
    draw: float,
    among: np.ndarray | None,
    slack: float,
) -> np.ndarray:
    """Find the tokens, bool (V,), that the rule may give for a random number in [0,1): one, but for others so near that
    logits off by `slack` would exchange them.

    logits (V,); before: ids of the prompt and of the tokens so far; among: ids that may be drawn, None for all"""
    x = logits.astype(np.float64)
    for i in set(before) if s.repetition_penalty != 1 else ():
        x[i] *= 1 / s.repetition_penalty if x[i] > 0 else s.repetition_penalty
    if among is not None:
        left_out = np.ones(x.size, bool)
        left_out[among] = False
        x[left_out] = -np.inf
    if s.temperature == 0:
        return np.asarray(x >= x.max() - slack)
    found, wide = np.zeros(x.size, bool), min(0.5, 2 * slack / s.temperature)
    order = sorted(range(x.size), key=lambda i: (-x[i], i))[: s.top_k or None]
    with np.errstate(under="ignore"):
        share = np.exp((x[order] - x[order[0]]) / s.temperature)
    share /= share.sum()
    for off in (1 - wide, 1, 1 + wide):
        kept, total = 0, 0.0
        for p in share:
            if kept and ((s.top_p < 1 and total >= s.top_p * off) or p < s.min_p * off * share[0]):
                break
            kept, total = kept + 1, total + p
        high = np.cumsum(share[:kept]) / total
        low = high - share[:kept] / total
        found[np.array(order[:kept])[(low - wide <= draw) & (draw < high + wide)]] = True
    for y in x[found]:
        found |= np.abs(x - y) <= slack
    return found


def drawn_again(
    logits_of: Pass, dtype: str, prompt: Sequence[int], new: Sequence[int], s: Sampling,
    among: np.ndarray | None = None, said: Sequence[float] = (),
) -> Finding:  # fmt: skip
    """Compare the first new tokens of a prompt with those that the rule gives, and the logits that they were drawn by, where they
    are said."""
    count = min(len(new), CHECKED_TOKENS)
    if not count or len(prompt) > MAX_PROMPT_TOKENS:
        why = f"a prompt of {plural(len(prompt), 'token')}" if count else "no new token"
        return Finding.skipped(NAME, why, BOUND)
    ids = np.array([*prompt, *new[: count - 1]], np.int32)
    rows = np.asarray(logits_of(ids, count), np.float64)
    draws = np.random.default_rng(s.seed).random(count) if s.temperature > 0 else np.zeros(count)
    for k in range(count):
        slack = TOLERANCE[dtype] * (1 + float(np.abs(rows[k]).max()))
        if k < len(said) and not abs(rows[k, new[k]] - said[k]) <= slack:
            measured = f"new token {k + 1} was drawn by a logit of {said[k]:.6g}, one pass gives {rows[k, new[k]]:.6g}"
            return Finding.of(NAME, False, measured, BOUND, measured)
        found = allowed(rows[k], [*prompt, *new[:k]], s, float(draws[k]), among, slack)
        if not found[new[k]]:
            want = ", ".join(map(str, np.flatnonzero(found)[:3]))
            measured = f"new token {k + 1} is {new[k]}, the rule gives {want}"
            return Finding.of(NAME, False, measured, BOUND, measured)
    return Finding.of(NAME, True, f"{plural(count, 'token')} drawn again", BOUND)


def check(
    model: Any, prompt: Sequence[int], new: Sequence[int], s: Sampling, text: str = "", stop: Sequence[str] = (),
    said: Sequence[float] = (),
) -> Finding:  # fmt: skip
    """Draw the first new tokens of a LanguageModel again, and look for stop strings in the text of all of them.

    On a device whose calls are asynchronous it is not asked."""
    held = [x for x in stop if x and x in text]
    if held:
        why = f"the text holds {held[0]!r}, which was to end it"
        return Finding.of(NAME, False, why, BOUND, why)
    if model.backend.asynchronous:
        return Finding.skipped(NAME, f"backend {model.backend.name}", BOUND)

    def logits_of(ids: np.ndarray, count: int) -> np.ndarray:
        room: dict[str, Any] = {"train": False, "loss_rows": count, "w": model.weights}
        whole = Model(model.config, model.backend, 1, len(ids), model.dtype, **room)
        whole.forward(ids[None])
        return whole.last_logits(count)

    among = drawable_ids(model.tokenizer, model.config.vocab_size, model.ends)
    return drawn_again(logits_of, model.dtype, prompt, new, s, among, said)
