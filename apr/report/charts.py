"""Geometry of line charts: series thinned without losing extremes, ticks, labels; a template draws the result.

Curves are SVG paths in a square of SIDE x SIDE that the page stretches to the size of the plot; text stands beside them
as HTML, at shares (percent) of width and height, so that it keeps its size on every screen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SIDE = 1000  # units of the square that paths are drawn in
MAX_POINTS = 1500  # of a series that are drawn
MAX_MEAN_POINTS = 750  # of a moving mean, which is smooth
MAX_DOTS = 200
LARGE_DOTS = 40  # so many can be told from each other; more are drawn smaller
DRAWABLE = 1e150  # larger figures are taken for infinite: differences and squares must not overflow
OUTLIER = 0.5  # of the range of 98 % of a series: what lies further above them is marked at the border
# Percent of the plot that a letter and the rest of a mark's label take, at about 700 pixels.
LABEL_WIDTH = (0.95, 4.0)

MAX_LABEL = 7  # characters of a label of the y axis, for which there is room
TICK_ROOM = 45  # pixels of height for each label of the y axis
LABEL_HEIGHT = 18  # pixels of a label's line


@dataclass(frozen=True)
class Line:
    """A series. kind: raw (faint), mean, plain or dots; colour: a class of the page."""

    label: str
    x: np.ndarray
    y: np.ndarray
    kind: str = "plain"
    colour: str = "a"
    error: np.ndarray | None = None  # one standard error of each dot


@dataclass(frozen=True)
class Rule:
    """A horizontal yardstick."""

    value: float
    label: str


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: a gate that did not pass."""

    x: float
    label: str
    verdict: str


@dataclass
class Plot:
    """A chart, ready to draw: positions in percent of width and height, y downwards."""

    name: str
    title: str
    unit: str
    height: int  # pixels, of the plot on a wide screen
    summary: str  # what a screen reader says
    paths: list[tuple[str, str]] = field(default_factory=list)  # class, SVG path
    legend: list[tuple[str, str]] = field(default_factory=list)  # class, text
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    x_ticks: list[tuple[float, str, str]] = field(default_factory=list)  # place, step, tokens
    # place, label, below its line, from the right
    rules: list[tuple[float, str, bool, int]] = field(default_factory=list)
    marks: list[dict[str, Any]] = field(default_factory=list)
    mark_rows: int = 0
    beyond: list[float] = field(default_factory=list)  # where points lie above the chart
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)  # what the tooltip reads


