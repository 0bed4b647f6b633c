"""Checkpoints on disk: APR v2, safetensors, loading. Every check is shown the fault that it must catch."""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from io import FileIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from apr.checkpoints import checksum, hf
from apr.checkpoints.apr2 import HAS_VOCAB, MAX_METADATA, dumped, read_apr, write_apr
from apr.checkpoints.apr2_metadata import (
    config_to_metadata,
    dumped_tokenizer,
    embed_tokenizer,
    extract_tokenizer,
    metadata_to_config,
)
from apr.checkpoints.checkpoint import fill
from apr.checkpoints.checksum import Checksum, joined_crc
from apr.checkpoints.gguf import write_gguf
from apr.checkpoints.gguf_reader import read_gguf
from apr.checkpoints.hf import read_hf, read_safetensors, write_hf, write_safetensors
from apr.checkpoints.registry import open_any
from apr.checkpoints.tensors import encode
from apr.common import atomic
from apr.common.atomic import atomic_write, write_json, write_text
from apr.common.errors import AprError, InputNotFound, IOFailure, MalformedFile, Refused, UsageError
from apr.common.files import parse_json
from apr.model.config import ModelConfig
from apr.model.hf_config import to_hf
from apr.model.params import Layout
from apr.model.presets import PRESETS
from tokenizer_cases import gpt2_like

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("APR_TEST_DATA", ROOT.parent / "shared" / "data"))
BF16 = np.dtype(ml_dtypes.bfloat16)
TINY = [name for name in PRESETS if name.endswith("-tiny")]
Tensors = dict[str, np.ndarray]


def data(name: str) -> Path:
    """A folder of real data, or a visible skip."""
    if not (DATA / name).is_dir():
        pytest.skip(f"real data {name} is not in {DATA}; set APR_TEST_DATA")
    return DATA / name


def weights(name: str = "llama-tiny") -> tuple[ModelConfig, Layout, np.ndarray, Tensors]:
    """A preset with every parameter randomised: config, layout, flat buffer, tensors by name."""
    cfg = PRESETS[name]
    layout = Layout(cfg)
    flat = np.zeros(layout.size, np.float32)
    layout.randomise(flat, seed=7)
    return cfg, layout, flat, layout.named(flat)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These files need not survive a power failure; one test looks at fsync itself."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


