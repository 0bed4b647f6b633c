"""Which files a corpus consists of, in a fixed order, and their bytes, unpacked in bounded memory."""

from __future__ import annotations

import bz2
import lzma
import os
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ..common.errors import InputNotFound, Refused

Kind = Literal["text", "jsonl", "parquet"]
Compression = Literal["", "gz", "zst", "xz", "bz2"]

BLOCK = 1 << 20  # bytes that are unpacked, or read from a file that is not packed, at once
PACKED = 1 << 17  # bytes of an archive that are read at once
# A decoder of zstandard returns all that its input gives, and 4 bytes can give 128 KiB: here 32 MiB at most.
PACKED_ZST = 1 << 10
MEMORY_XZ = 1 << 28  # bytes; xz -9 needs a quarter of this, an archive may ask for 4 GiB

COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".xz": "xz", ".bz2": "bz2"}
JSONL = (".jsonl", ".ndjson")
_SUFFIXES = (
    ".adb .ads .asm .awk .bash .bat .bib .c .cc .cfg .clj .cmake .conf .cpp .cs .css .csv .cu .cuh .cxx .d .dart .diff "
    ".el .elm .erl .ex .exs .f .f90 .for .fs .fsx .go .gradle .groovy .h .hh .hpp .hs .htm .html .hxx .ini .java .jl .js "
    ".json .jsx .kt .kts .lean .less .lisp .log .lua .m .markdown .md .mjs .mk .ml .mli .mm .nim .org .pas .patch .php "
    ".pl .pm .proto .ps1 .py .pyi .pyx .r .rb .rkt .rs .rst .s .sass .scala .scm .scss .sh .sql .srt .sv .svelte .swift "
    ".tcl .tex .text .tf .thy .toml .ts .tsv .tsx .txt .v .vb .vhd .vim .vue .xhtml .xml .yaml .yml .zig .zsh"
)
TEXT = frozenset(_SUFFIXES.split())


@dataclass(frozen=True)
class Skipped:
    """Something that cannot be used: a file, or FILE:LINE, FILE:ROW or FILE#NUMBER in it."""

    name: str
    reason: str  # one of a few, to be counted by
    detail: str


class Unusable(Exception):
    """Why the stretch of data being read cannot be used; becomes a Skipped under its name."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Source:
    """One file; size in bytes on disk. The name is printable, whatever bytes the path has."""

    path: Path
    name: str
    kind: Kind
    compression: Compression
    size: int

    def blocks(
        self, start: int = 0, first: int = BLOCK, advance: Callable[[int], None] | None = None
    ) -> Iterator[bytes]:
        """The unpacked bytes from offset `start` on, BLOCK or somewhat more at once; at the end what is left.

        first: size of the first block of a file that is not packed. advance(n): n bytes of the file on disk are read.
        Raises Unusable, after all that could be read: unreadable, truncated archive, corrupt archive."""
        if self.compression:
            return _grouped(_from(start, self._unpacked(advance)))
        return self._raw(BLOCK, start, first, advance)

    def _raw(
        self,
        step: int,
        start: int,
        first: int,
        advance: Callable[[int], None] | None,
        single_from: int | None = None,
    ) -> Iterator[bytes]:
        """The bytes on disk, `step` at once, but one by one in the block that begins at single_from and behind it."""
        try:
            with open(self.path, "rb") as f:
                if start:
                    f.seek(start)
                at, size = start, first
                while block := f.read(size):
                    if single_from is not None and at >= single_from:
                        yield from (block[i : i + 1] for i in range(len(block)))
                    else:
                        yield block
                    at += len(block)
                    if advance:
                        advance(at)
                    if len(block) < size:
                        return
                    size = step
        except OSError as e:
            raise Unusable("unreadable", e.strerror or str(e)) from None

    def _unpacked(self, advance: Callable[[int], None] | None) -> Iterator[bytes]:
        """What the archive holds. Raises Unusable, after all that could be unpacked."""
        new: Callable[[], _Decoder] = _DECODERS[self.compression]
        step = PACKED_ZST if self.compression == "zst" else PACKED
        at = done = 0

        def moved(n: int) -> None:
            nonlocal at
            at = n
            if advance:
                advance(n)

        try:
            for block in _unpack(self._raw(step, 0, step, moved), new):
                yield block
                done += len(block)
        except Unusable as e:
            if e.reason != "corrupt archive":
                raise
            # A call of a decoder that fails keeps what it had unpacked before: give it the same bytes one by one.
            yield from _from(done, _unpack(self._raw(step, 0, step, None, single_from=at), new))


class _Decoder(Protocol):
    """What bz2 and lzma offer, and zlib and zstandard below."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Gzip:
    def __init__(self) -> None:
        self._z = zlib.decompressobj(31)

    needs_input = property(lambda self: not self._z.unconsumed_tail)
    eof = property(lambda self: self._z.eof)
    unused_data = property(lambda self: self._z.unused_data)

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return self._z.decompress(self._z.unconsumed_tail + data, max_length)


