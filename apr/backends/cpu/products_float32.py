# mypy: ignore-errors
"""Matrix products of float32: 12 rows of 32 sums at a time, in registers of 512 bits.

Terms come in pieces of the same size, as many as there must be for at most TERMS. In each a sum begins at 0 and adds its terms in
order, each in one fused operation; the pieces' sums are added to the result in order. So no bit depends on the threads, on how
the result is cut, or on other rows and columns.

A thread puts a block of the right operand in order, up to RIGHT_BYTES that stay in the second cache: panels of 32 columns, in two
halves of 16, each term after term. Of the left operand it copies 12 rows at a time, for the first cache, and asks for those that
come next meanwhile; of a transposed one, what LEFT_BYTES hold.
"""

import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic

from . import fma
from .fma import F32, FLAG, I64, copy_4, copy_16, prefetch, put_16
from .kernels import _kernel, _row
from .order import turn
from .tiles import LINE, prefetch_line

ROWS, COLUMNS, TERMS = 12, 32, 384
ROW_BYTES = 4 * (TERMS + 16)  # between rows of the left operand in order: not a power of two
UNROLLED = 4  # terms of a pass through the loop: LLVM reads ahead, and has no registers for more
RIGHT_BYTES, LEFT_BYTES = 512 * 1024, 256 * 1024
SUMS_BYTES, SPARE_BYTES = 4 * ROWS * COLUMNS, 16 * LINE
ROOM_BYTES = RIGHT_BYTES + LEFT_BYTES + SUMS_BYTES + SPARE_BYTES + LINE  # for a thread
_FLOATS = np.empty(1, np.float32)
_kernels = []  # (kernel, signature)


def _calls(is_turned):
    def generate(context, builder, signature, args):
        *rest, adds = args
        adds = context.cast(builder, adds, types.boolean, types.boolean)
        builder.call(_rows_function(builder.module, is_turned), [*rest, adds])
        return context.get_dummy_value()

    u, i = types.uintp, types.int64
    return types.void(u, i, u, u, i, i, types.float32, types.boolean), generate


@intrinsic
def fma_rows(typing, to, to_bytes, a, b, half, terms, alpha, adds):
    """Write ROWS rows of alpha A B at `to`, to_bytes apart, or add them; half: bytes of a half panel of B."""
    return _calls(False)


@intrinsic
def fma_turned(typing, to, to_bytes, a, b, half, terms, alpha, adds):
    """fma_rows() of a left operand that lies term after term."""
    return _calls(True)


def _rows_function(module, is_turned):
    name = f"apr_product_{'turned' if is_turned else 'rows'}"
    f, builder = fma.function(module, name, [*[I64] * 6, F32, FLAG])
    if builder is None:
        return f
    to, to_bytes, a, b, half, terms, alpha, adds = f.args
    rows = [builder.add(to, builder.mul(I64(r), to_bytes)) for r in range(ROWS)]
    places = [builder.add(row, I64(64 * c)) for row in rows for c in range(2)]
    for place in places:  # lines that will be written are on their way while the sums are made
        prefetch_line(builder, place)
    of_row, of_term = (4, 4 * ROWS) if is_turned else (ROW_BYTES, 4)

    def body(count):
        def add(n, sums):
            left, right = (
                builder.add(a, builder.mul(n, I64(of_term))),
                builder.add(b, builder.mul(n, I64(64))),
            )
            return fma.add_terms(
                builder, sums, left, [right, builder.add(right, half)], count, of_row, of_term
            )

        return add

    whole = builder.and_(terms, I64(-UNROLLED))
    sums = fma.loop(builder, I64(0), whole, UNROLLED, fma.zeros(2 * ROWS), body(UNROLLED))
    sums = fma.loop(builder, whole, terms, 1, sums, body(1))
    factor = fma.spread(builder, alpha)
    with builder.if_else(adds) as (then, otherwise):
        with then:
            for x, place in zip(sums, places, strict=True):
                fma.store(builder, fma.fused(builder, x, factor, fma.load(builder, place)), place)
        with otherwise:
            for x, place in zip(sums, places, strict=True):
                fma.store(builder, builder.fmul(x, factor), place)
    builder.ret_void()
    return f


