"""Identify the code that computes: versions of packages, git commit, hash of the source."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .host import cores, cpu_name
from .version import __version__


def versions() -> dict[str, str]:
    """List the versions of apr, Python and the packages that compute."""
    found = {"apr": __version__, "python": platform.python_version()}
    for package in ("numpy", "numba", "scipy-openblas64", "tokenizers"):
        with suppress(PackageNotFoundError):  # a GPU can do without the CPU's packages
            found[package] = version(package)
    return found


def circumstances() -> dict[str, Any]:
    """Describe when, by which code and on which machine something is measured, for the record of it."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": git_commit(),
        "machine": f"{cpu_name()}, {cores()} cores, {platform.system()} {platform.machine()}",
        "versions": versions(),
    }


def git_commit() -> str | None:
    """Read the commit of the checkout that apr runs from, with + when files differ; $APR_COMMIT where that is set, for
    copies of a checkout. None outside of one."""
    here = Path(__file__).resolve().parents[2]
    if "APR_COMMIT" in os.environ or not (here / ".git").exists():
        return os.environ.get("APR_COMMIT")
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+" if _git(here, "status", "--porcelain", "apr") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *args: str) -> str:
    # Without the optional lock: status would write the index, and leave its lock behind where the disk is full.
    command = ["git", "--no-optional-locks", *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def code_sha256() -> str:
    """Hash all of apr's own source, Python and CUDA, by path."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cu", ".cuh", ".html")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
