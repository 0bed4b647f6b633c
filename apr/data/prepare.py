"""A corpus made ready for training: tokenizer, training shards and validation shards, kept in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from ..common.atomic import locked, write_json
from ..common.errors import AprError, IOFailure, MalformedFile, Refused
from ..common.files import make_folder, read_json
from ..common.progress import Progress
from ..tokenizer.tokenizer import Tokenizer
from ..tokenizer.training import train_tokenizer
from .corpus import Corpus
from .documents import Document, LongDocument, Sides
from .encode import Counts, encode_into
from .encode_folder import RECORD as ENCODED
from .encode_folder import SKIPPED, is_encoded
from .guards import USUAL, Bounds
from .seen import Seen
from .shards import TokenShards, our_files
from .source import Skipped

FORMAT = "apr-prepared-2"
RECORD = "prepared.json"


@dataclass(frozen=True)
class PreparedCorpus:
    """A folder of `prepare`: FOLDER/train, FOLDER/val and FOLDER/tokenizer.

    reason: why the folder was built, or "reused". distinct: documents of the corpus, without copies."""

    folder: Path
    tokenizer: Tokenizer
    key: str
    reused: bool
    reason: str
    distinct: int = 0

    def left_out(self) -> str:
        """Report the documents that were skipped, by reason; "" without any."""
        record = read_json(self.folder / ENCODED)
        result = record.get("result") if isinstance(record, dict) else None
        skipped = result.get("skipped") if isinstance(result, dict) else None
        if not isinstance(skipped, dict) or not all(isinstance(n, int) for n in skipped.values()):
            raise MalformedFile(
                f"{self.folder / ENCODED}: no counts of skipped documents; remove {self.folder} to prepare it again"
            )
        if not skipped:
            return ""
        counts = ", ".join(f"{n:,} {reason}" for reason, n in sorted(skipped.items()))
        total = sum(skipped.values())
        were = "document was" if total == 1 else "documents were"
        return f"{total:,} {were} skipped: {counts} (listed in {self.folder / SKIPPED})"

    @property
    def sides(self) -> dict[str, Path]:
        return {side: self.folder / side for side in ("train", "val")}


def prepare(
    corpus: Corpus,
    out_dir: str | Path,
    *,
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    val_fraction: float = 0.05,
    shard_tokens: int = 10_000_000,
    bounds: Bounds = USUAL,
    progress: Progress | None = None,
    in_cache: bool = False,
    bos: str = "auto",
) -> PreparedCorpus:
    """Split documents by content hash, train a tokenizer of vocab_size on the training side unless one is
    given, and encode both sides into out_dir/train and out_dir/val.

    in_cache: out_dir is a cache, and the folder is one in it, named by all that determines the result: no folder takes the
    place of another. A second call with the same input reuses the folder after verifying it, or goes on where an earlier one
    was killed; a folder that fails, or was made from other input, is built again. The input is read once to find out, and
    again to encode it.
    Raises Refused: bad arguments, a side without documents, a guard; IOFailure."""
    if (vocab_size is None) == (tokenizer is None):
        raise Refused("give either a vocab_size to train a tokenizer with, or a tokenizer")
    if not 0.0 < val_fraction < 1.0:
        raise Refused(f"val_fraction = {val_fraction} is not between 0 and 1")
    made_by = f"{tokenizer.sha256} {tokenizer.eos_token}" if tokenizer else f"train {vocab_size}"
    if tokenizer and tokenizer.prefix_ids and bos == "auto":
        made_by += f" behind {tokenizer.prefix_ids}"
    key, sides, distinct = _key(corpus, f"{made_by} {val_fraction!r} {shard_tokens}", val_fraction, progress)
    folder = Path(out_dir) / key[:16] if in_cache else Path(out_dir)
    opened, reason = _reused(folder, key, distinct)
    if opened:
        return opened

    def wait() -> None:
        if progress:
            progress("wait for another process, which prepares this corpus,", 0, 0)

    with locked(make_folder(folder), "preparing a corpus in it", wait if in_cache else None):
        # Another process may have made it while this one waited.
        opened, reason = _reused(folder, key, distinct)
        if opened:
            return opened
        record, _ = _read_record(folder / RECORD)
        begun = record is not None and record.get("key") == key and record.get("complete") is not True
        making = _Making(
            corpus,
            folder,
            key,
            vocab_size,
            tokenizer,
            val_fraction,
            shard_tokens,
            bounds,
            progress,
            bos,
            sides,
        )
        try:
            made = making.go_on() if begun else making.begin()
        except (Refused, MalformedFile):
            # What an earlier call left may be damaged, or of another version: no reason to refuse the corpus.
            if not begun:
                raise
            made = making.begin()
        tokenizer, hashes = made
        write_json(
            folder / RECORD,
            {
                "format": FORMAT,
                "key": key,
                "complete": True,
                "val_fraction": val_fraction,
                "tokenizer_sha256": tokenizer.sha256,
                **{f"{side}_sha256": sha for side, sha in hashes.items()},
            },
        )
    return PreparedCorpus(folder, tokenizer, key, False, reason, distinct)


def tokenizer_of(
    corpora: Sequence[Corpus],
    vocab_size: int,
    val_fraction: float,
    progress: Progress | None,
    root: Path,
) -> Tokenizer:
    """Train a tokenizer on the training sides of all corpora, in a folder below root named by what determines it, or find it
    there."""
    keys = [
        _key(corpus, f"train {vocab_size} {val_fraction!r}", val_fraction, progress) for corpus in corpora
    ]
    folder = root / hashlib.sha256(" ".join(key for key, *_ in keys).encode()).hexdigest()[:16]

    def wait() -> None:
        if progress:
            progress("wait for another process, which trains this tokenizer,", 0, 0)

    with locked(make_folder(folder), "training a tokenizer in it", wait):
        # Written last, once it is whole.
        if (folder / RECORD).is_file():
            return Tokenizer.from_file(folder / "tokenizer")
        texts = (
            text
            for corpus, (_, sides, _) in zip(corpora, keys, strict=True)
            for item in _distinct(corpus, None)
            if not sides.hold_out(item.sha256)
            for text in item.chunks()
        )
        made = train_tokenizer(texts, vocab_size, folder / "tokenizer", progress=progress)
        write_json(folder / RECORD, {"format": FORMAT, "tokenizer_sha256": made.sha256})
    return made


def _reused(folder: Path, key: str, distinct: int) -> tuple[PreparedCorpus | None, str]:
    """Open a folder that was made whole from the input of this key; None and the reason where there is none."""
    record, reason = _read_record(folder / RECORD)
    if record is None or record.get("complete") is not True:
        return None, reason
    if record.get("key") != key:
        return None, "made from other input"
    try:
        return _open(folder, record, key, distinct), "reused"
    except AprError as e:
        return None, str(e)


@dataclass(frozen=True)
class _Making:
    """A call of `prepare` that makes the folder, which it holds."""

    corpus: Corpus
    folder: Path
    key: str
    vocab_size: int | None
    tokenizer: Tokenizer | None
    val_fraction: float
    shard_tokens: int
    bounds: Bounds
    progress: Progress | None
    bos: str
    sides: Sides

    def begin(self) -> tuple[Tokenizer, dict[str, str]]:
        """Make it from the beginning: the tokenizer, and each side's hash."""
        _begin(self.folder, self.key)
        return self._encode(self.tokenizer or self._trained(), resume=False)

    def go_on(self) -> tuple[Tokenizer, dict[str, str]]:
        """Make what an earlier call, which was killed, did not get to: the tokenizer, and each side's hash."""
        if not (self.folder / ENCODED).is_file():
            return self._encode(self.tokenizer or self._trained(), resume=False)
        tokenizer = self.tokenizer or Tokenizer.from_file(self.folder / "tokenizer")
        # Killed between the end of the encoding and the record of this folder, both sides are there.
        if is_encoded(self.folder):
            return tokenizer, self._hashes(tokenizer, verify=True)
        return self._encode(tokenizer, resume=True)

    def _trained(self) -> Tokenizer:
        """Train a tokenizer on the training side."""
        assert self.vocab_size is not None
        texts = (
            text
            for item in _distinct(self.corpus, None)
            if not self.sides.hold_out(item.sha256)
            for text in item.chunks()
        )
        return train_tokenizer(texts, self.vocab_size, self.folder / "tokenizer", progress=self.progress)

    def _encode(self, tokenizer: Tokenizer, resume: bool) -> tuple[Tokenizer, dict[str, str]]:
        def hear(counts: Counts, read: int, total: int) -> None:
            if self.progress:
                self.progress("encode", read, total)

        encode_into(
            self.folder,
            self.corpus,
            tokenizer,
            val_fraction=self.val_fraction,
            bos=self.bos,
            sides=self.sides,
            shard_tokens=self.shard_tokens,
            bounds=self.bounds,
            made={"prepared": self.key},
            resume=resume,
            progress=hear,
        )
        return tokenizer, self._hashes(tokenizer, verify=False)

    def _hashes(self, tokenizer: Tokenizer, verify: bool) -> dict[str, str]:
        return {
            side: TokenShards(self.folder / side, tokenizer, verify=verify).sha256
            for side in ("train", "val")
        }


