"""Qwen3 (Yang et al. 2025): Llama with an RMSNorm of each head of q and k."""

from __future__ import annotations

from ..spec import LayerSpec
from .family import DEFAULTS, WINDOW_DEFAULTS, WINDOW_KEYS, Family, window_on_upper_layers, write_window

FAMILY = Family(
    "Qwen3ForCausalLM",
    LayerSpec(qk_norm="head"),
    read=window_on_upper_layers,
    write=lambda c: {"attention_bias": False, **write_window(c)},
    keys=WINDOW_KEYS,
    defaults=DEFAULTS | WINDOW_DEFAULTS,
    head_dim_required=True,
)