def finite(x: np.ndarray, y: np.ndarray, positive: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The points that can be drawn: finite, and above 0 for a logarithmic axis."""
    keep = (np.abs(y) <= DRAWABLE) & (y > 0) if positive else np.abs(y) <= DRAWABLE
    return x[keep], y[keep]


def thin(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> np.ndarray:
    """Indices of at most `most` points: first, last, and the smallest and largest of each of equal bins between."""
    n = len(y)
    if n <= most:
        return np.arange(n)
    edges = np.linspace(1, n - 1, (most - 2) // 2 + 1).astype(int)
    kept = {0, n - 1}
    for a, b in itertools.pairwise(edges.tolist()):
        kept |= {a + int(y[a:b].argmin()), a + int(y[a:b].argmax())}
    return np.array(sorted(kept))


def moving_mean(x: np.ndarray, y: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each `width` neighbours, at the last of them."""
    total = np.concatenate(([0.0], np.cumsum(y, dtype=np.float64)))
    return x[width - 1 :], (total[width:] - total[:-width]) / width


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], as near to `about` of them as can be."""
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    found: list[list[float]] = []
    for step in (m * power for m in (1, 2, 5, 10)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        found.append([k * step for k in range(first, last + 1)])
    return min(found, key=lambda ticks: abs(len(ticks) - about))


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 times them where there is room; round numbers where the range is small."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [t for d in decades for f in factors if low <= (t := f * 10.0**d) <= high]
        if len(found) <= 7:
            break
    if len(found) > 7:
        found = found[:: math.ceil(len(found) / 6)]
    return found if len(found) > 2 else nice_ticks(low, high, 5)


def short(value: float, step: float = 0.0, top: float = 0.0) -> str:
    """A tick's number with no more digits than neighbours `step` apart need: 0.25, 1.5k, 20M, 2e-5. top: the largest of
    the axis, which decides on k, M and G for all."""
    if value == 0:
        return "0"
    size = max(abs(value), top)
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit * (1 if unit > 1e3 else 10):
            return (
                f"{value / unit:.{_digits(step / unit)}f}{letter}" if step else f"{value / unit:.3g}{letter}"
            )
    if size < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.{_digits(step)}f}" if step else f"{value:,.4g}"


def _digits(step: float) -> int:
    return max(0, min(6, -math.floor(math.log10(step) + 1e-9))) if step > 0 else 0


class _Axis:
    """Values of y to percent from the top."""

    def __init__(self, low: float, high: float, log: bool) -> None:
        if not low < high:  # one value only
            low, high = (
                (low / 2, high * 2)
                if log and low > 0
                else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
            )
        self.log, self.low, self.high = log, low, high

    def __call__(self, y: Any) -> Any:
        a, b, v = self.low, self.high, np.asarray(y, np.float64)
        if self.log:
            a, b, v = math.log(a), math.log(b), np.log(v)
        return 100 * (b - v) / (b - a)

    def ticks(self, about: int) -> tuple[list[tuple[float, str]], str]:
        """Place and label of each tick, and what the labels are counted from, or "": ticks may differ in the eighth digit."""
        values = log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high, about)
        step = 0.0 if self.log else values[1] - values[0] if len(values) > 1 else 0.0
        texts = [short(v, step, 0.0 if self.log else values[-1]) for v in values]
        start = ""
        # Only of numbers that are near each other: 0.00001 and 0.00002 have no digits to leave out.
        near = 0 < step < 1e-3 * abs(values[0])
        if near and (max(map(len, texts)) > MAX_LABEL or len({*texts}) < len(texts)):
            start = f"the axis counts from {values[0]:.{max(0, min(15, 1 - math.floor(math.log10(step))))}f}"
            texts = [f"+{short(k * step)}" for k in range(len(values))]
        return [(round(float(self(v)), 2), text) for v, text in zip(values, texts, strict=True)], start


def _range(lines: Sequence[Line], rules: Sequence[Rule], log: bool, zero: bool) -> _Axis:
    """An axis for what the series are like, not for their worst spike: what lies above is marked at the border."""
    spread, whole = [], []
    for line in lines:
        y = finite(line.x, line.y, log)[1]
        if y.size:
            whole.append((float(y.min()), float(y.max())))
            q1, q99 = np.quantile(y, [0.01, 0.99])
            first = float(y[0]) if y.size else q99
            spread.append((float(y.min()), max(float(q99 + OUTLIER * (q99 - q1)), first)))
    if not whole:
        return _Axis(1.0, 10.0, True) if log else _Axis(0.0, 1.0, False)
    low = min(a for a, _ in whole)
    high = max(b for _, b in whole)
    if log:
        low, high = min([low, *(r.value for r in rules)]), max([high, *(r.value for r in rules)])
        room = (high / low) ** 0.12 if high > low else 2.0
        return _Axis(low / room, high * room, True)
    high = min(high, max(b for _, b in spread))
    low = max(low, min(a for a, _ in spread))
    near = 0.6 * (high - low)
    for rule in rules:
        if low - near <= rule.value <= high + near:
            low, high = min(low, rule.value), max(high, rule.value)
    pad = 0.08 * ((high - low) or abs(high) or 1.0)
    return _Axis(0.0, high + pad, False) if zero and low >= 0 else _Axis(low - pad, high + pad, False)


def plot(
    name: str,
    title: str,
    unit: str,
    lines: Sequence[Line],
    rules: Sequence[Rule] = (),
    marks: Sequence[Mark] = (),
    *,
    last_x: float,
    height: int = 190,
    log: bool = False,
    zero: bool = False,
    tokens_at: Callable[[float], float] | None = None,
) -> Plot:
    """Lay out a chart over x in [0, last_x]. tokens_at: tokens seen at a step, for a second row under the axis."""
    lines = [line for line in lines if finite(line.x, line.y, log)[1].size]
    axis, width = _range(lines, rules, log, zero), max(last_x, 1.0)
    p = Plot(name, title, unit, height, _summary(title, unit, lines))
    p.y_ticks, start = axis.ticks(height // TICK_ROOM)
    p.notes += [start] if start else []
    p.data = {"x": width, "low": axis.low, "high": axis.high, "log": log, "series": []}
    for line in lines:
        _draw(p, line, axis, width, log)
    _place_rules(p, rules, axis, lines, width)
    _place_marks(p, marks, width)
    x_values = [v for v in nice_ticks(0, width, 7) if v == round(v)]
    step = x_values[1] - x_values[0] if len(x_values) > 1 else 0.0
    for v in x_values:
        tokens = short(tokens_at(v)) if tokens_at and v else ""
        p.x_ticks.append((round(100 * v / width, 2), short(v, step, x_values[-1]), tokens))
    return p


def _summary(title: str, unit: str, lines: Sequence[Line]) -> str:
    parts = []
    for line in lines:
        x, y = finite(line.x, line.y)
        low, high = int(y.argmin()), int(y.argmax())
        parts.append(
            f"{line.label}: {y[0]:.4g} at step {x[0]:,.0f}, {y[-1]:.4g} at step {x[-1]:,.0f}, "
            f"lowest {y[low]:.4g} at step {x[low]:,.0f}, highest {y[high]:.4g} at step {x[high]:,.0f}"
        )
    return f"{title}{f' ({unit})' if unit else ''}. " + "; ".join(parts)


def _draw(p: Plot, line: Line, axis: _Axis, width: float, log: bool) -> None:
    """Path, legend and tooltip data of a series."""
    x, y = finite(line.x, line.y, log)
    kept = thin(x, y, {"mean": MAX_MEAN_POINTS, "dots": MAX_DOTS}.get(line.kind, MAX_POINTS))
    places = list(zip((x[kept] / width * SIDE).tolist(), (axis(y[kept]) * SIDE / 100).tolist(), strict=True))
    # A line of one point would not be seen.
    kind = line.kind if len(places) > 1 else "dots"
    style = f"{kind} {line.colour}"
    if kind == "dots":
        style += " many" * (len(kept) > LARGE_DOTS)
        dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in places)
        p.paths.append((f"plain {line.colour}", _path(places)))
        if len(kept) <= LARGE_DOTS:
            p.paths.append(("halo", dots))
        if line.error is not None:
            p.paths.append((f"error {line.colour}", "".join(_error_bars(line, axis, width, log, kept))))
        p.paths.append((style, dots))
    else:
        p.paths.append((style, _path(places)))
    p.legend.append((style, line.label))
    missing = len(line.y) - len(y)
    if missing:
        why = "not finite or not above 0" if log else "not finite"
        p.notes.append(f"not drawn ({line.label}): {missing:,} value{'s' if missing > 1 else ''} {why}")
    above = y > axis.high
    if above.any():
        top = int(y.argmax())
        p.beyond += sorted({round(100 * float(v) / width) for v in x[above]})
        p.notes.append(
            f"\u25b2 above the chart ({line.label}): {above.sum():,} point{'s' if above.sum() > 1 else ''}, the highest "
            f"{y[top]:.4g} at step {x[top]:,.0f}"
        )
    series: dict[str, Any] = {"label": line.label, "style": style}
    series["x"] = [int(v) if v == int(v) else v for v in x[kept].tolist()]
    series["y"] = [float(f"{v:.6g}") for v in y[kept].tolist()]
    if line.error is not None:
        errors = line.error[np.isin(line.x, x)][kept]
        series["error"] = [float(f"{v:.3g}") if math.isfinite(v) else None for v in errors.tolist()]
    p.data["series"].append(series)


def _error_bars(line: Line, axis: _Axis, width: float, log: bool, kept: np.ndarray) -> Iterator[str]:
    assert line.error is not None
    x, y = finite(line.x, line.y, log)
    errors = line.error[np.isin(line.x, x)]
    for k in kept.tolist():
        if math.isfinite(errors[k]):
            a, b = (float(axis(y[k] + sign * errors[k])) * SIDE / 100 for sign in (1, -1))
            yield f"M{x[k] / width * SIDE:.1f} {a:.1f}V{b:.1f}"


def _path(places: Sequence[tuple[float, float]]) -> str:
    """Points outside the square stay near it: a browser need not draw a spike of a million."""
    return "M" + "L".join(f"{a:.1f} {min(max(b, -SIDE), 2 * SIDE):.1f}" for a, b in places)


def _place_rules(p: Plot, rules: Sequence[Rule], axis: _Axis, lines: Sequence[Line], width: float) -> None:
    """Yardsticks, each label where the fewest points of curves, no other label and no other yardstick are: above or
    below its line, at the right end or nearer the middle."""
    drawn = [finite(line.x, line.y, axis.log) for line in lines]
    x = np.concatenate([100 * a / width for a, _ in drawn]) if drawn else np.zeros(0)
    y = np.concatenate([axis(b) for _, b in drawn]) if drawn else np.zeros(0)
    tall = 100 * LABEL_HEIGHT / p.height
    taken: list[tuple[float, float, float, float]] = []
    shown: list[tuple[float, str]] = []
    for rule in rules:
        if axis.low <= rule.value <= axis.high:
            shown.append((round(float(axis(rule.value)), 2), rule.label))
        else:
            p.notes.append(f"{rule.label} lies {'above' if rule.value > axis.high else 'below'} the chart")
    for place, label in sorted(shown):
        found = []
        for right, below in itertools.product((0, 20, 40, 60), (False, True)):
            top = place if below else place - tall
            box = (100 - right - LABEL_WIDTH[0] * len(label), 100.0 - right, top, top + tall)
            meets = any(box[0] < b and a < box[1] and box[2] < d and c < box[3] for a, b, c, d in taken)
            crossed = any(box[2] < other < box[3] for other, _ in shown if other != place)
            points = ((x > box[0]) & (x < box[1]) & (y > box[2]) & (y < box[3])).sum()
            # Coarse: a label moves inwards only where it gains by it.
            share = int(20 * points / max(len(x), 1))
            found.append((meets or top < -2 or top + tall > 101, crossed, share, right, points, below, box))
        *_, right, _, below, box = min(found)
        taken.append(box)
        p.rules.append((place, label, below, right))


def _place_marks(p: Plot, marks: Sequence[Mark], width: float) -> None:
    """Labels of marks in as many rows as keep them apart."""
    ends: list[float] = []
    letter, rest = LABEL_WIDTH
    for mark in sorted(marks, key=lambda m: m.x):
        at, size = min(100.0, 100 * mark.x / width), letter * len(mark.label) + rest
        left = at > 60  # the label stands to the left of its line
        start, end = (at - size, at) if left else (at, at + size)
        row = next((r for r, e in enumerate(ends) if e <= start), len(ends))
        ends[row : row + 1] = [end]
        p.marks.append(
            dict(
                at=round(at, 2), row=row, label=mark.label, verdict=mark.verdict, step=int(mark.x), left=left
            )
        )
    p.mark_rows = len(ends)