@njit(error_model="numpy")
def _put_right(to, half, at, stride, by_columns, terms, width, spare):
    """Put a panel in order: `width` columns of so many terms, 0 behind the last column."""
    for h in range(2):
        n, own = min(16, width - 16 * h), to + h * half
        if not by_columns:
            for t in range(terms):
                put_16(own + 64 * t, at + 64 * h + t * stride, n)
            continue
        rows = at + 16 * h * stride
        for t in range(0, terms, 16):
            some = min(16, terms - t)
            if n == 16 and some == 16:
                turn(np.uintp(own + 64 * t), np.uintp(rows + 4 * t), stride)
            else:
                for c in range(16):
                    put_16(spare + 64 * c, rows + c * stride + 4 * t, some if c < n else 0)
                turn(np.uintp(own + 64 * t), np.uintp(spare), np.int64(64))


@njit(error_model="numpy")
def _put_left(to, at, stride, terms, height):
    """Copy `height` rows of so many terms, rows of 0 behind them."""
    whole = terms // 16 * 16
    for r in range(ROWS):
        own, row = to + r * ROW_BYTES, at + r * stride
        for t in range(0, whole if r < height else 0, 16):
            copy_16(np.uintp(own + 4 * t), np.uintp(row + 4 * t))
        for t in range(whole if r < height else 0, terms, 16):
            put_16(own + 4 * t, row + 4 * t, terms - t if r < height else 0)


@njit(error_model="numpy")
def _put_turned(to, panel, at, stride, terms, height):
    """Cut so many rows of `height` elements into panels of ROWS, term after term, 0 behind the last element."""
    whole = height // ROWS
    for t in range(terms):
        row, own = at + t * stride, to + 4 * ROWS * t
        for i in range(whole):
            for e in range(0, 4 * ROWS, 16):
                copy_4(np.uintp(own + i * panel + e), np.uintp(row + 4 * ROWS * i + e))
        if height > whole * ROWS:
            rest = _row(_FLOATS, own + whole * panel, ROWS)
            some = _row(_FLOATS, row + 4 * ROWS * whole, height - whole * ROWS)
            for e in range(ROWS):
                rest[e] = 0
            for e in range(some.size):
                rest[e] = some[e]


@njit(error_model="numpy")
def _ask(at, stride, first, last, size):
    """Ask for `size` bytes of rows first..last."""
    for r in range(first, last):
        for e in range(0, size, LINE):
            prefetch(np.uintp(at + r * stride + e))


@njit(error_model="numpy")
def _multiply(turns, to, to_bytes, a, b, half, terms, alpha, adds):
    if turns:
        fma_turned(np.uintp(to), to_bytes, np.uintp(a), np.uintp(b), half, terms, alpha, adds)
    else:
        fma_rows(np.uintp(to), to_bytes, np.uintp(a), np.uintp(b), half, terms, alpha, adds)


@njit(error_model="numpy")
def _copy_part(to, to_bytes, at, at_bytes, height, width):
    """Copy `height` rows of `width` elements."""
    for r in range(height):
        own, some = _row(_FLOATS, to + r * to_bytes, width), _row(_FLOATS, at + r * at_bytes, width)
        for e in range(width):
            own[e] = some[e]


