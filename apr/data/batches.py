"""Windows of tokens, and the shuffled, resumable stream of batches that training reads."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from typing import Any

import numpy as np

from ..common.errors import AprError, Refused
from ..common.units import plural
from .scan import mix
from .shards import Shards
from .turns import Turns

# Target of a position that no loss is computed for.
IGNORED = -100
FEISTEL_ROUNDS = 4
# Read by a thread before they are asked for.
BATCHES_AHEAD = 4


class Exhausted(AprError):
    """Raised at the end of a pass over the windows, with on_exhausted "stop"."""

    exit_code = 6
    status = "ABORTED"


class Windows:
    """Windows of seq_length + 1 tokens at a stride of seq_length inside each shard, or the rows of packed examples.

    Windows of text share one token with their neighbours, so each token but a shard's first is predicted exactly once; the
    rest at a shard's end is dropped and counted in `tokens_dropped`. Tokens that the shards mask are IGNORED as targets.

    sources  (name, first window, number of windows) of each source of a mixture; otherwise one, whose name is ""

    Raises Refused when no window fits, or rows have another length."""

    def __init__(self, shards: Shards, seq_length: int) -> None:
        if seq_length < 1:
            raise Refused(f"seq_length = {seq_length} is not positive")
        for _, part in shards.parts:
            if part.row_tokens and part.row_tokens != seq_length + 1:
                raise Refused(
                    f"{part.folder}: packed for --seq-length {part.row_tokens - 1}, not {seq_length}; give --instruct"
                )
        self.shards = shards
        self.seq_length = seq_length
        self._strides = np.array(shards.strides(seq_length))
        sizes = np.array([array.size for array in shards.arrays], dtype=np.int64)
        counts = (sizes - seq_length - 1) // self._strides + 1
        # Index behind the last window of each shard; index of the first window here among those of the shards.
        self._ends = np.cumsum(counts)
        self.first = 0
        self.count = int(self._ends[-1])
        used = np.where(counts > 0, (counts - 1) * self._strides + seq_length + 1, 0)
        self.tokens_dropped = int((sizes - used).sum())
        self._of_each, at = [], 0
        for name, part in shards.parts:
            windows = int(counts[at : at + len(part.arrays)].sum())
            if not windows:
                largest = sizes[at : at + len(part.arrays)].max()
                raise Refused(
                    f"{part.folder}: no window of seq_length = {seq_length} + 1 tokens in "
                    f"{plural(part.total_tokens, 'token')} (largest shard {largest}); "
                    "lower --seq-length or use more data"
                )
            self._of_each.append((name, windows))
            at += len(part.arrays)

    def __len__(self) -> int:
        return self.count

    @property
    def sources(self) -> list[tuple[str, int, int]]:
        """List (name, first window, number of windows) of each source."""
        if len(self._of_each) == 1:
            return [(self._of_each[0][0], 0, self.count)]
        ends = np.cumsum([n for _, n in self._of_each]).tolist()
        return [(name, end - n, n) for (name, n), end in zip(self._of_each, ends, strict=True)]

    def source_of(self, indices: np.ndarray) -> np.ndarray:
        """Find the source, by number, of the windows `indices` int64 (B,)."""
        ends = [first + n for _, first, n in self.sources]
        return np.searchsorted(ends, indices, side="right")

    @property
    def targets(self) -> int:
        """Number of targets of a pass over all windows."""
        return self.targets_of(np.arange(self.count)) if self.shards.masks else self.count * self.seq_length

    def targets_of(self, indices: np.ndarray) -> int:
        """Count the targets of the windows `indices` int64 (B,)."""
        targets = self.shards.row_targets
        return len(indices) * self.seq_length if targets is None else int(targets[indices + self.first].sum())

    def split(self, held_out: int) -> tuple[Windows, Windows]:
        """Split off the last `held_out` windows; a document may reach across the border.

        Raises Refused when either side is empty."""
        if not 0 < held_out < self.count:
            raise Refused(
                f"{self.shards.folder}: {held_out} of {plural(self.count, 'window')} held out leaves one side empty; "
                "give --val-dataset, or lower --val-batches, --batch-size or --seq-length"
            )
        train, val = copy(self), copy(self)
        train.count -= held_out
        val.first += train.count
        val.count = held_out
        return train, val

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read (ids, targets) int32 (B, T) of the windows `indices` int64 (B,); targets are the next tokens, or IGNORED.

        Raises MalformedFile: a shard became shorter since it was opened."""
        indices = indices + self.first
        which = np.searchsorted(self._ends, indices, side="right")
        self.shards.check_sizes(np.unique(which))
        starts = (indices - np.append(0, self._ends)[which]) * self._strides[which]
        rows = self._cut(self.shards.arrays, which, starts)
        ids, targets = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
        if self.shards.masks:
            mask = self._cut(self.shards.masks, which, starts)[:, 1:]
            # Not in place: in a batch of one row, ids and targets share memory.
            targets = np.where(mask > 0, targets, np.int32(IGNORED))
        return ids, targets

    def _cut(self, arrays: list[np.ndarray], which: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Copy seq_length + 1 items of arrays[which] from `starts` on, as int32 (B, T + 1)."""
        rows = np.empty((len(which), self.seq_length + 1), dtype=np.int32)
        for row, shard, start in zip(rows, which, starts, strict=True):
            row[:] = arrays[shard][start : start + self.seq_length + 1]
        return rows


class Permutation:
    """A seeded permutation of range(n) that is computed, not stored.

    Four Feistel rounds over the even number of bits that covers n - 1; an image outside the range is
    put in again until it falls inside, which ends because a permutation's cycles are closed
    (Black and Rogaway 2002, "cycle walking"). Integers only: the same on every machine."""

    def __init__(self, n: int, seed: int, number: int | str) -> None:
        self.n = n
        half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
        self._half = np.uint64(half)
        self._mask = np.uint64((1 << half) - 1)
        digest = hashlib.sha512(f"apr permutation {seed} {number}".encode()).digest()
        self._keys = np.frombuffer(digest, dtype="<u8")[:FEISTEL_ROUNDS].astype(np.uint64)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Permute indices int64 (B,) in range(n)."""
        x = self._rounds(indices.astype(np.uint64))
        while (outside := x >= self.n).any():
            x[outside] = self._rounds(x[outside])
        return x.astype(np.int64)

    def _rounds(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (mix(right + key) & self._mask)
        return (left << self._half) | right


class Batches:
    """The stream of batches: every window once a pass, in a new order each pass when shuffled.

    batch_size is the rows that `next` returns, those of a step; several ranks read the same stream. on_exhausted "cycle": a
    batch may straddle two passes; "stop": Exhausted is raised when a pass has fewer windows left than a step takes. turns: of
    the sources of a mixture, each of which has passes of its own; see Turns.
    Raises Refused for arguments that make no sense."""

    def __init__(
        self,
        windows: Windows,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        on_exhausted: str = "cycle",
        turns: Sequence[int] = (1,),
    ) -> None:
        if batch_size < 1:
            raise Refused(f"batch_size = {batch_size} is not a way to read a stream")
        if on_exhausted not in ("cycle", "stop"):
            raise Refused(f"on_exhausted = {on_exhausted!r}; choose cycle or stop")
        self.windows = windows
        self.turns, self.sources = Turns(turns), self.windows.sources
        # Places up to which no source begins again.
        self._limit, last = min((self.turns.place(k, n), k) for k, (*_, n) in enumerate(self.sources))
        self._first_used_up = self.sources[last][0]
        if on_exhausted == "stop" and batch_size > self._limit:
            raise Refused(
                f"{windows.shards.folder}: a step takes {plural(batch_size, 'window')}, there are "
                f"{self._limit}; lower --batch-size or --seq-length"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.on_exhausted = on_exhausted
        # Windows read, and the number of their targets.
        self._counted = (0, 0)
        self._read = 0
        self._ahead: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
        # One thread, from the first batch on.
        self._reader: ThreadPoolExecutor | None = None

    @property
    def windows_read(self) -> int:
        """Windows that were read, over all passes."""
        return self._read

    @property
    def targets_read(self) -> int:
        """Number of targets that were read, by the position in the data."""
        windows, (at, targets) = self.windows, self._counted
        if not windows.shards.masks:
            return self._read * windows.seq_length
        if not 0 < at <= self._read:
            targets = sum(self.targets_by_source())
        else:
            targets += windows.targets_of(self._indices(np.arange(at, self._read, dtype=np.int64)))
        self._counted = (self._read, targets)
        return targets

    def targets_by_source(self, ago: int = 0) -> list[int]:
        """Number of targets of each source that were read, by the position in the data, up to so many batches ago."""
        read = self._read - ago * self.batch_size
        return [self._targets_of(k, self.turns.count(k, read)) for k in range(len(self.sources))]

    def _targets_of(self, k: int, position: int) -> int:
        """Number of targets of a source before a position of its own stream."""
        _, first, n = self.sources[k]
        if not self.windows.shards.masks:
            return position * self.windows.seq_length
        number, rest = divmod(position, n)
        inside = self._own(k, np.arange(number * n, position, dtype=np.int64))
        whole = self.windows.targets_of(np.arange(first, first + n)) if number else 0
        return number * whole + (self.windows.targets_of(inside) if rest else 0)

    @property
    def passes(self) -> int:
        """Passes over the data, over every source of it, that are complete."""
        return min(self.passes_at(self._read))

    def passes_at(self, read: int) -> list[int]:
        """Passes over each source that are complete when so many windows were read."""
        return [self.turns.count(k, read) // n for k, (*_, n) in enumerate(self.sources)]

    def passes_ended(self) -> Iterator[dict[str, Any]]:
        """Yield passes, windows and, in a mixture, source of each source of which the latest batch completed a pass."""
        before, after = self.passes_at(self._read - self.batch_size), self.passes_at(self._read)
        for (name, _, windows), was, passes in zip(self.sources, before, after, strict=True):
            if passes > was:
                yield {"passes": passes, "windows": windows} | ({"source": name} if name else {})

    def sources_of(self, batches: int) -> np.ndarray | None:
        """Sources, by number, of the rows (batch_size,) of the batch that `next` gives (0), or gave last (-1); None where there
        is one source."""
        if len(self.sources) == 1:
            return None
        first = self._read + batches * self.batch_size
        return self.turns(np.arange(first, first + self.batch_size, dtype=np.int64))[0]

    def peek(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Read the batch that `next` gives, and stay; None where the data is used up."""
        if self.on_exhausted == "stop" and self._read + self.batch_size > self._limit:
            return None
        return self._ahead[0].result() if self._ahead else self._draw(self._read)

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids, targets), int32 (batch_size, seq_length) each."""
        n = self._limit
        if self.on_exhausted == "stop" and self._read + self.batch_size > n:
            first = f" until {self._first_used_up} is used up" if self._first_used_up else ""
            raise Exhausted(
                f"{self.windows.shards.folder}: {max(0, n - self._read)} of {plural(n, 'window')} left{first}, a step takes "
                f"{self.batch_size}; allow another pass with --on-exhausted cycle"
            )
        batch = self._ahead.popleft().result() if self._ahead else self._draw(self._read)
        self._read += self.batch_size
        self._draw_ahead()
        return batch

    def skip(self) -> int:
        """Go on by a batch without reading it; return the number of its targets."""
        first, self._read = self._read, self._read + self.batch_size
        self._ahead.clear()
        return self.windows.targets_of(self._indices(np.arange(first, self._read, dtype=np.int64)))

    def order(self, first: int, count: int, source: int | None = None) -> np.ndarray:
        """Look up the windows int64 (count,) at places first ... first + count - 1 of the endless stream, or of a source's own,
        reading none."""
        places = np.arange(first, first + count, dtype=np.int64)
        return self._indices(places) if source is None else self._own(source, places)

    def _draw_ahead(self) -> None:
        """Read the next batches on a thread, so that no step waits for the disk.

        Does not change `state`: batches read ahead and not asked for are read again on resuming."""
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        while len(self._ahead) < BATCHES_AHEAD:
            first = self._read + len(self._ahead) * self.batch_size
            if self.on_exhausted == "stop" and first + self.batch_size > self._limit:
                return
            self._ahead.append(self._reader.submit(self._draw, first))

    def _draw(self, read: int) -> tuple[np.ndarray, np.ndarray]:
        places = np.arange(read, read + self.batch_size, dtype=np.int64)
        return self.windows.read(self._indices(places))

    def _indices(self, places: np.ndarray) -> np.ndarray:
        """Look up the windows (B,) int64 at places (B,) int64 of the endless stream."""
        sources, positions = self.turns(places)
        indices = np.empty_like(positions)
        for k in np.unique(sources):
            indices[sources == k] = self._own(int(k), positions[sources == k])
        return indices

    def _own(self, k: int, positions: np.ndarray) -> np.ndarray:
        """Look up the windows (B,) int64 at positions (B,) int64 of a source's own endless stream."""
        _, first, n = self.sources[k]
        number, place = np.divmod(positions, n)
        if not self.shuffle:
            return first + place
        indices = np.empty_like(place)
        for p in np.unique(number):
            # Of equal sources the orders differ.
            permutation = Permutation(n, self.seed, f"{p} of source {k}" if k else int(p))
            indices[number == p] = permutation(place[number == p])
        return first + indices

    def _identity(self) -> dict[str, Any]:
        return {
            "data_sha256": self.windows.shards.sha256,
            "seq_length": self.windows.seq_length,
            "first_window": self.windows.first,
            "windows": self.windows.count,
            "step_windows": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            **({"turns": list(self.turns.counts)} if len(self.sources) > 1 else {}),
        }

    def state(self) -> dict[str, Any]:
        """Return position and identity of the stream, for json.dumps."""
        number, position = divmod(self._read, self.windows.count)
        return {"pass": number, "position": position, **self._identity()}

    def rewind(self) -> None:
        """Return to the first batch of the first pass."""
        self._read = 0
        self._ahead.clear()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`. Raises Refused for a state of other data, order or step size."""
        if not isinstance(state, dict):
            raise Refused(f"data position: {state!r} is not a state of the data stream")
        for key, ours in self._identity().items():
            if state.get(key) != ours:
                raise Refused(
                    f"data position: {key} = {state.get(key)!r} in the saved state, {ours!r} in this run; "
                    "resume with the data and settings of the saved run"
                )
        for key, end in (("pass", (1 << 62) // self.windows.count), ("position", self.windows.count)):
            value = state.get(key)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < end:
                raise Refused(f"data position: {key} = {value!r} is not a whole number in 0..{end - 1}")
        self._read = state["pass"] * self.windows.count + state["position"]
        self._ahead.clear()


def sequential(
    windows: Windows, batch_size: int, max_windows: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield every window once, in order: (ids, targets) int32 (B, T), B smaller in the last batch.

    With max_windows fewer windows, evenly spaced, so that all documents contribute; the choice does not depend on the
    batch size."""
    return (windows.read(indices) for indices in spread(windows, batch_size, max_windows))


def spread(windows: Windows, batch_size: int, max_windows: int | None = None) -> Iterator[np.ndarray]:
    """Yield the windows int64 (B,) that `sequential` reads."""
    if batch_size < 1:
        raise Refused(f"batch_size = {batch_size} is not positive")
    stop = windows.count if max_windows is None else min(windows.count, max_windows)
    for start in range(0, stop, batch_size):
        places = np.arange(start, min(start + batch_size, stop), dtype=np.int64)
        yield places * windows.count // stop


def trained_targets(targets: np.ndarray) -> int:
    """Count the targets (B, T) that a loss is computed for."""
    return int(np.count_nonzero(targets >= 0))
