"""manifest.json of a folder of token shards: names, sizes and hashes of the shards, figures, producer."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from ..common.errors import MalformedFile
from ..common.files import read_json
from ..common.version import __version__
from ..tokenizer.vocab_format import MAX_IDS

FORMAT = "apr-shards-2"
MANIFEST = "manifest.json"
# An EOS after each document, only between two, or nowhere.
EOS_POLICIES = ("after", "between", "none")
SHARD_KEYS = {"name", "tokens", "sha256", "documents", "partial", "corpus_sha256"}
FIGURES = {
    "distinct_ids",
    "unigram_entropy_nats",
    "top_id",
    "top_id_share",
    "bytes_per_token",
    "unknown_tokens",
}
# Bounds the tables of counts that a hostile manifest could ask for.
MAX_VOCAB = MAX_IDS


@dataclass
class ShardManifest:
    """manifest.json of one folder of shards.

    shards         name, tokens, sha256 of each; and for resuming, at its end: `documents` that are whole, `partial`
                   tokens of the next one, `corpus_sha256` of the whole ones
    corpus_sha256  of the documents' sha256, in order; null in a manifest rebuilt from shards
    total_bytes    UTF-8 bytes of the text as it was read; in a rebuilt manifest, of the text that the tokens stand for
    complete       false until every document is written
    made           inputs, side of the split, settings of the encoding
    """

    tokenizer_sha256: str
    vocab_size: int
    eos_policy: str
    eos_token_id: int | None
    normalization: str
    corpus_sha256: str | None = None
    shard_count: int = 0
    total_tokens: int = 0
    total_documents: int = 0
    total_bytes: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    audit: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    producer: str = f"apr {__version__}, tokenizers {tokenizers.__version__}"
    format: str = FORMAT


def figures(counts: np.ndarray, total_bytes: int, unknown_id: int | None) -> dict[str, Any]:
    """Summary statistics of token counts (V,) int64: distinct ids, unigram entropy (nats/token), most frequent id and its
    share, bytes/token, unknown tokens."""
    total = int(counts.sum())
    p = counts[counts > 0] / total
    top = int(counts.argmax())
    return {
        "distinct_ids": int(p.size),
        "unigram_entropy_nats": float(max(0.0, -(p * np.log(p)).sum())),
        "top_id": top,
        "top_id_share": float(counts[top] / total),
        "bytes_per_token": total_bytes / total,
        "unknown_tokens": 0 if unknown_id is None else int(counts[unknown_id]),
    }


def shard_name(index: int) -> str:
    """Name a shard; lexical order is numerical order."""
    return f"shard-{index:05d}.bin"


def read_manifest(path: Path, whole: bool = True) -> ShardManifest:
    """Read manifest.json of a shard folder and check every field against the others.

    whole: encoding must have finished. Raises MalformedFile."""
    try:
        d = read_json(path)
    except MalformedFile as e:
        raise MalformedFile(f"{e}; apr tokenize repair-manifest makes a new one of the shards") from None
    if not isinstance(d, dict) or d.get("format") != FORMAT:
        found = d.get("format") if isinstance(d, dict) else type(d).__name__
        raise MalformedFile(
            f"{path}: format = {found!r}, not {FORMAT!r}; encode the corpus again, or rebuild the manifest from the "
            "shards: apr tokenize repair-manifest"
        )
    fields = set(ShardManifest.__dataclass_fields__)
    if set(d) != fields:
        raise MalformedFile(
            f"{path}: missing keys {sorted(fields - set(d))}, unknown keys {sorted(set(d) - fields)}"
        )
    if whole and d["complete"] is not True:
        raise MalformedFile(
            f"{path}: complete = {d['complete']!r}: encoding did not finish; go on with the same command and --resume"
        )
    lowest = 1 if whole else 0
    for key in ("shard_count", "total_tokens", "total_documents", "total_bytes", "vocab_size"):
        least, most = (1, MAX_VOCAB) if key == "vocab_size" else (lowest, 1 << 62)
        _check_int(path, key, d[key], least, most)
    _check_sha(path, "tokenizer_sha256", d["tokenizer_sha256"])
    if d["corpus_sha256"] is not None:
        _check_sha(path, "corpus_sha256", d["corpus_sha256"])
    if d["eos_policy"] not in EOS_POLICIES:
        raise MalformedFile(
            f"{path}: eos_policy = {d['eos_policy']!r} is not one of {', '.join(EOS_POLICIES)}"
        )
    if d["eos_token_id"] is not None or d["eos_policy"] != "none":
        _check_int(path, "eos_token_id", d["eos_token_id"], 0, d["vocab_size"] - 1)
    _check_shards(path, d)
    if d["total_tokens"]:
        _check_figures(path, d)
    return ShardManifest(**d)


def _check_figures(path: Path, d: dict[str, Any]) -> None:
    if not isinstance(d["audit"], dict) or set(d["audit"]) != FIGURES:
        raise MalformedFile(f"{path}: audit = {d['audit']!r} does not have the keys {sorted(FIGURES)}")
    for key in FIGURES:
        value = d["audit"][key]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise MalformedFile(f"{path}: audit.{key} = {value!r} is not a figure")
    same_figure(
        f"{path}: audit.bytes_per_token", d["audit"]["bytes_per_token"], d["total_bytes"] / d["total_tokens"]
    )


def _check_shards(path: Path, d: dict[str, Any]) -> None:
    shards = d["shards"]
    if not isinstance(shards, list) or len(shards) != d["shard_count"]:
        count = len(shards) if isinstance(shards, list) else repr(shards)
        raise MalformedFile(f"{path}: shard_count = {d['shard_count']}, shards lists {count}")
    for i, shard in enumerate(shards):
        if not isinstance(shard, dict) or set(shard) != SHARD_KEYS:
            raise MalformedFile(
                f"{path}: shards[{i}] = {shard!r} does not have the keys {sorted(SHARD_KEYS)}"
            )
        # Also refuses a path that leads out of the folder.
        if shard["name"] != shard_name(i):
            raise MalformedFile(f"{path}: shards[{i}].name = {shard['name']!r}, expected {shard_name(i)!r}")
        _check_int(path, f"shards[{i}].tokens", shard["tokens"], 1, 1 << 60)
        _check_sha(path, f"shards[{i}].sha256", shard["sha256"])
        if d["corpus_sha256"] is not None:
            _check_int(path, f"shards[{i}].documents", shard["documents"], 0, d["total_documents"])
            _check_int(path, f"shards[{i}].partial", shard["partial"], 0, 1 << 60)
            _check_sha(path, f"shards[{i}].corpus_sha256", shard["corpus_sha256"])
    total = sum(shard["tokens"] for shard in shards)
    if total != d["total_tokens"]:
        raise MalformedFile(f"{path}: total_tokens = {d['total_tokens']}, its shards add up to {total}")


def same_figure(what: str, written: float, measured: float) -> None:
    """Raise MalformedFile unless two figures are equal, but for the last bits of another machine's logarithm."""
    low, high = (measured + sign * 1e-9 * max(1.0, abs(measured)) for sign in (-1, 1))
    # No subtraction: the manifest may hold an integer beyond all floats.
    if not low <= written <= high:
        raise MalformedFile(f"{what} = {written!r}, measured {measured!r}")


def _check_int(path: Path, key: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise MalformedFile(f"{path}: {key} = {value!r} is not a whole number in {low}..{high}")


def _check_sha(path: Path, key: str, value: Any) -> None:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise MalformedFile(f"{path}: {key} = {value!r} is not a sha256")
