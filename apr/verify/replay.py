"""Compute parts of a run again: the validation loss of its last checkpoint, and recorded steps from saved states."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import backends
from ..backends.select import choose
from ..checkpoints.apr2 import read_apr
from ..checkpoints.registry import open_any
from ..checkpoints.state import STATE_SHA
from ..common.errors import Refused
from ..common.events import Line
from ..common.finding import Finding
from ..common.provenance import code_sha256
from ..common.units import plural
from ..data.audit import named
from ..data.mixture import as_datasets
from ..evidence.resumed import computes_the_same
from ..training.inputs import open_inputs
from ..training.loop import Trainer
from .record import NO_SHARDS, NONE_SAVED, Record, unmade
from .reload import checkpoint_loss, recorded

OTHER_BACKEND = {"float32": 1e-4, "bfloat16": 5e-3}  # of a loss: two backends round in other places
OTHER_STEP = {"float32": 1e-3, "bfloat16": 2e-2}  # of a training loss some steps after a saved state
OF_ERRORS, OF_PAIRS, ONE_PAIR = 0.1, 0.02, 1.5  # of a standard error; of all pairs; one of few
OF_MOMENTS = 10.0  # of that: averages of gradients and of their squares, in place of their norm
SUM_ONLY = 1e-12  # relative, up to which a sum in float64 differs whose summands are the same
COMPARED = ("train_loss", "grad_norm", "weight_norm", "lr", "tokens_seen")  # of a line of the log
FAR_STEPS = 400  # behind a state, up to which the last step is always computed again


def validation_loss(r: Record) -> Finding:
    """Compute the validation loss of the last checkpoint on another backend than the run's."""
    name, bound, other = "validation loss", "the recorded loss", r.options.backend
    if other == "none":
        return Finding.skipped(name, "--backend none", bound)
    if r.last is None:
        return unmade(name, NONE_SAVED, bound)
    said, used = recorded(r.run.path, r.last), r.config["device"]["backend"]
    if other == "auto":
        other = "reference" if used == "cpu" else "cpu"
    if not all(f.is_dir() for f in r.folders().values()):
        return unmade(name, NO_SHARDS, bound)
    backend = backends.get(other) if other == "reference" else choose(other).backend
    found = checkpoint_loss(said, backend, backend.dtypes[0], r.options.dataset)
    tolerance = OTHER_BACKEND[r.settings.dtype or "float32"]
    off = abs(found.mean - said.val_loss) / said.val_loss
    measured = f"{found.mean:.6f} on {other}, {said.val_loss:.6f} recorded on {used}: {off:.1e} of it apart"
    line = next((x for x in r.evaluations if x["step"] == said.metadata["step"]), {})
    wrong = _other_figure(found.figures(), line, tolerance)
    return Finding.of(name, off <= tolerance and not wrong, wrong or measured, f"at most {tolerance:g}")


def replay(r: Record) -> Finding:
    """Compute recorded steps again from the saved state before them: the first, that behind each state, the last, and some
    chosen at random."""
    o, bound = r.options, "the recorded loss and gradient norm"
    if not o.replay:
        why = "not asked for; --replay K computes K recorded steps again"
        return Finding.skipped("replay", why, bound)
    if r.last is None:
        return unmade("replay", NONE_SAVED, bound, asked=not r.is_cut)
    if not all(f.is_dir() for f in r.folders().values()):
        return unmade("replay", NO_SHARDS, bound, asked=True)
    bases = [0, *r.run.all_states()]
    base_of = {line["step"]: max(b for b in bases if b < line["step"]) for line in r.steps}
    if not base_of:
        return Finding.skipped("replay", "no step was taken", bound)
    near = [step for step, base in base_of.items() if step - base <= o.within]
    chosen = _chosen(o.replay, o.seed, base_of, near)
    trainer, is_same = _trainer(r)
    again = _Again(r, trainer, is_same)
    for base in sorted({base_of[step] for step in chosen}):
        if wrong := again.run(base, max(step for step in chosen if base_of[step] == base)):
            return Finding.of("replay", False, wrong, again.bound)
    steps = ", ".join(map(str, chosen[:8])) + (" ..." if len(chosen) > 8 else "")
    measured = f"{plural(again.steps, 'step')} on the way to {steps} (seed {o.seed}), worst {again.worst:.1e}"
    far = max(base_of) not in chosen
    why = (
        f"the last step is {max(base_of) - base_of[max(base_of)]:,} behind a state: --within reaches it"
        if far
        else ""
    )
    return Finding.of("replay", True, measured, again.bound, why)


