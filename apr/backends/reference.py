"""The reference backend: every op in plain NumPy, any float dtype, no tricks. The specification.

The contract of an op, here and in every other backend; dtype and axes of each argument stand in contract.py:
1. Outputs come first and are written in place; an op allocates nothing that outlives it.
2. Parameter gradients (dw, db) and running sums (total) are ADDED TO, unless an op is told that dw
   begins there (linear_bwd without `adds`); activation gradients are
   overwritten; the one exception is dres, the gradient of the residual stream, which is only ever
   added to.
3. Arrays carry the dtype; there are no device, stream or dtype arguments. Where weights and activations
   are bfloat16, sums are float32, and so are rstd, lse, loss, cos, sin, moments and gradients of
   parameters. total, factor and sum_sq are float64 always.
4. Letters: B sequences, T positions, N = B*T tokens, C model width, H query heads, K key/value
   heads, D head width, F MLP width, V vocabulary, I inputs and O outputs of a linear map.
   The last axis of every array is contiguous; a gradient "da" has the shape of "a".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..common.errors import DeviceError
from ..common.host import available_memory, cpu_name
from . import philox

Array = Any  # an array of this backend: numpy.ndarray here

name, dtypes = "reference", ("float64", "float32")
pad_vocab = False  # products are much faster with a vocabulary that is padded to a multiple of 64
loss_elements = 1 << 23  # of logits held at once: enough work for a product, little memory
asynchronous = False  # calls return before they are done
act_again = False  # swiglu_again costs so little time that it is worth the memory that it saves, whether or not a job needs it
square_tiles = dict.fromkeys(dtypes, (1 << 14,) * 2)  # of a norm: gradients, new weights, in a term
_allocated = [0]


# Plumbing


def empty(shape: int | tuple[int, ...], dtype: Any) -> Array:
    """A new zero-filled array; its bytes count in memory()."""
    x = np.zeros(shape, dtype)
    _allocated[0] += x.nbytes
    return x


def from_host(x: Array, host: np.ndarray) -> None:
    """x = host, rounded to the dtype of x. Shapes must be equal."""
    _same_shape(x, host)
    x[...] = host


def to_host(x: Array) -> np.ndarray:
    """A copy on the host, same dtype."""
    return np.array(x)


def read_later(numbers: tuple[Array, ...]) -> Callable[[], list[float]]:
    """A function that waits for, and gives, the values of float64 arrays behind what was asked for so far, all in one list."""
    return [float(value) for x in numbers for value in x].copy


def decoder() -> Any:
    """Ops of a decode step that can be recorded (cuda/decode.py), or None."""


def fill(x: Array, value: float) -> None:
    """x = value everywhere."""
    x[...] = value


def copy(y: Array, x: Array) -> None:
    """y = x, rounded to the dtype of y. Shapes must be equal."""
    _same_shape(y, x)
    y[...] = x


def sync() -> None:
    """Wait until everything asked for so far is done (at once, here)."""


def memory() -> int:
    """Bytes handed out by empty() since the process started."""
    return _allocated[0]


def set_threads(n: int) -> None:
    """Use n CPU threads in later calls; the reference computes on the caller's thread."""


def set_device(index: int) -> None:
    """Compute on device number `index` from now on. Raises DeviceError when there is none."""
    if index != 0:
        raise DeviceError(f"backend reference has device 0 only, not {index}")


def describe() -> dict[str, str]:
    """Name the device and the versions of what computes, for the record of a run."""
    return {"backend": name, "cpu": cpu_name()}


def free_memory() -> int | None:
    """Bytes that empty() can still hand out; None where the system does not say."""
    return available_memory()


def overhead() -> int:
    """Bytes that the backend itself takes, whatever the job: work space and what the driver keeps."""
    return 0


def tune(f: Callable[[], None]) -> None:
    """Find the fastest way to do what f does, by running it or not. What it writes is undefined afterwards."""


