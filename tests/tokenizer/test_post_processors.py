"""Post-processors of strangers: what they may put around a text, and how often they may repeat it."""

from __future__ import annotations

import json
from typing import Any

import pytest

import tokenizer_cases
from apr.common.errors import AprError, MalformedFile, Refused
from apr.tokenizer.post_processors import MAX_AROUND
from apr.tokenizer.tokenizer import Tokenizer

TEXT = {"Sequence": {"id": "A", "type_id": 0}}
MARK = {"SpecialToken": {"id": "m", "type_id": 0}}


def template(single: list[Any], ids: Any) -> dict[str, Any]:
    tokens = {"m": {"id": "m", "ids": ids, "tokens": ["m"] * (len(ids) if isinstance(ids, list) else 1)}}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def opened(post: Any) -> Tokenizer:
    return Tokenizer.from_json(json.dumps({**tokenizer_cases.gpt2_like(), "post_processor": post}), "here")


@pytest.mark.parametrize(
    "post",
    [
        template([MARK, TEXT], [0] * (MAX_AROUND + 1)),
        template([MARK] * 100 + [TEXT], [0] * 100),
        {"type": "Sequence", "processors": [template([MARK, TEXT], [0] * 600)] * 2},
        {
            "type": "Sequence",
            "processors": [{"type": "Sequence", "processors": [template([TEXT, *[MARK] * 2000], [0])]}],
        },
    ],
)
def test_more_than_a_model_was_ever_given_is_refused(post: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=r"here: post_processor puts .* ids around a text; apr takes"):
        opened(post)


@pytest.mark.parametrize(("texts", "times"), [([TEXT] * 2, 2), ([MARK], 0), ([TEXT] * 200, 200)])
def test_a_text_that_is_repeated_or_left_out_is_refused(texts: list[Any], times: int) -> None:
    """transformers trains on such a text twice; here it stood once, without a word."""
    post = template(texts, [0])
    for wrong in (post, {"type": "Sequence", "processors": [template([MARK, TEXT], [0]), post]}):
        with pytest.raises(Refused, match=f"here: post_processor.single holds the text {times} times"):
            opened(wrong)
    assert opened({**template([TEXT], []), "pair": [TEXT, TEXT]})


def test_an_id_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(MalformedFile, match="here: post_processor adds an id outside"):
        opened(template([MARK, TEXT], [10**6]))


@pytest.mark.parametrize("value", [None, 1, "x", [], [1], {}, {"a": 1}, [None], True])
@pytest.mark.parametrize("key", ["single", "pair", "special_tokens", "type", "ids", "processors"])
def test_entries_of_any_type_are_errors_of_ours(key: str, value: Any) -> None:
    post: Any = {**template([MARK, TEXT], value if key == "ids" else [0])}
    if key == "processors":
        post = {"type": "Sequence", "processors": value}
    elif key != "ids":
        post[key] = value
    try:
        opened(post)
    except AprError as e:
        assert str(e).startswith("here")  # noqa: PT017


def test_templates_in_use_are_read() -> None:
    both = {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
            template([MARK, TEXT, MARK], [0]),
        ],
    }
    tokenizer = opened(both)
    plain = tokenizer.encode("ab").tolist()
    assert tokenizer.encode("ab", add_special_tokens=True).tolist() == [0, *plain, 0]
