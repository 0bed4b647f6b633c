"""Hostile variants of files: of their bytes, of their JSON, and of the layouts of APR v2 and safetensors.

Every function takes a random.Random, so that the same seed gives the same variant. The functions that know a layout
make lengths and checksums right again after most changes: otherwise the first check would hide all those behind it.
"""

from __future__ import annotations

import json
import random
import re
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 63, 64, 65, 255, 256, 65535, 65536, 10**6),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)
BYTES = b'\x00\x01\x09\x0a\x20\x7f\x80\xc0\xed\xff"[]{},:\\-0'
BROKEN = [  # texts in the place of a value that no reader takes, or only a careless one
    *(
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
        "9" * 5000,
        '{"a": 1, "a": 2}',
        r'"\ud800"',
        "",
        "01",
        "'a'",
        '"\t"',
    ),
    *("[" * 200 + "]" * 200, "[" * 900 + "]" * 900, "[" * 5000 + "]" * 5000, '{"a":' * 900 + "1" + "}" * 900),
]
VALUES = [  # JSON texts that take the place of a value
    *map(str, NUMBERS),
    *("-1", "-2", f"-{2**63}", "1.0", "0.5", "2.5", "1e300", "1e-400", "1" + "0" * 400, "-" + "9" * 1000),
    *("null", "true", "false", '""', "[]", "{}", "[[]]", "[{}]", "[null]", "[0]", "[-1]", '["a"]', '{"a": 1}'),
    *("[" * 80 + "]" * 80, '{"type":"Sequence","normalizers":[]}', '{"type":"Sequence","decoders":[]}'),
    *('"' + "x" * 5000 + '"', '"' + "\\u00e9" * 300 + '"', "[" + "0," * 5000 + "0]", "[" + '"a",' * 5000 + '"a"]'),
    *(r'"\u0000"', r'"\u001b[2J"', r'"\uffff"', '"\u0120"', '"\u2581"', '"##"', '"a"', '"1"'),
    *('"../x"', '"/etc/passwd"', '"."', '".."', '"a/b"', '"a\\\\b"', '"con:"', '"' + "y" * 300 + '.safetensors"'),
    *('"F32"', '"I8"', '"BOOL"', '"float64"', '"Sequence"', '"Replace"', '"ByteLevel"', '"BPE"', '"Unigram"'),
]  # fmt: skip


def mutate_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One to three changes of bytes or blocks; `other` is what a splice takes from."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        out = rng.choice(_BYTE_CHANGES)(rng, out, other)
    return bytes(out)


def _flip(rng: random.Random, b: bytearray, other: bytes) -> bytearray:
    for _ in range(rng.choice((1, 1, 2, 8))):
        if b:
            b[rng.randrange(len(b))] ^= 1 << rng.randrange(8)
    return b


def _set(rng: random.Random, b: bytearray, other: bytes) -> bytearray:
    if b:
        b[rng.randrange(len(b))] = rng.choice(BYTES)
    return b


def _integer(rng: random.Random, b: bytearray, other: bytes) -> bytearray:
    """A little-endian integer of 2, 4 or 8 bytes."""
    width = rng.choice((2, 4, 8))
    if len(b) >= width:
        at = rng.randrange(len(b) - width + 1)
        b[at : at + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, "little")
    return b


def _digits(rng: random.Random, b: bytearray, other: bytes) -> bytearray:
    """A number that is written in digits."""
    found = list(re.finditer(rb"\d+", bytes(b[: 1 << 16])))
    if found:
        m = rng.choice(found)
        b[m.start() : m.end()] = rng.choice(
            (str(rng.choice(NUMBERS)), "-1", "1.5", "1e999", "9" * 5000)
        ).encode()
    return b


def _cut(rng: random.Random, b: bytearray, other: bytes) -> bytearray:
    return b[: rng.randrange(len(b) + 1)]


def _extend(rng: random.Random, b: bytearray, other: bytes) -> bytearray:
    return b + rng.choice((bytes(rng.choice((1, 4, 64))), rng.randbytes(rng.randrange(1, 200)), other[:200]))


