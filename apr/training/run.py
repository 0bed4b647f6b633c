"""Orchestrate a run: inputs, run directory, gates, training, verdict, picture, page and hashes."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..common.atomic import drawn, locked, write_text
from ..common.errors import AprError, InputNotFound, Interrupted, IOFailure, MalformedFile
from ..common.files import make_folder
from ..common.finding import PASS
from ..common.host import threads
from ..common.options import absolute_paths
from ..common.provenance import code_sha256, git_commit, versions
from ..evidence import before, verdict
from ..evidence.asked import settings_arrive
from ..evidence.end import judge_end
from ..evidence.gates import Gates, parse_bounds
from ..evidence.judge import Facts
from ..evidence.observers import (
    DataGate,
    FormulasGate,
    LearningRateGate,
    LogGates,
    PlaceholderGate,
    SpotGate,
    StartGates,
    StepGates,
    VerdictFile,
)
from ..evidence.resumed import WitnessGate
from ..evidence.seal import EVIDENCE, compare, seal
from ..evidence.start import FirstStep
from ..evidence.subject import Subject
from ..model.cost import check_main_memory, memory, save_copies
from ..model.hf_config import to_hf
from ..model.optim import optimizer_class
from ..model.params import Layout
from ..report.curve import loss_curve
from ..report.page import render
from . import disk, loggers, summary
from .callbacks import Callback, CallbackFailed, Callbacks
from .display import Display
from .evaluate import evaluated_on
from .inputs import Inputs, open_inputs
from .loop import Trainer
from .progress import Progress
from .resume import DECIDE_BITS, check_same_data, check_same_kernels, continued
from .rundir import MICRO_BATCHES, SUMS, RunDir, next_free, resume_command
from .sample import sample_text
from .settings import DEMO, Settings, resolve
from .signals import interrupting
from .spot import FormulaChecks, SpotChecks
from .start import StartRecord
from .tasks import TaskScores

ENDED = ("DONE", "TARGET_REACHED", "EARLY_STOP")  # status words of runs that came to their end
SAMPLE_TOKENS = 160  # of the continuation of --sample at the end


def train(
    settings: Settings,
    show: Display,
    callbacks: Sequence[Callback] = (),
    explicit: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run a job, or the rest of one (settings.resume); returns the result, the object that --json prints.

    explicit: settings that were asked for, which a resumed run is compared with."""
    start = time.perf_counter()
    run = None
    try:
        with interrupting():
            if settings.resume:
                settings = continued(settings, explicit or {})
                if ended := _ended(settings, explicit or {}, show):
                    return ended
            settings = resolve(settings, explicit or {})
            gates = Gates(parse_bounds(settings.bounds))
            loggers.check(settings.log)
            inputs = open_inputs(settings, show.preparing)
            disk.check(inputs)
            run = _run_dir(inputs)
            with locked(run.path, "training in it"):
                if settings.resume:
                    check_same_data(inputs, run)
                    check_same_kernels(inputs, run)
                    run.lengthen(settings.num_steps)
                    run.rebound(settings.bounds)
                else:
                    run.create(_config(inputs, run))
                run.clean()
                # The hashes of an earlier end are not those of a run that goes on.
                (run.path / EVIDENCE).unlink(missing_ok=True)
                show.table("apr pretrain", summary.opening(inputs, run))
                for note in summary.notes(inputs):
                    show.note(note)
                asked = {} if settings.resume else explicit or {}
                result, failed = _train(inputs, run, show, gates, start, callbacks, asked)
    except KeyboardInterrupt:
        raise _stopped(run) from None
    finally:
        show.stop()
    if failed is not None:  # a callback's on_end: the run itself is whole
        raise failed
    return result


