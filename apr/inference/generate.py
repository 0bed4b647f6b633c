"""Generate token ids with a KV cache, for one prompt or a batch of prompts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from ..common.errors import Refused, UsageError
from ..common.units import plural
from ..model.config import ModelConfig
from ..model.cost import Memory, memory
from ..model.decode import Decoding, lacks, say_once
from ..model.transformer import Model
from .sampling import Continuation, Sampling

PROMPT_CHUNK_TOKENS = 256  # of prefill at a time, so that long prompts need no long buffers
# of one row, and of all together, where calls are asynchronous: there a chunk costs the host the same whatever its length
DEVICE_CHUNK_TOKENS, DEVICE_BATCH_TOKENS = 2048, 8192


def prompt_chunk(backend: ModuleType, rows: int) -> int:
    """Most tokens of a prompt to compute at once."""
    many = min(DEVICE_CHUNK_TOKENS, DEVICE_BATCH_TOKENS // rows) if backend.asynchronous else 0
    return max(PROMPT_CHUNK_TOKENS, many)


class Generator:
    """A model with buffers and a KV cache for up to `rows` sequences of up to `slots` positions together.

    weights: flat parameters on the backend (Layout order). chunk: as prompt_chunk, in its place. among: ids that
    may be drawn (see drawable_ids). recorded: tokens behind the prompt by steps that the device records (decode.Decoding), where
    it has them.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        backend: ModuleType,
        weights: Any,
        slots: int,
        dtype: str = "float32",
        rows: int = 1,
        chunk: int = 0,
        among: np.ndarray | None = None,
        recorded: bool = True,
    ) -> None:
        self.cfg, self.weights, self.slots, self.rows = cfg, weights, slots, rows
        self.chunk = min(chunk or prompt_chunk(backend, rows), slots)
        self._among = among
        self.model = Model(
            cfg, backend, rows, self.chunk, dtype, train=False, loss_rows=rows, cache=slots, w=weights
        )
        lacking = lacks(cfg, backend, dtype)
        self._decoding = Decoding(self.model, among) if recorded and lacking == "" else None
        if recorded and lacking:
            say_once(f"generation runs op by op: {lacking}")
        self._turn: object = None  # the latest run(): the cache of an older one is overwritten
        self._lock = threading.Lock()  # held while cache and buffers are written
        self._seen: list[int] = []  # tokens of a single prompt that row 0 of the cache holds, from slot 0 on

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        ends: Collection[int] = (),
        reuse: bool = False,
    ) -> Iterator[tuple[Continuation, int]]:
        """Yield (sequence, its new token) of up to `rows` prompts at once, until all have ended.

        Prefill is one prompt at a time, decoding all sequences together; on the cpu backend up to cpu.FEW_ROWS of
        them get the tokens, bit for bit of the logits, that each gets alone. sampling: of all, or one each. reuse:
        a single prompt may begin with what the cache still holds of the one before; its logits may then differ in the
        last bits. Raises UsageError for an empty prompt, Refused for ids outside the vocabulary and too long a prompt.
        """
        options = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        live = [
            Continuation(i, check_prompt(self.cfg, ids), s)
            for i, (ids, s) in enumerate(zip(prompts, options, strict=True))
        ]
        if (
            len(live) > self.rows
            or slots_needed(self.cfg, [(len(s.prompt), s.sampling.max_tokens) for s in live]) > self.slots
        ):
            raise Refused(
                f"no room for {plural(len(live), 'prompt')} in a cache of {plural(self.rows, 'row')} of "
                f"{plural(self.slots, 'position')}"
            )
        turn, most = object(), self.cfg.max_position_embeddings
        end = max((len(s.prompt) for s in live), default=0)
        with self._lock:
            self._turn = turn
            known = self._common(live[0].prompt) if reuse and len(live) == 1 else 0
            self._seen = self._seen[:known]
        for row, s in enumerate(live):
            slot = 0 if self._decoding else end - len(s.prompt)
            with self._having(turn):
                self._read(s.prompt, row, slot, known, len(live) == 1)
                first = s.draw(self.model.last_logits()[0], ends, most, self._among)
            yield s, first
        if self._decoding:
            yield from self._recorded(self._decoding, live, ends, turn)
            return
        while any(not s.ended for s in live):
            with self._having(turn):
                live = self._compact(live, end)
                tokens = np.array([s.new[-1] for s in live], np.int32)
                self.model.step(tokens, np.array([s.position for s in live]), end)
                end += 1
                if len(options) == 1:
                    self._seen.append(int(tokens[0]))
                logits = self.model.last_logits()
                drawn = [
                    (s, s.draw(row, ends, most, self._among)) for s, row in zip(live, logits, strict=True)
                ]
            yield from drawn

    def _recorded(
        self, decoding: Decoding, live: list[Continuation], ends: Collection[int], turn: object
    ) -> Iterator[tuple[Continuation, int]]:
        """Yield the tokens after the first of each sequence. The device begins a step while the host reads the one before."""
        most, alone, rows = self.cfg.max_position_embeddings, len(live) == 1, live
        asked: list[tuple[list[Continuation], Callable[[], list[int]]]] = []

        def goes_on(tokens: int) -> bool:
            return any(not s.ended and not s.ends_after(tokens, most) for s in rows)

        if goes_on(0):
            with self._having(turn):
                decoding.begin([s.row(most) for s in live])
        while goes_on(0):
            with self._having(turn):
                rows = self._fewer(decoding, rows)
                while len(asked) < 2 and goes_on(len(asked)):
                    asked.append((rows, decoding.step(len(rows))))
                of, tokens = asked.pop(0)
                new = tokens()
                if alone and not of[0].ended:
                    self._seen.append(of[0].new[-1])
            for s, token in zip(of, new, strict=True):
                if not s.ended:
                    yield s, s.take(token, ends, most)

    def _fewer(self, decoding: Decoding, rows: list[Continuation]) -> list[Continuation]:
        """Move the sequences that go on to the first rows, where so few are left that half of the rows or fewer do."""
        going = [i for i, s in enumerate(rows) if not s.ended]
        if not going or 2 * len(going) > 1 << (len(rows) - 1).bit_length():
            return rows
        rows, free = list(rows), [i for i in range(len(going)) if rows[i].ended]
        for to, source in zip(free, [i for i in going if i >= len(going)], strict=True):
            decoding.move(to, source, min(self.slots, rows[source].position + 2))
            rows[to] = rows[source]
        return rows[: len(going)]

    @contextmanager
    def _having(self, turn: object) -> Iterator[None]:
        """Keep other threads from the cache inside the block. Raises UsageError: a later run() has taken it."""
        with self._lock:
            if turn is not self._turn:
                raise UsageError(
                    "another generation with this model has begun and taken its cache; finish one before the next, give "
                    "the prompts together, or load the model once for each thread"
                )
            yield

    def _common(self, ids: list[int]) -> int:
        """Count the leading tokens of a prompt that the cache holds; the last is always computed, for its logits."""
        n = min(len(self._seen), len(ids) - 1)
        return next((i for i in range(n) if self._seen[i] != ids[i]), n)

    def _read(self, ids: list[int], row: int, slot: int, known: int, alone: bool) -> None:
        """Put a prompt into a row of the cache, from its token number `known` on."""
        for past in range(known, len(ids), self.chunk):
            part = ids[past : past + self.chunk]
            self.model.forward(np.array([part], np.int32), past=past, row=row, slot=slot)
            if alone:
                self._seen += part

    def _compact(self, live: list[Continuation], end: int) -> list[Continuation]:
        """Move the sequences that go on to the first rows of the cache, which holds `end` slots; returns them."""
        for row in reversed(range(len(live))):
            if live[row].ended:
                last = live.pop()
                if row < len(live):
                    live[row] = last
                    self.model.move_row(row, len(live), end)
        return live


