"""Taps: functions that are given every array of a pass.

A tap is called as tap(layer, name, array) right after the array is made; layer is None outside the
blocks, gradients are named "d_" + name. A tap may change the array in place.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

Tap = Callable[[int | None, str, Any], None]


def no_tap(layer: int | None, name: str, x: Any) -> None:
    """Ignore the array."""


def key(layer: int | None, name: str) -> str:
    """Name of an array in a trace: "3.qkv" in a block, "logits" outside."""
    return name if layer is None else f"{layer}.{name}"


class Record:
    """Keep a host copy of every array, in order of computation: .seen["3.qkv"]."""

    def __init__(self, backend: ModuleType) -> None:
        self.backend = backend
        self.seen: dict[str, np.ndarray] = {}

    def __call__(self, layer: int | None, name: str, x: Any) -> None:
        self.seen[key(layer, name)] = self.backend.to_host(x)


class Compare:
    """Compare every array with a Record's.

    rows holds (key, max |got - want|, max |want|) in order of computation; NaN where either is NaN.
    With force=True the recorded array then takes the place of the computed one, so that each row shows the
    error of one op and nothing inherited.
    """

    def __init__(self, backend: ModuleType, want: dict[str, np.ndarray], force: bool) -> None:
        self.backend, self.want, self.force = backend, want, force
        self.rows: list[tuple[str, float, float]] = []

    def __call__(self, layer: int | None, name: str, x: Any) -> None:
        want = self.want[key(layer, name)]
        got = self.backend.to_host(x)
        err = np.abs(got.astype(np.float64) - want).max() if got.shape == want.shape else np.nan
        self.rows.append((key(layer, name), float(err), float(np.abs(want).max())))
        if self.force:
            self.backend.from_host(x, want)


class Finite:
    """Remember the first array that holds NaN or infinity, in .first (None while all are finite)."""

    def __init__(self, backend: ModuleType) -> None:
        self.backend = backend
        self.first: str | None = None

    def __call__(self, layer: int | None, name: str, x: Any) -> None:
        if self.first is None and not np.isfinite(self.backend.to_host(x)).all():
            self.first = key(layer, name)


class Stats:
    """Measure the root mean square and the largest magnitude of every array: .rows[key] = (rms, max)."""

    def __init__(self, backend: ModuleType) -> None:
        self.backend = backend
        self.rows: dict[str, tuple[float, float]] = {}

    def __call__(self, layer: int | None, name: str, x: Any) -> None:
        host = self.backend.to_host(x).astype(np.float64)
        self.rows[key(layer, name)] = (float(np.sqrt(np.square(host).mean())), float(np.abs(host).max()))
