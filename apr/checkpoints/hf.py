"""Read and write Hugging Face checkpoints: config.json beside one or several safetensors files.

A safetensors file is a u64 length, a JSON header {name: {dtype, shape, data_offsets}} and the data.
It is read and written here by hand: the library's NumPy interface has no bfloat16, and the checks
below are stricter and name what is wrong.
"""

from __future__ import annotations

import json
import os
import struct
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..common.atomic import atomic_write, remove_leftovers, write_json, write_text, writing_several
from ..common.errors import InputNotFound, IOFailure, MalformedFile, Refused
from ..common.files import MAX_TEXT, opened, parse_json, read_text
from ..common.rounding import round_up
from ..common.units import plural
from ..model.config import ModelConfig
from ..model.hf_config import from_hf, to_hf
from ..model.params import Layout
from .tensors import BF16, EMBED, HEAD, INV_FREQ, PREFIX, Stored, TensorFile, encode, mismatch, saved_dtype

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BF16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
TO_SAFETENSORS = (
    "AutoModelForCausalLM.from_pretrained({0}).save_pretrained(FOLDER) of transformers writes safetensors"
)
ROW_MAJOR = ("pt", "np", "mlx")  # formats that store a matrix as [out, in]; TensorFlow and Flax do not


@dataclass(frozen=True)
class HfWeights:
    """A checked checkpoint: config (as parsed and as the dict it was), mapped tensors, tokenizer text."""

    path: Path
    cfg: ModelConfig
    config: dict[str, Any]
    tensors: Mapping[str, np.ndarray]
    tokenizer_json: str | None


def read_hf(path: str | Path) -> HfWeights:
    """Open a folder with config.json and weights, or one .safetensors file with config.json beside it.

    Raises InputNotFound listing what was looked for, MalformedFile, Refused.
    """
    path = Path(path)
    whole = os.path.isdir(path)
    folder = path if whole else path.parent
    if not os.path.exists(path):
        raise InputNotFound(f"{path}: no such file or folder")
    if not os.path.lexists(folder / "config.json"):
        raise InputNotFound(f"{folder}: no config.json; the weights alone do not say what the model computes")
    config = parse_json(read_text(folder / "config.json"), str(folder / "config.json"))
    cfg = from_hf(config, str(folder / "config.json"))
    tensors = read_weights(path)
    tokenizer = folder / "tokenizer.json"
    return HfWeights(path, cfg, config, tensors, read_text(tokenizer) if os.path.lexists(tokenizer) else None)


def read_weights(path: Path) -> Mapping[str, np.ndarray]:
    """Open the tensors of a folder or of one file, by the names that a model with a head has.

    A model that was saved without its head, as models of embeddings are, has them without the PREFIX, and transformers
    reads both. Raises as read_folder does."""
    tensors = read_folder(path) if os.path.isdir(path) else read_safetensors(path)
    if EMBED.removeprefix(PREFIX) not in tensors or any(name.startswith(PREFIX) for name in tensors):
        return tensors
    names = {name: name if name == HEAD else PREFIX + name for name in tensors}
    if isinstance(tensors, TensorFile):
        return tensors.renamed(names)
    return {names[name]: tensor for name, tensor in tensors.items()}


def read_folder(folder: Path) -> Mapping[str, np.ndarray]:
    """Open the tensors of a folder, of one file or shards. Raises InputNotFound, MalformedFile, Refused."""
    single, index = os.path.lexists(folder / SINGLE), os.path.lexists(folder / INDEX)
    # mlx-lm writes an index of one file too
    if index and not (single and set(shard_names(folder / INDEX)) != {SINGLE}):
        return _read_index(folder / INDEX)
    if single and index:
        raise Refused(
            f"{folder}: holds {SINGLE} and {INDEX}; remove the one that does not belong to the model"
        )
    if single:
        return read_safetensors(folder / SINGLE)
    raise InputNotFound(f"{folder}: neither {SINGLE} nor {INDEX}{_instead(folder)}")


def _instead(folder: Path) -> str:
    """Name the weights that a folder holds in other files, and what to do with them."""
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    pickles = [n for n in names if n.endswith(PICKLES)]
    models = [n for n in pickles if n.startswith("pytorch_model")]
    if models:
        return f"; {models[0]} is a pickle, which can run code: {TO_SAFETENSORS.format('FOLDER')}"
    tensors = [n for n in names if n.endswith(".safetensors")]
    if shards := [n for n in tensors if "-of-" in n]:
        return f"; {shards[0]} is a part of a model, whose parts {INDEX} names: fetch it too"
    if tensors:
        return f"; if {tensors[0]} holds the model, give that file"
    if pickles:
        return (
            f"; {pickles[0]} is a pickle, which can run code: save the model as safetensors where it was made"
        )
    return ""


