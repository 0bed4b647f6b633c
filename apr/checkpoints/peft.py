"""LoRA adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..common.atomic import write_json, write_text
from ..common.errors import InputNotFound, MalformedFile, Refused
from ..common.files import parse_json, read_text
from ..model.config import ModelConfig
from ..model.lora import LINEAR, PREFIX, AdapterLayout, LoraConfig, matches
from ..model.params import Layout, Slot
from .checkpoint import TEMPLATE
from .hf import read_safetensors, write_safetensors
from .other_readers import compare_adapter
from .tensors import EMBED, HEAD

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Keys that change what an adapter computes, with the only value that apr honours (an empty one is always good).
MUST_BE: dict[str, Any] = {
    "peft_type": "LORA",
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "use_bdlora": None,
    "velora_config": None,
    "monteclora_config": None,
    "kappa_tune_config": None,
}
# Keys that are read here, or that describe a training that is over.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r", "target_modules",
    "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "runtime_config", "peft_version", "qalora_group_size", "ensure_weight_tying",
    "tie_word_embeddings",
}  # fmt: skip
# Initial values of A and B; others also change the base, so that the adapter does not belong to it.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# PEFT saves the untouched matrix of an adapted head beside A and B (save_embedding_layers="auto").
_BASE = re.compile(rf"^{re.escape(PREFIX)}(?P<module>.+?)(\.base_layer)?\.weight$")
PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
_NAME = re.compile(rf"^{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<letter>A|B)(\.default)?\.weight$")


@dataclass(frozen=True)
class Delta:
    """scale * b a, added to a matrix.  a (r,I), b (O,r), mapped files"""

    a: np.ndarray
    b: np.ndarray
    scale: float


@dataclass(frozen=True)
class LoadedAdapter:
    """A checked adapter: its configuration file, and its deltas by the Hugging Face name of the matrix."""

    config: dict[str, Any]
    deltas: Mapping[str, Delta]
    source: str

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all A and B as float32, by name, and of their scales."""
        digest = hashlib.sha256()
        for hf, d in sorted(self.deltas.items()):
            digest.update(f"{hf} {d.scale!r}\0".encode())
            for x in (d.a, d.b):
                digest.update(np.ascontiguousarray(x, "<f4").view(np.uint8).data)
        return digest.hexdigest()

    def lora_config(self, cfg: ModelConfig) -> LoraConfig:
        """Build the LoraConfig to go on training with. Raises Refused for adapters that differ between layers."""
        c = self.config
        names = Counter(hf.split(".")[-2] for hf in self.deltas)
        unknown = sorted(set(names) - set(LINEAR.values()))
        uneven = [name for name, count in names.items() if count != cfg.num_layers]
        ranks = {d.a.shape[0] for d in self.deltas.values()}
        scales = {d.scale for d in self.deltas.values()}
        if unknown or uneven:
            where = "" if unknown else " in some layers only"
            raise Refused(
                f"{self.source}: adapts {[*unknown, *uneven][0]}{where}, which --lora-init does not go on with; `apr merge` "
                "makes it part of the weights"
            )
        targets = tuple(name for name, peft in LINEAR.items() if peft in names)
        if len(ranks) > 1 or len(scales) > 1:
            modules = [hf.removesuffix(".weight") for hf in self.deltas]
            used = {
                key: tuple(
                    (p, n) for p, n in (c.get(key) or {}).items() if any(matches(p, m) for m in modules)
                )
                for key in PATTERNS
            }
            return LoraConfig(
                int(c["r"]), float(c["lora_alpha"]), targets, bool(c.get("use_rslora")), None,
                tuple((p, int(n)) for p, n in used["rank_pattern"]), tuple((p, float(n)) for p, n in used["alpha_pattern"]),
            )  # fmt: skip
        # The first stands for all: ranks and scales are one.
        alpha = _of_pattern(c, "alpha_pattern", next(iter(self.deltas)).removesuffix(".weight"))
        return LoraConfig(ranks.pop(), alpha, targets, bool(c.get("use_rslora")))

    @cached_property
    def note(self) -> str:
        """Name the patterns that match no adapted matrix, so that their numbers count for nothing; "" for none."""
        modules = [hf.removesuffix(".weight") for hf in self.deltas]
        idle = [
            f"{key} {pattern!r}"
            for key in PATTERNS
            for pattern in self.config.get(key) or {}
            if not any(_matches(key, pattern, module) for module in modules)
        ]
        return (
            f"{self.source}: {', '.join(idle)}: matches no adapted matrix, and is passed over" if idle else ""
        )


