"""Spell out what a terminal would obey instead of showing it: names, keys and texts come out of files of strangers."""

from __future__ import annotations

import json
from typing import Any

LINES = "\n\t"


def printable(text: str, kept: str = LINES) -> str:
    """Spell out the characters of a text that are not printable, but those of `kept`: escape sequences, marks that turn the
    direction of writing, bytes of a path that are no UTF-8 (as \\xNN)."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else _spelt(c) for c in text)


def _spelt(c: str) -> str:
    # Python's stand-ins for bytes of a path.
    return f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c.encode("unicode_escape").decode()


def json_line(value: Any) -> str:
    """Write a value as JSON in one line, letters beyond ASCII as they are, what is not printable as \\uNNNN."""
    text = json.dumps(value, ensure_ascii=False)
    return (
        text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    )
