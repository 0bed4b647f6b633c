"""Rotary embedding tables (Su et al. 2021)."""

from __future__ import annotations

import numpy as np

from .config import ModelConfig


def rope_tables(c: ModelConfig, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables of cos and sin of every position's angles, float64 (positions, D/2), computed once on the host.

    angle[t, i] = t * theta^(-2i/D) (Su et al. 2021), with frequencies and amplitude of c.rope_scaling.
    """
    freq = c.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
    if c.rope_scaling is not None:
        freq = c.rope_scaling.frequencies(freq, c.rope_theta)
    amplitude = c.rope_scaling.amplitude if c.rope_scaling else 1.0
    angle = np.outer(np.arange(positions), freq)
    return np.cos(angle) * amplitude, np.sin(angle) * amplitude
