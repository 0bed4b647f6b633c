"""Verify the log of a run: against itself, the settings, the verdict and the metadata of the epochs."""

from __future__ import annotations

import math
from contextlib import suppress

from ..common.errors import STATUSES, AprError
from ..common.events import Line
from ..common.finding import FAIL, PASS, SEVERITY, SKIPPED, Finding, verdict_of
from ..common.provenance import code_sha256
from ..common.units import LAST_STEPS, plural
from ..evidence.gates import GATES, Gates
from ..evidence.judge import ENDED, ended_as_asked, judge, near, target
from ..evidence.ranks import read_ranks
from ..model.schedule import Schedule
from ..training.evaluate import epoch_facts
from .record import Record

KINDS = ("train_loss", "val_loss", "spot_check", "passes", "tasks")  # keys of which each line has one
FIGURES = ("val_loss", "val_tokens", "val_bits_per_byte", "val_loss_stderr")  # of text and answers


def metrics(r: Record) -> Finding:
    """Check each step once, in order, its numbers measured, its tokens counted, its speed that of its time."""
    s, bound = r.settings, "each step once, finite, tokens and speed as they follow"
    tokens, last, seen = s.batch_size * s.seq_length, r.verdict["steps"], 0
    numbers = [line["step"] for line in r.steps]
    # Not a list of the steps that verdict.json claims, which may be any number.
    if numbers != list(range(1, len(numbers) + 1)) or len(numbers) not in (last, last - r.is_cut):
        return Finding.of(
            "metrics", False, f"{plural(len(numbers), 'step')}, not 1 to {last} each once", bound
        )
    for finding in judge(r.steps, r.facts):
        if finding.verdict == FAIL:
            return Finding.of("metrics", False, f"step {finding.where}: {finding.measured}", bound)
    if odd := next(filter(None, (_odd(line, r) for line in r.log)), ""):
        return Finding.of("metrics", False, odd, bound)
    for line in r.steps:
        new, seen = line["tokens_seen"] - seen, line["tokens_seen"]
        # The number of answers in a step is compared with the data in `stored.data`.
        if not (0 < new <= tokens if r.facts.only_answers else new == tokens):
            return Finding.of("metrics", False, f"step {line['step']}: tokens_seen = {seen}", bound)
    ends = {s.num_steps, *r.run.ends()}
    due = [0, *(e for e in range(1, last + 1) if e % s.eval_every == 0 or e in ends)]
    found = [line["step"] for line in r.evaluations]
    # The data may end between two evaluations.
    if found not in (due, [*due, last]) and not (r.is_cut and found == due[:-1]):
        return Finding.of("metrics", False, f"evaluations at steps {found}, due at {due}", bound)
    return Finding.of(
        "metrics", True, f"{plural(len(numbers), 'step')}, {plural(len(found), 'evaluation')}", bound
    )


def _odd(line: Line, r: Record) -> str:
    """Say why a line of the log is none that a run writes: two in one, of which judges read one, or figures of other data."""
    kinds = [key for key in KINDS if key in line]
    if len(kinds) != 1 and (kinds or r.config.get("code_sha256") == code_sha256()):
        return f"step {line['step']}: {' and '.join(kinds) or 'none of ' + ', '.join(KINDS)} in one line"
    of_pairs = [key for key in line if key.startswith("val_") and key.partition("/")[0] not in FIGURES]
    if of_pairs and not r.facts.only_pairs:
        return f"step {line['step']}: {of_pairs[0]}, which only pairs of preferences have"
    if r.facts.only_pairs and "val_bits_per_byte" in line:
        return f"step {line['step']}: val_bits_per_byte, which pairs of preferences have not"
    return ""


def learning_rate(r: Record) -> Finding:
    """Compare the learning rates of the log with the schedule of the settings."""
    s = r.settings
    assert s.lr is not None
    assert s.lr_min is not None
    assert s.warmup_steps is not None
    schedule = Schedule(s.schedule, s.lr, s.lr_min, s.warmup_steps, s.num_steps)
    share = r.settings.lora_plus
    wrong = [
        line["step"]
        for line in r.steps
        if not near(line["lr"], schedule(line["step"]))
        or not near(line.get("lr_b", share * line["lr"]), share * line["lr"])
    ]
    bound = f"{s.schedule} up to {s.lr:g}, {s.warmup_steps} warm-up steps"
    measured = (
        f"step {wrong[0]} and {len(wrong) - 1} more differ" if wrong else f"{plural(len(r.steps), 'step')}"
    )
    return Finding.of("learning rate", not wrong, measured, bound)


