"""Files appear whole or not at all, and in the place of regular files only.

A name that is written to is free or that of a regular file: what else stands there (a folder, a device, a pipe, a socket, a
link) is never replaced. Links are refused and not followed, for a folder of somebody else could lead anywhere; the folders
on the way to a file may be links.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import IOFailure, Refused

KINDS = (
    (stat.S_ISLNK, "a link; name the file that it leads to, or remove it"),
    (stat.S_ISDIR, "a folder; name a file"),
    (stat.S_ISFIFO, "a pipe; name a file"),
    (stat.S_ISSOCK, "a socket; name a file"),
    (lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode), "a device; name a file"),
)


def check_output(path: str | Path) -> Path:
    """Look at the place where a file is to be written. Raises IOFailure for all but a regular file or nothing."""
    path = Path(path)
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return path
    except OSError as e:
        raise IOFailure(explain(path, e)) from None
    if not stat.S_ISREG(mode):
        what = next((words for is_kind, words in KINDS if is_kind(mode)), "no regular file; name one")
        raise IOFailure(f"{path}: cannot write: is {what}")
    return path


def try_output(path: str | Path) -> Path:
    """Prove, before hours of work, that a file can be written: an empty one beside it is made and removed.

    Raises IOFailure."""
    path = check_output(path)
    _try(path)
    return path


def try_folder(path: str | Path) -> Path:
    """Prove that files can be written into a folder, which need not be there yet: nothing is made. Raises IOFailure."""
    path = Path(path)
    there = path
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise IOFailure(f"{path}: cannot make the folder: {there} is no folder")
    _try(there / "file")
    return path


def _try(path: Path) -> None:
    temporary = _temporary(path)
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        temporary.unlink()
    except OSError as e:
        raise IOFailure(explain(path, e)) from None


def _temporary(path: Path) -> Path:
    return path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file handle whose content takes the place of `path` when the block ends well.

    The bytes go to a temporary name in the same folder, reach the disk, and are then renamed. When
    the block raises, the temporary is removed and the previous file stays as it was. Raises
    IOFailure for every OSError, those of the block included, and for what check_output refuses.
    """
    path = check_output(path)
    temporary = _temporary(path)
    f: BinaryIO | None = None
    try:
        f = open(temporary, "xb")  # noqa: SIM115 -- closed before the rename
        yield f
        f.flush()
        os.fsync(f.fileno())
        f.close()
        os.replace(temporary, check_output(path))
        _sync_folder(path.parent)
    except BaseException as e:
        if f is not None:
            with suppress(OSError):  # closing flushes what is left, and that may fail again
                f.close()
            with suppress(OSError):
                temporary.unlink()
        if isinstance(e, OSError):
            raise IOFailure(explain(path, e)) from e
        raise


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Hold a folder against other processes that ask for it; it is free again when the process ends, however it does.

    doing: what the other process does, for the message. Raises Refused: it is held."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(
                f"{folder}: another process is {doing}; wait for it, or choose another folder"
            ) from None
        yield
    finally:
        os.close(fd)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text in one piece. Raises IOFailure."""
    with atomic_write(path) as f:
        f.write(text.encode("utf-8"))


def write_json(path: str | Path, obj: Any) -> None:
    """Write JSON in one piece, keys in the order given. Raises IOFailure.

    NaN and infinity are no JSON: ValueError, before the file is touched.
    """
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_figure(path: str | Path, figure: Any) -> None:
    """Write a figure of matplotlib in one piece, in the format that the name ends in, else as PNG. Raises IOFailure."""
    kind = Path(path).suffix[1:].lower()
    with atomic_write(path) as f:
        figure.savefig(f, format=kind if kind in figure.canvas.get_supported_filetypes() else "png")


def drawn(draw: Callable[[Path], Any], path: str | Path) -> None:
    """Draw a picture into a file. Raises IOFailure whatever is wrong, matplotlib included: figures are whole without it."""
    try:
        draw(Path(path))
    except IOFailure:
        raise
    except OSError as e:
        raise IOFailure(explain(Path(path), e)) from None
    except Exception as e:  # whatever a damaged library raises, when it is imported too
        raise IOFailure(f"{path}: no picture: {type(e).__name__}: {e}; check matplotlib") from None


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(fd)


def explain(path: Path, e: OSError) -> str:
    """Why a file cannot be written, and what to do."""
    folder = path.parent
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        free = "unknown"
        with suppress(OSError):
            free = f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB"
        return f"{path}: disk full ({e.strerror}), {free} free in {folder}; make room or write elsewhere"
    if not folder.is_dir():
        return f"{path}: cannot write: folder {folder} does not exist; create it first"
    if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path}: cannot write: {e.strerror}; check the rights of {folder} or write elsewhere"
    return f"{path}: cannot write: {e}"
