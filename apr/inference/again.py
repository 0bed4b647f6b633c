"""Draw tokens again: by one pass without a KV cache, and by the rule of sampling written a second time.

What a cache, a step of decoding or a rule does wrong shows in no error and in no loss: the text is a little worse. Here the
first tokens behind a prompt must be among those that the formula of docs/generation.md gives for the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ..common.finding import FAIL, Finding
from ..common.units import plural
from ..model.config import ModelConfig
from ..model.transformer import Model
from .sampling import KEPT_LOGITS, Sampling, drawable_ids

# Tokens that are drawn again, behind a prompt of at most so many.
CHECKED_TOKENS, MAX_PROMPT_TOKENS = KEPT_LOGITS, 248
# Of a logit, as a share of 1 + the largest: a pass adds in another order than single steps do.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
# In bfloat16, multiples of the largest distance of a row of logits from those of float32: layers add to their rounding.
NOISE = 4
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
    ids = np.arange(x.size) if among is None else np.sort(among)
    found, x = np.zeros(x.size, bool), x[ids]
    if s.temperature == 0:
        found[ids[x >= x.max() - slack]] = True
        return found
    wide, order = min(0.5, 2 * slack / s.temperature), np.argsort(-x, kind="stable")[: s.top_k or None]
    # Near 0 a temperature makes the quotients infinite, and all shares but those of the likeliest 0.
    with np.errstate(under="ignore", over="ignore"):
        share = np.exp((x[order] - x[order[0]]) / s.temperature)
    share /= share.sum()
    sums, drawn = np.cumsum(share), np.zeros(x.size, bool)
    for off in (1 - wide, 1, 1 + wide):
        kept = int(np.searchsorted(sums, s.top_p * off)) + 1 if s.top_p < 1 else share.size
        likely = max(1, int((share >= s.min_p * off * share[0]).sum()))
        kept = min(kept, likely, share.size)
        high = sums[:kept] / sums[kept - 1]
        low = high - share[:kept] / sums[kept - 1]
        drawn[order[:kept][(low - wide <= draw) & (draw < high + wide)]] = True
    # Of sorted logits, the one at a place and the one before it are the nearest.
    near = np.concatenate([[-np.inf], np.sort(x[drawn]), [np.inf]])
    at = np.searchsorted(near[1:-1], x)
    found[ids[np.minimum(x - near[at], near[at + 1] - x) <= slack]] = True
    return found


def drawn_again(
    logits_of: Pass, dtype: str, prompt: Sequence[int], new: Sequence[int], s: Sampling,
    among: np.ndarray | None = None, said: Sequence[float] = (), exact: Pass | None = None,
) -> Finding:  # fmt: skip
    """Compare the first new tokens of a prompt with those that the rule gives, and the logits that they were drawn by, where they
    are said.

    exact: a pass in float32, which is asked where bfloat16 is off, and says how far its rounding takes logits"""
    count = min(len(new), CHECKED_TOKENS)
    if not count or len(prompt) > MAX_PROMPT_TOKENS:
        why = f"a prompt of {plural(len(prompt), 'token')}" if count else "no new token"
        return Finding.skipped(NAME, why, BOUND)
    ids = np.array([*prompt, *new[: count - 1]], np.int32)
    rows = np.asarray(logits_of(ids, count), np.float64)
    slacks = TOLERANCE[dtype] * (1 + np.abs(rows).max(1))
    found = _compared(rows, slacks, prompt, new, s, among, said)
    if found.verdict == FAIL and dtype == "bfloat16" and exact:
        slacks = np.maximum(slacks, NOISE * np.abs(rows - exact(ids, count)).max(1))
        found = _compared(rows, slacks, prompt, new, s, among, said)
    return found


def _compared(
    rows: np.ndarray, slacks: np.ndarray, prompt: Sequence[int], new: Sequence[int], s: Sampling,
    among: np.ndarray | None, said: Sequence[float],
) -> Finding:  # fmt: skip
    """Compare new tokens with the logits of one pass, each with its slack.  rows (n,V), slacks (n,)"""
    count = len(rows)
    draws = np.random.default_rng(s.seed).random(count) if s.temperature > 0 else np.zeros(count)
    for k, slack in enumerate(slacks.tolist()):
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
    if len(new) > s.max_tokens:
        why = f"{plural(len(new), 'new token')}, at most {s.max_tokens} were asked for"
        return Finding.of(NAME, False, why, BOUND, why)
    held = [x for x in stop if x and x in text]
    if held:
        why = f"the text holds {held[0]!r}, which was to end it"
        return Finding.of(NAME, False, why, BOUND, why)
    if model.backend.asynchronous:
        return Finding.skipped(NAME, f"backend {model.backend.name}", BOUND)

    own, exact = (
        one_pass(model.config, model.backend, dtype, model.weights) for dtype in (model.dtype, "float32")
    )
    among = drawable_ids(model.tokenizer, model.config.vocab_size, model.ends)
    return drawn_again(own, model.dtype, prompt, new, s, among, said, exact)


def one_pass(cfg: ModelConfig, backend: ModuleType, dtype: str, weights: Any) -> Pass:
    """Make the pass of a model without a cache; weights of bfloat16 are widened where it is in float32."""

    def logits_of(ids: np.ndarray, count: int) -> np.ndarray:
        w = weights
        if dtype == "float32" and getattr(w, "dtype", None) == "bfloat16":
            w = backend.empty(weights.size, "float32")
            backend.copy(w, weights)
        whole = Model(cfg, backend, 1, len(ids), dtype, train=False, loss_rows=count, w=w)
        whole.forward(ids[None])
        return whole.last_logits(count)

    return logits_of
