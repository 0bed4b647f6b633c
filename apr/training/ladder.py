"""Keep some older states of a run, spread over its length, from which `apr verify --replay` computes steps again."""

from __future__ import annotations

from .settings import Settings

MIB = 1 << 20


def most_rungs(s: Settings, state_bytes: int) -> int:
    """Count the older states that fit into --ladder-mib.  state_bytes: of weights and moments"""
    return s.ladder_mib * MIB // state_bytes


def _older(s: Settings) -> tuple[int, int]:
    """Count the steps between states, and the states that --keep-states does not keep."""
    every = s.save_every or s.eval_every
    return every, max(0, -(-s.num_steps // every) - s.keep_states)


def spacing(s: Settings, state_bytes: int) -> int:
    """Compute the steps between those that are kept; 0: none is."""
    (every, older), most = _older(s), most_rungs(s, state_bytes)
    return every * -(-older // most) if most else 0


def kept(s: Settings, state_bytes: int) -> int:
    """Count those that are there at most."""
    (every, older), apart = _older(s), spacing(s, state_bytes)
    return older * every // apart if apart else 0
