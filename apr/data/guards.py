"""Guards of token data, checked before training: each gives a Finding.

A corpus that was 99.99 % unknown tokens once gave a validation loss of 0.0008. Guards of correctness cannot be switched
off. Bounds of plausibility can be widened by a number: the Finding then says so in `why`, and a failure has the number
that would let it pass as its `remedy`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.errors import Refused
from ..common.finding import FAIL, Finding
from ..common.options import numbers
from ..common.units import plural
from ..tokenizer.tokenizer import Tokenizer
from .shards import Shards

MIN_TOKENS = 10_000  # fewest tokens whose frequencies are judged
SAMPLED_DOCUMENTS, MAX_SAMPLED_TOKENS = 24, 1 << 16  # for round_trip; tokens of a document


@dataclass(frozen=True)
class Bounds:
    """Bounds of plausibility; None: the bound that follows from the vocabulary (see `for_vocabulary`).

    Entropies in nats per token, shares of all tokens, bytes of UTF-8."""

    min_entropy: float | None = None
    max_entropy: float | None = None
    min_distinct: float | None = None
    max_top_share: float | None = None
    min_bytes_per_token: float | None = None
    max_bytes_per_token: float | None = None
    max_unknown_share: float | None = None

    @classmethod
    def parse(cls, text: str | None) -> Bounds:
        """Parse "max_top_share=0.6,min_distinct=12", the form of --widen. Raises UsageError."""
        return cls(**numbers(text, "--widen", [f.name for f in dataclasses.fields(cls)]))

    @classmethod
    def for_vocabulary(cls, vocab_size: int, tokens: int) -> Bounds:
        """Compute the bounds for `tokens` tokens of a vocabulary; docs/data.md has the measurements behind them."""
        merges = math.log2(max(vocab_size, 256) / 256)  # doublings of the vocabulary over the 256 bytes
        most = math.log(max(2, min(vocab_size, tokens)))
        return cls(
            min_entropy=0.3 * most,
            max_entropy=0.95 * most,
            min_distinct=min(vocab_size, tokens) ** 0.4,
            max_top_share=0.45 / (1 + merges / 6),
            min_bytes_per_token=0.75,
            max_bytes_per_token=6.0 + 1.25 * merges,
            max_unknown_share=0.001,
        )


USUAL = Bounds()  # nothing widened


def plausible(
    counts: np.ndarray, total_bytes: int, tokenizer: Tokenizer, given: Bounds = USUAL
) -> list[Finding]:
    """Compare statistics of token counts with their bounds.

    counts       (V,) int64  occurrences of each id
    total_bytes  bytes of UTF-8 text
    """
    tokens = int(counts.sum())
    usual = Bounds.for_vocabulary(tokenizer.vocab_size, tokens)
    p = counts[counts > 0] / max(tokens, 1)
    entropy = float(max(0.0, -(p * np.log(p)).sum()))
    top = int(counts.argmax())
    share, rate = float(counts[top] / max(tokens, 1)), total_bytes / max(tokens, 1)
    unknown = 0 if tokenizer.unknown_id is None else int(counts[tokenizer.unknown_id])
    findings = [_unknown(unknown, tokens, tokenizer, usual, given)]
    for name, value, measured, low, high in (
        ("entropy of token frequencies", entropy, f"{entropy:.4f} nats/token", "min_entropy", "max_entropy"),
        ("distinct ids", p.size, f"{p.size:,} of {tokenizer.vocab_size:,}", "min_distinct", ""),
        (
            "commonest id",
            share,
            f"{share:.4f} of all tokens, id {top} {tokenizer.decode([top])!r}",
            "",
            "max_top_share",
        ),
        ("bytes per token", rate, f"{rate:.3f}", "min_bytes_per_token", "max_bytes_per_token"),
    ):
        if tokens < MIN_TOKENS:
            why = f"too few to judge: {plural(tokens, 'token')}, fewer than {MIN_TOKENS}"
            findings.append(Finding.of(name, None, measured, "plausible", why))
        else:
            findings.append(_between(name, value, measured, low, high, usual, given))
    return findings


def _between(
    name: str, value: float, measured: str, low: str, high: str, usual: Bounds, given: Bounds
) -> Finding:
    """Compare a value with the bounds named low and high ("": none), each the wider one of usual and given."""
    least, most, remarks = 0.0, math.inf, []
    for key in filter(None, (low, high)):
        bound, number = getattr(usual, key), getattr(given, key)
        if number is not None:
            wider = min(bound, number) if key == low else max(bound, number)
            if wider != bound:
                remarks.append(f"{key} widened from {bound:.4g} to {wider:.4g}")
            elif number != bound:
                remarks.append(f"{key}={number:g} is narrower than {bound:.4g} and counts for nothing")
            bound = wider
        least, most = (bound, most) if key == low else (least, bound)
    text = (
        f"{least:.4g} to {most:.4g}"
        if low and high
        else f"at least {least:.4g}"
        if low
        else f"at most {most:.4g}"
    )
    remedy = (
        f"{low}={_rounded_down(value)}"
        if value < least
        else f"{high}={_rounded_up(value)}"
        if value > most
        else ""
    )
    return Finding.of(name, least <= value <= most, measured, text, "; ".join(remarks), remedy=remedy)


def _unknown(count: int, tokens: int, tokenizer: Tokenizer, usual: Bounds, given: Bounds) -> Finding:
    name, share = "unknown tokens", count / max(tokens, 1)
    measured = f"{count:,} of {tokens:,} ({100 * share:.4g} %)"
    if tokenizer.unknown_id is None:
        return Finding.of(name, True, "0: the tokenizer has none", "0")
    if tokenizer.byte_level:
        return Finding.of(name, count == 0, measured, "0: every byte has a token")
    most, why = usual.max_unknown_share or 0.0, ""
    if given.max_unknown_share is not None and given.max_unknown_share > most:
        why = f"max_unknown_share widened from {most:g} to {given.max_unknown_share:g}"
        most = given.max_unknown_share
    remedy = f"max_unknown_share={_rounded_up(share)}" if share > most else ""
    return Finding.of(name, share <= most, measured, f"at most {100 * most:g} %", why, remedy=remedy)


def _rounded_down(value: float) -> str:
    """Round down to three digits."""
    digits = 10.0 ** (2 - math.floor(math.log10(value))) if value > 0 else 1.0
    return f"{math.floor(value * digits) / digits:g}"


def _rounded_up(value: float) -> str:
    """Round up to three digits."""
    digits = 10.0 ** (2 - math.floor(math.log10(value))) if value > 0 else 1.0
    return f"{math.ceil(value * digits) / digits:g}"


def figures_again(figures: Mapping[str, Any], counts: np.ndarray, total_bytes: int) -> Finding:
    """Compare the figures that losses are judged by with others made of the same counts (V,), by sums over ids.

    Entropy in nats/token: ln N - sum c ln c / N."""
    found = [c for c in counts.tolist() if c]
    n = max(1, sum(found))
    want = {
        "distinct_ids": len(found),
        "unigram_entropy_nats": math.log(n) - math.fsum(c * math.log(c) for c in found) / n,
        "top_id_share": max(found, default=0) / n,
        "bytes_per_token": total_bytes / n,
    }
    wrong = [k for k, x in want.items() if not abs(figures.get(k, math.nan) - x) <= 1e-6 * (1 + x)]
    said = f"{wrong[0]} = {figures.get(wrong[0])}, the counts give {want[wrong[0]]:.6g}" if wrong else ""
    measured = said or f"entropy {want['unigram_entropy_nats']:.4f} nats/token"
    return Finding.of("figures of the tokens", not wrong, measured, "what the counts of ids give")


def fits_model(tokenizer: Tokenizer, vocab_size: int) -> Finding:
    """Compare the number of ids with the rows of the model's embedding."""
    return Finding.of(
        "vocabulary",
        tokenizer.vocab_size <= vocab_size,
        f"{plural(tokenizer.vocab_size, 'id')}",
        f"at most the model's vocab_size = {vocab_size:,}",
    )


