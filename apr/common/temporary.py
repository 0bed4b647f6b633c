"""Folders for what is kept only as long as the system keeps temporary files: where no better place can be written."""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
from functools import cache
from pathlib import Path


@cache
def private_temporary(name: str) -> Path | None:
    """Make a folder of this user's that nobody else can write, the same for all processes; None where there is no place.

    Who else has a folder of the name gets nothing: then it is a new one, and gone with the process."""
    try:
        folder = Path(tempfile.gettempdir()) / f"apr-{os.getuid()}"
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            if not _is_private(folder):
                folder = Path(tempfile.mkdtemp(prefix="apr-"))
                atexit.register(shutil.rmtree, folder, ignore_errors=True)
        inner = folder / name
        inner.mkdir(exist_ok=True)
        return inner if is_writable(inner) else None
    except OSError:
        return None


def place_for_matplotlib() -> None:
    """Let Matplotlib keep its list of fonts among temporary files where the user's folders cannot be written: it would make a
    new one each time, and say so."""
    places = (("XDG_CONFIG_HOME", "~/.config"), ("XDG_CACHE_HOME", "~/.cache"))
    folders = [
        Path(os.environ.get(name) or os.path.expanduser(usual)) / "matplotlib" for name, usual in places
    ]
    if "MPLCONFIGDIR" not in os.environ and not all(map(is_writable, folders)):
        folder = private_temporary("matplotlib")
        if folder is not None:
            os.environ["MPLCONFIGDIR"] = str(folder)


def is_writable(folder: Path) -> bool:
    """Tell whether files can be written into a folder, or into the first above it that is there."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _is_private(folder: Path) -> bool:
    status = os.lstat(folder)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
