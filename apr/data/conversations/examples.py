"""Examples to fine-tune on: conversations and pairs of prompt and response, read from JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import MalformedFile, Refused
from ...common.files import check_values
from ..corpus import Corpus
from ..documents import Document, Item
from ..find import find_sources
from ..json_records import read_json_records
from ..jsonl import read_jsonl
from ..source import Skipped, Source, Unusable

ROLES = ("system", "user", "assistant", "tool")
# Noncharacters of Unicode: they mark answers in a rendered text (see render.py).
ANSWER_START, ANSWER_END = "\ufdd0", "\ufdd1"
# The prompt that the Alpaca data was made for (Taori et al. 2023), for checkpoints without a chat template.
ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_JQ = "rewrite the file with jq -c"
# Shapes of other tools that are not read: keys, name, recipe.
SHAPES: tuple[tuple[set[str], str, str], ...] = (
    (
        {"conversations"},
        "conversations as ShareGPT writes them",
        f'{_JQ} \'{{messages: [.conversations[] | {{role: ({{human: "user", gpt: "assistant", system: "system"}}[.from]), '
        "content: .value}]}'",
    ),
    (
        {"chosen", "rejected"},
        "pairs of preferences",
        "for a tuning on answers alone, take the chosen one as the response",
    ),
    ({"text"}, "text that is rendered already", "train on it as text with --corpus, or give its messages"),
)
MESSAGES = f"{_JQ} '{{messages: (.prompt + .completion)}}'"
PARTS = f'{_JQ} \'.messages[].content |= if type == "array" then map(select(.type == "text").text) | join("") else . end\''


@dataclass(frozen=True)
class Example(Document):
    """One record. text: its content as JSON; prompt and response: those of a pair, "" in a conversation."""

    messages: tuple[dict[str, Any], ...] = ()
    prompt: str = ""
    response: str = ""


class Conversations(Corpus):
    """Examples of JSON Lines and JSON files, compressed or not; an unusable record is a Skipped with its line or number."""

    def _read(self, source: Source, advance: Callable[[int], None]) -> Iterator[Item]:
        read = read_json_records if source.kind == "json" else read_jsonl
        return read(source, _record, advance)


def open_conversations(path: str) -> Conversations:
    """Find the JSON Lines and JSON files of a path. Raises InputNotFound, Refused: another kind of file."""
    sources = find_sources([path])
    others = [s for s in sources if s.kind not in ("json", "jsonl")]
    if others and (len(others) == len(sources) or not Path(path).is_dir()):
        raise Refused(
            f"--instruct {others[0].path}: not JSON Lines; give a .jsonl file (also .jsonl.gz, .jsonl.zst), one object a line, "
            'or a .json file with an array of objects: {"messages": [{"role": ..., "content": ...}, ...]} or '
            '{"prompt": ..., "response": ...}'
        )
    # Such as a README beside the data.
    for source in others:
        sources.remove(source)
    return Conversations(sources)


def _record(name: str, line: bytes) -> Item:
    """Parse a record. Numbers keep their spelling's type: a template may write them."""
    try:
        text = line.decode()
        check_values(text, "the line")
        return example_of(name, json.loads(text))
    except (ValueError, RecursionError, MalformedFile) as e:
        return Skipped(name, "broken JSON", str(e))
    except Unusable as e:
        return Skipped(name, e.reason, e.detail)


def example_of(name: str, value: Any) -> Example:
    """Parse a record in any of the usual forms. Raises Unusable."""
    if not isinstance(value, dict):
        raise Unusable("not an object", f"the record is {type(value).__name__}")
    if "messages" in value:
        return _conversation(name, value)
    if "instruction" in value and "output" in value:
        instruction, more = _text(value, "instruction"), _text(value, "input") if value.get("input") else ""
        prompt = ALPACA.format(
            with_input=", paired with an input that provides further context" if more else "",
            instruction=instruction,
            input=f"### Input:\n{more}\n\n" if more else "",
        )
        question = f"{instruction}\n\n{more}" if more else instruction
        return _pair(name, question, prompt, _text(value, "output"))
    for key in ("response", "completion"):
        if "prompt" in value and key in value:
            if isinstance(value["prompt"], list):
                recipe = MESSAGES.replace(".completion", f".{key}")
                raise Unusable("prompts as lists of messages", f"apr does not read them yet; {recipe}")
            prompt = _text(value, "prompt")
            return _pair(name, prompt, prompt, _text(value, key))
    filled = {key for key, v in value.items() if isinstance(v, str | list)}
    if (shape := next((s for s in SHAPES if s[0] <= filled), None)) is not None:
        raise Unusable(shape[1], f"apr does not read them yet; {shape[2]}")
    keys = ", ".join(map(repr, list(value)[:10]))
    raise Unusable(
        "no field",
        f"there is {keys or 'nothing'}; wanted messages, or prompt and response, or instruction and output",
    )


def _text(value: dict[str, Any], key: str, where: str = "") -> str:
    """Read a text. Raises Unusable for another type, and for characters that no UTF-8 text holds."""
    text, where = value.get(key), where or key
    if not isinstance(text, str):
        raise Unusable("not a string", f"{where} is {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise Unusable("not Unicode", f"{where}: half a surrogate pair at character {e.start}") from None
    if ANSWER_START in text or ANSWER_END in text:
        raise Unusable("not Unicode", f"{where}: U+FDD0 or U+FDD1, which are no characters")
    return text


def _pair(name: str, question: str, prompt: str, response: str) -> Example:
    if not response.strip():
        raise Unusable("no answer", "the response is empty")
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": response})
    return Example(name, canonical([prompt, response]), messages, prompt, response)


def _conversation(name: str, value: dict[str, Any]) -> Example:
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise Unusable("not a list", "messages is no list, or empty")
    if value.get("tools"):
        raise Unusable("tools", "the record has tools, which are not rendered")
    for i, m in enumerate(messages):
        if not isinstance(m, dict) or m.get("role") not in ROLES:
            role = m.get("role") if isinstance(m, dict) else m
            raise Unusable("role", f"messages[{i}] has role {role!r}, not one of {', '.join(ROLES)}")
        if isinstance(m.get("content"), list):
            raise Unusable(
                "content as a list of parts", f"messages[{i}]; apr does not read them yet; {PARTS}"
            )
        if m.get("content") is None and "tool_calls" in m:
            detail = (
                f"messages[{i}] calls tools and has no text; leave such conversations, or those messages, out"
            )
            raise Unusable("tool calls", detail)
        _text(m, "content", f"messages[{i}].content")
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise Unusable("no answer", "no message of the assistant has text")
    return Example(name, canonical(messages), tuple(messages))


def canonical(value: Any) -> str:
    """Write JSON in one form for equal values."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