# Atomic writing


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that leaves room for so many bytes."""

    def limit(room: int) -> None:
        left = [room]

        class FullDisk(FileIO):
            def write(self, piece: Any) -> int:
                left[0] -= len(piece)
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return super().write(piece)

        monkeypatch.setattr(atomic, "FileIO", FullDisk)

    return limit


def test_atomic_write_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    write_text(path, "old \u00e9")
    assert path.read_bytes() == "old \u00e9".encode()
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    for fault in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(fault), atomic_write(path) as f:  # noqa: PT012 -- the block is what is tested
            f.write(b"half of the new")
            raise fault
        assert path.read_text() == "old \u00e9"
        assert os.listdir(tmp_path) == ["x.bin"]
    with atomic_write(path) as f:
        f.write(b"new")
        f.flush()
        assert path.read_text() == "old \u00e9"  # until the block ends
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_atomic_write_reaches_the_disk_before_the_name_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    replace_ = os.replace

    def fsync(fd: int) -> None:
        calls.append(("folder", 0) if os.path.isdir(f"/dev/fd/{fd}") else ("file", os.fstat(fd).st_size))

    def rename(a: Path, b: Path) -> None:
        calls.append(("rename", 0))
        assert a.parent == b.parent
        replace_(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    write_text(tmp_path / "x", "12345")
    assert calls == [("file", 5), ("rename", 0), ("folder", 0)]


def test_atomic_write_names_the_trouble(tmp_path: Path, full_disk: Callable[[int], None]) -> None:
    with pytest.raises(IOFailure, match="absent does not exist"):
        write_text(tmp_path / "absent" / "x", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IOFailure, match="folder: cannot write"):
        write_text(tmp_path / "folder", "")
    assert os.listdir(tmp_path) == ["folder"]
    full_disk(3)
    with pytest.raises(IOFailure, match=r"x: disk full .* GiB free in .*make room"):
        write_text(tmp_path / "x", "1234")
    assert os.listdir(tmp_path) == ["folder"]


def test_write_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {"b": 1, "a": "\u00e9", "c": [1.5, None]}
    write_json(path, value)
    assert list(json.loads(path.read_text(encoding="utf-8")).items()) == list(value.items())
    with pytest.raises(ValueError, match="nan"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a": NaN}',
        '{"a": ' + "9" * 5000 + "}",
        b'{"\xff": 1}',
    ],
)
def test_hostile_json(text: str | bytes) -> None:
    with pytest.raises(MalformedFile, match="here"):
        parse_json(text, "here")


def test_json_keys_that_occur_twice() -> None:
    text = '{"a": 1, "b": {"c": 2, "c": 3}}'
    assert parse_json(text, "here") == {"a": 1, "b": {"c": 3}}
    with pytest.raises(MalformedFile, match="'c' is there twice"):
        parse_json(text, "here", unique=True)


# APR v2: the bytes

TAG = {
    "float32": 0,
    "float16": 1,
    "float64": 3,
    "int32": 4,
    "int64": 5,
    "int8": 6,
    "uint8": 7,
    "bfloat16": 30,
}


def pad(b: bytes) -> bytes:
    return b + bytes(-len(b) % 64)


def entry(name: str | bytes, tag: int, shape: tuple[int, ...], offset: int, size: int) -> bytes:
    """An entry of the index, as the specification has it."""
    raw = name.encode() if isinstance(name, str) else name
    head = struct.pack("<H", len(raw)) + raw + struct.pack("<BB", tag, len(shape))
    return head + b"".join(struct.pack("<Q", d % 2**64) for d in (*shape, offset, size))


def assemble(meta: bytes, index: list[bytes], blob: bytes, **header: Any) -> bytes:
    """An APR file by the specification alone; header=... plants a fault with both CRCs made right again."""
    rows = b"".join(index)
    h: dict[str, Any] = dict(
        magic=b"APR\0",
        major=2,
        minor=0,
        flags=0x0400,
        count=len(index),
        meta_at=64,
        meta_size=len(meta),
        index_at=64 + len(pad(meta)),
        data_at=64 + len(pad(meta)) + len(pad(rows)),
        reserved=bytes(20),
    )
    h.update(header)
    front = h["magic"] + struct.pack("<BBHI", h["major"], h["minor"], h["flags"], h["count"])
    front += struct.pack("<Q", h["meta_at"] % 2**64) + struct.pack("<I", h["meta_size"])
    front += struct.pack("<QQ", h["index_at"] % 2**64, h["data_at"] % 2**64)
    crc = struct.pack("<I", zlib.crc32(front + h["reserved"]))
    body = front + crc + h["reserved"] + pad(meta) + pad(rows) + blob
    return body + struct.pack("<I", zlib.crc32(body))


A = np.array([1.5, -2.0, 3.25], BF16)
B = np.arange(6, dtype=np.float32).reshape(2, 3) / 7
INDEX = [entry("a", 30, (3,), 0, 6), entry("b", 0, (2, 3), 64, 24)]
BLOB = pad(A.tobytes()) + pad(B.tobytes())
META = b'{"x":1,"param_count":9,"total_size":30}'
GOLDEN = assemble(META, INDEX, BLOB)


def put(path: Path, content: bytes) -> Path:
    path.unlink(missing_ok=True)  # ext4 waits for the disk when a file is cut and written again
    path.write_bytes(content)
    return path


def test_writer_makes_the_golden_bytes(tmp_path: Path) -> None:
    write_apr(tmp_path / "g.apr", {"x": 1}, {"b": B, "a": A})
    assert (tmp_path / "g.apr").read_bytes() == GOLDEN
    assert len(GOLDEN) == 64 + 64 + 128 + 64 + 64 + 4
    assert os.listdir(tmp_path) == ["g.apr"]


def test_reader_reads_the_golden_bytes(tmp_path: Path) -> None:
    file = read_apr(put(tmp_path / "g.apr", GOLDEN))
    assert file.metadata == {"x": 1, "param_count": 9, "total_size": 30}
    assert list(file.tensors) == ["a", "b"]
    assert (file.flags, file.size) == (0x0400, len(GOLDEN))
    assert same(file.tensors["a"], A)
    assert same(file.tensors["b"], B)
    assert not file.tensors["b"].flags.writeable


def test_reader_takes_every_dtype_any_data_order_and_repeated_keys(tmp_path: Path) -> None:
    arrays = {
        f"t{i}": (np.arange(5 * (i + 1)) - 3).astype(np.uint8 if d == "uint8" else d)
        for i, d in enumerate(TAG)
    }
    arrays["scalar"] = np.array(2.5, np.float64)
    index, blob = [], b""
    for name in reversed(arrays):  # data in another order than the index, as a streaming writer leaves them
        a = arrays[name]
        index.insert(0, entry(name, TAG[a.dtype.name], a.shape, len(blob), a.nbytes))
        blob += pad(a.tobytes())
    index.sort(key=lambda e: e[2 : 2 + e[0]])
    meta = b'{"rms_norm_eps": null, "rms_norm_eps": 1e-6}'
    file = read_apr(put(tmp_path / "x.apr", assemble(meta, index, blob, flags=0x0180)))
    assert file.metadata == {"rms_norm_eps": 1e-6}
    assert all(same(file.tensors[name], a) for name, a in arrays.items())
    assert len(file.tensors) == len(TAG) + 1


def test_checksums_are_joined() -> None:
    rng = np.random.default_rng(0)
    for before, behind in ((0, 0), (0, 5), (7, 0), (1, 1), (100, 70_000), (70_000, 100), (33, 4096)):
        one, two = rng.bytes(before), rng.bytes(behind)
        assert joined_crc(zlib.crc32(one), zlib.crc32(two), behind) == zlib.crc32(one + two)


def test_a_checksum_by_a_thread_is_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pieces = [rng.bytes(n) for n in (*range(30), 5000)]
    for submit in (ThreadPoolExecutor.submit, _no_thread):
        monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
        for nbytes in (0, checksum.PART_BYTES + 1):
            with Checksum(nbytes) as crc:
                for piece in pieces:
                    crc.add(piece)
                assert crc.value() == zlib.crc32(b"".join(pieces))


def _no_thread(pool: ThreadPoolExecutor, *call: Any) -> None:
    raise RuntimeError("can't start new thread")


def test_threads_check_the_parts_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.apr"
    write_apr(path, {"x": 1}, {"a": np.arange(5000, dtype=np.float32)})
    whole = path.read_bytes()
    for part in (1000, len(whole) - 5, len(whole) - 4, len(whole)):
        monkeypatch.setattr(checksum, "PART_BYTES", part)
        assert np.array_equal(read_apr(path).tensors["a"], np.arange(5000, dtype=np.float32))
    monkeypatch.setattr(checksum, "PART_BYTES", 1000)
    write_apr(path, {"x": 1}, {"a": np.arange(5000, dtype=np.float32)})
    assert path.read_bytes() == whole
    for at in (len(whole) - 19_000, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(MalformedFile, match="footer CRC is"):
            read_apr(path)
    path.write_bytes(whole)
    read, shortened = os.pread, threading.Event()

    def shorten(fd: int, n: int, at: int) -> bytes:
        if at > len(whole) // 2 and not shortened.is_set():
            shortened.set()
            os.truncate(path, len(whole) // 2)
        return read(fd, n, at)

    monkeypatch.setattr(os, "pread", shorten)
    with pytest.raises(MalformedFile, match="became shorter while being read"):
        read_apr(path)


def test_a_model_that_is_copied_over_while_it_is_read_ends_in_words(tmp_path: Path) -> None:
    """The kernel would end the process: beyond the end of its file, a map has no bytes."""
    cfg, _, _, tensors = weights()
    write_apr(tmp_path / "a.apr", {}, tensors)
    write_hf(tmp_path / "one", cfg, tensors)
    write_hf(tmp_path / "many", cfg, tensors, max_shard_bytes=20_000)
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "a.gguf", cfg, tensors)
    for opened, folder in (
        (read_apr(tmp_path / "a.apr").tensors, tmp_path),
        (read_hf(tmp_path / "one").tensors, tmp_path / "one"),
        (read_hf(tmp_path / "many").tensors, tmp_path / "many"),
        (read_gguf(tmp_path / "gguf" / "a.gguf").tensors, tmp_path / "gguf"),
    ):
        name = "model.norm.weight"
        assert same(opened[name], tensors[name])
        for path in (p for p in folder.iterdir() if p.suffix in (".apr", ".safetensors", ".gguf")):
            os.truncate(path, 1000)
        with pytest.raises(MalformedFile, match="became shorter while it was read, 1,000 bytes"):
            opened[name]


def test_a_late_value_gives_the_file_of_an_early_one(tmp_path: Path) -> None:
    cfg, _, _, tensors = weights()
    early, late = tmp_path / "early.apr", tmp_path / "late.apr"
    meta = config_to_metadata(cfg)
    write_apr(early, {**meta, "sha": "abcd"}, tensors)

    def value() -> str:
        assert not late.exists()
        return "abcd"

    write_apr(late, {**meta, "sha": "0000"}, tensors, late={"sha": value})
    assert late.read_bytes() == early.read_bytes()
    with pytest.raises(ValueError, match="sha: not as long"):
        write_apr(late, {**meta, "sha": "0000"}, tensors, late={"sha": lambda: "abcde"})
    assert late.read_bytes() == early.read_bytes()


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_flipped_byte_is_seen(tmp_path: Path, mask: int) -> None:
    """No byte is irrelevant: the footer covers everything before it, and is compared itself."""
    path = tmp_path / "x.apr"
    for i in range(len(GOLDEN)):
        bad = bytearray(GOLDEN)
        bad[i] ^= mask
        with pytest.raises(MalformedFile, match=r"x\.apr"):
            read_apr(put(path, bytes(bad)))


def test_every_truncation_and_every_addition_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.apr"
    for length in range(len(GOLDEN)):
        with pytest.raises(MalformedFile):
            read_apr(put(path, GOLDEN[:length]))
    for more in (b"\0", b"x", bytes(64)):
        with pytest.raises(MalformedFile, match="too long"):
            read_apr(put(path, GOLDEN + more))
    big = assemble(META, INDEX, BLOB[:64])  # cut, and both CRCs right
    with pytest.raises(MalformedFile, match="truncated"):
        read_apr(put(path, big))


def test_real_model_flipped_and_truncated(tmp_path: Path) -> None:
    cfg, _, _, tensors = weights("qwen2-tiny")
    path = tmp_path / "m.apr"
    write_apr(path, config_to_metadata(cfg), tensors, "bfloat16")
    whole = path.read_bytes()
    rng = np.random.default_rng(3)
    for i in rng.integers(0, len(whole), 60):
        bad = bytearray(whole)
        bad[i] ^= 1 << int(rng.integers(8))
        with pytest.raises(MalformedFile):
            read_apr(put(path, bytes(bad)))
    for length in rng.integers(0, len(whole), 40):
        with pytest.raises(MalformedFile):
            read_apr(put(path, whole[:length]))
    assert len(read_apr(put(path, whole)).tensors) == len(tensors)


DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
HOSTILE: dict[str, bytes] = {
    "count of 4 billion": assemble(META, INDEX, BLOB, count=2**32 - 1),
    "count too small": assemble(META, INDEX, BLOB, count=1),
    "count too large": assemble(META, INDEX, BLOB, count=3),
    "metadata of 4 GB": assemble(META, INDEX, BLOB, meta_size=2**32 - 1),
    "metadata over the limit": assemble(META, INDEX, BLOB, meta_size=MAX_METADATA + 1),
    "metadata truly over the limit": assemble(b'{"x":"%s"}' % (b"y" * MAX_METADATA), INDEX, BLOB),
    "metadata off by one": assemble(META, INDEX, BLOB, meta_at=65),
    "metadata elsewhere": assemble(META, INDEX, BLOB, meta_at=128),
    "metadata offset wraps": assemble(META, INDEX, BLOB, meta_at=-64),
    "gap before the index": assemble(META + bytes(64), INDEX, BLOB, meta_size=len(META)),
    "gap before the data": assemble(META, INDEX + [bytes(64)], BLOB, count=2),
    "index beyond the file": assemble(META, INDEX, BLOB, index_at=2**40),
    "index offset wraps": assemble(META, INDEX, BLOB, index_at=-64),
    "data before the index": assemble(META, INDEX, BLOB, data_at=64),
    "data beyond the file": assemble(META, INDEX, BLOB, data_at=2**62),
    "data offset wraps": assemble(META, INDEX, BLOB, data_at=-64),
    "version 1": assemble(META, INDEX, BLOB, major=1),
    "version 2.1": assemble(META, INDEX, BLOB, minor=1),
    "reserved bytes": assemble(META, INDEX, BLOB, reserved=b"\1" + bytes(19)),
    "old magic": assemble(META, INDEX, BLOB, magic=b"APRN"),
    "tensor beyond the file": assemble(META, [INDEX[0], entry("b", 0, (2, 3), 2**40, 24)], BLOB),
    "tensor offset wraps": assemble(META, [INDEX[0], entry("b", 0, (2, 3), -64, 24)], BLOB),
    "tensor size wraps": assemble(META, [INDEX[0], entry("b", 0, (2, 3), 64, -24)], BLOB),
    "tensors overlap": assemble(META, [INDEX[0], entry("b", 0, (2, 3), 0, 24)], BLOB),
    "tensor unaligned": assemble(META, [INDEX[0], entry("b", 0, (2, 3), 32, 24)], BLOB),
    "gap": assemble(META, [INDEX[0], entry("b", 0, (2, 3), 128, 24)], BLOB + bytes(64)),
    "shape and size differ": assemble(META, [INDEX[0], entry("b", 0, (2, 4), 64, 24)], BLOB),
    "shape wraps": assemble(META, [INDEX[0], entry("b", 0, (2**63, 2, 3), 64, 24)], BLOB),
    "dtype and size differ": assemble(META, [INDEX[0], entry("b", 3, (2, 3), 64, 24)], BLOB),
    "empty tensor": assemble(META, [INDEX[0], entry("b", 0, (2**40, 0), 64, 0)], BLOB[:64]),
    "unknown dtype": assemble(META, [INDEX[0], entry("b", 31, (2, 3), 64, 24)], BLOB),
    "nine dimensions": assemble(META, [INDEX[0], entry("b", 0, (2, 3) + (1,) * 7, 64, 24)], BLOB),
    "unsorted": assemble(META, [entry("b", 0, (2, 3), 64, 24), INDEX[0]], BLOB),
    "name twice": assemble(META, [INDEX[0], entry("a", 0, (2, 3), 64, 24)], BLOB),
    "name empty": assemble(META, [entry("", 30, (3,), 0, 6), INDEX[1]], BLOB),
    "name too long": assemble(META, [INDEX[0], entry("b" * 257, 0, (2, 3), 64, 24)], BLOB),
    "name not UTF-8": assemble(META, [INDEX[0], entry(b"\xff", 0, (2, 3), 64, 24)], BLOB),
    "name longer than the file": assemble(META, [INDEX[0], struct.pack("<H", 65535) + b"b"], BLOB),
    "metadata not JSON": assemble(b"not JSON", INDEX, BLOB),
    "metadata a list": assemble(b"[1]", INDEX, BLOB),
    "metadata deep": assemble(DEEP, INDEX, BLOB),
    "metadata empty": assemble(b"", INDEX, BLOB),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_apr(tmp_path: Path, fault: str) -> None:
    with pytest.raises(MalformedFile, match=r"x\.apr"):
        read_apr(put(tmp_path / "x.apr", HOSTILE[fault]))


def test_an_index_longer_than_its_tensors_is_not_even_read(tmp_path: Path) -> None:
    bad = assemble(META, [bytes(1 << 20)], b"", count=1)
    with pytest.raises(MalformedFile, match="index of 1,048,576 bytes for 1 tensor"):
        read_apr(put(tmp_path / "x.apr", bad))


@pytest.mark.parametrize(
    ("flag", "word"),
    [
        (0x0001, "LZ4"),
        (0x0002, "Zstd"),
        (0x0004, "encrypted"),
        (0x0008, "signed"),
        (0x0010, "sharded"),
        (0x0020, "quantised"),
        (0x0040, "filterbank"),
        (0x0800, "column-major"),
        (0x1000, "unknown"),
        (0x8000, "unknown"),
    ],
)
def test_flags_that_are_not_honoured(tmp_path: Path, flag: int, word: str) -> None:
    with pytest.raises(Refused, match=word):
        read_apr(put(tmp_path / "x.apr", assemble(META, INDEX, BLOB, flags=0x0400 | flag)))


@pytest.mark.parametrize("tag", [8, 9, 12, 14, 128, 129])
def test_quantised_tensors_are_refused(tmp_path: Path, tag: int) -> None:
    bad = assemble(META, [INDEX[0], entry("b", tag, (2, 3), 64, 24)], BLOB)
    with pytest.raises(Refused, match="'b' is quantised"):
        read_apr(put(tmp_path / "x.apr", bad))


# APR v2: writing


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
@pytest.mark.parametrize("name", TINY)
def test_apr_round_trip(tmp_path: Path, name: str, dtype: str | None) -> None:
    cfg, layout, flat, tensors = weights(name)
    path = tmp_path / "m.apr"
    meta = config_to_metadata(cfg, "2026-01-01T00:00:00+00:00")
    write_apr(path, meta, tensors, dtype)
    first = path.read_bytes()
    write_apr(path, meta, tensors, dtype)
    assert path.read_bytes() == first
    loaded = open_any(str(path))
    assert (loaded.cfg, loaded.kind, loaded.source, loaded.tokenizer_json) == (cfg, "apr", str(path), None)
    want = {n: t.astype(BF16) if dtype == "bfloat16" else t for n, t in tensors.items()}
    assert all(same(loaded.tensors[n], t) for n, t in want.items())
    assert loaded.metadata["param_count"] == layout.num_parameters
    assert loaded.metadata["total_size"] == sum(t.nbytes for t in want.values())
    for kind in (np.float32, np.float64):
        back = np.full(layout.size, np.nan, kind)
        fill(layout, back, loaded)
        expected = np.zeros(layout.size, kind)
        for n, view in layout.named(expected).items():
            view[...] = want[n]
        assert same(back, expected)
    if dtype != "bfloat16":
        assert np.array_equal(back, flat)


def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint32)
    bits[:5000] = bits[:5000] & 0xFFFF0000 | 0x8000  # ties
    x = bits.view(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) < 3e38)]
    u = x.view(np.uint32)
    got = np.frombuffer(b"".join(encode("x", x, BF16)), np.uint16)
    assert np.array_equal(got, ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16))


def test_float64_to_bfloat16_rounds_once() -> None:
    ulp = 2.0**-7
    x = np.array([s * (1 + ulp / 2 + d) for s in (1, -1) for d in (-(2.0**-40), 0.0, 2.0**-40)])
    x = np.append(x, [1 + 3 * ulp / 2 + d for d in (-(2.0**-45), 0.0, 2.0**-45)])
    got = np.frombuffer(b"".join(encode("x", x, BF16)), BF16).astype(np.float64)
    for value, result in zip(x, got, strict=True):
        error = abs(Fraction(float(value)) - Fraction(float(result)))
        assert error <= Fraction(ulp) / 2
        assert error < Fraction(ulp) / 2 or float(result) / ulp % 2 == 0
    assert np.any(x.astype(np.float32).astype(BF16).astype(np.float64) != got)  # rounding twice differs


def test_writing_takes_no_second_copy(tmp_path: Path) -> None:
    big = np.ones((1024, 4096), np.float32)  # 16 MiB
    tracemalloc.start()
    write_apr(tmp_path / "x.apr", {}, {"a": big, "b": big}, "bfloat16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    file = read_apr(tmp_path / "x.apr")
    reading = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20  # a copy of one of the two takes 8
    assert reading < 4 << 20
    assert file.tensors["b"].shape == big.shape


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_not_written(tmp_path: Path, value: float) -> None:
    path = tmp_path / "x.apr"
    write_apr(path, {}, {"a": B})
    before = path.read_bytes()
    bad = B.copy()
    bad[1, 1] = value
    for write in (write_apr, lambda p, m, t: write_safetensors(p, t)):
        with pytest.raises(Refused, match=r"a: element 4 is"):
            write(path, {}, {"a": bad})
    with pytest.raises(Refused, match="element 0 is inf in bfloat16"):
        write_apr(path, {}, {"a": np.array([3.4e38], np.float32)}, "bfloat16")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.apr"]


def test_what_an_apr_file_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "x.apr"
    for bad in (
        {"a": np.ones(3, bool)},
        {"a" * 257: B},
        {"": B},
        {"a": np.ones((1,) * 9)},
        {"a": np.ones((2, 0))},
    ):
        with pytest.raises(Refused, match="cannot hold"):
            write_apr(path, {}, bad)
    with pytest.raises(Refused, match="metadata"):
        write_apr(path, {"x": "y" * MAX_METADATA}, {"a": B})
    with pytest.raises(UsageError, match="float8"):
        write_apr(path, {}, {"a": B}, "float8")
    assert os.listdir(tmp_path) == []


def test_a_tensor_that_changes_while_it_is_written(tmp_path: Path) -> None:
    class Growing(dict[str, np.ndarray]):
        seen = 0

        def __getitem__(self, name: str) -> np.ndarray:
            self.seen += 1
            return B if self.seen < 3 else np.ones((2, 4), np.float32)

    for write in (lambda p, t: write_apr(p, {}, t), write_safetensors):
        with pytest.raises(Refused, match="changed its shape"):
            write(tmp_path / "x", Growing(a=B))
    assert os.listdir(tmp_path) == []


def test_full_disk_leaves_the_previous_file(tmp_path: Path, full_disk: Callable[[int], None]) -> None:
    cfg, _, _, tensors = weights()
    path = tmp_path / "m.apr"
    write_apr(path, config_to_metadata(cfg), tensors)
    before = path.read_bytes()
    for room in (0, 100, 10_000, len(before) - 1):
        full_disk(room)
        with pytest.raises(IOFailure, match=r"m\.apr: disk full"):
            write_apr(path, config_to_metadata(cfg), tensors)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["m.apr"]
    full_disk(30_000)
    with pytest.raises(IOFailure, match="disk full"):
        write_hf(tmp_path / "hf", cfg, tensors, max_shard_bytes=20_000)
    assert os.listdir(tmp_path / "hf") == []  # shards that fitted are gone, too


# Metadata and configuration


@pytest.mark.parametrize("name", PRESETS)
def test_metadata_describe_every_preset(name: str) -> None:
    cfg = PRESETS[name]
    meta = json.loads(json.dumps(config_to_metadata(cfg)))
    assert metadata_to_config(meta, "x", ()) == cfg
    assert meta["rope_type"] == 2
    assert meta["architecture"] == cfg.family


@pytest.mark.parametrize(
    "key",
    [
        k
        for k in config_to_metadata(PRESETS["qwen2-tiny"])
        if k not in ("model_type", "created_at", "hf_config")
    ],
)
def test_typed_keys_must_agree_with_the_config(key: str) -> None:
    meta = config_to_metadata(PRESETS["qwen2-tiny"])
    old = meta[key]
    meta[key] = not old if isinstance(old, bool) else old * 2
    with pytest.raises(Refused, match=f"{key} = "):
        metadata_to_config(meta, "x", ())


def old_metadata(cfg: ModelConfig) -> dict[str, Any]:
    """As the original writes them: no complete config, no tie, no bias."""
    meta = config_to_metadata(cfg)
    for key in ("hf_config", "tie_word_embeddings", "attention_bias"):
        del meta[key]
    return meta


@pytest.mark.parametrize("name", ["llama-tiny", "qwen2-tiny", "qwen3-tiny"])
def test_files_of_the_original(name: str) -> None:
    cfg = PRESETS[name]
    meta = {**old_metadata(cfg), "num_experts": None}
    assert metadata_to_config(meta, "x", Layout(cfg).by_hf) == cfg
    untied = replace(cfg, tie_word_embeddings=False)
    assert metadata_to_config(meta, "x", Layout(untied).by_hf) == untied
    meta["architecture"] = meta["hf_architecture"]
    assert metadata_to_config(meta, "x", Layout(cfg).by_hf) == cfg
    meta["num_hidden_layers"] = meta.pop("num_layers")
    assert metadata_to_config(meta, "x", Layout(cfg).by_hf) == cfg


SIZE_KEYS = ["hidden_size", "num_layers", "num_heads", "num_kv_heads", "vocab_size", "intermediate_size"]
OTHER_KEYS = ["max_position_embeddings", "rope_theta", "rope_type", "rms_norm_eps"]


@pytest.mark.parametrize("key", SIZE_KEYS + OTHER_KEYS)
def test_files_of_the_original_that_lack_a_key(key: str) -> None:
    cfg = PRESETS["llama-tiny"]
    for missing in ({}, {key: None}):
        meta = {k: v for k, v in old_metadata(cfg).items() if k != key} | missing
        with pytest.raises(MalformedFile, match=f"'{key}'"):
            metadata_to_config(meta, "x", Layout(cfg).by_hf)


def test_files_of_the_original_that_contradict_themselves() -> None:
    def load(name: str, names_of: str | None = None, **change: Any) -> ModelConfig:
        meta = {**old_metadata(PRESETS[name]), **change}
        return metadata_to_config(meta, "x", Layout(PRESETS[names_of or name]).by_hf)

    for change, error, word in (
        (dict(rope_type=0), Refused, "adjacent pairs"),
        (dict(rope_type=1), Refused, "rope_type = 1"),
        (dict(num_experts=8), Refused, "num_experts = 8"),
        (dict(num_attention_heads=8), Refused, "num_attention_heads = 8"),
        (dict(architecture="qwen2"), Refused, "all must name the same"),
        (dict(architecture="gpt2", hf_architecture=None, hf_model_type=None), Refused, "gpt2"),
        (dict(architecture=None, hf_architecture=None, hf_model_type=None), MalformedFile, "'architecture'"),
        (dict(max_position_embeddings=131072), MalformedFile, "'rope_scaling'"),
        (dict(mlp_bias=True), Refused, "mlp_bias = True"),
        (dict(num_heads="4"), MalformedFile, "num_attention_heads = '4'"),
        (dict(max_position_embeddings=[1]), MalformedFile, r"max_position_embeddings = \[1\]"),
        (dict(num_heads=-4), MalformedFile, "num_attention_heads = -4"),
    ):
        with pytest.raises(error, match=word):
            load("llama-tiny", **change)
    with pytest.raises(Refused, match=r"lacks tensors '.self_attn.q_proj.bias'"):  # biases lost on saving
        load("qwen2-tiny", "llama-tiny")
    with pytest.raises(Refused, match=r"has tensors '.self_attn.q_proj.bias'"):  # "Llama" as a fallback
        load("llama-tiny", "qwen2-tiny")
    with pytest.raises(MalformedFile, match="'sliding_window'"):
        load("mistral-tiny")
    assert load("mistral-tiny", sliding_window=5) == PRESETS["mistral-tiny"]
    assert load("llama-tiny", max_position_embeddings=131072, rope_scaling=None).rope_scaling is None


# Tokenizer inside the file


def tokenizer_json(**change: Any) -> str:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "\u00e9": 3}, "merges": [["a", "b"]]}
    added = [{"id": 5, "content": "<|end|>", "special": True}]
    return json.dumps({"version": "1.0", "added_tokens": added, "model": {**model, **change}}, indent=1)


def test_tokenizer_is_embedded_whole(tmp_path: Path) -> None:
    path = tmp_path / "t.apr"
    meta: dict[str, Any] = {"x": 1}
    text = tokenizer_json()
    embed_tokenizer(meta, text, 5, bos_id=0)
    write_apr(path, meta, {"a": B})
    file = read_apr(path)
    assert file.flags == 0x0400 | HAS_VOCAB == 0x0600
    assert extract_tokenizer(file.metadata) == text
    assert file.metadata["tokenizer.vocabulary"] == ["a", "b", "ab", "\u00e9", "[PAD4]", "<|end|>"]
    assert file.metadata["tokenizer.merges"] == ["a b"]
    assert file.metadata["tokenizer.model_type"] == "BPE"
    assert (file.metadata["tokenizer.bos_token_id"], file.metadata["tokenizer.eos_token_id"]) == (0, 5)
    meta = {}
    embed_tokenizer(meta, tokenizer_json(merges=["a b"]), None)
    assert meta["tokenizer.merges"] == ["a b"]
    assert "tokenizer.eos_token_id" not in meta
    embed_tokenizer(other := {}, tokenizer_json(merges=[["a ", "b"]]), None)
    assert "tokenizer.merges" not in other
    assert extract_tokenizer({"tokenizer.vocabulary": ["a"]}) is None


def test_a_tokenizer_dumped_beforehand_gives_the_same_file(tmp_path: Path) -> None:
    for text in (tokenizer_json(), tokenizer_json().replace("\n", "\n" + " " * (MAX_METADATA // 20))):
        meta: dict[str, Any] = {"x": 1, "tokenizer.merges": ["of", "another"], "y": [2.5, None, "\u00e9"]}
        keys = dumped_tokenizer(meta, text, 5)
        write_apr(tmp_path / "dumped.apr", {**meta, **keys}, {"a": B})
        embed_tokenizer(meta, text, 5)
        write_apr(tmp_path / "plain.apr", meta, {"a": B})
        assert (tmp_path / "dumped.apr").read_bytes() == (tmp_path / "plain.apr").read_bytes()
    for empty in ([], dumped([])):
        write_apr(tmp_path / "empty.apr", {"tokenizer.vocabulary": empty}, {"a": B})
        assert not read_apr(tmp_path / "empty.apr").flags & HAS_VOCAB


def test_tokenizers_that_cannot_be_embedded() -> None:
    for text, eos, error, word in (
        ("{", 0, MalformedFile, "JSON"),
        (tokenizer_json(type="Unigram"), 0, Refused, "BPE"),
        (tokenizer_json(vocab=[]), 0, Refused, "BPE"),
        (tokenizer_json(), 6, Refused, "eos id 6"),
        (tokenizer_json(), 4, Refused, "eos id 4"),
        (tokenizer_json(), -1, Refused, "eos id -1"),
        (tokenizer_json(vocab={"a": 0, "b": 0}), 0, MalformedFile, "taken"),
        (tokenizer_json(vocab={"a": 5}), 0, MalformedFile, "taken"),
        (tokenizer_json(vocab={"a": 2**40}), 0, MalformedFile, "too large"),
        (tokenizer_json(vocab={"a": "0"}), 0, MalformedFile, "has id '0'"),
        (tokenizer_json().replace('"<|end|>"', "7"), 0, MalformedFile, "token 7"),
        (tokenizer_json().replace('"content"', '"text"'), 0, MalformedFile, "lacks content"),
        (tokenizer_json(merges=1), 0, MalformedFile, "merges is not a list"),
        (tokenizer_json(merges=[["a"]]), 0, MalformedFile, "merge"),
        (tokenizer_json(merges=[["a", 1]]), 0, MalformedFile, "merge"),
    ):
        meta = {"x": 1}
        with pytest.raises(error, match=word):
            embed_tokenizer(meta, text, eos)
        assert meta == {"x": 1}
    with pytest.raises(MalformedFile, match="not text"):
        extract_tokenizer({"tokenizer.json": {}})


def test_tokenizer_too_long_for_the_file_loses_its_white_space(tmp_path: Path) -> None:
    text = tokenizer_json().replace("\n", "\n" + " " * (MAX_METADATA // 20))
    meta: dict[str, Any] = {}
    embed_tokenizer(meta, text, 5)
    write_apr(tmp_path / "t.apr", meta, {"a": B})
    back = extract_tokenizer(read_apr(tmp_path / "t.apr").metadata)
    assert back is not None
    assert len(back) < 1000 < MAX_METADATA < len(text)
    assert json.loads(back) == json.loads(text)


def test_qwen2_tokenizer_fits(tmp_path: Path) -> None:
    text = (data("qwen2-tokenizer") / "tokenizer.json").read_text(encoding="utf-8")
    meta: dict[str, Any] = {}
    embed_tokenizer(meta, text, 151643)
    write_apr(tmp_path / "t.apr", meta, {"a": B})
    back = read_apr(tmp_path / "t.apr").metadata
    assert extract_tokenizer(back) == text
    assert len(back["tokenizer.merges"]) == 151387
    assert back["tokenizer.vocabulary"][back["tokenizer.eos_token_id"]] == "<|endoftext|>"


# Safetensors


def header_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    (n,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def safetensors(header: Any, blob: bytes, pretext: bytes = b"") -> bytes:
    text = pretext + (header if isinstance(header, bytes) else json.dumps(header).encode())
    return struct.pack("<Q", len(text)) + text + blob


def row(dtype: str = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_safetensors_golden_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": A, "b": B})
    text = (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        b'"a":{"dtype":"BF16","shape":[3],"data_offsets":[24,30]}}'
    )
    text += b" " * (-len(text) % 8)
    assert path.read_bytes() == struct.pack("<Q", len(text)) + text + B.tobytes() + A.tobytes()
    back = read_safetensors(path)
    assert same(back["a"], A)
    assert same(back["b"], B)


def test_safetensors_with_metadata_and_values_that_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    x = np.array([np.nan, -np.inf, 1], np.float32)
    write_safetensors(path, {"x": x, "y": x.astype(BF16)}, metadata={"model": "m"}, finite=False)
    assert header_of(path.read_bytes())[0]["__metadata__"] == {"format": "pt", "model": "m"}
    back = read_safetensors(path)
    assert same(back["x"], x)
    assert same(back["y"], x.astype(BF16))


def test_safetensors_truncated_or_flipped(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": A, "b": B})
    whole = path.read_bytes()
    for length in range(len(whole)):
        with pytest.raises(MalformedFile):
            read_safetensors(put(path, whole[:length]))
    with pytest.raises(MalformedFile, match="too long"):
        read_safetensors(put(path, whole + b"\0"))
    opened = 0
    for i in range(len(whole) - len(A.tobytes() + B.tobytes())):  # the format has no checksum for the data
        bad = bytearray(whole)
        bad[i] ^= 0x01
        try:
            back = read_safetensors(put(path, bytes(bad)))
        except AprError:
            continue
        opened += 1  # another name, or another dtype of the same width
        assert sum(t.nbytes for t in back.values()) == 30
    assert opened < 12


ST_HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "header longer than the file": struct.pack("<Q", 100) + b"{}",
    "header of 1 byte": struct.pack("<Q", 1) + b"{",
    "white space first": safetensors({"b": row()}, B.tobytes(), b" "),
    "deep": safetensors(DEEP, B.tobytes()),
    "a list": safetensors([], b""),
    "name twice": safetensors(b'{"b":%s,"b":%s}' % ((json.dumps(row()).encode(),) * 2), B.tobytes()),
    "offset beyond": safetensors({"b": row(offsets=(2**40, 2**40 + 24))}, B.tobytes()),
    "offset negative": safetensors({"b": row(offsets=(-24, 0))}, B.tobytes()),
    "offsets swapped": safetensors({"b": row(offsets=(24, 0))}, B.tobytes()),
    "offset a float": safetensors({"b": row(offsets=(0, 24.0))}, B.tobytes()),
    "three offsets": safetensors({"b": row(offsets=(0, 24, 48))}, B.tobytes()),
    "no offsets": safetensors({"b": row(offsets=())}, B.tobytes()),
    "shape too large": safetensors({"b": row(shape=(2**61, 3))}, B.tobytes()),
    "shape negative": safetensors({"b": row(shape=(-2, -3))}, B.tobytes()),
    "shape true": safetensors({"b": row(shape=(True, 6))}, B.tobytes()),
    "shape empty tensor": safetensors(
        {"b": row(), "c": row(shape=(0, 2**60), offsets=(24, 24))}, B.tobytes()
    ),
    "nine dimensions": safetensors({"b": row(shape=(2, 3) + (1,) * 7)}, B.tobytes()),
    "overlap": safetensors({"b": row(), "c": row(offsets=(12, 36))}, B.tobytes() + bytes(12)),
    "gap": safetensors({"b": row(), "c": row(offsets=(28, 52))}, B.tobytes() + bytes(28)),
    "key missing": safetensors({"b": {"dtype": "F32", "shape": [6]}}, B.tobytes()),
    "key unknown": safetensors({"b": {**row(), "strides": [3, 1]}}, B.tobytes()),
    "not an object": safetensors({"b": 1}, B.tobytes()),
    "metadata": safetensors({"__metadata__": {"format": 1}, "b": row()}, B.tobytes()),
}


@pytest.mark.parametrize("fault", ST_HOSTILE)
def test_hostile_safetensors(tmp_path: Path, fault: str) -> None:
    with pytest.raises(MalformedFile, match=r"x\.safetensors"):
        read_safetensors(put(tmp_path / "x.safetensors", ST_HOSTILE[fault]))


def test_safetensors_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for bad, word in (
        (safetensors({"b": row("F8_E4M3", (24,))}, B.tobytes()), "F8_E4M3"),
        (safetensors({"b": row(["F32"])}, B.tobytes()), "F32"),
        (safetensors({"__metadata__": {"format": "tf"}, "b": row()}, B.tobytes()), "'tf'"),
    ):
        with pytest.raises(Refused, match=word):
            read_safetensors(put(path, bad))
    assert same(read_safetensors(put(path, safetensors({"b": row()}, B.tobytes())))["b"], B)


# Hugging Face folders


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("limit", [5_000_000_000, 12_000, 1])
@pytest.mark.parametrize("name", ["mistral-tiny", "llama3-tiny"])
def test_hf_round_trip(tmp_path: Path, name: str, limit: int, dtype: str) -> None:
    cfg, layout, _, tensors = weights(name)
    folder = tmp_path / "a" / "hf"
    write_hf(folder, cfg, tensors, dtype, limit, tokenizer_json())
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    assert (len(shards) == 1) == (limit > 12_000)
    assert len(shards) == len(tensors) or limit > 1
    if limit == 12_000:
        big = [p for p in folder.glob("*.safetensors") if len(header_of(p.read_bytes())[1]) > limit]
        assert all(len(header_of(p.read_bytes())[0]) == 2 for p in big)  # one tensor that is too large alone
    loaded = open_any(str(folder))
    assert (loaded.cfg, loaded.kind, loaded.tokenizer_json) == (cfg, "hf", tokenizer_json())
    assert loaded.metadata["torch_dtype"] == dtype
    want = {n: t.astype(BF16) if dtype == "bfloat16" else t for n, t in tensors.items()}
    assert set(loaded.tensors) == set(want)
    assert all(same(loaded.tensors[n], t) for n, t in want.items())
    write_apr(tmp_path / "m.apr", config_to_metadata(cfg), loaded.tensors)  # import
    assert open_any(str(tmp_path / "m.apr")).sha256 == loaded.sha256
    flat = np.empty(layout.size, np.float32)
    fill(layout, flat, loaded)
    flat[layout.by_hf["model.norm.weight"].offset] += 1
    write_apr(tmp_path / "m.apr", config_to_metadata(cfg), layout.named(flat))
    assert open_any(str(tmp_path / "m.apr")).sha256 != loaded.sha256


def test_write_hf_refuses(tmp_path: Path) -> None:
    cfg, _, _, tensors = weights()
    write_hf(tmp_path / "hf", cfg, tensors)
    before = {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()}
    with pytest.raises(Refused, match=r"already holds model\.safetensors"):
        write_hf(tmp_path / "hf", cfg, tensors, max_shard_bytes=1000)
    assert {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()} == before
    with pytest.raises(Refused, match="1 unexpected: extra"):
        write_hf(tmp_path / "new", cfg, {**tensors, "extra": B})
    with pytest.raises(IOFailure, match="cannot create the folder"):
        write_hf(tmp_path / "hf" / "config.json" / "x", cfg, tensors)
    with pytest.raises(UsageError, match="float64"):
        write_hf(tmp_path / "new", cfg, tensors, "float64")
    assert not (tmp_path / "new").exists()


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good folder of several shards, for a test to damage."""
    cfg, _, _, tensors = weights()
    write_hf(tmp_path / "hf", cfg, tensors, max_shard_bytes=12_000)
    open_any(str(tmp_path / "hf"))
    return tmp_path / "hf"


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    d = json.loads(path.read_text())
    change(d["weight_map"])
    path.write_text(json.dumps(d))


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/secret.safetensors",
        "a/b.safetensors",
        "..",
        "a\\b.safetensors",
        ".safetensors",
    ]
    + ["model.bin", "", "a\0.safetensors", 7, None],
)
def test_index_that_points_outside(sharded: Path, name: Any) -> None:
    write_safetensors(sharded.parent / "secret.safetensors", {"model.norm.weight": B})
    edit_index(sharded, lambda m: m.update({"model.norm.weight": name}))
    with pytest.raises(MalformedFile, match="plain"):
        read_hf(sharded)


