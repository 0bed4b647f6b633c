"""Golden files of fine-tuning: what PEFT, transformers and TRL make of adapters and of chat templates.

    python -m venv env
    env/bin/pip install torch transformers peft trl safetensors ml_dtypes numba scipy-openblas64 zstandard rich jinja2
    env/bin/python tools/golden/peft_adapters.py --data PATH [--out tests/golden]

Adapters, peft.safetensors. The base models are those of the golden files that tools/golden/models.py makes. For each case
of CASES PEFT adapts the model, lora_B is drawn at random, and the folder that PEFT saves is recorded, as are the logits that the
adapted model computes in float64:

    CASE.config                    adapter_config.json as PEFT wrote it (metadata)
    CASE.tensor.NAME    float32    what stands in adapter_model.safetensors
    CASE.logits         float64    (1,T,V) of the first sequence of that golden file

For the case "train" also, starting with the same adapter, float64:

    train.loss          float64    (1,) mean over the targets that are not ignored
    train.grad.NAME     float64    of the loss, by autograd through PEFT's modules
    train.losses        float64    (S,) before each of S steps of torch.optim.AdamW after clip_grad_norm_
    train.after.NAME    float64    A and B after the last step

"ours" is the other way round: an adapter folder that apr writes is opened by PeftModel.from_pretrained, and `ours.logits` are
what it computes; `ours.sha256` (metadata) is that of the two files.

Conversations, instruct.json. Ids and labels of CONVERSATIONS by transformers' apply_chat_template with
return_assistant_tokens_mask, which needs {% generation %} blocks: MARKED says what is put into the templates, which come from
--data (real ones) or from here (a small one, with its tokenizer). For the real ones also by TRL's own training templates.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.resources
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

from finetune_cases import CONVERSATIONS, MARKED, OWN_TEMPLATE, llama_tokenizer, own_tokenizer

STEPS, LR, DECAY, CLIP = 5, 1e-2, 0.1, 1.0
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", dict(r=4, lora_alpha=8, target_modules=LINEAR)),
    "two": ("qwen2", dict(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"])),
    "rslora": ("qwen3", dict(r=4, lora_alpha=8, target_modules=["o_proj", "down_proj"], use_rslora=True)),
    "patterns": (
        "llama",
        dict(
            r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "gate_proj"],
            rank_pattern={"q_proj": 2, "layers.1.mlp.gate_proj": 6},
            alpha_pattern={"k_proj": 1, r"layers\.0\..*gate_proj": 12},
        ),
    ),
    "some-layers": ("mistral", dict(r=3, lora_alpha=6, target_modules=["up_proj"], layers_to_transform=[1])),
    "head": ("qwen2-untied", dict(r=2, lora_alpha=4, target_modules=["lm_head", "q_proj"])),
    "train": ("qwen2", dict(r=3, lora_alpha=6, target_modules=LINEAR)),
}  # fmt: skip


def golden(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], np.ndarray, np.ndarray]:
    """(config, weights, ids, targets) of a file of tools/golden/models.py."""
    with safe_open(ROOT / "tests/golden" / f"{name}.safetensors", "pt") as f:
        weights = {k[7:]: f.get_tensor(k) for k in f.keys() if k.startswith("weight.")}  # noqa: SIM118
        ids, targets = (f.get_tensor(k).numpy() for k in ("ids", "targets"))
        return json.loads(f.metadata()["config"]), weights, ids, targets


def base_model(name: str, folder: Path) -> Any:
    """The stock model, in float64, and its Hugging Face folder."""
    config, weights, _, _ = golden(name)
    (folder / "config.json").write_text(json.dumps(config))
    kind = transformers.AutoConfig.from_pretrained(folder)
    with float32_is_float64():
        model = transformers.AutoModelForCausalLM.from_config(
            kind, dtype=torch.float64, attn_implementation="eager"
        )
    missing, unexpected = model.load_state_dict({k: v.double() for k, v in weights.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def logits_of(model: Any, ids: np.ndarray) -> torch.Tensor:
    """(B,T,V) float64."""
    with float32_is_float64():
        return model(torch.from_numpy(ids).long(), use_cache=False).logits


@contextmanager
def float32_is_float64() -> Iterator[None]:
    """Inside, torch.float32 names float64: norms and rotary embeddings of transformers cast to it by name."""
    saved = torch.float32, torch.float
    torch.float32 = torch.float = torch.float64
    try:
        yield
    finally:
        torch.float32, torch.float = saved


def adapter(out: dict[str, np.ndarray], meta: dict[str, str], case: str, seed: int) -> None:
    """One row of CASES."""
    base, options = CASES[case]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        torch.manual_seed(seed)
        model = peft.get_peft_model(
            base_model(base, folder), peft.LoraConfig(task_type="CAUSAL_LM", **options)
        ).double()
        for name, p in model.named_parameters():
            if "lora_" in name:  # float32 values, so that the folder holds exactly what computes
                start = 0.05 * torch.randn(p.shape) if "lora_B" in name else p.data.float()
                p.data = start.double()
        # Without the head itself, which PEFT saves beside its adapter unless told not to.
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        meta[f"{case}.config"] = (folder / "adapter/adapter_config.json").read_text()
        with safe_open(folder / "adapter/adapter_model.safetensors", "np") as f:
            out |= {f"{case}.tensor.{k}": f.get_tensor(k).astype(np.float32) for k in f.keys()}  # noqa: SIM118
        _, _, ids, targets = golden(base)
        with torch.no_grad():
            out[f"{case}.logits"] = logits_of(model, ids[:1]).numpy()
        if case == "train":
            train(out, model, ids, targets)


def train(out: dict[str, np.ndarray], model: Any, ids: np.ndarray, targets: np.ndarray) -> None:
    """Gradients and STEPS steps by torch."""
    trained = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    opt = torch.optim.AdamW(trained.values(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY)
    losses, gradients = taken(model, opt, trained, ids, targets, STEPS)
    out |= {f"train.grad.{n}": g for n, g in gradients.items()}
    out["train.loss"], out["train.losses"] = np.array(losses[:1]), np.array(losses)
    out |= {f"train.after.{n}": p.detach().numpy() for n, p in trained.items()}


def taken(
    model: Any, opt: Any, trained: dict[str, Any], ids: np.ndarray, targets: np.ndarray, steps: int
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Take steps of an optimizer on the mean loss, clipped; returns the losses before them and the first gradients."""
    losses: list[float] = []
    gradients: dict[str, np.ndarray] = {}
    for step in range(steps):
        flat = logits_of(model, ids).reshape(-1, model.config.vocab_size)
        loss = torch.nn.functional.cross_entropy(
            flat, torch.from_numpy(targets).long().reshape(-1), ignore_index=-100
        )
        opt.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradients = {n: p.grad.numpy().copy() for n, p in trained.items()}
        torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
        opt.step()
    return losses, gradients


