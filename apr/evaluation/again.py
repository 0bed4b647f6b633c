"""Compute figures of an evaluation a second time, from its rows and the file of the questions, read again by other code."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

from ..common.errors import AprError
from ..common.units import plural
from .humaneval import read_jsonl

RELATIVE_TOLERANCE = 1e-9


def check_choices(path: str, limit: int | None, found: Mapping[str, Any]) -> None:
    """Require the accuracies, standard errors and chance of `choices.measure` to be those of its rows, for the questions that the
    file has. Raises AprError."""
    questions, rows = _questions(path)[:limit], found["rows"]
    if not len(rows) == len(questions) == found["items"]:
        asked = plural(len(questions), "question")
        raise AprError(
            f"{path}: {asked} of the file, {len(rows):,} were scored and {found['items']:,} are said"
        )
    right: dict[str, list[int]] = {rule: [] for rule in found["accuracy"]}
    for (texts, answer), row in zip(questions, rows, strict=True):
        divisors = {
            "sum": [1] * len(texts),
            "per_byte": [len(x.encode()) for x in texts],
            "per_token": row["tokens"],
        }
        for rule, of_rule in right.items():
            shares = [x / n for x, n in zip(row["log_probabilities"], divisors[rule], strict=True)]
            of_rule.append(int(shares.index(max(shares)) == answer))
    _same(
        path,
        "chance",
        found["chance"],
        float(sum(Fraction(1, len(t)) for t, _ in questions) / len(questions)),
    )
    for rule, of_rule in right.items():
        said, n = found["accuracy"][rule], len(of_rule)
        _same(path, f"accuracy, {rule}", said["value"], sum(of_rule) / n)
        if n > 1:
            _same(path, f"standard error, {rule}", said["stderr"], statistics.stdev(of_rule) / n**0.5)


def _questions(path: str) -> list[tuple[list[str], int]]:
    """Read the choices, without the space that joins them, and the number of the right one."""
    return [_question(row) for _, row in read_jsonl(path, "questions")]


def _question(row: Mapping[str, Any]) -> tuple[list[str], int]:
    if "question" in row and "answerKey" in row:
        return row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])
    if "goal" in row:
        return [row["sol1"], row["sol2"]], int(row["label"])
    answer = row["answer"]
    number = row["choices"].index(answer) if isinstance(answer, str) else answer
    return [t.removeprefix(" ") if t != " " else t for t in row["choices"]], number


def _same(path: str, name: str, said: float | None, want: float) -> None:
    if said is None or abs(said - want) > RELATIVE_TOLERANCE * max(1.0, abs(want)):
        raise AprError(
            f"{path}: {name} is said to be {said}, made again of the rows {want:.6g}: a fault of apr"
        )


def check_sums_of_positions(rows: Sequence[Mapping[str, Any]], tokens: int, nats: float) -> None:
    """Require ranges of positions to begin at powers of two, counted from 1, and their tokens and losses to add up.

    Raises AprError."""
    ranges = [(r["first"], r["last"]) for r in rows]
    is_right = all(1 <= a <= b and not a & (a - 1) for a, b in ranges)
    is_right &= all(b < c for (_, b), (c, _) in pairwise(ranges))
    total = sum(r["loss"] * r["tokens"] for r in rows)
    if (
        not is_right
        or sum(r["tokens"] for r in rows) != tokens
        or abs(total - nats) > 1e-6 * max(1.0, abs(nats))
    ):
        raise AprError(
            f"losses by position, {ranges}, do not add up to {nats:.6g} nats of {plural(tokens, 'token')}: a fault of apr"
        )
