"""Everything a run reads, opened and checked before anything large is allocated."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ..backends.select import choose
from ..checkpoints.checkpoint import HF_FILES, TEMPLATE, Checkpoint
from ..checkpoints.peft import LoadedAdapter, read_adapter
from ..checkpoints.registry import open_any
from ..common.errors import InputNotFound, Refused
from ..common.files import read_text
from ..common.finding import FAIL, PASS, Finding, as_json
from ..common.progress import Progress
from ..data.audit import Split, audit, enforce_all, sides_of, tokenizer_beside
from ..data.batches import Windows
from ..data.conversations.instruct import (
    InstructWindows,
    audit_instruct,
    is_instruct,
    packed_windows,
    prepare_instruct,
)
from ..data.corpus import Corpus
from ..data.find import find_sources
from ..data.guards import Bounds, enforce, fits_model
from ..data.prepare import prepare
from ..data.source import Source
from ..evidence import measure
from ..evidence.gates import Gates
from ..model.config import ModelConfig
from ..model.cost import Memory, check_fits, check_positions, memory
from ..model.lora import LoraConfig, lora_config, lora_to_json
from ..model.optim import optimizer_class
from ..model.presets import load_config
from ..tokenizer.tokenizer import Tokenizer
from .settings import Settings

PIECE_BYTES = (
    1 << 14
)  # a text file that is the whole corpus is cut into about 100 documents, or of this size if it is long
NOT_STDLIB = (
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
)  # folders beside the library's own source
HELD_OUT_BATCHES = 16  # with --dataset alone, as many batches become the validation set


@dataclass(frozen=True)
class Inputs:
    """What a run computes on and with."""

    settings: Settings  # with micro_batch_size filled in
    backend: ModuleType
    cfg: ModelConfig
    tokenizer: Tokenizer
    train: Windows | InstructWindows
    val: Windows | InstructWindows
    init: Checkpoint | None
    corpus_name: str
    left_out: str  # which documents of a corpus cannot be used, or ""
    document_end: int | None  # the id at which attention stops, None where it does not
    audit: list[Split]  # what the guards said of the training and validation data
    device_note: str  # what a user should know about the choice of the device, or ""
    lora: LoraConfig | None = None  # adapters to train, None where the weights are trained
    lora_init: LoadedAdapter | None = None  # an adapter to go on with
    carried: dict[str, Any] = field(default_factory=dict)  # metadata of --init that its checkpoints have too

    @property
    def instruct(self) -> bool:
        """Whether the data are conversations, of which only the answers are trained on."""
        return isinstance(self.train, InstructWindows)


def cache_dir() -> Path:
    """Where tokenised corpora are kept: $APR_CACHE, or apr in the user's cache folder."""
    base = os.environ.get("APR_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "apr"


def open_inputs(s: Settings, progress: Progress | None = None) -> Inputs:
    """Open device, data, tokenizer and model description. Raises AprError for what does not fit together."""
    chosen = choose(s.device, s.dtype, s.threads)
    backend, dtype = chosen.backend, s.dtype or chosen.backend.dtypes[0]
    init = open_any(s.init) if s.init else None
    cfg = init.cfg if init else load_config(str(s.model))
    check_positions(cfg, s.seq_length)
    tokenizer, sides, name, left_out = _open_data(s, cfg, init, progress)
    train, val = windows_of(s, sides)
    end = _document_end(tokenizer, train, val) if s.mask_documents else _packed_end(train)
    s = dataclasses.replace(s, dtype=dtype)
    adapter, lora = _adapters(s, cfg)
    s = dataclasses.replace(s, micro_batch_size=_micro_batch(s, cfg, backend))
    note = chosen.note if chosen.avoidable else ""
    return Inputs(
        s, backend, cfg, tokenizer, train, val, init, name, left_out, end, sides, note, lora, adapter,
        _carried(s, init),
    )  # fmt: skip


def _adapters(s: Settings, cfg: ModelConfig) -> tuple[LoadedAdapter | None, LoraConfig | None]:
    """The adapter to go on with, and what adapters to train; None and None where the weights are trained."""
    if s.lora_init is None:
        return None, lora_config(s.lora_rank, s.lora_alpha, s.lora_targets)
    adapter = read_adapter(s.lora_init, cfg)
    return adapter, adapter.lora_config(cfg)


def _carried(s: Settings, init: Checkpoint | None) -> dict[str, Any]:
    """What belongs to a checkpoint beside its weights and stays true of them: the small files of its Hugging Face folder, the
    chat template that it was fine-tuned with among them."""
    texts = dict(init.texts) if init and not s.tokenizer else {}
    if s.chat_template:
        texts[TEMPLATE] = read_text(Path(s.chat_template))
    return {HF_FILES: texts} if texts else {}


def _open_data(
    s: Settings, cfg: ModelConfig, init: Checkpoint | None, progress: Progress | None
) -> tuple[Tokenizer, list[Split], str, str]:
    """Tokenizer and shards, every guard asked; name of the corpus, and what of it cannot be used."""
    bounds = Bounds.parse(s.widen)
    tokenizer = Tokenizer.from_file(s.tokenizer) if s.tokenizer else None
    if s.instruct or (s.dataset and is_instruct(sides_of(Path(s.dataset))["train"])):
        return _open_instruct(s, cfg, init, tokenizer, progress)
    if s.corpus:
        if tokenizer is None and init is not None:
            tokenizer = init.tokenizer
            if tokenizer is None:
                raise Refused(f"{s.init}: no tokenizer in the checkpoint; give --tokenizer")
        if tokenizer:
            enforce({tokenizer.source: [fits_model(tokenizer, cfg.vocab_size)]})
        corpus = _corpus(s)
        made_by = tokenizer.sha256 if tokenizer else f"vocab {cfg.vocab_size}"
        where = "stdlib" if s.corpus == "stdlib" else str(Path(s.corpus).resolve())
        key = hashlib.sha256(f"{where} {made_by} {s.val_fraction} {s.content_field}".encode()).hexdigest()[
            :16
        ]
        ready = prepare(
            corpus,
            cache_dir() / "corpora" / key,
            vocab_size=None if tokenizer else cfg.vocab_size,
            tokenizer=tokenizer,
            val_fraction=s.val_fraction,
            bounds=bounds,
            progress=progress,
        )
        tokenizer, folders, left_out = ready.tokenizer, ready.sides, ready.left_out()
        name = "this Python's standard library" if s.corpus == "stdlib" else s.corpus
    else:
        folder = Path(str(s.dataset))
        folders, name, left_out = sides_of(folder), str(folder), ""
        if s.val_dataset:
            given = Path(s.val_dataset)
            folders["val"] = given / "val" if (given / "val").is_dir() else given
        tokenizer = tokenizer or Tokenizer.from_file(tokenizer_beside(folder))
        enforce({tokenizer.source: [fits_model(tokenizer, cfg.vocab_size)]})
    sides = audit(folders, tokenizer, bounds, cfg.vocab_size, progress=progress)
    enforce_all(sides)
    return tokenizer, sides, name, left_out


def _open_instruct(
    s: Settings,
    cfg: ModelConfig,
    init: Checkpoint | None,
    tokenizer: Tokenizer | None,
    progress: Progress | None,
) -> tuple[Tokenizer, list[Split], str, str]:
    """As _open_data, of --instruct, or of a --dataset that such a run has made."""
    if init is None:
        raise Refused(f"{s.dataset}: instruction data fine-tunes a checkpoint: give it with --init")
    tokenizer = tokenizer or init.tokenizer
    if tokenizer is None:
        raise Refused(f"{s.init}: no tokenizer in the checkpoint; give --tokenizer")
    folders, left_out = sides_of(Path(str(s.dataset))) if s.dataset else {}, ""
    if s.instruct:
        enforce({tokenizer.source: [fits_model(tokenizer, cfg.vocab_size)]})
        ready = prepare_instruct(
            s.instruct,
            cache_dir() / "instruct",
            tokenizer,
            init.template(s.chat_template),
            s.seq_length,
            s.val_fraction,
            progress,
        )
        folders, left_out = ready.sides, ready.left_out
    return (
        tokenizer,
        audit_instruct(folders, tokenizer, cfg.vocab_size),
        s.instruct or str(s.dataset),
        left_out,
    )


def _packed_end(train: Windows | InstructWindows) -> int | None:
    """The id at which attention stops because examples share a window."""
    return train.shards.manifest.separator if isinstance(train, InstructWindows) else None


def _document_end(
    tokenizer: Tokenizer, train: Windows | InstructWindows, val: Windows | InstructWindows
) -> int | None:
    """The id at which attention stops. Raises Refused where no id ends a document."""
    if isinstance(train, InstructWindows) or isinstance(val, InstructWindows):
        return _packed_end(train)
    end, source = tokenizer.eos_id, tokenizer.source
    if end is None:
        raise Refused(
            f"--mask-documents: {source} has no end-of-text id, so nothing says where a document ends; give a tokenizer with "
            "one, or leave the flag out"
        )
    for shards in (train.shards, val.shards):
        policy, used = shards.manifest.eos_policy, shards.eos_token_id
        if policy == "none" or used != end:
            found = "eos_policy none" if policy == "none" else f"end-of-text id {used}, {source} has {end}"
            raise Refused(
                f"--mask-documents: {shards.folder} was encoded with {found}, so nothing says where a document ends; encode "
                "the corpus again, or leave the flag out"
            )
    return end


def _corpus(s: Settings) -> Corpus:
    if s.corpus == "stdlib":
        return Corpus(_stdlib())
    found = find_sources([str(s.corpus)])
    pieces = None
    if len(found) == 1 and found[0].kind == "text":  # one document could not be split into two sides
        pieces = max(256, min(PIECE_BYTES, found[0].size // 100))
    return Corpus(found, s.content_field, pieces)


def _stdlib() -> list[Source]:
    """The .py files of the running Python's standard library, about 10 MB, without tests and other people's packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [s for s in find_sources([root], NOT_STDLIB) if s.path.suffix == ".py"] if root.is_dir() else []
    if not found:
        raise InputNotFound(
            f"{root}: this Python has no standard library in source form; give --corpus a folder of text"
        )
    return found


def windows_of(
    s: Settings, sides: list[Split]
) -> tuple[Windows | InstructWindows, Windows | InstructWindows]:
    """Windows to train on and to validate with; without validation shards the last ones of the training data."""
    packed = packed_windows(sides, s.seq_length)
    if packed:
        return packed["train"], packed["val"]
    found = {side.name: Windows(side.shards, s.seq_length) for side in sides if side.shards}
    if "val" in found:
        return found["train"], found["val"]
    return found["train"].split((s.val_batches or HELD_OUT_BATCHES) * s.batch_size)


def _micro_batch(s: Settings, cfg: ModelConfig, backend: ModuleType) -> int:
    """Sequences computed at once: what was asked for, or the largest divisor of the batch that fits."""
    assert s.dtype is not None
    need = partial(
        memory,
        cfg,
        backend,
        seq=s.seq_length,
        dtype=s.dtype,
        recompute=s.recompute,
        lora=_adapters(s, cfg)[1],
        optimizer=optimizer_class(s),
    )
    have = backend.free_memory()
    divisors = [d for d in range(s.batch_size, 0, -1) if s.batch_size % d == 0]
    if s.micro_batch_size:
        size = min(s.micro_batch_size, s.batch_size)
    else:
        fits = (d for d in divisors if have is None or need(batch=d).total < 0.8 * have)
        size = next(fits, 1)
    if have is not None and need(batch=size).total > have:
        check_fits(need(batch=size), backend, _advice(need, divisors, have, s.recompute))
    return size


def _advice(need: Callable[..., Memory], sizes: list[int], have: int, recompute: bool) -> str:
    """The options with which a job fits: the largest micro-batch of `sizes`, without recomputation if that goes."""
    for again in [False, True][recompute:]:
        size = next((d for d in sizes if need(batch=d, recompute=again).total <= have), 0)
        if size:
            return f"{'--recompute ' if again else ''}--micro-batch-size {size} would fit"
    return "use a smaller --seq-length or --model"


def describe(i: Inputs) -> dict[str, Any]:
    """Identity of the data, for the run's config.json."""
    return {
        "corpus": i.corpus_name,
        "train_sha256": i.train.shards.sha256,
        "val_sha256": i.val.shards.sha256,
        "tokenizer_sha256": i.tokenizer.sha256,
        "train_tokens": i.train.shards.total_tokens,
        "val_tokens": i.val.shards.total_tokens,
        "val_bytes": i.val.shards.total_bytes,
        "train_windows": len(i.train),
        "val_windows": len(i.val),
        "val_unigram_entropy_nats": i.val.shards.unigram_entropy,
        "init_sha256": i.init.sha256 if i.init else None,
        **({"lora": lora_to_json(i.lora)} if i.lora else {}),
        **({"lora_init_sha256": i.lora_init.sha256} if i.lora_init else {}),
        **({"packed": _packed(i.train.shards), "packed_val": _packed(i.val.shards)} if i.instruct else {}),
    }


def _packed(shards: Any) -> dict[str, Any]:
    """What became of the examples of one side."""
    m = shards.manifest
    keys = (
        "examples",
        "tokens",
        "trained",
        "rows",
        "separator",
        "duplicates",
        "cut",
        "skipped",
        "template_sha256",
    )
    return {key: getattr(m, key) for key in keys}


def guards(i: Inputs) -> dict[str, list[dict[str, Any]]]:
    """Findings of the guards of each split, for the run's config.json."""
    keys = {"guard": "name", "verdict": "verdict", "figure": "measured", "bound": "bound", "note": "why"}
    return {split.name: as_json(split.findings, **keys) for split in i.audit}


def judge_inputs(i: Inputs, gates: Gates) -> None:
    """The gates that are asked before anything large is allocated. Raises Refused."""
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
