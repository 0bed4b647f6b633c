"""Train: steps, evaluations, checkpoints, saved states, early stop.

The loop knows no gate, no logger and no display: they are observers of its events (common/events.py).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.checkpoint import fill, reader
from ..checkpoints.peft import adapter_start
from ..checkpoints.state import TrainingState
from ..common.errors import AprError, Interrupted
from ..common.events import (
    Evaluated,
    Event,
    GradientsReady,
    Line,
    Measured,
    Noted,
    PassEnded,
    Reproduced,
    Started,
    StepBegun,
    Stepped,
    WeightsReady,
    emit,
    is_busy,
)
from ..common.units import bits_per_byte
from ..data.batches import Batches, Exhausted, trained_targets
from ..data.mixture import turns_of
from ..model.adapters import Adapters
from ..model.buffers import Buffers
from ..model.cost import flops_per_token
from ..model.lora_dropout import Draws
from ..model.micro_gradients import shares_scales
from ..model.optim import hyper_parameters, optimizer_class
from ..model.preferences import tally_anew, terms, without_pairs
from ..model.schedule import Schedule
from ..model.transformer import Model
from ..ranks.communicator import ALONE, Communicator
from .by_source import StepsBySource
from .callbacks import CallbackFailed
from .evaluate import Loss, Stopped, epoch_facts, evaluate, micro_batches
from .inputs import Inputs
from .progress import Progress
from .references import have_reference, preferences_of
from .resuming import still_to_come, what_is_next
from .rundir import RunDir, interrupted
from .sample import sample_text
from .saving import Epoch, Saver
from .settings import is_due
from .signals import StopRequest, handled
from .split import Split

SAMPLE_TOKENS = 64  # of the continuation of --sample at each evaluation


class Trainer:
    """One run, ready to train after `prepare`. Evaluation and training share the model's buffers.

    observers   hear every event, in order
    findings    gives the findings of the gates, for saved states
    ranks       those that train together; all of them take the same steps, and rank 0 writes
    """

    def __init__(self, inputs: Inputs, run: RunDir, ranks: Communicator = ALONE) -> None:
        s = inputs.settings
        assert s.lr is not None and s.lr_min is not None and s.warmup_steps is not None  # noqa: PT018
        self.inputs, self.run, self.s, self.ranks, self.micro = inputs, run, s, ranks, inputs.micro
        split = self.split = (
            Split(ranks, inputs.backend, inputs.cfg, inputs.lora, s.cross_check) if ranks.count > 1 else None
        )
        self.model = Model(
            inputs.cfg, inputs.backend, self.micro, s.seq_length, str(s.dtype),
            recompute=s.recompute, z_loss=s.z_loss, document_end=inputs.document_end, lora=inputs.lora,
            folds=self.micro < s.batch_size and run.sums_micro_batches() and not split,
            act_again=inputs.act_again, make_buffers=split.make_buffers if split else Buffers,
        )  # fmt: skip
        self.model.preferences = preferences_of(s, inputs.train, inputs.document_end)
        self.lora = self.model.adapters
        if self.lora and inputs.init:
            self.lora.set_base(reader(self.model.layout, inputs.init))
        trained: Model | Adapters = self.lora or self.model
        kind, hyper = optimizer_class(s), hyper_parameters(optimizer_class(s), s)
        self.opt = split.optimizer(self.model, kind, **hyper) if split else kind.of(trained, **hyper)
        shard = split.shard if split else None
        self.state = TrainingState(inputs.cfg, trained.layout, self.opt, self.lora, shard)
        self.schedule = Schedule(s.schedule, s.lr, s.lr_min, s.warmup_steps, s.num_steps)
        self.batches = Batches(inputs.train, s.batch_size, s.seed, s.shuffle, s.on_exhausted, turns_of(s))
        self.by_source = StepsBySource(self.model, self.batches, self.micro, ranks)
        self.flops_per_token = flops_per_token(inputs.cfg, s.seq_length, lora=inputs.lora)
        self.progress, self.resumed, self.stop = Progress(), False, StopRequest(says=ranks.rank == 0)
        self.failed: CallbackFailed | None = None
        self.observers: list[Any] = []
        self.findings: Callable[[], list[dict[str, Any]]] = list
        # Ends of the run before it was made longer, where it was evaluated too.
        self.ends = {s.num_steps, *run.ends()}
        self.saver = Saver(inputs, run, self.model, self.state, self.emit)
        # Between ranks, that they stop; steps of this process, of the latest state and of the latest sample.
        self._is_agreed, self._steps_here, self._saved, self._sampled = False, 0, -1, -1
        # Of the step whose gradients are computed already: its number, targets trained on for it; time of the last reading.
        self._ahead, self._trained_ahead, self._read_at = 0, 0, 0.0

    def emit(self, event: Event) -> None:
        """Deliver an event to the observers."""
        emit(self.observers, event)

    def callback_failed(self, error: CallbackFailed) -> None:
        """Ask for a stop, as Ctrl-C does, and keep the first error."""
        self.failed, self.stop.is_asked = self.failed or error, True

    def is_stopping(self, asks: bool = True) -> bool:
        """Tell if a stop is asked for, of any rank: all of them ask together, and stop after the same step."""
        if self.split and asks and not self._is_agreed:
            self._is_agreed = self.stop.agreed(self.ranks.share(self.stop.is_asked))
        return self._is_agreed if self.split else self.stop.is_asked

    def prepare(self, resume: bool) -> None:
        """Load the latest saved state, where there is one to go on from, or begin anew. Raises Refused, MalformedFile."""
        if resume and self.run.has_state():
            self.load()
            self.run.drop_after(len(self.progress.val_losses) - 1, self.progress.step)
        else:
            self.begin_anew()
        with without_pairs(self.model):
            (self.split or self.model).tune(self.s.batch_size * self.s.seq_length)
        # By the products that the steps will use.
        have_reference(self.model, self.run, self.inputs.train, self.inputs.val, not self.resumed)

    def begin_anew(self) -> None:
        """Set weights, optimizer state and data position to those before the first step. Raises Refused."""
        model, i = self.model, self.inputs
        host = np.zeros(self.state.layout.size, np.float32)
        if self.lora and i.lora_init:
            host = adapter_start(self.lora.layout, i.lora_init)
        elif self.lora:
            self.lora.layout.init(host, self.s.seed, reader(model.layout, i.init) if i.init else None)
        elif i.init:
            fill(model.layout, host, i.init)
        else:
            model.layout.init(host, self.s.seed, self.s.initializer_range)
        self.state.set_weights(host)
        self.opt.reset()
        self.progress, self._ahead = Progress(), 0
        self.batches.rewind()
        self.emit(WeightsReady(0))

    def load(self, path: Path | None = None) -> None:
        """Go on from a saved state, the latest one if none is given. Raises Refused, MalformedFile."""
        if self.split and self.ranks.rank:
            path = self.ranks.share(None)[0]
        saved, sha, damaged = self.run.load_state(self.state, path)
        if self.split and not self.ranks.rank:
            self.ranks.share(self.run.state / f"step-{saved['step']:06d}.apr")
        for note in damaged:
            self.emit(Noted(note))
        p = self.progress = Progress.of(saved, self.run.state)
        self.resumed, self._saved, self._sampled, self._ahead = True, p.step, p.val_step, 0
        self.batches.restore(p.data)
        expected, found = still_to_come(p.next, self.s.num_steps), what_is_next(self)
        self.emit(WeightsReady(p.step, True, self.state.sha256(), sha, tuple(p.gates), expected, found))

    # Steps

    def train_step(self) -> Line:
        """Take one optimizer step on the mean loss over the tokens, or pairs, of a batch; returns its line of the log."""
        model, opt, step, start = self.model, self.opt, self.progress.step + 1, time.perf_counter()
        self.ranks.at(f"step {step}", is_timed=self._steps_here > 0 and not is_busy(self.observers, step))
        ids, targets = self.batches.next()
        tokens, read = trained_targets(targets), time.perf_counter()
        self.emit(StepBegun(step, ids, targets))
        # The time of observers is no part of the step's.
        start += time.perf_counter() - read
        if is_begun := self._ahead == step:
            start, model.tokens_trained = self._read_at, model.tokens_trained + self._trained_ahead
        counted = self._compute_gradients(step, ids, targets, slice(int(is_begun), None))
        self.emit(GradientsReady(step))
        lr = self.schedule(step)
        opt.step(lr, clear=False)
        numbers = (self.split or opt).read_later(model.total)
        of_sources = self.by_source.read_later(targets)
        self._look_ahead(step)
        line = self._measure(lr, tokens, counted, start, targets.size, numbers)
        if self.split:
            self.emit(self.split.computed(step))
        line |= of_sources() | opt.rates(lr)
        line |= model.preferences.tally.figures(counted) if model.preferences else {}
        self.emit(Measured(line))
        self.ranks.at(f"after step {step}", is_timed=self._steps_here > 1)
        return line

    def _compute_gradients(self, step: int, ids: np.ndarray, targets: np.ndarray, which: slice) -> int:
        """Compute loss and gradients of those micro-batches of a step's batch; returns its targets, or pairs."""
        self.by_source.begin(step - self.progress.step - 2)  # -1: of the step at hand
        model, counted = self.model, terms(self.model.preferences, ids, targets)
        recorded = shares_scales(model.be, model.preferences) or trained_targets(targets) == targets.size
        graph, drawn = self.s.graph and recorded, (self.s.seed, step)
        parts = micro_batches(ids, targets, self.micro)
        if self.split:
            self.split.gradients(parts, 1 / counted, graph, which, self.by_source.keep, drawn)
            return counted
        for n, part in [*enumerate(parts)][which]:
            if n == 0:
                model.be.fill(model.total, 0)
                tally_anew(model.preferences)
            draws = Draws.of(*drawn, n * self.micro, len(part[0]))
            model.micro_step(*part, 1 / counted, graph, begins=n == 0, draws=draws)
            self.by_source.keep(n, n)
        return counted

    def _look_ahead(self, step: int) -> None:
        """Ask the device for the first gradients of the next step before the numbers of this one are read: it is busy meanwhile.

        One micro-batch: copies of more ids would wait for the device, and the numbers would be read as late as it is done.
        Events and counts stay those of this step. Not before observers ask the model, an evaluation, or pairs."""
        can = self.inputs.backend.asynchronous and self._steps_here and not self.is_stopping(asks=False)
        if self.model.preferences or not can or is_busy(self.observers, step + 1) or self._ends_epoch(step):
            return
        try:
            batch, model, was = self.batches.peek(), self.model, self.model.tokens_trained
        except AprError:  # which the step itself will raise
            return
        if batch is not None:
            self._compute_gradients(step + 1, *batch, slice(1))
            self._ahead, self._trained_ahead, model.tokens_trained = step + 1, model.tokens_trained - was, was  # fmt: skip

    def _measure(self, lr: float, tokens: int, n: int, start: float, positions: int, numbers: Any) -> Line:
        """Read loss and norms of the step from the device, and count it."""
        p, (total, square, square_of_weights) = self.progress, numbers()
        loss, norm = total / n, self.opt.grad_norm(square)
        self._read_at = time.perf_counter()
        wall = self._read_at - start
        p.step += 1
        p.tokens_seen += tokens
        p.seconds += wall
        p.constant = p.constant + 1 if loss == p.last_loss else 0
        p.last_loss = loss
        p.epoch_losses.append(loss)
        p.grad_norm_max = max(p.grad_norm_max, norm)
        # The first step of a process compiles and tunes.
        if self._steps_here:
            p.best_flops = max(p.best_flops, self.flops_per_token * positions / wall)
        self._steps_here += 1
        return dict(
            step=p.step, train_loss=loss, grad_norm=norm, weight_norm=self.opt.weight_norm(square_of_weights), lr=lr,
            tokens_per_sec=tokens / wall, tokens_seen=p.tokens_seen, wall_ms=1e3 * wall,
        )  # fmt: skip

    # Evaluations

    def evaluate(self) -> Loss:
        """Compute the validation loss of the weights as they are. Raises Stopped."""
        s, self._ahead = self.s, 0
        most = s.val_batches and s.val_batches * s.batch_size
        return evaluate(self.model, self.inputs.val, self.micro, most, self.is_stopping, self.ranks)

    def _evaluate_and_log(self) -> Line:
        """Evaluate; returns the line of the log. Raises Aborted through its observers."""
        self.saver.wait()
        start = time.perf_counter()
        found = self.evaluate()
        p, shards = self.progress, self.inputs.val.shards
        p.seconds += (seconds := time.perf_counter() - start)
        loss, line = found.mean, dict(step=p.step, **found.figures(), wall_ms=1e3 * seconds)
        if not found.pairs:
            line["val_bits_per_byte"] = bits_per_byte(loss, shards.total_tokens, shards.total_bytes)
        self.emit(Measured(line))
        self.run.log.write(**line)
        p.val_losses.append(loss)
        p.val_step = p.step
        if loss < p.best_val:
            p.best_val, p.evals_without_best = loss, 0
        else:
            p.evals_without_best += 1
        self.emit(Evaluated(line, p.epoch_losses))
        if self.s.sample is not None and self._sampled < p.step and self.ranks.rank == 0:
            self._sampled = p.step
            text, sampled = sample_text(self.inputs, self.model, self.s.sample, SAMPLE_TOKENS, p.step)
            self.run.log.write_sample(step=p.step, prompt=self.s.sample, text=text)
            self.emit(sampled)
        return line

    def _end_epoch(self) -> Epoch:
        """Evaluate, and sum up the epoch that ends there."""
        self.ranks.at(f"evaluation after step {self.progress.step}")
        p, line = self.progress, self._evaluate_and_log()
        facts = epoch_facts(line, p.epoch_losses, p.tokens_seen, p.grad_norm_max, p.seconds)
        p.epoch_losses, p.grad_norm_max = [], 0.0
        return Epoch(len(p.val_losses) - 1, facts, tuple(p.val_losses))

    def _save(self, epoch: Epoch | None, state: bool = True) -> None:
        """Save the checkpoint of an epoch, the state, or both."""
        progress = None
        if state:
            self.progress.data, self.progress.next = self.batches.state(), what_is_next(self)
            self.progress.gates = self.findings()
            self._saved, progress = self.progress.step, dataclasses.asdict(self.progress)
        if epoch or state:
            self.ranks.at(f"saving after step {self.progress.step}")
            self.saver.save(epoch, progress)

    # The run

    def train(self) -> str:
        """Train to the end; returns the status word. Raises Aborted, Interrupted, CallbackFailed (state saved), IOFailure."""
        p = self.progress
        self.run.log.open(p.step if p.val_losses else -1, p.val_step)
        self.saver.reserve()
        try:
            with handled(self.stop):
                try:
                    self._begin()
                    status = self._steps()
                except Stopped:  # in an evaluation, which the next start does again
                    if p.epoch_losses:
                        self._save(None)
                    self.saver.wait()
                    status = Interrupted.status
                self.ranks.share("saved")  # by rank 0, which an error of another one would end
            if self.is_stopping():  # the signals are the caller's again: none is lost between
                raise interrupted(self.run, p.step, self.failed)
            return status
        except BaseException:
            # Others may have the same error, and no save to wait for.
            self.ranks.ends()
            raise
        finally:
            # The error of the run is the one to show.
            self.saver.settle()
            self.run.log.close()

    def _begin(self) -> None:
        """Evaluate before the first step, or repeat the evaluation that a resumed run continues."""
        p = self.progress
        self.emit(Started(p.step, self.s.num_steps))
        if not p.val_losses:
            self._evaluate_and_log()
        elif p.val_step == p.step:
            self.emit(Reproduced(p.step, self.evaluate().mean, p.val_losses[-1]))

    def _steps(self) -> str:
        """Take steps and evaluate until the run ends, or a stop is asked for and the state saved; the status word."""
        p, s = self.progress, self.s
        status = self._finished() if self.resumed and p.val_step == p.step else None  # it had ended before
        try:
            while not (status or self.is_stopping()) and (p.step < s.num_steps or self._epoch_is_over()):
                status = self._step_and_save()
        except Exhausted as e:
            if epoch := self._end_epoch() if p.epoch_losses else None:
                status = self._finished()
            self._save(epoch)
            self.emit(Noted(str(e)))
        if self.is_stopping() and self._saved < p.step:
            self._save(None)
        self.saver.wait()
        return status or "DONE"

    def _step_and_save(self) -> str | None:
        """Take a step, evaluate and save where that is due; the status word when the run ends there."""
        p, s = self.progress, self.s
        if not self._epoch_is_over():
            line = self.train_step()
            self.run.log.write(**line)
            self.emit(Stepped(line))
            for ended in self.batches.passes_ended():
                self.run.log.write(step=p.step, **ended)
                self.emit(PassEnded(p.step, **ended))
            self.saver.poll()
        epoch = self._end_epoch() if self._epoch_is_over() else None
        status = self._finished() if epoch else None
        is_end = bool(status) or p.step in self.ends
        due = p.step % s.save_every == 0 if s.save_every else epoch is not None
        is_kept = is_end or is_due(p.step, s.checkpoint_every)
        self._save(epoch if is_kept else None, due or is_end or self.is_stopping())
        return status

    def _epoch_is_over(self) -> bool:
        """An epoch is complete, and its evaluation is still to come."""
        p = self.progress
        return bool(p.epoch_losses) and self._ends_epoch(p.step)

    def _ends_epoch(self, step: int) -> bool:
        return step % self.s.eval_every == 0 or step in self.ends

    def _finished(self) -> str | None:
        """Return the status word when an evaluation ends the run early."""
        p, s = self.progress, self.s
        if len(p.val_losses) - 1 < s.min_epochs:
            return None
        if s.target_val_loss is not None and p.val_losses[-1] <= s.target_val_loss:
            return "TARGET_REACHED"
        return "EARLY_STOP" if p.evals_without_best > s.patience else None
