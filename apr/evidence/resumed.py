"""Compare a run that goes on with the process that was stopped (gate before.resumed)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..common.events import Line, Measured, WeightsReady
from ..common.finding import Finding
from ..common.provenance import code_sha256
from ..common.units import plural
from .gates import Gates
from .subject import Subject

GATE = "before.resumed"
# Of a device: what the last bit of a number depends on.
DECIDING = (
    "backend",
    "gpu",
    "cpu",
    "kernels",
    "threads",
    "cuda",
    "cublaslt",
    "matmul_algorithms",
    "products",
    "attention",
    "cross_entropy",
)
# Of a loss up to OTHER_STEPS behind a state, where another device or version computes it.
OTHER_STEP, OTHER_STEPS = {"float32": 1e-3, "bfloat16": 2e-2}, 20
COMPARED = ("train_loss", "grad_norm", "lr", "tokens_seen")


def computes_the_same(config: Mapping[str, Any], now: Mapping[str, Any], code: str) -> bool:
    """Compare code and device of a run with those of now, for all processes that it went on in."""
    was = config.get("device") or {}
    used = [was, *was.get("went_on_with", [])]
    # A process that has computed in bfloat16 too names its products; no bit of float32 follows from them.
    is_low = (config.get("settings") or {}).get("dtype") == "bfloat16"
    decide = [k for k in DECIDING if is_low or k != "products"]
    is_device = all(device.get(k) == now.get(k) for k in decide for device in used)
    return is_device and config.get("code_sha256") == code


def as_saved(e: WeightsReady) -> Finding:
    """Compare weights, moments and what comes next with the saved state. Older states do not say what comes next."""
    wrong = [
        f"{key} is {e.found.get(key)}, the state says {x}"
        for key, x in e.expected.items()
        if e.found.get(key) != x
    ]
    if e.saved not in (e.sha256, None):
        wrong.insert(0, "weights and moments are not those that were saved")
    measured = f"weights and moments {e.sha256[:12]} on the device, {len(e.expected)} facts of the next step"
    return Finding.of(GATE, not wrong, measured, f"{(e.saved or 'unknown')[:12]}, as saved", "; ".join(wrong))


class WitnessGate:
    """Compares steps that are taken again with the lines that the stopped process had logged of them. Raises Refused.

    witnesses: lines of the log behind the state, by step. config: reads config.json"""

    def __init__(
        self,
        subject: Subject,
        gates: Gates,
        witnesses: Callable[[], Mapping[int, Line]],
        config: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.subject, self.gates, self.witnesses, self.config = subject, gates, witnesses, config
        self.before, self.steps, self.is_same = "", 0, False

    def measured(self, e: Measured) -> None:
        """Compare a step with its witness."""
        step, was = e.line["step"], self.witnesses().get(e.line["step"])
        if "train_loss" not in e.line or was is None or not was.keys() >= set(COMPARED):
            return
        if not self.before:
            self.before = self.gates.findings[GATE].measured
            self.is_same = computes_the_same(self.config(), self.subject.backend.describe(), code_sha256())
        if not self.is_same and self.steps >= OTHER_STEPS:
            return
        tolerance = 0.0 if self.is_same else OTHER_STEP[self.subject.model.dtype]
        bound = "the lines of the log behind the state" + ("" if self.is_same else f", within {tolerance:g}")
        for key in COMPARED:
            if not abs(e.line[key] - was[key]) <= tolerance * abs(was[key]):
                why = f"{key} is {e.line[key]!r}; before the run was stopped, this step had {was[key]!r}"
                self.gates.judge(Finding.of(GATE, False, f"{key} = {e.line[key]!r}", bound, why), step)
        self.steps += 1
        measured = f"{self.before}; {plural(self.steps, 'step')} taken again as before"
        self.gates.judge(Finding.of(GATE, True, measured, bound), step)
