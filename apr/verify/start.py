"""Draw the start of a run again: the weights before its first step, and its first batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..checkpoints.checkpoint import Checkpoint, fill, reader
from ..checkpoints.peft import adapter_start, read_adapter
from ..checkpoints.registry import open_any
from ..checkpoints.state import sha256
from ..common.finding import Finding
from ..common.provenance import code_sha256
from ..data.audit import Split, open_shards
from ..data.mixture import stream
from ..data.open import windows_of
from ..model.hf_config import from_hf
from ..model.lora import AdapterLayout, lora_of_json
from ..model.params import Layout
from ..training.start import batch_sha256
from .record import NO_SHARDS, NONE_SAVED, Record, unmade

NAME, BOUND = "start", "the hashes of config.json"
OLDER = "config.json of an older version has no hash of the first weights and the first batch"


def start(r: Record) -> Finding:
    """Compare weights and batch, drawn from the settings and the files that they name, with their hashes."""
    recorded = r.config.get("start")
    if not isinstance(recorded, dict):
        if r.config.get("code_sha256") == code_sha256() and r.steps:
            return Finding.of(NAME, False, "config.json has none, which this version writes", BOUND)
        return unmade(NAME, OLDER, BOUND)
    done, left = [], []
    for what, key, draw in (("weights", "weights_sha256", _weights), ("batch", "batch_sha256", _batch)):
        if key not in recorded:
            left.append(f"no {what} in config.json: the run ended before")
            continue
        sha = draw(r)
        if not sha.startswith("not "):
            if sha != recorded[key]:
                return Finding.of(NAME, False, f"first {what} {sha[:12]}", f"recorded {recorded[key][:12]}")
            done.append(f"first {what} {sha[:12]}")
        else:
            left.append(f"{what}: {sha}")
    if not done:
        return unmade(NAME, "; ".join(left), BOUND)
    return Finding.of(NAME, True, "; ".join(done), BOUND, "; ".join(left))


def _weights(r: Record) -> str:
    """Hash the weights of the seed, the checkpoint or the adapter that the settings name; "not ..." where it is gone."""
    s = r.settings
    for path in (s.init, s.lora_init):
        if path is not None and not Path(path).exists():
            return f"not asked: {path} is gone"
    init = open_any(s.init) if s.init else None
    cfg = init.cfg if init else from_hf(r.config["model"], "config.json")
    layout: Layout | AdapterLayout = Layout(cfg)
    if "lora" in r.config["data"]:
        layout = AdapterLayout(cfg, lora_of_json(r.config["data"]["lora"]))
    host = np.zeros(layout.size, np.float32)
    if isinstance(layout, AdapterLayout):
        host = _adapter(s.lora_init, layout, init, host, s.seed)
    elif init is not None:
        fill(layout, host, init)
    else:
        layout.init(host, s.seed, s.initializer_range)
    return sha256(layout.named(host).values())


def _adapter(
    source: str | None, layout: AdapterLayout, init: Checkpoint | None, host: np.ndarray, seed: int
) -> np.ndarray:
    """Begin adapters as training does."""
    if source is None or init is None:
        layout.init(host, seed, reader(Layout(layout.cfg), init) if init else None)
        return host
    return adapter_start(layout, read_adapter(source, layout.cfg))


def _batch(r: Record) -> str:
    """Hash the first batch of the stream that the settings ask for; "not ..." where the shards are gone."""
    folders, s = r.folders(), r.settings
    if r.last is None:
        return f"not asked: {NONE_SAVED}"
    if not all(folder.is_dir() for folder in folders.values()):
        return f"not asked: {NO_SHARDS}"
    tokenizer = open_any(str(r.last)).tokenizer
    if tokenizer is None:
        return "not asked: no tokenizer in the last checkpoint"
    sides = [
        Split(name, folder, open_shards(folder, tokenizer, verify=False)) for name, folder in folders.items()
    ]
    windows, _ = windows_of(s, sides)
    return batch_sha256(*stream(windows, s).next())
