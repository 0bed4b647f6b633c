"""Sizes and switches of a decoder, as data."""

from __future__ import annotations

from dataclasses import dataclass

from .rope_scaling import RopeScaling


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder. Letters: V, C, F, L, H, K, D are the first seven sizes."""

    family: str  # a key of families.FAMILIES
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool  # the output head is the embedding
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 0  # keys a query sees, itself included; 0 = all before it
    full_attention_layers: tuple[int, ...] = ()  # numbers of the layers without the window
    no_rope_layers: tuple[int, ...] = ()  # numbers of the layers without rotary embedding

    @property
    def letters(self) -> dict[str, int]:
        """Sizes by the letters of docstrings and of the parameter table."""
        return dict(
            V=self.vocab_size,
            C=self.hidden_size,
            F=self.intermediate_size,
            L=self.num_layers,
            H=self.num_heads,
            K=self.num_kv_heads,
            D=self.head_dim,
        )
