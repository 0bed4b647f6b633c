"""Pack examples into rows of seq_length + 1 tokens."""

from __future__ import annotations

import bisect
import hashlib
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from ...common.atomic import check_output, write_json
from ...common.files import make_folder
from ...tokenizer.tokenizer import Tokenizer
from ..manifest import figures
from .packed import RECORD, PackManifest
from .render import EncodedExample


def fit(e: EncodedExample, room: int) -> EncodedExample | None:
    """Cut an example to at most `room` tokens: the end behind its last answer goes first, then its beginning.

    An answer whose beginning is cut off is not trained on. None where no whole answer is left."""
    if e.ids.size <= room:
        return e
    end = int(np.flatnonzero(e.trained)[-1]) + 1
    start = max(0, end - room)
    kept = e.part(start, end)
    if start and kept.trained[0]:
        stops = np.flatnonzero(~kept.trained)
        lost = int(stops[0]) if stops.size else kept.trained.size
        kept.trained[:lost], kept.byte_runs[:lost] = False, 0
    return kept if kept.trained.any() else None


def best_fit(sizes: np.ndarray, room: int) -> list[list[int]]:
    """Group the indices of sizes, int64 (n,), into rows that sum to at most `room`: each goes, the longest first, into the
    row that it fills best (best fit decreasing)."""
    rows: list[list[int]] = []
    # Rows by the room left in them, and the keys of that table in order.
    by_room: dict[int, list[int]] = {}
    lefts: list[int] = []
    for i in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[i])
        at = bisect.bisect_left(lefts, size)
        if at < len(lefts):
            left = lefts[at]
            row = by_room[left].pop()
            if not by_room[left]:
                del by_room[left], lefts[at]
        else:
            row, left = len(rows), room
            rows.append([])
        rows[row].append(i)
        if left > size:
            if left - size not in by_room:
                bisect.insort(lefts, left - size)
            by_room.setdefault(left - size, []).append(row)
    return rows


def separator_of(inside: np.ndarray, tokenizer: Tokenizer) -> int | None:
    """Choose the id between examples: the end of a text, or else the highest id that occurs inside no example.

    Tokens behind a separator do not see it and it is never trained on, so any id will do. None where every id occurs.
    inside: int64 (V,), occurrences of each id before the end of an example."""
    if tokenizer.eos_id is not None and not inside[tokenizer.eos_id]:
        return tokenizer.eos_id
    free = np.flatnonzero(inside == 0)
    return int(free[-1]) if free.size else None


class Spool:
    """Examples of one side, one behind the other in two temporary files on a stack; then packed into rows."""

    def __init__(self, folder: Path, vocab_size: int, stack: ExitStack) -> None:
        self.folder = make_folder(folder)
        self.sizes: list[int] = []
        self.answer_bytes = 0
        # Occurrences of each id before the end of an example.
        self.inside = np.zeros(vocab_size, np.int64)
        self._digest = hashlib.sha256()
        self._files = [stack.enter_context(TemporaryFile(dir=folder)) for _ in range(2)]  # noqa: SIM115

    def add(self, e: EncodedExample, sha256: str) -> None:
        """Append an example; sha256: of its ids and labels."""
        self._files[0].write(e.ids.astype("<u4").data)
        self._files[1].write(e.trained.astype(np.uint8).data)
        self.sizes.append(e.ids.size)
        self.answer_bytes += e.answer_bytes
        self._digest.update(bytes.fromhex(sha256))
        np.add.at(self.inside, e.ids[:-1], 1)

    def pack(self, m: PackManifest, together: int = 1) -> None:
        """Write ids.bin, trained.bin and, with the counts filled in, instruct.json. together: examples that share a row."""
        for f in self._files:
            f.flush()
        ids, trained = (np.memmap(f, t, "r") for f, t in zip(self._files, ("<u4", "u1"), strict=True))
        sizes = np.array(self.sizes, np.int64)
        ends, room = np.cumsum(sizes), m.seq_length + 1
        costs = np.full(sizes.size, room)
        if m.separator is not None:
            costs = np.minimum(sizes + (ids[ends - 1] != m.separator), room)
        whole = np.minimum(costs.reshape(-1, together).sum(1), room)
        rows = [[i * together + k for i in row for k in range(together)] for row in best_fit(whole, room)]
        counts, digests = np.zeros(m.vocab_size, np.int64), (hashlib.sha256(), hashlib.sha256())
        places = [check_output(self.folder / name) for name in ("ids.bin", "trained.bin")]
        with open(places[0], "wb") as a, open(places[1], "wb") as b:
            for row in rows:
                x, y, at = np.full(room, m.separator or 0, "<u4"), np.zeros(room, np.uint8), 0
                for i in row:
                    here, there = slice(at, at + sizes[i]), slice(ends[i] - sizes[i], ends[i])
                    x[here], y[here] = ids[there], trained[there]
                    # The token before belongs to another example.
                    y[at] = 0
                    at += int(costs[i])
                np.add.at(counts, x[y > 0], 1)
                for out, digest, part in zip((a, b), digests, (x, y), strict=True):
                    out.write(part.data)
                    digest.update(part.data)
        m.pairs = sizes.size // 2 if together == 2 else 0
        m.rows, m.examples, m.tokens, m.trained = len(rows), sizes.size, int(ends[-1]), int(counts.sum())
        m.answer_bytes, m.examples_sha256 = self.answer_bytes, self._digest.hexdigest()
        m.ids_sha256, m.trained_sha256 = (d.hexdigest() for d in digests)
        m.audit = figures(counts, m.answer_bytes, None)
        write_json(self.folder / RECORD, asdict(m))
