# mypy: ignore-errors
"""Blocks of matrix products in bfloat16: 32 rows by 32 columns of float32, on the instructions that a processor has.

| path        | instruction                     | adds                                                        |
|-------------|---------------------------------|-------------------------------------------------------------|
| amx         | tdpbf16ps, 16 x 16 sums         | 32 terms, those of even k and of odd k apart: amx.py        |
| avx512_bf16 | vdpbf16ps, 16 sums at a time    | the two products of a pair, then pairs in the order of k    |
| float32     | none: operands are widened      | as in float32                                               |

Subnormal operands and sums count as 0 in vdpbf16ps, and it rounds sums to the nearest even, the product of a pair not first.
Every element is a sum in one order, whatever the threads and whatever stands beside it.
"""

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import amx
from .amx import narrow
from .bfloat16 import Bfloat, bfloat16, rounded

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_SUMS, _PAIRS, _HALVES = (ir.VectorType(t, 16) for t in (_F32, _I32, ir.IntType(16)))
EDGE = 32  # rows, columns and terms of a block
LINE = 64  # bytes of a line of a cache
BLOCK_BYTES, SUMS_BYTES = 2 * EDGE * EDGE, 4 * EDGE * EDGE  # of an operand's block, and of sums
ROWS, COLUMNS = 8, 2  # of sums that stay in registers: rows, vectors


def _features():
    """LLVM's features of this processor, none where Numba compiles for another one.

    Somebody's choice: of another processor perhaps, or of code without AVX, for which LLVM ends the process."""
    config = numba.config
    if config.CPU_NAME or config.CPU_FEATURES or not config.ENABLE_AVX:
        return {}
    return llvmlite.binding.get_host_cpu_features()


def has_vectors():
    """Say whether this processor has registers for a block's sums: 32 of 512 bits."""
    return bool(_features().get("avx512f"))


def path():
    """Name the path of this processor."""
    features = _features()
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
def dot_rows(
    typing, out, to, to_bytes, adds, a, row_bytes, pair_bytes, step, b, blocks, bias, sums, goes_on, ends
):
    """Compute ROWS rows of 32 sums, from 0 or, where it goes on, from those at `sums`; write them there unless it ends.

    Where it ends they are written at `to`, to_bytes apart, as elements of `out`, with the bias at an address (0: none), or
    added. Row r of A has its pair p at a + r row_bytes + p pair_bytes, B has its at b + 64 p and 1024 behind it, both the next
    16 `step` and BLOCK_BYTES further."""
    is_low = out.dtype == bfloat16

    def generate(context, builder, signature, args):
        flags = {3, 13, 14}
        args = [
            context.cast(builder, x, types.boolean, types.boolean) if i in flags else x
            for i, x in enumerate(args)
        ]
        builder.call(_rows_function(builder.module, is_low), args[1:])
        return context.get_dummy_value()

    i, u, f = types.int64, types.uintp, types.boolean
    return types.void(out, u, i, f, u, i, i, i, u, i, u, u, f, f), generate


