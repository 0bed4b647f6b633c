"""Compare a tokenizer.json with the added tokens that the files beside it state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..common.errors import Refused
from ..common.files import parse_json, read_text, short
from ..common.shell import word

CONFIG, ADDED = "tokenizer_config.json", "added_tokens.json"


def check_stated(fields: dict[str, Any], path: Path) -> None:
    """Raise Refused, naming the command that joins the files, for an added token that tokenizer.json lacks: its text would be
    other ids than transformers makes of it."""
    own = {t.get("content") for t in fields.get("added_tokens") or [] if isinstance(t, dict)}
    for name in (CONFIG, ADDED):
        beside = path.with_name(name)
        if not os.path.lexists(beside):
            continue
        d = parse_json(read_text(beside), str(beside), unique=True)
        stated = d if name == ADDED else d.get("added_tokens_decoder") or {}
        contents = (
            stated if name == ADDED else (t.get("content") for t in stated.values() if isinstance(t, dict))
        )
        if lost := next((c for c in contents if c not in own), None):
            raise Refused(
                f"{beside}: states the added token {short(lost)}, which {path.name} lacks; join the files: "
                f"apr tokenize import-hf {word(path.parent)} -o FOLDER"
            )
