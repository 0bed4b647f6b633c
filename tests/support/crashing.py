"""Small runs of `apr pretrain` in processes of their own, stopped at random moments and gone on with, beside an
undisturbed one.

A process is halted (SIGSTOP) before it is killed, so that what it was doing can be read from what it has written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from apr.checkpoints.apr2 import read_apr
from apr.checkpoints.registry import open_any
from apr.cli.main import main
from apr.evidence import end
from apr.evidence.seal import compare as changed_since_the_end
from apr.model.hf_config import to_hf
from apr.model.presets import PRESETS
from apr.training import loop
from apr.training import run as running
from apr.training.loop import Trainer

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120  # seconds after which a process counts as hanging
TIMED = {  # what two equal runs need not have in common
    "metrics": {"wall_ms", "tokens_per_sec"},
    "metadata": {"wall_seconds"},
    "training": {"seconds", "best_flops", "gates"},  # gates: their words hold such figures too
}
PHASES = (  # in the order of a run
    "starting",
    "preparing data",
    "before its first step",
    "training",
    "evaluating",
    "writing a checkpoint",
    "writing a state",
    "writing another file",
    "closing",
    "closing: the fresh process",
)


@dataclass(frozen=True)
class Job:
    """What all runs of a comparison do: a tiny Llama on real Python source."""

    folder: Path
    num_steps: int = 96
    eval_every: int = 8

    def make(self) -> Job:
        """Write the corpus and the model's config.json."""
        corpus = self.folder / "corpus"
        corpus.mkdir(parents=True)
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        for source in sorted((stdlib / "json").glob("*.py")) + sorted((stdlib / "wsgiref").glob("*.py")):
            shutil.copy(source, corpus / f"{source.parent.name}-{source.name}")
        cfg = dataclasses.replace(PRESETS["llama-tiny"], vocab_size=400)
        (self.folder / "config.json").write_text(json.dumps(to_hf(cfg)))
        return self

    def arguments(self, run: Path, resume: bool) -> list[str]:
        """Of `apr pretrain`, for a run or for going on with it."""
        if resume:
            return ["--resume", "--run-dir", str(run)]
        options = {
            "corpus": self.folder / "corpus", "model": self.folder / "config.json", "run-dir": run,
            "num-steps": self.num_steps, "eval-every": self.eval_every, "save-every": 2,
            "lr": 3e-3, "warmup-steps": 3, "batch-size": 4, "micro-batch-size": 2, "seq-length": 16,
            "val-batches": 12, "val-fraction": 0.3, "patience": 1000, "sample": "def ", "threads": 1,
        }  # fmt: skip
        return [str(x) for key, value in options.items() for x in (f"--{key}", value)]

    def start(self, run: Path, resume: bool = False) -> subprocess.Popen[bytes]:
        """A process that trains; its output goes to files beside the run, its corpus is prepared in a cache of its own."""
        env = {**os.environ, "APR_CACHE": str(cache_of(run)), "OPENBLAS_NUM_THREADS": "1"}
        command = [
            sys.executable,
            str(ROOT / "tools" / "pretrain.py"),
            *self.arguments(run, resume),
        ]
        with output_of(run).open("wb") as out, errors_of(run).open("wb") as err:
            return subprocess.Popen(command, stdout=out, stderr=err, env=env, cwd=self.folder)

    def undisturbed(self, run: Path) -> tuple[float, float]:
        """Run to the end; the seconds it took, and those from its first step to its last evaluation."""
        start = time.monotonic()
        process = self.start(run)
        until(process, lambda: begun(run))
        first = time.monotonic()
        until(process, lambda: len(metrics(run)) == self.lines)
        last = time.monotonic()
        if code := process.wait(PATIENCE):
            raise AssertionError(f"exit code {code}: {errors_of(run).read_text()}")
        return time.monotonic() - start, last - first

    @property
    def lines(self) -> int:
        """How many lines of metrics a run has: steps and evaluations."""
        return self.num_steps + 1 + self.num_steps // self.eval_every


def until(process: subprocess.Popen[bytes], true: Callable[[], bool]) -> None:
    """Wait until something is true or the process has ended."""
    while process.poll() is None and not true():
        time.sleep(0.005)


