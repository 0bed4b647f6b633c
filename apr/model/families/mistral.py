"""Mistral (Jiang et al. 2023): Llama with a sliding window on every layer."""

from __future__ import annotations

from .family import Family

FAMILY = Family("MistralForCausalLM", window=True)
