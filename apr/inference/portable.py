"""Copy a model, and hand it to another process."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

from .. import backends
from ..backends.select import select
from ..checkpoints.checkpoint import Checkpoint
from ..common.errors import Refused
from .int8 import Int8Weights
from .int8 import backend as int8_backend


class Portable:
    """Copies of a LanguageModel on the CPU, by copy.deepcopy and pickle: each has weights of its own.

    In a process that has not computed yet it does with as many threads as there are cores. Raises Refused for a model on a
    GPU, whose weights belong to this process."""

    checkpoint: Checkpoint
    backend: Any
    weights: Any
    _generator: Any

    def __getstate__(self) -> dict[str, Any]:
        if self.backend.name != "cpu":
            raise Refused(
                f"{self.checkpoint.source}: a model on a GPU is neither copied nor pickled; load it again where it is needed, or "
                "with device='cpu'"
            )
        # Side files are read now: the other process may have another working folder.
        _ = self.checkpoint.texts
        return {name: x for name, x in vars(self).items() if name not in ("backend", "_generator")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rounded = isinstance(state["weights"], Int8Weights)
        cpu = backends.get("cpu") if backends.is_loaded("cpu") else select("cpu")
        self._take(state, int8_backend(cpu) if rounded else cpu)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = object.__new__(type(self))
        memo[id(self)] = made
        # A checkpoint at rest never changes: copies share it.
        memo[id(self.checkpoint)] = self.checkpoint
        made._take(copy.deepcopy(self.__getstate__(), memo), self.backend)
        return made

    def _take(self, state: dict[str, Any], backend: ModuleType) -> None:
        vars(self).update(state)
        self.backend, self._generator = backend, None
        if not isinstance(copied := self.weights, Int8Weights):
            # Kernels read arrays that begin where the backend lets them begin.
            self.weights = backend.empty(copied.shape, copied.dtype)
            backend.copy(self.weights, copied)
