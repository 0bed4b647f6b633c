"""From what a user names as MODEL to parameters on a backend."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from .config import PRESETS, ModelConfig
from .data.tokenizer import Tokenizer
from .errors import Refused
from .formats.models import fill, load_model
from .params import Layout


@dataclass(frozen=True)
class Source:
    """A model's configuration, its parameters as a host buffer (Layout order), and its tokenizer."""

    cfg: ModelConfig
    layout: Layout
    host: np.ndarray
    tokenizer: Tokenizer | None
    sha256: str  # of the weights, or the preset and seed they were drawn from


def open_source(name: str, dtype: str = "float32", seed: int | None = None) -> Source:
    """Weights of a checkpoint; or, given a seed, of a preset with every parameter drawn at random.

    Raises InputNotFound, MalformedFile, Refused (see formats.models.load_model).
    """
    random = name in PRESETS and seed is not None
    loaded = None if random else load_model(name)
    cfg = PRESETS[name] if loaded is None else loaded.cfg
    layout = Layout(cfg)
    host = np.zeros(layout.size, dtype if dtype == "float64" else "float32")
    if loaded is None:
        assert seed is not None
        layout.randomise(host, seed)
        return Source(cfg, layout, host, None, f"preset {name}, random weights of seed {seed}")
    fill(layout, host, loaded)
    text = loaded.tokenizer_json
    tokenizer = Tokenizer.from_json(text, name) if text is not None else None
    if tokenizer is not None and tokenizer.vocab_size > cfg.vocab_size:
        raise Refused(f"{name}: its tokenizer has {tokenizer.vocab_size} ids, the model {cfg.vocab_size}")
    return Source(cfg, layout, host, tokenizer, loaded.sha256)


def put(backend: ModuleType, source: Source, dtype: str = "float32") -> Any:
    """The parameters on a backend: a new flat buffer."""
    w = backend.empty(source.layout.size, dtype)
    backend.from_host(w, source.host)
    return w
