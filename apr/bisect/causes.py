"""Causes of a wrong array, in words: the op is computed again in float64 under each plausible fault.

A fault is a row of CAUSES: the ops and outputs it can spoil, the words, and what the output would be. To add one, add
a row; test_causes.py asks for a planted example of each. explain.py searches them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ..backends import reference
from ..backends.contract import BF16

Array = Any  # numpy.ndarray, float64
SUMS = "dw db dres total"  # outputs that are added to


class WrongCall(SimpleNamespace):
    """A call of an op: its arguments as attributes, with op, output, got, want and before (of the output).

    Called with changed arguments, it is the output that the reference gives for them, or the one named by `of`.
    """

    def __call__(self, of: str = "", **changes: Any) -> Array:
        args = {
            n: np.array(x) if isinstance(x, np.ndarray) else x for n, x in {**self.args, **changes}.items()
        }
        getattr(reference, self.op)(**args)
        return args[of or self.output]


class Cause(NamedTuple):
    """A row. fault: what the output would be, NaN where the fault does not say; or that, and values for the {} of
    the words; or None or False where the fault cannot be."""

    ops: str
    outputs: str
    words: str
    fault: Callable[..., Any]  # of a WrongCall

    def applies(self, op: str, output: str) -> bool:
        """Return True when this fault can spoil an output of an op."""
        return all(w == "*" or x in w.split() for w, x in ((self.ops, op), (self.outputs, output)))


# Parts of faults


def _blank(x: Array, *index: Any) -> Array:
    x = np.array(x)
    x[index] = np.nan
    return x


def _moved(x: Array, by: int) -> Array:
    return _blank(np.roll(x, by, 0), slice(None, by) if by > 0 else slice(by, None))


def _halves(x: Array, axis: int = -1) -> Array:
    return None if x.shape[axis] % 2 else np.roll(x, x.shape[axis] // 2, axis)


def _apart(n: int) -> list[int]:  # from pairs (2i, 2i + 1) to halves
    return [*range(0, n, 2), *range(1, n, 2)]


def _round(x: Array, kind: str) -> Array:
    if kind == "bfloat16":
        return x.astype(BF16).astype(x.dtype)
    half = 0 if "cut" in kind else 0x1000  # of the last of the 10 bits that stay
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32) + np.uint32(half)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(x.dtype)


def _rounded_inputs(a: WrongCall, kind: str, names: str) -> Array:
    return a(**{n: _round(a.args[n], kind) for n in names.split()})


def _is_rounded(a: WrongCall, kind: str) -> Any:
    unit = 2.0**-8 if kind == "bfloat16" else 2.0**-11
    close = np.abs(a.got - a.want) <= 1.01 * unit * np.maximum(np.abs(a.want), 2.0**-14)  # float16's smallest
    return np.array_equal(_round(a.got, kind), a.got) and bool(close.all()) and a.got


def least_squares(got: Array, x: Array) -> Any:
    return (got * x).sum() / (x * x).sum()


def _scaled(a: WrongCall, base: Array = 0.0) -> Any:
    c = least_squares(a.got - base, a.want - base)
    if a.got.size < 4 or not abs(c) > 1e-4:
        return None
    known = {f: v for n in a.want.shape[::-1] if n > 1 for f, v in _lengths(n)}
    text = next((f" = {f}" for f, v in known.items() if abs(c / v - 1) < 1e-3), "")
    return base + c * (a.want - base), f"{c:.4g}{text}"


def _lengths(n: int) -> list[tuple[str, float]]:
    return [(f"{n}", n), (f"1/{n}", 1 / n), (f"sqrt({n})", n**0.5), (f"1/sqrt({n})", n**-0.5)]


def _transposed(x: Array) -> Array:
    return x.ndim == 2 and min(x.shape) > 1 and x.T.reshape(x.shape)


def _untransposed(x: Array) -> Array:
    return x.ndim == 2 and min(x.shape) > 1 and x.reshape(x.shape[::-1]).T


def _constant(a: WrongCall) -> Any:
    n = a.want.ndim > 1 and len(a.want) > 3
    return n and a.want + (a.got - a.want).mean(0)


def _reordered_heads(a: WrongCall) -> Any:
    if a.want.ndim < 3 or a.output == "lse":
        return None
    g, w = (np.moveaxis(x, -2, 0).reshape(x.shape[-2], -1) for x in (a.got, a.want))
    order = ((w * w).sum(1) - 2 * g @ w.T).argmin(1)
    return a.want[..., order, :], ", ".join(map(str, order))


def _only(a: WrongCall, tokens: slice) -> Array:
    names = ("dx", "dres", "dy", "x", "res", "rstd", "ids")
    return a(**{n: a.args[n][tokens] for n in names if n in a.args})


def _bias_of_other_columns(a: WrongCall) -> Any:
    plain = a(b=None)
    d, b = (a.got - plain).mean(0), np.zeros_like(a.b)
    b[np.argsort(d)] = np.sort(a.b)
    return len(a.x) > 2 and bool(np.all(np.abs(d - b) <= 1e-2 * np.abs(a.b).max())) and plain + b


def _whole_tiles(a: WrongCall, tile: int) -> Any:
    return len(a.dy) >= tile and _only(a, slice(0, len(a.dy) // tile * tile))


def _sum_stops(a: WrongCall, tile: int) -> Array:
    n = a.x.shape[1] // tile * tile
    return n and a(x=a.x[:, :n], w=a.w[:, :n])


def _norm_input(a: WrongCall) -> Array:
    if a.op == "head_rmsnorm_fwd":
        return a.x
    return a.res_in if a.delta is None else a.res_in + a.delta


def _norm(a: WrongCall, x: Array, rstd: Array) -> Array:
    return rstd if a.output == "rstd" else x * rstd[..., None] * a.w


def _centred(a: WrongCall) -> Array:
    x = _norm_input(a)
    x = x - x.mean(-1, keepdims=True)
    return _norm(a, x, 1 / np.sqrt((x * x).mean(-1) + a.eps))


def _eps(a: WrongCall) -> Any:
    x = _norm_input(a)
    square = (x * x).mean(-1)
    rstd = a.got if a.output == "rstd" else a(of="rstd") * (a.got * a.want).sum(-1) / (a.want**2).sum(-1)
    weight = square**-2.0  # how well a row tells
    eps = (weight * (rstd**-2.0 - square)).sum() / weight.sum()
    return rstd.size > 1 and eps > 0 and (a(eps=eps), eps, a.eps)


def _norm_gradient(a: WrongCall, projection: float) -> Array:
    x, base = (a.x, 0) if a.op == "head_rmsnorm_bwd" else (a.res, a.dres)
    xhat, g = x * a.rstd[..., None], a.dy * a.w
    return base + a.rstd[..., None] * (g - projection * xhat * (g * xhat).mean(-1, keepdims=True))


def _complex(x: Array) -> Array:
    h = x.shape[-1] // 2
    return x[..., :h] + 1j * x[..., h:]


def _turned(a: WrongCall, z: Array, x: Array | None = None) -> Array:
    return a(x=a.x if x is None else x, cos=z.real, sin=z.imag)


def _step(a: WrongCall) -> tuple[Array, Array]:  # the table as numbers of length 1, and the turn per position
    z = a.cos + 1j * a.sin
    return z, (z[1] / z[0]) / np.abs(z[1] / z[0])


def _run_on(a: WrongCall) -> Any:
    z, step = _step(a)
    n = len(z)
    return len(a.x) > 1 and np.concatenate(
        [_turned(a, z * step ** (n * b), a.x[b : b + 1]) for b in range(len(a.x))]
    )


def _frequencies(a: WrongCall) -> tuple[Array, Array, Array]:  # of got and of the table; the positions
    z, step = _step(a)
    turn = (_complex(a.got) * _complex(a.x).conj()).sum((0, 2))
    got, want, t = 0.0, np.angle(step), 1
    while t < len(z):  # twice as exact each time
        got, t = got + np.angle(turn[t] / turn[0] * np.exp(-1j * t * got)) / t, 2 * t
    first = np.round(np.angle(z[0, -1]) / want[-1])  # the slowest pair has not gone round
    return a.sign * got, want, first + np.arange(len(z))


def _theta(a: WrongCall) -> Any:
    got, want, positions = _frequencies(a)
    d = np.arange(len(want)) / len(want)
    theta, true = (np.exp(-least_squares(np.log(f) * f, d * f)) for f in (got, want))
    return len(d) > 1 and (
        _turned(a, np.abs(_step(a)[0]) * np.exp(1j * positions[:, None] * theta**-d)),
        theta,
        true,
    )


def _stretched(a: WrongCall) -> Any:
    got, want, positions = _frequencies(a)
    by = least_squares(got, want)
    return _turned(a, np.abs(_step(a)[0]) * np.exp(1j * positions[:, None] * want * by)), by


def _neighbours(a: WrongCall) -> Array:
    order = _apart(a.x.shape[-1])
    y = np.empty_like(a.x)
    y[..., order] = a(x=a.x[..., order])
    return y


def _half(a: WrongCall, first: bool) -> Array:
    return np.where((np.arange(a.x.shape[-1]) < a.x.shape[-1] // 2) == first, a.want, a.x)


def _sin_scaled(a: WrongCall) -> Any:
    straight = a(sin=0 * a.sin)
    f = least_squares(a.got - straight, a.want - straight)
    return straight + f * (a.want - straight), f


def _sees(i: Array, j: Array, w: int) -> Array:
    return (j <= i) & ((j > i - w) if w else True)


def _attention(
    a: WrongCall,
    sees: Callable[[Array, Array, int], Array] = _sees,
    scale: Callable[[int, int], float] = lambda h, d: d**-0.5,
    heads: Callable[[Array, int, int], Array] = lambda h, n, kv: h // (n // kv),
    ds: Callable[[int], float] | None = None,
    delta: float = 1.0,
    shared: Callable[[Array], Array] = lambda h: h >= 0,
    saved: bool = False,
    borders: Callable[[Array, Array], Array] | None = None,
) -> Any:
    """Attention and its gradients as in reference.py, with the faults that arguments cannot express.

    sees: how often query position i sees key position j, NaN: unknown. scale: of the scores, for H and D. ds: of ds,
    for D. heads: key/value head of query head h of n. shared: which query heads, counted within their group, add to
    dk and dv. saved: p from the saved lse, as kernels take it. borders: what doc_start is taken for, given the positions of
    the queries.
    """
    (_, t, n, d), (_, s, kv, _) = a.q.shape, a.k.shape
    i, j, h = np.arange(t)[:, None] + s - t, np.arange(s)[None], np.arange(n)
    at, forward = heads(h, n, kv), a.op == "attention_fwd"
    count = np.broadcast_to(sees(i, j, a.window), (t, s)).astype(np.float64)
    if sees is not _sees and np.array_equal(count, _sees(i, j, a.window)):
        return None  # no fault at this window and these positions
    if not forward:
        count = np.where(np.isnan(count), _sees(i, j, a.window), count)
    if a.doc_start is not None:
        doc_start = borders(a.doc_start, i[:, 0]) if borders else a.doc_start
        count = np.where(j >= doc_start[:, None, :, None], count, 0)
    if borders and (a.doc_start is None or np.array_equal(doc_start, a.doc_start)):
        return None
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (a.q, a.k[:, :, at], a.v[:, :, at]))
    z = q @ k.swapaxes(2, 3) * scale(n, d) + np.log(count)
    m = z.max(-1, keepdims=True)
    lse = m + np.log(np.exp(z - m).sum(-1, keepdims=True))
    p = np.exp(z - (a.lse[..., None] if saved else lse))
    if forward:
        return lse[..., 0] if a.output == "lse" else (p @ v).transpose(0, 2, 1, 3)
    p, dy = np.nan_to_num(p), a.dy.transpose(0, 2, 1, 3)
    dot = (a.dy * a.y).sum(-1).transpose(0, 2, 1)[..., None]
    grad = p * (dy @ v.swapaxes(2, 3) - delta * dot) * (ds(d) if ds else scale(n, d))
    if a.output == "dq":
        return (grad @ k).transpose(0, 2, 1, 3)
    part = grad.swapaxes(2, 3) @ q if a.output == "dk" else p.swapaxes(2, 3) @ dy
    adds = (at[:, None] == np.arange(kv)) * shared(h % (n // kv))[:, None]
    return np.einsum("bhsd,hk->bskd", part, adds)


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def _gated(act: Callable[[Array], Array]) -> Callable[[WrongCall], Array]:
    def fault(a: WrongCall) -> Array:
        gate, up = np.split(a.gu, 2, -1)
        return act(gate) * up

    return fault


def _gate_gradient(slope: Callable[[Array, Array], Array]) -> Callable[[WrongCall], Array]:
    def fault(a: WrongCall) -> Array:  # slope: of the gate g, with s = sigmoid(g)
        gate, up = np.split(a.gu, 2, -1)
        wrong = a.dy * up * slope(gate, 1 / (1 + np.exp(-gate)))
        return np.concatenate([wrong, a.want[..., a.dy.shape[-1] :]], -1)

    return fault


def _once(a: WrongCall, order: slice) -> Array:
    dw = a.dw.copy()
    dw[a.ids[order]] += a.dy[order]  # NumPy keeps the last of equal ids
    return dw


def _one_hot(a: WrongCall, targets: Array) -> Array:
    return (np.arange(a.logits.shape[1]) == targets[:, None]).astype(np.float64)


def _ids(a: WrongCall, by: int) -> Array:
    return np.where(a.targets < 0, a.targets, (a.targets + by) % a.logits.shape[1])


def _first_columns(a: WrongCall, n: int) -> Any:
    v = a.logits.shape[1]
    return 0 < n < v and (a(logits=np.where(np.arange(v) < n, a.logits, -np.inf)), n, v)


def _whole_columns(a: WrongCall, tile: int) -> Any:
    return _first_columns(a, a.logits.shape[1] // tile * tile)


def _columns_used(a: WrongCall) -> Any:
    used = np.flatnonzero(a.got.any(0))
    return used.size and _first_columns(a, int(used[-1]) + 1)


def _lse(a: WrongCall) -> Array:
    return np.logaddexp.reduce(a.logits, -1)


def _stepped(a: WrongCall, divisor: Callable[[Array, Array, float], Array]) -> Array:
    """AdamW's master with another divisor, a function of vhat, v and eps."""
    v = a(of="v")
    mhat, vhat = a(of="m") / (1 - a.beta1**a.step), v / (1 - a.beta2**a.step)
    return a.master - a.lr * (mhat / divisor(vhat, v, a.eps) + a.decay * a.master)


