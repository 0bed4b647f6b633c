"""Learning-rate schedules at their edges."""

from __future__ import annotations

from itertools import pairwise

import pytest

from apr.common.errors import UsageError
from apr.model.schedule import SCHEDULES, Schedule

LR, MIN = 1e-3, 1e-4
EDGES: list[tuple[str, int, dict[int, float]]] = [  # kind, warm-up steps of 100, learning rate of some steps
    ("cosine", 10, {1: LR / 10, 5: LR / 2, 10: LR, 55: (LR + MIN) / 2, 100: MIN, 101: MIN, 1000: MIN}),
    ("cosine", 0, {50: (LR + MIN) / 2, 100: MIN}),
    ("linear", 10, {1: LR / 10, 10: LR, 55: (LR + MIN) / 2, 100: MIN, 101: MIN}),
    ("linear", 0, {1: LR - (LR - MIN) / 100, 100: MIN}),
    ("wsd", 10, {1: LR / 10, 10: LR, 11: LR, 80: LR, 90: (LR + MIN) / 2, 100: MIN, 101: MIN}),
    ("wsd", 90, {89: LR * 89 / 90, 90: LR, 95: (LR + MIN) / 2, 100: MIN}),
    ("constant", 10, {1: LR / 10, 10: LR, 11: LR, 100: LR, 1000: LR}),
    ("constant", 0, {1: LR, 100: LR}),
    ("cosine", 100, {50: LR / 2, 100: LR, 101: MIN}),
    ("cosine", 200, {100: LR / 2, 200: LR}),
]


@pytest.mark.parametrize(
    ("kind", "warmup", "want"), EDGES, ids=lambda x: str(x) if not isinstance(x, dict) else ""
)
def test_schedule_at_its_edges(kind: str, warmup: int, want: dict[int, float]) -> None:
    schedule = Schedule(kind, LR, MIN, warmup, 100)
    assert {n: schedule(n) for n in want} == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 10, 99, 100])
def test_schedule_rises_then_falls_and_stays_in_range(kind: str, warmup: int) -> None:
    rates = [Schedule(kind, LR, MIN, warmup, 100)(n) for n in range(1, 131)]
    assert all(0 < r <= LR for r in rates)
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b >= MIN for a, b in pairwise(rates[max(warmup, 1) - 1 :]))


def test_unknown_schedule_names_the_choices() -> None:
    with pytest.raises(UsageError, match="--schedule step: choose one of cosine, wsd, linear, constant"):
        Schedule("step", LR, MIN, 0, 1)
