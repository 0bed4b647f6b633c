"""Describe a run in words: rows of (name, text) for the table at its start and the one at its end."""

from __future__ import annotations

import math
from typing import Any

from ..common.errors import MalformedFile
from ..common.events import REMOVED, by_source
from ..common.finding import guards_passed
from ..common.units import LAST_STEPS, plural
from ..data.mixture import turns_of
from ..data.turns import Turns
from ..model.lora import AdapterLayout
from ..model.params import Layout
from ..ranks.communicator import ALONE, Communicator
from . import disk
from .display import Rows
from .inputs import Inputs
from .progress import Progress
from .references import preferences_of
from .rundir import RunDir, epoch_of
from .settings import Settings


def opening(i: Inputs, run: RunDir, ranks: Communicator = ALONE) -> Rows:
    """Describe data, model, job and device before the first step."""
    s, c, train = i.settings, i.cfg, i.train.shards
    tokens, what = s.num_steps * s.batch_size * s.seq_length, i.backend.describe()
    chosen = " (chosen by auto)" if s.device == "auto" else ""
    return [
        ("corpus", i.corpus_name),
        ("", _split(i)),
        *_mixture(i),
        ("tokenizer", f"{plural(i.tokenizer.vocab_size, 'id')}, {train.total_bytes / train.total_tokens:.2f} bytes/token"),
        ("data", _guarded(i)),
        ("model", f"{c.family}, {plural(Layout(c).num_parameters, 'parameter')}: "
        f"{plural(c.num_layers, 'layer')} of {c.hidden_size},"),
        ("", f"heads {c.num_heads}/{c.num_kv_heads} of {c.head_dim}, MLP {c.intermediate_size}"),
        *_adapters(i),
        ("job", f"{plural(s.num_steps, 'step')} of {s.batch_size} x {s.seq_length} tokens = {_millions(tokens)} tokens"),
        ("", f"{s.schedule} learning rate up to {s.lr:g}, {plural(s.warmup_steps or 0, 'warm-up step')}, seed {s.seed}"),
        ("disk", disk.need(i).in_words(disk.free_bytes(run.path))),
        ("device", f"{i.backend.name}{chosen}: {what.get('gpu') or what['cpu']}"),
        ("", f"{s.dtype}, {plural(s.micro_batch_size or 1, 'sequence')} at once{', recomputing blocks' if s.recompute else ''}"),
        *([("", i.dtype_note)] if i.dtype_note else []),
        *([("ranks", f"{ranks.count}, {ranks.local} on this machine: {ranks.words}")] if ranks.count > 1 else []),
        ("run directory", str(run.path)),
    ]  # fmt: skip


def _mixture(i: Inputs) -> Rows:
    """Describe each source of a mixture: its share, its tokens, how often a run reads them."""
    if not i.shares:
        return []
    s, turns, rows = i.settings, Turns(turns_of(i.settings)), list[tuple[str, str]]()
    each = zip(i.train.sources, i.train.shards.parts, i.val.shards.parts, strict=True)
    for k, ((name, _, windows), (_, train), (_, val)) in enumerate(each):
        drawn = turns.count(k, s.num_steps * s.batch_size)
        passes = f"{drawn / windows:.3g} passes over its {plural(windows, 'window')}"
        size = f"{train.total_tokens:,} to train on, {val.total_tokens:,} held out"
        rows.append(("" if rows else "mixture", f"{100 * i.shares[name]:.4g} % {name}: {size}; {passes}"))
    return rows


def notes(i: Inputs) -> list[str]:
    """List what a person should know of the inputs: documents left out, the device, keys of the configuration."""
    found = [
        i.left_out,
        i.lora_init.note if i.lora_init else "",
        i.blank_rows_note,
        i.device_note and f"about the device: {i.device_note}",
        warmup_note(i.settings),
    ]
    return [note for note in (*found, *(f"about config.json: {note}" for note in i.config_notes)) if note]


def _adapters(i: Inputs) -> Rows:
    """Describe the adapters, where they are trained."""
    if i.lora is None:
        return []
    n, c = AdapterLayout(i.cfg, i.lora).num_parameters, i.lora
    share = 100 * n / Layout(i.cfg).num_parameters
    more = [*([" (rslora)"] if c.rslora else []), *([" (DoRA)"] if c.dora else [])]
    more += [f", {p} {x:g}" for patterns in (c.rank_pattern, c.alpha_pattern) for p, x in patterns]
    numbers = f"rank {c.rank}, alpha {c.alpha:g}{''.join(more)}"
    text = f"{plural(n, 'parameter')} ({share:.2g} %), {numbers}: {', '.join(c.modules)}"
    text += f"; whole: {', '.join(c.saved)}" if c.saved else ""
    return [("adapters", text + (f", going on with {i.settings.lora_init}" if i.lora_init else ""))]


