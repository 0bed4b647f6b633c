"""Take token ids of callers as one array, checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..common.errors import Refused, UsageError
from ..common.units import plural
from ..model.config import ModelConfig

Ids = Sequence[int] | np.ndarray
ENCODE = "; of a text, model.tokenizer.encode(text) gives them"


def as_batch(ids: Ids, cfg: ModelConfig, least: int = 1) -> np.ndarray:
    """Check ids (B,T), or (T,) for B = 1; returns (B,T) int32.

    Raises UsageError for another shape, Refused for ids outside the vocabulary and more than the positions."""
    try:
        batch = np.asarray(ids)
    except ValueError:
        raise UsageError("ids are rows of different lengths; give integers (T,) or (B,T)") from None
    batch = batch[None] if batch.ndim == 1 else batch
    if (
        batch.ndim != 2
        or batch.shape[0] < 1
        or batch.shape[1] < least
        or not np.issubdtype(batch.dtype, np.integer)
    ):
        raise UsageError(
            f"ids are {batch.dtype} {batch.shape}; give integers (T,) or (B,T), T at least {least}"
            f"{ENCODE if batch.dtype.kind in 'US' else ''}"
        )
    size, most = cfg.vocab_size, cfg.max_position_embeddings
    if batch.min() < 0 or batch.max() >= size:
        bad = batch.min() if batch.min() < 0 else batch.max()
        raise Refused(f"token id {bad} is outside the model's vocabulary of {size}")
    if batch.shape[1] > most + (least == 2):
        raise Refused(f"{plural(batch.shape[1], 'token')}, the model reads {most}")
    return np.ascontiguousarray(batch, np.int32)
