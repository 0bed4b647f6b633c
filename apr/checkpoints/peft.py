"""LoRA adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import InputNotFound, MalformedFile, Refused
from ..common.files import parse_json, read_text
from ..model.config import ModelConfig
from ..model.lora import LINEAR, OUTSIDE, PREFIX, TARGETS, AdapterLayout, LoraConfig, cut, matches, module_of
from ..model.params import Layout, Slot
from .hf import read_safetensors
from .peft_config import CONFIG, PATTERNS, check_config
from .peft_targets import left_out_by
from .tensors import EMBED, HEAD, is_float

WEIGHTS = "adapter_model.safetensors"
# PEFT saves the untouched matrix of an adapted head beside A and B (save_embedding_layers="auto").
_BASE = re.compile(rf"^{re.escape(PREFIX)}(?P<module>.+?)(\.base_layer)?\.weight$")
_NAME = re.compile(
    rf"^{re.escape(PREFIX)}(?P<module>.+)\.(?P<part>lora_(embedding_)?[AB]|lora_magnitude_vector)(\.default)?(\.weight)?$"
)


@dataclass(frozen=True)
class Delta:
    """scale * b a, added to a matrix.  a (r,I), b (O,r), mapped files, of an embedding the transposes of what is in the file

    magnitude: of DoRA (Liu et al. 2024, eq. 5), norms that the rows of the sum get, of an embedding its columns; or None"""

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    is_table: bool = False

    def added(self, w: np.ndarray) -> np.ndarray:
        """Add to a matrix, in float64."""
        a, b = np.asarray(self.a, np.float64), np.asarray(self.b, np.float64)
        total: np.ndarray = w.astype(np.float64) + (self.scale * b) @ a
        if self.magnitude is None:
            return total
        share = np.asarray(self.magnitude, np.float64) / np.linalg.norm(total, axis=0 if self.is_table else 1)
        return total * (share if self.is_table else share[:, None])


@dataclass(frozen=True)
class LoadedAdapter:
    """A checked adapter: its configuration file, its deltas by the Hugging Face name of the matrix, and the tensors that were
    trained whole.

    cfg: configuration of the base with the adapter; its head is apart where the adapter takes head and embedding apart"""

    config: dict[str, Any]
    deltas: Mapping[str, Delta]
    source: str
    saved: Mapping[str, np.ndarray]
    cfg: ModelConfig

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all A and B as float32, by name, and of their scales; and of what was trained whole, and magnitudes."""
        digest = hashlib.sha256()
        for hf, d in sorted(self.deltas.items()):
            digest.update(f"{hf} {d.scale!r}\0".encode())
            for x in (d.a, d.b, *(() if d.magnitude is None else (d.magnitude,))):
                digest.update(np.ascontiguousarray(x, "<f4").view(np.uint8).data)
        for hf, x in sorted(self.saved.items()):
            digest.update(f"{hf}\0".encode())
            digest.update(np.ascontiguousarray(x, "<f4").view(np.uint8).data)
        return digest.hexdigest()

    def lora_config(
        self, cfg: ModelConfig, base: str | None = None, dropout: float | None = None
    ) -> LoraConfig:
        """Build the LoraConfig to go on training with. base: format of the base; dropout: another than the adapter's.

        Raises Refused for adapters that differ between layers, MalformedFile for a dropout that is none."""
        found = self._lora_config(cfg)
        share = self.config.get("lora_dropout") or 0.0 if dropout is None else dropout
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share < 1:
            raise MalformedFile(
                f"{self.source}: lora_dropout = {share!r}; it is from 0 to below 1: give --lora-dropout"
            )
        return replace(found, base=base, dropout=float(share))

    def _lora_config(self, cfg: ModelConfig) -> LoraConfig:
        c = self.config
        names = Counter(hf.split(".")[-2] for hf in self.deltas)
        outside = set(OUTSIDE.values())
        unknown = sorted(set(names) - set(TARGETS.values()))
        uneven = [name for name, count in names.items() if count != cfg.num_layers and name not in outside]
        why = ""
        if self.cfg != cfg:
            why = "has an embedding and a head of their own, of a base where they are one matrix, of which --lora-init trains one"
        elif odd := [hf for hf in self.saved if hf.split(".")[-2] in LINEAR.values()]:
            why = f"trained {odd[0]} whole, of which --lora-init trains adapters only"
        elif c.get("init_lora_weights") == "mica":
            why = "is one of MiCA, whose B is not trained, and --lora-init trains A and B"
        elif c.get("use_dora") and set(names) & outside:
            why = "is one of DoRA of embedding or head, which --lora-init does not go on with"
        if why:
            raise Refused(f"{self.source}: {why}; `apr merge` makes it part of the weights")
        ranks = {d.a.shape[0] for d in self.deltas.values()}
        scales = {d.scale for d in self.deltas.values()}
        if unknown or uneven:
            where = "" if unknown else " in some layers only"
            raise Refused(
                f"{self.source}: adapts {[*unknown, *uneven][0]}{where}, which --lora-init does not go on with; `apr merge` "
                "makes it part of the weights"
            )
        targets = tuple(name for name, peft in TARGETS.items() if peft in names)
        kinds: dict[str, Any] = {"rslora": bool(c.get("use_rslora")), "dora": bool(c.get("use_dora"))}
        kinds["saved"] = tuple(c.get("modules_to_save") or ())
        if len(ranks) > 1 or len(scales) > 1:
            modules = [hf.removesuffix(".weight") for hf in self.deltas]
            for key, kind in (("rank_pattern", int), ("alpha_pattern", float)):
                given = (c.get(key) or {}).items()
                kinds[key] = tuple((p, kind(n)) for p, n in given if any(matches(p, m) for m in modules))
            return LoraConfig(int(c["r"]), float(c["lora_alpha"]), targets, **kinds)
        # The first stands for all: ranks and scales are one.
        alpha = _of_pattern(c, "alpha_pattern", next(iter(self.deltas)).removesuffix(".weight"))
        return LoraConfig(ranks.pop(), alpha, targets, **kinds)

    @cached_property
    def note(self) -> str:
        """Name the patterns that match no adapted matrix, so that their numbers count for nothing; "" for none."""
        modules = [hf.removesuffix(".weight") for hf in self.deltas]
        if EMBED in self.deltas and self.cfg.tie_word_embeddings:
            # The same matrix, which the file has under both names.
            modules.append(module_of(HEAD))
        idle = [
            f"{key} {pattern!r}"
            for key in PATTERNS
            for pattern in self.config.get(key) or {}
            if not any(matches(pattern, module) for module in modules)
        ]
        return (
            f"{self.source}: {', '.join(idle)}: matches no adapted matrix, and is passed over" if idle else ""
        )


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
    check_config(config, str(folder / CONFIG))
    tensors, file = read_safetensors(folder / WEIGHTS), str(folder / WEIGHTS)
    apart = replace(cfg, tie_word_embeddings=False)
    by_hf, parts, saved = Layout(apart).by_hf, dict[str, dict[str, np.ndarray]](), dict[str, np.ndarray]()
    of_whole = _whole_modules(config, by_hf, cfg.tie_word_embeddings, str(folder / CONFIG))
    for name in tensors:
        if not is_float(tensors[name].dtype):
            raise Refused(
                f"{file}: tensor {name!r} is {tensors[name].dtype}, not floating point: is the adapter quantised? Save it as "
                "float32, float16 or bfloat16"
            )
        if match := _NAME.match(name):
            part = parts.setdefault(match["module"], {})
            if match["part"] in part:
                raise MalformedFile(
                    f"{file}: {match['module']} has two tensors for its {match['part']}, one of them {name!r}; save the "
                    "adapter again with PEFT"
                )
            part[match["part"]] = tensors[name]
        elif (hf := name.removeprefix(PREFIX)) in of_whole:
            if hf in saved:
                raise MalformedFile(
                    f"{file}: {hf} is there twice, once as {name!r}; save the adapter again with PEFT"
                )
            saved[hf] = tensors[name]
        else:
            _check_untouched(name, tensors[name], cfg, base or {}, file)
    if not parts:
        raise MalformedFile(f"{folder / WEIGHTS}: holds no adapter")
    for hf in of_whole:
        if hf not in saved:
            raise MalformedFile(
                f"{file}: no tensor {PREFIX + hf}, which modules_to_save of {CONFIG} says it holds"
            )
        if saved[hf].shape != by_hf[hf].shape:
            raise Refused(
                f"{file}: {PREFIX + hf} has the shape {saved[hf].shape}, this model's is {by_hf[hf].shape}: is it the adapter of "
                "another model, or of one with more tokens?"
            )
    deltas = {}
    for module, part in parts.items():
        slot = by_hf.get(f"{module}.weight")
        if slot is None or len(slot.shape) != 2:
            raise Refused(f"{file}: adapts {module}, which is no linear map of this model, and no embedding")
        deltas[slot.hf] = _delta(config, module, part, slot, file)
        if key := left_out_by(config, module, str(folder / CONFIG)):
            raise Refused(
                f"{file}: adapts {module}, which {key} of {CONFIG} leaves out, so that PEFT passes its A and B over without a "
                f"word; correct {key}, or take them out"
            )
    if cfg.tie_word_embeddings and not _takes_apart(deltas, saved):
        deltas.pop(HEAD, None)
        saved.pop(HEAD, None)
        apart = cfg
    return LoadedAdapter(config, deltas, source, saved, apart if cfg.tie_word_embeddings else cfg)


