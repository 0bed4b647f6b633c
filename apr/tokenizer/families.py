"""Tables of the tokenizers of published model families, beyond vocab.json and merges.txt.

Normalizer, split and special tokens by id; the figures are those of the families' own tokenizer.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# The split of GPT-4 (cl100k_base, github.com/openai/tiktoken): contractions, words with one leading character, digits,
# punctuation runs, line ends, and runs of spaces whose last space goes to the next word, so that indentation is one
# piece. Llama 3 takes up to three digits as it does, Qwen single ones.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT_QWEN = SPLIT.replace("{1,3}", "")


@dataclass(frozen=True)
class Family:
    """A family's tokenizer apart from its vocabulary and merges.

    base     tokens in vocab.json
    added    (content, special) of the added tokens by id; they follow the base, or are part of it
    eos      the token that ends a document in pretraining
    steps    normalizer, pre_tokenizer, post_processor and decoder, as tokenizer.json spells them
    options  of the BPE model
    """

    base: int
    added: dict[int, tuple[str, bool]]
    eos: str
    steps: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


def _byte_level(prefix: bool, trim: bool, regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": trim, "use_regex": regex}


def _split(pattern: str, byte_level: dict[str, Any]) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


def _options(affix: str | None, **more: bool) -> dict[str, Any]:
    """Make BPE options; affix: the value in the family's file for no prefix and no suffix."""
    return {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": affix,
        "end_of_word_suffix": affix,
        "fuse_unk": False,
        "byte_fallback": False,
        **more,
    }


def _after(base: int, *contents: str, special: bool) -> dict[int, tuple[str, bool]]:
    return {base + i: (content, special) for i, content in enumerate(contents)}


_QWEN2_BASE = 151_643
_QWEN2_ADDED = _after(_QWEN2_BASE, "<|endoftext|>", "<|im_start|>", "<|im_end|>", special=True)
_QWEN25_ADDED = {
    **_QWEN2_ADDED,
    **_after(
        _QWEN2_BASE + 3,
        *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
        *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
        *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
        special=True,
    ),
    **_after(
        _QWEN2_BASE + 14,
        *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
        *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
        special=False,
    ),
}
_QWEN3_ADDED = {
    **_QWEN25_ADDED,
    **_after(_QWEN2_BASE + 22, "<tool_response>", "</tool_response>", "<think>", "</think>", special=False),
}
_QWEN_STEPS = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": _split(SPLIT_QWEN, _byte_level(False, False, False)),
    "post_processor": _byte_level(False, False, False),
    "decoder": _byte_level(False, False, False),
}

_LLAMA3_BASE, _LLAMA3_SPECIAL = 128_000, 256
_LLAMA3_NAMED = {  # of Llama 3.1; the other places are reserved, numbered without gaps
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


def _llama3_added() -> dict[int, tuple[str, bool]]:
    reserved = iter(range(_LLAMA3_SPECIAL))
    names = (
        _LLAMA3_NAMED.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(_LLAMA3_SPECIAL)
    )
    return _after(_LLAMA3_BASE, *names, special=True)


def _begin_with(token: str, i: int) -> dict[str, Any]:
    """Make the post-processor that puts a token before each text."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    second = {"SpecialToken": {"id": token, "type_id": 1}}
    a, b = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [special, a],
        "pair": [special, a, second, b],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
    }


FAMILIES: dict[str, Family] = {
    "qwen2": Family(_QWEN2_BASE, _QWEN2_ADDED, "<|endoftext|>", _QWEN_STEPS, _options("")),
    "qwen2.5": Family(
        _QWEN2_BASE, _QWEN25_ADDED, "<|endoftext|>", _QWEN_STEPS, _options("", ignore_merges=False)
    ),
    "qwen3": Family(
        _QWEN2_BASE, _QWEN3_ADDED, "<|endoftext|>", _QWEN_STEPS, _options("", ignore_merges=False)
    ),
    "gpt2": Family(
        50_257,
        _after(50_256, "<|endoftext|>", special=True),
        "<|endoftext|>",
        {
            "normalizer": None,
            "pre_tokenizer": _byte_level(False, True, True),
            "post_processor": _byte_level(True, False, True),
            "decoder": _byte_level(True, True, True),
        },
        _options(""),
    ),
    "llama3": Family(
        _LLAMA3_BASE,
        _llama3_added(),
        "<|end_of_text|>",
        {
            "normalizer": None,
            "pre_tokenizer": _split(SPLIT, _byte_level(False, True, False)),
            "post_processor": {
                "type": "Sequence",
                "processors": [
                    _byte_level(True, False, True),
                    _begin_with("<|begin_of_text|>", _LLAMA3_BASE),
                ],
            },
            "decoder": _byte_level(True, True, True),
        },
        _options(None, ignore_merges=True),
    ),
}
