"""Encode a text in which some special tokens are the tokens themselves, and others are only spelled out.

The library takes either every special token for itself or none. Here each special token that is meant has a private character
in its place, which an encoder of its own knows as that token; what is spelled out stays in the text around it, whose ids are
those of the whole stretch between two special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import islice

from tokenizers import AddedToken
from tokenizers import Tokenizer as Engine

from .tokenizer import Tokenizer

MARKS = range(0x100000, 0x10FFFE)  # a private plane, apart from that of chat_template.QUOTES


def encode_quoted(tokenizer: Tokenizer, text: str, quoted: Mapping[str, str]) -> list[int]:
    """Encode a text in which special tokens stand for themselves. quoted: text by the character in its place, for special
    tokens that are only spelled out. Raises Refused: a lone surrogate; MalformedFile: an error of the library."""
    special = {token: i for i, token in tokenizer.special_tokens().items() if token}
    there = set(text)
    # A mark that the text holds itself would speak for a special token.
    marks = "".join(islice((c for c in map(chr, MARKS) if c not in there), len(special)))
    mark_of = dict(zip(special, marks, strict=True))
    text = tokenizer.special_pattern.sub(lambda m: mark_of[m[0]], text)
    for character, spelled in quoted.items():
        text = text.replace(character, spelled)
    engine = _engine(tokenizer.json, tuple(special), marks)
    meant = {engine.token_to_id(mark_of[token]): i for token, i in special.items()}
    with tokenizer.encoding_errors([text]):
        return [meant.get(i, i) for i in engine.encode(text, add_special_tokens=False).ids]


@lru_cache(maxsize=2)
def _engine(json: str, special: tuple[str, ...], marks: str) -> Engine:
    """Build the encoder in which marks stand for special tokens, with what they do to the white space around them."""
    engine = Engine.from_str(json)
    engine.no_truncation()
    engine.no_padding()
    engine.encode_special_tokens = True
    known = {token.content: token for token in engine.get_added_tokens_decoder().values()}
    for token, mark in zip(special, marks, strict=True):
        like = known[token]
        engine.add_tokens(
            [
                AddedToken(
                    mark,
                    single_word=like.single_word,
                    lstrip=like.lstrip,
                    rstrip=like.rstrip,
                    normalized=like.normalized,
                    special=False,
                )
            ]
        )
    return engine
