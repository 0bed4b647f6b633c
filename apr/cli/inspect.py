"""`apr inspect MODEL`: show what a checkpoint holds, after checking that it is whole.

MODEL is an .apr file, a GGUF file, a Hugging Face folder, a .safetensors file with config.json beside it; of a
.safetensors file without config.json (a trace, say) the tensors are shown.

Example: apr inspect model.apr --tensors"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.checkpoint import HF_FILES, Checkpoint
from ..checkpoints.importing import PROVENANCE
from ..checkpoints.registry import TITLES, is_bare, open_any, open_contents
from ..checkpoints.tensors import stored_as
from ..checkpoints.validate import figures_of
from ..common.options import json_option, option, parse
from ..common.units import plural
from ..model.config import ModelConfig
from ..model.params import Layout
from .show import Show

UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes"))


@dataclass(frozen=True)
class Flags:
    """Options of `apr inspect`."""

    model: str = option(
        "an .apr file, a Hugging Face folder, a .safetensors or a GGUF file", positional=True, path=True
    )
    tensors: bool = option("list every tensor with its root mean square and largest magnitude", False)
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code. Errors are raised."""
    f = parse(Flags, args, "apr inspect", __doc__ or "")
    result, rows = _loose(f) if is_bare(Path(f.model)) else _model(f)
    if f.json:
        print(json.dumps(result, indent=2))
        return 0
    show = Show()
    show.table(f.model, rows)
    if f.tensors:
        table = [
            (n, f"{t['dtype']} {t['shape']}  rms {t['rms']:.4g}  max {t['max']:.4g}")
            for n, t in result["tensors"].items()
        ]
        show.table("tensors", table)
    return 0


def _tensors(tensors: Mapping[str, np.ndarray], figures: bool) -> dict[str, dict[str, Any]]:
    """List dtype and shape of each tensor; with figures also its root mean square and largest magnitude."""
    out: dict[str, dict[str, Any]] = {}
    for name in tensors:
        x = tensors[name]
        out[name] = {"dtype": stored_as(tensors, name, x.dtype), "shape": list(x.shape), "bytes": x.nbytes}
        if figures:
            v = figures_of(x)
            out[name] |= {"rms": v.rms, "max": max(abs(v.low), abs(v.high)), "not_finite": v.not_finite}
    return out


def _model(f: Flags) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    loaded = open_any(f.model)
    layout = Layout(loaded.cfg)
    tensors = _tensors(loaded.tensors, f.tensors)
    size = sum(t["bytes"] for t in tensors.values())
    known = {
        k: v
        for k, v in loaded.metadata.items()
        if isinstance(v, str | int | float | bool) and "tokenizer" not in k and k != "chat_template"
    }
    result: dict[str, Any] = {
        "valid": True,
        "format": TITLES[loaded.kind],
        "parameters": layout.num_parameters,
        "tensor_count": len(tensors),
        "tensor_bytes": size,
        "dtypes": sorted({t["dtype"] for t in tensors.values()}),
        "config": asdict(loaded.cfg),
        "notes": loaded.notes,
        "weights_sha256": loaded.sha256,
        "tokenizer": _tokenizer(loaded),
        "chat_template": loaded.chat_template,
        "files": sorted(loaded.texts),
        "provenance": loaded.metadata.get(PROVENANCE),
        "metadata": known,
        "tensors": tensors,
        **({"facts": {"eos_token_id": loaded.eos}} if loaded.kind == "gguf" else {}),
    }
    t = result["tokenizer"]
    rows = [
        ("format", f"{result['format']}, whole: every parameter there and of the right shape, nothing left over"),
        ("parameters", f"{layout.num_parameters:,} in {plural(len(tensors), 'tensor')} of "
        f"{', '.join(result['dtypes'])}, {_bytes(size)}"),
        *_config_rows(loaded.cfg),
        *(("note", f"config.json: {note}") for note in loaded.notes),
        ("tokenizer", f"{plural(t['vocab_size'], 'id')}, end of text {t['eos_token']!r} ({t['eos_id']})" if t else "none"),
    ]  # fmt: skip
    if t and t["added_tokens"]:
        rows.append(("added tokens", _few([f"{i} {c!r}" for i, c in t["added_tokens"].items()])))
    template = loaded.chat_template
    rows.append(
        ("chat template", f"{plural(len(template), 'character')}" if template is not None else "none")
    )
    if loaded.metadata.get(HF_FILES):
        rows.append(("kept files", ", ".join(sorted(loaded.texts))))
    if p := result["provenance"]:
        at = f" at {p['revision']}" if p.get("revision") else ""
        rows.append(
            ("from", f"{p.get('source')}{at}, {plural(len(p.get('files') or []), 'file')}, by {p.get('by')}")
        )
    rows.append(("weights sha256", loaded.sha256))
    return result, rows


