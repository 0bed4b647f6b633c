"""Traces: taps and gradients of one step, recorded, or read from a safetensors file with the model they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..checkpoints.apr2 import MAGIC as APR_MAGIC
from ..checkpoints.gguf_reader import MAGIC as GGUF_MAGIC
from ..checkpoints.hf import read_safetensors
from ..checkpoints.tensors import is_float
from ..common.errors import MalformedFile, Refused, UsageError
from ..common.files import opened, parse_json
from ..common.shell import word
from ..model.config import ModelConfig
from ..model.hf_config import from_hf
from ..model.taps import Record
from ..model.transformer import Model
from . import rule


class Trace(NamedTuple):
    """A recorded trace: taps and gradients by name, the texts of its metadata, the ids and targets (B, T) of the pass."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]
    ids: np.ndarray
    targets: np.ndarray

    @property
    def dtype(self) -> str:
        """Dtype in which the traced side computed: a key of rule.EPS."""
        return self.metadata["dtype"]

    @property
    def gradients(self) -> bool:
        """True when the trace has gradients; the side must then be a training model."""
        return any(name.startswith(("grad.", "d_hidden", "d_final")) for name in self.tensors)


def record(model: Model, ids: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Run a pass over ids (B,T) and copy all taps, rows of tokens as (B,T,...).

    With a training model also the gradients: "d_..." of activations and "grad.NAME" of parameters. loss is the mean,
    shape (1,). Raises UsageError without a target."""
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


def read_trace(
    path: str | Path,
    ids: np.ndarray | None = None,
    targets: np.ndarray | None = None,
) -> Trace:
    """A file of `apr trace`, or any safetensors file whose tensors are named like taps and whose metadata has a dtype.

    ids, targets: what went in, where the file does not hold it. Raises InputNotFound, MalformedFile, Refused.
    """
    path = Path(path)
    _check_trace(path)
    file = read_safetensors(path)
    tensors, metadata = dict(file), file.metadata
    if metadata.get("dtype") not in rule.EPS:
        raise MalformedFile(
            f"{path}: metadata dtype = {metadata.get('dtype')!r} is not one of {', '.join(rule.EPS)}; "
            "is this a file that `apr trace` wrote?"
        )
    given = {"ids": (ids, "--tokens"), "targets": (targets, "--targets")}
    ids, targets = (
        given_or_stored(path, name, tensors.pop(name, None), *given[name]) for name in ("ids", "targets")
    )
    if ids.shape != targets.shape:
        raise Refused(f"{path}: targets are {targets.shape}, ids {ids.shape}; they must be equal")
    for name, x in tensors.items():
        if not is_float(x.dtype):
            raise MalformedFile(f"{path}: tensor {name!r} is {x.dtype}; taps are floating point")
    return Trace(tensors, metadata, ids, targets)


def _check_trace(path: Path) -> None:
    """Raise Refused for a checkpoint, which is no trace of a pass, whatever its format."""
    is_model = path.is_dir()
    if path.is_file():
        with opened(path) as (f, _):
            is_model = f.read(4) in (APR_MAGIC, GGUF_MAGIC)
    if is_model:
        raise Refused(
            f"{path}: is a checkpoint, not a trace; make a trace of it with apr trace {word(path)} --tokens ... -o "
            "T.safetensors, or compare two checkpoints with apr diff"
        )


def given_or_stored(
    path: Path, name: str, stored: np.ndarray | None, given: np.ndarray | None, flag: str
) -> np.ndarray:
    """ids or targets: as stored, as given, or both when they are the same."""
    if stored is None:
        if given is None:
            raise Refused(f"{path}: has no tensor {name!r}; give {flag} as the trace was made with")
        return given
    if stored.dtype.kind not in "iu" or stored.ndim != 2:
        raise MalformedFile(f"{path}: tensor {name!r} is {stored.dtype} {stored.shape}, not integers (B,T)")
    lowest = 0 if name == "ids" else -(1 << 31)  # a target below 0 is ignored
    if int(stored.min()) < lowest or int(stored.max()) >= 1 << 31:
        bad = stored.min() if stored.min() < lowest else stored.max()
        raise MalformedFile(f"{path}: tensor {name!r} holds {bad}, which is no token id; is it a trace?")
    if given is not None and not np.array_equal(stored, given):
        raise Refused(f"{path}: was made of other {name} than {flag} gives; leave {flag} out")
    return np.array(stored, np.int32)


def same_model(path: str | Path, trace: Trace, model_sha256: str) -> None:
    """Raise Refused for a trace of another model than the one of this hash (Source.sha256)."""
    traced = trace.metadata.get("model_sha256", model_sha256)
    if traced != model_sha256:
        raise Refused(
            f"{path}: a trace of {trace.metadata.get('model', 'a model')} with model_sha256 {traced}, but this model has "
            f"{model_sha256}; compare the model that was traced"
        )


def config_of(path: str | Path, trace: Trace) -> ModelConfig | None:
    """Read the configuration of the traced side; None for a trace without one. Raises MalformedFile, Refused."""
    text = trace.metadata.get("config")
    if text is None:
        return None
    return from_hf(parse_json(text.encode(), f"{path}: metadata config"), f"{path}: metadata config")
