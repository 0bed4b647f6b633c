"""The second formula of the order of the data gives the reader's windows, in any number of passes and sources."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

from apr.common.events import StepBegun
from apr.data.batches import Batches, Permutation, Windows
from apr.data.shards import Shards
from apr.data.turns import Turns
from apr.evidence import order
from apr.evidence.order import permuted, turns, window
from apr.evidence.stream import DataGate, windows_of_shards


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 257, 1025, 70_001])
def test_permutations_are_equal(n):
    places = np.arange(min(n, 60))
    for name in (0, 3, "2 of source 1"):
        want = Permutation(n, 42, name)(places).tolist()
        assert [permuted(int(i), n, f"42 {name}") for i in places] == want


def test_turns_are_equal():
    rng = np.random.default_rng(0)
    for _ in range(60):
        counts = rng.integers(1, 40, rng.integers(1, 6)).tolist()
        first, count = int(rng.integers(0, 300)), int(rng.integers(1, 120))
        sources, positions = Turns(counts)(np.arange(first, first + count))
        want = [*zip(sources.tolist(), positions.tolist(), strict=True)]
        assert [*islice(turns(counts, first), count)] == want


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_pass_has_each_window_once(shuffle):
    sizes, counts = [7, 12], [2, 1]
    found = [(k, window(k, i, 5, shuffle, sizes[k])) for k, i in islice(turns(counts, 0), 3 * 12)]
    for k, n in enumerate(sizes):
        own = [number for source, number in found if source == k]
        assert sorted(own[:n]) == list(range(n))
        assert (own[:n] == list(range(n))) is not shuffle


class OfOneArray(Shards):
    """Tokens of a single file, which is not there."""

    def __init__(self, tokens):
        self.folder, self.arrays, self.masks = None, [tokens], []

    def check_sizes(self, indices):
        """Do nothing."""


def test_places_are_computed_in_the_steps_that_are_compared(monkeypatch):
    """Rows of the others take their turns, and nothing else."""
    placed = []
    monkeypatch.setattr(order, "permuted", lambda *a: placed.append(a) or permuted(*a))
    batches = Batches(Windows(OfOneArray(np.arange(201, dtype=np.uint32)), 4), 3, seed=5)
    settings = SimpleNamespace(seed=5, shuffle=True, batch_size=3)
    gate = DataGate(SimpleNamespace(settings=settings, batches=batches), None, lambda steps: steps in (0, 4))
    for step in range(1, 6):
        ids, targets = batches.next()
        gate.step_begun(StepBegun(step, ids, targets))
        assert not gate.why
        assert len(placed) == (6 if step == 5 else 3)
    gate.is_followed = lambda steps: True
    gate.step_begun(StepBegun(6, ids, targets))
    assert "row 0 of the batch is not window" in gate.why


@pytest.mark.parametrize(("stride", "counts"), [(8, [0, 0, 0, 1, 1, 2]), (9, [0, 0, 0, 1, 1, 1])])
def test_windows_of_shards_that_hold_few_tokens_or_none(stride, counts):
    """Windows of text share a token with their neighbours, rows of packed examples do not."""
    arrays = [np.zeros(n, np.uint16) for n in (0, 1, 8, 9, 16, 17)]
    shards = SimpleNamespace(arrays=arrays, strides=lambda seq_length: [stride] * len(arrays))
    assert windows_of_shards(SimpleNamespace(shards=shards), 8) == counts
