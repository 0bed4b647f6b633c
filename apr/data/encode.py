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

from ..common.atomic import locked, write_json
from ..common.errors import IOFailure, Refused
from ..common.files import make_folder, read_json
from ..common.host import cores
from ..tokenizer.tokenizer import Tokenizer
from .corpus import Document, is_held_out
from .cut import PIECE, CannotCut, Cutter
from .guards import USUAL, Bounds, enforce, plausible
from .manifest import Manifest
from .readers import Corpus, LongDocument, Skipped
from .seen import Seen
from .shards import ShardWriter, our_files

FORMAT = "apr-encoded-1"
RECORD = "encode.json"
SKIPPED = "skipped.jsonl"
PARALLELISM = "TOKENIZERS_PARALLELISM"
BATCH = 1 << 17  # characters that a thread encodes at once
BATCH_PIECES = 4096
AHEAD = 2  # batches for each thread that are read or encoded while one is written
FIRST_LOOK = (
    1 << 20
)  # tokens after which the figures are judged for the first time, and then whenever they doubled
SAMPLED = 256  # one of so many documents must come back from its ids; and the first EVERY_FIRST
EVERY_FIRST = 16


@dataclass
class Counts:
    """What became of the documents so far."""

    documents: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})
    tokens: int = 0
    text_bytes: int = 0  # UTF-8, of the documents that are written
    duplicates: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # by reason
    round_trips: int = 0  # documents that were decoded and compared
    first_skipped: str = ""

    @property
    def all(self) -> int:
        return sum(self.documents.values())


Progress = Callable[[Counts, int, int], None]  # counts, bytes of the input read, bytes in all


@dataclass(frozen=True)
class Encoded:
    """What encode_corpus wrote; val is None without a split."""

    folder: Path
    train: Manifest
    val: Manifest | None
    counts: Counts


@dataclass(frozen=True)
class _Piece:
    """A stretch of a document; text is None where its ids are in whole shards already."""

    document: Document | LongDocument
    side: str
    first: bool
    last: bool
    sampled: bool  # to be compared with what its ids decode to
    text: str | None


