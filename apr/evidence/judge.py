"""When each gate of a run is asked, and with what: the loop calls this, measure.py measures, gates.py keeps the answers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.finding import SKIPPED, SUSPECT, Finding
from ..common.host import cores
from ..data.batches import sequential
from ..model.cost import matmul_rate, memory
from ..training.rundir import bits_per_byte
from ..verify.reload import in_fresh_process
from . import adapters, measure
from .measure import LAST_STEPS

if TYPE_CHECKING:
    from ..training.loop import Progress, Trainer

RATE_TRIES = 20  # at most, of about 0.1 s on a CPU, to measure how fast one large product is


class Judge:
    """Asks the gates of one Trainer."""

    def __init__(self, trainer: Trainer) -> None:
        t = self.trainer = trainer
        self.inputs, self.s, self.run, self.gates = t.inputs, t.s, t.run, t.gates
        self.model, self.opt, self.lora, self.batches, self.micro = t.model, t.opt, t.lora, t.batches, t.micro

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self.trainer.progress

    def weights(self) -> None:
        """The weights of a run that begins in this process. Raises Refused."""
        if self.lora and self.inputs.init:
            answer = adapters.base_loaded(self.lora, self.inputs.init)
        elif self.inputs.init:
            answer = measure.loaded_weights(self.model, self.opt, self.inputs.init)
        else:
            answer = measure.random_weights(self.model, self.opt, self.s.initializer_range)
        self.gates.judge(answer)
        self.gates.skip("before.resumed", "the run began in this process")

    def causal(self) -> None:
        """Whether a position sees what follows it. Raises Aborted."""
        ids, _ = next(iter(sequential(self.inputs.val, min(self.micro, 2))))
        self.gates.judge(measure.causal(self.model, ids), self.progress.step)

    def start(self, loss: float) -> None:
        """The gates of step 0, after the evaluation before training. Raises Aborted."""
        i, judge, bound = self.inputs, self.gates.judge, self.gates.bound
        entropy, cfg = i.val.shards.unigram_entropy, i.cfg
        if i.init is None:
            rows = self.model.b * self.model.t
            rstd = float(i.backend.to_host(self.model.buffers["rstd"][:rows]).mean())
            spread, repeated = self._spread()
            answer = measure.initial_loss(
                cfg, loss, self.s.initializer_range, rstd, spread, repeated, bound("start_margin")
            )
            judge(answer, 0)
            self.gates.skip("start.pretrained", "random weights")
            self.gates.skip("start.reproduces", "random weights")
            return
        self.gates.skip("start.loss", "the weights come from a checkpoint")
        answer = measure.pretrained_loss(loss, entropy, bound("pretrained_share"))
        recorded = i.init.metadata.get("evaluation") if i.init.kind == "apr" else None
        if not isinstance(recorded, dict):
            self.gates.skip("start.reproduces", "no validation loss is recorded in the checkpoint")
            judge(answer, 0)
            return
        differs = [k for k, v in self.evaluated_on().items() if recorded.get(k) != v]
        differs += ["weights, without adapters"] if i.lora_init else []
        if differs:
            self.gates.skip("start.reproduces", f"recorded on other {', '.join(differs)}")
            # The training of the checkpoint is its own affair.
            judge(answer if answer.passed else replace(answer, verdict=SUSPECT), 0)
        else:
            judge(self.reproduced("start.reproduces", loss, recorded["val_loss"]), 0)
            self.gates.skip(
                "start.pretrained", "its recorded loss on these very windows is the better measure"
            )

    def _spread(self) -> tuple[float, float]:
        """Of the validation text: how many ids it is spread over (1 / sum of squared shares), and the share of targets that
        are the token they follow."""
        scans = {side.name: side.scan for side in self.inputs.audit}
        scan = scans.get("val") or scans["train"]
        assert scan is not None
        p = scan.counts / max(1, scan.counts.sum())
        ids, targets = next(iter(sequential(self.inputs.val, 64)))
        return float(1 / max(np.square(p).sum(), 1e-12)), float((ids == targets).mean())

    def reproduced(self, gate: str, loss: float, recorded: float) -> Finding:
        """Whether a recorded validation loss comes out again, within the rounding of the dtype."""
        return measure.reproduced(gate, loss, recorded, self.gates.bound(f"reproduce_{self.model.dtype}"))

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

    def step(
        self,
        line: dict[str, Any],
        trained: int,
        tokens: int,
        apart: Callable[[float], Finding] | None,
        left: float,
    ) -> None:
        """The gates of every step. Raises Aborted."""
        p, judge = self.progress, self.gates.judge
        numbers = {key: line[key] for key in ("train_loss", "grad_norm", "weight_norm")}
        finite = all(math.isfinite(x) for x in numbers.values())
        said = ", ".join(f"{key} = {x:.6g}" for key, x in numbers.items())
        saved = self.run.states()
        why = f"{said}: not finite. Last saved state: {saved[-1] if saved else 'none'}"
        judge(Finding.of("run.finite", finite, said, "finite", "" if finite else why), p.step)
        read = self.batches.targets_read
        judge(
            Finding.of(
                "run.tokens",
                trained == tokens and read == p.tokens_seen,
                f"{trained:,} of {tokens:,} in a step, {p.tokens_seen:,} in all",
                f"equal, and {read:,} by the position in the data",
            ),
            p.step,
        )
        if left:
            said = f"gradients of norm {left:.4g} were left from the step before"
            judge(Finding.of("run.gradients", False, said, "0 before the first micro-batch", said), p.step)
        if apart is not None:
            if self.s.seq_length < 2:
                self.gates.skip(
                    "run.gradients", "attention over one token has no gradient of queries and keys"
                )
            else:
                judge(apart(line["grad_norm"]), p.step)
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
            Finding.of(
                "run.placeholder", real, measured, f"below {most}, and never 0", why, score=p.constant
            ),
            p.step,
        )

    def diverged(self, loss: float) -> Finding:
        """Whether the validation loss is far above the one before, or above that of a guess."""
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
        return Finding.of(
            "run.diverged",
            loss <= bound,
            f"{loss:.4f}",
            f"at most {bound:.4f}, {what}",
            why,
            score=loss / bound,
        )

    def epoch(self, val: float, error: float) -> None:
        """The gates of an evaluation at the end of an epoch: its validation loss and standard error."""
        p = self.progress
        bound, entropy = self.gates.bound, self.inputs.val.shards.unigram_entropy
        self.gates.judge(
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
            self.gates.judge(measure.plausible(bits, bound("min_bits_per_byte")), p.step)
        if self.inputs.init is None:
            answer = measure.learning(val, entropy, p.tokens_seen, bound("drop_per_decade"))
            self.gates.judge(answer, p.step)

    def end(self) -> None:
        """The gates of a run that came to its end."""
        p, s, gates = self.progress, self.s, self.gates
        if s.target_val_loss is None:
            gates.skip("end.target", "no --target-val-loss was given")
        else:
            reached = p.val_losses[-1] <= s.target_val_loss
            said = f"{p.val_losses[-1]:.4f} nats/token"
            why = "" if reached else f"the target was not reached: {said}, asked for {s.target_val_loss:g}"
            gates.judge(
                Finding.of("end.target", reached, said, f"at most {s.target_val_loss:g}", why), p.step
            )
        if p.best_flops:
            gates.judge(self._speed(gates.bound("speed")))
        if self.lora:
            gates.judge(adapters.base_unchanged(self.lora), p.step)
        else:
            gates.skip("end.base", "no adapters: every weight is trained")
        self._reload()
        if s.spot_check < 0:
            gates.skip("start.ops", "--spot-check -1")
        if self.inputs.init is not None:
            gates.skip("end.learning", "the weights come from a checkpoint, which had learned before")
        gates.close("the run did not come to a place where it is asked")

    def _reload(self) -> None:
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
            self.gates.judge(Finding.of("end.reload", False, found, "the recorded loss", why), p.step)
        else:
            self.gates.judge(self.reproduced("end.reload", found.mean, p.val_losses[-1]), p.step)

    def _speed(self, most: float) -> Finding:
        """The fastest step against one large product, measured again where another process may have had the device."""
        be, flops = self.inputs.backend, self.progress.best_flops
        rate, tries = 0.0, 0
        while tries < RATE_TRIES and (not tries or flops > most * rate):
            rate, tries = max(rate, matmul_rate(be, self.model.dtype)), tries + 1
        answer = measure.speed(flops, rate, most)
        load = os.getloadavg()[0]
        if not answer.passed and be.name == "cpu" and load > cores():
            why = f"a load of {load:.1f} on {cores()} cores: the rate of a product cannot be measured beside other processes"
            return replace(answer, verdict=SKIPPED, why=why)
        return answer
