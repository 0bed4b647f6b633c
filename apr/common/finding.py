"""Rows of a checklist: what was asked, PASS, FAIL or SKIPPED, and the figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .errors import AprError

PASS, FAIL, SKIPPED = "PASS", "FAIL", "SKIPPED"


@dataclass(frozen=True)
class Check:
    """One row. of_file: it is about the bytes of the file, not about what they say. bound: what the figure must be."""

    name: str
    verdict: str
    figure: str
    bound: str = ""
    of_file: bool = False


class Skip(Exception):
    """Raised by a check that cannot be asked, with the reason."""


class Fault(Exception):
    """Raised by a check that found something wrong, with the figure."""


@dataclass
class Checklist:
    """Rows in the order in which they were asked. Nothing that a check raises keeps the next one from being asked."""

    rows: list[Check] = field(default_factory=list)

    def ask(self, name: str, bound: str, check: Callable[[], str], of_file: bool = False) -> bool:
        """Ask one question; whether it passed. The check returns its figure, or raises Fault, Skip or an AprError."""
        try:
            verdict, figure = PASS, check()
        except Skip as e:
            verdict, figure = SKIPPED, str(e)
        except (Fault, AprError) as e:
            verdict, figure = FAIL, str(e)
        self.rows.append(Check(name, verdict, figure, bound, of_file))
        return verdict == PASS

    @property
    def verdict(self) -> str:
        """FAIL when any row is; PASS when some passed and none failed; SKIPPED when nothing could be asked."""
        words = {r.verdict for r in self.rows}
        return FAIL if FAIL in words else PASS if PASS in words else SKIPPED

    def counts(self) -> str:
        """How many of each, in words."""
        words = [r.verdict for r in self.rows]
        return ", ".join(
            f"{words.count(w)} {text}"
            for w, text in ((PASS, "passed"), (FAIL, "failed"), (SKIPPED, "skipped"))
            if w in words
        )
