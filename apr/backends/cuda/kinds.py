"""Name the kernels of ops that have several sets, each with bits of its own: which a GPU uses, and where it matters."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from . import attention_wgmma, kernels, ops

OPS = ("attention", "cross_entropy")


def kinds(arch: str) -> dict[str, str]:
    """Name the kernels that a GPU has for each of OPS, for the record of a run."""
    clusters = kernels.variants("loss_cluster", arch)
    return {
        "attention": attention_wgmma.kind(arch),
        "cross_entropy": "register clusters" if clusters else "blocks",
    }


def decisive(dtype: str, head_dim: int, vocab: int) -> Iterator[str]:
    """Give those of OPS whose bits depend on the kind, for a model: for others, all GPUs use the same kernels."""
    if dtype == "bfloat16" and head_dim in attention_wgmma.HEAD_DIMS:
        yield "attention"
    if ops.has_long_rows(vocab, 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize):
        yield "cross_entropy"
