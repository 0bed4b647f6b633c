"""All buffers of a job in one piece of memory, laid out before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from types import ModuleType
from typing import Any

import ml_dtypes  # noqa: F401 - gives NumPy the name "bfloat16"
import numpy as np

ALIGN = 256  # bytes: every buffer starts where a GPU's widest access and every cuBLAS kernel may start
WIDE = {"float64": "float64", "float32": "float32", "bfloat16": "float32"}  # of sums and statistics


@dataclass(frozen=True)
class Want:
    """A buffer that is needed: what for (a field of plan.Memory), its shape and dtype."""

    purpose: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes of the buffer itself."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes, rounded up to where the next buffer may start."""
        return -(-self.size // ALIGN) * ALIGN


Wants = dict[str, Want]


class Arena:
    """One allocation on a backend, cut into named buffers: arena["3.qkv"]."""

    def __init__(self, backend: ModuleType, wants: Wants) -> None:
        whole = backend.empty(sum(w.nbytes for w in wants.values()), "uint8")
        self.arrays: dict[str, Any] = {}
        start = 0
        for name, w in wants.items():
            self.arrays[name] = whole[start : start + w.size].view(np.dtype(w.dtype)).reshape(w.shape)
            start += w.nbytes

    def __getitem__(self, name: str) -> Any:
        return self.arrays[name]
