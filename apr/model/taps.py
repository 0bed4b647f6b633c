"""Taps: the one way to look at what a model computes.

A tap is called as tap(layer, name, array) right after the array is made; layer is None outside the
blocks, gradients are named "d_" + name. It may change the array in place.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

Tap = Callable[[int | None, str, Any], None]


def no_tap(layer: int | None, name: str, x: Any) -> None:
    """Looks at nothing."""


def key(layer: int | None, name: str) -> str:
    """Name of a tap in a file: "3.qkv" in a block, "logits" outside."""
    return name if layer is None else f"{layer}.{name}"


class Record:
    """Keeps a host copy of everything, in order of computation: .seen["3.qkv"]."""

    def __init__(self, backend: ModuleType) -> None:
        self.backend = backend
        self.seen: dict[str, np.ndarray] = {}

    def __call__(self, layer: int | None, name: str, x: Any) -> None:
        self.seen[key(layer, name)] = self.backend.to_host(x)


class Compare:
    """Compares with a Record's values.

    rows holds (key, max |got - want|, max |want|) in order of computation; NaN where either is NaN.
    With force=True the recorded value is then put in place, so that each row shows what that one op
    did and nothing it inherited.
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
    """Remembers the first array that holds NaN or infinity, in .first (None while all are finite)."""

    def __init__(self, backend: ModuleType) -> None:
        self.backend = backend
        self.first: str | None = None

    def __call__(self, layer: int | None, name: str, x: Any) -> None:
        if self.first is None and not np.isfinite(self.backend.to_host(x)).all():
            self.first = key(layer, name)


class Stats:
    """Root mean square and largest magnitude of everything: .rows[key] = (rms, max)."""

    def __init__(self, backend: ModuleType) -> None:
        self.backend = backend
        self.rows: dict[str, tuple[float, float]] = {}

    def __call__(self, layer: int | None, name: str, x: Any) -> None:
        host = self.backend.to_host(x).astype(np.float64)
        self.rows[key(layer, name)] = (float(np.sqrt(np.square(host).mean())), float(np.abs(host).max()))
