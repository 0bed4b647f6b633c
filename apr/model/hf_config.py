"""Read and write config.json of Hugging Face: `from_hf` refuses what apr would not compute.

A missing key with a published default gets that of the class in transformers; sizes get none. An unknown key that is off
changes nothing. `hf_notes` says which of these a file has.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from typing import Any

from ..common.errors import MalformedFile, Refused
from ..common.files import short
from .config import ModelConfig
from .families import FAMILIES
from .hf_again import check_again
from .hf_keys import HfKeys
from .hf_unknown import describe, unheeded
from .rope_scaling import SCALINGS, RopeScaling

# key of config.json -> field; all are whole numbers above zero
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_position_embeddings",
}

# a parameter table has rows for each: no config may ask for one that fills the memory
MAX_LAYERS = 4096

# keys that change the mathematics, and the values apr computes
MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "hidden_activation": ("silu", None),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0, 1, None),
    "rope_interleaved": (False, None),
    "attention_dropout": (0.0, 0, None),
    "hidden_dropout": (0.0, 0, None),
    "embedding_multiplier": (1.0, 1, None),
    "residual_multiplier": (1.0, 1, None),
    "logits_scaling": (1.0, 1, None),
    "attention_multiplier": (None,),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False,),
    "is_causal": (True,),
    "causal": (True,),
    "use_rope": (True,),
    "do_layer_norm_before": (True,),
    "use_bidirectional_attention": (False,),
    "per_layer_config": ({}, None),
    "resid_pdrop": (0.0,),
    "embd_pdrop": (0.0,),
    "attn_pdrop": (0.0,),
    "hidden_dropout_prob": (0.0,),
    "attention_probs_dropout_prob": (0.0,),
}
# What to do instead, where another key or another source helps.
TRY = {
    "quantization_config": ": give the model that was quantised, or load it with transformers, call dequantize() and save it",
    "attention_dropout": ", so remove the key to compute without dropout, as evaluations do",
}
# null is no value of these: transformers fails on it too
_NEVER_NULL = {"hidden_act"}

# keys that from_hf reads whatever the family; sliding_window counts where the family reads it
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


def from_hf(d: dict[str, Any], source: str = "config.json", published: bool = True) -> ModelConfig:
    """Read the dict of a Hugging Face config.json. Invents no size.

    published: a missing key has the default of its class in transformers. Off for what is no config.json but was made of
    another file, where a missing key is a fault.

    Raises Refused for an architecture or key that apr would compute wrongly, MalformedFile for a key
    that is missing or of the wrong type; both name `source`, the key and the value. AprError: a second reading differs.
    """
    cfg = _read(d, source, published)[0]
    check_again(d, cfg, source)
    return cfg


def hf_notes(d: dict[str, Any], source: str = "config.json") -> list[str]:
    """Say what `from_hf` took as a default and what it did not heed; [] for a file that says everything and no more."""
    return _read(d, source, True)[1]


def _read(d: dict[str, Any], source: str, published: bool) -> tuple[ModelConfig, list[str]]:
    if not isinstance(d, dict):
        raise MalformedFile(f"{source}: expected a JSON object, found {type(d).__name__}")
    kind = d.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise Refused(
            f"{source}: model_type = {kind!r} is not an architecture apr computes; "
            f"it knows {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[kind]
    keys = HfKeys(d, source, family.defaults if published else {})
    _refuse_what_differs(keys, kind)
    sizes = {field: keys.number(key) for key, field in SIZES.items() if field != "num_kv_heads"}
    sizes["num_kv_heads"] = _kv_heads(keys, sizes["num_heads"], published and family.kv_heads_follow)
    if sizes["num_layers"] > MAX_LAYERS:
        raise Refused(
            f"{source}: num_hidden_layers = {sizes['num_layers']}; apr computes at most {MAX_LAYERS}"
        )
    head_dim = _head_dim(keys, sizes["num_heads"], sizes["num_kv_heads"], family.head_dim_required)
    tied = keys.get("tie_word_embeddings")
    if not isinstance(tied, bool):
        raise MalformedFile(
            f"{source}: tie_word_embeddings = {tied!r}; write true or false, apr does not guess"
        )
    theta, scaling = _rope(keys)
    cfg = ModelConfig(
        family=kind,
        head_dim=head_dim,
        rms_norm_eps=keys.number("rms_norm_eps", float),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=tied,
        qkv_bias=family.block.qkv_bias,
        qk_norm=bool(family.block.qk_norm),
        **sizes,
        **family.read(keys, sizes["num_layers"]),
    )
    return cfg, describe(d, keys.taken, kind, _known(kind))


def _known(kind: str) -> set[str]:
    """Name the keys of a config.json that are read, whatever their values."""
    return {*_USED, *MUST_BE, *FAMILIES[kind].keys}


def _refuse_what_differs(keys: HfKeys, kind: str) -> None:
    """Compare the keys of a config.json with what apr computes for a family."""
    source, family, known = keys.source, FAMILIES[kind], _known(kind)
    names = keys.get("architectures") or []
    if not isinstance(names, list):
        raise MalformedFile(f"{source}: architectures = {names!r} is not a list")
    # as saved without the head; if that was another matrix than the embedding, the tensors say so
    headless = family.architecture.replace("ForCausalLM", "Model")
    for name in names:
        # the first Llama files have LLaMAForCausalLM
        if not isinstance(name, str) or name.lower() not in (family.architecture.lower(), headless.lower()):
            raise Refused(
                f"{source}: architectures names {name!r}; apr computes {family.architecture} only, and reads {headless} "
                "whose head is the embedding"
            )
    for key, value in keys.d.items():
        if key in family.keys or (value is None and key not in _NEVER_NULL):
            continue
        if key in MUST_BE:
            if value not in MUST_BE[key]:
                raise Refused(
                    f"{source}: {key} = {_shown(value)} is not supported; apr computes {MUST_BE[key][0]!r}{TRY.get(key, '')}"
                )
        elif key not in known and not unheeded(key, value):
            raise Refused(
                f"{source}: unknown key {key!r} = {short(value)}; apr refuses what it would not honour. "
                "Remove the key if it does not change the mathematics"
            )
    if keys.get("hidden_act") is None:
        raise MalformedFile(f"{source}: missing key 'hidden_act' (the families apr computes use \"silu\")")


def _shown(value: Any) -> str:
    """Write a value into a message; of an object its method, if it names one."""
    if isinstance(value, dict) and isinstance(value.get("quant_method"), str):
        return f"{short(value)} with quant_method = {short(value['quant_method'])}"
    return short(value)


def _kv_heads(keys: HfKeys, heads: int, follow: bool) -> int:
    """Number of heads of k and v: num_key_value_heads; null, or no key where the class says so, is one for each head."""
    stated = "num_key_value_heads" in keys.d
    if keys.get("num_key_value_heads") is None and (stated or follow):
        keys.taken["num_key_value_heads"] = heads
        return heads
    found: int = keys.number("num_key_value_heads")
    return found


def _head_dim(keys: HfKeys, heads: int, kv_heads: int, required: bool) -> int:
    """Head width: head_dim, or hidden_size / num_attention_heads where it may be missing."""
    source, hidden = keys.source, keys.get("hidden_size")
    if heads % kv_heads:
        raise Refused(
            f"{source}: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        )
    if keys.get("head_dim") is not None or required:
        head_dim: int = keys.number("head_dim")
    elif hidden % heads:
        raise MalformedFile(
            f"{source}: hidden_size {hidden} / num_attention_heads {heads} is not whole: give head_dim"
        )
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise Refused(f"{source}: head_dim = {head_dim} is odd; rotary embedding needs pairs")
    return head_dim


def _rope(keys: HfKeys) -> tuple[float, RopeScaling | None]:
    """rope_theta and scaling, from the old places (top level) or the new (rope_parameters)."""
    source, top = keys.source, keys.d.get("rope_theta")
    rope: dict[str, Any] = {}
    for place in ("rope_scaling", "rope_parameters"):
        value = keys.get(place)
        if value is not None and not isinstance(value, dict):
            raise MalformedFile(f"{source}: {place} = {value!r} is not an object")
        value = value or {}
        kind = rope.get("rope_type", rope.get("type"))
        said = keys.d | {"rope_type": kind, "type": kind}
        if rope and (alone := sorted(k for k in value.keys() - rope.keys() if value[k] != said.get(k))):
            raise Refused(
                f"{source}: {place}.{alone[0]} = {short(value[alone[0]])} is not in rope_scaling, beside which transformers "
                "does not read rope_parameters; write all keys into one of these objects and remove the other"
            )
        for key in sorted(value.keys() & rope.keys()):
            if value[key] != rope[key]:
                raise Refused(
                    f"{source}: two values of {key}: {short(rope[key])} in rope_scaling and {short(value[key])} in "
                    "rope_parameters; remove one of these objects"
                )
        rope.update(value)
    if top is not None:
        if rope.get("rope_theta", top) != top:
            raise Refused(f"{source}: two values of rope_theta: {top!r} and {rope['rope_theta']!r}")
        rope["rope_theta"] = top
    elif "rope_theta" not in keys.d and "rope_theta" not in rope and keys.get("rope_theta") is not None:
        rope["rope_theta"] = keys.get("rope_theta")
    inner = HfKeys(rope, f"{source}: rope_parameters" if keys.get("rope_parameters") else source)
    theta = inner.number("rope_theta", float)
    kind = rope.get("rope_type", rope.get("type", "default"))
    names = set(rope) - {"rope_theta", "rope_type", "type"}
    if rope.get("partial_rotary_factor") in (1, 1.0):
        names.discard("partial_rotary_factor")
    # a factor of one divides no position
    if kind in ("linear", "dynamic", "default") and rope.get("factor") == 1:
        kind, names = "default", names - {"factor"}
    if kind == "default":
        if names:
            raise Refused(f"{source}: rope keys {sorted(names)} have no meaning for rope_type 'default'")
        return theta, None
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise Refused(
            f"{source}: rope_type = {kind!r} is not supported; apr computes {', '.join(map(repr, ['default', *SCALINGS]))}"
        )
    known = {f.name for f in fields(SCALINGS[kind])}
    if unknown := sorted(names - known - SCALINGS[kind].ignored):
        raise Refused(
            f"{source}: unknown rope keys {unknown} of rope_type {kind!r}; it has {', '.join(sorted(known))}"
        )
    scaling = SCALINGS[kind](**_values(SCALINGS[kind], inner))
    if fault := scaling.fault(theta):
        raise Refused(f"{inner.source}: {fault}; rope_type {kind!r} does not compute with it")
    return theta, scaling


def _values(kind: type[RopeScaling], keys: HfKeys) -> dict[str, Any]:
    """Read the fields of a kind of scaling; a key that is missing or null takes the default, where there is one, and a switch
    that is null is off, as in transformers."""
    found: dict[str, Any] = {}
    for f in fields(kind):
        type_name = str(f.type)
        is_missing = f.name not in keys.d if type_name == "bool" else keys.d.get(f.name) is None
        if is_missing and f.default is not MISSING:
            continue
        found[f.name] = (
            keys.flag(f.name)
            if type_name == "bool"
            else keys.number(f.name, int if type_name == "int" else float)
        )
    return found


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """Write the config.json that `from_hf` reads back to the same ModelConfig, loadable by transformers."""
    family = FAMILIES[cfg.family]
    d: dict[str, Any] = {
        "architectures": [family.architecture],
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
        values = {key: value for key, value in asdict(cfg.rope_scaling).items() if value is not None}
        d["rope_scaling"] = {"rope_type": cfg.rope_scaling.rope_type, **values}
    return d | family.write(cfg)
