"""Bound what the post-processors of a tokenizer.json put around a text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..common.errors import MalformedFile, Refused
from ..common.files import short
from ..common.units import plural

# Ids that are put around one text; tokenizers in use put two.
MAX_AROUND = 1024


def check_templates(steps: Iterable[dict[str, Any]], source: str) -> None:
    """Count the ids that templates add around a text, which each of them must hold once: no model is given a text twice, and
    ids that stand before a text could not be told.

    Raises MalformedFile: not a template; Refused: more ids than MAX_AROUND, a text that is repeated or left out."""
    around = 0
    for step in steps:
        if step["type"] != "TemplateProcessing":
            continue
        (names, texts), ids = _pieces(step, "single", source), _ids(step, source)
        around += sum(ids.get(p, 1) for p in names)
        if texts != 1:
            raise Refused(
                f"{source}: post_processor.single holds the text {texts:,} times, apr takes it once; correct the template"
            )
        if around > MAX_AROUND:
            raise Refused(
                f"{source}: post_processor puts {plural(around, 'id')} around a text; apr takes at most {MAX_AROUND}"
            )


def _pieces(step: dict[str, Any], key: str, source: str) -> tuple[list[str], int]:
    """Read a template as (names of its special tokens, number of its texts)."""
    pieces = step.get(key) or []
    if not isinstance(pieces, list) or not all(isinstance(p, dict) for p in pieces):
        raise MalformedFile(f"{source}: post_processor.{key} = {short(pieces)} is not a list of pieces")
    named = [p["SpecialToken"] for p in pieces if "SpecialToken" in p]
    return [str(n.get("id") if isinstance(n, dict) else n) for n in named], len(pieces) - len(named)


def _ids(step: dict[str, Any], source: str) -> dict[str, int]:
    """Map the special tokens of a template to the number of their ids."""
    tokens = step.get("special_tokens") or {}
    if not isinstance(tokens, dict) or not all(isinstance(t, dict) for t in tokens.values()):
        raise MalformedFile(f"{source}: post_processor.special_tokens = {short(tokens)} is not an object")
    lists = {name: token.get("ids") or [] for name, token in tokens.items()}
    if wrong := next((name for name, ids in lists.items() if not isinstance(ids, list)), None):
        raise MalformedFile(f"{source}: ids of {short(wrong)} = {short(lists[wrong])} is not a list")
    return {name: len(ids) for name, ids in lists.items()}