def round_trip(shards: Shards, tokenizer: Tokenizer) -> Finding:
    """Decode whole documents, spread over the shards, encode their text and compare the ids."""
    name, bound = "encode(decode(ids)) = ids", "the same ids"
    if shards.border_id is None:
        why = "eos_policy none: no document can be told from the next"
        return Finding.of(name, None, "0 documents", bound, why)
    documents = list(sample_documents(shards))
    if not documents:
        why = f"none of those sampled is below {MAX_SAMPLED_TOKENS} tokens"
        return Finding.of(name, None, "0 documents", bound, why)
    prefix = np.array(shards.prefix_ids, np.uint32)
    # What stands before a document is no part of its text; a document without it fails below.
    texts = [tokenizer.decode(ids[prefix.size :]) for _, ids in documents]
    for (place, ids), body in zip(documents, tokenizer.encode_batch(texts), strict=True):
        again = np.concatenate([prefix, body])
        if not np.array_equal(ids, again):
            same = min(ids.size, again.size)
            differing = np.flatnonzero(ids[:same] != again[:same])
            at = int(differing[0]) if differing.size else same
            measured = (
                f"differs at token {at} of the document at {place}: {ids[at : at + 4].tolist()} in the shard, "
                f"{again[at : at + 4].tolist()} from its text {tokenizer.decode(ids[max(0, at - 4) : at + 4])!r}"
            )
            why = "the shards are not what this tokenizer makes of their text"
            return Finding.of(name, False, measured, bound, why)
    return Finding.of(name, True, f"{plural(len(documents), 'document')}", bound)


