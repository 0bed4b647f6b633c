# mypy: ignore-errors
"""Attention by blocks of 32 queries and 32 keys: of bfloat16, with the products of tiled.py or of products.py, and of float32.

In bfloat16, as on a GPU, p without its divisor, and in backward p and ds, are rounded for their second products; sums are
float32. What a sum adds, and in which order, depends on the sequence alone. The functions here are bound to one kind of products
and compiled by its module: `block` multiplies (see amx.tile_block), `begin` and `end` stand around its uses.
"""

from types import FunctionType

import numpy as np
from numba import njit, prange

from .kernels import _kernel, _row, _zero
from .order import column_block, pair_block, row_block, turn, turned_block
from .softmax import (
    LOG2_E,
    dot_blocks,
    exponentials,
    finish_rows,
    gradients,
    put_half,
    raise_tops,
    sum_rows,
    top_rows,
)
from .tiles import BLOCK_BYTES, EDGE, LINE, SUMS_BYTES

PARTS_BYTES = 4 * EDGE * 16  # of sums in 16 parts for each query
CHUNK = 4  # blocks of queries whose p and ds wait for the sums over queries
SIZE = 2  # bytes of an element
UNIT = LOG2_E  # of a kind's exponents, for one nat
block = block_turned = begin = end = None  # of a kind of products: see bound()


@njit(inline="always")
def _aligned(address):
    return (address + LINE - 1) // LINE * LINE


@njit(inline="always")
def _first(doc_start, b, i, past, window):
    """First key that query i sees."""
    first = max(0, past + i - window + 1) if window > 0 else 0
    return max(first, np.int64(doc_start[b, i])) if doc_start.size > 0 else first


@njit(inline="always")
def _first_block(doc_start, b, i, past, window):
    return _first(doc_start, b, i, past, window) // EDGE


@njit(inline="always")
def _last_block(last, past):
    """Behind the last block of keys that queries up to `last` see."""
    return (past + last) // EDGE + 1


@njit(error_model="numpy")
def _put_masks(like, to, starts, stops, rows, lo, hi):
    """For blocks lo..hi of keys: 32 words each, bit k of word r set where query r of the block sees key k of the block."""
    inner_from = (starts[rows - 1] + EDGE - 1) // EDGE  # all queries see all keys of the blocks from here
    inner_to = stops[0] // EDGE if rows == EDGE else 0
    for j in range(lo, hi):
        words = _row(like, to + 4 * EDGE * (j - lo), EDGE)
        if inner_from <= j < inner_to:
            for r in range(EDGE):
                words[r] = np.uint32(0xFFFFFFFF)
        else:
            for r in range(EDGE):
                a = min(np.int64(EDGE), max(np.int64(0), starts[r] - j * EDGE))
                z = min(np.int64(EDGE), max(np.int64(0), stops[r] - j * EDGE))
                one = np.uint64(1)
                words[r] = np.uint32(((one << np.uint64(z)) - one) & ~((one << np.uint64(a)) - one))


@njit(error_model="numpy")
def _put_bounds(starts, stops, doc_start, b, i0, rows, past, window):
    """First key of each query of a block and the one behind its last; none for queries behind the end."""
    for r in range(rows):
        starts[r] = _first(doc_start, b, i0 + r, past, window)
        stops[r] = past + i0 + r + 1
    for r in range(rows, EDGE):
        starts[r] = stops[r] = 0


@njit(error_model="numpy")
def put_rows(like, floats, to, stride, sums, factors, rows, width):
    """Write `rows` rows of `width` elements of a block of sums, row r times the r-th of factors."""
    if width % 16 == 0:
        for h in range(0, width, 16):
            put_half(
                np.uintp(to + 2 * h),
                np.int64(stride),
                np.uintp(sums + 4 * h),
                np.uintp(factors),
                np.int64(rows),
            )
    else:
        by = _row(floats, factors, EDGE)
        for r in range(rows):
            own, some = _row(like, to + r * stride, width), _row(floats, sums + 4 * EDGE * r, width)
            for e in range(width):
                own[e] = some[e] * by[r]


