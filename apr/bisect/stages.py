"""The stages of a bisection: configuration, data, upload, then every op of a training step, then state.

Each takes what it needs and gives rows; run() puts them together into a Report.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import ml_dtypes  # noqa: F401 - gives NumPy the name "bfloat16"
import numpy as np

from ..backends import reference
from ..backends.cuda.ops import noted_numbers
from ..model.buffers import WIDE
from ..model.config import ModelConfig
from ..model.cost import memory
from ..model.families import layers_of
from ..model.optim import OPTIMIZERS, Optimizer
from ..model.params import FUSED, Layout
from ..model.transformer import Model
from . import causes, rule
from .difference import Difference, difference
from .lockstep import Twin, join, join_optimizers
from .pieces import in_parallel, in_pieces
from .report import EXACT, ArrayComparison, Report
from .watch import Forced, Free

LR, CLIP, DECAY, STEPS = 0.003, 0.5, 0.1, 2  # of an optimizer step: CLIP is a share of the gradients' norm
PERIOD = (1 << 16) - 15  # random numbers that are used again and again: no tensor is so small or so regular
FUSED_IN = {part: name for name, parts in FUSED.items() for part in parts}


@dataclass(frozen=True)
class Side:
    """What is judged: a backend, what it believes the model to be, and the dtype it computes in."""

    backend: rule.Backend
    cfg: ModelConfig
    dtype: str

    @property
    def name(self) -> str:
        """For a reader: "cpu float32"."""
        return f"{self.backend.name} {self.dtype}"

    def model(self, weights: np.ndarray, shape: tuple[int, int], **options: Any) -> Model:
        """A model of this side with its weights uploaded."""
        model = Model(self.cfg, self.backend, *shape, self.dtype, loss_rows=shape[0] * shape[1], **options)
        self.backend.fill(model.w, np.nan)  # what is not filled shows
        self.backend.from_host(model.w, weights)
        return model


@dataclass(frozen=True)
class Batch:
    """What goes in: ids and targets (B,T) int32, negative targets ignored; in words what it is; and the id at which
    attention stops (document_end of Model), None for attention over whole sequences."""

    ids: np.ndarray
    targets: np.ndarray
    words: str
    document_end: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B,T)."""
        b, t = self.ids.shape
        return b, t

    @property
    def count(self) -> int:
        """Tokens that are predicted."""
        return int((self.targets >= 0).sum())


def exact(
    stage: str, op: str, tap: str, got: Any, want: Any, layer: int | None = None, cause: str = ""
) -> ArrayComparison:
    """A row of two values that must be equal."""
    same = bool(got == want) or (got != got and want != want)
    return ArrayComparison(
        stage, op, tap, EXACT, 0.0 if same else np.inf, 0.0, layer, (), (), got, want, cause
    )


def holds(
    stage: str, op: str, tap: str, true: bool, otherwise: str, layer: int | None = None
) -> ArrayComparison:
    """A row of a fact that must be true."""
    return exact(stage, op, tap, bool(true), True, layer, "" if true else otherwise)


def measured(
    stage: str,
    op: str,
    tap: str,
    d: Difference,
    tol: float,
    layer: int | None = None,
    shape: tuple[int, ...] = (),
    cause: str = "",
) -> ArrayComparison:
    """A row of a difference."""
    d = dataclasses.replace(d, shape=shape or d.shape)
    return ArrayComparison(stage, op, tap, EXACT, d.err, tol, layer, d.shape, d.index, d.got, d.want, cause)


def unequal(got: np.ndarray, want: np.ndarray) -> Difference:
    """The difference of arrays that do not have the same bits, infinite where their values are equal: -0 and 0."""
    d = difference(got, want)
    return dataclasses.replace(d, err=d.err or np.inf)


# Configuration


def configuration(truth: ModelConfig, side: ModelConfig) -> list[ArrayComparison]:
    """Whether both sides believe the same of the model."""
    return [
        exact("configuration", "config", f.name, getattr(side, f.name), getattr(truth, f.name))
        for f in fields(ModelConfig)
    ]


# Upload


