"""Dropout of what adapters get, in training alone: y = W x + s B A x', each adapted map with a mask of its own, as in PEFT.

    x' = s m x / (1 - p),  u = x' A^T,  y += u B^T
    du = dy B,  dA += du^T x',  dB += dy^T u,  dx += s m (du A) / (1 - p)

W and adapters are no longer one matrix: W's product is made with W alone, and the products of A and B are added to it. The mask
m is made from a counter wherever it is needed (op `dropout`): of seed, step, number of the sequence in its step, map and element.
So it does not depend on micro-batches, ranks, recomputation, a stop between two steps, or whether a pass is recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .lora import AdapterLayout, Pair

# Rows of logits that the product of an adapted head is added to at a time.
HEAD_ROWS = 256


@dataclass(frozen=True)
class Draws:
    """Say which masks the sequences of a pass get: seed of the run, step from 1, number of each sequence in the step's batch."""

    seed: int
    step: int
    numbers: Sequence[int]

    @property
    def counters(self) -> np.ndarray:
        """Counters of the op, (B,2) int32."""
        return np.array([(number, self.step) for number in self.numbers], np.int32)

    @classmethod
    def of(cls, seed: int, step: int, first: int, count: int) -> Draws:
        """Draw for `count` sequences from number `first` on."""
        return cls(seed, step, range(first, first + count))


