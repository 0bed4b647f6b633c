"""Judge a run by its log: the findings that follow from lines of metrics.jsonl and facts of the run, and nothing else.

A run judges each line before it counts; `apr verify` judges all lines of the log again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from ..common.events import Line
from ..common.finding import SKIPPED, Finding
from ..common.provenance import code_sha256
from ..common.units import LAST_STEPS
from . import losses as of_losses
from .gates import BOUNDS
from .pairs import margin

RELATIVE_TOLERANCE = 1e-9  # of a figure that is computed again from the same numbers
ENDED = ("DONE", "TARGET_REACHED", "EARLY_STOP")  # status words of runs that came to their end
OF_PARTS = 1e-5  # of a sum whose parts were added in another order


@dataclass(frozen=True)
class Facts:
    """Facts that bounds follow from.

    vocab_size         V
    random_start       the weights began as random numbers
    only_answers       the loss is that of answers to given questions
    entropy            of token frequencies of the validation text, nats/token
    val_tokens         of the validation text; 0 where config.json has no val_bytes
    val_bytes
    target             --target-val-loss, nats/token
    bounds             bounds of gates that replace those of the table
    only_pairs         the loss is that of pairs of answers, which has no length in bytes
    sources            of a mixture, by name
    """

    vocab_size: int
    random_start: bool
    only_answers: bool
    entropy: float
    val_tokens: int
    val_bytes: int
    target: float | None
    bounds: Mapping[str, float]
    only_pairs: bool = False
    sources: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], bounds: Mapping[str, float]) -> Facts:
        """Read the facts from the config.json of a run."""
        s, data = config["settings"], config["data"]
        return cls(
            config["model"]["vocab_size"],
            not s["init"],
            s.get("instruct") is not None or "packed" in data,
            data["val_unigram_entropy_nats"],
            data["val_tokens"] if "val_bytes" in data else 0,
            data.get("val_bytes", 0),
            s["target_val_loss"],
            bounds,
            bool(data.get("packed", {}).get("pairs")),
            tuple(data.get("mixture", ())),
        )

    def bound(self, name: str) -> float:
        """Return a bound of the table of gates, or the user's in its place."""
        return self.bounds.get(name, BOUNDS[name])


def judge(log: Sequence[Line], facts: Facts, since: int = 0) -> list[Finding]:
    """Judge the lines log[since:], each by what stands before it; `where` of a finding is the step."""
    findings: list[Finding] = []
    for i in range(since, len(log)):
        if "train_loss" in log[i]:
            findings += _judge_step(log, i, facts)
        elif "val_loss" in log[i]:
            findings += _judge_evaluation(log, i, facts)
    return findings


def steps_before(log: Sequence[Line], i: int) -> Iterable[Line]:
    """Yield the lines of steps before log[i], the latest first."""
    return (log[j] for j in range(i - 1, -1, -1) if "train_loss" in log[j])


def epoch_before(log: Sequence[Line], i: int) -> tuple[list[Line], Line | None]:
    """(lines of the steps since the evaluation before log[i], the line of that evaluation)."""
    steps: list[Line] = []
    for j in range(i - 1, -1, -1):
        if "val_loss" in log[j]:
            return steps[::-1], log[j]
        if "train_loss" in log[j]:
            steps.append(log[j])
    return steps[::-1], None


def _judge_step(log: Sequence[Line], i: int, facts: Facts) -> list[Finding]:
    line = log[i]
    step, loss = line["step"], line["train_loss"]
    numbers = {key: line[key] for key in ("train_loss", "grad_norm", "weight_norm")}
    measured = ", ".join(f"{key} = {x:.6g}" for key, x in numbers.items())
    is_finite = all(math.isfinite(x) for x in numbers.values())
    why = "" if is_finite else f"{measured}: not finite"
    finite = Finding.of("run.finite", is_finite, measured, "finite", why, where=step)

    most, equal = int(facts.bound("constant_steps")), 0
    for before in steps_before(log, i):
        if before["train_loss"] != loss or equal >= most:
            break
        equal += 1
    measured = f"{equal + 1} equal losses in a row" if equal else "no two losses in a row are equal"
    is_real = equal < max(1, most - 1) and loss != 0
    zero = "exactly 0, of pairs that are told apart beyond what float32 holds: a lower --beta or --lr"
    why = f"train_loss = {loss!r}: {measured if loss else 'exactly 0'}, which no measurement gives"
    why = f"train_loss = {loss!r}: {zero}" if facts.only_pairs and not loss else why
    bound = f"below {most}, and never 0"
    more: dict[str, Any] = {"score": equal, "where": step}
    real = Finding.of("run.placeholder", is_real, measured, bound, "" if is_real else why, **more)
    seen = [0] if step == 1 else [x["tokens_seen"] for x in islice(steps_before(log, i), 1)]
    found = [finite, real, *(_speed(line, line["tokens_seen"] - n) for n in seen)]
    if facts.sources:
        earlier = [{}] if step == 1 else list(islice(steps_before(log, i), 1))
        found += [_of_sources(line, x, facts) for x in earlier]
    return found


