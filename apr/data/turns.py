"""Take turns between the sources of a mixture: which of them each place of the endless stream of windows is of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Turns:
    """A period of places, `counts[k]` of them of source k, spread as evenly as can be; again and again.

    Any place is looked up by itself, so a stream goes on from its position alone. After n places source k has had
    n counts[k] / period, but for less than the number of sources. One source has every place."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)
        # The j-th of n places of a source wants to be (j + 1/2) / n of the way; the first source comes first at equal places.
        wanted = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
        sources = np.repeat(np.arange(len(counts)), counts)
        self._pattern = sources[np.argsort(wanted, kind="stable")]
        self._places = [np.flatnonzero(self._pattern == k) for k in range(len(counts))]
        # Place of each within those of its source.
        self._within = np.empty_like(self._pattern)
        for at in self._places:
            self._within[at] = np.arange(at.size)

    def __call__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look up the sources of places int64 (B,), and the positions (B,) in their own streams."""
        period, at = np.divmod(places, self._pattern.size)
        source = self._pattern[at]
        return source, period * np.array(self.counts)[source] + self._within[at]

    def count(self, source: int, places: int) -> int:
        """Count the places of a source among the first `places`."""
        period, rest = divmod(places, self._pattern.size)
        return period * self.counts[source] + int(np.searchsorted(self._places[source], rest))

    def place(self, source: int, position: int) -> int:
        """Find the place at which a source comes to a position of its own stream."""
        period, rest = divmod(position, self.counts[source])
        return period * self._pattern.size + int(self._places[source][rest])
