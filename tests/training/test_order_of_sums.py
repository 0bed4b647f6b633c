"""Gradients are sums over the micro-batches of a step, in order; older runs go on in their own order."""

from __future__ import annotations

import json

import numpy as np
import pytest

from apr.checkpoints.apr2 import read_apr
from apr.cli.main import main
from apr.model.transformer import Model
from apr.training.loop import Trainer
from apr.training.rundir import SUMS, RunDir
from run_cases import cache, place, pretrain  # noqa: F401


def weights(run):
    """Every tensor of the last state of a run: weights and moments."""
    state = read_apr(sorted((run / "ckpt" / "state").glob("*.apr"))[-1])
    return {name: np.asarray(x).tobytes() for name, x in state.tensors.items()}


@pytest.fixture
def older(monkeypatch):
    """Let runs begin as they did before: config.json says nothing of the order."""
    create = RunDir.create
    monkeypatch.setattr(
        RunDir, "create", lambda self, config: create(self, {k: x for k, x in config.items() if k != SUMS})
    )


def stopped_and_resumed(place, folder, monkeypatch):
    right = Trainer.train_step

    def stopping(self):
        line = right(self)
        self.stop.is_asked = line["step"] == 3
        return line

    with monkeypatch.context() as m:
        m.setattr(Trainer, "train_step", stopping)
        assert pretrain(place, folder) == 130
    assert main(["pretrain", "--resume", "--run-dir", str(folder)]) == 0
    return weights(folder)


def test_an_older_run_keeps_its_order(place, tmp_path, monkeypatch, older):
    assert pretrain(place, tmp_path / "whole") == 0
    assert SUMS not in json.loads((tmp_path / "whole" / "config.json").read_text())
    assert stopped_and_resumed(place, tmp_path / "resumed", monkeypatch) == weights(tmp_path / "whole")
    monkeypatch.undo()
    monkeypatch.setenv("APR_CACHE", str(place / "cache"))
    assert pretrain(place, tmp_path / "new") == 0
    assert weights(tmp_path / "new") != weights(tmp_path / "whole")


def test_an_order_that_was_not_asked_for_is_refused(place, tmp_path, monkeypatch, capsys):
    """The fault planted: the model adds up inside the products, whatever config.json says."""
    right = Model.__init__
    monkeypatch.setattr(
        Model, "__init__", lambda self, *args, **options: right(self, *args, **options | {"folds": False})
    )
    assert pretrain(place, tmp_path / "b") == 5
    assert "sums over micro-batches is False, asked for True" in capsys.readouterr().err
