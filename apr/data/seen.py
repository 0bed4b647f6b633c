"""A set of document hashes on disk, for corpora of any size."""

from __future__ import annotations

import contextlib
import sqlite3

from ..common.errors import IOFailure


class Seen:
    """A set of content hashes, in a file that SQLite removes by itself, with CACHE_KIB of it in memory.

    A hash is kept as its first 16 bytes: among 10^10 documents two different ones share them with a probability of
    10^-19."""

    CACHE_KIB = 64 << 10

    def __init__(self) -> None:
        with self._explained():
            self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
            for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{self.CACHE_KIB}"):
                self._db.execute(f"PRAGMA {pragma}")
            self._db.execute("CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID")
            self._db.execute("BEGIN")

    def add(self, sha256: str) -> bool:
        """Add a hash (hexadecimal); return True for a new one. Raises IOFailure without room for the file."""
        with self._explained():
            key = bytes.fromhex(sha256[:32])
            return self._db.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)).rowcount == 1

    def close(self) -> None:
        """Remove the file."""
        self._db.close()

    @contextlib.contextmanager
    def _explained(self):  # type: ignore[no-untyped-def]
        try:
            yield
        except sqlite3.Error as e:
            raise IOFailure(
                f"the set of documents seen: {e}; it lies in the folder for temporary files: make room there, or set "
                "SQLITE_TMPDIR to a folder with room"
            ) from e
