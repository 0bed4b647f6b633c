"""Older states that are kept for `apr verify --replay`: which, how much disk they take, and what they let it see."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from apr.checkpoints.apr2 import read_apr, write_apr
from apr.checkpoints.state import saved_hashes
from apr.evidence.seal import seal
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.training import disk, ladder
from apr.training.evaluate import epoch_facts
from apr.training.inputs import open_inputs
from apr.training.rundir import RunDir, step_of
from apr.training.settings import Settings
from crashing import Job, differences, failed_checks, go_on, quicken, start, stop_after


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """16 steps, an evaluation after every 8, a state after every 2."""
    return Job(tmp_path_factory.mktemp("ladder") / "job", 16, 8).make()


@pytest.fixture(autouse=True)
def quick(job, monkeypatch):
    quicken(monkeypatch, job.folder / "cache")


@pytest.fixture(scope="module")
def whole(job):
    """A run that keeps all states but the latest in its ladder."""
    with pytest.MonkeyPatch.context() as m:
        quicken(m, job.folder / "cache")
        assert start(job, job.folder / "whole") == 0
    return job.folder / "whole"


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def steps(paths):
    return [step_of(p) for p in paths]


@pytest.mark.parametrize(
    ("fit", "kept"), [(9, [2, 4, 6, 8, 10, 12]), (3, [4, 8, 12]), (2, [6, 12]), (1, [12]), (0, [])]
)
def test_as_many_as_fit_are_spread_over_the_run(fit, kept):
    s, size = Settings(num_steps=16, save_every=2, ladder_mib=fit * 7), 7 << 20
    apart = ladder.spacing(s, size)
    assert [step for step in range(2, 13, 2) if apart and step % apart == 0] == kept
    assert ladder.kept(s, size) == len(kept)
    assert ladder.most_rungs(s, size) == fit
    assert ladder.spacing(dataclasses.replace(s, num_steps=4), size) == 0


@pytest.mark.parametrize(("fit", "kept"), [(3, [4, 8, 12]), (0, [])])
def test_they_take_the_disk_that_was_said(job, run, monkeypatch, fit, kept):
    size = 3 * 4 * Layout(dataclasses.replace(PRESETS["llama-tiny"], vocab_size=400)).size
    monkeypatch.setattr(ladder, "MIB", fit * size)
    assert start(job, run, "--ladder-mib", 1) == 0
    assert steps(RunDir(run).rungs()) == kept
    assert steps(RunDir(run).states()) == [14, 16]
    need = disk.need(open_inputs(Settings(**json.loads((run / "config.json").read_text())["settings"])))
    assert need.rungs == len(kept)
    assert ("older for replay" in need.in_words(None)) == bool(kept)
    there = sum(p.stat().st_size for p in run.rglob("*") if p.is_file())
    assert (
        there <= need.total <= there + need.state + need.checkpoint + disk.PAGE_BYTES + 10 * disk.META_BYTES
    )


def test_a_run_that_was_stopped_has_the_same(job, whole, run, monkeypatch, capsys):
    with monkeypatch.context() as m:
        stop_after(m, 7)
        assert start(job, run) == 130
    assert steps(RunDir(run).states()) == [6, 7]
    assert go_on(run) == 0
    assert differences(whole, run) == []
    assert failed_checks(capsys, run) == {}


def test_none_is_of_a_step_that_is_taken_again(job, whole, run):
    """Where the latest states are gone, what comes after may be computed by another device."""
    shutil.copytree(whole, run)
    for state in RunDir(run).states():
        state.unlink()
    RunDir(run).rungs()[2].replace(RunDir(run).state / "step-000006.apr")
    mark = RunDir(run).rungs()[-1].stat().st_ino
    (run / "evidence.json").unlink()
    assert go_on(run) == 0
    assert steps(RunDir(run).rungs()) == [2, 4, 6, 8, 10, 12]
    assert RunDir(run).rungs()[-1].stat().st_ino != mark


def test_a_longer_run_spreads_them_anew(job, run, monkeypatch, capsys):
    monkeypatch.setattr(ladder, "most_rungs", lambda s, size: 3)
    assert start(job, run, "--schedule", "constant", "--num-steps", 8) == 0
    assert steps(RunDir(run).rungs()) == [2, 4]
    assert go_on(run, "--num-steps", 16) == 0
    assert steps(RunDir(run).rungs()) == [4, 8, 12]
    assert failed_checks(capsys, run) == {}


def change_loss(run, step):
    """Another loss of a step, and of all that follows from it."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    epoch = [x for x in lines if "train_loss" in x and 1 <= x["step"] <= 8]
    line = next(x for x in epoch if x["step"] == step)
    line["train_loss"] -= 1e-3
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    facts = RunDir(run).ckpt / "epoch-001.metadata.json"
    d = json.loads(facts.read_text())
    val = next(x for x in lines if "val_loss" in x and x["step"] == 8)
    losses = [x["train_loss"] for x in epoch]
    d |= epoch_facts(val, losses, d["tokens_seen"], d["grad_norm_max"], d["wall_seconds"])
    facts.write_text(json.dumps(d))
    seal(run)


def test_a_changed_step_in_the_middle_is_found_by_them_alone(whole, run, capsys):
    """Steps 5 and 6 are far from the start and from the latest states."""
    shutil.copytree(whole, run)
    change_loss(run, 5)
    more = ["--replay", 1, "--within", 1]
    assert set(failed_checks(capsys, run, *more)) - {"page"} == {"replay"}
    shutil.rmtree(RunDir(run).ladder)
    seal(run)
    assert set(failed_checks(capsys, run, *more)) - {"page"} == set()


def test_one_that_was_changed_is_found(whole, run, capsys):
    """With hashes made anew: the steps before it give other moments."""
    shutil.copytree(whole, run)
    path = RunDir(run).rungs()[3]
    file = read_apr(path)
    tensors = {name: x.copy() for name, x in file.tensors.items()}
    next(x for name, x in tensors.items() if name.startswith("optimizer."))[...] *= 2
    meta = {**file.metadata}
    meta["state_sha256"] = saved_hashes(meta, tensors, str(path))[0]
    write_apr(path, meta, tensors, "float32")
    seal(run)
    assert "replay" in failed_checks(capsys, run, "--replay", 1)


def test_an_older_run_keeps_none(whole, run):
    shutil.copytree(whole, run)
    shutil.rmtree(RunDir(run).ladder)
    config = json.loads((run / "config.json").read_text())
    del config["settings"]["ladder_mib"]
    (run / "config.json").write_text(json.dumps(config))
    RunDir(run).states()[-1].unlink()
    (run / "evidence.json").unlink()
    assert go_on(run) == 0
    assert steps(RunDir(run).rungs()) == []
