"""Memory and speed of a job on each of several GPUs, before anything is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from ..model.buffers import WIDE
from ..model.cost import Memory
from ..model.lora import AdapterLayout
from ..model.optim import Optimizer
from ..model.params import Layout
from ..ranks.shard import Cut
from .buckets import completed

# NCCL's own: 592 MiB when ranks have joined and 268 more when they have exchanged for the first time (two H200s, NCCL 2.32).
NCCL_BYTES = 860 << 20


def on_ranks(
    need: Callable[..., Memory],
    layout: Layout | AdapterLayout,
    dtype: str,
    optimizer: type[Optimizer],
    count: int,
) -> Callable[..., Memory]:
    """Make of what describes the memory of one process what describes it on one of `count` GPUs. dtype: of the model"""
    if count == 1:
        return need
    trained = WIDE[dtype] if isinstance(layout, AdapterLayout) else dtype
    cut, wide, narrow = (
        Cut(layout.size, layout.decayed, count, completed(layout)[1]),
        4,
        np.dtype(trained).itemsize,
    )
    less = layout.size - cut.length
    specs = optimizer.specs(less, trained).values()
    moments, master = (sum(s.size for s in specs if s.purpose == kind) for kind in ("moments", "master"))

    def of_one(*args: object, **options: object) -> Memory:
        m = need(*args, **options)
        moved = cut.padded - cut.size + cut.length
        return dataclasses.replace(
            m,
            moments=m.moments - moments,
            master=m.master - master,
            weights=m.weights + moved * narrow,
            gradients=m.gradients + moved * wide,
            scratch=m.scratch + count * cut.widest * wide,
            backend=m.backend + NCCL_BYTES,
        )

    return of_one


# Bytes a second that a GPU sends to the others, and reads and writes in its own memory; share of the rate of products that a step
# comes to. Of H200s on NVLink: bench/gpu/ranks.json.
SENT, MOVED, SHARE = 320e9, 4.3e12, 0.7


def efficiency(layout: Layout, rate: float, flops: float, tokens: int, count: int) -> float:
    """Compute tokens a second of a GPU among `count` beside those of one alone, one micro-batch of `tokens` a step.

    What is added: the exchange of what backward completes last, which nothing hides, every fold, and the gathering of weights.
    AdamW's 26 bytes a weight are shared. rate: FLOP/s of products; flops: of a token"""
    ready, borders = completed(layout)
    cut = Cut(layout.size, layout.decayed, count, borders)
    last = sum(b.each for b in cut.buckets if ready(b) is None)
    exposed = 4 * last * (count - 1) / SENT
    folds = 4 * (count + 1) * cut.length / MOVED
    gathered = 2 * cut.length * (count - 1) / SENT
    saved = 26 * (layout.size - cut.length) / MOVED
    alone = flops * tokens / (SHARE * rate)
    return alone / (alone + exposed + folds + gathered - saved)
