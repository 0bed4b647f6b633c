"""Losses of the sources of a mixture, each apart: of a step, and of an evaluation. Of other data nothing is measured.

In a line of the log they stand beside the loss of all: train_loss/NAME, tokens_seen/NAME, val_loss/NAME and so on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..common.events import Line
from ..data.batches import Batches, Windows
from ..model.transformer import Model
from ..ranks.communicator import Communicator


class StepsBySource:
    """Adds up the losses of each source on the device, micro-batch by micro-batch: any number of ranks gives the same bits."""

    def __init__(self, model: Model, batches: Batches, micro: int, ranks: Communicator) -> None:
        self.model, self.batches, self.micro, self.ranks = model, batches, micro, ranks
        self.names = [name for name, *_ in batches.sources]
        # Targets of each source up to so many windows of the stream.
        self._seen: tuple[int, list[int]] = (-1, [])
        self._sums: list[list[Any]] = []
        self._sources: np.ndarray | None = None

    def begin(self, batch: int) -> None:
        """Look up the sources of the batch whose gradients come next: -1 for the one read last, 0 for the one after it."""
        self._sources = self.batches.sources_of(batch)

    def keep(self, n: int, micro_batch: int) -> None:
        """Add up the losses of a micro-batch of the step, the n-th of this rank, before the next one is computed."""
        if self._sources is None:
            return
        be, t = self.model.be, self.model.t
        if n == len(self._sums):
            self._sums.append([be.empty((1,), "float64") for _ in self.names])
        for total in self._sums[n]:
            be.fill(total, 0)
        rows = self._sources[micro_batch * self.micro :][: self.micro]
        for first, end in _runs(rows):
            be.add_sum(self._sums[n][int(rows[first])], self.model.buffers["loss"][first * t : end * t])

    def read_later(self, targets: np.ndarray) -> Callable[[], Line]:
        """Ask for the losses of the step that was read last, targets (B,T): for a part of its line of the log."""
        sources, count = self.batches.sources_of(-1), self.ranks.count
        if sources is None:
            return dict
        micro_batches = -(-len(targets) // self.micro)
        own = len(range(self.ranks.rank, micro_batches, count))
        numbers = self.model.be.read_later(tuple(x for sums in self._sums[:own] for x in sums))
        counts = np.bincount(sources, (targets >= 0).sum(1), len(self.names)).astype(np.int64).tolist()

        read, (at, before) = self.batches.windows_read, self._seen
        # A process that goes on counts from the position in the data.
        if at != read - len(targets):
            before = self.batches.targets_by_source(ago=1)

        def line() -> Line:
            shared, k = self.ranks.share(numbers()), len(self.names)
            totals = [0.0] * k
            for m in range(micro_batches):
                for i in range(k):
                    totals[i] += shared[m % count][m // count * k + i]
            seen = [a + b for a, b in zip(before, counts, strict=True)]
            self._seen = read, seen
            out: Line = {f"tokens_seen/{name}": n for name, n in zip(self.names, seen, strict=True)}
            each = zip(self.names, totals, counts, strict=True)
            return out | {f"train_loss/{name}": total / n for name, total, n in each if n}

        return line


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of neighbours of the same source."""
    return itertools.pairwise([0, *(np.flatnonzero(np.diff(rows)) + 1).tolist(), len(rows)])


class EvaluationBySource:
    """Adds up the losses of validation windows by source, on the host."""

    def __init__(self, windows: Windows) -> None:
        self.windows, self.names = windows, [name for name, *_ in windows.sources]
        self.losses: list[list[float]] = [[] for _ in self.names]
        self.counts: list[list[int]] = [[] for _ in self.names]

    def add(self, windows: np.ndarray, targets: np.ndarray, losses: Sequence[float]) -> None:
        """Take the sums of the losses of windows int64 (B,) with targets (B,T)."""
        if len(self.names) > 1:
            counts = (targets >= 0).sum(1).tolist()
            for k, n, loss in zip(self.windows.source_of(windows).tolist(), counts, losses, strict=True):
                self.losses[k].append(loss)
                self.counts[k].append(n)

    def line(self) -> Line:
        """Give the mean of each source, its number of targets, and its standard error, by those of windows."""
        out: Line = {}
        for name, losses, counts in zip(self.names, self.losses, self.counts, strict=True):
            if losses:
                means = [a / n for a, n in zip(losses, counts, strict=True) if n]
                out[f"val_loss/{name}"] = sum(losses) / sum(counts)
                out[f"val_tokens/{name}"] = sum(counts)
                error = float(np.std(means, ddof=1)) / len(means) ** 0.5 if len(means) > 1 else 0.0
                out[f"val_loss_stderr/{name}"] = error
        return out
