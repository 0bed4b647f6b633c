"""Shapes of records to fine-tune on: one table of those that are read. A new shape costs a row, and a reader where none fits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ...common.errors import MalformedFile
from ...common.files import parse_value
from ..documents import Document
from ..source import Unusable
from .beside import READ_BESIDE, refuse_bad, settled
from .keys import ROLES, KeyMap, Record, looks_like
from .spoken import (
    as_told,
    behind,
    from_transcript,
    in_turn,
    is_message_of_tree,
    is_texts,
    is_transcript,
    is_tree,
    no_list,
    one_by_one,
    one_text,
    path_of,
    refuse_branches,
    refuse_message_of_tree,
)

# Noncharacters of Unicode: they mark answers in a rendered text (see render.py).
ANSWER_START, ANSWER_END = "\ufdd0", "\ufdd1"
# Names that other tools have for a role.
OTHER_ROLES = {
    "developer": "system", "human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "ai": "assistant", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
# Keys of a message that say if it is trained on, and their value where it is not: Axolotl's, OpenAI's.
UNTRAINED = {"train": False, "weight": 0}
# Those that say so where they are true or false, and may be anything else: Axolotl's, ms-swift's, LLaMA-Factory's.
FLAGS = {"training": False, "trainable": False, "loss": False, "mask": True, "masked": True}
# Types of a part of a content that is text; "text" or none, and those of OpenAI's Responses.
TEXT_PARTS = ("text", "input_text", "output_text")
# The prompt that the Alpaca data was made for (Taori et al. 2023), for checkpoints without a chat template.
ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


@dataclass(frozen=True)
class Example(Document):
    """One record. text: its content as JSON.

    prompt, response  those of a pair of texts, "" in a conversation
    rendered          a text as a chat template writes it, "" where it is still to be written
    tools, more       what the template is handed beside the messages
    untrained         numbers of the assistant's messages that are context alone
    """

    messages: tuple[dict[str, Any], ...] = ()
    prompt: str = ""
    response: str = ""
    rendered: str = ""
    tools: tuple[Any, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)
    untrained: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Shape:
    """A kind of record: its name, the keys by which it is known, how it is read, which other keys are, and what else is true
    of a record of this kind."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[str, Record], Example]
    more: frozenset[str] = frozenset(READ_BESIDE)
    when: Callable[[Record], bool] = lambda record: True

    def fits(self, record: Record) -> bool:
        """Tell a record of this kind."""
        return all(key in record for key in self.keys) and self.when(record)


def example_of(name: str, value: Any, keys: KeyMap | None = None) -> Example:
    """Parse a record of any shape of the table. Raises Unusable, with the shape that it looks like."""
    if not isinstance(value, dict):
        raise Unusable("not an object", f"the record is {type(value).__name__}")
    given = settled(_filled(keys(value) if keys else value))
    fitting = [shape for shape in SHAPES if shape.fits(given)]
    if not fitting:
        raise Unusable("no field", looks_like(given))
    # Keys that --map names say more than the order of the table.
    named = {ours for ours, _ in keys.names} if keys else set()
    shape = next((s for s in fitting if not named.isdisjoint(s.keys)), fitting[0])
    refuse_bad(given)
    example = shape.read(name, given)
    if keys:
        keys.pass_over(given.keys() - {*shape.keys} - shape.more)
    return example


def _filled(value: Any) -> Any:
    """Leave out keys that are null, as Parquet files have them, but for the content of a message."""
    if isinstance(value, dict):
        return {k: _filled(v) for k, v in value.items() if v is not None or k == "content"}
    return [_filled(v) for v in value] if isinstance(value, list) else value


# What each shape becomes


def _messages(name: str, record: Record) -> Example:
    return conversation(name, record, record["messages"], "messages")


def _sharegpt(name: str, record: Record) -> Example:
    return conversation(name, record, record["conversations"], "conversations")


def as_message(turn: Any) -> Any:
    """Give a turn our keys, also one that has those of ShareGPT, and its speaker our name of the role, however it is spelled."""
    if not isinstance(turn, dict):
        return turn
    names = {"from": "role", "value": "content"}
    out = {k if names.get(k, k) in turn else names.get(k, k): v for k, v in turn.items()}
    role = out.get("role")
    if isinstance(role, str) and role.lower() in (*ROLES, *OTHER_ROLES):
        role = OTHER_ROLES.get(role.lower(), role.lower())
    return {**out, "role": role} if role is not None else out


def _alpaca(name: str, record: Record) -> Example:
    instruction = text_of(record, "instruction")
    more = text_of(record, "input") if record.get("input") else ""
    prompt = ALPACA.format(
        with_input=", paired with an input that provides further context" if more else "",
        instruction=instruction,
        input=f"### Input:\n{more}\n\n" if more else "",
    )
    return _pair(
        name, record, f"{instruction}\n\n{more}" if more else instruction, prompt, text_of(record, "output")
    )