def _tokenizer(loaded: Checkpoint) -> dict[str, Any] | None:
    tok = loaded.tokenizer
    if tok is None:
        return None
    added = json.loads(tok.json).get("added_tokens") or []
    return {
        "vocab_size": tok.vocab_size,
        "format": tok.format,
        "normalization": tok.normalization,
        "merges": tok.merges,
        "eos_token": tok.eos_token,
        "eos_id": tok.eos_id,
        "bos_id": loaded.metadata.get("tokenizer.bos_token_id", loaded.metadata.get("bos_token_id")),
        "added_tokens": {t["id"]: t["content"] for t in added},
        "sha256": tok.sha256,
    }


def _loose(f: Flags) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Describe a file that is no model: its tensors and its metadata."""
    side = open_contents(f.model)
    tensors = _tensors(side.tensors, f.tensors)
    size = sum(t["bytes"] for t in tensors.values())
    result: dict[str, Any] = {
        "valid": True,
        "format": side.kind,
        "tensor_count": len(tensors),
        "tensor_bytes": size,
        "dtypes": sorted({t["dtype"] for t in tensors.values()}),
        "config": side.cfg and asdict(side.cfg),
        "facts": {k: v for k, v in side.facts.items() if not k.startswith("config.")},
        "tensors": tensors,
    }
    rows = [
        ("format", side.kind),
        ("tensors", f"{len(tensors)} of {', '.join(result['dtypes'])}, {_bytes(size)}"),
        *(_config_rows(side.cfg) if side.cfg else []),
        *((k.removeprefix("metadata."), str(v)) for k, v in result["facts"].items()),
    ]
    return result, rows


def _config_rows(c: ModelConfig) -> list[tuple[str, str]]:
    window = f"{c.sliding_window or 'none'}" + _but_not(c.full_attention_layers)
    return [
        ("architecture", f"{c.family}: {plural(c.num_layers, 'layer')} of {c.hidden_size}, heads "
        f"{c.num_heads}/{c.num_kv_heads} of "
         f"{c.head_dim}, MLP {c.intermediate_size}, vocabulary {c.vocab_size:,}, "
         f"{plural(c.max_position_embeddings, 'position')}"),
        ("switches", f"rms_norm_eps {c.rms_norm_eps:g}, rope_theta {c.rope_theta:g}, scaling {c.rope_scaling or 'none'}, "
         f"tied {c.tie_word_embeddings}, qkv_bias {c.qkv_bias}, qk_norm {c.qk_norm}, window {window}"
         + (f", rotary embedding{_but_not(c.no_rope_layers)}" if c.no_rope_layers else "")),
    ]  # fmt: skip


def _but_not(layers: tuple[int, ...]) -> str:
    """Name the layers that do without: " but not on layers 1, 3"."""
    return f" but not on layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}" if layers else ""


def _bytes(n: int) -> str:
    size, unit = next((u for u in UNITS if n >= u[0]), UNITS[-1])
    return f"{n / size:.1f} {unit}" if size > 1 else f"{n} {unit}"


def _few(texts: list[str]) -> str:
    return ", ".join(texts[:6]) + (f", ... {len(texts)} in all" if len(texts) > 6 else "")
