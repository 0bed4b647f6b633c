"""`apr pretrain`: train a model from raw text or token shards. Without arguments: the demo job."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..common.atomic import explain, locked, write_text
from ..common.errors import (
    AprError,
    InputNotFound,
    Interrupted,
    IOFailure,
    MalformedFile,
    Refused,
    UsageError,
)
from ..common.files import make_folder
from ..common.host import cores
from ..data.conversations.instruct import InstructShards
from ..evidence.gates import PASS, Gates, parse_bounds
from ..evidence.seal import seal
from ..model.hf_config import to_hf
from ..model.lora import AdapterLayout
from ..model.params import Layout
from ..model.presets import PRESETS
from ..training import loggers
from ..training.callbacks import Callback, CallbackFailed, tell
from ..training.inputs import Inputs, describe, guards, open_inputs
from ..training.loop import LAST_STEPS, Trainer
from ..training.rundir import RunDir, code_sha256, git_commit, next_free, versions
from ..training.sample import sample_text
from ..training.settings import DEMO, MAY_CHANGE, Settings, check, from_command_line, resolve
from ..training.show import Show, loss_curve

SAMPLE_TOKENS = 160
FINISHED_BUT = 9  # exit code: the run came to its end, its verdict is FAIL or SUSPECT


def main(args: Sequence[str]) -> int:
    """Returns the exit code; errors are raised."""
    settings, explicit = from_command_line(args)
    result = train(settings, Show(quiet=settings.json), explicit=explicit)
    if settings.json:
        print(json.dumps(result, indent=2))
    return 0 if result["verdict"] == PASS else FINISHED_BUT


def train(
    settings: Settings, show: Show, callbacks: Sequence[Callback] = (), explicit: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A whole run, or the rest of one (settings.resume); what --json prints. Errors are raised.

    explicit: the settings that were asked for, which a resumed run is compared with."""
    start = time.perf_counter()
    run = None
    try:
        with _stoppable():
            if settings.resume:
                settings = _continued(settings, explicit or {})
            settings = resolve(settings)
            loggers.check(settings.log)
            gates = Gates(parse_bounds(settings.bounds))
            inputs = open_inputs(settings, show.preparing)
            run = _run_dir(inputs)
            with locked(run.path, "training in it"):
                if settings.resume:
                    _check_same_data(inputs, run)
                else:
                    run.create(_config(inputs, run))
                run.clean()
                _header(show, inputs, run)
                result, failed = _train(inputs, run, show, gates, start, callbacks)
    except KeyboardInterrupt:
        raise _stopped(run) from None
    finally:
        show.stop()
    if failed is not None:  # a callback's on_end: the run itself is whole
        raise failed
    return result


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and SIGINT raise KeyboardInterrupt, also where a shell ignores SIGINT for what it runs in the background; the
    training loop puts its own handlers in their place. Outside the main thread, where none can be set, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for n, handler in old.items():
            signal.signal(n, handler)


def _stopped(run: RunDir | None) -> Interrupted:
    """What a run says that was stopped at once: outside the training loop, or by a second signal."""
    if run is None or not (run.path / "config.json").exists():
        return Interrupted("stopped before training began; the same command goes on")
    states = run.states()
    saved = f"the last saved state is {states[-1].stem}" if states else "there is no saved state yet"
    again = f"apr pretrain --resume --run-dir {shlex.quote(str(run.path))}"
    return Interrupted(f"stopped at once; {saved}. Go on with: {again}")


def _train(
    inputs: Inputs, run: RunDir, show: Show, gates: Gates, start: float, callbacks: Sequence[Callback]
) -> tuple[dict[str, Any], CallbackFailed | None]:
    """The run in its locked folder, from the first gate to the last; what --json prints, and a callback's last error."""
    trainer, heard = None, list(callbacks)
    try:
        heard = [*callbacks, *loggers.open_all(inputs.settings.log, run.path)]
        trainer = Trainer(inputs, run, show, inputs.settings.resume, gates, heard)
        _record_device(show, inputs, run)
        if trainer.resumed and trainer.progress.step >= inputs.settings.num_steps:
            show.note("all steps of this run are done: nothing is trained, its last gates are asked again")
        show.start(trainer.progress.step, inputs.settings.num_steps)
        status = trainer.train()
        show.stop()
        return _finish(trainer, show, status, time.perf_counter() - start), trainer.failed
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


