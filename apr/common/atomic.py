"""Files appear whole or not at all, and in the place of regular files only.

A name that is written to is free or that of a regular file: what else stands there (a folder, a device, a pipe, a socket, a
link) is never replaced. Links are refused and not followed, for a folder of somebody else could lead anywhere; the folders
on the way to a file may be links.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any, BinaryIO

from .errors import IOFailure, Refused
from .temporary import place_for_matplotlib

# Name of a temporary file: that of the file, the number of the process, and chance.
LEFTOVER = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp", re.DOTALL)
# Name of the list of files that belong together, while they are written.
SEVERAL = "writing"
# Bytes after which the disk is asked for what was written: the system would begin when a tenth of the memory is filled, and
# whoever waits for the file would wait for nearly all of it at its end.
ASK_BYTES = 128 << 20
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
    the block raises, the temporary is removed and the previous file stays as it was; those of processes
    that were killed are removed too. Raises IOFailure for every OSError, those of the block included,
    and for what check_output refuses.
    """
    path = check_output(path)
    _clean_once(path.parent.absolute())
    temporary = path
    f: _Written | None = None
    try:
        temporary, f = _open_temporary(path)
        yield f
        f.sync()
        os.replace(temporary, check_output(path))
        _sync_folder(path.parent)
        # Last: with the file its lock goes, and a temporary without one is taken for a leftover.
        f.close()
    except BaseException as e:
        if f is not None:
            with suppress(OSError):  # what the disk was asked for, or what is left to flush, may fail again
                f.close()
            with suppress(OSError):
                temporary.unlink()
        if isinstance(e, OSError):
            raise IOFailure(explain(path, e)) from e
        raise


class _Written(BufferedWriter):
    """A new binary file whose bytes go to the disk, by a thread of its own, while more are written."""

    def __init__(self, path: Path) -> None:
        super().__init__(FileIO(path, "xb"), 1 << 16)
        self._since = 0
        self._asking: ThreadPoolExecutor | None = None
        self._asked: Future[None] | None = None

    def write(self, data: Any) -> int:
        """See io.BufferedWriter; raises OSError of what was asked for before, too."""
        n = super().write(data)
        self._since += n
        if self._since >= ASK_BYTES and (self._asked is None or self._asked.done()):
            self._wait()
            self.flush()
            self._asking, self._since = self._asking or ThreadPoolExecutor(1, thread_name_prefix="disk"), 0
            try:
                self._asked = self._asking.submit(to_disk, self.fileno())
            except RuntimeError:
                # The system gives no thread, or the interpreter ends: sync asks for all.
                self._since = -sys.maxsize
        return n

    def sync(self) -> None:
        """Wait until all is on the disk. Raises OSError."""
        self._wait()
        self.flush()
        os.fsync(self.fileno())

    def close(self) -> None:
        """See io.BufferedWriter; the number of the file is given back when nobody asks the disk for it any more."""
        if self._asking is not None:
            self._asking.shutdown()
        super().close()

    def _wait(self) -> None:
        """The system reports a failed write once: to the thread that asked for it."""
        asked, self._asked = self._asked, None
        if asked is not None:
            asked.result()


def to_disk(fd: int) -> None:
    """Wait until the bytes that an open file has are on the disk. Raises OSError."""
    getattr(os, "fdatasync", os.fsync)(fd)


def _open_temporary(path: Path) -> tuple[Path, _Written]:
    """Make a temporary file for a path, locked as long as it is open: by that others know that its process lives."""
    while True:
        temporary = _temporary(path)
        f = _Written(temporary)
        if _lock(f.fileno()) is not False and temporary.exists():
            return temporary, f
        # Another process has removed it before it was locked.
        f.close()


def _lock(fd: int) -> bool | None:
    """Lock an open file; False where another holds it, None where the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed, and the files of writing_several that they began.

    A file that is being written is locked, and stays. What cannot be removed stays without a word."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if LEFTOVER.fullmatch(name):
                with suppress(OSError, ValueError):  # ValueError: a name in a list that is none
                    _remove_leftover(folder, name)


_clean_once = functools.cache(remove_leftovers)


def _remove_leftover(folder: Path, name: str) -> None:
    fd = os.open(folder / name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or _lock(fd) is not True:
            return
        if name.startswith(f".{SEVERAL}."):
            names = os.read(fd, 1 << 20).decode("utf-8", "replace").split("\n")
            # With the last file the others are whole.
            if not os.path.lexists(folder / names[-1]):
                _remove(folder, [n for n in names if n == os.path.basename(n)])
        os.unlink(folder / name)
    finally:
        os.close(fd)


def _remove(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        with suppress(OSError, ValueError):
            (folder / name).unlink()


@contextmanager
def writing_several(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Write files of a folder that make sense together only, the last of `names` last.

    When the block raises, those that were not there before are removed; when the process is killed, the next one that
    writes into the folder does that."""
    remove_leftovers(folder)
    made = [name for name in names if not os.path.lexists(folder / name)]
    mark, f = _open_temporary(folder / SEVERAL)
    try:
        f.write("\n".join(made if names[-1] in made else ["", names[-1]]).encode())
        f.flush()
        yield
    except BaseException:
        _remove(folder, made)
        raise
    finally:
        with suppress(OSError):
            mark.unlink()
        f.close()


@contextmanager
def locked(folder: Path, doing: str, waiting: Callable[[], Any] | None = None) -> Iterator[None]:
    """Hold a folder against other processes that ask for it; it is free again when the process ends, however it does.

    doing: what the other process does, for the message. waiting: called once where another process holds the folder, which
    is then waited for. Raises Refused: it is held, and there is no `waiting`."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise Refused(
                    f"{folder}: another process is {doing}; wait for it, or choose another folder"
                ) from None
            waiting()
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text in one piece. Raises IOFailure."""
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise IOFailure(
            f"{path}: cannot write: {text[max(e.start - 40, 0) : e.end + 20]!r} is not UTF-8; a file or folder whose name "
            "is recorded must have a name in UTF-8: rename it"
        ) from None
    with atomic_write(path) as f:
        f.write(data)


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
    place_for_matplotlib()
    try:
        import matplotlib

        # Not by a matplotlibrc of the folder that apr runs in, which may be somebody else's: it can have LaTeX run.
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
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