def verdict(r: Record) -> Finding:
    """Compare verdict.json with the last evaluation, and judge again the gates that follow from the log."""
    v, bound = r.verdict, "what follows from metrics.jsonl and config.json"

    def failed(measured: str) -> Finding:
        return Finding.of("verdict", False, measured, bound)

    if v["status"] == "RUNNING":
        why = "the run has not ended; --resume goes on with it"
        return Finding("verdict", SKIPPED, "RUNNING", bound, why)
    if wrong := _wrong_status(r):
        return failed(wrong)
    val = r.evaluations[-1]["val_loss"] if r.evaluations else None
    if v["val_loss"] != val:
        return failed(f"val_loss {v['val_loss']} in verdict.json, {val} in metrics.jsonl")
    if v["status"] in ENDED and not (end := ended_as_asked(r.log, r.config, v["status"])).passed:
        return failed(f"{end.measured}, by the settings {end.bound}")
    recorded = {g["id"]: g["verdict"] for g in v["gates"]}
    if odd := set(recorded) ^ set(GATES) - _later_gates(r):
        return failed(f"gates {sorted(odd)} are missing or unknown")
    worst = verdict_of(recorded.values(), unasked=PASS)
    if v["verdict"] != worst:
        return failed(f"the verdict is {v['verdict']}, the worst of its gates {worst}")
    # `metrics` has judged run.placeholder.
    again = [f for f in _judge_again(r).in_order() if f.verdict != SKIPPED and f.name != "run.placeholder"]
    for f in again:
        if SEVERITY.index(f.verdict) > SEVERITY.index(recorded.get(f.name, PASS)):
            return failed(
                f"{f.name} is {recorded.get(f.name, PASS)} in verdict.json, {f.verdict} by the log: {f.measured}"
            )
    measured = f"{v['verdict']}, {plural(len(again), 'gate')} asked again from the log"
    return Finding.of("verdict", True, measured, bound)


def _wrong_status(r: Record) -> str:
    """Say why no run ends with the status on record; "" where one does."""
    s, status, steps = r.settings, r.verdict["status"], r.verdict["steps"]
    losses = [line["val_loss"] for line in r.evaluations]
    if status == "DONE" and steps != s.num_steps and s.on_exhausted != "stop":
        return f"DONE after {plural(steps, 'step')} of {s.num_steps}"
    if status == "TARGET_REACHED" and not (
        s.target_val_loss is not None and losses and losses[-1] <= s.target_val_loss
    ):
        return f"TARGET_REACHED at {losses[-1:]}, target_val_loss = {s.target_val_loss}"
    behind = len(losses) - 1 - losses.index(min(losses)) if losses else 0
    if status == "EARLY_STOP" and behind <= s.patience:
        return f"EARLY_STOP {plural(behind, 'evaluation')} behind the best one, patience = {s.patience}"
    return "" if status in (*ENDED, *STATUSES) else f"status = {status!r}"


def _later_gates(r: Record) -> set[str]:
    """List the gates that a run of an older version may lack: those whose failure would have ended it, and later ones."""
    if r.config.get("code_sha256") == code_sha256():
        return set()
    ending = {g.id for g in GATES.values() if g.then in ("refuse", "abort")}
    ending |= {"before.tokens"} if r.facts.only_pairs else {"before.tokens", "run.margin"}
    ending |= set() if any(read_ranks(r.run.path)) else {"run.straggler"}
    return ending - {row["id"] for row in r.verdict["gates"]}


def _judge_again(r: Record) -> Gates:
    """Judge all lines of the log, and the target. A failure does not raise."""
    gates, findings = Gates(r.facts.bounds), judge(r.log, r.facts)
    if r.facts.target is not None and r.evaluations:
        findings.append(target(r.evaluations[-1], r.facts.target))
    for finding in findings:
        with suppress(AprError):  # the gate keeps the finding before it raises
            gates.judge(finding)
    return gates


def epochs(r: Record) -> Finding:
    """Compare each ckpt/epoch-NNN.metadata.json with the steps and the evaluation that it sums up."""
    found, bound = r.run.epochs(), "means and maxima of metrics.jsonl"
    for facts in found:
        i = facts["epoch"]
        steps = r.epoch(i)
        losses, norm = [line["train_loss"] for line in steps], max(line["grad_norm"] for line in steps)
        seconds = facts["wall_seconds"]  # evaluations included
        expected = epoch_facts(r.evaluations[i], losses, steps[-1]["tokens_seen"], norm, seconds)
        # Older runs have no time of their evaluations in the log.
        before = [line for line in [*r.steps, *r.evaluations] if line["step"] <= facts["step"]]
        logged = sum(line.get("wall_ms", 0.0) for line in before) / 1e3
        is_timed = all("wall_ms" in line for line in r.evaluations)
        if seconds < logged * (1 - 1e-6) or (is_timed and seconds > logged * (1 + 1e-6)):
            measured = f"epoch {i}: wall_seconds = {seconds}, the log has {logged} s"
            return Finding.of("epochs", False, measured, bound)
        for side in ("train", "val"):
            expected[f"{side}_ppl"] = math.e ** min(facts[f"{side}_loss"], 700)
        expected["train_loss"] = math.fsum(losses) / len(losses)
        last = [line["train_loss"] for line in steps if line["step"] > facts["step"] - LAST_STEPS]
        expected["train_loss_last"] = math.fsum(last) / len(last)
        for key, value in expected.items():
            if not near(facts[key], value):
                measured = f"epoch {i}: {key} = {facts[key]}, {value} by the log"
                return Finding.of("epochs", False, measured, bound)
    due, there = r.epochs_due(), [facts["epoch"] for facts in found]
    if there != due and not (r.is_cut and there == due[:-1]):
        measured = f"metadata of {plural(len(there), 'epoch')}, {plural(len(due), 'evaluation')} of which a checkpoint is due"
        return Finding.of("epochs", False, measured, bound)
    return Finding.of("epochs", True, f"{plural(len(found), 'epoch')}", bound)
