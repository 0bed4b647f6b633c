"""Tell which parts of the gradients a backward pass completes when, for what is exchanged meanwhile."""

from __future__ import annotations

from collections.abc import Callable

from ..model.config import ModelConfig
from ..model.lora import AdapterLayout, LoraConfig
from ..model.micro_gradients import Pieces
from ..model.params import Layout
from ..ranks.shard import TILE, Bucket


def layout_of(cfg: ModelConfig, lora: LoraConfig | None) -> Layout | AdapterLayout:
    """Lay out what is trained: the weights, or adapters of them."""
    return AdapterLayout(cfg, lora) if lora else Layout(cfg)


def completed(layout: Layout | AdapterLayout) -> tuple[Callable[[Bucket], int | None], list[int]]:
    """Tell by which layer's backward pass a bucket is complete, None: at the end; and where buckets should end.

    The layout has the matrices of the last layer first, and what is no matrix of a layer behind them all."""
    at = Pieces(layout).at if isinstance(layout, Layout) else {}
    ends = sorted((piece.stop, layer) for layer, piece in at.items() if layer is not None)

    def ready(b: Bucket) -> int | None:
        return next((layer for end, layer in ends if b.stop <= end), None)

    return ready, [end // TILE * TILE for end, _ in ends]
