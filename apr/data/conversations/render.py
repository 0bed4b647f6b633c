"""Encode examples: the text of a conversation by its chat template, and the tokens of its answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...common.errors import Refused
from ...tokenizer.chat_template import ChatTemplate, Message
from ...tokenizer.template_process import TemplateStopped
from ...tokenizer.tokenizer import Tokenizer, text_difference
from ..encode import ALWAYS_SAMPLED, SAMPLED_ONE_IN
from ..source import Skipped, Unusable
from .examples import ANSWER_END, ANSWER_START, Example

# Characters [start, end) of a text.
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class EncodedExample:
    """An example as tokens.

    ids           (n,) uint32
    trained       (n,) bool    True for tokens of an answer, and the token that ends its turn
    answer_bytes  bytes of UTF-8 of the answers without special tokens
    """

    ids: np.ndarray
    trained: np.ndarray
    answer_bytes: int


class Renderer:
    """Write conversations by a chat template, with the characters of the answers.

    Answers stand between {% generation %} and {% endgeneration %}, where the template has those. Otherwise an answer is the
    difference of the conversation up to and with it and of the conversation before it with the generation prompt; both must
    be the beginning of the whole text. White space behind the special token that ends a turn is no part of an answer.
    Today's date is undefined for the template: the same examples would be others tomorrow."""

    def __init__(self, template: ChatTemplate, special: re.Pattern[str]) -> None:
        marks = ANSWER_START, ANSWER_END
        self._template = ChatTemplate(template.text, template.source, template.tokens, marks)
        self._special = special

    def __call__(self, example: Example) -> tuple[str, Spans]:
        """Return text and answers. Raises Unusable; Refused: a beginning that is rendered otherwise than within the whole."""
        messages = list(example.messages)
        whole = self._render(messages, False)
        if self._template.has_generation:
            return _unmark(whole)
        spans = []
        for k, m in enumerate(messages):
            if m["role"] != "assistant" or not m["content"].strip():
                continue
            before = self._render(messages[:k], True)
            after = whole if k + 1 == len(messages) else self._render(messages[: k + 1], False)
            for part in (before, after):
                if not whole.startswith(part):
                    raise Refused(
                        f"{example.name}: the chat template writes a conversation up to message {k + 1} otherwise than as the "
                        f"beginning of the whole: {text_difference(part, whole)}; so "
                        "nothing says which tokens are that answer; put {% generation %} and {% endgeneration %} around the "
                        "answers in the template (--chat-template FILE), or keep one answer to an example"
                    )
            spans.append((len(before), len(before) + len(self._turn(after[len(before) :]))))
        return whole, spans

    def _render(self, messages: list[Message], prompt: bool) -> str:
        try:
            return self._template.render(messages, prompt)
        except TemplateStopped:
            # The template's fault, not the conversation's: no other one would fare better.
            raise
        except Refused as e:
            raise Unusable("refused by the template", str(e)) from None

    def _turn(self, text: str) -> str:
        """Drop white space behind the last special token: generation stops at that token."""
        end = max((m.end() for m in self._special.finditer(text)), default=len(text))
        return text if text[end:].strip() else text[:end]


def _unmark(text: str) -> tuple[str, Spans]:
    """Remove the marks of answers from a rendered text, and locate the answers."""
    out, spans, size = [], [], 0
    for i, part in enumerate(re.split(f"[{ANSWER_START}{ANSWER_END}]", text)):
        if i % 2 and part:
            spans.append((size, size + len(part)))
        out.append(part)
        size += len(part)
    return "".join(out), spans


class Encoder:
    """Encode examples by a chat template; without one: prompt, response and the end of the text."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
        self.tokenizer, self._special = tokenizer, tokenizer.special_pattern
        self._renderer = Renderer(template, self._special) if template else None
        self._samples = 0

    def __call__(self, examples: Sequence[Example]) -> list[EncodedExample | Skipped]:
        """Encode examples, in their order. Raises Refused: see Renderer; messages without a template; ids that do not give
        the text back."""
        rendered = [self._render(e) for e in examples]
        rows = iter(self.tokenizer.encode_spans([r[0] for r in rendered if not isinstance(r, Skipped)]))
        return [
            r if isinstance(r, Skipped) else self._label(e.name, *r, *next(rows))
            for e, r in zip(examples, rendered, strict=True)
        ]

    def _render(self, e: Example) -> tuple[str, Spans] | Skipped:
        try:
            text, spans = self._text(e)
        except Unusable as u:
            return Skipped(e.name, u.reason, u.detail)
        if not any(a < b for a, b in spans):
            return Skipped(e.name, "no answer", "the template writes no answer of it")
        return text, spans

    def _text(self, e: Example) -> tuple[str, Spans]:
        for m in e.messages:
            if token := self._special.search(m["content"]):
                detail = f"{token[0]!r} in a message would become the token itself"
                raise Unusable("special token in its text", detail)
        if self._renderer:
            return self._renderer(e)
        if not e.response:
            raise Refused(
                f"{e.name}: has messages, and the checkpoint has no chat template to write them with; give one with "
                "--chat-template FILE, or write the examples as prompt and response"
            )
        return e.prompt + e.response, [(len(e.prompt), len(e.prompt) + len(e.response))]

    def _label(
        self, name: str, text: str, spans: Spans, ids: np.ndarray, offsets: np.ndarray
    ) -> EncodedExample | Skipped:
        """Mark the tokens that cover a character of an answer. offsets: int64 (n, 2), characters of each token."""
        start = offsets[:, 0]
        # A token may stand for no character.
        end = np.maximum(offsets[:, 1], start + 1)
        trained = np.zeros(ids.size, bool)
        for a, b in spans:
            trained |= (start < b) & (end > a)
        answer_bytes = sum(len(self._special.sub("", text[a:b]).encode()) for a, b in spans)
        self._check_round_trip(ids, text, name)
        if self._renderer is None:
            eos = self.tokenizer.eos_id
            if eos is None:
                raise Refused(
                    f"{self.tokenizer.source}: no end-of-text id, so nothing would end a response; give a tokenizer with one, or "
                    "a --chat-template"
                )
            ids, trained = np.append(ids, np.uint32(eos)), np.append(trained, True)
        # Nothing precedes the first token, so nothing predicts it.
        trained[:1] = False
        if not trained.any():
            return Skipped(name, "no answer", "no token of an answer")
        return EncodedExample(ids, trained, answer_bytes)

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
