"""The tools that look inside: each finds a planted fault, and the right one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apr import backends
from apr.bisect.planted.fault import Fault
from apr.bisect.planted.faults import FAULTS
from apr.model.taps import Compare, Finite, Record, Stats, key, no_tap
from cases import overlay
from checks import CONFIGS, batch, on, randomised, step
from faults import planted

reference = backends.get("reference")
CFG = CONFIGS["qwen3"]


def record(be: Any = reference) -> dict[str, np.ndarray]:
    tap = Record(be)
    step(randomised(on(be)(CFG, "float64")), *batch(CFG), tap)
    return tap.seen


def test_names() -> None:
    assert key(3, "qkv") == "3.qkv"
    assert key(None, "logits") == "logits"
    no_tap(0, "qkv", None)


def test_record_keeps_copies_in_order_of_computation() -> None:
    tap, x = Record(reference), np.ones(3)
    tap(0, "qkv", x)
    x[...] = 2
    tap(None, "logits", x)
    assert list(tap.seen) == ["0.qkv", "logits"]
    assert tap.seen["0.qkv"].tolist() == [1, 1, 1]


def test_taps_do_not_change_what_is_computed() -> None:
    seen = record()
    model = randomised(on(reference)(CFG, "float64"))
    step(model, *batch(CFG))
    for name, gradient in model.layout.named(model.g).items():
        assert np.array_equal(gradient, seen[f"grad.{name}"])


def test_compare_finds_no_difference_where_there_is_none() -> None:
    compare = Compare(reference, record(), force=False)
    step(randomised(on(reference)(CFG, "float64")), *batch(CFG), compare)
    assert {err for _, err, _ in compare.rows} == {0.0}
    assert [name for name, _, _ in compare.rows] == list(record())


GUILTY = {  # fault: taps that are off when everything before them is put right, in every block
    "rope_off_by_a_thousandth": {"q_rope", "k_rope", "d_qk"},
    "gate_and_up_swapped": {"act", "d_gu"},
    "qk_norm_skipped": {"qk", "d_qkv"},
    "mask_shows_the_next_token": {"lse", "att", "d_q_rope", "d_k_rope", "d_v"},
}


@pytest.mark.parametrize("fault", [FAULTS[name] for name in GUILTY], ids=lambda f: f.name)
def test_compare_forced_names_the_guilty_op_and_free_the_first_victim(fault: Fault) -> None:
    want = record()
    off = {}
    for force in (False, True):
        compare = Compare(reference, want, force)
        step(randomised(planted(fault, reference)(CFG, "float64")), *batch(CFG), compare)
        off[force] = [name for name, err, largest in compare.rows if not err <= 1e-9 * largest]
    blocks = [name for name in off[True] if not name.startswith("grad.")]
    assert set(blocks) == {f"{i}.{name}" for i in range(CFG.num_layers) for name in GUILTY[fault.name]}
    assert (
        off[False][0] == off[True][0] == f"0.{next(n for n in want_order(want) if n in GUILTY[fault.name])}"
    )
    assert len(off[False]) > len(want) / 2


def want_order(want: dict[str, np.ndarray]) -> list[str]:
    """Names of block 0 in order of computation."""
    return [name.removeprefix("0.") for name in want if name.startswith("0.")]


def test_compare_shows_nan_and_wrong_shapes_as_nan() -> None:
    want = {"0.qkv": np.ones(3), "0.att": np.ones(3), "0.gu": np.array([1, np.nan, 1])}
    compare = Compare(reference, want, force=False)
    compare(0, "qkv", np.array([1, np.nan, 1]))
    compare(0, "att", np.ones((1, 3)))
    compare(0, "gu", np.ones(3))
    assert all(np.isnan(err) for _, err, _ in compare.rows)
    with pytest.raises(KeyError):
        compare(1, "qkv", np.ones(3))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_finite_names_the_first_array_that_is_not(value: float) -> None:
    tap = Finite(reference)
    step(randomised(on(reference)(CFG, "float64")), *batch(CFG), tap)
    assert tap.first is None
    calls = [0]

    def swiglu_fwd(y: Any, gu: Any) -> None:
        reference.swiglu_fwd(y, gu)
        calls[0] += 1
        if calls[0] == 2:  # the second block
            y[3, 4] = value

    be: SimpleNamespace = overlay(reference, swiglu_fwd=swiglu_fwd)
    with np.errstate(all="ignore"):
        step(randomised(on(be)(CFG, "float64")), *batch(CFG), tap)
    assert tap.first == "1.act"


def test_stats_are_root_mean_square_and_largest_magnitude() -> None:
    tap = Stats(reference)
    tap(0, "qkv", np.array([[3.0, -4.0]], np.float32))
    assert tap.rows["0.qkv"] == (np.sqrt(12.5), 4.0)
    fault = FAULTS["gradient_summed_not_averaged"]
    right, wrong = Stats(reference), Stats(reference)
    for build, tap in ((on(reference), right), (planted(fault, reference), wrong)):
        step(randomised(build(CFG, "float64")), *batch(CFG), tap)
    ratios = {name: wrong.rows[name][0] / right.rows[name][0] for name in right.rows}
    counted = int((batch(CFG)[1] >= 0).sum())
    assert all(np.isclose(r, counted if "d_" in n or "grad." in n else 1) for n, r in ratios.items())
