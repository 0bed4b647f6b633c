"""What looks at each op of a lockstep: Forced judges an op by its own error, Free by the error that has piled up."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..params import Layout
from . import causes, rule
from .lockstep import Call, Twin, host
from .report import FORCED, FREE, Row

CHUNK = 1 << 18  # elements looked at at once
MOST_SLICED = 1 << 24  # elements; slices of a larger array are not judged apart
MOST_EXPLAINED = 6
FLAT = ("adamw",)  # ops on flat buffers, whose elements do not depend on each other
ALWAYS_64 = ("total", "factor", "sum_sq")

TAP = {  # of scratch buffers: by the weight that is used
    ("delta", "wo"): "att_out",
    ("delta", "wdown"): "mlp_out",
    ("dnorm", "wqkv"): "d_norm1",
    ("dnorm", "wgu"): "d_norm2",
    ("dnorm", "embed"): "d_final_norm",
    ("dnorm", "head"): "d_final_norm",
    ("dres", "mlp_norm"): "d_res2",
}
ATTENTION_GRADIENTS = {"dq": "d_q_rope", "dk": "d_k_rope", "dv": "d_v"}


def tap_name(call: Call, name: str, layer: int | None, layers: int) -> str:
    """What the output `name` of a call is called: the tap of model.py that shows it, or the buffer."""
    x = call.args[name]
    buffer = x.name.rsplit(".", 1)[-1]
    weight = getattr(call.args.get("w"), "name", "").rsplit(".", 1)[-1]
    prefix = "" if layer is None else f"{layer}."
    if x.name.startswith("grad."):
        return str(x.name)
    if call.op == "attention_bwd":
        return prefix + ATTENTION_GRADIENTS[name]
    if call.op == "rope":
        return prefix + ("d_rope" if buffer.startswith("d") else "rope")
    if call.op.startswith("head_rmsnorm") and not name.startswith("dw"):
        part = "qk" if name == "y" else "qk_rstd" if name == "rstd" else "d_qkv"
        return f"{prefix}{part}.{weight[:1]}"
    if buffer == "dres" and weight in ("attn_norm", "final_norm"):
        return f"d_hidden.{layers if layer is None else layer}"
    if buffer == "res1":
        return f"hidden.{x.name.split('.')[0] if '.' in x.name else layer or 0}"
    if buffer == "res" and call.op == "add_rmsnorm_fwd":
        return f"hidden.{layers}"
    if buffer == "logits" and call.op == "cross_entropy":
        return "d_logits"
    if buffer == "loss":
        return "loss_rows"
    if (buffer, weight) in TAP:
        return prefix + TAP[buffer, weight]
    scratch = buffer in ("dqkv", "datt", "dgu", "dact", "dqk")
    return prefix + ("d_" + buffer[1:] if scratch else buffer)


class _Watch:
    """What both have in common: where a row belongs, and the rows. Set .stage before a pass."""

    def __init__(self, backends: list[Any], dtype: str, layout: Layout) -> None:
        self.backends, self.dtype, self.layout = backends, dtype, layout
        self.stage = "forward"
        self.rows: list[Row] = []
        self.ops = 0
        self.passed: set[str] = set()  # names of all buffers that an op was given
        self._layer: int | None = None

    def _enter(self, call: Call) -> list[str]:
        """The outputs to look at."""
        self.ops += 1
        self.passed |= {x.name for x in call.args.values() if isinstance(x, Twin)}
        if call.op != "rope" or call.layer is not None:
            self._layer = call.layer  # the gradient that rope turns back lies in a buffer of all layers
        return [
            n
            for n in rule.outputs(call.op)
            if isinstance(call.args[n], Twin) and not (n == "logits" and call.args["scale"] is None)
        ]

    def _place(self, call: Call, name: str, index: int) -> tuple[str, int | None]:
        """(tap, layer) of an output; in a flat buffer, of the parameter that its worst element belongs to."""
        if call.op in ("adamw",):
            x = call.args[name]
            slot = next(
                (s for s in self.layout.slots if s.offset <= x.start + index < s.offset + s.size), None
            )
            where = "padding" if slot is None else slot.hf
            return f"{name}.{where}", None if slot is None else slot.layer
        return tap_name(call, name, self._layer, self.layout.cfg.num_layers), self._layer

    def _row(
        self, call: Call, name: str, mode: str, err: float, tol: float, d: Difference, cause: str
    ) -> Row:
        tap, layer = self._place(call, name, d.flat)
        index = tuple(int(i) for i in np.unravel_index(d.flat, d.shape)) if d.shape else ()
        return Row(self.stage, call.op, tap, mode, err, tol, layer, d.shape, index, d.got, d.want, cause)


class Forced(_Watch):
    """Sides: the reference in float64 and the one that is judged, whose ops get the reference's inputs.

    Before an op, what it only writes is filled with NaN on the judged side; after it, the reference's values, rounded to
    the dtype of the judged side, take the place of both sides' outputs.
    """

    def __init__(self, backends: list[Any], dtype: str, layout: Layout) -> None:
        super().__init__(backends, dtype, layout)
        self._explained: dict[tuple[str, str], str] = {}

    def begin(self, both: Any) -> None:
        """Start the reference from what the judged side has: its weights, and zero gradients; and the judged side from
        the reference's rope tables."""
        self._adopt(both.w)
        for x in (both.total, both.g)[: 2 if both.train else 1]:
            x.sides[0][...] = 0
            self._settle(x)
        for x in (both.cos, both.sin):
            self._settle(x)

    def _adopt(self, x: Twin) -> None:
        self.backends[0].from_host(x.sides[0], _wide(host(self.backends[1], x.sides[1], x.shape)))

    def _settle(self, x: Twin) -> None:
        """The reference's values, rounded, on both sides."""
        truth, judged = x.sides
        low = np.ascontiguousarray(truth).astype(judged.dtype)
        truth[...] = low
        inner = judged[tuple(slice(n) for n in truth.shape)] if judged.shape != truth.shape else judged
        self.backends[1].from_host(inner, low)

    def __call__(self, call: Call, run: Callable[[], None]) -> None:
        """Run one op on both sides and compare."""
        names = self._enter(call)
        if call.op in FLAT:
            self._flat(call, names)
            return
        how = rule.outputs(call.op)
        truth = dict(zip(call.args, call.on(0), strict=True))
        before = {
            n: self._low(call.args[n]) if isinstance(call.args[n], Twin) else x for n, x in truth.items()
        }
        for n in names:
            inputs = [x for m, x in truth.items() if m != n and isinstance(x, np.ndarray)]
            if not how[n] and not any(np.shares_memory(x, truth[n]) for x in inputs):
                self.backends[1].fill(call.args[n].sides[1], np.nan)
        bases = self._plain(call.op, before, how)
        run()
        for n in names:
            x = call.args[n]
            got = host(self.backends[1], x.sides[1], x.shape)
            err, tol, d = self._judge(call.op, n, got, truth[n], [b[n] for b in bases], x)
            cause = "" if err <= tol else self._explain(call, n, got, truth[n], before, tol)
            self.rows.append(self._row(call, n, FORCED, err, tol, d, cause))
        for n in names:
            self._settle(call.args[n])

    def _flat(self, call: Call, names: list[str]) -> None:
        """An op whose elements do not depend on each other, a piece at a time."""
        size = call.args[names[0]].shape[0]
        got: dict[str, np.ndarray] = {}
        getattr(self.backends[1], call.op)(*call.on(1))
        got = {n: host(self.backends[1], call.args[n].sides[1]) for n in names}

        def piece(first: int) -> list[tuple[str, float, float, Difference, str]]:
            at = slice(first, min(size, first + CHUNK))
            part = Call(
                call.op,
                {n: x[at] if isinstance(x, Twin) and x.shape == (size,) else x for n, x in call.args.items()},
            )
            before = {n: self._low(x) if isinstance(x, Twin) else x for n, x in part.args.items()}
            bases = self._plain(call.op, before, rule.outputs(call.op))
            getattr(self.backends[0], call.op)(*part.on(0))
            out = []
            for n in names:
                x = part.args[n]
                err, tol, d = self._judge(call.op, n, got[n][at], x.sides[0], [b[n] for b in bases], x)
                cause = "" if err <= tol else self._explain(call, n, got[n][at], x.sides[0], before, tol)
                out.append((n, err, tol, replace(d, flat=first + d.flat, shape=(size,)), cause))
            return out

        with ThreadPoolExecutor() as pool:
            found = [f for piece_ in pool.map(piece, range(0, size, CHUNK)) for f in piece_]
        for n in names:
            mine = [
                self._row(call, n, FORCED, err, tol, d, cause) for m, err, tol, d, cause in found if m == n
            ]
            self.rows.append(max(mine, key=lambda r: r.ratio))
        for n in names:
            self._settle(call.args[n])

    def _explain(
        self, call: Call, name: str, got: np.ndarray, want: np.ndarray, before: dict[str, Any], tol: float
    ) -> str:
        """The likely cause, for the first few faults of their kind: it takes seconds for large arrays."""
        kind = (call.op, name)
        if kind in self._explained or len(self._explained) >= MOST_EXPLAINED:
            return self._explained.get(kind, "")
        self._explained[kind] = causes.explain(
            call.op, name, _wide(got), want.copy(), {k: _wide(v) for k, v in before.items()}, tol
        )
        return self._explained[kind]

    def _low(self, x: Twin) -> np.ndarray:
        """A copy of the reference's values in the precision of plain NumPy, exact: they were rounded to it."""
        kind = np.dtype(x.sides[1].dtype)
        return np.array(x.sides[0], np.float32 if kind == np.float64 and x.name not in ALWAYS_64 else kind)

    def _plain(self, op: str, before: dict[str, Any], how: dict[str, str]) -> list[dict[str, Any]]:
        """What plain NumPy makes of the same inputs; two ways for attention, which is done in two ways."""
        out = []
        for be in rule.plain(self.dtype)[: 2 if op.startswith("attention") else 1]:
            args = {n: x.copy() if n in how and isinstance(x, np.ndarray) else x for n, x in before.items()}
            with np.errstate(all="ignore"):
                getattr(be, op)(*args.values())
            out.append(args)
        return out

    def _judge(
        self, op: str, name: str, got: np.ndarray, want: np.ndarray, bases: list[np.ndarray], x: Twin
    ) -> tuple[float, float, Difference]:
        factor = 3 if rule.is_gradient(op, name) else 2
        eps = rule.unit(x.sides[1].dtype, self.dtype)
        d = difference(got, want)
        scale = rule.EPS["float64"] / rule.EPS["float32"] if self.dtype == "float64" else 1.0
        base = max(difference(b, want).err for b in bases) * scale
        err, tol = d.err, rule.tolerance(base, d.largest, eps, factor)
        if self.dtype == "bfloat16" and want.size <= MOST_SLICED and err <= tol:
            for axis in range(want.ndim):
                mine = rule.relative(got, want)[axis]
                bound = rule.relative_tolerance(max(rule.relative(b, want)[axis] for b in bases), eps, factor)
                if not mine <= bound:
                    return mine, bound, d
        return err, tol, d