def _of_sources(line: Line, before: Line, facts: Facts) -> Finding:
    """Compare the losses of the sources of a step, each times its targets, with the loss of all times all targets."""
    keys = [f"tokens_seen/{name}" for name in facts.sources]
    if not all(key in line for key in keys):
        return Finding.of(
            "run.log", False, f"no {' or '.join(keys)}", "the targets of each source", where=line["step"]
        )
    new = [line[key] - before.get(key, 0) for key in keys]
    losses = [line.get(f"train_loss/{name}") for name in facts.sources]
    return _adds_up(line, "train_loss", line["tokens_seen"] - before.get("tokens_seen", 0), losses, new)


def _adds_up(
    line: Line, key: str, count: int, losses: Sequence[float | None], counts: Sequence[int]
) -> Finding:
    total = sum(n * (x or 0.0) for x, n in zip(losses, counts, strict=True))
    is_known = all((x is not None) == bool(n) for x, n in zip(losses, counts, strict=True))
    want = line[key] * count
    measured = f"{key} of the sources, {sum(counts):,} targets in all, gives {total:.8g}"
    is_same = is_known and sum(counts) == count and abs(total - want) <= OF_PARTS * abs(want)
    return Finding.of("run.log", is_same, measured, f"{count:,} targets, {want:.8g}", where=line["step"])


def _speed(line: Line, tokens: int) -> Finding:
    """Compare tokens/s of a step with its time and the tokens that it adds to those seen."""
    wall = line["wall_ms"] / 1e3
    measured = f"{line['tokens_per_sec']:.6g} tokens/s for {wall:.6g} s"
    is_right = near(line["tokens_per_sec"] * wall, tokens)
    return Finding.of("run.log", is_right, measured, f"{tokens:,} new tokens", where=line["step"])


def _bits(line: Line, facts: Facts) -> Finding:
    """Compare bits per byte with the loss: nats x tokens x log2(e) / bytes."""
    want = line["val_loss"] * facts.val_tokens * math.log2(math.e) / facts.val_bytes
    bits, loss = line["val_bits_per_byte"], f"{line['val_loss']:.6g} nats/token are {want:.6g}"
    return Finding.of("run.log", near(bits, want), f"{bits:.6g} bits/byte", loss, where=line["step"])


def _judge_evaluation(log: Sequence[Line], i: int, facts: Facts) -> list[Finding]:
    line = log[i]
    step, loss = line["step"], line["val_loss"]
    is_finite = math.isfinite(loss)
    why = "" if is_finite else f"val_loss = {loss} is not finite"
    findings = [Finding.of("run.finite", is_finite, f"val_loss = {loss:.6g}", "finite", why, where=step)]
    if facts.sources:
        of_each = [line.get(f"val_loss/{name}") for name in facts.sources]
        counts = [line.get(f"val_tokens/{name}", 0) for name in facts.sources]
        findings.append(_adds_up(line, "val_loss", line["val_tokens"], of_each, counts))
    if facts.val_bytes and not facts.only_pairs:
        findings.append(_bits(line, facts))
    steps, before = epoch_before(log, i)
    if before is not None:
        findings.append(diverged(loss, before, facts, step))
        moved = margin(line, facts.bound("chosen_fall"))
        findings += [moved] if moved else []
    if steps:
        findings += _judge_epoch(log, i, steps, facts)
    return findings


def diverged(loss: float, before: Line, facts: Facts, step: int) -> Finding:
    """Compare a validation loss with the one before; the first after training also with that of a guess."""
    previous = before["val_loss"]
    if before["step"] == 0:
        guess, most = math.log(facts.vocab_size), facts.bound("first_epoch")
        bound = most * max(guess, previous)
        source = f"{most:g} times the larger of ln V = {guess:.4f} and {previous:.4f} before training"
    else:
        most = facts.bound("next_epoch")
        # A loss of pairs may come close to 0, from where twice is little.
        previous = max(previous, math.log(2)) if facts.only_pairs else previous
        bound, source = most * previous, f"{most:g} times the previous {previous:.4f}"
    is_good = loss <= bound
    why = "" if is_good else f"diverged: val_loss {loss:.4f} is more than {source}. Try a lower --lr"
    more: dict[str, Any] = {"score": loss / bound, "where": step}
    return Finding.of("run.diverged", is_good, f"{loss:.4f}", f"at most {bound:.4f}, {source}", why, **more)


