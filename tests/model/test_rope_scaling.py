"""Scaled rotary frequencies are those of transformers: tests/golden/rope.json, made by tools/golden/rope.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr import backends
from apr.bisect import upload
from apr.bisect.golden import draw, projections
from apr.common.errors import MalformedFile, Refused
from apr.model.config import ModelConfig
from apr.model.cost import check_positions
from apr.model.hf_config import from_hf, to_hf
from apr.model.presets import PRESETS
from apr.model.rope import rope_tables
from apr.model.rope_scaling import SCALINGS, DynamicScaling, RopeScaling, YarnScaling
from apr.model.taps import Record
from apr.model.transformer import Model

ROWS = json.loads((Path(__file__).parents[1] / "golden" / "rope.json").read_text())["rows"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 28}
be = backends.get("reference")
every_row = pytest.mark.parametrize("name", ROWS)


def worst(row: dict[str, Any], cfg: ModelConfig) -> float:
    """Largest difference of loss, logits and gradients from transformers', of the norm of each."""
    ids = np.array(row["ids"], np.int32)
    model = Model(cfg, be, *ids[:, 1:].shape, "float64", loss_rows=ids[:, 1:].size)
    host = np.zeros(model.layout.size)
    for key, view in model.layout.named(host).items():
        view[...] = draw(key, view.shape)
    be.from_host(model.w, host)
    seen = Record(be)
    model.forward(ids[:, :-1])
    model.loss(ids[:, 1:], scale=1 / ids[:, 1:].size, tap=seen)
    model.backward()
    logits = np.array(seen.seen["logits"]).reshape(*ids[:, 1:].shape, -1)[..., : cfg.vocab_size]
    arrays = {
        "logits": logits,
        **{f"grad.{k}": x for k, x in model.layout.named(be.to_host(model.g)).items()},
    }
    off = [abs(float(model.total[0]) / ids[:, 1:].size / row["loss"] - 1)]
    off += list(np.abs(logits[0, -1, :8] - row["logits"]) / np.abs(row["logits"]).max())
    for key, want in row["arrays"].items():
        off += list(np.abs(np.subtract(projections(key, arrays[key]), want)) / want[0])
    return float(max(off))


def test_every_kind_is_there() -> None:
    assert {from_hf(row["config"]).rope_scaling.rope_type for row in ROWS.values()} == set(SCALINGS)  # type: ignore[union-attr]


@every_row
def test_what_transformers_computes(name: str) -> None:
    row = ROWS[name]
    cfg = from_hf(row["config"])
    cos, sin = rope_tables(cfg, 2)
    assert np.allclose(np.arctan2(sin[1], cos[1]), row["frequencies"], rtol=1e-12)
    assert np.allclose(np.hypot(cos, sin), row["amplitude"], rtol=1e-12)
    assert worst(row, cfg) < 1e-9


@every_row
def test_read_back_and_counted_one_by_one(name: str) -> None:
    cfg = from_hf(ROWS[name]["config"])
    again = to_hf(cfg)
    assert from_hf(again) == cfg
    new = {**again.pop("rope_scaling"), "rope_theta": again.pop("rope_theta")}
    assert from_hf({**again, "rope_parameters": new}) == cfg
    for backend, dtype in ((be, "float64"), (backends.get("cpu"), "float32")):
        assert [r.ok for r in upload.tables(Model(cfg, backend, 1, 40, dtype))] == [True, True]


def changed(**values: Any) -> Callable[[YarnScaling], YarnScaling]:
    return lambda s: replace(s, **values)


FAULTS = {
    "amplitude left out": changed(attention_factor=1.0),
    "amplitude squared": lambda s: replace(s, attention_factor=s.amplitude**2),
    "bounds exchanged": lambda s: replace(s, beta_fast=s.beta_slow, beta_slow=s.beta_fast),
    "bounds not truncated": changed(truncate=False),
    "another length": changed(original_max_position_embeddings=64),
    "another factor": lambda s: replace(s, factor=4.1, attention_factor=s.amplitude),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_show_in_the_tables_and_in_the_loss(fault: str) -> None:
    cfg = from_hf(ROWS["yarn"]["config"])
    assert isinstance(cfg.rope_scaling, YarnScaling)
    other = replace(cfg, rope_scaling=FAULTS[fault](cfg.rope_scaling))
    assert worst(ROWS["yarn"], other) > 1e-4
    model = Model(cfg, backends.get("cpu"), 1, 40, "float32")
    for table, values in zip((model.cos, model.sin), rope_tables(other, 40), strict=True):
        model.be.from_host(table, values)
    assert not all(r.ok for r in upload.tables(model))


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"original_max_position_embeddings": None}, MalformedFile, "missing key 'original_max_position_embeddings'"),
        ({"factor": None}, MalformedFile, "missing key 'factor'"),
        ({"attention_factor": 0}, MalformedFile, "attention_factor = 0"),
        ({"truncate": 1}, MalformedFile, "truncate = 1"),
        ({"beta_fast": "32"}, MalformedFile, "beta_fast = '32'"),
        ({"beta_fast": 0.5}, Refused, "beta_fast = 0.5 is below beta_slow = 1"),
        ({"extrapolation_factor": 1.0}, Refused, r"unknown rope keys \['extrapolation_factor'\] of rope_type 'yarn'"),
        ({"rope_theta": 1.0}, Refused, "rope_theta = 1 is not above 1"),
    ],
)  # fmt: skip
def test_keys_of_yarn_that_are_refused(keys: dict[str, Any], error: type[Exception], words: str) -> None:
    d = {k: v for k, v in to_hf(PRESETS["llama-tiny"]).items() if k != "rope_theta"}
    with pytest.raises(error, match=words):
        from_hf({**d, "rope_parameters": {**YARN, "rope_theta": 1e4, **keys}})


