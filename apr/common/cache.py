"""The cache where it cannot be written, and where nothing is to be kept."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from .errors import IOFailure
from .host import cache_dir
from .printable import printable
from .temporary import is_writable, private_temporary

Made = TypeVar("Made")


def in_cache(name: str, make: Callable[[Path], Made]) -> Made:
    """Make something in a folder of the cache, or find it there; where the cache cannot be written, among temporary files.

    Raises IOFailure, which names APR_CACHE where that is set."""
    folder, given = cache_dir() / name, os.environ.get("APR_CACHE")
    # A cache that cannot be written may have what is needed.
    if given or folder.is_dir() or is_writable(folder):
        try:
            return make(folder)
        except IOFailure as e:
            if is_writable(folder):
                raise
            if given:
                raise IOFailure(
                    f"APR_CACHE={given} cannot be written ({e}); set it to a folder that can"
                ) from None
    temporary = private_temporary("cache")
    if temporary is None:
        raise IOFailure(f"{folder}: cannot be written; set APR_CACHE to a folder that can")
    print(
        printable(
            f"apr: {folder} cannot be written; {temporary / name} takes its place (APR_CACHE names another)"
        ),
        file=sys.stderr,
    )
    return make(temporary / name)


@contextmanager
def throwaway_cache(*names: str) -> Iterator[None]:
    """Let a copy of these folders take the place of the cache: what is written into it is gone at the end of the block."""
    with ExitStack() as stack:
        try:
            copy = stack.enter_context(TemporaryDirectory(prefix="apr-", ignore_cleanup_errors=True))
        except OSError:  # no place for temporary files: nothing is read then, and nothing written
            copy = os.devnull
        for name in names:
            with suppress(OSError):  # what cannot be read is not in the cache
                shutil.copytree(cache_dir() / name, Path(copy) / name)
        before = os.environ.get("APR_CACHE")
        os.environ["APR_CACHE"] = copy
        try:
            yield
        finally:
            if before is None:
                del os.environ["APR_CACHE"]
            else:
                os.environ["APR_CACHE"] = before
