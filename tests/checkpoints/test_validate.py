"""`apr validate`: each planted corruption turns exactly its own row red; what cannot be asked is SKIPPED, not passed."""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import interop_cases
from apr.checkpoints.apr2 import HAS_VOCAB, HEADER, read_apr, write_apr
from apr.checkpoints.apr2_metadata import config_to_metadata, embed_tokenizer, metadata_to_config
from apr.checkpoints.hf import write_hf, write_safetensors
from apr.checkpoints.registry import validate
from apr.checkpoints.state import sha256
from apr.checkpoints.validate import figures_of
from apr.cli.main import main
from apr.common.errors import InputNotFound, MalformedFile, Refused
from apr.common.finding import FAIL, PASS, SKIPPED
from apr.model.params import Layout
from apr.model.presets import PRESETS

CFG = dataclasses.replace(PRESETS["qwen2-tiny"], vocab_size=interop_cases.VOCAB, tie_word_embeddings=False)
MATRIX, NORM, HEAD = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"
Tensors = dict[str, np.ndarray]


def weights() -> Tensors:
    return {n: x.copy() for n, x in interop_cases.weights(interop_cases.Case(CFG, "float32", 1)).items()}


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tok = interop_cases.tokenizer(tmp_path_factory.mktemp("tok"))
    out = config_to_metadata(CFG)
    embed_tokenizer(out, tok.json, tok.eos_id)
    return out


def verdicts(path: Path) -> dict[str, str]:
    return {r.name: r.verdict for r in validate(str(path)).findings}


def red(path: Path) -> list[str]:
    return [name for name, word in verdicts(path).items() if word == FAIL]


def seal(raw: bytes, header: bool = True) -> bytes:
    """The bytes with checksums that are right again, so that only what was planted is wrong."""
    if header:
        crc = zlib.crc32(raw[44:64], zlib.crc32(raw[:40]))
        raw = raw[:40] + struct.pack("<I", crc) + raw[44:]
    return raw[:-4] + struct.pack("<I", zlib.crc32(raw[:-4]))


def rewrite(raw: bytes, **fields: int) -> bytes:
    """A header with other fields."""
    names = (
        "magic",
        "major",
        "minor",
        "flags",
        "count",
        "meta_at",
        "meta_size",
        "index_at",
        "data_at",
        "crc",
        "rest",
    )
    old = dict(zip(names, HEADER.unpack(raw[:64]), strict=True))
    return HEADER.pack(*(old | fields).values()) + raw[64:]


def field(raw: bytes, name: str) -> int:
    places = {"flags": ("<H", 6), "meta_size": ("<I", 20), "index_at": ("<Q", 24), "data_at": ("<Q", 32)}
    return int(struct.unpack_from(places[name][0], raw, places[name][1])[0])


def patch(raw: bytes, at: int, new: bytes) -> bytes:
    return raw[:at] + new + raw[at + len(new) :]


# --- the bytes of the file


