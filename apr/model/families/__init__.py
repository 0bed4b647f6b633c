"""The families apr computes, one file each, by the `model_type` of config.json."""

from __future__ import annotations

from functools import cache

from ..config import ModelConfig
from ..spec import LayerSpec
from . import llama, mistral, olmo2, qwen2, qwen3, smollm3
from .family import Family

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "olmo2": olmo2.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "smollm3": smollm3.FAMILY,
}


@cache
def layers_of(c: ModelConfig) -> tuple[LayerSpec, ...]:
    """Parts of every layer of a model, resolved by its family."""
    return FAMILIES[c.family].layers(c)