def adapter_config(c: LoraConfig, base: str) -> dict[str, Any]:
    """Build adapter_config.json as PEFT writes it, without keys at their defaults that only matter in training."""
    alpha = int(c.alpha) if c.alpha == int(c.alpha) else c.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": c.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": c.modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": c.rslora,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": dict(c.rank_pattern),
        "alpha_pattern": {p: int(a) if a == int(a) else a for p, a in c.alpha_pattern},
    }


def write_adapter(
    folder: Path, layout: AdapterLayout, flat: np.ndarray, base: str, template: str | None = None
) -> None:
    """Write adapters for PEFT.from_pretrained.  flat (layout.size,) on the host; base: name of the base model, for people;
    template: the chat template that the adapters were trained with

    Raises IOFailure, Refused: not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(x) for name, x in layout.named(flat).items()}
    write_safetensors(folder / WEIGHTS, tensors, "float32")
    if template is not None:
        write_text(folder / TEMPLATE, template)
    named = {
        f"{p.base.layer}.{LINEAR[p.base.param.name]}.{x}": s
        for p in layout.pairs
        for x, s in (("A", p.a), ("B", p.b))
    }
    config = adapter_config(layout.config, base)
    write_json(folder / CONFIG, config)
    try:
        compare_adapter(folder, layout.cfg.num_layers, {name: tensors[s.hf] for name, s in named.items()})
    except BaseException:
        # Without it nobody takes the folder for a whole one.
        (folder / CONFIG).unlink()
        raise


def read_adapter(
    source: str, cfg: ModelConfig, base: Mapping[str, np.ndarray] | None = None
) -> LoadedAdapter:
    """Open a PEFT LoRA folder for a model; check files, configuration, names and shapes.

    base: matrices of the model by Hugging Face name, to which those that the folder holds besides A and B must be equal.

    Raises InputNotFound, MalformedFile, Refused: a setting or tensor that would not be honoured, by name.
    """
    folder = Path(source)
    if not (folder / CONFIG).is_file():
        raise InputNotFound(f"{source}: no {CONFIG}; give the folder of a LoRA adapter as PEFT saves it")
    if not (folder / WEIGHTS).is_file():
        pickle = (folder / "adapter_model.bin").is_file()
        hint = (
            "; adapter_model.bin is a pickle, which can run code: save it with safe_serialization=True"
            if pickle
            else ""
        )
        raise InputNotFound(f"{folder}: no {WEIGHTS}{hint}")
    config = parse_json(read_text(folder / CONFIG), str(folder / CONFIG))
    _check_config(config, str(folder / CONFIG))
    tensors = read_safetensors(folder / WEIGHTS)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name in tensors:
        match = _NAME.match(name)
        if match is None:
            _check_untouched(name, tensors[name], cfg, base or {}, str(folder / WEIGHTS))
            continue
        pairs.setdefault(match["module"], {})[match["letter"]] = tensors[name]
    if not pairs:
        raise MalformedFile(f"{folder / WEIGHTS}: holds no adapter")
    by_hf = Layout(cfg).by_hf
    deltas = {}
    for module, pair in pairs.items():
        slot = by_hf.get(f"{module}.weight")
        if slot is None or len(slot.shape) != 2 or slot.param.name == "embed":
            hint = (
                "; the head is tied to the embedding"
                if module == "lm_head" and cfg.tie_word_embeddings
                else ""
            )
            raise Refused(f"{folder / WEIGHTS}: adapts {module}, which is no linear map of this model{hint}")
        deltas[slot.hf] = _delta(config, module, pair, slot, str(folder / WEIGHTS))
    return LoadedAdapter(config, deltas, source)


def _check_untouched(
    name: str, stored: np.ndarray, cfg: ModelConfig, base: Mapping[str, np.ndarray], source: str
) -> None:
    """Raise Refused unless a tensor is a matrix of the base, to the precision that either is stored in."""
    match = _BASE.match(name)
    hf = "" if match is None else f"{match['module']}.weight"
    want = base.get(EMBED if hf == HEAD and cfg.tie_word_embeddings else hf)
    if want is None:
        raise Refused(
            f"{source}: tensor {name!r} is no A or B of a linear map (lora_A, lora_B), which is all that apr adds"
        )
    if stored.shape != want.shape or not (
        np.array_equal(stored.astype(want.dtype), want) or np.array_equal(want.astype(stored.dtype), stored)
    ):
        raise Refused(
            f"{source}: tensor {name!r} differs from {hf} of the base: it was trained itself, or belongs to another base; "
            "apr adds A and B only, so merge it with PEFT"
        )


def _check_config(config: dict[str, Any], source: str) -> None:
    for key, value in config.items():
        if key in HARMLESS:
            continue
        if key == "init_lora_weights":
            if value not in STARTS:
                raise Refused(
                    f"{source}: {key} = {value!r} changes the base weights too; save the adapter converted to plain LoRA "
                    "(path_initial_model_for_weight_conversion)"
                )
            continue
        want = MUST_BE.get(key)
        if key in MUST_BE and (value == want or (key not in ("peft_type", "bias") and not value)):
            continue
        if key not in MUST_BE and value in (None, False, [], {}, ""):
            continue
        reason = (
            f"apr honours {want!r} only"
            if key in MUST_BE
            else "apr does not know this key, and it may change what is computed"
        )
        raise Refused(f"{source}: {key} = {value!r}; {reason}")
    if config.get("peft_type") != "LORA":
        raise Refused(f"{source}: peft_type = {config.get('peft_type')!r}; apr merges LORA only")
    for key in ("r", "lora_alpha"):
        _check_number(key, config.get(key), source)
    for key in PATTERNS:
        if not isinstance(config.get(key) or {}, dict):
            raise MalformedFile(f"{source}: {key} = {config[key]!r} is not an object")
        for pattern, value in (config.get(key) or {}).items():
            _check_number(f"{key}: {pattern!r}", value, source)


def _check_number(name: str, value: Any, source: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise MalformedFile(f"{source}: {name} = {value!r} is not a number above 0")


def _of_pattern(config: dict[str, Any], key: str, module: str) -> float:
    """Look up a number of a module: by the first pattern that matches its name, else that of all modules."""
    for pattern, value in (config.get(key) or {}).items():
        if _matches(key, pattern, module):
            return float(value)
    return float(config[PATTERNS[key]])


def _matches(key: str, pattern: str, module: str) -> bool:
    """Ask if a pattern, a regular expression, ends the name of a module. Raises MalformedFile: it is none."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as e:
        raise MalformedFile(f"{key}: {pattern!r} is not a regular expression: {e}") from None