def _record_end(
    run: RunDir,
    show: Show,
    gates: Gates,
    trainer: Trainer | None,
    e: AprError,
    heard: Sequence[Callback],
    at_once: bool = False,
) -> None:
    """What a run that did not finish leaves: its verdict with the gate that ended it, and if there is time, its page
    and its hashes."""
    p = trainer.progress if trainer else None
    gates.close(f"the run ended before it: {e.status}")
    with suppress(AprError, OSError):  # the error that ended the run is the one to show
        val = p.val_losses[-1] if p and p.val_losses else None
        verdict = run.save_verdict(gates, e.status, p.step if p else 0, val, str(e))["verdict"]
        with suppress(CallbackFailed):
            end = {"status": e.status, "verdict": verdict, "steps": p.step if p else 0, "val_loss": val}
            tell(heard, "on_end", {**end, "run_dir": str(run.path), "error": str(e)})
        if not at_once:
            _close(run, show)


def _close(run: RunDir, show: Show) -> None:
    """The page of the run, and the hashes of all its files."""
    try:
        from ..report.page import render

        write_text(run.path / "report.html", render(run.path))
    except Exception as e:  # whatever is wrong with the page, the run has ended and its files are whole
        show.note(f"no report.html: {e}; `apr report {shlex.quote(str(run.path))}` tries again")
    seal(run.path)


def _continued(settings: Settings, explicit: dict[str, Any]) -> Settings:
    """The settings of the run that is resumed; only what cannot change its numbers may differ."""
    if settings.run_dir is None:
        raise UsageError("--resume needs --run-dir: the folder of the run to go on with")
    path = Path(settings.run_dir)
    saved = check(RunDir(path).read_config()["settings"], str(path / "config.json"))
    for key in ("dataset", "val_dataset", "tokenizer"):
        if saved.get(key) and not Path(saved[key]).exists():
            raise InputNotFound(f"{saved[key]}: gone; the run in {path} reads it as its {key}: put it back")
    for key, value in _absolute(explicit).items():
        if key not in MAY_CHANGE and saved.get(key) != value:
            flag = key.replace("_", "-")
            raise Refused(
                f"--{flag} {value} differs from {saved.get(key)!r} of the run in {path}; a resumed run keeps its "
                f"settings. Start a new run with --init {path}/ckpt/epoch-NNN.apr to change them"
            )
    kept = {key: explicit[key] for key in MAY_CHANGE if key in explicit}
    return Settings(**{**saved, **kept, "resume": True, "run_dir": settings.run_dir})


def _run_dir(i: Inputs) -> RunDir:
    """The folder of the run, made where it is missing, and nothing written in it: another run may be in there."""
    s = i.settings
    if s.resume:
        assert s.run_dir is not None
        return RunDir(Path(s.run_dir))
    name = "demo" if all(getattr(s, k) == v for k, v in DEMO.items()) else Path(str(s.model or s.init)).stem
    return RunDir(make_folder(Path(s.run_dir) if s.run_dir else next_free(name)))


def _config(i: Inputs, run: RunDir) -> dict[str, Any]:
    """The first config.json of a run."""
    s = i.settings
    return {
        "settings": {
            **_absolute(dataclasses.asdict(s)),
            "resume": False,
            "run_dir": str(run.path),
            "threads": s.threads or cores(),
        },
        "model": to_hf(i.cfg),
        "num_parameters": Layout(i.cfg).num_parameters,
        "data": describe(i),
        "data_guards": guards(i),
        "data_folders": {side.name: str(side.folder.resolve()) for side in i.audit},
        "versions": versions(),
        "git_commit": git_commit(),
        "code_sha256": code_sha256(),
    }


def _record_device(show: Show, i: Inputs, run: RunDir) -> None:
    """What computes and the memory it took, into config.json; a run that goes on elsewhere says so."""
    facts = {**i.backend.describe(), "memory_bytes": str(i.backend.memory())}
    was = run.read_config().get("device")
    if i.settings.resume and isinstance(was, dict):
        for key in ("backend", "gpu", "cpu", "cuda", "cublaslt", "matmul_algorithms"):
            if was.get(key) != facts.get(key):
                show.note(
                    f"{key} was {was.get(key)} when the run began and is {facts.get(key)} now: its numbers may differ "
                    "in the last bits from here on"
                )
        facts = {**was, "went_on_with": [*was.get("went_on_with", []), facts]}
    run.record_device(facts)