def test_index_and_shards_must_agree(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    good = index.read_text()
    norm = "model.norm.weight"
    shard = json.loads(good)["weight_map"][norm]
    other = next(f for f in json.loads(good)["weight_map"].values() if f != shard)
    for change, error, word in (
        (lambda m: m.update({norm: other}), MalformedFile, norm),
        (lambda m: m.update({"extra": other}), MalformedFile, "lacks 1 tensor: extra"),
        (lambda m: m.pop(norm), MalformedFile, f"against the index, 1 tensor: {norm}"),
        (lambda m: m.update({norm: "gone.safetensors"}), InputNotFound, r"gone\.safetensors"),
        (lambda m: m.clear(), MalformedFile, "empty"),
    ):
        edit_index(sharded, change)
        with pytest.raises(error, match=word):
            read_hf(sharded)
        index.write_text(good)
    index.write_text(good.replace('"weight_map": {', f'"weight_map": {{"{norm}": "{shard}",'))
    with pytest.raises(MalformedFile, match="is there twice"):
        read_hf(sharded)
    index.write_text('{"weight_map": []}')
    with pytest.raises(MalformedFile, match="weight_map"):
        read_hf(sharded)
    index.write_text(good)
    write_safetensors(sharded / "model.safetensors", {"a": B})
    with pytest.raises(Refused, match="remove the one"):
        read_hf(sharded)
    (sharded / "model.safetensors").unlink()
    (sharded / shard).unlink()
    with pytest.raises(InputNotFound, match=shard):
        read_hf(sharded)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputNotFound, match=r"\.apr file.*model\.safetensors.*index.*beside"):
        open_any(str(tmp_path / "nothing"))
    with pytest.raises(InputNotFound, match="preset has sizes but no weights"):
        open_any("llama-tiny")
    with pytest.raises(InputNotFound, match=r"no model in it, neither config\.json nor safetensors"):
        open_any(str(tmp_path))
    snapshot = tmp_path / "cache/snapshots/1f3a"
    steps = [tmp_path / f"trainer/checkpoint-{n}" for n in (500, 1000)]
    for folder in (snapshot, *steps):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
        (folder / "config.json").touch()
    with pytest.raises(InputNotFound, match=f"no model in it.*; give {snapshot}$"):
        open_any(str(tmp_path / "cache"))
    with pytest.raises(InputNotFound, match=f"give {steps[1]}, or another of 2 folders in it"):
        open_any(str(tmp_path / "trainer"))
    write_json(tmp_path / "config.json", to_hf(PRESETS["llama-tiny"]))
    with pytest.raises(InputNotFound, match=r"neither model\.safetensors nor"):
        open_any(str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(InputNotFound, match=r"pytorch_model\.bin is a pickle"):
        open_any(str(tmp_path))
    with pytest.raises(MalformedFile, match=r"pytorch_model\.bin: starts with b''"):
        open_any(str(tmp_path / "pytorch_model.bin"))


def test_of_snapshots_the_one_that_was_written_last_is_named(tmp_path: Path) -> None:
    for when, name in ((2, "0a9"), (1, "f00")):  # by name the other is the last
        folder = tmp_path / "snapshots" / name
        folder.mkdir(parents=True)
        for file in ("model.safetensors", "config.json"):
            (folder / file).touch()
        os.utime(folder, (when, when))
    with pytest.raises(InputNotFound, match=r"give \S*snapshots/0a9, or another of 2"):
        open_any(str(tmp_path))


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    """checkpoint-500 of a trainer with PEFT has adapters only; it is named as what it is, here and from above."""
    adapters = [tmp_path / f"out/checkpoint-{n}" for n in (500, 1000)]
    for folder in adapters:
        folder.mkdir(parents=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / file).touch()
    for given in (tmp_path / "out", adapters[1]):
        with pytest.raises(InputNotFound, match=f"LoRA adapter.*apr merge BASE {adapters[1]} -o"):
            open_any(str(given))
    only = tmp_path / "bare/step"  # tensors without the config.json that makes them a model
    only.mkdir(parents=True)
    (only / "optimizer.safetensors").touch()
    with pytest.raises(InputNotFound, match="give a Hugging Face folder"):
        open_any(str(tmp_path / "bare"))
    model = tmp_path / "out/checkpoint-2"
    model.mkdir()
    for file in ("config.json", "model.safetensors"):
        (model / file).touch()
    with pytest.raises(InputNotFound, match=f"give {model}$"):
        open_any(str(tmp_path / "out"))


def test_single_safetensors_file(tmp_path: Path) -> None:
    cfg, _, _, tensors = weights()
    write_hf(tmp_path / "hf", cfg, tensors)
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "other.safetensors")
    loaded = open_any(str(tmp_path / "hf" / "other.safetensors"))
    assert loaded.cfg == cfg
    assert same(loaded.tensors["model.norm.weight"], tensors["model.norm.weight"])


