"""Account for the documents of a corpus: each stands in the shards once, as its file has it, or is a copy, or was left out.

The files are read a second time by other code (plain.py), in the order of the corpus, and what they hold is compared with
what the ids in the shards spell, document by document. Nothing of the encoding is asked but the names that it left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..common.files import lines_of, opened, parse_json, read_json
from ..common.finding import Finding
from ..common.units import in_bytes, plural
from ..tokenizer.tokenizer import Tokenizer
from .conservation import gives_back
from .corpus import Corpus
from .encode_folder import RECORD, SKIPPED
from .plain import DAMAGES, Unfollowed, beginning, texts
from .shards import TokenShards
from .source import Skipped, Source
from .text import read_text

NAME, BOUND = (
    "documents of the files",
    "each once and as its file has it, or a copy, or left out with a reason",
)
# Text that is read and compared: all of a small corpus, the beginning of a large one.
BUDGET_BYTES = 16 << 20
CHUNK_TOKENS = 1 << 16
# Reasons to leave a text out that are none of its own.
OF_THE_ENCODER = ("cannot be cut", "too long")
# Stands for a special token: no text holds it.
NO_TEXT = b"\xff"


def accounted(
    corpus: Corpus,
    folder: Path,
    sides: dict[str, TokenShards],
    tokenizer: Tokenizer,
    val_fraction: float,
    distinct: int,
    reused: bool = False,
) -> Finding:
    """Compare the documents of the files with those of the shards below `folder`, side by side.

    distinct: documents that the first reading found, without copies. reused: an earlier call made the folder, of files with
    the same documents; names and copies may be others by now"""
    table = tokenizer.spelling()
    if table is None or not gives_back(tokenizer):
        return Finding.skipped(
            NAME, "the ids of this tokenizer do not give back the text that they stand for", BOUND
        )
    if any(shards.border_id is None for shards in sides.values()):
        return Finding.skipped(NAME, "eos_policy none: no document can be told from the next", BOUND)
    for i in tokenizer.special_tokens():
        table[i] = NO_TEXT
    account = _Account(folder, sides, tokenizer, table, val_fraction, reused)
    return account.close(account.walk(corpus), distinct)


class _Account:
    """The comparison: documents met so far, and the next one of each side."""

    def __init__(
        self,
        folder: Path,
        sides: dict[str, TokenShards],
        tokenizer: Tokenizer,
        table: list[bytes],
        fraction: float,
        reused: bool,
    ) -> None:
        self.folder, self.tokenizer, self.fraction, self.reused = folder, tokenizer, fraction, reused
        self.record = read_json(folder / RECORD)["result"]
        with opened(folder / SKIPPED) as (f, _):
            items = (parse_json(line.decode(), str(folder / SKIPPED)) for line in lines_of(f, SKIPPED))
            self.left_out = {item["name"]: item["reason"] for item in items}
        self.shards = sides
        self.sides = {name: _documents(shards, table) for name, shards in sides.items()}
        self.heads = {name: next(texts, None) for name, texts in self.sides.items()}
        self.seen: set[bytes] = set()
        # Stands before every text, in both sides.
        self.prefix = b"".join(table[i] for i in sides["train"].prefix_ids)
        self.written = self.copies = self.skipped = self.bytes = self.misplaced = 0

    def walk(self, corpus: Corpus) -> tuple[str, bool]:
        """Follow the files; returns what is wrong, "" for nothing, and whether all of them were followed."""
        for source in corpus.sources:
            left = BUDGET_BYTES - self.bytes
            try:
                if self.left_out.get(source.name) in DAMAGES:
                    # Another decoder may read more of it.
                    raise Unfollowed(f"{source.name} is damaged")
                follow = self._file if source.kind == "text" else self._records
                wrong = follow(corpus, source, left)
            except Unfollowed:
                return "", False
            if wrong or self.bytes >= BUDGET_BYTES:
                return wrong, False
        return "", True

    def _records(self, corpus: Corpus, source: Source, left: int) -> str:
        if source.name in self.left_out:
            self.skipped += 1
            return ""
        for name, text in texts(source, corpus.keys, left):
            if wrong := self._take(name, text):
                return wrong
            if self.bytes >= BUDGET_BYTES:
                break
        return ""

    def _file(self, corpus: Corpus, source: Source, left: int) -> str:
        text, is_whole = beginning(source, left)
        if text is None or (corpus.piece_bytes is None and is_whole):
            return self._take(source.name, text)
        if corpus.piece_bytes is None:
            raise Unfollowed(f"{source.name} is longer than what is left to read")
        # The reader says where a document ends, the file what it holds.
        at = 0
        for item in read_text(source, corpus.piece_bytes, lambda n: None):
            if isinstance(item, Skipped) and not is_whole:
                raise Unfollowed(f"{source.name}: {item.reason}, maybe behind what is left to read")
            if isinstance(item, Skipped):
                return f"{item.name}: {item.reason}, though its file is text"
            if not is_whole and at + item.num_bytes > len(text):
                raise Unfollowed(f"{source.name} is longer than what is left to read")
            if wrong := self._take(item.name, text[at : at + item.num_bytes]):
                return wrong
            at += item.num_bytes
        return "" if at == len(text) else f"{source.name}: {at:,} of {plural(len(text), 'byte')} were read"

    def _take(self, name: str, text: bytes | None) -> str:
        """Find a document of the files among the next ones of the shards; returns what is wrong."""
        reason = self.left_out.get(name)
        if text is None or reason in OF_THE_ENCODER:
            self.skipped += 1
            # A copy of it counts as one.
            self.seen.add(hashlib.sha256(text or b"").digest())
            return ""
        if reason:
            return f"{name} is text, and was left out: {reason}"
        if len(text) > BUDGET_BYTES:
            raise Unfollowed(f"{name} is longer than a check reads")
        self.bytes += len(text)
        digest = hashlib.sha256(text).digest()
        if digest in self.seen:
            self.copies += 1
            return ""
        self.seen.add(digest)
        want = self._spelt(text)
        side = next((side for side, head in self.heads.items() if head == want), None)
        if side is None:
            return self._missing(name, want)
        self.written += 1
        is_held_out = int.from_bytes(digest[:8], "big") < self.fraction * 2.0**64
        self.misplaced += is_held_out != (side == "val")
        self.heads[side] = next(self.sides[side], None)
        # A corpus of a few documents may have one moved, so that both sides have some.
        return (
            f"{name} and another document are on the other side than their hashes say"
            if self.misplaced > 1
            else ""
        )

    def _spelt(self, text: bytes) -> bytes:
        """Return what the ids of a document with this text must spell."""
        is_kept = self.tokenizer.normalization == "none"
        return self.prefix + (text if is_kept else self.tokenizer.normalize(text.decode()).encode())

    def _missing(self, name: str, want: bytes) -> str:
        for side, head in self.heads.items():
            if head is not None and hashlib.sha256(head.removeprefix(self.prefix)).digest() in self.seen:
                return f"{side}: a copy of an earlier document stands before {name}"
        if self.reused and self.left_out:
            raise Unfollowed(f"{name} may have been left out under another name")
        heads = [head for head in self.heads.values() if head is not None]
        if not heads:
            return f"{name} is not in the shards, which end before it"
        same, head = max((_same(head, want), head) for head in heads)
        there, text = head[same : same + 20], want[same : same + 20]
        return f"{name}: the shards have {there!r} from byte {same:,} on, the file {text!r}"

    def close(self, walked: tuple[str, bool], distinct: int) -> Finding:
        """Compare the counts, and sum up."""
        wrong, is_whole = walked
        total = sum(shards.total_documents for shards in self.shards.values())
        uncut = self.record["skipped"].get("cannot be cut", 0)
        if not wrong and total + uncut != distinct:
            wrong = f"{plural(total, 'document')} in the shards and {uncut:,} that cannot be cut, {distinct:,} in the files"
        if not wrong and is_whole:
            rest = [side for side, head in self.heads.items() if head is not None]
            if rest:
                wrong = f"{rest[0]}: the shards hold documents behind the last of the files"
            elif self.copies != self.record["duplicates"] and not self.reused:
                wrong = f"{self.copies:,} copies in the files, {self.record['duplicates']:,} were dropped"
        if wrong:
            wrong += f"; if the files are as they should be, remove {self.folder} and begin again"
        elif not is_whole and not self.bytes:
            why = "the first of the files is damaged, or one text longer than a check reads"
            return Finding.skipped(NAME, why, BOUND)
        where = "all files" if is_whole else "the beginning of the files"
        copies, left_out = ("copy" if self.copies == 1 else "copies"), f"{self.skipped:,} left out"
        measured = (
            f"{plural(self.written + self.copies + self.skipped, 'document')} of {where}: {self.written:,} written, "
            f"{self.copies:,} {copies}, {left_out}; {in_bytes(self.bytes)} compared"
        )
        return Finding.of(NAME, not wrong, wrong or measured, BOUND)


def _same(a: bytes, b: bytes) -> int:
    """Count the bytes that two texts begin with alike."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(np.frombuffer(a, np.uint8, n) != np.frombuffer(b, np.uint8, n))
    return int(differing[0]) if differing.size else n


def _documents(shards: TokenShards, table: list[bytes]) -> Iterator[bytes]:
    """Yield what the ids of each document spell, in their order, up to one that is longer than the budget."""
    parts: list[bytes] = []
    size = 0
    for array in shards.arrays:
        for first in range(0, array.size, CHUNK_TOKENS):
            chunk = np.asarray(array[first : first + CHUNK_TOKENS])
            at = 0
            for end in [*np.flatnonzero(chunk == shards.border_id), chunk.size]:
                ids = chunk[at:end]
                parts.append(b"".join(map(table.__getitem__, ids.tolist())))
                size += len(parts[-1])
                at = int(end) + 1
                if end < chunk.size:
                    yield b"".join(parts)
                    parts, size = [], 0
            if size > 2 * BUDGET_BYTES:
                return
