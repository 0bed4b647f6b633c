"""The folder of an encoding: begun with its settings, complete, or cleared of what a refused one has written."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from ..common.atomic import write_json
from ..common.errors import Refused
from ..common.files import read_json
from ..common.shell import word
from ..tokenizer.tokenizer import Tokenizer
from .shards import our_files

FORMAT = "apr-encoded-1"
RECORD = "encode.json"
SKIPPED = "skipped.jsonl"


def begin(folder: Path, settings: dict[str, Any], tokenizer: Tokenizer, resume: bool) -> dict[str, Any]:
    """Mark the folder as being encoded into; returns the settings of its begin. Raises Refused: somebody's data, or others."""
    record = read_json(path) if (path := folder / RECORD).is_file() else None
    begun = record.get("settings") if isinstance(record, dict) and record.get("format") == FORMAT else None
    ours = isinstance(begun, dict)
    complete = ours and _is_complete(record)
    if not resume:
        there = [*our_files(folder / "train"), *our_files(folder / "val"), *([path] if ours else [])]
        if there:
            how = (
                "an unfinished encoding; go on with --resume"
                if ours and not complete
                else "shards already; remove them"
            )
            raise Refused(f"{there[0]}: the folder holds {how}, or choose another folder")
    elif isinstance(begun, dict):
        if tokenizer.is_recorded_as(sha := begun.get("tokenizer_sha256")):
            settings = {**settings, "tokenizer_sha256": sha}
        for key in {**begun, **settings}:
            if begun.get(key) != settings.get(key):
                raise Refused(
                    f"{path}: {key} = {begun.get(key)!r} when it was begun, {settings.get(key)!r} now; resume with the "
                    "settings of then, or encode into another folder"
                )
        if complete:
            raise Refused(
                f"{path}: complete: nothing to resume; `apr tokenize audit {word(folder)}` looks at it"
            )
    write_json(path, {"format": FORMAT, "complete": False, "settings": settings, "result": None})
    return settings


def is_encoded(folder: Path) -> bool:
    """Tell whether an encoding into the folder came to its end."""
    return _is_complete(read_json(folder / RECORD) if (folder / RECORD).is_file() else None)


def _is_complete(record: Any) -> bool:
    return isinstance(record, dict) and (record.get("format"), record.get("complete")) == (FORMAT, True)


def clear(folder: Path, new_tokenizer: bool) -> None:
    """Remove what an encoding that was refused has written, and nothing else."""
    files = [folder / RECORD, folder / SKIPPED]
    for side in ("train", "val"):
        files += [*our_files(folder / side), *(folder / side).glob(".*.tmp")]
    if new_tokenizer:
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    for path in files:
        path.unlink(missing_ok=True)
    for side in ("train", "val"):
        with contextlib.suppress(OSError):
            (folder / side).rmdir()
