"""A small corpus, a small model, and a run of `apr pretrain` on them."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sysconfig
from pathlib import Path

import pytest

from apr.cli.main import main
from apr.model.hf_config import to_hf
from apr.model.optim import AdamW
from apr.model.params import Layout
from apr.model.presets import PRESETS

RECIPE = [
    "--lr", "3e-3", "--warmup-steps", "3", "--num-steps", "6", "--eval-every", "3", "--batch-size", "4",
    "--micro-batch-size", "2", "--seq-length", "16", "--val-batches", "4", "--val-fraction", "0.3",
]  # fmt: skip


VOCAB = 400


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus of real Python, the config.json of a small Qwen2 (biases), and one of the same size as Llama."""
    folder = tmp_path_factory.mktemp("gates")
    (folder / "corpus").mkdir()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for source in sorted((stdlib / "json").glob("*.py")) + sorted((stdlib / "email").glob("*.py")):
        shutil.copy(source, folder / "corpus" / source.name)
    cfg = dataclasses.replace(PRESETS["qwen2-tiny"], vocab_size=VOCAB)
    (folder / "config.json").write_text(json.dumps(to_hf(cfg)))
    return folder


@pytest.fixture(autouse=True)
def cache(place, monkeypatch):
    monkeypatch.setenv("APR_CACHE", str(place / "cache"))


def pretrain(place, run_dir, *more, model=True):
    args = ["--corpus", str(place / "corpus"), "--run-dir", str(run_dir)]
    args += ["--model", str(place / "config.json")] if model else []
    return main(["pretrain", *args, *RECIPE, *map(str, more)])


# Faults: each gets pytest's monkeypatch, the place and a folder, and gives more arguments of the command line.


def an_unused_weight_becomes_nan(m, place, folder):
    right = AdamW.step

    def step(self, lr, **options):
        if self.steps == 1:
            self.master[self.master.size - 1] = math.nan  # padding: no loss and no gradient sees it
        right(self, lr, **options)

    m.setattr(AdamW, "step", step)


def is_of_the_run(optimizer):
    """Tell the optimizer of the run from those of golden steps, whose models have other sizes."""
    return optimizer.w.size == Layout(dataclasses.replace(PRESETS["qwen2-tiny"], vocab_size=VOCAB)).size


def the_learning_rate_is_ignored(m, place, folder):
    right = AdamW.step
    m.setattr(AdamW, "step", lambda self, lr, **o: right(self, 3e-3 if is_of_the_run(self) else lr, **o))
