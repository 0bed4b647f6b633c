"""Checkpoints for exchange with other programs: every family, tied and not, each dtype, with a tokenizer and a chat template.

tests/golden/interop.json records what transformers, llama.cpp and its converter made of them (tools/golden/interop.py); the bytes
are the same wherever they are made.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apr.checkpoints.hf import write_hf
from apr.model.config import ModelConfig
from apr.model.hf_config import to_hf
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.rope_scaling import Llama3Scaling
from apr.tokenizer.tokenizer import Tokenizer
from apr.tokenizer.training import train_tokenizer

VOCAB = 320  # more than the tokenizer has ids: the rest is padded
TEXT = [
    "def add(a, b):\n    return a + b  # 12 and 345\n\n\nclass Thing:\n    def __init__(self):\n        self.x = 1\n",
    "Once upon a time there was a little girl. She didn't like rain, but she'd go out anyway.\n",
    "Caf\u00e9s in Z\u00fcrich: \u4e2d\u6587, \u65e5\u672c\u8a9e, \U0001f600. Prices: 3.50, 1000, 20%.\n",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDS = np.random.Generator(np.random.PCG64(7)).integers(0, VOCAB, (1, 40))


@dataclass(frozen=True)
class Case:
    """A checkpoint: its configuration, the dtype of its weights, and the seed of their values."""

    cfg: ModelConfig
    dtype: str
    seed: int


def _case(preset: str, dtype: str, seed: int, **change: object) -> Case:
    return Case(dataclasses.replace(PRESETS[preset], vocab_size=VOCAB, **change), dtype, seed)  # type: ignore[arg-type]


CASES = {
    "llama": _case("llama-tiny", "float32", 1),
    "llama-untied": _case("llama-tiny", "bfloat16", 2, tie_word_embeddings=False, num_kv_heads=4),
    # a low theta and few positions: frequencies of all three ranges of the scaling
    "llama3": _case(
        "llama3-tiny", "float32", 3, rope_theta=100.0, rope_scaling=Llama3Scaling(4.0, 1.0, 4.0, 28)
    ),
    "mistral": _case("mistral-tiny", "float16", 4),
    "qwen2": _case("qwen2-tiny", "bfloat16", 5),
    "qwen2-untied": _case("qwen2-tiny", "float32", 6, tie_word_embeddings=False),
    "qwen3": _case("qwen3-tiny", "float32", 7),
    "qwen3-untied": _case("qwen3-tiny", "bfloat16", 8, tie_word_embeddings=False),
    "q8": _case("llama-tiny", "float32", 9, hidden_size=64, intermediate_size=96, num_heads=4, head_dim=16),
}


def tokenizer(folder: Path) -> Tokenizer:
    """A byte-level tokenizer of its own, with the special tokens of a chat model, in a folder."""
    return train_tokenizer(TEXT * 3, 300, folder, special_tokens=["<|im_start|>", "<|im_end|>"])


def weights(case: Case) -> dict[str, np.ndarray]:
    """Random weights: every bias and norm away from its usual value; large enough that attention is uneven."""
    layout = Layout(case.cfg)
    host = np.zeros(layout.size, np.float32)
    layout.randomise(host, case.seed, std=0.2)
    return layout.named(host)


def write(case: Case, folder: Path) -> None:
    """The case as a Hugging Face folder, as somebody else could have published it."""
    tok = tokenizer(folder.parent / "tokenizer")
    ids = {t["content"]: t["id"] for t in json.loads(tok.json)["added_tokens"]}
    config = {
        **to_hf(case.cfg),
        "torch_dtype": case.dtype,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "initializer_range": 0.02,
        "use_cache": True,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 64,
        "chat_template": TEMPLATE,
    }
    generation = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "eos_token_id": config["eos_token_id"]}
    texts = {
        "config.json": json.dumps(config, indent=1) + "\n",
        "generation_config.json": json.dumps(generation),
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=4),
    }
    write_hf(folder, case.cfg, weights(case), case.dtype, 50_000, tok.json, texts)
