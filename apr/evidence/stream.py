"""Gates of the stream of batches: passes over the data, and the shares of the sources of a mixture."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np

from ..common.events import StepBegun, Stepped
from ..common.finding import Finding
from ..common.units import plural
from ..data.batches import Windows
from ..data.mix_text import tables_of
from . import order, scorer
from .gates import Gates
from .subject import Subject

GATE = "run.mixture"
# Resolution of shares: one of so many windows.
RESOLUTION = 1e-4


def asked_shares(text: str, seq_length: int) -> list[float]:
    """Read the share of each source from the text of --mix: its part of the weights, or of the windows of all budgets."""
    each = tables_of(text)
    parts = [
        float(t["weight"]) if "weight" in t else math.ceil(float(t["tokens"]) / seq_length) for t in each
    ]
    return [part / sum(parts) for part in parts]


def windows_of_shards(w: Windows, seq_length: int) -> list[int]:
    """Count the windows of each shard whose tokens are each predicted once, or the rows of packed examples."""
    each = zip(w.shards.arrays, w.shards.strides(seq_length), strict=True)
    # Rows stand one behind the other; windows of text share a token with their neighbours.
    return [a.size // n if n > seq_length else max(0, a.size - 1) // n for a, n in each]


class DataGate:
    """Gate run.data: passes over the data, as the reader counts them and as they follow from the tokens, and rows of batches,
    which are to be those of a second formula of the order. Raises Aborted.

    is_followed: tells from the steps of this process if the rows of the next are compared"""

    def __init__(self, subject: Subject, gates: Gates, is_followed: Callable[[int], bool]) -> None:
        self.t, self.batches, self.gates, self.is_followed = subject, subject.batches, gates, is_followed
        self.steps, self.why, self.turns = 0, "", iter(list[tuple[int, int]]())
        w = self.batches.windows
        # Targets of a pass over each source.
        self.targets = [
            w.targets_of(np.arange(first, first + n)) if name else w.targets
            for name, first, n in self.batches.sources
        ]

    def step_begun(self, e: StepBegun) -> None:
        """Compare the rows of a batch with the windows of the shards whose turn it is by the number of the step."""
        s, w = self.t.settings, self.batches.windows
        if not self.steps:
            windows, at = windows_of_shards(w, w.seq_length), 0
            self.sizes: list[int] = []
            self.firsts = [0, *np.cumsum(windows).tolist()]
            for name, shards in w.shards.parts:
                # Windows that are held out of the training shards are their last ones.
                self.sizes.append(sum(windows[at : at + len(shards.arrays)]) if name else w.count)
                at += len(shards.arrays)
            self.begins = [0, *np.cumsum(self.sizes).tolist()]
            self.turns = order.turns(self.batches.turns.counts, (e.step - 1) * s.batch_size)
        n, turns = self.steps, islice(self.turns, len(e.ids))
        self.steps, self.why = n + 1, ""
        if not self.is_followed(n):
            deque(turns, 0)
            return
        rows = [
            self.begins[k] + order.window(k, position, s.seed, s.shuffle, self.sizes[k])
            for k, position in turns
        ]
        strides, places = w.shards.strides(w.seq_length), []
        for window in rows:
            shard = bisect_right(self.firsts, window) - 1
            places.append((shard, (window - self.firsts[shard]) * strides[shard]))
        ids, targets = scorer.read(w.shards, places, w.seq_length)
        wrong = (ids != e.ids).any(1) | (targets != np.maximum(e.targets, -1)).any(1)
        if wrong.any():
            row = int(np.argmax(wrong))
            self.why = f"row {row} of the batch is not window {rows[row]:,} of the shards, whose turn it is in step {e.step}"

    def stepped(self, e: Stepped) -> None:
        """Compare the passes after a step; its rows were compared when it began."""
        if self.why:
            gate = GATE if len(self.batches.sources) > 1 else "run.data"
            self.gates.judge(
                Finding.of(gate, False, self.why, "windows of a second formula", self.why), e.line["step"]
            )
        b = self.batches
        counted = b.passes_at(b.windows_read) if b.sources[0][0] else [b.passes]
        for (name, *_), whole, passes in zip(b.sources, self.targets, counted, strict=True):
            of_source = f" of {name}" if name else ""
            expected = e.line[f"tokens_seen/{name}" if name else "tokens_seen"] // whole
            measured = (
                f"{plural(passes, 'complete pass')}{of_source}, {plural(b.windows_read, 'window')} read"
            )
            bound = f"{expected} by the tokens trained on"
            self.gates.judge(Finding.of("run.data", passes == expected, measured, bound))


class MixtureGate:
    """Gate run.mixture: counts the windows that this process draws of each source. Raises Aborted.

    is_followed: tells from the steps of this process if the rows of the next are compared with the shards of their source"""

    def __init__(self, subject: Subject, gates: Gates, is_followed: Any) -> None:
        self.t, self.gates, self.is_followed = subject, gates, is_followed
        self.names = [name for name, *_ in subject.batches.sources]
        self.shares = asked_shares(subject.settings.mix or "", subject.settings.seq_length)
        self.drawn: Counter[str] = Counter()
        self.steps, self.foreign = 0, ""
        if not self.shares:
            gates.skip(GATE, "the data has one source")

    def step_begun(self, e: StepBegun) -> None:
        """Find the source of each row of the batch, by the tokens that stand in its shards."""
        if not self.shares:
            return
        b, (parts, ends) = self.t.batches, self._ends()
        windows = b.order(b.windows_read - len(e.ids), len(e.ids))
        which = np.searchsorted(ends, windows, "right")
        self.drawn.update(parts[i] for i in which.tolist())
        if self.is_followed(self.steps):
            strides = b.windows.shards.strides(b.windows.seq_length)
            first = windows - np.append(0, ends)[which]
            places = [(int(i), int(n) * strides[i]) for i, n in zip(which, first, strict=True)]
            ids, targets = scorer.read(b.windows.shards, places, b.windows.seq_length)
            wrong = (ids != e.ids).any(1) | (targets != np.maximum(e.targets, -1)).any(1)
            if wrong.any():
                row = int(np.argmax(wrong))
                self.foreign = (
                    f"row {row} of the batch is not the window of {parts[which[row]]} whose turn it is"
                )
        self.steps += 1

    def _ends(self) -> tuple[list[str], np.ndarray]:
        """List the source of each shard, and the number of windows up to its end."""
        w = self.t.batches.windows
        return [name for name, x in w.shards.parts for _ in x.arrays], np.cumsum(
            windows_of_shards(w, w.seq_length)
        )

    def stepped(self, e: Stepped) -> None:
        """Compare the windows drawn with the shares of the settings."""
        if not self.shares:
            return
        total, slack = sum(self.drawn.values()), 2 * len(self.names)
        off = {
            name: abs(self.drawn[name] - share * total) / (slack + RESOLUTION * total)
            for name, share in zip(self.names, self.shares, strict=True)
        }
        each = zip(self.names, self.shares, strict=True)
        measured = ", ".join(f"{n} {self.drawn[n]:,} of {total:,}, asked {100 * s:.4g} %" for n, s in each)
        worst, bound = (
            max(off, key=lambda n: off[n]),
            f"the share asked for, within {plural(slack, 'window')}",
        )
        why = self.foreign or (f"{worst} is not drawn as was asked: {measured}" if off[worst] > 1 else "")
        self.gates.judge(
            Finding.of(GATE, not why, measured, bound, why, score=max(off.values())), e.line["step"]
        )
