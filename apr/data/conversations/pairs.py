"""Pairs of preferences: a prompt with a chosen and a rejected answer, read, encoded and packed two by two.

Both examples of a pair lie in one row, the chosen one first, each with its own copy of the prompt. Labels are 1 for tokens of
the chosen answer and 2 for those of the rejected one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from ...common.errors import Refused
from ...common.files import short
from ...common.finding import Finding
from ...common.progress import Progress
from ...common.units import plural
from ..documents import Document, Sides
from ..seen import Seen
from ..source import Skipped, Unusable
from .beside import ASKED, READ_BESIDE, refuse_swapped, settled
from .examples import Conversations, open_conversations
from .keys import KeyMap, pair_like
from .pack import Spool
from .packed import PackedShards, PackManifest
from .render import EncodedExample, Encoder
from .shapes import Example, as_message, canonical, earlier, example_of
from .spoken import as_told, from_transcript, is_transcript

BATCH_PAIRS = 128
TOO_LONG = "longer than --seq-length"
CHOSEN, REJECTED = 1, 2
# Keys of a record that are read.
READ = {*READ_BESIDE, "prompt", "conversations", "chosen", "rejected", "history"}
# Tokens at the end of a prompt that may be spelled otherwise, because an answer's beginning is in the last of them.
SEAM_TOKENS = 8
NO_PAIR = (
    "wanted prompt, chosen and rejected, or chosen and rejected as lists of messages with the prompt in them"
)


@dataclass(frozen=True)
class Pair(Document):
    """Two examples with the same prompt. text: both as JSON; prompt: what both begin with, as JSON."""

    prompt: str
    chosen: Example
    rejected: Example


def pair_of(name: str, value: Any, keys: KeyMap | None = None) -> Pair:
    """Read a record with chosen and rejected: texts or lists of messages, behind a prompt that is a text, a list of messages,
    or what both lists begin with. Raises Unusable."""
    value = keys(value) if keys and isinstance(value, dict) else value
    if not isinstance(value, dict) or not {"chosen", "rejected"} <= value.keys():
        there = ", ".join(map(repr, list(value)[:10])) if isinstance(value, dict) else type(value).__name__
        advice = pair_like(value) if isinstance(value, dict) else ""
        raise Unusable("no pair", f"there is {there}; {advice or NO_PAIR}")
    value = settled(value)
    refuse_swapped(value)
    if keys:
        keys.pass_over(value.keys() - READ)
    asked = value.get("prompt", value.get("conversations"))
    prompt, *sides = (
        as_told(x, k) for x, k in ((asked, "prompt"), *((value[k], k) for k in ("chosen", "rejected")))
    )
    if sides[0] == sides[1]:
        raise Unusable("equal answers", "chosen and rejected are the same")
    if are_transcripts := all(map(is_transcript, sides)):
        if prompt is not None:
            raise Unusable(
                "a prompt twice",
                "chosen and rejected are whole dialogs of Human and Assistant; leave out the prompt",
            )
        sides = [from_transcript(s, key) for s, key in zip(sides, ("chosen", "rejected"), strict=True)]
    beside = {key: value[key] for key in sorted(READ_BESIDE) if value.get(key)}
    before = [*earlier(value)] if value.get("history") else []
    if isinstance(prompt, str) and all(isinstance(s, str) for s in sides) and not (beside or before):
        examples = [example_of(name, {"prompt": prompt, "response": s}) for s in sides]
        return Pair(name, canonical([prompt, *sides]), canonical(prompt), *examples)
    turns = [
        [*before, *_turns(prompt, side, key)] for side, key in zip(sides, ("chosen", "rejected"), strict=True)
    ]
    shared = next((i for i, (a, b) in enumerate(zip(*turns, strict=False)) if a != b), min(map(len, turns)))
    while shared and turns[0][shared - 1].get("role") == "assistant":
        shared -= 1
    if not shared:
        advice = "" if are_transcripts or prompt is not None else pair_like(value)
        raise Unusable("no prompt", advice or f"chosen and rejected begin otherwise; {NO_PAIR}")
    # Earlier answers are part of the prompt.
    context = [{**m, "train": False} if m.get("role") == "assistant" else m for m in turns[0][:shared]]
    examples = [example_of(name, {**beside, "messages": [*context, *t[shared:]]}) for t in turns]
    more = [beside] if beside else []
    return Pair(name, canonical([*turns, *more]), canonical([*turns[0][:shared], *more]), *examples)


def _turns(prompt: Any, side: Any, key: str) -> list[dict[str, Any]]:
    """Join a prompt and an answer to messages. Raises Unusable."""
    if isinstance(side, str | dict):
        side = [{"role": "assistant", "content": side} if isinstance(side, str) else side]
    if not isinstance(side, list) or not side or not all(isinstance(m, dict) for m in side):
        raise Unusable("not a list", f"{key} is neither a text nor a list of messages")
    side = [as_message(m) for m in side]
    if isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt):
        prompt = [as_message(m) for m in prompt]
        return side if side[: len(prompt)] == prompt else [*prompt, *side]
    if not isinstance(prompt, str):
        return side
    if side[0].get("role") == "assistant":
        return [{"role": "user", "content": prompt}, *side]
    # Beside whole conversations, a prompt repeats their question, or spells them as a text.
    words = [
        c.strip() for m in side if isinstance(c := m.get("content"), str) and m.get("role") != "assistant"
    ]
    if not any(w and (w in prompt or prompt.strip() in w) for w in words):
        raise Unusable(
            "a prompt twice",
            f"{key} holds a whole conversation in which the prompt, {short(prompt)}, does not stand; leave out one of them",
        )
    return side


class Pairs(Conversations):
    """Pairs of the files that conversations are read from; an unusable record is a Skipped with its line or number."""

    parse = staticmethod(pair_of)


def open_pairs(path: str, keys: str | None = None) -> Pairs:
    """Find the files of a path; keys: --map. Raises as open_conversations does."""
    found = open_conversations(path, keys)
    pairs = Pairs(found.sources)
    pairs.map = found.map
    return pairs


# Encoding


def encode_pairs(
    corpus: Pairs,
    encoder: Encoder,
    m: PackManifest,
    sides: Sides,
    spools: dict[str, Spool],
    progress: Progress | None,
) -> tuple[str, str]:
    """Encode pairs into the spool of their side; in m, count those that are skipped, cut, or copies.

    All pairs of a prompt are on one side. Returns the lowest and the highest hash of prompts."""
    low, high, usable = "", "", 0
    pairs = _pairs(corpus, m)
    with closing(Seen()) as seen:
        while batch := list(islice(pairs, BATCH_PAIRS)):
            encoded = encoder([example for pair in batch for example in (pair.chosen, pair.rejected)])
            for pair, c, r in zip(batch, encoded[::2], encoded[1::2], strict=True):
                fitted = _fitted(pair.name, c, r, m)
                if isinstance(fitted, Skipped):
                    m.skip(fitted)
                    usable += fitted.reason == TOO_LONG
                    continue
                usable += 1
                side = hashlib.sha256(pair.prompt.encode()).hexdigest()
                low, high = min(low or side, side), max(high, side)
                if not seen.add(hashlib.sha256(pair.text.encode()).hexdigest()):
                    m.duplicates += 1
                    continue
                spool = spools["val" if sides.hold_out(side) else "train"]
                for e, label in zip(fitted, (CHOSEN, REJECTED), strict=True):
                    labels = e.trained * np.uint8(label)
                    spool.add(
                        replace(e, trained=labels),
                        hashlib.sha256(e.ids.tobytes() + labels.tobytes()).hexdigest(),
                    )
            if progress:
                progress("encode pairs", corpus.bytes_read, corpus.total_bytes)
    unusable = sum(n for reason, n in m.skipped.items() if reason not in (TOO_LONG, *ASKED))
    if unusable > usable > 0:
        raise Refused(
            f"--preferences {corpus}: {unusable:,} of {unusable + usable:,} records cannot be used, more than half; the first: "
            f"{m.skipped_first}. Mend them, or take them out where they are not meant to be trained on"
        )
    return low, high


def _pairs(corpus: Pairs, m: PackManifest) -> Iterator[Pair]:
    for item in corpus:
        if isinstance(item, Skipped):
            m.skip(item)
        elif isinstance(item, Pair):
            yield item
    corpus.map.refuse_unmet(corpus)
    m.unread = sorted(corpus.map.unread)


def _fitted(name: str, c: Any, r: Any, m: PackManifest) -> tuple[EncodedExample, EncodedExample] | Skipped:
    """Cut as many tokens from the beginning of both prompts as the two examples are too long for one row."""
    for found in (c, r):
        if isinstance(found, Skipped):
            return found
        if len(found) > 1:
            why = "the chat template writes earlier answers otherwise than the last: give pairs with one answer each"
            return Skipped(name, "answers by turn", why)
    (chosen,), (rejected,) = c, r
    if wrong := _share_prompt(chosen, rejected):
        return Skipped(name, "no prompt in common", wrong)
    # A border stands behind each but the last of a row.
    over = chosen.ids.size + rejected.ids.size + 1 - (m.seq_length + 1)
    if over <= 0:
        return chosen, rejected
    cut = -(-over // 2)
    if cut >= min(int(np.argmax(e.trained)) for e in (chosen, rejected)):
        both = f"{plural(chosen.ids.size, 'token')} and {rejected.ids.size:,}"
        return Skipped(
            name, TOO_LONG, f"{both} of both answers with their prompts, and a row has {m.seq_length + 1:,}"
        )
    m.cut += 1
    return chosen.part(cut), rejected.part(cut)


def _share_prompt(chosen: EncodedExample, rejected: EncodedExample) -> str:
    """Begin both answers at the first token that differs; returns what is wrong with the prompts, or "".

    A token may hold the end of a text and the beginning of its answer: of "A: " with "Paris" and with "4", the prompt is "A:"
    and the answers are " Paris" and " 4"."""
    firsts = [int(np.argmax(e.trained)) for e in (chosen, rejected)]
    least = min(firsts)
    differs = np.flatnonzero(chosen.ids[:least] != rejected.ids[:least])
    common = int(differs[0]) if differs.size else least
    if not common:
        return "the two answers have no token before them in common"
    if max(firsts) - common > SEAM_TOKENS:
        long = f"{firsts[0]:,} and {plural(firsts[1], 'token')}"
        return f"the prompts of the two answers, of {long}, differ from token {common:,} on"
    for e, first in zip((chosen, rejected), firsts, strict=True):
        e.trained[common:first] = True
    return ""


# Guards


def guard_pairs(shards: PackedShards) -> Finding:
    """Require that answers lie in turn, chosen and rejected, behind equal prompts, two to a pair."""
    wrong, pairs, labels = "", 0, np.asarray(shards.trained)
    for row, (ids, marks) in enumerate(zip(np.asarray(shards.ids), labels, strict=True)):
        found = list(_examples(ids, marks, shards.border_id))
        kinds = [kind for _, kind in found]
        if kinds != [CHOSEN, REJECTED] * (len(found) // 2):
            wrong = wrong or f"row {row}: answers with labels {kinds}"
            continue
        pairs += len(found) // 2
        for (a, _), (b, _) in zip(found[::2], found[1::2], strict=True):
            if not (a.size and np.array_equal(a, b)):
                wrong = wrong or f"row {row}: the prompts of a pair differ"
    wrong = wrong or (
        "" if pairs == shards.manifest.pairs else f"{pairs:,} pairs, not {shards.manifest.pairs:,}"
    )
    measured = f"{plural(pairs, 'pair')}, chosen and rejected in turn behind equal prompts"
    return Finding.of("pairs in rows", not wrong, wrong or measured, "two answers each, one prompt")


def _examples(ids: np.ndarray, marks: np.ndarray, border: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (tokens before the answer, its label) of each example of a row; label -1 where it has several."""
    start = 0
    for end in [*np.flatnonzero(ids == border).tolist(), ids.size]:
        part = marks[start : end + 1]
        if part.any():
            kinds = set(part[part > 0].tolist())
            first = int(np.argmax(part > 0))
            yield ids[start : start + first], kinds.pop() if len(kinds) == 1 else -1
        start = end + 1
