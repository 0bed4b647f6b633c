"""Files of conversations as people have them: every shape and every kind of file, and what is said of the rest."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from apr.checkpoints.registry import format_of
from apr.common.errors import InputNotFound, Refused, UsageError
from apr.common.finding import FAIL, Finding
from apr.data import open as opening
from apr.data.conversations import answers, render, shapes
from apr.data.conversations.answers import answers_kept
from apr.data.conversations.beside import ASKED
from apr.data.conversations.contexts import records_kept
from apr.data.conversations.examples import open_conversations
from apr.data.conversations.keys import KeyMap
from apr.data.conversations.packed import PackedShards
from apr.data.conversations.pairs import open_pairs, pair_of
from apr.data.conversations.pairs_kept import pairs_kept
from apr.data.conversations.prepare import prepare_conversations
from apr.data.conversations.render import EncodedExample, Encoder
from apr.data.conversations.shapes import SHAPES, example_of
from apr.data.find import find_sources
from apr.data.hub_data import held_out_sources, of_split, splits_note, train_sources
from apr.data.mixture import sources_of
from apr.data.settings import DataSettings
from apr.data.source import Skipped, Source, Unusable
from apr.tokenizer.chat_template import ChatTemplate
from apr.tokenizer.tokenizer import Tokenizer
from finetune_cases import MARKED, OWN_TEMPLATE, own_tokenizer

# With tools, thoughts and calls, null or absent content.
TOOLS = (
    "{% if tools %}<|system|>\n{{ tools | tojson }}<|end|>\n{% endif %}{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def node(role: str, text: str, *replies: Any, **more: Any) -> dict[str, Any]:
    """A message of a tree, as OpenAssistant has them."""
    return {
        "message_id": f"{role} {text}",
        "role": role,
        "text": text,
        "lang": "en",
        "replies": [*replies],
        **more,
    }


ASK, SAY = turn("user", "2 + 2?"), turn("assistant", "It is 4.")
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
ADD = {"type": "function", "function": {"name": "add", "parameters": {}}}
TALK = "<|user|>\n2 + 2?<|end|>\n<|assistant|>\nIt is 4.<|end|>\n"
ANSWER = "It is 4.<|end|>"
CALLED = [ASK, turn("assistant", None, tool_calls=[CALL]), turn("tool", "4"), SAY]
# (record, --map): what the template writes of it, what is trained of that.
SOUND: dict[str, tuple[Any, str | None, str, str]] = {
    "messages": ({"messages": [ASK, SAY], "id": 7}, None, TALK, ANSWER),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "It is 4."}]},
        None, TALK, ANSWER,
    ),
    "sharegpt with a system prompt": (
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "It is 4."}]},
        None, "<|system|>\nBe brief.<|end|>\n" + TALK, ANSWER,
    ),
    "prompt and response": ({"prompt": "2 + 2?", "response": "It is 4."}, None, TALK, ANSWER),
    "prompt and completion": ({"prompt": "2 + 2?", "completion": "It is 4."}, None, TALK, ANSWER),
    "lists of messages": ({"prompt": [ASK], "completion": [SAY]}, None, TALK, ANSWER),
    "a completion that repeats the prompt": ({"prompt": "2 + 2?", "completion": [ASK, SAY]}, None, TALK, ANSWER),
    "texts that spell messages": ({"prompt": json.dumps([ASK]), "response": json.dumps([SAY])}, None, TALK, ANSWER),
    "answers in the prompt": (
        {"prompt": [ASK, SAY, ASK], "completion": [turn("assistant", "Still 4.")]}, None,
        TALK + TALK.replace("It is", "Still"), "Still 4.<|end|>",
    ),
    "alpaca": ({"instruction": "2 + 2?", "input": "", "output": "It is 4."}, None, TALK, ANSWER),
    "alpaca with a history": (
        {"instruction": "2 + 2?", "output": "It is 4.", "history": [["2 + 2?", "It is 4."]]}, None, TALK + TALK, ANSWER * 2,
    ),
    "text": ({"text": TALK}, None, TALK, ANSWER),
    "text of two turns": ({"text": TALK + TALK}, None, TALK + TALK, ANSWER * 2),
    "parts": (
        {"messages": [turn("user", [{"type": "text", "text": "2 "}, {"type": "text", "text": "+ 2?"}]), SAY]}, None, TALK, ANSWER,
    ),
    "tools": (
        {"messages": CALLED, "tools": [ADD]}, None,
        f"<|system|>\n{json.dumps([ADD])}<|end|>\n<|user|>\n2 + 2?<|end|>\n<|assistant|>\n"
        'add({"a": 2, "b": 2})<|end|>\n<|tool|>\n4<|end|>\n<|assistant|>\nIt is 4.<|end|>\n',
        'add({"a": 2, "b": 2})<|end|>' + ANSWER,
    ),
    "tools in a text, null keys": (
        {"messages": [ASK, {**SAY, "tool_calls": None, "reasoning_content": None}], "tools": json.dumps([ADD])}, None,
        f"<|system|>\n{json.dumps([ADD])}<|end|>\n" + TALK, ANSWER,
    ),
    "thoughts": (
        {"messages": [ASK, {**SAY, "reasoning_content": "two twos"}]}, None,
        TALK.replace("It is", "<think>two twos</think>It is"), "<think>two twos</think>" + ANSWER,
    ),
    "train": (
        {"messages": [ASK, {**SAY, "train": False}, ASK, {**SAY, "content": "4", "train": True}]}, None,
        TALK + TALK.replace("It is 4.", "4"), "4<|end|>",
    ),
    "weight": (
        {"messages": [ASK, {**SAY, "weight": 1}, ASK, {**SAY, "content": "4", "weight": 0}]}, None,
        TALK + TALK.replace("It is 4.", "4"), ANSWER,
    ),
    "messages in a text": ({"messages": json.dumps([ASK, SAY])}, None, TALK, ANSWER),
    "messages with ShareGPT's keys": (
        {"messages": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "It is 4."}]}, None, TALK, ANSWER,
    ),
    "roles with capitals": (
        {"messages": [turn("User", "2 + 2?"), turn("Assistant", "It is 4.")]}, None, TALK, ANSWER,
    ),
    "parts of OpenAI's Responses": (
        {"messages": [turn("user", [{"type": "input_text", "text": "2 + 2?"}]),
                      turn("assistant", [{"type": "output_text", "text": "It is 4."}])]}, None, TALK, ANSWER,
    ),
    "a call as OpenAI's first ones": (
        {"messages": [ASK, turn("assistant", None, function_call=CALL["function"]), turn("function", "4"), SAY]}, None,
        TALK.replace("<|assistant|>\n", '<|assistant|>\nadd({"a": 2, "b": 2})<|end|>\n<|tool|>\n4<|end|>\n<|assistant|>\n'),
        'add({"a": 2, "b": 2})<|end|>' + ANSWER,
    ),
    "texts in turn": ({"id": "0", "data": ["2 + 2?", "It is 4."]}, None, TALK, ANSWER),
    "a tree": (
        {"message_tree_id": "t", "prompt": node("prompter", "2 + 2?", node("assistant", "It is 4."))}, None, TALK, ANSWER,
    ),
    "a message with replies": (node("prompter", "2 + 2?", node("assistant", "It is 4.")), None, TALK, ANSWER),
    "questions with their answers": (
        {"conversations": [{"human": "2 + 2?", "assistant": "It is 4."}] * 2}, None, TALK + TALK, ANSWER * 2,
    ),
    "a transcript": (
        {"messages": "\n\nHuman: 2 + 2?\n\nAssistant: It is 4.\n\nHuman: 2 + 2?\n\nAssistant: It is 4."},
        None, TALK + TALK, ANSWER * 2,
    ),
    "messages of one path": (
        {"messages": [{**ASK, "id": "a"}, {**SAY, "id": "b", "parent_id": "a"}]}, None, TALK, ANSWER,
    ),
    "text with a number of replies": ({"text": TALK, "replies": 3, "message_id": "m", "role": "post"}, None, TALK, ANSWER),
    "lists of one text": ({"prompt": ["2 + 2?"], "completion": ["It is 4."]}, None, TALK, ANSWER),
    "map of texts in turn": ({"turns": ["2 + 2?", "It is 4."]}, "data=turns", TALK, ANSWER),
    "map of a transcript": (
        {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: It is 4.", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"},
        "messages=chosen", TALK, ANSWER,
    ),
    "map of a conversation": (
        {"data": {"dialog": [{"who": "a", "says": "2 + 2?"}, {"who": "b", "says": "It is 4."}]}},
        "messages=data.dialog,role=who,content=says,user=a,assistant=b", TALK, ANSWER,
    ),
    "map of a pair": ({"question": "2 + 2?", "answer": "It is 4."}, "prompt=question,response=answer", TALK, ANSWER),
    "map of a preference": (
        {"prompt": "2 + 2?", "chosen": "It is 4.", "rejected": "5"}, "response=chosen", TALK, ANSWER,
    ),
    "map of messages of a preference": ({"chosen": [ASK, SAY], "rejected": [ASK, ASK]}, "messages=chosen", TALK, ANSWER),
}  # fmt: skip


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.from_json(own_tokenizer(), "own", "<|endoftext|>")


@pytest.fixture(scope="module")
def encoder(tok: Tokenizer) -> Encoder:
    return Encoder(tok, ChatTemplate(TOOLS, "tools"))


def judged(
    path: str,
    folder: Path,
    tok: Tokenizer,
    text: str = TOOLS,
    keys: str | None = None,
    check: Any = answers_kept,
) -> Finding:
    """Prepare the files of a path; the finding of the check that reads them again."""
    template = ChatTemplate(text, "test")
    made = prepare_conversations(path, folder, tok, template, 255, 0.3, keys=keys)
    sides = {side: PackedShards(place, tok) for side, place in made.sides.items()}
    return check(open_conversations(path, keys), sides, tok, template)


def lines(folder: Path, rows: list[Any], name: str = "chats.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def varied(record: Any) -> list[Any]:
    """Six records of a shape that differ."""
    text = json.dumps(record)
    return [json.loads(text.replace("It is", f"It is {i} and")) for i in range(6)]


@pytest.mark.parametrize("name", SOUND)
def test_every_shape_is_trained_on_its_answers(encoder: Encoder, tok: Tokenizer, name: str) -> None:
    record, keys, text, answers = SOUND[name]
    ((e,),) = encoder([example_of("x:1", record, KeyMap.parse(keys))])
    assert tok.decode(e.ids) == text
    assert tok.decode(e.ids[e.trained]) == answers


@pytest.mark.parametrize(
    "name",
    [
        "messages",
        "lists of messages",
        "text",
        "tools",
        "weight",
        "map of a conversation",
        "messages in a text",
        "messages with ShareGPT's keys",
        "roles with capitals",
        "parts of OpenAI's Responses",
        "texts in turn",
        "a tree",
        "questions with their answers",
        "a transcript",
        "lists of one text",
        "map of texts in turn",
        "a completion that repeats the prompt",
        "texts that spell messages",
    ],
)
def test_a_shape_is_found_again_by_other_code(tmp_path: Path, tok: Tokenizer, name: str) -> None:
    record, keys, *_ = SOUND[name]
    found = judged(lines(tmp_path, varied(record)), tmp_path / "out", tok, keys=keys)
    assert found.passed, found
    again = judged(lines(tmp_path, varied(record)), tmp_path / "out", tok, keys=keys, check=records_kept)
    assert again.verdict != FAIL, again


def test_all_shapes_in_one_file_are_found_again_by_other_code(tmp_path: Path, tok: Tokenizer) -> None:
    rows = [r for record, keys, *_ in SOUND.values() if not keys for r in varied(record)]
    for check in (answers_kept, records_kept):
        found = judged(lines(tmp_path, rows), tmp_path / "out", tok, check=check)
        assert found.passed, found


def test_every_shape_of_the_table_has_a_record_here() -> None:
    has = {next(s.name for s in SHAPES if s.fits(record)) for record, keys, *_ in SOUND.values() if not keys}
    # Those two are of the table so that a record is refused by what it is.
    assert has == {s.name for s in SHAPES} - {"pairs of preferences", "messages of trees"}


@pytest.mark.parametrize("name", ["messages", "sharegpt", "train", "text of two turns"])
def test_other_tokens_than_the_answers_are_found(
    tmp_path: Path, tok: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Planted: everything but the answers is trained on."""
    right = render.Encoder._label

    def label(self: Any, *args: Any) -> Any:
        e = right(self, *args)
        assert isinstance(e, EncodedExample)
        return EncodedExample(e.ids, np.arange(e.ids.size) > 0, e.byte_runs)

    monkeypatch.setattr(render.Encoder, "_label", label)
    record, keys, *_ = SOUND[name]
    assert judged(lines(tmp_path, varied(record)), tmp_path / "out", tok, keys=keys).verdict == FAIL


