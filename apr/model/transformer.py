"""The transformer, forward and backward, over whichever backend it is given.

No array arithmetic happens here: this file says which op reads and writes which buffer. Buffers are
declared by `BufferPlan.specs`, which `apr plan` reads too, and are named like the taps that show them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from ..common.errors import Refused
from .buffers import Buffers, Shapes, block_buffers, plan_buffers, scratch_buffers
from .config import ModelConfig
from .params import Layout
from .rope import rope_tables
from .taps import Tap, no_tap

MAX_GRAPHS = 8
# a target that no loss is computed for, as any below 0
IGNORED = -100


@dataclass(frozen=True)
class CachePosition:
    """Location of a batch in the KV cache: sequence b is cache row `row + b`, its token 0 is at slot `slot`, `past`
    tokens are cached already.

    A step of sequences of different lengths has angles of its own, (B,D/2), and `doc_start` (B,1), the slot of each
    sequence's token 0; then `past` counts slots.
    """

    past: int = 0
    row: int = 0
    slot: int = 0
    cos: Any = None
    sin: Any = None
    doc_start: Any = None


def document_starts(ids: np.ndarray, end: int) -> np.ndarray:
    """Where the document of each position begins: after the last `end` before it, or at 0.  (B,T) int32 of ids (B,T)"""
    starts = np.zeros(ids.shape, np.int32)
    starts[:, 1:] = np.where(ids[:, :-1] == end, np.arange(1, ids.shape[1]), 0)
    return np.maximum.accumulate(starts, axis=1)


class Model:
    """Weights, buffers and the two passes for batches of up to (batch, seq) tokens.

    w, g: flat parameters and gradients (Layout order); p, d: their named views. The other options are
    those of BufferPlan. Give w to share another model's parameters. z_loss times the squared log-sum-exp of the
    logits joins what is minimised, not what is reported.

    document_end: the id that ends a document, of which a sequence may hold several; then no token sees one of another
    document, and the id that ends a document belongs to it. Positions run on through the sequence all the same: rotary
    embeddings turn q[t] and k[j] by angles that are multiples of t and j, whatever their scaling, so q[t] . k[j] has the
    angle of t - j alone, and a window counts t - j too. Beginning again at 0 would change nothing within a document.

    Raises Refused when seq or cache exceed the positions the configuration allows, and for a cache with document_end.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        backend: ModuleType,
        batch: int,
        seq: int,
        dtype: str = "float32",
        train: bool = True,
        loss_rows: int | None = None,
        cache: int = 0,
        w: Any = None,
        recompute: bool = False,
        z_loss: float = 0.0,
        document_end: int | None = None,
    ) -> None:
        if dtype not in backend.dtypes:
            raise Refused(f"backend {backend.name} computes in {', '.join(backend.dtypes)}, not {dtype}")
        if max(seq, cache) > cfg.max_position_embeddings:
            raise Refused(
                f"{max(seq, cache)} positions asked of a model with max_position_embeddings = "
                f"{cfg.max_position_embeddings}; use a smaller --seq-length"
            )
        if cache and document_end is not None:
            raise Refused(
                "a key/value cache continues one document per sequence: document_end does not go with it"
            )
        self.cfg, self.be, self.dtype, self.train, self.recompute = cfg, backend, dtype, train, recompute
        self.batch, self.seq, self.z_loss, self.document_end = batch, seq, z_loss, document_end
        self.layout = Layout(cfg)
        plan = plan_buffers(
            cfg, backend, batch, seq, loss_rows,
            dtype=dtype, train=train, recompute=recompute, cache=cache, own_weights=w is None,
            documents=document_end is not None,
        )  # fmt: skip
        self.loss_rows = plan.loss_rows
        self.buffers = Buffers(backend, plan.specs(cfg))
        self.w = self.buffers["w"] if w is None else w
        held = (
            self.layout if w is None or hasattr(w, "dtype") else w
        )  # or what has views of its own: int8.Int8Weights
        self.p = held.views(self.w)
        if train:
            self.g = self.buffers["g"]
            self.d = self.layout.views(self.g)
        self._logits = self.buffers["logits"]  # may have columns from V on: 0, and so is their gradient
        columns = self._logits.shape[1]
        self._head = held.head_rows(self.w, columns)
        if train:
            self._dhead = self.layout.head_rows(self.g, columns)
        self.total = self.buffers["total"]  # sum of losses since it was last set to 0
        self._cache = [
            (self.buffers[f"{i}.keys"], self.buffers[f"{i}.values"])
            for i in range(cfg.num_layers if cache else 0)
        ]
        self.cos, self.sin = self.buffers["cos"], self.buffers["sin"]
        self._angles = rope_tables(cfg, max(seq, cache))
        for table, values in zip((self.cos, self.sin), self._angles, strict=True):
            backend.from_host(table, values)
        self._views: dict[tuple[int, int], tuple[list[Any], Any]] = {}
        self.tokens_trained = 0  # targets that went through micro_step
        self._warm: set[tuple[int, int, float]] = set()  # shapes and scales that were computed once
        self._passes: dict[tuple[int, int, float], Callable[[], None]] = {}

    def _at(self, batch: int, seq: int) -> tuple[list[Any], Any]:
        """Block and scratch buffers shaped for a batch, which may be smaller than they were made for."""
        if (batch, seq) not in self._views:
            if batch > self.batch or seq > self.seq:
                raise ValueError(f"batch {batch} x {seq} does not fit buffers of {self.batch} x {self.seq}")
            have = self.buffers.arrays

            def view(shapes: Shapes, prefix: str = "") -> Any:
                flat = {k: have[prefix + k if prefix + k in have else k].reshape(-1) for k in shapes}
                return SimpleNamespace(**{k: flat[k][: prod(s)].reshape(s) for k, s in shapes.items()})

            inner = block_buffers(self.cfg, batch, seq)
            blocks = [view(inner, f"{i}.") for i in range(self.cfg.num_layers)]
            scratch = view(scratch_buffers(self.cfg, batch, seq, self.train))
            scratch.ids, scratch.targets = (have[k][: batch * seq] for k in ("ids", "targets"))
            scratch.doc_start = None
            if self.document_end is not None:
                scratch.doc_start = have["doc_start"][: batch * seq].reshape(batch, seq)
            self._views[batch, seq] = blocks, scratch
        return self._views[batch, seq]

    def _in_vocabulary(self, ids: np.ndarray, lowest: int | None) -> None:
        if ids.max() >= self.cfg.vocab_size or (lowest is not None and ids.min() < lowest):
            raise ValueError(f"ids {ids.min()} to {ids.max()} with a vocabulary of {self.cfg.vocab_size}")

    def _heads(self, x: Any) -> tuple[Any, Any, Any]:
        """Query, key and value parts of rows of heads, each (B,T,heads,D)."""
        c = self.cfg
        x = x.reshape(self.b, self.t, -1, c.head_dim)
        kv = c.num_heads + c.num_kv_heads
        return x[:, :, : c.num_heads], x[:, :, c.num_heads : kv], x[:, :, kv:]

    def _head_norms(self, w: Any, qk: Any, qkv: Any, rstd: Any) -> list[tuple[Any, Any, Any, Any]]:
        """(weight, normalised, raw, rstd) of the query heads and of the key heads."""
        c = self.cfg
        raw = qkv.reshape(self.b * self.t, -1, c.head_dim)
        q, k = slice(0, c.num_heads), slice(c.num_heads, c.num_heads + c.num_kv_heads)
        return [(w_, qk[:, s], raw[:, s], rstd[:, s]) for w_, s in ((w.q_norm, q), (w.k_norm, k))]

    def forward(self, ids: np.ndarray, tap: Tap = no_tap, past: int = 0, row: int = 0, slot: int = 0) -> None:
        """From ids (B,T), integers in [0,V), to final_norm (B*T,C), kept in the scratch buffers.

        past: positions already in the key/value cache; needs a model made with cache > 0. The B sequences lie in its
        rows from `row` on, their position 0 in its slot `slot`. Raises ValueError for ids outside the vocabulary:
        kernels do not check where they read.
        """
        self._put_ids(ids)
        self._forward(tap, CachePosition(past, row, slot))

    def step(self, ids: np.ndarray, positions: np.ndarray, slots: int) -> None:
        """One more token of each of B sequences whose lengths differ: ids (B,), positions (B,) each token's own.

        The token of every sequence goes into slot number `slots` of its row, so that the sequences end together:
        sequence b fills the slots from slots - positions[b] on. Raises ValueError for ids outside the vocabulary.
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
        """Copy the first `slots` slots of a row of the key/value cache to another row."""
        for pair in self._cache:
            for cache in pair:
                self.be.copy(cache[to, :slots], cache[source, :slots])

    def _put_ids(self, ids: np.ndarray) -> None:
        self._in_vocabulary(ids, lowest=0)
        self.b, self.t = ids.shape
        s = self._at(self.b, self.t)[1]
        self.be.from_host(s.ids, ids.reshape(-1))
        if self.document_end is not None:
            self.be.from_host(s.doc_start, document_starts(ids, self.document_end))

    def _forward(self, tap: Tap, at: CachePosition = CachePosition()) -> None:
        be, c, p = self.be, self.cfg, self.p
        blocks, s = self._at(self.b, self.t)
        be.embedding_fwd(blocks[0].res1, s.ids, p.embed)
        res, delta = blocks[0].res1, None
        for i in range(c.num_layers):
            res, delta = self._block(i, res, delta, tap, at)
        be.add_rmsnorm_fwd(s.res, s.final_norm, s.rstd, res, delta, p.final_norm, c.rms_norm_eps)
        tap(None, f"hidden.{c.num_layers}", s.res)
        tap(None, "final_norm", s.final_norm)

    def _block(
        self, i: int, res: Any, delta: Any, tap: Tap, at: CachePosition = CachePosition()
    ) -> tuple[Any, Any]:
        """Block i on the residual stream res + delta; returns the two parts of the next one."""
        be, c, w = self.be, self.cfg, self.p.layer[i]
        blocks, s = self._at(self.b, self.t)
        a = blocks[i]
        be.add_rmsnorm_fwd(a.res1, a.norm1, a.rstd1, res, delta, w.attn_norm, c.rms_norm_eps)
        tap(None, f"hidden.{i}", a.res1)
        tap(i, "norm1", a.norm1)
        be.linear_fwd(a.qkv, a.norm1, w.wqkv, w.bqkv if c.qkv_bias else None)
        tap(i, "qkv", a.qkv)
        turned = a.qkv
        if c.qk_norm:
            for weight, y, x, rstd in self._head_norms(w, a.qk, a.qkv, a.qk_rstd):
                be.head_rmsnorm_fwd(y, rstd, x, weight, c.rms_norm_eps)
            tap(i, "qk", a.qk)
            turned = a.qk
        self._rope(turned, at, +1)
        q, k, _ = self._heads(turned)
        tap(i, "q_rope", q)
        tap(i, "k_rope", k)
        v = self._heads(a.qkv)[2]
        if self._cache:
            k, v = self._remember(i, k, v, at)
        doc_start = s.doc_start if at.doc_start is None else at.doc_start
        be.attention_fwd(a.att.reshape(q.shape), a.lse, q, k, v, doc_start, c.sliding_window)
        tap(i, "lse", a.lse)
        tap(i, "att", a.att)
        be.linear_fwd(s.delta, a.att, w.wo, None)
        tap(i, "att_out", s.delta)
        be.add_rmsnorm_fwd(a.res2, a.norm2, a.rstd2, a.res1, s.delta, w.mlp_norm, c.rms_norm_eps)
        tap(i, "res2", a.res2)
        tap(i, "norm2", a.norm2)
        be.linear_fwd(a.gu, a.norm2, w.wgu, None)
        tap(i, "gu", a.gu)
        be.swiglu_fwd(a.act, a.gu)
        tap(i, "act", a.act)
        be.linear_fwd(s.delta, a.act, w.wdown, None)
        tap(i, "mlp_out", s.delta)
        return a.res2, s.delta

    def _rope(self, x: Any, at: CachePosition, sign: int) -> None:
        """Turn the query and key heads that rows of heads begin with."""
        c, steps = self.cfg, slice(at.past, at.past + self.t)
        cos, sin, shape = self.cos[steps], self.sin[steps], (self.b, self.t, -1, c.head_dim)
        if at.cos is not None:  # each sequence's token by its own angles, as if all were of one sequence
            cos, sin, shape = at.cos, at.sin, (1, self.b, -1, c.head_dim)
        self.be.rope(x.reshape(shape)[:, :, : c.num_heads + c.num_kv_heads], cos, sin, sign)

    def _remember(self, layer: int, k: Any, v: Any, at: CachePosition) -> tuple[Any, Any]:
        """Put keys and values of the new positions into the cache; all positions so far."""
        rows, new = slice(at.row, at.row + self.b), at.slot + at.past
        for cache, x in zip(self._cache[layer], (k, v), strict=True):
            self.be.copy(cache[rows, new : new + self.t], x)
        keys, values = (cache[rows, at.slot : new + self.t] for cache in self._cache[layer])
        return keys, values

    def loss(self, targets: np.ndarray, scale: float | None = None, tap: Tap = no_tap) -> None:
        """Add the losses of targets (B,T) to self.total, in nats; negative targets are left out.

        With a scale, also start the backward pass of scale * sum of losses: the gradient of the head
        is added and that of final_norm kept. Goes through the rows in pieces of loss_rows; with
        more than one piece the taps are named logits.FIRST_ROW.
        """
        self._put_targets(targets)
        self._loss(scale, tap)

    def _put_targets(self, targets: np.ndarray) -> None:
        self._in_vocabulary(targets, lowest=None)
        self.be.from_host(self._at(self.b, self.t)[1].targets, targets.reshape(-1))

    def _loss(self, scale: float | None, tap: Tap = no_tap) -> None:
        be, s = self.be, self._at(self.b, self.t)[1]
        n = self.b * self.t
        for first in range(0, n, self.loss_rows):
            rows = slice(first, min(n, first + self.loss_rows))
            suffix = "" if n <= self.loss_rows else f".{first}"
            whole = self._logits[: rows.stop - first]
            logits = whole[:, : self.cfg.vocab_size]
            be.linear_fwd(whole, s.final_norm[rows], self._head, None)
            tap(None, "logits" + suffix, logits)
            be.cross_entropy(s.loss[rows], logits, s.targets[rows], scale, self.z_loss)
            tap(None, "loss_rows" + suffix, s.loss[rows])
            if scale is not None:
                tap(None, "d_logits" + suffix, logits)
                be.linear_bwd(s.dnorm[rows], self._dhead, None, whole, s.final_norm[rows], self._head)
        be.add_sum(self.total, s.loss)

    def last_logits(self) -> np.ndarray:
        """Logits of the last position of each sequence of the latest forward, on the host, (B,V)."""
        s = self._at(self.b, self.t)[1]
        logits = self._logits[: self.b]
        self.be.linear_fwd(logits, s.final_norm[self.t - 1 :: self.t], self._head, None)
        return self.be.to_host(logits[:, : self.cfg.vocab_size])

    def micro_step(self, ids: np.ndarray, targets: np.ndarray, scale: float, graph: bool = True) -> None:
        """forward, loss and backward of one micro-batch, as one launch where the device can.

        The first call for a shape and scale runs op by op, the second is recorded, later ones replay
        the record. The values are the same, bit for bit.
        """
        self._put_ids(ids)
        self._put_targets(targets)
        key = (self.b, self.t, scale)

        def op_by_op() -> None:
            self._forward(no_tap)
            self._loss(scale)
            self.backward()

        if not graph:
            op_by_op()
        elif key in self._passes:
            self._passes[key]()
        elif key in self._warm:
            if len(self._passes) >= MAX_GRAPHS:  # scales that never come back would fill the memory
                self._passes.clear()
            self._passes[key] = self.be.capture(op_by_op)
            self._passes[key]()
        else:
            self._warm.add(key)
            op_by_op()
        self.tokens_trained += int(np.count_nonzero(targets >= 0))

    def tune(self, targets_per_batch: int) -> None:
        """Let the backend find its fastest products for full batches. Sets gradients and total to 0."""
        ids = (
            np.arange(self.batch * self.seq, dtype=np.int32).reshape(self.batch, self.seq)
            % self.cfg.vocab_size
        )
        self.be.tune(lambda: self.micro_step(ids, ids, 1 / targets_per_batch, graph=False))
        self.be.fill(self.g, 0)
        self.be.fill(self.total, 0)

    def backward(self, tap: Tap = no_tap, ready: Callable[[int | None], None] = lambda layer: None) -> None:
        """Add the gradients of all parameters but the head, after forward and loss(scale=...).

        ready(layer) is called when a layer's gradients are complete, ready(None) at the end.
        """
        be, c, p, d = self.be, self.cfg, self.p, self.d
        blocks, s = self._at(self.b, self.t)
        tap(None, "d_final_norm", s.dnorm)
        be.fill(s.dres, 0)
        be.add_rmsnorm_bwd(s.dres, d.final_norm, s.dnorm, s.res, s.rstd, p.final_norm)
        tap(None, f"d_hidden.{c.num_layers}", s.dres)
        for i in reversed(range(c.num_layers)):
            w, g, a = p.layer[i], d.layer[i], blocks[i]
            if self.recompute and i + 1 < c.num_layers:  # the last block's values are still there
                self._block(i, a.res1, None, no_tap)
            be.linear_bwd(s.dact, g.wdown, None, s.dres, a.act, w.wdown)
            tap(i, "d_act", s.dact)
            be.swiglu_bwd(s.dgu, s.dact, a.gu)
            tap(i, "d_gu", s.dgu)
            be.linear_bwd(s.dnorm, g.wgu, None, s.dgu, a.norm2, w.wgu)
            tap(i, "d_norm2", s.dnorm)
            be.add_rmsnorm_bwd(s.dres, g.mlp_norm, s.dnorm, a.res2, a.rstd2, w.mlp_norm)
            tap(i, "d_res2", s.dres)
            be.linear_bwd(s.datt, g.wo, None, s.dres, a.att, w.wo)
            tap(i, "d_att", s.datt)
            q, k, v = self._heads(a.qkv)
            dq, dk, dv = self._heads(s.dqkv)
            if c.qk_norm:
                q, k, _ = self._heads(a.qk)
                dq, dk, _ = self._heads(s.dqk)
            y, dy = a.att.reshape(q.shape), s.datt.reshape(q.shape)
            be.attention_bwd(dq, dk, dv, dy, y, a.lse, q, k, v, s.doc_start, c.sliding_window)
            tap(i, "d_q_rope", dq)
            tap(i, "d_k_rope", dk)
            tap(i, "d_v", dv)
            self._rope(s.dqk if c.qk_norm else s.dqkv, CachePosition(), -1)
            if c.qk_norm:
                tap(i, "d_qk", s.dqk)
                norms = zip(
                    self._head_norms(w, a.qk, a.qkv, a.qk_rstd),
                    self._head_norms(g, s.dqk, s.dqkv, a.qk_rstd),
                    strict=True,
                )
                for (weight, _, x, rstd), (dweight, dyn, dx, _) in norms:
                    be.head_rmsnorm_bwd(dx, dweight, dyn, x, rstd, weight)
            tap(i, "d_qkv", s.dqkv)
            be.linear_bwd(s.dnorm, g.wqkv, g.bqkv if c.qkv_bias else None, s.dqkv, a.norm1, w.wqkv)
            tap(i, "d_norm1", s.dnorm)
            be.add_rmsnorm_bwd(s.dres, g.attn_norm, s.dnorm, a.res1, a.rstd1, w.attn_norm)
            tap(None, f"d_hidden.{i}", s.dres)
            ready(i)
        be.embedding_bwd(d.embed, s.dres, s.ids)
        ready(None)
