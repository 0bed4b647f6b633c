"""Gates of a run as observers of its events: each measures at the events that it hears and keeps its findings in Gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import MalformedFile
from ..common.events import (
    Evaluated,
    FormulasChecked,
    GradientsReady,
    Line,
    Measured,
    Reproduced,
    Sampled,
    Saved,
    SpotChecked,
    Started,
    StepBegun,
    WeightsReady,
)
from ..common.finding import FAIL, SUSPECT, Finding
from ..common.units import plural
from ..data.batches import sequential
from . import measure, verdict
from .adapters import adapter_gradients, base_loaded
from .asked import is_learning_rate, learning_rate
from .follow import Follow
from .gates import GATES, Gates
from .initial import continued_adapters, new_adapters, random_weights
from .judge import Facts, judge
from .losses import pretrained_loss
from .resumed import as_saved
from .subject import Subject

FOLLOWED_STEPS = (
    20  # first steps of a process in which the learning rate is measured; then every FOLLOW_EVERY
)
FOLLOW_EVERY = 10
NEAR_CLIPPING = 0.5  # of --grad-clip: a norm above it in one step, and the next step is followed if it clips
SHUFFLED_TOKENS = 2048  # of validation windows, whose order start.pretrained takes away


def is_followed(steps: int) -> bool:
    """Decide whether a step is followed element by element; steps: those that this process has taken before it."""
    return steps < FOLLOWED_STEPS or steps % FOLLOW_EVERY == 0


class StartGates:
    """Gates of weights, causality and the first evaluation of a process. Raises Refused, Aborted."""

    def __init__(
        self, subject: Subject, gates: Gates, note: Callable[[str], None] = lambda text: None
    ) -> None:
        self.subject, self.gates, self.note = subject, gates, note

    def weights_ready(self, e: WeightsReady) -> None:
        """Compare the weights on the device with their origin: a saved state, a checkpoint or random numbers."""
        t, gates = self.subject, self.gates
        if e.resumed:
            try:
                gates.restore(e.findings)
            except (KeyError, TypeError) as error:
                raise MalformedFile(f"{t.run}: gates of another version of apr, or none: {error}") from None
            gates.judge(as_saved(e), e.step)
            return
        with gates.timed("before.weights"):
            gates.judge(self._weights())
        gates.skip("before.resumed", "the run began in this process")

    def _weights(self) -> Finding:
        t = self.subject
        if t.adapters and t.init:
            loaded = base_loaded(t.adapters, t.init)
            if t.adapted:
                why = continued_adapters(t.adapters, t.whole, t.settings.lora_init)
            else:
                why = new_adapters(t.adapters, t.whole, t.settings.seed, t.init)
            return replace(loaded, verdict=FAIL, measured=why, why=why) if why else loaded
        if t.init:
            return measure.loaded_weights(t.model, t.whole, t.init)
        return random_weights(t.model, t.whole, t.settings.initializer_range, t.settings.seed)

    def started(self, e: Started) -> None:
        """Change the second half of sequences, and compare what the head reads."""
        ids, _ = next(iter(sequential(self.subject.val, min(self.subject.model.batch, 2))))
        with self.gates.timed("start.causal"):
            self.gates.judge(measure.causal(self.subject.model, ids), e.step)

    def reproduced(self, e: Reproduced) -> None:
        """Compare the evaluation that a resumed run repeats with the one it continues."""
        tolerance = self.gates.bound(f"reproduce_{self.subject.model.dtype}")
        self.gates.judge(measure.reproduced("start.reproduces", e.loss, e.recorded, tolerance), e.step)

    def evaluated(self, e: Evaluated) -> None:
        """Judge the evaluation before the first step."""
        if e.line["step"]:
            return
        loss, gates, init = e.line["val_loss"], self.gates, self.subject.init
        if init is None:
            gates.judge(self._random_guess(loss, e.line["val_tokens"]), 0)
            gates.skip("start.pretrained", "random weights")
            gates.skip("start.reproduces", "random weights")
            return
        gates.skip("start.loss", "the weights come from a checkpoint")
        if self.subject.model.preferences:
            for gate in ("start.pretrained", "start.reproduces"):
                gates.skip(gate, "the loss of pairs compares with the checkpoint itself")
            return
        entropy = self.subject.val.shards.unigram_entropy
        share, vocab = gates.bound("pretrained_share"), self.subject.cfg.vocab_size
        pretrained = pretrained_loss(loss, entropy, share, vocab, self._shuffled)
        if pretrained.passed and pretrained.why:
            self.note(
                f"start.pretrained: {pretrained.measured}. Look at: {GATES['start.pretrained'].look_at}"
            )
        recorded = init.metadata.get("evaluation") if init.kind == "apr" else None
        if not isinstance(recorded, dict):
            gates.skip("start.reproduces", "no validation loss is recorded in the checkpoint")
            gates.judge(pretrained, 0)
            return
        differs = [k for k, v in self.subject.evaluated_on.items() if recorded.get(k) != v]
        differs += ["weights, without adapters"] if self.subject.adapted else []
        adapters = self.subject.adapters
        differs += ["weights, not rounded to 8 bits"] if adapters and adapters.config.base else []
        if differs:
            gates.skip("start.reproduces", f"recorded on other {', '.join(differs)}")
            # The training of the checkpoint is its own affair.
            gates.judge(pretrained if pretrained.passed else replace(pretrained, verdict=SUSPECT), 0)
        else:
            self.reproduced(Reproduced(0, loss, recorded["val_loss"]))
            gates.skip("start.pretrained", "its recorded loss on these very windows is the better measure")

    def _shuffled(self) -> tuple[np.ndarray, np.ndarray]:
        """Compute the losses of some batches of validation windows, and of their tokens in random order."""
        model, rng = self.subject.model, np.random.default_rng(0)
        windows = max(4 * model.batch, SHUFFLED_TOKENS // model.seq)
        losses: list[tuple[float, float]] = []
        for ids, targets in sequential(self.subject.val, model.batch, windows):
            rows = np.concatenate([ids, targets[:, -1:]], axis=1)
            mixed = rng.permuted(np.where(rows < 0, ids[:, :1], rows), axis=1)
            shuffled = np.where(targets < 0, targets, mixed[:, 1:])
            losses.append((self._loss(ids, targets), self._loss(mixed[:, :-1], shuffled)))
        here, apart = np.array(losses).T
        return here, apart

    def _loss(self, ids: np.ndarray, targets: np.ndarray) -> float:
        """Compute the mean loss of a batch."""
        model, be = self.subject.model, self.subject.backend
        be.fill(model.total, 0)
        model.forward(np.ascontiguousarray(ids, np.int32))
        model.loss(np.ascontiguousarray(targets, np.int32))
        return float(be.to_host(model.total)[0]) / max(1, int((targets >= 0).sum()))

    def _random_guess(self, loss: float, targets: int) -> Finding:
        """Compare the loss of random weights, the mean over so many targets, with that of a random guess."""
        t = self.subject
        rows = t.model.b * t.model.t
        rstd = float(t.backend.to_host(t.model.buffers["rstd"][:rows]).mean())
        # Of packed examples, which start from a checkpoint, there is no scan.
        found = [split for split in t.splits if split.scan]
        scans = [x.scan for x in found if x.side == "val" and x.scan] or [x.scan for x in found if x.scan]
        counts = np.sum([scan.counts for scan in scans], axis=0)
        share = counts / max(1, counts.sum())
        # Of n ids drawn by p, the sum of squared shares is 1/n + (1 - 1/n) sum of p^2 in the mean.
        of_all = float(np.square(share).sum())
        spread = 1 / max(of_all + (1 - of_all) / max(1, targets), 1e-12)
        ids, following = next(iter(sequential(t.val, 64, t.evaluated_on["val_windows"] or None)))
        repeated, margin = float((ids == following).mean()), self.gates.bound("start_margin")
        return measure.initial_loss(t.cfg, loss, t.settings.initializer_range, rstd, spread, repeated, margin)


class StepGates:
    """Gates run.tokens and run.gradients. Raises Aborted."""

    def __init__(self, subject: Subject, gates: Gates) -> None:
        self.subject, self.gates = subject, gates
        self.steps = self.tokens = self.trained = 0
        self.left = 0.0
        self.gradients: Callable[[float], Finding] | None = None
        self.scratch = subject.scratch

    def computes_before(self, step: int) -> bool:
        """Tell whether the gradients are spoiled before the next step."""
        return is_followed(self.steps)

    def step_begun(self, e: StepBegun) -> None:
        """Count the targets of the batch; spoil the gradients, which its first micro-batch must overwrite."""
        model, self.left = self.subject.model, 0.0
        self.tokens, self.trained = int(np.count_nonzero(e.targets >= 0)), model.tokens_trained
        if is_followed(self.steps):
            with self.gates.timed("run.gradients"):
                measure.spoil_gradients(self.subject.adapters or model)
                for _, own in self.subject.shard.runs if self.subject.shard else ():
                    self.subject.backend.fill(self.subject.optimizer.g[own], measure.SPOILED)

    def gradients_ready(self, e: GradientsReady) -> None:
        """Look for what was in the gradients before; read those of every tensor, in the first step of this process."""
        t = self.subject
        if is_followed(self.steps):
            with self.gates.timed("run.gradients"):
                self.left = measure.gradients_left(t.optimizer, self.scratch)
        self.gradients = None
        if not self.steps and t.adapters:
            self.gradients = adapter_gradients(t.adapters, self.scratch, t.optimizer.g, t.shard)
        elif not self.steps:
            found = measure.gradients(t.model, t.optimizer.g, t.shard)
            self.gradients = partial(measure.gradient_norm, *found)
        self.steps += 1

    def measured(self, e: Measured) -> None:
        """Judge the tokens and gradients of a step."""
        if "train_loss" not in e.line:
            return
        t, gates, step, seen = self.subject, self.gates, e.line["step"], e.line["tokens_seen"]
        trained, read = t.model.tokens_trained - self.trained, t.batches.targets_read
        measured = f"{trained:,} of {self.tokens:,} in a step, {seen:,} in all"
        bound, is_equal = f"equal, and {read:,} by the position in the data", trained == self.tokens
        gates.judge(Finding.of("run.tokens", is_equal and read == seen, measured, bound), step)
        if self.left:
            why = f"the gradients hold what was there before the step: norm {self.left:.4g}"
            gates.judge(Finding.of("run.gradients", False, why, "the gradients of the step alone", why), step)
        if self.gradients is not None and t.settings.seq_length < 2:
            gates.skip("run.gradients", "attention over one token has no gradient of queries and keys")
        elif self.gradients is not None:
            norm = measure.weight_norm(t.optimizer, t.adapters or t.model, e.line["weight_norm"], t.shard)
            gates.judge(norm, step)
            gates.judge(self.gradients(e.line["grad_norm"]), step)


class LogGates:
    """Gates that follow from the log: see judge.py. Raises Aborted.

    lines: reads the lines of metrics.jsonl that a resumed run continues. states: lists the saved states"""

    def __init__(
        self,
        gates: Gates,
        facts: Facts,
        lines: Callable[[], list[Line]],
        states: Callable[[], list[Path]],
    ) -> None:
        self.gates, self.facts, self.lines, self.states = gates, facts, lines, states
        self.log: list[Line] = []
        self.later: list[Finding] = []

    def started(self, e: Started) -> None:
        """Read the log so far."""
        self.log = self.lines()

    def measured(self, e: Measured) -> None:
        """Judge that the numbers of a line are finite; keep its other findings for later."""
        self.log.append(e.line)
        finite, *self.later = judge(self.log, self.facts, len(self.log) - 1)
        if finite.verdict == FAIL and "train_loss" in e.line:
            saved = self.states()
            finite = replace(finite, why=f"{finite.why}. Last saved state: {saved[-1] if saved else 'none'}")
        self.gates.judge(finite, e.line["step"])

    def sampled(self, e: Sampled) -> None:
        """Judge the first tokens of a sample."""
        if e.finding.verdict == FAIL:
            self.gates.judge(replace(e.finding, name="run.log", why=f"the sample: {e.finding.why}"), e.step)

    def judge_later(self) -> None:
        """Judge the other findings of the line."""
        for f in self.later:
            self.gates.judge(f, f.where if isinstance(f.where, int) else None)

    def evaluated(self, e: Evaluated) -> None:
        """Keep the findings of an evaluation, and of the log only the lines that later ones are compared with."""
        self.judge_later()
        steps = [line for line in self.log if "train_loss" in line]
        self.log = [*steps[-int(self.facts.bound("constant_steps")) :], e.line]


class PlaceholderGate:
    """Gate run.placeholder, behind those of StepGates: sequences that are skipped make a loss of 0. Raises Aborted."""

    def __init__(self, log: LogGates) -> None:
        self.log = log

    def measured(self, e: Measured) -> None:
        """Judge the loss of a step beside those before it."""
        if "train_loss" in e.line:
            self.log.judge_later()


class LearningRateGate:
    """Gate run.learning-rate: follows some elements of all parameters through optimizer steps. Raises Aborted."""

    def __init__(self, subject: Subject, gates: Gates) -> None:
        self.gates, self.settings, self.steps = gates, subject.settings, 0
        layout = (subject.adapters or subject.model).layout
        self.follow = Follow(subject.optimizer, subject.settings, layout, subject.shard)
        self.is_near_clipping = self.is_held = False

    def gradients_ready(self, e: GradientsReady) -> None:
        """Read weights, moments and gradients before the optimizer's step."""
        self.is_held = is_followed(self.steps) or self.is_near_clipping
        if self.is_held:
            with self.gates.timed("run.learning-rate"):
                self.follow.before()

    def measured(self, e: Measured) -> None:
        """Compare the learning rate in the log with that of the settings and with the move of the weights."""
        line = e.line
        if "train_loss" not in line:
            return
        lr, step = line["lr"], line["step"]
        if not is_learning_rate(lr, self.settings, step):
            want = learning_rate(self.settings, step)
            why = f"the log says a learning rate of {lr:.6e}, the settings ask for {want:.6e}"
            self.gates.judge(
                Finding.of("run.learning-rate", False, f"log {lr:.6e}", f"{want:.6e}", why), step
            )
        clip = self.settings.grad_clip
        is_clipped, self.is_near_clipping = (
            0 < clip < line["grad_norm"],
            0 < NEAR_CLIPPING * clip < line["grad_norm"],
        )
        if is_followed(self.steps) or (self.is_held and is_clipped):
            tolerance = self.gates.bound("learning_rate_tolerance")
            with self.gates.timed("run.learning-rate"):
                self.gates.judge(self.follow.after(lr, line["grad_norm"], tolerance, step), step)
        self.steps += 1