def _whole_modules(
    config: dict[str, Any], by_hf: Mapping[str, Slot], is_tied: bool, source: str
) -> list[str]:
    """Name the tensors that modules_to_save says were trained whole. Raises Refused: an entry that matches nothing."""
    ends = config.get("modules_to_save") or []
    if not isinstance(ends, list) or not all(isinstance(end, str) and end for end in ends):
        raise MalformedFile(f"{source}: modules_to_save = {ends!r} is not a list of names")
    for end in ends:
        if not any(module_of(hf).endswith(end) for hf in by_hf):
            raise Refused(
                f"{source}: modules_to_save has {end!r}, which is no module of this model: was the adapter trained with "
                "another head?"
            )
    whole = [hf for hf in by_hf if any(module_of(hf).endswith(end) for end in ends)]
    if is_tied and config.get("ensure_weight_tying") and {EMBED, HEAD} & {*whole}:
        whole += [hf for hf in (EMBED, HEAD) if hf not in whole]
    return whole


def _takes_apart(deltas: Mapping[str, Delta], saved: Mapping[str, np.ndarray]) -> bool:
    """Tell if an adapter makes a head that was the embedding another matrix than it."""
    if (EMBED in saved) != (HEAD in saved) or (EMBED in deltas) != (HEAD in deltas):
        return True
    if EMBED in saved and not np.array_equal(saved[EMBED], saved[HEAD]):
        return True
    if EMBED not in deltas:
        return False
    x, y = deltas[EMBED], deltas[HEAD]
    is_same = x.scale == y.scale and np.array_equal(x.a, y.a) and np.array_equal(x.b, y.b)
    return not is_same or x.magnitude is not None


