"""Validation loss: the same loop in training, in a fresh process after it, and on another backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..data.batches import Windows, sequential
from ..data.conversations.instruct import InstructWindows
from ..model.transformer import Model


class Stopped(Exception):
    """A stop was asked for in the middle of an evaluation."""


class Loss(NamedTuple):
    """nats per target, how many targets, and the standard error of the mean (0 when there was one micro-batch only)."""

    mean: float
    tokens: int
    stderr: float


def evaluate(
    model: Model,
    windows: Windows | InstructWindows,
    micro: int,
    most: int | None,
    stop: Callable[[], bool] = lambda: False,
) -> Loss:
    """Mean loss over all windows, or `most` of them, evenly spaced; `micro` at once.

    The standard error is that of the means of micro-batches. Raises Stopped when stop() says so."""
    be = model.be
    be.fill(model.total, 0)
    tokens, before = 0, 0.0
    means: list[float] = []
    for ids, targets in sequential(windows, micro, most):
        if stop():
            raise Stopped
        model.forward(ids)
        model.loss(targets)
        count = int(np.count_nonzero(targets >= 0))
        tokens += count
        total = float(be.to_host(model.total)[0])
        means.append((total - before) / count)
        before = total
    error = float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return Loss(before / tokens, tokens, error)