class _Zstandard:
    needs_input = True

    def __init__(self) -> None:
        import zstandard  # only who reads such a file needs it

        self._z, self._error = zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError

    eof = property(lambda self: self._z.eof)
    unused_data = property(lambda self: self._z.unused_data)

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        try:
            return self._z.decompress(data)  # not limited by max_length: PACKED_ZST is
        except self._error as e:
            raise ValueError(str(e)) from None


_DECODERS: dict[str, Callable[[], _Decoder]] = {
    "gz": _Gzip,
    "zst": _Zstandard,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, MEMORY_XZ),
    "bz2": bz2.BZ2Decompressor,
}


def _unpack(blocks: Iterator[bytes], new: Callable[[], _Decoder]) -> Iterator[bytes]:
    """All members, frames or streams of an archive, one after the other; zeros behind one are padding."""
    decoder, members = None, 0
    for data in blocks:
        out = b""
        # A decoder that has all its input may still hold output, if it gave as much as it was asked for.
        while data or (decoder and (not decoder.needs_input or len(out) >= BLOCK)):
            if decoder is None:
                data = data.lstrip(b"\0") if members else data
                if not data:
                    break
                decoder, members = new(), members + 1
            try:
                out = decoder.decompress(data, BLOCK)
            except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as e:
                raise Unusable("corrupt archive", _damage(e)) from None
            if out:
                yield out
            data = b""
            if decoder.eof:
                data, decoder = decoder.unused_data, None
    if decoder is not None:
        raise Unusable("truncated archive", "the file ends within the archive")


def _damage(error: Exception) -> str:
    text = str(error)
    if "too much memory" in text:
        return f"{text}; unpack it with zstd -d --long=31 and pack it with a smaller window"
    if "emory usage limit" in text:
        return f"{text}: more than {MEMORY_XZ >> 20} MiB; unpack it and pack it with a smaller dictionary"
    return text


