"""The likely cause of an error: each fault of the table, planted by other means, is named; noise is not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from apr.backends import reference
from apr.bisect import explain as explaining
from apr.bisect.causes import CAUSES
from apr.bisect.explain import explain, explain_parameter
from cases import BF16, CASES, WRITTEN, Row, make

SIZES: dict[str, dict[str, int]] = {
    "embedding": dict(N=23, C=6, V=9),
    "linear": dict(N=13, O=12, I=12),
    "add_rmsnorm": dict(N=13, C=11),
    "head_rmsnorm": dict(N=13, H=3, D=10, S=0, P=3, Q=3),
    "rope": dict(B=2, T=7, H=3, E=4, S=0, P=3),
    "attention": dict(B=2, T=6, H=4, K=2, D=5),
    "attention_window": dict(B=2, T=7, H=4, K=2, D=5, W=3),
    "attention_documents": dict(B=2, T=13, H=4, K=2, D=5, W=0),
    "attention_cache": dict(B=2, T=4, S=7, P=7, H=4, K=2, D=5, W=0),
    "swiglu": dict(N=9, F=8),
    "cross_entropy_z": dict(N=11, V=13),
    "add_sum": dict(N=31),
    "add_sum_sq": dict(N=31),
    "clip_factor": dict(N=1),
    "adamw_master": dict(N=40),
}
OTHERS: dict[str, dict[str, Any]] = {  # arguments that are not random
    "add_rmsnorm": dict(eps=0.03),
    "head_rmsnorm": dict(eps=0.03),
    "clip_factor": dict(sum_sq=np.array([0.16]), max_norm=0.3),
    "adamw_master": dict(eps=0.01, factor=np.array([0.6])),
}


class A(SimpleNamespace):
    """The arguments of a call; as a function, the output for changed ones."""

    def __call__(self, of: str = "", **changes: Any) -> Any:
        args = {
            k: np.array(v) if isinstance(v, np.ndarray) else v for k, v in {**self.args, **changes}.items()
        }
        getattr(reference, self.op)(**args)
        return args[of or self.output]


def table(positions: Any, theta: float, pairs: int = 4) -> dict[str, np.ndarray]:
    angle = np.asarray(positions, float)[:, None] * theta ** -(np.arange(pairs) / pairs)
    return dict(cos=np.cos(angle), sin=np.sin(angle))


def call(case: str, number: int, output: str, **changes: Any) -> A:
    """A call of a case of cases.py, by number, with the true result of one output as want."""
    row = Row(next(c for c in CASES if c.name == case), SIZES[case])
    have: dict[str, Any] = dict(make(row, np.float64))
    tables = table(range(7), 1e4) if case == "rope" else {}
    given = {**OTHERS.get(case, {}), **tables, **changes}
    for op, args in row.calls[: number + 1]:
        names = list(inspect.signature(getattr(reference, op)).parameters)
        values: dict[str, Any] = {}
        for name, arg in zip(names, args, strict=True):
            start = (
                have[arg.name] if arg.name in have else np.full(arg.shape, np.nan) if arg.axes else arg.value
            )
            values[name] = given.get(name, start)
        before = {k: np.array(v) if isinstance(v, np.ndarray) else v for k, v in values.items()}
        work = {k: np.array(v) if isinstance(v, np.ndarray) else v for k, v in values.items()}
        getattr(reference, op)(**work)
        have.update({a.name: work[n] for n, a in zip(names, args, strict=True) if a.role in WRITTEN})
    return A(
        **{
            **before,
            "args": before,
            "op": op,
            "output": output,
            "want": work[output],
            "before": before[output],
        }
    )


def attention(
    a: A,
    keys: Callable[[int, int, int], list[int]] = lambda t, n, w: list(
        range(max(0, t - w + 1) if w else 0, t + 1)
    ),
    head: Callable[[int, int, int], int] = lambda h, n, kv: h // (n // kv),
    scale: float = 5**-0.5,
    ds: float | None = None,
    delta: bool = True,
    adds: Callable[[int], bool] = lambda h: True,
    saved: bool = False,
    begin: Callable[[int, int], int] = lambda first, t: first,
) -> np.ndarray:
    """Attention with a loop over queries, with a fault."""
    (nb, nt, nh, _), (_, ns, kv, _) = a.q.shape, a.k.shape
    forward = a.op == "attention_fwd"
    out = {n: np.zeros_like(a.args[n]) for n in (("y", "lse") if forward else ("dq", "dk", "dv"))}
    for b, t, h in np.ndindex(nb, nt, nh):
        low = 0 if a.doc_start is None else begin(int(a.doc_start[b, t]), t + ns - nt)
        js, g = [j for j in keys(t + ns - nt, ns, a.window) if low <= j < ns], head(h, nh, kv)
        if not js:
            continue
        k, v, q = a.k[b, js, g], a.v[b, js, g], a.q[b, t, h]
        z = k @ q * scale
        lse = np.log(np.exp(z).sum())
        p = np.exp(z - (a.lse[b, h, t] if saved else lse))
        if forward:
            out["y"][b, t, h], out["lse"][b, h, t] = p @ v, lse
            continue
        dy = a.dy[b, t, h]
        s = p * (v @ dy - (dy @ a.y[b, t, h] if delta else 0)) * (scale if ds is None else ds)
        out["dq"][b, t, h] = s @ k
        if adds(h % (nh // kv)):
            np.add.at(out["dk"][b, :, g], js, np.outer(s, q))
            np.add.at(out["dv"][b, :, g], js, np.outer(p, dy))
    return out[a.output]


def rms(x: Any, eps: float = 0.0, axis: Any = -1) -> Any:
    return np.sqrt((x * x).mean(axis, keepdims=True) + eps)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def gates(a: A) -> Any:
    return np.split(a.gu, 2, -1)


def dgate(a: A, slope: Callable[[Any, Any], Any]) -> Any:
    g, u = gates(a)
    return np.concatenate([a.dy * u * slope(g, sigmoid(g)), a.dy * g * sigmoid(g)], -1)


def moments(a: A) -> Any:
    g = a.factor * a.g
    m, v = a.m + (1 - a.beta1) * (g - a.m), a.v + (1 - a.beta2) * (g * g - a.v)
    return m, v, m / (1 - a.beta1**a.step), v / (1 - a.beta2**a.step)


def stepped(a: A, divisor: Any) -> Any:
    return a.master - a.lr * (moments(a)[2] / divisor + a.decay * a.master)


def onehot(a: A, targets: Any) -> Any:
    return np.eye(a.logits.shape[1])[np.maximum(targets, 0)] * (targets >= 0)[:, None]


def neighbours(a: A) -> Any:
    z = a.x[..., ::2] + 1j * a.x[..., 1::2]
    z = z * (a.cos + 1j * a.sign * a.sin)[:, None]
    return np.stack([z.real, z.imag], -1).reshape(a.x.shape)


def bits(x: Any, kind: Any, read: Any) -> Any:
    return x.astype(kind).view(np.uint16).view(read).astype(np.float64)


def narrow(x: Any, kind: Any) -> Any:
    return x.astype(kind).astype(np.float64)


def tf32(x: Any, nearest: bool) -> Any:
    high, exponent = np.frexp(x)
    return np.ldexp((np.round if nearest else np.trunc)(high * 2**11) / 2**11, exponent)


def patched(x: Any, index: Any, value: Any) -> Any:
    x = np.array(x)
    x[index] = value
    return x


class Plant(NamedTuple):
    case: str
    number: int  # of the call
    output: str
    words: str
    fault: Callable[[A], Any]
    changes: dict[str, Any] = {}  # noqa: RUF012


P = Plant
DOCUMENTS = "attention_documents"
NEXT, SELF = (lambda t, n, w: list(range(t + 2))), (lambda t, n, w: list(range(t)))
MODULO = lambda h, n, kv: h % kv  # noqa: E731
PLANTS = [
    P("embedding", 0, "y", "token before", lambda a: a(ids=np.roll(a.ids, 1))),
    P("embedding", 0, "y", "token after", lambda a: a(ids=np.roll(a.ids, -1))),
    P("embedding", 0, "y", "row id + 1", lambda a: a(ids=np.minimum(a.ids + 1, 8))),
    P(
        "embedding",
        0,
        "y",
        "row id - 1",
        lambda a: a(ids=np.maximum(a.ids - 1, 0)),
        dict(ids=np.arange(23) % 8 + 1),
    ),
    P("embedding", 1, "dw", "overwritten", lambda a: a(dw=0 * a.dw)),
    P("embedding", 1, "dw", "counted once", lambda a: patched(a.dw, a.ids, a.dw[a.ids] + a.dy)),
    P("embedding", 1, "dw", "counted once", lambda a: patched(a.dw, a.ids[::-1], (a.dw[a.ids] + a.dy)[::-1])),
    P("embedding", 1, "dw", "gradient missing", lambda a: a.dw),
    P("embedding", 1, "dw", "row id + 1", lambda a: a(ids=a.ids + 1), dict(ids=np.arange(23) % 8)),
    P("embedding", 1, "dw", "row id - 1", lambda a: a(ids=a.ids - 1), dict(ids=np.arange(23) % 8 + 1)),
    P("embedding", 1, "dw", "ids shifted", lambda a: a(ids=np.roll(a.ids, 1))),
    P("embedding", 1, "dw", "ids shifted", lambda a: a(ids=np.roll(a.ids, -1))),
    P("linear", 0, "y", "bias missing", lambda a: a.x @ a.w.T),
    P("linear", 0, "y", "bias added twice", lambda a: a.want + a.b),
    P("linear", 0, "y", "bias subtracted", lambda a: a.want - 2 * a.b),
    P("linear", 0, "y", "bias of other columns", lambda a: a.x @ a.w.T + np.roll(a.b, 4)),
    P("linear", 0, "y", "weight transposed", lambda a: a.x @ a.w + a.b),
    P("linear", 0, "y", "remainder of a tile of 8", lambda a: a.x[:, :8] @ a.w[:, :8].T + a.b),
    P("linear", 0, "y", "same is added to every row", lambda a: a.want + np.arange(12) ** 2),
    P("linear", 0, "y", "sign flipped", lambda a: -a.want),
    P("linear", 0, "y", "0.2887 = 1/sqrt(12) times", lambda a: a.want / 12**0.5),
    P("linear", 0, "y", "all zeros", lambda a: 0 * a.want),
    P("linear", 0, "y", "unchanged", lambda a: a.y, dict(y=np.arange(156.0).reshape(13, 12))),
    P(
        "linear",
        0,
        "y",
        "halves of the last axis",
        lambda a: np.concatenate([a.want[:, 6:], a.want[:, :6]], 1),
    ),
    P("linear", 0, "y", "shifted by a row", lambda a: np.concatenate([a.want[:1], a.want[:-1]])),
    P("linear", 0, "y", "shifted by a row", lambda a: np.concatenate([a.want[1:], a.want[-1:]])),
    P("linear", 0, "y", "transposed", lambda a: a.want.T.reshape(a.want.shape)),
    P("linear", 0, "y", "transposed", lambda a: a.want.ravel().reshape(12, 13).T),
    P("linear", 0, "y", "rounded to bfloat16", lambda a: narrow(a.want, BF16)),
    P("linear", 0, "y", "rounded to float16", lambda a: narrow(a.want, np.float16)),
    P("linear", 0, "y", "rounded to float16 or TF32", lambda a: tf32(a.want, True)),
    P("linear", 0, "y", "inputs rounded to bfloat16", lambda a: a(x=narrow(a.x, BF16), w=narrow(a.w, BF16))),
    P(
        "linear",
        0,
        "y",
        "inputs rounded to float16 or TF32",
        lambda a: a(x=tf32(a.x, True), w=tf32(a.w, True)),
    ),
    P(
        "linear",
        0,
        "y",
        "inputs rounded to TF32, cut off",
        lambda a: a(x=tf32(a.x, False), w=tf32(a.w, False)),
    ),
    *(
        P("linear", 1, "dw", f"inputs rounded to {kind}", lambda a, f=f: a.dw + f(a.dy).T @ f(a.x))
        for kind, f in (
            ("bfloat16", lambda x: narrow(x, BF16)),
            ("float16 or TF32", lambda x: narrow(x, np.float16)),
            ("TF32, cut off", lambda x: tf32(x, False)),
        )
    ),
    P("linear", 1, "db", "gradient missing", lambda a: a.db),
    P("linear", 1, "db", "only the first token", lambda a: a.db + a.dy[0]),
    P("linear", 1, "db", "only the last token", lambda a: a.db + a.dy[-1]),
    P("linear", 1, "dw", "first token not counted", lambda a: a.want - np.outer(a.dy[0], a.x[0])),
    P("linear", 1, "dw", "last token not counted", lambda a: a.want - np.outer(a.dy[-1], a.x[-1])),
    P(
        "linear",
        1,
        "dw",
        "over tokens without the remainder of a tile of 8",
        lambda a: a.dw + a.dy[:8].T @ a.x[:8],
    ),
    P("linear", 1, "db", "mean over tokens", lambda a: a.db + a.dy.mean(0)),
    P("linear", 1, "db", "overwritten", lambda a: a.dy.sum(0)),
    P("linear", 1, "dw", "overwritten", lambda a: a.dy.T @ a.x),
    P("linear", 1, "dw", "gradient missing", lambda a: a.dw),
    P("linear", 1, "dw", "gradient transposed", lambda a: a.dw + a.x.T @ a.dy),
    P("linear", 1, "dw", "added twice", lambda a: a.dw + 2 * a.dy.T @ a.x),
    P("linear", 1, "dw", "subtracted instead", lambda a: a.dw - a.dy.T @ a.x),
    P("linear", 1, "dw", "what is added is 0.7 times", lambda a: a.dw + 0.7 * a.dy.T @ a.x),
    P("linear", 1, "dx", "weight transposed", lambda a: a.dy @ a.w.T),
    P("add_rmsnorm", 0, "y", "eps looks like 0.07, not 0.03", lambda a: a(eps=0.07)),
    P("add_rmsnorm", 0, "rstd", "eps looks like 0.07, not 0.03", lambda a: a(eps=0.07)),
    P("add_rmsnorm", 0, "y", "eps ignored", lambda a: a(eps=0)),
    P("add_rmsnorm", 0, "rstd", "eps ignored", lambda a: a(eps=0)),
    P("add_rmsnorm", 0, "rstd", "outside the root", lambda a: 1 / (rms(a.res_in + a.delta)[:, 0] + a.eps)),
    P(
        "add_rmsnorm",
        0,
        "y",
        "LayerNorm",
        lambda a: (s := (s := a.res_in + a.delta) - s.mean(1, keepdims=True)) / rms(s, a.eps) * a.w,
    ),
    P("add_rmsnorm", 0, "y", "weight ignored", lambda a: a.want / a.w),
    P("add_rmsnorm", 0, "y", "1 + w", lambda a: a.want / a.w * (1 + a.w)),
    P("add_rmsnorm", 0, "y", "weighted only", lambda a: (a.res_in + a.delta) * a.w),
    P("add_rmsnorm", 0, "res", "delta not added", lambda a: a.res_in),
    P("add_rmsnorm", 0, "y", "delta not added", lambda a: a.res_in / rms(a.res_in, a.eps) * a.w),
    P("add_rmsnorm", 0, "res", "delta added twice", lambda a: a.res_in + 2 * a.delta),
    P("add_rmsnorm", 0, "res", "delta subtracted", lambda a: a.res_in - a.delta),
    P("add_rmsnorm", 0, "res", "delta alone", lambda a: a.delta),
    P("add_rmsnorm", 0, "res", "normalised values", lambda a: a(of="y")),
    P("add_rmsnorm", 1, "dres", "projection term missing", lambda a: a.dres + a.rstd[:, None] * a.dy * a.w),
    P("add_rmsnorm", 1, "dres", "overwritten", lambda a: a(dres=0 * a.dres)),
    P("add_rmsnorm", 1, "dres", "weight ignored", lambda a: a(w=0 * a.w + 1)),
    P("add_rmsnorm", 1, "dres", "1 + w", lambda a: a(w=a.w + 1)),
    P("add_rmsnorm", 1, "dw", "gradient missing", lambda a: a.dw),
    P("add_rmsnorm", 1, "dw", "first token counted", lambda a: a.dw + a.dy[0] * a.res[0] * a.rstd[0]),
    P("add_rmsnorm", 1, "dw", "rstd left out", lambda a: a.dw + (a.dy * a.res).sum(0)),
    P("add_rmsnorm", 1, "dw", "multiplied by the weight", lambda a: a.dw + (a.want - a.dw) * a.w),
    P("head_rmsnorm", 0, "y", "eps looks like 0.001, not 0.03", lambda a: a(eps=0.001)),
    P("head_rmsnorm", 0, "y", "it is the input", lambda a: a.x),
    P("head_rmsnorm", 0, "y", "over all heads", lambda a: a.x / rms(a.x, a.eps, (-2, -1)) * a.w),
    P("head_rmsnorm", 0, "y", "heads in another order: 2, 0, 1", lambda a: a.want[:, [2, 0, 1]]),
    P(
        "head_rmsnorm",
        1,
        "dx",
        "projection summed",
        lambda a: (
            a.rstd[..., None]
            * ((g := a.dy * a.w) - (h := a.x * a.rstd[..., None]) * (g * h).sum(-1, keepdims=True))
        ),
    ),
    P("head_rmsnorm", 1, "dw", "first head", lambda a: a.dw + (a.dy * a.x * a.rstd[..., None])[:, 0].sum(0)),
    P("rope", 0, "x", "neighbours", neighbours),
    P("rope", 0, "x", "other way", lambda a: a(sin=-a.sin)),
    P("rope", 1, "x", "other way", lambda a: a(sign=1)),
    P("rope", 0, "x", "not applied", lambda a: a.x),
    P("rope", 0, "x", "positions one too high", lambda a: a(**table(range(1, 8), 1e4))),
    P("rope", 1, "x", "positions one too low", lambda a: a(**table(range(-1, 6), 1e4))),
    P(
        "rope",
        0,
        "x",
        "every position turned as the first",
        lambda a: a(**table([3] * 7, 1e4)),
        table(range(3, 10), 1e4),
    ),
    P(
        "rope",
        0,
        "x",
        "run on",
        lambda a: np.stack([a(x=a.x[b : b + 1], **table(range(7 * b, 7 * b + 7), 1e4))[0] for b in (0, 1)]),
    ),
    P("rope", 0, "x", "only the first half", lambda a: np.concatenate([a.want[..., :4], a.x[..., 4:]], -1)),
    P("rope", 0, "x", "only the second half", lambda a: np.concatenate([a.x[..., :4], a.want[..., 4:]], -1)),
    P("rope", 0, "x", "sin scaled by 1.1", lambda a: a(sin=1.1 * a.sin)),
    P("rope", 0, "x", "theta 5e+05, not 1e+04", lambda a: a(**table(range(7), 5e5))),
    P(
        "rope",
        1,
        "x",
        "theta 1e+06, not 1e+04",
        lambda a: a(**table(range(3, 10), 1e6)),
        table(range(3, 10), 1e4),
    ),
    P("rope", 0, "x", "positions counted 0.25 times", lambda a: a(**table(np.arange(7) / 4, 1e4))),
    P("attention", 0, "y", "keys and values swapped", lambda a: a(k=a.v, v=a.k)),
    P("attention", 0, "y", "keys read where values", lambda a: a(v=a.k)),
    P("attention", 0, "lse", "base 2", lambda a: a.want / np.log(2)),
    P("attention", 0, "lse", "without its log", lambda a: np.exp(a.want)),
    P("attention", 1, "dq", "missing in ds", lambda a: attention(a, ds=1)),
    P("attention", 1, "dk", "missing in ds", lambda a: attention(a, ds=1)),
    P("attention", 1, "dk", "applied twice", lambda a: attention(a, ds=1 / 5)),
    P("attention", 1, "dq", "delta term", lambda a: attention(a, delta=False)),
    P("attention", 1, "dk", "only the first of each", lambda a: attention(a, adds=lambda h: h == 0)),
    P("attention", 1, "dv", "only the last of each", lambda a: attention(a, adds=lambda h: h == 1)),
    P("attention", 1, "dv", "mean over shared", lambda a: attention(a) / 2),
    *(
        P(case, number, output, words, lambda a, o=options: attention(a, **o), changes)
        for words, case, options, changes in (
            ("no causal mask", "attention", dict(keys=lambda t, n, w: list(range(n))), {}),
            (
                "no causal mask",
                "attention_window",
                dict(keys=lambda t, n, w: list(range(max(t - w + 1, 0), n))),
                {},
            ),
            ("sees the next token", "attention", dict(keys=NEXT), {}),
            ("hides the token itself", "attention", dict(keys=SELF), {}),
            ("one position late", "attention", dict(keys=lambda t, n, w: [0, *range(t)]), {}),
            ("window ignored", "attention_window", dict(keys=lambda t, n, w: list(range(t + 1))), {}),
            (
                "window one too wide",
                "attention_window",
                dict(keys=lambda t, n, w: list(range(max(t - w, 0), t + 1))),
                {},
            ),
            (
                "window one too narrow",
                "attention_window",
                dict(keys=lambda t, n, w: list(range(max(t - w + 2, 0), t + 1))),
                {},
            ),
            ("cached positions", "attention_cache", dict(keys=lambda t, n, w: list(range(t - 2))), {}),
            ("mask missing: tokens of other documents", DOCUMENTS, dict(begin=lambda f, t: 0), {}),
            ("the token before the document is seen", DOCUMENTS, dict(begin=lambda f, t: max(f - 1, 0)), {}),
            ("its first token is hidden", DOCUMENTS, dict(begin=lambda f, t: min(f + 1, t)), {}),
            ("other documents", DOCUMENTS, dict(begin=lambda f, t: 0, saved=True), {}),
            ("h % K", DOCUMENTS, dict(head=MODULO), {}),
            ("h % K", "attention", dict(head=MODULO), {}),
            ("key/value head 0", "attention", dict(head=lambda h, n, kv: 0), {}),
            ("not scaled", "attention", dict(scale=1.0), {}),
            ("1/D", "attention", dict(scale=1 / 5), {}),
            ("1/sqrt(H D)", "attention", dict(scale=20**-0.5), {}),
            (
                "window ignored",
                "attention_window",
                dict(keys=lambda t, n, w: list(range(t + 1)), saved=True),
                {},
            ),
            ("h % K", "attention", dict(head=MODULO, saved=True), {}),
            ("not scaled", "attention", dict(scale=1.0, saved=True), {}),
        )
        for number, output in ((0, "y"), (0, "lse"), (1, "dq"), (1, "dk"), (1, "dv"))
        if not (options.get("saved") and number == 0)
    ),
    P("swiglu", 0, "y", "gate and up swapped", lambda a: (g := gates(a))[0] * g[1] * sigmoid(g[1])),
    P("swiglu", 0, "y", "interleaved", lambda a: (g := a.gu[:, ::2]) * sigmoid(g) * a.gu[:, 1::2]),
    P(
        "swiglu",
        0,
        "y",
        "tanh-gelu",
        lambda a: (g := gates(a)[0]) / 2 * (1 + np.tanh(0.7978845608 * (g + 0.044715 * g**3))) * gates(a)[1],
    ),
    P("swiglu", 0, "y", "1.702", lambda a: (g := gates(a)[0]) * sigmoid(1.702 * g) * gates(a)[1]),
    P("swiglu", 0, "y", "relu", lambda a: np.maximum(gates(a)[0], 0) * gates(a)[1]),
    P("swiglu", 0, "y", "sigmoid instead", lambda a: sigmoid(gates(a)[0]) * gates(a)[1]),
    P("swiglu", 0, "y", "no activation", lambda a: gates(a)[0] * gates(a)[1]),
    P("swiglu", 0, "y", "up ignored", lambda a: (g := gates(a)[0]) * sigmoid(g)),
    P("swiglu", 1, "dgu", "gradients of gate and up swapped", lambda a: np.roll(a.want, 8, 1)),
    P("swiglu", 1, "dgu", "gate and up swapped", lambda a: np.roll(a(gu=np.roll(a.gu, 8, 1)), 8, 1)),
    P("swiglu", 1, "dgu", "only its sigmoid", lambda a: dgate(a, lambda g, s: s)),
    P("swiglu", 1, "dgu", "derivative missing", lambda a: dgate(a, lambda g, s: 1)),
    P("swiglu", 1, "dgu", "in place of its derivative", lambda a: dgate(a, lambda g, s: g * s)),
    P("swiglu", 1, "dgu", "derivative of sigmoid", lambda a: dgate(a, lambda g, s: s * (1 - s))),
    *(
        P("cross_entropy_z", 0, output, words, fault)
        for output in ("loss", "logits")
        for words, fault in (
            ("ignored targets counted", lambda a: a(targets=np.where(a.targets < 0, 0, a.targets))),
            (
                "ignored targets counted",
                lambda a: a(targets=np.where(a.targets < 0, 13 * 8 + a.targets, a.targets)),
            ),
            ("shifted by one row", lambda a: a(targets=np.append(a.targets[1:], 5))),
            ("shifted by one row", lambda a: a(targets=np.append(5, a.targets[:-1]))),
            ("one too high", lambda a: a(targets=np.where(a.targets < 0, -100, (a.targets + 1) % 13))),
            ("one too low", lambda a: a(targets=np.where(a.targets < 0, -100, (a.targets - 1) % 13))),
        )
    ),
    P(
        "cross_entropy_z",
        0,
        "logits",
        "not zeroed",
        lambda a: np.where(
            (a.targets < 0)[:, None], a(targets=0 * a.targets) + a.scale * onehot(a, 0 * a.targets), a.want
        ),
    ),
    P("cross_entropy_z", 0, "loss", "base 2", lambda a: a.want / np.log(2)),
    P("cross_entropy_z", 0, "loss", "probability", lambda a: np.where(a.targets < 0, 0, np.exp(-a.want))),
    P("cross_entropy_z", 0, "loss", "multiplied by scale", lambda a: a.want * a.scale),
    P(
        "cross_entropy_z",
        0,
        "loss",
        "z-loss counted",
        lambda a: a.want + 0.01 * np.log(np.exp(a.logits).sum(1)) ** 2 * (a.targets >= 0),
    ),
    P(
        "cross_entropy_z",
        0,
        "loss",
        "first columns only, without the remainder of a tile of 8",
        lambda a: np.where(
            a.targets < 0, 0, a.want - np.log(np.exp(a.logits).sum(1) / np.exp(a.logits[:, :8]).sum(1))
        ),
        dict(targets=np.array([1, 2, 7, -100, 3, 0, 5, -100, 6, 6, 2], np.int32)),
    ),
    P("cross_entropy_z", 0, "logits", "summed, not averaged", lambda a: a.want / a.scale),
    P("cross_entropy_z", 0, "logits", "one-hot not", lambda a: a.want + a.scale * onehot(a, a.targets)),
    P("cross_entropy_z", 0, "logits", "z-loss left out", lambda a: a(z_loss=0.0)),
    P("cross_entropy_z", 0, "logits", "factor 2", lambda a: a(z_loss=0.005)),
    P(
        "cross_entropy_z",
        0,
        "logits",
        "first 9 of 13 columns",
        lambda a: np.pad(a(logits=a.logits[:, :9]), ((0, 0), (0, 4))),
        dict(targets=np.array([1, 2, 8, -100, 3, 0, 5, -100, 6, 8, 2], np.int32)),
    ),
    *(
        P("adamw_master", 0, output, words, fault, changes)
        for output in ("w", "master")
        for words, fault, changes in (
            (
                "bias correction missing",
                lambda a: (
                    a.master - a.lr * (moments(a)[0] / (np.sqrt(moments(a)[1]) + a.eps) + a.decay * a.master)
                ),
                {},
            ),
            ("step not counted", lambda a: a(step=1), {}),
            ("step one too low", lambda a: a(step=4), dict(step=5)),
            ("step one too high", lambda a: a(step=4), {}),
            ("factor ignored", lambda a: a(factor=np.ones(1)), {}),
            ("beta1 and beta2", lambda a: a(beta1=0.95, beta2=0.9), {}),
            ("decay missing", lambda a: a(decay=0.0), {}),
            ("decay looks like 0.1, not 0", lambda a: a(decay=0.1), dict(decay=0.0)),
            ("(L2)", lambda a: a(g=a.g + 0.1 * a.master / 0.6, decay=0.0), {}),
            ("eps inside", lambda a: stepped(a, np.sqrt(moments(a)[3] + a.eps)), {}),
            (
                "before the bias correction",
                lambda a: stepped(a, (np.sqrt(moments(a)[1]) + a.eps) / (1 - 0.95**3) ** 0.5),
                {},
            ),
            ("eps ignored", lambda a: a(eps=0.0), {}),
            ("wrong sign", lambda a: a.master + (a.master - a.want), {}),
            ("lr 0.007, not 0.01", lambda a: a(lr=0.007), {}),
        )
    ),
    P("adamw_master", 0, "m", "1 - beta1", lambda a: 0.9 * a.m + 0.6 * a.g),
    P("adamw_master", 0, "v", "1 - beta2", lambda a: 0.95 * a.v + 0.36 * a.g**2),
    P("adamw_master", 0, "v", "not of its square", lambda a: 0.95 * a.v + 0.05 * 0.6 * a.g),
    P("adamw_master", 0, "v", "factor ignored", lambda a: 0.95 * a.v + 0.05 * a.g**2),
    P("clip_factor", 0, "factor", "clipping skipped", lambda a: np.ones(1)),
    P("clip_factor", 0, "factor", "root is missing", lambda a: a.max_norm / a.sum_sq, dict(max_norm=0.1)),
    P("clip_factor", 0, "factor", "not limited", lambda a: np.array([0.5 / 0.4]), dict(max_norm=0.5)),
    P("add_sum", 0, "total", "overwritten", lambda a: a.x.sum(keepdims=True)),
    P("add_sum", 0, "total", "mean", lambda a: a.total + a.x.mean()),
    P("add_sum", 0, "total", "squared", lambda a: a.total + (a.x**2).sum()),
    P("add_sum_sq", 0, "total", "overwritten", lambda a: (a.x**2).sum(keepdims=True)),
    P("add_sum_sq", 0, "total", "not squared", lambda a: a.total + a.x.sum()),
    P("add_sum_sq", 0, "total", "the norm, not", lambda a: a.total + np.linalg.norm(a.x)),
]


def likely(a: A, got: Any, tol: float = 1e-5) -> str:
    """What is said; arguments must survive."""
    got, before = np.asarray(got, np.float64), {k: np.array(v) for k, v in a.args.items()}
    words = explain(a.op, a.output, got, a.want, a.args, tol)
    for name, x in before.items():
        np.testing.assert_array_equal(a.args[name], x)
    return words


@pytest.mark.parametrize("plant", PLANTS, ids=lambda p: f"{p.case}-{p.number}-{p.output}-{p.words}")
def test_planted_fault_is_named(plant: Plant) -> None:
    a = call(plant.case, plant.number, plant.output, **plant.changes)
    got = plant.fault(a)
    assert plant.words in likely(a, got, 1e-9)
    if "rounded" not in plant.words:
        assert plant.words in likely(a, narrow(got, np.float32))


@pytest.mark.parametrize("plant", PLANTS, ids=lambda p: f"{p.case}-{p.number}-{p.output}-{p.words}")
def test_fault_in_bfloat16_is_named(plant: Plant) -> None:
    """Those that bfloat16 shows, and whose words hold no number that it blurs."""
    a = call(plant.case, plant.number, plant.output, **plant.changes)
    got, tol = narrow(np.asarray(plant.fault(a), np.float64), BF16), 2.0**-7 * float(np.abs(a.want).max())
    blurred = any(w in plant.words for w in ("rounded", "0.7 times", "eps", "theta"))
    if not blurred and not np.abs(got - a.want).max() <= tol:
        assert plant.words in likely(a, got, tol)


def test_every_row_is_planted() -> None:
    """Of rows that differ in a size only, one is enough."""

    def key(words: str) -> str:
        return re.sub(r"tile of \d+", "", words.partition("{")[0])

    said = set()
    for plant in PLANTS:
        a = call(plant.case, plant.number, plant.output, **plant.changes)
        said.add((a.op, likely(a, plant.fault(a), 1e-9)))
    silent = [
        c
        for c in CAUSES
        if c.ops != "parameter"
        and not any(
            key(w).startswith(key(c.words)) and (c.ops == "*" or op in c.ops.split()) for op, w in said
        )
        and not (c.words.startswith("{") and any("times the right values" in w for _, w in said))
    ]
    assert not silent


WHERE = [
    ("linear", 0, "y", np.s_[3:6], "only tokens 3..5"),
    ("linear", 0, "y", np.s_[:, 4:8], "only columns 4..7 of 12 (an epilogue or a stride?)"),
    ("linear", 0, "y", np.s_[-1], "only the last token, 12: a remainder?"),
    ("linear", 0, "y", np.s_[:, -1], "only the last column, 11: a remainder?"),
    ("linear", 0, "y", np.s_[2, 5], "one element only, at (2, 5)"),
    ("attention", 0, "y", np.s_[:, :, [1, 3]], "only heads 1, 3"),
    ("attention", 0, "y", np.s_[:, 2:], "only positions 2..5"),
    ("attention", 0, "lse", np.s_[:, 1], "only head 1"),
    ("rope", 0, "x", np.s_[1], "only sequence 1"),
]


@pytest.mark.parametrize(("case", "number", "output", "index", "words"), WHERE)
def test_place_is_named(case: str, number: int, output: str, index: Any, words: str) -> None:
    a = call(case, number, output)
    noise = np.random.default_rng(5).normal(size=a.want[index].shape)
    assert words.removesuffix(" 1, 3") in likely(a, patched(a.want, index, a.want[index] + noise))


def test_factor_of_a_head_is_given() -> None:
    a = call("attention", 0, "y")
    got = patched(a.want, np.s_[:, :, 1], 1.02 * a.want[:, :, 1])
    assert likely(a, got) == "only head 1: 1.02 times the right values"


def test_nan_is_counted() -> None:
    a = call("linear", 0, "y")
    assert likely(a, patched(a.want, np.s_[3, 4:6], np.nan)) == "NaN in 2 of 156 values, first at (3, 4)"
    assert likely(a, patched(a.want, np.s_[3, 4], np.inf)) == "Inf in 1 of 156 values, first at (3, 4)"
    assert "unchanged" in likely(a, a.y)
    assert "never written" in explain(a.op, "y", a.y, a.want, {**a.args, "y": 0 * a.want}, 1e-5)


CALLS = sorted({(p.case, p.number, p.output) for p in PLANTS})


@pytest.mark.parametrize(("case", "number", "output"), CALLS)
def test_noise_has_no_cause(case: str, number: int, output: str) -> None:
    a = call(case, number, output)
    if a.want.size < 4:  # one number is explained by anything that is near it
        return
    for seed in range(5):
        rng = np.random.default_rng(seed)
        for amount in (1e-3, 1.0, 100.0):
            assert likely(a, a.want + amount * rng.normal(size=a.want.shape)) == ""


@pytest.mark.parametrize(("case", "number", "output"), CALLS)
@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 1e300])
def test_never_raises(
    case: str, number: int, output: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ones = {
        k: 2 if k in ("E", "F", "V") else 0 if k in ("S", "W") and case != "attention_cache" else 1
        for k in SIZES[case]
    }
    for sizes in (SIZES[case], ones):
        monkeypatch.setitem(SIZES, case, sizes)
        changes = table(range(sizes["T"]), 1e4, sizes["E"]) if case == "rope" else {}
        a = call(case, number, output, **changes)
        for got in (np.full(a.want.shape, value), patched(a.want, (0,) * a.want.ndim, value)):
            assert isinstance(likely(a, got), str)
            assert isinstance(explain(a.op, output, got, np.full_like(got, np.nan), a.args, 1e-5), str)
        spoilt = {
            k: v * np.nan if isinstance(v, np.ndarray) and v.dtype == float else v for k, v in a.args.items()
        }
        assert isinstance(explain(a.op, output, a.want + 1, a.want, spoilt, 0.0), str)
    empty = np.empty((0, 4))
    assert explain(a.op, output, empty, empty, {}, 0.0) == ""
    assert isinstance(explain(a.op, output, a.want + 1, a.want, {}, 0.0), str)
    assert isinstance(explain("another", output, a.want + 1, a.want, a.args, 0.0), str)


@pytest.mark.parametrize(
    "words", ["bias missing", "weight ignored", "factor ignored", "no causal mask", "summed, not"]
)
def test_large_arrays_are_cropped(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explaining, "LIMIT", 150)
    plant = next(p for p in PLANTS if words in p.words)
    a = call(plant.case, plant.number, plant.output, **plant.changes)
    assert plant.words in likely(a, plant.fault(a), 1e-9)


def test_too_large_is_still_located(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explaining, "LIMIT", 10)
    a = call("attention", 0, "y")
    assert "sign flipped" in likely(a, -a.want)
    assert "head 1" in likely(a, patched(a.want, np.s_[:, :, 1], 7.0))


PARAMETERS: list[tuple[str, Callable[[Any, Any], Any]]] = [
    ("transposed", lambda w, other: w.T.reshape(w.shape)),
    ("transposed", lambda w, other: w.reshape(w.shape[::-1]).T),
    ("all zeros", lambda w, other: 0 * w),
    ("bfloat16 bits read as float16", lambda w, other: bits(w, BF16, np.float16)),
    ("float16 bits read as bfloat16", lambda w, other: bits(w, np.float16, BF16)),
    ("holds 0.wk", lambda w, other: other),
    ("shifted by a row", lambda w, other: np.roll(w, 1, 0)),
    ("shifted by a row", lambda w, other: np.roll(w, -1, 0)),
    ("rounded to bfloat16", lambda w, other: narrow(w, BF16)),
    ("rounded to float16", lambda w, other: narrow(w, np.float16)),
    ("0.1252 times", lambda w, other: w * 0.1252),
    ("halves of its rows", lambda w, other: np.roll(w, 6, 0)),
    ("halves of the last axis", lambda w, other: np.roll(w, 5, 1)),
    ("only row 4", lambda w, other: patched(w, 4, 1.0)),
    ("one element only, at (4, 3)", lambda w, other: patched(w, (4, 3), 1.0)),
    ("NaN in 1 of", lambda w, other: patched(w, (4, 3), np.nan)),
    ("", lambda w, other: w + np.random.default_rng(7).normal(size=w.shape)),
]


@pytest.mark.parametrize(("words", "change"), PARAMETERS)
def test_parameter(words: str, change: Callable[[Any, Any], Any]) -> None:
    rng = np.random.default_rng(3)
    w, other = (0.02 * rng.normal(size=(12, 10)).astype(np.float32) for _ in range(2))
    said = explain_parameter(
        "0.wq", change(w.astype(np.float64), other.astype(np.float64)), w, {"0.wk": other}
    )
    assert words in said if words else said == ""


def test_parameter_of_one_element() -> None:
    one, nothing = np.ones(1), np.ones((0, 3))
    assert isinstance(explain_parameter("b", one + 1, one), str)
    assert explain_parameter("b", nothing, nothing) == ""
