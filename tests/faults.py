"""Planted faults: what a trainer gets wrong, each a small change to the ops of a sound backend.

Those of attention, RoPE and the gate are the same in forward and backward, as they would be in life, so that the
numeric gradient cannot see them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from apr.config import ModelConfig
from apr.model import Model
from cases import Backend, overlay
from checks import Build, on

Ops = dict[str, Callable[..., None]]
FAULTS: dict[str, Fault] = {}
VALUES = frozenset({"truth", "golden"})  # the checks that see a fault which is its own derivative's
EVERY = VALUES | {"gradient"}
ADAMW = frozenset({"adamw"})


@dataclass(frozen=True)
class Fault:
    """A fault: the ops it replaces, the checks that see it, the models it can be seen in."""

    name: str
    ops: Callable[[Any], Ops]
    seen_by: frozenset[str]
    applies: Callable[[ModelConfig], bool]
    config: Callable[[ModelConfig], ModelConfig]

    def planted(self, be: Backend) -> Build:
        """Builds models with the fault on a backend."""

        def build(cfg: ModelConfig, dtype: str, **options: Any) -> Model:
            return on(overlay(be, **self.ops(be)))(self.config(cfg), dtype, **options)

        return build


def fault(
    seen_by: frozenset[str],
    applies: Callable[[ModelConfig], bool] = lambda c: True,
    config: Callable[[ModelConfig], ModelConfig] = lambda c: c,
) -> Callable[[Callable[[Any], Ops]], Callable[[Any], Ops]]:
    """Put a function that makes the faulty ops into FAULTS, under its name."""

    def enter(ops: Callable[[Any], Ops]) -> Callable[[Any], Ops]:
        FAULTS[ops.__name__] = Fault(ops.__name__, ops, seen_by, applies, config)
        return ops

    return enter


@fault(EVERY, lambda c: c.qkv_bias)
def bias_dropped(be: Any) -> Ops:
    def linear_fwd(y: Any, x: Any, w: Any, b: Any) -> None:
        be.linear_fwd(y, x, w, None)

    return dict(linear_fwd=linear_fwd)


@fault(EVERY, lambda c: c.qkv_bias)
def bias_gradient_missing(be: Any) -> Ops:
    def linear_bwd(dx: Any, dw: Any, db: Any, dy: Any, x: Any, w: Any) -> None:
        be.linear_bwd(dx, dw, None, dy, x, w)

    return dict(linear_bwd=linear_bwd)


@fault(VALUES)
def rope_pairs_neighbours(be: Any) -> Ops:
    """Pairs (x[2i], x[2i+1]) instead of (x[i], x[i + D/2])."""

    def rope(x: Any, cos: Any, sin: Any, sign: int) -> None:
        order = [*range(0, x.shape[-1], 2), *range(1, x.shape[-1], 2)]
        z = np.ascontiguousarray(x[..., order])
        be.rope(z, cos, sin, sign)
        x[..., order] = z

    return dict(rope=rope)


@fault(VALUES)
def rope_off_by_a_thousandth(be: Any) -> Ops:
    def rope(x: Any, cos: Any, sin: Any, sign: int) -> None:
        be.rope(x, cos, sin * sin.dtype.type(1.001), sign)

    return dict(rope=rope)


@fault(EVERY)
def rope_backward_missing(be: Any) -> Ops:
    def rope(x: Any, cos: Any, sin: Any, sign: int) -> None:
        if sign > 0:
            be.rope(x, cos, sin, sign)

    return dict(rope=rope)


@fault(VALUES, lambda c: c.rope_scaling is not None, lambda c: replace(c, rope_scaling=None))
def llama3_scaling_dropped(be: Any) -> Ops:
    return {}


def _other_keys(be: Any, order: Callable[[int], list[int]]) -> Ops:
    """Attention over the keys order(S) instead of 0 .. S-1."""

    def attention_fwd(y: Any, lse: Any, q: Any, k: Any, v: Any, window: int) -> None:
        seen = order(k.shape[1])
        be.attention_fwd(y, lse, q, k[:, seen], v[:, seen], window)

    def attention_bwd(
        dq: Any, dk: Any, dv: Any, dy: Any, y: Any, lse: Any, q: Any, k: Any, v: Any, window: int
    ) -> None:
        seen = order(k.shape[1])
        k, v = k[:, seen], v[:, seen]
        dkeys, dvalues = np.zeros_like(k), np.zeros_like(v)
        be.attention_bwd(dq, dkeys, dvalues, dy, y, lse, q, k, v, window)
        for d, part in ((dk, dkeys), (dv, dvalues)):
            d[...] = 0
            for j, source in enumerate(seen):
                d[:, source] += part[:, j]

    return dict(attention_fwd=attention_fwd, attention_bwd=attention_bwd)


@fault(VALUES)
def mask_shows_the_next_token(be: Any) -> Ops:
    return _other_keys(be, lambda n: [*range(n), n - 1])  # one key more than queries: query t sees j <= t + 1


@fault(VALUES)
def mask_hides_the_token_itself(be: Any) -> Ops:
    return _other_keys(be, lambda n: [0, *range(n - 1)])


def _other_window(be: Any, change: Callable[[int], int]) -> Ops:
    def attention_fwd(*args: Any) -> None:
        be.attention_fwd(*args[:-1], change(args[-1]))

    def attention_bwd(*args: Any) -> None:
        be.attention_bwd(*args[:-1], change(args[-1]))

    return dict(attention_fwd=attention_fwd, attention_bwd=attention_bwd)


@fault(VALUES, lambda c: c.sliding_window > 0)
def window_ignored(be: Any) -> Ops:
    return _other_window(be, lambda window: 0)


@fault(VALUES, lambda c: c.sliding_window > 0)
def window_one_too_wide(be: Any) -> Ops:
    return _other_window(be, lambda window: window + 1)


@fault(VALUES, lambda c: 1 < c.num_kv_heads < c.num_heads)
def heads_interleaved(be: Any) -> Ops:
    """Query head h reads key/value head h % K instead of h // (H/K)."""

    def attention_fwd(y: Any, lse: Any, q: Any, k: Any, v: Any, window: int) -> None:
        order = sorted(range(q.shape[2]), key=lambda h: h % k.shape[2])
        y_, lse_ = np.empty_like(y), np.empty_like(lse)
        be.attention_fwd(y_, lse_, q[:, :, order], k, v, window)
        y[:, :, order], lse[:, order] = y_, lse_

    def attention_bwd(
        dq: Any, dk: Any, dv: Any, dy: Any, y: Any, lse: Any, q: Any, k: Any, v: Any, window: int
    ) -> None:
        order = sorted(range(q.shape[2]), key=lambda h: h % k.shape[2])
        dy, y, lse, q = dy[:, :, order], y[:, :, order], np.ascontiguousarray(lse[:, order]), q[:, :, order]
        dq_ = np.empty_like(q)
        be.attention_bwd(dq_, dk, dv, dy, y, lse, q, k, v, window)
        dq[:, :, order] = dq_

    return dict(attention_fwd=attention_fwd, attention_bwd=attention_bwd)


