"""`apr tokenize import-hf`: a tokenizer folder from a tokenizer.json, a model folder, or vocab.json and merges.txt.

Example: apr tokenize import-hf hf://Qwen/Qwen2.5-0.5B -o tok
         apr tokenize import-hf folder/vocab.json --family qwen2 -o tok"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...common.atomic import try_folder
from ...common.files import read_json
from ...common.options import json_option, option, parse
from ...common.units import plural
from ...tokenizer.families import FAMILIES
from ...tokenizer.import_hf import import_hf
from ..show import Show


@dataclass(frozen=True)
class Flags:
    """Options of `apr tokenize import-hf`."""

    source: str = option(
        "tokenizer.json, a folder, vocab.json (with merges.txt beside it), or hf://org/name[@revision]",
        positional=True,
        path=True,
    )
    output: str = option(
        "folder to write the tokenizer to", "", needed=True, short="o", metavar="FOLDER", path=True
    )
    family: str | None = option(
        "family of the tokenizer; needed for vocab.json and merges.txt, which do not name it",
        choices=tuple(FAMILIES),
    )
    eos: str | None = option(
        "the token that ends a document (default: as the source or the family has it)", metavar="TOKEN"
    )
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code. Errors are raised."""
    f = parse(Flags, args, "apr tokenize import-hf", __doc__ or "")
    try_folder(f.output)
    tokenizer = import_hf(f.source, f.output, f.family, eos=f.eos)
    if f.json:
        print(json.dumps(_manifest(f.output), indent=2))
        return 0
    m = _manifest(f.output)
    eos = "none" if tokenizer.eos_id is None else f"id {tokenizer.eos_id} {tokenizer.eos_token!r}"
    Show().table(
        "apr tokenize import-hf",
        [
            ("source", f"{f.source}{f', family {f.family}' if f.family else ''}"),
            ("format", f"{tokenizer.format}, normalization {tokenizer.normalization}"),
            ("vocabulary", f"{plural(tokenizer.vocab_size, 'id')}, {plural(tokenizer.merges, 'merge')}"),
            ("end of text", eos),
            ("sha256", str(m["sha256"])),
            ("written to", f.output),
        ],
    )
    return 0


def _manifest(folder: str) -> dict[str, object]:
    manifest = read_json(Path(folder) / "manifest.json")
    assert isinstance(manifest, dict)
    return manifest
