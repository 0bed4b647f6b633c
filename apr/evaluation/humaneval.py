"""Complete the programs of HumanEval and judge them by their tests (Chen et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import MalformedFile, Refused, UsageError
from ..common.files import MAX_TEXT, check_values, opened, parse_value, text_of
from ..common.host import cores
from ..common.units import plural
from ..data.source import Source, Unusable
from ..inference.generate import Generator, check_prompt, generator_memory, grouped, slots_needed
from ..inference.sampling import Sampling, drawable_ids
from ..inference.streaming import BROKEN
from ..model.cost import Memory, check_fits
from ..model.decode import lacks
from ..tokenizer.tokenizer import Tokenizer
from .sandbox import MAX_SECONDS, Judgement, Limits, Program, judge_all, proven
from .score import Opened

# Chen et al. 2021, section 3.1: a completion ends before the first of these.
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
KEYS = ("task_id", "prompt", "entry_point", "test")
TAIL_TOKENS = 8  # of the prompt, decoded before new ones: decoders drop a space at a text's beginning


@dataclass(frozen=True)
class Problem:
    """One problem: the prompt ends with a function's docstring; `test` defines check(candidate)."""

    task_id: str
    prompt: str
    entry_point: str
    test: str


@dataclass(frozen=True)
class HumanEvalSettings:
    """Options of drawing and judging completions.

    temperature   0 takes the most likely tokens
    allow_unsafe  run programs also where nothing keeps them from the files and processes of this machine
    benchmark     file of the problems and their solutions, which no program may read
    """

    samples: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 42
    limits: Limits = field(default_factory=Limits)
    allow_unsafe: bool = False
    benchmark: str = ""

    def check(self) -> None:
        """Raises UsageError."""
        if self.samples < 1:
            raise UsageError(f"--samples {self.samples}: must be at least 1")
        if self.samples > 1 and self.temperature == 0:
            raise UsageError(
                f"--samples {self.samples} at --temperature 0 would be the same program each time; give --temperature 0.8"
            )
        if not 0 < self.limits.seconds <= MAX_SECONDS:
            raise UsageError(
                f"--timeout {self.limits.seconds:g}: must be above 0 and at most {MAX_SECONDS} seconds"
            )


def read_jsonl(path: str, what: str) -> list[tuple[int, dict[str, Any]]]:
    """Read (line number from 1, object) of a .jsonl file, gzip-packed or not: at most MAX_TEXT bytes when unpacked.

    Raises InputNotFound, MalformedFile, IOFailure."""
    text = text_of(_unpacked(Path(path), what), path)
    check_values(text, path)
    lines = enumerate(text.split("\n"), 1)
    rows = [(number, _object(line, f"{path}:{number}", what)) for number, line in lines if line.strip()]
    if not rows:
        raise MalformedFile(f"{path}: no lines; expected {what}")
    return rows


def _unpacked(path: Path, what: str) -> bytes:
    with opened(path, f"give {what}") as (f, size):
        packed = f.read(2) == b"\x1f\x8b"
    data = bytearray()
    try:
        for block in Source(path, str(path), "jsonl", "gz" if packed else "", size).blocks():
            data += block
            if len(data) > MAX_TEXT:
                raise MalformedFile(f"{path}: more than {MAX_TEXT} bytes unpacked; expected {what}")
    except Unusable as e:
        raise MalformedFile(f"{path}: cannot be read: {e.reason}: {e.detail}; download it again") from None
    return bytes(data)


def _object(line: str, name: str, what: str) -> dict[str, Any]:
    try:
        value = parse_value(line, name)
    except MalformedFile as e:
        raise MalformedFile(f"{e}; expected {what}") from None
    if not isinstance(value, dict):
        raise MalformedFile(f"{name}: not a JSON object; expected {what}")
    return value


def read_problems(path: str) -> list[Problem]:
    """Read the problems of a HumanEval file. Raises InputNotFound, MalformedFile naming line and key."""
    problems = []
    for number, row in read_jsonl(path, "HumanEval.jsonl or HumanEval.jsonl.gz"):
        for key in KEYS:
            if not isinstance(row.get(key), str) or not row[key]:
                raise MalformedFile(
                    f"{path}:{number}: {key} = {row.get(key)!r} is not text; a problem has {', '.join(KEYS)}"
                )
        problems.append(Problem(**{key: row[key] for key in KEYS}))
    names = [p.task_id for p in problems]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise MalformedFile(f"{path}: task_id {twice!r} is there twice")
    return problems


