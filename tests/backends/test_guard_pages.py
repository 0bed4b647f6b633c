"""Products and attention of the CPU read and write no byte outside of their arrays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are guarded by mprotect")


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    command = [sys.executable, str(ROOT / "tests" / "support" / "guard_pages.py"), *words]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)


def test_nothing_outside_is_touched() -> None:
    done = _run()
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_row_too_many_ends_the_process() -> None:
    assert _run("beyond").returncode == -signal.SIGSEGV
