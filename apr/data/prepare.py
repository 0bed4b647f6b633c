"""A corpus made ready for training: tokenizer, training shards and validation shards, kept in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import read_json
from ..errors import InputNotFound, IOFailure, MalformedFile, Refused
from ..formats.atomic import write_json
from .corpus import Document, is_held_out, make_folder
from .shards import ShardWriter, TokenShards, our_files
from .tokenizer import Progress, Tokenizer, train_tokenizer

FORMAT = "apr-prepared-1"
RECORD = "prepared.json"


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made or found: both sides opened and verified, and their tokenizer."""

    folder: Path
    tokenizer: Tokenizer
    train: TokenShards
    val: TokenShards
    key: str
    reused: bool
    reason: str  # why it was built, or that it was reused

    @property
    def tokenizer_dir(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def train_dir(self) -> Path:
        return self.folder / "train"

    @property
    def val_dir(self) -> Path:
        return self.folder / "val"


def prepare(
    documents: Iterable[Document],
    out_dir: str | Path,
    *,
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    val_fraction: float = 0.05,
    shard_tokens: int = 10_000_000,
    progress: Progress | None = None,
) -> Prepared:
    """Split documents by content hash, train a tokenizer of vocab_size on the training side unless one is
    given, and encode both sides into out_dir/train and out_dir/val.

    The result depends on the set of documents, not on their order: they are written in the order of their
    hashes, so that neighbours in a folder do not end up as neighbours in the shards, and the first windows
    of the validation side are a sample of it. A second call with the same input reuses the folder after
    verifying it; a folder that fails, or was made from other input, is built again.
    Raises Refused: bad arguments, a side without documents; IOFailure."""
    if (vocab_size is None) == (tokenizer is None):
        raise Refused("give either a vocab_size to train a tokenizer with, or a tokenizer")
    if not 0.0 < val_fraction < 1.0:
        raise Refused(f"val_fraction = {val_fraction} is not between 0 and 1")
    ordered = sorted(documents, key=lambda d: d.sha256)
    sides = {
        "train": [d for d in ordered if not is_held_out(d.sha256, val_fraction)],
        "val": [d for d in ordered if is_held_out(d.sha256, val_fraction)],
    }
    for side, held in sides.items():
        if not held:
            raise Refused(
                f"val_fraction = {val_fraction} of {len(ordered)} documents leaves none for {side}; "
                "use another fraction, more files, or cut a long file into several"
            )
    folder = Path(out_dir)
    key = _key(ordered, vocab_size, tokenizer, val_fraction, shard_tokens)
    record, reason = _read_record(folder / RECORD)
    if record is not None and record.get("key") != key:
        reason = "made from other input"
    elif record is not None:
        try:
            return _open(folder, record, key)
        except (InputNotFound, MalformedFile, Refused) as e:
            reason = str(e)
    _begin(folder, key)
    if tokenizer is None:
        assert vocab_size is not None
        texts = [d.text for d in sides["train"]]
        tokenizer = train_tokenizer(texts, vocab_size, folder / "tokenizer", progress=progress)
    else:
        tokenizer.save(folder / "tokenizer")
    for side, held in sides.items():
        _encode(held, folder / side, side, tokenizer, shard_tokens, progress)
    train, val = (TokenShards(folder / side, tokenizer) for side in sides)
    write_json(
        folder / RECORD,
        {
            "format": FORMAT,
            "key": key,
            "complete": True,
            "val_fraction": val_fraction,
            "tokenizer_sha256": tokenizer.sha256,
            "train_sha256": train.sha256,
            "val_sha256": val.sha256,
        },
    )
    return Prepared(folder, tokenizer, train, val, key, False, reason)


def _encode(
    documents: list[Document],
    folder: Path,
    side: str,
    tokenizer: Tokenizer,
    shard_tokens: int,
    progress: Progress | None,
) -> None:
    def report(done: int) -> None:
        if progress:
            progress(f"encode {side}", done, len(documents))

    with ShardWriter(folder, tokenizer, shard_tokens) as writer:
        writer.add(documents, report)


def _key(
    ordered: list[Document],
    vocab_size: int | None,
    tokenizer: Tokenizer | None,
    val_fraction: float,
    shard_tokens: int,
) -> str:
    """Identity of everything that determines the result."""
    made_by = f"{tokenizer.sha256} {tokenizer.eos_token}" if tokenizer else f"train {vocab_size}"
    digest = hashlib.sha256(f"{FORMAT} {made_by} {val_fraction!r} {shard_tokens}".encode())
    for document in ordered:
        digest.update(bytes.fromhex(document.sha256))
    return digest.hexdigest()


def _read_record(path: Path) -> tuple[dict[str, Any] | None, str]:
    """prepared.json, or None and why there is none to rely on."""
    if not path.is_file():
        return None, "nothing prepared yet"
    try:
        record = read_json(path)
    except MalformedFile as e:
        return None, str(e)
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("complete") is not True:
        return None, f"{path}: preparing did not finish"
    return record, ""


def _open(folder: Path, record: dict[str, Any], key: str) -> Prepared:
    tokenizer = Tokenizer.from_file(folder / "tokenizer")
    train, val = (TokenShards(folder / side, tokenizer) for side in ("train", "val"))
    found = {"tokenizer_sha256": tokenizer.sha256, "train_sha256": train.sha256, "val_sha256": val.sha256}
    for name, value in found.items():
        if record.get(name) != value:
            raise MalformedFile(f"{folder / RECORD}: {name} = {record.get(name)!r}, found {value!r}")
    return Prepared(folder, tokenizer, train, val, key, True, "reused")


def _begin(folder: Path, key: str) -> None:
    """Mark the folder as being built, and remove what an earlier call of ours left in it.

    Without an earlier mark of ours, a tokenizer or shards in the folder are somebody's data: Refused."""
    ours = (folder / RECORD).is_file()
    old = [*our_files(folder / "train"), *our_files(folder / "val")]
    theirs = [*old, *folder.glob("tokenizer/tokenizer.json")]
    if theirs and not ours:
        raise Refused(f"{theirs[0]}: not made by an earlier run of this; choose an empty folder")
    make_folder(folder)
    write_json(folder / RECORD, {"format": FORMAT, "key": key, "complete": False})
    try:
        for path in old:
            path.unlink()
    except OSError as e:
        raise IOFailure(f"{e.filename}: cannot be replaced: {e.strerror}") from None
