"""Faults of the campaign can be planted: their old text stands once, and the edited file is Python still."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from mutant_faults import FAULTS, Mutant  # noqa: E402
from mutant_fifth import FIFTH  # noqa: E402
from mutant_fourth import FOURTH  # noqa: E402
from mutant_jobs import BEFORE, LINES  # noqa: E402
from mutant_second import SECOND  # noqa: E402
from mutant_third import THIRD  # noqa: E402
from mutants import COMMANDS, JOBS, RESUMED, from_patch, rates, record  # noqa: E402
from mutants import Outcome as MutantOutcome  # noqa: E402


@pytest.mark.parametrize("mutant", [*FAULTS, *SECOND, *THIRD, *FOURTH, *FIFTH], ids=lambda m: m.name)
def test_a_fault_can_be_planted(mutant):
    kind, _, names = mutant.job.partition(":")
    assert kind == COMMANDS or kind.removeprefix(RESUMED) in JOBS
    assert not names or not {*names.split(",")} - {*LINES}
    assert mutant.edits
    for path, old, new in mutant.edits:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{path}: {text.count(old)} times"
        assert old != new
        compile(text.replace(old, new), path, "exec")
    for test in mutant.tests:
        assert (ROOT / test.split("::")[0]).exists(), test


def test_names_are_given_once():
    every = [*FAULTS, *SECOND, *THIRD, *FOURTH, *FIFTH]
    assert len({m.name for m in every}) == len(every)


def test_jobs_that_fill_a_cache_first_are_jobs():
    assert not {*BEFORE} - {*JOBS}


def test_a_patch_becomes_edits(tmp_path):
    patch = tmp_path / "swapped.patch"
    patch.write_text(
        "diff --git a/apr/x.py b/apr/x.py\n--- a/apr/x.py\n+++ b/apr/x.py\n@@ -1,3 +1,3 @@\n a = 1\n-b = 2\n+b = 3\n c = 4\n"
    )
    mutant = from_patch(patch, "plain", ())
    assert mutant.edits == (("apr/x.py", "a = 1\nb = 2\nc = 4", "a = 1\nb = 3\nc = 4"),)
    patch.write_text("no patch\n")
    with pytest.raises(SystemExit, match="no hunk"):
        from_patch(patch, "plain", ())


def test_rates_count_what_was_asked():
    seen = [{"pretrain": "run.x", "bisect": "", "verify": ""}, {"pretrain": "", "bisect": ""}]
    outcomes = [MutantOutcome(Mutant(str(i), "", ()), s) for i, s in enumerate(seen)]
    counts = rates(outcomes)
    assert counts["pretrain"] == [1, 2]
    assert counts["verify"] == [0, 1]
    assert counts["at run time"] == [1, 2]


def test_a_record_keeps_what_is_not_asked_again(tmp_path):
    path, (a, b) = tmp_path / "trust.json", FAULTS[:2]
    record(path, "first", [MutantOutcome(a, {"pretrain": ""}), MutantOutcome(b, {"pretrain": "run.x"})], [])
    record(path, "second", [MutantOutcome(SECOND[0], {"pretrain": ""})], [])
    record(path, "first", [MutantOutcome(a, {"pretrain": "run.y"})], [])
    found = json.loads(path.read_text())
    assert found["rates"]["at run time"] == [2, 2]
    assert found["second list"]["rates"]["at run time"] == [0, 1]
    assert found["faults"][b.name]["pretrain"] == "run.x"
