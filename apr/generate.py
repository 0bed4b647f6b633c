"""Text from a model, one token at a time, with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from .config import ModelConfig
from .errors import Refused, UsageError
from .model import Model


def pick(logits: np.ndarray, rng: np.random.Generator, temperature: float, top_k: int, top_p: float) -> int:
    """One token id from logits (V,). temperature 0 takes the largest, lowest id first among equals.

    top_k > 0 keeps the k most likely; top_p < 1 keeps the fewest whose probabilities reach top_p
    (Holtzman et al. 2020, section 3.1).
    """
    if not np.isfinite(logits).all():
        raise Refused("the model's logits are not finite: its weights are damaged")
    if temperature == 0:
        return int(logits.argmax())
    order: Any = np.argsort(-logits, kind="stable")
    if top_k > 0:
        order = order[:top_k]
    scaled = logits[order].astype(np.float64) / temperature
    p = np.exp(scaled - scaled[0])
    p /= p.sum()
    if top_p < 1:
        keep = int(np.searchsorted(np.cumsum(p), top_p)) + 1
        order, p = order[:keep], p[:keep] / p[:keep].sum()
    return int(order[min(np.searchsorted(np.cumsum(p), rng.random(), side="right"), len(p) - 1)])


def generate(
    cfg: ModelConfig,
    backend: ModuleType,
    weights: Any,
    prompt: Sequence[int],
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 42,
    eos_id: int | None = None,
    dtype: str = "float32",
) -> Iterator[int]:
    """New token ids after a prompt, until max_tokens, the end-of-text id or the last position.

    weights: flat parameters on the backend (Layout order). Raises UsageError for options out of
    range or an empty prompt, Refused for ids outside the vocabulary or a prompt that is too long.
    """
    for option, good, rule in (
        ("--temperature", temperature >= 0, "at least 0"),
        ("--top-k", top_k >= 0, "at least 0"),
        ("--top-p", 0 < top_p <= 1, "above 0 and at most 1"),
        ("--max-tokens", max_tokens >= 1, "at least 1"),
        ("--seed", seed >= 0, "at least 0"),
    ):
        if not good:
            raise UsageError(f"{option} must be {rule}")
    ids = np.asarray(prompt, np.int64)
    if not len(ids):
        raise UsageError("the prompt has no tokens; give some text")
    if ids.min() < 0 or ids.max() >= cfg.vocab_size:
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise Refused(f"token id {bad} is outside the model's vocabulary of {cfg.vocab_size}")
    length = min(len(ids) + max_tokens, cfg.max_position_embeddings)
    if len(ids) >= cfg.max_position_embeddings:
        raise Refused(
            f"the prompt has {len(ids)} tokens, the model reads {cfg.max_position_embeddings}; shorten the prompt"
        )
    piece = min(len(ids), 256)  # the prompt goes in by pieces, so that long ones need no long buffers
    model = Model(cfg, backend, 1, piece, dtype, train=False, loss_rows=1, cache=length, w=weights)
    rng = np.random.default_rng(seed)
    for past in range(0, len(ids), piece):
        model.forward(ids[None, past : past + piece].astype(np.int32), past=past)
    for position in range(len(ids), length):
        token = pick(model.last_logits()[0], rng, temperature, top_k, top_p)
        yield token
        if token == eos_id:
            return
        if position + 1 < length:
            model.forward(np.array([[token]], np.int32), past=position)
