"""Several models as one: every op runs on each side in turn, and is compared before the next one.

A Twin is the same buffer on every side. Model and Optimizer only slice and reshape buffers and hand them to a backend, so
they run unchanged over Twins and a Lockstep, which calls the op on each side. Nothing but the models themselves is kept:
memory does not grow with the number of ops.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..backends.contract import OPS, PLUMBING
from ..model.adapters import Adapters
from ..model.config import ModelConfig
from ..model.families import layers_of
from ..model.optim import Optimizer
from ..model.transformer import Model
from .pieces import in_pieces
from .rule import Backend

# Random numbers that are repeated: no tensor is so small or so regular.
PERIOD = (1 << 16) - 15


@dataclass(frozen=True)
class Differing:
    """A number that differs between the sides."""

    sides: tuple[Any, ...]


class Twin:
    """A buffer on every side. Views of it are Twins of the same name.

    start: elements before it, while it is a slice of a flat buffer.
    """

    def __init__(self, name: str, sides: Sequence[Any], start: int = 0) -> None:
        self.name, self.sides, self.start = name, list(sides), start

    def __getitem__(self, at: Any) -> Twin:
        start = self.start
        if isinstance(at, slice) and len(self.shape) == 1:
            start += at.start or 0
        return Twin(self.name, [x[at] for x in self.sides], start)

    def reshape(self, *shape: Any) -> Twin:
        """Reshape the buffer on every side."""
        return Twin(self.name, [x.reshape(*shape) for x in self.sides], self.start)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape on the first side; a padded vocabulary may make others larger."""
        return tuple(self.sides[0].shape)


@dataclass(frozen=True)
class Call:
    """One op on all sides: its name and the arguments by parameter, Twins or plain values."""

    op: str
    args: dict[str, Any]

    @property
    def layer(self) -> int | None:
        """The block it belongs to, by the name of its weight or else of its other buffers."""
        weight = self.args.get("w")
        for x in [weight] if weight is not None else self.args.values():
            if isinstance(x, Twin):
                part = x.name.removeprefix("grad.").split(".")[0]
                if part.isdigit():
                    return int(part)
        return None

    def on(self, side: int) -> list[Any]:
        """Return the arguments of one side."""
        return [x.sides[side] if isinstance(x, Twin | Differing) else x for x in self.args.values()]


def fill_with_noise(x: Twin, be: Backend, norm: float, power: int = 1) -> None:
    """x = block norm^power / sqrt(size) on the reference's side and on the judged one, whose backend is be.

    block is N(0, 1), repeated, without its sign for an even power."""
    block = np.random.default_rng(0).standard_normal(PERIOD)
    truth, judged = x.sides
    low, flat = np.empty(truth.size, judged.dtype), truth.reshape(-1)
    values = (block if power % 2 else np.abs(block)) * norm**power / np.sqrt(truth.size)

    def fill(at: slice) -> None:
        low[at] = np.resize(values, low[at].size)
        flat[at] = low[at]

    in_pieces(fill, truth.size)
    be.from_host(within(judged, x.shape), low.reshape(truth.shape))


def elements(call: Call, at: slice) -> Call:
    """Cut an op on flat buffers to some elements."""
    size, sums = call.args["w"].shape, [n for n, how in OPS[call.op].outputs.items() if how == "+"]
    return replace(
        call,
        args={
            n: x[at] if getattr(x, "shape", None) == size else _apart(x) if n in sums else x
            for n, x in call.args.items()
        },
    )


def _apart(x: Twin) -> Twin:
    """Make a sum of a piece's own: pieces are computed at the same time."""
    return Twin(x.name, [np.zeros(x.shape, np.float64)] * len(x.sides))


def rows_of_gradient(call: Call, at: slice) -> Call:
    """Cut a linear_bwd to some rows of dw; its dx is not read."""
    a = call.args
    dx = np.empty(a["dx"].shape)
    part = {"dx": dx, "dw": a["dw"][at], "db": None, "dy": a["dy"][:, at], "x": a["x"], "w": a["w"][at]}
    return replace(call, args={**part, "adds": a["adds"]})


def within(x: Any, shape: tuple[int, ...]) -> Any:
    """Cut an array to a shape: without the padding that a vocabulary may have on one side alone."""
    return x if tuple(x.shape) == shape else x[tuple(slice(n) for n in shape)]


Watch = Callable[[Call, Callable[[], None]], None]  # is given a call and what runs it on all sides


