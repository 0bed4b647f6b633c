"""Conversations: a generator's answers, with the messages before them as the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..common.errors import Refused, UsageError
from ..common.units import plural
from ..tokenizer.chat_template import ChatTemplate, Message, answer_ends, chat_ids
from ..tokenizer.tokenizer import Tokenizer
from .generate import Generator
from .sampling import Continuation, Sampling
from .streaming import TextStream


@dataclass
class Conversation:
    """A conversation with a model.

    generator  slots -> Generator with at least so many cache slots
    positions  of the model, which the conversation and its next answer must fit into. The oldest turns are
               forgotten when they do not, the system message never
    ends       ids that end an answer
    stops      texts that end an answer and are no part of it
    forgotten  number of forgotten messages
    latest     ids of the latest answer, and why it ended
    """

    template: ChatTemplate
    tokenizer: Tokenizer
    generator: Callable[[int], Generator]
    positions: int
    ends: frozenset[int]
    sampling: Sampling
    stops: Sequence[str] = ()
    messages: list[Message] = field(default_factory=list)
    forgotten: int = 0
    latest: Continuation | None = None

    def __post_init__(self) -> None:
        self.ends |= answer_ends(self.template, self.tokenizer)

    def set_system(self, text: str) -> None:
        """Set the system message; "" removes it."""
        self.messages = [m for m in self.messages if m["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def reset(self) -> None:
        """Forget every message but the system's."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def say(self, text: str) -> Iterator[str]:
        """Answer a message, piece by piece. An answer that is ended early (close, or an exception) stays in the
        conversation as far as it went. Raises Refused: the message alone is too long, or the template refuses it; the
        conversation is then as before."""
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._fitting()
        except Refused:
            self.messages.pop()
            raise
        answer: Message = {"role": "assistant", "content": ""}
        self.messages.append(answer)
        stream = TextStream(self.tokenizer, ids, self.stops)
        generator = self.generator(min(len(ids) + self.sampling.max_tokens, self.positions))
        try:
            for continuation, token in generator.run([ids], self.sampling, self.ends, reuse=True):
                self.latest = continuation
                if token not in self.ends:
                    piece = stream.feed(token)
                    answer["content"] = stream.text
                    if stream.stopped:
                        continuation.ended = "stop"
                    if piece:
                        yield piece
            rest = stream.end()
            answer["content"] = stream.text
            if rest:
                yield rest
        finally:
            answer["content"] = stream.text

    def _fitting(self) -> list[int]:
        """Encode the conversation, after forgetting the turns that leave no room for the next answer."""
        room = min(self.sampling.max_tokens, max(1, self.positions // 4))
        while True:
            ids = chat_ids(self.template, self.tokenizer, self.messages)
            if len(ids) + room <= self.positions:
                return ids
            turns = [i for i, m in enumerate(self.messages) if m["role"] != "system"]
            ends = [i for i in turns[1:] if self.messages[i]["role"] == "user"]
            if not ends:
                if len(ids) < self.positions:
                    return ids
                raise Refused(
                    f"the message has {plural(len(ids), 'token')} with what belongs to it, the model "
                    f"reads {self.positions}; shorten it"
                )
            self.forgotten += ends[0] - turns[0]
            del self.messages[turns[0] : ends[0]]


def check_messages(messages: Any) -> list[Message]:
    """Copy a caller's messages. Raises UsageError for anything but {"role": TEXT, "content": TEXT}."""
    if not isinstance(messages, list | tuple) or not messages:
        raise UsageError('messages must be a list of {"role": ..., "content": ...}, at least one')
    for i, m in enumerate(messages):
        if (
            not isinstance(m, dict)
            or not isinstance(m.get("role"), str)
            or not isinstance(m.get("content"), str)
        ):
            raise UsageError(f'messages[{i}] = {m!r}: must be {{"role": TEXT, "content": TEXT}}')
    return [dict(m) for m in messages]


def no_template(source: str) -> Refused:
    """Make the error of a checkpoint without a chat template."""
    return Refused(
        f"{source}: no chat template in it (chat_template.jinja, or chat_template in tokenizer_config.json or the "
        "metadata), so nothing says how it was trained to answer; give one with --chat-template FILE, or continue plain "
        "text without --chat"
    )