def begun(run: Path) -> bool:
    """Whether the latest process of a run has come to its first step."""
    return "spot check" in output_of(run).read_text(errors="replace")


def over(run: Path) -> bool:
    """Whether the latest process of a run has written its last line."""
    return output_of(run).read_text(errors="replace").endswith("DONE\n")


def cache_of(run: Path) -> Path:
    """Where the corpus of a run is prepared."""
    return run.with_name(run.name + ".cache")


def output_of(run: Path) -> Path:
    """Standard output of the latest process of a run."""
    return run.with_name(run.name + ".out")


def errors_of(run: Path) -> Path:
    """Standard error of the latest process of a run."""
    return run.with_name(run.name + ".err")


class Moment(NamedTuple):
    """When to stop a process: so many seconds after its start, or, in training, after its first step."""

    seconds: float
    number: int  # of the signal
    in_training: bool


@dataclass
class Stop:
    """A process that was stopped. fault: what it did that it should not, or ""."""

    number: int
    phase: str
    seconds: float  # from the signal to the end of the process
    code: int
    fault: str = ""


@dataclass
class Result:
    """A run that came to its end after any number of stops. differs: from the undisturbed one; empty when equal."""

    stops: list[Stop]
    differs: list[str]


@dataclass
class Report:
    """All that was found out."""

    duration: float = 0.0  # seconds of an undisturbed run
    results: list[Result] = field(default_factory=list)

    @property
    def stops(self) -> list[Stop]:
        return [s for r in self.results for s in r.stops]

    @property
    def faults(self) -> list[str]:
        """Everything that is wrong, in words."""
        out = []
        for i, r in enumerate(self.results):
            for s in r.stops:
                if s.fault:
                    out.append(
                        f"run {i} stopped by {signal.Signals(s.number).name} while {s.phase}: {s.fault}"
                    )
            out += [f"run {i}: {d}" for d in r.differs]
        return out

    def table(self) -> list[tuple[str, Counter[str]]]:
        """For each phase, how many processes were stopped in it, by name of the signal."""
        return [
            (phase, Counter(signal.Signals(s.number).name for s in self.stops if s.phase == phase))
            for phase in PHASES
        ]


def phase_of(process: subprocess.Popen[bytes], run: Path, job: Job) -> str:
    """What a halted process is doing, by what it has written."""
    said = output_of(run).read_text(errors="replace")
    if not said:
        return "starting"
    if "run directory" not in said:
        return "preparing data"
    if any((run / "ckpt" / "state").glob(".*.tmp")):
        return "writing a state"
    if any((run / "ckpt").glob(".*.tmp")):
        return "writing a checkpoint"
    if any(run.glob(".*.tmp")):
        return "writing another file"
    if Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().strip():
        return "closing: the fresh process"
    try:
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return "before its first step"
    if last["step"] == job.num_steps and "val_loss" in last:
        return "closing"
    if not begun(run):
        return "before its first step"
    at_end = "train_loss" in last and last["step"] % job.eval_every == 0
    return "evaluating" if at_end else "training"


