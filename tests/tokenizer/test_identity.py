"""The identity of a tokenizer: what changes an id changes it, another spelling of the same file does not."""

from __future__ import annotations

import hashlib
import json

import pytest

from apr.tokenizer.tokenizer import Tokenizer, library_spelling
from apr.tokenizer.training import train_tokenizer

TEXTS = ["def f(x):\n    return x + 1\n", "the theory of the thing\n"] * 20


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return train_tokenizer(iter(TEXTS), 300, tmp_path_factory.mktemp("tok"))


def merges_as_text(d):
    d["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in d["model"]["merges"]]


def merges_as_pairs(d):
    d["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in d["model"]["merges"]]


def keys_in_another_order(d):
    for key in list(d):
        d[key] = d.pop(key)
    d["model"]["vocab"] = dict(reversed(d["model"]["vocab"].items()))


def idle_keys_are_left_out(d):
    for key in ("version", "truncation", "padding"):
        d.pop(key, None)
    for key in [k for k, v in d["model"].items() if v in (None, False)]:
        del d["model"][key]


def a_last_use_is_written_down(d):
    d["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}


SAME = [
    merges_as_text,
    merges_as_pairs,
    keys_in_another_order,
    idle_keys_are_left_out,
    a_last_use_is_written_down,
]


def a_merge_is_gone(d):
    d["model"]["merges"].pop()


def two_merges_change_places(d):
    merges = d["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def two_ids_change_places(d):
    vocab = d["model"]["vocab"]
    a, b = list(vocab)[5:7]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def text_is_normalized(d):
    d["normalizer"] = {"type": "NFC"}


def whole_words_are_looked_up(d):
    d["model"]["ignore_merges"] = True


OTHER = [
    a_merge_is_gone,
    two_merges_change_places,
    two_ids_change_places,
    text_is_normalized,
    whole_words_are_looked_up,
]


def changed(tok, change):
    d = json.loads(tok.json)
    change(d)
    return Tokenizer.from_json(json.dumps(d), "memory")


@pytest.mark.parametrize("change", SAME, ids=lambda f: f.__name__)
def test_another_spelling_is_the_same_tokenizer(tok, change):
    other = changed(tok, change)
    assert other.sha256 == tok.sha256
    assert other.encode(TEXTS[1]).tolist() == tok.encode(TEXTS[1]).tolist()


@pytest.mark.parametrize("change", OTHER, ids=lambda f: f.__name__)
def test_what_changes_ids_is_another_tokenizer(tok, change):
    other = changed(tok, change)
    assert other.sha256 != tok.sha256
    assert not tok.is_recorded_as(other.sha256)


def test_records_of_older_versions_are_accepted(tok):
    """They hold the hash of the bytes: as trained, as the library writes it, indented, or without white space."""
    fields = json.loads(tok.json)
    compact = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    again = Tokenizer.from_json(compact, "a checkpoint")
    for text in (tok.json, library_spelling(tok.json, "x"), compact):
        record = hashlib.sha256(text.encode()).hexdigest()
        assert tok.is_recorded_as(record)
        assert again.is_recorded_as(record)
    assert not tok.is_recorded_as("0" * 64)
    assert not tok.is_recorded_as(None)
    assert not tok.is_recorded_as(["a"])
