"""`apr tokenize encode-corpus`: text, source code, JSONL and Parquet to token shards.

Example: apr tokenize encode-corpus my_code/ web.jsonl.zst --tokenizer tok -o shards --val-fraction 0.01"""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ...common.errors import Interrupted, UsageError
from ...common.files import real
from ...common.options import json_option, option, parse
from ...common.rounding import ceil_div
from ...common.shell import word
from ...common.units import plural
from ...data.corpus import Corpus
from ...data.encode import Counts, EncodedCorpus, encode_corpus
from ...data.encode_folder import RECORD, SKIPPED
from ...data.estimate import Estimate, estimate
from ...data.find import Sources
from ...data.guards import Bounds
from ...data.hub_data import splits_note, train_sources
from ...data.manifest import EOS_POLICIES
from ...data.settings import widen_option
from ...tokenizer.tokenizer import Tokenizer
from ..show import Show
from .show import EncodeProgress, clock


@dataclass(frozen=True)
class Flags:
    """Options of `apr tokenize encode-corpus`."""

    inputs: tuple[str, ...] = option(
        "files and folders: text, source code, .jsonl and text also as .gz .zst .xz .bz2, .parquet, "
        "hf://datasets/org/name[:split]; of a folder with splits, train",
        positional=True,
        path=True,
    )
    tokenizer: str = option("tokenizer folder or tokenizer.json", "", needed=True, path=True)
    output: str = option(
        "folder to write train/, val/ and tokenizer/ to", "", short="o", metavar="FOLDER", path=True
    )
    val_fraction: float = option(
        "share of the documents, by content hash, that goes to val/; 0: no val/", 0.01, at_least=0, below=1
    )
    eos_policy: str = option(
        "an end-of-text id after each document, between two, or none", "after", choices=EOS_POLICIES
    )
    bos: str = option(
        "ids before each document: auto, those that the tokenizer itself puts before a text, as evaluation and generation do; "
        "none",
        "auto",
        choices=("auto", "none"),
    )
    content_field: str = option(
        "key of the text in JSONL records (a.b for one inside another) and Parquet files",
        "text",
        metavar="KEY",
    )
    separator: str | None = option("line that stands between the documents of a text file", metavar="LINE")
    piece_bytes: int | None = option(
        "cut text files into documents of about this size, at blank lines", at_least=1
    )
    shard_tokens: int = option("ids per shard", 10_000_000, at_least=1)
    workers: int | None = option(
        "threads that encode (default: all cores); the output is the same for any number",
        at_least=1,
        metavar="THREADS",
    )
    resume: bool = option("go on with an encoding that was stopped, to the same bytes", False)
    estimate_only: bool = option(
        "read a sample and estimate documents, tokens, bytes and time of the whole; write nothing", False
    )
    widen: str | None = widen_option()
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code. Errors are raised."""
    f = parse(Flags, args, "apr tokenize encode-corpus", __doc__ or "")
    if not f.output and not f.estimate_only:
        raise UsageError(
            "--output or -o is needed: folder to write train/, val/ and tokenizer/ to; --help has an example"
        )
    bounds = Bounds.parse(f.widen)
    show = Show(quiet=f.json)
    tokenizer = Tokenizer.from_file(f.tokenizer)
    found = train_sources(*f.inputs)
    if note := splits_note(*f.inputs):
        show.note(note)
    if left_out := found.summary():
        show.note(f"left out: {left_out}")
    if f.output:
        _apart(f)
    if f.resume and not (Path(f.output) / RECORD).is_file():
        show.note(f"nothing to resume in {f.output}: encoding from the beginning")
    corpus = Corpus(found, f.content_field, f.piece_bytes, f.separator)
    if f.estimate_only:
        return _estimate(f, found, tokenizer, show)
    progress, stop = EncodeProgress(show), _Stop()

    def hear(counts: Counts, read: int, total: int) -> None:
        progress(counts, read, total)
        # Between two batches no file is half written.
        if stop.asked:
            raise KeyboardInterrupt

    try:
        with stop:
            encoded = encode_corpus(
                corpus,
                tokenizer,
                f.output,
                val_fraction=f.val_fraction,
                eos_policy=f.eos_policy,
                bos=f.bos,
                shard_tokens=f.shard_tokens,
                bounds=bounds,
                made=described(f),
                resume=f.resume,
                workers=f.workers,
                progress=hear,
            )
    except KeyboardInterrupt:
        again = shlex.join(["apr", "tokenize", "encode-corpus", *args, *([] if f.resume else ["--resume"])])
        raise Interrupted(f"stopped; whole shards are kept. Go on with: {again}") from None
    finally:
        seconds = progress.stop()
    if f.separator is not None and not corpus.separators:
        show.note(f"note: no line of a text file is exactly {f.separator!r}: every file is one document")
    result = _result(encoded, seconds)
    if f.json:
        print(json.dumps(result, indent=2))
    else:
        _print(show, f, encoded, seconds)
    return 0


class _Stop:
    """Context in which Ctrl-C and SIGTERM ask for a stop after the batch; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Stop:
        self._old = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for n, handler in self._old.items():
            signal.signal(n, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def described(f: Flags) -> dict[str, Any]:
    """List the options that decide on the documents, for the manifests."""
    return {
        "inputs": list(f.inputs),
        "content_field": f.content_field,
        "separator": f.separator,
        "piece_bytes": f.piece_bytes,
    }


def _apart(f: Flags) -> None:
    """Raise UsageError where the output would lie among the input, or over a tokenizer."""
    out = real(f.output)
    for given in f.inputs:
        folder = real(given)
        if folder.is_dir() and out.is_relative_to(folder):
            raise UsageError(
                f"-o {f.output} lies in {given}, which is read: the next encoding would read it too; choose another"
            )
    if (out / "tokenizer.json").exists():
        raise UsageError(f"-o {f.output} holds a tokenizer; choose another folder for the shards")


def _estimate(f: Flags, found: Sources, tokenizer: Tokenizer, show: Show) -> int:
    e: Estimate = estimate(found, tokenizer, f.content_field, f.piece_bytes, f.separator)
    if f.json:
        print(json.dumps(asdict(e), indent=2))
        return 0
    shards = ceil_div(e.tokens, f.shard_tokens)
    show.table(
        "estimate",
        [
            ("sample", f"the beginnings of files: {plural(e.sample_documents, 'document')}, "
            f"{e.sample_bytes / 1e6:.3g} MB of text"),
            ("", f"{e.sample_skipped:,} that cannot be used"),
            ("corpus", f"{plural(e.files, 'file')}, {e.disk_bytes / 1e6:,.1f} MB on disk, {e.text_bytes / 1e6:,.1f} MB of text"),
            ("documents", f"about {e.documents:,}"),
            ("tokens", f"about {e.tokens / 1e6:,.3g} M ({e.bytes_per_token:.2f} bytes/token), copies not yet dropped"),
            ("shards", f"about {shards:,}, {4 * e.tokens / 1e9:,.3g} GB"),
            ("time", f"about {clock(e.seconds)} at {e.sample_bytes / 1e6 / max(e.sample_seconds, 1e-9):.1f} MB/s"),
        ],
    )  # fmt: skip
    return 0


def _result(e: EncodedCorpus, seconds: float) -> dict[str, Any]:
    sides = {"train": e.train} | ({"val": e.val} if e.val else {})
    return {
        "folder": str(e.folder),
        "counts": asdict(e.counts),
        "seconds": seconds,
        **{
            name: {
                k: getattr(m, k)
                for k in ("total_documents", "total_tokens", "total_bytes", "shard_count", "audit")
            }
            for name, m in sides.items()
        },
    }


def _print(show: Show, f: Flags, e: EncodedCorpus, seconds: float) -> None:
    c = e.counts
    rows = []
    for name, m in (("train", e.train), ("val", e.val)):
        if m:
            rows.append(
                (
                    name,
                    f"{plural(m.total_documents, 'document')}, {plural(m.total_tokens, 'token')} in "
                    f"{plural(m.shard_count, 'shard')}",
                )
            )
            a = m.audit
            ids = f"{plural(a['distinct_ids'], 'distinct id')}, entropy {a['unigram_entropy_nats']:.3f} nats/token"
            rows.append(("", f"{a['bytes_per_token']:.2f} bytes/token, {ids}"))
    skipped = ", ".join(f"{n:,} {reason}" for reason, n in sorted(c.skipped.items())) or "none"
    resumed = ", what was there already only read" if f.resume else ""
    norm = e.train.normalization
    normalized = "" if norm == "none" else f" after the tokenizer's normalization ({norm})"
    listed = f" (listed in {e.folder / SKIPPED})" if c.skipped else ""
    if before := e.train.made.get("bos_ids"):
        tokens = Tokenizer.from_file(f.tokenizer).decode(before)
        rows.append(("begins a document", f"{tokens} {before}, as it begins a text (--bos none: nothing)"))
    rows += [
        ("copies dropped", f"{c.duplicates:,}"),
        ("skipped", skipped + listed),
        ("decoded again", f"{plural(c.round_trips, 'document')}, each its own text{normalized}"),
        (
            "speed",
            f"{c.text_bytes / 1e6:,.1f} MB of text in {seconds:.1f} s, {c.text_bytes / 1e6 / seconds:.1f} MB/s{resumed}",
        ),
        ("train with", f"apr pretrain --dataset {word(e.folder)} --model PRESET"),
    ]
    show.table("apr tokenize encode-corpus", rows)