def _rows_function(module, is_low):
    """The function of dot_rows, once in a module: LLVM would copy its 256 instructions into every branch around it."""
    name = f"apr_dot_rows_{'bfloat16' if is_low else 'float32'}"
    if name in module.globals:
        return module.globals[name]
    flag = ir.IntType(1)
    kinds = [_I64, _I64, flag, *[_I64] * 8, flag, flag]
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), name)
    f.linkage = "internal"
    f.attributes.add("noinline")
    builder = ir.IRBuilder(f.append_basic_block())
    to, to_bytes, adds, a, row_bytes, pair_bytes, step, b, blocks, bias, sums, goes_on, ends = f.args
    kind = _operand()
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    dot = module.globals.get(name) or ir.Function(module, ir.FunctionType(_SUMS, [_SUMS, kind, kind]), name)
    size = 2 if is_low else 4

    def at(address, pointer):
        return builder.inttoptr(address, pointer.as_pointer())

    def load(address, pointer, align=4):
        x = builder.load(at(address, pointer))
        x.align = align
        return x

    def store(x, address):
        builder.store(x, at(address, x.type)).align = 2

    def spread(x):
        one = builder.insert_element(ir.Constant(_PAIRS, ir.Undefined), x, _I32(0))
        return builder.shuffle_vector(one, ir.Constant(_PAIRS, ir.Undefined), ir.Constant(_PAIRS, [0] * 16))

    def operand(x):
        return x if kind == _PAIRS else builder.bitcast(x, kind)

    def place(i):
        return builder.add(sums, _I64(64 * i))

    def choose(condition, one, other):
        """Values of one of two branches."""
        with builder.if_else(condition) as (then, otherwise):
            with then:
                first = one()
                from_first = builder.block
            with otherwise:
                second = other()
                from_second = builder.block
        chosen = []
        for x, y in zip(first, second, strict=True):
            z = builder.phi(x.type)
            z.add_incoming(x, from_first)
            z.add_incoming(y, from_second)
            chosen.append(z)
        return chosen

    count = ROWS * COLUMNS
    with builder.if_then(ends):  # lines that will be written are on their way while the sums are made
        for r in range(ROWS):
            for offset in range(0, 16 * size * COLUMNS, 64):
                where = builder.add(to, builder.mul(_I64(r), to_bytes))
                prefetch_line(builder, builder.add(where, _I64(offset)))
    before = choose(
        goes_on,
        lambda: [load(place(i), _SUMS) for i in range(count)],
        lambda: [ir.Constant(_SUMS, [0.0] * 16)] * count,
    )
    start = builder.block
    loop = builder.append_basic_block("pairs")
    after = builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    n = builder.phi(_I64)
    n.add_incoming(_I64(0), start)
    own = []
    for x in before:
        s = builder.phi(_SUMS)
        s.add_incoming(x, start)
        own.append(s)
    new = list(own)
    a0, b0 = builder.add(a, builder.mul(n, step)), builder.add(b, builder.mul(n, _I64(BLOCK_BYTES)))
    for p in range(16):
        columns = [operand(load(builder.add(b0, _I64(64 * p + 1024 * c)), _PAIRS)) for c in range(COLUMNS)]
        ap = builder.add(a0, builder.mul(_I64(p), pair_bytes))
        for r in range(ROWS):
            x = operand(spread(load(builder.add(ap, builder.mul(_I64(r), row_bytes)), _I32, 2)))
            for c in range(COLUMNS):
                i = r * COLUMNS + c
                new[i] = builder.call(dot, [new[i], x, columns[c]])
    following = builder.add(n, _I64(1))
    n.add_incoming(following, loop)
    for s, x in zip(own, new, strict=True):
        s.add_incoming(x, loop)
    builder.cbranch(builder.icmp_unsigned("<", following, blocks), loop, after)
    builder.position_at_end(after)
    with builder.if_else(ends) as (then, otherwise):
        with otherwise:
            for i, x in enumerate(new):
                store(x, place(i))
        with then:
            is_plain = builder.icmp_unsigned("==", bias, _I64(0))
            with builder.if_then(is_plain):
                _write_rows(builder, new, to, to_bytes, size, adds, load, store)
            with builder.if_then(builder.not_(is_plain)):
                _write_biased(builder, new, to, to_bytes, size, bias, load, store)
    builder.ret_void()
    return f


def _write_rows(builder, new, to, to_bytes, size, adds, load, store):
    """Emit the rows of sums as they are stored: rounded in pairs of vectors, or added."""
    for r in range(ROWS):
        where = builder.add(to, builder.mul(_I64(r), to_bytes))
        row = new[r * COLUMNS : (r + 1) * COLUMNS]
        if size == 2:
            store(narrow(builder, *row), where)
            continue
        for c, x in enumerate(row):
            place = builder.add(where, _I64(64 * c))
            with builder.if_else(adds) as (then, otherwise):
                with then:
                    store(builder.fadd(load(place, _SUMS), x), place)
                with otherwise:
                    store(x, place)


def _write_biased(builder, new, to, to_bytes, size, bias, load, store):
    """Emit the rows of sums with a bias; such a sum may be subnormal, which the processor's own rounding takes for 0."""
    more = []
    for c in range(COLUMNS):
        halves = load(builder.add(bias, _I64(32 * c)), _HALVES, 2)
        wide = builder.shl(builder.zext(halves, _PAIRS), ir.Constant(_PAIRS, [16] * 16))
        more.append(builder.bitcast(wide, _SUMS))
    for i, x in enumerate(new):
        r, c = divmod(i, COLUMNS)
        where = builder.add(builder.add(to, builder.mul(_I64(r), to_bytes)), _I64(16 * size * c))
        y = builder.fadd(x, more[c])
        store(rounded(builder, y, 16) if size == 2 else y, where)


def prefetch_line(builder, address, to_write=True):
    """Emit a request for the line of an address."""
    pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    name = "llvm.prefetch.p0i8"
    kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
    f = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(f, [builder.inttoptr(address, pointer), number(int(to_write)), number(3), number(1)])