def _from(start: int, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The bytes from offset start on."""
    for block in blocks:
        if start < len(block):
            yield block[start:] if start else block
        start = max(0, start - len(block))


def _grouped(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Blocks of at least BLOCK bytes; what is left comes last, before the error if there is one."""
    held: list[bytes] = []
    size = 0
    damage: tuple[str, str] | None = None  # an error kept here would keep the file open in a cycle
    try:
        for block in blocks:
            held.append(block)
            size += len(block)
            if size >= BLOCK:
                yield b"".join(held)
                held, size = [], 0
    except Unusable as e:
        damage = e.reason, e.detail
    if held:
        yield b"".join(held)
    if damage:
        raise Unusable(*damage)


class Sources(list[Source]):
    """The files found, and what was left out on the way.

    left_out: files in folders, by suffix. folders_left_out: hidden and unwanted folders, by name.
    repeated: how often a file or folder was reached again. skipped: links to nothing, pipes, what may not be read."""

    def __init__(self) -> None:
        super().__init__()
        self.left_out: Counter[str] = Counter()
        self.folders_left_out: Counter[str] = Counter()
        self.repeated = 0
        self.skipped: list[Skipped] = []

    def summary(self) -> str:
        """What was left out, for a message; empty if nothing was."""
        said = [
            f"{total} {what} ({_most(counts)})"
            for what, counts in (
                ("files of other kinds", self.left_out),
                ("folders left out", self.folders_left_out),
            )
            if (total := sum(counts.values()))
        ]
        if self.repeated:
            said.append(f"{self.repeated} reached a second time")
        if self.skipped:
            first = self.skipped[0]
            said.append(f"{len(self.skipped)} that cannot be read (the first: {first.name}: {first.detail})")
        return ", ".join(said)


def find_sources(inputs: Sequence[str | Path], skip_folders: Sequence[str] = ()) -> Sources:
    """The files named, and in folders those whose suffix says text, JSONL or Parquet, packed or not.

    In the order of the inputs; in a folder that of the relative names as bytes. A file or folder that is reached twice,
    through links too, counts once. Folders whose name begins with a dot, __pycache__ and skip_folders are left out.
    Raises InputNotFound: an input that does not exist or cannot be read; Refused: no file at all."""
    finder = _Finder(skip_folders)
    for given in inputs:
        finder.add(os.fspath(given))
    found = finder.found
    if not found:
        names = ", ".join(_printable(os.fspath(given)) for given in inputs) or "no input"
        there = found.summary() or "nothing at all"
        raise Refused(
            f"{names}: no text, JSONL or Parquet file; there is {there}; a file that is named is read as text"
        )
    return found


class _Finder:
    def __init__(self, skip_folders: Sequence[str]) -> None:
        self.found = Sources()
        self._skip_folders = {"__pycache__", *skip_folders}
        self._seen: set[tuple[int, int]] = set()

    def add(self, given: str) -> None:
        name = _printable(given)
        try:
            status = os.stat(given)
        except OSError as e:
            raise InputNotFound(f"{name}: {_unreachable(given, e)}; check the path") from None
        if why := _unreadable(given, status):
            raise InputNotFound(f"{name}: {why}; name a regular file or a folder that may be read")
        if stat.S_ISDIR(status.st_mode):
            self._add_folder(given, status)
            return
        kind, compression, suffix = _classify(given)
        if compression and suffix.startswith(".parquet"):
            raise Refused(f"{name}: a Parquet file in an archive cannot be read in parts; unpack it")
        self._add_file(given, name, kind or "text", compression, status)

    def _add_file(
        self, path: str, name: str, kind: Kind, compression: Compression, status: os.stat_result
    ) -> None:
        if self._first_time(status):
            self.found.append(Source(Path(path), name, kind, compression, status.st_size))

    def _add_folder(self, root: str, status: os.stat_result) -> None:
        if not self._first_time(status):
            return
        files = sorted(self._walk(root), key=lambda file: os.fsencode(file[0]))
        for name, file_status in files:
            kind, compression, suffix = _classify(name)
            path = os.path.join(root, name)
            if kind is None:
                self.found.left_out[_printable(suffix)] += 1
            elif why := _unreadable(path, file_status):
                self._skip(root, name, why)
            else:
                self._add_file(path, _below(root, name), kind, compression, file_status)

    def _walk(self, root: str) -> Iterator[tuple[str, os.stat_result]]:
        """Relative names of all that is no folder."""
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(os.path.join(root, folder)) as it:
                    entries = sorted(it, key=lambda entry: os.fsencode(entry.name))
            except OSError as e:
                self._skip(root, folder, e.strerror or str(e))
                continue
            below = []
            for entry in entries:
                name = folder + entry.name
                try:
                    status = entry.stat()
                except OSError as e:
                    self._skip(root, name, _unreachable(entry.path, e))
                    continue
                if not stat.S_ISDIR(status.st_mode):
                    if entry.name.startswith("."):
                        self.found.left_out["hidden"] += 1
                    else:
                        yield name, status
                elif entry.name.startswith(".") or entry.name in self._skip_folders:
                    self.found.folders_left_out[_printable(entry.name)] += 1
                elif self._first_time(status):
                    below.append(name + "/")
            folders += reversed(below)

    def _first_time(self, status: os.stat_result) -> bool:
        identity = (status.st_dev, status.st_ino)
        new = identity not in self._seen
        self._seen.add(identity)
        self.found.repeated += not new
        return new

    def _skip(self, root: str, name: str, why: str) -> None:
        self.found.skipped.append(Skipped(_below(root, name), "unreadable", why))


def _classify(name: str) -> tuple[Kind | None, Compression, str]:
    """Kind by suffix, None where it says nothing; compression; the suffix."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix, "")
    inner = os.path.splitext(stem)[1] if compression else suffix
    both = (inner + suffix if compression else suffix) or "no suffix"
    if inner in JSONL:
        return "jsonl", compression, both
    if inner == ".parquet" and not compression:
        return "parquet", "", both
    return ("text" if inner in TEXT else None), compression, both


def _unreadable(path: str, status: os.stat_result) -> str:
    """Why this cannot be read, or ""; reading from a pipe or a device might wait for ever."""
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        kinds = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        return f"a {kinds.get(stat.S_IFMT(status.st_mode), 'device')}, not a file"
    return "" if os.access(path, os.R_OK) else "may not be read (permissions)"


def _unreachable(path: str, error: OSError) -> str:
    if os.path.islink(path):
        return f"a link to {_printable(os.readlink(path))}, which cannot be followed ({error.strerror})"
    return "no such file or folder" if isinstance(error, FileNotFoundError) else error.strerror or str(error)


def _below(root: str, name: str) -> str:
    return _printable(f"{root.rstrip('/')}/{name}".rstrip("/"))


def _printable(path: str) -> str:
    """A path as text that can be written anywhere: bytes that are no UTF-8 as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _most(counts: Counter[str]) -> str:
    shown = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {n}" for name, n in shown[:5]) + (", ..." if len(shown) > 5 else "")