def _stopped(run: RunDir | None) -> Interrupted:
    """Make the error of a run that was stopped at once: outside the training loop, or by a second signal."""
    if run is None or not (run.path / "config.json").exists():
        return Interrupted("stopped before training began; the same command goes on")
    states = run.states()
    saved = f"the last saved state is {states[-1].stem}" if states else "there is no saved state yet"
    return Interrupted(f"stopped at once; {saved}. Go on with: {resume_command(run)}")


def _train(
    inputs: Inputs,
    run: RunDir,
    show: Display,
    gates: Gates,
    start: float,
    callbacks: Sequence[Callback],
    asked: dict[str, Any],
) -> tuple[dict[str, Any], CallbackFailed | None]:
    """Run in the locked folder, from the first gate to the last; returns the result, and a callback's last error."""
    trainer, heard = None, list(callbacks)
    try:
        heard = [*callbacks, *loggers.open_all(inputs.settings.log, run.path)]
        _judge_inputs(inputs, gates)
        trainer = Trainer(inputs, run)
        subject, tasks = _subject(trainer), TaskScores(inputs, trainer.model, run.log, show)
        gates.judge(settings_arrive(subject, trainer.schedule, run.read_config(), asked))
        facts = Facts.of(run.read_config(), gates.given)
        log_gates = LogGates(gates, facts, run.log.lines, run.states)
        trainer.findings = gates.state
        # A gate that comes before the display ends a run before its event is shown.
        trainer.observers = [
            SpotChecks(trainer.model, inputs.settings.spot_check, run.log, trainer.emit),
            StartRecord(run, trainer.state),
            log_gates,
            StepGates(subject, gates),
            PlaceholderGate(log_gates),
            LearningRateGate(subject, gates),
            WitnessGate(subject, gates, lambda: run.log.witnesses, run.read_config),
            DataGate(subject, gates),
            FirstStep(subject, gates),
            FormulasGate(gates),
            FormulaChecks(trainer.model, trainer.emit),
            show,
            tasks,
            SpotGate(gates),
            VerdictFile(run.path, gates),
            Callbacks(heard, trainer.callback_failed),
            StartGates(subject, gates, show.note),
        ]
        trainer.prepare(inputs.settings.resume)
        _record_device(show, inputs, run)
        if trainer.resumed and trainer.progress.step >= inputs.settings.num_steps:
            show.note("all steps of this run are done: nothing is trained, its last gates are asked again")
        status = trainer.train()
        _say(show.stop)
        result = _finish(trainer, subject, gates, show, status, start)
    except AprError as e:
        _record_end(run, show, gates, trainer, e, heard)
        raise
    except OSError as e:
        error = IOFailure(f"{e.filename or run.path}: {e.strerror or e}")
        _record_end(run, show, gates, trainer, error, heard)
        raise error from None
    except KeyboardInterrupt:
        stopped = _stopped(run)
        if trainer is not None:
            _record_end(run, show, gates, trainer, stopped, heard, at_once=True)
        raise stopped from None
    _publish(trainer, gates, show, heard, result, start)
    return result, trainer.failed


def _judge_inputs(i: Inputs, gates: Gates) -> None:
    """Judge the inputs before anything large is allocated. Raises Refused."""
    s = i.settings
    assert s.dtype is not None
    assert s.micro_batch_size is not None
    kind = optimizer_class(s)
    need = memory(
        i.cfg, i.backend, s.micro_batch_size, s.seq_length, s.dtype,
        recompute=s.recompute, documents=i.document_end is not None, lora=i.lora, optimizer=kind, saves=True,
        folds=s.micro_batch_size < s.batch_size, act_again=i.act_again,
    ).total  # fmt: skip
    check_main_memory(i.backend, save_copies(i.cfg, s.dtype, kind, i.lora))
    source = str(s.init or s.model)
    facts = i.audit, i.train, i.val, i.cfg, source, i.blank_rows, i.lora is not None
    before.judge_inputs(gates, i.backend, s.dtype, need, *facts)


