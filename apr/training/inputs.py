"""Open and check everything that a run reads, before anything large is allocated."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from ..backends.select import choose
from ..checkpoints.checkpoint import HF_FILES, TEMPLATE, Checkpoint, parameters, template_in
from ..checkpoints.peft import LoadedAdapter, read_adapter
from ..checkpoints.registry import open_any
from ..checkpoints.side_files import with_one_template, with_turn_ends
from ..checkpoints.tensors import EMBED, HEAD
from ..common.errors import Refused
from ..common.host import available_memory
from ..common.progress import Progress
from ..common.units import in_bytes, plural
from ..data.batches import BATCHES_AHEAD
from ..data.mix_text import kinds_of
from ..data.open import OpenedData, open_data
from ..data.settings import has_conversations
from ..model.config import ModelConfig
from ..model.cost import check_positions, choose_micro_batch, computes_act_again, needs
from ..model.lora import AdapterLayout, LoraConfig, lora_to_json
from ..model.lora_settings import check_dora, check_rank
from ..model.optim import optimizer_class
from ..model.params import Layout
from ..model.presets import config_notes, load_config
from ..model.settings import adapters_of
from ..ranks.communicator import ALONE, Communicator
from ..tokenizer.tokenizer import Tokenizer
from ..tokenizer.training import LEAST_VOCABULARY
from .buckets import layout_of
from .demo import choose_dtype
from .rank_memory import on_ranks
from .settings import Settings, with_steps

# Rows of a table that say what is usual, and the share of it below which a row was never learnt.
SAMPLED_ROWS, SMALL = 4096, 0.01


@dataclass(frozen=True, kw_only=True)
class Inputs(OpenedData):
    """Everything that a run computes on and with.

    settings     with dtype and micro_batch_size filled in
    device_note  on the choice of the device, for the user, or ""
    dtype_note   on the choice of the dtype, which the demo makes by the processor, or ""
    lora         adapters to train, None where the weights are trained
    lora_init    adapter to go on with
    carried      metadata of --init for the checkpoints of the run
    act_again    `act` is computed again in backward: it costs little here, or the job does not fit otherwise
    """

    settings: Settings
    backend: ModuleType
    cfg: ModelConfig
    init: Checkpoint | None
    device_note: str
    dtype_note: str = ""
    lora: LoraConfig | None = None
    lora_init: LoadedAdapter | None = None
    carried: dict[str, Any] = field(default_factory=dict)
    act_again: bool = False

    @property
    def micro(self) -> int:
        """Return the sequences of a micro-batch."""
        assert self.settings.micro_batch_size is not None
        return self.settings.micro_batch_size

    @property
    def config_notes(self) -> list[str]:
        """Notes on what the model's config.json leaves to defaults and what of it is not heeded."""
        return self.init.notes if self.init else config_notes(str(self.settings.model))

    @property
    def chat_template(self) -> str | None:
        """Text of the template that writes the conversations of the run; None without one."""
        return template_in(self.carried.get(HF_FILES, {})) if has_conversations(self.settings) else None

    @property
    def blank_rows(self) -> list[str] | None:
        """Name the special tokens of conversations that --init never learnt, by their rows of embedding and head.

        None where there are no conversations."""
        found = self._blank
        return None if found is None else [text for texts in found.values() for text in texts]

    @property
    def leaves_blank(self) -> bool:
        """Tell if adapters leave a table with such rows as it is."""
        layout = AdapterLayout(self.cfg, self.lora) if self.lora else None
        return layout is not None and any(
            t and not layout.trains(name) for name, t in (self._blank or {}).items()
        )

    @cached_property
    def _blank(self) -> dict[str, list[str]] | None:
        if not has_conversations(self.settings) or self.init is None:
            return None
        ids = np.unique(np.concatenate([np.unique(a) for a in self.train.shards.arrays]))
        # Nothing is computed from what stands between examples.
        names = {
            t: text for t, text in self.tokenizer.special_tokens().items() if t != self.train.shards.border_id
        }
        # A tied matrix may be stored under the head's name.
        tables = {"embed": EMBED if EMBED in self.init.tensors else HEAD}
        tables |= {} if self.cfg.tie_word_embeddings else {"head": HEAD}
        used = [int(t) for t in ids if int(t) in names]
        return {
            name: [
                f"{names[t]} ({t}, norm {norm:.3g}{', in the head' if name == 'head' else ''})"
                for t, norm in never_learnt(self.init.tensors[hf], used).items()
            ]
            for name, hf in tables.items()
        }

    @property
    def blank_rows_note(self) -> str:
        """Say which special tokens --init never learnt; "" where there are none."""
        if not (blank := self.blank_rows):
            return ""
        return (
            f"rows that are 0, alike, or at the mean, of special tokens in the conversations: {', '.join(blank)}; the checkpoint "
            "never learnt these tokens"
            + (", and adapters leave them as they are: give --train-embeddings" if self.leaves_blank else "")
        )

    def describe(self) -> dict[str, Any]:
        """Identify data, checkpoint and adapters, for the run's config.json."""
        facts = super().describe() | {"init_sha256": self.init.sha256 if self.init else None}
        facts |= {"lora": lora_to_json(self.lora)} if self.lora else {}
        return facts | ({"lora_init_sha256": self.lora_init.sha256} if self.lora_init else {})


