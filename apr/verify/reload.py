"""Compute the validation loss of a run's checkpoint again: in a fresh process at its end, and in `apr verify`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .. import backends
from ..backends.select import choose
from ..checkpoints.apr2 import AprFile, read_apr
from ..checkpoints.apr2_metadata import metadata_to_config
from ..checkpoints.peft import read_adapter
from ..checkpoints.registry import open_any
from ..checkpoints.state import STATE_SHA, saved_hashes, sha256
from ..common.errors import AprError, MalformedFile, Refused
from ..common.files import read_json
from ..common.printable import printable
from ..common.units import plural
from ..data.audit import Split, folders_in, open_shards
from ..data.open import windows_of
from ..model.lora import AdapterLayout, lora_of_json
from ..model.params import Layout
from ..model.transformer import Model
from ..training.evaluate import Loss, evaluate
from ..training.references import preferences_of, use_reference
from ..training.rundir import RunDir, of_run
from ..training.settings import Settings, check


@dataclass(frozen=True)
class Recorded:
    """A checkpoint with its metadata and the config of its run."""

    checkpoint: Path
    metadata: dict[str, Any]
    config: dict[str, Any]
    settings: Settings

    @property
    def val_loss(self) -> float:
        """Validation loss, nats per token."""
        return float(self.metadata["val_loss"])


def last_checkpoint(run: Path) -> Recorded | None:
    """Find the latest checkpoint of a run; None where it has none. Raises MalformedFile."""
    found = RunDir(run).checkpoints()
    return recorded(run, found[-1]) if found else None


def recorded(run: Path, checkpoint: Path) -> Recorded:
    """Read what a run recorded of a checkpoint. Raises InputNotFound, MalformedFile."""
    config = RunDir(run).read_config()
    path = checkpoint.with_suffix(".metadata.json")
    try:
        metadata = read_json(path)
        float(metadata["val_loss"])
    except (AprError, ValueError, TypeError, LookupError, OverflowError) as e:
        raise MalformedFile(f"{path}: no recorded val_loss to compare with: {e}") from None
    settings = Settings(**check(of_run(config["settings"]), str(run / "config.json")))
    return Recorded(checkpoint, metadata, config, settings)


def checkpoint_loss(r: Recorded, backend: ModuleType, dtype: str, dataset: str | None = None) -> Loss:
    """Compute the validation loss of a checkpoint on a backend; `dataset`: folder of its shards, if they have moved.

    Raises Refused when the shards are not those of the run, InputNotFound when they are gone."""
    init = open_any(str(r.checkpoint))
    tokenizer = init.tokenizer
    if tokenizer is None:
        raise MalformedFile(f"{r.checkpoint}: no tokenizer in it, so the shards cannot be read")
    folders = {k: Path(v) for k, v in r.config["data_folders"].items()}
    if dataset is not None:
        folders = folders_in(Path(dataset), r.config["data"].get("mixture", [""]))
    sides = [
        Split(name, folder, open_shards(folder, tokenizer, verify=False)) for name, folder in folders.items()
    ]
    train, val = windows_of(r.settings, sides)
    want = r.config["data"]["val_sha256"]
    if val.shards.sha256 != want:
        raise Refused(f"{val.shards.folder}: SHA-256 {val.shards.sha256[:12]}, the run used {want[:12]}")
    s, evaluation = r.settings, init.metadata.get("evaluation", {})
    micro = s.micro_batch_size or s.batch_size
    model = Model(
        init.cfg, backend, micro, s.seq_length, dtype,
        train=False, w=init.on(backend, dtype), document_end=evaluation.get("document_end"),
    )  # fmt: skip
    model.preferences = preferences_of(s, train, evaluation.get("document_end"))
    if model.preferences and not use_reference(
        model.preferences, RunDir(r.checkpoint.parents[1]), train, val
    ):
        raise MalformedFile(f"{r.checkpoint}: its run has no reference to compare pairs with")
    return evaluate(model, val, micro, s.val_batches and s.val_batches * s.batch_size)


def checkpoint_sha(checkpoint: Path) -> str:
    """Hash the weights of a checkpoint as its file has them, in the order of a layout."""
    loaded = open_any(str(checkpoint))
    return sha256(np.asarray(loaded.tensors[s.hf]) for s in Layout(loaded.cfg).in_order())


def differences(run: Path, r: Recorded) -> str:
    """Compare files with the hashes that were taken on the device when they were saved: the weights of a checkpoint, and
    weights and moments of the latest state; "" where they are equal."""
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(f, run, r) for f in (_checkpoint_difference, _state_difference)]
        return next(filter(None, (difference.result() for difference in found)), "")


def _checkpoint_difference(run: Path, r: Recorded) -> str:
    sha, want = checkpoint_sha(r.checkpoint), r.metadata.get("weights_sha")
    if sha != want:
        return f"{r.checkpoint.name} has the weights {sha[:12]}, the device had {str(want)[:12]}"
    return ""


def _state_difference(run: Path, r: Recorded) -> str:
    for path in RunDir(run).states()[-1:]:
        file = read_apr(path)
        sha, want = saved_hashes(file.metadata, file.tensors, str(path))[0], file.metadata[STATE_SHA]
        if sha != want:
            return f"{path.name} has weights and moments {sha[:12]}, the device had {str(want)[:12]}"
        folder = RunDir(run).adapter_of(r.checkpoint)
        if folder.is_dir() and file.metadata["training"]["step"] == r.metadata.get("step"):
            return adapter_difference(folder, file)
    return ""


def adapter_difference(folder: Path, state: AprFile) -> str:
    """Compare the adapters of a folder with those of a state of the same step: every A and B, and the scale."""
    cfg = metadata_to_config(state.metadata, str(folder), [])
    found, lora = read_adapter(str(folder), cfg), lora_of_json(state.metadata["lora"])
    pairs = AdapterLayout(cfg, lora).pairs
    if set(found.deltas) != {p.base.hf for p in pairs}:
        return f"{folder.name} adapts {plural(len(found.deltas), 'matrix')}, {len(pairs)} were trained"
    for p in pairs:
        m = found.deltas[p.base.hf].magnitude
        if (p.m is None) != (m is None):
            return f"{folder.name} has norms of rows, or was trained with them: one of both"
        if p.m is not None and m is not None and not np.array_equal(m, np.asarray(state.tensors[p.m.hf])):
            return f"{folder.name}: {p.m.hf} is not that of the state of the same step"
    whole = AdapterLayout(cfg, lora).saved
    if set(found.saved) != {base.hf for base, _ in whole}:
        return f"{folder.name} holds {plural(len(found.saved), 'whole tensor')}, {len(whole)} were trained"
    for base, slot in whole:
        if not np.array_equal(found.saved[base.hf], np.asarray(state.tensors[slot.hf])):
            return f"{folder.name}: {base.hf} is not that of the state of the same step"
    for p in pairs:
        delta = found.deltas[p.base.hf]
        if delta.scale != p.scale:
            return f"{folder.name} has the scale {delta.scale:g}, trained with {p.scale:g}"
        for slot, x in ((p.a, delta.a), (p.b, delta.b)):
            if not np.array_equal(np.asarray(x), np.asarray(state.tensors[slot.hf])):
                return f"{folder.name}: {slot.hf} is not that of the state of the same step"
    return ""


def main(args: Sequence[str]) -> int:
    """Print the loss of a run's last checkpoint, and a difference of its files from what was saved, as JSON.

    args: RUN DEVICE DTYPE THREADS."""
    run, device, dtype, threads = args
    try:
        found = last_checkpoint(Path(run))
        if found is None:
            raise MalformedFile(f"{run}: no checkpoint in it")
        with ThreadPoolExecutor(1) as pool:  # the files are hashed while the loss is computed
            wrong = pool.submit(differences, Path(run), found)
            backend = (
                backends.get(device)
                if device == "reference"
                else choose(device, dtype, int(threads) or None).backend
            )
            loss = checkpoint_loss(found, backend, dtype).mean
        print(json.dumps([loss, wrong.result()]))
    except AprError as e:
        print(printable(str(e)), file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
