"""Configurations and the parameter table: what is read, what is refused, and the sizes people know."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest

from apr.common.errors import AprError, InputNotFound, MalformedFile, Refused
from apr.model.families import FAMILIES, layers_of
from apr.model.hf_config import from_hf, to_hf
from apr.model.params import FUSED, Layout
from apr.model.presets import PRESETS, load_config
from apr.model.rope_scaling import Llama3Scaling

LLAMA_32_1B = {  # the config.json of the model, as its authors publish it
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


def without(d, *keys):
    return {k: v for k, v in d.items() if k not in keys}


def test_known_sizes():
    want = {  # parameters and tensors of the published models
        "llama-370m": (322_045_952, 218),
        "qwen2.5-0.5b": (494_032_768, 290),
        "qwen2.5-1.5b": (1_543_714_304, 338),
        "qwen3-0.6b": (596_049_920, 310),
        "llama-3.2-1b": (1_235_814_400, 146),
        "smollm2-135m": (134_515_008, 272),
        "smollm2-360m": (361_821_120, 290),
    }
    for name, (parameters, tensors) in want.items():
        layout = Layout(PRESETS[name])
        assert (layout.num_parameters, len(layout.slots)) == (parameters, tensors), name
    assert Layout(PRESETS["qwen2.5-0.5b"]).size == 494_032_768  # no padding


def test_published_config_is_the_preset():
    assert from_hf(LLAMA_32_1B) == PRESETS["llama-3.2-1b"]


def test_real_qwen2_config(data):
    raw = json.loads((data("qwen2-tokenizer") / "config.Qwen2-1.5B-Instruct.json").read_text())
    cfg = from_hf(raw)
    same = dataclasses.replace(PRESETS["qwen2.5-1.5b"], max_position_embeddings=cfg.max_position_embeddings)
    assert cfg == same
    # max_window_layers is the number of layers: none has the window
    assert from_hf({**raw, "use_sliding_window": True}) == cfg


@pytest.mark.parametrize("name", PRESETS)
def test_config_round_trip(name):
    assert from_hf(json.loads(json.dumps(to_hf(PRESETS[name])))) == PRESETS[name]


def test_rope_in_its_new_place():
    new = without(LLAMA_32_1B, "rope_theta", "rope_scaling")
    new["rope_parameters"] = {**LLAMA_32_1B["rope_scaling"], "rope_theta": 500000.0}
    assert from_hf(new) == PRESETS["llama-3.2-1b"]
    with pytest.raises(Refused, match="two values of rope_theta"):
        from_hf({**new, "rope_theta": 1e4})
    assert from_hf({**without(LLAMA_32_1B, "rope_scaling"), "rope_scaling": None}).rope_scaling is None


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model_type": "bert"}, Refused, "bert"),
        ({"model_type": "gemma2"}, Refused, "gemma2"),
        ({"model_type": None}, Refused, "model_type"),
        ({"model_type": ["llama"]}, Refused, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, Refused, "SequenceClassification"),
        ({"architectures": "LlamaForCausalLM"}, MalformedFile, "architectures"),
        ({"hidden_act": "gelu"}, Refused, "hidden_act"),
        ({"attention_bias": True}, Refused, "attention_bias"),
        ({"mlp_bias": True}, Refused, "mlp_bias"),
        ({"attention_dropout": 0.1}, Refused, "attention_dropout"),
        ({"quantization_config": {"bits": 4}}, Refused, "quantization_config"),
        ({"logit_scale": 0.25}, Refused, "logit_scale"),
        ({"layer_types": ["sliding_attention"] * 16}, Refused, "layer_types"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, Refused, "longrope"),
        ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, Refused, "linear"),
        ({"rope_scaling": {"type": "linear"}}, MalformedFile, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "finetuned": True}}, Refused, "finetuned"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            MalformedFile,
            "original_max_position_embeddings",
        ),
        ({"rope_scaling": {**LLAMA_32_1B["rope_scaling"], "mscale": 1.0}}, Refused, "mscale"),
        ({"rope_scaling": without(LLAMA_32_1B["rope_scaling"], "factor")}, MalformedFile, "factor"),
        ({"rope_scaling": "llama3"}, MalformedFile, "rope_scaling"),
        ({"rope_theta": None}, MalformedFile, "rope_theta"),
        ({"num_key_value_heads": 5}, Refused, "num_key_value_heads"),
        ({"head_dim": 63}, Refused, "head_dim"),
        ({"head_dim": None, "hidden_size": 2047}, MalformedFile, "head_dim"),
        ({"hidden_size": "2048"}, MalformedFile, "hidden_size"),
        ({"hidden_size": -1}, MalformedFile, "hidden_size"),
        ({"hidden_size": True}, MalformedFile, "hidden_size"),
        ({"vocab_size": 2**60}, MalformedFile, "vocab_size"),
        ({"rms_norm_eps": 0}, MalformedFile, "rms_norm_eps"),
        ({"tie_word_embeddings": None}, MalformedFile, "tie_word_embeddings"),
        ({"hidden_act": None}, Refused, "hidden_act"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(change, error, words):
    with pytest.raises(error, match=words) as e:
        from_hf({**LLAMA_32_1B, **change}, "some/config.json")
    assert "some/config.json" in str(e.value)


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ],
)
def test_a_missing_size_is_not_invented(key):
    with pytest.raises(MalformedFile, match=key):
        from_hf(without(LLAMA_32_1B, key))


def test_a_config_cannot_ask_for_a_table_that_fills_the_memory():
    d = to_hf(PRESETS["llama-tiny"])
    assert Layout(from_hf({**d, "num_hidden_layers": 4096})).size > 0
    with pytest.raises(Refused, match="here: num_hidden_layers = 4097; apr computes at most 4096"):
        from_hf({**d, "num_hidden_layers": 4097}, "here")


def test_family_switches():
    base = without(
        LLAMA_32_1B, "architectures", "rope_scaling", "attention_bias", "mlp_bias", "pretraining_tp"
    )
    mistral = from_hf({**base, "model_type": "mistral", "sliding_window": 4096})
    assert (mistral.sliding_window, mistral.qkv_bias, mistral.qk_norm) == (4096, False, False)
    assert from_hf({**base, "model_type": "mistral", "sliding_window": None}).sliding_window == 0
    assert from_hf({**base, "model_type": "qwen2", "sliding_window": 4096}).sliding_window == 0
    assert from_hf({**base, "model_type": "qwen2"}).qkv_bias
    assert from_hf({**base, "model_type": "qwen3"}).qk_norm
    with pytest.raises(MalformedFile, match="head_dim"):
        from_hf({**without(base, "head_dim"), "model_type": "qwen3"})


FULL, SLIDING = "full_attention", "sliding_attention"


def test_windows_by_layer():
    d = {**to_hf(PRESETS["qwen2-tiny"]), "use_sliding_window": True, "sliding_window": 6}
    upper = from_hf({**d, "max_window_layers": 1})
    assert (upper.sliding_window, upper.full_attention_layers) == (6, (0,))
    assert [layer.window for layer in layers_of(upper)] == [0, 6]
    assert from_hf({**d, "max_window_layers": 1, "layer_types": [FULL, SLIDING]}) == upper
    assert from_hf({**d, "max_window_layers": 0}).full_attention_layers == ()
    assert from_hf({**d, "max_window_layers": 2}) == PRESETS["qwen2-tiny"]
    assert from_hf({**d, "sliding_window": None}) == PRESETS["qwen2-tiny"]
    assert from_hf(json.loads(json.dumps(to_hf(upper)))) == upper
    # layer_types decides where both are there
    other = from_hf({**d, "max_window_layers": 1, "layer_types": [SLIDING, FULL]})
    assert [layer.window for layer in layers_of(other)] == [6, 0]
    for change, error, words in (
        ({"layer_types": [FULL]}, Refused, "one for each of 2 layers"),
        ({"layer_types": [FULL, "chunked_attention"]}, Refused, "chunked_attention"),
        ({"layer_types": "full"}, MalformedFile, "layer_types"),
        ({"use_sliding_window": 1}, MalformedFile, "use_sliding_window"),
        ({"use_sliding_window": False, "layer_types": [FULL, SLIDING]}, Refused, "layer_types"),
        ({"sliding_window": 0, "max_window_layers": 1}, MalformedFile, "sliding_window"),
    ):
        with pytest.raises(error, match=words):
            from_hf({**d, **change})
    # the defaults of the class: 4096 keys from layer 28 on
    assert from_hf(d) == PRESETS["qwen2-tiny"]
    assert from_hf({**without(d, "sliding_window"), "max_window_layers": 1}).sliding_window == 4096
    mistral = to_hf(PRESETS["mistral-tiny"])
    assert from_hf({**mistral, "layer_types": [SLIDING] * 2}) == PRESETS["mistral-tiny"]
    with pytest.raises(Refused, match="layer_types"):
        from_hf({**mistral, "layer_types": [SLIDING, FULL]})


def test_layers_without_rotary_embedding():
    d = without(to_hf(PRESETS["smollm3-tiny"]), "no_rope_layers") | {"num_hidden_layers": 9}
    d |= {"use_sliding_window": False, "layer_types": None}
    fourth = from_hf({**d, "no_rope_layer_interval": 4})
    assert fourth.no_rope_layers == (3, 7)
    assert [layer.rope for layer in layers_of(fourth)] == [i not in (3, 7) for i in range(9)]
    flags = [1, 1, 1, 0] * 2 + [1]
    assert from_hf({**d, "no_rope_layers": flags, "no_rope_layer_interval": 2}) == fourth
    assert to_hf(fourth)["no_rope_layers"] == flags
    # a window without layer_types is that of the layers without rotary embedding
    window = from_hf({**d, "no_rope_layers": flags, "use_sliding_window": True})
    assert [layer.window for layer in layers_of(window)] == [0 if rope else 5 for rope in flags]
    assert from_hf(d) == fourth
    with pytest.raises(MalformedFile, match="no_rope_layer_interval"):
        from_hf(d, published=False)
    for bad in ([1] * 8, [1] * 8 + [2], [True] * 9):
        with pytest.raises(Refused, match="no_rope_layers"):
            from_hf({**d, "no_rope_layers": bad})
    with pytest.raises(Refused, match="unknown key 'no_rope_layers'"):
        from_hf({**to_hf(PRESETS["llama-tiny"]), "no_rope_layers": [1, 0]})


def test_published_configs_of_new_families():
    olmo2 = {  # the config.json of OLMo-2-0425-1B, as its authors publish it
        "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "olmo2",
        "num_attention_heads": 16, "num_hidden_layers": 16, "num_key_value_heads": 16, "pad_token_id": 100277,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False,
        "torch_dtype": "float32", "transformers_version": "4.47.0", "use_cache": True, "vocab_size": 100352,
    }  # fmt: skip
    layout = Layout(from_hf(olmo2))
    assert (layout.num_parameters, len(layout.slots)) == (1_484_916_736, 16 * 11 + 3)
    norms = {s.hf: s.shape for s in layout.slots if s.layer == 0 and len(s.shape) == 1}
    prefix = "model.layers.0."
    assert norms == {
        prefix + "self_attn.q_norm.weight": (2048,),
        prefix + "self_attn.k_norm.weight": (2048,),
        prefix + "post_attention_layernorm.weight": (2048,),
        prefix + "post_feedforward_layernorm.weight": (2048,),
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("attention_multiplier", 0.015),
        ("logits_scaling", 8.0),
        ("attn_logit_softcapping", 50.0),
    ],
)
def test_multipliers_are_refused_unless_they_are_neutral(key, value):
    with pytest.raises(Refused, match=key):
        from_hf({**LLAMA_32_1B, key: value})
    neutral = None if key.startswith("att") else 1.0
    assert from_hf({**LLAMA_32_1B, key: neutral}) == PRESETS["llama-3.2-1b"]


def test_load_config(tmp_path):
    assert load_config("qwen3-0.6b") is PRESETS["qwen3-0.6b"]
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_32_1B))
    assert load_config(str(tmp_path)) == load_config(str(tmp_path / "config.json")) == PRESETS["llama-3.2-1b"]
    with pytest.raises(InputNotFound, match="smollm2-135m"):
        load_config("smollm")
    for bad in (b"\xff{}", b"[1, 2]", b"{", b"[" * 100_000, b"1" * 5000, b""):
        (tmp_path / "config.json").write_bytes(bad)
        with pytest.raises(AprError, match=r"config\.json"):
            load_config(str(tmp_path))


@pytest.mark.parametrize("name", [n for n in PRESETS if n.endswith("tiny")])
def test_layout(name):
    cfg = PRESETS[name]
    layout = Layout(cfg)
    taken = np.zeros(layout.size, bool)
    for s in layout.slots:
        assert not taken[s.offset : s.offset + s.size].any()  # no two overlap
        taken[s.offset : s.offset + s.size] = True
        assert (s.offset + s.size <= layout.decayed) == s.param.decay
        assert s.param.decay == (len(s.shape) == 2)  # matrices decay, vectors do not
    assert layout.num_parameters == taken.sum()
    flat = np.arange(layout.size, dtype=np.float64)
    views = layout.views(flat)
    for layer, v in enumerate(views.layer):
        for fused, parts in FUSED.items():
            if hasattr(v, fused):
                assert np.array_equal(getattr(v, fused), np.concatenate([getattr(v, p) for p in parts]))
                assert np.shares_memory(getattr(v, fused), flat)
        rows = [s for s in layout.slots if s.layer == layer and s.param.decay]
        gaps = [b.offset - a.offset - a.size for a, b in pairwise(rows)]
        assert all(0 <= g < 64 for g in gaps)  # a layer's gradients are one slice
    assert (views.head is views.embed) == cfg.tie_word_embeddings
    assert next(iter(layout.named(flat))) == "model.embed_tokens.weight"


def test_init_is_what_the_table_says():
    layout = Layout(PRESETS["qwen2-3m"])
    flat = np.empty(layout.size, np.float32)
    layout.init(flat, 1)
    for name, x in layout.named(flat).items():
        if name.endswith("norm.weight") or "layernorm" in name:
            assert (x == 1).all()
        elif name.endswith("bias"):
            assert (x == 0).all()
        else:
            out = "o_proj" in name or "down_proj" in name
            std = 0.02 / np.sqrt(12) if out else 0.02
            assert abs(x.std() / std - 1) < 0.02, name
            assert abs(x.mean()) < 4 * std / np.sqrt(x.size)
    wide = np.empty_like(flat)
    layout.init(wide, 1, std=0.04)
    q = "model.layers.0.self_attn.q_proj.weight"
    assert np.array_equal(layout.named(wide)[q], 2 * layout.named(flat)[q])
    again = np.empty_like(flat)
    layout.init(again, 1)
    assert np.array_equal(flat, again)
    layout.init(again, 2)
    assert not np.array_equal(flat, again)


def test_presets_are_consistent():
    for name, cfg in PRESETS.items():
        block = FAMILIES[cfg.family].block
        assert (cfg.qkv_bias, cfg.qk_norm) == (block.qkv_bias, bool(block.qk_norm)), name
        assert cfg.num_heads % cfg.num_kv_heads == 0
    assert isinstance(PRESETS["llama-3.2-1b"].rope_scaling, Llama3Scaling)
