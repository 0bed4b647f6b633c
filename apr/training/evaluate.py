"""Validation loss: one loop for training, for a fresh process after it, and for another backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..common.events import Line
from ..common.units import LAST_STEPS, perplexity
from ..data.batches import Windows, sequential, spread, trained_targets
from ..model.preferences import tally_anew, terms
from ..model.transformer import Model
from ..ranks.communicator import ALONE, Communicator
from .by_source import EvaluationBySource
from .inputs import Inputs

Part = tuple[np.ndarray, np.ndarray]
T = TypeVar("T")


class Stopped(Exception):
    """Raised when a stop is asked for in the middle of an evaluation."""


class Loss(NamedTuple):
    """Mean in nats per target, or per pair, number of targets, standard error of the mean (0: there was one micro-batch only);
    of pairs also accuracy, margin and so on; of a mixture the losses of its sources."""

    mean: float
    tokens: int
    stderr: float
    pairs: Mapping[str, float] = MappingProxyType({})
    by_source: Mapping[str, float] = MappingProxyType({})

    def figures(self) -> Line:
        """Name all of it as a line of the log does."""
        of_pairs = {f"val_{key}": x for key, x in self.pairs.items()}
        return {
            "val_loss": self.mean,
            "val_tokens": self.tokens,
            **of_pairs,
            "val_loss_stderr": self.stderr,
            **self.by_source,
        }


def evaluate(
    model: Model,
    windows: Windows,
    micro: int,
    most: int | None,
    stop: Callable[[], bool] = lambda: False,
    ranks: Communicator = ALONE,
) -> Loss:
    """Compute the mean loss over all windows, or `most` of them, evenly spaced; `micro` at once.

    Several ranks compute a micro-batch each, whose losses are added in the order of micro-batches. The standard error is that
    of the means of micro-batches. Raises Stopped when stop() says so."""
    preferences, tokens, counted, before = model.preferences, 0, 0, 0.0
    tally_anew(preferences)
    means: list[float] = []
    apart, is_mixed = EvaluationBySource(windows), len(windows.sources) > 1
    read = zip(sequential(windows, micro, most), spread(windows, micro, most), strict=False)
    for parts in rounds(read, ranks.count):
        if stop():
            raise Stopped
        own: tuple[float, list[float]] = (0.0, [])
        if ranks.rank < len(parts):
            own = _sum_of_losses(model, *parts[ranks.rank][0], is_mixed)
        for ((ids, targets), indices), (loss, rows) in zip(parts, ranks.share(own), strict=False):
            count, total = terms(preferences, ids, targets), before + loss
            counted += count
            tokens += trained_targets(targets)
            means.append((total - before) / count)
            before = total
            apart.add(indices, targets, rows)
    error = float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    of_pairs = preferences.tally.figures(counted) if preferences else {}
    return Loss(before / counted, tokens, error, of_pairs, apart.line() if is_mixed else {})


def _sum_of_losses(
    model: Model, ids: np.ndarray, targets: np.ndarray, by_row: bool
) -> tuple[float, list[float]]:
    """Compute the sum of the losses and, where asked, that of each sequence."""
    model.be.fill(model.total, 0)
    model.forward(ids)
    model.loss(targets)
    total, rows = float(model.be.to_host(model.total)[0]), []
    if by_row:
        losses = np.asarray(model.be.to_host(model.buffers["loss"][: ids.size]), np.float64)
        rows = losses.reshape(ids.shape).sum(1).tolist()
    return total, rows


def micro_batches(ids: np.ndarray, targets: np.ndarray, size: int) -> Iterator[Part]:
    """Cut a batch (B, T) into parts of at most `size` sequences."""
    for i in range(0, len(ids), size):
        yield ids[i : i + size], targets[i : i + size]


def rounds(parts: Iterable[T], count: int) -> Iterator[list[T]]:
    """Take `count` micro-batches at a time, one for each rank; fewer in the last round."""
    parts = iter(parts)
    while found := list(islice(parts, count)):
        yield found


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
