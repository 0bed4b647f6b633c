"""Low-rank adapters (Hu et al. 2022): of some matrices W only B and A are trained, W_eff = W + s B A.

    A (r,I), B (O,r), s = alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, "rslora")
    dA = s B^T dW_eff,  dB = s dW_eff A^T

The model computes with W_eff. After every step W_eff is computed anew from a copy of W that nothing writes to, so that
rounding does not accumulate; dW_eff is what backward gives. Sums are float32 (float64), W_eff is rounded once to the dtype
of the model. No dropout. All weights have gradients; optimizer state, and a float32 copy, are needed for A and B only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ..common.errors import UsageError
from ..common.rounding import round_up
from .buffers import WIDE, Buffers, BufferSpec, BufferSpecs
from .config import ModelConfig
from .micro_gradients import add
from .params import ALIGN, LAYER, Layout, Param, Slot
from .transformer import Model

SHORT = {"q": "wq", "k": "wk", "v": "wv", "o": "wo", "gate": "wgate", "up": "wup", "down": "wdown"}
# PEFT's names begin with those of its two wrappers
PREFIX = "base_model.model."
# {wq: q_proj}
LINEAR = {p.name: p.hf.split(".")[-2] for p in LAYER if p.name in SHORT.values()}
# default of alpha / rank
ALPHA_PER_RANK = 2.0
# copied to the host at a time
HASH_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class LoraConfig:
    """Hyper-parameters of adapters: rank r, alpha of the scale, names of the adapted parameters in the table's order."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False

    @property
    def scale(self) -> float:
        """Compute s in W + s B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def modules(self) -> list[str]:
        """List the Hugging Face names of the targets: q_proj."""
        return [LINEAR[t] for t in self.targets]


def lora_config(rank: int | None, alpha: float | None, targets: str | None) -> LoraConfig | None:
    """Build a LoraConfig from flags; None without a rank. Raises UsageError."""
    if rank is None:
        if alpha is not None or targets is not None:
            raise UsageError("--lora-alpha and --lora-targets are about adapters: give --lora-rank too")
        return None
    return LoraConfig(rank, ALPHA_PER_RANK * rank if alpha is None else alpha, parse_targets(targets))


def check_rank(cfg: ModelConfig, config: LoraConfig) -> None:
    """Raise UsageError for a rank that no adapted matrix can use: above the smaller side of each."""
    layout = AdapterLayout(cfg, dataclasses.replace(config, rank=1))
    most = max((min(pair.base.shape) for pair in layout.pairs), default=config.rank)
    if config.rank > most:
        raise UsageError(
            f"--lora-rank {config.rank}: the adapted matrices have at most {most} rows or columns, and a higher rank adds "
            f"nothing; give at most {most}, usual are 8 to 64"
        )


def parse_targets(text: str | None) -> tuple[str, ...]:
    """Parse "q,v", "q_proj,v_proj" or "all-linear" (None) into names of the parameter table. Raises UsageError."""
    if text is None or text == "all-linear":
        return tuple(LINEAR)
    known = {**SHORT, **{peft: name for name, peft in LINEAR.items()}}
    given = [part for part in text.replace(",", " ").split() if part]
    for part in given:
        if part not in known:
            raise UsageError(
                f"--lora-targets {part}: not one of {', '.join(SHORT)} (or {', '.join(LINEAR.values())}, or all-linear)"
            )
    if not given:
        raise UsageError("--lora-targets: empty; leave it out to adapt all linear maps of the blocks")
    return tuple(name for name in LINEAR if name in {known[part] for part in given})


@dataclass(frozen=True)
class Pair:
    """Slots of an adapted matrix: of W in the model's buffer, of A and B in the adapters' buffer."""

    base: Slot
    a: Slot
    b: Slot


class AdapterLayout:
    """Slots of A and B of every adapted matrix in a flat buffer, as Layout has them of a model's parameters.

    All are matrices, so all decay. ALIGN elements of padding follow, so that the optimizer's region without decay is not
    empty; saved hashes of optimizer state include the padding.
    """

    def __init__(self, cfg: ModelConfig, config: LoraConfig) -> None:
        self.cfg, self.config = cfg, config
        self.slots: list[Slot] = []
        self.pairs: list[Pair] = []
        n = 0
        for s in Layout(cfg).slots:
            if s.layer is None or s.param.name not in config.targets:
                continue
            pair = []
            for letter, shape, init in (
                ("A", (config.rank, s.shape[1]), "uniform"),
                ("B", (s.shape[0], config.rank), "zeros"),
            ):
                hf = f"{PREFIX}{s.param.hf.removesuffix('.weight')}.lora_{letter}.weight"
                param = Param(f"{s.param.name}.{letter}", "", init, True, hf)
                pair.append(Slot(s.layer, param, n, shape))
                n = round_up(n + prod(shape), ALIGN)
            self.slots += pair
            self.pairs.append(Pair(s, *pair))
        self.decayed = n
        self.size = n + ALIGN
        self.by_hf = {s.hf: s for s in self.slots}

    @property
    def num_parameters(self) -> int:
        """Count the trained parameters, without padding."""
        return sum(s.size for s in self.slots)

    def views(self, flat: Any) -> list[tuple[Any, Any]]:
        """View (A, B) of every pair in a flat buffer."""
        return [(_cut(flat, p.a), _cut(flat, p.b)) for p in self.pairs]

    def in_order(self) -> list[Slot]:
        """Sort the slots by layer, then in the order of the parameter table, A before B."""
        inner = {name: i for i, name in enumerate(LINEAR)}
        return sorted(self.slots, key=lambda s: (s.layer, inner[s.param.name[:-2]], s.param.name))

    def named(self, flat: Any) -> dict[str, Any]:
        """View all A and B in a flat buffer by PEFT's names, in order."""
        return {s.hf: _cut(flat, s) for s in self.in_order()}

    def init(self, flat: np.ndarray, seed: int) -> None:
        """Fill a host buffer as PEFT does: A uniform in +-1/sqrt(I) (kaiming_uniform with a = sqrt(5)), B zeros.

        Each tensor has its own random stream, named by seed and position.
        """
        flat[...] = 0
        for number, s in enumerate(self.in_order()):
            if s.param.init == "uniform":
                rng = np.random.Generator(np.random.PCG64([seed, number]))
                bound = 1 / math.sqrt(s.shape[1])
                _cut(flat, s)[...] = rng.uniform(-bound, bound, s.shape)


