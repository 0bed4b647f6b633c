"""OLMo 2 (Walsh et al. 2024, section 3): RMSNorm behind each branch and none before; q and k normalised over all heads."""

from __future__ import annotations

from ..spec import LayerSpec
from .family import DEFAULTS, Family

FAMILY = Family(
    "Olmo2ForCausalLM",
    LayerSpec(qk_norm="all", attn_norm=False, attn_post_norm=True, mlp_norm=False, mlp_post_norm=True),
    write=lambda c: {"attention_bias": False, "pad_token_id": None},
    defaults=DEFAULTS | {"rms_norm_eps": 1e-5},
    kv_heads_follow=True,
)
