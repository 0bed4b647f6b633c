"""The training loop: steps, evaluations, checkpoints, early stop, resume."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np

from ..bisect.show import print_report
from ..bisect.spot import spot_check
from ..data.batches import Batches, Exhausted, sequential
from ..errors import Aborted, Interrupted
from ..formats.models import fill
from ..model import Model
from ..optim import AdamW, Schedule
from .inputs import Inputs
from .rundir import RunDir, bits_per_byte
from .show import Show

LAST_STEPS = 20  # the mean of so many is reported beside the mean of the epoch


@dataclass
class Progress:
    """Where a run stands: what a state must hold, beside weights and moments, to go on exactly."""

    step: int = 0
    tokens_seen: int = 0
    data: dict[str, Any] = field(default_factory=dict)  # position in the stream of batches
    epoch_losses: list[float] = field(default_factory=list)
    grad_norm_max: float = 0.0  # in this epoch
    val_losses: list[float] = field(default_factory=list)  # before step 1, then one per epoch
    best_val: float = math.inf
    evals_without_best: int = 0
    seconds: float = 0.0


class Trainer:
    """One run, ready to train. Evaluation and training share the model's buffers."""

    def __init__(self, inputs: Inputs, run: RunDir, show: Show, resume: bool) -> None:
        s = inputs.settings
        assert s.micro_batch_size is not None
        assert s.lr is not None
        assert s.lr_min is not None
        assert s.warmup_steps is not None
        self.inputs, self.run, self.show, self.s = inputs, run, show, s
        self.micro: int = s.micro_batch_size
        assert s.dtype is not None
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
        self.opt = AdamW(self.model, s.beta1, s.beta2, s.eps, s.weight_decay, s.grad_clip)
        self.schedule = Schedule(s.schedule, s.lr, s.lr_min, s.warmup_steps, s.num_steps)
        self.batches = Batches(inputs.train, s.batch_size, s.seed, s.shuffle, s.on_exhausted)
        self.progress = Progress()
        self.stop_asked = False
        self._checked = False
        if resume:
            self.progress = Progress(**run.load_state(self.model, self.opt))
            self.batches.restore(self.progress.data)
        else:
            host = np.zeros(self.model.layout.size, np.float32)
            if inputs.init:
                fill(self.model.layout, host, inputs.init)
            else:
                self.model.layout.init(host, s.seed, s.initializer_range)
            self.opt.set_weights(host)
        self.model.tune(s.batch_size * s.seq_length)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step: the mean loss over all predicted tokens of the batch, and its gradient."""
        model, be, p = self.model, self.inputs.backend, self.progress
        start = time.perf_counter()
        ids, targets = self.batches.next()
        tokens = targets.size
        if self._check_due():
            start += self._spot_check(ids[: self.micro], targets[: self.micro])  # no part of the step's time
        be.fill(model.total, 0)
        for i in range(0, len(ids), self.micro):
            model.micro_step(ids[i : i + self.micro], targets[i : i + self.micro], 1 / tokens, self.s.graph)
        lr = self.schedule(p.step + 1)
        self.opt.step(lr)
        loss, norm = float(be.to_host(model.total)[0]) / tokens, self.opt.grad_norm()
        wall = time.perf_counter() - start
        p.step += 1
        p.tokens_seen += tokens
        p.seconds += wall
        p.epoch_losses.append(loss)
        p.grad_norm_max = max(p.grad_norm_max, norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            saved = self.run.states()
            raise Aborted(
                f"step {p.step}: train_loss = {loss}, grad_norm = {norm}: not finite. "
                f"Last saved state: {saved[-1] if saved else 'none'}. Try a lower --lr or a longer --warmup-steps"
            )
        return dict(
            step=p.step,
            train_loss=loss,
            grad_norm=norm,
            lr=lr,
            tokens_per_sec=tokens / wall,
            tokens_seen=p.tokens_seen,
            wall_ms=1e3 * wall,
        )

    def _note_pass(self) -> None:
        """One line when the data begins again."""
        b = self.batches
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
        if not report.rows:
            self.show.note(f"spot check   skipped: {report.skipped['forward']}")
        elif report.agree:
            self.show.note(
                f"step {step:>5}  spot check: {len(report.rows)} arrays of {report.batch} agree with the float64 "
                f"reference (worst {worst:.2f} of its tolerance, {seconds:.1f} s)"
            )
        else:
            print_report(report, self.show.console)
            first = report.first
            assert first is not None
            raise Aborted(
                f"step {step}: spot check: {first.place} is {first.ratio:.3g} times its tolerance away from the float64 "
                f"reference{': ' + first.cause if first.cause else ''}. `apr bisect` on the checkpoint or preset says more"
            )
        return time.perf_counter() - start

    def evaluate(self) -> tuple[float, int]:
        """(mean loss in nats per token, tokens) over the validation windows, or val_batches of them."""
        model, be = self.model, self.inputs.backend
        be.fill(model.total, 0)
        tokens = 0
        most = self.s.val_batches and self.s.val_batches * self.s.batch_size
        for ids, targets in sequential(self.inputs.val, self.micro, most):
            model.forward(ids)
            model.loss(targets)
            tokens += targets.size
        return float(be.to_host(model.total)[0]) / tokens, tokens

    def _evaluate_and_log(self) -> float:
        start = time.perf_counter()
        loss, tokens = self.evaluate()
        p, shards = self.progress, self.inputs.val.shards
        p.seconds += time.perf_counter() - start
        bits = bits_per_byte(loss, shards.total_tokens, shards.total_bytes)
        self.run.log(step=p.step, val_loss=loss, val_tokens=tokens, val_bits_per_byte=bits)
        if not math.isfinite(loss):
            raise Aborted(f"step {p.step}: val_loss = {loss} is not finite")
        if p.val_losses and loss > 2 * p.val_losses[-1]:
            raise Aborted(
                f"step {p.step}: diverged: val_loss {loss:.4f} is more than twice the previous {p.val_losses[-1]:.4f}. "
                "Try a lower --lr"
            )
        p.val_losses.append(loss)
        if loss < p.best_val:
            p.best_val, p.evals_without_best = loss, 0
        else:
            p.evals_without_best += 1
        self.show.evaluation(p.step, loss, bits, p.epoch_losses)
        return loss

    def _end_epoch(self) -> None:
        p, val = self.progress, self._evaluate_and_log()
        mean, last = float(np.mean(p.epoch_losses)), float(np.mean(p.epoch_losses[-LAST_STEPS:]))
        facts = dict(
            step=p.step,
            train_loss=mean,
            train_loss_last=last,
            val_loss=val,
            train_ppl=math.exp(min(mean, 700)),
            val_ppl=math.exp(min(val, 700)),
            wall_seconds=p.seconds,
            tokens_seen=p.tokens_seen,
            grad_norm_max=p.grad_norm_max,
        )
        self.run.save_epoch(len(p.val_losses) - 1, self.model, self.opt, self.inputs.tokenizer, facts)
        p.epoch_losses, p.grad_norm_max = [], 0.0

    def _save_state(self) -> None:
        self.progress.data = self.batches.state()
        self.run.save_state(self.model, self.opt, dataclasses.asdict(self.progress), self.s.keep_states)

    def _finished(self) -> str | None:
        """The status word when an evaluation ends the run early."""
        p, s = self.progress, self.s
        if len(p.val_losses) - 1 < s.min_epochs:
            return None
        if s.target_val_loss is not None and p.val_losses[-1] <= s.target_val_loss:
            return "TARGET_REACHED"
        return "EARLY_STOP" if p.evals_without_best > s.patience else None

    def train(self) -> str:
        """Run to the end; returns the status word. Raises Aborted, Interrupted (state saved), IOFailure."""
        p, s = self.progress, self.s
        self.run.open_metrics(p.step)
        try:
            with self._signals():
                if not p.val_losses:
                    self._evaluate_and_log()
                while p.step < s.num_steps:
                    line = self.train_step()
                    self.run.log(**line)
                    self.show.step(line)
                    self._note_pass()
                    epoch_ends = p.step % s.steps_per_epoch == 0 or p.step == s.num_steps
                    if epoch_ends:
                        self._end_epoch()
                    due = p.step % s.save_every == 0 if s.save_every else epoch_ends
                    status = self._finished() if epoch_ends else None
                    if due or self.stop_asked or status or p.step == s.num_steps:
                        self._save_state()
                    if status:
                        return status
                    if self.stop_asked and p.step < s.num_steps:
                        raise Interrupted(
                            f"stopped after step {p.step}, state saved. Go on with: "
                            f"apr pretrain --resume --run-dir {shlex.quote(str(self.run.path))}"
                        )
                return "DONE"
        except Exhausted as e:
            if p.epoch_losses:
                self._end_epoch()
            self._save_state()
            self.show.note(str(e))
            return "DONE"
        finally:
            self.run.close()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM ask for a stop after the step; a second one stops at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.stop_asked:
                raise KeyboardInterrupt
            self.stop_asked = True
            # Not print: the signal may have come in the middle of one, which cannot be entered twice.
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once without saving\n")

        old = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for n, handler in old.items():
                signal.signal(n, handler)
