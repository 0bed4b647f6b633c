"""Golden file of adapters as people publish them: what PEFT computes with embeddings, whole modules, DoRA and LoRA+.

    env/bin/python tools/golden/peft_published.py [--out tests/golden]

with the environment of tools/golden/peft_adapters.py, whose base models these are too. For each case of CASES PEFT adapts the
model, what it trains is moved at random, and recorded are

    CASE.config                    adapter_config.json as PEFT wrote it (metadata)
    CASE.tensor.NAME    float32    what stands in adapter_model.safetensors
    CASE.logits         float32    (1,TOKENS,V) of the first sequence of that golden file, computed in float64

and of those that are trained, starting there, float64 arithmetic:

    CASE.grad.NAME      float32    of the mean loss, by autograd through PEFT's modules
    CASE.losses         float64    (S,) before each of S steps of AdamW (no decay of vectors) after clip_grad_norm_
    CASE.after.NAME     float32    what is trained, after the last step

NAME is that of the tensor in the file. Of a head that is the embedding, which PEFT trains as two views of one storage, the
gradients of LoRA are those of both, and steps are not recorded: PEFT's optimizer moves the storage twice.

OURS is the other way round: adapters that apr writes, opened by PeftModel.from_pretrained: `ours-CASE.logits`, and
`ours-CASE.sha256` (metadata), that of the two files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from peft_adapters import DECAY, LR, ROOT, _versions, base_model, golden, logits_of, taken
from safetensors import safe_open
from safetensors.numpy import save_file

STEPS, TOKENS = 3, 12
# (base, options of LoraConfig, trained, ratio of LoRA+)
CASES: dict[str, tuple[str, dict[str, Any], bool, float]] = {
    "embed": ("mistral", dict(r=3, lora_alpha=6, target_modules=["q_proj", "embed_tokens", "lm_head"]), True, 1),
    "whole": (
        "mistral",
        dict(r=2, lora_alpha=4, target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"]),
        True, 1,
    ),
    "embed-tied": (
        "llama", dict(r=3, lora_alpha=6, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True), True, 1,
    ),
    "whole-tied": (
        "llama",
        dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        True, 1,
    ),
    "embed-apart": ("qwen3", dict(r=2, lora_alpha=4, target_modules=["embed_tokens"]), False, 1),
    "whole-apart": ("qwen3", dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["lm_head"]), False, 1),
    "plus": ("mistral", dict(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj", "lm_head"]), True, 8),
    "dora": ("mistral", dict(r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "down_proj"], use_dora=True), True, 1),
    "dora-embed": ("mistral", dict(r=2, lora_alpha=4, target_modules=["embed_tokens", "lm_head"], use_dora=True), False, 1),
}  # fmt: skip
OURS = {"embed": "mistral", "embed-tied": "llama", "whole": "mistral", "whole-tied": "llama"}


def in_file(name: str) -> str:
    """Name of a parameter in adapter_model.safetensors."""
    name = name.replace(".modules_to_save.default", "").replace(".default", "")
    return name.removesuffix(".weight") if "magnitude" in name else name


def moved(model: Any, is_tied: bool) -> dict[str, torch.nn.Parameter]:
    """Move what is trained at random, to float32 values in float64; returns it by its names in the file."""
    trained = {in_file(n): p for n, p in model.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        start = p.data.float()
        if "lora_B" in name or "lora_embedding_A" in name:
            start = 0.1 * torch.randn(p.shape)
        elif ".lora_A" not in name and "embedding_B" not in name:
            start = start * (1 + 0.1 * torch.randn(p.shape))
        p.data = start.double()
    if is_tied and (a := trained.get("base_model.model.lm_head.lora_A.weight")) is not None:
        a.data = trained["base_model.model.model.embed_tokens.lora_embedding_B"].data.T.contiguous()
        b = trained["base_model.model.lm_head.lora_B.weight"]
        b.data = trained["base_model.model.model.embed_tokens.lora_embedding_A"].data.T.contiguous()
    return trained


def adapter(out: dict[str, np.ndarray], meta: dict[str, str], case: str, seed: int) -> None:
    """One row of CASES."""
    base, options, is_trained, ratio = CASES[case]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        torch.manual_seed(seed)
        config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(base_model(base, folder), config).double()
        trained = moved(model, bool(options.get("ensure_weight_tying")))
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        meta[f"{case}.config"] = (folder / "adapter/adapter_config.json").read_text()
        with safe_open(folder / "adapter/adapter_model.safetensors", "np") as f:
            out |= {f"{case}.tensor.{k}": f.get_tensor(k).astype(np.float32) for k in f.keys()}  # noqa: SIM118
        _, _, ids, targets = golden(base)
        with torch.no_grad():
            out[f"{case}.logits"] = logits_of(model, ids[:1])[:, :TOKENS].numpy().astype(np.float32)
        if is_trained:
            steps = 1 if case == "embed-tied" else STEPS
            train(out, case, model, trained, ids, targets, steps, ratio)


def train(
    out: dict[str, np.ndarray], case: str, model: Any, trained: dict[str, Any], ids: np.ndarray, targets: np.ndarray,
    steps: int, ratio: float,
) -> None:  # fmt: skip
    """Gradients and steps by torch."""
    options = dict(betas=(0.9, 0.95), eps=1e-8)
    if ratio != 1:
        opt = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=ratio, loraplus_weight_decay=DECAY, **options
        )
    else:
        groups = [
            {
                "params": [p for p in trained.values() if (p.ndim > 1) == matrices],
                "weight_decay": DECAY * matrices,
            }
            for matrices in (True, False)
        ]
        opt = torch.optim.AdamW(groups, lr=LR, **options)
    losses, gradients = taken(model, opt, trained, ids, targets, steps)
    out |= {f"{case}.grad.{n}": g.astype(np.float32) for n, g in gradients.items()}
    out[f"{case}.losses"] = np.array(losses)
    if steps > 1:
        out |= {f"{case}.after.{n}": p.detach().numpy().astype(np.float32) for n, p in trained.items()}


def ours(out: dict[str, np.ndarray], meta: dict[str, str], case: str) -> None:
    """An adapter that apr writes, opened by PEFT."""
    from finetune_cases import published_adapter

    base = OURS[case]
    config, weights, ids, _ = golden(base)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        published_adapter(
            folder / "adapter", json.dumps(config), case, {k: v.numpy() for k, v in weights.items()}
        )
        files = [folder / "adapter" / n for n in ("adapter_config.json", "adapter_model.safetensors")]
        meta[f"ours-{case}.sha256"] = " ".join(hashlib.sha256(p.read_bytes()).hexdigest() for p in files)
        model = peft.PeftModel.from_pretrained(base_model(base, folder), folder / "adapter").double().eval()
        with torch.no_grad():
            out[f"ours-{case}.logits"] = logits_of(model, ids[:1])[:, :TOKENS].numpy().astype(np.float32)


def main() -> None:
    """Write the file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / "tests/golden")
    a = p.parse_args()
    out: dict[str, np.ndarray] = {}
    meta = {"versions": json.dumps(_versions())}
    for seed, case in enumerate(CASES):
        adapter(out, meta, case, seed)
    for case in OURS:
        ours(out, meta, case)
    file = a.out / "peft" / "published.safetensors"
    save_file({name: np.ascontiguousarray(x) for name, x in out.items()}, file, meta)
    file.chmod(0o644)


if __name__ == "__main__":
    main()