def pass_at_k(n: int, c: int, k: int) -> float:
    """pass@k, the probability that one of k programs drawn from n, of which c are right, is right, without bias:
    1 - C(n-c, k) / C(n, k) = 1 - prod_{i=n-c+1}^{n} (1 - k/i)  (Chen et al. 2021, eq. 1)."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} right of {n}")
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1)) if n - c >= k else 1.0


def cut(text: str, stop: Sequence[str] = STOP) -> str:
    """Cut a text before the first stop sequence."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def continuation(
    tokenizer: Tokenizer, prompt: Sequence[int], stream: Iterator[int], stop: Sequence[str]
) -> tuple[str, int]:
    """Take tokens of a stream up to a stop sequence; returns (text, tokens taken).

    Raises Refused: the stream gave none."""
    growing = Growing(tokenizer, prompt, stop)
    for token in stream:
        if growing.feed(token):
            break
    return growing.result()


class Growing:
    """A completion that grows token by token, up to a stop sequence.

    Of a long text only the latest tokens are decoded, after some before them, and looked through with the end of the text
    before: a device may give tokens faster than all of a text could be decoded again for each."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop, self._tail = tokenizer, stop, list(prompt[-TAIL_TOKENS:])
        self._new: list[int] = []
        self._before, self._longest = "", max(map(len, stop), default=1)
        self._look_from(self._tail)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=True)

    def _look_from(self, ids: Sequence[int]) -> None:
        self._latest, self._shown = list(ids), len(self._decode(ids))

    def feed(self, token: int) -> bool:
        """Take a token; tells whether a stop sequence is in the text."""
        self._new.append(token)
        self._latest.append(token)
        decoded = self._decode(self._latest)
        text = self._before + decoded[self._shown :]
        if len(self._latest) >= 3 * TAIL_TOKENS and not decoded.endswith(BROKEN):
            self._before = text[-self._longest :]
            self._look_from(self._latest[-TAIL_TOKENS:])
        return any(s in text for s in self._stop)

    def result(self) -> tuple[str, int]:
        """Return (text, tokens taken). Raises Refused for none."""
        if not self._new:
            raise Refused("the model generated no token")
        text = self._decode(self._tail + self._new)[len(self._decode(self._tail)) :]
        return cut(text, self._stop), len(self._new)


Jobs = Sequence[tuple[str, int]]  # prompt and seed of each completion
# so many prompts together: the cpu backend gives up to 8 the bits that each gets alone, recorded steps any number
TOGETHER, RECORDED = 8, 32


class Completer:
    """Completes prompts with a model. Raises Refused: no tokenizer, no memory."""

    def __init__(self, opened: Opened, settings: HumanEvalSettings) -> None:
        self.opened, self.settings = opened, settings
        self.tokenizer = opened.need_tokenizer()
        recorded = lacks(opened.cfg, opened.backend, opened.dtype) == ""
        self._rows = RECORDED if recorded else TOGETHER if opened.backend.name == "cpu" else 1

    def check_fits(self, problems: Sequence[Problem]) -> None:
        """Complete no more prompts together than fit. Raises Refused: a prompt is too long, or the longest does not fit alone."""
        cfg, longest = self.opened.cfg, 0
        for p in problems:
            n = len(self.tokenizer.encode_text(p.prompt))
            if n >= cfg.max_position_embeddings:
                raise Refused(
                    f"{p.task_id}: the prompt has {plural(n, 'token')}, the model reads "
                    f"{cfg.max_position_embeddings}; it cannot be "
                    "evaluated on this file"
                )
            longest = max(longest, n)
        cache = min(longest + self.settings.max_new_tokens, cfg.max_position_embeddings)
        o, have = self.opened, self.opened.backend.free_memory()
        self._rows = self._together(len(problems) * self.settings.samples)

        def need() -> Memory:
            return generator_memory(cfg, o.backend, o.dtype, self._rows, cache)

        while self._rows > 1 and have is not None and need().total > have:
            self._rows //= 2
        check_fits(need(), o.backend, "use fewer --max-new-tokens")

    def _together(self, jobs: int) -> int:
        return min(jobs, self._rows)

    def complete(self, jobs: Jobs) -> Iterator[tuple[int, tuple[str, int]]]:
        """Complete prompts, several at once; yields (number of a job, (completion, tokens)) in the order in which they end.

        Raises Refused: logits not finite, nothing generated."""
        s, o = self.settings, self.opened
        cfg, ends = o.cfg, o.loaded.end_ids()
        prompts = [check_prompt(cfg, self.tokenizer.encode_text(prompt)) for prompt, _ in jobs]
        rules = [Sampling(s.max_new_tokens, s.temperature, s.top_k, s.top_p, seed) for _, seed in jobs]
        sizes = [(len(ids), s.max_new_tokens) for ids in prompts]
        groups = grouped(cfg, sizes, self._together(len(jobs)))
        slots = max((slots_needed(cfg, [sizes[i] for i in g]) for g in groups), default=1)
        rows, among = max(map(len, groups), default=1), drawable_ids(self.tokenizer, cfg.vocab_size, ends)
        generator = Generator(cfg, o.backend, o.weights, slots, o.dtype, rows, among=among)
        for group in groups:
            texts = {i: Growing(self.tokenizer, prompts[i], STOP) for i in group}
            for c, token in generator.run([prompts[i] for i in group], [rules[i] for i in group], ends):
                i = group[c.number]
                if texts[i].feed(token):
                    c.ended = "stop"
                if c.ended:
                    yield i, texts[i].result()


def run(
    complete: Callable[[Jobs], Iterator[tuple[int, tuple[str, int]]]],
    problems: Sequence[Problem],
    settings: HumanEvalSettings,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    may_be_empty: bool = False,
) -> dict[str, Any]:
    """Draw and judge completions. may_be_empty: as those of a model that has hardly been trained; its score is 0.

    complete([(prompt, seed), ...]) gives (number, (completion, tokens)) in any order.

    The sandbox is proven first, so that no score comes of a machine that cannot run programs. Raises Refused: every
    completion is empty, or nothing isolates the programs; NoSandbox."""
    settings.check()
    isolation = proven(settings.limits, settings.allow_unsafe, settings.benchmark)
    each = [(p, sample) for p in problems for sample in range(settings.samples)]
    total, found = len(each), dict[int, dict[str, Any]]()
    for i, (text, tokens) in complete([(p.prompt, settings.seed + i) for i, (p, _) in enumerate(each)]):
        p, sample = each[i]
        found[i] = {"task_id": p.task_id, "sample": sample, "completion": text, "tokens": tokens}
        progress("complete", len(found), total)
    rows = [found[i] for i in range(total)]
    if not may_be_empty and not any(r["completion"].strip() for r in rows):
        raise Refused(
            f"all {plural(total, 'completion')} are empty: the model generates nothing that could be judged"
        )
    programs = [
        Program(p.prompt + r["completion"], p.entry_point, p.test, p.prompt)
        for (p, _), r in zip(each, rows, strict=True)
    ]
    kept: list[Judgement] = []
    for verdict in judge_all(programs, settings.limits, cores()):
        kept.append(verdict)
        progress("judge", len(kept), total)
    for r, v in zip(rows, kept, strict=True):
        r |= {"passed": v.passed, "why": v.why}
    return {
        "pass_at_k": summary([r["passed"] for r in rows], settings.samples),
        "problems": len(problems),
        "samples": settings.samples,
        "passed": sum(r["passed"] for r in rows),
        "isolation": isolation,
        "rows": rows,
    }


def summary(passed: Sequence[bool], samples: int) -> dict[str, dict[str, float | None]]:
    """{"1": {"value": ..., "stderr": ...}} for k = 1, 10, 100 as far as there are samples, and for all of them. passed:
    sample by sample, problem after problem. The standard error is that of the mean over problems."""
    right = np.array(passed, bool).reshape(-1, samples).sum(1)
    out: dict[str, dict[str, float | None]] = {}
    for k in sorted({1, *(k for k in (10, 100) if k <= samples), samples}):
        each = np.array([pass_at_k(samples, int(c), k) for c in right])
        error = float(each.std(ddof=1)) / math.sqrt(len(each)) if len(each) > 1 else None
        out[str(k)] = {"value": float(each.mean()), "stderr": error}
    return out
