"""Checkpoints and states: how often, how many are kept, the disk they take, and writing them while training goes on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from apr import backends
from apr.checkpoints import apr2_metadata, state
from apr.checkpoints.apr2 import read_apr
from apr.checkpoints.state import Snapshot, TrainingState
from apr.cli.main import main
from apr.common import atomic
from apr.common.events import REMOVED
from apr.evidence import end
from apr.evidence import seal as sealing
from apr.evidence.seal import EVIDENCE, compare, seal
from apr.model.cost import memory, save_copies
from apr.model.optim import AdamW
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.training import disk
from apr.training.inputs import open_inputs
from apr.training.loop import Trainer
from apr.training.rundir import RunDir
from apr.training.saving import Saver
from apr.training.settings import Settings
from apr.training.summary import spans
from crashing import SHORT_SAMPLES, Job, differences, failed_checks, go_on, metrics, quicken, start


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """16 steps, an evaluation after every 2, a state after every 2."""
    return Job(tmp_path_factory.mktemp("saving") / "job", 16, 2).make()


@pytest.fixture(autouse=True)
def quick(job, monkeypatch):
    quicken(monkeypatch, job.folder / "cache")


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture(scope="module")
def waiting(job):
    """A run whose training waited for each save, and that keeps all checkpoints."""
    path = job.folder / "waiting"
    with pytest.MonkeyPatch.context() as m:
        quicken(m, job.folder / "cache")
        assert start(job, path, "--no-background-saves", "--keep-checkpoints", 0) == 0
    return path


def files(run):
    return {e["epoch"]: e.get(REMOVED) for e in RunDir(run).epochs()}, [
        int(p.stem[6:]) for p in RunDir(run).checkpoints()
    ]


def content(path):
    """The bytes of a checkpoint but for the second in which it was written, and the checksums that follow from it."""
    data = re.sub(rb'"created_at":"[^"]*"', b"", path.read_bytes()[:-4])
    return data[:40] + data[44:]


# How many are kept


def test_old_checkpoints_are_removed_and_that_is_recorded(job, waiting, run, capsys):
    assert start(job, run, "--keep-checkpoints", 2) == 0
    out = capsys.readouterr().out
    assert (
        "removed epoch-001.apr: --keep-checkpoints 2 keeps the latest 2 and the best; the result lists" in out
    )
    assert "checkpoints of 6 epochs: 1 to 6" in out
    recorded, there = files(run)
    assert there == [7, 8]
    # The new one is written before the third latest, which the best may be, is removed.
    assert recorded == {**{i: 2 * i + 4 for i in range(1, 7)}, 7: None, 8: None}
    assert failed_checks(capsys, run) == {}
    for epoch in there:
        name = f"ckpt/epoch-{epoch:03d}.apr"
        assert content(run / name) == content(waiting / name)


@pytest.fixture
def five_best(monkeypatch):
    """Validation losses such that the third of eight epochs is the best."""
    real = Trainer.evaluate

    def evaluate(self):
        loss = real(self)
        return loss._replace(mean=loss.mean - 0.2 * (self.progress.step == 6))

    monkeypatch.setattr(Trainer, "evaluate", evaluate)


def test_the_best_one_is_kept(job, five_best, run, capsys):
    assert start(job, run, "--keep-checkpoints", 1) in (0, 9)
    assert files(run)[1] == [3, 8]
    assert f"best checkpoint      {run}/ckpt/epoch-003.apr" in capsys.readouterr().out
    failed = failed_checks(capsys, run)
    assert "checkpoints" not in failed
    assert "epochs" not in failed


def test_a_run_of_many_evaluations_does_not_fill_the_disk(job, run):
    assert start(job, run, "--eval-every", 1) == 0
    there = files(run)[1]
    assert there[-5:] == [12, 13, 14, 15, 16]
    assert len(there) in (5, 6)  # with the best


def test_all_are_kept_where_that_is_asked_and_in_runs_that_are_older(job, waiting, run):
    assert files(waiting)[1] == list(range(1, 9))
    assert set(files(waiting)[0].values()) == {None}
    with pytest.MonkeyPatch.context() as m:
        stop_after(m, 12)
        assert start(job, run, "--keep-checkpoints", 0) == 130
    config = json.loads((run / "config.json").read_text())
    for key in ("keep_checkpoints", "checkpoint_every", "background_saves"):
        del config["settings"][key]
    (run / "config.json").write_text(json.dumps(config))
    assert go_on(run) == 0
    assert files(run)[1] == list(range(1, 9))
    assert differences(waiting, run) == []


def stop_after(monkeypatch, step):
    real = Trainer.train_step

    def stopping(self):
        line = real(self)
        self.stop.is_asked = line["step"] == step
        return line

    monkeypatch.setattr(Trainer, "train_step", stopping)


LIES = {
    "a checkpoint is gone": (lambda ckpt: (ckpt / "epoch-007.apr").unlink(), "epoch 7: its checkpoint is gone, and not"),
    "with its metadata": (
        lambda ckpt: [p.unlink() for p in ckpt.glob("epoch-007.*")], "metadata of 7 epochs, 8 evaluations"),
    "the last is said to be removed": (lambda ckpt: say_removed(ckpt, 8), "epoch 8: recorded as removed, which no"),
    "a removal in the future": (lambda ckpt: say_removed(ckpt, 7, 18), "epoch 7: recorded as removed, which no"),
    "a checkpoint of no epoch": (
        lambda ckpt: shutil.copy(ckpt / "epoch-008.apr", ckpt / "epoch-009.apr"), "epoch 9: a checkpoint without"),
}  # fmt: skip


def say_removed(ckpt, epoch, step=16):
    path = ckpt / f"epoch-{epoch:03d}.metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), REMOVED: step}))
    path.with_name(f"epoch-{epoch:03d}.apr").unlink()


@pytest.mark.parametrize("what", LIES)
def test_a_checkpoint_that_is_gone_unrecorded_is_found(job, run, kept_two, capsys, what):
    shutil.copytree(kept_two, run)
    damage, words = LIES[what]
    damage(run / "ckpt")
    seal(run)
    failed = failed_checks(capsys, run)
    assert words in failed.get("checkpoints", "") + failed.get("epochs", "")


@pytest.fixture(scope="module")
def kept_two(job):
    """A run that keeps two checkpoints."""
    path = job.folder / "kept-two"
    with pytest.MonkeyPatch.context() as m:
        quicken(m, job.folder / "cache")
        assert start(job, path, "--keep-checkpoints", 2) == 0
    return path


@pytest.mark.parametrize("step", [5, 9])
def test_a_stopped_run_removes_the_same_ones(job, run, kept_two, monkeypatch, capsys, step):
    """Also where the state is older than the latest checkpoint, and those that the rest makes again are there."""
    with monkeypatch.context() as m:
        stop_after(m, step)
        assert start(job, run, "--keep-checkpoints", 2) == 130
    RunDir(run).states()[-1].unlink()
    assert failed_checks(capsys, run).keys() == {"files"}
    assert go_on(run, "--keep-checkpoints", 2) == 0
    assert differences(kept_two, run) == []


def test_whole_numbers_are_written_shortly():
    assert spans([1, 2, 3, 5, 8, 9]) == "1 to 3, 5, 8 to 9"
    assert spans([]) == ""


# How often


def test_evaluations_checkpoints_and_states_have_each_their_own_interval(job, run, monkeypatch, capsys):
    more = ["--eval-every", 2, "--checkpoint-every", 6, "--save-every", 5, "--keep-states", 9]
    assert start(job, run, *more) == 0
    assert [m["step"] for m in metrics(run) if "val_loss" in m] == list(range(0, 17, 2))
    assert files(run)[1] == [3, 6, 8]  # of steps 6, 12 and the end
    assert [p.stem for p in RunDir(run).states()] == [f"step-{i:06d}" for i in (5, 10, 15, 16)]
    assert failed_checks(capsys, run) == {}
    other = run.with_name("other")
    with monkeypatch.context() as m:
        stop_after(m, 7)
        assert start(job, other, *more) == 130
    assert failed_checks(capsys, other) == {}
    assert go_on(other) == 0
    (other / "ckpt/state/step-000007.apr").unlink()  # of the stop
    seal(other)
    assert differences(run, other) == []
    (other / "ckpt/epoch-006.apr").unlink()
    (other / "ckpt/epoch-006.metadata.json").unlink()
    assert "epochs" in failed_checks(capsys, other)


def test_a_checkpoint_between_evaluations_is_refused(job, run, capsys):
    assert start(job, run, "--checkpoint-every", 3) == 2
    assert "--checkpoint-every 3" in capsys.readouterr().err
    assert not run.exists()


# The disk


Usage = namedtuple("Usage", "total used free")


def test_the_disk_is_said_beforehand_and_what_cannot_fit_is_refused(job, run, monkeypatch, capsys):
    assert start(job, run, "--num-steps", 4) == 0
    assert "disk" in capsys.readouterr().out
    with monkeypatch.context() as m:
        m.setattr(disk.shutil, "disk_usage", lambda path: Usage(10**6, 0, 300_000))
        other = run.with_name("other")
        assert start(job, other) == 5
        err = capsys.readouterr().err
        assert "7 checkpoints of" in err
        assert "293.0 KiB are free" in err
        assert "--keep-checkpoints" in err
        assert not other.exists()
        assert start(job, other, "--keep-checkpoints", 0) == 5
        assert "8 checkpoints of" in capsys.readouterr().err
        # What the run has written already needs no more room.
        m.setattr(disk.shutil, "disk_usage", lambda path: Usage(10**7, 0, disk.PAGE_BYTES + 10**6))
        (run / "evidence.json").unlink()
        assert go_on(run) == 0
    assert main(["plan", "--model", "llama-demo", "--seq-length", "8", "--num-steps", "100"]) == 0
    assert "1 checkpoint of 9.0 MiB, 1 state of 27.0 MiB" in capsys.readouterr().out
    with monkeypatch.context() as m:
        m.setattr(disk.shutil, "disk_usage", lambda path: Usage(10**6, 0, 10**6))
        assert main(["plan", "--model", "llama-demo", "--seq-length", "8"]) == 5
    out = capsys.readouterr().out
    assert "7 checkpoints" in out
    assert "3 states" in out
    assert "DOES NOT FIT ON THE DISK" in out
    assert main(["plan", "--model", "llama-demo", "--keep-checkpoints", "0"]) == 2


def test_a_run_takes_the_disk_that_was_said(job, waiting):
    config = json.loads((waiting / "config.json").read_text())
    planned = disk.need(open_inputs(Settings(**config["settings"])))
    for pattern, size in (("ckpt/*.apr", planned.checkpoint), ("ckpt/state/*.apr", planned.state)):
        for path in waiting.glob(pattern):
            assert size - disk.META_BYTES < path.stat().st_size <= size
    assert len(list(waiting.glob("ckpt/*.apr"))) == planned.checkpoints
    assert sum(p.stat().st_size for p in waiting.rglob("*") if p.is_file()) <= planned.total


def test_copies_are_in_the_plan_where_they_lie_in_the_memory_of_the_device():
    be, cfg = backends.get("cpu"), PRESETS["llama-tiny"]
    plain, saved = (memory(cfg, be, 2, 16, saves=saves) for saves in (False, True))
    assert saved.total - plain.total == saved.copies == save_copies(cfg, "float32", AdamW, None)
    assert saved.copies == 12 * Layout(cfg).size
    assert save_copies(cfg, "bfloat16", AdamW, None) == 14 * Layout(cfg).size


# While training goes on


def slow_writer(monkeypatch, steps=2):
    """Every write of a checkpoint or a state waits until training is some steps further, or is waiting for it.

    Training stands where it is then, until all is written. Returns how many steps it was further, by write."""
    trained, saved, waited, reached, behind = [0], [-1], [-1], threading.Condition(), []
    step, settle, write = Trainer.train_step, Saver.settle, Saver._write

    def train_step(self):
        line = step(self)
        with reached:
            trained[0] = line["step"]
            reached.notify_all()
        if trained[0] >= saved[0] + steps:
            settle(self.saver)
        return line

    def settled(self):
        with reached:
            waited[0] = saved[0] if self._thread else waited[0]
            reached.notify_all()
        settle(self)

    def save(self, epoch, progress, real=Saver.save):
        self.wait()
        saved[0] = trained[0]
        real(self, epoch, progress)

    def writing(self, snapshot, weights, sha, epoch, progress):
        of = (progress or epoch.facts)["step"]
        with reached:
            reached.wait_for(lambda: trained[0] >= of + steps or waited[0] >= of, timeout=60)
            behind.append(trained[0] - of)
        write(self, snapshot, weights, sha, epoch, progress)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(Saver, "settle", settled)
    monkeypatch.setattr(Saver, "save", save)
    monkeypatch.setattr(Saver, "_write", writing)
    return behind


def test_what_is_written_is_hashed_meanwhile(job, run, monkeypatch):
    """A checkpoint is written here when everything is hashed that the save writes, the state behind it included."""
    all_there, seen, done = threading.Semaphore(0), [], state.sha256
    write = RunDir.save_epoch

    def hashing(arrays):
        sha = done(arrays)
        if threading.current_thread().name.startswith("hashing"):
            all_there.release()
        return sha

    def writing(self, *args):
        seen.append(all(all_there.acquire(timeout=60) for _ in ("optimizer", "state")))
        return write(self, *args)

    monkeypatch.setattr(state, "sha256", hashing)
    monkeypatch.setattr(state, "READ_AGAIN", 0)  # so large that the device is not read again
    monkeypatch.setattr(RunDir, "save_epoch", writing)
    assert start(job, run, "--num-steps", 4) == 0
    assert seen
    assert all(seen)


def test_the_text_of_the_tokenizer_is_made_once_before_the_first_step(job, run, monkeypatch):
    """Making it holds all threads of Python, the one that trains too: 0.7 s for 150,000 tokens, on a GPU 28 steps."""
    made, makes, steps = [], apr2_metadata.parse_json, Trainer.train_step

    def parse(*args):
        made.append(threading.current_thread().name)
        return makes(*args)

    def step(self):
        made.append("step")
        return steps(self)

    monkeypatch.setattr(apr2_metadata, "parse_json", parse)
    monkeypatch.setattr(Trainer, "train_step", step)
    assert start(job, run, "--num-steps", 4) == 0
    assert made[: made.index("step")] == ["MainThread"]
    assert set(made[made.index("step") :]) == {"step"}
    assert len(list((run / "ckpt").glob("*.apr"))) == 2


SPARSE = ["--eval-every", 8, "--save-every", 4]


def test_the_bytes_are_those_of_a_run_that_waits(job, run, monkeypatch, capsys):
    """Training is steps further when the files are written, and they hold the step that they say."""
    other = run.with_name("waiting")
    assert start(job, other, *SPARSE, "--no-background-saves", "--keep-states", 9) == 0
    with monkeypatch.context() as m:
        behind = slow_writer(m)
        assert start(job, run, *SPARSE, "--keep-states", 9) == 0
    assert behind == [2, 2, 2, 0]  # the last one at the end of the run
    assert differences(other, run) == []
    for name in sorted(p.relative_to(other) for p in other.glob("ckpt/*.apr")):
        assert content(run / name) == content(other / name)
    for a in RunDir(other).states():
        files = [read_apr(p) for p in (a, run / a.relative_to(other))]
        assert files[0].metadata["state_sha256"] == files[1].metadata["state_sha256"]
        assert abs(files[0].size - files[1].size) < 1000  # times, in the progress, have other digits
    assert failed_checks(capsys, run) == failed_checks(capsys, other) == {}


def test_a_copy_that_is_none_is_found(job, run, monkeypatch):
    """The fault planted: the writer reads the very arrays that training changes."""
    other = run.with_name("waiting")
    assert start(job, other, *SPARSE, "--no-background-saves") == 0

    def views(self, copy, becomes_state=True):
        return Snapshot(self.cfg, self.layout, dict(self.buffers()), {})

    with monkeypatch.context() as m:
        slow_writer(m)
        m.setattr(TrainingState, "snapshot", views)
        start(job, run, *SPARSE)
    found = differences(other, run)
    assert any("step-000012.apr" in d for d in found), found


def saves_under_way(monkeypatch):
    """The most saves that are under way at once, where none ends before training waits for it."""
    slow_writer(monkeypatch, 99)
    save, most = Saver.save, [0]

    def saving(self, *args):
        save(self, *args)
        most[0] = max(most[0], len(writers()))

    monkeypatch.setattr(Saver, "save", saving)
    return most


def writers():
    return [t for t in threading.enumerate() if t.name == "saving"]


def test_two_saves_never_pile_up(job, run, monkeypatch):
    most = saves_under_way(monkeypatch)
    assert start(job, run, "--save-every", 1) == 0
    assert most == [1]
    assert not writers()


def test_saves_that_pile_up_are_seen(job, run, monkeypatch):
    """The fault planted: the save after step 2 does not wait for the one before."""
    with monkeypatch.context() as m:
        most, wait = saves_under_way(m), Saver.wait
        m.setattr(Saver, "wait", lambda self: wait(self) if self.state.optimizer.steps != 2 else None)
        start(job, run, "--save-every", 1, "--eval-every", 4, "--num-steps", 4)
        for thread in writers():
            thread.join()
    assert most == [2]


def test_observers_hear_of_a_checkpoint_before_the_next_evaluation(job, run, monkeypatch):
    heard = []
    emit = Trainer.emit
    monkeypatch.setattr(Trainer, "emit", lambda self, e: (heard.append(e), emit(self, e))[1])
    slow_writer(monkeypatch)
    assert start(job, run, "--eval-every", 8, "--save-every", 0) == 0
    names = [e.method for e in heard if e.method in ("stepped", "evaluated", "saved")]
    first = names.index("saved")
    assert names[:first].count("stepped") == 10
    assert names[:first].count("evaluated") == 2
    assert names[-2:] == ["evaluated", "saved"]
    saved = [e for e in heard if e.method == "saved"]
    assert [(e.path.name, e.facts["step"]) for e in saved] == [("epoch-001.apr", 8), ("epoch-002.apr", 16)]


def test_a_full_disk_ends_the_run_after_the_step_and_leaves_the_save_before(job, run, monkeypatch, capsys):
    other = run.with_name("whole")
    assert start(job, other, *SPARSE) == 0
    capsys.readouterr()
    real = atomic.os.fsync

    def full(fd):
        if "step-000012" in str(Path(f"/proc/self/fd/{fd}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    with monkeypatch.context() as m:
        behind = slow_writer(m)
        m.setattr(atomic.os, "fsync", full)
        assert start(job, run, *SPARSE) == 7
    assert behind == [2, 2, 2]
    err = capsys.readouterr().err
    assert "step-000012.apr: disk full" in err
    assert len(err.splitlines()) == 1
    assert json.loads((run / "verdict.json").read_text())["status"] == "FAILED"
    assert compare(run) == []
    assert [p.stem for p in RunDir(run).states()] == ["step-000004", "step-000008"]
    last = metrics(run)[-1]
    assert last["step"] == 14
    assert "val_loss" not in last
    assert not list(run.rglob(".*.tmp"))
    assert failed_checks(capsys, run) == {}
    assert go_on(run) == 0
    assert differences(other, run) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_save_that_is_under_way(job, run, monkeypatch, capsys, number):
    other = run.with_name("whole")
    assert start(job, other, *SPARSE) == 0
    with monkeypatch.context() as m:
        behind, step = slow_writer(m, 99), Trainer.train_step

        def ask(self):
            if self.progress.step == 8:
                signal.raise_signal(number)
            return step(self)

        m.setattr(Trainer, "train_step", ask)
        assert start(job, run, *SPARSE) == 130
    assert behind == [4, 1, 0]  # the last one of the stop itself
    assert [p.stem for p in RunDir(run).states()] == ["step-000008", "step-000009"]
    assert "after step 9, state saved" in capsys.readouterr().err
    assert go_on(run) == 0
    assert differences(other, run) == []


def test_a_kill_of_a_background_save_leaves_the_last_whole_one(job, run):
    """The process is killed when training is two steps further than the state that is being written."""
    other = run.with_name("whole")
    assert start(job, other, *SPARSE) == 0
    code = """
