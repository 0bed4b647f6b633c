"""The stored runs of the last release: green as they are, red by every fault in the mathematics, and by hands."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

import run_store as stored
from apr import backends
from apr.common.files import sha256_of
from apr.common.finding import FAIL, PASS, SKIPPED
from apr.model.lora import LoraConfig
from apr.model.optim import AdamW
from apr.model.schedule import Schedule
from apr.model.transformer import Model
from apr.training import loop
from apr.verify.replay import replay

cpu = backends.get("cpu")
RUNS = sorted(stored.JOBS)


def red(findings):
    return {f.name: f.measured for f in findings if f.verdict == FAIL}


@pytest.mark.parametrize("name", RUNS)
def test_a_stored_run_is_what_this_version_computes(name):
    findings = stored.check(name)
    assert red(findings) == {}, "\n".join(red(findings).values()) + (
        "\nIf that is meant: python tools/stored_runs.py --because 'what changed, and why'"
    )
    skipped = {f.name for f in findings if f.verdict == SKIPPED}
    assert skipped <= {"signature"}


@pytest.mark.parametrize("name", RUNS)
def test_another_processor_has_room_for_rounding_alone(name):
    """The bound of other processors and packages, asked here: what is equal in bits is within it."""
    finding = replay(stored.record(name, stored.CLOSE))
    assert (finding.verdict, red([finding])) == (PASS, {})
    assert f"within {stored.CLOSE:g}" in finding.bound


def test_they_are_made_by_the_tool_alone():
    made = json.loads((stored.STORED / stored.MADE).read_text())
    assert all(entry["because"] and entry["changed"].keys() == stored.JOBS.keys() for entry in made["made"])
    for name in RUNS:
        assert sha256_of(stored.STORED / name / "evidence.json")[0] == made["evidence"][name], name


def test_they_are_small_and_say_nothing_of_the_machine_that_made_them():
    for name in RUNS:
        files = [p for p in (stored.STORED / name).rglob("*") if p.is_file()]
        assert sum(p.stat().st_size for p in files) < 1.2e6
        for path in files:
            found = re.findall(rb"/(?:home|root|work|tmp|usr|opt)/[\w./-]+", path.read_bytes())
            assert all(p.startswith(str(stored.PLACE).encode()) for p in found), (path.name, found[:3])


# Faults in the mathematics: each turns the runs named red, also by the bound of other processors.


def wrong_epsilon(m):
    right = Model.__init__
    m.setattr(
        Model,
        "__init__",
        lambda self, cfg, *a, **k: right(self, dataclasses.replace(cfg, rms_norm_eps=1e-5), *a, **k),
    )


def wrong_decay(m):
    right = loop.hyper_parameters
    m.setattr(loop, "hyper_parameters", lambda kind, s: {**right(kind, s), "weight_decay": 0.09})


def a_lost_bias(m):
    right = cpu.linear_fwd
    m.setattr(cpu, "linear_fwd", lambda y, x, w, b: right(y, x, w, None))


def rope_of_another_base(m):
    right = Model.__init__
    m.setattr(
        Model,
        "__init__",
        lambda self, cfg, *a, **k: right(self, dataclasses.replace(cfg, rope_theta=9e5), *a, **k),
    )


def no_clipping(m):
    right = loop.hyper_parameters
    m.setattr(loop, "hyper_parameters", lambda kind, s: {**right(kind, s), "grad_clip": 1e9})


def a_step_too_few_in_the_correction(m):
    right = AdamW.step

    def step(self, lr, **options):
        self.steps += 1
        right(self, lr, **options)
        self.steps -= 1

    m.setattr(AdamW, "step", step)


def a_bias_without_gradient(m):
    right = cpu.linear_bwd
    m.setattr(cpu, "linear_bwd", lambda dx, dw, db, *more: right(dx, dw, None, *more))


def one_percent_too_much_of_a_gradient(m):
    right = cpu.linear_bwd
    m.setattr(
        cpu, "linear_bwd", lambda dx, dw, db, dy, x, *more: right(dx, dw, db, dy, x * np.float32(1.01), *more)
    )


def warm_up_one_step_late(m):
    right = Schedule.__call__
    m.setattr(
        Schedule, "__call__", lambda self, step: right(self, max(1, step - (step <= self.warmup_steps)))
    )


def another_scale_of_adapters(m):
    m.setattr(LoraConfig, "scale_of", lambda self, module: 1.01 * self.alpha / self.rank)


FAULTS = {
    wrong_epsilon: RUNS,
    wrong_decay: ["plain", "instruct", "resumed"],
    a_lost_bias: ["plain", "instruct"],
    rope_of_another_base: RUNS,
    no_clipping: ["plain", "resumed"],
    a_step_too_few_in_the_correction: RUNS,
    a_bias_without_gradient: ["plain", "instruct"],
    one_percent_too_much_of_a_gradient: ["plain", "instruct", "resumed"],
    warm_up_one_step_late: RUNS,
    another_scale_of_adapters: ["lora"],
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_in_the_mathematics_turns_them_red(fault, monkeypatch):
    fault(monkeypatch)
    for name in FAULTS[fault]:
        assert replay(stored.record(name, stored.CLOSE)).verdict == FAIL, name
