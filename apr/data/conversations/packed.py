"""Read packed examples: `ids.bin` (uint32) and `trained.bin` (uint8), both (rows, seq_length + 1), beside an instruct.json.

trained is 1 where a token is to be predicted: a token of an answer, or the one that ends its turn; of pairs of preferences, 2
in the rejected answer, which follows the chosen one in its row. Several examples share a
row. Behind each stands the separator, an id that occurs inside none of them, and attention stops there, so an example is
computed as if it were alone. Where every id of the vocabulary occurs, a row holds one example. The rest of a row is filled
with the separator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import InputNotFound, MalformedFile, Refused
from ...common.files import read_json
from ...common.finding import Finding
from ...common.units import plural
from ...tokenizer.tokenizer import Tokenizer
from ..conservation import OTHER_BYTES, bytes_of
from ..guards import figures_again, fits_model
from ..shards import Shards, mapped
from ..source import Skipped

FORMAT = "apr-instruct-1"
RECORD = "instruct.json"
# Rows that a guard reads at once.
BLOCK_ROWS = 1024
# Examples of the round trip.
SAMPLED_EXAMPLES = 256
# 2: bytes of the answers that are left; 1: of cut examples, in proportion to their tokens.
COUNTED_AS = 2
# Of an answer, text that its first and last token may hold beside it.
SEAM_BYTES = 8
# Counts in instruct.json that are never 0.
POSITIVE = ["seq_length", "vocab_size", "rows", "examples", "tokens", "trained"]
# Fields of instruct.json that a run records.
RECORDED = [
    "examples",
    "tokens",
    "trained",
    "rows",
    "separator",
    "duplicates",
    "cut",
    "skipped",
    "template_sha256",
]
ADVICE = "and the next run makes it anew"


@dataclass
class PackManifest:
    """instruct.json of one side.

    tokens           of examples, without the fill of the rows
    trained          tokens that a loss is computed for, with answer_bytes of UTF-8
    cut              examples that lost the beginning of their context
    pairs            of preferences; 0: examples are on their own
    unread           keys of records that nothing reads
    by_turn          conversations whose answers are examples of their own, see render.Renderer
    examples_sha256  of the SHA-256 of ids and labels of each example, in their order
    audit            statistics of the trained tokens, see manifest.figures
    counted_as       how answer_bytes were counted, see COUNTED_AS
    """

    side: str
    seq_length: int
    separator: int | None
    tokenizer_sha256: str
    template_sha256: str | None
    vocab_size: int
    rows: int = 0
    examples: int = 0
    tokens: int = 0
    trained: int = 0
    answer_bytes: int = 0
    duplicates: int = 0
    cut: int = 0
    by_turn: int = 0
    pairs: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_first: str = ""
    unread: list[str] = field(default_factory=list)
    ids_sha256: str = ""
    trained_sha256: str = ""
    examples_sha256: str = ""
    audit: dict[str, Any] = field(default_factory=dict)
    counted_as: int = COUNTED_AS
    format: str = FORMAT

    @classmethod
    def read(cls, path: Path) -> PackManifest:
        """Read instruct.json. Raises MalformedFile."""
        d = read_json(path)
        # Records from before these counts have none.
        d = {"by_turn": 0, "pairs": 0, "unread": [], "counted_as": 1, **d} if isinstance(d, dict) else d
        if (
            not isinstance(d, dict)
            or (d.get("format"), set(d)) != (FORMAT, set(cls.__dataclass_fields__))
            or not all(isinstance(d[key], int) and d[key] > 0 for key in POSITIVE)
        ):
            raise MalformedFile(f"{path}: not a record of {FORMAT}; remove its folder, {ADVICE}")
        return cls(**d)

    def skip(self, item: Skipped) -> None:
        """Count a record that cannot be used."""
        self.skipped[item.reason] = self.skipped.get(item.reason, 0) + 1
        self.skipped_first = self.skipped_first or f"{item.name}: {item.reason}: {item.detail}"


class PackedShards(Shards):
    """One side of packed examples. A loss of answers is compared with the figures, those of the trained tokens.

    verify: read all of it and compare it with instruct.json. Raises InputNotFound, MalformedFile, Refused: another tokenizer."""

    row_tokens: int
    row_targets: np.ndarray

    def __init__(self, folder: str | Path, tokenizer: Tokenizer | None = None, verify: bool = True) -> None:
        self.folder = Path(folder)
        path = self.folder / RECORD
        if not path.is_file():
            raise InputNotFound(f"{path}: no such file; give the instruction data with --instruct")
        m = self.manifest = PackManifest.read(path)
        if tokenizer and not tokenizer.is_recorded_as(m.tokenizer_sha256):
            raise Refused(
                f"{path}: encoded with tokenizer {m.tokenizer_sha256[:12]}, {tokenizer.source} is {tokenizer.sha256[:12]}"
            )
        self.files = [self.folder / "ids.bin", self.folder / "trained.bin"]
        self.row_tokens, self.border_id = m.seq_length + 1, m.separator
        self.arrays = [_mapped(self.files[0], "<u4", m.rows * self.row_tokens)]
        self.masks = [_mapped(self.files[1], "u1", m.rows * self.row_tokens)]
        self.row_targets = np.count_nonzero(self.trained[:, 1:], axis=1).astype(np.int64)
        self.vocab_size, self.tokenizer_sha256 = m.vocab_size, m.tokenizer_sha256
        self.total_tokens, self.total_bytes, self.total_documents = m.trained, m.answer_bytes, m.examples
        self.figures, self.facts = m.audit, {key: getattr(m, key) for key in RECORDED}
        self.facts |= {key: n for key in ("by_turn", "pairs") if (n := getattr(m, key))}
        identity = f"{m.seq_length} {m.separator} {m.ids_sha256}{m.trained_sha256}"
        self.sha256 = hashlib.sha256(identity.encode()).hexdigest()
        if verify:
            self.check()

    @property
    def ids(self) -> np.ndarray:
        """Rows of ids, uint32 (rows, seq_length + 1)."""
        return self.arrays[0].reshape(-1, self.row_tokens)

    @property
    def trained(self) -> np.ndarray:
        """Rows of the mask, uint8 (rows, seq_length + 1)."""
        return self.masks[0].reshape(-1, self.row_tokens)

    def check(self) -> None:
        """Read all the data and compare it with instruct.json. Raises MalformedFile."""
        m = self.manifest
        arrays, digests = (*self.arrays, *self.masks), (m.ids_sha256, m.trained_sha256)
        for path, array, want in zip(self.files, arrays, digests, strict=True):
            if (sha256 := hashlib.sha256(array.data).hexdigest()) != want:
                raise MalformedFile(
                    f"{path}: sha256 is {sha256[:12]}, {RECORD} says {want[:12]}; remove {self.folder.parent}, {ADVICE}"
                )
        if (highest := int(self.ids.max())) >= m.vocab_size:
            raise MalformedFile(f"{self.files[0]}: id {highest}, vocab_size is {m.vocab_size}")
        if (targets := int(self.row_targets.sum())) != m.trained:
            raise MalformedFile(f"{self.folder / RECORD}: trained = {m.trained}, the rows have {targets}")

    def examples(self, rows: Iterable[int]) -> Iterator[np.ndarray]:
        """Yield the ids of each example in some rows, without the separator."""
        # An id that no row holds, where there is no separator.
        border = -1 if self.border_id is None else self.border_id
        for row in (self.ids[r].astype(np.int64) for r in rows):
            for piece in np.split(row, np.flatnonzero(row == border)):
                if (ids := piece[piece != border]).size:
                    yield ids


def _mapped(path: Path, dtype: str, items: int) -> np.ndarray:
    want, size = items * np.dtype(dtype).itemsize, path.stat().st_size if path.is_file() else None
    if size != want:
        there = "missing" if size is None else f"{plural(size, 'byte')}"
        raise MalformedFile(
            f"{path}: {there}, {RECORD} says {plural(want, 'byte')}; remove {path.parents[1]}, {ADVICE}"
        )
    return mapped(path, dtype)


# Guards


def guard_packed(shards: PackedShards, tokenizer: Tokenizer, model_vocab: int | None) -> list[Finding]:
    """Check every guard of one side that agrees with its instruct.json."""
    m = shards.manifest
    measured, share = (
        f"{plural(m.rows, 'row')}, {plural(m.tokens, 'token')}",
        f"{100 * m.trained / m.tokens:.1f} % of {m.tokens:,}",
    )
    findings = [
        Finding.of("sha256, ids and labels", True, measured, "those of instruct.json"),
        _round_trip(shards, tokenizer),
        *([] if model_vocab is None else [fits_model(tokenizer, model_vocab)]),
        guard_answers(shards),
        guard_examples(shards),
        Finding.of("trained tokens", m.trained > 0, share, "more than none"),
    ]
    counts, runs = _counted(shards)
    findings += [
        figures_again(m.audit, counts, m.answer_bytes),
        _bytes_of_answers(m, counts, runs, tokenizer),
    ]
    if shards.figures["distinct_ids"] < 2:
        findings.append(Finding.of("distinct ids", False, "one id in all answers", "several"))
    return findings


def _counted(shards: PackedShards) -> tuple[np.ndarray, int]:
    """Count the ids of trained tokens (V,), and the answers: runs of trained tokens."""
    counts, runs = np.zeros(shards.vocab_size, np.int64), 0
    for first in range(0, shards.manifest.rows, BLOCK_ROWS):
        block = slice(first, first + BLOCK_ROWS)
        is_trained = shards.trained[block] > 0
        counts += np.bincount(shards.ids[block][is_trained], minlength=shards.vocab_size)
        runs += int(is_trained[:, 0].sum() + (is_trained[:, 1:] & ~is_trained[:, :-1]).sum())
    return counts, runs


def _bytes_of_answers(m: PackManifest, counts: np.ndarray, answers: int, tokenizer: Tokenizer) -> Finding:
    """Compare the bytes of answers, which bits per byte are made of, with those that the trained tokens stand for.

    A token at either end of an answer may stand for text beside it."""
    name, found = "bytes of answers", bytes_of(counts, tokenizer)
    if found is None:
        return Finding.skipped(name, OTHER_BYTES)
    if m.cut and m.counted_as < COUNTED_AS:
        return Finding.skipped(name, "an earlier apr counted those of cut examples in proportion")
    allowed = SEAM_BYTES * answers + found // 100
    why = (
        "" if abs(found - m.answer_bytes) <= allowed else "bytes of other text were counted, or some were not"
    )
    bound = f"{m.answer_bytes:,}, but for {SEAM_BYTES} bytes an answer and 1 %"
    return Finding.of(name, not why, f"trained tokens stand for {found:,}", bound, why)


def guard_answers(shards: PackedShards) -> Finding:
    """Require a target in every row, and none that crosses from one example into the next."""
    empty, crossed = int((shards.row_targets == 0).sum()), 0
    if shards.border_id is not None:
        for first in range(0, shards.manifest.rows, BLOCK_ROWS):
            block = slice(first, first + BLOCK_ROWS)
            ids, trained = shards.ids[block], shards.trained[block]
            crossed += int(((ids[:, :-1] == shards.border_id) & (trained[:, 1:] > 0)).sum())
    measured = f"{plural(empty, 'row')} without one, {crossed} behind the border of an example"
    bound = "a target in every row, none behind a border"
    return Finding.of("answers", not empty and not crossed, measured, bound)


def guard_examples(shards: PackedShards) -> Finding:
    """Count the examples between the separators of the rows, and their tokens: those that were written."""
    m, examples, tokens = shards.manifest, 0, 0
    if shards.border_id is None:
        # The rest of a row is filled with an id that may occur in it.
        examples, tokens = m.rows, m.tokens
    else:
        for first in range(0, m.rows, BLOCK_ROWS):
            inside = shards.ids[first : first + BLOCK_ROWS] != shards.border_id
            tokens += int(inside.sum())
            examples += int(inside[:, 0].sum() + (inside[:, 1:] & ~inside[:, :-1]).sum())
    measured = f"{examples:,} between separators, of {plural(tokens, 'token')}"
    # The last token of an example may be the separator itself.
    is_same = examples == m.examples and m.tokens - m.examples <= tokens <= m.tokens
    return Finding.of(
        "examples in rows", is_same, measured, f"{m.examples:,}, of {m.tokens:,} with their ends"
    )


def _round_trip(shards: PackedShards, tokenizer: Tokenizer) -> Finding:
    """Encode the text of examples, spread over the rows, and compare the text of those ids."""
    name, bound = "decode(encode(decode(ids))) = decode(ids)", "the same text"
    if not tokenizer.byte_level:
        why = "no byte-level vocabulary: asked of the text when it was encoded"
        return Finding.of(name, None, "", bound, why)
    rows = sorted({shards.manifest.rows * k // SAMPLED_EXAMPLES for k in range(SAMPLED_EXAMPLES)})
    count = 0
    for ids in islice(shards.examples(rows), SAMPLED_EXAMPLES):
        text = tokenizer.decode(ids)
        again = tokenizer.decode(tokenizer.encode_marked(text))
        # A context may be cut inside a character.
        if text != again and "\ufffd" not in text:
            measured = f"{again[:40]!r} for {text[:40]!r}"
            return Finding.of(name, False, measured, bound, "not the ids of this tokenizer")
        count += 1
    return Finding.of(name, True, f"{plural(count, 'example')}", bound)


def guard_disjoint(train: PackedShards, vals: Sequence[PackedShards]) -> Finding:
    """Require that no example stands on both sides, of any source."""

    def digests(s: PackedShards) -> set[bytes]:
        return {hashlib.sha256(x.tobytes()).digest()[:16] for x in s.examples(range(s.manifest.rows))}

    shared = len(digests(train) & set[bytes]().union(*map(digests, vals)))
    return Finding.of("documents on both sides", shared == 0, f"{shared:,}", "0")