def _decay(a: WrongCall) -> Any:
    decay = a.decay + least_squares(a.want - a.got, a.lr * a.master)
    return a.got.size > 3 and (a(decay=decay), decay, a.decay)


def _rate(a: WrongCall) -> Any:
    found = _scaled(a, a.master)
    return found and (*found, a.lr * least_squares(a.got - a.master, a.want - a.master), a.lr)


def _bits(a: WrongCall, kind: Any, read: Any) -> Any:
    x = a.want.astype(kind).view(np.uint16).view(read).astype(np.float64)
    same = np.isclose(a.got, x, 1e-2, 0, equal_nan=True)
    return bool(same.all() and a.got.any()) and np.where(np.isfinite(x), x, np.nan)


def _other(a: WrongCall) -> Any:
    for name, x in a.others.items():
        if x.size == a.got.size and np.allclose(x.reshape(a.got.shape), a.got, 1e-2, 1e-6):
            return np.asarray(x, np.float64).reshape(a.got.shape), name
    return None


# The table

FWD, BWD, NORM = "attention_fwd", "attention_bwd", "add_rmsnorm_fwd head_rmsnorm_fwd"
NORM_BWD, CE, UPDATE = "add_rmsnorm_bwd head_rmsnorm_bwd", "cross_entropy", "w master"
MASKS: list[tuple[str, Callable[[Array, Array, int], Array]]] = [
    ("no causal mask: every key is seen", lambda i, j, w: (j > i - w) if w else j >= 0),
    (
        "mask off by one: sees the next token",
        lambda i, j, w: np.where(i + 1 < j.size, _sees(i + 1, j, w and w + 1), np.nan),
    ),
    ("mask off by one: hides the token itself", lambda i, j, w: _sees(i, j, w) & (j < i)),
    ("keys one position late, the first counted twice", lambda i, j, w: 1.0 * (j < i) + (j == 0)),
    ("window ignored", lambda i, j, w: j <= i),
    ("window one too wide", lambda i, j, w: _sees(i, j, w and w + 1)),
    ("window one too narrow", lambda i, j, w: _sees(i, j, w - 1) if w > 1 else _sees(i, j, w)),
    ("cached positions ignored: query t sees keys up to t", lambda i, j, w: _sees(i - i[0, 0], j, w)),
]
HEADS: list[tuple[str, Callable[[Array, int, int], Array]]] = [
    ("query head h reads key/value head h % K, not h // (H/K)", lambda h, n, kv: h % kv),
    ("every query head reads key/value head 0", lambda h, n, kv: 0 * h),
]
BORDERS: list[tuple[str, Callable[[Array, Array], Array]]] = [
    ("document mask missing: tokens of other documents are seen", lambda doc_start, i: 0 * doc_start),
    (
        "document border off by one: the token before the document is seen",
        lambda doc_start, i: np.maximum(doc_start - 1, 0),
    ),
    (
        "document border off by one: its first token is hidden",
        lambda doc_start, i: np.minimum(doc_start + 1, i),
    ),
]
SCALES: list[tuple[str, Callable[[int, int], float]]] = [
    ("scores not scaled by 1/sqrt(D)", lambda h, d: 1.0),
    ("scores scaled by 1/D, not 1/sqrt(D)", lambda h, d: 1 / d),
    ("scores scaled by 1/sqrt(H D), not 1/sqrt(D)", lambda h, d: (h * d) ** -0.5),
]
SUM_OPS = "linear_bwd add_rmsnorm_bwd head_rmsnorm_bwd embedding_bwd"
TOKENS = [
    ("only the first token counted", slice(0, 1)),
    ("only the last token counted", slice(-1, None)),
    ("the first token not counted", slice(1, None)),
    ("the last token not counted", slice(None, -1)),
]
ROUNDINGS = ("bfloat16", "float16 or TF32", "TF32, cut off")


