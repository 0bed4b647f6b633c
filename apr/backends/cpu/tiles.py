# mypy: ignore-errors
"""Blocks of matrix products in bfloat16: 32 rows by 32 columns of float32, on the instructions that a processor has.

| path        | instruction                     | adds                                                        |
|-------------|---------------------------------|-------------------------------------------------------------|
| amx         | tdpbf16ps, 16 x 16 sums         | 32 terms, those of even k and of odd k apart: amx.py        |
| avx512_bf16 | vdpbf16ps, 16 sums at a time    | the two products of a pair, then pairs in the order of k    |
| float32     | none: operands are widened      | OpenBLAS's                                                  |

Subnormal operands and sums count as 0 in vdpbf16ps, and it rounds sums to the nearest even, the product of a pair not first.
Every element is a sum in one order, whatever the threads and whatever stands beside it.
"""

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import amx
from .bfloat16 import Bfloat, bfloat16, rounded

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_SUMS, _PAIRS = ir.VectorType(_F32, 16), ir.VectorType(_I32, 16)
EDGE = 32  # rows, columns and terms of a block
LINE = 64  # bytes of a line of a cache
BLOCK_BYTES = 2 * EDGE * EDGE
ROWS, COLUMNS = 8, 2  # of sums that stay in registers: rows, vectors


def path():
    """Name the path of this processor."""
    config = numba.config
    # Somebody's choice: of another processor perhaps, or of code without AVX, for which LLVM ends the process.
    if config.CPU_NAME or config.CPU_FEATURES or not config.ENABLE_AVX:
        return "float32"
    features = llvmlite.binding.get_host_cpu_features()
    if amx.is_offered(features) and amx.is_permitted():
        return "amx"
    return "avx512_bf16" if features.get("avx512bf16") else "float32"


def _operand():
    """Type of the operands of LLVM's intrinsic, which newer versions have changed."""
    text = "declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, {0}, {0})"
    for kind in (ir.VectorType(Bfloat(), 32), _PAIRS):
        try:
            llvmlite.binding.parse_assembly(text.format(kind)).verify()
        except RuntimeError:
            continue
        return kind
    raise RuntimeError("this LLVM has no llvm.x86.avx512bf16.dpbf16ps.512")


@intrinsic
def dot_rows(typing, out, to, to_bytes, adds, a, row_bytes, pair_bytes, b, blocks):
    """Write ROWS rows of 32 sums at `to`, to_bytes apart, as elements of `out`, or add them: row r of A has its pair p at
    a + r row_bytes + p pair_bytes, B has its at b + 64 p and 1024 behind it, both the next 16 BLOCK_BYTES further."""
    is_low = out.dtype == bfloat16

    def generate(context, builder, signature, args):
        _, to, to_bytes, adds, *others = args
        adds = context.cast(builder, adds, types.boolean, types.boolean)
        builder.call(_rows_function(builder.module, is_low), [to, to_bytes, adds, *others])
        return context.get_dummy_value()

    i, u = types.int64, types.uintp
    return types.void(out, u, i, types.boolean, u, i, i, u, i), generate


def _rows_function(module, is_low):
    """The function of dot_rows, once in a module: LLVM would copy its 256 instructions into every branch around it."""
    name = f"apr_dot_rows_{'bfloat16' if is_low else 'float32'}"
    if name in module.globals:
        return module.globals[name]
    kinds = [_I64, _I64, ir.IntType(1), *[_I64] * 5]
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), name)
    f.linkage = "internal"
    f.attributes.add("noinline")
    builder = ir.IRBuilder(f.append_basic_block())
    to, to_bytes, adds, a, row_bytes, pair_bytes, b, blocks = f.args
    kind = _operand()
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    dot = module.globals.get(name) or ir.Function(module, ir.FunctionType(_SUMS, [_SUMS, kind, kind]), name)

    def at(address, pointer):
        return builder.inttoptr(address, pointer.as_pointer())

    def load(address, pointer):
        x = builder.load(at(address, pointer))
        x.align = 4
        return x

    def spread(x):
        one = builder.insert_element(ir.Constant(_PAIRS, ir.Undefined), x, _I32(0))
        return builder.shuffle_vector(one, ir.Constant(_PAIRS, ir.Undefined), ir.Constant(_PAIRS, [0] * 16))

    def operand(x):
        return x if kind == _PAIRS else builder.bitcast(x, kind)

    before = builder.block
    loop = builder.append_basic_block("pairs")
    after = builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    n = builder.phi(_I64)
    n.add_incoming(_I64(0), before)
    sums = []
    for _ in range(ROWS * COLUMNS):
        s = builder.phi(_SUMS)
        s.add_incoming(ir.Constant(_SUMS, [0.0] * 16), before)
        sums.append(s)
    new = list(sums)
    block = builder.mul(n, _I64(BLOCK_BYTES))
    a0, b0 = builder.add(a, block), builder.add(b, block)
    for p in range(16):
        columns = [operand(load(builder.add(b0, _I64(64 * p + 1024 * c)), _PAIRS)) for c in range(COLUMNS)]
        ap = builder.add(a0, builder.mul(_I64(p), pair_bytes))
        for r in range(ROWS):
            x = operand(spread(load(builder.add(ap, builder.mul(_I64(r), row_bytes)), _I32)))
            for c in range(COLUMNS):
                i = r * COLUMNS + c
                new[i] = builder.call(dot, [new[i], x, columns[c]])
    following = builder.add(n, _I64(1))
    n.add_incoming(following, loop)
    for s, x in zip(sums, new, strict=True):
        s.add_incoming(x, loop)
    builder.cbranch(builder.icmp_unsigned("<", following, blocks), loop, after)
    builder.position_at_end(after)
    size = 2 if is_low else 4
    for i, x in enumerate(new):
        where = builder.add(to, builder.mul(_I64(i // COLUMNS), to_bytes))
        where = builder.add(where, _I64(16 * size * (i % COLUMNS)))
        if is_low:
            store = builder.store(rounded(builder, x, 16), at(where, ir.VectorType(ir.IntType(16), 16)))
        else:
            with builder.if_else(adds) as (then, otherwise):
                with then:
                    more = builder.fadd(load(where, _SUMS), x)
                    from_then = builder.block
                with otherwise:
                    from_otherwise = builder.block
            y = builder.phi(_SUMS)
            y.add_incoming(more, from_then)
            y.add_incoming(x, from_otherwise)
            store = builder.store(y, at(where, _SUMS))
        store.align = 2
    builder.ret_void()
    return f
