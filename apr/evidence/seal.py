"""evidence.json: the SHA-256 of every file of a run that has ended, and of itself, so that no byte can change unseen."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..common.atomic import write_text
from ..common.errors import InputNotFound, MalformedFile
from ..common.files import read_json, read_text, sha256_of
from ..common.units import plural

FORMAT, EVIDENCE = "apr-evidence-2", "evidence.json"
OLD_FORMAT = "apr-evidence-1"  # some have no files behind links
MAX_FILES = 100_000  # in a run; a link may lead to the root of the file system
SIGNATURE = EVIDENCE + ".sig"  # of evidence.json, by a key of the user's: signature.py


class Early:
    """Hash the files of a run by threads while its end is judged: for the seal, if they are the same files then.

    What is hashed is read from the disk, not as it was written: evidence.json says what lies there."""

    def __init__(self, run: Path) -> None:
        self.run, self._begun = run, dict[str, tuple[_Identity, Future[tuple[str, int]]]]()
        self._pools: list[ThreadPoolExecutor] = []

    def begin(self, under: str) -> None:
        """Begin with the files in a folder of the run."""
        pool = ThreadPoolExecutor(thread_name_prefix="sealing")
        for name in sorted(_names(self.run, under)):
            if not _why_not(self.run, name):
                path = self.run / name
                self._begun[name] = _identity(path), pool.submit(sha256_of, path)
        pool.shutdown(wait=False)
        self._pools.append(pool)

    def close(self) -> None:
        """Begin no hash any more: the interpreter would wait for all of them before it ends."""
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)

    def sha256_of(self, name: str) -> tuple[str, int]:
        """Hash a file of the run, now if it is another one than it was, or has changed."""
        identity, found = self._begun.get(name, (None, None))
        path = self.run / name
        if found is None or found.cancelled() or identity != _identity(path):
            return sha256_of(path)
        return found.result()


_Identity = tuple[int, ...]


def _identity(path: Path, follow: bool = True) -> _Identity:
    """Tell a file from another one by the same name, and from itself after a change: nobody sets the time of the last."""
    s = os.stat(path, follow_symlinks=follow)
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def seal(run: Path, early: Early | None = None) -> None:
    """Write evidence.json for a run directory as it stands. early: hashes that were begun before. Raises IOFailure."""
    _write(run, hashes(run, early))


def _write(run: Path, files: dict[str, dict[str, Any]], form: str = FORMAT) -> None:
    write_text(run / EVIDENCE, _text(files, form))
    (run / SIGNATURE).unlink(missing_ok=True)  # of the evidence before


def resealed(run: Path, path: Path, text: str) -> None:
    """Write a text file into a run that has ended, and its new hash into evidence.json if all was as recorded before.

    Where anything else had changed the evidence stays as it was, so that the change is still found. Raises IOFailure."""
    whole = not compare(run)
    write_text(path, text)
    if whole:  # and it vouches for no file that it did not vouch for before
        found, files = _recorded(run)
        name = os.path.relpath(os.path.realpath(path), os.path.realpath(run))
        _write(run, hashes(run, of={*files, name}), found)


def hashes(
    run: Path, early: Early | None = None, of: Collection[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Hash each file in a run directory but evidence.json and its signature, or those named in `of`: {path inside: {"bytes",
    "sha256"}}, sorted."""
    found = sorted(name for name in _names(run) if (of is None or name in of) and not _why_not(run, name))
    with ThreadPoolExecutor() as pool:  # hashing does not hold the interpreter's lock
        digests = pool.map((early or Early(run)).sha256_of, found)
        return {
            name: {"bytes": size, "sha256": digest}
            for name, (digest, size) in zip(found, digests, strict=True)
        }


def _names(run: Path, under: str = ".") -> list[str]:
    """List everything in a run directory, or a folder of it, that is no folder, but evidence.json."""
    return [
        name
        for folder, names in _walk(run, under)
        for x in names
        if (name := _inside(folder, x)) not in (EVIDENCE, SIGNATURE)
    ]


