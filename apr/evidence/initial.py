"""Judge random initial weights (gate before.weights): their spread, their independence, and the streams of the seed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..checkpoints.checkpoint import Checkpoint, parameters
from ..checkpoints.other_readers import holds, safetensors
from ..common.files import read_json
from ..common.finding import Finding
from ..common.units import plural
from ..model.adapters import Adapters
from ..model.lora import PREFIX
from ..model.optim import Optimizer
from ..model.params import Slot
from ..model.transformer import Model
from .measure import bits

# Of a mean, a standard deviation or a correlation, measured on the first elements of a matrix.
MAX_STANDARD_ERRORS, MAX_ELEMENTS = 6.0, 1 << 20
# Elements of each matrix that are drawn again and compared bit for bit, and that correlations are taken over.
DRAWN_ELEMENTS, CORRELATED_ELEMENTS = 1 << 16, 1 << 14


def random_weights(model: Model, opt: Optimizer, std: float, seed: int) -> Finding:
    """Judge random matrices by what makes them random, and by the seed's own streams; vectors by their constants."""
    slots = model.layout.in_order()
    why = _gaps(model, opt)
    heads: dict[str, np.ndarray] = {}
    worst, where, matrices = 0.0, "", 0
    for number, s in enumerate(slots):
        x = model.be.to_host(opt.master[s.offset : s.offset + min(s.size, MAX_ELEMENTS)])
        if s.param.init in ("ones", "zeros"):
            if not (x == (s.param.init == "ones")).all():
                why = why or f"{s.hf} is not all {s.param.init}"
            continue
        matrices += 1
        want = std if s.param.init == "in" else std / math.sqrt(2 * model.cfg.num_layers)
        wide = x.astype(np.float64)
        off = max(
            abs(wide.std() / want - 1) * math.sqrt(2 * x.size), abs(wide.mean()) / want * math.sqrt(x.size)
        )
        if not off <= worst:
            worst, where = float(off), s.hf
        heads[s.hf] = wide[:CORRELATED_ELEMENTS]
        why = why or _other_stream(x[:DRAWN_ELEMENTS], s, want, seed, number)
    related, pair = _correlation(heads)
    why = why or _equal_rows(model, opt)
    if worst > MAX_STANDARD_ERRORS:
        why = f"{where} is {worst:.1f} standard errors away from the spread that was asked for"
    elif related > MAX_STANDARD_ERRORS:
        why = f"{pair} are correlated, by {related:.1f} standard errors"
    measured = (
        f"{plural(matrices, 'matrix')}, the worst {worst:.1f} standard errors off ({where}), two of them correlated by at most "
        f"{related:.1f}; no two rows equal; drawn again, the same bits"
    )
    bound = f"at most {MAX_STANDARD_ERRORS:g}, no two rows equal, the bits of the seed"
    return Finding.of("before.weights", not why, why if why else measured, bound, score=worst)


def new_adapters(adapters: Adapters, opt: Optimizer, seed: int, init: Checkpoint | None = None) -> str:
    """Find what differs from new adapters of a seed: A uniform in +-1 / sqrt(I) from its own stream, of an embedding normal, B
    zero, and what is trained whole as the checkpoint has it; "" for nothing."""
    file = parameters(adapters.model.layout, init) if init else {}
    for number, s in enumerate(adapters.layout.in_order()):
        x = adapters.be.to_host(opt.master[s.offset : s.offset + s.size])
        again = np.zeros(s.size, np.float32)
        if s.hf.endswith("lora_embedding_B"):
            rng = np.random.Generator(np.random.PCG64([seed, number]))
            again = rng.standard_normal(s.size, np.float32)
        elif s.hf.endswith("lora_magnitude_vector"):
            matrix = file[s.hf.removeprefix(PREFIX).replace("lora_magnitude_vector", "weight")]
            again = np.linalg.norm(np.asarray(matrix, np.float64), axis=1).astype(np.float32)
        elif ".lora_" not in s.hf:
            if not np.array_equal(x, np.asarray(file[s.hf.removeprefix(PREFIX)], np.float32).reshape(-1)):
                return f"{s.hf} is not that of the checkpoint"
            continue
        if s.hf.endswith("lora_A.weight"):
            most = 1 / math.sqrt(s.shape[1])
            rng = np.random.Generator(np.random.PCG64([seed, number]))
            again = (2 * most * rng.random(s.size) - most).astype(np.float32)
        if not np.allclose(again, x, rtol=0, atol=1e-6):
            return f"{s.hf} is not that of new adapters by the seed {seed}"
    return ""