def _judge_epoch(log: Sequence[Line], i: int, steps: list[Line], facts: Facts) -> list[Finding]:
    """Judge an evaluation beside the steps since the one before it, and earlier ones where they are few."""
    line = log[i]
    losses, loss = [s["train_loss"] for s in steps], line["val_loss"]
    share, error = facts.bound("val_below_train"), line["val_loss_stderr"]
    longer = [x["train_loss"] for x in islice(steps_before(log, i), LAST_STEPS)][::-1]
    if facts.sources:
        # The sources have other shares of what is trained on than of what is held out.
        findings = [_below_train(log, i, steps, name, share) for name in facts.sources]
    else:
        findings = [of_losses.below_train(loss, error, losses[-LAST_STEPS:], losses, share, longer)]
    if facts.only_answers:
        why = "an answer can follow from its question, so no loss is too low"
        findings.append(Finding.skipped("end.plausible", why))
    else:
        findings.append(of_losses.plausible(line["val_bits_per_byte"], facts.bound("min_bits_per_byte")))
    if facts.random_start:
        tokens, decade = steps[-1]["tokens_seen"], facts.bound("drop_per_decade")
        findings.append(of_losses.learning(loss, facts.entropy, tokens, decade))
    return [f if f.verdict == SKIPPED else replace(f, where=line["step"]) for f in findings]


def _below_train(log: Sequence[Line], i: int, steps: list[Line], name: str, share: float) -> Finding:
    """Compare the validation loss of a source with its own training losses."""
    key, line = f"train_loss/{name}", log[i]
    losses = [x[key] for x in steps if key in x]
    before = (x[key] for x in steps_before(log, i) if key in x)
    if not losses or f"val_loss/{name}" not in line:
        return Finding.skipped("run.val-below-train", f"no step of {name}")
    f = of_losses.below_train(
        line[f"val_loss/{name}"], line[f"val_loss_stderr/{name}"], losses[-LAST_STEPS:], losses, share,
        [*islice(before, LAST_STEPS)][::-1],
    )  # fmt: skip
    return (
        f
        if f.verdict == SKIPPED
        else replace(f, measured=f"{name}: {f.measured}", why=f.why and f"{name}: {f.why}")
    )


def target(line: Line, target: float) -> Finding:
    """Compare the last evaluation of a run with its target."""
    loss, is_reached = line["val_loss"], line["val_loss"] <= target
    measured = f"{loss:.4f} nats/token"
    why = "" if is_reached else f"the target was not reached: {measured}, asked for {target:g}"
    return Finding.of("end.target", is_reached, measured, f"at most {target:g}", why, where=line["step"])


def ended_as_asked(log: Sequence[Line], config: Mapping[str, Any], status: str) -> Finding:
    """Compare the step and the status of a run that came to its end with those that its settings give.

    It ends at the first evaluation at which the target is reached, or that is one more than --patience behind the best; or else
    at the last step, or where a pass ends. Older versions did not ask the evaluation at the end of a pass for the first two."""
    s, losses = config["settings"], [line for line in log if "val_loss" in line]
    expected = next(filter(None, (_early(s, losses[: k + 1]) for k in range(len(losses)))), None)
    last = losses[-1]["step"]
    is_between = s["on_exhausted"] == "stop" and last != s["num_steps"] and last % s["eval_every"] != 0
    if is_between and expected == _early(s, losses) and config.get("code_sha256") != code_sha256():
        expected = None if status == "DONE" else expected
    if expected is None:
        step, batch = s["num_steps"], s["batch_size"]
        if s["on_exhausted"] == "stop" and not config["data"].get("mixture"):
            step = min(step, config["data"]["train_windows"] // batch)
        # A mixture ends with the first of its sources.
        is_open = s["on_exhausted"] == "stop" and bool(config["data"].get("mixture"))
        expected = "DONE", last if is_open else step
    found = status, last
    return Finding.of(
        "run.log", found == expected, "ended {} at step {}".format(*found), "{} at step {}".format(*expected),
        where=found[1],
    )  # fmt: skip


def _early(s: Mapping[str, Any], evaluations: Sequence[Line]) -> tuple[str, int] | None:
    """Say how and where a run ends behind its latest evaluation; None where it goes on. The first one is that before step 1."""
    losses, step = [line["val_loss"] for line in evaluations], evaluations[-1]["step"]
    if not step or len(losses) <= s["min_epochs"]:
        return None
    if s["target_val_loss"] is not None and losses[-1] <= s["target_val_loss"]:
        return "TARGET_REACHED", step
    since_best = len(losses) - 1 - losses.index(min(losses))
    return ("EARLY_STOP", step) if since_best > s["patience"] else None


def near(a: Any, b: float) -> bool:
    """Compare two figures that were computed from the same numbers."""
    return isinstance(a, int | float) and abs(a - b) <= RELATIVE_TOLERANCE * max(abs(a), abs(b))
