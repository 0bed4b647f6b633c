"""Low-rank adapters (Hu et al. 2022): of some matrices W only B and A are trained, W_eff = W + s B A.

A (r,I), B (O,r), s = alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, "rslora"). The model computes with W_eff itself: it is
made anew after every step from a copy of W that nothing writes to, so that no rounding adds up, and the gradients of A and B
follow from that of W_eff, which backward gives anyway:

    dA = s B^T dW_eff,  dB = s dW_eff A^T

No dropout, so this is LoRA exactly, and the ops of any backend do. It takes the gradients of all weights; moments, and a
float32 copy, are needed for A and B only. Where weights are bfloat16, W_eff is W + s B A, summed in float32 and rounded once.
"""

from __future__ import annotations

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
from .params import ALIGN, LAYER, Layout, Param, Slot
from .transformer import Model

SHORT = {"q": "wq", "k": "wk", "v": "wv", "o": "wo", "gate": "wgate", "up": "wup", "down": "wdown"}
PREFIX = "base_model.model."  # PEFT's names are those of its two wrappers and the model
LINEAR = {p.name: p.hf.split(".")[-2] for p in LAYER if p.name in SHORT.values()}  # wq: q_proj
ALPHA_PER_RANK = 2.0  # default of alpha / rank
HASH_ELEMENTS = 1 << 20  # copied to the host at a time


@dataclass(frozen=True)
class LoraConfig:
    """rank r; targets: names of the parameter table, in its order."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False

    @property
    def scale(self) -> float:
        """s in W + s B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def modules(self) -> list[str]:
        """Hugging Face names of the targets: q_proj."""
        return [LINEAR[t] for t in self.targets]


def lora_config(rank: int | None, alpha: float | None, targets: str | None) -> LoraConfig | None:
    """From the flags of a command; None without a rank. Raises UsageError."""
    if rank is None:
        if alpha is not None or targets is not None:
            raise UsageError("--lora-alpha and --lora-targets are about adapters: give --lora-rank too")
        return None
    return LoraConfig(rank, ALPHA_PER_RANK * rank if alpha is None else alpha, parse_targets(targets))


def parse_targets(text: str | None) -> tuple[str, ...]:
    """Names of the parameter table from "q,v", "q_proj,v_proj" or "all-linear"; None: all. Raises UsageError."""
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
    """An adapted matrix: where it, its A and its B lie, the first in a model's buffer, the others in that of the adapters."""

    base: Slot
    a: Slot
    b: Slot


class AdapterLayout:
    """Where A and B of every adapted matrix lie in a flat buffer; what AdamW and the run directory need of a Layout.

    All are matrices, so all are decayed; behind them lie ALIGN elements of nothing, so that both regions of AdamW have some."""

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
        """Trained parameters, padding not counted."""
        return sum(s.size for s in self.slots)

    def views(self, flat: Any) -> list[tuple[Any, Any]]:
        """(A, B) of every pair in a flat buffer."""
        return [(_cut(flat, p.a), _cut(flat, p.b)) for p in self.pairs]

    def in_order(self) -> list[Slot]:
        """Slots by layer, in the order of the parameter table, A before B."""
        inner = {name: i for i, name in enumerate(LINEAR)}
        return sorted(self.slots, key=lambda s: (s.layer, inner[s.param.name[:-2]], s.param.name))

    def named(self, flat: Any) -> dict[str, Any]:
        """Views of all A and B in a flat buffer by PEFT's names, in order."""
        return {s.hf: _cut(flat, s) for s in self.in_order()}

    def init(self, flat: np.ndarray, seed: int) -> None:
        """Starting values on a host buffer, as PEFT's: A uniform in +-1/sqrt(I) (kaiming_uniform with a = sqrt(5)), B zeros.

        Each tensor has a random stream of its own, named by seed and position."""
        flat[...] = 0
        for number, s in enumerate(self.in_order()):
            if s.param.init == "uniform":
                rng = np.random.Generator(np.random.PCG64([seed, number]))
                bound = 1 / math.sqrt(s.shape[1])
                _cut(flat, s)[...] = rng.uniform(-bound, bound, s.shape)


def _cut(flat: Any, s: Slot) -> Any:
    return flat[s.offset : s.offset + s.size].reshape(s.shape)


def adapter_specs(cfg: ModelConfig, dtype: str, config: LoraConfig) -> BufferSpecs:
    """List the buffers of adapters; those of their optimizer are Optimizer.specs of an AdapterLayout's size."""
    layout, wide, r = AdapterLayout(cfg, config), WIDE[dtype], config.rank
    most_in = max((p.base.shape[1] for p in layout.pairs), default=1)
    most_out = max((p.base.shape[0] for p in layout.pairs), default=1)
    out = {
        "adapters": BufferSpec("weights", (layout.size,), wide),
        "adapter_gradients": BufferSpec("gradients", (layout.size,), wide),
        "base": BufferSpec("base", (_base_size(layout),), dtype),
        "scaled_identity": BufferSpec("scratch", (r, r), wide),
        "scaled_a": BufferSpec("scratch", (r * most_in,), wide),
        "scaled_b": BufferSpec("scratch", (r * most_out,), wide),
        "unused": BufferSpec("scratch", (r * most_in,), wide),
    }
    if wide != dtype:
        out["merged"] = BufferSpec("scratch", (max(p.base.size for p in layout.pairs),), wide)
    return out


