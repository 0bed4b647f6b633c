"""Ask a job for the masks of its adapters' dropout: which matrix, sequence and step has which, and that evaluations have none.

That an op makes the mask of its counter is what start.ops compares; here the counters are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.finding import Finding
from ..common.units import plural
from ..model.lora_dropout import Draws, Dropout
from .subject import Subject

GATE = "start.dropout"
BOUND = "a mask for each matrix, sequence and step, none in an evaluation"
# Elements that a step is to drop, at least, for the gradients of two steps to differ for certain.
FEWEST_DROPPED = 1000
# Of a counter that no pass has written.
UNTOUCHED = -1


@dataclass(frozen=True)
class Call:
    """One call of the op: number of the matrix, seed, share and factor, counters as bytes."""

    module: int
    seed: int
    share: float
    factor: float
    counters: bytes


class _Watched:
    """A backend that notes its calls of `dropout`."""

    def __init__(self, be: Any, calls: list[Call]) -> None:
        self._be, self._calls = be, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._be, name)

    def dropout(
        self, out: Any, x: Any, counters: Any, seed: int, module: int, p: float, factor: float
    ) -> None:
        """Note the call, and make it."""
        self._calls.append(Call(module, seed, p, factor, self._be.to_host(counters).tobytes()))
        self._be.dropout(out, x, counters, seed, module, p, factor)


def _calls(dropout: Dropout, f: Callable[[], None]) -> list[Call]:
    """Note the calls of the op in f, which runs op by op."""
    calls: list[Call] = []
    be, dropout.be = dropout.be, _Watched(dropout.be, calls)
    try:
        f()
    finally:
        dropout.be = be
    return calls


class Masks:
    """Ask a job about dropout before its first step, with that step's batch, and then look at what the step has left."""

    def __init__(
        self, t: Subject, ids: np.ndarray, targets: np.ndarray, scale: float, graph: bool, step: int
    ) -> None:
        assert t.adapters is not None
        assert t.adapters.dropout is not None
        self.t, self.dropout, self.step, self.sequences = t, t.adapters.dropout, step, len(ids)
        self.ids, self.targets = (np.ascontiguousarray(x[: t.model.batch]) for x in (ids, targets))
        self.scale, self.wrong = scale, list[str]()
        before = t.model.tokens_trained
        self._look_at_calls()
        self._compare_steps(graph)
        t.model.tokens_trained = before
        for flat in (t.adapters.g, t.model.total):
            t.backend.fill(flat, 0)

    def begin_step(self) -> None:
        """Clear the counters: what `finding` reads of them is of passes from here on."""
        self.t.backend.fill(self.dropout.counters, UNTOUCHED)

    def _draws(self, step: int) -> Draws:
        return Draws.of(self.t.settings.seed, step, 0, len(self.ids))

    def _pass(self, step: int, graph: bool) -> None:
        draws = self._draws(step)
        self.t.model.micro_step(self.ids, self.targets, self.scale, graph, begins=True, draws=draws)

    def _gradients(self, step: int, graph: bool) -> np.ndarray:
        adapters = self.t.adapters
        assert adapters is not None
        self._pass(step, graph)
        return np.asarray(self.t.backend.to_host(adapters.g))

    def _look_at_calls(self) -> None:
        """Compare the arguments of the op in a step and in an evaluation with what the settings ask for."""
        t, model, adapters = self.t, self.t.model, self.t.adapters
        assert adapters is not None
        pairs = adapters.layout.dropped
        calls = _calls(self.dropout, lambda: self._pass(self.step, False))
        self.matrices = len({c.module for c in calls})
        asked = t.settings.lora_dropout
        share = adapters.config.dropout if asked is None else asked
        if self.matrices != len(pairs):
            self.wrong.append(f"{plural(len(pairs), 'matrix')} share {plural(self.matrices, 'mask')}")
        scales = {c.module: c.factor for c in calls}
        if sorted(scales.values()) != sorted(p.scale for p in pairs) and self.matrices == len(pairs):
            self.wrong.append("what is kept has another scale than adapters have in evaluations")
        if {c.share for c in calls} - {share}:
            self.wrong.append(
                f"{', '.join(f'{c.share:g}' for c in calls[:1])} is dropped, asked for {share:g}"
            )
        if {c.seed for c in calls} - {t.settings.seed}:
            self.wrong.append("masks are of another seed")
        if {c.counters for c in calls} - {self._draws(self.step).counters.tobytes()}:
            self.wrong.append("masks are not those of the step and of its sequences")

        def evaluate() -> None:
            model.forward(self.ids)
            model.loss(self.targets)

        if _calls(self.dropout, evaluate):
            self.wrong.append("an evaluation drops, too")

    def _compare_steps(self, graph: bool) -> None:
        """Compare gradients of this step with those of the next, by a recorded pass where there is one, and op by op."""
        adapters = self.t.adapters
        assert adapters is not None
        for _ in range(3 if graph else 1):
            first = self._gradients(self.step, graph)
        then, again = self._gradients(self.step + 1, graph), self._gradients(self.step + 1, False)
        width = sum(p.base.shape[1] for p in adapters.layout.pairs)
        is_many = adapters.config.dropout * self.ids.size * width >= FEWEST_DROPPED
        if is_many and same_bits(first, again):
            self.wrong.append("two steps have one mask")
        if not same_bits(then, again):
            self.wrong.append("a recorded pass has other masks than one op by op")

    def finding(self) -> Finding:
        """Judge, with the counters that the last pass of the step itself has left, which may be shorter than others."""
        found = np.asarray(self.t.backend.to_host(self.dropout.counters))[: self.dropout.sequences]
        numbers, micro = found[:, 0], self.t.model.batch
        in_order = bool((np.diff(numbers) == 1).all()) and int(numbers[0]) % micro == 0
        last = int(numbers[-1])
        ends = last == self.sequences - 1 or (self.t.shard is not None and last % micro == micro - 1)
        wrong = list(self.wrong)
        if (found == UNTOUCHED).all():
            wrong.append("the step drops nothing")
        elif not in_order or not ends or last >= self.sequences or (found[:, 1] != self.step).any():
            wrong.append("the step has masks of others")
        measured = f"{plural(self.matrices, 'matrix')} with masks of their own, by seed, step and sequence; none in an evaluation"
        return Finding.of(GATE, not wrong, "; ".join(wrong) or measured, BOUND, "; ".join(wrong))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Compare bit by bit."""
    return a.tobytes() == b.tobytes()
