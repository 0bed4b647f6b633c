"""The training loop: steps, evaluations, gates, checkpoints, early stop, resume."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from ..bisect.show import print_report
from ..bisect.spot import spot_check
from ..data.batches import Batches, Exhausted, sequential
from ..data.instruct import checked_piece, trained_targets
from ..device import cores
from ..errors import Interrupted, MalformedFile
from ..formats.models import fill
from ..lora import AdapterAdamW, adapt
from ..model import Model
from ..optim import AdamW, Schedule
from ..plan import flops_per_token, matmul_rate, memory
from . import measure
from .callbacks import Callback, CallbackFailed, tell
from .evaluate import Loss, Stopped, evaluate
from .gates import Answer, Gates, parse_bounds
from .inputs import Inputs, judge_inputs
from .recompute import in_fresh_process
from .rundir import RunDir, bits_per_byte, state_sha
from .sample import sample_text
from .show import Show

LAST_STEPS = measure.LAST_STEPS  # the mean of so many is reported beside the mean of the epoch
FOLLOWED = 20  # first steps of a process in which the learning rate is measured; then every FOLLOW_EVERY
FOLLOW_EVERY = 10
RATE_TRIES = 20  # at most, of about 0.1 s on a CPU, to measure how fast one large product is
SAMPLE_TOKENS = 64  # of the continuation of --sample at each evaluation


@dataclass
class Progress:
    """Where a run stands: what a state must hold, beside weights and moments, to go on exactly."""

    step: int = 0
    tokens_seen: int = 0
    data: dict[str, Any] = field(default_factory=dict)  # position in the stream of batches
    epoch_losses: list[float] = field(default_factory=list)
    grad_norm_max: float = 0.0  # in this epoch
    val_losses: list[float] = field(default_factory=list)  # before step 1, then one per epoch
    val_step: int = 0  # step of the latest evaluation
    best_val: float = math.inf
    evals_without_best: int = 0
    seconds: float = 0.0
    best_flops: float = 0.0  # FLOP/s of the fastest step
    last_loss: float | None = None  # of the latest step
    constant: int = 0  # steps in a row that had the loss of the one before, to the last bit
    gates: list[dict[str, Any]] = field(default_factory=list)  # answers so far


class Trainer:
    """One run, ready to train. Evaluation and training share the model's buffers."""

    def __init__(
        self,
        inputs: Inputs,
        run: RunDir,
        show: Show,
        resume: bool,
        gates: Gates | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        s = inputs.settings
        assert s.micro_batch_size is not None
        assert s.lr is not None
        assert s.lr_min is not None
        assert s.warmup_steps is not None
        self.inputs, self.run, self.show, self.s = inputs, run, show, s
        self.micro: int = s.micro_batch_size
        assert s.dtype is not None
        self.gates = Gates(parse_bounds(s.bounds)) if gates is None else gates
        judge_inputs(inputs, self.gates)  # before anything large is allocated
        self.model = Model(
            inputs.cfg,
            inputs.backend,
            self.micro,
            s.seq_length,
            s.dtype,
            recompute=s.recompute,
            z_loss=s.z_loss,
            document_end=inputs.document_end,
        )
        rates = (s.beta1, s.beta2, s.eps, s.weight_decay, s.grad_clip)
        self.lora = adapt(self.model, inputs.lora, inputs.init)
        self.opt = AdapterAdamW(self.lora, *rates) if self.lora else AdamW(self.model, *rates)
        self.schedule = Schedule(s.schedule, s.lr, s.lr_min, s.warmup_steps, s.num_steps)
        self.batches = Batches(inputs.train, s.batch_size, s.seed, s.shuffle, s.on_exhausted)
        self.began = time.perf_counter()
        self.flops_per_token = flops_per_token(inputs.cfg, s.seq_length)
        self._sampled = -1  # step of the latest sample
        self.progress = Progress()
        self.follow = measure.Follow(self.opt)
        self._scratch = inputs.backend.empty((1,), "float64")
        self.stop_asked = False
        self.callbacks = callbacks
        self.failed: CallbackFailed | None = None
        self._checked = False
        self._steps_here = 0  # of this process
        self._saved = -1  # step of the latest state
        self.resumed = resume and run.has_state()
        if self.resumed:
            self.load(None)
        else:
            self.begin_anew()
        self.model.tune(s.batch_size * s.seq_length)

    def begin_anew(self) -> None:
        """Weights, moments and data position as before the first step. Raises Refused."""
        model, opt, be = self.model, self.opt, self.inputs.backend
        host = np.zeros(opt.model.layout.size, np.float32)
        if self.lora:
            self.lora.begin(host, self.s.seed, self.inputs.lora_init)
        elif self.inputs.init:
            fill(model.layout, host, self.inputs.init)
        else:
            model.layout.init(host, self.s.seed, self.s.initializer_range)
        opt.set_weights(host)
        for moment in (opt.m, opt.v):
            be.fill(moment, 0)
        opt.steps = 0
        self.progress = Progress()
        self.batches.rewind()
        self._judge_weights()

    def load(self, state: Path | None) -> None:
        """Go on from a saved state, the latest one if none is given."""
        saved, sha, damaged = self.run.load_state(self.model, self.opt, state)
        for note in damaged:
            self.show.note(note)
        try:
            self.progress = Progress(**saved)
            self.gates.restore(self.progress.gates)
        except (TypeError, KeyError) as e:
            raise MalformedFile(
                f"{self.run.state}: a state of another version of apr, or none: {e}"
            ) from None
        self._saved = self.progress.step
        self.batches.restore(self.progress.data)
        self._sampled = self.progress.val_step
        found = state_sha(self.model, self.opt)
        self.gates.judge(
            "before.resumed",
            Answer(
                sha in (found, None),
                f"weights and moments {found[:12]} on the device",
                f"{(sha or 'unknown')[:12]}, as saved",
            ),
            self.progress.step,
        )

    def _judge_weights(self) -> None:
        if self.lora and self.inputs.init:
            answer = self.lora.loaded(self.inputs.init)
        elif self.inputs.init:
            answer = measure.loaded_weights(self.model, self.opt, self.inputs.init)
        else:
            answer = measure.random_weights(self.model, self.opt, self.s.initializer_range)
        self.gates.judge("before.weights", answer)
        self.gates.skip("before.resumed", "the run began in this process")

    def train_step(self) -> dict[str, Any]:
        """One optimizer step: the mean loss over all predicted tokens of the batch, and its gradient."""
        model, be, p = self.model, self.inputs.backend, self.progress
        start = time.perf_counter()
        ids, targets = self.batches.next()
        tokens = trained_targets(targets)
        if self._check_due():
            piece = checked_piece(ids[: self.micro], targets[: self.micro])
            start += self._spot_check(*piece)  # no part of the step's time
        first, follow = self._steps_here == 0, self._follow_due()
        left = measure.gradients_left(model, self._scratch) if follow else 0.0
        be.fill(model.total, 0)
        trained = model.tokens_trained
        for i in range(0, len(ids), self.micro):
            # A number of answers that comes once makes a scale that comes once: no record of it would be replayed.
            graph = self.s.graph and tokens == targets.size
            model.micro_step(ids[i : i + self.micro], targets[i : i + self.micro], 1 / tokens, graph)
        trained = model.tokens_trained - trained
        lr = self.schedule(p.step + 1)
        if self.lora:
            self.lora.gradients()
        apart = self._gradients_apart() if first else None
        if follow:
            self.follow.before()
        self.opt.step(lr)
        loss, norm = float(be.to_host(model.total)[0]) / tokens, self.opt.grad_norm()
        weights = self._weight_norm()
        wall = time.perf_counter() - start
        p.step += 1
        self._steps_here += 1
        p.tokens_seen += tokens
        p.seconds += wall
        p.constant = p.constant + 1 if loss == p.last_loss else 0
        p.last_loss = loss
        p.epoch_losses.append(loss)
        p.grad_norm_max = max(p.grad_norm_max, norm)
        line = dict(
            step=p.step,
            train_loss=loss,
            grad_norm=norm,
            weight_norm=weights,
            lr=lr,
            tokens_per_sec=tokens / wall,
            tokens_seen=p.tokens_seen,
            wall_ms=1e3 * wall,
        )
        self._judge_step(line, trained, tokens, apart, left)
        if follow:
            answer = self.follow.after(lr, norm, self.gates.bound("learning_rate_tolerance"))
            self.gates.judge("run.learning-rate", answer, p.step)
        if not first:
            p.best_flops = max(p.best_flops, self.flops_per_token * targets.size / wall)
        return line

    def _gradients_apart(self) -> Callable[[float], Answer]:
        """What judges a step's gradient norm, from every tensor's own."""
        if self.lora:
            return self.lora.apart(self._scratch)
        return partial(measure.gradient_norm, *measure.gradients(self.model, self._scratch))

    def _follow_due(self) -> bool:
        return self._steps_here < FOLLOWED or self._steps_here % FOLLOW_EVERY == 0

    def _weight_norm(self) -> float:
        """L2 norm of all weights, in float64 from the copy that the optimizer moves."""
        be = self.inputs.backend
        be.fill(self._scratch, 0)
        be.add_sum_sq(self._scratch, self.opt.master)
        return math.sqrt(square) if (square := float(be.to_host(self._scratch)[0])) >= 0 else math.nan

    def _judge_step(
        self,
        line: dict[str, Any],
        trained: int,
        tokens: int,
        apart: Callable[[float], Answer] | None,
        left: float,
    ) -> None:
        """The gates of every step. Raises Aborted."""
        p, judge = self.progress, self.gates.judge
        numbers = {key: line[key] for key in ("train_loss", "grad_norm", "weight_norm")}
        finite = all(math.isfinite(x) for x in numbers.values())
        said = ", ".join(f"{key} = {x:.6g}" for key, x in numbers.items())
        saved = self.run.states()
        why = f"{said}: not finite. Last saved state: {saved[-1] if saved else 'none'}"
        judge("run.finite", Answer(finite, said, "finite", "" if finite else why), p.step)
        read = self.batches.targets_read
        judge(
            "run.tokens",
            Answer(
                trained == tokens and read == p.tokens_seen,
                f"{trained:,} of {tokens:,} in a step, {p.tokens_seen:,} in all",
                f"equal, and {read:,} by the position in the data",
            ),
            p.step,
        )
        if left:
            said = f"gradients of norm {left:.4g} were left from the step before"
            judge("run.gradients", Answer(False, said, "0 before the first micro-batch", said), p.step)
        if apart is not None:
            if self.s.seq_length < 2:
                self.gates.skip(
                    "run.gradients", "attention over one token has no gradient of queries and keys"
                )
            else:
                judge("run.gradients", apart(line["grad_norm"]), p.step)
        most, loss = int(self.gates.bound("constant_steps")), line["train_loss"]
        measured = (
            f"{p.constant + 1} equal losses in a row" if p.constant else "no two losses in a row are equal"
        )
        real = p.constant < max(1, most - 1) and loss != 0
        why = (
            ""
            if real
            else f"train_loss = {loss!r}: {'exactly 0' if loss == 0 else measured}, which no measurement gives"
        )
        judge(
            "run.placeholder", Answer(real, measured, f"below {most}, and never 0", why, p.constant), p.step
        )

    def _note_pass(self) -> None:
        """One line when the data begins again."""
        b = self.batches
        follows = self.progress.tokens_seen // b.windows.targets
        measured = f"{b.passes} complete passes, {b.windows_read:,} windows read"
        self.gates.judge(
            "run.data", Answer(b.passes == follows, measured, f"{follows} by the tokens trained on")
        )
        if b.passes > (b.windows_read - b.step_windows) // b.windows.count:
            self.run.log(step=self.progress.step, passes=b.passes, windows=b.windows.count)
            self.show.note(
                f"step {self.progress.step:>5}  pass {b.passes} over the {b.windows.count:,} windows of the data is complete"
            )

    def _check_due(self) -> bool:
        every = self.s.spot_check
        return every >= 0 and (not self._checked or (every > 0 and self.progress.step % every == 0))

    def _spot_check(self, ids: np.ndarray, targets: np.ndarray) -> float:
        """Compare with the reference before a step; the seconds it took. Raises Aborted, after the table of what
        differs, naming the op."""
        self._checked, start = True, time.perf_counter()
        step = self.progress.step + 1
        report = spot_check(self.model, ids, targets, f"the model before step {step}")
        worst = max((r.ratio for r in report.rows), default=0.0)
        seconds = time.perf_counter() - start
        self.run.log(
            step=step,
            spot_check="skipped" if not report.rows else "agree" if report.agree else "differ",
            arrays=len(report.rows),
            worst_of_tolerance=worst,
            wall_ms=1e3 * seconds,
        )
        bound = "every array within its tolerance"
        if not report.rows:
            self.show.note(f"spot check   skipped: {report.skipped['forward']}")
            self.gates.skip("start.ops", report.skipped["forward"])
            return time.perf_counter() - start
        measured = f"{len(report.rows)} arrays of {report.batch}, the worst {worst:.2f} of its tolerance"
        if report.agree:
            self.show.note(
                f"step {step:>5}  spot check: {len(report.rows)} arrays of {report.batch} agree with the float64 "
                f"reference (worst {worst:.2f} of its tolerance, {seconds:.1f} s)"
            )
            self.gates.judge("start.ops", Answer(True, measured, bound, score=worst), step)
        else:
            print_report(report, self.show.console)
            first = report.first
            assert first is not None
            cause = f": {first.cause}" if first.cause else ""
            why = (
                f"spot check: {first.place} is {first.ratio:.3g} times its tolerance away from the float64 reference"
                f"{cause}"
            )
            self.gates.judge("start.ops", Answer(False, measured, bound, why), step)
        return time.perf_counter() - start

    def evaluate(self) -> Loss:
        """The validation loss of the weights as they are. Raises Stopped."""
        s = self.s
        most = s.val_batches and s.val_batches * s.batch_size
        return evaluate(self.model, self.inputs.val, self.micro, most, lambda: self.stop_asked)

    def _evaluate_and_log(self) -> tuple[float, float]:
        """(validation loss, its standard error). Raises Aborted for one that is not finite or far above the one before."""
        start = time.perf_counter()
        loss, tokens, error = self.evaluate()
        p, shards = self.progress, self.inputs.val.shards
        bits = bits_per_byte(loss, shards.total_tokens, shards.total_bytes)
        p.seconds += time.perf_counter() - start
        finite = math.isfinite(loss)
        why = "" if finite else f"val_loss = {loss} is not finite"
        self.gates.judge("run.finite", Answer(finite, f"val_loss = {loss:.6g}", "finite", why), p.step)
        line = dict(
            step=p.step, val_loss=loss, val_tokens=tokens, val_bits_per_byte=bits, val_loss_stderr=error
        )
        self.run.log(**line)
        if p.val_losses:
            self.gates.judge("run.diverged", self._diverged(loss), p.step)
        p.val_losses.append(loss)
        p.val_step = p.step
        if loss < p.best_val:
            p.best_val, p.evals_without_best = loss, 0
        else:
            p.evals_without_best += 1
        self.show.evaluation(p.step, loss, bits, p.epoch_losses)
        self.tell("on_evaluation", line)
        if self.s.sample is not None and self._sampled < p.step:
            self._sampled = p.step
            text = sample_text(self.inputs, self.model, self.s.sample, SAMPLE_TOKENS)
            self.run.log_sample(step=p.step, prompt=self.s.sample, text=text)
        return loss, error

    def _diverged(self, loss: float) -> Answer:
        p = self.progress
        if len(p.val_losses) == 1:  # the first epoch
            guess, most = math.log(self.inputs.cfg.vocab_size), self.gates.bound("first_epoch")
            bound = most * max(guess, p.val_losses[0])
            what = (
                f"{most:g} times the larger of ln V = {guess:.4f} and {p.val_losses[0]:.4f} before training"
            )
        else:
            bound = self.gates.bound("next_epoch") * p.val_losses[-1]
            what = f"{self.gates.bound('next_epoch'):g} times the previous {p.val_losses[-1]:.4f}"
        why = "" if loss <= bound else f"diverged: val_loss {loss:.4f} is more than {what}. Try a lower --lr"
        return Answer(loss <= bound, f"{loss:.4f}", f"at most {bound:.4f}, {what}", why, loss / bound)

    def _judge_start(self, loss: float) -> None:
        """The gates of step 0, after the evaluation before training. Raises Aborted."""
        i, judge, bound = self.inputs, self.gates.judge, self.gates.bound
        entropy, cfg = i.val.shards.unigram_entropy, i.cfg
        if i.init is None:
            rows = self.model.b * self.model.t
            rstd = float(i.backend.to_host(self.model.buffers["rstd"][:rows]).mean())
            spread, repeated = self._targets()
            answer = measure.initial_loss(
                cfg, loss, self.s.initializer_range, rstd, spread, repeated, bound("start_margin")
            )
            judge("start.loss", answer, 0)
            self.gates.skip("start.pretrained", "random weights")
            self.gates.skip("start.reproduces", "random weights")
            return
        self.gates.skip("start.loss", "the weights come from a checkpoint")
        answer = measure.pretrained_loss(loss, entropy, bound("pretrained_share"))
        recorded = i.init.metadata.get("evaluation") if i.init.kind == "apr" else None
        if not isinstance(recorded, dict):
            self.gates.skip("start.reproduces", "no validation loss is recorded in the checkpoint")
            judge("start.pretrained", answer, 0)
            return
        differs = [k for k, v in self.evaluated_on().items() if recorded.get(k) != v]
        differs += ["weights, without adapters"] if i.lora_init else []
        if differs:
            self.gates.skip("start.reproduces", f"recorded on other {', '.join(differs)}")
            judge(
                "start.pretrained", answer._replace(suspect=True), 0
            )  # how far it was trained is its own affair
        else:
            judge("start.reproduces", self._reproduced(loss, recorded["val_loss"]), 0)
            self.gates.skip(
                "start.pretrained", "its recorded loss on these very windows is the better measure"
            )

    def _targets(self) -> tuple[float, float]:
        """Of the validation text: how many ids it is spread over (1 / sum of squared shares), and the share of targets that
        are the token they follow."""
        scans = {side.name: side.scan for side in self.inputs.audit}
        scan = scans.get("val") or scans["train"]
        assert scan is not None
        p = scan.counts / max(1, scan.counts.sum())
        ids, targets = next(iter(sequential(self.inputs.val, 64)))
        return float(1 / max(np.square(p).sum(), 1e-12)), float((ids == targets).mean())

    def _reproduced(self, loss: float, recorded: float) -> Answer:
        return measure.reproduced(loss, recorded, self.gates.bound(f"reproduce_{self.model.dtype}"))

    def evaluated_on(self) -> dict[str, Any]:
        """What a validation loss depends on, beside the weights."""
        val, s = self.inputs.val, self.s
        return {
            "val_sha256": val.shards.sha256,
            "first_window": val.first,
            "windows": val.count,
            "seq_length": s.seq_length,
            "val_windows": s.val_batches and s.val_batches * s.batch_size,
            "document_end": self.inputs.document_end,
        }

    def _judge_causal(self) -> None:
        ids, _ = next(iter(sequential(self.inputs.val, min(self.micro, 2))))
        self.gates.judge("start.causal", measure.causal(self.model, ids), self.progress.step)

    def _end_epoch(self) -> None:
        p, (val, error) = self.progress, self._evaluate_and_log()
        mean, last = float(np.mean(p.epoch_losses)), float(np.mean(p.epoch_losses[-LAST_STEPS:]))
        bound, entropy = self.gates.bound, self.inputs.val.shards.unigram_entropy
        self.gates.judge(
            "run.val-below-train",
            measure.below_train(
                val, error, p.epoch_losses[-LAST_STEPS:], p.epoch_losses, bound("val_below_train")
            ),
            p.step,
        )
        shards = self.inputs.val.shards
        bits = bits_per_byte(val, shards.total_tokens, shards.total_bytes)
        if self.inputs.instruct:
            self.gates.skip("end.plausible", "an answer can follow from its question, so no loss is too low")
        else:
            self.gates.judge("end.plausible", measure.plausible(bits, bound("min_bits_per_byte")), p.step)
        if self.inputs.init is None:
            answer = measure.learning(val, entropy, p.tokens_seen, bound("drop_per_decade"))
            self.gates.judge("end.learning", answer, p.step)
        facts = dict(
            step=p.step,
            train_loss=mean,
            train_loss_last=last,
            val_loss=val,
            val_loss_stderr=error,
            train_ppl=math.exp(min(mean, 700)),
            val_ppl=math.exp(min(val, 700)),
            wall_seconds=p.seconds,
            tokens_seen=p.tokens_seen,
            grad_norm_max=p.grad_norm_max,
        )
        evaluation = {"val_loss": val, **self.evaluated_on()}
        epoch = len(p.val_losses) - 1
        i = self.inputs
        path = self.run.save_epoch(epoch, self.model, self.opt, i.tokenizer, facts, evaluation, i.carried)
        if self.lora:
            self.lora.save(self.run.ckpt / f"epoch-{epoch:03d}-adapter", str(self.s.init))
        p.epoch_losses, p.grad_norm_max = [], 0.0
        self.run.save_verdict(self.gates, "RUNNING", p.step, val)
        self.tell("on_checkpoint", path, facts)

    def tell(self, event: str, *args: Any) -> None:
        """Call the callbacks; an exception of theirs asks for a stop, as Ctrl-C does."""
        try:
            tell(self.callbacks, event, *args)
        except CallbackFailed as e:
            self.failed, self.stop_asked = self.failed or e, True

    def _save_state(self) -> None:
        self.progress.data = self.batches.state()
        self.progress.gates = self.gates.state()
        self.run.save_state(self.model, self.opt, dataclasses.asdict(self.progress), self.s.keep_states)
        self._saved = self.progress.step

    def _finished(self) -> str | None:
        """The status word when an evaluation ends the run early."""
        p, s = self.progress, self.s
        if len(p.val_losses) - 1 < s.min_epochs:
            return None
        if s.target_val_loss is not None and p.val_losses[-1] <= s.target_val_loss:
            return "TARGET_REACHED"
        return "EARLY_STOP" if p.evals_without_best > s.patience else None

    def _pending(self) -> bool:
        """Whether an epoch is complete whose evaluation is still to come."""
        p = self.progress
        return bool(p.epoch_losses) and (p.step % self.s.steps_per_epoch == 0 or p.step == self.s.num_steps)

    def train(self) -> str:
        """Run to the end; returns the status word. Raises Aborted, Interrupted (state saved), IOFailure."""
        p = self.progress
        self.run.open_metrics(p.step if p.val_losses else -1, p.val_step)
        try:
            with self._signals():
                try:
                    self._begin()
                    status = self._steps()
                except Stopped:  # in an evaluation, which the next start does again
                    if p.epoch_losses:
                        self._save_state()
                    stopped = self._interrupted()
                    raise stopped from stopped.__cause__
            if self.stop_asked:  # the signals are the caller's again: none is lost between
                raise self._interrupted()
            return status
        finally:
            self.run.close()

    def _steps(self) -> str:
        """Steps and evaluations until the run ends, or a stop is asked for and the state saved; the status word."""
        p, s = self.progress, self.s
        status = self._finished() if self.resumed and p.val_step == p.step else None  # it had ended before
        try:
            while not (status or self.stop_asked) and (p.step < s.num_steps or self._pending()):
                status = self._step_and_save()
        except Exhausted as e:
            if p.epoch_losses:
                self._end_epoch()
            self._save_state()
            self.show.note(str(e))
        if self.stop_asked and self._saved < p.step:
            self._save_state()
        return status or "DONE"

    def _begin(self) -> None:
        """The evaluation and the gates before the first step of this process."""
        p = self.progress
        if not p.val_losses:
            self._judge_causal()
            loss, _ = self._evaluate_and_log()
            self._judge_start(loss)
        elif self.resumed:
            self._judge_causal()
            if p.val_step == p.step:
                answer = self._reproduced(self.evaluate()[0], p.val_losses[-1])
                self.gates.judge("start.reproduces", answer, p.step)

    def _step_and_save(self) -> str | None:
        """A step, what follows it, and the state where one is due; the status word when it ends the run."""
        p, s = self.progress, self.s
        if not self._pending():
            line = self.train_step()
            self.run.log(**line)
            self.show.step(line)
            self._note_pass()
            self.tell("on_step", line)
        epoch_ends = self._pending()
        if epoch_ends:
            self._end_epoch()
        due = p.step % s.save_every == 0 if s.save_every else epoch_ends
        status = self._finished() if epoch_ends else None
        if due or self.stop_asked or status or p.step == s.num_steps:
            self._save_state()
        return status

    def judge_end(self, status: str) -> None:
        """The gates of a run that came to its end."""
        p, s, gates = self.progress, self.s, self.gates
        if s.target_val_loss is None:
            gates.skip("end.target", "no --target-val-loss was given")
        else:
            reached = p.val_losses[-1] <= s.target_val_loss
            said = f"{p.val_losses[-1]:.4f} nats/token"
            why = "" if reached else f"the target was not reached: {said}, asked for {s.target_val_loss:g}"
            gates.judge("end.target", Answer(reached, said, f"at most {s.target_val_loss:g}", why), p.step)
        if p.best_flops:
            gates.judge("end.speed", self._speed(gates.bound("speed")))
        if self.lora:
            gates.judge("end.base", self.lora.unchanged(), p.step)
        else:
            gates.skip("end.base", "no adapters: every weight is trained")
        self._judge_reload()
        gates.close("the run did not come to a place where it is asked")

    def _judge_reload(self) -> None:
        i, s, p = self.inputs, self.s, self.progress
        need = memory(
            i.cfg, i.backend, self.micro, s.seq_length, self.model.dtype, train=False, documents=i.document_end is not None
        ).total  # fmt: skip
        have = i.backend.free_memory()
        if have is not None and need > have:
            gib = f"{need / 2**30:.1f} GiB beside this one, {have / 2**30:.1f} are free"
            self.gates.skip(
                "end.reload", f"another process needs {gib}; `apr verify` does it when this one is gone"
            )
            return
        device = s.device if s.device.startswith(i.backend.name) else i.backend.name
        found = in_fresh_process(self.run.path, device, self.model.dtype, s.threads)
        if isinstance(found, str):
            why = f"the last checkpoint cannot be loaded again: {found}"
            self.gates.judge("end.reload", Answer(False, found, "the recorded loss", why), p.step)
        else:
            self.gates.judge("end.reload", self._reproduced(found.mean, p.val_losses[-1]), p.step)

    def _speed(self, most: float) -> Answer:
        """The fastest step against one large product, measured again where another process may have had the device."""
        be, flops = self.inputs.backend, self.progress.best_flops
        rate, tries = 0.0, 0
        while tries < RATE_TRIES and (not tries or flops > most * rate):
            rate, tries = max(rate, matmul_rate(be, self.model.dtype)), tries + 1
        answer = measure.speed(flops, rate, most)
        load = os.getloadavg()[0]
        if not answer.good and be.name == "cpu" and load > cores():
            why = f"a load of {load:.1f} on {cores()} cores: the rate of a product cannot be measured beside other processes"
            return answer._replace(good=None, why=why)
        return answer

    def _interrupted(self) -> Interrupted | CallbackFailed:
        where = (
            f"after step {self.progress.step}, state saved"
            if self.run.states()
            else "before the first saved state"
        )
        again = f"Go on with: apr pretrain --resume --run-dir {shlex.quote(str(self.run.path))}"
        if self.failed is not None:
            failed = CallbackFailed(f"{self.failed}; stopped {where}. {again}")
            failed.__cause__ = self.failed.__cause__
            return failed
        return Interrupted(f"stopped {where}. {again}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM ask for a stop after the step; a second one stops at once. In the main thread: no other
        gets signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.stop_asked:
                raise KeyboardInterrupt
            self.stop_asked = True
            # Not print: the signal may have come in the middle of one, which cannot be entered twice.
            said = b"\nstopping after this step; press Ctrl-C again to stop at once without saving\n"
            with suppress(
                OSError
            ):  # its reader may be gone: Ctrl-C ends both sides of `apr pretrain 2>&1 | tee log`
                os.write(2, said)

        old = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for n, handler in old.items():
                signal.signal(n, handler)
