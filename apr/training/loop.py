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

from ..bisect.spot import spot_check
from ..checkpoints.checkpoint import fill
from ..checkpoints.peft import adapter_start, write_adapter
from ..checkpoints.state import TrainingState
from ..common.errors import Interrupted, MalformedFile
from ..common.finding import Finding
from ..data.batches import Batches, Exhausted
from ..data.conversations.instruct import checked_piece, trained_targets
from ..evidence import measure
from ..evidence.adapters import adapter_gradients
from ..evidence.gates import Gates, parse_bounds
from ..evidence.judge import Judge
from ..model.cost import flops_per_token
from ..model.lora import Adapters
from ..model.optim import hyper_parameters, optimizer_class
from ..model.schedule import Schedule
from ..model.transformer import Model
from .callbacks import Callback, CallbackFailed, tell
from .display import Display
from .evaluate import Loss, Stopped, evaluate
from .inputs import Inputs, judge_inputs
from .rundir import RunDir, bits_per_byte
from .sample import sample_text

LAST_STEPS = measure.LAST_STEPS  # the mean of so many is reported beside the mean of the epoch
FOLLOWED = 20  # first steps of a process in which the learning rate is measured; then every FOLLOW_EVERY
FOLLOW_EVERY = 10
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
        show: Display,
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
        self.lora = self._adapters()
        trained: Model | Adapters = self.lora or self.model
        kind = optimizer_class(s)
        merge = {"after_update": self.lora.merge} if self.lora else {}
        self.opt = kind.of(trained, **merge, **hyper_parameters(kind, s))
        self.state = TrainingState(inputs.cfg, trained.layout, self.opt, self.lora)
        self.schedule = Schedule(s.schedule, s.lr, s.lr_min, s.warmup_steps, s.num_steps)
        self.batches = Batches(inputs.train, s.batch_size, s.seed, s.shuffle, s.on_exhausted)
        self.began = time.perf_counter()
        self.flops_per_token = flops_per_token(inputs.cfg, s.seq_length)
        self._sampled = -1  # step of the latest sample
        self.progress = Progress()
        self.judge = Judge(self)
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

    def _adapters(self) -> Adapters | None:
        """Adapters around the weights of --init. None where the weights themselves are trained."""
        if self.inputs.lora is None or self.inputs.init is None:
            return None
        adapters = Adapters(self.model, self.inputs.lora)
        host = np.zeros(self.model.layout.size, np.float32)
        fill(self.model.layout, host, self.inputs.init)
        adapters.set_base(host)
        return adapters

    def begin_anew(self) -> None:
        """Set weights, optimizer state and data position to those before the first step. Raises Refused."""
        model, i = self.model, self.inputs
        host = np.zeros(self.state.layout.size, np.float32)
        if self.lora and i.lora_init:
            host = adapter_start(self.lora.layout, i.lora_init)
        elif self.lora:
            self.lora.layout.init(host, self.s.seed)
        elif i.init:
            fill(model.layout, host, i.init)
        else:
            model.layout.init(host, self.s.seed, self.s.initializer_range)
        self.opt.set_weights(host)
        self.opt.reset()
        self.progress = Progress()
        self.batches.rewind()
        self.judge.weights()

    def load(self, state: Path | None) -> None:
        """Go on from a saved state, the latest one if none is given."""
        saved, sha, damaged = self.run.load_state(self.state, state)
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
        found = self.state.sha256()
        self.gates.judge(
            Finding.of(
                "before.resumed",
                sha in (found, None),
                f"weights and moments {found[:12]} on the device",
                f"{(sha or 'unknown')[:12]}, as saved",
            ),
            self.progress.step,
        )

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
            self.lora.collect_gradients()
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
        self.judge.step(line, trained, tokens, apart, left)
        if follow:
            answer = self.follow.after(lr, norm, self.gates.bound("learning_rate_tolerance"))
            self.gates.judge(answer, p.step)
        if not first:
            p.best_flops = max(p.best_flops, self.flops_per_token * targets.size / wall)
        return line

    def _gradients_apart(self) -> Callable[[float], Finding]:
        """What judges a step's gradient norm, from every tensor's own."""
        if self.lora:
            return adapter_gradients(self.lora, self._scratch)
        return partial(measure.gradient_norm, *measure.gradients(self.model, self._scratch))

    def _follow_due(self) -> bool:
        return self._steps_here < FOLLOWED or self._steps_here % FOLLOW_EVERY == 0

    def _weight_norm(self) -> float:
        """L2 norm of all weights, in float64 from the copy that the optimizer moves."""
        be = self.inputs.backend
        be.fill(self._scratch, 0)
        be.add_sum_sq(self._scratch, self.opt.master)
        return math.sqrt(square) if (square := float(be.to_host(self._scratch)[0])) >= 0 else math.nan

    def _note_pass(self) -> None:
        """One line when the data begins again."""
        b = self.batches
        follows = self.progress.tokens_seen // b.windows.targets
        measured = f"{b.passes} complete passes, {b.windows_read:,} windows read"
        self.gates.judge(
            Finding.of("run.data", b.passes == follows, measured, f"{follows} by the tokens trained on")
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
            self.gates.judge(Finding.of("start.ops", True, measured, bound, score=worst), step)
        else:
            self.show.difference(report)
            first = report.first
            assert first is not None
            cause = f": {first.cause}" if first.cause else ""
            why = (
                f"spot check: {first.place} is {first.ratio:.3g} times its tolerance away from the float64 reference"
                f"{cause}"
            )
            self.gates.judge(Finding.of("start.ops", False, measured, bound, why), step)
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
        self.gates.judge(Finding.of("run.finite", finite, f"val_loss = {loss:.6g}", "finite", why), p.step)
        line = dict(
            step=p.step, val_loss=loss, val_tokens=tokens, val_bits_per_byte=bits, val_loss_stderr=error
        )
        self.run.log(**line)
        if p.val_losses:
            self.gates.judge(self.judge.diverged(loss), p.step)
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

    def _end_epoch(self) -> None:
        p, (val, error) = self.progress, self._evaluate_and_log()
        mean, last = float(np.mean(p.epoch_losses)), float(np.mean(p.epoch_losses[-LAST_STEPS:]))
        self.judge.epoch(val, error)
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
        evaluation = {"val_loss": val, **self.judge.evaluated_on()}
        epoch = len(p.val_losses) - 1
        i = self.inputs
        path = self.run.save_epoch(epoch, self.model, self.state, i.tokenizer, facts, evaluation, i.carried)
        if self.lora:
            folder, flat = self.run.ckpt / f"epoch-{epoch:03d}-adapter", i.backend.to_host(self.lora.w)
            write_adapter(folder, self.lora.layout, flat, str(self.s.init))
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
        self.run.save_state(self.state, dataclasses.asdict(self.progress), self.s.keep_states)
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
            self.judge.causal()
            loss, _ = self._evaluate_and_log()
            self.judge.start(loss)
        elif self.resumed:
            self.judge.causal()
            if p.val_step == p.step:
                answer = self.judge.reproduced("start.reproduces", self.evaluate()[0], p.val_losses[-1])
                self.gates.judge(answer, p.step)

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