def _check_untouched(
    name: str, stored: np.ndarray, cfg: ModelConfig, base: Mapping[str, np.ndarray], source: str
) -> None:
    """Raise Refused unless a tensor is a matrix of the base, to the precision that either is stored in."""
    match = _BASE.match(name)
    hf = "" if match is None else f"{match['module']}.weight"
    want = base.get(EMBED if hf == HEAD and cfg.tie_word_embeddings else hf)
    if want is None:
        raise Refused(
            f"{source}: tensor {name!r} is no A or B (lora_A, lora_B), and {CONFIG} does not say that it was trained "
            "(modules_to_save), so apr does not know what it is for"
        )
    if stored.shape != want.shape or not (
        np.array_equal(stored.astype(want.dtype), want) or np.array_equal(want.astype(stored.dtype), stored)
    ):
        raise Refused(
            f"{source}: tensor {name!r} differs from {hf} of the base: it was trained itself, which modules_to_save of {CONFIG} "
            "does not say, or belongs to another base"
        )


def _of_pattern(config: dict[str, Any], key: str, module: str) -> float:
    """Look up a number of a module: by the first pattern that matches its name, else that of all modules."""
    for pattern, value in (config.get(key) or {}).items():
        if matches(pattern, module):
            return float(value)
    return float(config[PATTERNS[key]])


