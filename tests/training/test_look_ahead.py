"""Steps whose gradients are asked for before the numbers of the step before are read: nobody may notice."""

from __future__ import annotations

import json
import math
import signal

import numpy as np
import pytest

from apr import backends
from apr.checkpoints.apr2 import read_apr
from apr.common.events import Saved
from apr.evidence import observers
from apr.model.optim import AdamW
from apr.training.loop import Trainer
from run_cases import cache, is_of_the_run, place, pretrain  # noqa: F401  cache and place are fixtures

cpu = backends.get("cpu")
LONG = ["--num-steps", "24", "--eval-every", "12", "--save-every", "8", "--spot-check", "7"]
TIMES = ("wall_ms", "tokens_per_sec", "time")


def log_of(run):
    """The lines of a log without what depends on the clock."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def bits_of(run):
    state = max((run / "ckpt" / "state").glob("step-*.apr"))
    return {name: np.asarray(x).tobytes() for name, x in read_apr(state).tensors.items()}


@pytest.fixture
def heard(monkeypatch):
    """Events of all runs, and the steps that were computed ahead. Gates look at few steps."""
    events, ahead = [], []
    emit, look = Trainer.emit, Trainer._look_ahead

    def emitted(self, event):
        # Saves end on a thread, whenever they do.
        if not isinstance(event, Saved):
            events.append((type(event).__name__, getattr(event, "step", None), self.model.tokens_trained))
        emit(self, event)

    def looked(self, step):
        look(self, step)
        ahead.extend([step + 1] * (self._ahead == step + 1))

    monkeypatch.setattr(Trainer, "emit", emitted)
    monkeypatch.setattr(Trainer, "_look_ahead", looked)
    monkeypatch.setattr(observers, "FOLLOWED_STEPS", 2)
    monkeypatch.setattr(observers, "FOLLOW_EVERY", 5)
    return events, ahead


def ahead_of_time(monkeypatch):
    monkeypatch.setattr(cpu, "asynchronous", True)


@pytest.mark.parametrize("more", [[], ["--no-graph", "--on-exhausted", "stop"]], ids=["recorded", "op by op"])
def test_log_events_and_weights_are_those_of_steps_one_by_one(place, tmp_path, monkeypatch, heard, more):
    events, ahead = heard
    assert pretrain(place, tmp_path / "plain", *LONG, *more) == 0
    one_by_one = events.copy()
    assert not ahead
    events.clear()
    ahead_of_time(monkeypatch)
    assert pretrain(place, tmp_path / "ahead", *LONG, *more) == 0
    assert len(ahead) > 10
    # Before steps that gates or spot checks look at, and behind evaluations, nothing is computed.
    assert not {1, 2, 6, 8, 11, 13, 15, 16, 21, 22} & set(ahead)
    assert events == one_by_one
    assert log_of(tmp_path / "ahead") == log_of(tmp_path / "plain")
    assert bits_of(tmp_path / "ahead") == bits_of(tmp_path / "plain")


def test_a_run_that_is_stopped_goes_on_bit_for_bit(place, tmp_path, monkeypatch, heard):
    assert pretrain(place, tmp_path / "plain", *LONG) == 0
    ahead_of_time(monkeypatch)
    right, stopped = Trainer._measure, []

    def measure(self, *a):
        # When the gradients of the next step are there, and its batch is not counted.
        if self._ahead == 10 and not stopped:
            stopped.append(self._ahead)
            signal.raise_signal(signal.SIGINT)
        return right(self, *a)

    monkeypatch.setattr(Trainer, "_measure", measure)
    assert pretrain(place, tmp_path / "run", *LONG) == 130
    assert stopped
    assert pretrain(place, tmp_path / "run", *LONG, "--resume") == 0
    assert bits_of(tmp_path / "run") == bits_of(tmp_path / "plain")


def test_the_step_of_a_loss_that_is_no_number_is_named(place, tmp_path, monkeypatch, heard, capsys):
    right = AdamW.step

    def step(self, lr, **options):
        right(self, lr, **options)
        if self.steps == 9 and is_of_the_run(self):
            self.w[0] = self.master[0] = math.nan

    monkeypatch.setattr(AdamW, "step", step)
    errors = []
    for name in ("plain", "ahead"):
        assert pretrain(place, tmp_path / name, *LONG) == 6
        errors.append(capsys.readouterr().err.replace(name, "RUN"))
        ahead_of_time(monkeypatch)
    assert heard[1]
    assert errors[0] == errors[1]
    assert log_of(tmp_path / "plain") == log_of(tmp_path / "ahead")


def test_gradients_that_gates_spoil_too_late_are_seen(place, tmp_path, monkeypatch, heard):
    ahead_of_time(monkeypatch)
    monkeypatch.setattr(observers.StepGates, "computes_before", lambda self, step: False)
    assert pretrain(place, tmp_path / "run", *LONG) == 6
    rows = {
        g["id"]: g["verdict"] for g in json.loads((tmp_path / "run" / "verdict.json").read_text())["gates"]
    }
    assert rows["run.gradients"] == "FAIL"
