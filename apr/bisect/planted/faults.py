"""The fault catalogue: what a trainer gets wrong, each a small patch to a sound side, and what bisect must say of it.

Those of attention, RoPE and the gate are the same in forward and backward, as they would be in life, so that a
numeric gradient cannot see them. `apr bisect --catalogue` plants them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np

from ...backends.contract import BF16
from ...data.batches import Permutation, Windows
from ...model.config import ModelConfig
from ...model.families import layers_of
from ..makers import span
from .fault import (
    ADAMW,
    BACKWARD,
    EVERY,
    LAYOUT,
    REPEAT,
    TRUTH,
    VALUES,
    Ops,
    Weights,
    believed,
    changed,
    dense,
    entered,
    fault,
    loaded,
    none,
    read,
    rolled,
    times,
)

ATTENTION = "attention_fwd attention_bwd"


@fault(r"forward linear_fwd 0\.qkv", EVERY, lambda c: c.qkv_bias)
def bias_dropped(be: Any) -> Ops:
    """The biases of q, k and v are not added."""
    return changed(be, "linear_fwd", b=none)


@fault(r"backward linear_bwd grad\.\d+\.bqkv", EVERY, lambda c: c.qkv_bias)
def bias_gradient_missing(be: Any) -> Ops:
    """The biases of q, k and v get no gradient."""
    return changed(be, "linear_bwd", db=none)


@fault(r"forward rope 0\.rope", VALUES)
def rope_pairs_neighbours(be: Any) -> Ops:
    """Pairs (x[2i], x[2i+1]) instead of (x[i], x[i + D/2])."""

    def rope(x: Any, cos: Any, sin: Any, sign: int) -> None:
        order = [*range(0, x.shape[-1], 2), *range(1, x.shape[-1], 2)]
        z = np.ascontiguousarray(x[..., order])
        be.rope(z, cos, sin, sign)
        x[..., order] = z

    return dict(rope=rope)


@fault(r"forward rope 0\.rope", VALUES)
def rope_off_by_a_thousandth(be: Any) -> Ops:
    """sin is 0.1 % too large."""
    return changed(be, "rope", sin=lambda sin: sin * sin.dtype.type(1.001))


@fault(r"backward rope \d+\.d_rope", EVERY)
def rope_backward_missing(be: Any) -> Ops:
    """The gradient is not turned back."""

    def rope(x: Any, cos: Any, sin: Any, sign: int) -> None:
        if sign > 0:
            be.rope(x, cos, sin, sign)

    return dict(rope=rope)


@fault(
    r"configuration config rope_scaling",
    VALUES,
    lambda c: c.rope_scaling is not None,
    lambda c: replace(c, rope_scaling=None),
)
def llama3_scaling_dropped(be: Any) -> Ops:
    """rope_scaling of Llama 3 is not honoured."""
    return {}


def _other_keys(be: Any, order: Callable[[int], list[int]]) -> Ops:
    """Attention over the keys order(S) instead of 0 .. S-1."""

    def attention_fwd(y: Any, lse: Any, q: Any, k: Any, v: Any, *rest: Any) -> None:
        seen = order(k.shape[1])
        be.attention_fwd(y, lse, q, k[:, seen], v[:, seen], *rest)

    def attention_bwd(
        dq: Any, dk: Any, dv: Any, dy: Any, y: Any, lse: Any, q: Any, k: Any, v: Any, *rest: Any
    ) -> None:
        seen = order(k.shape[1])
        k, v = k[:, seen], v[:, seen]
        dkeys, dvalues = np.zeros_like(k), np.zeros_like(v)
        be.attention_bwd(dq, dkeys, dvalues, dy, y, lse, q, k, v, *rest)
        for d, part in ((dk, dkeys), (dv, dvalues)):
            d[...] = 0
            for j, source in enumerate(seen):
                d[:, source] += part[:, j]

    return dict(attention_fwd=attention_fwd, attention_bwd=attention_bwd)


@fault(r"forward attention_fwd 0\.att", VALUES)
def mask_shows_the_next_token(be: Any) -> Ops:
    """A query sees the token after its own."""
    return _other_keys(be, lambda n: [*range(n), n - 1])  # one key more than queries: query t sees j <= t + 1


@fault(r"forward attention_fwd 0\.att", VALUES)
def mask_hides_the_token_itself(be: Any) -> Ops:
    """A query does not see its own token."""
    return _other_keys(be, lambda n: [0, *range(n - 1)])


@fault(r"forward attention_fwd 0\.att", VALUES, lambda c: c.sliding_window > 0)
def window_ignored(be: Any) -> Ops:
    """The sliding window is ignored."""
    return changed(be, ATTENTION, window=lambda window: 0)


@fault(r"forward attention_fwd 0\.att", VALUES, lambda c: c.sliding_window > 0)
def window_one_too_wide(be: Any) -> Ops:
    """A query sees one token more than its window."""
    return changed(be, ATTENTION, window=lambda window: window + 1)


@fault(r"forward attention_fwd 0\.att", VALUES, lambda c: 1 < c.num_kv_heads < c.num_heads)
def heads_interleaved(be: Any) -> Ops:
    """Query head h reads key/value head h % K instead of h // (H/K)."""

    def attention_fwd(y: Any, lse: Any, q: Any, k: Any, v: Any, *rest: Any) -> None:
        order = sorted(range(q.shape[2]), key=lambda h: h % k.shape[2])
        y_, lse_ = np.empty_like(y), np.empty_like(lse)
        be.attention_fwd(y_, lse_, q[:, :, order], k, v, *rest)
        y[:, :, order], lse[:, order] = y_, lse_

    def attention_bwd(
        dq: Any, dk: Any, dv: Any, dy: Any, y: Any, lse: Any, q: Any, k: Any, v: Any, *rest: Any
    ) -> None:
        order = sorted(range(q.shape[2]), key=lambda h: h % k.shape[2])
        dy, y, lse, q = dy[:, :, order], y[:, :, order], np.ascontiguousarray(lse[:, order]), q[:, :, order]
        dq_ = np.empty_like(q)
        be.attention_bwd(dq_, dk, dv, dy, y, lse, q, k, v, *rest)
        dq[:, :, order] = dq_

    return dict(attention_fwd=attention_fwd, attention_bwd=attention_bwd)


