"""Attention of the CUDA backend on tensor cores by mma.sync: when it applies, what is launched, with which geometry.

The kernels are in kernels/attention_mma.cu; those for Hopper, which apply to the same arrays, are launched by
attention_wgmma.py, and device.py chooses. Every bit of the result depends on shapes alone, not on the
GPU: tiles, splits and groups are chosen here from shapes, and no sum is left to the order of blocks.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple

from ...common.rounding import ceil_div
from . import kernels

Array = Any

HEAD_DIMS = (32, 64, 96, 128)
L2_BYTES = 32 << 20  # keys and values, or queries and dy, that the blocks of one group may keep in cache
BLOCKS = 264  # enough to fill two blocks on each of 132 multiprocessors
SUM_THREADS = 256
STAGES = 2  # one is read while the other is copied


class Geometry(NamedTuple):
    """One launch: blocks, threads of a block, bytes of dynamic shared memory."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int


@cache
def tiles(head_dim: int, file: str = "attention_tiles.cuh") -> dict[str, int]:
    """The macros of a file of kernels/ for one head width, such as FWD_WARPS."""
    text = (kernels.FOLDER / file).read_text("utf-8")
    parts = re.split(r"^#(?:el)?if HEAD_DIM == (\d+)$|^#endif$", text, flags=re.M)
    section = parts[parts.index(str(head_dim)) + 1]
    return {name: int(value) for name, value in re.findall(r"^#define (\w+) (\d+)$", section, re.M)}


