"""Ranks over the real NCCL, two on one GPU: the bits of one process, and a rank that is lost inside a recorded pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from apr.common.errors import Refused
from apr.ranks import library

pytestmark = pytest.mark.gpu
TOOL = Path(__file__).resolve().parents[2] / "tools" / "rank_hashes.py"


def test_two_ranks_on_one_gpu_have_the_bits_of_one_process(tmp_path):
    try:
        library.load()
    except Refused as e:
        pytest.skip(str(e))
    record = tmp_path / "record.json"
    command = [
        sys.executable,
        str(TOOL),
        "--shared",
        "--worlds",
        "1,2",
        "--faults",
        "killed",
        "--record",
        str(record),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = json.loads(record.read_text())
    one, two = (found["worlds"][n]["hashes"] for n in "12")
    assert {one["plain"]} == {two[n] for n in ("plain", "no-graph", "resumed-1", "on-multiprocessors")}