def swapped(right: Callable[..., Any]) -> Callable[..., Any]:
    """Read as `right` does, with the two speakers exchanged."""
    roles = {"user": "assistant", "assistant": "user", "prompter": "assistant"}
    return lambda *args: [{**m, "role": roles.get(m.get("role"), m.get("role"))} for m in right(*args)]


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("texts in turn", "in_turn"),
        ("a transcript", "from_transcript"),
        ("a tree", "path_of"),
        ("questions with their answers", "one_by_one"),
    ],
)
def test_speakers_exchanged_by_a_reader_are_found_by_other_code(
    tmp_path: Path, tok: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str, reader: str
) -> None:
    monkeypatch.setattr(shapes, reader, swapped(getattr(shapes, reader)))
    record, keys, *_ = SOUND[name]
    assert judged(lines(tmp_path, varied(record)), tmp_path / "out", tok, keys=keys).verdict == FAIL


def test_answers_that_are_context_under_generation_blocks(tok: Tokenizer) -> None:
    ((old, new),) = MARKED["own"]
    marked = Encoder(tok, ChatTemplate(OWN_TEMPLATE.replace(old, new), "marked", {"bos_token": "<|bos|>"}))
    record = {"messages": [ASK, {**SAY, "train": False}, ASK, {**SAY, "content": "4"}]}
    ((e,),) = marked([example_of("x:1", record)])
    assert tok.decode(e.ids[e.trained]) == "4<|end|>"


ROWS = varied({"messages": [ASK, SAY], "tools": [ADD]})


def as_parquet(path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    other = {"messages": [ASK, {**SAY, "content": "4", "reasoning_content": "so"}], "tools": [ADD]}
    # A schema of all keys: what a message has not is null.
    rows = [{**r, "tools": json.dumps(r["tools"])} for r in [*ROWS, other]]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)


