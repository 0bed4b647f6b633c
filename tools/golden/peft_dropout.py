"""Golden file of adapters with dropout: what PEFT computes, in training, with the masks that apr draws.

    env/bin/python tools/golden/peft_dropout.py [--out tests/golden]

with the environment of tools/golden/peft_adapters.py. PEFT's masks come from torch's generator, which nothing else has: here
its dropout modules are replaced by ones that keep what the op `dropout` keeps, by seed, step, sequence and matrix. For each case
of CASES, recorded are in peft/dropout.safetensors, as in peft_published.py, CASE.config, CASE.tensor.NAME, CASE.grad.NAME,
CASE.losses and CASE.after.NAME.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import peft_published as published
import torch
from peft_adapters import ROOT, _versions, base_model, golden
from safetensors import safe_open
from safetensors.numpy import save_file

from apr.backends import philox
from apr.checkpoints.peft import read_adapter
from apr.model.hf_config import from_hf
from apr.model.lora import AdapterLayout

SEED = 0x123456789ABCDEF
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# (base, options of LoraConfig)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dropout": (
        "mistral",
        dict(r=3, lora_alpha=5, target_modules=[*LINEAR, "lm_head"], lora_dropout=0.25),
    ),
    "dropout-tied": (
        "llama",
        dict(
            r=2, lora_alpha=4, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True,
            lora_dropout=0.5, use_rslora=True,
        ),
    ),
}  # fmt: skip


class Mask(torch.nn.Module):
    """Dropout of one matrix. number: of the matrix among those with adapters; step: from 1, of the pass at hand"""

    step = 0

    def __init__(self, number: int, p: float) -> None:
        super().__init__()
        self.number, self.p = number, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keep and scale."""
        counters = np.array([(b, Mask.step) for b in range(len(x))], np.int32)
        kept = philox.kept(counters, x[0].numel(), SEED, self.number, self.p).reshape(x.shape)
        return x * torch.from_numpy(kept).to(x.dtype) / (1 - self.p)


def masked(model: Any, layout: AdapterLayout, p: float) -> None:
    """Put masks into the linear maps of a model; PEFT gives an embedding no dropout."""
    number = {pair.module: k for k, pair in enumerate(layout.pairs)}
    for name, module in model.named_modules():
        if "default" in getattr(module, "lora_A", {}):
            own = name.removeprefix("base_model.model.")
            module.lora_dropout["default"] = Mask(number.get(own, number.get("model.embed_tokens", -1)), p)

    def begin(*_: Any) -> None:
        Mask.step += 1

    Mask.step = 0
    model.register_forward_pre_hook(begin)


def adapter(out: dict[str, np.ndarray], meta: dict[str, str], case: str, seed: int) -> None:
    """One row of CASES."""
    base, options = CASES[case]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        torch.manual_seed(seed)
        config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(base_model(base, folder), config).double()
        trained = published.moved(model, bool(options.get("ensure_weight_tying")))
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        meta[f"{case}.config"] = (folder / "adapter/adapter_config.json").read_text()
        with safe_open(folder / "adapter/adapter_model.safetensors", "np") as f:
            out |= {f"{case}.tensor.{k}": f.get_tensor(k).astype(np.float32) for k in f.keys()}  # noqa: SIM118
        raw, _, ids, targets = golden(base)
        cfg = from_hf(raw, base)
        masked(
            model,
            AdapterLayout(cfg, read_adapter(str(folder / "adapter"), cfg).lora_config(cfg)),
            config.lora_dropout,
        )
        steps = 1 if "tied" in case else published.STEPS
        published.train(out, case, model, trained, ids, targets, steps, 1)


def main() -> None:
    """Write the file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / "tests/golden")
    a = p.parse_args()
    out: dict[str, np.ndarray] = {}
    meta = {"versions": json.dumps(_versions())}
    for seed, case in enumerate(CASES):
        adapter(out, meta, case, seed)
    file = a.out / "peft" / "dropout.safetensors"
    save_file({name: np.ascontiguousarray(x) for name, x in out.items()}, file, meta)
    file.chmod(0o644)


if __name__ == "__main__":
    main()
