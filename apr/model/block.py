"""One block on a batch, forward and backward: attention, then the MLP, each a branch of the residual stream.

The residual stream between two branches is a pair, res + delta, so that its sum is one op with the norm that follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .adapters import Adapters
from .config import ModelConfig
from .spec import LayerSpec


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


START = CachePosition()


@dataclass
class Block:
    """One block of a model on a batch (B,T), N = B*T tokens.

    be      backend                        layer   parts of the block, the `index`-th
    w       weights, by parameter name     batch   (B,T)
    adapters  of the weights, or None
    a       activations of this block      s       buffers shared by all blocks
    tables  cos and sin of the angles      cache   keys and values (rows,slots,K,D), or None
    tap     called as tap(name, array)     adds   gradients of matrices are added to; otherwise they begin here
    act_again  act is not kept: backward computes it again

    Where a branch has no norm before it, its `norm` buffer is the residual stream itself; where it has none behind, its
    `out` buffer is delta.
    """

    be: ModuleType
    c: ModelConfig
    index: int
    layer: LayerSpec
    w: Any
    adapters: Adapters | None
    a: Any
    s: Any
    batch: tuple[int, int]
    tables: tuple[Any, Any]
    cache: tuple[Any, Any] | None
    tap: Callable[[str, Any], None]
    adds: bool = True
    act_again: bool = False

    def forward(self, res: Any, delta: Any, at: CachePosition) -> tuple[Any, Any]:
        """Run the block on the residual stream res + delta; returns the two parts of the next one."""
        be, c, layer, w, a, s = self.be, self.c, self.layer, self.w, self.a, self.s
        if layer.attn_norm:
            be.add_rmsnorm_fwd(a.res1, a.norm1, a.rstd1, res, delta, w.attn_norm, c.rms_norm_eps)
        elif delta is not None:
            be.add(a.res1, res, delta)
        self.tap("hidden", a.res1)
        if layer.attn_norm:
            self.tap("norm1", a.norm1)
        self._attention(at)
        self._linear(a.att_out, a.att, "wo")
        self.tap("att_out", a.att_out)
        if layer.attn_post_norm:
            self.post_norm(a.att_out, a.post_rstd1, w.attn_post_norm)
            self.tap("post1", s.delta)
        if layer.mlp_norm:
            be.add_rmsnorm_fwd(a.res2, a.norm2, a.rstd2, a.res1, s.delta, w.mlp_norm, c.rms_norm_eps)
        else:
            be.add(a.res2, a.res1, s.delta)
        self.tap("res2", a.res2)
        if layer.mlp_norm:
            self.tap("norm2", a.norm2)
        self._linear(a.gu, a.norm2, "wgu")
        self.tap("gu", a.gu)
        be.swiglu_fwd(a.act, a.gu)
        self.tap("act", a.act)
        self._linear(a.mlp_out, a.act, "wdown")
        self.tap("mlp_out", a.mlp_out)
        if layer.mlp_post_norm:
            self.post_norm(a.mlp_out, a.post_rstd2, w.mlp_post_norm)
            self.tap("post2", s.delta)
        return a.res2, s.delta

    def _attention(self, at: CachePosition) -> None:
        """att = attention of norm1, its heads side by side."""
        be, layer, w, a = self.be, self.layer, self.w, self.a
        self._linear(a.qkv, a.norm1, "wqkv", w.bqkv if layer.qkv_bias else None)
        self.tap("qkv", a.qkv)
        qk = a.qkv
        if layer.qk_norm:
            self.norm_heads()
            self.tap("qk", a.qk)
            qk = a.qk
        if layer.rope:
            self._rope(qk, at, +1)
        q, k, _ = self._heads(qk)
        self.tap("q_rope", q)
        self.tap("k_rope", k)
        v = self._heads(a.qkv)[2]
        if self.cache is not None:
            k, v = self._remember(k, v, at)
        doc_start = self.s.doc_start if at.doc_start is None else at.doc_start
        be.attention_fwd(a.att.reshape(q.shape), a.lse, q, k, v, doc_start, layer.window)
        self.tap("lse", a.lse)
        self.tap("att", a.att)

    def norm_heads(self) -> None:
        """qk = queries and keys of qkv, normalised."""
        for weight, y, x, rstd in self._qk_norms(self.w, self.a.qk, self.a.qkv):
            self.be.head_rmsnorm_fwd(y, rstd, x, weight, self.c.rms_norm_eps)

    def backward(self, g: Any) -> None:
        """Compute the gradients of the block's parameters in g, and those of its input in dres.

        They are added to what is there; in a pass that begins the gradients, those of matrices take its place."""
        be, layer, w, a, s = self.be, self.layer, self.w, self.a, self.s
        dout = s.dres
        if layer.mlp_post_norm:
            dout = self._post_norm_bwd(g.mlp_post_norm, a.mlp_out, a.post_rstd2, w.mlp_post_norm)
            self.tap("d_mlp_out", dout)
        dgu = self._down_bwd_again(g, dout) if self.act_again else self._down_bwd(g, dout)
        self.tap("d_gu", dgu)
        self._linear_bwd(s.dnorm, g, dgu, a.norm2, "wgu")
        self.tap("d_norm2", s.dnorm)
        if layer.mlp_norm:
            be.add_rmsnorm_bwd(s.dres, g.mlp_norm, s.dnorm, a.res2, a.rstd2, w.mlp_norm)
        else:
            be.add(s.dres, s.dres, s.dnorm)
        self.tap("d_res2", s.dres)
        dout = s.dres
        if layer.attn_post_norm:
            dout = self._post_norm_bwd(g.attn_post_norm, a.att_out, a.post_rstd1, w.attn_post_norm)
            self.tap("d_att_out", dout)
        self._linear_bwd(s.datt, g, dout, a.att, "wo")
        self.tap("d_att", s.datt)
        self._attention_bwd(g)
        if layer.attn_norm:
            be.add_rmsnorm_bwd(s.dres, g.attn_norm, s.dnorm, a.res1, a.rstd1, w.attn_norm)
        else:
            be.add(s.dres, s.dres, s.dnorm)
        self.tap("d_hidden", s.dres)

    def _down_bwd(self, g: Any, dout: Any) -> Any:
        """Compute the gradients of the down product's weights, and return that of gu."""
        a, s = self.a, self.s
        self._linear_bwd(s.dact, g, dout, a.act, "wdown")
        self.tap("d_act", s.dact)
        self.be.swiglu_bwd(s.dgu, s.dact, a.gu)
        return s.dgu

    def _down_bwd_again(self, g: Any, dout: Any) -> Any:
        """Do the same with the act that a pass over gu computes beside the gradient, which takes the place of gu."""
        be, a, s = self.be, self.a, self.s
        be.linear_bwd(s.dact, None, None, dout, a.act, self.matrix("wdown"), self.adds)
        if self.adapters:
            self.adapters.add_to_input(self.index, "wdown", s.dact, dout)
        self.tap("d_act", s.dact)
        be.swiglu_again(a.act, a.gu, s.dact)
        if g.wdown is not None:
            be.gemm(g.wdown, dout, a.act, 1.0, float(self.adds), True, False)
        if self.adapters:
            self.adapters.add_gradients(self.index, "wdown", dout, a.act)
        return a.gu

    def _attention_bwd(self, g: Any) -> None:
        """dnorm from datt."""
        be, layer, w, a, s = self.be, self.layer, self.w, self.a, self.s
        q, k, v = self._heads(a.qkv)
        dq, dk, dv = self._heads(s.dqkv)
        if layer.qk_norm:
            q, k, _ = self._heads(a.qk)
            dq, dk, _ = self._heads(s.dqk)
        y, dy = a.att.reshape(q.shape), s.datt.reshape(q.shape)
        be.attention_bwd(dq, dk, dv, dy, y, a.lse, q, k, v, s.doc_start, layer.window)
        self.tap("d_q_rope", dq)
        self.tap("d_k_rope", dk)
        self.tap("d_v", dv)
        if layer.rope:
            self._rope(s.dqk if layer.qk_norm else s.dqkv, START, -1)
        if layer.qk_norm:
            self.tap("d_qk", s.dqk)
            norms, gradients = self._qk_norms(w, a.qk, a.qkv), self._qk_norms(g, s.dqk, s.dqkv)
            for (weight, _, x, rstd), (dweight, dy, dx, _) in zip(norms, gradients, strict=True):
                be.head_rmsnorm_bwd(dx, dweight, dy, x, rstd, weight)
        self.tap("d_qkv", s.dqkv)
        self._linear_bwd(s.dnorm, g, s.dqkv, a.norm1, "wqkv", g.bqkv if layer.qkv_bias else None)
        self.tap("d_norm1", s.dnorm)

    def matrix(self, name: str) -> Any:
        """The matrix of a linear map."""
        return self.adapters.effective(self.index, name) if self.adapters else getattr(self.w, name)

    def is_made(self, name: str) -> bool:
        """Tell if `matrix` makes that matrix, from W and adapters or from 8-bit integers."""
        return self.adapters is not None and self.adapters.makes(self.index, name)

    def _linear(self, y: Any, x: Any, name: str, bias: Any = None) -> None:
        """y = x w^T + bias"""
        self.be.linear_fwd(y, x, self.matrix(name), bias)
        if self.adapters:
            self.adapters.add_beside(self.index, name, y, x)

    def _linear_bwd(self, dx: Any, g: Any, dy: Any, x: Any, name: str, db: Any = None) -> None:
        """dx = dy w, and the gradients of the map's parameters or of its adapters"""
        self.be.linear_bwd(dx, getattr(g, name), db, dy, x, self.matrix(name), self.adds)
        if self.adapters:
            self.adapters.add_to_input(self.index, name, dx, dy)
            self.adapters.add_gradients(self.index, name, dy, x)

    def post_norm(self, x: Any, rstd: Any, weight: Any) -> None:
        """delta = RMSNorm of what a branch gives: head_rmsnorm with one head of width C."""
        n, width = x.shape
        shape = (n, 1, width)
        y = self.s.delta.reshape(shape)
        self.be.head_rmsnorm_fwd(y, rstd, x.reshape(shape), weight, self.c.rms_norm_eps)

    def _post_norm_bwd(self, dweight: Any, x: Any, rstd: Any, weight: Any) -> Any:
        """dnorm = gradient of what a branch gives, from dres; returns dnorm."""
        n, width = x.shape
        dx, dy, x = (y.reshape((n, 1, width)) for y in (self.s.dnorm, self.s.dres, x))
        self.be.head_rmsnorm_bwd(dx, dweight, dy, x, rstd, weight)
        return self.s.dnorm

    def _heads(self, x: Any) -> tuple[Any, Any, Any]:
        """Query, key and value parts of rows of heads, each (B,T,heads,D)."""
        c = self.c
        x = x.reshape(*self.batch, -1, c.head_dim)
        kv = c.num_heads + c.num_kv_heads
        return x[:, :, : c.num_heads], x[:, :, c.num_heads : kv], x[:, :, kv:]

    def _qk_norms(self, w: Any, qk: Any, qkv: Any) -> list[tuple[Any, Any, Any, Any]]:
        """(weight, normalised, raw, rstd) of q and of k: of each head (N,heads,D), or of all heads (N,1,heads*D)."""
        c, n, rstd = self.c, qkv.shape[0], self.a.qk_rstd
        parts = slice(0, c.num_heads), slice(c.num_heads, c.num_heads + c.num_kv_heads)
        if self.layer.qk_norm == "head":
            y, x = (z.reshape(n, -1, c.head_dim) for z in (qk, qkv))
            return [
                (u, y[:, p], x[:, p], rstd[:, p]) for u, p in zip((w.q_norm, w.k_norm), parts, strict=True)
            ]
        y, x = (z.reshape(n, 1, -1) for z in (qk, qkv))
        wide = [slice(p.start * c.head_dim, p.stop * c.head_dim) for p in parts]
        return [
            (u, y[:, :, p], x[:, :, p], rstd[:, i : i + 1])
            for i, (u, p) in enumerate(zip((w.q_norm, w.k_norm), wide, strict=True))
        ]

    def _rope(self, x: Any, at: CachePosition, sign: int) -> None:
        """Turn the query and key heads that rows of heads begin with."""
        c, (b, t) = self.c, self.batch
        cos, sin = (table[at.past : at.past + t] for table in self.tables)
        shape = (b, t, -1, c.head_dim)
        if at.cos is not None:
            # each sequence's token by its own angles, as if all were of one sequence
            cos, sin, shape = at.cos, at.sin, (1, b, -1, c.head_dim)
        self.be.rope(x.reshape(shape)[:, :, : c.num_heads + c.num_kv_heads], cos, sin, sign)

    def _remember(self, k: Any, v: Any, at: CachePosition) -> tuple[Any, Any]:
        """Put keys and values of the new positions into the KV cache; returns those of all positions so far."""
        assert self.cache is not None
        b, t = self.batch
        rows, new = slice(at.row, at.row + b), at.slot + at.past
        for cache, x in zip(self.cache, (k, v), strict=True):
            self.be.copy(cache[rows, new : new + t], x)
        keys, values = (cache[rows, at.slot : new + t] for cache in self.cache)
        return keys, values
