"""Hold the gradients of one micro-batch, and add them to those of the micro-batches before it.

The order of sums: every micro-batch begins at zero, and each element of the gradients of a step is
((0 + a0) + a1) + a2 ..., in the wide dtype, a0, a1, ... the micro-batches in the order of the stream. So it does not matter
which process computes which of them. A layer at a time is held, not a second buffer of all gradients.
"""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any

from .params import ALIGN, Layout, Slot


class Pieces:
    """Slices of a Layout that a backward pass completes: the matrices of each layer, and all the rest.

    at    {layer: slice}, None: the rest
    size  elements of the widest layer and of the rest: what is held at a time
    """

    def __init__(self, layout: Layout) -> None:
        firsts: dict[int | None, int] = {}
        for s in layout.slots:
            if s.param.decay:
                firsts.setdefault(s.layer, s.offset)
        tail = firsts[None]
        starts = sorted(n for layer, n in firsts.items() if layer is not None)
        ends = dict(pairwise([*starts, tail]))
        self.at: dict[int | None, slice] = {
            layer: slice(n, ends[n]) for layer, n in firsts.items() if layer is not None
        }
        self.widest = max((s.stop - s.start for s in self.at.values()), default=0)
        self.at[None] = slice(tail, layout.size)
        self.size = self.widest + layout.size - tail

    def place(self, s: Slot) -> int:
        """Find the first element of a parameter among those that are held."""
        layer = s.layer if s.param.decay else None
        return s.offset - self.at[layer].start + (self.widest if layer is None else 0)

    def held(self, layer: int | None) -> slice:
        """Find the piece of a layer, or the rest, among the elements that are held."""
        first, piece = self.widest if layer is None else 0, self.at[layer]
        return slice(first, first + piece.stop - piece.start)


class MicroGradients:
    """Gradients of one micro-batch on their way into those of the step.

    g     (layout.size,)   gradients of the step
    part  (pieces.size,)   where backward writes: products overwrite the matrices, `vectors` are what it only adds to
    """

    def __init__(self, be: ModuleType, layout: Layout, g: Any, part: Any) -> None:
        self.be, self.g, self.part, self.pieces = be, g, part, Pieces(layout)
        self.vectors = part[self.pieces.size - (layout.size - layout.decayed) :]

    def fold(self, layer: int | None, begins: bool = False) -> None:
        """g += part, where the piece of a layer, or the rest, is; with `begins`, of a first micro-batch, g = part."""
        total, part = self.g[self.pieces.at[layer]], self.part[self.pieces.held(layer)]
        if begins:
            self.be.copy(total, part)
        else:
            add(self.be, total, part)


def add(be: ModuleType, total: Any, x: Any) -> None:
    """total += x.  total, x (n,), n a multiple of ALIGN"""
    rows = total.reshape(-1, ALIGN)
    be.add(rows, rows, x.reshape(-1, ALIGN))


def shares_scales(backend: Any, preferences: Any) -> bool:
    """Tell whether a recorded micro-step serves every loss scale: where calls are asynchronous, the device reads it."""
    return bool(backend.asynchronous) and not preferences
