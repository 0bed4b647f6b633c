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
