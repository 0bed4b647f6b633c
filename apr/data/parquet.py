"""Documents and records of a Parquet file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from ..common.errors import UsageError
from ..common.packages import pip_install
from .documents import Document, Item
from .jsonl import listed
from .source import Skipped, Source, Unusable
from .utf8 import bad_byte

# Rows that are held at once, fewer where they are long.
BATCH_ROWS = 256
BATCH_BYTES = 16 << 20


def read_parquet(source: Source, keys: Sequence[str], advance: Callable[[int], None]) -> Iterator[Item]:
    """Yield the document or Skipped of each row; keys: path to the text column."""
    return _read(
        source,
        advance,
        lambda schema: _check_column(schema, keys),
        lambda file, group: _row_batches(file, group, keys),
        lambda name, value: _cell(name, value, keys),
    )


def read_parquet_records(
    source: Source, parse: Callable[[str, Any], Item], advance: Callable[[int], None]
) -> Iterator[Item]:
    """Yield parse(name, row), a document or Skipped, for each row, an object with all its columns."""

    def batches(file: Any, group: int) -> Iterator[list[Any]]:
        rows = _rows_at_once(file, group)
        found = file.iter_batches(rows, row_groups=[group], use_threads=False)
        return ([as_json(row) for row in b.to_pylist(maps_as_pydicts="lossy")] for b in found)

    return _read(source, advance, lambda schema: None, batches, parse)


def as_json(value: Any) -> Any:
    """Replace what JSON has no kind for: bytes by the text they are in UTF-8, others, as of a picture, by an object that is no
    text and not empty; dates, decimals and the like by their text."""
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, list):
        return [as_json(v) for v in value]
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            return value.decode()
        return {"bytes": len(value)}
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _read(
    source: Source,
    advance: Callable[[int], None],
    check: Callable[[Any], None],
    batches: Callable[[Any, int], Iterator[list[Any]]],
    parse: Callable[[str, Any], Item],
) -> Iterator[Item]:
    """Yield what each row is parsed to. batches(file, group): the values of the rows of a group."""
    pa, pq, _ = pyarrow_modules()
    # The last row read, counted from 1.
    row = 0
    try:
        with pq.ParquetFile(
            source.path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
        ) as file:
            check(file.schema_arrow)
            total = 0
            for group in range(file.num_row_groups):
                total += file.metadata.row_group(group).num_rows
                try:
                    for values in batches(file, group):
                        for value in values:
                            row += 1
                            yield parse(f"{source.name}:{row}", value)
                        advance(source.size * row // max(1, file.metadata.num_rows))
                    if row != total:
                        raise pa.ArrowInvalid("fewer rows than the footer says")
                except _damages(pa) as e:
                    detail = f"rows {row + 1} to {total} are lost: {_first_line(e)}"
                    yield Skipped(f"{source.name}:{row + 1}", "corrupt archive", detail)
                    row = total
    except Unusable as e:
        yield Skipped(source.name, e.reason, e.detail)
    except _damages(pa) as e:
        reason = "unreadable" if isinstance(e, OSError) and e.errno else "corrupt archive"
        yield Skipped(source.name, reason, _first_line(e))


def pyarrow_modules() -> Any:
    """Import (pyarrow, pyarrow.parquet, pyarrow.compute). Raises UsageError where they are missing."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as e:
        raise UsageError(f"reading Parquet needs pyarrow ({e}): {pip_install('pyarrow')}") from None
    return pyarrow, pyarrow.parquet, pyarrow.compute


def _damages(pa: Any) -> tuple[type[BaseException], ...]:
    """List the exceptions of pyarrow for a damaged file; MemoryError for a length that is no length."""
    return (pa.ArrowException, OSError, ValueError, MemoryError)


def _check_column(schema: Any, keys: Sequence[str]) -> None:
    """Raise Unusable for a file without the column, or with a column that is no text."""
    pa = pyarrow_modules()[0]
    fields: Any = schema
    kind: Any = None
    for depth, key in enumerate(keys):
        name = ".".join(keys[: depth + 1])
        if kind is not None and not pa.types.is_struct(kind):
            raise Unusable("no field", f"no column {name}; {'.'.join(keys[:depth])} is {kind}, not a struct")
        names = [field.name for field in fields]
        if names.count(key) != 1:
            raise Unusable("no field", f"{names.count(key) or 'no'} column {name}; there is {listed(names)}")
        kind = fields.field(key).type
        fields = kind
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(text) or pa.types.is_large_string(text) or pa.types.is_string_view(text)):
        raise Unusable("not a string", f"column {'.'.join(keys)} is {kind}")


def _row_batches(file: Any, group: int, keys: Sequence[str]) -> Iterator[list[bytes | None]]:
    """Yield the column's values in a row group, as bytes: pyarrow does not check that a string is UTF-8."""
    pa, _, compute = pyarrow_modules()
    rows = _rows_at_once(file, group)
    for batch in file.iter_batches(rows, row_groups=[group], columns=[keys[0]], use_threads=False):
        column = batch.column(0)
        for key in keys[1:]:
            column = compute.struct_field(column, key)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        yield column.cast(pa.large_binary()).to_pylist()


def _rows_at_once(file: Any, group: int) -> int:
    meta = file.metadata.row_group(group)
    return max(1, min(BATCH_ROWS, BATCH_BYTES * meta.num_rows // max(1, meta.total_byte_size)))


def _cell(name: str, value: bytes | None, keys: Sequence[str]) -> Item:
    if value is None:
        return Skipped(name, "not a string", f"{'.'.join(keys)} is null")
    try:
        text = value.decode()
    except UnicodeDecodeError as e:
        return Skipped(name, "not UTF-8", bad_byte(e, e.start))
    return Document(name, text) if text else Skipped(name, "empty", f"{'.'.join(keys)} has no characters")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