def encode_corpus(
    corpus: Corpus,
    tokenizer: Tokenizer,
    out_dir: str | Path,
    *,
    val_fraction: float = 0.01,
    eos_policy: str = "after",
    shard_tokens: int = 10_000_000,
    bounds: Bounds = USUAL,
    made: dict[str, Any] | None = None,
    resume: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Encoded:
    """Write OUT/train and, with val_fraction above 0, OUT/val, OUT/tokenizer, OUT/encode.json and OUT/skipped.jsonl.

    A document's side follows from its content hash alone, so it is the same in every run with this fraction; copies are dropped.
    The bytes written depend on the documents and their order, not on `workers`, the threads that encode (default:
    all cores). `made` describes the input in the manifests; with resume the folder must have been begun with the same settings.
    Raises Refused: bad arguments, a guard, a side without documents, a folder in use; IOFailure."""
    if not 0.0 <= val_fraction < 1.0:
        raise Refused(f"val_fraction = {val_fraction} is not at least 0 and below 1")
    folder = make_folder(out_dir)
    settings = {
        "tokenizer_sha256": tokenizer.sha256,
        "val_fraction": val_fraction,
        "eos_policy": eos_policy,
        "shard_tokens": shard_tokens,
        **(made or {}),
    }
    with locked(folder, "encoding into it"):
        _begin(folder, settings, resume)
        tokenizer.save(folder / "tokenizer")
        job = _Encoding(corpus, tokenizer, folder, val_fraction, bounds, workers or cores(), progress)
        with contextlib.ExitStack() as stack:
            stack.callback(job.seen.close)
            for side in job.sides:
                writer = ShardWriter(
                    folder / side, tokenizer, shard_tokens, eos_policy, {"side": side, **settings}, resume
                )
                job.writers[side] = stack.enter_context(_kept(writer))
            job.run()
            manifests = job.close()
        counts = job.counts
        write_json(
            folder / RECORD,
            {"format": FORMAT, "complete": True, "settings": settings, "result": asdict(counts)},
        )
    return Encoded(folder, manifests["train"], manifests.get("val"), counts)


class _Encoding:
    """One call of encode_corpus: this thread reads, drops copies and writes; threads of the pool encode."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        folder: Path,
        val_fraction: float,
        bounds: Bounds,
        workers: int,
        progress: Progress | None,
    ) -> None:
        self.workers = workers
        self.corpus, self.tokenizer, self.folder = corpus, tokenizer, folder
        self.val_fraction, self.bounds, self.progress = val_fraction, bounds, progress
        self.sides = ["train", "val"] if val_fraction else ["train"]
        self.writers: dict[str, ShardWriter] = {}
        self.counts = Counts()
        self.seen = Seen()
        self._offered = dict.fromkeys(self.sides, 0)
        self._bytes = dict.fromkeys(
            self.sides, 0
        )  # of the text whose ids are written, unfinished documents included
        self._look = FIRST_LOOK

    def run(self) -> None:
        """Everything from the first document to the last."""
        waiting: deque[tuple[list[_Piece], Future[list[np.ndarray]]]] = deque()
        with (
            self._skipped_file() as self._skipped,
            _one_core_each(),
            ThreadPoolExecutor(self.workers, thread_name_prefix="encode") as pool,
        ):
            try:
                for batch in self._batches():
                    waiting.append((batch, pool.submit(self._encode, batch)))
                    if len(waiting) > AHEAD * self.workers:
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
            if size >= BATCH or len(batch) >= BATCH_PIECES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _pieces(self) -> Iterator[_Piece]:
        """What is to be written, in order."""
        cutter = Cutter(self.tokenizer)
        for item in self.corpus:
            if isinstance(item, Skipped):
                self._skip(item)
                continue
            if not self.seen.add(item.sha256):
                self.counts.duplicates += 1
                continue
            side = "val" if self.val_fraction and is_held_out(item.sha256, self.val_fraction) else "train"
            long = isinstance(item, LongDocument) or len(item.text) > 2 * PIECE
            if long and (why := _uncuttable(cutter, item)):
                self._skip(Skipped(item.name, "cannot be cut", why))
                continue
            number = self._offered[side]
            self._offered[side] += 1
            sampled = number < EVERY_FIRST or int(item.sha256[:8], 16) % SAMPLED == 0
            if self.writers[side].holds(number):
                yield _Piece(item, side, True, True, sampled, None)
                continue
            texts = cutter.pieces(_chunks(item)) if long else iter([_text(item)])
            text, first = next(texts, ""), True
            while (following := next(texts, None)) is not None:
                yield _Piece(item, side, first, False, sampled and first, text)
                text, first = following, False
            yield _Piece(item, side, first, True, sampled and first, text)

    def _encode(self, batch: list[_Piece]) -> list[np.ndarray]:
        """Ids uint32 (n,) of each piece, looked at before they go anywhere. Runs on a thread of the pool."""
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
            if piece.sampled and (why := tok.check_round_trip(piece.text)):
                raise Refused(
                    f"{name}: decoding its ids does not give its text back: {why}. {tok.source} does not fit its own "
                    "vocabulary; import the tokenizer again"
                )
            out.append(ids)
        return out

    def _write(self, batch: list[_Piece], future: Future[list[np.ndarray]]) -> None:
        for piece, ids in zip(batch, future.result(), strict=True):
            writer, document = self.writers[piece.side], piece.document
            if piece.first:
                size = document.bytes if isinstance(document, LongDocument) else len(document.data)
                writer.begin(document.sha256, size)
                self.counts.text_bytes += size
                self.counts.round_trips += piece.sampled
            writer.append(ids)
            if piece.text is not None:
                self._bytes[piece.side] += len(piece.text.encode())
            elif isinstance(document, LongDocument):
                self._bytes[piece.side] += document.bytes
            else:
                self._bytes[piece.side] += len(document.data)
            if piece.last:
                writer.end()
                self.counts.documents[piece.side] += 1
        self.counts.tokens = sum(w.tokens for w in self.writers.values())
        self._skipped.flush()
        if self.counts.tokens >= self._look:
            self._look *= 2
            self._judge("so far")
        if self.progress:
            self.progress(self.counts, self.corpus.bytes_read, self.corpus.total_bytes)

    def _judge(self, when: str) -> None:
        sides = {
            f"{self.folder / side}, {when}": plausible(
                w.counts, self._bytes[side], self.tokenizer, self.bounds
            )
            for side, w in self.writers.items()
            if not w.behind  # after a kill: ids that are there count already, their text only as it is read again
        }
        enforce(sides, "go on with --resume {widen}")

    def close(self) -> dict[str, Manifest]:
        """Finish both sides, or neither."""
        c = self.counts
        if not c.all:
            why = (
                f"; {sum(c.skipped.values())} could not be used, the first: {c.first_skipped}"
                if c.skipped
                else ""
            )
            raise Refused(f"{self.corpus}: no document to encode{why}")
        for side in self.sides:
            if not c.documents[side]:
                raise Refused(
                    f"val_fraction = {self.val_fraction} of {c.all} documents leaves none for {side}; use another "
                    "--val-fraction, more documents, or cut long files into several with --piece-bytes"
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
            with open(path, "w", encoding="utf-8") as f:
                yield f
        except OSError as e:
            raise IOFailure(f"{path}: cannot write: {e.strerror}; make room or write elsewhere") from e


def _text(item: Document | LongDocument) -> str:
    assert isinstance(item, Document)
    return item.text


def _chunks(item: Document | LongDocument) -> Iterator[str]:
    return iter([item.text]) if isinstance(item, Document) else item.chunks()


def _uncuttable(cutter: Cutter, item: Document | LongDocument) -> str:
    """Why a document cannot be encoded piece by piece, or ""; known before its first piece is written."""
    try:
        for _ in cutter.pieces(_chunks(item)):
            pass
    except CannotCut as e:
        return str(e)
    return ""


def _begin(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """Mark the folder as being encoded into. Raises Refused: somebody's data, or other settings."""
    path = folder / RECORD
    record = read_json(path) if path.is_file() else None
    begun = record.get("settings") if isinstance(record, dict) and record.get("format") == FORMAT else None
    complete = isinstance(record, dict) and record.get("complete") is True
    ours = isinstance(begun, dict)
    if not resume:
        there = [*our_files(folder / "train"), *our_files(folder / "val"), *([path] if ours else [])]
        if there:
            how = (
                "an unfinished encoding; go on with --resume"
                if ours and not complete
                else "shards already; remove them"
            )
            raise Refused(f"{there[0]}: the folder holds {how}, or choose another folder")
    elif isinstance(begun, dict):
        for key in {**begun, **settings}:
            if begun.get(key) != settings.get(key):
                raise Refused(
                    f"{path}: {key} = {begun.get(key)!r} when it was begun, {settings.get(key)!r} now; resume with the "
                    "settings of then, or encode into another folder"
                )
        if complete:
            raise Refused(f"{path}: complete: nothing to resume; `apr tokenize audit {folder}` looks at it")
    write_json(path, {"format": FORMAT, "complete": False, "settings": settings, "result": None})


@contextlib.contextmanager
def _one_core_each() -> Iterator[None]:
    """Calls of the library stay on the thread that makes them: on 16 cores, 16 threads with a batch each encode 24 MB/s, its
    own 16 threads 17. It reads the variable at each call."""
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
    """The writer; its unfinished shard is removed however the block ends."""
    try:
        yield writer
    finally:
        writer.abandon()
