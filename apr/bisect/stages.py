"""Stages of a bisection: configuration, data, upload, every op of a training step, then state.

Each stage gives comparisons; run() puts them into a Report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..backends import reference
from ..backends.cuda.ops import noted_numbers
from ..model.config import ModelConfig
from ..model.cost import memory
from ..model.optim import OPTIMIZERS
from ..model.params import Layout
from .golden import golden_steps
from .optimizer_steps import optimizer_steps
from .passes import forced, free
from .report import Report
from .side import Batch, Side
from .state import state
from .upload import all_used, borders, configuration, kernels_given, upload
from .watch import Forced, Free


@dataclass(frozen=True)
class Plan:
    """Parts of run(); stop: end at the first stage that finds a fault."""

    free: bool = True
    backward: bool = True
    optimizer: bool = True
    state: bool = True
    stop: bool = False


def host_bytes(side: Side, shape: tuple[int, int], plan: Plan) -> int:
    """Bound the bytes of main memory that run() takes beside the side's own."""
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
        for name in ("upload", "forward", "loss", "backward", "optimizer", "state", "formulas"):
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
    with stage("formulas"):
        report.add(golden_steps(side.backend, side.cfg.family))
    if rounding := report.piled_up:
        worst = max(rounding, key=lambda r: r.ratio)
        report.notes.append(
            f"rounding piled up to {worst.error} ({worst.place}); every op alone is within its tolerance, so it is no fault"
        )
    return report
