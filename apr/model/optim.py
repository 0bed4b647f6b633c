"""Optimizers: named state over flat arrays, clipping by the global norm, an update of every element.

A new optimizer is a subclass of Optimizer and a row of OPTIMIZERS. What it keeps between steps is named in `moments`;
states on disk, hashes, --resume, `apr verify` and `apr bisect` follow from that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from ..common.options import option
from .buffers import WIDE, Buffers, BufferSpec, BufferSpecs
from .schedule import SCHEDULES

State = dict[str, np.ndarray]


@dataclass(frozen=True)
class OptimSettings:
    """Optimizer: AdamW, schedule of the learning rate."""

    num_steps: int = option("optimizer steps", 1000, above=0)
    epochs: float | None = option(
        "passes over the training data, in the place of --num-steps; the last step may read the beginning of the next pass",
        above=0,
        metavar="PASSES",
    )
    lr: float | None = option(
        "peak learning rate (default: 3e-4 from scratch, 5e-5 fine-tuning, 2e-4 fine-tuning adapters)",
        above=0,
        metavar="RATE",
    )
    lr_min: float | None = option(
        "learning rate at the end (default: 1 % of the peak)", at_least=0, metavar="RATE"
    )
    warmup_steps: int | None = option(
        "steps of linear warm-up (default: 1000 from scratch, 100 fine-tuning, at most 10 % of all steps)",
        at_least=0,
    )
    schedule: str = option("decay of the learning rate", "cosine", choices=SCHEDULES)
    weight_decay: float = option(
        "AdamW decay of matrices; norms and biases have none", 0.1, at_least=0, metavar="RATE"
    )
    beta1: float = option("AdamW decay rate of the first moment", 0.9, at_least=0, below=1, metavar="RATE")
    beta2: float = option("AdamW decay rate of the second moment", 0.95, at_least=0, below=1, metavar="RATE")
    eps: float = option("AdamW term added to the root of the second moment", 1e-8, above=0, metavar="TERM")
    grad_clip: float = option(
        "largest global gradient norm; 0 does not clip", 1.0, at_least=0, metavar="NORM"
    )
    lora_plus: float = option(
        "learning rate of B of adapters, in multiples of --lr (LoRA+, Hayou et al. 2024); 16 is usual, with a lower --lr",
        1.0,
        above=0,
        metavar="RATIO",
    )


class Trained(Protocol):
    """Flat weights with their gradients and layout: a Model, or the Adapters of one."""

    be: ModuleType
    w: Any
    g: Any
    layout: Any


class Norms(Protocol):
    """Sums of squares over the parts of several ranks, each total[0] += sum, total (1,) float64."""

    def add_gradients(self, total: Any, g: Any) -> None:
        """Add those of the gradients."""

    def add_weights(self, total: Any, x: Any) -> None:
        """Add those of new weights."""


@dataclass(eq=False, repr=False)
class Optimizer:
    """Update flat weights from flat gradients; own the state, the step count and the hyper-parameters.

    w, g     (n,)          weights and gradients; elements [0, decayed) take weight decay
    master   (n,) wide     the weights that are updated: w itself, or its float32 copy where w is bfloat16
    state    {name: (n,)}  wide, zero before the first step
    sum_sq   (1,) float64  squared global norm of the gradients of the latest step, before clipping
    square   (1,) float64  squared norm of the weights that the latest step made

    A subclass gives `moments`, `update` (the op of the backend; `squares` where it also adds to `square`), and the same
    formula for the host in `next_state` and `direction`. Its keyword-only fields are its hyper-parameters, read from the
    settings of a run by name.
    lora_plus is the share of the learning rate that the elements of `faster`, B of adapters, move with.
    grad_clip 0 means no clipping. after_update is called whenever w has changed. norms: sums over the parts of all ranks,
    where w is the part of one of them.
    """

    be: ModuleType
    w: Any
    g: Any
    decayed: int
    after_update: Callable[[], None] = lambda: None
    norms: Norms | None = None
    faster: tuple[slice, ...] = ()
    weight_decay: float = field(default=OptimSettings.weight_decay, kw_only=True)
    grad_clip: float = field(default=OptimSettings.grad_clip, kw_only=True)
    lora_plus: float = field(default=OptimSettings.lora_plus, kw_only=True)
    # {name of a state: power of the gradient that it averages}
    moments: ClassVar[dict[str, int]] = {}
    squares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.buffers = Buffers(self.be, self.specs(self.w.size, self.w.dtype.name))
        self.state: dict[str, Any] = {name: self.buffers[name] for name in self.moments}
        self.sum_sq: Any = self.buffers["sum_sq"]
        self.factor: Any = self.buffers["factor"]
        self.square: Any = self.buffers["square"]
        self.master = self.w
        if "master" in self.buffers.arrays:
            self.master = self.buffers["master"]
            self.be.copy(self.master, self.w)
        self.steps = 0

    @classmethod
    def of(cls, trained: Trained, **options: Any) -> Self:
        """Build an optimizer of a model's weights, or of adapters."""
        layout = trained.layout
        return cls(trained.be, trained.w, trained.g, layout.decayed, faster=layout.faster, **options)

    @classmethod
    def specs(cls, size: int, dtype: str) -> BufferSpecs:
        """List the buffers for `size` weights of a dtype."""
        wide = WIDE[dtype]
        specs = {name: BufferSpec("moments", (size,), wide) for name in cls.moments}
        if wide != dtype:
            specs["master"] = BufferSpec("master", (size,), wide)
        return specs | {
            name: BufferSpec("scratch", (1,), "float64") for name in ("sum_sq", "factor", "square")
        }

    def set_weights(self, host: np.ndarray) -> None:
        """Set the weights to a float32 buffer; w gets them rounded to its dtype."""
        self.be.from_host(self.w, host)
        if self.master is not self.w:
            self.be.from_host(self.master, host)
        self.after_update()

    def reset(self) -> None:
        """Set the state and the step count to those before the first step."""
        for x in self.state.values():
            self.be.fill(x, 0)
        self.steps = 0

    def step(self, lr: float, clear: bool = True) -> None:
        """Update the weights and the state, then set the gradients to zero, unless the next pass overwrites them."""
        be = self.be
        self.steps += 1
        for total in (self.sum_sq, self.square):
            be.fill(total, 0)
        (self.norms.add_gradients if self.norms else be.add_sum_sq)(self.sum_sq, self.g)
        be.clip_factor(self.factor, self.sum_sq, self.grad_clip or math.inf)
        parts = slice(0, self.decayed), slice(self.decayed, None)
        for part, decay in zip(parts, (self.weight_decay, 0.0), strict=True):
            for piece, share in self._pieces(part):
                self.update(piece, lr * share, decay)
        if self.norms:
            # Of all ranks, as one process adds.
            be.fill(self.square, 0)
            (self.norms.add_weights if self.squares else self.norms.add_gradients)(self.square, self.master)
        elif not self.squares:
            be.add_sum_sq(self.square, self.master)
        if clear:
            be.fill(self.g, 0)
        self.after_update()

    def _pieces(self, part: slice) -> Iterator[tuple[slice, float]]:
        """Cut a part of the arrays where the learning rate changes: pieces, and their share of it."""
        faster = self.faster if self.lora_plus != 1 else ()
        inside = [s for s in faster if part.start <= s.start and (part.stop is None or s.start < part.stop)]
        if not inside:
            yield part, 1.0
            return
        at = part.start
        for s in inside:
            if s.start > at:
                yield slice(at, s.start), 1.0
            yield s, self.lora_plus
            at = s.stop
        if at < (self.w.size if part.stop is None else part.stop):
            yield slice(at, part.stop), 1.0

    def rates(self, lr: float) -> dict[str, float]:
        """Name the learning rates of a step beside lr, for its line of the log."""
        return {"lr_b": lr * self.lora_plus} if self.lora_plus != 1 else {}

    def read_later(self, loss: Any) -> Callable[[], list[float]]:
        """Ask for numbers of the latest step: a loss (1,) float64, and the squared norms of gradients and weights."""
        found: Callable[[], list[float]] = self.be.read_later((loss, self.sum_sq, self.square))
        return found

    def grad_norm(self, square: float | None = None) -> float:
        """Global L2 norm of the gradients of the latest step, before clipping: of its square, or read from the device."""
        return math.sqrt(float(self.be.to_host(self.sum_sq)[0]) if square is None else square)

    def weight_norm(self, square: float | None = None) -> float:
        """L2 norm of the weights that the latest step made, padding included: of its square, or read from the device."""
        square = float(self.be.to_host(self.square)[0]) if square is None else square
        return math.sqrt(square) if square >= 0 else math.nan

    def update(self, part: slice, lr: float, decay: float) -> None:
        """Run the update op on one part of all arrays; self.steps counts this step already."""
        raise NotImplementedError

    def next_state(self, state: State, g: np.ndarray) -> State:
        """Compute the state after a step from the state before it and the clipped gradient, in NumPy."""
        raise NotImplementedError

    def direction(self, w: np.ndarray, state: State, decay: Any) -> np.ndarray:
        """Compute d of w_new = w - lr d from the weights before step self.steps and the state after it, in NumPy."""
        raise NotImplementedError


