"""Spell tokens of byte-level vocabularies as the bytes that they stand for."""

from __future__ import annotations

from tokenizers import Tokenizer as Engine

# GPT-2's byte characters: printable bytes stand for themselves, the others follow each other from U+0100 on.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_BYTE_OF = {0x100 + k: b for k, b in enumerate(sorted({*range(0x100)} - _PRINTABLE))}


def spelling(engine: Engine, vocab_size: int) -> list[bytes]:
    """List the bytes of UTF-8 text that each id stands for: none for special tokens and holes."""
    out = [b""] * vocab_size
    for token, i in engine.get_vocab(with_added_tokens=False).items():
        out[i] = token.translate(_BYTE_OF).encode("latin-1", "replace")
    for i, added in engine.get_added_tokens_decoder().items():
        out[i] = b"" if added.special else added.content.encode()
    return out
