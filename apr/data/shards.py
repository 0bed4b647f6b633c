"""Read token shards: flat files of uint32 little endian ids beside a manifest.json, checked and mapped."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import InputNotFound, IOFailure, MalformedFile, Refused
from ..common.files import opened, short
from ..common.host import cores
from ..common.units import plural
from ..tokenizer.tokenizer import Tokenizer
from .manifest import MANIFEST, ShardManifest, figures, read_manifest, same_figure
from .scan import Scan, scan


class Shards:
    """Token data of a folder, opened read-only through memory maps; text (TokenShards) or packed examples (PackedShards).

    files            the arrays', then the masks'
    arrays           uint32 (tokens,)  ids
    masks            uint8  (tokens,)  beside arrays: 1 where the token is a target; [] where every token is one
    row_tokens       tokens of a packed row, None where windows are cut from running text
    row_targets      int64  (rows,)    number of targets of each packed row
    prefix_ids       ids that stand before each document, () where none do or nobody noted it
    border_id        id that ends a document, None where nothing does
    total_tokens     of the tokens that are targets, with their total_bytes of UTF-8 text
    figures          statistics of those tokens, see manifest.figures
    facts            counts of packed examples, for config.json
    sha256           identity of the data
    """

    folder: Path
    files: list[Path]
    arrays: list[np.ndarray]
    masks: list[np.ndarray]
    row_tokens: int | None = None
    row_targets: np.ndarray | None = None
    prefix_ids: tuple[int, ...] = ()
    border_id: int | None
    vocab_size: int
    tokenizer_sha256: str
    total_tokens: int
    total_bytes: int
    total_documents: int
    figures: dict[str, Any]
    facts: dict[str, Any]
    sha256: str

    @property
    def parts(self) -> list[tuple[str, Shards]]:
        """List the sources of a mixture, by name; of other data one, whose name is ""."""
        return [("", self)]

    def strides(self, seq_length: int) -> list[int]:
        """List how far apart the windows of each array begin: rows of packed examples, or running text."""
        return [self.row_tokens or seq_length] * len(self.arrays)

    @property
    def unigram_entropy(self) -> float:
        """Entropy of the token frequencies, nats/token."""
        return float(self.figures["unigram_entropy_nats"])

    def check_sizes(self, indices: np.ndarray) -> None:
        """Raise MalformedFile for a file of the arrays `indices`, or a mask, that became shorter since it was opened.

        Called before a read: the kernel kills a process that reads a mapped file beyond its end."""
        masks = zip(self.files[len(self.arrays) :], self.masks, strict=True)
        for path, array in [*((self.files[i], self.arrays[i]) for i in indices), *masks]:
            size = _file_size(array)
            if size < array.nbytes:
                raise MalformedFile(
                    f"{path}: became shorter while it was read: {plural(size, 'byte')}, it had {array.nbytes}; restore it, and "
                    "go on with --resume"
                )


class TokenShards(Shards):
    """Shards of text: documents one behind the other.

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
        if tokenizer and not tokenizer.is_recorded_as(m.tokenizer_sha256):
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
                f"{self.folder / extra[0]}: not in {path}, which lists {plural(m.shard_count, 'shard')}"
            )
        self.unknown_id = tokenizer.unknown_id if tokenizer else None
        self.files = [self.folder / s["name"] for s in m.shards]
        self.arrays, self.masks = [open_shard(self.folder, s) for s in m.shards], []
        self.total_tokens, self.total_bytes = m.total_tokens, m.total_bytes
        self.total_documents, self.vocab_size = m.total_documents, m.vocab_size
        self.tokenizer_sha256 = m.tokenizer_sha256
        self.border_id = None if m.eos_policy == "none" else m.eos_token_id
        self.figures, self.facts, self.prefix_ids = m.audit, {}, _prefix_of(path, m)
        self.sha256 = hashlib.sha256("".join(s["sha256"] for s in m.shards).encode()).hexdigest()
        if verify:
            self.check()

    def check(
        self,
        keep: bool = False,
        against: np.ndarray | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Scan:
        """Read all the data and compare it with the manifest; the arguments are those of `scan`.

        Raises MalformedFile."""
        m = self.manifest
        scanned = scan(self.arrays, m.vocab_size, self.border_id, keep, against, cores(), progress)
        check_scan(self.folder, m, scanned)
        path = self.folder / MANIFEST
        unknown = self.unknown_id if self.unknown_id is not None and self.unknown_id < m.vocab_size else None
        for key, value in figures(scanned.counts, m.total_bytes, unknown).items():
            if key != "unknown_tokens" or unknown is not None:
                same_figure(f"{path}: audit.{key}", m.audit[key], value)
        ends = int(scanned.counts[m.eos_token_id]) if m.eos_token_id is not None else 0
        if m.eos_policy == "none" and ends:
            raise MalformedFile(
                f"{path}: eos_policy = 'none', but the shards hold {ends} end-of-text ids {m.eos_token_id}"
            )
        if m.eos_policy != "none":
            documents = scanned.ends + (m.eos_policy == "between")
            if documents != m.total_documents:
                raise MalformedFile(
                    f"{path}: total_documents = {m.total_documents}, the shards' EOS tokens say {documents}"
                )
        return scanned


def _prefix_of(path: Path, m: ShardManifest) -> tuple[int, ...]:
    """Read the ids that stand before each document from a manifest. Raises MalformedFile."""
    ids = m.made.get("bos_ids", []) if isinstance(m.made, dict) else []
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < m.vocab_size for i in ids):
        raise MalformedFile(f"{path}: made.bos_ids = {short(ids)} are no ids of its vocabulary")
    return tuple(ids)


