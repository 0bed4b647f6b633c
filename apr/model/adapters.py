"""Compute with low-rank adapters: W_eff = W + s B A, W frozen (Hu et al. 2022).

    u = x A^T,  du = dy B,  dA += s du^T x,  dB += s dy^T u

W_eff of one linear map at a time lies in a buffer that all maps share: it is made where the map is computed, forward and
backward, so that nothing holds a second copy of the weights and none can be stale. dx = dy W_eff; W has no gradient.
Sums are float32 (float64). W_eff, u and du are rounded once to the dtype of the model, and so are A and B for u and du.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .eight_bits import rounded_rows
from .lora import AdapterLayout, cut
from .micro_gradients import add
from .params import FUSED, Slot

# copied to the host at a time
HASH_ELEMENTS = 1 << 20
# of the view of the factors of a matrix's rows, behind the name of the matrix
ROW = "_row"


class Split:
    """Flat parameters of which elements [0, at) lie in one array, as 8-bit integers, and the others in a second one."""

    def __init__(self, low: Any, high: Any) -> None:
        self.low, self.high, self.at = low, high, low.shape[0]
        self.dtype = high.dtype

    def __getitem__(self, place: slice) -> Any:
        if place.start < self.at:
            return self.low[place]
        return self.high[place.start - self.at : None if place.stop is None else place.stop - self.at]


class Nothing:
    """Gradients of frozen parameters: None, whatever the name, in every layer."""

    @property
    def layer(self) -> Nothing:
        """Gradients of the blocks."""
        return self

    def __getitem__(self, layer: int) -> Nothing:
        return self

    def __getattr__(self, name: str) -> None:
        return None


class Adapters:
    """Adapters of a model, and the flat arrays that an optimizer updates in place of the model's own.

    w, g     (layout.size,) wide   A and B of every pair, and their gradients
    part     (layout.size,) wide   gradients of one micro-batch, where there are several; g itself otherwise
    factors  (layout.size,)        w, rounded to the dtype of the model
    folds    a step has several micro-batches
    named    called with a view and its name; returns the view

    model: its backend, parameters and buffers are used; they may be those of several models in lockstep.
    """

    def __init__(
        self, model: Any, layout: AdapterLayout, named: Callable[[Any, str], Any] = lambda x, name: x
    ) -> None:
        self.model, self.layout, self.named = model, layout, named
        self.be, self.cfg, self.config = model.be, model.cfg, layout.config
        have = model.buffers.arrays
        self.w, self.g, self.factors = have["adapters"], have["adapter_gradients"], have["factors"]
        self.folds = "adapter_part" in have
        self.part = have["adapter_part"] if self.folds else self.g
        self._effective, self._low, self._d_low = have["effective"], have["low"], have["d_low"]
        self._pairs = {(p.base.layer, p.base.param.name): p for p in layout.pairs}
        self._maps = layout.maps()
        self.base_sha256 = ""

    # In a pass

    def effective(self, layer: int, name: str) -> Any:
        """W_eff (O,I) of a matrix, or of several that are joined, until the next call; W itself where that is the same."""
        p, parts = self.model.p.layer[layer], FUSED.get(name, (name,))
        whole = getattr(p, name)
        if not self.config.base and not any((layer, part) in self._pairs for part in parts):
            return whole
        o, i = whole.shape
        out = self.named(self._effective[: o * i].reshape(o, i), f"{layer}.{name}")
        first = 0
        for part in parts:
            w, pair = getattr(p, part), self._pairs.get((layer, part))
            a, b = (None, None) if pair is None else (cut(self.w, pair.a), cut(self.w, pair.b))
            scale = self.config.scale if pair is None else pair.scale
            to = out[first : first + w.shape[0]]
            if self.config.base:
                self.be.adapted_int8(to, w, getattr(p, part + ROW), b, a, scale)
            else:
                self.be.adapted(to, w, b, a, scale)
            first += w.shape[0]
        return out

    def begin_backward(self) -> None:
        """Round A and B for the products of backward, and begin the gradients of a micro-batch at zero."""
        self.be.copy(self.factors, self.w)
        if self.folds:
            self.be.fill(self.part, 0)

    def end_backward(self) -> None:
        """Add the gradients of a micro-batch to those of the micro-batches before it."""
        if self.folds:
            add(self.be, self.g, self.part)

    def add_gradients(self, layer: int, name: str, dy: Any, x: Any) -> None:
        """dA += s (dy B)^T x,  dB += s dy^T (x A^T) of a linear map.  dy (N,O), x (N,I)"""
        be, n, first = self.be, x.shape[0], 0
        for part in FUSED.get(name, (name,)):
            rows = getattr(self.model.p.layer[layer], part).shape[0]
            pair, d = self._pairs.get((layer, part)), dy[:, first : first + rows]
            first += rows
            if pair is None:
                continue
            at = f"{layer}.{part}"
            a, b = (
                self.named(cut(self.factors, slot), f"{at}.{letter}")
                for slot, letter in ((pair.a, "A"), (pair.b, "B"))
            )
            da, db = (
                self.named(cut(self.part, slot), f"grad.{at}.{letter}")
                for slot, letter in ((pair.a, "A"), (pair.b, "B"))
            )
            rank, s = a.shape[0], pair.scale
            u, du = (flat[: n * rank].reshape(n, rank) for flat in (self._low, self._d_low))
            be.linear_fwd(u, x, a, None)
            be.gemm(db, d, u, s, 1.0, True, False)
            be.linear_bwd(du, None, None, d, u, b, True)
            be.gemm(da, du, x, s, 1.0, True, False)

    # Frozen weights

    def set_base(self, read: Callable[[str], np.ndarray]) -> None:
        """Load W, rounded to the model's dtype or to 8-bit integers, one tensor at a time.

        read: gives a tensor by its Hugging Face name"""
        be = self.be
        for slot in self.model.layout.in_order():
            x, to, row = read(slot.hf), cut(self.model.w, slot), self.row(slot)
            if row is not None:
                x, factors = rounded_rows(x)
                be.from_host(row, factors)
            be.from_host(to, x)
        self.base_sha256 = self.base_hash()

    def row(self, slot: Slot) -> Any:
        """Factors of the rows of a matrix of 8-bit integers; None for another tensor."""
        if slot.layer is None:
            return None
        return getattr(self.model.p.layer[slot.layer], slot.param.name + ROW, None)

    def base_values(self) -> Iterator[tuple[Slot, tuple[Any, ...]]]:
        """List (slot, flat arrays on the device) of every weight that must not change: values, or integers and factors."""
        for slot in self.model.layout.in_order():
            row, values = self.row(slot), cut(self.model.w, slot).reshape(-1)
            yield slot, (values,) if row is None else (values, row)

    def base_hash(self) -> str:
        """SHA-256 of every weight that must not change, as read back from the device."""
        digest = hashlib.sha256()
        for _, arrays in self.base_values():
            for flat in arrays:
                for start in range(0, flat.shape[0], HASH_ELEMENTS):
                    part = np.ascontiguousarray(self.be.to_host(flat[start : start + HASH_ELEMENTS]))
                    digest.update(part.view(np.uint8).data)
        return digest.hexdigest()

    def tensors(self) -> Iterator[tuple[Slot, Any]]:
        """List (slot, array on the device until the next one) of the weights that the model computes with, W_eff and W."""
        for slot in self.model.layout.in_order():
            is_map = slot.layer is not None and slot.offset < self.model.layout.matrices
            x = self.effective(slot.layer, slot.param.name) if is_map else cut(self.model.w, slot)
            yield slot, x


def add_rows(p: Any, slots: list[Slot], rows: Any) -> None:
    """Add to the views of parameters those of the factors of their rows: .layer[3].wq_row.

    rows (all rows of the slots,)"""
    start = 0
    for slot in slots:
        setattr(p.layer[slot.layer], slot.param.name + ROW, rows[start : start + slot.shape[0]])
        start += slot.shape[0]
