# mypy: ignore-errors
"""Numba kernels of the cpu backend. Formulas and shapes stand in reference.py.

One pool of threads for everything: Numba's. Matrix products are single-threaded calls into OpenBLAS
made from inside Numba's parallel loops, so the two never compete for a core. All kernels have
explicit signatures: they are compiled (or read from Numba's cache on disk) when this module is
imported, and a wrong dtype is an error. `parts` is the number of threads to cut the work for; only
matrix products depend on it, all other sums are cut the same way whatever the number of threads.
"""

import ctypes
import importlib.util
import os
from functools import cache
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
from numba import carray, njit, prange, types
from numba.extending import intrinsic

from . import tiles
from .bfloat16 import bfloat16, kept, pointer, typed
from .start import compile_all


def _load_openblas():
    """Load the OpenBLAS that the package scipy-openblas64 ships. Raises ImportError naming it: there is none that works."""
    name = "scipy_openblas64"
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    folder = Path(found.submodule_search_locations[0]) / "lib"
    libraries = [p for p in sorted(folder.glob("*")) if p.suffix in (".so", ".dylib", ".dll")]
    if not libraries:
        raise ImportError(f"no library in {folder}", name=name)
    try:
        llvmlite.binding.load_library_permanently(str(libraries[0]))
    except RuntimeError as e:
        raise ImportError(str(e), name=name) from None


