"""Files of unknown origin: opened, read and parsed so that what they hold cannot hang the process, exhaust its memory, or
come out as anything but an AprError. Every file that a user or another file names is opened here.

A name that the user gives may lead anywhere, through links too. A name that comes out of a file is for its reader to
judge: it must be the plain name of a file beside that one.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Never

from .errors import InputNotFound, IOFailure, MalformedFile
from .units import plural

MAX_TEXT = 100_000_000  # bytes; the limit of the safetensors library for its header, three times the largest tokenizer
MAX_DEPTH = (
    100  # objects and lists inside each other: comparing, printing and writing a value recurse as deep
)
# Values in one JSON text, each of up to 120 bytes of memory: those of a vocabulary of a million ids with their scores.
MAX_VALUES = 1 << 22
CHUNK_BYTES = 1 << 22  # that are hashed at once
MAX_LINE = 1 << 24  # bytes of a line of a log
# UTF-32 before UTF-16, whose mark its mark begins with.
_MARKS = (
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# A string of JSON, also one without an end: a search that failed there would begin again at every escaped quote behind it.
STRING = r'"(?:[^"\\]++|\\[\s\S])*+"?'
_STRING = re.compile(STRING)


@contextmanager
def opened(path: Path, what_to_try: str = "") -> Iterator[tuple[BinaryIO, int]]:
    """An open file and its length in bytes; what_to_try is for the message when it is not there.

    Raises InputNotFound, also for a folder, a pipe or a device; IOFailure."""
    f = _open(path, f"; {what_to_try}" if what_to_try else "")
    try:
        with f:
            yield f, os.fstat(f.fileno()).st_size
    except OSError as e:
        raise IOFailure(f"{path}: cannot read: {e}") from e


def _open(path: Path, hint: str) -> BinaryIO:
    cause: Exception | None = None
    try:
        # Opening a pipe would wait for its other side, and opening a device may do something: neither is touched.
        if stat.S_ISREG(os.stat(path).st_mode):
            return open(path, "rb")
        kind = "is a folder" if os.path.isdir(path) else "is not a file but a pipe or a device"
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        if isinstance(e, OSError) and e.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise IOFailure(f"{path}: cannot read: {e.strerror}; check its name and its rights") from e
        kind = "is not a file, but a link that leads nowhere" if os.path.lexists(path) else "no such file"
        cause = e
    raise InputNotFound(f"{path}: {kind}{hint}") from cause


def real(path: str | Path) -> Path:
    """Follow links, as far as they lead somewhere: Path.resolve raises RuntimeError for a link in a circle."""
    return Path(os.path.realpath(path))


def sha256_of(path: Path) -> tuple[str, int]:
    """Hash a file: (SHA-256, length in bytes), as far as it reached when it was opened.

    Raises InputNotFound, IOFailure."""
    digest, done = hashlib.sha256(), 0
    with opened(path) as (f, size):
        while piece := f.read(min(CHUNK_BYTES, size - done)):
            digest.update(piece)
            done += len(piece)
    return digest.hexdigest(), done


def lines_of(f: BinaryIO, source: str) -> Iterator[bytes]:
    """Yield the lines of an open file, with their ends. Raises MalformedFile: one of more than MAX_LINE bytes."""
    for number in itertools.count(1):
        line = f.readline(MAX_LINE + 1)
        if not line:
            return
        if len(line) > MAX_LINE:
            raise MalformedFile(
                f"{source}: line {number} has more than {MAX_LINE} bytes; is it the right file?"
            )
        yield line


def read_text(path: Path, what_to_try: str = "") -> str:
    """The text of a UTF-8 file of at most MAX_TEXT bytes. Raises InputNotFound, MalformedFile, IOFailure."""
    return text_of(read_bytes(path, what_to_try), str(path))


def read_bytes(path: Path, what_to_try: str = "") -> bytes:
    """The bytes of a file, at most MAX_TEXT of them. Raises InputNotFound, MalformedFile, IOFailure."""
    with opened(path, what_to_try) as (f, size):
        if size > MAX_TEXT:
            raise MalformedFile(
                f"{path}: {plural(size, 'byte')}; no file of this kind has more than {MAX_TEXT}"
            )
        return f.read(size)


def text_of(data: bytes, source: str) -> str:
    """Decode the bytes of a whole file, without the byte order mark with which Windows begins a text.

    Raises MalformedFile: not UTF-8."""
    length, encoding = byte_order_mark(data)
    if encoding != "UTF-8":
        raise MalformedFile(
            f"{source}: {encoding} by its byte order mark; convert it with iconv -f {encoding} -t UTF-8"
        )
    try:
        return data[length:].decode("utf-8")
    except UnicodeDecodeError as e:
        raise MalformedFile(
            f"{source}: not UTF-8 at byte {length + e.start}; is it the right file?"
        ) from None


def byte_order_mark(head: bytes) -> tuple[int, str]:
    """Find the byte order mark at the beginning of a file: (its length, its encoding); (0, "UTF-8") without one."""
    return next(((len(mark), encoding) for mark, encoding in _MARKS if head.startswith(mark)), (0, "UTF-8"))


def parse_value(text: str | bytes, source: str, unique: bool = False) -> Any:
    """The value of a JSON text. unique: a key that occurs twice in an object is an error, else the last wins.

    Raises MalformedFile for what is not JSON (NaN, infinity and numbers as large included), more than MAX_VALUES values,
    values more than MAX_DEPTH deep, and halves of surrogate pairs, which no file could take up again."""
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        check_values(text, source)
        value = json.loads(
            text, parse_constant=_constant, parse_float=_finite, object_pairs_hook=_unique if unique else None
        )
        text.encode()
        if re.search(r"\\u[dD][89a-fA-F]", text):  # an escape that may lack its other half
            json.dumps(value, ensure_ascii=False).encode()
        _check_depth(value)
    except RecursionError:
        raise MalformedFile(f"{source}: not JSON that can be read: nested too deeply") from None
    except UnicodeEncodeError:
        raise MalformedFile(f"{source}: holds a lone surrogate, which is no character") from None
    except ValueError as e:  # also bad UTF-8, and integers of more digits than Python reads
        raise MalformedFile(f"{source}: not JSON that can be read: {e}; is the file whole?") from None
    return value


def parse_json(text: str | bytes, source: str, unique: bool = False) -> dict[str, Any]:
    """The object of a JSON text: see parse_value. Raises MalformedFile, also for another value."""
    value = parse_value(text, source, unique)
    if not isinstance(value, dict):
        raise MalformedFile(f"{source}: holds {short(value)}, not an object")
    return value


def check_values(text: str, source: str) -> None:
    """Count the values of JSON before they take memory. Raises MalformedFile: more than MAX_VALUES."""
    if _marks(text) > MAX_VALUES and (values := _marks(_STRING.sub("", text))) > MAX_VALUES:
        raise MalformedFile(
            f"{source}: about {plural(values, 'value')}; no file of this kind has more than {MAX_VALUES:,}"
        )


def _marks(text: str) -> int:
    # Each value but the first has one of them before it.
    return sum(map(text.count, ",:[{"))


def _constant(word: str) -> Never:
    raise ValueError(f"{word} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:20]} is too large a number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"key {short(twice)} is there twice in one object")
    return out


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        boxes = [x for x in level if isinstance(x, dict | list)]
        if not boxes:
            return
        level = [x for box in boxes for x in (box.values() if isinstance(box, dict) else box)]
    raise ValueError(f"nested too deeply, more than {MAX_DEPTH} objects and lists inside each other")


def short(value: Any) -> str:
    """A value for a message: its repr, or what it is where that would be long."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    try:
        text = ascii(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


def make_folder(path: str | Path) -> Path:
    """The folder, made with its parents where it is missing. Raises IOFailure."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise IOFailure(f"{path}: cannot make the folder: {e.strerror}") from None
    return path


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises InputNotFound, IOFailure; MalformedFile names the line where it stops being JSON."""
    return parse_value(read_text(path), str(path))