# Filling a buffer


def stored(tmp_path: Path, cfg: ModelConfig, tensors: Tensors) -> Iterator[str]:
    """The same tensors, whatever they are, as each kind of checkpoint."""
    write_apr(tmp_path / "m.apr", config_to_metadata(cfg), tensors)
    folder = tmp_path / "hf"
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", to_hf(cfg))
    yield from (str(tmp_path / "m.apr"), str(folder), str(folder / "model.safetensors"))


@pytest.mark.parametrize("name", ["llama-tiny", "qwen2-tiny", "mistral-tiny"])
def test_tensors_that_do_not_fit(tmp_path: Path, name: str) -> None:
    cfg, _, _, tensors = weights(name)
    q = "model.layers.1.mlp.up_proj.weight"
    for change, words in (
        ({"model.norm.weight": None}, ["1 missing: model.norm.weight"]),
        ({"model.layers.2.input_layernorm.weight": B}, ["1 unexpected: model.layers.2"]),
        ({q: tensors[q].T}, [f"1 of wrong shape: {q} "]),
        ({q: tensors[q].reshape(-1)}, [f"1 of wrong shape: {q} "]),
        ({q: None, "x.bias": B}, [f"1 missing: {q}", "1 unexpected: x.bias"]),
        ({q: tensors[q].astype(np.int32)}, [f"1 not floating point: {q}"]),
        ({n: None for n in tensors if "mlp" in n}, ["6 missing", ", ..."]),
        ({"model.inv_freq": B}, ["1 unexpected"]),
    ):
        bad = {n: t for n, t in {**tensors, **change}.items() if t is not None}
        for source in stored(tmp_path, cfg, bad):
            with pytest.raises(Refused) as e:
                open_any(source)
            assert all(word in str(e.value) for word in [source, *words]), str(e.value)
            assert str(e.value).count("model.layers.") <= 5


