"""Subjects of a bisection: a side, and a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import ml_dtypes  # noqa: F401 # isort: skip -- gives NumPy the name "bfloat16"; without NumPy it prints a traceback

from ..model.config import ModelConfig
from ..model.transformer import Model
from . import rule


@dataclass(frozen=True)
class Side:
    """Subject of a bisection: a backend, the configuration it believes in, and the dtype it computes in."""

    backend: rule.Backend
    cfg: ModelConfig
    dtype: str

    @property
    def name(self) -> str:
        """Backend and dtype: "cpu float32"."""
        return f"{self.backend.name} {self.dtype}"

    def model(self, weights: np.ndarray, shape: tuple[int, int], **options: Any) -> Model:
        """Build a model of this side with its weights uploaded."""
        model = Model(self.cfg, self.backend, *shape, self.dtype, loss_rows=shape[0] * shape[1], **options)
        # NaN shows in every element that is not uploaded.
        self.backend.fill(model.w, np.nan)
        self.backend.from_host(model.w, weights)
        return model


@dataclass(frozen=True)
class Batch:
    """Input of a training step.

    ids           (B, T) int32
    targets       (B, T) int32  negative targets are ignored
    words         description
    document_end  id at which attention stops (see Model), None for attention over whole sequences
    """

    ids: np.ndarray
    targets: np.ndarray
    words: str
    document_end: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B,T)."""
        b, t = self.ids.shape
        return b, t

    @property
    def count(self) -> int:
        """Number of targets that are predicted."""
        return int((self.targets >= 0).sum())
