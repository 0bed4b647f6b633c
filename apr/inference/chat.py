"""Conversations: a checkpoint's chat template, its prompts as token ids, and answers with what was said before.

A template is a program in a file of somebody else's. It runs in jinja2's sandbox, sees nothing but the conversation and
the texts of a few special tokens, and cannot make a text without end by a multiplication.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from ..checkpoints.exchange import Bundle
from ..common.errors import Refused, UsageError
from ..common.files import parse_json, read_text
from ..tokenizer.tokenizer import Tokenizer
from .generate import Continuation, Generator, Sampling
from .streaming import TextStream

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": TEXT}
LONGEST = 1_000_000  # elements that a multiplication inside a template may make
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")  # what a template may ask for by name
# Private characters stand for special tokens that are only spelled out in a message, while the template is rendered.
QUOTES = tuple(map(chr, range(0xF0000, 0xF1000)))


class ChatTemplate:
    """A template as Hugging Face's tokenizers render it: `render` gives the text of a conversation.

    text: of the template. source: for messages. tokens: texts of special tokens by name, such as bos_token. Raises
    Refused: jinja2 is missing, or this is not a template."""

    def __init__(self, text: str, source: str, tokens: dict[str, str] | None = None) -> None:
        self.text, self.source, self.tokens = text, source, tokens or {}
        try:
            import jinja2
        except ImportError:
            raise Refused("chat templates need jinja2; pip install 'jinja2>=3.1'") from None
        self._error = jinja2.TemplateError
        try:
            self._compiled = _environment().from_string(text)
        except jinja2.TemplateSyntaxError as e:
            raise Refused(f"{source}: chat template, line {e.lineno}: {e.message}") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **more: Any) -> str:
        """The text of a conversation; with the words that an answer begins with, if add_generation_prompt.

        more: what the template asks for besides, such as date_string or enable_thinking. Raises Refused with the
        template's own words, or jinja2's."""
        known = {"tools": None, "documents": None, **self.tokens, **more}
        try:
            return self._compiled.render(
                messages=[dict(m) for m in messages], add_generation_prompt=add_generation_prompt, **known
            )
        except (
            self._error,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            MemoryError,
            RecursionError,
        ) as e:
            raise Refused(f"{self.source}: its chat template refuses the conversation: {e}") from None


def _environment() -> Any:
    import jinja2
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """{% generation %} marks what a model wrote, for training; what is inside is rendered as it stands."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Callable[[], str]) -> str:
            return caller()

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            if operator == "**" and (not numbers or abs(left) > 1000 or abs(right) > 100):
                raise jinja2.TemplateError(f"{left!r} ** {right!r} is too large")
            if operator == "*" and not numbers:
                parts = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
                if parts[0] * parts[1] > LONGEST:
                    raise jinja2.TemplateError(f"a multiplication makes more than {LONGEST} elements")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(
        x: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    env = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return env


def template_of(bundle: Bundle, given: str | None = None) -> ChatTemplate | None:
    """The template of a checkpoint, or of the file `given`; None where there is none.

    Raises InputNotFound and MalformedFile (the file), Refused (see ChatTemplate)."""
    source = bundle.loaded.source
    text = bundle.chat_template if given is None else read_text(Path(given))
    return None if text is None else ChatTemplate(text, given or source, named_tokens(bundle))


def named_tokens(bundle: Bundle) -> dict[str, str]:
    """bos_token, eos_token and such of a checkpoint, as its files spell them."""
    found: dict[str, str] = {}
    special = bundle.texts.get("special_tokens_map.json")
    maps = [parse_json(special, f"{bundle.loaded.source}: special_tokens_map.json")] if special else []
    for source in (*maps, bundle.tokenizer_config):
        for name in NAMED:
            value = source.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[name] = value
    meta = bundle.loaded.metadata
    vocabulary = meta.get("tokenizer.vocabulary") or []
    for name in ("bos_token", "eos_token"):
        i = meta.get(f"tokenizer.{name}_id")
        if bundle.loaded.kind == "apr" and isinstance(i, int) and 0 <= i < len(vocabulary):
            found.setdefault(name, vocabulary[i])
    return found


def end_ids(bundle: Bundle, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Ids that end a text: those of generation_config.json and config.json, which may list several, and the tokenizer's."""
    text = bundle.texts.get("generation_config.json")
    where = f"{bundle.loaded.source}: generation_config.json"
    found: list[Any] = [] if tokenizer is None or tokenizer.eos_id is None else [tokenizer.eos_id]
    for value in (
        parse_json(text, where).get("eos_token_id") if text else None,
        bundle.loaded.metadata.get("eos_token_id"),
    ):
        found += value if isinstance(value, list) else [value]
    size = bundle.loaded.cfg.vocab_size
    return frozenset(i for i in found if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < size)


def answer_ends(template: ChatTemplate, tokenizer: Tokenizer) -> frozenset[int]:
    """The special token that the template itself puts behind an answer, such as <|im_end|>; empty where there is none."""
    mark = "\U000f1000"  # no letters: a template may change them
    question: Message = {"role": "user", "content": "?"}
    try:
        after = template.render([question, {"role": "assistant", "content": mark}], False)
    except Refused:
        return frozenset()
    behind = after[after.rfind(mark) + 1 :] if mark in after else ""
    special = {text: i for i, text in tokenizer.special_tokens().items()}
    starts = [text for text in special if text and behind.lstrip().startswith(text)]
    return frozenset([special[max(starts, key=len)]]) if starts else frozenset()


def chat_ids(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], **more: Any
) -> list[int]:
    """Token ids of a conversation and the beginning of the next answer.

    Special tokens that the template writes are those tokens. Where a message only spells one out, it is text: nobody
    can end a turn, or begin one in another's name, from inside a message."""
    special = [text for text in tokenizer.special_tokens().values() if text]
    quoted: dict[str, str] = {}
    if special:
        found = re.compile("|".join(re.escape(s) for s in sorted(special, key=len, reverse=True)))
        said = "".join(m["content"] for m in messages if isinstance(m.get("content"), str))
        free = (c for c in QUOTES if c not in said)

        def quote(match: re.Match[str]) -> str:
            if match[0] not in quoted:
                quoted[match[0]] = next(free)
            return quoted[match[0]]

        messages = [
            {**m, "content": found.sub(quote, m["content"])} if isinstance(m.get("content"), str) else m
            for m in messages
        ]
    text = template.render(messages, True, **more)
    if not quoted:
        return [int(i) for i in tokenizer.encode_marked(text)]
    back = {c: s for s, c in quoted.items()}
    ids: list[int] = []
    for part in re.split(f"([{''.join(back)}])", text):
        encode = tokenizer.encode if part in back else tokenizer.encode_marked
        ids += [int(i) for i in encode(back.get(part, part))]
    return ids


@dataclass
class Conversation:
    """A conversation with a model: what was said, and the next answer.

    positions: of the model, which the conversation and its next answer must fit into. Where they do not, the oldest
    turns are forgotten, the system's message never; `forgotten` counts the messages that were."""

    template: ChatTemplate
    tokenizer: Tokenizer
    generator: Callable[[int], Generator]  # one with at least so many slots
    positions: int
    ends: frozenset[int]
    sampling: Sampling
    stops: Sequence[str] = ()
    messages: list[Message] = field(default_factory=list)
    forgotten: int = 0
    latest: Continuation | None = None  # the ids of the latest answer, and why it ended

    def __post_init__(self) -> None:
        self.ends |= answer_ends(self.template, self.tokenizer)

    def set_system(self, text: str) -> None:
        """The system's message, from now on; "" for none."""
        self.messages = [m for m in self.messages if m["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def reset(self) -> None:
        """Forget everything but the system's message."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def say(self, text: str) -> Iterator[str]:
        """The answer to a message, piece by piece. Ended early (close, or an exception), what there is of it stays in
        the conversation. Raises Refused: the message alone is too long, or the template refuses it; it is then as if it
        had not been said."""
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
        """Ids of the conversation, after forgetting what leaves no room for the next answer."""
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
                    f"the message has {len(ids)} tokens with what belongs to it, the model reads {self.positions}; shorten it"
                )
            self.forgotten += ends[0] - turns[0]
            del self.messages[turns[0] : ends[0]]


def check_messages(messages: Any) -> list[Message]:
    """Messages as a caller gives them. Raises UsageError for what is none."""
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
    """The error of a checkpoint without a chat template."""
    return Refused(
        f"{source}: no chat template in it (chat_template.jinja, or chat_template in tokenizer_config.json or the "
        "metadata), so nothing says how it was trained to answer; give one with --chat-template FILE, or continue plain "
        "text without --chat"
    )
