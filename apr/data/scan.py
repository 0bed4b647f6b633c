"""Read token shards once: hashes, counts of ids, documents with their identities and lengths."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

# Read at once: bounds the memory of a thread.
CHUNK_TOKENS = 1 << 20
# Per factor of two, in the histogram of document lengths.
LENGTH_BINS = 4
# A document's identity is sum_i mix(id_i) * R^i modulo 2^64: a sum over pieces of a document can be continued,
# and R is odd, so that a power of it can be divided out again.
R = 0x9E3779B97F4A7C15 | 5
R_INVERSE = pow(R, -1, 1 << 64)

# Called with the tokens read since the last call.
ScanProgress = Callable[[int], None]


@dataclass
class Scan:
    """Result of a pass over one folder.

    counts      (V,) int64       occurrences of each id below V
    sha256      list             of each shard, hexadecimal
    outside                      (shard, position, id) of the first id that is not below V, or None
    documents                    delimited by the end-of-text id, empty ones left out; 0 where there is no such id
    lengths     (bins,) int64    documents of 2^(i/4) up to 2^((i+1)/4) tokens
    identities  (n,) uint64      of the documents, sorted, where they were asked for
    shared                       documents that are also in another folder, where one was given
    ends                         occurrences of the end-of-text id
    tail                         tokens after the last of them
    """

    counts: np.ndarray
    sha256: list[str]
    outside: tuple[int, int, int] | None = None
    documents: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(64 * LENGTH_BINS, np.int64))
    identities: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    shared: int = 0
    ends: int = 0
    tail: int = 0


@dataclass
class _Part:
    """Stretch of a document: sum of its terms with powers of R from 0 on, and number of tokens."""

    total: int = 0
    tokens: int = 0

    def then(self, total: int, tokens: int) -> _Part:
        """Append a stretch."""
        return _Part((self.total + total * pow(R, self.tokens, 1 << 64)) % (1 << 64), self.tokens + tokens)


@dataclass
class _Shard:
    sha256: str
    counts: np.ndarray
    outside: tuple[int, int] | None
    # Up to the first end of text, or the whole shard; after the last end of text, None without any.
    head: _Part
    tail: _Part | None
    identities: list[np.ndarray]
    lengths: list[np.ndarray]


def scan(
    arrays: list[np.ndarray],
    vocab_size: int,
    eos_id: int | None,
    keep: bool = False,
    against: np.ndarray | None = None,
    threads: int = 1,
    progress: ScanProgress | None = None,
) -> Scan:
    """Read every shard of a folder once, uint32 (tokens,) each.

    eos_id   ends a document; None: nothing does
    keep     return the documents' identities
    against  (n,) uint64, sorted identities of another folder: count the documents that are among them"""
    out = Scan(np.zeros(vocab_size, np.int64), [])
    # Of the longest chunk: of a small corpus, tables of CHUNK_TOKENS would take longer than all the rest.
    tables = _Tables(vocab_size, min(CHUNK_TOKENS, max((a.size for a in arrays), default=0)))
    open_part, kept = _Part(), []

    def one(array: np.ndarray) -> _Shard:
        return _scan_shard(array, vocab_size, eos_id, tables, progress)

    def finish(identities: np.ndarray, lengths: np.ndarray) -> None:
        full = lengths > 0
        identities, lengths = identities[full], lengths[full]
        out.documents += lengths.size
        if lengths.size:
            out.lengths += np.bincount(_bin(lengths), minlength=out.lengths.size)
        if keep:
            kept.append(identities)
        if against is not None and against.size:
            at = np.minimum(np.searchsorted(against, identities), against.size - 1)
            out.shared += int((against[at] == identities).sum())

    for index, shard in enumerate(_in_order(one, arrays, threads)):
        out.counts += shard.counts
        out.sha256.append(shard.sha256)
        if shard.outside and out.outside is None:
            out.outside = (index, *shard.outside)
        open_part = open_part.then(shard.head.total, shard.head.tokens)
        if shard.tail is not None:
            finish(*_finished(open_part))
            for identities, lengths in zip(shard.identities, shard.lengths, strict=True):
                finish(identities, lengths)
            open_part = shard.tail
    out.tail = open_part.tokens
    if eos_id is not None:
        # With an EOS between documents only, the last document has none.
        finish(*_finished(open_part))
        out.ends = int(out.counts[eos_id]) if eos_id < vocab_size else 0
    if keep:
        out.identities = np.sort(np.concatenate(kept) if kept else np.empty(0, np.uint64))
    return out


def _in_order(
    one: Callable[[np.ndarray], _Shard], arrays: list[np.ndarray], threads: int
) -> Iterator[_Shard]:
    """Yield the shards' results in their order, with one more shard than threads in work at a time."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        running = [pool.submit(one, array) for array in arrays[: threads + 1]]
        for i in range(len(arrays)):
            shard = running[i].result()
            # Results that were handed out do not stay in memory.
            running[i] = None  # type: ignore[call-overload]
            if len(running) < len(arrays):
                running.append(pool.submit(one, arrays[len(running)]))
            yield shard


