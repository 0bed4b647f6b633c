"""All buffers of a job in one piece of memory, laid out before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from types import ModuleType
from typing import Any

import numpy as np

import ml_dtypes  # noqa: F401 # isort: skip -- gives NumPy the name "bfloat16"; without NumPy it prints a traceback

from ..common.rounding import ceil_div, round_up
from .config import ModelConfig
from .families import layers_of
from .lora import AdapterLayout, LoraConfig
from .lora_dropout import sizes
from .micro_gradients import Pieces
from .params import Layout, padded_vocab
from .spec import LayerSpec

# bytes: every buffer starts where a GPU's widest access and every cuBLAS kernel may start
ALIGN = 256
# dtype of sums and statistics
WIDE = {"float64": "float64", "float32": "float32", "bfloat16": "float32"}
# buffers in the wide dtype
STATISTICS = {"rstd", "rstd1", "rstd2", "post_rstd1", "post_rstd2", "qk_rstd", "lse", "loss"}
# buffers of a block that stay when the block is computed again in backward
KEPT_UNDER_RECOMPUTE = {"res1"}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class BufferSpec:
    """A buffer to allocate: its purpose (a field of cost.Memory), shape and dtype."""

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
        return round_up(self.size, ALIGN)


BufferSpecs = dict[str, BufferSpec]


class Buffers:
    """One allocation on a backend, cut into named buffers: buffers["3.qkv"]."""

    def __init__(self, backend: ModuleType, specs: BufferSpecs) -> None:
        whole = backend.empty(sum(s.nbytes for s in specs.values()), "uint8")
        self.arrays: dict[str, Any] = {}
        for dtype in {s.dtype for s in specs.values()}:  # a backend makes ready what it needs for a dtype
            backend.empty(0, dtype)
        start = 0
        for name, s in specs.items():
            self.arrays[name] = whole[start : start + s.size].view(np.dtype(s.dtype)).reshape(s.shape)
            start += s.nbytes

    def __getitem__(self, name: str) -> Any:
        return self.arrays[name]


def block_buffers(c: ModelConfig, layer: LayerSpec, batch: int, seq: int) -> Shapes:
    """Shapes of the buffers that a block keeps for its backward pass."""
    n, width, heads = batch * seq, c.hidden_size, c.num_heads + c.num_kv_heads
    # the residual stream entering the block: tap hidden.LAYER
    shapes: Shapes = {"res1": (n, width)}
    if layer.attn_norm:
        shapes |= {"norm1": (n, width), "rstd1": (n,)}
    shapes |= {
        "qkv": (n, (heads + c.num_kv_heads) * c.head_dim),
        "lse": (batch, c.num_heads, seq),
        "att": (n, c.num_heads * c.head_dim),
    }
    if layer.attn_post_norm:
        shapes |= {"att_out": (n, width), "post_rstd1": (n, 1)}
    shapes["res2"] = (n, width)
    if layer.mlp_norm:
        shapes |= {"norm2": (n, width), "rstd2": (n,)}
    shapes |= {"gu": (n, 2 * c.intermediate_size), "act": (n, c.intermediate_size)}
    if layer.mlp_post_norm:
        shapes |= {"mlp_out": (n, width), "post_rstd2": (n, 1)}
    if layer.qk_norm:
        wide = layer.qk_norm == "all"
        shapes |= {
            "qk": (n, heads * c.head_dim) if wide else (n, heads, c.head_dim),
            "qk_rstd": (n, 2 if wide else heads),
        }
    return shapes


def scratch_buffers(c: ModelConfig, batch: int, seq: int, train: bool, act_again: bool = False) -> Shapes:
    """Shapes of the buffers that all layers share. act_again: the gradient of gu takes the place of gu"""
    n, heads = batch * seq, c.num_heads + c.num_kv_heads
    shapes: Shapes = {
        "delta": (n, c.hidden_size),
        # tap hidden.L
        "res": (n, c.hidden_size),
        "final_norm": (n, c.hidden_size),
        "rstd": (n,),
        "loss": (n,),
    }
    if train:
        shapes |= {
            "dres": (n, c.hidden_size),
            "dnorm": (n, c.hidden_size),
            "dqkv": (n, (heads + c.num_kv_heads) * c.head_dim),
            "datt": (n, c.num_heads * c.head_dim),
            "dact": (n, c.intermediate_size),
        }
        if not act_again:
            shapes["dgu"] = (n, 2 * c.intermediate_size)
        for layer in layers_of(c):
            blocks = block_buffers(c, layer, batch, seq)
            shapes |= {"dqk": blocks["qk"]} if layer.qk_norm else {}
    return shapes


@dataclass(frozen=True)
class BufferPlan:
    """Buffers of a model for batches of up to batch x seq tokens.

    train         keep the activations that backward needs, and gradients
    recompute     keep only the residual stream entering each block (activation checkpointing)
    loss_rows     rows of logits held at once
    cache         positions of the KV cache, 0 for none
    own_weights   allocate the parameters; otherwise they are given
    pad_vocab     logits have as many columns as the head has rows in a flat buffer
    documents     attention stops at document borders
    folds         gradients of each micro-batch begin at zero, beside those of the step
    lora          adapters are trained, and the parameters are frozen
    act_again     blocks share `act`, which backward computes again from `gu`, in one pass with the gradient that replaces it
    steps         shapes and dtypes of what the backend's decode steps keep; none where it has no such steps
    """

    batch: int
    seq: int
    dtype: str = "float32"
    train: bool = True
    recompute: bool = False
    loss_rows: int = 1
    cache: int = 0
    own_weights: bool = True
    pad_vocab: bool = False
    documents: bool = False
    folds: bool = False
    lora: LoraConfig | None = None
    act_again: bool = False
    steps: tuple[tuple[str, tuple[tuple[int, ...], str]], ...] = ()

    def specs(self, c: ModelConfig) -> BufferSpecs:
        """Every buffer by name: block buffers as LAYER.NAME, or NAME where blocks share one."""
        n, wide = self.batch * self.seq, WIDE[self.dtype]

        def kind(name: str) -> str:
            return wide if name in STATISTICS else self.dtype

        out = self._weight_specs(c)
        blocks = [block_buffers(c, layer, self.batch, self.seq) for layer in layers_of(c)]
        for name in dict.fromkeys(name for block in blocks for name in block):
            again = self.recompute and name not in KEPT_UNDER_RECOMPUTE
            shared = not self.train or again or (self.act_again and name == "act")
            for i, block in enumerate(blocks):
                if name in block:
                    purpose = "scratch" if shared else "saved"
                    out[name if shared else f"{i}.{name}"] = BufferSpec(purpose, block[name], kind(name))
        for name, shape in scratch_buffers(c, self.batch, self.seq, self.train, self.act_again).items():
            out[name] = BufferSpec("scratch", shape, kind(name))
        columns = logit_columns(c, self.pad_vocab)
        out["logits"] = BufferSpec("logits", (self.loss_rows, columns), self.dtype)
        for name in ("ids", "targets"):
            out[name] = BufferSpec("scratch", (n,), "int32")
        if self.documents:
            out["doc_start"] = BufferSpec("scratch", (n,), "int32")
        out["total"] = BufferSpec("scratch", (1,), "float64")
        if self.train:
            out["loss_scale"] = BufferSpec("scratch", (1,), "float64")
        for name in ("cos", "sin"):
            out[name] = BufferSpec("scratch", (max(self.seq, self.cache), c.head_dim // 2), wide)
        return out | self._cache_specs(c)

    def _weight_specs(self, c: ModelConfig) -> BufferSpecs:
        """Buffers of the parameters and of the gradients of what is trained, and those that adapters need beside them."""
        layout, wide, out = Layout(c), WIDE[self.dtype], BufferSpecs()
        size = layout.size
        if self.lora and self.lora.base:
            size -= layout.matrices
            rows = sum(s.shape[0] for s in layout.slots if s.offset < layout.matrices)
            out["w8"] = BufferSpec("base", (layout.matrices,), "int8")
            out["rows"] = BufferSpec("base", (rows,), wide)
        if self.own_weights:
            out["w"] = BufferSpec("base" if self.lora else "weights", (size,), self.dtype)
        if self.train and not self.lora:
            out["g"] = BufferSpec("gradients", (size,), wide)
            if self.folds:
                out["g_part"] = BufferSpec("gradients", (Pieces(layout).size,), wide)
        return out | (self._adapter_specs(AdapterLayout(c, self.lora)) if self.lora else {})

    def _adapter_specs(self, layout: AdapterLayout) -> BufferSpecs:
        wide, low = WIDE[self.dtype], (self.batch * self.seq * layout.max_rank,)
        part = {"adapter_part": BufferSpec("gradients", (layout.size,), wide)} if self.folds else {}
        if any(p.base.param.name == "embed" for p in layout.pairs):
            part["d_low_wide"] = BufferSpec("scratch", low, wide)
        if layout.config.dora:
            part |= dora_specs(layout, self.batch * self.seq, self.dtype, wide)
        if layout.config.dropout and self.train:
            columns = logit_columns(layout.cfg, self.pad_vocab)
            for name, size in sizes(layout, self.batch * self.seq, columns, self.loss_rows):
                part[name] = BufferSpec("scratch", (size,), self.dtype)
            part["counters"] = BufferSpec("scratch", (self.batch, 2), "int32")
        return part | {
            "adapters": BufferSpec("weights", (layout.size,), wide),
            "factors": BufferSpec("weights", (layout.size,), self.dtype),
            "adapter_gradients": BufferSpec("gradients", (layout.size,), wide),
            "effective": BufferSpec("scratch", (layout.largest_map,), self.dtype),
            "low": BufferSpec("scratch", low, self.dtype),
            "d_low": BufferSpec("scratch", low, self.dtype),
        }

    def _cache_specs(self, c: ModelConfig) -> BufferSpecs:
        """Buffers of the KV cache, and of a step of sequences of different lengths."""
        out: BufferSpecs = {}
        if self.cache and self.batch > 1:
            out["doc_start"] = BufferSpec("scratch", (self.batch,), "int32")
            for name in ("step_cos", "step_sin"):
                out[name] = BufferSpec("scratch", (self.batch, c.head_dim // 2), WIDE[self.dtype])
        shape = (self.batch, self.cache, c.num_kv_heads, c.head_dim)
        for i in range(c.num_layers if self.cache else 0):
            for name in ("keys", "values"):
                out[f"{i}.{name}"] = BufferSpec("cache", shape, self.dtype)
        return out | (self._step_specs(c) if self.steps else {})

    def _step_specs(self, c: ModelConfig) -> BufferSpecs:
        """Buffers of decode steps: decode.Decoding."""
        rows = (self.batch,)
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            **dict.fromkeys(("tokens", "positions", "counts", "top_k"), (rows, "int32")),
            "chosen": (rows, "float64"),
            "options": ((*rows, 4), "float64"),
            "draws": ((*rows, self.cache), "float64"),
            "seen": ((*rows, c.vocab_size), "uint8"),
            "allowed": ((c.vocab_size,), "uint8"),
            **dict(self.steps),
        }
        return {f"step_{name}": BufferSpec("cache", *of) for name, of in shapes.items()}


def dora_specs(layout: AdapterLayout, tokens: int, dtype: str, wide: str) -> BufferSpecs:
    """List the buffers of DoRA (dora.py): rows of norm sqrt(I) and zeros as large as a map; norms of all rows; what is as large
    as B, or as y."""
    rows = max(p.base.shape[0] for p in layout.pairs)
    widest = max(max(p.base.shape) for p in layout.pairs)
    factor, outputs = rows * layout.max_rank, tokens * rows
    sizes = {
        "unit": (layout.largest_map, dtype),
        "zeros": (max(layout.largest_map, outputs), dtype),
        "ones": (widest, dtype),
        "factor": (factor, dtype),
        "z": (outputs, dtype),
        "dz": (outputs, dtype),
        "zeros_wide": (max(factor, widest), wide),
        "ones_wide": (max(widest, tokens), wide),
        "sums": (factor, wide),
        "scaled": (factor, wide),
        "share": (rows, wide),
        "constant": (max(1, tokens), wide),
        "norms": (sum(p.base.shape[0] for p in layout.pairs), wide),
    }
    return {f"dora_{name}": BufferSpec("scratch", (size,), kind) for name, (size, kind) in sizes.items()}


def plan_buffers(
    c: ModelConfig,
    backend: ModuleType,
    batch: int,
    seq: int,
    loss_rows: int | None = None,
    **options: Any,
) -> BufferPlan:
    """BufferPlan with the backend's choice of loss_rows, where none is given, and of pad_vocab."""
    tokens = batch * seq
    # In main memory as many bytes of logits in either dtype: a head's gradient is read and written once for each part.
    is_half = options.get("dtype") == "bfloat16" and backend.name != "cuda"
    elements = backend.loss_elements * (2 if is_half else 1)
    rows = min(loss_rows or default_loss_rows(c, tokens, elements), tokens)
    cache, ops = options.get("cache", 0), backend.decoder() if options.get("cache") else None
    sizes = c.num_heads, c.num_kv_heads, c.head_dim
    steps = () if ops is None else tuple(ops.work_arrays(batch, cache, *sizes).items())
    return BufferPlan(batch, seq, loss_rows=rows, pad_vocab=backend.pad_vocab, steps=steps, **options)


def logit_columns(c: ModelConfig, padded: bool) -> int:
    """Columns of the logits: V, or as many as the head has rows in a flat buffer."""
    return padded_vocab(c.vocab_size) if padded else c.vocab_size


def default_loss_rows(c: ModelConfig, tokens: int, elements: int = 1 << 23) -> int:
    """Rows of logits held at once, so that all logits never exist together: `elements` in all, at least
    64 rows, and as many parts as that takes, of equal size."""
    most = max(64, elements // c.vocab_size // 64 * 64)
    parts = ceil_div(tokens, most)
    return min(tokens, round_up(ceil_div(tokens, parts), 64))
