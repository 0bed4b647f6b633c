"""Open the data of a run: encode a corpus or conversations where needed, check every guard, cut windows."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..common.cache import in_cache
from ..common.errors import InputNotFound, Refused
from ..common.finding import as_json
from ..common.progress import Progress
from ..tokenizer.chat_template import ChatTemplate
from ..tokenizer.tokenizer import Tokenizer
from .accounts import accounted
from .audit import Split, audit, enforce_all, holds_examples, sides_of, tokenizer_beside
from .batches import Windows
from .conversations.answers import answers_kept
from .conversations.examples import open_conversations
from .conversations.packed import PackedShards
from .conversations.pairs import open_pairs
from .conversations.pairs_kept import pairs_kept
from .conversations.prepare import prepare_conversations
from .corpus import Corpus
from .find import find_sources
from .guards import Bounds, enforce, fits_model
from .hub_data import data_files
from .prepare import PreparedCorpus, prepare
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
    """

    tokenizer: Tokenizer
    train: Windows
    val: Windows
    corpus_name: str
    left_out: str
    document_end: int | None
    audit: list[Split]

    def describe(self) -> dict[str, Any]:
        """Identify the data, for the run's config.json."""
        train, val = self.train.shards, self.val.shards
        facts = {
            "corpus": self.corpus_name,
            "tokenizer_sha256": self.tokenizer.sha256,
            **facts_of(self.train, self.val),
        }
        return facts | ({"packed": train.facts, "packed_val": val.facts} if train.facts else {})

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
    if tokenizer is None and s.tokenizer:
        tokenizer = Tokenizer.from_file(s.tokenizer)
    conversations = s.instruct or s.preferences
    instruct = conversations or (s.dataset and holds_examples(sides_of(Path(s.dataset))["train"]))
    if instruct and init is None:
        raise Refused(f"{s.dataset}: instruction data fine-tunes a checkpoint: give it with --init")
    if tokenizer is None and init is not None and (instruct or s.corpus):
        tokenizer = init.tokenizer
        if tokenizer is None:
            raise Refused(f"{init.source}: no tokenizer in the checkpoint; give --tokenizer")
    if tokenizer is None and s.dataset:
        tokenizer = Tokenizer.from_file(tokenizer_beside(Path(s.dataset)))
    if tokenizer is not None:
        enforce({tokenizer.source: [fits_model(tokenizer, vocab_size)]})
    left_out, bounds, prepared, template = "", Bounds.parse(s.widen), None, None
    if s.corpus:
        prepared = _prepare_corpus(s, vocab_size, tokenizer, bounds, progress)
        tokenizer, folders, left_out = prepared.tokenizer, prepared.sides, prepared.left_out()
    elif conversations:
        assert tokenizer is not None
        assert init is not None
        template = init.template(s.chat_template)
        encoded_by = tokenizer, template, s.seq_length, s.val_fraction, progress, s.bos, s.map
        pairs = s.preferences is not None
        packed = in_cache(
            "instruct", lambda root: prepare_conversations(conversations, root, *encoded_by, pairs)
        )
        folders, left_out = packed.sides, packed.left_out()
    else:
        folders = sides_of(Path(str(s.dataset)))
        if s.val_dataset:
            given = Path(s.val_dataset)
            folders["val"] = given / "val" if (given / "val").is_dir() else given
    assert tokenizer is not None
    splits = audit(folders, tokenizer, bounds, vocab_size, progress=progress)
    if prepared:
        opened = {x.name: x.shards for x in splits if isinstance(x.shards, TokenShards)}
        found = accounted(
            _corpus(s), prepared.folder, opened, tokenizer, s.val_fraction, prepared.distinct, prepared.reused
        )
        splits[0].findings.append(found)
    if s.instruct:
        rows = {x.name: x.shards for x in splits if isinstance(x.shards, PackedShards)}
        splits[0].findings.append(
            answers_kept(open_conversations(s.instruct, s.map), rows, tokenizer, template)
        )
    if s.preferences:
        rows = {x.name: x.shards for x in splits if isinstance(x.shards, PackedShards)}
        splits[0].findings.append(pairs_kept(open_pairs(s.preferences, s.map), rows, tokenizer))
    enforce_all(splits)
    train, val = windows_of(s, splits)
    return OpenedData(
        tokenizer=tokenizer,
        train=train,
        val=val,
        corpus_name="this Python's standard library" if s.corpus == "stdlib" else _name(s),
        left_out=left_out,
        document_end=_document_end(s, tokenizer, train.shards, val.shards),
        audit=splits,
    )


def _name(s: DataSettings) -> str:
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
    for shards in (train, val):
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
    sources, piece_bytes = find_sources(data_files(str(s.corpus))), None
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
    """Cut windows to train on and to validate with; without validation shards the last windows of the training data."""
    windows = {split.name: Windows(split.shards, s.seq_length) for split in splits if split.shards}
    if "val" in windows:
        train, val = windows["train"], windows["val"]
        if bool(train.shards.masks) != bool(val.shards.masks):
            raise Refused(
                f"{train.shards.folder} and {val.shards.folder}: one holds packed examples, the other text; give both of a kind"
            )
        return train, val
    return windows["train"].split((s.val_batches or HELD_OUT_BATCHES) * s.batch_size)
