"""Keys of records that are none of ours: a map of names, --map, and guesses at the shape of what is not read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ...common.errors import Refused, UsageError
from ...common.shell import jq_path, word
from .spoken import Record, asked_and_said, is_texts, is_transcript

ROLES = ("system", "user", "assistant", "tool")
OF_RECORDS = ("messages", "conversations", "prompt", "response", "completion", "instruction", "input", "output", "text",
              "system", "history", "tools", "chosen", "rejected", "data")  # fmt: skip
# Those that make a record without another.
ALONE = {"messages", "conversations", "text"}
PAIRED = {*OF_RECORDS} - {"input", "system", "history", "tools", "data"}
# Keys of a file that a message names.
SHOWN_KEYS = 20
OF_MESSAGES = ("role", "content", "from", "value", "train")


@dataclass(frozen=True)
class KeyMap:
    """Names of a file for ours, from --map: keys of records, of messages, and roles.

    met, there  theirs that a record had so far; keys of records and of messages, for a person
    unread      keys of records that nothing reads"""

    names: tuple[tuple[str, str], ...] = ()
    met: set[str] = field(default_factory=set, compare=False)
    there: dict[str, None] = field(default_factory=dict, compare=False)
    unread: set[str] = field(default_factory=set, compare=False)

    @classmethod
    def parse(cls, text: str | None) -> KeyMap:
        """Read "messages=dialog,role=speaker". Raises UsageError."""
        pairs = []
        for part in (text or "").split(","):
            ours, _, theirs = (x.strip() for x in part.partition("="))
            if part.strip() and (ours not in (*OF_RECORDS, *OF_MESSAGES, *ROLES) or not theirs):
                raise UsageError(
                    f"--map {part.strip()!r}: write OURS=THEIRS, where OURS is one of "
                    f"{', '.join((*OF_RECORDS, *OF_MESSAGES, *ROLES))}"
                )
            pairs += [(ours, theirs)] if part.strip() else []
        return cls(tuple(pairs))

    def __call__(self, record: Record) -> Record:
        """Give a record our names. A key inside another is written a.b."""
        if not self.names:
            return record
        self._meet(record)
        out, taken = dict(record), {ours for ours, _ in self.names}
        for ours, theirs in self.names:
            value: Any = record
            for key in theirs.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                self.met.add(theirs)
            if ours in OF_RECORDS and value is not None:
                out[ours] = value
                # Left in place, it would decide what shape the record has. Keys may change places.
                out.pop(theirs, None) if theirs not in taken else None
        return {
            key: [self._turn(t) for t in turns] if isinstance(turns, list) else turns
            for key, turns in out.items()
        }

    def _meet(self, keys: Record) -> None:
        """Note the keys of a record or a message."""
        if len(self.met) < len(self.names):
            self.met.update(keys)
            if len(self.there) < SHOWN_KEYS:
                self.there.update(dict.fromkeys(keys))

    def pass_over(self, keys: Iterable[str]) -> None:
        """Note keys of a record that nothing reads."""
        if len(self.unread) < SHOWN_KEYS:
            self.unread.update(keys)

    def refuse_unmet(self, corpus: object) -> None:
        """Raise Refused for a key of theirs that no record had. A role may occur in none."""
        for ours, theirs in self.names:
            if theirs not in self.met and ours not in ROLES:
                known = ", ".join(map(repr, list(self.there)[:SHOWN_KEYS]))
                raise Refused(
                    f"--map {ours}={theirs}: no record of {corpus} has {theirs!r}; they have {known}"
                )

    def _turn(self, turn: Any) -> Any:
        if not isinstance(turn, dict):
            return turn
        self._meet(turn)
        ours = {theirs: name for name, theirs in self.names}
        out = {ours[k] if ours.get(k) in OF_MESSAGES else k: v for k, v in turn.items()}
        for key in ("role", "from"):
            if isinstance(out.get(key), str) and ours.get(out[key]) in ROLES:
                out[key] = ours[out[key]]
        return out


# Records of no shape

# Keys that other files have for a question, for its answer and for a text.
SYNONYMS = {
    "prompt": "question query input user human instruction problem source src context",
    "response": "answer output completion reply assistant target solution tgt label chosen",
    "text": "content document body story article",
}


# And of pairs of preferences, for the better and the worse answer.
BETTER = "chosen chosenresponse responsechosen chosenanswer preferred preferredoutput accepted acceptedresponse better win"
WORSE = "rejected rejectedresponse responserejected rejectedanswer dispreferred nonpreferredoutput worse lose"
DIALOG = ("\n\nHuman:", "\n\nAssistant:")


def pair_like(record: Record) -> str:
    """Name the flag that reads a record without prompt, chosen or rejected, or what such a record is; "" for others."""
    letters = {re.sub(r"[^a-z]", "", key.lower()): key for key, value in record.items() if value}
    words = {
        "prompt": " ".join(("prompt", SYNONYMS["prompt"], "messages conversations")),
        "chosen": BETTER,
        "rejected": WORSE,
    }
    picked = {
        ours: next((letters[w] for w in names.split() if w in letters), None) for ours, names in words.items()
    }
    texts = [record.get(picked[key] or "") for key in ("chosen", "rejected")]
    if all(isinstance(t, str) and all(mark in t for mark in DIALOG) for t in texts):
        return (
            "the answers hold whole dialogs in a text, as HH-RLHF has them, which begin with Human: and stand alone, without a "
            "prompt; write chosen and rejected so, or as lists of messages, "
            '[{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]'
        )
    ranked = next((k for k, v in record.items() if isinstance(v, list) and len(v) > 1 and _texts(v)), None)
    if picked["prompt"] and ranked and not (picked["chosen"] and picked["rejected"]):
        return (
            f"{ranked!r} has several answers: write a record for each pair of a better and a worse one, "
            '{"prompt": ..., "chosen": ..., "rejected": ...}'
        )
    parts = [key for key in ("instruction", "input") if isinstance(record.get(key), str) and record[key]]
    if len(parts) == 2 and picked["chosen"] and picked["rejected"]:
        return (
            "instruction and input are one prompt: jq -c '.prompt = .instruction + \"\\n\\n\" + .input' "
            "FILE > pairs.jsonl writes it so"
        )
    flags = ",".join(f"{ours}={theirs}" for ours, theirs in picked.items() if theirs and theirs != ours)
    return f"--map {flags} reads it" if flags and picked["chosen"] and picked["rejected"] else ""


def _texts(values: list[Any]) -> bool:
    return all(isinstance(v, str) or (isinstance(v, dict) and "response" in v) for v in values)


def looks_like(record: Record) -> str:
    """Name the shape that a record of none looks like, and the flag that reads it."""
    there = ", ".join(map(repr, list(record)[:10])) or "nothing"
    wanted = "; wanted messages, or prompt and response, or instruction and output"
    for key, turns in record.items():
        first = turns[0] if isinstance(turns, list) and turns else None
        if asked_and_said(first):
            return f"there is {there}; {key!r} holds questions with their answers: --map {word(f'messages={key}')}"
        if is_texts(turns) and len(turns) > 1:
            return f"there is {there}; if {key!r} holds texts in turn, the user's first: --map {word(f'data={key}')}"
        if is_transcript(turns):
            return f"there is {there}; {key!r} holds a transcript of Human and Assistant: --map {word(f'messages={key}')}"
        if isinstance(first, dict) and (found := _speaker(first)):
            role, content = found
            pairs = [("messages", key), ("role", role), ("content", content)]
            flags = ",".join(f"{ours}={theirs}" for ours, theirs in pairs if ours != theirs)
            return f"there is {there}; it looks like messages under other names: --map {word(flags)}"
    if flags := _instruction(record):
        return f"there is {there}; it looks like instruction, input and output under other names: --map {word(flags)}"
    lower = {re.sub(r"[^a-z]", "", key.lower()): key for key, v in record.items() if isinstance(v, str)}
    picked = {
        ours: next((lower[w] for w in (ours, *words.split()) if w in lower), None)
        for ours, words in SYNONYMS.items()
    }
    if picked["prompt"] and picked["response"]:
        flags = ",".join(f"{o}={picked[o]}" for o in ("prompt", "response") if picked[o] != o)
        return f"there is {there}; it looks like a prompt and its response under other names: --map {word(flags)}"
    if picked["text"] and len(lower) == 1:
        key = picked["text"]
        return (
            f"there is {there}; it looks like text alone: --corpus FILE --content-field {word(key)} trains on all of it, "
            f"--map {word(f'text={key}')} on the answers in it"
        )
    for key, rows in record.items():
        first = {*rows[0]} if isinstance(rows, list) and rows and isinstance(rows[0], dict) else set()
        if first & ALONE or len(first & PAIRED) > 1:
            advice = f"jq -c {word(jq_path(key) + '[]')} FILE > records.jsonl writes them one a line"
            return f"there is {there}; the records are in {key!r}: {advice}"
    return f"there is {there}{wanted}; --map OURS=THEIRS says which key is which"


def _instruction(record: Record) -> str:
    """Spell the map of an instruction whose answer, and the text that it is about, have other names; "" for other records."""
    texts = {key for key, value in record.items() if isinstance(value, str)}
    answer = next((k for k in ("output", *SYNONYMS["response"].split(), "response") if k in texts), None)
    about = next((k for k in ("input", "context", "passage", "document") if k in texts), None)
    if "instruction" not in texts or not answer or not about:
        return ""
    pairs = [("output", answer), ("input", about)]
    return ",".join(f"{ours}={theirs}" for ours, theirs in pairs if ours != theirs)


def _speaker(turn: Record) -> tuple[str, str] | None:
    """Find the keys of a message that hold who speaks, and what is said."""
    words = {re.sub(r"[^a-z]", "", k.lower()): k for k, v in turn.items() if isinstance(v, str)}
    role = next(
        (words[w] for w in ("role", "from", "speaker", "author", "user", "sender") if w in words), None
    )
    said = ("content", "value", "text", "message", "utterance", "body")
    content = next((words[w] for w in said if w in words and words[w] != role), None)
    return (role, content) if role and content else None
