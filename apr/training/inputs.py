"""Everything a run reads, opened and checked before anything large is allocated."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ..config import ModelConfig, load_config
from ..data.batches import Windows
from ..data.corpus import Document, documents, pieces, stdlib_documents
from ..data.prepare import prepare
from ..data.shards import TokenShards
from ..data.tokenizer import Progress, Tokenizer
from ..device import check_fits, choose
from ..errors import Refused
from ..formats.models import LoadedModel, load_model
from ..loading import tokenizer_of
from ..plan import Memory, check_positions, memory
from .settings import Settings

PIECE_BYTES = 1 << 14  # a corpus of one file is cut into about 100 documents, or of this size if it is long
HELD_OUT_BATCHES = 16  # with --dataset alone, as many batches become the validation set


@dataclass(frozen=True)
class Inputs:
    """What a run computes on and with."""

    settings: Settings  # with micro_batch_size filled in
    backend: ModuleType
    cfg: ModelConfig
    tokenizer: Tokenizer
    train: Windows
    val: Windows
    init: LoadedModel | None
    corpus_name: str
    device_note: str  # what a user should know about the choice of the device, or ""


def cache_dir() -> Path:
    """Where tokenised corpora are kept: $APR_CACHE, or apr in the user's cache folder."""
    base = os.environ.get("APR_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "apr"


def open_inputs(s: Settings, progress: Progress | None = None) -> Inputs:
    """Open device, data, tokenizer and model description. Raises AprError for what does not fit together."""
    chosen = choose(s.device, s.dtype, s.threads)
    backend, dtype = chosen.backend, s.dtype or chosen.backend.dtypes[0]
    init = load_model(s.init) if s.init else None
    cfg = init.cfg if init else load_config(str(s.model))
    check_positions(cfg, s.seq_length)
    tokenizer, train, val, name = _open_data(s, cfg, init, progress)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise Refused(
            f"{tokenizer.source}: {tokenizer.vocab_size} token ids do not fit the model's vocab_size = {cfg.vocab_size}"
        )
    s = dataclasses.replace(s, dtype=dtype)
    s = dataclasses.replace(s, micro_batch_size=_micro_batch(s, cfg, backend))
    return Inputs(s, backend, cfg, tokenizer, train, val, init, name, chosen.note if chosen.avoidable else "")


def _open_data(
    s: Settings, cfg: ModelConfig, init: LoadedModel | None, progress: Progress | None
) -> tuple[Tokenizer, Windows, Windows, str]:
    tokenizer = Tokenizer.from_file(s.tokenizer) if s.tokenizer else None
    if s.corpus:
        if tokenizer is None and init is not None:
            tokenizer = tokenizer_of(init)
            if tokenizer is None:
                raise Refused(f"{s.init}: no tokenizer in the checkpoint; give --tokenizer")
        docs: Iterable[Document] = stdlib_documents() if s.corpus == "stdlib" else documents(s.corpus)
        if Path(s.corpus).is_file():  # one document could not be split into training and validation
            docs = (p for d in docs for p in pieces(d, max(256, min(PIECE_BYTES, len(d.data) // 100))))
        made_by = tokenizer.sha256 if tokenizer else f"vocab {cfg.vocab_size}"
        where = "stdlib" if s.corpus == "stdlib" else str(Path(s.corpus).resolve())
        key = hashlib.sha256(f"{where} {made_by} {s.val_fraction}".encode()).hexdigest()[:16]
        ready = prepare(
            docs,
            cache_dir() / "corpora" / key,
            vocab_size=None if tokenizer else cfg.vocab_size,
            tokenizer=tokenizer,
            val_fraction=s.val_fraction,
            progress=progress,
        )
        name = "this Python's standard library" if s.corpus == "stdlib" else s.corpus
        return (
            ready.tokenizer,
            Windows(ready.train, s.seq_length),
            Windows(ready.val, s.seq_length),
            name,
        )
    folder = Path(str(s.dataset))
    tokenizer = tokenizer or Tokenizer.from_file(folder / "tokenizer")
    val_folder = Path(s.val_dataset) if s.val_dataset else None
    if val_folder is None and (folder / "train").is_dir() and (folder / "val").is_dir():
        folder, val_folder = folder / "train", folder / "val"
    train = Windows(TokenShards(folder, tokenizer), s.seq_length)
    if val_folder is not None:
        return tokenizer, train, Windows(TokenShards(val_folder, tokenizer), s.seq_length), str(folder)
    held = (s.val_batches or HELD_OUT_BATCHES) * s.batch_size
    return tokenizer, *train.split(held), str(folder)


def _micro_batch(s: Settings, cfg: ModelConfig, backend: ModuleType) -> int:
    """Sequences computed at once: what was asked for, or the largest divisor of the batch that fits."""
    assert s.dtype is not None
    need = partial(memory, cfg, backend, seq=s.seq_length, dtype=s.dtype, recompute=s.recompute)
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
        "train_windows": len(i.train),
        "val_windows": len(i.val),
        "val_unigram_entropy_nats": i.val.shards.unigram_entropy,
        "init_sha256": i.init.sha256 if i.init else None,
    }
