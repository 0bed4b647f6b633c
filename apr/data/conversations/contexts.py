"""Compare whole examples with the records of the files, read again by other code: all that is said, and what of it is trained.

An example has a record of the files whose last answer it ends with; then every message of that record that the chat template
writes must stand in it, with the white space that the template keeps, the names of its tools too, and as many answers must be
trained as the record has that are not said to be context. What a template writes is found by rendering marks.

An example whose record is passed over may end with the answer of another record, and is not judged. Nor is one alone where the
files are longer than what is read: there, so many examples must be as their records as records were read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from ...common.errors import Refused
from ...common.finding import Finding
from ...common.units import plural
from ...tokenizer.chat_template import ChatTemplate, Message
from ...tokenizer.tokenizer import Tokenizer
from ..plain import Unfollowed, records
from .answers import BESIDE, SPEAKERS, TEMPLATE_SHARE, Frame, Spelling, contents, said_in, sampled_rows
from .examples import Conversations
from .packed import PackedShards, PackManifest
from .shapes import FLAGS, UNTRAINED
from .spoken import SPELLED

NAME = "records of the files"
BOUND = "the messages, tools and trained answers of their records"
# Records of other kinds, such as texts and trees, are passed over.
SHAPES = (
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
)
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(SPEAKERS, "assistant"),
}
SYSTEM = ("system", "system_prompt", "system_message", "systemPrompt", "system_instruction")
# Characters of records that are read, those that one of no JSON counts for, files that cannot be followed and use them up, and
# records that may have one last answer.
BUDGET_BYTES, UNREAD_BYTES, UNFOLLOWED, MAX_ALIKE = 8 << 20, 4096, 16, 32
# Of files read in part: examples to expect of what was read, and their share that is to be as their records, for others than the
# sampled ones may be among them.
MIN_EXPECTED, RIGHT_SHARE = 40, 0.25
FIRST_MARK, TOOL = 0xF1000, "tool_of_nobody"


@dataclass
class _Record:
    """Messages of a record: (role, text, whether an answer is trained), and the names of its tools."""

    messages: list[tuple[str, str, bool]] = field(default_factory=list)
    tools: list[str] = field(default_factory=list)

    def say(self, role: str, text: Any, is_trained: bool = True) -> bool:
        """Add a message; False for one that is no text."""
        self.messages.append((role, text, is_trained and role == "assistant"))
        return isinstance(text, str)

    @property
    def answers(self) -> list[str]:
        """List the answers that are trained."""
        return [text for _, text, is_trained in self.messages if is_trained]


@dataclass
class _Read:
    """Records by their last answers, of those that are wanted, and last answers of records that were passed over.

    records   that were read and not passed over
    is_whole  no file is longer than what was read"""

    found: dict[str, list[_Record]] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    records: int = 0
    is_whole: bool = True


@dataclass(frozen=True)
class _Written:
    """Roles whose messages a template writes, those whose white space it keeps, and whether it writes tools."""

    roles: frozenset[str]
    exact: frozenset[str]
    tools: bool

    @classmethod
    def of(cls, template: ChatTemplate | None) -> _Written:
        """Render marks for every role, twice where a conversation may have several."""
        if template is None:
            return cls(frozenset({"user", "assistant"}), frozenset({"user", "assistant"}), False)
        said = ("system", "user", "assistant", "user", "assistant")
        for roles in (said, said[1:]):
            texts = [f" \n{chr(FIRST_MARK + i)}\n\n " for i in range(len(roles))]
            messages: list[Message] = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
            try:
                whole = template.render(messages, False)
            except Refused:
                continue
            lost = {r for r, t in zip(roles, texts, strict=True) if t.strip() not in whole}
            loose = {r for r, t in zip(roles, texts, strict=True) if t not in whole}
            return cls(frozenset({*roles} - lost), frozenset({*roles} - loose), _writes_tools(template))
        return cls(frozenset(), frozenset(), False)


def _writes_tools(template: ChatTemplate) -> bool:
    tool = {"type": "function", "function": {"name": TOOL, "description": "", "parameters": {}}}
    try:
        return TOOL in template.render([{"role": "user", "content": "?"}], False, tools=[tool])
    except Refused:
        return False


def records_kept(
    corpus: Conversations, sides: dict[str, PackedShards], tokenizer: Tokenizer, template: ChatTemplate | None
) -> Finding:
    """Compare sampled examples with the records that they were made of."""
    frame, manifests = Frame.of(template, tokenizer), [shards.manifest for shards in sides.values()]
    if frame is None or corpus.map.names or any(m.by_turn for m in manifests):
        why = "the chat template writes conversations otherwise, or --map names their keys"
        return Finding.skipped(NAME, why, BOUND)
    spelling, written = Spelling(tokenizer), _Written.of(template)
    examples = [x for shards in sides.values() for x in _examples(shards, frame, tokenizer)]
    wanted = {key for ids, runs in examples for key in spelling.candidates(frame, ids[runs[-1]])}
    read = _read(corpus, wanted, spelling)
    is_cut, judged, right, wrong, first = any(m.cut for m in manifests), 0, 0, 0, ""
    for ids, runs in examples:
        keys = [*spelling.candidates(frame, ids[runs[-1]])]
        alike = next((read.found[key] for key in keys if key in read.found), [])
        if not alike or len(alike) > MAX_ALIKE or not read.others.isdisjoint(keys):
            right += bool(alike)
            continue
        judged += 1
        text = tokenizer.decode(ids)
        whys = [_differs(x, text, len(runs), spelling, written, frame, is_cut) for x in alike]
        if all(whys):
            wrong, first = wrong + 1, first or f"{whys[0]}: {text[:60]!r}"
    right += judged - wrong
    if not judged:
        return Finding.skipped(NAME, "no example of a record that this check reads was sampled", BOUND)
    is_right = wrong <= TEMPLATE_SHARE * judged
    if not read.is_whole:
        expected = len(examples) * _share(read.records, manifests)
        measured = f"{right:,} of about {plural(round(expected), 'example')} of the beginning of the files as their records"
        is_right = is_right or expected < MIN_EXPECTED or right >= RIGHT_SHARE * expected
        return Finding.of(NAME, is_right, measured if is_right else f"{measured}: {first}", BOUND)
    measured = f"{judged - wrong:,} of {plural(judged, 'example')} as their records"
    why = f"{wrong:,} of {plural(judged, 'example')}: {first}"
    return Finding.of(NAME, is_right, measured if is_right else why, BOUND)


def _share(records: int, manifests: list[PackManifest]) -> float:
    """Bound the share of the examples that were made of so many records, from below: all that is not sampled is of these."""
    lost = manifests[0].duplicates + sum(manifests[0].skipped.values()) + sum(m.cut for m in manifests)
    return max(0, records - lost) / max(1, sum(m.examples for m in manifests))


def _differs(
    r: _Record, text: str, runs: int, spelling: Spelling, written: _Written, frame: Frame, is_cut: bool
) -> str:
    """Say what of a record an example lacks; "" for nothing."""
    tok, last = spelling.tokenizer, max(i for i, m in enumerate(r.messages) if m[2])
    key, is_plain = spelling.key(text), tok.byte_level
    # What follows the last answer is the first that is cut off.
    for role, said, _ in r.messages[: last + 1 if is_cut else None]:
        if role not in written.roles or not said.strip():
            continue
        if spelling.key(said) not in key:
            return f"the {role}'s {said[:40]!r} is missing"
        if is_plain and role in written.exact and tok.normalize(said) not in text:
            return f"the {role}'s {said[:40]!r} has other white space"
    if written.tools and (lost := next((x for x in r.tools if x not in text), "")):
        return f"the tool {lost[:40]!r} is missing"
    # Without a token between them, two answers in a row are one stretch.
    is_countable = not frame.is_marked and not (
        frame.end is None and any(a[0] == b[0] == "assistant" for a, b in pairwise(r.messages))
    )
    if is_countable and runs != len(r.answers):
        return f"{plural(runs, 'answer')} trained, {len(r.answers):,} in the record"
    return ""


def _examples(
    shards: PackedShards, frame: Frame, tokenizer: Tokenizer
) -> Iterator[tuple[np.ndarray, list[slice]]]:
    """Yield (ids, trained stretches) of the examples in some rows that no cut has made as long as their row."""
    border, room = -1 if shards.border_id is None else shards.border_id, shards.row_tokens
    for row in sampled_rows(shards):
        ids, trained = np.asarray(shards.ids[row]).astype(np.int64), np.asarray(shards.trained[row]) > 0
        ends = [*(np.flatnonzero(ids == border) + 1).tolist(), room]
        for start, end in pairwise([0, *ends]):
            own = slice(start, end)
            runs = _runs(ids[own], trained[own], frame.end)
            is_known = tokenizer.unknown_id is None or not (ids[own] == tokenizer.unknown_id).any()
            if runs and is_known and end - start < room:
                yield ids[own], runs


def _runs(ids: np.ndarray, trained: np.ndarray, end: int | None) -> list[slice]:
    """List the trained stretches, cut behind each end of a turn."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], trained, [False]]).astype(np.int8)))
    out: list[slice] = []
    for first, last in edges.reshape(-1, 2).tolist():
        cuts = [] if end is None else (np.flatnonzero(ids[first:last] == end) + 1 + first).tolist()
        out += [slice(a, b) for a, b in pairwise(sorted({first, *cuts, last}))]
    return out


