"""Display of a corpus: progress of its encoding, and a picture of its statistics."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from ...common.atomic import write_figure
from ...common.units import plural
from ...data.audit import Split
from ...data.encode import Counts
from ...data.scan import LENGTH_BINS
from ..show import Show
from ..tables import cell

LINE_SECONDS = 10.0  # between lines where the output is no terminal


class EncodeProgress:
    """Shows documents, tokens, MB/s of text and the time left of encode_corpus: in one line of a terminal, elsewhere in a
    line every LINE_SECONDS."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._start = time.perf_counter()
        self._last = self._start
        self._status = show.console.status("reading ...") if show.console.is_terminal else None
        if self._status:
            self._status.start()

    def __call__(self, counts: Counts, read: int, total: int) -> None:
        """Show progress; read, total: bytes."""
        now = time.perf_counter()
        if now - self._last < (0.2 if self._status else LINE_SECONDS):
            return
        self._last = now
        seconds = now - self._start
        left = seconds * (total - read) / read if read else 0.0
        text = (
            f"{100 * read / max(total, 1):3.0f} %  {plural(counts.all, 'document')}  {counts.tokens / 1e6:,.1f} M tokens  "
            f"{counts.text_bytes / 1e6 / seconds:.1f} MB/s  {clock(left)} left"
        )
        if self._status:
            self._status.update(cell(text))
        else:
            self._show.note(text)

    def stop(self) -> float:
        """Remove the line; returns the seconds since the start."""
        if self._status:
            self._status.stop()
        return time.perf_counter() - self._start


def clock(seconds: float) -> str:
    """Format seconds as "1:02:03" or "2:03"."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def draw_audit(splits: list[Split], vocab_size: int, path: Path) -> None:
    """Draw the share of each id by its rank, and the lengths of documents, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    ranks, lengths = figure.subplots(1, 2)
    for split, colour in zip(splits, ("tab:blue", "tab:red"), strict=False):
        if split.scan is None or split.shards is None:
            continue
        counts = np.sort(split.scan.counts[split.scan.counts > 0])[::-1]
        share = counts / counts.sum()
        label = f"{split.name}: {counts.size:,} of {plural(vocab_size, 'id')} occur"
        ranks.loglog(np.arange(1, counts.size + 1), share, color=colour, label=label)
        found = split.scan.lengths
        if not found.any():
            continue
        first, last = int(np.flatnonzero(found)[0]), int(np.flatnonzero(found)[-1])
        edges = 2.0 ** (np.arange(first, last + 2) / LENGTH_BINS)
        part = found[first : last + 1] / found.sum()
        lengths.stairs(
            part,
            edges,
            color=colour,
            fill=True,
            alpha=0.4,
            label=f"{split.name}: {plural(found.sum(), 'document')}",
        )
    ranks.set(xlabel="rank of the id", ylabel="share of all tokens", title="token frequencies")
    ranks.axhline(1 / vocab_size, color="grey", linewidth=0.8, linestyle="--")
    ranks.annotate("every id as often", (1, 1 / vocab_size), fontsize=8, color="grey", va="bottom")
    lengths.set(
        xlabel="tokens of a document", ylabel="share of documents", title="document lengths", xscale="log"
    )
    for axes in (ranks, lengths):
        axes.grid(alpha=0.2)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    if not lengths.patches:
        lengths.annotate(
            "no end-of-text id: documents are not delimited",
            (0.5, 0.5),
            xycoords="axes fraction",
            ha="center",
            fontsize=8,
        )
    write_figure(path, figure)