class Free(_Watch):
    """Sides: the reference in float64, then others that show how far rounding moves it, then the one that is judged.

    The tolerance is measured: factor times the largest distance of those in the middle from the reference, plus two units
    in the last place.
    """

    def __call__(self, call: Call, run: Callable[[], None]) -> None:
        """Run one op on all sides and compare."""
        names = self._enter(call)
        run()
        for n in names:
            x = call.args[n]
            want = x.sides[0]
            values = [host(be, y, x.shape) for be, y in zip(self.backends[1:], x.sides[1:], strict=True)]
            d = difference(values[-1], want)
            moved = max(difference(v, want).err for v in values[:-1])
            factor = 3 if rule.is_gradient(call.op, n) else 2
            eps = rule.EPS[self.dtype]
            scale = rule.EPS["float64"] / rule.EPS["float32"] if self.dtype == "float64" else 1.0
            tol = rule.tolerance(moved * scale, d.largest, eps, factor)
            self.rows.append(self._row(call, n, FREE, d.err, tol, d, ""))


@dataclass(frozen=True)
class Difference:
    """How far an array is off: the largest |got - want|, where, and the largest |want|. NaN where got has one."""

    err: float
    flat: int  # index of the worst element in the flattened array
    largest: float
    shape: tuple[int, ...]
    got: float
    want: float


def difference(got: np.ndarray, want: np.ndarray) -> Difference:
    """The Difference of two arrays of one shape, in pieces, so that memory does not grow with their size."""
    shape = want.shape
    g, w = got.reshape(-1), np.ascontiguousarray(want).reshape(-1)

    def piece(first: int) -> tuple[float, int, float]:
        a, b = (x[first : first + CHUNK].astype(np.float64) for x in (g, w))
        largest = float(np.abs(b).max())
        off = np.abs(a - b)
        at = int(off.argmax())  # of the first NaN where there is one
        return float(off[at]), first + at, largest

    starts = range(0, max(1, w.size), CHUNK)
    if w.size > CHUNK:
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(piece, starts))
    else:
        found = [piece(0)] if w.size else [(0.0, 0, 0.0)]
    err, at, _ = max(found, key=lambda f: (f[0] != f[0], f[0]))
    largest = max(f[2] for f in found)
    some = w.size > 0
    return Difference(err, at, largest, shape, float(g[at]) if some else 0.0, float(w[at]) if some else 0.0)


def _wide(x: Any) -> Any:
    return x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype.kind not in "iu" else x
