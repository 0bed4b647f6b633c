"""Rules of a tokenizer that a GGUF header has no key for: each is refused by name, as llama.cpp would give texts other ids."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

import tokenizer_cases
from apr.checkpoints.gguf_rules import space_note
from apr.checkpoints.gguf_vocab import RULES, special_of, tokenizer_json, vocabulary_keys
from apr.common.errors import Refused
from apr.tokenizer.tokenizer import Tokenizer
from apr.tokenizer.vocab_format import steps
from tokenizer_cases import BYTE_CHARACTERS, META, TO_MARK, added

Fields = dict[str, Any]
PREPEND = {"type": "Prepend", "prepend": "\u2581"}


def byte_level() -> Fields:
    return tokenizer_cases.gpt2_like()


def sentencepiece() -> Fields:
    d = tokenizer_cases.fallback()
    d["model"]["merges"].append("a b")
    d["added_tokens"] = [added(0, "<unk>"), added(len(d["model"]["vocab"]), "</s>")]
    return d


def keys_of(d: Fields, bos: int | None = None) -> Fields:
    rows = max([*d["model"]["vocab"].values(), *(t["id"] for t in d["added_tokens"])]) + 1
    ids = {t["content"]: t["id"] for t in d["added_tokens"]}
    return vocabulary_keys(json.dumps(d), "t", rows, ids.get("</s>", ids.get("<|endoftext|>")), bos)


def template(*single: int | str, pairs: dict[str, int]) -> Fields:
    """A post-processor that puts special tokens around a text, which is "A"."""
    kinds = [{"Sequence" if x == "A" else "SpecialToken": {"id": x, "type_id": 0}} for x in single]
    tokens = {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in pairs.items()}
    return {"type": "TemplateProcessing", "single": kinds, "pair": [], "special_tokens": tokens}


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_take_what_is_beside_them(make: Callable[[], Fields], flag: str) -> None:
    d = make()
    assert keys_of(d)
    d["added_tokens"].append({**added(d["added_tokens"][-1]["id"] + 1, "<mask>", False), flag: True})
    with pytest.raises(Refused, match=f"^t: {flag} = true of the added token '<mask>'"):
        keys_of(d)


@pytest.mark.parametrize(
    ("make", "option", "value"),
    [
        (byte_level, "ignore_merges", True),
        (sentencepiece, "ignore_merges", True),
        (sentencepiece, "byte_fallback", False),
        (sentencepiece, "continuing_subword_prefix", "a"),
    ],
)
def test_options_of_the_model(make: Callable[[], Fields], option: str, value: Any) -> None:
    d = make()
    d["model"][option] = value
    with pytest.raises(Refused, match=option):
        keys_of(d)


def test_what_a_sentencepiece_encoder_may_do() -> None:
    sound = (
        (None, META),
        ({"type": "Sequence", "normalizers": [PREPEND, TO_MARK]}, None),
        ({"type": "Sequence", "normalizers": [{"type": "NFC"}, TO_MARK]}, None),
        (TO_MARK, {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}),
    )  # fmt: skip
    other = (
        ({"type": "Sequence", "normalizers": [{"type": "NFKC"}, TO_MARK]}, None, "normalizer 'NFKC'"),
        ({"type": "Sequence", "normalizers": [{"type": "Lowercase"}, TO_MARK]}, None, "normalizer 'Lowercase'"),
        ({"type": "Sequence", "normalizers": [{**PREPEND, "prepend": "b"}, TO_MARK]}, None, "normalizer 'Prepend'"),
        (TO_MARK, {"type": "Punctuation", "behavior": "Isolated"}, "pre_tokenizer 'Punctuation'"),
    )  # fmt: skip
    for normalizer, pre, *words in (*sound, *other):
        d = {**sentencepiece(), "normalizer": copy.deepcopy(normalizer), "pre_tokenizer": copy.deepcopy(pre)}
        if words:
            with pytest.raises(Refused, match=words[0]):
                keys_of(d)
        else:
            assert keys_of(d)


def test_ids_around_a_text() -> None:
    """A header can say that the beginning of a text comes before it, and its end behind."""
    d = byte_level()
    d["added_tokens"].append(added(259, "<s>"))
    ids = {"<s>": 259, "<|endoftext|>": 258}
    for single, bos, said in (
        (("A",), None, (False, False)),
        (("<s>", "A"), None, (True, False)),
        (("<s>", "A"), 259, (True, False)),
        (("<s>", "A", "<|endoftext|>"), 259, (True, True)),
        (("<|endoftext|>", "A"), 259, None),
        (("<s>", "<s>", "A"), 259, None),
        (("<s>", "<s>", "A"), None, None),
        (("A", "<s>"), 259, None),
    ):
        d["post_processor"] = template(*single, pairs=ids)
        if said is None:
            with pytest.raises(Refused, match="post_processor puts"):
                keys_of(d, bos)
            continue
        keys = keys_of(d, bos)
        assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == said
        back = Tokenizer.from_json(tokenizer_json(keys, "b") or "", "b")
        text = "hehe he"
        assert (
            back.encode(text, True).tolist()
            == Tokenizer.from_json(json.dumps(d), "a").encode(text, True).tolist()
        )


@pytest.mark.parametrize("format_", ["sentencepiece", "byte-level"])
def test_a_unigram_vocabulary_is_refused_by_its_name(format_: str) -> None:
    d = tokenizer_cases.metaspace()
    if format_ == "byte-level":
        d = tokenizer_cases.bytes_alone()
        d["model"] = {"type": "Unigram", "unk_id": None, "vocab": [[c, -1.0] for c in BYTE_CHARACTERS]}
    d["added_tokens"] = [added(len(d["model"]["vocab"]), "</s>")]
    with pytest.raises(Refused, match=f"^t: a Unigram tokenizer of format {format_}"):
        vocabulary_keys(json.dumps(d), "t", 300, d["added_tokens"][0]["id"])


def test_a_token_of_the_user_is_found_wherever_it_stands() -> None:
    """llama.cpp looks for it in the text as it is, before spaces become U+2581."""
    d = sentencepiece()
    d["normalizer"] = {"type": "Sequence", "normalizers": [PREPEND, TO_MARK]}
    d["added_tokens"].append(added(d["added_tokens"][-1]["id"] + 1, "<im>", False))
    a = Tokenizer.from_json(json.dumps(d), "a", "</s>")
    b = Tokenizer.from_json(tokenizer_json(keys_of(d), "b") or "", "b", "</s>")
    for text in ("a<im>b", "<im> a", "a <im>"):
        assert b.encode_marked(text).tolist() == a.encode_marked(text).tolist()
        assert d["added_tokens"][-1]["id"] in b.encode(text)


def test_a_token_that_no_merge_makes() -> None:
    """llama.cpp joins any two neighbours whose text is a token: "ab" became one id, here it is two."""
    d = sentencepiece()
    d["model"]["merges"].remove("a b")
    with pytest.raises(
        Refused, match=r"^t: no merge makes the token 'ab' of two others: llama\.cpp has no such rule"
    ):
        keys_of(d)


@pytest.mark.parametrize(
    ("tokens", "is_fine"),
    [(("ab", "bcXYZ"), False), (("\t\n", "\n\n"), False), (("ab", "ba"), False), (("abcd", "bc"), True),
     (("  ", "   ", "     "), True), (("<|a|>", "<|bb|>", "</s>"), True), (("aba",), True)],
)  # fmt: skip
def test_added_tokens_that_overlap(tokens: tuple[str, ...], is_fine: bool) -> None:
    """Of "abcXYZ" with the tokens "ab" and "bcXYZ" llama.cpp makes a, bcXYZ, and the library ab, c, X, Y, Z."""
    d = byte_level()
    d["added_tokens"] += [added(259 + i, token, False) for i, token in enumerate(tokens)]
    if is_fine:
        assert keys_of(d)
    else:
        with pytest.raises(Refused, match=r"the added tokens '.*' and '.*' overlap"):
            keys_of(d)


def test_added_tokens_behind_a_normalizer_that_puts_a_mark_first() -> None:
    """The library finds "<im>" of such a tokenizer as U+2581<im>, so not within "a<im>"; llama.cpp finds it there."""
    d = sentencepiece()
    d["normalizer"] = {"type": "Sequence", "normalizers": [TO_MARK]}
    d["added_tokens"].append({**added(d["added_tokens"][-1]["id"] + 1, "<im>", False), "normalized": True})
    assert keys_of(d)
    d["normalizer"]["normalizers"].insert(0, PREPEND)
    with pytest.raises(Refused, match=r"^t: normalized = true of the added token '<im>'"):
        keys_of(d)


@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}])
@pytest.mark.parametrize("rule", ["qwen2", "dbrx", "gpt-2", "sentencepiece"])
def test_the_normalizer_comes_back(rule: str, normalizer: Any) -> None:
    """A name of llama.cpp does not say it: reading qwen2 as Qwen's own gave texts that are not in NFC other ids."""
    if rule == "sentencepiece":
        d = sentencepiece()
        d["normalizer"] = {
            "type": "Sequence",
            "normalizers": [*([normalizer] if normalizer else []), TO_MARK],
        }
    else:
        d = {**byte_level(), "pre_tokenizer": RULES[rule]["pre_tokenizer"], "normalizer": normalizer}
    keys = keys_of(d)
    made = json.loads(tokenizer_json(keys, "b") or "")
    kinds = [s["type"] for s in steps(made["normalizer"], "b")]
    assert ("NFC" in kinds) == (normalizer is not None)
    a, b = (Tokenizer.from_json(json.dumps(x), "t") for x in (d, made))
    for text in ("e\u0301 he", "\u212b", "\u00e9 a"):
        assert b.encode(text).tolist() == a.encode(text).tolist()
    with pytest.raises(Refused, match=r"apr\.tokenizer\.normalizer = 'NFD'"):
        tokenizer_json({**keys, "apr.tokenizer.normalizer": "NFD"}, "b")
    if rule != "sentencepiece":
        with pytest.raises(Refused, match="cut by a list"):
            tokenizer_json({**keys, "tokenizer.ggml.pre": ["qwen2"]}, "b")