import os, signal, sys, threading
from apr.cli.main import main
from apr.common import atomic
from apr.training.loop import Trainer
replace, step, begun = os.replace, Trainer.train_step, threading.Event()
def held(a, b):
    if b.name == "step-000012.apr":
        begun.set()
        threading.Event().wait(60)
    replace(a, b)
def train_step(self):
    if self.progress.step == 14:
        begun.wait(60)
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
atomic.os.replace, Trainer.train_step = held, train_step
main(["pretrain", *sys.argv[1:]])"""
    args = [*job.arguments(run, False), *map(str, SPARSE)]
    done = subprocess.run(
        [sys.executable, "-c", SHORT_SAMPLES + code, *args], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.stem for p in RunDir(run).states()] == ["step-000004", "step-000008"]
    assert len(list((run / "ckpt/state").glob(".step-000012.apr.*.tmp"))) == 1
    assert metrics(run)[-1]["step"] == 14
    assert go_on(run) == 0
    assert differences(other, run) == []


def test_what_was_saved_is_hashed_once_beside_the_process_that_loads_it(job, run, monkeypatch):
    """The seal of 10 GB is 9 s that a run need not wait for when it is judged."""
    hashed, all_there, hashing, load = [], threading.Semaphore(0), sealing.sha256_of, end.in_fresh_process

    def noted(path):
        hashed.append(path.name)
        found = hashing(path)
        all_there.release()
        return found

    def loading(*args):
        assert all(all_there.acquire(timeout=60) for f in (run / "ckpt").glob("**/*") if f.is_file())
        return load(*args)

    monkeypatch.setattr(sealing, "sha256_of", noted)
    monkeypatch.setattr(end, "in_fresh_process", loading)
    assert start(job, run, "--num-steps", 4) == 0
    monkeypatch.undo()
    assert sorted(hashed) == sorted(f.name for f in run.glob("**/*") if f.is_file() and f.name != EVIDENCE)
    assert compare(run) == []


def test_a_run_that_is_interrupted_at_its_end_hashes_no_more(job, run, monkeypatch):
    go_on_hashing, hashed = threading.Event(), []

    def slow(path):
        hashed.append(path)
        assert go_on_hashing.wait(60)
        return "", 0

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sealing, "sha256_of", slow)
    monkeypatch.setattr(sealing, "ThreadPoolExecutor", partial(ThreadPoolExecutor, 1))
    monkeypatch.setattr(end, "in_fresh_process", interrupted)
    assert start(job, run, "--num-steps", 4) == 130
    go_on_hashing.set()
    for thread in threading.enumerate():
        if thread.name.startswith("sealing"):
            thread.join()
    assert len(hashed) <= 1


def test_a_file_that_changed_after_it_was_hashed_is_hashed_again(tmp_path):
    """By its length and its times nothing would show here: they are put back."""
    same, other, gone = (tmp_path / "ckpt" / name for name in ("same", "other", "gone"))
    same.parent.mkdir()
    for path in (same, other, gone):
        path.write_text("before")
    early = sealing.Early(tmp_path)
    early.begin("ckpt")
    assert early.sha256_of("ckpt/other")[0] == hashlib.sha256(b"before").hexdigest()
    times = other.stat()
    other.write_text("behind")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    gone.unlink()
    (tmp_path / "later").write_text("later")
    seal(tmp_path, early)
    assert compare(tmp_path) == []


def test_a_checkpoint_and_a_state_of_one_step_share_the_copy(job, run, monkeypatch):
    seen = []
    save = Saver._write_checkpoint

    def saving(self, snapshot, weights, *args):
        apart = not np.shares_memory(weights, self.model.w)
        seen.append(np.shares_memory(weights, snapshot.flats[""]) and apart)
        return save(self, snapshot, weights, *args)

    monkeypatch.setattr(Saver, "_write_checkpoint", saving)
    assert start(job, run, "--num-steps", 4) == 0
    assert seen == [True, True]
