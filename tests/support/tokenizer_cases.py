"""Small tokenizers of each format, as fields of a tokenizer.json."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from apr.tokenizer.vocab_format import BYTE_CHARACTERS, FALLBACK_BYTES, HEX

Fields = dict[str, Any]


def added(i: int, content: str, special: bool = True) -> Fields:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content, **flags, "special": special}


def fields_of(model: Fields, pre: Any, decoder: Any, normalizer: Any = None) -> Fields:
    d = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": normalizer,
        "pre_tokenizer": pre, "post_processor": None, "decoder": decoder, "model": model,
    }  # fmt: skip
    return copy.deepcopy(d)  # faults are planted in it


def bpe(tokens: list[str], merges: list[str], **options: Any) -> Fields:
    return {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges, **options}


BL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


SPLIT = {"type": "Split", "pattern": {"Regex": r"\s?\S+|\s+"}, "behavior": "Isolated", "invert": False}


META = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}


TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


FROM_MARK = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}


WORDS = ["\u2581", "a", "b", "\u2581a", "ab"]


def seq(kind: str, *inner: Fields) -> Fields:
    return {"type": "Sequence", kind: copy.deepcopy(list(inner))}


def gpt2_like() -> Fields:
    d = fields_of(bpe([*BYTE_CHARACTERS, "he", "\u0120h"], ["h e", "\u0120 h"]), BL, BL)
    d["added_tokens"] = [added(258, "<|endoftext|>")]
    return d


def qwen_like() -> Fields:
    d = gpt2_like()
    d["pre_tokenizer"] = seq("pretokenizers", SPLIT, {**BL, "use_regex": False})
    d["normalizer"] = {"type": "NFC"}
    # as DeepSeek spells it: an added token with sentencepiece's mark says nothing of the vocabulary
    d["added_tokens"].append(added(259, "<\uff5cend\u2581of\u2581sentence\uff5c>"))
    return d


def llama3_like() -> Fields:
    d = qwen_like()
    d["model"]["ignore_merges"] = True
    d["normalizer"] = None
    return d


def nested() -> Fields:
    d = gpt2_like()
    d["pre_tokenizer"] = seq("pretokenizers", SPLIT, seq("pretokenizers", {**BL, "use_regex": False}))
    d["decoder"] = seq("decoders", BL)
    return d


def bytes_alone() -> Fields:
    return fields_of(bpe(list(BYTE_CHARACTERS), []), BL, BL)


def many_hexes() -> Fields:
    hexes = sorted(HEX - set(BYTE_CHARACTERS))
    return fields_of(bpe([*BYTE_CHARACTERS, *hexes], [f"{h[0]} {h[1]}" for h in hexes]), BL, BL)


def metaspace() -> Fields:
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], *([w, -2.0] for w in WORDS)]}
    return fields_of(model, META, META)


def fallback(fill: tuple[str, ...] = ()) -> Fields:
    """As Gemma and Llama 2. fill: further pieces."""
    model = bpe(
        ["<unk>", *FALLBACK_BYTES, *WORDS, *fill],
        ["\u2581 a"],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    decoder = seq("decoders", FROM_MARK, {"type": "ByteFallback"}, {"type": "Fuse"})
    return fields_of(model, None, decoder, TO_MARK)


def without_bytes() -> Fields:
    """As small published models: byte_fallback, and not one byte piece to fall back on."""
    d = fallback()
    d["model"]["vocab"] = {t: i for i, t in enumerate(["<unk>", *WORDS])}
    return d


def with_letters() -> Fields:
    """A large sentencepiece vocabulary has the byte characters too: they are letters of Latin scripts."""
    return fallback(
        tuple(c for c in BYTE_CHARACTERS if c not in WORDS) + tuple(f"\u2581w{i}" for i in range(200))
    )


def wordpiece() -> Fields:
    tokens = ["[UNK]", "un", "##aff", "##able", "a", "##a"]
    model = {
        "type": "WordPiece", "vocab": {t: i for i, t in enumerate(tokens)}, "unk_token": "[UNK]",
        "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
    }  # fmt: skip
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    return fields_of(model, {"type": "BertPreTokenizer"}, decoder, {"type": "Lowercase"})


def wide_wordpiece() -> Fields:
    """As multilingual BERT: WordPiece with the letters of all scripts."""
    d = wordpiece()
    letters = [c for c in BYTE_CHARACTERS if c not in d["model"]["vocab"]] + [
        chr(0x4E00 + i) for i in range(300)
    ]
    tokens = [*d["model"]["vocab"], *letters, *(f"##{c}" for c in letters)]
    d["model"]["vocab"] = {t: i for i, t in enumerate(tokens)}
    return d


def put_in_later() -> Fields:
    """Byte-level with tokens among the ordinary ones that the encoder never makes."""
    d = gpt2_like()
    d["added_tokens"] = []
    d["model"]["vocab"] |= {f"<\uff5c{i}\uff5c>": 258 + i for i in range(9)}
    return d


def wordlevel() -> Fields:
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1, "b": 2, "\u2581": 3}, "unk_token": "[UNK]"}
    model["vocab"] |= {f"w{i}": 4 + i for i in range(200)}
    return fields_of(model, {"type": "Whitespace"}, None)


def characters() -> Fields:
    return fields_of(bpe(["?", "a", "b", " "], [], unk_token="?"), None, {"type": "Fuse"})


def suffixed() -> Fields:
    model = bpe(["?", "a", "b", "a</w>", "b</w>"], [], unk_token="?", end_of_word_suffix="</w>")
    return fields_of(model, {"type": "Whitespace"}, {"type": "BPEDecoder", "suffix": "</w>"})


SOUND: dict[str, tuple[Callable[[], Fields], str, str]] = {
    "gpt2": (gpt2_like, "byte-level", "hehe he\n\u00e9\x00"),
    "qwen": (qwen_like, "byte-level", "he e\u0301 <|endoftext|>"),
    "llama3": (llama3_like, "byte-level", "he  he\t"),
    "nested": (nested, "byte-level", "he  he\t"),
    "bytes alone": (bytes_alone, "byte-level", "\u4e2d he"),
    "many hexes": (many_hexes, "byte-level", "00ff 1a"),
    "metaspace": (metaspace, "sentencepiece", "ab a b"),
    "fallback": (fallback, "sentencepiece", "ab  a\n\u4e2d "),
    "fallback without bytes": (without_bytes, "sentencepiece", "ab a"),
    "letters": (with_letters, "sentencepiece", "ab \u0120a\n\u4e2d "),
    "wordpiece": (wordpiece, "WordPiece", "Unaffable  a"),
    "wide wordpiece": (wide_wordpiece, "WordPiece", "Unaffable  \u4e01\u4e02"),
    "put in later": (put_in_later, "byte-level", "hehe \u4e2d"),
    "wordlevel": (wordlevel, "other", "a b  w7"),
    "characters": (characters, "other", "ab ba"),
    "suffixed": (suffixed, "other", "a b a"),
}
