"""Settings of `apr pretrain`: flags, configuration file, defaults of the mode, the demo job.

Examples: apr pretrain --corpus my_code/ --model smollm2-135m --num-steps 2000 --batch-size 32 --seq-length 512
          apr pretrain --resume --run-dir runs/demo"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import InputNotFound, UsageError
from ..common.hints import near, refuse_elsewhere
from ..common.options import (
    at_home,
    check_names,
    check_ranges,
    choices_of,
    device_option,
    field_types,
    given,
    json_option,
    option,
    threads_option,
)
from ..common.tables import read_table
from ..data.audit import tokenizer_beside
from ..data.mix_text import EXAMPLE, as_text, keys_of, kinds_of
from ..data.mixture import sources_of, steps_of_budgets
from ..data.settings import DataSettings, check_data
from ..model.optim import OptimSettings
from ..model.preferences import PreferenceSettings, check_preferences
from ..model.settings import ModelSettings, check_model
from .demo_job import DEMO

# Adapters start at zero and take larger steps than weights.
LORA_LR = 2e-4
# Of the learning rate of a tuning, that of a tuning on preferences: 1e-6, and 4e-6 of adapters, where others take 5e-7 to 5e-6.
PREFERENCE_SHARE = 0.02
MODES = {"from-scratch": dict(lr=3e-4, warmup_steps=1000), "finetune": dict(lr=5e-5, warmup_steps=100)}


@dataclass(frozen=True)
class EvidenceSettings:
    """Evidence: bounds of gates, spot checks."""

    bounds: str | None = option(
        "bounds of gates to change, such as val_below_train=0.2,speed=2; the verdict shows that they were changed",
        metavar="NAME=NUMBER",
        may_change=True,
    )
    spot_check: int = option(
        "before the first step, and then every so many steps, compare every op with the float64 reference on a piece of "
        "the batch and stop when one disagrees; 0: before the first step only; -1: never",
        0,
        at_least=-1,
        metavar="STEPS",
        may_change=True,
    )


@dataclass(frozen=True)
class EvalSettings:
    """Evaluation: how often, early stop, samples."""

    eval_every: int = option(
        "steps between evaluations", 100, above=0, metavar="STEPS", also="steps-per-epoch"
    )
    patience: int = option(
        "evaluations without improvement before an early stop", 5, at_least=0, metavar="EVALUATIONS"
    )
    min_epochs: int = option(
        "evaluations before an early stop or a reached target may end the run",
        3,
        at_least=0,
        metavar="EVALUATIONS",
    )
    target_val_loss: float | None = option("end when the validation loss (nats/token) reaches this")
    eval_tasks: str | None = option(
        "tasks to score at evaluations: files of multiple choice or HumanEval, names of lm-evaluation-harness; with commas",
        metavar="TASKS",
        may_change=True,
    )
    eval_tasks_every: int = option(
        "steps between scores of --eval-tasks, at evaluations whose step is a multiple; 0: at every evaluation",
        0,
        at_least=0,
        metavar="STEPS",
        may_change=True,
    )
    eval_tasks_limit: int | None = option(
        "only the first so many questions of each task (default: all)",
        at_least=1,
        metavar="COUNT",
        may_change=True,
    )
    sample: str | None = option(
        "prompt to continue at each evaluation and when the run is done", metavar="PROMPT"
    )


@dataclass(frozen=True)
class SaveSettings:
    """Saving: how often, how many to keep."""

    checkpoint_every: int = option(
        "steps between checkpoints, a multiple of --eval-every; 0: at every evaluation; the last evaluation has one "
        "in any case",
        0,
        at_least=0,
        metavar="STEPS",
    )
    keep_checkpoints: int = option(
        "how many of the latest checkpoints to keep, and the best one beside them; 0: all",
        5,
        at_least=0,
        may_change=True,
    )
    save_every: int = option(
        "steps between saved states; 0: at every evaluation",
        0,
        at_least=0,
        metavar="STEPS",
        may_change=True,
    )
    keep_states: int = option("how many saved states to keep", 2, above=0, may_change=True)
    ladder_mib: int = option(
        "how much disk older states may take that are kept, spread over the run, for `apr verify --replay`; 0: none",
        128,
        at_least=0,
        metavar="MIB",
        may_change=True,
    )
    background_saves: bool = option(
        "write checkpoints and states while training goes on, from a copy in main memory; --no-background-saves: "
        "training waits",
        True,
        may_change=True,
    )


@dataclass(frozen=True)
class RunSettings:
    """Run: folder, device, output."""

    run_dir: str | None = option(
        "folder that the run writes (default: the next free runs/NAME)",
        metavar="FOLDER",
        path=True,
        may_change=True,
    )
    mode: str | None = option(
        "defaults for lr and warm-up; follows from --model or --init; from-scratch with --init: continued pretraining",
        choices=tuple(MODES),
    )
    device: str = device_option()
    threads: int | None = threads_option()
    ranks: int | None = option(
        "processes on this machine that train together, with --device cpu; any number gives the same bits; see docs/ranks.md",
        above=0,
        metavar="N",
        may_change=True,
    )
    gpus: str | None = option(
        "GPUs of this machine that train together, a number or all; any number gives the same bits; see docs/ranks.md",
        metavar="N",
        may_change=True,
    )
    cross_check: int = option(
        "of several ranks, each computes the micro-batch of another one again every so many steps; 0: never",
        500,
        at_least=0,
        metavar="STEPS",
        may_change=True,
    )
    rank_timeout: float = option(
        "a rank that says nothing for so long, or stands still in a step while others wait, ends the run",
        120.0,
        above=0,
        metavar="SECONDS",
        may_change=True,
    )
    resume: bool = option("go on with the run in --run-dir from its last saved state", False, may_change=True)
    other_kernels: bool = option(
        "with --resume, although other kernels compute attention, the loss or products here: the last bits differ from here on",
        False,
        may_change=True,
    )
    log: str | None = option(
        "loggers beside metrics.jsonl: tensorboard, wandb, trackio, mlflow, several with a comma",
        metavar="LOGGERS",
        may_change=True,
    )
    config: str | None = option(
        "TOML, YAML or JSON file with the same names; flags win", metavar="FILE", path=True, may_change=True
    )
    json: bool = json_option()


@dataclass(frozen=True)
class Settings(
    RunSettings,
    SaveSettings,
    EvidenceSettings,
    EvalSettings,
    PreferenceSettings,
    OptimSettings,
    ModelSettings,
    DataSettings,
):
    """Every setting of `apr pretrain`; None means "depends on other settings".

    A room declares the settings that it reads, and its functions take that base class: a Settings is each of them.
    Fields are in the order of the bases from the last to the first."""


def from_command_line(args: Sequence[str]) -> tuple[Settings, dict[str, Any]]:
    """Parse a command line into (settings, values given explicitly: by flag or configuration file)."""
    for name in ("--corpus", "--dataset", "--instruct", "--mix"):
        if sum(arg == name or arg.startswith(f"{name}=") for arg in args) > 1:
            raise UsageError(f"{name} is given twice; several sources are a mixture, --mix: {EXAMPLE}")
    explicit = given(Settings, args, "apr pretrain", __doc__ or "")
    if "config" in explicit:
        explicit = {**read_config(Path(explicit["config"])), **explicit}
    what = {"corpus", "dataset", "instruct", "preferences", "mix", "model", "init"}
    if not explicit.keys() & what and not explicit.get("resume"):
        explicit = {k: v for k, v in DEMO.items() if k != "num_steps" or "epochs" not in explicit} | explicit
    return Settings(**explicit), explicit


def read_config(path: Path) -> dict[str, Any]:
    """Read settings from a TOML, YAML or JSON file, names with - or _; a table holds settings too, whatever it is called.

    Raises InputNotFound, MalformedFile, UsageError: an unknown key or a value of another type."""
    if not path.is_file():
        raise InputNotFound(f"--config {path}: no such file")
    return check(flat(read_table(path), str(path)), str(path))


def flat(table: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Take the settings out of the tables of a file. Raises UsageError: one stands there twice."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        for name, v in value.items() if isinstance(value, dict) else [(key, value)]:
            if (name := str(name).replace("-", "_")) in out:
                raise UsageError(f"{source}: {name} stands there twice")
            out[name] = v
    return out


def check_length(explicit: Mapping[str, Any]) -> None:
    """Raise UsageError for two lengths of a run."""
    if explicit.get("num_steps") is not None and "tokens" in keys_of(explicit.get("mix")):
        raise UsageError(
            "--num-steps and the tokens of --mix both say how long a run is; give weights, or leave --num-steps out"
        )
    if explicit.get("epochs") is not None and explicit.get("num_steps") is not None:
        raise UsageError("--epochs and --num-steps both say how long a run is; give one of them")


def steps_of(epochs: float, windows: int, batch_size: int) -> int:
    """Count the steps of so many passes over the windows."""
    return max(1, math.ceil(epochs * windows / batch_size - 1e-9))


def check(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Check names, types and choices of settings, and make whole numbers float where that is the type.

    Raises UsageError, naming the source."""
    plain, out = field_types(Settings), {}
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    allowed = {name: f.metadata["choices"] for name, f in fields.items()}
    older = {f.metadata["also"].replace("-", "_"): name for name, f in fields.items() if f.metadata["also"]}
    refuse_elsewhere([older.get(key, key) for key in values], choices_of(Settings), source)
    for given_key, value in values.items():
        key = older.get(given_key, given_key)
        if key in out:
            raise UsageError(f"{source}: {key} stands there twice, also by its older name; give it once")
        if key not in plain:
            hint = near(key.replace("_", "-"), choices_of(Settings))
            hint = hint.replace("--", "").replace("-", "_") if "did you mean" in hint else hint
            raise UsageError(
                f"{source}: unknown setting {key!r} = {value!r}{hint}; `apr pretrain --help` lists them"
            )
        if key == "mix" and isinstance(value, list):
            value = as_text(value, source)
        if plain[key] is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if plain[key] is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 1e300 else math.inf  # not finite is refused by `resolve`
        if value is not None and (
            not isinstance(value, plain[key]) or (plain[key] is int and isinstance(value, bool))
        ):
            hint = "; write true or false" if plain[key] is bool else ""
            raise UsageError(f"{source}: {key} = {value!r} is not of type {plain[key].__name__}{hint}")
        if value is not None and allowed[key] and value not in allowed[key]:
            raise UsageError(f"{source}: {key} = {value!r}; choose one of {', '.join(allowed[key])}")
        if value is None and fields[key].default is not None:
            raise UsageError(
                f"{source}: {key} = null; leave the key out for its default, {fields[key].default!r}"
            )
        out[key] = value
    return at_home(Settings, out)


