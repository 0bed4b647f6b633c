"""What happens to a run when the machine fails it: one clear line, the right exit code, nothing lost. Whatever stopped a
run, going on with it ends like the run that nobody disturbed."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from apr import backends
from apr.backends.cuda import kinds
from apr.checkpoints.apr2 import read_apr
from apr.cli.main import main
from apr.cli.show import Show
from apr.common import atomic
from apr.common.atomic import locked
from apr.common.errors import MalformedFile, Refused
from apr.data.batches import Windows
from apr.data.shards import TokenShards
from apr.evidence import end
from apr.evidence import verdict as verdicts
from apr.evidence.observers import StartGates
from apr.evidence.seal import compare
from apr.training import evaluate, resume
from apr.training import run as running
from apr.training.loop import Trainer
from apr.training.metrics import MetricsLog
from apr.training.rundir import RunDir
from crashing import SHORT_SAMPLES, Job, differences, metrics, quicken

TERM, INT = signal.SIGTERM, signal.SIGINT
BOTH = pytest.mark.parametrize("number", [TERM, INT])


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """12 steps, an evaluation after every 4, a state after every 2."""
    return Job(tmp_path_factory.mktemp("failures") / "job", 12, 4).make()


@pytest.fixture(autouse=True)
def quick(job, monkeypatch):
    quicken(monkeypatch, job.folder / "cache")


@pytest.fixture(scope="module")
def undisturbed(job):
    """A run that nothing happened to."""
    path = job.folder / "undisturbed"
    with pytest.MonkeyPatch.context() as m:
        quicken(m, job.folder / "cache")
        assert start(job, path) == 0
    return path


@pytest.fixture(scope="module")
def stopped(job, undisturbed):
    """A run that was stopped after step 7."""
    path = job.folder / "stopped"
    with pytest.MonkeyPatch.context() as m:
        quicken(m, job.folder / "cache")
        on_call(m, Trainer, "train_step", 7, lambda: signal.raise_signal(signal.SIGINT))
        assert start(job, path) == 130
    return path


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def on_call(monkeypatch, where, name, call, do):
    """Do something when a function is called for the call-th time, before it runs."""
    real, calls = getattr(where, name), []

    def hooked(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            do()
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, hooked)


def start(job, run, *more):
    return main(["pretrain", *job.arguments(run, False), *map(str, more)])


def go_on(run, *more):
    return main(["pretrain", "--resume", "--run-dir", str(run), *more])


def said(capsys, code, word):
    """Standard error of a command that failed: one line, and the status word where the exit code has one."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [x for x in err.splitlines() if x and not x.startswith("stopping after this step")]
    assert len(lines) == 1 + (code in (5, 6, 130)), err
    assert word in lines[0]
    if code == 130:
        assert lines[-1] == "INTERRUPTED"
    return lines[0]


def equal(job, undisturbed, run):
    """Go on with a run and compare its end."""
    assert go_on(run) == 0
    assert differences(undisturbed, run) == []


def states(run):
    return [p.name for p in RunDir(run).states()]


def verdict(run):
    return json.loads((run / "verdict.json").read_text())


# The disk