class _Tables:
    """mix(id) of every id and the powers of R and of its inverse for chunks of up to so many tokens, uint64."""

    def __init__(self, vocab_size: int, tokens: int) -> None:
        self.mixed = mix(np.arange(1, vocab_size + 1, dtype=np.uint64))
        self.powers = _powers(R, tokens)
        self.inverse = _powers(R_INVERSE, tokens)


def _powers(base: int, count: int) -> np.ndarray:
    """Compute base^0 .. base^(count-1) modulo 2^64, uint64 (count,), by doubling."""
    out = np.ones(count, np.uint64)
    done = 1
    while done < count:
        out[done : 2 * done] = out[: min(done, count - done)] * np.uint64(pow(base, done, 1 << 64))
        done *= 2
    return out


def mix(z: np.ndarray) -> np.ndarray:
    """Apply the finalizer of SplitMix64 (Steele, Lea, Flood 2014) to z (B,) uint64, modulo 2^64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _finished(part: _Part) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([part.tokens], np.int64)
    return _identities(np.array([part.total], np.uint64), lengths), lengths


def _identities(totals: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return mix(totals ^ mix(lengths.astype(np.uint64)))


def _bin(lengths: np.ndarray) -> np.ndarray:
    return np.floor(LENGTH_BINS * np.log2(lengths)).astype(np.int64)


def _scan_shard(
    array: np.ndarray, vocab_size: int, eos_id: int | None, tables: _Tables, progress: ScanProgress | None
) -> _Shard:
    digest = hashlib.sha256()
    out = _Shard("", np.zeros(vocab_size, np.int64), None, _Part(), None, [], [])
    open_part = _Part()
    for start in range(0, array.size, CHUNK_TOKENS):
        chunk = array[start : start + CHUNK_TOKENS]
        digest.update(chunk.data)
        if chunk.max() >= vocab_size:
            if out.outside is None:
                i = int(np.argmax(chunk >= vocab_size))
                out.outside = (start + i, int(chunk[i]))
            # Counted apart, and part of no document that could be elsewhere.
            chunk = np.minimum(chunk, vocab_size)
            out.counts += np.bincount(chunk, minlength=vocab_size + 1)[:vocab_size]
            chunk = np.minimum(chunk, vocab_size - 1)
        else:
            out.counts += np.bincount(chunk, minlength=vocab_size)
        if eos_id is not None:
            open_part = _documents(chunk, eos_id, tables, open_part, out)
        if progress:
            progress(chunk.size)
    out.sha256 = digest.hexdigest()
    if out.tail is None:
        out.head = open_part
    else:
        out.tail = open_part
    return out


def _documents(chunk: np.ndarray, eos_id: int, tables: _Tables, open_part: _Part, out: _Shard) -> _Part:
    """Finish the documents that end in a chunk; return the stretch that is open at its end."""
    ends = np.flatnonzero(chunk == eos_id)
    terms = tables.mixed[chunk] * tables.powers[: chunk.size]
    first = int(ends[0]) if ends.size else chunk.size
    open_part = open_part.then(int(terms[:first].sum()), first)
    if not ends.size:
        return open_part
    if out.tail is None:
        out.head, out.tail = open_part, _Part()
        lengths, totals = np.empty(0, np.int64), np.empty(0, np.uint64)
    else:
        lengths = np.array([open_part.tokens], np.int64)
        totals = np.array([open_part.total], np.uint64)
    # Of the documents after the first end of text, up to the last one.
    starts = ends[:-1] + 1
    inner = np.diff(ends) - 1
    if inner.size:
        # reduceat takes a term, not an empty sum, where a document is empty: those are dropped by their length.
        sums = np.add.reduceat(np.append(terms, np.uint64(0)), np.stack([starts, ends[1:]], 1).reshape(-1))[
            ::2
        ]
        totals = np.append(totals, sums * tables.inverse[starts])
        lengths = np.append(lengths, inner)
    out.identities.append(_identities(totals, lengths))
    out.lengths.append(lengths)
    last = int(ends[-1]) + 1
    rest = terms[last:]
    total = int(rest.sum()) * pow(R_INVERSE, last, 1 << 64) % (1 << 64) if rest.size else 0
    return _Part(total, rest.size)
