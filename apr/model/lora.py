"""Low-rank adapters (Hu et al. 2022): of some matrices W only B and A are trained, W_eff = W + s B A.

    A (r,I), B (O,r), s = alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, "rslora")

Here are their numbers, names and places; adapters.py computes with them. No dropout: W_eff is one matrix.
"""

from __future__ import annotations

import dataclasses
import math
import re
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
# fields of LoraConfig, and keys of PEFT's adapter_config.json
PATTERNS = ("rank_pattern", "alpha_pattern")
# format of the frozen matrices under adapters; none: that of the run
BASES = ("int8",)


@dataclass(frozen=True)
class LoraConfig:
    """Hyper-parameters of adapters: rank r, alpha of the scale, names of the adapted parameters in the table's order.

    base: format of the frozen matrices of the blocks, one of BASES, or None for the dtype of the run
    rank_pattern, alpha_pattern: (pattern, number) for modules whose name ends with a pattern, a regular expression as PEFT
    has them; the first that matches holds
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False
    base: str | None = None
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    @property
    def scale(self) -> float:
        """Compute s in W + s B A, of modules that no pattern names."""
        return self.scale_of("")

    def rank_of(self, module: str) -> int:
        """Look up the rank of a module: model.layers.0.self_attn.q_proj."""
        return next((r for pattern, r in self.rank_pattern if matches(pattern, module)), self.rank)

    def scale_of(self, module: str) -> float:
        """Compute s of a module."""
        alpha = next((a for pattern, a in self.alpha_pattern if matches(pattern, module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def modules(self) -> list[str]:
        """List the Hugging Face names of the targets: q_proj."""
        return [LINEAR[t] for t in self.targets]


def lora_config(
    rank: int | None,
    alpha: float | None,
    targets: str | None,
    base: str | None = None,
    rslora: bool = False,
    ranks: str | None = None,
    alphas: str | None = None,
) -> LoraConfig | None:
    """Build a LoraConfig from flags; ranks, alphas: patterns. None without a rank. Raises UsageError."""
    if rank is None:
        if rslora or any(x is not None for x in (alpha, targets, base, ranks, alphas)):
            raise UsageError(
                "--lora-alpha, --lora-targets, --lora-base, --lora-rslora and patterns are about adapters: give --lora-rank too"
            )
        return None
    return LoraConfig(
        rank,
        ALPHA_PER_RANK * rank if alpha is None else alpha,
        parse_targets(targets),
        rslora,
        base,
        tuple((p, int(n)) for p, n in parse_pattern("--lora-rank-pattern", ranks, whole=True)),
        tuple(parse_pattern("--lora-alpha-pattern", alphas)),
    )


def parse_pattern(name: str, text: str | None, whole: bool = False) -> list[tuple[str, float]]:
    """Parse "q_proj=4,layers.0.mlp.*=8" into patterns and numbers. Raises UsageError."""
    found = []
    for part in filter(None, (p.strip() for p in (text or "").split(","))):
        pattern, _, number = part.rpartition("=")
        try:
            value = float(number)
            re.compile(pattern)
        except (ValueError, re.error) as e:
            raise UsageError(f"{name} {part!r}: write PATTERN=NUMBER, such as q_proj=4 ({e})") from None
        if not pattern or not 0 < value < math.inf or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            raise UsageError(f"{name} {part!r}: write PATTERN=NUMBER with {kind} above 0, such as q_proj=4")
        found.append((pattern, value))
    return found


def matches(pattern: str, module: str) -> bool:
    """Ask if a pattern, a regular expression, ends the name of a module, as PEFT asks it."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def check_rank(cfg: ModelConfig, config: LoraConfig) -> None:
    """Raise UsageError for a rank that no adapted matrix can use, above the smaller side of each, and for a pattern that
    matches no adapted matrix."""
    plain = dataclasses.replace(config, rank=1, rank_pattern=(), alpha_pattern=())
    sides = {pair.module: min(pair.base.shape) for pair in AdapterLayout(cfg, plain).pairs}
    for name, patterns in (("rank", config.rank_pattern), ("alpha", config.alpha_pattern)):
        for pattern, _ in patterns:
            if not any(matches(pattern, module) for module in sides):
                example = next(iter(sides), "")
                raise UsageError(
                    f"--lora-{name}-pattern {pattern!r} matches no adapted matrix; their names end like {example!r}, and "
                    f"--lora-targets says which are adapted"
                )
    for module, side in sides.items():
        if config.rank_of(module) > side and config.rank_pattern:
            raise UsageError(
                f"--lora-rank-pattern: rank {config.rank_of(module)} of {module}, whose smaller side is {side}"
            )
    most = max(sides.values(), default=config.rank)
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
    """Slots of an adapted matrix: of W in the model's buffer, of A and B in the adapters' buffer; s of W + s B A."""

    base: Slot
    a: Slot
    b: Slot
    scale: float

    @property
    def module(self) -> str:
        """Hugging Face name of the linear map."""
        return self.base.hf.removesuffix(".weight")


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
            pair, module = [], s.hf.removesuffix(".weight")
            rank = config.rank_of(module)
            for letter, shape, init in (
                ("A", (rank, s.shape[1]), "uniform"),
                ("B", (s.shape[0], rank), "zeros"),
            ):
                hf = f"{PREFIX}{s.param.hf.removesuffix('.weight')}.lora_{letter}.weight"
                param = Param(f"{s.param.name}.{letter}", "", init, True, hf)
                pair.append(Slot(s.layer, param, n, shape))
                n = round_up(n + prod(shape), ALIGN)
            self.slots += pair
            self.pairs.append(Pair(s, pair[0], pair[1], config.scale_of(module)))
        self.decayed = n
        self.size = n + ALIGN
        self.by_hf = {s.hf: s for s in self.slots}

    @property
    def max_rank(self) -> int:
        """Highest rank of a matrix."""
        return max((p.a.shape[0] for p in self.pairs), default=self.config.rank)

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
    patterns = {key: dict(getattr(c, key)) for key in PATTERNS if getattr(c, key)}
    return plain | ({"base": c.base} if c.base else {}) | patterns


def lora_of_json(d: Mapping[str, Any]) -> LoraConfig:
    """Read the JSON of lora_to_json."""
    patterns = (tuple(d.get(key, {}).items()) for key in PATTERNS)
    return LoraConfig(d["rank"], d["alpha"], tuple(d["targets"]), d["rslora"], d.get("base"), *patterns)
