"""A corpus to token shards: split by content, without copies, in bounded memory, and to be resumed after a kill."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..common.atomic import check_output, locked, write_json
from ..common.errors import IOFailure, Refused
from ..common.files import make_folder
from ..common.host import cores
from ..common.units import plural
from ..tokenizer.tokenizer import Tokenizer
from .corpus import Corpus
from .cut import PIECE_CHARACTERS, Cutter
from .documents import Document, LongDocument, Sides, hashes_of
from .encode_folder import FORMAT, RECORD, SKIPPED, begin, clear
from .guards import USUAL, Bounds, enforce, plausible
from .manifest import ShardManifest
from .seen import Seen
from .shard_writer import ShardWriter
from .source import Skipped

PARALLELISM = "TOKENIZERS_PARALLELISM"
# Characters that a thread encodes at once.
BATCH_CHARACTERS = 1 << 17
BATCH_PIECES = 4096
# Batches for each thread that are read or encoded while one is written.
BATCHES_AHEAD = 2
# The figures are judged for the first time after so many tokens, and then whenever their number doubled.
FIRST_CHECK_TOKENS = 1 << 20
# One of so many documents must come back from its ids; and each of the first ALWAYS_SAMPLED.
SAMPLED_ONE_IN = 256
ALWAYS_SAMPLED = 16


@dataclass
class Counts:
    """Documents, tokens and bytes done so far.

    documents     written, by side
    text_bytes    UTF-8, of the documents that are written
    skipped       unusable documents, by reason
    round_trips   documents that were decoded and compared
    """

    documents: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})
    tokens: int = 0
    text_bytes: int = 0
    duplicates: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    round_trips: int = 0
    first_skipped: str = ""

    @property
    def all(self) -> int:
        return sum(self.documents.values())


# Called with counts, bytes of the input read, bytes in all.
EncodeProgress = Callable[[Counts, int, int], None]


@dataclass(frozen=True)
class EncodedCorpus:
    """Result of encode_corpus; val is None without a split."""

    folder: Path
    train: ShardManifest
    val: ShardManifest | None
    counts: Counts


@dataclass(frozen=True)
class _Piece:
    """A stretch of a document; text is None where its ids are in whole shards already.

    is_sampled: its ids are decoded and compared with it."""

    document: Document | LongDocument
    side: str
    is_first: bool
    is_last: bool
    is_sampled: bool
    text: str | None


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer, out_dir: str | Path, **options: Any) -> EncodedCorpus:
    """Hold OUT against other processes, and `encode_into` it with these options.

    Raises Refused: another process holds the folder, and as encode_into; IOFailure."""
    folder = make_folder(out_dir)
    with locked(folder, "encoding into it"):
        return encode_into(folder, corpus, tokenizer, **options)


def encode_into(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    val_fraction: float = 0.01,
    eos_policy: str = "after",
    bos: str = "auto",
    sides: Sides | None = None,
    shard_tokens: int = 10_000_000,
    bounds: Bounds = USUAL,
    made: dict[str, Any] | None = None,
    resume: bool = False,
    workers: int | None = None,
    progress: EncodeProgress | None = None,
) -> EncodedCorpus:
    """Write train and, with val_fraction above 0, val, tokenizer, encode.json and skipped.jsonl into a folder that is held.

    A document's side follows from its content hash alone, so it is the same in every run with this fraction (see Sides); copies
    are dropped. bos: "auto" puts the tokenizer's prefix_ids before each document, "none" nothing. sides: where they are known.
    The bytes written depend on the documents and their order, not on `workers`, the threads that encode (default:
    all cores). `made` describes the input in the manifests; with resume the folder must have been begun with the same settings.
    Raises Refused: bad arguments, a guard, a side without documents; IOFailure."""
    if not 0.0 <= val_fraction < 1.0:
        raise Refused(f"val_fraction = {val_fraction} is not at least 0 and below 1")
    settings = {
        "tokenizer_sha256": tokenizer.sha256,
        "val_fraction": val_fraction,
        "eos_policy": eos_policy,
        "shard_tokens": shard_tokens,
        **(made or {}),
        **({"bos_ids": list(tokenizer.prefix_ids)} if bos == "auto" and tokenizer.prefix_ids else {}),
    }
    settings = begin(folder, settings, tokenizer, resume)
    new_tokenizer = not (folder / "tokenizer").exists()
    tokenizer.save(folder / "tokenizer")
    job = _Encoding(corpus, tokenizer, folder, val_fraction, bounds, workers or cores(), progress)
    job.rule = sides or (Sides.of(hashes_of(corpus), val_fraction) if val_fraction else Sides(0))
    job.bos = np.array(settings.get("bos_ids", ()), np.uint32)
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(job.seen.close)
            for side in job.sides:
                writer = ShardWriter(
                    folder / side, tokenizer, shard_tokens, eos_policy, {"side": side, **settings}, resume
                )
                job.writers[side] = stack.enter_context(_kept(writer))
            job.run()
            manifests = job.close()
    except _Resumable:
        raise
    except Refused as e:
        # Other settings are needed, and with them nothing of this can be gone on with.
        if resume:
            raise Refused(f"{e}; encode into another folder") from None
        clear(folder, new_tokenizer)
        raise
    record = {"format": FORMAT, "complete": True, "settings": settings, "result": asdict(job.counts)}
    write_json(folder / RECORD, record)
    return EncodedCorpus(folder, manifests["train"], manifests.get("val"), job.counts)


class _Resumable(Refused):
    """A guard of plausibility ended an encoding, which may go on with wider bounds."""


class _Encoding:
    """A call of encode_corpus: this thread reads, drops copies and writes; threads of a pool encode."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        folder: Path,
        val_fraction: float,
        bounds: Bounds,
        workers: int,
        progress: EncodeProgress | None,
    ) -> None:
        self.workers = workers
        self.corpus, self.tokenizer, self.folder = corpus, tokenizer, folder
        self.val_fraction, self.bounds, self.progress = val_fraction, bounds, progress
        self.sides = ["train", "val"] if val_fraction else ["train"]
        self.writers: dict[str, ShardWriter] = {}
        self.counts = Counts()
        self.bos, self.rule = np.empty(0, np.uint32), Sides(val_fraction)
        self.seen = Seen()
        self._offered = dict.fromkeys(self.sides, 0)
        # Of the text whose ids are written, unfinished documents included.
        self._bytes = dict.fromkeys(self.sides, 0)
        self._next_check = FIRST_CHECK_TOKENS

    def run(self) -> None:
        """Encode and write every document."""
        waiting: deque[tuple[list[_Piece], Future[list[np.ndarray]]]] = deque()
        with (
            self._skipped_file() as self._skipped,
            _one_core_each(),
            ThreadPoolExecutor(self.workers, thread_name_prefix="encode") as pool,
        ):
            try:
                for batch in self._batches():
                    waiting.append((batch, pool.submit(self._encode, batch)))
                    if len(waiting) > BATCHES_AHEAD * self.workers:
                        self._write(*waiting.popleft())
                while waiting:
                    self._write(*waiting.popleft())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _batches(self) -> Iterator[list[_Piece]]:
        batch: list[_Piece] = []
        size = 0
        for piece in self._pieces():
            batch.append(piece)
            size += len(piece.text or "")
            if size >= BATCH_CHARACTERS or len(batch) >= BATCH_PIECES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _pieces(self) -> Iterator[_Piece]:
        """Yield the pieces to write, in order."""
        cutter = Cutter(self.tokenizer)
        for item in self.corpus:
            if isinstance(item, Skipped):
                self._skip(item)
                continue
            if not self.seen.add(item.sha256):
                self.counts.duplicates += 1
                continue
            side = "val" if self.rule.hold_out(item.sha256) else "train"
            long = isinstance(item, LongDocument) or len(item.text) > 2 * PIECE_CHARACTERS
            if long and (why := cutter.uncuttable(item.chunks())):
                self._skip(Skipped(item.name, "cannot be cut", why))
                continue
            number = self._offered[side]
            self._offered[side] += 1
            sampled = number < ALWAYS_SAMPLED or int(item.sha256[:8], 16) % SAMPLED_ONE_IN == 0
            if self.writers[side].holds(number):
                yield _Piece(item, side, True, True, sampled, None)
                continue
            texts = cutter.pieces(item.chunks()) if long else item.chunks()
            text, first = next(texts, ""), True
            while (following := next(texts, None)) is not None:
                yield _Piece(item, side, first, False, sampled and first, text)
                text, first = following, False
            yield _Piece(item, side, first, True, sampled and first, text)

    def _encode(self, batch: list[_Piece]) -> list[np.ndarray]:
        """Encode and check each piece: ids uint32 (n,). Runs on a thread of the pool. Raises Refused."""
        tok = self.tokenizer
        texts = [p for p in batch if p.text is not None]
        encoded = iter(tok.encode_batch([p.text or "" for p in texts]))
        out = []
        for piece in batch:
            if piece.text is None:
                out.append(np.empty(0, np.uint32))
                continue
            ids = next(encoded)
            name = piece.document.name
            if tok.eos_id is not None and (ids == tok.eos_id).any():
                raise Refused(
                    f"{name}: its text encodes to the end-of-text id {tok.eos_id} ({tok.eos_token!r}): in this tokenizer that is "
                    "an ordinary string; import it with that token marked special, or name another with --eos"
                )
            if tok.byte_level and tok.unknown_id is not None and (ids == tok.unknown_id).any():
                raise Refused(
                    f"{name}: encodes to the unknown token, id {tok.unknown_id}, though {tok.source} is byte-level, where every "
                    "byte has a token: the vocabulary is not what the encoder expects; import the tokenizer again"
                )
            if piece.is_sampled and (why := tok.check_round_trip(piece.text)):
                raise Refused(
                    f"{name}: decoding its ids does not give its text back: {why}. {tok.source} does not fit its own "
                    "vocabulary; import the tokenizer again"
                )
            out.append(ids)
        return out

    def _write(self, batch: list[_Piece], future: Future[list[np.ndarray]]) -> None:
        for piece, ids in zip(batch, future.result(), strict=True):
            writer, document = self.writers[piece.side], piece.document
            if piece.is_first:
                writer.begin(document.sha256, document.num_bytes)
                self.counts.text_bytes += document.num_bytes
                self.counts.round_trips += piece.is_sampled
            text = piece.text
            writer.append(np.concatenate([self.bos, ids]) if piece.is_first and text is not None else ids)
            self._bytes[piece.side] += document.num_bytes if text is None else len(text.encode())
            if piece.is_last:
                writer.end()
                self.counts.documents[piece.side] += 1
        self.counts.tokens = sum(w.tokens for w in self.writers.values())
        self._skipped.flush()
        if self.counts.tokens >= self._next_check:
            self._next_check *= 2
            self._judge("so far")
        if self.progress:
            self.progress(self.counts, self.corpus.bytes_read, self.corpus.total_bytes)

    def _judge(self, when: str) -> None:
        sides = {
            f"{self.folder / side}, {when}": plausible(
                w.counts, self._bytes[side], self.tokenizer, self.bounds
            )
            for side, w in self.writers.items()
            # After a kill, ids on disk count already, their text only as it is read again.
            if not w.is_behind
        }
        try:
            enforce(sides, "go on with --resume {widen}")
        except Refused as e:
            raise _Resumable(str(e)) from None

    def close(self) -> dict[str, ShardManifest]:
        """Finish both sides, or neither."""
        c = self.counts
        left_out = sum(c.skipped.values())
        why = f"; {left_out} could not be used, the first: {c.first_skipped}" if left_out else ""
        if not c.all:
            raise Refused(f"{self.corpus}: no document to encode{why}")
        for side in self.sides:
            if not c.documents[side]:
                raise Refused(
                    f"val_fraction = {self.val_fraction} of {plural(c.all, 'document')} leaves none for {side}; use another "
                    f"--val-fraction, more documents, or cut long files into several with --piece-bytes{why}"
                )
        self._judge("at the end")
        return {side: writer.close() for side, writer in self.writers.items()}

    def _skip(self, item: Skipped) -> None:
        self.counts.skipped[item.reason] = self.counts.skipped.get(item.reason, 0) + 1
        self.counts.first_skipped = self.counts.first_skipped or f"{item.name}: {item.reason}: {item.detail}"
        self._skipped.write(json.dumps(asdict(item)) + "\n")

    @contextlib.contextmanager
    def _skipped_file(self) -> Iterator[Any]:
        path = self.folder / SKIPPED
        try:
            with open(check_output(path), "w", encoding="utf-8") as f:
                yield f
        except OSError as e:
            raise IOFailure(f"{path}: cannot write: {e.strerror}; make room or write elsewhere") from e


@contextlib.contextmanager
def _one_core_each() -> Iterator[None]:
    """Keep calls of the tokenizers library on the thread that makes them.

    On 16 cores, 16 threads with a batch each encode 24 MB/s, the library's own 16 threads 17. It reads the variable at
    each call."""
    was = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"
    try:
        yield
    finally:
        os.environ.pop(PARALLELISM)
        if was is not None:
            os.environ[PARALLELISM] = was


@contextlib.contextmanager
def _kept(writer: ShardWriter) -> Iterator[ShardWriter]:
    """Remove the unfinished shard of a writer however the block ends."""
    try:
        yield writer
    finally:
        writer.abandon()
