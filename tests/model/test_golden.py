"""All backends compute what stock Hugging Face models compute: the golden files of tools/golden/models.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apr import backends
from apr.model.families import FAMILIES
from checks import GOLDEN, golden, golden_config, golden_model, off_adamw, off_golden, on

every_file = pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
every_backend = pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", "float64"), ("cpu", "float32"), pytest.param("cuda", "float32", marks=pytest.mark.gpu)],
)


def test_golden_files_are_there() -> None:
    families = {(golden_config(p).family, golden_config(p).tie_word_embeddings) for p in GOLDEN}
    assert {f for f, _ in families} == set(FAMILIES)
    assert {("qwen2", True), ("qwen2", False)} <= families


@every_file
@every_backend
def test_one_step(path: Path, backend: str, dtype: str) -> None:
    """Hidden states after every block, final norm, logits, loss and the gradient of every parameter."""
    assert off_golden(on(backends.get(backend)), path, dtype) == []


@every_file
@every_backend
def test_ten_adamw_steps(path: Path, backend: str, dtype: str) -> None:
    """Losses, gradient norms before clipping, and the norm of every parameter at the end."""
    assert off_adamw(on(backends.get(backend)), path, dtype) == []


@every_file
def test_parameters_have_the_stock_names_and_shapes(path: Path) -> None:
    model = golden_model(on(backends.get("reference")), path, "float64")
    stock = {
        name.removeprefix("weight."): x.shape for name, x in golden(path)[0].items() if name[:7] == "weight."
    }
    assert {name: w.shape for name, w in model.layout.named(model.w).items()} == stock
    assert model.layout.num_parameters == sum(int(np.prod(shape)) for shape in stock.values())