def test_two_places_that_contradict_each_other() -> None:
    d = to_hf(PRESETS["llama-tiny"]) | {"rope_scaling": YARN}
    assert from_hf({**d, "rope_parameters": YARN}).rope_scaling == YarnScaling(4.0, 28)
    with pytest.raises(
        Refused, match=r"two values of factor: 4\.0 in rope_scaling and 8\.0 in rope_parameters"
    ):
        from_hf({**d, "rope_parameters": {**YARN, "factor": 8.0}})
    # transformers reads one of the two objects: a key of the other alone would be of another model
    with pytest.raises(
        Refused, match=r"rope_parameters\.rope_theta = 7\.0 is not in rope_scaling, beside which"
    ):
        from_hf({k: v for k, v in d.items() if k != "rope_theta"} | {"rope_parameters": {"rope_theta": 7.0}})
    assert from_hf({**d, "rope_parameters": {"type": "yarn", "rope_theta": d["rope_theta"]}}) == from_hf(d)


def test_a_switch_that_is_null_is_off_as_in_transformers() -> None:
    d = to_hf(PRESETS["llama-tiny"])
    scaling = from_hf({**d, "rope_scaling": {**YARN, "truncate": None}}).rope_scaling
    assert scaling == YarnScaling(4.0, 28, truncate=False)


@pytest.mark.parametrize(("low", "high"), [(4.0, 1.0), (2.0, 2.0)])
def test_bounds_of_llama_3_are_in_order(low: float, high: float) -> None:
    d = to_hf(PRESETS["llama3-tiny"])
    d["rope_scaling"] |= {"low_freq_factor": low, "high_freq_factor": high}
    with pytest.raises(Refused, match=f"low_freq_factor = {low:g} is not below high_freq_factor = {high:g}"):
        from_hf(d)


def test_dynamic_scaling_ends_where_it_would_begin() -> None:
    """Up to max_position_embeddings it is no scaling; beyond, the frequencies of a training window would be another text's."""
    plain = PRESETS["llama-tiny"]
    cfg = from_hf({**to_hf(plain), "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    assert cfg.rope_scaling == DynamicScaling(2.0)
    for got, want in zip(rope_tables(cfg, 64), rope_tables(plain, 64), strict=True):
        assert np.array_equal(got, want)
    words = "beyond which the frequencies of rope_type 'dynamic' depend on the length"
    with pytest.raises(Refused, match=words):
        check_positions(cfg, cfg.max_position_embeddings + 1)
    with pytest.raises(Refused, match=words):
        Model(cfg, be, 1, cfg.max_position_embeddings + 1, "float64")
    with pytest.raises(Refused, match="= 64; give") as e:
        check_positions(plain, 65)
    assert "dynamic" not in str(e.value)


@pytest.mark.parametrize(
    ("factor", "words"), [(4.0, r"is for 112: config.json may say so\); give"), (2.0, "= 64; give")]
)
def test_a_length_that_config_json_was_not_given(factor: float, words: str) -> None:
    """Qwen's own advice adds rope_scaling and leaves max_position_embeddings."""
    cfg = replace(PRESETS["llama-tiny"], rope_scaling=YarnScaling(factor, 28))
    with pytest.raises(Refused, match=words):
        check_positions(cfg, 65)


def test_the_amplitude_of_the_paper() -> None:
    """Peng et al. 2023, eq. 22: sqrt(1/t) = 0.1 ln(s) + 1."""
    assert YarnScaling(16.0, 4096).amplitude == 0.1 * math.log(16) + 1
    assert all(isinstance(kind, type) and issubclass(kind, RopeScaling) for kind in SCALINGS.values())
