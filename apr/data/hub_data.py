"""Files of records of a data set, on the Hub or in a folder: those of one split."""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath

from ..common.errors import Refused
from ..common.hub import download_data
from ..common.units import plural
from .find import Sources, classify, find_sources
from .source import Source

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


def train_sources(path: str) -> Sources:
    """Find the files of a path to train on. Of a folder with a split "train", files of other splits are left out, as of a data
    set on the Hub: what a model will be tested with is not for training. Raises as find_sources and data_files."""
    found = find_sources(data_files(path))
    others = {source.path for source in _other_splits(path, found)}
    found[:] = [source for source in found if source.path not in others]
    return found


def splits_note(path: str) -> str:
    """Say which files of a folder train_sources leaves out; "" for none."""
    if path.startswith(PREFIX) or not os.path.isdir(path):
        return ""
    others = _other_splits(path, find_sources([path]))
    if not others:
        return ""
    return f"{path}: trained on the split train; left out: {', '.join(s.name for s in others[:5])}" + (
        f" and {plural(len(others) - 5, 'more file')}" if len(others) > 5 else ""
    )


def _other_splits(path: str, found: Sources) -> list[Source]:
    """List the files of a folder whose names say another split than "train", where there is that. Of text files they say so
    where every file is called after a split: code has folders of tests."""
    if path.startswith(PREFIX) or not os.path.isdir(path):
        return []
    words = {s.name: _split_of(os.path.relpath(s.path, path)) for s in found}
    data = [s for s in found if s.kind != "text"]
    if not data and all(words.values()):
        data = [s for s in found if s.path.suffix.lower() == ".txt"]
    of_train = [s for s in data if words[s.name] == "train"]
    others = [s for s in data if words[s.name] not in ("train", "")]
    return others if of_train else []


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


def _split_of(name: str) -> str:
    """Find the word of a split in a name: the file's own, else that of the nearest folder; "" without one."""
    parts = reversed(PurePosixPath(name).parts)
    return next((word for part in parts for word in SPLITS if _has(part, word)), "")


def _has(name: str, word: str) -> bool:
    """Tell if a word stands in a name, between characters that are no letters or digits."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", name) is not None
