"""Llama (Touvron et al. 2023): RMSNorm before each branch, rotary embedding, SwiGLU."""

from __future__ import annotations

from .family import Family

FAMILY = Family(
    "LlamaForCausalLM",
    write=lambda c: {"attention_bias": False, "mlp_bias": False},
    kv_heads_follow=True,
)
