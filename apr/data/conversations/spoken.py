"""Conversations in other forms than lists of messages: trees, texts in turn, transcripts, questions with their answers.

Each becomes a list of messages, or is refused by what makes it ambiguous: nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ...common.errors import MalformedFile
from ...common.files import parse_value
from ...common.shell import word
from ...common.units import plural
from ..source import Unusable

Record = dict[str, Any]
# Keys of a question, and of its answer, where one object holds both: Firefly's, Capybara's and others'.
PAIRS = {
    "human": ("assistant", "gpt", "bot"),
    "user": ("assistant", "gpt", "bot"),
    "question": ("answer",),
    "input": ("output",),
    "prompt": ("response",),
}
# How HH-RLHF writes who speaks (Bai et al. 2022).
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)
# A line that would begin a turn, were the line before it empty.
INSIDE = re.compile(r"[\r\n][ \t]*(Human:|Assistant:)")
SPEAKERS = ("Human", "user"), ("Assistant", "assistant")
# Beginnings of texts that spell messages: as JSON, and as Python prints a list of them.
SPELLED = re.compile(r'\s*\[\s*\{\s*"(role|content|from|value)"\s*:')
PRINTED = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'\s*:")
# Roles of the messages of trees.
OF_TREES = ("prompter", "assistant", "user", "system")
# Commands that choose a path of a tree.
BEST_OF_NESTED = (
    "jq -c 'def best: [{role, content: .text}] + if (.replies | length) > 0 then (.replies | min_by(.rank // 99) | best) "
    "else [] end; {messages: (%s | best)}' FILE > chats.jsonl writes the best-ranked path of each tree"
)
BEST_OF_FLAT = (
    "python3 -c \"import json; %s; below = {}; [below.setdefault(r.get('parent_id'), []).append(r) for r in rows]; "
    "best = lambda r: [dict(role=r['role'], content=r['text'])] + (best(min(below[r['message_id']], key=lambda b: 99 if "
    "b.get('rank') is None else b['rank'])) if r['message_id'] in below else []); "
    '[print(json.dumps(dict(messages=best(r)))) for r in below[None]]" > chats.jsonl writes the best-ranked path of each tree'
)
ROWS_OF = {
    False: "rows = [json.loads(line) for line in open('FILE')]",
    True: "import pyarrow.parquet; rows = pyarrow.parquet.read_table('FILE').to_pylist()",
}


def is_tree(record: Record) -> bool:
    """Tell a tree of messages: a message with the replies to it, or a record with one under "prompt"."""
    root = record.get("prompt", record)
    return isinstance(root, dict) and is_message_of_tree(root) and isinstance(root.get("replies"), list)


def is_message_of_tree(record: Record) -> bool:
    """Tell one message of a tree, whose other messages are other records."""
    return isinstance(record.get("text"), str) and record.get("role") in OF_TREES


def is_texts(value: Any) -> bool:
    """Tell a list that begins with a text."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def is_transcript(value: Any) -> bool:
    """Tell a text that begins with a turn of Human and has one of Assistant."""
    return isinstance(value, str) and bool(TRANSCRIPT.match(value))


def path_of(record: Record) -> list[Record]:
    """List the messages of a tree with one path. Raises Unusable: a message with several replies."""
    node, where = (record["prompt"], "prompt") if "prompt" in record else (record, "")
    command, out = BEST_OF_NESTED % (f".{where}" if where else "."), list[Record]()
    while True:
        out.append({"role": node.get("role"), "content": node.get("text")})
        where = f"{where}.replies".removeprefix(".")
        replies = node.get("replies", [])
        if not isinstance(replies, list) or not all(isinstance(r, dict) for r in replies):
            raise Unusable("a tree", f"{where} is no list of messages")
        if len(replies) > 1:
            raise Unusable("a tree", f"{where} has {len(replies)} replies, and one path is read: {command}")
        if not replies:
            return out
        node, where = replies[0], f"{where}[0]"


def refuse_message_of_tree(name: str, record: Record) -> None:
    """Raise Unusable for a record that is one message of a tree."""
    parent = f"'parent_id' {record['parent_id']!r}" if "parent_id" in record else "no 'parent_id'"
    command = BEST_OF_FLAT % ROWS_OF[".parquet" in name]
    raise Unusable(
        "a message of a tree",
        f"the record is one message, with 'message_id' {record['message_id']!r} and {parent}: {command}",
    )


def in_turn(texts: list[Any], where: str) -> list[Record]:
    """Give texts in turn the roles user and assistant. Raises Unusable: an odd number, or something that is no text."""
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise Unusable("not a string", f"{where}[{i}] is {type(text).__name__}, between texts in turn")
    if len(texts) % 2:
        raise Unusable(
            "odd number of turns",
            f"{where} has {plural(len(texts), 'text')}, the user's and the assistant's in turn: the last has no answer; "
            "take it out",
        )
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def from_transcript(text: str, where: str) -> list[Record]:
    """Read a text of turns that begin with "Human:" and "Assistant:" behind an empty line. Raises Unusable unless they take
    turns, Human first and Assistant last, each with words."""
    parts = SPEAKER.split("\n\n" + text.lstrip())[1:]
    out = list[Record]()
    for i, (speaker, words) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        wanted, role = SPEAKERS[i % 2]
        if speaker != wanted:
            raise Unusable("turns", f"{where}: turn {i + 1} is of {speaker}, behind another of {speaker}")
        if not words.strip():
            raise Unusable("turns", f"{where}: turn {i + 1}, of {speaker}, is empty")
        if inside := INSIDE.search(words):
            raise Unusable(
                "turns",
                f"{where}: turn {i + 1}, of {speaker}, has a line that begins with {inside[1]!r} and no empty line before it",
            )
        out.append({"role": role, "content": words.strip()})
    if len(out) % 2:
        raise Unusable(
            "odd number of turns",
            f"{where} has {plural(len(out), 'turn')}: the last, of Human, has no answer",
        )
    return out