def check_together(s: Settings) -> None:
    """Raise UsageError for settings with which no run can start: a contradiction, a number out of range. Reads no file."""
    # First: the others compute with the numbers.
    check_ranges(Settings, vars(s))
    check_data(s)
    sources_of(s)
    check_model(s)
    if _mode(s) == "finetune" and not s.init:
        raise UsageError("--mode finetune needs --init: a checkpoint to start from")
    check_preferences(s)
    if (s.eval_tasks_every or s.eval_tasks_limit) and not s.eval_tasks:
        raise UsageError("--eval-tasks-every and --eval-tasks-limit are about --eval-tasks; give it too")
    if s.eval_tasks_every % s.eval_every:
        raise UsageError(
            f"--eval-tasks-every {s.eval_tasks_every}: tasks are scored at evaluations; give a multiple of --eval-every "
            f"{s.eval_every}"
        )
    for name in ("instruct", "preferences"):
        if (getattr(s, name) or name in kinds_of(s.mix)) and not s.init:
            raise UsageError(f"--{name} fine-tunes a checkpoint: give it with --init")
    if s.mix and s.epochs is not None:
        raise UsageError(
            "--epochs of a mixture, whose sources differ in length: give --num-steps, or tokens in the place of weights"
        )
    if s.preferences and s.z_loss:
        raise UsageError("--z-loss is a part of the mean loss of tokens; it does not go with --preferences")
    if s.checkpoint_every % s.eval_every:
        raise UsageError(
            f"--checkpoint-every {s.checkpoint_every}: a checkpoint records its validation loss, so it is made at an "
            f"evaluation; give a multiple of --eval-every {s.eval_every}"
        )
    if s.lora_plus != 1 and not _has_adapters(s):
        raise UsageError("--lora-plus is about B of adapters: give --lora-rank or --lora-init too")


