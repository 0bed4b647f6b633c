"""What the tests of the data path share: small documents, shards of them, windows of known ids."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from apr.data.batches import Windows
from apr.data.documents import Document, LongDocument
from apr.data.shard_writer import ShardWriter
from apr.data.shards import TokenShards
from apr.data.source import Skipped
from apr.tokenizer.tokenizer import Tokenizer

CODE = 'def f(x):\n    if x:\n        return "%d" % x\n\n    return None  # 1234567 \u00e9\u4e2d\U0001f600\n'
WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "return",
    "self",
    "None",
    "import",
    "\u00e9t\u00e9",
    "\u4e2d\u6587",
]


def corpus(n: int = 40, seed: int = 5) -> list[Document]:
    """Small documents of varied length, some of them non-ASCII."""
    rng = random.Random(seed)
    return [
        Document(f"d{i}", f"# {i} {seed}\n" + CODE + " ".join(rng.choices(WORDS, k=5 + 7 * i)))
        for i in range(n)
    ]


class Memory:
    """A corpus of documents that are there already, as encode_corpus and prepare read one."""

    def __init__(self, items: Iterable[Document | LongDocument | Skipped]) -> None:
        self.items = list(items)
        self.bytes_read = self.total_bytes = len(self.items)

    def __iter__(self) -> Iterator[Document | LongDocument | Skipped]:
        return iter(self.items)

    def __str__(self) -> str:
        return "memory"


def put(writer: ShardWriter, tok: Tokenizer, docs: Iterable[Document]) -> None:
    """Offer documents to a writer."""
    for number, d in enumerate(docs, writer.total_documents):
        writer.begin(d.sha256, len(d.data))
        if not writer.holds(number):
            writer.append(tok.encode(d.text))
        writer.end()


def write(
    folder: Path, tok: Tokenizer, docs: Iterable[Document], shard_tokens: int = 1000, eos: str = "after"
) -> Path:
    with ShardWriter(folder, tok, shard_tokens, eos) as writer:
        put(writer, tok, docs)
    return folder


def windows_of(
    tmp_path: Path, tok: Tokenizer, count: int, t: int = 4, shard_tokens: int = 1 << 20
) -> Windows:
    """`count` windows of known ids: the token at position i of the corpus is i % 300."""
    folder = tmp_path / f"w{count}-{shard_tokens}"
    with ShardWriter(folder, tok, shard_tokens, "none") as writer:
        writer.begin(hashlib.sha256(b"").hexdigest(), 1)
        writer.append((np.arange(count * t + 1) % 300).astype(np.uint32))
        writer.end()
    return Windows(TokenShards(folder), t)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name there."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object in a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_shard_row(folder: Path, **changes: Any) -> None:
    """Change the first row of `shards` in a manifest."""
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[0].update(changes)
    edit_json(folder / "manifest.json", shards=shards)


def rewrite(folder: Path, edit: Callable[[np.ndarray], Any]) -> None:
    """Change the ids of the first shard, with a manifest whose hash agrees with the file."""
    path = folder / "shard-00000.bin"
    ids = np.fromfile(path, dtype="<u4")
    edit(ids)
    path.write_bytes(ids.tobytes())
    edit_shard_row(folder, sha256=hashlib.sha256(ids.tobytes()).hexdigest())


def flip_byte(folder: Path, name: str = "shard-00001.bin") -> None:
    """Change one bit of a shard."""
    data = bytearray((folder / name).read_bytes())
    data[100] ^= 1
    (folder / name).write_bytes(data)
