"""Text of a bisection: the report of a side, and the catalogue of planted faults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..bisect.report import EXACT, FORCED, FREE, STAGES, WORDS, ArrayComparison, Report, ratio_text
from ..common.finding import FAIL, PASS, SKIPPED
from ..common.units import plural
from .tables import cell, plain_table

if TYPE_CHECKING:
    from ..bisect.planted.catalogue import Planted

STYLES = {PASS: "green", FAIL: "bold red", SKIPPED: "dim"}


def print_report(report: Report, console: Console, rows: int = 8) -> None:
    """Print a report: its stages, the first fault, up to `rows` further ones, and the notes."""

    def say(x: Any, style: str = "") -> None:
        text = cell(x, style, lines=True) if isinstance(x, str) else x
        console.print(text, soft_wrap=False, highlight=False)

    say(f"{report.model}: {report.sides[1]} compared with {report.sides[0]}", "bold")
    say(f"batch: {report.batch}")
    say("")
    say(_stages(report))
    say("")
    first = report.first
    if first is None:
        say(_agreement(report), "green" if report.agree else "yellow")
    else:
        if first.mode == FREE and any(r.mode == FORCED for r in report.rows):
            say(f"Each op that was judged{_inputs(report)[FORCED][1:]} agrees; errors have piled up.")
        say("First beyond its tolerance" if first.mode == FREE else "First fault", "bold red")
        say(_fault(first, _inputs(report)))
        sure = [r for r in report.guilty[1:] if r.mode != FREE]
        if sure and rows > 0:
            say("\nFurther faults", "bold")
            say(_further(sure[:rows]))
        if len(sure) > max(rows, 0):
            say(f"and {len(sure) - max(rows, 0)} more")
        drift = _drift(report)
        if drift:
            say("\n" + drift)
    for i, note in enumerate(report.notes):
        say(("\n" if i == 0 else "") + f"note: {note}")


def _stages(report: Report) -> Table:
    """Tabulate the stages: verdict, number of arrays by mode, the largest error over tolerance and its place, seconds."""
    table = plain_table(
        "stage_", "verdict_", "forced|", "free|", "exact|", "err/tol|", "where it is largest", "s|"
    )
    for stage in STAGES:
        rows, finding = report.of(stage), report.finding(stage)
        counts = [str(sum(r.mode == m for r in rows) or "-") for m in (FORCED, FREE, EXACT)]
        place = finding.why if finding.verdict == SKIPPED else str(finding.where)
        seconds = f"{report.seconds[stage]:.1f}" if stage in report.seconds else "-"
        verdict = cell(WORDS[finding.verdict], STYLES[finding.verdict])
        cells = [cell(text) for text in (*counts, finding.measured or "-", place, seconds)]
        # The only one that gives way to a narrow terminal; it stands whole below the table where it matters.
        cells[-2].no_wrap, cells[-2].overflow = True, "crop"
        table.add_row(cell(stage), verdict, *cells)
    return table


def _agreement(report: Report) -> str:
    if not report.rows:
        return "Nothing was compared."
    worst = max(report.rows, key=lambda r: r.ratio)
    nearest = (
        f"; the largest error is {ratio_text(worst.ratio)} of its tolerance, {worst.place} ({worst.mode})"
    )
    return f"All {plural(len(report.rows), 'array')} agree{nearest if worst.ratio else ' exactly'}."


def _inputs(report: Report) -> dict[str, str]:
    """Name the inputs that an op had, by mode."""
    believed = "the reference's" if report.sides[0].startswith("reference") else "the recorded"
    return {FORCED: f", on {believed} inputs", FREE: ", on its own inputs"}


def _number(x: Any, digits: int = 9) -> str:
    """Format a float; 9 digits tell any two float32 values apart. Other values as they are."""
    return f"{float(x):.{digits}g}" if isinstance(x, (float, np.floating)) else str(x)


def _fault(r: ArrayComparison, inputs: dict[str, str]) -> Table:
    """Tabulate one comparison in full: names at the left, values at the right."""
    lines = {
        "stage": r.stage,
        "op": r.op + inputs.get(r.mode, ""),
        "layer": "outside the layers" if r.layer is None else str(r.layer),
        "tap": r.tap + (f", shape {' x '.join(map(str, r.shape))}" if r.shape else ""),
        "worst": f"element [{', '.join(map(str, r.index))}]" if r.index else "",
    }
    if not (r.got is None and r.want is None):
        lines |= {"got": _number(r.got), "want": _number(r.want)}
    lines["error"] = f"{_number(r.err, 3)}, {r.error}"
    lines["error"] += f" of {_number(r.tol, 3)}" if r.ratio < np.inf else ""
    lines["cause"] = r.cause or "not known"
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in lines.items():
        if value:
            table.add_row(cell("  " + name), cell(value, "bold" if name == "cause" else "", lines=True))
    return table


def _further(rows: Sequence[ArrayComparison]) -> Table:
    table = plain_table("stage_", "where", "err/tol|", "likely cause")
    for r in rows:
        table.add_row(*map(cell, (r.stage, r.place, ratio_text(r.ratio), r.cause or "-")))
    return table


def _drift(report: Report) -> str:
    """Sum up the arrays beyond their tolerance on the side's own inputs; "" for none."""
    total = sum(r.mode == FREE for r in report.rows)
    bad = [r for r in report.guilty if r.mode == FREE]
    if not bad:
        return ""
    worst = max(bad, key=lambda r: r.ratio)
    verb = "drifts" if len(bad) == 1 else "drift"
    return (
        f"On its own inputs, {len(bad)} of {plural(total, 'array')} {verb} beyond rounding, from {bad[0].tap} on; "
        f"at most {ratio_text(worst.ratio)} times the tolerance, {worst.place}."
    )


def print_catalogue(planted: Sequence[Planted], console: Console) -> None:
    """Print the catalogue of planted faults with the comparison that found each."""
    if not console.is_terminal:
        console.width = 200
    table = plain_table("fault", "what it does", "found by", "op named", "tap", "s|")
    for p in planted:
        r = p.row
        stage, op, tap = (r.stage, r.op, r.tap) if r else ("NOT FOUND", "", "")
        named = op if p.is_named else f"{op}, NOT {p.fault.named.op}"
        table.add_row(*map(cell, (p.fault.name, p.fault.what, stage, named, tap, f"{p.seconds:.2f}")))
    console.print(table)
    count = sum(p.is_named for p in planted)
    console.print(
        cell(f"{count} of {plural(len(planted), 'fault')} were found and named as the catalogue says.")
    )