def shard_names(path: Path) -> list[str]:
    """List the files that an index names, each a plain name beside the index. Raises MalformedFile."""
    return sorted(_wanted(path))


def _read_index(path: Path) -> Mapping[str, np.ndarray]:
    """Open the shards that an index names, which must hold exactly the tensors of the index.

    A shard is a plain name beside the index; it may be a link, as all files in a cache of the Hub are: a link is made by who
    made the folder, not by who wrote the file."""
    shards: list[TensorFile] = []
    for file, want in sorted(_wanted(path).items()):
        shard = read_safetensors(path.parent / file)
        for found, what in ((want - set(shard), "lacks"), (set(shard) - want, "holds, against the index,")):
            # A table that the config determines; converters leave it out of the shards or out of the index.
            if names := {name for name in found if not name.endswith(INV_FREQ)}:
                raise MalformedFile(
                    f"{shard.path}: {what} {plural(len(names), 'tensor')}: {', '.join(sorted(names)[:5])}"
                )
        shards.append(shard)
    # Looked up in its file each time, which may have become shorter.
    return ChainMap(*shards)  # type: ignore[arg-type]


def _wanted(path: Path) -> dict[str, set[str]]:
    """Read an index as the names of the tensors by file."""
    weight_map = parse_json(read_text(path), str(path), unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedFile(f"{path}: weight_map is missing or empty")
    wanted: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _plain(file):
            raise MalformedFile(
                f"{path}: {name!r} is said to be in {file!r}; a shard is a plain .safetensors name"
            )
        wanted.setdefault(file, set()).add(name)
    return wanted


def _plain(name: str) -> bool:
    return name.endswith(".safetensors") and not set(name) & set("/\\\0:") and not name.startswith(".")


def read_safetensors(path: str | Path) -> TensorFile:
    """Open a safetensors file after checking its length and every name, dtype, shape and offset.

    Tensors fill the data without gap or overlap. Raises InputNotFound, MalformedFile, Refused.
    """
    path = Path(path)
    with opened(path) as (f, size):
        (n,) = struct.unpack("<Q", f.read(8).ljust(8, b"\0"))
        if not 2 <= n <= min(size - 8, MAX_TEXT):
            raise _bad(path, f"header of {plural(n, 'byte')} in a file of {size}")
        raw = f.read(n)
        if raw[:1] != b"{":
            raise _bad(path, f"header starts with {raw[:1]!r}")
        header = parse_json(raw, str(path), unique=True)
        metadata = _metadata(header.pop("__metadata__", None), path)
        kind = metadata.get("format", "pt")
        if kind not in ROW_MAJOR:
            raise Refused(
                f"{path}: format = {kind!r} may store matrices the other way round; apr reads {ROW_MAJOR}"
            )
        entries = [_entry(name, row, 8 + n, path) for name, row in header.items()]
        end = 8 + n
        for e in sorted(entries, key=lambda e: e.offset):
            if e.offset != end:
                what = "overlaps the one before" if e.offset < end else "leaves a gap before it"
                raise _bad(path, f"tensor {e.name!r} at {e.offset} {what}, which ends at {end}")
            end += e.nbytes
        if end != size:
            raise _bad(
                path,
                f"{'truncated' if end > size else 'too long'}: {plural(size, 'byte')}, the header asks for {end}",
            )
        return TensorFile(path, f, entries, metadata)


def _bad(path: Path, what: str) -> MalformedFile:
    return MalformedFile(f"{path}: {what}; the file is damaged or not safetensors, fetch or write it again")


def _metadata(metadata: Any, path: Path) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "__metadata__ is not an object of texts")
    return metadata


