"""`apr export MODEL --format hf -o DIR` or `--format gguf -o FILE`: a checkpoint for transformers or llama.cpp.

hf writes config.json, safetensors in shards, the tokenizer with its chat template, and whatever small files an imported
model came with; gguf one file for llama.cpp. Weights keep their dtype or become --dtype. What was written is read back
and compared; nothing that exists is overwritten.

Examples: apr export runs/demo/ckpt/epoch-010.apr --format hf -o exported
          apr export model.apr --format gguf --dtype q8_0 -o model.gguf"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoints.exporting import export_gguf, export_hf, parse_size
from ..checkpoints.gguf import TYPES
from ..checkpoints.registry import open_any
from ..common.errors import UsageError
from ..common.options import json_option, option, parse
from ..common.units import plural
from .show import Show


@dataclass(frozen=True)
class Flags:
    """Options of `apr export`."""

    model: str = option("an .apr or GGUF file or a Hugging Face folder", positional=True, path=True)
    format: str = option("format to write", "hf", choices=("hf", "gguf"))
    output: str = option("the folder (hf) or file (gguf) to write", "", needed=True, short="o", path=True)
    dtype: str = option("dtype of the matrices; q8_0 in GGUF only", "stored", choices=("stored", *TYPES))
    max_shard_size: str = option("most bytes of one safetensors file, such as 500MB", "5GB")
    force: bool = option("replace a GGUF file that exists", False)
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code. Errors are raised."""
    f = parse(Flags, args, "apr export", __doc__ or "")
    if f.force and f.format == "hf":
        raise UsageError("--force replaces a GGUF file; a folder that holds a model is never overwritten")
    dtype = None if f.dtype == "stored" else f.dtype
    size = parse_size(f.max_shard_size)
    checkpoint = open_any(f.model)
    gguf = f.format == "gguf"
    done = (
        export_gguf(checkpoint, f.output, dtype, f.force)
        if gguf
        else export_hf(checkpoint, f.output, dtype, size)
    )
    if f.json:
        print(json.dumps(done, indent=2))
        return 0
    Show().table(done["output"], _rows(done))
    return 0


def _rows(done: dict[str, object]) -> list[tuple[str, str]]:
    note = [("note", str(done["note"]))] if done["note"] else []
    if done["format"] == "hf":
        return [
            ("tensors", f"{done['tensors']} of {', '.join(done['dtypes'])}"),  # type: ignore[arg-type]
            (
                "compared",
                f"{plural(int(str(done['compared_elements'])), 'element')} read back, by other code too: equal bits",
            ),
            ("files", ", ".join(done["files"])),  # type: ignore[arg-type]
            *note,
        ]
    types = ", ".join(f"{n} {kind}" for kind, n in done["types"].items())  # type: ignore[attr-defined]
    worst = f", Q8_0 off by at most {done['q8_0_worst_step']:.3f} steps" if "Q8_0" in types else ""
    tokenizer = (
        f"{done['tokenizer']}, cut by {done['pre_tokenizer']}"
        if done["tokenizer"]
        else "none in the checkpoint"
    )
    return [
        ("tensors", f"{types}, read back and compared, by other code too: as written{worst}"),
        ("tokenizer", tokenizer),
        ("positions", f"{done['context_length']:,}"),
        *note,
    ]
