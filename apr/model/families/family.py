"""Family: what the `model_type` of a config.json implies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Switches of a family, and which keys of its config.json may be missing."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    window: bool = False  # honours `sliding_window` on every layer
    head_dim_required: bool = False
