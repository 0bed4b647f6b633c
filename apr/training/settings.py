"""Every setting of `apr pretrain`: flags, configuration file, defaults of the mode, the demo job.

Examples: apr pretrain --corpus my_code/ --model smollm2-135m --num-steps 2000 --batch-size 32 --seq-length 512
          apr pretrain --resume --run-dir runs/demo"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import InputNotFound, MalformedFile, UsageError
from ..common.files import read_json
from ..common.options import field_types, given, option
from ..data.audit import tokenizer_beside
from ..evidence.gates import parse_bounds
from ..model.lora import lora_config
from ..model.optim import SCHEDULES

LORA_LR = 2e-4  # adapters start at nothing and take larger steps than weights
MODES = {"from-scratch": dict(lr=3e-4, warmup_steps=1000), "finetune": dict(lr=5e-5, warmup_steps=100)}


@dataclass(frozen=True)
class Settings:
    """The flags of `apr pretrain`, one field each; None means "depends on other settings"."""

    corpus: str | None = option(
        "raw text to train on: a file or folder of text, source code, JSONL or Parquet, or 'stdlib' for this "
        "Python's own standard library; tokenised once into a cache; a single text file is cut into about 100 documents"
    )
    dataset: str | None = option("folder of token shards (or one with train/ and val/ inside)")
    instruct: str | None = option(
        "conversations or prompts with responses to fine-tune on, JSON Lines (also .gz, .zst) or a folder of those, with a loss "
        "on the answers only; see docs/fine-tuning.md"
    )
    chat_template: str | None = option(
        "with --instruct, file of the chat template (default: the checkpoint's own)"
    )
    content_field: str = option("with --corpus, key of the text in JSONL records and Parquet files", "text")
    tokenizer: str | None = option("tokenizer folder; with --corpus and none given, one is trained")
    run_dir: str | None = option("where the run writes (default: the next free runs/NAME)")
    model: str | None = option("preset name or config.json of the model to train from random weights")
    init: str | None = option("checkpoint to start from: an .apr file or a Hugging Face folder")
    mode: str | None = option(
        "defaults for lr and warm-up; follows from --model or --init", choices=tuple(MODES)
    )
    device: str = option("auto, cpu, cuda or cuda:N; only auto may choose", "auto")
    dtype: str | None = option(
        "of weights and activations (default: bfloat16 on cuda, float32 on cpu); sums, moments and the copy of "
        "the weights that AdamW updates are float32 always",
        choices=("float32", "bfloat16"),
    )
    threads: int | None = option("CPU threads for matrix products and kernels (default: all cores)")
    num_steps: int = option("optimizer steps", 1000)
    batch_size: int = option("sequences per optimizer step", 16)
    micro_batch_size: int | None = option("sequences computed at once (default: as many as fit in memory)")
    recompute: bool = option("keep only what enters each block, compute the rest again in backward", False)
    graph: bool = option("on cuda, record a micro-step once and replay it; --no-graph: op by op", True)
    seq_length: int = option("tokens per sequence", 1024)
    steps_per_epoch: int = option("steps between evaluations", 100)
    lr: float | None = option(
        "peak learning rate (default: 3e-4 from scratch, 5e-5 fine-tuning, 2e-4 fine-tuning adapters)"
    )
    lr_min: float | None = option("learning rate at the end (default: 1 % of the peak)")
    warmup_steps: int | None = option(
        "steps of linear warm-up (default: 1000 from scratch, 100 fine-tuning, at most 10 % of all steps)"
    )
    schedule: str = option("how the learning rate falls", "cosine", choices=SCHEDULES)
    weight_decay: float = option("AdamW decay of matrices; norms and biases have none", 0.1)
    beta1: float = option("AdamW", 0.9)
    beta2: float = option("AdamW", 0.95)
    eps: float = option("AdamW", 1e-8)
    grad_clip: float = option("largest global gradient norm; 0 does not clip", 1.0)
    z_loss: float = option("weight of the squared log-sum-exp of the logits in what is minimised", 0.0)
    val_dataset: str | None = option("folder of token shards that training never sees")
    val_fraction: float = option("share of a corpus's documents that is held out", 0.05)
    val_batches: int | None = option(
        "evaluate on this many batches only; with --dataset alone, hold out that many (default there: 16)"
    )
    widen: str | None = option(
        "bounds of plausibility of the data to widen by a number, such as max_top_share=0.6,min_distinct=12"
    )
    lora_rank: int | None = option(
        "train adapters of this rank instead of the weights (LoRA), with --init; see docs/fine-tuning.md"
    )
    lora_alpha: float | None = option("adapters count with alpha / rank (default: twice the rank)")
    lora_targets: str | None = option(
        "matrices that get adapters, of q,k,v,o,gate,up,down or PEFT's names (default: all of them)"
    )
    lora_init: str | None = option(
        "folder of an adapter (PEFT's format) of the --init checkpoint to go on with; its rank, alpha and targets hold"
    )
    spot_check: int = option(
        "before the first step, and then every so many steps, compare every op with the float64 reference on a piece of "
        "the batch and stop when one disagrees; 0: before the first step only; -1: never",
        0,
    )
    bounds: str | None = option(
        "bounds of gates to change, such as val_below_train=0.2,speed=2; the verdict shows that they were changed"
    )
    patience: int = option("evaluations without improvement before an early stop", 5)
    min_epochs: int = option("evaluations before an early stop or a reached target may end the run", 3)
    target_val_loss: float | None = option("end when the validation loss (nats/token) reaches this")
    initializer_range: float = option("standard deviation of random initial matrices", 0.02)
    seed: int = option("of initial weights and data order", 42)
    shuffle: bool = option("windows in random order", True)
    mask_documents: bool = option(
        "attention stops where a document ends; without it, tokens see other documents of their window", False
    )
    on_exhausted: str = option("at the end of the data", "cycle", choices=("cycle", "stop"))
    resume: bool = option("go on with the run in --run-dir from its last saved state", False)
    save_every: int = option("steps between saved states; 0: at every evaluation", 0)
    keep_states: int = option("how many saved states to keep", 2)
    sample: str | None = option("prompt to continue when the run is done")
    log: str | None = option(
        "where metrics go beside metrics.jsonl: tensorboard, wandb, or both with a comma"
    )
    config: str | None = option("JSON file with the same names; flags win")
    json: bool = option("print one JSON document and nothing else", False)


# The job of `make pretrain`: everything else keeps its default.
DEMO: dict[str, Any] = dict(
    corpus="stdlib",
    model="llama-demo",
    seq_length=128,
    batch_size=4,
    num_steps=3500,
    steps_per_epoch=350,
    val_batches=64,
    lr=2e-3,
    lr_min=0.0,
    warmup_steps=175,
    schedule="linear",
    beta2=0.99,
    initializer_range=0.05,
    sample="class Reader:\n    def __init__(self",
)

# What may differ between a run and its continuation.
MAY_CHANGE = {
    "device",
    "run_dir",
    "resume",
    "save_every",
    "keep_states",
    "json",
    "config",
    "threads",
    "graph",
    "spot_check",
    "bounds",
    "log",
}


def from_command_line(args: Sequence[str]) -> tuple[Settings, dict[str, Any]]:
    """Settings and, apart, those that were given explicitly (by flag or configuration file)."""
    explicit = given(Settings, args, "apr pretrain", __doc__ or "")
    if "config" in explicit:
        explicit = {**read_config(Path(explicit["config"])), **explicit}
    if not explicit.keys() & {"corpus", "dataset", "instruct", "model", "init"} and not explicit.get(
        "resume"
    ):
        explicit = {**DEMO, **explicit}
    return Settings(**explicit), explicit


def read_config(path: Path) -> dict[str, Any]:
    """Settings in a JSON file, names with - or _. Raises for unknown keys and wrong types."""
    if not path.is_file():
        raise InputNotFound(f"--config {path}: no such file")
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise MalformedFile(f"{path}: expected a JSON object of settings")
    return check({k.replace("-", "_"): v for k, v in raw.items()}, str(path))


def check(values: dict[str, Any], source: str) -> dict[str, Any]:
    """The same values with whole numbers made float where that is the type; unknown keys raise."""
    plain, out = field_types(Settings), {}
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    allowed = {name: f.metadata["choices"] for name, f in fields.items()}
    for key, value in values.items():
        if key not in plain:
            raise UsageError(
                f"{source}: unknown setting {key!r} = {value!r}; `apr pretrain --help` lists them"
            )
        if plain[key] is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 1e300 else math.inf  # not finite is refused by `resolve`
        if value is not None and (
            not isinstance(value, plain[key]) or (plain[key] is int and isinstance(value, bool))
        ):
            raise UsageError(f"{source}: {key} = {value!r} is not of type {plain[key].__name__}")
        if value is not None and allowed[key] and value not in allowed[key]:
            raise UsageError(f"{source}: {key} = {value!r}; choose one of {', '.join(allowed[key])}")
        if value is None and fields[key].default is not None:
            raise UsageError(
                f"{source}: {key} = null; leave the key out for its default, {fields[key].default!r}"
            )
        out[key] = value
    return out


def resolve(s: Settings) -> Settings:
    """Fill in what depends on other settings and refuse what cannot be. Raises UsageError."""
    _one_of(s, ("corpus", "dataset", "instruct"), "what to train on")
    _one_of(s, ("model", "init"), "which model")
    mode = s.mode or ("finetune" if s.init else "from-scratch")
    if mode == "from-scratch" and s.init:
        raise UsageError("--mode from-scratch starts from random weights; drop --init or use --mode finetune")
    if mode == "finetune" and not s.init:
        raise UsageError("--mode finetune needs --init: a checkpoint to start from")
    if s.dataset and not s.tokenizer and not tokenizer_beside(Path(s.dataset)).is_dir():
        raise UsageError("--dataset needs --tokenizer: the folder of the tokenizer that made the shards")
    for name in (
        "initializer_range",
        "num_steps",
        "batch_size",
        "seq_length",
        "steps_per_epoch",
        "keep_states",
        "lr",
        "eps",
        "micro_batch_size",
    ):
        value = getattr(s, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} = {value}: must be above 0")
    for name in (
        "warmup_steps",
        "lr_min",
        "weight_decay",
        "grad_clip",
        "z_loss",
        "patience",
        "min_epochs",
        "save_every",
        "seed",
    ):
        value = getattr(s, name)
        if value is not None and not value >= 0:
            raise UsageError(f"--{name.replace('_', '-')} = {value}: must be at least 0")
    for name, low, high in (("beta1", 0, 1), ("beta2", 0, 1), ("val_fraction", 0, 1)):
        if not low <= getattr(s, name) < high:
            raise UsageError(
                f"--{name.replace('_', '-')} = {getattr(s, name)}: must be at least 0 and below 1"
            )
    _check_instruct(s)
    _check_lora(s)
    if (s.corpus or s.instruct) and not s.val_fraction:
        raise UsageError("--val-fraction 0 leaves nothing to validate with; give a share above 0")
    parse_bounds(s.bounds)
    if s.spot_check < -1:
        raise UsageError(f"--spot-check = {s.spot_check}: must be a number of steps, 0 (once) or -1 (never)")
    if s.val_batches is not None and s.val_batches < 1:
        raise UsageError(f"--val-batches = {s.val_batches}: must be at least 1")
    for f in dataclasses.fields(s):
        value = getattr(s, f.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{f.name.replace('_', '-')} = {value}: must be a finite number")
    base: dict[str, Any] = MODES[mode]
    adapters = s.lora_rank is not None or s.lora_init is not None
    lr = (LORA_LR if adapters else base["lr"]) if s.lr is None else s.lr
    return dataclasses.replace(
        s,
        mode=mode,
        lr=lr,
        lr_min=0.01 * lr if s.lr_min is None else s.lr_min,
        warmup_steps=min(base["warmup_steps"], s.num_steps // 10)
        if s.warmup_steps is None
        else s.warmup_steps,
    )


def _one_of(s: Settings, names: tuple[str, ...], what: str) -> None:
    found = [f"--{name}" for name in names if getattr(s, name) is not None]
    if len(found) != 1:
        both = f"; {' and '.join(found)} were given" if found else ""
        raise UsageError(f"say {what}: give {' or '.join('--' + n for n in names)}, one of them{both}")


def _check_lora(s: Settings) -> None:
    """Adapters and what goes with them. Raises UsageError."""
    if s.lora_init and (s.lora_rank, s.lora_alpha, s.lora_targets) != (None, None, None):
        raise UsageError(
            "--lora-init goes on with an adapter as it is; leave --lora-rank, --lora-alpha and --lora-targets out"
        )
    if (lora_config(s.lora_rank, s.lora_alpha, s.lora_targets) or s.lora_init) and not s.init:
        raise UsageError("adapters belong to a checkpoint: give it with --init")


def _check_instruct(s: Settings) -> None:
    """--instruct and what goes with it. Raises UsageError."""
    if s.chat_template and not s.instruct:
        raise UsageError("--chat-template is about --instruct; give both or none")
    if s.instruct and not s.init:
        raise UsageError("--instruct fine-tunes a checkpoint: give it with --init")
    if s.instruct and s.val_dataset:
        raise UsageError(
            "--val-dataset is about --dataset; with --instruct, --val-fraction says how much is held out"
        )