def _attention_causes() -> Iterator[Cause]:
    for op, outputs, saved in ((FWD, "y lse", False), (BWD, "dq dk dv", False), (BWD, "dq dk dv", True)):
        for words, sees in MASKS:
            yield Cause(op, outputs, words, partial(_attention, sees=sees, saved=saved))
        for words, borders in BORDERS:
            yield Cause(op, outputs, words, partial(_attention, borders=borders, saved=saved))
        for words, heads in HEADS:
            yield Cause(op, outputs, words, partial(_attention, heads=heads, saved=saved))
        for words, scale in SCALES:
            yield Cause(op, outputs, words, partial(_attention, scale=scale, saved=saved))


def _rounding_causes() -> Iterator[Cause]:
    for kind in ROUNDINGS:
        words = f"inputs rounded to {kind} before the product"
        yield Cause("linear_fwd", "y", words, partial(_rounded_inputs, kind=kind, names="x w"))
        yield Cause("linear_bwd", "dx dw", words, partial(_rounded_inputs, kind=kind, names="dy x w"))
        if "cut" not in kind:
            yield Cause("*", "*", f"rounded to {kind}", partial(_is_rounded, kind=kind))


def _token_causes() -> Iterator[Cause]:
    for words, tokens in TOKENS:
        yield Cause(SUM_OPS, "dw db", words, partial(_only, tokens=tokens))
    for tile in (128, 64, 32, 16, 8, 4):
        rest = f"without the remainder of a tile of {tile}"
        yield Cause(SUM_OPS, "dw db", f"sum over tokens {rest}", partial(_whole_tiles, tile=tile))
        yield Cause("linear_fwd", "y", f"sum over inputs {rest}", partial(_sum_stops, tile=tile))
        yield Cause(
            CE, "loss", f"softmax over the first columns only, {rest}", partial(_whole_columns, tile=tile)
        )


