"""The one printer of findings: what is wrong is printed with its bound and the next thing to try."""

from __future__ import annotations

import io

from rich.console import Console

from apr.cli.tables import print_findings
from apr.common.finding import FAIL, PASS, SUSPECT, Finding

FINDINGS = [
    Finding("a", PASS, "1 token", "at least 1"),
    Finding("b", PASS, "2 tokens", "at least 1", "widened"),
    Finding.skipped("c", "not there", "at least 1"),
    Finding("d", FAIL, "0 tokens", "at least 1", remedy="the data"),
    Finding("e", SUSPECT, "0 tokens", "at least 1", "no token [was] read"),
]


def printed(bounds: bool) -> list[str]:
    out = io.StringIO()
    print_findings(Console(file=out, width=100, highlight=False), FINDINGS, "title", bounds=bounds)
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def test_bounds_stand_under_what_is_wrong() -> None:
    assert printed(bounds=False) == [
        "title",
        "PASS a 1 token",
        "PASS b 2 tokens (widened)",
        "SKIPPED c not there",
        "FAIL d 0 tokens",
        "must be: at least 1",
        "look at: the data",
        "SUSPECT e no token [was] read",
        "must be: at least 1",
    ]


def test_bounds_stand_in_a_column() -> None:
    assert printed(bounds=True) == [
        "title",
        "measured must be",
        "PASS a 1 token at least 1",
        "PASS b 2 tokens (widened) at least 1",
        "SKIPPED c not there at least 1",
        "FAIL d 0 tokens at least 1",
        "SUSPECT e 0 tokens (no token [was] read) at least 1",
    ]
