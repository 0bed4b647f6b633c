# mypy: ignore-errors
"""Matrix products of bfloat16 on AMX tiles: blocks of 32 x 32 sums, from operands in the order of order.py.

A tile holds 16 rows of 64 bytes. Eight of them: four of sums, two of the left operand (16 rows of 32 terms), two of the right
one (16 pairs of terms of 16 columns). TDPBF16PS adds 32 terms to a sum: those of even k in order, those of odd k in order, the
one to the other, and this to the sum. Every step rounds to the nearest even in float32, and a subnormal number, read or made,
counts as 0. So every element is a sum in one order, whatever the threads, the blocks and what stands beside it.
"""

import ctypes
import platform
import sys

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .bfloat16 import Bfloat, bfloat16, rounded

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_POINTER = _I8.as_pointer()
_SUMS = ir.VectorType(ir.FloatType(), 16)
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18
TILE_BYTES = 1024
TILE_ROW_BYTES = 64

# Palette 1, and 16 rows of 64 bytes of each of the eight tiles.
CONFIG = np.zeros(64, np.uint8)
CONFIG[0], CONFIG[16:32:2], CONFIG[48:56] = 1, TILE_ROW_BYTES, 16


def is_offered(features):
    """Say whether LLVM's features of a processor hold tiles and their products of bfloat16."""
    return all(features.get(name) for name in ("amx-tile", "amx-bf16"))


def is_permitted():
    """Ask the system for the tiles' state, for all threads of this process. A kernel that knows no AMX refuses."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0


def _call(builder, name, *args):
    name = f"llvm.x86.{name}"
    kind = ir.FunctionType(ir.VoidType(), [x.type for x in args])
    builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), args)


def multiply_block(builder, sums, a, a_row, a_step, b, blocks, adds):
    """Emit a block of 32 x 32 sums at `sums`, rows of 128 bytes, of so many blocks of 32 terms.

    a: 32 rows, a_row bytes apart, of a block; the next block is a_step bytes further. b: blocks in order, 2 KiB each.
    adds (i1): the sums go on from what is there, else from 0."""

    def at(address, offset):
        return builder.inttoptr(builder.add(address, _I64(offset)), _POINTER)

    places = [at(sums, 128 * 16 * r + 64 * c) for r in range(2) for c in range(2)]
    row = _I64(2 * TILE_ROW_BYTES)
    below = builder.mul(a_row, _I64(16))
    with builder.if_else(adds) as (then, otherwise):
        with then:
            for i, place in enumerate(places):
                _call(builder, "tileloadd64", _I8(i), place, row)
        with otherwise:
            for i in range(4):
                _call(builder, "tilezero", _I8(i))
    before = builder.block
    loop, after = builder.append_basic_block("terms"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    n = builder.phi(_I64)
    n.add_incoming(_I64(0), before)
    upper = builder.add(a, builder.mul(n, a_step))
    lower = builder.add(upper, below)
    right = builder.add(b, builder.mul(n, _I64(2 * TILE_BYTES)))
    packed = _I64(TILE_ROW_BYTES)
    for tile, address, offset, stride in (
        *((6, right, 0, packed), (4, upper, 0, a_row), (7, right, TILE_BYTES, packed), (5, lower, 0, a_row)),
    ):
        _call(builder, "tileloadd64", _I8(tile), at(address, offset), stride)
    for c, x, y in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)):
        _call(builder, "tdpbf16ps", _I8(c), _I8(x), _I8(y))
    following = builder.add(n, _I64(1))
    n.add_incoming(following, loop)
    builder.cbranch(builder.icmp_unsigned("<", following, blocks), loop, after)
    builder.position_at_end(after)
    for i, place in enumerate(places):
        _call(builder, "tilestored64", _I8(i), place, row)


@intrinsic
def begin_tiles(typing, config):
    """Give this thread eight tiles of the form at an address."""

    def generate(context, builder, signature, args):
        _call(builder, "ldtilecfg", builder.inttoptr(args[0], _POINTER))
        return context.get_dummy_value()

    return types.void(types.uintp), generate


@intrinsic
def end_tiles(typing):
    """Give back this thread's tiles, so that the system need not keep them."""

    def generate(context, builder, signature, args):
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def tile_rows(typing, sums, a, a_row, a_step, b, blocks, adds):
    """Add the products of so many blocks at a and b to 32 x 32 sums, or write them: see multiply_block."""

    def generate(context, builder, signature, args):
        *args, adds = args
        args.append(context.cast(builder, adds, types.boolean, types.boolean))
        builder.call(block_function(builder.module), args)
        return context.get_dummy_value()

    i, u = types.int64, types.uintp
    return types.void(u, u, i, i, u, i, types.boolean), generate


