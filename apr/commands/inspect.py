"""`apr inspect MODEL`: what is in a checkpoint, and is it whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..flags import option, parse
from ..formats.models import load_model
from ..loading import tokenizer_of
from ..params import Layout
from ..training.show import Show


@dataclass(frozen=True)
class Flags:
    """Options of `apr inspect`."""

    model: str = option("an .apr file or a Hugging Face folder", positional=True)
    tensors: bool = option("list every tensor with its root mean square and largest magnitude", False)
    json: bool = option("print one JSON document and nothing else", False)


def main(args: Sequence[str]) -> int:
    """Returns the exit code; errors are raised."""
    f = parse(Flags, args, "apr inspect", __doc__ or "")
    loaded = load_model(f.model)
    layout = Layout(loaded.cfg)
    tokenizer = tokenizer_of(loaded)
    tensors: dict[str, dict[str, Any]] = {}
    for name, x in loaded.tensors.items():
        tensors[name] = {"dtype": str(x.dtype), "shape": list(x.shape)}
        if f.tensors:
            wide = x.astype(np.float64)
            tensors[name] |= {"rms": float(np.sqrt((wide**2).mean())), "max": float(np.abs(wide).max())}
    extra = {
        k: v
        for k, v in loaded.metadata.items()
        if isinstance(v, str | int | float | bool) and "tokenizer" not in k
    }
    result: dict[str, Any] = {
        "valid": True,
        "format": "APR v2" if loaded.kind == "apr" else "Hugging Face safetensors",
        "parameters": layout.num_parameters,
        "tensor_count": len(tensors),
        "dtypes": sorted({t["dtype"] for t in tensors.values()}),
        "config": asdict(loaded.cfg),
        "weights_sha256": loaded.sha256,
        "tokenizer": tokenizer
        and {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "sha256": tokenizer.sha256},
        "metadata": extra,
        "tensors": tensors,
    }
    if f.json:
        print(json.dumps(result, indent=2))
        return 0
    c = loaded.cfg
    rows = [
        ("format", f"{result['format']}, whole: every parameter there and of the right shape, nothing left over"),
        ("parameters", f"{layout.num_parameters:,} in {len(tensors)} tensors of {', '.join(result['dtypes'])}"),
        ("architecture", f"{c.family}: {c.num_layers} layers of {c.hidden_size}, heads {c.num_heads}/{c.num_kv_heads} of "
         f"{c.head_dim}, MLP {c.intermediate_size}, vocabulary {c.vocab_size:,}, {c.max_position_embeddings:,} positions"),
        ("switches", f"rms_norm_eps {c.rms_norm_eps:g}, rope_theta {c.rope_theta:g}, scaling {c.rope_scaling or 'none'}, "
         f"tied {c.tie_word_embeddings}, qkv_bias {c.qkv_bias}, qk_norm {c.qk_norm}, window {c.sliding_window or 'none'}"),
        ("tokenizer", f"{tokenizer.vocab_size:,} ids, end of text {tokenizer.eos_id}" if tokenizer else "none"),
        ("weights sha256", loaded.sha256),
    ]  # fmt: skip
    show = Show()
    show.table(f.model, rows)
    if f.tensors:
        table = [
            (n, f"{t['dtype']} {t['shape']}  rms {t['rms']:.4g}  max {t['max']:.4g}")
            for n, t in tensors.items()
        ]
        show.table("tensors", table)
    return 0
