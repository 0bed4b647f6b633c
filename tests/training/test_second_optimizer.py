"""SGD with momentum in the place of AdamW: saved, hashed, resumed, followed, verified and bisected by its names alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from apr import backends
from apr.backends import contract, reference
from apr.bisect import batch as batches
from apr.bisect import stages
from apr.bisect.planted import catalogue
from apr.checkpoints.apr2 import read_apr
from apr.cli.main import main
from apr.model.optim import OPTIMIZERS, Optimizer, OptimSettings, State
from apr.model.presets import PRESETS
from run_cases import cache, place, pretrain  # noqa: F401

cpu = backends.get("cpu")
ROW = "sgd: w out N, master inplace32 N, u inplace32 N, g in32 N, factor in64+ 1, lr float, momentum float, decay float; each N"


def sgd(w: Any, master: Any, u: Any, g: Any, factor: Any, lr: float, momentum: float, decay: float) -> None:
    """u = momentum u + factor g;  master -= lr (u + decay master);  w = master"""
    num = master.dtype.type
    u[...] = num(momentum) * u + num(factor[0]) * g
    master -= num(lr) * (u + num(decay) * master)
    w[...] = master


@dataclass(eq=False, repr=False, kw_only=True)
class SGD(Optimizer):
    """SGD with momentum (Polyak 1964).  u: decaying sum of past gradients."""

    beta1: float = OptimSettings.beta1
    moments: ClassVar[dict[str, int]] = {"u": 1}

    def update(self, part: slice, lr: float, decay: float) -> None:
        arrays = self.w[part], self.master[part], self.state["u"][part], self.g[part], self.factor
        self.be.sgd(*arrays, lr, self.beta1, decay)  # type: ignore[attr-defined]

    def next_state(self, state: State, g: np.ndarray) -> State:
        return {"u": self.beta1 * state["u"] + g}

    def direction(self, w: np.ndarray, state: State, decay: Any) -> np.ndarray:
        d: np.ndarray = state["u"] + decay * w
        return d


def forgetful(
    w: Any, master: Any, u: Any, g: Any, factor: Any, lr: float, momentum: float, decay: float
) -> None:
    """sgd with half of its momentum."""
    sgd(w, master, u, g, factor, lr, momentum / 2, decay)


@pytest.fixture(autouse=True)
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD is the optimizer that runs choose, and its op is one of the contract."""
    monkeypatch.setitem(contract.OPS, "sgd", contract.Op.read(ROW))
    for backend in (reference, cpu):
        monkeypatch.setattr(backend, "sgd", sgd, raising=False)
    monkeypatch.setitem(OPTIMIZERS, "adamw", SGD)


def states(run: Any) -> dict[str, bytes]:
    file = read_apr(run / "ckpt" / "state" / "step-000006.apr")
    return {name: np.asarray(x).tobytes() for name, x in file.tensors.items()}


def test_a_run_is_saved_hashed_resumed_and_verified(place: Any, tmp_path: Any, capsys: Any) -> None:
    run = tmp_path / "run"
    assert pretrain(place, run, "--spot-check", "-1", "--lr", "0.1") == 0
    saved = states(run)
    assert {name.split(".")[1] for name in saved if name.startswith("optimizer.")} == {"u"}
    gates = {g["id"]: g["verdict"] for g in json.loads((run / "verdict.json").read_text())["gates"]}
    assert gates["run.learning-rate"] == "PASS"
    assert main(["verify", str(run), "--replay", "3", "--backend", "none"]) == 0
    again = tmp_path / "again"
    shutil.copytree(run, again)
    (again / "ckpt" / "state" / "step-000006.apr").unlink()
    for path in (again / "ckpt").glob("epoch-002*"):
        path.unlink()
    assert main(["pretrain", "--resume", "--run-dir", str(again)]) == 0
    assert states(again) == saved
    capsys.readouterr()


def test_its_state_is_not_taken_for_that_of_another(place: Any, tmp_path: Any, capsys: Any) -> None:
    run = tmp_path / "run"
    assert pretrain(place, run, "--spot-check", "-1", "--lr", "0.1") == 0
    (run / "ckpt" / "state" / "step-000006.apr").unlink()

    class Other(SGD):
        moments: ClassVar[dict[str, int]] = {}

    with pytest.MonkeyPatch.context() as m:
        m.setitem(OPTIMIZERS, "adamw", Other)
        assert main(["pretrain", "--resume", "--run-dir", str(run)]) == 5
    assert "optimizer.u.*, which Other does not keep" in capsys.readouterr().err


def test_the_gate_of_the_learning_rate_follows_its_formula(
    place: Any,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.setattr(cpu, "sgd", forgetful)
    assert pretrain(place, tmp_path / "run", "--spot-check", "-1") == 6
    assert "run.learning-rate" in capsys.readouterr().err


@pytest.mark.parametrize("op", [sgd, forgetful])
def test_bisect_looks_at_its_op_and_at_its_step(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "sgd", op)
    cfg, shape = PRESETS["qwen2-tiny"], (2, 5)
    side = stages.Side(cpu, cfg, "float32")
    model = side.model(catalogue.weights_of(cfg), shape)
    watch = stages.forced(cfg, model, batches.at_random(cfg, shape, 0), optimizer=True)
    rows = [r for r in watch.rows if r.op == "sgd"]
    assert {r.tap.split(".")[0] for r in rows} == {"w", "master", "u"}
    assert all(r.ok for r in rows) == (op is sgd)
    assert [r.op for r in watch.rows if not r.ok and r.op != "sgd"] == []
    model.be.from_host(model.g, np.random.default_rng(0).standard_normal(model.g.size, np.float32))
    whole = stages.optimizer_steps(model)
    assert {r.op for r in whole} == {"SGD.step", "clip_factor"}
    assert all(r.ok for r in whole)  # the first step has no momentum yet
