"""Encode examples: the text of a conversation by its chat template, and the tokens of its answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from ...common.errors import Refused
from ...common.units import plural
from ...tokenizer.chat_template import ChatTemplate, Message, answer_ends
from ...tokenizer.template_process import TemplateStopped
from ...tokenizer.tokenizer import Tokenizer, text_difference
from ..encode import ALWAYS_SAMPLED, SAMPLED_ONE_IN
from ..source import Skipped, Unusable
from .shapes import ANSWER_END, ANSWER_START, Example, is_answer, texts_in

# Characters [start, end) of a text.
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class EncodedExample:
    """An example as tokens.

    ids        (n,) uint32
    trained    (n,) bool    True for tokens of an answer, and the token that ends its turn
    byte_runs  (n,) int64   bytes of UTF-8, without special tokens, of the answers that begin at a token; else 0
    """

    ids: np.ndarray
    trained: np.ndarray
    byte_runs: np.ndarray

    @property
    def answer_bytes(self) -> int:
        """Bytes of UTF-8 of the answers without special tokens."""
        return int(self.byte_runs.sum())

    def part(self, start: int, end: int | None = None) -> EncodedExample:
        """Copy the tokens from `start` up to `end`."""
        return EncodedExample(*(x[start:end].copy() for x in (self.ids, self.trained, self.byte_runs)))


class Renderer:
    """Write conversations by a chat template, with the characters of the answers.

    Answers stand between {% generation %} and {% endgeneration %}, where the template has those. Otherwise an answer is the
    difference of the conversation up to and with it and of the conversation before it with the generation prompt. White
    space behind the special token that ends a turn is no part of an answer.
    Today's date is undefined for the template: the same examples would be others tomorrow."""

    def __init__(self, template: ChatTemplate, special: re.Pattern[str]) -> None:
        marks = ANSWER_START, ANSWER_END
        self._template = template.marked(marks)
        self._special = special

    def __call__(self, example: Example) -> list[tuple[str, Spans]]:
        """Return texts with their answers: one, or several where the template writes earlier turns otherwise than the last.

        Qwen3's drops what the assistant thought before its latest answer, for one. Then an answer is trained on in the
        conversation up to it, as it was generated; those that a text agrees with share it. Raises Unusable; Refused: a
        generation prompt that is not the beginning of the answer's own turn."""
        messages = list(example.messages)
        whole = self._render(example, messages, False)
        if self._template.has_generation:
            return [_unmark(whole, example)]
        out, text = [], whole
        spans: Spans = []
        answers = [k for k, m in enumerate(messages) if is_answer(m) and k not in example.untrained]
        for k in reversed(answers):
            before = self._render(example, messages[:k], True)
            after = whole if k + 1 == len(messages) else self._render(example, messages[: k + 1], False)
            if not after.startswith(before):
                raise Refused(
                    f"{example.name}: the chat template begins message {k + 1} otherwise with its generation prompt than "
                    f"when the answer is there: {text_difference(before, after)}; so "
                    "nothing says which tokens are that answer; put {% generation %} and {% endgeneration %} around the "
                    "answers in the template (--chat-template FILE)"
                )
            if not text.startswith(after):
                out.append((text, spans))
                text, spans = after, []
            spans.insert(0, (len(before), len(before) + len(self._turn(after[len(before) :]))))
        return [part for part in reversed([*out, (text, spans)]) if part[1]] or [(whole, [])]

    def _render(self, example: Example, messages: list[Message], prompt: bool) -> str:
        more = {**example.more, "tools": list(example.tools)} if example.tools else example.more
        try:
            return self._template.render(messages, prompt, **more)
        except TemplateStopped:
            # The template's fault, not the conversation's: no other one would fare better.
            raise
        except Refused as e:
            raise Unusable("refused by the template", str(e)) from None

    def _turn(self, text: str) -> str:
        """Drop white space behind the last special token: generation stops at that token."""
        end = max((m.end() for m in self._special.finditer(text)), default=len(text))
        return text if text[end:].strip() else text[:end]


def _unmark(text: str, example: Example) -> tuple[str, Spans]:
    """Remove the marks of answers from a rendered text, and locate the answers that are trained on."""
    out, spans, size = [], [], 0
    for i, part in enumerate(re.split(f"[{ANSWER_START}{ANSWER_END}]", text)):
        if i % 2:
            spans.append((size, size + len(part)))
        out.append(part)
        size += len(part)
    if example.untrained:
        turns = [k for k, m in enumerate(example.messages) if m["role"] == "assistant"]
        if len(turns) != len(spans):
            marks = f"{plural(len(spans), 'answer')} of {plural(len(turns), 'message')} of the assistant"
            detail = f"the template marks {marks}, so nothing says which to leave out"
            raise Unusable("answers that are left out", detail)
        spans = [span for k, span in zip(turns, spans, strict=True) if k not in example.untrained]
    return "".join(out), [(a, b) for a, b in spans if a < b]


