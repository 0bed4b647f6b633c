"""Validation loss: one loop for training, for a fresh process after it, and for another backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ..common.events import Line
from ..common.units import LAST_STEPS, perplexity
from ..data.batches import Windows, sequential, trained_targets
from ..model.preferences import tally_anew, terms
from ..model.transformer import Model
from .inputs import Inputs


class Stopped(Exception):
    """Raised when a stop is asked for in the middle of an evaluation."""


class Loss(NamedTuple):
    """Mean in nats per target, or per pair, number of targets, standard error of the mean (0: there was one micro-batch only);
    of pairs also accuracy, margin and so on."""

    mean: float
    tokens: int
    stderr: float
    pairs: Mapping[str, float] = MappingProxyType({})


def evaluate(
    model: Model,
    windows: Windows,
    micro: int,
    most: int | None,
    stop: Callable[[], bool] = lambda: False,
) -> Loss:
    """Compute the mean loss over all windows, or `most` of them, evenly spaced; `micro` at once.

    The standard error is that of the means of micro-batches. Raises Stopped when stop() says so."""
    be, preferences = model.be, model.preferences
    be.fill(model.total, 0)
    tokens, counted, before = 0, 0, 0.0
    tally_anew(preferences)
    means: list[float] = []
    for ids, targets in sequential(windows, micro, most):
        if stop():
            raise Stopped
        model.forward(ids)
        model.loss(targets)
        count = terms(preferences, ids, targets)
        counted += count
        tokens += trained_targets(targets)
        total = float(be.to_host(model.total)[0])
        means.append((total - before) / count)
        before = total
    error = float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return Loss(before / counted, tokens, error, preferences.tally.figures() if preferences else {})


def evaluated_on(i: Inputs) -> dict[str, Any]:
    """List the conditions of a validation loss, beside the weights."""
    val, s = i.val, i.settings
    return {
        "val_sha256": val.shards.sha256,
        "first_window": val.first,
        "windows": val.count,
        "seq_length": s.seq_length,
        "val_windows": s.val_batches and s.val_batches * s.batch_size,
        "document_end": i.document_end,
        **({"preferences": i.init and i.init.sha256} if val.shards.facts.get("pairs") else {}),
    }


def epoch_facts(
    evaluation: Line, losses: Sequence[float], tokens_seen: int, grad_norm_max: float, seconds: float
) -> dict[str, Any]:
    """Sum up an epoch for the metadata of its checkpoint. evaluation: its line of the log; losses: of its steps."""
    mean, val = float(np.mean(losses)), evaluation["val_loss"]
    return dict(
        step=evaluation["step"],
        train_loss=mean,
        train_loss_last=float(np.mean(losses[-LAST_STEPS:])),
        val_loss=val,
        val_loss_stderr=evaluation["val_loss_stderr"],
        train_ppl=perplexity(mean),
        val_ppl=perplexity(val),
        wall_seconds=seconds,
        tokens_seen=tokens_seen,
        grad_norm_max=grad_norm_max,
    )
