"""Show the ranks of a run: where they computed, what each owned, and how long a micro-batch took them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.units import plural
from ..evidence.ranks import members, times
from .charts import Line, Plot, plot
from .run_files import Run
from .words import as_text


def rank_section(run: Run) -> dict[str, Any] | None:
    """Describe the ranks of the latest start, with the sizes of all; None where one process has trained alone."""
    starts = members(run.ckpt.parent)
    if not starts:
        return None
    after, ranks = starts[-1]
    # Those of an earlier start are of other processes, perhaps on other machines.
    since = after if isinstance(after, int) else 0
    timed = [
        seconds for step, seconds in times(run.ckpt.parent) if step > since and len(seconds) == len(ranks)
    ]
    sizes = [_owned(r.get("part")) for r in ranks]
    rows = []
    for n, r in enumerate(ranks):
        others = np.delete(np.asarray(timed[-1]), n) if timed and len(ranks) > 1 else np.empty(0)
        beside = timed[-1][n] / float(np.median(others)) if others.size and np.median(others) > 0 else None
        rows.append(
            {
                "rank": n,
                "host": as_text(r.get("host", "")),
                "gpu": as_text(r.get("uuid", "")),
                "part": f"{100 * sizes[n] / max(1, sum(sizes)):.1f} %" if sum(sizes) else "",
                "ms": f"{1e3 * timed[-1][n]:,.1f}" if timed else "",
                "beside": f"{beside:.2f}" if beside is not None else "",
            }
        )
    words = (f"{plural(len(of_start), 'rank')} after step {as_text(step)}" for step, of_start in starts)
    return {"rows": rows, "starts": ", ".join(words)}


def rank_chart(run: Run, last: float) -> list[Plot]:
    """Plot how long a micro-batch takes the slowest rank, and the median; nothing where there are no times."""
    timed = [(step, seconds) for step, seconds in times(run.ckpt.parent) if len(seconds) > 1]
    if not timed:
        return []
    x = np.array([step for step, _ in timed], np.float64)
    slowest, median = (np.array([1e3 * f(seconds) for _, seconds in timed]) for f in (np.max, np.median))
    lines = [Line("slowest rank", x, slowest), Line("median of the ranks", x, median, "dots", "b")]
    return [plot("ranks", "Fastest micro-batch of a rank", "ms", lines, last_x=last, zero=True)]


def _owned(part: Any) -> int:
    """Count the elements of a part; 0 where the record has none."""
    pairs = part if isinstance(part, list) else []
    return sum(
        p[1] - p[0]
        for p in pairs
        if isinstance(p, list) and len(p) == 2 and all(isinstance(n, int) for n in p)
    )