class _Around:
    """Words of a chat template before an answer, and the special token behind it: to find answers in a text that is rendered."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        question, answer = "\U000f1001", "\U000f1000"
        asked: Message = {"role": "user", "content": question}
        self.before, names = "", tokenizer.special_tokens()
        self.ends = [names[i] for i in answer_ends(template, tokenizer)]
        try:
            texts = [template.render([asked], is_open) for is_open in (False, True)]
            whole = template.render([asked, {"role": "assistant", "content": answer}], False)
        except Refused:
            return
        if texts[1].startswith(texts[0]):
            self.before = texts[1][len(texts[0]) :]
        if not self.before and whole.count(question) == whole.count(answer) == 1:
            self.before = whole.split(question)[1].split(answer)[0].strip()

    def find(self, text: str) -> Spans:
        """Locate the answers in a text. Raises Unusable: none."""
        spans, at = [], 0
        while self.before and self.ends and (at := text.find(self.before, at)) >= 0:
            at += len(self.before)
            stop = text.find(self.ends[0], at)
            spans.append((at, len(text) if stop < 0 else stop + len(self.ends[0])))
        if not spans:
            raise Unusable(
                "text without answers",
                f"{self.before!r}, which begins an answer by the chat template, does not stand in it; --corpus FILE trains on "
                "all of a text",
            )
        return spans


def _no_template(e: Example, what: str) -> NoReturn:
    raise Refused(
        f"{e.name}: has {what}, and the checkpoint has no chat template to {'find answers' if e.rendered else 'write them'} "
        "with; give one with --chat-template FILE, or write the examples as prompt and response"
    )


class Encoder:
    """Encode examples by a chat template; without one: what begins a text, prompt, response and the end of the text."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None, bos: str = "auto") -> None:
        self.tokenizer, self._special = tokenizer, tokenizer.special_pattern
        self._renderer = Renderer(template, self._special) if template else None
        self._around = _Around(template, tokenizer) if template else None
        self._prefix = np.array(tokenizer.prefix_ids if bos == "auto" else (), np.uint32)
        self._samples = 0

    def __call__(self, examples: Sequence[Example]) -> list[list[EncodedExample] | Skipped]:
        """Encode examples, in their order, each to one text or several (see Renderer). Raises Refused: see Renderer; messages
        without a template; ids that do not give the text back."""
        rendered = [self._render(e) for e in examples]
        texts = [text for r in rendered if not isinstance(r, Skipped) for text, _ in r]
        rows = iter(self.tokenizer.encode_spans(texts))
        out: list[list[EncodedExample] | Skipped] = []
        for e, r in zip(examples, rendered, strict=True):
            if isinstance(r, Skipped):
                out.append(r)
                continue
            labelled = [self._label(e.name, text, spans, *next(rows)) for text, spans in r]
            kept = [x for x in labelled if isinstance(x, EncodedExample)]
            out.append(kept or next(x for x in labelled if isinstance(x, Skipped)))
        return out

    def _render(self, e: Example) -> list[tuple[str, Spans]] | Skipped:
        try:
            parts = self._texts(e)
        except Unusable as u:
            return Skipped(e.name, u.reason, u.detail)
        kept = [(text, spans) for text, spans in parts if any(a < b for a, b in spans)]
        return kept or Skipped(e.name, "no answer", "the template writes no answer of it")

    def _texts(self, e: Example) -> list[tuple[str, Spans]]:
        if e.rendered:
            return (
                [(e.rendered, self._around.find(e.rendered))] if self._around else _no_template(e, "a text")
            )
        for text in texts_in([e.messages, e.tools]):
            if token := self._special.search(text):
                detail = f"{token[0]!r} in a message would become the token itself"
                raise Unusable("special token in its text", detail)
        if self._renderer:
            return self._renderer(e)
        if not e.response:
            return _no_template(e, "messages")
        return [(e.prompt + e.response, [(len(e.prompt), len(e.prompt) + len(e.response))])]

    def _label(
        self, name: str, text: str, spans: Spans, ids: np.ndarray, offsets: np.ndarray
    ) -> EncodedExample | Skipped:
        """Mark the tokens that cover a character of an answer. offsets: int64 (n, 2), characters of each token."""
        start = offsets[:, 0]
        # A token may stand for no character.
        end = np.maximum(offsets[:, 1], start + 1)
        trained, byte_runs = np.zeros(ids.size, bool), np.zeros(ids.size, np.int64)
        for a, b in spans:
            covers = (start < b) & (end > a)
            trained |= covers
            byte_runs[np.argmax(covers)] += len(self._special.sub("", text[a:b]).encode())
        self._check_round_trip(ids, text, name)
        if self._renderer is None:
            eos = self.tokenizer.eos_id
            if eos is None:
                raise Refused(
                    f"{self.tokenizer.source}: no end-of-text id, so nothing would end a response; give a tokenizer with one, or "
                    "a --chat-template"
                )
            ids = np.concatenate([self._prefix, ids, np.array([eos], np.uint32)])
            trained = np.concatenate([np.zeros(self._prefix.size, bool), trained, [True]])
            byte_runs = np.concatenate([np.zeros(self._prefix.size, np.int64), byte_runs, [0]])
        # Nothing precedes the first token, so nothing predicts it.
        trained[:1] = False
        if not trained.any():
            return Skipped(name, "no answer", "no token of an answer")
        return EncodedExample(ids, trained, byte_runs)

    def _check_round_trip(self, ids: np.ndarray, text: str, name: str) -> None:
        self._samples += 1
        if self._samples > ALWAYS_SAMPLED and self._samples % SAMPLED_ONE_IN:
            return
        back, want = self.tokenizer.decode(ids), self.tokenizer.normalize(text)
        # Other vocabularies may lose white space around special tokens.
        if not self.tokenizer.byte_level:
            back = self.tokenizer.normalize(back)
            back, want = ("".join(x.replace("\u2581", " ").split()) for x in (back, want))
        if difference := text_difference(back, want):
            raise Refused(
                f"{name}: encode, then decode is not the text: {difference}; is {self.tokenizer.source} the tokenizer of this "
                "checkpoint?"
            )
