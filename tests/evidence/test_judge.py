"""The judge of a log: pure, equal line by line and all at once, and red at every fault that a log can show."""

from __future__ import annotations

import copy
import math
from contextlib import suppress

import pytest

from apr.common.errors import Aborted
from apr.common.events import Evaluated, Measured, Started
from apr.common.finding import FAIL, PASS, SUSPECT
from apr.common.units import bits_per_byte
from apr.evidence.gates import Gates
from apr.evidence.judge import Facts, epoch_before, judge, target
from apr.evidence.observers import LogGates, PlaceholderGate

FACTS = Facts(400, True, False, 5.0, 1000, 3000, None, {})
STEPS = 4  # in an epoch


def evaluation(step, loss):
    bits = bits_per_byte(loss, FACTS.val_tokens, FACTS.val_bytes)
    return {"step": step, "val_loss": loss, "val_bits_per_byte": bits, "val_loss_stderr": 0.01}


def a_log(epochs=3):
    """Lines as a sound run writes them: losses that fall, an evaluation after each epoch, a spot check."""
    log = [evaluation(0, 6.0), {"step": 1, "spot_check": "agree"}]
    for step in range(1, epochs * STEPS + 1):
        loss = 6.0 - 0.01 * step
        norms = {"grad_norm": 1.0, "weight_norm": 9.0}
        speed = {"tokens_seen": 10 * step, "tokens_per_sec": 5.0, "wall_ms": 2000.0}
        log.append({"step": step, "train_loss": loss, **norms, **speed})
        if step % STEPS == 0:
            log.append(evaluation(step, loss + 0.01))
    return log


def kept(findings):
    """What gates keep of findings: {gate: (verdict, measured, evaluations)}."""
    gates = Gates({})
    for f in findings:
        with suppress(Aborted):
            gates.judge(f, f.where)
    return {f.name: (f.verdict, f.measured, f.where, gates.evaluations[f.name]) for f in gates.in_order()}


def test_a_sound_log_passes_and_is_not_changed():
    log = a_log()
    before = copy.deepcopy(log)
    findings = judge(log, FACTS)
    assert {f.verdict for f in findings} == {PASS}
    assert {f.name for f in findings} == {
        "run.finite", "run.placeholder", "run.log", "run.diverged", "run.val-below-train", "end.plausible", "end.learning",
    }  # fmt: skip
    assert log == before
    assert judge(log, FACTS) == findings


@pytest.mark.parametrize("begun", [0, 1, 5, 9])
def test_a_run_judges_line_by_line_what_verify_judges_at_once(begun):
    """Also a run that is resumed, and although it keeps but a part of the log."""
    log = a_log()
    gates = Gates({})
    live = LogGates(gates, FACTS, lambda: log[:begun], list)
    for f in judge(log[:begun], FACTS):
        gates.judge(f, f.where)
    last = PlaceholderGate(live)
    live.started(Started(0, 12))
    for line in log[begun:]:
        if "spot_check" in line:
            continue
        live.measured(Measured(line))
        last.measured(Measured(line))
        if "val_loss" in line:
            live.evaluated(Evaluated(line, []))
    found = {f.name: (f.verdict, f.measured, f.where, gates.evaluations[f.name]) for f in gates.in_order()}
    assert found == kept(judge(log, FACTS))
    assert len(live.log) <= 6


def at(log, step, kind="train_loss"):
    return next(line for line in log if line["step"] == step and kind in line)


def loss_is_nan(log):
    at(log, 3)["train_loss"] = math.nan


def weights_are_infinite(log):
    at(log, 12)["weight_norm"] = math.inf


def losses_are_equal(log):
    for step in range(2, 7):
        at(log, step)["train_loss"] = 5.5


def a_loss_is_zero(log):
    at(log, 5)["train_loss"] = 0.0


def evaluation_is_nan(log):
    at(log, 8, "val_loss")["val_loss"] = math.nan


def first_epoch_is_worse_than_a_guess(log):
    at(log, 4, "val_loss").update(evaluation(4, 6.7))


def a_later_epoch_doubles(log):
    at(log, 8, "val_loss").update(evaluation(8, 12.5))


def validation_is_known(log):
    at(log, 8, "val_loss").update(evaluation(8, 5.0))


def nobody_reaches_this(log):
    at(log, 12, "val_loss").update(evaluation(12, 0.3))


def bits_are_of_another_loss(log):
    at(log, 8, "val_loss")["val_bits_per_byte"] *= 1.01


def bits_have_another_base(log):
    for line in log:
        if "val_loss" in line:
            line["val_bits_per_byte"] *= math.log(2) / math.log(10)


def the_speed_is_of_other_tokens(log):
    at(log, 6)["tokens_per_sec"] = 6.0


def tokens_are_counted_twice(log):
    for step in range(3, 13):
        at(log, step)["tokens_seen"] += 10


def few_tokens_teach_much(log):
    for line in log:
        if "train_loss" in line:
            line["train_loss"] -= 2
    at(log, 12, "val_loss").update(evaluation(12, 4.0))


FAULTS = {
    loss_is_nan: ("run.finite", FAIL, 3),
    weights_are_infinite: ("run.finite", FAIL, 12),
    losses_are_equal: ("run.placeholder", FAIL, 6),
    a_loss_is_zero: ("run.placeholder", FAIL, 5),
    evaluation_is_nan: ("run.finite", FAIL, 8),
    first_epoch_is_worse_than_a_guess: ("run.diverged", FAIL, 4),
    a_later_epoch_doubles: ("run.diverged", FAIL, 8),
    validation_is_known: ("run.val-below-train", SUSPECT, 8),
    nobody_reaches_this: ("end.plausible", SUSPECT, 12),
    bits_are_of_another_loss: ("run.log", FAIL, 8),
    bits_have_another_base: ("run.log", FAIL, 12),
    the_speed_is_of_other_tokens: ("run.log", FAIL, 6),
    tokens_are_counted_twice: ("run.log", FAIL, 3),
    few_tokens_teach_much: ("end.learning", SUSPECT, 12),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_in_the_log_is_named(fault):
    gate, verdict, step = FAULTS[fault]
    log = a_log()
    fault(log)
    found = kept(judge(log, FACTS))[gate]
    assert (found[0], found[2]) == (verdict, step), found


def test_answers_have_no_least_loss_but_their_bits_are_compared():
    facts = Facts(400, False, True, 5.0, 1000, 3000, None, {})
    log = a_log()
    nobody_reaches_this(log)
    assert kept(judge(log, facts))["end.plausible"][0] == "SKIPPED"
    bits_are_of_another_loss(log)
    found = kept(judge(log, facts))
    assert (found["end.plausible"][0], found["run.log"][0]) == ("SKIPPED", FAIL)


def test_an_epoch_is_what_lies_between_two_evaluations():
    log = a_log()
    steps, before = epoch_before(log, len(log) - 1)
    assert [line["step"] for line in steps] == [9, 10, 11, 12]
    assert before is not None
    assert before["step"] == 8
    assert epoch_before(log, 0) == ([], None)


def test_the_target():
    assert target(evaluation(3, 2.0), 2.0).verdict == PASS
    assert target(evaluation(3, 2.1), 2.0).verdict == FAIL