def test_lost_biases_are_missed(tmp_path: Path) -> None:
    cfg, _, _, tensors = weights("qwen2-tiny")
    for source in stored(tmp_path, cfg, {n: t for n, t in tensors.items() if not n.endswith("bias")}):
        with pytest.raises(Refused, match=r"6 missing: model\.layers\.0\.self_attn\.q_proj\.bias"):
            open_any(source)


def test_tied_head(tmp_path: Path) -> None:
    cfg, layout, flat, tensors = weights()
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    only_head = {n: t for n, t in tensors.items() if n != embed} | {head: tensors[embed]}
    for variant in (only_head, {**tensors, head: tensors[embed].copy()}):
        for source in stored(tmp_path, cfg, variant):
            back = np.empty(layout.size, np.float32)
            fill(layout, back, open_any(source))
            assert same(back, flat)
    other = tensors[embed].copy()
    other[-1, -1] = np.nextafter(other[-1, -1], np.float32(9))
    for bad in (other, tensors[embed].astype(BF16), tensors[embed].view(np.int32), tensors[embed][:-1]):
        for source in stored(tmp_path, cfg, {**tensors, head: bad}):
            with pytest.raises(Refused, match=r"lm_head\.weight differs"):
                open_any(source)
    for source in stored(tmp_path, replace(cfg, tie_word_embeddings=False), tensors):
        with pytest.raises(Refused, match=r"1 missing: lm_head\.weight \(without"):
            open_any(source)


