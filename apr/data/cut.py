"""Cut a long text where its tokens are cut anyway, so that its pieces, encoded apart, give the ids of the whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from ..common.errors import AprError
from ..common.units import plural
from ..tokenizer.tokenizer import Tokenizer

# Of a piece, about: small enough to keep all cores busy with one document.
PIECE_CHARACTERS = 1 << 17
# Of a piece where there is no place to cut.
MAX_PIECE_CHARACTERS = 1 << 21
# On each side of a place, encoded to judge if a cut there changes ids.
CONTEXT_CHARACTERS = 256
# Places tried around one target.
MAX_TRIES = 32

# After a line end and before text; then before a space that follows text. The pre-tokenizers of GPT-2, GPT-4, Llama 3 and
# Qwen cut there, whatever lies further away; each place is tried with the tokenizer at hand.
PLACES = (re.compile(r"(?<=\n)(?=[!-~])"), re.compile(r"(?<=[!-~])(?= [!-~])"), re.compile(r"(?<=\S)(?=\s)"))


class CannotCut(AprError):
    """A stretch of more than MAX_PIECE_CHARACTERS characters has no place where this tokenizer's ids could be cut."""

    exit_code = 5
    status = "REFUSED"


class Cutter:
    """Cut texts for one tokenizer.

    A place is taken only where encoding CONTEXT_CHARACTERS characters on both sides together gives the ids of the two sides
    apart. Byte-level tokenizers split a text into words from left to right before anything else, and a word
    as long as CONTEXT_CHARACTERS does not reach across such a place, so what holds there holds for the whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        """Yield pieces of about PIECE_CHARACTERS characters of a text that comes in chunks. Raises CannotCut."""
        buffered = ""
        for chunk in _short(chunks):
            buffered += chunk
            while len(buffered) >= 2 * PIECE_CHARACTERS:
                at = self._place(buffered)
                if at is None:
                    if len(buffered) > MAX_PIECE_CHARACTERS:
                        raise CannotCut(
                            f"{plural(len(buffered), 'character')}, beginning {buffered[:40]!r}, without a place to cut"
                        )
                    break
                yield buffered[:at]
                buffered = buffered[at:]
        while len(buffered) >= 2 * PIECE_CHARACTERS and (at := self._place(buffered)) is not None:
            yield buffered[:at]
            buffered = buffered[at:]
        if len(buffered) > MAX_PIECE_CHARACTERS:
            raise CannotCut(
                f"{plural(len(buffered), 'character')}, beginning {buffered[:40]!r}, without a place to cut"
            )
        if buffered:
            yield buffered

    def uncuttable(self, chunks: Iterable[str]) -> str:
        """Say why a text cannot be cut into pieces, "" if it can, before its first piece is used."""
        try:
            for _ in self.pieces(chunks):
                pass
        except CannotCut as e:
            return str(e)
        return ""

    def _place(self, text: str) -> int | None:
        """Choose a place to cut: near PIECE_CHARACTERS, else behind it, else before it."""
        near, far = PIECE_CHARACTERS // 2, 3 * PIECE_CHARACTERS // 2
        for start, stop in ((near, far), (far, len(text)), (1, near)):
            for pattern in PLACES:
                places: Iterable[int] = (m.start() for m in pattern.finditer(text, start, stop))
                if start == far:
                    places = islice(places, MAX_TRIES)
                for at in sorted(places, key=lambda at: abs(at - PIECE_CHARACTERS))[:MAX_TRIES]:
                    if self._fits(text, at):
                        return at
        return None

    def _fits(self, text: str, at: int) -> bool:
        """Check that a cut changes no id near it."""
        left, right = text[max(0, at - CONTEXT_CHARACTERS) : at], text[at : at + CONTEXT_CHARACTERS]
        # A run of spaces as long as the context: anything may follow.
        if not left.strip() or not right.strip():
            return False
        whole, first, second = self._tokenizer.encode_batch([left + right, left, right])
        return bool(np.array_equal(whole, np.concatenate([first, second])))


def _short(chunks: Iterable[str]) -> Iterator[str]:
    """Divide chunks until each is cheap to copy a few times."""
    for chunk in chunks:
        for start in range(0, len(chunk), 4 * PIECE_CHARACTERS):
            yield chunk[start : start + 4 * PIECE_CHARACTERS]