def ours(out: dict[str, np.ndarray], meta: dict[str, str]) -> None:
    """An adapter that apr writes, opened by PEFT."""
    from finetune_cases import our_adapter

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        our_adapter(folder / "adapter", json.dumps(golden("qwen2")[0]))
        files = [folder / "adapter" / n for n in ("adapter_config.json", "adapter_model.safetensors")]
        meta["ours.sha256"] = " ".join(hashlib.sha256(p.read_bytes()).hexdigest() for p in files)
        model = (
            peft.PeftModel.from_pretrained(base_model("qwen2", folder), folder / "adapter").double().eval()
        )
        with torch.no_grad():
            out["ours.logits"] = logits_of(model, golden("qwen2")[2][:1]).numpy()


def conversations(data: Path) -> dict[str, Any]:
    """instruct.json."""
    import trl

    templates = data / "chat-templates"
    qwen = (data / "qwen2-tokenizer/tokenizer.json").read_text(encoding="utf-8")
    files = {"qwen2.5": "Qwen-Qwen2.5-7B-Instruct.jinja", "llama3": "meta-llama-Llama-3.1-8B-Instruct.jinja"}
    rows: dict[str, Any] = {"own": _masked(own_tokenizer(), OWN_TEMPLATE, "own", "<|bos|>")}
    theirs = importlib.resources.files(trl) / "chat_templates"
    for name, file in files.items():
        tokenizer = qwen if name == "qwen2.5" else llama_tokenizer(qwen)
        bos = None if name == "qwen2.5" else "<|begin_of_text|>"
        rows[name] = _masked(tokenizer, (templates / file).read_text(encoding="utf-8"), name, bos)
        training = (theirs / f"{name.replace('.', '_')}_training.jinja").read_text()
        rows[f"{name}-trl"] = _masked(tokenizer, training, None, bos)
    return {"versions": _versions(trl=trl.__version__), "cases": rows}


def _masked(tokenizer: str, template: str, name: str | None, bos: str | None) -> list[dict[str, list[int]]]:
    """ids and labels of every conversation."""
    for old, new in MARKED.get(name or "", ()):
        assert template.count(old) == 1, (name, old)
        template = template.replace(old, new)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "tokenizer.json"
        path.write_text(tokenizer, encoding="utf-8")
        fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token=bos)
    out = []
    for messages in CONVERSATIONS:
        got = fast.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        mask = got["assistant_masks"]
        ids = list(got["input_ids"])
        out.append({"ids": ids, "labels": [i if m else -100 for i, m in zip(ids, mask, strict=True)]})
    return out


def _versions(**more: str) -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        **more,
    }


def main() -> None:
    """Write both files."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="folder with chat-templates and qwen2-tokenizer")
    p.add_argument("--out", type=Path, default=ROOT / "tests/golden")
    a = p.parse_args()
    out: dict[str, np.ndarray] = {}
    meta = {"versions": json.dumps(_versions())}
    for seed, case in enumerate(CASES):
        adapter(out, meta, case, seed)
    ours(out, meta)
    save_file(out, a.out / "peft" / "peft.safetensors", meta)
    (a.out / "peft" / "peft.safetensors").chmod(0o644)
    (a.out / "instruct.json").write_text(json.dumps(conversations(a.data), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
