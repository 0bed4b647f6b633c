"""Speed of several GPUs, computed: it is what two were measured to be, and says what it assumes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from apr import backends
from apr.cli.main import main
from apr.model.params import Layout
from apr.model.presets import PRESETS
from apr.training import scaling

RECORD = json.loads((Path(__file__).resolve().parents[2] / "bench/gpu/ranks.json").read_text())
ROWS = {row["row"]: row for row in RECORD["rows"] if row["row"].split(":")[0] in PRESETS}


@pytest.mark.parametrize("name", ROWS)
def test_two_gpus_are_as_fast_as_they_were_measured_to_be(name):
    row = ROWS[name]
    layout, alone = (
        Layout(PRESETS[name.split(":")[0]]),
        max(x["ms"] for x in row.get("alone_again", row["alone"])) / 1e3,
    )
    one = scaling.step(layout, alone, 1)
    found = scaling.step(layout, alone - one.update, 2)
    assert found.alone == pytest.approx(alone)
    assert abs(found.efficiency - row["efficiency"]) < 0.01
    # were copies as slow as a network, nobody would see it from here
    assert abs(scaling.step(layout, alone - one.update, 2, 2).efficiency - row["efficiency"]) > 0.01


def test_a_network_and_more_micro_batches_cost_what_they_move():
    layout = Layout(PRESETS["qwen2.5-0.5b"])
    one, fast, slow = (
        scaling.step(layout, 0.2, 64, nodes, gbits=g) for nodes, g in ((1, 400), (8, 400), (8, 100))
    )
    assert one.efficiency > fast.efficiency > slow.efficiency > 0.3
    # At the least a network moves what it has to, behind a backward pass that hides some of it.
    sent = 4 * layout.size * 56 / 64 / (100e9 / 8 * scaling.USED)
    assert slow.exposed > sent - 2 / 3 * 0.2
    once, often = (scaling.step(layout, 0.2, 8, micro_steps=n).sums for n in (1, 4))
    assert often == pytest.approx(once * (4 * 8 - 1) / (8 - 1))
    assert scaling.step(layout, 0.2, 1).efficiency == 1


def test_the_plan_of_several_nodes_says_what_was_measured_and_what_is_assumed(monkeypatch, capsys):
    played = SimpleNamespace(**vars(backends.get("reference")))
    played.name = "cuda"
    monkeypatch.setattr("apr.cli.plan.select", lambda *a: played)
    monkeypatch.setattr("apr.training.plan.matmul_rate", lambda *a: 700e12)
    job = [
        "plan",
        "--model",
        "llama-demo",
        "--batch-size",
        "64",
        "--micro-batch-size",
        "1",
        "--seq-length",
        "64",
    ]
    assert main([*job, "--gpus", "64", "--nodes", "8", "--network-gbits", "100"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "of 64 GPUs on 8 nodes that train alone, computed", "100 Gbit/s of network for each GPU, 85% of it used",
        "700 TFLOP/s here", "326 GB/s between", "NVLink as fast among more than two", "exchange that nothing hides",
    ):  # fmt: skip
        assert words in text
    assert main([*job, "--gpus", "2", "--nodes", "2"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "1.5% of waiting" in text
    assert "NVLink as fast" not in text
    assert main([*job, "--gpus", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scaling"]["alone"] / found["scaling"]["seconds"] == pytest.approx(found["efficiency"])
    assert main([*job, "--gpus", "6", "--nodes", "4"]) == 2
    assert "not equally many on --nodes 4" in capsys.readouterr().err
