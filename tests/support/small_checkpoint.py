"""A random model with a tokenizer, as an .apr file and as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from apr.checkpoints.apr2 import write_apr
from apr.checkpoints.apr2_metadata import config_to_metadata, embed_tokenizer
from apr.checkpoints.hf import write_hf
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.tokenizer.training import train_tokenizer


def write_checkpoint(folder: Path) -> Path:
    """Write FOLDER/m.apr and FOLDER/hf, and the tokenizer into the folder; returns the folder."""
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n"] * 3, 270, folder)
    cfg = dataclasses.replace(PRESETS["llama-tiny"], vocab_size=tokenizer.vocab_size)
    layout = Layout(cfg)
    host = np.zeros(layout.size, np.float32)
    layout.randomise(host, 3)
    meta = config_to_metadata(cfg)
    embed_tokenizer(meta, tokenizer.json, tokenizer.eos_id)
    write_apr(folder / "m.apr", meta, layout.named(host), "float32")
    write_hf(folder / "hf", cfg, layout.named(host), tokenizer_json=tokenizer.json)
    return folder
