"""Audit of token shards: all guards of one or two splits, for `apr tokenize audit` and before training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..common.errors import AprError, InputNotFound
from ..common.finding import Finding
from ..common.progress import Progress
from ..common.units import plural
from ..tokenizer.tokenizer import Tokenizer
from .conservation import conserved
from .conversations.packed import RECORD, PackedShards, guard_disjoint, guard_packed
from .conversations.pairs import guard_pairs
from .guards import USUAL, Bounds, disjoint, enforce, figures_again, fits_model, plausible, round_trip
from .scan import Scan
from .shards import Shards, TokenShards


@dataclass
class Split:
    """One folder of token shards, "train" or "val", of a source of a mixture "NAME/train" or "NAME/val": its scan and its
    findings. shards is None when they cannot be opened."""

    name: str
    folder: Path
    shards: Shards | None = None
    scan: Scan | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def side(self) -> str:
        """ "train" or "val"."""
        return self.name.rpartition("/")[2]

    @property
    def source(self) -> str:
        """Name of the source of a mixture, "" where the data has one source."""
        return self.name.rpartition("/")[0]


def named(source: str, side: str) -> str:
    """Name a split."""
    return f"{source}/{side}" if source else side


def sides_of(folder: Path) -> dict[str, Path]:
    """List the splits of a folder: {"train": ..., "val": ...} when it holds these folders, {"train": folder} when it holds
    shards itself."""
    if (folder / "train").is_dir():
        val = folder / "val"
        return {"train": folder / "train"} | ({"val": val} if val.is_dir() else {})
    return {"train": folder}


def folders_in(folder: Path, sources: Iterable[str]) -> dict[str, Path]:
    """List the splits of a folder, by name; of a mixture, it has a folder for each source."""
    return {
        named(source, side): path
        for source in sources
        for side, path in sides_of(folder / source if source else folder).items()
    }


def holds_examples(folder: Path) -> bool:
    """Tell a folder of packed examples from one of text."""
    return (folder / RECORD).is_file()


def open_shards(folder: Path, tokenizer: Tokenizer, verify: bool = True) -> Shards:
    """Open the text or the packed examples of a folder. Raises InputNotFound, MalformedFile, Refused."""
    return (PackedShards if holds_examples(folder) else TokenShards)(folder, tokenizer, verify)


def tokenizer_beside(folder: Path) -> Path:
    """Return the tokenizer folder that `encode-corpus` writes for a folder of shards, or for the parent of train/ and val/."""
    inside, beside = folder / "tokenizer", folder.parent / "tokenizer"
    return beside if beside.is_dir() and not inside.is_dir() else inside


def tokenizer_of_shards(folder: Path, given: str | None) -> Tokenizer:
    """Load the tokenizer of a folder of shards: `given`, or the one beside the shards. Raises InputNotFound."""
    if not folder.is_dir():
        raise InputNotFound(f"{folder}: no such folder; give one with token shards")
    where = Path(given) if given else tokenizer_beside(folder)
    if not where.exists():
        raise InputNotFound(f"{where}: no such folder; say with --tokenizer which tokenizer made the shards")
    return Tokenizer.from_file(where)


def audit(
    folders: dict[str, Path],
    tokenizer: Tokenizer,
    bounds: Bounds = USUAL,
    model_vocab: int | None = None,
    lenient: bool = False,
    progress: Progress | None = None,
) -> list[Split]:
    """Read all the data of "train" and, where given, "val", of each source, and check every guard of text or of packed
    examples. No document of any source's "train" may stand in the "val" of any source.

    lenient: shards that cannot be opened or differ from their manifest become a failed finding instead of an error
    (InputNotFound, MalformedFile, Refused)."""
    splits = {name: Split(name, folder) for name, folder in folders.items()}
    for split in splits.values():
        with _caught(split, "manifest, sizes and tokenizer", "those of the files", lenient):
            split.shards = open_shards(split.folder, tokenizer, verify=False)
            if isinstance(split.shards, TokenShards):
                split.findings.append(_opened(split.shards))
    # val first: train looks its documents up among those of val
    held_out: list[np.ndarray] = []
    for split in sorted(splits.values(), key=lambda x: x.side != "val"):
        is_val = split.side == "val"
        against = None if is_val or not held_out else np.sort(np.concatenate(held_out))
        _read(split, against, keep=is_val, lenient=lenient, progress=progress)
        if is_val and split.scan:
            held_out.append(split.scan.identities)
    for split in splits.values():
        if isinstance(split.shards, PackedShards):
            with _caught(split, "sha256, ids and labels", "those of instruct.json", lenient):
                split.shards.check()
                split.findings += guard_packed(split.shards, tokenizer, model_vocab)
                split.findings += [guard_pairs(split.shards)] if split.shards.manifest.pairs else []
        if split.shards is None or split.scan is None:
            continue
        split.findings.append(_end_of_text(split.shards, tokenizer))
        split.findings += plausible(split.scan.counts, split.shards.total_bytes, tokenizer, bounds)
        split.findings.append(
            figures_again(split.shards.figures, split.scan.counts, split.shards.total_bytes)
        )
        split.findings.append(round_trip(split.shards, tokenizer))
        if isinstance(split.shards, TokenShards):
            split.findings.append(conserved(split.shards, split.scan.counts, tokenizer))
        if model_vocab is not None:
            split.findings.append(fits_model(tokenizer, model_vocab))
    vals = [x for x in splits.values() if x.side == "val" and x.shards]
    for train in (x for x in splits.values() if x.side == "train"):
        read = [x.shards for x in vals if x.shards and x.scan]
        if read and train.scan and train.shards:
            train.findings.append(disjoint(train.scan.shared, train.shards, read))
        packed = [x.shards for x in vals if isinstance(x.shards, PackedShards)]
        if packed and isinstance(train.shards, PackedShards):
            train.findings.append(guard_disjoint(train.shards, packed))
    return list(splits.values())


def _read(
    split: Split, against: np.ndarray | None, keep: bool, lenient: bool, progress: Progress | None
) -> None:
    """Scan shards of text, if they could be opened. against: identities of documents that must not recur."""
    if not isinstance(split.shards, TokenShards):
        return
    total, done = split.shards.total_tokens, 0

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress:
            progress(f"verify {split.name}", done, total)

    name, bound = "sha256, ids and counts", "those of the manifest"
    with _caught(split, name, bound, lenient):
        split.scan = split.shards.check(keep, against, count)
        m = split.shards.manifest
        measured = f"{plural(m.shard_count, 'shard')}, {plural(m.total_tokens, 'token')}, {plural(m.total_documents, 'document')}"
        split.findings.append(Finding.of(name, True, measured, bound))


def _opened(shards: TokenShards) -> Finding:
    measured = f"tokenizer {shards.tokenizer_sha256[:12]}, {plural(shards.vocab_size, 'id')}"
    return Finding.of("manifest, sizes and tokenizer", True, measured, "those of the files")


def _end_of_text(shards: Shards, tokenizer: Tokenizer) -> Finding:
    """Compare the id that ends a document in the shards with the end of text of the tokenizer."""
    name, bound = "end of text", f"the tokenizer's, id {tokenizer.eos_id} {tokenizer.eos_token!r}"
    if shards.border_id is None:
        why = "documents follow each other without a sign"
        return Finding.of(name, None, "eos_policy none", bound, why)
    i = shards.border_id
    return Finding.of(name, i == tokenizer.eos_id, f"id {i} {tokenizer.decode([i])!r}", bound)


@contextmanager
def _caught(split: Split, name: str, bound: str, lenient: bool) -> Iterator[None]:
    """Turn an AprError of the block into a failed finding, if lenient."""
    try:
        yield
    except AprError as e:
        if not lenient:
            raise
        split.findings.append(Finding.of(name, False, str(e), bound))


def enforce_all(splits: list[Split]) -> None:
    """Raise Refused for the first failed finding."""
    enforce({split.folder: split.findings for split in splits})