@fault(EVERY)
def one_head_two_percent_off(be: Any) -> Ops:
    def attention_fwd(y: Any, *args: Any) -> None:
        be.attention_fwd(y, *args)
        y[:, :, 1] = 1.02 * y[:, :, 1].astype(np.float64)

    return dict(attention_fwd=attention_fwd)


@fault(VALUES)
def norm_eps_doubled(be: Any) -> Ops:
    def add_rmsnorm_fwd(res: Any, y: Any, rstd: Any, res_in: Any, delta: Any, w: Any, eps: float) -> None:
        be.add_rmsnorm_fwd(res, y, rstd, res_in, delta, w, 2 * eps)

    return dict(add_rmsnorm_fwd=add_rmsnorm_fwd)


@fault(EVERY)
def norm_weight_gradient_missing(be: Any) -> Ops:
    def add_rmsnorm_bwd(dres: Any, dw: Any, dy: Any, res: Any, rstd: Any, w: Any) -> None:
        be.add_rmsnorm_bwd(dres, np.zeros_like(dw), dy, res, rstd, w)

    return dict(add_rmsnorm_bwd=add_rmsnorm_bwd)


@fault(VALUES, lambda c: c.qk_norm)
def qk_norm_skipped(be: Any) -> Ops:
    def head_rmsnorm_fwd(y: Any, rstd: Any, x: Any, w: Any, eps: float) -> None:
        y[...] = x

    def head_rmsnorm_bwd(dx: Any, dw: Any, dy: Any, x: Any, rstd: Any, w: Any) -> None:
        dx[...] = dy

    return dict(head_rmsnorm_fwd=head_rmsnorm_fwd, head_rmsnorm_bwd=head_rmsnorm_bwd)