def _geometry(
    which: str, d: int, rows: int, others: int, pairs: int, parts: int, own: int, extra: int
) -> Geometry:
    """A block for each tile of `rows` and each part of each (sequence, key/value head) pair, in the order
    of place() in mma.cuh: groups of pairs whose `others` rows of two arrays fit into the cache. In shared
    memory `own` tiles of its rows, and stages of two tiles and `extra` bytes a row.
    """
    t = tiles(d)
    tile, stage = 16 * t[which + "_M"] * t[which + "_WARPS"], t[which + "_STAGE"]
    group = max(1, min(pairs, L2_BYTES // (4 * others * d)))
    grid = (group * parts, ceil_div(rows, tile), ceil_div(pairs, group))
    shared = (own * tile + 2 * STAGES * stage) * 2 * d + STAGES * stage * extra
    return Geometry(grid, (32 * t[which + "_WARPS"],), shared)


@cache
def forward_geometry(b: int, t: int, s: int, h: int, k: int, d: int) -> Geometry:
    """Of attention_fwd_mma."""
    return _geometry("FWD", d, t, s, b * k, h // k, 1, 0)


@cache
def dq_geometry(b: int, t: int, s: int, h: int, k: int, d: int) -> Geometry:
    """Of attention_dq_mma."""
    return _geometry("DQ", d, t, s, b * k, h // k, 2, 0)


@cache
def dkv_geometry(b: int, t: int, s: int, k: int, d: int, splits: int) -> Geometry:
    """Of attention_dkv_mma, with the query heads of a key/value head split over `splits` blocks."""
    return _geometry("DKV", d, s, t, b * k, splits, 2, 8)


@cache
def sum_geometry(b: int, s: int, k: int, d: int) -> Geometry:
    """Of attention_dkv_sum: four values of dk or dv a thread."""
    return Geometry((ceil_div(b * s * k * d, 2 * SUM_THREADS),), (SUM_THREADS,), 0)


@cache
def split_count(b: int, s: int, h: int, k: int, d: int) -> int:
    """Number of blocks that share the query heads of a key/value head: more than 1 only where one block for each
    tile of keys would leave multiprocessors idle; the partial sums cost memory traffic.
    """
    t = tiles(d)
    blocks = b * k * ceil_div(s, 16 * t["DKV_M"] * t["DKV_WARPS"])
    return max(1, min(h // k, BLOCKS // blocks))


@cache
def shared_bytes(d: int, backward: bool) -> int:
    """Shared memory of a block that a GPU must have for the kernels of a head width."""
    if not backward:
        return forward_geometry(1, 1, 1, 1, 1, d).shared
    return max(dq_geometry(1, 1, 1, 1, 1, d).shared, dkv_geometry(1, 1, 1, 1, d, 1).shared)


def applies(q: Array, k: Array, v: Array, y: Array, most_shared: int, *gradients: Array) -> bool:
    """Tell whether the kernels can read and write these arrays: bfloat16, a head width that is compiled, dense
    heads, rows and sequences at multiples of 16 bytes; and whether they can run on a GPU whose blocks can
    have most_shared bytes of shared memory. With gradients (dq, dk, dv, dy): the kernels of backward.
    """
    d = q.shape[-1]
    return (
        d in HEAD_DIMS
        and shared_bytes(d, bool(gradients)) <= most_shared
        and all(x.dtype == "bfloat16" and _aligned(x) for x in (q, k, v, y, *gradients))
        and bool(y.flags.c_contiguous)
    )


def _aligned(x: Array) -> bool:
    batch, row, head, last = x.strides
    dense = last == 2 and (head == 2 * x.shape[3] or x.shape[2] == 1)
    return dense and batch % 16 == 0 and row % 16 == 0 and x.data.ptr % 16 == 0


def _strides(x: Array) -> tuple[int, int]:
    return x.strides[1] // 2, x.strides[0] // 2  # row, batch, in elements


def _kernel(name: str, d: int, doc_start: Array | None) -> Any:
    """Without borders, what is compiled knows nothing of them."""
    from . import launch  # the only part that needs CuPy

    return launch.kernel("attention_mma", name, "bfloat16", HEAD_DIM=d, DOCUMENTS=int(doc_start is not None))


def forward(y: Array, lse: Array, q: Array, k: Array, v: Array, doc_start: Array | None, window: int) -> None:
    """See attention_fwd in reference.py; for arrays to which this applies()."""
    (b, t, h, d), (s, kv) = q.shape, k.shape[1:3]
    grid, block, shared = forward_geometry(b, t, s, h, kv, d)
    args = (y, lse, q, k, v, doc_start, *_strides(q), *_strides(k), *_strides(v))
    sizes = (b, t, s, h, kv, window, d**-0.5)
    _kernel("attention_fwd_mma", d, doc_start)(grid, block, args + sizes, shared=shared)


def backward(
    dq: Array,
    dk: Array,
    dv: Array,
    dy: Array,
    y: Array,
    lse: Array,
    q: Array,
    k: Array,
    v: Array,
    doc_start: Array | None,
    window: int,
) -> None:
    """See attention_bwd in reference.py; for arrays to which this applies()."""
    from . import launch

    (b, t, h, d), (s, kv) = q.shape, k.shape[1:3]
    stats = launch.scratch((b, h, t, 2), "float32", "attention stats")
    strides = (*_strides(q), *_strides(k), *_strides(v))
    sizes = (b, t, s, h, kv, window)

    grid, block, shared = dq_geometry(b, t, s, h, kv, d)
    arrays: tuple[Any, ...] = (dq, stats, dy, y, lse, q, k, v, doc_start, *_strides(dq))
    _kernel("attention_dq_mma", d, doc_start)(
        grid, block, (*arrays, *strides, *sizes, d**-0.5), shared=shared
    )

    splits = split_count(b, s, h, kv, d)
    partial = None
    if splits > 1:
        partial = launch.scratch((splits, 2, b, s, kv, d), "float32", "attention partial")
    grid, block, shared = dkv_geometry(b, t, s, kv, d, splits)
    arrays = (dk, dv, partial, dy, stats, q, k, v, doc_start, *_strides(dk), *_strides(dv))
    _kernel("attention_dkv_mma", d, doc_start)(
        grid, block, (*arrays, *strides, *sizes, splits, d**-0.5), shared=shared
    )
    if partial is not None:
        sum_parts(dk, dv, partial, doc_start)


def sum_parts(dk: Array, dv: Array, partial: Array, doc_start: Array | None) -> None:
    """Add up what blocks that share a key/value head have left in partial (splits,2,B,S,K,D)."""
    b, s, kv, d = dk.shape
    grid, block, _ = sum_geometry(b, s, kv, d)
    arrays = (dk, dv, partial, *_strides(dk), *_strides(dv))
    _kernel("attention_dkv_sum", d, doc_start)(grid, block, (*arrays, b, s, kv, len(partial)))