def _chosen(count: int, seed: int, base_of: dict[int, int], near: list[int]) -> list[int]:
    """Choose the steps to come to: the first, that behind each state, the last, and the steps of states that are near; and
    `count` at random among those near."""
    last = max(base_of)
    always = {base + 1 for base in base_of.values()}
    always |= {last} if last in near or last - base_of[last] <= FAR_STEPS else set()
    # On to the next state, which is compared too.
    always |= set(base_of.values()) & set(near)
    drawn = np.random.default_rng(seed).permutation([step for step in near if step not in always])[:count]
    return sorted(always | {int(step) for step in drawn})


class _Again:
    """Takes recorded steps again and compares all that is computed on the way: steps, evaluations, states."""

    def __init__(self, r: Record, trainer: Trainer, is_same: bool) -> None:
        self.r, self.trainer = r, trainer
        dtype, given = trainer.model.dtype, r.options.tolerance
        self.is_same = is_same if given is None else not given
        self.tolerance = 0.0 if self.is_same else given or OTHER_STEP[dtype]
        self.of_evaluation = 0.0 if self.is_same else given or OTHER_BACKEND[dtype]
        self.bound = (
            "equal bits" if self.is_same else f"within {self.tolerance:g}: another backend or version"
        )
        self.lines = {line["step"]: line for line in r.steps}
        self.evaluated = {line["step"]: line for line in r.evaluations}
        self.worst, self.steps, self.saved = 0.0, 0, r.run.all_states()

    def run(self, base: int, last: int) -> str:
        """Take the steps behind a state up to `last`; returns the first difference, "" for none."""
        trainer, first = self.trainer, 0
        if base:
            trainer.load(self.saved[base])
        else:
            trainer.begin_anew()
        wrong = "" if base else self._evaluation(0)
        while not wrong and trainer.progress.step < last:
            step = trainer.progress.step + 1
            self.r.announce(f"replay: step {step}, up to {last}")
            off, wrong = self._step(trainer.train_step())
            if off > SUM_ONLY and not first:
                first = step
            elif first and not off and not wrong:
                # Another backend or version that rounds otherwise once never comes back to the same bits.
                wrong = f"step {first} differs, and step {step} behind it has the recorded bits"
            wrong = wrong or self._evaluation(step) or self._state(step)
        return wrong

    def _step(self, line: Line) -> tuple[float, str]:
        """Compare the line of a step: (relative difference, "" where it is within the tolerance)."""
        was = self.lines[line["step"]]
        self.steps += 1
        keys = [*COMPARED, *(key for key in was if "/" in key)]
        offs = {key: abs(line[key] - was[key]) / max(abs(was[key]), 1e-9) for key in keys}
        key = max(offs, key=lambda k: offs[k])
        self.worst = max(self.worst, offs[key])
        if offs[key] <= self.tolerance:
            return offs[key], ""
        return offs[key], f"step {line['step']}: {key} = {line[key]!r}, recorded {was[key]!r}"

    def _evaluation(self, step: int) -> str:
        if step not in self.evaluated:
            return ""
        wrong = _other_figure(self.trainer.evaluate().figures(), self.evaluated[step], self.of_evaluation)
        return wrong and f"step {step}: {wrong}"

    def _state(self, step: int) -> str:
        if step not in self.saved:
            return ""
        if not self.is_same:
            for prefix, off in self.trainer.state.distances(self.saved[step]).items():
                most = OF_MOMENTS * self.tolerance if prefix else self.tolerance
                if not off <= most:
                    what = prefix.rstrip(".") or "weights"
                    return f"step {step}: {what} are {off:.1e} of their norm from those of its state"
            return ""
        sha, was = self.trainer.state.sha256(), read_apr(self.saved[step]).metadata[STATE_SHA]
        return "" if sha == was else f"step {step}: weights and moments {sha[:12]}, its state has {was[:12]}"


