"""What the tensor-core attention launches: every tile of every head once, within what a block can have."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest

from apr.backends.cuda import attention, kinds

H200, CONSUMER = 227 << 10, 99 << 10  # bytes of shared memory of a block
SHAPES = [(1, 1, 1, 1, 1), (2, 5, 5, 4, 4), (16, 2048, 2048, 14, 2), (1, 97, 257, 16, 8), (40000, 2, 2, 8, 1)]


@pytest.mark.parametrize("d", attention.HEAD_DIMS)
@pytest.mark.parametrize(("b", "t", "s", "h", "k"), SHAPES)
def test_blocks_cover_tiles_of_all_heads(b: int, t: int, s: int, h: int, k: int, d: int) -> None:
    sizes = attention.tiles(d)
    splits = attention.split_count(b, s, h, k, d)
    assert 1 <= splits <= h // k
    for which, rows, parts, geometry in (  # the last two are of backward
        ("FWD", t, h // k, attention.forward_geometry(b, t, s, h, k, d)),
        ("DQ", t, h // k, attention.dq_geometry(b, t, s, h, k, d)),
        ("DKV", s, splits, attention.dkv_geometry(b, t, s, k, d, splits)),
    ):
        tile = 16 * sizes[f"{which}_M"] * sizes[f"{which}_WARPS"]
        of_group, tiles, groups = geometry.grid
        assert (tiles - 1) * tile < rows <= tiles * tile
        pairs = of_group // parts  # of sequence and key/value head
        assert of_group == pairs * parts
        assert (groups - 1) * pairs < b * k <= groups * pairs
        assert max(tiles, groups) <= 65535  # what a grid can have in y and z
        assert geometry.block == (32 * sizes[f"{which}_WARPS"],)
        assert geometry.shared <= attention.shared_bytes(d, which != "FWD") <= H200
    (blocks,), (threads,), _ = attention.sum_geometry(b, s, k, d)
    assert (blocks - 1) * threads * 4 < 2 * b * s * k * d <= blocks * threads * 4


def test_few_keys_split_the_query_heads_and_many_do_not() -> None:
    assert attention.split_count(4, 512, 14, 2, 64) > 1
    assert attention.split_count(16, 2048, 14, 2, 64) == 1


class Fake:
    """An array as applies() sees it: bfloat16 (B,T,heads,D) inside rows of `row` elements."""

    def __init__(self, shape: tuple[int, ...], row: int, ptr: int = 256, dtype: str = "bfloat16") -> None:
        self.shape, self.dtype = shape, dtype
        self.strides = (2 * shape[1] * row, 2 * row, 2 * shape[3], 2)
        self.data: Any = np.empty(0)
        self.data = type("Data", (), {"ptr": ptr})
        self.flags = type("Flags", (), {"c_contiguous": row == prod(shape[2:])})


@pytest.mark.parametrize(
    ("change", "most", "want"),
    [
        ({}, H200, True),
        ({}, CONSUMER, True),
        (dict(backward=True), CONSUMER, True),
        (dict(backward=True, dq_ptr=264), H200, False),
        (dict(d=128), H200, True),
        (dict(d=128), CONSUMER, True),
        (dict(d=128, backward=True), H200, True),
        (dict(d=128, backward=True), CONSUMER, False),
        (dict(d=48), H200, False),
        (dict(dtype="float32"), H200, False),
        (dict(ptr=264), H200, False),
        (dict(row=14 * 64 + 4 * 64 + 4), H200, False),
        (dict(y_row=14 * 64 + 64), H200, False),
    ],
)
def test_kernels_take_what_they_can_read(change: dict[str, Any], most: int, want: bool) -> None:
    d, dtype = change.get("d", 64), change.get("dtype", "bfloat16")
    row = change.get("row", 18 * d)
    q, k = Fake((2, 5, 14, d), row, change.get("ptr", 256), dtype), Fake((2, 5, 2, d), row, 256, dtype)
    y = Fake((2, 5, 14, d), change.get("y_row", 14 * d), 256, dtype)
    dq = Fake((2, 5, 14, d), row, change.get("dq_ptr", 256), dtype)
    gradients = (dq, k, k, y) if change.get("backward") else ()
    assert attention.applies(q, k, k, y, most, *gradients) is want


@pytest.mark.parametrize(
    ("model", "want"),
    [
        (("bfloat16", 64, 151936), {"attention", "cross_entropy"}),
        (("bfloat16", 32, 151936), {"cross_entropy"}),  # mma.sync on all GPUs
        (("float32", 64, 151936), {"cross_entropy"}),
        (("bfloat16", 128, 16384), {"attention", "cross_entropy"}),
        (("bfloat16", 128, 16383), {"attention"}),
        (("float32", 64, 8191), set()),
        (("float32", 64, 8192), {"cross_entropy"}),
    ],
)
def test_a_model_depends_on_the_kind_of_kernels_that_it_uses(
    model: tuple[str, int, int], want: set[str]
) -> None:
    assert set(kinds.decisive(*model)) == want
    hopper, ampere = kinds.kinds("sm_90a"), kinds.kinds("sm_80")
    assert set(hopper) == set(ampere) == set(kinds.OPS)
    assert all(hopper[op] != ampere[op] for op in kinds.OPS)
