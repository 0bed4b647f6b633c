"""Metadata of an APR v2 file: what the model computes, and its tokenizer.

`hf_config` says it all in the words of config.json; the typed keys of the specification stand beside it and must agree.
Files of the original have the typed keys alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

from ..common.errors import MalformedFile, Refused
from ..common.files import parse_json, short
from ..model.config import ModelConfig
from ..model.families import FAMILIES
from ..model.hf_config import MUST_BE, SIZES, from_hf, to_hf
from .apr2 import MAX_METADATA, Dumped, dump_metadata, dumped

TOKENIZER = "tokenizer.json"  # metadata key of the whole text
SPLIT_HALVES = 2  # rope_type: dimension i turns with i + D/2
_SIZES = {field: hf_key for hf_key, field in SIZES.items()}  # typed keys are called as the fields are


def _typed(cfg: ModelConfig) -> dict[str, Any]:
    """List the keys of the specification that describe the model, and the two that the specification lacks."""
    return {
        "architecture": cfg.family,
        "hf_architecture": FAMILIES[cfg.family].architecture,
        "hf_model_type": cfg.family,
        **{key: getattr(cfg, key) for key in _SIZES},
        "head_dim": cfg.head_dim,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_type": SPLIT_HALVES,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "attention_bias": cfg.qkv_bias,  # of q, k and v; the output projection has none
    }


def config_to_metadata(cfg: ModelConfig, created_at: str | None = None) -> dict[str, Any]:
    """Describe a model completely; `metadata_to_config` gives an equal ModelConfig back.

    created_at: ISO 8601; None is now. `write_apr` adds param_count and total_size.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"model_type": cfg.family, **_typed(cfg), "created_at": created_at or now, "hf_config": to_hf(cfg)}


def metadata_to_config(meta: dict[str, Any], source: str, names: Collection[str]) -> ModelConfig:
    """Read the ModelConfig of an APR file from its metadata and tensor names. Invents nothing.

    `hf_config` decides where it is present, and the typed keys must agree with it. Files of the
    original lack it: there the typed keys decide, and the tensor names what has no key (tying).
    Raises MalformedFile for a missing key, Refused for contradictions and what apr does not compute.
    """
    if "hf_config" not in meta:
        return from_hf(_old_config(meta, source, names), source, published=False)
    cfg = from_hf(meta["hf_config"], f"{source}: hf_config")
    for key, want in _typed(cfg).items():
        if meta.get(key) is not None and meta[key] != want:
            raise Refused(f"{source}: {key} = {meta[key]!r} in the metadata, but hf_config says {want!r}")
    return cfg


def _old_config(meta: dict[str, Any], source: str, names: Collection[str]) -> dict[str, Any]:
    """Make a config.json from the typed keys of a file without hf_config."""
    family = _old_family(meta, source, names)
    rope_type = _key(meta, source, "rope_type")
    if rope_type != SPLIT_HALVES:
        what = "adjacent pairs are rotated" if rope_type == 0 else "unknown"
        raise Refused(
            f"{source}: rope_type = {rope_type!r} ({what}); apr rotates split halves ({SPLIT_HALVES})"
        )
    if meta.get("num_experts"):
        raise Refused(
            f"{source}: num_experts = {meta['num_experts']!r}; apr does not compute mixtures of experts"
        )
    d: dict[str, Any] = {"model_type": family, "hidden_act": "silu"}  # no typed key: all families use silu
    for key, hf_key in _SIZES.items():
        d[hf_key] = _key(meta, source, key, hf_key)
    for key in ("rms_norm_eps", "rope_theta"):
        d[key] = _key(meta, source, key)
    d["head_dim"] = meta.get("head_dim")  # None: hidden_size / num_heads, in the original too
    d["tie_word_embeddings"] = meta.get("tie_word_embeddings", "lm_head.weight" not in names)
    d |= {k: meta[k] for k in MUST_BE if k != "attention_bias" and meta.get(k) is not None}
    # Two switches have no typed key. They may be absent only where no model of the family uses them.
    positions = d["max_position_embeddings"]  # from_hf judges its type
    if "rope_scaling" in meta:
        d["rope_scaling"] = meta["rope_scaling"]
    elif family == "llama" and isinstance(positions, int) and positions > 8192:
        raise _missing(source, "rope_scaling", "Llama models of more than 8192 positions differ in it")
    keys = FAMILIES[family].keys
    if "sliding_window" in keys and "use_sliding_window" not in keys and "sliding_window" not in meta:
        raise _missing(source, "sliding_window", f"{family} models differ in it")
    d |= {key: meta[key] for key in keys if key in meta}
    return d


def _old_family(meta: dict[str, Any], source: str, names: Collection[str]) -> str:
    """Find the family that the metadata name, which must be the one that the tensor names show."""
    by_name = {k.lower(): k for k in FAMILIES} | {f.architecture.lower(): k for k, f in FAMILIES.items()}
    said = {key: meta[key] for key in ("architecture", "hf_architecture", "hf_model_type") if meta.get(key)}
    if not said:
        raise _missing(source, "architecture", "apr does not guess it from tensor names")
    found = {by_name.get(str(value).lower()) for value in said.values()}
    family = found.pop()
    if found or family is None:
        raise Refused(
            f"{source}: {said}: apr computes one of {', '.join(FAMILIES)}, and all must name the same"
        )
    block = FAMILIES[family].block
    for switch, part in (
        (block.qkv_bias, ".self_attn.q_proj.bias"),
        (block.qk_norm, ".self_attn.q_norm.weight"),
    ):
        if bool(switch) != any(n.endswith(part) for n in names):
            there = "lacks" if switch else "has"
            raise Refused(f"{source}: architecture {family!r}, but the file {there} tensors {part!r}")
    return family


