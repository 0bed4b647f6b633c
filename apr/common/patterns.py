"""Regular expressions out of files and flags: refuse those whose search may never end.

Python's engine tries every way to divide a text among the repeats of a pattern. Repeats inside a repeat have
exponentially many, repeats behind one another C(length + repeats, repeats), and groups of alternatives behind one another the
product of the numbers of alternatives that match at one place.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

from .units import plural

MAX_LENGTH = 4096  # characters of a pattern
MAX_PATTERNS = 4096  # of one object; EVA writes one for each adapted matrix
MAX_REPEATS, MAX_OPTIONAL = 4, 8
MAX_WAYS = 1 << 16  # to combine alternatives and optional parts; a repeat takes the place of two bits

# An escape, a class, a comment, the beginning of a group (a look-behind before a name, which begins like it), its end, a
# quantifier, or any other character.
_TOKEN = re.compile(
    r"\\(?:.|\Z)|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?(?:#|P=)[^)]*\)|\(\?<[=!]|\((?:\?(?:P?<[^>)]*>|\([^)]*\)|[^)]))?|\)"
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


@dataclass
class _Group:
    """One open group, as far as it was read.

    is_divided  it holds a quantifier or alternatives
    texts       its alternatives, None for one that is more than plain characters
    ways        in how many each may match at one place"""

    is_divided: bool = False
    texts: list[str | None] = field(default_factory=lambda: [""])
    ways: list[int] = field(default_factory=lambda: [1])

    def add(self, token: str, ways: int = 1) -> None:
        """Add a token to the last alternative."""
        is_escape = token[0] == "\\"
        text, before = token[is_escape:], self.texts[-1]
        is_plain = len(text) == 1 and (not text.isalnum() if is_escape else text not in "^$.?*+{}[]()")
        self.texts[-1] = before + text if is_plain and before is not None else None
        self.ways[-1] *= ways

    @property
    def total(self) -> int:
        """Count the ways to match at one place: of plain texts each, and those that it begins with."""
        counts = Counter(text for text in self.texts if text is not None)
        if None in self.texts:
            return sum(self.ways)
        return max(sum(counts[text[:k]] for k in range(len(text) + 1)) for text in counts)


def check_pattern(pattern: str) -> None:
    """Raise ValueError for a pattern whose search of a name could take hours: the reason, to stand behind its text."""
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"has {plural(len(pattern), 'character')}, more than {MAX_LENGTH}")
    repeats = optional = 0
    # The group that was closed last counts until another token follows.
    open_groups, closed = [_Group()], _Group()
    for token in _TOKEN.findall(pattern):
        group = open_groups[-1]
        if re.match(r"\(\?[aiLmsux-]", token):
            # After (?x another grammar is read than here.
            raise ValueError(
                f"has the inline flag {token}, under which apr reads no pattern: write it without"
            )
        if token.startswith("(") and not token.startswith(("(?#", "(?P=")):
            open_groups.append(_Group())
        elif token == ")":
            closed = open_groups.pop() if len(open_groups) > 1 else _Group()
            open_groups[-1].add(token, closed.total)
            open_groups[-1].is_divided |= closed.is_divided
            continue
        elif token == "|":
            group.is_divided = True
            group.texts.append("")
            group.ways.append(1)
        elif token[0] == "?" or token.startswith(("{,1}", "{0,1}")):
            group.add(token, 2)
            optional, group.is_divided = optional + 1, True
        elif token[0] in "*+" or (token[0] == "{" and len(token) > 1):
            group.add(token)
            if closed.is_divided:
                raise ValueError(
                    "repeats a group that has repeats or alternatives itself, and could take hours to search: "
                    "write the names out"
                )
            repeats, group.is_divided = repeats + 1, True
        elif not token.startswith("(?#"):
            group.add(token)
        closed = _Group()
    if repeats > MAX_REPEATS or optional > MAX_OPTIONAL:
        raise ValueError(
            f"has {repeats} repeats and {optional} optional parts, more than {MAX_REPEATS} and {MAX_OPTIONAL}, and could "
            "take hours to search: write the names out"
        )
    if open_groups[0].total << 2 * repeats > MAX_WAYS:
        raise ValueError(
            "has alternatives of which several match at one place, in too many combinations, and could take hours to search: "
            "write the names out"
        )
