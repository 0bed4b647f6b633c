"""Launch low_rank.cu: the two products of adapters that read the same rows, in one pass over the rows.

Like ops.py, this needs neither CuPy nor a GPU. The bits depend on shapes alone.
"""

from __future__ import annotations

from typing import Any

from ...common.rounding import ceil_div
from . import ops

Array = Any
BLOCKS = 132  # one on each multiprocessor of an H200
MIN_WIDTH = 4096  # of rows; of shorter ones the second product finds much in the L2 cache
PARTS_BYTES = 16 << 20  # of sums of p that blocks of columns leave; more rows are taken in turns


def serves(p: Array, x: Array, l: Array) -> bool:
    """Tell whether the kernel computes these: bfloat16, 8 or 16 ranks, long rows of whole 16 bytes."""
    width, rank = x.shape[1] * x.itemsize, l.shape[1]
    rows = ops._vector((width, ops._row(x) * x.itemsize), x)
    pairs = all(ops._row(y) % 2 == 0 and ops.machine.address(y) % 4 == 0 for y in (p, l))
    return x.dtype.name == "bfloat16" and rank in (8, 16) and x.shape[1] >= MIN_WIDTH and rows and pairs


def adapted_bwd_a(u: Array, da: Array, x: Array, du: Array, a: Array, factor: float) -> None:
    """See reference.py."""
    _both(u, da, x, du, a, factor, 1, a.shape[1])


def adapted_bwd_b(du: Array, db: Array, dy: Array, u: Array, b: Array, factor: float) -> None:
    """See reference.py."""
    _both(du, db, dy, u, b, factor, b.shape[1], 1)


def _both(p: Array, q: Array, x: Array, l: Array, f: Array, factor: float, across: int, down: int) -> None:
    """p = x f, q += factor x^T l.  x (N,W), l, p (N,R), f(w,r) at w * across + r * down, q as f"""
    (n, w), r, warps = x.shape, l.shape[1], _number("WARPS")
    tokens, tile = _number("TOKENS"), _number("TOKENS") * _number("RANKS")
    all_groups = ceil_div(w, _number("COLUMNS"))
    columns = ceil_div(all_groups, warps * _number("GROUPS"))
    groups = ceil_div(all_groups, columns)
    most = max(tokens, PARTS_BYTES // (4 * columns * tile) * tokens)
    for first in range(0, n, most):
        rows = slice(first, min(n, first + most))
        many = rows.stop - first
        all_tiles = ceil_div(many, tokens)
        tiles = ceil_div(all_tiles, max(1, BLOCKS // columns))
        blocks = ceil_div(all_tiles, tiles)
        parts = ops.machine.scratch((columns, all_tiles, tile), "float32", "low rank parts")
        sums = ops.machine.scratch((blocks, _number("RANKS"), w), "float32", "low rank sums")
        strides = across, down, many, w, r
        args = parts, sums, x[rows], l[rows], f, ops._row(x), ops._row(l), *strides, groups, tiles
        ops._run("low_rank", "low_rank", x, (columns, blocks), (32 * warps,), *args)
        added = p[rows], q, parts, sums, factor, ops._row(p), *strides, columns, blocks
        threads = w * r // 4 + all_tiles * tile // 4
        ops._run("low_rank", "low_rank_add", x, (ceil_div(threads, 256),), (256,), *added)


def _number(name: str) -> int:
    return ops._constant("low_rank", name)
