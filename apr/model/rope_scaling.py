"""Scaling of rotary frequencies: a class for each rope_type, its fields the keys of config.json.

A kind is a class here and nothing else of the package but what writes GGUF keys and the check in bisect/upload.py, which
computes the angles apart. `SCALINGS` lists them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class RopeScaling:
    """Base of all kinds: a factor, frequencies, and an amplitude of cos and sin."""

    rope_type: ClassVar[str]
    ignored: ClassVar[frozenset[str]] = frozenset()  # keys of published files that change nothing

    factor: float

    def frequencies(self, freq: np.ndarray, theta: float) -> np.ndarray:
        """Scale the frequencies freq[i] = theta^(-2i/D), radians per position, float64 (D/2,)."""
        raise NotImplementedError

    @property
    def amplitude(self) -> float:
        """Number that multiplies cos and sin."""
        return 1.0

    def beyond(self, positions: int) -> str:
        """Say why apr computes no more than max_position_embeddings = positions, or what would make them more, for messages."""
        return ""

    def __str__(self) -> str:
        values = ", ".join(f"{key} {value}" for key, value in asdict(self).items() if value is not None)
        return f"{self.rope_type} ({values})"

    def fault(self, theta: float) -> str:
        """Say what is wrong with the values together; "" for values that compute."""
        return ""


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Positions divided by `factor` (Chen et al. 2023), as in deepseek-coder and in models of longer windows."""

    rope_type = "linear"

    def frequencies(self, freq: np.ndarray, theta: float) -> np.ndarray:
        """freq / factor"""
        return freq / self.factor


@dataclass(frozen=True)
class DynamicScaling(RopeScaling):
    """Dynamic NTK: up to max_position_embeddings nothing is scaled; beyond, frequencies would depend on the length of
    each text. apr computes no positions beyond max_position_embeddings, so `factor` is carried and never used."""

    rope_type = "dynamic"

    def frequencies(self, freq: np.ndarray, theta: float) -> np.ndarray:
        """freq"""
        return freq

    def beyond(self, positions: int) -> str:
        """The frequencies would depend on the text."""
        return ", beyond which the frequencies of rope_type 'dynamic' depend on the length of each text"


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Llama 3.1: wavelengths above original/low are divided by factor, below original/high kept,
    between them interpolated linearly in original/wavelength."""

    rope_type = "llama3"

    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def frequencies(self, freq: np.ndarray, theta: float) -> np.ndarray:
        """freq (keep + (1 - keep) / factor)"""
        turns = self.original_max_position_embeddings * freq / (2 * np.pi)  # original / wavelength
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = np.clip(keep, 0, 1)
        scaled: np.ndarray = freq * (keep + (1 - keep) / self.factor)
        return scaled

    def fault(self, theta: float) -> str:
        """Refuse bounds in the wrong order or equal, between which nothing can be interpolated."""
        low, high = self.low_freq_factor, self.high_freq_factor
        return "" if low < high else f"low_freq_factor = {low:g} is not below high_freq_factor = {high:g}"


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN (Peng et al. 2023), as transformers computes it.

    Pairs that turn more than beta_fast times within the original length are kept, less than beta_slow times divided by factor,
    between them interpolated linearly in the number of the pair. cos and sin are multiplied by attention_factor; without one by
    m(factor, mscale) / m(factor, mscale_all_dim) if both are there, else m(factor, 1), m(f, a) = 0.1 a log(f) + 1 for f > 1.
    """

    rope_type = "yarn"
    ignored = frozenset({"finetuned"})

    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def frequencies(self, freq: np.ndarray, theta: float) -> np.ndarray:
        """freq (keep + (1 - keep) / factor)"""
        keep = 1 - self._ramp(len(freq), theta)
        scaled: np.ndarray = freq * (keep + (1 - keep) / self.factor)
        return scaled

    def _ramp(self, pairs: int, theta: float) -> np.ndarray:
        """Share of each pair that is divided, (D/2,): 0 up to the pair of beta_fast turns, 1 from that of beta_slow turns on."""
        low, high = self.bounds(pairs, theta)
        if low == high:
            high += 0.001
        return np.clip((np.arange(pairs) - low) / (high - low), 0, 1)

    def bounds(self, pairs: int, theta: float) -> tuple[float, float]:
        """Numbers of the pairs that turn beta_fast and beta_slow times within the original length."""
        fast, slow = (
            pairs * math.log(self.original_max_position_embeddings / (beta * 2 * math.pi)) / math.log(theta)
            for beta in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            fast, slow = math.floor(fast), math.ceil(slow)
        # the bound 2 pairs - 1 is that of transformers
        return max(fast, 0), min(slow, 2 * pairs - 1)

    @property
    def amplitude(self) -> float:
        """attention_factor, or what follows from factor, mscale and mscale_all_dim."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return magnitude(self.factor, self.mscale) / magnitude(self.factor, self.mscale_all_dim)
        return magnitude(self.factor)

    def beyond(self, positions: int) -> str:
        """Name the length that the scaling is for, where the model's own is shorter: it is often left as it was."""
        most = round(self.factor * self.original_max_position_embeddings)
        return f" (its rope_type 'yarn' is for {most:,}: config.json may say so)" if most > positions else ""

    def fault(self, theta: float) -> str:
        """Refuse bounds in the wrong order, and a theta whose logarithm divides by zero or turns the order round."""
        if self.beta_fast < self.beta_slow:
            return f"beta_fast = {self.beta_fast:g} is below beta_slow = {self.beta_slow:g}"
        return f"rope_theta = {theta:g} is not above 1" if theta <= 1 else ""


def magnitude(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale log(factor) + 1; 1 for a factor up to 1 (Peng et al. 2023, eq. 22)"""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


SCALINGS: dict[str, type[RopeScaling]] = {
    kind.rope_type: kind for kind in (Llama3Scaling, LinearScaling, YarnScaling, DynamicScaling)
}