def capture(f: Callable[[], None]) -> Callable[[], None]:
    """A function that does what f does, on the same arrays, with as little work for the host as possible.
    f has run before, reads nothing that changes but arrays, and gives the host nothing."""
    return f


# Embedding and linear maps


def embedding_fwd(y: Array, ids: Array, w: Array) -> None:
    """y[n] = w[ids[n]].  y (N,C), ids (N,) integers in [0,V), w (V,C)"""
    y[...] = w[ids]


def embedding_bwd(dw: Array, dy: Array, ids: Array) -> None:
    """dw[ids[n]] += dy[n], in the order of n.  dw (V,C), dy (N,C), ids (N,)"""
    np.add.at(dw, ids, dy)


def linear_fwd(y: Array, x: Array, w: Array, b: Array | None) -> None:
    """y = x w^T + b.  y (N,O), x (N,I), w (O,I), b (O,) or None"""
    y[...] = x @ w.T if b is None else x @ w.T + b


def linear_bwd(
    dx: Array, dw: Array | None, db: Array | None, dy: Array, x: Array, w: Array, adds: bool
) -> None:
    """dx = dy w;  dw += dy^T x, or dw = dy^T x without reading dw where adds is False;  db += sum_n dy[n].

    Shapes as in linear_fwd; dw, db may be None."""
    dx[...] = dy @ w
    if dw is not None:
        if not adds:
            dw[...] = 0
        dw += dy.T @ x
    if db is not None:
        db += dy.sum(0)


def gemm(out: Array, a: Array, b: Array, alpha: float, beta: float, trans_a: bool, trans_b: bool) -> None:
    """out = alpha * op(a) op(b) + beta * out, with op(x) = x^T where the flag of x is set, else x.

    out (M,N), op(a) (M,K), op(b) (K,N). Where activations are bfloat16 out is float32, and a and b both are, or both bfloat16.
    out is not read where beta is 0.
    """
    num = out.dtype.type
    product = num(alpha) * ((a.T if trans_a else a) @ (b.T if trans_b else b))
    out[...] = product + num(beta) * out if beta else product


# Matrices under adapters


def adapted(out: Array, w: Array, b: Array | None, a: Array | None, factor: float) -> None:
    """out = w + factor * b a, summed wide and rounded once (Hu et al. 2022).  out, w (O,I), b (O,R), a (R,I), or both None"""
    out[...] = w if b is None else w + out.dtype.type(factor) * (b @ a)


def adapted_int8(out: Array, w: Array, row: Array, b: Array | None, a: Array | None, factor: float) -> None:
    """out = row * w + factor * b a: `adapted` of 8-bit integers, float32 products of equal bits everywhere.  row (O,)"""
    wide = row[:, None] * w.astype(row.dtype)
    out[...] = wide if b is None else wide + row.dtype.type(factor) * (b @ a)


def adapted_bwd_a(u: Array, da: Array, x: Array, du: Array, a: Array, factor: float) -> None:
    """u = x a^T, da += factor du^T x: what adapters y = factor (x a^T) b^T take from x.  u, du (N,R), x (N,I), a, da (R,I)"""
    u[...] = x @ a.T
    da += da.dtype.type(factor) * (du.T @ x)


def adapted_bwd_b(du: Array, db: Array, dy: Array, u: Array, b: Array, factor: float) -> None:
    """du = dy b, db += factor dy^T u: what they take from dy.  u, du (N,R), dy (N,O), b, db (O,R)"""
    du[...] = dy @ b
    db += db.dtype.type(factor) * (dy.T @ u)


# The residual stream


def add(out: Array, a: Array, b: Array) -> None:
    """out = a + b.  out, a, b (N,C); out may be a or b. The gradient of a and of b is that of out."""
    out[...] = a + b


# Dropout


