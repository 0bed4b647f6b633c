"""Read text with a checkpoint and write text with it, and measure both, for `apr qa`."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.registry import open_any
from ..common.errors import AprError
from ..common.finding import Skip
from ..inference.generate import generate
from ..inference.sampling import drawable_ids
from ..model.config import ModelConfig
from ..model.cost import check_fits, memory
from ..model.transformer import IGNORED, Model
from ..tokenizer.tokenizer import Tokenizer

WINDOW_TOKENS = 256  # of a pass; the logits of all of them exist at once
MAX_TEXT_TOKENS = 4096
MIN_TEXT_TOKENS = 48  # of a text whose token frequencies mean something
SAMPLES, SAMPLE_TOKENS, PROMPT_TOKENS, TEMPERATURE = 3, 96, 24, 0.8  # of the texts that are written


@dataclass(frozen=True)
class Passage:
    """A text as token ids (n,), with the tokens that its tokenizer puts in front."""

    name: str
    ids: np.ndarray

    @property
    def entropy(self) -> float:
        """Entropy of the token frequencies of this text (nats/token)."""
        counts = np.array(list(Counter(self.ids.tolist()).values()), np.float64)
        p = counts / counts.sum()
        return float(-(p * np.log(p)).sum())


@dataclass
class Reading:
    """Statistics of a model's logits on a passage.

    loss       mean, nats/token
    is_finite  True when all logits are finite
    choices    number of distinct most likely tokens
    positions  number of positions
    spread     standard deviation of an id's logit over positions, root mean square over ids
    sha256     hash of all logits
    """

    loss: float
    is_finite: bool
    choices: int
    positions: int
    spread: float
    sha256: str


class Specimen:
    """A checkpoint on a backend; every part is computed at its first use. Raises Skip for parts that cannot be had.

    texts  {name: text} to read
    tell   is called with the work that begins
    """

    def __init__(
        self, source: str, backend: ModuleType, dtype: str, texts: dict[str, str], tell: Callable[[str], None]
    ) -> None:
        self.source, self.backend, self.dtype, self.texts, self.tell = source, backend, dtype, texts, tell

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Opened checkpoint. Raises AprError."""
        return open_any(self.source)

    @property
    def loaded(self) -> Checkpoint:
        """Opened checkpoint. Raises Skip."""
        try:
            return self.checkpoint
        except AprError as e:
            raise Skip(f"it does not load: {e}") from None

    @property
    def cfg(self) -> ModelConfig:
        """Configuration of the model."""
        return self.loaded.cfg

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the checkpoint."""
        try:
            tokenizer = self.loaded.tokenizer
        except AprError as e:
            raise Skip(f"its tokenizer cannot be used: {e}") from None
        if tokenizer is None:
            raise Skip("no tokenizer")
        return tokenizer

    @cached_property
    def passages(self) -> list[Passage]:
        """Texts that are long enough, as tokens."""
        most = MAX_TEXT_TOKENS // (1 if len(self.texts) == 1 else 4)
        passages = [
            Passage(n, np.array(self.tokenizer.encode_text(t)[:most], np.int64))
            for n, t in self.texts.items()
        ]
        long = [p for p in passages if len(p.ids) >= MIN_TEXT_TOKENS]
        if not long:
            raise Skip(f"the text has fewer than {MIN_TEXT_TOKENS} tokens; give a longer one with --text")
        return long

    @cached_property
    def weights(self) -> Any:
        """Weights on the backend."""
        self.tell("loading the weights")
        return self.loaded.on(self.backend, self.dtype)

    @cached_property
    def readings(self) -> dict[str, Reading]:
        """{name of a passage: its reading}."""
        return {p.name: self.read(p, self.weights) for p in self.passages}

    def read(self, passage: Passage, weights: Any) -> Reading:
        """Run the model over a passage, in windows."""
        self.tell(f"reading the {passage.name}")
        window = min(WINDOW_TOKENS, self.cfg.max_position_embeddings, len(passage.ids))
        need = memory(
            self.cfg, self.backend, 1, window, self.dtype, train=False, loss_rows=window, optimizer=None
        )
        check_fits(need, self.backend, "check a smaller model")
        model = Model(self.cfg, self.backend, 1, window, self.dtype, train=False, loss_rows=window, w=weights)
        digest, total, count, is_finite = hashlib.sha256(), 0.0, 0, True
        choices: set[int] = set()
        spreads: list[float] = []
        ids = passage.ids
        for at in range(0, len(ids) - window + 1, window):
            part = ids[at : at + window]
            logits = self._logits(model, part)
            digest.update(logits.tobytes())
            is_finite = is_finite and bool(np.isfinite(logits).all())
            choices |= set(logits.argmax(1).tolist())
            spreads.append(float(np.sqrt(logits.astype(np.float64).var(0).mean())))
            wide = logits[:-1].astype(np.float64)
            top = wide.max(1, keepdims=True)
            losses = np.log(np.exp(wide - top).sum(1)) + top[:, 0] - wide[np.arange(window - 1), part[1:]]
            total, count = total + float(losses.sum()), count + window - 1
        positions, spread = count + len(spreads), sum(spreads) / len(spreads)
        return Reading(total / count, is_finite, len(choices), positions, spread, digest.hexdigest())

    def _logits(self, model: Model, ids: np.ndarray) -> np.ndarray:
        """Logits (n, V) float32 of one window of ids (n,)."""
        pieces: list[np.ndarray] = []

        def keep(layer: int | None, name: str, x: Any) -> None:
            if name == "logits":
                pieces.append(np.array(self.backend.to_host(x), np.float32)[:, : self.cfg.vocab_size])

        targets = np.full((1, len(ids)), IGNORED, np.int32)
        targets[0, :-1] = ids[1:]
        model.forward(ids[None].astype(np.int32))
        model.loss(targets, tap=keep)
        return np.concatenate(pieces)

    @cached_property
    def best(self) -> Passage:
        """Passage with the lowest loss relative to the entropy of its tokens."""
        readings = self.readings

        def rank(p: Passage) -> float:
            r = readings[p.name].loss / max(p.entropy, 1e-9)
            return r if math.isfinite(r) else math.inf

        return min(self.passages, key=rank)

    @cached_property
    def samples(self) -> tuple[list[list[int]], float]:
        """(Continuations of the first tokens of the best passage, tokens per second with a KV cache)."""
        positions = self.cfg.max_position_embeddings
        prompt = self.best.ids[: max(1, min(PROMPT_TOKENS, positions // 4))].tolist()
        self.tell("writing")
        # The first use compiles kernels; it is not timed.
        self._write(prompt, 0, 2)
        start = time.perf_counter()
        texts = [self._write(prompt, seed, SAMPLE_TOKENS) for seed in range(SAMPLES)]
        return texts, sum(map(len, texts)) / (time.perf_counter() - start)

    def _write(self, prompt: Sequence[int], seed: int, most: int) -> list[int]:
        ends = self.loaded.end_ids()
        return list(
            generate(
                self.cfg, self.backend, self.weights, prompt, most,
                temperature=TEMPERATURE, seed=seed, eos_id=ends, dtype=self.dtype,
                among=drawable_ids(self.loaded.tokenizer, self.cfg.vocab_size, ends),
            )
        )  # fmt: skip
