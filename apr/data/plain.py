"""Read the files of a corpus a second time, with Python's own decoders: their texts as a check has them, not a trainer."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, cast

from ..common.errors import MalformedFile
from ..common.files import check_values
from .jsonl import MAX_RECORD_BYTES
from .source import Source

# (name, bytes of UTF-8; None where it holds no text)
Text = tuple[str, bytes | None]
MARK = b"\xef\xbb\xbf"
HEAD_BYTES = 1 << 10  # that tell an array from lines
# Reasons to leave a file out that other decoders may not have.
DAMAGES = ("truncated archive", "corrupt archive", "unreadable")


class Unfollowed(Exception):
    """Raised where a file cannot be followed any further: damaged, or longer than a check reads."""


def open_plain(source: Source) -> BinaryIO:
    """Open the content of a file, unpacked."""
    file: Any
    if source.compression == "zst":
        # Imported here: only a reader of such files needs the package.
        import zstandard

        raw = open(source.path, "rb")  # noqa: SIM115  closed with its reader
        unpacked = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=True)
        file = io.BufferedReader(unpacked)
    else:
        openers: dict[str, Any] = {"gz": gzip.open, "xz": lzma.open, "bz2": bz2.open}
        file = openers.get(source.compression, open)(source.path, "rb")
    return cast(BinaryIO, file)


def beginning(source: Source, limit: int) -> tuple[bytes | None, bool]:
    """Read the first `limit` bytes of a text file, None where they hold no text; and whether they are all. Raises Unfollowed:
    damaged."""
    with _damage(source), open_plain(source) as f:
        data = f.read(limit + len(MARK) + 1)
    data = data.removeprefix(MARK)
    is_whole = len(data) <= limit
    if not is_whole:
        data = data[:limit]
    return data if data and b"\0" not in data and _is_utf8(data, is_whole) else None, is_whole


def records(source: Source, limit: int) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of each record of a JSON, JSON Lines or Parquet file; the value is None where it is no JSON.

    Raises Unfollowed: an array longer than `limit` bytes, or damaged."""
    if source.kind == "parquet":
        yield from _rows(source)
        return
    with _damage(source), open_plain(source) as f:
        head = f.read(HEAD_BYTES)
        is_array = head.removeprefix(MARK).lstrip()[:1] == b"["
        head += f.read(limit + len(MARK) + 1 - len(head)) if is_array else b""
    if is_array and source.kind != "json":
        is_array = _is_one_value(source, head.removeprefix(MARK).lstrip())
    if is_array:
        yield from _array(source, head, limit)
        return
    with _damage(source), open_plain(source) as f:
        for number, line in enumerate(iter(lambda: f.readline(MAX_RECORD_BYTES + 1), b""), 1):
            if len(line) > MAX_RECORD_BYTES:
                raise Unfollowed(f"{source.name}:{number} is a line of more than {MAX_RECORD_BYTES:,} bytes")
            line = line.removeprefix(MARK) if number == 1 else line
            if line.strip():
                yield f"{source.name}:{number}", value_of(line)


def _is_one_value(source: Source, text: bytes) -> bool:
    """Tell an array under .jsonl from lines that begin with one. Raises Unfollowed for what began as an array and has no end."""
    if isinstance(value_of(text), list):
        return True
    if re.match(rb"\[\s*[{\]]", text) and value_of(text.split(b"\n", 1)[0]) is None:
        raise Unfollowed(f"{source.name} is an array that is not whole, or longer than what is left to read")
    return False


def _array(source: Source, data: bytes, limit: int) -> Iterator[tuple[str, Any]]:
    if len(data) > limit:
        raise Unfollowed(f"{source.name} is an array longer than what is left to read")
    values = value_of(data.removeprefix(MARK))
    if not isinstance(values, list):
        raise Unfollowed(f"{source.name} is not whole")
    for number, value in enumerate(values, 1):
        yield f"{source.name}:{number}", value


def texts(source: Source, keys: Sequence[str], limit: int) -> Iterator[Text]:
    """Yield the texts of a file of records, JSON, JSON Lines or Parquet; keys: path to the text. Raises Unfollowed."""
    named = _rows(source, keys[0]) if source.kind == "parquet" else records(source, limit)
    for name, value in named:
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        try:
            yield name, value.encode() if isinstance(value, str) and value else None
        except UnicodeEncodeError:
            yield name, None


def _rows(source: Source, column: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield each row of a Parquet file, or its value in one column."""
    import pyarrow.parquet

    row = 0
    with _damage(source), pyarrow.parquet.ParquetFile(source.path) as file:
        for batch in file.iter_batches(64, columns=[column] if column else None):
            for value in batch.to_pylist(maps_as_pydicts="lossy"):
                row += 1
                yield f"{source.name}:{row}", value if column else _with_texts(value)


def _with_texts(value: Any) -> Any:
    """Decode the bytes at any depth of a row: some writers have texts so."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        inner = {k: _with_texts(v) for k, v in pairs}
        return inner if isinstance(value, dict) else [*inner.values()]
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def value_of(line: bytes) -> Any:
    """Parse JSON; None for none."""
    try:
        text = line.decode()
        check_values(text, "the record")
        return json.loads(text, parse_int=float)
    except (ValueError, RecursionError, MalformedFile):
        return None


def _is_utf8(data: bytes, is_whole: bool) -> bool:
    try:
        # Of a last character that is cut nothing is said.
        codecs.getincrementaldecoder("utf-8")().decode(data, is_whole)
    except UnicodeDecodeError:
        return False
    return True


class _damage:
    """Turn what a decoder raises into Unfollowed."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        packages = ("zstd", "pyarrow", "zstandard")
        if isinstance(error, OSError | EOFError | zlib.error | lzma.LZMAError | ValueError | MemoryError) or (
            error is not None and type(error).__module__.split(".")[0] in packages
        ):
            raise Unfollowed(f"{self.source.name} is damaged: {error}") from None
