"""A rank that differs or is slow is named; sound ones on a loaded machine are not."""

from __future__ import annotations

import numpy as np
import pytest

from apr.evidence.gates import BOUNDS
from apr.evidence.ranks import SLOW_STEPS, crossed, slowest

RIGHT, WRONG = [("a", 1), ("b", 2)], [("a", 1), ("b", 3)]


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("shift", [1, -1])
def test_the_rank_that_differs_is_in_every_pair_that_does(count, shift):
    def of(rank, wrong):
        return WRONG if rank == wrong else RIGHT

    assert not crossed([((r + shift) % count, RIGHT, RIGHT) for r in range(count)])
    why = crossed([((r + shift) % count, of(r, 1), of(r, 1)) for r in range(count)])
    assert "finds another b" in why
    assert ("it is rank 1 that differs" in why) is (count > 2)


def test_times_of_a_loaded_machine_make_no_rank_slow():
    """A rank gets the processor in some steps only, and each step takes up to ten times what it should."""
    rng = np.random.default_rng(0)
    for count in (2, 3, 8):
        for _ in range(50):
            seconds = 0.01 * (1 + 9 * rng.random((SLOW_STEPS, count)) ** 2)
            assert slowest(seconds)[1] < BOUNDS["straggler"]
            seconds[:, 1] += 0.03
            assert slowest(seconds)[0] == 1
            assert slowest(seconds)[1] > BOUNDS["straggler"]