C = Cause
# fmt: off
CAUSES: list[Cause] = [
    C("parameter", "*", "bfloat16 bits read as float16", lambda a: _bits(a, BF16, np.float16)),
    C("parameter", "*", "float16 bits read as bfloat16", lambda a: _bits(a, np.float16, BF16)),
    C("parameter", "*", "holds {}: two tensors swapped, or an offset", _other),
    C("parameter", "*", "the halves of its rows are swapped", lambda a: _halves(a.want, 0)),
    C("embedding_fwd", "y", "ids shifted: a row is that of the token before", lambda a: _moved(a.want, 1)),
    C("embedding_fwd", "y", "ids shifted: a row is that of the token after", lambda a: _moved(a.want, -1)),
    C("embedding_fwd", "y", "table off by one: row id + 1", lambda a: a(w=_moved(a.w, -1))),
    C("embedding_fwd", "y", "table off by one: row id - 1", lambda a: a(w=_moved(a.w, 1))),
    C("embedding_bwd", "dw", "repeated ids counted once", lambda a: _once(a, slice(None))),
    C("embedding_bwd", "dw", "repeated ids counted once", lambda a: _once(a, slice(None, None, -1))),
    C("embedding_bwd", "dw", "table off by one: row id + 1", lambda a: a.dw + _moved(a.want - a.dw, 1)),
    C("embedding_bwd", "dw", "table off by one: row id - 1", lambda a: a.dw + _moved(a.want - a.dw, -1)),
    C("embedding_bwd", "dw", "ids shifted by one token", lambda a: a(ids=np.roll(a.ids, 1))),
    C("embedding_bwd", "dw", "ids shifted by one token", lambda a: a(ids=np.roll(a.ids, -1))),
    C("linear_fwd", "y", "bias missing: the difference is the bias, for every token", lambda a: a(b=None)),
    C("linear_fwd", "y", "bias added twice", lambda a: a(b=2 * a.b)),
    C("linear_fwd", "y", "bias subtracted instead of added", lambda a: a(b=-a.b)),
    C("linear_fwd", "y", "bias of other columns (of another segment?)", _bias_of_other_columns),
    C("linear_fwd", "y", "weight transposed", lambda a: a(w=a.w.T)),
    C("linear_bwd", "dx", "weight transposed", lambda a: a(w=a.w.T)),
    C("linear_bwd", "dw", "gradient transposed", lambda a: a.dw + (a.want - a.dw).T),
    C("linear_bwd", "db dw", "mean over tokens instead of sum", lambda a: a.before + (a.want - a.before) / len(a.dy)),
    C(NORM, "y rstd", "eps ignored", lambda a: a(eps=0.0)),
    C(NORM, "y rstd", "eps added outside the root",
      lambda a: _norm(a, x := _norm_input(a), 1 / (np.sqrt((x * x).mean(-1)) + a.eps))),
    C(NORM, "y rstd", "mean subtracted: LayerNorm, not RMSNorm", _centred),
    C(NORM, "y", "weight ignored", lambda a: a(w=np.ones_like(a.w))),
    C(NORM, "y", "weighted by 1 + w, not w", lambda a: a(w=1 + a.w)),
    C(NORM, "y", "not normalised: weighted only", lambda a: _norm_input(a) * a.w),
    C(NORM, "y", "not normalised: it is the input", _norm_input),
    C("add_rmsnorm_fwd", "res y rstd", "delta not added", lambda a: a(delta=None)),
    C("add_rmsnorm_fwd", "res y rstd", "delta added twice", lambda a: a(delta=2 * a.delta)),
    C("add_rmsnorm_fwd", "res y rstd", "delta subtracted", lambda a: a(delta=-a.delta)),
    C("add_rmsnorm_fwd", "res y rstd", "residual lost: delta alone", lambda a: a(res_in=0 * a.res_in)),
    C("add_rmsnorm_fwd", "res", "res holds the normalised values", lambda a: a(of="y")),
    C("head_rmsnorm_fwd", "y rstd", "normalised over all heads at once",
      lambda a: _norm(a, a.x, np.broadcast_to(((a.x**2).mean((-2, -1)) + a.eps)[:, None] ** -0.5, a.rstd.shape))),
    C(NORM, "y rstd", "eps looks like {:.2g}, not {:.2g}", _eps),
    C(NORM_BWD, "dres dx", "projection term missing", lambda a: _norm_gradient(a, 0.0)),
    C(NORM_BWD, "dres dx", "projection summed, not averaged", lambda a: _norm_gradient(a, a.w.size)),
    C(NORM_BWD, "dres dx", "weight ignored", lambda a: a(w=np.ones_like(a.w))),
    C(NORM_BWD, "dres dx", "weighted by 1 + w, not w", lambda a: a(w=1 + a.w)),
    C(NORM_BWD, "dw", "rstd left out: gradient of the raw input", lambda a: a(rstd=np.ones_like(a.rstd))),
    C(NORM_BWD, "dw", "multiplied by the weight", lambda a: a.dw + (a.want - a.dw) * a.w),
    C("head_rmsnorm_bwd", "dw", "only the first head counted",
      lambda a: a(dx=a.dx[:, :1], dy=a.dy[:, :1], x=a.x[:, :1], rstd=a.rstd[:, :1])),
    C("rope", "x", "not applied", lambda a: a.x),
    C("rope", "x", "turned the other way (sign)", lambda a: a(sign=-a.sign)),
    C("rope", "x", "pairs neighbours (2i, 2i+1), not halves (i, i + D/2)", _neighbours),
    C("rope", "x", "positions one too high", lambda a: _turned(a, (s := _step(a))[0] * s[1])),
    C("rope", "x", "positions one too low", lambda a: _turned(a, (s := _step(a))[0] / s[1])),
    C("rope", "x", "every position turned as the first", lambda a: a(cos=a.cos[:1], sin=a.sin[:1])),
    C("rope", "x", "positions run on from one sequence to the next", _run_on),
    C("rope", "x", "only the first half written", lambda a: _half(a, True)),
    C("rope", "x", "only the second half written", lambda a: _half(a, False)),
    C("rope", "x", "positions counted {:.4g} times (scaled?)", _stretched),
    C("rope", "x", "frequencies look like theta {:.3g}, not {:.3g}", _theta),
    C("rope", "x", "sin scaled by {:.5g}", _sin_scaled),
    *_attention_causes(),
    C(FWD, "y lse", "keys and values swapped", lambda a: a(k=a.v, v=a.k)),
    C(FWD, "y", "keys read where values belong", lambda a: a(v=a.k)),
    C(FWD, "lse", "base 2 instead of natural", lambda a: a.want / np.log(2)),
    C(FWD, "lse", "sum of exp without its log", lambda a: np.exp(a.want)),
    C(BWD, "dq dk", "scale 1/sqrt(D) missing in ds", lambda a: _attention(a, ds=lambda d: 1.0)),
    C(BWD, "dq dk", "scale 1/sqrt(D) applied twice", lambda a: _attention(a, ds=lambda d: 1 / d)),
    C(BWD, "dq dk", "delta term sum(dy * y) missing", lambda a: _attention(a, delta=0.0)),
    C(BWD, "dk dv", "not summed over shared query heads: only the first of each group",
      lambda a: _attention(a, shared=lambda h: h == 0)),
    C(BWD, "dk dv", "not summed over shared query heads: only the last of each group",
      lambda a: _attention(a, shared=lambda h: h == h.max())),
    C(BWD, "dk dv", "mean over shared query heads, not sum", lambda a: a.want * a.k.shape[2] / a.q.shape[2]),
    C("swiglu_fwd", "y", "gate and up swapped", lambda a: a(gu=_halves(a.gu))),
    C("swiglu_fwd", "y", "gate and up interleaved, not halves", lambda a: a(gu=a.gu[:, _apart(a.gu.shape[1])])),
    C("swiglu_fwd", "y", "tanh-gelu instead of silu", _gated(_gelu)),
    C("swiglu_fwd", "y", "sigmoid(1.702 x) instead of silu", _gated(lambda g: _silu(1.702 * g) / 1.702)),
    C("swiglu_fwd", "y", "relu instead of silu", _gated(lambda g: np.maximum(g, 0))),
    C("swiglu_fwd", "y", "sigmoid instead of silu", _gated(lambda g: 1 / (1 + np.exp(-g)))),
    C("swiglu_fwd", "y", "no activation: gate * up", _gated(lambda g: g)),
    C("swiglu_fwd", "y", "up ignored: silu(gate) alone", lambda a: _silu(np.split(a.gu, 2, -1)[0])),
    C("swiglu_bwd", "dgu", "gate and up swapped", lambda a: _halves(a(gu=_halves(a.gu)))),
    C("swiglu_bwd", "dgu", "gradients of gate and up swapped", lambda a: _halves(a.want)),
    C("swiglu_bwd", "dgu", "silu derivative missing: only its sigmoid", _gate_gradient(lambda g, s: s)),
    C("swiglu_bwd", "dgu", "silu derivative missing", _gate_gradient(lambda g, s: 1.0)),
    C("swiglu_bwd", "dgu", "silu itself in place of its derivative", _gate_gradient(lambda g, s: g * s)),
    C("swiglu_bwd", "dgu", "derivative of sigmoid, not silu", _gate_gradient(lambda g, s: s * (1 - s))),
    C(CE, "loss logits", "ignored targets counted", lambda a: a(targets=np.maximum(a.targets, 0))),
    C(CE, "loss logits", "ignored targets counted", lambda a: a(targets=a.targets % a.logits.shape[1])),
    C(CE, "logits", "rows of ignored targets not zeroed",
      lambda a: a(targets=(t := np.maximum(a.targets, 0))) + a.scale * (a.targets < 0)[:, None] * _one_hot(a, t)),
    C(CE, "loss logits", "targets shifted by one row", lambda a: _blank(a(targets=np.roll(a.targets, 1)), 0)),
    C(CE, "loss logits", "targets shifted by one row", lambda a: _blank(a(targets=np.roll(a.targets, -1)), -1)),
    C(CE, "loss logits", "target ids one too high", lambda a: a(targets=_ids(a, 1))),
    C(CE, "loss logits", "target ids one too low", lambda a: a(targets=_ids(a, -1))),
    C(CE, "loss", "log of base 2", lambda a: a.want / np.log(2)),
    C(CE, "loss", "probability in place of its logarithm", lambda a: np.where(a.targets < 0, 0, np.exp(-a.want))),
    C(CE, "loss", "loss multiplied by scale", lambda a: a.want * a.scale),
    C(CE, "loss", "z-loss counted in the loss", lambda a: a.want + (a.targets >= 0) * a.z_loss * _lse(a) ** 2),
    C(CE, "logits", "gradient not scaled: summed, not averaged", lambda a: a(scale=1.0)),
    C(CE, "logits", "one-hot not subtracted", lambda a: a.want + a.scale * _one_hot(a, a.targets)),
    C(CE, "logits", "z-loss left out", lambda a: a(z_loss=0.0)),
    C(CE, "logits", "z-loss without its factor 2", lambda a: a(z_loss=a.z_loss / 2)),
    C(CE, "logits", "softmax over the first {} of {} columns only", _columns_used),
    C("adamw", UPDATE, "bias correction missing", lambda a: a(step=10**9)),
    C("adamw", UPDATE, "step not counted: always 1", lambda a: a(step=1)),
    C("adamw", UPDATE, "step one too low", lambda a: a.step > 1 and a(step=a.step - 1)),
    C("adamw", UPDATE, "step one too high", lambda a: a(step=a.step + 1)),
    C("adamw", UPDATE + " m v", "factor ignored: gradient not clipped", lambda a: a(factor=np.ones(1))),
    C("adamw", UPDATE + " m v", "beta1 and beta2 swapped", lambda a: a(beta1=a.beta2, beta2=a.beta1)),
    C("adamw", UPDATE, "weight decay missing", lambda a: a(decay=0.0)),
    C("adamw", UPDATE + " m v", "decay in the gradient (L2), not decoupled",
      lambda a: a(g=a.g + a.decay * a.master / a.factor, decay=0.0)),
    C("adamw", UPDATE, "eps inside the root", lambda a: _stepped(a, lambda vhat, v, eps: np.sqrt(vhat + eps))),
    C("adamw", UPDATE, "eps added before the bias correction",
      lambda a: _stepped(a, lambda vhat, v, eps: (np.sqrt(v) + eps) * np.sqrt(vhat / v))),
    C("adamw", UPDATE, "eps ignored", lambda a: a(eps=0.0)),
    C("adamw", UPDATE, "update has the wrong sign", lambda a: 2 * a.master - a.want),
    C("adamw", UPDATE, "weight decay looks like {:.3g}, not {:.3g}", _decay),
    C("adamw", UPDATE, "the update is {} times the right one: lr {:.3g}, not {:.3g}?", _rate),
    C("adamw", "m", "gradient not weighted by 1 - beta1", lambda a: a.beta1 * a.m + a.factor * a.g),
    C("adamw", "v", "gradient not weighted by 1 - beta2", lambda a: a.beta2 * a.v + (a.factor * a.g) ** 2),
    C("adamw", "v", "of the gradient, not of its square", lambda a: a.beta2 * a.v + (1 - a.beta2) * a.factor * a.g),
    C("clip_factor", "factor", "clipping skipped: 1", lambda a: np.ones(1)),
    C("clip_factor", "factor", "norm squared: the root is missing", lambda a: np.minimum(1, a.max_norm / a.sum_sq)),
    C("clip_factor", "factor", "not limited to 1", lambda a: a.max_norm / (np.sqrt(a.sum_sq) + 1e-6)),
    C("add_sum_sq", "total", "not squared: a sum of the values", lambda a: a.total + a.x.sum()),
    C("add_sum_sq", "total", "the norm, not its square, is added", lambda a: a.total + np.sqrt((a.x**2).sum())),
    C("add_sum", "total", "squared: a sum of squares", lambda a: a.total + (a.x**2).sum()),
    C("add_sum add_sum_sq", "total", "mean instead of sum", lambda a: a.total + (a.want - a.total) / a.x.size),
    *_token_causes(),
    *_rounding_causes(),
    C("*", SUMS, "overwritten instead of added to", lambda a: a.want - a.before),
    C("*", SUMS, "gradient missing: nothing was added", lambda a: a.before),
    C("*", SUMS, "added twice", lambda a: 2 * a.want - a.before),
    C("*", SUMS, "subtracted instead of added", lambda a: 2 * a.before - a.want),
    C("*", SUMS, "what is added is {} times the right value", lambda a: _scaled(a, a.before)),
    C("*", "*", "all zeros: never filled, or cleared", lambda a: not a.got.any() and a.got),
    C("*", "*", "unchanged: it holds what it held before the call", lambda a: a.before),
    C("*", "*", "sign flipped", lambda a: -a.want),
    C("*", "*", "{} times the right values", _scaled),
    C("*", "*", "transposed", lambda a: _transposed(a.want)),
    C("*", "*", "transposed", lambda a: _untransposed(a.want)),
    C("*", "*", "the halves of the last axis are swapped", lambda a: _halves(a.want)),
    C("*", "*", "shifted by a row", lambda a: len(a.want) > 2 and _moved(a.want, 1)),
    C("*", "*", "shifted by a row", lambda a: len(a.want) > 2 and _moved(a.want, -1)),
    C("*", "*", "heads in another order: {}", _reordered_heads),
    C("*", "*", "the same is added to every row (a bias?)", _constant),
]
# fmt: on
