"""The catalogue of planted faults: bisect finds each and names the op, and so do the checks that keep the rest of the
project right, in every family.

Those are the functions that test_model.py and test_golden.py call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from re import fullmatch

import numpy as np
import pytest

import batch_checks
import data_cases
from apr import backends
from apr.bisect.planted import catalogue
from apr.bisect.planted.fault import DATA, LAYOUT, Fault
from apr.bisect.planted.faults import FAULTS
from apr.model.families import FAMILIES
from apr.model.presets import PRESETS
from apr.tokenizer.training import train_tokenizer
from cases import Backend
from checks import (
    END,
    GOLDEN,
    Build,
    batch_for,
    golden,
    golden_config,
    off_adamw,
    off_golden,
    off_truth,
    on,
    randomised,
    results,
    step,
    wrong_gradients,
)
from faults import planted
from precision import differing

reference, cpu = backends.get("reference"), backends.get("cpu")
ON_MODELS = [fault for fault in FAULTS.values() if fault.seen_by != DATA]


def off_repeated(build: Build, path: Path) -> list[str]:
    """What differs between a step, the same again, and the same as a recorded pass."""
    model = build(golden_config(path), "float32")
    first = results(randomised(model))
    again = differing(first, results(model))
    ids, targets = batch_for(model)
    for _ in range(3):
        model.be.fill(model.g, 0)
        model.be.fill(model.total, 0)
        model.micro_step(ids, targets, 1 / int((targets >= 0).sum()))
    recorded = {f"grad.{n}": model.be.to_host(g) for n, g in model.layout.named(model.g).items()}
    return again + differing(recorded, {n: x for n, x in first.items() if n != "loss"})


def off_in_parts(build: Build, path: Path) -> list[str]:
    """Gradients that are not the sum of those of each sequence, in float64."""
    model = randomised(build(golden_config(path), "float64"))
    ids, targets = batch_for(model)
    step(model, ids, targets)
    whole = {n: g.copy() for n, g in model.layout.named(model.g).items()}
    scale = 1 / int((targets >= 0).sum())
    for i in range(len(ids)):  # the first overwrites the gradients of the whole
        model.micro_step(ids[i : i + 1], targets[i : i + 1], scale, graph=False, begins=i == 0)
    parts = model.layout.named(model.g)
    return [n for n, g in whole.items() if not np.abs(parts[n] - g).max() <= 1e-12 + 1e-9 * np.abs(g).max()]


def off_names(build: Build, path: Path) -> list[str]:
    """Parameters that only one of a model and its golden file has."""
    stored = {n.removeprefix("weight.") for n in golden(path)[0] if n.startswith("weight.")}
    return sorted(stored ^ set(build(golden_config(path), "float64").layout.by_hf))


def red(plant: Callable[[Backend], Build], path: Path, only: frozenset[str] | None = None) -> set[str]:
    """Which checks find something off in the model of a golden file. Each must find it on both backends that it is
    run on, or on none."""
    cfg = golden_config(path)
    runs: dict[str, list[Callable[[], list[str]]]] = {
        "gradient": [lambda: wrong_gradients(plant(reference), cfg, most=1)],
        "truth": [lambda: off_truth(plant(cpu), cfg), lambda: off_truth(plant(cpu), cfg, force=True)],
        "golden": [lambda b=b: off_golden(plant(b[0]), path, b[1]) for b in SOUND],
        "adamw": [lambda b=b: off_adamw(plant(b[0]), path, b[1]) for b in SOUND],
        "repeat": [lambda: off_repeated(plant(cpu), path)],
        "micro": [lambda: off_in_parts(plant(reference), path)],
        "layout": [lambda: off_names(plant(reference), path)],
    }
    found = {check: [f() for f in fs] for check, fs in runs.items() if only is None or check in only}
    for check, lists in found.items():
        assert all(lists) or not any(lists), (check, lists)
    return {check for check, lists in found.items() if all(lists)}


SOUND = [(reference, "float64"), (cpu, "float32")]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_green_without_a_fault(path: Path) -> None:
    assert red(on, path) == set()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_green_with_documents_and_without_a_fault(path: Path) -> None:
    def masked(be: Backend) -> Build:
        return lambda cfg, dtype, **options: on(be)(cfg, dtype, document_end=END, **options)

    assert red(masked, path, frozenset({"gradient", "truth", "repeat", "micro"})) == set()


SEEN = [(fault, path) for fault in ON_MODELS for path in GOLDEN if fault.applies(golden_config(path))]
CHECKS = frozenset({"gradient", "truth", "golden"})


@pytest.mark.parametrize(("fault", "path"), SEEN, ids=lambda x: getattr(x, "stem", getattr(x, "name", "")))
def test_red_with_a_fault(fault: Fault, path: Path) -> None:
    """Exactly the checks that the catalogue names; those of the optimizer and of state are run where they are named.
    Golden files have no documents."""
    checks = fault.seen_by if fault.seen_by == LAYOUT else CHECKS | fault.seen_by
    if fault.documents:
        checks -= {"golden"}
    assert red(lambda be: planted(fault, be), path, checks) == fault.seen_by


def test_every_fault_is_planted_somewhere() -> None:
    assert {fault.name for fault, _ in SEEN} == {fault.name for fault in ON_MODELS}
    assert {golden_config(path).family for path in GOLDEN} == set(FAMILIES)


ORDER = {  # of the data: the tests that see it
    "targets_are_the_ids": batch_checks.test_windows_predict_each_token_once,
    "a_token_lost_between_windows": batch_checks.test_windows_predict_each_token_once,
    "half_of_the_windows_twice": batch_checks.test_a_pass_reads_every_window_once,
}


@pytest.mark.parametrize("name", ORDER)
def test_the_tests_of_data_see_wrong_order(name: str, tmp_path: Path) -> None:
    tok = train_tokenizer([d.text for d in data_cases.corpus()], 400, tmp_path / "tok")
    ORDER[name](tok, tmp_path / "sound")
    with FAULTS[name].patch(), pytest.raises(AssertionError):
        ORDER[name](tok, tmp_path / "faulty")


def test_data_faults_are_those() -> None:
    assert set(ORDER) == {fault.name for fault in FAULTS.values() if fault.seen_by == DATA}


# Bisect


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", catalogue.TINY)
def test_bisect_finds_nothing_in_a_sound_side(name: str, dtype: str, documents: bool) -> None:
    sound = replace(FAULTS["loss_in_bits"], ops=lambda be: {}, applies=lambda c: True, documents=documents)
    report = catalogue.bisect(sound, cpu if dtype == "float32" else reference, dtype, name)
    assert report.agree, report.guilty[:3]
    assert {
        s
        for s in ("configuration", "upload", "forward", "loss", "backward", "optimizer", "state")
        if report.of(s)
    }
    assert len(report.rows) > 250
    assert ("doc_start" in {r.tap for r in report.of("upload")}) is documents


@pytest.mark.parametrize("fault", FAULTS.values(), ids=lambda f: f.name)
def test_bisect_names_the_op(fault: Fault) -> None:
    """Beside the cpu backend, the reference with a fault too: what is found does not depend on the precision."""
    models = [name for name in catalogue.TINY if fault.applies(PRESETS[name])]
    for be, dtype, name in [(cpu, "float32", models[0]), (reference, "float64", models[-1])]:
        row = catalogue.bisect(fault, be, dtype, name).first
        assert row is not None, (be.name, name)
        assert catalogue.Planted(fault, name, row, 0.0).is_named, (be.name, name, row)


def test_the_catalogue_is_long_enough_and_says_what_each_fault_does() -> None:
    assert len(FAULTS) >= 45
    for fault in FAULTS.values():
        assert len(fault.what) > 20, fault.name
        assert not fullmatch(fault.named.tap, ""), fault.name
        assert fault.seen_by, fault.name