def sample_documents(shards: Shards, count: int = SAMPLED_DOCUMENTS) -> Iterable[tuple[str, np.ndarray]]:
    """Yield up to `count` whole documents from evenly spaced places: (shard and position, ids uint32 without the EOS)."""
    border = shards.border_id
    seen: set[tuple[int, int]] = set()
    for k in range(count):
        place = shards.total_tokens * k // count
        index = 0
        while place >= shards.arrays[index].size:
            place -= shards.arrays[index].size
            index += 1
        array = shards.arrays[index]
        window = array[place : place + 2 * MAX_SAMPLED_TOKENS]
        ends = np.flatnonzero(window == border)
        start = 0 if k == 0 else int(ends[0]) + 1 if ends.size else -1
        if start < 0 or (stops := ends[ends >= start]).size == 0:
            continue
        ids = window[start : int(stops[0])]
        if 0 < ids.size <= MAX_SAMPLED_TOKENS and (index, start + place) not in seen:
            seen.add((index, start + place))
            yield f"{shards.files[index].name}:{place + start}", ids


def disjoint(shared: int, train: Shards, vals: Sequence[Shards]) -> Finding:
    """Require that no document stands in both splits; shared: documents of train that the scan met again in val, of any
    source."""
    name, bound = "documents on both sides", "0"
    if train.border_id is None or any(val.border_id is None for val in vals):
        why = "eos_policy none: no document can be told from the next"
        return Finding.of(name, None, "unknown", bound, why)
    held_out = " or ".join(str(val.folder) for val in vals)
    why = f"{train.folder} and {held_out} hold the same documents; validation would measure memory"
    measured = f"{shared:,} of {train.total_documents:,}"
    return Finding.of(name, shared == 0, measured, bound, why if shared else "")


def enforce(findings: Mapping[Any, Sequence[Finding]], wide: str = "go on with {widen}") -> None:
    """Raise Refused for the first failed finding. findings: {place: findings}; wide: instruction for wider bounds."""
    for place, of_place in findings.items():
        for f in of_place:
            if f.verdict == FAIL:
                instruction = wide.format(widen=f"--widen {_widened(findings)}")
                advice = f"; if the text is really like that, {instruction}" if f.remedy else ""
                raise Refused(f"{place}: {f}{advice}")


def _widened(findings: Mapping[Any, Sequence[Finding]]) -> str:
    """Join the bounds that would let all findings pass, in the form of --widen."""
    widest: dict[str, str] = {}
    for of_place in findings.values():
        for f in of_place:
            name, _, number = f.remedy.partition("=")
            wider = min if name.startswith("min") else max
            if name:
                widest[name] = wider(widest.get(name, number), number, key=float)
    return ",".join(f"{name}={number}" for name, number in widest.items())