def dropout(out: Array, x: Array, counters: Array, seed: int, module: int, p: float, factor: float) -> None:
    """out = factor / (1 - p) * x where an element is kept, 0 where it is not (Srivastava et al. 2014, section 10).

    Element e = t * C + c of sequence b is kept where word e % 4 of Philox4x32-10 (philox.py) with the key (seed, seed >> 32)
    and the counter (e // 4, module, *counters[b]) is at least p 2^32: of a share 1 - p. The gradient of x is the same op on
    that of out.  out, x (B,T,C), T C at most 2^34; counters (B,2); 0 <= p < 1, 0 <= module < 2^31. out may be x
    """
    is_kept = philox.kept(counters, x[0].size, seed, module, p).reshape(x.shape)
    out[...] = np.where(is_kept, x.dtype.type(factor / (1 - p)) * x, 0)


# Normalisation


def add_rmsnorm_fwd(
    res: Array, y: Array, rstd: Array, res_in: Array, delta: Array | None, w: Array, eps: float
) -> None:
    """Residual add and RMSNorm in one pass (Zhang and Sennrich 2019, eq. 4).

    res = res_in + delta;  rstd[n] = (mean_c res[n,c]^2 + eps)^(-1/2);  y = res * rstd * w
    res, y, res_in, delta (N,C), rstd (N,), w (C,). delta may be None; res may be res_in.
    """
    res[...] = res_in if delta is None else res_in + delta
    rstd[...] = 1 / np.sqrt((res * res).mean(-1) + eps)
    y[...] = res * rstd[..., None] * w


def add_rmsnorm_bwd(dres: Array, dw: Array | None, dy: Array, res: Array, rstd: Array, w: Array) -> None:
    """With xhat = res * rstd and g = dy * w:

    dres += rstd * (g - xhat * mean_c(g * xhat));  dw += sum_n dy * xhat;  dw may be None
    The gradient of res_in and of delta is dres.
    """
    xhat = res * rstd[..., None]
    g = dy * w
    if dw is not None:
        dw += (dy * xhat).sum(0)
    dres += rstd[..., None] * (g - xhat * (g * xhat).mean(-1, keepdims=True))


def head_rmsnorm_fwd(y: Array, rstd: Array, x: Array, w: Array, eps: float) -> None:
    """RMSNorm over each head (Qwen3's q/k norm).  y, x (N,heads,D), rstd (N,heads), w (D,)

    With one head, the norm over all heads of q or of k (OLMo 2): x (N,1,H*D), a part of wider rows.
    """
    rstd[...] = 1 / np.sqrt((x * x).mean(-1) + eps)
    y[...] = x * rstd[..., None] * w


def head_rmsnorm_bwd(dx: Array, dw: Array | None, dy: Array, x: Array, rstd: Array, w: Array) -> None:
    """dx = rstd * (g - xhat * mean_d(g * xhat)), g = dy * w, xhat = x * rstd;  dw += sum dy * xhat;  dw may be None"""
    xhat = x * rstd[..., None]
    g = dy * w
    if dw is not None:
        dw += (dy * xhat).sum((0, 1))
    dx[...] = rstd[..., None] * (g - xhat * (g * xhat).mean(-1, keepdims=True))


# Attention


def rope(x: Array, cos: Array, sin: Array, sign: int) -> None:
    """Turn each pair (x[d], x[d + D/2]) by sign * angle[t], in place (Su et al. 2021, eq. 34, with
    the halves split as in GPT-NeoX).  x (B,T,heads,D), cos, sin (T,D/2). sign is +1 forward, -1
    backward: the gradient of a rotation is the rotation back.
    """
    h = x.shape[-1] // 2
    a, b = x[..., :h].copy(), x[..., h:].copy()
    c, s = cos[:, None], sign * sin[:, None]
    x[..., :h] = a * c - b * s
    x[..., h:] = b * c + a * s