def upload(model: Model, weights: np.ndarray) -> list[ArrayComparison]:
    """Every parameter read back from the device against what was sent, bit for bit, after rounding to the dtype of
    the model; the padding must be zero; and the rope tables, against formulas of their own."""
    kind = np.dtype(model.dtype)
    rows = []
    back = model.be.to_host(model.w)
    named = {s.hf: weights[s.offset : s.offset + s.size].reshape(s.shape) for s in model.layout.slots}
    covered = 0
    for s in model.layout.in_order():
        at = slice(s.offset, s.offset + s.size)
        got, want = back[at].reshape(s.shape), named[s.hf].astype(kind)
        covered += s.size
        tap = s.param.name if s.layer is None else f"{s.layer}.{s.param.name}"
        if _same_bits(got, want):
            rows.append(ArrayComparison("upload", "from_host", tap, EXACT, 0.0, 0.0, s.layer, s.shape))
            continue
        d = unequal(got, want)
        others = {k: v for k, v in named.items() if k != s.hf and v.shape == s.shape}
        cause = causes.explain_parameter(
            tap, got.astype(np.float64), want.astype(np.float64),
            {k: v.astype(np.float64) for k, v in others.items()} if s.size < 1 << 22 else {},
        )  # fmt: skip
        rows.append(measured("upload", "from_host", tap, d, 0.0, s.layer, s.shape, cause))
    if covered < back.size:
        used = np.zeros(back.size, bool)
        for s in model.layout.slots:
            used[s.offset : s.offset + s.size] = True
        rest = back[~used].astype(np.float64)
        rows.append(
            holds("upload", "from_host", "padding", not rest.any(), "what lies between parameters is not 0")
        )
    return rows + tables(model)