def as_bytes(path: Path) -> None:
    """Texts as some writers have them, messages as maps, and a column of what JSON has no kind for."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    turns = [[[(k, v.encode()) for k, v in m.items()] for m in r["messages"]] for r in ROWS]
    kind = pa.list_(pa.map_(pa.string(), pa.binary()))
    tools = [json.dumps(r["tools"]) for r in ROWS]
    day = [[{"at": datetime.date(2026, 1, 1), "price": Decimal("1.5"), "raw": b"\xff"}]] * len(ROWS)
    pq.write_table(pa.table({"messages": pa.array(turns, kind), "tools": tools, "day": day}), path)


def as_lines(path: Path) -> None:
    lines(path.parent, ROWS, path.name)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": as_lines,
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": as_lines,
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "a.jsonl.zst": lambda path: path.write_bytes(
        zstandard.ZstdCompressor().compress("\n".join(map(json.dumps, ROWS)).encode())
    ),
    "a.parquet": as_parquet,
    "bytes.parquet": as_bytes,
    "array.jsonl": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "array of a line.jsonl": lambda path: path.write_text(json.dumps(ROWS) + "\n"),
}


@pytest.mark.parametrize(("name", "is_folder"), [*((name, False) for name in WRITERS), ("a.parquet", True)])
def test_every_kind_of_file_is_read(tmp_path: Path, tok: Tokenizer, name: str, is_folder: bool) -> None:
    (tmp_path / "in").mkdir()
    WRITERS[name](tmp_path / "in" / name)
    (tmp_path / "in" / "README.md").write_text("# data")
    path = tmp_path / "in" if is_folder else tmp_path / "in" / name
    read = [x for x in open_conversations(str(path)) if not isinstance(x, Skipped)]
    assert [x.text for x in read[:6]] == [example_of("", row).text for row in ROWS]
    if name in ("a.json", "a.parquet", "bytes.parquet", "array.jsonl"):
        assert judged(str(path), tmp_path / "out", tok).passed


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_under_jsonl_that_is_cut_off_or_long_is_no_wrong_answer(
    tmp_path: Path, tok: Tokenizer, monkeypatch: pytest.MonkeyPatch, indent: int | None
) -> None:
    """The check cannot follow such a file, and says so; it does not take its lines for records."""
    path = tmp_path / "array.jsonl"
    text = json.dumps(ROWS, indent=indent)
    path.write_text(text[: text.rindex("{")])
    found = judged(str(path), tmp_path / "cut", tok)
    assert found.passed, found
    path.write_text(text)
    monkeypatch.setattr(answers, "BUDGET_BYTES", len(text) // 2)
    found = judged(str(path), tmp_path / "long", tok)
    assert found.passed, found


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        (
            {
                "system": "S",
                "conversations": [{"from": f, "value": v} for f, v in (("system", "T"), ("human", "q"), ("gpt", "a"))],
            },
            [turn("system", "T"), turn("user", "q"), turn("assistant", "a")],
        ),
        ({"system": "S", "messages": [turn("System", "T"), ASK, SAY]}, [turn("system", "T"), ASK, SAY]),
        ({"messages": json.dumps([ASK, {**SAY, "tool_calls": None}])}, [ASK, SAY]),
        ({"messages": [ASK, {**SAY, "tool_calls": "[]"}]}, [ASK, SAY]),
        ({"messages": [ASK, {**SAY, "function_call": "auto"}]}, [ASK, SAY]),
        (
            {"messages": [ASK, turn("assistant", None, tool_calls=[{"name": "g"}], function_call={"name": "f"})]},
            [ASK, turn("assistant", None, tool_calls=[{"name": "g"}])],
        ),
    ],
    ids=["sharegpt's system", "capital system", "nulls in a text", "no calls in a text", "auto", "both kinds of calls"],
)  # fmt: skip
def test_what_a_conversation_becomes(record: Any, messages: list[Any]) -> None:
    assert list(example_of("x", record).messages) == messages


def test_calls_that_are_none_are_no_answer() -> None:
    with pytest.raises(Unusable):
        example_of("x", {"messages": [ASK, turn("assistant", None, tool_calls="[]")]})


def test_keys_may_change_places() -> None:
    keys = KeyMap.parse("chosen=rejected,rejected=chosen")
    assert keys({"prompt": "q", "chosen": "a", "rejected": "b"}) == {
        "prompt": "q",
        "chosen": "b",
        "rejected": "a",
    }


def test_a_map_is_for_the_records_that_have_its_keys(tmp_path: Path, tok: Tokenizer) -> None:
    """Others have our keys, or lack the answer: those are counted."""
    theirs = [{"q": f"{i} + 2?", "a": f"It is {i + 2}."} for i in range(12)]
    ours = [{"prompt": f"{i} - 2?", "response": f"That gives {i - 2}."} for i in range(12)]
    talks = [{"dialog": [turn("user", f"{i} * 2?"), turn("assistant", f"So {2 * i}.")]} for i in range(12)]
    path = lines(tmp_path, [*theirs, *ours, *talks, {"q": "9 + 9?"}, {"messages": [ASK, SAY]}])
    found = judged(path, tmp_path / "out", tok, keys="prompt=q,response=a,messages=dialog")
    assert found.passed, found
    assert "38 records" in found.measured


@pytest.mark.parametrize(
    ("record", "reason", "words"),
    [
        ({"dialog": [{"speaker": "a", "text": "b"}]}, "no field", "--map messages=dialog,role=speaker,content=text"),
        ({"messages_": [{"role": "user", "content": "b"}]}, "no field", "--map messages=messages_"),
        ({"question": "a", "answer": "b"}, "no field", "--map prompt=question,response=answer"),
        ({"Question": "a", "Answer": "b"}, "no field", "--map prompt=Question,response=Answer"),
        ({"body": "a"}, "no field", "--corpus FILE --content-field body"),
        ({"x": 1}, "no field", "wanted messages"),
        ({"version": 1, "data": [{"messages": [ASK, SAY]}]}, "no field", "the records are in 'data': jq -c '.data[]' FILE"),
        ({"conversation": [{"input": "a", "output": "b"}]}, "no field", "--map messages=conversation"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pairs of preferences", "--map response=chosen"),
        ({"chosen": [ASK, SAY], "rejected": [ASK]}, "pairs of preferences", "--map messages=chosen"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "b"}, "pairs of preferences", "--map messages=chosen"),
        ({"data": ["q", "a", "q"]}, "odd number of turns", "data has 3 texts"),
        ({"data": ["q", "a", "q", {"a": 1}]}, "not a string", "data[3] is dict"),
        ({"turns": ["q", "a"]}, "no field", "--map data=turns"),
        ({"conversation": ["q", "a"]}, "no field", "--map data=conversation"),
        ({"messages": ["q", "a"]}, "role",
         "messages[0] is str, not an object with a role; texts in turn, the user's first: --map data=messages"),
        ({"dialogue": "Human: q\n\nAssistant: a"}, "no field", "--map messages=dialogue"),
        ({"messages": "\n\nHuman: q\n\nAssistant: a\n\nAssistant: b"}, "turns", "turn 3 is of Assistant, behind another"),
        ({"messages": "\n\nHuman: q\n\nAssistant: a\n\nHuman: b"}, "odd number of turns", "messages has 3 turns"),
        ({"messages": "\n\nHuman: q\n\nAssistant: \n\nHuman: b\n\nAssistant: c"}, "turns", "turn 2, of Assistant, is empty"),
        ({"messages": "Bot: a\n\nHuman: q\n\nAssistant: a"}, "not a list", "messages is no list"),
        ({"conversations": [{"human": "q", "assistant": "a", "context": "c"}]}, "turns", "has 'context' beside 'human'"),
        ({"conversations": [{"assistant": "a", "human": "q"}]}, "role", "conversations[0] has role None"),
        ({"conversations": [{"human": "q", "output": "a"}]}, "role", "conversations[0] has role None"),
        ({"conversations": [{"from": "human", "markdown": "q"}]}, "not a string", "it has 'role', 'markdown', and --map content"),
        ({"prompt": "q", "completion": ["a", "b"]}, "several texts", "completion has 2 texts"),
        ({"messages": [{"question": "q", "answer": ["a", "b"]}]}, "several texts", "messages[0].answer has 2 texts"),
        ({"messages": "Human: q\nAssistant: a\n\nAssistant: b"}, "turns", "turn 1, of Human, has a line that begins with 'Assi"),
        ({"messages": "Human: q\n\nAssistant: a\r\n\r\nHuman: b"}, "turns", "turn 2, of Assistant, has a line that begins"),
        (
            {"messages": [{"id": n, "parent_id": float(min(n - 1, 1)), "role": "user", "content": "q"} for n in (1, 2, 3)]},
            "a tree", "parent_id is 1.0",
        ),
        ({"prompt": ["a", "b"], "response": ["c", "d"]}, "several texts", "prompt has 2 texts"),
        (node("prompter", "q", node("assistant", "a"), node("assistant", "b")), "a tree", "replies has 2 replies"),
        ({"prompt": node("prompter", "q", node("robot", "a"))}, "role", "messages of the tree[1] has role 'robot'"),
        ({"prompt": node("prompter", "q", "none")}, "a tree", "prompt.replies is no list"),
        ({"prompt": node("prompter", "q")}, "no answer", "no message of the assistant"),
        ({"message_id": "b", "parent_id": "a", "role": "assistant", "text": "x"}, "a message of a tree", "'parent_id' 'a'"),
        ({"messages": [{**ASK, "id": "a"}, {**SAY, "id": "b", "parent_id": "a"}, {**SAY, "id": "c", "parent_id": "a"}]},
         "a tree", "messages[2].parent_id is 'a'; the message before it is 'b'"),
        ({"messages": [{**ASK, "id": 1}, {**SAY, "id": 2, "parent_id": 1}, {**ASK, "id": 3}, {**SAY, "id": 4, "parent_id": 3}]},
         "a tree", "messages[2].parent_id is missing: another tree begins"),
        ({"messages": [turn("robot", "b")]}, "role", "--map assistant=NAME"),
        ({"messages": [ASK, {**SAY, "weight": 0.5}]}, "weight", "weight is 0.5; write 0 or leave it out"),
        ({"messages": [turn("user", [{"type": "image"}]), SAY]}, "parts that are no text", "messages[0].content[0]"),
        ({"messages": [turn("user", None), SAY]}, "not a string", "messages[0].content"),
        ({"messages": [ASK, {**SAY, "train": "no"}]}, "train", "messages[1].train"),
        ({"messages": [ASK, {**SAY, "train": False}]}, "no answer", "trained on"),
        ({"messages": [ASK, turn("assistant", None, tool_calls="f")]}, "tool calls", "messages[1].tool_calls"),
    ],
)  # fmt: skip
def test_a_record_of_another_shape_is_named_with_the_flag_that_reads_it(
    record: Any, reason: str, words: str
) -> None:
    with pytest.raises(Unusable) as e:
        example_of("x:1", record)
    assert e.value.reason == reason
    assert words in e.value.detail


TREE = node(
    "prompter",
    "q",
    node("assistant", "bad", rank=1),
    node("assistant", "good", node("prompter", "more?"), rank=0),
)


def flat(message: Any, parent: str | None = None) -> list[Any]:
    below = [row for reply in message["replies"] for row in flat(reply, message["message_id"])]
    return [{k: v for k, v in message.items() if k != "replies"} | {"parent_id": parent}, *below]


@pytest.mark.parametrize(
    ("name", "rows"), [("nested", [{"prompt": TREE}]), ("root", [TREE]), ("flat", flat(TREE))]
)
def test_the_command_for_a_tree_writes_its_best_path(tmp_path: Path, name: str, rows: list[Any]) -> None:
    """The command is run: what it writes is read."""
    path = lines(tmp_path, rows)
    first = next(iter(open_conversations(path)))
    assert isinstance(first, Skipped)
    if name != "flat" and not shutil.which("jq"):
        pytest.skip("needs jq")
    command = re.search(r"(jq|python3) -c .* > chats.jsonl", first.detail)
    assert command
    written = (
        command[0].replace("python3", sys.executable, 1).replace("FILE", path).replace("> chats", "> out")
    )
    subprocess.run(written, shell=True, check=True, cwd=tmp_path)
    (read,) = open_conversations(str(tmp_path / "out.jsonl"))
    assert not isinstance(read, Skipped)
    assert [m["content"] for m in json.loads(read.text or "")] == ["q", "good", "more?"]


def test_a_list_for_each_key_is_no_list_of_messages() -> None:
    """As a Sequence of datasets is stored in Parquet."""
    with pytest.raises(Unusable) as e:
        example_of("x", {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}})
    assert "messages has a list for each of 'role', 'content'; write one list of objects" in e.value.detail


def test_the_command_for_several_texts_writes_a_record_for_each(tmp_path: Path) -> None:
    path = lines(tmp_path, [{"prompt": "q", "completion": ["a", "b"]}])
    (skipped,) = open_conversations(path)
    assert isinstance(skipped, Skipped)
    if not shutil.which("jq"):
        pytest.skip("needs jq")
    command = re.search(r"jq -c .* > one.jsonl", skipped.detail)
    assert command
    subprocess.run(command[0].replace("FILE", path), shell=True, check=True, cwd=tmp_path)
    read = [x for x in open_conversations(str(tmp_path / "one.jsonl")) if not isinstance(x, Skipped)]
    assert [json.loads(x.text or "") for x in read] == [["q", "a"], ["q", "b"]]


def test_pairs_of_transcripts_are_read_and_found_again(tmp_path: Path, tok: Tokenizer) -> None:
    """HH-RLHF: what both begin with is the prompt."""
    talk = "\n\nHuman: {0} + {0}?\n\nAssistant: Add.\n\nHuman: And?\n\nAssistant: "
    rows = [
        {"chosen": talk.format(i) + f"It is {2 * i}.", "rejected": talk.format(i) + f"No {i}."}
        for i in range(6)
    ]
    pair = pair_of("x", rows[3])
    assert [m["content"] for m in json.loads(pair.prompt)] == ["3 + 3?", "Add.", "And?"]
    assert [[*e.messages][-1]["content"] for e in (pair.chosen, pair.rejected)] == ["It is 6.", "No 3."]
    path, template = lines(tmp_path, rows), ChatTemplate(TOOLS, "test")
    made = prepare_conversations(path, tmp_path / "out", tok, template, 255, 0.3, pairs=True)
    sides = {side: PackedShards(place, tok) for side, place in made.sides.items()}
    assert pairs_kept(open_pairs(path), sides, tok, template).passed
    swapped = [{"chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    assert pairs_kept(open_pairs(lines(tmp_path, swapped, "b.jsonl")), sides, tok, template).verdict == FAIL


@pytest.mark.parametrize("beside", [{"text": "x"}, {"messages": [turn("user", "x"), turn("assistant", "y")]}])
def test_what_a_map_names_is_read_whatever_is_beside_it(beside: dict[str, Any]) -> None:
    keys = KeyMap.parse("data=turns")
    example = example_of("x", {"turns": ["q", "a"], **beside}, keys)
    assert [m["content"] for m in example.messages] == ["q", "a"]
    assert keys.unread == {*beside}


def test_a_prompt_beside_whole_dialogs_would_be_said_twice() -> None:
    talk = "\n\nHuman: 3 + 3?\n\nAssistant: "
    with pytest.raises(Unusable) as e:
        pair_of("x", {"prompt": talk.rstrip(), "chosen": talk + "6", "rejected": talk + "7"})
    assert "whole dialogs of Human and Assistant; leave out the prompt" in e.value.detail


def test_text_without_answers_says_what_is_missing(encoder: Encoder) -> None:
    (got,) = encoder([example_of("x:1", {"text": "Once upon a time."})])
    assert isinstance(got, Skipped)
    assert "'<|assistant|>\\n', which begins an answer" in got.detail
    assert "--corpus" in got.detail


def test_special_tokens_in_calls_and_thoughts_leave_the_example_out(encoder: Encoder) -> None:
    bad = {**CALL, "function": {"name": "add", "arguments": {"a": "<|end|>"}}}
    for m in (turn("assistant", "", tool_calls=[bad]), {**SAY, "reasoning_content": "<|end|>"}):
        (got,) = encoder([example_of("x:1", {"messages": [ASK, m]})])
        assert isinstance(got, Skipped)
        assert got.reason == "special token in its text"


def test_one_file_of_a_folder_that_is_unusable_stops_the_run(tmp_path: Path, tok: Tokenizer) -> None:
    lines(tmp_path, ROWS * 4)
    lines(tmp_path, [{"question": str(i), "answer": "b"} for i in range(3)], "other.jsonl")
    with pytest.raises(Refused, match=r"other\.jsonl: 3 of 3 records.*--map prompt=question,response=answer"):
        judged(str(tmp_path), tmp_path / "out", tok)


@pytest.mark.parametrize("text", ["a", "message=a", "messages=", "robot=b"])
def test_a_map_of_unknown_names_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="OURS=THEIRS"):
        KeyMap.parse(text)


@pytest.mark.parametrize("keys", ["messages=dialgo", "messages=dialog,role=speakr", "prompt=a.b"])
def test_a_map_of_keys_that_no_record_has_is_refused(tmp_path: Path, tok: Tokenizer, keys: str) -> None:
    rows = [{"dialog": [{"speaker": "user", "content": "a"}, {"speaker": "assistant", "content": "b"}]}] * 3
    with pytest.raises(Refused, match=r"no record of .* has '(dialgo|speakr|a.b)'; they have 'dialog'"):
        prepare_conversations(str(lines(tmp_path, rows)), tmp_path / "out", tok, None, 64, 0.3, keys=keys)


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        ('{"prompt": "caf\xe9", "response": "b"}\n'.encode("latin-1"), "not UTF-8", "iconv -f WINDOWS-1252"),
        (json.dumps(ROWS[0], indent=1).encode(), "broken JSON", "jq -c . FILE"),
        (b"[1]\n[2]\n", "not an object", "the record is list"),
        (b"[ERROR] no data\n", "broken JSON", "Expecting value"),
    ],
)
def test_lines_that_are_no_records_are_named_with_a_remedy(
    tmp_path: Path, data: bytes, reason: str, words: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    first = next(iter(open_conversations(str(tmp_path / "a.jsonl"))))
    assert isinstance(first, Skipped)
    assert first.reason == reason
    assert words in first.detail


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize(
    ("name", "encoding", "delimiter"),
    [
        ("a.csv", "utf-8", ","),
        ("b.tsv", "utf-8", "\t"),
        ("excel.csv", "utf-16", ";"),
        ("bom.csv", "utf-8-sig", ","),
    ],
)
def test_a_table_is_refused_with_the_command_that_makes_records(
    tmp_path: Path, name: str, encoding: str, delimiter: str, as_folder: bool
) -> None:
    """The command is run: it makes the records, however Excel wrote the table."""
    table = tmp_path / name
    with table.open("w", newline="", encoding=encoding) as f:
        csv.writer(f, delimiter=delimiter).writerows([["prompt", "completion"], ['a, "b"; c', "d\u00e9\nf"]])
    with pytest.raises(Refused) as e:
        open_conversations(str(tmp_path if as_folder else table))
    command = re.search(r"python3 -c .* > data.jsonl", str(e.value))
    assert command
    subprocess.run(command[0].replace("python3", sys.executable, 1), shell=True, check=True, cwd=tmp_path)
    assert json.loads((tmp_path / "data.jsonl").read_text()) == {
        "prompt": 'a, "b"; c',
        "completion": "d\u00e9\nf",
    }
    with pytest.raises(Refused, match="DictReader"):
        find_sources([table])


def archive(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as z:
            z.writestr("a.jsonl", "{}")
    else:
        with tarfile.open(fileobj=out, mode="w") as t:
            t.addfile(tarfile.TarInfo("a.jsonl"))
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", gzip.compress(b"{}"), "packed by gzip; give it a name with .gz"),
        ("a.json", zstandard.ZstdCompressor().compress(b"{}"), "packed by zstd"),
        ("a.zip", archive("zip"), "a zip archive or a spreadsheet"),
        ("a.tar", archive("tar"), "tar -xf"),
        ("a.arrow", b"ARROW1\0\0" + bytes(64), "open_file(sys.argv[1])"),
        ("a.db", b"SQLite format 3\0", "sqlite3 -json"),
        ("a.pkl", b"\x80\x04\x95\0", "a pickle, which is never loaded"),
        ("a.txt", b"PAR1 is a word, and BZh is one", ""),
        ("b.txt", ("x" * 4095 + "\u00e9").encode(), ""),
    ],
    # Packed bytes hold the time, and workers would collect tests of other names.
    ids=lambda x: x if isinstance(x, str) else "data",
)
def test_a_file_that_is_something_else_than_its_name_says_is_named(
    tmp_path: Path, name: str, data: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(data)
    if not words:
        assert len(find_sources([tmp_path / name])) == 1
        return
    with pytest.raises(Refused, match=re.escape(words)):
        find_sources([tmp_path / name])


@pytest.mark.parametrize("below", ["", "train/"])
def test_a_folder_of_save_to_disk_is_refused_with_the_command_that_makes_parquet(
    tmp_path: Path, below: str
) -> None:
    (tmp_path / below).mkdir(exist_ok=True)
    for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
        (tmp_path / below / name).write_text("{}")
    with pytest.raises(
        Refused, match=rf"load_from_disk\(.*\.to_parquet\(.* {tmp_path}/?{below.rstrip('/')}$"
    ):
        open_conversations(str(tmp_path))


def test_values_that_json_has_not_are_texts_in_messages(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    said = {**SAY, "when": datetime.datetime(2026, 1, 2, 3, 4), "price": Decimal("1.50"), "raw": b"\xff"}
    pq.write_table(pa.Table.from_pylist([{"messages": [ASK, said]}]), tmp_path / "a.parquet")
    (found,) = open_conversations(str(tmp_path / "a.parquet"))
    assert not isinstance(found, Skipped)
    assert found.messages[1] == {**SAY, "when": "2026-01-02 03:04:00", "price": "1.50", "raw": {"bytes": 1}}


@pytest.mark.parametrize("picture", [{"bytes": b"\x89PNG", "path": None}, b"\x89PNG"])
def test_a_picture_whose_bytes_are_no_text_is_one(tmp_path: Path, picture: Any) -> None:
    """The bytes became null, which is left out: such records were trained on without their pictures."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist([{"messages": [ASK, SAY], "image": picture}]), tmp_path / "a.parquet")
    (found,) = open_conversations(str(tmp_path / "a.parquet"))
    assert isinstance(found, Skipped)
    assert "there is 'image'" in found.detail


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"prompt": "2 + 2?", "completion": [ASK, SAY]}, [ASK, SAY]),
        ({"prompt": [turn("system", "S")], "completion": [ASK, SAY]}, [turn("system", "S"), ASK, SAY]),
        ({"prompt": [ASK], "response": [turn("human", "2 + 2?"), SAY]}, [ASK, SAY]),
        ({"prompt": json.dumps([ASK]), "response": json.dumps([SAY])}, [ASK, SAY]),
        ({"prompt": "2 + 2?", "response": '[{"content": 1}]'}, [ASK, turn("assistant", '[{"content": 1}]')]),
    ],
)
def test_a_prompt_that_the_answer_repeats_stands_once(record: Any, messages: list[Any]) -> None:
    assert list(example_of("x", record).messages) == messages