def attention_fwd(
    y: Array, lse: Array, q: Array, k: Array, v: Array, doc_start: Array | None, window: int
) -> None:
    """Causal softmax attention; query head h reads key/value head h // (H/K).

    y[t] = sum_j p[t,j] v[j],  p[t] = softmax_j(q[t] . k[j] / sqrt(D)) over the keys j that t sees:
    j <= t + S - T, with window > 0 also j > t + S - T - window, and with doc_start also j >= doc_start[b,t].
    lse[t] = log sum_j exp(q[t] . k[j] / sqrt(D))
    y, q (B,T,H,D), k, v (B,S,K,D) with S >= T (the last T of S positions ask), lse (B,H,T).
    doc_start (B,T) int32, where the document of query t begins, or None: 0 <= doc_start[b,t] <= t + S - T, so that
    every query sees itself, and doc_start[b,t] <= doc_start[b,t+1]
    """
    p, lse[...] = _probabilities(q, k, doc_start, window)
    y[...] = np.einsum("bhts,bshd->bthd", p, _per_query_head(v, q))


def attention_bwd(
    dq: Array, dk: Array, dv: Array, dy: Array, y: Array, lse: Array, q: Array, k: Array, v: Array,
    doc_start: Array | None, window: int,
) -> None:  # fmt: skip
    """Gradients of attention_fwd (Dao et al. 2022, appendix B.2): with p recomputed from q, k, lse,

    dp = dy v^T;  ds = p * (dp - sum_d dy*y) / sqrt(D);  dq = ds k;  dk = ds^T q;  dv = p^T dy,
    summed over the query heads that share a key/value head.
    """
    p, _ = _probabilities(q, k, doc_start, window)
    kq, vq, scale = _per_query_head(k, q), _per_query_head(v, q), q.dtype.type(q.shape[-1]) ** -0.5
    dp = np.einsum("bthd,bshd->bhts", dy, vq)
    ds = p * (dp - np.einsum("bthd,bthd->bht", dy, y)[..., None]) * scale
    dq[...] = np.einsum("bhts,bshd->bthd", ds, kq)
    b, s, kv, d = k.shape
    dk[...] = np.einsum("bhts,bthd->bshd", ds, q).reshape(b, s, kv, -1, d).sum(3)
    dv[...] = np.einsum("bhts,bthd->bshd", p, dy).reshape(b, s, kv, -1, d).sum(3)


def _per_query_head(x: Array, q: Array) -> Array:
    return np.repeat(x, q.shape[2] // x.shape[2], axis=2)


def _probabilities(q: Array, k: Array, doc_start: Array | None, window: int) -> tuple[Array, Array]:
    s = np.einsum("bthd,bshd->bhts", q, _per_query_head(k, q)) * q.dtype.type(q.shape[-1]) ** -0.5
    t, j = np.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], np.arange(k.shape[1])[None]
    seen = (j <= t) & ((j > t - window) if window else True)
    if doc_start is not None:
        seen = seen & (j >= doc_start[:, None, :, None])
    s = np.where(seen, s, -np.inf)
    m = s.max(-1, keepdims=True)
    lse = m + np.log(np.exp(s - m).sum(-1, keepdims=True))
    return np.exp(s - lse), lse[..., 0]


# MLP


def swiglu_fwd(y: Array, gu: Array) -> None:
    """y = silu(gate) * up, silu(x) = x / (1 + exp(-x)) (Shazeer 2020).  gu (N,2F) holds gate then up, y (N,F)"""
    g, u = np.split(gu, 2, -1)
    y[...] = g * _sigmoid(g) * u


def swiglu_bwd(dgu: Array, dy: Array, gu: Array) -> None:
    """d gate = dy * up * s * (1 + gate * (1 - s)), s = sigmoid(gate);  d up = dy * gate * s"""
    g, u = np.split(gu, 2, -1)
    s = _sigmoid(g)
    f = dy.shape[-1]
    dgu[:, :f], dgu[:, f:] = dy * u * s * (1 + g * (1 - s)), dy * g * s


