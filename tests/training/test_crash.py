"""A run that is killed at random moments and gone on with ends like an undisturbed one; and the comparison can fail.

tools/crash.py does the same with many more kills."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from apr.checkpoints.apr2 import read_apr, write_apr
from apr.cli.main import main
from apr.model.optim import AdamW
from apr.training.rundir import RunDir
from crashing import PHASES, Job, cache_of, crash, differences, quicken


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What killing found out: a report, and the folder with the undisturbed run."""
    job = Job(tmp_path_factory.mktemp("crash") / "job", 24, 8).make()
    signals = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)
    return crash(job, 4, 1, signals, jobs=2, in_training=0.5), job


def test_killed_runs_end_like_an_undisturbed_one(killed):
    report, _ = killed
    assert report.faults == []
    assert len(report.stops) in (4, 5)  # two at a time
    assert report.results
    assert sum(sum(counts.values()) for _, counts in report.table()) == len(report.stops)
    assert {s.phase for s in report.stops} <= set(PHASES)


@pytest.fixture
def stopped(killed, tmp_path, monkeypatch):
    """A run that was stopped after step 11."""
    _, job = killed
    run = tmp_path / "run"
    quicken(monkeypatch, cache_of(job.folder / "undisturbed-0"), has_short_samples=False)
    with monkeypatch.context() as m:
        step, calls = AdamW.step, []

        def ask(self, lr, **options):
            calls.append(lr)
            if len(calls) == 11:
                signal.raise_signal(signal.SIGINT)
            step(self, lr, **options)

        m.setattr(AdamW, "step", ask)
        assert main(["pretrain", *job.arguments(run, False)]) == 130
    return run


def change_state(path: Path, **changed: float) -> None:
    """Multiply tensors whose names begin so by a number, in a state that stays whole."""
    file = read_apr(path)
    names = [n for n in file.tensors if not n.startswith("optimizer.")]
    tensors = {
        p + n: np.array(file.tensors[p + n]) for p in ("", "optimizer.m.", "optimizer.v.") for n in names
    }
    for name in tensors:
        tensors[name] *= np.float32(
            next((f for k, f in changed.items() if name.startswith(f"optimizer.{k}.")), 1)
        )
    meta = {k: v for k, v in file.metadata.items() if k != "state_sha256"}
    write_apr(path, meta, tensors, "float32")


@pytest.mark.parametrize("fault", [None, "moments", "seed"])
def test_a_run_that_goes_on_otherwise_is_found(killed, stopped, fault):
    """The faults planted: moments that are lost, and another seed from the state on."""
    _, job = killed
    undisturbed = job.folder / "undisturbed-0"
    path = RunDir(stopped).states()[-1]
    if fault == "moments":
        change_state(path, m=0, v=0)
    elif fault == "seed":
        config = json.loads((stopped / "config.json").read_text())
        config["settings"]["seed"] += 1
        (stopped / "config.json").write_text(json.dumps(config))
        file = read_apr(path)
        training = file.metadata["training"]
        training["data"]["seed"] += 1
        training["next"] = {}  # as in older states: else before.resumed ends the run
        write_apr(path, file.metadata, {n: np.array(x) for n, x in file.tensors.items()}, "float32")
    elif fault is None:
        change_state(path, m=1, v=1)
    main(["pretrain", "--resume", "--run-dir", str(stopped)])
    found = differences(undisturbed, stopped)
    if fault is None:
        assert found == []
    else:
        assert any(d.startswith("metrics.jsonl: [") for d in found)
        assert any(d.startswith("weights of epoch-003.apr") for d in found)
        assert any(d.startswith("optimizer.m.") for d in found)


@pytest.mark.parametrize("fault", ["line twice", "left behind", "sample", "checkpoint"])
def test_what_lies_in_the_folder_is_compared(killed, tmp_path, fault):
    _, job = killed
    undisturbed, run = job.folder / "undisturbed-0", tmp_path / "run"
    shutil.copytree(undisturbed, run)
    assert differences(undisturbed, run) == []
    if fault == "line twice":
        lines = (run / "metrics.jsonl").read_text().splitlines()
        (run / "metrics.jsonl").write_text("\n".join([*lines, lines[-1]]) + "\n")
    elif fault == "left behind":
        (run / "ckpt" / "state" / ".step-000002.apr.1-2.tmp").write_bytes(b"")
    elif fault == "sample":
        (run / "samples.jsonl").write_text("")
    else:
        (run / "ckpt" / "epoch-002.apr").unlink()
        (run / "ckpt" / "epoch-002.metadata.json").unlink()
    assert differences(undisturbed, run) != []