class Full(io.FileIO):
    """A file on a disk with room for half of what is written."""

    number = errno.ENOSPC

    def write(self, data):
        super().write(bytes(data)[: len(data) // 2])
        raise OSError(self.number, os.strerror(self.number))


def fail_to_write(monkeypatch, name, number, skip=0):
    """Files whose name contains `name` cannot be written; the first `skip` of them can."""
    seen = []

    def opening(path, mode):
        if name not in Path(path).name or len(seen) < skip:
            seen.extend([path] if name in Path(path).name else [])
            return io.FileIO(path, mode)
        if number == errno.EROFS:
            raise OSError(number, os.strerror(number), str(path))
        f = Full(path, mode)
        f.number = number
        return f

    monkeypatch.setattr(atomic, "FileIO", opening)


@pytest.mark.parametrize(
    ("name", "number", "why", "left"),
    [
        ("step-000008.apr", errno.ENOSPC, "disk full", [4, 6]),
        ("step-000008.apr", errno.EFBIG, "File too large", [4, 6]),
        ("step-000008.apr", errno.EROFS, "Read-only", [4, 6]),
        ("step-000002.apr", errno.ENOSPC, "disk full", []),
        ("epoch-002.apr", errno.ENOSPC, "disk full", [4, 6]),
        ("epoch-002.metadata.json", errno.ENOSPC, "disk full", [4, 6]),
    ],
)
def test_a_file_that_cannot_be_written(job, undisturbed, run, monkeypatch, capsys, name, number, why, left):
    with monkeypatch.context() as m:
        fail_to_write(m, name, number)
        assert start(job, run) == 7
    line = said(capsys, 7, str(run / "ckpt"))
    assert name in line
    assert why in line
    assert states(run) == [f"step-{step:06d}.apr" for step in left]
    for state in RunDir(run).states():
        read_apr(state)
    assert not list(run.rglob(".*.tmp"))
    assert (verdict(run)["status"], name in verdict(run)["message"]) == ("FAILED", True)
    equal(job, undisturbed, run)


def test_a_full_disk_where_even_the_verdict_has_no_room(job, undisturbed, run, monkeypatch, capsys):
    with monkeypatch.context() as m:
        fail_to_write(m, ".", errno.ENOSPC, skip=12)
        assert start(job, run) == 7
    assert "disk full" in said(capsys, 7, str(run))
    equal(job, undisturbed, run)


def test_a_full_disk_while_metrics_are_written(job, undisturbed, run, monkeypatch, capsys):
    """Half a line is written, then a whole one has no room."""
    opened = MetricsLog.open

    class Metrics(io.StringIO):
        def write(self, text):
            if json.loads(text)["step"] == 7:
                self.to.write(text[: len(text) // 2])
                self.to.flush()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.to.write(text)

        def flush(self):
            self.to.flush()

        def fileno(self):
            return self.to.fileno()

        def close(self):
            self.to.close()

    def open_log(self, *args):
        opened(self, *args)
        out = Metrics()
        out.to, self._file = self._file, out

    with monkeypatch.context() as m:
        m.setattr(MetricsLog, "open", open_log)
        assert start(job, run) == 7
    assert "disk full" in said(capsys, 7, str(run / "metrics.jsonl"))
    assert verdict(run)["status"] == "FAILED"
    assert states(run) == ["step-000004.apr", "step-000006.apr"]
    equal(job, undisturbed, run)


def test_a_real_limit_of_the_system(job, undisturbed, tmp_path):
    """A process that may write no file as large as a state, but checkpoints."""
    run = tmp_path / "run"
    sizes = [next((undisturbed / "ckpt").glob(p)).stat().st_size for p in ("*.apr", "state/*.apr")]
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({sum(sizes) // 2}, {resource.RLIM_INFINITY}))
from apr.cli.main import main
sys.exit(main(["pretrain", *sys.argv[1:]]))"""
    command = [sys.executable, "-c", code, *job.arguments(run, False)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr
    assert "File too large" in done.stderr
    assert str(run / "ckpt" / "state" / "step-000002.apr") in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert verdict(run)["status"] == "FAILED"
    assert not list(run.rglob(".*.tmp"))
    equal(job, undisturbed, run)


def test_a_folder_that_cannot_be_written(job, undisturbed, stopped, run, monkeypatch, capsys):
    assert start(job, "/sys/apr-run") == 7  # where not even root makes a folder
    said(capsys, 7, "/sys/apr-run")
    shutil.copytree(stopped, run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "evidence.json"}
    with monkeypatch.context() as m:
        fail_to_write(m, "", errno.EROFS)
        assert go_on(run) == 7
    assert "Read-only" in said(capsys, 7, str(run))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    equal(job, undisturbed, run)


# The data


@pytest.fixture
def dataset(job, undisturbed, tmp_path):
    """The tokenised corpus as a dataset, and a run on it."""
    source = next((job.folder / "cache" / "corpora").iterdir())
    shutil.copytree(source, tmp_path / "data")
    return tmp_path / "data"


def on_dataset(job, run, data):
    args = job.arguments(run, False)
    return main(["pretrain", "--dataset", str(data), *args[args.index("--model") :]])


def test_a_shard_that_is_cut_while_it_is_read(job, undisturbed, dataset, run, monkeypatch, capsys):
    shard = dataset / "train" / "shard-00000.bin"
    data = shard.read_bytes()
    with monkeypatch.context() as m:
        on_call(m, Trainer, "train_step", 6, lambda: os.truncate(shard, 4096))
        assert on_dataset(job, run, dataset) == 4
    assert "became shorter" in said(capsys, 4, str(shard))
    assert verdict(run)["status"] == "FAILED"
    assert go_on(run) == 4  # as it lies there
    said(capsys, 4, str(shard))
    shard.write_bytes(data)
    equal(job, undisturbed, run)


def test_a_validation_shard_that_is_cut(job, undisturbed, dataset, run, monkeypatch, capsys):
    shard = dataset / "val" / "shard-00000.bin"
    data = shard.read_bytes()
    with monkeypatch.context() as m:
        on_call(m, Trainer, "train_step", 6, lambda: os.truncate(shard, 0))
        assert on_dataset(job, run, dataset) == 4
    said(capsys, 4, str(shard))
    shard.write_bytes(data)
    equal(job, undisturbed, run)


def test_a_dataset_that_is_removed_while_it_is_read(
    job, undisturbed, dataset, run, tmp_path, monkeypatch, capsys
):
    """The mapped files stay readable; what needs them again says so."""
    with monkeypatch.context() as m:
        on_call(m, Trainer, "train_step", 6, lambda: dataset.rename(tmp_path / "away"))
        m.setattr(
            end,
            "in_fresh_process",
            lambda run, *args: str(RunDir(run).read_config()["data_folders"]),
        )
        assert on_dataset(job, run, dataset) == 9
    assert verdict(run)["verdict"] == "FAIL"
    assert metrics(run) == metrics(undisturbed)
    capsys.readouterr()
    assert go_on(run) == 3
    said(capsys, 3, str(dataset))
    (tmp_path / "away").rename(dataset)
    equal(job, undisturbed, run)


@pytest.mark.parametrize("later", [None, [None], "cuda"])
def test_later_devices_that_are_no_devices_are_named(job, stopped, run, later, capsys):
    shutil.copytree(stopped, run)
    path = run / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "device": {**config["device"], "went_on_with": later}}))
    assert go_on(run) == 4
    said(capsys, 4, "device.went_on_with")


def test_a_shard_or_a_corpus_that_is_gone_at_resume(
    job, stopped, dataset, run, tmp_path, monkeypatch, capsys
):
    (dataset / "train" / "shard-00000.bin").unlink()
    assert on_dataset(job, run, dataset) == 4
    said(capsys, 4, str(dataset / "train" / "shard-00000.bin"))
    shutil.copytree(stopped, run)
    config = json.loads((run / "config.json").read_text())
    config["settings"]["corpus"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    assert go_on(run) == 3
    said(capsys, 3, str(tmp_path / "gone"))
    assert go_on(tmp_path / "no-run") == 3
    said(capsys, 3, str(tmp_path / "no-run"))


def test_reading_beyond_the_end_is_refused_before_it_is_done(dataset):
    shards = TokenShards(dataset / "train")
    windows = Windows(shards, 16)
    path = dataset / "train" / "shard-00000.bin"
    first = windows.read(np.arange(3))[0]
    with path.open("ab") as f:
        f.write(b"more")  # an encoder that goes on: nothing that was there has changed
    assert np.array_equal(windows.read(np.arange(3))[0], first)
    os.truncate(path, 100)
    with pytest.raises(MalformedFile, match=r"shard-00000\.bin: became shorter"):
        windows.read(np.arange(3))
    path.unlink()


# The clock


def test_a_clock_that_goes_backwards(job, undisturbed, run, monkeypatch):
    now = [2e9]

    def back():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", back)
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * back()))
    assert start(job, run) == 0
    assert differences(undisturbed, run) == []
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(x[key] > 0 for x in lines for key in ("wall_ms", "tokens_per_sec") if key in x)
    for path in (run / "ckpt").glob("*.metadata.json"):
        assert json.loads(path.read_text())["wall_seconds"] > 0


# Two processes


def test_a_run_that_begins_where_another_one_trains(job, stopped, run, capsys):
    """It takes nothing away from the other one, which has not saved anything yet."""
    run.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(stopped / name, run / name)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with locked(run, "training in it"):
        assert start(job, run) == 5
    assert "another process is training in it" in said(capsys, 5, str(run))
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_a_lock_is_free_when_its_process_is_killed(tmp_path):
    code = """
import sys, time
from pathlib import Path
from apr.common.atomic import locked
with locked(Path(sys.argv[1]), "holding it"):
    print("held", flush=True)
    sys.stdin.read()"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(Refused, match="another process"), locked(tmp_path, "holding it"):
            pass
        process.kill()
        process.wait()
        with locked(tmp_path, "holding it"):
            pass


# Signals


def in_evaluation(monkeypatch, number, which, batch=2):
    """A signal in the middle of an evaluation."""
    real, calls = evaluate.sequential, []

    def sequential(*args):
        calls.append(None)
        for i, item in enumerate(real(*args)):
            if len(calls) == which and i == batch:
                signal.raise_signal(number)
            yield item

    monkeypatch.setattr(evaluate, "sequential", sequential)


@BOTH
def test_a_signal_while_data_is_prepared(job, undisturbed, run, tmp_path, monkeypatch, capsys, number):
    monkeypatch.setenv("APR_CACHE", str(tmp_path / "cache"))
    real = Show.preparing

    def preparing(self, stage, done, total):
        real(self, stage, done, total)
        if stage == "encode":
            signal.raise_signal(number)

    with monkeypatch.context() as m:
        m.setattr(Show, "preparing", preparing)
        assert start(job, run) == 130
    assert "the same command goes on" in said(capsys, 130, "stopped before training began")
    assert not run.exists()
    assert not list((tmp_path / "cache").rglob(".*.tmp"))
    assert start(job, run) == 0
    assert differences(undisturbed, run) == []


@pytest.mark.parametrize(("name", "number"), [("begin_anew", TERM), ("started", INT)])
def test_a_signal_before_the_first_step(job, undisturbed, run, monkeypatch, capsys, number, name):
    with monkeypatch.context() as m:
        on_call(m, StartGates if name == "started" else Trainer, name, 1, lambda: signal.raise_signal(number))
        assert start(job, run) == 130
    said(capsys, 130, f"apr pretrain --resume --run-dir {run}")
    equal(job, undisturbed, run)


@pytest.mark.parametrize(
    ("evaluation", "step", "number"),
    [(1, None, TERM), (1, None, INT), (2, 4, signal.SIGHUP), (3, 8, TERM), (4, 12, INT)],
)
def test_a_signal_in_an_evaluation(job, undisturbed, run, monkeypatch, capsys, number, evaluation, step):
    """It stops there; the next start does the evaluation again."""
    with monkeypatch.context() as m:
        in_evaluation(m, number, evaluation)
        assert start(job, run) == 130
    line = said(capsys, 130, f"apr pretrain --resume --run-dir {run}")
    assert (f"after step {step}, state saved" if step else "before the first saved state") in line
    assert len([m for m in metrics(run) if "val_loss" in m]) == evaluation - 1
    assert verdict(run)["status"] == "INTERRUPTED"
    equal(job, undisturbed, run)


@pytest.mark.parametrize(
    ("where", "name", "call", "step", "number"),
    [
        (Trainer, "train_step", 1, 1, INT),
        (Trainer, "train_step", 7, 7, TERM),
        (Trainer, "train_step", 7, 7, INT),
        (Trainer, "train_step", 12, 12, TERM),
        (MetricsLog, "write", 9, 6, TERM),
        (RunDir, "save_epoch", 2, 8, INT),
        (RunDir, "save_state", 3, 6, TERM),
        (RunDir, "save_state", 6, 12, INT),
        (Show, "stepped", 5, 5, TERM),
    ],
)
def test_a_signal_in_training(job, undisturbed, run, monkeypatch, capsys, number, where, name, call, step):
    """The step is finished and the state saved, wherever the signal comes."""
    # A signal that comes while a save is written must not find training a step further: the test counts steps.
    more = ["--no-background-saves"] if where is RunDir else []
    with monkeypatch.context() as m:
        on_call(m, where, name, call, lambda: signal.raise_signal(number))
        assert start(job, run, *more) == 130
    line = said(capsys, 130, f"apr pretrain --resume --run-dir {run}")
    found = int(states(run)[-1][5:11])
    assert f"after step {found}, state saved" in line
    assert found == step
    assert len([m for m in metrics(run) if "train_loss" in m]) == found
    equal(job, undisturbed, run)


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("sample_text", TERM),
        ("in_fresh_process", TERM),
        ("in_fresh_process", INT),
        ("save_verdict", INT),
        ("seal", TERM),
    ],
)
def test_a_signal_in_the_closing_phase(job, undisturbed, run, monkeypatch, capsys, number, where):
    """All is saved; the next start closes the run."""
    module = {"sample_text": running, "in_fresh_process": end, "save_verdict": verdicts, "seal": running}[
        where
    ]
    with monkeypatch.context() as m:
        # A run saves its verdict after each of its three epochs, and then when it is over.
        on_call(m, module, where, 4 if where == "save_verdict" else 1, lambda: signal.raise_signal(number))
        assert start(job, run) == 130
    assert "the last saved state is step-000012" in said(capsys, 130, "apr pretrain --resume")
    assert verdict(run)["status"] == ("DONE" if where == "seal" else "INTERRUPTED")
    equal(job, undisturbed, run)


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


# The quick runs of these tests have another.
CLOSE = running._close
AFTERWARDS = {
    "a broken matplotlib": (running, "loss_curve", ImportError("no module named kiwisolver"), "no loss.png"),
    "no room for the picture": (running, "loss_curve", OSError(errno.ENOSPC, "disk full"), "no loss.png"),
    "a broken page": (running, "render", KeyError("x"), "no report.html"),
    "a broken sample": (running, "sample_text", RuntimeError("x"), "no sample: RuntimeError: x"),
    "a full log": (Show, "verdict", OSError(errno.ENOSPC, "disk full"), ""),
    "a terminal of few characters": (Show, "verdict", UnicodeEncodeError("ascii", "\xe9", 0, 1, "no"), ""),
    "a closed terminal": (Show, "table", ValueError("I/O operation on closed file"), ""),
}


@pytest.mark.parametrize("what", AFTERWARDS)
def test_nothing_after_the_last_step_takes_verdict_and_evidence(job, run, monkeypatch, capsys, what):
    where, name, error, words = AFTERWARDS[what]
    with monkeypatch.context() as m:
        if name == "table":  # the first one is the header of the run
            on_call(m, Show, "table", 2, failing(error))
        else:
            m.setattr(where, name, failing(error))
        if name == "render":
            m.setattr(running, "_close", CLOSE)
        assert start(job, run, "--sample", "x") == 0
    assert words in capsys.readouterr().out
    assert verdict(run)["status"] == "DONE"
    assert verdict(run)["verdict"] == "PASS"
    assert compare(run) == []


def test_a_terminal_that_cannot_show_a_character_ends_nothing(job, run, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert start(job, run, "--sample", "caf\xe9 \U0001f600") == 0
    out.flush()
    assert b"caf? ?" in out.buffer.getvalue()
    assert compare(run) == []


@BOTH
def test_a_second_signal_stops_at_once(job, undisturbed, run, monkeypatch, capsys, number):
    def twice():
        signal.raise_signal(number)
        signal.raise_signal(number)

    before = [signal.getsignal(n) for n in (TERM, INT)]
    with monkeypatch.context() as m:
        on_call(m, Trainer, "train_step", 7, twice)
        assert start(job, run) == 130
    assert "stopped at once; the last saved state is step-000006" in said(capsys, 130, "--resume")
    equal(job, undisturbed, run)
    assert [signal.getsignal(n) for n in (TERM, INT)] == before


def test_a_stop_is_saved_although_nobody_reads_what_is_said(job, undisturbed, run, monkeypatch):
    """`apr pretrain 2>&1 | tee log`: Ctrl-C has ended tee when the run wants to say that it stops."""

    def gone(fd, data):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    with monkeypatch.context() as m:
        m.setattr(os, "write", gone)
        on_call(m, Trainer, "train_step", 7, lambda: signal.raise_signal(signal.SIGINT))
        assert start(job, run) == 130
    assert states(run)[-1] == "step-000007.apr"
    equal(job, undisturbed, run)


def test_a_signal_at_the_end_of_the_data(job, run, monkeypatch, capsys):
    """The evaluation after the last whole batch is stopped like any other."""
    more = ["--on-exhausted", "stop", "--num-steps", 1000, "--eval-every", 1000, "--save-every", 0]
    more += ["--batch-size", 100, "--micro-batch-size", 100, "--val-batches", 1, "--spot-check", -1]
    assert start(job, run.with_name("whole"), *more) == 0
    with monkeypatch.context() as m:
        in_evaluation(m, TERM, 2, 0)
        assert start(job, run, *more) == 130
    assert "state saved" in said(capsys, 130, "--resume")
    assert go_on(run) == 0
    assert differences(run.with_name("whole"), run) == []
    assert go_on(run) == 0  # of a run that is over
    assert differences(run.with_name("whole"), run) == []


# What a kill leaves


def test_a_kill_while_a_state_is_written(job, undisturbed, run):
    """The temporary file is removed, and the state before it taken."""
    code = """
import os, signal, sys
from apr.cli.main import main
from apr.common import atomic
replace = os.replace
def killed(a, b):
    if b.name == "step-000008.apr":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(a, b)
atomic.os.replace = killed
main(["pretrain", *sys.argv[1:]])"""
    command = [sys.executable, "-c", SHORT_SAMPLES + code, *job.arguments(run, False)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = list((run / "ckpt" / "state").glob(".*.tmp"))
    assert len(left) == 1
    assert states(run) == ["step-000004.apr", "step-000006.apr"]
    assert metrics(run)[-1]["step"] in (8, 9, 10)  # training goes on while it is written
    equal(job, undisturbed, run)
    assert not left[0].exists()


def test_a_kill_before_the_first_state(job, undisturbed, stopped, run):
    """The run begins again by itself; what it had written is replaced, not added to."""
    shutil.copytree(stopped, run)
    for path in [*(run / "ckpt" / "state").iterdir(), *(run / "ckpt").glob("epoch-*")]:
        path.unlink()
    assert len(metrics(run)) == 9
    equal(job, undisturbed, run)
    steps = [m["step"] for m in metrics(run) if "train_loss" in m]
    assert steps == list(range(1, 13))


def test_a_kill_between_an_evaluation_and_its_state(job, undisturbed, run, monkeypatch, capsys):
    """The state of an epoch whose evaluation is to be done again must not keep the line and the sample of one that was."""
    with monkeypatch.context() as m:
        in_evaluation(m, signal.SIGINT, 3)
        assert start(job, run) == 130
    with monkeypatch.context() as m:
        fail_to_write(
            m, "step-000008.apr", errno.ENOSPC
        )  # stands for the kill: the evaluation is done, its state is not
        assert go_on(run) == 7
    assert [m["step"] for m in metrics(run) if "val_loss" in m] == [0, 4, 8]
    equal(job, undisturbed, run)


@pytest.mark.parametrize("how", ["bit", "cut", "empty", "not apr"])
def test_a_damaged_state(job, undisturbed, stopped, run, capsys, how):
    shutil.copytree(stopped, run)
    path = RunDir(run).states()[-1]
    data = bytearray(path.read_bytes())
    if how == "bit":
        data[len(data) // 2] ^= 1
    damaged = {"bit": data, "cut": data[:-100], "empty": b"", "not apr": b"nothing of the kind"}[how]
    path.write_bytes(damaged)
    assert go_on(run) == 0
    out = capsys.readouterr().out
    assert str(path) in out
    assert f"{path.name}.damaged" in out
    assert path.with_name(path.name + ".damaged").read_bytes() == damaged
    path.with_name(path.name + ".damaged").unlink()
    running.seal(run)
    assert differences(undisturbed, run) == []


def test_only_damaged_states(job, stopped, run, capsys):
    """Nothing is trained again over the checkpoints that are there, however often it is tried."""
    shutil.copytree(stopped, run)
    for path in RunDir(run).states():
        path.write_bytes(path.read_bytes()[:1000])
    kept = {p: p.read_bytes() for p in [*(run / "ckpt").glob("*"), run / "metrics.jsonl"] if p.is_file()}
    for _ in range(2):
        assert go_on(run) == 4
        said(capsys, 4, str(run / "ckpt" / "state"))
    assert {p: p.read_bytes() for p in kept} == kept


@pytest.mark.parametrize(
    "tail",
    [b'{"step": 8, "train_loss": 5.8', b'{"step": 8, "train_loss": 5.8}', b"\xff\xfe", b"\n\n", bytes(100)],
)
def test_a_last_line_of_metrics_that_is_cut(job, undisturbed, stopped, run, tail):
    shutil.copytree(stopped, run)
    with (run / "metrics.jsonl").open("ab") as f:
        f.write(tail)
    equal(job, undisturbed, run)


@pytest.mark.parametrize("line", [b'{"step": 3, "train_lo', b"", b"\xff\xfe\xfd", b"[]", b'{"step": "3"}'])
def test_metrics_that_are_damaged_in_the_middle(stopped, run, capsys, line):
    shutil.copytree(stopped, run)
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:4], line, *lines[5:]]))
    before = path.read_bytes()
    assert go_on(run) == 4
    said(capsys, 4, f"{path}: line 5 is")
    assert path.read_bytes() == before


def test_metrics_that_lack_steps(stopped, run, capsys):
    shutil.copytree(stopped, run)
    path = run / "metrics.jsonl"
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:-2]))
    assert go_on(run) == 4
    assert "has 6 steps up to step 7" in said(capsys, 4, str(path))
    path.unlink()
    assert go_on(run) == 3
    said(capsys, 3, str(path))


