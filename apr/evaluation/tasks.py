"""Score a model on tasks by name: files of multiple choice, HumanEval, tasks of lm-evaluation-harness where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from ..common.errors import InputNotFound, UsageError
from ..common.packages import pip_install
from ..model.config import ModelConfig
from ..tokenizer.tokenizer import Tokenizer
from . import choices, humaneval
from .again import check_choices
from .sandbox import Limits
from .score import Opened, Scorer, fitting, prefix_ids

CHOICES, HUMANEVAL, HARNESS = "choices", "humaneval", "harness"
# Endings of files of questions.
FILES = (".jsonl", ".json", ".gz", ".zst")
# What a person looks at of multiple choice: the rule that lm-evaluation-harness names acc.
SHOWN_RULE = "sum"
MAX_NEW_TOKENS, TIMEOUT_SECONDS = 512, 5.0


@dataclass(frozen=True)
class Task:
    """A task: name for the log, kind, and its file, or the harness's own name."""

    name: str
    kind: str
    source: str


def held(cfg: ModelConfig, backend: ModuleType, dtype: str, tokenizer: Tokenizer, weights: Any) -> Opened:
    """Give weights that are on a backend the face of an opened checkpoint. A text ends as those it was trained on."""
    ends = frozenset(() if tokenizer.eos_id is None else (tokenizer.eos_id,))
    source: Any = SimpleNamespace(
        cfg=cfg, source="the model in training", end_ids=lambda: ends, template=lambda: None
    )
    return Opened(source, backend, dtype, tokenizer, weights)


def parse_tasks(text: str, flag: str) -> list[Task]:
    """Read "arc.jsonl,HumanEval.jsonl.gz,hellaswag" and look into the files.

    Raises InputNotFound, MalformedFile; UsageError: tasks of lm-evaluation-harness, which is not installed."""
    found: list[Task] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        path = Path(part)
        if path.is_file():
            first = humaneval.read_jsonl(part, choices.FORMATS)[:1]
            is_code = bool(first) and "entry_point" in first[0][1]
            (humaneval.read_problems if is_code else choices.read_items)(part)
            name = path.name.split(".")[0]
            found.append(Task(name, HUMANEVAL if is_code else CHOICES, part))
        elif part.endswith(FILES) or "/" in part:
            raise InputNotFound(f"{flag} {part}: no such file")
        elif importlib.util.find_spec("lm_eval") is None:
            raise UsageError(
                f"{flag} {part}: no such file, and tasks by name need lm-evaluation-harness: {pip_install('lm_eval')}"
            )
        else:
            found.append(Task(part, HARNESS, part))
    if not found:
        raise UsageError(
            f"{flag}: names no task; give files of questions, or names that lm-evaluation-harness knows"
        )
    names = [t.name for t in found]
    if len(set(names)) < len(names):
        raise UsageError(f"{flag} {text}: two tasks have one name; rename one of the files")
    return found


def score(
    opened: Opened,
    tasks: Sequence[Task],
    seq: int,
    batch: int | None = None,
    limit: int | None = None,
    allow_unsafe: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, dict[str, Any]]:
    """Compute the figures of each task: {name: {"value", "stderr", "metric", ...}}. Raises AprError."""
    out: dict[str, dict[str, Any]] = {}
    for task in tasks:
        if task.kind == CHOICES:
            out[task.name] = _choices(opened, task, seq, batch, limit, progress)
        elif task.kind == HUMANEVAL:
            out[task.name] = _humaneval(opened, task, limit, allow_unsafe, progress)
    harness = [t.source for t in tasks if t.kind == HARNESS]
    return out | (_harness(opened, harness, batch, limit) if harness else {})


def _choices(
    opened: Opened,
    task: Task,
    seq: int,
    batch: int | None,
    limit: int | None,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    tokenizer = opened.need_tokenizer()
    items, before = choices.read_items(task.source)[:limit], prefix_ids(tokenizer, "auto")
    windows, _ = choices.windows_of(tokenizer, items, seq, before, next(iter(before), tokenizer.eos_id))
    scorer = Scorer(opened, fitting(windows, seq), batch)
    found = choices.measure(scorer, items, windows, lambda done, total: progress(task.name, done, total))
    check_choices(task.source, limit, found)
    by_rule = {rule: figure["value"] for rule, figure in found["accuracy"].items()}
    shown = found["accuracy"][SHOWN_RULE]
    return {
        "metric": "accuracy",
        **shown,
        "chance": found["chance"],
        "items": found["items"],
        "by_rule": by_rule,
    }


def _humaneval(
    opened: Opened,
    task: Task,
    limit: int | None,
    allow_unsafe: bool,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    settings = humaneval.HumanEvalSettings(
        1, 0.0, 0, 1.0, MAX_NEW_TOKENS, 0, Limits(TIMEOUT_SECONDS), allow_unsafe, task.source
    )
    settings.check()
    problems = humaneval.read_problems(task.source)[:limit]
    completer = humaneval.Completer(opened, settings)
    completer.check_fits(problems)
    found = humaneval.run(completer.complete, problems, settings, progress, opened.held is not None)
    return {"metric": "pass@1", **found["pass_at_k"]["1"], "items": found["problems"]}


def _harness(
    opened: Opened, names: list[str], batch: int | None, limit: int | None
) -> dict[str, dict[str, Any]]:
    """Ask lm-evaluation-harness, by its own metrics: the first of acc, exact_match or any other."""
    import lm_eval

    from .lm_eval import AprLM

    answer = lm_eval.simple_evaluate(model=AprLM(opened, batch_size=batch), tasks=names, limit=limit)
    out = {}
    for name, found in answer["results"].items():
        figures = {k: v for k, v in found.items() if isinstance(v, int | float) and "_stderr" not in k}
        metric = next(
            (k for m in ("acc,", "exact_match,") for k in figures if k.startswith(m)), next(iter(figures))
        )
        error = found.get(metric.replace(",", "_stderr,", 1))
        stderr = float(error) if isinstance(error, int | float) else None
        by_rule = {k.partition(",")[0]: float(v) for k, v in figures.items()}
        out[name] = {
            "metric": metric.partition(",")[0],
            "value": float(figures[metric]),
            "stderr": stderr,
            "by_rule": by_rule,
        }
    return out


def in_words(name: str, figure: dict[str, Any]) -> str:
    """Describe a figure: arc accuracy 0.412 +- 0.014 (chance 0.25)."""
    error = f" +- {figure['stderr']:.3f}" if figure.get("stderr") is not None else ""
    chance = f" (chance {figure['chance']:.2f})" if "chance" in figure else ""
    return f"{name} {figure['metric']} {figure['value']:.3f}{error}{chance}"
