"""Compute parameters, FLOPs, bytes and the limit of speed of a job, before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ..common.errors import UsageError
from ..model.config import ModelConfig
from ..model.cost import Memory, check_positions, fitted, flops_per_token, matmul_rate, memory, save_copies
from ..model.lora import AdapterLayout, LoraConfig
from ..model.lora_settings import check_rank
from ..model.optim import AdamW
from ..model.params import Layout
from . import disk, scaling
from .rank_memory import on_ranks
from .settings import Settings


@dataclass(frozen=True)
class Job:
    """A model on a backend, and how it is trained.

    batch_size      sequences of an optimizer step, over all GPUs
    micro_batch     sequences that a GPU computes at once
    seq_length      tokens of a sequence
    is_training     False: one forward pass
    disk            settings of what a run writes, None where it writes nothing
    network_gbits   Gbit/s between nodes, for each GPU
    """

    cfg: ModelConfig
    backend: ModuleType
    dtype: str
    batch_size: int
    micro_batch: int
    seq_length: int
    num_steps: int | None = None
    is_training: bool = True
    recompute: bool = False
    mask_documents: bool = False
    lora: LoraConfig | None = None
    disk: Settings | None = None
    run_dir: Path = Path("runs")
    gpus: int = 1
    nodes: int = 1
    network_gbits: float = scaling.GBITS

    @property
    def layout(self) -> Layout:
        """Of all weights."""
        return Layout(self.cfg)

    @property
    def adapters(self) -> AdapterLayout | None:
        """Of the adapters, None where the weights themselves are trained."""
        return AdapterLayout(self.cfg, self.lora) if self.lora else None

    def memory(self, dtype: str, **more: Any) -> Memory:
        """Compute the bytes of its buffers in one process, with weights of another dtype too."""
        return memory(
            self.cfg, self.backend, self.micro_batch, self.seq_length, dtype, self.is_training, recompute=self.recompute,
            documents=self.mask_documents, lora=self.lora, saves=True,
            folds=self.micro_batch < self.batch_size and self.gpus == 1, **more,
        )  # fmt: skip


@dataclass(frozen=True)
class Narrow:
    """The gain of bfloat16 on a CPU where float32 is planned.

    nbytes  of all buffers
    path    that products take: "amx", "avx512_bf16" or "float32"
    times   the rate of float32's products, None before its kernels are compiled
    """

    nbytes: int
    path: str
    times: float | None


@dataclass(frozen=True)
class Plan:
    """The needs of a job.

    need            bytes of its buffers on each GPU
    have            bytes that are free there, None where the system does not say
    act_again       the input of the down product is computed again in backward
    copies          bytes of the copies that saves are written from
    disk, free_disk what a run writes; bytes that are free there
    flops           of a token
    rate            FLOP/s of the device's matrix product, measured now
    together        a step of several GPUs, None of one
    bfloat16        what that gives instead, None where float32 on a CPU is not planned
    """

    job: Job
    need: Memory
    have: int | None
    act_again: bool
    copies: int
    disk: disk.Disk | None
    free_disk: int | None
    flops: float
    rate: float
    together: scaling.Step | None
    bfloat16: Narrow | None

    @property
    def fits(self) -> bool:
        """Tell whether free memory holds its buffers."""
        return self.have is None or self.need.total <= self.have

    @property
    def fits_on_disk(self) -> bool:
        """Tell whether the disk holds what it writes."""
        return self.disk is None or self.free_disk is None or self.disk.total <= self.free_disk

    @property
    def whole_flops(self) -> float | None:
        """FLOPs of all steps, None where their number is not given."""
        job = self.job
        return None if job.num_steps is None else self.flops * job.num_steps * job.batch_size * job.seq_length

    @property
    def hours(self) -> float | None:
        """Hours of all steps at the device's rate, which no step reaches."""
        return None if self.whole_flops is None else self.whole_flops / self.rate / 3600

    def as_json(self) -> dict[str, Any]:
        """List every figure by its name."""
        job, out = self.job, self.together
        trained: Layout | AdapterLayout = job.adapters or job.layout
        found: dict[str, Any] = {
            "device": job.backend.name,
            "dtype": job.dtype,
            "parameters": job.layout.num_parameters,
            "tensors": len(job.layout.slots),
            "trained_parameters": trained.num_parameters,
            "flops_per_token": self.flops,
            "bytes": {**vars(self.need), "total": self.need.total},
            "available_bytes": self.have,
            "fits": self.fits,
            "act_again": self.act_again,
            "copies_bytes": self.copies,
            "disk_bytes": {**vars(self.disk), "total": self.disk.total} if self.disk else None,
            "free_disk_bytes": self.free_disk,
            "fits_on_disk": self.fits_on_disk,
            "matmul_flops_per_sec": self.rate,
            "tokens_per_sec_limit": self.rate / self.flops,
        }
        if self.bfloat16 is not None:
            found["bfloat16_bytes"] = self.bfloat16.nbytes
        if out is not None:
            found |= {"efficiency": out.efficiency, "scaling": {**vars(out), "seconds": out.seconds}}
        if self.whole_flops is not None:
            found |= {"flops": self.whole_flops, "hours_at_limit": self.hours}
        return found