@pytest.mark.parametrize("damage", [b"", b"\xff{", b"{}\n[]\n"])
def test_what_a_run_does_not_need_may_be_damaged(job, undisturbed, stopped, run, damage):
    shutil.copytree(stopped, run)
    samples = (run / "samples.jsonl").read_bytes()
    (run / "samples.jsonl").write_bytes(damage + b"\n" + samples + damage)
    for name in ("verdict.json", "evidence.json", "loss.png", "report.html"):
        (run / name).write_bytes(damage)
    assert go_on(run) == 0
    assert verdict(run)["status"] == "DONE"
    for name in ("loss.png", "report.html"):
        (run / name).unlink()
    running.seal(run)
    assert differences(undisturbed, run) == []


# A run that is over


def test_going_on_with_a_finished_run_changes_nothing(job, undisturbed, run):
    shutil.copytree(undisturbed, run)
    lines = (run / "metrics.jsonl").read_bytes()
    for _ in range(2):
        equal(job, undisturbed, run)
        assert (run / "metrics.jsonl").read_bytes() == lines


@pytest.mark.parametrize(
    ("word", "more"),
    [
        ("TARGET_REACHED", ["--target-val-loss", 100, "--min-epochs", 2]),
        ("EARLY_STOP", ["--lr", "1e-12", "--patience", 0, "--min-epochs", 1]),
    ],
)
def test_going_on_with_a_run_that_ended_early(job, run, capsys, word, more):
    """It has ended: no step is added, as none is where nobody interrupts the end."""
    assert start(job, run, *more) == 0
    assert capsys.readouterr().out.rstrip().endswith(word)
    lines, kept = (run / "metrics.jsonl").read_bytes(), states(run)
    assert go_on(run) == 0
    assert capsys.readouterr().out.rstrip().endswith(word)
    assert ((run / "metrics.jsonl").read_bytes(), states(run)) == (lines, kept)
    assert verdict(run)["status"] == word


