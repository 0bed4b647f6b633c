"""What a command prints finds no room, or no reader: exit 7 with one line, or 0; never a traceback."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("args", "code"), [("completion bash", 0), ("plan --model none-such --json", 3)])
def test_streams_that_are_closed(closed: str, args: str, code: int, tmp_path: Path) -> None:
    """As from a daemon. Nothing that is opened later gets their numbers, and errors do not go into the document."""
    files = "import os; print([f.fileno() for f in [open(os.devnull)]], file=open('opened', 'w'))"
    program = CODE.replace("sys.exit(main())", f"code = main(); {files}; sys.exit(code)")
    command = f'"{sys.executable}" -c "{program}" {args} {closed}'
    done = subprocess.run(
        command,
        shell=True,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=ENV,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert int((tmp_path / "opened").read_text().strip("[]\n")) > 2
    assert "Traceback" not in done.stderr
    if closed == "2>&-" and code:
        assert set(json.loads(done.stdout)) == {"error", "status", "exit_code"}
