"""Account for the bytes of a text: nothing of it may be lost, doubled or replaced on the way to its ids."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.files import parse_json
from ..common.finding import Finding
from ..tokenizer.tokenizer import Tokenizer
from .shards import TokenShards

NAME = "bytes of ids = bytes of text"
OTHER_BYTES = "the ids of this tokenizer stand for other bytes than the text has"
# Texts that a tokenizer with a prefix space, or with tokens that swallow white space, spells with other bytes.
PROBES = ("a", " a", "a  \n", "\n\n  a b\t", "")


def conserved(shards: TokenShards, counts: np.ndarray, tokenizer: Tokenizer) -> Finding:
    """Compare the sum over all ids of count x bytes of the token with the bytes of the text as it was read: equal.

    counts (V,) int64: occurrences of each id"""
    bound = f"{shards.total_bytes:,}"
    found = bytes_of(counts, tokenizer)
    if found is None:
        return Finding.skipped(NAME, OTHER_BYTES, bound)
    why = (
        ""
        if found == shards.total_bytes
        else "text was lost, doubled or replaced between the reader and the shards"
    )
    return Finding.of(NAME, found == shards.total_bytes, f"{found:,}", bound, why)


def bytes_of(counts: np.ndarray, tokenizer: Tokenizer) -> int | None:
    """Add up the bytes of text that ids stand for, counts (V,) of each; None where that is not what the text has."""
    table = tokenizer.token_bytes()
    if table is None or tokenizer.normalization != "none" or not gives_back(tokenizer):
        return None
    return int((counts.astype(np.int64) * table).sum())


def gives_back(tokenizer: Tokenizer) -> bool:
    """Tell whether ids spell the very bytes of any normalized text: no prefix space, no token that takes the white space
    around it."""
    table = tokenizer.spelling()
    if table is None:
        return False
    added: list[dict[str, Any]] = parse_json(tokenizer.json, tokenizer.source).get("added_tokens") or []
    if any(token.get("lstrip") or token.get("rstrip") for token in added if not token.get("special")):
        return False
    texts = ((text, b"".join(table[i] for i in tokenizer.encode(text))) for text in PROBES)
    return all(spelt == tokenizer.normalize(text).encode() for text, spelt in texts)