def _entry(name: str, row: Any, data_at: int, path: Path) -> Stored:
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"tensor {name!r}: expected dtype, shape and data_offsets")
    shape, offsets = row["shape"], row["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(x) is not int or not 0 <= x < 2**62 for x in numbers):
            raise _bad(path, f"tensor {name!r}: shape {shape!r}, data_offsets {offsets!r}")
    if not isinstance(row["dtype"], str) or row["dtype"] not in DTYPES:
        raise Refused(f"{path}: tensor {name!r} has dtype {row['dtype']!r}; apr reads {', '.join(DTYPES)}")
    dtype = DTYPES[row["dtype"]]
    if 0 in shape:
        raise MalformedFile(
            f"{path}: tensor {name!r} has no elements, {shape!r}; a rank of DeepSpeed's ZeRO-3 saves weights so that it has not "
            "gathered: save the model again, whole"
        )
    if len(offsets) != 2 or len(shape) > 8 or offsets[1] - offsets[0] != prod(shape) * dtype.itemsize:
        raise _bad(path, f"tensor {name!r}: {dtype} {shape!r} does not fill data_offsets {offsets!r}")
    return Stored(name, dtype, tuple(shape), data_at + offsets[0])


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, np.ndarray],
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
    finite: bool = True,
) -> None:
    """Write a safetensors file, one piece of one tensor at a time, in the place of `path`.

    dtype: "float32" or "bfloat16" for floating point tensors (rounding to nearest even), None keeps
    theirs. metadata: texts beside the format name. finite: refuse NaN and infinity, as weights must
    (a trace may hold them). Raises Refused also for a dtype that the format lacks, IOFailure.
    """
    plan = [(name, saved_dtype(tensors[name], dtype)) for name in tensors]
    plan.sort(key=lambda row: (-row[1].itemsize, row[0]))  # wide first: every tensor stays aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, to in plan:
        shape = tensors[name].shape
        if to not in TAGS or 0 in shape or name == "__metadata__":
            raise Refused(f"{path}: tensor {name!r}, {to} {shape}: a safetensors file cannot hold this")
        end = offset + prod(shape) * to.itemsize
        header[name] = {"dtype": TAGS[to], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text = text.ljust(round_up(len(text), 8))
    with atomic_write(path) as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, to in plan:
            for piece in encode(f"{path}: {name}", tensors[name], to, finite):
                f.write(piece)
        if f.tell() != 8 + len(text) + offset:
            raise Refused(f"{path}: a tensor changed its shape while it was written")


def write_hf(
    folder: str | Path,
    cfg: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    dtype: str | None = "float32",
    max_shard_bytes: int = 5_000_000_000,
    tokenizer_json: str | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a folder that transformers loads: config.json, safetensors (in shards), tokenizer.json.

    `tensors` are exactly the parameters of `cfg`. dtype None keeps theirs. texts: further files by name; a
    config.json among them takes the place of the one that `cfg` gives. Raises Refused when the tensors are not,
    or when the folder holds weights already (a failure half way would mix two models); IOFailure. On an
    error, or a kill, no weights are left behind for good.
    """
    texts = dict(texts or {})
    folder = Path(folder)
    problem = mismatch(Layout(cfg), {name: tensors[name].shape for name in tensors})
    if problem:
        raise Refused(f"{folder}: not written, the tensors do not fit the config: {problem}")
    if folder.is_dir():
        remove_leftovers(folder)
    old = sorted(p.name for p in folder.glob("*.safetensors*")) if folder.is_dir() else []
    if old:
        raise Refused(f"{folder}: already holds {old[0]}; name a new folder or remove the old weights first")
    sizes = {name: t.size * saved_dtype(t, dtype).itemsize for name, t in tensors.items()}
    shards = _split(sizes, max_shard_bytes)
    config = texts.pop("config.json", None)
    if tokenizer_json is not None:
        texts = {"tokenizer.json": tokenizer_json, **texts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with writing_several(folder, [*shards, INDEX, *texts, "config.json"]):
            for file, names in shards.items():
                write_safetensors(folder / file, {name: tensors[name] for name in names}, dtype)
            if len(shards) > 1:
                where = {name: file for file, names in shards.items() for name in names}
                write_json(
                    folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
                )
            for name, text in texts.items():
                write_text(folder / name, text)
            if config is None:
                write_json(
                    folder / "config.json", {**to_hf(cfg), "torch_dtype": dtype or commonest_dtype(tensors)}
                )
            else:
                write_text(folder / "config.json", config)
    except OSError as e:
        raise IOFailure(f"{folder}: cannot create the folder: {e}") from e


def commonest_dtype(tensors: Mapping[str, np.ndarray]) -> str:
    """Find the dtype of most elements, as config.json spells it."""
    count: dict[str, int] = {}
    for t in tensors.values():
        count[t.dtype.name] = count.get(t.dtype.name, 0) + t.size
    return max(count, key=lambda name: count[name])


def _split(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """Split tensors into shards {file: tensor names}, in the order given, each shard of at most `limit` bytes or one tensor."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards)}
