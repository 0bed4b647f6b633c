"""Generate token ids with a KV cache, for one prompt or a batch of prompts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from ..common.errors import Refused, UsageError
from ..common.units import plural
from ..model.config import ModelConfig
from ..model.cost import Memory, memory
from ..model.transformer import Model
from ..tokenizer.tokenizer import Tokenizer

PROMPT_CHUNK_TOKENS = 256  # of prefill at a time, so that long prompts need no long buffers
SORTED_TOKENS = 1024  # likeliest ones, sorted first; the others only when a draw falls on them


@dataclass(frozen=True)
class Sampling:
    """Number of new tokens, and the rule that draws each.

    temperature 0 takes the likeliest. top_k > 0 keeps the k likeliest; top_p < 1 keeps the fewest whose
    probabilities reach top_p (Holtzman et al. 2020, section 3.1); min_p > 0 those at least min_p times as likely as
    the likeliest (Nguyen et al. 2024). repetition_penalty divides the logits above 0 of tokens that are in the prompt
    or were generated, and multiplies those below (Keskar et al. 2019, section 4.1). seed: of the draws.
    """

    max_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 42
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Raises UsageError for an option out of range."""
        for option, value, good, rule in (
            ("--temperature", self.temperature, 0 <= self.temperature < np.inf, "at least 0"),
            ("--top-k", self.top_k, self.top_k >= 0, "at least 0"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--min-p", self.min_p, 0 <= self.min_p <= 1, "at least 0 and at most 1"),
            ("--repetition-penalty", self.repetition_penalty, 0 < self.repetition_penalty < np.inf, "above 0"),
            ("--max-tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("--seed", self.seed, self.seed >= 0, "at least 0"),
        ):  # fmt: skip
            if not good:
                raise UsageError(f"{option} must be {rule}, not {value}")


def pick(
    logits: np.ndarray,
    rng: np.random.Generator,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float = 0.0,
) -> int:
    """Draw one token id from logits (V,) by the options of Sampling; among equals the lowest id is the likeliest.

    Takes one number from rng, none at temperature 0. Raises Refused for logits that are not finite.
    """
    if not np.isfinite(logits).all():
        raise Refused("the model's logits are not finite: its weights are damaged")
    if temperature == 0:
        return int(logits.argmax())
    # Near 0 a temperature makes the quotients infinite, and all weights but those of the likeliest 0.
    with np.errstate(over="ignore"):
        weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    draw = rng.random()
    for count in (min(top_k or SORTED_TOKENS, len(logits)), len(logits)):
        order = _likeliest(logits, count)
        p = weights[order]
        cumulative = np.cumsum(p) / (p.sum() if top_k else weights.sum())
        keep = min(int(np.searchsorted(cumulative, top_p)) + 1, count) if top_p < 1 else count
        if min_p > 0:
            keep = min(keep, int((p[:keep] >= min_p * p[0]).sum()))
        # True when all tokens that may be drawn are among these; their probabilities are then made to sum to 1.
        whole = bool(top_k) or count == len(logits) or keep < count
        if not whole and (top_p < 1 or min_p > 0):
            continue
        total = cumulative[keep - 1] if whole else 1
        at = int(np.searchsorted(cumulative[:keep], draw * total, side="right"))
        if whole or at < keep:
            return int(order[min(at, keep - 1)])
    raise AssertionError("the second turn has all tokens")


def drawable_ids(tokenizer: Tokenizer | None, vocab_size: int, ends: Collection[int]) -> np.ndarray | None:
    """List the ids that may be drawn, int64 (n,) ascending: those with a token, and the ends; None: all vocab_size of them.

    Models have more rows than their tokenizer has tokens, for speed; nothing was trained in those rows."""
    if tokenizer is None:
        return None
    ids = np.union1d(tokenizer.ids, np.fromiter(ends, np.int64))
    return None if ids.size >= vocab_size else ids


def _likeliest(logits: np.ndarray, count: int) -> np.ndarray:
    """Sort the ids of the `count` largest logits, largest first, lowest id first among equals."""
    if count < len(logits):
        least = np.partition(logits, -count)[-count]
        among = np.flatnonzero(logits >= least)  # all equal to the least, so that the lowest ids stay
        return among[np.argsort(-logits[among], kind="stable")[:count]]
    return np.argsort(-logits, kind="stable")


def penalise(logits: np.ndarray, ids: Collection[int], penalty: float) -> np.ndarray:
    """Apply the repetition penalty of Sampling for the tokens `ids` to logits (V,)."""
    if penalty == 1:
        return logits
    seen = np.unique(np.fromiter(ids, np.int64))
    out = logits.copy()
    out[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return out


@dataclass(eq=False)
class Continuation:
    """A prompt and the tokens generated after it.

    ended: "" while the sequence goes on, then "end" (an end-of-text id), "length" (max_tokens), "positions" (the model
    has no more), or whatever a reader sets: a sequence with a reason gets no more tokens."""

    number: int
    prompt: list[int]
    sampling: Sampling
    new: list[int] = field(default_factory=list)
    ended: str = ""

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.sampling.seed)

    @property
    def position(self) -> int:
        """Position of the latest token."""
        return len(self.prompt) + len(self.new) - 1

    def draw(
        self, logits: np.ndarray, ends: Collection[int], positions: int, among: np.ndarray | None = None
    ) -> int:
        """Draw the next token from logits (V,); among: the ids that may be drawn (see drawable_ids)."""
        s = self.sampling
        logits = penalise(
            logits, self.prompt + self.new if s.repetition_penalty != 1 else (), s.repetition_penalty
        )
        token = pick(
            logits if among is None else logits[among], self._rng, s.temperature, s.top_k, s.top_p, s.min_p
        )
        token = token if among is None else int(among[token])
        self.new.append(token)
        if token in ends:
            self.ended = "end"
        elif len(self.new) >= s.max_tokens:
            self.ended = "length"
        elif self.position + 1 >= positions:
            self.ended = "positions"
        return token


class Generator:
    """A model with buffers and a KV cache for up to `rows` sequences of up to `slots` positions together.

    weights: flat parameters on the backend (Layout order). chunk: most tokens of a prompt computed at once. among: ids that
    may be drawn (see drawable_ids).
    """

    def __init__(
        self,
        cfg: ModelConfig,
        backend: ModuleType,
        weights: Any,
        slots: int,
        dtype: str = "float32",
        rows: int = 1,
        chunk: int = PROMPT_CHUNK_TOKENS,
        among: np.ndarray | None = None,
    ) -> None:
        self.cfg, self.slots, self.rows, self.chunk = cfg, slots, rows, min(chunk, slots)
        self._among = among
        self.model = Model(
            cfg, backend, rows, self.chunk, dtype, train=False, loss_rows=rows, cache=slots, w=weights
        )
        self._turn: object = None  # the latest run(): the cache of an older one is overwritten
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
        turn = self._turn = object()
        most, end = self.cfg.max_position_embeddings, max((len(s.prompt) for s in live), default=0)
        known = self._common(live[0].prompt) if reuse and len(live) == 1 else 0
        self._seen = self._seen[:known]
        for row, s in enumerate(live):
            self._read(s.prompt, row, end - len(s.prompt), known, len(live) == 1)
            yield s, s.draw(self.model.last_logits()[0], ends, most, self._among)
            self._check_turn(turn)
        live = self._compact(live, end)
        while live:
            tokens = np.array([s.new[-1] for s in live], np.int32)
            self.model.step(tokens, np.array([s.position for s in live]), end)
            end += 1
            if len(options) == 1:
                self._seen.append(int(tokens[0]))
            for s, logits in zip(live, self.model.last_logits(), strict=True):
                yield s, s.draw(logits, ends, most, self._among)
                self._check_turn(turn)
            live = self._compact(live, end)

    def _check_turn(self, turn: object) -> None:
        if turn is not self._turn:
            raise UsageError(
                "another generation with this model has begun and taken its cache; finish one before the next, or give "
                "the prompts together"
            )

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
    return memory(
        cfg, backend, rows, min(slots, PROMPT_CHUNK_TOKENS), dtype, train=False, loss_rows=rows, cache=slots
    )


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
        chunk=min(len(ids), PROMPT_CHUNK_TOKENS),
        among=among,
    )
    for _, token in generator.run([ids], sampling, ends):
        yield token
