"""SmolLM3 (Bakouch et al. 2025): Llama with layers, every fourth, that have no rotary embedding (Yang et al. 2025)."""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig
from ..hf_keys import HfKeys
from .family import DEFAULTS, FULL, SLIDING, WINDOW_KEYS, Family, window_by_layer, write_window


def read(keys: HfKeys, layers: int) -> dict[str, Any]:
    """Read `no_rope_layers` (1: the layer has rotary embedding), or else `no_rope_layer_interval`."""
    turned = keys.per_layer("no_rope_layers", layers, (0, 1))
    if turned is None:
        every = keys.number("no_rope_layer_interval")
        turned = [int((i + 1) % every != 0) for i in range(layers)]
    without = tuple(i for i, rope in enumerate(turned) if not rope)
    fields = window_by_layer(keys, layers, lambda: [FULL if rope else SLIDING for rope in turned])
    return {"no_rope_layers": without, **fields}


def write(c: ModelConfig) -> dict[str, Any]:
    """Write the keys of `read`."""
    turned = [int(i not in c.no_rope_layers) for i in range(c.num_layers)]
    plain = {"attention_bias": False, "mlp_bias": False, "pad_token_id": None}
    return {**plain, "no_rope_layers": turned, **write_window(c)}


FAMILY = Family(
    "SmolLM3ForCausalLM",
    read=read,
    write=write,
    keys=WINDOW_KEYS | {"no_rope_layers", "no_rope_layer_interval"},
    defaults=DEFAULTS
    | {"rope_theta": 2e6, "tie_word_embeddings": True, "sliding_window": None, "no_rope_layer_interval": 4},
)
