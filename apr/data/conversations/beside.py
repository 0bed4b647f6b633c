"""Keys beside a conversation: the system prompt under other names, and what says that a record is not to be learnt."""

from __future__ import annotations

from typing import Any

from ..hub_data import SPLITS, TRAIN
from ..source import Unusable
from .keys import Record

# Names that files have for "system".
SYSTEM_NAMES = ("system_prompt", "system_message", "systemPrompt", "system_instruction")
# Keys with false in records of bad answers, as KTO has them (Ethayarajh et al. 2024), and the reason that is counted.
LABELS, BAD = ("label", "kto_tag"), "label is false"
# Reason of records whose "split" names others than those to train on.
OTHER_SPLIT = "of another split"
# Records that are left out because they say so: none of them is broken.
ASKED = (BAD, OTHER_SPLIT)
PICTURES = ("image", "images", "video", "videos", "audio", "audios")
# Numbers that two answers were given.
SCORES = tuple(
    (form.format("chosen", word), form.format("rejected", word))
    for form in ("{0}_{1}", "{1}_{0}", "{0}-{1}")
    for word in ("score", "rating")
)
# Read beside messages; "history" beside a question and its answer too.
READ_BESIDE = {"system", "tools", "chat_template_kwargs"}


def settled(record: Record) -> Record:
    """Give a record "system" under our name. Raises Unusable for a record of another split, and for one of pictures or sound."""
    if str(record.get("split", "")).lower() in {*SPLITS} - {*TRAIN}:
        raise Unusable(
            OTHER_SPLIT, f"split is {record['split']!r}; take the key out where it is to be trained on"
        )
    for key in PICTURES:
        if record.get(key):
            raise Unusable("parts that are no text", f"there is {key!r}; apr trains on text")
    name = next((n for n in SYSTEM_NAMES if isinstance(record.get(n), str)), None)
    if name is None or record.get("system"):
        return record
    return {**{k: v for k, v in record.items() if k != name}, "system": record[name]}


def refuse_bad(record: Record) -> None:
    """Raise Unusable for an answer that is labelled as a bad one."""
    for key in LABELS:
        # A number may be a class.
        if str(record.get(key, "")).lower() == "false":
            raise Unusable(
                BAD, f"{key} marks a bad answer; --preferences learns from pairs of a good and a bad one"
            )


def refuse_swapped(record: Record) -> None:
    """Raise Unusable for a pair whose rejected answer has the higher score."""
    for better, worse in SCORES:
        high, low = (_number(record.get(key)) for key in (better, worse))
        if high is not None and low is not None and high < low:
            raise Unusable("scores the other way round", f"{better} is {high:g}, {worse} is {low:g}")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
