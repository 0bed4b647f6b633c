"""Show a run on a terminal: a header, a progress bar, a line per evaluation, the end."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..bisect.report import Report
from ..common.events import Started, Stepped
from ..common.finding import PASS, Finding
from ..evidence.gates import Gates
from ..training.display import Display, Rows
from .bisect_tables import print_report
from .tables import cell, print_findings


class Output(Console):
    """The console of a command: in a file or a pipe, lines do not end in spaces and tables have room."""

    def __init__(self, quiet: bool = False, soft_wrap: bool = False) -> None:
        super().__init__(quiet=quiet, highlight=False, soft_wrap=soft_wrap)
        if not self.is_terminal:
            self.width = 120

    def print(self, *objects: Any, **how: Any) -> None:
        """Print as rich does; tables fill their columns with spaces, which only a terminal needs."""
        if self.is_terminal or self.quiet:
            super().print(*objects, **how)
            return
        with self.capture() as captured:
            super().print(*objects, **how)
        lines = [line.rstrip(" ") for line in captured.get().split("\n")]
        super().print(cell("\n".join(lines), lines=True), end="", soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """Go on in silence when the reader of the output is gone (`| head`): training must not end with it."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Show(Display):
    """Shows progress as a bar on a terminal, elsewhere (a pipe, a log file) as a line every tenth of the run."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Output(quiet, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None

    def note(self, text: str) -> None:
        """Print a line of text."""
        self.console.print(cell(text, lines=True))

    def preparing(self, stage: str, done: int, total: int) -> None:
        """Show progress of the corpus: the stage, documents done and in all."""
        if self._bar is None:
            self._open("{task.description}")
        assert self._bar is not None
        if self._task is None or self._bar.tasks[-1].description != stage:
            self._task = self._bar.add_task(stage, total=total or None)
            if not self.console.is_terminal:
                self.note(f"{stage} ...")
        self._bar.update(self._task, completed=done)

    def started(self, e: Started) -> None:
        """Begin the bar of the training steps."""
        self.stop()
        super().started(e)
        self._open(
            "step", "loss {task.fields[loss]}", "lr {task.fields[lr]}", "{task.fields[speed]} tokens/s"
        )
        assert self._bar is not None
        self._task = self._bar.add_task(
            "train", total=e.num_steps, completed=e.step, loss="-", lr="-", speed="-"
        )

    def _open(self, *columns: str) -> None:
        texts = [TextColumn(c, markup=False) for c in columns]
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bar = Progress(
            texts[0], BarColumn(), MofNCompleteColumn(), *texts[1:], *times,
            console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        self._bar.start()

    def stepped(self, e: Stepped) -> None:
        """Advance the bar; elsewhere print a line every tenth of the run."""
        line = e.line
        if self._bar is not None:
            loss, lr, speed = line["train_loss"], line["lr"], line["tokens_per_sec"]
            texts: dict[str, Any] = {"loss": f"{loss:.3f}", "lr": f"{lr:.2e}", "speed": f"{speed:,.0f}"}
            self._bar.update(self._task, completed=line["step"], **texts)
        if not self.console.is_terminal:
            super().stepped(e)

    def difference(self, report: Report) -> None:
        """Print the arrays that differ from the reference."""
        print_report(report, self.console)

    def verdict(self, gates: Gates) -> None:
        """Print the finding of every gate, those that are wrong last."""
        self.note("gates")
        findings = sorted(gates.in_order(), key=lambda f: f.passed is False)
        print_findings(self.console, [_remarked(f, gates.changed(f.name)) for f in findings])

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._task = None, None

    def table(self, title: str, rows: Rows) -> None:
        """Print rows of names and values."""
        table = Table(title=cell(title), title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, value in rows:
            table.add_row(cell(name), cell(value, lines=True))
        self.console.print(table)


def _remarked(f: Finding, changed: str) -> Finding:
    """Add the remark on changed bounds to a finding; a PASS keeps no other remark."""
    if f.verdict == PASS:
        return replace(f, why=changed)
    return replace(f, why=(f.why or f.measured) + (f" ({changed})" if changed else ""))
