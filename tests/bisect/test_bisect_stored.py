"""The second reader of Hugging Face folders: what the first reads wrongly is seen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from apr.bisect import stored
from apr.bisect.rule import BF16
from apr.checkpoints.hf import write_hf, write_safetensors
from apr.checkpoints.registry import open_host
from apr.model.hf_config import to_hf
from apr.model.params import Layout
from apr.model.presets import PRESETS

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(params=["qwen2-tiny", "qwen3-tiny"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model in float32, float16 and bfloat16."""
    cfg = PRESETS[request.param]
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    layout.randomise(host, 3)
    kinds = (np.float32, np.float16, BF16)
    named = {n: x.astype(kinds[i % 3]) for i, (n, x) in enumerate(layout.named(host).items())}
    (tmp_path / "config.json").write_text(json.dumps(to_hf(cfg)))
    write_safetensors(tmp_path / "model.safetensors", named)
    return tmp_path


def bad(folder: Path, host: np.ndarray | None = None, **changes: object) -> list[tuple[str, str]]:
    source = open_host(str(folder))
    cfg = replace(source.cfg, **changes)  # type: ignore[arg-type]
    rows = stored.rows(str(folder), cfg, source.host if host is None else host)
    assert {r.stage for r in rows} == {"configuration", "upload"}
    return [(r.op, r.tap) for r in rows if not r.ok]


def test_what_is_read_right_agrees(folder: Path) -> None:
    assert bad(folder) == []
    source = open_host(str(folder))
    tensors = [r for r in stored.rows(str(folder), source.cfg, source.host) if r.op == "read_file"]
    assert len(tensors) == len(source.layout.slots)
    assert stored.rows(str(folder / "model.safetensors"), source.cfg, source.host) != []


def test_files_that_hold_no_weights_of_the_model_are_left_alone(folder: Path) -> None:
    (folder / "other.safetensors").write_bytes(b"not one")
    assert bad(folder) == []


def test_a_folder_of_several_files(folder: Path) -> None:
    source = open_host(str(folder))
    named = source.layout.named(source.host)
    write_hf(folder / "parts", source.cfg, named, max_shard_bytes=40_000)
    assert len(list((folder / "parts").glob("*.safetensors"))) > 1
    assert bad(folder / "parts") == []


def test_a_dtype_that_is_taken_for_another_is_seen(folder: Path) -> None:
    source = open_host(str(folder))
    at = source.layout.by_hf[NORM]
    x = source.host[at.offset : at.offset + at.size]
    x[...] = x.astype(BF16).view(np.float16)
    assert bad(folder, source.host) == [("read_file", NORM)]


def test_what_no_model_has_is_not_read(folder: Path) -> None:
    """Old Llama files hold a table that the configuration determines, in any dtype."""
    source = open_host(str(folder))
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.int64)}
    write_safetensors(folder / "model.safetensors", {**source.layout.named(source.host), **table})
    assert bad(folder) == []


def test_one_bit_is_seen(folder: Path) -> None:
    source = open_host(str(folder))
    source.host.view(np.uint32)[source.layout.by_hf[NORM].offset + 2] ^= 1
    assert bad(folder, source.host) == [("read_file", NORM)]


def test_a_configuration_that_is_not_the_file_s_is_seen(folder: Path) -> None:
    assert bad(folder, rms_norm_eps=0.5) == [("config.json", "rms_norm_eps")]
    assert bad(folder, rope_theta=7.0) == [("config.json", "rope_theta")]


def test_missing_and_unexpected_tensors_are_seen(folder: Path) -> None:
    source = open_host(str(folder))
    named = {n: x for n, x in source.layout.named(source.host).items() if n != NORM}
    write_safetensors(folder / "model.safetensors", {**named, "extra": np.ones(3, np.float32)})
    rows = stored.rows(str(folder), source.cfg, source.host)
    assert sorted(r.tap for r in rows if not r.ok) == ["extra", NORM]


def test_a_preset_has_no_file() -> None:
    cfg = PRESETS["qwen2-tiny"]
    assert stored.rows("qwen2-tiny", cfg, np.zeros(Layout(cfg).size, np.float32)) == []
