# mypy: ignore-errors
"""Attention of bfloat16 by blocks of 32 queries and 32 keys, with the products of tiled.py or of products.py.

As on a GPU, p without its divisor, and in backward p and ds, are rounded to bfloat16 for their second products; sums are
float32. What a sum adds, and in which order, depends on the sequence alone. The functions here are bound to one kind of products
and compiled by its module: `block` multiplies (see amx.tile_block), `begin` and `end` stand around its uses.
"""

from types import FunctionType

import numpy as np
from numba import njit, prange

from .kernels import _bits, _exp, _float, _kernel, _ordered, _row, _zero
from .order import column_block, pair_block, row_block, turn, turned_block, zip_rounded
from .tiles import BLOCK_BYTES, EDGE, LINE

SUMS_BYTES = 4 * EDGE * EDGE
CHUNK = 4  # blocks of queries whose p and ds wait for the sums over queries
_MASKED = np.float32(-3e38)
block = begin = end = None  # of a kind of products: see bound()


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


@njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})
def _softmax(like, floats, scores, to, row, blocks, start, stop, scale):
    """Write exp(scale (s - top)) of a row of blocks of scores, 0 outside of start..stop; returns top and the sum."""
    top = np.int32(-0x7FFFFFFF)
    for j in range(blocks):
        s = _row(floats, scores + j * SUMS_BYTES + 4 * EDGE * row, EDGE)
        a, z = min(EDGE, max(0, start - j * EDGE)), max(0, min(EDGE, stop - j * EDGE))
        if a > 0 or z < EDGE:  # loops that have nothing to do cost more than a block of exponentials
            for e in range(a):
                s[e] = _MASKED
            for e in range(z, EDGE):
                s[e] = _MASKED
        for e in range(EDGE):
            top = max(top, _ordered(_bits(s[e])))
    largest = _float(_ordered(top))
    total = np.float32(0)
    for j in range(blocks):
        s = _row(floats, scores + j * SUMS_BYTES + 4 * EDGE * row, EDGE)
        p = _row(like, to + j * BLOCK_BYTES + 2 * EDGE * row, EDGE)
        for e in range(EDGE):
            x = _exp((s[e] - largest) * scale)
            total += x
            p[e] = x
        a, z = min(EDGE, max(0, start - j * EDGE)), max(0, min(EDGE, stop - j * EDGE))
        if a > 0 or z < EDGE:
            for e in range(a):
                p[e] = 0
            for e in range(z, EDGE):
                p[e] = 0
    return largest, total


@njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})
def _probabilities(floats, scores, dprobs, row, blocks, start, stop, scale, log_sum, dot):
    """Turn a row of blocks of scores into p and one of dp into p (dp - dot), 0 outside of start..stop."""
    for j in range(blocks):
        offset = j * SUMS_BYTES + 4 * EDGE * row
        s, d = _row(floats, scores + offset, EDGE), _row(floats, dprobs + offset, EDGE)
        for e in range(EDGE):
            x = _exp(s[e] * scale - log_sum)
            s[e] = x
            d[e] = x * (d[e] - dot)
        a, z = min(EDGE, max(0, start - j * EDGE)), max(0, min(EDGE, stop - j * EDGE))
        if a > 0 or z < EDGE:
            for e in range(a):
                s[e] = d[e] = 0
            for e in range(z, EDGE):
                s[e] = d[e] = 0


@njit(error_model="numpy")
def _rounded_rows(like, floats, to, sums):
    """A block of sums, rounded, row after row."""
    x, y = _row(floats, sums, EDGE * EDGE), _row(like, to, EDGE * EDGE)
    for e in range(EDGE * EDGE):
        y[e] = x[e]


