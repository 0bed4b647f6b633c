"""Token shards: flat files of uint32 little endian ids, written beside a manifest.json and read back checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputNotFound, MalformedFile, Refused
from ..formats.atomic import atomic_write, write_json
from .corpus import Document, make_folder
from .manifest import EOS_POLICIES, MANIFEST, Manifest, audit, read_manifest, same_figure, shard_name
from .tokenizer import Tokenizer

BATCH_CHARS = 1 << 20  # text encoded at once: bounds the Python objects alive
CHUNK = 1 << 20  # tokens verified at once


class ShardWriter:
    """Encode documents into shards of `shard_tokens` ids; use as a context manager.

    Each shard is written when it is full, whole or not at all, and the manifest after it; a manifest of
    an interrupted run says complete: false. Raises Refused: a folder that already holds shards, an
    EOS policy that the tokenizer has no EOS for, a document whose own text encodes to the EOS, no
    documents. IOFailure when writing fails."""

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        shard_tokens: int = 10_000_000,
        eos_policy: str = "after",
    ) -> None:
        self.folder = Path(folder)
        if eos_policy not in EOS_POLICIES:
            raise Refused(f"eos_policy = {eos_policy!r}; choose one of {', '.join(EOS_POLICIES)}")
        if eos_policy != "none" and tokenizer.eos_id is None:
            raise Refused(f"{tokenizer.source}: no EOS token for eos_policy = {eos_policy!r}; use 'none'")
        if shard_tokens < 1:
            raise Refused(f"shard_tokens = {shard_tokens} is not positive")
        make_folder(self.folder)
        if old := our_files(self.folder):
            raise Refused(f"{old[0]}: the folder holds shards already; choose another or remove them")
        self.tokenizer = tokenizer
        self.shard_tokens = shard_tokens
        self.manifest = Manifest(
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eos_policy=eos_policy,
            eos_token_id=tokenizer.eos_id,
            normalization=tokenizer.normalization,
        )
        self._counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self._corpus = hashlib.sha256()
        self._parts: list[np.ndarray] = []
        self._held = 0  # tokens in _parts

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def add(self, documents: Iterable[Document], progress: Callable[[int], None] | None = None) -> None:
        """Encode documents and append them; progress hears the number of documents so far."""
        m = self.manifest
        for batch in _batches(documents):
            for document, ids in zip(
                batch, self.tokenizer.encode_batch([d.text for d in batch]), strict=True
            ):
                self._add_document(document, ids)
            if progress:
                progress(m.total_documents)

    def _add_document(self, document: Document, ids: np.ndarray) -> None:
        m = self.manifest
        if m.eos_token_id is not None and (ids == m.eos_token_id).any():
            raise Refused(
                f"{document.name}: its text encodes to the EOS id {m.eos_token_id}; make that token special"
            )
        eos = np.array([] if m.eos_policy == "none" else [m.eos_token_id], dtype=np.uint32)
        if m.eos_policy == "between" and m.total_documents:
            self._append(eos)
        self._append(ids)
        if m.eos_policy == "after":
            self._append(eos)
        self._corpus.update(bytes.fromhex(document.sha256))
        m.total_documents += 1
        m.total_bytes += len(document.data)

    def _append(self, ids: np.ndarray) -> None:
        while ids.size:
            part = ids[: self.shard_tokens - self._held]
            self._parts.append(part)
            self._held += part.size
            ids = ids[part.size :]
            if self._held == self.shard_tokens:
                self._write_shard()

    def _write_shard(self) -> None:
        m = self.manifest
        if m.shard_count > 99_999:
            raise Refused(f"{self.folder}: more than 100000 shards; raise shard_tokens = {self.shard_tokens}")
        data = np.concatenate(self._parts).astype("<u4")
        name = shard_name(m.shard_count)
        with atomic_write(self.folder / name) as f:
            f.write(data.data)
        self._counts += np.bincount(data, minlength=m.vocab_size)
        m.shards.append({"name": name, "tokens": data.size, "sha256": hashlib.sha256(data.data).hexdigest()})
        m.shard_count += 1
        m.total_tokens += data.size
        self._parts, self._held = [], 0
        self._write_manifest()

    def _write_manifest(self) -> None:
        m = self.manifest
        m.corpus_sha256 = self._corpus.hexdigest()
        m.audit = audit(self._counts, m.total_bytes)
        write_json(self.folder / MANIFEST, asdict(m))

    def close(self) -> Manifest:
        """Write what is left, and the complete manifest."""
        if self._held:
            self._write_shard()
        if not self.manifest.total_tokens:
            raise Refused(f"{self.folder}: no tokens to write: the corpus is empty")
        self.manifest.complete = True
        self._write_manifest()
        return self.manifest


class TokenShards:
    """Shards opened read-only through memory maps: `arrays`, one uint32 (tokens,) for each shard.

    Always checked: manifest, names, number and sizes of the files, and the tokenizer when one is given.
    With verify also, in one pass over the data: sha256, ids below vocab_size, the audit figures, and the
    number of EOS against the number of documents.
    Raises InputNotFound, MalformedFile, Refused (another tokenizer)."""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer | None = None, verify: bool = True) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise InputNotFound(f"{path}: no such file; give a folder of token shards, or text with --corpus")
        m = self.manifest = read_manifest(path)
        if tokenizer and tokenizer.sha256 != m.tokenizer_sha256:
            raise Refused(
                f"{path}: encoded with tokenizer {m.tokenizer_sha256}, given is {tokenizer.source} "
                f"with {tokenizer.sha256}; encode the corpus again"
            )
        if tokenizer and tokenizer.vocab_size != m.vocab_size:
            raise MalformedFile(
                f"{path}: vocab_size = {m.vocab_size}, its tokenizer has {tokenizer.vocab_size}"
            )
        names = {s["name"] for s in m.shards}
        extra = sorted(p.name for p in self.folder.glob("*.bin") if p.name not in names)
        if extra:
            raise MalformedFile(
                f"{self.folder / extra[0]}: not in {path}, which lists {m.shard_count} shards"
            )
        self.arrays = [self._open(s) for s in m.shards]
        self.total_tokens: int = m.total_tokens
        self.total_bytes: int = m.total_bytes
        self.total_documents: int = m.total_documents
        self.vocab_size: int = m.vocab_size
        self.tokenizer_sha256: str = m.tokenizer_sha256
        self.eos_token_id: int | None = m.eos_token_id
        self.unigram_entropy: float = m.audit["unigram_entropy_nats"]  # nats per token
        self.sha256 = hashlib.sha256("".join(s["sha256"] for s in m.shards).encode()).hexdigest()
        if verify:
            self._verify()

    def _open(self, shard: dict[str, Any]) -> np.ndarray:
        path = self.folder / shard["name"]
        if not path.is_file():
            raise MalformedFile(f"{path}: missing; {MANIFEST} lists it with {shard['tokens']} tokens")
        size = path.stat().st_size
        if size != 4 * shard["tokens"]:
            raise MalformedFile(f"{path}: {size} bytes, {MANIFEST} says {shard['tokens']} tokens of 4 bytes")
        return np.memmap(path, dtype="<u4", mode="r").view(np.ndarray)

    def _verify(self) -> None:
        m = self.manifest
        counts = np.zeros(m.vocab_size, dtype=np.int64)
        for shard, array in zip(m.shards, self.arrays, strict=True):
            counts += _scan(self.folder / shard["name"], array, shard["sha256"], m.vocab_size)
        path = self.folder / MANIFEST
        for key, value in audit(counts, m.total_bytes).items():
            same_figure(f"{path}: audit.{key}", m.audit[key], value)
        if m.eos_policy != "none":
            found = int(counts[m.eos_token_id]) + (m.eos_policy == "between")
            if found != m.total_documents:
                raise MalformedFile(
                    f"{path}: total_documents = {m.total_documents}, the shards' EOS tokens say {found}"
                )


def our_files(folder: Path) -> list[Path]:
    """The shards and the manifest in a folder, and nothing else."""
    return sorted(folder.glob("shard-[0-9][0-9][0-9][0-9][0-9].bin")) + [
        p for p in [folder / MANIFEST] if p.exists()
    ]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Groups of at least BATCH_CHARS characters (the last one may be smaller)."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _scan(path: Path, array: np.ndarray, sha256: str, vocab_size: int) -> np.ndarray:
    """Counts int64 (V,) of the ids of one shard; MalformedFile when its hash or an id is wrong."""
    digest = hashlib.sha256()
    counts = np.zeros(vocab_size, dtype=np.int64)
    bad = None
    for start in range(0, array.size, CHUNK):
        chunk = array[start : start + CHUNK]
        digest.update(chunk.data)
        if bad is None and chunk.max() >= vocab_size:
            i = int(np.argmax(chunk >= vocab_size))
            bad = f"{path}: token {start + i} has id {chunk[i]}, vocab_size is {vocab_size}"
        if bad is None:
            counts += np.bincount(chunk, minlength=vocab_size)
    if digest.hexdigest() != sha256:
        raise MalformedFile(f"{path}: sha256 is {digest.hexdigest()}, {MANIFEST} says {sha256}")
    if bad:
        raise MalformedFile(bad)
    return counts