@intrinsic
def tile_block(typing, sums, a, b, blocks, adds):
    """Call tile_rows for an operand a in order."""

    def generate(context, builder, signature, args):
        sums, a, b, blocks, adds = args
        adds = context.cast(builder, adds, types.boolean, types.boolean)
        in_order = [_I64(TILE_ROW_BYTES), _I64(2 * TILE_BYTES)]
        builder.call(block_function(builder.module), [sums, a, *in_order, b, blocks, adds])
        return context.get_dummy_value()

    u = types.uintp
    return types.void(u, u, u, types.int64, types.boolean), generate


def block_function(module):
    """The function of multiply_block, once in a module: LLVM would copy it into every branch of the loops around it."""
    name = "apr_tile_block"
    f = module.globals.get(name)
    if f is None:
        f = ir.Function(module, ir.FunctionType(ir.VoidType(), [*[_I64] * 6, ir.IntType(1)]), name)
        f.linkage = "internal"
        f.attributes.add("noinline")
        builder = ir.IRBuilder(f.append_basic_block())
        multiply_block(builder, *f.args)
        builder.ret_void()
    return f


@intrinsic
def put_block(typing, out, to, to_bytes, sums, adds):
    """Write a block of sums at `to`, rows to_bytes apart, as elements of `out`, or add it where those are float32."""
    is_low = out.dtype == bfloat16

    def generate(context, builder, signature, args):
        _, to, to_bytes, sums, adds = args
        adds = context.cast(builder, adds, types.boolean, types.boolean)
        builder.call(_put_function(builder.module, is_low), [to, to_bytes, sums, adds])
        return context.get_dummy_value()

    u = types.uintp
    return types.void(out, u, types.int64, u, types.boolean), generate


def _put_function(module, is_low):
    name = f"apr_put_block_{'bfloat16' if is_low else 'float32'}"
    if name in module.globals:
        return module.globals[name]
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I64, _I64, _I64, ir.IntType(1)]), name)
    f.linkage = "internal"
    f.attributes.add("noinline")
    start = f.append_basic_block()
    loop, done = f.append_basic_block("row"), f.append_basic_block("done")
    builder = ir.IRBuilder(start)
    to, to_bytes, sums, adds = f.args
    builder.branch(loop)
    builder.position_at_end(loop)
    r = builder.phi(_I64)
    r.add_incoming(_I64(0), start)
    to_row, row = builder.add(to, builder.mul(r, to_bytes)), builder.add(sums, builder.mul(r, _I64(128)))
    halves = []
    for c in range(2):
        halves.append(builder.load(builder.inttoptr(builder.add(row, _I64(64 * c)), _SUMS.as_pointer())))
        halves[c].align = 4
    if is_low:
        both = narrow(builder, *halves)
        builder.store(both, builder.inttoptr(to_row, both.type.as_pointer())).align = 2
    else:
        for c, x in enumerate(halves):
            at = builder.inttoptr(builder.add(to_row, _I64(64 * c)), _SUMS.as_pointer())
            old = builder.load(at)
            old.align = 4
            builder.store(builder.select(adds, builder.fadd(old, x), x), at).align = 4
    following = builder.add(r, _I64(1))
    r.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_unsigned("<", following, _I64(32)), loop, done)
    builder.position_at_end(done)
    builder.ret_void()
    return f


def narrow(builder, low, high):
    """Round two vectors of sums, none of them subnormal, to one of bfloat16."""
    features = llvmlite.binding.get_host_cpu_features()
    chosen = numba.config.CPU_NAME or numba.config.CPU_FEATURES or not numba.config.ENABLE_AVX
    if chosen or not features.get("avx512bf16"):
        order = ir.Constant(ir.VectorType(ir.IntType(32), 32), list(range(32)))
        return builder.shuffle_vector(rounded(builder, low, 16), rounded(builder, high, 16), order)
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    kind = ir.FunctionType(ir.VectorType(Bfloat(), 32), [_SUMS, _SUMS])
    f = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(f, [high, low])
