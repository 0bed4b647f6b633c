"""A document, the side of the split that it is on, and the folder that things are written to."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Document:
    """One text with the name it is reported under."""

    name: str
    text: str

    @property
    def data(self) -> bytes:
        """The text as UTF-8."""
        return self.text.encode()

    @cached_property
    def sha256(self) -> str:
        """Identity of the content, hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()


def is_held_out(sha256: str, fraction: float) -> bool:
    """True for about `fraction` of all documents, decided by the document's content hash alone.

    So a document lies on one side whatever else the corpus holds, and its copies lie on the same."""
    return int(sha256[:16], 16) < fraction * 2.0**64
