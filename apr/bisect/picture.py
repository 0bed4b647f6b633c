"""Picture of a bisection: error over tolerance of every layer and op, as a PNG."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..common.atomic import write_figure
from ..common.units import plural
from .report import FORCED, FREE, PASSES, ArrayComparison, Report

GROUPS = ("forward", "loss", "backward", "gradients", "optimizer")
PANELS = {
    FORCED: "Forced: every op has the reference's inputs, an error is its own",
    FREE: "Free: every op has its own inputs, errors pile up",
}
WITHIN, BEYOND = ("#e8f1fb", "#8fbce6", "#2b66a8"), ("#ff9d85", "#e0301e", "#8c0612")
INFINITE, NOT_COMPARED = "#2a0008", "#e7e7e4"
DECADES = 3  # of error/tolerance with shades of their own, on each side of 1
CELL, GAP, DPI = 0.175, 0.6, 120  # width of a cell in inches; space between groups in cells; pixels per inch
TOP, FOOT, SIDE = 0.85, 0.7, 0.75  # inches for the title, the legend, the names of the layers
BOX = 62  # characters of a line of the likely cause


class Column(NamedTuple):
    """Column of the picture: the array that an op writes in every layer."""

    group: str
    op: str
    tap: str  # without the layer


def column_of(row: ArrayComparison) -> Column:
    """Return the column of a comparison of PASSES.

    Numbers in a tap name are layers or first rows. In the optimizer, the part of a tap name behind the buffer is only the
    place of the worst element."""
    parts = [p for p in row.tap.split(".") if not p.isdigit()] or [row.tap]
    if row.stage == "optimizer":
        return Column(row.stage, row.op, parts[0])
    if parts[0] == "grad" and len(parts) > 1:
        return Column("gradients", row.op, ".".join(parts[1:]))
    return Column(row.stage, row.op, ".".join(parts))


def grid(report: Report, mode: str) -> tuple[list[Column], list[int | None], np.ndarray]:
    """Arrange a report as (columns in order of computation, layers, worst error/tolerance (layers, columns)).

    NaN: not compared. A last layer None holds the arrays outside the layers. Both modes have the same columns and
    layers; comparisons of mode EXACT count as forced. A column stands where a layer first has it: arrays outside the
    layers may come before that.
    """
    cells = [(column_of(r), r) for r in report.rows if r.stage in PASSES]
    inside: dict[Column, int] = {}
    outside: dict[Column, int] = {}
    for free in (False, True):
        for i, (c, r) in enumerate(x for x in cells if (x[1].mode == FREE) == free):
            (outside if r.layer is None else inside).setdefault(c, i)
    first = outside | inside
    columns = sorted(first, key=lambda c: (GROUPS.index(c.group), first[c]))
    depth = max((r.layer + 1 for _, r in cells if r.layer is not None), default=0)
    layers: list[int | None] = list(range(depth))
    if any(r.layer is None for _, r in cells):
        layers.append(None)
    matrix = np.full((len(layers), len(columns)), np.nan)
    for c, r in cells:
        if (r.mode == FREE) == (mode == FREE):
            at = layers.index(r.layer), columns.index(c)
            matrix[at] = np.fmax(matrix[at], r.ratio)
    return columns, layers, matrix


def shade(matrix: np.ndarray) -> np.ndarray:
    """log10 of error/tolerance, clipped to DECADES: negative within tolerance, above DECADES for infinity."""
    with np.errstate(divide="ignore"):
        out = np.clip(np.log10(matrix), -DECADES, DECADES)
    out[matrix <= 1] = np.minimum(out[matrix <= 1], -1e-6)
    out[np.isinf(matrix)] = DECADES + 1
    return out


def _colours() -> tuple[Any, Any]:
    """Return (colour map, norm) for the values of shade(), with a break at 0."""
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap, Normalize

    halves = [LinearSegmentedColormap.from_list("", x)(np.linspace(0, 1, 128)) for x in (WITHIN, BEYOND)]
    colours = ListedColormap(np.concatenate(halves)).with_extremes(bad=NOT_COMPARED, over=INFINITE)
    return colours, Normalize(-DECADES, DECADES)


def _spread(columns: Sequence[Column]) -> tuple[list[float], dict[str, tuple[int, int]], float]:
    """Place the columns: (left edge of every column, {group: (first column, one past its last)}, width), in cells.

    A group is at least as wide as its name."""
    left: list[float] = []
    groups: dict[str, tuple[int, int]] = {}
    start = 0.0
    for name in GROUPS:
        n = sum(c.group == name for c in columns)
        if n:
            groups[name] = len(left), len(left) + n
            left += [start + i for i in range(n)]
            start += max(n, 0.42 * len(name)) + GAP
    return left, groups, max(start - GAP, 1)


def _labels(columns: Sequence[Column]) -> list[str]:
    """Label columns with their tap, and with the op when two columns of a group have one tap."""
    seen = [(c.group, c.tap) for c in columns]
    ops = [re.sub("_(fwd|bwd)$", "", c.op) for c in columns]
    return [t if seen.count((g, t)) == 1 else f"{t}, {op}" for (g, t), op in zip(seen, ops, strict=True)]


def picture(report: Report, path: Path) -> None:
    """Draw error/tolerance as a PNG: layers down, ops across; forced above free, or beside it with many layers."""
    from matplotlib.figure import Figure

    columns, layers, _ = grid(report, FORCED)
    matrices = {mode: grid(report, mode)[2] for mode in PANELS}
    panels = [m for m, x in matrices.items() if not np.isnan(x).all()]
    fault = report.first if report.first and report.first.stage in PASSES else None
    at = (FREE if fault.mode == FREE else FORCED) if fault else None  # the panel that shows it
    line = 0.3 if len(layers) <= 8 else 0.2 if len(layers) <= 26 else 0.15
    across, high = CELL * _spread(columns)[2], line * len(layers)
    under = 0.25 + 0.062 * max(map(len, _labels(columns)), default=0)
    beside = len(panels) == 2 and len(layers) > 0.7 * len(columns)
    over = {m: 0.55 + 0.65 * (m == at or (beside and at is not None)) for m in panels}
    step = max(across, 4.3) + SIDE  # so that the headings of panels beside each other have room
    blocks = [over[m] + high + under for m in panels] or [0.8]
    wide = max(7.6, SIDE + (step if beside else 0) + across + 0.3)
    tall = TOP + FOOT + (max(blocks) if beside else sum(blocks))
    figure = Figure(figsize=(round(wide, 2), round(tall, 2)), dpi=DPI)
    _title(figure, report, wide, tall)
    x, y = SIDE, tall - TOP
    for mode, block in zip(panels, blocks, strict=False):
        place = (x / wide, (y - over[mode] - high) / tall, across / wide, high / tall)
        axes = figure.add_axes(place)
        _panel(axes, columns, layers, matrices[mode])
        figure.text(place[0], (y - 0.14) / tall, PANELS[mode], fontsize=9, va="center")
        if fault and mode == at:
            _point_out(axes, fault, columns, layers)
        x, y = (x + step, y) if beside else (x, y - block)
    if panels:
        _legend(figure, wide, tall)
    else:
        figure.text(0.5, 0.4, "no op was compared", ha="center", color="grey")
    write_figure(path, figure)


def _legend(figure: Any, wide: float, tall: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.patches import Patch

    bar = figure.add_axes((SIDE / wide, 0.46 / tall, 3.4 / wide, 0.11 / tall))
    ticks = range(-DECADES, DECADES + 1)
    figure.colorbar(ScalarMappable(*reversed(_colours())), cax=bar, orientation="horizontal")
    bar.set_xticks(ticks, [f"{10.0**t:g}" for t in ticks], fontsize=7)
    bar.set_xlabel("error / tolerance: blue is within, red is beyond", fontsize=7, labelpad=2)
    names = {INFINITE: "not finite, or not equal", NOT_COMPARED: "not compared"}
    patches = [Patch(color=c, label=text) for c, text in names.items()]
    at = ((SIDE + 3.6) / wide, 0.52 / tall)
    figure.legend(handles=patches, loc="center left", bbox_to_anchor=at, ncols=2, fontsize=7, frameon=False)


def _title(figure: Any, report: Report, wide: float, tall: float) -> None:
    first = report.first
    verdict = (
        f"agree: {plural(len(report.rows), 'array')} within tolerance"
        if report.agree
        else "nothing was compared"
    )
    colour = WITHIN[2] if report.agree else "grey"
    if first:
        verdict, colour = f"DIFFER: first in {first.stage}, {first.place}", BEYOND[2]
    names = f"{report.model}: {report.sides[1]} compared with {report.sides[0]}"
    for text, y, style in (
        (textwrap.shorten(names, int(9 * wide), placeholder=" ..."), 0.2, dict(fontsize=12, weight="bold")),
        (textwrap.shorten(verdict, int(12 * wide), placeholder=" ..."), 0.5, dict(fontsize=10, color=colour)),
    ):
        figure.text(0.15 / wide, 1 - y / tall, text, va="center", parse_math=False, **style)


def _panel(axes: Any, columns: list[Column], layers: list[int | None], matrix: np.ndarray) -> None:
    """Cells of one mode, a mesh per group, with the names of groups, columns and layers."""
    left, groups, width = _spread(columns)
    values, (cmap, norm) = shade(matrix), _colours()
    down = range(len(layers) + 1)
    for name, (first, end) in groups.items():
        edges = [*left[first:end], left[end - 1] + 1]
        axes.pcolormesh(edges, down, values[:, first:end], cmap=cmap, norm=norm, edgecolor="white", lw=0.7)
        axes.annotate(name, (left[first], 0), (0, 5), textcoords="offset points", fontsize=8, color="#555555")
    if len(layers) > 1 and layers[-1] is None:
        axes.axhline(len(layers) - 1, color="white", linewidth=3)
    axes.set(xlim=(0, width), ylim=(len(layers), 0))
    axes.set_xticks([x + 0.5 for x in left], _labels(columns), rotation=90, fontsize=7)
    names = ["outside" if i is None else f"layer {i}" if i == 0 else str(i) for i in layers]
    axes.set_yticks([i + 0.5 for i in range(len(layers))], names, fontsize=7)
    axes.tick_params(length=0, pad=3)
    axes.spines[:].set_visible(False)


def _point_out(axes: Any, fault: ArrayComparison, columns: list[Column], layers: list[int | None]) -> None:
    """Outline the cell of the first fault, and write its likely cause above the panel."""
    from matplotlib.patches import Rectangle

    left, _, width = _spread(columns)
    x, y = left[columns.index(column_of(fault))], layers.index(fault.layer)
    axes.add_patch(
        Rectangle((x, y), 1, 1, fill=False, edgecolor="black", linewidth=1.8, zorder=5, clip_on=False)
    )
    cause = textwrap.wrap(fault.cause or "cause not known", BOX, max_lines=2, placeholder=" ...")
    wide = 0.062 * BOX / CELL  # of the box, in cells, when it is full
    start = max(0, min(x, width - wide))
    inch = 1 / (axes.get_position().height * axes.figure.get_figheight())  # as a fraction of the axes
    below = (np.clip((x + 0.5 - start) / wide, 0.05, 0.95), 0)  # where in the box the arrow starts
    axes.annotate(
        "\n".join([textwrap.shorten(f"{fault.place}: {fault.error}", BOX + 8, placeholder=" ..."), *cause]),
        (x + 0.5, y),
        (start / width, 1 + 0.34 * inch),
        textcoords="axes fraction",
        bbox=dict(boxstyle="round,pad=0.35", facecolor="white", linewidth=0.8),
        arrowprops=dict(arrowstyle="-|>", color="black", linewidth=0.9, relpos=below),
        fontsize=8, va="bottom", zorder=6, annotation_clip=False, parse_math=False,
    )  # fmt: skip
