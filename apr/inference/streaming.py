"""Decode tokens as they come: whole characters only, and nothing of a string that ends the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..common.errors import UsageError
from ..tokenizer.tokenizer import Tokenizer

BROKEN = "\ufffd"  # half a character, decoded
CONTEXT = (
    6  # tokens of the prompt that are decoded with the first new one: some decoders treat a first token apart
)


@dataclass(frozen=True)
class Text:
    """Continuation of a prompt: its text, its ids, and the reason of its end: "end" (an end-of-text id, the last of the ids),
    "stop" (a stop string, not part of the text), "length" (max_tokens) or "positions" (the model has no more)."""

    prompt_ids: list[int]
    text: str
    ids: list[int]
    ended: str


class StopText:
    """Lets text through up to the first stop string, which may come in pieces. stopped: a stop string was found.

    Where several overlap, the one that is complete first counts, whatever the pieces."""

    def __init__(self, stops: Sequence[str] | None) -> None:
        listed = [stops] if isinstance(stops, str) else list(stops or ())
        for s in listed:
            if not isinstance(s, str):
                raise UsageError(f"stop holds {s!r}, which is no text; give texts, such as stop=['\\n']")
        self._stops = [s for s in listed if s]
        self._held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """Take a piece; return the text that may be shown now."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, s) for s in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """Return the text that was held back, at the end."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Measure the longest end of a text with which a stop string begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class TextStream:
    """Decodes new tokens after a prompt, without special tokens.

    A few tokens are decoded at a time, not all: those since the last whole character, after those of the piece before,
    without which a decoder would not know what the first of them follows."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] | None = ()) -> None:
        self._tokenizer, self._stop = tokenizer, StopText(stops)
        self._ids = list(prompt[-CONTEXT:])
        self._shown, self._from = self._decode(self._ids), len(self._ids)
        self.text = ""

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=True)

    @property
    def stopped(self) -> bool:
        """True after a stop string: there is no more text."""
        return self._stop.stopped

    def feed(self, token: int) -> str:
        """Take one more token; return the text that the token completes, often "" or several characters."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(BROKEN) or not text.startswith(self._shown):
            return ""
        piece = text[len(self._shown) :]
        if piece:
            self._ids = self._ids[self._from :]
            self._shown, self._from = self._decode(self._ids), len(self._ids)
        return self._let_through(piece)

    def end(self) -> str:
        """Return the text that is left when no more tokens come."""
        text = self._decode(self._ids)
        self._ids = []
        return self._let_through(text[len(self._shown) :]) + self._add(self._stop.rest())

    def _let_through(self, piece: str) -> str:
        return self._add(self._stop.feed(piece))

    def _add(self, piece: str) -> str:
        self.text += piece
        return piece
