"""Find the windows of a step by a second formula of the order of the data, written apart from the reader's, in whole numbers.

Place i of the stream is of step i // batch size + 1. In a mixture the j-th of n turns of a source in a period comes at
(j + 1/2) / n of the way, the first source first among equals; each source has passes of its own. A pass is the order of the
shards, or a permutation: four Feistel rounds of keys from SHA-512 of seed, pass and source, again while the image is outside.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Iterator, Sequence

MASK64 = (1 << 64) - 1
ROUNDS = 4


def _mixed(z: int) -> int:
    """Apply the finalizer of SplitMix64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK64
    return z ^ (z >> 31)


def permuted(place: int, n: int, name: str) -> int:
    """Compute the image of a place among n by the permutation of a name: seed, pass and source."""
    bits = 1
    while 4**bits < n:
        bits += 1
    digest, low = hashlib.sha512(f"apr permutation {name}".encode()).digest(), 2**bits - 1
    keys = [int.from_bytes(digest[8 * k : 8 * k + 8], "little") for k in range(ROUNDS)]
    while True:
        a, b = place >> bits, place & low
        for key in keys:
            a, b = b, a ^ (_mixed((b + key) & MASK64) & low)
        place = a << bits | b
        if place < n:
            return place


def turns(counts: Sequence[int], first: int) -> Iterator[tuple[int, int]]:
    """Yield (source, position in its own stream) of the places from `first` on, without end."""
    if len(counts) == 1:
        yield from ((0, place) for place in itertools.count(first))
    whole, skipped = divmod(first, sum(counts))
    while True:
        heap = [(0.5 / n, k, 0) for k, n in enumerate(counts)]
        heapq.heapify(heap)
        while heap:
            _, k, j = heap[0]
            if j + 1 < counts[k]:
                heapq.heapreplace(heap, ((j + 1.5) / counts[k], k, j + 1))
            else:
                heapq.heappop(heap)
            if skipped:
                skipped -= 1
            else:
                yield k, whole * counts[k] + j
        whole += 1


def window(source: int, position: int, seed: int, shuffle: bool, size: int) -> int:
    """Find the window of a source at a position in its own stream.  size: windows of it"""
    passes, place = divmod(position, size)
    name = f"{seed} {passes} of source {source}" if source else f"{seed} {passes}"
    return permuted(place, size, name) if shuffle else place