@pytest.mark.parametrize(
    ("scheme", "words"), [("always", "one, which"), ("first", "behind a special token, which"), ("never", "")]
)
def test_spaces_that_llama_cpp_puts_and_metaspace_does_not(scheme: str, words: str) -> None:
    """Of stories260K's vocabulary, llama.cpp gives " " 410, 410, and the library 410."""
    d = {**sentencepiece(), "normalizer": None, "pre_tokenizer": {**META, "prepend_scheme": scheme}}
    assert keys_of(d)
    note = space_note(json.dumps(d), "t")
    assert (words in note) if note else not words
    assert space_note(json.dumps(sentencepiece()), "t") is None


def test_ids_that_llama_cpp_takes_without_a_key() -> None:
    """Of SentencePiece 1 and 2: its converter leaves the keys out where config.json names no such ids."""
    d = tokenizer_cases.fallback()
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in d["model"]["vocab"]:
        vocab.setdefault(token, len(vocab))
    d["model"] |= {"vocab": vocab, "merges": ["\u2581 a", "a b"]}
    d["added_tokens"] = [added(i, token) for token, i in list(vocab.items())[:3]]
    d["post_processor"] = template("<s>", "A", pairs={"<s>": 1})
    keys = keys_of(d)
    bare = {
        k: v
        for k, v in keys.items()
        if k.split(".")[-1] not in ("bos_token_id", "eos_token_id", "add_bos_token")
    }
    assert [special_of(bare, name, "b") for name in ("bos", "eos", "eot")] == [1, 2, None]
    assert tokenizer_json(bare, "b") == tokenizer_json(keys, "b")
    kinds = [1 if i in (1, 2) else kind for i, kind in enumerate(keys["tokenizer.ggml.token_type"])]
    assert special_of(bare | {"tokenizer.ggml.token_type": kinds}, "eos", "b") is None
