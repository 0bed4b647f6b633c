"""Compute losses of single tokens, for every evaluation by loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from .. import backends
from ..backends.select import select
from ..checkpoints.checkpoint import Checkpoint, no_tokenizer
from ..checkpoints.registry import open_any
from ..common.errors import Aborted, MalformedFile, Refused, UsageError
from ..common.rounding import round_up
from ..common.units import plural
from ..model.config import ModelConfig
from ..model.cost import check_fits, check_positions, memory
from ..model.transformer import IGNORED, Model
from ..tokenizer.tokenizer import Tokenizer

MAX_BATCH_TOKENS = 1 << 14  # of a batch size that is chosen by memory
LENGTH_MULTIPLE_TOKENS = 16  # lengths are rounded up, so that there are few shapes
GROUP_BATCHES = 8  # whose rows are sorted by length together


class Window(NamedTuple):
    """One row to score: the model reads ids[:-1] and predicts ids[1:], of which the first `skip` are context only.

    ids: integers (t + 1,), t >= 1."""

    ids: np.ndarray
    skip: int = 0


class Scored(NamedTuple):
    """Losses of a window's scored tokens.

    losses  (t - skip,) float64  nats
    greedy  True when every scored token is the model's most likely one (the lowest id among equals); None: not asked
    """

    losses: np.ndarray
    greedy: bool | None


@dataclass(frozen=True)
class Opened:
    """A checkpoint with its weights on a backend."""

    loaded: Checkpoint
    backend: ModuleType
    dtype: str
    tokenizer: Tokenizer | None
    held: Any = None  # weights that are on the backend already, such as those of a model in training

    @property
    def cfg(self) -> ModelConfig:
        """Configuration of the model."""
        return self.loaded.cfg

    @cached_property
    def weights(self) -> Any:
        """Parameters on the backend, a flat buffer (Layout order), or their adapters; loaded when first asked for."""
        return self.held if self.held is not None else self.loaded.on(self.backend, self.dtype)

    def need_tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises Refused: none."""
        if self.tokenizer is None:
            raise no_tokenizer(self.loaded.source, ", or give --tokenizer")
        return self.tokenizer


def open_model(
    source: str,
    device: str = "auto",
    dtype: str | None = None,
    threads: int | None = None,
    backend: str | None = None,
    tokenizer: str | None = None,
) -> Opened:
    """Open a checkpoint for evaluation, on `backend` if named, else on the backend of `device`.

    tokenizer: file or folder of one, for a checkpoint that holds none. Raises AprError for what does not fit together."""
    if backend and device not in ("auto", backend) and not device.startswith(f"{backend}:"):
        raise UsageError(f"--backend {backend} and --device {device} are not the same; give one of them")
    if backend == "reference":
        module = backends.get("reference")
    else:
        module = select(device if device != "auto" else backend or "auto", dtype, threads)
    kind = dtype or module.dtypes[0]
    if kind not in module.dtypes:
        raise Refused(f"--dtype {kind}: the {module.name} backend computes in {', '.join(module.dtypes)}")
    loaded = open_any(source)
    own = loaded.tokenizer
    if tokenizer is not None:
        given = Tokenizer.from_file(tokenizer)
        if own is not None and not own.is_recorded_as(given.sha256):
            raise Refused(
                f"--tokenizer {tokenizer}: sha256 {given.sha256[:12]}, the model holds another one, {own.sha256[:12]}; "
                "leave --tokenizer out"
            )
        if given.vocab_size > loaded.cfg.vocab_size:
            raise Refused(
                f"--tokenizer {tokenizer}: {plural(given.vocab_size, 'id')}, {source} has {loaded.cfg.vocab_size}"
            )
        own = own or given
    return Opened(loaded, module, kind, own)