def _distinct(corpus: Corpus, skipped: list[Skipped] | None) -> Iterator[Document | LongDocument]:
    """Yield the documents without copies; the first unusable one goes to `skipped`."""
    seen = Seen()
    try:
        for item in corpus:
            if isinstance(item, Skipped):
                if skipped is not None and not skipped:
                    skipped.append(item)
            elif seen.add(item.sha256):
                yield item
    finally:
        seen.close()


def _key(
    corpus: Corpus, made_by: str, val_fraction: float, progress: Progress | None
) -> tuple[str, Sides, int]:
    """Hash everything that determines the result, find the side of each document, and count those that are no copies.

    Raises Refused for fewer documents than sides."""
    digest = hashlib.sha256(f"{FORMAT} tokenizers {tokenizers.__version__} {made_by}".encode())
    total, low, high = 0, "", ""
    skipped: list[Skipped] = []
    for item in _distinct(corpus, skipped):
        digest.update(bytes.fromhex(item.sha256))
        total, low, high = total + 1, min(low or item.sha256, item.sha256), max(high, item.sha256)
        if progress:
            progress("read corpus", corpus.bytes_read, corpus.total_bytes)
    why = (
        f"; the first that cannot be used: {skipped[0].name}: {skipped[0].reason}: {skipped[0].detail}"
        if skipped
        else ""
    )
    if not total:
        raise Refused(f"{corpus}: no text{why}")
    if total == 1:
        raise Refused(
            f"{corpus}: one document cannot be divided into one to train on and one to validate with; give more files, "
            f"or cut a long file into several{why}"
        )
    return digest.hexdigest(), Sides.of((low, high), val_fraction), total


