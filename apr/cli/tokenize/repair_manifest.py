"""`apr tokenize repair-manifest DIR`: rebuild manifest.json from the shards of a folder.

Example: apr tokenize repair-manifest shards/train --tokenizer tok"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ...common.errors import AprError, Refused
from ...common.options import json_option, option, parse
from ...common.units import plural
from ...data.audit import tokenizer_of_shards
from ...data.manifest import MANIFEST
from ...data.repair import repair_manifest
from ...data.shards import TokenShards
from ...tokenizer.tokenizer import Tokenizer
from ..show import Show


@dataclass(frozen=True)
class Flags:
    """Options of `apr tokenize repair-manifest`."""

    dataset: str = option("folder of shards: shard-00000.bin, ...", positional=True, path=True)
    tokenizer: str | None = option(
        "tokenizer folder (default: the tokenizer/ that encode-corpus wrote beside the shards)",
        metavar="FOLDER",
        path=True,
    )
    replace: bool = option("replace a manifest that agrees with the shards, too", False)
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code. Errors are raised."""
    f = parse(Flags, args, "apr tokenize repair-manifest", __doc__ or "")
    folder = Path(f.dataset)
    tokenizer = tokenizer_of_shards(folder, f.tokenizer)
    if not f.replace and _sound(folder, tokenizer):
        raise Refused(
            f"{folder / MANIFEST}: agrees with the shards, and says more than they do; nothing was changed. --replace rebuilds it"
        )
    m = repair_manifest(folder, tokenizer)
    if f.json:
        print(json.dumps(asdict(m), indent=2))
        return 0
    Show().table(
        "apr tokenize repair-manifest",
        [
            ("written to", str(folder / MANIFEST)),
            ("shards", f"{m.shard_count:,}, {plural(m.total_tokens, 'token')}"),
            ("documents", f"{m.total_documents:,}, eos_policy {m.eos_policy}"),
            ("text", f"{plural(m.total_bytes, 'byte')}, {m.audit['bytes_per_token']:.2f} bytes/token"),
        ],
    )
    return 0


def _sound(folder: Path, tokenizer: Tokenizer) -> bool:
    try:
        TokenShards(folder, tokenizer)
    except AprError:
        return False
    return True
