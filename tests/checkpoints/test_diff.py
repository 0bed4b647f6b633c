"""`apr diff`: what differs is found, named and sorted, whatever the formats of the two sides."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

import interop_cases
from apr.checkpoints.apr2 import read_apr, write_apr
from apr.checkpoints.compare import (
    DIFFERENT,
    EQUAL,
    EXTRA,
    MISSING,
    SHAPE,
    VALUES,
    Comparison,
    TensorDifference,
    compare,
)
from apr.checkpoints.exporting import export_hf
from apr.checkpoints.hf import read_safetensors, write_safetensors
from apr.checkpoints.importing import import_model
from apr.checkpoints.registry import open_any, open_contents
from apr.cli.main import main
from apr.common.errors import InputNotFound, MalformedFile

MATRIX = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One float32 model as a folder (hf) and an APR file (m.apr)."""
    folder = tmp_path_factory.mktemp("diff")
    interop_cases.write(interop_cases.CASES["qwen3"], folder / "hf")
    import_model(str(folder / "hf"), folder / "m.apr")
    return folder


def diff(a: Path, b: Path, tolerance: float | None = None, prefix: str = "") -> Comparison:
    return compare(open_contents(str(a)), open_contents(str(b)), tolerance, prefix)


def changed(files: Path, out: Path, **tensors: np.ndarray | None) -> Path:
    """The APR file with some tensors replaced, or left out (None); __ in a name is a dot."""
    apr = read_apr(files / "m.apr")
    new = dict(apr.tensors) | {n.replace("__", "."): x for n, x in tensors.items()}
    write_apr(out, apr.metadata, {n: x for n, x in new.items() if x is not None})
    return out


def test_equal_whatever_the_format(files: Path, tmp_path: Path) -> None:
    export_hf(open_any(str(files / "m.apr")), tmp_path / "one")
    for a, b in (("m.apr", "m.apr"), ("hf", "m.apr"), ("m.apr", "hf")):
        found = diff(files / a, files / b)
        assert found.equal
        assert set(found.counts) == {EQUAL}
    found = diff(files / "hf", tmp_path / "one/model.safetensors")  # a bare file says nothing of a config
    assert found.equal


def test_gguf_is_mapped_back(files: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
    from apr.checkpoints.exporting import export_gguf

    export_gguf(open_any(str(files / "m.apr")), tmp_path / "m.gguf")
    assert diff(files / "m.apr", tmp_path / "m.gguf").equal
    export_gguf(open_any(str(files / "m.apr")), tmp_path / "h.gguf", "bfloat16")
    found = diff(files / "m.apr", tmp_path / "h.gguf")
    assert not found.equal
    assert diff(files / "m.apr", tmp_path / "h.gguf", 2**-8).equal


def test_figures_of_a_difference(files: Path, tmp_path: Path) -> None:
    x = np.array(read_apr(files / "m.apr").tensors[MATRIX])
    y = x.copy()
    y[1, 2] += 0.5
    y[3, 4] -= 0.25
    found = diff(files / "m.apr", changed(files, tmp_path / "n.apr", **{MATRIX.replace(".", "__"): y}))
    assert not found.equal
    row = found.rows[0]
    assert (row.name, row.state, row.differ) == (MATRIX, DIFFERENT, 2)
    d = y.astype(np.float64) - x
    assert row.max_abs == pytest.approx(0.5, rel=1e-6)
    assert row.rms == pytest.approx(math.sqrt((d**2).mean()))
    assert row.relative == pytest.approx(math.sqrt((d**2).mean() / (x.astype(np.float64) ** 2).mean()))
    u, v = x.reshape(-1).astype(np.float64), y.reshape(-1).astype(np.float64)
    assert row.cosine == pytest.approx(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
    assert {r.state for r in found.rows[1:]} == {EQUAL}
    assert row.relative is not None
    assert diff(files / "m.apr", tmp_path / "n.apr", row.relative * 1.01).equal
    assert not diff(files / "m.apr", tmp_path / "n.apr", row.relative * 0.99).equal
    assert diff(files / "m.apr", tmp_path / "n.apr", prefix="model.layers.1.").equal


def test_worst_first(files: Path, tmp_path: Path) -> None:
    t = read_apr(files / "m.apr").tensors
    layer = "model.layers.1.mlp"
    new = {
        f"{layer}.up_proj.weight": t[f"{layer}.up_proj.weight"] * np.float32(1.5),
        f"{layer}.gate_proj.weight": t[f"{layer}.gate_proj.weight"] * np.float32(1.1),
        f"{layer}.down_proj.weight": np.ascontiguousarray(t[f"{layer}.down_proj.weight"].T),
        "model.norm.weight": None,
        "model.extra.weight": np.ones(3, np.float32),
    }
    out = changed(files, tmp_path / "n.apr", **{n.replace(".", "__"): x for n, x in new.items()})
    found = diff(files / "m.apr", out)
    assert [(r.name, r.state) for r in found.rows[:5]] == [
        ("model.norm.weight", MISSING),
        ("model.extra.weight", EXTRA),
        (f"{layer}.down_proj.weight", SHAPE),
        (f"{layer}.up_proj.weight", DIFFERENT),
        (f"{layer}.gate_proj.weight", DIFFERENT),
    ]
    assert not found.equal
    assert not diff(files / "m.apr", out, 1e9).equal  # no tolerance makes up for a missing tensor


def test_values_that_are_not_finite_come_first(tmp_path: Path) -> None:
    a = {"x": np.ones(4, np.float32), "y": np.ones(4, np.float32), "z": np.array([np.nan, 1], np.float32)}
    b = {"x": np.array([1, 1, np.nan, 1], np.float32), "y": np.full(4, 5, np.float32), "z": a["z"]}
    for name, t in (("a", a), ("b", b)):
        write_safetensors(tmp_path / f"{name}.safetensors", t, finite=False)
    found = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [(r.name, r.state) for r in found.rows] == [("x", DIFFERENT), ("y", DIFFERENT), ("z", EQUAL)]
    assert not diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", 1e30).equal


def test_dtype_alone(files: Path, tmp_path: Path) -> None:
    """bfloat16 in float32 has the same values, not the same bits."""
    import ml_dtypes

    rounded = {n: x.astype(ml_dtypes.bfloat16) for n, x in read_apr(files / "m.apr").tensors.items()}
    meta = read_apr(files / "m.apr").metadata
    write_apr(tmp_path / "a.apr", meta, rounded)
    write_apr(tmp_path / "b.apr", meta, {n: x.astype(np.float32) for n, x in rounded.items()})
    found = diff(tmp_path / "a.apr", tmp_path / "b.apr")
    assert set(found.counts) == {VALUES}
    assert not found.equal
    assert diff(tmp_path / "a.apr", tmp_path / "b.apr", 0.0).equal


def test_minus_zero_has_other_bits(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"x": np.array([0.0], np.float32)})
    write_safetensors(tmp_path / "b.safetensors", {"x": np.array([-0.0], np.float32)})
    assert not diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").equal
    assert diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", 0.0).equal


def test_configs_and_tokenizers(files: Path, tmp_path: Path) -> None:
    apr = read_apr(files / "m.apr")
    meta = {**apr.metadata, "rope_theta": 5e5, "hf_config": {**apr.metadata["hf_config"], "rope_theta": 5e5}}
    meta["tokenizer.eos_token_id"] = 297
    write_apr(tmp_path / "n.apr", meta, dict(apr.tensors))
    found = diff(files / "m.apr", tmp_path / "n.apr")
    assert [(k, a, b) for k, a, b in found.facts] == [
        ("config.rope_theta", 1e6, 5e5),
        ("eos_token_id", apr.metadata["tokenizer.eos_token_id"], 297),
    ]
    assert not found.equal
    assert set(found.counts) == {EQUAL}


def test_a_config_that_apr_does_not_compute_can_be_compared(files: Path, tmp_path: Path) -> None:
    import shutil

    for name, act in (("a", "gelu"), ("b", "relu")):
        shutil.copytree(files / "hf", tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "hidden_act": act}))
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found.facts == [("config.hidden_act", "gelu", "relu")]


