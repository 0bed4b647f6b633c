"""Folders that PEFT saved, and their bases, out of the golden files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from apr.backends import reference
from apr.checkpoints.hf import read_safetensors, write_hf, write_safetensors
from apr.checkpoints.peft import WEIGHTS
from apr.checkpoints.peft_config import CONFIG
from apr.model.hf_config import from_hf
from apr.model.params import Layout
from apr.model.taps import Record
from apr.model.transformer import Model

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """name -> (Hugging Face folder, ids, targets) of a golden model."""
    root, made = tmp_path_factory.mktemp("bases"), {}

    def get(name):
        if name not in made:
            path = GOLDEN / f"{name}.safetensors"
            file = read_safetensors(path)
            raw = path.read_bytes()
            config = json.loads(
                json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["config"]
            )
            cfg = from_hf(config, name)
            tensors = {s.hf: np.asarray(file[f"weight.{s.hf}"]) for s in Layout(cfg).in_order()}
            write_hf(root / name, cfg, tensors, "float32")
            made[name] = root / name, np.asarray(file["ids"]), np.asarray(file["targets"])
        return made[name]

    return get


def metadata_of(path):
    """The metadata of a golden file."""
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]


def put_adapter(golden, case, folder, metadata):
    """The folder that PEFT saved."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(metadata[f"{case}.config"])
    prefix = f"{case}.tensor."
    write_safetensors(
        folder / WEIGHTS, {k[len(prefix) :]: np.asarray(golden[k]) for k in golden if k.startswith(prefix)}
    )
    return folder


def logits(cfg, host, ids, dtype="float64", be=reference):
    model = Model(cfg, be, *ids.shape, dtype, train=False, loss_rows=ids.size)
    be.from_host(model.w, host.astype(dtype))
    tap = Record(be)
    model.forward(ids)
    model.loss(np.zeros_like(ids), tap=tap)
    return tap.seen["logits"].reshape(*ids.shape, -1)


def change(folder, **keys):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **keys}))
