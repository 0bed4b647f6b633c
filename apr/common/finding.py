"""Findings: checked facts, each with a verdict, a figure and a bound.

Guards of token data, gates of a run, and the checks of `apr validate`, `diff`, `qa`, `verify` and `bisect` all give
Findings. They differ in when they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .errors import AprError
from .units import plural

PASS, SUSPECT, FAIL, SKIPPED = "PASS", "SUSPECT", "FAIL", "SKIPPED"
SEVERITY = (SKIPPED, PASS, SUSPECT, FAIL)  # ascending
FILE = "file"  # `where` of a finding about the bytes of a file, not about their meaning
WRONG_EXIT = 9  # exit code of a command that finished and found something wrong


@dataclass(frozen=True)
class Finding:
    """One checked fact.

    name      the fact: "header checksum", "run.finite"
    verdict   PASS, SUSPECT, FAIL or SKIPPED (the fact could not be checked)
    measured  figure with its unit
    bound     requirement on the figure, in words that follow "must be"
    why       reason of a verdict that is not PASS, or a remark on the bound
    where     training step (int), FILE, or the name of a side or an array
    score     rank among findings of one name and verdict: the largest score stays
    remedy    next thing to try
    """

    name: str
    verdict: str
    measured: str = ""
    bound: str = ""
    why: str = ""
    where: str | int | None = None
    score: float = 0.0
    remedy: str = ""

    @classmethod
    def of(
        cls, name: str, passed: bool | None, measured: str, bound: str, why: str = "", **more: Any
    ) -> Finding:
        """Build a PASS or a FAIL; SKIPPED where `passed` is None. more: further fields."""
        verdict = SKIPPED if passed is None else PASS if passed else FAIL
        return cls(name, verdict, measured, bound, why, **more)

    @classmethod
    def skipped(cls, name: str, why: str, bound: str = "") -> Finding:
        """Build the finding of a fact that could not be checked."""
        return cls(name, SKIPPED, "", bound, why)

    @property
    def passed(self) -> bool | None:
        """True for PASS, None for SKIPPED, False for SUSPECT and FAIL."""
        return None if self.verdict == SKIPPED else self.verdict == PASS

    @property
    def figure(self) -> str:
        """Measured figure; without one, the reason."""
        return self.measured or self.why

    @property
    def severity(self) -> tuple[int, float]:
        """(rank of the verdict, score): of two findings of one name the larger one stays."""
        return SEVERITY.index(self.verdict), self.score

    def __str__(self) -> str:
        remark = f" ({self.why})" if self.why else ""
        return f"{self.name}: {self.measured}, must be {self.bound}{remark}"


def verdict_of(findings: Iterable[Finding | str], unasked: str = SKIPPED) -> str:
    """Return the worst verdict of findings, or of verdicts; `unasked` where all are SKIPPED, or none is given."""
    verdicts = (f if isinstance(f, str) else f.verdict for f in findings)
    worst = max(verdicts, key=SEVERITY.index, default=SKIPPED)
    return unasked if worst == SKIPPED else worst


def exit_code(verdict: str) -> int:
    """Return the exit code of a command that came to its end: 0 for PASS, else WRONG_EXIT."""
    return 0 if verdict == PASS else WRONG_EXIT


def as_json(findings: Iterable[Finding], **keys: str) -> list[dict[str, Any]]:
    """Convert findings to JSON objects. keys: {key on disk: attribute of Finding}, in the order of the file."""
    return [{key: getattr(f, attribute) for key, attribute in keys.items()} for f in findings]


class Skip(Exception):
    """Raised by a check that cannot be made, with the reason."""


class Fault(Exception):
    """Raised by a check that fails, with the figure."""


@dataclass
class Checklist:
    """Findings of independent checks, in order. An exception of one check does not keep the next from being made."""

    findings: list[Finding] = field(default_factory=list)

    def ask(self, name: str, bound: str, check: Callable[[], str], where: str | None = None) -> bool:
        """Make one check and keep its Finding; returns True for PASS. check: returns the figure, or raises Fault, Skip or
        an AprError."""
        verdict, measured, why = PASS, "", ""
        try:
            measured = check()
        except Skip as e:
            verdict, why = SKIPPED, str(e)
        except Fault as e:
            verdict, measured = FAIL, str(e)
        except AprError as e:
            verdict, why = FAIL, str(e)
        self.findings.append(Finding(name, verdict, measured, bound, why, where))
        return verdict == PASS

    @property
    def verdict(self) -> str:
        """Worst verdict of all findings; SKIPPED where no check could be made."""
        return verdict_of(self.findings)

    def counts(self) -> str:
        """Count the findings by verdict: "20 passed, 1 skipped"."""
        verdicts = [f.verdict for f in self.findings]
        return ", ".join(
            f"{verdicts.count(verdict)} {text}"
            for verdict, text in ((PASS, "passed"), (FAIL, "failed"), (SKIPPED, "skipped"))
            if verdict in verdicts
        )


def guards_passed(findings: Iterable[Finding]) -> str:
    """Count the guards of data that passed among those asked: "9 of 9 guards passed, 2 not asked"."""
    verdicts = [f.verdict for f in findings]
    skipped = verdicts.count(SKIPPED)
    asked = plural(len(verdicts) - skipped, "guard")
    return f"{verdicts.count(PASS)} of {asked} passed" + (f", {skipped} not asked" if skipped else "")
