"""Find the files of a corpus, in a fixed order."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..common.errors import InputNotFound, Refused
from ..common.hub import hub_name
from ..common.shell import python
from .json_records import why_no_records
from .sniff import TABLES, kind_of, table_as_records
from .source import Compression, Kind, Skipped, Source

COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".xz": "xz", ".bz2": "bz2"}
JSONL_SUFFIXES = (".jsonl", ".ndjson")
_TEXT_SUFFIXES = (
    ".adb .ads .asm .awk .bash .bat .bib .c .cc .cfg .clj .cmake .conf .cpp .cs .css .csv .cu .cuh .cxx .d .dart .diff "
    ".el .elm .erl .ex .exs .f .f90 .for .fs .fsx .go .gradle .groovy .h .hh .hpp .hs .htm .html .hxx .ini .java .jl .js "
    ".jsx .kt .kts .lean .less .lisp .log .lua .m .markdown .md .mjs .mk .ml .mli .mm .nim .org .pas .patch .php "
    ".pl .pm .proto .ps1 .py .pyi .pyx .r .rb .rkt .rs .rst .s .sass .scala .scm .scss .sh .sql .srt .sv .svelte .swift "
    ".tcl .tex .text .tf .thy .toml .ts .tsv .tsx .txt .v .vb .vhd .vim .vue .xhtml .xml .yaml .yml .zig .zsh"
)
# Notes on a data set, of the Hub or of LLaMA-Factory, which are no records of it.
NOTES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())


class Sources(list[Source]):
    """Files found, and counts of those left out.

    left_out          files of other kinds in folders, by suffix
    folders_left_out  hidden and unwanted folders, by name
    repeated          files and folders reached a second time
    skipped           links to nothing, pipes, files without read permission
    """

    def __init__(self) -> None:
        super().__init__()
        self.left_out: Counter[str] = Counter()
        self.folders_left_out: Counter[str] = Counter()
        self.repeated = 0
        self.skipped: list[Skipped] = []

    def summary(self) -> str:
        """Describe the files left out, for a message; "" without any."""
        parts = [
            f"{total} {what} ({_most(counts)})"
            for what, counts in (
                ("files of other kinds", self.left_out),
                ("folders left out", self.folders_left_out),
            )
            if (total := sum(counts.values()))
        ]
        if self.repeated:
            parts.append(f"{self.repeated} reached a second time")
        if self.skipped:
            first = self.skipped[0]
            parts.append(f"{len(self.skipped)} that cannot be read (the first: {first.name}: {first.detail})")
        return ", ".join(parts)


def find_sources(inputs: Sequence[str | Path], skip_folders: Sequence[str] = ()) -> Sources:
    """Find the named files, and in folders those with a suffix of text, JSON, JSONL or Parquet, packed or not.

    Order: that of the inputs; in a folder that of the relative names as bytes. A file or folder that is reached twice,
    through links too, counts once. Folders whose name begins with a dot, __pycache__ and skip_folders are left out.
    Raises InputNotFound: an input that does not exist or cannot be read; Refused: no file at all, or one that is named
    and is a table, of another format than its name says, or .json without records."""
    finder = _Finder(skip_folders)
    for given in inputs:
        finder.add(os.fspath(given))
    sources = finder.sources
    if not sources:
        names = ", ".join(_printable(os.fspath(given)) for given in inputs) or "no input"
        there = sources.summary() or "nothing at all"
        raise Refused(
            f"{names}: no text, JSONL or Parquet file; there is {there}; a file that is named is read as text"
        )
    return sources


class _Finder:
    def __init__(self, skip_folders: Sequence[str]) -> None:
        self.sources = Sources()
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
        kind, compression, suffix = classify(given)
        if compression and suffix.startswith(".parquet"):
            raise Refused(f"{name}: a Parquet file in an archive cannot be read in parts; unpack it")
        if os.path.splitext(given.lower())[1] in TABLES:
            advice = f"write a record a line: {table_as_records(Path(given))}"
            raise Refused(
                f"{name}: a table of text; {advice}; a table that is text to train on needs a name of text (.txt)"
            )
        if not compression and kind != "parquet" and (what := kind_of(Path(given))):
            raise Refused(f"{name}: {what}")
        if kind == "json" and (
            why := why_no_records(Source(Path(given), name, kind, compression, status.st_size))
        ):
            raise Refused(f"{name}: {why}")
        self._add_file(given, name, kind or "text", compression, status)

    def _add_file(
        self, path: str, name: str, kind: Kind, compression: Compression, status: os.stat_result
    ) -> None:
        if self._first_time(status):
            self.sources.append(Source(Path(path), name, kind, compression, status.st_size))

    def _add_folder(self, root: str, status: os.stat_result) -> None:
        if not self._first_time(status):
            return
        files = sorted(self._walk(root), key=lambda file: os.fsencode(file[0]))
        _refuse_saved_datasets(root, {name for name, _ in files})
        for name, file_status in files:
            kind, compression, suffix = classify(name)
            path = os.path.join(root, name)
            if kind is None or os.path.basename(name) in NOTES:
                self.sources.left_out[_printable(suffix)] += 1
            elif why := _unreadable(path, file_status):
                self._skip(root, name, why)
            else:
                self._add_file(path, _below(root, name), kind, compression, file_status)

    def _walk(self, root: str) -> Iterator[tuple[str, os.stat_result]]:
        """Yield the relative names of everything below root that is no folder."""
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
                        self.sources.left_out["hidden"] += 1
                    else:
                        yield name, status
                elif entry.name.startswith(".") or entry.name in self._skip_folders:
                    self.sources.folders_left_out[_printable(entry.name)] += 1
                elif self._first_time(status):
                    below.append(name + "/")
            folders += reversed(below)

    def _first_time(self, status: os.stat_result) -> bool:
        identity = (status.st_dev, status.st_ino)
        new = identity not in self._seen
        self._seen.add(identity)
        self.sources.repeated += not new
        return new

    def _skip(self, root: str, name: str, why: str) -> None:
        self.sources.skipped.append(Skipped(_below(root, name), "unreadable", why))


def _refuse_saved_datasets(root: str, names: set[str]) -> None:
    """Raise Refused for files of `save_to_disk` of the library datasets: without its Arrow files, its notes would be read."""
    for name in names:
        folder, _, file = name.rpartition("/")
        if file.endswith(".arrow") and os.path.join(folder, "state.json") in names:
            code = "import sys, datasets; datasets.load_from_disk(sys.argv[1]).to_parquet('data.parquet')"
            raise Refused(
                f"{_printable(root)}: written by save_to_disk of the library datasets, as Arrow files, which are not read; "
                f"write it as Parquet: {python(code, _below(root, folder))}"
            )


def classify(name: str) -> tuple[Kind | None, Compression, str]:
    """Derive (kind, compression, suffix) from a name; kind None for an unknown suffix."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix, "")
    inner = os.path.splitext(stem)[1] if compression else suffix
    both = (inner + suffix if compression else suffix) or "no suffix"
    if inner in JSONL_SUFFIXES:
        return "jsonl", compression, both
    # Never text: of what looks like records, keys and braces would be learnt.
    if inner == ".json":
        return "json", compression, both
    if inner == ".parquet" and not compression:
        return "parquet", "", both
    return ("text" if inner in TEXT_SUFFIXES else None), compression, both


def _unreadable(path: str, status: os.stat_result) -> str:
    """Say why a file cannot be read, "" if it can; reading from a pipe or a device might wait for ever."""
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        kinds = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        return f"a {kinds.get(stat.S_IFMT(status.st_mode), 'device')}, not a file"
    return "" if os.access(path, os.R_OK) else "may not be read (permissions)"


def _unreachable(path: str, error: OSError) -> str:
    if os.path.islink(path):
        return f"a link to {_printable(os.readlink(path))}, which cannot be followed ({error.strerror})"
    if not isinstance(error, FileNotFoundError):
        return error.strerror or str(error)
    name = hub_name(path)
    return (
        f"no such file or folder; a data set of the Hub is hf://datasets/{name}"
        if name
        else "no such file or folder"
    )


def _below(root: str, name: str) -> str:
    return _printable(f"{root.rstrip('/')}/{name}".rstrip("/"))


def _printable(path: str) -> str:
    """Spell a path in text that can be written anywhere: bytes that are no UTF-8 as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _most(counts: Counter[str]) -> str:
    shown = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {n}" for name, n in shown[:5]) + (", ..." if len(shown) > 5 else "")