def _read(corpus: Conversations, wanted: set[str], spelling: Spelling) -> _Read:
    """Read records by their last answers, of those that are wanted."""
    out, read = _Read(), 0
    for source in corpus.sources:
        try:
            for _, value in records(source, BUDGET_BYTES):
                read += _size(value) or UNREAD_BYTES
                record = _record(value)
                if record is None:
                    said, texts = said_in(value, {}, {*SPEAKERS})
                    # Which part of a text is an answer, its chat template knows.
                    out.is_whole &= not texts
                    out.others |= wanted & {
                        k for m in said for t in contents(m, {}) for k in spelling.keys(t)
                    }
                elif record.answers:
                    out.records += 1
                    if (key := spelling.key(record.answers[-1])) in wanted:
                        out.found.setdefault(key, []).append(record)
                if read > BUDGET_BYTES:
                    out.is_whole = False
                    break
        except Unfollowed:
            # Up to BUDGET_BYTES were read of it, and not parsed.
            out.is_whole, read = False, read + BUDGET_BYTES // UNFOLLOWED
        if read > BUDGET_BYTES:
            break
    return out


def _size(value: Any) -> int:
    """Count the characters of the texts of a value, at any depth, and eight for each other value."""
    size, left = 0, [value] if value is not None else []
    while left:
        x = left.pop()
        if isinstance(x, dict | list):
            left += x.values() if isinstance(x, dict) else x
        else:
            size += len(x) if isinstance(x, str) else 8
    return size