@fault(r"forward attention_fwd 0\.att", EVERY)
def one_head_two_percent_off(be: Any) -> Ops:
    """One head of attention is 2 % too large."""

    def attention_fwd(y: Any, *args: Any) -> None:
        be.attention_fwd(y, *args)
        y[:, :, 1] = 1.02 * y[:, :, 1].astype(np.float64)

    return dict(attention_fwd=attention_fwd)


@fault(r"forward add_rmsnorm_fwd 0\.(norm1|rstd1)", VALUES, lambda c: layers_of(c)[0].attn_norm)
def norm_eps_doubled(be: Any) -> Ops:
    """RMSNorm uses twice the epsilon that it is given."""
    return changed(be, "add_rmsnorm_fwd", eps=lambda eps: 2 * eps)


@fault(r"backward add_rmsnorm_bwd grad\.final_norm", EVERY)
def norm_weight_gradient_missing(be: Any) -> Ops:
    """The weights of norms get no gradient."""
    return changed(be, "add_rmsnorm_bwd", dw=np.zeros_like)


@fault(r"forward head_rmsnorm_fwd 0\.qk\.q", VALUES, lambda c: c.qk_norm)
def qk_norm_skipped(be: Any) -> Ops:
    """The norms of q and k are left out."""

    def head_rmsnorm_fwd(y: Any, rstd: Any, x: Any, w: Any, eps: float) -> None:
        y[...] = x

    def head_rmsnorm_bwd(dx: Any, dw: Any, dy: Any, x: Any, rstd: Any, w: Any) -> None:
        dx[...] = dy

    return dict(head_rmsnorm_fwd=head_rmsnorm_fwd, head_rmsnorm_bwd=head_rmsnorm_bwd)


def _contiguous(x: Any) -> bool:
    return bool(x.flags.c_contiguous)


@fault(r"forward head_rmsnorm_fwd 0\.post1", VALUES, lambda c: layers_of(c)[0].attn_post_norm)
def post_norm_dropped(be: Any) -> Ops:
    """The norms behind attention and the MLP are left out."""

    def head_rmsnorm_fwd(y: Any, rstd: Any, x: Any, w: Any, eps: float) -> None:
        be.head_rmsnorm_fwd(y, rstd, x, w, eps)
        if x.shape[1] == 1 and _contiguous(x):
            be.copy(y, x)

    def head_rmsnorm_bwd(dx: Any, dw: Any, dy: Any, x: Any, rstd: Any, w: Any) -> None:
        if x.shape[1] == 1 and _contiguous(x):
            be.copy(dx, dy)
        else:
            be.head_rmsnorm_bwd(dx, dw, dy, x, rstd, w)

    return dict(head_rmsnorm_fwd=head_rmsnorm_fwd, head_rmsnorm_bwd=head_rmsnorm_bwd)


