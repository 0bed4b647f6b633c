"""Send metrics of a run to TensorBoard and Weights & Biases, as callbacks: `--log tensorboard,wandb`.

Both get the numbers of metrics.jsonl, by step, each under its group: train/train_loss, val/val_loss, speed/tokens_per_sec.
"""

from __future__ import annotations

import importlib
import importlib.util
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..common.atomic import write_json
from ..common.errors import Refused, UsageError
from ..common.files import read_json
from ..common.packages import pip_install
from .callbacks import Callback

# {name of a logger: module that it imports}
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
SPEED = {"tokens_per_sec", "wall_ms"}


def names(text: str | None) -> list[str]:
    """List the loggers that --log asks for. Raises UsageError for one that does not exist."""
    asked = [part.strip() for part in text.split(",")] if text else []
    for name in asked:
        if name not in PACKAGES:
            raise UsageError(f"--log {text}: {name!r} is none of {', '.join(PACKAGES)}")
    return list(dict.fromkeys(asked))


def check(text: str | None) -> None:
    """Raise Refused, saying what to install, when a package that --log needs is missing; before a run starts."""
    for name in names(text):
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise Refused(
                f"--log {name} needs the package {PACKAGES[name]}, which is not installed: "
                f"{pip_install(PACKAGES[name])}"
            )


def open_all(text: str | None, run: Path) -> list[Callback]:
    """Start the loggers that --log asks for, of the run in a folder. Raises Refused: one cannot start (no login, say)."""
    made: dict[str, Callable[[Path], Callback]] = {"tensorboard": TensorBoard, "wandb": Wandb}
    out = []
    for name in names(text):
        try:
            out.append(made[name](run))
        except Exception as e:
            raise Refused(
                f"--log {name} cannot start: {type(e).__name__}: {e}; leave it out to train without"
            ) from e
    return out


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
        wandb = importlib.import_module("wandb")
        config = read_json(run / "config.json")
        path = run / "wandb.json"
        if not path.exists():
            write_json(path, {"id": secrets.token_hex(8)})
        kept = {
            key: config.get(key) for key in ("settings", "model", "num_parameters", "versions", "git_commit")
        }
        self._run = wandb.init(name=run.name, id=read_json(path)["id"], resume="allow", config=kept)

    def on_step(self, line: dict[str, Any]) -> None:
        """See Callback."""
        self._run.log(dict(scalars(line, "train")), step=line["step"])

    def on_evaluation(self, line: dict[str, Any]) -> None:
        """See Callback."""
        self._run.log(dict(scalars(line, "val")), step=line["step"])

    def on_end(self, result: dict[str, Any]) -> None:
        """See Callback."""
        self._run.summary.update({k: result[k] for k in ("status", "verdict", "val_loss") if k in result})
        self._run.finish()
