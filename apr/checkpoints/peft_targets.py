"""Modules that an adapter_config.json names: PEFT passes over tensors of all others without a word."""

from __future__ import annotations

import re
from typing import Any

from ..common.errors import MalformedFile
from ..common.files import short
from ..common.patterns import check_pattern
from .tensors import EMBED, HEAD

# Of a model whose layers are model.layers.N; others are regular expressions.
LAYERS = ("layers", "model.layers")


def left_out_by(config: dict[str, Any], module: str, source: str) -> str:
    """Name the key by which PEFT has no adapter for a module, model.layers.0.self_attn.q_proj; "" where it has one.

    A pattern whose search may never end says nothing. Raises MalformedFile: names of another kind."""
    is_tied = config.get("ensure_weight_tying") and f"{module}.weight" in (EMBED, HEAD)
    if _names(config, "exclude_modules", module, source):
        return "exclude_modules"
    if any(f".{name}." in f".{module}." for name in config.get("modules_to_save") or []):
        return "modules_to_save"
    if is_tied or config.get("target_modules") is None:
        return ""
    if not _names(config, "target_modules", module, source):
        return "target_modules"
    return "" if _is_in_layers(config, module, source) else "layers_to_transform"


def _names(config: dict[str, Any], key: str, module: str, source: str) -> bool:
    """Match a module with a list of ends of names, or a regular expression."""
    value = config.get(key)
    if isinstance(value, str) and value.lower() == "all-linear" and key == "target_modules":
        return f"{module}.weight" not in (EMBED, HEAD)
    if isinstance(value, str) and value:
        try:
            check_pattern(value)
            return re.fullmatch(value, module) is not None
        except (ValueError, re.error, OverflowError, RecursionError):
            return key == "target_modules"
    if not isinstance(value, list | None | str) or not all(isinstance(name, str) for name in value or ()):
        raise MalformedFile(f"{source}: {key} = {short(value)} is neither a list of names nor a pattern")
    return any(f".{module}".endswith(f".{name}") for name in value or ())


def _is_in_layers(config: dict[str, Any], module: str, source: str) -> bool:
    """Ask layers_to_transform, which counts for lists of ends of names alone."""
    layers, pattern, targets = (
        config.get(key) for key in ("layers_to_transform", "layers_pattern", "target_modules")
    )
    if layers is None or layers == [] or not isinstance(targets, list) or module in targets:
        return True
    numbers = layers if isinstance(layers, list) else [layers]
    if not all(type(n) is int for n in numbers):
        raise MalformedFile(
            f"{source}: layers_to_transform = {short(layers)} is no list of numbers of layers"
        )
    patterns = [pattern] if isinstance(pattern, str) else pattern
    if patterns and not {*LAYERS}.intersection(p for p in patterns if isinstance(p, str)):
        return True
    found = re.match(r"model\.layers\.(\d+)\.", module)
    return found is not None and int(found[1]) in numbers
