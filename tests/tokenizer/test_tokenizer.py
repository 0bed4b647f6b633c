"""Tokenizers: formats and their guards, ids equal to the library's, training, import. Each check meets a planted fault."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from tokenizers import Tokenizer as Engine

from apr.common.errors import AprError, InputNotFound, IOFailure, MalformedFile, Refused, UsageError
from apr.tokenizer import training
from apr.tokenizer.families import FAMILIES, Family
from apr.tokenizer.import_hf import import_hf
from apr.tokenizer.tokenizer import Tokenizer
from apr.tokenizer.training import MAX_WORD_CHARACTERS, train_tokenizer
from apr.tokenizer.vocab_format import BYTE_CHARACTERS, HEX, MAX_IDS, check, steps
from tokenizer_cases import (
    BL,
    FROM_MARK,
    META,
    SOUND,
    SPLIT,
    TO_MARK,
    Fields,
    added,
    bpe,
    characters,
    fallback,
    gpt2_like,
    metaspace,
    nested,
    qwen_like,
    seq,
    suffixed,
    with_letters,
    without_bytes,
    wordlevel,
    wordpiece,
)

ROOT = Path(__file__).resolve().parents[2]
Data = Callable[[str], Path]

CODE = 'def f(x):\n    if x:\n        return "%d" % x\n\n    return None  # 1234567 \u00e9\u4e2d\U0001f600\n'

TEXTS = {
    "english": "All human beings are born free and equal in dignity and rights.",
    "german": "Alle Menschen sind frei und gleich an W\xfcrde und Rechten geboren.",
    "french": "Tous les \xeatres humains naissent libres et \xe9gaux, c\u2019est \xe9crit.",
    "turkish": "B\xfct\xfcn insanlar h\xfcr, haysiyet ve haklar bak\u0131m\u0131ndan e\u015fit do\u011farlar.",
    "polish": "Wszyscy ludzie rodz\u0105 si\u0119 wolni i r\xf3wni; \u017c\xf3\u0142w te\u017c.",
    "vietnamese": (
        "T\u1ea5t c\u1ea3 m\u1ecdi ng\u01b0\u1eddi sinh ra \u0111\u1ec1u \u0111\u01b0\u1ee3c t\u1ef1 do."
    ),
    "russian": (
        "\u0412\u0441\u0435 \u043b\u044e\u0434\u0438 \u0440\u043e\u0436\u0434\u0430\u044e\u0442\u0441"
        "\u044f \u0441\u0432\u043e\u0431\u043e\u0434\u043d\u044b\u043c\u0438 \u0438 \u0440\u0430\u0432"
        "\u043d\u044b\u043c\u0438 \u0432 \u0441\u0432\u043e\u0451\u043c \u0434\u043e\u0441\u0442\u043e"
        "\u0438\u043d\u0441\u0442\u0432\u0435."
    ),
    "greek": (
        "\u038c\u03bb\u03bf\u03b9 \u03bf\u03b9 \u03ac\u03bd\u03b8\u03c1\u03c9\u03c0\u03bf\u03b9 \u03b3"
        "\u03b5\u03bd\u03bd\u03b9\u03bf\u03cd\u03bd\u03c4\u03b1\u03b9 \u03b5\u03bb\u03b5\u03cd\u03b8"
        "\u03b5\u03c1\u03bf\u03b9 \u03ba\u03b1\u03b9 \u03af\u03c3\u03bf\u03b9."
    ),
    "hebrew": (
        "\u05db\u05dc \u05d1\u05e0\u05d9 \u05d4\u05d0\u05d3\u05dd \u05e0\u05d5\u05dc\u05d3\u05d5 \u05d1"
        "\u05e0\u05d9 \u05d7\u05d5\u05e8\u05d9\u05df \u05d5\u05e9\u05d5\u05d5\u05d9\u05dd \u05d1\u05e2"
        "\u05e8\u05db\u05dd."
    ),
    "arabic": (
        "\u064a\u0648\u0644\u062f \u062c\u0645\u064a\u0639 \u0627\u0644\u0646\u0627\u0633 \u0623\u062d"
        "\u0631\u0627\u0631\u064b\u0627 \u0645\u062a\u0633\u0627\u0648\u064a\u0646 \u0641\u064a \u0627"
        "\u0644\u0643\u0631\u0627\u0645\u0629 \u0648\u0627\u0644\u062d\u0642\u0648\u0642\u060c \u0661"
        "\u0662\u0663."
    ),
    "persian": (
        "\u062a\u0645\u0627\u0645 \u0627\u0641\u0631\u0627\u062f \u0628\u0634\u0631 \u0622\u0632\u0627"
        "\u062f \u0628\u0647 \u062f\u0646\u06cc\u0627 \u0645\u06cc\u200c\u0622\u06cc\u0646\u062f."
    ),
    "hindi": (
        "\u0938\u092d\u0940 \u092e\u0928\u0941\u0937\u094d\u092f\u094b\u0902 \u0915\u094b \u0917\u094c"
        "\u0930\u0935 \u0914\u0930 \u0905\u0927\u093f\u0915\u093e\u0930\u094b\u0902 \u0915\u0947 \u092e"
        "\u093e\u092e\u0932\u0947 \u092e\u0947\u0902 \u091c\u0928\u094d\u092e\u091c\u093e\u0924 \u0938"
        "\u094d\u0935\u0924\u0928\u094d\u0924\u094d\u0930\u0924\u093e \u0939\u0948\u0964"
    ),
    "bengali": (
        "\u09b8\u09ae\u09b8\u09cd\u09a4 \u09ae\u09be\u09a8\u09c1\u09b7 \u09b8\u09cd\u09ac\u09be\u09a7"
        "\u09c0\u09a8\u09ad\u09be\u09ac\u09c7 \u099c\u09a8\u09cd\u09ae\u0997\u09cd\u09b0\u09b9\u09a3 "
        "\u0995\u09b0\u09c7\u0964"
    ),
    "tamil": (
        "\u0bae\u0ba9\u0bbf\u0ba4\u0baa\u0bcd \u0baa\u0bbf\u0bb1\u0bb5\u0bbf\u0baf\u0bbf\u0ba9\u0bb0"
        "\u0bcd \u0b9a\u0b95\u0bb2\u0bb0\u0bc1\u0bae\u0bcd \u0b9a\u0bc1\u0ba4\u0ba8\u0bcd\u0ba4\u0bbf"
        "\u0bb0\u0bae\u0bbe\u0b95\u0bb5\u0bc7 \u0baa\u0bbf\u0bb1\u0b95\u0bcd\u0b95\u0bbf\u0ba9\u0bcd"
        "\u0bb1\u0ba9\u0bb0\u0bcd."
    ),
    "thai": (
        "\u0e21\u0e19\u0e38\u0e29\u0e22\u0e4c\u0e17\u0e31\u0e49\u0e07\u0e2b\u0e25\u0e32\u0e22\u0e40\u0e01"
        "\u0e34\u0e14\u0e21\u0e32\u0e21\u0e35\u0e2d\u0e34\u0e2a\u0e23\u0e30\u0e41\u0e25\u0e30\u0e40\u0e2a"
        "\u0e21\u0e2d\u0e20\u0e32\u0e04\u0e01\u0e31\u0e19"
    ),
    "georgian": (
        "\u10e7\u10d5\u10d4\u10da\u10d0 \u10d0\u10d3\u10d0\u10db\u10d8\u10d0\u10dc\u10d8 \u10d8\u10d1"
        "\u10d0\u10d3\u10d4\u10d1\u10d0 \u10d7\u10d0\u10d5\u10d8\u10e1\u10e3\u10e4\u10d0\u10da\u10d8."
    ),
    "armenian": (
        "\u0532\u0578\u056c\u0578\u0580 \u0574\u0561\u0580\u0564\u056b\u056f \u056e\u0576\u057e\u0578"
        "\u0582\u0574 \u0565\u0576 \u0561\u0566\u0561\u057f\u0589"
    ),
    "amharic": (
        "\u12e8\u1230\u12cd \u120d\u1305 \u1201\u1209 \u1232\u12c8\u1208\u12f5 \u1290\u1343 \u1290\u12cd"
        "\u1362"
    ),
    "chinese": (
        "\u4eba\u4eba\u751f\u800c\u81ea\u7531\uff0c\u5728\u5c0a\u4e25\u548c\u6743\u5229\u4e0a\u4e00\u5f8b"
        "\u5e73\u7b49\u3002"
    ),
    "japanese": (
        "\u3059\u3079\u3066\u306e\u4eba\u9593\u306f\u3001\u751f\u307e\u308c\u306a\u304c\u3089\u306b\u3057"
        "\u3066\u81ea\u7531\u3067\u3042\u308a\u3001\u30ab\u30bf\u30ab\u30ca\u3082\uff11\uff12\uff13\u3082"
        "\u3002"
    ),
    "korean": (
        "\ubaa8\ub4e0 \uc778\uac04\uc740 \ud0dc\uc5b4\ub0a0 \ub54c\ubd80\ud130 \uc790\uc720\ub85c\uc6b0"
        "\uba70 \ud3c9\ub4f1\ud558\ub2e4."
    ),
    "cherokee": "\u13a0\u13b5\u13ae\u13b5\u13cd\u13d7 \u13c2\u13a6\u13d3",
    "gothic": "\U00010332\U0001033f\U00010344\U00010339\U00010343\U0001033a \U0001d4b3\U0001d7d9",
    "code": "def f(x):\n\tif x:\n        return [x[i] for i in range(10)]  # 3.14\n\n\n\t\t}\n",
    "crlf": "one\r\ntwo\r\n\r\n\rthree \r\n",
    "digits": "0 12 123 1234567 3.14159 1,000,000 \xbd \xb2 \u2167 \u0663",
    "spaces": "  a   b    \t \xa0\u3000\u2003c   ",
    "contractions": "I'm, we'LL; don't you'd IT'S o'clock 'tis",
    "emoji": (
        "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308 "
        "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7 \U0001f44d\U0001f3fd \u2615\ufe0f"
    ),
    "decomposed": "e\u0301 A\u030a n\u0303 \u212b \u2126 q\u0323\u0307",
    "jamo": "\u1112\u1161\u11ab\u1100\u1173\u11af",
    "controls": "a\x00b\x01\x1b[0m\x7f\ufeffc\u200d\u2028d\x85e",
    "special": "<|endoftext|>x<|im_start|>user\n<|im_end|></s><unk><s>",
    "noncharacters": "\ufffd\uffff\U0010ffff\ue000",
    "empty": "",
}


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [f"# {i}\n{CODE}" + "alpha beta return self None " * i for i in range(20)]
    return train_tokenizer(texts, 400, tmp_path_factory.mktemp("tok"))


@pytest.fixture(scope="module")
def qwen(data: Data) -> Tokenizer:
    """The official tokenizer of Qwen2."""
    return Tokenizer.from_file(data("qwen2-tokenizer"))


@pytest.fixture(scope="module")
def bare(qwen: Tokenizer) -> Engine:
    """The library alone on the same file."""
    engine = Engine.from_str(qwen.json)
    engine.encode_special_tokens = True
    return engine


@pytest.fixture(scope="module")
def qwen_files(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Qwen2's vocab.json and merges.txt and nothing else."""
    folder = tmp_path_factory.mktemp("qwen")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).symlink_to(data("qwen2-tokenizer") / name)
    return folder


