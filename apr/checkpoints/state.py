"""Saved states of a run in APR v2 files: trained weights, the optimizer's state, and their hashes.

| tensor                 | content, float32                                        |
|------------------------|---------------------------------------------------------|
| NAME                   | the weights that the optimizer updates                  |
| optimizer.STATE.NAME   | its state of that name: optimizer.m.NAME of AdamW       |

NAME is the Hugging Face name of a parameter, or PEFT's of an adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import MalformedFile, Refused
from ..model.adapters import Adapters
from ..model.config import ModelConfig
from ..model.lora import AdapterLayout, lora_of_json, lora_to_json
from ..model.optim import Optimizer
from ..model.params import Layout
from ..ranks.shard import Shard
from .apr2 import read_apr, write_apr
from .apr2_metadata import config_to_metadata, metadata_to_config

OPTIMIZER = "optimizer."
STATE_SHA = "state_sha256"
# Bytes up to which what is saved is hashed as the device has it, apart from the copy that is written: a second to wait for.
READ_AGAIN = 1 << 30


def sha256(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 of the bytes of arrays, one after the other."""
    digest = hashlib.sha256()
    for a in arrays:
        digest.update(np.ascontiguousarray(a).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def device_sha256(be: Any, layout: Layout | AdapterLayout, *flats: Any) -> str:
    """SHA-256 of the tensors of flat arrays, each read from the device by itself: not of the copy that is written to a file.
    "" where the arrays are so large that a run would wait for it."""
    if sum(flat.nbytes for flat in flats) > READ_AGAIN:
        return ""
    return sha256(_device_tensors(be, layout, flats))


def _device_tensors(be: Any, layout: Layout | AdapterLayout, flats: Iterable[Any]) -> Iterator[np.ndarray]:
    for flat in flats:
        for s in layout.in_order():
            part = flat[s.offset : s.offset + s.size]
            yield part if isinstance(flat, np.ndarray) else be.to_host(part)


@dataclass(frozen=True)
class Snapshot:
    """Everything that a saved state holds, as it was at the end of a step.

    flats          {prefix of the tensors' names: (layout.size,) float32}, on the host
    adapter_facts  metadata of adapters, {} where the weights themselves are trained
    device_sha256  of the tensors as the device had them when the copy was made, "" where that takes too long
    """

    cfg: ModelConfig
    layout: Layout | AdapterLayout
    flats: dict[str, np.ndarray]
    adapter_facts: dict[str, Any]
    device_sha256: str = ""
    _begun: dict[str, Future[str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def begin_hashing(self, pool: Executor, of_optimizer: bool, of_state: bool) -> None:
        """Let threads of a pool compute what a checkpoint (optimizer) or a state records, while a file is written."""
        if of_optimizer:
            self._begun["optimizer"] = pool.submit(self._optimizer_sha256)
        if of_state and not self.device_sha256:
            self._begun["state"] = pool.submit(self._state_sha256)

    def optimizer_sha256(self) -> str:
        """SHA-256 of the optimizer's flat arrays, padding included."""
        begun = self._begun.get("optimizer")
        return begun.result() if begun else self._optimizer_sha256()

    def state_sha256(self) -> str:
        """SHA-256 of all tensors: of the device's, where they were hashed when the copy was made."""
        begun = self._begun.get("state")
        return self.device_sha256 or (begun.result() if begun else self._state_sha256())

    def _optimizer_sha256(self) -> str:
        return sha256(flat for prefix, flat in self.flats.items() if prefix)

    def _state_sha256(self) -> str:
        return sha256(self._tensors().values())

    def _tensors(self) -> dict[str, np.ndarray]:
        return {
            prefix + name: x
            for prefix, flat in self.flats.items()
            for name, x in self.layout.named(flat).items()
        }

    def save(self, path: Path, progress: dict[str, Any]) -> None:
        """Write an APR file. Raises IOFailure."""
        meta = {
            **config_to_metadata(self.cfg),
            "training": progress,
            STATE_SHA: "0" * 64,
        }
        late = {STATE_SHA: self.state_sha256}
        write_apr(path, meta | self.adapter_facts, self._tensors(), "float32", late)


@dataclass(frozen=True)
class TrainingState:
    """Everything of a run that training changes: the flat arrays of an optimizer, named by a layout.

    adapters: whose A and B are trained, None where the weights themselves are. shard: the part that this rank owns, None in
    one process. Of several ranks all call the same methods, and rank 0 gets what they return.
    """

    cfg: ModelConfig
    layout: Layout | AdapterLayout
    optimizer: Optimizer
    adapters: Adapters | None = None
    shard: Shard | None = None

    def buffers(self) -> dict[str, Any]:
        """List the flat arrays on the device by the prefix of their tensors' names."""
        opt = self.optimizer
        return {"": opt.master} | {f"{OPTIMIZER}{name}.": flat for name, flat in sorted(opt.state.items())}

    def sha256(self) -> str:
        """SHA-256 of weights and optimizer state as they are on the device, each tensor read by itself; "" but on rank 0."""
        return self._sha256(self._judged())

    def _judged(self) -> list[Any]:
        """List the arrays on the device by the optimizer's own names, not as `buffers` lists them for a file."""
        opt = self.optimizer
        return [opt.master, *(opt.state[name] for name in sorted(opt.moments))]

    def weights_sha256(self) -> str:
        """SHA-256 of the weights alone."""
        return self._sha256([self.optimizer.master])

    def distances(self, path: Path) -> dict[str, float]:
        """Measure how far weights and optimizer state are from those of a saved state, in norms of what was saved."""
        tensors, out = read_apr(path).tensors, {}
        for prefix, flat in self.buffers().items():
            saved = self._read(tensors, prefix, path).astype(np.float64)
            now = np.zeros(self.layout.size, np.float64)
            for s in self.layout.in_order():
                now[s.offset : s.offset + s.size] = self.optimizer.be.to_host(
                    flat[s.offset : s.offset + s.size]
                )
            out[prefix] = float(np.linalg.norm(now - saved)) / max(float(np.linalg.norm(saved)), 1e-30)
        return out

    def _sha256(self, flats: Iterable[Any]) -> str:
        wholes = [self._whole(flat) for flat in flats]
        is_here = all(whole is not None for whole in wholes)
        return sha256(_device_tensors(self.optimizer.be, self.layout, wholes)) if is_here else ""

    def _whole(self, flat: Any) -> Any:
        """Join the parts of a flat array; itself in one process."""
        return flat if self.shard is None else self.shard.whole(flat)

    def snapshot(self, copy: Callable[[str, Any], np.ndarray], becomes_state: bool = True) -> Snapshot | None:
        """Copy the flat arrays to the host, where training does not change them. copy: as HostCopies do it.

        becomes_state: the copy is written as a state, which is judged by the hash of the device. None but on rank 0."""
        if self.shard is not None:
            return self._joined(self.shard, becomes_state)
        flats = {prefix: copy(prefix, flat) for prefix, flat in self.buffers().items()}
        sha = device_sha256(self.optimizer.be, self.layout, *self._judged()) if becomes_state else ""
        return Snapshot(self.cfg, self.layout, flats, self._adapter_facts(), sha)

    def _joined(self, shard: Shard, becomes_state: bool) -> Snapshot | None:
        """Join the parts of all ranks; what is hashed is joined by itself."""
        flats = {prefix: shard.whole(flat) for prefix, flat in self.buffers().items()}
        size = shard.cut.size * 4 * len(flats)
        sha = self.sha256() if becomes_state and size <= READ_AGAIN else ""
        whole = {prefix: flat for prefix, flat in flats.items() if flat is not None}
        return Snapshot(self.cfg, self.layout, whole, self._adapter_facts(), sha) if whole else None

    def load(self, path: Path) -> tuple[dict[str, Any], str | None]:
        """Put a saved state into the optimizer; return its progress and recorded SHA-256 (None in old states).

        Raises MalformedFile, Refused: another base, other adapters, another optimizer.
        """
        file, opt = read_apr(path), self.optimizer
        progress = file.metadata.get("training")
        if not isinstance(progress, dict):
            raise MalformedFile(f"{path}: no 'training' entry; this is a checkpoint, not a state")
        self._check(file.metadata, file.tensors, path)
        for prefix, flat in self.buffers().items():
            host = self._read(file.tensors, prefix, path)
            if not prefix:
                self.set_weights(host)
            else:
                opt.be.from_host(flat, host if self.shard is None else self.shard.take(host))
        step = progress.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise MalformedFile(f"{path}: training.step = {step!r}; no run was ever there")
        opt.steps = step
        return progress, file.metadata.get(STATE_SHA)

    def set_weights(self, host: np.ndarray) -> None:
        """Set the weights that are trained to a float32 buffer (layout.size,)."""
        if self.shard is None:
            self.optimizer.set_weights(host)
        else:
            opt = self.optimizer
            own = self.shard.take(host)
            self.shard.begin(host)
            opt.be.from_host(opt.w, own)
            if opt.master is not opt.w:
                opt.be.from_host(opt.master, own)

    def _read(self, tensors: Mapping[str, Any], prefix: str, path: Path) -> np.ndarray:
        host = np.zeros(self.layout.size, np.float32)
        for name, view in self.layout.named(host).items():
            saved = tensors.get(prefix + name)
            if saved is None or saved.shape != view.shape or saved.dtype != np.float32:
                raise MalformedFile(
                    f"{path}: tensor {prefix + name!r} is missing or of the wrong shape or dtype"
                )
            view[...] = saved
        return host

    def _adapter_facts(self) -> dict[str, Any]:
        a = self.adapters
        return {"lora": {**lora_to_json(a.config), "base_sha256": a.base_sha256}} if a else {}

    def _check(self, metadata: Mapping[str, Any], tensors: Iterable[str], path: Path) -> None:
        saved, ours = metadata.get("lora"), self._adapter_facts().get("lora")
        if saved != ours:
            raise Refused(
                f"{path}: adapters {saved}, this run has {ours}; resume with the --init and settings of then"
            )
        other = [prefix for prefix in prefixes(tensors) if prefix not in self.buffers()]
        if other:
            raise Refused(
                f"{path}: holds {other[0]}*, which {type(self.optimizer).__name__} does not keep; resume with the "
                "optimizer of then"
            )


def prefixes(names: Iterable[str]) -> list[str]:
    """List the prefixes of a state's tensors, in order: "" for weights, "optimizer.m." for the state m."""
    return sorted({n[: n.find(".", len(OPTIMIZER)) + 1] if n.startswith(OPTIMIZER) else "" for n in names})


def saved_hashes(metadata: dict[str, Any], tensors: Mapping[str, Any], source: str) -> tuple[str, str]:
    """Compute (sha256, optimizer_sha256) of a saved state from its file."""
    cfg = metadata_to_config(metadata, source, [n for n in tensors if not n.startswith(OPTIMIZER)])
    lora = metadata.get("lora")
    layout = AdapterLayout(cfg, lora_of_json(lora)) if lora else Layout(cfg)
    names = [s.hf for s in layout.in_order()]
    parts = {p: [np.asarray(tensors[p + n]) for n in names] for p in prefixes(tensors)}

    def flat(part: list[np.ndarray]) -> np.ndarray:
        host = np.zeros(layout.size, np.float32)
        for view, x in zip(layout.named(host).values(), part, strict=True):
            view[...] = x
        return host

    return (
        sha256(x for part in parts.values() for x in part),
        sha256(flat(part) for prefix, part in parts.items() if prefix),
    )