@fault(r"forward head_rmsnorm_fwd 0\.qk\.q", EVERY, lambda c: layers_of(c)[0].qk_norm == "all")
def wide_norm_of_half_the_heads(be: Any) -> Ops:
    """The norm over all heads is taken over each half of them."""

    def head_rmsnorm_fwd(y: Any, rstd: Any, x: Any, w: Any, eps: float) -> None:
        middle = x.shape[2] // 2
        whole = x.shape[1] > 1 or _contiguous(x)
        for part in [slice(None)] if whole else [slice(middle), slice(middle, None)]:
            be.head_rmsnorm_fwd(y[:, :, part], rstd, x[:, :, part], w[part], eps)

    return dict(head_rmsnorm_fwd=head_rmsnorm_fwd)


@fault(
    r"configuration config no_rope_layers",
    VALUES,
    lambda c: bool(c.no_rope_layers),
    lambda c: replace(c, no_rope_layers=()),
)
def rope_on_every_layer(be: Any) -> Ops:
    """Rotary embedding turns the layers that have none."""
    return {}


@fault(
    r"configuration config full_attention_layers",
    VALUES,
    lambda c: bool(c.full_attention_layers),
    lambda c: replace(c, full_attention_layers=c.full_attention_layers[1:]),
)
def window_on_a_full_layer(be: Any) -> Ops:
    """A layer that sees all tokens before it gets the window of the others."""
    return {}


