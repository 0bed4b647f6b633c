"""Models and tokenizers for GGUF files that llama.cpp itself opened: tests/golden/llama-cpp.json has its logits and ids.

The files are the same wherever they are made; `fingerprint` says so, and so that the record is of the file a test writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

import interop_cases
from apr.checkpoints.gguf import package, write_gguf
from apr.checkpoints.gguf_vocab import RULES, vocabulary_keys
from apr.model.config import ModelConfig
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.model.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling
from apr.tokenizer.vocab_format import FALLBACK_BYTES, SPACE_MARK

VOCAB, POSITIONS = 61, 64
KEPT = (0, 5, -1)  # positions whose logits are recorded
IDS = np.random.Generator(np.random.PCG64(11)).integers(0, VOCAB, POSITIONS)
CLOSE = 1e-4  # of the largest logit: float32, two programs that add up in other orders


def _model(preset: str, **change: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "rope_theta": 100.0}
    return dataclasses.replace(PRESETS[f"{preset}-tiny"], **{**sizes, **change})


_SMOLLM3: dict[str, Any] = {
    "num_layers": 5, "no_rope_layers": (3,), "sliding_window": 0, "full_attention_layers": (),
}  # fmt: skip
MODELS = {
    "llama": _model("llama"),
    "llama, heads wider than hidden_size": _model("llama", head_dim=16, tie_word_embeddings=False),
    "llama, linear": _model("llama", rope_scaling=LinearScaling(4.0)),
    "llama, llama3": _model("llama", rope_scaling=Llama3Scaling(4.0, 1.0, 4.0, 28)),
    "llama, yarn": _model("llama", rope_scaling=YarnScaling(4.0, 28)),
    "llama, yarn of the same pairs": _model("llama", rope_scaling=YarnScaling(3.0, 28, 30.0, 0.98)),
    "mistral, window": _model("mistral", sliding_window=37),
    "qwen2": _model("qwen2", rope_theta=1e6),
    "qwen2, yarn, mscale": _model(
        "qwen2", rope_scaling=YarnScaling(3.0, 28, mscale=0.707, mscale_all_dim=1.2)
    ),
    "qwen3, yarn, attention_factor": _model("qwen3", rope_scaling=YarnScaling(3.0, 28, attention_factor=1.3)),
    "olmo2": _model("olmo2", head_dim=10),
    "olmo2, one key head": _model("olmo2", head_dim=10, num_kv_heads=1, rope_scaling=LinearScaling(2.0)),
    "smollm3": _model("smollm3", **_SMOLLM3),
    "smollm3, yarn, own head": _model(
        "smollm3", **_SMOLLM3, tie_word_embeddings=False, rope_scaling=YarnScaling(4.0, 28)
    ),
}


def weights(name: str) -> dict[str, np.ndarray]:
    """Draw weights of a model, every bias and norm away from its usual value."""
    layout = Layout(MODELS[name])
    host = np.zeros(layout.size, np.float32)
    layout.randomise(host, sum(map(ord, name)), std=0.2)
    return layout.named(host)


def ids_of(name: str) -> np.ndarray:
    """As many ids as the model computes as llama.cpp does: int64 (T,)."""
    return IDS[: MODELS[name].sliding_window or POSITIONS]


_MERGES = (
    "h e|\u2581 t|\u2581t he|i n|\u2581 a|a n|an d|\u2581 w|o r|\u2581w or|l d|\u2581wor ld|e r|r e|\u2581 \u2581"
    "|\u2581\u2581 \u2581\u2581|e l|l o|el lo|\u2581 H|\u2581H ello|in g|1 2|\u2581 1|d e|de f|n \u2581|t h|th e|l l"
    "|ll \u2581|\u2581\u2581 \u2581|\u2581\u2581\u2581 \u2581\u2581|\u2581\u2581\u2581\u2581 \u2581\u2581\u2581\u2581"
    "|\u2581\u2581\u2581\u2581 \u2581\u2581\u2581|\u2581\u2581\u2581\u2581\u2581\u2581\u2581\u2581 \u2581\u2581\u2581\u2581"
)
PUBLISHED = "llama, one score for runs of spaces"  # as of Llama 2 and Mistral, whose tokens of spaces alone all have -1e9
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEHKLRSTX0123456789.,:;'!?()_\u2581\u00e9\u4e2d"


def _sentencepiece(prefix: bool) -> dict[str, Any]:
    """As Llama 2 (prefix) and as Gemma: merges over the whole text, bytes for what has no piece."""
    merges = [m.split(" ") for m in _MERGES.split("|")]
    made = dict.fromkeys(["<unk>", *FALLBACK_BYTES, *_LETTERS, *(a + b for a, b in merges)])
    # llama.cpp has no merges, and joins any two tokens whose text is a token; the leftmost of those of one score.
    splits = [[t[:at], t[at:]] for t in made if len(t) > 1 and t[0] != "<" for at in range(1, len(t))]
    order = {t: i for i, t in enumerate(made)}
    put = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    first = [{"type": "Prepend", "prepend": SPACE_MARK}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": 0, "content": "<unk>", **flags},
            *({"id": len(made) + i, "content": t, **flags} for i, t in enumerate(("</s>", "<|im_start|>"))),
        ],
        "normalizer": {"type": "Sequence", "normalizers": [*first, put]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": order,
            "merges": sorted(([a, b] for a, b in splits if a in order and b in order),
                             key=lambda m: (order[m[0] + m[1]], -len(m[0]))),
        },
    }  # fmt: skip


def tokenizers(folder: Path) -> dict[str, str]:
    """Texts of tokenizer.json by name: the rules of llama.cpp that apr names, over one vocabulary, and SentencePiece."""
    base = json.loads(interop_cases.tokenizer(folder).json)
    out = {}
    for rule, steps in RULES.items():
        model = {**base["model"], "ignore_merges": rule == "llama-bpe"}
        normal = {**steps, "normalizer": None, "post_processor": None}
        out[rule] = json.dumps({**base, **normal, "model": model})
    for prefix in (True, False):
        out["llama" if prefix else "llama, no space before"] = json.dumps(_sentencepiece(prefix))
    out[PUBLISHED] = out["llama"]
    return out


def vocabulary(name: str, text: str) -> dict[str, Any]:
    """Make the keys of a tokenizer; of PUBLISHED with scores that no tokenizer.json has."""
    fields = json.loads(text)
    ids = [*fields["model"]["vocab"].values(), *(t["id"] for t in fields["added_tokens"])]
    keys = vocabulary_keys(text, name, max(ids) + 1, None)
    if name == PUBLISHED:
        rows = zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"], strict=True)
        keys["tokenizer.ggml.scores"] = [-1e9 if set(t) == {SPACE_MARK} else score for t, score in rows]
    return keys


TEXTS = (
    "Hello world", " Hello", "  Hello,  world   ", "\n", " ", "a\n\n \n  b\r\n\tc", "don't WE'LL they'Re 's",
    "12 1234 1234567 3.14",
    "\u0661\u0662\u0663 \u2167 \u00bd \u4e00\u4e8c", "\u4e2d\u6587\uff0c\u6d4b\u8bd5\u3002\u65e5\u672c\u8a9e",
    "\u0939\u093f\u0928\u094d\u0926\u0940",
    "Caf\u00e9 e\u0301 \u212b \ufb01", "\U0001f600\U0001f44d\U0001f3fd\U0001f1e9\U0001f1ea", "\u00a0x\u3000y\u2028z\u0085\u200b",
    "\x00\x01\x1c\x7f", "\u2581 a\u2581b \u0120 \u010a", "def f(x):\n    return x**2  # the end\n\n\nif  a!=b:\n\tpass",
    "!!!??..., --== #$%^&*()[]{}", "http://a.example/b?c=d&e=f", "__init__ snake_case CamelCase", "''''' '' x'y", "x    y     z",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>", "a<|im_start|> b</s>c",
    *("x" + " " * n + "y" for n in (3, 5, 6, 7, 10, 11, 17, 25)), "</s", "\u02bcs it\u2019s \u01c5 \u00aa",
)  # fmt: skip


def fingerprint(path: Path) -> str:
    """Hash what llama.cpp reads of a file: tensors, and keys but apr's own and the name."""
    reader, sha = package().GGUFReader(path), hashlib.sha256()
    for t in reader.tensors:
        sha.update(f"{t.name} {t.tensor_type.name} {[int(n) for n in t.shape]}".encode() + t.data.tobytes())
    keys = {
        n: f.contents() for n, f in reader.fields.items() if not n.startswith(("GGUF.", "apr.", "general."))
    }
    sha.update(json.dumps(keys, sort_keys=True).encode())
    return sha.hexdigest()


def write_model(name: str, path: Path) -> None:
    """Write a model of MODELS as a float32 GGUF file without a tokenizer."""
    write_gguf(path, MODELS[name], weights(name), "float32", name="case")


def write_vocabulary(keys: dict[str, Any], path: Path) -> None:
    """Write a GGUF file of a tokenizer's keys and the smallest model."""
    size = len(keys["tokenizer.ggml.tokens"])
    cfg = dataclasses.replace(
        PRESETS["llama-tiny"], vocab_size=size, hidden_size=4, intermediate_size=4, num_layers=1, num_heads=1,
        num_kv_heads=1, head_dim=4,
    )  # fmt: skip
    layout = Layout(cfg)
    write_gguf(path, cfg, layout.named(np.zeros(layout.size, np.float32)), "float32", keys, "case")
