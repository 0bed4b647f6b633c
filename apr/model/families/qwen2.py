"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases of q, k and v."""

from __future__ import annotations

from .family import Family

FAMILY = Family("Qwen2ForCausalLM", qkv_bias=True)