class SpotGate:
    """Gate start.ops. Raises Aborted, naming the op."""

    def __init__(self, gates: Gates) -> None:
        self.gates = gates

    def spot_checked(self, e: SpotChecked) -> None:
        """Judge the comparison with the float64 reference."""
        report: Any = e.report
        self.gates.seconds["start.ops"] = self.gates.seconds.get("start.ops", 0.0) + e.seconds
        if not report.rows:
            self.gates.skip("start.ops", report.skipped["forward"])
            return
        worst = max(r.ratio for r in report.rows)
        measured = (
            f"{plural(len(report.rows), 'array')} of {report.batch}, the worst {worst:.2f} of its tolerance"
        )
        why, first = "", report.first
        if not report.agree:
            cause = f": {first.cause}" if first.cause else ""
            why = (
                f"spot check: {first.place} is {first.ratio:.3g} times its tolerance away from the float64 reference"
                f"{cause}"
            )
        bound, score = "every array within its tolerance", 0.0 if why else worst
        self.gates.judge(Finding.of("start.ops", not why, measured, bound, why, score=score), e.step)


class FormulasGate:
    """Gate start.formulas. Raises Aborted, naming the array that is another."""

    def __init__(self, gates: Gates) -> None:
        self.gates = gates

    def formulas_checked(self, e: FormulasChecked) -> None:
        """Judge rope tables of all positions, and the golden steps of the family."""
        self.gates.seconds["start.formulas"] = self.gates.seconds.get("start.formulas", 0.0) + e.seconds
        worst: Any = max(e.rows, key=lambda r: r.ratio)
        wrong = [r for r in e.rows if not r.ok]
        measured = (
            f"{plural(len(e.rows), 'array')}, the worst {worst.ratio:.2f} of its tolerance: {worst.tap}"
        )
        why = f"{wrong[0].tap} and {len(wrong) - 1} more are not what stock models compute" if wrong else ""
        bound = "every array within its tolerance"
        self.gates.judge(
            Finding.of("start.formulas", not wrong, measured, bound, why, score=worst.ratio), e.step
        )


class VerdictFile:
    """Writes verdict.json with the status RUNNING at each checkpoint."""

    def __init__(self, run: Path, gates: Gates) -> None:
        self.run, self.gates = run, gates

    def saved(self, e: Saved) -> None:
        """Write the verdict so far."""
        verdict.save_verdict(self.run, self.gates, "RUNNING", e.facts["step"], e.facts["val_loss"])
