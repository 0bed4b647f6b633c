"""Make the files of tests/golden/others: what other tools' own code writes, small, of fixed seeds.

    python -m venv env
    env/bin/pip install torch transformers peft safetensors gguf
    env/bin/python tools/golden/others.py            # writes
    env/bin/python tools/golden/others.py --check    # makes all again; exit 1 where a tensor or a key differs

| path            | written by                                                                                            |
|-----------------|-------------------------------------------------------------------------------------------------------|
| qwen2/, llama/  | transformers, save_pretrained: float32 in one file; bfloat16 in shards with an index                  |
| qwen2.gguf      | GGUFWriter of the package gguf, with its own table of names and its own quantisation: Q8_0            |
| llama.gguf      | the same in float16; rows of q and k in the order of llama.cpp's convert_hf_to_gguf.py (`permute`)    |
| adapter/        | PEFT, save_pretrained: ranks and scales of their own, on llama/                                       |
| computed.json   | versions, ids, and logits of the last positions by transformers and PEFT in float32                   |
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import torch
import transformers

OUT = Path(__file__).resolve().parents[2] / "tests/golden/others"
SEEDS = {"qwen2": 21, "llama": 22, "adapter": 23, "ids": 24}
SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
POSITIONS, KEPT = 24, 3  # of the ids; logits of the last that are kept


def models() -> dict[str, Any]:
    """Models with random weights, biases and norms."""
    configs = {
        "qwen2": transformers.Qwen2Config(
            **SIZES, tie_word_embeddings=True, rope_theta=1e6, rms_norm_eps=1e-6
        ),
        "llama": transformers.LlamaConfig(
            **SIZES, tie_word_embeddings=False, rope_theta=5e5, rms_norm_eps=1e-5
        ),
    }
    out = {}
    for name, config in configs.items():
        torch.manual_seed(SEEDS[name])
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for key, p in model.named_parameters():
            std = 0.1 if p.dim() == 2 else 0.3
            p.data = std * torch.randn(p.shape) + (1.0 if "norm" in key else 0.0)
        out[name] = model.to(torch.bfloat16) if name == "llama" else model
    return out


def permute(w: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows as LlamaModel.permute of llama.cpp's converter."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(path: Path, model: Any, kind: Any) -> None:
    """Write a model as llama.cpp's converter lays it out."""
    c, arch = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(f"others-{arch}")
    writer.add_file_type({"F16": 1, "Q8_0": 7}[kind.name])
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_tokenizer_model("none")
    number = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(number, c.num_hidden_layers)
    for name, p in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        x = p.float().numpy()
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        if arch == "llama" and heads:
            x = permute(x, heads)
        to = gguf.GGMLQuantizationType.F32 if x.ndim == 1 else kind
        writer.add_tensor(
            table.get_name(name, try_suffixes=(".weight", ".bias")), gguf.quants.quantize(x, to), raw_dtype=to
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model: Any, ids: list[int]) -> list[list[float]]:
    """Compute in float32."""
    with torch.no_grad():
        out = model(torch.tensor([ids]), use_cache=False).logits[0, -KEPT:]
    return [[float(f"{x:.8g}") for x in row] for row in out.tolist()]


def make(folder: Path) -> None:
    """Write everything."""
    ids = (
        np.random.Generator(np.random.PCG64(SEEDS["ids"]))
        .integers(0, SIZES["vocab_size"], POSITIONS)
        .tolist()
    )
    computed: dict[str, Any] = {"seeds": SEEDS, "ids": ids, "logits": {}}
    computed["versions"] = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    for name, model in models().items():
        model.save_pretrained(folder / name, max_shard_size="40KB" if name == "llama" else "1GB")
        kinds = gguf.GGMLQuantizationType
        write_gguf(folder / f"{name}.gguf", model, kinds.F16 if name == "llama" else kinds.Q8_0)
        # Read anew: a model that was bfloat16 keeps rounded rotary frequencies.
        again = transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        computed["logits"][name] = logits(again, ids)
    torch.manual_seed(SEEDS["adapter"])
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)
    adapted = peft.get_peft_model(
        base,
        peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "o_proj", "down_proj"],
            rank_pattern={"k_proj": 2}, alpha_pattern={"layers.1.mlp.down_proj": 9},
        ),
    )  # fmt: skip
    for key, p in adapted.named_parameters():
        if "lora_B" in key:
            p.data = 0.05 * torch.randn(p.shape)
    adapted.save_pretrained(folder / "adapter")
    config = folder / "adapter/adapter_config.json"
    said = json.loads(config.read_text()) | {"base_model_name_or_path": "llama"}
    # PEFT writes a set.
    said["target_modules"].sort()
    config.write_text(json.dumps(said, indent=2) + "\n")
    (folder / "adapter/README.md").unlink(missing_ok=True)
    computed["logits"]["adapter"] = logits(adapted.eval(), ids)
    (folder / "computed.json").write_text(json.dumps(computed, indent=1) + "\n")


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with the stored files, write nothing")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        new = Path(place) / "others"
        new.mkdir()
        make(new)
        if not args.check:
            shutil.rmtree(OUT, ignore_errors=True)
            shutil.copytree(new, OUT)
            for path in OUT.rglob("*.*"):
                path.chmod(0o644)
            return 0
        names = sorted(p.relative_to(new) for p in new.rglob("*") if p.is_file())
        other = [
            str(n)
            for n in names
            if not (OUT / n).is_file() or (OUT / n).read_bytes() != (new / n).read_bytes()
        ]
    print(f"differ: {', '.join(other)}" if other else "the same bytes")
    return int(bool(other))


if __name__ == "__main__":
    sys.exit(main())
