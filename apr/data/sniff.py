"""Tell what a file is by its first bytes, where its name is of another kind, and how it becomes records."""

from __future__ import annotations

import codecs
from pathlib import Path

from ..common.errors import AprError
from ..common.files import opened
from ..common.shell import python, word

TABLES = (".csv", ".tsv")
HEAD_BYTES = 4096
TAR_AT, TAR = 257, b"ustar"
_ARROW = (
    "import sys, pyarrow.ipc, pyarrow.parquet; pyarrow.parquet.write_table(pyarrow.ipc.{open}(sys.argv[1]).read_all(), "
    "'data.parquet')"
)  # fmt: skip
_AS_PARQUET = "an Arrow file; write it as Parquet: "
_SQLITE = "an SQLite database; write a table as JSON: sqlite3 -json {path} 'select * from T' | jq -c '.[]' > data.jsonl"
# First bytes, what they begin, and what to do.
MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "packed by gzip; give it a name with .gz, such as data.jsonl.gz; an archive of files is to be unpacked"),
    (b"(\xb5/\xfd", "packed by zstd; give it a name with .zst, such as data.jsonl.zst"),
    (b"\xfd7zXZ\x00", "packed by xz; give it a name with .xz, such as data.jsonl.xz"),
    (b"BZh", "packed by bzip2; give it a name with .bz2, such as data.jsonl.bz2"),
    (b"PAR1", "a Parquet file; give it a name with .parquet"),
    (b"ARROW1", _AS_PARQUET + python(_ARROW.replace("{open}", "open_file")) + " {path}"),
    (b"\xff\xff\xff\xff", _AS_PARQUET + python(_ARROW.replace("{open}", "open_stream")) + " {path}"),
    (b"SQLite format 3\x00", _SQLITE),
    (b"PK\x03\x04", "a zip archive or a spreadsheet; unpack it, or save the sheet as .csv"),
    (b"\x93NUMPY", "an array of NumPy; token ids are shards of --dataset"),
    (b"\x80\x04\x95", "a pickle, which is never loaded; write it as JSON Lines"),
)  # fmt: skip


def kind_of(path: Path) -> str:
    """Name a binary format by its first bytes, with the next thing to do; "" for others."""
    head = _head(path)
    if _is_text(head):
        return ""
    if head[TAR_AT : TAR_AT + len(TAR)] == TAR:
        return f"a tar archive; unpack it and give the folder: tar -xf {word(path)}"
    advice = next((advice for magic, advice in MAGIC if head.startswith(magic)), "")
    return advice.replace("{path}", word(path))


def table_as_records(path: Path) -> str:
    """Write the command that makes JSON Lines of a table: its encoding and delimiter as Excel and others write them."""
    head = _head(path)
    # As codecs they drop the byte order mark, which would be part of the first column's name.
    encoding = "utf-16" if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    line = head.decode(encoding, "replace").split("\n", 1)[0]
    counts = {d: line.count(d) for d in (",", ";", "\t")}
    most = max(counts, key=lambda d: counts[d])
    delimiter = most if counts[most] else "\t" if path.suffix.lower() == ".tsv" else ","
    spelled = {",": "", ";": ", delimiter=';'", "\t": ", delimiter='\\t'"}[delimiter]
    code = (
        "import csv, json, sys; [print(json.dumps(row)) for row in csv.DictReader(open(sys.argv[1], newline='', "
        f"encoding='{encoding}'){spelled})]"
    )
    return f"{python(code, path)} > data.jsonl"


def _is_text(head: bytes) -> bool:
    """Tell UTF-8 without NUL; the last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _head(path: Path) -> bytes:
    try:
        with opened(path) as (f, _):
            return f.read(HEAD_BYTES)
    except AprError:
        return b""
