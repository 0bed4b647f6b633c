"""`apr tokenize COMMAND`: tokenizers and token shards."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ...common.errors import UsageError

COMMANDS = {
    "train": "train a byte-level BPE tokenizer on text",
    "import-hf": "make a tokenizer folder from a Hugging Face one, or from vocab.json and merges.txt",
    "encode-corpus": "encode text, source code, JSONL and Parquet as token shards, split into train/ and val/",
    "audit": "check a folder of token shards and draw its token statistics",
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
    """Run the command; returns the exit code. Errors are raised."""
    if args[:1] in (["-h"], ["--help"]):
        print(USAGE)
        sys.exit(0)
    if not args or args[0] not in COMMANDS:
        problem = f"unknown command {args[0]!r}" if args else "no command"
        raise UsageError(
            f"{problem}; choose one of {', '.join(COMMANDS)}. `apr tokenize --help` says what they do"
        )
    return flags_and_main(args[0])[1](args[1:])


def flags_and_main(name: str):  # type: ignore[no-untyped-def]
    """Import a sub-command: its options (a dataclass) and its function."""
    module = importlib.import_module("." + name.replace("-", "_"), __package__)
    return module.Flags, module.main