def _millions(n: int) -> str:
    """Format 1.79 M, or 12,800 where that says more."""
    return f"{n / 1e6:.2f} M" if n >= 1e5 else f"{n:,}"


def _split(i: Inputs) -> str:
    """Count the tokens to train on and those held out."""
    train, val = i.train.shards, i.val.shards
    if train.facts:
        return _examples(train.facts, val.facts, i.train.seq_length) + _loss_of_pairs(i)
    if val is not train:
        documents = plural(val.total_documents, "document")
        return (
            f"{plural(train.total_tokens, 'token')} to train on, {val.total_tokens:,} held out ({documents})"
        )
    held = len(i.val) * i.val.seq_length
    return (
        f"{plural(train.total_tokens - held, 'token')} to train on, the last {held:,} of the shards held out"
    )


def _examples(train: dict[str, Any], val: dict[str, Any], seq_length: int) -> str:
    """Describe instruction data in three lines: examples, the share of them that is trained on, the packing."""
    packed = "examples share windows" if train["separator"] is not None else "an example to a window"
    tokens, trained, rows = train["tokens"], train["trained"], train["rows"]
    return (
        f"{plural(train['examples'], 'example')}, {val['examples']:,} held out; {plural(train['duplicates'], 'copy')} dropped\n"
        f"{trained:,} of {plural(tokens, 'token')} are answers ({100 * trained / tokens:.1f} %), which are trained on; "
        f"{val['trained']:,} held out\n"
        f"{packed}: {rows:,} of {plural(seq_length, 'token')}, {100 * tokens / (rows * (seq_length + 1)):.0f} % full"
    )


def _loss_of_pairs(i: Inputs) -> str:
    """Describe the loss of pairs; "" for other data."""
    p = preferences_of(i.settings, i.train, i.document_end)
    pairs = i.train.shards.facts.get("pairs", 0)
    return (
        f"\n{plural(pairs, 'pair')} of preferences, {i.val.shards.facts['pairs']:,} held out: {p.describe()}"
        if p
        else ""
    )


def _guarded(i: Inputs) -> str:
    """Describe the guards of the data: the number that passed, the most telling figures, what was skipped or widened."""
    findings = [f for split in i.audit for f in split.findings]
    figures = i.train.shards.figures
    odd: dict[tuple[str, bool, str], list[str]] = {}
    for split in i.audit:
        for f in split.findings:
            if f.why:
                odd.setdefault((split.name, f.passed is None, f.why), []).append(f.name)
    text = (
        f"{guards_passed(findings)}: {plural(figures['distinct_ids'], 'distinct id')}, the commonest "
        f"{100 * figures['top_id_share']:.1f} %, entropy {figures['unigram_entropy_nats']:.2f} nats/token"
    )
    for (split_name, skipped, why), guards in odd.items():
        which = guards[0] if len(guards) == 1 else f"{plural(len(guards), 'guard')}"
        text += f"\n{split_name}: {which}{' not asked' if skipped else ''}: {why}"
    return text


def warmup_note(s: Settings) -> str:
    """Say that the learning rate never arrives at its peak; "" where it does."""
    warmup = s.warmup_steps or 0
    if warmup < s.num_steps:
        return ""
    share = s.num_steps / warmup if warmup else 1.0
    reached = "its peak only in the last step" if share >= 1 else f"only {share:.2g} of its peak"
    return (
        f"about the schedule: --warmup-steps {warmup} of --num-steps {s.num_steps}: the learning rate reaches {reached}, "
        "and nothing of the run is decay"
    )


