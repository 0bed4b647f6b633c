"""Rebuild a manifest from the shards themselves."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..common.atomic import write_json
from ..common.errors import InputNotFound, MalformedFile
from ..common.host import cores
from ..common.units import plural
from ..tokenizer.tokenizer import Tokenizer
from .manifest import MANIFEST, ShardManifest, figures, shard_name
from .scan import scan
from .shards import mapped, our_files

# Decoded at once.
DECODE_TOKENS = 1 << 16


def repair_manifest(
    folder: str | Path, tokenizer: Tokenizer, progress: Callable[[int], None] | None = None
) -> ShardManifest:
    """Write DIR/manifest.json from DIR/shard-*.bin; the same shards give the same manifest.

    EOS policy: "after" when the last token is the end-of-text id, "between" when that id only stands further inside,
    "none" without any. Facts that the shards do not hold are null: the hash of the corpus, and the documents that are
    whole at the end of a shard. Raises InputNotFound, MalformedFile (a gap in the names, a size that is no whole number
    of ids, an id outside the vocabulary)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputNotFound(f"{folder}: no such folder")
    paths = [p for p in our_files(folder) if p.name != MANIFEST]
    if not paths:
        below = ", ".join(str(folder / side) for side in ("train", "val") if (folder / side).is_dir())
        raise InputNotFound(
            f"{folder}: holds no shard-00000.bin" + (f"; give one of {below}" if below else "")
        )
    for i, path in enumerate(paths):
        if not os.path.isfile(path):
            raise MalformedFile(f"{path}: is not a file; remove it, or put the shard in its place")
        size = path.stat().st_size
        if path.name != shard_name(i):
            raise MalformedFile(f"{folder / shard_name(i)}: missing; the next shard is {path.name}")
        if size == 0 or size % 4:
            raise MalformedFile(
                f"{path}: a size of {plural(size, 'byte')} is no whole number of 4-byte ids: it was cut off; "
                f"remove it when it is the last "
                "one, or restore it"
            )
    arrays = [mapped(p) for p in paths]
    eos = tokenizer.eos_id
    scanned = scan(arrays, tokenizer.vocab_size, eos, threads=cores(), progress=progress)
    if scanned.outside:
        index, position, i = scanned.outside
        raise MalformedFile(
            f"{paths[index]}: token {position} has id {i}, {tokenizer.source} has {plural(tokenizer.vocab_size, 'id')}: another "
            "tokenizer made it"
        )
    policy = "none" if not scanned.ends else "after" if arrays[-1][-1] == eos else "between"
    size = text_bytes(arrays, scanned.counts, tokenizer)
    rows = [
        dict(name=p.name, tokens=a.size, sha256=sha, documents=None, partial=None, corpus_sha256=None)
        for p, a, sha in zip(paths, arrays, scanned.sha256, strict=True)
    ]
    manifest = ShardManifest(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_policy=policy,
        eos_token_id=eos,
        normalization=tokenizer.normalization,
        shard_count=len(rows),
        total_tokens=sum(a.size for a in arrays),
        total_documents=max(1, scanned.ends + (policy == "between")),
        total_bytes=size,
        shards=rows,
        audit=figures(scanned.counts, size, tokenizer.unknown_id),
        made={"repaired": True}
        | ({"bos_ids": list(tokenizer.prefix_ids)} if _begun(arrays, tokenizer) else {}),
        complete=True,
    )
    write_json(folder / MANIFEST, asdict(manifest))
    return manifest


def _begun(arrays: list[np.ndarray], tokenizer: Tokenizer) -> bool:
    """True where the tokenizer's prefix_ids stand before each document, as far as it begins and ends in one shard."""
    prefix, eos = np.array(tokenizer.prefix_ids, np.uint32), tokenizer.eos_id
    if not prefix.size:
        return False
    starts = [(a, int(at) + 1) for a in arrays for at in np.flatnonzero(a == eos)] if eos is not None else []
    begun = [a[at : at + prefix.size] for a, at in [(arrays[0], 0), *starts] if at + prefix.size <= a.size]
    return bool(begun) and all(np.array_equal(x, prefix) for x in begun)


def text_bytes(arrays: list[np.ndarray], counts: np.ndarray, tokenizer: Tokenizer) -> int:
    """Count the bytes of UTF-8 of the text that ids stand for, special tokens left out.

    A byte-level id stands for the same bytes everywhere; other ids are decoded, DECODE_TOKENS at a time."""
    table = tokenizer.token_bytes()
    if table is not None:
        return max(1, int((counts * table).sum()))
    total = 0
    for array in arrays:
        for start in range(0, array.size, DECODE_TOKENS):
            total += len(tokenizer.decode(array[start : start + DECODE_TOKENS], skip_special=True).encode())
    return max(1, total)
