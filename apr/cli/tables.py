"""Text of unknown origin on a terminal: lines, findings and any other rows. Only cell() makes what rich prints: names and
texts out of files are neither markup nor escape sequences."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..common.finding import FAIL, PASS, SKIPPED, SUSPECT, Finding
from ..common.printable import LINES, printable

STYLES = {PASS: "", SKIPPED: "dim", SUSPECT: "bold yellow", FAIL: "bold red"}


def cell(text: object, style: str = "", lines: bool = False) -> Text:
    """Make a text that rich prints as it stands. lines: ends of lines and tabs in it are meant."""
    return Text(printable(str(text), LINES if lines else ""), style)


def spoken(text: str) -> str:
    """Let a text of a model into a file or a pipe as it is; spell it out for a terminal."""
    return printable(text) if sys.stdout.isatty() else text


def plain_table(*columns: str, title: str | None = None) -> Table:
    """Build a table without lines. Columns that end in "|" are numbers, those that end in "_" stay in one line."""
    table = Table(
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        header_style="underline",
        title=title and cell(title),
        title_justify="left",
    )
    for name in columns:
        right, one_line = name.endswith("|"), name.endswith(("|", "_"))
        table.add_column(
            name.rstrip("|_"),
            justify="right" if right else "left",
            no_wrap=one_line,
            overflow="fold",
        )
    return table


def print_findings(
    console: Console, findings: Iterable[Finding], title: str | None = None, bounds: bool = False
) -> None:
    """Print one row per finding: verdict, name and figure; under FAIL and SUSPECT also the bound and the remedy.

    bounds: print the bounds of all findings, in a column of their own, and no remedies."""
    table = Table(
        box=None, padding=(0, 1), show_header=bounds, title=title and cell(title), title_justify="left"
    )
    for header in ("", "", "measured", *(["must be"] if bounds else [])):
        table.add_column(header, header_style="", overflow="fold")
    for f in findings:
        wrong = f.verdict in (FAIL, SUSPECT)
        lines = [f.why or f.measured]
        if f.measured and (f.verdict == PASS or bounds):
            lines = [f.measured + (f" ({f.why})" if f.why else "")]
        if wrong and f.bound and not bounds:
            lines.append(f"must be: {f.bound}")
        if wrong and f.remedy and not bounds:
            lines.append(f"look at: {f.remedy}")
        cells = ["\n".join(lines)] + ([f.bound] if bounds else [])
        texts = [cell(text, lines=True) for text in cells]
        table.add_row(cell(f"  {f.verdict}"), cell(f.name), *texts, style=STYLES[f.verdict])
    console.print(table)
