"""A side against a recorded trace: sound sides agree, a planted fault is named, a strange trace is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr import backends
from apr.backends import overlay, reference
from apr.backends.contract import OPS
from apr.bisect import hf, rule
from apr.bisect.against import compare_with_trace
from apr.bisect.report import FORCED, FREE, ArrayComparison, Report
from apr.bisect.traces import read_trace, record, same_model
from apr.checkpoints.hf import write_hf, write_safetensors
from apr.common.errors import DeviceError, InputNotFound, MalformedFile, Refused
from apr.model.config import ModelConfig
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.transformer import Model
from checks import CONFIGS, batch, start

cpu = backends.get("cpu")
Arrays = Mapping[str, np.ndarray]
ROUNDED = rule.rounded()
QWEN2, QWEN3, OLMO2 = CONFIGS["qwen2"], CONFIGS["qwen3-tied"], CONFIGS["olmo2"]
IDS, TARGETS = batch(QWEN3)
LACKED = ("q_rope", "k_rope", "lse", "d_q_rope", "d_k_rope", "d_v")  # what Hugging Face does not show


def side(cfg: ModelConfig, be: Any, dtype: str, train: bool = True, **options: Any) -> Model:
    ids = batch(cfg)[0]
    model = Model(cfg, be, *ids.shape, dtype, train, **{"loss_rows": ids.size, **options})
    be.from_host(model.w, start(cfg))
    return model


def trace(
    cfg: ModelConfig, be: Any = reference, dtype: str = "float64", train: bool = True
) -> dict[str, np.ndarray]:
    return record(side(cfg, be, dtype, train), *batch(cfg))


def rows_of(
    cfg: ModelConfig, be: Any, dtype: str, want: Arrays, traced: str = "float64"
) -> list[ArrayComparison]:
    return compare_with_trace(side(cfg, be, dtype), start(cfg), *batch(cfg), want, traced)


def report(rows: list[ArrayComparison]) -> Report:
    return Report("model", ("trace", "side"), "batch", rows)


def bad(rows: list[ArrayComparison], mode: str = FORCED) -> list[str]:
    return [r.tap for r in rows if r.mode == mode and not r.ok]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tap_and_gradient_of_a_sound_side_is_compared_in_order_and_agrees(name: str) -> None:
    cfg = CONFIGS[name]
    want = trace(cfg)
    rows = rows_of(cfg, cpu, "float32", want)
    assert report(rows).agree, bad(rows) + bad(rows, FREE)
    for mode in (FORCED, FREE):
        mine = [r for r in rows if r.mode == mode]
        assert sorted(r.tap for r in mine) == sorted(want)
        taps = [r.tap for r in mine if r.tap != "loss" and not r.tap.startswith("grad.")]
        assert taps == [n for n in want if n != "loss" and not n.startswith("grad.")]
        assert {r.stage for r in mine} == {"forward", "loss", "backward"}
    assert any(r.err > 0 for r in rows)


@pytest.mark.parametrize(
    ("be", "dtype", "by", "traced"),
    [
        (reference, "float64", reference, "float64"),
        (reference, "float64", cpu, "float32"),
        (cpu, "float32", reference, "float32"),
        (ROUNDED, "bfloat16", reference, "float64"),
        (cpu, "float32", ROUNDED, "bfloat16"),
        (rule.rounded(rule.tensor_cores()), "bfloat16", ROUNDED, "bfloat16"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_two_sound_sides_agree_whatever_they_compute_in(be: Any, dtype: str, by: Any, traced: str) -> None:
    rows = rows_of(QWEN3, be, dtype, trace(QWEN3, by, traced), traced)
    assert report(rows).agree, bad(rows) + bad(rows, FREE)


def test_the_errors_of_both_sides_are_allowed_for() -> None:
    exact = rows_of(QWEN3, cpu, "float32", trace(QWEN3))
    rough = rows_of(QWEN3, cpu, "float32", trace(QWEN3, reference, "float32"), "float32")
    gains = [b.tol / a.tol for a, b in zip(exact, rough, strict=True)]
    assert 1.2 < np.median(gains) < 2.1
    fine = rows_of(QWEN3, reference, "float64", trace(QWEN3))
    assert max(r.tol / abs(r.want) for r in fine if r.tap == "loss") < 1e-14


def _without_bias(be: Any) -> Any:
    return overlay(be, linear_fwd=lambda y, x, w, b: be.linear_fwd(y, x, w, None))


def _rope_scaled(be: Any) -> Any:
    def rope(x: Any, cos: Any, sin: Any, sign: int) -> None:
        be.rope(x, cos, sin * sin.dtype.type(1.1), sign)

    return overlay(be, rope=rope)


def _gate_and_up_swapped(be: Any) -> Any:
    def swiglu_fwd(y: Any, gu: Any) -> None:
        be.swiglu_fwd(y, np.concatenate(np.split(gu, 2, -1)[::-1], -1))

    return overlay(be, swiglu_fwd=swiglu_fwd)


def _norm_gradient_lost(be: Any) -> Any:
    def add_rmsnorm_bwd(dres: Any, dw: Any, *inputs: Any) -> None:
        be.add_rmsnorm_bwd(dres, np.zeros_like(dw), *inputs)

    return overlay(be, add_rmsnorm_bwd=add_rmsnorm_bwd)


def _embedding_lost(be: Any) -> Any:
    return overlay(be, embedding_bwd=lambda dw, dy, ids: None)


def _nan_in_lse(be: Any) -> Any:
    def attention_fwd(y: Any, lse: Any, *inputs: Any) -> None:
        be.attention_fwd(y, lse, *inputs)
        lse[-1, -1, -1] = np.nan

    return overlay(be, attention_fwd=attention_fwd)


FAULTS: list[tuple[Callable[[Any], Any], ModelConfig, str, set[str]]] = [  # op, taps that are off when forced
    (_without_bias, QWEN2, "linear_fwd", {"qkv"}),
    (_rope_scaled, QWEN3, "rope", {"q_rope", "k_rope", "d_qk"}),
    (_gate_and_up_swapped, QWEN3, "swiglu_fwd", {"act"}),
    (_norm_gradient_lost, QWEN3, "add_rmsnorm_bwd", {"input_layernorm", "post_attention_layernorm", "norm"}),
    (_embedding_lost, QWEN3, "embedding_bwd", {"embed_tokens"}),
    (_nan_in_lse, QWEN3, "attention_fwd", {"lse"}),
]
SIDES = [(reference, "float64"), (cpu, "float32"), (ROUNDED, "bfloat16")]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f[0].__name__)
@pytest.mark.parametrize(("be", "dtype"), SIDES, ids=lambda x: x if isinstance(x, str) else x.name)
def test_a_fault_is_named_by_the_forced_rows(fault: tuple[Any, ...], be: Any, dtype: str) -> None:
    plant, cfg, op, taps = fault
    rows = rows_of(cfg, plant(be), dtype, trace(cfg))
    first = report(rows).first
    assert first is not None
    assert (first.mode, first.op) == (FORCED, op)
    names = {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in bad(rows)}
    assert names == taps
    assert len(bad(rows, FREE)) >= len(bad(rows))
    assert first.index
    assert len(first.index) == len(first.shape)


def test_a_trace_that_lacks_taps_names_the_ops_since_the_last_it_has() -> None:
    want = {n: x for n, x in trace(QWEN3).items() if n.split(".")[-1] not in LACKED}
    sound = rows_of(QWEN3, cpu, "float32", want)
    assert report(sound).agree
    assert not any(r.cause for r in sound)
    rows = rows_of(QWEN3, _rope_scaled(cpu), "float32", want)
    assert {n.split(".")[-1] for n in bad(rows)} == {"att", "d_qk", "d_qkv"}
    first = report(rows).first
    assert first is not None
    assert (first.tap, first.cause) == (
        "0.att",
        "rope or attention_fwd; the trace lacks 0.q_rope, 0.k_rope, 0.lse",
    )
    last = f"{QWEN3.num_layers - 1}."
    causes = {r.tap: r.cause for r in rows if r.mode == FORCED and r.tap.startswith(last)}
    lacks = ", ".join(last + n for n in LACKED)
    assert causes[last + "d_qk"] == f"rope or attention_fwd or attention_bwd; the trace lacks {lacks}"
    assert "attention_bwd" in causes[last + "d_qkv"]  # d_v


def test_a_trace_of_the_loss_alone_can_be_compared() -> None:
    want = {"loss": trace(QWEN3)["loss"]}
    assert report(rows_of(QWEN3, cpu, "float32", want)).agree
    rows = rows_of(QWEN3, _rope_scaled(cpu), "float32", want)
    assert bad(rows) == bad(rows, FREE) == ["loss"]
    assert "rope" in rows[0].cause


def test_in_bfloat16_a_slice_that_is_off_is_seen() -> None:
    want = dict(trace(QWEN3))
    name = "1.mlp_out"
    column = int(np.abs(want[name]).reshape(-1, QWEN3.hidden_size).max(0).argmin())
    spoiled = want[name].copy()
    spoiled[..., column] *= 1.04  # less than 2 * eps of the largest value
    rows = rows_of(QWEN3, ROUNDED, "bfloat16", {**want, name: spoiled})
    (row,) = [r for r in rows if r.tap == name and r.mode == FORCED]
    assert not row.ok
    assert row.cause.startswith("a slice across axis 1")


def test_nan_never_agrees() -> None:
    want = dict(trace(QWEN3))
    want["0.att"] = want["0.att"].copy()
    want["0.att"][0, 3, 5] = np.nan
    rows = rows_of(QWEN3, reference, "float64", want)
    (row,) = [r for r in rows if r.tap == "0.att" and r.mode == FREE]
    assert not row.ok
    assert row.index == (3, 5)
    assert np.isnan(row.want)
    assert not np.isnan(row.got)


def test_places_of_rows() -> None:
    rows = {r.tap: r for r in rows_of(QWEN3, reference, "float64", trace(QWEN3)) if r.mode == FORCED}
    last = QWEN3.num_layers
    found = {tap: (rows[tap].stage, rows[tap].op, rows[tap].layer) for tap in rows}
    assert found["hidden.0"] == ("forward", "embedding_fwd", None)
    assert found["hidden.1"] == ("forward", "add_rmsnorm_fwd", 1)
    assert found[f"hidden.{last}"] == ("forward", "add_rmsnorm_fwd", None)
    assert found["logits"] == ("loss", "linear_fwd", None)
    assert found["d_logits"] == ("loss", "cross_entropy", None)
    assert found["0.d_qkv"] == ("backward", "head_rmsnorm_bwd", 0)
    assert found["d_hidden.0"] == ("backward", "add_rmsnorm_bwd", 0)
    assert found["grad.model.layers.1.self_attn.q_norm.weight"] == ("backward", "head_rmsnorm_bwd", 1)
    assert found["grad.model.norm.weight"] == ("backward", "add_rmsnorm_bwd", None)
    assert found["grad.model.embed_tokens.weight"] == ("backward", "embedding_bwd", None)
    rows = {r.tap: r for r in rows_of(QWEN2, reference, "float64", trace(QWEN2))}
    assert (rows["0.d_qkv"].op, rows["grad.lm_head.weight"].op) == ("rope", "linear_bwd")
    rows = {r.tap: r for r in rows_of(OLMO2, reference, "float64", trace(OLMO2)) if r.mode == FORCED}
    found = {tap: (rows[tap].stage, rows[tap].op, rows[tap].layer) for tap in rows}
    assert found["hidden.1"] == ("forward", "add", 1)
    assert found["0.post1"] == ("forward", "head_rmsnorm_fwd", 0)
    assert found["1.res2"] == ("forward", "add", 1)
    assert found["1.d_res2"] == ("backward", "add", 1)
    assert found["0.d_att_out"] == ("backward", "head_rmsnorm_bwd", 0)
    assert found["d_hidden.0"] == ("backward", "add", 0)
    for cfg in (QWEN3, QWEN2, OLMO2):
        made = [r for r in rows_of(cfg, reference, "float64", trace(cfg)) if r.mode == FORCED]
        assert {r.tap for r in made} == set(trace(cfg))
        assert {r.op for r in made} <= OPS.keys() - {"gemm", "adamw", "clip_factor", "add_sum_sq"}


# What is refused


def test_a_trace_that_is_not_of_the_model_or_the_batch_is_refused() -> None:
    want, weights, model = trace(QWEN3), start(QWEN3), side(QWEN3, reference, "float64")

    def refused(match: str, want: Arrays = want, targets: np.ndarray = TARGETS, model: Model = model) -> None:
        with pytest.raises(Refused, match=match):
            compare_with_trace(model, weights, IDS, targets, want, "float64")

    refused(r"tap '0\.qkv' has shape \(3, 13, 7\) in the trace", {**want, "0.qkv": want["0.qkv"][..., :7]})
    refused(r"tap 'hidden\.0' has shape \(3, 12, 40\)", {**want, "hidden.0": want["hidden.0"][:, :12]})
    refused(r"such as \['9\.qkv'\]", {**want, "9.qkv": want["0.qkv"]})
    refused("no tensors", {})
    refused("all are ignored", targets=np.full_like(TARGETS, -100))
    refused("a training model", model=side(QWEN3, reference, "float64", train=False))


def test_a_model_without_gradients_is_compared_with_a_forward_trace() -> None:
    model = side(QWEN3, cpu, "float32", train=False)
    rows = compare_with_trace(model, start(QWEN3), IDS, TARGETS, trace(QWEN3, train=False), "float64")
    assert report(rows).agree
    assert {r.stage for r in rows} == {"forward", "loss"}


@pytest.mark.parametrize("options", [dict(recompute=True), dict(loss_rows=5)], ids=str)
def test_a_model_that_does_not_keep_everything_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="keeps every block and all logits"):
        compare_with_trace(
            side(QWEN3, cpu, "float32", **options), start(QWEN3), IDS, TARGETS, trace(QWEN3), "float64"
        )


# Files


FACTS = {"dtype": "float64", "model": "m", "model_sha256": "abc", "backend": "reference"}
TAPS: dict[str, np.ndarray] = {"0.qkv": np.ones((2, 3, 4)), "loss": np.ones(1)}
WENT_IN = {"ids": np.arange(6, dtype=np.int32).reshape(2, 3), "targets": np.full((2, 3), 1, np.int32)}


def test_a_trace_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_safetensors(path, {**TAPS, **WENT_IN}, metadata=FACTS, finite=False)
    trace = read_trace(path)
    same_model(path, trace, "abc")
    assert trace.metadata["backend"] == "reference"
    assert (trace.dtype, trace.gradients) == ("float64", False)
    assert sorted(trace.tensors) == sorted(TAPS)
    assert np.array_equal(trace.ids, WENT_IN["ids"])
    assert np.array_equal(trace.targets, WENT_IN["targets"])
    assert np.array_equal(read_trace(path, WENT_IN["ids"], WENT_IN["targets"]).ids, WENT_IN["ids"])
    with pytest.raises(Refused, match="other ids than --tokens"):
        read_trace(path, WENT_IN["ids"] + 1)
    with pytest.raises(Refused, match="model_sha256 abc, but this model has xyz"):
        same_model(path, read_trace(path), "xyz")


def test_a_trace_file_without_what_went_in_wants_it_given(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_safetensors(path, {**TAPS, "d_hidden.0": np.ones(1)}, metadata=FACTS)
    with pytest.raises(Refused, match="no tensor 'ids'; give --tokens"):
        read_trace(path)
    with pytest.raises(Refused, match="no tensor 'targets'; give --targets"):
        read_trace(path, WENT_IN["ids"])
    trace = read_trace(path, **WENT_IN)
    assert trace.gradients
    assert trace.ids is WENT_IN["ids"]
    with pytest.raises(Refused, match=r"targets are \(2, 2\), ids \(2, 3\)"):
        read_trace(path, WENT_IN["ids"], WENT_IN["targets"][:, :2])


@pytest.mark.parametrize(
    ("tensors", "facts", "match"),
    [
        (TAPS, {}, "metadata dtype = None"),
        (TAPS, {"dtype": "float8"}, "metadata dtype = 'float8'"),
        ({**TAPS, "0.att": np.ones(3, np.int32)}, FACTS, "'0.att' is int32"),
        ({**TAPS, "ids": np.ones((2, 3))}, FACTS, "'ids' is float64"),
        ({**TAPS, "ids": np.ones(3, np.int32)}, FACTS, r"'ids' is int32 \(3,\)"),
    ],
)
def test_what_is_not_a_trace_is_malformed(
    tmp_path: Path, tensors: Arrays, facts: dict[str, str], match: str
) -> None:
    path = tmp_path / "t.safetensors"
    write_safetensors(path, {**WENT_IN, **tensors}, metadata=facts)
    with pytest.raises(MalformedFile, match=match):
        read_trace(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(InputNotFound):
        read_trace(path)
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(MalformedFile):
        read_trace(path)


# Hugging Face


def test_without_transformers_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DeviceError, match="pip install torch transformers"):
        hf.trace_of_weights(QWEN3, Layout(QWEN3).named(start(QWEN3)), IDS, TARGETS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("-tiny")])
def test_apr_agrees_with_hugging_face(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs pip install torch transformers")
    cfg = PRESETS[name]
    ids, targets = batch(cfg)
    tensors = Layout(cfg).named(start(cfg))
    want = hf.trace_of_weights(cfg, tensors, ids, targets)
    lacked = {n.split(".")[-1] for n in set(trace(cfg)) - set(want)}
    assert lacked == set(LACKED)
    assert all(x.dtype == np.float64 for x in want.values())
    for be, dtype in SIDES:
        rows = rows_of(cfg, be, dtype, want)
        assert report(rows).agree, bad(rows) + bad(rows, FREE)
    assert not report(rows_of(cfg, _rope_scaled(cpu), "float32", want)).agree
    low = hf.trace_of_weights(cfg, tensors, ids, targets, "float32")
    assert report(rows_of(cfg, cpu, "float32", low, "float32")).agree
    write_hf(tmp_path / "hf", cfg, tensors)
    again = hf.trace_of(str(tmp_path / "hf"), ids, targets)
    assert all(np.array_equal(again[n], want[n]) for n in want)
    forward = hf.trace_of(str(tmp_path / "hf"), ids, targets, gradients=False)
    assert set(forward) == {n for n in want if "d_" not in n and not n.startswith("grad.")}


@pytest.mark.filterwarnings("ignore")
def test_what_hugging_face_cannot_trace_is_refused() -> None:
    pytest.importorskip("transformers", reason="needs pip install torch transformers")
    tensors = Layout(QWEN3).named(start(QWEN3))

    def refused(
        match: str, ids: np.ndarray = IDS, targets: np.ndarray = TARGETS, dtype: str = "float64"
    ) -> None:
        with pytest.raises(Refused, match=match):
            hf.trace_of_weights(QWEN3, tensors, ids, targets, dtype)

    refused("float64 or float32, not bfloat16", dtype="bfloat16")
    refused(r"both must be \(B,T\)", targets=TARGETS[:, 1:])
    refused("outside the vocabulary", ids=IDS + QWEN3.vocab_size)
    refused("all are ignored", targets=np.full_like(TARGETS, -100))


def test_hostile_trace_files(tmp_path: Path) -> None:
    path, ids = tmp_path / "t.safetensors", np.array([[1, 2]])
    header = {"__metadata__": None, "loss": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(MalformedFile, match=r"t\.safetensors: metadata dtype = None"):
        read_trace(path, ids, ids)
    for bad in (np.array([[-1, 2]]), np.array([[1, 1 << 32]]), np.array([[1 << 31, 1]])):
        write_safetensors(
            path, {"ids": bad, "targets": ids, "loss": np.ones(1)}, metadata={"dtype": "float32"}
        )
        with pytest.raises(MalformedFile, match=r"t\.safetensors: tensor 'ids' holds .*no token id"):
            read_trace(path)
    write_safetensors(path, {"ids": ids, "targets": -ids, "loss": np.ones(1)}, metadata={"dtype": "float32"})
    assert read_trace(path).targets.tolist() == [[-1, -2]]


def test_ids_outside_the_vocabulary_never_reach_a_kernel() -> None:
    cfg = PRESETS["llama-tiny"]
    model, weights = side(cfg, cpu, "float32"), start(cfg)
    ids, targets = (x.copy() for x in batch(cfg))
    ids[0, 1] = cfg.vocab_size
    with pytest.raises(Refused, match=f"made of id {cfg.vocab_size}, this model has {cfg.vocab_size}"):
        compare_with_trace(model, weights, ids, targets, {"loss": np.ones(())}, "float32")
