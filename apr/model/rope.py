"""Rotary embedding tables (Su et al. 2021), with linear scaling and that of Llama 3.1."""

from __future__ import annotations

import numpy as np

from .config import LinearScaling, ModelConfig, RopeScaling


def rope_tables(c: ModelConfig, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables of cos and sin of every position's angles, float64 (positions, D/2), computed once on the host.

    angle[t, i] = t * theta^(-2i/D) (Su et al. 2021), with frequencies divided by a factor (Chen et al. 2023) or scaled as
    Llama 3.1 does.
    """
    freq = c.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
    if isinstance(c.rope_scaling, LinearScaling):
        freq = freq / c.rope_scaling.factor
    elif c.rope_scaling:
        freq = _llama3(freq, c.rope_scaling)
    angle = np.outer(np.arange(positions), freq)
    return np.cos(angle), np.sin(angle)


def _llama3(freq: np.ndarray, s: RopeScaling) -> np.ndarray:
    """Llama 3.1: wavelengths above original/low are divided by factor, below original/high kept,
    between them interpolated linearly in original/wavelength."""
    turns = s.original_max_position_embeddings * freq / (2 * np.pi)  # original / wavelength
    keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    keep = np.clip(keep, 0, 1)
    return freq * (keep + (1 - keep) / s.factor)
