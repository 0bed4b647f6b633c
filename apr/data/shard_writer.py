"""Write token shards: whole files of ids beside their manifest, to be resumed after a kill."""

from __future__ import annotations

import contextlib
import hashlib
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..common.atomic import atomic_write, write_json
from ..common.errors import IOFailure, MalformedFile, Refused
from ..common.files import make_folder
from ..common.host import cores
from ..common.units import plural
from ..tokenizer.tokenizer import Tokenizer
from .manifest import EOS_POLICIES, MANIFEST, ShardManifest, figures, read_manifest, shard_name
from .scan import scan
from .shards import check_scan, open_shard, our_files

MAX_SHARDS = 100_000
# Ids gathered before they are written, hashed and counted.
BUFFER_TOKENS = 1 << 18


class ShardWriter:
    """Write documents, as ids, into shards of `shard_tokens` ids; use as a context manager.

        writer.begin(sha256, size)
        writer.append(ids)  # as often as the document has pieces; not where holds(number of the document)
        writer.end()

    Each shard appears when it is full, whole or not at all, and the manifest after it. A run that was killed
    leaves whole shards and a true manifest that says complete: false; with resume the same documents, offered again
    from the first one on, give the same bytes as an undisturbed run. `total_documents` counts the documents
    offered so far. Raises Refused: a folder that holds shards already, an EOS policy that the
    tokenizer has no EOS for, other documents on resuming, no documents; MalformedFile: a damaged shard on resuming;
    IOFailure when writing fails."""

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        shard_tokens: int = 10_000_000,
        eos_policy: str = "after",
        made: dict[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        self.folder = Path(folder)
        if eos_policy not in EOS_POLICIES:
            raise Refused(f"eos_policy = {eos_policy!r}; choose one of {', '.join(EOS_POLICIES)}")
        if eos_policy != "none" and tokenizer.eos_id is None:
            raise Refused(
                f"{tokenizer.source}: no end-of-text token for eos_policy = {eos_policy!r}; import the tokenizer with one, "
                "or use 'none'"
            )
        if shard_tokens < 1:
            raise Refused(f"shard_tokens = {shard_tokens} is not positive")
        make_folder(self.folder)
        self.shard_tokens = shard_tokens
        self.manifest = ShardManifest(
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eos_policy=eos_policy,
            eos_token_id=tokenizer.eos_id,
            normalization=tokenizer.normalization,
            made=made or {},
        )
        self._unknown_id = tokenizer.unknown_id
        self._counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self._corpus = hashlib.sha256()
        # In whole shards: documents, and tokens of the next document.
        self._written = 0
        self._skip = 0
        # (documents, digest that they must have), until so many were offered again.
        self._check: tuple[int, str | None] | None = None
        if resume:
            self._resume(tokenizer)
        elif old := our_files(self.folder):
            raise Refused(
                f"{old[0]}: the folder holds shards already; choose another, or go on with --resume"
            )
        self.total_documents = self.total_bytes = 0
        # Tokens of the document that is being written.
        self._into = 0
        self._document: tuple[str, int] | None = None
        self._file: BinaryIO | None = None
        self._open = ExitStack()
        self._digest = hashlib.sha256()
        self._room = shard_tokens
        self._held: list[np.ndarray] = []
        self._held_tokens = 0

    @property
    def tokens(self) -> int:
        """Number of tokens in shards and in the unfinished one."""
        return self.manifest.total_tokens + self.shard_tokens - self._room

    def _resume(self, tokenizer: Tokenizer) -> None:
        """Take over the whole shards of a run that was stopped, and remove unfinished ones."""
        path = self.folder / MANIFEST
        ours = self.manifest
        if path.is_file():
            m = read_manifest(path, whole=False)
            if tokenizer.is_recorded_as(m.tokenizer_sha256):
                ours.tokenizer_sha256 = m.tokenizer_sha256
            for key in (
                "tokenizer_sha256",
                "vocab_size",
                "eos_policy",
                "eos_token_id",
                "normalization",
                "made",
                "producer",
            ):
                if getattr(m, key) != getattr(ours, key):
                    raise Refused(
                        f"{path}: {key} = {getattr(m, key)!r} in what is there, {getattr(ours, key)!r} now; resume with the "
                        "settings of then, or encode into another folder"
                    )
            m.complete = False
            self.manifest = m
        m = self.manifest
        listed = {s["name"] for s in m.shards}
        with _io(self.folder):
            for old in [*our_files(self.folder), *self.folder.glob(".*.tmp")]:
                if old.name not in listed and old.name != MANIFEST:
                    old.unlink()
        if m.shards:
            arrays = [open_shard(self.folder, s) for s in m.shards]
            scanned = scan(arrays, m.vocab_size, m.eos_token_id, threads=cores())
            check_scan(self.folder, m, scanned)
            self._counts += scanned.counts
            last = m.shards[-1]
            if m.corpus_sha256 is None:
                raise Refused(
                    f"{path}: corpus_sha256 = null: it was made of the shards and does not say where documents end, so that "
                    "nothing can be added; encode into another folder"
                )
            if m.eos_policy == "after" and (scanned.ends, scanned.tail) != (
                last["documents"],
                last["partial"],
            ):
                raise MalformedFile(
                    f"{path}: the last shard ends after {plural(last['documents'], 'document')} and "
                    f"{plural(last['partial'], 'token')}, the shards "
                    f"say {scanned.ends} and {scanned.tail}; encode into another folder"
                )
            self._written, self._skip = last["documents"], last["partial"]
            self._check = (self._written, last["corpus_sha256"]) if self._written else None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    @property
    def is_behind(self) -> bool:
        """True while documents that are in whole shards are still to be offered again."""
        return self.total_documents < self._written or self._skip > 0

    def holds(self, number: int) -> bool:
        """Return True for a document, counted from 0, that is in whole shards: its ids are not needed."""
        return number < self._written

    def begin(self, sha256: str, size: int) -> None:
        """Begin a document with this content hash and size (bytes of UTF-8)."""
        assert self._document is None
        self._document, self._into = (sha256, size), 0
        m = self.manifest
        if m.eos_policy == "between" and self.total_documents and not self.holds(self.total_documents):
            self._put(np.array([m.eos_token_id], dtype=np.uint32))

    def append(self, ids: np.ndarray) -> None:
        """Write the next ids of the document, uint32 (n,)."""
        self._put(ids)

    def end(self) -> None:
        """Complete the document."""
        m, document = self.manifest, self._document
        assert document is not None
        if m.eos_policy == "after" and not self.holds(self.total_documents):
            # Put and counted at once: a full shard must know which documents it holds whole.
            self._put(np.array([m.eos_token_id], dtype=np.uint32), last=True)
        else:
            self._count_document()
        self._document = None

    def _count_document(self) -> None:
        assert self._document is not None
        sha256, size = self._document
        self._corpus.update(bytes.fromhex(sha256))
        self.total_documents += 1
        self.total_bytes += size
        self._into = 0
        if self._check and self.total_documents == self._check[0]:
            if self._corpus.hexdigest() != self._check[1]:
                raise Refused(
                    f"{self.folder}: the first {plural(self.total_documents, 'document')} are not those "
                    f"that were encoded here: the input "
                    "has changed; encode it into another folder"
                )
            self._check = None

    def _put(self, ids: np.ndarray, last: bool = False) -> None:
        # The document's beginning is in a whole shard.
        known = min(self._skip, ids.size)
        self._skip -= known
        self._into += known
        ids = ids[known:]
        while ids.size:
            part = ids[: self._room]
            self._held.append(part)
            self._held_tokens += part.size
            self._into += part.size
            self._room -= part.size
            ids = ids[part.size :]
            if self._held_tokens >= BUFFER_TOKENS:
                self._flush()
            if last and not ids.size:
                self._count_document()
                last = False
            if not self._room:
                self._finish_shard()
        if last:
            self._count_document()

    def _flush(self) -> None:
        if not self._held:
            return
        data = np.concatenate(self._held).astype("<u4")
        self._held, self._held_tokens = [], 0
        if self._file is None:
            if self.manifest.shard_count >= MAX_SHARDS:
                raise Refused(
                    f"{self.folder}: more than {MAX_SHARDS} shards; raise --shard-tokens above {self.shard_tokens}"
                )
            self._file = self._open.enter_context(
                atomic_write(self.folder / shard_name(self.manifest.shard_count))
            )
        with _io(self.folder):
            self._file.write(data.data)
        self._digest.update(data.data)
        self._counts += np.bincount(data, minlength=self._counts.size)

    def _finish_shard(self) -> None:
        """Give the shard its name, and write the manifest that lists it."""
        self._flush()
        m = self.manifest
        size = self.shard_tokens - self._room
        self._open.close()
        m.shards.append(
            {
                "name": shard_name(m.shard_count),
                "tokens": size,
                "sha256": self._digest.hexdigest(),
                "documents": self.total_documents,
                "partial": self._into,
                "corpus_sha256": self._corpus.hexdigest(),
            }
        )
        m.shard_count += 1
        m.total_tokens += size
        self._file, self._digest, self._room = None, hashlib.sha256(), self.shard_tokens
        self._write_manifest()

    def _write_manifest(self) -> None:
        m = self.manifest
        m.total_documents, m.total_bytes = self.total_documents, self.total_bytes
        m.corpus_sha256 = self._corpus.hexdigest()
        m.audit = figures(self._counts, m.total_bytes, self._unknown_id)
        write_json(self.folder / MANIFEST, asdict(m))

    @property
    def counts(self) -> np.ndarray:
        """Occurrences of each id written, int64 (V,)."""
        self._flush()
        return self._counts

    def close(self) -> ShardManifest:
        """Write the last shard and the complete manifest."""
        if self._check or self._skip:
            self.abandon()
            raise Refused(
                f"{self.folder}: holds {plural(self._written, 'document')}, and now there are "
                f"{self.total_documents}: the input has "
                "changed; encode it into another folder"
            )
        if self._room < self.shard_tokens:
            self._finish_shard()
        if not self.manifest.total_tokens:
            self.abandon()
            raise Refused(f"{self.folder}: no tokens to write: the corpus is empty")
        self.manifest.complete = True
        self._write_manifest()
        return self.manifest

    def abandon(self) -> None:
        """Leave the whole shards and remove the unfinished one."""
        with contextlib.suppress(_Abandoned), self._open:
            raise _Abandoned
        self._file = None


class _Abandoned(Exception):
    """Raised to make atomic_write drop its temporary file."""


@contextlib.contextmanager
def _io(folder: Path) -> Any:
    try:
        yield
    except OSError as e:
        raise IOFailure(
            f"{e.filename or folder}: cannot write: {e.strerror}; make room or write elsewhere"
        ) from e
