"""Compare what was exported with the checkpoint by other code than the one that wrote it, value by value and name by name.

| format      | read by                                  | named by                                      |
|-------------|------------------------------------------|-----------------------------------------------|
| safetensors | the published layout, in plain Python    | the names of the checkpoint                   |
| PEFT        | the same                                 | PEFT's rule, from adapter_config.json         |
| GGUF        | GGUFReader of the package gguf           | its table of Hugging Face names, as llama.cpp |

Nothing here is shared with hf.py, peft.py, gguf.py and gguf_reader.py: a mistake that a writer and its reader of apr have in
common, as two rows that change places on both ways, shows here alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import IOFailure
from ..common.files import opened, parse_json, read_json
from ..model.config import ModelConfig
from ..model.rope import rope_tables
from ..model.rope_scaling import Llama3Scaling
from .gguf import package

COMPARED_ELEMENTS = 1 << 22  # elements that are compared at a time
WIDTH = {"F32": 4, "F16": 2, "BF16": 2}
# Architectures of llama.cpp whose rotary embedding turns neighbouring rows of a head (LLAMA_ROPE_TYPE_NORM).
NEIGHBOURS = ("llama", "smollm3")
# Linear maps of a block, as PEFT finds them by the last part of their name.
BLOCK = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}  # fmt: skip
DIVISOR = 1e-4  # relative, of a frequency's divisor: ours come from cosines and sines
Q8_BLOCK, Q8_STEPS = 32, 127  # values that share a scale, steps on either side of zero


@dataclass(frozen=True)
class Stored:
    """A tensor of a file.  tag: its type, data: its bytes, mapped"""

    tag: str
    shape: tuple[int, ...]
    data: np.ndarray


def safetensors(path: Path) -> dict[str, Stored]:
    """Read a file by the layout that the project safetensors publishes: 8 bytes of length, JSON, bytes at offsets."""
    out = {}
    with opened(path) as (f, _):
        length = int.from_bytes(f.read(8), "little")
        header = parse_json(f.read(length), str(path))
        for name, row in header.items():
            if name != "__metadata__":
                begin, end = row["data_offsets"]
                data = np.memmap(f, np.uint8, "r", offset=8 + length + begin, shape=(end - begin,))
                out[name] = Stored(row["dtype"], tuple(row["shape"]), data)
    return out


def compare_folder(folder: Path, want: Mapping[str, np.ndarray], tied: bool) -> int:
    """Compare every tensor of a Hugging Face folder with `want`; returns the elements. Raises IOFailure.

    tied: the head is the embedding, and may be left out."""
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        files = set(read_json(index)["weight_map"].values())
    there = {name: t for file in sorted(files) for name, t in safetensors(folder / file).items()}
    optional = {"lm_head.weight"} if tied else set()
    optional |= {name for name in want.keys() ^ there.keys() if name.endswith("rotary_emb.inv_freq")}
    if odd := sorted((want.keys() ^ there.keys()) - optional):
        raise _failed(folder, odd[0], "is in the file or in the checkpoint, not in both")
    return sum(_compare(folder, name, t, want[name]) for name, t in there.items() if name in want)


def compare_adapter(folder: Path, num_layers: int, want: Mapping[str, np.ndarray]) -> int:
    """Compare an adapter with `want`, {name in the file: tensor}, by the names that PEFT looks for; returns the elements.
    Raises IOFailure."""
    config = read_json(folder / "adapter_config.json")
    there = safetensors(folder / "adapter_model.safetensors")
    names, first = set(), "base_model.model."
    for module in config["target_modules"]:
        if config["use_dora"]:
            names |= {
                f"{first}model.layers.{i}.{BLOCK[module]}.{module}.lora_magnitude_vector"
                for i in range(num_layers)
            }
        for x in "AB":
            if module in BLOCK:
                names |= {
                    f"{first}model.layers.{i}.{BLOCK[module]}.{module}.lora_{x}.weight"
                    for i in range(num_layers)
                }
            else:
                names.add(
                    f"{first}lm_head.lora_{x}.weight"
                    if module == "lm_head"
                    else f"{first}model.{module}.lora_embedding_{x}"
                )
    ends = tuple(f"{end}.weight" for end in config["modules_to_save"] or ())
    whole = {name for name in want if ".lora_" not in name and name.endswith(ends)} if ends else set()
    for odd in sorted((names | whole) ^ there.keys()) + sorted(there.keys() ^ want.keys()):
        raise _failed(folder, odd, "is in the file or among the names that PEFT looks for, not in both")
    for name, t in there.items():
        if name in whole or name.endswith(".lora_magnitude_vector"):
            continue
        module, _, letter = name.removesuffix(".weight").removeprefix(first).rpartition(".")
        fits = (r for p, r in config["rank_pattern"].items() if re.match(rf"(.*\.)?({p})$", module))
        rank = next(fits, config["r"])
        if t.shape["AB".index(letter[-1])] != rank:
            raise _failed(folder, name, f"has the shape {t.shape}, the rank is {rank}")
    return sum(_compare(folder, name, t, want[name]) for name, t in there.items())


def divisors(cfg: ModelConfig) -> list[float]:
    """Compute what llama.cpp divides the frequencies of Llama 3.1 by, as its converter does, (D/2,)."""
    s, out = cfg.rope_scaling, list[float]()
    assert isinstance(s, Llama3Scaling)
    for i in range(0, cfg.head_dim, 2):
        turns = s.original_max_position_embeddings / (2 * math.pi * cfg.rope_theta ** (i / cfg.head_dim))
        share = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        share = min(1.0, max(0.0, share))
        out.append(1 / ((1 - share) / s.factor + share))
    return out


def _by_llama_cpp(reader: Any, arch: str) -> tuple[np.ndarray, float]:
    """Frequencies (D/2,) and amplitude of cos and sin that llama.cpp's rope_yarn makes of the keys of a file."""

    def key(name: str, default: Any) -> Any:
        field = reader.get_field(f"{arch}.rope.{name}")
        return default if field is None else field.contents()

    dims, base = key("dimension_count", 0), key("freq_base", 10000.0)
    stretch, mix, amplitude = 1.0, np.zeros(dims // 2), 1.0
    if (kind := key("scaling.type", "none")) != "none":
        stretch = key("scaling.factor", 1.0)
    if kind == "yarn":
        length = key("scaling.original_context_length", reader.get_field(f"{arch}.context_length").contents())
        # Its loader reads yarn_beta_fast and yarn_beta_slow in other architectures alone.
        low, high = (
            dims * math.log(length / (beta * 2 * math.pi)) / (2 * math.log(base)) for beta in (32.0, 1.0)
        )
        low, high = max(0, math.floor(low)), min(dims - 1, math.ceil(high))
        mix = 1 - np.clip((np.arange(dims // 2) - low) / max(0.001, high - low), 0, 1)
        amplitude = key("scaling.attn_factor", 1.0) * (1 + 0.1 * math.log(max(stretch, 1.0)))
    plain = base ** (-np.arange(0, dims, 2) / dims)
    return plain / stretch * (1 - mix) + plain * mix, amplitude


def _off(got: np.ndarray, want: list[float]) -> float:
    """Largest relative difference; infinite for other shapes."""
    is_same = got.shape == (len(want),)
    return float(np.abs(got / np.array(want) - 1).max()) if is_same else math.inf


def compare_gguf(path: Path, cfg: ModelConfig, want: Mapping[str, np.ndarray]) -> int:
    """Compare every tensor of a GGUF file with `want`; returns the elements. Raises IOFailure."""
    gguf = package()
    reader = gguf.GGUFReader(path)
    arch = reader.get_field("general.architecture").contents()
    numbers = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(numbers[arch], reader.get_field(f"{arch}.block_count").contents())
    there, compared = {t.name: t for t in reader.tensors if t.name != "rope_freqs.weight"}, 0
    names = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in want}
    if odd := sorted({str(name) for name in names.values()} ^ there.keys()):
        raise _failed(path, odd[0], "is in the file or among the names of llama.cpp, not in both")
    scaled = [t.data for t in reader.tensors if t.name == "rope_freqs.weight"]
    if len(scaled) != isinstance(cfg.rope_scaling, Llama3Scaling) or any(
        _off(x, divisors(cfg)) > DIVISOR for x in scaled
    ):
        raise _failed(path, "rope_freqs.weight", "is not what the scaling of the rotary frequencies gives")
    if not scaled:
        frequencies, amplitude = _by_llama_cpp(reader, arch)
        cos, sin = rope_tables(cfg, 2)
        off = _off(frequencies, list(np.arctan2(sin[1], cos[1])))
        if max(off, _off(np.hypot(cos[0], sin[0]), [amplitude] * len(cos[0]))) > DIVISOR:
            raise _failed(path, f"{arch}.rope.scaling", "keys are not what turns the model's positions")
    heads = {"q_proj": cfg.num_heads, "k_proj": cfg.num_kv_heads}
    for name, source in want.items():
        t, kind = there[names[name]], name.split(".")[-2]
        if arch in NEIGHBOURS and kind in heads:
            source = source[_turned(heads[kind], len(source))]
        data = np.ascontiguousarray(t.data).reshape(-1).view(np.uint8)
        shape = tuple(int(n) for n in reversed(t.shape))
        stored = Stored(t.tensor_type.name, shape, data)
        if stored.tag == "Q8_0":
            compared += _compare_q8(path, name, gguf.quants.dequantize(t.data, t.tensor_type), source)
        else:
            compared += _compare(path, name, stored, source)
    return compared


def _turned(heads: int, rows: int) -> list[int]:
    """List the rows of halves in the order of neighbours: 0, D/2, 1, D/2 + 1, ... of each head."""
    size = rows // heads
    return [
        h * size + half * (size // 2) + i for h in range(heads) for i in range(size // 2) for half in (0, 1)
    ]


def _bits(x: np.ndarray, tag: str) -> np.ndarray:
    """Round to a type, to nearest and to even in the middle, as its bytes."""
    if tag == "BF16" and x.dtype.name != "bfloat16":
        u = x.astype("<f4").view("<u4")
        return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("<u2").view(np.uint8)
    return (x if tag == "BF16" else x.astype({"F32": "<f4", "F16": "<f2"}[tag])).view(np.uint8)


def _ranges(size: int) -> Iterator[slice]:
    return (slice(at, min(size, at + COMPARED_ELEMENTS)) for at in range(0, size, COMPARED_ELEMENTS))


def _compare(path: Path, name: str, t: Stored, source: np.ndarray) -> int:
    if t.shape != source.shape or t.tag not in WIDTH:
        raise _failed(path, name, f"is {t.tag} {t.shape}, the checkpoint has {source.shape}")
    flat, width = np.ascontiguousarray(source).reshape(-1), WIDTH[t.tag]
    for part in _ranges(flat.size):
        if not np.array_equal(t.data[part.start * width : part.stop * width], _bits(flat[part], t.tag)):
            raise _failed(path, name, f"differs from the checkpoint, elements from {part.start:,} on")
    return flat.size


def holds(t: Stored, x: np.ndarray) -> bool:
    """Tell if a tensor of a file has the values of x (t.shape), rounded to its type; True for a type that is not compared."""
    if t.tag not in WIDTH or t.shape != x.shape:
        return t.tag not in WIDTH
    return np.array_equal(t.data, _bits(np.ascontiguousarray(x, np.float32).reshape(-1), t.tag))


def _compare_q8(path: Path, name: str, got: np.ndarray, source: np.ndarray) -> int:
    """Compare values whose blocks have a float16 scale: half a step apart, and what the scale was rounded by."""
    wide = np.ascontiguousarray(source, np.float32).reshape(-1, Q8_BLOCK)
    step = np.abs(wide).max(1, keepdims=True) / Q8_STEPS
    room = 0.501 * step + Q8_STEPS * np.abs(step.astype(np.float16).astype(np.float32) - step)
    if got.size != wide.size or not (np.abs(got.reshape(wide.shape) - wide) <= room).all():
        raise _failed(path, name, "is more than half a step of its scales from the checkpoint")
    return wide.size


def _failed(path: Path, name: str, why: str) -> IOFailure:
    return IOFailure(
        f"{path}: read by other code than apr's own, tensor {name} {why}; do not use the file: this is a fault of apr, or of "
        "the disk"
    )
