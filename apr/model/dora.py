"""DoRA (Liu et al. 2024, eq. 5): rows of W + s B A get norms that are trained, W_eff[o] = m[o] v[o] / |v[o]|, v = W + s B A.

    c = m / |v|,  dB += s c dy^T u,  dA += s (dy c B)^T x,  dm += sum_n dy (x v^T) / |v|

|v| counts as a constant in backward, as in the paper's section 4.3 and in PEFT: the gradient of A and B is that of a loss in
which it stands still, and `holds` makes it do so, for those who ask the loss for its slope.

Made of ops that are there. head_rmsnorm_fwd gives rows of norm sqrt(I) and rstd = sqrt(I) / |v|; head_rmsnorm_bwd with x = 0
is dx = rstd dy w, which multiplies rows by numbers, and its dw is the sum over n of dy x rstd.
"""

from __future__ import annotations

import math
from typing import Any

from .lora import Pair, cut

# Added to the mean square of a row, so that a row of zeros stays one.
EPS = 1e-30


class Dora:
    """Rows of adapted matrices with norms of their own.

    holds: |v| stays what it was when the matrix was last made"""

    def __init__(self, adapters: Any) -> None:
        self.a, self.be, self.holds = adapters, adapters.be, False
        arrays = adapters.model.buffers.arrays.items()
        self.have = {name.removeprefix("dora_"): x for name, x in arrays if name.startswith("dora_")}
        for name, value in (("ones", 1), ("ones_wide", 1), ("zeros", 0), ("zeros_wide", 0)):
            self.be.fill(self.have[name], value)
        self._at, start = dict[tuple[Any, str], int](), 0
        for p in adapters.layout.pairs:
            self._at[p.base.layer, p.base.param.name] = start
            start += p.base.shape[0]

    def norms(self, pair: Pair) -> Any:
        """View rstd = sqrt(I) / |v| of a matrix (O,1)."""
        start, rows = self._at[pair.base.layer, pair.base.param.name], pair.base.shape[0]
        return self.have["norms"][start : start + rows].reshape(rows, 1)

    def unit(self, pair: Pair, first: int) -> Any:
        """View the rows v sqrt(I) / |v| of the matrix that was made last, at row `first` of what it is joined with."""
        rows, width = pair.base.shape
        return self.have["unit"][first * width : (first + rows) * width].reshape(rows, width)

    def normalise(self, v: Any, pair: Pair, first: int) -> None:
        """v = m v / |v|, rows.  v (O,I)"""
        width = v.shape[1]
        unit, rstd = self.unit(pair, first), self.norms(pair)
        if self.holds:
            self._scale(unit, v, rstd, "")
        else:
            ones = self.have["ones"][:width]
            self.be.head_rmsnorm_fwd(_heads(unit), rstd, _heads(v), ones, EPS)
        self._scale(v, unit, self._share(pair, math.sqrt(1 / width)), "")

    def add(self, pair: Pair, dy: Any, x: Any, first: int, named: Any) -> None:
        """Add the gradients of a pair and of its norms.  dy (N,O), x (N,I)"""
        be, have, (n, width), rows, rank = self.be, self.have, x.shape, pair.base.shape[0], pair.a.shape[0]
        assert pair.m is not None
        (a, b), (da, db) = self.a._factors(pair), self.a._sums(pair)
        u, du = (flat[: n * rank].reshape(n, rank) for flat in (self.a._low, self.a._d_low))
        z, dz = (have[name][: n * rows].reshape(n, rows) for name in ("z", "dz"))
        be.linear_fwd(z, x, self.unit(pair, first), None)
        constant = have["constant"][:n].reshape(n, 1)
        be.fill(constant, math.sqrt(1 / width))
        dm = named(cut(self.a.part, pair.m), f"grad.{pair.base.layer}.{pair.base.param.name}.M")
        be.head_rmsnorm_bwd(_heads(dz), dm, _heads(dy), _heads(z), constant, have["ones"][:rows])
        # c = m rstd / sqrt(I), in the place of m / sqrt(I).
        share = self._share(pair, math.sqrt(1 / width)).reshape(rows, 1)
        scaled, sums, c = (have[name] for name in ("scaled", "sums", "share"))
        self._scale(scaled[:rows].reshape(rows, 1), share, self.norms(pair))
        be.copy(c[:rows], scaled[:rows])
        share = c[:rows].reshape(rows, 1)
        sums, scaled = (flat[: rows * rank].reshape(rows, rank) for flat in (sums, scaled))
        be.linear_fwd(u, x, a, None)
        be.gemm(sums, dy, u, pair.scale, 0.0, True, False)
        self._scale(scaled, sums, share)
        be.add(db, db, scaled)
        factor = have["factor"][: rows * rank].reshape(rows, rank)
        self._scale(factor, b, share, "")
        be.linear_bwd(du, None, None, dy, u, factor, True)
        be.gemm(da, du, x, pair.scale, 1.0, True, False)

    def _share(self, pair: Pair, number: float) -> Any:
        """share = number m.  (O,1)"""
        rows = pair.base.shape[0]
        assert pair.m is not None
        m, share = cut(self.a.w, pair.m).reshape(1, rows), self.have["share"][:rows]
        constant = self.have["constant"][:1].reshape(1, 1)
        self.be.fill(constant, number)
        self._scale(share.reshape(1, rows), m, constant)
        return share.reshape(rows, 1)

    def _scale(self, y: Any, x: Any, rows: Any, kind: str = "_wide") -> None:
        """y = rows x.  y, x (O,I) wide, or of the model's dtype where kind is "", rows (O,1) wide"""
        zeros = self.have[f"zeros{kind}"][: x.shape[0] * x.shape[1]].reshape(x.shape)
        ones = self.have[f"ones{kind}"][: x.shape[1]]
        self.be.head_rmsnorm_bwd(_heads(y), None, _heads(x), _heads(zeros), rows, ones)


def _heads(x: Any) -> Any:
    """View rows as tokens of one head: (N,1,D)."""
    return x.reshape(x.shape[0], 1, x.shape[1])
