"""Chat templates: the text and the token ids of a conversation.

A template is a program in a file of somebody else's. It runs in jinja2's sandbox, in a process of its own with limits of time
and memory, and sees nothing but the conversation and the texts of a few special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from ..common.errors import Refused
from .quoting import encode_quoted
from .template_process import TemplateProcess
from .tokenizer import Tokenizer

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": TEXT}
# Keys of tokenizer_config.json that hold further tokens by name, which a template may ask for.
TOKEN_TABLES = ("extra_special_tokens", "model_specific_special_tokens")
# What a template is handed beside the messages.
GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
# Private characters stand for special tokens that are only spelled out in a message, while the template is rendered.
QUOTES = tuple(map(chr, range(0xF0000, 0xF1000)))


class ChatTemplate:
    """Renders conversations as Hugging Face's tokenizers do.

    text    of the template
    source  file or model, for messages
    tokens  texts of special tokens by name, such as bos_token
    for_tools  text of another template that the files have for conversations with tools
    marks   written before and behind the text of {% generation %} blocks; with marks, strftime_now is undefined

    Raises Refused: jinja2 is missing, or the text is no template; TemplateStopped, one of them: compiling it takes too much."""

    def __init__(
        self,
        text: str,
        source: str,
        tokens: dict[str, str] | None = None,
        marks: tuple[str, str] | None = None,
        for_tools: str | None = None,
    ) -> None:
        self.text, self.source, self.tokens, self.for_tools = text, source, tokens or {}, for_tools
        self._process = TemplateProcess(text, source, marks)

    def marked(self, marks: tuple[str, str] | None) -> ChatTemplate:
        """Copy the template, to be rendered with marks."""
        return ChatTemplate(self.text, self.source, self.tokens, marks, self.for_tools)

    @property
    def has_generation(self) -> bool:
        """True for a template that marks answers with {% generation %}."""
        return re.search(r"{%[-+]?\s*generation\s*[-+]?%}", self.text) is not None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **more: Any) -> str:
        """Render a conversation as text; add_generation_prompt appends the words that begin an answer.

        more: further variables of the template, such as date_string or enable_thinking. Raises Refused with the
        template's own words, or jinja2's; TemplateStopped, one of them: it takes too much time or memory."""
        known = {"tools": None, "documents": None, **self.tokens, **more}
        known["add_generation_prompt"] = add_generation_prompt
        if known["tools"] and self.for_tools is not None:
            raise Refused(
                f"{self.source}: has another chat template for conversations with tools, tool_use; give the one that they are to "
                "be written by with --chat-template FILE"
            )
        return self._process.render([dict(m) for m in messages], known)


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Collect the texts of the tokens that tokenizer_config.json names, as bos_token, for the templates that ask for them."""
    tables = [config[key] for key in TOKEN_TABLES if isinstance(config.get(key), dict)]
    named = [(k, v) for k, v in config.items() if k.endswith("_token")]
    texts = [
        (k, v.get("content") if isinstance(v, dict) else v)
        for k, v in chain(named, *(t.items() for t in tables))
    ]
    return {k: v for k, v in texts if isinstance(v, str) and k.isidentifier() and k not in GIVEN}


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
