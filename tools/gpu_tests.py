"""Run the tests that need a GPU and write down how they went: `make gpu-test`.

    python tools/gpu_tests.py                       all of them, then bench/gpu/tests.json
    python tools/gpu_tests.py --record FILE         write elsewhere
    python tools/gpu_tests.py --processes 8         in several processes, where pytest-xdist is installed
    python tools/gpu_tests.py -- -k rope            arguments for pytest

A handful of small tests (marker `sanitize`) runs again under compute-sanitizer's memcheck and racecheck
where that is installed. CI, which has no GPU, requires the record to be of the sources that it tests.
The checkout need not be installed; in a copy without .git, give the commit in $APR_COMMIT.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

import gpu_record

try:
    import numpy  # noqa: F401
    import pytest  # noqa: F401
except ImportError as e:
    sys.exit(f"{e.name} is missing in {sys.executable}: make test GPU=cuda13 (or cuda12) installs all of it")

from apr.backends.select import choose, cupy_packages
from apr.common.errors import AprError
from apr.common.provenance import git_commit

PACKAGES = (
    "numpy",
    "ml_dtypes",
    "nvidia-cublas",
    "nvidia-cublas-cu12",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
)
# The environment has plugins of pytest that are not ours: one that warns ends a run of which warnings are errors.
PLAIN = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def versions() -> dict[str, str]:
    """Python and the packages that compute, as far as they are installed as such."""
    found = {"python": platform.python_version(), **cupy_packages()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, default=gpu_record.RECORD, help="file to write")
    parser.add_argument(
        "--sanitizer-seconds", type=float, default=150, help="for each tool; 0: do not run them"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="run tests in so many at once, with pytest-xdist"
    )
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    args = parser.parse_args()
    try:
        device = choose("cuda").backend.describe()
    except AprError as e:
        print(f"{e.status}: {e}", file=sys.stderr)
        return e.exit_code
    before = gpu_record.sources()
    runs = [("gpu", [])]
    if args.processes > 1:
        runs = [
            ("gpu and not alone", ["-p", "xdist", "-n", str(args.processes), "--dist", "worksteal"]),
            ("gpu and alone", []),
        ]
    reports = []
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    # Beside other tests where several processes are asked for: the sanitizers wait for the CPU most of the time.
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(gpu_record.SANITIZERS)) as beside:

        def sanitize() -> dict[str, Future[dict[str, Any]]]:
            tools = gpu_record.SANITIZERS if args.sanitizer_seconds else ()
            return {
                t: beside.submit(gpu_record.sanitize, t, sanitizer, args.sanitizer_seconds) for t in tools
            }

        sanitized = sanitize() if args.processes > 1 else {}
        for which, several in runs:
            report = Path(folder) / f"{len(reports)}.xml"
            pytest_command = [sys.executable, "-m", "pytest", "-m", which, f"--junitxml={report}"]
            code = subprocess.run([*pytest_command, *several, *args.pytest], cwd=ROOT, env=PLAIN).returncode
            if not report.exists():
                return code
            reports.append(report.read_text())
        sanitized = sanitized or sanitize()
    tests = gpu_record.outcome(*reports)
    record = {
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "arguments": args.pytest,
        "device": device,
        "versions": versions(),
        "tests": tests,
        "sanitizer": {
            tool: sanitized[tool].result() if tool in sanitized else {"ran": False, "why": "not asked for"}
            for tool in gpu_record.SANITIZERS
        },
        "sources": before,
    }
    args.record.parent.mkdir(parents=True, exist_ok=True)
    args.record.write_text(json.dumps(record, indent=2) + "\n")
    found = gpu_record.problems(record, gpu_record.sources())
    print(f"{args.record}:", *(found or ["all is well"]), sep="\n  ")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