@pytest.mark.parametrize("key", ["completion", "response"])
def test_an_answer_that_begins_with_another_question_is_refused(key: str) -> None:
    with pytest.raises(Unusable, match="a prompt twice"):
        example_of("x", {"prompt": "Other?", key: [ASK, SAY]})


def test_messages_as_python_prints_them_are_no_text() -> None:
    for record in ({"prompt": str([ASK]), "completion": "4"}, {"prompt": "q", "completion": str([SAY])}):
        with pytest.raises(Unusable, match="not JSON"):
            example_of("x", record)
    with pytest.raises(Unusable, match="not JSON"):
        pair_of("x", {"prompt": "q", "chosen": str([SAY]), "rejected": "b"})


def test_pairs_that_are_spelled_in_texts_are_messages() -> None:
    worse = {**SAY, "content": "5"}
    want = pair_of("x", {"chosen": [ASK, SAY], "rejected": [ASK, worse]})
    spelled = {"chosen": json.dumps([ASK, SAY]), "rejected": json.dumps([ASK, worse])}
    assert pair_of("x", spelled) == want
    assert pair_of("x", {**spelled, "prompt": ASK["content"]}) == want
    assert pair_of("x", {**spelled, "prompt": f"user: {ASK['content']}"}) == want
    with pytest.raises(Unusable, match="a prompt twice"):
        pair_of("x", {**spelled, "prompt": "Other words"})


