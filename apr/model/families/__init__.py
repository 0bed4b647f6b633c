"""The families apr computes, one file each; FAMILIES has them by the `model_type` of config.json."""

from __future__ import annotations

from . import llama, mistral, qwen2, qwen3
from .family import Family

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
}
