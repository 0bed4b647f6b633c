"""Runs of adapters: a small checkpoint and its corpus, and what a run wrote."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from apr.checkpoints.apr2 import read_apr
from apr.cli.main import main
from apr.model.hf_config import to_hf
from apr.model.optim import AdamW
from apr.model.presets import PRESETS

RECIPE = [
    "--lr", "1e-2", "--warmup-steps", "2", "--num-steps", "6", "--eval-every", "3", "--batch-size", "4",
    "--micro-batch-size", "2", "--seq-length", "16", "--val-batches", "4", "--val-fraction", "0.3", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A folder for tokenised corpora."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def place(tmp_path_factory, cached):
    """A corpus of real Python, and a checkpoint of a small Qwen2 with a tokenizer, trained for a few steps."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "corpus").mkdir()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for source in sorted((stdlib / "json").glob("*.py")) + sorted((stdlib / "email").glob("*.py")):
        shutil.copy(source, folder / "corpus" / source.name)
    cfg = dataclasses.replace(PRESETS["qwen2-tiny"], vocab_size=400)
    (folder / "config.json").write_text(json.dumps(to_hf(cfg)))
    with pytest.MonkeyPatch.context() as m:
        m.setenv("APR_CACHE", str(cached))
        args = [
            "--corpus",
            str(folder / "corpus"),
            "--model",
            str(folder / "config.json"),
            *RECIPE,
            "--spot-check",
            "-1",
        ]
        assert main(["pretrain", *args, "--run-dir", str(folder / "base")]) == 0
    return folder


@pytest.fixture(autouse=True)
def cache(cached, monkeypatch):
    monkeypatch.setenv("APR_CACHE", str(cached))


def pretrain(place, run_dir, *more, init="base/ckpt/epoch-002.apr"):
    args = ["--corpus", str(place / "corpus"), "--init", str(place / init), "--run-dir", str(run_dir)]
    return main(["pretrain", *args, *RECIPE, *map(str, more)])


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run):
    keys = ("step", "train_loss", "grad_norm", "weight_norm", "lr", "tokens_seen")
    return [tuple(m[k] for k in keys) for m in metrics(run) if "train_loss" in m]


def weights(path):
    return {name: np.asarray(x) for name, x in read_apr(path).tensors.items()}


def steps_begun(monkeypatch):
    """Collect, as AdamW begins each step, how many it has made; returns the list."""
    right, begun = AdamW.step, []

    def step(self, lr, **options):
        begun.append(self.steps)
        right(self, lr, **options)

    monkeypatch.setattr(AdamW, "step", step)
    return begun