def never_learnt(table: np.ndarray, ids: Sequence[int]) -> dict[int, float]:
    """Find rows that nothing was learnt for, of these ids: 0, bit-equal to another of them, of next to no norm, or at the mean
    of all rows, where tokens begin that are added to a model. {id: norm}"""
    rows = {t: np.asarray(table[t], np.float32) for t in ids}
    count = Counter(row.tobytes() for row in rows.values())
    usual = np.asarray(table[:: max(1, len(table) // SAMPLED_ROWS)], np.float32)
    mean = usual.mean(0)
    norm, distance = (float(np.median(np.linalg.norm(x, axis=1))) for x in (usual, usual - mean))
    return {
        t: float(np.linalg.norm(row))
        for t, row in rows.items()
        if not row.any()
        or count[row.tobytes()] > 1
        or np.linalg.norm(row) < SMALL * norm
        or np.linalg.norm(row - mean) < SMALL * distance
    }


def open_inputs(
    s: Settings,
    progress: Progress | None = None,
    tokenizer: Tokenizer | None = None,
    cfg: ModelConfig | None = None,
    ranks: Communicator = ALONE,
) -> Inputs:
    """Open device, data, tokenizer and model description; tokenizer and cfg take the place of those that the settings name.
    ranks: for which a micro-batch size is chosen.

    Raises AprError where they do not fit together."""
    chosen = choose(ranks.device(s.device), s.dtype, s.threads)
    backend = chosen.backend
    init = open_any(s.init) if s.init else None
    cfg = init.cfg if init else cfg or load_config(str(s.model))
    _check_vocabulary(s, cfg)
    _check_step(s)
    check_positions(cfg, s.seq_length)
    data = open_data(s, cfg.vocab_size, init, progress, tokenizer)
    base = parameters(Layout(cfg), init) if s.lora_init and init else None
    adapter = read_adapter(s.lora_init, cfg, base) if s.lora_init else None
    lora = adapter.lora_config(cfg, s.lora_base, s.lora_dropout) if adapter else adapters_of(s, s.lora_base)
    if s.lora_rank is not None and lora is not None:
        check_rank(cfg, lora)
    elif lora is not None:
        check_dora(lora)
    dtype, dtype_note = choose_dtype(s, backend, ranks.count)
    s = with_steps(dataclasses.replace(s, dtype=dtype), len(data.train))
    backend.empty(0, s.dtype)  # makes ready what a dtype needs, of which the record of the run tells
    need = needs(s, cfg, backend, s.batch_size, s.seq_length, lora, optimizer_class(s), ranks.count == 1)
    if ranks.even:
        need = on_ranks(need, layout_of(cfg, lora), str(s.dtype), optimizer_class(s), ranks.count)
    micro = choose_micro_batch(need, s, backend, s.batch_size, ranks.count, 1 if ranks.even else ranks.local)
    return Inputs(
        **vars(data),
        settings=dataclasses.replace(s, micro_batch_size=micro),
        backend=backend,
        cfg=cfg,
        init=init,
        device_note=chosen.note if chosen.avoidable else "",
        dtype_note=dtype_note,
        lora=lora,
        lora_init=adapter,
        carried=_carried(s, init, data.tokenizer),
        act_again=computes_act_again(need, backend, micro),
    )


def _check_vocabulary(s: Settings, cfg: ModelConfig) -> None:
    """Raise Refused where a tokenizer would have to be trained that is smaller than any can be."""
    if (
        (s.corpus or "corpus" in kinds_of(s.mix))
        and not s.init
        and not s.tokenizer
        and cfg.vocab_size < LEAST_VOCABULARY
    ):
        raise Refused(
            f"--model {s.model}: a vocabulary of {cfg.vocab_size} is too small for text, which needs the 256 bytes and an "
            "end of text. The presets that end in -tiny are for tests of the mathematics: take llama-demo or qwen2-3m, or a "
            f"config.json with vocab_size = {LEAST_VOCABULARY} or more"
        )


def _check_step(s: Settings) -> None:
    """Raise Refused where main memory cannot hold the ids of a step and of those that are read ahead."""
    need = (1 + BATCHES_AHEAD) * 2 * 4 * s.batch_size * s.seq_length  # ids and targets, int32
    free = available_memory()
    if free is not None and need > free:
        raise Refused(
            f"--batch-size {s.batch_size}: {plural(s.batch_size * s.seq_length, 'token')} a step, whose ids, with "
            f"{BATCHES_AHEAD} steps read ahead, take {in_bytes(need)} of main memory, where {in_bytes(free)} are free; lower it"
        )


def _carried(s: Settings, init: Checkpoint | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """Collect what the checkpoints of the run keep of --init: its side files, the chat template in use and, of a run on
    conversations, the id that ends their turns among those that end a text."""
    if init is None:
        return {}
    texts = {} if s.tokenizer else dict(init.texts)
    if has_conversations(s) and (template := init.template(s.chat_template)):
        if s.chat_template or template_in(texts) is None:
            texts = with_one_template({**texts, TEMPLATE: template.text})
        known = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        texts = with_turn_ends(texts, template, tokenizer, known)
    elif not s.tokenizer and init.chat_template is not None and template_in(texts) is None:
        texts[TEMPLATE] = init.chat_template
    bos = init.metadata.get("tokenizer.bos_token_id")
    kept = {"tokenizer.bos_token_id": bos} if bos is not None and not s.tokenizer else {}
    return kept | ({HF_FILES: texts} if texts else {})