def swiglu_again(y: Array, gu: Array, dy: Array) -> None:
    """y = silu(gate) * up once more, and gu = its gradient"""
    swiglu_fwd(y, gu)
    swiglu_bwd(gu, dy, gu)


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))  # never overflows
    return np.where(x >= 0, 1, e) / (1 + e)


# Loss


def cross_entropy(loss: Array, logits: Array, targets: Array, scale: float | None, z_loss: float) -> None:
    """loss[n] = lse[n] - logits[n, targets[n]], in nats, lse = logsumexp(logits[n]); 0 where the target is
    negative.

    If scale is a number, logits becomes the gradient of scale * sum_n (loss[n] + z_loss * lse[n]^2)
    (Chowdhery et al. 2022, section 5): scale * ((1 + 2 z_loss lse[n]) softmax(logits[n]) - onehot(targets[n])),
    0 where the target is negative. loss itself stays the cross-entropy.
    loss (N,), logits (N,V), targets (N,) integers below V; scale a number, or a (1,) float64 array that holds it
    """
    n, t = np.flatnonzero(targets >= 0), targets[targets >= 0]
    m = logits.max(-1, keepdims=True)
    lse = m + np.log(np.exp(logits - m).sum(-1, keepdims=True))
    loss[...] = 0
    loss[n] = lse[n, 0] - logits[n, t]
    if scale is None:
        return
    logits[...] = np.exp(logits - lse) * (1 + 2 * logits.dtype.type(z_loss) * lse)
    logits[n, t] -= 1
    logits[targets < 0] = 0
    logits *= logits.dtype.type(scale)


# Flat buffers


def add_sum(total: Array, x: Array) -> None:
    """total[0] += sum(x).  total (1,) float64, x of the dtype of the job, or float64 and in this order"""
    total += x.sum(dtype=total.dtype)


def add_sum_sq(total: Array, x: Array) -> None:
    """total[0] += sum(x^2).  total (1,) float64, x (n,); or total[r] += sum(x[r]^2), total (r,), x (r, n)"""
    total += np.square(x, dtype=np.result_type(x, total)).sum(-1, dtype=total.dtype)


def clip_factor(factor: Array, sum_sq: Array, max_norm: float) -> None:
    """factor[0] = min(1, max_norm / (sqrt(sum_sq[0]) + 1e-6)), as torch.nn.utils.clip_grad_norm_.

    factor, sum_sq (1,) float64. Not finite when sum_sq is not.
    """
    factor[...] = np.minimum(1, max_norm / (np.sqrt(sum_sq) + 1e-6)) + 0 * sum_sq


def adamw(
    w: Array, master: Array, m: Array, v: Array, square: Array, g: Array, factor: Array,
    lr: float, beta1: float, beta2: float, eps: float, decay: float, step: int,
) -> None:  # fmt: skip
    """One AdamW step (Loshchilov and Hutter 2019, algorithm 2; torch.optim.AdamW), step from 1.

    With g' = factor[0] * g:  m += (1 - beta1) (g' - m);  v += (1 - beta2) (g'^2 - v);
    master -= lr * (m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps) + decay * master);  w = master;
    square[0] += sum(master^2), of the new master
    w, master, m, v, g (n,), square, factor (1,) float64. master may be w itself; otherwise w is it, rounded.
    """
    num = master.dtype.type
    g = g * num(factor[0])
    m += num(1 - beta1) * (g - m)
    v += num(1 - beta2) * (g * g - v)
    mhat = m / num(1 - beta1**step)
    vhat = v / num(1 - beta2**step)
    master -= num(lr) * (mhat / (np.sqrt(vhat) + num(eps)) + num(decay) * master)
    w[...] = master
    add_sum_sq(square, master)


def _same_shape(y: Array, x: Array) -> None:
    if y.shape != x.shape:  # NumPy would broadcast
        raise ValueError(f"shapes differ: {y.shape} and {x.shape}")
