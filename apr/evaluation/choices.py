"""Answer multiple choice by loss: the continuation of a context with the highest probability."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.errors import AprError, MalformedFile, Refused
from ..common.units import plural
from ..tokenizer.tokenizer import Tokenizer
from .humaneval import read_jsonl
from .score import Scorer, Window

FORMATS = (
    'lines of {"question", "choices": {"text", "label"}, "answerKey"} (ARC), {"goal", "sol1", "sol2", "label"} (PIQA) or '
    '{"context", "choices", "answer"}'
)
RULES = ("sum", "per_byte", "per_token")


@dataclass(frozen=True)
class Item:
    """One question. continuations follow the context as they stand; choices are the same without the space that joins
    them, whose bytes the per-byte rule counts; answer: index of the right one."""

    name: str
    context: str
    continuations: tuple[str, ...]
    choices: tuple[str, ...]
    answer: int


def read_items(path: str) -> list[Item]:
    """Read the questions of a file; each line may have its own format. Raises InputNotFound, MalformedFile."""
    return [_item(f"{path}:{number}", row) for number, row in read_jsonl(path, FORMATS)]


def _item(name: str, row: dict[str, Any]) -> Item:
    if "question" in row and "answerKey" in row:
        return _arc(name, row)
    if "goal" in row:
        return _piqa(name, row)
    if "context" in row:
        return _plain(name, row)
    raise MalformedFile(f"{name}: keys {', '.join(map(repr, list(row)[:8]))}; expected {FORMATS}")


def _text(name: str, key: str, value: Any, empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or empty):
        raise MalformedFile(f"{name}: {key} = {value!r} is not text")
    return value


def _asked(name: str, question: str, choices: Sequence[str], answer: int) -> Item:
    """Ask as lm-evaluation-harness asks ARC and PIQA: "Question: ...\\nAnswer:", and a space before each choice."""
    return Item(
        name, f"Question: {question}\nAnswer:", tuple(" " + c for c in choices), tuple(choices), answer
    )


def _arc(name: str, row: dict[str, Any]) -> Item:
    choices = row.get("choices")
    if not isinstance(choices, dict) or not all(isinstance(choices.get(k), list) for k in ("text", "label")):
        raise MalformedFile(f'{name}: choices = {choices!r}; expected {{"text": [...], "label": [...]}}')
    texts = [_text(name, "choices.text", t) for t in choices["text"]]
    labels = choices["label"]
    if len(labels) != len(texts) or len(texts) < 2:
        raise MalformedFile(
            f"{name}: {plural(len(texts), 'choice')} with {plural(len(labels), 'label')}; expected as many, at least 2"
        )
    if labels.count(row["answerKey"]) != 1:
        raise MalformedFile(f"{name}: answerKey = {row['answerKey']!r} is not one of the labels {labels}")
    return _asked(name, _text(name, "question", row["question"]), texts, labels.index(row["answerKey"]))


def _piqa(name: str, row: dict[str, Any]) -> Item:
    texts = [_text(name, key, row.get(key)) for key in ("sol1", "sol2")]
    label = row.get("label")
    if isinstance(label, bool) or label not in (0, 1, "0", "1"):
        raise MalformedFile(f"{name}: label = {label!r}; expected 0 (sol1) or 1 (sol2)")
    return _asked(name, _text(name, "goal", row["goal"]), texts, int(label))


def _plain(name: str, row: dict[str, Any]) -> Item:
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise MalformedFile(f"{name}: choices = {choices!r}; expected a list of at least 2 texts")
    texts = tuple(_text(name, "choices", t) for t in choices)
    answer = row.get("answer")
    if isinstance(answer, str) and texts.count(answer) == 1:
        answer = texts.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(texts):
        raise MalformedFile(
            f"{name}: answer = {row.get('answer')!r}; expected an index of the "
            f"{plural(len(texts), 'choice')} from 0, or the text of one"
        )
    stripped = tuple(t[1:] if t[:1] == " " and len(t) > 1 else t for t in texts)
    return Item(name, _text(name, "context", row["context"], empty=True), texts, stripped, answer)


def encode_pair(
    tokenizer: Tokenizer,
    context: str,
    continuation: str,
    before: Sequence[int] = (),
    alone: int | None = None,
    marked: bool = False,
) -> tuple[list[int], list[int]]:
    """Encode a context and its continuation, as lm-evaluation-harness does: spaces at the context's end move to
    the continuation; the context keeps its own ids, also where a token of the whole string spans its end, and what the
    whole string has past their number is the continuation. before: ids put in front of a context that does not begin with
    them. alone: the id that stands for a context without any. marked: special tokens stand for themselves, as a chat
    template writes them.

    Raises Refused: a continuation without tokens, or nothing that could stand before it."""
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    encode = tokenizer.encode_marked if marked else tokenizer.encode
    head = [int(i) for i in encode(context)] if context else []
    whole = [int(i) for i in encode(context + continuation)]
    ids, rest = behind(before, head), whole[len(head) :]
    if not ids and len(rest) > 1 and rest[0] == alone:
        return rest[:1], rest[1:]
    if not rest:
        raise Refused(
            f"the continuation {continuation[:40]!r} has no token of its own behind {context[-40:]!r}"
        )
    if not ids:
        if alone is None:
            raise Refused(
                f"{continuation[:40]!r} has nothing before it, and the tokenizer has no id that begins or ends a text"
            )
        ids = [alone]
    return ids, rest


def behind(before: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Put ids before others that do not begin with them: a chat template may have written <s> itself."""
    return list(ids) if list(ids[: len(before)]) == list(before) else [*before, *ids]


