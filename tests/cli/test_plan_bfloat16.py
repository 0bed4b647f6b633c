"""`apr plan` on a CPU says what bfloat16 gives there: room, and how much faster its products are."""

from __future__ import annotations

import json
import re

import pytest

from apr.backends.cpu import ops, tiles
from apr.cli.main import main

JOB = ["plan", "--model", "qwen2-3m", "--batch-size", "8", "--seq-length", "256", "--device", "cpu"]


@pytest.mark.parametrize(
    ("path", "is_compiled", "said"),
    [
        ("float32", True, "multiplies it as float32, so no faster"),
        ("avx512_bf16", False, "products on AVX512-BF16, measured by --dtype bfloat16"),
        ("amx", True, "a large product on AMX tiles runs at 3.0 times the rate of float32"),
    ],
)
def test_what_bfloat16_gives(
    path: str,
    is_compiled: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tiles, "path", lambda: path)
    monkeypatch.setattr(ops, "is_compiled", lambda dtype: is_compiled)
    monkeypatch.setattr(
        "apr.training.plan.matmul_rate", lambda _, dtype: 3e11 if dtype == "bfloat16" else 1e11
    )
    assert main([*JOB, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert main(JOB) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert said in shown
    low, wide = (float(x) for x in re.findall(r"bfloat16 .*?([\d.]+) GiB in place of ([\d.]+)", shown)[0])
    assert (low, wide) == (
        round(result["bfloat16_bytes"] / 2**30, 3),
        round(result["bytes"]["total"] / 2**30, 3),
    )
    assert low < wide