# The Hub


class Hub:
    """What data_files asks of huggingface_hub."""

    def __init__(self, folder: Path, is_up: bool = True) -> None:
        self.folder, self.is_up, self.asked = folder, is_up, []

    def list_repo_files(self, repo: str, repo_type: str, revision: str | None) -> list[str]:
        if not self.is_up:
            raise OSError("no route")
        return [str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file()]

    def snapshot_download(self, repo: str, repo_type: str, revision: str | None, **more: Any) -> str:
        self.asked.append((repo, repo_type, revision, more))
        return str(self.folder)


@pytest.mark.parametrize("is_up", [True, False])
def test_a_data_set_of_the_hub_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_up: bool) -> None:
    package = pytest.importorskip("huggingface_hub")
    folder = tmp_path / "snapshot"
    (folder / "data").mkdir(parents=True)
    as_parquet(folder / "data" / "train-00000-of-00001.parquet")
    lines(folder / "data", ROWS, "test-00000-of-00001.jsonl")
    (folder / "README.md").write_text("# card")
    hub = Hub(folder, is_up)
    monkeypatch.setattr(package, "list_repo_files", hub.list_repo_files)
    monkeypatch.setattr(package, "snapshot_download", hub.snapshot_download)
    assert len(list(open_conversations("hf://datasets/org/name"))) == 7
    assert len(list(open_conversations("hf://datasets/org/name@main:test"))) == 6
    repo, kind, revision, more = hub.asked[-1]
    assert (repo, kind, revision) == ("org/name", "dataset", "main")
    assert more == (
        {"allow_patterns": ["data/test-00000-of-00001.jsonl"]} if is_up else {"local_files_only": True}
    )
    assert [s.path.name for s in held_out_sources("hf://datasets/org/name")] == ["test-00000-of-00001.jsonl"]
    assert [s.kind for s in train_sources("hf://datasets/org/name")] == ["parquet"]
    with pytest.raises(Refused, match="no file of a split 'dev'; there is train, test"):
        open_conversations("hf://datasets/org/name:dev")
    monkeypatch.setattr(package, "snapshot_download", Hub.list_repo_files)
    if not is_up:
        with pytest.raises(InputNotFound, match="cannot be downloaded: no route"):
            open_conversations("hf://datasets/org/name")


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="hf://datasets/org/name"):
        open_conversations("hf://org/name")


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (["train.jsonl", "test.jsonl", "README.md"], None, ["train.jsonl"]),
        (["data/train-0-of-2.parquet", "data/train-1-of-2.parquet"], None, 2),
        (["chats.jsonl.gz", "dataset_infos.json"], None, ["chats.jsonl.gz"]),
        (["a/train-0.parquet", "b/train-0.parquet"], "a/train", ["a/train-0.parquet"]),
        (["training_data.json"], None, ["training_data.json"]),
        (["a/train-0.parquet", "b/train-0.parquet"], None, "say which, such as x:a/train, x:b/train"),
        (["test.jsonl"], None, "no file of a split 'train'; there is test"),
        (["README.md"], None, "no Parquet"),
        (["train_test_split/train.jsonl", "train_test_split/test.jsonl"], None, ["train_test_split/train.jsonl"]),
        (["train_test_split/train.jsonl", "train_test_split/test.jsonl"], "test", ["train_test_split/test.jsonl"]),
        (["train_val.jsonl", "test.jsonl"], "val", ["train_val.jsonl"]),
        (["Train.jsonl", "Test.jsonl"], None, ["Train.jsonl"]),
        (["gsm8k.jsonl", "gsm.jsonl"], "gsm", ["gsm.jsonl"]),
    ],
)  # fmt: skip
def test_the_files_of_a_split(names: list[str], split: str | None, chosen: Any) -> None:
    if isinstance(chosen, str):
        with pytest.raises(Refused, match=chosen):
            of_split("x", names, split)
    else:
        got = of_split("x", names, split)
        assert len(got) == chosen if isinstance(chosen, int) else got == chosen


