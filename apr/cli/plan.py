"""`apr plan`: parameters, FLOPs and bytes of a job, before anything is allocated.

Exit code 5 where the job does not fit.

Example: apr plan --model qwen2.5-0.5b --micro-batch-size 2 --seq-length 1024"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..backends.select import select
from ..checkpoints.registry import open_any
from ..common.errors import Refused, UsageError
from ..common.options import device_option, dtype_option, json_option, option, parse, threads_option
from ..common.units import plural
from ..model.lora import BASES
from ..model.lora_settings import lora_config
from ..model.presets import PRESETS, load_config
from ..training import scaling
from ..training.demo import INSTRUCTIONS
from ..training.plan import Job, Narrow, Plan, check_gpus, plan
from ..training.settings import Settings
from .show import Show


@dataclass(frozen=True)
class Flags:
    """Options of `apr plan`."""

    model: str | None = option("preset name or config.json", path=True, names=tuple(PRESETS))
    init: str | None = option(
        "checkpoint: an .apr or GGUF file or a Hugging Face folder", metavar="CHECKPOINT", path=True
    )
    batch_size: int = option("sequences per optimizer step", 16, at_least=1, metavar="SEQUENCES")
    micro_batch_size: int | None = option(
        "sequences computed at once (default: the batch size)", at_least=1, metavar="SEQUENCES"
    )
    seq_length: int = option("tokens per sequence", 1024, at_least=1, metavar="TOKENS")
    num_steps: int | None = option("optimizer steps, for the FLOPs of the whole job", at_least=1)
    eval_every: int = option(
        "steps between evaluations", Settings.eval_every, above=0, metavar="STEPS", also="steps-per-epoch"
    )
    keep_checkpoints: int = option(
        "how many of the latest checkpoints are kept, for the disk; 0: all",
        Settings.keep_checkpoints,
        at_least=0,
    )
    keep_states: int = option("how many saved states are kept, for the disk", Settings.keep_states, above=0)
    ladder_mib: int = option(
        "how much disk older states take, spread over the run, that are kept for replay",
        Settings.ladder_mib,
        at_least=0,
        metavar="MIB",
    )
    run_dir: str | None = option("folder of the run, for the disk", metavar="FOLDER", path=True)
    train: bool = option("training; --no-train: one forward pass", True)
    recompute: bool = option("keep only the input of each block, compute the rest again in backward", False)
    mask_documents: bool = option("attention stops where a document ends", False)
    lora_rank: int | None = option("train adapters of this rank instead of the weights", at_least=1)
    lora_targets: str | None = option(
        "matrices that get adapters, of q,k,v,o,gate,up,down (default: all of them), and embed,head",
        metavar="MATRICES",
    )
    lora_modules_to_save: str | None = option(
        "modules to train whole beside the adapters: embed_tokens, lm_head, norm and so on", metavar="MODULES"
    )
    train_embeddings: bool = option("with adapters, train embedding and head whole", False)
    lora_dropout: float | None = option(
        "share of what adapters get that is dropped", at_least=0, below=1, metavar="SHARE"
    )
    lora_base: str | None = option(
        "format of the frozen matrices of the blocks (default: --dtype)", choices=BASES
    )
    dtype: str | None = dtype_option()
    gpus: int = option("GPUs that train together, for memory and speed of each", 1, above=0, metavar="N")
    nodes: int = option("machines that they are on, equally many on each", 1, above=0, metavar="N")
    network_gbits: float = option(
        "speed of the network between machines, for each GPU", scaling.GBITS, above=0, metavar="GBIT/S"
    )
    device: str = device_option()
    threads: int | None = threads_option()
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code. Errors are raised."""
    f = parse(Flags, args, "apr plan", __doc__ or "")
    found = plan(_job(f))
    if f.json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        _show(found, f"plan: {f.init or f.model}")
    return 0 if found.fits and found.fits_on_disk else Refused.exit_code


