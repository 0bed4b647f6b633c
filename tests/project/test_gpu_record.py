"""The GPU tests ran, on these sources, and the record that says so can be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gpu_record

ROOT = Path(__file__).resolve().parents[2]


def test_the_gpu_tests_passed_on_these_sources() -> None:
    """Red when CUDA code has changed and `make gpu-test` has not been run since on a machine with a GPU."""
    record = json.loads(gpu_record.RECORD.read_text())
    assert gpu_record.problems(record, gpu_record.sources()) == []


JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest" tests="5">
<testcase classname="tests.test_ops" name="test_op[rope]" time="1.26" />
<testcase classname="tests.test_ops" name="test_op[norm]" time="0.5" />
<testcase classname="tests.test_ops" name="test_op[loss]" time="2"><failure message="no">text</failure></testcase>
<testcase classname="tests.test_ops" name="test_set_up" time="0"><error message="no">text</error></testcase>
<testcase classname="tests.test_ops" name="test_two" time="0"><skipped type="pytest.skip" message="one GPU" /></testcase>
</testsuite></testsuites>"""


def good() -> dict[str, Any]:
    """A record with nothing wrong, of two files."""
    tests = gpu_record.outcome(JUNIT)
    return {
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "tests": {**tests, "failed": 0, "errors": 0, "failed_names": []},
        "arguments": [],
        "sanitizer": {tool: {"ran": True, "clean": True} for tool in ("memcheck", "racecheck")},
        "sources": {"a.cu": "1", "b.py": "2"},
    }


def test_an_outcome_is_read_from_junit() -> None:
    assert gpu_record.outcome(JUNIT, slowest=2) == {
        "passed": 2,
        "failed": 1,
        "errors": 1,
        "skipped": 1,
        "seconds": 3.8,
        "failed_names": ["tests.test_ops::test_op[loss]", "tests.test_ops::test_set_up"],
        "skipped_names": {"tests.test_ops::test_two": "one GPU"},
        "slowest": {"tests.test_ops::test_op[loss]": 2.0, "tests.test_ops::test_op[rope]": 1.26},
    }


def test_what_two_runs_skip_counts_once() -> None:
    both = gpu_record.outcome(JUNIT, JUNIT)
    assert (both["passed"], both["skipped"]) == (4, 1)


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (lambda r: None, []),
        (lambda r: r.update(commit=r["commit"] + "+"), []),
        (lambda r: r.update(commit=None), ["commit None is none"]),
        (
            lambda r: r["tests"].update(failed=1, failed_names=["x"]),
            ["x failed", "2 passed, 1 failed, 0 errors"],
        ),
        (
            lambda r: (
                r["tests"].update(passed=200, failed=1, failed_names=["x"]) or r.update(settled={"x": "why"})
            ),
            [],
        ),
        (
            lambda r: (
                r["tests"].update(passed=200, failed=1, failed_names=["x"]) or r.update(settled={"x": ""})
            ),
            ["x failed", "200 passed, 1 failed, 0 errors"],
        ),
        (
            lambda r: r["tests"].update(failed=1, failed_names=["x"]) or r.update(settled={"x": "why"}),
            ["1 failures settled by hand, more than 1 to 100 tests that passed"],
        ),
        (lambda r: r["tests"].update(errors=1), ["2 passed, 0 failed, 1 errors"]),
        (lambda r: r["tests"].update(passed=0), ["0 passed, 0 failed, 0 errors"]),
        (lambda r: r["sources"].update({"a.cu": "3"}), ["a.cu has changed since"]),
        (lambda r: r["sources"].pop("b.py"), ["b.py has changed since"]),
        (lambda r: r["sources"].update({"c.cu": "1"}), ["c.cu has changed since"]),
        (lambda r: r["sanitizer"]["memcheck"].update(clean=False), ["memcheck found errors"]),
        (lambda r: r["sanitizer"]["racecheck"].update(ran=False), ["racecheck did not run"]),
        (lambda r: r["sanitizer"].pop("memcheck"), ["memcheck did not run"]),
        (lambda r: r.update(arguments=["-k", "rope"]), ["only some tests ran: ['-k', 'rope']"]),
        (lambda r: r["tests"].update(skipped=900), ["900 tests were skipped, more than 5"]),
    ],
)
def test_a_wrong_record_is_found(plant: Callable[[dict[str, Any]], None], found: list[str]) -> None:
    record = good()
    plant(record)
    assert gpu_record.problems(record, {"a.cu": "1", "b.py": "2"}) == found


