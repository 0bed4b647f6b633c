#!/usr/bin/env python
"""Measure what the gates of a run cost: CPU seconds of each, of all that the demo job takes, and that they change no bit.

Example: python tools/gate_cost.py --record bench/gates.json

A short job is trained with the gates and without them: losses, evaluations and the last weights must have the same bits.
Then the demo job is trained with a clock around every gate: CPU time of all threads, and of the processes that gates
start, so that a busy machine matters little. With fewer --steps than the demo has, the share of the whole demo is computed:
steps cost what these cost, gates that are asked in every step as well, and those that are asked once no more. Exit code 9
when the gates cost more than their share.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from apr.checkpoints.apr2 import read_apr
from apr.cli.main import main as apr
from apr.common.atomic import write_json
from apr.common.events import Event
from apr.common.host import cpu_name
from apr.training import loop, run

MAX_SHARE, DEMO_STEPS = 0.05, 3500
# Asked in every step, or in every tenth.
OF_STEPS = (
    "StepGates",
    "LearningRateGate",
    "DataGate",
    "MixtureGate",
    "LogGates",
    "PlaceholderGate",
    "VerdictFile",
    "WitnessGate",
)
# Of the training room, and for gates alone.
MEASURING = ("SpotChecks", "FormulaChecks")
# Figures of a line of the log that do not depend on the clock.
BITS = ("step", "train_loss", "grad_norm", "weight_norm", "lr", "tokens_seen", "val_loss", "val_tokens")


def is_gate(observer: Any) -> bool:
    """Tell an observer that measures for gates."""
    kind = type(observer)
    return kind.__module__.startswith("apr.evidence") or kind.__name__ in MEASURING


def cpu_seconds() -> float:
    """CPU time of this process and of those that it waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


class Clock:
    """Adds up CPU time by gate observer; what an observer sets off belongs to it."""

    def __init__(self, with_gates: bool = True) -> None:
        self.seconds: dict[str, float] = {}
        self.with_gates, self._depth = with_gates, 0

    def emit(self, observers: Any, event: Event) -> None:
        """Deliver an event as events.emit does, timed; gates are left out where they are not wanted."""
        for observer in observers:
            hear = getattr(observer, event.method, None)
            if hear is None or (is_gate(observer) and not self.with_gates):
                continue
            if is_gate(observer):
                self.timed(type(observer).__name__, hear)(event)
            else:
                hear(event)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a call so that its time counts."""

        def wrapped(*args: Any) -> Any:
            start, self._depth = cpu_seconds(), self._depth + 1
            try:
                return call(*args)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds[name] = self.seconds.get(name, 0.0) + cpu_seconds() - start

        return wrapped


def train(folder: Path, steps: int, with_gates: bool) -> tuple[Clock, float]:
    """Train the demo job with a number of steps; returns the clock of its gates and all CPU seconds."""
    clock = Clock(with_gates)
    names = ("settings_arrive", "_judge_inputs", "judge_end")
    kept = {name: getattr(run, name) for name in names}
    right, loop.emit = loop.emit, clock.emit
    for name, call in kept.items():
        is_left_out = name == "judge_end" and not with_gates
        setattr(run, name, (lambda *a: None) if is_left_out else clock.timed(name.strip("_"), call))
    start = cpu_seconds()
    try:
        code = apr(["pretrain", "--run-dir", str(folder), "--num-steps", str(steps), "--json"])
    finally:
        loop.emit = right
        for name, call in kept.items():
            setattr(run, name, call)
    if code:
        raise SystemExit(f"the demo job ended with exit code {code}")
    return clock, cpu_seconds() - start


def bits_of(folder: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Read what must not depend on gates: figures of the log, and the last weights."""
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = [{k: x[k] for k in BITS if k in x} for x in lines if "train_loss" in x or "val_loss" in x]
    weights = read_apr(max((folder / "ckpt").glob("epoch-*.apr"))).tensors
    return figures, {name: np.asarray(x).tobytes() for name, x in weights.items()}


def main() -> int:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=DEMO_STEPS, help="steps of the run that is timed (default: the demo's)"
    )
    parser.add_argument(
        "--compared-steps", type=int, default=150, help="steps of the runs whose bits are compared"
    )
    parser.add_argument("--record", metavar="FILE", type=Path, help="write the figures as JSON")
    f = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="apr-gates-") as name:
        folder = Path(name)
        os.environ["APR_CACHE"] = str(folder / "cache")
        found = []
        bare = 0.0
        for kind in ("with", "without"):
            _, bare = train(folder / kind, f.compared_steps, kind == "with")
            found.append(bits_of(folder / kind))
        # Last: the corpus is encoded by then, as it is in every run but the first.
        clock, total = train(folder / "timed", f.steps, with_gates=True)
        gates = json.loads((folder / "timed" / "verdict.json").read_text())["gates"]
    is_same, spent = found[0] == found[1], sum(clock.seconds.values())
    # Of what the run takes without them.
    rest, more = total - spent, DEMO_STEPS - f.steps
    a_step = (rest - bare) / max(1, f.steps - f.compared_steps)
    in_steps = sum(clock.seconds.get(name, 0.0) for name in OF_STEPS) / f.steps
    share = (spent + more * in_steps) / (rest + more * a_step)
    by_cost = dict(sorted(clock.seconds.items(), key=lambda item: -item[1]))
    record = {
        "format": "apr-gates-1",
        "date": datetime.date.today().isoformat(),
        "processor": cpu_name(),
        "steps": f.steps,
        "cpu_seconds": round(total, 1),
        "gates_cpu_seconds": round(spent, 2),
        "cpu_seconds_of_a_step": round(a_step, 4),
        "of_it_gates": round(in_steps, 5),
        "share_of_the_demo": round(share, 4),
        "same_bits": is_same,
        "by_observer": {name: round(s, 3) for name, s in by_cost.items()},
        "by_gate_seconds": {g["id"]: g["seconds"] for g in gates if g["seconds"] >= 0.01},
    }
    print(json.dumps(record, indent=1))
    if f.record:
        write_json(f.record, record)
    return 0 if is_same and share <= MAX_SHARE else 9


if __name__ == "__main__":
    sys.exit(main())
