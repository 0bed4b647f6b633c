"""Low-rank adapters (Hu et al. 2022): of some matrices W only B and A are trained, W_eff = W + s B A.

    A (r,I), B (O,r), s = alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, "rslora")

Of an embedding W (V,C), A (r,C) and B (V,r) are the transposes of PEFT's lora_embedding_B and lora_embedding_A: W_eff is
made as of any matrix. Beside adapters, whole copies of embedding, head and norms may be trained: PEFT's modules_to_save.
A head that is the embedding stays it: one matrix, adapted or copied once, as with PEFT's ensure_weight_tying.

Here are their numbers, names and places; adapters.py computes with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from ..common.patterns import compiled_end
from ..common.rounding import round_up
from .config import ModelConfig
from .params import ALIGN, LAYER, MAPS, Layout, Param, Slot, padded_vocab

SHORT = {"q": "wq", "k": "wk", "v": "wv", "o": "wo", "gate": "wgate", "up": "wup", "down": "wdown"}
# PEFT's names begin with those of its two wrappers
PREFIX = "base_model.model."
# {wq: q_proj}
LINEAR = {p.name: p.hf.split(".")[-2] for p in LAYER if p.name in SHORT.values()}
# matrices outside the blocks, which all-linear leaves out
OUTSIDE = {"embed": "embed_tokens", "head": "lm_head"}
TARGETS = LINEAR | OUTSIDE
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
    saved: ends of the names of modules that are trained whole beside adapters, as PEFT's modules_to_save: embed_tokens
    dora: rows of adapted matrices have norms that are trained: dora.py
    dropout: share of what A gets that is dropped in training: lora_dropout.py
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False
    base: str | None = None
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    saved: tuple[str, ...] = ()
    dora: bool = False
    dropout: float = 0.0

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
        return [TARGETS[t] for t in self.targets]

    def saves(self, module: str) -> bool:
        """Tell if a module is trained whole, as PEFT tells it: by the end of its name."""
        return any(module.endswith(end) for end in self.saved)


def matches(pattern: str, module: str) -> bool:
    """Ask if a pattern, a regular expression, ends the name of a module, as PEFT asks it. Raises ValueError: see compiled_end."""
    return compiled_end(pattern).match(module) is not None


def adapted_in(cfg: ModelConfig, config: LoraConfig) -> set[str]:
    """Names of the parameters that get adapters: a head that is the embedding is adapted there."""
    return {"embed" if t == "head" and cfg.tie_word_embeddings else t for t in config.targets}


def module_of(hf: str) -> str:
    """Cut the name of a tensor to that of its module: model.norm."""
    return hf.rsplit(".", 1)[0]


@dataclass(frozen=True)
class Pair:
    """Slots of an adapted matrix: of W in the model's buffer, of A and B in the adapters' buffer; s of W + s B A; the slot of
    the norms of DoRA."""

    base: Slot
    a: Slot
    b: Slot
    scale: float
    m: Slot | None = None

    @property
    def module(self) -> str:
        """Hugging Face name of the linear map."""
        return self.base.hf.removesuffix(".weight")


class AdapterLayout:
    """Slots of A and B of every adapted matrix in a flat buffer, and of what is trained whole, as Layout has them of a model.

    saved: (slot of the model, slot here) of every tensor that is trained whole. Matrices decay, vectors follow. ALIGN elements
    of padding are last, so that the optimizer's region without decay is not empty; saved hashes of optimizer state include
    the padding.
    """

    def __init__(self, cfg: ModelConfig, config: LoraConfig) -> None:
        self.cfg, self.config = cfg, config
        self.slots: list[Slot] = []
        self.pairs: list[Pair] = []
        self.saved: list[tuple[Slot, Slot]] = []
        self.whole, n, adapted = Layout(cfg), 0, adapted_in(cfg, config)
        for s in self.whole.slots:
            if s.param.name not in adapted:
                continue
            pair, module = [], s.hf.removesuffix(".weight")
            rank, is_table = config.rank_of(module), s.param.name == "embed"
            for letter, shape, init in (
                ("A", (rank, s.shape[1]), "normal" if is_table else "uniform"),
                ("B", (s.shape[0], rank), "zeros"),
            ):
                # PEFT's A of an embedding is what is zero, and both are transposed.
                end = f"lora_embedding_{'BA'['AB'.index(letter)]}" if is_table else f"lora_{letter}.weight"
                hf = f"{PREFIX}{s.param.hf.removesuffix('.weight')}.{end}"
                param = Param(f"{s.param.name}.{letter}", "", init, True, hf)
                pair.append(Slot(s.layer, param, n, shape))
                n = _behind(n, s, shape)
            self.slots += pair
            self.pairs.append(Pair(s, pair[0], pair[1], config.scale_of(module)))
        whole = [s for s in self.whole.slots if self._is_saved(s)]
        for s in whole:
            if s.param.decay:
                n = self._add_saved(s, n)
        self.decayed = n
        for s in whole:
            if not s.param.decay:
                n = self._add_saved(s, n)
        for k, p in enumerate(self.pairs if config.dora else ()):
            hf = f"{PREFIX}{p.base.param.hf.removesuffix('.weight')}.lora_magnitude_vector"
            m = Slot(
                p.base.layer, Param(f"{p.base.param.name}.M", "", "norms", False, hf), n, p.base.shape[:1]
            )
            n = round_up(n + m.size, ALIGN)
            self.slots.append(m)
            self.pairs[k] = replace(p, m=m)
        self.size = n + ALIGN
        self.by_hf = {s.hf: s for s in self.slots}

    def _is_saved(self, s: Slot) -> bool:
        """Tell if a tensor of the model is trained whole; a head that is the embedding counts as the embedding."""
        tied = s.param.name == "embed" and self.cfg.tie_word_embeddings
        return self.config.saves(module_of(s.hf)) or (tied and self.config.saves("lm_head"))

    def _add_saved(self, s: Slot, n: int) -> int:
        slot = Slot(s.layer, replace(s.param, init="base", hf=PREFIX + s.param.hf), n, s.shape)
        self.slots.append(slot)
        self.saved.append((s, slot))
        return _behind(n, s, s.shape)

    @property
    def faster(self) -> tuple[slice, ...]:
        """Places of every B, with the padding behind it, that LoRA+ moves faster; of an embedding neither factor is meant."""
        found = [p.b for p in self.pairs if p.base.param.name != "embed"]
        return tuple(
            slice(s.offset, round_up(s.offset + s.size, ALIGN)) for s in sorted(found, key=lambda s: s.offset)
        )

    def trains(self, name: str) -> bool:
        """Tell if embedding or head, by its name in the table, is adapted or trained whole."""
        slots = [s for s, _ in self.saved] + [p.base for p in self.pairs]
        return any(s.param.name == name for s in slots)

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
    def adapts_head(self) -> bool:
        """Tell if logits are made with an adapted matrix, which may be the embedding."""
        name = "embed" if self.cfg.tie_word_embeddings else "head"
        return any(p.base.param.name == name for p in self.pairs)

    @property
    def dropped(self) -> list[Pair]:
        """List the pairs that dropout is for: an embedding has none, but that it is the head."""
        return [p for p in self.pairs if p.base.param.name != "embed" or self.cfg.tie_word_embeddings]

    @property
    def widest_map(self) -> int:
        """Rows of the largest matrix of the blocks of which a part has adapters."""
        names = [name for name, parts in MAPS.items() if {*parts} & {*self.config.targets}]
        rows = dict[tuple[int | None, str], int]()
        for s in self.whole.slots:
            for name in names:
                if s.param.name in MAPS[name]:
                    rows[s.layer, name] = rows.get((s.layer, name), 0) + s.shape[0]
        return max(rows.values(), default=0)

    @property
    def largest_map(self) -> int:
        """Elements of the largest matrix of maps()."""
        names = {part: name for name, parts in self.maps().items() for part in parts}
        sizes: dict[tuple[int, str], int] = {}
        for s in Layout(self.cfg).slots:
            if s.layer is not None and s.param.name in names:
                key = s.layer, names[s.param.name]
                sizes[key] = sizes.get(key, 0) + s.size
        outside = [rows_of(p.base) * p.base.shape[1] for p in self.pairs if p.base.layer is None]
        return max([*sizes.values(), *outside], default=0)

    def in_order(self) -> list[Slot]:
        """Sort the slots by layer, then in the order of the parameter table, A before B; behind them what is outside of the
        blocks, and what is trained whole."""
        inner = {name: i for i, name in enumerate(TARGETS)}
        whole = {slot.hf: i for i, (_, slot) in enumerate(self.saved)}

        def key(s: Slot) -> tuple[int, float, int, str]:
            if s.hf in whole:
                return 1, 0, whole[s.hf], ""
            return 0, math.inf if s.layer is None else s.layer, inner[s.param.name[:-2]], s.param.name

        return sorted(self.slots, key=key)

    def named(self, flat: Any) -> dict[str, Any]:
        """View all A and B in a flat buffer by PEFT's names, in order."""
        return {s.hf: cut(flat, s) for s in self.in_order()}

    def init(self, flat: np.ndarray, seed: int, read: Callable[[str], np.ndarray] | None = None) -> None:
        """Fill a host buffer as PEFT does: A uniform in +-1/sqrt(I) (kaiming_uniform with a = sqrt(5)), of an embedding normal,
        B zeros; what is trained whole begins as read(Hugging Face name) gives it.

        Each tensor has its own random stream, named by seed and position.
        """
        flat[...] = 0
        for number, s in enumerate(self.in_order()):
            if s.param.init == "uniform":
                rng = np.random.Generator(np.random.PCG64([seed, number]))
                bound = 1 / math.sqrt(s.shape[1])
                cut(flat, s)[...] = rng.uniform(-bound, bound, s.shape)
            elif s.param.init == "normal":
                rng = np.random.Generator(np.random.PCG64([seed, number]))
                cut(flat, s)[...] = rng.standard_normal(s.shape, np.float32)
        if read is not None:
            for base, slot in self.saved:
                cut(flat, slot)[...] = read(base.hf)
            for p in self.pairs:
                if p.m is not None:
                    cut(flat, p.m)[...] = np.sqrt(np.square(read(p.base.hf), dtype=np.float64).sum(1))


