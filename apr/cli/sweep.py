"""`apr sweep GRID`: train every run of a grid of settings, one after another or one on each device, and compare them.

GRID is a TOML, YAML or JSON file: the settings of all runs, by the names of `apr pretrain`, and a table "grid" with a list of
values for each setting that differs; every combination is a run. The same command again goes on where it was stopped.

Example: apr sweep grid.toml --devices cuda:0,cuda:1"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ..common.atomic import check_output, write_json
from ..common.errors import AprError, InputNotFound, Interrupted, MalformedFile, Refused, UsageError
from ..common.files import make_folder, read_json, read_text
from ..common.finding import PASS
from ..common.host import importing_this
from ..common.options import json_option, option, parse
from ..common.tables import read_table
from ..evidence.verdict import read_verdict
from ..training.run import ENDED
from ..training.rundir import RunDir
from ..training.settings import check, check_length, flat
from .show import Output
from .tables import cell, plain_table

GRID = "grid"
# Settings that the sweep itself gives.
OURS = ("run_dir", "resume", "config", "json")
MAX_RUNS = 1000


@dataclass(frozen=True)
class Flags:
    """Options of `apr sweep`."""

    grid: str = option("file of settings and of values to combine", positional=True, path=True)
    output: str | None = option(
        "folder of the runs (default: runs/NAME of the file)", short="o", metavar="FOLDER", path=True
    )
    devices: str | None = option(
        "devices that train a run each at the same time, such as cuda:0,cuda:1 (default: the device of the settings)",
        metavar="DEVICES",
    )
    json: bool = json_option()


@dataclass(frozen=True)
class Run:
    """One combination: its name, what differs, all its settings."""

    name: str
    values: dict[str, Any]
    settings: dict[str, Any]


def main(args: Sequence[str]) -> int:
    """Train what is still to be trained, and print the table; returns the exit code. Errors are raised."""
    f = parse(Flags, args, "apr sweep", __doc__ or "")
    runs, folder = read_grid(Path(f.grid)), Path(f.output or Path("runs") / Path(f.grid).stem)
    make_folder(folder / "settings")
    make_folder(folder / "logs")
    commands = [(run, command) for run in runs if (command := _command(folder, run))]
    show = Output(f.json, soft_wrap=True)
    devices = [d.strip() for d in f.devices.split(",") if d.strip()] if f.devices else [""]
    for run in runs:
        if all(run is not r for r, _ in commands):
            show.print(cell(f"{run.name}: has ended before, kept"))
    _train(commands, devices, folder, show)
    rows = sorted((_row(folder, run) for run in runs), key=_place)
    write_json(folder / "sweep.json", {"grid": str(f.grid), "runs": rows})
    if f.json:
        print(json.dumps({"folder": str(folder), "runs": rows}, indent=2))
    else:
        _print(show, rows, [*runs[0].values])
        show.print(cell(f"table  {folder / 'sweep.json'}"))
    return 0 if all(row["verdict"] == PASS for row in rows) else 9


def read_grid(path: Path) -> list[Run]:
    """Read the runs of a grid, in the order of its values. Raises InputNotFound, MalformedFile, UsageError."""
    if not path.is_file():
        raise InputNotFound(f"{path}: no such file; see `apr sweep --help`")
    table = read_table(path)
    grid = table.pop(GRID, None)
    if not isinstance(grid, dict) or not grid or not all(isinstance(v, list) and v for v in grid.values()):
        raise UsageError(
            f"{path}: no table {GRID!r} with a list of values for each setting, such as [grid] lr = [1e-3, 3e-3]"
        )
    common = flat(table, str(path))
    count = 1
    for values in grid.values():
        count *= len(values)
    if count > MAX_RUNS:
        raise UsageError(f"{path}: {count:,} combinations, more than {MAX_RUNS:,}")
    runs: list[Run] = []
    for values in itertools.product(*grid.values()):
        differing = check(flat(dict(zip(grid, values, strict=True)), str(path)), str(path))
        settings = {**check(common, str(path)), **differing}
        if taken := [key for key in OURS if key in settings]:
            raise UsageError(f"{path}: {taken[0]} is given by the sweep; leave it out")
        check_length(settings)
        runs.append(Run(_name(differing), differing, settings))
    names = [run.name for run in runs]
    if twice := next((n for n in names if names.count(n) > 1), ""):
        raise UsageError(f"{path}: two runs are called {twice!r}; give each value once")
    return runs


def _name(values: dict[str, Any]) -> str:
    text = ",".join(f"{k}={Path(v).name if isinstance(v, str) else v}" for k, v in values.items())
    return re.sub(r"[^\w.,=+-]", "_", text)[:200]


def _command(folder: Path, run: Run) -> list[str]:
    """Write the arguments of `apr pretrain` for what a run lacks; [] where it has ended. Raises Refused: other settings."""
    place, kept = folder / run.name, folder / "settings" / f"{run.name}.json"
    if (place / "config.json").exists():
        if not kept.is_file() or read_json(kept) != run.settings:
            raise Refused(
                f"{place}: a run with other settings; give another folder with --output, or remove it"
            )
        found = read_verdict(place)
        if found is not None and found.get("status") in ENDED:
            return []
        return ["--resume", "--run-dir", str(place)]
    write_json(kept, run.settings)
    return ["--config", str(kept), "--run-dir", str(place)]


def _train(commands: list[tuple[Run, list[str]]], devices: list[str], folder: Path, show: Output) -> None:
    """Run the commands, one on each device at a time. Raises Interrupted, with all of them stopped."""
    free: SimpleQueue[str] = SimpleQueue()
    for device in devices:
        free.put(device)
    running: list[subprocess.Popen[bytes]] = []
    is_over = False

    def one(run: Run, command: list[str]) -> None:
        device = free.get()
        try:
            if not is_over:
                show.print(
                    cell(f"{run.name}: {'goes on' if '--resume' in command else 'begins'} {device}".rstrip())
                )
                code = launch(
                    command + (["--device", device] if device else []),
                    folder / "logs" / f"{run.name}.txt",
                    running,
                )
                show.print(cell(f"{run.name}: ended with exit code {code}"))
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        try:
            for done in [pool.submit(one, run, command) for run, command in commands]:
                done.result()
        except KeyboardInterrupt:
            is_over = True
            for process in running:
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGINT)
            raise Interrupted("stopped; each run has saved its state. The same command goes on") from None


def launch(args: list[str], log: Path, running: list[subprocess.Popen[bytes]]) -> int:
    """Run `apr pretrain` in a process of its own, and wait; returns its exit code. log: file that gets what it prints."""
    with check_output(log).open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "apr.cli.main", "pretrain", *args],
            stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env=importing_this(os.environ),
        )  # fmt: skip
        running.append(process)
        return process.wait()


def _row(folder: Path, run: Run) -> dict[str, Any]:
    """Sum up a run: what differs, how it ended, its losses; of one without a verdict, what it said last."""
    place, row = folder / run.name, dict(name=run.name, **run.values)
    empty = dict(
        status="NONE", verdict="NONE", steps=0, val_loss=None, best_val_loss=None, run_dir=str(place), said=""
    )
    try:
        found = read_verdict(place)
        losses = [x["val_loss"] for x in RunDir(place).log.lines() if "val_loss" in x]
    except AprError:
        found, losses = None, []
    if found is None:
        return {**row, **empty, "said": next(_last_words(folder / "logs" / f"{run.name}.txt"), "")}
    kept = {key: found.get(key) for key in ("status", "verdict", "steps", "val_loss")}
    return {
        **row,
        **empty,
        **kept,
        "best_val_loss": min(losses, default=None),
        "said": str(found.get("error") or ""),
    }


def _place(row: dict[str, Any]) -> tuple[bool, bool, float]:
    """Order runs: those that passed by their loss, then the others, whose losses are not to be believed."""
    loss = row["val_loss"]
    is_number = isinstance(loss, int | float) and math.isfinite(loss)
    return row["verdict"] != PASS, not is_number, loss if is_number else 0.0


def _last_words(log: Path) -> Iterator[str]:
    with suppress(InputNotFound, MalformedFile):
        yield from (
            line for line in reversed(read_text(log).splitlines()) if line.startswith("apr pretrain: ")
        )


def _print(show: Output, rows: list[dict[str, Any]], keys: list[str]) -> None:
    table = plain_table(
        *(f"{key}_" for key in keys), "verdict_", "status_", "steps|", "val loss|", "best|", ""
    )
    for row in rows:
        losses = ["" if row[k] is None else f"{row[k]:.4f}" for k in ("val_loss", "best_val_loss")]
        cells = [
            *(row[key] for key in keys),
            row["verdict"],
            row["status"],
            row["steps"],
            *losses,
            row["said"],
        ]
        table.add_row(*map(cell, cells))
    show.print(table)