def closing(
    i: Inputs, run: RunDir, p: Progress, evaluation: dict[str, Any], verdict: str, seconds: float
) -> Rows:
    """Describe what a run reached: losses beside their yardsticks, speed, files. evaluation: its last line of the log."""
    loss, entropy = evaluation["val_loss"], i.val.shards.unigram_entropy
    gain = entropy - loss
    relation = f"{gain:.2f} below" if gain >= 0 else f"{-gain:.2f} above, not yet better than that"
    speed = p.tokens_seen / max(p.seconds, 1e-9)
    checkpoint = run.checkpoints()[-1]
    epochs = run.epochs()
    facts, epoch_steps = epochs[-1], p.step - _evaluated_before(run, p.step)
    of_pairs = "val_accuracy" in evaluation
    of_tokens = (
        ()
        if of_pairs
        else (
            ("validation loss", f"{loss:.4f} nats/token = {evaluation['val_bits_per_byte']:.3f} bits/byte"),
            ("", f"on {plural(evaluation['val_tokens'], 'token')} that training never saw"),
            *(("", f"of {name} {x:.4f}") for name, x in by_source(evaluation, "val_loss").items()),
        )
    )
    yardsticks = (
        ()
        if of_pairs
        else (
            ("token frequencies", f"{entropy:.4f} nats/token, their entropy: the model is {relation}"),
            ("uniform guess", f"{math.log(i.cfg.vocab_size):.4f} nats/token, ln of the vocabulary"),
        )
    )
    return [
        *(_of_pairs(evaluation, p.val_losses[0]) if of_pairs else of_tokens),
        ("training loss", f"{facts['train_loss_last']:.4f} {'a pair' if of_pairs else 'nats/token'} in the last "
        f"{plural(min(LAST_STEPS, epoch_steps), 'step')}, "
         f"{facts['train_loss']:.4f} over the last epoch"),
        *yardsticks,
        ("trained on", f"{plural(p.tokens_seen, 'token')} in {plural(p.step, 'step')}, {speed:,.0f} tokens/s with evaluations"),
        ("checkpoint", str(checkpoint)),
        *_other_checkpoints(run, epochs),
        ("report", str(run.path / "report.html")),
        ("time", f"{seconds:.0f} s in all"),
        ("verdict", f"{verdict}{'' if verdict == 'PASS' else ': see the gates above'}"),
    ]  # fmt: skip


def _evaluated_before(run: RunDir, step: int) -> int:
    """Find the step of the evaluation before the one at `step`."""
    return max((m["step"] for m in run.log.lines() if "val_loss" in m and m["step"] < step), default=0)


def _other_checkpoints(run: RunDir, epochs: list[dict[str, Any]]) -> Rows:
    """Name the best checkpoint, where it is not the last, and those that were removed."""
    rows, there = [], run.checkpoints()
    losses = {e["epoch"]: e["val_loss"] for e in epochs}
    best = min(there, key=lambda p: losses.get(epoch_of(p), math.inf))
    if best != there[-1]:
        rows.append(("best checkpoint", str(best)))
    removed = [e["epoch"] for e in epochs if REMOVED in e]
    if removed:
        rows.append(
            (
                "removed",
                f"checkpoints of {plural(len(removed), 'epoch')}: {spans(removed)}; --keep-checkpoints",
            )
        )
    return rows


def spans(numbers: list[int]) -> str:
    """Write whole numbers in order shortly: [1, 2, 3, 5] as "1 to 3, 5"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(f"{p[0]} to {p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def figures_of(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Pick what an evaluation has beside its loss: bits per byte, or accuracy and margin of pairs."""
    names = ("val_bits_per_byte", "val_accuracy", "val_margin", "val_chosen_gain", "val_rejected_gain")
    return {name: evaluation[name] for name in names if name in evaluation}


def _of_pairs(evaluation: dict[str, Any], first: float) -> Rows:
    """Describe the last evaluation of pairs."""
    e = evaluation
    moved = [f"{side} {e[key]:+.3f}" for side in ("chosen", "rejected") if (key := f"val_{side}_gain") in e]
    return [
        ("validation loss", f"{e['val_loss']:.4f} a pair, before training {first:.4f}"),
        ("accuracy", f"{100 * e['val_accuracy']:.1f} % of held-out pairs are ordered rightly, margin {e['val_margin']:+.4f}"),
        ("answers", f"{', '.join(moved)} nats a token against the model before training"),
    ]  # fmt: skip


def reached(run: RunDir, verdict: dict[str, Any]) -> Rows:
    """Describe a run that had ended before this process."""
    r = result(run, verdict)
    return [
        (
            "validation loss",
            f"{r['val_loss']:.4f} {'a pair' if 'val_accuracy' in r else 'nats/token'} after {plural(r['steps'], 'step')}",
        ),
        ("checkpoint", str(run.checkpoints()[-1])),
        ("report", str(run.path / "report.html")),
        ("verdict", verdict["verdict"]),
    ]


def result(run: RunDir, verdict: dict[str, Any]) -> dict[str, Any]:
    """Collect the result of a run that had ended before this process, as its files have it."""
    lines = run.log.lines()
    evaluations = [m for m in lines if "val_loss" in m]
    if not evaluations or not run.checkpoints():
        raise MalformedFile(f"{run.path}: no evaluation or no checkpoint in it, though the run has ended")
    return {
        "status": verdict["status"],
        "steps": max((m["step"] for m in lines if "train_loss" in m), default=0),
        "val_loss": evaluations[-1]["val_loss"],
        "best_val_loss": min(m["val_loss"] for m in evaluations),
        **figures_of(evaluations[-1]),
        "unigram_entropy": run.read_config()["data"]["val_unigram_entropy_nats"],
        "tokens_seen": max((m["tokens_seen"] for m in lines if "train_loss" in m), default=0),
        "seconds": 0.0,
        "run_dir": str(run.path),
        "verdict": verdict["verdict"],
    }
