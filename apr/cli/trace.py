"""`apr trace MODEL`: every intermediate of one forward (and backward) pass, as a safetensors file.

Example: apr trace qwen3-tiny --tokens 1,2,3,4 --backward -o trace.safetensors"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from .. import backends
from ..backends.select import select
from ..checkpoints.hf import write_safetensors
from ..checkpoints.registry import open_host
from ..common.errors import InputNotFound, MalformedFile, Refused, UsageError
from ..common.files import opened, read_json
from ..common.options import device_option, json_option, option, parse, threads_option
from ..common.provenance import versions
from ..model.config import ModelConfig
from ..model.cost import check_fits, memory
from ..model.hf_config import to_hf
from ..model.presets import PRESETS
from ..model.taps import Record
from ..model.transformer import IGNORED, Model

NPY = b"\x93NUMPY\x01\x00"  # what a file of integers begins with, whatever version of NumPy writes it
# What NumPy raises for a header that it cannot read, as Python's tokenizer and parser see it.
NO_ARRAY = (
    Warning,
    ValueError,
    TypeError,
    EOFError,
    OSError,
    OverflowError,
    MemoryError,
    SyntaxError,
    TokenError,
)


@dataclass(frozen=True)
class Flags:
    """Options of `apr trace`."""

    model: str = option(
        "an .apr file, a Hugging Face folder, or a preset (random weights)",
        positional=True,
        path=True,
        names=tuple(PRESETS),
    )
    tokens: str = option(
        'ids: "1,2,3", or a .json or .npy file of one row or (B,T)', "", metavar="IDS", path=True
    )
    output: str = option("the safetensors file to write", "", short="o", metavar="FILE", path=True)
    backend: str = option("reference, cpu or cuda", "", choices=backends.NAMES)
    device: str = device_option("auto, cpu, cuda or cuda:N; chooses the backend where --backend does not")
    dtype: str = option(
        "default: float64 on reference, float32 on cpu, bfloat16 on cuda",
        "",
        choices=("float64", "float32", "bfloat16"),
    )
    backward: bool = option("also all gradients, of the mean loss", False)
    targets: str = option(
        "file of targets (B,T), -100 ignored (default: the next tokens)", "", metavar="FILE", path=True
    )
    threads: int | None = threads_option()
    seed: int = option("seed of a preset's random weights", 42, at_least=0)
    json: bool = json_option()


def main(args: Sequence[str]) -> int:
    """Returns the exit code; errors are raised."""
    f = parse(Flags, args, "apr trace", __doc__ or "")
    if not f.tokens or not f.output:
        raise UsageError("--tokens and --output (or -o) are needed: what goes in, and where the trace goes")
    if f.backend and f.device != "auto" and not f.device.startswith(f.backend):
        raise UsageError(f"--backend {f.backend} and --device {f.device} are not the same; give one of them")
    if f.backend == "reference":
        backend = backends.get("reference")
    else:
        backend = select(f.device if f.device != "auto" else f.backend or "auto", f.dtype or None, f.threads)
    dtype = f.dtype or backend.dtypes[0]
    if dtype not in backend.dtypes:
        raise Refused(f"--dtype {dtype}: the {backend.name} backend computes in {', '.join(backend.dtypes)}")
    source = open_host(f.model, dtype, f.seed)
    ids = read_ids(f.tokens, source.cfg, "--tokens", lowest=0)
    targets = read_targets(f.targets, ids, source.cfg)
    batch, seq = ids.shape
    need = memory(source.cfg, backend, batch, seq, dtype, f.backward, ids.size, optimizer=None)
    check_fits(need, backend, "trace fewer tokens or a smaller model")
    weights = source.on(backend, dtype)
    model = Model(source.cfg, backend, batch, seq, dtype, f.backward, ids.size, w=weights)
    tensors = record(model, ids, targets) | {"ids": ids, "targets": targets}
    facts = {
        "model": f.model,
        "model_sha256": source.sha256,
        "backend": backend.name,
        "dtype": dtype,
        "config": json.dumps(to_hf(source.cfg)),
        "versions": json.dumps(versions()),
    }
    write_safetensors(f.output, tensors, metadata=facts, finite=False)
    loss = tensors["loss"]
    result = {"output": f.output, "tensors": len(tensors), "loss": float(loss[0]), **facts}
    if f.json:
        print(json.dumps(result))
    else:
        print(
            f"{f.output}: {len(tensors)} tensors, backend {backend.name} {dtype}, loss {loss[0]:.6f} nats/token"
        )
    return 0


def record(model: Model, ids: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """All taps of a pass over ids (B,T), rows of tokens as (B,T,...); with a training model also the
    gradients, "d_..." of activations and "grad.NAME" of parameters. loss is the mean, shape (1,)."""
    backend, tap = model.be, Record(model.be)
    count = int((targets >= 0).sum())
    if not count:
        raise UsageError("no target to compute a loss of: give at least two tokens, or --targets")
    model.forward(ids, tap)
    model.loss(targets, 1 / count if model.train else None, tap)
    if model.train:
        model.backward(tap)
    seen = {k: x.reshape(*ids.shape, *x.shape[1:]) if len(x) == ids.size else x for k, x in tap.seen.items()}
    seen["loss"] = np.array(backend.to_host(model.total) / count)
    if model.train:
        host = backend.to_host(model.g)
        seen |= {f"grad.{name}": x for name, x in model.layout.named(host).items()}
    return seen


def read_targets(text: str, ids: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """int32 (B,T) as --targets says, or for "" the next tokens of ids (B,T). Raises as read_ids does."""
    if not text:
        return np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], IGNORED)], 1)
    targets = read_ids(text, cfg, "--targets", lowest=IGNORED)
    if targets.shape != ids.shape:
        raise UsageError(f"--targets has shape {targets.shape}, --tokens {ids.shape}; they must be equal")
    return targets


def read_ids(text: str, cfg: ModelConfig, flag: str, lowest: int) -> np.ndarray:
    """int32 (B,T) from "1,2,3" or a .json or .npy file. Raises for anything that is not token ids."""
    value: Any
    path = Path(text)
    if path.suffix in (".json", ".npy"):
        if not os.path.isfile(path):
            raise InputNotFound(f"{flag} {text}: no such file")
        value = _json_ids(path) if path.suffix == ".json" else _npy_ids(path)
    else:
        value = text.split(",")
    try:
        ids = np.array([int(x) for x in value] if path.suffix not in (".json", ".npy") else value)
        if ids.dtype.kind not in "iu":
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise UsageError(
            f'{flag} {text}: expected whole numbers such as "1,2,3", or a file of them'
        ) from None
    ids = np.atleast_2d(ids)
    if ids.ndim != 2 or not ids.size:
        raise UsageError(f"{flag} {text}: shape {ids.shape}; expected one row or (B,T)")
    if ids.max() >= cfg.vocab_size or ids.min() < lowest:
        bad = ids.max() if ids.max() >= cfg.vocab_size else ids.min()
        where = f"{flag} {text}" if path.suffix in (".json", ".npy") else flag
        raise Refused(f"{where}: id {bad} is outside the model's vocabulary of {cfg.vocab_size}")
    return np.ascontiguousarray(ids, np.int32)


def _json_ids(path: Path) -> list[Any]:
    """One list of whole numbers or several. NumPy would make texts as long as the longest, and numbers of true and false."""
    value = read_json(path)
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    if not all(isinstance(row, list) and all(type(i) is int for i in row) for row in rows):
        raise MalformedFile(
            f"{path}: not an array of ids: write [1, 2, 3], or a list of such rows of equal length"
        )
    return rows


def _npy_ids(path: Path) -> np.ndarray:
    """A .npy file, mapped: its header may promise more than the file has, which then is an error instead of memory."""
    with opened(path) as (f, _):
        start = f.read(len(NPY))
    if start != NPY:  # also that of later versions, whose headers may be said to have 4 GiB
        raise MalformedFile(
            f"{path}: not an array of ids: starts with {start!r}, not {NPY!r}; save one with numpy.save"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a header that is not what NumPy writes
            return np.asarray(open_memmap(path, mode="r"))
    except NO_ARRAY as e:
        raise MalformedFile(f"{path}: not an array of ids: {e}; save one with numpy.save") from None
