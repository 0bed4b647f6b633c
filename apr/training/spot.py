"""Spot checks while a run trains: a piece of the current batch through the float64 reference, before its step."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from ..bisect.golden import golden_steps
from ..bisect.spot import spot_check
from ..bisect.upload import tables
from ..common.events import Event, FormulasChecked, SpotChecked, StepBegun
from ..model.preferences import without_pairs
from ..model.transformer import Model
from .metrics import MetricsLog

# Positions of a piece before its first target.
CONTEXT_TOKENS = 16


class SpotTimes:
    """Steps of spot checks, for ranks that make none."""

    def __init__(self, every: int) -> None:
        self.every = every

    def computes_before(self, step: int) -> bool:
        """Tell whether a check is due, other than in the first step."""
        return self.every > 0 and (step - 1) % self.every == 0


class SpotChecks(SpotTimes):
    """Checks before the first step of a process, and then every so many steps; 0: the first only, -1: none."""

    def __init__(self, model: Model, every: int, log: MetricsLog, emit: Callable[[Event], None]) -> None:
        super().__init__(every)
        self.model, self.log, self.emit = model, log, emit
        self.has_checked = False

    def step_begun(self, e: StepBegun) -> None:
        """Compare the model with the reference, where a check is due. Raises Aborted through its observers."""
        if self.every < 0 or (self.has_checked and not self.computes_before(e.step)):
            return
        self.has_checked, start = True, time.perf_counter()
        # Few positions are checked, and the check must see a loss.
        start_token = max(0, int(np.argmax(e.targets[0] >= 0)) - CONTEXT_TOKENS)
        ids, targets = (x[: self.model.batch, start_token:] for x in (e.ids, e.targets))
        with without_pairs(self.model):
            report = spot_check(self.model, ids, targets, f"the model before step {e.step}")
        seconds = time.perf_counter() - start
        self.log.write(
            step=e.step,
            spot_check="skipped" if not report.rows else "agree" if report.agree else "differ",
            arrays=len(report.rows),
            worst_of_tolerance=max((r.ratio for r in report.rows), default=0.0),
            wall_ms=1e3 * seconds,
        )
        self.emit(SpotChecked(e.step, report, seconds))


class FormulaChecks:
    """Replays the golden steps of the model's family before the first step of a process, and checks the rope tables."""

    def __init__(self, model: Model, emit: Callable[[Event], None]) -> None:
        self.model, self.emit, self.has_checked = model, emit, False

    def step_begun(self, e: StepBegun) -> None:
        """Compare with what stock models computed. Raises Aborted through its observers."""
        if not self.has_checked:
            self.has_checked, start = True, time.perf_counter()
            rows = [*tables(self.model), *golden_steps(self.model.be, self.model.cfg.family)]
            self.emit(FormulasChecked(e.step, rows, time.perf_counter() - start))
