"""`apr tokenize audit DIR`: every guard over a folder of token shards, and a picture of what is in it.

Example: apr tokenize audit shards --model smollm2-135m"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...common.errors import IOFailure
from ...common.options import json_option, option, parse
from ...data.audit import Side, audit, sides_of, tokenizer_of_shards
from ...data.guards import Bounds
from ...data.settings import widen_option
from ...model.presets import PRESETS, load_config
from ...tokenizer.tokenizer import Tokenizer
from ..show import Show
from .show import draw_audit, print_verdicts


@dataclass(frozen=True)
class Flags:
    """Options of `apr tokenize audit`."""

    dataset: str = option(
        "folder of token shards, or one with train/ and val/ inside", positional=True, path=True
    )
    tokenizer: str | None = option(
        "tokenizer folder (default: the tokenizer/ that encode-corpus wrote beside the shards)",
        metavar="FOLDER",
        path=True,
    )
    val_dataset: str | None = option(
        "folder of validation shards, when it is not DATASET/val", metavar="FOLDER", path=True
    )
    model: str | None = option(
        "preset or config.json whose vocabulary the ids must fit", path=True, names=tuple(PRESETS)
    )
    widen: str | None = widen_option()
    picture: str = option(
        "PNG to draw (default: DATASET/audit.png; none: no picture)",
        "",
        metavar="FILE",
        path=True,
        names=("none",),
    )
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Returns the exit code: 9 when a guard fails; errors are raised."""
    f = parse(Flags, args, "apr tokenize audit", __doc__ or "")
    folder = Path(f.dataset)
    bounds = Bounds.parse(f.widen)
    show = Show(quiet=f.json)
    tokenizer = tokenizer_of_shards(folder, f.tokenizer)
    sides = sides_of(folder)
    if f.val_dataset:
        given = Path(f.val_dataset)
        sides["val"] = given / "val" if (given / "val").is_dir() else given
    try:
        found = audit(
            sides,
            tokenizer,
            bounds,
            load_config(f.model).vocab_size if f.model else None,
            lenient=True,
            progress=show.preparing,
        )
    finally:
        show.stop()
    picture = _draw(f, folder, found, tokenizer, show)
    failed = sum(v.passed is False for side in found for v in side.verdicts)
    if f.json:
        print(json.dumps(_result(found, picture, failed), indent=2))
    else:
        print_verdicts(show, found)
        if picture:
            show.note(f"picture  {picture}")
        show.note("FAIL" if failed else "PASS")
    return 9 if failed else 0


def _draw(f: Flags, folder: Path, found: list[Side], tokenizer: Tokenizer, show: Show) -> str | None:
    if f.picture == "none" or not any(side.scan for side in found):
        return None
    path = Path(f.picture) if f.picture else folder / "audit.png"
    try:
        draw_audit(found, tokenizer.vocab_size, path)
    except OSError as e:
        if f.picture:
            raise IOFailure(f"{path}: cannot write: {e.strerror}; choose another --picture, or none") from e
        show.note(f"no picture: {path}: {e.strerror}; --picture FILE writes it elsewhere")
        return None
    return str(path)


def _result(found: list[Side], picture: str | None, failed: int) -> dict[str, Any]:
    return {
        "verdict": "FAIL" if failed else "PASS",
        "picture": picture,
        "sides": {
            side.name: {
                "folder": str(side.folder),
                "figures": side.shards.manifest.audit if side.shards else None,
                "guards": [{"verdict": v.word, **asdict(v)} for v in side.verdicts],
            }
            for side in found
        },
    }
