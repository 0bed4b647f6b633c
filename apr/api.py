"""The Python interface: `apr.load` gives a model to ask for logits, losses and text; `apr.train` runs a training job.

model = apr.load("path/to/model", device="cpu")
model.loss(model.tokenizer.encode("Once upon a time"))             # nats/token
model.generate("Once upon a time", max_tokens=50, temperature=0)   # text that follows
for piece in model.generate("Once", stream=True):
    print(piece, end="")
model.chat([{"role": "user", "content": "Hello"}])

apr.train({"corpus": "notes.txt", "model": "llama-demo", "run_dir": "runs/mine", "num_steps": 200})
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from .backends.select import select
from .checkpoints.registry import open_any
from .common.errors import UsageError
from .common.printable import printable
from .inference.language_model import LanguageModel
from .training import run
from .training.callbacks import Callback, check_callbacks
from .training.display import Display, Rows
from .training.rundir import RunDir
from .training.settings import Settings, check, read_config


def load(
    path: str | os.PathLike[str],
    device: str | None = "auto",
    dtype: str | None = None,
    threads: int | None = None,
) -> LanguageModel:
    """Load a checkpoint on a device: an .apr or GGUF file or a Hugging Face folder.

    device: "auto", "cpu", "cuda" or "cuda:N". dtype: "float32" or "bfloat16" (default: the backend's first, bfloat16 on
    a GPU), or "int8": matrices rounded to 8 bits, for faster generation. threads: CPU
    threads. Raises InputNotFound, MalformedFile, Refused, DeviceError."""
    if threads is not None and (not isinstance(threads, Integral) or isinstance(threads, bool)):
        raise UsageError(f"threads is a whole number, not {threads!r}")
    # An object of another library, which spells its device as apr does.
    backend = select("auto" if device is None else str(device), None if dtype == "int8" else dtype, threads)
    return LanguageModel(open_any(_path(path)), backend, dtype or backend.dtypes[0])


class Printed(Display):
    """Print a run as plain lines."""

    def note(self, text: str) -> None:
        """Print a line of text."""
        print(printable(text), flush=True)

    def verdict(self, gates: Any) -> None:
        """Print every gate with its figure."""
        for f in gates.in_order():
            self.note(f"  {f.verdict:<8} {f.name:<20} {f.measured if f.passed else f.why or f.measured}")

    def table(self, title: str, rows: Rows) -> None:
        """Print names and texts."""
        self.note("\n".join([title, *(f"  {name:<18} {text}" for name, text in rows)]))


@dataclass(frozen=True)
class RunResult:
    """Result of a run that came to its end. val_loss in nats/token; checkpoint: the latest .apr; details: all of `--json`."""

    status: str
    verdict: str
    steps: int
    val_loss: float
    best_val_loss: float
    run_dir: Path
    checkpoint: Path
    details: dict[str, Any] = field(repr=False)


def train(
    config: Mapping[str, Any] | Settings | str | os.PathLike[str],
    callbacks: Sequence[Callback] = (),
    show: bool = False,
) -> RunResult:
    """Run `apr pretrain`: settings as a mapping, a Settings, or the path of a JSON file with them.

    callbacks hear of every step, evaluation and checkpoint. show: print what the command prints. Raises the
    errors of the command: UsageError and Refused before it starts, Aborted when a gate stops it, Interrupted after Ctrl-C (state
    saved), CallbackFailed after an exception in a callback (state saved; the exception is its cause)."""
    callbacks = check_callbacks(callbacks)
    if isinstance(config, Settings):
        config = {f.name: x for f in fields(Settings) if (x := getattr(config, f.name)) != f.default}
    if isinstance(config, Mapping):
        plain = {str(k).replace("-", "_"): _plain(v) for k, v in config.items()}
        explicit = check(plain, "apr.train")
    else:
        explicit = read_config(Path(_path(config)))
    if explicit.get("run_dir"):
        # The working folder may be another one before the run ends.
        explicit["run_dir"] = os.path.abspath(explicit["run_dir"])
    # The working folder may be another one when the path is used.
    here = Path.cwd()
    result = run.train(Settings(**explicit), Printed() if show else Display(), callbacks, explicit)
    folder = here / result["run_dir"]
    return RunResult(
        result["status"],
        result["verdict"],
        result["steps"],
        result["val_loss"],
        result["best_val_loss"],
        folder,
        RunDir(folder).checkpoints()[-1],
        result,
    )


def _path(path: str | os.PathLike[str]) -> str:
    """Expand ~ at the beginning of a path, which no shell has seen."""
    return os.path.expanduser(os.fsdecode(path))


def _plain(value: Any) -> Any:
    """Turn paths and NumPy's scalars into what a settings file holds."""
    if isinstance(value, np.generic):
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value
