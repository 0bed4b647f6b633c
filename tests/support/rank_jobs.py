"""Run jobs of `apr pretrain` one after the other, on the ranks that this process is one of: python rank_jobs.py JOBS.json

A job is {"name", "args", "fault"}; outcomes go to JOBS.json.out: {name: "DONE", or the status and message of its error}, and
the seconds of each to JOBS.json.seconds. `played` behind the file: NCCL and the GPUs are those of fake_nccl.py.
A fault is planted on every rank, and acts on the rank that it names. What takes long and has nothing to do with ranks is left
out: steps of stock models before the first step, a fresh process and pictures at the end.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np

import fake_nccl
from apr.common.errors import AprError
from apr.evidence import end
from apr.evidence import ranks as of_ranks
from apr.model.transformer import Model
from apr.ranks import library
from apr.ranks.launch import joined
from apr.ranks.shard import TILE, Bucket, Shard
from apr.training import run as running
from apr.training.display import Display
from apr.training.loop import Trainer
from apr.training.settings import from_command_line
from apr.training.split import Split


@contextmanager
def put(owner, name, value):
    """Replace an attribute for the time of a job."""
    right = getattr(owner, name)
    setattr(owner, name, value(right))
    try:
        yield
    finally:
        setattr(owner, name, right)


def stop_asked(ranks):
    """The last rank is asked to stop in step 2."""

    def stopping(right):
        def train_step(self):
            line = right(self)
            if ranks.rank == ranks.count - 1 and line["step"] == 2:
                self.stop.is_asked = True
            return line

        return train_step

    return put(Trainer, "train_step", stopping)


def pieces_in_another_order(ranks):
    def reverse(right):
        def fold(self, k, total, x, micro_batches, begins):
            exchange = self.ranks.exchange

            def reversed_exchange(out, *args):
                exchange(out, *args)
                out[:micro_batches] = out[:micro_batches][::-1].copy()

            with put(self.ranks, "exchange", lambda _: reversed_exchange):
                right(self, k, total, x, micro_batches, begins)

        return fold

    return put(Shard, "fold", reverse)


def a_micro_batch_skipped(ranks):
    """Rank 1 leaves out what it should compute, from the second step on."""

    calls = []

    def skipping(right):
        def gradients(self, *args):
            calls.append(1)
            if ranks.rank == 1 and len(calls) > 1:
                sent = lambda *a, ready, **k: [ready(layer) for layer in self._at]  # noqa: E731
                with put(self.model, "micro_step", lambda _: sent):
                    return right(self, *args)
            return right(self, *args)

        return gradients

    return put(Split, "gradients", skipping)


def one_bit_of_the_weights(ranks):
    """A bit of rank 1's weights turns behind every update."""

    def flipping(right):
        def gather(self):
            right(self)
            if ranks.rank == 1:
                self.w[7:8].view(np.uint32)[0] ^= 1

        return gather

    return put(Shard, "gather", flipping)


def another_gradient(ranks):
    """Rank 1 computes other gradients."""

    def other(right):
        def micro_step(self, ids, *args, **options):
            right(self, np.roll(ids, ranks.rank), *args, **options)

        return micro_step

    return put(Model, "micro_step", other)


def another_gradient_later(ranks):
    """Rank 1 computes other gradients from the second step on."""

    calls = []

    def other(right):
        def gradients(self, *args):
            calls.append(1)
            with another_gradient(ranks) if len(calls) > 1 else nullcontext():
                return right(self, *args)

        return gradients

    return put(Split, "gradients", other)


@contextmanager
def a_slow_rank(ranks):
    """The processor of rank 1 needs longer, by far."""

    def slow(right):
        def micro_step(self, *args, **options):
            right(self, *args, **options)
            end = time.process_time() + 0.2 * ranks.rank
            while time.process_time() < end:
                pass

        return micro_step

    with put(Model, "micro_step", slow), put(of_ranks, "SLOW_STEPS", lambda _: 3):
        yield


def gradients_left(ranks):
    """The first micro-batch of a step is added to what the step before has left."""

    def adding(right):
        return lambda self, k, total, x, micro_batches, begins: right(self, k, total, x, micro_batches, False)

    return put(Shard, "fold", adding)


def gradients_of_a_micro_batch_left(ranks):
    """Micro-batches add to the gradients of those before them on the rank."""

    def adding(right):
        def gradients(self, *args):
            micro_step = self.model.micro_step
            with put(self.model, "micro_step", lambda _: lambda *a, begins, **k: micro_step(*a, **k)):
                return right(self, *args)

        return gradients

    return put(Split, "gradients", adding)


def a_border_off_by_one_tile(ranks):
    def shifted(right):
        def of(self, rank):
            own = right(self, rank)
            return slice(min(own.stop, own.start + TILE * ranks.rank), own.stop)

        return of

    return put(Bucket, "of", shifted)


def without_copy_engines(ranks):
    """NCCL moves with kernels, as it does by itself."""
    return put(library, "ZERO_BLOCKS", lambda _: library.UNDEFINED)


def _ends_in_a_step(ranks, number):
    """A signal ends the last rank where the others wait for its bytes in the recorded pass of step 4."""
    calls = []

    def ending(right):
        def train_step(self):
            calls.append(1)
            return right(self)

        return train_step

    def computing(right):
        def micro_step(self, *args, **options):
            if len(calls) == 4 and ranks.rank == ranks.count - 1:
                Path(f"{sys.argv[1]}.moment").write_text(str(time.time()))
                os.kill(os.getpid(), number)
            return right(self, *args, **options)

        return micro_step

    return put(Trainer, "train_step", ending), put(Model, "micro_step", computing)


@contextmanager
def killed_in_a_step(ranks):
    one, other = _ends_in_a_step(ranks, signal.SIGKILL)
    with one, other:
        yield


@contextmanager
def halted_in_a_step(ranks):
    one, other = _ends_in_a_step(ranks, signal.SIGSTOP)
    with one, other:
        yield


def other_code(ranks):
    return put(running, "code_sha256", lambda right: lambda: f"{right()}{'+' * ranks.rank}")


def other_data(ranks):
    def other(right):
        return lambda self: right(self) | {"train_sha256": f"of rank {ranks.rank}"}

    from apr.training.inputs import Inputs

    return put(Inputs, "describe", other)


def none(ranks):
    return put(running, "say", lambda right: lambda *args: None)


def main(path, played=""):
    """Run the jobs of a file."""
    jobs, outcomes, seconds = json.loads(Path(path).read_text()), {}, {}
    end._reload = lambda t, gates, evaluation: None
    running.FormulaChecks = lambda *args: None
    running._close = lambda run, show, early=None: running.seal(run.path, early)
    if played:
        fake_nccl.install(setattr)
    if said := os.environ.get("STACKS_AFTER"):
        faulthandler.dump_traceback_later(float(said), repeat=True)
    with joined() as ranks:
        for job in jobs:
            start = time.perf_counter()
            with none(ranks), globals()[job.get("fault", "none")](ranks):
                settings, explicit = from_command_line(job["args"])
                try:
                    running.train(settings, Display(), explicit=explicit, ranks=ranks)
                    outcomes[job["name"]] = "DONE"
                except AprError as e:
                    outcomes[job["name"]] = f"{e.status} {e}"
            seconds[job["name"]] = round(time.perf_counter() - start, 2)
            if ranks.rank == 0:
                Path(f"{path}.out").write_text(json.dumps(outcomes))
                Path(f"{path}.seconds").write_text(json.dumps(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