class Dropout:
    """Products of adapters beside those of W, with masks, while a pass of training runs.

    dropped  (N, widest input)   x' of one map
    beside   (N, widest map)     what is added to y, or to dx
    """

    def __init__(self, adapters: Any) -> None:
        self.a, self.be, self.p = adapters, adapters.be, adapters.config.dropout
        have = adapters.model.buffers.arrays
        self._dropped, self._beside, self.counters = have["dropped"], have["beside"], have["counters"]
        self._head_beside = have.get("head_beside")
        self._number = {(p.base.layer, p.base.param.name): k for k, p in enumerate(adapters.layout.pairs)}
        self.is_on, self._seed, self._shape = False, 0, (0, 0)

    def begin(self, draws: Draws | None, shape: tuple[int, int]) -> None:
        """Begin a pass over (B,T) tokens; without draws nothing is dropped, and W + s B A is one matrix."""
        self.is_on = draws is not None
        if draws is not None:
            self._seed, self._shape = draws.seed, shape
            self.be.from_host(self.counters[: shape[0]], draws.counters)

    @property
    def sequences(self) -> int:
        """Number of sequences in the pass before this moment that had masks."""
        return self._shape[0]

    def _drop(self, out: Any, x: Any, pair: Pair) -> None:
        """out = s m x / (1 - p).  out, x (N,I)"""
        out, x = (a.reshape(*self._shape, a.shape[1]) for a in (out, x))
        number = self._number[pair.base.layer, pair.base.param.name]
        counters = self.counters[: self._shape[0]]
        self.be.dropout(out, x, counters, self._seed, number, self.p, pair.scale)

    def _given(self, pair: Pair, n: int) -> Any:
        """View x' of a map (n,I)."""
        name = (
            pair.base.param.name if pair.base.layer is None else f"{pair.base.layer}.{pair.base.param.name}"
        )
        return self.a.named(self._dropped[: n * pair.a.shape[1]].reshape(n, -1), f"{name}.dropped")

    def _low(self, n: int, pair: Pair) -> tuple[Any, Any]:
        """View u and du (n,r)."""
        rank = pair.a.shape[0]
        return self.a._low[: n * rank].reshape(n, rank), self.a._d_low[: n * rank].reshape(n, rank)

    def add(self, parts: Sequence[tuple[int, int, Pair | None]], y: Any, x: Any) -> None:
        """y += u B^T of maps that are joined in y.  y (N,O), x (N,I); parts: first row, rows and adapters of each"""
        if not any(pair for *_, pair in parts):
            return
        n, width = y.shape
        z = self._beside[: n * width].reshape(n, width)
        if not all(pair for *_, pair in parts):
            self.be.fill(z, 0)
        for first, rows, pair in parts:
            if pair is not None:
                given, (u, _), (a, b) = self._given(pair, n), self._low(n, pair), self.a._factors(pair)
                self._drop(given, x, pair)
                self.be.linear_fwd(u, given, a, None)
                self.be.linear_fwd(z[:, first : first + rows], u, b, None)
        self.be.add(y, y, z)

    def add_to_input(self, parts: Sequence[tuple[int, int, Pair | None]], dx: Any, dy: Any) -> None:
        """dx += s m (du A) / (1 - p).  dx (N,I), dy (N,O)"""
        n, width = dx.shape
        through = self._beside[: n * width].reshape(n, width)
        for first, rows, pair in parts:
            if pair is not None:
                given, (u, du), (a, b) = self._given(pair, n), self._low(n, pair), self.a._factors(pair)
                self.be.linear_bwd(du, None, None, dy[:, first : first + rows], u, b, True)
                self.be.linear_bwd(through, None, None, du, given, a, True)
                self._drop(given, through, pair)
                self.be.add(dx, dx, given)

    def add_gradients(self, pair: Pair, dy: Any, x: Any) -> None:
        """dA += du^T x',  dB += dy^T u.  dy (N,O), x (N,I)"""
        given = self._given(pair, x.shape[0])
        self._drop(given, x, pair)
        self._sum(pair, dy, given, *self.a._factors(pair), *self.a._sums(pair))

    def _sum(self, pair: Pair, dy: Any, given: Any, a: Any, b: Any, da: Any, db: Any) -> Any:
        """Add the gradients of a pair; returns du."""
        u, du = self._low(given.shape[0], pair)
        self.be.linear_fwd(u, given, a, None)
        self.be.gemm(db, dy, u, 1.0, 1.0, True, False)
        self.be.linear_bwd(du, None, None, dy, u, b, True)
        self.be.gemm(da, du, given, 1.0, 1.0, True, False)
        return du

    # The head, whose logits are made for some rows at a time

    def begin_head(self, pair: Pair, x: Any) -> None:
        """Make x' of all rows.  x (N,C)"""
        self._drop(self._given(pair, x.shape[0]), x, pair)

    def add_head(self, pair: Pair, b: Any, logits: Any, rows: slice, tokens: int) -> None:
        """logits += u B^T of some rows.  logits (n,V), b (V,r); tokens: N of begin_head"""
        given, a = self._given(pair, tokens), self.a._factors(pair)[0]
        for first in range(0, logits.shape[0], HEAD_ROWS):
            y = logits[first : first + HEAD_ROWS]
            at = rows.start + first
            u, _ = self._low(y.shape[0], pair)
            self.be.linear_fwd(u, given[at : at + y.shape[0]], a, None)
            z = self._head_beside[: y.shape[0] * y.shape[1]].reshape(y.shape)
            self.be.linear_fwd(z, u, b, None)
            self.be.add(y, y, z)

    def add_head_gradients(self, pair: Pair, b: Any, db: Any, dy: Any, rows: slice, tokens: int) -> None:
        """dA += du^T x',  dB += dy^T u,  and keep du A, of some rows.  dy (n,V)"""
        given, (a, _), (da, _) = self._given(pair, tokens), self.a._factors(pair), self.a._sums(pair)
        du = self._sum(pair, dy, given[rows], a, b, da, db)
        self.be.linear_bwd(self._through(given)[rows], None, None, du, given[rows], a, True)

    def end_head(self, pair: Pair, dx: Any) -> None:
        """dx += s m (du A) / (1 - p), of all rows.  dx (N,C)"""
        given = self._given(pair, dx.shape[0])
        self._drop(given, self._through(given), pair)
        self.be.add(dx, dx, given)

    def _through(self, given: Any) -> Any:
        """View du A (N,C)."""
        n, width = given.shape
        return self._beside[: n * width].reshape(n, width)


def sizes(layout: AdapterLayout, tokens: int, columns: int, loss_rows: int) -> Iterator[tuple[str, int]]:
    """List (name, elements) of the buffers of dropout in the dtype of the model. columns: of the logits"""
    widest = max((p.base.shape[1] for p in layout.pairs), default=0)
    yield "dropped", tokens * widest
    yield "beside", tokens * max(widest, layout.widest_map)
    if layout.adapts_head:
        yield "head_beside", min(loss_rows, HEAD_ROWS) * columns