@pytest.mark.parametrize(
    ("before", "more", "wrong"),
    [
        ({"attention": "wgmma"}, [], "attention was computed by wgmma, and by mma.sync here"),
        (
            {"cross_entropy": "clusters"},
            [],
            "cross_entropy was computed by clusters, and by blocks here",
        ),
        ({"attention": "wgmma"}, ["--other-kernels"], ""),
        ({"attention": "mma.sync", "cross_entropy": "blocks"}, [], ""),
        ({"products": "other"}, [], ""),  # of bfloat16, and this run is in float32
        ({}, [], ""),  # a run that is older than the record
        (
            {"attention": "mma.sync", "went_on_with": [{"attention": "wgmma"}]},
            [],
            "attention was computed by",
        ),
        ({"attention": "wgmma", "went_on_with": [{"attention": "mma.sync"}]}, [], ""),
    ],
)
def test_other_kernels_are_refused_unless_asked_for(
    job, stopped, run, monkeypatch, capsys, before, more, wrong
):
    """On a GPU that would compute the rest of a run with other bits."""
    shutil.copytree(stopped, run)
    config = json.loads((run / "config.json").read_text())
    config["device"] = {**config["device"], **before}
    # This model is too small, and in float32.
    monkeypatch.setattr(resume, "decisive", lambda *model: kinds.OPS)
    (run / "config.json").write_text(json.dumps(config))
    here = backends.get("cpu")
    facts = {**here.describe(), "attention": "mma.sync", "cross_entropy": "blocks"}
    monkeypatch.setattr(here, "describe", lambda: facts)
    assert go_on(run, *more) == (5 if wrong else 0)
    if wrong:
        said(capsys, 5, wrong)
    else:
        device = json.loads((run / "config.json").read_text())["device"]
        assert device["went_on_with"][-1]["attention"] == "mma.sync"


def test_other_kernels_without_a_run_to_go_on_with(job, run, capsys):
    assert start(job, run, "--other-kernels") == 2
    said(capsys, 2, "--other-kernels goes on with a run")


def test_a_step_that_main_memory_cannot_hold(job, run, capsys):
    assert start(job, run, "--batch-size", 2**40) == 5
    said(capsys, 5, "--batch-size 1099511627776")


def test_a_refused_resume_leaves_the_evidence(undisturbed, run, capsys):
    shutil.copytree(undisturbed, run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["val_sha256"] = "0" * 64
    (run / "config.json").write_text(json.dumps(config))
    before = (run / "evidence.json").read_bytes()
    assert go_on(run) == 5
    said(capsys, 5, "val_sha256")
    assert (run / "evidence.json").read_bytes() == before