@dataclass(eq=False, repr=False, kw_only=True)
class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2).  m, v: averages of the gradient and of its square."""

    beta1: float = OptimSettings.beta1
    beta2: float = OptimSettings.beta2
    eps: float = OptimSettings.eps
    moments: ClassVar[dict[str, int]] = {"m": 1, "v": 2}
    squares: ClassVar[bool] = True

    def update(self, part: slice, lr: float, decay: float) -> None:
        """m, v, master, w = those after one step, where `part` is."""
        self.be.adamw(
            self.w[part],
            self.master[part],
            self.state["m"][part],
            self.state["v"][part],
            self.square,
            self.g[part],
            self.factor,
            lr,
            self.beta1,
            self.beta2,
            self.eps,
            decay,
            self.steps,
        )

    def next_state(self, state: State, g: np.ndarray) -> State:
        """m + (1 - beta1) (g - m);  v + (1 - beta2) (g^2 - v)"""
        m, v = state["m"], state["v"]
        return {"m": m + (1 - self.beta1) * (g - m), "v": v + (1 - self.beta2) * (g * g - v)}

    def direction(self, w: np.ndarray, state: State, decay: Any) -> np.ndarray:
        """m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps) + decay w"""
        mhat = state["m"] / (1 - self.beta1**self.steps)
        vhat = state["v"] / (1 - self.beta2**self.steps)
        d: np.ndarray = mhat / (np.sqrt(vhat) + self.eps) + decay * w
        return d


OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW}


def optimizer_class(settings: OptimSettings) -> type[Optimizer]:
    """Look up the optimizer that the settings of a run name; AdamW where they have no such field."""
    return OPTIMIZERS[getattr(settings, "optimizer", "adamw")]


def hyper_parameters(kind: type[Optimizer], settings: OptimSettings) -> dict[str, Any]:
    """Read the keyword-only fields of an optimizer from the settings of a run."""
    return {f.name: getattr(settings, f.name) for f in fields(kind) if f.kw_only}
