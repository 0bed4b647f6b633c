"""Find the ids of the tokens that the files of a Hugging Face folder name: end of text, beginning, padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..common.errors import MalformedFile
from ..common.files import parse_json
from ..tokenizer.stated import TOKENIZER


def special_id(
    text: str, tokenizer_config: Mapping[str, Any], config: Mapping[str, Any], name: str
) -> int | None:
    """Find the id of the token that tokenizer_config.json, or else config.json, names bos, pad or unk; None unless it is
    an added token."""
    added = {t["content"]: t["id"] for t in parse_json(text, TOKENIZER).get("added_tokens") or []}
    said = token_text(tokenizer_config.get(f"{name}_token"))
    if said is not None:
        return added.get(said)
    i = first_id(config.get(f"{name}_token_id"))
    return i if i in added.values() else None


def end_of_text(
    tokenizer_json: str | None, tokenizer_config: Mapping[str, Any], config: Mapping[str, Any]
) -> Any:
    """Find what ends a text, of all the ids that end one: the added token that tokenizer_config.json names, else the first
    that config.json lists."""
    said, eos = token_text(tokenizer_config.get("eos_token")), config.get("eos_token_id")
    try:
        added = parse_json(tokenizer_json, TOKENIZER).get("added_tokens") if said and tokenizer_json else None
    # Whoever asks for the tokenizer hears of it.
    except MalformedFile:
        added = None
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and token.get("content") == said and isinstance(token.get("id"), int):
            return token["id"]
    return (eos[0] if eos else None) if isinstance(eos, list) else eos


def token_text(token: Any) -> str | None:
    """Take the text of a token, which tokenizer_config.json spells as a string or as {"content": ...}."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def first_id(ids: Any) -> int | None:
    """Take an id, or the first of a list of them."""
    ids = ids[0] if isinstance(ids, list) and ids else ids
    return ids if isinstance(ids, int) and not isinstance(ids, bool) else None