def _record(value: Any) -> _Record | None:
    """Read a record of a common shape; None for another one, and where a message holds more than a text."""
    if not isinstance(value, dict):
        return None
    value = {k: x for k, x in value.items() if x is not None}
    shape, out = next((keys for keys in SHAPES if all(k in value for k in keys)), None), _Record()
    if shape is None:
        return None
    system = next((value[k] for k in SYSTEM if isinstance(value.get(k), str) and value[k]), None)
    turns = value[shape[0]] if len(shape) == 1 else []
    asked = value[shape[0]] if len(shape) > 1 else None
    history = value.get("history") or []
    if shape[0] == "prompt" and any(isinstance(x := value[k], str) and SPELLED.match(x) for k in shape):
        return None
    if not isinstance(history, list) or not all(isinstance(x, list) and len(x) == 2 for x in history):
        return None
    if isinstance(asked, list):
        turns = asked
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        return None
    is_good = True
    for turn in ({k: x for k, x in t.items() if x is not None} for t in turns):
        role = next((ROLES.get(str(turn[k]).lower()) for k in ("role", "from") if k in turn), None)
        texts = list(dict.fromkeys(contents(turn, {})))
        if role is None or len(texts) != 1 or any(turn.get(k) for k in BESIDE) or "think>" in texts[0]:
            return None
        is_context = any(turn.get(k) == x for k, x in UNTRAINED.items()) or any(
            turn.get(k) is x for k, x in FLAGS.items()
        )
        is_good &= out.say(
            role, texts[0], not (is_context or isinstance(asked, list)) and bool(texts[0].strip())
        )
    if len(shape) > 1:
        if not isinstance(asked, list):
            for question, answer in history:
                is_good &= out.say("user", question) & out.say("assistant", answer)
            is_good &= out.say("user", asked)
            is_good &= (
                out.say("user", value["input"]) if shape[0] == "instruction" and value.get("input") else True
            )
        is_good &= out.say("assistant", value[shape[1]])
    if system is not None and out.messages[:1] and out.messages[0][0] != "system":
        out.messages.insert(0, ("system", system, False))
    tools = value.get("tools")
    if isinstance(tools, list):
        named = (t.get("function", t) for t in tools if isinstance(t, dict))
        out.tools = [x["name"] for x in named if isinstance(x, dict) and isinstance(x.get("name"), str)]
    return out if is_good and all("think>" not in text for _, text, _ in out.messages) else None