def _asked(answer: str) -> Callable[[str, Record], Example]:
    """Make the reader of a prompt and its answer, both texts or lists of messages."""

    def read(name: str, record: Record) -> Example:
        asked, said = (as_told(one_text(record[key], key), key) for key in ("prompt", answer))
        record = {**record, "prompt": asked, answer: said}
        if not isinstance(asked, list) and not isinstance(said, list):
            prompt = text_of(record, "prompt")
            return _pair(name, record, prompt, prompt, text_of(record, answer))
        asked, said = (
            [as_message(m) for m in (x if isinstance(x, list) else [{"role": role, "content": x}])]
            for x, role in ((asked, "user"), (said, "assistant"))
        )
        turns = behind(asked, said, answer)
        return conversation(name, record, turns, f"prompt + {answer}", context=len(asked))

    return read


def _in_turn(name: str, record: Record) -> Example:
    return conversation(name, record, in_turn(record["data"], "data"), "data")


def _tree(name: str, record: Record) -> Example:
    beside = {key: record[key] for key in READ_BESIDE if key in record}
    return conversation(name, beside, path_of(record), "messages of the tree")


def _message_of_tree(name: str, record: Record) -> Example:
    refuse_message_of_tree(name, record)
    raise AssertionError


def _rendered(name: str, record: Record) -> Example:
    text = text_of(record, "text")
    if not text.strip():
        raise Unusable("no answer", "the text is empty")
    return Example(name, text, rendered=text)


def _preference(name: str, record: Record) -> Example:
    is_whole = isinstance(record["chosen"], list) or is_transcript(record["chosen"])
    ours = "messages" if is_whole and "prompt" not in record else "response"
    raise Unusable(
        "pairs of preferences",
        f"a record looks like a prompt with a chosen and a rejected answer; to tune on the chosen answers: --map {ours}=chosen",
    )


PAIRED = frozenset(READ_BESIDE | {"history"})
# Keys of a tree that say nothing of what is said in it.
OF_TREES = frozenset(
    READ_BESIDE
    | {"message_tree_id", "tree_state", "message_id", "parent_id", "role", "text", "lang", "rank", "origin"}
)
# The shapes that are read; of a record, the first whose keys it has, one that --map names before others.
SHAPES: tuple[Shape, ...] = (
    Shape("messages", ("messages",), _messages),
    Shape("conversations, as ShareGPT writes them", ("conversations",), _sharegpt),
    Shape(
        "instruction, input and output, as Alpaca has them",
        ("instruction", "output"),
        _alpaca,
        PAIRED | {"input"},
    ),
    Shape("prompt and response", ("prompt", "response"), _asked("response"), PAIRED),
    Shape("prompt and completion", ("prompt", "completion"), _asked("completion"), PAIRED),
    Shape("pairs of preferences", ("chosen", "rejected"), _preference),
    Shape("a message with replies, as OpenAssistant has them", ("replies",), _tree, OF_TREES, is_tree),
    Shape("messages of trees", ("message_id",), _message_of_tree, when=is_message_of_tree),
    Shape("text that is rendered already", ("text",), _rendered, frozenset()),
    Shape("a tree of messages, as OpenAssistant has them", ("prompt",), _tree, OF_TREES, is_tree),
    Shape("texts in turn, as UltraChat has them", ("data",), _in_turn, when=lambda r: is_texts(r["data"])),
)


def text_of(value: Record, key: str, where: str = "") -> str:
    """Read a text. Raises Unusable for another type, and for characters that no UTF-8 text holds."""
    text, where = value.get(key), where or key
    if not isinstance(text, str):
        raise Unusable("not a string", f"{where} is {type(text).__name__}")
    _check_texts(text, where)
    return text


def _check_texts(value: Any, where: str) -> None:
    """Raise Unusable for a text, at any depth, that no file could hold."""
    for text in texts_in(value):
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise Unusable("not Unicode", f"{where}: half a surrogate pair at character {e.start}") from None
        if ANSWER_START in text or ANSWER_END in text:
            raise Unusable("not Unicode", f"{where}: U+FDD0 or U+FDD1, which are no characters")


