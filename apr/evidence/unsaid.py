"""State what a setting is where nobody says so, as the documentation has it: apart from the defaults that are declared.

A default that changes in a merge, or a rule that follows from another setting, trains all runs of those who do not name it by
other numbers, and nothing else would tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# docs/commands/pretrain.md, "default"
DEFAULTS: dict[str, Any] = {
    "content_field": "text", "bos": "auto", "val_fraction": 0.05, "seq_length": 1024, "batch_size": 16, "shuffle": True,
    "mask_documents": False, "on_exhausted": "cycle", "seed": 42, "recompute": False, "initializer_range": 0.02, "z_loss": 0.0,
    "train_embeddings": False, "lora_rslora": False, "lora_dora": False, "num_steps": 1000, "schedule": "cosine",
    "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "grad_clip": 1.0, "lora_plus": 1.0, "preference_loss": "dpo",
    "label_smoothing": 0.0, "eval_every": 100, "patience": 5, "min_epochs": 3, "checkpoint_every": 0,
}  # fmt: skip
# Peak learning rates and longest warm-ups: from scratch, of a tuning, of a tuning of adapters; on preferences a fiftieth.
RATES, WARM_UPS, OF_PREFERENCES = (3e-4, 5e-5, 2e-4), (1000, 100), 1 / 50


def defaults(s: Mapping[str, Any], explicit: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, as the run has it, as the documentation says) of settings that nobody named. s: of config.json"""
    said = {name for name, x in explicit.items() if x is not None}
    # The length of a run may follow from its data.
    by_data = {"num_steps"} if s.get("epochs") or "tokens" in (s.get("mix") or "") else set()
    for name, want in DEFAULTS.items():
        if name in s and name not in said | by_data:
            yield name, s[name], want
    is_tuned = s["mode"] == "finetune"
    if "mode" not in said:
        yield "mode", s["mode"], "finetune" if s["init"] else "from-scratch"
    if "lr" not in said:
        adapters = s["lora_rank"] is not None or s.get("lora_init") is not None
        rate = RATES[2] if adapters else RATES[int(is_tuned)]
        rate *= OF_PREFERENCES if s.get("preferences") else 1
        yield "lr", _rounded(s["lr"]), _rounded(rate)
    if "lr_min" not in said:
        yield "lr_min", _rounded(s["lr_min"]), _rounded(s["lr"] / 100)
    if "warmup_steps" not in said:
        yield "warmup_steps", s["warmup_steps"], min(WARM_UPS[int(is_tuned)], s["num_steps"] // 10)


def _rounded(x: float) -> float:
    return float(f"{x:.9g}")