def _delta(
    config: dict[str, Any], module: str, part: dict[str, np.ndarray], slot: Slot, source: str
) -> Delta:
    is_table = slot.param.name == "embed"
    kind, magnitude = "lora_embedding_" if is_table else "lora_", part.pop("lora_magnitude_vector", None)
    if set(part) != {f"{kind}A", f"{kind}B"}:
        raise MalformedFile(
            f"{source}: {module} has {' and '.join(sorted(part))} only; it takes {kind}A and {kind}B"
        )
    a, b = (part[f"{kind}{x}"] for x in "AB")
    if is_table:
        a, b = b.T, a.T
    if (magnitude is not None) != bool(config.get("use_dora")):
        has = "has no" if magnitude is None else "has a"
        raise MalformedFile(
            f"{source}: {module} {has} lora_magnitude_vector, and use_dora = {config.get('use_dora')!r}"
        )
    if magnitude is not None and magnitude.reshape(-1).shape != slot.shape[int(is_table) : int(is_table) + 1]:
        raise Refused(
            f"{source}: {module} has lora_magnitude_vector {magnitude.shape}, the matrix is {slot.shape}"
        )
    rank = _of_pattern(config, "rank_pattern", module)
    if a.shape != (rank, slot.shape[1]) or b.shape != (slot.shape[0], rank):
        raise Refused(
            f"{source}: {module} has lora_A {a.shape} and lora_B {b.shape}; rank {rank:g} of this model's {slot.shape} takes "
            f"({rank:g}, {slot.shape[1]}) and ({slot.shape[0]}, {rank:g}): is it the adapter of another model?"
        )
    alpha = _of_pattern(config, "alpha_pattern", module)
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return Delta(a, b, scale, None if magnitude is None else magnitude.reshape(-1), is_table)


def add_adapter(layout: Layout, flat: np.ndarray, adapter: LoadedAdapter) -> None:
    """flat += scale * b a for every adapted matrix, in float64, rounded once; what was trained whole takes its place.

    flat (layout.size,) float32 on the host, layout that of adapter.cfg"""
    for hf in [*adapter.saved, *adapter.deltas]:
        view = cut(flat, layout.by_hf[hf])
        if hf in adapter.saved:
            view[...] = adapter.saved[hf]
        if hf in adapter.deltas:
            view[...] = adapter.deltas[hf].added(view)
        if not np.isfinite(view).all():
            raise Refused(f"{adapter.source}: {hf} with its adapter is not finite")


def adapter_start(layout: AdapterLayout, adapter: LoadedAdapter) -> np.ndarray:
    """Copy A and B of an adapter into a new buffer in the layout's order, float32 on the host."""
    flat = np.zeros(layout.size, np.float32)
    for p in layout.pairs:
        delta = adapter.deltas[p.base.hf]
        for s, x in ((p.a, delta.a), (p.b, delta.b)):
            flat[s.offset : s.offset + s.size] = np.asarray(x, np.float32).reshape(-1)
        if p.m is not None:
            cut(flat, p.m)[...] = delta.magnitude
    for base, s in layout.saved:
        cut(flat, s)[...] = adapter.saved[base.hf]
    return flat
