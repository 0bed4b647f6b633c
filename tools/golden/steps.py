"""Golden steps: one training step per family from stock Hugging Face models, small enough to be packed with apr.

    torch-env/bin/python tools/golden/steps.py [--check]

Writes apr/bisect/golden_steps.json (--check: compares with it, and writes nothing). The models, ids and weights are those of
CASES in models.py, in float64, with a larger epsilon of the norms, so that its place and value show in float32. Weights are
not stored: both sides draw them from the names of the tensors, and their SHA-256 says whether they drew the same. Of an array
x the file holds its norm and, for k = 0..3, the sums of x s_k with random signs s_k; both sides draw those too. The step is
torch's AdamW after clipping to the norm `max_norm`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from models import CASES, ROOT, build, draw_tokens, float32_is_float64, loss_of, watch

from apr.model.hf_config import to_hf

PATH = ROOT / "apr" / "bisect" / "golden_steps.json"
MATRIX_STD, VECTOR_STD, PROJECTIONS = 0.2, 0.3, 4
ADAMW = dict(lr=0.01, betas=[0.9, 0.95], eps=1e-3, weight_decay=0.1)
NORM_EPS = 0.01


# As in apr/bisect/golden.py, written apart: what is wrong in one must show in the other.


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


def step(name: str) -> dict[str, object]:
    """Compute one entry of the file."""
    case = replace(CASES[name], config=replace(CASES[name].config, rms_norm_eps=NORM_EPS), batch=2)
    ids, targets = draw_tokens(name, "golden step", case)
    with float32_is_float64():
        model = build(name, case.config, torch.float64)
        params = dict(model.named_parameters())
        with torch.no_grad():
            for key, p in params.items():
                p.copy_(torch.from_numpy(draw(key, tuple(p.shape))))
        seen, _ = watch(model)
        loss = loss_of(model(torch.from_numpy(ids).long(), use_cache=False).logits, torch.from_numpy(targets))
        loss.backward()
    arrays = {"final_norm": seen["final_norm"].detach().numpy()}
    arrays |= {f"grad.{key}": p.grad.numpy().copy() for key, p in params.items()}
    size = float(torch.nn.utils.clip_grad_norm_(params.values(), 1e30))
    max_norm = round(size / 2, 3)
    torch.nn.utils.clip_grad_norm_(params.values(), max_norm)
    decay = {True: ADAMW["weight_decay"], False: 0.0}
    groups = [
        dict(params=[p for p in params.values() if (p.dim() > 1) is two], weight_decay=decay[two])
        for two in decay
    ]
    torch.optim.AdamW(groups, lr=ADAMW["lr"], betas=tuple(ADAMW["betas"]), eps=ADAMW["eps"]).step()
    for key, p in params.items():
        arrays[f"moved.{key}"] = p.detach().numpy() - draw(key, tuple(p.shape)).astype(np.float64)
    return {
        "config": to_hf(case.config),
        "ids": ids.tolist(),
        "targets": targets.tolist(),
        "weights_sha256": weights_sha256({key: tuple(p.shape) for key, p in params.items()}),
        "adamw": {**ADAMW, "max_norm": max_norm},
        "loss": loss.item(),
        "grad_norm": size,
        "arrays": {key: projections(key, x) for key, x in arrays.items()},
    }


def main() -> int:
    """Write the file, or compare with it. Returns the exit code."""
    description = "Golden steps from stock Hugging Face models"
    return write_or_check(description, PATH, "steps", lambda: {name: step(name) for name in CASES})


def write_or_check(description: str, path: Path, key: str, make: Callable[[], dict[str, Any]]) -> int:
    """Write what `make` computes as `key` of a JSON file, or with --check compare its numbers with the file's to 1e-9.

    Returns the exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="compare with the file; write nothing")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    made = make()
    text = json.dumps({"versions": versions, key: made}, separators=(",", ":"))
    text = text.replace('"config"', '\n"config"') + "\n"
    if not check:
        path.write_text(text)
        print(f"{path.relative_to(ROOT)}: {len(text):,} bytes, {len(made)} {key}")
        return 0
    old = json.loads(path.read_text())[key]
    wrong = [name for name in made | old if not _are_equal(old.get(name), made.get(name))]
    print(f"{path}: {', '.join(wrong) or 'all as computed'}")
    return 1 if wrong else 0


def _are_equal(one: Any, two: Any) -> bool:
    x, y = _numbers(one), _numbers(two)
    return len(x) == len(y) and np.allclose(x, y, rtol=1e-9)


def _numbers(x: Any) -> list[float]:
    """List all numbers of an entry, in order."""
    if isinstance(x, dict | list):
        return [n for part in (x.values() if isinstance(x, dict) else x) for n in _numbers(part)]
    return [float(x)] if isinstance(x, int | float) else []


if __name__ == "__main__":
    sys.exit(main())