# Keys beside a conversation that say what it is for


BESIDE: dict[str, tuple[Any, str, str]] = {
    "a system prompt under another name": (
        {"messages": [ASK, SAY], "system_prompt": "Be brief."}, "<|system|>\nBe brief.<|end|>\n" + TALK, ANSWER,
    ),
    "the same beside a pair of texts": (
        {"instruction": "2 + 2?", "output": "It is 4.", "system_message": "Be brief."},
        "<|system|>\nBe brief.<|end|>\n" + TALK, ANSWER,
    ),
    "a system prompt that has our name too": (
        {"prompt": "2 + 2?", "response": "It is 4.", "system": "Be brief.", "system_prompt": "x"},
        "<|system|>\nBe brief.<|end|>\n" + TALK, ANSWER,
    ),
    "tools beside a pair of texts": (
        {"prompt": "2 + 2?", "response": "It is 4.", "tools": [ADD]},
        f"<|system|>\n{json.dumps([ADD])}<|end|>\n" + TALK, ANSWER,
    ),
    "an answer without loss": (
        {"messages": [ASK, {**SAY, "loss": False}, ASK, {**SAY, "content": "4", "loss": True}]},
        TALK + TALK.replace("It is 4.", "4"), "4<|end|>",
    ),
    "an answer that is masked": (
        {"messages": [ASK, {**SAY, "masked": True}, ASK, {**SAY, "content": "4"}]},
        TALK + TALK.replace("It is 4.", "4"), "4<|end|>",
    ),
    "a number under such a key is a key as any other": ({"messages": [ASK, {**SAY, "loss": 2.5}]}, TALK, ANSWER),
    "of the split to train on": ({"messages": [ASK, SAY], "split": "train"}, TALK, ANSWER),
    "a good answer": ({"prompt": "2 + 2?", "completion": "It is 4.", "label": True}, TALK, ANSWER),
    "a class, no label of an answer": ({"prompt": "2 + 2?", "completion": "It is 4.", "label": 0}, TALK, ANSWER),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_keys_beside_a_conversation_are_heard(encoder: Encoder, tok: Tokenizer, name: str) -> None:
    record, text, answers = BESIDE[name]
    ((e,),) = encoder([example_of("x:1", record)])
    assert (tok.decode(e.ids), tok.decode(e.ids[e.trained])) == (text, answers)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"split": "test"}, "of another split"),
        ({"split": "Validation"}, "of another split"),
        ({"label": False}, "label is false"),
        ({"label": "False"}, "label is false"),
        ({"kto_tag": False}, "label is false"),
        ({"image": "a.png"}, "parts that are no text"),
    ],
)
def test_records_that_say_they_are_not_to_be_learnt_are_left_out(
    tmp_path: Path, tok: Tokenizer, more: dict[str, Any], reason: str
) -> None:
    """Most may be: they are no broken records. Pictures are."""
    rows = varied({"prompt": "2 + 2?", "completion": "It is 4."})
    path = lines(tmp_path, [{**r, **(more if i > 1 else {})} for i, r in enumerate(rows)])
    if reason not in ASKED:
        with pytest.raises(Refused, match=f"4 of 6 records.*{reason}"):
            judged(path, tmp_path / "out", tok)
        return
    made = prepare_conversations(path, tmp_path / "out", tok, ChatTemplate(TOOLS, "test"), 255, 0.3)
    assert f"4 {reason}" in made.left_out()
    assert sum(PackedShards(place, tok).manifest.examples for place in made.sides.values()) == 2
    assert judged(path, tmp_path / "out", tok).passed