@fault(VALUES)
def gate_and_up_swapped(be: Any) -> Ops:
    def swap(x: Any) -> Any:
        return np.roll(x, x.shape[-1] // 2, axis=-1)

    def swiglu_fwd(y: Any, gu: Any) -> None:
        be.swiglu_fwd(y, swap(gu))

    def swiglu_bwd(dgu: Any, dy: Any, gu: Any) -> None:
        be.swiglu_bwd(dgu, dy, swap(gu))
        dgu[...] = swap(dgu)

    return dict(swiglu_fwd=swiglu_fwd, swiglu_bwd=swiglu_bwd)


@fault(EVERY)
def embedding_gradient_missing(be: Any) -> Ops:
    return dict(embedding_bwd=lambda dw, dy, ids: None)


@fault(EVERY, lambda c: c.tie_word_embeddings)
def tied_gradient_counted_once(be: Any) -> Ops:
    """The embedding overwrites what the head, which is the same tensor, had added."""

    def embedding_bwd(dw: Any, dy: Any, ids: Any) -> None:
        be.fill(dw, 0)
        be.embedding_bwd(dw, dy, ids)

    return dict(embedding_bwd=embedding_bwd)


@fault(EVERY)
def gradient_summed_not_averaged(be: Any) -> Ops:
    def cross_entropy(loss: Any, logits: Any, targets: Any, scale: float | None, z: float) -> None:
        be.cross_entropy(loss, logits, targets, None if scale is None else 1.0, z)

    return dict(cross_entropy=cross_entropy)


@fault(VALUES)
def ignored_targets_counted(be: Any) -> Ops:
    def cross_entropy(loss: Any, logits: Any, targets: Any, scale: float | None, z: float) -> None:
        be.cross_entropy(loss, logits, np.maximum(targets, 0), scale, z)

    return dict(cross_entropy=cross_entropy)


@fault(ADAMW)
def clip_skipped(be: Any) -> Ops:
    return dict(clip_factor=lambda factor, sum_sq, max_norm: be.fill(factor, 1))


def _other_adamw(be: Any, position: int, change: Callable[[Any], Any]) -> Ops:
    """AdamW with one argument changed: 6 is lr, 10 is decay, 11 is step."""

    def adamw(*args: Any) -> None:
        be.adamw(*args[:position], change(args[position]), *args[position + 1 :])

    return dict(adamw=adamw)


@fault(ADAMW)
def decay_on_norms(be: Any) -> Ops:
    return _other_adamw(be, 10, lambda decay: 0.1)


@fault(ADAMW)
def decay_forgotten(be: Any) -> Ops:
    return _other_adamw(be, 10, lambda decay: 0.0)


@fault(ADAMW)
def learning_rate_ignored(be: Any) -> Ops:
    return _other_adamw(be, 6, lambda lr: 0.01)


@fault(ADAMW)
def step_not_counted(be: Any) -> Ops:
    return _other_adamw(be, 11, lambda step: 1)