def _cut(flat: Any, s: Slot) -> Any:
    return flat[s.offset : s.offset + s.size].reshape(s.shape)


def adapter_specs(layout: AdapterLayout, dtype: str, folds: bool = False) -> BufferSpecs:
    """List the buffers of adapters of a model of a dtype; those of the optimizer are its own.

    folds: a step has several micro-batches, whose gradients are added in order"""
    wide = WIDE[dtype]
    specs = {
        "adapters": BufferSpec("weights", (layout.size,), wide),
        "adapter_gradients": BufferSpec("gradients", (layout.size,), wide),
        **{f"base.{p.base.hf}": BufferSpec("base", p.base.shape, dtype) for p in layout.pairs},
    }
    if folds:
        specs["adapter_part"] = BufferSpec("gradients", (layout.size,), wide)
    if wide != dtype:
        specs["merged"] = BufferSpec("scratch", (max(p.base.size for p in layout.pairs),), wide)
    return specs


class Adapters:
    """Adapters of a model: the flat arrays that an optimizer updates in place of the model's own.

    w, g     (layout.size,) wide  A and B of every pair, and their gradients
    base     [(O,I)]              W of every pair, as loaded; model.w holds W_eff
    folds    gradients are collected after each micro-batch, and added to those before it
    """

    def __init__(self, model: Model, config: LoraConfig, folds: bool = False) -> None:
        self.model, self.config = model, config
        self.be, self.cfg, self.dtype = model.be, model.cfg, WIDE[model.dtype]
        self.layout = AdapterLayout(model.cfg, config)
        self.folds = folds
        self.buffers = Buffers(self.be, adapter_specs(self.layout, model.dtype, folds))
        self.w, self.g = self.buffers["adapters"], self.buffers["adapter_gradients"]
        self.base = [self.buffers[f"base.{p.base.hf}"] for p in self.layout.pairs]
        self.base_sha256 = ""

    def set_base(self, host: np.ndarray) -> None:
        """Load W: a host buffer in the model's Layout order, rounded to the model's dtype."""
        self.be.from_host(self.model.w, host)
        for p, base in zip(self.layout.pairs, self.base, strict=True):
            self.be.copy(base, _cut(self.model.w, p.base))
        self.base_sha256 = self.base_hash()

    def base_values(self) -> Iterator[tuple[Slot, Any]]:
        """List (slot, flat values on the device) of every weight that must not change: W, and tensors without adapters."""
        adapted = {p.base.offset: base for p, base in zip(self.layout.pairs, self.base, strict=True)}
        for s in self.model.layout.in_order():
            values = adapted[s.offset] if s.offset in adapted else _cut(self.model.w, s)
            yield s, values.reshape(-1)

    def base_hash(self) -> str:
        """SHA-256 of every weight that must not change, as read back from the device."""
        digest = hashlib.sha256()
        for s, flat in self.base_values():
            for start in range(0, s.size, HASH_ELEMENTS):
                part = np.ascontiguousarray(self.be.to_host(flat[start : start + HASH_ELEMENTS]))
                digest.update(part.view(np.uint8).data)
        return digest.hexdigest()

    def merge(self) -> None:
        """W_eff = W + s B A for every pair, in the model's weights."""
        be, s = self.be, self.config.scale
        for p, base, (a, b) in zip(self.layout.pairs, self.base, self.layout.views(self.w), strict=True):
            w = wide = _cut(self.model.w, p.base)
            if self.dtype != self.model.dtype:
                wide = self.buffers["merged"][: p.base.size].reshape(w.shape)
            be.copy(wide, base)
            be.gemm(wide, b, a, s, 1.0, False, False)
            if wide is not w:
                be.copy(w, wide)

    def collect_gradients(self) -> None:
        """dA = s B^T dW_eff, dB = s dW_eff A^T for every pair; sets the model's gradients to zero.

        With `folds` both are added to the gradients, otherwise they take their place."""
        be, s = self.be, self.config.scale
        g = self.buffers["adapter_part"] if self.folds else self.g
        views = zip(self.layout.views(self.w), self.layout.views(g), strict=True)
        for p, ((a, b), (da, db)) in zip(self.layout.pairs, views, strict=True):
            d = _cut(self.model.g, p.base)
            be.gemm(da, b, d, s, 0.0, True, False)
            be.gemm(db, d, a, s, 0.0, False, True)
        if self.folds:
            add(be, self.g, g)
        be.fill(self.model.g, 0)


def lora_to_json(c: LoraConfig) -> dict[str, Any]:
    """Convert to JSON."""
    return {"rank": c.rank, "alpha": c.alpha, "targets": list(c.targets), "rslora": c.rslora}


def lora_of_json(d: Mapping[str, Any]) -> LoraConfig:
    """Read the JSON of lora_to_json."""
    return LoraConfig(d["rank"], d["alpha"], tuple(d["targets"]), d["rslora"])