def _check_same_data(i: Inputs, run: RunDir) -> None:
    """A resumed run reads what it began with, or its losses could not be compared. Raises Refused."""
    saved = run.read_config().get("data")
    for key, value in describe(i).items():
        if key == "corpus":  # a name, which may be written in several ways; the hashes tell
            continue
        was = saved.get(key) if isinstance(saved, dict) else None
        if was != value:
            raise Refused(
                f"{run.path}/config.json: {key} was {was!r} when the run began and is {value!r} now; resume with the "
                "data of then, or start a new run with --init"
            )


def _absolute(values: dict[str, Any]) -> dict[str, Any]:
    """Settings with whole paths, so that a run can be resumed from another folder."""
    whole = dict(values)
    paths = (
        "corpus",
        "dataset",
        "instruct",
        "chat_template",
        "tokenizer",
        "init",
        "lora_init",
        "val_dataset",
        "model",
    )
    for key in paths:
        value = values.get(key)
        if value and value != "stdlib" and value not in PRESETS and Path(value).exists():
            whole[key] = str(Path(value).resolve())
    return whole


def _header(show: Show, i: Inputs, run: RunDir) -> None:
    s, c, train = i.settings, i.cfg, i.train.shards
    tokens, what = s.num_steps * s.batch_size * s.seq_length, i.backend.describe()
    show.table(
        "apr pretrain",
        [
            ("corpus", i.corpus_name),
            ("", _split(i)),
            ("tokenizer", f"{i.tokenizer.vocab_size:,} ids, {train.total_bytes / train.total_tokens:.2f} bytes/token"),
            ("data", _guarded(i)),
            ("model", f"{c.family}, {Layout(c).num_parameters:,} parameters: {c.num_layers} layers of {c.hidden_size},"),
            ("", f"heads {c.num_heads}/{c.num_kv_heads} of {c.head_dim}, MLP {c.intermediate_size}"),
            *_adapters(i),
            ("job", f"{s.num_steps:,} steps of {s.batch_size} x {s.seq_length} tokens = {_millions(tokens)} tokens"),
            ("", f"{s.schedule} learning rate up to {s.lr:g}, {s.warmup_steps} warm-up steps, seed {s.seed}"),
            ("device", f"{i.backend.name}{' (chosen by auto)' if s.device == 'auto' else ''}: {what.get('gpu') or what['cpu']}"),
            ("", f"{s.dtype}, {s.micro_batch_size} sequences at once{', recomputing blocks' if s.recompute else ''}"),
            ("run directory", str(run.path)),
        ],
    )  # fmt: skip
    if i.left_out:
        show.note(i.left_out)
    if i.device_note:
        show.note(f"about the device: {i.device_note}")


def _adapters(i: Inputs) -> list[tuple[str, str]]:
    """The line of adapters, where they are trained."""
    if i.lora is None:
        return []
    n, c = AdapterLayout(i.cfg, i.lora).num_parameters, i.lora
    share = 100 * n / Layout(i.cfg).num_parameters
    what = f"{n:,} parameters ({share:.2g} %), rank {c.rank}, alpha {c.alpha:g}: {', '.join(c.modules)}"
    return [("adapters", what + (f", going on with {i.settings.lora_init}" if i.lora_init else ""))]


def _millions(n: int) -> str:
    """1.79 M, or 12,800 where that says more."""
    return f"{n / 1e6:.2f} M" if n >= 1e5 else f"{n:,}"


def _split(i: Inputs) -> str:
    """How many tokens there are to train on, and what is held out of them."""
    train, val = i.train.shards, i.val.shards
    if isinstance(train, InstructShards):
        return _examples(train, val)
    if val is not train:
        documents = f"{val.total_documents:,} document{'s' if val.total_documents != 1 else ''}"
        return f"{train.total_tokens:,} tokens to train on, {val.total_tokens:,} held out ({documents})"
    held = len(i.val) * i.val.seq_length
    return f"{train.total_tokens - held:,} tokens to train on, the last {held:,} of the shards held out"


def _examples(train: Any, val: Any) -> str:
    """Instruction data in three lines: how many examples, how much of them is trained on, how they are packed."""
    m, held = train.manifest, val.manifest
    row = m.seq_length + 1
    packed = "examples share windows" if m.separator is not None else "an example to a window"
    return (
        f"{m.examples:,} examples, {held.examples:,} held out; {m.duplicates:,} copies dropped\n"
        f"{m.trained:,} of {m.tokens:,} tokens are answers ({100 * m.trained / m.tokens:.1f} %), which are trained on; "
        f"{held.trained:,} held out\n"
        f"{packed}: {m.rows:,} of {m.seq_length} tokens, {100 * m.tokens / (m.rows * row):.0f} % full"
    )


