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

# Words for splits, as the library datasets has them.
TRAIN = ("train", "training")
# Splits to score a model on: the first of these kinds that is there.
HELD_OUT = (("validation", "valid", "val", "dev", "development"), ("test", "testing", "eval", "evaluation"))
SPLITS = (*TRAIN, *HELD_OUT[0], *HELD_OUT[1])
# Text files that may be data; others are source code and notes, among which a folder of tests is no split.
TEXT_DATA = (".txt", ".csv", ".tsv")
NOTES = (".md", ".rst")
PREFIX = "hf://"


def data_files(path: str, is_scored: bool = False) -> list[str]:
    """List the files that a path names: itself, or those of hf://datasets/org/name[@revision][:split], downloaded. Without
    a split those of "train", or of one to score a model on.

    Raises UsageError, InputNotFound, IOFailure, Refused: no such split, or several sets of files."""
    if not path.startswith(PREFIX):
        return [path]

    def choose(names: list[str], split: str | None) -> list[str]:
        there = {_split_of(n) for n in _data_of(names)}
        held_out = (word for words in HELD_OUT for word in words if word in there)
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
    files they say so where all are called after a split, but for notes: code has folders of tests."""
    named = {os.path.realpath(path) for path in paths if not _is_folder(path)}
    others = []
    for folder in filter(_is_folder, paths):
        below = [s for s in found if _is_below(s.path, folder)]
        words = {s.name: _split_of(os.path.relpath(s.path, folder)) for s in below}
        data = [s for s in below if s.kind != "text"]
        texts = [s for s in below if s.kind == "text" and _suffix(s) not in NOTES]
        if all(words[s.name] and _suffix(s) in TEXT_DATA for s in texts):
            data += texts
        there = {words[s.name] for s in data}
        held_out = next((kind for kind in HELD_OUT if not there.isdisjoint(kind)), ())
        if there.isdisjoint(TRAIN):
            continue
        if not is_scored:
            others += [s for s in data if words[s.name] not in (*TRAIN, "")]
        elif held_out:
            others += [s for s in below if words[s.name] not in held_out]
    return [s for s in others if not named or os.path.realpath(s.path) not in named]


def _suffix(source: Source) -> str:
    """Find the suffix of a file in lower case, that of its content where it is compressed."""
    return PurePosixPath(source.path.stem if source.compression else source.path).suffix.lower()


def _is_below(path: str | os.PathLike[str], folder: str) -> bool:
    return not os.path.relpath(path, folder).startswith(os.pardir + os.sep)


def of_split(source: str, names: list[str], split: str | None) -> list[str]:
    """Choose the files of a split, a word or words with / between them that stand in their names; without one those of
    "train", or all where no name has a word of SPLITS."""
    data = _data_of(names)
    if not data:
        raise Refused(
            f"{source}: no Parquet, JSON Lines or JSON file; it has {', '.join(names[:8]) or 'no file'}"
        )
    words = split.split("/") if split else ["train"]
    of_name = {n: _splits_of(n) for n in data}
    if split:
        chosen = [n for n in data if all(w in of_name[n] if w in SPLITS else _has(n, w) for w in words)]
    else:
        chosen = [n for n in data if _split_of(n) in TRAIN]
    there = [w for w in SPLITS if any(w in splits for splits in of_name.values())]
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


def _data_of(names: list[str]) -> list[str]:
    """Choose the files of records of a data set, or of text where it has none."""
    kinds = ("parquet", "jsonl", "json")
    data = [n for n in names if classify(n)[0] in kinds and not n.endswith("dataset_infos.json")]
    return data or [n for n in names if n.lower().endswith(".txt")]


def _split_of(name: str) -> str:
    """Find the word of a split in a name; "" without one."""
    return next(iter(_splits_of(name)), "")


def _splits_of(name: str) -> list[str]:
    """List the words of splits in a name: the file's own, else those of the nearest folder."""
    found = ([word for word in SPLITS if _has(part, word)] for part in reversed(PurePosixPath(name).parts))
    return next(filter(None, found), [])


def _has(name: str, word: str) -> bool:
    """Tell if a word stands in a name, between characters that are no letters or digits; that of a split, however it is
    spelled, between characters that are no letters."""
    is_split = word in SPLITS
    other = "A-Za-z" if is_split else "A-Za-z0-9"
    return (
        re.search(rf"(?<![{other}]){re.escape(word)}(?![{other}])", name, re.IGNORECASE if is_split else 0)
        is not None
    )
