"""Send metrics of a run to TensorBoard, Weights & Biases, trackio and MLflow, as callbacks: `--log tensorboard,mlflow`.

All get the numbers of metrics.jsonl, by step, each under its group: train/train_loss, val/val_loss, speed/tokens_per_sec.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..common.atomic import write_json
from ..common.errors import Refused, UsageError
from ..common.files import read_json
from ..common.packages import pip_install
from .callbacks import Callback

SPEED = {"tokens_per_sec", "wall_ms"}
# Parts of a result that a logger keeps of the end of a run; characters of a parameter that MLflow keeps.
ENDS, MAX_PARAMETER = ("status", "verdict", "val_loss"), 500


def names(text: str | None) -> list[str]:
    """List the loggers that --log asks for. Raises UsageError for one that does not exist."""
    asked = [part.strip() for part in text.split(",")] if text else []
    for name in asked:
        if name not in LOGGERS:
            raise UsageError(f"--log {text}: {name!r} is none of {', '.join(LOGGERS)}")
    return list(dict.fromkeys(asked))


def check(text: str | None) -> None:
    """Raise Refused, saying what to install, when a package that --log needs is missing; before a run starts."""
    for name in names(text):
        package = LOGGERS[name][0]
        if importlib.util.find_spec(package) is None:
            raise Refused(
                f"--log {name} needs the package {package}, which is not installed: {pip_install(package)}"
            )


def open_all(text: str | None, run: Path) -> list[Callback]:
    """Start the loggers that --log asks for, of the run in a folder. Raises Refused: one cannot start (no login, say)."""
    out = []
    for name in names(text):
        try:
            out.append(LOGGERS[name][1](run))
        except Exception as e:
            raise Refused(
                f"--log {name} cannot start: {type(e).__name__}: {e}; leave it out to train without"
            ) from e
    return out


def kept_id(path: Path, make: Callable[[], str]) -> str:
    """Read the id of a run elsewhere from a file of its folder; the first time, make and write it."""
    if not path.exists():
        write_json(path, {"id": make()})
    return str(read_json(path)["id"])


def settings_of(run: Path) -> dict[str, Any]:
    """Pick what a logger is told of a run from its config.json."""
    config = read_json(run / "config.json")
    return {key: config.get(key) for key in ("settings", "model", "num_parameters", "versions", "git_commit")}


def scalars(line: dict[str, Any], group: str) -> Iterator[tuple[str, float]]:
    """Yield (name, value) of the numbers in a line of metrics, but its step."""
    for key, value in line.items():
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
            # The time of an evaluation is none of the step at which it was.
            yield f"{'speed' if key in SPEED and group == 'train' else group}/{key}", float(value)


class TensorBoard(Callback):
    """Event files in RUN/tensorboard, which `tensorboard --logdir runs` shows; a resumed run adds to them."""

    def __init__(self, run: Path) -> None:
        self._writer = importlib.import_module("tensorboardX").SummaryWriter(logdir=str(run / "tensorboard"))

    def on_step(self, line: dict[str, Any]) -> None:
        """See Callback."""
        self._write(line, "train")

    def on_evaluation(self, line: dict[str, Any]) -> None:
        """See Callback."""
        self._write(line, "val")
        self._writer.flush()

    def on_checkpoint(self, path: Path, facts: dict[str, Any]) -> None:
        """See Callback."""
        self._writer.add_text("checkpoint", str(path), facts["step"])
        self._writer.flush()

    def on_end(self, result: dict[str, Any]) -> None:
        """See Callback."""
        self._writer.add_text("result", f"{result['status']}, verdict {result['verdict']}", result["steps"])
        self._writer.flush()
        self._writer.close()

    def _write(self, line: dict[str, Any], group: str) -> None:
        for name, value in scalars(line, group):
            self._writer.add_scalar(name, value, line["step"])


class Wandb(Callback):
    """A Weights & Biases run named like the run's folder, with its settings as configuration.

    $WANDB_PROJECT and $WANDB_MODE=offline work as everywhere. RUN/wandb.json keeps the id, so that a resumed run goes on
    with its run there. What wandb itself writes stays out of the run's folder, whose files are hashed at the end."""

    def __init__(self, run: Path) -> None:
        self._run = self._begin(run)

    def _begin(self, run: Path) -> Any:
        wandb = importlib.import_module("wandb")
        identity = kept_id(run / "wandb.json", lambda: secrets.token_hex(8))
        return wandb.init(name=run.name, id=identity, resume="allow", config=settings_of(run))

    def on_step(self, line: dict[str, Any]) -> None:
        """See Callback."""
        self._run.log(dict(scalars(line, "train")), step=line["step"])

    def on_evaluation(self, line: dict[str, Any]) -> None:
        """See Callback."""
        self._run.log(dict(scalars(line, "val")), step=line["step"])

    def on_end(self, result: dict[str, Any]) -> None:
        """See Callback."""
        self._run.summary.update({k: result[k] for k in ENDS if k in result})
        self._run.finish()


class Trackio(Wandb):
    """A trackio run named like the run's folder, in the project $TRACKIO_PROJECT or "apr"; trackio knows a run by its name."""

    def _begin(self, run: Path) -> Any:
        trackio = importlib.import_module("trackio")
        project = os.environ.get("TRACKIO_PROJECT", "apr")
        return trackio.init(project=project, name=run.name, resume="allow", config=settings_of(run))

    def on_end(self, result: dict[str, Any]) -> None:
        """See Callback."""
        importlib.import_module("trackio").finish()


class MLflow(Callback):
    """An MLflow run named like the run's folder; $MLFLOW_TRACKING_URI and $MLFLOW_EXPERIMENT_NAME work as everywhere.

    RUN/mlflow.json keeps the id, so that a resumed run goes on with its run there."""

    def __init__(self, run: Path) -> None:
        self._mlflow, path = importlib.import_module("mlflow"), run / "mlflow.json"
        if path.exists():
            self._mlflow.start_run(run_id=kept_id(path, str))
            return
        begun = self._mlflow.start_run(run_name=run.name)
        kept_id(path, lambda: begun.info.run_id)
        settings = settings_of(run)["settings"] or {}
        self._mlflow.log_params({k: str(v)[:MAX_PARAMETER] for k, v in settings.items() if v is not None})

    def on_step(self, line: dict[str, Any]) -> None:
        """See Callback."""
        self._mlflow.log_metrics(dict(scalars(line, "train")), step=line["step"])

    def on_evaluation(self, line: dict[str, Any]) -> None:
        """See Callback."""
        self._mlflow.log_metrics(dict(scalars(line, "val")), step=line["step"])

    def on_end(self, result: dict[str, Any]) -> None:
        """See Callback."""
        self._mlflow.set_tags({k: str(result[k]) for k in ENDS if k in result})
        self._mlflow.end_run("FINISHED" if "error" not in result else "FAILED")


# Name of a logger: the package that it imports, and what hears of the run in a folder.
LOGGERS: dict[str, tuple[str, Callable[[Path], Callback]]] = {
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", Wandb),
    "trackio": ("trackio", Trackio),
    "mlflow": ("mlflow", MLflow),
}
