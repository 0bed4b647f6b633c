"""`apr tokenize audit DIR`: check a folder of token shards with every guard, and draw its statistics.

Example: apr tokenize audit shards --model smollm2-135m"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.atomic import drawn, try_output
from ...common.errors import InputNotFound, IOFailure
from ...common.finding import as_json, exit_code, verdict_of
from ...common.options import json_option, option, parse
from ...data.audit import Split, audit, holds_examples, sides_of, tokenizer_of_shards
from ...data.guards import Bounds
from ...data.settings import widen_option
from ...data.shards import our_files
from ...model.presets import PRESETS, load_config
from ...tokenizer.tokenizer import Tokenizer
from ..show import Show
from ..tables import print_findings
from .show import draw_audit


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
    """Run the command; returns the exit code: 9 when a guard fails. Errors are raised."""
    f = parse(Flags, args, "apr tokenize audit", __doc__ or "")
    folder = Path(f.dataset)
    bounds = Bounds.parse(f.widen)
    show = Show(quiet=f.json)
    if f.picture and f.picture != "none":
        try_output(f.picture)
    tokenizer = tokenizer_of_shards(folder, f.tokenizer)
    sides = sides_of(folder)
    if f.val_dataset:
        other = Path(f.val_dataset)
        sides["val"] = other / "val" if (other / "val").is_dir() else other
    for side, given in sides.items():
        if not (our_files(given) or holds_examples(given)):
            flag = "--val-dataset " if side == "val" and f.val_dataset else ""
            raise InputNotFound(
                f"{flag}{given}: no token shards there; apr tokenize encode-corpus makes them of text"
            )
    vocab_size = load_config(f.model).vocab_size if f.model else None
    try:
        splits = audit(sides, tokenizer, bounds, vocab_size, lenient=True, progress=show.preparing)
    finally:
        show.stop()
    picture, failed = _draw(f, folder, splits, tokenizer, show)
    verdict = verdict_of(x for split in splits for x in split.findings)
    if f.json:
        print(json.dumps(_result(splits, picture, verdict), indent=2))
    else:
        for split in splits:
            print_findings(show.console, split.findings, f"{split.name}: {split.folder}", bounds=True)
            show.note("")
        if picture:
            show.note(f"picture  {picture}")
        show.note(verdict)
    if failed is not None:
        raise failed
    return exit_code(verdict)


def _draw(
    f: Flags, folder: Path, splits: list[Split], tokenizer: Tokenizer, show: Show
) -> tuple[str | None, IOFailure | None]:
    """Draw the picture; returns its path, None for no picture, and the error where one that was asked for failed."""
    if f.picture == "none" or not any(split.scan for split in splits):
        return None, None
    path = Path(f.picture) if f.picture else folder / "audit.png"
    try:
        drawn(lambda place: draw_audit(splits, tokenizer.vocab_size, place), path)
    except IOFailure as e:
        if f.picture:
            return None, IOFailure(f"{e}; choose another --picture, or none")
        show.note(f"no picture: {e}; --picture FILE writes it elsewhere")
        return None, None
    return str(path), None


def _result(splits: list[Split], picture: str | None, verdict: str) -> dict[str, Any]:
    """Build the JSON document."""
    return {
        "verdict": verdict,
        "picture": picture,
        "sides": {
            split.name: {
                "folder": str(split.folder),
                "figures": split.shards.figures if split.shards else None,
                "guards": as_json(
                    split.findings,
                    verdict="verdict", guard="name", passed="passed", figure="measured", bound="bound", note="why",
                    widen="remedy",
                ),
            }
            for split in splits
        },
    }  # fmt: skip
