"""What a command prints finds no room, or no reader: exit 7 with one line, or 0; never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = "import sys; from apr.cli.main import main; sys.exit(main())"
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    "args", [["plan", "--model", "llama-demo", "--seq-length", "16"], ["completion", "bash"], ["--help"]]
)
def test_a_full_disk_behind_the_output(args: list[str]) -> None:
    """Of output that waits until the end, too."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", CODE, *args],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=ENV,
            check=False,
        )
    assert done.returncode == 7
    assert done.stderr.count("\n") == 1
    assert "output: No space left on device" in done.stderr


def test_a_full_disk_behind_the_errors() -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-c", CODE, "plan", "--model", "none-such"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True, env=ENV, check=False)
    assert (done.returncode, done.stdout) == (3, "")


def test_the_reader_goes_away() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-c", CODE, "completion", "bash"]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, env=ENV, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, "")
