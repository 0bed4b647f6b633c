"""Watches of a lockstep: Forced judges each op by its own error, Free by the accumulated error."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ..backends.contract import OPS
from ..model.params import Layout
from . import explain, rule
from .difference import Difference, difference, error_and_tolerance, root_mean_square
from .lockstep import Call, Twin, elements, fill_with_noise, host, rows_of_gradient, within
from .makers import overlap, span
from .pieces import PIECE_ELEMENTS, in_parallel, in_pieces, norm_of, rounded_copy
from .report import FORCED, FREE, ArrayComparison
from .sums import by_chance, summed_in_order

MAX_SLICED_ELEMENTS = 1 << 24  # of an array whose slices are judged apart
MAX_EXPLAINED = 6
# Buffers of a model with adapters that hold what a pass is given.
GIVEN = ("w", "w8", "rows", "adapters")
ALWAYS_64 = ("total", "factor", "sum_sq", "square")

TAP = {  # of scratch buffers: by the weight that is used
    ("delta", "wo"): "att_out",
    ("delta", "wdown"): "mlp_out",
    ("dnorm", "wqkv"): "d_norm1",
    ("dnorm", "wgu"): "d_norm2",
    ("dnorm", "embed"): "d_final_norm",
    ("dnorm", "head"): "d_final_norm",
    ("dres", "mlp_norm"): "d_res2",
    ("dres", "wgu"): "d_res2",
    ("delta", "attn_post_norm"): "post1",
    ("delta", "mlp_post_norm"): "post2",
    ("dnorm", "attn_post_norm"): "d_att_out",
    ("dnorm", "mlp_post_norm"): "d_mlp_out",
}
ATTENTION_GRADIENTS = {"dq": "d_q_rope", "dk": "d_k_rope", "dv": "d_v"}


def tap_name(call: Call, name: str, layer: int | None, layers: int, weight: str) -> str:
    """Name the output `name` of a call: the tap of the model that shows it, or the buffer.

    weight: the weight of the call, or of the one before it.
    """
    x = call.args[name]
    buffer = x.name.rsplit(".", 1)[-1]
    prefix = "" if layer is None else f"{layer}."
    if x.name.startswith("grad."):
        return str(x.name)
    if call.op == "attention_bwd":
        return prefix + ATTENTION_GRADIENTS[name]
    if call.op == "swiglu_again" and name == "gu":
        return prefix + "d_gu"
    if call.op == "rope":
        return prefix + ("d_rope" if buffer.startswith("d") else "rope")
    if weight in ("q_norm", "k_norm") and call.op.startswith("head_rmsnorm") and not name.startswith("dw"):
        part = "qk" if name == "y" else "qk_rstd" if name == "rstd" else "d_qkv"
        return f"{prefix}{part}.{weight[:1]}"
    if buffer == "dres" and weight in ("attn_norm", "final_norm", "wqkv"):
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
    """Base of both watches: collects comparisons with their places. Set .stage before a pass."""

    def __init__(self, backends: list[Any], dtype: str, layout: Layout) -> None:
        self.backends, self.dtype, self.layout = backends, dtype, layout
        # Factor on the errors of plain NumPy in float32.
        self.scale = rule.EPS[dtype] / rule.EPS["float32"] if dtype == "float64" else 1.0
        self.stage = "forward"
        self.rows: list[ArrayComparison] = []
        self.seconds: dict[str, float] = {}  # by stage
        self.passed: set[str] = set()  # names of all buffers that an op was given
        self._layer: int | None = None
        self._weight = ""

    def __call__(self, call: Call, run: Callable[[], None]) -> None:
        """Run one op on all sides and compare."""
        start = time.perf_counter()
        self._look(call, run)
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + time.perf_counter() - start

    def _look(self, call: Call, run: Callable[[], None]) -> None:
        raise NotImplementedError

    def _enter(self, call: Call) -> list[str]:
        """Note the buffers and the layer of a call; returns the outputs to compare."""
        self.passed |= {x.name for x in call.args.values() if isinstance(x, Twin)}
        if call.op == "add" and self.stage == "forward" and call.args["out"].name == "res1":
            # a buffer that blocks share: this one begins
            self._layer = (self._layer or 0) + 1
        elif call.op not in ("rope", "add", "dropout") or call.layer is not None:
            # the gradients that rope and add change lie in buffers of all layers
            self._layer = call.layer
        if "w" in call.args:
            self._weight = getattr(call.args["w"], "name", "").rsplit(".", 1)[-1]
        return [
            n
            for n in OPS[call.op].outputs
            if isinstance(call.args[n], Twin) and not (n == "logits" and call.args["scale"] is None)
        ]

    def _place(self, call: Call, name: str, index: int) -> tuple[str, int | None]:
        """Return (tap, layer) of an output; in a flat buffer, of the parameter with the worst element."""
        if OPS[call.op].is_update and call.args[name].shape == call.args["w"].shape:
            x = call.args[name]
            slot = next(
                (s for s in self.layout.slots if s.offset <= x.start + index < s.offset + s.size), None
            )
            where = "padding" if slot is None else slot.hf
            return f"{name}.{where}", None if slot is None else slot.layer
        return tap_name(call, name, self._layer, self.layout.cfg.num_layers, self._weight), self._layer

    def _row(
        self, call: Call, name: str, mode: str, err: float, tol: float, d: Difference, cause: str
    ) -> ArrayComparison:
        tap, layer = self._place(call, name, d.flat)
        return ArrayComparison(
            self.stage, call.op, tap, mode, err, tol, layer, d.shape, d.index, d.got, d.want, cause
        )


class Forced(_Watch):
    """Sides: the reference in float64 and the one that is judged, whose ops get the reference's inputs.

    Before an op, what it only writes is filled with NaN on the judged side; after it, the reference's values, rounded to
    the dtype of the judged side, take the place of both sides' outputs.
    """

    def __init__(self, backends: list[Any], dtype: str, layout: Layout) -> None:
        super().__init__(backends, dtype, layout)
        self._explained: dict[tuple[str, str], str] = {}
        # Names of the buffers that ops have added to.
        self._begun: set[str] = set()
        self._plain_numpy = [in_parallel(be) for be in rule.plain(dtype)]

    def begin(self, both: Any) -> None:
        """Give the reference the weights of the judged side and zero gradients, and the judged side the reference's rope
        tables."""
        have = both.buffers.arrays
        for w in [have[name] for name in GIVEN if name in have] if both.adapters else [both.w]:
            self.backends[0].from_host(w.sides[0], host(self.backends[1], w.sides[1], w.shape))
        for x in (both.total, both.g) if both.train else (both.total,):  # the reference's are new: zero
            self.backends[1].from_host(x.sides[1], np.zeros(x.sides[1].shape, x.sides[1].dtype))
        for x in (both.cos, both.sin):
            self._settle(x)

    def _settle(self, x: Twin) -> None:
        """Set both sides to the reference's values, rounded."""
        truth, judged = x.sides
        low = rounded_copy(truth, judged.dtype)
        truth[...] = low
        self.backends[1].from_host(within(judged, x.shape), low)

    def _look(self, call: Call, run: Callable[[], None]) -> None:
        names = self._enter(call)
        self._poison(call, names)
        self._begin_at_random(call, names)
        if OPS[call.op].is_update:
            size = call.args["w"].shape
            begun = {n: float(call.args[n].sides[0][0]) for n in names if call.args[n].shape != size}
            self._run(1, call)
            arrays = [n for n in names if n not in begun]
            self._in_pieces(call, arrays, size[0], lambda at: elements(call, at), settle=False)
            for n, before in begun.items():
                self._sum_of_squares(call, n, before)
            return
        self._run(1, call)
        dw = call.args.get("dw")
        if call.op == "linear_bwd" and isinstance(dw, Twin) and dw.sides[0].size > PIECE_ELEMENTS:
            self._whole(replace(call, args={**call.args, "dw": None}), [n for n in names if n != "dw"])
            self._in_pieces(call, ["dw"], dw.shape[0], lambda at: rows_of_gradient(call, at), settle=True)
        else:
            self._whole(call, names)

    def _run(self, side: int, call: Call) -> None:
        getattr(self.backends[side], call.op)(*call.on(side))

    def _poison(self, call: Call, names: list[str]) -> None:
        """Fill with NaN the arrays that an op of the judged side only writes."""
        how, judged = OPS[call.op].outputs, dict(zip(call.args, call.on(1), strict=True))
        inputs = [x for m, x in judged.items() if how.get(m) != "" and hasattr(x, "strides")]
        for n in names:
            if not how[n] and not any(overlap(span(judged[n]), span(x)) for x in inputs):
                self.backends[1].fill(judged[n], np.nan)

    def _begin_at_random(self, call: Call, names: list[str]) -> None:
        """Put noise of the size of what the op adds into gradients and sums that no op has added to yet.

        An op that overwrites what it must add to would give the same values from zero."""
        how = OPS[call.op].outputs
        fresh = [n for n in names if how[n] == "+" and call.args[n].name not in self._begun | {"dres"}]
        # An update adds twice to the squares of its weights, and many ops to the gradient of the residual stream.
        if not fresh or OPS[call.op].is_update:
            return
        self._begun |= {call.args[n].name for n in fresh}
        # What else the op changes is put back after it ran to find that size.
        others = [x for n in how if isinstance(x := call.args[n], Twin) and how[n] and n not in fresh]
        kept = [self.backends[1].to_host(x.sides[1]) for x in others]
        self._run(1, call)
        for n in fresh:
            x = call.args[n]
            size = root_mean_square(host(self.backends[1], x.sides[1], x.shape))
            size = np.sqrt(x.sides[0].size) * (size if 0 < size < np.inf else 1.0)
            if any(a.name == n and a.positive for a in OPS[call.op].arguments):
                fill_with_noise(x, self.backends[1], np.sqrt(size), 2)
            else:
                fill_with_noise(x, self.backends[1], size)
        for x, values in zip(others, kept, strict=True):
            self.backends[1].from_host(x.sides[1], values)
        self._poison(call, names)

    def _whole(self, call: Call, names: list[str]) -> None:
        """Run an op of the reference and of plain NumPy, and compare the outputs of the judged side."""
        how, truth = OPS[call.op].outputs, dict(zip(call.args, call.on(0), strict=True))
        before = {
            n: self._low(call.args[n]) if isinstance(call.args[n], Twin) else x for n, x in truth.items()
        }
        bases = self._plain(call.op, before, how)
        self._run(0, call)
        for n in names:
            x = call.args[n]
            got = host(self.backends[1], x.sides[1], x.shape)
            in_order = self._in_order(call.op, n, before, truth[n])
            in_order += rule.cancelled(call.op, n, before)
            terms = _terms(call, n)
            sound = [b[n] for b in bases] + by_chance(call.op, n, before, truth[n])
            err, tol, d = self._judge(call.op, n, got, truth[n], sound, x, terms, in_order)
            cause = "" if err <= tol else self._explain(call, n, got, truth[n], before, tol)
            self.rows.append(self._row(call, n, FORCED, err, tol, d, cause))
        for n in names:
            self._settle(call.args[n])

    def _sum_of_squares(self, call: Call, name: str, before: float) -> None:
        """Compare the sum that an update adds the squares of its new weights to. Both sides have the reference's then."""
        x, master = call.args[name], call.args["master"].sides[0]
        want, plain = (
            np.array([before + norm_of(values) ** 2]) for values in (master, rounded_copy(master, np.float32))
        )
        got = host(self.backends[1], x.sides[1], x.shape)
        err, tol, d = self._judge(call.op, name, got, want, [plain], x, 0)
        self.rows.append(self._row(call, name, FORCED, err, tol, d, ""))
        x.sides[0][...] = want
        self._settle(x)

    def _in_pieces(
        self, call: Call, names: list[str], length: int, part: Callable[[slice], Call], settle: bool
    ) -> None:
        """Like `_whole`, for outputs with independent slices: compares slices in parallel to bound memory."""
        got = {n: host(self.backends[1], call.args[n].sides[1], call.args[n].shape) for n in names}
        settled = {n: np.empty_like(got[n]) for n in names if settle}
        each = max(1, PIECE_ELEMENTS * length // got[names[0]].size)

        def judge(at: slice) -> list[tuple[float, float, Difference, str]]:
            piece = part(at)
            before = {n: self._low(x) if isinstance(x, Twin) else x for n, x in piece.args.items()}
            bases = self._plain(call.op, before, OPS[call.op].outputs)
            self._run(0, piece)
            out = []
            for n in names:
                x = piece.args[n]
                ours, terms = got[n][at], _terms(call, n)
                in_order = self._in_order(call.op, n, before, x.sides[0])
                err, tol, d = self._judge(
                    call.op, n, ours, x.sides[0], [b[n] for b in bases], x, terms, in_order
                )
                cause = "" if err <= tol else self._explain(piece, n, got[n][at], x.sides[0], before, tol)
                flat = d.flat + at.start * (got[n].size // length)
                out.append((err, tol, replace(d, flat=flat, shape=got[n].shape), cause))
                if settle:
                    settled[n][at] = x.sides[0]
                    x.sides[0][...] = settled[n][at]
            return out

        found = in_pieces(judge, length, each)
        for i, n in enumerate(names):
            rows = [self._row(call, n, FORCED, *piece[i]) for piece in found]
            self.rows.append(max(rows, key=lambda r: (r.ratio, not r.ok)))
            if settle:
                self.backends[1].from_host(within(call.args[n].sides[1], settled[n].shape), settled[n])

    def _explain(
        self, call: Call, name: str, got: np.ndarray, want: np.ndarray, before: dict[str, Any], tol: float
    ) -> str:
        """Explain the first faults, one of each op and output: an explanation takes seconds for large arrays."""
        kind = (call.op, name)
        if kind in self._explained or len(self._explained) >= MAX_EXPLAINED:
            return self._explained.get(kind, "")
        self._explained[kind] = explain.explain(
            call.op, name, _wide(got), want.copy(), {k: _wide(v) for k, v in before.items()}, tol
        )
        return self._explained[kind]

    def _low(self, x: Twin) -> np.ndarray:
        """Copy the reference's values to the precision of plain NumPy; exact, since they were rounded to it."""
        kind = np.dtype(x.sides[1].dtype)
        return rounded_copy(
            x.sides[0], np.float32 if kind == np.float64 and x.name not in ALWAYS_64 else kind
        )

    def _plain(self, op: str, before: dict[str, Any], how: dict[str, str]) -> list[dict[str, Any]]:
        """Run plain NumPy on the inputs of an op; for attention both of its ways."""
        out = []
        for be in self._plain_numpy[: 2 if op.startswith("attention") else 1]:
            args = {n: x.copy() if n in how and isinstance(x, np.ndarray) else x for n, x in before.items()}
            with np.errstate(all="ignore"):
                getattr(be, op)(*args.values())
            out.append(args)
        return out

    def _in_order(self, op: str, name: str, low: dict[str, Any], want: np.ndarray) -> list[float]:
        return summed_in_order(op, name, low, want) if self.dtype == "float32" else []

    def _judge(
        self,
        op: str,
        name: str,
        got: np.ndarray,
        want: np.ndarray,
        bases: list[np.ndarray],
        x: Twin,
        terms: int,
        in_order: list[float] = [],  # noqa: B006 - not changed
    ) -> tuple[float, float, Difference]:
        d = difference(got, want)
        base = max([difference(b, want).err for b in bases] + in_order) * self.scale
        slices: tuple[list[float], list[float]] = ([], [])
        if self.dtype == "bfloat16" and want.size <= MAX_SLICED_ELEMENTS and want.any():
            sound = [rule.relative(b, want) for b in bases]
            slices = rule.relative(got, want), [max(axis) for axis in zip(*sound, strict=True)]
        err, tol, _ = error_and_tolerance(
            d, base, rule.unit(x.sides[1].dtype, self.dtype, terms), rule.factor(op, name), *slices
        )
        if slices[0] and err <= tol:
            bound = rule.SYSTEMATIC + rule.factor(op, name) * max(rule.systematic(b, want) for b in bases)
            if (off := rule.systematic(got, want)) > bound:
                return off, bound, d
        return err, tol, d


class Free(_Watch):
    """Sides: the reference in float64, then others that show how far rounding moves it, then the one that is judged.

    Errors are root mean squares: rounding that piled up moves whole arrays, and their worst element is a matter of chance.
    The tolerance is measured: factor times the largest distance of those in the middle from the reference, plus two units
    in the last place.
    """

    def _look(self, call: Call, run: Callable[[], None]) -> None:
        names = self._enter(call)
        run()
        for n in names:
            x = call.args[n]
            want = x.sides[0]
            values = [host(be, y, x.shape) for be, y in zip(self.backends[1:], x.sides[1:], strict=True)]
            d = difference(values[-1], want)
            err = root_mean_square(values[-1], want)
            moved = max(root_mean_square(v, want) for v in values[:-1])
            size, eps = root_mean_square(want), rule.EPS[self.dtype]
            tol = rule.tolerance(moved * self.scale, size, eps, rule.factor(call.op, n))
            self.rows.append(self._row(call, n, FREE, err, tol, d, ""))


def _terms(call: Call, name: str) -> int:
    """Count the terms of each sum of a product whose result is kept wide; 0 for other outputs."""
    if call.op == "gemm":
        return int(call.args["a"].shape[0 if call.args["trans_a"] else 1])
    summed = {("linear_bwd", "dw"): "dy", ("adapted_bwd_a", "da"): "x", ("adapted_bwd_b", "db"): "dy"}
    over = summed.get((call.op, name))
    return int(call.args[over].shape[0]) if over else 0


def _wide(x: Any) -> Any:
    return x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype.kind not in "iu" else x