@_kernel(
    "void(act[:,:], act[:,:], boolean, act[:,:], boolean, float32, boolean, int64, int64, uint8[:,::1])",
    into=_kernels,
    dtype="float32",
)
def product(out, left, turns, right, by_columns, alpha, adds, rows, cols, rooms):
    """out = alpha A B, or += it; left: A, or where it turns A^T; right: B, or B^T, which has its columns as rows."""
    m, n = out.shape
    k = left.shape[0] if turns else left.shape[1]
    pa, sa, pb, sb = left.ctypes.data, left.strides[0], right.ctypes.data, right.strides[0]
    po, so = out.ctypes.data, out.strides[0]
    mb, nb = (m + ROWS - 1) // ROWS, (n + COLUMNS - 1) // COLUMNS
    pieces = (k + TERMS - 1) // TERMS
    deep = ((k + pieces - 1) // pieces + 15) // 16 * 16
    half = np.int64(64 * deep)
    panel = 4 * ROWS * deep if turns else ROWS * ROW_BYTES
    for p in prange(rows * cols):
        i0, i1 = mb * (p // cols) // rows, mb * (p // cols + 1) // rows
        j0, j1 = nb * (p % cols) // cols, nb * (p % cols + 1) // cols
        b = (rooms.ctypes.data + p * rooms.strides[0] + LINE - 1) // LINE * LINE
        a = b + RIGHT_BYTES
        sums = a + LEFT_BYTES
        spare = sums + SUMS_BYTES
        most = max(1, RIGHT_BYTES // (2 * half))
        parts = max(1, (j1 - j0 + most - 1) // most)
        high = max(1, min(LEFT_BYTES // panel, i1 - i0)) if turns else 1
        for part in range(parts):
            j2, j3 = j0 + (j1 - j0) * part // parts, j0 + (j1 - j0) * (part + 1) // parts
            for k0 in range(0, k, deep):
                terms, more = min(deep, k - k0), adds or k0 > 0
                for j in range(j2, j3):
                    at = pb + (j * COLUMNS * sb + k0 * 4 if by_columns else k0 * sb + j * COLUMNS * 4)
                    if by_columns and j + 1 < j3:
                        _ask(at + COLUMNS * sb, sb, 0, min(COLUMNS, n - (j + 1) * COLUMNS), terms * 4)
                    width = min(COLUMNS, n - j * COLUMNS)
                    _put_right(b + (j - j2) * 2 * half, half, at, sb, by_columns, terms, width, spare)
                for i2 in range(i0, i1, high):
                    i3 = min(i1, i2 + high)
                    if turns:
                        of_rows = pa + k0 * sa + i2 * ROWS * 4
                        _put_turned(a, panel, of_rows, sa, terms, min(m, i3 * ROWS) - i2 * ROWS)
                    for i in range(i2, i3):
                        height, own = min(ROWS, m - i * ROWS), a + (i - i2) * panel
                        if not turns:
                            _put_left(own, pa + i * ROWS * sa + k0 * 4, sa, terms, height)
                        # What is put in order next: all that is left of A's rows, or a share of a transposed one's.
                        coming, count, size = pa, 0, 0
                        if not turns and i + 1 < i1:
                            coming = pa + (i + 1) * ROWS * sa + k0 * 4
                            count, size = min(ROWS, m - (i + 1) * ROWS), 4 * terms
                        elif turns:
                            share = (terms + i3 - i2 - 1) // (i3 - i2)
                            from_term = share * (i - i2)
                            if i3 < i1:
                                coming = pa + (k0 + from_term) * sa + i3 * ROWS * 4
                                count = min(share, terms - from_term)
                                size = 4 * (min(m, (i3 + high) * ROWS) - i3 * ROWS)
                            elif k0 + deep < k:
                                coming = pa + (k0 + deep + from_term) * sa + i0 * ROWS * 4
                                count = min(share, k - k0 - deep - from_term)
                                size = 4 * (min(m, (i0 + high) * ROWS) - i0 * ROWS)
                        for j in range(j2, j3):
                            if count > 0:
                                r0, r1 = count * (j - j2) // (j3 - j2), count * (j - j2 + 1) // (j3 - j2)
                                _ask(coming, sa, r0, r1, size)
                            width, to = min(COLUMNS, n - j * COLUMNS), po + i * ROWS * so + j * COLUMNS * 4
                            of_b = b + (j - j2) * 2 * half
                            if height == ROWS and width == COLUMNS:
                                _multiply(turns, to, so, own, of_b, half, terms, alpha, more)
                            else:
                                row = np.int64(4 * COLUMNS)
                                if more:  # added by the same operation as elsewhere
                                    _copy_part(sums, row, to, so, height, width)
                                _multiply(turns, sums, row, own, of_b, half, terms, alpha, more)
                                _copy_part(to, so, sums, row, height, width)
