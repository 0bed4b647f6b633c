"""Write adapters as PEFT does: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..common.atomic import write_json, write_text
from ..model.lora import OUTSIDE, PREFIX, AdapterLayout, LoraConfig, cut, matches, module_of
from .checkpoint import TEMPLATE
from .hf import write_safetensors
from .other_readers import compare_adapter
from .peft import WEIGHTS
from .peft_config import CONFIG
from .tensors import EMBED, HEAD


def adapter_config(c: LoraConfig, base: str, is_tied: bool = False) -> dict[str, Any]:
    """Build adapter_config.json as PEFT writes it, without keys at their defaults that only matter in training.

    is_tied: the head is the embedding; what is trained of one is written of both, and PEFT keeps them one."""
    alpha = int(c.alpha) if c.alpha == int(c.alpha) else c.alpha
    modules, saved = c.modules, list(c.saved)
    outside = [name for name in OUTSIDE.values() if is_tied]
    if both := [*outside] if any(name in modules for name in outside) else []:
        modules = [name for name in modules if name not in outside] + both
    if any(name.endswith(end) for name in ("model.embed_tokens", "lm_head") for end in saved) and is_tied:
        saved = list(dict.fromkeys([*saved, *outside]))
    tying = {"ensure_weight_tying": True} if set(outside) & {*modules, *saved} else {}
    ranks, alphas = dict(c.rank_pattern), dict(c.alpha_pattern)
    if both:
        # By patterns the one matrix could have another rank or scale under the head's name.
        ranks = _as_embedding(ranks, c.rank)
        alphas = _as_embedding(alphas, c.alpha)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": c.rank,
        "lora_alpha": alpha,
        "lora_dropout": c.dropout,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": c.rslora,
        "use_dora": c.dora,
        "init_lora_weights": True,
        "modules_to_save": saved or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": ranks,
        "alpha_pattern": {p: int(a) if a == int(a) else a for p, a in alphas.items()},
    } | tying


def _as_embedding(patterns: dict[str, Any], otherwise: Any) -> dict[str, Any]:
    """Put a pattern for the head first, where those that are there name another number for it than for the embedding."""
    embed, head = (
        next((n for p, n in patterns.items() if matches(p, module_of(hf))), otherwise) for hf in (EMBED, HEAD)
    )
    own = {module_of(HEAD): embed} if embed != head else {}
    return own | {p: n for p, n in patterns.items() if p not in own}


def write_adapter(
    folder: Path, layout: AdapterLayout, flat: np.ndarray, base: str, template: str | None = None
) -> None:
    """Write adapters for PEFT.from_pretrained.  flat (layout.size,) on the host; base: name of the base model, for people;
    template: the chat template that the adapters were trained with

    Raises IOFailure, Refused: not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = adapter_tensors(layout, flat)
    write_safetensors(folder / WEIGHTS, tensors, "float32")
    if template is not None:
        write_text(folder / TEMPLATE, template)
    config = adapter_config(layout.config, base, layout.cfg.tie_word_embeddings)
    write_json(folder / CONFIG, config)
    try:
        compare_adapter(folder, layout.cfg.num_layers, tensors)
    except BaseException:
        # Without it nobody takes the folder for a whole one.
        (folder / CONFIG).unlink()
        raise


def adapter_tensors(layout: AdapterLayout, flat: np.ndarray) -> dict[str, np.ndarray]:
    """Lay the tensors of an adapter out as PEFT has them, by its names: of an embedding A and B transposed, and all that is
    trained of a head that is the embedding under the name of the head too."""
    tensors = {
        name: np.ascontiguousarray(x.T if ".lora_embedding_" in name else x)
        for name, x in layout.named(flat).items()
    }
    if layout.cfg.tie_word_embeddings:
        for p in layout.pairs:
            if p.base.layer is None:
                for letter, s in (("A", p.a), ("B", p.b)):
                    tensors[f"{PREFIX}lm_head.lora_{letter}.weight"] = cut(flat, s)
        if PREFIX + EMBED in tensors:
            tensors[PREFIX + HEAD] = tensors[PREFIX + EMBED]
    return tensors
