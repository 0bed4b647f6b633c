"""Scaled rotary frequencies: what stock Hugging Face models compute in float64 with each rope_type and its keys.

    torch-env/bin/python tools/golden/rope.py [--check]

Writes tests/golden/rope.json (--check: compares with it, and writes nothing): of each row of SETTINGS the config.json, ids, the
frequencies and the amplitude of cos and sin, the loss, the logits of the last token, and of logits and gradients norms and sums
with random signs, as tools/golden/steps.py makes them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from models import ROOT, demand, float32_is_float64, loss_of
from steps import draw, projections, write_or_check

from apr.model.hf_config import to_hf
from apr.model.presets import PRESETS

PATH = ROOT / "tests" / "golden" / "rope.json"
SHAPE = (2, 40)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 28}
# name -> preset, place in config.json, keys
SETTINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "linear": ("llama-tiny", "rope_scaling", {"type": "linear", "factor": 3.0}),
    "dynamic": ("llama-tiny", "rope_parameters", {"rope_type": "dynamic", "factor": 2.0}),
    "llama3": ("llama-tiny", "rope_scaling", {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 28}),
    "yarn": ("qwen2-tiny", "rope_scaling", {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 28, "finetuned": True}),
    "yarn, betas": ("llama-tiny", "rope_parameters", {**YARN, "beta_fast": 3.0, "beta_slow": 0.6}),
    "yarn, attention_factor": ("qwen3-tiny", "rope_parameters", {
        **YARN, "attention_factor": 1.3, "mscale": 2.0, "mscale_all_dim": 3.0}),
    "yarn, not truncated": ("llama-tiny", "rope_parameters", {**YARN, "beta_fast": 4.0, "truncate": False}),
    "yarn, mscale": ("mistral-tiny", "rope_scaling", {**YARN, "mscale": 0.707, "mscale_all_dim": 1.2}),
    "yarn, mscale alone": ("olmo2-tiny", "rope_parameters", {**YARN, "mscale": 0.5, "beta_fast": None}),
    "yarn, end before the first pair": ("llama-tiny", "rope_scaling", {**YARN, "original_max_position_embeddings": 2}),
    "yarn, ramp of no width": ("llama-tiny", "rope_scaling", {**YARN, "beta_fast": 1.5, "beta_slow": 1.5, "truncate": False}),
    "yarn, factor below one": ("smollm3-tiny", "rope_scaling", {**YARN, "factor": 0.5, "beta_fast": 2.0}),
}  # fmt: skip


def stock(config: dict[str, Any]) -> Any:
    """Build the model of a config.json with weights drawn by their names. Call it inside float32_is_float64."""
    hf = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config)))
    model = transformers.AutoModelForCausalLM.from_config(
        hf, dtype=torch.float64, attn_implementation="eager"
    )
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(torch.from_numpy(draw(key, tuple(p.shape))))
    return model


def made(name: str) -> dict[str, Any]:
    """Compute one row of the file."""
    preset, place, keys = SETTINGS[name]
    config = to_hf(replace(PRESETS[preset], rope_theta=100.0))
    rope = {place: {**keys, "rope_theta": config.pop("rope_theta")} if place == "rope_parameters" else keys}
    config |= rope
    rng = np.random.Generator(np.random.PCG64(list(name.encode())))
    ids = rng.integers(0, config["vocab_size"], (SHAPE[0], SHAPE[1] + 1))
    x, y = torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, 1:])
    with float32_is_float64():
        model = stock(config)
        logits = model(x, use_cache=False).logits
        loss = loss_of(logits, y)
        loss.backward()
    rotary = model.model.rotary_emb
    demand(rotary.inv_freq.dtype == torch.float64, f"{name}: frequencies in float64")
    out = logits.detach().numpy()
    grads = {f"grad.{key}": p.grad.numpy() for key, p in model.named_parameters()}
    return {
        "config": config,
        "ids": ids.tolist(),
        "frequencies": rotary.inv_freq.tolist(),
        "amplitude": float(rotary.attention_scaling),
        "loss": loss.item(),
        "logits": out[0, -1, :8].tolist(),
        "arrays": {key: projections(key, a) for key, a in {"logits": out, **grads}.items()},
    }


def main() -> int:
    """Write the file, or compare with it. Returns the exit code."""
    return write_or_check("Scaled rotary frequencies by stock Hugging Face models", PATH, "rows", all_rows)


def all_rows() -> dict[str, Any]:
    """Compute the row of each setting; each scaling moves the loss."""
    rows = {name: made(name) for name in SETTINGS}
    plain = losses_without(rows)
    demand(
        all(abs(rows[n]["loss"] - plain[n]) > 1e-3 for n in plain),
        f"the loss moves with each scaling: {plain}",
    )
    return rows


def losses_without(rows: dict[str, Any]) -> dict[str, float]:
    """Losses without the scaling, of the rows whose frequencies or amplitude it changes."""
    losses = {}
    for name, row in rows.items():
        config = {k: v for k, v in row["config"].items() if k not in ("rope_scaling", "rope_parameters")}
        ids = np.array(row["ids"])
        with float32_is_float64(), torch.no_grad():
            model = stock({**config, "rope_theta": 100.0})
            loss = loss_of(
                model(torch.from_numpy(ids[:, :-1]), use_cache=False).logits, torch.from_numpy(ids[:, 1:])
            )
        plain = model.model.rotary_emb.inv_freq.tolist()
        if name == "dynamic":
            demand(
                np.allclose(plain, row["frequencies"], rtol=1e-14),
                "dynamic is plain up to max_position_embeddings",
            )
        else:
            losses[name] = float(loss)
    return losses


if __name__ == "__main__":
    sys.exit(main())
