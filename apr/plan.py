"""FLOPs and bytes of a job before anything is allocated: the only place with those formulas."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import prod
from types import ModuleType

import numpy as np

from .config import ModelConfig
from .errors import Refused
from .model import block_buffers, default_loss_rows, scratch_buffers
from .params import Layout


def check_positions(c: ModelConfig, seq_length: int) -> None:
    """Raise Refused for sequences longer than the model has positions for."""
    if seq_length > c.max_position_embeddings:
        raise Refused(
            f"--seq-length {seq_length} is more than the model's max_position_embeddings = {c.max_position_embeddings}"
        )


def matmul_parameters(c: ModelConfig) -> int:
    """Weights that take part in a matrix product for every token: all matrices, the head once, the
    embedding look-up not."""
    layer = sum(s.size for s in Layout(c).slots if s.layer is not None and len(s.shape) == 2)
    return layer + c.vocab_size * c.hidden_size


def attended(c: ModelConfig, seq: int) -> float:
    """Keys a query sees, averaged over the positions of a sequence."""
    w = min(c.sliding_window or seq, seq)
    return (w * (w + 1) / 2 + (seq - w) * w) / seq


def flops_per_token(c: ModelConfig, seq: int, backward: bool = True) -> float:
    """Floating-point operations of matrix products per token: 2 per weight forward and 4 backward
    (Kaplan et al. 2020, section 2.1), and of q k^T and p v, 2 * 2 * H * D per key seen, likewise.

    What is computed again in backward and what a mask throws away is not counted.
    """
    forward = 2 * matmul_parameters(c) + 4 * c.num_layers * c.num_heads * c.head_dim * attended(c, seq)
    return forward * (3 if backward else 1)


@dataclass(frozen=True)
class Memory:
    """Bytes that a training or inference job asks the backend for, by purpose."""

    weights: int
    gradients: int
    moments: int
    saved: int  # kept by every layer for backward
    scratch: int  # shared by all layers, rope tables and batch included
    logits: int
    cache: int  # keys and values of past positions

    @property
    def total(self) -> int:
        """Sum of all, bytes."""
        return sum(vars(self).values())


def memory(
    c: ModelConfig,
    batch: int,
    seq: int,
    itemsize: int = 4,
    train: bool = True,
    loss_rows: int | None = None,
    cache: int = 0,
) -> Memory:
    """What Model (and AdamW, when train) will allocate for batches of batch x seq tokens."""
    n = batch * seq

    def elements(shapes: dict[str, tuple[int, ...]]) -> int:
        return sum(prod(s) for s in shapes.values())

    flat = Layout(c).size * itemsize
    tables = 2 * max(seq, cache) * (c.head_dim // 2)
    scalars = 8 * (3 if train else 1)  # loss total; squared norm and clip factor
    rows = min(loss_rows or default_loss_rows(c, n), n)
    layers = c.num_layers if train else 1
    return Memory(
        weights=flat,
        gradients=flat if train else 0,
        moments=2 * flat if train else 0,
        saved=layers * elements(block_buffers(c, batch, seq)) * itemsize,
        scratch=(elements(scratch_buffers(c, batch, seq, train)) + tables) * itemsize + 8 * n + scalars,
        logits=rows * c.vocab_size * itemsize,
        cache=2 * c.num_layers * batch * cache * c.num_kv_heads * c.head_dim * itemsize if cache else 0,
    )


def matmul_rate(backend: ModuleType, dtype: str = "float32", size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of a square matrix product on this device: the best of a few, about 0.1 s on a CPU."""
    x, w, y = (backend.empty((size, size), dtype) for _ in range(3))
    for a in (x, w):
        backend.from_host(a, np.random.default_rng(0).standard_normal((size, size)).astype("float32"))
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        backend.linear_fwd(y, x, w, None)
        backend.sync()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