def check_prompt(cfg: ModelConfig, prompt: Sequence[int] | np.ndarray) -> list[int]:
    """Check the ids of a prompt. Raises UsageError for none, Refused: outside the vocabulary, too many."""
    ids = np.asarray(prompt)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise UsageError(f"a prompt is a list of token ids, not {ids.dtype} {ids.shape}")
    if not len(ids):
        raise UsageError("the prompt has no tokens; give some text")
    if ids.min() < 0 or ids.max() >= cfg.vocab_size:
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise Refused(f"token id {bad} is outside the model's vocabulary of {cfg.vocab_size}")
    if len(ids) >= cfg.max_position_embeddings:
        raise Refused(
            f"the prompt has {plural(len(ids), 'token')}, the model reads {cfg.max_position_embeddings}; shorten the prompt"
        )
    return [int(i) for i in ids]


def slots_needed(cfg: ModelConfig, jobs: Sequence[tuple[int, int]]) -> int:
    """Count the cache slots that jobs (length of the prompt, max_tokens) take together: all prompts end in one slot."""
    most = cfg.max_position_embeddings
    return max(n for n, _ in jobs) + max(min(n + new, most) - n for n, new in jobs) if jobs else 0


def grouped(cfg: ModelConfig, jobs: Sequence[tuple[int, int]], rows: int) -> list[list[int]]:
    """Group jobs (length of the prompt, max_tokens) by number for batches of at most `rows`: jobs of similar lengths,
    which together take no more slots than the model has positions."""
    groups: list[list[int]] = []
    for i in sorted(range(len(jobs)), key=lambda i: (-jobs[i][0], i)):
        last = groups[-1] if groups else None
        if (
            last is None
            or len(last) >= rows
            or slots_needed(cfg, [jobs[j] for j in (*last, i)]) > cfg.max_position_embeddings
        ):
            groups.append([i])
        else:
            last.append(i)
    return [sorted(g) for g in groups]


def generator_memory(cfg: ModelConfig, backend: ModuleType, dtype: str, rows: int, slots: int) -> Memory:
    """Compute the memory of a Generator, weights included."""
    chunk = min(slots, prompt_chunk(backend, rows))
    return memory(cfg, backend, rows, chunk, dtype, train=False, loss_rows=rows, cache=slots)


def generate(
    cfg: ModelConfig,
    backend: ModuleType,
    weights: Any,
    prompt: Sequence[int],
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 42,
    eos_id: int | Collection[int] | None = None,
    dtype: str = "float32",
    among: np.ndarray | None = None,
    **more: float,
) -> Iterator[int]:
    """Generate token ids after a prompt, until max_tokens, an end-of-text id or the last position.

    weights: flat parameters on the backend (Layout order). among: ids that may be drawn (see drawable_ids). more: min_p,
    repetition_penalty. Raises UsageError for options out of range or an empty prompt, Refused for ids outside the vocabulary
    or a prompt that is too long.
    """
    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed, **more)
    ids = check_prompt(cfg, prompt)
    ends = () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else eos_id
    generator = Generator(
        cfg,
        backend,
        weights,
        slots_needed(cfg, [(len(ids), max_tokens)]),
        dtype,
        chunk=min(len(ids), prompt_chunk(backend, 1)),
        among=among,
    )
    for _, token in generator.run([ids], sampling, ends):
        yield token
