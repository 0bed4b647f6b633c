"""Files of records of a data set on the Hub: those of one split."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from ..common.errors import Refused
from ..common.hub import download_data
from .find import classify

SPLITS = ("train", "validation", "valid", "val", "dev", "test")
PREFIX = "hf://"


def data_files(path: str) -> list[str]:
    """List the files that a path names: itself, or those of hf://datasets/org/name[@revision][:split], downloaded.

    Raises UsageError, InputNotFound, IOFailure, Refused: no such split, or several sets of files."""
    if not path.startswith(PREFIX):
        return [path]

    def choose(names: list[str], split: str | None) -> list[str]:
        return of_split(path, names, split)

    return [str(p) for p in download_data(path, choose)]


def of_split(source: str, names: list[str], split: str | None) -> list[str]:
    """Choose the files of a split, a word or words with / between them that stand in their names; without one those of
    "train", or all where no name has a word of SPLITS."""
    kinds = ("parquet", "jsonl", "json")
    data = [n for n in names if classify(n)[0] in kinds and not n.endswith("dataset_infos.json")]
    data = data or [n for n in names if n.lower().endswith(".txt")]
    if not data:
        raise Refused(
            f"{source}: no Parquet, JSON Lines or JSON file; it has {', '.join(names[:8]) or 'no file'}"
        )
    words = split.split("/") if split else ["train"]
    chosen = [n for n in data if all(_has(n, w) for w in words)]
    there = [w for w in SPLITS if any(_has(n, w) for n in data)]
    if not chosen and not split and not there:
        chosen = data
    bare = source.rsplit(":", 1)[0] if split else source
    if not chosen:
        raise Refused(
            f"{source}: no file of a split {split or 'train'!r}; there is {', '.join(there or data[:8])}"
        )
    folders = sorted({str(PurePosixPath(n).parent) for n in chosen})
    if len(folders) > 1:
        sets = ", ".join(f"{bare}:{PurePosixPath(f).name}/{words[-1]}" for f in folders[:6])
        raise Refused(f"{source}: files of {len(folders)} folders; say which, such as {sets}")
    return chosen


def _has(name: str, word: str) -> bool:
    """Tell if a word stands in a name, between characters that are no letters or digits."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", name) is not None