def test_old_rotary_tables_are_ignored(tmp_path: Path) -> None:
    cfg, layout, flat, tensors = weights()
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32) for i in range(2)}
    for source in stored(tmp_path, cfg, {**tensors, **extra}):
        back = np.empty(layout.size, np.float32)
        fill(layout, back, open_any(source))
        assert same(back, flat)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
def test_weights_that_are_not_finite(tmp_path: Path, value: float, dtype: Any) -> None:
    cfg, layout, _, tensors = weights()
    name = "model.layers.1.mlp.down_proj.weight"
    good = {n: t.astype(dtype) for n, t in tensors.items()}
    write_hf(tmp_path / "hf", cfg, good)
    if dtype != np.float32:
        (tmp_path / "hf" / "model.safetensors").unlink()
        write_safetensors(tmp_path / "hf" / "model.safetensors", good)
    path = tmp_path / "hf" / "model.safetensors"
    loaded = open_any(str(path))
    fill(layout, np.empty(layout.size, np.float32), loaded)
    entry_ = loaded.tensors.entries[name]  # type: ignore[attr-defined]
    raw = bytearray(path.read_bytes())
    last = entry_.offset + entry_.nbytes - entry_.dtype.itemsize
    raw[last : last + entry_.dtype.itemsize] = np.array([value], dtype).tobytes()
    path.write_bytes(raw)
    with pytest.raises(Refused, match=rf"{name}: element 2239 is {value}"):
        fill(layout, np.empty(layout.size, np.float32), open_any(str(path)))


