"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases of q, k and v."""

from __future__ import annotations

from ..spec import LayerSpec
from .family import DEFAULTS, WINDOW_DEFAULTS, WINDOW_KEYS, Family, window_on_upper_layers, write_window

FAMILY = Family(
    "Qwen2ForCausalLM",
    LayerSpec(qkv_bias=True),
    read=window_on_upper_layers,
    write=write_window,
    keys=WINDOW_KEYS,
    defaults=DEFAULTS | WINDOW_DEFAULTS,
)