@pytest.fixture(scope="module")
def imported(qwen_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    out = tmp_path_factory.mktemp("imported") / "out"
    import_hf(str(qwen_files), out, "qwen2")
    return Tokenizer.from_file(out)


# --- equality with the library and with llama.cpp


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_the_library_s_and_decode_inverts_them(
    name: str, qwen: Tokenizer, imported: Tokenizer, bare: Engine
) -> None:
    for text in (TEXTS[name], f" {TEXTS[name]}\n", TEXTS[name] * 3):
        want = bare.encode(text, add_special_tokens=False).ids
        for tokenizer in (qwen, imported):
            ids = tokenizer.encode(text)
            assert ids.dtype == np.uint32
            assert ids.tolist() == want
            assert tokenizer.check_round_trip(text) is None
            assert max(want, default=0) < 151_643  # no special id, whatever the text spells out


def test_llama_cpp_vectors(qwen: Tokenizer, imported: Tokenizer, data: Data) -> None:
    folder = data("qwen2-tokenizer")
    texts = (folder / "ggml-vocab-qwen2.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (folder / "ggml-vocab-qwen2.gguf.out").read_text().removesuffix("\n").split("\n")
    assert len(texts) == len(lines) + 1 == 47
    for tokenizer in (qwen, imported):
        for text, line in zip(texts, lines, strict=False):
            assert tokenizer.encode(text).tolist() == [int(i) for i in line.split()], text


def test_vocab_and_merges_give_the_official_file(imported: Tokenizer, qwen: Tokenizer) -> None:
    assert imported.json == qwen.json
    assert imported.sha256 == qwen.sha256
    assert (imported.eos_token, imported.eos_id) == ("<|endoftext|>", 151_643)


@pytest.mark.parametrize("name", [n for n in TEXTS if n != "empty"])
def test_sentencepiece_round_trip(name: str, stories: Tokenizer) -> None:
    text = TEXTS[name]
    engine = Engine.from_str(stories.json)
    engine.encode_special_tokens = True
    assert stories.encode(text).tolist() == engine.encode(text, add_special_tokens=False).ids
    assert stories.check_round_trip(text) is None
    assert not set(stories.encode(text).tolist()) & {0, 1, 2}


@pytest.fixture(scope="module")
def stories(data: Data) -> Tokenizer:
    return Tokenizer.from_file(data("stories260K/hf"))


def test_figures_of_real_tokenizers(qwen: Tokenizer, stories: Tokenizer) -> None:
    assert (qwen.format, qwen.byte_level, qwen.unknown_id, qwen.normalization) == (
        "byte-level", True, None, "NFC",
    )  # fmt: skip
    assert (qwen.vocab_size, qwen.merges) == (151_646, 151_387)
    assert "151,646 ids up to 151,645, 0 holes; 3 added tokens" in qwen.figures
    assert (stories.format, stories.byte_level, stories.unknown_id) == ("sentencepiece", False, 0)
    assert (stories.eos_token, stories.eos_id, stories.token_bytes()) == ("</s>", 2, None)
    # tokenizer_config.json is honoured; without it the known names decide, in their order
    assert (qwen.eos_token, qwen.eos_id) == ("<|im_end|>", 151_645)
    assert Tokenizer.from_json(qwen.json, "memory").eos_id == 151_643


def test_token_bytes(qwen: Tokenizer) -> None:
    table = qwen.token_bytes()
    assert table is not None
    for text in TEXTS.values():
        assert table[qwen.encode(text)].sum() == len(qwen.normalize(text).encode())
    assert table[151_643:].tolist() == [0, 0, 0]


def test_normalize(qwen: Tokenizer, tok: Tokenizer) -> None:
    assert qwen.normalize("e\u0301 \u1112\u1161\u11ab") == "\u00e9 \ud55c"
    assert tok.normalize("e\u0301") == "e\u0301"


# --- small tokenizers of each format


@pytest.mark.parametrize("name", SOUND)
def test_sound_tokenizers_pass(name: str) -> None:
    make, form, text = SOUND[name]
    tokenizer = Tokenizer.from_json(json.dumps(make()), "memory")
    assert (tokenizer.format, tokenizer.byte_level) == (form, form == "byte-level")
    assert form in tokenizer.figures or "no known format" in tokenizer.figures
    assert tokenizer.check_round_trip(text) is None
    assert len(tokenizer.encode(text)) > 0


def put(path: str, value: Any) -> Callable[[Fields], None]:
    """Set fields["a"]["b"] for the path "a.b"; numbers index lists."""

    def change(d: Fields) -> None:
        *before, last = [int(k) if k.isdigit() else k for k in path.split(".")]
        node: Any = d
        for key in before:
            node = node[key]
        node[last] = value

    return change


def drop(*tokens: str) -> Callable[[Fields], None]:
    def change(d: Fields) -> None:
        for token in tokens:
            del d["model"]["vocab"][token]
        d["model"]["merges"] = []

    return change


def hexes(d: Fields) -> None:
    d["model"] = bpe(["<unk>", *sorted(HEX)], [], unk_token="<unk>")
    d["added_tokens"] = []


def gpt2_vocabulary(d: Fields) -> None:
    d["model"]["vocab"] = {t: i for i, t in enumerate(["[UNK]", *BYTE_CHARACTERS, "\u0120h"])}


def no_marks(d: Fields) -> None:
    d["model"]["vocab"] = [["<unk>", 0.0], ["a", -1.0], ["b", -1.0]]


WHITESPACE = {"type": "Whitespace"}
FAULTS: dict[str, tuple[Callable[[], Fields], Callable[[Fields], None], str]] = {
    # the fault that the original trained with for weeks
    "whitespace over GPT-2's vocabulary": (
        gpt2_like, put("pre_tokenizer", WHITESPACE), "vocabulary is byte-level .*pre_tokenizer is Whitespace, not ByteLevel",
    ),
    "no pre-tokenizer over GPT-2's vocabulary": (gpt2_like, put("pre_tokenizer", None), "is null, not ByteLevel"),
    "hex bytes": (characters, hexes, "vocabulary is hex bytes .*256 of '00'..'ff'.*model.type is BPE"),
    "hex bytes, byte-level encoder": (gpt2_like, hexes, "is hex bytes .*pre_tokenizer is ByteLevel: 2.. byte characters"),
    "a byte is missing": (gpt2_like, drop("\u0120", "\u0120h"), r"ByteLevel: 1 byte character without a token, first \['"),
    "a byte is missing, nested": (nested, drop("\u0143"), "1 byte character"),
    "byte-level encoder over sentencepiece": (fallback, put("pre_tokenizer", BL), "is sentencepiece .*ByteLevel"),
    "the same with all byte characters": (with_letters, put("pre_tokenizer", BL), "is sentencepiece .*: 202 tokens with char"),
    "byte-level encoder over WordPiece": (wordpiece, put("pre_tokenizer", BL), "is WordPiece .*pre_tokenizer is ByteLevel"),
    "byte-level under WordPiece": (wordpiece, gpt2_vocabulary, "is byte-level .*not ByteLevel"),
    "byte-level under WordLevel": (
        gpt2_like, put("model", {"type": "WordLevel", "vocab": gpt2_like()["model"]["vocab"], "unk_token": "a"}),
        "is byte-level .*model.type is WordLevel",
    ),
    "WordPiece under BPE": (
        wordpiece, lambda d: d["model"].update(type="BPE", merges=[], continuing_subword_prefix=None),
        "is WordPiece .*model.type is BPE",
    ),
    "sentencepiece under WordPiece": (
        wordpiece, put("model.vocab", {"[UNK]": 0, "\u2581a": 1, "b": 2}), "is sentencepiece .*model.type is WordPiece",
    ),
    "no Metaspace": (metaspace, put("pre_tokenizer", WHITESPACE), "is sentencepiece .*neither a Metaspace"),
    "another Metaspace": (metaspace, put("pre_tokenizer.replacement", "_"), "neither a Metaspace"),
    "no Replace": (fallback, put("normalizer", {"type": "NFC"}), "neither a Metaspace"),
    "Metaspace over plain pieces": (metaspace, no_marks, "puts U.2581 for spaces"),
    "byte fallback without bytes": (fallback, drop("<0x00>", "<0xFF>"), "byte_fallback is true: 2 of .* first '<0x00>'"),
    "neither bytes nor unknown": (without_bytes, put("model.unk_token", None), "nor byte_fallback with byte pieces"),
    "byte-level without decoder": (gpt2_like, put("decoder", None), "decoder is null: it needs ByteLevel"),
    "byte-level with Metaspace decoder": (qwen_like, put("decoder", META), "decoder is Metaspace: it needs ByteLevel"),
    "sentencepiece with ByteLevel decoder": (metaspace, put("decoder", BL), "decoder is ByteLevel: it needs Metaspace"),
    "fallback without ByteFallback": (fallback, put("decoder", FROM_MARK), "it needs ByteFallback"),
    "WordPiece without decoder": (wordpiece, put("decoder", None), "it needs WordPiece"),
    "suffix without decoder": (suffixed, put("decoder", {"type": "Fuse"}), "it needs BPEDecoder"),
    "suffix over bytes": (gpt2_like, put("model.end_of_word_suffix", "</w>"), "it needs BPEDecoder"),
    "characters without decoder": (characters, put("decoder", None), "it needs to join pieces"),
    "nothing for the unknown": (characters, put("model.unk_token", None), "neither an unknown token nor byte_fallback"),
    "nothing for the unknown in Unigram": (metaspace, put("model.unk_id", None), "neither an unknown token"),
    "dropout": (gpt2_like, put("model.dropout", 0.1), "dropout = 0.1: ids would be random"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_encoder_that_does_not_speak_the_vocabulary_is_refused(name: str) -> None:
    make, plant, words = FAULTS[name]
    d = make()
    Tokenizer.from_json(json.dumps(d), "memory")  # sound before
    plant(d)
    with pytest.raises(Refused, match=f"memory.*{words}") as e:
        Tokenizer.from_json(json.dumps(d), "memory")
    assert name == "dropout" or "apr tokenize" in str(e.value)


def test_the_refused_encoder_was_all_unknown() -> None:
    d = gpt2_like()
    d["model"]["unk_token"] = "u"
    d["pre_tokenizer"] = WHITESPACE
    ids = Engine.from_str(json.dumps(d)).encode("\u4e2d\u6587 \u043c\u0438\u0440").ids
    assert set(ids) == {d["model"]["vocab"]["u"]}


MALFORMED: dict[str, tuple[Callable[[], Fields], Callable[[Fields], None], str]] = {
    "no type": (gpt2_like, lambda d: d["model"].pop("type"), "model.type = None is none of BPE"),
    "other type": (gpt2_like, put("model.type", "Tiktoken"), "model.type = 'Tiktoken'"),
    "type is a list": (gpt2_like, put("model.type", ["BPE"]), "model.type = a list of 1"),
    "no vocabulary": (gpt2_like, put("model.vocab", {}), "vocab is an object of 0"),
    "vocabulary is a list": (gpt2_like, put("model.vocab", ["a"]), "vocab is a list of 1"),
    "negative id": (gpt2_like, put("model.vocab.he", -1), "token 'he' has id -1"),
    "huge id": (gpt2_like, put("model.vocab.he", MAX_IDS), f"token 'he' has id {MAX_IDS}"),
    "id of 2^64": (gpt2_like, put("model.vocab.he", 1 << 64), "has id 18446744073709551616"),
    "id is a string": (gpt2_like, put("model.vocab.he", "5"), "'he' has id '5'"),
    "id is a bool": (gpt2_like, put("model.vocab.he", True), "'he' has id True"),
    "id is a float": (gpt2_like, put("model.vocab.he", 1.0), "'he' has id 1.0"),
    "id twice": (gpt2_like, put("model.vocab.he", 0), "id 0 belongs to '!' and to 'he'"),
    "Unigram piece twice": (metaspace, lambda d: d["model"]["vocab"].append(["a", -1.0]), "piece 'a' has id 2 already"),
    "Unigram row": (metaspace, put("model.vocab.1", ["a"]), r"vocab\[1\] = a list of 1"),
    "Unigram object": (metaspace, put("model.vocab", {"a": 1}), "an object of 1, not a list"),
    "unk_id": (metaspace, put("model.unk_id", 6), "unk_id = 6 is not an id"),
    "unk_token": (characters, put("model.unk_token", "zz"), "unk_token = 'zz' is not in the vocabulary"),
    "unk_token is a number": (characters, put("model.unk_token", 3), "unk_token = 3 is not a string"),
    "added_tokens": (gpt2_like, put("added_tokens", {"a": 1}), "added_tokens is an object of 1"),
    "added token": (gpt2_like, put("added_tokens.0", "x"), r"added_tokens\[0\] = 'x' has no content"),
    "added id is a bool": (gpt2_like, put("added_tokens.0.id", True), "has id True"),
    "added id is negative": (gpt2_like, put("added_tokens.0.id", -1), "has id -1"),
    "added id is taken": (gpt2_like, put("added_tokens.0.id", 257), "id 257 of '<|endoftext|>' belongs to"),
    "added id leaves a hole": (gpt2_like, put("added_tokens.0.id", 300), "'<.endoftext.>' has id 300, the library gives it 258"),
    "added token twice": (gpt2_like, lambda d: d["added_tokens"].append(added(259, "<|endoftext|>")), "is there twice"),
    "added token in the vocabulary": (gpt2_like, put("added_tokens.0.content", "he"), "'he' has id 258, model.* it 256"),
    "step without type": (gpt2_like, put("decoder", {}), "decoder: an object of 0"),
    "step is a list": (gpt2_like, put("pre_tokenizer", [BL]), "pre_tokenizer: a list of 1"),
    "Sequence without list": (gpt2_like, put("pre_tokenizer", {"type": "Sequence"}), "a Sequence without"),
    "regular expression": (qwen_like, put("pre_tokenizer.pretokenizers.0.pattern", {"Regex": "("}), "not a tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_tokenizer(name: str) -> None:
    make, plant, words = MALFORMED[name]
    d = make()
    plant(d)
    with pytest.raises(MalformedFile, match=f"^memory.*{words}"):
        Tokenizer.from_json(json.dumps(d), "memory")


def deep(n: int) -> str:
    d = gpt2_like()
    d["pre_tokenizer"] = "HERE"
    nest = '{"type":"Sequence","pretokenizers":['
    return json.dumps(d).replace('"HERE"', nest * n + json.dumps(BL) + "]}" * n)


TEXT_FAULTS: dict[str, tuple[str, str]] = {
    "empty": ("", "not JSON"),
    "list": ("[]", "a list of 0, not an object"),
    "null": ("null", "None"),
    "no model": ("{}", "model is None"),
    "cut off": (json.dumps(gpt2_like())[:-20], "is the file whole"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "deep object": ('{"a":' * 100_000, "nested too deeply"),
    "deep sequence": (deep(200), "not a tokenizer.json|nested"),
    "infinity": (json.dumps(gpt2_like()).replace("256", "1e999"), "too large"),
    "NaN": (json.dumps(gpt2_like()).replace("256", "NaN"), "NaN is not"),
    "surrogate": (json.dumps(gpt2_like()).replace('"he"', r'"\ud800"'), "lone surrogate"),
    "surrogate in the text": (json.dumps(gpt2_like()).replace('"he"', '"\ud800"'), "lone surrogate"),
    "raw NUL": (json.dumps(gpt2_like()).replace('"he"', '"\x00"'), "not JSON"),
    "token twice": (json.dumps(gpt2_like()).replace('"he": 256', '"a": 256'), "key 'a' is there twice"),
    "long number": (json.dumps(gpt2_like()).replace("256", "9" * 5000), "not JSON"),
    "byte order mark": ("\ufeff" + json.dumps(gpt2_like()), "not JSON"),
}


@pytest.mark.parametrize("name", TEXT_FAULTS)
def test_hostile_text(name: str) -> None:
    text, words = TEXT_FAULTS[name]
    with pytest.raises(MalformedFile, match=f"^memory.*({words})"):
        Tokenizer.from_json(text, "memory")


def test_a_panic_of_the_library_is_an_error_of_the_file() -> None:
    """A panic of Rust code is no Exception: nothing else would stop it."""
    d = gpt2_like()
    split = {
        **SPLIT,
        "pattern": {"Regex": "(a+)+$"},
    }  # time that is exponential in the length, which the library bounds
    d["pre_tokenizer"] = seq("pretokenizers", split, {**BL, "use_regex": False})
    tokenizer = Tokenizer.from_json(json.dumps(d), "memory")
    with pytest.raises(MalformedFile, match=r"^memory: text cannot be encoded: .*take another"):
        tokenizer.encode("a" * 40 + "b")
    assert tokenizer.encode("aab").tolist() == tokenizer.encode("aab").tolist()


def test_merges_of_a_model_that_has_none_are_passed_over() -> None:
    d = metaspace()
    d["model"]["merges"] = 5
    assert Tokenizer.from_json(json.dumps(d), "memory").merges == 0


def test_many_steps_are_looked_at_once_each() -> None:
    """Ten times as many take ten times as long, not a hundred: both measured here, in turns, by the processor's time."""

    def seconds(count: int) -> float:
        many = {"type": "Sequence", "decoders": [{"type": "Fuse"}] * count}
        start = time.process_time()
        assert (
            len(list(steps({"type": "Sequence", "decoders": [many, {"type": "Strip"}]}, "here"))) == count + 1
        )
        return time.process_time() - start

    few, many = (
        min(found) for found in zip(*[(seconds(10_000), seconds(100_000)) for _ in range(4)], strict=True)
    )
    assert many < 40 * few


@pytest.mark.parametrize("pattern", [{"String": "a"}, {"Regex": "a*"}, {"String": ""}])
def test_steps_that_double_the_text_in_turn_are_refused(pattern: Fields) -> None:
    step = {"type": "Replace", "pattern": pattern, "content": "aa"}
    for key, kind in (("normalizer", "normalizers"), ("decoder", "decoders")):
        d = fallback()
        d[key] = seq(kind, *(d[key].get("decoders") or [d[key]]), *[step] * 40)
        with pytest.raises(Refused, match=r"^memory: its steps can make "):
            Tokenizer.from_json(json.dumps(d), "memory")
    d["decoder"] = seq("decoders", *fallback()["decoder"]["decoders"], step)
    Tokenizer.from_json(json.dumps(d), "memory")


def test_byte_fallback_without_byte_pieces_is_the_unknown_token() -> None:
    """As the tokenizers library reads the file; with a part of the bytes it is damaged."""
    text = json.dumps(without_bytes())
    tokenizer = Tokenizer.from_json(text, "memory")
    assert tokenizer.unknown_id == 0
    for words in ("ab a", "a \u00e9", "\u4e2d\u4e2d", "a\x00b"):
        want = Engine.from_str(text).encode(words).ids
        assert tokenizer.encode(words).tolist() == want
        assert (0 in want) == (words != "ab a")


def test_byte_level_steps_in_a_row_are_refused() -> None:
    """Each doubles what is not ASCII: fifty once ended the process."""
    d = gpt2_like()
    d["pre_tokenizer"] = seq("pretokenizers", *[{**BL, "use_regex": False}] * 50)
    with pytest.raises(
        Refused, match=r"^memory: its steps can make [\d,]+ characters of one, apr takes at most 4096"
    ):
        Tokenizer.from_json(json.dumps(d), "memory")


def test_surrogate_pairs_and_holes_are_fine() -> None:
    d = fallback()
    d["model"]["vocab"]["\U0001f600"] = 300
    assert "\\ud83d" in json.dumps(d)
    tokenizer = Tokenizer.from_json(json.dumps(d), "memory")
    assert tokenizer.vocab_size == 301
    assert check(d, "memory").holes == 301 - 263
    assert tokenizer.encode("\U0001f600").tolist() == [300]
    assert tokenizer.decode([299, 300]) == "\U0001f600"


# --- files


def folder_for_file(path: Path) -> None:
    path.mkdir()


def circle(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("gone")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def not_utf8(path: Path) -> None:
    path.write_bytes(b"{\xff")


def cut_off(path: Path) -> None:
    path.write_text('{"a": 1, "b"')


def listed(path: Path) -> None:
    path.write_text("[1]")


def twice(path: Path) -> None:
    path.write_text('{"a": 1, "a": 2}')


BAD_FILES: list[tuple[Callable[[Path], None], type[AprError], str]] = [
    (folder_for_file, InputNotFound, "is a folder"),
    (circle, InputNotFound, "leads nowhere"),
    (dangling, InputNotFound, "leads nowhere"),
    (pipe, InputNotFound, "is not a file"),
    (not_utf8, MalformedFile, "not UTF-8 at byte 1"),
    (cut_off, MalformedFile, "not JSON"),
    (listed, MalformedFile, "a list of 1"),
    (twice, MalformedFile, "'a' is there twice"),
]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "manifest.json"])
@pytest.mark.parametrize(("plant", "error", "words"), BAD_FILES, ids=lambda x: getattr(x, "__name__", None))
def test_bad_files_in_a_tokenizer_folder(
    tmp_path: Path,
    tok: Tokenizer,
    name: str,
    plant: Callable[[Path], None],
    error: type[AprError],
    words: str,
) -> None:
    tok.save(tmp_path)
    (tmp_path / name).unlink()
    plant(tmp_path / name)
    with pytest.raises(error, match=f"{name}.*{words}"):
        Tokenizer.from_file(tmp_path)


def test_tokenizer_files(tok: Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = Tokenizer.from_file(path)
        assert (again.sha256, again.eos_id, again.vocab_size) == (tok.sha256, tok.eos_id, tok.vocab_size)
        assert again.made == tok.made
        assert again.made is not None
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["sha256"] == tok.sha256
    assert manifest["vocab_size"] == tok.vocab_size == 257 + manifest["merges"]
    assert manifest["eos_token_id"] == tok.eos_id == tok.vocab_size - 1
    fields = json.loads(tok.json)
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields, indent=1))
    assert Tokenizer.from_file(tmp_path).sha256 == tok.sha256  # the same tokenizer in another spelling
    fields["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(MalformedFile, match=tok.sha256):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(InputNotFound, match="no such file"):
        Tokenizer.from_file(tmp_path / "nowhere")


# --- encode and decode


def random_text(rng: random.Random, n: int) -> str:
    ranges = [
        (0, 0x7F), (9, 13), (0x20, 0x20), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF),
    ]  # fmt: skip
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(n))


def test_decode_inverts_encode(tok: Tokenizer) -> None:
    rng = random.Random(0)
    texts = [random_text(rng, rng.randint(0, 80)) for _ in range(300)] + [
        CODE,
        "",
        "\ufeffx",
        "\x00",
        " " * 97,
    ]
    rows = tok.encode_batch(texts)
    for text, ids in zip(texts, rows, strict=True):
        assert ids.dtype == np.uint32
        assert ids.ndim == 1
        assert tok.decode(ids) == text
        assert np.array_equal(ids, tok.encode(text))
        assert tok.check_round_trip(text) is None


def test_encode_batch_of_nothing(tok: Tokenizer) -> None:
    assert tok.encode_batch([]) == []
    (none,) = tok.encode_batch([""])
    assert (none.shape, none.dtype) == ((0,), np.uint32)
    (row,) = tok.encode_batch(["a"])
    row[0] = 7  # its own memory


def test_an_id_without_a_token_is_visible(tok: Tokenizer) -> None:
    ids = [*tok.encode("ab"), tok.vocab_size, 1 << 40, *tok.encode("cd"), tok.vocab_size]
    assert tok.decode(ids) == "ab\ufffd\ufffdcd\ufffd"
    assert tok.decode([]) == ""


def test_special_text_in_a_document_is_text(tok: Tokenizer) -> None:
    text = "a<|endoftext|>b"
    ids = tok.encode(text)
    assert tok.eos_id not in ids
    assert tok.decode(ids) == text
    assert tok.decode([tok.eos_id]) == "<|endoftext|>"
    assert tok.decode([tok.eos_id], skip_special=True) == ""
    # the library's own default is the fault that this guards against
    tok._engine.encode_special_tokens = False
    try:
        assert tok.eos_id in tok.encode(text)
    finally:
        tok._engine.encode_special_tokens = True


def test_truncation_and_padding_of_the_file_are_off(tok: Tokenizer) -> None:
    d = json.loads(tok.json)
    d["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    d["padding"] = {
        "strategy": {"Fixed": 999}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    other = Tokenizer.from_json(json.dumps(d), "memory")
    assert np.array_equal(other.encode(CODE), tok.encode(CODE))
    assert other.json != tok.json
    assert other.sha256 == tok.sha256  # settings of the last use change no id


def test_encode_and_decode_refuse(tok: Tokenizer) -> None:
    with pytest.raises(Refused, match="character 1"):
        tok.encode("a\ud800")
    with pytest.raises(Refused, match="-1"):
        tok.decode([5, -1])


ROUND_TRIPS: dict[str, tuple[Callable[[], Fields], Callable[[Fields], None], str, str]] = {
    "prefix space": (gpt2_like, put("pre_tokenizer.add_prefix_space", True), "he", "character 0: got ' he', want 'he'"),
    "decoder that strips": (
        gpt2_like, put("decoder", seq("decoders", BL, {"type": "Strip", "content": "h", "start": 1, "stop": 0})),
        "he he", "character 0: got 'e he', want 'he he'",
    ),
    "text is cut": (qwen_like, put("pre_tokenizer.pretokenizers.0.behavior", "Removed"), "hehe he\n", "character 0"),
    "decoder that keeps the prefix": (
        fallback, put("normalizer", seq("normalizers", {"type": "Prepend", "prepend": "\u2581"}, TO_MARK)), "ab", "token 0",
    ),
    "unknown piece": (metaspace, lambda d: None, "a\u4e2d", "character 1: got 'a<unk>'"),
    "unknown word": (wordlevel, lambda d: None, "a qq", "token 2"),
    "unknown word in WordPiece": (wordpiece, lambda d: None, "a qq", "token"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_round_trip_sees(name: str) -> None:
    make, plant, text, words = ROUND_TRIPS[name]
    d = make()
    plant(d)
    why = Tokenizer.from_json(json.dumps(d), "memory").check_round_trip(text)
    assert why is not None
    assert words in why
    assert len(why) < 200


def test_added_tokens_that_are_not_special_stay_tokens() -> None:
    d = gpt2_like()
    d["added_tokens"].append(added(259, "<think>", special=False))
    tokenizer = Tokenizer.from_json(json.dumps(d), "memory")
    engine = Engine.from_str(json.dumps(d))
    engine.encode_special_tokens = True
    text = "he<think>he<|endoftext|>"
    ids = tokenizer.encode(text).tolist()
    assert ids == engine.encode(text).ids
    assert 259 in ids
    assert 258 not in ids
    assert tokenizer.check_round_trip(text) is None
    table = tokenizer.token_bytes()
    assert table is not None
    assert table[[256, 258, 259]].tolist() == [2, 0, 7]


def test_unknown_id() -> None:
    d = characters()
    assert Tokenizer.from_json(json.dumps(d), "memory").unknown_id == 0
    assert Tokenizer.from_json(json.dumps(metaspace()), "memory").unknown_id == 0
    d = gpt2_like()
    d["model"]["unk_token"] = "!"
    assert Tokenizer.from_json(json.dumps(d), "memory").unknown_id == 0
    d["model"]["vocab"]["<|endoftext|>"] = 258
    d["model"]["unk_token"] = "<|endoftext|>"  # as some byte-level files say: it never comes of text
    assert Tokenizer.from_json(json.dumps(d), "memory").unknown_id is None


# --- the end of text


def test_eos_is_an_added_token(tmp_path: Path) -> None:
    d = gpt2_like()
    d["added_tokens"] = []
    d["model"]["vocab"]["</s>"] = 258
    bare = Tokenizer.from_json(json.dumps(d), "memory")
    assert bare.eos_id is None
    assert bare.eos_token is None
    (tmp_path / "tokenizer.json").write_text(json.dumps(d))
    for eos in ('"</s>"', '{"content": "</s>"}'):
        (tmp_path / "tokenizer_config.json").write_text(f'{{"eos_token": {eos}}}')
        with pytest.raises(
            Refused,
            match=r"'</s>' is an ordinary string of the vocabulary \(id 258\), not an added token: it does not end a text",
        ):
            Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": 7}')
    with pytest.raises(MalformedFile, match="eos_token = 7"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(gpt2_like()))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert Tokenizer.from_file(tmp_path).eos_id == 258


def test_the_original_s_eos(qwen: Tokenizer) -> None:
    with pytest.raises(Refused, match=r"'</s>' is an ordinary string .*\(id 128247\).*<.endoftext.>.*--eos"):
        Tokenizer.from_json(qwen.json, "memory", "</s>")


def test_eos_by_text_and_id() -> None:
    d = gpt2_like()
    d["added_tokens"] += [
        added(259, "</s>"),
        added(260, "<stop>", special=False),
        *(added(261 + i, f"<{i}>") for i in range(9)),
    ]
    text = json.dumps(d)
    assert Tokenizer.from_json(text, "memory").eos_id == 258  # EOS_NAMES has an order
    for eos in ("<stop>", 260):
        other = Tokenizer.from_json(text, "memory", eos)
        assert (other.eos_token, other.eos_id) == ("<stop>", 260)
    d["added_tokens"][0]["special"] = False  # an ordinary string with a familiar spelling
    assert Tokenizer.from_json(json.dumps(d), "memory").eos_id == 259
    for eos in ("a", 0):
        with pytest.raises(
            Refused, match=r"ordinary string.*'<\|endoftext\|>' .258., '</s>' .259., .*, \.\.\.; name one"
        ):
            Tokenizer.from_json(text, "memory", eos)
    for eos in ("absent", 270, -1, 1 << 40):
        with pytest.raises(MalformedFile, match=f"eos {eos!r} is not one of its tokens"):
            Tokenizer.from_json(text, "memory", eos)


# --- training


def test_all_bytes_have_a_token(tmp_path: Path) -> None:
    tok = train_tokenizer(["a"], 257, tmp_path)
    assert (tok.vocab_size, tok.merges, tok.eos_id) == (257, 0, 256)
    text = "".join(map(chr, range(0x250))) + "\U0001f600"
    assert tok.decode(tok.encode(text)) == text
    assert len(tok.encode(text)) == len(text.encode())


def test_bytes_alone(tmp_path: Path) -> None:
    tok = train_tokenizer(["a"], 256, tmp_path, eos_token=None)
    assert (tok.vocab_size, tok.eos_id, Tokenizer.from_file(tmp_path).eos_id) == (256, None, None)
    assert tok.check_round_trip(CODE) is None


def test_indentation_is_one_token(tmp_path: Path) -> None:
    tok = train_tokenizer(["def f():\n        return 1\n" * 20], 300, tmp_path)
    pieces = [tok.decode([i]) for i in tok.encode("x\n        return")]
    assert pieces == ["x", "\n", " " * 7, " return"]


def test_special_tokens_come_last_and_the_end_of_text_first_of_them(tmp_path: Path) -> None:
    tok = train_tokenizer([CODE] * 3, 300, tmp_path, special_tokens=("<a>", "<b>"))
    assert tok.vocab_size == 300
    assert [tok.decode([i]) for i in (297, 298, 299)] == ["<|endoftext|>", "<a>", "<b>"]
    assert (tok.eos_id, tok.merges) == (297, 300 - 256 - 3)
    assert not set(tok.encode("<a><b><|endoftext|>").tolist()) & {297, 298, 299}
    none = train_tokenizer([CODE] * 3, 300, tmp_path / "none", eos_token=None, special_tokens=("</s>",))
    assert none.eos_id is None
    assert json.loads((tmp_path / "none" / "manifest.json").read_text())["eos_token_id"] is None


def test_manifest_says_how_it_was_made(tmp_path: Path) -> None:
    texts = ["abab", "", "\u00e9\u00e9"]
    train_tokenizer(iter(texts), 300, tmp_path, special_tokens=["<a>"], min_frequency=3, normalization="nfc")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    made = manifest["made"]
    assert made.pop("by").startswith("training, tokenizers ")
    digests = b"".join(hashlib.sha256(t.encode()).digest() for t in texts if t)
    assert made == {
        "vocab_size": 300,
        "min_frequency": 3,
        "normalization": "nfc",
        "special_tokens": ["<|endoftext|>", "<a>"],
        "documents": 2,
        "text_bytes": 8,
        "words_cut": 0,
        "documents_sha256": hashlib.sha256(digests).hexdigest(),
    }
    assert (manifest["vocab_size"], manifest["merges"]) == (258, 0)  # no pair occurs three times


def test_normalization(tmp_path: Path) -> None:
    tok = train_tokenizer([CODE], 300, tmp_path, normalization="nfc")
    assert tok.normalization == "NFC"
    assert tok.encode("e\u0301").tolist() == tok.encode("\u00e9").tolist()
    assert tok.check_round_trip("e\u0301") is None


def test_min_frequency(tmp_path: Path) -> None:
    texts = ["xyz"] * 2
    merges = [train_tokenizer(texts, 300, tmp_path / str(n), min_frequency=n).merges for n in (1, 2, 3)]
    assert merges == [2, 2, 0]


def test_progress_counts_documents(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    for texts, total in ((["a", "", "b"], 3), (iter(["a", "", "b"]), 0)):
        train_tokenizer(texts, 300, tmp_path, progress=lambda *call: calls.append(call))
        assert calls == [("train tokenizer", n, total) for n in (1, 1, 2)]
        calls.clear()


def test_training_with_other_numbers_than_asked_for_is_a_fault(tmp_path: Path, monkeypatch: Any) -> None:
    right = training.trainers.BpeTrainer
    with monkeypatch.context() as m:
        m.setattr(training.trainers, "BpeTrainer", lambda **k: right(**{**k, "min_frequency": 2}))
        with pytest.raises(AprError, match="frequency, size and normalization"):
            train_tokenizer(["a b"] * 9, 300, tmp_path / "a", min_frequency=3)
    monkeypatch.setitem(training.NORMALIZERS, "nfc", None)
    with pytest.raises(AprError, match="asked for"):
        train_tokenizer(["a b"] * 9, 300, tmp_path / "b", normalization="nfc")


def test_training_streams(tmp_path: Path) -> None:
    """No text is kept: those handed over are free again while later ones are read."""

    class Text(str):
        alive = 0

        def __new__(cls, text: str) -> Text:
            Text.alive += 1
            return super().__new__(cls, text)

        def __del__(self) -> None:
            Text.alive -= 1

    peaks = []

    def texts() -> Iterator[str]:
        for i in range(3000):
            peaks.append(Text.alive)
            yield Text(f"text {i}")

    train_tokenizer(texts(), 300, tmp_path)
    assert max(peaks) < 600  # the library reads some ahead


@pytest.mark.parametrize(
    "text",
    [
        "ab" * 40_000 + " end",
        " " * 50_000 + "x",
        "\u4e2d" * 20_000,
        "a b " * 10 + "-" * 30_000,
        "x" * (MAX_WORD_CHARACTERS + 1),
    ],
    ids=["letters", "spaces", "letters without spaces", "signs", "one more"],
)
def test_words_without_end_are_cut_and_counted(text: str, tmp_path: Path) -> None:
    counted = training._Counted([text], None)
    pieces = list(counted)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= MAX_WORD_CHARACTERS + 50
    assert counted.words_cut == 1
    tok = train_tokenizer([text, "ok"], 270, tmp_path)
    assert tok.made is not None
    assert (tok.made["words_cut"], tok.made["documents"]) == (1, 2)
    assert tok.made["text_bytes"] == len(text.encode()) + 2


def test_words_of_the_longest_length_are_whole() -> None:
    for text in (
        "x" * MAX_WORD_CHARACTERS,
        f"{'x' * MAX_WORD_CHARACTERS} {'y' * MAX_WORD_CHARACTERS}",
        "it's 123, ok\n" * 5000,
    ):
        counted = training._Counted([text], None)
        assert list(counted) == [text]
        assert counted.words_cut == 0


def test_training_refuses(tmp_path: Path) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"vocab_size": 0}, r"vocab_size = 0 is not in 257\.\.200000"),
        ({"vocab_size": 256}, "vocab_size = 256"),
        ({"vocab_size": 258, "special_tokens": ["<a>", "<b>"]}, r"259\.\.200000: 256 bytes and 3 special"),
        ({"vocab_size": 200_001}, "200001"),
        ({"vocab_size": 255, "eos_token": None}, r"256\.\.200000"),
        ({"eos_token": ""}, "special token '' is empty"),
        ({"special_tokens": ["<a>", ""]}, "is empty"),
        ({"special_tokens": ["<a>", "<a>"]}, "'<a>' is there twice"),
        ({"special_tokens": ["<|endoftext|>"]}, "is there twice"),
        ({"special_tokens": ["\ud800"]}, "surrogate"),
        ({"eos_token": "eos"}, "'eos' is an ordinary token"),
        ({"special_tokens": ["e"]}, "'e' is an ordinary token"),
        ({"min_frequency": 0}, "min_frequency = 0"),
        ({"normalization": "nfkc"}, "normalization = 'nfkc' is none of none, nfc"),
        ({"texts": [""]}, "no text"),
        ({"texts": []}, "no text"),
        ({"texts": ["ok", "a\ud800"]}, "surrogate at character 1"),
    ]
    for changes, words in bad:
        with pytest.raises(Refused, match=words):
            train_tokenizer(**{"texts": ["eos " * 50], "vocab_size": 300, "out_dir": tmp_path, **changes})
    assert not list(tmp_path.iterdir())


def test_errors_of_the_text_source_pass_through(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield "ok"
        raise MalformedFile("b.txt: not UTF-8 at byte 2")

    with pytest.raises(MalformedFile, match=r"b\.txt: not UTF-8 at byte 2"):
        train_tokenizer(texts(), 300, tmp_path / "tok")
    assert not (tmp_path / "tok").exists()


TRAIN = """
import sys
from apr.tokenizer.training import train_tokenizer
texts = ["".join(chr(97 + (i * j * 7 + j * j) % 26) + " " * (j % 5 == 0) for j in range(300)) for i in range(500)]
train_tokenizer(iter(texts), 800, sys.argv[1], special_tokens=["<a>"])
"""


def test_any_number_of_threads_gives_the_same_files(tmp_path: Path) -> None:
    made = []
    for seed, threads in enumerate(("1", "2", "7")):
        out = tmp_path / threads
        env = {
            **os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(seed), "RAYON_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "true",
        }  # fmt: skip
        run = [sys.executable, "-c", TRAIN, str(out)]
        done = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("", "")
        made.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert made[0] == made[1] == made[2]
    assert sorted(made[0]) == ["manifest.json", "tokenizer.json", "tokenizer_config.json"]


# --- import

LETTERS = ["h e", "he l", "l o", "he y"]


def small_vocab() -> dict[str, int]:
    return {t: i for i, t in enumerate([*BYTE_CHARACTERS, *(m.replace(" ", "") for m in LETTERS)])}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Family:
    """A family "small" of 260 tokens: Qwen's rules, two added tokens."""
    names = {260: ("<|endoftext|>", True), 261: ("<tool>", False)}
    family = replace(FAMILIES["qwen2.5"], base=260, added=names)
    monkeypatch.setitem(FAMILIES, "small", family)
    return family


@pytest.fixture
def model(tmp_path: Path, small: Family) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, vocab=small_vocab(), merges=LETTERS)
    return folder


def write(folder: Path, **files: Any) -> None:
    """Write vocab, merges, added_tokens, tokenizer_config, tokenizer, special_tokens_map."""
    for name, value in files.items():
        if name == "merges":
            (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(value) + "\n")
        else:
            (folder / f"{name}.json").write_text(json.dumps(value))


def config(*tokens: Fields, **more: Any) -> Fields:
    return {
        "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokens},
        **more,
    }


def decoder(key: str, token: Fields) -> Fields:
    return {"added_tokens_decoder": {key: token}}


END, TOOL = added(260, "<|endoftext|>"), {**added(261, "<tool>", special=False), "normalized": True}


def test_import_of_vocab_and_merges(model: Path, tmp_path: Path) -> None:
    made = import_hf(str(model), tmp_path / "out", "small")
    assert (made.eos_token, made.eos_id, made.vocab_size, made.merges) == ("<|endoftext|>", 260, 262, 4)
    assert json.loads(made.json)["added_tokens"] == [END, TOOL]
    assert made.encode("hello<tool>").tolist()[-1] == 261
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["sha256"] == made.sha256
    rows = [
        {
            "name": n,
            "bytes": (model / n).stat().st_size,
            "sha256": hashlib.sha256((model / n).read_bytes()).hexdigest(),
        }
        for n in ("vocab.json", "merges.txt")
    ]
    got = manifest["made"]
    assert got["files"] == rows
    assert (got["source"], got["family"], got["revision"]) == (str(model), "small", None)
    assert [got[k] for k in ("vocabulary", "merges", "added_tokens", "special_tokens")] == [260, 4, 2, 1]
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    for source in (model, model / "vocab.json"):  # the same import again is fine
        import_hf(str(source), tmp_path / "out", "small")
    after = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert {k: v for k, v in after.items() if k != "manifest.json"} == {
        k: v for k, v in before.items() if k != "manifest.json"
    }


def test_crlf_and_a_missing_version_line_change_nothing(model: Path, tmp_path: Path) -> None:
    want = import_hf(str(model), tmp_path / "out", "small").sha256
    text = (model / "merges.txt").read_text()
    for i, other in enumerate((text.replace("\n", "\r\n"), text.split("\n", 1)[1], text.removesuffix("\n"))):
        (model / "merges.txt").write_bytes(other.encode())
        assert import_hf(str(model), tmp_path / f"out{i}", "small").sha256 == want


MERGE_FAULTS: list[tuple[str, str]] = [
    ("h e\nh e\n", "line 3: 'h e' is in line 2 already"),
    ("h e\n\nl o\n", "line 3: '' is not two tokens"),
    ("h\n", "line 2: 'h' is not two tokens"),
    ("h e l\n", "line 2: 'h e l'"),
    ("h  e\n", "line 2"),
    ("h e\nx y\n", "line 3: 'xy' is not in the vocabulary"),
    ("\u4e2d e\n", r"line 2: '\\u4e2d' is not in"),
    ("h e\nhe l\nl o\n", "1 token of the vocabulary without a merge, first 'hey' .id 259."),
    ("h e\nhe l\nl o\nhe", "line 5: 'he' is not two tokens and a space; is the file whole"),
    ("", "4 tokens of the vocabulary without a merge"),
    ("#version: 0.2\nh e", "line 2: '#version:' is not in the vocabulary"),
]


@pytest.mark.parametrize(("lines", "words"), MERGE_FAULTS)
def test_bad_merges(model: Path, tmp_path: Path, lines: str, words: str) -> None:
    (model / "merges.txt").write_text("#version: 0.2\n" + lines)
    with pytest.raises(MalformedFile, match=rf"merges\.txt: .*{words}"):
        import_hf(str(model), tmp_path / "out", "small")
    assert not (tmp_path / "out").exists()


STATED: dict[str, tuple[Fields, list[Fields]]] = {
    "tokenizer_config.json": (
        {"tokenizer_config": config(END, added(261, "<b>"), eos_token="<b>")}, [END, added(261, "<b>")],
    ),
    "added_tokens.json": ({"added_tokens": {"<|endoftext|>": 260, "<tool>": 261}}, [END, TOOL]),
    "special_tokens_map.json": (
        {
            "added_tokens": {"<|endoftext|>": 260, "<b>": 261, "<c>": 262},
            "special_tokens_map": {"additional_special_tokens": [{"content": "<c>"}]},
        },
        [END, {**added(261, "<b>", special=False), "normalized": True}, added(262, "<c>")],
    ),
    "both": ({"added_tokens": {"<|endoftext|>": 260}, "tokenizer_config": config(END)}, [END]),
}  # fmt: skip


@pytest.mark.parametrize("name", STATED)
def test_files_that_state_the_added_tokens_decide(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Family
) -> None:
    files, want = STATED[name]
    if any(t["content"] in ("<b>", "<c>") for t in want):  # else the family would contradict 261
        monkeypatch.setitem(FAMILIES, "small", replace(small, added={260: small.added[260]}))
    write(model, **files)
    made = import_hf(str(model), tmp_path / "out", "small")
    assert json.loads(made.json)["added_tokens"] == want
    assert made.eos_token == "<|endoftext|>"  # the family's, not that of tokenizer_config.json
    other = import_hf(str(model), tmp_path / "other", "small", eos=want[-1]["content"])
    assert other.eos_id == want[-1]["id"]
    assert Tokenizer.from_file(tmp_path / "other").eos_id == want[-1]["id"]


IMPORT_FAULTS: dict[str, tuple[Fields, type[AprError], str]] = {
    "base": ({"vocab": {**small_vocab(), "<|endoftext|>": 260}}, Refused, "has 261 tokens, small has 260"),
    "hole": ({"vocab": {**small_vocab(), "hey": 300}}, Refused, "id 259 has no token"),
    "hole before the added": (
        {"tokenizer_config": config(added(261, "<tool>"), added(262, "<c>"))}, Refused, "id 260 has no token",
    ),
    "collision": ({"tokenizer_config": config(END, added(7, "<c>"))}, MalformedFile, "id 7 of '<c>' belongs to"),
    "family": (
        {"tokenizer_config": config(added(260, "<c>"))}, Refused,
        "_config.json says that '<c>' has id 260, family small that '<.endoftext.>' has id 260",
    ),
    "family, other id": (
        {"added_tokens": {"<|endoftext|>": 261, "<c>": 260}}, Refused, "added_tokens.json says .* family small that",
    ),
    "two files": (
        {"tokenizer_config": config(END, TOOL), "added_tokens": {"<c>": 261}}, Refused,
        "tokenizer_config.json says that '<tool>' has id 261, .*added_tokens.json that '<c>'",
    ),
    "key": ({"tokenizer_config": decoder("0260", {"content": "a"})}, MalformedFile, "'0260'.: the key is not an id"),
    "negative key": ({"tokenizer_config": decoder("-1", {"content": "a"})}, MalformedFile, "the key is not an id"),
    "huge key": ({"tokenizer_config": decoder("4194304", {"content": "a"})}, MalformedFile, "id 4194304, which"),
    "content": ({"tokenizer_config": decoder("260", {"content": 1})}, MalformedFile, "has no content"),
    "flag": (
        {"tokenizer_config": decoder("260", {"content": "<|endoftext|>", "special": "yes"})}, MalformedFile, "special = 'yes'",
    ),
    "decoder": ({"tokenizer_config": {"added_tokens_decoder": [1]}}, MalformedFile, "added_tokens_decoder is a list"),
    "added id": ({"added_tokens": {"<c>": "260"}}, MalformedFile, "'<c>' has id '260'"),
    "added bool": ({"added_tokens": {"<c>": True}}, MalformedFile, "has id True"),
    "vocab id": ({"vocab": {**small_vocab(), "he": "256"}}, MalformedFile, "vocab.json: token 'he' has id '256'"),
    "vocab twice": ({"vocab": {**small_vocab(), "he": 0}}, MalformedFile, "id 0 belongs to"),
    "vocab negative": ({"vocab": {**small_vocab(), "he": -5}}, MalformedFile, "id -5"),
    "vocab huge": ({"vocab": {**small_vocab(), "he": 10**30}}, MalformedFile, "id 10000"),
    "vocab nested": ({"vocab": {**small_vocab(), "he": {}}}, MalformedFile, "an object of 0"),
    "hex bytes": (
        {"vocab": {t: i for i, t in enumerate(["<unk>", *sorted(HEX), *"xy", "xy"])}, "merges": ["x y"]}, MalformedFile,
        "257 tokens of the vocabulary without a merge",
    ),
    "surrogate": ({"added_tokens": {"\ud800": 260}}, MalformedFile, "lone surrogate"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPORT_FAULTS)
def test_import_refuses(name: str, model: Path, tmp_path: Path) -> None:
    files, error, words = IMPORT_FAULTS[name]
    write(model, **files)
    with pytest.raises(error, match=words):
        import_hf(str(model), tmp_path / "out", "small")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    ["vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"],
)
@pytest.mark.parametrize(("plant", "error", "words"), BAD_FILES, ids=lambda x: getattr(x, "__name__", None))
def test_bad_files_in_a_model_folder(
    model: Path, tmp_path: Path, name: str, plant: Callable[[Path], None], error: type[AprError], words: str
) -> None:
    (model / name).unlink(missing_ok=True)
    plant(model / name)
    if name == "merges.txt" and plant in (cut_off, listed, twice):
        error, words = MalformedFile, "line 1"
    with pytest.raises(error, match=f"{name}.*{words}"):
        import_hf(str(model), tmp_path / "out", "small")


def test_import_usage(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases: list[tuple[tuple[Any, ...], type[AprError], str]] = [
        ((str(model), out), UsageError, "--family: qwen2, qwen2.5, qwen3, gpt2, llama3, small"),
        ((str(model), out, "bert"), UsageError, "family 'bert' is none of"),
        ((str(model), out, "small", "main"), UsageError, "revision 'main' makes sense for hf://"),
        (("https://huggingface.co/a/b", out), UsageError, "neither a path nor hf://"),
        (("hf://name", out), UsageError, "neither a path nor hf://"),
        (("hf://a/b@v1", out, None, "v2"), UsageError, "'v1' or 'v2'"),
        ((str(tmp_path / "nowhere"), out, "small"), InputNotFound, "nowhere: no such file"),
        (("a\x00b", out, "small"), InputNotFound, "no such file"),
        ((str(model), out, "small", None, "he"), Refused, "'he' is an ordinary string"),
        ((str(model), out, "small", None, "<c>"), MalformedFile, "'<c>' is not one of its tokens"),
        ((str(model), model, "small"), Refused, "is the source"),
    ]
    for arguments, error, words in cases:
        with pytest.raises(error, match=words):
            import_hf(*arguments)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputNotFound, match=r"neither tokenizer\.json nor vocab\.json"):
        import_hf(str(tmp_path / "empty"), out)
    (model / "merges.txt").unlink()
    with pytest.raises(InputNotFound, match=r"merges\.txt: no such file; vocab\.json needs it"):
        import_hf(str(model), out, "small")
    assert not out.exists()


def test_a_folder_with_another_tokenizer_is_kept(model: Path, tmp_path: Path, tok: Tokenizer) -> None:
    out = tmp_path / "out"
    tok.save(out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(Refused, match=f"holds another tokenizer, {tok.sha256}"):
        import_hf(str(model), out, "small")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    mine = tmp_path / "mine"
    import_hf(str(model), mine, "small")
    (mine / "tokenizer_config.json").unlink()
    (mine / "manifest.json").unlink()
    import_hf(str(model), mine, "small")  # one that was interrupted is completed
    with pytest.raises(Refused, match=r"with end of text '<.endoftext.>', now it would be '<tool>'"):
        import_hf(str(model), mine, "small", eos="<tool>")
    circle(tmp_path / "tokenizer.json")
    with pytest.raises(Refused, match="holds something already"):
        import_hf(str(model), tmp_path, "small")
    (tmp_path / "file").write_text("")
    with pytest.raises(IOFailure, match="file"):
        import_hf(str(model), tmp_path / "file", "small")


def test_import_of_a_tokenizer_json(model: Path, tmp_path: Path, small: Family) -> None:
    text = import_hf(str(model), tmp_path / "a", "small").json
    folder = tmp_path / "whole"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(text)
    write(folder, tokenizer_config={"eos_token": "<tool>", "chat_template": "{{ x }}"}, vocab={"other": 0})
    made = import_hf(str(folder), tmp_path / "b")  # recognised, so that the family's end of text counts
    assert made.json == text
    assert made.made is not None
    assert (made.made["family"], made.eos_token) == ("small", "<|endoftext|>")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["chat_template"] == "{{ x }}"
    assert import_hf(str(folder / "tokenizer.json"), tmp_path / "b", "small").sha256 == made.sha256
    # of no known family: what tokenizer_config.json says
    (folder / "own.json").write_text(text.replace("260", "260 ").replace('"<|endoftext|>"', '"<|end|>"'))
    other = import_hf(str(folder / "own.json"), tmp_path / "c")
    assert other.made is not None
    assert (other.made["family"], other.eos_token) == (None, "<tool>")
    for family, words in (("gpt2", "family gpt2 that"), ("qwen2", "family qwen2 that")):
        with pytest.raises(Refused, match=words):
            import_hf(str(folder), tmp_path / "d", family)


def test_added_tokens_that_only_the_config_states_are_kept(tmp_path: Path) -> None:
    write(
        tmp_path,
        tokenizer=gpt2_like(),
        tokenizer_config=config(added(258, "<|endoftext|>"), added(259, "<c>")),
    )
    made = import_hf(str(tmp_path), tmp_path / "a", eos="<c>")
    assert made.eos_id == 259
    write(tmp_path, tokenizer_config=config(added(258, "<c>")))
    with pytest.raises(
        Refused, match=r"tokenizer\.json says that '<.endoftext.>' has id 258, .*_config\.json that '<c>'"
    ):
        import_hf(str(tmp_path), tmp_path / "b")
    write(tmp_path, tokenizer_config=config(added(300, "<c>")))
    with pytest.raises(MalformedFile, match="'<c>' has id 300, the library gives it 259"):
        import_hf(str(tmp_path), tmp_path / "b")


# --- families


@pytest.mark.parametrize(
    ("name", "vocab_size", "spots"),
    [
        (
            "qwen2.5", 151_665,
            {151_646: "<|object_ref_start|>", 151_656: "<|video_pad|>", 151_657: "<tool_call>", 151_664: "<|file_sep|>"},
        ),
        ("qwen3", 151_669, {151_665: "<tool_response>", 151_667: "<think>", 151_668: "</think>"}),
    ],
)  # fmt: skip
def test_qwen_families(
    name: str, vocab_size: int, spots: dict[int, str], qwen_files: Path, tmp_path: Path
) -> None:
    made = import_hf(str(qwen_files), tmp_path, name)
    assert (made.vocab_size, made.eos_id) == (vocab_size, 151_643)
    for i, content in spots.items():
        special = i < 151_657
        assert made.decode([i]) == content
        assert made.decode([i], skip_special=True) == ("" if special else content)
        assert made.encode(content).tolist() == [i] or special
    text = "a<think>b</think><tool_call><|vision_pad|>"
    engine = Engine.from_str(made.json)
    engine.encode_special_tokens = True
    assert made.encode(text).tolist() == engine.encode(text).ids
    assert (151_667 in made.encode(text)) == (name == "qwen3")
    assert made.check_round_trip(text) is None


def grown(n: int) -> tuple[list[str], list[str]]:
    """A byte-level vocabulary of n tokens and its merges."""
    pairs = [(a, b) for a in BYTE_CHARACTERS for b in BYTE_CHARACTERS]
    pairs += [(a + b, c) for a in BYTE_CHARACTERS[:1] for b in BYTE_CHARACTERS for c in BYTE_CHARACTERS]
    pairs = pairs[: n - 256]
    return [*BYTE_CHARACTERS, *(a + b for a, b in pairs)], [f"{a} {b}" for a, b in pairs]


def test_gpt2_family(tmp_path: Path) -> None:
    tokens, merges = grown(50_256)
    folder = tmp_path / "gpt2"
    folder.mkdir()
    write(folder, vocab={t: i for i, t in enumerate([*tokens, "<|endoftext|>"])}, merges=merges)
    made = import_hf(str(folder), tmp_path / "out", "gpt2")
    assert (made.eos_id, made.vocab_size, made.merges, made.normalization) == (50_256, 50_257, 50_000, "none")
    for text in TEXTS.values():
        assert made.check_round_trip(text) is None
        assert 50_256 not in made.encode(text)
    write(folder, vocab={t: i for i, t in enumerate(["<|endoftext|>", *tokens])})
    with pytest.raises(MalformedFile, match=r"'<.endoftext.>' has id 50256, model\.vocab gives it 0"):
        import_hf(str(folder), tmp_path / "other", "gpt2")


def test_llama3_family(tmp_path: Path) -> None:
    tokens, merges = grown(128_000)
    folder = tmp_path / "llama3"
    folder.mkdir()
    tokens[-1] = "abcdef"  # a token that no merge makes: ignore_merges finds it
    write(folder, vocab={t: i for i, t in enumerate(tokens)}, merges=merges[:-1])
    made = import_hf(str(folder), tmp_path / "out", "llama3")
    assert (made.eos_token, made.eos_id, made.vocab_size) == ("<|end_of_text|>", 128_001, 128_256)
    names = [made.decode([128_000 + i]) for i in range(256)]
    assert names[:6] == [
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>",
    ]  # fmt: skip
    assert names[6:12] == [
        "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
        "<|reserved_special_token_3|>",
    ]  # fmt: skip
    assert names[255] == "<|reserved_special_token_247|>"
    assert made.encode("abcdef").tolist() == [127_999]
    assert made.encode("a", add_special_tokens=True)[0] == 128_000
    for text in TEXTS.values():
        assert made.check_round_trip(text) is None


def test_families_agree_with_themselves() -> None:
    for name, family in FAMILIES.items():
        assert len({c for c, _ in family.added.values()}) == len(family.added), name
        assert sorted(family.added) == list(range(min(family.added), max(family.added) + 1))
        assert min(family.added) in (family.base, family.base - 1)
        assert family.eos in {c for c, special in family.added.values() if special}
    assert [len(FAMILIES[n].added) for n in ("qwen2", "qwen2.5", "qwen3", "llama3")] == [3, 22, 26, 256]


# --- the hub


def test_import_from_the_hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, sorted(allow_patterns)))
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    made = import_hf("hf://org/name-1.5@v1", tmp_path / "out", "small")
    import_hf("hf://org/name-1.5", tmp_path / "out", "small", revision="v1")
    files = [
        "added_tokens.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    assert asked == [("org/name-1.5", "v1", files)] * 2
    assert made.made is not None
    assert (made.made["source"], made.made["revision"]) == ("hf://org/name-1.5@v1", "model")


@pytest.mark.parametrize(
    ("error", "become", "words"),
    [
        (
            OSError("Name or service not known\nmore"),
            InputNotFound,
            "Name or service not known; check the network, or download",
        ),
        (LocalEntryNotFoundError("offline"), InputNotFound, "offline"),
        (None, InputNotFound, "no such repository or revision"),
    ],
    ids=["no network", "offline", "no repository"],
)
def test_a_hub_that_does_not_answer(
    error: Exception | None,
    become: type[AprError],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error or RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(become, match=f"hf://org/name.*{words}") as e:
        import_hf("hf://org/name", tmp_path / "out")
    assert "\n" not in str(e.value)


def test_checks_leave_the_fields_alone() -> None:
    for make, _, _ in SOUND.values():
        d = make()
        before = copy.deepcopy(d)
        check(d, "memory")
        assert d == before


def test_a_byte_level_tokenizer_that_loses_text_is_not_imported(tok: Tokenizer, tmp_path: Path) -> None:
    """A pre-tokenizer that drops spaces: every byte has a token, and the text is lost all the same."""
    d = json.loads(tok.json)
    spaces = {"type": "WhitespaceSplit"}
    d["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [spaces, *d["pre_tokenizer"]["pretokenizers"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(d))
    with pytest.raises(Refused, match="loses text"):
        import_hf(str(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
