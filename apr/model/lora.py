"""Low-rank adapters (Hu et al. 2022): of some matrices W only B and A are trained, W_eff = W + s B A.

    A (r,I), B (O,r), s = alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, "rslora")

Here are their numbers, names and places; adapters.py computes with them. No dropout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ..common.errors import UsageError
from ..common.rounding import round_up
from .config import ModelConfig
from .params import ALIGN, LAYER, MAPS, Layout, Param, Slot

SHORT = {"q": "wq", "k": "wk", "v": "wv", "o": "wo", "gate": "wgate", "up": "wup", "down": "wdown"}
# PEFT's names begin with those of its two wrappers
PREFIX = "base_model.model."
# {wq: q_proj}
LINEAR = {p.name: p.hf.split(".")[-2] for p in LAYER if p.name in SHORT.values()}
# default of alpha / rank
ALPHA_PER_RANK = 2.0
# format of the frozen matrices under adapters; none: that of the run
BASES = ("int8",)


@dataclass(frozen=True)
class LoraConfig:
    """Hyper-parameters of adapters: rank r, alpha of the scale, names of the adapted parameters in the table's order.

    base: format of the frozen matrices of the blocks, one of BASES, or None for the dtype of the run
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False
    base: str | None = None

    @property
    def scale(self) -> float:
        """Compute s in W + s B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def modules(self) -> list[str]:
        """List the Hugging Face names of the targets: q_proj."""
        return [LINEAR[t] for t in self.targets]


def lora_config(
    rank: int | None, alpha: float | None, targets: str | None, base: str | None = None
) -> LoraConfig | None:
    """Build a LoraConfig from flags; None without a rank. Raises UsageError."""
    if rank is None:
        if alpha is not None or targets is not None or base is not None:
            raise UsageError(
                "--lora-alpha, --lora-targets and --lora-base are about adapters: give --lora-rank too"
            )
        return None
    return LoraConfig(
        rank, ALPHA_PER_RANK * rank if alpha is None else alpha, parse_targets(targets), base=base
    )


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
        return [(cut(flat, p.a), cut(flat, p.b)) for p in self.pairs]

    def maps(self) -> dict[str, tuple[str, ...]]:
        """List the linear maps that are computed with a matrix made for it: those with adapters, and of 8-bit integers."""
        return {
            name: parts
            for name, parts in MAPS.items()
            if self.config.base or any(part in self.config.targets for part in parts)
        }

    @property
    def largest_map(self) -> int:
        """Elements of the largest matrix of maps()."""
        names = {part: name for name, parts in self.maps().items() for part in parts}
        sizes: dict[tuple[int, str], int] = {}
        for s in Layout(self.cfg).slots:
            if s.layer is not None and s.param.name in names:
                key = s.layer, names[s.param.name]
                sizes[key] = sizes.get(key, 0) + s.size
        return max(sizes.values())

    def in_order(self) -> list[Slot]:
        """Sort the slots by layer, then in the order of the parameter table, A before B."""
        inner = {name: i for i, name in enumerate(LINEAR)}
        return sorted(self.slots, key=lambda s: (s.layer, inner[s.param.name[:-2]], s.param.name))

    def named(self, flat: Any) -> dict[str, Any]:
        """View all A and B in a flat buffer by PEFT's names, in order."""
        return {s.hf: cut(flat, s) for s in self.in_order()}

    def init(self, flat: np.ndarray, seed: int) -> None:
        """Fill a host buffer as PEFT does: A uniform in +-1/sqrt(I) (kaiming_uniform with a = sqrt(5)), B zeros.

        Each tensor has its own random stream, named by seed and position.
        """
        flat[...] = 0
        for number, s in enumerate(self.in_order()):
            if s.param.init == "uniform":
                rng = np.random.Generator(np.random.PCG64([seed, number]))
                bound = 1 / math.sqrt(s.shape[1])
                cut(flat, s)[...] = rng.uniform(-bound, bound, s.shape)


def cut(flat: Any, s: Slot) -> Any:
    """View a tensor in a flat buffer."""
    return flat[s.offset : s.offset + s.size].reshape(s.shape)


def lora_to_json(c: LoraConfig) -> dict[str, Any]:
    """Convert to JSON."""
    plain = {"rank": c.rank, "alpha": c.alpha, "targets": list(c.targets), "rslora": c.rslora}
    return plain | ({"base": c.base} if c.base else {})


def lora_of_json(d: Mapping[str, Any]) -> LoraConfig:
    """Read the JSON of lora_to_json."""
    return LoraConfig(d["rank"], d["alpha"], tuple(d["targets"]), d["rslora"], d.get("base"))
