"""Chat templates: the text and the token ids of a conversation.

A template is a program in a file of somebody else's. It runs in jinja2's sandbox, sees nothing but the conversation and
the texts of a few special tokens, and cannot make a text without end by a multiplication.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar

from ..common.errors import Refused
from ..common.packages import pip_install
from .quoting import encode_quoted
from .tokenizer import Tokenizer

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": TEXT}
MAX_ELEMENTS = 1_000_000  # that a multiplication inside a template may make
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")  # that a template may ask for by name
# Private characters stand for special tokens that are only spelled out in a message, while the template is rendered.
QUOTES = tuple(map(chr, range(0xF0000, 0xF1000)))


class ChatTemplate:
    """Renders conversations as Hugging Face's tokenizers do.

    text    of the template
    source  file or model, for messages
    tokens  texts of special tokens by name, such as bos_token
    marks   written before and behind the text of {% generation %} blocks; with marks, strftime_now is undefined

    Raises Refused: jinja2 is missing, or the text is no template."""

    def __init__(
        self,
        text: str,
        source: str,
        tokens: dict[str, str] | None = None,
        marks: tuple[str, str] | None = None,
    ) -> None:
        self.text, self.source, self.tokens = text, source, tokens or {}
        try:
            import jinja2
        except ImportError:
            raise Refused(f"chat templates need jinja2: {pip_install('jinja2')}") from None
        self._error = jinja2.TemplateError
        try:
            self._compiled = _environment(marks).from_string(text)
        except jinja2.TemplateSyntaxError as e:
            raise Refused(f"{source}: chat template, line {e.lineno}: {e.message}") from None

    @property
    def has_generation(self) -> bool:
        """True for a template that marks answers with {% generation %}."""
        return re.search(r"{%[-+]?\s*generation\s*[-+]?%}", self.text) is not None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **more: Any) -> str:
        """Render a conversation as text; add_generation_prompt appends the words that begin an answer.

        more: further variables of the template, such as date_string or enable_thinking. Raises Refused with the
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


def _environment(marks: tuple[str, str] | None) -> Any:
    import jinja2
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """{% generation %} marks the words of the model, for training; the block itself is rendered as it stands."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Callable[[], str]) -> str:
            before, behind = marks or ("", "")
            return f"{before}{caller()}{behind}"

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            if operator == "**" and (not numbers or abs(left) > 1000 or abs(right) > 100):
                raise jinja2.TemplateError(f"{left!r} ** {right!r} is too large")
            if operator == "*" and not numbers:
                parts = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
                if parts[0] * parts[1] > MAX_ELEMENTS:
                    raise jinja2.TemplateError(f"a multiplication makes more than {MAX_ELEMENTS} elements")
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
    env.globals |= {"raise_exception": raise_exception} | ({} if marks else {"strftime_now": strftime_now})
    return env


def named_tokens(configs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Collect the texts of NAMED_TOKENS from special_tokens_map.json and tokenizer_config.json; the last one wins."""
    tokens: dict[str, str] = {}
    for config in configs:
        for name in NAMED_TOKENS:
            value = config.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                tokens[name] = value
    return tokens


def answer_ends(template: ChatTemplate, tokenizer: Tokenizer) -> frozenset[int]:
    """Find the special token that the template itself puts behind an answer, such as <|im_end|>; empty without one."""
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
    """Encode a conversation and the beginning of the next answer as token ids.

    Special tokens that the template writes are those tokens. A special token that a message spells out is text: nobody
    can end a turn, or begin one in another's name, from inside a message."""
    special = tokenizer.special_pattern
    quoted: dict[str, str] = {}
    contents = "".join(m["content"] for m in messages if isinstance(m.get("content"), str))
    free = (c for c in QUOTES if c not in contents)

    def quote(match: re.Match[str]) -> str:
        if match[0] not in quoted:
            quoted[match[0]] = next(free)
        return quoted[match[0]]

    messages = [
        {**m, "content": special.sub(quote, m["content"])} if isinstance(m.get("content"), str) else m
        for m in messages
    ]
    text = template.render(messages, True, **more)
    if not quoted:
        return [int(i) for i in tokenizer.encode_marked(text)]
    return encode_quoted(tokenizer, text, {c: s for s, c in quoted.items()})
