"""Runs that had ended: made longer where no past learning rate changes, and left as they are where nothing is to do."""

from __future__ import annotations

import json
import shutil

import pytest

from apr.evidence.seal import compare
from apr.training.rundir import RunDir
from crashing import Job, differences, failed_checks, go_on, metrics, quicken, start, stop_after


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """8 steps, an evaluation after every 4, a state after every 2."""
    return Job(tmp_path_factory.mktemp("longer") / "job", 8, 4).make()


@pytest.fixture(autouse=True)
def quick(job, monkeypatch):
    quicken(monkeypatch, job.folder / "cache")


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def test_a_constant_rate_goes_on_to_the_bits_of_a_run_that_was_longer_from_the_start(job, run, capsys):
    whole = run.with_name("whole")
    assert start(job, whole, "--schedule", "constant", "--num-steps", 16) == 0
    assert start(job, run, "--schedule", "constant") == 0
    assert go_on(run, "--num-steps", 16) == 0
    assert differences(whole, run) == []
    assert failed_checks(capsys, run) == {}
    assert json.loads((run / "config.json").read_text())["settings"]["num_steps"] == 16
    assert go_on(run) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_an_end_between_evaluations_stays_an_evaluation(job, run, monkeypatch, capsys):
    """Also when the longer run is stopped, and goes on from a state before that end."""
    assert start(job, run, "--schedule", "constant", "--num-steps", 6) == 0
    whole = run.with_name("whole")
    shutil.copytree(run, whole)
    assert go_on(whole, "--num-steps", 10) == 0
    assert [m["step"] for m in metrics(whole) if "val_loss" in m] == [0, 4, 6, 8, 10]
    assert failed_checks(capsys, whole) == {}
    with monkeypatch.context() as m:
        stop_after(m, 7)
        assert go_on(run, "--num-steps", 10) == 130
    for state in RunDir(run).states()[-2:]:
        state.unlink()
    assert not RunDir(run).states() or RunDir(run).states()[-1].stem < "step-000006"
    assert go_on(run) == 0
    assert differences(whole, run) == []


def test_wsd_goes_on_before_its_decay_begins(job, run, monkeypatch, capsys):
    """Its last fifth decays: of 16 steps from step 14 on."""
    whole, more = run.with_name("whole"), ["--schedule", "wsd", "--num-steps"]
    assert start(job, whole, *more, 24) == 0
    with monkeypatch.context() as m:
        stop_after(m, 13)
        assert start(job, run, *more, 16) == 130
    late = run.with_name("late")
    shutil.copytree(run, late)
    assert go_on(run, "--num-steps", 24) == 0
    assert differences(whole, run) == []
    assert go_on(late) == 0
    capsys.readouterr()
    before = (late / "config.json").read_bytes()
    assert go_on(late, "--num-steps", 24) == 5
    err = capsys.readouterr().err
    assert "has taken step 14 at a learning rate of" in err
    assert "its decay has begun" in err
    assert "--init" in err
    assert (late / "config.json").read_bytes() == before
    assert compare(late) == []


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_rate_that_follows_from_the_number_of_steps_is_refused(job, run, kind, capsys):
    assert start(job, run, "--schedule", kind, "--warmup-steps", 2) == 0
    capsys.readouterr()
    assert go_on(run, "--num-steps", 16) == 5
    err = capsys.readouterr().err
    assert "--num-steps 16" in err
    assert f"a {kind} schedule follows from the number of steps" in err
    assert compare(run) == []


def test_within_the_warm_up_any_run_can_be_made_longer(job, run, monkeypatch):
    whole = run.with_name("whole")
    assert start(job, whole, "--warmup-steps", 4, "--num-steps", 12) == 0
    with monkeypatch.context() as m:
        stop_after(m, 3)
        assert start(job, run, "--warmup-steps", 4) == 130
    assert go_on(run, "--num-steps", 12) == 0
    assert differences(whole, run) == []


def test_lost_steps_are_no_witnesses_of_a_longer_run(job, run, monkeypatch):
    """A crash left lines behind the state, of a learning rate that the longer run does not have."""
    whole = run.with_name("whole")
    assert start(job, whole, "--warmup-steps", 2, "--num-steps", 12) == 0
    with monkeypatch.context() as m:
        stop_after(m, 3)
        assert start(job, run, "--warmup-steps", 2) == 130
    RunDir(run).states()[-1].unlink()
    assert metrics(run)[-1]["step"] == 3
    assert go_on(run, "--num-steps", 12) == 0
    assert differences(whole, run) == []


def test_fewer_steps_than_were_taken_are_refused(job, run, capsys):
    assert start(job, run, "--schedule", "constant") == 0
    assert go_on(run, "--num-steps", 7) == 5
    assert "has taken 8 steps already" in capsys.readouterr().err


def test_a_run_that_ended_early_is_not_made_longer(job, run, capsys):
    more = ["--schedule", "constant", "--target-val-loss", 100, "--min-epochs", 1]
    assert start(job, run, *more) == 0
    assert metrics(run)[-1]["step"] == 4
    assert go_on(run, "--num-steps", 16) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out
    assert "it would end at step 4 again" in out
    assert compare(run) == []


def test_nothing_is_done_to_a_run_that_has_ended(job, run, capsys):
    assert start(job, run) == 0
    was = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in run.rglob("*")}
    whole = json.loads((run / "verdict.json").read_text())
    capsys.readouterr()
    assert go_on(run) == 0
    out = capsys.readouterr().out
    assert "nothing to do: this run has ended" in out
    assert out.rstrip().endswith("DONE")
    assert go_on(run, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["status"], said["verdict"], said["steps"]) == ("DONE", "PASS", 8)
    assert said["val_loss"] == whole["val_loss"]
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in run.rglob("*")} == was


def test_what_changed_in_a_run_that_has_ended_is_said(job, run, capsys):
    assert start(job, run) == 0
    (run / "loss.txt").write_text("x")
    assert go_on(run) == 0
    assert "loss.txt was added" in capsys.readouterr().out
    assert compare(run) == []


def test_bounds_that_are_given_anew_are_judged(job, run, capsys):
    assert start(job, run) == 0
    capsys.readouterr()
    assert go_on(run, "--bounds", "speed=3") == 0
    assert "nothing to do" not in capsys.readouterr().out
    assert json.loads((run / "verdict.json").read_text())["bounds_changed"] == {"speed": 3.0}
