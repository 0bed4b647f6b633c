"""Whole examples are those of the records of the files, and as many of their answers are trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr.common.finding import FAIL, Finding
from apr.data.conversations import contexts, render, shapes
from apr.data.conversations.answers import Spelling
from apr.data.conversations.contexts import records_kept
from apr.data.conversations.examples import open_conversations
from apr.data.conversations.packed import PackedShards
from apr.data.conversations.prepare import prepare_conversations
from apr.tokenizer.chat_template import ChatTemplate
from apr.tokenizer.tokenizer import Tokenizer
from finetune_cases import own_tokenizer

PINNED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + PINNED


def own() -> Tokenizer:
    return Tokenizer.from_json(own_tokenizer(), "own", "<|endoftext|>")


def write(folder: Path, rows: list[Any]) -> str:
    (folder / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder / "chats.jsonl")


def compared(
    path: str, folder: Path, tok: Tokenizer, template: ChatTemplate | None, seq: int = 255
) -> Finding:
    made = prepare_conversations(path, folder, tok, template, seq, 0.2)
    sides = {side: PackedShards(place, tok) for side, place in made.sides.items()}
    return records_kept(open_conversations(path), sides, tok, template)


def tools() -> ChatTemplate:
    return ChatTemplate(TOOLS, "tools", {"eos_token": "<|endoftext|>"})


def mixed() -> list[Any]:
    """Records of seven shapes in turn."""
    rows: list[Any] = []
    for i in range(70):
        said, asked = f"It is {i} and {i * i} o'clock.", f"Tell me {i}."
        user: dict[str, Any] = {"role": "user", "content": asked}
        turns = [user, {"role": "assistant", "content": said}]
        earlier = [
            {"role": "user", "content": "Go on."},
            {"role": "assistant", "content": f"So {i}.", "training": False},
        ]
        parts = [{"type": "text", "text": said[:5]}, {"type": "text", "text": said[5:]}]
        tool = {"type": "function", "function": {"name": f"look_{i}", "parameters": {}}}
        rows.append(
            [
                {"instruction": asked, "input": f"about {i}", "output": said},
                {"prompt": asked, "response": said, "history": [[f"Question {i}", f"Answer {i}"]]},
                {"prompt": asked, "response": f"\n {said} \n"},
                {"messages": [*earlier, *turns]},
                {"messages": turns, "tools": [tool]},
                {"messages": [user, {"role": "assistant", "content": parts}]},
                {"messages": turns, "system": f"Be {i}."},
            ][i % 7]
        )  # fmt: skip
    return rows


@pytest.mark.parametrize("seq", [255, 79])
def test_sound_records_pass(tmp_path: Path, seq: int) -> None:
    """Also where many are cut. Templates and other shapes: test_answers.py, test_shapes.py."""
    found = compared(write(tmp_path, mixed()), tmp_path / "out", own(), tools(), seq)
    assert found.passed, found


def test_a_template_that_writes_less_is_not_accused(tmp_path: Path) -> None:
    bare = ChatTemplate(
        "{% for m in messages if m.role != 'system' %}{{ m.content | trim }}{{ eos_token }}{% endfor %}", "bare",
        {"eos_token": "<|endoftext|>"},
    )  # fmt: skip
    assert compared(write(tmp_path, mixed()), tmp_path / "out", own(), bare).verdict != FAIL


def inputs_are_lost(m: pytest.MonkeyPatch) -> None:
    right = shapes.text_of
    m.setattr(shapes, "text_of", lambda r, key, where="": "" if key == "input" else right(r, key, where))


def history_is_lost(m: pytest.MonkeyPatch) -> None:
    m.setattr(shapes, "earlier", lambda record: ())


def systems_are_lost(m: pytest.MonkeyPatch) -> None:
    right = shapes.conversation
    m.setattr(shapes, "conversation", lambda n, r, *a, **k: right(n, {**r, "system": None}, *a, **k))


def tools_are_lost(m: pytest.MonkeyPatch) -> None:
    right = render.Renderer.__call__
    m.setattr(render.Renderer, "__call__", lambda self, e: right(self, dataclasses.replace(e, tools=())))


def flags_are_ignored(m: pytest.MonkeyPatch) -> None:
    m.setattr(shapes, "FLAGS", {})


def parts_are_lines(m: pytest.MonkeyPatch) -> None:
    m.setattr(shapes, "_joined", lambda parts, where: "\n".join(p["text"] for p in parts))


def answers_are_stripped(m: pytest.MonkeyPatch) -> None:
    right = shapes._pair
    m.setattr(shapes, "_pair", lambda n, r, q, p, answer: right(n, r, q, p, answer.strip()))


def only_the_last_answer_is_trained(m: pytest.MonkeyPatch) -> None:
    right = render.Encoder._label

    def label(self: Any, *args: Any) -> Any:
        e = right(self, *args)
        if not isinstance(e, render.EncodedExample):
            return e
        begins = np.flatnonzero(e.trained[1:] & ~e.trained[:-1])
        return dataclasses.replace(e, trained=e.trained & (np.arange(e.trained.size) > begins[-1]))

    m.setattr(render.Encoder, "_label", label)


FAULTS = [
    inputs_are_lost, history_is_lost, systems_are_lost, tools_are_lost, flags_are_ignored, parts_are_lines, answers_are_stripped,
    only_the_last_answer_is_trained,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_planted_fault_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    fault(monkeypatch)
    found = compared(write(tmp_path, mixed()), tmp_path / "out", own(), tools())
    assert found.passed is False, found


def cut_short(m: pytest.MonkeyPatch, size: int) -> None:
    m.setattr(contexts, "BUDGET_BYTES", size)


@pytest.mark.parametrize(("size", "kinds"), [(600, 12), (3000, 2)])
def test_records_that_are_not_read_are_not_taken_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, kinds: int
) -> None:
    """Classes have few answers: behind the budget, an answer is one of another record."""
    cut_short(monkeypatch, size)
    rows = [
        {"prompt": f"What is {i} of?", "response": f"It is of kind {i % kinds if i % 10 else i % 100}."}
        for i in range(120)
    ]
    assert compared(write(tmp_path, rows), tmp_path / "out", own(), tools()).passed


@pytest.mark.parametrize("fault", [history_is_lost, systems_are_lost], ids=lambda f: f.__name__)
def test_what_all_records_lose_is_found_in_the_first_part_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    rows = [
        {"prompt": f"What is {i}?", "response": f"It is {i}.", "system": f"Be {i}.", "history": [[f"Q{i}", f"A{i}"]]}
        for i in range(100)
    ]  # fmt: skip
    path = write(tmp_path, rows)
    cut_short(monkeypatch, 2000)
    assert compared(path, tmp_path / "sound", own(), tools()).passed
    fault(monkeypatch)
    found = compared(path, tmp_path / "out", own(), tools())
    assert found.passed is False, found


def test_records_that_are_passed_over_are_not_taken_for_others(tmp_path: Path) -> None:
    """Also with a flag that is null, as Parquet has it, with one that is a number, and with messages in a text."""
    rows: list[Any] = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(60)]
    for i in range(20):
        ask, answer = (
            {"role": "user", "content": f"Tell me {i}."},
            {"role": "assistant", "content": f"It is {i}."},
        )
        rows.append({"prompt": json.dumps([ask]), "completion": answer["content"]})
        rows.append({"messages": [ask, answer | {"weight": None, "loss": 0, "reasoning_content": "Hm."}]})
        rows.append({"messages": [ask, answer | {"content": f"It was {i}.", "weight": None, "loss": 0}]})
    found = compared(write(tmp_path, rows), tmp_path / "out", own(), tools())
    assert found.passed, found


@pytest.mark.parametrize(
    ("key", "value", "trained"), [("weight", None, 2), ("loss", 0, 2), ("loss", False, 1), ("weight", 0, 1)]
)
def test_what_says_that_an_answer_is_context(key: str, value: Any, trained: int) -> None:
    turns: list[Any] = [
        {"role": "assistant", "content": "a", key: value},
        {"role": "assistant", "content": "b"},
    ]
    record = contexts._record({"messages": turns})
    assert record is not None
    assert len(record.answers) == trained
    example = shapes.example_of("chats", {"messages": turns})
    assert 2 - len(example.untrained) == trained


@pytest.mark.parametrize(
    "more", [{"history": [["q"]]}, {"history": "none"}, {"history": 5}, {"prompt": '[{"role": "user"}]'}]
)
def test_records_of_other_forms_are_passed_over(more: dict[str, Any]) -> None:
    assert contexts._record({"prompt": "p", "completion": "c", **more}) is None


def test_records_that_are_passed_over_use_up_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(monkeypatch, 2000)
    turns = [{"role": "user", "content": "x" * 50}, {"role": "assistant", "content": "y", "reasoning": "Hm."}]
    path, met = write(tmp_path, [{"messages": turns}] * 400), []
    right = contexts._record
    monkeypatch.setattr(contexts, "_record", lambda value: met.append(value) or right(value))
    contexts._read(open_conversations(path), set(), Spelling(own()))
    assert len(met) < 60
