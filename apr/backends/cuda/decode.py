"""Launch the ops of a decode step: one new token of each sequence, with lengths, positions and draws on the device.

Formulas and shapes stand in the kernels, decode_linear.cu, decode_attention.cu and decode_pick.cu. Nothing here reads from the
device, and every launch is the same whatever the lengths are, so that a step can be recorded once and launched again.
A launch is early: its kernel begins while the one before it is at work (kernels/decode.cuh). The bits of a sequence depend on its
tokens alone, not on the sequences beside it. Like ops.py, this needs neither CuPy nor a GPU.
"""

from __future__ import annotations

from typing import Any

from ...common.rounding import ceil_div, round_up
from . import ops

Array = Any
_constant = ops._constant
_LINEAR = "WARPS", "MOST_WARPS", "TILE", "STEP", "PAD"

MAX_TOKENS = 32  # of a launch of a linear map
BLOCKS = 264  # two on each multiprocessor of an H200
MAX_LANES = 16  # of a key
HEADS = 1, 4  # of a block of attention; the fewest with which at most FEW blocks are at work together
FEW = 64
LONG = 64  # steps of inputs, from which so many warps more share a tile
STAGED = 4  # tokens that are copied to shared memory first, where it holds them, and normalised on the way


def lacks(head_dim: int, dtype: str, *widths: int) -> str:
    """Name what the kernels cannot do of a model with linear maps of these inputs; "" where there is nothing."""
    pack = 16 // (2 if dtype == "bfloat16" else 4)
    if head_dim // (1 if head_dim % pack else pack) > MAX_LANES:
        return f"heads of {head_dim} elements are too wide for a recorded step in {dtype}"
    return next((f"rows of {n} elements are no multiple of 8" for n in widths if n % 8), "")


