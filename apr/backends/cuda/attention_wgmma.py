"""Attention of the CUDA backend on wgmma and TMA, for GPUs of sm_90a: what is launched, with which geometry.

The kernels are in kernels/attention_wgmma.cu. Their blocks are persistent, one on each multiprocessor; every bit of the
result depends on shapes alone all the same, because a tile is worked on by one block, in one order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ...common.rounding import ceil_div, round_up
from . import attention
from .attention import BLOCKS, L2_BYTES, Geometry

Array = Any

ARCH, HEAD_DIMS, MODULE = "sm_90a", (64, 96, 128), "attention_wgmma"
TILES_FILE = "attention_wgmma_tiles.cuh"
ROWS = 128  # of a tile: queries (DQ), keys (DKV)
GROUP_ROWS = 64  # of them, those of a group of threads
THREADS = 384  # two groups that multiply and one that loads
STATS_MORE = 64  # rows, see attention_wgmma_bwd.cuh
RESERVED = 2048  # bytes: barriers, and what it takes to begin at a multiple of 1024
LARGEST_SPLIT = 8
FWD_BUFFERS = 2  # tiles of queries of a block: the next ones come while it works on these


def serves(arch: str, d: int) -> bool:
    """Tell whether a GPU has the kernels for a head width: where it has, they are used, and the result has their bits."""
    return arch == ARCH and d in HEAD_DIMS


def kind(arch: str) -> str:
    """Name of the kernels that such a GPU computes attention of bfloat16 with, where a head width has both."""
    return "wgmma" if arch == ARCH else "mma.sync"


@cache
def forward_geometry(b: int, t: int, h: int, d: int, multiprocessors: int) -> Geometry:
    """Of attention_fwd_wgmma."""
    of = attention.tiles(d, TILES_FILE)
    queries, row = GROUP_ROWS * of["FWD_GROUPS"], 128 * ceil_div(d, 64)
    blocks = min(multiprocessors, ceil_div(t, queries) * b * h)
    shared = RESERVED + (FWD_BUFFERS * queries + 2 * of["FWD_STAGES"] * of["FWD_KEYS"]) * row
    return Geometry((blocks,), (128 * (of["FWD_GROUPS"] + 1),), shared)


@cache
def geometry(which: str, d: int, items: int, multiprocessors: int) -> Geometry:
    """Of attention_dq_wgmma (DQ) or attention_dkv_wgmma (DKV), which work on so many items."""
    t, row = attention.tiles(d, TILES_FILE), 128 * ceil_div(d, 64)
    shared = RESERVED + t[f"{which}_BUFFERS"] * 2 * ROWS * row
    if which == "DQ":
        shared += ((t["DQ_STAGES"] + t["DQ_VALUES"]) * t["DQ_KEYS"] + ROWS) * row
    else:
        shared += t["DKV_STAGES"] * (t["DKV_QUERIES"] * 2 * row + 1024)
    return Geometry((min(multiprocessors, items),), (THREADS,), shared)


@cache
def split_count(b: int, s: int, k: int) -> int:
    """Number of blocks that share the queries of a tile of keys: more than 1 only where one block for each tile would
    leave multiprocessors idle.
    """
    return max(1, min(LARGEST_SPLIT, BLOCKS // (b * k * ceil_div(s, ROWS))))


def forward(y: Array, lse: Array, q: Array, k: Array, v: Array, doc_start: Array | None, window: int) -> None:
    """See attention_fwd in reference.py; for arrays to which attention.applies()."""
    from . import launch

    (b, t, h, d), (s, kv) = q.shape, k.shape[1:3]
    of, place = attention.tiles(d, TILES_FILE), launch.tensor_map
    grid, block, shared = forward_geometry(b, t, h, d, launch.multiprocessors())
    queries, keys = (
        place(q, GROUP_ROWS * of["FWD_GROUPS"]),
        (place(k, of["FWD_KEYS"]), place(v, of["FWD_KEYS"])),
    )
    pairs = max(1, min(b * kv, L2_BYTES // (4 * s * d))) * (h // kv)
    sizes = (b, t, s, h, kv, window, pairs, d**-0.5)
    launch.kernel(
        MODULE, "attention_fwd_wgmma", "bfloat16", HEAD_DIM=d, DOCUMENTS=int(doc_start is not None)
    )(grid, block, (place(y, GROUP_ROWS), lse, queries, *keys, doc_start, *sizes), shared=shared)


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
    """See attention_bwd in reference.py; for arrays to which attention.applies()."""
    from . import launch

    (b, t, h, d), (s, kv) = q.shape, k.shape[1:3]
    tiles, place = attention.tiles(d, TILES_FILE), launch.tensor_map
    stats = launch.scratch((b, h, round_up(t, ROWS) + STATS_MORE, 2), "float32", "attention stats")

    def run(which: str, items: int, *args: Any) -> None:
        grid, block, shared = geometry(which, d, items, launch.multiprocessors())
        kernel = f"attention_{which.lower()}_wgmma"
        borders = int(doc_start is not None)
        launch.kernel(MODULE, kernel, "bfloat16", HEAD_DIM=d, DOCUMENTS=borders)(
            grid, block, args, shared=shared
        )

    keys = tiles["DQ_KEYS"]
    maps = (place(q, ROWS), place(k, keys), place(v, keys))
    out: tuple[Any, ...] = (place(dq, GROUP_ROWS), stats, place(dy, ROWS), y, lse)
    run("DQ", ceil_div(t, ROWS) * b * h, *out, *maps, doc_start, b, t, s, h, kv, window, d**-0.5)

    splits, queries = split_count(b, s, kv), tiles["DKV_QUERIES"]
    partial = None
    if splits > 1:
        partial = launch.scratch((splits, 2, b, s, kv, d), "float32", "attention partial")
    maps = (place(q, queries), place(k, ROWS), place(v, ROWS))
    out = (place(dk, GROUP_ROWS), place(dv, GROUP_ROWS), partial, place(dy, queries), stats)
    items = ceil_div(s, ROWS) * b * kv * splits
    run("DKV", items, *out, *maps, doc_start, b, t, s, h, kv, window, splits, d**-0.5)
    if partial is not None:
        attention.sum_parts(dk, dv, partial, doc_start)
