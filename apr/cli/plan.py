"""`apr plan`: parameters, FLOPs and bytes of a job, before anything is allocated.

Exit code 5 where the job does not fit.

Example: apr plan --model qwen2.5-0.5b --micro-batch-size 2 --seq-length 1024"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..backends.select import select
from ..checkpoints.registry import open_any
from ..common.errors import Refused, UsageError
from ..common.options import device_option, dtype_option, json_option, option, parse, threads_option
from ..common.units import plural
from ..model.config import ModelConfig
from ..model.cost import Memory, check_positions, fitted, flops_per_token, matmul_rate, memory, save_copies
from ..model.lora import BASES, AdapterLayout, LoraConfig
from ..model.lora_settings import check_rank, lora_config
from ..model.optim import AdamW
from ..model.params import Layout
from ..model.presets import PRESETS, load_config
from ..training import disk, scaling
from ..training.rank_memory import on_ranks
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
    check_positions(cfg, f.seq_length)
    if lora:
        check_rank(cfg, lora)
    backend = select(f.device, f.dtype, f.threads)
    dtype = f.dtype or backend.dtypes[0]
    layout, micro = Layout(cfg), min(f.micro_batch_size or f.batch_size, f.batch_size)
    have = backend.free_memory()
    describe: Callable[..., Memory] = partial(
        memory, cfg, backend, micro, f.seq_length, dtype, f.train,
        recompute=f.recompute, documents=f.mask_documents, lora=lora, saves=True, folds=micro < f.batch_size and f.gpus == 1,
    )  # fmt: skip
    if f.gpus % f.nodes:
        raise UsageError(f"--gpus {f.gpus} are all GPUs, and are not equally many on --nodes {f.nodes}")
    if f.gpus > 1:
        if not f.train or backend.name != "cuda":
            raise UsageError(
                f"--gpus {f.gpus} plans a training on GPUs, and this is {backend.name}{'' if f.train else ', --no-train'}: run "
                "it where one of them is, whose memory and speed it measures"
            )
        trained = AdapterLayout(cfg, lora) if lora else layout
        describe = on_ranks(describe, trained, dtype, AdamW, f.gpus)
    limit = have if f.train and not f.recompute else None
    need, again = fitted(lambda again: describe(act_again=again), limit, backend.act_again and f.train)
    planned = _disk(f, cfg, dtype, lora) if f.train else None
    room = disk.free_bytes(Path(f.run_dir or "runs"))
    copies = save_copies(cfg, dtype, AdamW, lora) if f.train else 0
    adapters = AdapterLayout(cfg, lora) if lora else None
    flops = flops_per_token(cfg, f.seq_length, f.train, lora)
    rate = matmul_rate(backend, dtype)
    result: dict[str, Any] = {
        "device": backend.name,
        "dtype": dtype,
        "parameters": layout.num_parameters,
        "tensors": len(layout.slots),
        "trained_parameters": adapters.num_parameters if adapters else layout.num_parameters,
        "flops_per_token": flops,
        "bytes": {**vars(need), "total": need.total},
        "available_bytes": have,
        "fits": have is None or need.total <= have,
        "act_again": again,
        "copies_bytes": copies,
        "disk_bytes": {**vars(planned), "total": planned.total} if planned else None,
        "free_disk_bytes": room,
        "fits_on_disk": planned is None or room is None or planned.total <= room,
        "matmul_flops_per_sec": rate,
        "tokens_per_sec_limit": rate / flops,
    }
    low = 0
    if backend.name == "cpu" and dtype == "float32":
        low = memory(
            cfg, backend, micro, f.seq_length, "bfloat16", f.train, recompute=f.recompute,
            documents=f.mask_documents, lora=lora, saves=True, folds=micro < f.batch_size,
        ).total  # fmt: skip
        result["bfloat16_bytes"] = low
    together = None
    if f.gpus > 1:
        # As fast as products alone would be, and a share of that; a step has as many rounds as there are micro-batches for a GPU.
        seconds = flops * micro * f.seq_length / (scaling.SHARE * rate) * (4 / 3 if f.recompute else 1)
        together = scaling.step(
            adapters or layout, seconds, f.gpus, f.nodes, gbits=f.network_gbits,
            micro_steps=max(1, -(-f.batch_size // (micro * f.gpus))), backward=3 / 4 if f.recompute else 2 / 3,
            bytes_of_a_weight=2 if dtype == "bfloat16" and not adapters else 4,
        )  # fmt: skip
        result |= {
            "efficiency": together.efficiency,
            "scaling": {**vars(together), "seconds": together.seconds},
        }
    steps = f.num_steps
    if steps is not None:
        result["flops"] = flops * steps * f.batch_size * f.seq_length
        result["hours_at_limit"] = result["flops"] / rate / 3600
    code = 0 if result["fits"] and result["fits_on_disk"] else Refused.exit_code
    if f.json:
        print(json.dumps(result, indent=2))
        return code
    show, gib, beside = Show(), 2**30, copies and not need.copies
    parts = [(name, f"{value / gib:9.3f} GiB") for name, value in vars(need).items() if value]
    rows = [
        ("parameters", f"{layout.num_parameters:,} in {plural(len(layout.slots), 'tensor')}"),
        *([("trained", f"{adapters.num_parameters:,} in {plural(len(adapters.slots), 'adapter')}")] if adapters else []),
        ("FLOPs per token", f"{flops / 1e9:.3f} G{' (forward and backward)' if f.train else ' (forward)'}"),
        ("device", f"{backend.name}, {dtype}"),
        *parts,
        ("all buffers", f"{need.total / gib:9.3f} GiB for {micro} x {f.seq_length} tokens at once"),
        *([("to fit", "the input of the down product is computed again in backward, for 2 % of a step")] if again else []),
        *(scaling.described(together, f.gpus, f.nodes, f.network_gbits, rate) if together else []),
        ("free memory", f"{have / gib:9.3f} GiB" if have is not None else "the system does not say"),
        *([("main memory", f"{copies / gib:9.3f} GiB of copies that saves are written from")] if beside else []),
        *([("disk", planned.in_words(room))] if planned else []),
        ("limit of speed", f"{rate / flops:,.0f} tokens/s: all FLOPs at this device's matrix-product rate, "
         f"{rate / 1e9:.0f} GFLOP/s, measured now"),
    ]  # fmt: skip
    if backend.name == "cpu" and dtype == "float32":
        rows.append(("bfloat16", _bfloat16_here(backend, need.total, low, rate)))
    if steps is not None:
        rows.append(("whole job", f"{result['flops']:.3g} FLOPs, at least {result['hours_at_limit']:.2f} h"))
    show.table(f"plan: {f.init or f.model}", rows)
    if not result["fits"]:
        show.note("DOES NOT FIT: use a smaller --micro-batch-size, --seq-length or model, or --recompute")
    if not result["fits_on_disk"]:
        show.note(
            "DOES NOT FIT ON THE DISK: give fewer --keep-checkpoints, --keep-states or --ladder-mib, or another "
            "--run-dir"
        )
    return code


def _bfloat16_here(backend: Any, wide: float, low: float, rate: float) -> str:
    """Say what --dtype bfloat16 gives on this processor: its products, bytes in place of `wide`, and its rate once compiled."""
    from ..backends.cpu import ops, tiles

    path = tiles.path()
    room = f"{low / 2**30:.3f} GiB in place of {wide / 2**30:.3f}"
    if path == "float32":
        return f"this processor multiplies it as float32, so no faster; {room}"
    name = {"amx": "AMX tiles", "avx512_bf16": "AVX512-BF16"}[path]
    if not ops.is_compiled("bfloat16"):
        return f"{room}; products on {name}, measured by --dtype bfloat16 (its kernels are compiled once)"
    times = matmul_rate(backend, "bfloat16") / rate
    return f"{room}; a large product on {name} runs at {times:.1f} times the rate of float32"


def _disk(f: Flags, cfg: ModelConfig, dtype: str, lora: LoraConfig | None) -> disk.Disk:
    """Compute the disk of the job; without --num-steps, of one that is long enough to remove checkpoints."""
    if not f.num_steps and not f.keep_checkpoints:
        raise UsageError(
            "--keep-checkpoints 0 keeps all of them: say how many steps there are with --num-steps"
        )
    s = Settings(
        num_steps=f.num_steps or f.eval_every * (f.keep_checkpoints + f.keep_states + 2),
        eval_every=f.eval_every,
        keep_checkpoints=f.keep_checkpoints,
        keep_states=f.keep_states,
        ladder_mib=f.ladder_mib,
    )
    return disk.disk(cfg, dtype, s, AdamW, lora, is_long=not f.num_steps)
