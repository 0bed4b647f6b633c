"""Split the trained weights between ranks: each owns whole tiles, and adds what all of them have computed for its part."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from .communicator import Communicator

# Parts are cut between so many elements: a multiple, in every backend, of those whose squares are one term of a norm.
TILE = 16384
# elements of a rank's part that are exchanged at a time, where the communicator can: what is received takes little memory
AT_A_TIME = 1 << 22
# of the matrix that a part of a flat buffer is taken for; every flat buffer is a multiple long
COLUMNS = 64


@dataclass(frozen=True)
class Bucket:
    """Elements of a flat array that are exchanged together: rank r owns `each` of them from first + r * each on.

    stop: where the bucket ends; the last owners may have less than `each`, or nothing. at: where it begins in the own part"""

    first: int
    stop: int
    each: int
    at: int

    def of(self, rank: int) -> slice:
        """Find what a rank owns in the flat array."""
        start = min(self.stop, self.first + rank * self.each)
        return slice(start, min(self.stop, start + self.each))


class Cut:
    """Buckets of a flat array (size,), and the parts of `count` ranks: equally long, padded with zeros where there is less.

    borders: of tiles, where buckets end. What does not decay, few elements behind all others,
    is rank 0's, with the rest of their tile.

    tail    where that begins in the flat array; tail_at: in the part
    length  of a part
    padded  of a flat array, with what is moved behind its end because every rank moves as much
    """

    def __init__(self, size: int, decayed: int, count: int, borders: Sequence[int] = ()) -> None:
        self.size, self.count, self.length = size, count, 0
        self.tail = decayed // TILE * TILE
        edges = sorted(min(self.tail, b) for b in borders)
        self.buckets: list[Bucket] = []
        for first, stop in zip([0, *edges], [*edges, self.tail], strict=True):
            self._add(first, stop, -(-(stop - first) // TILE // count) * TILE)
        self.tail_at = self.length
        self._add(self.tail, size, -(-(size - self.tail) // TILE) * TILE)
        self.decayed = self.tail_at + decayed - self.tail
        self.padded = max([size, *(b.first + count * b.each for b in self.buckets)])

    def _add(self, first: int, stop: int, each: int) -> None:
        if stop > first:
            self.buckets.append(Bucket(first, stop, each, self.length))
            self.length += each

    @property
    def widest(self) -> int:
        """Elements of the longest piece that a rank gets of a bucket."""
        return max((b.each for b in self.buckets), default=0)

    def runs(self, rank: int) -> list[tuple[slice, slice]]:
        """List what a rank owns: (place in the flat array, place in its part)."""
        own = [(b.of(rank), b.at) for b in self.buckets]
        return [(flat, slice(at, at + flat.stop - flat.start)) for flat, at in own if flat.stop > flat.start]


class Shard:
    """Part of the trained weights that this rank owns.

    w         (size,) of all ranks; cut.padded long where the communicator is `even`
    own       (cut.length,), the part of this rank, of the same dtype
    received  room for the pieces of a bucket from all ranks
    """

    start: np.ndarray | None

    def __init__(
        self, be: ModuleType, ranks: Communicator, cut: Cut, w: Any, own: Any, received: Any
    ) -> None:
        self.be, self.ranks, self.cut, self.w, self.own, self.received = be, ranks, cut, w, own, received
        self.runs = cut.runs(ranks.rank)
        # w as what is trained has it; and the weights as they began, where a gate may ask for them
        self.trained, self.start = w, None
        gradients, weights = be.square_tiles[w.dtype.name]
        tail = slice(cut.tail_at, cut.length)
        self._gradients = Squares(self, gradients, [tail])
        parts = slice(tail.start, cut.decayed), slice(cut.decayed, tail.stop)
        self._weights = Squares(self, weights, parts)

    # What a rank owns

    def take(self, host: np.ndarray) -> np.ndarray:
        """Cut the own part out of a flat array on the host; what pads it is 0."""
        part = np.zeros(self.cut.length, host.dtype)
        for flat, local in self.runs:
            part[local] = host[flat]
        return part

    def inside(self, offset: int, size: int) -> Iterator[slice]:
        """Find in the own part what it has of `size` elements of the flat array."""
        for flat, local in self.runs:
            start, stop = max(flat.start, offset), min(flat.stop, offset + size)
            if start < stop:
                yield slice(local.start + start - flat.start, local.start + stop - flat.start)

    def places(self, own: np.ndarray) -> np.ndarray:
        """Find where in the flat array elements of the own part are; -1 for those that pad it."""
        found = np.full(own.size, -1)
        for flat, local in self.runs:
            at = (own >= local.start) & (own < local.stop)
            found[at] = own[at] + flat.start - local.start
        return found

    def begin(self, host: np.ndarray) -> None:
        """Set all weights from a float32 array on the host."""
        self.be.from_host(self.w[: self.cut.size], host)
        self.start = host if self.ranks.rank == 0 else None

    # Moves, and sums in the order of ranks

    def fold(self, k: int, total: Any, x: Any, micro_batches: int, begins: bool) -> None:
        """total += the own piece of bucket k of x of each rank, from rank 0 to the last that had a micro-batch.

        begins: the first of them takes the place of what total holds. total (cut.length,), x as w"""
        b, count = self.cut.buckets[k], self.ranks.count
        step = b.each if self.ranks.even else AT_A_TIME
        own = b.of(self.ranks.rank)
        for first in range(0, b.each, step):
            starts = [b.first + r * b.each + first for r in range(count)]
            sizes = [step] * count
            if not self.ranks.even:
                sizes = [max(0, min(step, b.of(r).stop - start)) for r, start in enumerate(starts)]
            n, start = sizes[self.ranks.rank], starts[self.ranks.rank]
            pieces = self.received[: count * n].reshape(count, n)
            self.ranks.exchange(pieces, x, starts, sizes)
            if (real := min(n, own.stop - start)) > 0:
                at = b.at + first
                self._add(total[at : at + real], [p[:real] for p in pieces[:micro_batches]], begins)

    def _add(self, total: Any, pieces: list[Any], begins: bool) -> None:
        """total = ((total + pieces[0]) + pieces[1]) ...; begins: without total.  (n,), a multiple of COLUMNS"""
        total, *pieces = (x.reshape(-1, COLUMNS) for x in (total, *pieces))
        if begins and len(pieces) == 1:
            self.be.copy(total, pieces[0])
        for n, piece in enumerate(pieces):
            if n or not begins:
                self.be.add(total, pieces[0] if begins and n == 1 else total, piece)

    def gather(self) -> None:
        """Give the own part of the weights to all ranks, in the order of buckets: what the last rank sends too much of one is
        overwritten by the next."""
        with self.ranks.beside():
            for b in self.cut.buckets:
                out, sizes = self._sizes(b, self.w)
                self.ranks.gather(out, self.own[b.at : b.at + sizes[self.ranks.rank]], sizes)
        self.ranks.join()

    def _sizes(self, b: Bucket, x: Any) -> tuple[Any, list[int]]:
        """Find a bucket in x, and how many elements every rank moves of it."""
        ranks = range(self.ranks.count)
        sizes = [b.each if self.ranks.even else b.of(r).stop - b.of(r).start for r in ranks]
        return x[b.first : b.first + sum(sizes)], sizes

    def whole(self, part: Any) -> np.ndarray | None:
        """Join the parts (cut.length,) float32 of all ranks on the host of rank 0; None on the others."""
        out = np.empty(self.cut.size, np.float32) if self.ranks.rank == 0 else None
        for b in self.cut.buckets:
            _, sizes = self._sizes(b, self.w)
            n = sizes[self.ranks.rank]
            piece = part[b.at : b.at + n]
            if self.ranks.even:  # in place, in memory that can be moved
                place = self.received[self.ranks.rank * n :][:n]
                self.be.copy(place, piece)
                piece = place
            joined = self.ranks.to_first(piece, sizes, self.received)
            if out is not None:
                out[b.first : b.stop] = self.be.to_host(joined[: b.stop - b.first])
        return out

    # Norms

    def add_gradients(self, total: Any, g: Any) -> None:
        """total[0] += sum(g^2) over the parts of all ranks, as one process sums.  total (1,) float64, g (cut.length,)"""
        self._gradients.add(total, g)

    def add_weights(self, total: Any, x: Any) -> None:
        """Add those of new weights, of which one process sums those that decay and the others apart."""
        self._weights.add(total, x)


class Squares:
    """Sum of squares over the parts of all ranks, tile by tile in the order of the flat array, as one process makes it.

    tile: elements whose squares are one term. tails: parts of the tail, the first of which goes on with what is before it, and
    a second one is a sum of its own; they may be empty"""

    def __init__(self, shard: Shard, tile: int, tails: Sequence[slice]) -> None:
        be, ranks, cut = shard.be, shard.ranks, shard.cut
        self.shard, self.tile, self.tails = shard, tile, tails
        self.main = cut.tail_at // tile
        self.rows = [-(-(t.stop - t.start) // tile) for t in tails]
        count = self.main + sum(self.rows)
        self.rooms = [be.empty((max(1, n) * tile,), "float32") for n in self.rows]
        self.sums, self.gathered = (
            ranks.empty(be, count, "float64"),
            ranks.empty(be, ranks.count * count, "float64"),
        )
        self.placed = be.empty((cut.padded // tile + sum(self.rows) + 1,), "float64")

    def add(self, total: Any, x: Any) -> None:
        """total[0] += the sum.  x (cut.length,)"""
        shard, be, ranks, tile, main = self.shard, self.shard.be, self.shard.ranks, self.tile, self.main
        be.fill(self.sums, 0)
        if main:
            be.add_sum_sq(self.sums[:main], x[: main * tile].reshape(main, tile))
        at = main
        for part, room, rows in zip(self.tails, self.rooms, self.rows, strict=True):
            if rows:
                be.copy(room[: part.stop - part.start], x[part])
                be.add_sum_sq(self.sums[at : at + rows], room.reshape(rows, tile))
            at += rows
        with ranks.beside():
            ranks.gather(self.gathered, self.sums, [self.sums.size] * ranks.count)
        ranks.join()
        every, ends = self.gathered.reshape(ranks.count, -1), main
        for b in shard.cut.buckets:
            if b.first < shard.cut.tail:
                n, first = b.each // tile, b.first // tile
                place = self.placed[first : first + ranks.count * n].reshape(ranks.count, n)
                be.copy(place, every[:, b.at // tile : b.at // tile + n])
        first = shard.cut.tail // tile
        for k, rows in enumerate(self.rows):
            start = 0 if k else first
            if rows:
                be.copy(self.placed[start : start + rows], every[0, ends : ends + rows])
            if start + rows:
                be.add_sum(total, self.placed[: start + rows])
            ends += rows


def hashes(be: ModuleType, layout: Any, flat: Any) -> list[tuple[str, int]]:
    """Hash each tensor of a flat array (layout.size,): (name, CRC-32)."""
    slots = ((s.hf, flat[s.offset : s.offset + s.size]) for s in layout.slots)
    return [(name, crc(be.to_host(x))) for name, x in slots]


def crc(x: np.ndarray) -> int:
    """CRC-32 of the bytes of an array."""
    return zlib.crc32(np.ascontiguousarray(x).view(np.uint8).data)
