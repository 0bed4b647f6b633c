"""LayerSpec: the parts of a block, as data that parameters, buffers, the two passes, costs and file formats read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSpec:
    """Parts of one block, x + post(attention(pre(x))) and then x + post(mlp(pre(x))); the defaults are Llama's.

    window          keys a query sees, itself included; 0: all before it
    rope            queries and keys are turned by the rope table
    qkv_bias        biases of q, k and v
    qk_norm         "": none; "head": RMSNorm of each head of q and k; "all": one over all heads of q, one over those of k
    attn_norm       RMSNorm before attention
    attn_post_norm  RMSNorm behind attention, before its result joins the residual stream
    mlp_norm        RMSNorm before the MLP
    mlp_post_norm   RMSNorm behind the MLP, before its result joins the residual stream
    """

    window: int = 0
    rope: bool = True
    qkv_bias: bool = False
    qk_norm: str = ""
    attn_norm: bool = True
    attn_post_norm: bool = False
    mlp_norm: bool = True
    mlp_post_norm: bool = False