def stop(process: subprocess.Popen[bytes], number: int, run: Path, job: Job) -> Stop:
    """Send a signal to a running process and wait for its end."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    phase, was_over = phase_of(process, run, job), over(run)
    start = time.monotonic()
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    try:
        code = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return Stop(number, phase, PATIENCE, process.wait(), "it went on")
    out = Stop(number, phase, time.monotonic() - start, code)
    if number != signal.SIGKILL:
        lines = errors_of(run).read_text(errors="replace").splitlines()
        promised = code == 130 and lines[-1:] == ["INTERRUPTED"] and "Traceback" not in "".join(lines)
        # Before the program has begun, and after its last line, Python does what it does by itself.
        if not (promised or was_over or (phase == "starting" and code != 0)):
            out.fault = f"exit code {code}, {lines[-3:]}"
    return out


def disturbed(
    job: Job,
    run: Path,
    moments: Callable[[], Moment | None],
    ended: Callable[[float, bool], None] = lambda seconds, by_itself: None,
) -> list[Stop]:
    """A run that is stopped and started again until it is done.

    moments: when the next process is stopped; None: it is left alone.
    ended: called with the seconds that each process took, and whether it came to its end by itself."""
    stops: list[Stop] = []
    while True:
        start = time.monotonic()
        process = job.start(run, resume=(run / "config.json").exists())
        moment = moments()
        if moment is not None and moment.in_training:
            until(process, lambda: begun(run))
        try:
            code = process.wait(PATIENCE if moment is None else moment.seconds)
            ended(time.monotonic() - start, True)
        except subprocess.TimeoutExpired:
            if moment is None:
                process.kill()
                process.wait()
                raise AssertionError(f"{run}: hangs") from None
            stops.append(stop(process, moment.number, run, job))
            ended(time.monotonic() - start, False)
            if stops[-1].code:
                continue
            code = 0
        if code:
            raise AssertionError(f"{run}: exit code {code}: {errors_of(run).read_text()}")
        return stops


def crash(
    job: Job,
    kills: int,
    seed: int,
    signals: tuple[int, ...] = (signal.SIGKILL,),
    jobs: int = 1,
    in_training: float = 0.0,
    progress: Callable[[Report], None] | None = None,
    keep: bool = False,
) -> Report:
    """Stop processes `kills` times, each by one of `signals`, at moments drawn evenly from the duration of an undisturbed run,
    but this share of them, in_training, from that of its steps, evaluations and saving alone.

    jobs: runs at a time. keep: leave the folders of all runs; those of runs that differ are always left."""
    if (
        signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    ):  # as a shell sets it in the background, and processes inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    report, lock = Report(), threading.Lock()
    references = [job.folder / f"undisturbed-{i}" for i in range(jobs)]
    # Seconds of the latest processes that came to their end: the machine may have other work too, now more, now less.
    took: deque[float] = deque(maxlen=4)
    stopped, share = 0, 1.0  # share: of these seconds, in training

    def one(index: int) -> None:
        rng, run = random.Random(f"{seed} {index}"), job.folder / f"run-{index}"

        def moment() -> Moment | None:
            if stopped >= kills:
                return None
            training = rng.random() < in_training
            seconds = rng.uniform(0, max(took) * (share if training else 1))
            return Moment(seconds, rng.choice(signals), training)

        def ended(seconds: float, by_itself: bool) -> None:
            nonlocal stopped
            with lock:
                stopped += not by_itself
                if by_itself:
                    took.append(seconds)

        try:
            stops = disturbed(job, run, moment, ended)
            differs = differences(references[0], run)
        except AssertionError as e:
            stops, differs = [], [str(e)]
        with lock:
            report.results.append(Result(stops, differs))
            if progress:
                progress(report)
        if not keep and not differs:
            remove(run)

    def worker(number: int) -> None:
        index = number
        while stopped < kills:
            one(index)
            index += jobs

    with ThreadPoolExecutor(jobs) as pool:
        measured = list(pool.map(job.undisturbed, references))
        took.extend(whole for whole, _ in measured)
        report.duration, share = max(took), max(training / whole for whole, training in measured)
        for other in references[1:]:
            report.results.append(Result([], differences(references[0], other)))
        list(pool.map(worker, range(jobs)))
    return report


def remove(run: Path) -> None:
    """A run with what lies beside it."""
    for path in (run, cache_of(run)):
        shutil.rmtree(path, ignore_errors=True)
    for path in (output_of(run), errors_of(run)):
        path.unlink(missing_ok=True)


# Of code that a process runs before `apr pretrain`: samples as short as those of runs in this process.
SHORT_SAMPLES = """
from apr.training import loop, run
loop.SAMPLE_TOKENS = run.SAMPLE_TOKENS = 8
"""


def quicken(m: pytest.MonkeyPatch, cache: Path, has_short_samples: bool = True) -> None:
    """For runs in this process: one cache for all, a closing phase without a fresh process, a picture and a page, which have
    tests of their own, and short samples."""

    def reload(run: Path, device: str, dtype: str, threads: int | None) -> tuple[float, str]:
        last = sorted((run / "ckpt").glob("*.metadata.json"))[-1]
        return float(json.loads(last.read_text())["val_loss"]), ""

    m.setenv("APR_CACHE", str(cache))
    m.setattr(end, "in_fresh_process", reload)
    m.setattr(end, "matmul_rate", lambda be, dtype: 1e15)
    m.setattr(running, "loss_curve", lambda *args: None)
    for module in (loop, running) if has_short_samples else ():
        m.setattr(module, "SAMPLE_TOKENS", 8)
    m.setattr(running, "_close", lambda run, show, early=None: running.seal(run.path, early))


# Are two runs equal?


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times; each process of a run makes its own spot check."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [_without(line, "metrics") for line in lines if "spot_check" not in line]


def _without(d: dict[str, Any], what: str) -> dict[str, Any]:
    return {k: v for k, v in d.items() if k not in TIMED[what]}


def facts(run: Path) -> dict[str, Any]:
    """Everything of a finished run that another run of the same job must have too, by what it is."""
    out: dict[str, Any] = {"metrics.jsonl": metrics(run)}
    samples = run / "samples.jsonl"
    out["samples.jsonl"] = samples.read_text().splitlines() if samples.exists() else []
    for path in sorted((run / "ckpt").glob("epoch-*.metadata.json")):
        out[path.name] = _without(json.loads(path.read_text()), "metadata")
        model = path.with_name(path.name.replace(".metadata.json", ".apr"))
        removed = "removed_at_step" in out[path.name]
        out[f"weights of {model.name}"] = None if removed else open_any(str(model)).sha256
    for path in sorted((run / "ckpt" / "state").glob("step-*.apr")):
        file = read_apr(path)
        out[f"position of {path.name}"] = _without(file.metadata["training"], "training")
        for name, x in file.tensors.items():
            out[f"{name} of {path.name}"] = np.array(x).tobytes()
    verdict = json.loads((run / "verdict.json").read_text())
    out["verdict.json"] = {k: verdict[k] for k in ("status", "verdict", "steps", "val_loss")}
    return out


def differences(a: Path, b: Path) -> list[str]:
    """What differs between two finished runs of one job, and what is wrong with the second; empty when equal."""
    ours, theirs = facts(a), facts(b)
    apart = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    out = [f"{key}: {_first(ours.get(key), theirs.get(key))}" for key in apart]
    out += [f"{p.relative_to(b)} was left behind" for kind in (".*.tmp", "*.damaged") for p in b.rglob(kind)]
    last = sorted((b / "ckpt").glob("epoch-*.metadata.json"))[-1]
    stored = theirs[f"weights of {last.name.replace('.metadata.json', '.apr')}"]
    if json.loads(last.read_text())["weights_sha"] != stored:
        out.append(f"{last.name}: weights_sha is not that of the weights")
    return out + changed_since_the_end(b)


def _first(x: Any, y: Any) -> str:
    """Where two values differ first, in a few words."""
    if isinstance(x, bytes) and isinstance(y, bytes):
        apart = np.frombuffer(x, np.float32) != np.frombuffer(y, np.float32)
        return f"{int(apart.sum())} of {apart.size} numbers"
    if isinstance(x, dict) and isinstance(y, dict):
        key = next(k for k in {**x, **y} if x.get(k) != y.get(k))
        return f"{key} = {_first(x.get(key), y.get(key))}"
    if isinstance(x, list) and isinstance(y, list):
        at = next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), None)
        return f"{len(x)} against {len(y)}" if at is None else f"[{at}] {_first(x[at], y[at])}"
    return f"{x!r:.100} against {y!r:.100}"


def start(job: Job, run: Path, *more: Any) -> int:
    """Run a job in this process; returns the exit code. more: options beside the job's own."""
    return main(["pretrain", *job.arguments(run, False), *map(str, more)])


def go_on(run: Path, *more: Any) -> int:
    """Go on with a run in this process; returns the exit code."""
    return main(["pretrain", "--resume", "--run-dir", str(run), *map(str, more)])


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ask training to stop after a step, as Ctrl-C does."""
    real = Trainer.train_step

    def stopping(self: Trainer) -> Any:
        line = real(self)
        self.stop.is_asked = line["step"] == step
        return line

    monkeypatch.setattr(Trainer, "train_step", stopping)


def failed_checks(capsys: pytest.CaptureFixture[str], run: Path, *more: object) -> dict[str, str]:
    """Checks of `apr verify` that fail: what they measured, by name."""
    capsys.readouterr()
    main(["verify", str(run), "--json", "--backend", "none", *map(str, more)])
    rows = json.loads(capsys.readouterr().out)["checks"]
    return {r["check"]: r["measured"] for r in rows if r["verdict"] == "FAIL"}
