"""Settings that nobody named are those of the documentation, and a run ends where its settings say."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from apr.common.provenance import code_sha256
from apr.evidence import unsaid
from apr.evidence.asked import OF_THE_PROCESS
from apr.evidence.judge import ended_as_asked
from apr.training.settings import Settings, resolve, with_steps

ROOT = Path(__file__).resolve().parents[2]
NAMED = {
    "nothing": {},
    "a tuning": {"init": "x.apr"},
    "adapters": {"init": "x.apr", "lora_rank": 4},
    "adapters on pairs": {"init": "x.apr", "lora_rank": 4, "preferences": "p.jsonl", "corpus": None},
    "a short run": {"num_steps": 7},
    "a rate": {"lr": 1e-3},
    "a floor and a mode": {"lr_min": 0.0, "init": "x.apr", "mode": "from-scratch"},
    "passes": {"epochs": 2.0},
}


def wrong(settings, named):
    s = dataclasses.asdict(settings)
    return [name for name, got, want in unsaid.defaults(s, named) if got != want]


def asked(**named):
    named = {"corpus": "text", **({} if "init" in named else {"model": "llama-tiny"}), **named}
    return with_steps(resolve(Settings(**named), named), 300), named


@pytest.mark.parametrize("named", NAMED.values(), ids=NAMED)
def test_settings_that_nobody_named_are_the_documented_ones(named):
    assert not wrong(*asked(**named))


@pytest.mark.parametrize(
    "changed", [{"weight_decay": 0.01}, {"lr": 1e-4}, {"lr_min": 3e-5}, {"warmup_steps": 200}, {"seed": 1}, {"mode": "finetune"}]
)  # fmt: skip
def test_a_default_that_changed_is_named(changed):
    settings, named = asked()
    assert wrong(dataclasses.replace(settings, **changed), named)[:1] == [*changed]


def test_defaults_that_count_are_all_stated_as_the_page_has_them():
    page = (ROOT / "docs" / "commands" / "pretrain.md").read_text()
    for f in dataclasses.fields(Settings):
        is_plain = f.default is not None and not f.metadata["may_change"] and f.name not in OF_THE_PROCESS
        assert is_plain == (f.name in unsaid.DEFAULTS), f.name
    for name, value in unsaid.DEFAULTS.items():
        flag = name.replace("_", "-")
        row = re.search(rf"^\| `--(?:no-)?{flag}`.*$", page, re.MULTILINE)
        assert row, name
        if not isinstance(value, bool) and value:
            assert float_or_text(row[0].split("|")[3].strip().strip("`")) == value, name


def float_or_text(text):
    try:
        return float(text)
    except ValueError:
        return text


def log(*losses, every=2):
    return [{"step": every * k, "val_loss": x} for k, x in enumerate(losses)]


def config(**settings):
    usual = {
        "num_steps": 8, "batch_size": 4, "on_exhausted": "cycle", "min_epochs": 2, "patience": 1, "target_val_loss": None,
        "eval_every": 2,
    }  # fmt: skip
    return {"settings": usual | settings, "data": {"train_windows": 27}}


SOUND = {
    "all steps": (log(5, 4, 3, 2, 1), config(), "DONE"),
    "no better one for two evaluations": (log(5, 4, 3, 4, 3), config(), "EARLY_STOP"),
    "at the least number of evaluations": (log(1, 2, 3), config(patience=0), "EARLY_STOP"),
    "the target": (log(5, 2, 1), config(target_val_loss=2.5), "TARGET_REACHED"),
    "the end of a pass": (
        [*log(5, 4, 3, 2), {"step": 6, "val_loss": 2}], config(on_exhausted="stop", patience=9), "DONE",
    ),
    "the target at the end of a pass, by an older version": (
        [*log(5, 4, 3), {"step": 6, "val_loss": 2}], config(on_exhausted="stop", eval_every=4, target_val_loss=2.5), "DONE",
    ),
    "the target at the end of a pass": (
        [*log(5, 4, 3), {"step": 6, "val_loss": 2}], config(on_exhausted="stop", eval_every=4, target_val_loss=2.5),
        "TARGET_REACHED",
    ),
    "one step": (log(5, 4, every=1), config(num_steps=1, patience=0), "DONE"),
}  # fmt: skip
FAULTS = {
    "an evaluation too early": (log(5, 4, 3, 4), config(), "EARLY_STOP"),
    "an evaluation too late": (log(5, 4, 3, 4, 4), config(num_steps=10), "DONE"),
    "before the least number": (log(5, 2), config(target_val_loss=2.5), "TARGET_REACHED"),
    "a batch before the end of a pass": (log(5, 4, 3), config(on_exhausted="stop", patience=9), "DONE"),
    "past the target at an evaluation that is due": (
        [*log(5, 4, 3), {"step": 6, "val_loss": 2}],
        config(on_exhausted="stop", target_val_loss=2.5),
        "DONE",
    ),
    "past the target at the end of a pass, by this version": (
        [*log(5, 4, 3), {"step": 6, "val_loss": 2}],
        config(on_exhausted="stop", eval_every=4, target_val_loss=2.5) | {"code_sha256": code_sha256()},
        "DONE",
    ),
    "steps left": (log(5, 4, 3), config(), "DONE"),
    "another word": (log(5, 4, 3, 2, 1), config(), "EARLY_STOP"),
}


@pytest.mark.parametrize("case", SOUND.values(), ids=SOUND)
def test_a_run_that_ends_where_its_settings_say(case):
    assert ended_as_asked(*case).passed


@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS)
def test_a_run_that_ends_elsewhere(case):
    assert ended_as_asked(*case).passed is False
