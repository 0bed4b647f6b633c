"""Facts of published config.json: the keys and values of real models, each of which loads or is refused for a true reason.

Collected from public repositories that quote the files, or the printout of transformers for them. Left out are the keys that
all have and that change nothing (USUAL).
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from apr.common.errors import AprError, MalformedFile, Refused
from apr.model.families import FAMILIES
from apr.model.hf_config import SIZES, from_hf, hf_notes, to_hf
from apr.model.params import Layout

COLUMNS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
)  # fmt: skip
USUAL = {
    "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True, "bos_token_id": 1, "eos_token_id": [2, 3],
    "pad_token_id": 0, "initializer_range": 0.02, "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
}  # fmt: skip
ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    **{kind: family.architecture for kind, family in FAMILIES.items()},
}  # fmt: skip

Keys = dict[str, Any]
BIAS: Keys = {"attention_bias": False}
BIASES: Keys = BIAS | {"mlp_bias": False}
DROPOUT: Keys = {"attention_dropout": 0.0}
TP: Keys = {"pretraining_tp": 1}
PLAIN: Keys = {"rope_scaling": None}
LLAMA3: Keys = {
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
BY8: Keys = {"rope_scaling": {"factor": 8.0, **LLAMA3}}
BY32: Keys = {"rope_scaling": {"factor": 32.0, **LLAMA3}}
D64: Keys = {"head_dim": 64}
D128: Keys = {"head_dim": 128}
SMOLLM2: Keys = {"is_llama_config": True, "rope_interleaved": False}
NO_MROPE: Keys = {"use_mrope": False}


def window(keys: int | None, layers: int) -> Keys:
    """Keys of a window that is turned off."""
    return {"sliding_window": keys, "max_window_layers": layers, "use_sliding_window": False}


# name: the values of COLUMNS, "-" for a key that the file has not; further keys
PUBLISHED: dict[str, tuple[str, Keys]] = {
    "codellama/CodeLlama-13b-hf": ("llama 32016 5120 13824 40 40 40 16384 1e-05 1e+06 untied", TP | PLAIN),
    "codellama/CodeLlama-7b-hf": ("llama 32016 4096 11008 32 32 32 16384 1e-05 1e+06 untied", TP | PLAIN),
    "decapoda-research/llama-65b-hf": (
        "llama 32000 8192 22016 80 64 - - 1e-05 - untied", {"max_sequence_length": 2048},
    ),
    "DAMO-NLP-SG/CLEX-7B": (
        "llama 32000 4096 11008 32 32 32 4096 1e-05 - untied", TP
        | {"log_scale": False, "use_flashattn": True, "rope_scaling": {"type": "clex", "max_factor": 16, "param_factor": 1}},
    ),
    "deepseek-ai/deepseek-coder-1.3b-instruct": (
        "llama 32256 2048 5504 24 16 16 16384 1e-06 100000 untied", BIAS | DROPOUT | D128
        | {"rope_scaling": {"factor": 4.0, "rope_type": "linear", "type": "linear"}},
    ),
    "elyza/ELYZA-japanese-Llama-2-7b-instruct": (
        "llama 32000 4096 11008 32 32 32 4096 1e-06 10000 untied", BIAS | DROPOUT | TP | PLAIN,
    ),
    "HuggingFaceTB/SmolLM-1.7B-Instruct": (
        "llama 49152 2048 8192 24 32 32 2048 1e-05 10000 tied", BIASES | DROPOUT | TP | PLAIN,
    ),
    "HuggingFaceTB/SmolLM-135M-Instruct": (
        "llama 49152 576 1536 30 9 3 2048 1e-05 10000 tied", BIASES | DROPOUT | TP | PLAIN,
    ),
    "HuggingFaceTB/SmolLM-360M-Instruct": (
        "llama 49152 960 2560 32 15 5 2048 1e-05 10000 tied", BIASES | DROPOUT | TP | PLAIN,
    ),
    "HuggingFaceTB/SmolLM2-135M": (
        "llama 49152 576 1536 30 9 3 8192 1e-05 100000 tied", BIASES | DROPOUT | TP | PLAIN | D64 | SMOLLM2,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        "llama 49152 576 1536 30 9 3 8192 1e-05 100000 tied", BIASES | DROPOUT | TP | PLAIN | SMOLLM2,
    ),
    "HuggingFaceTB/SmolLM2-360M-Instruct": (
        "llama 49152 960 2560 32 15 5 8192 1e-05 100000 tied", BIASES | DROPOUT | TP | PLAIN | SMOLLM2,
    ),
    "meta-llama/Llama-2-13b-hf": ("llama 32000 5120 13824 40 40 40 2048 1e-05 - untied", PLAIN | {"pretraining_tp": 2}),
    "meta-llama/Llama-2-70b-hf": ("llama 32000 8192 28672 80 64 8 2048 1e-05 - untied", {}),
    "meta-llama/Llama-2-7b-hf": ("llama 32000 4096 11008 32 32 32 4096 1e-05 - untied", TP | PLAIN),
    "meta-llama/Llama-3.1-70B-Instruct": (
        "llama 128256 8192 28672 80 64 8 131072 1e-05 500000 untied", BIASES | DROPOUT | TP | BY8,
    ),
    "meta-llama/Llama-3.1-8B": (
        "llama 128256 4096 14336 32 32 8 131072 1e-05 500000 untied", BIASES | DROPOUT | TP | BY8,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": (
        "llama 128256 4096 14336 32 32 8 131072 1e-05 500000 untied", BIASES | DROPOUT | TP | BY8,
    ),
    "meta-llama/Llama-3.2-1B": (
        "llama 128256 2048 8192 16 32 8 131072 1e-05 500000 tied", BIASES | DROPOUT | TP | BY32 | D64,
    ),
    "meta-llama/Llama-3.2-1B-Instruct": (
        "llama 128256 2048 8192 16 32 8 131072 1e-05 500000 tied", BIASES | DROPOUT | TP | BY32 | D64,
    ),
    "meta-llama/Llama-3.2-3B": (
        "llama 128256 3072 8192 28 24 8 131072 1e-05 500000 tied", BIASES | DROPOUT | TP | BY32 | D128,
    ),
    "meta-llama/Llama-3.2-3B-Instruct": (
        "llama 128256 3072 8192 28 24 8 131072 1e-05 500000 tied", BIASES | DROPOUT | TP | BY32 | D128,
    ),
    "meta-llama/Meta-Llama-3-70B-Instruct": (
        "llama 128256 8192 28672 80 64 8 8192 1e-05 500000 untied", BIAS | DROPOUT | TP | PLAIN,
    ),
    "meta-llama/Meta-Llama-3-8B": (
        "llama 128256 4096 14336 32 32 8 8192 1e-05 500000 untied", BIASES | DROPOUT | TP | PLAIN | D128,
    ),
    "meta-llama/Meta-Llama-3-8B-Instruct": (
        "llama 128256 4096 14336 32 32 8 8192 1e-05 500000 untied", BIASES | DROPOUT | TP | PLAIN | D128,
    ),
    "TinyLlama/TinyLlama-1.1B-Chat-v0.4": ("llama 32003 2048 5632 22 32 4 2048 1e-05 10000 untied", TP | PLAIN),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": ("llama 32000 2048 5632 22 32 4 2048 1e-05 10000 untied", BIAS | TP | PLAIN),
    "unsloth/llama-3-8b-Instruct-bnb-4bit": (
        "llama 128256 4096 14336 32 32 8 8192 1e-05 500000 untied", BIASES | DROPOUT | TP | D128
        | {"quantization_config": {"bnb_4bit_quant_type": "nf4", "_load_in_4bit": True}},
    ),
    "unsloth/Llama-3.2-1B-Instruct": (
        "llama 128256 2048 8192 16 32 8 131072 1e-05 500000 tied", BIASES | DROPOUT | TP | BY32 | {"unsloth_fixed": True},
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        "mistral 32768 4096 14336 32 32 8 32768 1e-05 1e+06 untied", DROPOUT | {"sliding_window": None},
    ),
    "mistralai/Mistral-7B-v0.1": (
        "mistral 32000 4096 14336 32 32 8 32768 1e-05 10000 untied", DROPOUT | {"sliding_window": 4096},
    ),
    "mistralai/Mistral-Nemo-Base-2407": (
        "mistral 131072 5120 14336 40 32 8 128000 1e-05 1e+06 untied", DROPOUT | D128 | {"sliding_window": None},
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (
        "qwen2 151936 1536 8960 28 12 2 131072 1e-06 10000 untied", DROPOUT | PLAIN | window(None, 21),
    ),
    "Qwen/Qwen1.5-7B-Chat with yarn": (
        "qwen2 151936 4096 11008 32 32 32 32768 1e-06 1e+06 untied", DROPOUT | window(131072, 28)
        | {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}},
    ),
    "Qwen/Qwen2-0.5B": ("qwen2 151936 896 4864 24 14 2 131072 1e-06 1e+06 tied", DROPOUT | window(131072, 24)),
    "Qwen/Qwen2-0.5B-Instruct": ("qwen2 151936 896 4864 24 14 2 32768 1e-06 1e+06 tied", DROPOUT | window(32768, 24)),
    "Qwen/Qwen2-1.5B-Instruct": ("qwen2 151936 1536 8960 28 12 2 32768 1e-06 1e+06 tied", DROPOUT | window(32768, 28)),
    "Qwen/Qwen2-7B-Instruct": (
        "qwen2 152064 3584 18944 28 28 4 32768 1e-06 1e+06 untied", DROPOUT | window(131072, 28),
    ),
    "Qwen/Qwen2.5-0.5B": (
        "qwen2 151936 896 4864 24 14 2 32768 1e-06 1e+06 tied", DROPOUT | NO_MROPE | window(32768, 24),
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2 151936 896 4864 24 14 2 32768 1e-06 1e+06 tied", DROPOUT | window(32768, 21)),
    "Qwen/Qwen2.5-1.5B-Instruct": (
        "qwen2 151936 1536 8960 28 12 2 32768 1e-06 1e+06 tied", DROPOUT | window(32768, 21),
    ),
    "Qwen/Qwen2.5-14B": ("qwen2 152064 5120 13824 48 40 8 131072 1e-05 1e+06 untied", DROPOUT | window(131072, 48)),
    "Qwen/Qwen2.5-32B": ("qwen2 152064 5120 27648 64 40 8 131072 1e-05 1e+06 untied", DROPOUT | window(131072, 64)),
    "Qwen/Qwen2.5-32B-Instruct": (
        "qwen2 152064 5120 27648 64 40 8 32768 1e-06 1e+06 untied", DROPOUT | PLAIN | window(131072, 70),
    ),
    "Qwen/Qwen2.5-3B": (
        "qwen2 151936 2048 11008 36 16 2 32768 1e-06 1e+06 tied", DROPOUT | NO_MROPE | window(32768, 36),
    ),
    "Qwen/Qwen2.5-3B-Instruct": ("qwen2 151936 2048 11008 36 16 2 32768 1e-06 1e+06 tied", DROPOUT | window(32768, 70)),
    "Qwen/Qwen2.5-7B": (
        "qwen2 152064 3584 18944 28 28 4 131072 1e-06 1e+06 untied", DROPOUT | NO_MROPE | window(131072, 28),
    ),
    "Qwen/Qwen2.5-7B-Instruct": (
        "qwen2 152064 3584 18944 28 28 4 32768 1e-06 1e+06 untied", DROPOUT | window(131072, 28),
    ),
    "Qwen/Qwen3-0.6B": (
        "qwen3 151936 1024 3072 28 16 8 40960 1e-06 1e+06 tied", BIAS | DROPOUT | PLAIN | D128 | window(None, 28),
    ),
    "Qwen/Qwen3-1.7B": (
        "qwen3 151936 2048 6144 28 16 8 40960 1e-06 1e+06 tied", BIAS | DROPOUT | PLAIN | D128 | window(None, 28),
    ),
    "Qwen/Qwen3-14B": (
        "qwen3 151936 5120 17408 40 40 8 40960 1e-06 1e+06 untied", BIAS | DROPOUT | PLAIN | D128 | window(None, 40),
    ),
    "Qwen/Qwen3-32B": (
        "qwen3 151936 5120 25600 64 64 8 40960 1e-06 1e+06 untied", BIAS | DROPOUT | PLAIN | D128 | window(None, 64),
    ),
    "Qwen/Qwen3-4B": (
        "qwen3 151936 2560 9728 36 32 8 40960 1e-06 1e+06 tied", BIAS | PLAIN | D128 | window(None, 36)
        | {"attention_dropout": 0},
    ),
    "Qwen/Qwen3-4B-Instruct-2507": (
        "qwen3 151936 2560 9728 36 32 8 262144 1e-06 5e+06 tied", BIAS | DROPOUT | PLAIN | D128 | window(None, 36),
    ),
    "Qwen/Qwen3-8B": (
        "qwen3 151936 4096 12288 36 32 8 40960 1e-06 1e+06 untied", BIAS | DROPOUT | PLAIN | D128 | window(None, 36),
    ),
    "allenai/OLMo-2-0325-32B": ("olmo2 100352 5120 27648 64 40 8 4096 1e-06 500000 untied", {}),
    "allenai/OLMo-2-0425-1B": ("olmo2 100352 2048 8192 16 16 16 4096 1e-06 500000 untied", BIAS | DROPOUT | PLAIN),
    "allenai/OLMo-2-1124-13B": ("olmo2 100352 5120 13824 40 40 40 4096 1e-06 500000 untied", {}),
    "allenai/OLMo-2-1124-7B": ("olmo2 100352 4096 11008 32 32 32 4096 1e-06 500000 untied", {}),
    "HuggingFaceTB/SmolLM3-3B": (
        "smollm3 128256 2048 11008 36 16 4 65536 1e-06 5e+06 tied",
        {"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9},
    ),
    "mistralai/Mixtral-8x7B-v0.1": (
        "mixtral 32000 4096 14336 32 32 8 32768 1e-05 1e+06 untied",
        {"num_experts_per_tok": 2, "num_local_experts": 8, "sliding_window": None},
    ),
    "Qwen/Qwen3-30B-A3B": (
        "qwen3_moe 151936 2048 6144 48 32 4 40960 1e-06 1e+06 untied", BIAS | DROPOUT | PLAIN | D128 | window(None, 48) | {
            "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
            "num_experts": 128, "num_experts_per_tok": 8, "output_router_logits": False, "router_aux_loss_coef": 0.001,
        },
    ),
}  # fmt: skip

# what a file is refused for, and why that is true
REFUSED: dict[str, tuple[type[AprError], str]] = {
    # no max_position_embeddings: the file says max_sequence_length, which transformers does not read
    "decapoda-research/llama-65b-hf": (MalformedFile, "missing key 'max_position_embeddings'"),
    "DAMO-NLP-SG/CLEX-7B": (Refused, "rope_type = 'clex'"),
    "unsloth/llama-3-8b-Instruct-bnb-4bit": (Refused, "quantization_config"),
    "mistralai/Mixtral-8x7B-v0.1": (Refused, "model_type = 'mixtral'"),
    "Qwen/Qwen3-30B-A3B": (Refused, "model_type = 'qwen3_moe'"),
}

# the numbers of parameters that people know of them: a wrong size, bias or tie would change it
PARAMETERS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM-1.7B-Instruct": 1_711_376_384,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "allenai/OLMo-2-1124-13B": 13_716_198_400,
    "allenai/OLMo-2-0325-32B": 32_234_279_936,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "codellama/CodeLlama-7b-hf": 6_738_546_688,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
}

# files that leave a key out or have one too much
NOTED = {
    "meta-llama/Llama-2-7b-hf": "not stated, so the default of transformers for llama: rope_theta = 10000.0",
    "meta-llama/Llama-2-13b-hf": "not stated, so the default of transformers for llama: rope_theta = 10000.0",
    "meta-llama/Llama-2-70b-hf": "not stated, so the default of transformers for llama: rope_theta = 10000.0",
    "Qwen/Qwen2.5-0.5B": "unknown keys that are off: use_mrope = false",
    "Qwen/Qwen2.5-3B": "unknown keys that are off: use_mrope = false",
    "Qwen/Qwen2.5-7B": "unknown keys that are off: use_mrope = false",
    "unsloth/Llama-3.2-1B-Instruct": "keys without effect here: unsloth_fixed = true",
}


def config(name: str) -> Keys:
    """Put the config.json of a row together."""
    words, more = PUBLISHED[name]
    d: Keys = {"hidden_act": "silu", **USUAL, **more}
    for key, word in zip(COLUMNS, words.split(), strict=True):
        if key == "tie_word_embeddings":
            d[key] = {"tied": True, "untied": False}[word]
        elif word != "-":
            d[key] = word if key == "model_type" else json.loads(word)
    return {"architectures": [ARCHITECTURES[d["model_type"]]], **d}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_loads_or_is_refused_for_a_true_reason(name):
    d = config(name)
    if name in REFUSED:
        error, words = REFUSED[name]
        with pytest.raises(error, match=f"here.*{words}"):
            from_hf(d, "here")
        return
    cfg = from_hf(d)
    said = {**{field: d.get(key) for key, field in SIZES.items()}, "head_dim": d.get("head_dim")}
    for field, value in {
        **said,
        "rms_norm_eps": d["rms_norm_eps"],
        "rope_theta": d.get("rope_theta"),
    }.items():
        assert value is None or getattr(cfg, field) == value, field
    assert cfg.tie_word_embeddings is d["tie_word_embeddings"]
    assert cfg.sliding_window == (d.get("sliding_window") or 0 if cfg.family == "mistral" else 0)
    assert (cfg.rope_scaling is None) == (d.get("rope_scaling") is None)
    assert Layout(cfg).num_parameters == PARAMETERS.get(name, Layout(cfg).num_parameters)
    assert from_hf(to_hf(cfg)) == cfg
    assert hf_notes(d) == ([NOTED[name]] if name in NOTED else [])


def test_the_tables_belong_together():
    known = [name for name in PUBLISHED if config(name)["model_type"] in FAMILIES]
    assert len(known) >= 60
    assert {config(name)["model_type"] for name in known} == set(FAMILIES)
    assert REFUSED.keys() | NOTED.keys() | PARAMETERS.keys() <= PUBLISHED.keys()
