"""Integers divided and rounded upwards: sizes of grids, paddings and alignments."""

from __future__ import annotations


def ceil_div(n: int, d: int) -> int:
    """n / d, rounded up to an integer."""
    return -(-n // d)


def round_up(n: int, multiple: int) -> int:
    """n, rounded up to a multiple."""
    return -(-n // multiple) * multiple
