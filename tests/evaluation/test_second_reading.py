"""Figures of evaluations are made again, of their rows and the file: what differs is a fault."""

from __future__ import annotations

import copy
import json

import pytest

from apr.common.errors import AprError
from apr.evaluation.again import check_choices, check_sums_of_positions

QUESTIONS = [
    {"context": "a", "choices": [" x", " yy", "zzz"], "answer": " yy"},
    {"goal": "g", "sol1": "one", "sol2": "two words", "label": "1"},
    {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
]
SOUND = {
    "accuracy": {
        "sum": {"value": 2 / 3, "stderr": (2 / 9 / 2) ** 0.5},
        "per_byte": {"value": 1.0, "stderr": 0.0},
        "per_token": {"value": 2 / 3, "stderr": (2 / 9 / 2) ** 0.5},
    },
    "chance": (1 / 3 + 1 / 2 + 1 / 2) / 3,
    "items": 3,
    "rows": [
        {"log_probabilities": [-3.0, -3.5, -9.0], "tokens": [1, 1, 2]},
        {"log_probabilities": [-9.0, -8.0], "tokens": [1, 2]},
        {"log_probabilities": [-1.0, -2.0], "tokens": [1, 1]},
    ],
}
FAULTS = {
    "chance of the mean number": lambda x: x | {"chance": 3 / 7},
    "a question too many": lambda x: x | {"items": 4},
    "error by n": lambda x: x["accuracy"]["sum"].update(stderr=(2 / 9 / 3) ** 0.5),
    "bytes with the joining space": lambda x: x["accuracy"]["per_byte"].update(value=2 / 3),
    "another rule": lambda x: x["accuracy"]["per_token"].update(value=1.0),
}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return str(tmp_path / "q.jsonl")


def test_sound_figures_pass(path):
    check_choices(path, None, SOUND)
    one = copy.deepcopy(SOUND) | {"items": 1, "rows": SOUND["rows"][:1], "chance": 1 / 3}
    for rule, value in (("sum", 0.0), ("per_byte", 1.0), ("per_token", 0.0)):
        one["accuracy"][rule] = {"value": value, "stderr": None}
    check_choices(path, 1, one)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_figure_that_is_another_is_a_fault(path, fault):
    found = copy.deepcopy(SOUND)
    with pytest.raises(AprError):
        check_choices(path, None, fault(found) or found)


def test_a_limit_that_was_ignored_is_a_fault(path):
    with pytest.raises(AprError, match="2 questions of the file, 3 were scored"):
        check_choices(path, 2, SOUND)


def test_ranges_of_positions():
    rows = [
        {"first": 1, "last": 1, "loss": 2.0, "tokens": 3},
        {"first": 2, "last": 3, "loss": 1.0, "tokens": 6},
        {"first": 8, "last": 12, "loss": 0.5, "tokens": 2},
    ]
    check_sums_of_positions(rows, 11, 13.0)
    early = [r | {"first": r["first"] - 1, "last": r["last"] - 1} for r in rows]
    for wrong, tokens, nats in ((early, 11, 13.0), (rows, 12, 13.0), (rows, 11, 12.0), (rows[1:], 11, 13.0)):
        with pytest.raises(AprError, match="losses by position"):
            check_sums_of_positions(wrong, tokens, nats)