def test_traces(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for backend, dtype in (("cpu", "float32"), ("reference", "float32"), ("reference", "float64")):
        args = ["trace", files / "m.apr", "--tokens", "1,2,3,4", "--backend", backend, "--dtype", dtype]
        assert main([str(a) for a in [*args, "-o", tmp_path / f"{backend}-{dtype}.safetensors"]]) == 0
    capsys.readouterr()
    a, b = tmp_path / "cpu-float32.safetensors", tmp_path / "reference-float64.safetensors"
    assert main(["diff", str(a), str(b)]) == 9
    assert "metadata.backend" in capsys.readouterr().out
    assert main(["diff", str(a), str(b), "--tolerance", "1e-5"]) == 0
    spoilt = dict(read_safetensors(a)) | {"1.att": read_safetensors(a)["1.att"] * np.float32(1.01)}
    write_safetensors(tmp_path / "spoilt.safetensors", spoilt)
    capsys.readouterr()
    assert main(["diff", str(tmp_path / "spoilt.safetensors"), str(b), "--tolerance", "1e-5", "--json"]) == 9
    assert json.loads(capsys.readouterr().out)["tensors"][0]["name"] == "1.att"


def test_command(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*args: object) -> tuple[int, str, str]:
        code = main(["diff", *map(str, args)])
        out, err = capsys.readouterr()
        return code, out, err

    assert call(files / "hf", files / "m.apr")[0] == 0
    x = np.array(read_apr(files / "m.apr").tensors[MATRIX])
    x[0, 0] = np.nextafter(x[0, 0], np.float32(9))
    other = changed(files, tmp_path / "n.apr", **{MATRIX.replace(".", "__"): x})
    code, out, _ = call(files / "m.apr", other)
    assert code == 9
    assert MATRIX in out
    assert "DIFFERENT: 1 different" in out
    code, out, _ = call(files / "m.apr", other, "--json")
    assert code == 9
    assert json.loads(out)["tensors"][0]["differ"] == 1
    for args, want, words in (
        ((files / "none", other), 3, "not found"),
        ((files / "m.apr",), 2, "B"),
        ((files / "m.apr", other, "--tolerance", "-1"), 2, "--tolerance"),
        ((files / "m.apr", other, "--tolerance", "nan"), 2, "--tolerance"),
        ((files / "m.apr", other, "--top", "-1"), 2, "--top"),
        ((files / "m.apr", other, "--prefix", "nope"), 2, "nope"),
    ):
        code, _, err = call(*args)
        assert code == want
        assert words in err


def test_what_is_no_file_of_tensors(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"PK\3\4")
    with pytest.raises(MalformedFile, match="neither an APR"):
        open_contents(str(tmp_path / "x"))
    with pytest.raises(InputNotFound):
        open_contents(str(tmp_path))


def test_rows_are_sorted_by_relative_difference() -> None:
    base = TensorDifference("a", DIFFERENT, max_abs=1.0, relative=0.1)
    worse = dataclasses.replace(base, relative=0.2)
    nan = dataclasses.replace(base, relative=math.nan)
    assert sorted([base, worse, nan], key=lambda r: r.badness) == [nan, worse, base]
