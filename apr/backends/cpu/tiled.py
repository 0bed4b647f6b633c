# mypy: ignore-errors
"""Matrix products of bfloat16 on the tiles of amx.py. Compiled where the processor has them.

Blocks for the caches: TERM_BLOCKS of 32 columns of the right operand, which is put in order before, stay in the first one, as
many of ROW_BLOCKS rows of the left operand in the second. Tiles read the left operand where it lies if its blocks are whole,
else a thread puts in order what it is about to read. Sums go on where the block of terms before them ended: no bit depends on
the blocks.
"""

from functools import cache

import numba
import numpy as np
from numba import prange, types

from . import attention, order
from .amx import CONFIG, begin_tiles, end_tiles, put_block, tile_block, tile_rows
from .bfloat16 import bfloat16
from .kernels import _kernel, _row
from .order import row_block, turned_block
from .start import compile_all
from .tiles import BLOCK_BYTES, EDGE, LINE, path

_kernels = []  # (kernel, signature)
TERM_BLOCKS, ROW_BLOCKS = 16, 16
_SUMS_BYTES = 4 * EDGE * EDGE


@_kernel(
    "void(act[:,:], act[:,:], boolean, act[::1], act[::1], boolean, int64, int64, uint8[::1])", into=_kernels
)
def product(out, left, turns, right, bias, adds, rows, cols, config):
    """out = A B + bias, or += A B; left: A, or where it turns A^T; right: B in order."""
    m, n = out.shape
    k = left.shape[0] if turns else left.shape[1]
    mb, nb, kb = (m + EDGE - 1) // EDGE, (n + EDGE - 1) // EDGE, (k + EDGE - 1) // EDGE
    pa, sa, pb, po, so = left.ctypes.data, left.strides[0], right.ctypes.data, out.ctypes.data, out.strides[0]
    pieces = (kb + TERM_BLOCKS - 1) // TERM_BLOCKS
    lies = not turns and m % EDGE == 0 and k % EDGE == 0
    for p in prange(rows * cols):
        first, last = mb * (p // cols) // rows, mb * (p // cols + 1) // rows
        j0, j1 = nb * (p % cols) // cols, nb * (p % cols + 1) // cols
        high = max(1, min(ROW_BLOCKS, last - first))
        kept = 2 if pieces == 1 else high * (j1 - j0)
        sums = np.empty((max(2, kept) * EDGE + 1, EDGE), np.float32)
        ps = (sums.ctypes.data + LINE - 1) // LINE * LINE
        room = np.empty(
            ((1 if lies else high * min(kb, TERM_BLOCKS)) + 1) * BLOCK_BYTES // 2 + LINE, np.uint16
        )
        spare = (room.ctypes.data + LINE - 1) // LINE * LINE
        put = spare + BLOCK_BYTES
        begin_tiles(np.uintp(config.ctypes.data))
        for i0 in range(first, last, ROW_BLOCKS):
            i1 = min(last, i0 + ROW_BLOCKS)
            for piece in range(pieces):
                k0, k1 = kb * piece // pieces, kb * (piece + 1) // pieces
                if not lies:
                    for i in range(i0, i1):
                        for t in range(k0, k1):
                            to = put + ((i - i0) * (k1 - k0) + t - k0) * BLOCK_BYTES
                            height, width = min(EDGE, m - i * EDGE), min(EDGE, k - t * EDGE)
                            if turns:
                                at = pa + t * EDGE * sa + i * EDGE * 2
                                turned_block(left, to, at, sa, width, height, spare)
                            else:
                                row_block(left, to, pa + i * EDGE * sa + t * EDGE * 2, sa, height, width)
                # A block is written while the tiles of the next one run.
                waiting, waiting_to = np.int64(0), np.int64(0)
                for j in range(j0, j1):
                    width, b = min(EDGE, n - j * EDGE), np.uintp(pb + (j * kb + k0) * BLOCK_BYTES)
                    for i in range(i0, i1):
                        block = (j - j0) * (i1 - i0) + i - i0
                        own = ps + (block % 2 if pieces == 1 else block) * _SUMS_BYTES
                        if lies:
                            a, a_row, a_step = pa + i * EDGE * sa + k0 * EDGE * 2, sa, 2 * EDGE
                        else:
                            a, a_row, a_step = put + (i - i0) * (k1 - k0) * BLOCK_BYTES, 2 * EDGE, BLOCK_BYTES
                        tile_rows(np.uintp(own), np.uintp(a), a_row, a_step, b, k1 - k0, piece > 0)
                        if piece + 1 < pieces:
                            continue
                        to, height = po + i * EDGE * so + j * EDGE * out.itemsize, min(EDGE, m - i * EDGE)
                        if waiting != 0:
                            put_block(out, np.uintp(waiting_to), so, np.uintp(waiting), adds)
                            waiting = np.int64(0)
                        if bias.size == 0 and height == EDGE and width == EDGE:
                            waiting, waiting_to = np.int64(own), np.int64(to)
                            continue
                        for r in range(height):
                            row, some = _row(out, to + r * so, width), _row(sums, own + 4 * EDGE * r, EDGE)
                            if bias.size > 0:
                                more = bias[j * EDGE : j * EDGE + width]
                                for c in range(width):
                                    row[c] = some[c] + more[c]
                            elif adds:
                                for c in range(width):
                                    row[c] += some[c]
                            else:
                                for c in range(width):
                                    row[c] = some[c]
                if waiting != 0:
                    put_block(out, np.uintp(waiting_to), so, np.uintp(waiting), adds)
        end_tiles()
        sums[0, 0] = 0  # keeps it alive until here, as in attention_fwd
        room[0] = 0


_blocks = {"block": tile_block, "begin": begin_tiles, "end": end_tiles}
_forward, _backward = (
    attention.compiled(f, "tiles", _kernels, **_blocks) for f in (attention.forward, attention.backward)
)
_flat, _i64 = types.Array(bfloat16, 1, "C"), types.int64
_kernels.append(  # gradients of parameters are float32
    (
        product,
        types.void(
            *(types.Array(types.float32, 2, "A"), types.Array(bfloat16, 2, "A"), types.boolean, _flat, _flat),
            *(types.boolean, _i64, _i64, types.Array(types.uint8, 1, "C")),
        ),
    )
)
_NO_BIAS = np.empty(0, np.uint16)
rows, transposed, columns, terms = order.rows, order.transposed, order.columns, order.terms


@cache
def _grid(parts, m, n):
    """Cut (m,n) blocks for `parts` threads: the grid whose largest piece is the smallest, and then reads the least."""
    pairs = [(r, parts // r) for r in range(1, parts + 1) if parts % r == 0]
    return min(pairs, key=lambda rc: (-(-m // rc[0]) * -(-n // rc[1]), rc[1] * m + rc[0] * n, rc))


def multiply(out, left, b, k, bias=None, adds=False):
    """out = A B + bias, or += A B, with operands of the functions above and k terms."""
    bias = _NO_BIAS.view(b.dtype) if bias is None else bias
    cut = _grid(numba.get_num_threads(), *(-(-x // EDGE) for x in out.shape))
    product(out, *left, b, bias, adds, *cut, CONFIG)


def attention_fwd(*args):
    """See attention.py."""
    _forward(*args, CONFIG)


def attention_bwd(*args):
    """See attention.py."""
    _backward(*args, CONFIG)


if path() == "amx":  # elsewhere LLVM would end the process over the instructions
    compile_all([*_kernels, *order.kernels.values()], __name__, 25)