def test_keys_that_nothing_reads_are_named(tmp_path: Path, tok: Tokenizer) -> None:
    rows = [{**r, "context": "c", "id": 1} for r in varied({"prompt": "2 + 2?", "completion": "It is 4."})]
    template = ChatTemplate(TOOLS, "test")
    for folder in ("out", "out"):
        made = prepare_conversations(lines(tmp_path, rows), tmp_path / folder, tok, template, 255, 0.3)
        assert "keys of records that are not read: 'context', 'id'; --map" in made.left_out()
    used = varied({"instruction": "2 + 2?", "input": "", "output": "It is 4.", "system": "x"})
    made = prepare_conversations(lines(tmp_path, used, "b.jsonl"), tmp_path / "out", tok, template, 255, 0.3)
    assert made.left_out() == ""


def test_a_pair_with_the_higher_score_for_the_rejected_answer_is_left_out() -> None:
    pair = {"prompt": "2 + 2?", "chosen": "It is 4.", "rejected": "5", "system_prompt": "Be brief."}
    assert pair_of("x", {**pair, "score_chosen": 3, "score_rejected": 3.0}).chosen.messages[0] == turn(
        "system", "Be brief."
    )
    with pytest.raises(Unusable, match="chosen_rating is 1, rejected_rating is 4"):
        pair_of("x", {**pair, "chosen_rating": 1, "rejected_rating": 4})
    with pytest.raises(Unusable, match="split is 'test'"):
        pair_of("x", {**pair, "split": "test"})


PLAIN = TOOLS.replace("<|end|>", "[END]")


@pytest.mark.parametrize(
    "text",
    [
        TOOLS,
        PLAIN,
        PLAIN.replace("{{ m.content", "{% if m.role == 'assistant' %}Well. {% endif %}{{ m.content"),
    ],
)
def test_pairs_are_found_again_whatever_a_template_writes_around_an_answer(
    tmp_path: Path, tok: Tokenizer, text: str
) -> None:
    """The end of a turn may be no special token, and words may stand before an answer: both are trained, neither is in a file."""
    rows = [{"prompt": f"{i} + {i}?", "chosen": f"It is {2 * i}.", "rejected": f"No {i}."} for i in range(6)]
    path, template = lines(tmp_path, rows), ChatTemplate(text, "test")
    made = prepare_conversations(path, tmp_path / "out", tok, template, 255, 0.3, pairs=True)
    sides = {side: PackedShards(place, tok) for side, place in made.sides.items()}
    found = pairs_kept(open_pairs(path), sides, tok, template)
    assert found.passed, found
    swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    assert pairs_kept(open_pairs(lines(tmp_path, swapped, "b.jsonl")), sides, tok, template).verdict == FAIL


