"""SIGINT and SIGTERM at every moment of a command's beginning: exit 130 with one line, and nothing half written.

Moments are counted by audit events, not by a clock: the n-th import, file opened or process started."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# From its first line on, apr is responsible; what Python does before is Python's.
TRY = """
import os, signal, sys
number, moments, folder, *args = sys.argv[1:]
sys.argv = ["apr", *args]
sys.path.insert(0, os.getcwd())

def run(n, kinds=("import", "open", "subprocess.Popen", "os.rename")):
    seen = [0]

    def hook(event, given):
        if event in kinds and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            seen[0] += 1
            if seen[0] == n:
                signal.raise_signal(getattr(signal, number))

    sys.addaudithook(hook)
    from apr.cli.main import main
    return main()

for n in eval(moments):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        fd = os.open(f"{folder}/said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1); os.dup2(fd, 2)
        sys.exit(run(n))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(n, status, repr(open(f"{folder}/said").read()))
"""


def ended(number: str, moments: str, folder: Path, *args: str) -> list[tuple[int, str]]:
    """(exit code, what was said) of a command that gets a signal, by moment."""
    (folder / "said").touch()
    command = [sys.executable, "-c", TRY, number, moments, str(folder), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    rows = [line.split(" ", 2) for line in done.stdout.splitlines()]
    return [(int(code), eval(text)) for _, code, text in rows]


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_while_a_command_begins(number: str, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for i in range(9):
        (tmp_path / "corpus" / f"{i}.txt").write_text(f"{i} some text to read. " * 40)
    args = ["tokenize", "train", str(tmp_path / "corpus"), "--vocab-size", "300", "-o", str(tmp_path / "out")]
    # Around 280 NumPy is imported, which makes an error of its own of what comes then.
    moments = "[*range(1, 10), *range(10, 275, 55), *range(277, 297, 3), *range(300, 450, 55), *range(450, 600, 10)]"
    found = ended(number, moments, tmp_path, *args)
    stopped = [text for code, text in found if code == 130]
    # Both before the command began and in it.
    assert {text.split("\n")[-2] for text in stopped} == {"apr: interrupted", "apr tokenize: interrupted"}
    assert len(stopped) > 20
    for code, text in found:
        if code == 130:
            assert re.fullmatch(r"(?s)(.*\n)?apr(?: \w+)?: interrupted\n", text), text
        else:
            # The signal would have come behind the end, or that of the time before did.
            assert code == 0 or "holds a tokenizer" in text, text
        assert "Traceback" not in text
        assert "Exception ignored" not in text
    names = {p.name for p in tmp_path.iterdir()} - {"corpus", "said"}
    assert names <= {"out"}
    assert not list(tmp_path.rglob("*.tmp"))
