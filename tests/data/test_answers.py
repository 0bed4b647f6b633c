"""What is trained of conversations, compared with the answers of the files: real templates, pairs, and the faults it is for."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr.common.finding import FAIL, Finding
from apr.data.conversations import answers, prepare, render
from apr.data.conversations.answers import Frame, answers_kept
from apr.data.conversations.contexts import records_kept
from apr.data.conversations.examples import open_conversations
from apr.data.conversations.packed import PackedShards
from apr.data.conversations.prepare import prepare_conversations
from apr.tokenizer.chat_template import ChatTemplate
from apr.tokenizer.tokenizer import Tokenizer
from data_cases import CODE, WORDS
from finetune_cases import CONVERSATIONS, MARKED, OWN_TEMPLATE, own_tokenizer

PINNED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}[INST] {{ m.content }} "
    "[/INST]{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
BARE = "{% for m in messages %}{{ m.content }} {% endfor %}"
THOUGHTS = (
    "{%- for m in messages %}{%- set c = m.content %}{%- if m.role == 'assistant' and '</think>' in c and not loop.last %}"
    "{%- set c = c.split('</think>')[-1].lstrip('\\n') %}{%- endif %}{{- '<|' + m.role + '|>\\n' }}"
    "{%- if m.role == 'assistant' and loop.last and '</think>' not in c %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{- c + '<|end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
)
MARKED_OWN = OWN_TEMPLATE
for _old, _new in MARKED["own"]:
    MARKED_OWN = MARKED_OWN.replace(_old, _new)
TEMPLATES = {
    "own": OWN_TEMPLATE,
    "marked": MARKED_OWN,
    "pinned": PINNED,
    "inst": INST,
    "plain": PLAIN,
    "bare": BARE,
    "thoughts": THOUGHTS,
}


def own() -> Tokenizer:
    return Tokenizer.from_json(own_tokenizer(), "own", "<|endoftext|>")


def text(rng: random.Random) -> str:
    """White space at both ends, words, code."""
    words = " ".join(rng.choices(WORDS, k=rng.randrange(1, 12)))
    return rng.choice(["", "\n", " "]) + words + rng.choice(["", "\n", " ", "\n\n", CODE])


def chats() -> list[Any]:
    rng, rows = random.Random(3), []
    for i in range(40):
        turns = [{"role": "system", "content": text(rng)}] if i % 3 == 0 else []
        for _ in range(1 + i % 3):
            turns += [
                {"role": "user", "content": text(rng)},
                {"role": "assistant", "content": text(rng)},
            ]
        if i % 7 == 0:
            turns[-1]["content"] = f"<think>\n{text(rng)}\n</think>\n\n{turns[-1]['content']}"
        rows.append({"messages": turns + ([{"role": "user", "content": "bye"}] if i % 11 == 0 else [])})
    rows += [{"messages": c} for c in CONVERSATIONS]
    return [*rows, *rows[:3], {"messages": []}, {"nothing": 1}, "no object"]


def pairs() -> list[Any]:
    rng = random.Random(4)
    rows: list[Any] = [{"prompt": text(rng), "response": text(rng) + "."} for _ in range(60)]
    rows += [{"instruction": text(rng), "input": "x" * (i % 2), "output": text(rng)} for i in range(20)]
    return [*rows, {"prompt": 7, "response": "x"}, {"prompt": "x", "response": ""}]


def write(folder: Path, rows: list[Any], name: str = "chats.jsonl") -> str:
    data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(folder / name)


def chat_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    tokens = {"eos_token": tokenizer.eos_token or "", "bos_token": "<|bos|>"}
    return ChatTemplate(TEMPLATES[name], name, tokens)


def whole(path: str, folder: Path, tok: Tokenizer, template: ChatTemplate | None, seq: int = 255) -> Finding:
    made = prepare_conversations(path, folder, tok, template, seq, 0.2)
    sides = {side: PackedShards(place, tok) for side, place in made.sides.items()}
    return records_kept(open_conversations(path), sides, tok, template)


def compared(
    path: str, folder: Path, tokenizer: Tokenizer, template: ChatTemplate | None, seq: int = 255
) -> Finding:
    made = prepare_conversations(path, folder, tokenizer, template, seq, 0.2)
    sides = {side: PackedShards(place, tokenizer) for side, place in made.sides.items()}
    return answers_kept(open_conversations(path), sides, tokenizer, template)


@pytest.mark.parametrize(("name", "seq"), [*((name, 255) for name in TEMPLATES), ("own", 63), ("plain", 63)])
def test_sound_conversations_pass(tmp_path: Path, name: str, seq: int) -> None:
    tok = own()
    found = compared(write(tmp_path, chats()), tmp_path / "out", tok, chat_template(name, tok), seq)
    assert found.passed, found
    assert (
        whole(write(tmp_path, chats()), tmp_path / "out", tok, chat_template(name, tok), seq).verdict != FAIL
    )


@pytest.mark.parametrize("name", ["Qwen-Qwen2.5-7B-Instruct", "meta-llama-Llama-3.1-8B-Instruct"])
def test_real_templates_pass(tmp_path: Path, data: Any, name: str) -> None:
    tok = Tokenizer.from_file(data("qwen2-tokenizer"))
    made = ChatTemplate((data("chat-templates") / f"{name}.jinja").read_text(), name, {"bos_token": ""})
    found = compared(write(tmp_path, chats()), tmp_path / "out", tok, made)
    assert found.passed, found
    assert whole(write(tmp_path, chats()), tmp_path / "out", tok, made).passed


def test_sound_pairs_pass(tmp_path: Path, data: Any) -> None:
    """Also of a vocabulary that is not byte-level."""
    path = write(tmp_path, pairs(), "pairs.jsonl.gz")
    for tok in (own(), Tokenizer.from_file(data("stories260K") / "hf")):
        found = compared(path, tmp_path / tok.format, tok, None)
        assert found.passed, found
        assert whole(path, tmp_path / tok.format, tok, None).passed


@pytest.mark.parametrize("key", ["reasoning_content", "tool_calls"])
def test_thoughts_beside_an_answer_are_no_strangers(tmp_path: Path, key: str) -> None:
    tok, written = own(), "m.content ~ (m['" + key + "'] | string if '" + key + "' in m else '')"
    made = ChatTemplate(OWN_TEMPLATE.replace("m.content", written), "own", {"bos_token": ""})
    rows = [json.loads(json.dumps(row)) for row in chats() if isinstance(row, dict)]
    for m in (m for row in rows for m in row.get("messages", []) if m["role"] == "assistant"):
        m[key] = (
            "as I think" if key == "reasoning_content" else [{"function": {"name": "f", "arguments": {}}}]
        )
    found = compared(write(tmp_path, rows), tmp_path / "out", tok, made)
    assert found.verdict != FAIL, found


def test_a_file_that_is_left_out_later_counts_anew(tmp_path: Path) -> None:
    tok, made = own(), chat_template("own", own())
    (tmp_path / "in").mkdir()
    write(tmp_path / "in", chats())
    assert compared(str(tmp_path / "in"), tmp_path / "out", tok, made).passed
    (tmp_path / "in" / "gone.jsonl").symlink_to("nowhere")
    found = compared(str(tmp_path / "in"), tmp_path / "out", tok, made)
    assert found.passed, found


def test_files_in_an_array_and_long_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tok, made = own(), chat_template("own", own())
    (tmp_path / "a.json").write_text(json.dumps(chats(), indent=1))
    found = compared(str(tmp_path / "a.json"), tmp_path / "out", tok, made)
    assert found.passed, found
    monkeypatch.setattr(answers, "BUDGET_BYTES", 2000)
    path = write(tmp_path, chats())
    found = compared(path, tmp_path / "long", tok, made)
    assert found.passed, found
    assert "the beginning of the files" in found.measured


def test_what_a_template_writes_otherwise_is_not_asked(tmp_path: Path) -> None:
    tok = own()
    made = ChatTemplate(
        OWN_TEMPLATE.replace("m.content", "m.content ~ m.content"), "twice", {"bos_token": ""}
    )
    assert Frame.of(made, tok) is None
    assert compared(write(tmp_path, chats()), tmp_path / "out", tok, made).passed is None


def test_what_stands_around_an_answer() -> None:
    tok = own()
    end = next(i for i, name in tok.special_tokens().items() if name == "<|end|>")
    assert Frame.of(chat_template("own", tok), tok) == Frame("<|assistant|>\n", "", "<|end|>", end)


# Faults: of an example's labels


def longer(trained: np.ndarray, shift: int) -> np.ndarray:
    out = trained.copy()
    if shift > 0:
        out[1:] |= trained[:-1]
    else:
        out[:-1] |= trained[1:]
        out[0] = False
    return out


def prompt_is_trained(trained: np.ndarray) -> np.ndarray:
    return np.arange(trained.size) > 0


def token_behind_the_answer(trained: np.ndarray) -> np.ndarray:
    return longer(trained, 1)


def token_before_the_answer(trained: np.ndarray) -> np.ndarray:
    return longer(trained, -1)


def first_token_of_answer_lost(trained: np.ndarray) -> np.ndarray:
    return trained & np.concatenate([[False], trained[:-1]])


def end_of_answer_lost(trained: np.ndarray) -> np.ndarray:
    return trained & np.concatenate([trained[1:], [False]])


def only_the_last_answer(trained: np.ndarray) -> np.ndarray:
    ends = np.flatnonzero(trained[1:] & ~trained[:-1])
    return trained & (np.arange(trained.size) > ends[-1])


Labels = Callable[[np.ndarray], np.ndarray]
FAULTS = {
    prompt_is_trained: ("own", "marked", "pinned", "inst", "plain", "bare", "thoughts", "pairs"),
    token_behind_the_answer: ("own", "marked", "pinned", "inst", "plain", "thoughts"),
    token_before_the_answer: ("own", "marked", "pinned", "inst", "plain", "thoughts", "pairs"),
    # The first token of "inst" is a space.
    first_token_of_answer_lost: ("own", "marked", "pinned", "plain", "bare", "thoughts", "pairs"),
    end_of_answer_lost: ("own", "marked", "pinned", "inst", "thoughts", "pairs"),
    only_the_last_answer: ("own",),
}


@pytest.mark.parametrize(
    ("fault", "name"),
    [(fault, name) for fault, names in FAULTS.items() for name in names],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_a_planted_fault_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Labels, name: str
) -> None:
    tok, right = own(), render.Encoder._label

    def label(self: Any, *args: Any) -> Any:
        e = right(self, *args)
        return dataclasses.replace(e, trained=fault(e.trained)) if isinstance(e, render.EncodedExample) else e

    monkeypatch.setattr(render.Encoder, "_label", label)
    rows, made = (pairs(), None) if name == "pairs" else (chats(), chat_template(name, tok))
    assert compared(write(tmp_path, rows), tmp_path / "out", tok, made).passed is False


def answers_are_in_lower_case(m: pytest.MonkeyPatch) -> None:
    right = Tokenizer.encode_spans
    m.setattr(Tokenizer, "encode_spans", lambda self, texts: right(self, [t.swapcase() for t in texts]))
    m.setattr(render.Encoder, "_check_round_trip", lambda *a: None)


def examples_are_lost(m: pytest.MonkeyPatch) -> None:
    right = prepare.Spool.add
    m.setattr(
        prepare.Spool, "add", lambda self, e, sha: right(self, e, sha) if len(self.sizes) != 9 else None
    )


@pytest.mark.parametrize("fault", [answers_are_in_lower_case, examples_are_lost], ids=lambda f: f.__name__)
def test_what_is_lost_or_changed_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    tok = own()
    fault(monkeypatch)
    assert compared(write(tmp_path, pairs()), tmp_path / "out", tok, None).passed is False