def cut(flat: Any, s: Slot) -> Any:
    """View a tensor in a flat buffer."""
    return flat[s.offset : s.offset + s.size].reshape(s.shape)


def rows_of(s: Slot) -> int:
    """Count the rows that a matrix takes in a flat buffer: a vocabulary is padded."""
    return padded_vocab(s.shape[0]) if s.param.shape.startswith("V") else s.shape[0]


def _behind(n: int, base: Slot, shape: tuple[int, ...]) -> int:
    """Find the place behind a slot at n whose rows may be those of a vocabulary."""
    rows = rows_of(base) if shape[0] == base.shape[0] else shape[0]
    return round_up(n + rows * prod(shape[1:]), ALIGN)


def lora_to_json(c: LoraConfig) -> dict[str, Any]:
    """Convert to JSON."""
    plain = {"rank": c.rank, "alpha": c.alpha, "targets": list(c.targets), "rslora": c.rslora}
    patterns = {key: dict(getattr(c, key)) for key in PATTERNS if getattr(c, key)}
    saved = {"saved": list(c.saved)} if c.saved else {}
    kinds = {"base": c.base, "dora": c.dora, "dropout": c.dropout}
    return plain | patterns | saved | {key: x for key, x in kinds.items() if x}


def lora_of_json(d: Mapping[str, Any]) -> LoraConfig:
    """Read the JSON of lora_to_json."""
    ranks, alphas = (tuple(d.get(key, {}).items()) for key in PATTERNS)
    whole = tuple(d.get("saved", ()))
    return LoraConfig(
        d["rank"],
        d["alpha"],
        tuple(d["targets"]),
        d["rslora"],
        d.get("base"),
        ranks,
        alphas,
        whole,
        d.get("dora", False),
        d.get("dropout", 0.0),
    )
