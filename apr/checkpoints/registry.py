"""What a user names as MODEL, whatever its format, and how its tensors become a flat buffer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..common.errors import InputNotFound, Refused
from ..model.config import PRESETS, ModelConfig
from ..model.params import Layout
from .apr2 import extract_tokenizer, metadata_to_config, read_apr
from .hf import read_hf
from .tensors import CHUNK, is_float, mismatch, require_finite

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INV_FREQ = ".rotary_emb.inv_freq"  # old Llama files store this table, which the config determines


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint: what it computes, its tensors (mapped, by name as stored) and its tokenizer."""

    cfg: ModelConfig
    tensors: Mapping[str, np.ndarray]
    tokenizer_json: str | None  # the text of tokenizer.json
    metadata: dict[str, Any]  # of the .apr file, or the config.json as it stands
    source: str
    kind: Literal["apr", "hf"]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all parameters as float32 in table order: equal weights, whatever the format."""
        digest = hashlib.sha256()
        for tensor in parameters(Layout(self.cfg), self).values():
            flat = tensor.reshape(-1)
            for start in range(0, flat.size, CHUNK):
                digest.update(flat[start : start + CHUNK].astype("<f4").view(np.uint8).data)
        return digest.hexdigest()


def load_model(source: str) -> LoadedModel:
    """Open an .apr file, a Hugging Face folder, or a .safetensors file with config.json beside it.

    Files, config, names and shapes are checked, so that memory may be allocated for the sizes that
    the config names; the weights stay on disk. Raises InputNotFound listing what was looked for,
    MalformedFile, Refused.
    """
    path = Path(source)
    if not os.path.exists(path):
        hint = f"; {source!r} is a preset: a preset has sizes but no weights" if source in PRESETS else ""
        raise InputNotFound(
            f"{source}: not found. Looked for an .apr file, a folder with config.json and model.safetensors "
            f"(or model.safetensors.index.json), and a .safetensors file with config.json beside it{hint}"
        )
    if os.path.isdir(path) or path.suffix == ".safetensors":
        hf = read_hf(path)
        loaded = LoadedModel(hf.cfg, hf.tensors, hf.tokenizer_json, hf.config, source, "hf")
    else:
        apr = read_apr(path)
        cfg = metadata_to_config(apr.metadata, source, apr.tensors)
        loaded = LoadedModel(
            cfg, apr.tensors, extract_tokenizer(apr.metadata, source), apr.metadata, source, "apr"
        )
    layers = loaded.cfg.num_layers
    if layers > len(loaded.tensors):  # before a table of a billion layers is made
        raise Refused(f"{source}: {layers} layers in the config, but only {len(loaded.tensors)} tensors")
    parameters(Layout(loaded.cfg), loaded)
    return loaded


def parameters(layout: Layout, loaded: LoadedModel) -> dict[str, np.ndarray]:
    """Every parameter of a layout by its Hugging Face name, mapped, after comparing both ways.

    Every parameter is there, every stored tensor is one, shapes are equal. With tied embeddings a
    checkpoint may store the matrix under the head's name, or twice if the copies are bit-equal.
    Raises Refused naming what is missing, unexpected or of the wrong shape.
    """
    tensors = {name: loaded.tensors[name] for name in loaded.tensors if not name.endswith(INV_FREQ)}
    tied = layout.cfg.tie_word_embeddings
    if tied and HEAD in tensors:
        head = tensors.pop(HEAD)
        if not _same_bits(tensors.setdefault(EMBED, head), head):
            raise Refused(
                f"{loaded.source}: tie_word_embeddings is true, but {HEAD} differs from {EMBED}; if the head "
                "was trained apart, set tie_word_embeddings to false in its config"
            )
    problem = mismatch(layout, {name: t.shape for name, t in tensors.items()})
    whole = [f"{name} ({t.dtype})" for name, t in tensors.items() if not is_float(t.dtype)]
    if whole and not problem:
        problem = f"{len(whole)} not floating point: {', '.join(whole[:5])}"
    if problem:
        headless = not tied and HEAD not in tensors
        hint = f" (without {HEAD} the config must say tie_word_embeddings: true)" if headless else ""
        raise Refused(f"{loaded.source}: its tensors do not fit its config: {problem}{hint}")
    return {s.hf: tensors[s.hf] for s in layout.in_order()}


def fill(layout: Layout, flat: np.ndarray, loaded: LoadedModel) -> None:
    """Copy every tensor of a checkpoint to its place in a host buffer; the padding becomes 0.

    flat (layout.size,) float32 or float64. bfloat16, float16 and float32 keep their values; float64
    is rounded to the buffer's dtype, to nearest even. Raises Refused as `parameters` does, and
    naming the tensor for NaN and infinity; the buffer is then undefined.
    """
    if flat.shape != (layout.size,) or flat.dtype not in (np.float32, np.float64):
        raise Refused(
            f"buffer of {flat.dtype} {flat.shape}; weights need float32 or float64 ({layout.size},)"
        )
    tensors = parameters(layout, loaded)
    flat[...] = 0
    for slot in layout.slots:
        stored = tensors[slot.hf].reshape(-1)
        for start in range(0, slot.size, CHUNK):
            part = stored[start : start + CHUNK]
            place = flat[slot.offset + start : slot.offset + start + part.size]
            with np.errstate(over="ignore"):
                place[...] = part
            require_finite(place, start, f"{loaded.source}: {slot.hf}")


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    x, y = a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)
    return all(np.array_equal(x[i : i + CHUNK], y[i : i + CHUNK]) for i in range(0, x.size, CHUNK))
