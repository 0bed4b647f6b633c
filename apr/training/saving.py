"""Save checkpoints and states: copied at the end of a step, then written, hashed and synced by one thread while training
goes on.

One save is under way at most, the next one waits for it. Events and errors of a save reach the training thread at the
end of a step (`poll`) or where it waits (`wait`): before an evaluation, the next save and the end of the run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.host_copies import HostCopies
from ..checkpoints.apr2 import Dumped
from ..checkpoints.apr2_metadata import config_to_metadata, dumped_tokenizer
from ..checkpoints.peft_write import write_adapter
from ..checkpoints.state import READ_AGAIN, Snapshot, TrainingState, device_sha256, sha256
from ..common.events import Event, Noted, Saved
from ..model.lora import AdapterLayout
from ..model.transformer import Model
from .evaluate import evaluated_on
from .inputs import Inputs
from .ladder import spacing
from .rundir import RunDir

# Name of the copy of the weights that compute, beside those of a state.
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Epoch:
    """The part of a run between two evaluations, at its end.

    number      1, 2, ...
    facts       sums over its steps, for the metadata of its checkpoint
    val_losses  of all evaluations so far, the first before step 1
    """

    number: int
    facts: dict[str, Any]
    val_losses: Sequence[float]


class Saver:
    """Save a run. emit: hears Saved when the files of a checkpoint are whole, and Noted."""

    def __init__(
        self, inputs: Inputs, run: RunDir, model: Model, state: TrainingState, emit: Callable[[Event], None]
    ) -> None:
        self.inputs, self.run, self.model, self.state, self.emit = inputs, run, model, state, emit
        # The weights that compute are those that the optimizer updates.
        self._is_shared = state.adapters is None and state.optimizer.master is state.optimizer.w
        self._copy = HostCopies(state.optimizer.be)
        self._merged: np.ndarray | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._done: list[Event] = []
        self._has_told = False

    def save(self, epoch: Epoch | None, progress: dict[str, Any] | None) -> None:
        """Copy what changes and begin to write it: the checkpoint of an epoch, a state, or both.

        Waits for the save before, and for this one with --no-background-saves. Raises IOFailure of either."""
        self.wait()
        snapshot, weights, sha = self.state.snapshot(self._copy, progress is not None), None, ""
        if snapshot is None:
            return
        if epoch is not None:
            weights = snapshot.flats[""] if self._is_shared else self._weights()
            # As the device has them, apart from the copy: what is written is judged by that.
            sha = self._weights_sha256()
        self._note_problem()
        job = partial(self._write, snapshot, weights, sha, epoch, progress)
        self._thread = threading.Thread(target=self._keep_error, args=(job,), name="saving", daemon=True)
        self._thread.start()
        if not self.inputs.settings.background_saves:
            self.wait()

    def _weights(self) -> np.ndarray:
        """Copy the weights that compute, with adapters in them, in the layout of the model."""
        model = self.model
        if not model.adapters:
            return self._copy(CHECKPOINT, model.w)
        if self._merged is None:
            self._merged = np.zeros(model.layout.size, model.dtype)
        for slot, x in model.adapters.tensors():
            self._merged[slot.offset : slot.offset + slot.size] = model.be.to_host(x).reshape(-1)
        return self._merged

    def _weights_sha256(self) -> str:
        model = self.model
        if not model.adapters:
            return device_sha256(model.be, model.layout, model.w)
        if model.layout.size * np.dtype(model.dtype).itemsize > READ_AGAIN:
            return ""
        return sha256(model.be.to_host(x) for _, x in model.adapters.tensors())

    def _described(self, val_loss: float) -> dict[str, Any]:
        """Describe a checkpoint, but for its tokenizer: its architecture and the conditions of its validation loss."""
        i = self.inputs
        evaluation = {"val_loss": val_loss, **evaluated_on(i)}
        return {**config_to_metadata(self.model.cfg), "evaluation": evaluation, **(i.carried or {})}

    @cached_property
    def _tokenizer(self) -> dict[str, Dumped]:
        tokenizer = self.inputs.tokenizer
        return dumped_tokenizer(self._described(0.0), tokenizer.json, tokenizer.eos_id)

    def reserve(self) -> None:
        """Make what takes time before the first step: the tokenizer's metadata, and the memory of the copies."""
        _ = self._tokenizer
        if self.state.shard is not None:
            return
        others = {} if self._is_shared or self.model.adapters else {CHECKPOINT: self.model.w}
        self._copy.reserve(self.state.buffers() | others)
        self._note_problem()

    def _note_problem(self) -> None:
        problem, self._copy.problem = self._copy.problem, ""
        if problem:
            self.emit(Noted(problem))

    def poll(self) -> None:
        """Emit the events of a save that is whole by now. Raises the error of one that failed."""
        if self._thread is None or self._thread.is_alive():
            return
        self._thread = None
        self._copy.release()
        error, self._error = self._error, None
        done, self._done = self._done, []
        for event in done:
            self.emit(event)
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait for the save that is under way, and `poll`."""
        self.settle()
        self.poll()

    def settle(self) -> None:
        """Wait for the save that is under way, and leave its events and its error for later."""
        if self._thread is not None:
            self._thread.join()

    def _keep_error(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as e:  # raised in the training thread
            self._error = e

    def _write(
        self,
        snapshot: Snapshot,
        weights: np.ndarray | None,
        weights_sha: str,
        epoch: Epoch | None,
        progress: dict[str, Any] | None,
    ) -> None:
        """Write a checkpoint, then the state: where a state is whole, the checkpoint before it is."""
        self._copy.finish()
        with ThreadPoolExecutor(thread_name_prefix="hashing") as pool:
            snapshot.begin_hashing(pool, of_optimizer=epoch is not None, of_state=progress is not None)
            if epoch is not None and weights is not None:
                path = self._write_checkpoint(snapshot, weights, weights_sha, epoch, pool)
                self._done.append(Saved(path, epoch.facts))
                self._prune(epoch)
            if progress is not None:
                s, size = self.inputs.settings, sum(flat.nbytes for flat in snapshot.flats.values())
                self.run.save_state(snapshot, progress, s.keep_states, spacing(s, size))

    def _write_checkpoint(
        self, snapshot: Snapshot, weights: np.ndarray, weights_sha: str, epoch: Epoch, pool: Executor
    ) -> Path:
        i, model, facts = self.inputs, self.model, epoch.facts
        tensors = model.layout.named(weights)
        sha = pool.submit(lambda: weights_sha or sha256(tensors.values()))
        meta = {**self._described(facts["val_loss"]), **self._tokenizer}
        late = {"optimizer_state_sha": snapshot.optimizer_sha256, "weights_sha": sha.result}
        path = self.run.save_epoch(epoch.number, meta, tensors, model.dtype, facts, late)
        if isinstance(snapshot.layout, AdapterLayout):
            write_adapter(
                self.run.adapter_of(path),
                snapshot.layout,
                snapshot.flats[""],
                str(i.settings.init),
                i.chat_template,
            )
        return path

    def _prune(self, epoch: Epoch) -> None:
        """Remove the checkpoints that --keep-checkpoints does not keep, and say so the first time."""
        keep = self.inputs.settings.keep_checkpoints
        removed = self.run.prune(epoch.number, epoch.facts["step"], epoch.val_losses, keep)
        if removed and not self._has_told:
            self._has_told = True
            kept = f"the latest {keep} and the best" if keep > 1 else "the latest and the best"
            text = f"removed {', '.join(removed)}: --keep-checkpoints {keep} keeps {kept}; the result lists the others"
            self._done.append(Noted(text))