def _inside(folder: str, name: str) -> str:
    return os.path.normpath(os.path.join(folder, name))


def _walk(run: Path, under: str = ".") -> Iterator[tuple[str, list[str]]]:
    """Yield each folder of a run, as its path inside, with the names of all in it that is no folder: also those that links
    lead to, each once, for `ckpt` may lie on another disk; but not the run or what it lies in. Raises MalformedFile: more than
    MAX_FILES."""
    home = Path(os.path.realpath(run))
    seen, links, count = set[str](), [under], 0
    for link in links:  # grows: first the run without its links, for most of them lead back into it
        for path, folders, names in os.walk(run / link):
            folder, here = os.path.relpath(path, run), os.path.realpath(path)
            if here in seen or (link != "." and home.is_relative_to(here)):
                folders.clear()
                continue
            seen.add(here)
            links += sorted(_inside(folder, x) for x in folders if os.path.islink(os.path.join(path, x)))
            count += len(names) + 1
            if count > MAX_FILES:
                raise MalformedFile(f"{run / link}: more than {MAX_FILES:,} files; a run has some hundreds")
            yield folder, names


def standing(run: Path) -> dict[str, _Identity]:
    """Take down how each file and folder of a run stands. One that is written to or exchanged, and put back, stands otherwise."""
    out: dict[str, _Identity] = {}
    for folder, names in _walk(run):
        for name in ("", *names):
            path = run / folder / name
            out[_inside(folder, name)] = _identity(path, follow=path.exists())
    return out


def _why_not(run: Path, name: str) -> str:
    """Say why a name is left out of the evidence; "" for a file with a name that can be written down."""
    if not name.isprintable():
        return "has a name that cannot be written down"
    return "" if os.path.isfile(run / name) else "is no regular file"


def _text(files: dict[str, dict[str, Any]], form: str) -> str:
    """Write evidence.json as text, in one way: any other byte in it is a change."""
    body = {"format": form, "files": files}
    own = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "sha256": own}, indent=1) + "\n"


def compare(run: Path) -> list[str]:
    """List the differences between a run directory and its evidence.json.

    Raises InputNotFound where there is none: the run has not ended, or was killed."""
    found_format, files = _recorded(run)
    out = []
    if read_text(run / EVIDENCE) != _text(files, found_format):
        out.append(f"{EVIDENCE} was changed: its own SHA-256 is another one")
    there = {name: _why_not(run, name) for name in _names(run)}
    for name in unlisted(run):
        del there[name]
    out += [f"{name} {why}" for name, why in sorted(there.items()) if why]
    found = hashes(run, of=files)
    for name in sorted(files.keys() | {name for name, why in there.items() if not why}):
        if name not in files:
            out.append(f"{name} was added")
        elif name not in found:
            out.append(f"{name} is gone")
        elif files[name] != found[name]:
            out.append(
                f"{name} was changed: {plural(found[name]['bytes'], 'byte')}, SHA-256 {found[name]['sha256'][:12]}"
            )
    return out


def unlisted(run: Path) -> list[str]:
    """List the files behind links that evidence.json says nothing of, for an older version wrote it."""
    found, files = _recorded(run)
    if found != OLD_FORMAT:
        return []
    return [
        name
        for name in _names(run)
        if name not in files and any(os.path.islink(run / folder) for folder in Path(name).parents[:-1])
    ]


def _recorded(run: Path) -> tuple[str, dict[str, Any]]:
    """Read the format and the files of evidence.json. Raises InputNotFound, MalformedFile."""
    path = run / EVIDENCE
    if not path.is_file():
        raise InputNotFound(f"{path}: not there: the run has not ended, or it was killed; --resume ends it")
    recorded = read_json(path)
    files = recorded.get("files") if isinstance(recorded, dict) else None
    if not isinstance(files, dict) or recorded.get("format") not in (FORMAT, OLD_FORMAT):
        raise MalformedFile(f"{path}: not a record of {FORMAT}")
    return recorded["format"], files