def _subject(t: Trainer) -> Subject:
    """Collect the parts of a run that gates look at."""
    i = t.inputs
    return Subject(
        i.settings, i.backend, i.cfg, t.model, t.opt, t.lora, t.batches, i.val, i.audit, i.init, i.lora_init is not None,
        i.document_end, i.backend.empty((1,), "float64"), evaluated_on(i), t.run.path,
    )  # fmt: skip


def _record_end(
    run: RunDir,
    show: Display,
    gates: Gates,
    trainer: Trainer | None,
    e: AprError,
    heard: Sequence[Callback],
    at_once: bool = False,
) -> None:
    """Write the verdict of a run that did not finish, and if there is time, its page and its hashes."""
    p = trainer.progress if trainer else Progress()
    gates.close(f"the run ended before it: {e.status}")
    with suppress(AprError, OSError):  # the error that ended the run is the one to show
        val = p.val_losses[-1] if p.val_losses else None
        word = verdict.save_verdict(run.path, gates, e.status, p.step, val, str(e))
        end = {"status": e.status, "verdict": word, "steps": p.step, "val_loss": val}
        Callbacks(heard, lambda error: None).ended({**end, "run_dir": str(run.path), "error": str(e)})
        if not at_once:
            _close(run, show)


def _close(run: RunDir, show: Display) -> None:
    """Write the page of the run, and the hashes of all its files."""
    try:
        write_text(run.path / "report.html", render(run.path, Settings))
    except Exception as e:  # whatever is wrong with the page, the run has ended and its files are whole
        again = f"`apr report {shlex.quote(str(run.path))}` tries again"
        _say(show.note, f"no report.html: {e}; {again}")
    seal(run.path)


def _ended(settings: Settings, explicit: dict[str, Any], show: Display) -> dict[str, Any] | None:
    """Return the result of a run that has ended well and lies as it was sealed: there is nothing to do.

    None where there is: more steps, other bounds, gates that did not pass and are asked again, files that are missing."""
    run = RunDir(Path(str(settings.run_dir)))
    with locked(run.path, "training in it"):
        try:
            found, planned = verdict.read_verdict(run.path) or {}, run.num_steps()
            if found.get("status") not in ENDED or found["verdict"] != PASS or "bounds" in explicit:
                return None
            is_early = found["status"] != "DONE" or found.get("steps") != planned
            if settings.num_steps != planned and not is_early:
                return None
            changed = compare(run.path)
        except (InputNotFound, MalformedFile):  # of a run that was killed while it ended, or was damaged
            return None
        if changed:
            show.note(f"the run had ended; since then {'; '.join(changed[:3])}: it is ended again")
            return None
        result, rows = summary.result(run, found), summary.reached(run, found)
    more = (
        f"it would end at step {result['steps']} again"
        if settings.num_steps != planned
        else "`apr verify` checks it"
    )
    show.note(f"nothing to do: this run has ended, and its files are as they were then; {more}")
    show.table("result", rows)
    show.note(result["status"])
    return result


def _run_dir(i: Inputs) -> RunDir:
    """Make the folder of the run where it is missing, and write nothing in it: another run may be in there."""
    s = i.settings
    if s.resume:
        assert s.run_dir is not None
        return RunDir(Path(s.run_dir))
    name = "demo" if all(getattr(s, k) == v for k, v in DEMO.items()) else Path(str(s.model or s.init)).stem
    return RunDir(make_folder(Path(s.run_dir) if s.run_dir else next_free(name)))


def _config(i: Inputs, run: RunDir) -> dict[str, Any]:
    """Make the first config.json of a run."""
    s = i.settings
    return {
        "settings": {
            **absolute_paths(Settings, dataclasses.asdict(s)),
            "resume": False,
            "other_kernels": False,
            "run_dir": str(run.path),
            "threads": s.threads or threads(),
        },
        "model": to_hf(i.cfg),
        "num_parameters": Layout(i.cfg).num_parameters,
        "data": i.describe(),
        "data_guards": i.guards(),
        "data_folders": {side.name: str(side.folder.resolve()) for side in i.audit},
        "versions": versions(),
        "git_commit": git_commit(),
        "code_sha256": code_sha256(),
        SUMS: MICRO_BATCHES,
    }


