"""Read what a config.json says a second time, as the classes of transformers have it, and compare it with what was read.

What a key means, and what its absence means, stands here apart from the families: a default of another class, a window or a
rotary embedding that begins a layer late would train a model without a word that transformers computes otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..common.errors import AprError
from .config import ModelConfig
from .families import layers_of

SLIDING = "sliding_attention"
# Defaults of the class of each model_type: (rms_norm_eps, rope_theta, tie_word_embeddings, sliding_window).
CLASSES: dict[str, tuple[float, float, bool, int | None]] = {
    "llama": (1e-6, 10000.0, False, None),
    "mistral": (1e-6, 10000.0, False, 4096),
    "olmo2": (1e-5, 10000.0, False, None),
    "qwen2": (1e-6, 10000.0, False, 4096),
    "qwen3": (1e-6, 10000.0, False, 4096),
    "smollm3": (1e-6, 2000000.0, True, None),
}
# Layers with a window begin at this one, and every so many layers one has no rotary embedding, where no key says so.
MAX_WINDOW_LAYERS, NO_ROPE_INTERVAL = 28, 4


def check_again(d: Mapping[str, Any], cfg: ModelConfig, source: str) -> None:
    """Raise AprError for a configuration that is not what its config.json says."""
    for name, got, want in _rows(d, cfg):
        if got != want:
            raise AprError(
                f"{source}: {name} was read as {got!r} and, a second time, as {want!r}: a fault of apr; please report it"
            )


def _rows(d: Mapping[str, Any], c: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, as read, as the file says)."""
    epsilon, theta, is_tied, _ = CLASSES[c.family]
    heads, layers = d["num_attention_heads"], d["num_hidden_layers"]
    rope = {**(d.get("rope_parameters") or {}), **(d.get("rope_scaling") or {})}
    yield "rms_norm_eps", c.rms_norm_eps, d.get("rms_norm_eps", epsilon)
    yield "rope_theta", c.rope_theta, d.get("rope_theta", rope.get("rope_theta", theta))
    yield "tie_word_embeddings", c.tie_word_embeddings, d.get("tie_word_embeddings", is_tied)
    yield "head_dim", c.head_dim, d.get("head_dim") or d["hidden_size"] // heads
    yield "num_key_value_heads", c.num_kv_heads, d.get("num_key_value_heads") or heads
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
    ):
        yield key, getattr(c, key), d[key]
    parts, turned = layers_of(c), _turned(d, c.family)
    yield "number of layers", len(parts), layers
    yield "windows of the layers", [x.window for x in parts], _windows(d, c.family, turned)
    yield "layers with rotary embedding", [int(x.rope) for x in parts], turned
    yield "biases of q, k and v", {x.qkv_bias for x in parts}, {c.family == "qwen2"}
    kind = {"qwen3": "head", "olmo2": "all"}.get(c.family, "")
    yield "norms of q and k", {x.qk_norm for x in parts}, {kind}
    if c.rope_scaling is not None:
        yield "rope_type", c.rope_scaling.rope_type, rope.get("rope_type", rope.get("type"))
        for key, value in rope.items():
            if value is not None and hasattr(c.rope_scaling, key) and key != "rope_type":
                yield f"rope_scaling.{key}", getattr(c.rope_scaling, key), value


def _turned(d: Mapping[str, Any], kind: str) -> list[int]:
    """Tell which layers have rotary embedding: 1, or 0."""
    layers = d["num_hidden_layers"]
    if kind != "smollm3":
        return [1] * layers
    if d.get("no_rope_layers") is not None:
        return [*d["no_rope_layers"]]
    every = d.get("no_rope_layer_interval", NO_ROPE_INTERVAL)
    return [0 if n % every == 0 else 1 for n in range(1, layers + 1)]


def _windows(d: Mapping[str, Any], kind: str, turned: list[int]) -> list[int]:
    """List the window of each layer, 0 for none."""
    layers, width = d["num_hidden_layers"], d.get("sliding_window", CLASSES[kind][3])
    if kind in ("llama", "olmo2") or width is None:
        return [0] * layers
    if kind == "mistral":
        return [width] * layers
    if not d.get("use_sliding_window"):
        return [0] * layers
    types = d.get("layer_types")
    if types is not None:
        return [width if x == SLIDING else 0 for x in types]
    if kind == "smollm3":
        return [0 if x else width for x in turned]
    first = d.get("max_window_layers", MAX_WINDOW_LAYERS)
    return [width if i >= first else 0 for i in range(layers)]
