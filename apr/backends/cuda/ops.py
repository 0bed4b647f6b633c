"""Launch the ops of the cuda backend that are our own CUDA kernels.

Formulas and shapes stand in reference.py and in the .cu files. Nothing here needs CuPy or a GPU: `machine`
launches, so that tests run the same geometry on the host. An op allocates nothing and waits for nothing.
Sums over rows are cut the same way on every GPU, so that the bits depend on shapes alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import Parameter, Signature
from math import inf
from typing import Any, Protocol

import numpy as np

from ...common.rounding import ceil_div, round_up
from ..contract import OPS
from ..philox import least_kept
from . import kernels

Array = Any
Shape = tuple[int, ...]


class Machine(Protocol):
    """Launcher of kernels, and the memory they need."""

    shared_bytes: int  # of shared memory that a block can have
    clusters: bool  # a kernel can run as clusters of blocks

    def kernel(self, module: str, name: str, act: str, **defines: int) -> Any:
        """A kernel, called with (grid, block, args, shared=bytes)."""

    def scratch(self, shape: Shape, dtype: str, slot: int) -> Array:
        """An array that lives until the end of an op."""

    def address(self, x: Array) -> int:
        """Address of the first element."""


machine: Any = None  # a Machine; set by cuda.set_device, and by tests
Numbers = dict[tuple[str, str], set[float]]  # (kernel, parameter) -> the values of a scalar

BLOCKS = 264  # two on each multiprocessor of an H200: in how many parts sums over rows are cut
SUM_BLOCKS = 1056
# dtype of weights: elements of gradients, and of new weights (a block of adamw), whose squares are one term of a norm
square_tiles = {"float32": (1 << 14, 1024), "bfloat16": (1 << 14, 2048)}
DROPOUT_THREADS = 256
MAX_GRID_Y = 65535
CLUSTER_PACKS = 256  # of 16 bytes, of a row, that a block of a cluster has at least
SHARED_STATIC = 1024  # bytes that a kernel may have besides its dynamic shared memory


@contextmanager
def noted_numbers(numbers: Numbers) -> Iterator[None]:
    """Note the scalars that kernels are launched with inside; does nothing where there is no machine."""
    if machine is None:
        yield
        return
    load = machine.kernel

    def kernel(module: str, name: str, act: str, **defines: int) -> Any:
        launch, declared = load(module, name, act, **defines), kernels.signatures(module)[name]

        def noted(grid: Shape, block: Shape, args: tuple[Any, ...], **options: Any) -> None:
            for p, x in zip(declared, args, strict=True):
                if not p.pointer:
                    numbers.setdefault((name, p.name), set()).add(float(x))
            launch(grid, block, args, **options)

        return noted

    machine.kernel = kernel
    try:
        yield
    finally:
        machine.kernel = load


def _run(module: str, name: str, act: Any, grid: Shape, block: Shape, *args: Any, shared: int = 0) -> None:
    machine.kernel(module, name, act.dtype.name)(grid, block, args, shared=shared)


def _vector(sizes: Shape, *arrays: Array) -> bool:
    """Tell whether 16-byte accesses are possible: sizes (of rows, distances between rows) in bytes, and arrays."""
    return not any(n % 16 for n in sizes) and not any(
        x is not None and machine.address(x) % 16 for x in arrays
    )


@cache
def _constant(module: str, name: str) -> int:
    """Value of a constexpr int of a kernel file."""
    found = re.search(rf"\b{name} = (\d+)[,;]", kernels.source(module))
    assert found, f"{module}.cu has no constant {name}"
    return int(found[1])


def _row(x: Array, axis: int = 0) -> int:
    """Elements from one row, x[n] or x[:, n], to the next; within a row the array must be dense."""
    size = x.itemsize
    for a in range(x.ndim - 1, axis, -1):
        if x.shape[a] > 1 and x.strides[a] != size:
            raise ValueError(f"rows must be dense: shape {x.shape}, strides {x.strides} bytes")
        size *= x.shape[a]
    return int(x.strides[axis] // x.itemsize)


def _batch_row(x: Array) -> tuple[int, int]:
    """Elements between sequences and between positions of a (B,T,heads,D) array."""
    return int(x.strides[0] // x.itemsize), _row(x, 1)


# Embedding


def embedding_fwd(y: Array, ids: Array, w: Array) -> None:
    """See reference.py."""
    n, c = y.shape
    v = _vector((c * y.itemsize,), y, w)
    x = min(256, round_up(c * y.itemsize // 16 if v else c, 32))
    _run(
        "embedding",
        "embedding_fwd_v" if v else "embedding_fwd_1",
        y,
        (ceil_div(n, 256 // x),),
        (x, 256 // x),
        *(y, ids, w, n, c),
    )


def embedding_bwd(dw: Array, dy: Array, ids: Array) -> None:
    """See reference.py."""
    n, c = dy.shape
    threads = _constant("embedding", "RANK_THREADS")
    blocks = ceil_div(n, threads * _constant("embedding", "RANK_EACH"))
    slice_ = round_up(ceil_div(n, max(1, 2 * BLOCKS // blocks)), threads)
    slices, tiles = ceil_div(n, slice_), ceil_div(n, _constant("embedding", "TILE"))
    part = machine.scratch((slices, n), "int32", 0)
    order, ordered = machine.scratch((n,), "int32", 1), machine.scratch((n,), "int32", 2)
    carry = machine.scratch((tiles, 2, c), "float32", 3)
    _run("embedding", "embedding_rank", dy, (blocks, slices), (threads,), part, ids, n, slice_)
    _run("embedding", "embedding_sort", dy, (ceil_div(n, 256),), (256,), order, ordered, part, ids, n, slices)
    v = _vector((c * dy.itemsize,), dw, dy)
    pieces = c * dy.itemsize // 16 if v else c
    x = min(256, round_up(pieces, 32))
    _run(
        "embedding",
        "embedding_bwd_v" if v else "embedding_bwd_1",
        dy,
        (tiles, ceil_div(pieces, x)),
        (x,),
        *(dw, carry, dy, order, ordered, n, c),
    )
    if tiles > 1:
        x = min(256, round_up(c, 32))
        _run("embedding", "embedding_add", dy, (tiles - 1, ceil_div(c, x)), (x,), dw, carry, ordered, n, c)


# Biases


def add_rows(db: Array, dy: Array) -> None:
    """db += sum_n dy[n].  db (O,) float32, dy (N,O) whose rows may be apart"""
    n, o = dy.shape
    row = _row(dy)
    v = _vector((o * dy.itemsize, row * dy.itemsize), dy)
    columns = ceil_div(o * dy.itemsize // 16 if v else o, 32)
    parts = max(1, min(ceil_div(n, 32), 2 * BLOCKS // columns))
    partial = machine.scratch((parts, o), "float32", 0)
    _run("bias", "bias_bwd_v" if v else "bias_bwd_1", dy, (columns, parts), (32, 8), partial, dy, row, n, o)
    _run("bias", "bias_add", dy, (ceil_div(o, 32),), (32, 32), db, partial, parts, o)


# Matrices under adapters


def adapted(out: Array, w: Array, b: Array | None, a: Array | None, factor: float) -> None:
    """See reference.py."""
    _adapted("adapted", out, (w,), b, a, factor)


def adapted_int8(out: Array, w: Array, row: Array, b: Array | None, a: Array | None, factor: float) -> None:
    """See reference.py."""
    _adapted("adapted_int8", out, (w, row), b, a, factor)


def _adapted(
    op: str, out: Array, w: tuple[Array, ...], b: Array | None, a: Array | None, factor: float
) -> None:
    rows, columns = out.shape
    v = _vector((columns * w[0].itemsize,), out, w[0], a)
    pieces = columns * out.itemsize // 16 if v else columns
    rank = 0 if b is None else b.shape[1]
    args = out, *w, b, a, factor, rows, columns, rank
    if v and 0 < rank <= _constant("adapted", "FEW"):
        quads = ceil_div(columns, _constant("adapted", "QUAD"))
        threads = min(128, round_up(quads, 32))
        many = ceil_div(quads, threads)
        most = _constant("adapted", "MOST_ROWS")
        # as few blocks as fill the GPU: each reads a
        each = next((n for n in (most, most // 2) if many * ceil_div(rows, n) >= BLOCKS), most // 4)
        _run("adapted", op + "_few", out, (many, ceil_div(rows, each)), (threads,), *args, each)
        return
    threads = min(128, round_up(pieces, 32))
    grid = ceil_div(pieces, threads), ceil_div(rows, _constant("adapted", "ROWS"))
    _run("adapted", op + ("_v" if v else "_1"), out, grid, (threads,), *args)


# The residual stream


def add(out: Array, a: Array, b: Array) -> None:
    """See reference.py."""
    v = _vector((), out, a, b)
    each = 256 * (16 // out.itemsize if v else 1)
    _run("flat", "add_v" if v else "add_1", out, (ceil_div(out.size, each),), (256,), out, a, b, out.size)


# Dropout


def dropout(out: Array, x: Array, counters: Array, seed: int, module: int, p: float, factor: float) -> None:
    """See reference.py."""
    b, n = len(x), x[0].size
    v = _vector((n * x.itemsize,), out, x)
    each = DROPOUT_THREADS * (16 // x.itemsize if v else 1)
    _run(
        "dropout",
        "dropout_v" if v else "dropout_1",
        x,
        (ceil_div(n, each), min(b, MAX_GRID_Y)),
        (DROPOUT_THREADS,),
        *(out, x, counters, (seed + 2**63) % 2**64 - 2**63, module, least_kept(p), factor / (1 - p), n, b),
    )


# Normalisation


def _norm(c: int, x: Array, *others: Array) -> tuple[str, int]:
    """(suffix, threads of a row) of add_rmsnorm for rows of c elements."""
    held = _constant("norm", "PACKS") * 16 // x.itemsize
    threads = max(32, round_up(ceil_div(c, held), 32))
    if threads <= _constant("norm", "MOST_THREADS") and _vector((c * x.itemsize,), x, *others):
        return "_v", threads
    return "_1", min(1024, round_up(c, 32))


def add_rmsnorm_fwd(
    res: Array, y: Array, rstd: Array, res_in: Array, delta: Array | None, w: Array, eps: float
) -> None:
    """See reference.py."""
    n, c = res.shape
    suffix, threads = _norm(c, res, y, res_in, delta, w)
    rows = 4 if threads == 32 and suffix == "_v" else 1
    _run(
        "norm",
        "add_rmsnorm_fwd" + suffix,
        res,
        (ceil_div(n, rows),),
        (threads, rows),
        *(res, y, rstd, res_in, delta, w, eps, n, c),
    )


def add_rmsnorm_bwd(dres: Array, dw: Array | None, dy: Array, res: Array, rstd: Array, w: Array) -> None:
    """See reference.py."""
    n, c = res.shape
    suffix, threads = _norm(c, res, dres, dy, w)
    rows = 8 if threads == 32 and suffix == "_v" else 1
    blocks = min(ceil_div(n, rows), BLOCKS * max(1, 256 // (threads * rows)))
    partial = machine.scratch((blocks, c), "float32", 0)
    _run(
        "norm",
        "add_rmsnorm_bwd" + suffix,
        res,
        (blocks,),
        (threads, rows),
        *(dres, partial, dy, res, rstd, w, n, c),
    )
    if dw is not None:
        _run("norm", "norm_add", res, (ceil_div(c, 32),), (32, 32), dw, partial, blocks, c)


def _head_norm(d: int, w: Array, *others: Array) -> tuple[str, int]:
    """(suffix, threads of a head) of head_rmsnorm."""
    v = _vector((d * w.itemsize, *(_row(x) * x.itemsize for x in others)), w, *others)
    each, most = _constant("norm", "EACH_HEAD"), _constant("norm", "MOST_THREADS" if v else "FEW_THREADS")
    if d > most * each:
        raise ValueError(f"heads of {d} elements; at most {most * each} are possible")
    threads = 1
    while threads * each < d:
        threads *= 2
    return "_v" if v else "_1", threads


def head_rmsnorm_fwd(y: Array, rstd: Array, x: Array, w: Array, eps: float) -> None:
    """See reference.py."""
    n, heads, d = x.shape
    suffix, threads = _head_norm(d, w, y, x)
    rows = 128 // threads if threads <= 32 else 1
    _run(
        "norm",
        "head_rmsnorm_fwd" + suffix,
        x,
        (ceil_div(n * heads, rows),),
        (threads, rows),
        *(y, rstd, x, w, eps, _row(y), _row(rstd), _row(x), n, heads, d),
    )


def head_rmsnorm_bwd(dx: Array, dw: Array | None, dy: Array, x: Array, rstd: Array, w: Array) -> None:
    """See reference.py."""
    n, heads, d = x.shape
    suffix, threads = _head_norm(d, w, dx, dy, x)
    rows = 256 // threads if threads <= 32 else 1
    blocks = min(ceil_div(n * heads, rows), 2 * BLOCKS)
    partial = machine.scratch((blocks, d), "float32", 0)
    _run(
        "norm",
        "head_rmsnorm_bwd" + suffix,
        x,
        (blocks,),
        (threads, rows),
        *(dx, partial, dy, x, rstd, w, _row(dx), _row(dy), _row(x), _row(rstd), n, heads, d),
    )
    if dw is not None:
        _run("norm", "norm_add", x, (ceil_div(d, 32),), (32, 32), dw, partial, blocks, d)


# Attention


def rope(x: Array, cos: Array, sin: Array, sign: int) -> None:
    """See reference.py."""
    b, t, heads, d = x.shape
    batch, row = _batch_row(x)
    v = _vector((d // 2 * x.itemsize, batch * x.itemsize, row * x.itemsize), x, cos, sin)
    groups = ceil_div(heads, _constant("rope", "HEADS"))
    threads = b * t * groups * (d // 2 * x.itemsize // 16 if v else d // 2)
    _run(
        "rope",
        "rope_v" if v else "rope_1",
        x,
        (ceil_div(threads, 256),),
        (256,),
        *(x, cos, sin, batch, row, b, t, heads, d, sign),
    )


def _attention(d: int, tiles: int) -> tuple[int, int, int]:
    """(MAX_D, rows of a tile, bytes of shared memory for so many tiles) of attention.cu."""
    bound = next((m for m in (64, 128, 256) if d <= m), 0)
    if not bound:
        raise ValueError(f"heads of {d} elements; at most 256 are possible")
    tile = 4096 // bound
    return bound, tile, 4 * tile * (tiles * 4 * (ceil_div(d, 4) | 1) + 4 * (tile // 4 | 1))


def attention_fwd(
    y: Array, lse: Array, q: Array, k: Array, v: Array, doc_start: Array | None, window: int
) -> None:
    """See reference.py; on CUDA cores, for any head width up to 256."""
    (b, t, h, d), (s, kv) = q.shape, k.shape[1:3]
    bound, tile, shared = _attention(d, 3)
    strides = [n for x in (y, q, k, v) for n in _batch_row(x)]
    machine.kernel("attention", "attention_fwd", q.dtype.name, MAX_D=bound)(
        (ceil_div(t, tile) * h * b,),
        (16, 16),
        (y, lse, q, k, v, doc_start, *strides, b, t, s, h, kv, d, window, d**-0.5),
        shared=shared,
    )


def attention_bwd(
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
    """See reference.py; on CUDA cores, for any head width up to 256."""
    (b, t, h, d), (s, kv) = q.shape, k.shape[1:3]
    bound, tile, shared = _attention(d, 4)
    at = {name: _batch_row(x) for name, x in dict(dq=dq, dk=dk, dv=dv, dy=dy, y=y, q=q, k=k, v=v).items()}
    sizes = (b, t, s, h, kv, d, window, d**-0.5)
    delta = machine.scratch((b, h, t), "float32", 0)
    strides = [n for name in ("dq", "dy", "y", "q", "k", "v") for n in at[name]]
    machine.kernel("attention", "attention_dq", q.dtype.name, MAX_D=bound)(
        (ceil_div(t, tile) * h * b,),
        (16, 16),
        (dq, delta, dy, y, lse, q, k, v, doc_start, *strides, *sizes),
        shared=shared,
    )
    strides = [n for name in ("dk", "dv", "dy", "q", "k", "v") for n in at[name]]
    machine.kernel("attention", "attention_dkv", q.dtype.name, MAX_D=bound)(
        (ceil_div(s, tile) * kv * b,),
        (16, 16),
        (dk, dv, dy, lse, delta, q, k, v, doc_start, *strides, *sizes),
        shared=shared,
    )


# Ops of rows


def _by_rows(module: str, op: str) -> Callable[..., None]:
    """The launcher of an op on arrays (N,F) and (N,2F): a block has one row."""
    arguments = OPS[op].arguments
    row = next(i for i, a in enumerate(arguments) if len(a.axes) == 2 and a.axes[1].isalpha())

    def launch(*arrays: Array) -> None:
        n, f = arrays[row].shape
        size = arrays[row].itemsize
        v = _vector((f * size,), *arrays)
        pieces = f * size // 16 if v else f
        threads = round_up(ceil_div(pieces, ceil_div(pieces, 512)), 32)
        _run(module, op + ("_v" if v else "_1"), arrays[row], (n,), (threads,), *arrays, f)

    parameters = [Parameter(a.name, Parameter.POSITIONAL_OR_KEYWORD) for a in arguments]
    launch.__name__, vars(launch)["__signature__"] = op, Signature(parameters)
    return launch


globals().update({op: _by_rows(module, op) for op, module in kernels.launched_by_rows().items()})


# Loss


def has_long_rows(vocab: int, itemsize: int) -> bool:
    """Tell rows of logits that a cluster of blocks works on, where a GPU has such, from those of one block."""
    return vocab * itemsize // 16 >= CLUSTER_PACKS * _constant("loss_cluster", "CLUSTER")


def cross_entropy(loss: Array, logits: Array, targets: Array, scale: Any, z_loss: float) -> None:
    """See reference.py. An array is read by the launch, not here, so that one that is recorded may read another value."""
    number, at = (0.0, scale) if hasattr(scale, "shape") else (scale or 0.0, None)
    n, vocab = logits.shape
    v = _vector((_row(logits) * logits.itemsize,), logits)
    pack = 16 if v else logits.itemsize  # bytes
    pieces = max(1, vocab * logits.itemsize // pack)
    more = (int(scale is not None), number, at, z_loss)
    if v and machine.clusters and has_long_rows(vocab, logits.itemsize):
        module, blocks = "loss_cluster", _constant("loss_cluster", "CLUSTER")
        _run(
            module,
            "cross_entropy_cluster",
            logits,
            (blocks * n,),
            (_constant(module, "CLUSTER_THREADS"),),
            *(loss, logits, targets, _row(logits), vocab, *more),
            shared=_constant(module, "SUM_BYTES"),
        )
        return
    held = 0 if scale is None else min(pieces, (machine.shared_bytes - SHARED_STATIC) // pack)
    _run(
        "loss",
        "cross_entropy_v" if v else "cross_entropy_1",
        logits,
        (n,),
        (min(1024, round_up(pieces, 32)),),
        *(loss, logits, targets, _row(logits), vocab, held, *more),
        shared=held * pack,
    )


# Flat buffers


def add_sum(total: Array, x: Array) -> None:
    """See reference.py."""
    if x.dtype == np.float64:
        machine.kernel("flat", "sum_add", "float32")((1,), (1024,), (total, x, x.size))
        return
    blocks = min(SUM_BLOCKS, ceil_div(x.size, 1024))
    partial = machine.scratch((blocks,), "float64", 0)
    _run("flat", "sum_v" if _vector((), x) else "sum_1", x, (blocks,), (256,), partial, x, x.size)
    _run("flat", "sum_add", x, (1,), (1024,), total, partial, blocks)


def add_sum_sq(total: Array, x: Array) -> None:
    """See reference.py."""
    if x.ndim == 2:
        _squares(total, x, x.shape[1], 1)
        return
    tile = square_tiles["float32"][0]
    tiles = ceil_div(x.size, tile)
    partial = machine.scratch((tiles,), "float64", 0)
    _squares(partial, x, tile, 0)
    _run("flat", "sum_add", x, (1,), (1024,), total, partial, tiles)


def _squares(partial: Array, x: Array, row: int, adds: int) -> None:
    """partial[b] += sum of x^2, or = without adds, over the b-th `row` elements."""
    width = (4 if row == square_tiles["float32"][1] else 8) if _vector((4 * row,), x) else 1
    blocks = (ceil_div(x.size, row),)
    machine.kernel("flat", f"squares_{width}", "float32")(blocks, (256,), (partial, x, x.size, row, adds))


def clip_factor(factor: Array, sum_sq: Array, max_norm: float) -> None:
    """See reference.py."""
    high = float(np.float32(max_norm))
    rest = 0.0 if high == inf else max_norm - high
    machine.kernel("flat", "clip_factor", "float32")((1,), (1,), (factor, sum_sq, high, rest))


def adamw(
    w: Array,
    master: Array,
    m: Array,
    v: Array,
    square: Array,
    g: Array,
    factor: Array,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    step: int,
) -> None:
    """See reference.py."""
    vector = _vector((), w, master, m, v, g)
    blocks = ceil_div(w.size, 256 * (16 // w.itemsize if vector else 1))
    partial = machine.scratch((blocks,), "float64", 0)
    numbers = (lr, 1 - beta1, 1 - beta2, 1 - beta1**step, 1 - beta2**step, eps, decay)
    _run(
        "flat",
        "adamw_v" if vector else "adamw_1",
        w,
        (blocks,),
        (256,),
        *(w, master, m, v, partial, g, factor, w.size, *numbers),
    )
    _run("flat", "sum_add", w, (1,), (1024,), square, partial, blocks)
