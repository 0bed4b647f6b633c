"""Settings of a run that the model room reads: architecture, precision, adapters. Those of the optimizer are in optim.py."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.errors import UsageError
from ..common.options import dtype_option, exactly_one, option
from .lora import BASES, LoraConfig
from .lora_settings import lora_config
from .presets import PRESETS


@dataclass(frozen=True)
class ModelSettings:
    """Model: architecture or checkpoint, precision, memory, adapters."""

    model: str | None = option(
        "preset name or config.json of the model to train from random weights",
        path=True,
        names=tuple(PRESETS),
    )
    init: str | None = option(
        "checkpoint to start from: an .apr or GGUF file or a Hugging Face folder",
        metavar="CHECKPOINT",
        path=True,
    )
    dtype: str | None = dtype_option(
        "; the demo on a cpu takes what ends sooner there; sums, moments and the copy of the weights that AdamW updates "
        "are float32 always"
    )
    micro_batch_size: int | None = option(
        "sequences computed at once (default: as many as fit in memory)", above=0, metavar="SEQUENCES"
    )
    recompute: bool = option("keep only the input of each block, compute the rest again in backward", False)
    graph: bool = option(
        "on cuda, record a micro-step once and replay it; --no-graph: op by op", True, may_change=True
    )
    initializer_range: float = option(
        "standard deviation of random initial matrices", 0.02, above=0, metavar="STD"
    )
    z_loss: float = option(
        "weight in the training loss of the squared log-sum-exp of the logits",
        0.0,
        at_least=0,
        metavar="WEIGHT",
    )
    lora_rank: int | None = option(
        "train adapters of this rank instead of the weights (LoRA), with --init; see docs/fine-tuning.md",
        at_least=1,
    )
    lora_alpha: float | None = option(
        "scale of the adapters is alpha / rank (default: twice the rank)", above=0
    )
    lora_targets: str | None = option(
        "matrices that get adapters, of q,k,v,o,gate,up,down or PEFT's names (default: all of them), and embed,head",
        metavar="MATRICES",
    )
    lora_modules_to_save: str | None = option(
        "modules to train whole beside the adapters, by the ends of their names: embed_tokens, lm_head, norm and so on (PEFT's "
        "modules_to_save)",
        metavar="MODULES",
    )
    train_embeddings: bool = option(
        "with adapters, train embedding and head whole, every row: for tokens of a template that --init never saw",
        False,
    )
    lora_rslora: bool = option(
        "scale of the adapters is alpha / sqrt(rank), so that a higher rank is not held back (Kalajdzievski 2023)",
        False,
    )
    lora_dora: bool = option(
        "train norms of the rows of adapted matrices too, and adapters for their directions (DoRA, Liu et al. 2024)",
        False,
    )
    lora_dropout: float | None = option(
        "share of what adapters get that is dropped in each step of training, anew for each matrix; evaluations drop nothing "
        "(default: 0, or that of the --lora-init adapter)",
        at_least=0,
        below=1,
        metavar="SHARE",
    )
    lora_rank_pattern: str | None = option(
        "ranks of matrices whose names end with a pattern, such as q_proj=4,layers.0.mlp.*=16 (PEFT's rank_pattern)",
        metavar="PATTERN=RANK",
    )
    lora_alpha_pattern: str | None = option(
        "alphas of matrices whose names end with a pattern (PEFT's alpha_pattern)", metavar="PATTERN=ALPHA"
    )
    lora_base: str | None = option(
        "format of the frozen matrices of the blocks: int8, 8-bit integers with a factor for each row (default: --dtype)",
        choices=BASES,
    )
    lora_init: str | None = option(
        "folder of an adapter (PEFT's format) of the --init checkpoint to go on with; its rank, alpha and targets hold",
        metavar="FOLDER",
        path=True,
    )


def check_model(s: ModelSettings) -> None:
    """Raise UsageError for settings of the model that contradict each other."""
    exactly_one(s, ("model", "init"), "which model")
    own = (
        s.lora_rank,
        s.lora_alpha,
        s.lora_targets,
        s.lora_rank_pattern,
        s.lora_alpha_pattern,
        s.lora_modules_to_save,
    )
    if s.lora_init and (
        s.lora_rslora or s.lora_dora or s.train_embeddings or any(x is not None for x in own)
    ):
        raise UsageError(
            "--lora-init goes on with an adapter as it is; leave --lora-rank, --lora-alpha, --lora-targets, --lora-rslora, "
            "--lora-dora, --lora-modules-to-save, --train-embeddings and the patterns out"
        )
    base = None if s.lora_init else s.lora_base
    if (adapters_of(s, base) or s.lora_init) and not s.init:
        raise UsageError("adapters belong to a checkpoint: give it with --init")


def adapters_of(s: ModelSettings, base: str | None) -> LoraConfig | None:
    """Build the LoraConfig that the settings ask for; None without adapters. Raises UsageError."""
    return lora_config(
        s.lora_rank,
        s.lora_alpha,
        s.lora_targets,
        base,
        s.lora_rslora,
        s.lora_rank_pattern,
        s.lora_alpha_pattern,
        s.lora_modules_to_save,
        s.train_embeddings,
        s.lora_dora,
        # That of an adapter to go on with may be another from now on.
        None if s.lora_init else s.lora_dropout,
    )
