"""What a config.json leaves out, what it has too much, and what of it the user is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr.checkpoints.exporting import export_hf
from apr.checkpoints.hf import write_hf
from apr.checkpoints.registry import open_any
from apr.cli.main import main
from apr.common.errors import AprError, MalformedFile, Refused
from apr.model.families import FAMILIES
from apr.model.hf_config import from_hf, hf_notes, to_hf
from apr.model.params import Layout
from apr.model.presets import PRESETS, config_notes
from checks import start

TINY = ("llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")
# read from the classes of transformers 5.24: configuration_*.py and RotaryEmbeddingConfigMixin.default_theta
PUBLISHED = {
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False},
    "mistral": {
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
    },
    "olmo2": {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False},
    "qwen2": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False},
    "qwen3": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False},
    "smollm3": {"rms_norm_eps": 1e-6, "rope_theta": 2e6, "tie_word_embeddings": True},
}


def tiny(family: str) -> dict[str, Any]:
    return to_hf(PRESETS["llama3-tiny" if family == "llama" else f"{family}-tiny"])


@pytest.mark.parametrize("family", TINY)
def test_a_file_that_says_everything_has_no_notes(family):
    assert hf_notes(tiny(family)) == []


@pytest.mark.parametrize("family", TINY)
def test_missing_keys_get_the_defaults_of_the_class_with_a_note(family):
    d = tiny(family)
    for key, value in PUBLISHED[family].items():
        short = {k: v for k, v in d.items() if k != key}
        cfg = from_hf(short)
        assert getattr(cfg, key) == value, key
        (note,) = hf_notes(short)
        shown = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
        assert note == f"not stated, so the default of transformers for {family}: {key} = {shown}"
        if key != "sliding_window":  # of what is no config.json, only null says that there is none
            with pytest.raises(MalformedFile, match=key):
                from_hf(short, published=False)
    assert from_hf({k: v for k, v in d.items() if k != "hidden_act"}) == from_hf(d)


def test_every_family_states_its_defaults():
    assert set(PUBLISHED) == set(FAMILIES)
    for name, family in FAMILIES.items():
        assert not {"hidden_size", "num_hidden_layers", "vocab_size", "head_dim"} & family.defaults.keys(), (
            name
        )


def test_heads_of_keys_follow_the_heads_where_the_class_says_so():
    for family in TINY:
        d = tiny(family)
        assert from_hf({**d, "num_key_value_heads": None}).num_kv_heads == d["num_attention_heads"]
        del d["num_key_value_heads"]
        if FAMILIES[family].kv_heads_follow:
            assert from_hf(d).num_kv_heads == d["num_attention_heads"]
            assert "num_key_value_heads" in hf_notes(d)[0]
        else:  # the class has a number of its own: a size
            with pytest.raises(MalformedFile, match="num_key_value_heads"):
                from_hf(d)


@pytest.mark.parametrize(
    ("extra", "note"),
    [
        ({"use_mrope": False}, "unknown keys that are off: use_mrope = false"),
        ({"dual_chunk_attention_config": None}, "unknown keys that are off: dual_chunk_attention_config = null"),
        ({"unsloth_version": "2024.9"}, "keys without effect here: unsloth_version = '2024.9'"),
        ({"unsloth_fixed": True}, "keys without effect here: unsloth_fixed = True"),
        ({"max_length": 4096, "do_sample": True}, "keys without effect here: max_length = 4096, do_sample = True"),
        ({"temperature": 0.9}, "keys without effect here: temperature = 0.9"),
        ({"unk_token_id": 0}, "keys without effect here: unk_token_id = 0"),
        ({"max_sequence_length": 2048}, "keys without effect here: max_sequence_length = 2048"),
    ],
)  # fmt: skip
def test_what_is_off_or_without_effect_is_noted(extra, note):
    d = tiny("llama")
    assert from_hf({**d, **extra}) == from_hf(d)
    assert hf_notes({**d, **extra}) == [note.replace("True", "true")]


def test_what_every_file_has_is_not_noted():
    d = tiny("llama")
    usual = {
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": 1,
        "pretraining_tp": 2,
        "_name_or_path": "x",
    }
    assert hf_notes({**d, **usual, "rope_scaling": None, "hidden_activation": None}) == []
    assert from_hf({**d, **usual, "attention_bias": None, "mlp_bias": None}) == from_hf(d)


def test_many_keys_make_a_short_note():
    notes = hf_notes({**tiny("llama"), **{f"a\x1b[2J{i}": None for i in range(5000)}})
    assert notes[0].endswith("... 5000 in all")
    assert len(notes[0]) < 400
    assert "\x1b" not in notes[0]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"use_mrope": True}, "use_mrope"),
        ({"qk_layernorm": True}, "qk_layernorm"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
        ({"logit_scale": 0.25}, "logit_scale"),
        ({"rope_ratio": 0}, "rope_ratio"),
        # off, and just that changes the mathematics
        ({"is_causal": False}, "is_causal"),
        ({"use_rope": False}, "use_rope"),
        ({"do_layer_norm_before": False}, "do_layer_norm_before"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"resid_pdrop": 0.1}, "resid_pdrop"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config"),
        ({"rope_scaling": {"type": "su", "factor": 2}}, "rope_type = 'su'"),
    ],
)
def test_what_is_on_is_refused_by_name(extra, words):
    with pytest.raises(Refused, match=words):
        from_hf({**tiny("llama"), **({"rope_scaling": None} | extra)})


def test_a_linear_scaling_by_one_is_none():
    d = {**tiny("llama"), "rope_scaling": {"type": "linear", "factor": 1.0}}
    assert from_hf(d).rope_scaling is None


def test_the_first_spelling_of_the_architecture():
    d = tiny("llama")
    assert from_hf({**d, "architectures": ["LLaMAForCausalLM"]}) == from_hf(d)
    assert from_hf({**d, "architectures": ["LlamaModel"]}) == from_hf(d)  # as AutoModel saves it
    for other in (["LlamaForSequenceClassification"], ["Qwen2Model"], ["Model"], [5], ["Qwen2ForCausalLM"]):
        with pytest.raises(AprError, match="architectures"):
            from_hf({**d, "architectures": other})


@pytest.mark.parametrize("name", ["llama-tiny", "llama3-tiny"])
def test_an_export_has_the_rope_keys_that_older_readers_know(name: str, tmp_path: Path) -> None:
    cfg = dataclasses.replace(PRESETS[name], rope_theta=5e5)
    d = to_hf(cfg)
    scaling = d.pop("rope_scaling", None)
    d["rope_parameters"] = {"rope_type": "default", **(scaling or {}), "rope_theta": d.pop("rope_theta")}
    weights = Layout(cfg).named(start(cfg).astype(np.float32))
    write_hf(tmp_path / "new", cfg, weights, texts={"config.json": json.dumps(d)})
    export_hf(open_any(str(tmp_path / "new")), tmp_path / "out")
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (out["rope_theta"], out.get("rope_scaling")) == (5e5, scaling)
    assert out["rope_parameters"] == d["rope_parameters"]
    assert from_hf({k: v for k, v in out.items() if k != "rope_parameters"}) == cfg
    export_hf(open_any(str(tmp_path / "out")), tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (
        tmp_path / "out" / "config.json"
    ).read_bytes()


def test_the_user_sees_notes_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In inspect, import and validate, of the folder and of the .apr file that comes of it; nothing for a clean one."""
    cfg = PRESETS["mistral-tiny"]
    layout = Layout(cfg)
    write_hf(tmp_path / "hf", cfg, layout.named(start(cfg).astype(np.float32)))
    path = tmp_path / "hf" / "config.json"
    clean = json.loads(path.read_text())
    assert open_any(str(tmp_path / "hf")).notes == []
    assert main(["inspect", str(tmp_path / "hf")]) == 0
    assert "config.json:" not in capsys.readouterr().out
    path.write_text(json.dumps({k: v for k, v in clean.items() if k != "rope_theta"} | {"use_mrope": False}))
    assert (
        config_notes(str(path)) == config_notes(str(tmp_path / "hf")) == open_any(str(tmp_path / "hf")).notes
    )
    assert config_notes("llama-tiny") == []
    out = str(tmp_path / "m.apr")
    for args in (
        ["inspect", str(tmp_path / "hf")],
        ["import", str(tmp_path / "hf"), "-o", out],
        ["inspect", out],
    ):
        assert main(args) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert (
            "config.json: not stated, so the default of transformers for mistral: rope_theta = 10000.0"
            in said
        )
        assert "config.json: unknown keys that are off: use_mrope = false" in said
    assert main(["inspect", out, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["notes"]) == 2
