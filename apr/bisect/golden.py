"""Replay a golden step: what a stock Hugging Face model of the family computed, packed with apr (docs/golden.md).

The reference of a bisection is apr's own; here forward pass, gradients and an optimizer step come from elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..common.files import read_json
from ..model.hf_config import from_hf
from ..model.optim import AdamW
from ..model.transformer import Model
from . import rule
from .comparisons import holds
from .report import EXACT, ArrayComparison

PATH = Path(__file__).with_name("golden_steps.json")
MATRIX_STD, VECTOR_STD, PROJECTIONS = 0.2, 0.3, 4
# Of the norm of an array, for a projection in float32.
TOLERANCE = 2e-4
STAGE, OTHER = "formulas", "not what transformers computes for"
# Rows and columns of logits whose loss is compared with its formula, and the step of its slopes.
LOGITS, STEP = (8, 128), 1e-5


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw a float32 weight by its name: matrices normal(0, 0.2), biases normal(0, 0.3), norms around 1."""
    rng = np.random.Generator(np.random.PCG64(list(f"golden step/{name}".encode())))
    noise = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return noise * np.float32(MATRIX_STD)
    return noise * np.float32(VECTOR_STD) + np.float32(0 if name.endswith(".bias") else 1)


def weights_sha256(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """SHA-256 of the weights that are drawn, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(shapes):
        digest.update(draw(name, shapes[name]).tobytes())
    return digest.hexdigest()


def projections(name: str, x: np.ndarray) -> list[float]:
    """Norm of an array, and its sums with random signs that its name decides."""
    flat = np.asarray(x, np.float64).reshape(-1)
    rng = np.random.Generator(np.random.PCG64(list(f"signs/{name}".encode())))
    signs = 2.0 * rng.integers(0, 2, (PROJECTIONS, flat.size)) - 1
    return [float(np.linalg.norm(flat)), *(signs @ flat).tolist()]


@cache
def _steps() -> dict[str, Any]:
    steps: dict[str, Any] = read_json(PATH)["steps"]
    return steps


def golden_steps(backend: rule.Backend, family: str) -> list[ArrayComparison]:
    """Replay every golden step of a family on a backend in float32, and compare the loss with its formula; [] where the
    backend has no float32."""
    if "float32" not in backend.dtypes:
        return []
    found = [name for name, entry in _steps().items() if entry["config"]["model_type"] == family]
    return [*loss_slopes(backend), *(row for name in found for row in replay(backend, name))]


def loss_slopes(backend: rule.Backend) -> Iterator[ArrayComparison]:
    """Compare the gradient of the loss op with slopes of the formula, without a z-loss and with one that weighs as much.

    sum over targets of lse - logit + z lse^2 (Chowdhery et al. 2022, section 5), on the host in float64; no model that is
    stored has a z-loss, and that of a job is too small to show in its slopes."""
    rng = np.random.default_rng(5)
    x, targets = 2 * rng.standard_normal(LOGITS), rng.integers(0, LOGITS[1], LOGITS[0])
    targets[1], x = -100, x.astype(np.float32).astype(np.float64)
    kept, signs = np.flatnonzero(targets >= 0), 2.0 * rng.integers(0, 2, (PROJECTIONS, *LOGITS)) - 1

    def formula(logits: np.ndarray, z: float) -> float:
        lse = np.log(np.exp(logits[kept]).sum(1))
        return float((lse - logits[kept, targets[kept]] + z * lse**2).sum() / kept.size)

    for z in (0.0, 0.5):
        loss, logits, ids = (
            backend.empty(shape, kind)
            for shape, kind in ((LOGITS[:1], "float32"), (LOGITS, "float32"), (LOGITS[:1], "int32"))
        )
        backend.from_host(logits, x.astype(np.float32))
        backend.from_host(ids, targets.astype(np.int32))
        backend.cross_entropy(loss, logits, ids, 1 / kept.size, z)
        g = backend.to_host(logits).astype(np.float64)
        want = [(formula(x + STEP * u, z) - formula(x - STEP * u, z)) / (2 * STEP) for u in signs]
        tap, cause = f"d_logits, z-loss {z:g}", "not the slope of the loss that is minimised"
        yield _row(
            "cross_entropy", tap, [float((g * u).sum()) for u in signs], want, float(np.linalg.norm(g)), cause
        )


def replay(backend: rule.Backend, name: str) -> Iterator[ArrayComparison]:
    """Take a golden step and compare loss, hidden states, gradients and the move of every weight."""
    entry = _steps()[name]
    cfg, ids, targets = (
        from_hf(entry["config"]),
        np.array(entry["ids"], np.int32),
        np.array(entry["targets"], np.int32),
    )
    batch, seq = ids.shape
    model = Model(cfg, backend, batch, seq, "float32")
    shapes = {s.hf: s.shape for s in model.layout.in_order()}
    if weights_sha256(shapes) != entry["weights_sha256"]:
        yield holds(
            STAGE,
            f"golden step {name}",
            "weights",
            False,
            "NumPy draws other numbers, or tensors have other shapes",
        )
        return
    host = np.zeros(model.layout.size, np.float32)
    for key, view in model.layout.named(host).items():
        view[...] = draw(key, view.shape)
    how = entry["adamw"]
    opt = AdamW.of(
        model, weight_decay=how["weight_decay"], grad_clip=how["max_norm"], beta1=how["betas"][0], beta2=how["betas"][1],
        eps=how["eps"],
    )  # fmt: skip
    opt.set_weights(host)
    seen: dict[str, np.ndarray] = {}

    def tap(layer: int | None, tapped: str, x: Any) -> None:
        if tapped == "final_norm":
            seen[tapped] = backend.to_host(x)

    count = int((targets >= 0).sum())
    backend.fill(model.total, 0)
    model.forward(ids, tap)
    model.loss(targets, scale=1 / count)
    model.backward()
    seen |= {f"grad.{key}": x for key, x in model.layout.named(backend.to_host(model.g)).items()}
    opt.step(how["lr"])
    moved = backend.to_host(opt.master).astype(np.float64) - host
    seen |= {f"moved.{key}": x for key, x in model.layout.named(moved).items()}
    loss, norm = float(backend.to_host(model.total)[0]) / count, opt.grad_norm()
    for tapped, got, want in (("loss", loss, entry["loss"]), ("grad_norm", norm, entry["grad_norm"])):
        yield _row("golden step", f"{name}.{tapped}", [got], [want], want, f"{OTHER} {name}")
    for tapped, want in entry["arrays"].items():
        found, at = projections(tapped, seen[tapped]), f"{name}.{tapped}"
        yield _row("golden step", at, found, want, want[0], f"{OTHER} {name}")


def _row(op: str, tap: str, got: list[float], want: list[float], size: float, cause: str) -> ArrayComparison:
    off = [abs(a - b) for a, b in zip(got, want, strict=True)]
    at = int(np.argmax(off))
    worst, most = off[at], TOLERANCE * size
    cause = "" if worst <= most else cause
    return ArrayComparison(
        STAGE, op, tap, EXACT, worst, most, None, (len(off),), (at,), got[at], want[at], cause
    )
