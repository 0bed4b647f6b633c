# mypy: ignore-errors
"""Matrix products of bfloat16 on the tiles of amx.py. Compiled where the processor has them.

Blocks for the caches: PIECE terms of 32 columns of the right operand stay in the first one, ROWS rows of as many terms of the
left operand in the second. Sums of a piece are kept in float32 and go on where the piece before them ended: no bit depends on
the pieces.
"""

import numba
import numpy as np
from numba import prange, types

from . import order
from .amx import CONFIG, begin_tiles, end_tiles, tile_block
from .bfloat16 import bfloat16
from .kernels import _kernel, _row, grid
from .start import compile_all
from .tiles import BLOCK_BYTES, EDGE, path

_kernels = []  # (kernel, signature)
PIECE, ROWS = 16, 16  # blocks of terms, and of rows
_SUMS_BYTES = 4 * EDGE * EDGE


@_kernel(
    "void(act[:,:], act[::1], act[::1], act[::1], int64, boolean, int64, int64, uint8[::1])", into=_kernels
)
def product(out, left, right, bias, k, adds, rows, cols, config):
    """out = A B + bias, or += A B, of operands in order."""
    m, n = out.shape
    mb, nb, kb = (m + EDGE - 1) // EDGE, (n + EDGE - 1) // EDGE, (k + EDGE - 1) // EDGE
    pa, pb, po, so = left.ctypes.data, right.ctypes.data, out.ctypes.data, out.strides[0]
    pieces = (kb + PIECE - 1) // PIECE
    for p in prange(rows * cols):
        first, last = mb * (p // cols) // rows, mb * (p // cols + 1) // rows
        j0, j1 = nb * (p % cols) // cols, nb * (p % cols + 1) // cols
        kept = 1 if pieces == 1 else min(ROWS, last - first) * (j1 - j0)
        sums = np.empty((max(1, kept) * EDGE + 1, EDGE), np.float32)
        ps = (sums.ctypes.data + order.LINE - 1) // order.LINE * order.LINE
        begin_tiles(np.uintp(config.ctypes.data))
        for i0 in range(first, last, ROWS):
            i1 = min(last, i0 + ROWS)
            for piece in range(pieces):
                k0, k1 = kb * piece // pieces, kb * (piece + 1) // pieces
                for j in range(j0, j1):
                    width, b = min(EDGE, n - j * EDGE), np.uintp(pb + (j * kb + k0) * BLOCK_BYTES)
                    for i in range(i0, i1):
                        block = 0 if pieces == 1 else (j - j0) * (i1 - i0) + i - i0
                        own = ps + block * _SUMS_BYTES
                        a = np.uintp(pa + (i * kb + k0) * BLOCK_BYTES)
                        tile_block(np.uintp(own), a, b, k1 - k0, piece > 0)
                        if piece + 1 < pieces:
                            continue
                        to = po + i * EDGE * so + j * EDGE * out.itemsize
                        for r in range(min(EDGE, m - i * EDGE)):
                            row, some = _row(out, to + r * so, width), _row(sums, own + 4 * EDGE * r, EDGE)
                            if bias.size > 0:
                                more = bias[j * EDGE : j * EDGE + width]
                                for c in range(width):
                                    row[c] = some[c] + more[c]
                            elif adds:
                                for c in range(width):
                                    row[c] += some[c]
                            elif width == EDGE:
                                for c in range(EDGE):
                                    row[c] = some[c]
                            else:
                                for c in range(width):
                                    row[c] = some[c]
        end_tiles()
        sums[0, 0] = 0  # keeps it alive until here, as in attention_fwd


_flat, _i64 = types.Array(bfloat16, 1, "C"), types.int64
_kernels.append(  # gradients of parameters are float32
    (
        product,
        types.void(
            *(types.Array(types.float32, 2, "A"), _flat, _flat, _flat, _i64),
            *(types.boolean, _i64, _i64, types.Array(types.uint8, 1, "C")),
        ),
    )
)
_NO_BIAS = np.empty(0, np.uint16)
rows, transposed, columns, terms = order.rows, order.turned, order.columns, order.terms  # operands


def multiply(out, left, b, k, bias=None, adds=False):
    """out = A B + bias, or += A B, with operands of the functions above and k terms."""
    bias = _NO_BIAS.view(b.dtype) if bias is None else bias
    product(out, left, b, bias, k, adds, *grid(numba.get_num_threads(), *out.shape), CONFIG)


if path() == "amx":  # elsewhere LLVM would end the process over the instructions
    compile_all([*_kernels, *order.kernels.values()], __name__)