def test_float64_that_overflows_float32(tmp_path: Path) -> None:
    cfg, layout, _, tensors = weights()
    wide = {n: t.astype(np.float64) for n, t in tensors.items()}
    wide["model.norm.weight"][3] = 1e300
    for source in stored(tmp_path, cfg, wide):
        loaded = open_any(source)
        with pytest.raises(Refused, match=r"model\.norm\.weight: element 3 is inf"):
            fill(layout, np.empty(layout.size, np.float32), loaded)
        back = np.empty(layout.size, np.float64)
        fill(layout, back, loaded)
        assert all(np.array_equal(view, wide[n]) for n, view in layout.named(back).items())


def test_fill_wants_a_buffer_of_the_layout(tmp_path: Path) -> None:
    cfg, layout, _, tensors = weights()
    write_apr(tmp_path / "m.apr", config_to_metadata(cfg), tensors)
    loaded = open_any(str(tmp_path / "m.apr"))
    for flat in (
        np.empty(layout.size - 1, np.float32),
        np.empty(layout.size, np.float16),
        np.empty((layout.size, 1)),
    ):
        with pytest.raises(Refused, match="buffer of"):
            fill(layout, flat, loaded)
    other = Layout(PRESETS["qwen2-tiny"])
    with pytest.raises(Refused, match="missing"):
        fill(other, np.empty(other.size, np.float32), loaded)


