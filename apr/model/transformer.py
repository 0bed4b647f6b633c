"""The transformer, forward and backward, on the backend that it is given.

No array arithmetic happens here: a pass is a list of ops with the buffers that each reads and writes. Buffers are
declared by `BufferPlan.specs`, which `apr plan` reads too, and are named like the taps that show them.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from ..common.errors import Refused
from ..common.units import plural
from .adapters import Adapters, Split, add_rows
from .block import START, Block, CachePosition
from .buffers import Buffers, BufferSpecs, Shapes, block_buffers, plan_buffers, scratch_buffers
from .config import ModelConfig
from .documents import document_starts
from .families import layers_of
from .lora import AdapterLayout, LoraConfig
from .lora_dropout import Draws
from .micro_gradients import MicroGradients, shares_scales
from .params import Layout
from .preferences import Preferences, Weights, within
from .rope import rope_tables
from .taps import Tap, no_tap

# recorded passes of a model, one for each shape and whether it begins the gradients; more would fill the memory
MAX_GRAPHS = 8
# target without a loss, as any below 0
IGNORED = -100


class Model:
    """Weights, buffers and the two passes for batches of up to (batch, seq) tokens.

    w, g          flat parameters and gradients, in Layout order; give w to share another model's parameters, or its adapters
    p, d          their named views
    adapters      of a model whose parameters are frozen (lora), None otherwise; then g is the gradient of the adapters
    layers        parts of each block
    total         (1,) float64: sum of losses since it was last set to 0
    z_loss        weight of the squared log-sum-exp of the logits in what is minimised; the loss reported is without it
    document_end  id that ends a document (and belongs to it): no token sees a token of another document
    folds         gradients of each micro-batch begin at zero and are added to those before it: micro_gradients.py
    preferences   loss of pairs of answers in the place of the mean cross-entropy; set it before any pass

    The other options are those of BufferPlan. Positions run on through documents: rotary embedding turns q[t] and k[j] by
    multiples of t and j, so q[t] . k[j] depends on t - j alone, and so does a window: to start at 0 in each changes nothing.

    Raises Refused when seq or cache exceed the positions the configuration allows, and for a cache with document_end.
    """

    def __init__(
        self, cfg: ModelConfig, backend: ModuleType, batch: int, seq: int,
        dtype: str = "float32", train: bool = True, loss_rows: int | None = None,
        cache: int = 0, w: Any = None, recompute: bool = False, z_loss: float = 0.0, document_end: int | None = None,
        folds: bool = False, lora: LoraConfig | None = None, act_again: bool = False,
        make_buffers: Callable[[ModuleType, BufferSpecs], Buffers] = Buffers,
    ) -> None:  # fmt: skip
        if dtype not in backend.dtypes:
            raise Refused(f"backend {backend.name} computes in {', '.join(backend.dtypes)}, not {dtype}")
        if max(seq, cache) > (most := cfg.max_position_embeddings):
            raise Refused(
                f"{plural(max(seq, cache), 'position')} asked of a model with max_position_embeddings = {most}"
                f"{cfg.rope_scaling.beyond(most) if cfg.rope_scaling else ''}; use a smaller --seq-length"
            )
        if cache and document_end is not None:
            raise Refused("a KV cache continues one document per sequence: document_end does not go with it")
        self.cfg, self.be, self.dtype, self.train, self.recompute = cfg, backend, dtype, train, recompute
        self.batch, self.seq, self.z_loss, self.document_end = batch, seq, z_loss, document_end
        self.layout, self.layers, self.folds = Layout(cfg), layers_of(cfg), folds
        plan = plan_buffers(
            cfg, backend, batch, seq, loss_rows,
            dtype=dtype, train=train, recompute=recompute, cache=cache, own_weights=w is None,
            documents=document_end is not None, folds=folds, lora=lora, act_again=act_again,
        )  # fmt: skip
        self.loss_rows, self.act_again = plan.loss_rows, act_again
        self.buffers = make_buffers(backend, plan.specs(cfg))
        self.adapters = w if isinstance(w, Adapters) else None
        shared = self.adapters.model.w if self.adapters else w
        self.w = self.buffers["w"] if w is None else shared
        if lora and lora.base:
            self.w = Split(self.buffers["w8"], self.w)
        # weights that are no array have views of their own: int8.Int8Weights
        source = self.layout if w is None or hasattr(shared, "dtype") else w
        self.p = self.adapters.model.p if self.adapters else source.views(self.w)
        if lora and lora.base:
            matrices = [s for s in self.layout.slots if s.offset < self.layout.matrices]
            add_rows(self.p, matrices, self.buffers["rows"])
        if lora:
            self.adapters = Adapters(self, AdapterLayout(cfg, lora))
            self.adapters.place(self.p)
        if train:
            self.g = self.adapters.g if self.adapters else self.buffers["g"]
            self.d = self.adapters.gradients() if self.adapters else self.layout.views(self.g)
        self._micro: MicroGradients | None = None
        if train and folds and not self.adapters:
            self._micro = MicroGradients(backend, self.layout, self.g, self.buffers["g_part"])
            self.d = self.layout.views(self._micro.part, self._micro.pieces.place)
        # columns from V on, if any, are 0, and so is their gradient
        columns = (logits := self.buffers["logits"]).shape[1]
        self._logits, self._head, self._dhead = logits, source.head_rows(self.w, columns), None
        if self._micro:
            self._dhead = self.layout.head_rows(self._micro.part, columns, self._micro.pieces.place)
        elif self.adapters:
            self._head, self._dhead = self.adapters.open_head(columns, self._head)
        elif train:
            self._dhead = self.layout.head_rows(self.g, columns)
        self.total = self.buffers["total"]
        self.preferences: Preferences | None = None
        kept = range(cfg.num_layers if cache else 0)
        self._cache = [(self.buffers[f"{i}.keys"], self.buffers[f"{i}.values"]) for i in kept]
        self.cos, self.sin = self.buffers["cos"], self.buffers["sin"]
        self._angles = rope_tables(cfg, max(seq, cache))
        for table, values in zip((self.cos, self.sin), self._angles, strict=True):
            backend.from_host(table, values)
        self._views: dict[tuple[int, int], tuple[list[Any], Any]] = {}
        # targets that went through micro_step
        self.tokens_trained = 0
        # shapes, loss scales and `begins` that were computed once
        self._warm: set[tuple[Any, ...]] = set()
        self._passes: dict[tuple[Any, ...], Callable[[], None]] = {}

    def _at(self, batch: int, seq: int) -> tuple[list[Any], Any]:
        """Views of block and scratch buffers for a batch, which may be smaller than the buffers."""
        if (batch, seq) not in self._views:
            if batch > self.batch or seq > self.seq:
                raise ValueError(f"batch {batch} x {seq} does not fit buffers of {self.batch} x {self.seq}")
            have = self.buffers.arrays

            def view(shapes: Shapes, prefix: str = "") -> Any:
                flat = {k: have[prefix + k if prefix + k in have else k].reshape(-1) for k in shapes}
                return SimpleNamespace(**{k: flat[k][: prod(s)].reshape(s) for k, s in shapes.items()})

            scratch = view(scratch_buffers(self.cfg, batch, seq, self.train, self.act_again))
            shared = {"att_out": scratch.delta, "mlp_out": scratch.delta}
            blocks = []
            for i, layer in enumerate(self.layers):
                block = view(block_buffers(self.cfg, layer, batch, seq), f"{i}.")
                alias = {**shared, "norm1": block.res1, "norm2": block.res2}
                blocks.append(SimpleNamespace(**{**alias, **vars(block)}))
            scratch.ids, scratch.targets = (have[k][: batch * seq] for k in ("ids", "targets"))
            scratch.doc_start = None
            if self.document_end is not None:
                scratch.doc_start = have["doc_start"][: batch * seq].reshape(batch, seq)
            self._views[batch, seq] = blocks, scratch
        return self._views[batch, seq]

    def _in_vocabulary(self, ids: np.ndarray, lowest: int | None) -> None:
        if ids.max() >= self.cfg.vocab_size or (lowest is not None and ids.min() < lowest):
            raise ValueError(f"ids {ids.min()} to {ids.max()} with a vocabulary of {self.cfg.vocab_size}")

    def forward(
        self, ids: np.ndarray, tap: Tap = no_tap, past: int = 0, row: int = 0, slot: int = 0, draws: Draws | None = None
    ) -> None:  # fmt: skip
        """Compute final_norm (B*T,C), a scratch buffer, of ids (B,T), integers in [0,V).

        past, row, slot: the CachePosition of the batch; they need a model made with cache > 0.
        draws: of the masks of adapters with dropout, as in training; None: nothing is dropped.
        Raises ValueError for ids outside the vocabulary: kernels do not check where they read.
        """
        self._put_ids(ids, draws)
        self._forward(tap, CachePosition(past, row, slot))

    def step(self, ids: np.ndarray, positions: np.ndarray, slots: int) -> None:
        """Add one token to each of B sequences of different lengths: ids (B,), positions (B,) of the tokens.

        Every token goes into slot number `slots` of its cache row, so that the sequences end together: sequence b fills
        the slots from slots - positions[b] on. Raises ValueError for ids outside the vocabulary.
        """
        be, n = self.be, len(ids)
        if n == 1:
            self.forward(ids.reshape(1, 1), past=int(positions[0]), slot=slots - int(positions[0]))
            return
        self._put_ids(ids.reshape(n, 1))
        cos, sin, doc_start = (self.buffers[name][:n] for name in ("step_cos", "step_sin", "doc_start"))
        for buffer, table in zip((cos, sin), self._angles, strict=True):
            be.from_host(buffer, table[positions])
        be.from_host(doc_start, (slots - positions).astype(np.int32))
        self._forward(no_tap, CachePosition(slots, cos=cos, sin=sin, doc_start=doc_start.reshape(n, 1)))

    def move_row(self, to: int, source: int, slots: int) -> None:
        """Copy the first `slots` slots of a row of the KV cache to another row."""
        for pair in self._cache:
            for cache in pair:
                self.be.copy(cache[to, :slots], cache[source, :slots])

    def _put_ids(self, ids: np.ndarray, draws: Draws | None = None) -> None:
        self._in_vocabulary(ids, lowest=0)
        self._ids, (self.b, self.t) = ids, ids.shape
        if self.adapters:
            self.adapters.begin(draws, ids.shape)
        s = self._at(self.b, self.t)[1]
        self.be.from_host(s.ids, ids.reshape(-1))
        if self.document_end is not None:
            self.be.from_host(s.doc_start, document_starts(ids, self.document_end))

    def _forward(self, tap: Tap, at: CachePosition = START) -> None:
        be, c, p = self.be, self.cfg, self.p
        blocks, s = self._at(self.b, self.t)
        if self.adapters:
            self.adapters.begin_forward()
        be.embedding_fwd(blocks[0].res1, s.ids, self._outside("embed", p.embed))
        res, delta = blocks[0].res1, None
        for i in range(c.num_layers):
            res, delta = self._block(i, res, delta, tap, at)
        be.add_rmsnorm_fwd(s.res, s.final_norm, s.rstd, res, delta, p.final_norm, c.rms_norm_eps)
        tap(None, f"hidden.{c.num_layers}", s.res)
        tap(None, "final_norm", s.final_norm)

    def _block(self, i: int, res: Any, delta: Any, tap: Tap, at: CachePosition = START) -> tuple[Any, Any]:
        """Run block i on the residual stream res + delta; returns the two parts of the next one."""
        return self._of(i, tap).forward(res, delta, at)

    def _of(self, i: int, tap: Tap, adds: bool = True) -> Block:
        """Block i on the batch at hand."""

        def named(name: str, x: Any) -> None:
            stream = name in ("hidden", "d_hidden")
            tap(None if stream else i, f"{name}.{i}" if stream else name, x)

        blocks, s = self._at(self.b, self.t)
        cache = self._cache[i] if self._cache else None
        tables = self.cos, self.sin
        return Block(
            self.be, self.cfg, i, self.layers[i], self.p.layer[i], self.adapters, blocks[i], s, (self.b, self.t), tables,
            cache, named, adds, self.act_again,
        )  # fmt: skip

    def loss(self, targets: np.ndarray, scale: float | None = None, tap: Tap = no_tap) -> None:
        """Add the losses of targets (B,T), or of their pairs, to self.total, in nats; negative targets are left out.

        With a loss scale, also start the backward pass of scale * sum of losses: the gradient of the head
        is added and that of final_norm kept. loss_rows rows of logits exist at a time; where that is not
        all of them the taps are named logits.FIRST_ROW.
        """
        self._put_targets(targets)
        self._loss(scale, tap)

    def _put_targets(self, targets: np.ndarray) -> None:
        self._in_vocabulary(targets, lowest=None)
        self._targets = targets
        self.be.from_host(self._at(self.b, self.t)[1].targets, targets.reshape(-1))

    def _loss(self, scale: Any, tap: Tap = no_tap, begins: bool = False) -> None:
        be, s = self.be, self._at(self.b, self.t)[1]
        if scale is not None and self._micro:
            self._clear_sums()
        elif scale is not None and self.adapters:
            self.adapters.begin_backward()
        self._rows(None if self.preferences else scale, None, tap, begins)
        if self.preferences:
            # The losses of all rows came first: the weight of each depends on those of its pair.
            pairs, weights = self.preferences.weigh(
                self._ids, self._targets, be.to_host(s.loss), scale or 0.0
            )
            if scale is not None:
                self._rows(scale, weights, tap, begins)
            be.from_host(s.loss, pairs)
        be.add_sum(self.total, s.loss)

    def _rows(self, scale: Any, weights: Weights | None, tap: Tap, begins: bool = False) -> None:
        """Compute the losses of rows and, with a scale, or weights in its place, the gradients of the head and of final_norm."""
        be, s = self.be, self._at(self.b, self.t)[1]
        n, head, adapters = self.b * self.t, self._outside("head", self._head), self.adapters
        if adapters:
            adapters.begin_head(s.final_norm)
        for first in range(0, n, self.loss_rows):
            rows = slice(first, min(n, first + self.loss_rows))
            suffix = "" if n <= self.loss_rows else f".{first}"
            whole = self._logits[: rows.stop - first]
            logits = whole[:, : self.cfg.vocab_size]
            # All logits are there already, where they fit.
            if weights is None or n > self.loss_rows:
                be.linear_fwd(whole, s.final_norm[rows], head, None)
                if adapters:
                    adapters.add_head(whole, rows, n)
            tap(None, "logits" + suffix, logits)
            for at, weight in [(rows, scale)] if weights is None else within(weights, rows):
                be.cross_entropy(
                    s.loss[at], logits[at.start - first : at.stop - first], s.targets[at], weight, self.z_loss
                )
            tap(None, "loss_rows" + suffix, s.loss[rows])
            if scale is not None:
                tap(None, "d_logits" + suffix, logits)
                adds = first > 0 or not (begins or self._micro)
                be.linear_bwd(s.dnorm[rows], self._dhead, None, whole, s.final_norm[rows], head, adds)
                if adapters:
                    adapters.add_head_gradients(whole, s.final_norm, rows)
        if adapters and scale is not None:
            adapters.end_head(s.dnorm)

    def _outside(self, name: str, w: Any) -> Any:
        """Embedding or head, with adapters until another matrix is asked for."""
        return self.adapters.outside(name, w) if self.adapters else w

    def last_logits(self, count: int = 1) -> np.ndarray:
        """Logits of the last position of each sequence of the latest forward, or of the last `count`, on the host, (B,V)."""
        s = self._at(self.b, self.t)[1]
        rows = s.final_norm[self.t - 1 :: self.t] if count == 1 else s.final_norm[self.b * self.t - count :]
        logits = self._logits[: len(rows)]
        self.be.linear_fwd(logits, rows, self._outside("head", self._head), None)
        return self.be.to_host(logits[:, : self.cfg.vocab_size])

    def micro_step(
        self, ids: np.ndarray, targets: np.ndarray, scale: float, graph: bool = True, begins: bool = False,
        ready: Callable[[int | None], None] = lambda layer: None, also: tuple[Any, ...] = (), draws: Draws | None = None,
    ) -> None:  # fmt: skip
        """Run forward, loss and backward of one micro-batch, as one launch where the device can.

        begins: its gradients take the place of what g holds, and of a matrix's nothing is read; otherwise they are added.
        draws: as of `forward`; ready: of `backward`. The first call for a shape, `begins` and what `ready` depends on (also)
        runs op by op, the second is captured, later ones replay it, with equal bits. Counters of draws are values on the
        device, and so is the loss scale where calls are asynchronous; elsewhere what is captured is for one scale.
        """
        self._put_ids(ids, draws)
        self._put_targets(targets)
        at: Any = scale
        if shared := graph and shares_scales(self.be, self.preferences):
            self.be.from_host(at := self.buffers["loss_scale"], np.array([scale]))
        key = (self.b, self.t, None if shared else scale, begins, draws and draws.seed, also)

        def op_by_op() -> None:
            if begins and not self._micro:
                self._clear_sums()
            self._forward(no_tap)
            self._loss(at, begins=begins)
            self.backward(ready=ready, begins=begins)

        if not graph:
            op_by_op()
        elif key in self._passes:
            self._passes[key]()
        elif key in self._warm:
            if len(self._passes) >= MAX_GRAPHS:
                self._passes = {k: f for k, f in self._passes.items() if k[-1]}
            self._passes[key] = self.be.capture(op_by_op)
            self._passes[key]()
        else:
            self._warm.add(key)
            op_by_op()
        self.tokens_trained += int(np.count_nonzero(targets >= 0))

    def _clear_sums(self) -> None:
        """Set to zero the gradients that ops can only add to: of vectors, an embedding that is not the head, and adapters."""
        if self.adapters:
            self.be.fill(self.g, 0)
            return
        self.be.fill(self._micro.vectors if self._micro else self.g[self.layout.decayed :], 0)
        if not self.cfg.tie_word_embeddings:
            self.be.fill(self.d.embed, 0)

    def tune(self, targets_per_batch: int) -> None:
        """Time the backend's products on full batches and keep the fastest. Sets gradients and total to 0."""
        n = self.batch * self.seq
        ids = (np.arange(n) % self.cfg.vocab_size).astype(np.int32).reshape(self.batch, self.seq)
        draws = Draws.of(0, 0, 0, self.batch)
        self.be.tune(lambda: self.micro_step(ids, ids, 1 / targets_per_batch, graph=False, draws=draws))
        self.be.fill(self.g, 0)
        self.be.fill(self.total, 0)

    def backward(
        self,
        tap: Tap = no_tap,
        ready: Callable[[int | None], None] = lambda layer: None,
        begins: bool = False,
    ) -> None:
        """Add the gradients of all that is trained but the head, after forward and loss(scale=...); begins: those of matrices
        take the place of what was there.

        ready(layer) is called when a layer's gradients are complete, ready(None) at the end.
        """
        be, c, p, d = self.be, self.cfg, self.p, self.d
        blocks, s = self._at(self.b, self.t)
        tap(None, "d_final_norm", s.dnorm)
        be.fill(s.dres, 0)
        be.add_rmsnorm_bwd(s.dres, d.final_norm, s.dnorm, s.res, s.rstd, p.final_norm)
        tap(None, f"d_hidden.{c.num_layers}", s.dres)
        for i in reversed(range(c.num_layers)):
            block = self._of(i, tap, not (begins or self._micro))
            # the last block's values are still there
            if i + 1 < c.num_layers and self.recompute:
                self._block(i, blocks[i].res1, None, no_tap)
            block.backward(d.layer[i])
            if self._micro:
                self._micro.fold(i, begins)
            ready(i)
        if d.embed is not None:
            be.embedding_bwd(d.embed, s.dres, s.ids)
        if self.adapters:
            self.adapters.add_embedding_gradients(s.dres, s.ids)
        if self._micro:
            self._micro.fold(None, begins)
        if self.adapters:
            self.adapters.end_backward()
        ready(None)
