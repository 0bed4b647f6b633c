"""Express losses: per byte, as perplexity, and over how many steps a mean is taken."""

from __future__ import annotations

import math

LAST_STEPS = 20  # training losses whose mean stands beside a validation loss


def bits_per_byte(nats_per_token: float, tokens: int, text_bytes: int) -> float:
    """Convert a loss per token to bits per UTF-8 byte of text."""
    return nats_per_token / math.log(2) * tokens / text_bytes


def perplexity(nats_per_token: float) -> float:
    """exp(loss), of a loss of at most 700."""
    return math.exp(min(nats_per_token, 700))


def plural(n: int, noun: str) -> str:
    """Count things: "1 document", "2,048 tokens", "0 matrices"."""
    if n == 1:
        return f"1 {noun}"
    if noun.endswith("matrix"):
        return f"{n:,} {noun[:-1]}ces"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{n:,} {noun[:-1]}ies"
    return f"{n:,} {noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}"
