"""Parts of a run that its gates look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..data.audit import Split
from ..data.batches import Batches
from ..model.adapters import Adapters
from ..model.config import ModelConfig
from ..model.optim import Optimizer
from ..model.transformer import Model


@dataclass(frozen=True)
class Subject:
    """Parts of one run, before its first step.

    settings      all settings of `apr pretrain`, by name
    val           windows to validate with
    splits        training and validation data with their guards
    init          checkpoint of --init
    adapted       adapters go on with --lora-init
    document_end  id at which attention stops; None where it does not
    scratch       (1,) float64 on the device
    evaluated_on  conditions of a validation loss, beside the weights
    run           folder of the run
    """

    settings: Any
    backend: ModuleType
    cfg: ModelConfig
    model: Model
    optimizer: Optimizer
    adapters: Adapters | None
    batches: Batches
    val: Any
    splits: Sequence[Split]
    init: Checkpoint | None
    adapted: bool
    document_end: int | None
    scratch: Any
    evaluated_on: dict[str, Any]
    run: Path