def _record_device(show: Display, i: Inputs, run: RunDir) -> None:
    """Record device and memory in config.json, and note where they differ from those of the resumed run."""
    facts, was = (
        {**i.backend.describe(), "memory_bytes": str(i.backend.memory())},
        run.read_config().get("device"),
    )
    if i.settings.resume and isinstance(was, dict):
        for key in DECIDE_BITS:
            # Older runs recorded fewer keys.
            if key in was and was[key] != facts.get(key):
                show.note(
                    f"{key} was {was[key]} when the run began and is {facts.get(key)} now: its numbers may differ "
                    "in the last bits from here on"
                )
        facts = {**was, "went_on_with": [*was.get("went_on_with", []), facts]}
    run.record("device", facts)


def _finish(
    trainer: Trainer, subject: Subject, gates: Gates, show: Display, status: str, start: float
) -> dict[str, Any]:
    """Judge the last gates of a run that came to its end, and write its verdict; returns its result."""
    i, p, run, last = trainer.inputs, trainer.progress, trainer.run, _last_evaluation(trainer.run)
    result = {
        "status": status,
        "steps": p.step,
        "val_loss": last["val_loss"],
        "best_val_loss": p.best_val,
        **summary.figures_of(last),
        "unigram_entropy": i.val.shards.unigram_entropy,
        "tokens_seen": p.tokens_seen,
        "seconds": time.perf_counter() - start,
        "run_dir": str(run.path),
    }
    if i.settings.sample is not None:
        try:
            result["sample"] = sample_text(i, trainer.model, i.settings.sample, SAMPLE_TOKENS)
            text = f"\n{' sample ':-^68}\n{result['sample']}\n{'':-^68}\n"
        except Exception as e:  # the weights are trained and saved, whatever they say
            text = f"no sample: {type(e).__name__}: {e}"
        _say(show.note, text)
    judge_end(subject, gates, last, p.best_flops)
    result["verdict"] = verdict.save_verdict(run.path, gates, status, p.step, last["val_loss"])
    return result


def _last_evaluation(run: RunDir) -> dict[str, Any]:
    evaluations = [line for line in run.log.lines() if "val_loss" in line]
    if not evaluations:
        raise MalformedFile(f"{run.log.path}: no evaluation in it; the checkpoints are whole")
    return evaluations[-1]


def _publish(
    trainer: Trainer,
    gates: Gates,
    show: Display,
    heard: Sequence[Callback],
    result: dict[str, Any],
    start: float,
) -> None:
    """Draw the picture and write the page of a run whose verdict is written, seal it, and show its end.

    What fails here takes neither verdict nor evidence from the run. Raises IOFailure: it cannot be sealed."""
    i, run = trainer.inputs, trainer.run
    lines, entropy = run.log.lines(), i.val.shards.unigram_entropy
    try:
        drawn(lambda path: loss_curve(lines, entropy, i.cfg.vocab_size, path), run.path / "loss.png")
    except IOFailure as e:
        _say(show.note, f"no loss.png: {e}")
    finally:
        Callbacks(heard, trainer.callback_failed).ended(result)
    _close(run, show)
    seconds = time.perf_counter() - start
    rows = summary.closing(i, run, trainer.progress, _last_evaluation(run), result["verdict"], seconds)
    _say(show.verdict, gates)
    _say(show.table, "result", rows)
    _say(show.note, result["status"])


def _say(say: Callable[..., None], *args: Any) -> None:
    """Show a part of the end; a terminal that is full, closed or cannot show a character takes nothing from the run."""
    with suppress(OSError, ValueError):
        say(*args)
