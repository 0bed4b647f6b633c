"""Put the shards of several sources together: the arrays of each, one source behind the other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..common.errors import Refused
from .manifest import figures
from .shards import Shards


class MixedShards(Shards):
    """One side of a mixture. Text beside packed examples has a target at every position, and attention stops in it where
    documents end, as it does between examples.

    counts: of the ids of each source's targets (V,), None where nobody has counted them: then there are no figures.
    Raises Refused: examples packed with another id between them than the one that ends a document."""

    def __init__(self, parts: Sequence[tuple[str, Shards]], counts: Sequence[np.ndarray | None]) -> None:
        self._of_each = list(parts)
        every = [shards for _, shards in parts]
        packed = [x for x in every if x.row_tokens]
        borders = {x.border_id for x in every}
        if packed and len(borders) > 1:
            said = ", ".join(f"{name} by {x.border_id}" for name, x in parts)
            raise Refused(
                f"--mix: attention stops at one id, but documents and examples of the sources end by several, {said}; one that "
                "stands inside examples cannot end them: give all conversations as one folder, and text a run of its own"
            )
        self.folder = every[0].folder
        self.files = [f for x in every for f in x.files]
        self.arrays = [a for x in every for a in x.arrays]
        self.row_tokens = every[0].row_tokens if len(packed) == len(every) else None
        self.masks, self.row_targets = [], None
        if packed:
            of_window = max(x.row_tokens or 0 for x in packed) - 1
            ones = [[np.broadcast_to(np.uint8(1), a.shape) for a in x.arrays] for x in every]
            self.masks = [m for x, all_of in zip(every, ones, strict=True) for m in x.masks or all_of]
            self.row_targets = np.concatenate([_targets(x, of_window) for x in every])
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
        self.facts = _together([x.facts for x in packed])
        self.sha256 = hashlib.sha256("".join(x.sha256 for x in every).encode()).hexdigest()

    def check_sizes(self, indices: np.ndarray) -> None:
        """See Shards."""
        first = 0
        for _, part in self._of_each:
            own = indices[(indices >= first) & (indices < first + len(part.arrays))] - first
            if own.size:
                part.check_sizes(own)
            first += len(part.arrays)

    def strides(self, seq_length: int) -> list[int]:
        """See Shards."""
        return [n for _, part in self._of_each for n in part.strides(seq_length)]

    @property
    def parts(self) -> list[tuple[str, Shards]]:
        """List the sources, by name."""
        return self._of_each


def _targets(shards: Shards, seq_length: int) -> np.ndarray:
    """Count the targets of each window, int64 (windows,)."""
    if shards.row_targets is not None:
        return shards.row_targets
    windows = sum(max(0, (a.size - 1) // seq_length) for a in shards.arrays)
    return np.full(windows, seq_length, np.int64)


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
