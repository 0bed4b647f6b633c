"""The text of --mix, and tables [[mix]] of a settings file: KEY=VALUE of each source of a mixture.

`--mix "corpus=web/ weight=0.7; corpus=code/ weight=0.3"`
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from ..common.errors import UsageError

KINDS = ("corpus", "dataset", "instruct")
# What a source may say of itself beside its kind and its share.
OWN = ("content_field", "map")
KEYS = (*KINDS, "weight", "tokens", "name", *OWN)
EXAMPLE = (
    "write 'corpus=web/ weight=0.7; corpus=code/ weight=0.3', or a table [[mix]] for each in a settings file"
)


def as_text(tables: Any, source: str) -> str:
    """Write tables of a settings file as the text of --mix. Raises UsageError, naming the source."""
    if not isinstance(tables, list) or not all(isinstance(t, Mapping) for t in tables):
        raise UsageError(f"{source}: mix = {tables!r} is no list of tables; {EXAMPLE}")
    parts = []
    for table in tables:
        for key, value in table.items():
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise UsageError(f"{source}: mix: {key} = {value!r} is neither text nor a number")
        parts.append(" ".join(f"{str(k).replace('-', '_')}={shlex.quote(str(v))}" for k, v in table.items()))
    return "; ".join(parts)


def tables_of(text: str) -> list[dict[str, str]]:
    """Read the text of --mix. Raises UsageError: a key that is unknown or there twice, quotes that do not close."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";")
    lexer.whitespace_split, lexer.commenters = True, ""
    tables: list[dict[str, str]] = [{}]
    try:
        words = list(lexer)
    except ValueError as e:
        raise UsageError(f"--mix {text!r}: {e}; {EXAMPLE}") from None
    for word in words:
        if set(word) == {";"}:
            tables.append({})
            continue
        key, equals, value = word.partition("=")
        if key == "preferences":
            raise UsageError(
                f"--mix: {word}: pairs of preferences are not mixed; give them alone, with --preferences"
            )
        if not equals or key not in KEYS:
            raise UsageError(f"--mix: {word!r}: write KEY=VALUE with a key of {', '.join(KEYS)}; {EXAMPLE}")
        if key in tables[-1]:
            raise UsageError(
                f"--mix: {word!r}: its source has a {key} already; a ; stands between two sources"
            )
        tables[-1][key] = value
    return [t for t in tables if t]


def with_paths(text: str, resolve: Callable[[str], str]) -> str:
    """Write the text of --mix with other paths; each source keeps its name, which may be that of a link."""
    tables = []
    for t in tables_of(text):
        new = {k: resolve(v) if k in KINDS and v != "stdlib" else v for k, v in t.items()}
        was, now = ([name_of(x[k]) for k in KINDS if k in x] for x in (t, new))
        tables.append(new | ({"name": was[0]} if was != now and "name" not in t else {}))
    return as_text(tables, "--mix")


def name_of(path: str) -> str:
    """Name a source by its file or folder, without suffixes."""
    last = path.rstrip("/").rpartition("/")[2]
    return last.split(":")[0].split(".")[0] or last


def keys_of(text: str | None) -> set[str]:
    """List the keys that the sources of a mixture have; none without one."""
    return {key for table in tables_of(text or "") for key in table}


def kinds_of(text: str | None) -> set[str]:
    """List the kinds of the sources of a mixture; none without one."""
    return keys_of(text) & set(KINDS)