def tables(model: Model) -> list[ArrayComparison]:
    """cos and sin on the device, against angles computed one by one: t * theta^(-2i/D), scaled as Llama 3.1 does."""
    c = model.cfg
    rows = []
    positions = model.cos.shape[0]
    angles = np.array([[t * _frequency(c, i) for i in range(c.head_dim // 2)] for t in range(positions)])
    for name, table, want in (("cos", model.cos, np.cos(angles)), ("sin", model.sin, np.sin(angles))):
        d = difference(model.be.to_host(table), want)
        eps = rule.EPS[WIDE[model.dtype]]
        tol = rule.tolerance(0.0, 1.0, eps, 2) + 4 * positions * rule.EPS["float64"]
        rows.append(measured("upload", "rope_tables", name, d, tol))
    return rows


def borders(model: Model, batch: Batch) -> list[ArrayComparison]:
    """Where the documents of a batch begin, as attention was told, against ids counted one by one."""
    if batch.document_end is None:
        return []
    want = np.zeros(batch.shape, np.int32)
    for row, ids in zip(want, batch.ids, strict=True):
        begin = 0
        for t, i in enumerate(ids):
            row[t] = begin
            begin = t + 1 if i == batch.document_end else begin
    d = difference(model.be.to_host(model._at(*batch.shape)[1].doc_start), want)
    cause = "" if d.err == 0 else "attention does not stop where a document ends"
    return [measured("upload", "from_host", "doc_start", d, 0.0, cause=cause)]


def _frequency(c: ModelConfig, i: int) -> float:
    """Radians per position of pair i (Su et al. 2021); Llama 3.1 stretches long wavelengths."""
    wavelength = 2 * np.pi * c.rope_theta ** (2 * i / c.head_dim)
    s = c.rope_scaling
    if s is None:
        return float(2 * np.pi / wavelength)
    low, high = (s.original_max_position_embeddings / f for f in (s.low_freq_factor, s.high_freq_factor))
    if wavelength < high:
        stretch = 1.0
    elif wavelength > low:
        stretch = s.factor
    else:
        x = (s.original_max_position_embeddings / wavelength - s.low_freq_factor) / (
            s.high_freq_factor - s.low_freq_factor
        )
        stretch = 1 / ((1 - x) / s.factor + x)
    return float(2 * np.pi / (wavelength * stretch))


def all_used(layout: Layout, passed: set[str], trained: bool) -> list[ArrayComparison]:
    """Whether every parameter was given to an op, and its gradient too."""
    rows = []
    for s in layout.in_order():
        prefix = "" if s.layer is None else f"{s.layer}."
        names = {prefix + s.param.name, prefix + FUSED_IN.get(s.param.name, s.param.name)}
        for kind in ("", "grad.") if trained else ("",):
            used = any(kind + n in passed for n in names)
            rows.append(
                holds(
                    "upload",
                    "used",
                    f"{kind}{prefix}{s.param.name}",
                    used,
                    "no op was given this buffer",
                    s.layer,
                )
            )
    return rows


def kernels_given(cfg: ModelConfig, seen: dict[tuple[str, str], set[float]]) -> list[ArrayComparison]:
    """Whether kernels were launched with the numbers of the configuration."""
    want = {
        "eps": {cfg.rms_norm_eps},
        "window": {float(layer.window) for layer in layers_of(cfg)},
        "sign": {1.0, -1.0},
    }
    rows = []
    for (kernel, parameter), values in seen.items():
        if parameter in want and not kernel.startswith("adamw"):
            rows.append(
                exact(
                    "configuration",
                    kernel,
                    parameter,
                    sorted(values),
                    sorted(want[parameter] & values) or sorted(want[parameter]),
                )
            )
    return rows


# A training step, op by op


def _beside(judged: Model, cfg: ModelConfig, be: rule.Backend, shape: tuple[int, int], dtype: str) -> Model:
    """A model on another backend that can run in lockstep with one, on batches of `shape`."""
    rows = min(judged.loss_rows, shape[0] * shape[1])
    return Model(
        cfg, in_parallel(be), *shape, dtype=dtype, train=judged.train, loss_rows=rows, recompute=judged.recompute,
        z_loss=judged.z_loss, document_end=judged.document_end,
    )  # fmt: skip


def passes(both: Model, watch: Forced | Free, batch: Batch) -> None:
    """Forward, loss and, of a model that trains, backward of a batch, watched."""
    watch.stage = "forward"
    both.forward(batch.ids)
    watch.stage = "loss"
    both.loss(batch.targets, 1 / batch.count if both.train else None)
    if both.train:
        watch.stage = "backward"
        both.backward()


def forced(truth: ModelConfig, judged: Model, batch: Batch, optimizer: bool) -> Forced:
    """Every op of a step with the reference's inputs."""
    model = _beside(judged, truth, reference, batch.shape, "float64")
    watch = Forced([model.be, judged.be], judged.dtype, model.layout)
    both = join([model, judged], watch)
    watch.begin(both)
    passes(both, watch, batch)
    if optimizer:
        watch.stage, norm = "optimizer", _norm(model.g)
        for number, kind in enumerate(OPTIMIZERS.values()):
            _one_step(kind, both, [model, judged], norm, own_gradients=number == 0)
    return watch


def _one_step(
    kind: type[Optimizer], both: Model, models: list[Model], norm: float, own_gradients: bool
) -> None:
    """Run the third step of an optimizer, with state that is not zero and clipping that bites.

    own_gradients: of the pass before; otherwise another optimizer's step has cleared them, and noise takes their place.
    """
    opts = [kind.of(m, weight_decay=DECAY, grad_clip=CLIP) for m in models]
    joined = join_optimizers(both, opts)
    joined.grad_clip, joined.steps = CLIP * norm, STEPS
    for name, power in joined.moments.items():
        _fill_with_noise(joined.state[name], models[1].be, 0.1 * norm, power)
    if not own_gradients:
        _fill_with_noise(joined.g, models[1].be, norm, 1)
    joined.master.sides[0][...] = models[0].w
    if joined.master.sides[1] is not models[1].w:
        models[1].be.from_host(joined.master.sides[1], models[0].w.astype(joined.master.sides[1].dtype))
    joined.step(LR)


def _fill_with_noise(x: Twin, be: rule.Backend, norm: float, power: int) -> None:
    """x = block norm^power / sqrt(size) on both sides, block of N(0, 1), without its sign for an even power."""
    block = np.random.default_rng(0).standard_normal(PERIOD)
    truth, judged = x.sides
    low = np.empty(truth.shape, judged.dtype)
    values = (block if power % 2 else np.abs(block)) * norm**power / np.sqrt(truth.size)

    def fill(at: slice) -> None:
        low[at] = np.resize(values, low[at].size)
        truth[at] = low[at]

    in_pieces(fill, truth.size)
    be.from_host(judged, low)


def free(truth: ModelConfig, judged: Model, weights: np.ndarray, batch: Batch) -> Free:
    """Every op of a step as errors pile up, and how far rounding alone moves the reference: plain NumPy at that
    precision, and the reference in float64 whose weights, and so its inputs, are off by one rounding."""
    low = "bfloat16" if judged.dtype == "bfloat16" else "float32"
    models = [
        _beside(judged, truth, be, batch.shape, dtype)
        for be, dtype in ((reference, "float64"), (rule.plain(low)[-1], low), (reference, "float64"))
    ]
    block = np.random.default_rng(1).choice([-0.5, 0.5], PERIOD)

    def fill(at: slice) -> None:
        sent = weights[at].astype(judged.dtype).astype(np.float64)
        moved = sent * (1 + rule.EPS[low] * np.resize(np.roll(block, at.start % PERIOD), sent.size))
        for m, values in zip(models, (sent, sent, moved), strict=True):
            m.w[at] = values

    in_pieces(fill, weights.size)
    models.append(judged)
    watch = Free([m.be for m in models], judged.dtype, judged.layout)
    both = join(models, watch)
    if judged.train:
        judged.be.fill(judged.g, 0)
    judged.be.fill(judged.total, 0)
    passes(both, watch, batch)
    return watch


# The optimizer as a whole


def optimizer_steps(judged: Model) -> list[ArrayComparison]:
    """Compare one whole step of each optimizer, on the side's own gradients, with its formula on the host.

    Leaves the model with the new weights."""
    g = judged.be.to_host(judged.g)
    rows = []
    for kind in OPTIMIZERS.values():
        judged.be.from_host(judged.g, g)
        rows += _optimizer_step(kind, judged, g)
    return rows


def _optimizer_step(kind: type[Optimizer], judged: Model, g: np.ndarray) -> list[ArrayComparison]:
    """Compare the weights after a first step with the formula, parameter by parameter; matrices alone decay."""
    be, layout, norm, op = judged.be, judged.layout, _norm(g), f"{kind.__name__}.step"
    opt = kind.of(judged, weight_decay=DECAY, grad_clip=CLIP * norm)
    before = be.to_host(opt.master)
    opt.step(LR)
    after = be.to_host(opt.master)
    factor = min(1.0, CLIP * norm / (norm + 1e-6))
    rows = []

    def formula(w: np.ndarray, grad: np.ndarray, decay: float, dtype: Any) -> np.ndarray:
        w, grad = w.astype(dtype), grad.astype(dtype) * factor
        state = opt.next_state({name: np.zeros_like(grad) for name in opt.state}, grad)
        out: np.ndarray = w - LR * opt.direction(w, state, decay)
        return out

    eps = rule.EPS[WIDE[judged.dtype]]
    for s in layout.in_order():
        decay = DECAY if len(s.shape) > 1 else 0.0
        old, grad, new = (x[s.offset : s.offset + s.size] for x in (before, g, after))

        def judge(at: slice, old: Any = old, grad: Any = grad, new: Any = new, decay: float = decay) -> Any:
            want = formula(old[at], grad[at], decay, np.float64)
            base = difference(formula(old[at], grad[at], decay, np.float32), want).err
            d = difference(new[at], want)
            tol = rule.tolerance(base * eps / rule.EPS["float32"], d.largest, eps, 2)
            cause = "" if d.err <= tol else _update_cause(new[at], old[at], want)
            return tol, dataclasses.replace(d, flat=at.start + d.flat), cause

        tol, d, cause = max(in_pieces(judge, s.size), key=lambda f: (not f[1].err <= f[0], f[1].err - f[0]))
        rows.append(measured("optimizer", op, f"w.{s.hf}", d, tol, s.layer, s.shape, cause))
    rows.append(
        holds(
            "optimizer",
            op,
            "g",
            not be.to_host(judged.g).any(),
            "the gradients were not set to zero",
        )
    )
    return rows


def _norm(x: np.ndarray) -> float:
    return float(np.sqrt(sum(in_pieces(lambda at: float(np.square(x[at], dtype=np.float64).sum()), x.size))))


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    x, y = a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)
    return x.size == y.size and all(in_pieces(lambda at: np.array_equal(x[at], y[at]), x.size))


def _update_cause(after: np.ndarray, before: np.ndarray, want: np.ndarray) -> str:
    """In words how an update differs from the one that was wanted."""
    got, asked = (x.astype(np.float64) - before for x in (after, want))
    if not got.any():
        return "it did not move"
    ratio = float((got * asked).sum() / max(float((asked * asked).sum()), 1e-300))
    if np.abs(got - ratio * asked).max() <= 1e-3 * np.abs(got).max():
        return f"the update is {ratio:.4g} times what it should be: another learning rate was applied"
    return ""


# State


def state(
    side: Side, weights: np.ndarray, batch: Batch, tolerances: dict[str, float]
) -> list[ArrayComparison]:
    """What must not be carried over: two runs equal, memory that starts as NaN, evaluation between training, the
    recorded pass, the future, another input, a batch and its sequences one by one."""
    model = side.model(weights, batch.shape, document_end=batch.document_end)
    be, rows = side.backend, []

    def step(ids: np.ndarray, targets: np.ndarray, scale: float) -> tuple[float, np.ndarray]:
        be.fill(model.g, 0)
        be.fill(model.total, 0)
        model.forward(ids)
        model.loss(targets, scale)
        model.backward()
        return float(be.to_host(model.total)[0]), be.to_host(model.g)

    def evaluate(ids: np.ndarray) -> float:
        be.fill(model.total, 0)
        model.forward(ids)
        model.loss(batch.targets)
        return float(be.to_host(model.total)[0])

    def same(what: str, now: tuple[float, np.ndarray], otherwise: str) -> None:
        rows.append(
            exact("state", what, "loss", now[0], first[0], cause=otherwise if now[0] != first[0] else "")
        )
        if _same_bits(now[1], first[1]):
            rows.append(exact("state", what, "gradients", True, True))
            return
        for s in model.layout.in_order():
            at = slice(s.offset, s.offset + s.size)
            if not _same_bits(now[1][at], first[1][at]):
                d = unequal(now[1][at], first[1][at])
                rows.append(measured("state", what, f"grad.{s.hf}", d, 0.0, s.layer, s.shape, otherwise))
                return

    scale = 1 / batch.count
    before = evaluate(batch.ids)
    first = step(batch.ids, batch.targets, scale)
    same("two_runs", step(batch.ids, batch.targets, scale), "the second of two equal runs gives other bits")
    rows.append(exact("state", "evaluate_again", "loss", evaluate(batch.ids), before))
    rows.append(
        exact(
            "state",
            "evaluate",
            "loss",
            before,
            first[0],
            cause="evaluation and training differ" if before != first[0] else "",
        )
    )
    same(
        "after_evaluation",
        step(batch.ids, batch.targets, scale),
        "an evaluation changed the next training step",
    )
    for name, x in model.buffers.arrays.items():
        scratch = name.rsplit(".", 1)[-1] not in (
            *("w", "g", "cos", "sin", "total", "ids", "targets", "doc_start"),
        )
        if scratch:
            be.fill(x, np.nan)
    columns = model.buffers["logits"].shape[1]
    if columns > model.cfg.vocab_size:
        be.fill(model.buffers["logits"], 0)  # the padding is to stay zero
    same(
        "scratch_starts_as_nan",
        step(batch.ids, batch.targets, scale),
        "something is read before it is written",
    )
    for _ in range(3):  # op by op, recorded, replayed
        be.fill(model.g, 0)
        be.fill(model.total, 0)
        model.micro_step(batch.ids, batch.targets, scale)
    replayed = float(be.to_host(model.total)[0]), be.to_host(model.g)
    same("recorded_pass", replayed, "the recorded pass gives other bits than op by op")
    rows += _future(model, batch)
    other = (batch.ids[:, ::-1] + 1) % side.cfg.vocab_size
    rows.append(
        holds(
            "state",
            "other_input",
            "loss",
            evaluate(np.ascontiguousarray(other)) != before,
            "another input gives the same loss: a stale buffer",
        )
    )
    if not tolerances:
        return rows
    be.fill(model.g, 0)
    be.fill(model.total, 0)
    for ids, targets in zip(batch.ids, batch.targets, strict=True):
        model.forward(ids[None])
        model.loss(targets[None], scale)
        model.backward()
    parts = be.to_host(model.g)
    for s in model.layout.in_order():
        at = slice(s.offset, s.offset + s.size)
        prefix = "grad." if s.layer is None else f"grad.{s.layer}."
        tol = tolerances.get(prefix + FUSED_IN.get(s.param.name, s.param.name))
        if tol is None:
            continue
        d = difference(parts[at], first[1][at])
        otherwise = "" if d.err <= 2 * tol else "a batch of n is not the mean of its n sequences"
        rows.append(
            measured("state", "sequence_by_sequence", f"grad.{s.hf}", d, 2 * tol, s.layer, s.shape, otherwise)
        )
    return rows


def _future(model: Model, batch: Batch) -> list[ArrayComparison]:
    """Whether what comes last changes what was computed for earlier positions."""
    be, t = model.be, batch.ids.shape[1]
    half = max(1, t // 2)
    seen: list[np.ndarray] = []
    for ids in (batch.ids, batch.ids.copy()):
        if seen:
            ids[:, half:] = (ids[:, half:] + 7) % model.cfg.vocab_size
        model.forward(ids)
        final = be.to_host(model._at(*ids.shape)[1].final_norm).reshape(*ids.shape, -1)
        seen.append(final[:, :half].astype(np.float64))
    d = difference(seen[1], seen[0])
    changed = "" if d.err == 0 else "a token changes what was computed for those before it: the mask"
    return [measured("state", "future_changed", "final_norm", d, 0.0, cause=changed)]


# All of it


@dataclass(frozen=True)
class Plan:
    """What run() does. stop: at the first stage that finds a fault."""

    free: bool = True
    backward: bool = True
    optimizer: bool = True
    state: bool = True
    stop: bool = False


def host_bytes(side: Side, shape: tuple[int, int], plan: Plan) -> int:
    """Bytes of main memory that run() takes at the most, beside the side's own."""
    largest = max(OPTIMIZERS.values(), key=lambda kind: len(kind.moments))

    def of(dtype: str, optimizer: bool) -> int:
        return memory(
            side.cfg,
            reference,
            *shape,
            dtype=dtype,
            train=plan.backward,
            optimizer=largest if optimizer else None,
        ).total

    one = of("float64", plan.optimizer and plan.backward)
    if plan.free:
        one = max(one, 2 * of("float64", False) + of("float32", False))
    return one + (1 << 30)


def run(
    truth: ModelConfig,
    side: Side,
    weights: np.ndarray,
    batch: Batch,
    report: Report,
    plan: Plan = Plan(),
    progress: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Compare a side with the reference in float64 on the same weights (Layout order) and batch, stage by stage."""

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        progress(name)
        start = time.perf_counter()
        yield
        report.seconds[name] = report.seconds.get(name, 0.0) + time.perf_counter() - start

    def spent(watch: Forced | Free) -> None:
        for name, seconds in watch.seconds.items():
            report.seconds[name] = report.seconds.get(name, 0.0) + seconds

    def done() -> bool:
        return plan.stop and not report.agree

    with stage("configuration"):
        report.add(configuration(truth, side.cfg))
    if Layout(truth).slots != Layout(side.cfg).slots:
        for name in ("upload", "forward", "loss", "backward", "optimizer", "state"):
            report.skipped[name] = "the two sides do not have the same parameters"
        return report
    if done():
        return report
    with stage("upload"):
        judged = side.model(weights, batch.shape, train=plan.backward, document_end=batch.document_end)
        report.add(upload(judged, weights))
    if done():
        return report
    given: dict[tuple[str, str], set[float]] = {}
    tolerances: dict[str, float] = {}
    if plan.free:
        progress("forward to backward, errors as they accumulate")
        watch = free(truth, judged, weights, batch)
        spent(watch)
        report.add(watch.rows)
        tolerances = {r.tap: r.tol for r in watch.rows if r.tap.startswith("grad.")}
        del watch
        if plan.backward and plan.optimizer:
            with stage("optimizer"):
                report.add(optimizer_steps(judged))
                judged.be.from_host(judged.w, weights)
    progress("forward to optimizer, each op alone")
    with noted_numbers(given):
        looked = forced(truth, judged, batch, plan.optimizer and plan.backward)
        spent(looked)
        report.add(looked.rows)
        report.add(borders(judged, batch))
        report.add(all_used(judged.layout, looked.passed, plan.backward))
        report.add(kernels_given(truth, given))
        del looked
    if done():
        return report
    del judged
    if not plan.backward:
        for name in ("backward", "optimizer", "state"):
            report.skipped[name] = "--no-backward"
    if plan.state and plan.backward:
        with stage("state"):
            report.add(state(side, weights, batch, tolerances))
    return report
