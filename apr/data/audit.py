"""Everything that can be said of a folder of token shards, as verdicts: for `apr tokenize audit` and before training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..common.errors import AprError, InputNotFound
from ..tokenizer.tokenizer import Tokenizer
from .guards import USUAL, Bounds, Verdict, disjoint, enforce, fits_model, plausible, round_trip
from .scan import Scan
from .shards import TokenShards

Progress = Callable[[str, int, int], None]  # what is being done, tokens done, tokens in all


@dataclass
class Side:
    """One folder of shards: what was found, and the answers of the guards. shards is None where it cannot be opened."""

    name: str
    folder: Path
    shards: TokenShards | None = None
    scan: Scan | None = None
    verdicts: list[Verdict] = field(default_factory=list)


def sides_of(folder: Path) -> dict[str, Path]:
    """{"train": ..., "val": ...} of a folder that holds those two, {"train": ...} of one that holds shards itself."""
    if (folder / "train").is_dir():
        val = folder / "val"
        return {"train": folder / "train"} | ({"val": val} if val.is_dir() else {})
    return {"train": folder}


def tokenizer_beside(folder: Path) -> Path:
    """Where `encode-corpus` puts the tokenizer of a folder of shards, or of the one that holds train/ and val/."""
    inside, beside = folder / "tokenizer", folder.parent / "tokenizer"
    return beside if beside.is_dir() and not inside.is_dir() else inside


def tokenizer_of_shards(folder: Path, given: str | None) -> Tokenizer:
    """The tokenizer that made the shards of a folder: `given`, or the one beside them. Raises InputNotFound."""
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
) -> list[Side]:
    """Read all shards of "train" and, where there is one, "val", and ask every guard.

    lenient: what cannot be opened or differs from its manifest becomes a verdict that failed, instead of the error
    that it is otherwise (InputNotFound, MalformedFile, Refused)."""
    sides = {name: Side(name, folder) for name, folder in folders.items()}
    for side in sides.values():
        with _Caught(side, "manifest, sizes and tokenizer", "those of the files", lenient):
            side.shards = TokenShards(side.folder, tokenizer, verify=False)
            side.verdicts.append(_opened(side.shards))
    val = sides.get("val")
    for name in ("val", "train"):  # val first: its documents are looked up among those of train
        if name in sides and sides[name].shards is not None:
            _read(
                sides[name],
                val.scan if val and name == "train" else None,
                keep=name == "val",
                lenient=lenient,
                progress=progress,
            )
    for side in sides.values():
        if side.shards is None or side.scan is None:
            continue
        side.verdicts.append(_end_of_text(side.shards, tokenizer))
        side.verdicts += plausible(side.scan.counts, side.shards.total_bytes, tokenizer, bounds)
        side.verdicts.append(round_trip(side.shards, tokenizer))
        if model_vocab is not None:
            side.verdicts.append(fits_model(tokenizer, model_vocab))
    train = sides["train"]
    if val and val.scan and val.shards and train.scan and train.shards:
        train.verdicts.append(disjoint(train.scan.shared, train.shards, val.shards))
    return list(sides.values())


def _read(side: Side, other: Scan | None, keep: bool, lenient: bool, progress: Progress | None) -> None:
    assert side.shards is not None
    total, done = side.shards.total_tokens, 0

    def hear(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress:
            progress(f"verify {side.name}", done, total)

    with _Caught(side, "sha256, ids and counts", "those of the manifest", lenient):
        side.scan = side.shards.check(keep, other.identities if other else None, hear)
        m = side.shards.manifest
        figure = f"{m.shard_count:,} shards, {m.total_tokens:,} tokens, {m.total_documents:,} documents"
        side.verdicts.append(Verdict("sha256, ids and counts", True, figure, "those of the manifest"))


def _opened(shards: TokenShards) -> Verdict:
    figure = f"tokenizer {shards.tokenizer_sha256[:12]}, {shards.vocab_size:,} ids"
    return Verdict("manifest, sizes and tokenizer", True, figure, "those of the files")


def _end_of_text(shards: TokenShards, tokenizer: Tokenizer) -> Verdict:
    """Whether what ends a document in the shards is what the tokenizer calls the end of a text."""
    guard, bound = "end of text", f"the tokenizer's, id {tokenizer.eos_id} {tokenizer.eos_token!r}"
    if shards.border_id is None:
        return Verdict(guard, None, "eos_policy none", bound, "documents follow each other without a sign")
    i = shards.border_id
    figure = f"id {i} {tokenizer.decode([i])!r}"
    return Verdict(guard, i == tokenizer.eos_id, figure, bound)


class _Caught:
    """Makes an error of its block a verdict, where that is wanted."""

    def __init__(self, side: Side, guard: str, bound: str, lenient: bool) -> None:
        self.side, self.guard, self.bound, self.lenient = side, guard, bound, lenient

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not self.lenient or not isinstance(error, AprError):
            return False
        self.side.verdicts.append(Verdict(self.guard, False, str(error), self.bound))
        return True


def enforce_all(sides: list[Side]) -> None:
    """Raises Refused at the first verdict that failed."""
    enforce({side.folder: side.verdicts for side in sides})