def test_sources_are_those_of_the_cuda_backend(tmp_path: Path) -> None:
    kernels = tmp_path / "apr" / "backends" / "cuda" / "kernels"
    kernels.mkdir(parents=True)
    for name in (
        "kernels/norm.cu",
        "kernels/common.cuh",
        "kernels/__init__.py",
        "device.py",
        "driver.py",
    ):
        (tmp_path / "apr/backends/cuda" / name).write_text(name)
    before = gpu_record.sources(tmp_path)
    assert [p.removeprefix("apr/backends/cuda/") for p in before] == [
        "device.py",
        "kernels/__init__.py",
        "kernels/common.cuh",
        "kernels/norm.cu",
    ]
    (kernels / "norm.cu").write_text("changed")
    after = gpu_record.sources(tmp_path)
    assert {p for p in after if after[p] != before[p]} == {"apr/backends/cuda/kernels/norm.cu"}
    assert any(p.endswith("launch.py") for p in gpu_record.sources())


SANITIZER = """#!{python}
import os, sys
assert os.environ["APR_SANITIZE"] == "1" and "sanitize" in sys.argv
print("7 passed in 1s")
print({summary!r})
sys.exit({code})
"""


@pytest.mark.parametrize(
    ("tool", "summary", "code", "result"),
    [
        ("memcheck", "===== ERROR SUMMARY: 0 errors", 0, dict(ran=True, clean=True, tests=7)),
        ("memcheck", "===== ERROR SUMMARY: 1 error", 99, dict(ran=True, clean=False, tests=7)),
        ("memcheck", "===== ERROR SUMMARY: 0 errors", 1, dict(ran=True, clean=False, tests=7)),
        ("racecheck", "===== RACECHECK SUMMARY: 0 hazards displayed", 0, dict(ran=True, clean=True)),
        ("racecheck", "===== RACECHECK SUMMARY: 3 hazards displayed", 0, dict(ran=True, clean=False)),
        ("racecheck", "Device not supported", 1, dict(ran=False)),
    ],
)
def test_sanitizers_are_run_and_read(
    tmp_path: Path, tool: str, summary: str, code: int, result: dict[str, Any]
) -> None:
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(SANITIZER.format(python=sys.executable, summary=summary, code=code))
    fake.chmod(0o755)
    found = gpu_record.sanitize(tool, str(fake), 60)
    assert {k: found[k] for k in result} == result
    assert found["ran"] or "Device not supported" in found["why"]


def test_an_absent_sanitizer_is_recorded_as_not_run() -> None:
    assert gpu_record.sanitize("memcheck", None, 60) == {
        "ran": False,
        "why": "compute-sanitizer is not installed",
    }


GPU_TESTS = """
import pytest
pytest_plugins = ["conftest"]

def test_with_the_fixture(cuda): assert cuda.name == "cuda"
@pytest.mark.gpu
def test_with_the_marker(): pass
def test_without(): pass
"""


def test_gpu_tests_are_marked_and_skip_with_a_reason(tmp_path: Path) -> None:
    """A test that takes `cuda` is marked gpu, one that is marked gpu takes `cuda`; without a GPU both skip."""
    (tmp_path / "test_planted.py").write_text(GPU_TESTS)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}
    asked = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "-o", "markers=gpu"]
    done = subprocess.run([*asked, "-m", "gpu"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert "2 skipped, 1 deselected" in done.stdout, done.stdout
    assert done.stdout.count("test_planted.py") >= 1
    assert "--device cuda: there is " in done.stdout
