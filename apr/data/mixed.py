"""Shards of several sources as one: the arrays of each, one source behind the other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..common.errors import Refused
from .manifest import figures
from .shards import Shards


class MixedShards(Shards):
    """One side of a mixture. The sources are all text, or all packed examples.

    counts: of the ids of each source's targets (V,), None where nobody has counted them: then there are no figures.
    Raises Refused: text beside examples, or examples packed otherwise."""

    def __init__(self, parts: Sequence[tuple[str, Shards]], counts: Sequence[np.ndarray | None]) -> None:
        self._of_each = list(parts)
        every = [shards for _, shards in parts]
        if len({bool(x.masks) for x in every}) > 1:
            raise Refused(
                f"{every[0].folder} and {every[1].folder}: one source holds packed examples, another text; mix text with text, "
                "and conversations with conversations"
            )
        borders = {x.border_id for x in every}
        if every[0].masks and len(borders) > 1:
            raise Refused(
                f"{' and '.join(str(x.folder) for x in every)}: packed with other ids between examples, {borders}; give the "
                "conversations as one folder"
            )
        self.folder = every[0].folder
        self.files = [f for x in every for f in x.files[: len(x.arrays)]]
        self.files += [f for x in every for f in x.files[len(x.arrays) :]]
        self.arrays = [a for x in every for a in x.arrays]
        self.masks = [m for x in every for m in x.masks]
        self.row_tokens = every[0].row_tokens
        rows = [x.row_targets for x in every if x.row_targets is not None]
        self.row_targets = np.concatenate(rows) if rows else None
        self.prefix_ids = every[0].prefix_ids if len({x.prefix_ids for x in every}) == 1 else ()
        self.border_id = borders.pop() if len(borders) == 1 else None
        self.vocab_size = every[0].vocab_size
        self.tokenizer_sha256 = every[0].tokenizer_sha256
        self.total_tokens = sum(x.total_tokens for x in every)
        self.total_bytes = sum(x.total_bytes for x in every)
        self.total_documents = sum(x.total_documents for x in every)
        counted = [c for c in counts if c is not None]
        known = len(counted) == len(every)
        self.figures = figures(np.sum(counted, axis=0), self.total_bytes, None) if known else {}
        self.facts = _together([x.facts for x in every])
        self.sha256 = hashlib.sha256("".join(x.sha256 for x in every).encode()).hexdigest()

    @property
    def parts(self) -> list[tuple[str, Shards]]:
        """List the sources, by name."""
        return self._of_each


def _together(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add up the counts of packed examples; what is no count is that of all sources, or a list."""
    out: dict[str, Any] = {}
    for key in dict.fromkeys(k for f in facts for k in f):
        values = [f[key] for f in facts if key in f]
        if key == "skipped":
            reasons = dict.fromkeys(r for v in values for r in v)
            out[key] = {r: sum(v.get(r, 0) for v in values) for r in reasons}
        elif key != "separator" and all(isinstance(v, int) for v in values):
            out[key] = sum(values)
        else:
            out[key] = values[0] if all(v == values[0] for v in values) else values
    return out


def counted(shards: Shards) -> np.ndarray:
    """Count the ids of the targets of packed examples, (V,) int64."""
    counts = np.zeros(shards.vocab_size, np.int64)
    for ids, mask in zip(shards.arrays, shards.masks, strict=True):
        counts += np.bincount(ids[mask > 0], minlength=shards.vocab_size)
    return counts