class Lockstep:
    """A backend over Twins. `watch(call, run)` decides when each op runs and what is compared."""

    name = "lockstep"
    pad_vocab = False

    def __init__(self, backends: Sequence[Backend], watch: Watch) -> None:
        self.backends, self.watch = list(backends), watch
        for op in OPS:
            setattr(self, op, self._op(op))
        for name in PLUMBING:
            setattr(self, name, self._each(name))

    def _op(self, op: str) -> Callable[..., None]:
        names = OPS[op].parameters

        def call(*args: Any) -> None:
            c = Call(op, dict(zip(names, args, strict=True)))

            def run() -> None:
                for side, be in enumerate(self.backends):
                    getattr(be, op)(*c.on(side))

            self.watch(c, run)

        return call

    def _each(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            out = None
            for side, be in enumerate(self.backends):
                out = getattr(be, name)(*[a.sides[side] if isinstance(a, Twin) else a for a in args])
            return out  # of the last side: the one that is judged

        return call


def run_both(call: Call, run: Callable[[], None]) -> None:
    """A Watch that compares nothing."""
    run()


def join(models: Sequence[Model], watch: Watch = run_both) -> Model:
    """One model that runs all of them in lockstep. They share sizes; eps and window may differ."""
    both = copy.copy(models[-1])
    both.cfg = _joined_config([m.cfg for m in models])
    both.layers = layers_of(both.cfg)
    both.be = Lockstep([m.be for m in models], watch)  # type: ignore[assignment]

    def twin(name: str, get: Callable[[Model], Any]) -> Twin:
        return Twin(name, [get(m) for m in models])

    # the parameters have a name for themselves, which differs where others are trained
    apart = ("g",) if both.adapters else ("w", "g")
    names = [k for k in models[0].buffers.arrays if k not in apart]
    both.buffers = SimpleNamespace(  # type: ignore[assignment]
        arrays={k: Twin(k, [m.buffers.arrays[k] for m in models]) for k in names}
    )
    both._views, both._warm, both._passes = {}, set(), {}
    both.w, both.p = twin("w", lambda m: m.w), _joined_views([m.p for m in models], "")
    both._head = twin(_head_name(both), lambda m: m._head)
    if both.train:
        both.g = twin("g", lambda m: m.g)
    if both.train and not both.adapters:
        both.d = _joined_views([m.d for m in models], "grad.")
        both._dhead = twin("grad." + _head_name(both), lambda m: m._dhead)
    for name in ("total", "cos", "sin", "_logits"):
        setattr(both, name, Twin(name.strip("_"), [getattr(m, name) for m in models]))
    if both.adapters:
        layout = both.adapters.layout
        both.adapters = Adapters(both, layout, lambda x, name: Twin(name, x.sides, x.start))
        both.d = both.adapters.gradients()
        # A padded vocabulary has more rows on one side; where micro-batches are folded, gradients lie elsewhere on one side.
        parts = getattr(both.adapters.part, "sides", [])
        views = [
            (m.adapters, m._logits.shape[1], part)
            for m, part in zip(models, parts, strict=True)
            if m.adapters
        ]
        heads = [a.head_views(rows, part) for a, rows, part in views]
        for key in heads[0]:
            name = "effective" if key == "out" else f"{'grad.' * (key == 'grad')}{_head_name(both)}.B"
            both.adapters.head[key] = Twin(name, [head[key] for head in heads])
        whole = [a.whole_head(rows, part)[1] for a, rows, part in views]
        both._dhead = None if whole[0] is None else Twin("grad." + _head_name(both), whole)
    return both


def join_optimizers(both: Model, optimizers: Sequence[Optimizer]) -> Optimizer:
    """Build one optimizer that runs those of the models of join() in lockstep."""
    out = copy.copy(optimizers[-1])
    out.be, out.w, out.g = both.be, both.w, both.g
    for name in ("master", "sum_sq", "factor", "square"):
        setattr(out, name, Twin(name, [getattr(o, name) for o in optimizers]))
    out.state = {name: Twin(name, [o.state[name] for o in optimizers]) for name in out.state}
    return out


def _head_name(m: Model) -> str:
    return "embed" if m.cfg.tie_word_embeddings else "head"


def _joined_views(views: Sequence[Any], prefix: str) -> Any:
    """Return the named views of all sides as Twins, named "3.wqkv", gradients "grad.3.wqkv"."""

    tied = views[0].head is views[0].embed
    top = {
        k: Twin(prefix + ("embed" if k == "head" and tied else k), [getattr(v, k) for v in views])
        for k in vars(views[0])
        if k != "layer"
    }
    layers = [
        SimpleNamespace(
            **{k: Twin(f"{prefix}{i}.{k}", [getattr(v.layer[i], k) for v in views]) for k in vars(layer)}
        )
        for i, layer in enumerate(views[0].layer)
    ]
    return SimpleNamespace(**top, layer=layers)


def _joined_config(configs: Sequence[ModelConfig]) -> ModelConfig:
    """Return the configuration of the first side; numbers for ops that differ between the sides are Differing."""
    first, changed = configs[0], dict[str, Any]()
    for f in fields(ModelConfig):
        values = [getattr(c, f.name) for c in configs]
        if any(v != values[0] for v in values) and f.name in ("rms_norm_eps", "sliding_window"):
            changed[f.name] = Differing(tuple(values))
    return replace(first, **changed) if changed else first


def host(be: Backend, x: Any, like: tuple[int, ...]) -> np.ndarray:
    """Return a buffer of a side on the host, without the padding that `like` does not have; no copy of a host buffer."""
    inner = within(x, like)
    out: np.ndarray = inner if isinstance(inner, np.ndarray) else be.to_host(inner)
    return out
