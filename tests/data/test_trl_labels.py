"""Labels of 300 random conversations: those of TRL's templates for training and transformers, to the token.

tests/golden/trl-labels.json, made by tools/golden/trl_labels.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr.data.conversations import render
from apr.data.conversations.render import EncodedExample, Encoder
from apr.data.conversations.shapes import example_of
from apr.data.source import Skipped
from apr.tokenizer.chat_template import ChatTemplate
from apr.tokenizer.tokenizer import Tokenizer
from finetune_cases import own_tokenizer, random_talks, special_in

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/trl-labels.json").read_text())
NAMED = {"bos_token": "<bos>", "eos_token": "<|endoftext|>"}
# Of the conversations, those that the published templates are tried with.
FEWER = 60


def encoded(name: str, kind: str, count: int) -> tuple[Tokenizer, list[list[EncodedExample]]]:
    """The texts of each conversation by a family's template."""
    family = GOLDEN["families"][name]
    tok = Tokenizer.from_json(own_tokenizer(special_in(family["training"])), name, "<|endoftext|>")
    talks = random_talks(GOLDEN["count"], GOLDEN["seed"])[:count]
    encoder = Encoder(tok, ChatTemplate(family[kind], name, NAMED))
    got = encoder([example_of(f"talk:{i}", {"messages": talk}) for i, talk in enumerate(talks)])
    out = [g for g in got if not isinstance(g, Skipped)]
    assert len(out) == len(got)
    return tok, out


def digest(texts: list[list[EncodedExample]]) -> str:
    out = hashlib.sha256()
    for (e,) in texts:
        out.update(e.ids.astype("<u4").tobytes() + e.trained.astype(np.uint8).tobytes())
    return out.hexdigest()


@pytest.fixture(scope="module")
def marked() -> dict[str, tuple[Tokenizer, list[list[EncodedExample]]]]:
    return {name: encoded(name, "training", GOLDEN["count"]) for name in GOLDEN["families"]}


@pytest.mark.parametrize("name", GOLDEN["families"])
def test_the_labels_are_those_of_trl(marked: Any, name: str) -> None:
    assert digest(marked[name][1]) == GOLDEN["families"][name]["sha256"]


@pytest.mark.parametrize("name", GOLDEN["families"])
def test_the_published_template_trains_the_same_answers(marked: Any, name: str) -> None:
    """But for white space around them: TRL also trains on the newline behind the end of a turn, which nobody generates. Qwen3's
    template writes earlier turns otherwise than the last, so that answers are trained on by turn."""
    tok, texts = encoded(name, "published", FEWER)
    for ours, (trl,) in zip(texts, marked[name][1][:FEWER], strict=True):
        words = "".join(tok.decode(e.ids[e.trained]) for e in ours)
        assert "".join(words.split()) == "".join(tok.decode(trl.ids[trl.trained]).split())
    by_turn = sum(len(ours) > 1 for ours in texts)
    assert (by_turn > FEWER // 2) == (name == "qwen3")


def test_a_label_too_many_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: one token more is trained on, in one conversation."""
    right = render.Encoder._label

    def label(self: Any, name: str, *args: Any) -> Any:
        e = right(self, name, *args)
        assert isinstance(e, EncodedExample)
        more = e.trained | (np.arange(e.ids.size) == np.flatnonzero(~e.trained)[-1])
        return dataclasses.replace(e, trained=more) if name == "talk:299" else e

    monkeypatch.setattr(render.Encoder, "_label", label)
    assert digest(encoded("llama3", "training", GOLDEN["count"])[1]) != GOLDEN["families"]["llama3"]["sha256"]
