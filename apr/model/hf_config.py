"""Reading and writing config.json of Hugging Face: `from_hf` refuses what apr would not compute."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..common.errors import MalformedFile, Refused
from .config import ModelConfig, RopeScaling
from .families import FAMILIES

SIZES = {  # key of config.json -> field; all are whole numbers above zero
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_position_embeddings",
}

MAX_LAYERS = 4096  # a parameter table has rows for each: no config may ask for one that fills the memory

MUST_BE: dict[str, tuple[Any, ...]] = {  # keys that change the mathematics, and what we compute
    "hidden_act": ("silu",),
    "hidden_activation": ("silu", None),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0, 1, None),
    "pretraining_tp": (1, None),
    "rope_interleaved": (False, None),
    "attention_dropout": (0.0, 0, None),
    "hidden_dropout": (0.0, 0, None),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False,),
}

IRRELEVANT = {  # keys that cannot change a loss or a gradient
    "architectures",  # compared with the family below
    "model_type",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    "initializer_range",
    "max_window_layers",  # read only with use_sliding_window
    "is_llama_config",
    "transformers.js_config",
    "auto_map",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torchscript",
    "use_bfloat16",
    "chunk_size_feed_forward",
    "finetuning_task",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "task_specific_params",
    "tokenizer_class",
    "prefix",
    "tf_legacy_loss",
    "cross_attention_hidden_size",
}

_USED = {
    *SIZES,
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "sliding_window",
    "layer_types",
}


def from_hf(d: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """ModelConfig from the dict of a Hugging Face config.json. Invents no number.

    Raises Refused for an architecture or key we would compute wrongly, MalformedFile for a key
    that is missing or of the wrong type; both name `source`, the key and the value.
    """
    if not isinstance(d, dict):
        raise MalformedFile(f"{source}: expected a JSON object, found {type(d).__name__}")
    kind = d.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise Refused(
            f"{source}: model_type = {kind!r} is not an architecture apr computes; "
            f"it knows {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[kind]
    for key in ("architectures", "layer_types"):
        if not isinstance(d.get(key) or [], list):
            raise MalformedFile(f"{source}: {key} = {d[key]!r} is not a list")
    for name in d.get("architectures") or []:
        if name != family.architecture:
            raise Refused(f"{source}: architectures names {name!r}; apr computes {family.architecture} only")
    for key, value in d.items():
        if key in MUST_BE:
            if value not in MUST_BE[key]:
                raise Refused(
                    f"{source}: {key} = {value!r} is not supported; apr computes {MUST_BE[key][0]!r}"
                )
        elif key not in _USED and key not in IRRELEVANT and not key.startswith("_"):
            raise Refused(
                f"{source}: unknown key {key!r} = {value!r}; apr refuses what it would not honour. "
                "Remove the key if it does not change the mathematics"
            )
    if "hidden_act" not in d:
        raise MalformedFile(f"{source}: missing key 'hidden_act' (the families apr computes use \"silu\")")

    sizes = {field: _number(d, key, int, source) for key, field in SIZES.items()}
    if sizes["num_layers"] > MAX_LAYERS:
        raise Refused(
            f"{source}: num_hidden_layers = {sizes['num_layers']}; apr computes at most {MAX_LAYERS}"
        )
    heads, kv, hidden = sizes["num_heads"], sizes["num_kv_heads"], sizes["hidden_size"]
    if heads % kv:
        raise Refused(
            f"{source}: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv}"
        )
    if d.get("head_dim") is not None or family.head_dim_required:
        head_dim = _number(d, "head_dim", int, source)
    elif hidden % heads:
        raise MalformedFile(
            f"{source}: hidden_size {hidden} / num_attention_heads {heads} is not whole: give head_dim"
        )
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise Refused(f"{source}: head_dim = {head_dim} is odd; rotary embedding needs pairs")
    tied = d.get("tie_word_embeddings")
    if not isinstance(tied, bool):
        raise MalformedFile(
            f"{source}: tie_word_embeddings = {tied!r}; write true or false, apr does not guess"
        )
    window = 0
    if family.window and d.get("sliding_window") is not None:
        window = _number(d, "sliding_window", int, source)
    wanted = "sliding_attention" if window else "full_attention"
    if any(t != wanted for t in d.get("layer_types") or []):
        raise Refused(f"{source}: layer_types = {d['layer_types']!r}; apr computes {wanted} on every layer")
    theta, scaling = _rope(d, source)
    return ModelConfig(
        family=kind,
        head_dim=head_dim,
        rms_norm_eps=_number(d, "rms_norm_eps", float, source),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=tied,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        sliding_window=window,
        **sizes,
    )


def _number(d: dict[str, Any], key: str, kind: type, source: str) -> Any:
    value = d.get(key)
    if value is None:
        raise MalformedFile(f"{source}: missing key {key!r}; apr invents no sizes, add it")
    good = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not good or not 0 < value < 2**40:
        raise MalformedFile(f"{source}: {key} = {value!r} is not a positive {kind.__name__}")
    return kind(value)


def _rope(d: dict[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """rope_theta and scaling, from the old places (top level) or the new (rope_parameters)."""
    rope: dict[str, Any] = {}
    for place in ("rope_scaling", "rope_parameters"):
        value = d.get(place)
        if value is not None and not isinstance(value, dict):
            raise MalformedFile(f"{source}: {place} = {value!r} is not an object")
        rope.update(value or {})
    if d.get("rope_theta") is not None:
        if rope.get("rope_theta", d["rope_theta"]) != d["rope_theta"]:
            raise Refused(
                f"{source}: two values of rope_theta: {d['rope_theta']!r} and {rope['rope_theta']!r}"
            )
        rope["rope_theta"] = d["rope_theta"]
    where = f"{source}: rope_parameters" if d.get("rope_parameters") else source
    theta = _number(rope, "rope_theta", float, where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    keys = set(rope) - {"rope_theta", "rope_type", "type"}
    if rope.get("partial_rotary_factor") in (1, 1.0):
        keys.discard("partial_rotary_factor")
    if kind == "default":
        if keys:
            raise Refused(f"{source}: rope keys {sorted(keys)} have no meaning for rope_type 'default'")
        return theta, None
    if kind != "llama3":
        raise Refused(f"{source}: rope_type = {kind!r} is not supported; apr computes 'default' and 'llama3'")
    names = set(RopeScaling.__dataclass_fields__)
    if keys - names:
        raise Refused(f"{source}: unknown rope keys {sorted(keys - names)}")
    return theta, RopeScaling(
        factor=_number(rope, "factor", float, where),
        low_freq_factor=_number(rope, "low_freq_factor", float, where),
        high_freq_factor=_number(rope, "high_freq_factor", float, where),
        original_max_position_embeddings=_number(rope, "original_max_position_embeddings", int, where),
    )


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json that `from_hf` reads back to the same ModelConfig, loadable by transformers."""
    d: dict[str, Any] = {
        "architectures": [FAMILIES[cfg.family].architecture],
        "model_type": cfg.family,
        "hidden_act": "silu",
        "head_dim": cfg.head_dim,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_theta": cfg.rope_theta,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "attention_dropout": 0.0,
        **{key: getattr(cfg, field) for key, field in SIZES.items()},
    }
    if cfg.rope_scaling:
        d["rope_scaling"] = {"rope_type": "llama3", **asdict(cfg.rope_scaling)}
    if FAMILIES[cfg.family].window:
        d["sliding_window"] = cfg.sliding_window or None
    if cfg.family in ("llama", "qwen3"):
        d["attention_bias"] = False
    if cfg.family == "llama":
        d["mlp_bias"] = False
    if cfg.family in ("qwen2", "qwen3"):
        d["use_sliding_window"] = False
    return d
