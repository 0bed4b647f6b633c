"""The table of parameters.

It drives allocation, initialisation, weight decay, checkpoint names and gradient buckets.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..common.rounding import round_up
from .config import ModelConfig
from .families import layers_of
from .spec import LayerSpec

# elements: every tensor starts on a 128-byte line in bf16, 256 in float32
ALIGN = 64
# rows: a vocabulary that is no multiple has rows of zeros after it, which stay zeros
VOCAB_ALIGN = 64


@dataclass(frozen=True)
class Param:
    """A row of the table.

    shape  in the letters of the config
    init   "ones", "zeros", "in" (normal, std) or "out" (std / sqrt(2 L): into the residual stream)
    decay  takes weight decay
    hf     name in a Hugging Face checkpoint; {} is the layer
    when   tells the layers that have the parameter
    """

    name: str
    shape: str
    init: str
    decay: bool
    hf: str
    when: Callable[[LayerSpec], bool] = lambda layer: True


def _bias(layer: LayerSpec) -> bool:
    return layer.qkv_bias


def _head_norm(layer: LayerSpec) -> bool:
    return layer.qk_norm == "head"


def _wide_norm(layer: LayerSpec) -> bool:
    return layer.qk_norm == "all"


_ATTENTION = "model.layers.{}.self_attn."
LAYER = [
    Param("attn_norm", "C", "ones", False, "model.layers.{}.input_layernorm.weight", lambda s: s.attn_norm),
    Param("wq", "H*D C", "in", True, _ATTENTION + "q_proj.weight"),
    Param("wk", "K*D C", "in", True, _ATTENTION + "k_proj.weight"),
    Param("wv", "K*D C", "in", True, _ATTENTION + "v_proj.weight"),
    Param("bq", "H*D", "zeros", False, _ATTENTION + "q_proj.bias", _bias),
    Param("bk", "K*D", "zeros", False, _ATTENTION + "k_proj.bias", _bias),
    Param("bv", "K*D", "zeros", False, _ATTENTION + "v_proj.bias", _bias),
    Param("q_norm", "D", "ones", False, _ATTENTION + "q_norm.weight", _head_norm),
    Param("k_norm", "D", "ones", False, _ATTENTION + "k_norm.weight", _head_norm),
    Param("q_norm", "H*D", "ones", False, _ATTENTION + "q_norm.weight", _wide_norm),
    Param("k_norm", "K*D", "ones", False, _ATTENTION + "k_norm.weight", _wide_norm),
    Param("wo", "C H*D", "out", True, _ATTENTION + "o_proj.weight"),
    Param(
        "attn_post_norm", "C", "ones", False, "model.layers.{}.post_attention_layernorm.weight",
        lambda s: s.attn_post_norm,
    ),
    Param("mlp_norm", "C", "ones", False, "model.layers.{}.post_attention_layernorm.weight", lambda s: s.mlp_norm),
    Param("wgate", "F C", "in", True, "model.layers.{}.mlp.gate_proj.weight"),
    Param("wup", "F C", "in", True, "model.layers.{}.mlp.up_proj.weight"),
    Param("wdown", "C F", "out", True, "model.layers.{}.mlp.down_proj.weight"),
    Param(
        "mlp_post_norm", "C", "ones", False, "model.layers.{}.post_feedforward_layernorm.weight",
        lambda s: s.mlp_post_norm,
    ),
]  # fmt: skip
TOP = [
    Param("embed", "V C", "in", True, "model.embed_tokens.weight"),
    Param("final_norm", "C", "ones", False, "model.norm.weight"),
    Param("head", "V C", "in", True, "lm_head.weight"),
]
# neighbours without padding between them: one view, one matrix product
FUSED = {
    "wqkv": ("wq", "wk", "wv"),
    "bqkv": ("bq", "bk", "bv"),
    "wgu": ("wgate", "wup"),
}
# linear maps of a block, and the matrices that each joins
MAPS = {"wqkv": FUSED["wqkv"], "wo": ("wo",), "wgu": FUSED["wgu"], "wdown": ("wdown",)}
_PACKED = {name for group in FUSED.values() for name in group[1:]}


@dataclass(frozen=True)
class Slot:
    """Location of one parameter in a flat buffer. layer is None outside the blocks."""

    layer: int | None
    param: Param
    offset: int  # in elements
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def hf(self) -> str:
        """Hugging Face name of the tensor."""
        return self.param.hf.format(self.layer)


class Layout:
    """Locations of all parameters in a flat buffer.

    Decayed tensors first, so that AdamW is two calls; within them layers from last to first, so
    that a layer's gradients are one slice, complete in the order in which backward finishes.
    """

    # Parts with a learning rate of their own: of adapters alone.
    faster: tuple[slice, ...] = ()

    def __init__(self, cfg: ModelConfig) -> None:
        self.cfg = cfg
        layers = [*enumerate(layers_of(cfg))]
        rows: list[tuple[int | None, Param]] = [
            (i, p) for i, layer in reversed(layers) for p in LAYER if p.when(layer)
        ]
        tied = cfg.tie_word_embeddings
        rows += [(None, p) for p in reversed(TOP) if not (p.name == "head" and tied)]
        self.slots: list[Slot] = []
        n = 0
        for decay in (True, False):
            for layer, p in rows:
                if p.decay is decay:
                    shape = tuple(prod(cfg.letters[c] for c in s.split("*")) for s in p.shape.split())
                    n = n if p.name in _PACKED else round_up(n, ALIGN)
                    self.slots.append(Slot(layer, p, n, shape))
                    high = padded_vocab(shape[0]) if p.shape.startswith("V") else shape[0]
                    n += high * prod(shape[1:])
            n = round_up(n, ALIGN)
            if decay:
                self.decayed = n  # elements [0, decayed) take weight decay, the rest do not
        self.size = n
        # elements [0, matrices) are the matrices of the blocks, and nothing else
        self.matrices = next(s.offset for s in self.slots if s.layer is None)
        self.by_hf = {s.hf: s for s in self.slots}

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, padding not counted, a tied head counted once."""
        return sum(s.size for s in self.slots)

    def views(self, flat: Any, place: Callable[[Slot], int] = attrgetter("offset")) -> Any:
        """The named arrays inside a flat buffer: .embed, .layer[3].wq, the fused .layer[3].wqkv.

        With tied embeddings .head is .embed. place: finds the first element of a parameter, where the buffer is another one.
        """

        def cut(s: Slot, shape: tuple[int, ...]) -> Any:
            return flat[place(s) : place(s) + prod(shape)].reshape(shape)

        out = SimpleNamespace(layer=[SimpleNamespace() for _ in range(self.cfg.num_layers)])
        for s in self.slots:
            setattr(out if s.layer is None else out.layer[s.layer], s.param.name, cut(s, s.shape))
        first = {(s.layer, s.param.name): s for s in self.slots}
        for layer, views in enumerate(out.layer):
            for name, group in FUSED.items():
                if (layer, group[0]) in first:
                    parts = [first[layer, part] for part in group]
                    shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:])
                    setattr(views, name, cut(parts[0], shape))
        if self.cfg.tie_word_embeddings:
            out.head = out.embed
        return out

    def head_rows(self, flat: Any, rows: int, place: Callable[[Slot], int] = attrgetter("offset")) -> Any:
        """The first `rows` rows of the head, up to padded_vocab(V): those from V on are zeros."""
        name = "embed" if self.cfg.tie_word_embeddings else "head"
        (s,) = (s for s in self.slots if s.param.name == name)
        return flat[place(s) : place(s) + rows * s.shape[1]].reshape(rows, s.shape[1])

    def named(self, flat: Any) -> dict[str, Any]:
        """Views of every parameter in a flat buffer, by Hugging Face name, in table order."""
        return {s.hf: flat[s.offset : s.offset + s.size].reshape(s.shape) for s in self.in_order()}

    def in_order(self) -> list[Slot]:
        """Slots in the order of a checkpoint: embedding, layers first to last, final norm, head."""
        top = {p.name: i for i, p in enumerate(TOP)}
        inner = {p.name: i for i, p in enumerate(LAYER)}

        def key(s: Slot) -> tuple[int, int, int]:
            if s.layer is not None:
                return (1, s.layer, inner[s.param.name])
            return (0 if s.param.name == "embed" else 2, 0, top[s.param.name])

        return sorted(self.slots, key=key)

    def init(self, flat: np.ndarray, seed: int, std: float = 0.02) -> None:
        """Fill a host buffer with starting weights: normal(0, std) matrices, ones, zeros.

        Matrices that write into the residual stream get std / sqrt(2 L) (GPT-2, section 2.3).

        Each tensor has a random stream of its own, named by seed and position in the table, so
        that a tensor's start does not depend on the others.
        """
        flat[...] = 0
        out_std = std / np.sqrt(2 * self.cfg.num_layers)
        # NumPy loads np.random at its first use, and fails when threads do that
        np.random.default_rng  # noqa: B018

        def fill(number: int, s: Slot) -> None:
            view = flat[s.offset : s.offset + s.size]
            if s.param.init == "ones":
                view[...] = 1
            elif s.param.init in ("in", "out"):
                rng = np.random.Generator(np.random.PCG64([seed, number]))
                view[...] = rng.standard_normal(s.size, dtype=np.float32)
                view *= view.dtype.type(std if s.param.init == "in" else out_std)

        # NumPy draws without holding the interpreter's lock
        with ThreadPoolExecutor() as pool:
            jobs = [pool.submit(fill, i, s) for i, s in enumerate(self.in_order())]
        for job in jobs:
            job.result()

    def randomise(self, flat: np.ndarray, seed: int, std: float = 0.05) -> None:
        """Starting weights with noise on every parameter: biases away from 0, norms away from 1.

        For tests and comparisons: a fault in a bias or a norm weight is invisible without it.
        """
        self.init(flat, seed)
        rng = np.random.Generator(np.random.PCG64([seed, len(self.slots)]))
        for s in self.in_order():
            noise = rng.standard_normal(s.size, dtype=np.float32)
            flat[s.offset : s.offset + s.size] += (noise * np.float32(std)).astype(flat.dtype)


def padded_vocab(n: int) -> int:
    """Rows that the embedding or head of a vocabulary of n takes in a flat buffer."""
    return round_up(n, VOCAB_ALIGN)