def _job(f: Flags) -> Job:
    """Make of flags what is planned."""
    if (f.model is None) == (f.init is None):
        raise UsageError("say which model: give --model or --init, one of them")
    if f.recompute and not f.train:
        raise UsageError("--recompute is about backward, --no-train has none; give one of them")
    lora = lora_config(
        f.lora_rank,
        None,
        f.lora_targets,
        f.lora_base,
        saved=f.lora_modules_to_save,
        dropout=f.lora_dropout,
        embeddings=f.train_embeddings,
    )
    if lora and not f.train:
        raise UsageError("--lora-rank is about training, --no-train has none; give one of them")
    cfg = open_any(f.init).cfg if f.init else load_config(str(f.model))
    backend = select(f.device, f.dtype, f.threads)
    check_gpus(backend, f.gpus, f.nodes, f.train)
    return Job(
        cfg,
        backend,
        f.dtype or backend.dtypes[0],
        f.batch_size,
        min(f.micro_batch_size or f.batch_size, f.batch_size),
        f.seq_length,
        f.num_steps,
        f.train,
        f.recompute,
        f.mask_documents,
        lora,
        _writes(f) if f.train else None,
        Path(f.run_dir or "runs"),
        f.gpus,
        f.nodes,
        f.network_gbits,
    )


def _writes(f: Flags) -> Settings:
    """Settings of what a run writes; without --num-steps, of one that is long enough to remove checkpoints."""
    if not f.num_steps and not f.keep_checkpoints:
        raise UsageError(
            "--keep-checkpoints 0 keeps all of them: say how many steps there are with --num-steps"
        )
    return Settings(
        num_steps=f.num_steps or f.eval_every * (f.keep_checkpoints + f.keep_states + 2),
        eval_every=f.eval_every,
        keep_checkpoints=f.keep_checkpoints,
        keep_states=f.keep_states,
        ladder_mib=f.ladder_mib,
    )


def _show(p: Plan, title: str) -> None:
    show, job, layout, adapters = Show(), p.job, p.job.layout, p.job.adapters
    rows = [("parameters", f"{layout.num_parameters:,} in {plural(len(layout.slots), 'tensor')}")]
    if adapters:
        rows.append(("trained", f"{adapters.num_parameters:,} in {plural(len(adapters.slots), 'adapter')}"))
    passes = "forward and backward" if job.is_training else "forward"
    rows.append(("FLOPs per token", f"{p.flops / 1e9:.3f} G ({passes})"))
    rows.append(("device", f"{job.backend.name}, {job.dtype}"))
    rows += [(name, _gib(value)) for name, value in vars(p.need).items() if value]
    tokens = f"{job.micro_batch} x {job.seq_length} tokens at once"
    rows.append(("all buffers", f"{_gib(p.need.total)} for {tokens}"))
    if p.act_again:
        again = "the input of the down product is computed again in backward, for 2 % of a step"
        rows.append(("to fit", again))
    if p.together:
        rows += scaling.described(p.together, job.gpus, job.nodes, job.network_gbits, p.rate)
    rows.append(("free memory", _gib(p.have) if p.have is not None else "the system does not say"))
    if p.copies and not p.need.copies:
        rows.append(("main memory", f"{_gib(p.copies)} of copies that saves are written from"))
    if p.disk:
        rows.append(("disk", p.disk.in_words(p.free_disk)))
    rows.append((
        "limit of speed",
        f"{p.rate / p.flops:,.0f} tokens/s: all FLOPs at this device's matrix-product rate, {p.rate / 1e9:.0f} GFLOP/s, "
        "measured now",
    ))  # fmt: skip
    if p.bfloat16 is not None:
        rows.append(("bfloat16", _in_words(p.bfloat16, p.need.total)))
    if p.whole_flops is not None:
        rows.append(("whole job", f"{p.whole_flops:.3g} FLOPs, at least {p.hours:.2f} h"))
    show.table(title, rows)
    if not p.fits:
        show.note("DOES NOT FIT: use a smaller --micro-batch-size, --seq-length or model, or --recompute")
    if not p.fits_on_disk:
        show.note(
            "DOES NOT FIT ON THE DISK: give fewer --keep-checkpoints, --keep-states or --ladder-mib, or another "
            "--run-dir"
        )


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:9.3f} GiB"


def _in_words(b: Narrow, wide: int) -> str:
    """Say what --dtype bfloat16 gives on this processor: bytes in place of `wide`, and its rate once compiled."""
    room = f"{b.nbytes / 2**30:.3f} GiB in place of {wide / 2**30:.3f}"
    if b.path == "float32":
        return f"this processor multiplies it as float32, so no faster; {room}"
    name = INSTRUCTIONS[b.path]
    if b.times is None:
        return f"{room}; products on {name}, measured by --dtype bfloat16 (its kernels are compiled once)"
    return f"{room}; a large product on {name} runs at {b.times:.1f} times the rate of float32"
