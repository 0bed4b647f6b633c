"""Keys of adapter_config.json, PEFT's description of a LoRA adapter, and what apr honours of them."""

from __future__ import annotations

from typing import Any

from ..common.errors import MalformedFile, Refused
from ..common.files import short
from ..common.patterns import MAX_PATTERNS, compiled_end

CONFIG = "adapter_config.json"
# Keys that change what an adapter computes, with the only value that apr honours (an empty one is always good).
MUST_BE: dict[str, Any] = {
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "use_bdlora": None,
    "velora_config": None,
    "monteclora_config": None,
    "kappa_tune_config": None,
}
# Keys that are read here, or that describe a training that is over.
HARMLESS = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r", "target_modules",
    "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "runtime_config", "peft_version", "qalora_group_size", "ensure_weight_tying",
    "tie_word_embeddings", "use_dora", "modules_to_save",
}  # fmt: skip
# Initial values of A and B; others also change the base, so that the adapter does not belong to it.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
MERGED = "PEFT's merge_and_unload merges what can be merged: import what that saves"
# Methods that put trained vectors before a text, or before its keys and values.
PROMPTS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "CPT",
    "ADAPTION_PROMPT",
    "CARTRIDGE",
)
PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}


def check_config(config: dict[str, Any], source: str) -> None:
    """Check an adapter_config.json. Raises MalformedFile, Refused: a key that would not be honoured, by name."""
    if (kind := config.get("peft_type")) != "LORA":
        merge = (
            "Its vectors stand before a text and are part of no weights, so nothing merges it"
            if kind in PROMPTS
            else MERGED
        )
        raise Refused(f"{source}: peft_type = {short(kind)}; apr merges LORA only. {merge}")
    for key, value in config.items():
        if key in HARMLESS:
            continue
        if key == "init_lora_weights":
            if value not in STARTS:
                raise Refused(
                    f"{source}: {key} = {value!r} changes the base weights too; save the adapter converted to plain LoRA "
                    "(path_initial_model_for_weight_conversion)"
                )
            continue
        want = MUST_BE.get(key)
        if key in MUST_BE and (value == want or (key != "bias" and not value)):
            continue
        if key not in MUST_BE and value in (None, False, [], {}, ""):
            continue
        reason = (
            f"apr honours {want!r} only"
            if key in MUST_BE
            else "apr does not know this key, and it may change what is computed"
        )
        raise Refused(f"{source}: {key} = {short(value)}; {reason}. {MERGED}")
    for key in ("r", "lora_alpha"):
        _check_number(key, config.get(key), source)
    for key in PATTERNS:
        if not isinstance(config.get(key) or {}, dict):
            raise MalformedFile(f"{source}: {key} = {config[key]!r} is not an object")
        if len(config.get(key) or {}) > MAX_PATTERNS:
            raise Refused(
                f"{source}: {key} has {len(config[key])} patterns; apr reads {MAX_PATTERNS} at most"
            )
        for pattern, value in (config.get(key) or {}).items():
            _check_number(f"{key}: {pattern!r}", value, source)
            try:
                compiled_end(pattern)
            except ValueError as e:
                raise MalformedFile(f"{source}: {key}: {short(pattern)} {e}") from None


def _check_number(name: str, value: Any, source: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise MalformedFile(f"{source}: {name} = {value!r} is not a number above 0")
