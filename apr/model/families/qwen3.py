"""Qwen3 (Yang et al. 2025): Llama with an RMSNorm of each head of q and k."""

from __future__ import annotations

from .family import Family

FAMILY = Family("Qwen3ForCausalLM", qk_norm=True, head_dim_required=True)
