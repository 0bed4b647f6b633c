"""Events of a run that trains, and their delivery to observers that the run does not know.

An observer is any object with a method named like an event, Stepped: `stepped(event)`. Observers hear an event in their
order; an exception of one is an exception of the run. The order of events:

    WeightsReady  Started  Evaluated
    (StepBegun  GradientsReady  Measured  Stepped)  PassEnded  Measured  Evaluated  Saved
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .finding import Finding

Line = dict[str, Any]


def by_source(line: Line, key: str) -> dict[str, Any]:
    """Pick the figures of the sources of a mixture from a line of the log, such as "val_loss/NAME", by name."""
    return {k[len(key) + 1 :]: x for k, x in line.items() if k.startswith(key + "/")}


# Key in the metadata of a checkpoint: the step at which it was removed.
REMOVED = "removed_at_step"


class Event:
    """Base of all events. method: name of the method that hears the event."""

    method: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.method = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


def emit(observers: Iterable[Any], event: Event) -> None:
    """Deliver an event to each observer that hears its kind."""
    for observer in observers:
        hear = getattr(observer, event.method, None)
        if hear is not None:
            hear(event)


def is_busy(observers: Iterable[Any], step: int) -> bool:
    """Tell if an observer computes with the model before a step: then ranks wait for the one that has it."""
    return any(o.computes_before(step) for o in observers if hasattr(o, "computes_before"))


@dataclass(frozen=True)
class WeightsReady(Event):
    """Weights and moments are on the device.

    resumed     they come from a saved state
    sha256      of weights and moments, read back from the device; "" where they begin anew
    saved       SHA-256 that the state recorded; None in states that have none
    findings    of the gates, as the state holds them
    expected    of the next step, as the state has it; found: as the trainer has it
    """

    step: int
    resumed: bool = False
    sha256: str = ""
    saved: str | None = None
    findings: tuple[dict[str, Any], ...] = ()
    expected: Mapping[str, Any] = field(default_factory=dict)
    found: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Started(Event):
    """Training begins after `step` of `num_steps`."""

    step: int
    num_steps: int


@dataclass(frozen=True)
class StepBegun(Event):
    """The batch of a step is read; its first micro-batch overwrites whatever the gradients hold.

    An observer that computes with the model here, or writes to it, in other steps than the first of a process has a method
    `computes_before(step)` that says in which: elsewhere the gradients of the step may be computed already.

    ids      (B, T) int32
    targets  (B, T) int32, negative where nothing is predicted
    """

    step: int
    ids: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class GradientsReady(Event):
    """All gradients of a step are summed, and the optimizer has not used them."""

    step: int


@dataclass(frozen=True)
class Measured(Event):
    """A line of metrics.jsonl, of a step or an evaluation, before it is written."""

    line: Line


@dataclass(frozen=True)
class Stepped(Event):
    """The line of a step is written."""

    line: Line


@dataclass(frozen=True)
class PassEnded(Event):
    """The data, or a source of a mixture, begins again, after so many complete passes over its windows."""

    step: int
    passes: int
    windows: int
    source: str = ""


@dataclass(frozen=True)
class Evaluated(Event):
    """The line of an evaluation is written. train_losses: of the epoch that ends there, [] before the first step."""

    line: Line
    train_losses: list[float]


@dataclass(frozen=True)
class Reproduced(Event):
    """A resumed run has repeated its latest evaluation."""

    step: int
    loss: float
    recorded: float


@dataclass(frozen=True)
class Sampled(Event):
    """A sample was drawn; finding: whether its first tokens are those of the rule."""

    step: int
    finding: Finding


@dataclass(frozen=True)
class RanksComputed(Event):
    """Several ranks have computed the gradients of a step.

    seconds     of each rank, for the fastest of its micro-batches: of the processor on a CPU, at cross-checks on a GPU
    other       rank whose micro-batch this one has computed again; -1 where none was due
    own, again  hashes of the gradients of the own micro-batch, and of the other's
    """

    step: int
    seconds: Sequence[float]
    other: int = -1
    own: Sequence[tuple[str, int]] = ()
    again: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True)
class SpotChecked(Event):
    """A piece of a batch went through the reference too. report: a bisect.report.Report."""

    step: int
    report: Any
    seconds: float


@dataclass(frozen=True)
class FormulasChecked(Event):
    """Steps of stock models were computed again. rows: bisect.report.ArrayComparisons, of golden steps and of rope tables"""

    step: int
    rows: list[Any]
    seconds: float


@dataclass(frozen=True)
class Saved(Event):
    """The files of a checkpoint are whole, `facts` in its metadata. It is written while training goes on: the event comes
    some steps after its evaluation, and before the next one."""

    path: Path
    facts: dict[str, Any]


@dataclass(frozen=True)
class Noted(Event):
    """A line of text for a person."""

    text: str
