"""Open the data of a run: encode a corpus or conversations where needed, check every guard, cut windows."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..common.cache import in_cache
from ..common.errors import InputNotFound, Refused
from ..common.finding import Finding, as_json
from ..common.progress import Progress
from ..tokenizer.chat_template import ChatTemplate
from ..tokenizer.tokenizer import Tokenizer
from .accounts import accounted
from .audit import Split, audit, enforce_all, holds_examples, named, sides_of, tokenizer_beside
from .batches import Windows, spread
from .conversations.answers import answers_kept
from .conversations.contexts import records_kept
from .conversations.examples import open_conversations
from .conversations.packed import PackedShards
from .conversations.pairs import open_pairs
from .conversations.pairs_kept import pairs_kept
from .conversations.prepare import prepare_conversations
from .corpus import Corpus
from .find import find_sources
from .guards import Bounds, enforce, fits_model
from .hub_data import splits_note, train_sources
from .mixed import MixedShards, counted
from .mixture import MixSource, sources_of
from .prepare import PreparedCorpus, prepare, tokenizer_of
from .settings import DataSettings
from .shards import Shards, TokenShards
from .source import Source

# A text file that is the whole corpus is cut into about 100 documents, or of this size where it is long.
MAX_PIECE_BYTES = 1 << 14
# Folders beside the library's own source.
NOT_STDLIB = ("site-packages", "dist-packages", "test", "tests", "idle_test")
# With --dataset alone, as many batches become the validation set.
HELD_OUT_BATCHES = 16


class TextOfCheckpoint(Protocol):
    """Text side of the checkpoint that a run starts from."""

    @property
    def source(self) -> str: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    def template(self, file: str | None = None) -> ChatTemplate | None: ...


@dataclass(frozen=True, kw_only=True)
class OpenedData:
    """Data of a run, checked.

    corpus_name   for people
    left_out      the documents that were skipped, or ""
    document_end  id at which attention stops, None where it does not
    audit         splits with the findings of their guards
    shares        of the sources of a mixture, by name
    """

    tokenizer: Tokenizer
    train: Windows
    val: Windows
    corpus_name: str
    left_out: str
    document_end: int | None
    audit: list[Split]
    shares: dict[str, float] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Identify the data, for the run's config.json."""
        train, val = self.train.shards, self.val.shards
        facts = {
            "corpus": self.corpus_name,
            "tokenizer_sha256": self.tokenizer.sha256,
            **facts_of(self.train, self.val),
        }
        facts |= {"packed": train.facts, "packed_val": val.facts} if train.facts else {}
        return facts | ({"mixture": mixture_facts(self.train, self.val, self.shares)} if self.shares else {})

    def guards(self) -> dict[str, list[dict[str, Any]]]:
        """List the findings of the guards of each split, for the run's config.json."""
        keys = {"guard": "name", "verdict": "verdict", "figure": "measured", "bound": "bound", "note": "why"}
        return {split.name: as_json(split.findings, **keys) for split in self.audit}


def facts_of(train: Windows, val: Windows) -> dict[str, Any]:
    """Identify and count windows to train on and to validate with."""
    return {
        "train_sha256": train.shards.sha256,
        "val_sha256": val.shards.sha256,
        "train_tokens": train.shards.total_tokens,
        "val_tokens": val.shards.total_tokens,
        "val_bytes": val.shards.total_bytes,
        "train_windows": len(train),
        "val_windows": len(val),
        "val_unigram_entropy_nats": val.shards.unigram_entropy,
    }


