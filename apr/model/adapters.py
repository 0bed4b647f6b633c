"""Compute with low-rank adapters: W_eff = W + s B A, W frozen (Hu et al. 2022).

    u = x A^T,  du = dy B,  dA += s du^T x,  dB += s dy^T u

An embedding or a head is a matrix like the others: of an embedding x is one-hot, so that u = B[ids], dB[ids] += s dy A^T.
What is trained whole has its values, rounded, among the factors, where the passes read them.

W_eff of one linear map at a time lies in a buffer that all maps share: it is made where the map is computed, forward and
backward, so that nothing holds a second copy of the weights and none can be stale. dx = dy W_eff; W has no gradient.
With dropout W_eff is made in evaluations alone: in training the products of A and B stand beside that of W (lora_dropout.py).
Sums are float32 (float64). W_eff, u and du are rounded once to the dtype of the model, and so are A and B for u and du.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .dora import Dora
from .eight_bits import rounded_rows
from .lora import AdapterLayout, Pair, cut
from .lora_dropout import Draws, Dropout
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


class Gradients:
    """Gradients of a model under adapters by name: None, but of what is trained whole. `layer` has those of the blocks."""

    def __init__(self, layers: int = 0) -> None:
        self.layer = [Gradients() for _ in range(layers)]

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
        # Of an embedding, whose gradients are added by rows.
        self._d_low_wide = have.get("d_low_wide")
        self._pairs = {(p.base.layer, p.base.param.name): p for p in layout.pairs}
        self.dora = Dora(self) if layout.config.dora else None
        self.dropout = Dropout(self) if "dropped" in have else None
        self.base_sha256 = ""
        # Of the head, for as many rows as the logits have columns: open_head.
        self.head: dict[str, Any] = {}

    # In a model

    def place(self, p: Any) -> None:
        """Put what is trained whole in the place of the views of frozen parameters."""
        for base, slot in self.layout.saved:
            setattr(
                p if base.layer is None else p.layer[base.layer], base.param.name, cut(self.factors, slot)
            )
        if self.cfg.tie_word_embeddings:
            p.head = p.embed

    def gradients(self) -> Gradients:
        """View the gradients of what is trained whole by the names of the model's own."""
        out = Gradients(self.cfg.num_layers)
        for base, slot in self.layout.saved:
            name = base.param.name if base.layer is None else f"{base.layer}.{base.param.name}"
            view = self.named(cut(self.part, slot), f"grad.{name}")
            setattr(out if base.layer is None else out.layer[base.layer], base.param.name, view)
        return out

    def open_head(self, rows: int, frozen: Any) -> tuple[Any, Any]:
        """View the first rows of the head that is trained whole, and of its gradient; the frozen one, and None, otherwise."""
        self.head, (head, gradient) = self.head_views(rows, self.part), self.whole_head(rows, self.part)
        return frozen if head is None else head, gradient

    def whole_head(self, rows: int, part: Any) -> tuple[Any, Any]:
        """View the first rows of the head that is trained whole, and of its gradient in `part`; None twice for another one."""
        name = "embed" if self.cfg.tie_word_embeddings else "head"
        for base, slot in self.layout.saved:
            if base.param.name == name:
                whole, shape = slice(slot.offset, slot.offset + rows * slot.shape[1]), (rows, slot.shape[1])
                return self.factors[whole].reshape(shape), part[whole].reshape(shape)
        return None, None

    def head_views(self, rows: int, part: Any) -> dict[str, Any]:
        """View the first rows of W_eff of an adapted head, and of its B: as it is, rounded, and its gradient in `part`."""
        pair = self._pairs.get((None, "embed" if self.cfg.tie_word_embeddings else "head"))
        if pair is None:
            return {}
        (rank, width), flats = pair.a.shape, (("b", self.w), ("factor", self.factors), ("grad", part))
        whole = slice(pair.b.offset, pair.b.offset + rows * rank)
        out = {key: flat[whole].reshape(rows, rank) for key, flat in flats}
        return out | {"out": self._effective[: rows * width].reshape(rows, width)}

    # In a pass

    def begin(self, draws: Draws | None, shape: tuple[int, int]) -> None:
        """Begin a pass over (B,T) tokens, with the masks of dropout where draws are given."""
        if self.dropout:
            self.dropout.begin(draws, shape)

    @property
    def drops(self) -> bool:
        """Tell if the pass at hand has dropout, so that adapters stand beside their matrices."""
        return self.dropout is not None and self.dropout.is_on

    def begin_forward(self) -> None:
        """Round what is trained whole, and what else the pass reads of the factors, to the dtype of the model."""
        if self.drops:
            self.be.copy(self.factors, self.w)
            return
        for _, slot in self.layout.saved:
            self.be.copy(cut(self.factors, slot), cut(self.w, slot))

    def outside(self, name: str, w: Any) -> Any:
        """W_eff of embedding or head, until the next matrix is asked for; w, what the model has there, without adapters.

        A head has as many rows as w."""
        pair = self._pairs.get((None, "embed" if self.cfg.tie_word_embeddings else name))
        if pair is None or (name == "head" and self.drops):
            return w
        a, base = cut(self.w, pair.a), pair.base
        if name == "head":
            out, b = self.head["out"], self.head["b"]
        else:
            out, b = self._effective[: base.size].reshape(base.shape), cut(self.w, pair.b)
        out = self.named(out, base.param.name)
        self.be.adapted(out, w, b, a, pair.scale)
        return out

    def _head_pair(self) -> Pair:
        return self._pairs[None, "embed" if self.cfg.tie_word_embeddings else "head"]

    def begin_head(self, x: Any) -> None:
        """Make ready what a head with dropout gets.  x (N,C)"""
        if self.head and self.dropout and self.drops:
            self.dropout.begin_head(self._head_pair(), x)

    def add_head(self, logits: Any, rows: slice, tokens: int) -> None:
        """Add to some rows of the logits what the adapters of a head with dropout give.  logits (n,V), tokens: N"""
        if self.head and self.dropout and self.drops:
            self.dropout.add_head(self._head_pair(), self.head["factor"], logits, rows, tokens)

    def add_head_gradients(self, dy: Any, x: Any, rows: slice) -> None:
        """Add the gradients of the adapters of a head, of some rows.  dy (n,V), x (N,C)"""
        if self.head and self.dropout and self.drops:
            self.dropout.add_head_gradients(
                self._head_pair(), self.head["factor"], self.head["grad"], dy, rows, x.shape[0]
            )
        elif self.head:
            self._add(self._head_pair(), dy, x[rows], self.head["factor"], self.head["grad"])

    def end_head(self, dx: Any) -> None:
        """Add to the gradient of final_norm what goes through the adapters of a head with dropout.  dx (N,C)"""
        if self.head and self.dropout and self.drops:
            self.dropout.end_head(self._head_pair(), dx)

    def add_embedding_gradients(self, dy: Any, ids: Any) -> None:
        """dA += s B[ids]^T dy,  dB[ids] += s dy A^T of an embedding.  dy (N,C), ids (N,)"""
        if (pair := self._pairs.get((None, "embed"))) is None:
            return
        be, n, rank, s = self.be, dy.shape[0], pair.a.shape[0], pair.scale
        (a, b), (da, db) = self._factors(pair), self._sums(pair)
        u = self._low[: n * rank].reshape(n, rank)
        be.embedding_fwd(u, ids, b)
        be.gemm(da, u, dy, s, 1.0, True, False)
        du = self._d_low_wide[: n * rank].reshape(n, rank)
        be.gemm(du, dy, a, s, 0.0, False, True)
        be.embedding_bwd(db, du, ids)

    def makes(self, layer: int, name: str) -> bool:
        """Tell if `effective` makes a matrix, because W alone is not what the map computes with."""
        pairs = {} if self.drops else self._pairs
        return bool(self.config.base) or any((layer, part) in pairs for part in FUSED.get(name, (name,)))

    def effective(self, layer: int, name: str) -> Any:
        """W_eff (O,I) of a matrix, or of several that are joined, until the next call; W itself where that is the same."""
        p, parts = self.model.p.layer[layer], FUSED.get(name, (name,))
        whole = getattr(p, name)
        pairs = {} if self.drops else self._pairs
        if not self.makes(layer, name):
            return whole
        o, i = whole.shape
        out = self.named(self._effective[: o * i].reshape(o, i), f"{layer}.{name}")
        first = 0
        for part in parts:
            w, pair = getattr(p, part), pairs.get((layer, part))
            a, b = (None, None) if pair is None else (cut(self.w, pair.a), cut(self.w, pair.b))
            scale = self.config.scale if pair is None else pair.scale
            to = out[first : first + w.shape[0]]
            if self.config.base:
                self.be.adapted_int8(to, w, getattr(p, part + ROW), b, a, scale)
            else:
                self.be.adapted(to, w, b, a, scale)
            if self.dora and pair:
                self.dora.normalise(to, pair, first)
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
        if self.dropout:
            self.dropout.is_on = False

    def _joined(self, layer: int, name: str) -> list[tuple[int, int, Pair | None]]:
        """List (first row, rows, adapters) of the matrices that a map joins."""
        out, first = [], 0
        for part in FUSED.get(name, (name,)):
            rows = getattr(self.model.p.layer[layer], part).shape[0]
            out.append((first, rows, self._pairs.get((layer, part))))
            first += rows
        return out

    def add_beside(self, layer: int, name: str, y: Any, x: Any) -> None:
        """Add to W x what adapters with dropout give: y += s B A x'.  y (N,O), x (N,I)"""
        if self.dropout and self.drops:
            self.dropout.add(self._joined(layer, name), y, x)

    def add_to_input(self, layer: int, name: str, dx: Any, dy: Any) -> None:
        """Add to dy W what goes through adapters with dropout.  dx (N,I), dy (N,O)"""
        if self.dropout and self.drops:
            self.dropout.add_to_input(self._joined(layer, name), dx, dy)

    def add_gradients(self, layer: int, name: str, dy: Any, x: Any) -> None:
        """dA += s (dy B)^T x,  dB += s dy^T (x A^T) of a linear map.  dy (N,O), x (N,I)"""
        for first, rows, pair in self._joined(layer, name):
            d = dy[:, first : first + rows]
            if pair is not None and self.dora:
                self.dora.add(pair, d, x, first, self.named)
            elif pair is not None and self.dropout and self.drops:
                self.dropout.add_gradients(pair, d, x)
            elif pair is not None:
                self._add(pair, d, x)

    def _factors(self, pair: Pair) -> tuple[Any, Any]:
        """View A and B, rounded, of a pair."""
        a, b = ((slot, cut(self.factors, slot)) for slot in (pair.a, pair.b))
        return self.named(a[1], _tap(a[0])), self.named(b[1], _tap(b[0]))

    def _sums(self, pair: Pair) -> tuple[Any, Any]:
        """View the gradients of A and B of a pair."""
        a, b = ((slot, cut(self.part, slot)) for slot in (pair.a, pair.b))
        return self.named(a[1], "grad." + _tap(a[0])), self.named(b[1], "grad." + _tap(b[0]))

    def _add(self, pair: Pair, dy: Any, x: Any, b: Any = None, db: Any = None) -> None:
        """Add the gradients of a pair; b, db: with the rows of the padding."""
        be, n, s = self.be, x.shape[0], pair.scale
        (a, own_b), (da, own_db) = self._factors(pair), self._sums(pair)
        b, db = (own_b, own_db) if b is None else (b, db)
        rank = a.shape[0]
        u, du = (flat[: n * rank].reshape(n, rank) for flat in (self._low, self._d_low))
        if x.shape[1] > dy.shape[1]:
            # of two products that read the wider array, one can be made beside the other
            be.linear_bwd(du, None, None, dy, u, b, True)
            be.adapted_bwd_a(u, da, x, du, a, s)
            be.gemm(db, dy, u, s, 1.0, True, False)
            return
        be.linear_fwd(u, x, a, None)
        be.adapted_bwd_b(du, db, dy, u, b, s)
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
        self.begin(None, (0, 0))
        self.begin_forward()
        for slot in self.model.layout.in_order():
            yield slot, self.computed(slot)

    def computed(self, slot: Slot) -> Any:
        """Return the values of a tensor that the model computes with, until the next one is asked for."""
        self.begin(None, (0, 0))
        name = slot.param.name
        if slot.layer is not None and slot.offset < self.model.layout.matrices:
            return self.effective(slot.layer, name)
        own = getattr(self.model.p if slot.layer is None else self.model.p.layer[slot.layer], name)
        if (None, name) not in self._pairs:
            return own
        return (
            self.outside("head", self.model._head)[: slot.shape[0]]
            if name == "head"
            else self.outside("embed", own)
        )


def _tap(slot: Slot) -> str:
    """Name the tap of a factor: 3.wq.A, embed.B."""
    return slot.param.name if slot.layer is None else f"{slot.layer}.{slot.param.name}"


def add_rows(p: Any, slots: list[Slot], rows: Any) -> None:
    """Add to the views of parameters those of the factors of their rows: .layer[3].wq_row.

    rows (all rows of the slots,)"""
    start = 0
    for slot in slots:
        setattr(p.layer[slot.layer], slot.param.name + ROW, rows[start : start + slot.shape[0]])
        start += slot.shape[0]
