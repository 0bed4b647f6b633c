"""Compare what packed examples train with the answers of the files, read again by other code.

A trained stretch of tokens must spell an answer of a file between what the chat template writes around an answer, begin where
the template's generation prompt ends, and end with the token that ends a turn. What the template writes is found by rendering
an answer that is one mark; nothing of the encoding is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...common.errors import Refused
from ...common.finding import Finding
from ...common.units import plural
from ...tokenizer.chat_template import ChatTemplate
from ...tokenizer.tokenizer import Tokenizer
from ..plain import DAMAGES, Unfollowed, records, value_of
from .examples import Conversations
from .packed import PackedShards
from .prepare import TOO_LONG
from .shapes import ANSWER_END, ANSWER_START, FLAGS, UNTRAINED

# What messages may have beside their text, for a template to write.
SPEAKERS = ("assistant", "gpt", "model", "bot", "chatgpt", "ai")
# Keys of answers, where an object holds a question and its answer.
SAYING = ("assistant", "gpt", "bot", "answer", "output", "response")
BESIDE = ("reasoning_content", "reasoning", "thinking", "thoughts", "tool_calls", "function_call")
NAME, BOUND = (
    "answers of the files",
    "trained tokens are an answer of the files, from its first to the end of its turn",
)
PAIRS, PAIRS_BOUND = (
    "pairs of the files",
    "chosen answers are chosen ones of the files, rejected are rejected ones",
)
# Rows of a side whose answers are decoded, evenly spread.
SAMPLED_ROWS = 128
# Bytes of the files that are read again.
BUDGET_BYTES = 64 << 20
# Of the answers, those that a chat template, or a vocabulary alone, may write otherwise than the files have them.
TEMPLATE_SHARE, VOCABULARY_SHARE = 0.05, 0.01
# Tokens before an answer that hold the generation prompt.
CONTEXT_TOKENS = 64
# Private characters, no letters: a template may change those.
QUESTION, ANSWER = "\U000f1001", "\U000f1000"


@dataclass(frozen=True)
class Frame:
    """Text around an answer.

    prompt  words that begin it, of which nothing is trained; "" where the template has none
    before  trained text before the answer
    behind  trained text behind it; end: the special token that it ends with, or None
    is_marked  the template itself says what of an answer is trained
    """

    prompt: str
    before: str
    behind: str
    end: int | None
    is_marked: bool = False

    @classmethod
    def of(cls, template: ChatTemplate | None, tokenizer: Tokenizer) -> Frame | None:
        """Render an answer that is one mark; None where the template does not write it once."""
        if template is None:
            return cls("", "", tokenizer.eos_token or "", tokenizer.eos_id)
        question = {"role": "user", "content": QUESTION}
        messages = [question, {"role": "assistant", "content": ANSWER}]
        marks = (ANSWER_START, ANSWER_END) if template.has_generation else None
        probe = template.marked(marks)
        try:
            asked, plain = probe.render([question], True), probe.render([question], False)
            whole = probe.render(messages, False)
        except Refused:
            return None
        prompt = asked[len(plain) :] if asked.startswith(plain) else ""
        if marks:
            found = re.search(f"{ANSWER_START}([^{ANSWER_END}]*){ANSWER_END}", whole)
            turn, start = (found[1], whole[: found.start()]) if found else ("", "")
        else:
            turn, start = whole.removeprefix(asked), asked
            ends = [m.end() for m in tokenizer.special_pattern.finditer(turn)]
            if not whole.startswith(asked):
                return None
            if ends and not turn[ends[-1] :].strip():
                turn = turn[: ends[-1]]
        if turn.count(ANSWER) != 1:
            return None
        before, behind = turn.split(ANSWER)
        last = [m for m in tokenizer.special_pattern.finditer(behind) if m.end() == len(behind)]
        ids = {text: i for i, text in tokenizer.special_tokens().items()}
        end = ids[last[-1][0]] if last else None
        return cls(prompt if start.endswith(prompt) else "", before, behind, end, bool(marks))


@dataclass
class _File:
    """Answers and the number of records of files, as far as they were read; share: of their bytes; blanks: answers without
    text. has_more: messages have thoughts or calls of tools beside their text, which a template may write too. has_context:
    answers that are not trained on."""

    answers: set[str]
    records: int = 0
    share: float = 1.0
    is_whole: bool = True
    blanks: int = 0
    has_more: bool = False
    has_context: bool = False


def answers_kept(
    corpus: Conversations, sides: dict[str, PackedShards], tokenizer: Tokenizer, template: ChatTemplate | None
) -> Finding:
    """Compare trained tokens with the answers of the files, and the number of examples with that of records."""
    frame = Frame.of(template, tokenizer)
    if frame is None:
        return Finding.skipped(
            NAME, "the chat template does not write a question and its answer as they are", BOUND
        )
    spelling = Spelling(tokenizer)
    file = _read(corpus, spelling, frame, tokenizer)
    total, wrong = 0, ""
    for side, shards in sides.items():
        runs, unended = _ends(shards, frame.end)
        total += runs
        if unended and not wrong:
            wrong = (
                f"{side}: {unended:,} of {runs:,} answers do not end with the end of a turn, id {frame.end}"
            )
    is_asked = not (file.blanks or file.has_context or frame.is_marked)
    if not wrong and tokenizer.byte_level and is_asked:
        lost = ((side, _lost(shards, frame, tokenizer)) for side, shards in sides.items())
        wrong = next((f"{side}: {x}" for side, x in lost if x), "")
    found, unknown, example = 0, 0, ""
    for side, shards in sides.items():
        for before, run in _sampled(shards, frame.end):
            if not wrong and (misplaced := spelling.misplaced(frame, before, run)):
                wrong = f"{side}: {misplaced}"
            if tokenizer.unknown_id is not None and (run == tokenizer.unknown_id).any():
                continue
            if any(key in file.answers for key in spelling.candidates(frame, run)):
                found += 1
            else:
                unknown, example = unknown + 1, example or f"{side}: {tokenizer.decode(run)[:60]!r}"
    wrong = (
        wrong
        or ("" if file.has_more else _strangers(file, found, unknown, example, template is not None))
        or _uncounted(file, sides)
    )
    measured = (
        f"{found:,} of {plural(found + unknown, 'sampled answer')} found in {plural(file.records, 'record')}"
        f"{'' if file.is_whole else ', the beginning of the files'}; {plural(total, 'answer')}"
        f"{'' if frame.end is None else f', each ends with id {frame.end}'}"
    )
    return Finding.of(NAME, not wrong, wrong or measured, BOUND)


def _strangers(file: _File, found: int, unknown: int, example: str, is_written: bool) -> str:
    """Judge the sampled answers that no file has; of files that were read in part, those that one has."""
    count = found + unknown
    if file.is_whole:
        allowed = (TEMPLATE_SHARE if is_written else VOCABULARY_SHARE) * count
        return (
            f"{unknown:,} of {count:,} trained stretches are no answer of the files: {example}"
            if unknown > allowed
            else ""
        )
    expected = file.share * count
    if expected < 40 or 4 * found >= expected:
        return ""
    read = f"the {100 * file.share:.0f} % of the files that were read"
    return f"{found:,} of {count:,} trained stretches are answers of {read}: {example}"


def _uncounted(file: _File, sides: dict[str, PackedShards]) -> str:
    """Compare records with examples, copies and those that were left out."""
    m = next(iter(sides.values())).manifest
    examples = sum(shards.manifest.examples for shards in sides.values())
    accounted = examples + m.duplicates + sum(m.skipped.values())
    # An answer may be an example of its own, also one that is left out as too long.
    is_exact = not m.by_turn and TOO_LONG not in m.skipped
    is_right = accounted == file.records if is_exact else accounted >= file.records + m.by_turn
    if is_right or not file.is_whole or any(reason in DAMAGES for reason in m.skipped):
        return ""
    return (
        f"{file.records:,} records in the files; {plural(examples, 'example')}, {m.duplicates:,} copies and "
        f"{sum(m.skipped.values()):,} left out are {accounted:,}"
    )


def _read(corpus: Conversations, spelling: Spelling, frame: Frame, tokenizer: Tokenizer) -> _File:
    """Read the answers of files with Python's own decoders."""
    end = tokenizer.special_tokens().get(-1 if frame.end is None else frame.end, "")
    names, speakers = (
        dict(corpus.map.names),
        {*SPEAKERS, dict(corpus.map.names).get("assistant", "assistant")},
    )
    out, read = _File(set(), len(getattr(corpus.sources, "skipped", ()))), 0
    for source in corpus.sources:
        number = 0
        try:
            for number, (_, value) in enumerate(records(source, BUDGET_BYTES), 1):
                if source.kind == "json" and number == 1 and value is None:
                    raise Unfollowed(f"{source.name} may hold no records")
                said, texts = said_in(value, names, speakers)
                out.has_more |= any(m.get(key) for m in said for key in BESIDE) or bool(
                    texts and not frame.prompt
                )
                out.has_context |= any(names.get(k, k) in m for m in said for k in (*UNTRAINED, *FLAGS))
                out.has_context |= any(isinstance(x, list) for x in _named(value, "prompt", names))
                answers = [t for m in said for t in contents(m, names)]
                answers += [
                    x.split(end)[0] if end else x for t in texts for x in t.split(frame.prompt or "\n")[1:]
                ]
                for answer in answers:
                    read += len(answer)
                    out.answers.update(spelling.keys(answer))
                    out.blanks += not answer.strip()
                if read > BUDGET_BYTES:
                    raise Unfollowed("enough was read")
        except Unfollowed:
            sizes = sum(s.size for s in corpus.sources)
            out.is_whole, out.share = False, 0.0 if source.compression else read / max(1, sizes)
            out.records += number
            return out
        out.records += max(1, number)
    return out


