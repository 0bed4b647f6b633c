"""Orchestrate a run: inputs, run directory, gates, training, verdict, picture, page and hashes."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from ..common.atomic import drawn, locked, write_text
from ..common.errors import AprError, InputNotFound, Interrupted, IOFailure, MalformedFile
from ..common.files import sha256_of
from ..common.finding import PASS
from ..common.host import threads
from ..common.provenance import code_sha256, versions
from ..common.shell import word
from ..evidence import before, verdict
from ..evidence.asked import settings_arrive
from ..evidence.end import judge_end
from ..evidence.gates import Gates, parse_bounds
from ..evidence.judge import ENDED, Facts, ended_as_asked
from ..evidence.observers import (
    FormulasGate,
    LearningRateGate,
    LogGates,
    PlaceholderGate,
    SpotGate,
    StartGates,
    StepGates,
    VerdictFile,
    is_followed,
)
from ..evidence.ranks import RankGates, same_job
from ..evidence.resumed import WitnessGate
from ..evidence.seal import EVIDENCE, Early, compare, seal
from ..evidence.start import FirstStep
from ..evidence.stream import DataGate, MixtureGate
from ..evidence.subject import Subject
from ..model.cost import check_main_memory, save_copies
from ..model.optim import optimizer_class
from ..ranks.communicator import ALONE, Communicator
from ..ranks.launch import check_asked
from ..report.curve import loss_curve
from ..report.page import render
from . import disk, loggers, summary
from .callbacks import Callback, CallbackFailed, Callbacks
from .config_file import first_config, record_device, run_dir
from .display import Display, say
from .evaluate import evaluated_on
from .followed import FollowedRun, check_seen
from .inputs import Inputs, open_inputs
from .loop import Trainer
from .progress import Progress
from .resume import check_same_data, check_same_kernels, continued
from .rundir import RunDir, how_to_go_on
from .sample import sample_text
from .settings import Settings, resolve
from .signals import interrupting
from .split import check_order, check_ranks, memory_of
from .spot import FormulaChecks, SpotChecks, SpotTimes
from .start import StartRecord
from .tasks import TaskScores, check_tasks

SAMPLE_TOKENS = 160  # of the continuation of --sample at the end


def train(
    settings: Settings,
    show: Display,
    callbacks: Sequence[Callback] = (),
    explicit: dict[str, Any] | None = None,
    ranks: Communicator = ALONE,
) -> dict[str, Any]:
    """Run a job, or the rest of one (settings.resume); returns the result, the object that --json prints.

    explicit: settings that were asked for, which a resumed run is compared with. ranks: those that train together; {} is
    returned but on rank 0."""
    check_asked(settings.ranks, ranks, settings.gpus)
    ranks.limit(settings.rank_timeout)
    if ranks.rank:
        with interrupting():
            _follow(ranks, explicit or {})
        return {}
    start = time.perf_counter()
    run = None
    try:
        with interrupting():
            if settings.resume:
                settings = continued(settings, explicit or {})
                if ended := _ended(settings, explicit or {}, show):
                    ranks.share(None)
                    return ended
            settings = resolve(settings, explicit or {})
            gates = Gates(parse_bounds(settings.bounds))
            loggers.check(settings.log)
            check_tasks(settings.eval_tasks)
            if ranks.count > 1:
                settings = dataclasses.replace(
                    settings, threads=settings.threads or max(1, threads() // ranks.local)
                )
            inputs = open_inputs(settings, show.preparing, ranks=ranks)
            of_pairs = bool(inputs.train.shards.facts.get("pairs"))
            check_ranks(ranks, inputs.backend, settings.batch_size, inputs.micro, of_pairs)
            disk.check(inputs)
            run = run_dir(inputs)
            with locked(run.path, "training in it"):
                if settings.resume:
                    check_order(ranks, run)
                    check_same_data(inputs, run)
                    check_same_kernels(inputs, run)
                    run.lengthen(settings.num_steps)
                    run.rebound(settings.bounds)
                else:
                    run.create(first_config(inputs, run))
                run.clean()
                # The hashes of an earlier end are not those of a run that goes on.
                (run.path / EVIDENCE).unlink(missing_ok=True)
                show.table("apr pretrain", summary.opening(inputs, run, ranks))
                for note in summary.notes(inputs):
                    show.note(note)
                asked = None if settings.resume else explicit
                result, failed = _train(
                    inputs, run, show, gates, start, callbacks, asked, explicit or {}, ranks
                )
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
    return Interrupted(f"stopped at once; {how_to_go_on(run)}")


def _train(
    inputs: Inputs,
    run: RunDir,
    show: Display,
    gates: Gates,
    start: float,
    callbacks: Sequence[Callback],
    asked: dict[str, Any] | None,
    explicit: dict[str, Any],
    ranks: Communicator,
) -> tuple[dict[str, Any], CallbackFailed | None]:
    """Run in the locked folder, from the first gate to the last; returns the result, and a callback's last error."""
    trainer, heard, early = None, list(callbacks), Early(run.path)
    try:
        heard = [*callbacks, *loggers.open_all(inputs.settings.log, run.path)]
        ranks.on_end(lambda e: _record_end(run, show, gates, trainer, e, heard), lambda: how_to_go_on(run))
        ranks.share((inputs.settings, run.path, sha256_of(run.path / "config.json")[0]))
        _judge_inputs(inputs, gates, ranks)
        trainer = Trainer(inputs, run, ranks)
        subject, tasks = _subject(trainer), TaskScores(inputs, trainer.model, run.log, show)
        of_ranks = _of_ranks(subject, gates, inputs, explicit)
        gates.judge(settings_arrive(subject, trainer.schedule, run.read_config(), asked))
        facts = Facts.of(run.read_config(), gates.given)
        log_gates = LogGates(gates, facts, run.log.lines, run.states)
        trainer.findings = gates.state
        # A gate that comes before the display ends a run before its event is shown.
        trainer.observers = [
            SpotChecks(trainer.model, inputs.settings.spot_check, run.log, trainer.emit),
            StartRecord(run, trainer.state),
            log_gates,
            of_ranks,
            StepGates(subject, gates),
            PlaceholderGate(log_gates),
            LearningRateGate(subject, gates),
            WitnessGate(subject, gates, lambda: run.log.witnesses, run.read_config),
            MixtureGate(subject, gates, is_followed),
            DataGate(subject, gates, is_followed),
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
        record_device(show, inputs, run)
        if trainer.resumed and trainer.progress.step >= inputs.settings.num_steps:
            show.note("all steps of this run are done: nothing is trained, its last gates are asked again")
        status = trainer.train()
        say(show.stop)
        result = _finish(trainer, subject, gates, show, status, start, early)
    except AprError as e:
        _record_end(run, show, gates, trainer, e, heard, early)
        raise
    except OSError as e:
        error = IOFailure(f"{e.filename or run.path}: {e.strerror or e}")
        _record_end(run, show, gates, trainer, error, heard, early)
        raise error from None
    except KeyboardInterrupt:
        early.close()
        stopped = _stopped(run)
        if trainer is not None:
            _record_end(run, show, gates, trainer, stopped, heard, at_once=True)
        raise stopped from None
    with closing(early):
        _publish(trainer, gates, show, heard, result, start, early)
    return result, trainer.failed


def _judge_inputs(i: Inputs, gates: Gates, ranks: Communicator) -> None:
    """Judge the inputs before anything large is allocated. Raises Refused."""
    s = i.settings
    assert s.dtype is not None
    kind, need = optimizer_class(s), memory_of(i, ranks)
    check_main_memory(i.backend, save_copies(i.cfg, s.dtype, kind, i.lora))
    source = str(s.init or s.model)
    facts = i.audit, i.train, i.val, i.cfg, source, i.blank_rows, i.leaves_blank
    before.judge_inputs(gates, i.backend, s.dtype, need, *facts)


def _subject(t: Trainer) -> Subject:
    """Collect the parts of a run that gates look at."""
    i = t.inputs
    return Subject(
        i.settings, i.backend, i.cfg, t.model, t.opt, t.lora, t.batches, i.val, i.audit, i.init, i.lora_init is not None,
        i.document_end, i.backend.empty((1,), "float64"), evaluated_on(i), t.run.path, t.ranks,
        t.split.shard if t.split else None, t.split.whole if t.split else lambda: t.opt,
    )  # fmt: skip


def _of_ranks(subject: Subject, gates: Gates, i: Inputs, explicit: dict[str, Any]) -> RankGates:
    """Compare the ranks before the start, and make the observer that goes on with it. Raises Refused."""
    ranks, shard = subject.ranks, subject.shard
    if shard is None:
        gates.skip("before.ranks", "one process")
        return RankGates(subject, gates, [{"host": platform.node()}])
    own: dict[str, Any] = {"host": platform.node(), "part": [[p.start, p.stop] for p, _ in shard.runs]}
    device = i.backend.describe()
    own |= {"uuid": device.pop("uuid", "")}
    # Of the products computed so far, which rank 0 has had more of: Split.tune compares them.
    device.pop("matmul_algorithms", None)
    own |= {"settings": explicit, "data": i.describe(), "code": code_sha256(), "device": device}
    facts = ranks.share(own | {"versions": versions()})
    gates.judge(same_job(facts, shard.cut.size))
    return RankGates(subject, gates, facts)


def _follow(ranks: Communicator, explicit: dict[str, Any]) -> None:
    """Train as one of the ranks that write nothing, with the settings and in the folder that rank 0 gives."""
    ranks.at("waiting for rank 0 to open its inputs")
    if (job := ranks.share(None)[0]) is None:
        return
    settings, path, sha256 = job
    check_seen(path, sha256, ranks.rank)
    inputs = open_inputs(settings, ranks=ranks)
    run, gates = FollowedRun(path), Gates(parse_bounds(settings.bounds))
    trainer = Trainer(inputs, run, ranks)
    subject = _subject(trainer)
    ranks.on_end(
        lambda e: _record_end(run, Display(), gates, trainer, e, (), at_once=True), lambda: how_to_go_on(run)
    )
    trainer.observers = [
        SpotTimes(settings.spot_check),
        StartRecord(run, trainer.state),
        _of_ranks(subject, gates, inputs, explicit),
        StepGates(subject, gates),
        LearningRateGate(subject, gates),
    ]
    trainer.prepare(settings.resume)
    trainer.train()


def _record_end(
    run: RunDir,
    show: Display,
    gates: Gates,
    trainer: Trainer | None,
    e: AprError,
    heard: Sequence[Callback],
    early: Early | None = None,
    at_once: bool = False,
) -> None:
    """Write the verdict of a run that did not finish, and if there is time, its page and its hashes."""
    p = trainer.progress if trainer else Progress()
    if trainer:
        trainer.ranks.ends()
    gates.close(f"the run ended before it: {e.status}")
    with suppress(AprError, OSError):  # the error that ended the run is the one to show
        val = p.val_losses[-1] if p.val_losses else None
        word = verdict.save_verdict(run.path, gates, e.status, p.step, val, str(e))
        end = {"status": e.status, "verdict": word, "steps": p.step, "val_loss": val}
        Callbacks(heard, lambda error: None).ended({**end, "run_dir": str(run.path), "error": str(e)})
        if not at_once:
            _close(run, show, early)


def _close(run: RunDir, show: Display, early: Early | None = None) -> None:
    """Write the page of the run, and the hashes of all its files."""
    try:
        write_text(run.path / "report.html", render(run.path, Settings))
    except Exception as e:  # whatever is wrong with the page, the run has ended and its files are whole
        again = f"`apr report {word(run.path)}` tries again"
        say(show.note, f"no report.html: {e}; {again}")
    seal(run.path, early)


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


def _finish(
    trainer: Trainer, subject: Subject, gates: Gates, show: Display, status: str, start: float, early: Early
) -> dict[str, Any]:
    """Judge the last gates of a run that came to its end, and write its verdict; returns its result."""
    i, p, run, last = trainer.inputs, trainer.progress, trainer.run, trainer.run.last_evaluation()
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
            result["sample"], _ = sample_text(i, trainer.model, i.settings.sample, SAMPLE_TOKENS, p.step)
            text = f"\n{' sample ':-^68}\n{result['sample']}\n{'':-^68}\n"
        except Exception as e:  # the weights are trained and saved, whatever they say
            text = f"no sample: {type(e).__name__}: {e}"
        say(show.note, text)
    gates.judge(ended_as_asked(run.log.lines(), run.read_config(), status))
    judge_end(subject, gates, last, p.best_flops / trainer.ranks.count, early)
    result["verdict"] = verdict.save_verdict(run.path, gates, status, p.step, last["val_loss"])
    return result


def _publish(
    trainer: Trainer,
    gates: Gates,
    show: Display,
    heard: Sequence[Callback],
    result: dict[str, Any],
    start: float,
    early: Early,
) -> None:
    """Draw the picture and write the page of a run whose verdict is written, seal it, and show its end.

    What fails here takes neither verdict nor evidence from the run. Raises IOFailure: it cannot be sealed."""
    i, run = trainer.inputs, trainer.run
    lines, entropy = run.log.lines(), i.val.shards.unigram_entropy
    try:
        drawn(lambda path: loss_curve(lines, entropy, i.cfg.vocab_size, path), run.path / "loss.png")
    except IOFailure as e:
        say(show.note, f"no loss.png: {e}")
    finally:
        Callbacks(heard, trainer.callback_failed).ended(result)
    _close(run, show, early)
    seconds = time.perf_counter() - start
    rows = summary.closing(i, run, trainer.progress, run.last_evaluation(), result["verdict"], seconds)
    say(show.verdict, gates)
    say(show.table, "result", rows)
    say(show.note, result["status"])