def _block(rng: random.Random, b: bytearray) -> tuple[int, int]:
    start = rng.randrange(len(b) + 1)
    return start, min(len(b), start + rng.choice((1, 2, 4, 8, 64, 500)))


def _repeat(rng: random.Random, b: bytearray, other: bytes) -> bytearray:
    start, end = _block(rng, b)
    return b[:end] + b[start:end] * rng.choice((1, 1, 2, 20)) + b[end:]


def _remove(rng: random.Random, b: bytearray, other: bytes) -> bytearray:
    start, end = _block(rng, b)
    return b[:start] + b[end:]


def _swap(rng: random.Random, b: bytearray, other: bytes) -> bytearray:
    (s, e), (t, f) = sorted((_block(rng, b), _block(rng, b)))
    return b if t < e else b[:s] + b[t:f] + b[e:t] + b[s:e] + b[f:]


def _splice(rng: random.Random, b: bytearray, other: bytes) -> bytearray:
    if rng.random() < 0.5:
        return b[: rng.randrange(len(b) + 1)] + other[rng.randrange(len(other) + 1) :]
    at, (start, end) = rng.randrange(len(b) + 1), _block(rng, bytearray(other))
    return b[:at] + other[start:end] + b[at + rng.choice((0, end - start)) :]


_BYTE_CHANGES: tuple[Callable[..., bytearray], ...] = (
    _flip, _flip, _set, _integer, _digits, _cut, _extend, _repeat, _remove, _swap, _splice,
)  # fmt: skip


# JSON


