"""What the tests of fine-tuning and the tool that makes their golden files share."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from apr.checkpoints.peft_write import write_adapter
from apr.model.hf_config import from_hf
from apr.model.lora import LINEAR, AdapterLayout, LoraConfig

CONVERSATIONS = [
    [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "The capital of France?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "And of Japan?"},
        {"role": "assistant", "content": "Tokyo"},
    ],
    [
        {"role": "user", "content": "Write a loop.\nIn Python, please."},
        {"role": "assistant", "content": "for i in range(3):\n    print(i)\n\nThat is all."},
        {"role": "user", "content": "Thanks"},
    ],
    [
        {"role": "user", "content": "Grüße! 今日は 🙂"},
        {"role": "assistant", "content": "Schöne Grüße zurück 🙂👍🏽"},
        {"role": "user", "content": "é, c'est tout"},
        {"role": "assistant", "content": "d'accord \u2013 à bientôt"},
    ],
    [{"role": "user", "content": "  spaces  "}, {"role": "assistant", "content": "1234567 words, and more"}],
]
OWN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# What makes a template say which part is the answer: text in it, and the text that takes its place. The answer is what is
# generated behind the generation prompt, up to the token that ends the turn.
MARKED = {
    "own": [
        (
            "{{ m.content }}<|end|>\n",
            "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}"
            "{{ m.content }}<|end|>{% endif %}{{ '\\n' }}",
        )
    ],
    "qwen2.5": [
        (
            "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}",
            "{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.role == 'assistant' %}{%- generation %}"
            "{{- message.content + '<|im_end|>' }}{%- endgeneration %}{%- else %}{{- message.content + '<|im_end|>' }}"
            "{%- endif %}{{- '\\n' }}",
        )
    ],
    "llama3": [
        (
            "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
            "+ message['content'] | trim + '<|eot_id|>' }}",
            "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}{%- if message['role'] == 'assistant' %}"
            "{%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}{%- else %}"
            "{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}",
        )
    ],
}
LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def random_talks(count: int, seed: int) -> list[list[dict[str, str]]]:
    """Draw conversations of one to four turns: white space at edges, several scripts, code, thoughts, system prompts."""
    rng = random.Random(seed)
    words = [
        "alpha",
        "beta",
        "the",
        "of",
        "12",
        "3.5",
        "\n",
        "def",
        "f(x):",
        "\u00e9",
        "\u65e5\u672c",
        "\U0001f642",
    ]
    words += [",", ".", "!", "--", "\t"]

    def text() -> str:
        inner = " ".join(rng.choice(words) for _ in range(rng.randrange(1, 14)))
        return rng.choice(["", " ", "\n"]) + inner + "x" + rng.choice(["", " ", "\n", "\n\n"])

    def talk() -> list[dict[str, str]]:
        out = [{"role": "system", "content": text()}] if rng.random() < 0.3 else []
        for _ in range(rng.randrange(1, 5)):
            thought = f"<think>\n{text()}\n</think>\n\n" if rng.random() < 0.2 else ""
            out += [{"role": "user", "content": text()}, {"role": "assistant", "content": thought + text()}]
        return out + ([{"role": "user", "content": "bye"}] if rng.random() < 0.15 else [])

    return [talk() for _ in range(count)]


def special_in(template: str) -> list[str]:
    """The special tokens that a chat template writes, and the beginning of a text."""
    return sorted({"<bos>", *re.findall(r"<\|[a-zA-Z_]+\|>|<(?:start|end)_of_turn>", template)})


def own_tokenizer(more: Sequence[str] = ()) -> str:
    """A tokenizer.json: bytes, a few merges, the special tokens of OWN_TEMPLATE, and more."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("i", "n"), ("th", "e"), ("a", "n"), ("Ġ", "the"), ("Ċ", "Ċ"), ("Ġ", "Ġ")]
    words = [*letters, *("".join(m) for m in merges)]
    engine = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    special = ("<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>")
    special += tuple(t for t in more if t not in special)
    engine.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return engine.to_str()


def llama_tokenizer(qwen: str) -> str:
    """Qwen2's tokenizer.json with the special tokens that Llama 3's template writes."""
    engine = Tokenizer.from_str(qwen)
    engine.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in LLAMA_TOKENS])
    return engine.to_str()


def our_adapter(folder: Path, config: str) -> tuple[AdapterLayout, np.ndarray]:
    """An adapter written by apr for a model of this config.json; its layout and values."""
    layout = AdapterLayout(from_hf(json.loads(config), "config"), LoraConfig(3, 7.5, tuple(LINEAR)))
    flat = np.zeros(layout.size, np.float32)
    layout.init(flat, 5)
    rng = np.random.Generator(np.random.PCG64(6))
    for s in layout.in_order():
        if s.param.init == "zeros":
            flat[s.offset : s.offset + s.size] = 0.05 * rng.standard_normal(s.size, np.float32)
    write_adapter(folder, layout, flat, "base")
    return layout, flat


# what is adapted and trained whole, by case
PUBLISHED = {
    "embed": (("wq", "embed", "head"), ()),
    "embed-tied": (("wq", "embed"), ()),
    "whole": (("wq",), ("embed_tokens", "lm_head", "norm")),
    "whole-tied": (("wq",), ("embed_tokens",)),
}


def published_adapter(
    folder: Path, config: str, case: str, base: dict[str, np.ndarray]
) -> tuple[AdapterLayout, np.ndarray]:
    """An adapter with more than factors of blocks, written by apr; its layout and values."""
    targets, saved = PUBLISHED[case]
    layout = AdapterLayout(from_hf(json.loads(config), "config"), LoraConfig(3, 6.0, targets, saved=saved))
    flat, rng = np.zeros(layout.size, np.float32), np.random.Generator(np.random.PCG64(7))
    layout.init(flat, 5, base.__getitem__)
    for s in layout.in_order():
        if s.param.init in ("zeros", "base"):
            flat[s.offset : s.offset + s.size] += 0.05 * rng.standard_normal(s.size, np.float32)
    write_adapter(folder, layout, flat, "base")
    return layout, flat
