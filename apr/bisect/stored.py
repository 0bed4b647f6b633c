"""Read a Hugging Face folder a second time, with as little code as possible.

Both sides of a bisection get their weights from one reader, so a fault of that reader would be on both."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.tensors import EMBED, HEAD, INV_FREQ
from ..common.files import opened, parse_json, read_text
from ..model.config import ModelConfig
from ..model.hf_config import SIZES
from ..model.params import Layout
from .comparisons import exact, holds, measured, unequal
from .report import EXACT, ArrayComparison

KEYS = {
    **SIZES,
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}


def rows(model: str, cfg: ModelConfig, host: np.ndarray) -> list[ArrayComparison]:
    """Compare the keys of config.json with the configuration, and every tensor of the .safetensors files with the host buffer
    (Layout order) that both sides get, bit for bit. No rows for a MODEL that is no such folder or file."""
    path = Path(model)
    folder = path if path.is_dir() else path.parent
    files = _files(folder) if path.is_dir() else [path]
    if not (folder / "config.json").is_file() or not files or files[0].suffix != ".safetensors":
        return []
    raw = parse_json(read_text(folder / "config.json"), str(folder / "config.json"))
    out = [
        exact("configuration", "config.json", key, getattr(cfg, field), raw[key])
        for key, field in KEYS.items()
        if raw.get(key) is not None
    ]
    theta = raw.get("rope_theta") or (raw.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        out.append(exact("configuration", "config.json", "rope_theta", cfg.rope_theta, theta))
    layout, found = Layout(cfg), set()
    for file in files:
        for name, read in _tensors(file):
            slot = layout.by_hf.get(name)
            if slot is None:
                known = name.endswith(INV_FREQ) or (name == HEAD and cfg.tie_word_embeddings)
                out.append(
                    holds("upload", "read_file", name, known, f"{file.name} has it, the model does not")
                )
                continue
            found.add(name)
            want = read()
            got = host[slot.offset : slot.offset + slot.size]
            if np.array_equal(got.view(np.uint8), want.astype(host.dtype).view(np.uint8)):
                out.append(
                    ArrayComparison("upload", "read_file", name, EXACT, 0.0, 0.0, slot.layer, slot.shape)
                )
            else:
                d = unequal(got, want)
                words = "what was read is not what the file holds"
                out.append(measured("upload", "read_file", name, d, 0.0, slot.layer, slot.shape, words))
    tied = {EMBED} if cfg.tie_word_embeddings else set()  # may be stored as the head
    for name in layout.by_hf.keys() - found - tied:
        out.append(holds("upload", "read_file", name, False, "no file holds it", layout.by_hf[name].layer))
    return out


def _files(folder: Path) -> list[Path]:
    """The files of a folder that hold its weights; others may lie beside them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = parse_json(read_text(index), str(index))["weight_map"]
        return [folder / name for name in sorted(set(weight_map.values()))]
    return [p for p in [folder / "model.safetensors"] if p.is_file()]


def _tensors(file: Path) -> Any:
    """(name, function that reads the values as float32 or float64, flat) of a safetensors file, which formats.hf has
    checked: 8 bytes of length, a JSON header, the data."""
    with opened(file) as (f, _):
        size = int.from_bytes(f.read(8), "little")
        header = parse_json(f.read(size), str(file))
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, partial(_values, file, 8 + size, entry["dtype"], *entry["data_offsets"])


def _values(file: Path, data_at: int, dtype: str, start: int, end: int) -> np.ndarray:
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[dtype]
    with opened(file) as (f, _):
        f.seek(data_at + start)
        flat = np.fromfile(f, kind, (end - start) // np.dtype(kind).itemsize)
    if dtype == "BF16":  # the upper half of a float32
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return flat if kind == "<f8" else flat.astype(np.float32)