def pair_window(
    context: Sequence[int], continuation: Sequence[int], seq: int, name: str
) -> tuple[Window, bool]:
    """Make the window that scores a continuation; returns also True for a context that was cut at its left to fit.

    Raises Refused: the continuation alone is too long."""
    if len(continuation) > seq:
        raise Refused(
            f"{name}: a continuation has {plural(len(continuation), 'token')}, a window {seq}; raise --seq-length"
        )
    ids = np.array([*context, *continuation], np.int32)
    cut = len(ids) > seq + 1
    ids = ids[-(seq + 1) :]
    return Window(ids, len(ids) - 1 - len(continuation)), cut


def check_scored(window: Window, continuation: Sequence[int], name: str) -> None:
    """Require that a window scores its continuation, and nothing else. Raises AprError."""
    if list(window.ids[window.skip + 1 :]) != list(continuation):
        scored = plural(len(window.ids) - 1 - window.skip, "token")
        raise AprError(f"{name}: {scored} would be scored, the continuation has {len(continuation)}")


def windows_of(
    tokenizer: Tokenizer,
    items: Sequence[Item],
    seq: int,
    before: Sequence[int] = (),
    alone: int | None = None,
) -> tuple[list[Window], int]:
    """Make the windows of all continuations, item after item; returns also the count of contexts cut to `seq` tokens."""
    windows: list[Window] = []
    cut = 0
    for item in items:
        for continuation in item.continuations:
            pair = encode_pair(tokenizer, item.context, continuation, before, alone)
            window, short = pair_window(*pair, seq, item.name)
            check_scored(window, pair[1], item.name)
            windows.append(window)
            cut += short
    return windows, cut


def measure(
    scorer: Scorer,
    items: Sequence[Item],
    windows: Sequence[Window],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Compute the accuracy by each of RULES, with its standard error, and a row per item. windows: of `windows_of`."""
    scores: Iterator[tuple[float, int]] = (
        (-float(s.losses.sum()), len(s.losses)) for s in scorer.score(windows)
    )
    rows: list[dict[str, Any]] = []
    for item in items:
        found = [next(scores) for _ in item.continuations]
        sums = np.array([total for total, _ in found])
        tokens = np.array([n for _, n in found])
        sizes = np.array([len(c.encode()) for c in item.choices])
        by_rule = {"sum": sums, "per_byte": sums / sizes, "per_token": sums / tokens}
        picks = {rule: int(values.argmax()) for rule, values in by_rule.items()}
        rows.append(
            {
                "item": item.name,
                "answer": item.answer,
                "log_probabilities": sums.tolist(),
                "tokens": tokens.tolist(),
                "bytes": sizes.tolist(),
                "picked": picks,
            }
        )
        progress(len(rows), len(items))
    return {
        "accuracy": {rule: _accuracy([r["picked"][rule] == r["answer"] for r in rows]) for rule in RULES},
        "chance": float(np.mean([1 / len(i.choices) for i in items])),
        "items": len(items),
        "rows": rows,
    }


def _accuracy(right: Sequence[bool]) -> dict[str, float | None]:
    """p = right / n, and its standard error sqrt(p (1 - p) / (n - 1))."""
    n, p = len(right), float(np.mean(right))
    return {"value": p, "stderr": math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None}
