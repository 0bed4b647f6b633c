"""Go on with a run: its settings, which may hardly differ, its number of steps, its data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..backends.cuda.kinds import OPS, decisive
from ..common.errors import InputNotFound, MalformedFile, Refused, UsageError
from ..common.options import absolute_paths, flag
from ..common.shell import word
from ..common.units import plural
from ..model.schedule import Schedule
from .inputs import Inputs
from .rundir import RunDir, of_run, step_of
from .settings import Settings, check, steps_of

# Facts of a device that may change the last bits of a run.
DECIDE_BITS = ("backend", "gpu", "cpu", "kernels", "cuda", "cublaslt", "matmul_algorithms", "products", *OPS)


def continued(settings: Settings, explicit: dict[str, Any]) -> Settings:
    """Read the settings of the run that is resumed; only what cannot change its numbers may differ.

    Raises InputNotFound, MalformedFile, Refused, UsageError."""
    if settings.run_dir is None:
        raise UsageError("--resume needs --run-dir: the folder of the run to go on with")
    path = Path(settings.run_dir)
    saved = check(of_run(RunDir(path).read_config()["settings"]), str(path / "config.json"))
    for key in ("dataset", "val_dataset", "tokenizer"):
        if saved.get(key) and not Path(saved[key]).exists():
            raise InputNotFound(f"{saved[key]}: gone; the run in {path} reads it as its {key}: put it back")
    may_change = {f.name for f in dataclasses.fields(Settings) if f.metadata["may_change"]}
    kept = {key: explicit[key] for key in may_change if key in explicit}
    for key, value in absolute_paths(Settings, explicit).items():
        if key == "epochs" and value is not None:
            key, value = "num_steps", _steps(RunDir(path), saved, value)
        if key in may_change or saved.get(key) == value:
            continue
        if key == "num_steps":
            _check_rates(RunDir(path), saved, value)
            kept |= {key: value, "epochs": None}
            continue
        raise Refused(
            f"{flag(key)} {value} differs from {saved.get(key)!r} of the run in {path}; a resumed run keeps its "
            f"settings. Start a new run with --init {word(path)}/ckpt/epoch-NNN.apr to change them"
        )
    return Settings(**{**saved, **kept, "resume": True, "run_dir": settings.run_dir})


def _steps(run: RunDir, saved: dict[str, Any], epochs: float) -> int:
    """Count the steps of so many passes over the data that a run began with."""
    data, batch = run.read_config().get("data"), saved.get("batch_size")
    windows = data.get("train_windows") if isinstance(data, dict) else None
    if not isinstance(windows, int) or not isinstance(batch, int) or not batch > 0:
        raise MalformedFile(
            f"{run.path}/config.json: no train_windows or batch_size; restore the file, or give --num-steps"
        )
    return steps_of(epochs, windows, batch)


def _check_rates(run: RunDir, saved: dict[str, Any], num_steps: int) -> None:
    """Raise Refused for another number of steps with which a step that is done would have had another learning rate."""
    states, was = run.states(), run.num_steps()
    if not all(isinstance(saved.get(key), int | float) for key in ("lr", "lr_min", "warmup_steps")):
        raise MalformedFile(
            f"{run.path}/config.json: no lr, lr_min or warmup_steps in its settings; restore the file"
        )
    done = step_of(states[-1]) if states else 0
    again = f"start a new run with --init {word(run.ckpt)}/epoch-NNN.apr"
    if num_steps < done:
        raise Refused(
            f"--num-steps {num_steps}: the run in {run.path} has taken {plural(done, 'step')} already; {again}"
        )
    kind = saved.get("schedule", Settings.schedule)
    before, after = (
        Schedule(kind, saved["lr"], saved["lr_min"], saved["warmup_steps"], n) for n in (was, num_steps)
    )
    wrong = next((step for step in range(1, done + 1) if before(step) != after(step)), None)
    if wrong is not None:
        why = {
            "wsd": f"its decay has begun: step {done} is in the last part of {was}",
            "constant": "",
        }.get(kind, f"a {kind} schedule follows from the number of steps throughout")
        raise Refused(
            f"--num-steps {num_steps}: the run in {run.path} has taken step {wrong} at a learning rate of "
            f"{before(wrong):.4e}, a run of {plural(num_steps, 'step')} takes it at {after(wrong):.4e}: {why}. A run can be made "
            f"longer with --schedule constant, or with wsd before its decay; here {again}"
        )


def check_same_data(inputs: Inputs, run: RunDir) -> None:
    """Compare the data with those that a resumed run began with. Raises Refused."""
    saved = run.read_config().get("data")
    for key, value in inputs.describe().items():
        if key == "corpus":  # a name, which may be written in several ways; the hashes tell
            continue
        was = saved.get(key) if isinstance(saved, dict) else None
        if key == "tokenizer_sha256" and inputs.tokenizer.is_recorded_as(was):
            continue
        if was != value:
            raise Refused(
                f"{run.path}/config.json: {key} was {was!r} when the run began and is {value!r} now; resume with the "
                "data of then, or start a new run with --init"
            )


def check_same_kernels(inputs: Inputs, run: RunDir) -> None:
    """Compare the kernels on which the bits of this model depend with those of the run so far. Raises Refused.

    Runs that are older than this record do not say it."""
    s, c, device = inputs.settings, inputs.cfg, run.read_config().get("device")
    if s.other_kernels or not isinstance(device, dict):
        return
    was, now = [device, *device.get("went_on_with", [])][-1], inputs.backend.describe()
    products = ["products"] if s.dtype == "bfloat16" else []  # of the cpu backend, by the processor
    for op in (*decisive(str(s.dtype), c.head_dim, c.vocab_size), *products):
        if None not in (was.get(op), now.get(op)) and was[op] != now[op]:
            raise Refused(
                f"{run.path}/config.json: {op} was computed by {was[op]}, and by {now[op]} here: the numbers would "
                "differ in the last bits from here on; resume on a GPU or a processor of the same kind, with the apr of then, or "
                "go on all the same with --other-kernels"
            )
