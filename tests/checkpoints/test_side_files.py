"""Side files: one chat template in every place, and the ids that end a turn among those that end a text."""

from __future__ import annotations

import json

import pytest

from apr.checkpoints.checkpoint import template_in
from apr.checkpoints.named_ids import end_of_text
from apr.checkpoints.side_files import with_one_template, with_turn_ends
from apr.tokenizer.chat_template import ChatTemplate
from apr.tokenizer.tokenizer import Tokenizer
from finetune_cases import OWN_TEMPLATE, own_tokenizer


def own():
    return Tokenizer.from_json(own_tokenizer(), "own", "<|endoftext|>")


def config_of(texts):
    return json.loads(texts["tokenizer_config.json"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("B", "A"),
        (None, None),
        (
            [{"name": "default", "template": "B"}, {"name": "tools", "template": "C"}],
            [{"name": "default", "template": "A"}, {"name": "tools", "template": "C"}],
        ),
    ],
)
def test_an_older_template_under_the_key_gives_way_to_the_file(old, new):
    config = {"eos_token": "<|endoftext|>"} | ({"chat_template": old} if old else {})
    texts = with_one_template({"chat_template.jinja": "A", "tokenizer_config.json": json.dumps(config)})
    assert config_of(texts).get("chat_template") == new
    assert template_in(texts) == "A"


def test_texts_that_agree_stay_as_they_are():
    for texts in (
        {"chat_template.jinja": "A", "tokenizer_config.json": '{"chat_template":   "A"}'},
        {"tokenizer_config.json": '{"chat_template":   "B"}'},
        {"chat_template.jinja": "A"},
        {},
    ):
        assert with_one_template(texts) == texts


@pytest.mark.parametrize("eos", ["<|endoftext|>", {"content": "<|endoftext|>", "lstrip": False}])
@pytest.mark.parametrize(
    "generation", [None, {}, {"eos_token_id": 5, "top_p": 0.8}, {"eos_token_id": [5, 6]}]
)
def test_the_end_of_a_turn_joins_every_list(eos, generation):
    tokenizer = own()
    ids = {text: i for i, text in tokenizer.special_tokens().items()}
    texts = {
        "config.json": json.dumps({"eos_token_id": 7, "other": 1}),
        "tokenizer_config.json": json.dumps({"eos_token": eos}),
        "special_tokens_map.json": json.dumps({"eos_token": eos}),
    } | ({"generation_config.json": json.dumps(generation)} if generation is not None else {})
    template = ChatTemplate(OWN_TEMPLATE, "test", {"bos_token": "<|bos|>"})
    got = with_turn_ends(texts, template, tokenizer, [tokenizer.eos_id])
    assert json.loads(got["config.json"]) == {"eos_token_id": [7, ids["<|end|>"]], "other": 1}
    before = (generation or {}).get("eos_token_id", tokenizer.eos_id)
    before = before if isinstance(before, list) else [before]
    there = json.loads(got["generation_config.json"])
    assert there == {**(generation or {}), "eos_token_id": [*before, ids["<|end|>"]]}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        named = json.loads(got[name])["eos_token"]
        assert (named["content"] if isinstance(eos, dict) else named) == "<|end|>"
    assert with_turn_ends(got, template, tokenizer, [tokenizer.eos_id]) == got


def test_a_template_that_asks_for_eos_token_keeps_it():
    """Its text would change with another one."""
    text = OWN_TEMPLATE.replace("{{ bos_token }}", "{{ eos_token }}")
    texts = {"tokenizer_config.json": json.dumps({"eos_token": "<|endoftext|>"})}
    tokenizer = own()
    template = ChatTemplate(text, "test", {"eos_token": "<|endoftext|>"})
    got = with_turn_ends(texts, template, tokenizer, [tokenizer.eos_id])
    assert config_of(got)["eos_token"] == "<|endoftext|>"
    assert len(json.loads(got["generation_config.json"])["eos_token_id"]) == 2


def test_a_template_without_an_end_changes_nothing():
    template = ChatTemplate("{% for m in messages %}{{ m.content }}\n{% endfor %}", "test")
    assert with_turn_ends({}, template, own(), [1]) == {}


@pytest.mark.parametrize(
    ("tokenizer_config", "config", "want"),
    [
        ({"eos_token": "<|endoftext|>"}, {"eos_token_id": [3, 4]}, "<|endoftext|>"),
        ({"eos_token": {"content": "<|end|>"}}, {"eos_token_id": 3}, "<|end|>"),
        ({"eos_token": "no token"}, {"eos_token_id": [3, 4]}, 3),
        ({}, {"eos_token_id": [3, 4]}, 3),
        ({}, {"eos_token_id": []}, None),
        ({}, {}, None),
    ],
)
def test_one_id_ends_a_text_however_a_folder_is_opened(tokenizer_config, config, want):
    ids = {text: i for i, text in own().special_tokens().items()}
    assert end_of_text(own_tokenizer(), tokenizer_config, config) == ids.get(want, want)
    for broken in (None, "{", "[]", '{"added_tokens": 3}', '{"added_tokens": [3, {}]}'):
        first = config.get("eos_token_id")
        assert end_of_text(broken, tokenizer_config, config) == (
            (first[0] if first else None) if isinstance(first, list) else first
        )
