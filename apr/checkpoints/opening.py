"""From what a user names as MODEL to parameters on a backend."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from ..common.errors import MalformedFile, Refused
from ..common.files import short
from ..model.config import PRESETS, ModelConfig
from ..model.params import Layout
from ..tokenizer.tokenizer import Tokenizer
from .registry import LoadedModel, fill, load_model


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
    return Source(cfg, layout, host, tokenizer_of(loaded), loaded.sha256)


def tokenizer_of(loaded: LoadedModel) -> Tokenizer | None:
    """The tokenizer that a checkpoint carries, with the end-of-text id that its metadata names.

    Raises Refused when it has more ids than the model.
    """
    if loaded.tokenizer_json is None:
        return None
    eos = loaded.metadata.get("tokenizer.eos_token_id" if loaded.kind == "apr" else "eos_token_id")
    if isinstance(eos, list):  # transformers: any of several ends a text
        eos = eos[0] if eos else None
    if eos is not None and (not isinstance(eos, int | str) or isinstance(eos, bool)):
        raise MalformedFile(
            f"{loaded.source}: eos_token_id = {short(eos)} is not the id of a token; correct it in the model's config"
        )
    tokenizer = Tokenizer.from_json(loaded.tokenizer_json, loaded.source, eos)
    if tokenizer.vocab_size > loaded.cfg.vocab_size:
        raise Refused(
            f"{loaded.source}: its tokenizer has {tokenizer.vocab_size} ids, the model {loaded.cfg.vocab_size}"
        )
    return tokenizer


def weights_on(backend: ModuleType, loaded: LoadedModel, dtype: str = "float32") -> Any:
    """The parameters of a checkpoint on a backend: a new flat buffer (Layout order)."""
    layout = Layout(loaded.cfg)
    host = np.zeros(layout.size, np.float32)
    fill(layout, host, loaded)
    return _upload(backend, host, dtype)


def put(backend: ModuleType, source: Source, dtype: str = "float32") -> Any:
    """The parameters of a source on a backend: a new flat buffer."""
    return _upload(backend, source.host, dtype)


def _upload(backend: ModuleType, host: np.ndarray, dtype: str) -> Any:
    w = backend.empty(host.size, dtype)
    backend.from_host(w, host)
    return w