@njit(error_model="numpy")
def _rounded_pairs(to, sums):
    """A block of sums, rounded, pair of rows after pair, two halves of 16 columns."""
    for h in range(2):
        for p in range(EDGE // 2):
            at = sums + 8 * EDGE * p + 64 * h
            zip_rounded(np.uintp(to + h * (BLOCK_BYTES // 2) + 64 * p), np.uintp(at), np.uintp(at + 4 * EDGE))


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


def forward(y, lse, q, k, v, doc_start, window, config):
    """See attention_fwd of reference.py; doc_start has no elements where there are no borders."""
    nb, nt, nh, d = q.shape
    ns, nk = k.shape[1], k.shape[2]
    past, db, sb = ns - nt, (d + EDGE - 1) // EDGE, (ns + EDGE - 1) // EDGE
    scale = np.float32(1 / np.sqrt(d))
    py, pq, pk, pv = y.ctypes.data, q.ctypes.data, k.ctypes.data, v.ctypes.data
    for at in prange(nb * nh):
        b, h = at // nh, at % nh
        kv = h * nk // nh
        room = np.empty((2 * sb * db + db + sb + 1) * BLOCK_BYTES // 2 + LINE, np.uint16)
        keys = _aligned(room.ctypes.data)
        values = keys + sb * db * BLOCK_BYTES
        queries = values + sb * db * BLOCK_BYTES
        probs = queries + db * BLOCK_BYTES
        spare = probs + sb * BLOCK_BYTES
        floats = np.empty((sb + 1) * EDGE * EDGE + LINE, np.float32)
        scores = _aligned(floats.ctypes.data)
        sums = scores + sb * SUMS_BYTES
        inverse = np.empty(EDGE, np.float32)
        for j in range(sb):
            for c in range(db):
                height, width = min(EDGE, ns - j * EDGE), min(EDGE, d - c * EDGE)
                of_k = pk + b * k.strides[0] + j * EDGE * k.strides[1] + kv * k.strides[2] + 2 * EDGE * c
                of_v = pv + b * v.strides[0] + j * EDGE * v.strides[1] + kv * v.strides[2] + 2 * EDGE * c
                column_block(k, keys + (j * db + c) * BLOCK_BYTES, of_k, k.strides[1], height, width, spare)
                pair_block(v, values + (c * sb + j) * BLOCK_BYTES, of_v, v.strides[1], height, width, 16)
        begin(np.uintp(config.ctypes.data))
        for i0 in range(0, nt, EDGE):
            rows = min(EDGE, nt - i0)
            for c in range(db):
                of_q = pq + b * q.strides[0] + i0 * q.strides[1] + h * q.strides[2] + 2 * EDGE * c
                row_block(q, queries + c * BLOCK_BYTES, of_q, q.strides[1], rows, min(EDGE, d - c * EDGE))
            lo, hi = _first_block(doc_start, b, i0, past, window), _last_block(i0 + rows - 1, past)
            for j in range(lo, hi):
                to = np.uintp(scores + (j - lo) * SUMS_BYTES)
                block(to, np.uintp(queries), np.uintp(keys + j * db * BLOCK_BYTES), db, False)
            for r in range(rows):
                start, stop = (
                    _first(doc_start, b, i0 + r, past, window) - lo * EDGE,
                    past + i0 + r + 1 - lo * EDGE,
                )
                top, total = _softmax(q, floats, scores, probs, r, hi - lo, start, stop, scale)
                lse[b, h, i0 + r] = top * scale + np.log(total)
                inverse[r] = np.float32(1) / total
            for r in range(rows, EDGE):
                for j in range(hi - lo):
                    _zero(_row(q, probs + j * BLOCK_BYTES + 2 * EDGE * r, EDGE))
            for c in range(db):
                of_v = np.uintp(values + (c * sb + lo) * BLOCK_BYTES)
                block(np.uintp(sums), np.uintp(probs), of_v, hi - lo, False)
                of_y = py + b * y.strides[0] + i0 * y.strides[1] + h * y.strides[2] + 2 * EDGE * c
                width = min(EDGE, d - c * EDGE)
                for r in range(rows):
                    own, some = (
                        _row(y, of_y + r * y.strides[1], width),
                        _row(floats, sums + 4 * EDGE * r, width),
                    )
                    factor = inverse[r]
                    if width == EDGE:
                        for e in range(EDGE):
                            own[e] = some[e] * factor
                    else:
                        for e in range(width):
                            own[e] = some[e] * factor
        end()
        room[0] = 0  # Numba frees an array after its last use, and does not see those of its address
        floats[0] = 0


def backward(dq, dk, dv, dy, y, lse, q, k, v, doc_start, window, config):
    """See attention_bwd of reference.py."""
    nb, nt, nh, d = q.shape
    ns, nk = k.shape[1], k.shape[2]
    past, group, db, sb = ns - nt, nh // nk, (d + EDGE - 1) // EDGE, (ns + EDGE - 1) // EDGE
    scale = np.float32(1 / np.sqrt(d))
    pdq, pdk, pdv, pdy, py = dq.ctypes.data, dk.ctypes.data, dv.ctypes.data, dy.ctypes.data, y.ctypes.data
    pq, pk, pv = q.ctypes.data, k.ctypes.data, v.ctypes.data
    for at in prange(nb * nk):  # a key/value head belongs to one thread: its sums have one order
        b, kv = at // nk, at % nk
        size = 3 * sb * db + 2 * db + 2 * CHUNK * db + sb + 2 * CHUNK * sb
        room = np.empty(size * BLOCK_BYTES // 2 + LINE, np.uint16)
        keys = _aligned(room.ctypes.data)  # as columns
        values = keys + sb * db * BLOCK_BYTES
        key_terms = values + sb * db * BLOCK_BYTES
        queries = key_terms + sb * db * BLOCK_BYTES
        grads = queries + db * BLOCK_BYTES  # dy
        queries_turned = grads + db * BLOCK_BYTES
        grads_turned = queries_turned + CHUNK * db * BLOCK_BYTES
        ds_rows = grads_turned + CHUNK * db * BLOCK_BYTES
        ds_pairs = ds_rows + sb * BLOCK_BYTES
        p_pairs = ds_pairs + CHUNK * sb * BLOCK_BYTES
        floats = np.empty((2 * sb * db + 2 * sb + 2) * EDGE * EDGE + LINE, np.float32)
        dk_sums = _aligned(floats.ctypes.data)
        dv_sums = dk_sums + sb * db * SUMS_BYTES
        scores = dv_sums + sb * db * SUMS_BYTES
        dprobs = scores + sb * SUMS_BYTES
        sums = dprobs + sb * SUMS_BYTES
        spare = sums + SUMS_BYTES
        _zero(floats)
        for j in range(sb):
            for c in range(db):
                height, width = min(EDGE, ns - j * EDGE), min(EDGE, d - c * EDGE)
                of_k = pk + b * k.strides[0] + j * EDGE * k.strides[1] + kv * k.strides[2] + 2 * EDGE * c
                of_v = pv + b * v.strides[0] + j * EDGE * v.strides[1] + kv * v.strides[2] + 2 * EDGE * c
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
                        width = min(EDGE, d - c * EDGE)
                        of_q = pq + b * q.strides[0] + i0 * q.strides[1] + h * q.strides[2] + 2 * EDGE * c
                        of_dy = (
                            pdy + b * dy.strides[0] + i0 * dy.strides[1] + h * dy.strides[2] + 2 * EDGE * c
                        )
                        row_block(q, queries + c * BLOCK_BYTES, of_q, q.strides[1], rows, width)
                        row_block(dy, grads + c * BLOCK_BYTES, of_dy, dy.strides[1], rows, width)
                        turned = (c * CHUNK + ib) * BLOCK_BYTES
                        turned_block(q, queries_turned + turned, of_q, q.strides[1], rows, width, spare)
                        turned_block(dy, grads_turned + turned, of_dy, dy.strides[1], rows, width, spare)
                    lo, hi = _first_block(doc_start, b, i0, past, window), _last_block(i0 + rows - 1, past)
                    for j in range(lo, hi):
                        offset, operand = (j - lo) * SUMS_BYTES, j * db * BLOCK_BYTES
                        block(
                            np.uintp(scores + offset), np.uintp(queries), np.uintp(keys + operand), db, False
                        )
                        block(
                            np.uintp(dprobs + offset), np.uintp(grads), np.uintp(values + operand), db, False
                        )
                    for r in range(rows):
                        yr = _row(y, py + b * y.strides[0] + (i0 + r) * y.strides[1] + h * y.strides[2], d)
                        dyr = _row(
                            dy, pdy + b * dy.strides[0] + (i0 + r) * dy.strides[1] + h * dy.strides[2], d
                        )
                        dot = np.float32(0)
                        for e in range(d):
                            dot += yr[e] * dyr[e]
                        start = _first(doc_start, b, i0 + r, past, window) - lo * EDGE
                        stop, log_sum = past + i0 + r + 1 - lo * EDGE, lse[b, h, i0 + r]
                        _probabilities(floats, scores, dprobs, r, hi - lo, start, stop, scale, log_sum, dot)
                    for r in range(rows, EDGE):
                        for j in range(hi - lo):
                            _zero(_row(floats, scores + j * SUMS_BYTES + 4 * EDGE * r, EDGE))
                            _zero(_row(floats, dprobs + j * SUMS_BYTES + 4 * EDGE * r, EDGE))
                    for j in range(lo, hi):
                        offset, pairs = (j - lo) * SUMS_BYTES, (j * CHUNK + ib) * BLOCK_BYTES
                        _rounded_rows(q, floats, ds_rows + (j - lo) * BLOCK_BYTES, dprobs + offset)
                        _rounded_pairs(ds_pairs + pairs, dprobs + offset)
                        _rounded_pairs(p_pairs + pairs, scores + offset)
                    for c in range(db):
                        of_k = np.uintp(key_terms + (c * sb + lo) * BLOCK_BYTES)
                        block(np.uintp(sums), np.uintp(ds_rows), of_k, hi - lo, False)
                        of_dq = (
                            pdq + b * dq.strides[0] + i0 * dq.strides[1] + h * dq.strides[2] + 2 * EDGE * c
                        )
                        width = min(EDGE, d - c * EDGE)
                        for r in range(rows):
                            own = _row(dq, of_dq + r * dq.strides[1], width)
                            some = _row(floats, sums + 4 * EDGE * r, width)
                            if width == EDGE:
                                for e in range(EDGE):
                                    own[e] = some[e] * scale
                            else:
                                for e in range(width):
                                    own[e] = some[e] * scale
                # Blocks of queries that see a block of keys follow each other.
                first, last = 0, 0
                for j in range(_first_block(doc_start, b, chunk, past, window), sb):
                    while first < count and _last_block(min(nt, chunk + (first + 1) * EDGE) - 1, past) <= j:
                        first += 1
                    while last < count and _first_block(doc_start, b, chunk + last * EDGE, past, window) <= j:
                        last += 1
                    for c in range(db if first < last else 0):
                        place, left = (c * sb + j) * SUMS_BYTES, (c * CHUNK + first) * BLOCK_BYTES
                        right, n = (j * CHUNK + first) * BLOCK_BYTES, last - first
                        to_dk, to_dv = np.uintp(dk_sums + place), np.uintp(dv_sums + place)
                        block(to_dk, np.uintp(queries_turned + left), np.uintp(ds_pairs + right), n, True)
                        block(to_dv, np.uintp(grads_turned + left), np.uintp(p_pairs + right), n, True)
        end()
        for j in range(sb):
            for c in range(db):
                place, height, width = (
                    (c * sb + j) * SUMS_BYTES,
                    min(EDGE, ns - j * EDGE),
                    min(EDGE, d - c * EDGE),
                )
                of_dk = pdk + b * dk.strides[0] + j * EDGE * dk.strides[1] + kv * dk.strides[2] + 2 * EDGE * c
                of_dv = pdv + b * dv.strides[0] + j * EDGE * dv.strides[1] + kv * dv.strides[2] + 2 * EDGE * c
                one = np.float32(1)
                _put_turned(dk, floats, of_dk, dk.strides[1], dk_sums + place, spare, height, width, scale)
                _put_turned(dv, floats, of_dv, dv.strides[1], dv_sums + place, spare, height, width, one)
        room[0] = 0  # keeps it alive until here, as in forward
        floats[0] = 0


_IN, _SEEN = "act[:,:,:,:]", "int32[:,::1], int64, uint8[::1]"
_SIGNATURES = {
    forward: f"void({_IN}, float32[:,:,::1], {_IN}, {_IN}, {_IN}, {_SEEN})",
    backward: f"void({', '.join([_IN] * 5)}, float32[:,:,::1], {_IN}, {_IN}, {_IN}, {_SEEN})",
}


def bound(f, name, **products):
    """A copy of forward or of backward that multiplies with `block`; name: of this kind of products, for Numba's cache."""
    own = FunctionType(f.__code__, {**f.__globals__, **products}, f.__name__)
    own.__qualname__, own.__module__ = f"attention_{f.__name__}_{name}", f.__module__
    return own


def compiled(f, name, into, **products):
    """The kernel of bound(); `into` gets it with its signature."""
    return _kernel(_SIGNATURES[f], into=into)(bound(f, name, **products))