def _mode(s: Settings) -> str:
    return s.mode or ("finetune" if s.init else "from-scratch")


def _has_adapters(s: Settings) -> bool:
    return s.lora_rank is not None or s.lora_init is not None


def resolve(s: Settings, explicit: Mapping[str, Any] | None = None) -> Settings:
    """Fill in settings that depend on others. Raises UsageError for a contradiction or a number out of range."""
    check_length(explicit or {})
    check_together(s)
    mode = _mode(s)
    if s.other_kernels and not s.resume:
        raise UsageError(
            "--other-kernels goes on with a run on another kind of GPU or processor: give it with --resume"
        )
    if s.dataset and not s.tokenizer and not tokenizer_beside(Path(s.dataset)).is_dir():
        raise UsageError("--dataset needs --tokenizer: the folder of the tokenizer that made the shards")
    check_names(Settings, vars(s))
    defaults: dict[str, Any] = MODES[mode]
    usual = (LORA_LR if _has_adapters(s) else defaults["lr"]) * (PREFERENCE_SHARE if s.preferences else 1)
    lr = usual if s.lr is None else s.lr
    return dataclasses.replace(
        s,
        mode=mode,
        lr=lr,
        lr_min=0.01 * lr if s.lr_min is None else s.lr_min,
        warmup_steps=_warmup(s, mode) if s.warmup_steps is None and not _is_measured(s) else s.warmup_steps,
    )


def _is_measured(s: Settings) -> bool:
    """Tell a run whose length follows from its data."""
    return s.epochs is not None or "tokens" in keys_of(s.mix)


def _warmup(s: Settings, mode: str) -> int:
    return min(int(MODES[mode]["warmup_steps"]), s.num_steps // 10)


def with_steps(s: Settings, windows: int) -> Settings:
    """Fill in what follows from the number of windows: the steps of --epochs and, of resolved settings, their warm-up."""
    if (steps := steps_of_budgets(s)) is not None and not s.resume:
        s = dataclasses.replace(s, num_steps=steps)
    if s.epochs is not None and not s.resume:
        s = dataclasses.replace(s, num_steps=steps_of(s.epochs, windows, s.batch_size))
    if s.warmup_steps is None and s.mode is not None:
        s = dataclasses.replace(s, warmup_steps=_warmup(s, s.mode))
    return s


def is_due(step: int, every: int) -> bool:
    """Decide whether a step is one of every so many; every 0: each is."""
    return not every or step % every == 0