@njit(error_model="numpy")
def _put_turned(like, floats, to, stride, sums, spare, height, width, scale):
    """Write the transpose of a block of sums, times scale: `height` rows of `width` elements."""
    for a in range(2):
        for b in range(2):
            turn(
                np.uintp(spare + 1024 * (2 * b + a)),
                np.uintp(sums + 64 * EDGE * a + 64 * b),
                np.int64(4 * EDGE),
            )
    for r in range(height):
        at = spare + 2048 * (r // 16) + 64 * (r % 16)
        one, two, own = _row(floats, at, 16), _row(floats, at + 1024, 16), _row(like, to + r * stride, width)
        for e in range(min(16, width)):
            own[e] = one[e] * scale
        for e in range(16, width):
            own[e] = two[e - 16] * scale


def forward(y, lse, q, k, v, doc_start, window, threads, config):
    """See attention_fwd of reference.py; doc_start has no elements where there are no borders."""
    nb, nt, nh, d = q.shape
    ns, nk = k.shape[1], k.shape[2]
    past, db, sb = ns - nt, (d + EDGE - 1) // EDGE, (ns + EDGE - 1) // EDGE
    scale, factor = np.float32(1 / np.sqrt(d)), np.float32(UNIT / np.sqrt(d))
    py, pq, pk, pv = y.ctypes.data, q.ctypes.data, k.ctypes.data, v.ctypes.data
    # Query heads that share keys follow each other, where threads have enough to do.
    parts = 1 if nb * nk >= 2 * threads else nh // nk
    heads = nh // nk // parts
    for at in prange(nb * nk * parts):
        b, h0 = at // (nk * parts), at % (nk * parts) * heads
        kv = h0 * nk // nh
        room = np.empty((2 * sb * db + db + sb + 1) * BLOCK_BYTES // 2 + LINE, np.uint16)
        keys = _aligned(room.ctypes.data)
        values = keys + sb * db * BLOCK_BYTES
        queries = values + sb * db * BLOCK_BYTES
        probs = queries + db * BLOCK_BYTES
        spare = probs + sb * BLOCK_BYTES
        floats = np.empty((sb + 1) * EDGE * EDGE + 32 * EDGE + 3 * EDGE + LINE, np.float32)
        scores = _aligned(floats.ctypes.data)
        sums = scores + sb * SUMS_BYTES
        tops = sums + SUMS_BYTES  # of 16 keys at a time
        totals = tops + PARTS_BYTES
        top = totals + PARTS_BYTES
        inverse = top + 4 * EDGE
        log_sums = inverse + 4 * EDGE
        words = np.empty(sb * EDGE + LINE, np.uint32)
        masks = _aligned(words.ctypes.data)
        starts, stops = np.empty(EDGE, np.int64), np.empty(EDGE, np.int64)
        for j in range(sb):
            for c in range(db):
                height, width = min(EDGE, ns - j * EDGE), min(EDGE, d - c * EDGE)
                of_k = pk + b * k.strides[0] + j * EDGE * k.strides[1] + kv * k.strides[2] + SIZE * EDGE * c
                of_v = pv + b * v.strides[0] + j * EDGE * v.strides[1] + kv * v.strides[2] + SIZE * EDGE * c
                column_block(k, keys + (j * db + c) * BLOCK_BYTES, of_k, k.strides[1], height, width, spare)
                pair_block(v, values + (c * sb + j) * BLOCK_BYTES, of_v, v.strides[1], height, width, 16)
        begin(np.uintp(config.ctypes.data))
        for i0 in range(0, nt, EDGE):
            rows = min(EDGE, nt - i0)
            lo, hi = _first_block(doc_start, b, i0, past, window), _last_block(i0 + rows - 1, past)
            _put_bounds(starts, stops, doc_start, b, i0, rows, past, window)
            _put_masks(words, masks, starts, stops, rows, lo, hi)
            for h in range(h0, h0 + heads):
                for c in range(db):
                    of_q = pq + b * q.strides[0] + i0 * q.strides[1] + h * q.strides[2] + SIZE * EDGE * c
                    row_block(q, queries + c * BLOCK_BYTES, of_q, q.strides[1], rows, min(EDGE, d - c * EDGE))
                for j in range(lo, hi):
                    to, seen = np.uintp(scores + (j - lo) * SUMS_BYTES), masks + 4 * EDGE * (j - lo)
                    block(to, np.uintp(queries), np.uintp(keys + j * db * BLOCK_BYTES), d, EDGE, False)
                    raise_tops(np.uintp(tops), to, np.uintp(seen), np.int64(j > lo))
                top_rows(np.uintp(top), np.uintp(tops))
                for j in range(lo, hi):
                    to, own = (
                        np.uintp(probs + (j - lo) * BLOCK_BYTES),
                        np.uintp(scores + (j - lo) * SUMS_BYTES),
                    )
                    seen, goes_on = np.uintp(masks + 4 * EDGE * (j - lo)), np.int64(j > lo)
                    exponentials(to, np.uintp(totals), own, seen, np.uintp(top), factor, goes_on)
                finish_rows(np.uintp(inverse), np.uintp(log_sums), np.uintp(top), np.uintp(totals), scale)
                own_lse = _row(floats, log_sums, rows)
                for r in range(rows):
                    lse[b, h, i0 + r] = own_lse[r]
                for c in range(db):
                    of_v = np.uintp(values + (c * sb + lo) * BLOCK_BYTES)
                    width = min(EDGE, d - c * EDGE)
                    block(np.uintp(sums), np.uintp(probs), of_v, (hi - lo) * EDGE, width, False)
                    of_y = py + b * y.strides[0] + i0 * y.strides[1] + h * y.strides[2] + SIZE * EDGE * c
                    put_rows(y, floats, of_y, y.strides[1], sums, inverse, rows, width)
        end()
        room[0] = 0  # Numba frees an array after its last use, and does not see those of its address
        floats[0] = 0
        words[0] = 0


def backward(dq, dk, dv, dy, y, lse, q, k, v, doc_start, window, config):
    """See attention_bwd of reference.py."""
    nb, nt, nh, d = q.shape
    ns, nk = k.shape[1], k.shape[2]
    past, group, db, sb = ns - nt, nh // nk, (d + EDGE - 1) // EDGE, (ns + EDGE - 1) // EDGE
    scale, factor = np.float32(1 / np.sqrt(d)), np.float32(UNIT / np.sqrt(d))
    pdq, pdk, pdv, pdy, py = dq.ctypes.data, dk.ctypes.data, dv.ctypes.data, dy.ctypes.data, y.ctypes.data
    pq, pk, pv = q.ctypes.data, k.ctypes.data, v.ctypes.data
    for at in prange(nb * nk):  # a key/value head belongs to one thread: its sums have one order
        b, kv = at // nk, at % nk
        size = 3 * sb * db + 2 * db + 1 + 2 * CHUNK * db + sb + 2 * CHUNK * sb
        room = np.empty(size * BLOCK_BYTES // 2 + LINE, np.uint16)
        keys = _aligned(room.ctypes.data)  # as columns
        values = keys + sb * db * BLOCK_BYTES
        key_terms = values + sb * db * BLOCK_BYTES
        queries = key_terms + sb * db * BLOCK_BYTES
        grads = queries + db * BLOCK_BYTES  # dy
        results = grads + db * BLOCK_BYTES  # a block of y
        queries_turned = results + BLOCK_BYTES
        grads_turned = queries_turned + CHUNK * db * BLOCK_BYTES
        ds_rows = grads_turned + CHUNK * db * BLOCK_BYTES
        ds_pairs = ds_rows + sb * BLOCK_BYTES
        p_pairs = ds_pairs + CHUNK * sb * BLOCK_BYTES
        floats = np.empty((2 * sb * db + 4) * EDGE * EDGE + 16 * EDGE + 3 * EDGE + LINE, np.float32)
        dk_sums = _aligned(floats.ctypes.data)
        dv_sums = dk_sums + sb * db * SUMS_BYTES
        scores = dv_sums + sb * db * SUMS_BYTES
        dprobs = scores + SUMS_BYTES
        sums = dprobs + SUMS_BYTES
        spare = sums + SUMS_BYTES
        dot_parts = spare + SUMS_BYTES
        dots = dot_parts + PARTS_BYTES
        logs = dots + 4 * EDGE
        scales = logs + 4 * EDGE
        log_row, scale_row = _row(floats, logs, EDGE), _row(floats, scales, EDGE)
        for r in range(EDGE):
            scale_row[r] = scale
        words = np.empty(sb * EDGE + LINE, np.uint32)
        masks = _aligned(words.ctypes.data)
        starts, stops = np.empty(EDGE, np.int64), np.empty(EDGE, np.int64)
        _zero(_row(floats, dk_sums, 2 * sb * db * EDGE * EDGE))
        for j in range(sb):
            for c in range(db):
                height, width = min(EDGE, ns - j * EDGE), min(EDGE, d - c * EDGE)
                of_k = pk + b * k.strides[0] + j * EDGE * k.strides[1] + kv * k.strides[2] + SIZE * EDGE * c
                of_v = pv + b * v.strides[0] + j * EDGE * v.strides[1] + kv * v.strides[2] + SIZE * EDGE * c
                column_block(k, keys + (j * db + c) * BLOCK_BYTES, of_k, k.strides[1], height, width, spare)
                column_block(v, values + (j * db + c) * BLOCK_BYTES, of_v, v.strides[1], height, width, spare)
                pair_block(k, key_terms + (c * sb + j) * BLOCK_BYTES, of_k, k.strides[1], height, width, 16)
        begin(np.uintp(config.ctypes.data))
        for h in range(kv * group, kv * group + group):
            for chunk in range(0, nt, CHUNK * EDGE):
                count = (min(nt - chunk, CHUNK * EDGE) + EDGE - 1) // EDGE
                for ib in range(count):
                    i0 = chunk + ib * EDGE
                    rows = min(EDGE, nt - i0)
                    for c in range(db):
                        width, column = min(EDGE, d - c * EDGE), SIZE * EDGE * c
                        of_q = pq + b * q.strides[0] + i0 * q.strides[1] + h * q.strides[2] + column
                        of_dy = pdy + b * dy.strides[0] + i0 * dy.strides[1] + h * dy.strides[2] + column
                        of_y = py + b * y.strides[0] + i0 * y.strides[1] + h * y.strides[2] + column
                        own = grads + c * BLOCK_BYTES
                        row_block(q, queries + c * BLOCK_BYTES, of_q, q.strides[1], rows, width)
                        row_block(dy, own, of_dy, dy.strides[1], rows, width)
                        row_block(y, results, of_y, y.strides[1], rows, width)
                        dot_blocks(np.uintp(dot_parts), np.uintp(results), np.uintp(own), np.int64(c > 0))
                        turned = (c * CHUNK + ib) * BLOCK_BYTES
                        turned_block(q, queries_turned + turned, of_q, q.strides[1], rows, width, spare)
                        turned_block(dy, grads_turned + turned, of_dy, dy.strides[1], rows, width, spare)
                    sum_rows(np.uintp(dots), np.uintp(dot_parts))
                    for r in range(rows):
                        log_row[r] = lse[b, h, i0 + r] * np.float32(-UNIT)
                    for r in range(rows, EDGE):
                        log_row[r] = 0
                    lo, hi = _first_block(doc_start, b, i0, past, window), _last_block(i0 + rows - 1, past)
                    _put_bounds(starts, stops, doc_start, b, i0, rows, past, window)
                    _put_masks(words, masks, starts, stops, rows, lo, hi)
                    for j in range(lo, hi):
                        operand, pairs = j * db * BLOCK_BYTES, (j * CHUNK + ib) * BLOCK_BYTES
                        block(np.uintp(scores), np.uintp(queries), np.uintp(keys + operand), d, EDGE, False)
                        block(np.uintp(dprobs), np.uintp(grads), np.uintp(values + operand), d, EDGE, False)
                        gradients(
                            np.uintp(ds_rows + (j - lo) * BLOCK_BYTES),
                            np.uintp(ds_pairs + pairs),
                            np.uintp(p_pairs + pairs),
                            np.uintp(scores),
                            np.uintp(dprobs),
                            np.uintp(masks + 4 * EDGE * (j - lo)),
                            np.uintp(logs),
                            np.uintp(dots),
                            factor,
                        )
                    for c in range(db):
                        of_k = np.uintp(key_terms + (c * sb + lo) * BLOCK_BYTES)
                        width = min(EDGE, d - c * EDGE)
                        block(np.uintp(sums), np.uintp(ds_rows), of_k, (hi - lo) * EDGE, width, False)
                        of_dq = (
                            pdq + b * dq.strides[0] + i0 * dq.strides[1] + h * dq.strides[2] + SIZE * EDGE * c
                        )
                        put_rows(dq, floats, of_dq, dq.strides[1], sums, scales, rows, width)
                # Blocks of queries that see a block of keys follow each other.
                first, last = 0, 0
                for j in range(_first_block(doc_start, b, chunk, past, window), sb):
                    while first < count and _last_block(min(nt, chunk + (first + 1) * EDGE) - 1, past) <= j:
                        first += 1
                    while last < count and _first_block(doc_start, b, chunk + last * EDGE, past, window) <= j:
                        last += 1
                    for c in range(db if first < last else 0):
                        place, left = (c * sb + j) * SUMS_BYTES, (c * CHUNK + first) * BLOCK_BYTES
                        right, n = (j * CHUNK + first) * BLOCK_BYTES, (last - first) * EDGE
                        to_dk, to_dv = np.uintp(dk_sums + place), np.uintp(dv_sums + place)
                        of_q, of_dy = np.uintp(queries_turned + left), np.uintp(grads_turned + left)
                        height = min(EDGE, d - c * EDGE)
                        block_turned(to_dk, of_q, np.uintp(ds_pairs + right), n, height, True)
                        block_turned(to_dv, of_dy, np.uintp(p_pairs + right), n, height, True)
        end()
        for j in range(sb):
            for c in range(db):
                place, height, width = (
                    (c * sb + j) * SUMS_BYTES,
                    min(EDGE, ns - j * EDGE),
                    min(EDGE, d - c * EDGE),
                )
                of_dk = (
                    pdk + b * dk.strides[0] + j * EDGE * dk.strides[1] + kv * dk.strides[2] + SIZE * EDGE * c
                )
                of_dv = (
                    pdv + b * dv.strides[0] + j * EDGE * dv.strides[1] + kv * dv.strides[2] + SIZE * EDGE * c
                )
                one = np.float32(1)
                _put_turned(dk, floats, of_dk, dk.strides[1], dk_sums + place, spare, height, width, scale)
                _put_turned(dv, floats, of_dv, dv.strides[1], dv_sums + place, spare, height, width, one)
        room[0] = 0  # keeps it alive until here, as in forward
        floats[0] = 0
        words[0] = 0


_IN, _SEEN = "act[:,:,:,:]", "int32[:,::1], int64, uint8[::1]"
_SIGNATURES = {
    forward: f"void({_IN}, float32[:,:,::1], {_IN}, {_IN}, {_IN}, {_SEEN.replace('uint8', 'int64, uint8')})",
    backward: f"void({', '.join([_IN] * 5)}, float32[:,:,::1], {_IN}, {_IN}, {_IN}, {_SEEN})",
}


def bound(f, name, **products):
    """A copy of forward or of backward that multiplies with `block`; name: of this kind of products, for Numba's cache."""
    own = FunctionType(f.__code__, {**f.__globals__, **products}, f.__name__)
    own.__qualname__, own.__module__ = f"attention_{f.__name__}_{name}", f.__module__
    return own


def compiled(f, name, into, dtype="bfloat16", **products):
    """The kernel of bound(); `into` gets it with its signature."""
    return _kernel(_SIGNATURES[f], into=into, dtype=dtype)(bound(f, name, **products))