@fault(r"forward swiglu_fwd 0\.act", VALUES)
def gate_and_up_swapped(be: Any) -> Ops:
    """Gate and up change places."""

    def swap(x: Any) -> Any:
        return np.roll(x, x.shape[-1] // 2, axis=-1)

    def swiglu_fwd(y: Any, gu: Any) -> None:
        be.swiglu_fwd(y, swap(gu))

    def swiglu_bwd(dgu: Any, dy: Any, gu: Any) -> None:
        be.swiglu_bwd(dgu, dy, swap(gu))
        dgu[...] = swap(dgu)

    return dict(swiglu_fwd=swiglu_fwd, swiglu_bwd=swiglu_bwd)


@fault(r"backward embedding_bwd grad\.embed", EVERY)
def embedding_gradient_missing(be: Any) -> Ops:
    """The embedding gets no gradient."""
    return dict(embedding_bwd=lambda dw, dy, ids: None)


@fault(r"backward embedding_bwd grad\.embed", EVERY, lambda c: c.tie_word_embeddings)
def tied_gradient_counted_once(be: Any) -> Ops:
    """The embedding overwrites what the head, which is the same tensor, had added."""

    def embedding_bwd(dw: Any, dy: Any, ids: Any) -> None:
        be.fill(dw, 0)
        be.embedding_bwd(dw, dy, ids)

    return dict(embedding_bwd=embedding_bwd)


@fault(r"loss cross_entropy d_logits", EVERY)
def gradient_summed_not_averaged(be: Any) -> Ops:
    """The gradient is that of the sum of losses, not of the mean."""
    return changed(be, "cross_entropy", scale=lambda scale: None if scale is None else 1.0)


@fault(r"loss cross_entropy loss_rows", VALUES)
def ignored_targets_counted(be: Any) -> Ops:
    """Negative targets count as id 0."""
    return changed(be, "cross_entropy", targets=lambda targets: np.maximum(targets, 0))


@fault(r"optimizer clip_factor factor", ADAMW)
def clip_skipped(be: Any) -> Ops:
    """Gradients are not clipped."""
    return dict(clip_factor=lambda factor, sum_sq, max_norm: be.fill(factor, 1))


@fault(r"optimizer adamw \w+\.model.*norm.*", ADAMW)
def decay_on_norms(be: Any) -> Ops:
    """Norms and biases are decayed too."""
    return changed(be, "adamw", decay=lambda decay: 0.1)


@fault(r"optimizer adamw w\..*", ADAMW)
def decay_forgotten(be: Any) -> Ops:
    """No weights are decayed."""
    return changed(be, "adamw", decay=lambda decay: 0.0)


@fault(r"optimizer adamw w\..*", ADAMW)
def learning_rate_ignored(be: Any) -> Ops:
    """AdamW uses a learning rate of its own."""
    return changed(be, "adamw", lr=lambda lr: 0.01)


@fault(r"optimizer adamw w\..*", ADAMW)
def step_not_counted(be: Any) -> Ops:
    """AdamW takes each step for the first."""
    return changed(be, "adamw", step=lambda step: 1)


@fault(r"optimizer adamw w\..*", ADAMW)
def bias_correction_missing(be: Any) -> Ops:
    """AdamW uses m and v without dividing them by 1 - beta^step."""
    return changed(be, "adamw", step=lambda step: 10**9)


@fault(r"optimizer adamw [wm]\..*", ADAMW)
def first_moment_not_kept(be: Any) -> Ops:
    """AdamW takes beta1 for 0: its first moment is the last gradient."""
    return changed(be, "adamw", beta1=lambda beta1: 0.0)


@fault(r"optimizer adamw w\..*", ADAMW)
def adam_eps_too_large(be: Any) -> Ops:
    """AdamW adds 1e-3 to the root instead of 1e-8."""
    return changed(be, "adamw", eps=lambda eps: 1e-3)


@fault("optimizer clip_factor factor", ADAMW)
def clip_by_the_squared_norm(be: Any) -> Ops:
    """Clipping divides by the sum of squares instead of its root."""

    def clip_factor(factor: Any, sum_sq: Any, max_norm: float) -> None:
        squared = np.square(be.to_host(sum_sq))
        x = be.empty(1, "float64")
        be.from_host(x, squared)
        be.clip_factor(factor, x, max_norm)

    return dict(clip_factor=clip_factor)


@fault("optimizer add_sum_sq sum_sq", ADAMW)
def norm_of_half_the_gradients(be: Any) -> Ops:
    """The global norm leaves out half of the parameters."""
    return changed(be, "add_sum_sq", x=lambda x: x[: x.size // 2])


@fault("optimizer AdamW.step g", ADAMW)
def gradients_not_cleared(be: Any) -> Ops:
    """fill(g, 0) does nothing: gradients of steps pile up."""

    def fill(x: Any, value: float) -> None:
        if value != 0 or x.ndim != 1 or x.size == 1:
            be.fill(x, value)

    return dict(fill=fill)


# Weights on their way to the device


@loaded(r"upload from_host 0\.attn_norm", applies=lambda c: layers_of(c)[0].attn_norm)
def bfloat16_read_as_float16(w: Weights) -> None:
    """A norm that is stored in bfloat16 is tagged float16 at import."""
    for (_, name), x in w.items():
        if name == "attn_norm":
            x[...] = x.astype(BF16).view(np.float16).astype(x.dtype)


@loaded(r"upload from_host 1\.wo")
def matrix_transposed(w: Weights) -> None:
    """A matrix is laid down column by column."""
    x = w[1, "wo"]
    x[...] = x.T.reshape(x.shape)


@loaded(r"upload from_host 0\.bk", TRUTH, lambda c: c.qkv_bias)
def key_bias_never_loaded(w: Weights) -> None:
    """The biases of the keys stay zero."""
    for (_, name), x in w.items():
        if name == "bk":
            x[...] = 0


@loaded(r"upload from_host 0\.wgate")
def gate_and_up_loaded_the_wrong_way_round(w: Weights) -> None:
    """gate_proj and up_proj change places at import."""
    gate = w[0, "wgate"].copy()
    w[0, "wgate"][...], w[0, "wup"][...] = w[0, "wup"], gate


@loaded(r"upload from_host 1\..*")
def last_layer_not_loaded(w: Weights) -> None:
    """An error while a layer is filled is swallowed: its matrices stay zero."""
    for (layer, _), x in w.items():
        if layer == 1 and x.ndim == 2:
            x[...] = 0


@loaded(r"upload from_host 0\.wq")
def query_rows_permuted(w: Weights) -> None:
    """The rows of q_proj are in the order that GGUF files keep for pairs of neighbours."""
    x = w[0, "wq"]
    x[...] = np.concatenate([x[::2], x[1::2]])


@loaded(r"upload from_host embed")
def embedding_rows_off_by_one(w: Weights) -> None:
    """Added tokens are counted one too early: every row of the embedding is its neighbour's."""
    x = w[None, "embed"]
    x[...] = np.roll(x, 1, axis=0)


@loaded(r"upload from_host 0\.mlp_norm", applies=lambda c: layers_of(c)[0].mlp_norm)
def norm_weights_are_one_more(w: Weights) -> None:
    """A norm is read as 1 + w, as Gemma's are stored."""
    w[0, "mlp_norm"][...] += 1


@loaded(r"upload from_host 1\.wdown")
def one_weight_off(w: Weights) -> None:
    """One element of one matrix is another."""
    x = w[1, "wdown"]
    x[2, 3] += 0.5


# What a side believes


def _any(c: ModelConfig) -> bool:
    return True


believed(
    "configuration config rms_norm_eps", VALUES, lambda c: replace(c, rms_norm_eps=1e-3), _any,
    "epsilon of another family: eps is a constant of the program",
)  # fmt: skip
believed(
    "configuration config rope_theta", VALUES, lambda c: replace(c, rope_theta=c.rope_theta * 3), _any,
    "theta of another model: rope_theta is not read from config.json",
)  # fmt: skip
believed(
    "configuration config sliding_window", VALUES, lambda c: replace(c, sliding_window=0),
    lambda c: c.sliding_window > 0, "window not in the config: sliding_window is lost",
)  # fmt: skip
believed(
    "configuration config tie_word_embeddings", LAYOUT,
    lambda c: replace(c, tie_word_embeddings=not c.tie_word_embeddings), _any,
    "tie flag guessed: whether the head is the embedding is guessed, wrongly",
)  # fmt: skip
believed(
    "configuration config qkv_bias", LAYOUT, lambda c: replace(c, qkv_bias=False),
    lambda c: c.qkv_bias, "bias flag guessed: biases are allocated by the name of the architecture, in another case",
)  # fmt: skip


# More of forward


@fault(r"forward embedding_fwd hidden\.0", EVERY)
def embedding_of_the_next_id(be: Any) -> Ops:
    """The embedding looks up id + 1."""

    def embedding_fwd(y: Any, ids: Any, w: Any) -> None:
        be.embedding_fwd(y, (ids + 1) % w.shape[0], w)

    return dict(embedding_fwd=embedding_fwd)


@fault(r"forward add_rmsnorm_fwd 0\.norm1", EVERY)
def norm_weight_left_out(be: Any) -> Ops:
    """RMSNorm does not multiply with its weight."""

    def add_rmsnorm_fwd(res: Any, y: Any, rstd: Any, res_in: Any, delta: Any, w: Any, eps: float) -> None:
        one = be.empty(w.shape, w.dtype)
        be.fill(one, 1)
        be.add_rmsnorm_fwd(res, y, rstd, res_in, delta, one, eps)

    return dict(add_rmsnorm_fwd=add_rmsnorm_fwd)


@fault(r"forward add_rmsnorm_fwd 0\.res2", EVERY)
def residual_not_added(be: Any) -> Ops:
    """The output of a sub-layer is not added to the residual stream before the MLP."""
    first: list[int] = []

    def add_rmsnorm_fwd(res: Any, y: Any, rstd: Any, res_in: Any, delta: Any, w: Any, eps: float) -> None:
        drop = delta is not None and (not first or first[0] == span(w)[0])
        if drop and not first:
            first.append(span(w)[0])
        if drop:
            zero = be.empty(delta.shape, delta.dtype)
            be.add_rmsnorm_fwd(res, y, rstd, res_in, zero, w, eps)
        else:
            be.add_rmsnorm_fwd(res, y, rstd, res_in, delta, w, eps)

    return dict(add_rmsnorm_fwd=add_rmsnorm_fwd)


@fault(r"forward attention_fwd 0\.att", VALUES)
def scores_not_scaled(be: Any) -> Ops:
    """Scores are not divided by sqrt(D)."""

    def attention_fwd(y: Any, lse: Any, q: Any, *rest: Any) -> None:
        be.attention_fwd(y, lse, times(be, q, q.shape[-1] ** 0.5), *rest)

    def attention_bwd(dq: Any, dk: Any, dv: Any, dy: Any, y: Any, lse: Any, q: Any, *rest: Any) -> None:
        be.attention_bwd(dq, dk, dv, dy, y, lse, times(be, q, q.shape[-1] ** 0.5), *rest)
        be.copy(dq, times(be, dq, q.shape[-1] ** 0.5))

    return dict(attention_fwd=attention_fwd, attention_bwd=attention_bwd)


@fault(r"forward attention_fwd 0\.att", EVERY)
def one_position_off(be: Any) -> Ops:
    """One query in sixteen, the last of a tile, is half a percent off."""

    def attention_fwd(y: Any, *args: Any) -> None:
        be.attention_fwd(y, *args)
        last = y[:, 11::16]
        be.copy(last, times(be, last, 1.005))

    return dict(attention_fwd=attention_fwd)


@fault(r"forward linear_fwd 0\.qkv", EVERY)
def block_of_columns_zero(be: Any) -> Ops:
    """The last columns of a product are not written by its epilogue."""

    def linear_fwd(y: Any, x: Any, w: Any, b: Any) -> None:
        be.linear_fwd(y, x, w, b)
        be.fill(y[:, y.shape[1] // 4 * 4 - 4 :], 0)

    return dict(linear_fwd=linear_fwd)


@fault(r"forward linear_fwd 1\.mlp_out", EVERY)
def one_product_of_one_layer(be: Any) -> Ops:
    """Of all products only layer 1's down projection is a tenth of a percent off."""
    seen: list[int] = []

    def linear_fwd(y: Any, x: Any, w: Any, b: Any) -> None:
        be.linear_fwd(y, x, w, b)
        if span(w)[0] not in seen:
            seen.append(span(w)[0])
        if seen.index(span(w)[0]) == 7:
            be.copy(y, times(be, y, 1.001))

    return dict(linear_fwd=linear_fwd)


@fault(r"forward swiglu_fwd 0\.act", EVERY)
def tanh_for_silu(be: Any) -> Ops:
    """The gate is gelu's approximation by a sigmoid, x sigmoid(1.702 x), not silu."""

    def swiglu_fwd(y: Any, gu: Any) -> None:
        g, u = np.split(np.asarray(be.to_host(gu), np.float64), 2, -1)
        be.from_host(y, (g / (1 + np.exp(-1.702 * g)) * u).astype(np.float64))

    return dict(swiglu_fwd=swiglu_fwd)


@fault(r"forward rope 0\.rope", VALUES)
def positions_off_by_one(be: Any) -> Ops:
    """RoPE turns position t by the angle of t - 1."""
    return changed(be, "rope", cos=partial(rolled, be), sin=partial(rolled, be))


@fault(r"forward rope 0\.rope", VALUES)
def keys_not_turned(be: Any) -> Ops:
    """RoPE turns all heads but the last key head."""
    return changed(be, "rope", x=lambda x: x[:, :, :-1])


@fault(r"forward swiglu_fwd 1\.act", EVERY)
def stale_output(be: Any) -> Ops:
    """From the second call on an op does nothing: what it gives does not depend on what goes in."""
    first: list[int] = []

    def swiglu_fwd(y: Any, gu: Any) -> None:
        if not first or first[0] == span(y)[0]:
            be.swiglu_fwd(y, gu)
        first[:] = first or [span(y)[0]]

    return dict(swiglu_fwd=swiglu_fwd)


@fault(r"forward linear_fwd 0\.qkv", EVERY, lambda c: not layers_of(c)[0].attn_post_norm)
def product_adds_to_what_was_there(be: Any) -> Ops:
    """A product is called with beta = 1: it adds to what its output held."""

    def linear_fwd(y: Any, x: Any, w: Any, b: Any) -> None:
        before = np.asarray(be.to_host(y), np.float64)
        be.linear_fwd(y, x, w, b)
        be.from_host(y, before + be.to_host(y))

    return dict(linear_fwd=linear_fwd)


# More of the loss


@fault("loss cross_entropy loss_rows", VALUES)
def targets_off_by_one(be: Any) -> Ops:
    """The loss of a position is that of its neighbour's target."""
    return changed(be, "cross_entropy", targets=partial(rolled, be))


@fault("loss cross_entropy loss_rows", EVERY)
def loss_of_other_rows(be: Any) -> Ops:
    """The loss reads the logits of the row before."""

    def cross_entropy(loss: Any, logits: Any, targets: Any, *rest: Any) -> None:
        be.copy(logits, rolled(be, logits))
        be.cross_entropy(loss, logits, targets, *rest)

    return dict(cross_entropy=cross_entropy)


@fault("loss cross_entropy loss_rows", VALUES)
def end_of_the_vocabulary_left_out(be: Any) -> Ops:
    """Softmax does not sum the last ids of the vocabulary."""

    def cross_entropy(loss: Any, logits: Any, targets: Any, *rest: Any) -> None:
        be.fill(logits[:, -3:], -30)
        be.cross_entropy(loss, logits, targets, *rest)

    return dict(cross_entropy=cross_entropy)


@fault("loss cross_entropy loss_rows", EVERY)
def loss_in_bits(be: Any) -> Ops:
    """The loss is in bits where nats are asked for."""

    def cross_entropy(loss: Any, *rest: Any) -> None:
        be.cross_entropy(loss, *rest)
        be.copy(loss, times(be, loss, 1 / np.log(2)))

    return dict(cross_entropy=cross_entropy)


# More of backward


@fault(r"backward swiglu_bwd \d+\.d_gu", BACKWARD)
def derivative_of_silu_cut_short(be: Any) -> Ops:
    """The derivative of silu is taken for the sigmoid alone."""

    def swiglu_bwd(dgu: Any, dy: Any, gu: Any) -> None:
        be.swiglu_bwd(dgu, dy, gu)
        g, u = np.split(np.asarray(be.to_host(gu), np.float64), 2, -1)
        wide = np.asarray(be.to_host(dgu), np.float64)
        wide[:, : g.shape[1]] = np.asarray(be.to_host(dy), np.float64) * u / (1 + np.exp(-g))
        be.from_host(dgu, wide)

    return dict(swiglu_bwd=swiglu_bwd)


@fault(r"backward add_rmsnorm_bwd d_hidden\.\d+", BACKWARD)
def norm_backward_without_projection(be: Any) -> Ops:
    """The gradient of RMSNorm leaves out the derivative of the mean."""

    def add_rmsnorm_bwd(dres: Any, dw: Any, dy: Any, res: Any, rstd: Any, w: Any) -> None:
        wide = [np.asarray(be.to_host(x), np.float64) for x in (dres, dy, rstd, w)]
        be.add_rmsnorm_bwd(dres, dw, dy, res, rstd, w)
        be.from_host(dres, wide[0] + wide[2][:, None] * wide[1] * wide[3])

    return dict(add_rmsnorm_bwd=add_rmsnorm_bwd)


@fault(r"backward add_rmsnorm_bwd \d+\.d_res2", BACKWARD, lambda c: layers_of(c)[0].mlp_norm)
def residual_gradient_overwritten(be: Any) -> Ops:
    """The gradient of the residual stream is overwritten where it must be added to."""

    def add_rmsnorm_bwd(dres: Any, *args: Any) -> None:
        be.fill(dres, 0)
        be.add_rmsnorm_bwd(dres, *args)

    return dict(add_rmsnorm_bwd=add_rmsnorm_bwd)


@fault(r"backward attention_bwd \d+\.d_k_rope", BACKWARD, lambda c: c.num_heads > c.num_kv_heads)
def shared_heads_not_summed(be: Any) -> Ops:
    """The gradient of a key head is that of one of the query heads which share it."""

    def attention_bwd(
        dq: Any, dk: Any, dv: Any, dy: Any, y: Any, lse: Any, q: Any, k: Any, v: Any, *rest: Any
    ) -> None:
        be.attention_bwd(dq, dk, dv, dy, y, lse, q, k, v, *rest)
        heads = slice(0, q.shape[2], q.shape[2] // k.shape[2])
        other = [be.empty(x.shape, x.dtype) for x in (q[:, :, heads], k, v)]
        dy_, y_, q_ = (dense(be, x[:, :, heads]) for x in (dy, y, q))
        be.attention_bwd(*other, dy_, y_, dense(be, lse[:, heads]), q_, dense(be, k), dense(be, v), *rest)
        be.copy(dk, other[1])

    return dict(attention_bwd=attention_bwd)


@fault(r"backward linear_bwd grad\.\d+\.bqkv", BACKWARD, lambda c: c.qkv_bias)
def bias_gradient_of_one_token(be: Any) -> Ops:
    """The gradient of a bias is that of the first token, not the sum."""

    def linear_bwd(dx: Any, dw: Any, db: Any, dy: Any, x: Any, w: Any, adds: bool) -> None:
        be.linear_bwd(dx, dw, None, dy, x, w, adds)
        if db is not None:
            be.from_host(db, np.asarray(be.to_host(db), np.float64) + be.to_host(dy)[0])

    return dict(linear_bwd=linear_bwd)


@fault(r"backward embedding_bwd grad\.embed", BACKWARD)
def repeated_ids_counted_once(be: Any) -> Ops:
    """A token that occurs twice adds to its row once."""

    def embedding_bwd(dw: Any, dy: Any, ids: Any) -> None:
        host = np.asarray(be.to_host(dw), np.float64)
        host[be.to_host(ids)] += be.to_host(dy)
        be.from_host(dw, host)

    return dict(embedding_bwd=embedding_bwd)


@fault(r"loss linear_bwd grad\.(embed|head)", BACKWARD)
def weight_gradient_a_thousandth_off(be: Any) -> Ops:
    """The gradients of all matrices are a tenth of a percent too large."""

    def linear_bwd(dx: Any, dw: Any, db: Any, dy: Any, x: Any, w: Any, adds: bool) -> None:
        before = None if dw is None else np.asarray(be.to_host(dw), np.float64)
        be.linear_bwd(dx, dw, db, dy, x, w, adds)
        if dw is not None:
            be.from_host(dw, before + 1.001 * (be.to_host(dw) - before))

    return dict(linear_bwd=linear_bwd)


# Documents in one sequence, with attention that stops at their borders


def _moved(be: Any, by: int) -> Callable[[Any], Any]:
    """Move the borders of documents by a number of positions."""

    def move(doc_start: Any) -> Any:
        # Golden steps have no documents.
        if doc_start is None:
            return None
        host = be.to_host(doc_start)
        out = be.empty(doc_start.shape, doc_start.dtype)
        be.from_host(out, np.clip(host + by, 0, np.arange(host.shape[1])).astype(host.dtype))
        return out

    return move


@fault(r"forward attention_fwd 0\.att", TRUTH, documents=True)
def documents_see_each_other(be: Any) -> Ops:
    """Attention goes on over the border of a document."""
    return changed(be, ATTENTION, doc_start=none)


@fault(r"forward attention_fwd 0\.att", TRUTH, documents=True)
def document_begins_one_early(be: Any) -> Ops:
    """A query sees the last token of the document before its own."""
    return changed(be, ATTENTION, doc_start=_moved(be, -1))


@fault(r"forward attention_fwd 0\.att", TRUTH, documents=True)
def document_begins_one_late(be: Any) -> Ops:
    """A query does not see the first token of its document, unless it is that one."""
    return changed(be, ATTENTION, doc_start=_moved(be, 1))


@fault(r"backward attention_bwd \d+\.d_q_rope", TRUTH | {"gradient"}, documents=True)
def documents_not_masked_in_backward(be: Any) -> Ops:
    """Attention stops at the borders of documents in forward, and goes over them in backward."""
    return changed(be, "attention_bwd", doc_start=none)


@fault(r"state sequence_by_sequence grad\..*", frozenset({"micro"}), documents=True)
def borders_of_the_first_batch(be: Any) -> Ops:
    """Document starts are uploaded once: later batches are masked by those of the first one."""

    def from_host(x: Any, host: np.ndarray) -> None:
        if not (x.ndim == 2 and x.dtype == np.int32 and be.to_host(x).any()):
            be.from_host(x, host)

    return dict(from_host=from_host)


# State


@fault(r"loss linear_bwd grad\.(embed|head)", frozenset({"micro"}))
def weight_gradient_overwritten(be: Any) -> Ops:
    """The gradient of a matrix is overwritten: of several micro-batches the last one counts."""

    def linear_bwd(dx: Any, dw: Any, db: Any, dy: Any, x: Any, w: Any, adds: bool) -> None:
        if dw is not None:
            be.fill(dw, 0)
        be.linear_bwd(dx, dw, db, dy, x, w, adds)

    return dict(linear_bwd=linear_bwd)


@fault(r"backward linear_bwd grad\.0\.wqkv", frozenset({"micro"}))
def weight_gradient_never_begun(be: Any) -> Ops:
    """The first micro-batch of a step adds to the gradients of the step before."""
    return changed(be, "linear_bwd", adds=lambda adds: True)


@fault(r"loss cross_entropy d_logits", frozenset({"micro"}))
def mean_over_the_micro_batch(be: Any) -> Ops:
    """Gradients are averaged over the tokens of a micro-batch, not of the batch."""

    def cross_entropy(loss: Any, logits: Any, targets: Any, scale: float | None, z: float) -> None:
        count = int((be.to_host(targets) >= 0).sum())
        be.cross_entropy(loss, logits, targets, None if scale is None else 1 / max(count, 1), z)

    return dict(cross_entropy=cross_entropy)


@fault(r"state two_runs .+", REPEAT)
def not_deterministic(be: Any) -> Ops:
    """Sums are added in another order each time: the last bits differ from run to run."""
    rng = np.random.default_rng()

    def swiglu_fwd(y: Any, gu: Any) -> None:
        be.swiglu_fwd(y, gu)
        eps = np.finfo(np.float64 if y.dtype == np.float64 else np.float32).eps
        be.from_host(y, np.asarray(be.to_host(y), np.float64) * (1 + 2 * eps * rng.integers(0, 2, y.shape)))

    return dict(swiglu_fwd=swiglu_fwd)


@fault(r"state (two_runs|evaluate) loss", REPEAT | {"gradient"})
def loss_not_reset(be: Any) -> Ops:
    """The sum of losses goes on from the last batch."""

    def fill(x: Any, value: float) -> None:
        if x.size > 1 or value != 0:
            be.fill(x, value)

    return dict(fill=fill)


@fault(r"state recorded_pass .+", REPEAT)
def recorded_pass_is_stale(be: Any) -> Ops:
    """A recorded pass replays nothing."""
    return dict(capture=lambda f: lambda: None)


# The order of the data


@read(r"data Windows\.read targets")
@contextmanager
def targets_are_the_ids() -> Iterator[None]:
    """The targets of a window are its ids, not the ids after them."""
    sound = Windows.read

    def wrong(self: Windows, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids, _ = sound(self, indices)
        return ids, ids

    with mock.patch.object(Windows, "read", wrong):
        yield


@read(r"data Windows\.read ids")
@contextmanager
def a_token_lost_between_windows() -> Iterator[None]:
    """Windows begin one token late."""
    sound = Windows.read

    def wrong(self: Windows, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids, targets = sound(self, indices)
        return np.roll(ids, -1, 1), np.roll(targets, -1, 1)

    with mock.patch.object(Windows, "read", wrong):
        yield


@read(r"data Batches\.next one_pass")
@contextmanager
def half_of_the_windows_twice() -> Iterator[None]:
    """The shuffle draws half of the windows twice and the others never."""
    sound = Permutation.__call__

    def wrong(self: Permutation, indices: np.ndarray) -> np.ndarray:
        return sound(self, indices // 2 * 2)

    with mock.patch.object(Permutation, "__call__", wrong):
        yield


FAULTS = entered
