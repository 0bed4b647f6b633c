"""Cut a long text where its tokens are cut anyway, so that its pieces, encoded apart, give the ids of the whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from ..common.errors import AprError
from ..tokenizer.tokenizer import Tokenizer

PIECE = 1 << 17  # characters of a piece, about: small enough to keep all cores busy with one document
MOST = 1 << 21  # characters that are encoded in one piece where there is no place to cut
CONTEXT = 256  # characters on each side of a cut that are encoded to judge it
TRIES = 32  # places tried around one target

# After a line end and before text; then before a space that follows text. The pre-tokenizers of GPT-2, GPT-4, Llama 3 and
# Qwen cut there, whatever lies further away; whether the one at hand does is found out at each place.
PLACES = (re.compile(r"(?<=\n)(?=[!-~])"), re.compile(r"(?<=[!-~])(?= [!-~])"), re.compile(r"(?<=\S)(?=\s)"))


class CannotCut(AprError):
    """A stretch of more than MOST characters has no place where this tokenizer's ids could be cut."""

    exit_code = 5
    status = "REFUSED"


class Cutter:
    """Cuts texts for one tokenizer.

    A place is taken only where encoding CONTEXT characters on both sides together gives the ids of the two sides
    apart. Byte-level tokenizers split a text into words from left to right before anything else, and a word
    as long as CONTEXT does not reach across such a place, so what holds there holds for the whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        """Pieces of about PIECE characters of a text that comes in chunks. Raises CannotCut."""
        held = ""
        for chunk in _short(chunks):
            held += chunk
            while len(held) >= 2 * PIECE:
                at = self._place(held)
                if at is None:
                    if len(held) > MOST:
                        raise CannotCut(
                            f"{len(held)} characters, beginning {held[:40]!r}, without a place to cut"
                        )
                    break
                yield held[:at]
                held = held[at:]
        while len(held) >= 2 * PIECE and (at := self._place(held)) is not None:
            yield held[:at]
            held = held[at:]
        if len(held) > MOST:
            raise CannotCut(f"{len(held)} characters, beginning {held[:40]!r}, without a place to cut")
        if held:
            yield held

    def _place(self, text: str) -> int | None:
        """Where to cut: near PIECE, or behind it, or before it."""
        near, far = PIECE // 2, 3 * PIECE // 2
        for start, stop in ((near, far), (far, len(text)), (1, near)):
            for pattern in PLACES:
                places: Iterable[int] = (m.start() for m in pattern.finditer(text, start, stop))
                if start == far:
                    places = islice(places, TRIES)
                for at in sorted(places, key=lambda at: abs(at - PIECE))[:TRIES]:
                    if self._fits(text, at):
                        return at
        return None

    def _fits(self, text: str, at: int) -> bool:
        left, right = text[max(0, at - CONTEXT) : at], text[at : at + CONTEXT]
        if (
            not left.strip() or not right.strip()
        ):  # a run of spaces as long as what is looked at: anything may follow
            return False
        whole, first, second = self._tokenizer.encode_batch([left + right, left, right])
        return bool(np.array_equal(whole, np.concatenate([first, second])))


def _short(chunks: Iterable[str]) -> Iterator[str]:
    """The same text in chunks that are cheap to copy a few times."""
    for chunk in chunks:
        for start in range(0, len(chunk), 4 * PIECE):
            yield chunk[start : start + 4 * PIECE]
