"""Compare gradients with slopes of the loss, in the shapes of the job (gate start.slope).

A gradient that two implementations share, wrong in both, agrees with itself. The loss does not know of it: along a
direction u, (L(w + e u) - L(w - e u)) / 2e is g . u whatever computes g. Directions are random signs on all tensors of a
kind, so that a part of a gradient that is missing, added or scaled shows in most of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..common.finding import Finding
from ..common.host import available_memory
from ..model.adapters import Adapters
from ..model.lora import Pair, cut
from ..model.lora_dropout import Draws
from ..model.optim import Optimizer
from ..model.params import Slot
from ..model.transformer import Model
from .measure import EPS32, log_sum_exp

# Of the size of g . u for random signs: what a gradient may be off by.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.1}
# Of a row's loss, by rounding on its way through the model.
ROUNDING = {"float32": 4 * EPS32, "bfloat16": 2.0**-10}
# Roundings to bfloat16 do not average out over rows that share weights, in a trained model least: steps too short to bend the
# loss, in units of the tensor's root mean square, along so many directions, show what they make of it.
SHORT, SHORT_STEPS = 2.0**-9, 4
# Steps along u, in units of the tensor's root mean square: the first one along which the loss is nearly a parabola. The
# first of all is for slopes that rounding would hide.
STEPS, STRAIGHT = (0.3, 0.1, 0.03, 0.01), 0.05
# Where the loss is no parabola yet, as with most of what adapters get dropped, and rounding leaves a shorter step.
SHORTER = (0.003, 0.001)
# Directions of a kind of tensor: one where a forward pass takes more than so many FLOP.
DIRECTIONS, MANY_FLOP = 2, 1e13
# In bfloat16 one direction may be off by chance: then so many are taken, and half of them must be.
DIRECTIONS_IN_DOUBT = 5
# Constant vectors get noise, as adapters that begin as zeros do: a fault of a bias of 0 would not show.
NOISE = 0.05
# Root mean square of what noise in B adds to a matrix, at most, in units of the matrix's, by so many of its rows: where alpha is
# large, the loss along no step would be a parabola.
NOISE_ADDED, ADDED_ROWS = 0.5, 1024
# Root mean square of a row that noise takes the place of, in units of the tensor's.
SMALL_ROW = 0.01
# Elements of a kind that move, and logits on the host for the slope of a z-loss.
MAX_MOVED, MAX_LOGITS = 1 << 21, 1 << 21

Batch = tuple[np.ndarray, np.ndarray]
# Place in the flat buffer, and u there.
Direction = list[tuple[slice, np.ndarray]]


@dataclass(frozen=True)
class Slope:
    """Slope of one direction: g . u, the loss's own, the size of g . u for random signs, and what the two may differ by."""

    kind: str
    gradient: float
    loss: float
    size: float
    allowed: float

    @property
    def ratio(self) -> float:
        """Difference in units of what is allowed."""
        return abs(self.gradient - self.loss) / self.allowed


