"""Score the model in training on tasks, at evaluations: an observer."""

from __future__ import annotations

import time
from typing import Any

from ..common.events import Evaluated
from ..evaluation.tasks import held, in_words, parse_tasks, score
from ..model.transformer import Model
from .display import Display
from .inputs import Inputs
from .metrics import MetricsLog
from .settings import is_due

# Tokens that questions are read in at once, where the model has the positions.
SEQ_LENGTH = 1024


def check_tasks(text: str | None) -> None:
    """Look into the files of --eval-tasks before a run has a folder. Raises as parse_tasks does."""
    if text:
        parse_tasks(text, "--eval-tasks")


class TaskScores:
    """Scores --eval-tasks at evaluations whose step is due, and writes a line of the log each time."""

    def __init__(self, inputs: Inputs, model: Model, log: MetricsLog, show: Display) -> None:
        s = inputs.settings
        self.inputs, self.model, self.log, self.show, self.every = (
            inputs,
            model,
            log,
            show,
            s.eval_tasks_every,
        )
        self.tasks = parse_tasks(s.eval_tasks, "--eval-tasks") if s.eval_tasks else []

    def evaluated(self, e: Evaluated) -> None:
        """Score, where that is due; weights, gradients and the stream of data are left as they are."""
        step = e.line["step"]
        if not self.tasks or not is_due(step, self.every):
            return
        i, start = self.inputs, time.perf_counter()
        opened = held(i.cfg, i.backend, self.model.dtype, i.tokenizer, self.model.adapters or self.model.w)
        seq = min(SEQ_LENGTH, i.cfg.max_position_embeddings)
        figures: dict[str, Any] = score(opened, self.tasks, seq, limit=i.settings.eval_tasks_limit)
        self.log.write(step=step, tasks=figures, wall_ms=1e3 * (time.perf_counter() - start))
        self.show.note(f"step {step:>5}  tasks: {'; '.join(in_words(*x) for x in figures.items())}")
