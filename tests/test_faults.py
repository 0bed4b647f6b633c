"""The checks that keep the rest of the project right turn red when something is wrong, in every family.

They are the functions that test_model.py and test_golden.py call.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from apr import backends
from cases import Backend
from checks import GOLDEN, Build, golden_config, off_adamw, off_golden, off_truth, on, wrong_gradients
from faults import ADAMW, FAULTS, Fault

reference, cpu = backends.get("reference"), backends.get("cpu")


def red(plant: Callable[[Backend], Build], path: Path, optimizer: bool = True) -> set[str]:
    """Which checks find something off in the model of a golden file. Each must find it on both backends that it is
    run on, or on none."""
    cfg = golden_config(path)
    runs = {
        "gradient": [wrong_gradients(plant(reference), cfg)],
        "truth": [off_truth(plant(cpu), cfg), off_truth(plant(cpu), cfg, force=True)],
        "golden": [off_golden(plant(reference), path, "float64"), off_golden(plant(cpu), path, "float32")],
    }
    if optimizer:
        runs["adamw"] = [off_adamw(plant(reference), path, "float64"), off_adamw(plant(cpu), path, "float32")]
    for check, found in runs.items():
        assert all(found) or not any(found), (check, found)
    return {check for check, found in runs.items() if all(found)}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_green_without_a_fault(path: Path) -> None:
    assert red(on, path) == set()


SEEN = [(fault, path) for fault in FAULTS.values() for path in GOLDEN if fault.applies(golden_config(path))]


@pytest.mark.parametrize(("fault", "path"), SEEN, ids=lambda x: getattr(x, "stem", getattr(x, "name", "")))
def test_red_with_a_fault(fault: Fault, path: Path) -> None:
    assert red(fault.planted, path, optimizer=fault.seen_by == ADAMW) == fault.seen_by


def test_every_fault_is_planted_somewhere() -> None:
    assert {fault.name for fault, _ in SEEN} == set(FAULTS)
    assert {golden_config(path).family for path in GOLDEN} == {"llama", "mistral", "qwen2", "qwen3"}
