"""Memory of a job on each of several GPUs, before anything is allocated."""

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