def _other_figure(again: Line, said: Line, tolerance: float) -> str:
    """Find a figure of an evaluation that is another than that of the log; "" for none. Older logs have fewer.

    tolerance: of the loss, 0: equal bits"""
    # What is computed of pairs follows from sums over the tokens of their answers.
    sums = max(1.0, *(abs(again.get(f"val_{side}_logp", 0.0)) for side in ("chosen", "rejected")))
    for key, x in again.items():
        if not tolerance or key.startswith("val_tokens"):
            most = 0.0
        elif "stderr" in key:
            most = OF_ERRORS * abs(x) + tolerance * abs(again["val_loss"])
        elif key == "val_accuracy":
            # A pair that is nearly undecided may change sides: one of a few, any where the margin itself is rounding.
            is_undecided = abs(said.get("val_margin", math.inf)) <= tolerance * sums
            most = 1.0 if is_undecided else max(OF_PAIRS, ONE_PAIR / again["val_tokens"])
        else:
            most = tolerance * (abs(x) if key.startswith("val_loss") else sums)
        if key in said and not abs(x - said[key]) <= most:
            return f"{key} = {x!r}, recorded {said[key]!r}"
    return ""


def evaluations(r: Record) -> Finding:
    """Compute the validation loss of every checkpoint but the last again, on the run's backend."""
    name, o = "evaluations", r.options
    bound = "the recorded losses"
    earlier = [recorded(r.run.path, path) for path in r.run.checkpoints()[:-1]]
    if not o.replay or not earlier:
        return Finding.skipped(
            name, "not asked for; --replay asks" if earlier else "no earlier checkpoint", bound
        )
    if not all(f.is_dir() for f in r.folders().values()):
        return unmade(name, NO_SHARDS, bound, asked=True)
    device, dtype = o.device or r.config["settings"]["device"], r.settings.dtype or "float32"
    backend = choose(device, None, r.settings.threads).backend
    dtype = dtype if dtype in backend.dtypes else backend.dtypes[0]
    tolerance = OTHER_BACKEND[r.settings.dtype or "float32"]
    worst = 0.0
    for said in earlier:
        r.announce(f"evaluations: {said.checkpoint.name}")
        loss = checkpoint_loss(said, backend, dtype, o.dataset).mean
        off = abs(loss - said.val_loss) / abs(said.val_loss)
        if not off <= tolerance:
            measured = f"{said.checkpoint.name}: {loss:.6f}, recorded {said.val_loss:.6f}"
            return Finding.of(name, False, measured, f"at most {tolerance:g} of it apart")
        worst = max(worst, off)
    measured = f"{plural(len(earlier), 'earlier checkpoint')}, worst {worst:.1e} of it apart"
    return Finding.of(name, True, measured, f"at most {tolerance:g}")


def _trainer(r: Record) -> tuple[Trainer, bool]:
    """Make the run's trainer as it was; True where everything that decides on the last bit is as it was."""
    device = r.options.device or r.config["settings"]["device"]
    changes: dict[str, Any] = {"device": device, "resume": False, "spot_check": -1, "sample": None}
    # The shards that the run was trained on: to encode its corpus again would write, and the corpus may have grown.
    folders = r.folders()
    if r.settings.mix:
        # Each source has both sides in one folder.
        places = {name: str(folders[named(name, "train")].parent) for name in r.sources}
        changes["mix"] = as_datasets(r.settings, places)
    else:
        changes["dataset"] = str(folders["train"])
        changes["val_dataset"] = str(folders["val"]) if "val" in folders else None
    changes |= {
        "corpus": None,
        "instruct": None,
        "preferences": None,
        "chat_template": None,
        "tokenizer": None,
    }
    # The tokenizer need not lie beside the shards, nor the file of --model where it was: the checkpoint has both.
    last = open_any(str(r.run.checkpoints()[-1]))
    inputs = open_inputs(dataclasses.replace(r.settings, **changes), tokenizer=last.tokenizer, cfg=last.cfg)
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
    return trainer, computes_the_same(r.config, inputs.backend.describe(), code_sha256())