def _file_size(array: np.ndarray) -> int:
    """Measure the file behind an array of `mapped`; a file that was removed keeps its size."""
    assert isinstance(array.base, memoryview)
    # The map holds the file open.
    return int(array.base.obj.size())


def open_shard(folder: Path, shard: dict[str, Any]) -> np.ndarray:
    """Map a shard that a manifest lists, uint32 (tokens,). Raises MalformedFile: missing, or another size."""
    path = folder / shard["name"]
    if not os.path.isfile(path):
        raise MalformedFile(
            f"{path}: missing; {MANIFEST} lists it with {plural(shard['tokens'], 'token')}; restore it, "
            f"or encode the corpus again"
        )
    size = path.stat().st_size
    if size != 4 * shard["tokens"]:
        raise MalformedFile(
            f"{path}: {plural(size, 'byte')}, {MANIFEST} says {plural(shard['tokens'], 'token')} of 4 "
            f"bytes; restore it, or make a manifest of "
            "what is there with apr tokenize repair-manifest"
        )
    return mapped(path)


def mapped(path: Path, dtype: str = "<u4") -> np.ndarray:
    """Map the ids of a shard, uint32 (tokens,), or a mask. Raises IOFailure: no rights, or more shards than a process may map."""
    try:
        with opened(path) as (f, _):
            return np.frombuffer(memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)), dtype)
    # ValueError: the file was emptied meanwhile.
    except (IOFailure, ValueError) as e:
        raise IOFailure(
            f"{path}: cannot be mapped: {e}; check its rights, or use fewer and larger shards"
        ) from e


def check_scan(folder: Path, m: ShardManifest, scanned: Scan) -> None:
    """Compare hashes and ids with a manifest. Raises MalformedFile, naming the shard."""
    for shard, digest in zip(m.shards, scanned.sha256, strict=True):
        if digest != shard["sha256"]:
            raise MalformedFile(
                f"{folder / shard['name']}: sha256 is {digest}, {MANIFEST} says {shard['sha256']}; the file was changed or "
                "damaged: encode the corpus again, or restore it"
            )
    if scanned.outside:
        index, position, i = scanned.outside
        raise MalformedFile(
            f"{folder / m.shards[index]['name']}: token {position} has id {i}, vocab_size is {m.vocab_size}"
        )


def our_files(folder: Path) -> list[Path]:
    """List the shards and the manifest in a folder."""
    shards = [p for p in folder.glob("shard-*.bin") if re.fullmatch(r"shard-\d{5,}\.bin", p.name)]
    return sorted(shards) + [p for p in [folder / MANIFEST] if p.exists()]
