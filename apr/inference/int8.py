"""Round matrices to 8 bits for generation: a quarter (of bfloat16 a half) of the memory traffic per token.

Outside the contract of the backends: no op is added to them. `backend` gives the cpu or cuda backend with linear_fwd and
embedding_fwd overridden to accept int8 matrices; a model computes with them when it is given Int8Weights. Only
inference: there are no gradients, and nothing is saved in this form.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import backends
from ..common.errors import Refused
from ..model.config import ModelConfig
from ..model.eight_bits import rounded_rows
from ..model.params import FUSED, Layout, padded_vocab

FEW_LAUNCHES = 4  # on a GPU, of which each reads the matrix; to make it whole costs as much
WHOLE_ELEMENTS = 1 << 25  # elements, for which scratch has room


class Int8Matrix:
    """A matrix (O,I) as scale[o] * q[o,i]: q int8, scale float32 (O,), the largest element of each row being +-127.

    Every element is at most scale/2 off, which is 1/254 of the largest of its row."""

    ndim = 2

    def __init__(self, q: Any, scale: Any) -> None:
        self.q, self.scale = q, scale

    @classmethod
    def of(cls, w: np.ndarray) -> Int8Matrix:
        """Round a float matrix to nearest."""
        return cls(*rounded_rows(w))

    def on(self, backend: Any) -> Int8Matrix:
        """The matrix on a backend."""
        return Int8Matrix(_on(backend, self.q), _on(backend, self.scale))

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I)."""
        return tuple(self.q.shape)

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


def _on(backend: Any, x: np.ndarray, dtype: Any = None) -> Any:
    placed = backend.empty(x.shape, dtype or x.dtype)
    backend.from_host(placed, x)
    return placed


class Int8Weights:
    """All parameters of a model: matrices as Int8Matrix, the rest of the backend's first dtype. In the place of Model's flat
    buffer."""

    def __init__(self, cfg: ModelConfig, host: np.ndarray, backend: Any) -> None:
        """host: float32, flat (Layout order); not kept. Raises Refused for rows that the backend's kernels cannot read."""
        layout = Layout(cfg)
        if (steps := backend.decoder()) and (lacking := _lacks(steps, cfg)):
            raise Refused(f"8-bit weights on {backend.name}: {lacking}; use another --dtype, or --device cpu")
        self._views = layout.views(host)
        parts = {name for group in FUSED.values() for name in group}  # the model reads them joined
        top = "embed" if cfg.tie_word_embeddings else "head"
        rows = padded_vocab(cfg.vocab_size) if backend.pad_vocab else cfg.vocab_size
        self._head = Int8Matrix.of(layout.head_rows(host, rows)).on(backend)
        for part in (self._views, *self._views.layer):
            for name, x in list(vars(part).items()):
                if name in parts:
                    delattr(part, name)
                elif name != "layer" and not (part is self._views and name in (top, "head")):
                    wide = x.ndim == 1
                    setattr(
                        part,
                        name,
                        _on(backend, x, backend.dtypes[0]) if wide else Int8Matrix.of(x).on(backend),
                    )
        setattr(self._views, top, self._head[: cfg.vocab_size])
        self._views.head = getattr(self._views, top)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        some = [(n, x) for part in (self._views, *self._views.layer) for n, x in vars(part).items()]
        return int(self._head.nbytes) + sum(
            int(x.nbytes) for n, x in some if n != "layer" and x is not self._views.head
        )

    def views(self, flat: Any) -> Any:
        """See Layout.views; flat is this object."""
        return self._views

    def head_rows(self, flat: Any, rows: int) -> Int8Matrix:
        """See Layout.head_rows."""
        assert rows == len(self._head)
        return self._head


def _lacks(steps: Any, c: ModelConfig) -> str:
    """Name what keeps the kernels of decode steps from reading these matrices; heads of any width are read."""
    return str(steps.lacks(1, "float32", c.hidden_size, c.num_heads * c.head_dim, c.intermediate_size))


def backend(of: Any = None) -> Any:
    """The cpu backend, or the one given, with linear_fwd and embedding_fwd overridden to accept an Int8Matrix as weights."""
    if of is not None and of.name != "cpu":
        return _on_a_gpu(of)
    from ..backends.cpu import kernels, ops

    cpu = of or backends.get("cpu")

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


def _on_a_gpu(gpu: Any) -> Any:
    steps = gpu.decoder()

    def linear_fwd(y: Any, x: Any, w: Any, b: Any) -> None:
        if not isinstance(w, Int8Matrix):
            gpu.linear_fwd(y, x, w, b)
        elif len(x) <= FEW_LAUNCHES * steps.MAX_TOKENS or w.q.size > WHOLE_ELEMENTS:
            steps.linear(y, x, w, b)
        else:  # a prompt
            gpu.linear_fwd(y, x, steps.whole(w, x.dtype.name), b)

    def embedding_fwd(y: Any, ids: Any, w: Any) -> None:
        if isinstance(w, Int8Matrix):
            steps.rows(y, ids, w)
        else:
            gpu.embedding_fwd(y, ids, w)

    return backends.overlay(gpu, linear_fwd=linear_fwd, embedding_fwd=embedding_fwd)
