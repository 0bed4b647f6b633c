"""Read tensors and statements of any file for comparing.

More lenient than opening a checkpoint: a configuration that apr does not compute is a fact like others.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import AprError
from ..common.files import parse_json, read_text
from ..model.config import ModelConfig
from ..model.hf_config import from_hf
from .apr2 import read_apr
from .apr2_metadata import metadata_to_config
from .gguf_reader import read_gguf
from .hf import read_safetensors, read_weights


@dataclass(frozen=True)
class Contents:
    """Tensors of a file or folder, and its statements about itself.

    source   path
    kind     "APR v2", "Hugging Face", "safetensors" or "GGUF"
    tensors  by name as stored (GGUF: mapped back)
    cfg      of a model, if the file describes one completely
    facts    statements, flat, for comparing
    """

    source: str
    kind: str
    tensors: Mapping[str, np.ndarray]
    cfg: ModelConfig | None
    facts: dict[str, Any]


def gguf_contents(source: str, path: Path) -> Contents:
    """Read a GGUF file."""
    file = read_gguf(path)
    facts = {f"config.{k}": v for k, v in asdict(file.cfg).items()}
    facts["eos_token_id"] = file.keys.get("tokenizer.ggml.eos_token_id")
    return Contents(source, "GGUF", file.tensors, file.cfg, facts)


def apr_contents(source: str, path: Path) -> Contents:
    """Read an APR file."""
    apr = read_apr(path)
    cfg = _config(lambda: metadata_to_config(apr.metadata, source, apr.tensors))
    facts = {} if cfg else {f"config.{k}": v for k, v in _flat(apr.metadata.get("hf_config") or {})}
    facts |= {
        "tokenizer.json": _sha(apr.metadata.get("tokenizer.json")),
        "eos_token_id": apr.metadata.get("tokenizer.eos_token_id"),
    }
    return Contents(source, "APR v2", apr.tensors, cfg, _with(cfg, facts))


def folder_contents(source: str, path: Path) -> Contents:
    """Read a Hugging Face folder."""
    tensors = read_weights(path)
    facts: dict[str, Any] = {}
    cfg = None
    if os.path.lexists(path / "config.json"):
        config = parse_json(read_text(path / "config.json"), str(path / "config.json"))
        cfg = _config(lambda: from_hf(config, source))
        facts = {} if cfg else {f"config.{k}": v for k, v in _flat(config)}
        eos = config.get("eos_token_id")
        facts["eos_token_id"] = eos[0] if isinstance(eos, list) and eos else eos
    tokenizer = path / "tokenizer.json"
    facts["tokenizer.json"] = _sha(read_text(tokenizer) if os.path.lexists(tokenizer) else None)
    return Contents(source, "Hugging Face", tensors, cfg, _with(cfg, facts))


def safetensors_contents(source: str, path: Path) -> Contents:
    """Read a .safetensors file: a trace, a golden file, or weights without their config."""
    tensors = read_safetensors(path)
    facts: dict[str, Any] = {f"metadata.{k}": v for k, v in tensors.metadata.items()}
    cfg = None
    if "metadata.config" in facts:  # a trace, or a golden file
        text = facts.pop("metadata.config")
        cfg = _config(lambda: from_hf(parse_json(text, f"{source}: config"), source))
        facts |= {} if cfg else {"metadata.config": text}
    for key in ("metadata.versions", "metadata.model", "metadata.format"):  # who wrote it, and from where
        facts.pop(key, None)
    return Contents(source, "safetensors", tensors, cfg, _with(cfg, facts))


def _config(make: Any) -> ModelConfig | None:
    try:
        cfg: ModelConfig = make()
    except AprError:
        return None
    return cfg


def _with(cfg: ModelConfig | None, facts: dict[str, Any]) -> dict[str, Any]:
    return ({f"config.{k}": v for k, v in asdict(cfg).items()} if cfg else {}) | facts


def _flat(d: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in d.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _sha(text: Any) -> str | None:
    return hashlib.sha256(text.encode()).hexdigest() if isinstance(text, str) else None