def mixture_facts(train: Windows, val: Windows, shares: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Identify and count the windows of each source of a mixture, beside its share."""
    out = {}
    both = zip(train.shards.parts, train.sources, val.shards.parts, val.sources, strict=True)
    for (name, a), (*_, m), (_, b), (*_, n) in both:
        out[name] = {"share": shares[name], "train_sha256": a.sha256, "val_sha256": b.sha256}
        out[name] |= {
            "train_tokens": a.total_tokens,
            "val_tokens": b.total_tokens,
            "val_bytes": b.total_bytes,
        }
        out[name] |= {"train_windows": m, "val_windows": n}
    return out


def open_data(
    s: DataSettings,
    vocab_size: int,
    init: TextOfCheckpoint | None,
    progress: Progress | None = None,
    tokenizer: Tokenizer | None = None,
) -> OpenedData:
    """Open the data that the settings name, for a model of vocab_size ids.

    init: the checkpoint to start from, whose tokenizer and chat template are the default. tokenizer: takes the place of the
    one that the settings name. Raises AprError."""
    sources = sources_of(s)
    tokenizer = _tokenizer(s, sources, init, tokenizer)
    if tokenizer is not None:
        enforce({tokenizer.source: [fits_model(tokenizer, vocab_size)]})
    bounds = Bounds.parse(s.widen)
    if tokenizer is None and len(sources) > 1:
        corpora = [_corpus(x.settings) for x in sources]
        train_on_all = partial(tokenizer_of, corpora, vocab_size, s.val_fraction, progress)
        tokenizer = in_cache("tokenizers", lambda root: train_on_all(root))
    made = [_made(x.settings, vocab_size, tokenizer, init, bounds, progress) for x in sources]
    tokenizer = tokenizer or made[0].tokenizer
    folders = {
        named(x.name, side): folder
        for x, m in zip(sources, made, strict=True)
        for side, folder in m.folders.items()
    }
    splits = audit(folders, tokenizer, bounds, vocab_size, progress=progress)
    for x, m in zip(sources, made, strict=True):
        own = {split.side: split for split in splits if split.source == x.name}
        own["train"].findings += m.conserved({side: split.shards for side, split in own.items()})
    enforce_all(splits)
    train, val = windows_of(s, splits)
    return OpenedData(
        tokenizer=tokenizer,
        train=train,
        val=val,
        corpus_name=", ".join(_name(x.settings) for x in sources),
        left_out="\n".join(
            f"{x.name}: {note}" if x.name else note
            for x, m in zip(sources, made, strict=True)
            for note in (_splits_note(x), m.left_out)
            if note
        ),
        document_end=_document_end(s, tokenizer, train.shards, val.shards),
        audit=splits,
        shares={x.name: x.share for x in sources} if s.mix else {},
    )


def _splits_note(x: MixSource) -> str:
    """Say which files of a source are of other splits; of the word stdlib none, whatever folder has that name."""
    is_word = x.kind == "corpus" and x.path == "stdlib"
    return "" if x.kind == "dataset" or is_word else splits_note(x.path)


def _tokenizer(
    s: DataSettings,
    sources: Sequence[MixSource],
    init: TextOfCheckpoint | None,
    tokenizer: Tokenizer | None,
) -> Tokenizer | None:
    """Find the tokenizer of all sources; None where one is to be trained. Raises Refused."""
    if tokenizer is None and s.tokenizer:
        tokenizer = Tokenizer.from_file(s.tokenizer)
    datasets = [x.path for x in sources if x.kind == "dataset"]
    packed = [path for path in datasets if holds_examples(sides_of(Path(path))["train"])]
    instruct = packed or any(x.kind in ("instruct", "preferences") for x in sources)
    if instruct and init is None:
        raise Refused(
            f"{packed[0] if packed else None}: instruction data fine-tunes a checkpoint: give it with --init"
        )
    if tokenizer is None and init is not None and (instruct or any(x.kind == "corpus" for x in sources)):
        tokenizer = init.tokenizer
        if tokenizer is None:
            raise Refused(f"{init.source}: no tokenizer in the checkpoint; give --tokenizer")
    if tokenizer is None and datasets:
        tokenizer = Tokenizer.from_file(tokenizer_beside(Path(datasets[0])))
    return tokenizer


@dataclass(frozen=True)
class _Made:
    """One source, encoded: its folders by side, the documents that were skipped, and what compares its files with its shards."""

    tokenizer: Tokenizer
    folders: dict[str, Path]
    left_out: str = ""
    conserved: Callable[[dict[str, Shards | None]], list[Finding]] = lambda sides: []


def _made(
    s: DataSettings,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    init: TextOfCheckpoint | None,
    bounds: Bounds,
    progress: Progress | None,
) -> _Made:
    """Encode a source into the cache where it is not there, or find its shards."""
    if s.corpus:
        prepared = _prepare_corpus(s, vocab_size, tokenizer, bounds, progress)

        def documents(sides: dict[str, Shards | None]) -> list[Finding]:
            opened = {side: x for side, x in sides.items() if isinstance(x, TokenShards)}
            p = prepared
            return [
                accounted(_corpus(s), p.folder, opened, p.tokenizer, s.val_fraction, p.distinct, p.reused)
            ]

        return _Made(prepared.tokenizer, prepared.sides, prepared.left_out(), documents)
    assert tokenizer is not None
    if not (conversations := s.instruct or s.preferences):
        folders = sides_of(Path(str(s.dataset)))
        if s.val_dataset:
            given = Path(s.val_dataset)
            folders["val"] = given / "val" if (given / "val").is_dir() else given
        return _Made(tokenizer, folders)
    assert init is not None
    template, pairs = init.template(s.chat_template), s.preferences is not None
    encoded_by = tokenizer, template, s.seq_length, s.val_fraction, progress, s.bos, s.map
    packed = in_cache("instruct", lambda root: prepare_conversations(conversations, root, *encoded_by, pairs))

    def answers(sides: dict[str, Shards | None]) -> list[Finding]:
        rows = {side: x for side, x in sides.items() if isinstance(x, PackedShards)}
        if pairs:
            return [pairs_kept(open_pairs(conversations, s.map), rows, tokenizer, template)]
        found = open_conversations(conversations, s.map)
        return [check(found, rows, tokenizer, template) for check in (answers_kept, records_kept)]

    return _Made(tokenizer, packed.sides, packed.left_out(), answers)


def _name(s: DataSettings) -> str:
    if s.corpus == "stdlib":
        return "this Python's standard library"
    return s.corpus or s.instruct or s.preferences or str(Path(str(s.dataset)))


def _prepare_corpus(
    s: DataSettings,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    bounds: Bounds,
    progress: Progress | None,
) -> PreparedCorpus:
    """Encode raw text into the cache, or open the result of an earlier run."""
    make = partial(
        prepare,
        _corpus(s),
        vocab_size=None if tokenizer else vocab_size,
        tokenizer=tokenizer,
        val_fraction=s.val_fraction,
        bounds=bounds,
        progress=progress,
        in_cache=True,
        bos=s.bos,
    )
    return in_cache("corpora", lambda folder: make(out_dir=folder))


def _document_end(s: DataSettings, tokenizer: Tokenizer, train: Shards, val: Shards) -> int | None:
    """Return the id at which attention stops: that between packed examples, or with --mask-documents between documents.

    Raises Refused where no id ends a document."""
    if train.masks or not s.mask_documents:
        return train.border_id if train.masks else None
    end, source = tokenizer.eos_id, tokenizer.source
    if end is None:
        raise Refused(
            f"--mask-documents: {source} has no end-of-text id, so nothing says where a document ends; give a tokenizer with "
            "one, or leave the flag out"
        )
    for _, shards in [*train.parts, *val.parts]:
        used = shards.border_id
        if used != end:
            encoding = "eos_policy none" if used is None else f"end-of-text id {used}, {source} has {end}"
            raise Refused(
                f"--mask-documents: {shards.folder} was encoded with {encoding}, so nothing says where a document ends; encode "
                "the corpus again, or leave the flag out"
            )
    return end


def _corpus(s: DataSettings) -> Corpus:
    if s.corpus == "stdlib":
        return Corpus(_stdlib())
    sources, piece_bytes = train_sources(str(s.corpus)), None
    # A single document could not be split into two sides.
    if len(sources) == 1 and sources[0].kind == "text":
        piece_bytes = max(256, min(MAX_PIECE_BYTES, sources[0].size // 100))
    return Corpus(sources, s.content_field, piece_bytes)


def _stdlib() -> list[Source]:
    """Find the .py files of the running Python's standard library, about 10 MB, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = find_sources([root], NOT_STDLIB) if root.is_dir() else []
    code = [s for s in sources if s.path.suffix == ".py"]
    if not code:
        raise InputNotFound(
            f"{root}: this Python has no standard library in source form; give --corpus a folder of text"
        )
    return code


def windows_of(s: DataSettings, splits: list[Split]) -> tuple[Windows, Windows]:
    """Cut windows to train on and to validate with; without validation shards the last windows of the training data.

    Raises Refused: a source of a mixture without validation shards, or of which --val-batches evaluates nothing."""
    sides = {
        side: [split for split in splits if split.side == side and split.shards] for side in ("train", "val")
    }
    windows = {side: Windows(_as_one(found), s.seq_length) for side, found in sides.items() if found}
    if bare := {x.source: x for x in sides["train"]}.keys() - {x.source for x in sides["val"]} - {""}:
        folder = next(x.folder for x in sides["train"] if x.source in bare)
        raise Refused(
            f"{folder}: no validation side, and in a mixture each has its own; give a folder with train/ and val/ inside"
        )
    if "val" not in windows:
        return windows["train"].split((s.val_batches or HELD_OUT_BATCHES) * s.batch_size)
    train, val = windows["train"], windows["val"]
    if bool(train.shards.masks) != bool(val.shards.masks):
        raise Refused(
            f"{train.shards.folder} and {val.shards.folder}: one holds packed examples, the other text; give both of a kind"
        )
    most = s.val_batches and s.val_batches * s.batch_size
    seen = set(np.concatenate([val.source_of(x) for x in spread(val, val.count, most)]).tolist())
    if left := [name for k, (name, *_) in enumerate(val.sources) if k not in seen]:
        raise Refused(f"--val-batches {s.val_batches}: no window of {left[0]} is evaluated; give more")
    return train, val


def _as_one(splits: list[Split]) -> Shards:
    """Put the shards of one side of all sources together."""
    found = [(split.source, split.shards, split.scan) for split in splits if split.shards]
    if len(found) == 1:
        return found[0][1]
    counts = [counted(x) if x.row_tokens else scan.counts if scan else None for _, x, scan in found]
    return MixedShards([(name, shards) for name, shards, _ in found], counts)