def work_arrays(
    rows: int, slots: int, heads: int, kv: int, head_dim: int
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of what attention and pick keep between launches; all begin as zeros."""
    keys, room = _keys(MAX_LANES), kv * round_up(heads // kv, max(HEADS))
    size = _constant("decode_pick", "BINS")
    return {
        "part": ((rows, room, ceil_div(slots, keys), head_dim + 2), "float32"),
        "arrived": ((rows, room), "int32"),
        "bins": ((rows, 2, size), "int64"),
        "sums": ((rows, 4), "int64"),
        "tops": ((rows, _constant("decode_pick", "SLICES")), "int64"),
    }


def _keys(lanes: int) -> int:
    """Slots of a block of attention."""
    return _constant("decode_attention", "TURNS") * _constant("decode_attention", "THREADS") // lanes


def linear(
    y: Array, x: Array, w: Any, b: Array | None = None, *, norm: Array | None = None, eps: float = 0.0,
    adds: bool = False, gated: bool = False, ahead: Any = None, made: bool = False,
) -> None:  # fmt: skip
    """y = round(x w^T + b) of x, or of its RMSNorm; adds: y = round(y + that); gated: y = silu(gate) * up of w (2F,K).

    y (N,O), x (N,K), w (O,K) an array, or an int8 matrix with q (O,K) and scale (O,). ahead: a matrix of w's kind that is
    read soon. made: w was written just before, so that no kernel may ask for it early."""
    for first in range(0, len(x), MAX_TOKENS):
        some = slice(first, first + MAX_TOKENS)
        _linear(y[some], x[some], w, b, norm, eps, adds, gated, ahead, made)


def _linear(
    y: Array,
    x: Array,
    w: Any,
    b: Array | None,
    norm: Array | None,
    eps: float,
    adds: bool,
    gated: bool,
    ahead: Any,
    made: bool,
) -> None:
    n, k = x.shape
    scale = getattr(w, "scale", None)
    matrix, ahead = (m if m is None or scale is None else m.q for m in (w, ahead))
    outputs = len(matrix) // (1 + gated)
    warps, most, tile, step, pad = (_constant("decode_linear", name) for name in _LINEAR)
    tiles = ceil_div(outputs, tile)
    if not gated and tiles < BLOCKS and k >= LONG * step:
        warps = most
    splits = next((s for s in (1, 2, 4) if tiles * s >= BLOCKS * warps), warps)
    sums, rows = warps * (1 + gated) * tile * 4, n * (k + pad) * x.itemsize
    tokens = 0 if n <= STAGED and 8 * sums + rows <= ops.machine.shared_bytes else ceil_div(n, 16)
    shared = 16 * tokens * sums if tokens else 8 * sums + rows
    if norm is not None and tokens:
        normed = ops.machine.scratch((n, k), x.dtype.name, "decode norm")
        rms_norm(normed, x, norm, eps)
        x, norm = normed, None
    name = ("decode_gated" if gated else "decode_linear") + ("" if scale is None else "_int8")
    kernel = ops.machine.kernel("decode_linear", name, x.dtype.name, TOKEN_TILES=tokens)
    later = 0 if ahead is None else ahead.size
    args = (y, x, matrix, scale, b, norm, ahead, later, eps, int(adds), n, outputs, k, splits)
    grid = (ceil_div(tiles * splits, warps),)
    kernel(grid, (32 * warps,), args, shared=shared, early=not made)


def rms_norm(y: Array, x: Array, w: Array, eps: float) -> None:
    """y = RMSNorm of x.  y, x (N,K), w (K,)"""
    n, k = x.shape
    threads = 32 * _constant("decode_linear", "WARPS")
    kernel = ops.machine.kernel("decode_linear", "decode_norm", x.dtype.name, TOKEN_TILES=0)
    kernel((n,), (threads,), (y, x, w, eps, k), early=True)


def rows(y: Array, ids: Array, w: Any) -> None:
    """y[n] = w[ids[n]].  w (V,K) an array, or an int8 matrix"""
    scale = getattr(w, "scale", None)
    if scale is None:
        ops.embedding_fwd(y, ids, w)
        return
    n, k = y.shape
    kernel = ops.machine.kernel("decode_linear", "decode_rows_int8", y.dtype.name, TOKEN_TILES=0)
    kernel((n,), (256,), (y, ids, w.q, scale, k))


def whole(w: Any, dtype: str) -> Array:
    """An int8 matrix (O,K) as activations, each rounded; it is there until the next one."""
    made = ops.machine.scratch(w.q.shape, dtype, "decode whole")
    ops.adapted_int8(made, w.q, w.scale, None, None, 0.0)
    return made


def attention(
    y: Array, keys: Array, values: Array, qk: Array, v: Array, norms: tuple[Any, Any], angles: tuple[Any, Any],
    positions: Array, part: Array, arrived: Array, heads: int, window: int, eps: float,
) -> None:  # fmt: skip
    """Put new keys and values into the cache, and attend to it.  y (N,H*D), keys, values (rows,slots,K,D); rest as the kernel"""
    n = len(y)
    slots, kv, d = keys.shape[1:]
    pack = 16 // y.itemsize
    name = "decode_attention_1" if d % pack else "decode_attention_v"
    lanes = 8 if d // (1 if d % pack else pack) <= 8 else MAX_LANES
    groups, most = next(
        (g, h) for h in HEADS if n * (g := kv * ceil_div(heads // kv, h)) <= FEW or h == max(HEADS)
    )
    width = _keys(lanes)
    warps = _constant("decode_attention", "THREADS") // 32
    shared = 4 * (most * d + most * width + 2 * most + warps * most * d)
    kernel = ops.machine.kernel("decode_attention", name, y.dtype.name, HEADS=most, LANES=lanes)
    arrays = (y, keys, values, qk, v, *norms, *angles, positions, part, arrived)
    numbers = (ops._row(qk), ops._row(v), slots, heads, kv, d, window, d**-0.5, eps)
    grid = part.shape[2], groups, n
    kernel(grid, (32 * warps,), (*arrays, *numbers), shared=shared, early=True)


def pick(
    tokens: Array, positions: Array, steps: Array, chosen: Array, seen: Array, work: tuple[Array, Array, Array], logits: Array,
    vocab: int, allowed: Array, draws: Array, options: Array, top_k: Array,
) -> None:  # fmt: skip
    """Draw the next token of each sequence from logits (N, vocab or more), and step on. work: bins, sums, tops; as the kernels"""
    bins, sums, tops = work
    n, act, row = len(logits), logits.dtype.name, ops._row(logits)
    slices, threads, size = (_constant("decode_pick", name) for name in ("SLICES", "SLICE_THREADS", "BINS"))
    of_row = seen, logits, allowed, options, row, vocab

    def launch(name: str, grid: tuple[int, ...], block: int, args: tuple[Any, ...], shared: int) -> None:
        ops.machine.kernel("decode_pick", name, act)(grid, (block,), args, shared=shared, early=True)

    launch("decode_tops", (slices, n), threads, (tops, *of_row), 0)
    launch("decode_weigh", (slices, n), threads, (bins, sums, tops, *of_row), 16 * size)
    state = tokens, positions, steps, chosen, seen, bins, sums, tops
    args = (*state, logits, allowed, draws, options, top_k, row, vocab, draws.shape[1])
    block = _constant("decode_pick", "THREADS")
    launch("decode_pick", (n,), block, args, 8 * (4 * size + _constant("decode_pick", "MOST")))
