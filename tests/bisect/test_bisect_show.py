"""What a comparison looks like: the text says what was found, the picture's data has the fault where it is."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from rich.console import Console

from apr.bisect.picture import DECADES, grid, picture, shade
from apr.bisect.report import EXACT, FORCED, FREE, ArrayComparison, Report
from apr.cli.bisect_tables import print_report

TOL = 1e-5
BLOCK = (("add_rmsnorm_fwd", "norm1"), ("linear_fwd", "qkv"), ("swiglu_fwd", "act"))
CAUSE = "the bias is not added"


def rows(layers, mode, ratio=lambda stage, op, tap: 0.25):
    """Rows of a small model in order of computation; ratio gives error/tolerance of each."""
    out = []

    def add(stage, op, tap, layer=None):
        r = ratio(stage, op, tap)
        cause = CAUSE if mode == FORCED and not r <= 1 else ""
        out.append(
            ArrayComparison(stage, op, tap, mode, r * TOL, TOL, layer, (8, 96), (3, 17), 0.5125, 0.5, cause)
        )

    add("forward", "embedding_fwd", "hidden.0", 0)
    for i in range(layers):
        add("forward", "add_rmsnorm_fwd", f"hidden.{i}", i)
        for op, tap in BLOCK:
            add("forward", op, f"{i}.{tap}", i)
    add("forward", "add_rmsnorm_fwd", f"hidden.{layers}")
    add("loss", "linear_fwd", "logits.0")
    add("loss", "linear_fwd", "logits.64")
    add("backward", "add_rmsnorm_bwd", f"d_hidden.{layers}")
    for i in reversed(range(layers)):
        add("backward", "linear_bwd", f"{i}.d_norm1", i)
        add("backward", "linear_bwd", f"grad.{i}.wqkv", i)
        add("backward", "add_rmsnorm_bwd", f"d_hidden.{i}", i)
    add("backward", "embedding_bwd", "grad.embed")
    add("optimizer", "clip_factor", "factor")
    add("optimizer", "adamw", "m.model.layers.0.mlp.up_proj.weight", 0)
    return out


def report(layers=2, fault=None, ratio=512.0, free=0.25):
    """A Report in which the tap `fault`, if any, is beyond its tolerance by `ratio`, and `free` from there on."""
    out = Report("tiny", ("reference float64", "cpu float32"), "2 x 16 tokens [seed 7]")
    out.rows.append(ArrayComparison("configuration", "field", "rms_norm_eps", EXACT, 0, 0))
    out.add(rows(layers, FORCED, lambda stage, op, tap: ratio if tap == fault else 0.25))
    passed = []

    def drift(stage, op, tap):
        passed.append(tap)
        return free if fault in passed else 0.25

    out.add(rows(layers, FREE, drift))
    out.skipped["data"], out.seconds["forward"] = "no file was given", 1.25
    out.notes.append("slices are judged [see rule.py]")
    return out


def text_of(r, width=80, rows=8, **options):
    out = io.StringIO()
    print_report(r, Console(file=out, width=width, **options), rows)
    return out.getvalue()


def size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_text_of_agreement_has_one_line_with_the_largest_error():
    r = report()
    worst = ArrayComparison("loss", "cross_entropy", "loss_rows", FORCED, 0.75 * TOL, TOL)
    r.rows.insert(3, worst)
    text = text_of(r)
    for part in ("tiny: cpu float32 compared with reference float64", "[seed 7]", "[see rule.py]", "1.2"):
        assert part in text
    assert "no file was given" in text
    assert f"All {len(r.rows)} arrays agree; the largest error is 0.75 of its tolerance" in text
    assert "cross_entropy -> loss_rows (forced)" in text.replace("\n", "").replace("  ", " ")
    assert "DIFFER" not in text
    assert "ault" not in text


@pytest.mark.parametrize("soft_wrap", [False, True])
def test_text_of_a_fault_names_it_and_sums_up_the_drift(soft_wrap):
    r = report(fault="1.qkv", free=40.0)
    text = text_of(r, soft_wrap=soft_wrap)
    block = text[text.index("First fault") : text.index("On its own inputs")]
    for part in ("linear_fwd", "1.qkv, shape 8 x 96", "[3, 17]", "0.5125", "512 times", "1e-05", CAUSE):
        assert part in block
    bad, free = sum(not x.ok for x in r.rows if x.mode == FREE), sum(x.mode == FREE for x in r.rows)
    assert f"{bad} of {free} arrays drift beyond rounding, from 1.qkv on" in text
    assert "Further" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert text.isascii()


def test_text_has_colours_only_on_a_terminal():
    assert "\x1b[" in text_of(
        report(fault="1.qkv"), force_terminal=True, color_system="standard", _environ={}
    )


def test_text_lists_further_faults_up_to_a_number():
    r = report(layers=12)
    r.rows = [
        x
        if "qkv" not in x.tap or x.mode == FREE
        else ArrayComparison(x.stage, x.op, x.tap, FORCED, 1.0, TOL, x.layer)
        for x in r.rows
    ]
    guilty = len(r.guilty)
    text = text_of(r, rows=3)
    assert "Further faults" in text
    assert f"and {guilty - 4} more" in text
    assert "layer 3 linear_fwd -> 3.qkv" in text
    assert "layer 4 linear_fwd -> 4.qkv" not in text
    assert f"and {guilty - 1} more" in text_of(r, rows=0)


def test_text_says_so_when_only_the_drift_is_beyond():
    text = text_of(report(fault="1.qkv", ratio=0.5, free=30.0))
    assert "Each op that was judged on the reference's inputs agrees" in text
    assert "First beyond its tolerance" in text


def test_text_of_odd_reports():
    assert "Nothing was compared" in text_of(Report("m", ("a", "b"), ""))
    r = Report(
        "m",
        ("a", "b"),
        "",
        [ArrayComparison("configuration", "field", "window", EXACT, float("inf"), 0, got="[1]")],
    )
    assert "not equal" in text_of(r)
    assert "[1]" in text_of(r)
    assert "not finite" in text_of(report(fault="0.act", ratio=float("nan")))


def test_grid_has_the_fault_where_it_is():
    r = report(fault="1.qkv", free=40.0)
    columns, layers, matrix = grid(r, FORCED)
    assert layers == [0, 1, None]
    (red,) = np.argwhere(shade(matrix) > 0)
    assert layers[red[0]] == 1
    assert columns[red[1]] == ("forward", "linear_fwd", "qkv")
    assert matrix[tuple(red)] == 512
    same, _, free = grid(r, FREE)
    assert same == columns
    assert (free > 1).sum() > 1
    assert not (free[0, : red[1]] > 1).any()


def test_grid_columns_are_in_order_of_computation():
    columns, _, matrix = grid(report(), FORCED)
    names = [c.tap for c in columns]
    assert names[:5] == ["hidden", "hidden", "norm1", "qkv", "act"]
    assert names[5:] == ["logits", "d_norm1", "d_hidden", "wqkv", "embed", "factor", "m"]
    assert [c.group for c in columns if c.tap in ("wqkv", "embed")] == ["gradients"] * 2
    assert np.isnan(matrix[:2, names.index("logits")]).all()
    assert matrix[2, names.index("logits")] == 0.25
    assert matrix[0, names.index("m")] == 0.25


def test_grid_takes_the_worst_of_a_cell():
    r = report(fault="logits.0", ratio=7.0)
    columns, layers, matrix = grid(r, FORCED)
    assert matrix[layers.index(None), [c.tap for c in columns].index("logits")] == 7


def test_shade_breaks_at_the_tolerance():
    out = shade(np.array([0, 1e-9, 1, np.nextafter(1, 2), 1e9, np.inf, np.nan]))
    assert out[0] == out[1] == -DECADES
    assert out[2] < 0 < out[3]
    assert out[4] == DECADES < out[5]
    assert np.isnan(out[6])


@pytest.mark.parametrize("layers", [1, 2, 48])
def test_picture_grows_with_the_model_and_repeats(layers, tmp_path):
    for name in "ab":
        picture(report(layers, fault="0.qkv", free=float("inf")), tmp_path / name)
    assert size(tmp_path / "a") == size(tmp_path / "b")
    width, height = size(tmp_path / "a")
    assert 900 <= width <= 2400
    assert 400 <= height <= 2400
    assert height > layers * 15


def test_pictures_of_odd_reports(tmp_path):
    whole = report(fault="1.qkv", ratio=float("nan"))
    parts = [[], whole.rows[:1], *([x for x in whole.rows if x.stage == s] for s in ("loss", "optimizer"))]
    parts += [[x for x in whole.rows if x.mode == m] for m in (FORCED, FREE)]
    parts += [
        [
            ArrayComparison(
                "forward", "linear_fwd", "3.qkv", EXACT, float("inf"), 0.0, 3, cause="costs $x_{ and $ " * 20
            )
        ]
    ]
    parts += [[ArrayComparison("data", "field", "tokens", EXACT, float("inf"), 0.0), *report(1).rows]]
    for i, part in enumerate(parts):
        r = Report("a $name$ that is long " * 20, whole.sides, whole.batch, part)
        picture(r, tmp_path / f"{i}.png")
        assert size(tmp_path / f"{i}.png")[0] >= 900, i
        text_of(r)
