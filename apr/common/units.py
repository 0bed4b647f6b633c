"""Express losses per byte and as perplexity, over how many steps a mean is taken, and numbers of bytes."""

from __future__ import annotations

import math

LAST_STEPS = 20  # training losses whose mean stands beside a validation loss


def bits_per_byte(nats_per_token: float, tokens: int, text_bytes: int) -> float:
    """Convert a loss per token to bits per UTF-8 byte of text."""
    return nats_per_token / math.log(2) * tokens / text_bytes


def in_bytes(n: int) -> str:
    """Write a number of bytes for a person: 812 bytes, 1.2 MiB, 3.45 GiB."""
    for unit, power, digits in (("GiB", 30, 2), ("MiB", 20, 1), ("KiB", 10, 1)):
        if n >= 1 << power:
            return f"{n / (1 << power):,.{digits}f} {unit}"
    return plural(n, "byte")


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
    return f"{n:,} {noun}{'es' if noun.endswith(('s', 'x', 'tch', 'sh')) else 's'}"
