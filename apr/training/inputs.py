"""Open and check everything that a run reads, before anything large is allocated."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from ..backends.select import choose
from ..checkpoints.checkpoint import HF_FILES, TEMPLATE, Checkpoint, parameters
from ..checkpoints.peft import LoadedAdapter, read_adapter
from ..checkpoints.registry import open_any
from ..common.files import read_text
from ..common.progress import Progress
from ..data.open import OpenedData, open_data
from ..model.config import ModelConfig
from ..model.cost import check_positions, choose_micro_batch
from ..model.lora import LoraConfig, lora_config, lora_to_json
from ..model.optim import optimizer_class
from ..model.params import Layout
from ..model.presets import config_notes, load_config
from ..tokenizer.tokenizer import Tokenizer
from .settings import Settings


@dataclass(frozen=True, kw_only=True)
class Inputs(OpenedData):
    """Everything that a run computes on and with.

    settings     with dtype and micro_batch_size filled in
    device_note  on the choice of the device, for the user, or ""
    lora         adapters to train, None where the weights are trained
    lora_init    adapter to go on with
    carried      metadata of --init for the checkpoints of the run
    """

    settings: Settings
    backend: ModuleType
    cfg: ModelConfig
    init: Checkpoint | None
    device_note: str
    lora: LoraConfig | None = None
    lora_init: LoadedAdapter | None = None
    carried: dict[str, Any] = field(default_factory=dict)

    @property
    def config_notes(self) -> list[str]:
        """Notes on what the model's config.json leaves to defaults and what of it is not heeded."""
        return self.init.notes if self.init else config_notes(str(self.settings.model))

    def describe(self) -> dict[str, Any]:
        """Identify data, checkpoint and adapters, for the run's config.json."""
        facts = super().describe() | {"init_sha256": self.init.sha256 if self.init else None}
        facts |= {"lora": lora_to_json(self.lora)} if self.lora else {}
        return facts | ({"lora_init_sha256": self.lora_init.sha256} if self.lora_init else {})


def open_inputs(s: Settings, progress: Progress | None = None, tokenizer: Tokenizer | None = None) -> Inputs:
    """Open device, data, tokenizer and model description; tokenizer takes the place of the one that the settings name.

    Raises AprError where they do not fit together."""
    chosen = choose(s.device, s.dtype, s.threads)
    backend = chosen.backend
    init = open_any(s.init) if s.init else None
    cfg = init.cfg if init else load_config(str(s.model))
    check_positions(cfg, s.seq_length)
    data = open_data(s, cfg.vocab_size, init, progress, tokenizer)
    base = parameters(Layout(cfg), init) if s.lora_init and init else None
    adapter = read_adapter(s.lora_init, cfg, base) if s.lora_init else None
    lora = adapter.lora_config(cfg) if adapter else lora_config(s.lora_rank, s.lora_alpha, s.lora_targets)
    s = dataclasses.replace(s, dtype=s.dtype or backend.dtypes[0])
    micro = choose_micro_batch(s, cfg, backend, s.batch_size, s.seq_length, lora, optimizer_class(s))
    return Inputs(
        **vars(data),
        settings=dataclasses.replace(s, micro_batch_size=micro),
        backend=backend,
        cfg=cfg,
        init=init,
        device_note=chosen.note if chosen.avoidable else "",
        lora=lora,
        lora_init=adapter,
        carried=_carried(s, init),
    )


def _carried(s: Settings, init: Checkpoint | None) -> dict[str, Any]:
    """Collect the Hugging Face side files of --init for every checkpoint of the run, with the chat template in use."""
    texts = dict(init.texts) if init and not s.tokenizer else {}
    if s.chat_template:
        texts[TEMPLATE] = read_text(Path(s.chat_template))
    return {HF_FILES: texts} if texts else {}
