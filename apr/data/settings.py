"""Settings of a run that the data room reads: text or shards to train on, validation data, windows and batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..common.errors import UsageError
from ..common.options import exactly_one, option
from .mix_text import kinds_of, with_paths


def widen_option() -> Any:
    """Declare --widen."""
    return option(
        "bounds of plausibility of the data to widen, such as max_top_share=0.6,min_distinct=12",
        metavar="NAME=NUMBER",
    )


@dataclass(frozen=True)
class DataSettings:
    """Data: text or token shards, validation data, windows, batches."""

    corpus: str | None = option(
        "raw text to train on: a file or folder of text, source code, JSONL or Parquet, hf://datasets/org/name[:split], or "
        "'stdlib' for this Python's own standard library; tokenised once into a cache; a single text file is cut into about "
        "100 documents",
        metavar="PATH",
        path=True,
        names=("stdlib",),
    )
    dataset: str | None = option(
        "folder of token shards (or one with train/ and val/ inside)", metavar="FOLDER", path=True
    )
    instruct: str | None = option(
        "conversations or prompts with responses to fine-tune on, JSON Lines (also .gz, .zst), JSON, Parquet, a folder of those "
        "or hf://datasets/org/name[:split], with a loss on the answers only; see docs/fine-tuning.md",
        path=True,
    )
    preferences: str | None = option(
        "pairs of a chosen and a rejected answer to learn from, in the files that --instruct takes; see docs/preferences.md",
        path=True,
    )
    mix: str | None = option(
        "several sources, each with its share of the sequences, 'corpus=web/ weight=0.7; corpus=code/ weight=0.3', or with a "
        "budget over the run, tokens=2e6; corpus=, dataset= or instruct=; in a settings file a table [[mix]] for each; see "
        "docs/mixtures.md",
        metavar="SOURCES",
        inside=with_paths,
    )
    chat_template: str | None = option(
        "with --instruct or --preferences, file of the chat template (default: the checkpoint's own)",
        metavar="FILE",
        path=True,
    )
    map: str | None = option(
        "with --instruct or --preferences, keys of the file for ours, such as messages=dialog,role=speaker,content=text or "
        "prompt=question,response=answer",
        metavar="OURS=THEIRS",
    )
    content_field: str = option(
        "with --corpus, key of the text in JSONL records and Parquet files", "text", metavar="KEY"
    )
    tokenizer: str | None = option(
        "tokenizer folder; with --corpus and none given, one is trained", metavar="FOLDER", path=True
    )
    bos: str = option(
        "ids before each document of --corpus, and before each prompt of --instruct that no chat template writes: auto, those "
        "that the tokenizer itself puts before a text, as evaluation and generation do; none",
        "auto",
        choices=("auto", "none"),
    )
    val_dataset: str | None = option(
        "folder of token shards that training never sees", metavar="FOLDER", path=True
    )
    val_fraction: float = option("share of a corpus's documents that is held out", 0.05, at_least=0, below=1)
    val_batches: int | None = option(
        "evaluate on this many batches only; with --dataset alone, hold out that many (default there: 16)",
        at_least=1,
    )
    widen: str | None = widen_option()
    seq_length: int = option("tokens per sequence", 1024, above=0, metavar="TOKENS")
    batch_size: int = option("sequences per optimizer step", 16, above=0, metavar="SEQUENCES")
    shuffle: bool = option("windows in random order", True)
    mask_documents: bool = option(
        "attention stops where a document ends; without it, tokens see other documents of their window", False
    )
    on_exhausted: str = option("at the end of the data", "cycle", choices=("cycle", "stop"))
    seed: int = option("seed of initial weights and data order", 42, at_least=0)


def has_conversations(s: DataSettings) -> bool:
    """Tell data that the chat template writes: conversations, or pairs of preferences."""
    return bool(s.instruct or s.preferences) or "instruct" in kinds_of(s.mix)


def check_data(s: DataSettings) -> None:
    """Raise UsageError for settings of the data that contradict each other."""
    exactly_one(s, ("corpus", "dataset", "instruct", "preferences", "mix"), "what to train on")
    conversations = has_conversations(s)
    if s.chat_template and not conversations:
        raise UsageError("--chat-template goes with --instruct or --preferences; give both or none")
    if s.map and not conversations:
        raise UsageError(
            "--map goes with --instruct or --preferences; --content-field names the text of a corpus"
        )
    if s.mix and s.val_dataset:
        raise UsageError(
            "--val-dataset goes with --dataset; each source of --mix has its own validation side"
        )
    if s.bos != "auto" and (s.dataset or kinds_of(s.mix) == {"dataset"}):
        raise UsageError("--bos goes with --corpus or --instruct; token shards begin as they were encoded")
    if conversations and s.val_dataset:
        raise UsageError(
            "--val-dataset goes with --dataset; with --instruct or --preferences, give --val-fraction"
        )
    if (s.corpus or s.mix or conversations) and not s.val_fraction:
        raise UsageError("--val-fraction 0 leaves nothing to validate with; give a share above 0")
