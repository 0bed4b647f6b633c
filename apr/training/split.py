"""Train on several ranks: micro-batch i * ranks + r of a step is rank r's, and each rank owns a part of what is summed.

A rank computes the gradients of its micro-batch into a buffer that starts at zero, every owner gets its part of them from all
ranks and adds them in the order of micro-batches, and the optimizer updates the own part of weights and moments. So the
number of ranks changes no bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from types import ModuleType
from typing import Any

from ..common.errors import Refused
from ..common.events import RanksComputed
from ..model.buffers import WIDE, Buffers, BufferSpecs
from ..model.config import ModelConfig
from ..model.cost import memory
from ..model.lora import AdapterLayout, LoraConfig
from ..model.lora_dropout import Draws
from ..model.optim import Optimizer, optimizer_class
from ..model.transformer import Model
from ..ranks.communicator import Communicator
from ..ranks.nccl import Nccl
from ..ranks.shard import AT_A_TIME, Cut, Shard, hashes
from .buckets import completed, layout_of
from .evaluate import Part, rounds
from .inputs import Inputs
from .rank_memory import on_ranks
from .rundir import RunDir


def check_ranks(
    ranks: Communicator, backend: Any, batch_size: int, micro: int, has_pairs: bool = False
) -> None:
    """Raise Refused for a job that several ranks cannot share."""
    if ranks.count == 1:
        return
    if has_pairs:
        raise Refused(
            f"{ranks.count} ranks, and the data holds pairs of answers: their loss and its reference are computed in one "
            "process only; start it without --ranks, --gpus, mpirun or srun"
        )
    if (backend.name == "cuda") != ranks.even:
        raise Refused(
            f"{ranks.count} ranks that speak {ranks.words} on backend {backend.name}: several GPUs speak NCCL, processes on the "
            "CPU MPI; give --gpus N, or --device cuda under mpirun, srun or torchrun, or --device cpu"
        )
    if (count := -(-batch_size // micro)) < ranks.count:
        raise Refused(
            f"{ranks.count} ranks, and a step of --batch-size {batch_size} with --micro-batch-size {micro} has {count} to "
            "compute: a rank would have nothing to do; use fewer ranks or a smaller --micro-batch-size"
        )


def check_order(ranks: Communicator, run: RunDir) -> None:
    """Raise Refused for a run that began before gradients were sums over micro-batches in order."""
    if ranks.count > 1 and not run.sums_micro_batches():
        raise Refused(
            f"{run.path} adds gradients up as older versions did, which depends on who computes what: go on as one process, "
            "without --ranks or mpirun, or begin a new run with --init from one of its checkpoints"
        )


def memory_of(i: Inputs, ranks: Communicator) -> int:
    """Bytes that a job takes of a device that this rank computes on."""
    s = i.settings
    assert s.dtype is not None
    need = partial(
        memory, i.cfg, i.backend, i.micro, s.seq_length, s.dtype,
        recompute=s.recompute, documents=i.document_end is not None, lora=i.lora, optimizer=optimizer_class(s), saves=True,
        folds=i.micro < s.batch_size and ranks.count == 1, act_again=i.act_again,
    )  # fmt: skip
    if not ranks.even:
        return ranks.local * need().total
    return on_ranks(need, layout_of(i.cfg, i.lora), s.dtype, optimizer_class(s), ranks.count)().total


class Split:
    """Part of the training that this rank does.

    trained  the model, or the adapters of one: w is whole on every rank, g that of one micro-batch
    g        (cut.length,)  the own part of the gradients of the step
    cross_check  every so many steps another rank's micro-batch is computed again; 0: never

    Made before the model, whose trained arrays are where the communicator can move them.
    """

    def __init__(
        self,
        ranks: Communicator,
        be: ModuleType,
        cfg: ModelConfig,
        lora: LoraConfig | None = None,
        cross_check: int = 0,
    ) -> None:
        self.ranks, self.be, self.cross_check = ranks, be, cross_check
        self._count, self._folding = 0, 0.0
        self.layout = layout = layout_of(cfg, lora)
        self._side: Any = None
        if isinstance(ranks, Nccl):
            self._side = _side()
            ranks.attach(self._side, be.describe().get("uuid", ""))
        self._ready, borders = completed(layout)
        borders = borders if ranks.even else []
        self.cut = Cut(layout.size, layout.decayed, ranks.count, borders)
        self._moved: dict[str, Any] = {}
        self._steps = [_Step(), _Step()]

    def make_buffers(self, be: ModuleType, specs: BufferSpecs) -> Buffers:
        """Make the buffers of the model, those that are moved apart from the others."""
        w, g = ("adapters", "adapter_gradients") if isinstance(self.layout, AdapterLayout) else ("w", "g")
        if not self.ranks.even:
            made = Buffers(be, specs)
            self._moved = {"w": made[w], "g": made[g]}
            return made
        made = Buffers(be, {name: spec for name, spec in specs.items() if name not in (w, g)})
        for key, name in (("w", w), ("g", g)):
            self._moved[key] = self.ranks.empty(be, self.cut.padded, specs[name].dtype)
            made.arrays[name] = self._moved[key][: self.cut.size]
        return made

    def bind(self, model: Model) -> None:
        """Take the model that was made with these buffers, once."""
        if hasattr(self, "model"):
            return
        be, ranks, cut = self.be, self.ranks, self.cut
        self.model, self.trained = model, model.adapters or model
        own = ranks.empty(be, cut.length, self.trained.w.dtype.name)
        room = cut.widest if ranks.even else min(cut.widest, AT_A_TIME)
        received = ranks.empty(be, ranks.count * room, "float32")
        self.g = be.empty((cut.length,), WIDE[self.trained.w.dtype.name])
        self.shard = Shard(be, ranks, cut, self._moved["w"], own, received)
        self.shard.trained = self.trained.w
        layers = [*reversed(range(model.cfg.num_layers)), None]
        ready = [self._ready(b) for b in cut.buckets]
        self._at = {layer: [k for k, at in enumerate(ready) if at == layer] for layer in layers}

    def tune(self, targets_per_batch: int) -> None:
        """Search for algorithms of products on rank 0, which the others find: bits depend on them. Raises Refused."""
        if self.ranks.rank:
            self.ranks.share("waiting for rank 0")
        self.model.tune(targets_per_batch)
        if not self.ranks.rank:
            self.ranks.share("tuned")
        used = self.ranks.share(self._side.tuned() if self._side else "")
        if other := next((r for r, digest in enumerate(used) if digest != used[0]), 0):
            raise Refused(
                f"rank {other} multiplies matrices by other algorithms of cuBLASLt than rank 0, and sums would differ: let "
                "APR_CACHE name a folder that all machines share"
            )

    def optimizer(self, model: Model, kind: type[Optimizer], **options: Any) -> Optimizer:
        """Build the optimizer of the own part of a model that was made with these buffers."""
        if options.get("lora_plus", 1) != 1:
            raise Refused(
                f"--lora-plus and {self.ranks.count} ranks: the parts of ranks have one learning rate; start it without "
                "--ranks, --gpus, mpirun or srun"
            )
        self.bind(model)
        shard = self.shard
        self.opt = kind(self.be, shard.own, self.g, self.cut.decayed, shard.gather, shard, **options)
        return self.opt

    def whole(self) -> Optimizer:
        """Build an optimizer of all weights, without a state, for a moment; as exact as they began where this rank knows it."""
        made = Optimizer.of(self.trained)
        if self.shard.start is not None and made.master is not made.w:
            self.be.from_host(made.master, self.shard.start)
        return made

    def gradients(
        self, parts: Iterable[Part], scale: float, graph: bool, which: slice = slice(None),
        keep: Callable[[int, int], None] = lambda n, micro_batch: None,
        drawn: tuple[int, int] = (0, 0),
    ) -> None:  # fmt: skip
        """Compute the gradients of a step in the own `g`: micro-batches in rounds, one for each rank, of them `which` rounds.
        keep: hears of each own micro-batch before the next, its number here and in the step. drawn: seed and step of dropout."""
        model, rank, count, parts = self.model, self.ranks.rank, self.ranks.count, [*parts]
        every, firsts = (
            [*enumerate(rounds(parts, count))],
            [*accumulate((len(p[0]) for p in parts), initial=0)],
        )

        def draws(micro_batch: int) -> Draws:
            return Draws.of(*drawn, firsts[micro_batch], firsts[micro_batch + 1] - firsts[micro_batch])

        for n, batches in every[which]:
            if n == 0:
                self._steps.reverse()
                self._steps[0].begin()
                self._count += 1
            step, trained = self._steps[0], model.tokens_trained
            is_due = self.cross_check > 0 and self._count % self.cross_check == 0
            fold = partial(self._fold, len(batches), n == 0)
            if rank < len(batches):
                self.be.fill(model.total, 0)
                # NCCL needs all ranks to compute a round alike: recorded, or not.
                graph = graph and len(batches) == count
                also = (n == 0, *(ids.shape for ids, _ in batches))
                start, self._folding = time.process_time(), 0.0
                own = draws(n * count + rank)
                model.micro_step(*batches[rank], scale, graph, begins=True, ready=fold, also=also, draws=own)
                step.keep(self.be, model.total)
                keep(n, n * count + rank)
                if not self.be.asynchronous:
                    step.seconds = min(step.seconds, time.process_time() - start - self._folding)
                if is_due and n == 0:
                    step.own = hashes(self.be, self.trained.layout, self.trained.g)
            else:
                for layer in self._at:
                    fold(layer)
            step.tokens += model.tokens_trained - trained
            step.micro_batches += len(batches)
            if is_due and n == len(every) - 1:
                # Of every other rank in turn. The first round has a micro-batch of each.
                step.other = (rank + 1 + (self._count // self.cross_check) % (count - 1)) % count
                again = partial(
                    model.micro_step, *parts[step.other], scale, False, True, draws=draws(step.other)
                )
                step.seconds = min(step.seconds, self._timed(again))
                step.again = hashes(self.be, self.trained.layout, self.trained.g)
            model.tokens_trained = trained

    def _timed(self, compute: Callable[[], None]) -> float:
        """Do what no other rank takes part in; returns its seconds on a device, which others do not share; else infinity."""
        if not self.be.asynchronous:
            compute()
            return math.inf
        with self.ranks.waits():
            self.be.sync()
        start = time.perf_counter()
        compute()
        self.be.sync()
        return time.perf_counter() - start

    def _fold(self, micro_batches: int, begins: bool, layer: int | None) -> None:
        """Exchange and add what a layer's backward pass has completed."""
        start = time.process_time()
        if self._at[layer]:
            with self.ranks.beside():
                for k in self._at[layer]:
                    self.shard.fold(k, self.g, self._moved["g"], micro_batches, begins)
        if layer is None and any(self._at.values()):
            self.ranks.join()
        self._folding += time.process_time() - start

    def read_later(self, total: Any) -> Callable[[], list[float]]:
        """See Optimizer.read_later: the loss is the sum in the order of micro-batches, and `total` that of the last one."""
        step, count = self._steps[0], self.ranks.count
        numbers = self.be.read_later((*step.losses[: step.kept], self.opt.sum_sq, self.opt.square))

        def values() -> list[float]:
            with self.ranks.waits():
                *losses, square, weights = numbers()
            # Of the processor: other work on the machine makes no rank look slow. Of a device where another's micro-batch
            # was computed again: in all others it waits for other ranks.
            shared, total = self.ranks.share((losses, step.tokens, step.seconds)), 0.0
            for n in range(step.micro_batches):
                total += shared[n % count][0][n // count]
            self.model.tokens_trained += sum(tokens for _, tokens, _ in shared)
            self.shard.start = None
            times = tuple(s for _, _, s in shared if s < math.inf)
            self._computed = partial(
                RanksComputed, seconds=times, other=step.other, own=step.own, again=step.again
            )
            return [total, square, weights]

        return values

    def computed(self, step: int) -> RanksComputed:
        """Tell of the step whose numbers were read last."""
        return self._computed(step)


def _side() -> Any:
    """Make the second stream of the GPU."""
    from ..backends.cuda.side import Side

    return Side()


@dataclass
class _Step:
    """Losses of the micro-batches that this rank has computed of a step, on the device, and targets that it has trained on."""

    losses: list[Any] = field(default_factory=list)
    kept: int = 0
    tokens: int = 0
    micro_batches: int = 0
    seconds: float = math.inf
    other: int = -1
    own: Sequence[tuple[str, int]] = ()
    again: Sequence[tuple[str, int]] = ()

    def begin(self) -> None:
        self.kept = self.tokens = self.micro_batches = 0
        self.seconds, self.other, self.own, self.again = math.inf, -1, (), ()

    def keep(self, be: ModuleType, total: Any) -> None:
        """Copy the loss of a micro-batch, before the next one is computed."""
        if self.kept == len(self.losses):
            self.losses.append(be.empty((1,), "float64"))
        be.copy(self.losses[self.kept], total)
        self.kept += 1
