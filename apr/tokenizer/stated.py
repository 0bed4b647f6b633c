"""The added tokens that files beside a tokenizer.json state, or name as special."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.errors import Refused
from ..common.files import parse_json, read_text, short
from ..common.shell import word

CONFIG, ADDED, SPECIAL = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"


def vocabulary_of(fields: dict[str, Any]) -> dict[str, Any]:
    """Find the tokens of a tokenizer.json and their ids, as they stand there; none where it has no table of them."""
    model = fields.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    return vocab if isinstance(vocab, dict) else {}


def named_special(objects: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, bool]]:
    """Collect the tokens that the files name as special, by content, with the flags that they give. objects: by names of files.

    One of the vocabulary that is no added token is cut up as ordinary text, and transformers makes each of them one."""
    out: dict[str, dict[str, bool]] = {}
    for name in (CONFIG, SPECIAL):
        for key, value in objects.get(name, {}).items():
            if name == CONFIG and not key.endswith(("_token", "special_tokens")):
                continue
            is_table = isinstance(value, dict) and "content" not in value
            for token in value.values() if is_table else value if isinstance(value, list) else [value]:
                content, flags = (token.get("content"), token) if isinstance(token, dict) else (token, {})
                if isinstance(content, str):
                    out.setdefault(content, {k: v for k, v in flags.items() if isinstance(v, bool)})
    return out


def check_stated(fields: dict[str, Any], path: Path) -> None:
    """Raise Refused, naming the command that joins the files, for an added token that tokenizer.json lacks: its text would be
    other ids than transformers makes of it."""
    own = {t.get("content") for t in fields.get("added_tokens") or [] if isinstance(t, dict)}
    vocab = vocabulary_of(fields)
    for name in (CONFIG, ADDED, SPECIAL):
        beside = path.with_name(name)
        if not os.path.lexists(beside):
            continue
        d = parse_json(read_text(beside), str(beside), unique=True)
        contents: list[Any] = [c for c in named_special({name: d}) if c in vocab]
        if name == ADDED:
            contents += d
        elif name == CONFIG:
            stated = (d.get("added_tokens_decoder") or {}).values()
            contents += [t.get("content") for t in stated if isinstance(t, dict)]
        if lost := next((c for c in contents if c not in own), None):
            raise Refused(
                f"{beside}: states the added token {short(lost)}, which {path.name} lacks; join the files: "
                f"apr tokenize import-hf {word(path.parent)} -o FOLDER"
            )
