"""Round matrices to 8 bits for generation on the CPU: a quarter of the memory traffic per token.

Outside the contract of the backends: no op is added to them. `backend` gives the cpu backend with linear_fwd and
embedding_fwd overridden to accept int8 matrices; a model computes with them when it is given Int8Weights. Only
inference: there are no gradients, and nothing is saved in this form.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import backends
from ..model.config import ModelConfig
from ..model.eight_bits import rounded_rows
from ..model.params import FUSED, Layout


class Int8Matrix:
    """A matrix (O,I) as scale[o] * q[o,i]: q int8, scale float32 (O,), the largest element of each row being +-127.

    Every element is at most scale/2 off, which is 1/254 of the largest of its row."""

    ndim = 2

    def __init__(self, q: np.ndarray, scale: np.ndarray) -> None:
        self.q, self.scale = q, scale

    @classmethod
    def of(cls, w: np.ndarray) -> Int8Matrix:
        """Round a float matrix to nearest."""
        return cls(*rounded_rows(w))

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I)."""
        return self.q.shape

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return int(self.q.nbytes + self.scale.nbytes)

    def __len__(self) -> int:
        return len(self.q)

    def __getitem__(self, rows: slice) -> Int8Matrix:
        return Int8Matrix(self.q[rows], self.scale[rows])

    def to_float(self) -> np.ndarray:
        """float32 (O,I)."""
        return self.q * self.scale[:, None]


class Int8Weights:
    """All parameters of a model: matrices as Int8Matrix, the rest float32. In the place of Model's flat buffer."""

    def __init__(self, cfg: ModelConfig, host: np.ndarray) -> None:
        """host: float32, flat (Layout order); not kept."""
        self._views = Layout(cfg).views(host)
        parts = {name for group in FUSED.values() for name in group}  # the model reads them joined
        for part in (self._views, *self._views.layer):
            for name, x in list(vars(part).items()):
                if name in parts:
                    delattr(part, name)
                elif name != "layer" and not (name == "head" and cfg.tie_word_embeddings):
                    setattr(part, name, Int8Matrix.of(x) if x.ndim == 2 else np.array(x))
        if cfg.tie_word_embeddings:
            self._views.head = self._views.embed

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        parts = [
            x for part in (self._views, *self._views.layer) for n, x in vars(part).items() if n != "layer"
        ]
        return sum({id(x): int(x.nbytes) for x in parts}.values())

    def views(self, flat: Any) -> Any:
        """See Layout.views; flat is this object."""
        return self._views

    def head_rows(self, flat: Any, rows: int) -> Int8Matrix:
        """See Layout.head_rows; the cpu backend asks for no padding."""
        head: Int8Matrix = self._views.head
        assert rows == len(head)
        return head


def backend() -> Any:
    """The cpu backend with linear_fwd and embedding_fwd overridden to accept an Int8Matrix as weights."""
    from ..backends.cpu import kernels, ops

    cpu = backends.get("cpu")

    def linear_fwd(y: Any, x: Any, w: Any, b: Any) -> None:
        if not isinstance(w, Int8Matrix):
            cpu.linear_fwd(y, x, w, b)
        elif len(x) <= ops.FEW_ROWS:
            if b is not None:
                kernels.fill_rows(y, b)
            kernels.linear_few_int8(y, x, w.q, w.scale, b is not None)
        else:  # a prompt: the product costs more than the matrix
            whole = np.empty(w.shape, np.float32)
            kernels.from_int8(whole, w.q, w.scale)
            cpu.linear_fwd(y, x, whole, b)

    def embedding_fwd(y: Any, ids: Any, w: Any) -> None:
        if isinstance(w, Int8Matrix):
            kernels.embedding_int8(y, ids, w.q, w.scale)
        else:
            cpu.embedding_fwd(y, ids, w)

    return backends.overlay(cpu, linear_fwd=linear_fwd, embedding_fwd=embedding_fwd)