def test_a_sound_file_passes_every_row(meta: dict[str, Any], tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        write_apr(tmp_path / "m.apr", meta, weights(), dtype)
        got = verdicts(tmp_path / "m.apr")
        assert [n for n, word in got.items() if word != PASS] == ["recorded hash"]
        assert got["recorded hash"] == SKIPPED
        assert len(got) == 21


def tag_at(raw: bytes) -> int:
    """Where the dtype tag of the first tensor of the index stands."""
    at = field(raw, "index_at")
    return at + 2 + struct.unpack_from("<H", raw, at)[0]


BYTES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "another version": ("header", lambda r: seal(rewrite(r, minor=1))),
    "reserved bytes": ("header", lambda r: seal(rewrite(r, rest=b"\0" * 19 + b"\1"))),
    "magic of v1": ("header", lambda r: b"APRN" + r[4:]),
    "header checksum": ("header checksum", lambda r: seal(patch(r, 40, b"\0\0\0\0"), header=False)),
    "compressed": ("features", lambda r: seal(rewrite(r, flags=field(r, "flags") | 2))),
    "column-major": ("features", lambda r: seal(rewrite(r, flags=field(r, "flags") | 0x800))),
    "index elsewhere": ("sections", lambda r: seal(rewrite(r, index_at=field(r, "index_at") + 64))),
    "metadata that are no JSON": ("metadata", lambda r: seal(patch(r, 64, b"["))),
    "names out of order": ("index", lambda r: seal(patch(r, field(r, "index_at") + 2, b"z"))),
    "a tensor on another": ("index", lambda r: seal(_offset_of_last(r))),
    "unknown dtype": ("tensor types", lambda r: seal(patch(r, tag_at(r), b"\x63"))),
    "quantised": ("tensor types", lambda r: seal(patch(r, tag_at(r), b"\x0c"))),
    "another shape than bytes": (
        "tensor types",
        lambda r: seal(patch(r, tag_at(r) + 2, struct.pack("<Q", 7))),
    ),
    "truncated": ("length", lambda r: r[: len(r) // 2]),
    "truncated in the index": ("length", lambda r: r[: field(r, "index_at") + 100]),
    "truncated in the metadata": ("length", lambda r: r[:1000]),
    "truncated by a byte": ("length", lambda r: r[:-1]),
    "too long": ("length", lambda r: r + b"\0"),
    "a flipped bit of a weight": (
        "footer checksum",
        lambda r: patch(r, len(r) - 600, bytes([r[len(r) - 600] ^ 1])),
    ),
    "footer": ("footer checksum", lambda r: r[:-4] + b"\0\0\0\0"),
    "vocabulary flag": ("vocabulary flag", lambda r: seal(rewrite(r, flags=field(r, "flags") & ~HAS_VOCAB))),
}


def _offset_of_last(raw: bytes) -> bytes:
    """The last tensor of the index moved to where the first one lies."""
    end = raw.rindex(
        struct.pack("<H", len(b"model.norm.weight")) + b"model.norm.weight", 0, field(raw, "data_at")
    )
    at = end + 2 + len(b"model.norm.weight") + 2 + 8
    return patch(raw, at, struct.pack("<Q", 0))


@pytest.mark.parametrize("fault", BYTES)
def test_a_planted_fault_of_the_bytes_turns_its_row_red(
    fault: str, meta: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, plant = BYTES[fault]
    path = tmp_path / "m.apr"
    write_apr(path, meta, weights())
    raw = plant(path.read_bytes())
    path.write_bytes(raw)
    if fault == "magic of v1":
        assert set(red(path)) == {"header", "header checksum"}  # the checksum covers the magic
    else:
        assert red(path) == [row]
    assert main(["validate", str(path), "--json"]) == 4
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == FAIL
    if row != "vocabulary flag":  # which loading does not look at
        with pytest.raises((MalformedFile, Refused)):
            read_apr(path)


def test_every_flipped_byte_is_seen(meta: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "m.apr"
    write_apr(path, meta, weights())
    raw = path.read_bytes()
    rng = np.random.default_rng(3)
    for at in [*range(64), *rng.integers(64, len(raw), 40).tolist()]:
        path.write_bytes(patch(raw, at, bytes([raw[at] ^ 0x10])))
        try:
            found = red(path)
        except MalformedFile:
            assert at < 3  # no magic: no file of any kind
            continue
        assert found, at


def test_hostile_headers_allocate_nothing(meta: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "m.apr"
    write_apr(path, meta, weights())
    raw = path.read_bytes()
    for fields in (
        {"count": 2**32 - 1},
        {"meta_size": 2**32 - 1},
        {"data_at": 2**63},
        {"index_at": 2**63, "data_at": 2**63},
    ):
        path.write_bytes(seal(rewrite(raw, **fields)))
        assert red(path)


# --- what the tensors and metadata say


def change(tensors: Tensors, name: str, value: Any) -> Tensors:
    x = tensors[name]
    tensors[name] = value(x) if callable(value) else value
    return tensors


def as_float16(x: np.ndarray) -> np.ndarray:
    """Bits of bfloat16 that say float16, as the original's import wrote them."""
    return x.astype(ml_dtypes.bfloat16).view(np.float16)


def as_bfloat16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(ml_dtypes.bfloat16)


def without(tensors: Tensors, name: str) -> Tensors:
    return {n: t for n, t in tensors.items() if n != name}


CONTENT: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "missing tensor": ("names", lambda t: without(t, MATRIX)),
    "unexpected tensor": (
        "names",
        lambda t: t | {"model.layers.0.self_attn.o_proj.bias": np.ones(4, np.float32)},
    ),
    "biases lost": ("names", lambda t: {n: x for n, x in t.items() if not n.endswith(".bias")}),
    "transposed": ("shapes", lambda t: change(t, MATRIX, lambda x: np.ascontiguousarray(x.T))),
    "whole numbers": ("shapes", lambda t: change(t, MATRIX, lambda x: (x * 100).astype(np.int32))),
    "untied without a head": ("tied head", lambda t: without(t, HEAD)),
    "a tied model stored twice": ("tied head", lambda t: t | {HEAD: t["model.embed_tokens.weight"].copy()}),
    "all zero": ("matrices vary", lambda t: change(t, MATRIX, np.zeros_like)),
    "constant": ("matrices vary", lambda t: change(t, MATRIX, lambda x: np.full_like(x, 0.25))),
    "bfloat16 tagged float16": ("dtype sanity", lambda t: {n: as_float16(x) for n, x in t.items()}),
    "float16 tagged bfloat16": ("dtype sanity", lambda t: {n: as_bfloat16(x) for n, x in t.items()}),
    "one matrix tagged wrongly": ("dtype sanity", lambda t: change(t, MATRIX, as_float16)),
    "absurdly large": ("dtype sanity", lambda t: change(t, MATRIX, lambda x: x * np.float32(1e12))),
}


@pytest.mark.parametrize("fault", CONTENT)
def test_a_planted_fault_of_the_content_turns_its_row_red(
    fault: str, meta: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, plant = CONTENT[fault]
    tensors = plant(weights())
    write_apr(tmp_path / "m.apr", meta, tensors)
    assert red(tmp_path / "m.apr") == [row]
    assert main(["validate", str(tmp_path / "m.apr")]) == 9
    assert row in capsys.readouterr().out
    write_apr(tmp_path / "sound.apr", meta, weights())
    # A safetensors file beside a config has the same rows for what it holds.
    folder = tmp_path / "hf"
    write_hf(folder, CFG, weights())
    (folder / "model.safetensors").unlink()
    write_safetensors(folder / "model.safetensors", tensors)
    assert red(folder) == [row]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value: float, meta: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "m.apr"
    tensors = weights()
    tensors[MATRIX][0, 0] = 7.75  # its bits are found again in the file
    write_apr(path, meta, tensors)
    raw = path.read_bytes()
    at = raw.index(struct.pack("<f", 7.75), field(raw, "data_at"))
    path.write_bytes(seal(patch(raw, at, struct.pack("<f", value))))
    assert red(path) == ["finite values"]
    folder = tmp_path / "hf"
    write_hf(folder, CFG, weights())
    tensors[MATRIX][0, 0] = value
    (folder / "model.safetensors").unlink()
    write_safetensors(folder / "model.safetensors", tensors, finite=False)
    assert red(folder) == ["finite values"]


def test_tied_models(meta: dict[str, Any], tmp_path: Path) -> None:
    cfg = dataclasses.replace(CFG, tie_word_embeddings=True)
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    layout.randomise(host, 1)
    tensors = layout.named(host)
    tied = {**meta, **config_to_metadata(cfg)}
    embed = tensors["model.embed_tokens.weight"]
    for more, rows in (({}, []), ({HEAD: embed.copy()}, []), ({HEAD: embed * 2}, ["tied head"])):
        write_apr(tmp_path / "m.apr", tied, {**tensors, **more})
        assert red(tmp_path / "m.apr") == rows
    write_apr(tmp_path / "m.apr", tied, {**without(tensors, "model.embed_tokens.weight"), HEAD: embed})
    assert red(tmp_path / "m.apr") == []


METADATA: dict[str, tuple[str, dict[str, Any]]] = {
    "a typed key says otherwise": ("config complete", {"hidden_size": 64}),
    "no hf_config and no tie key": ("config complete", {"hf_config": None}),
    "more parameters than there are": ("counts", {}),
    "eos is an ordinary string": ("tokenizer", {"tokenizer.eos_token_id": 5}),
    "eos is no id": ("tokenizer", {"tokenizer.eos_token_id": 9999}),
    "another vocabulary": ("tokenizer", {"tokenizer.vocabulary": ["a", "b"]}),
}


@pytest.mark.parametrize("fault", METADATA)
def test_a_planted_fault_of_the_metadata_turns_its_row_red(
    fault: str, meta: dict[str, Any], tmp_path: Path
) -> None:
    row, said = METADATA[fault]
    path = tmp_path / "m.apr"
    changed = {k: v for k, v in {**meta, **said}.items() if v is not None}
    if fault.startswith("no hf_config"):
        del changed["max_position_embeddings"]
    write_apr(path, changed, weights())
    if row == "counts":  # the writer sets them itself
        raw = path.read_bytes()
        old = b'"param_count":' + str(sum(t.size for t in weights().values())).encode()
        at = raw.index(old)
        path.write_bytes(seal(patch(raw, at, old[:-1] + (b"1" if old[-1:] != b"1" else b"2"))))
    assert red(path) == [row]


def test_a_tokenizer_that_loses_text_or_has_too_many_ids(meta: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "m.apr"
    d = json.loads(meta["tokenizer.json"])
    d["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "WhitespaceSplit"})
    write_apr(path, {**meta, "tokenizer.json": json.dumps(d)}, weights())
    assert red(path) == ["tokenizer"]
    write_apr(path, {**meta, "tokenizer.json": "{"}, weights())
    assert red(path) == ["tokenizer"]
    d = json.loads(meta["tokenizer.json"])
    last = len(meta["tokenizer.vocabulary"])
    more = [{**d["added_tokens"][0], "id": last + i, "content": f"<|{i}|>"} for i in range(60)]
    text = json.dumps({**d, "added_tokens": d["added_tokens"] + more})
    big = {k: v for k, v in meta.items() if not k.startswith("tokenizer")}
    embed_tokenizer(big, text, meta["tokenizer.eos_token_id"])
    write_apr(path, big, weights())
    assert red(path) == ["tokenizer fits"]


def test_the_recorded_hash_of_a_run(meta: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "epoch-001.apr"
    tensors = weights()
    write_apr(path, meta, tensors)
    names = [s.hf for s in Layout(CFG).in_order()]
    facts = {"weights_sha": sha256(tensors[n] for n in names)}
    (tmp_path / "epoch-001.metadata.json").write_text(json.dumps(facts))
    assert verdicts(path)["recorded hash"] == PASS
    tensors[MATRIX][0, 0] += 1
    write_apr(path, meta, tensors)
    assert red(path) == ["recorded hash"]


# --- files of the original


def test_files_of_the_original(meta: dict[str, Any], tmp_path: Path) -> None:
    """No hf_config, aliases of keys, no tie and bias keys, a key that occurs twice, no text of the tokenizer."""
    old = {
        k: v
        for k, v in meta.items()
        if k
        not in (
            "hf_config",
            "tokenizer.json",
            "tie_word_embeddings",
            "attention_bias",
            "num_layers",
            "num_heads",
        )
    }
    old |= {"num_hidden_layers": CFG.num_layers, "num_attention_heads": CFG.num_heads}
    path = tmp_path / "m.apr"
    write_apr(path, old, weights(), "bfloat16")
    got = {r.name: r for r in validate(str(path)).findings}
    assert {n for n, r in got.items() if r.verdict == SKIPPED} == {
        "recorded hash",
        "tokenizer",
        "tokenizer fits",
    }
    assert not red(path)
    assert metadata_to_config(read_apr(path).metadata, "x", set(weights())) == CFG
    raw = path.read_bytes()  # the last of two keys counts
    size = field(raw, "meta_size")
    twice = b'{"vocab_size":7,' + raw[65 : 64 + size]
    write_apr(path, {}, weights(), "bfloat16")
    data = path.read_bytes()
    index = data[field(data, "index_at") : -4]
    meta_end = 64 + -(-len(twice) // 64) * 64
    new = rewrite(
        data, meta_size=len(twice), index_at=meta_end, data_at=meta_end + field(data, "data_at") - field(data, "index_at"),
        flags=field(raw, "flags"),
    )[:64] + twice.ljust(meta_end - 64, b"\0") + index + b"\0\0\0\0"  # fmt: skip
    path.write_bytes(seal(new))
    assert red(path) == []
    assert read_apr(path).metadata["vocab_size"] == CFG.vocab_size
    write_apr(path, {**old, "architecture": "Qwen2ForCausalLM"}, weights())  # had no biases in the original
    assert red(path) == []


def test_magic_of_version_1_is_refused_with_the_reason(meta: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "m.apr"
    path.write_bytes(b"APRN" + bytes(200))
    (row, *_) = validate(str(path)).findings
    assert row.verdict == FAIL
    assert "v1" in row.figure
    with pytest.raises(MalformedFile, match="APRN"):
        read_apr(path)


# --- Hugging Face folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    interop_cases.write(interop_cases.CASES["qwen3"], tmp_path / "hf")
    return tmp_path / "hf"


def test_a_sound_folder_and_file(folder: Path) -> None:
    assert set(verdicts(folder).values()) == {PASS}
    shard = next(folder.glob("*.safetensors"))
    got = verdicts(shard)  # one of several shards is no whole model
    assert got["names"] == FAIL
    assert got["weights files"] == PASS


FOLDER: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a truncated shard": ("weights files", lambda f: _edit(next(f.glob("*.safetensors")), lambda b: b[:-8])),
    "a header that lies": (
        "weights files",
        lambda f: _edit(next(f.glob("*.safetensors")), lambda b: patch(b, 0, b"\1")),
    ),
    "a missing shard": ("weights files", lambda f: sorted(f.glob("*.safetensors"))[-1].unlink()),
    "an index of other tensors": (
        "weights files",
        lambda f: _edit(f / "model.safetensors.index.json", _rename),
    ),
    "no tie key": (
        "config complete",
        lambda f: _edit(f / "config.json", lambda b: b.replace(b"tie_word", b"tje_word")),
    ),
    "config of no JSON": ("config complete", lambda f: _edit(f / "config.json", lambda b: b[:-3])),
    "broken generation config": (
        "json files",
        lambda f: _edit(f / "generation_config.json", lambda b: b[1:]),
    ),
    "eos that is no token": ("tokenizer", lambda f: _edit(f / "config.json", _eos)),
}


def _edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def _rename(raw: bytes) -> bytes:
    return raw.replace(b'"model.norm.weight"', b'"model.morn.weight"')


def _eos(raw: bytes) -> bytes:
    return json.dumps({**json.loads(raw), "eos_token_id": 3}).encode()


@pytest.mark.parametrize("fault", FOLDER)
def test_a_planted_fault_of_a_folder_turns_its_row_red(fault: str, folder: Path) -> None:
    row, plant = FOLDER[fault]
    plant(folder)
    assert red(folder) == [row]


# --- the command and the list


def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputNotFound):
        validate(str(tmp_path / "none.apr"))
    (tmp_path / "x.apr").write_bytes(b"PK\3\4 something else")
    assert main(["validate", str(tmp_path / "x.apr")]) == 4
    assert "neither an APR v2 nor a GGUF file" in capsys.readouterr().err
    (tmp_path / "empty.apr").write_bytes(b"")
    assert main(["validate", str(tmp_path / "empty.apr")]) == 4
    (tmp_path / "short.apr").write_bytes(b"APR\0")
    assert main(["validate", str(tmp_path / "short.apr")]) == 4


def test_command(meta: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_apr(tmp_path / "m.apr", meta, weights())
    assert main(["validate", str(tmp_path / "m.apr")]) == 0
    assert "PASS: 20 passed, 1 skipped" in capsys.readouterr().out
    assert main(["validate", str(tmp_path / "m.apr"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == PASS
    assert all(r["figure"] for r in said["checks"])


def test_figures() -> None:
    x = np.array([[1, -3], [np.nan, 0]], np.float32)
    got = figures_of(x)
    assert (got.not_finite, got.low, got.high) == (1, -3, 1)
    assert got.rms == pytest.approx((10 / 3) ** 0.5)


def test_real_weights_are_sane(data: Callable[[str], Path]) -> None:
    assert set(verdicts(data("stories260K/hf")).values()) == {PASS}