def continued_adapters(adapters: Adapters, opt: Optimizer, folder: str) -> str:
    """Find what differs from the adapters of a PEFT folder, read by other code than the one that loaded them: values, and the
    scale of each pair, alpha / r or alpha / sqrt(r); "" for nothing."""
    there = {_plain(name): t for name, t in safetensors(Path(folder) / "adapter_model.safetensors").items()}
    config = read_json(Path(folder) / "adapter_config.json")
    for s in adapters.layout.in_order():
        t = there.get(_plain(s.hf))
        if t is None:
            continue
        x = adapters.be.to_host(opt.master[s.offset : s.offset + s.size]).reshape(s.shape)
        x = x.T if "lora_embedding_" in s.hf else x.reshape(t.shape) if x.size == np.prod(t.shape) else x
        if not holds(t, x):
            return f"{s.hf} is not that of {folder}"
    for p in adapters.layout.pairs:
        rank, alpha = (
            next(
                (n for pattern, n in (config.get(key) or {}).items() if _ends(pattern, p.module)),
                config[otherwise],
            )
            for key, otherwise in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        want = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if not math.isclose(p.scale, want, rel_tol=1e-9):
            return f"the scale of {p.module} is {p.scale:g}, by {folder} {want:g}"
    return ""


def _plain(name: str) -> str:
    """Drop what names of a tensor of PEFT may end with."""
    return name.removesuffix(".weight").removesuffix(".default")


def _ends(pattern: str, module: str) -> bool:
    return re.search(rf"(?:^|\.)(?:{pattern})\Z", module) is not None


def _other_stream(x: np.ndarray, s: Slot, std: float, seed: int, number: int) -> str:
    """Draw the first elements of a matrix again: float32 normals of the stream (seed, place in the table) times std."""
    rng = np.random.Generator(np.random.PCG64([seed, number]))
    again = rng.standard_normal(x.size, dtype=np.float32) * np.float32(std)
    if np.array_equal(bits(again), bits(x)):
        return ""
    at = int(np.argmax(bits(again) != bits(x)))
    return f"{s.hf}: element {at} is {x[at]!r}, by the seed it is {again[at]!r}"


def _correlation(heads: dict[str, np.ndarray]) -> tuple[float, str]:
    """(largest correlation of the first elements of two matrices, in standard errors 1 / sqrt(n), the two)."""
    names = list(heads)
    sizes = [x.size for x in heads.values()]
    worst, pair = 0.0, ""
    # All matrices over what the smallest has, and the large ones over more.
    for size in {min(sizes), max(sizes)}:
        group = [n for n in names if heads[n].size >= size]
        rows = np.stack([heads[n][:size] for n in group])
        rows /= np.linalg.norm(rows, axis=1, keepdims=True) + 1e-300
        found = np.abs(np.tril(rows @ rows.T, -1)) * math.sqrt(size)
        i, j = np.unravel_index(int(found.argmax()), found.shape)
        if not found[i, j] <= worst:
            worst, pair = float(found[i, j]), f"{group[j]} and {group[i]}"
    return worst, pair


def _equal_rows(model: Model, opt: Optimizer) -> str:
    """Name two rows of random matrices with equal bits, by their first elements; "" for none."""
    by_width: dict[int, list[tuple[Slot, np.ndarray]]] = {}
    for s in model.layout.in_order():
        if s.param.init in ("in", "out"):
            by_width.setdefault(s.shape[1], []).append((s, _first_columns(model, opt, s)))
    for width, parts in by_width.items():
        keys = np.concatenate([key for _, key in parts])
        order = np.argsort(keys, kind="stable")
        for i in np.flatnonzero(keys[order][1:] == keys[order][:-1]):
            a, b = (_place(parts, int(order[k])) for k in (i, i + 1))
            rows = [model.be.to_host(opt.master[start : start + width]) for _, start in (a, b)]
            if np.array_equal(bits(rows[0]), bits(rows[1])):
                return f"{a[0]} and {b[0]} have equal bits"
    return ""


def _first_columns(model: Model, opt: Optimizer, s: Slot) -> np.ndarray:
    """Read the first two elements of every row, as uint64 (rows,)."""
    flat, width = opt.master, s.shape[1]
    pair = [model.be.to_host(flat[s.offset + min(k, width - 1) : s.offset + s.size : width]) for k in (0, 1)]
    joined: np.ndarray = np.ascontiguousarray(np.stack(pair, axis=1)).view(np.uint64).reshape(-1)
    return joined


def _place(parts: list[tuple[Slot, np.ndarray]], row: int) -> tuple[str, int]:
    """(name of a row counted over all matrices, its first element in the flat buffer)."""
    for s, key in parts:
        if row < key.size:
            return f"row {row} of {s.hf}", s.offset + row * s.shape[1]
        row -= key.size
    raise IndexError(row)


def _gaps(model: Model, opt: Optimizer) -> str:
    """Require zeros between the tensors, and in the rows behind the vocabulary."""
    for start, stop in _between(model):
        if model.be.to_host(opt.master[start:stop]).any():
            return f"elements {start} to {stop - 1}, between two tensors, are not all 0"
    return ""


def _between(model: Model) -> Iterator[tuple[int, int]]:
    at = 0
    for s in sorted(model.layout.slots, key=lambda s: s.offset):
        if s.offset > at:
            yield at, s.offset
        at = s.offset + s.size
    if at < model.layout.size:
        yield at, model.layout.size
