"""What token data must be before anything is trained on it: each guard with its figure and its bound.

A corpus that was 99.99 % unknown tokens once gave a validation loss of 0.0008. Guards that protect correctness cannot
be switched off; the bounds of plausibility can be widened by a number, and the verdict says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.errors import Refused
from ..common.options import numbers
from ..tokenizer.tokenizer import Tokenizer
from .shards import TokenShards

ENOUGH = 10_000  # tokens from which on frequencies are judged
SAMPLES = 24  # documents that are decoded and encoded again
SAMPLE_TOKENS = 1 << 16  # longest document of those


@dataclass(frozen=True)
class Verdict:
    """One guard's answer. passed is None where it could not be asked; `note` says why, or that a bound was widened."""

    guard: str
    passed: bool | None
    figure: str
    bound: str
    note: str = ""
    widen: str = ""  # the number that would let it pass, where the bound can be widened

    @property
    def word(self) -> str:
        return "SKIPPED" if self.passed is None else "PASS" if self.passed else "FAIL"

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.guard}: {self.figure}, must be {self.bound}{note}"


@dataclass(frozen=True)
class Bounds:
    """Bounds of plausibility; None: what follows from the vocabulary (see `for_vocabulary`).

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
        """From "max_top_share=0.6,min_distinct=12", as --widen takes it. Raises UsageError."""
        return cls(**numbers(text, "--widen", [f.name for f in dataclasses.fields(cls)]))

    @classmethod
    def for_vocabulary(cls, vocab_size: int, tokens: int) -> Bounds:
        """Bounds for so many tokens of a vocabulary; docs/data.md has the measurements that they come from."""
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
) -> list[Verdict]:
    """Frequencies against bounds: counts int64 (V,) of each id, total_bytes of UTF-8 text."""
    tokens = int(counts.sum())
    usual = Bounds.for_vocabulary(tokenizer.vocab_size, tokens)
    p = counts[counts > 0] / max(tokens, 1)
    entropy = float(max(0.0, -(p * np.log(p)).sum()))
    top = int(counts.argmax())
    unknown = 0 if tokenizer.unknown_id is None else int(counts[tokenizer.unknown_id])
    out = [_unknown(unknown, tokens, tokenizer, usual, given)]

    def judge(guard: str, value: float, figure: str, low: str, high: str) -> None:
        if tokens < ENOUGH:
            out.append(
                Verdict(
                    guard,
                    None,
                    figure,
                    "plausible",
                    f"{tokens} tokens are too few to judge, {ENOUGH} are not",
                )
            )
            return
        a, b, notes = 0.0, math.inf, []
        for name in filter(None, (low, high)):
            bound, number = getattr(usual, name), getattr(given, name)
            if number is not None:
                bound_now = min(bound, number) if name == low else max(bound, number)
                if bound_now != bound:
                    notes.append(f"{name} widened from {bound:.4g} to {bound_now:.4g}")
                elif number != bound:
                    notes.append(f"{name}={number:g} is narrower than {bound:.4g} and counts for nothing")
                bound = bound_now
            a, b = (bound, b) if name == low else (a, bound)
        text = f"{a:.4g} to {b:.4g}" if low and high else f"at least {a:.4g}" if low else f"at most {b:.4g}"
        enough = f"{low}={_down(value)}" if value < a else f"{high}={_up(value)}" if value > b else ""
        out.append(Verdict(guard, a <= value <= b, figure, text, "; ".join(notes), enough))

    judge("entropy of token frequencies", entropy, f"{entropy:.4f} nats/token", "min_entropy", "max_entropy")
    judge("distinct ids", p.size, f"{p.size:,} of {tokenizer.vocab_size:,}", "min_distinct", "")
    share = float(counts[top] / max(tokens, 1))
    judge(
        "commonest id",
        share,
        f"{share:.4f} of all tokens, id {top} {tokenizer.decode([top])!r}",
        "",
        "max_top_share",
    )
    rate = total_bytes / max(tokens, 1)
    judge("bytes per token", rate, f"{rate:.3f}", "min_bytes_per_token", "max_bytes_per_token")
    return out


def _unknown(count: int, tokens: int, tokenizer: Tokenizer, usual: Bounds, given: Bounds) -> Verdict:
    share = count / max(tokens, 1)
    figure = f"{count:,} of {tokens:,} ({100 * share:.4g} %)"
    if tokenizer.unknown_id is None:
        return Verdict("unknown tokens", True, "0: the tokenizer has none", "0")
    if tokenizer.byte_level:
        return Verdict("unknown tokens", count == 0, figure, "0: every byte has a token")
    bound, note = usual.max_unknown_share or 0.0, ""
    if given.max_unknown_share is not None and given.max_unknown_share > bound:
        note = f"max_unknown_share widened from {bound:g} to {given.max_unknown_share:g}"
        bound = given.max_unknown_share
    enough = f"max_unknown_share={_up(share)}" if share > bound else ""
    return Verdict("unknown tokens", share <= bound, figure, f"at most {100 * bound:g} %", note, enough)


def _down(value: float) -> str:
    """The value with three digits, rounded down."""
    digits = 10.0 ** (2 - math.floor(math.log10(value))) if value > 0 else 1.0
    return f"{math.floor(value * digits) / digits:g}"


def _up(value: float) -> str:
    """The value with three digits, rounded up."""
    digits = 10.0 ** (2 - math.floor(math.log10(value))) if value > 0 else 1.0
    return f"{math.ceil(value * digits) / digits:g}"


def fits_model(tokenizer: Tokenizer, vocab_size: int) -> Verdict:
    """Whether every id has a row in an embedding of vocab_size rows."""
    return Verdict(
        "vocabulary",
        tokenizer.vocab_size <= vocab_size,
        f"{tokenizer.vocab_size:,} ids",
        f"at most the model's vocab_size = {vocab_size:,}",
    )


def round_trip(shards: TokenShards, tokenizer: Tokenizer) -> Verdict:
    """Whether whole documents, spread over the shards, give their own ids when their text is encoded again."""
    guard, bound = "encode(decode(ids)) = ids", "the same ids"
    if shards.border_id is None:
        return Verdict(
            guard, None, "0 documents", bound, "eos_policy none: no document can be told from the next"
        )
    found = list(sample_documents(shards))
    if not found:
        return Verdict(
            guard, None, "0 documents", bound, f"none of those sampled is below {SAMPLE_TOKENS} tokens"
        )
    texts = [tokenizer.decode(ids) for _, ids in found]
    for (where, ids), again in zip(found, tokenizer.encode_batch(texts), strict=True):
        if not np.array_equal(ids, again):
            same = min(ids.size, again.size)
            differing = np.flatnonzero(ids[:same] != again[:same])
            at = int(differing[0]) if differing.size else same
            return Verdict(
                guard,
                False,
                f"differs at token {at} of the document at {where}: {ids[at : at + 4].tolist()} in the shard, "
                f"{again[at : at + 4].tolist()} from its text {tokenizer.decode(ids[max(0, at - 4) : at + 4])!r}",
                bound,
                "the shards are not what this tokenizer makes of their text",
            )
    return Verdict(guard, True, f"{len(found)} documents", bound)


def sample_documents(shards: TokenShards, count: int = SAMPLES) -> Iterable[tuple[str, np.ndarray]]:
    """Up to count whole documents from evenly spaced places: (shard and position, ids uint32 without the EOS)."""
    border = shards.border_id
    seen: set[tuple[int, int]] = set()
    for k in range(count):
        place = shards.total_tokens * k // count
        index = 0
        while place >= shards.arrays[index].size:
            place -= shards.arrays[index].size
            index += 1
        array = shards.arrays[index]
        window = array[place : place + 2 * SAMPLE_TOKENS]
        ends = np.flatnonzero(window == border)
        start = 0 if k == 0 else int(ends[0]) + 1 if ends.size else -1
        if start < 0 or (stops := ends[ends >= start]).size == 0:
            continue
        ids = window[start : int(stops[0])]
        if 0 < ids.size <= SAMPLE_TOKENS and (index, start + place) not in seen:
            seen.add((index, start + place))
            yield f"{shards.manifest.shards[index]['name']}:{place + start}", ids


def disjoint(shared: int, train: TokenShards, val: TokenShards) -> Verdict:
    """Whether no document stands on both sides; `shared` is what scanning one against the other counted."""
    guard, bound = "documents on both sides", "0"
    if train.border_id is None or val.border_id is None:
        return Verdict(
            guard, None, "unknown", bound, "eos_policy none: no document can be told from the next"
        )
    return Verdict(
        guard, shared == 0, f"{shared:,} of {train.total_documents:,}", bound,
        "" if not shared else f"{train.folder} and {val.folder} hold the same documents; validation would measure memory",
    )  # fmt: skip


def enforce(sides: Mapping[Any, Sequence[Verdict]], wide: str = "go on with {widen}") -> None:
    """Raises Refused at the first verdict that failed, naming its side; `wide` says how to use wider bounds."""
    for where, verdicts in sides.items():
        for v in verdicts:
            if v.passed is False:
                enough = wide.format(widen=f"--widen {_enough(sides)}")
                raise Refused(
                    f"{where}: {v}" + (f"; if the text is really like that, {enough}" if v.widen else "")
                )


def _enough(sides: Mapping[Any, Sequence[Verdict]]) -> str:
    """Numbers that would let all sides pass, as --widen takes them."""
    found: dict[str, str] = {}
    for verdicts in sides.values():
        for v in verdicts:
            name, _, number = v.widen.partition("=")
            wider = min if name.startswith("min") else max
            if name:
                found[name] = wider(found.get(name, number), number, key=float)
    return ",".join(f"{name}={number}" for name, number in found.items())