def _base_size(layout: AdapterLayout) -> int:
    return sum(round_up(p.base.size, ALIGN) for p in layout.pairs)


class Adapters:
    """Adapters of a model: the flat arrays that an optimizer updates in place of the model's own.

    w, g     (layout.size,) wide    A and B of every pair, and their gradients
    base     [(O, I)]               W of every pair, as loaded; model.w holds W_eff
    """

    def __init__(self, model: Model, config: LoraConfig) -> None:
        self.model, self.config = model, config
        self.be, self.cfg, self.dtype = model.be, model.cfg, WIDE[model.dtype]
        self.layout = AdapterLayout(model.cfg, config)
        self.buffers = Buffers(self.be, adapter_specs(model.cfg, model.dtype, config))
        self.w, self.g = self.buffers["adapters"], self.buffers["adapter_gradients"]
        self.base: list[Any] = []
        at = 0
        for p in self.layout.pairs:
            self.base.append(self.buffers["base"][at : at + p.base.size].reshape(p.base.shape))
            at += round_up(p.base.size, ALIGN)
        identity = config.scale * np.eye(config.rank)
        self.be.from_host(self.buffers["scaled_identity"], identity.astype(self.dtype))
        self.base_sha256 = ""

    def set_base(self, host: np.ndarray) -> None:
        """The weights that stay as they are: a host buffer in the model's Layout order, rounded to the model's dtype."""
        model = self.model
        self.be.from_host(model.w, host)
        for p, base in zip(self.layout.pairs, self.base, strict=True):
            self.be.copy(base, _cut(model.w, p.base))
        self.base_sha256 = self.base_hash()

    def base_values(self) -> Iterator[tuple[Slot, Any]]:
        """(slot, flat values on the device) of every weight that must not change: the matrices without their adapters, and
        the tensors that have none."""
        adapted = {p.base.offset: base for p, base in zip(self.layout.pairs, self.base, strict=True)}
        for s in self.model.layout.in_order():
            found = adapted[s.offset] if s.offset in adapted else _cut(self.model.w, s)
            yield s, found.reshape(-1)

    def base_hash(self) -> str:
        """SHA-256 of every weight that must not change, as it is on the device."""
        digest = hashlib.sha256()
        for s, flat in self.base_values():
            for start in range(0, s.size, HASH_ELEMENTS):
                part = np.ascontiguousarray(self.be.to_host(flat[start : start + HASH_ELEMENTS]))
                digest.update(part.view(np.uint8).data)
        return digest.hexdigest()

    def merge(self) -> None:
        """W_eff = W + s B A for every adapted matrix: what the model computes with from here on."""
        be, r = self.be, self.config.rank
        for p, base, (a, _), sb in self._each():
            w, d = _cut(self.model.w, p.base), _cut(self.model.g, p.base)
            sum_ = (
                w
                if self.dtype == self.model.dtype
                else self.buffers["merged"][: p.base.size].reshape(w.shape)
            )
            be.copy(sum_, base)
            dx = self.buffers["unused"][: r * p.base.shape[1]].reshape(a.shape)
            be.linear_bwd(
                dx, sum_, None, sb, a, d
            )  # sum_ += (s B^T)^T A; what it also gives, s B^T d, is not used
            if sum_ is not w:
                be.copy(w, sum_)

    def collect_gradients(self) -> None:
        """g = gradients of all A and B, from those of the model's matrices; sets the model's gradients to zero."""
        be, identity = self.be, self.buffers["scaled_identity"]
        for (p, _, (a, _), sb), (da, db) in zip(self._each(), self.layout.views(self.g), strict=True):
            d = _cut(self.model.g, p.base)
            be.linear_bwd(da, None, None, sb, a, d)  # s B^T d
            sa = self.buffers["scaled_a"][: a.size].reshape(a.shape)
            be.linear_bwd(sa, None, None, identity, a, a)  # s A
            be.linear_fwd(db, d, sa, None)  # d (s A)^T
        be.fill(self.model.g, 0)

    def _each(self) -> Any:
        """(pair, base, (A, B), s B^T) of every adapted matrix."""
        r = self.config.rank
        for p, base, (a, b) in zip(self.layout.pairs, self.base, self.layout.views(self.w), strict=True):
            sb = self.buffers["scaled_b"][: b.size].reshape(r, p.base.shape[0])
            self.be.linear_fwd(sb, self.buffers["scaled_identity"], b, None)
            yield p, base, (a, b), sb


def lora_to_json(c: LoraConfig) -> dict[str, Any]:
    """A configuration for JSON."""
    return {"rank": c.rank, "alpha": c.alpha, "targets": list(c.targets), "rslora": c.rslora}


def lora_of_json(d: Mapping[str, Any]) -> LoraConfig:
    """What lora_to_json wrote."""
    return LoraConfig(d["rank"], d["alpha"], tuple(d["targets"]), d["rslora"])
