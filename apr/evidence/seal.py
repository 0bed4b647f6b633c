"""evidence.json: the SHA-256 of every file of a run that has ended, and of itself, so that no byte can change unseen."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..common.atomic import write_text
from ..common.errors import InputNotFound, MalformedFile
from ..common.files import read_json, read_text, sha256_of
from ..common.units import plural

FORMAT, EVIDENCE = "apr-evidence-1", "evidence.json"
SIGNATURE = EVIDENCE + ".sig"  # of evidence.json, by a key of the user's: signature.py


def seal(run: Path) -> None:
    """Write evidence.json for a run directory as it stands. Raises IOFailure."""
    write_text(run / EVIDENCE, _text(hashes(run)))
    (run / SIGNATURE).unlink(missing_ok=True)  # of the evidence before


def resealed(run: Path, path: Path, text: str) -> None:
    """Write a text file into a run that has ended, and its new hash into evidence.json if all was as recorded before.

    Where anything else had changed the evidence stays as it was, so that the change is still found. Raises IOFailure."""
    whole = not compare(run)
    write_text(path, text)
    if whole:
        seal(run)


def hashes(run: Path) -> dict[str, dict[str, Any]]:
    """Hash each file in a run directory but evidence.json and its signature: {path inside: {"bytes", "sha256"}}, sorted."""
    found = sorted(name for name in _names(run) if not _why_not(run, name))
    with ThreadPoolExecutor() as pool:  # hashing does not hold the interpreter's lock
        digests = pool.map(lambda name: sha256_of(run / name), found)
        return {
            name: {"bytes": size, "sha256": digest}
            for name, (digest, size) in zip(found, digests, strict=True)
        }


def _names(run: Path) -> list[str]:
    """List everything in a run directory that is no folder, but evidence.json."""
    out = []
    for folder, _, names in os.walk(run):
        out += [os.path.relpath(os.path.join(folder, name), run) for name in names]
    return [name for name in out if name not in (EVIDENCE, SIGNATURE)]


def _why_not(run: Path, name: str) -> str:
    """Say why a name is left out of the evidence; "" for a file with a name that can be written down."""
    if not name.isprintable():
        return "has a name that cannot be written down"
    return "" if os.path.isfile(run / name) else "is no regular file"


def _text(files: dict[str, dict[str, Any]]) -> str:
    """Write evidence.json as text, in one way: any other byte in it is a change."""
    body = {"format": FORMAT, "files": files}
    own = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "sha256": own}, indent=1) + "\n"


def compare(run: Path) -> list[str]:
    """List the differences between a run directory and its evidence.json.

    Raises InputNotFound where there is none: the run has not ended, or was killed."""
    path = run / EVIDENCE
    if not path.is_file():
        raise InputNotFound(f"{path}: not there: the run has not ended, or it was killed; --resume ends it")
    recorded = read_json(path)
    files = recorded.get("files") if isinstance(recorded, dict) else None
    if not isinstance(files, dict) or recorded.get("format") != FORMAT:
        raise MalformedFile(f"{path}: not a record of {FORMAT}")
    out = []
    if read_text(path) != _text(files):
        out.append(f"{EVIDENCE} was changed: its own SHA-256 is another one")
    out += [f"{name} {why}" for name in sorted(_names(run)) if (why := _why_not(run, name))]
    found = hashes(run)
    for name in sorted(files.keys() | found.keys()):
        if name not in found:
            out.append(f"{name} is gone")
        elif name not in files:
            out.append(f"{name} was added")
        elif files[name] != found[name]:
            out.append(
                f"{name} was changed: {plural(found[name]['bytes'], 'byte')}, SHA-256 {found[name]['sha256'][:12]}"
            )
    return out
