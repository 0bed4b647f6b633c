"""Family: the block of an architecture, and the keys of config.json that tell its models apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ..config import ModelConfig
from ..hf_keys import HfKeys
from ..spec import LayerSpec

SLIDING, FULL = "sliding_attention", "full_attention"


def layer_types(keys: HfKeys, layers: int, kinds: tuple[str, ...], default: list[str]) -> list[str]:
    """The kind of attention of each layer: `layer_types` of config.json, one of `kinds` each, or the default."""
    return keys.per_layer("layer_types", layers, kinds) or default


def no_window(keys: HfKeys, layers: int) -> dict[str, Any]:
    """Read a family without sliding windows: no field."""
    layer_types(keys, layers, (FULL,), [])
    return {}


def window_by_layer(keys: HfKeys, layers: int, default: Callable[[], list[str]]) -> dict[str, Any]:
    """Read a family with `use_sliding_window`: the layers of type SLIDING have the window.

    default() gives the types where config.json has no `layer_types`.
    """
    if not keys.flag("use_sliding_window") or (
        "sliding_window" in {**keys.defaults, **keys.d} and keys.get("sliding_window") is None
    ):
        return no_window(keys, layers)
    window = keys.number("sliding_window")
    types = layer_types(keys, layers, (SLIDING, FULL), []) or default()
    full = tuple(i for i, t in enumerate(types) if t == FULL)
    if len(full) == layers:
        return {}
    return {"sliding_window": window, "full_attention_layers": full}


def window_on_upper_layers(keys: HfKeys, layers: int) -> dict[str, Any]:
    """Read a family whose window starts at layer `max_window_layers`."""

    def default() -> list[str]:
        first = keys.number("max_window_layers", zero=True)
        return [FULL if i < first else SLIDING for i in range(layers)]

    return window_by_layer(keys, layers, default)


def write_window(c: ModelConfig) -> dict[str, Any]:
    """Write the keys of `window_by_layer`."""
    if not c.sliding_window:
        return {"use_sliding_window": False}
    types = [FULL if i in c.full_attention_layers else SLIDING for i in range(c.num_layers)]
    return {"use_sliding_window": True, "sliding_window": c.sliding_window, "layer_types": types}


LLAMA = LayerSpec()
# what transformers takes for a key that is missing, where all classes agree; sizes have no default here
DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
WINDOW_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28}
WINDOW_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})


@dataclass(frozen=True)
class Family:
    """A row of FAMILIES.

    architecture       the name in `architectures` of config.json
    block              parts of every layer, but for what a config says of single layers
    read               fields of ModelConfig from keys of config.json, given the number of layers
    write              keys of config.json, which `read` and transformers read back
    keys               keys of config.json that `read` looks at, or that change nothing in this family
    head_dim_required  config.json must have head_dim
    defaults           value of a key that is missing, as the class of transformers has it
    kv_heads_follow    without num_key_value_heads every head has its own keys and values
    """

    architecture: str
    block: LayerSpec = LLAMA
    read: Callable[[HfKeys, int], dict[str, Any]] = no_window
    write: Callable[[ModelConfig], dict[str, Any]] = lambda c: {}
    keys: frozenset[str] = frozenset()
    head_dim_required: bool = False
    defaults: dict[str, Any] = field(default_factory=lambda: DEFAULTS)
    kv_heads_follow: bool = False

    def layers(self, c: ModelConfig) -> tuple[LayerSpec, ...]:
        """Resolve the parts of every layer of a model."""
        return tuple(
            replace(
                self.block,
                window=0 if i in c.full_attention_layers else c.sliding_window,
                rope=i not in c.no_rope_layers,
                qkv_bias=c.qkv_bias,
                qk_norm=self.block.qk_norm if c.qk_norm else "",
            )
            for i in range(c.num_layers)
        )