def _read_record(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Read prepared.json; None and the reason where it cannot be relied on."""
    if not path.is_file():
        return None, "nothing prepared yet"
    try:
        record = read_json(path)
    except AprError as e:
        return None, str(e)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        return None, f"{path}: of another version"
    return record, "" if record.get("complete") is True else f"{path}: preparing did not finish"


def _open(folder: Path, record: dict[str, Any], key: str, distinct: int) -> PreparedCorpus:
    tokenizer = Tokenizer.from_file(folder / "tokenizer")
    train, val = (TokenShards(folder / side, tokenizer) for side in ("train", "val"))
    if not tokenizer.is_recorded_as(record.get("tokenizer_sha256")):
        raise Refused(f"{folder / RECORD}: made by another tokenizer than the one beside it")
    for name, value in {"train_sha256": train.sha256, "val_sha256": val.sha256}.items():
        if record.get(name) != value:
            raise Refused(f"{folder / RECORD}: {name} = {record.get(name)!r}, found {value!r}")
    return PreparedCorpus(folder, tokenizer, key, True, "reused", distinct)


def _begin(folder: Path, key: str) -> None:
    """Remove the files of an earlier call, and mark the folder as being built.

    Raises Refused for a tokenizer or shards in a folder without an earlier mark: they are somebody's data."""
    ours = (folder / RECORD).is_file()
    old = [*our_files(folder / "train"), *our_files(folder / "val")]
    theirs = [*old, *folder.glob("tokenizer/tokenizer.json")]
    if theirs and not ours:
        raise Refused(f"{theirs[0]}: not made by an earlier run of this; choose an empty folder")
    make_folder(folder)
    # The record of the encoding first, and the new mark last: killed at any moment in between, the next call begins here.
    try:
        for path in (folder / ENCODED, folder / SKIPPED, *old):
            path.unlink(missing_ok=True)
    except OSError as e:
        raise IOFailure(f"{e.filename}: cannot be replaced: {e.strerror}") from None
    write_json(folder / RECORD, {"format": FORMAT, "key": key, "complete": False})