def said_in(value: Any, names: dict[str, str], speakers: set[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """List what the assistant says in a record, as messages, and its texts that are rendered already."""
    said: list[dict[str, Any]] = []
    if not isinstance(value, dict):
        return said, []
    for turns in _values(value, names):
        if isinstance(turns, str) and turns.lstrip().startswith("["):
            # A list of messages may stand in a text.
            turns = value_of(turns.encode(errors="replace"))
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                who = [x for key in ("role", "from") for x in _named(turn, key, names) if x is not None]
                said += (
                    [turn]
                    if any(isinstance(w, str) and (w in speakers or w.lower() in SPEAKERS) for w in who)
                    else []
                )
                said += [{"content": x} for key, x in turn.items() if not who and key.lower() in SAYING]
            elif isinstance(turn, list) and len(turn) == 2:
                said.append({"content": turn[1]})
        if isinstance(turns, str) and (spoken := turns.split("\n\nAssistant:"))[1:] and "Human:" in spoken[0]:
            said += [{"content": text.split("\n\nHuman:")[0]} for text in spoken[1:]]
    for texts in _named(value, "data", names):
        said += [{"content": text} for text in texts[1::2]] if isinstance(texts, list) else []
    node = value.get("prompt") if isinstance(value.get("prompt"), dict) else value
    while isinstance(node, dict) and isinstance(node.get("replies"), list) and len(node["replies"]) == 1:
        node = node["replies"][0]
        if isinstance(node, dict) and node.get("role") in speakers:
            said.append({"content": node.get("text")})
    for key in ("output", "response", "completion"):
        found = (x[0] if isinstance(x, list) and len(x) == 1 else x for x in _named(value, key, names))
        said += [{"content": x} for x in found if isinstance(x, str)]
    texts = [x for x in _named(value, "text", names) if isinstance(x, str)]
    return said, [] if said else texts[:1]


def _values(value: dict[str, Any], names: dict[str, str]) -> Iterator[Any]:
    """Yield the values of a record, those that --map finds inside others too."""
    yield from value.values()
    yield from (_under(value, name) for name in names.values() if "." in name)


def _named(value: Any, key: str, names: dict[str, str]) -> list[Any]:
    """List the values under the name of the file for a key, and under the key itself: other records may have that."""
    return [_under(value, name) for name in dict.fromkeys([names.get(key, key), key])]


def _under(value: Any, name: str) -> Any:
    """Look up a key, or a.b for one inside another."""
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def contents(message: dict[str, Any], names: dict[str, str]) -> Iterator[str]:
    """Yield the text of a message, of parts joined."""
    for key in ("content", "value"):
        for content in _named(message, key, names):
            if isinstance(content, list):
                parts = [
                    p if isinstance(p, str) else p.get("text") for p in content if isinstance(p, dict | str)
                ]
                content = "".join(p for p in parts if isinstance(p, str))
            if isinstance(content, str):
                yield content


class Spelling:
    """Texts of tokens, and keys to compare texts by: normalized, without white space and special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special = tokenizer.special_pattern

    def key(self, text: str) -> str:
        """Reduce a text to what templates and vocabularies leave of it."""
        return "".join(self.tokenizer.normalize(self.special.sub("", text)).replace("\u2581", " ").split())

    def keys(self, answer: str) -> Iterator[str]:
        """Yield the keys of an answer, and of what follows thoughts in it, which templates may drop."""
        yield self.key(answer)
        if "</think>" in answer:
            yield self.key(answer.rpartition("</think>")[2])

    def candidates(self, frame: Frame, run: np.ndarray) -> Iterator[str]:
        """Yield keys of a trained stretch without what the template writes, and without a part of its first token, which
        may hold the end of the prompt, or of its last one, which may hold what follows where no special token does."""
        text = self.key(self.tokenizer.decode(run))
        first, last = (self.tokenizer.decode(run[at]) for at in (slice(1), slice(-1, None)))
        behind = self.key(frame.behind)
        # Of white space in a token, the key has nothing.
        lefts = max(1, len(self.key(first)) + first[-1:].isspace())
        rights = 1 if frame.end is not None else max(1, len(self.key(last)) + last[:1].isspace())
        for right in range(rights):
            part = text[: len(text) - right].removesuffix(behind)
            yield from (part[left:] for left in range(lefts))
        yield text.removesuffix(behind).removeprefix(self.key(frame.before))

    def misplaced(self, frame: Frame, before: np.ndarray, run: np.ndarray) -> str:
        """Say where a trained stretch does not begin behind the generation prompt; "" where it does, or nothing says so."""
        if not frame.prompt or not self.tokenizer.byte_level:
            return ""
        text, first = self.tokenizer.decode(before), self.tokenizer.decode(run[:1])
        # A token may hold the end of the prompt and the beginning of the answer.
        for at in range(max(1, len(first))):
            there = text + first[:at]
            if there.endswith(frame.prompt[-len(there) :] if len(before) < CONTEXT_TOKENS else frame.prompt):
                return ""
        return f"an answer begins with {first!r} behind {text[-20:]!r}, the template writes {frame.prompt!r} before it"


def _ends(shards: PackedShards, end: int | None) -> tuple[int, int]:
    """Count trained stretches, cut behind each end of a turn, and those that have none."""
    trained = shards.trained > 0
    is_last = trained.copy()
    is_last[:, :-1] &= ~trained[:, 1:]
    if end is None:
        return int(is_last.sum()), 0
    is_end = trained & (shards.ids == end)
    return int((is_last | is_end).sum()), int((is_last & ~is_end).sum())


def _lost(shards: PackedShards, frame: Frame, tokenizer: Tokenizer) -> str:
    """Find more beginnings of answers in the sampled rows than trained answers; "" where nothing tells them from other text.

    An answer that lost its beginning is not trained, and has none."""
    if shards.manifest.by_turn or frame.end is None or not tokenizer.special_pattern.search(frame.prompt):
        return ""
    begun = trained = 0
    for row in sampled_rows(shards):
        ids = np.asarray(shards.ids[row])
        begun += tokenizer.decode(ids).count(frame.prompt)
        trained += int(((ids == frame.end) & (np.asarray(shards.trained[row]) > 0)).sum())
    return f"{begun:,} answers begin, {trained:,} are trained" if begun > trained else ""


def sampled_rows(shards: PackedShards) -> list[int]:
    rows = shards.manifest.rows
    return sorted({rows * k // SAMPLED_ROWS for k in range(SAMPLED_ROWS)})


def _sampled(shards: PackedShards, end: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (ids before it in its example, ids) of the trained stretches in some rows."""
    for row in sampled_rows(shards):
        ids, trained = np.asarray(shards.ids[row]).astype(np.int64), np.asarray(shards.trained[row]) > 0
        edge = np.diff(np.concatenate([[False], trained, [False]]).astype(np.int8))
        for first, last in zip(np.flatnonzero(edge > 0), np.flatnonzero(edge < 0), strict=True):
            cuts = np.flatnonzero(ids[first:last] == end) + 1 if end is not None else np.empty(0, np.int64)
            stops = sorted({*(first + cuts).tolist(), int(last)})
            begin = int(first)
            for stop in stops:
                start = max(0, begin - CONTEXT_TOKENS)
                before = ids[start:begin]
                if (
                    shards.border_id is not None
                    and (borders := np.flatnonzero(before == shards.border_id)).size
                ):
                    before = before[borders[-1] + 1 :]
                yield before, ids[begin:stop]
                begin = stop