def grids(parts):
    """All grids of so many pieces: (rows, columns)."""
    return [(r, parts // r) for r in range(1, parts + 1) if parts % r == 0]


@cache
def grid(parts, m, n):
    """Cut an (m,n) product for `parts` threads: the grid that packs the fewest rows and columns."""
    return min(grids(parts), key=lambda rc: (rc[1] * m + rc[0] * n, rc))


def compiled_for():
    """Name what the last bit of a sum depends on: the instructions that kernels and products are made of, and who made them."""
    target = numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name()
    address = llvmlite.binding.address_of_symbol("scipy_openblas_get_config64_")
    blas = ctypes.CFUNCTYPE(ctypes.c_char_p)(address)().decode()
    vectors = ", vectors of 512 bits" if tiles.has_vectors() else ""
    return f"{target}, Numba {numba.__version__}, {' '.join(blas.split())}{vectors}"


_load_openblas()
# GNU OpenMP's idle threads spin for milliseconds: 1 % faster on an idle machine, many times slower on
# a busy one. Read when Numba starts its threads; somebody's own choice stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_i32, _i64, _f32, _addr = types.int32, types.int64, types.float32, types.uintp
_sgemm = types.ExternalFunction(
    "scipy_cblas_sgemm64_",
    types.void(_i32, _i32, _i32, _i64, _i64, _i64, _f32, _addr, _i64, _addr, _i64, _f32, _addr, _i64),
)
_blas_threads = types.ExternalFunction("scipy_openblas_set_num_threads64_", types.void(_i32))
_ROW_MAJOR, _N, _T = 101, 111, 112  # enumerators of cblas.h

# The passes that rewrite array expressions cost compile time and find nothing to do in these loops.
_PARALLEL = dict.fromkeys(
    ("fusion", "comprehension", "reduction", "setitem", "numpy", "stencil", "inplace_binop"), False
)
_PARALLEL["prange"] = True
# Sums may be reordered (they must be, to use vector registers); NaN and infinity keep their meaning.
_FAST = {"contract", "reassoc", "nsz", "arcp"}
_kernels, low = [], []  # (kernel, signature) of float32, and of bfloat16


def _kernel(signature, parallel=True, into=None, dtype="bfloat16"):
    """Compile for float32 in the place of `act`; where that stands, for bfloat16 too once low.py is imported.

    into: a list that gets the pair of `dtype` alone, of a module that compiles its own."""

    def register(f):
        options = dict(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
        k = njit(parallel=_PARALLEL if parallel else False, **options)(f)
        typed(k)
        if into is None:
            _kernels.append((k, signature.replace("act", "float32")))
        if "act" in signature:
            of_dtype = {"bfloat16": bfloat16, "float32": types.float32}[dtype]
            pair = k, eval(signature, {**vars(types), "act": of_dtype})
            (low if into is None else into).append(pair)
        return k

    return register


# Helpers inlined into the kernels. None is cached apart: start.py stamps kernels alone, and code of older sources would stay.


@intrinsic
def _bits(typing, x):
    """int32 with the bits of a float32."""
    return types.int32(types.float32), lambda c, b, s, a: b.bitcast(a[0], c.get_value_type(types.int32))


@intrinsic
def _float(typing, x):
    """float32 with the bits of an int32."""
    return types.float32(types.int32), lambda c, b, s, a: b.bitcast(a[0], c.get_value_type(types.float32))


@intrinsic
def _wide_vectors(typing):
    """Let LLVM make vectors of 512 bits of this function's loops, where a processor has them: on Intel's it prefers 256.

    For loops without a sum: the order of its terms depends on the width."""

    def generate(context, builder, signature, args):
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite knows no such names
        return context.get_dummy_value()

    return types.void(), generate


@njit(inline="always")
def _row(x, address, n):
    """n elements of an array at an address, as a contiguous array: rows of strided views vectorise too."""
    return carray(pointer(x, np.uintp(address)), (n,))


@njit(inline="always")
def _zero(row):
    for j in range(row.size):
        row[j] = 0


_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits


@njit(fastmath={"contract"}, error_model="numpy")
def _exp(x):
    """exp(x) to 1.2e-7 relative, vectorisable: 2^n * polynomial(r), x = n ln 2 + r (Cephes, expf).

    Below -87.3 it is 1.2e-38, above 88.3 it is 2.4e38; NaN stays NaN.
    """
    x = min(max(x, np.float32(-87.33654)), np.float32(88.37))
    shifted = x * np.float32(1.44269504088896341) + _ROUND
    n = shifted - _ROUND
    r = x - n * np.float32(0.693359375)
    r = r + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    return p * _float((_bits(shifted) + np.int32(127)) << np.int32(23))


@njit(inline="always")
def _ordered(bits):
    """Its own inverse: maps the bits of a float32 to an int32 with the order of the floats."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@njit
def _largest(row):
    """Largest element. Compared as integers, since a maximum of floats that minds NaN does not
    vectorise; with a NaN among them it may be any element (the exponentials after it are NaN then)."""
    _wide_vectors()
    top = _ordered(_bits(row[0]))
    for j in range(row.size):
        top = max(top, _ordered(_bits(row[j])))
    return _float(_ordered(top))


@njit(fastmath=_FAST, error_model="numpy")
def _scaled(to, row, factor):
    """to = factor row"""
    _wide_vectors()
    for j in range(row.size):
        to[j] = row[j] * factor


@_kernel("void(int32)", parallel=False)
def set_blas_threads(n):
    _blas_threads(n)


@njit(inline="always")
def _cut(n, parts, p):
    """First index of part p of n, a multiple of 16 so that BLAS works on whole tiles."""
    return min(n, (n * p // parts + 15) // 16 * 16) if p < parts else n


@_kernel("void(float32[:,:], float32[:,:], float32[:,:], int64, int64, float32, float32, int64, int64)")
def gemm(c, a, b, ta, tb, alpha, beta, rows, cols):
    """c = alpha op(a) op(b) + beta c on a grid of rows x cols threads; ta, tb: transpose or not."""
    m, n = c.shape
    k = a.shape[0] if ta else a.shape[1]
    sa, sb, sc = a.strides[0], b.strides[0], c.strides[0]
    pa, pb, pc = a.ctypes.data, b.ctypes.data, c.ctypes.data
    for p in prange(rows * cols):
        i0, i1 = _cut(m, rows, p // cols), _cut(m, rows, p // cols + 1)
        j0, j1 = _cut(n, cols, p % cols), _cut(n, cols, p % cols + 1)
        if i1 > i0 and j1 > j0:
            _sgemm(
                _ROW_MAJOR,
                _T if ta else _N,
                _T if tb else _N,
                i1 - i0,
                j1 - j0,
                k,
                alpha,
                pa + (i0 * 4 if ta else i0 * sa),
                sa // 4,
                pb + (j0 * sb if tb else j0 * 4),
                sb // 4,
                beta,
                pc + i0 * sc + j0 * 4,
                sc // 4,
            )


@_kernel("void(act[:,:], act[:,:], act[:,:], boolean)")
def linear_few(y, x, w, add):
    """y = x w^T, or y += x w^T, for few rows x: what counts is to read w once, and BLAS would copy it first.

    Every element is one sum that is always added in the same order, whatever the number of rows. Rows outside: with them inside
    LLVM 22 leaves out, on some processors, the check that one row is not two."""
    n, k = x.shape
    o = w.shape[0]
    px, pw, py = x.ctypes.data, w.ctypes.data, y.ctypes.data
    for p in prange((o + 31) // 32):
        first, last = p * 32, min(o, p * 32 + 32)
        for i in range(n):
            xr, to = _row(x, px + i * x.strides[0], k), py + i * y.strides[0]
            for j in range(first, last):
                wr, yr = _row(w, pw + j * w.strides[0], k), _row(y, to + j * y.itemsize, 1)
                s = np.float32(0)
                for e in range(k):
                    s += xr[e] * wr[e]
                yr[0] = yr[0] + s if add else s


@_kernel("void(float32[:,:], float32[:,:], int8[:,::1], float32[::1], boolean)")
def linear_few_int8(y, x, w, scale, add):
    """y = x (scale w)^T, or y += it, for few rows x; row j of w has the factor scale[j]. Rows outside, as in linear_few."""
    n, k = x.shape
    o = w.shape[0]
    px, py = x.ctypes.data, y.ctypes.data
    for p in prange((o + 31) // 32):
        first, last = p * 32, min(o, p * 32 + 32)
        for i in range(n):
            xr, to = _row(x, px + i * x.strides[0], k), py + i * y.strides[0]
            for j in range(first, last):
                wr, yr = w[j], _row(y, to + j * y.itemsize, 1)
                s = np.float32(0)
                for e in range(k):
                    s += xr[e] * np.float32(wr[e])
                s *= scale[j]
                yr[0] = yr[0] + s if add else s


@_kernel("void(act[:,::1], act[:,::1])")
def copy_rows(y, x):
    """y = x"""
    for j in prange(x.shape[0]):
        y[j] = x[j]


@_kernel("void(float32[:,::1], int8[:,::1], float32[::1])")
def from_int8(y, w, scale):
    """y[j] = scale[j] w[j]"""
    o, k = w.shape
    for j in prange(o):
        to, row, factor = y[j], w[j], scale[j]
        for e in range(k):
            to[e] = np.float32(row[e]) * factor


@_kernel("void(float32[:,::1], int32[::1], int8[:,::1], float32[::1])")
def embedding_int8(y, ids, w, scale):
    """y[n] = scale[ids[n]] w[ids[n]]"""
    n, c = y.shape
    for i in prange(n):
        to, row, factor = y[i], w[ids[i]], scale[ids[i]]
        for e in range(c):
            to[e] = np.float32(row[e]) * factor


@_kernel("void(act[:,:], act[::1])")
def fill_rows(y, b):
    """y[n] = b"""
    n, o = y.shape
    base, stride = y.ctypes.data, y.strides[0]
    for i in prange(n):
        row = _row(y, base + i * stride, o)
        for j in range(o):
            row[j] = b[j]


@_kernel("void(float32[::1], act[:,:])")
def add_columns(db, dy):
    """db += sum_n dy[n]"""
    n, o = dy.shape
    base, stride = dy.ctypes.data, dy.strides[0]
    for p in prange((o + 63) // 64):
        j0, j1 = p * 64, min(o, p * 64 + 64)
        total = np.zeros(64, np.float32)
        for i in range(n):
            row = _row(dy, base + i * stride + dy.itemsize * j0, j1 - j0)
            for j in range(j1 - j0):
                total[j] += row[j]
        for j in range(j1 - j0):
            db[j0 + j] += total[j]


@_kernel("void(act[:,::1], int32[::1], act[:,::1])")
def embedding_fwd(y, ids, w):
    n, c = y.shape
    for i in prange(n):
        for j in range(c):
            y[i, j] = w[ids[i], j]


@_kernel("void(float32[:,::1], act[:,::1], int32[::1])")
def embedding_bwd(dw, dy, ids):
    n, c = dy.shape
    for p in prange((c + 63) // 64):  # each thread owns columns, so that tokens add in order
        for i in range(n):
            to, part = dw[ids[i], p * 64 : min(c, p * 64 + 64)], dy[i, p * 64 : min(c, p * 64 + 64)]
            for j in range(part.size):
                to[j] += part[j]


@_kernel("void(act[:,::1], act[:,::1], act[:,::1])")
def add(out, a, b):
    n, c = out.shape
    for i in prange(n):
        for j in range(c):
            out[i, j] = a[i, j] + b[i, j]


@_kernel("void(act[:,::1], act[:,::1], float32[::1], act[:,::1], act[:,::1], act[::1], float32, boolean)")
def add_rmsnorm_fwd(res, y, rstd, res_in, delta, w, eps, add):
    n, c = res.shape
    for i in prange(n):
        ss = np.float32(0)
        if add:
            for j in range(c):
                x = kept(res, res_in[i, j] + delta[i, j])
                res[i, j] = x
                ss += x * x
        else:
            for j in range(c):
                x = res_in[i, j]
                res[i, j] = x
                ss += x * x
        r = np.float32(1) / np.sqrt(ss / np.float32(c) + eps)
        rstd[i] = r
        for j in range(c):
            y[i, j] = res[i, j] * r * w[j]


_ROWS = 32  # rows whose weight gradient is summed before it is added to the others


@_kernel("void(act[:,::1], float32[::1], act[:,::1], act[:,::1], float32[::1], act[::1])")
def add_rmsnorm_bwd(dres, dw, dy, res, rstd, w):
    n, c = res.shape
    blocks = (n + _ROWS - 1) // _ROWS
    partial = np.zeros((blocks, c), np.float32)
    for b in prange(blocks):
        for i in range(b * _ROWS, min(n, (b + 1) * _ROWS)):
            r = rstd[i]
            dot = np.float32(0)
            for j in range(c):
                dot += dy[i, j] * w[j] * res[i, j]
            dot = dot * r / np.float32(c)
            for j in range(c):
                xhat = res[i, j] * r
                dres[i, j] += r * (dy[i, j] * w[j] - xhat * dot)
                partial[b, j] += dy[i, j] * xhat
    for b in range(blocks):
        for j in range(c):
            dw[j] += partial[b, j]


@_kernel("void(act[:,:,:], float32[:,:], act[:,:,:], act[::1], float32)")
def head_rmsnorm_fwd(y, rstd, x, w, eps):
    n, h, d = x.shape
    py, px = y.ctypes.data, x.ctypes.data
    for i in prange(n):
        for k in range(h):
            xr = _row(x, px + i * x.strides[0] + k * x.strides[1], d)
            yr = _row(y, py + i * y.strides[0] + k * y.strides[1], d)
            ss = np.float32(0)
            for j in range(d):
                ss += xr[j] * xr[j]
            r = np.float32(1) / np.sqrt(ss / np.float32(d) + eps)
            rstd[i, k] = r
            for j in range(d):
                yr[j] = xr[j] * r * w[j]


@_kernel("void(act[:,:,:], float32[::1], act[:,:,:], act[:,:,:], float32[:,:], act[::1])")
def head_rmsnorm_bwd(dx, dw, dy, x, rstd, w):
    n, h, d = x.shape
    blocks = (n + _ROWS - 1) // _ROWS
    partial = np.zeros((blocks, d), np.float32)
    pdx, pdy, px = dx.ctypes.data, dy.ctypes.data, x.ctypes.data
    for b in prange(blocks):
        for i in range(b * _ROWS, min(n, (b + 1) * _ROWS)):
            for k in range(h):
                xr = _row(x, px + i * x.strides[0] + k * x.strides[1], d)
                dyr = _row(dy, pdy + i * dy.strides[0] + k * dy.strides[1], d)
                dxr = _row(dx, pdx + i * dx.strides[0] + k * dx.strides[1], d)
                r = rstd[i, k]
                dot = np.float32(0)
                for j in range(d):
                    dot += dyr[j] * w[j] * xr[j]
                dot = dot * r / np.float32(d)
                for j in range(d):
                    xhat = xr[j] * r
                    partial[b, j] += dyr[j] * xhat
                    dxr[j] = r * (dyr[j] * w[j] - xhat * dot)
    for b in range(blocks):
        for j in range(d):
            dw[j] += partial[b, j]


@_kernel("void(act[:,:,:,:], float32[:,::1], float32[:,::1], float32)")
def rope(x, cos, sin, sign):
    nb, nt, nh, d = x.shape
    half = d // 2
    base = x.ctypes.data
    for i in prange(nb * nt):
        t = i % nt
        for h in range(nh):
            row = _row(x, base + (i // nt) * x.strides[0] + t * x.strides[1] + h * x.strides[2], d)
            for j in range(half):
                a, b, c, s = row[j], row[j + half], cos[t, j], sign * sin[t, j]
                row[j] = a * c - b * s
                row[j + half] = b * c + a * s


_BLOCK = 64  # queries whose scores against all their keys are held at once


@_kernel(
    "void(float32[:,:,:,:], float32[:,:,::1], float32[:,:,:,:], float32[:,:,:,:], float32[:,:,:,:],"
    "int32[:,::1], int64)"
)
def attention_fwd(y, lse, q, k, v, doc_start, window):
    """doc_start has no elements where there are no borders; keys before that of a block's first query are left out."""
    nb, nt, nh, d = q.shape
    ns, nk = k.shape[1], k.shape[2]
    past = ns - nt
    scale = np.float32(1 / np.sqrt(d))
    py, pq, pk, pv = y.ctypes.data, q.ctypes.data, k.ctypes.data, v.ctypes.data
    for p in prange(nb * nh):
        b, h = p // nh, p % nh
        kv = h * nk // nh
        scores = np.empty((min(_BLOCK, nt), ns), np.float32)
        ps = scores.ctypes.data
        for i0 in range(0, nt, _BLOCK):
            i1 = min(nt, i0 + _BLOCK)
            hi = past + i1
            lo = max(0, past + i0 - window + 1) if window > 0 else 0
            if doc_start.size > 0:
                lo = max(lo, doc_start[b, i0])
            kb = pk + b * k.strides[0] + lo * k.strides[1] + kv * k.strides[2]
            vb = pv + b * v.strides[0] + lo * v.strides[1] + kv * v.strides[2]
            qb = pq + b * q.strides[0] + i0 * q.strides[1] + h * q.strides[2]
            yb = py + b * y.strides[0] + i0 * y.strides[1] + h * y.strides[2]
            _sgemm(
                _ROW_MAJOR, _N, _T, i1 - i0, hi - lo, d, scale,
                qb, q.strides[1] // 4, kb, k.strides[1] // 4, 0.0, ps, ns,
            )  # fmt: skip
            for i in range(i1 - i0):
                end = past + i0 + i + 1 - lo
                start = max(0, end - window) if window > 0 else 0
                if doc_start.size > 0:
                    start = max(start, doc_start[b, i0 + i] - lo)
                row = scores[i][start:end]
                top = _largest(row)
                total = np.float32(0)
                for j in range(row.size):
                    e = _exp(row[j] - top)
                    row[j] = e
                    total += e
                lse[b, h, i0 + i] = top + np.log(total)
                inverse = np.float32(1) / total
                for j in range(row.size):
                    row[j] *= inverse
                _zero(scores[i][:start])
                _zero(scores[i][end : hi - lo])
            _sgemm(
                _ROW_MAJOR, _N, _N, i1 - i0, d, hi - lo, 1.0,
                ps, ns, vb, v.strides[1] // 4, 0.0, yb, y.strides[1] // 4,
            )  # fmt: skip
        scores[0, 0] = 0  # Numba frees an array after its last use, and does not see those of its address


@_kernel(
    "void(float32[:,:,:,:], float32[:,:,:,:], float32[:,:,:,:], float32[:,:,:,:], float32[:,:,:,:],"
    "float32[:,:,::1], float32[:,:,:,:], float32[:,:,:,:], float32[:,:,:,:], int32[:,::1], int64)"
)
def attention_bwd(dq, dk, dv, dy, y, lse, q, k, v, doc_start, window):
    nb, nt, nh, d = q.shape
    ns, nk = k.shape[1], k.shape[2]
    past, group = ns - nt, nh // nk
    scale = np.float32(1 / np.sqrt(d))
    pdq, pdk, pdv, pdy, py = dq.ctypes.data, dk.ctypes.data, dv.ctypes.data, dy.ctypes.data, y.ctypes.data
    pq, pk, pv = q.ctypes.data, k.ctypes.data, v.ctypes.data
    for p in prange(nb * nk):  # a key/value head belongs to one thread: its sums have one order
        b, kv = p // nk, p % nk
        prob = np.empty((min(_BLOCK, nt), ns), np.float32)
        dprob = np.empty((min(_BLOCK, nt), ns), np.float32)
        pp, pd = prob.ctypes.data, dprob.ctypes.data
        dk0 = pdk + b * dk.strides[0] + kv * dk.strides[2]
        dv0 = pdv + b * dv.strides[0] + kv * dv.strides[2]
        for j in range(ns):
            _zero(_row(dk, dk0 + j * dk.strides[1], d))
            _zero(_row(dv, dv0 + j * dv.strides[1], d))
        for h in range(kv * group, kv * group + group):
            for i0 in range(0, nt, _BLOCK):
                i1 = min(nt, i0 + _BLOCK)
                hi = past + i1
                lo = max(0, past + i0 - window + 1) if window > 0 else 0
                if doc_start.size > 0:
                    lo = max(lo, doc_start[b, i0])
                n, rows = hi - lo, i1 - i0
                kb = pk + b * k.strides[0] + lo * k.strides[1] + kv * k.strides[2]
                vb = pv + b * v.strides[0] + lo * v.strides[1] + kv * v.strides[2]
                qb = pq + b * q.strides[0] + i0 * q.strides[1] + h * q.strides[2]
                yb = py + b * y.strides[0] + i0 * y.strides[1] + h * y.strides[2]
                dyb = pdy + b * dy.strides[0] + i0 * dy.strides[1] + h * dy.strides[2]
                dqb = pdq + b * dq.strides[0] + i0 * dq.strides[1] + h * dq.strides[2]
                lq, lk, lv, ly = q.strides[1] // 4, k.strides[1] // 4, v.strides[1] // 4, dy.strides[1] // 4
                _sgemm(_ROW_MAJOR, _N, _T, rows, n, d, scale, qb, lq, kb, lk, 0.0, pp, ns)
                _sgemm(_ROW_MAJOR, _N, _T, rows, n, d, 1.0, dyb, ly, vb, lv, 0.0, pd, ns)
                for i in range(rows):
                    yr, dyr = _row(y, yb + i * y.strides[1], d), _row(dy, dyb + i * dy.strides[1], d)
                    dot = np.float32(0)
                    for e in range(d):
                        dot += yr[e] * dyr[e]
                    end = past + i0 + i + 1 - lo
                    start = max(0, end - window) if window > 0 else 0
                    if doc_start.size > 0:
                        start = max(start, doc_start[b, i0 + i] - lo)
                    log_sum = lse[b, h, i0 + i]
                    pr, dr = prob[i][start:end], dprob[i][start:end]
                    for j in range(pr.size):
                        x = _exp(pr[j] - log_sum)
                        pr[j] = x
                        dr[j] = x * (dr[j] - dot) * scale
                    _zero(prob[i][:start])
                    _zero(prob[i][end:n])
                    _zero(dprob[i][:start])
                    _zero(dprob[i][end:n])
                _sgemm(_ROW_MAJOR, _N, _N, rows, d, n, 1.0, pd, ns, kb, lk, 0.0, dqb, dq.strides[1] // 4)
                dkb, dvb = dk0 + lo * dk.strides[1], dv0 + lo * dv.strides[1]
                _sgemm(_ROW_MAJOR, _T, _N, n, d, rows, 1.0, pd, ns, qb, lq, 1.0, dkb, dk.strides[1] // 4)
                _sgemm(_ROW_MAJOR, _T, _N, n, d, rows, 1.0, pp, ns, dyb, ly, 1.0, dvb, dv.strides[1] // 4)
        prob[0, 0] = dprob[0, 0] = 0  # keeps them alive until here, as in attention_fwd


@_kernel("void(act[:,::1], act[:,::1])")
def swiglu_fwd(y, gu):
    n, f = y.shape
    for i in prange(n):
        _wide_vectors()
        g, u, out = gu[i, :f], gu[i, f:], y[i]
        for j in range(f):
            x = g[j]
            out[j] = x / (np.float32(1) + _exp(-x)) * u[j]


@_kernel("void(act[:,::1], act[:,::1], act[:,::1])")
def swiglu_bwd(dgu, dy, gu):
    n, f = dy.shape
    for i in prange(n):
        _wide_vectors()
        g, u, dout, dg, du = gu[i, :f], gu[i, f:], dy[i], dgu[i, :f], dgu[i, f:]
        for j in range(f):
            x = g[j]
            s = np.float32(1) / (np.float32(1) + _exp(-x))
            up, d = u[j], dout[j]
            dg[j] = d * up * s * (np.float32(1) + x * (np.float32(1) - s))
            du[j] = d * x * s


@_kernel("void(act[:,::1], act[:,::1], act[:,::1])")
def swiglu_again(y, gu, dy):
    n, f = y.shape
    for i in prange(n):
        _wide_vectors()
        g, u, dout, out = gu[i, :f], gu[i, f:], dy[i], y[i]
        # a loop of its own: in one with the other, x / e would become x * s, of other bits than those of swiglu_fwd
        for j in range(f):
            x = g[j]
            out[j] = x / (np.float32(1) + _exp(-x)) * u[j]
        for j in range(f):
            x, up, d = g[j], u[j], dout[j]
            s = np.float32(1) / (np.float32(1) + _exp(-x))
            g[j] = d * up * s * (np.float32(1) + x * (np.float32(1) - s))
            u[j] = d * x * s


@_kernel("void(float32[::1], float32[:,:], int32[::1], float32, boolean, float32)")
def cross_entropy(loss, logits, targets, scale, grad, z_loss):
    n, v = logits.shape
    for i in prange(n):
        row = _row(logits, logits[i].ctypes.data, v)
        t = targets[i]
        if t < 0:
            loss[i] = 0
            if grad:
                for j in range(v):
                    row[j] = 0
        else:
            top = _largest(row)
            total = 0.0  # float32 within 512 terms, float64 across: exact enough for any vocabulary
            own = row[t]
            for j0 in range(0, v, 512):
                part = np.float32(0)
                terms = _row(logits, row.ctypes.data + 4 * j0, min(512, v - j0))
                if grad:
                    for j in range(terms.size):
                        e = _exp(terms[j] - top)
                        terms[j] = e
                        part += e
                else:
                    for j in range(terms.size):
                        part += _exp(terms[j] - top)
                total += part
            lse = top + np.float32(np.log(total))
            loss[i] = lse - own
            if grad:
                factor = np.float32(scale * (1 + 2 * z_loss * lse) / total)
                for j in range(v):
                    row[j] *= factor
                logits[i, t] -= (
                    scale  # not row[t]: Numba drops a last store to what it takes for a local array
                )


@njit(inline="always")
def _philox(c0, c1, c2, c3, k0, k1):
    """philox.py"""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (second >> half) ^ c1 ^ k0, second & low
        c2, c3 = (first >> half) ^ c3 ^ k1, first & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return c0, c1, c2, c3


@_kernel("void(act[:,::1], act[:,::1], int32[:,::1], uint64, uint64, uint64, uint64, float32)")
def dropout(out, x, counters, k0, k1, module, least, scale):
    """scale = factor / (1 - p), least = p 2^32; a sequence is a row."""
    nb, n = x.shape
    pieces = (n + CHUNK - 1) // CHUNK
    for p in prange(nb * pieces):
        b, start = p // pieces, p % pieces * CHUNK
        number, step = np.uint64(np.uint32(counters[b, 0])), np.uint64(np.uint32(counters[b, 1]))
        row, to = x[b, start : min(n, start + CHUNK)], out[b, start : min(n, start + CHUNK)]
        whole = row.size // 4
        for g in range(whole):
            w0, w1, w2, w3 = _philox(np.uint64(start // 4 + g), module, number, step, k0, k1)
            i = 4 * g
            to[i] = row[i] * scale if w0 >= least else np.float32(0)
            to[i + 1] = row[i + 1] * scale if w1 >= least else np.float32(0)
            to[i + 2] = row[i + 2] * scale if w2 >= least else np.float32(0)
            to[i + 3] = row[i + 3] * scale if w3 >= least else np.float32(0)
        if row.size % 4:
            w0, w1, w2, _ = _philox(np.uint64(start // 4 + whole), module, number, step, k0, k1)
            for i in range(4 * whole, row.size):
                word = w0 if i % 4 == 0 else w1 if i % 4 == 1 else w2
                to[i] = row[i] * scale if word >= least else np.float32(0)


CHUNK = 16384  # elements of a flat buffer that one iteration takes


@_kernel("void(act[::1], float32)")
def fill(x, value):
    n = x.size
    for p in prange((n + CHUNK - 1) // CHUNK):
        part = x[p * CHUNK : min(n, (p + 1) * CHUNK)]
        for i in range(part.size):
            part[i] = value


@_kernel("float64(float64[::1])", parallel=False)
def joined(x):
    """sum x, where the compiler chooses the order: parts of a sum, whoever has made them, are added by this kernel alone."""
    out = 0.0
    for p in range(x.size):
        out += x[p]
    return out


@_kernel("float64[::1](float32[::1], boolean)")
def parts(x, square):
    """sum x or sum x^2 of every CHUNK elements: float32 within 256 terms, float64 across; always cut in the same places."""
    n = x.size
    chunks = (n + CHUNK - 1) // CHUNK
    partial = np.zeros(chunks, np.float64)
    for p in prange(chunks):
        end = min(n, (p + 1) * CHUNK)
        for i0 in range(p * CHUNK, end, 256):
            s = np.float32(0)
            terms = x[i0 : min(end, i0 + 256)]
            if square:
                for i in range(terms.size):
                    s += terms[i] * terms[i]
            else:
                for i in range(terms.size):
                    s += terms[i]
            partial[p] += s
    return partial


_PIECE = 1024  # elements that adamw takes at once: those of all arrays fit the first cache


@_kernel(
    "float64[::1](act[::1], boolean, float32[::1], float32[::1], float32[::1], float32[::1], float32, float32, float32,"
    "float32, float32, float32, float32, float32)"
)
def adamw(w, apart, master, m, v, g, factor, rate, c1, c2, bias1, bias2, eps, shrink):
    """rate = lr, c = 1 - beta, bias = 1 / (1 - beta^step), shrink = lr * decay; w = master where they lie apart.

    Returns the parts of sum master^2, as `parts` does: what was just updated is still in the first cache."""
    n = master.size
    chunks = (n + CHUNK - 1) // CHUNK
    partial = np.zeros(chunks, np.float64)
    for p in prange(chunks):
        end = min(n, (p + 1) * CHUNK)
        for start in range(p * CHUNK, end, _PIECE):
            part = slice(start, min(end, start + _PIECE))
            to, wp, mp, vp, gp = w[part], master[part], m[part], v[part], g[part]
            for i in range(wp.size):  # from 0: an index that might be negative keeps a loop from vectorising
                d = gp[i] * factor
                mi = mp[i] + c1 * (d - mp[i])
                vi = vp[i] + c2 * (d * d - vp[i])
                mp[i] = mi
                vp[i] = vi
                wp[i] -= rate * (mi * bias1) / (np.sqrt(vi * bias2) + eps) + shrink * wp[i]
            if apart:
                for i in range(wp.size):
                    to[i] = wp[i]
            for i0 in range(0, wp.size, 256):
                terms = wp[i0 : min(wp.size, i0 + 256)]
                s = np.float32(0)
                for i in range(terms.size):
                    s += terms[i] * terms[i]
                partial[p] += s
    return partial


compile_all(_kernels, __name__)
