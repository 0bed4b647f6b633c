"""Processes that this process has started and that run a script."""

from __future__ import annotations

import os
from pathlib import Path


def children_running(script: Path) -> list[str]:
    """Numbers of the processes of this one that have the script on their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().split(b"\0")
            parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        if str(script).encode() in line and parent == str(os.getpid()):
            found.append(entry.name)
    return found