@pytest.mark.parametrize(
    ("record", "advice"),
    [
        ({"question": "q", "chosen": "a", "rejected": "b"}, "--map prompt=question reads it"),
        ({"input": "q", "chosen_response": "a", "rejected_response": "b"},
         "--map prompt=input,chosen=chosen_response,rejected=rejected_response reads it"),
        ({"chosen": "Well.\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "as HH-RLHF has them"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b\n\nHuman: c"},
         "rejected has 3 turns"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"}, "begin otherwise"),
        ({"instruction": "q", "output": ["a", "b"]}, "'output' has several answers"),
        ({"instruction": "q", "completions": [{"response": "a"}, {"response": "b"}]}, "'completions' has several answers"),
        ({"prompt": "q", "completion": "a", "label": True}, "wanted prompt, chosen and rejected"),
        ({"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"}, "instruction and input are one prompt: jq"),
        ({"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, "--map prompt=instruction reads it"),
    ],
)  # fmt: skip
def test_pairs_under_other_names_get_the_flag_that_reads_them(record: dict[str, Any], advice: str) -> None:
    with pytest.raises(Unusable) as e:
        pair_of("x", record)
    assert advice in e.value.detail
    if (flags := re.search(r"--map (\S+)", advice)) and "reads it" in advice:
        assert pair_of("x", record, KeyMap.parse(flags[1])).chosen.response == "a"


@pytest.mark.parametrize("about", ["context", "input"])
def test_the_text_that_an_instruction_is_about_is_not_left_behind(about: str) -> None:
    record = {"instruction": "2 + 2?", about: "Numbers.", "response": "It is 4."}
    with pytest.raises(Unusable) as e:
        example_of("x", record)
    flags = str(e.value.detail).rpartition("--map ")[2]
    assert "Numbers." in example_of("x", record, KeyMap.parse(flags)).prompt


# Splits in a folder


@pytest.mark.parametrize(
    ("names", "read", "left"),
    [
        (["train.jsonl", "test.jsonl", "validation.jsonl"], ["train.jsonl"], 2),
        (["train/a.jsonl", "val/a.jsonl", "test/a.jsonl"], ["train/a.jsonl"], 2),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
         ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"], 1),
        (["train.jsonl", "more.jsonl", "dev.jsonl"], ["more.jsonl", "train.jsonl"], 1),
        (["test.jsonl", "validation.jsonl"], ["test.jsonl", "validation.jsonl"], 0),
        (["training.jsonl", "latest.jsonl"], ["latest.jsonl", "training.jsonl"], 0),
        (["train.txt", "test.txt", "valid.txt"], ["train.txt"], 2),
        (["train.py", "test.py", "model.py"], ["model.py", "test.py", "train.py"], 0),
        (["train.py", "test.py"], ["test.py", "train.py"], 0),
        (["train.txt", "test.txt", "notes.txt"], ["notes.txt", "test.txt", "train.txt"], 0),
        (["a.jsonl", "dataset_infos.json", "dataset_info.json"], ["a.jsonl"], 0),
        (["Train.jsonl", "TEST.jsonl"], ["Train.jsonl"], 1),
        (["train1.jsonl", "train2.jsonl", "test1.jsonl"], ["train1.jsonl", "train2.jsonl"], 1),
        (["training.jsonl", "eval.jsonl", "testing.jsonl", "evaluation.jsonl"], ["training.jsonl"], 3),
        (["train.txt", "test.txt", "README.md"], ["README.md", "train.txt"], 1),
        (["train.txt.gz", "test.txt.gz"], ["train.txt.gz"], 1),
        (["train.jsonl", "val.txt"], ["train.jsonl"], 1),
        (["train.jsonl", "contest.jsonl", "test_x/train.jsonl"], ["contest.jsonl", "test_x/train.jsonl", "train.jsonl"], 0),
    ],
)  # fmt: skip
def test_of_a_folder_with_splits_the_training_one_is_read(
    tmp_path: Path, names: list[str], read: list[str], left: int
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    found = train_sources(str(tmp_path))
    assert [str(s.path.relative_to(tmp_path)) for s in found] == read
    note = splits_note(str(tmp_path))
    assert note.count("jsonl") + note.count(".txt") == left
    assert ("trained on the split train" in note) == bool(left)


@pytest.mark.parametrize(
    ("names", "read", "left"),
    [
        (["train.jsonl", "test.jsonl", "validation.jsonl"], ["validation.jsonl"], 2),
        (["train/a.jsonl", "val/a.jsonl", "dev/a.jsonl", "test/a.jsonl"], ["dev/a.jsonl", "val/a.jsonl"], 2),
        (["train.jsonl", "test.jsonl", "more.jsonl", "notes.txt"], ["test.jsonl"], 3),
        (["train.jsonl", "more.jsonl"], ["more.jsonl", "train.jsonl"], 0),
        (["test.jsonl", "validation.jsonl"], ["test.jsonl", "validation.jsonl"], 0),
        (["train.txt", "test.txt"], ["test.txt"], 1),
        (["train.txt", "eval.txt", "README.md"], ["eval.txt"], 1),
        (["train.py", "test.py", "model.py"], ["model.py", "test.py", "train.py"], 0),
    ],
)
def test_of_a_folder_with_splits_what_was_not_trained_on_is_scored(
    tmp_path: Path, names: list[str], read: list[str], left: int
) -> None:
    """None of its files is one that train_sources reads, where there is another."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    found = {str(s.path.relative_to(tmp_path)) for s in held_out_sources(str(tmp_path))}
    assert sorted(found) == read
    note = splits_note(str(tmp_path), is_scored=True)
    assert note.count("jsonl") + note.count(".txt") == left
    trained = {str(s.path.relative_to(tmp_path)) for s in train_sources(str(tmp_path))}
    assert not (left and trained & found)


def test_a_file_of_another_split_that_is_named_is_read(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "e").mkdir()
    for name in ("d/train.jsonl", "d/test.jsonl", "d/val.jsonl", "e/test.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    paths = [str(tmp_path / name) for name in ("d", "d/test.jsonl", "e")]
    found = [str(s.path.relative_to(tmp_path)) for s in train_sources(*paths)]
    assert found == ["d/test.jsonl", "d/train.jsonl", "e/test.jsonl"]
    assert "val.jsonl" in (note := splits_note(*paths))
    assert "test.jsonl" not in note
    for read in (train_sources, held_out_sources):
        assert [s.path.name for s in read(paths[1])] == ["test.jsonl"]


def test_files_of_another_split_are_not_looked_for_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(40):
        for split in ("train", "validation"):
            (tmp_path / f"{split}-{n:02}.jsonl").write_text('{"text": "x"}\n')
    compared = []
    monkeypatch.setattr(Source, "__eq__", lambda a, b: compared.append(1) or a is b)
    assert [s.path.name[:5] for s in train_sources(str(tmp_path))] == ["train"] * 40
    assert len(compared) < 80


def test_the_word_stdlib_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stdlib").mkdir()  # empty, and then with splits: neither is read
    word = [
        *sources_of(DataSettings(corpus="stdlib")),
        *sources_of(DataSettings(mix="corpus=stdlib weight=1; corpus=b weight=1")),
    ]
    assert [opening._splits_note(x) for x in word if x.path == "stdlib"] == ["", ""]
    for split in ("train", "test"):
        (tmp_path / f"stdlib/{split}.txt").write_text("x")
    assert [opening._splits_note(x) for x in word if x.path == "stdlib"] == ["", ""]
    assert "left out" in opening._splits_note(*sources_of(DataSettings(corpus="./stdlib")))


def test_files_of_another_split_are_left_out_of_training_and_said_to_be(
    tmp_path: Path, tok: Tokenizer
) -> None:
    rows = varied({"messages": [ASK, SAY]})
    lines(tmp_path, rows, "train.jsonl")
    lines(tmp_path, [{"messages": [ASK, {**SAY, "content": "held out"}]}], "test.jsonl")
    assert judged(str(tmp_path), tmp_path / "out", tok).passed
    assert not any(
        "held out" in x.text for x in open_conversations(str(tmp_path)) if not isinstance(x, Skipped)
    )
    assert any(
        "held out" in x.text
        for x in open_conversations(str(tmp_path / "test.jsonl"))
        if not isinstance(x, Skipped)
    )


@pytest.mark.parametrize(
    ("path", "data", "model"),
    [
        (
            "tatsu-lab/alpaca",
            "hf://datasets/tatsu-lab/alpaca",
            "apr import hf://tatsu-lab/alpaca -o alpaca.apr",
        ),
        (
            "Qwen/Qwen2.5-0.5B",
            "hf://datasets/Qwen/Qwen2.5-0.5B",
            "apr import hf://Qwen/Qwen2.5-0.5B -o Qwen2.5-0.5B.apr",
        ),
        ("data/train.jsonl", "", ""),
        ("here/name", "", ""),
        ("nowhere", "", ""),
        ("/a/b", "", ""),
    ],
)
def test_a_name_of_the_hub_is_told_from_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, data: str, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(InputNotFound) as e:
        find_sources([path])
    assert data in str(e.value)
    assert ("hf://" in str(e.value)) == bool(data)
    with pytest.raises(InputNotFound) as e:
        format_of(path)
    assert model in str(e.value)
    assert ("apr import" in str(e.value)) == bool(model)