def mutate_json(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One to three values replaced, moved, repeated or removed; bytes instead, where it is not JSON (any more)."""
    raw: list[str] = []
    try:
        root, donor = [json.loads(data)], json.loads(data)
        with suppress(ValueError, RecursionError):
            donor = json.loads(other)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            _change(rng, root, donor, raw)
        style = rng.choice(((",", ":"), (", ", ": ")))
        text = json.dumps(root[0], ensure_ascii=rng.random() < 0.5, separators=style)
    except (ValueError, RecursionError, OverflowError):
        return mutate_bytes(rng, data, other)
    text = re.sub(r'"@raw(\d+)@"', lambda m: raw[int(m[1])] if int(m[1]) < len(raw) else m[0], text)
    return text.encode("utf-8", "surrogatepass")


def _change(rng: random.Random, root: list[Any], donor: Any, raw: list[str]) -> None:
    """Change one slot of the value root[0] in place; a text that JSON cannot hold goes to `raw`."""
    box, key = _slot(rng, root)
    old = box[key]

    def hostile(text: str) -> str:
        raw.append(text)
        return f"@raw{len(raw) - 1}@"

    kind = rng.randrange(13)
    if kind < 4:
        box[key] = hostile(rng.choice(VALUES if rng.random() < 0.93 else BROKEN))
    elif kind == 4:
        inner, where = _slot(rng, [donor])
        box[key] = json.loads(json.dumps(inner[where]))
    elif kind == 5:
        inner, where = _slot(rng, root)
        box[key] = json.loads(json.dumps(inner[where]))
    elif kind == 6 and box is not root:
        del box[key]
    elif kind == 7 and isinstance(box, dict) and rng.random() < 0.3:  # the key twice, with another value
        box[hostile(json.dumps(key))] = rng.choice((old, hostile(rng.choice(VALUES))))
    elif kind == 8 and isinstance(box, dict):
        name = rng.choice((key + "x", key[:-1], "", rng.choice(list(box)), hostile(rng.choice(VALUES[-30:]))))
        box[name] = box.pop(key)
    elif kind == 9 and isinstance(box, list):
        if isinstance(key, int):
            box[key:key] = [old] * rng.choice(
                (1, 1, 2, 50, 3000 if not isinstance(old, (dict, list)) else 100)
            )
    elif kind == 10:
        box[key] = rng.choice(([old], {"a": old}, [old, old], str(old), [], {}))
    elif isinstance(old, str):
        box[key] = _text(rng, old)
    elif isinstance(old, (int, float)):
        box[key] = rng.choice(
            (
                old + 1,
                old - 1,
                -old,
                old * 2,
                old == 0,
                float(max(min(old, 1e300), -1e300)),
                rng.choice(NUMBERS),
            )
        )
    elif isinstance(old, list) and old:
        rng.shuffle(old)
    else:
        box[key] = hostile(rng.choice(VALUES))


def _text(rng: random.Random, old: str) -> str:
    """A text changed; JSON in JSON (the tokenizer of a checkpoint) is changed inside."""
    if old[:1] == "{" and rng.random() < 0.9:
        changed = mutate_json(rng, old.encode("utf-8", "surrogatepass"), b"{}")
        return changed.decode("utf-8", "surrogatepass" if rng.random() < 0.1 else "replace")
    at = rng.randrange(len(old) + 1)
    piece = rng.choice(
        ("\0", " ", "/", "..", "\u0120", "\u2581", "#", "(a+)+$", "\U0001f600", "\x1b[2J", "0", "x" * 300)
    )
    return rng.choice(
        (old[:at], old[at:], old[:at] + piece + old[at:], piece, old * 2, old.upper(), old[::-1])
    )


def _slot(rng: random.Random, root: list[Any]) -> tuple[Any, Any]:
    """A container in a value and a key of it; first the container is drawn, so that a vocabulary does not win always."""
    boxes, at = [root], 0
    while at < len(boxes) < 3000:
        values = boxes[at].values() if isinstance(boxes[at], dict) else boxes[at]
        boxes.extend(x for x in values if isinstance(x, (dict, list)) and x)
        at += 1
    box = rng.choice(boxes)
    return box, rng.choice(list(box)) if isinstance(box, dict) else rng.randrange(len(box))


# Layouts

HEADER = struct.Struct("<4sBBHIQIQQI20s")


def mutate_safetensors(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The header's JSON or the data changed, the length of the header right nearly always."""
    n = int.from_bytes(data[:8], "little")
    if rng.random() < 0.25 or not 2 <= n <= len(data) - 8:
        return mutate_bytes(rng, data, other)
    header, rest = data[8 : 8 + n], data[8 + n :]
    header = mutate_json(rng, header, other[8 : 8 + int.from_bytes(other[:8], "little") % (1 << 20)])
    if rng.random() < 0.1:
        rest = mutate_bytes(rng, rest, other)
    length = len(header) if rng.random() < 0.9 else rng.choice(NUMBERS)
    return struct.pack("<Q", length % 2**64) + header + rest


def mutate_apr(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Header, metadata, index or data changed, then both CRCs made right nearly always."""
    try:
        out = _apr_layout(rng, data, other) if rng.random() < 0.85 else mutate_bytes(rng, data, other)
    except (struct.error, ValueError, IndexError):
        out = mutate_bytes(rng, data, other)
    return with_crcs(out) if rng.random() < 0.95 else out


def with_crcs(data: bytes) -> bytes:
    """The file with the CRCs of header and footer that fit the rest."""
    if len(data) < 68:
        return data
    crc = zlib.crc32(data[44:64], zlib.crc32(data[:40]))
    body = data[:40] + struct.pack("<I", crc) + data[44:-4]
    return body + struct.pack("<I", zlib.crc32(body))


def _pad(b: bytes) -> bytes:
    return b + bytes(-len(b) % 64)


def _apr_layout(rng: random.Random, data: bytes, other: bytes) -> bytes:
    header = list(HEADER.unpack_from(data))
    meta_size, index_at, data_at = header[6:9]
    if not 64 <= index_at <= data_at <= len(data) or meta_size > len(data):
        raise ValueError("not a layout any more")
    meta, rows, blob = data[64 : 64 + meta_size], _rows(data[index_at:data_at], header[4]), data[data_at:-4]
    kind = rng.random()
    if kind < 0.5:
        size = int.from_bytes(other[24:28], "little")
        meta = mutate_json(rng, meta, other[64 : 64 + size] if size < len(other) else b"{}")
    elif kind < 0.85:
        _change_row(rng, rows)
    elif kind < 0.9:
        blob = mutate_bytes(rng, blob, other)
    index = b"".join(_pack(row) for row in rows)
    header[4], header[6] = len(rows), len(meta) % 2**32
    header[7] = 64 + len(_pad(meta))
    header[8] = header[7] + len(_pad(index))
    if kind >= 0.9:
        at = rng.choice((1, 2, 3, 4, 5, 6, 7, 8))
        limit = {1: 2**8, 2: 2**8, 3: 2**16, 4: 2**32, 6: 2**32}.get(at, 2**64)
        header[at] = (
            rng.choice((*NUMBERS, header[at] + 1, header[at] - 1, header[at] + 64, header[at] * 2)) % limit
        )
    return HEADER.pack(*header) + _pad(meta) + _pad(index) + blob + bytes(4)


def _rows(block: bytes, count: int) -> list[list[Any]]:
    """[name, tag, shape, offset, size] of each tensor."""
    rows, at = [], 0
    for _ in range(min(count, 1000)):
        (n,) = struct.unpack_from("<H", block, at)
        name, tag, ndim = struct.unpack_from(f"<{n}sBB", block, at + 2)
        *shape, offset, size = struct.unpack_from(f"<{ndim + 2}Q", block, at + 4 + n)
        rows.append([name, tag, shape, offset, size])
        at += 4 + n + 8 * (ndim + 2)
    return rows


def _pack(row: list[Any]) -> bytes:
    name, tag, shape, offset, size = row
    numbers = [x % 2**64 for x in (*shape, offset, size)]
    return struct.pack(
        f"<H{len(name)}sBB{len(numbers)}Q", len(name) % 65536, name, tag % 256, len(shape) % 256, *numbers
    )


def _change_row(rng: random.Random, rows: list[list[Any]]) -> None:
    if not rows:
        return
    i = rng.randrange(len(rows))
    row, kind = rows[i], rng.randrange(9)
    if kind == 0:
        row[0] = mutate_bytes(rng, row[0], b"model.norm.weight\xff\x1b[2J")[:60000]
    elif kind == 1:
        row[1] = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 30, 31, 128, 255))
    elif kind == 2 and row[2]:
        row[2][rng.randrange(len(row[2]))] = rng.choice(NUMBERS)
    elif kind == 3:
        row[2] = rng.choice((row[2][::-1], [*row[2], 1], [1] * 200, row[2] + [0], [1, *row[2]], []))
    elif kind == 4:
        row[3] = rng.choice((*NUMBERS, row[3] + 64, row[3] - 64, row[3] + 1))
    elif kind == 5:
        row[4] = rng.choice((*NUMBERS, row[4] + 1, row[4] - 1, row[4] * 2))
    elif kind == 6:
        del rows[i]
    elif kind == 7:
        rows.insert(i, [*row[:2], list(row[2]), *row[3:]])
    else:
        j = rng.randrange(len(rows))
        at = rng.randrange(5)
        row[at], rows[j][at] = rows[j][at], row[at]


def mutate_lines(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One line of a JSON Lines file changed, repeated or removed."""
    lines = data.split(b"\n")
    if rng.random() < 0.3:
        return mutate_bytes(rng, data, other)
    i = rng.randrange(len(lines))
    lines[i] = mutate_json(rng, lines[i], rng.choice(other.split(b"\n")))
    return b"\n".join(lines)


def mutate_file(rng: random.Random, name: str, data: bytes, other: bytes) -> bytes:
    """A variant of a file, as its suffix says what it holds."""
    if name.endswith(".apr"):
        return mutate_apr(rng, data, other)
    if name.endswith(".safetensors"):
        return mutate_safetensors(rng, data, other)
    if name.endswith(".jsonl"):
        return mutate_lines(rng, data, other)
    if name.endswith(".json") and rng.random() < 0.85:
        return mutate_json(rng, data, other)
    return mutate_bytes(rng, data, other)
