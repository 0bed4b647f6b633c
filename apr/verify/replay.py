"""Compute parts of a run again: the validation loss of its last checkpoint, and recorded steps from saved states."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .. import backends
from ..backends.select import choose
from ..checkpoints.registry import open_any
from ..common.errors import Refused
from ..common.finding import Finding
from ..common.provenance import code_sha256
from ..common.units import plural
from ..training.inputs import open_inputs
from ..training.loop import Trainer
from .record import NONE_SAVED, Record
from .reload import checkpoint_loss, recorded

OTHER_BACKEND = {"float32": 1e-4, "bfloat16": 5e-3}  # of a loss: two backends round in other places
OTHER_STEP = {"float32": 1e-3, "bfloat16": 2e-2}  # of a training loss some steps after a saved state
NO_SHARDS = "the shards are not there; --dataset says where they are now"
DECIDING = ("backend", "gpu", "cpu", "threads", "cuda", "cublaslt", "matmul_algorithms")


def validation_loss(r: Record) -> Finding:
    """Compute the validation loss of the last checkpoint on another backend than the run's."""
    name, bound, other = "validation loss", "the recorded loss", r.options.backend
    if r.last is None:
        return Finding.skipped(name, NONE_SAVED, bound)
    said, used = recorded(r.run.path, r.last), r.config["device"]["backend"]
    if other == "none":
        return Finding.skipped(name, "--backend none", bound)
    if other == "auto":
        other = "reference" if used == "cpu" else "cpu"
    if not all(f.is_dir() for f in r.folders().values()):
        return Finding.skipped(name, NO_SHARDS, bound)
    backend = backends.get(other) if other == "reference" else choose(other).backend
    loss = checkpoint_loss(said, backend, backend.dtypes[0], r.options.dataset).mean
    tolerance = OTHER_BACKEND[r.settings.dtype or "float32"]
    off = abs(loss - said.val_loss) / said.val_loss
    measured = f"{loss:.6f} on {other}, {said.val_loss:.6f} recorded on {used}: {off:.1e} of it apart"
    return Finding.of(name, off <= tolerance, measured, f"at most {tolerance:g}")


def replay(r: Record) -> Finding:
    """Compute recorded steps, chosen at random, again from the saved state before them."""
    o, bound = r.options, "the recorded loss and gradient norm"
    if not o.replay:
        why = "not asked for; --replay K computes K recorded steps again"
        return Finding.skipped("replay", why, bound)
    if r.last is None:
        return Finding.skipped("replay", NONE_SAVED, bound)
    if not all(f.is_dir() for f in r.folders().values()):
        return Finding.skipped("replay", NO_SHARDS, bound)
    bases = [0, *(int(p.stem[5:]) for p in r.run.states())]
    base_of = {line["step"]: max(b for b in bases if b < line["step"]) for line in r.steps}
    near = [step for step, base in base_of.items() if step - base <= o.within]
    if not near:
        why = f"no step is within {o.within} of a saved state; raise --within"
        return Finding.skipped("replay", why, bound)
    chosen = sorted(np.random.default_rng(o.seed).permutation(near)[: o.replay].tolist())
    trainer, is_same = _trainer(r)
    tolerance = 0.0 if is_same else OTHER_STEP[trainer.model.dtype]
    lines, worst = {line["step"]: line for line in r.steps}, 0.0
    for base in sorted({base_of[step] for step in chosen}):
        wanted = [step for step in chosen if base_of[step] == base]
        if base:
            trainer.load(r.run.state / f"step-{base:06d}.apr")
        else:
            trainer.begin_anew()
        while trainer.progress.step < wanted[-1]:
            r.announce(f"replay: step {trainer.progress.step + 1}, up to {wanted[-1]}")
            line = trainer.train_step()
            if line["step"] not in wanted:
                continue
            was = lines[line["step"]]
            apart = {k: abs(line[k] - was[k]) / max(abs(was[k]), 1e-9) for k in ("train_loss", "grad_norm")}
            key, off = max(apart.items(), key=lambda pair: pair[1])
            if not off <= tolerance:
                measured = (
                    f"step {line['step']}: {key} {line[key]!r}, recorded {was[key]!r}, {off:.1e} of it apart"
                )
                bound = "equal bits" if is_same else f"within {tolerance:g} of it"
                return Finding.of("replay", False, measured, bound)
            worst = max(worst, off)
    steps = ", ".join(map(str, chosen[:8])) + (" ..." if len(chosen) > 8 else "")
    measured = (
        f"{len(chosen)} of {plural(len(near), 'step')} in reach ({steps}; seed {o.seed}), worst {worst:.1e}"
    )
    bound = "equal bits" if is_same else f"within {tolerance:g}: another backend or version"
    return Finding.of("replay", True, measured, bound)


def _trainer(r: Record) -> tuple[Trainer, bool]:
    """Make the run's trainer as it was; True where everything that decides on the last bit is as it was."""
    device = r.options.device or r.config["settings"]["device"]
    changes: dict[str, Any] = {"device": device, "resume": False, "spot_check": -1, "sample": None}
    if device == "cpu" and r.settings.dtype == "bfloat16":
        changes["dtype"] = "float32"
    # The shards that the run was trained on: to encode its corpus again would write, and the corpus may have grown.
    folders = r.folders()
    changes |= {
        "dataset": str(folders["train"]),
        "val_dataset": str(folders["val"]) if "val" in folders else None,
        "corpus": None,
        "instruct": None,
        "chat_template": None,
        "tokenizer": None,
    }
    # The tokenizer need not lie beside the shards: the checkpoint has it.
    tokenizer = open_any(str(r.run.checkpoints()[-1])).tokenizer
    inputs = open_inputs(dataclasses.replace(r.settings, **changes), tokenizer=tokenizer)
    hashes = {
        "train_sha256": inputs.train.shards.sha256,
        "val_sha256": inputs.val.shards.sha256,
    }
    for key, found in hashes.items():
        want = r.config["data"][key]
        if found != want:
            raise Refused(f"replay: {key} is {found[:12]}, the run's {want[:12]}")
    if not inputs.tokenizer.is_recorded_as(r.config["data"]["tokenizer_sha256"]):
        raise Refused(f"replay: the tokenizer {inputs.tokenizer.source} is not the run's")
    trainer = Trainer(inputs, r.run)
    trainer.prepare(resume=False)
    was, now = r.config["device"], inputs.backend.describe()
    is_same = all(was.get(k) == now.get(k) for k in DECIDING)
    return trainer, is_same and r.config.get("code_sha256") == code_sha256()
