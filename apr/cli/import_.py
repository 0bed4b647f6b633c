"""`apr import SRC -o F.apr`: write a Hugging Face or GGUF checkpoint as one .apr file, bit for bit.

SRC is a folder with config.json and safetensors (one file or shards), a .safetensors file with config.json beside it, a
GGUF file, or hf://org/name[@revision]. bfloat16, float16 and float32 stay as they are, Q8_0 of a GGUF file becomes float32
with the values of the file. The tokenizer, chat template, generation settings and the text of config.json go along, and
the sha256 of every file. Afterwards each tensor is compared with its source.

Example: apr import hf://Qwen/Qwen2.5-0.5B@main -o qwen.apr"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoints.importing import import_model
from ..common.options import json_option, option, parse
from ..common.units import plural
from .show import Show


@dataclass(frozen=True)
class Flags:
    """Options of `apr import`."""

    source: str = option(
        "a folder, a .safetensors file with config.json beside it, a GGUF file, or hf://org/name[@revision]",
        positional=True,
        path=True,
    )
    output: str = option("the .apr file to write", "", needed=True, short="o", metavar="FILE", path=True)
    revision: str | None = option("branch, tag or commit of hf://org/name")
    tokenizer: str | None = option(
        "folder with the tokenizer.json to embed (default: the source's)", metavar="FOLDER", path=True
    )
    force: bool = option("replace the output where it exists", False)
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code. Errors are raised."""
    f = parse(Flags, args, "apr import", __doc__ or "")
    done = import_model(f.source, f.output, f.revision, f.tokenizer, f.force)
    if f.json:
        print(json.dumps(done, indent=2))
        return 0
    ids = done["tokenizer_ids"]
    tokenizer = (
        f"{plural(ids, 'id')}, end of text {done['eos_token']!r} ({done['eos_token_id']})"
        if ids
        else "none in the source"
    )
    rows = [
        ("source", f"{done['source']}{' at ' + done['revision'] if done['revision'] else ''}"),
        (
            "parameters",
            f"{done['parameters']:,} in {plural(done['tensors'], 'tensor')} of {', '.join(done['dtypes'])}",
        ),
        ("compared", f"{plural(done['compared_elements'], 'element')} with the source: equal bits"),
        ("tokenizer", tokenizer),
        ("chat template", "yes" if done["chat_template"] else "none"),
        *(("note", f"config.json: {note}") for note in done["notes"]),
    ]
    Show().table(done["output"], rows)
    return 0