def _key(meta: dict[str, Any], source: str, key: str, alias: str | None = None) -> Any:
    values = [meta[k] for k in (key, alias) if k is not None and meta.get(k) is not None]
    if not values:
        raise _missing(source, key, "apr invents no sizes")
    if any(v != values[0] for v in values):
        raise Refused(f"{source}: {key} = {values[0]!r}, but {alias} = {values[1]!r}")
    return values[0]


def _missing(source: str, key: str, why: str) -> MalformedFile:
    return MalformedFile(f"{source}: metadata lack {key!r}; {why}. Import the original checkpoint instead")


def embed_tokenizer(
    meta: dict[str, Any], tokenizer_json_text: str, eos_id: int | None, bos_id: int | None = None
) -> None:
    """Add a tokenizer to metadata: the keys of the specification and the whole text of tokenizer.json.

    The specification's vocabulary (position = id) and merges have no place for the rules of added
    tokens, normalizer and pre-tokenizer; the text has. Where it would not fit into a file, it is
    stored without its white space. Raises MalformedFile, or Refused for a tokenizer that is not BPE
    or an id that has no token.
    """
    meta.update(_tokenizer_keys(meta, tokenizer_json_text, eos_id, bos_id))


def dumped_tokenizer(meta: dict[str, Any], tokenizer_json_text: str, eos_id: int | None) -> dict[str, Dumped]:
    """The keys that `embed_tokenizer` adds to metadata, as they stand in a file: half a second for 150,000 tokens, once.

    Raises what it raises."""
    return {
        key: dumped(value) for key, value in _tokenizer_keys(meta, tokenizer_json_text, eos_id, None).items()
    }


def _tokenizer_keys(
    meta: dict[str, Any], tokenizer_json_text: str, eos_id: int | None, bos_id: int | None
) -> dict[str, Any]:
    d = parse_json(tokenizer_json_text, TOKENIZER)
    model = d.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise Refused(f"{TOKENIZER}: model.type is not BPE; apr embeds BPE tokenizers only")
    vocabulary = _vocabulary(model["vocab"], d.get("added_tokens") or [])
    out: dict[str, Any] = {"tokenizer.vocabulary": vocabulary, "tokenizer.model_type": "BPE"}
    listed = model.get("merges") or []
    if not isinstance(listed, list):
        raise MalformedFile(f"{TOKENIZER}: model.merges is not a list")
    merges = [m.split(" ") if isinstance(m, str) else m for m in listed]
    if not all(isinstance(m, list) and [type(part) for part in m] == [str, str] for m in merges):
        raise MalformedFile(f"{TOKENIZER}: a merge is not a pair of tokens")
    if not any(" " in part for m in merges for part in m):  # else "a b" could not be taken apart again
        out["tokenizer.merges"] = [" ".join(m) for m in merges]
    for name, i in (("bos", bos_id), ("eos", eos_id)):
        if i is not None:
            if not 0 <= i < len(vocabulary) or vocabulary[i] == _hole(i):
                raise Refused(
                    f"{TOKENIZER}: {name} id {i} has no token; its ids end at {len(vocabulary) - 1}"
                )
            out[f"tokenizer.{name}_token_id"] = i
    out[TOKENIZER] = tokenizer_json_text
    if len(dump_metadata({**meta, **out})) > MAX_METADATA - 4096:  # room for what the writer adds
        out[TOKENIZER] = json.dumps(d, ensure_ascii=False, separators=(",", ":"))
    return out


def _vocabulary(vocab: dict[str, Any], added: Any) -> list[str]:
    """List tokens in the order of their ids; an id without a token gets a name of its own."""
    by_id: dict[int, str] = {}
    try:
        pairs = [*vocab.items(), *((t["content"], t["id"]) for t in added)]
    except (TypeError, KeyError):
        raise MalformedFile(f"{TOKENIZER}: an added token lacks content or id") from None
    for token, i in pairs:
        if (
            not isinstance(token, str)
            or type(i) is not int
            or not 0 <= i < MAX_METADATA // 3
            or by_id.setdefault(i, token) != token
        ):
            raise MalformedFile(
                f"{TOKENIZER}: token {token!r} has id {i!r}: not a number, negative, too large or taken"
            )
    return [by_id.get(i, _hole(i)) for i in range(max(by_id, default=-1) + 1)]


def _hole(i: int) -> str:
    return f"[PAD{i}]"


def extract_tokenizer(meta: dict[str, Any], source: str = "metadata") -> str | None:
    """Take the text of the embedded tokenizer.json; None without one. Raises MalformedFile, naming `source`.

    Files of the original hold a vocabulary and merges only: without the pre-tokenizer no text can be
    encoded as in training, so that is None as well.
    """
    text = meta.get(TOKENIZER)
    if text is not None and not isinstance(text, str):
        raise MalformedFile(
            f"{source}: {TOKENIZER!r} is not text but {short(text)}; import the original checkpoint instead"
        )
    return text
