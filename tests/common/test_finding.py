"""Findings: verdicts of one and of many, JSON keys of each use, and a checklist that no exception ends."""

from __future__ import annotations

import itertools

import pytest

from apr.common.errors import Refused
from apr.common.finding import (
    FAIL,
    PASS,
    SEVERITY,
    SKIPPED,
    SUSPECT,
    WRONG_EXIT,
    Checklist,
    Fault,
    Finding,
    Skip,
    as_json,
    exit_code,
    verdict_of,
)


@pytest.mark.parametrize(
    ("passed", "verdict"), [(True, PASS), (False, FAIL), (None, SKIPPED)], ids=["pass", "fail", "skipped"]
)
def test_a_verdict_from_an_answer(passed: bool | None, verdict: str) -> None:
    finding = Finding.of("a", passed, "1", "2", where=3)
    assert (finding.verdict, finding.passed, finding.where) == (verdict, passed, 3)


def test_suspect_has_not_passed() -> None:
    assert Finding("a", SUSPECT).passed is False


def test_the_worst_of_many_counts() -> None:
    for pair in itertools.product(SEVERITY, repeat=2):
        assert verdict_of(pair) == SEVERITY[max(map(SEVERITY.index, pair))]
    assert verdict_of([Finding("a", PASS), Finding("b", SUSPECT), Finding("c", SKIPPED)]) == SUSPECT


def test_what_could_not_be_checked_is_never_passed() -> None:
    assert verdict_of([]) == SKIPPED
    assert verdict_of([SKIPPED, SKIPPED]) == SKIPPED
    assert verdict_of([SKIPPED], unasked=PASS) == PASS
    assert [exit_code(v) for v in (PASS, SUSPECT, FAIL, SKIPPED)] == [0, WRONG_EXIT, WRONG_EXIT, WRONG_EXIT]
    assert WRONG_EXIT == 9


def test_the_keys_on_disk_are_those_of_each_use() -> None:
    findings = [Finding("a", PASS, "1", "2"), Finding.skipped("b", "not there")]
    rows = as_json(findings, guard="name", passed="passed", figure="figure")
    assert rows == [
        {"guard": "a", "passed": True, "figure": "1"},
        {"guard": "b", "passed": None, "figure": "not there"},
    ]
    assert list(rows[0]) == ["guard", "passed", "figure"]


def test_a_sentence() -> None:
    assert str(Finding("a", FAIL, "1", "2")) == "a: 1, must be 2"
    assert str(Finding("a", FAIL, "1", "2", "why")) == "a: 1, must be 2 (why)"


def test_nothing_keeps_the_next_check_from_being_made() -> None:
    def fault() -> str:
        raise Fault("wrong")

    def skip() -> str:
        raise Skip("not there")

    def refused() -> str:
        raise Refused("no")

    checks = Checklist()
    assert checks.verdict == SKIPPED
    asked = (("a", skip), ("b", lambda: "1"), ("c", fault), ("d", refused))
    assert [checks.ask(name, "", check) for name, check in asked] == [False, True, False, False]
    assert [f.verdict for f in checks.findings] == [SKIPPED, PASS, FAIL, FAIL]
    assert [f.figure for f in checks.findings] == ["not there", "1", "wrong", "no"]
    assert checks.verdict == FAIL
    assert checks.counts() == "1 passed, 2 failed, 1 skipped"