def asked_and_said(turn: Any) -> tuple[str, str] | None:
    """Find the keys of a question and of its answer in an object that holds both, in this order; None in others."""
    if not isinstance(turn, dict) or {"role", "from"} & turn.keys():
        return None
    there = {key.lower(): key for key in turn}
    found = [(there[a], there[b]) for a, said in PAIRS.items() for b in said if a in there and b in there]
    in_order = [pair for pair in found if [*turn].index(pair[0]) < [*turn].index(pair[1])]
    return in_order[0] if len(found) == len(in_order) == 1 else None


def one_by_one(turns: list[Any], where: str) -> Iterator[Any]:
    """Yield turns, of an object that holds a question and its answer two. Raises Unusable for other keys beside them."""
    for i, turn in enumerate(turns):
        if (found := asked_and_said(turn)) is None:
            yield turn
            continue
        if others := sorted(turn.keys() - {*found}):
            there = ", ".join(map(repr, others))
            raise Unusable(
                "turns", f"{where}[{i}] has {there} beside {found[0]!r} and {found[1]!r}; nothing reads that"
            )
        for role, key in zip(("user", "assistant"), found, strict=True):
            yield {"role": role, "content": one_text(turn[key], f"{where}[{i}].{key}")}


def refuse_branches(turns: list[Any], where: str) -> None:
    """Raise Unusable for messages that all have a name, of which some are parents, and are no one path, each the reply to the one
    before it."""
    objects = [t if isinstance(t, dict) else {} for t in turns]
    ids, parents = ([_name(t, *keys) for t in objects] for keys in (("message_id", "id"), ("parent_id",)))
    if None in ids or len({*ids}) < len(ids) or not {*ids} & {*parents}:
        return
    for i in range(1, len(turns)):
        if parents[i] != ids[i - 1]:
            what = f"is {parents[i]!r}" if parents[i] is not None else "is missing: another tree begins"
            raise Unusable(
                "a tree",
                f"{where}[{i}].parent_id {what}; the message before it is {ids[i - 1]!r}, and one path is read",
            )


def _name(message: Record, *keys: str) -> str | float | None:
    """Read a name of a message: the first of the keys with a text or a number, of a table with gaps a float."""
    return next((x for key in keys if isinstance(x := message.get(key), str | int | float)), None)


def behind(asked: list[Any], said: list[Any], key: str) -> list[Any]:
    """Put the messages of an answer behind those of its prompt, unless it begins with them itself. Raises Unusable for one that
    begins with another question than the prompt's."""
    if said[: len(asked)] == asked:
        return said
    first = said[0].get("role") if said and isinstance(said[0], dict) else None
    if first == "user" and any(isinstance(m, dict) and m.get("role") == "user" for m in asked):
        raise Unusable(
            "a prompt twice",
            f"{key} begins with a question that is not the prompt's; leave out the one or the other: where {key} holds whole "
            f"conversations, take prompt out of the records and give --map messages={key}",
        )
    return [*asked, *said]


def as_told(value: Any, key: str) -> Any:
    """Read a text that spells messages as JSON, as tables have them; any other value stays. Raises Unusable for one that Python
    has printed."""
    if not isinstance(value, str):
        return value
    if PRINTED.match(value):
        raise Unusable(
            "not JSON",
            f"{key} is a text that spells messages as Python prints them, {value[:24]!r}; write them as JSON: json.dumps("
            "ast.literal_eval(TEXT)) does",
        )
    if not SPELLED.match(value):
        return value
    try:
        told = parse_value(value, "a text")
    except MalformedFile:
        return value
    is_told = isinstance(told, list) and all(
        isinstance(m, dict) and {"role", "from"} & m.keys() for m in told
    )
    return told if is_told else value


def no_list(value: Any, where: str) -> str:
    """Say what stands in the place of a list of messages: a list for each of their keys, as a Sequence of datasets is stored."""
    lists = [key for key, x in value.items() if isinstance(x, list)] if isinstance(value, dict) else []
    if len(lists) < 2:
        return f"{where} is no list, or empty"
    wanted = ", ".join(f"{key!r}: ..." for key in lists)
    return f"{where} has a list for each of {', '.join(map(repr, lists))}; write one list of objects, [{{{wanted}}}, ...]"


def one_text(value: Any, key: str) -> Any:
    """Give the text of a list of one; any other value stays. Raises Unusable for several texts."""
    if not is_texts(value):
        return value
    if len(value) > 1:
        command = f"jq -c {word(f'.{key}[] as $x | .{key} = $x')} FILE > one.jsonl"
        raise Unusable(
            "several texts",
            f"{key} has {len(value)} texts, and a record is one example; {command} writes a record for each",
        )
    return value[0]
