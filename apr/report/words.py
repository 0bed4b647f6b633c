"""Format figures and values of JSON files as a person reads them."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from markupsafe import Markup, escape

from .charts import DRAWABLE

CODE = re.compile(r"(`[^`]+`|(?<![\w-])--[a-z][a-z0-9-]*)")


def decimal(value: float, digits: int = 4) -> str:
    """Format a figure with `digits` decimals, or 4 significant digits from a million on."""
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.4g}"


def magnitude(n: float) -> str:
    """Format a count: 2.36 M, or 12,800 where that says more."""
    if not math.isfinite(n):
        return str(n)
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if n >= unit:
            return f"{n / unit:.3g} {letter}"
    return f"{n / 1e3:.4g} k" if n >= 1e5 else f"{n:,.0f}"


def clock(seconds: float) -> str:
    """Format a duration: 45 s, 3 min 20 s, 5 h 12 min, 3 d 4 h."""
    s = round(seconds)
    if s < 60:
        return f"{seconds:.1f} s" if s < 10 else f"{s} s"
    for big, small, a, b in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if s >= big:
            return f"{s // big} {a} {s % big // small} {b}"
    raise AssertionError("s is at least 60")


def perplexity(loss: float) -> str:
    """Format exp(loss)."""
    if not loss < 700:
        return "inf"
    value = math.exp(loss)
    return f"{value:,.2f}" if value < 1e3 else f"{value:,.0f}" if value < 1e6 else f"{value:.3g}"


def as_text(value: Any) -> str:
    """Format a value of a JSON file."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def prose(text: str) -> Markup:
    """Mark flags, and text between backticks, as code."""
    parts = CODE.split(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(p.strip("`")) if i % 2 else escape(p) for i, p in enumerate(parts)
    )


def or_nan(value: Any) -> float:
    """Convert a number that can be drawn to float; nan for anything else."""
    return float(value) if isinstance(value, int | float) and abs(value) <= DRAWABLE else math.nan
