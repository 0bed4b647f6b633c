"""Ranks over the real NCCL, several on one GPU: the bits of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from apr.checkpoints.apr2 import read_apr
from apr.common.errors import Refused
from apr.ranks import library
from run_cases import place  # noqa: F401

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]


def numbers(run):
    tensors = {
        n: np.asarray(x).tobytes()
        for n, x in read_apr(max((run / "ckpt/state").glob("*.apr"))).tensors.items()
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return tensors, [
        {k: x for k, x in line.items() if k not in ("wall_ms", "tokens_per_sec")} for line in lines
    ]


def test_two_ranks_on_one_gpu_have_the_bits_of_one_process(place, tmp_path):
    try:
        library.load()
    except Refused as e:
        pytest.skip(str(e))
    env = {**os.environ, library.SHARED: "1", "APR_CACHE": str(place / "cache"), "PYTHONPATH": str(ROOT)}
    for count in (1, 2):
        args = [
            "--corpus", str(place / "corpus"), "--model", str(place / "config.json"), "--run-dir", str(tmp_path / str(count)),
            "--seq-length", "32", "--num-steps", "4", "--steps-per-epoch", "4", "--batch-size", "6", "--micro-batch-size", "2",
            "--val-batches", "1", "--val-fraction", "0.3", "--spot-check", "-1", "--gpus", str(count), "--device", "cuda",
        ]  # fmt: skip
        command = [sys.executable, "-m", "apr.cli.main", "pretrain", *args]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode in (0, 1), done.stderr[-3000:]
    assert numbers(tmp_path / "1") == numbers(tmp_path / "2")
