"""Token shards: flat files of uint32 little endian ids, written beside a manifest.json and read back checked."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..common.atomic import atomic_write, write_json
from ..common.errors import InputNotFound, IOFailure, MalformedFile, Refused
from ..common.files import make_folder
from ..common.host import cores
from ..tokenizer.tokenizer import Tokenizer
from .manifest import EOS_POLICIES, MANIFEST, Manifest, figures, read_manifest, same_figure, shard_name
from .scan import Scan, scan

MOST_SHARDS = 100_000
HELD_TOKENS = 1 << 18  # ids gathered before they are written, hashed and counted


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
        self.manifest = Manifest(
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
        self._written = 0  # documents that are in whole shards
        self._skip = 0  # tokens of the next document that are in whole shards
        self._check: tuple[int, str | None] | None = None  # documents and what their digest must be
        if resume:
            self._resume()
        elif old := our_files(self.folder):
            raise Refused(
                f"{old[0]}: the folder holds shards already; choose another, or go on with --resume"
            )
        self.total_documents = self.total_bytes = 0
        self._into = 0  # tokens of the document that is being written
        self._document: tuple[str, int] | None = None
        self._file: BinaryIO | None = None
        self._open = ExitStack()
        self._digest = hashlib.sha256()
        self._room = shard_tokens
        self._held: list[np.ndarray] = []
        self._held_tokens = 0

    @property
    def tokens(self) -> int:
        """Tokens in shards and in the one that is being written."""
        return self.manifest.total_tokens + self.shard_tokens - self._room

    def _resume(self) -> None:
        """Take over the whole shards of a run that was stopped, and remove what it had not finished."""
        path = self.folder / MANIFEST
        ours = self.manifest
        if path.is_file():
            m = read_manifest(path, whole=False)
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
            found = scan(arrays, m.vocab_size, m.eos_token_id, threads=cores())
            check_scan(self.folder, m, found)
            self._counts += found.counts
            last = m.shards[-1]
            if m.corpus_sha256 is None:
                raise Refused(
                    f"{path}: corpus_sha256 = null: it was made of the shards and does not say where documents end, so that "
                    "nothing can be added; encode into another folder"
                )
            if m.eos_policy == "after" and (found.ends, found.tail) != (last["documents"], last["partial"]):
                raise MalformedFile(
                    f"{path}: the last shard ends after {last['documents']} documents and {last['partial']} tokens, the shards "
                    f"say {found.ends} and {found.tail}; encode into another folder"
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
    def behind(self) -> bool:
        """Whether documents that are in whole shards are still to be offered again."""
        return self.total_documents < self._written or self._skip > 0

    def holds(self, number: int) -> bool:
        """Whether the document of this number, counted from 0, is in whole shards: its ids are not needed."""
        return number < self._written

    def begin(self, sha256: str, size: int) -> None:
        """A document with this content hash and size (bytes of UTF-8)."""
        assert self._document is None
        self._document, self._into = (sha256, size), 0
        m = self.manifest
        if m.eos_policy == "between" and self.total_documents and not self.holds(self.total_documents):
            self._put(np.array([m.eos_token_id], dtype=np.uint32))

    def append(self, ids: np.ndarray) -> None:
        """The next ids of the document, uint32 (n,)."""
        self._put(ids)

    def end(self) -> None:
        """The document is complete."""
        m, document = self.manifest, self._document
        assert document is not None
        if m.eos_policy == "after" and not self.holds(self.total_documents):
            # In the same breath as the document's end, or a full shard would not know which documents it holds whole.
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
                    f"{self.folder}: the first {self.total_documents} documents are not those that were encoded here: the input "
                    "has changed; encode it into another folder"
                )
            self._check = None

    def _put(self, ids: np.ndarray, last: bool = False) -> None:
        known = min(self._skip, ids.size)  # the document's beginning is in a whole shard
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
            if self._held_tokens >= HELD_TOKENS:
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
            if self.manifest.shard_count >= MOST_SHARDS:
                raise Refused(
                    f"{self.folder}: more than {MOST_SHARDS} shards; raise --shard-tokens above {self.shard_tokens}"
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
        """How often each id was written, int64 (V,)."""
        self._flush()
        return self._counts

    def close(self) -> Manifest:
        """Write what is left, and the complete manifest."""
        if self._check or self._skip:
            self.abandon()
            raise Refused(
                f"{self.folder}: holds {self._written} documents, and now there are {self.total_documents}: the input has "
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
        """Leave the whole shards and remove the one that is not finished."""
        with contextlib.suppress(_Abandoned), self._open:
            raise _Abandoned
        self._file = None


class _Abandoned(Exception):
    """Makes atomic_write drop its temporary file."""


@contextlib.contextmanager
def _io(folder: Path) -> Any:
    try:
        yield
    except OSError as e:
        raise IOFailure(
            f"{e.filename or folder}: cannot write: {e.strerror}; make room or write elsewhere"
        ) from e


class TokenShards:
    """Shards opened read-only through memory maps: `arrays`, one uint32 (tokens,) for each shard.

    Always checked: manifest, names, number and sizes of the files, and the tokenizer when one is given.
    With verify also, in one pass over the data (see `check`): sha256, ids below vocab_size, the audit figures, and the
    number of EOS against the number of documents.
    Raises InputNotFound, MalformedFile, Refused (another tokenizer)."""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer | None = None, verify: bool = True) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not os.path.isfile(path):
            raise InputNotFound(f"{path}: no such file; give a folder of token shards, or text with --corpus")
        m = self.manifest = read_manifest(path)
        if tokenizer and tokenizer.sha256 != m.tokenizer_sha256:
            raise Refused(
                f"{path}: encoded with tokenizer {m.tokenizer_sha256}, given is {tokenizer.source} "
                f"with {tokenizer.sha256}; give the tokenizer that made the shards, or encode the corpus again"
            )
        if tokenizer and tokenizer.vocab_size != m.vocab_size:
            raise MalformedFile(
                f"{path}: vocab_size = {m.vocab_size}, its tokenizer has {tokenizer.vocab_size}"
            )
        if tokenizer and tokenizer.normalization != m.normalization:
            raise MalformedFile(
                f"{path}: normalization = {m.normalization!r}, its tokenizer has {tokenizer.normalization!r}"
            )
        names = {s["name"] for s in m.shards}
        extra = sorted(p.name for p in self.folder.glob("*.bin") if p.name not in names)
        if extra:
            raise MalformedFile(
                f"{self.folder / extra[0]}: not in {path}, which lists {m.shard_count} shards"
            )
        self.unknown_id = tokenizer.unknown_id if tokenizer else None
        self.arrays = [open_shard(self.folder, s) for s in m.shards]
        self.total_tokens: int = m.total_tokens
        self.total_bytes: int = m.total_bytes
        self.total_documents: int = m.total_documents
        self.vocab_size: int = m.vocab_size
        self.tokenizer_sha256: str = m.tokenizer_sha256
        self.eos_token_id: int | None = m.eos_token_id
        self.border_id: int | None = None if m.eos_policy == "none" else m.eos_token_id  # ends a document
        self.unigram_entropy: float = m.audit["unigram_entropy_nats"]  # nats per token
        self.sha256 = hashlib.sha256("".join(s["sha256"] for s in m.shards).encode()).hexdigest()
        if verify:
            self.check()

    def check_sizes(self, indices: np.ndarray) -> None:
        """Are the shards of these indices still as long as when they were opened? To be called before they are read: the
        kernel kills a process that reads a mapped file beyond its end. Raises MalformedFile."""
        for i in indices:
            size = _file_size(self.arrays[i])
            if size < self.arrays[i].nbytes:
                raise MalformedFile(
                    f"{self.folder / self.manifest.shards[i]['name']}: became shorter while it was read: {size} bytes, it had "
                    f"{self.arrays[i].nbytes}; restore it, and go on with --resume"
                )

    def check(
        self,
        keep: bool = False,
        against: np.ndarray | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Scan:
        """Read all the data and compare it with the manifest; the arguments are those of `scan`.

        Raises MalformedFile."""
        m = self.manifest
        found = scan(self.arrays, m.vocab_size, self.border_id, keep, against, cores(), progress)
        check_scan(self.folder, m, found)
        path = self.folder / MANIFEST
        unknown = self.unknown_id if self.unknown_id is not None and self.unknown_id < m.vocab_size else None
        for key, value in figures(found.counts, m.total_bytes, unknown).items():
            if key != "unknown_tokens" or unknown is not None:
                same_figure(f"{path}: audit.{key}", m.audit[key], value)
        ends = int(found.counts[m.eos_token_id]) if m.eos_token_id is not None else 0
        if m.eos_policy == "none" and ends:
            raise MalformedFile(
                f"{path}: eos_policy = 'none', but the shards hold {ends} end-of-text ids {m.eos_token_id}"
            )
        if m.eos_policy != "none":
            documents = found.ends + (m.eos_policy == "between")
            if documents != m.total_documents:
                raise MalformedFile(
                    f"{path}: total_documents = {m.total_documents}, the shards' EOS tokens say {documents}"
                )
        return found


def _file_size(array: np.ndarray) -> int:
    """Bytes of the file behind an array of `mapped`, as it is now; a file that was removed keeps its size."""
    assert isinstance(array.base, memoryview)
    return int(array.base.obj.size())  # of the map, which holds the file open


def open_shard(folder: Path, shard: dict[str, Any]) -> np.ndarray:
    """A shard that a manifest lists, uint32 (tokens,), mapped. Raises MalformedFile: missing, or another size."""
    path = folder / shard["name"]
    if not os.path.isfile(path):
        raise MalformedFile(
            f"{path}: missing; {MANIFEST} lists it with {shard['tokens']} tokens; restore it, or encode the corpus again"
        )
    size = path.stat().st_size
    if size != 4 * shard["tokens"]:
        raise MalformedFile(
            f"{path}: {size} bytes, {MANIFEST} says {shard['tokens']} tokens of 4 bytes; restore it, or make a manifest of "
            "what is there with apr tokenize repair-manifest"
        )
    return mapped(path)


def mapped(path: Path) -> np.ndarray:
    """The ids in a shard, uint32 (tokens,), mapped. Raises IOFailure: no rights, or more shards than a process may map."""
    try:
        with path.open("rb") as f:
            return np.frombuffer(memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)), dtype="<u4")
    except (OSError, ValueError) as e:  # ValueError: it was emptied meanwhile
        raise IOFailure(
            f"{path}: cannot be mapped: {e}; check its rights, or use fewer and larger shards"
        ) from e


def check_scan(folder: Path, m: Manifest, found: Scan) -> None:
    """Compare hashes and ids with a manifest. Raises MalformedFile, naming the shard."""
    for shard, digest in zip(m.shards, found.sha256, strict=True):
        if digest != shard["sha256"]:
            raise MalformedFile(
                f"{folder / shard['name']}: sha256 is {digest}, {MANIFEST} says {shard['sha256']}; the file was changed or "
                "damaged: encode the corpus again, or restore it"
            )
    if found.outside:
        index, position, i = found.outside
        raise MalformedFile(
            f"{folder / m.shards[index]['name']}: token {position} has id {i}, vocab_size is {m.vocab_size}"
        )


def our_files(folder: Path) -> list[Path]:
    """The shards and the manifest in a folder, and nothing else."""
    shards = [p for p in folder.glob("shard-*.bin") if re.fullmatch(r"shard-\d{5,}\.bin", p.name)]
    return sorted(shards) + [p for p in [folder / MANIFEST] if p.exists()]
