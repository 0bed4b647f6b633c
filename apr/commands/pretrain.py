"""`apr pretrain`: train a model from raw text or token shards. Without arguments: the demo job."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import PRESETS, to_hf
from ..device import cores
from ..errors import MalformedFile, Refused, UsageError
from ..formats.atomic import locked
from ..generate import generate
from ..params import Layout
from ..training.inputs import Inputs, describe, guards, open_inputs
from ..training.loop import Trainer
from ..training.rundir import RunDir, git_commit, next_free, versions
from ..training.settings import DEMO, MAY_CHANGE, Settings, check, from_command_line, resolve
from ..training.show import Show, loss_curve

SAMPLE_TOKENS = 160


def main(args: Sequence[str]) -> int:
    """Returns the exit code; errors are raised."""
    start = time.perf_counter()
    settings, explicit = from_command_line(args)
    show = Show(quiet=settings.json)
    if settings.resume:
        settings = _continued(settings, explicit)
    settings = resolve(settings)
    try:
        inputs = open_inputs(settings, show.preparing)
        run = _run_dir(inputs)
        with locked(run.path, "training in it"):
            if settings.resume:
                _check_same_data(inputs, run)
            _header(show, inputs, run)
            trainer = Trainer(inputs, run, show, settings.resume)
            _record_device(show, inputs, run)
            show.start(trainer.progress.step, settings.num_steps)
            status = trainer.train()
    finally:
        show.stop()
    result = _finish(trainer, show, status, time.perf_counter() - start)
    if settings.json:
        print(json.dumps(result, indent=2))
    return 0


def _continued(settings: Settings, explicit: dict[str, Any]) -> Settings:
    """The settings of the run that is resumed; only what cannot change its numbers may differ."""
    if settings.run_dir is None:
        raise UsageError("--resume needs --run-dir: the folder of the run to go on with")
    path = Path(settings.run_dir)
    saved = check(RunDir(path).read_config()["settings"], str(path / "config.json"))
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
    s = i.settings
    if s.resume:
        assert s.run_dir is not None
        return RunDir(Path(s.run_dir))
    name = "demo" if all(getattr(s, k) == v for k, v in DEMO.items()) else Path(str(s.model or s.init)).stem
    run = RunDir(Path(s.run_dir) if s.run_dir else next_free(name))
    run.create(
        {
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
            "versions": versions(),
            "git_commit": git_commit(),
        }
    )
    return run


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
    for key in ("corpus", "dataset", "tokenizer", "init", "val_dataset", "model"):
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


def _millions(n: int) -> str:
    """1.79 M, or 12,800 where that says more."""
    return f"{n / 1e6:.2f} M" if n >= 1e5 else f"{n:,}"


def _split(i: Inputs) -> str:
    """How many tokens there are to train on, and what is held out of them."""
    train, val = i.train.shards, i.val.shards
    if val is not train:
        documents = f"{val.total_documents:,} document{'s' if val.total_documents != 1 else ''}"
        return f"{train.total_tokens:,} tokens to train on, {val.total_tokens:,} held out ({documents})"
    held = len(i.val) * i.val.seq_length
    return f"{train.total_tokens - held:,} tokens to train on, the last {held:,} of the shards held out"


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


def sample_text(i: Inputs, trainer: Trainer, prompt: str, tokens: int = SAMPLE_TOKENS) -> str:
    """Prompt and continuation, drawn with temperature 0.7 and top-p 0.95, seed of the run."""
    ids = list(i.tokenizer.encode(prompt)) or [i.tokenizer.eos_id or 0]
    new = generate(
        i.cfg, i.backend, trainer.model.w, ids, tokens, 0.7, 0, 0.95, i.settings.seed, i.tokenizer.eos_id,
        trainer.model.dtype,
    )  # fmt: skip
    return prompt + i.tokenizer.decode(list(new), skip_special=True)


def _finish(trainer: Trainer, show: Show, status: str, seconds: float) -> dict[str, Any]:
    i, p, run = trainer.inputs, trainer.progress, trainer.run
    metrics, val = run.metrics(), i.val.shards
    picture = run.path / "loss.png"
    evaluations = [m for m in metrics if "val_loss" in m]
    if not evaluations:
        raise MalformedFile(f"{run.path / 'metrics.jsonl'}: no evaluation in it; the checkpoints are whole")
    last = evaluations[-1]
    loss_curve(metrics, val.unigram_entropy, i.cfg.vocab_size, picture)
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
        result["sample"] = sample_text(i, trainer, i.settings.sample)
        show.note(f"\n{' sample ':-^68}\n{result['sample']}\n{'':-^68}\n")
    gain = val.unigram_entropy - last["val_loss"]
    verdict = f"{gain:.2f} below" if gain >= 0 else f"{-gain:.2f} above, not yet better than that"
    speed = p.tokens_seen / max(p.seconds, 1e-9)
    show.table(
        "result",
        [
            ("validation loss", f"{last['val_loss']:.4f} nats/token = {last['val_bits_per_byte']:.3f} bits/byte"),
            ("", f"on {last['val_tokens']:,} tokens that training never saw"),
            ("token frequencies", f"{val.unigram_entropy:.4f} nats/token, their entropy: the model is {verdict}"),
            ("uniform guess", f"{math.log(i.cfg.vocab_size):.4f} nats/token, ln of the vocabulary"),
            ("trained on", f"{p.tokens_seen:,} tokens in {p.step:,} steps, {speed:,.0f} tokens/s with evaluations"),
            ("checkpoint", str(sorted(run.ckpt.glob("epoch-*.apr"))[-1])),
            ("loss curve", str(picture)),
            ("time", f"{seconds:.0f} s in all"),
        ],
    )  # fmt: skip
    show.note(status)
    return result
