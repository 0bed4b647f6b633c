"""Know the words of other trainers, for ours: what a setting that does not exist may mean."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from .errors import UsageError

# Commands of other programs, for ours.
OTHER_COMMANDS = {
    "train": "pretrain", "finetune": "pretrain", "sft": "pretrain", "dpo": "pretrain", "generate": "run", "chat": "run",
    "convert": "import", "quantize": "export",
}  # fmt: skip
# Flags of other trainers, for ours.
ELSEWHERE = {
    "learning-rate": "lr", "max-steps": "num-steps", "num-train-epochs": "epochs", "num-epochs": "epochs",
    "per-device-train-batch-size": "micro-batch-size", "output-dir": "run-dir", "model-name-or-path": "init",
    "base-model": "init", "max-seq-length": "seq-length", "max-length": "seq-length", "sequence-len": "seq-length",
    "max-grad-norm": "grad-clip", "lr-scheduler-type": "schedule", "eval-steps": "eval-every", "save-steps": "save-every",
    "save-total-limit": "keep-checkpoints", "report-to": "log", "lora-r": "lora-rank", "lora-target-modules": "lora-targets",
    "use-rslora": "lora-rslora", "use-dora": "lora-dora", "modules-to-save": "lora-modules-to-save",
    "loraplus-lr-ratio": "lora-plus",
    "train-file": "corpus", "datasets": "instruct", "gradient-checkpointing": "recompute", "adam-beta1": "beta1",
    "micro-batch": "micro-batch-size", "cutoff-len": "seq-length", "lora-target": "lora-targets",
    "lora-target-linear": "lora-targets",
    "val-set-size": "val-fraction", "val-size": "val-fraction", "lr-scheduler": "schedule", "warmup-ratio": "warmup-steps",
    "early-stopping-patience": "patience", "dataset-num-proc": "threads", "logging-dir": "log", "pref-beta": "beta",
    "pref-loss": "preference-loss", "loss-type": "preference-loss",
    "max-iters": "num-steps", "iters": "num-steps", "steps": "num-steps", "total-steps": "num-steps", "block-size": "seq-length",
    "context-length": "seq-length", "bs": "batch-size", "wd": "weight-decay", "warmup-iters": "warmup-steps",
    "eval-interval": "eval-every", "out-dir": "run-dir", "init-from": "init", "pretrained": "init", "data": "corpus",
    "adam-beta2": "beta2", "data-seed": "seed", "data-mixture": "mix", "data-path": "mix", "streams": "mix", "mixture": "mix",
}  # fmt: skip

STEP = "--batch-size counts the sequences of a whole step, --micro-batch-size those that are computed at once"
INT8 = {
    "lora-base int8": "--lora-base int8 keeps frozen matrices in 8 bits",
    "dtype int8": "--dtype int8 rounds matrices to 8 bits",
}
WINDOWS = {"num-steps": "examples share windows always"}
PROMPTS = {"num-steps": "prompts are never trained on"}
SIZES = {"model": "--model takes a config.json with the sizes of a model"}
RESUME = {"resume": "--resume goes on with the run in --run-dir"}
ADAPTERS = {"lora-rank": "--lora-rank trains adapters"}
# Settings of other trainers that are none here: an option that a command has, with its value, and what it then says.
INSTEAD: dict[str, dict[str, str]] = {
    "gradient-accumulation-steps": {"micro-batch-size": STEP}, "grad-accum-steps": {"micro-batch-size": STEP},
    "load-in-4bit": INT8, "load-in-8bit": INT8,
    "bf16": {"dtype bfloat16": "--dtype bfloat16"},
    "fp16": {"dtype float16": "--dtype float16", "dtype bfloat16": "--dtype bfloat16"},
    "packing": WINDOWS, "sample-packing": WINDOWS, "train-on-inputs": PROMPTS, "train-on-prompt": PROMPTS,
    "finetuning-type": ADAPTERS, "adapter": ADAPTERS,
    "max-new-tokens": {"max-tokens": "did you mean --max-tokens?", "num-steps": "--max-tokens of apr run"},
    "do-sample": {"temperature": "--temperature 0 takes the likeliest token"},
    "stage": {"instruct": "--instruct, --preferences or --corpus says which"},
    "resume-from-checkpoint": RESUME, "resume-from": RESUME, "load-checkpoint": RESUME,
    "n-layer": SIZES, "n-head": SIZES, "n-embd": SIZES, "num-layers": SIZES, "num-hidden-layers": SIZES, "hidden-size": SIZES,
    "do-train": {"num-steps": "apr pretrain trains"},
}  # fmt: skip


def near(name: str, names: Mapping[str, Sequence[str]]) -> str:
    """Suggest the option that a name, written with -, may mean: "; did you mean --lr?", what takes its place, or "".

    names: the options of the command, each with its only values or ()"""
    if name not in names:
        for needed, advice in INSTEAD.get(name, {}).items():
            other, _, value = needed.partition(" ")
            if other in names and (not value or value in names[other]):
                return f"; {advice}"
    other = ELSEWHERE.get(name, "")
    found = [other] if other in names else difflib.get_close_matches(name, names, 1, 0.7)
    return f"; did you mean --{found[0]}?" if found else ""


def refuse_elsewhere(keys: list[str], names: Mapping[str, Sequence[str]], source: str) -> None:
    """Raise UsageError for several keys that are none of ours, as a file of another trainer has them: all of them at once.

    names: as for near"""
    unknown = [key for key in keys if key.replace("_", "-") not in names]
    if len(unknown) < 2:
        return
    hints = {key: near(key.replace("_", "-"), names).removeprefix("; ") for key in unknown}
    meant = [f"{key}: {hint.removeprefix('did you mean --').removesuffix('?').replace('-', '_') if 'did you' in hint else hint}"
             for key, hint in hints.items() if hint]  # fmt: skip
    rest = [key for key, hint in hints.items() if not hint]
    raise UsageError(
        f"{source}: {len(unknown)} unknown settings{'. Here they are ' + '; '.join(meant) if meant else ''}"
        f"{'. No such setting: ' + ', '.join(rest) if rest else ''}. `apr pretrain --help` lists the settings"
    )
