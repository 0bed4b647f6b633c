"""Dropout: the published words of the generator, equal bits on every backend, and masks that are random in every part of
their counter."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from apr import backends
from apr.backends import philox
from cases import BF16

reference = backends.get("reference")
SEED = 0x123456789ABCDEF


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [  # of Random123 (kat_vectors), which Salmon et al. published with the paper
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], want: str) -> None:
    found = philox.words(np.array(counter, np.uint32), key)
    assert " ".join(f"{int(x):08x}" for x in found) == want


def applied(
    be: Any, x: np.ndarray, counters: Any, seed: int, module: int, p: float, factor: float = 1.0
) -> Any:
    """dropout of x (B,T,C) on a backend."""
    out, given, where = (be.empty(a.shape, a.dtype) for a in (x, x, np.asarray(counters, np.int32)))
    be.from_host(given, x)
    be.from_host(where, np.asarray(counters, np.int32))
    be.dropout(out, given, where, seed, module, p, factor)
    return be.to_host(out)


def numbers(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Draw numbers of a dtype."""
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("cpu", np.float32),
        ("cpu", BF16),
        pytest.param("cuda", np.float32, marks=pytest.mark.gpu),
        pytest.param("cuda", BF16, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 59), (3, 257, 64), (2, 1025, 97)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_bits_are_those_of_the_reference(
    request: pytest.FixtureRequest, name: str, dtype: Any, shape: tuple[int, ...], p: float
) -> None:
    be = request.getfixturevalue("cuda") if name == "cuda" else backends.get(name)
    x = numbers(shape, dtype)
    counters = [[b, 2**31 - 1 - b] for b in range(shape[0])]
    want = applied(reference, x.astype(np.float32), counters, SEED, 5, p, 0.7).astype(dtype)
    # Of a seed its 64 lowest bits count.
    for seed in (SEED, SEED + 2**64):
        assert applied(be, x, counters, seed, 5, p, 0.7).tobytes() == want.tobytes()
    if p == 0.0:
        assert np.array_equal(want, (np.float32(0.7) * x.astype(np.float32)).astype(dtype))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_a_share_of_p_is_dropped(p: float) -> None:
    found = philox.kept(np.array([[3, 4]], np.int32), 1 << 18, 7, 0, p)
    assert abs(1 - found.mean() - p) < 5 * np.sqrt(p * (1 - p) / found.size)


def test_masks_of_other_counters_are_others() -> None:
    """Of seed, module, sequence and step each, by one and by one bit of each half; and neighbours in one mask."""
    n = 1 << 14
    masks = {
        (seed, module, number, step): philox.kept(np.array([[number, step]], np.int32), n, seed, module, 0.5)[
            0
        ]
        for seed, module, number, step in [
            (0, 0, 0, 1),
            *((1 << bit, 0, 0, 1) for bit in (0, 16, 32, 48)),
            *((0, 1 << bit, 0, 1) for bit in (0, 16)),
            *((0, 0, 1 << bit, 1) for bit in (0, 16)),
            *((0, 0, 0, 1 + (1 << bit)) for bit in (0, 16)),
        ]
    }
    first = masks[0, 0, 0, 1]
    masks |= {(0, 0, 0, -k): np.roll(first, k) for k in (1, 2, 3, 4, 8)}
    for (a, x), (b, y) in combinations(masks.items(), 2):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(n), (a, b)