def plan(job: Job) -> Plan:
    """Compute what a job takes. Measures the rate of the device, well under a second.

    Raises UsageError for GPUs that are not equally many on each node or not there, Refused for a rank or a length that the model
    cannot have."""
    check_positions(job.cfg, job.seq_length)
    if job.lora:
        check_rank(job.cfg, job.lora)
    describe: Callable[..., Memory] = partial(job.memory, job.dtype)
    if job.gpus > 1:
        describe = on_ranks(describe, job.adapters or job.layout, job.dtype, AdamW, job.gpus)
    backend, trains, have = job.backend, job.is_training, job.backend.free_memory()
    need, again = fitted(
        lambda again: describe(act_again=again),
        have if trains and not job.recompute else None,
        backend.act_again and trains,
    )
    flops, rate = flops_per_token(job.cfg, job.seq_length, trains, job.lora), matmul_rate(backend, job.dtype)
    return Plan(
        job,
        need,
        have,
        again,
        copies=save_copies(job.cfg, job.dtype, AdamW, job.lora) if trains else 0,
        disk=_disk(job, job.disk) if job.disk else None,
        free_disk=disk.free_bytes(job.run_dir),
        flops=flops,
        rate=rate,
        together=_together(job, flops, rate) if job.gpus > 1 else None,
        bfloat16=_narrow(job, rate) if backend.name == "cpu" and job.dtype == "float32" else None,
    )


def check_gpus(backend: ModuleType, gpus: int, nodes: int, is_training: bool) -> None:
    """Raise UsageError for GPUs that cannot be planned: not equally many on each node, or none here to measure."""
    if gpus % nodes:
        raise UsageError(f"--gpus {gpus} are all GPUs, and are not equally many on --nodes {nodes}")
    if gpus > 1 and (not is_training or backend.name != "cuda"):
        raise UsageError(
            f"--gpus {gpus} plans a training on GPUs, and this is {backend.name}{'' if is_training else ', --no-train'}: run "
            "it where one of them is, whose memory and speed it measures"
        )


def _disk(job: Job, writes: Settings) -> disk.Disk:
    return disk.disk(job.cfg, job.dtype, writes, AdamW, job.lora, is_long=not job.num_steps)


def _narrow(job: Job, rate: float) -> Narrow:
    """Ask the cpu backend for its bfloat16. rate: FLOP/s of float32"""
    from ..backends.cpu import ops, tiles

    path, times = tiles.path(), None
    if path != "float32" and ops.is_compiled("bfloat16"):
        times = matmul_rate(job.backend, "bfloat16") / rate
    return Narrow(job.memory("bfloat16").total, path, times)


def _together(job: Job, flops: float, rate: float) -> scaling.Step:
    """Compute a step of several GPUs: as fast as products alone would be, and a share of that.

    A step has as many rounds as there are micro-batches for a GPU."""
    seconds = (
        flops * job.micro_batch * job.seq_length / (scaling.SHARE * rate) * (4 / 3 if job.recompute else 1)
    )
    return scaling.step(
        job.adapters or job.layout,
        seconds,
        job.gpus,
        job.nodes,
        gbits=job.network_gbits,
        micro_steps=max(1, -(-job.batch_size // (job.micro_batch * job.gpus))),
        backward=3 / 4 if job.recompute else 2 / 3,
        bytes_of_a_weight=2 if job.dtype == "bfloat16" and not job.lora else 4,
    )
