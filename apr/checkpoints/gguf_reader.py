"""Read GGUF files: header, tensors by Hugging Face name in our order of rows, configuration.

Little endian:

| part    | layout                                                                                |
|---------|---------------------------------------------------------------------------------------|
| start   | "GGUF", u32 version, u64 tensor count, u64 key count                                  |
| keys    | per key: string name, u32 type, value; a string is u64 length and UTF-8 bytes, an     |
|         | array is u32 type, u64 length and values                                              |
| tensors | per tensor: string name, u32 dimensions, u64 each (fastest first), u32 type, u64 place |
| data    | on a multiple of general.alignment (32): the tensors in the order of the header, each |
|         | on such a multiple                                                                    |
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..common.errors import MalformedFile, Refused
from ..common.files import MAX_TEXT, opened, short
from ..common.units import plural
from ..model.config import ModelConfig
from ..model.families import FAMILIES
from ..model.hf_config import from_hf
from ..model.params import Layout, Slot
from ..model.rope_scaling import Llama3Scaling
from .gguf import (
    ARCHITECTURE,
    BLOCK,
    NAMES,
    NO_ROPE_STEP,
    ROPE_FREQS,
    WINDOW_KEYS,
    frequency_divisors,
    tensor_name,
    to_halves,
    turned_heads,
)
from .gguf_scaling import check_ramp, float32, read_scaling, scaling_keys
from .tensors import BF16, Stored, TensorFile

MAGIC = b"GGUF"
NUMBER_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_ITEMS = 1 << 22  # of all arrays; vocabularies have some 300,000 tokens, scores, kinds and merges
MAX_NAME, MAX_NDIM = 1024, 4
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BF16,
    "Q8_0": np.dtype(np.float32),
}
TYPES = {0: "F32", 1: "F16", 8: "Q8_0", 30: "BF16"}  # tag -> name of the types that apr reads
OTHER_TYPES = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
               14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
               22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
               40: "NVFP4", 41: "Q1_0", 42: "Q2_0"}  # fmt: skip
# Of every published Llama 3 model: low_freq_factor, high_freq_factor, original_max_position_embeddings.
LLAMA3_RANGES = (1.0, 4.0, 8192)
Q8_BYTES = BLOCK + 2  # a block: scale float16, then int8 values
SIZE_KEYS = {  # header key, without the architecture -> key of config.json
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
# Keys of the architecture that are read here, and the values at which others change nothing.
READ = {*SIZE_KEYS, "vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count"}  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.type": ("none",),
    "rope.scaling.finetuned": (False, True),
    "tensor_data_layout": ("Meta AI original pth",),
}


@dataclass(frozen=True)
class GgufFile:
    """A checked GGUF file of one of our architectures.

    keys: of the header, by name. tensors: by Hugging Face name in our order of rows; a name that no parameter of ours has
    stays. kinds: GGUF types by the same names."""

    path: Path
    cfg: ModelConfig
    keys: dict[str, Any]
    tensors: TensorFile
    kinds: dict[str, str]

    def check_honoured(self) -> None:
        """Raise Refused for a key of the architecture that would change what the model computes."""
        arch = self.keys["general.architecture"]
        read = READ | scaling_keys(self.cfg).keys()
        for key, value in self.keys.items():
            name = key.removeprefix(f"{arch}.")
            if name != key and name not in read and value not in NEUTRAL.get(name, ()):
                raise Refused(f"{self.path}: {key} = {short(value)}: apr does not compute this")


class _GgufTensors(TensorFile):
    """Mapped tensors; Q8_0 becomes float32, value times scale, and rows of q and k change places, when asked for."""

    def __init__(
        self, path: Path, f: BinaryIO, entries: Iterable[Stored], kinds: dict[str, str], heads: dict[str, int]
    ) -> None:
        super().__init__(path, f, entries)
        self._kinds, self._heads = kinds, heads
        self.converted = {name: kind for name, kind in kinds.items() if kind == "Q8_0"}

    def __getitem__(self, name: str) -> np.ndarray:
        e, heads = self.entries[name], self._heads.get(name, 0)
        if self._kinds[name] == "Q8_0":
            size = prod(e.shape) // BLOCK * Q8_BYTES
            blocks = self._part(e.offset, size).reshape(-1, Q8_BYTES)
            scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
            with np.errstate(invalid="ignore"):  # an infinite scale: whoever needs finite weights says so
                x = (blocks[:, 2:].view(np.int8) * scales).reshape(e.shape)
        else:
            x = super().__getitem__(name)
        return to_halves(x, heads) if heads else x


@dataclass(frozen=True)
class GgufHeader:
    """Keys and tensors of a header, checked against the length of the file. infos: (entry, type), offsets absolute."""

    path: Path
    keys: dict[str, Any]
    infos: list[tuple[Stored, str]]


def read_gguf(path: str | Path) -> GgufFile:
    """Open a GGUF file after checking its header, every place and size; map names, types and rows back.

    float32, float16 and bfloat16 are the bits of the file; Q8_0 is float32, value times scale. Raises InputNotFound,
    MalformedFile, Refused for an architecture or type apr does not know."""
    path = Path(path)
    with opened(path) as (f, size):
        return map_tensors(read_header(f, size, path), f)


def read_header(f: BinaryIO, size: int, path: Path) -> GgufHeader:
    """Read keys and tensors of an open file. Raises MalformedFile, Refused: a type that apr does not read."""
    reader = _HeaderReader(f, size, path)
    keys, infos = reader.keys(), reader.tensors()
    _check_places(infos, reader.data_at(keys), size, path)
    return GgufHeader(path, keys, infos)


def map_tensors(header: GgufHeader, f: BinaryIO) -> GgufFile:
    """Give the tensors of a header our names and order of rows. Raises MalformedFile, Refused."""
    path, keys = header.path, header.keys
    names = {e.name for e, _ in header.infos}
    cfg = _config(keys, names, path)
    if cfg.rope_scaling is None:
        cfg = dataclasses.replace(cfg, rope_scaling=_published_scaling(header, cfg, f))
    slots = {tensor_name(s): s for s in Layout(cfg).in_order()}
    entries, kinds, heads = [], {}, {}
    for e, kind in header.infos:
        slot = slots.get(e.name)
        hf = slot.hf if slot else e.name
        kinds[hf], heads[hf] = kind, _heads(cfg, slot, e)
        entries.append(Stored(hf, e.dtype, e.shape, e.offset))
    tensors = _GgufTensors(path, f, entries, kinds, heads)
    if ROPE_FREQS in names:
        _check_divisors(cfg, tensors, path)
        del tensors.entries[ROPE_FREQS], kinds[ROPE_FREQS]
    return GgufFile(path, cfg, keys, tensors, kinds)


def _bad(path: Path, what: str) -> MalformedFile:
    return MalformedFile(f"{path}: {what}; the file is damaged or not GGUF, fetch or write it again")


class _HeaderReader:
    """Reads a header front to back; nothing is read or allocated that the file is too short for."""

    def __init__(self, f: BinaryIO, size: int, path: Path) -> None:
        self._f, self._path, self._at, self._end, self._items = f, path, 0, size, 0
        magic = self._take(4)
        if magic != MAGIC:
            raise _bad(path, f"starts with {magic!r}, not {MAGIC!r}")
        version = self._number("I")
        if version in (2 << 24, 3 << 24):
            raise Refused(f"{path}: is big endian, and apr reads little endian; take the model's usual file")
        if version not in (2, 3):
            raise _bad(path, f"format version {version}, apr reads 2 and 3")
        self._tensors, self._keys = self._number("Q"), self._number("Q")
        for count, least, what in ((self._tensors, 25, "tensors"), (self._keys, 13, "keys")):
            if count * least > size:
                raise _bad(path, f"{count} {what} in a file of {plural(size, 'byte')}")

    def _take(self, n: int) -> bytes:
        if n > min(self._end, MAX_TEXT) - self._at:
            raise _bad(
                self._path, f"header truncated or too long: {plural(n, 'byte')} from byte {self._at} on"
            )
        self._at += n
        data = self._f.read(n)
        if len(data) < n:
            raise _bad(self._path, "became shorter while being read")
        return data

    def _numbers(self, code: str, n: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{n}{code}", self._take(n * struct.calcsize(f"<{code}")))

    def _number(self, code: str) -> Any:
        return self._numbers(code, 1)[0]

    def _string(self) -> str:
        try:
            return self._take(self._number("Q")).decode("utf-8")
        except UnicodeDecodeError as e:
            raise _bad(self._path, f"text that ends at byte {self._at} is not UTF-8: {e.reason}") from None

    def _value(self, tag: int, key: str) -> Any:
        if tag == STRING:
            return self._string()
        if tag == ARRAY:
            inner, n = self._number("I"), self._number("Q")
            self._items += n
            if self._items > MAX_ITEMS or (inner not in NUMBER_CODES and inner != STRING):
                raise _bad(self._path, f"{short(key)}: an array of {plural(n, 'value')} of type {inner}")
            if inner == STRING:
                return [self._string() for _ in range(n)]
            return list(self._numbers(NUMBER_CODES[inner], n))
        if tag not in NUMBER_CODES:
            raise _bad(self._path, f"{short(key)} has unknown type {tag}")
        return self._number(NUMBER_CODES[tag])

    def keys(self) -> dict[str, Any]:
        """Read the keys and their values."""
        out: dict[str, Any] = {}
        for _ in range(self._keys):
            key, tag = self._string(), self._number("I")
            if key in out:
                raise _bad(self._path, f"key {short(key)} is there twice")
            out[key] = self._value(tag, key)
        if out.get("split.count", 0) not in (0, 1):
            raise Refused(
                f"{self._path}: one of {short(out['split.count'])} files of a model; merge them with gguf-split"
            )
        return out

    def tensors(self) -> list[tuple[Stored, str]]:
        """Read (entry, type) of every tensor; offsets are from the start of the data."""
        out: dict[str, tuple[Stored, str]] = {}
        for _ in range(self._tensors):
            name, ndim = self._string(), self._number("I")
            if ndim > MAX_NDIM or len(name) > MAX_NAME or name in out:
                raise _bad(self._path, f"tensor {short(name)} of {plural(ndim, 'dimension')}, or there twice")
            shape = tuple(reversed(self._numbers("Q", ndim)))
            tag, offset = self._number("I"), self._number("Q")
            if tag not in TYPES:
                kind = OTHER_TYPES.get(tag, f"type {tag}")
                raise Refused(
                    f"{self._path}: tensor {short(name)} is {kind}; apr reads {', '.join(DTYPES)}: take the model's "
                    "file of one of these"
                )
            kind = TYPES[tag]
            if 0 in shape or (kind == "Q8_0" and (not shape or shape[-1] % BLOCK)):
                raise _bad(self._path, f"tensor {short(name)}: {kind} {list(shape)}")
            out[name] = Stored(name, DTYPES[kind], shape, offset), kind
        return list(out.values())

    def data_at(self, keys: Mapping[str, Any]) -> tuple[int, int]:
        """Find where the data begin; returns (offset, alignment)."""
        align = keys.get("general.alignment", 32)
        if type(align) is not int or not 8 <= align <= 1 << 16 or align & (align - 1):
            raise _bad(self._path, f"general.alignment = {short(align)} is no power of two from 8 on")
        return -(-self._at // align) * align, align


def _check_places(infos: list[tuple[Stored, str]], data: tuple[int, int], size: int, path: Path) -> None:
    """Make offsets absolute; raise MalformedFile unless tensors follow one another and end where the file does."""
    data_at, align = data
    end = padded = 0
    for i, (e, kind) in enumerate(infos):
        if e.offset != padded:
            raise _bad(path, f"tensor {short(e.name)} at {e.offset}, the one before ends at {padded}")
        end = padded + (prod(e.shape) // BLOCK * Q8_BYTES if kind == "Q8_0" else e.nbytes)
        padded = -(-end // align) * align
        infos[i] = Stored(e.name, e.dtype, e.shape, data_at + e.offset), kind
    if not data_at + end <= size <= data_at + padded:
        what = "truncated" if size < data_at + end else "too long"
        raise _bad(path, f"{what}: {plural(size, 'byte')}, the header asks for {data_at + end}")


def _heads(cfg: ModelConfig, slot: Slot | None, entry: Stored) -> int:
    """Count the heads whose rows change places; 0 also for a tensor of the wrong shape, which its reader refuses."""
    return turned_heads(cfg, slot) if slot and slot.shape == entry.shape else 0


def _published_scaling(header: GgufHeader, cfg: ModelConfig, f: BinaryIO) -> Llama3Scaling | None:
    """Recognise the scaling that all Llama 3.1, 3.2 and 3.3 models have by its divisors: llama.cpp's converter writes these,
    and no key says what they were made of. None where there are none, or they are others."""
    entry = next((e for e, _ in header.infos if e.name == ROPE_FREQS), None)
    if entry is None or entry.shape != (cfg.head_dim // 2,):
        return None
    divisors = np.asarray(TensorFile(header.path, f, [entry])[ROPE_FREQS], np.float64)
    if not np.isfinite(divisors).all() or divisors.max() < 1:
        return None
    scaling = Llama3Scaling(float(divisors.max()), *LLAMA3_RANGES)
    want = frequency_divisors(dataclasses.replace(cfg, rope_scaling=scaling))
    return scaling if want is not None and np.allclose(divisors, want, rtol=1e-4, atol=0) else None


def _check_divisors(cfg: ModelConfig, tensors: TensorFile, path: Path) -> None:
    """Raise Refused unless rope_freqs.weight is what the scaling of the configuration makes of the frequencies."""
    want, got = frequency_divisors(cfg), tensors[ROPE_FREQS]
    if want is None:
        raise Refused(f"{path}: scaled rotary frequencies ({ROPE_FREQS}) whose factors it does not say")
    if got.shape != want.shape or not np.allclose(got, want, rtol=1e-4, atol=0):
        raise Refused(f"{path}: {ROPE_FREQS} is not what its apr.rope_scaling keys make of the frequencies")


def _config(keys: dict[str, Any], names: set[str], path: Path) -> ModelConfig:
    """Translate a header to the config.json that says the same, and read that.

    Raises MalformedFile for a missing key, Refused for what apr does not compute."""
    if (kind := keys.get("general.type", "model")) != "model":
        raise Refused(
            f"{path}: general.type = {short(kind)}: holds no model of its own; give the model's file"
        )
    arch = keys.get("general.architecture")
    family = keys.get("apr.family", arch)
    if not isinstance(family, str) or family not in FAMILIES or ARCHITECTURE.get(family) != arch:
        raise Refused(
            f"{path}: architecture {short(arch)}; apr knows {', '.join(sorted(set(ARCHITECTURE.values())))}"
        )
    own, ours = (
        {k.removeprefix(prefix): v for k, v in keys.items() if k.startswith(prefix)}
        for prefix in (f"{arch}.", "apr.")
    )
    for key in (*SIZE_KEYS, "attention.layer_norm_rms_epsilon"):
        if isinstance(own.get(key), bool) or not isinstance(own.get(key), int | float):
            raise MalformedFile(f"{path}: {arch}.{key} = {short(own.get(key))}; a positive number is needed")
    heads, hidden = own["attention.head_count"], own["embedding_length"]
    head_dim = own.get("attention.key_length", hidden // heads if heads else 0)
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise Refused(f"{path}: {arch}.{key} = {short(own[key])}, not the head size {short(head_dim)}")
    tokens = keys.get("tokenizer.ggml.tokens")
    d: dict[str, Any] = {
        "model_type": family,
        "hidden_act": "silu",
        **{hf: own[key] for key, hf in SIZE_KEYS.items()},
        "max_position_embeddings": ours.get("max_position_embeddings", own["context_length"]),
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": own.get("vocab_size", len(tokens) if isinstance(tokens, list) else 0),
        "rms_norm_eps": float32(own["attention.layer_norm_rms_epsilon"]),
        "rope_theta": float32(own.get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": NAMES["head"] not in names,
        "sliding_window": None,
        **{key: value for key, value in ours.items() if key in WINDOW_KEYS},
    }
    if arch in NO_ROPE_STEP:
        d["no_rope_layer_interval"] = NO_ROPE_STEP[arch]
    d["rope_scaling"] = read_scaling(own, ours, f"{path}: {arch}")
    cfg = from_hf(d, str(path), published=False)
    check_ramp(cfg, path)
    for key, value in scaling_keys(cfg).items():
        found = own.get(key, value)
        is_number = isinstance(found, int | float) and isinstance(value, int | float)
        if found != value and not (is_number and abs(found - value) <= 1e-6 * abs(value)):
            raise Refused(
                f"{path}: {arch}.{key} = {short(found)} is not what its apr.rope_scaling keys say: {value!r}"
            )
    if cfg.num_layers > len(names):
        raise MalformedFile(f"{path}: {plural(cfg.num_layers, 'layer')}, {plural(len(names), 'tensor')}")
    return cfg