class Scorer:
    """Scores windows of up to seq tokens, `batch` of them at once (None: as many as fit into memory).

    document_end: the id at which attention ends, None for no document mask. Raises Refused: too long, or no memory."""

    def __init__(
        self, opened: Opened, seq: int, batch: int | None = None, document_end: int | None = None
    ) -> None:
        cfg, be, dtype = opened.cfg, opened.backend, opened.dtype
        if seq < 1 or (batch is not None and batch < 1):
            raise UsageError(f"--seq-length {seq}, --batch-size {batch}: must be at least 1")
        check_positions(cfg, seq)
        need = partial(memory, cfg, be, seq=seq, dtype=dtype, train=False, documents=document_end is not None)
        if batch is None:
            have = be.free_memory()
            batch = max(1, MAX_BATCH_TOKENS // seq)
            while batch > 1 and have is not None and need(batch=batch).total > 0.8 * have:
                batch //= 2
        check_fits(need(batch=batch), be, "use a smaller --batch-size or --seq-length")
        self.batch, self.seq = batch, seq
        self.model = Model(
            cfg, be, batch, seq, dtype, train=False, w=opened.weights, document_end=document_end
        )
        self._source = opened.loaded.source

    def score(self, windows: Iterable[Window], greedy: bool = False) -> Iterator[Scored]:
        """Score every window, in order; windows of like length are computed together.

        Raises MalformedFile: an id outside the model's vocabulary; Aborted: a loss that is not finite."""
        rest = iter(windows)
        while group := list(islice(rest, GROUP_BATCHES * self.batch)):
            order = sorted(range(len(group)), key=lambda i: -len(group[i].ids))
            found: list[Scored | None] = [None] * len(group)
            for start in range(0, len(group), self.batch):
                rows = order[start : start + self.batch]
                for i, scored in zip(rows, self._batch([group[i] for i in rows], greedy), strict=True):
                    found[i] = scored
            yield from (s for s in found if s is not None)

    def _batch(self, windows: list[Window], greedy: bool) -> list[Scored]:
        longest = max(len(w.ids) for w in windows) - 1
        t = min(self.seq, round_up(longest, LENGTH_MULTIPLE_TOKENS))
        ids = np.zeros((len(windows), t), np.int32)
        targets = np.full((len(windows), t), IGNORED, np.int32)
        for row, w in enumerate(windows):
            n = len(w.ids) - 1
            if not 0 <= w.skip < n <= self.seq:
                raise ValueError(
                    f"window of {plural(n, 'token')}, {w.skip} of them context, in a scorer of {self.seq}"
                )
            _check_ids(w.ids, self.model.cfg.vocab_size, self._source)
            ids[row, :n] = w.ids[:-1]
            targets[row, w.skip : n] = w.ids[w.skip + 1 :]
        losses, right = self._losses(ids, targets, greedy)
        out = []
        for row, w in enumerate(windows):
            scored = slice(w.skip, len(w.ids) - 1)
            mine = losses[row, scored]
            if not np.isfinite(mine).all():
                raise Aborted(
                    f"{self._source}: a loss is {mine[~np.isfinite(mine)][0]}: its weights are damaged, or do not suit "
                    f"{self.model.dtype}"
                )
            out.append(Scored(mine, bool(right[row, scored].all()) if right is not None else None))
        return out

    def _losses(
        self, ids: np.ndarray, targets: np.ndarray, greedy: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Compute losses (B,T) float64, 0 for an ignored target, and for `greedy` targets == argmax(logits) (B,T)."""
        model, flat = self.model, targets.reshape(-1)
        losses = np.zeros(flat.size)
        right = np.ones(flat.size, bool) if greedy else None

        def tap(layer: int | None, name: str, x: Any) -> None:
            kind, _, first = name.partition(".")
            rows = slice(int(first or 0), int(first or 0) + len(x))
            if kind == "loss_rows":
                losses[rows] = model.be.to_host(x)
            elif kind == "logits" and right is not None:
                for a, b in _runs(flat[rows] >= 0):  # only what is scored comes to the host
                    best = model.be.to_host(x[a:b]).argmax(-1)
                    right[rows][a:b] = best == flat[rows][a:b]

        model.forward(ids)
        model.loss(targets, tap=tap)
        return losses.reshape(ids.shape), None if right is None else right.reshape(ids.shape)


def fitting(windows: Iterable[Window], most: int) -> int:
    """Choose the seq of a scorer for these windows: most questions are far shorter than the `most` that a model may read."""
    longest = max((len(w.ids) - 1 for w in windows), default=1)
    return min(most, max(4 * LENGTH_MULTIPLE_TOKENS, 1 << (longest - 1).bit_length()))


def _runs(wanted: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each run of True in (n,)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], wanted, [False]]).astype(np.int8)))
    for a, b in edges.reshape(-1, 2):
        yield int(a), int(b)


def _check_ids(ids: np.ndarray, vocab_size: int, source: str) -> None:
    if int(ids.max()) >= vocab_size:
        raise MalformedFile(
            f"token id {int(ids.max())} is outside the vocabulary of {source}, which has {plural(vocab_size, 'id')}"
        )


def prefix_ids(tokenizer: Tokenizer, how: str) -> list[int]:
    """List the ids before each text. how: auto (the tokenizer's own), eos (the end-of-text id), none."""
    if how == "none":
        return []
    if how == "auto":
        return list(tokenizer.prefix_ids)
    if tokenizer.eos_id is None:
        raise Refused(f"--bos eos: {tokenizer.source} has no end-of-text id")
    return [tokenizer.eos_id]
