"""How fast is encode-corpus beside the bare library on the same cores, how much memory does it take, and how fast are
batches read?

    python tools/bench_tokenize.py --tokenizer TOK FOLDER...            at least 100 MB of text
    python tools/bench_tokenize.py --tokenizer TOK --record bench/tokenize.json --text "what it is" FOLDER...

The three ways take turns, each in a process of its own, so that its peak memory is its own:
  encode_corpus       everything: read, hash, drop copies, encode, look, hash and write shards
  encode_batch        of the tokenizers library, on the same documents, which are in memory already, in batches of 1 MiB
  encode_batch_fast   the same without offsets, which is what encode_corpus calls
The time to load Python and the tokenizer counts for none of them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from apr.common.provenance import circumstances
from apr.data.batches import BATCHES_AHEAD, Batches, Windows
from apr.data.corpus import Corpus
from apr.data.encode import encode_corpus
from apr.data.find import find_sources
from apr.data.seen import Seen
from apr.data.shards import TokenShards
from apr.data.source import Skipped
from apr.tokenizer.tokenizer import Tokenizer

BARE_BATCH = 1 << 20  # characters that the bare library gets at once
WAYS = ("encode_corpus", "encode_batch", "encode_batch_fast")


def measure(way: str, tokenizer_dir: str, inputs: list[str]) -> dict[str, Any]:
    """Seconds, bytes of text, tokens and peak memory of one way, in this process."""
    tokenizer = Tokenizer.from_file(tokenizer_dir)
    corpus = Corpus(find_sources(inputs))
    if way == "encode_corpus":
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
            start = time.perf_counter()
            made = encode_corpus(corpus, tokenizer, folder)
            seconds = time.perf_counter() - start
            found = dict(
                seconds=seconds, tokens=made.counts.tokens, bytes=made.counts.text_bytes, peak_mib=peak()
            )
            return {**found, **read_batches(Path(folder) / "train", tokenizer)}
    texts, size, seen = [], 0, Seen()
    for item in corpus:
        if not isinstance(item, Skipped) and seen.add(item.sha256):
            text = "".join(item.chunks())
            texts.append(text)
            size += len(text.encode())
    call, held, length, tokens = getattr(tokenizer._engine, way), [], 0, 0
    tokenizer.encode("a first text starts the library's threads")
    start = time.perf_counter()
    for i, text in enumerate(texts):
        held.append(text)
        length += len(text)
        if length >= BARE_BATCH or i == len(texts) - 1:
            tokens += sum(map(len, call(held, add_special_tokens=False)))
            held, length = [], 0
    return dict(seconds=time.perf_counter() - start, tokens=tokens, bytes=size, peak_mib=peak())


def peak() -> float:
    """MiB that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read_batches(folder: Path, tokenizer: Tokenizer, batch: int = 16, seq: int = 2048) -> dict[str, float]:
    """Milliseconds that a batch takes to read, and that a loop waits for it when a step takes 20 ms."""
    windows = Windows(TokenShards(folder, tokenizer, verify=False), seq)
    stream = Batches(windows, batch, seed=1)
    drawn, waited = [], []
    for i in range(100):
        start = time.perf_counter()
        stream._draw(batch * i)
        drawn.append(time.perf_counter() - start)
    for _ in range(100):
        start = time.perf_counter()
        stream.next()
        waited.append(time.perf_counter() - start)
        time.sleep(0.02)
    return {
        "read_ms": 1e3 * float(np.median(drawn)),
        "wait_ms": 1e3 * float(np.median(waited[BATCHES_AHEAD:])),
    }


def main() -> None:
    """Measure, print, and with --record add to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record")
    parser.add_argument("--text", default="", help="what the text is, for the record")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.tokenizer, args.inputs)))
        return
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--tokenizer", args.tokenizer, *args.inputs]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[way].append(json.loads(out))
    rows = {}
    for way, runs in found.items():
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rows[way] = {"mb_per_sec": median["bytes"] / 1e6 / median["seconds"], **median}
        print(
            f"{way:18} {rows[way]['mb_per_sec']:7.2f} MB/s  {median['seconds']:7.1f} s  peak {median['peak_mib']:6.0f} MiB"
        )
    whole = rows["encode_corpus"]
    print(f"{whole['bytes'] / 1e6:.1f} MB of text, {whole['tokens'] / 1e6:.1f} M tokens")
    print(f"encode_corpus is {whole['mb_per_sec'] / rows['encode_batch']['mb_per_sec']:.2f} of encode_batch, "
          f"{whole['mb_per_sec'] / rows['encode_batch_fast']['mb_per_sec']:.2f} of encode_batch_fast")  # fmt: skip
    print(
        f"a batch of 16 x 2048 takes {whole['read_ms']:.3f} ms to read, a loop waits {whole['wait_ms']:.3f} ms for it"
    )
    if args.record:
        path = Path(args.record)
        records = json.loads(path.read_text()) if path.exists() else []
        records.append(
            {
                **circumstances(),
                "text": args.text,
                "rounds": args.rounds,
                "results": {w: {k: round(v, 4) for k, v in row.items()} for w, row in rows.items()},
            }
        )
        path.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
