"""Mistral (Jiang et al. 2023): Llama with a sliding window on every layer."""

from __future__ import annotations

from typing import Any

from ..hf_keys import HfKeys
from .family import DEFAULTS, FULL, SLIDING, Family, layer_types


def read(keys: HfKeys, layers: int) -> dict[str, Any]:
    """Read `sliding_window`, which null turns off; a file without the key has the window of the class."""
    window = 0 if keys.get("sliding_window") is None else keys.number("sliding_window")
    layer_types(keys, layers, (SLIDING if window else FULL,), [])
    return {"sliding_window": window}


FAMILY = Family(
    "MistralForCausalLM",
    read=read,
    write=lambda c: {"sliding_window": c.sliding_window or None},
    keys=frozenset({"sliding_window"}),
    defaults=DEFAULTS | {"sliding_window": 4096},
)
