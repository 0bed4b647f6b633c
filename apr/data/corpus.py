"""Documents: the text files of a folder, or of this Python's own standard library."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from ..errors import InputNotFound, IOFailure, MalformedFile, Refused

PATTERNS = ("*.py", "*.txt", "*.md")
# Folders of the standard library that are not its source: other people's packages, tests and caches.
NOT_STDLIB = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")


@dataclass(frozen=True)
class Document:
    """One text with the name it is reported under."""

    name: str
    text: str

    @property
    def data(self) -> bytes:
        """The text as UTF-8."""
        return self.text.encode()

    @cached_property
    def sha256(self) -> str:
        """Identity of the content, hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()


class Documents(Iterator[Document]):
    """Documents of a list of files, in its order; exact duplicates and empty files are left out and counted.

    Counters, valid so far: `count`, `duplicates`, `empty`, `not_utf8`.
    Raises MalformedFile at a file that is not UTF-8 (unless skip_not_utf8), Refused when none is left."""

    def __init__(self, root: Path, names: Sequence[str], skip_not_utf8: bool = False) -> None:
        self.root = root
        self.count = self.duplicates = self.empty = self.not_utf8 = 0
        self._names = iter(names)
        self._skip_not_utf8 = skip_not_utf8
        self._seen: set[str] = set()

    def __next__(self) -> Document:
        for name in self._names:
            document = self._read(name)
            if document is not None:
                self.count += 1
                return document
        if not self.count:
            raise Refused(
                f"{self.root}: no text: {self.empty} empty files, {self.not_utf8} that are not UTF-8"
            )
        raise StopIteration

    def _read(self, name: str) -> Document | None:
        path = self.root / name
        try:
            document = Document(name, path.read_bytes().decode())
        except UnicodeDecodeError as e:
            if not self._skip_not_utf8:
                raise MalformedFile(
                    f"{path}: not UTF-8 at byte {e.start}; convert or remove the file"
                ) from None
            self.not_utf8 += 1
            return None
        except OSError as e:
            raise InputNotFound(f"{path}: cannot be read: {e.strerror}") from None
        if not document.text:
            self.empty += 1
            return None
        if document.sha256 in self._seen:
            self.duplicates += 1
            return None
        self._seen.add(document.sha256)
        return document


def documents(path: str | Path, patterns: Sequence[str] = PATTERNS) -> Documents:
    """Documents of a file (whatever its name), or of the files below a folder whose names match.

    The order is that of the relative names. Raises InputNotFound, Refused when no name matches."""
    path = Path(path)
    if path.is_file():
        return Documents(path.parent, [path.name])
    if not path.is_dir():
        raise InputNotFound(f"{path}: no such file or folder")
    names = _files(path, patterns)
    if not names:
        raise Refused(f"{path}: holds no file named {', '.join(patterns)}")
    return Documents(path, names)


def stdlib_documents() -> Documents:
    """The .py files of the running Python's standard library, about 10 MB, without tests.

    A few of its files are not UTF-8 on purpose: they are skipped and counted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = _files(root, ["*.py"], NOT_STDLIB) if root.is_dir() else []
    if not names:
        raise InputNotFound(f"{root}: this Python has no standard library in source form")
    return Documents(root, names, skip_not_utf8=True)


def pieces(document: Document, max_bytes: int) -> Iterator[Document]:
    """Cut one long document at blank lines (or lines, without any) into some of about max_bytes UTF-8 bytes.

    Joined, the pieces are the document. A paragraph longer than max_bytes stays whole."""
    held: list[str] = []
    size = number = 0
    text = document.text
    parts = re.split(r"(?<=\n)(?=\r?\n)", text)  # before blank lines, or if there is none, at every line
    if len(parts) == 1:
        parts = text.splitlines(keepends=True)
    for part in parts:
        if held and size + len(part.encode()) > max_bytes:
            yield Document(f"{document.name}#{number}", "".join(held))
            held, size, number = [], 0, number + 1
        held.append(part)
        size += len(part.encode())
    if held:
        yield Document(f"{document.name}#{number}", "".join(held))


def is_held_out(sha256: str, fraction: float) -> bool:
    """True for about `fraction` of all documents, decided by the document's content hash alone.

    So a document lies on one side whatever else the corpus holds, and its copies lie on the same."""
    return int(sha256[:16], 16) < fraction * 2.0**64


def make_folder(path: str | Path) -> Path:
    """The folder, made with its parents where it is missing. Raises IOFailure."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise IOFailure(f"{path}: cannot make the folder: {e.strerror}") from None
    return path


def _files(root: Path, patterns: Sequence[str], skip: Sequence[str] = ()) -> list[str]:
    """Relative names (with /) of the regular files below root, sorted.

    Links to folders are followed, but every folder is entered once: a loop of links ends."""
    names = []
    seen = {_identity(root)}
    for folder, below, files in os.walk(root, followlinks=True, onerror=_unreadable):
        entered = []
        for name in sorted(set(below) - set(skip)):
            identity = _identity(Path(folder, name))
            if identity not in seen:
                seen.add(identity)
                entered.append(name)
        below[:] = entered
        for name in files:
            if any(fnmatchcase(name, p) for p in patterns) and _is_regular(Path(folder, name)):
                names.append(Path(folder, name).relative_to(root).as_posix())
    return sorted(names)


def _identity(folder: Path) -> tuple[int, int]:
    s = folder.stat()
    return s.st_dev, s.st_ino


def _is_regular(path: Path) -> bool:
    """False for a pipe or a device, where reading would wait for ever."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as e:
        raise InputNotFound(f"{path}: cannot be read: {e.strerror}") from None


def _unreadable(error: OSError) -> None:
    raise InputNotFound(f"{error.filename}: cannot be read: {error.strerror}") from None