def _delta(
    config: dict[str, Any], module: str, pair: dict[str, np.ndarray], slot: Slot, source: str
) -> Delta:
    if set(pair) != {"A", "B"}:
        raise MalformedFile(f"{source}: {module} has lora_{next(iter(pair))} only")
    a, b = pair["A"], pair["B"]
    rank = _of_pattern(config, "rank_pattern", module)
    if a.shape != (rank, slot.shape[1]) or b.shape != (slot.shape[0], rank):
        raise Refused(
            f"{source}: {module} has lora_A {a.shape} and lora_B {b.shape}; rank {rank:g} of this model's {slot.shape} takes "
            f"({rank:g}, {slot.shape[1]}) and ({slot.shape[0]}, {rank:g}): is it the adapter of another model?"
        )
    alpha = _of_pattern(config, "alpha_pattern", module)
    return Delta(a, b, alpha / (rank**0.5 if config.get("use_rslora") else rank))


def add_adapter(layout: Layout, flat: np.ndarray, adapter: LoadedAdapter) -> None:
    """flat += scale * b a for every adapted matrix, in float64, rounded once.  flat (layout.size,) float32 on the host"""
    for hf, delta in adapter.deltas.items():
        s = layout.by_hf[hf]
        view = flat[s.offset : s.offset + s.size].reshape(s.shape)
        a, b = np.asarray(delta.a, np.float64), np.asarray(delta.b, np.float64)
        total = view.astype(np.float64) + (delta.scale * b) @ a
        if not np.isfinite(total).all():
            raise Refused(f"{adapter.source}: {hf} with its adapter is not finite")
        view[...] = total


def adapter_start(layout: AdapterLayout, adapter: LoadedAdapter) -> np.ndarray:
    """Copy A and B of an adapter into a new buffer in the layout's order, float32 on the host."""
    flat = np.zeros(layout.size, np.float32)
    for p in layout.pairs:
        delta = adapter.deltas[p.base.hf]
        for s, x in ((p.a, delta.a), (p.b, delta.b)):
            flat[s.offset : s.offset + s.size] = np.asarray(x, np.float32).reshape(-1)
    return flat