def _guarded(i: Inputs) -> str:
    """The guards in one line: how many passed, the figures that tell most, and what was not asked or widened."""
    verdicts = [v for side in i.audit for v in side.verdicts]
    figures = i.train.shards.manifest.audit
    odd: dict[tuple[str, bool, str], list[str]] = {}
    for side in i.audit:
        for v in side.verdicts:
            if v.note:
                odd.setdefault((side.name, v.passed is None, v.note), []).append(v.guard)
    passed = sum(v.passed is True for v in verdicts)
    text = (
        f"{passed} of {len(verdicts)} guards passed: {figures['distinct_ids']:,} distinct ids, the commonest "
        f"{100 * figures['top_id_share']:.1f} %, entropy {figures['unigram_entropy_nats']:.2f} nats/token"
    )
    for (side_name, skipped, note), guards_ in odd.items():
        which = guards_[0] if len(guards_) == 1 else f"{len(guards_)} guards"
        text += f"\n{side_name}: {which}{' not asked' if skipped else ''}: {note}"
    return text


def _finish(trainer: Trainer, show: Show, status: str, seconds: float) -> dict[str, Any]:
    """The last gates, the verdict, the picture and the page of a run that came to its end; what --json prints."""
    i, p, run, gates = trainer.inputs, trainer.progress, trainer.run, trainer.gates
    metrics, val = run.metrics(), i.val.shards
    picture = run.path / "loss.png"
    evaluations = [m for m in metrics if "val_loss" in m]
    if not evaluations:
        raise MalformedFile(f"{run.path / 'metrics.jsonl'}: no evaluation in it; the checkpoints are whole")
    last = evaluations[-1]
    result = {
        "status": status,
        "steps": p.step,
        "val_loss": last["val_loss"],
        "best_val_loss": p.best_val,
        "val_bits_per_byte": last["val_bits_per_byte"],
        "unigram_entropy": val.unigram_entropy,
        "tokens_seen": p.tokens_seen,
        "seconds": seconds,
        "run_dir": str(run.path),
    }
    if i.settings.sample is not None:
        result["sample"] = sample_text(i, trainer.model, i.settings.sample, SAMPLE_TOKENS)
        show.note(f"\n{' sample ':-^68}\n{result['sample']}\n{'':-^68}\n")
    trainer.judge.end()
    try:
        loss_curve(metrics, val.unigram_entropy, i.cfg.vocab_size, picture)
    except OSError as e:
        raise IOFailure(explain(picture, e)) from None
    result["verdict"] = run.save_verdict(gates, status, p.step, last["val_loss"])["verdict"]
    trainer.tell("on_end", result)
    _close(run, show)
    gain = val.unigram_entropy - last["val_loss"]
    verdict = f"{gain:.2f} below" if gain >= 0 else f"{-gain:.2f} above, not yet better than that"
    speed = p.tokens_seen / max(p.seconds, 1e-9)
    checkpoint = run.checkpoints()[-1]
    facts = json.loads(checkpoint.with_suffix(".metadata.json").read_text(encoding="utf-8"))
    show.verdict(gates)
    show.table(
        "result",
        [
            ("validation loss", f"{last['val_loss']:.4f} nats/token = {last['val_bits_per_byte']:.3f} bits/byte"),
            ("", f"on {last['val_tokens']:,} tokens that training never saw"),
            ("training loss", f"{facts['train_loss_last']:.4f} nats/token in the last {LAST_STEPS} steps, "
             f"{facts['train_loss']:.4f} over the last epoch"),
            ("token frequencies", f"{val.unigram_entropy:.4f} nats/token, their entropy: the model is {verdict}"),
            ("uniform guess", f"{math.log(i.cfg.vocab_size):.4f} nats/token, ln of the vocabulary"),
            ("trained on", f"{p.tokens_seen:,} tokens in {p.step:,} steps, {speed:,.0f} tokens/s with evaluations"),
            ("checkpoint", str(checkpoint)),
            ("report", str(run.path / "report.html")),
            ("time", f"{time.perf_counter() - trainer.began:.0f} s in all"),
            ("verdict", f"{result['verdict']}{'' if result['verdict'] == PASS else ': see the gates above'}"),
        ],
    )  # fmt: skip
    show.note(status)
    return result
