"""The commit of a checkout is read, and the checkout stays as it is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from apr.common import provenance


def test_reading_a_commit_writes_nothing(tmp_path: Path) -> None:
    def git(*args: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "apr").mkdir()
    (tmp_path / "apr" / "x.py").write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    os.utime(tmp_path / "apr" / "x.py", (1e9, 1e9))
    before = (tmp_path / ".git" / "index").read_bytes()
    assert provenance._git(tmp_path, "status", "--porcelain", "apr") == ""
    assert (tmp_path / ".git" / "index").read_bytes() == before
    # What is tested is there: git itself writes its index anew.
    git("status")
    assert (tmp_path / ".git" / "index").read_bytes() != before
