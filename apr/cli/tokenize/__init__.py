"""`apr tokenize COMMAND`: tokenizers and token shards."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ...common.errors import UsageError

COMMANDS = {
    "train": "a byte-level BPE tokenizer from text",
    "import-hf": "a tokenizer folder from a Hugging Face one, or from vocab.json and merges.txt",
    "encode-corpus": "text, source code, JSONL and Parquet to token shards, split into train/ and val/",
    "audit": "check a folder of token shards and draw what is in it",
    "repair-manifest": "rebuild a manifest from shards",
}
USAGE = "\n".join(
    [
        "usage: apr tokenize COMMAND [options]",
        "",
        *(f"  {name:<16} {text}" for name, text in COMMANDS.items()),
        "",
        "Example:",
        "  apr tokenize train my_code/ --vocab-size 32000 -o tok",
        "  apr tokenize encode-corpus my_code/ --tokenizer tok -o shards",
        "  apr tokenize audit shards",
        "  apr pretrain --dataset shards --model smollm2-135m",
        "",
        "`apr tokenize COMMAND --help` lists a command's options; each takes --json.",
    ]
)


def main(args: Sequence[str]) -> int:
    """Returns the exit code; errors are raised."""
    if args[:1] in (["-h"], ["--help"]):
        print(USAGE)
        sys.exit(0)
    if not args or args[0] not in COMMANDS:
        said = f"unknown command {args[0]!r}" if args else "say what to do"
        raise UsageError(
            f"{said}; choose one of {', '.join(COMMANDS)}. `apr tokenize --help` says what they do"
        )
    return flags_and_main(args[0])[1](args[1:])


def flags_and_main(name: str):  # type: ignore[no-untyped-def]
    """The options (a dataclass) and the function of a sub-command."""
    module = importlib.import_module("." + name.replace("-", "_"), __package__)
    return module.Flags, module.main