@pytest.mark.parametrize(
    "change", [dict(num_hidden_layers=2**39), dict(vocab_size=2**39), dict(hidden_size=2**38)]
)
def test_config_of_absurd_size(tmp_path: Path, change: dict[str, int]) -> None:
    cfg, _, _, tensors = weights()
    write_hf(tmp_path, cfg, tensors)
    write_json(tmp_path / "config.json", {**to_hf(cfg), **change})
    with pytest.raises(Refused, match=r"at most 4096|of wrong shape"):
        open_any(str(tmp_path))


def test_stories260k_loads() -> None:
    loaded = open_any(str(data("stories260K") / "hf"))
    layout = Layout(loaded.cfg)
    assert layout.num_parameters == 260_032
    assert loaded.tokenizer_json is not None
    assert '"<s>"' in loaded.tokenizer_json
    flat = np.empty(layout.size, np.float32)
    fill(layout, flat, loaded)
    raw = np.fromfile(data("stories260K") / "stories260K.bin", np.float32, offset=28)  # 7 sizes, then weights
    assert same(layout.views(flat).embed, raw[: 512 * 64].reshape(512, 64))


# What stands in a folder


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A folder with a model in one file, and its tokenizer."""
    cfg, _, _, tensors = weights()
    write_hf(tmp_path / "whole", cfg, tensors, tokenizer_json=tokenizer_json())
    return tmp_path / "whole"


@pytest.mark.parametrize(
    "plant", [os.mkdir, os.mkfifo, lambda p: os.symlink("/dev/zero", p), lambda p: os.symlink(p, p)]
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "m.apr"])
def test_what_is_no_file_is_an_error_and_no_hang(
    whole: Path, name: str, plant: Callable[[Path], Any]
) -> None:
    (whole / name).unlink(missing_ok=True)
    plant(whole / name)
    source = whole / name if name == "m.apr" else whole
    with pytest.raises(InputNotFound, match=name):
        open_any(str(source))


def test_links_of_a_cache_are_followed(whole: Path, sharded: Path, tmp_path: Path) -> None:
    """The Hub's cache keeps blobs under their hash, and a folder of links for each revision."""
    for folder in (whole, sharded):
        cache = tmp_path / "cache" / folder.name
        (cache / "blobs").mkdir(parents=True)
        (cache / "snapshot").mkdir()
        for i, path in enumerate(sorted(folder.iterdir())):
            path.rename(cache / "blobs" / str(i))
            (cache / "snapshot" / path.name).symlink_to(f"../blobs/{i}")
        assert open_any(str(cache / "snapshot")).sha256
    with pytest.raises(InputNotFound):
        open_any(str(folder))


@pytest.mark.parametrize(
    ("file", "error"),
    [
        ("../model.safetensors", MalformedFile),
        ("/tmp/model.safetensors", MalformedFile),
        ("a\\b.safetensors", MalformedFile),
        ("x" * 300 + ".safetensors", IOFailure),
        ("\x1b[2J.safetensors", InputNotFound),
    ],
)
def test_names_in_an_index_stay_in_the_folder(sharded: Path, file: str, error: type[AprError]) -> None:
    edit_index(sharded, lambda m: m.update({next(iter(m)): file}))
    with pytest.raises(error) as e:
        open_any(str(sharded))
    assert str(e.value).isprintable()


class Counted(dict):
    """A mapping that counts the names that are taken from it one after the other."""

    taken = 0

    def items(self):  # type: ignore[override]
        return [(name, self[name]) for name in self]

    def values(self):  # type: ignore[override]
        return [self[name] for name in self]

    def __iter__(self) -> Iterator[str]:
        for name in super().__iter__():
            self.taken += 1
            yield name


@pytest.mark.parametrize("looks", [1, 2])
def test_an_index_of_many_names_is_read_once(
    sharded: Path, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    """The work grows with names plus files, not with their product. Planted: a second look at all names."""
    row = {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}
    many = [f"model-{i}.safetensors" for i in range(60)]
    for file in many:
        (sharded / file).write_bytes(safetensors({file: row}, b"\0"))
    edit_index(
        sharded, lambda m: m.update({f"{i}": "zz.safetensors" for i in range(900)} | {f: f for f in many})
    )
    parse, found, opened = hf.parse_json, list[Counted](), list[Path]()

    def parsed(*args: Any, **more: Any) -> Any:
        value = parse(*args, **more)
        if "weight_map" in value:
            found.append(Counted(value["weight_map"]))
            value["weight_map"] = found[-1]
            for _ in range(1, looks):
                list(found[-1])
        return value

    read = hf.read_safetensors
    monkeypatch.setattr(hf, "parse_json", parsed)
    monkeypatch.setattr(hf, "read_safetensors", lambda path: (opened.append(path), read(path))[1])
    with pytest.raises(InputNotFound, match=r"zz\.safetensors"):
        open_any(str(sharded))
    (index,) = found
    assert index.taken == looks * len(index)
    assert len(opened) == len(set(opened)) == len(set(index.values()))


def test_a_tokenizer_that_is_no_text_names_its_file(tmp_path: Path) -> None:
    cfg, _, _, tensors = weights()
    write_apr(tmp_path / "m.apr", {**config_to_metadata(cfg), "tokenizer.json": [5]}, tensors)
    with pytest.raises(MalformedFile, match=r"m\.apr: 'tokenizer\.json' is not text but a list of 1"):
        open_any(str(tmp_path / "m.apr"))


@pytest.mark.parametrize("eos", [{"a": 1}, 1.5, True, [[1]], [None, 1.5], "no token", 10**30, -1])
def test_the_end_of_text_is_the_id_of_a_token(tmp_path: Path, eos: Any) -> None:
    cfg = replace(PRESETS["llama-tiny"], vocab_size=300)
    layout = Layout(cfg)
    tensors = layout.named(np.ones(layout.size, np.float32))
    write_hf(tmp_path, cfg, tensors, tokenizer_json=json.dumps(gpt2_like()))
    write_json(tmp_path / "config.json", {**to_hf(cfg), "eos_token_id": eos})
    if eos == [None, 1.5]:
        assert open_any(str(tmp_path)).tokenizer is not None
        return
    with pytest.raises(MalformedFile, match=r"eos"):
        _ = open_any(str(tmp_path)).tokenizer


def test_sizes_that_only_a_message_would_show(tmp_path: Path) -> None:
    long = safetensors({"b": {**row(), "shape": [1] * 100_000}}, B.tobytes())
    with pytest.raises(MalformedFile, match=r"x\.safetensors: tensor 'b'") as e:
        read_safetensors(put(tmp_path / "x.safetensors", long))
    assert len(str(e.value)) < 5000
