"""Parts of a run that its gates look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from ..ranks.communicator import Communicator
from ..ranks.shard import Shard


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
    ranks         those that train together
    shard         part of the weights that this rank updates; None in one process
    make_whole    makes an optimizer of all weights, for a moment, on rank 0: `optimizer` itself in one process
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
    ranks: Communicator
    shard: Shard | None
    make_whole: Callable[[], Optimizer]

    @property
    def whole(self) -> Optimizer:
        """Optimizer of all weights, without a state: for gates that move weights, and back."""
        return self.make_whole()
