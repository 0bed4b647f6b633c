"""Open and check everything that a run reads, before anything large is allocated."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from ..backends.select import choose
from ..checkpoints.checkpoint import HF_FILES, TEMPLATE, Checkpoint
from ..checkpoints.peft import LoadedAdapter, read_adapter
from ..checkpoints.registry import open_any
from ..common.files import read_text
from ..common.finding import FAIL, PASS, Finding
from ..common.progress import Progress
from ..data.open import OpenedData, open_data
from ..evidence import measure
from ..evidence.gates import Gates
from ..model.config import ModelConfig
from ..model.cost import check_positions, choose_micro_batch, memory
from ..model.lora import LoraConfig, lora_config, lora_to_json
from ..model.optim import optimizer_class
from ..model.presets import load_config
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

    def describe(self) -> dict[str, Any]:
        """Identify data, checkpoint and adapters, for the run's config.json."""
        facts = super().describe() | {"init_sha256": self.init.sha256 if self.init else None}
        facts |= {"lora": lora_to_json(self.lora)} if self.lora else {}
        return facts | ({"lora_init_sha256": self.lora_init.sha256} if self.lora_init else {})


def open_inputs(s: Settings, progress: Progress | None = None) -> Inputs:
    """Open device, data, tokenizer and model description. Raises AprError where they do not fit together."""
    chosen = choose(s.device, s.dtype, s.threads)
    backend = chosen.backend
    init = open_any(s.init) if s.init else None
    cfg = init.cfg if init else load_config(str(s.model))
    check_positions(cfg, s.seq_length)
    data = open_data(s, cfg.vocab_size, init, progress)
    adapter = read_adapter(s.lora_init, cfg) if s.lora_init else None
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


def judge_inputs(i: Inputs, gates: Gates) -> None:
    """Judge the gates before anything large is allocated. Raises Refused."""
    s = i.settings
    assert s.dtype is not None
    assert s.micro_batch_size is not None
    gates.judge(measure.device(i.backend, s.dtype))
    need = memory(
        i.cfg, i.backend, s.micro_batch_size, s.seq_length, s.dtype,
        recompute=s.recompute, documents=i.document_end is not None, lora=i.lora,
        optimizer=optimizer_class(s),
    )  # fmt: skip
    gates.judge(measure.memory(need.total, i.backend.free_memory()))
    gates.judge(_guarded(i))
    gates.judge(_disjoint(i))
    gates.judge(measure.architecture(i.cfg, str(s.init or s.model)))


def _guarded(i: Inputs) -> Finding:
    """Sum up the guards of the data; a failed one has ended the run before."""
    of_guards = [(split.name, f) for split in i.audit for f in split.findings]
    failed = [f"{name}: {f}" for name, f in of_guards if f.verdict == FAIL]
    remarks = [f"{name}: {f.name}: {f.why}" for name, f in of_guards if f.why]
    passed = sum(f.verdict == PASS for _, f in of_guards)
    measured = f"{passed} of {len(of_guards)} guards passed"
    return Finding.of("before.data", not failed, measured, "none failed", "; ".join(failed or remarks))


def _disjoint(i: Inputs) -> Finding:
    """Require that validation windows, or documents, are not trained on."""
    gate, bound = "before.disjoint", "none on both sides"
    if i.train.shards is i.val.shards:
        end = i.train.first + i.train.count
        measured = f"windows {i.train.first:,} to {end - 1:,} and {i.val.first:,} to {i.val.first + i.val.count - 1:,}"
        return Finding.of(gate, end <= i.val.first, measured, bound)
    for split in i.audit:
        for f in split.findings:
            if f.name == "documents on both sides":
                return Finding(gate, f.verdict, f"{f.measured} documents", bound, f.why)
    return Finding.skipped(gate, "the documents of the two sides were not compared", bound)
