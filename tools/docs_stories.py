"""Make the tables of docs/stories.md: losses of apr and of TRL, step by step, from the records of both sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "stories.md"
RECORDS = {"toy": ROOT / "tests" / "golden" / "stories.json", "real": ROOT / "bench" / "stories.json"}
# Two runs of a story, and the column of their largest difference.
COLUMNS = {
    ("apr", "trl"): "apr, TRL",
    ("apr", "trl_float64"): "apr, TRL in float64",
    ("trl", "trl_float64"): "TRL, TRL in float64",
    ("trl_last_bits", "trl"): "TRL, TRL with other last bits",
}
SHOWN_STEPS = 6


def farthest(a: list[float], b: list[float]) -> float:
    """Compute the largest relative difference of a step."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def stories(record: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Pick the stories out of a record."""
    return {
        name: found for name, found in record.items() if isinstance(found, dict) and "trl_float64" in found
    }


def beside_table(size: str) -> str:
    """Make a table of the largest differences between runs of each story."""
    found = stories(json.loads(RECORDS[size].read_text()))
    columns = {k: v for k, v in COLUMNS.items() if all(set(k) <= set(runs) for runs in found.values())}
    lines = [
        f"| story, {size} size | steps | loss, first and last step, apr | TRL | {' | '.join(columns.values())} |",
        "|---" * (4 + len(columns)) + "|",
    ]
    for name, runs in found.items():
        ends = [f"{runs[run][0]:.6f}, {runs[run][-1]:.6f}" for run in ("apr", "trl")]
        far = [f"{farthest(runs[a], runs[b]):.0e}" for a, b in columns]
        lines.append(f"| {' | '.join([name, str(len(runs['apr'])), *ends, *far])} |")
    return "\n".join(lines) + "\n"


def steps_table() -> str:
    """Make a table of some steps of the first story at real size."""
    runs = next(iter(stories(json.loads(RECORDS["real"].read_text())).values()))
    last = len(runs["apr"])
    names = {
        "apr": "apr",
        "trl": "TRL",
        "trl_float64": "TRL in float64",
        "trl_last_bits": "TRL with other last bits",
    }
    names = {run: title for run, title in names.items() if run in runs}
    lines = [f"| step | {' | '.join(names.values())} |", "|---" * (1 + len(names)) + "|"]
    for step in sorted({1, last, *(round(last * k / SHOWN_STEPS) for k in range(1, SHOWN_STEPS))}):
        lines.append(f"| {step} | {' | '.join(f'{runs[run][step - 1]:.8f}' for run in names)} |")
    return "\n".join(lines) + "\n"
