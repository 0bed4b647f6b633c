"""Bisect on a GPU: sound kernels agree, and every real edit of a kernel's source is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from apr.backends.cuda import kernels
from apr.bisect import batch as batches
from apr.bisect.planted import catalogue
from apr.bisect.planted.kernel_faults import KERNEL_FAULTS, KernelFault, planted
from apr.bisect.report import Report
from apr.bisect.side import Batch, Side
from apr.bisect.stages import Plan, run
from apr.model.config import ModelConfig
from apr.model.presets import PRESETS

pytestmark = pytest.mark.gpu
OPS_ALONE = Plan(free=False, state=False)
MODELS = {  # tiny ones, and of each family one whose heads are for tensor cores: for mma.sync, and for wgmma where it is
    **{name: PRESETS[name] for name in catalogue.TINY},
    **{
        f"{name} {d}": replace(PRESETS[name], head_dim=d)
        for d in (32, 64)
        for name in ("qwen2-tiny", "mistral-tiny", "llama-tiny")
    },
}


def bisected(
    cuda: Any,
    cfg: ModelConfig,
    dtype: str,
    plan: Plan,
    shape: tuple[int, int] = (2, 17),
    few: int = 0,
    document_end: int | None = None,
) -> Report:
    given = batches.at_random(cfg, shape, 0)
    if document_end is not None:
        given = batches.in_documents(given, document_end)
    if few:
        given = Batch(given.ids % few, given.targets, given.words)
    report = Report("", ("reference float64", f"cuda {dtype}"), given.words)
    return run(cfg, Side(cuda, cfg, dtype), catalogue.weights_of(cfg), given, report, plan)


@pytest.mark.parametrize("document_end", [None, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_sound_kernels_agree(cuda: Any, name: str, dtype: str, document_end: int | None) -> None:
    report = bisected(cuda, MODELS[name], dtype, Plan(), document_end=document_end)
    assert report.agree, report.guilty[:5]
    assert {r.mode for r in report.rows} == {"free", "forced", "exact"}


PLANTED = [
    pytest.param(fault, dtype, id=f"{fault.name}-{dtype}")
    for fault in KERNEL_FAULTS.values()
    for dtype in fault.acts
    if any(fault.applies(cfg) for cfg in MODELS.values())  # the others: test_kernel_faults.py
]


@pytest.mark.parametrize(("fault", "dtype"), PLANTED)
def test_an_edit_of_a_kernel_is_named(cuda: Any, fault: KernelFault, dtype: str) -> None:
    """In the first model that it can be seen in; what needs many positions or repeated ids gets them."""
    from apr.backends.cuda import launch

    if not kernels.variants(fault.module, launch.arch()):
        pytest.skip("not for this GPU")
    cfg = next(c for c in MODELS.values() if fault.applies(c))
    long = "positions" in fault.needs
    few = 3 if "occurs" in fault.needs else 0
    cfg = replace(cfg, max_position_embeddings=128)
    with planted(fault):
        shape, end = (2, 97) if long or few else (2, 17), 5 if "documents" in fault.needs else None
        report = bisected(cuda, cfg, dtype, OPS_ALONE, shape, few, end)
    forced = [r for r in report.guilty if r.mode == "forced"]
    assert forced, "not found"
    assert forced[0].op == fault.op, forced[:4]
    assert np.isfinite(forced[0].tol)
