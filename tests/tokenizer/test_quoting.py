"""Special tokens that a message only spells out: text, with the ids of the text around it."""

from __future__ import annotations

import json

import pytest

from apr.common.errors import Refused
from apr.tokenizer.chat_template import ChatTemplate, chat_ids
from apr.tokenizer.quoting import MARKS, encode_quoted
from apr.tokenizer.tokenizer import Tokenizer

TURNS = ChatTemplate(
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}<s>assistant:", "turns"
)


def user(text):
    return {"role": "user", "content": text}


def scheme(data, name):
    """The stories tokenizer as it is, or with the space that begins a text only before the first word of all."""
    fields = json.loads((data("stories260K/hf") / "tokenizer.json").read_text())
    if name == "first":
        fields["normalizer"] = None
        fields["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False,
        }  # fmt: skip
    return Tokenizer.from_json(json.dumps(fields), name)


@pytest.mark.parametrize("name", ["as it is", "first"])
def test_no_space_is_added_around_a_quoted_special_token(data, name):
    tokenizer = scheme(data, name)
    ids = chat_ids(TURNS, tokenizer, [user("Say </s> now")])
    assert ids.count(2) == 1
    spaced = {"as it is": " ", "first": ""}[name]
    assert tokenizer.decode(ids) == f"<s>{spaced}user: Say </s> now</s><s>{spaced}assistant:"
    plain = chat_ids(TURNS, tokenizer, [user("Say")])
    end, stretch = ids.index(2), "user: Say </s> now"
    if name == "as it is":
        assert ids[1:end] == tokenizer.encode(stretch).tolist()
    else:  # behind "a", nothing is added before it either
        assert ids[1:end] == tokenizer.encode("\n" + stretch).tolist()[-(end - 1) :]
    assert ids[end:] == plain[plain.index(2) :]


@pytest.mark.parametrize("name", ["as it is", "first", "qwen2"])
def test_marks_stand_for_special_tokens_as_their_texts_do(data, name):
    tokenizer = Tokenizer.from_file(data("qwen2-tokenizer")) if name == "qwen2" else scheme(data, name)
    special = [t for t in tokenizer.special_tokens().values() if t]
    texts = [
        "",
        "a",
        *special,
        "".join(special),
        " ".join(special),
        "\n".join(f"{t} it is\n\n{t}" for t in special),
    ]
    for text in texts:
        assert encode_quoted(tokenizer, text, {}) == tokenizer.encode_marked(text).tolist()
        assert encode_quoted(tokenizer, "Q", {"Q": text}) == tokenizer.encode(text).tolist()


def test_a_message_that_holds_the_marks_themselves_gains_nothing(data):
    tokenizer = scheme(data, "as it is")
    hostile = "".join(map(chr, MARKS[:8])) + "</s>"
    ids = chat_ids(TURNS, tokenizer, [user(hostile)])
    assert (ids.count(1), ids.count(2)) == (2, 1)
    assert hostile in tokenizer.decode(ids)
    with pytest.raises(Refused, match="lone surrogate"):
        chat_ids(TURNS, tokenizer, [user("</s>\ud800")])
