"""Scalings of the rotary frequencies as keys of GGUF files: written, read, and refused where llama.cpp computes otherwise."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import MalformedFile, Refused
from ..model.config import ModelConfig
from ..model.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling, magnitude

# Key of a scaling -> key of config.json.
SCALING_KEYS = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
# Architecture whose loader reads rope_freqs.weight; the loaders of the others refuse a file that has it.
READS_DIVISORS = "llama"
# llama.cpp reads yarn_beta_fast and yarn_beta_slow in no architecture of ours: these hold, whatever the keys say.
BETA_FAST, BETA_SLOW = 32.0, 1.0


def scaling_keys(cfg: ModelConfig) -> dict[str, Any]:
    """Name what llama.cpp reads of a scaling, by key without the architecture; {} where it reads none: plain, dynamic, Llama 3.

    Its yarn multiplies cos and sin by magnitude(factor) times attn_factor (`rope_yarn`, and `yarn_attn_factor` of its context).
    """
    s = cfg.rope_scaling
    if isinstance(s, LinearScaling):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": s.factor}
    if not isinstance(s, YarnScaling):
        return {}
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": s.factor,
        "rope.scaling.original_context_length": s.original_max_position_embeddings,
        "rope.scaling.attn_factor": s.amplitude / magnitude(s.factor),
        "rope.scaling.yarn_beta_fast": s.beta_fast,
        "rope.scaling.yarn_beta_slow": s.beta_slow,
    }


def check_scaling(cfg: ModelConfig, arch: str, path: str | Path) -> None:
    """Raise Refused for a scaling of the rotary frequencies that llama.cpp computes otherwise, or not at all."""
    s = cfg.rope_scaling
    if isinstance(s, Llama3Scaling) and arch != READS_DIVISORS:
        raise Refused(
            f"{path}: llama.cpp does not scale the rotary frequencies of {arch} models; export --format hf"
        )
    if isinstance(s, YarnScaling) and not s.truncate:
        raise Refused(
            f"{path}: truncate = false of rope_type 'yarn' has no key in GGUF files; export --format hf"
        )
    check_ramp(cfg, path)


def check_ramp(cfg: ModelConfig, path: str | Path) -> None:
    """Raise Refused where llama.cpp and transformers make other ramps of the same keys of YaRN: an end before the first pair,
    or other numbers of turns than llama.cpp's, unless the ends are those of the same pairs."""
    s = cfg.rope_scaling
    if not isinstance(s, YarnScaling):
        return
    own = dataclasses.replace(s, beta_fast=BETA_FAST, beta_slow=BETA_SLOW)
    ends, theirs = (x.bounds(cfg.head_dim // 2, cfg.rope_theta) for x in (s, own))
    if min(ends[1], theirs[1]) < 0:
        what = f"original_max_position_embeddings = {s.original_max_position_embeddings} is less than a turn of any pair"
    elif ends != theirs:
        what = f"beta_fast = {s.beta_fast:g} and beta_slow = {s.beta_slow:g}, of which llama.cpp takes 32 and 1 for all models"
    else:
        return
    raise Refused(
        f"{path}: {what}; llama.cpp and transformers scale such frequencies each in another way: a Hugging Face folder says which"
    )


def read_scaling(own: dict[str, Any], ours: dict[str, Any], place: str) -> dict[str, Any] | None:
    """Translate the keys of a scaling to `rope_scaling` of config.json: those of apr, which are exact, or llama.cpp's.

    None where there are none, or they are of a kind that `check_honoured` refuses by its key."""
    prefix = "rope_scaling."
    scaling = {k.removeprefix(prefix): v for k, v in ours.items() if k.startswith(prefix)}
    if scaling:
        positions = scaling.get("original_max_position_embeddings")
        if isinstance(positions, float) and positions.is_integer():  # every factor is written as a float64
            scaling["original_max_position_embeddings"] = int(positions)
        return {"rope_type": "llama3", **scaling}
    # As llama.cpp has it: a factor alone divides positions, and the length before scaling is that of the model.
    kind = own.get("rope.scaling.type", "linear" if "rope.scaling.factor" in own else "none")
    if kind not in ("linear", "yarn"):
        return None
    if "rope.scaling.factor" not in own:
        raise MalformedFile(
            f"{place}.rope.scaling.type = {kind!r} needs a rope.scaling.factor, which is missing"
        )
    if kind == "linear":
        return {"rope_type": kind, "factor": float32(own["rope.scaling.factor"])}
    found = {hf: float32(own[key]) for key, hf in SCALING_KEYS.items() if key in own}
    factor, attention = found.get("factor"), own.get("rope.scaling.attn_factor", 1.0)
    if not isinstance(attention, float) or not isinstance(factor, float):
        found["attention_factor"] = attention
    elif attention != 1:
        found["attention_factor"] = float32(attention) * magnitude(factor)
    return {"rope_type": kind, "original_max_position_embeddings": own["context_length"], **found}


def float32(x: Any) -> Any:
    """Find the shortest decimal that is this float32: 1e-06 is stored as 9.999999974752427e-07."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(x))) if isinstance(x, float) else x