class Job:
    """A model in training as the slopes need it: loss and gradient of one micro-batch, weights that move and come back.

    The weights that the optimizer updates, and those that compute, have their bits again after `restore`.
    draws: of dropout, of the gradient and of every loss: with masks that stand still, the loss has a slope.
    """

    def __init__(
        self, model: Model, opt: Optimizer, adapters: Adapters | None, batch: Batch, scale: float, graph: bool,
        draws: Draws | None = None,
    ) -> None:  # fmt: skip
        self.model, self.opt, self.adapters, self.scale, self.graph = model, opt, adapters, scale, graph
        self.draws = draws
        self.layout = (adapters or model).layout
        self.ids, self.targets = batch
        if model.z_loss:
            seq = min(self.ids.shape[1], max(2, MAX_LOGITS // model.cfg.vocab_size))
            piece = slice(max(1, MAX_LOGITS // (seq * model.cfg.vocab_size))), slice(seq)
            self.ids, self.targets = (np.ascontiguousarray(x[piece]) for x in (self.ids, self.targets))
            self.draws = draws and replace(draws, numbers=draws.numbers[: len(self.ids)])
        self.saved = model.be.to_host(opt.master)
        self.trained = model.tokens_trained

    def shake(self) -> None:
        """Add noise to constant tensors, norms, biases and the B of new adapters, and to rows of next to nothing.

        An embedding that nothing was ever learnt for is such a row. A norm magnifies it as far as eps lets it, and along no
        step is the loss a parabola there."""
        self.start, rng = self.saved.astype(np.float32), np.random.default_rng(0)
        most = {p.b.hf: p for p in self.adapters.layout.pairs} if self.adapters else {}
        # What is kept under dropout adds 1 / (1 - p) times as much.
        share = 1 - self.adapters.config.dropout if self.adapters else 1.0
        for s in self.layout.slots:
            rows = self.start[s.offset : s.offset + s.size].reshape(-1, s.shape[-1])
            if (rows == rows[0, 0]).all():
                noise = share * min(NOISE, self._most(most[s.hf])) if s.hf in most else NOISE
                rows += noise * rng.standard_normal(rows.shape, np.float32)
            elif len(rows) > 1:
                square = np.einsum("ij,ij->i", rows, rows) / rows.shape[1]
                small = np.flatnonzero(square < square.mean() * SMALL_ROW**2)
                rows[small] += np.sqrt(square.mean()) * rng.standard_normal(
                    (small.size, rows.shape[1]), np.float32
                )
        self.opt.set_weights(self.start)

    def _most(self, pair: Pair) -> float:
        """Compute how large B of a new adapter may be, by root mean squares, beside its A and its matrix."""
        assert self.adapters is not None
        matrix = self.adapters.be.to_host(self.adapters.computed(pair.base)[:ADDED_ROWS])
        w, a = (
            float(np.sqrt(np.square(x.astype(np.float64)).mean())) for x in (matrix, cut(self.start, pair.a))
        )
        return NOISE_ADDED * w / max(pair.scale * a * np.sqrt(pair.a.shape[0]), 1e-30)

    def restore(self) -> bool:
        """Put the weights back and clear gradients and sums; True where all bits are those of before."""
        if self.adapters and self.adapters.dora:
            self.adapters.dora.holds = False
        be, model = self.model.be, self.model
        self.opt.set_weights(self.saved)
        be.fill(self.opt.g, 0)
        be.fill(model.total, 0)
        model.tokens_trained = self.trained
        return np.array_equal(be.to_host(self.opt.master).view(np.uint32), self.saved.view(np.uint32))

    def gradient(self) -> np.ndarray:
        """Compute the gradient as a step of the job does; where passes are recorded, by the recorded pass."""
        be, model = self.model.be, self.model
        for _ in range(3 if self.graph else 1):
            model.micro_step(self.ids, self.targets, self.scale, self.graph, begins=True, draws=self.draws)
        return np.asarray(be.to_host(self.opt.g), np.float32)

    def loss(self) -> float:
        """Sum the losses of all rows on the host, in float64."""
        model, z_part = self.model, 0.0
        model.forward(self.ids, draws=self.draws)

        def tap(layer: int | None, name: str, x: Any) -> None:
            nonlocal z_part
            if name.startswith("logits"):
                first = int(name.partition(".")[2] or 0)
                lse = log_sum_exp(np.asarray(model.be.to_host(x), np.float64))
                counted = self.targets.reshape(-1)[first : first + len(lse)] >= 0
                z_part += float(np.square(lse[counted]).sum())

        if model.z_loss:
            model.loss(self.targets, tap=tap)
        else:
            model.loss(self.targets)
        rows = model.be.to_host(model.buffers["loss"][: self.ids.size])
        return self.scale * (float(rows.astype(np.float64).sum()) + model.z_loss * z_part)

    def move(self, direction: Direction, step: float) -> float:
        """Compute the loss at w + step u."""
        for place, u in direction:
            self.model.be.from_host(self.opt.w[place], self.start[place] + np.float32(step) * u)
        self.opt.after_update()
        return self.loss()

    def back(self, direction: Direction) -> None:
        """Return from a direction."""
        for place, _ in direction:
            self.model.be.from_host(self.opt.w[place], self.start[place])

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """Round a float32 array to the dtype of the weights that move."""
        return x.astype(np.dtype(self.opt.w.dtype.name)).astype(np.float64)


def slopes(job: Job) -> Iterator[Slope]:
    """Measure the slope along directions of each kind of tensor."""
    job.shake()
    g, kinds = job.gradient(), dict[str, list[Slot]]()
    if job.adapters and job.adapters.dora:
        # Norms count as constants in the gradient: they stand still.
        job.adapters.dora.holds = True
    for s in job.layout.slots:
        kinds.setdefault(s.param.name, []).append(s)
    loss = job.loss()
    rows = max(1, int(np.count_nonzero(job.targets >= 0)))
    noise = ROUNDING[job.model.dtype] * max(loss, rows * job.scale) / np.sqrt(rows)
    if job.model.dtype == "bfloat16":
        noise = max(noise, _noise(job, g, loss))
    for kind, slots in kinds.items():
        asked = 1 if 2.0 * job.layout.size * job.ids.size > MANY_FLOP else DIRECTIONS
        number, red = 0, 0
        while number < asked:
            direction = _signs(job, slots, f"{kind} {number}")
            found = _slope(job, kind, direction, g, noise)
            yield found
            job.back(direction)
            red, number = red + (not found.ratio <= 1), number + 1
            if red and job.model.dtype == "bfloat16":
                asked = DIRECTIONS_IN_DOUBT


def _noise(job: Job, g: np.ndarray, loss: float) -> float:
    """Measure what roundings of weights and activations make of the loss, beside what the gradient says of a short step."""
    square = 0.0
    for number in range(SHORT_STEPS):
        direction = _signs(job, list(job.layout.slots), f"short {number}")
        moved = job.move(direction, SHORT) - loss
        for place, u in direction:
            start = job.start[place]
            moved -= float(g[place] @ (job.rounded(start + np.float32(SHORT) * u) - job.rounded(start)))
        square += moved**2
        job.back(direction)
    return float(np.sqrt(square / SHORT_STEPS))


def _signs(job: Job, slots: list[Slot], name: str) -> Direction:
    """Draw random signs for tensors, in units of their root mean square; in a large kind for a block of rows of each."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    share = min(1.0, MAX_MOVED / sum(s.size for s in slots))
    direction = []
    for s in slots:
        width, rows = s.shape[-1], s.size // s.shape[-1]
        count = max(1, round(share * rows))
        first = s.offset + int(rng.integers(rows - count + 1)) * width
        place = slice(first, first + count * width)
        rms = np.sqrt(np.square(job.start[place], dtype=np.float64).mean())
        bits = np.unpackbits(rng.integers(0, 256, -(-count * width // 8), np.uint8))[: count * width]
        direction.append((place, np.float32(rms) * (2 * bits.astype(np.float32) - 1)))
    return direction


def _slope(job: Job, kind: str, direction: Direction, g: np.ndarray, noise: float) -> Slope:
    """Measure the slope with two step sizes: what is left of the cubic term of the loss falls as their square."""
    size = float(np.sqrt(sum(np.square(g[place].astype(np.float64) * u).sum() for place, u in direction)))
    tolerance = TOLERANCE[job.model.dtype] * size
    for step in (*STEPS[int(4 * noise / STEPS[1] < tolerance) :], *SHORTER):
        if step in SHORTER and 4 * noise / step >= tolerance / 2:
            break
        far, near = (_difference(job, direction, g, e) for e in (step, step / 2))
        bend, rounding = abs(far[0] - near[0]), 4 * noise / step
        off, claimed = (4 * near[0] - far[0]) / 3, near[1]
        found = Slope(kind, claimed, claimed + off, size, tolerance + 0.1 * bend + rounding + 1e-30)
        if found.ratio > 1:
            nearer = _difference(job, direction, g, step / 4)
            # Far from a parabola the difference depends on the step; that of a wrong gradient does not. Between two steps it may
            # seem not to: the shortest that rounding leaves, in bfloat16 that shows a slope of this size at all, tells.
            shorter = 4 * noise / (0.3 * step) < (
                2 * size if job.model.dtype == "bfloat16" else tolerance / 2
            )
            if abs((4 * nearer[0] - near[0]) / 3 - off) <= 0.5 * abs(off) and not shorter:
                break
        elif bend <= STRAIGHT * size + rounding:
            break
    return found


def _difference(job: Job, direction: Direction, g: np.ndarray, step: float) -> tuple[float, float]:
    """(slope of the loss less g . u, g . u), by the weights as they are rounded."""
    ends = [job.move(direction, sign * step) for sign in (1, -1)]
    claimed = 0.0
    for place, u in direction:
        start, far = job.start[place], np.float32(step) * u
        moved = job.rounded(start + far) - job.rounded(start - far)
        claimed += float(g[place].astype(np.float64) @ moved) / (2 * step)
    return (ends[0] - ends[1]) / (2 * step) - claimed, claimed


def agreed(found: list[Slope]) -> list[Slope]:
    """Leave out directions of a kind that are off while most are not, of those that were taken in doubt."""
    off = [s for s in found if not s.ratio <= 1]
    in_doubt = len(found) == DIRECTIONS_IN_DOUBT and 2 * len(off) < len(found)
    return [s for s in found if s.ratio <= 1] if in_doubt else found


def slope_finding(job: Job) -> Finding:
    """Judge the slopes along all directions, and that the weights have their bits again."""
    need = 4 * job.saved.nbytes
    have = available_memory()
    if have is not None and need > have:
        why = (
            f"weights and gradients on the host take {need / 2**30:.1f} GiB, {have / 2**30:.1f} GiB are free"
        )
        return Finding.skipped("start.slope", why)
    try:
        found = list(slopes(job))
    finally:
        is_back = job.restore()
    if not is_back:
        why = "the weights do not come back to their bits after they were moved"
        return Finding.of("start.slope", False, why, "equal bits", why)
    found = [
        s
        for kind in dict.fromkeys(s.kind for s in found)
        for s in agreed([s for s in found if s.kind == kind])
    ]
    worst = max(found, key=lambda s: s.ratio)
    measured = (
        f"{len(found)} directions in {job.ids.shape[0]} x {job.ids.shape[1]} tokens, {worst.kind}: gradient "
        f"{worst.gradient:.4g}, loss {worst.loss:.4g}, {worst.ratio:.2f} of what may differ"
    )
    wrong = list(dict.fromkeys(s.kind for s in found if not s.ratio <= 1))
    why = f"the gradient of {', '.join(wrong[:4])} is not the slope of the loss: {measured}" if wrong else ""
    bound = f"equal within {TOLERANCE[job.model.dtype]:g} of the size, and rounding"
    return Finding.of("start.slope", not wrong, measured, bound, why, score=worst.ratio)
