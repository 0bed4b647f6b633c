"""Record the start of a run in its config.json: hashes of the first weights and of the first batch."""

from __future__ import annotations

import numpy as np

from ..checkpoints.state import TrainingState, sha256
from ..common.events import StepBegun, WeightsReady
from .rundir import RunDir


def batch_sha256(ids: np.ndarray, targets: np.ndarray) -> str:
    """SHA-256 of a batch: ids, then targets."""
    return sha256((ids.astype("<i4"), targets.astype("<i4")))


class StartRecord:
    """Writes `start` of config.json; nothing for a run that goes on."""

    def __init__(self, run: RunDir, state: TrainingState) -> None:
        self.run, self.state = run, state

    def weights_ready(self, e: WeightsReady) -> None:
        """Record the weights before the first step."""
        if not e.resumed:
            self.run.record("start", {"weights_sha256": self.state.weights_sha256()})

    def step_begun(self, e: StepBegun) -> None:
        """Record the first batch."""
        if e.step == 1:
            start = self.run.read_config().get("start", {})
            self.run.record("start", {**start, "batch_sha256": batch_sha256(e.ids, e.targets)})
