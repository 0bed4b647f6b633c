"""`apr tokenize train`: a byte-level BPE tokenizer from text, with the pre-tokenizer of GPT-4.

Example: apr tokenize train my_code/ notes.jsonl --vocab-size 32000 -o tok"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...common.atomic import try_folder
from ...common.errors import Refused
from ...common.options import json_option, option, parse
from ...common.units import plural
from ...data.corpus import Corpus
from ...data.documents import Sides, hashes_of
from ...data.hub_data import splits_note, train_sources
from ...data.source import Skipped
from ...tokenizer.training import train_tokenizer
from ..show import Show


@dataclass(frozen=True)
class Flags:
    """Options of `apr tokenize train`."""

    inputs: tuple[str, ...] = option(
        "files and folders: text, source code, JSONL, Parquet, hf://datasets/org/name[:split]; of a folder with splits, train",
        positional=True,
        path=True,
    )
    output: str = option(
        "folder to write the tokenizer to", "", needed=True, short="o", metavar="FOLDER", path=True
    )
    vocab_size: int = option(
        "ids in all, special tokens included; 256 bytes and those tokens to 200000", 32_000, metavar="IDS"
    )
    eos_token: str = option("the token that ends a document; '' for none", "<|endoftext|>")
    special_tokens: tuple[str, ...] = option(
        "one more special token, after the end of text; may be given again", (), metavar="TOKEN"
    )
    min_frequency: int = option(
        "how often a pair must occur to be merged", 2, at_least=0, below=1 << 63, metavar="TIMES"
    )
    normalization: str = option("applied to all text first", "none", choices=("none", "nfc"))
    val_fraction: float = option(
        "leave out the documents that encode-corpus holds out with this fraction, so that validation text is new to the "
        "tokenizer too",
        0.0,
        at_least=0,
        below=1,
    )
    content_field: str = option("key of the text in JSONL records and Parquet files", "text", metavar="KEY")
    separator: str | None = option("line that stands between the documents of a text file", metavar="LINE")
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code. Errors are raised."""
    f = parse(Flags, args, "apr tokenize train", __doc__ or "")
    if (Path(f.output) / "tokenizer.json").exists():
        raise Refused(f"{f.output}: holds a tokenizer; remove it, or choose another folder")
    try_folder(f.output)
    show = Show(quiet=f.json)
    start = time.perf_counter()
    corpus = Corpus(train_sources(*f.inputs), f.content_field, separator=f.separator)
    if note := splits_note(*f.inputs):
        show.note(note)
    texts = _Texts(corpus, f.val_fraction)
    try:
        tokenizer = train_tokenizer(
            iter(texts),
            f.vocab_size,
            f.output,
            eos_token=f.eos_token or None,
            special_tokens=f.special_tokens,
            min_frequency=f.min_frequency,
            normalization=f.normalization,
            progress=show.preparing,
        )
    except Refused as e:
        why = f"; the first that cannot be used: {texts.names[0]}" if texts.names else ""
        raise Refused(f"{e}{why}") from None
    finally:
        show.stop()
    result = {
        "folder": f.output,
        "vocab_size": tokenizer.vocab_size,
        "merges": tokenizer.merges,
        "eos_token_id": tokenizer.eos_id,
        "sha256": tokenizer.sha256,
        "documents": texts.documents,
        "text_bytes": texts.bytes,
        "skipped": texts.skipped,
        "seconds": time.perf_counter() - start,
    }
    if f.json:
        print(json.dumps(result, indent=2))
        return 0
    fewer = (
        ""
        if tokenizer.vocab_size == f.vocab_size
        else f" (asked for {f.vocab_size:,}: no more pairs occur {f.min_frequency} times)"
    )
    eos = "none" if tokenizer.eos_id is None else f"id {tokenizer.eos_id} {tokenizer.eos_token!r}"
    if f.separator is not None and not corpus.separators:
        show.note(f"note: no line of a text file is exactly {f.separator!r}: every file is one document")
    left_out = f"; {len(texts.names):,} left out, such as {texts.names[0]}" if texts.names else ""
    show.table(
        "apr tokenize train",
        [
            ("documents", f"{texts.documents:,}, {texts.bytes / 1e6:,.1f} MB of text{left_out}"),
            (
                "vocabulary",
                f"{plural(tokenizer.vocab_size, 'id')}, {plural(tokenizer.merges, 'merge')}{fewer}",
            ),
            ("end of text", eos),
            ("written to", f"{f.output} in {result['seconds']:.0f} s"),
        ],
    )
    return 0


class _Texts:
    """The texts of a corpus, a long document in chunks; counted."""

    def __init__(self, corpus: Corpus, val_fraction: float) -> None:
        self._corpus, self._val_fraction = corpus, val_fraction
        self.documents = self.bytes = 0
        self.skipped: dict[str, int] = {}
        self.names: list[str] = []

    def __iter__(self) -> Iterator[str]:
        fraction = self._val_fraction
        sides = Sides.of(hashes_of(self._corpus), fraction) if fraction else Sides(0)
        for item in self._corpus:
            if isinstance(item, Skipped):
                self.skipped[item.reason] = self.skipped.get(item.reason, 0) + 1
                self.names.append(f"{item.name}: {item.reason}")
                continue
            if sides.hold_out(item.sha256):
                continue
            self.documents += 1
            self.bytes += item.num_bytes
            yield from item.chunks()
