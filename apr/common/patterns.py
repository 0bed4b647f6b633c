"""Regular expressions out of files and flags: refuse those whose search may never end.

Python's engine tries every way to divide a text among the repeats of a pattern. Repeats inside a repeat have
exponentially many, and repeats behind one another C(length + repeats, repeats).
"""

from __future__ import annotations

import re
from functools import lru_cache

from .units import plural

MAX_LENGTH = 4096  # characters of a pattern
MAX_PATTERNS = 4096  # of one object; EVA writes one for each adapted matrix
MAX_REPEATS, MAX_OPTIONAL = 4, 8

# An escape, a class, a comment, the beginning of a group, its end, a quantifier, or any other character.
_TOKEN = re.compile(
    r"\\(?:.|\Z)|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?(?:#|P=)[^)]*\)|\((?:\?(?:P?<[^>)]*>|\([^)]*\)|[^)]))?|\)"
    r"|(?:[*+?]|\{\d*(?:,\d*)?\})[?+]?|.",
    re.DOTALL,
)


@lru_cache(8192)
def compiled_end(pattern: str) -> re.Pattern[str]:
    """Compile a pattern that must match the end of a dotted name, as PEFT matches it.

    Raises ValueError: no regular expression, or one that check_pattern does not accept."""
    check_pattern(pattern)
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as e:
        raise ValueError(f"is not a regular expression: {e}") from None


def check_pattern(pattern: str) -> None:
    """Raise ValueError for a pattern whose search of a name could take hours: the reason, to stand behind its text."""
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"has {plural(len(pattern), 'character')}, more than {MAX_LENGTH}")
    repeats = optional = 0
    # Of each open group, whether it holds a quantifier or alternatives; then of the group that was closed last.
    open_groups, inside = [False], False
    for token in _TOKEN.findall(pattern):
        if token.startswith("(") and not token.startswith(("(?#", "(?P=")):
            open_groups.append(False)
        elif token == ")":
            inside = open_groups.pop() if len(open_groups) > 1 else False
            open_groups[-1] |= inside
            continue
        elif token == "|":
            open_groups[-1] = True
        elif token[0] == "?" or token.startswith(("{,1}", "{0,1}")):
            optional, open_groups[-1] = optional + 1, True
        elif token[0] in "*+" or (token[0] == "{" and len(token) > 1):
            if inside:
                raise ValueError(
                    "repeats a group that has repeats or alternatives itself, and could take hours to search: "
                    "write the names out"
                )
            repeats, open_groups[-1] = repeats + 1, True
        inside = False
    if repeats > MAX_REPEATS or optional > MAX_OPTIONAL:
        raise ValueError(
            f"has {repeats} repeats and {optional} optional parts, more than {MAX_REPEATS} and {MAX_OPTIONAL}, and could "
            "take hours to search: write the names out"
        )
