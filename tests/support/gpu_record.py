"""The record of a run of the GPU tests, and what is wrong with one: CI has no GPU and reads the record."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "bench" / "gpu" / "tests.json"
ELSEWHERE = {"driver.py"}  # of apr/backends/cuda: no kernel depends on it
MOST_SKIPPED = 5  # tests of a whole run
MOST_SETTLED = 100  # tests that passed to one that failed by a fault of its own, mended since
SANITIZERS = {
    # tool: its options, and the line that counts what it found
    "memcheck": (("--report-api-errors", "no", "--padding", "512"), r"ERROR SUMMARY: (\d+) error"),
    "racecheck": ((), r"RACECHECK SUMMARY: (\d+) hazard"),
}


def sources(root: Path = ROOT) -> dict[str, str]:
    """SHA-256 of every file that the cuda backend consists of, by path."""
    folder = root / "apr" / "backends" / "cuda"
    files = [p for p in folder.glob("*.py") if p.name not in ELSEWHERE]
    files += [p for p in (folder / "kernels").iterdir() if p.suffix in (".py", ".cu", ".cuh")]
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def problems(record: dict[str, Any], now: dict[str, str]) -> list[str]:
    """Why a record does not show that these sources work on a GPU; nothing when it does.

    "settled" of a record, written by hand, says of tests that failed what was wrong with the test itself (name ->
    reason). Such a test has not passed: the next record has none.
    """
    tests, then = record["tests"], record["sources"]
    settled = {name for name, why in record.get("settled", {}).items() if why}
    open_ = [name for name in tests["failed_names"] if name not in settled]
    found = [f"{name} failed" for name in open_]
    if len(settled) * MOST_SETTLED > tests["passed"]:
        found.append(
            f"{len(settled)} failures settled by hand, more than 1 to {MOST_SETTLED} tests that passed"
        )
    if record["arguments"]:
        found.append(f"only some tests ran: {record['arguments']}")
    if tests["skipped"] > MOST_SKIPPED:
        found.append(f"{tests['skipped']} tests were skipped, more than {MOST_SKIPPED}")
    failures = tests["failed"] + tests["errors"]
    if open_ or failures != len(tests["failed_names"]) or not tests["passed"]:
        found.append(f"{tests['passed']} passed, {tests['failed']} failed, {tests['errors']} errors")
    if not re.fullmatch(r"[0-9a-f]{40}\+?", record["commit"] or ""):
        found.append(f"commit {record['commit']!r} is none")
    changed = sorted(path for path in then.keys() | now.keys() if then.get(path) != now.get(path))
    found += [f"{path} has changed since" for path in changed]
    for tool in SANITIZERS:
        result = record["sanitizer"].get(tool, {"ran": False})
        if not result["ran"]:
            found.append(f"{tool} did not run")
        elif not result["clean"]:
            found.append(f"{tool} found errors")
    return found


def outcome(*junit: str, slowest: int = 10) -> dict[str, Any]:
    """Add up counts, names and times of pytest's --junitxml, of one run or several. A file that every run skips counts once."""
    counts = dict.fromkeys(("passed", "failed", "errors"), 0)
    failed, skipped, times = [], {}, []
    for case in (case for text in junit for case in ET.fromstring(text).iter("testcase")):
        name = f"{case.get('classname')}::{case.get('name')}"
        times.append((name, round(float(case.get("time", 0)), 2)))
        kinds = {child.tag: child for child in case}
        if "failure" in kinds or "error" in kinds:
            counts["failed" if "failure" in kinds else "errors"] += 1
            failed.append(name)
        elif "skipped" in kinds:
            skipped[name] = kinds["skipped"].get("message", "")
        else:
            counts["passed"] += 1
    times.sort(key=lambda t: -t[1])
    return {
        **counts,
        "skipped": len(skipped),
        "seconds": round(sum(t for _, t in times), 1),
        "failed_names": failed,
        "skipped_names": skipped,
        "slowest": dict(times[:slowest]),
    }


def sanitize(tool: str, sanitizer: str | None, seconds: float) -> dict[str, Any]:
    """Run the tests marked `sanitize` under compute-sanitizer: whether it ran, and found nothing."""
    if sanitizer is None:
        return {"ran": False, "why": "compute-sanitizer is not installed"}
    options, summary = SANITIZERS[tool]
    # The files that have such tests alone: under a sanitizer even collecting the others takes long.
    files = [str(f) for f in sorted(ROOT.glob("tests/*/test_*.py")) if "mark.sanitize" in f.read_text()]
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "sanitize", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(
            [sanitizer, "--tool", tool, "--error-exitcode", "99", *options, *tests],
            cwd=ROOT,
            env={**os.environ, "APR_SANITIZE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"ran": False, "why": f"not done after {seconds:g} s"}
    counted, passed = re.search(summary, done.stdout), re.search(r"(\d+) passed", done.stdout)
    if counted is None or passed is None:
        return {"ran": False, "why": f"exit {done.returncode}: {done.stdout[-1500:]}"}
    clean = done.returncode == 0 and int(counted[1]) == 0
    result: dict[str, Any] = {"ran": True, "clean": clean, "tests": int(passed[1]), "says": counted[0]}
    return result if clean else {**result, "output": done.stdout[-4000:]}
