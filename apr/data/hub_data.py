"""Files of records of a data set, on the Hub or in a folder: those of one split."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from ..common.errors import Refused
from ..common.hub import download_data
from ..common.units import plural
from .find import Sources, classify, find_sources
from .source import Source

SPLITS = ("train", "validation", "valid", "val", "dev", "test")
# Splits to score a model on, the first that is there.
HELD_OUT = ({"validation", "valid", "val", "dev"}, {"test"})
PREFIX = "hf://"


def data_files(path: str, is_scored: bool = False) -> list[str]:
    """List the files that a path names: itself, or those of hf://datasets/org/name[@revision][:split], downloaded. Without
    a split those of "train", or of one to score a model on.

    Raises UsageError, InputNotFound, IOFailure, Refused: no such split, or several sets of files."""
    if not path.startswith(PREFIX):
        return [path]

    def choose(names: list[str], split: str | None) -> list[str]:
        held_out = (word for word in SPLITS[1:] if any(_has(n, word) for n in names))
        return of_split(path, names, split or (next(held_out, None) if is_scored else None))

    return [str(p) for p in download_data(path, choose)]


def train_sources(*paths: str) -> Sources:
    """Find the files of paths to train on. Of a folder with a split "train", files of other splits are left out, as of a data
    set on the Hub: what a model will be tested with is not for training. A file that is named itself is read. Raises as
    find_sources and data_files."""
    return _sources(paths, is_scored=False)


def held_out_sources(*paths: str) -> Sources:
    """Find the files of paths to score a model on. Of a folder with a split "train", those of validation are read alone, or
    those of test where there is none. Raises as find_sources and data_files."""
    return _sources(paths, is_scored=True)


def splits_note(*paths: str, is_scored: bool = False) -> str:
    """Say which files of folders train_sources, or held_out_sources, leaves out; "" for none."""
    folders = [path for path in paths if _is_folder(path)]
    others = _other_splits(paths, find_sources(folders), is_scored) if folders else []
    if not others:
        return ""
    done = "scored on a split that is not trained on" if is_scored else "trained on the split train"
    return f"{', '.join(folders)}: {done}; left out: {', '.join(s.name for s in others[:5])}" + (
        f" and {plural(len(others) - 5, 'more file')}" if len(others) > 5 else ""
    )


def _sources(paths: Sequence[str], is_scored: bool) -> Sources:
    found = find_sources([file for path in paths for file in data_files(path, is_scored)])
    others = {source.path for source in _other_splits(paths, found, is_scored)}
    found[:] = [source for source in found if source.path not in others]
    return found


def _is_folder(path: str) -> bool:
    return not path.startswith(PREFIX) and os.path.isdir(path)


def _other_splits(paths: Sequence[str], found: Sources, is_scored: bool) -> list[Source]:
    """List the files of folders whose names say another split than the one that is read, where there is a split "train". Of text
    files they say so where every file is called after a split: code has folders of tests."""
    named = {os.path.realpath(path) for path in paths if not _is_folder(path)}
    others = []
    for folder in filter(_is_folder, paths):
        below = [s for s in found if _is_below(s.path, folder)]
        words = {s.name: _split_of(os.path.relpath(s.path, folder)) for s in below}
        data = [s for s in below if s.kind != "text"]
        if not data and all(words.values()):
            data = [s for s in below if s.path.suffix.lower() == ".txt"]
        there = {words[s.name] for s in data}
        held_out = next((words_of for words_of in HELD_OUT if words_of & there), set[str]())
        if "train" not in there:
            continue
        if not is_scored:
            others += [s for s in data if words[s.name] not in ("train", "")]
        elif held_out:
            others += [s for s in below if words[s.name] not in held_out]
    return [s for s in others if not named or os.path.realpath(s.path) not in named]


def _is_below(path: str | os.PathLike[str], folder: str) -> bool:
    return not os.path.relpath(path, folder).startswith(os.pardir + os.sep)


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
