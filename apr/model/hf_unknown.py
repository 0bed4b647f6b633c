"""Tell the keys of a config.json that change no number from those that are unknown, and describe what was not heeded."""

from __future__ import annotations

from typing import Any

from ..common.files import short

# Keys that every file may have and that cannot change a loss or a gradient: not worth a note. `architectures` is compared
# with the family; pretraining_tp cuts products into pieces, with the same sums.
IRRELEVANT = {
    "pretraining_tp",
    "architectures",
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
    "max_window_layers",
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

# Without effect too, but seldom in a config.json: settings of generation, token ids, and notes of tools.
NOTED = {
    *(
        "max_length",
        "min_length",
        "max_new_tokens",
        "do_sample",
        "early_stopping",
        "num_beams",
        "temperature",
        "top_k",
    ),
    *(
        "top_p",
        "min_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "bad_words_ids",
    ),
    *(
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "num_return_sequences",
        "num_beam_groups",
    ),
    *(
        "diversity_penalty",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
    ),
    *(
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
    ),
    *("epsilon_cutoff", "eta_cutoff", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "renormalize_logits"),
    *("unk_token_id", "mask_token_id", "cls_token_id"),
    *(
        "max_sequence_length",
        "max_seq_len",
        "max_seq_length",
        "seq_length",
        "model_max_length",
        "tokenizer_model_max_length",
    ),
    *(
        "tokenizer_padding_side",
        "attn_implementation",
        "use_flash_attn",
        "use_flashattn",
        "use_flash_attention",
        "use_flash_attention_2",
    ),
    *("gradient_checkpointing", "name_or_path", "model_name", "license"),
}
NOTED_PREFIXES = ("unsloth_",)
# a config.json may have millions of keys
MAX_LISTED = 8


def unheeded(key: str, value: Any) -> bool:
    """True for an unknown key that changes no number: off, or known to be without effect."""
    return value is None or value is False or _silent(key) or _without_effect(key)


def _silent(key: str) -> bool:
    return key in IRRELEVANT or key.startswith("_")


def _without_effect(key: str) -> bool:
    return key in NOTED or key.startswith(NOTED_PREFIXES)


def describe(d: dict[str, Any], taken: dict[str, Any], family: str, known: set[str]) -> list[str]:
    """Describe the defaults taken and the keys of `d` that were not heeded: one line a kind, none for what is usual."""
    left = {k: v for k, v in d.items() if k not in known and not _silent(k)}
    idle = {k: v for k, v in left.items() if _without_effect(k)}
    off = {k: v for k, v in left.items() if k not in idle}
    return [
        f"{what}: {_few(keys)}"
        for what, keys in (
            (f"not stated, so the default of transformers for {family}", taken),
            ("unknown keys that are off", off),
            ("keys without effect here", idle),
        )
        if keys
    ]


def _few(keys: dict[str, Any]) -> str:
    shown = [f"{short(k)[1:-1]} = {_json(v)}" for k, v in list(keys.items())[:MAX_LISTED]]
    return ", ".join(shown) + (f", ... {len(keys)} in all" if len(keys) > MAX_LISTED else "")


def _json(value: Any) -> str:
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or isinstance(value, bool)
        else short(value)
    )