def texts_in(value: Any) -> Iterator[str]:
    """Yield every text of a value, keys of objects too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value:
            yield from texts_in(item)
        if isinstance(value, dict):
            yield from texts_in([*value.values()])


def _pair(name: str, record: Record, question: str, prompt: str, response: str) -> Example:
    if not response.strip():
        raise Unusable("no answer", "the response is empty")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    if any(record.get(key) for key in PAIRED):
        return conversation(name, record, [*earlier(record), *turns], "messages")
    return Example(name, canonical([prompt, response]), tuple(turns), prompt, response)


def earlier(record: Record) -> Iterator[Record]:
    """Yield the turns before those of a pair: "history", a list of questions with their answers."""
    history = record.get("history", [])
    if not isinstance(history, list) or not all(isinstance(p, list) and len(p) == 2 for p in history):
        raise Unusable("not a list", "history is no list of [question, answer]")
    for question, answer in history:
        yield {"role": "user", "content": question}
        yield {"role": "assistant", "content": answer}


def conversation(name: str, record: Record, turns: Any, where: str, context: int = 0) -> Example:
    """Read messages, with what a record has beside them: system, tools, chat_template_kwargs.

    turns: a list of messages, a text that spells one, or a transcript of Human and Assistant. context: as many messages at the
    beginning are not trained on. Raises Unusable."""
    turns = from_transcript(turns, where) if is_transcript(turns) else _filled(_parsed(turns))
    if not isinstance(turns, list) or not turns:
        raise Unusable("not a list", no_list(turns, where))
    refuse_branches(turns, where)
    turns = [as_message(turn) for turn in one_by_one(turns, where)]
    messages, untrained = [], set()
    if record.get("system") and not (isinstance(turns[0], dict) and turns[0].get("role") == "system"):
        turns = [{"role": "system", "content": text_of(record, "system")}, *turns]
        context += bool(context)
    for i, turn in enumerate(turns):
        message, is_trained = _message(turn, f"{where}[{i}]")
        messages.append(message)
        if message["role"] == "assistant" and not (is_trained and i >= context):
            untrained.add(i)
    if not any(is_answer(m) for i, m in enumerate(messages) if i not in untrained):
        raise Unusable("no answer", "no message of the assistant has text, or is trained on")
    tools, more = _parsed(record.get("tools") or []), record.get("chat_template_kwargs") or {}
    if not isinstance(tools, list) or not isinstance(more, dict):
        raise Unusable("tools", "tools is no list of objects, or chat_template_kwargs no object")
    _check_texts([tools, more], "tools")
    identity = [messages, tools, more, sorted(untrained)] if tools or more or untrained else messages
    return Example(
        name, canonical(identity), tuple(messages), tools=tuple(tools), more=more, untrained=frozenset(untrained)
    )  # fmt: skip


def is_answer(message: Record) -> bool:
    """Tell a message of the assistant that says something: words, or calls of tools."""
    return message["role"] == "assistant" and bool(
        (message.get("content") or "").strip() or message.get("tool_calls")
    )


def _message(turn: Any, where: str) -> tuple[Record, bool]:
    """Read (message as a template takes it, whether it may be trained on). Raises Unusable."""
    if not isinstance(turn, dict):
        key = where.split("[")[0]
        flag = (
            f"; texts in turn, the user's first: --map data={key}"
            if isinstance(turn, str) and " " not in key
            else ""
        )
        raise Unusable("role", f"{where} is {type(turn).__name__}, not an object with a role{flag}")
    flags = {key for key in FLAGS if isinstance(turn.get(key), bool)}
    message = {key: value for key, value in turn.items() if key not in UNTRAINED and key not in flags}
    if message.get("role") not in ROLES:
        raise Unusable(
            "role",
            f"{where} has role {message.get('role')!r}, not one of {', '.join(ROLES)}; --map assistant=NAME says how the file "
            "calls one",
        )
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = _joined(content, f"{where}.content")
    calls, call = _parsed(message.pop("tool_calls", None)), _parsed(message.pop("function_call", None))
    if isinstance(call, dict) and call and not calls:
        calls = [{"type": "function", "function": call}]
    if "content" not in turn and not calls:
        there = ", ".join(map(repr, turn))
        raise Unusable(
            "not a string",
            f"{where} has no content; it has {there}, and --map content=KEY says which holds it",
        )
    if content is not None or not calls:
        text_of(message, "content", f"{where}.content")
    if calls:
        message["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    _check_texts(message, where)
    for key, is_out in UNTRAINED.items():
        if key in turn and turn[key] not in (0, 1):
            raise Unusable(key, f"{where}.{key} is {turn[key]!r}; write {json.dumps(is_out)} or leave it out")
    says_no = [key for key, out in UNTRAINED.items() if key in turn and turn[key] == out]
    return message, not (says_no or any(turn[key] is FLAGS[key] for key in flags))


def _joined(parts: list[Any], where: str) -> str:
    """Join the parts of a content that are all texts. Raises Unusable for pictures and the like."""
    out = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            out.append(part)
        elif isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS:
            out.append(text_of(part, "text", f"{where}[{i}].text"))
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise Unusable("parts that are no text", f"{where}[{i}] is of type {kind!r}; apr trains on text")
    return "".join(out)


def _calls(calls: Any, where: str) -> list[Any]:
    """Read calls of tools: arguments that are JSON in a text become what they spell, as templates write them."""
    if not isinstance(calls, list) or not all(isinstance(c, dict) for c in calls):
        raise Unusable("tool calls", f"{where} is no list of objects")
    out = []
    for call in calls:
        inner = call.get("function")
        out.append({**call, "function": _with_arguments(inner)} if inner else _with_arguments(call))
    return out


def _with_arguments(call: Any) -> Any:
    return (
        {**call, "arguments": _parsed(call["arguments"])}
        if isinstance(call, dict) and "arguments" in call
        else call
    )


def _parsed(value: Any) -> Any:
    """Parse a text that spells an object or a list; anything else stays."""
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        try:
            return parse_value(value, "a text")
        except MalformedFile:
            return value
    return value


def canonical(value: Any) -> str:
    """Write JSON in one form for equal values."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
