"""Keep the side files of a Hugging Face folder true to what a checkpoint learnt: its chat template, and how its turns end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..common.files import parse_json
from ..tokenizer.chat_template import ChatTemplate, answer_ends
from ..tokenizer.tokenizer import Tokenizer
from .checkpoint import (
    CONFIG,
    GENERATION_CONFIG,
    SPECIAL_TOKENS,
    TEMPLATE,
    TOKENIZER_CONFIG,
    Checkpoint,
)
from .named_ids import token_text


def as_text(value: Mapping[str, Any]) -> str:
    """Spell an object as a side file."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def with_one_template(texts: Mapping[str, str]) -> dict[str, str]:
    """Repeat chat_template.jinja under the older key of tokenizer_config.json, where that says something else: readers of the
    key alone would write conversations otherwise than the file."""
    texts = dict(texts)
    if TEMPLATE not in texts or TOKENIZER_CONFIG not in texts:
        return texts
    config = parse_json(texts[TOKENIZER_CONFIG], TOKENIZER_CONFIG)
    old, new = config.get("chat_template"), texts[TEMPLATE]
    if isinstance(old, list):  # several by name; the file is the default one
        kept = [t for t in old if not (isinstance(t, dict) and t.get("name") == "default")]
        config["chat_template"] = [{"name": "default", "template": new}, *kept]
    elif old is not None:
        config["chat_template"] = new
    if config.get("chat_template") != old:
        texts[TOKENIZER_CONFIG] = as_text(config)
    return texts


def turn_end(checkpoint: Checkpoint) -> int | None:
    """Find the id that ends a turn of a checkpoint that was trained to end them, where that is not the end of a text."""
    tokenizer = checkpoint.tokenizer
    if tokenizer is None or checkpoint.chat_template is None or len(ends := checkpoint.end_ids()) < 2:
        return None
    template = checkpoint.template()
    assert template is not None
    return min((answer_ends(template, tokenizer) & ends) - {tokenizer.eos_id}, default=None)


def with_turn_ends(
    texts: Mapping[str, str], template: ChatTemplate, tokenizer: Tokenizer, known: Sequence[int]
) -> dict[str, str]:
    """Name the id that ends an answer of this template among those that end a text, in every side file: a reader would go on
    behind the end of a turn. known: the ids that end a text so far, where a file says nothing.

    tokenizer_config.json has room for one token, which becomes the end of a turn as in published chat models, except where the
    template itself asks for eos_token."""
    texts, ends = dict(texts), sorted(answer_ends(template, tokenizer))
    if not ends:
        return texts
    for name in (GENERATION_CONFIG, CONFIG):
        if name in texts or name == GENERATION_CONFIG:
            config = parse_json(texts.get(name, "{}"), name)
            there = config.get("eos_token_id")
            there = there if isinstance(there, list) else list(known) if there is None else [there]
            if not set(ends) <= set(there) or name not in texts:
                config["eos_token_id"] = list(dict.fromkeys([*there, *ends]))
                texts[name] = as_text(config)
    if "eos_token" not in template.text:
        end = tokenizer.special_tokens()[ends[0]]
        for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
            named: dict[str, Any] = parse_json(texts[name], name) if name in texts else {}
            token = named.get("eos_token")
            if token is not None and token_text(token) != end:
                named["eos_token"] = {**token, "content": end} if isinstance(token, dict) else end
                texts[name] = as_text(named)
    return texts
