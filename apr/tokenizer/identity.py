"""Identify a tokenizer by what it does: the SHA-256 of the canonical content of its tokenizer.json.

White space, the order of keys, keys that say nothing, the two spellings of a merge and the settings of the last use
(truncation, padding, which apr switches off) change no id; files that differ in them alone are the same tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

IDLE = ("version", "truncation", "padding")  # keys of the file that no id follows from
LARGE = ("vocab", "merges")  # keys of the model that hold no optional keys


def canonical(fields: dict[str, Any]) -> dict[str, Any]:
    """Reduce a parsed tokenizer.json to what ids and texts follow from, each part in one spelling."""
    model = fields["model"]
    small = _said({key: value for key, value in model.items() if key not in LARGE})
    # False and "" are the defaults of every switch of a model.
    kept = {key: value for key, value in small.items() if value is not False and value != ""}
    merges = model.get("merges") or []
    if isinstance(merges, list):
        merges = [m.split(" ") if isinstance(m, str) else m for m in merges]
    out = _said({key: value for key, value in fields.items() if key not in (*IDLE, "model", "added_tokens")})
    added = sorted(fields.get("added_tokens") or [], key=lambda token: token["id"])
    return out | {
        "model": kept | {"vocab": model.get("vocab"), "merges": merges},
        "added_tokens": [_said(token) for token in added],
    }


def _said(value: Any) -> Any:
    """Leave out keys without a value, at any depth."""
    if isinstance(value, dict):
        return {key: _said(x) for key, x in value.items() if x is not None}
    return [_said(x) for x in value] if isinstance(value, list) else value


def identity(fields: dict[str, Any]) -> str:
    """Hash the canonical content of a parsed tokenizer.json."""
    text = json.dumps(canonical(fields), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def older_identities(fields: dict[str, Any], text: str, library_text: str) -> set[str]:
    """Hash the spellings by which older versions identified a tokenizer: the bytes of the file as given, as the
    tokenizers library writes it, indented, and without white space."""
    spellings = (
        text,
        library_text,
        json.dumps(fields, ensure_ascii=False, indent=2),
        json.dumps(fields, ensure_ascii=False, separators=(",", ":")),
    )
    return {hashlib.sha256(s.encode("utf-8", "surrogatepass")).hexdigest() for s in spellings}
